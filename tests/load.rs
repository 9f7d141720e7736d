//! Many requests at once: batched reads, and writes that meet a busy or failing database.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::Value;
use tokio::runtime::Handle;

use crate::support::{
    Cluster, Connection, Database, JSON, LOFT, Link, OTHER_COLUMNS, OTHER_VALUES, Service,
    TWO_SECONDS, WAITING, assert_no_problem, bearer, create_administrator_key, create_key, rows,
    run, through, value, within,
};

/// Inserts listings 1 to 200 with up to 8 prices each. Listings 201 and 202 have 100 and 101 prices: a longer history is not
/// read in a batch. Listings 203 and 204 have 1000 and 2501: the service reads 1000 prices at a time.
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

/// The expected body for each path, built by PostgreSQL.
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
async fn each_of_many_concurrent_reads_gets_its_own_listing_or_history() {
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
                        // Spread over all ids, the same in every run. Listings 205 to 208 do not exist.
                        let id = (client * 7919 + turn * 104_729) % 208 + 1;
                        let path = match turn % 8 {
                            0 => "/listings/7/prices".to_owned(),
                            1 => "/listings/7".to_owned(),
                            2 | 3 => format!("/listings/{id}"),
                            4 => format!("/listings/{}/prices", 201 + (client + turn / 8) % 4),
                            _ => format!("/listings/{id}/prices"),
                        };
                        // Another client sends the same request and hangs up while it is in flight.
                        let other = (turn % 8 == 5).then(|| {
                            let mut other = service.connect();
                            other.request("GET", &path, "", "");
                            other
                        });
                        connection.request("GET", &path, "", "");
                        if other.is_some() {
                            thread::sleep(Duration::from_micros(turn as u64 * 20));
                            drop(other);
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
        // Meanwhile the sessions of the batched reads are terminated three times: each read is retried.
        let cut = "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() \
            and query ~ 'unnest\\(|id = (any\\()?\\$1'";
        let breaker = scope.spawn(|| {
            for _ in 0..3 {
                thread::sleep(Duration::from_secs(1));
                assert!(!runtime.block_on(rows(service.superuser(), cut)).is_empty());
                cuts.fetch_add(1, Ordering::Relaxed);
            }
        });
        for client in clients {
            client.join().expect("a client without a failure");
        }
        breaker
            .join()
            .expect("sessions were terminated three times");
    });
}

