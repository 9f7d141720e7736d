//! Several servers: writes follow a failover, reads go to replicas.

use std::thread;
use std::time::{Duration, Instant};

use crate::support::{
    Cluster, JSON, LOFT, Link, Service, TWO_SECONDS, alter_system, assert_no_problem,
    count_refused, pause_after_the_first_listing, pause_replay, rows, run, synchronous_pair,
    through, under_load, value, wait_for, within,
};

#[tokio::test]
async fn writes_reach_a_promoted_standby_and_no_acknowledged_one_is_lost() {
    for end in ["kill", "pause", "cut", "power off"] {
        let (primary, standby) = synchronous_pair().await;
        let (one, two) = (Link::to(&primary), Link::to(&standby));
        let url = through(&primary, &[&two.address, &one.address]);
        let service = Service::start_at(&format!("{url}?target_session_attrs=read-write"), &[]);
        let report = format!(
            "ready\nstandby {} does not accept writes\nprimary {} accepts writes\n",
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
        let mut responses = under_load(&service, || {
            thread::sleep(Duration::from_millis(300));
            match end {
                "kill" => primary.kill(),
                "pause" => primary.signal("-STOP"),
                "cut" => one.cut(true),
                _ => {
                    one.cut(true);
                    one.close_connections();
                }
            }
            thread::sleep(Duration::from_millis(200));
            standby.call("promote");
            within(Duration::from_secs(3), end, || {
                service.patch("/listings/1", "{}").status == 200
            });
            // The service ignores the former primary when it comes back.
            match end {
                "pause" => primary.signal("-CONT"),
                "kill" => (),
                _ => one.cut(false),
            }
            thread::sleep(Duration::from_millis(500));
        });
        count_refused(&responses);
        assert_eq!(service.get("/listings/1").status, 200);
        let report = service.admin("/health/ready");
        assert_eq!(report.status, 200, "{report:?}");
        assert!(
            report
                .text()
                .contains(&format!("primary {} accepts writes", two.address))
        );

        // Every acknowledged price is in the log of the new primary.
        let superuser = standby.superuser().await;
        assert_no_problem(&superuser).await;
        responses.retain(|(method, response)| *method == "PATCH" && response.status == 200);
        for (_, response) in &responses {
            let listing = response.json();
            let (id, price) = (&listing["id"], &listing["latest_price_eur"]);
            let logged = format!(
                "select count(*) from listing_price_log where listing_id = {id} and new_price = {price}"
            );
            assert_ne!(value(&superuser, &logged).await, "0", "{end}: {listing}");
        }
        if end != "kill" {
            // The service has closed its connections there, also those whose commits still wait for a standby.
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
async fn requests_that_wait_for_a_connection_are_served_by_the_promoted_standby() {
    let (primary, standby) = synchronous_pair().await;
    let link = Link::to(&primary);
    let url = through(&primary, &[&link.address, standby.address()]);
    // Longer than this test waits.
    let settings = [
        ("POOL_WAIT_MS", "60000"),
        ("CONNECT_TIMEOUT_MS", "60000"),
        ("WORKERS", "1"),
    ];
    let url = format!("{url}?target_session_attrs=read-write");
    let service = Service::start_at(&url, &settings);
    // The pool has no connection yet.
    link.cut(true);
    let (mut write, mut read) = (service.connect(), service.connect());
    write.request("POST", "/listings", JSON, LOFT);
    read.request("GET", "/listings/1", "", "");
    // The only worker answers this after it has started the two requests.
    service.get("/listings/none");
    standby.call("promote");
    assert_eq!(write.receive("POST", "/listings").id(), 1);
    assert!([200, 404].contains(&read.receive("GET", "/listings/1").status));
}

#[tokio::test]
async fn a_primary_that_was_not_stopped_is_replaced_by_the_promoted_standby() {
    let (primary, standby) = synchronous_pair().await;
    let url = through(&primary, &[primary.address(), standby.address()]);
    let url = format!("{url}?target_session_attrs=read-write");
    let service = Service::start_at(&url, &[]);
    assert_eq!(service.post(LOFT).status, 201);
    standby.call("promote");
    // On the former primary, the commit would wait for a standby without end.
    within(Duration::from_secs(3), "a write", || {
        service.patch("/listings/1", "{}").status == 200
    });
    // An instance that starts now chooses the same server.
    let other = Service::start_at(&url, &[]);
    for service in [&service, &other] {
        let report = service.admin("/health/ready");
        let primary = format!("primary {} accepts writes", standby.address());
        assert!(report.text().contains(&primary), "{report:?}");
    }
}

#[tokio::test]
async fn a_write_is_not_acknowledged_if_its_wait_for_the_standby_was_cancelled() {
    let (primary, standby) = synchronous_pair().await;
    let service = Service::start_at(&primary.url, &[]);
    assert_eq!(service.post(LOFT).status, 201);
    standby.kill();
    let mut client = service.connect();
    client.request("PATCH", "/listings/1", JSON, r#"{"latest_price_eur":1}"#);
    let superuser = primary.superuser().await;
    let waits = "from pg_stat_activity where wait_event = 'SyncRep'";
    wait_for(&superuser, &format!("select count(*) {waits}"), "1").await;
    run(
        &superuser,
        &format!("select pg_cancel_backend(pid) {waits}"),
    )
    .await;
    assert_eq!(client.receive("PATCH", "/listings/1").status, 503);
    // It was done, on the primary alone.
    assert_eq!(service.get("/listings/1").json()["latest_price_eur"], 1);
    service.logged("a promotion may undo a write: canceling wait for synchronous replication");
}

#[tokio::test]
async fn a_server_that_became_read_only_is_replaced_by_the_promoted_standby() {
    let (primary, standby) = synchronous_pair().await;
    let url = through(&primary, &[primary.address(), standby.address()]);
    let service = Service::start_at(
        &format!("{url}?target_session_attrs=read-write"),
        &[("POOL_WAIT_MS", "500")],
    );
    assert_eq!(service.post(LOFT).status, 201);
    assert_eq!(service.get("/listings/1").status, 200);
    let superuser = primary.superuser().await;
    alter_system(&superuser, "set default_transaction_read_only = on").await;
    within(TWO_SECONDS, "a refusal", || {
        service.patch("/listings/1", "{}").status == 503
    });
    within(TWO_SECONDS, "not ready", || {
        service.admin("/health/ready").status == 503
    });
    let still = "select count(*) from pg_stat_activity where application_name = 'listing-api' and query !~ 'transaction_read_only'";
    wait_for(&superuser, still, "0").await;
    standby.call("promote");
    within(Duration::from_secs(3), "a write", || {
        service.patch("/listings/1", "{}").status == 200
    });
    assert_eq!(service.get("/listings/1").status, 200);
}

/// Whether one of the open sessions of a server has read listings or prices.
async fn was_read(server: &Cluster) -> bool {
    let reads = "select count(*) > 0 from pg_stat_activity \
        where application_name = 'listing-api' and query ~ 'unnest\\(|id = (any\\()?\\$1'";
    value(&server.superuser().await, reads).await == "t"
}

#[tokio::test]
async fn replicas_are_read_in_turn_and_a_replica_that_is_down_is_skipped() {
    let primary = Cluster::migrated();
    let replicas = [primary.standby(), primary.standby()];
    let url = through(
        &primary,
        &[replicas[0].address(), "127.0.0.1:1", replicas[1].address()],
    );
    let service = Service::start_at(
        &primary.url,
        &[
            ("DATABASE_READ_URL", &url),
            ("WORKERS", "1"),
            ("REPLICA_LAG_MS", "600000"),
        ],
    );
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
    // Until a replica has the listing, the primary answers.
    for replica in &replicas {
        replica
            .wait_for("select count(*) from listing_price_log", "1")
            .await;
    }
    read_all();
    assert!(was_read(&replicas[0]).await && was_read(&replicas[1]).await);
    let report = service.admin("/health/ready");
    let lines: Vec<_> = report.text().lines().collect();
    assert_eq!(
        lines[..2],
        [
            "ready",
            &format!("primary {} accepts writes", primary.address())
        ]
    );
    assert!(lines[2].starts_with(&format!("replica {} is read-only", replicas[0].address())));
    assert!(
        lines[3].starts_with("replica 127.0.0.1:1 is down: error connecting to server"),
        "{lines:?}"
    );

    replicas[0].call("stop");
    read_all();
    replicas[1].kill();
    read_all();
    assert!(was_read(&primary).await);
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
    assert!(was_read(&replicas[0]).await);

    // Without the primary, listings are read from a replica, but only the primary can say that a listing does not exist.
    primary.call("stop");
    read_all();
    within(Duration::from_secs(4), "a 503", || {
        service.get("/listings/7").status == 503 && service.post(LOFT).status == 503
    });
    read_all();
    assert_eq!(service.admin("/health/ready").status, 503);
}

#[tokio::test]
async fn a_replica_that_lags_never_contradicts_the_writes_of_a_client() {
    let primary = Cluster::migrated();
    let replica = primary.standby();
    let settings = [
        ("DATABASE_READ_URL", &*replica.url),
        ("REPLICA_LAG_MS", "600000"),
    ];
    let service = Service::start_at(&primary.url, &settings);
    within(TWO_SECONDS, "a replica that has caught up", || {
        let ready = service.admin("/health/ready");
        ready.text().ends_with("is read-only\n")
    });
    let old = service.post(LOFT);
    let old_etag = old.header("etag").expect("an ETag").to_owned();
    let _replaying = pause_after_the_first_listing(&replica).await;
    let written = service.patch("/listings/1", r#"{"latest_price_eur":1}"#);
    let etag = written.header("etag").expect("an ETag").to_owned();
    // Without an ETag in the request, a response may be stale.
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
    // With it, the primary answers.
    let seen = |etag: &str| format!("if-none-match: {etag}\r\n");
    assert_eq!(
        service.send("GET", "/listings/1", &seen(&etag), "").status,
        304
    );
    for path in ["/listings/1/prices", "/listings/1/prices?limit=9"] {
        let prices = service.send("GET", path, &seen(&etag), "");
        assert_eq!(prices.json().as_array().map(Vec::len), Some(2), "{path}");
    }
    let chart = |headers: &str| service.send("GET", "/listings/1/prices.svg", headers, "");
    assert!(chart("").text().contains(">€480,000</text>"));
    assert!(chart(&seen(&etag)).text().contains(">€1</text>"));
    assert_eq!(
        service
            .send("GET", "/listings/1", &seen(&old_etag), "")
            .status,
        304
    );
    // Every client can read a new listing and its history.
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
    assert_eq!(service.get("/listings/2/prices.svg").status, 200);
    assert_eq!(service.get("/listings/3").status, 404);
    // If the client sends several ETags, only the primary knows which is the newest.
    let both = format!("if-none-match: {old_etag}, {etag}\r\n");
    let known = service.send("GET", "/listings/1", &both, "");
    assert_eq!((known.status, known.header("etag")), (304, Some(&*etag)));
}

#[tokio::test]
async fn a_replica_that_lags_too_much_is_not_read() {
    let primary = Cluster::migrated();
    let replica = primary.standby();
    let writer = Service::start_at(&primary.url, &[]);
    writer.post(LOFT);
    let replaying = pause_after_the_first_listing(&replica).await;
    let price = |service: &Service| service.get("/listings/1").json()["latest_price_eur"].clone();
    let reprice = |price: i32| {
        let body = format!("{{\"latest_price_eur\":{price}}}");
        assert_eq!(writer.patch("/listings/1", &body).status, 200);
    };
    reprice(1);
    // The service cannot know the lag from before its first probe.
    let settings = [
        ("DATABASE_READ_URL", &*replica.url),
        ("REPLICA_LAG_MS", "500"),
    ];
    let service = Service::start_at(&primary.url, &settings);
    assert_eq!(price(&service), 1);
    let health_of = |path| service.admin(path).text().to_owned();
    assert!(health_of("/health/ready").ends_with("is read-only, lag unknown\n"));
    run(&replaying, "select pg_wal_replay_resume()").await;
    within(TWO_SECONDS, "a replica that has caught up", || {
        health_of("/health/ready").ends_with("is read-only\n")
    });
    pause_replay(&replaying).await;
    reprice(2);
    let written = Instant::now();
    within(TWO_SECONDS, "the new price", || price(&service) == 2);
    within(TWO_SECONDS, "the lag in the health report", || {
        health_of("/health/ready").contains(" s behind")
    });
    let metrics = health_of("/metrics");
    let name = format!(
        "database_server_lag_seconds{{part=\"replica\",server=\"{}\"}} ",
        replica.address()
    );
    let lag = metrics.lines().find_map(|line| line.strip_prefix(&name));
    let lag: f64 = lag.expect("a lag").parse().expect("seconds");
    assert!(
        lag > 0.0 && lag <= written.elapsed().as_secs_f64() + 0.5,
        "{lag}"
    );
}

#[tokio::test]
async fn a_long_history_is_whole_while_the_primary_is_down_and_a_replica_lags() {
    let primary = Cluster::migrated();
    let replicas = [primary.standby(), primary.standby()];
    let [current, lagging] = &replicas;
    let url = through(&primary, &[current.address(), lagging.address()]);
    let settings = [
        ("DATABASE_READ_URL", &*url),
        ("REPLICA_LAG_MS", "600000"),
        ("WORKERS", "1"),
    ];
    let service = Service::start_at(&primary.url, &settings);
    within(TWO_SECONDS, "replicas that have caught up", || {
        let ready = service.admin("/health/ready");
        ready.text().matches("is read-only\n").count() == 2
    });
    service.post(LOFT);
    let _replaying = pause_after_the_first_listing(lagging).await;
    // More than one page of a streamed history.
    let prices = "do 'begin for n in 1..1500 loop update listing set price = n; end loop; end'";
    run(&primary.superuser().await, prices).await;
    let logged = "select count(*) from listing_price_log";
    wait_for(&current.superuser().await, logged, "1501").await;
    primary.call("stop");
    // Each read begins at another replica.
    let mut lengths: Vec<_> = (0..8)
        .map(|_| service.get("/listings/1/prices").json())
        .map(|prices| prices.as_array().map_or(0, Vec::len))
        .collect();
    lengths.sort_unstable();
    lengths.dedup();
    assert_eq!(lengths, [1, 1501]);
}

#[tokio::test]
async fn a_replica_that_refuses_new_sessions_is_not_read() {
    let primary = Cluster::migrated();
    let replica = primary.standby();
    let settings = [
        ("DATABASE_READ_URL", &*replica.url),
        ("REPLICA_LAG_MS", "600000"),
        ("WORKERS", "1"),
    ];
    let service = Service::start_at(&primary.url, &settings);
    within(TWO_SECONDS, "a replica that has caught up", || {
        let ready = service.admin("/health/ready");
        ready.text().ends_with("is read-only\n")
    });
    service.post(LOFT);
    let replaying = pause_after_the_first_listing(&replica).await;
    assert_eq!(
        service
            .patch("/listings/1", r#"{"latest_price_eur":1}"#)
            .status,
        200
    );
    let price = || service.get("/listings/1").json()["latest_price_eur"].clone();
    // The old price, from the replica.
    assert_eq!(price(), 480_000);
    let access = replica.folder.path().join(".postgres/data/pg_hba.conf");
    let rules = std::fs::read_to_string(&access).expect("read pg_hba.conf");
    std::fs::write(&access, format!("host all all all reject\n{rules}")).expect("write it");
    run(&replaying, "select pg_reload_conf()").await;
    // Lists have no session on the replica yet, so the pool asks for one.
    within(Duration::from_secs(9), "a refusal", || {
        assert_eq!(service.get("/listings").status, 200);
        let ready = service.admin("/health/ready");
        assert_eq!(ready.status, 200, "{ready:?}");
        ready
            .text()
            .contains("refuses new sessions: db error: FATAL: pg_hba.conf rejects")
    });
    assert_eq!(price(), 1);
    std::fs::write(&access, rules).expect("write pg_hba.conf");
    run(&replaying, "select pg_reload_conf()").await;
    within(Duration::from_secs(3), "the old price", || {
        price() == 480_000
    });
}

#[tokio::test]
async fn a_replica_that_is_ahead_of_the_promoted_standby_on_the_former_timeline_is_not_read() {
    let primary = Cluster::migrated();
    let (standby, replica) = (primary.standby(), primary.standby());
    let hosts = [primary.address(), standby.address()];
    let url = format!(
        "{}?target_session_attrs=read-write",
        through(&primary, &hosts)
    );
    let settings = [
        ("DATABASE_READ_URL", &*replica.url),
        ("REPLICA_LAG_MS", "600000"),
    ];
    let service = Service::start_at(&url, &settings);
    service.post(LOFT);
    let logged = "select count(*) from listing_price_log";
    standby.wait_for(logged, "1").await;
    // The standby stops to follow, so its promotion loses what comes next.
    let superuser = standby.superuser().await;
    alter_system(&superuser, "set primary_conninfo = ''").await;
    wait_for(&superuser, "select count(*) from pg_stat_wal_receiver", "0").await;
    let lost = "do 'begin for n in 1..1000 loop update listing set price = n; end loop; end'";
    run(&primary.superuser().await, lost).await;
    replica.wait_for(logged, "1001").await;
    primary.kill();
    standby.call("promote");
    let reprice = r#"{"latest_price_eur":2}"#;
    within(Duration::from_secs(3), "a write", || {
        service.patch("/listings/1", reprice).status == 200
    });
    let begun = Instant::now();
    while begun.elapsed() < TWO_SECONDS {
        assert_eq!(service.get("/listings/1").json()["latest_price_eur"], 2);
    }
    let ready = service.admin("/health/ready");
    let said = format!(
        "replica {} is not known to be on timeline 2, lag unknown\n",
        replica.address()
    );
    assert!(
        ready.status == 200 && ready.text().ends_with(&said),
        "{ready:?}"
    );
}

#[tokio::test]
async fn a_replica_that_follows_the_promoted_standby_is_read_once_its_timeline_is_known() {
    let primary = Cluster::migrated();
    let standby = primary.standby();
    let replica = standby.standby();
    let plain = "create role plain login password 'plain' in role listing_api";
    let entitled =
        "create role entitled login password 'entitled' in role listing_api, pg_read_all_stats";
    run(&primary.superuser().await, plain).await;
    run(&primary.superuser().await, entitled).await;
    let roles = "select count(*) from pg_roles where rolname in ('plain', 'entitled')";
    replica.wait_for(roles, "2").await;
    let start = |role: &str| {
        let at = |hosts: &str| format!("postgres://{role}:{role}@{hosts}/listing");
        let url = at(&format!("{},{}", primary.address(), standby.address()));
        let replicas = at(replica.address());
        let settings = [("DATABASE_READ_URL", &*replicas)];
        Service::start_at(&format!("{url}?target_session_attrs=read-write"), &settings)
    };
    let health = |service: &Service| service.admin("/health/ready").text().to_owned();
    let is_read = |service: &Service| health(service).ends_with("is read-only\n");
    let [plain, entitled] = [start("plain"), start("entitled")];
    within(TWO_SECONDS, "a replica that has caught up", || {
        is_read(&plain) && is_read(&entitled)
    });
    primary.kill();
    standby.call("promote");
    within(
        Duration::from_secs(4),
        "the timeline for pg_read_all_stats",
        || is_read(&entitled),
    );
    // A role without it must wait for a checkpoint on both servers.
    let unknown = "is not known to be on timeline 2, lag unknown\n";
    within(Duration::from_secs(4), unknown, || {
        health(&plain).ends_with(unknown)
    });
    let promoted = standby.superuser().await;
    run(&promoted, "checkpoint").await;
    let position = value(&promoted, "select pg_current_wal_flush_lsn()").await;
    let replayed = format!("select pg_last_wal_replay_lsn() >= '{position}'");
    replica.wait_for(&replayed, "t").await;
    run(&replica.superuser().await, "checkpoint").await;
    within(TWO_SECONDS, "the timeline for a plain role", || {
        is_read(&plain)
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_is_read_while_its_own_clock_is_within_the_limit_if_the_primary_does_not_answer()
{
    let primary = Cluster::migrated();
    let replica = primary.standby();
    let link = Link::to(&primary);
    let url = through(&primary, &[&link.address]);
    let settings = [
        ("DATABASE_READ_URL", &*replica.url),
        ("REPLICA_LAG_MS", "1500"),
        ("POOL_WAIT_MS", "200"),
    ];
    let service = Service::start_at(&url, &settings);
    service.post(LOFT);
    let health = || service.admin("/health/ready").text().to_owned();
    within(TWO_SECONDS, "a replica that has caught up", || {
        health().ends_with("is read-only\n")
    });
    replica
        .wait_for("select count(*) from listing_price_log", "1")
        .await;
    // Others reach the primary, and write for eight seconds.
    let others = primary.superuser().await;
    let writes = "do 'begin for n in 1..80 loop update listing set price = n; commit; perform pg_sleep(0.1); end loop; end'";
    let writing = tokio::spawn(async move { run(&others, writes).await });
    link.cut(true);
    let down = format!(
        "database_server_up{{part=\"primary\",server=\"{}\"}} 0",
        link.address
    );
    within(Duration::from_secs(4), &down, || {
        service.admin("/metrics").text().contains(&down)
    });
    let begun = Instant::now();
    while begun.elapsed() < TWO_SECONDS {
        assert_eq!(service.get("/listings/1").status, 200, "{}", health());
    }
    writing.await.expect("eighty writes");
    // The replica cannot tell whether the primary writes nothing or does not reach it.
    within(Duration::from_secs(4), "a refusal", || {
        service.get("/listings/1").status == 503
    });
    assert!(health().contains(" s behind"), "{}", health());
    link.cut(false);
    within(TWO_SECONDS, "a read", || {
        service.get("/listings/1").status == 200
    });
}

#[tokio::test]
async fn a_replica_is_not_read_while_the_primary_has_not_been_probed() {
    let primary = Cluster::migrated();
    let (standby, replica) = (primary.standby(), primary.standby());
    let writer = Service::start_at(&primary.url, &[]);
    writer.post(LOFT);
    let _replaying = pause_after_the_first_listing(&replica).await;
    assert_eq!(
        writer
            .patch("/listings/1", r#"{"latest_price_eur":1}"#)
            .status,
        200
    );
    standby
        .wait_for("select count(*) from listing_price_log", "2")
        .await;
    primary.call("stop");
    // The clock of the replica is within the limit, but only the standby has the last price.
    let settings = [
        ("DATABASE_READ_URL", &*replica.url),
        ("REPLICA_LAG_MS", "600000"),
    ];
    let url = through(&primary, &[primary.address(), standby.address()]);
    let service = Service::start_at(&url, &settings);
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(1) {
        assert_eq!(service.get("/listings/1").json()["latest_price_eur"], 1);
    }
    let health = service.admin("/health/ready");
    let said = format!("replica {} is read-only, lag unknown", replica.address());
    assert!(health.text().contains(&said), "{health:?}");
}
