//! More of everything: several instances behind a proxy, and more requests than can be served.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::harness::{Database, OTHER_COLUMNS, OTHER_VALUES, printed, run, value};
use crate::outage::{Finally, Reply, TWO_SECONDS, ask, within};
use crate::service::{Connection, JSON, LOFT, PROGRAM, Service, service_url, with_settings};
use crate::start::{WAITING, wait_for};

/// An address that nobody uses.
pub fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    listener.local_addr().expect("its address").to_string()
}

/// HAProxy in front of instances, as the README has it.
struct Proxy {
    address: String,
    child: Child,
}

impl Proxy {
    fn start(instances: &[[String; 2]]) -> Self {
        let address = free_address();
        let readme = std::fs::read_to_string(crate::harness::in_checkout("README.md"));
        let readme = readme.expect("the README");
        let (_, config) = readme.split_once("```haproxy\n").expect("a configuration");
        let (config, _) = config.split_once("   ```").expect("its end");
        let mut config = config.replace("bind :80\n", &format!("bind {address}\n"));
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
        let mut stdin = child.stdin.take().expect("a pipe");
        stdin.write_all(config.as_bytes()).expect("a configuration");
        Self { address, child }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.child.kill().expect("its end");
        self.child.wait().expect("its end");
    }
}

#[tokio::test]
async fn a_rolling_restart_behind_a_proxy_fails_no_request() {
    let addresses = [
        [free_address(), free_address()],
        [free_address(), free_address()],
    ];
    let db = Database::migrated().await;
    let url = service_url(&db).await;
    let mut databases = Vec::new();
    for _ in 0..4 {
        databases.push(Database::empty().await);
    }
    let start = |[api, admin]: &[String; 2], db| {
        let settings = [
            ("LISTEN_ADDR", &**api),
            ("ADMIN_ADDR", admin),
            ("SHUTDOWN_DELAY_MS", "1000"),
        ];
        Service::start_at(&url, db, &settings)
    };
    let mut instances: Vec<_> = addresses
        .iter()
        .map(|addresses| start(addresses, databases.pop().expect("one more")))
        .collect();
    instances[0].post(LOFT);
    let proxy = Proxy::start(&addresses);
    let both =
        || ask(&proxy.address, "GET", "/listings/1", "", "").is_ok_and(|reply| reply.status == 200);
    within(Duration::from_secs(10), "the proxy", both);

    // The schema is upgraded first: what serves goes on serving, and what starts before its own upgrade starts.
    let ahead = "insert into refinery_schema_history values (99, 'from_the_future', '2026-01-01T00:00:00Z', '1')";
    run(&db.superuser, ahead).await;
    let (done, served) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        let clients: Vec<_> = (0..4)
            .map(|client| {
                let (done, served, proxy) = (&done, &served, &proxy);
                scope.spawn(move || {
                    // Half of them connect anew for each request.
                    let mut connection = Connection::to(&proxy.address);
                    for turn in 0.. {
                        if done.load(Ordering::Relaxed) {
                            return;
                        }
                        let method = ["GET", "PATCH"][turn % 2];
                        let body = ["", r#"{"rooms_count":2}"#][turn % 2];
                        let status = if client % 2 == 0 {
                            connection.send(method, "/listings/1", JSON, body).status
                        } else {
                            let reply = ask(&proxy.address, method, "/listings/1", JSON, body);
                            reply.expect("an answer").status
                        };
                        assert_eq!(status, 200);
                        served.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        let end = Finally(|| done.store(true, Ordering::Relaxed));
        for addresses in &addresses {
            let mut instance = instances.remove(0);
            instance.signal("-TERM");
            assert_eq!(instance.wait(), Some(0));
            instances.push(start(addresses, databases.pop().expect("one more")));
            let ready = || instances[1].admin("/health/ready").status == 200;
            within(TWO_SECONDS, "ready", ready);
            let asked = || {
                instances[1]
                    .log()
                    .iter()
                    .any(|line| line.contains(" /listings/1 "))
            };
            within(Duration::from_secs(10), "requests by the proxy", asked);
        }
        drop(end);
        for client in clients {
            client.join().expect("no failure");
        }
    });
    assert!(served.load(Ordering::Relaxed) > 100);
    let warned = "the database has V99__from_the_future, which this release does not know: a newer one is on its way";
    assert_eq!(instances[0].logged(warned).len(), 1);

    // Where none is ready, because the database takes no writes, they are asked all the same: they say it better than a proxy.
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
    let message =
        json!({"message": "the database cannot be reached at the moment, try again later"});
    within(TWO_SECONDS, "a refusal by the service", || {
        let refused = ask(&proxy.address, "PATCH", "/listings/1", JSON, "{}").expect("an answer");
        (refused.status, refused.json()) == (503, message.clone())
    });
    let read = ask(&proxy.address, "GET", "/listings/1", "", "").expect("an answer");
    assert_eq!(read.status, 200);
}

/// Requests of this many clients at once, each on a connection of its own.
fn crowd(service: &Service, size: usize, path: impl Fn(usize) -> String) -> Vec<JoinHandle<Reply>> {
    let client = |number| {
        let (address, path) = (service.address.clone(), path(number));
        thread::spawn(move || ask(&address, "PATCH", &path, JSON, "{}").expect("an answer"))
    };
    (0..size).map(client).collect()
}

#[tokio::test]
async fn a_locked_listing_delays_its_own_writers_alone() {
    // Fewer places than writers of the one listing.
    let few = [("WORKERS", "2"), ("POOL_SIZE", "4"), ("QUEUE_SIZE", "10")];
    let many = [("WORKERS", "16")];
    let long = [("STATEMENT_TIMEOUT_MS", "30000")];
    for settings in [&few[..], &many] {
        let all = [settings, &long].concat();
        let service = Service::start_with(Database::migrated().await, &all).await;
        service.post(LOFT);
        service.post(LOFT);
        run(
            &service.db.superuser,
            "begin; update listing set price = 1 where id = 1",
        )
        .await;
        let delayed = crowd(&service, 40, |_| "/listings/1".to_owned());
        // One on each worker. The others wait for their turn without a connection.
        let one_each = format!("select ({WAITING}) between 1 and {}", settings[0].1);
        wait_for(&service, &one_each, "t").await;
        for _ in 0..50 {
            for (method, path) in [
                ("PATCH", "/listings/2"),
                ("GET", "/listings/1"),
                ("GET", "/listings?limit=1"),
            ] {
                let reply = ask(&service.address, method, path, JSON, "{}").expect("an answer");
                assert_eq!(reply.status, 200);
                assert!(reply.took < Duration::from_secs(1), "{reply:?}");
            }
        }
        assert_eq!(value(&service.db.connect().await, &one_each).await, "t");
        run(&service.db.superuser, "rollback").await;
        for delayed in delayed {
            let reply = delayed.join().expect("a reply");
            assert!([200, 503].contains(&reply.status), "{reply:?}");
        }
        assert_eq!(service.send("PATCH", "/listings/1", JSON, "{}").status, 200);
    }
}

#[tokio::test]
async fn more_requests_than_can_wait_are_refused_at_once_and_it_recovers_at_once() {
    let settings = [("POOL_SIZE", "4"), ("WORKERS", "1"), ("QUEUE_SIZE", "50")];
    let service = Service::start_with(Database::migrated().await, &settings).await;
    let listings = format!(
        "insert into listing (price, {OTHER_COLUMNS}) select id, {OTHER_VALUES} from generate_series(1, 1000) as id"
    );
    run(&service.db.superuser, &listings).await;
    run(&service.db.superuser, "begin; lock table listing").await;
    let crowd = crowd(&service, 800, |number| format!("/listings/{}", number + 1));
    let replies: Vec<_> = crowd
        .into_iter()
        .map(|client| client.join().expect("a reply"))
        .collect();
    let refused: Vec<_> = replies
        .iter()
        .filter(|reply| reply.status == 503 && reply.body.contains("too many requests"))
        .collect();
    // All but 2 under way and 50 that wait to go with others. Fewer only where some come so late that they find a place again.
    assert!((700..=748).contains(&refused.len()), "{}", refused.len());
    let retry = |reply: &&Reply| reply.header("retry-after") == Some("1");
    assert!(refused.iter().all(retry));
    // Two seconds to go with others, as long for a connection, and once more where those were refused; five for the statement.
    let longest = replies.iter().map(|reply| reply.took).max();
    assert!(longest < Some(Duration::from_secs(12)), "{longest:?}");
    let slow = refused
        .iter()
        .filter(|reply| reply.took > Duration::from_secs(1))
        .count();
    assert!(slow * 10 < refused.len(), "{slow}");
    assert!(
        service.resident_kib() < 128 * 1024,
        "{} KiB",
        service.resident_kib()
    );
    run(&service.db.superuser, "rollback").await;
    let begun = Instant::now();
    for reply in self::crowd(&service, 50, |number| format!("/listings/{}", number + 1)) {
        let reply = reply.join().expect("a reply");
        assert_eq!(reply.status, 200, "{reply:?}");
    }
    assert!(begun.elapsed() < TWO_SECONDS, "{:?}", begun.elapsed());
}

/// The program with no more than so many open files.
fn with_files(files: usize, url: &str) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", &format!("ulimit -n {files} && exec \"$0\""), PROGRAM]);
    with_settings(command, url)
}

#[tokio::test]
async fn a_crowd_of_clients_leaves_files_over_for_the_database() {
    let db = Database::migrated().await;
    let url = service_url(&db).await;
    let refused = with_files(100, &url).output().expect("the program");
    let message = "listing-api: 100 open files are too few: it takes ";
    assert!(
        printed(&refused).starts_with(message),
        "{}",
        printed(&refused)
    );

    let mut command = with_files(250, &url);
    command.env("WORKERS", "2");
    let service = Service::run(command, &url, db);
    let mut early = service.connect();
    assert_eq!(early.send("GET", "/listings/1", "", "").status, 404);
    let crowd: Vec<_> = (0..400)
        .map(|_| TcpStream::connect(&service.address).expect("a connection"))
        .collect();
    // Its connections to the database are yet to be made.
    for (method, path, body, status) in [
        ("POST", "/listings", LOFT, 201),
        ("GET", "/listings/1/prices", "", 200),
    ] {
        assert_eq!(early.send(method, path, JSON, body).status, status);
    }
    drop(crowd);
    within(TWO_SECONDS, "a newcomer", || {
        ask(&service.address, "GET", "/listings/1", "", "").is_ok_and(|reply| reply.status == 200)
    });
}
