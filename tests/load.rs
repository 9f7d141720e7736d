//! Requests that travel together, reads by id and inserts: every client gets what is its own.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::Value;
use tokio::runtime::Handle;

use crate::harness::{Database, OTHER_COLUMNS, OTHER_VALUES, assert_no_problem, rows, run, value};
use crate::keys::bearer;
use crate::outage::within;
use crate::owners::{administrators_key, key_of};
use crate::service::{Connection, JSON, LOFT, Service};
use crate::start::{WAITING, wait_for};

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
    fill(&service.db).await;
    let expected = expected(&service.db).await;
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
                            gone.write(
                                format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n").as_bytes(),
                            );
                            gone
                        });
                        connection
                            .write(format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n").as_bytes());
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
                assert!(
                    !runtime
                        .block_on(rows(&service.db.superuser, cut))
                        .is_empty()
                );
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
    let service = Service::start_with(Database::migrated().await, &settings).await;
    let mut clients: Vec<_> = (0..4).map(|_| service.connect()).collect();
    for client in &mut clients {
        assert_eq!(client.send("GET", "/listings/1", "", "").status, 404);
    }
    // So many that a read goes by the index.
    let listings = format!(
        "insert into listing (price, {OTHER_COLUMNS}) select id, {OTHER_VALUES} from generate_series(1, 5000) as id"
    );
    run(
        &service.db.superuser,
        &format!("{listings}; analyze listing"),
    )
    .await;
    run(&service.db.superuser, "begin; lock table listing").await;
    let mut first = service.connect();
    first.write(b"GET /listings/1 HTTP/1.1\r\nhost: test\r\n\r\n");
    wait_for(&service, WAITING, "1").await;
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
    run(&service.db.superuser, "commit").await;
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
    run(&service.db.superuser, &format!("{breaks}; commit")).await;
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
        client.write(b"GET /listings/2 HTTP/1.1\r\nhost: test\r\n\r\n");
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
    run(&service.db.superuser, "commit").await;
    for client in clients.iter_mut().chain([&mut first]) {
        assert_eq!(client.receive("GET", "/listings/2").status, 200);
    }
}

#[tokio::test]
async fn those_who_hang_up_leave_their_place_to_others() {
    let (service, first, mut clients) = held_up(&[("QUEUE_SIZE", "3")]).await;
    let mut patient = clients.pop().expect("a client");
    for client in &mut clients {
        client.write(b"GET /listings/2 HTTP/1.1\r\nhost: test\r\n\r\n");
    }
    service.get("/listings/none");
    // All who wait, then also the one whose read is under way.
    drop(clients);
    service.get("/listings/none");
    patient.write(b"GET /listings/3 HTTP/1.1\r\nhost: test\r\n\r\n");
    service.get("/listings/none");
    drop(first);
    service.get("/listings/none");
    run(&service.db.superuser, "commit").await;
    assert_eq!(patient.receive("GET", "/listings/3").json()["id"], 3);
}

