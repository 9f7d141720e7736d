//! `GET /changes` delivers every committed change at least once, in the order of each listing, and none that was rolled back.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions, Permissions};
use std::io::{BufRead, BufReader, Read, Write};
use std::mem;
use std::net::TcpStream;
use std::ops::RangeInclusive;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio_postgres::Client;

use crate::support::{
    Cluster, Database, JSON, LOFT, Link, OTHER_COLUMNS, OTHER_VALUES, Response, Service,
    TWO_SECONDS, WAITING, alter_system, assert_no_problem, connect, in_checkout, insert_listing,
    program, rows, run, succeed, through, value, wait_for, within,
};

/// The statement that inserts listings with these ids.
fn insert_listings(first: i32, last: i32) -> String {
    format!(
        "insert into listing (id, price, {OTHER_COLUMNS}) select n, n, {OTHER_VALUES} from generate_series({first}, {last}) as n"
    )
}

/// The address of the next page, which every page has.
fn next(page: &Response) -> String {
    assert_eq!(page.status, 200, "{page:?}");
    let link = page.header("link").expect("a link").strip_prefix('<');
    let path = link.and_then(|link| link.strip_suffix(">; rel=\"next\""));
    path.expect("a link to the next page").to_owned()
}

fn changes(page: &Response) -> Vec<Value> {
    assert_eq!(page.status, 200, "{page:?}");
    page.json().as_array().expect("an array").clone()
}

/// The changes of all pages until one is empty and does not move, and the address after them.
fn all_after(service: &Service, path: &str) -> (Vec<Value>, String) {
    let (mut all, mut path) = (Vec::new(), path.to_owned());
    loop {
        let page = service.get(&path);
        let (found, following) = (changes(&page), next(&page));
        if found.is_empty() && following == path {
            return (all, path);
        }
        all.extend(found);
        path = following;
    }
}

/// A change without its date.
fn without_date(mut change: Value) -> Value {
    let date = change["created_date"].take();
    assert!(date.as_str().is_some_and(|date| date.ends_with('Z')));
    change
        .as_object_mut()
        .expect("an object")
        .remove("created_date");
    change
}

