//! PostgreSQL goes away in every way that we could think of, and comes back: what clients see of it.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::harness::{Cluster, Database, run, value};
use crate::keys::bearer;
use crate::owners::key_of;
use crate::service::{JSON, LOFT, Service};

/// A way to a server that can be cut: nothing gets through, and nobody is told.
pub struct Link {
    pub address: String,
    state: Arc<LinkState>,
}

#[derive(Default)]
struct LinkState {
    server: Mutex<String>,
    /// The near ends of all connections.
    sockets: Mutex<Vec<TcpStream>>,
    cut: AtomicBool,
    connections: AtomicUsize,
}

impl Link {
    pub fn to(server: &Cluster) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let address = listener.local_addr().expect("its address").to_string();
        let state = Arc::new(LinkState::default());
        let shared = state.clone();
        thread::spawn(move || {
            for near in listener.incoming() {
                let (near, state) = (near.expect("a connection"), shared.clone());
                state.connections.fetch_add(1, Ordering::Relaxed);
                let socket = near.try_clone().expect("a socket");
                state.sockets.lock().expect("a lock").push(socket);
                thread::spawn(move || {
                    state.wait();
                    let server = state.server.lock().expect("a lock").clone();
                    // A server that refuses is seen as one that hangs up at once.
                    let Ok(far) = TcpStream::connect(server) else {
                        near.shutdown(std::net::Shutdown::Both).expect("its end");
                        return;
                    };
                    let back = (far.try_clone(), near.try_clone(), state.clone());
                    thread::spawn(move || carry(back.0, back.1, &back.2));
                    carry(Ok(near), Ok(far), &state);
                });
            }
        });
        let link = Self { address, state };
        link.lead_to(server);
        link
    }

    pub fn lead_to(&self, server: &Cluster) {
        server
            .address()
            .clone_into(&mut self.state.server.lock().expect("a lock"));
    }

    pub fn cut(&self, cut: bool) {
        self.state.cut.store(cut, Ordering::Relaxed);
    }

    /// Ends every connection, as a machine does that goes down in good order.
    pub fn hang_up(&self) {
        for socket in self.state.sockets.lock().expect("a lock").drain(..) {
            // It may have ended before.
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }

    fn connections(&self) -> usize {
        self.state.connections.load(Ordering::Relaxed)
    }
}

impl LinkState {
    fn wait(&self) {
        while self.cut.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Carries bytes one way until either end hangs up.
fn carry(from: io::Result<TcpStream>, to: io::Result<TcpStream>, state: &LinkState) {
    let (mut from, mut to) = (from.expect("a socket"), to.expect("a socket"));
    let mut piece = [0; 16384];
    while let Ok(length @ 1..) = from.read(&mut piece) {
        state.wait();
        if to.write_all(&piece[..length]).is_err() {
            break;
        }
    }
    // Where one of them has gone already.
    let _ = to.shutdown(std::net::Shutdown::Both);
    let _ = from.shutdown(std::net::Shutdown::Both);
}

/// The address of a database of a cluster over other ways to it.
pub fn over(cluster: &Cluster, addresses: &[&str]) -> String {
    cluster.url.replace(cluster.address(), &addresses.join(","))
}

/// What came back, as far as it did.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: String,
    pub took: Duration,
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_default()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().filter_map(|line| line.split_once(": "));
        let mut values = lines.filter(|(given, _)| given.eq_ignore_ascii_case(name));
        values.next().map(|(_, value)| value)
    }
}

/// A request on a connection of its own, by a client that is prepared for the service to be gone.
pub fn ask(
    address: &str,
    method: &str,
    path: &str,
    headers: &str,
    body: &str,
) -> io::Result<Reply> {
    let begun = Instant::now();
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n{headers}content-length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes())?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply)?;
    let (head, body) = reply
        .split_once("\r\n\r\n")
        .ok_or(ErrorKind::UnexpectedEof)?;
    let body = if head.contains("transfer-encoding: chunked") {
        dechunked(body).ok_or(ErrorKind::UnexpectedEof)?
    } else {
        body.to_owned()
    };
    let status = head.get(9..12).and_then(|status| status.parse().ok());
    Ok(Reply {
        status: status.ok_or(ErrorKind::InvalidData)?,
        head: head.to_owned(),
        body,
        took: begun.elapsed(),
    })
}

fn dechunked(mut chunks: &str) -> Option<String> {
    let mut body = String::new();
    loop {
        let (size, rest) = chunks.split_once("\r\n")?;
        let size = usize::from_str_radix(size, 16).ok()?;
        if size == 0 {
            return Some(body);
        }
        body += rest.get(..size)?;
        chunks = rest.get(size + 2..)?;
    }
}

