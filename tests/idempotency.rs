//! A POST with an Idempotency-Key makes one listing, however often it is repeated.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crate::support::{
    Cluster, Connection, JSON, LOFT, Link, Response, Service, TWO_SECONDS, WAITING, bearer,
    create_administrator_key, create_key, refusal, run, synchronous_pair, through, value, within,
};

fn keyed(key: &str) -> String {
    format!("{JSON}idempotency-key: {key}\r\n")
}

fn post(service: &Service, headers: &str, body: &str) -> Response {
    service.connect().send("POST", "/listings", headers, body)
}

const LISTINGS: &str = "select count(*) from listing";

#[tokio::test]
async fn a_repetition_gets_the_listing_as_it_is_now() {
    let service = Service::start().await;
    let key = keyed("a");
    let first = post(&service, &key, LOFT);
    assert_eq!(
        (first.status, first.header("idempotent-replayed")),
        (201, None)
    );
    service.patch("/listings/1", r#"{"latest_price_eur":1}"#);
    let again = post(&service, &key, LOFT);
    assert_eq!(again.status, 201);
    assert_eq!(again.header("idempotent-replayed"), Some("true"));
    assert_eq!(again.header("location"), Some("/listings/1"));
    let now = service.get("/listings/1");
    assert_eq!(again.header("etag"), now.header("etag"));
    assert_eq!(again.json(), now.json());
    // The same key in quotes, and other bytes for the same listing.
    assert_eq!(post(&service, &keyed("\"a\""), LOFT).id(), 1);
    let other = post(&service, &key, &format!("{LOFT} ")).error();
    let message = "idempotency-key: was used with another body, use a new key";
    assert_eq!(other, (422, message.to_owned()));
    service.send("DELETE", "/listings/1", "", "");
    let message = "idempotency-key: its listing was deleted, use a new key";
    assert_eq!(
        post(&service, &key, LOFT).error(),
        (409, message.to_owned())
    );
    assert_eq!(value(service.superuser(), LISTINGS).await, "0");
}

#[tokio::test]
async fn a_key_has_1_to_255_visible_ascii_characters() {
    let service = Service::start().await;
    let longest = "~".repeat(255);
    for key in ["!", "\"", "a\"b", &longest, &format!("\"{longest}\"")] {
        assert_eq!(post(&service, &keyed(key), LOFT).status, 201, "{key}");
    }
    let too_long = "~".repeat(256);
    for key in ["", "\"\"", "a b", "é", &too_long, "a\r\nidempotency-key: a"] {
        let message = "idempotency-key: must be one header of 1 to 255 visible ASCII characters";
        let refused = post(&service, &keyed(key), LOFT).error();
        assert_eq!(refused, (400, message.to_owned()), "{key}");
    }
}

#[tokio::test]
async fn a_failure_is_not_remembered() {
    let service = Service::start().await;
    let key = keyed("a");
    assert_eq!(post(&service, &key, "{}").status, 422);
    run(
        service.superuser(),
        "alter table listing add check (price > 1) not valid",
    )
    .await;
    let cheap = LOFT.replace("480000", "1");
    assert_eq!(post(&service, &key, &cheap).status, 500);
    assert_eq!(post(&service, &key, LOFT).status, 201);
    // Another unique index refuses the second listing.
    run(service.superuser(), "create unique index on listing (name)").await;
    assert_eq!(post(&service, &keyed("b"), LOFT).status, 500);
    assert_eq!(value(service.superuser(), LISTINGS).await, "1");
}

#[tokio::test]
async fn a_key_belongs_to_the_owner_of_the_api_key() {
    let service = Service::start_with(&[("AUTH", "keys")]).await;
    let db = service.superuser();
    let mut listings = BTreeSet::new();
    for (owner, keys) in [
        ("a", [create_key(db, "a").await, create_key(db, "a").await]),
        ("b", [create_key(db, "b").await, create_key(db, "b").await]),
        (
            "",
            [
                create_administrator_key(db).await,
                create_administrator_key(db).await,
            ],
        ),
    ] {
        let ids = keys.map(|key| {
            let headers = format!("{}idempotency-key: same\r\n", bearer(&key));
            post(&service, &headers, LOFT).id()
        });
        assert_eq!(ids[0], ids[1], "{owner}");
        listings.insert(ids[0]);
    }
    assert_eq!(listings.len(), 3);
    let keys = "select string_agg(coalesce(owner, '-'), ' ' order by owner) from idempotency_key";
    assert_eq!(value(db, keys).await, "a b -");
}

#[tokio::test]
async fn keys_are_pruned_after_a_day_at_least() {
    let service = Service::start().await;
    for key in ["old", "new"] {
        post(&service, &keyed(key), LOFT).id();
    }
    let db = service.superuser();
    let refused = refusal(db, "select prune_idempotency_keys('23 hours')").await;
    assert!(
        refused.contains("clients may rely on a key for a day"),
        "{refused}"
    );
    run(db, "update idempotency_key set created_at = created_at - interval '25 hours' where key = 'old'").await;
    assert_eq!(value(db, "select prune_idempotency_keys()").await, "1");
    assert_eq!(post(&service, &keyed("new"), LOFT).id(), 2);
    assert_eq!(post(&service, &keyed("old"), LOFT).id(), 4);
}

#[tokio::test]
async fn a_post_with_a_key_is_sent_again_if_its_answer_is_lost() {
    let cluster = Cluster::migrated();
    let link = Link::to(&cluster);
    let settings = [("WORKERS", "1"), ("POOL_WAIT_MS", "20000")];
    let service = Service::start_at(&through(&cluster, &[&link.address]), &settings);
    // Prepares the insert, so that the values are sent at once.
    assert_eq!(post(&service, &keyed("first"), LOFT).status, 201);
    let db = cluster.superuser().await;
    run(&db, "begin; lock table idempotency_key").await;
    let mut client = service.connect();
    client.request("POST", "/listings", &keyed("lost"), LOFT);
    let waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock'";
    cluster.wait_for(waiting, "1").await;
    // The server commits, and its answer is lost.
    link.cut(true);
    run(&db, "commit").await;
    cluster.wait_for("select count(*) from listing", "2").await;
    link.close_connections();
    link.cut(false);
    let response = client.receive("POST", "/listings");
    assert_eq!(response.status, 201);
    assert_eq!(response.header("idempotent-replayed"), Some("true"));
    assert_eq!(value(&db, LISTINGS).await, "2");
}

#[tokio::test]
async fn repetitions_of_a_key_that_wait_leave_connections_for_others() {
    let settings = [
        ("WORKERS", "1"),
        ("POOL_SIZE", "3"),
        ("POOL_WAIT_MS", "20000"),
    ];
    let service = Service::start_with(&settings).await;
    let taken =
        "begin; insert into idempotency_key (key, body_sha256, listing_id) values ('a', '', 1)";
    run(service.superuser(), taken).await;
    let mut repetitions: Vec<_> = (0..10).map(|_| service.connect()).collect();
    for client in &mut repetitions {
        client.request("POST", "/listings", &keyed("a"), LOFT);
    }
    service.db().wait_for(WAITING, "1").await;
    for _ in 0..5 {
        assert_eq!(service.get("/listings?limit=1").status, 200);
        assert_eq!(service.post(LOFT).status, 201);
    }
    run(service.superuser(), "rollback").await;
    let ids = repetitions
        .iter_mut()
        .map(|client| client.receive("POST", "/listings").id());
    assert_eq!(ids.collect::<BTreeSet<_>>().len(), 1);
}

#[tokio::test]
async fn a_repetition_waits_for_the_standby_that_lacks_the_listing() {
    let (primary, standby) = synchronous_pair().await;
    let service = Service::start_at(&primary.url, &[("STATEMENT_TIMEOUT_MS", "500")]);
    let post = || post(&service, &keyed("a"), LOFT);
    standby.call("stop");
    assert_eq!(post().status, 503);
    // After a crash, PostgreSQL shows the row whose commit was still waiting.
    primary.kill();
    primary.call("up");
    within(Duration::from_secs(20), "a read", || {
        service.get("/listings/1").status == 200
    });
    assert_eq!(post().status, 503);
    standby.call("up");
    within(Duration::from_secs(20), "a repetition", || {
        post().status == 201
    });
}

#[tokio::test]
async fn a_thousand_keys_make_a_thousand_listings_through_crashes_and_lost_answers() {
    const KEYS: usize = 1000;
    let cluster = Cluster::migrated();
    let service = Service::start_at(&cluster.url, &[("POOL_WAIT_MS", "20000")]);
    let next = AtomicUsize::new(0);
    let repeat = |number: usize| {
        let mut attempts = 0;
        loop {
            attempts += 1;
            let body = LOFT.replace("480000", &(number + 1).to_string());
            let sent = (|| {
                let mut connection = Connection::try_to(&service.address)?;
                let headers = keyed(&number.to_string());
                connection.try_request("POST", "/listings", &headers, body.as_bytes())?;
                // Every third client hangs up before the answer, and asks again.
                if (number + attempts).is_multiple_of(3) && attempts < 4 {
                    thread::sleep(Duration::from_millis(2));
                    return Err(std::io::ErrorKind::ConnectionAborted.into());
                }
                connection.try_receive_unchecked("POST")
            })();
            if let Ok(response) = sent {
                match response.status {
                    201 => return response.id(),
                    503 => thread::sleep(Duration::from_millis(100)),
                    _ => panic!("{response:?}"),
                }
            }
        }
    };
    thread::scope(|scope| {
        let clients: Vec<_> = (0..20)
            .map(|_| {
                scope.spawn(|| {
                    let mut made = Vec::new();
                    loop {
                        // Five clients send the same key at about the same time.
                        let turn = next.fetch_add(1, Ordering::Relaxed);
                        if turn >= KEYS * 5 {
                            return made;
                        }
                        made.push((turn / 5, repeat(turn / 5)));
                    }
                })
            })
            .collect();
        for stop in ["kill -9", "stop", "kill -9"] {
            within(Duration::from_mins(1), "some progress", || {
                let before = next.load(Ordering::Relaxed);
                thread::sleep(Duration::from_millis(200));
                next.load(Ordering::Relaxed) > before + 50
            });
            if stop == "stop" {
                cluster.call("stop");
            } else {
                cluster.kill();
            }
            cluster.call("up");
        }
        let made = clients
            .into_iter()
            .flat_map(|client| client.join().expect("no failure"));
        let made: BTreeSet<_> = made.collect();
        assert_eq!(made.len(), KEYS, "each key has one listing");
        let ids: BTreeSet<_> = made.into_iter().map(|(_, id)| id).collect();
        assert_eq!(ids.len(), KEYS, "each listing has one key");
    });
    let db = cluster.superuser().await;
    assert_eq!(value(&db, LISTINGS).await, KEYS.to_string());
    within(TWO_SECONDS, "an answer", || {
        service.get("/listings/1").status != 503
    });
}
