//! Several servers: a standby takes over, replicas are read.

use std::thread;
use std::time::{Duration, Instant};

use tokio_postgres::Client;

use crate::harness::{Cluster, alter_system, rows, run, value};
use crate::load::insert;
use crate::outage::{Link, TWO_SECONDS, over, refused, service, under_load, within};
use crate::service::{JSON, LOFT, Service};

/// A primary that acknowledges nothing which its standby has not, and that standby.
pub async fn pair() -> (Cluster, Cluster) {
    let primary = Cluster::migrated();
    let standby = primary.standby();
    insist_on_a_standby(&primary).await;
    (primary, standby)
}

/// From now on a commit waits for a standby. Waits for the one there is.
pub async fn insist_on_a_standby(primary: &Cluster) {
    let superuser = primary.superuser().await;
    alter_system(&superuser, "set synchronous_standby_names = '*'").await;
    let synchronous = "select count(*) from pg_stat_replication where sync_state = 'sync'";
    let begun = Instant::now();
    while value(&superuser, synchronous).await != "1" {
        assert!(begun.elapsed() < Duration::from_secs(20), "no standby");
        thread::sleep(Duration::from_millis(10));
    }
    // Who does this makes commits wait, and has heeded the setting before.
    run(&superuser, "checkpoint").await;
}

