//! The service as a running program.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use tokio_postgres::Client;

use super::{Connection, Database, JSON, OnDrop, Response};

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_listing-api");

/// The running program. When dropped, it is killed, and the test fails if it panicked.
pub struct Service {
    database: Option<Database>,
    pub url: String,
    child: Child,
    pub address: String,
    pub admin_address: String,
    log: Arc<Mutex<Vec<String>>>,
    may_read: Arc<AtomicBool>,
}

impl Service {
    /// On a migrated database of its own, as a role that is only a member of `listing_api`.
    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    pub async fn start_with(settings: &[(&str, &str)]) -> Self {
        Self::start_on(Database::migrated().await, settings).await
    }

    /// On a database that the test has prepared.
    pub async fn start_on(database: Database, settings: &[(&str, &str)]) -> Self {
        let url = database.service_url().await;
        let mut command = command(&url);
        command.envs(settings.iter().copied());
        Self::run(command, &url, Some(database))
    }

    /// At a database that belongs to something else.
    pub fn start_at(url: &str, settings: &[(&str, &str)]) -> Self {
        let mut command = command(url);
        command.envs(settings.iter().copied());
        Self::run(command, url, None)
    }

    /// Runs a command and waits until the service is ready to serve.
    pub fn run(mut command: Command, url: &str, database: Option<Database>) -> Self {
        let mut child = command.spawn().expect("start the service");
        let log = Arc::new(Mutex::new(Vec::new()));
        let (lines, stderr) = (log.clone(), child.stderr.take().expect("stderr is a pipe"));
        let may_read = Arc::new(AtomicBool::new(true));
        let reading = may_read.clone();
        let reader = thread::spawn(move || {
            for line in BufReader::new(stderr).lines() {
                while !reading.load(Ordering::Relaxed) {
                    thread::sleep(Duration::from_millis(5));
                }
                let line = line.expect("the log is UTF-8");
                lines.lock().expect("lock").push(line);
            }
        });
        let mut service = Self {
            database,
            url: url.to_owned(),
            child,
            address: String::new(),
            admin_address: String::new(),
            log,
            may_read,
        };
        let serving = loop {
            let mut log = service.log().into_iter();
            if let Some(line) = log.find(|line| line.contains("serving on")) {
                break line;
            }
            let ended = reader.is_finished();
            assert!(!ended, "the service ended: {:?}", service.log());
            thread::sleep(Duration::from_millis(5));
        };
        // "serving on http://API, docs on http://API/docs, health and metrics on http://ADMIN"
        let addresses: Vec<_> = serving
            .split("http://")
            .skip(1)
            .filter_map(|rest| rest.split([',', '/', '"']).next())
            .collect();
        addresses[0].clone_into(&mut service.address);
        addresses[2].clone_into(&mut service.admin_address);
        service
    }

    /// The database of its own.
    pub fn db(&self) -> &Database {
        self.database.as_ref().expect("a database of its own")
    }

    /// A session of the superuser on the database of its own.
    pub fn superuser(&self) -> &Client {
        &self.db().superuser
    }

    pub fn connect(&self) -> Connection {
        Connection::to(&self.address)
    }

    /// Sends a request on a connection of its own.
    pub fn send(
        &self,
        method: &str,
        path: &str,
        headers: &str,
        body: impl AsRef<[u8]>,
    ) -> Response {
        self.connect().send(method, path, headers, body)
    }

    pub fn get(&self, path: &str) -> Response {
        self.send("GET", path, "", "")
    }

    pub fn post(&self, body: &str) -> Response {
        self.send("POST", "/listings", JSON, body)
    }

    pub fn patch(&self, path: &str, body: &str) -> Response {
        self.send("PATCH", path, JSON, body)
    }

    /// Gets a path of the admin listener, which serves health and metrics.
    pub fn admin(&self, path: &str) -> Response {
        let mut admin = Connection::to(&self.admin_address);
        admin.request("GET", path, "", "");
        admin.receive_unchecked("GET")
    }

    /// Reads nothing more of the log until the result is dropped.
    pub fn stop_reading(&self) -> impl Drop + use<> {
        let may_read = self.may_read.clone();
        may_read.store(false, Ordering::Relaxed);
        OnDrop(move || may_read.store(true, Ordering::Relaxed))
    }

    pub fn log(&self) -> Vec<String> {
        self.log.lock().expect("lock").clone()
    }

    /// The lines of the log that contain a text. Waits two seconds for the first one.
    pub fn logged(&self, text: &str) -> Vec<String> {
        for _ in 0..400 {
            let mut lines = self.log();
            lines.retain(|line| line.contains(text));
            if !lines.is_empty() {
                return lines;
            }
            thread::sleep(Duration::from_millis(5));
        }
        panic!("no line with {text} in the log: {:?}", self.log());
    }

    pub fn signal(&self, signal: &str) {
        let id = self.child.id().to_string();
        let sent = Command::new("kill").args([signal, &id]).status();
        assert!(sent.is_ok_and(|status| status.success()));
    }

    /// Waits until the service has ended. Returns the exit code.
    pub fn wait(&mut self) -> Option<i32> {
        self.child.wait().expect("wait for the service").code()
    }

    /// The processor time that the service has used.
    pub fn processor_time(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()));
        let stat = stat.expect("read /proc/ID/stat");
        // The fields after the name, which is in parentheses. The 12th and 13th of them are ticks of 10 ms.
        let (_, fields) = stat.rsplit_once(')').expect("a name in parentheses");
        let ticks = fields.split_whitespace().skip(11).take(2);
        let ticks: u32 = ticks
            .map(|ticks| ticks.parse::<u32>().expect("a number"))
            .sum();
        Duration::from_millis(10) * ticks
    }

    /// The largest resident memory so far.
    pub fn resident_kib(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let status = status.expect("read /proc/ID/status");
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = peak.and_then(|peak| peak.split_whitespace().next());
        kib.expect("VmHWM").parse().expect("a number")
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // Both fail if the test has ended the service itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let panicked = self.log().iter().any(|line| line.contains("panicked"));
        assert!(thread::panicking() || !panicked, "{:?}", self.log());
    }
}

/// The program with a database and free ports.
pub fn command(url: &str) -> Command {
    with_settings(Command::new(PROGRAM), url)
}

pub fn with_settings(mut command: Command, url: &str) -> Command {
    command
        .env_clear()
        .env("DATABASE_URL", url)
        .env("LISTEN_ADDR", "127.0.0.1:0")
        .env("ADMIN_ADDR", "127.0.0.1:0")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}