#[tokio::test]
async fn a_page_has_prices_and_deletions_of_all_listings() {
    let service = Service::start().await;
    service.post(LOFT);
    service.patch("/listings/1", r#"{"latest_price_eur":465000.5}"#);
    service.send("DELETE", "/listings/1", "", "");
    service.post(LOFT);
    service.patch("/listings/2", r#"{"latest_price_eur":1}"#);
    let page = service.get("/changes");
    assert_eq!(page.header("cache-control"), Some("no-cache"));
    let found: Vec<_> = changes(&page).into_iter().map(without_date).collect();
    // The prices of the first listing were deleted with it.
    let expected = [
        json!({"listing_id": 1, "id": 3, "deleted": true, "previous_price_eur": 465_000.5}),
        json!({"listing_id": 2, "id": 4, "price_eur": 480_000, "previous_price_eur": null}),
        json!({"listing_id": 2, "id": 5, "price_eur": 1, "previous_price_eur": 480_000}),
    ];
    assert_eq!(found, expected);
    let (none, path) = all_after(&service, &next(&page));
    assert_eq!(none, [Value::Null; 0]);
    service.patch("/listings/2", r#"{"latest_price_eur":2}"#);
    let page = service.get(&path);
    let text = page.text();
    let begin = r#"[{"listing_id":2,"id":6,"price_eur":2,"previous_price_eur":1,"created_date":""#;
    assert!(text.starts_with(begin), "{text}");
    service.send("DELETE", "/listings/2", "", "");
    let page = service.get(&next(&page));
    let begin = r#"[{"listing_id":2,"id":7,"deleted":true,"previous_price_eur":2,"created_date":""#;
    assert!(page.text().starts_with(begin), "{}", page.text());
}

#[tokio::test]
async fn the_link_keeps_limit_and_wait_and_each_page_has_at_most_the_limit() {
    let service = Service::start().await;
    run(service.superuser(), &insert_listings(1, 25)).await;
    let mut path = "/changes?limit=10&wait=0".to_owned();
    let mut ids = Vec::new();
    for expected in [10, 10, 5] {
        let page = service.get(&path);
        assert_eq!(changes(&page).len(), expected);
        ids.extend(
            changes(&page)
                .iter()
                .map(|change| change["listing_id"].as_i64()),
        );
        path = next(&page);
        assert!(
            path.starts_with("/changes?limit=10&wait=0&after="),
            "{path}"
        );
    }
    assert_eq!(ids, (1..=25).map(Some).collect::<Vec<_>>());
    run(
        service.superuser(),
        "update listing set price = price + 1 where id <= 12",
    )
    .await;
    for expected in [10, 2, 0] {
        let page = service.get(&path);
        assert_eq!(changes(&page).len(), expected);
        path = next(&page);
    }
}

#[tokio::test]
async fn after_now_begins_with_the_next_change() {
    let service = Service::start().await;
    service.post(LOFT);
    let page = service.get("/changes?after=now");
    assert_eq!(changes(&page), [Value::Null; 0]);
    service.patch("/listings/1", r#"{"latest_price_eur":5}"#);
    let found = changes(&service.get(&next(&page)));
    assert_eq!(found.len(), 1);
    assert_eq!(found[0]["price_eur"], 5);
}

/// The cursor in the address of a page.
fn cursor(path: &str) -> &str {
    let (_, cursor) = path.split_once("after=").expect("a cursor");
    cursor
}

#[tokio::test]
async fn a_waiting_request_is_answered_with_the_first_change() {
    let service = Service::start().await;
    let id = service.post(LOFT).id();
    // The first request starts the poll, the second is at its head.
    let mut path = next(&service.get("/changes?wait=20"));
    for price in 1..=3 {
        let mut waiting = service.connect();
        waiting.request("GET", &path, "", "");
        thread::sleep(Duration::from_millis(300));
        let body = format!("{{\"latest_price_eur\":{price}}}");
        assert_eq!(service.patch(&format!("/listings/{id}"), &body).status, 200);
        let begun = Instant::now();
        let page = waiting.receive("GET", &path);
        assert!(begun.elapsed() < TWO_SECONDS, "{:?}", begun.elapsed());
        let prices: Vec<_> = changes(&page)
            .iter()
            .map(|change| change["price_eur"].clone())
            .collect();
        assert_eq!(prices, [price]);
        path = next(&page);
    }
}

#[tokio::test]
async fn a_waiting_request_is_answered_with_an_empty_page_after_its_time() {
    let service = Service::start().await;
    service.post(LOFT);
    for path in [
        "/changes?after=now&wait=1".to_owned(),
        next(&service.get("/changes?wait=1")),
    ] {
        let begun = Instant::now();
        let page = service.get(&path);
        let took = begun.elapsed();
        assert!((1.0..3.0).contains(&took.as_secs_f64()), "{took:?}");
        assert_eq!(changes(&page), [Value::Null; 0]);
        assert!(next(&page).starts_with("/changes?wait=1&after="));
    }
    let begun = Instant::now();
    let head = service.send("HEAD", "/changes?after=now&wait=60", "", "");
    assert_eq!(head.status, 200);
    assert!(head.header("link").is_some() && begun.elapsed() < TWO_SECONDS);
}

/// A stream of server-sent events.
struct Events {
    stream: BufReader<TcpStream>,
    head: String,
    /// The last one.
    id: String,
    /// The beginning of an event whose end has not arrived.
    part: String,
}

struct Event {
    kind: String,
    data: Value,
}

impl Events {
    fn open(service: &Service, path: &str, headers: &str) -> Self {
        let mut stream = TcpStream::connect(&service.address).expect("connect");
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .expect("set a limit");
        let request = format!(
            "GET {path} HTTP/1.1\r\nhost: test\r\naccept: text/event-stream\r\n{headers}\r\n"
        );
        stream.write_all(request.as_bytes()).expect("send");
        let mut events = Self {
            stream: BufReader::new(stream),
            head: String::new(),
            id: String::new(),
            part: String::new(),
        };
        while !events.head.ends_with("\r\n\r\n") {
            assert_ne!(
                events.stream.read_line(&mut events.head).expect("a head"),
                0
            );
        }
        events
    }

    /// The next chunk of the response, `None` at its end.
    fn chunk(&mut self) -> Option<String> {
        let mut size = String::new();
        self.stream
            .read_line(&mut size)
            .expect("the size of a chunk");
        let size = usize::from_str_radix(size.trim(), 16).expect("a size");
        let mut chunk = vec![0; size + 2];
        self.stream.read_exact(&mut chunk).expect("a chunk");
        chunk.truncate(size);
        self.part += &String::from_utf8(chunk).expect("UTF-8");
        let end = self.part.rfind("\n\n").map_or(0, |end| end + 2);
        let rest = self.part.split_off(end);
        let whole = mem::replace(&mut self.part, rest);
        let mut ids = whole.lines().filter_map(|line| line.strip_prefix("id: "));
        if let Some(last) = ids.next_back() {
            last.clone_into(&mut self.id);
        }
        (size > 0).then_some(whole)
    }

    /// The events of the next chunk that has any. `None` at the end of the stream.
    fn next(&mut self) -> Option<Vec<Event>> {
        let begun = Instant::now();
        loop {
            assert!(begun.elapsed() < Duration::from_secs(40), "no event");
            let chunk = self.chunk()?;
            let mut events = Vec::new();
            for block in chunk.split_terminator("\n\n") {
                let (mut kind, mut data) = (String::new(), Value::Null);
                for line in block.lines() {
                    match line.split_once(": ").expect("a field") {
                        ("id", _) => (),
                        ("event", name) => name.clone_into(&mut kind),
                        ("data", json) => data = serde_json::from_str(json).expect("JSON"),
                        _ => panic!("{line}"),
                    }
                }
                if !kind.is_empty() {
                    events.push(Event { kind, data });
                }
            }
            if !events.is_empty() {
                return Some(events);
            }
        }
    }

    /// The ids of this many changes.
    fn ids(&mut self, count: usize) -> Vec<i64> {
        let mut ids = Vec::new();
        while ids.len() < count {
            let events = self.next().expect("an event");
            ids.extend(
                events
                    .iter()
                    .map(|event| event.data["id"].as_i64().expect("an id")),
            );
        }
        ids
    }
}

#[tokio::test]
async fn changes_come_as_events() {
    let service = Service::start().await;
    service.post(LOFT);
    let mut events = Events::open(&service, "/changes", "accept-encoding: gzip\r\n");
    let head = events.head.to_lowercase();
    assert!(head.starts_with("http/1.1 200"), "{head}");
    for header in ["content-type: text/event-stream", "cache-control: no-store"] {
        assert!(head.contains(header), "{head}");
    }
    assert!(!head.contains("gzip"), "{head}");
    let accept = "accept: application/json;q=0.5, Text/Event-Stream\r\n";
    let response = service.send("HEAD", "/changes?wait=60", accept, "");
    assert_eq!(response.header("content-type"), Some("text/event-stream"));
    let first = events.next().expect("an event").remove(0);
    assert_eq!(first.kind, "price");
    let page = changes(&service.get("/changes"));
    assert_eq!(first.data, page[0]);
    // From the poll, which the events share.
    service.patch("/listings/1", r#"{"latest_price_eur":5}"#);
    let begun = Instant::now();
    let second = events.next().expect("an event").remove(0);
    assert!(begun.elapsed() < TWO_SECONDS);
    assert_eq!(
        (second.kind.as_str(), &second.data["price_eur"]),
        ("price", &json!(5))
    );
    service.send("DELETE", "/listings/1", "", "");
    let third = events.next().expect("an event").remove(0);
    assert_eq!(
        (third.kind.as_str(), &third.data["deleted"]),
        ("deletion", &json!(true))
    );
}

#[tokio::test]
async fn events_resume_after_the_last_id_which_wins_over_after() {
    let service = Service::start().await;
    let mut live = Events::open(&service, "/changes?after=now", "");
    // An id without an event, so that a client which lost the connection before the first change misses nothing.
    let first = live.chunk().expect("a chunk");
    assert!(
        first.starts_with("id: ") && first.lines().count() == 2,
        "{first}"
    );
    let start = live.id.clone();
    let resume = |id: &str| {
        Events::open(
            &service,
            "/changes?after=now",
            &format!("last-event-id: {id}\r\n"),
        )
    };
    run(service.superuser(), &insert_listings(1, 5)).await;
    let chunk = live.chunk().expect("a chunk");
    let ids: Vec<_> = chunk
        .lines()
        .filter_map(|line| line.strip_prefix("id: "))
        .collect();
    assert_eq!(ids.len(), 5);
    assert_eq!(resume(&start).ids(5), [1, 2, 3, 4, 5]);
    for (index, id) in ids.iter().enumerate().take(4) {
        let rest: Vec<_> = (1..=5).skip(index + 1).collect();
        assert_eq!(resume(id).ids(rest.len()), rest);
        // The same cursor serves pages.
        let page = service.get(&format!("/changes?after={id}"));
        assert_eq!(changes(&page).len(), rest.len());
    }
    let mut last = resume(ids[4]);
    run(service.superuser(), &insert_listing(6, "6")).await;
    assert_eq!(last.ids(1), [6]);
}

#[tokio::test]
async fn an_idle_stream_gets_an_id_within_16_seconds() {
    let service = Service::start().await;
    let mut events = Events::open(&service, "/changes", "");
    let first = events.chunk();
    let begun = Instant::now();
    // Transactions without a price change do not postpone it.
    let busy = "do $$ begin for n in 1..150 loop perform pg_current_xact_id(); perform pg_sleep(0.1); commit; end loop; end $$";
    run(service.superuser(), busy).await;
    let second = events.chunk().expect("a chunk");
    assert!(
        (14..17).contains(&begun.elapsed().as_secs()),
        "{:?}",
        begun.elapsed()
    );
    assert!(
        second.starts_with("id: ") && second.ends_with("\n\n"),
        "{second}"
    );
    assert_ne!(first, Some(second));
}

#[tokio::test]
async fn a_stop_ends_streams_and_answers_waiting_requests() {
    let mut service = Service::start().await;
    let mut events = Events::open(&service, "/changes?after=now", "");
    let path = "/changes?after=now&wait=60&limit=7";
    let mut waiting = service.connect();
    waiting.request("GET", path, "", "");
    events.chunk();
    within(TWO_SECONDS, "two listeners", || {
        metric(&service, "change_feed_listeners ") == "2"
    });
    let begun = Instant::now();
    service.signal("-TERM");
    let page = waiting.receive("GET", path);
    assert_eq!(changes(&page), [Value::Null; 0]);
    next(&page);
    assert!(events.next().is_none());
    assert_eq!(service.wait(), Some(0));
    assert!(begun.elapsed() < TWO_SECONDS, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_stop_ends_a_stream_that_is_behind() {
    let mut service = Service::start().await;
    run(service.superuser(), &insert_listings(1, 100_000)).await;
    let mut events = Events::open(&service, "/changes", "");
    events.ids(1);
    service.signal("-TERM");
    let begun = Instant::now();
    while events.next().is_some() {}
    assert_eq!(service.wait(), Some(0));
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "{:?}",
        begun.elapsed()
    );
}

#[tokio::test]
async fn a_large_transaction_reaches_every_stream() {
    const CHANGES: i32 = 3000;
    let service = Service::start().await;
    run(service.superuser(), &insert_listings(1, CHANGES)).await;
    let mut streams: Vec<_> = (0..100)
        .map(|_| Events::open(&service, "/changes?after=now", ""))
        .collect();
    for events in &mut streams {
        events.chunk();
    }
    run(service.superuser(), "update listing set price = price + 1").await;
    let count = usize::try_from(CHANGES).expect("a count");
    for events in &mut streams {
        assert_eq!(events.ids(count).len(), count);
    }
}

#[tokio::test]
async fn a_mangled_cursor_or_a_bad_parameter_is_refused() {
    let service = Service::start().await;
    run(service.superuser(), &insert_listing(1, "1")).await;
    run(service.superuser(), &insert_listing(2, "1")).await;
    let first = next(&service.get("/changes?limit=1"));
    let head = all_after(&service, "/changes").1;
    run(service.superuser(), "update listing set price = 2").await;
    let middle = next(&service.get(&format!("{head}&limit=1")));
    let mut connection = service.connect();
    let message = "after: must be now, or come from a Link header or an event";
    for path in [first, head, middle] {
        let cursor = cursor(&path);
        for index in 0..cursor.len() {
            let mut bytes = cursor.to_owned().into_bytes();
            bytes[index] = if bytes[index] == b'A' { b'B' } else { b'A' };
            let mangled = String::from_utf8(bytes).expect("ASCII");
            let page = connection.send("GET", &format!("/changes?after={mangled}"), "", "");
            assert_eq!(
                page.error(),
                (400, message.to_owned()),
                "{cursor} {mangled}"
            );
            let shorter = &cursor[..index];
            let page = connection.send("GET", &format!("/changes?after={shorter}"), "", "");
            assert_eq!(page.error(), (400, message.to_owned()), "{shorter}");
        }
    }
    for (query, message) in [
        ("limit=0", "limit: must be between 1 and 1000"),
        ("limit=1001", "limit: must be between 1 and 1000"),
        ("wait=61", "wait: must be between 0 and 60"),
        ("wait=-1", "wait: must be between 0 and 60"),
        ("wait=1.5", "wait: must be between 0 and 60"),
        ("after=", message),
        ("after=%00", "after: must not contain the character U+0000"),
        ("from=now", "from: is not a parameter of this path"),
    ] {
        let response = service.get(&format!("/changes?{query}"));
        assert_eq!(response.error(), (400, message.to_owned()), "{query}");
    }
    let events = Events::open(&service, "/changes?after=now", "last-event-id: x\r\n");
    assert!(events.head.starts_with("HTTP/1.1 400"), "{}", events.head);
    let error = service.send(
        "GET",
        "/changes",
        "accept: text/event-stream\r\nlast-event-id: x\r\n",
        "",
    );
    let message = "last-event-id: must be now, or come from a Link header or an event";
    assert_eq!(error.error(), (400, message.to_owned()));
    // The header concerns events only.
    assert_eq!(
        service
            .send("GET", "/changes", "last-event-id: x\r\n", "")
            .status,
        200
    );
}

const GONE: &str = "the cursor is from before a restore or a failover of the database: begin anew, without a cursor";

fn assert_gone(service: &Service, path: &str) {
    let mut response = service.get(path);
    // The service may have lost its connections a moment ago.
    while response.status == 503 {
        response = service.get(path);
    }
    assert_eq!(response.error(), (410, GONE.to_owned()));
}

#[tokio::test]
async fn a_cursor_ends_with_a_restored_dump_and_with_a_restart_of_the_feed() {
    let service = Service::start().await;
    service.post(LOFT);
    let path = all_after(&service, "/changes").1;
    let mut pg_dump = program("pg_dump");
    pg_dump.arg(format!("--dbname={}", service.db().url()));
    let dump = succeed(pg_dump, "");
    let copy = Database::empty().await;
    let mut psql = program("psql");
    psql.args([
        "--quiet",
        "--no-psqlrc",
        "--set=ON_ERROR_STOP=1",
        &copy.url(),
    ]);
    succeed(psql, &dump);
    let restored = Service::start_on(copy, &[]).await;
    assert_gone(&restored, &path);
    assert_eq!(changes(&restored.get("/changes")).len(), 1);

    let mut events = Events::open(&service, &path, "");
    assert_eq!(
        service
            .patch("/listings/1", r#"{"latest_price_eur":1}"#)
            .status,
        200
    );
    assert_eq!(events.ids(1), [2]);
    run(service.superuser(), "select restart_change_feed()").await;
    assert!(events.next().is_none());
    assert_gone(&service, &path);
    let events = Events::open(
        &service,
        "/changes",
        &format!("last-event-id: {}\r\n", events.id),
    );
    assert!(events.head.starts_with("HTTP/1.1 410"), "{}", events.head);
    let path = next(&service.get("/changes"));
    service.patch("/listings/1", r#"{"latest_price_eur":2}"#);
    assert_eq!(changes(&service.get(&path)).len(), 1);
}

#[tokio::test]
async fn a_restart_of_the_feed_delivers_rows_with_transaction_numbers_from_the_future() {
    let service = Service::start().await;
    let db = service.superuser();
    run(db, &insert_listing(1, "1")).await;
    run(db, &insert_listing(2, "2")).await;
    run(db, "delete from listing where id = 2; set listing.maintenance = on; \
        update listing_price_log set xact_id = '4000000000'; update listing_deletion set xact_id = '4000000000'; \
        reset listing.maintenance").await;
    let (found, path) = all_after(&service, "/changes");
    assert_eq!(found, [Value::Null; 0]);
    let problem = "select problem, left(explanation, 6), mend from listing_price_log_problem";
    let expected =
        "transaction numbers from the future|2 rows|select public.restart_change_feed();";
    assert_eq!(value(db, problem).await, expected);
    assert_eq!(value(db, "select restart_change_feed()").await, "2");
    let no_problem = "select count(*) from listing_price_log_problem";
    assert_eq!(value(db, no_problem).await, "0");
    assert_gone(&service, &path);
    assert_eq!(all_after(&service, "/changes").0.len(), 2);
    let recorded =
        "select task, row_count, detail = change_feed_epoch() from listing_price_log_maintenance";
    assert_eq!(value(db, recorded).await, "restart_change_feed|2|t");
    assert_eq!(value(db, "select restart_change_feed()").await, "0");
}

#[tokio::test]
async fn a_dump_in_another_server_ends_cursors_and_a_restart_of_the_feed_delivers_all_its_rows() {
    let original = Cluster::migrated();
    let db = original.superuser().await;
    // More numbers than the other server has given out.
    run(
        &db,
        "do $$ begin for n in 1..5000 loop perform pg_current_xact_id(); commit; end loop; end $$",
    )
    .await;
    run(&db, &insert_listings(1, 20)).await;
    run(
        &db,
        "update listing set price = price + 1 where id > 5; delete from listing where id > 17",
    )
    .await;
    let (found, path) = all_after(&Service::start_at(&original.url, &[]), "/changes");
    assert_eq!(found.len(), 17 + 12 + 3);

    let mut pg_dump = program("pg_dump");
    pg_dump.arg(format!("--dbname={}", original.url));
    let copy = Cluster::start();
    let db = copy.superuser().await;
    run(&db, "create role listing_api; create role listing_auditor").await;
    let mut psql = program("psql");
    psql.args(["--quiet", "--no-psqlrc", "--set=ON_ERROR_STOP=1", &copy.url]);
    succeed(psql, &succeed(pg_dump, ""));
    let service = Service::start_at(&copy.url, &[]);
    assert_gone(&service, &path);
    let (early, path) = all_after(&service, "/changes");
    assert_eq!(early, [Value::Null; 0]);
    let problem = "select problem, left(explanation, 7), mend from listing_price_log_problem";
    let expected =
        "transaction numbers from the future|32 rows|select public.restart_change_feed();";
    assert_eq!(value(&db, problem).await, expected);

    assert_eq!(value(&db, "select restart_change_feed()").await, "32");
    assert_gone(&service, &path);
    let (all, path) = all_after(&service, "/changes");
    assert_eq!(all, found);
    let patched = service.patch("/listings/3", r#"{"latest_price_eur":7}"#);
    assert_eq!(patched.status, 200);
    assert_eq!(all_after(&service, &path).0.len(), 1);
    assert_no_problem(&db).await;
}

#[tokio::test]
async fn a_cursor_ends_with_a_restore_to_a_moment() {
    let original = Cluster::migrated();
    let archive = tempfile::tempdir().expect("a folder");
    // For root, PostgreSQL runs as another user.
    fs::set_permissions(archive.path(), Permissions::from_mode(0o777)).expect("open the folder");
    let archive = archive.path().display();
    let db = original.superuser().await;
    alter_system(&db, &format!("set archive_command = 'cp %p {archive}/%f'")).await;
    original.restart_with("set archive_mode = on").await;
    // A base backup.
    let restored = original.standby();
    restored.call("stop");
    let link = Link::to(&original);
    let url = through(&original, &[&link.address]);
    let service = Service::start_at(&url, &[]);
    service.post(LOFT);
    let early = all_after(&service, "/changes").1;
    let moment = "select pg_create_restore_point('moment')";
    run(&original.superuser().await, moment).await;
    service.post(LOFT);
    let late = next(&service.get(&early));
    // Archives the last segment too.
    original.call("stop");

    let data = restored.folder.path().join(".postgres/data");
    let signal = |name: &str| data.join(name).with_extension("signal");
    fs::rename(signal("standby"), signal("recovery")).expect("rename the signal");
    let settings = format!(
        "restore_command = 'cp {archive}/%f %p'\nrecovery_target_name = 'moment'\nrecovery_target_action = 'promote'\n"
    );
    let file = OpenOptions::new()
        .append(true)
        .open(data.join("postgresql.auto.conf"));
    let written = file.and_then(|mut file| file.write_all(settings.as_bytes()));
    written.expect("write the settings");
    restored.call("up");
    restored.wait_for("select pg_is_in_recovery()", "f").await;
    link.lead_to(&restored);
    for service in [service, Service::start_at(&restored.url, &[])] {
        assert_gone(&service, &early);
        assert_gone(&service, &late);
        let (found, path) = all_after(&service, "/changes");
        assert_eq!(found[0]["listing_id"], 1);
        // The numbers that were lost are given out anew.
        assert_eq!(service.post(LOFT).status, 201);
        assert_gone(&service, &late);
        assert_eq!(changes(&service.get(&path)).len(), 1);
    }
}

#[tokio::test]
async fn a_cursor_stays_valid_after_a_clean_promotion() {
    let primary = Cluster::migrated();
    let standby = primary.standby();
    let url = through(&primary, &[primary.address(), standby.address()]);
    let service = Service::start_at(&url, &[]);
    service.post(LOFT);
    let path = next(&service.get("/changes"));
    let mut events = Events::open(&service, &path, "");
    events.chunk();
    let waiting_path = format!("{path}&wait=60");
    let mut waiting = service.connect();
    waiting.request("GET", &waiting_path, "", "");
    thread::sleep(Duration::from_millis(600));
    let begun = Instant::now();
    primary.call("stop");
    // A standby answers no request for changes.
    let page = waiting.receive("GET", &waiting_path);
    assert_eq!(changes(&page), [Value::Null; 0]);
    assert!(events.next().is_none());
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "{:?}",
        begun.elapsed()
    );
    within(Duration::from_secs(5), "503", || {
        service.get(&path).status == 503
    });
    standby.call("promote");
    within(Duration::from_secs(5), "a page", || {
        service.get(&path).status == 200
    });
    within(Duration::from_secs(5), "a write", || {
        let response = service.patch("/listings/1", r#"{"latest_price_eur":5}"#);
        response.status == 200
    });
    let found = changes(&service.get(&path));
    assert_eq!(found.len(), 1);
    let mut events = Events::open(
        &service,
        "/changes",
        &format!("last-event-id: {}\r\n", events.id),
    );
    assert_eq!(events.ids(1), [found[0]["id"].as_i64().expect("an id")]);

    // PostgreSQL forgets at its restart where the promotion was, the service does not.
    standby.call("stop");
    standby.call("up");
    within(Duration::from_secs(5), "a page", || {
        service.get(&path).status == 200
    });
    assert_eq!(changes(&service.get(&path)), found);
    let other = Service::start_at(&url, &[]);
    assert_gone(&other, &path);
    assert_eq!(all_after(&other, "/changes").0.len(), 2);
}

#[tokio::test]
async fn a_cursor_ends_with_a_promotion_that_lost_changes() {
    let primary = Cluster::migrated();
    let standby = primary.standby();
    let url = through(&primary, &[primary.address(), standby.address()]);
    let service = Service::start_at(&url, &[]);
    service.post(LOFT);
    let early = next(&service.get("/changes"));
    standby.wait_for("select count(*) from listing", "1").await;
    standby
        .wait_for(
            "select pg_last_wal_replay_lsn() >= pg_last_wal_receive_lsn()",
            "t",
        )
        .await;
    standby.call("stop");
    service.post(LOFT);
    let late = next(&service.get(&early));
    primary.kill();
    standby.call("up");
    standby.call("promote");
    assert_gone(&service, &late);
    let (found, path) = all_after(&service, "/changes");
    assert_eq!(found.len(), 1);
    // The new primary gives out the same numbers anew.
    service.post(LOFT);
    service.post(LOFT);
    assert_gone(&service, &late);
    assert_eq!(changes(&service.get(&path)).len(), 2);
    // A crash of the new primary hides where the promotion was.
    standby.kill();
    standby.call("up");
    let other = Service::start_at(&standby.url, &[]);
    assert_gone(&other, &late);
}

#[tokio::test]
async fn a_cursor_ends_with_a_crash_that_lost_transactions_it_has_seen() {
    let cluster = Cluster::migrated();
    // Nothing but a commit and a checkpoint writes the log.
    cluster.restart_with("set wal_writer_delay = '10s'").await;
    let service = Service::start_at(&cluster.url, &[]);
    service.post(LOFT);
    let superuser = cluster.superuser().await;
    let kept = all_after(&service, "/changes").1;
    run(&superuser, "checkpoint").await;
    let rolled_back = "begin; select pg_current_xact_id(); rollback; select pg_snapshot_xmax(pg_current_snapshot())";
    run(&superuser, rolled_back).await;
    let lost = next(&service.get("/changes?after=now"));
    cluster.kill();
    cluster.call("up");
    // It has the number of the transaction that was rolled back.
    run(&cluster.superuser().await, &insert_listing(7, "7")).await;
    assert_gone(&service, &lost);
    within(TWO_SECONDS, "a page", || service.get(&kept).status == 200);
    assert_eq!(changes(&service.get(&kept)).len(), 1);
}

#[tokio::test]
async fn a_cursor_is_shorter_than_2_kb_with_300_running_transactions() {
    let cluster = Cluster::migrated();
    cluster.restart_with("set max_connections = 400").await;
    let service = Service::start_at(&cluster.url, &[]);
    let superuser = cluster.superuser().await;
    run(&superuser, &insert_listing(1, "1")).await;
    run(&superuser, &insert_listing(2, "2")).await;
    let mut path = next(&service.get("/changes"));
    let mut running = Vec::new();
    for number in 0..300 {
        let session = connect(&cluster.config).await;
        run(&session, &format!("begin; update listing set name = 'x' where id = -{number}; select pg_current_xact_id()")).await;
        running.push(session);
        // Others end between them.
        run(&superuser, "do $$ begin for n in 1..20 loop perform pg_current_xact_id(); commit; end loop; end $$").await;
    }
    for price in 3..5 {
        run(&superuser, &format!("update listing set price = {price}")).await;
        let first = next(&service.get(&format!("{path}&limit=1")));
        assert!(cursor(&first).len() < 2000, "{}", cursor(&first).len());
        let second = service.get(&first.replace("limit=1&", ""));
        assert_eq!(changes(&second).len(), 1);
        path = next(&second);
        assert!(cursor(&path).len() > 300, "{path}");
    }
    let metrics = service.admin("/metrics");
    assert!(
        metrics
            .text()
            .contains("change_feed_running_transactions 0")
    );
    let mut events = Events::open(&service, "/changes?after=now", "");
    events.chunk();
    within(TWO_SECONDS, "the number of running transactions", || {
        service
            .admin("/metrics")
            .text()
            .contains("change_feed_running_transactions 300")
    });
}

#[tokio::test]
async fn a_cursor_is_shorter_than_2_kb_also_if_hundreds_of_transactions_end_and_others_run() {
    let cluster = Cluster::migrated();
    // The poll would tell about the transactions of autovacuum too.
    alter_system(&cluster.superuser().await, "set autovacuum = off").await;
    let setting = "set max_prepared_transactions = 900";
    cluster.restart_with(setting).await;
    let service = Service::start_at(&cluster.url, &[]);
    let superuser = cluster.superuser().await;
    run(&superuser, &insert_listings(1, 801)).await;
    // Uses 150 numbers, so that the difference of two that run takes two bytes.
    let end_others = "create temporary table used (); create procedure pg_temp.end_others() language plpgsql as $$ begin \
        for n in 1..150 loop begin insert into used default values; exception when others then raise; end; end loop; end $$";
    run(&superuser, end_others).await;
    // A prepared transaction runs without a session.
    let prepare = async |ids: RangeInclusive<i32>| {
        for id in ids {
            run(&superuser, &format!("begin; update listing set price = 0 where id = {id}; prepare transaction '{id}'")).await;
            run(&superuser, "call pg_temp.end_others()").await;
        }
    };
    prepare(1..=400).await;
    let mut path = next(&service.get("/changes?after=now&limit=150"));
    assert!(cursor(&path).len() > 1000, "{path}");
    prepare(401..=800).await;
    // The poll waits for the lock, and then finds everything at once.
    let mut events = Events::open(&service, "/changes?after=now", "");
    events.chunk();
    let locking = cluster.superuser().await;
    let lock = "begin; lock table listing_price_log_maintenance";
    run(&locking, lock).await;
    wait_for(&superuser, WAITING, "1").await;
    let commit = async |ids: RangeInclusive<i32>| {
        for id in ids {
            run(&superuser, &format!("commit prepared '{id}'")).await;
        }
    };
    let mut read = |expected: &[i64]| {
        let mut found = Vec::new();
        while found.len() < expected.len() {
            let page = service.get(&path);
            let all = changes(&page);
            found.extend(
                all.iter()
                    .filter_map(|change| change["listing_id"].as_i64()),
            );
            path = next(&page);
            assert!(cursor(&path).len() < 2000, "{}", cursor(&path).len());
        }
        assert_eq!(found, expected);
    };
    commit(1..=400).await;
    run(&superuser, "update listing set price = 0 where id = 801").await;
    run(&locking, "commit").await;
    assert_eq!(events.ids(401).len(), 401);
    read(&(1..=400).chain([801]).collect::<Vec<_>>());
    commit(401..=800).await;
    read(&(401..=800).collect::<Vec<_>>());
    assert_eq!(all_after(&service, &path).0, [Value::Null; 0]);
}

/// Lets a statement that reads the head wait for an advisory lock after it has its snapshot: the one that takes number 3, but
/// none of the poll.
const DELAY_A_HEAD: &str = "create sequence head; \
    create or replace function change_feed_epoch() returns text language plpgsql security definer as $$ begin \
        if pg_backend_pid() <> POLL and nextval('public.head') = 3 then perform pg_advisory_xact_lock_shared(1); end if; \
        return null; end $$";

#[tokio::test]
async fn a_change_that_commits_while_a_listener_opens_reaches_it() {
    // The poll tells about the transactions of other tests too.
    let cluster = Cluster::migrated();
    let service = Service::start_at(&cluster.url, &[]);
    let db = cluster.superuser().await;
    run(&db, &insert_listing(1, "1")).await;
    let mut other = Events::open(&service, "/changes?after=now", "");
    other.chunk();
    let polls = format!(
        "from pg_stat_activity where query ~ 'pg_current_snapshot' and pid <> pg_backend_pid() and query_start > '{}'",
        value(&db, "select clock_timestamp()").await
    );
    wait_for(&db, &format!("select count(*) {polls}"), "1").await;
    let poll = value(&db, &format!("select pid {polls}")).await;
    run(&db, &DELAY_A_HEAD.replace("POLL", &poll)).await;

    let lock = async |taken: &str| {
        // The first number has a transaction, whose end would be told too.
        run(
            &db,
            &format!("alter sequence head restart; {taken}; select pg_advisory_lock(1)"),
        )
        .await;
    };
    let change = async |other: &mut Events| {
        wait_for(&db, WAITING, "1").await;
        run(&db, "update listing set price = price + 1").await;
        // The poll has found the change.
        other.ids(1);
        run(&db, "select pg_advisory_unlock(1)").await;
    };
    // A request that waits reads the head once.
    lock("select nextval('head'), nextval('head')").await;
    let path = "/changes?after=now&wait=5";
    let mut waiting = service.connect();
    waiting.request("GET", path, "", "");
    change(&mut other).await;
    assert_eq!(changes(&waiting.receive("GET", path)).len(), 1);
    // A stream reads it before its response begins, and when it follows the poll.
    lock("select nextval('head')").await;
    let mut stream = Events::open(&service, "/changes?after=now", "");
    change(&mut other).await;
    let chunks = [stream.chunk(), stream.chunk()].map(|chunk| chunk.expect("a chunk"));
    assert!(chunks[1].contains("event: price"), "{chunks:?}");
}

#[tokio::test]
async fn a_long_transaction_delays_only_its_own_changes() {
    let service = Service::start().await;
    run(service.superuser(), &insert_listings(1, 3)).await;
    let (_, mut path) = all_after(&service, "/changes");
    let long = service.db().connect().await;
    run(&long, "begin; update listing set price = 10 where id = 1").await;
    for price in 20..23 {
        let update = format!("update listing set price = {price} where id = 2");
        run(service.superuser(), &update).await;
        let page = service.get(&path);
        assert_eq!(changes(&page).len(), 1);
        path = next(&page);
    }
    // Its number is lower than that of the transaction before it, its change of this listing is later.
    run(
        service.superuser(),
        "update listing set price = 30 where id = 3",
    )
    .await;
    run(&long, "update listing set price = 31 where id = 3; commit").await;
    run(
        service.superuser(),
        "update listing set price = 32 where id = 3",
    )
    .await;
    let mut prices = Vec::new();
    for _ in 0..4 {
        let page = service.get(&format!("{path}&limit=1"));
        prices.push(changes(&page)[0]["price_eur"].as_i64());
        path = next(&page).replace("limit=1&", "");
    }
    assert_eq!(prices, [10, 30, 31, 32].map(Some));
    assert_eq!(all_after(&service, &path).0, [Value::Null; 0]);
}

#[tokio::test]
async fn a_large_batch_is_delivered_once_also_if_pages_of_it_are_short_or_empty() {
    let service = Service::start().await;
    let db = service.superuser();
    run(db, &insert_listings(1, 25_000)).await;
    let (found, path) = all_after(&service, "/changes?limit=1000");
    assert_eq!(found.len(), 25_000);
    let path = path.replace("limit=1000&", "wait=60&");
    let import = insert_listings(30_001, 36_000);
    run(db, &format!("begin; {import}; update listing set price = 0 where id = 7; delete from listing where id = 8; commit")).await;
    let begun = Instant::now();
    // Such a page has examined as many rows as a page may. It does not wait.
    let page = service.get(&path);
    assert_eq!(changes(&page).len(), 2);
    let page = service.get(&next(&page));
    assert_eq!(changes(&page).len(), 0);
    let page = service.get(&next(&page));
    let mut ids: Vec<_> = changes(&page);
    // Transactions that commit meanwhile are in the next batch.
    run(db, "update listing set price = 5 where id in (1, 36000)").await;
    let (rest, _) = all_after(&service, &next(&page).replace("wait=60&", ""));
    ids.extend(rest);
    assert_eq!(ids.len(), 6002);
    assert!(
        ids[6000]["listing_id"] == 1 && ids[6001]["listing_id"] == 36_000,
        "{:?}",
        &ids[6000..]
    );
    assert!(begun.elapsed() < Duration::from_secs(20));
}

#[tokio::test]
async fn a_batch_that_grows_while_it_is_read_is_delivered_once() {
    let service = Service::start().await;
    let db = service.superuser();
    let (_, mut path) = all_after(&service, "/changes");
    // Few changes, and more than are sorted.
    for (base, count) in [(0, 5), (10_000, 6000)] {
        // A transaction that runs when the batch begins, whose number is between two that are in it.
        run(db, &insert_listings(base + 1, base + 10)).await;
        let running = service.db().connect().await;
        run(&running, "begin; select pg_current_xact_id()").await;
        run(db, &insert_listings(base + 11, base + 20)).await;
        let page = service.get(&format!("{path}&limit=5"));
        let late = insert_listings(base + 1001, base + 1000 + count);
        run(&running, &format!("{late}; commit")).await;
        let (rest, following) = all_after(&service, &next(&page).replace("limit=5&", ""));
        let ids: Vec<_> = changes(&page)
            .iter()
            .chain(&rest)
            .map(|change| change["listing_id"].as_i64().map(|id| id - i64::from(base)))
            .collect();
        let expected = (1..=20).chain(1001..=1000 + i64::from(count));
        assert_eq!(ids, expected.map(Some).collect::<Vec<_>>());
        path = following;
    }
}

/// A running program, which is killed when dropped.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        // Both fail if it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn the_consumer_in_the_docs_mirrors_all_present_prices() {
    let page = fs::read_to_string(in_checkout("docs/change-feed.md")).expect("read the page");
    let (_, code) = page.split_once("```python\n").expect("a program");
    let (code, _) = code.split_once("```").expect("the end of the program");
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("prices.sqlite");
    let service = Service::start().await;
    let db = service.superuser();
    run(db, &insert_listings(1, 3000)).await;
    run(db, "update listing set price = price + 0.1").await;
    let consume = || {
        let mut python = Command::new("python3");
        python
            .args(["-c", code, &format!("http://{}", service.address)])
            .arg(&file);
        Program(python.stderr(Stdio::null()).spawn().expect("start python3"))
    };
    let read = "import sqlite3, sys; print(*sqlite3.connect(sys.argv[1]).execute( \
        'select listing_id, price_eur from price where price_eur is not null order by 1'))";
    let mirrored = || {
        let mut python = Command::new("python3");
        let output = python
            .args(["-c", read])
            .arg(&file)
            .output()
            .expect("run python3");
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    let expected = "select coalesce(string_agg(format('(%s, ''%s'')', id, trim_scale(price)), ' ' order by id), '') || E'\\n' from listing";

    let first = consume();
    let present = value(db, expected).await;
    within(Duration::from_secs(20), "all prices", || {
        mirrored() == present
    });
    drop(first);
    run(
        db,
        "delete from listing where id > 2000; update listing set price = 7.25 where id < 9",
    )
    .await;
    let _second = consume();
    let present = value(db, expected).await;
    within(Duration::from_secs(20), "the changes", || {
        mirrored() == present
    });
    run(
        db,
        "delete from listing where id > 1000; select restart_change_feed()",
    )
    .await;
    let present = value(db, expected).await;
    within(Duration::from_secs(20), "all prices anew", || {
        mirrored() == present
    });
}

/// How many statements of the poll began in a time, of the last ones of each session.
async fn polls(db: &Client, time: Duration) -> usize {
    let used = "select pid, query_start from pg_stat_activity where datname = current_database() \
        and application_name = 'listing-api' and query ~ 'change_feed_epoch|with batch'";
    let (begun, before) = (Instant::now(), rows(db, used).await);
    let mut seen = BTreeSet::new();
    while begun.elapsed() < time {
        seen.extend(rows(db, used).await);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    seen.iter().filter(|row| !before.contains(row)).count()
}

fn metric(service: &Service, name: &str) -> String {
    let metrics = service.admin("/metrics");
    let line = metrics
        .text()
        .lines()
        .find_map(|line| line.strip_prefix(name));
    line.expect(name).trim().to_owned()
}

#[tokio::test]
async fn one_poll_serves_all_listeners_and_rests_without_any() {
    // Transactions of other tests would count.
    let cluster = Cluster::migrated();
    let service = Service::start_at(&cluster.url, &[]);
    let db = cluster.superuser().await;
    assert_eq!(metric(&service, "change_feed_listeners"), "0");
    assert_eq!(metric(&service, "change_feed_lag_seconds"), "NaN");
    let mut all: Vec<_> = (0..20)
        .map(|_| Events::open(&service, "/changes", ""))
        .collect();
    for events in &mut all {
        events.chunk();
    }
    let count = polls(&db, Duration::from_secs(2)).await;
    // A poll has one statement, or two if any transaction of the server has ended.
    assert!((3..=18).contains(&count), "{count} statements in 2 s");
    assert_eq!(metric(&service, "change_feed_listeners"), "20");
    let seconds = |name| metric(&service, name).parse::<f64>().expect("seconds");
    assert!(seconds("change_feed_lag_seconds") < 2.0);

    let running = connect(&cluster.config).await;
    run(&running, "begin; select pg_current_xact_id()").await;
    run(&db, &insert_listing(1, "1")).await;
    for events in &mut all {
        assert_eq!(events.ids(1), [1]);
    }
    within(TWO_SECONDS, "the age of the transaction", || {
        seconds("change_feed_oldest_transaction_seconds") > 0.5
    });
    assert_eq!(metric(&service, "change_feed_running_transactions"), "1");
    run(&running, "commit").await;
    within(TWO_SECONDS, "no transaction", || {
        metric(&service, "change_feed_running_transactions") == "0"
    });
    drop(all);
    within(TWO_SECONDS, "no listener", || {
        metric(&service, "change_feed_listeners") == "0"
    });
    within(TWO_SECONDS, "rest", || {
        metric(&service, "change_feed_lag_seconds") == "NaN"
    });
    assert_eq!(polls(&db, Duration::from_secs(1)).await, 0);
}

#[tokio::test]
async fn a_slow_listener_delays_no_other_and_catches_up() {
    const TICKS: usize = 30;
    let service = Service::start().await;
    run(service.superuser(), &insert_listings(1, 1000)).await;
    let mut slow = Events::open(&service, "/changes?after=now", "");
    let mut fast = Events::open(&service, "/changes?after=now", "");
    fast.chunk();
    for _ in 0..TICKS {
        run(service.superuser(), "update listing set price = price + 1").await;
        let begun = Instant::now();
        fast.ids(1000);
        assert!(
            begun.elapsed() < Duration::from_secs(5),
            "{:?}",
            begun.elapsed()
        );
    }
    let mut consumer = Consumer::default();
    while consumer.seen.len() < TICKS * 1000 {
        for event in slow.next().expect("events") {
            consumer.receive(&event.data);
        }
    }
    assert_eq!(consumer.deliveries, TICKS * 1000);
}

#[tokio::test]
async fn a_listener_costs_less_than_50_kb_also_if_it_reads_nothing() {
    const LISTENERS: usize = 500;
    let service = Service::start().await;
    run(service.superuser(), &insert_listings(1, 1000)).await;
    let mut first = Events::open(&service, "/changes?after=now", "");
    first.chunk();
    let before = service.resident_kib();
    let mut all: Vec<_> = (0..LISTENERS)
        .map(|_| Events::open(&service, "/changes?after=now", ""))
        .collect();
    for events in &mut all {
        events.chunk();
    }
    for price in 2..5 {
        service.patch("/listings/1", &format!("{{\"latest_price_eur\":{price}}}"));
        first.ids(1);
        for events in &mut all {
            events.ids(1);
        }
    }
    let grown = service.resident_kib() - before;
    assert!(grown < 50 * LISTENERS, "idle: {grown} KiB");

    for _ in 0..10 {
        let update = "update listing set price = price + 1000";
        run(service.superuser(), update).await;
        first.ids(1000);
    }
    let grown = service.resident_kib() - before;
    assert!(grown < 50 * LISTENERS, "reading nothing: {grown} KiB");
}

/// What a consumer has received.
#[derive(Default)]
struct Consumer {
    /// The price of each change, `None` for a deletion.
    seen: BTreeMap<(i64, i64), Option<i64>>,
    greatest: BTreeMap<i64, i64>,
    deliveries: usize,
}

impl Consumer {
    fn receive(&mut self, change: &Value) {
        let number = |field: &str| change[field].as_i64();
        let (listing, id) = (
            number("listing_id").expect("a listing"),
            number("id").expect("an id"),
        );
        let is_new = self
            .seen
            .insert((listing, id), number("price_eur"))
            .is_none();
        let greatest = self.greatest.entry(listing).or_insert(id);
        assert!(!is_new || id >= *greatest, "{change} after {greatest}");
        *greatest = id.max(*greatest);
        self.deliveries += 1;
    }

    /// The last price of each listing that was not deleted.
    fn present_prices(&self) -> BTreeMap<i64, i64> {
        let last = self
            .greatest
            .iter()
            .map(|(listing, id)| (*listing, self.seen[&(*listing, *id)]));
        last.filter_map(|(listing, price)| Some((listing, price?)))
            .collect()
    }
}

/// Listings, the first of which are written by many sessions at once.
const LISTINGS: i32 = 12_000;
const CONTENDED: i32 = 20;

/// No price is used twice. The prices of rolled back changes are at least this.
const ROLLED_BACK: i64 = 1_000_000_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[expect(clippy::too_many_lines, reason = "one story")]
async fn consumers_end_with_the_present_prices_and_see_every_committed_change_and_no_other() {
    let service = Arc::new(Service::start_with(&[("POOL_SIZE", "8")]).await);
    let fill = format!(
        "{}; select setval('listing_id_seq', {LISTINGS}); create sequence price start 20000",
        insert_listings(1, LISTINGS)
    );
    run(service.superuser(), &fill).await;
    let done = Arc::new(AtomicBool::new(false));
    let last_id = Arc::new(Mutex::new(None));

    let by_pages = |path: &'static str| {
        let (service, last_id) = (service.clone(), last_id.clone());
        thread::spawn(move || {
            let (mut consumer, mut path) = (Consumer::default(), path.to_owned());
            loop {
                let end = *last_id.lock().expect("lock");
                let mut connection = service.connect();
                connection.request("GET", &path, "", "");
                // To check the schema of each would take most of the time.
                let page = connection.receive_unchecked("GET");
                for change in &changes(&page) {
                    consumer.receive(change);
                }
                let following = next(&page);
                // The writers have ended, and the page is behind their last change.
                if end.is_some() && changes(&page).is_empty() && following == path {
                    return consumer;
                }
                path = following;
            }
        })
    };
    let by_events = {
        let (service, last_id) = (service.clone(), last_id.clone());
        thread::spawn(move || {
            let mut consumer = Consumer::default();
            let mut events = Events::open(&service, "/changes?limit=100", "");
            for turn in 0.. {
                for event in events.next().expect("events") {
                    consumer.receive(&event.data);
                    if Some(event.data["id"].as_i64().expect("an id"))
                        == *last_id.lock().expect("lock")
                    {
                        return consumer;
                    }
                }
                // Loses the connection now and then.
                if turn % 50 == 49 {
                    let header = format!("last-event-id: {}\r\n", events.id);
                    events = Events::open(&service, "/changes?limit=100", &header);
                }
            }
            consumer
        })
    };
    let consumers = [
        by_pages("/changes?limit=300"),
        by_pages("/changes?wait=1"),
        by_events,
    ];

    let mut sessions = Vec::new();
    for session in 0..4 {
        let client = service.db().connect().await;
        let done = done.clone();
        sessions.push(tokio::spawn(async move {
            for round in 0.. {
                if done.load(Ordering::Relaxed) {
                    break;
                }
                let first = (session * 7 + round * 5) % CONTENDED + 1;
                let second = first + 1 + (session + round) % 3;
                let update = |id: i32, above: i64| {
                    format!("update listing set price = {above} + nextval('public.price') where id = {id};")
                };
                // The number of the transaction is given out before others write and commit.
                let begin = format!("begin; select pg_current_xact_id(); select pg_sleep({});", 0.01 * f64::from(round % 3));
                let writes = match round % 4 {
                    0 => update(first, ROLLED_BACK) + "rollback",
                    1 => format!(
                        "savepoint a; {} rollback to a; {} commit",
                        update(first, ROLLED_BACK),
                        update(second, 0)
                    ),
                    // The same listing again in the subtransaction of another savepoint.
                    2 => format!("{} savepoint a; {} release a; commit", update(first, 0), update(first, 0)),
                    _ => format!("{} {} commit", update(first, 0), update(second, 0)),
                };
                run(&client, &(begin + &writes)).await;
            }
        }));
    }
    // Begins early and commits late, several times.
    let client = service.db().connect().await;
    let ending = done.clone();
    sessions.push(tokio::spawn(async move {
        for round in 0.. {
            if ending.load(Ordering::Relaxed) {
                break;
            }
            let id = CONTENDED + 10 + round % 50;
            run(&client, &format!("begin; update listing set price = nextval('price') where id = {id}; select pg_sleep(0.7); commit")).await;
        }
    }));
    // Creates, changes and deletes by the API.
    let (api, ending) = (service.clone(), done.clone());
    let by_api = thread::spawn(move || {
        let mut connection = api.connect();
        while !ending.load(Ordering::Relaxed) {
            let id = connection.send("POST", "/listings", JSON, LOFT).id();
            let path = format!("/listings/{id}");
            for price in 1..=3 {
                let body = format!("{{\"latest_price_eur\":{price}}}");
                assert_eq!(connection.send("PATCH", &path, JSON, body).status, 200);
            }
            if id % 2 == 0 {
                assert_eq!(connection.send("DELETE", &path, "", "").status, 204);
            }
        }
    });
    // Batches that are too large to be sorted. Each locks the listings in their order, as the others do.
    for _ in 0..8 {
        let bulk = format!(
            "update listing set price = nextval('price') where id > {CONTENDED} and id <= {LISTINGS}"
        );
        run(service.superuser(), &bulk).await;
    }
    done.store(true, Ordering::Relaxed);
    for session in sessions {
        session.await.expect("a session");
    }
    by_api.join().expect("the client of the API");
    let last = insert_listing(1_000_000, "1");
    run(service.superuser(), &last).await;
    let id = value(service.superuser(), "select max(id) from listing_price_log").await;
    *last_id.lock().expect("lock") = Some(id.parse().expect("a number"));

    let log = rows(
        service.superuser(),
        "select listing_id, id, trunc(new_price) from listing_price_log union all select listing_id, id, null from listing_deletion",
    )
    .await;
    assert!(log.len() > 90_000, "{}", log.len());
    let present = rows(
        service.superuser(),
        "select id, trunc(price) from listing order by id",
    )
    .await;
    for consumer in consumers {
        let consumer = consumer.join().expect("a consumer");
        for row in &log {
            let mut fields = row.split('|');
            let mut number = || fields.next().and_then(|field| field.parse::<i64>().ok());
            let key = (number().expect("a listing"), number().expect("an id"));
            assert_eq!(consumer.seen.get(&key), Some(&number()), "{row}");
        }
        let prices = consumer.seen.values().flatten();
        assert_eq!(prices.filter(|price| **price >= ROLLED_BACK).count(), 0);
        let end: Vec<_> = consumer
            .present_prices()
            .iter()
            .map(|(id, price)| format!("{id}|{price}"))
            .collect();
        assert_eq!(end, present);
        assert!(
            consumer.deliveries < 2 * log.len(),
            "{}",
            consumer.deliveries
        );
    }
}
