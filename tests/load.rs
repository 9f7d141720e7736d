//! Requests that travel together, reads by id and writes: every client gets what is its own.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::runtime::Handle;

use crate::support::{
    Cluster, Connection, Database, JSON, LOFT, Link, OTHER_COLUMNS, OTHER_VALUES, Service,
    TWO_SECONDS, WAITING, assert_no_problem, bearer, create_administrator_key, create_key, rows,
    run, through, value, within,
};

/// Listings 1 to 200 with some prices each; 201 to 204 around the length from which a history is read by itself, and around
/// one and two pages of it.
async fn fill(db: &Database) {
    run(
        &db.superuser,
        &format!(
            "insert into listing (id, price, {OTHER_COLUMNS}) select id, id, {OTHER_VALUES} from generate_series(1, 204) as id;
            update listing set name = 'Größe ' || id || repeat('x', id);
            insert into listing_price_log (listing_id, old_price, new_price, changed_by)
            select listing.id, listing.id + n - 1, listing.id + n, 'test'
            from listing, generate_series(1, case listing.id
                when 201 then 99 when 202 then 100 when 203 then 999 when 204 then 2500 else listing.id % 8 end) as n
            order by n;"
        ),
    )
    .await;
}

/// What the database holds, as PostgreSQL itself writes it as JSON, by path.
async fn expected(db: &Database) -> HashMap<String, Value> {
    let sql = "select '/listings/' || id || '/prices', (
            select json_agg(json_build_object('price_eur', trim_scale(new_price), 'created_date',
                to_char(changed_at at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')) order by id)
            from listing_price_log where listing_id = listing.id)
        from listing
        union all
        select '/listings/' || id, json_build_object('id', id, 'name', name, 'postal_address', json_build_object(
                'street_address', street_address, 'postal_code', postal_code, 'city', city, 'country', country),
            'description', description, 'building_type', building_type, 'latest_price_eur', trim_scale(price),
            'surface_area_m2', surface_area_m2, 'rooms_count', rooms_count, 'bedrooms_count', bedrooms_count,
            'created_date', to_char(created_date at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'),
            'updated_date', to_char(updated_date at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'))
        from listing";
    let answers = rows(&db.superuser, sql).await;
    let answer = |row: String| {
        let (path, json) = row.split_once('|').expect("two columns");
        let json = serde_json::from_str(json).expect("JSON");
        (path.to_owned(), json)
    };
    answers.into_iter().map(answer).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_reads_at_once_get_each_what_the_database_holds() {
    let service = Service::start().await;
    fill(service.db()).await;
    let expected = expected(service.db()).await;
    let (runtime, cuts) = (Handle::current(), AtomicUsize::new(0));
    thread::scope(|scope| {
        let clients: Vec<_> = (0..64_usize)
            .map(|client| {
                let (service, expected, cuts) = (&service, &expected, &cuts);
                scope.spawn(move || {
                    let mut connection = service.connect();
                    for turn in (0_usize..).take_while(|turn| {
                        *turn < 64 || *turn < 1000 && cuts.load(Ordering::Relaxed) < 3
                    }) {
                        // Spread over all ids, the same in every run. 205 to 208 are nobody's.
                        let id = (client * 7919 + turn * 104_729) % 208 + 1;
                        let path = match turn % 8 {
                            0 => "/listings/7/prices".to_owned(),
                            1 => "/listings/7".to_owned(),
                            2 | 3 => format!("/listings/{id}"),
                            4 => format!("/listings/{}/prices", 201 + (client + turn / 8) % 4),
                            _ => format!("/listings/{id}/prices"),
                        };
                        // Another client asks for the same, and hangs up while it is worked on.
                        let gone = (turn % 8 == 5).then(|| {
                            let mut gone = service.connect();
                            gone.request("GET", &path, "", "");
                            gone
                        });
                        connection.request("GET", &path, "", "");
                        if gone.is_some() {
                            thread::sleep(Duration::from_micros(turn as u64 * 20));
                            drop(gone);
                        }
                        let response = connection.receive("GET", &path);
                        match expected.get(&path) {
                            Some(expected) => assert_eq!(response.json(), *expected, "{path}"),
                            None => assert_eq!(response.status, 404, "{path}"),
                        }
                    }
                })
            })
            .collect();
        // Meanwhile the connections that they share are cut off, now and then: each read is tried once more.
        let cut = "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() \
            and query ~ 'unnest\\(|id = any\\(\\$1\\)'";
        let breaker = scope.spawn(|| {
            for _ in 0..3 {
                thread::sleep(Duration::from_secs(1));
                assert!(!runtime.block_on(rows(service.superuser(), cut)).is_empty());
                cuts.fetch_add(1, Ordering::Relaxed);
            }
        });
        for client in clients {
            client.join().expect("a client that got its answers");
        }
        breaker.join().expect("three cuts");
    });
}

/// A service with one worker, whose next read of a listing waits until the superuser says `commit`, and clients for more.
async fn held_up(settings: &[(&str, &str)]) -> (Service, Connection, Vec<Connection>) {
    let settings = [&[("WORKERS", "1")], settings].concat();
    let service = Service::start_with(&settings).await;
    let mut clients: Vec<_> = (0..4).map(|_| service.connect()).collect();
    for client in &mut clients {
        assert_eq!(client.send("GET", "/listings/1", "", "").status, 404);
    }
    // So many that a read goes by the index.
    let listings = format!(
        "insert into listing (price, {OTHER_COLUMNS}) select id, {OTHER_VALUES} from generate_series(1, 5000) as id"
    );
    run(service.superuser(), &format!("{listings}; analyze listing")).await;
    run(service.superuser(), "begin; lock table listing").await;
    let mut first = service.connect();
    first.request("GET", "/listings/1", "", "");
    service.db().wait_for(WAITING, "1").await;
    (service, first, clients)
}

#[tokio::test]
async fn a_worker_with_nothing_to_do_sleeps() {
    let (service, mut first, _clients) = held_up(&[]).await;
    let assert_asleep = || {
        let before = service.processor_time();
        thread::sleep(Duration::from_secs(1));
        let used = service.processor_time().saturating_sub(before);
        assert!(used < Duration::from_millis(300), "{used:?} in a second");
    };
    // While PostgreSQL takes its time, and while nobody asks for anything.
    assert_asleep();
    run(service.superuser(), "commit").await;
    first.receive("GET", "/listings/1");
    assert_asleep();
}

#[tokio::test]
async fn a_row_that_cannot_be_read_fails_only_those_who_ask_for_it() {
    let (service, mut first, mut clients) = held_up(&[]).await;
    let breaks = "alter table listing enable row level security; \
        create policy breaks on listing using (1 / (id - 3) is not null)";
    for (id, client) in (1..).zip(&mut clients) {
        client.write(format!("GET /listings/{id} HTTP/1.1\r\nhost: test\r\n\r\n").as_bytes());
    }
    // The one worker answers this behind all that was sent before.
    service.get("/listings/none");
    run(service.superuser(), &format!("{breaks}; commit")).await;
    assert_eq!(first.receive("GET", "/listings/1").status, 200);
    let statuses: Vec<_> = clients
        .iter_mut()
        .map(|client| client.receive("GET", "/listings/1").status)
        .collect();
    assert_eq!(statuses, [200, 200, 500, 200]);
}

#[tokio::test]
async fn more_reads_than_may_wait_get_503_at_once() {
    let (service, mut first, mut clients) = held_up(&[("QUEUE_SIZE", "3")]).await;
    let mut refused = clients.pop().expect("a client");
    for client in &mut clients {
        client.request("GET", "/listings/2", "", "");
    }
    let response = refused.send("GET", "/listings/2", "", "");
    assert_eq!(
        response.error(),
        (
            503,
            "too many requests at the moment, try again later".to_owned()
        )
    );
    assert_eq!(response.header("retry-after"), Some("1"));
    // Prices have a queue of their own.
    assert_eq!(
        refused.send("GET", "/listings/1/prices", "", "").status,
        200
    );
    run(service.superuser(), "commit").await;
    for client in clients.iter_mut().chain([&mut first]) {
        assert_eq!(client.receive("GET", "/listings/2").status, 200);
    }
}

#[tokio::test]
async fn those_who_hang_up_leave_their_place_to_others() {
    let (service, first, mut clients) = held_up(&[("QUEUE_SIZE", "3")]).await;
    let mut patient = clients.pop().expect("a client");
    for client in &mut clients {
        client.request("GET", "/listings/2", "", "");
    }
    service.get("/listings/none");
    // All who wait, then also the one whose read is under way.
    drop(clients);
    service.get("/listings/none");
    patient.request("GET", "/listings/3", "", "");
    service.get("/listings/none");
    drop(first);
    service.get("/listings/none");
    run(service.superuser(), "commit").await;
    assert_eq!(patient.receive("GET", "/listings/3").json()["id"], 3);
}

#[tokio::test]
async fn a_long_history_is_what_a_short_one_would_be() {
    let service = Service::start().await;
    fill(service.db()).await;
    let path = "/listings/204/prices";
    let whole = service.get(path);
    let etag = whole.header("etag").expect("an ETag").to_owned();
    let last = value(
        service.superuser(),
        "select max(id) from listing_price_log where listing_id = 204",
    )
    .await;
    assert_eq!(etag, format!("\"2501-{last}\""));
    let known = format!("if-none-match: {etag}\r\n");
    assert_eq!(service.send("GET", path, &known, "").status, 304);
    let head = service.send("HEAD", path, "", "");
    assert_eq!((head.status, head.header("etag")), (200, Some(&*etag)));
    run(
        service.superuser(),
        "update listing set price = 0 where id = 204",
    )
    .await;
    let longer = service.send("GET", path, &known, "");
    assert_eq!(longer.json().as_array().map(Vec::len), Some(2502));
    // With a condition, and with one that holds for none.
    let day = service.get(&format!("{path}?from=2000-01-01T00:00:00Z"));
    assert_eq!(day.json(), longer.json());
    assert_eq!(
        service
            .get(&format!("{path}?to=2000-01-01T00:00:00Z"))
            .text(),
        "[]"
    );
}

#[tokio::test]
async fn reads_that_wait_leave_connections_over_for_writes() {
    let service = one_worker(&[("POOL_SIZE", "4"), ("POOL_WAIT_MS", "3000")]).await;
    service.post(LOFT).id();
    let lock = "begin; lock table listing_price_log";
    run(service.superuser(), lock).await;
    let mut clients: Vec<_> = (0..4).map(|_| service.connect()).collect();
    for client in &mut clients {
        client.request("GET", "/listings/1/prices?limit=1", "", "");
    }
    let waiting = || service.admin("/metrics").text().to_owned();
    within(Duration::from_secs(5), "three who wait", || {
        waiting().contains(r#"database_pool_waiting{part="primary"} 3"#)
    });
    assert_eq!(service.patch("/listings/1", "{}").status, 200);
    // They wait no longer than for a connection.
    for mut client in clients.drain(1..) {
        assert_eq!(client.receive("GET", "/listings/1/prices").status, 503);
    }
    run(service.superuser(), "commit").await;
    for client in &mut clients {
        assert_eq!(client.receive("GET", "/listings/1/prices").status, 200);
    }
}

async fn one_worker(settings: &[(&str, &str)]) -> Service {
    let settings = [&[("WORKERS", "1")], settings].concat();
    Service::start_with(&settings).await
}

/// Sends requests in such a way that the worker finds them all at once: the first two then go each by itself, the others
/// together.
fn send_together(service: &Service, requests: &[String]) -> Vec<Connection> {
    let mut clients: Vec<_> = requests.iter().map(|_| service.connect()).collect();
    for client in &mut clients {
        // So the worker knows them.
        client.send("GET", "/listings/none", "", "");
    }
    service.signal("-STOP");
    within(TWO_SECONDS, "a stop", || service.is_stopped());
    for (client, request) in clients.iter_mut().zip(requests) {
        client.write(request.as_bytes());
    }
    clients
}

fn with_body(method: &str, path: &str, headers: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "{method} {path} HTTP/1.1\r\nhost: test\r\n{headers}content-length: {length}\r\n\r\n{body}"
    )
}

fn insert(name: &str, headers: &str) -> String {
    with_body("POST", "/listings", headers, &LOFT.replace("Loft", name))
}

/// Clients whose inserts, of listings by these names, the worker is to find all at once when it is told to go on.
fn inserts_together(service: &Service, names: &[&str]) -> Vec<Connection> {
    let inserts: Vec<_> = names.iter().map(|name| insert(name, JSON)).collect();
    send_together(service, &inserts)
}

/// Makes an insert of this name take so long.
async fn slow(service: &Service, name: &str, seconds: f32) {
    let slow = format!(
        "create function wait_{name}() returns trigger language plpgsql as \
            'begin perform pg_sleep({seconds}); return new; end'; \
        create trigger wait_{name} before insert on listing for each row when (new.name = '{name}') execute function wait_{name}()"
    );
    run(service.superuser(), &slow).await;
}

const COMMITS: &str = "select count(distinct xact_id) from listing_price_log";

const ALL_NAMES: &str = "select string_agg(name, '' order by name) from listing";

const SLEEPING: &str = "select count(*) from pg_stat_activity where wait_event = 'PgSleep' and datname = current_database()";

const NAMES: [&str; 8] = ["a", "b", "c", "d", "e", "f", "g", "h"];

#[tokio::test]
async fn inserts_that_arrive_together_share_a_commit_and_each_gets_its_own_listing() {
    let service = one_worker(&[]).await;
    let mut clients = inserts_together(&service, &NAMES);
    service.signal("-CONT");
    let mut ids = Vec::new();
    for (client, name) in clients.iter_mut().zip(NAMES) {
        let response = client.receive("POST", "/listings");
        assert_eq!(response.json()["name"], name);
        let path = format!("/listings/{}", response.id());
        assert_eq!(response.header("location"), Some(&*path));
        assert_eq!(service.get(&path).json(), response.json());
        ids.push(response.id());
    }
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), NAMES.len());
    assert_eq!(value(service.superuser(), COMMITS).await, "3");
    assert_no_problem(service.superuser()).await;
}

/// As many listings as there are names, all with the same price, by one statement.
async fn listings(service: &Service) {
    let listings = format!(
        "insert into listing (price, {OTHER_COLUMNS}) select 1, {OTHER_VALUES} from generate_series(1, {})",
        NAMES.len()
    );
    run(service.superuser(), &listings).await;
}

fn reprice(id: i64, price: i64, headers: &str) -> String {
    let body = format!(r#"{{"latest_price_eur": {price}}}"#);
    with_body("PATCH", &format!("/listings/{id}"), headers, &body)
}

#[tokio::test]
async fn updates_that_arrive_together_share_a_commit_and_each_gets_its_own_answer() {
    let service = one_worker(&[]).await;
    listings(&service).await;
    let seen_before = format!("{JSON}if-match: \"1\"\r\n");
    let requests = [
        reprice(1, 10, JSON),
        reprice(2, 20, JSON),
        // In no order.
        reprice(8, 80, JSON),
        reprice(3, 30, JSON),
        insert("new", JSON),
        reprice(4, 40, &seen_before),
        // The listing that is new, which is not there yet.
        reprice(9, 90, JSON),
        reprice(5, 50, JSON),
        // Has its turn after the other.
        reprice(5, 51, JSON),
    ];
    let mut clients = send_together(&service, &requests);
    service.signal("-CONT");
    let responses: Vec<_> = clients
        .iter_mut()
        .zip(&requests)
        .map(|(client, request)| {
            if request.starts_with("POST") {
                client.receive("POST", "/listings")
            } else {
                client.receive("PATCH", "/listings/1")
            }
        })
        .collect();
    let statuses: Vec<_> = responses.iter().map(|response| response.status).collect();
    assert_eq!(statuses, [200, 200, 200, 200, 201, 412, 404, 200, 200]);
    for (response, (id, price)) in responses.iter().zip([(1, 10), (2, 20), (8, 80), (3, 30)]) {
        assert_eq!(response.json()["id"], id);
        assert_eq!(response.json()["latest_price_eur"], price);
        let now = service.get(&format!("/listings/{id}"));
        assert_eq!(
            (now.json(), now.header("etag")),
            (response.json(), response.header("etag"))
        );
    }
    assert_ne!(responses[7].header("etag"), responses[8].header("etag"));
    let logged = "select string_agg(listing_id || ':' || new_price, ' ' order by listing_id, id) from listing_price_log \
        where old_price is not null or listing_id > 8";
    let expected = "1:10.00 2:20.00 3:30.00 5:50.00 5:51.00 8:80.00 9:480000.00";
    assert_eq!(value(service.superuser(), logged).await, expected);
    // Each says when it was written, not when the first of its transaction was.
    let moments = "select count(distinct updated_date) from listing where price <> 1";
    assert_eq!(value(service.superuser(), moments).await, "6");
    // The listings' own, those of 1 and of 2, that of the others, and that of the last.
    assert_eq!(value(service.superuser(), COMMITS).await, "5");
    assert_no_problem(service.superuser()).await;
}

#[tokio::test]
async fn an_update_that_waits_for_a_lock_holds_up_no_other() {
    let service = one_worker(&[("STATEMENT_TIMEOUT_MS", "15000")]).await;
    listings(&service).await;
    let lock = "begin; update listing set price = 2 where id in (1, 2, 4, 8)";
    run(service.superuser(), lock).await;
    let mut waiting = Vec::new();
    // Two that go by themselves wait, then one of those that go together, twice: more than may be under way at a time.
    for ids in [1..=4, 5..=8, 3..=3] {
        let requests: Vec<_> = ids.clone().map(|id| reprice(id, 10 * id, JSON)).collect();
        let clients = send_together(&service, &requests);
        service.signal("-CONT");
        for (id, mut client) in ids.zip(clients) {
            if [1, 2, 4, 8].contains(&id) {
                waiting.push(client);
            } else {
                let response = client.receive("PATCH", "/listings/1");
                assert_eq!(response.json()["latest_price_eur"], 10 * id);
            }
        }
    }
    service.db().wait_for(WAITING, "4").await;
    run(service.superuser(), "commit").await;
    for client in &mut waiting {
        assert_eq!(client.receive("PATCH", "/listings/1").status, 200);
    }
    assert_no_problem(service.superuser()).await;
}

#[tokio::test]
async fn an_insert_that_is_refused_takes_no_other_along() {
    // Rules of the DBA's own, of which one is looked at only in the commit.
    let at_once = "alter table listing add constraint no_f check (name <> 'f')";
    let late = "create function no_f() returns trigger language plpgsql as 'begin raise ''no_f''; end'; \
        create constraint trigger no_f after insert on listing deferrable initially deferred \
        for each row when (new.name = 'f') execute function no_f()";
    for rule in [at_once, late] {
        let service = one_worker(&[]).await;
        run(service.superuser(), rule).await;
        let mut clients = inserts_together(&service, &NAMES);
        service.signal("-CONT");
        for (client, name) in clients.iter_mut().zip(NAMES) {
            let status = client.receive("POST", "/listings").status;
            assert_eq!(status, if name == "f" { 500 } else { 201 }, "{name}");
        }
        assert_eq!(value(service.superuser(), ALL_NAMES).await, "abcdegh");
        assert_eq!(service.logged("no_f").len(), 1);
    }
}

#[tokio::test]
async fn inserts_that_get_into_each_others_way_are_all_done() {
    let service = one_worker(&[]).await;
    // A rule of the DBA's own which says so, once.
    let rule = "create sequence tries; \
        create function deadlock() returns trigger language plpgsql as 'begin \
            if nextval(''tries'') = 1 then raise ''deadlock'' using errcode = ''deadlock_detected''; end if; \
            return new; end'; \
        grant usage on sequence tries to public; \
        create trigger deadlock before insert on listing for each row when (new.name = 'f') execute function deadlock()";
    run(service.superuser(), rule).await;
    let mut clients = inserts_together(&service, &NAMES);
    service.signal("-CONT");
    for client in &mut clients {
        client.receive("POST", "/listings").id();
    }
    assert_eq!(value(service.superuser(), ALL_NAMES).await, "abcdefgh");
}

#[tokio::test]
async fn an_insert_whose_client_hangs_up_in_time_is_not_done() {
    let service = one_worker(&[]).await;
    let mut clients = inserts_together(&service, &NAMES);
    drop(clients.remove(5));
    service.signal("-CONT");
    for client in &mut clients {
        client.receive("POST", "/listings").id();
    }
    assert_eq!(value(service.superuser(), ALL_NAMES).await, "abcdegh");
}

#[tokio::test]
async fn writes_of_many_keys_are_each_logged_under_their_own() {
    let service = one_worker(&[("AUTH", "keys")]).await;
    let mut headers = Vec::new();
    for owner in ["left", "right"] {
        headers.push(bearer(&create_key(service.superuser(), owner).await));
    }
    headers.push(bearer(&create_administrator_key(service.superuser()).await));
    let writes = NAMES.iter().zip(headers.iter().cycle());
    let inserts: Vec<_> = writes
        .map(|(name, headers)| insert(name, headers))
        .collect();
    let mut clients = send_together(&service, &inserts);
    service.signal("-CONT");
    let mut reprices = Vec::new();
    for (client, headers) in clients.iter_mut().zip(headers.iter().cycle()) {
        let id = client.receive("POST", "/listings").id();
        reprices.push(reprice(id, 7, headers));
    }
    let mut clients = send_together(&service, &reprices);
    service.signal("-CONT");
    for client in &mut clients {
        assert_eq!(client.receive("PATCH", "/listings/1").status, 200);
    }
    let expected = "a left left, b right right, c  admin:3, d left left, e right right, f  admin:3, g left left, h right right";
    for of_these in ["old_price is null", "old_price is not null"] {
        let logged = format!(
            "select string_agg(name || ' ' || coalesce(owner, '') || ' ' || changed_by, ', ' order by name) \
            from listing join listing_price_log on listing_id = listing.id where {of_these}"
        );
        assert_eq!(value(service.superuser(), &logged).await, expected);
        // How many depends on whether the first is done before the answer about the other keys is there.
        let together =
            format!("select count(distinct xact_id) < 8 from listing_price_log where {of_these}");
        assert_eq!(value(service.superuser(), &together).await, "t");
    }
    assert_no_problem(service.superuser()).await;
}

#[tokio::test]
async fn inserts_that_wait_too_long_for_their_turn_get_503_and_are_not_done() {
    let service = one_worker(&[("POOL_WAIT_MS", "10")]).await;
    slow(&service, "a", 0.5).await;
    slow(&service, "b", 0.5).await;
    let mut clients = inserts_together(&service, &NAMES[..4]);
    service.signal("-CONT");
    let statuses: Vec<_> = clients
        .iter_mut()
        .map(|client| client.receive("POST", "/listings").status)
        .collect();
    assert_eq!(statuses, [201, 201, 503, 503]);
    // Behind whatever was still to be done.
    service.post(LOFT).id();
    assert_eq!(value(service.superuser(), ALL_NAMES).await, "Loftab");
}

#[tokio::test]
async fn inserts_under_way_may_take_longer_than_anybody_waits_for_a_turn() {
    let service = one_worker(&[("POOL_WAIT_MS", "500"), ("STATEMENT_TIMEOUT_MS", "15000")]).await;
    slow(&service, "f", 1.2).await;
    let mut clients = inserts_together(&service, &NAMES);
    service.signal("-CONT");
    for client in &mut clients {
        client.receive("POST", "/listings").id();
    }
    assert_eq!(value(service.superuser(), COMMITS).await, "3");
}

#[tokio::test]
async fn an_insert_that_takes_too_long_gets_504_and_holds_up_no_other() {
    let service = one_worker(&[("STATEMENT_TIMEOUT_MS", "6000")]).await;
    slow(&service, "f", 30.0).await;
    let mut clients = inserts_together(&service, &NAMES);
    service.signal("-CONT");
    let begun = Instant::now();
    let mut too_long = clients.remove(5);
    for client in &mut clients {
        client.receive("POST", "/listings").id();
    }
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert_eq!(too_long.receive("POST", "/listings").status, 504);
    assert_eq!(value(service.superuser(), ALL_NAMES).await, "abcdegh");
}

#[tokio::test]
async fn an_insert_whose_client_has_hung_up_is_not_tried_again() {
    let service = one_worker(&[("STATEMENT_TIMEOUT_MS", "15000")]).await;
    let rule = "alter table listing add constraint no_h check (name <> 'h')";
    run(service.superuser(), rule).await;
    slow(&service, "f", 1.5).await;
    let mut clients = inserts_together(&service, &NAMES);
    service.signal("-CONT");
    service.db().wait_for(SLEEPING, "1").await;
    drop(clients.remove(3));
    let statuses: Vec<_> = clients
        .iter_mut()
        .map(|client| client.receive("POST", "/listings").status)
        .collect();
    assert_eq!(statuses, [201, 201, 201, 201, 201, 201, 500]);
    assert_eq!(value(service.superuser(), ALL_NAMES).await, "abcefg");
}

#[tokio::test]
async fn inserts_that_go_together_may_be_long() {
    let service = one_worker(&[]).await;
    // Around the size of the pieces in which PostgreSQL sends.
    for first in (15_900..16_320).step_by(14) {
        let of_length = |length| LOFT.replace("Under the roof", &"x".repeat(length));
        let inserts: Vec<_> = (first - 2..first + 14)
            .map(|length| with_body("POST", "/listings", JSON, &of_length(length)))
            .collect();
        let mut clients = send_together(&service, &inserts);
        service.signal("-CONT");
        for client in &mut clients {
            client.receive("POST", "/listings").id();
        }
    }
}

#[tokio::test]
async fn inserts_whose_transaction_did_not_begin_are_done_on_another_connection() {
    let cluster = Cluster::migrated();
    let link = Link::to(&cluster);
    let settings = [("WORKERS", "1"), ("POOL_WAIT_MS", "20000")];
    let service = Service::start_at(&through(&cluster, &[&link.address]), &settings);
    let superuser = cluster.superuser().await;
    let all_of_three_connections_are_in_use = || {
        let metrics = service.admin("/metrics");
        let gauges = [
            "size{part=\"primary\"} 3\n",
            "available{part=\"primary\"} 0\n",
        ];
        gauges.iter().all(|gauge| metrics.text().contains(gauge))
    };

    run(&superuser, "begin; lock table listing").await;
    let mut clients = inserts_together(&service, &NAMES[..3]);
    service.signal("-CONT");
    within(TWO_SECONDS, "a wait", all_of_three_connections_are_in_use);
    run(&superuser, "commit").await;
    for client in &mut clients {
        client.receive("POST", "/listings").id();
    }

    let mut clients = inserts_together(&service, &NAMES);
    link.cut(true);
    service.signal("-CONT");
    within(TWO_SECONDS, "a wait", all_of_three_connections_are_in_use);
    link.close_connections();
    link.cut(false);
    let statuses: Vec<_> = clients
        .iter_mut()
        .map(|client| client.receive("POST", "/listings").status)
        .collect();
    // The first two were sent, so nobody here knows whether they have been done.
    assert_eq!(statuses, [503, 503, 201, 201, 201, 201, 201, 201]);
}

#[tokio::test]
async fn inserts_under_way_together_outlive_their_connection() {
    let service = one_worker(&[("STATEMENT_TIMEOUT_MS", "15000")]).await;
    slow(&service, "f", 1.0).await;
    let mut clients = inserts_together(&service, &NAMES);
    service.signal("-CONT");
    service.db().wait_for(SLEEPING, "1").await;
    let end = "select pg_terminate_backend(pid) from pg_stat_activity \
        where wait_event = 'PgSleep' and datname = current_database()";
    assert_eq!(value(service.superuser(), end).await, "t");
    // PostgreSQL said that it has ended it, so it is done again.
    for client in &mut clients {
        client.receive("POST", "/listings").id();
    }
    assert_eq!(value(service.superuser(), ALL_NAMES).await, "abcdefgh");
    assert_eq!(value(service.superuser(), COMMITS).await, "3");
    assert_no_problem(service.superuser()).await;
}
