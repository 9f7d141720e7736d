//! Clients that read slowly or not at all, send ahead, or never end what they began. Others must not notice.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::{Database, LOFT, OTHER_COLUMNS, OTHER_VALUES, OnDrop, Service, run};

const LISTING: &[u8] = b"GET /listings/1 HTTP/1.1\r\nhost: x\r\n\r\n";

/// A request for all listings. Its line in the log ends with the id.
fn list(id: &str) -> Vec<u8> {
    format!("GET /listings HTTP/1.1\r\nhost: x\r\nx-request-id: {id}\r\n\r\n").into()
}

/// A service with so many listings that the list fills every buffer between the service and a client.
async fn with_a_long_list(settings: &[(&str, &str)]) -> Service {
    let db = Database::migrated().await;
    let fill = format!(
        "insert into listing (price, {OTHER_COLUMNS}) select id, {OTHER_VALUES} from generate_series(1, 100000) as id; \
         analyze listing"
    );
    run(&db.superuser, &fill).await;
    Service::start_on(db, settings).await
}

fn open(service: &Service, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(&service.address).expect("connect");
    stream.write_all(bytes).expect("send");
    stream
}

/// Sends requests ahead until no more are taken, at most a megabyte.
fn send_ahead(stream: &mut TcpStream, request: &[u8]) {
    let timeout = Some(Duration::from_millis(20));
    stream.set_write_timeout(timeout).expect("a timeout");
    let requests = request.repeat((1 << 20) / request.len());
    match stream.write_all(&requests) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => (),
        sent => sent.expect("send"),
    }
}

fn assert_idle_within(limit: Duration, service: &Service) {
    let begun = Instant::now();
    loop {
        let before = service.processor_time();
        thread::sleep(Duration::from_millis(500));
        let used = service.processor_time().saturating_sub(before);
        if used < Duration::from_millis(50) {
            return;
        }
        assert!(begun.elapsed() < limit, "{used:?} of 500 ms used");
    }
}

#[tokio::test]
async fn a_client_that_reads_nothing_for_a_minute_is_disconnected_and_a_slow_one_is_not() {
    let service = with_a_long_list(&[("WORKERS", "1")]).await;
    let mut silent = open(&service, &list("silent"));
    let mut slow = open(&service, &list("slow"));
    let begun = Instant::now();
    while service.log().iter().all(|line| !line.ends_with("silent")) {
        assert!(begun.elapsed() < Duration::from_secs(80), "still connected");
        slow.read_exact(&mut [0; 5_000]).expect("a part");
        thread::sleep(Duration::from_secs(1));
    }
    assert!(begun.elapsed() > Duration::from_secs(55), "too early");
    let mut rest = Vec::new();
    let ended = silent.read_to_end(&mut rest);
    assert!(ended.is_err() || !rest.ends_with(b"\r\n0\r\n\r\n"));
    let timeout = Some(Duration::from_secs(10));
    slow.set_read_timeout(timeout).expect("a timeout");
    rest.clear();
    let mut part = [0; 16384];
    while !rest.ends_with(b"\r\n0\r\n\r\n") {
        let length = slow.read(&mut part).expect("a part");
        assert!(length > 0, "the list broke off");
        rest.extend_from_slice(&part[..length]);
    }
}

#[tokio::test]
async fn requests_sent_ahead_cost_neither_memory_nor_processor_time() {
    let service = with_a_long_list(&[]).await;
    service.get("/listings/1");
    let before = service.resident_kib();
    // Each begins with a response that is not read, so that the rest has to wait.
    let client = |_| {
        let mut client = open(&service, &list("ahead"));
        let mut begin = [0; 12];
        client.read_exact(&mut begin).expect("a response");
        assert_eq!(&begin, b"HTTP/1.1 200");
        send_ahead(&mut client, LISTING);
        client
    };
    let _clients: Vec<_> = (0..50).map(client).collect();
    assert_idle_within(Duration::from_secs(10), &service);
    let more = service.resident_kib().saturating_sub(before);
    assert!(more < 50 * 1024, "{more} KiB more");
    assert_eq!(service.get("/listings/1").status, 200);
}

#[tokio::test]
async fn unread_responses_without_a_body_cost_no_processor_time() {
    let service = Service::start().await;
    let before = service.resident_kib();
    let client = |_| {
        let mut client = open(&service, b"");
        send_ahead(&mut client, b"OPTIONS / HTTP/1.1\r\nhost: x\r\n\r\n");
        client
    };
    let _clients: Vec<_> = (0..5).map(client).collect();
    assert_idle_within(Duration::from_secs(20), &service);
    let more = service.resident_kib().saturating_sub(before);
    assert!(more < 20 * 1024, "{more} KiB more");
}

#[tokio::test]
async fn empty_lines_before_a_request_are_ignored() {
    let service = Service::start().await;
    service.post(LOFT);
    let mut connection = service.connect();
    for lines in ["", "\r\n", "\n\r\n\r\n"] {
        connection.write(lines.as_bytes());
        assert_eq!(connection.send("GET", "/listings/1", "", "").status, 200);
    }
    let used = service.processor_time();
    connection.write("\r\n".repeat(100_000).as_bytes());
    assert_eq!(connection.send("GET", "/listings/1", "", "").status, 200);
    let used = service.processor_time().saturating_sub(used);
    assert!(used < Duration::from_secs(1), "{used:?}");
}