/// Waits until something holds, which has to be soon.
pub fn within(limit: Duration, what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    loop {
        let held = holds();
        assert!(begun.elapsed() < limit, "not within {limit:?}: {what}");
        if held {
            return;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

pub const TWO_SECONDS: Duration = Duration::from_secs(2);

pub fn service(url: &str, settings: &[(&str, &str)]) -> impl Future<Output = Service> {
    let (url, settings) = (url.to_owned(), settings.to_owned());
    async move { Service::start_at(&url, Database::empty().await, &settings) }
}

/// What clients are answered, who read and write listings 1 to 4 without pause while something happens.
pub fn under_load(service: &Service, something: impl FnOnce()) -> Vec<(&'static str, Reply)> {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let clients: Vec<_> = (1..=4)
            .map(|id| {
                let done = &done;
                scope.spawn(move || {
                    let mut replies = Vec::new();
                    let paths = ["", "/prices", "?", "/prices?limit=5"];
                    for turn in 0.. {
                        if done.load(Ordering::Relaxed) {
                            break;
                        }
                        let method = if turn % 3 == 0 { "PATCH" } else { "GET" };
                        let path = if method == "GET" { paths[turn % 4] } else { "" };
                        let body = if method == "GET" {
                            String::new()
                        } else {
                            format!("{{\"latest_price_eur\":{turn}}}")
                        };
                        let path = format!("/listings/{id}{path}");
                        let reply = ask(&service.address, method, &path, JSON, &body);
                        replies.push((method, reply.expect("an answer")));
                    }
                    replies
                })
            })
            .collect();
        // Also where it fails.
        let end = Finally(|| done.store(true, Ordering::Relaxed));
        something();
        drop(end);
        clients
            .into_iter()
            .flat_map(|client| client.join().expect("replies"))
            .collect()
    })
}

pub struct Finally<F: Fn()>(pub F);

impl<F: Fn()> Drop for Finally<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// Every reply is right or a 503 that says when to come again. How many of these readers and writers got.
pub fn refused(replies: &[(&str, Reply)]) -> (usize, usize) {
    for (method, reply) in replies {
        match reply.status {
            200 => assert!(!reply.json().is_null(), "{method} {reply:?}"),
            503 => assert_eq!(reply.header("retry-after"), Some("1"), "{method} {reply:?}"),
            _ => panic!("{method} {reply:?}"),
        }
    }
    let count = |wanted| {
        replies
            .iter()
            .filter(|(method, reply)| *method == wanted && reply.status == 503)
            .count()
    };
    (count("GET"), count("PATCH"))
}

async fn with_four_listings(url: &str, settings: &[(&str, &str)]) -> Service {
    let service = service(url, settings).await;
    for _ in 0..4 {
        assert_eq!(service.post(LOFT).status, 201);
    }
    service
}

#[tokio::test]
async fn a_restart_of_the_database_costs_time_and_no_error() {
    let cluster = Cluster::migrated();
    let service = with_four_listings(
        &cluster.url,
        &[("POOL_WAIT_MS", "20000"), ("CONNECT_TIMEOUT_MS", "20000")],
    )
    .await;
    for stop in ["stop", "kill -9"] {
        let replies = under_load(&service, || {
            thread::sleep(Duration::from_millis(300));
            if stop == "stop" {
                cluster.call(stop);
            } else {
                cluster.kill();
            }
            thread::sleep(Duration::from_millis(300));
            cluster.call("up");
            within(TWO_SECONDS, "a write", || {
                service.send("PATCH", "/listings/1", JSON, "{}").status == 200
            });
            thread::sleep(Duration::from_millis(300));
        });
        let (reads, writes) = refused(&replies);
        // A write whose answer got lost may have been done, so nobody but its client can say whether to repeat it.
        assert!(
            reads == 0 && writes <= 4,
            "{stop}: {reads} reads and {writes} writes of {}",
            replies.len()
        );
    }
    crate::harness::assert_no_problem(&cluster.superuser().await).await;
}

#[tokio::test]
async fn a_write_whose_answer_got_lost_is_not_repeated() {
    let cluster = Cluster::migrated();
    // The write is done, but its answer waits for a standby that is nowhere.
    cluster
        .restart_with("set synchronous_standby_names = 'nobody'")
        .await;
    let service = service(&cluster.url, &[("POOL_WAIT_MS", "20000")]).await;
    let superuser = cluster.superuser().await;
    let address = service.address.clone();
    let client = thread::spawn(move || ask(&address, "POST", "/listings", JSON, LOFT));
    let begun = Instant::now();
    let waiting = "select count(*) from pg_stat_activity where wait_event = 'SyncRep'";
    while value(&superuser, waiting).await != "1" {
        assert!(
            begun.elapsed() < Duration::from_secs(5),
            "no wait for a standby"
        );
    }
    cluster.kill();
    cluster.call("up");
    let reply = client.join().expect("a client");
    assert_eq!(reply.expect("an answer").status, 503);
    let superuser = cluster.superuser().await;
    assert_eq!(value(&superuser, "select count(*) from listing").await, "1");
}

#[tokio::test]
async fn writes_that_a_read_only_database_gets_are_no_reason_to_ask_whether_it_is_there() {
    let cluster = Cluster::migrated();
    let headers = bearer(&key_of(&cluster.superuser().await, "a").await);
    cluster
        .restart_with("set default_transaction_read_only = on")
        .await;
    let link = Link::to(&cluster);
    let url = over(&cluster, &[&link.address]);
    let service = service(&url, &[("AUTH", "keys")]).await;
    let before = link.connections();
    for _ in 0..20 {
        let refused = service.send("POST", "/listings", &headers, LOFT);
        assert_eq!(refused.status, 503);
    }
    assert_eq!(link.connections(), before);
}

#[tokio::test]
async fn a_database_that_has_no_connection_left_is_no_reason_either() {
    let cluster = Cluster::migrated();
    let superuser = cluster.superuser().await;
    let role = "create role few login password 'few' in role listing_api";
    run(&superuser, role).await;
    let link = Link::to(&cluster);
    let url = format!("postgres://few:few@{}/listing", link.address);
    let service = service(&url, &[]).await;
    run(&superuser, "alter role few connection limit 0").await;
    let before = link.connections();
    assert_eq!(service.get("/listings/1").status, 503);
    let tries = 2;
    assert_eq!(link.connections() - before, tries);
}

#[tokio::test]
async fn a_database_that_is_down_is_not_crowded_by_those_who_wait_for_it() {
    let cluster = Cluster::migrated();
    let link = Link::to(&cluster);
    let settings = [("POOL_WAIT_MS", "300"), ("WORKERS", "2")];
    let service = with_four_listings(&over(&cluster, &[&link.address]), &settings).await;
    cluster.call("stop");
    let before = link.connections();
    let replies = under_load(&service, || thread::sleep(TWO_SECONDS));
    let connections = link.connections() - before;
    let (reads, writes) = refused(&replies);
    assert!(reads + writes > 200, "{reads} {writes}");
    // One each quarter of a second, to see whether it is back, and those that found out that it is gone.
    assert!(
        (4..=30).contains(&connections),
        "{connections} connections for {} requests",
        replies.len()
    );
    assert!(
        replies.iter().all(|(_, reply)| reply.took < TWO_SECONDS),
        "a long wait"
    );
    let quick = replies
        .iter()
        .filter(|(_, reply)| reply.took < Duration::from_millis(100))
        .count();
    assert!(
        quick * 10 > replies.len() * 9,
        "{quick} of {}",
        replies.len()
    );

    cluster.call("up");
    let before = link.connections();
    within(TWO_SECONDS, "service", || {
        service.get("/listings/1").status == 200
    });
    thread::scope(|scope| {
        let patch = |id| {
            let path = format!("/listings/{id}");
            let address = &service.address;
            move || {
                ask(address, "PATCH", &path, JSON, "{}")
                    .expect("an answer")
                    .status
            }
        };
        let crowd: Vec<_> = (1..=200).map(|id| scope.spawn(patch(id))).collect();
        for client in crowd {
            let status = client.join().expect("a status");
            assert!([200, 404, 503].contains(&status), "{status}");
        }
    });
    // The pools, two for reads on each worker, and those who ask how it is.
    let connections = link.connections() - before;
    assert!((8..=16 + 4 + 4).contains(&connections), "{connections}");
}

#[tokio::test]
async fn a_database_that_cannot_be_reached_costs_503_within_the_limits() {
    let cluster = Cluster::migrated();
    let link = Link::to(&cluster);
    let service = with_four_listings(
        &over(&cluster, &[&link.address]),
        &[("POOL_WAIT_MS", "500")],
    )
    .await;
    let replies = under_load(&service, || {
        thread::sleep(Duration::from_millis(200));
        link.cut(true);
        thread::sleep(Duration::from_secs(4));
        link.cut(false);
        within(TWO_SECONDS, "a write", || {
            service.send("PATCH", "/listings/1", JSON, "{}").status == 200
        });
        within(TWO_SECONDS, "a read", || {
            service.get("/listings/1").status == 200
        });
    });
    let (reads, writes) = refused(&replies);
    assert!(reads > 4 && writes > 4, "{reads} {writes}");
    let longest = replies.iter().map(|(_, reply)| reply.took).max();
    // A quarter of a second until it is asked, a second for its answer, half of one for it to come back.
    assert!(longest < Some(Duration::from_secs(3)), "{longest:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_that_are_ended_or_emptied_cost_no_error() {
    let service = Service::start().await;
    for _ in 0..4 {
        service.post(LOFT);
    }
    let superuser = service.db.connect().await;
    let all_is_well = |what: &str| {
        for _ in 0..20 {
            let ready = service.admin("/health/ready");
            assert_eq!(ready.status, 200, "{what}: {}", ready.text());
            for path in [
                "/listings/1",
                "/listings/1/prices",
                "/listings",
                "/listings?limit=2",
            ] {
                let response = service.get(path);
                assert_eq!(
                    response.status,
                    200,
                    "{what}: {path} {:?}",
                    service.log().last()
                );
            }
            assert_eq!(
                service.send("PATCH", "/listings/1", JSON, "{}").status,
                200,
                "{what}"
            );
        }
    };
    all_is_well("at first");

    let ours = "from pg_stat_activity where application_name = 'listing-api' and datname = current_database()";
    let terminate = format!("select pg_terminate_backend(pid) {ours}");
    run(&superuser, &terminate).await;
    all_is_well("sessions terminated");
    let runtime = tokio::runtime::Handle::current();
    let replies = under_load(&service, || {
        for _ in 0..4 {
            // Long enough to connect again: what is hit twice may fail.
            thread::sleep(Duration::from_millis(500));
            thread::scope(|scope| {
                let end = || runtime.block_on(run(&superuser, &terminate));
                scope.spawn(end).join().expect("sessions terminated");
            });
        }
    });
    let (reads, writes) = refused(&replies);
    let causes: Vec<_> = service
        .log()
        .into_iter()
        .filter(|line| line.contains("ERROR"))
        .collect();
    assert!(reads == 0 && writes <= 16, "{reads} {writes} {causes:?}");

    let retype = "alter table listing alter column name type text";
    run(&superuser, retype).await;
    all_is_well("a type changed");

    // Whoever reads or writes a listing loses all prepared statements by it.
    let forget = "create function forget() returns boolean language plpgsql as $$ begin execute 'deallocate all'; return true; end $$;
        alter table listing enable row level security;
        create policy forget on listing using (forget());";
    run(&superuser, forget).await;
    all_is_well("statements deallocated");
    run(&superuser, "alter table listing disable row level security").await;

    let role = format!("{}_login", service.db.name);
    run(
        &superuser,
        &format!("alter role {role} set idle_session_timeout = '100ms'; {terminate}"),
    )
    .await;
    all_is_well("sessions with a limit");
    let idle = format!("select count(*) {ours} and query !~ 'transaction_read_only'");
    crate::start::wait_for(&service, &idle, "0").await;
    all_is_well("idle sessions ended");
}

#[tokio::test]
async fn a_server_without_a_free_slot_keeps_the_connections_that_it_has() {
    let service = Service::start_with(Database::migrated().await, &[("WORKERS", "1")]).await;
    service.post(LOFT);
    assert_eq!(service.get("/listings/1").status, 200);
    let role = format!("{}_login", service.db.name);
    run(
        &service.db.superuser,
        &format!("alter role {role} connection limit 1"),
    )
    .await;
    run(&service.db.superuser, "begin; lock table listing").await;
    // More than there are connections, so that one is wanted that there is not.
    let crowd: Vec<_> = (0..4)
        .map(|_| {
            let address = service.address.clone();
            thread::spawn(move || ask(&address, "GET", "/listings?limit=1", "", ""))
        })
        .collect();
    service.logged("too many connections");
    run(&service.db.superuser, "rollback").await;
    for client in crowd {
        let status = client.join().expect("a client").expect("an answer").status;
        assert!([200, 503].contains(&status), "{status}");
    }
    // For longer than it would take to give the server up.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(3) {
        assert_eq!(service.get("/listings/1").status, 200);
        assert_eq!(service.send("PATCH", "/listings/1", JSON, "{}").status, 200);
    }
}
