//! Restored backups and logical replicas have the same log, with no row twice.

use std::time::{Duration, Instant};

use tokio_postgres::Client;

use crate::support::{
    Cluster, Database, apply, assert_no_problem, connect, in_checkout, insert_listing, program,
    rows, run, succeed, value,
};

/// Prices, deletions and maintenance, each table whole.
const WHOLE_LOG: &str = "select to_jsonb(log) from public.listing_price_log as log order by listing_id, id; \
    select to_jsonb(deletion) from public.listing_deletion as deletion order by listing_id, id; \
    select to_jsonb(task) from public.listing_price_log_maintenance as task order by id";

const TABLES: &str = "listing, listing_price_log, listing_deletion, listing_price_log_maintenance";

async fn write_some_history(client: &Client) {
    for id in 1..=4 {
        run(client, &insert_listing(id, "1")).await;
    }
    run(
        client,
        "select setval('listing_id_seq', 4); update listing set price = price + id; \
         update listing set price = 9 where id = 2; delete from listing where id = 4; \
         create temporary table given as select 3 as id, 5 as price, date '2020-01-01' as day; \
         select import_price_history('given', 'id', 'price', 'day'); \
         select prune_price_history('2020-01-02')",
    )
    .await;
    // Three listings with two prices, another price of one, an imported one, a deletion and an import.
    assert_eq!(rows(client, WHOLE_LOG).await.len(), 10);
}

/// Asserts that a copy has the log of the original and keeps logging.
async fn assert_same_and_logging(copy: &Client, log: &[String]) {
    assert_eq!(rows(copy, WHOLE_LOG).await, log);
    assert_no_problem(copy).await;
    run(copy, &insert_listing(5, "4")).await;
    run(copy, "update listing set price = price + 1").await;
    assert_eq!(rows(copy, WHOLE_LOG).await.len(), log.len() + 5);
    run(copy, "delete from listing where id = 5").await;
    let last = "select id, last_price from listing_deletion where listing_id = 5 \
        and id > all (select id from listing_price_log)";
    assert_eq!(rows(copy, last).await.len(), 1);
    assert_no_problem(copy).await;
}

fn dump(db: &Database, options: &[&str]) -> String {
    let mut pg_dump = program("pg_dump");
    pg_dump.args(options).arg(format!("--dbname={}", db.url()));
    succeed(pg_dump, "")
}

fn restore(db: &Database, dump: &str) {
    let mut psql = program("psql");
    psql.args([
        "--quiet",
        "--no-psqlrc",
        "--single-transaction",
        "--set=ON_ERROR_STOP=1",
        &db.url(),
    ]);
    succeed(psql, dump);
}

#[tokio::test]
async fn a_dump_of_the_whole_database_restores_the_same_log() {
    let original = Database::migrated().await;
    write_some_history(&original.superuser).await;
    let log = rows(&original.superuser, WHOLE_LOG).await;
    let copy = Database::empty().await;
    restore(&copy, &dump(&original, &[]));
    assert_same_and_logging(&copy.superuser, &log).await;
}

#[tokio::test]
async fn an_archive_restored_by_pg_restore_holds_the_same_log() {
    let original = Database::migrated().await;
    write_some_history(&original.superuser).await;
    let log = rows(&original.superuser, WHOLE_LOG).await;
    let folder = tempfile::tempdir().expect("a folder");
    let archive = folder.path().join("archive");
    let mut pg_dump = program("pg_dump");
    pg_dump.args(["--format=custom", &format!("--dbname={}", original.url())]);
    pg_dump.arg("--file").arg(&archive);
    succeed(pg_dump, "");
    // On another server, without the roles: a dump does not contain them.
    let cluster = Cluster::start();
    let copy = cluster.superuser().await;
    run(
        &copy,
        "create role listing_api nologin; create role listing_auditor nologin",
    )
    .await;
    let mut pg_restore = program("pg_restore");
    pg_restore.args([
        "--exit-on-error",
        "--jobs=2",
        &format!("--dbname={}", cluster.url),
    ]);
    pg_restore.arg(&archive);
    succeed(pg_restore, "");
    assert_eq!(rows(&copy, WHOLE_LOG).await, log);
    // The new server has given out fewer transaction numbers.
    let problems = "select problem, mend from listing_price_log_problem";
    let expected = "transaction numbers from the future|select public.restart_change_feed();";
    assert_eq!(rows(&copy, problems).await, [expected]);
    run(&copy, "select public.restart_change_feed()").await;
    let log = rows(&copy, WHOLE_LOG).await;
    assert_same_and_logging(&copy, &log).await;
}

#[tokio::test]
async fn a_data_only_dump_restores_the_same_log_with_disabled_triggers() {
    let original = Database::migrated().await;
    write_some_history(&original.superuser).await;
    let log = rows(&original.superuser, WHOLE_LOG).await;
    let options = [
        "--data-only",
        "--disable-triggers",
        "--exclude-table=refinery_schema_history",
    ];
    let copy = Database::migrated().await;
    restore(&copy, &dump(&original, &options));
    assert_same_and_logging(&copy.superuser, &log).await;
}

#[tokio::test]
async fn the_owner_can_restore_data_without_a_superuser() {
    let original = Database::migrated().await;
    write_some_history(&original.superuser).await;
    let log = rows(&original.superuser, WHOLE_LOG).await;
    let data = dump(
        &original,
        &["--data-only", "--exclude-table=refinery_schema_history"],
    );
    let copy = Database::migrated().await;
    restore(
        &copy,
        &format!(
            "alter table public.listing disable trigger user;\n{data}\nalter table public.listing enable trigger user;\n"
        ),
    );
    assert_same_and_logging(&copy.superuser, &log).await;
}

