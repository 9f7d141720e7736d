//! The service as its clients meet it: the real program on a real socket, every response held against `src/openapi.yaml`.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, LazyLock, Mutex};
use std::thread;
use std::time::Duration;

use jsonschema::Validator;
use serde_json::{Value, json};

use crate::harness::{Database, run};

/// A listing as a client sends it.
pub const LOFT: &str = r#"{"name":"Loft","postal_address":{"street_address":"1 rue Oberkampf","postal_code":"75011","city":"Paris","country":"FR"},"description":"Under the roof","building_type":"APARTMENT","latest_price_eur":480000,"surface_area_m2":42.5,"rooms_count":2,"bedrooms_count":1,"contact_phone_number":"+33123456789"}"#;

pub static OPENAPI: LazyLock<Value> = LazyLock::new(|| {
    serde_yaml_ng::from_str(include_str!("../src/openapi.yaml")).expect("the contract as YAML")
});

/// The running program, with a database of its own, to which it logs in as a role that is only a member of `listing_api`.
pub struct Service {
    pub db: Database,
    pub url: String,
    child: Child,
    pub address: String,
    pub admin_address: String,
    log: Arc<Mutex<Vec<String>>>,
}

impl Service {
    pub async fn start() -> Self {
        Self::start_with(Database::migrated().await, &[]).await
    }

    pub async fn start_with(db: Database, settings: &[(&str, &str)]) -> Self {
        let url = service_url(&db).await;
        Self::start_at(&url, db, settings)
    }

    /// On another database than the one that is dropped at the end.
    pub fn start_at(url: &str, db: Database, settings: &[(&str, &str)]) -> Self {
        let mut command = command(url);
        command.envs(settings.iter().copied());
        Self::run(command, url, db)
    }

    /// By a command of the test's own.
    pub fn run(mut command: Command, url: &str, db: Database) -> Self {
        let url = url.to_owned();
        let mut child = command.spawn().expect("the service");
        let log = Arc::new(Mutex::new(Vec::new()));
        let (lines, stderr) = (log.clone(), child.stderr.take().expect("its log"));
        let reader = thread::spawn(move || {
            for line in BufReader::new(stderr).lines() {
                lines
                    .lock()
                    .expect("the log")
                    .push(line.expect("a line of text"));
            }
        });
        let serving = loop {
            let line = log
                .lock()
                .expect("the log")
                .iter()
                .find(|line| line.contains("serving on"))
                .cloned();
            if let Some(line) = line {
                break line;
            }
            assert!(!reader.is_finished(), "the service ended: {:?}", log.lock());
            thread::sleep(Duration::from_millis(5));
        };
        let mut addresses = serving.split("http://").skip(1).map(|rest| {
            rest.split([',', ' ', '/'])
                .next()
                .expect("an address")
                .to_owned()
        });
        let (address, _docs, admin) = (addresses.next(), addresses.next(), addresses.next());
        let (address, admin_address) = (
            address.expect("its address"),
            admin.expect("its admin address"),
        );
        Self {
            db,
            url,
            child,
            address,
            admin_address,
            log,
        }
    }

    pub fn connect(&self) -> Connection {
        Connection::to(&self.address)
    }

    /// One request on a connection of its own.
    pub fn send(&self, method: &str, path: &str, headers: &str, body: &str) -> Response {
        self.connect().send(method, path, headers, body)
    }

    pub fn get(&self, path: &str) -> Response {
        self.send("GET", path, "", "")
    }

    /// What operators get, from the other listener.
    pub fn admin(&self, path: &str) -> Response {
        let mut admin = Connection::to(&self.admin_address);
        admin.write(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes());
        admin.receive_unchecked("GET")
    }

    pub fn post(&self, body: &str) -> Response {
        self.send("POST", "/listings", JSON, body)
    }

    pub fn log(&self) -> Vec<String> {
        self.log.lock().expect("the log").clone()
    }

    /// The lines of the log that hold a text, once there is at least one.
    pub fn logged(&self, text: &str) -> Vec<String> {
        for _ in 0..400 {
            let lines: Vec<_> = self
                .log()
                .into_iter()
                .filter(|line| line.contains(text))
                .collect();
            if !lines.is_empty() {
                return lines;
            }
            thread::sleep(Duration::from_millis(5));
        }
        panic!("nothing logged with {text}: {:?}", self.log());
    }

    pub fn signal(&self, signal: &str) {
        let id = self.child.id().to_string();
        let sent = Command::new("kill").args([signal, &id]).status();
        assert!(sent.is_ok_and(|status| status.success()));
    }

    /// Waits for the end and returns the exit code.
    pub fn wait(&mut self) -> Option<i32> {
        self.child.wait().expect("its end").code()
    }

