//! PostgreSQL stops, hangs or refuses: what clients get.

use std::thread;
use std::time::{Duration, Instant};

use crate::support::{
    Cluster, JSON, LOFT, Link, Service, TWO_SECONDS, alter_system, assert_no_problem, bearer,
    count_refused, create_key, run, through, under_load, value, wait_for, within,
};

fn with_four_listings(url: &str, settings: &[(&str, &str)]) -> Service {
    let service = Service::start_at(url, settings);
    for _ in 0..4 {
        service.post(LOFT).id();
    }
    service
}

#[tokio::test]
async fn a_restart_of_the_database_delays_requests_and_fails_no_read() {
    let cluster = Cluster::migrated();
    let settings = [("POOL_WAIT_MS", "20000"), ("CONNECT_TIMEOUT_MS", "20000")];
    let service = with_four_listings(&cluster.url, &settings);
    for stop in ["stop", "kill -9"] {
        let responses = under_load(&service, || {
            thread::sleep(Duration::from_millis(300));
            if stop == "stop" {
                cluster.call(stop);
            } else {
                cluster.kill();
            }
            thread::sleep(Duration::from_millis(300));
            cluster.call("up");
            within(TWO_SECONDS, "a write", || {
                service.patch("/listings/1", "{}").status == 200
            });
            thread::sleep(Duration::from_millis(300));
        });
        let (reads, writes) = count_refused(&responses);
        // A write in flight may have been committed. Only the client can decide whether to repeat it.
        assert!(
            reads == 0 && writes <= 4,
            "{stop}: {reads} reads and {writes} writes of {}",
            responses.len()
        );
    }
    assert_no_problem(&cluster.superuser().await).await;
}

#[tokio::test]
async fn a_write_whose_response_is_lost_gets_503_and_is_not_repeated() {
    let cluster = Cluster::migrated();
    // The commit is done, but it waits for a standby that does not exist.
    cluster
        .restart_with("set synchronous_standby_names = 'nobody'")
        .await;
    let service = Service::start_at(&cluster.url, &[("POOL_WAIT_MS", "20000")]);
    let mut client = service.connect();
    client.request("POST", "/listings", JSON, LOFT);
    let waiting = "select count(*) from pg_stat_activity where wait_event = 'SyncRep'";
    cluster.wait_for(waiting, "1").await;
    cluster.kill();
    cluster.call("up");
    assert_eq!(client.receive("POST", "/listings").status, 503);
    cluster.wait_for("select count(*) from listing", "1").await;
}

#[tokio::test]
async fn a_write_that_waits_for_a_standby_stays_invisible_when_its_client_disconnects_or_its_answer_is_late()
 {
    let cluster = Cluster::migrated();
    cluster
        .restart_with("set synchronous_standby_names = 'nobody'")
        .await;
    let settings = [("WORKERS", "1"), ("STATEMENT_TIMEOUT_MS", "500")];
    let service = Service::start_at(&cluster.url, &settings);
    let waiting = "select count(*) from pg_stat_activity where wait_event = 'SyncRep'";
    let mut client = service.connect();
    client.request("POST", "/listings", JSON, LOFT);
    cluster.wait_for(waiting, "1").await;
    drop(client);
    assert_eq!(service.post(LOFT).status, 503);
    // The only worker has long seen that the first client disconnected. The lists give a cancellation the time to arrive.
    for _ in 0..100 {
        assert_eq!(service.get("/listings").json(), serde_json::json!([]));
    }
    let superuser = cluster.superuser().await;
    assert_eq!(value(&superuser, waiting).await, "2");
    alter_system(&superuser, "reset synchronous_standby_names").await;
    wait_for(&superuser, "select count(*) from listing", "2").await;
}

#[tokio::test]
async fn writes_refused_by_a_read_only_database_do_not_trigger_a_probe() {
    let cluster = Cluster::migrated();
    let headers = bearer(&create_key(&cluster.superuser().await, "a").await);
    cluster
        .restart_with("set default_transaction_read_only = on")
        .await;
    let link = Link::to(&cluster);
    let url = through(&cluster, &[&link.address]);
    let service = Service::start_at(&url, &[("AUTH", "keys")]);
    let before = link.connections();
    for _ in 0..20 {
        let refused = service.send("POST", "/listings", &headers, LOFT);
        assert_eq!(refused.status, 503);
    }
    assert_eq!(link.connections(), before);
}

#[tokio::test]
async fn a_database_without_a_free_connection_does_not_trigger_a_probe() {
    let cluster = Cluster::migrated();
    let superuser = cluster.superuser().await;
    let role = "create role few login password 'few' in role listing_api";
    run(&superuser, role).await;
    let link = Link::to(&cluster);
    let url = format!("postgres://few:few@{}/listing", link.address);
    let service = Service::start_at(&url, &[]);
    run(&superuser, "alter role few connection limit 0").await;
    let before = link.connections();
    assert_eq!(service.get("/listings/1").status, 503);
    // The tries of the request, and the monitor's own, if its next probe was due already.
    assert!((2..=3).contains(&(link.connections() - before)));
}

