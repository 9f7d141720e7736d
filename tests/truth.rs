//! Under concurrency, the log of each listing is a chain in the order of the commits.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio_postgres::error::SqlState;

use crate::support::{Database, assert_no_problem, insert_listing, rows, run, value, wait_for};

const SESSIONS: usize = 12;
const ROUNDS: usize = 40;
const LISTINGS: usize = 6;

/// No price is used twice, so every update changes the price.
static PRICE: AtomicUsize = AtomicUsize::new(1);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_sessions_log_exactly_the_committed_changes_as_chains() {
    let db = Database::migrated().await;
    for id in 0..LISTINGS {
        run(
            &db.superuser,
            &insert_listing(i32::try_from(id).expect("a small id"), "0"),
        )
        .await;
    }

    let mut sessions = Vec::new();
    for session in 0..SESSIONS {
        let client = db.connect().await;
        sessions.push(tokio::spawn(async move {
            let mut committed = 0;
            for round in 0..ROUNDS {
                // Scattered, and the same in every run. Within a transaction the ids rise, so there is no deadlock.
                let first = (session * 7 + round * 5) % LISTINGS;
                let ids = first..(first + 1 + (session + round) % 3).min(LISTINGS);
                let isolation = ["read committed", "serializable"][usize::from(session % 4 == 3)];
                // Takes the snapshot and now() before the writes for which the transaction will wait.
                run(&client, &format!("begin isolation level {isolation}; select from listing")).await;
                if session % 2 == 0 {
                    tokio::time::sleep(Duration::from_millis(round as u64 % 5)).await;
                }
                let mut changes = 0;
                let mut refused = false;
                for id in ids {
                    let price = PRICE.fetch_add(1, Ordering::Relaxed);
                    let sql = format!(
                        "update listing set price = {price} where id = {id}; update listing set name = 'x' where id = {id}"
                    );
                    refused = !serialized(client.batch_execute(&sql).await);
                    if refused {
                        break;
                    }
                    changes += 1;
                }
                if refused || round % 4 == 1 {
                    run(&client, "rollback").await;
                } else if serialized(client.batch_execute("commit").await) {
                    committed += changes;
                }
            }
            committed
        }));
    }
    let mut committed = 0;
    for session in sessions {
        committed += session.await.expect("a session");
    }
    assert!(
        committed > SESSIONS * ROUNDS / 2,
        "{committed} changes: too few to show anything"
    );

    let changes = value(
        &db.superuser,
        "select count(*) from listing_price_log where old_price is not null",
    )
    .await;
    assert_eq!(changes, committed.to_string());
    let steps = "select count(*) filter (where old_price is distinct from previous_price), \
            count(*) filter (where changed_at < previous_changed_at) \
        from (select *, lag(new_price) over history as previous_price, lag(changed_at) over history as previous_changed_at \
            from listing_price_log window history as (partition by listing_id order by id)) as step";
    assert_eq!(rows(&db.superuser, steps).await, ["0|0"]);
    let last = "select count(*) from listing where price is distinct from \
        (select new_price from listing_price_log where listing_id = listing.id order by id desc limit 1)";
    assert_eq!(value(&db.superuser, last).await, "0");
    assert_no_problem(&db.superuser).await;
}

/// Whether a statement succeeded. The only error allowed is a serialization failure, also at the commit.
fn serialized(result: Result<(), tokio_postgres::Error>) -> bool {
    match result {
        Ok(()) => true,
        Err(error) if error.code() == Some(&SqlState::T_R_SERIALIZATION_FAILURE) => false,
        Err(error) => panic!("{error:?}"),
    }
}

#[tokio::test]
async fn a_change_is_dated_by_its_write_and_not_by_the_begin_of_its_transaction() {
    let db = Database::migrated().await;
    run(&db.superuser, &insert_listing(1, "1")).await;
    run(&db.superuser, "begin; select from listing").await;
    let other = db.connect().await;
    run(&other, "update listing set price = 2").await;
    run(&db.superuser, "update listing set price = 3; commit").await;
    let log = "select new_price, changed_at > lag(changed_at) over (order by id) from listing_price_log order by id";
    assert_eq!(rows(&other, log).await, ["1.00|null", "2.00|t", "3.00|t"]);
}

#[tokio::test]
async fn a_write_that_waited_for_a_row_lock_is_dated_after_the_other_write() {
    let db = Database::migrated().await;
    run(&db.superuser, &insert_listing(1, "1")).await;
    run(&db.superuser, "begin; update listing set price = 2").await;
    let waiting = db.connect().await;
    let pid = value(&waiting, "select pg_backend_pid()").await;
    let waiter = tokio::spawn(async move { run(&waiting, "update listing set price = 3").await });
    let blocked = format!("select cardinality(pg_blocking_pids({pid})) > 0");
    wait_for(&db.superuser, &blocked, "t").await;
    run(&db.superuser, "commit").await;
    waiter.await.expect("the other writer");
    let log = "select old_price, new_price, changed_at > lag(changed_at) over (order by id) \
        from listing_price_log order by id";
    assert_eq!(
        rows(&db.superuser, log).await,
        ["null|1.00|null", "1.00|2.00|t", "2.00|3.00|t"]
    );
}