    /// What the system tells of the process, from the third field on: the second is the name, in parentheses.
    fn stat(&self) -> Vec<String> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()));
        let stat = stat.expect("the state of the process");
        let (_, fields) = stat.rsplit_once(')').expect("a name");
        fields.split_whitespace().map(str::to_owned).collect()
    }

    /// What it has had of the processors.
    pub fn processor_time(&self) -> Duration {
        // The 14th and 15th field, in ticks of 10 ms.
        let ticks = self.stat()[11..13]
            .iter()
            .map(|field| field.parse::<u32>().expect("a number"))
            .sum::<u32>();
        Duration::from_millis(10) * ticks
    }

    /// Whether a signal has stopped it.
    pub fn is_stopped(&self) -> bool {
        self.stat()[0] == "T"
    }

    pub fn resident_kib(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let status = status.expect("the status of the process");
        let line = status
            .lines()
            .find(|line| line.starts_with("VmHWM"))
            .expect("the high water mark");
        line.split_whitespace()
            .nth(1)
            .expect("a number")
            .parse()
            .expect("a number")
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // Already ended in the tests of its end.
        let _ = self.child.kill();
        let _ = self.child.wait();
        assert!(
            thread::panicking() || !self.log().iter().any(|line| line.contains("panicked")),
            "{:?}",
            self.log()
        );
    }
}

pub const JSON: &str = "content-type: application/json\r\n";

/// The program, with nothing but a database and any free ports set.
pub fn command(url: &str) -> Command {
    with_settings(Command::new(PROGRAM), url)
}

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_listing-api");

pub fn with_settings(mut command: Command, url: &str) -> Command {
    command
        .env_clear()
        .env("DATABASE_URL", url)
        .env("LISTEN_ADDR", "127.0.0.1:0");
    command
        .env("ADMIN_ADDR", "127.0.0.1:0")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// An address of the database for a new role that may do what the service may do.
pub async fn service_url(db: &Database) -> String {
    let role = format!("{}_login", db.name);
    run(
        &db.superuser,
        &format!("create role {role} login password 'secret' in role listing_api"),
    )
    .await;
    db.drop_role_at_end(&role);
    let url = db.url();
    let (_, address) = url.rsplit_once('@').expect("user:password@address");
    format!("postgres://{role}:secret@{address}")
}

pub struct Connection {
    stream: BufReader<TcpStream>,
}

impl Connection {
    pub fn to(address: &str) -> Self {
        let stream = TcpStream::connect(address).expect("a connection");
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .expect("a time limit");
        Self {
            stream: BufReader::new(stream),
        }
    }

    pub fn write(&mut self, bytes: &[u8]) {
        self.stream.get_mut().write_all(bytes).expect("bytes sent");
    }

    pub fn send(&mut self, method: &str, path: &str, headers: &str, body: &str) -> Response {
        self.send_bytes(method, path, headers, body.as_bytes())
    }

    pub fn send_bytes(&mut self, method: &str, path: &str, headers: &str, body: &[u8]) -> Response {
        let length = if body.is_empty() && ["GET", "HEAD", "DELETE", "OPTIONS"].contains(&method) {
            String::new()
        } else {
            format!("content-length: {}\r\n", body.len())
        };
        let head = format!("{method} {path} HTTP/1.1\r\nhost: test\r\n{headers}{length}\r\n");
        self.write(&[head.as_bytes(), body].concat());
        self.receive(method, path)
    }

    /// Reads a response and holds it against the contract.
    pub fn receive(&mut self, method: &str, path: &str) -> Response {
        let response = self.receive_unchecked(method);
        response.check(method, path);
        response
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stream
            .read_line(&mut line)
            .expect("a line of a response");
        line.strip_suffix("\r\n")
            .unwrap_or_else(|| panic!("the connection ended after {line:?}"))
            .to_owned()
    }

    pub fn receive_unchecked(&mut self, method: &str) -> Response {
        let status_line = self.line();
        let status = status_line
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok());
        let mut headers = Vec::new();
        loop {
            let line = self.line();
            let Some((name, value)) = line.split_once(": ") else {
                break;
            };
            headers.push((name.to_ascii_lowercase(), value.to_owned()));
        }
        let mut response = Response {
            status: status.expect("a status"),
            headers,
            body: Vec::new(),
        };
        if method == "HEAD" || [204, 304].contains(&response.status) {
            return response;
        }
        if let Some(length) = response.header("content-length") {
            response.body = vec![0; length.parse().expect("a length")];
            self.stream
                .read_exact(&mut response.body)
                .expect("the whole body");
        } else {
            assert_eq!(response.header("transfer-encoding"), Some("chunked"));
            loop {
                let size = usize::from_str_radix(&self.line(), 16).expect("the size of a chunk");
                let mut chunk = vec![0; size];
                self.stream.read_exact(&mut chunk).expect("a whole chunk");
                response.body.extend(chunk);
                assert_eq!(self.line(), "");
                if size == 0 {
                    break;
                }
            }
        }
        response
    }

    pub fn wait_for_the_first_byte(&mut self) {
        assert!(!self.stream.fill_buf().expect("a byte").is_empty());
    }

    /// All that comes until the other side ends the connection, in whatever way.
    pub fn rest(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        let mut piece = [0; 8192];
        while let Ok(length @ 1..) = self.stream.read(&mut piece) {
            rest.extend(piece.iter().take(length));
        }
        rest
    }

    /// Asserts that the other side ends the connection and sends nothing more.
    pub fn assert_closed(&mut self) {
        let mut rest = Vec::new();
        let read = self.stream.read_to_end(&mut rest);
        assert!(
            read.is_err() || rest.is_empty(),
            "{}",
            String::from_utf8_lossy(&rest)
        );
    }
}