/// A publisher and a subscriber. They have a cluster of their own, because a database with a slot cannot be dropped.
async fn publish(tables: &str, prepare_subscriber: &str) -> (Cluster, Client, Client) {
    let cluster = Cluster::start();
    let publisher = cluster.superuser().await;
    run(&publisher, "create database subscriber").await;
    let subscriber = connect(cluster.config.clone().dbname("subscriber")).await;
    for url in [
        cluster.url.clone(),
        cluster.url.replace("/listing", "/subscriber"),
    ] {
        apply(&url, &in_checkout("sql"));
    }
    write_some_history(&publisher).await;
    run(
        &publisher,
        &format!(
            "create publication prices for table {tables}; \
             create publication keys for table idempotency_key with (publish = 'insert')"
        ),
    )
    .await;
    // Within one cluster, `create subscription` would wait for itself if it created the slot.
    run(
        &publisher,
        "select pg_create_logical_replication_slot('prices', 'pgoutput')",
    )
    .await;
    run(&subscriber, prepare_subscriber).await;
    let subscription = format!(
        "create subscription prices connection '{}' publication prices, keys with (create_slot = false)",
        cluster.url
    );
    run(&subscriber, &subscription).await;
    (cluster, publisher, subscriber)
}

/// Waits until a query returns the same rows in both databases.
async fn wait_until_equal(publisher: &Client, subscriber: &Client, sql: &str) {
    let expected = rows(publisher, sql).await;
    let begun = Instant::now();
    while rows(subscriber, sql).await != expected {
        assert!(
            begun.elapsed() < Duration::from_mins(1),
            "{sql}: no replication within a minute"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_logical_replica_of_all_tables_holds_the_same_log_with_each_deletion_once() {
    let (_cluster, publisher, subscriber) = publish(TABLES, "").await;
    wait_until_equal(&publisher, &subscriber, WHOLE_LOG).await;
    run(
        &publisher,
        "update listing set price = price + 1; delete from listing where id = 3; \
         select replace_actor('postgres', 'somebody'); select prune_price_history('infinity')",
    )
    .await;
    run(&publisher, &insert_listing(5, "5")).await;
    run(
        &publisher,
        "insert into idempotency_key (key, body_sha256, listing_id, created_at) \
         values ('a', 'x', 1, now() - interval '2 days')",
    )
    .await;
    wait_until_equal(&publisher, &subscriber, "select * from idempotency_key").await;
    // Its removal is not published, so it needs no replica identity.
    let prune = "select prune_idempotency_keys()";
    assert_eq!(value(&publisher, prune).await, "1");
    assert_eq!(value(&subscriber, prune).await, "1");
    wait_until_equal(&publisher, &subscriber, "select * from listing order by id").await;
    wait_until_equal(&publisher, &subscriber, WHOLE_LOG).await;
    assert_no_problem(&subscriber).await;
}

#[tokio::test]
async fn a_logical_replica_of_only_the_listings_can_keep_its_own_log() {
    let (_cluster, publisher, subscriber) = publish(
        "listing",
        "do $$ declare name text; begin \
            for name in select tgname from pg_trigger \
                where tgrelid = 'listing'::regclass and tgname <> 'listing_updated_date_set_on_update' \
            loop execute format('alter table listing enable always trigger %I', name); end loop; \
         end $$",
    )
    .await;
    let listings = "select * from listing order by id";
    wait_until_equal(&publisher, &subscriber, listings).await;
    run(
        &publisher,
        "update listing set price = price + 1 where id = 1; delete from listing where id = 2",
    )
    .await;
    wait_until_equal(&publisher, &subscriber, listings).await;
    let log = "select listing_id, old_price, new_price from listing_price_log where listing_id in (1, 2) order by id; \
        select listing_id, last_price from listing_deletion";
    let expected = ["1|null|2.00", "1|2.00|3.00", "2|9.00"];
    assert_eq!(rows(&subscriber, log).await, expected);
    assert_no_problem(&subscriber).await;
}

#[tokio::test]
async fn a_publication_of_the_log_delivers_committed_inserts_alone_in_the_order_of_commits() {
    let cluster = Cluster::migrated();
    let (first, second) = (cluster.superuser().await, cluster.superuser().await);
    run(&first, &insert_listing(1, "100")).await;
    run(&first, &insert_listing(2, "200")).await;
    run(
        &first,
        "create role capture login replication password 'capture'; \
         create publication price_changes for table listing_price_log, listing_deletion with (publish = 'insert')",
    )
    .await;
    let mut capture = cluster.config.clone();
    let capture = connect(capture.user("capture").password("capture")).await;
    let slot = "select pg_create_logical_replication_slot('price_changes', 'pgoutput')";
    run(&capture, slot).await;
    run(&first, "begin; update listing set price = 101 where id = 1").await;
    run(
        &second,
        "begin; update listing set price = 999 where id = 2; rollback",
    )
    .await;
    run(&second, "update listing set price = 201 where id = 2").await;
    run(&first, "commit").await;
    run(&second, "delete from listing where id = 1").await;
    run(&second, "select prune_price_history('infinity')").await;
    // The kind of each message, and the prices in it. An I is an insert, a D would be a delete.
    let messages = r"select chr(get_byte(data, 0)), array(
            select match[1] from regexp_matches(encode(data, 'escape'), '(\d+\.00)t', 'g') as match)
        from pg_logical_slot_get_binary_changes('price_changes', null, null,
            'proto_version', '1', 'publication_names', 'price_changes')
        where chr(get_byte(data, 0)) in ('I', 'U', 'D', 'T')";
    assert_eq!(
        rows(&capture, messages).await,
        ["I|{200.00,201.00}", "I|{100.00,101.00}", "I|{101.00}"]
    );
    assert_no_problem(&second).await;
}
