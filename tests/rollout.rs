//! Several instances behind a proxy, and more requests than the service can handle.

use std::io::Write;
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::support::{
    Connection, Database, JSON, LOFT, OTHER_COLUMNS, OTHER_VALUES, OnDrop, PROGRAM, Response,
    Service, TWO_SECONDS, WAITING, bearer, create_key, free_address, in_checkout, printed, run,
    value, with_settings, within,
};

/// What the documentation tells about several instances.
fn page() -> String {
    let page = in_checkout("docs/high-availability.md");
    std::fs::read_to_string(page).expect("read the documentation")
}

/// The documented settings of an instance, at other addresses.
fn documented_settings([api, admin]: &[String; 2]) -> Vec<(String, String)> {
    let page = page();
    let is_settings = |line: &&str| line.starts_with("LISTEN_ADDR=10.0.0.1:8080 ");
    let settings = page.lines().find(is_settings).expect("the settings");
    let settings = settings
        .replace("10.0.0.1:8080", api)
        .replace("10.0.0.1:8081", admin);
    let settings = settings
        .split_whitespace()
        .filter_map(|setting| setting.split_once('='));
    settings
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

/// HAProxy in front of two instances, with the configuration from the documentation.
struct Proxy {
    address: String,
    child: Child,
}

impl Proxy {
    fn start(instances: &[[String; 2]]) -> Self {
        let address = free_address();
        let page = page();
        let (_, config) = page.split_once("```haproxy\n").expect("a configuration");
        let (config, _) = config.split_once("```").expect("the end of the block");
        // HAProxy needs a newline at the end of the file.
        let mut config = format!("{}\n", config.trim_end());
        config = config.replace("bind :80\n", &format!("bind {address}\n"));
        let listed = ["10.0.0.1", "10.0.0.2"]
            .map(|host| [format!("{host}:8080"), format!("{host} port 8081")]);
        for ([api, admin], [listen, check]) in instances.iter().zip(listed) {
            assert!(config.contains(&listen), "{config}");
            let (host, port) = admin.split_once(':').expect("host:port");
            config = config
                .replace(&listen, api)
                .replace(&check, &format!("{host} port {port}"));
        }
        let mut child = Command::new("haproxy")
            .args(["-db", "-f", "/dev/stdin"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("haproxy: install it (apt-get install haproxy, brew install haproxy)");
        let mut stdin = child.stdin.take().expect("stdin is a pipe");
        stdin
            .write_all(config.as_bytes())
            .expect("write the configuration");
        Self { address, child }
    }

    /// Sends a request on a connection of its own. The response may be HAProxy's, which the OpenAPI document does not describe.
    fn send(&self, method: &str, headers: &str, body: &str) -> std::io::Result<Response> {
        let mut connection = Connection::try_to(&self.address)?;
        connection.try_request(method, "/listings/1", headers, body.as_bytes())?;
        connection.try_receive_unchecked(method)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.child.kill().expect("kill HAProxy");
        self.child.wait().expect("wait for HAProxy");
    }
}

#[tokio::test]
async fn a_rolling_restart_behind_haproxy_fails_no_request() {
    let addresses = [
        [free_address(), free_address()],
        [free_address(), free_address()],
    ];
    let db = Database::migrated().await;
    let url = db.service_url().await;
    let start = |addresses: &[String; 2]| {
        let settings = documented_settings(addresses);
        let settings: Vec<_> = settings
            .iter()
            .map(|(name, value)| (&**name, &**value))
            .collect();
        Service::start_at(&url, &settings)
    };
    let mut instances: Vec<_> = addresses.iter().map(start).collect();
    let write = bearer(&create_key(&db.superuser, "alice").await);
    let created = instances[0].send("POST", "/listings", &write, LOFT);
    assert_eq!(created.status, 201);
    let proxy = Proxy::start(&addresses);
    within(
        Duration::from_secs(10),
        "a response through the proxy",
        || {
            proxy
                .send("GET", "", "")
                .is_ok_and(|response| response.status == 200)
        },
    );

    // The schema is upgraded before the instances: running instances keep serving, and old ones can still start.
    let newer = "insert into refinery_schema_history values (99, 'from_the_future', '2026-01-01T00:00:00Z', '1')";
    run(&db.superuser, newer).await;
    let (done, served) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        let clients: Vec<_> = (0..4)
            .map(|client| {
                let (done, served, proxy, write) = (&done, &served, &proxy, &write);
                scope.spawn(move || {
                    // Half of the clients open a new connection for each request.
                    let mut kept = Connection::to(&proxy.address);
                    for turn in 0.. {
                        if done.load(Ordering::Relaxed) {
                            return;
                        }
                        let method = ["GET", "PATCH"][turn % 2];
                        let body = ["", r#"{"rooms_count":2}"#][turn % 2];
                        let response = if client % 2 == 0 {
                            kept.send(method, "/listings/1", write, body)
                        } else {
                            proxy.send(method, write, body).expect("a response")
                        };
                        assert_eq!(response.status, 200, "{response:?}");
                        served.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        let end = OnDrop(|| done.store(true, Ordering::Relaxed));
        for addresses in &addresses {
            let mut instance = instances.remove(0);
            instance.signal("-TERM");
            assert_eq!(instance.wait(), Some(0));
            instances.push(start(addresses));
            let new = &instances[1];
            within(TWO_SECONDS, "ready", || {
                new.admin("/health/ready").status == 200
            });
            within(Duration::from_secs(10), "a request from the proxy", || {
                new.log().iter().any(|line| line.contains(" /listings/1 "))
            });
        }
        drop(end);
        for client in clients {
            client.join().expect("a client without a failure");
        }
    });
    assert!(served.load(Ordering::Relaxed) > 100);
    let warned = "the database has migration V99__from_the_future, which this release does not know; a newer release is being rolled out";
    assert_eq!(instances[0].logged(warned).len(), 1);

    // If no instance is ready because the database is read-only, HAProxy still sends requests: the service serves reads and
    // explains why it refuses writes.
    let read_only = format!(
        "alter database {} set default_transaction_read_only = on",
        db.name
    );
    let end = "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'listing-api' \
        and datname = current_database()";
    run(&db.superuser, &format!("{read_only}; {end}")).await;
    for instance in &instances {
        within(TWO_SECONDS, "not ready", || {
            instance.admin("/health/ready").status == 503
        });
    }
    let message = r#"{"message":"the database cannot be reached at the moment, try again later"}"#;
    within(TWO_SECONDS, "a refusal by the service", || {
        let refused = proxy.send("PATCH", &write, "{}").expect("a response");
        refused.status == 503 && refused.text() == message
    });
    let read = proxy.send("GET", "", "").expect("a response");
    assert_eq!(read.status, 200);
}

/// Sends this many requests at the same time, each on a connection of its own.
fn patch_at_once(
    service: &Service,
    count: usize,
    path: impl Fn(usize) -> String,
) -> Vec<JoinHandle<Response>> {
    let client = |number| {
        let (address, path) = (service.address.clone(), path(number));
        thread::spawn(move || Connection::to(&address).send("PATCH", &path, JSON, "{}"))
    };
    (0..count).map(client).collect()
}

#[tokio::test]
async fn a_locked_listing_delays_only_its_own_writers() {
    // A queue that is shorter than the number of writers of the one listing, and one that is longer.
    let few = [("WORKERS", "2"), ("POOL_SIZE", "4"), ("QUEUE_SIZE", "10")];
    let many = [("WORKERS", "16")];
    let long = [("STATEMENT_TIMEOUT_MS", "30000")];
    for settings in [&few[..], &many] {
        let service = Service::start_with(&[settings, &long].concat()).await;
        service.post(LOFT);
        service.post(LOFT);
        let lock = "begin; update listing set price = 1 where id = 1";
        run(service.superuser(), lock).await;
        let delayed = patch_at_once(&service, 40, |_| "/listings/1".to_owned());
        // One on each worker. The others wait in the row queue, without a connection.
        let one_each = format!("select ({WAITING}) between 1 and {}", settings[0].1);
        service.db().wait_for(&one_each, "t").await;
        for _ in 0..50 {
            for (method, path) in [
                ("PATCH", "/listings/2"),
                ("GET", "/listings/1"),
                ("GET", "/listings?limit=1"),
            ] {
                let body = if method == "GET" { "" } else { "{}" };
                let response = service.send(method, path, JSON, body);
                assert_eq!(response.status, 200);
                assert!(response.took < Duration::from_secs(1), "{response:?}");
            }
        }
        assert_eq!(value(&service.db().connect().await, &one_each).await, "t");
        run(service.superuser(), "rollback").await;
        for delayed in delayed {
            let response = delayed.join().expect("a response");
            assert!([200, 503].contains(&response.status), "{response:?}");
        }
        assert_eq!(service.patch("/listings/1", "{}").status, 200);
    }
}

#[tokio::test]
async fn requests_beyond_the_queue_get_503_at_once_and_the_service_recovers_at_once() {
    let settings = [("POOL_SIZE", "4"), ("WORKERS", "1"), ("QUEUE_SIZE", "50")];
    let service = Service::start_with(&settings).await;
    let listings = format!(
        "insert into listing (price, {OTHER_COLUMNS}) select id, {OTHER_VALUES} from generate_series(1, 1000) as id"
    );
    run(service.superuser(), &listings).await;
    run(service.superuser(), "begin; lock table listing").await;
    let path = |number| format!("/listings/{}", number + 1);
    let responses: Vec<_> = patch_at_once(&service, 800, path)
        .into_iter()
        .map(|client| client.join().expect("a response"))
        .collect();
    let refused: Vec<_> = responses
        .iter()
        .filter(|response| response.status == 503 && response.text().contains("too many requests"))
        .collect();
    // All but the 50 in the queue and those in flight, which are none until a connection is made. Fewer if some come so late
    // that the queue has room again.
    assert!((700..=750).contains(&refused.len()), "{}", refused.len());
    let says_when = |response: &&Response| response.header("retry-after") == Some("1");
    assert!(refused.iter().all(says_when));
    // Two seconds in each queue, five for the statement.
    let longest = responses.iter().map(|response| response.took).max();
    assert!(longest < Some(Duration::from_secs(12)), "{longest:?}");
    let slow = refused
        .iter()
        .filter(|response| response.took > Duration::from_secs(1))
        .count();
    assert!(slow * 10 < refused.len(), "{slow}");
    assert!(
        service.resident_kib() < 128 * 1024,
        "{} KiB",
        service.resident_kib()
    );
    run(service.superuser(), "rollback").await;
    let begun = Instant::now();
    for response in patch_at_once(&service, 50, path) {
        let response = response.join().expect("a response");
        assert_eq!(response.status, 200, "{response:?}");
    }
    assert!(begun.elapsed() < TWO_SECONDS, "{:?}", begun.elapsed());
}

/// The program with a limit of open files.
fn with_file_limit(files: usize, url: &str) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", &format!("ulimit -n {files} && exec \"$0\""), PROGRAM]);
    with_settings(command, url)
}

#[tokio::test]
async fn many_clients_leave_open_files_for_the_database() {
    let db = Database::migrated().await;
    let url = db.service_url().await;
    let refused = with_file_limit(100, &url)
        .output()
        .expect("run the program");
    let refused = printed(&refused);
    let message = "listing-api: a limit of 100 open files is too low: the service needs ";
    assert!(refused.starts_with(message), "{refused}");

    let mut command = with_file_limit(250, &url);
    command.env("WORKERS", "2");
    let service = Service::run(command, &url, Some(db));
    let mut early = service.connect();
    assert_eq!(early.send("GET", "/listings/1", "", "").status, 404);
    let idle: Vec<_> = (0..400)
        .map(|_| TcpStream::connect(&service.address).expect("connect"))
        .collect();
    // The pool opens its connections to the database only now.
    for (method, path, body, status) in [
        ("POST", "/listings", LOFT, 201),
        ("GET", "/listings/1/prices", "", 200),
    ] {
        assert_eq!(early.send(method, path, JSON, body).status, status);
    }
    drop(idle);
    within(TWO_SECONDS, "a response to a new client", || {
        service.get("/listings/1").status == 200
    });
}