#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut values = self.headers.iter().filter(|(given, _)| given == name);
        let value = values.next().map(|(_, value)| value.as_str());
        assert!(
            name == "vary" || values.next().is_none(),
            "{name} is given twice"
        );
        value
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("a body in UTF-8")
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("no JSON: {}", self.text()))
    }

    /// Status and message of an error.
    pub fn error(&self) -> (u16, String) {
        (
            self.status,
            self.json()["message"]
                .as_str()
                .expect("a message")
                .to_owned(),
        )
    }

    pub fn id(&self) -> i64 {
        assert_eq!(self.status, 201, "{}", self.text());
        self.json()["id"].as_i64().expect("an id")
    }

    fn check(&self, method: &str, path: &str) {
        let id = self.header("x-request-id").expect("a request id");
        assert!((1..=64).contains(&id.len()), "{id}");
        if self.status == 204 || self.status == 304 {
            assert!(self.body.is_empty());
            return;
        }
        if method == "HEAD" || method == "OPTIONS" {
            return;
        }
        let documented = documented(method, path, self.status);
        let media_type = self
            .header("content-type")
            .expect("a media type")
            .split(';')
            .next()
            .expect("a type");
        if self.status >= 400 {
            assert_eq!(media_type, "application/json");
            assert_eq!(self.header("cache-control"), Some("no-store"));
            let (_, message) = self.error();
            assert!(
                !message.ends_with('.') && message != message.to_uppercase(),
                "{message}"
            );
        }
        let schema = &documented["content"][media_type]["schema"];
        assert!(
            schema.is_object(),
            "{method} {path} {}: {media_type} is not in the contract",
            self.status
        );
        if media_type == "application/json" {
            let validator = validator(schema);
            let body = self.json();
            let problems: Vec<_> = validator
                .iter_errors(&body)
                .map(|error| error.to_string())
                .collect();
            assert!(
                problems.is_empty(),
                "{method} {path} {}: {problems:?} in {}",
                self.status,
                self.text()
            );
        }
    }
}

/// The validator of a schema of the contract, made once.
fn validator(schema: &Value) -> Arc<Validator> {
    static MADE: LazyLock<Mutex<HashMap<String, Arc<Validator>>>> = LazyLock::new(Mutex::default);
    let mut made = MADE.lock().expect("the validators");
    let validator = made.entry(schema.to_string()).or_insert_with(|| {
        // The schemas point at each other within the whole document.
        let schema = json!({ "allOf": [schema], "components": OPENAPI["components"] });
        Arc::new(jsonschema::validator_for(&schema).expect("a schema"))
    });
    validator.clone()
}

/// What the contract says of a response.
fn documented(method: &str, path: &str, status: u16) -> Value {
    let error = OPENAPI["components"]["responses"]["Error"].clone();
    let path = path.split('?').next().expect("a path");
    let matches = |template: &str| {
        let (template, path): (Vec<_>, Vec<_>) =
            (template.split('/').collect(), path.split('/').collect());
        template.len() == path.len()
            && template.iter().zip(&path).all(|(template, part)| {
                template == part || template.starts_with('{') && !part.is_empty()
            })
    };
    let paths = OPENAPI["paths"].as_object().expect("paths");
    let Some((_, operations)) = paths.iter().find(|(template, _)| matches(template)) else {
        return error;
    };
    let Some(operation) = operations.get(method.to_ascii_lowercase()) else {
        return error;
    };
    let responses = &operation["responses"];
    let response = responses
        .get(status.to_string())
        .unwrap_or(&responses["default"]);
    let Some(reference) = response.get("$ref").and_then(Value::as_str) else {
        return response.clone();
    };
    OPENAPI
        .pointer(reference.trim_start_matches('#'))
        .expect("a response")
        .clone()
}