/// A service with one worker and a read in flight that waits until the superuser commits. Returns the service, the client of
/// that read and four more clients.
async fn with_a_blocked_read(settings: &[(&str, &str)]) -> (Service, Connection, Vec<Connection>) {
    let settings = [&[("WORKERS", "1")], settings].concat();
    let service = Service::start_with(&settings).await;
    let mut clients: Vec<_> = (0..4).map(|_| service.connect()).collect();
    for client in &mut clients {
        assert_eq!(client.send("GET", "/listings/1", "", "").status, 404);
    }
    // So many that PostgreSQL reads them by the index.
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
async fn an_idle_worker_uses_no_processor_time() {
    let (service, mut first, _clients) = with_a_blocked_read(&[]).await;
    let assert_idle = || {
        let before = service.processor_time();
        thread::sleep(Duration::from_secs(1));
        let used = service.processor_time().saturating_sub(before);
        assert!(used < Duration::from_millis(300), "{used:?} in a second");
    };
    // With one request that waits for PostgreSQL, and without any request.
    assert_idle();
    run(service.superuser(), "commit").await;
    first.receive("GET", "/listings/1");
    assert_idle();
}

#[tokio::test]
async fn a_row_that_cannot_be_read_fails_only_the_requests_for_it() {
    let (service, mut first, mut clients) = with_a_blocked_read(&[]).await;
    let breaks = "alter table listing enable row level security; \
        create policy breaks on listing using (1 / (id - 3) is not null)";
    for (id, client) in (1..).zip(&mut clients) {
        client.request("GET", &format!("/listings/{id}"), "", "");
    }
    // The only worker answers this after it has started the requests before.
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
async fn a_read_gets_503_at_once_if_the_queue_is_full() {
    let (service, mut first, mut clients) = with_a_blocked_read(&[("QUEUE_SIZE", "3")]).await;
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
    // Histories have a queue of their own.
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
async fn a_client_that_hangs_up_leaves_the_queue() {
    let (service, first, mut clients) = with_a_blocked_read(&[("QUEUE_SIZE", "3")]).await;
    let mut patient = clients.pop().expect("a client");
    for client in &mut clients {
        client.request("GET", "/listings/2", "", "");
    }
    service.get("/listings/none");
    // First the clients in the queue hang up, then also the client whose read is in flight.
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
async fn a_long_history_behaves_like_a_short_one() {
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
    // With a filter that every price passes, and with one that no price passes.
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
async fn waiting_reads_leave_connections_for_writes() {
    let service = one_worker(&[("POOL_SIZE", "4"), ("POOL_WAIT_MS", "3000")]).await;
    service.post(LOFT).id();
    let lock = "begin; lock table listing_price_log";
    run(service.superuser(), lock).await;
    let mut clients: Vec<_> = (0..4).map(|_| service.connect()).collect();
    for client in &mut clients {
        client.request("GET", "/listings/1/prices?limit=1", "", "");
    }
    let metrics = || service.admin("/metrics").text().to_owned();
    within(Duration::from_secs(5), "three reads in the queue", || {
        metrics().contains(r#"database_pool_waiting{part="primary"} 3"#)
    });
    assert_eq!(service.patch("/listings/1", "{}").status, 200);
    // They wait as long as for a connection.
    for mut client in clients.drain(1..) {
        assert_eq!(client.receive("GET", "/listings/1/prices").status, 503);
    }
    run(service.superuser(), "commit").await;
    for client in &mut clients {
        assert_eq!(client.receive("GET", "/listings/1/prices").status, 200);
    }
}

async fn one_worker(settings: &[(&str, &str)]) -> Service {
    Service::start_with(&[&[("WORKERS", "1")], settings].concat()).await
}

const NAMES: &str = "select string_agg(name, ' ' order by name) from listing";

fn named(name: &str) -> String {
    LOFT.replace("Loft", name)
}

#[tokio::test]
async fn each_write_has_a_transaction_of_its_own() {
    const CLIENTS: usize = 16;
    const ROUNDS: usize = 10;
    let service = one_worker(&[]).await;
    thread::scope(|scope| {
        let write = || {
            let mut connection = service.connect();
            for price in 1..ROUNDS {
                let id = connection.send("POST", "/listings", JSON, LOFT).id();
                let body = format!(r#"{{"latest_price_eur":{price}}}"#);
                let patched = connection.send("PATCH", &format!("/listings/{id}"), JSON, body);
                assert_eq!(patched.json()["latest_price_eur"], price);
            }
        };
        for _ in 0..CLIENTS {
            scope.spawn(write);
        }
    });
    let writes = CLIENTS * (ROUNDS - 1) * 2;
    let log = "select count(*), count(distinct xact_id) from listing_price_log";
    let expected = format!("{writes}|{writes}");
    assert_eq!(rows(service.superuser(), log).await, [expected]);
    assert_no_problem(service.superuser()).await;
}

#[tokio::test]
async fn concurrent_writes_of_many_keys_are_each_logged_under_their_own_actor() {
    let service = one_worker(&[("AUTH", "keys")]).await;
    let mut writers = Vec::new();
    for owner in ["left", "right"] {
        writers.push((owner, create_key(service.superuser(), owner).await));
    }
    let administrator = create_administrator_key(service.superuser()).await;
    writers.push(("admin:3", administrator));
    thread::scope(|scope| {
        for (actor, key) in writers.iter().cycle().take(12) {
            let service = &service;
            scope.spawn(move || {
                let (mut connection, headers) = (service.connect(), bearer(key));
                for _ in 0..10 {
                    let created = connection.send("POST", "/listings", &headers, named(actor));
                    let path = format!("/listings/{}", created.id());
                    let body = r#"{"latest_price_eur":7}"#;
                    let patched = connection.send("PATCH", &path, &headers, body);
                    assert_eq!(patched.status, 200);
                }
            });
        }
    });
    let log = "select name, coalesce(owner, 'none'), changed_by, count(*) \
        from listing join listing_price_log on listing_id = listing.id group by 1, 2, 3 order by 1";
    let expected = [
        "admin:3|none|admin:3|80",
        "left|left|left|80",
        "right|right|right|80",
    ];
    assert_eq!(rows(service.superuser(), log).await, expected);
    assert_no_problem(service.superuser()).await;
}

#[tokio::test]
async fn an_insert_whose_client_hung_up_before_it_was_sent_is_not_done() {
    let service = one_worker(&[("POOL_SIZE", "1")]).await;
    service.post(&named("first"));
    // An update that waits for a row lock keeps the only connection busy.
    run(service.superuser(), "begin; update listing set price = 1").await;
    let mut update = service.connect();
    update.request("PATCH", "/listings/1", JSON, "{}");
    service.db().wait_for(WAITING, "1").await;
    let mut insert = service.connect();
    insert.request("POST", "/listings", JSON, named("second"));
    // The only worker answers this after it has read the insert, and the next one after it has seen the end of the connection.
    service.get("/listings/none");
    drop(insert);
    service.get("/listings/none");
    run(service.superuser(), "commit").await;
    assert_eq!(update.receive("PATCH", "/listings/1").status, 200);
    service.post(&named("third")).id();
    assert_eq!(value(service.superuser(), NAMES).await, "first third");
}

#[tokio::test]
async fn a_write_that_was_not_sent_is_retried_and_one_that_was_sent_gets_503() {
    let cluster = Cluster::migrated();
    let link = Link::to(&cluster);
    let settings = [("WORKERS", "1"), ("POOL_WAIT_MS", "20000")];
    let service = Service::start_at(&through(&cluster, &[&link.address]), &settings);
    let insert_while_the_link_fails = |name: &str| {
        link.cut(true);
        let mut client = service.connect();
        client.request("POST", "/listings", JSON, named(name));
        within(TWO_SECONDS, "a connection in use", || {
            let metrics = service.admin("/metrics");
            let available = r#"database_pool_available{part="primary"} 0"#;
            metrics.text().lines().any(|line| line == available)
        });
        link.close_connections();
        link.cut(false);
        client.receive("POST", "/listings").status
    };
    // Opens a connection that has not prepared the insert. What the service sends first is the text of the statement.
    assert_eq!(service.get("/listings?limit=1").status, 200);
    assert_eq!(insert_while_the_link_fails("not-sent"), 201);
    // The retry has prepared it, so now the values are sent at once. Only the server knows whether they arrived.
    assert_eq!(insert_while_the_link_fails("sent"), 503);
    service.post(&named("later")).id();
    let names = value(&cluster.superuser().await, NAMES).await;
    assert!(
        ["later not-sent", "later not-sent sent"].contains(&&*names),
        "{names}"
    );
}

#[tokio::test]
async fn a_write_whose_session_the_server_terminates_is_retried() {
    let service = one_worker(&[("STATEMENT_TIMEOUT_MS", "15000")]).await;
    service.post(LOFT);
    run(service.superuser(), "begin; update listing set price = 1").await;
    let mut client = service.connect();
    client.request("PATCH", "/listings/1", JSON, r#"{"latest_price_eur":2}"#);
    service.db().wait_for(WAITING, "1").await;
    let terminate = "select pg_terminate_backend(pid) from pg_stat_activity \
        where wait_event_type = 'Lock' and datname = current_database()";
    // In a session of its own: the superuser's transaction sees the activity of its first look.
    assert_eq!(value(&service.db().connect().await, terminate).await, "t");
    service.db().wait_for(WAITING, "1").await;
    run(service.superuser(), "commit").await;
    assert_eq!(client.receive("PATCH", "/listings/1").status, 200);
    let prices = "select string_agg(new_price::text, ' ' order by id) from listing_price_log";
    let expected = "480000.00 1.00 2.00";
    assert_eq!(value(service.superuser(), prices).await, expected);
}