#[tokio::test]
async fn a_database_that_is_down_gets_few_connection_attempts() {
    let cluster = Cluster::migrated();
    let link = Link::to(&cluster);
    let settings = [("POOL_WAIT_MS", "300"), ("WORKERS", "2")];
    let service = with_four_listings(&through(&cluster, &[&link.address]), &settings);
    cluster.call("stop");
    let before = link.connections();
    let responses = under_load(&service, || thread::sleep(TWO_SECONDS));
    let connections = link.connections() - before;
    let (reads, writes) = count_refused(&responses);
    assert!(reads + writes > 200, "{reads} {writes}");
    // One probe each quarter of a second, and the requests that found out that the server is down.
    assert!(
        (4..=30).contains(&connections),
        "{connections} connections for {} requests",
        responses.len()
    );
    let took_less = |limit| {
        responses
            .iter()
            .filter(move |(_, response)| response.took < limit)
    };
    assert_eq!(took_less(TWO_SECONDS).count(), responses.len());
    let quick = took_less(Duration::from_millis(100)).count();
    assert!(
        quick * 10 > responses.len() * 9,
        "{quick} of {}",
        responses.len()
    );

    cluster.call("up");
    let before = link.connections();
    within(TWO_SECONDS, "a read", || {
        service.get("/listings/1").status == 200
    });
    thread::scope(|scope| {
        let patch = |id| service.patch(&format!("/listings/{id}"), "{}").status;
        let clients: Vec<_> = (1..=200).map(|id| scope.spawn(move || patch(id))).collect();
        for client in clients {
            let status = client.join().expect("a status");
            assert!([200, 404, 503].contains(&status), "{status}");
        }
    });
    // The pool, two for reads on each worker, and the probes.
    let connections = link.connections() - before;
    assert!((8..=16 + 4 + 4).contains(&connections), "{connections}");
}

#[tokio::test]
async fn a_database_that_cannot_be_reached_costs_503_within_the_limits() {
    let cluster = Cluster::migrated();
    let link = Link::to(&cluster);
    let url = through(&cluster, &[&link.address]);
    let service = with_four_listings(&url, &[("POOL_WAIT_MS", "500")]);
    let responses = under_load(&service, || {
        thread::sleep(Duration::from_millis(200));
        link.cut(true);
        thread::sleep(Duration::from_secs(4));
        link.cut(false);
        within(TWO_SECONDS, "a write", || {
            service.patch("/listings/1", "{}").status == 200
        });
        within(TWO_SECONDS, "a read", || {
            service.get("/listings/1").status == 200
        });
    });
    let (reads, writes) = count_refused(&responses);
    assert!(reads > 4 && writes > 4, "{reads} {writes}");
    let longest = responses.iter().map(|(_, response)| response.took).max();
    // A quarter of a second until the probe, a second for its answer, half a second in the queue of the pool.
    assert!(longest < Some(Duration::from_secs(3)), "{longest:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_that_end_or_lose_their_statements_fail_no_read() {
    let service = Service::start().await;
    for _ in 0..4 {
        service.post(LOFT);
    }
    let superuser = service.db().connect().await;
    let assert_served = |event: &str| {
        for _ in 0..20 {
            let ready = service.admin("/health/ready");
            assert_eq!(ready.status, 200, "{event}: {ready:?}");
            for path in [
                "/listings/1",
                "/listings/1/prices",
                "/listings",
                "/listings?limit=2",
            ] {
                let (status, log) = (service.get(path).status, service.log());
                assert_eq!(status, 200, "{event}: {path} {:?}", log.last());
            }
            let status = service.patch("/listings/1", "{}").status;
            assert_eq!(status, 200, "{event}");
        }
    };
    assert_served("at first");

    let ours = "from pg_stat_activity where application_name = 'listing-api' and datname = current_database()";
    let terminate = format!("select pg_terminate_backend(pid) {ours}");
    run(&superuser, &terminate).await;
    assert_served("sessions terminated");
    let runtime = tokio::runtime::Handle::current();
    let responses = under_load(&service, || {
        for _ in 0..4 {
            // Long enough to reconnect: a request that loses two connections may fail.
            thread::sleep(Duration::from_millis(500));
            thread::scope(|scope| {
                let end = || runtime.block_on(run(&superuser, &terminate));
                scope.spawn(end).join().expect("terminate the sessions");
            });
        }
    });
    let (reads, writes) = count_refused(&responses);
    let mut errors = service.log();
    errors.retain(|line| line.contains("ERROR"));
    assert!(reads == 0 && writes <= 16, "{reads} {writes} {errors:?}");

    let retype = "alter table listing alter column name type text";
    run(&superuser, retype).await;
    assert_served("a column type changed");

    // Each statement on a listing deallocates all prepared statements of its session.
    let forget = "create function forget() returns boolean language plpgsql as $$ begin execute 'deallocate all'; return true; end $$;
        alter table listing enable row level security;
        create policy forget on listing using (forget());";
    run(&superuser, forget).await;
    assert_served("statements deallocated");
    run(&superuser, "alter table listing disable row level security").await;

    let role = format!("{}_login", service.db().name);
    let limit = format!("alter role {role} set idle_session_timeout = '100ms'; {terminate}");
    run(&superuser, &limit).await;
    assert_served("sessions with an idle timeout");
    let idle = format!("select count(*) {ours} and query !~ 'transaction_read_only'");
    wait_for(&superuser, &idle, "0").await;
    assert_served("idle sessions ended");
}

#[tokio::test]
async fn a_server_without_a_free_connection_keeps_the_ones_that_are_open() {
    let service = Service::start_with(&[("WORKERS", "1")]).await;
    service.post(LOFT);
    assert_eq!(service.get("/listings/1").status, 200);
    let limit = format!("alter role {}_login connection limit 1", service.db().name);
    run(service.superuser(), &limit).await;
    run(service.superuser(), "begin; lock table listing").await;
    // One more client than there are open connections, so the pool asks for another.
    let mut clients: Vec<_> = (0..4).map(|_| service.connect()).collect();
    for client in &mut clients {
        client.request("GET", "/listings?limit=1", "", "");
    }
    service.logged("too many connections");
    run(service.superuser(), "rollback").await;
    for client in &mut clients {
        let status = client.receive("GET", "/listings").status;
        assert!([200, 503].contains(&status), "{status}");
    }
    // Longer than the service needs to mark a server as down.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(3) {
        assert_eq!(service.get("/listings/1").status, 200);
        assert_eq!(service.patch("/listings/1", "{}").status, 200);
    }
}