/// Lets the first listing arrive at a replica, and no more. A session there.
pub async fn stop_behind_the_first_listing(replica: &Cluster) -> Client {
    let superuser = replica.superuser().await;
    let begun = Instant::now();
    while value(&superuser, "select count(*) from listing_price_log").await != "1" {
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
    pause_replay(&superuser).await;
    superuser
}

async fn pause_replay(superuser: &Client) {
    run(superuser, "select pg_wal_replay_pause()").await;
    let begun = Instant::now();
    while value(superuser, "select pg_get_wal_replay_pause_state()").await != "paused" {
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
}

#[tokio::test]
async fn writes_reach_a_promoted_standby_and_no_acknowledged_one_is_lost() {
    for end in ["kill", "pause", "cut", "power off"] {
        let (primary, standby) = pair().await;
        let (one, two) = (Link::to(&primary), Link::to(&standby));
        let url = over(&primary, &[&two.address, &one.address]);
        let service = service(&format!("{url}?target_session_attrs=read-write"), &[]).await;
        let report = format!(
            "ready\nstandby {} takes no writes\nprimary {} takes reads and writes\n",
            two.address, one.address
        );
        within(TWO_SECONDS, &report, || {
            service.admin("/health/ready").text() == report
        });
        let line = format!(
            "database_server_up{{part=\"standby\",server=\"{}\"}} 1",
            two.address
        );
        assert!(service.admin("/metrics").text().contains(&line));
        for _ in 0..4 {
            assert_eq!(service.post(LOFT).status, 201);
        }
        let mut replies = under_load(&service, || {
            thread::sleep(Duration::from_millis(300));
            match end {
                "kill" => primary.kill(),
                "pause" => primary.signal("-STOP"),
                "cut" => one.cut(true),
                _ => {
                    one.cut(true);
                    one.hang_up();
                }
            }
            thread::sleep(Duration::from_millis(200));
            standby.call("promote");
            within(Duration::from_secs(3), end, || {
                service.send("PATCH", "/listings/1", JSON, "{}").status == 200
            });
            // The former primary, back again, is none of our business any more.
            match end {
                "pause" => primary.signal("-CONT"),
                "kill" => (),
                _ => one.cut(false),
            }
            thread::sleep(Duration::from_millis(500));
        });
        refused(&replies);
        assert_eq!(service.get("/listings/1").status, 200);
        let report = service.admin("/health/ready");
        assert_eq!(report.status, 200, "{}", report.text());
        assert!(
            report
                .text()
                .contains(&format!("primary {} takes", two.address))
        );

        // Whoever wrote prices went up from one to the next.
        let superuser = standby.superuser().await;
        crate::harness::assert_no_problem(&superuser).await;
        replies.retain(|(method, reply)| *method == "PATCH" && reply.status == 200);
        for (_, reply) in &replies {
            let listing = reply.json();
            let (id, price) = (&listing["id"], &listing["latest_price_eur"]);
            let logged = format!(
                "select count(*) from listing_price_log where listing_id = {id} and new_price = {price}"
            );
            assert_ne!(value(&superuser, &logged).await, "0", "{end}: {listing}");
        }
        if end != "kill" {
            // What goes on waiting for a standby there, nobody waits for.
            let still = "select query from pg_stat_activity where application_name = 'listing-api' \
                and query !~ 'transaction_read_only' and state = 'idle'";
            assert_eq!(
                rows(&primary.superuser().await, still).await,
                [""; 0],
                "{end}"
            );
        }
    }
}

#[tokio::test]
async fn what_waits_for_a_connection_goes_to_the_promoted_standby() {
    let (primary, standby) = pair().await;
    let link = Link::to(&primary);
    let url = over(&primary, &[&link.address, standby.address()]);
    // Longer than the clients of the test wait.
    let settings = [
        ("POOL_WAIT_MS", "60000"),
        ("CONNECT_TIMEOUT_MS", "60000"),
        ("WORKERS", "1"),
    ];
    let url = format!("{url}?target_session_attrs=read-write");
    let service = service(&url, &settings).await;
    // No connection for lists and writes has been made yet.
    link.cut(true);
    let (mut write, mut read) = (service.connect(), service.connect());
    write.write(insert("Loft", JSON).as_bytes());
    read.write(b"GET /listings/1 HTTP/1.1\r\nhost: x\r\n\r\n");
    // The one worker answers this behind what was sent before.
    service.get("/listings/none");
    standby.call("promote");
    assert_eq!(write.receive("POST", "/listings").id(), 1);
    assert!([200, 404].contains(&read.receive("GET", "/listings/1").status));
}

#[tokio::test]
async fn a_server_that_became_read_only_is_left() {
    let (primary, standby) = pair().await;
    let url = over(&primary, &[primary.address(), standby.address()]);
    let service = service(
        &format!("{url}?target_session_attrs=read-write"),
        &[("POOL_WAIT_MS", "500")],
    )
    .await;
    assert_eq!(service.post(LOFT).status, 201);
    assert_eq!(service.get("/listings/1").status, 200);
    let superuser = primary.superuser().await;
    alter_system(&superuser, "set default_transaction_read_only = on").await;
    within(TWO_SECONDS, "a refusal", || {
        service.send("PATCH", "/listings/1", JSON, "{}").status == 503
    });
    within(TWO_SECONDS, "not ready", || {
        service.admin("/health/ready").status == 503
    });
    let still = "select query from pg_stat_activity where application_name = 'listing-api' and query !~ 'transaction_read_only'";
    let begun = Instant::now();
    while !rows(&superuser, still).await.is_empty() {
        assert!(
            begun.elapsed() < TWO_SECONDS,
            "{:?}",
            rows(&superuser, still).await
        );
    }
    standby.call("promote");
    within(Duration::from_secs(3), "a write", || {
        service.send("PATCH", "/listings/1", JSON, "{}").status == 200
    });
    assert_eq!(service.get("/listings/1").status, 200);
}

/// Whether a server was asked for listings or prices by one of the sessions it has now.
async fn asked(server: &Cluster) -> bool {
    let asked = "select count(*) > 0 from pg_stat_activity \
        where application_name = 'listing-api' and query ~ 'unnest\\(|any\\(\\$1\\)'";
    value(&server.superuser().await, asked).await == "t"
}

#[tokio::test]
async fn replicas_are_read_in_turn_and_those_that_are_down_are_skipped() {
    let primary = Cluster::migrated();
    let replicas = [primary.standby(), primary.standby()];
    let url = over(
        &primary,
        &[replicas[0].address(), "127.0.0.1:1", replicas[1].address()],
    );
    let service = service(
        &primary.url,
        &[("DATABASE_READ_URL", &url), ("WORKERS", "1")],
    )
    .await;
    assert_eq!(service.post(LOFT).status, 201);
    let read_all = || {
        for _ in 0..6 {
            for path in [
                "/listings/1",
                "/listings/1/prices",
                "/listings",
                "/listings/1/prices?limit=1",
            ] {
                assert_eq!(
                    service.get(path).status,
                    200,
                    "{path} {:?}",
                    service.log().last()
                );
            }
        }
    };
    // The listing has to arrive there first: until then the primary answers.
    for replica in &replicas {
        let superuser = replica.superuser().await;
        let begun = Instant::now();
        while value(&superuser, "select count(*) from listing_price_log").await != "1" {
            assert!(begun.elapsed() < Duration::from_secs(10));
        }
    }
    read_all();
    assert!(asked(&replicas[0]).await && asked(&replicas[1]).await);
    let report = service.admin("/health/ready");
    let lines: Vec<_> = report.text().lines().collect();
    assert_eq!(
        lines[..2],
        [
            "ready",
            &format!("primary {} takes reads and writes", primary.address())
        ]
    );
    assert!(lines[2].starts_with(&format!(
        "replica {} takes reads only",
        replicas[0].address()
    )));
    assert!(
        lines[3].starts_with("replica 127.0.0.1:1 is gone: error connecting to server"),
        "{lines:?}"
    );

    replicas[0].call("stop");
    read_all();
    replicas[1].kill();
    read_all();
    assert!(asked(&primary).await);
    let metrics = service.admin("/metrics");
    for (part, server, up) in [("primary", &primary, 1), ("replica", &replicas[0], 0)] {
        let line = format!(
            "database_server_up{{part=\"{part}\",server=\"{}\"}} {up}",
            server.address()
        );
        assert!(
            metrics.text().lines().any(|given| given == line),
            "{line} in {}",
            metrics.text()
        );
    }
    replicas[0].call("up");
    let line = format!(
        "database_server_up{{part=\"replica\",server=\"{}\"}} 1",
        replicas[0].address()
    );
    within(TWO_SECONDS, &line, || {
        service.admin("/metrics").text().contains(&line)
    });
    read_all();
    assert!(asked(&replicas[0]).await);

    // With the primary gone what is there can be read, and only the primary could say what is not.
    primary.call("stop");
    read_all();
    within(Duration::from_secs(4), "refusals", || {
        service.get("/listings/7").status == 503 && service.post(LOFT).status == 503
    });
    read_all();
    assert_eq!(service.admin("/health/ready").status, 503);
}

#[tokio::test]
async fn a_replica_that_lags_never_contradicts_what_a_client_wrote() {
    let primary = Cluster::migrated();
    let replica = primary.standby();
    let settings = [
        ("DATABASE_READ_URL", &*replica.url),
        ("REPLICA_LAG_MS", "600000"),
    ];
    let service = service(&primary.url, &settings).await;
    within(TWO_SECONDS, "a replica that has caught up", || {
        let ready = service.admin("/health/ready");
        ready.text().ends_with("takes reads only\n")
    });
    let old = service.post(LOFT);
    let old_etag = old.header("etag").expect("an ETag").to_owned();
    let _replaying = stop_behind_the_first_listing(&replica).await;
    let written = service.send("PATCH", "/listings/1", JSON, r#"{"latest_price_eur":1}"#);
    let etag = written.header("etag").expect("an ETag").to_owned();
    // Without a word about what it has seen, a client may be told what was.
    assert_eq!(
        service.get("/listings/1").json()["latest_price_eur"],
        480_000
    );
    assert_eq!(
        service
            .get("/listings/1/prices")
            .json()
            .as_array()
            .map(Vec::len),
        Some(1)
    );
    assert_eq!(service.get("/listings/1").header("etag"), Some(&*old_etag));
    // With it, it is told by the primary.
    let seen = |etag: &str| format!("if-none-match: {etag}\r\n");
    assert_eq!(
        service.send("GET", "/listings/1", &seen(&etag), "").status,
        304
    );
    for path in ["/listings/1/prices", "/listings/1/prices?limit=9"] {
        let prices = service.send("GET", path, &seen(&etag), "");
        assert_eq!(prices.json().as_array().map(Vec::len), Some(2), "{path}");
    }
    assert_eq!(
        service
            .send("GET", "/listings/1", &seen(&old_etag), "")
            .status,
        304
    );
    // A new listing is there for everybody, and so is its history.
    assert_eq!(service.post(LOFT).id(), 2);
    assert_eq!(service.get("/listings/2").status, 200);
    assert_eq!(
        service
            .get("/listings/2/prices")
            .json()
            .as_array()
            .map(Vec::len),
        Some(1)
    );
    assert_eq!(service.get("/listings/3").status, 404);
    // Of several that it knows, only the primary can tell which is the newest.
    let both = format!("if-none-match: {old_etag}, {etag}\r\n");
    let known = service.send("GET", "/listings/1", &both, "");
    assert_eq!((known.status, known.header("etag")), (304, Some(&*etag)));
}

#[tokio::test]
async fn a_replica_that_is_too_far_behind_is_not_asked() {
    let primary = Cluster::migrated();
    let replica = primary.standby();
    let writer = service(&primary.url, &[]).await;
    writer.post(LOFT);
    let replaying = stop_behind_the_first_listing(&replica).await;
    let price = |service: &Service| service.get("/listings/1").json()["latest_price_eur"].clone();
    let reprice = |price: i32| {
        let body = format!("{{\"latest_price_eur\":{price}}}");
        assert_eq!(writer.send("PATCH", "/listings/1", JSON, &body).status, 200);
    };
    reprice(1);
    // Nobody knows how far behind it was when the service began to ask.
    let settings = [
        ("DATABASE_READ_URL", &*replica.url),
        ("REPLICA_LAG_MS", "500"),
    ];
    let service = service(&primary.url, &settings).await;
    assert_eq!(price(&service), 1);
    let health_of = |path| service.admin(path).text().to_owned();
    assert!(
        health_of("/health/ready").ends_with("takes reads only, further behind than is known\n")
    );
    run(&replaying, "select pg_wal_replay_resume()").await;
    within(TWO_SECONDS, "a replica that has caught up", || {
        health_of("/health/ready").ends_with("takes reads only\n")
    });
    pause_replay(&replaying).await;
    reprice(2);
    let behind = Instant::now();
    within(TWO_SECONDS, "the new price", || price(&service) == 2);
    within(TWO_SECONDS, "how far it is behind", || {
        health_of("/health/ready").contains(" s behind")
    });
    let metrics = health_of("/metrics");
    let name = format!(
        "database_server_lag_seconds{{part=\"replica\",server=\"{}\"}} ",
        replica.address()
    );
    let lag = metrics.lines().find_map(|line| line.strip_prefix(&name));
    let lag: f64 = lag.expect("the lag").parse().expect("seconds");
    assert!(
        lag > 0.0 && lag <= behind.elapsed().as_secs_f64() + 0.5,
        "{lag}"
    );
}