#[tokio::test]
async fn all_requests_sent_ahead_are_answered_in_turn() {
    let service = Service::start().await;
    service.post(LOFT);
    let body = format!("{{\"description\":\"{}\"}}", "x".repeat(3000));
    let patch = format!(
        "PATCH /listings/1 HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let kinds = [
        (LISTING, "200"),
        (b"GET /listings/2 HTTP/1.1\r\nhost: x\r\n\r\n", "404"),
        (patch.as_bytes(), "200"),
        (b"GET /no HTTP/1.1\r\nhost: x\r\n\r\n", "404"),
    ];
    let requests: Vec<_> = kinds
        .iter()
        .flat_map(|(request, _)| request.iter().copied())
        .collect();
    let mut writer = TcpStream::connect(&service.address).expect("connect");
    let mut reader = writer.try_clone().expect("clone");
    let sending = thread::spawn(move || {
        writer.write_all(&requests.repeat(200)).expect("send");
        writer.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    });
    let mut answers = String::new();
    reader.read_to_string(&mut answers).expect("all answers");
    sending.join().expect("a thread").expect("send");
    let statuses = answers
        .split("HTTP/1.1 ")
        .skip(1)
        .map(|answer| &answer[..3]);
    let expected = kinds.iter().cycle().map(|(_, status)| *status).take(800);
    assert!(statuses.take(800).eq(expected));
    assert_eq!(answers.matches("HTTP/1.1 ").count(), 801);
}

#[tokio::test]
async fn five_hundred_hostile_clients_fail_no_request_of_others() {
    const OF_EACH_KIND: usize = 100;
    let service = with_a_long_list(&[]).await;
    let median = |seconds| {
        let until = Instant::now() + Duration::from_secs(seconds);
        let client = || {
            let mut connection = service.connect();
            let mut times = Vec::new();
            while Instant::now() < until {
                let response = connection.send("GET", "/listings/7", "", "");
                assert_eq!(response.status, 200);
                times.push(response.took);
            }
            times
        };
        let mut times: Vec<_> = thread::scope(|scope| {
            let clients: Vec<_> = (0..8).map(|_| scope.spawn(client)).collect();
            let clients = clients.into_iter();
            clients
                .flat_map(|client| client.join().expect("no failure"))
                .collect()
        });
        times.sort();
        times[times.len() / 2]
    };
    let names: Vec<_> = (0..9_000).map(|name| format!("a{name:04x}")).collect();
    let parameters = format!(
        "GET /listings?{} HTTP/1.1\r\nhost: x\r\n\r\n",
        names.join("&")
    );
    let slow_list = list("hostile");
    let stop = AtomicBool::new(false);
    let slow_read = || {
        let mut stream = open(&service, &slow_list);
        while !stop.load(Ordering::Relaxed) {
            let _ = stream.read(&mut [0; 100]);
            thread::sleep(Duration::from_secs(1));
        }
    };
    // Sends the bytes of a head one by one, and begins anew when the service has given up.
    let trickle = |before: &[u8]| {
        while !stop.load(Ordering::Relaxed) {
            let mut stream = open(&service, before);
            for byte in LISTING.iter().cycle().filter(|byte| **byte != b'\n') {
                thread::sleep(Duration::from_secs(1));
                if stop.load(Ordering::Relaxed) || stream.write_all(&[*byte]).is_err() {
                    break;
                }
            }
        }
    };
    let ahead = || {
        let mut stream = open(&service, &slow_list);
        while !stop.load(Ordering::Relaxed) {
            send_ahead(&mut stream, LISTING);
            thread::sleep(Duration::from_secs(1));
        }
    };
    let many_parameters = || {
        while !stop.load(Ordering::Relaxed) {
            let mut stream = open(&service, parameters.as_bytes());
            let _ = stream.read(&mut [0; 1000]);
            thread::sleep(Duration::from_millis(500));
        }
    };
    let alone = median(5);
    let beside = thread::scope(|scope| {
        for _ in 0..OF_EACH_KIND {
            scope.spawn(slow_read);
            scope.spawn(|| trickle(b""));
            scope.spawn(|| trickle(LISTING));
            scope.spawn(ahead);
            scope.spawn(many_parameters);
        }
        let stop = OnDrop(|| stop.store(true, Ordering::Relaxed));
        thread::sleep(Duration::from_secs(1));
        let beside = median(30);
        drop(stop);
        beside
    });
    println!(
        "median {alone:?} alone, {beside:?} beside 500 hostile clients, {} KiB",
        service.resident_kib()
    );
    // Far more than on an idle machine, where it is less than three times as long.
    assert!(beside < Duration::from_secs(2), "{beside:?}");
    assert!(
        service.resident_kib() < 200 * 1024,
        "{} KiB",
        service.resident_kib()
    );
    assert_idle_within(Duration::from_secs(5), &service);
}