#[tokio::test]
async fn an_instance_that_opens_no_session_for_5_s_is_not_ready_until_it_can_again() {
    let ready = |service: &Service| service.admin("/health/ready").status == 200;
    let changes = [
        (
            "password 'other'",
            "password 'secret'",
            "password authentication failed",
        ),
        (
            "connection limit 0",
            "connection limit -1",
            "too many connections",
        ),
    ];
    for (change, repair, reason) in changes {
        let service = Service::start_with(&[("WORKERS", "1"), ("POOL_SIZE", "1")]).await;
        let alter = format!("alter role {}_login", service.db().name);
        service.post(LOFT);
        assert_eq!(service.get("/listings/1").status, 200);
        assert!(ready(&service));
        run(service.superuser(), &format!("{alter} {change}")).await;
        // Ends the session of the pool, but not those of the probe, the schema check and the lookup.
        let end = "select pg_terminate_backend(pid) from pg_stat_activity \
            where datname = current_database() and query ~ '^insert'";
        run(service.superuser(), end).await;
        let begun = Instant::now();
        assert_eq!(service.patch("/listings/1", "{}").status, 503);
        within(Duration::from_secs(9), "not ready", || {
            // The session of the lookup is open.
            assert_eq!(service.get("/listings/1").status, 200, "{reason}");
            !ready(&service)
        });
        assert!(begun.elapsed() >= Duration::from_secs(5), "{reason}");
        let report = service.admin("/health/ready");
        let said = "accepts writes, refuses new sessions: ";
        assert!(
            report.text().contains(said) && report.text().contains(reason),
            "{report:?}"
        );
        assert_eq!(service.get("/listings/1").status, 200, "{reason}");

        // An instance that is not ready gets no requests.
        run(service.superuser(), &format!("{alter} {repair}")).await;
        within(Duration::from_secs(3), "ready", || ready(&service));
        assert_eq!(service.patch("/listings/1", "{}").status, 200);
        assert_eq!(service.logged(said).len(), 1, "{:?}", service.log());
        let over = "accepts new sessions again";
        assert_eq!(service.logged(over).len(), 1, "{:?}", service.log());
    }
}

#[tokio::test]
async fn a_session_that_failed_long_ago_leaves_the_instance_ready() {
    let service = Service::start_with(&[("WORKERS", "1"), ("POOL_SIZE", "1")]).await;
    let alter = format!("alter role {}_login connection limit", service.db().name);
    run(service.superuser(), &format!("{alter} 0")).await;
    assert_eq!(service.post(LOFT).status, 503);
    run(service.superuser(), &format!("{alter} -1")).await;
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(7) {
        assert_eq!(service.admin("/health/ready").status, 200);
    }
}