#[tokio::test]
async fn a_long_history_is_what_a_short_one_would_be() {
    let service = Service::start().await;
    fill(&service.db).await;
    let path = "/listings/204/prices";
    let whole = service.get(path);
    let etag = whole.header("etag").expect("an ETag").to_owned();
    let last = value(
        &service.db.superuser,
        "select max(id) from listing_price_log where listing_id = 204",
    )
    .await;
    assert_eq!(etag, format!("\"2501-{last}\""));
    let known = format!("if-none-match: {etag}\r\n");
    assert_eq!(service.send("GET", path, &known, "").status, 304);
    let head = service.send("HEAD", path, "", "");
    assert_eq!((head.status, head.header("etag")), (200, Some(&*etag)));
    run(
        &service.db.superuser,
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
    run(&service.db.superuser, lock).await;
    let mut clients: Vec<_> = (0..4).map(|_| service.connect()).collect();
    for client in &mut clients {
        client.write(b"GET /listings/1/prices?limit=1 HTTP/1.1\r\nhost: test\r\n\r\n");
    }
    let waiting = || service.admin("/metrics").text().to_owned();
    within(Duration::from_secs(5), "three who wait", || {
        waiting().contains(r#"database_pool_waiting{part="primary"} 3"#)
    });
    assert_eq!(service.send("PATCH", "/listings/1", JSON, "{}").status, 200);
    // They wait no longer than for a connection.
    for mut client in clients.drain(1..) {
        assert_eq!(client.receive("GET", "/listings/1/prices").status, 503);
    }
    run(&service.db.superuser, "commit").await;
    for client in &mut clients {
        assert_eq!(client.receive("GET", "/listings/1/prices").status, 200);
    }
}

/// A service with one worker and clients whose inserts, of listings by these names, all wait for the superuser's `commit`: the
/// first two each for itself, the others for their turn.
async fn inserts_held_up(service: &Service, headers: &[String], names: &[&str]) -> Vec<Connection> {
    run(&service.db.superuser, "begin; lock table listing").await;
    let mut clients = Vec::new();
    for (name, headers) in names.iter().zip(headers.iter().cycle()) {
        let body = LOFT.replace("Loft", name);
        let mut client = service.connect();
        let head = format!("POST /listings HTTP/1.1\r\nhost: test\r\n{headers}");
        let length = body.len();
        client.write(format!("{head}content-length: {length}\r\n\r\n{body}").as_bytes());
        clients.push(client);
        let waiting = clients.len().min(2);
        wait_for(service, WAITING, &waiting.to_string()).await;
        // The one worker looks this key up behind all that was sent before, and then answers.
        service.send("DELETE", "/listings/none", headers, "");
    }
    clients
}

async fn one_worker(settings: &[(&str, &str)]) -> Service {
    // Nobody shall be refused while the test sends the others.
    let patient = [
        ("WORKERS", "1"),
        ("POOL_WAIT_MS", "15000"),
        ("STATEMENT_TIMEOUT_MS", "15000"),
    ];
    let settings = [&patient, settings].concat();
    Service::start_with(Database::migrated().await, &settings).await
}

const COMMITS: &str = "select count(distinct xact_id) from listing_price_log";

const ALL_NAMES: &str = "select string_agg(name, '' order by name) from listing";

const UNLOCK: &str = "select pg_advisory_unlock(1)";

const NAMES: [&str; 8] = ["a", "b", "c", "d", "e", "f", "g", "h"];

#[tokio::test]
async fn inserts_that_arrive_together_share_a_commit_and_each_gets_its_own_listing() {
    let service = one_worker(&[]).await;
    let mut clients = inserts_held_up(&service, &[JSON.to_owned()], &NAMES).await;
    run(&service.db.superuser, "commit").await;
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
    assert_eq!(value(&service.db.superuser, COMMITS).await, "3");
    assert_no_problem(&service.db.superuser).await;
}

#[tokio::test]
async fn an_insert_that_is_refused_takes_no_other_along() {
    let service = one_worker(&[]).await;
    // A rule of the DBA's own.
    let rule = "alter table listing add constraint no_f check (name <> 'f')";
    run(&service.db.superuser, rule).await;
    let mut clients = inserts_held_up(&service, &[JSON.to_owned()], &NAMES).await;
    run(&service.db.superuser, "commit").await;
    for (client, name) in clients.iter_mut().zip(NAMES) {
        let status = client.receive("POST", "/listings").status;
        assert_eq!(status, if name == "f" { 500 } else { 201 }, "{name}");
    }
    assert_eq!(value(&service.db.superuser, ALL_NAMES).await, "abcdegh");
    assert_eq!(service.logged("no_f").len(), 1);
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
    run(&service.db.superuser, rule).await;
    let mut clients = inserts_held_up(&service, &[JSON.to_owned()], &NAMES).await;
    run(&service.db.superuser, "commit").await;
    for client in &mut clients {
        client.receive("POST", "/listings").id();
    }
    assert_eq!(value(&service.db.superuser, ALL_NAMES).await, "abcdefgh");
}

#[tokio::test]
async fn an_insert_whose_client_hangs_up_in_time_is_not_done() {
    let service = one_worker(&[]).await;
    let mut clients = inserts_held_up(&service, &[JSON.to_owned()], &NAMES).await;
    drop(clients.remove(5));
    service.get("/listings/none");
    run(&service.db.superuser, "commit").await;
    for client in &mut clients {
        client.receive("POST", "/listings").id();
    }
    assert_eq!(value(&service.db.superuser, ALL_NAMES).await, "abcdegh");
}

#[tokio::test]
async fn inserts_of_many_keys_are_each_logged_under_their_own() {
    let service = one_worker(&[("AUTH", "keys")]).await;
    let mut headers = Vec::new();
    for owner in ["left", "right"] {
        headers.push(bearer(&key_of(&service.db.superuser, owner).await));
    }
    headers.push(bearer(&administrators_key(&service.db.superuser).await));
    let mut clients = inserts_held_up(&service, &headers, &NAMES).await;
    run(&service.db.superuser, "commit").await;
    for client in &mut clients {
        client.receive("POST", "/listings").id();
    }
    let logged = "select string_agg(name || ' ' || coalesce(owner, '') || ' ' || changed_by, ', ' order by name) \
        from listing join listing_price_log on listing_id = listing.id";
    let expected = "a left left, b right right, c  admin:3, d left left, e right right, f  admin:3, g left left, h right right";
    assert_eq!(value(&service.db.superuser, logged).await, expected);
    assert_eq!(value(&service.db.superuser, COMMITS).await, "3");
    assert_no_problem(&service.db.superuser).await;
}

/// Clients whose inserts go together and wait, at the one of this name, until the superuser unlocks 1. Those of `a` and `b` went
/// before.
async fn inserts_under_way(service: &Service, stop_at: &str) -> Vec<Connection> {
    let mut clients = inserts_held_up(service, &[JSON.to_owned()], &NAMES).await;
    let stop = format!(
        "create function wait() returns trigger language plpgsql as \
            'begin perform pg_advisory_xact_lock_shared(1); return new; end'; \
        create trigger wait before insert on listing for each row when (new.name = '{stop_at}') execute function wait(); \
        select pg_advisory_lock(1); commit"
    );
    run(&service.db.superuser, &stop).await;
    for mut client in clients.drain(..2) {
        client.receive("POST", "/listings").id();
    }
    wait_for(service, WAITING, "1").await;
    clients
}

#[tokio::test]
async fn inserts_that_wait_too_long_for_their_turn_get_503_and_are_not_done() {
    let service = one_worker(&[("POOL_WAIT_MS", "500")]).await;
    let mut clients = inserts_held_up(&service, &[JSON.to_owned()], &NAMES[..4]).await;
    for client in clients.iter_mut().skip(2) {
        assert_eq!(client.receive("POST", "/listings").status, 503);
    }
    run(&service.db.superuser, "commit").await;
    for client in clients.iter_mut().take(2) {
        client.receive("POST", "/listings").id();
    }
    // Behind whatever was still to be done.
    service.post(LOFT).id();
    assert_eq!(value(&service.db.superuser, ALL_NAMES).await, "Loftab");
}

#[tokio::test]
async fn inserts_under_way_may_take_longer_than_anybody_waits_for_a_turn() {
    let service = one_worker(&[("POOL_WAIT_MS", "3000")]).await;
    let mut clients = inserts_under_way(&service, "c").await;
    thread::sleep(Duration::from_millis(3100));
    run(&service.db.superuser, UNLOCK).await;
    for client in &mut clients {
        client.receive("POST", "/listings").id();
    }
    assert_eq!(value(&service.db.superuser, COMMITS).await, "3");
}

#[tokio::test]
async fn an_insert_that_takes_too_long_gets_504_and_takes_no_other_along() {
    let service = one_worker(&[("STATEMENT_TIMEOUT_MS", "3000")]).await;
    let mut clients = inserts_under_way(&service, "f").await;
    for (client, name) in clients.iter_mut().zip(&NAMES[2..]) {
        let status = client.receive("POST", "/listings").status;
        assert_eq!(status, if *name == "f" { 504 } else { 201 }, "{name}");
    }
    assert_eq!(value(&service.db.superuser, ALL_NAMES).await, "abcdegh");
}

#[tokio::test]
async fn an_insert_whose_client_has_hung_up_is_not_tried_again() {
    let service = one_worker(&[]).await;
    let rule = "alter table listing add constraint no_h check (name <> 'h')";
    run(&service.db.superuser, rule).await;
    let mut clients = inserts_under_way(&service, "f").await;
    drop(clients.remove(1));
    service.get("/listings/none");
    run(&service.db.superuser, UNLOCK).await;
    let statuses: Vec<_> = clients
        .iter_mut()
        .map(|client| client.receive("POST", "/listings").status)
        .collect();
    assert_eq!(statuses, [201, 201, 201, 201, 500]);
    assert_eq!(value(&service.db.superuser, ALL_NAMES).await, "abcefg");
}

#[tokio::test]
async fn inserts_that_go_together_may_be_long() {
    let service = one_worker(&[]).await;
    // Around the size of the pieces in which PostgreSQL sends.
    for first in (15_900..16_320).step_by(14) {
        let mut clients = inserts_held_up(&service, &[JSON.to_owned()], &["a"; 2]).await;
        for length in first..first + 14 {
            let body = LOFT.replace("Under the roof", &"x".repeat(length));
            let length = body.len();
            let mut client = service.connect();
            let head = format!("POST /listings HTTP/1.1\r\nhost: test\r\n{JSON}");
            client.write(format!("{head}content-length: {length}\r\n\r\n{body}").as_bytes());
            clients.push(client);
        }
        service.get("/listings/none");
        run(&service.db.superuser, "commit").await;
        for client in &mut clients {
            client.receive("POST", "/listings").id();
        }
    }
}

#[tokio::test]
async fn inserts_under_way_together_outlive_their_connection() {
    let service = one_worker(&[]).await;
    let mut clients = inserts_under_way(&service, "f").await;
    let end = "select pg_terminate_backend(pid) from pg_stat_activity \
        where wait_event_type = 'Lock' and datname = current_database()";
    assert_eq!(value(&service.db.superuser, end).await, "t");
    // PostgreSQL said that it has ended it, so it is done again.
    run(&service.db.superuser, UNLOCK).await;
    for client in &mut clients {
        client.receive("POST", "/listings").id();
    }
    assert_eq!(value(&service.db.superuser, ALL_NAMES).await, "abcdefgh");
    assert_eq!(value(&service.db.superuser, COMMITS).await, "3");
    assert_no_problem(&service.db.superuser).await;
}
