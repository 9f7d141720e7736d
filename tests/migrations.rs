//! The migrations, run by the refinery CLI on empty databases and on databases of the earlier services.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use tempfile::TempDir;
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use crate::support::{
    Cluster, Database, HISTORY, OTHER_COLUMNS, OTHER_VALUES, apply, assert_no_problem, connect,
    in_checkout, insert_listing, printed, program, refinery, rows, run, succeed, value,
};

/// The table as the earlier services created it.
const INHERITED_TABLE: &str = "create table listing ( \
    id serial not null, name varchar not null, description varchar not null, building_type varchar not null, \
    street_address varchar not null, postal_code varchar not null, city varchar not null, country varchar not null, \
    surface_area_m2 double precision not null, rooms_count integer not null, bedrooms_count integer not null, \
    price double precision not null, contact_phone_number varchar, \
    created_date timestamp without time zone, updated_date timestamp without time zone, primary key (id))";

/// The statement with which the earlier services insert a listing.
const INHERITED_INSERT: &str = "insert into listing (name, description, building_type, street_address, postal_code, \
    city, country, surface_area_m2, rooms_count, bedrooms_count, price, contact_phone_number, created_date, updated_date) \
    values ('Old', '', 'HOUSE', '', '', '', 'France', 12.5, 1, 0, $1, null, $2, $2) returning id";

/// A database of the earlier services with 299 listings. Its time zone is not UTC.
async fn inherited() -> Database {
    let db = Database::empty().await;
    let sql = format!(
        "alter database {} set timezone = 'Europe/Paris'; {INHERITED_TABLE}",
        db.name
    );
    run(&db.superuser, &sql).await;
    let fill = "insert into listing (name, description, building_type, street_address, postal_code, city, country, \
            surface_area_m2, rooms_count, bedrooms_count, price, contact_phone_number, created_date, updated_date) \
        select 'Listing ' || n, case when n % 3 = 0 then '' else 'Nice' end, (array['STUDIO', 'APARTMENT', 'HOUSE'])[1 + n % 3], \
            '', '', 'Paris', 'France', n * 1.1, 0, 0, \
            case n % 4 when 0 then 0.1::float + 0.2::float when 1 then 1e5 + n / 3.0::float when 2 then 9999999999.99 else n end, \
            case when n % 5 = 0 then '' end, \
            case when n % 7 <> 0 then timestamp '2020-03-29 02:30:00.123456' + n * interval '1 hour' end, \
            case when n % 11 <> 0 then timestamp '2021-03-28 02:30:00.654321' + n * interval '1 hour' end \
        from generate_series(1, 300) as n; delete from listing where id = 100";
    run(&db.superuser, fill).await;
    db
}

fn migrate(db: &Database) -> String {
    apply(&db.url(), &in_checkout("sql"))
}

/// A copy of the migrations that a test may change.
fn migrations() -> TempDir {
    let folder = TempDir::new().expect("a folder");
    for name in migration_names() {
        let copy = folder.path().join(&name);
        fs::copy(in_checkout("sql").join(name), copy).expect("copy a file");
    }
    folder
}

/// The file names of the migrations, by version.
fn migration_names() -> Vec<String> {
    let folder = fs::read_dir(in_checkout("sql")).expect("read sql/");
    let name = |entry: std::io::Result<fs::DirEntry>| {
        let name = entry.expect("a folder entry").file_name();
        name.into_string().expect("a name in UTF-8")
    };
    let mut names: Vec<_> = folder.map(name).collect();
    names.sort_by_key(|name| version(name));
    names
}

fn version(name: &str) -> Option<u32> {
    name.strip_prefix('V')?.split_once("__")?.0.parse().ok()
}

/// The schema of a database as SQL.
fn catalogue(db: &Database) -> String {
    let mut pg_dump = program("pg_dump");
    pg_dump.args(["--schema-only", &format!("--dbname={}", db.url())]);
    // These lines contain a key that is different in each dump.
    let restrict =
        |line: &&str| !line.starts_with("\\restrict") && !line.starts_with("\\unrestrict");
    let dump = succeed(pg_dump, "");
    dump.lines().filter(restrict).collect::<Vec<_>>().join("\n")
}

/// Asserts that no migration has left anything in a database.
async fn assert_empty(client: &Client) {
    let tables = "select relname from pg_class where relnamespace = 'public'::regnamespace and relname !~ '^refinery'";
    assert_eq!(rows(client, tables).await, [""; 0]);
    assert_eq!(rows(client, "table refinery_schema_history").await, [""; 0]);
}

#[test]
fn every_migration_has_a_valid_name_and_no_version_is_missing() {
    let names = migration_names();
    for (number, name) in (1..).zip(&names) {
        assert_eq!(version(name), Some(number), "{name}: a version is missing");
        let verb_object = name
            .split_once("__")
            .expect("__ in the name")
            .1
            .strip_suffix(".sql")
            .expect(".sql at the end");
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        assert!(
            !verb_object.is_empty() && verb_object.chars().all(plain),
            "{name}"
        );
    }
    assert!(names.len() >= 5);
}

#[tokio::test]
async fn the_cli_migrates_an_empty_database_and_does_nothing_the_second_time() {
    let db = Database::empty().await;
    migrate(&db);
    let applied = rows(&db.superuser, "table refinery_schema_history").await;
    assert_eq!(applied.len(), migration_names().len());
    let before = catalogue(&db);

    let output = migrate(&db);

    assert!(output.contains("no migrations to apply"), "{output}");
    assert_eq!(
        rows(&db.superuser, "table refinery_schema_history").await,
        applied
    );
    assert_eq!(catalogue(&db), before);
}

#[tokio::test]
async fn a_changed_file_stops_the_cli() {
    let db = Database::migrated().await;
    let folder = migrations();
    let changed = folder.path().join(&migration_names()[1]);
    let sql = fs::read_to_string(&changed).expect("a migration");
    fs::write(&changed, format!("{sql}\n-- changed\n")).expect("change a file");
    fs::write(
        folder.path().join("V99__add.sql"),
        "create table public.added ()",
    )
    .expect("change a file");
    assert_stopped(
        &db,
        folder.path(),
        "applied migration V2__harden_listing is different than filesystem one",
    )
    .await;
}

#[tokio::test]
async fn a_missing_file_stops_the_cli() {
    let db = Database::migrated().await;
    let folder = migrations();
    fs::remove_file(folder.path().join(&migration_names()[2])).expect("change a file");
    fs::write(
        folder.path().join("V99__add.sql"),
        "create table public.added ()",
    )
    .expect("change a file");
    assert_stopped(
        &db,
        folder.path(),
        "migration V3__log_listing_prices is missing",
    )
    .await;
}

#[tokio::test]
async fn a_failing_statement_stops_the_cli() {
    let db = Database::migrated().await;
    let folder = migrations();
    fs::write(
        folder.path().join("V98__add.sql"),
        "create table public.added ()",
    )
    .expect("change a file");
    fs::write(folder.path().join("V99__fail.sql"), "select 1 / 0").expect("change a file");
    assert_stopped(&db, folder.path(), "division by zero").await;
}

/// Asserts that the CLI fails with these words and changes nothing.
async fn assert_stopped(db: &Database, folder: &Path, words: &str) {
    let before = catalogue(db);
    let applied = rows(&db.superuser, "table refinery_schema_history").await;
    let output = db.migrate(folder);
    assert!(!output.status.success());
    assert!(printed(&output).contains(words), "{}", printed(&output));
    assert_eq!(catalogue(db), before);
    assert_eq!(
        rows(&db.superuser, "table refinery_schema_history").await,
        applied
    );
}

#[tokio::test]
async fn the_first_migration_is_all_or_nothing() {
    let db = Database::empty().await;
    let folder = migrations();
    fs::write(folder.path().join("V99__fail.sql"), "select 1 / 0").expect("change a file");
    let output = db.migrate(folder.path());
    assert!(!output.status.success());
    assert_empty(&db.superuser).await;
}

#[tokio::test]
async fn a_migration_of_a_locked_table_fails_instead_of_blocking_others() {
    let db = inherited().await;
    let reader = db.connect().await;
    run(&reader, "begin; select from listing").await;
    let output = db.migrate(&in_checkout("sql"));
    assert!(!output.status.success());
    assert!(
        printed(&output).contains("lock timeout"),
        "{}",
        printed(&output)
    );
    run(&reader, "commit").await;
    migrate(&db);
}

#[tokio::test]
async fn the_last_migration_applies_to_tables_with_data() {
    let db = Database::empty().await;
    let folder = migrations();
    let names = migration_names();
    let last = folder.path().join(names.last().expect("a migration"));
    fs::remove_file(last).expect("change a file");
    apply(&db.url(), folder.path());
    run(&db.superuser, &insert_listing(1, "1")).await;
    run(&db.superuser, "update listing set price = 2").await;

    migrate(&db);

    run(&db.superuser, "update listing set price = 3").await;
    let expected = ["1|null|1.00", "1|1.00|2.00", "1|2.00|3.00"];
    assert_eq!(rows(&db.superuser, HISTORY).await, expected);
    assert_no_problem(&db.superuser).await;
    assert_eq!(catalogue(&db), catalogue(&Database::migrated().await));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_backfill_misses_no_concurrent_write() {
    let db = inherited().await;
    let folder = migrations();
    for name in migration_names().iter().skip(2) {
        fs::remove_file(folder.path().join(name)).expect("change a file");
    }
    apply(&db.url(), folder.path());
    let written = Arc::new(AtomicUsize::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let mut writers = Vec::new();
    for writer in 0..4 {
        let (client, written, stop) = (db.connect().await, written.clone(), stop.clone());
        writers.push(tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let number = written.fetch_add(1, Ordering::Relaxed);
                let id = 1 + (number * 7 + writer) % 90;
                let sql = format!("update listing set price = {number} where id = {id}");
                run(&client, &sql).await;
            }
        }));
    }
    wait_for_more(&written).await;

    migrate(&db);

    let before = value(
        &db.superuser,
        "select count(*) from listing_price_log where old_price is not null",
    )
    .await;
    wait_for_more(&written).await;
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.expect("a writer without a failure");
    }
    let more = format!(
        "select count(*) filter (where old_price is null), count(*) filter (where old_price is not null) > {before} \
         from listing_price_log"
    );
    assert_eq!(rows(&db.superuser, &more).await, ["299|t"]);
    assert_no_problem(&db.superuser).await;
}

/// Waits for 200 more writes.
async fn wait_for_more(written: &AtomicUsize) {
    let enough = written.load(Ordering::Relaxed) + 200;
    let begun = Instant::now();
    while written.load(Ordering::Relaxed) < enough {
        assert!(begun.elapsed() < Duration::from_secs(30), "no more writes");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn every_object_has_a_comment() {
    let db = Database::migrated().await;
    let silent = "select relname::text from pg_class where relnamespace = 'public'::regnamespace and relkind in ('r', 'v') \
            and obj_description(oid, 'pg_class') is null and relname <> 'refinery_schema_history' \
        union all select proname from pg_proc where pronamespace = 'public'::regnamespace \
            and obj_description(oid, 'pg_proc') is null \
        union all select tgname from pg_trigger where not tgisinternal and obj_description(oid, 'pg_trigger') is null \
        union all select attname from pg_attribute where attrelid in ('listing_price_log'::regclass, 'api_key'::regclass) \
            and attnum > 0 \
            and col_description(attrelid, attnum) is null";
    assert_eq!(rows(&db.superuser, silent).await, [""; 0]);
}

#[tokio::test]
async fn a_migration_keeps_an_index_that_was_built_concurrently() {
    let db = Database::migrated().await;
    let folder = migrations();
    let file = folder.path().join("V99__index_listing_city.sql");
    // The CLI cannot do this: it sends every file inside a transaction.
    fs::write(
        &file,
        "create index concurrently city on public.listing (city)",
    )
    .expect("change a file");
    let words = "CREATE INDEX CONCURRENTLY cannot run inside a transaction block";
    assert_stopped(&db, folder.path(), words).await;

    run(
        &db.superuser,
        "create index concurrently city on public.listing (city)",
    )
    .await;
    let index = "select 'public.city'::regclass::oid, pg_relation_filenode('public.city')";
    let built = rows(&db.superuser, index).await;
    fs::write(
        &file,
        "create index if not exists city on public.listing (city)",
    )
    .expect("change a file");
    apply(&db.url(), folder.path());
    assert_eq!(rows(&db.superuser, index).await, built);
}

#[tokio::test]
async fn an_inherited_database_migrates_without_loss() {
    let db = inherited().await;
    let kept = "id, name, description, building_type, street_address, postal_code, city, country, surface_area_m2, \
        rooms_count, bedrooms_count, contact_phone_number";
    let kept = format!("select {kept} from listing order by id");
    let before = rows(&db.superuser, &kept).await;
    run(&db.superuser, "create table old as select * from listing").await;

    migrate(&db);

    let now = db.connect().await;
    assert_eq!(rows(&now, &kept).await, before);
    assert_eq!(before.len(), 299);
    let prices = "select price from listing where id in (1, 2, 3, 4) order by id";
    assert_eq!(
        rows(&now, prices).await,
        ["100000.33", "9999999999.99", "3.00", "0.30"]
    );
    let wrong_prices = "select count(*) from listing join old using (id) where abs(listing.price - old.price::numeric) > 0.005";
    assert_eq!(value(&now, wrong_prices).await, "0");
    // The dates without a time zone were read as UTC. A missing date became the other date, or the time of the migration.
    let wrong_dates = "select count(*) from listing join old using (id) where \
        listing.created_date is distinct from \
            coalesce(old.created_date at time zone 'UTC', old.updated_date at time zone 'UTC', listing.created_date) \
        or listing.updated_date is distinct from \
            coalesce(old.updated_date at time zone 'UTC', old.created_date at time zone 'UTC', listing.updated_date) \
        or greatest(listing.created_date, listing.updated_date) > now()";
    assert_eq!(value(&now, wrong_dates).await, "0");
    let log = "select count(*), count(distinct listing_id), count(*) filter (where old_price is null), \
            min(changed_by), max(changed_by) from listing_price_log";
    assert_eq!(rows(&now, log).await, ["299|299|299|backfill|backfill"]);
    let dates = "select count(*) from listing join listing_price_log as log on log.listing_id = listing.id \
        where log.changed_at = listing.updated_date and log.new_price = listing.price";
    assert_eq!(value(&now, dates).await, "299");
    assert_no_problem(&now).await;
    // Every inherited row passes the checks at its next update.
    run(
        &now,
        "update listing set name = name || '!', price = price / 2",
    )
    .await;
    assert_no_problem(&now).await;
}

#[tokio::test]
async fn a_date_in_the_future_does_not_put_the_history_out_of_order() {
    let db = inherited().await;
    run(
        &db.superuser,
        "update listing set updated_date = '2999-01-01' where id = 1",
    )
    .await;
    migrate(&db);
    let late = "select count(*) from listing_price_log where changed_at > clock_timestamp()";
    assert_eq!(value(&db.superuser, late).await, "0");
}

#[tokio::test]
async fn an_older_client_keeps_working_and_its_prices_are_logged() {
    let db = inherited().await;
    // This session stays open during the migration, like a service that is not stopped. Its time zone is that of the server.
    let old_client = db.connect().await;
    run(&old_client, "set timezone = 'UTC'").await;
    migrate(&db);
    for client in [old_client, db.connect().await] {
        let types = [Type::FLOAT8, Type::TIMESTAMP];
        let insert = client
            .prepare_typed(INHERITED_INSERT, &types)
            .await
            .expect("prepare");
        let noon = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let row = client
            .query_one(&insert, &[&(0.1 + 0.2), &noon])
            .await
            .expect("a row");
        let id: i32 = row.get("id");
        let update = "update listing set price = $1, updated_date = $2 where id = $3";
        let types = [Type::FLOAT8, Type::TIMESTAMP, Type::INT4];
        let update = client.prepare_typed(update, &types).await.expect("prepare");
        client
            .execute(&update, &[&19.99, &noon, &id])
            .await
            .expect("update");
        let text =
            format!("update listing set created_date = '2023-11-14 22:13:20' where id = {id}");
        run(&client, &text).await;

        let dates = format!(
            "select extract(epoch from created_date)::bigint, extract(epoch from updated_date)::bigint from listing where id = {id}"
        );
        assert_eq!(rows(&db.superuser, &dates).await, ["1700000000|1700000000"]);
        let log = format!(
            "select old_price, new_price from listing_price_log where listing_id = {id} order by id"
        );
        assert_eq!(rows(&db.superuser, &log).await, ["null|0.30", "0.30|19.99"]);
    }
    assert_no_problem(&db.superuser).await;
}

#[tokio::test]
async fn an_inherited_row_that_breaks_a_rule_stops_the_migration_with_the_name_of_the_rule() {
    let db = inherited().await;
    run(&db.superuser, "update listing set price = -1 where id = 7").await;
    let output = db.migrate(&in_checkout("sql"));
    assert!(!output.status.success());
    assert!(
        printed(&output).contains("listing_price_is_not_negative"),
        "{}",
        printed(&output)
    );
    let column = "select data_type from information_schema.columns where table_name = 'listing' and column_name = 'price'";
    assert_eq!(value(&db.superuser, column).await, "double precision");
}

#[tokio::test]
async fn new_and_inherited_databases_end_with_the_same_schema() {
    let fresh = Database::migrated().await;
    let inherited = inherited().await;
    migrate(&inherited);
    assert_eq!(catalogue(&fresh), catalogue(&inherited));
}

#[tokio::test]
async fn a_role_that_may_not_set_the_time_zone_is_told_what_to_run() {
    let cluster = Cluster::start();
    let superuser = cluster.superuser().await;
    run(
        &superuser,
        "create role builder login password 'secret'; grant all on schema public to builder; \
         alter database listing set timezone = 'Europe/Paris'",
    )
    .await;
    let (_, address) = cluster.url.rsplit_once('@').expect("user:password@address");
    let url = format!("postgres://builder:secret@{address}");

    let output = refinery(&url, &in_checkout("sql"));

    let refused = printed(&output);
    assert!(!output.status.success());
    let reason = "the time zone of this database is Europe/Paris, and builder may not change it";
    assert!(refused.contains(reason), "{refused}");
    let hint = "alter database listing set timezone = 'UTC';";
    assert!(refused.contains(hint), "{refused}");
    run(&superuser, hint).await;
    run(
        &superuser,
        "create role listing_api nologin; create role listing_auditor nologin",
    )
    .await;
    apply(&url, &in_checkout("sql"));
}

#[tokio::test]
async fn a_role_that_may_not_create_roles_is_told_what_to_run() {
    // Roles belong to the whole cluster, and the cluster of the other tests already has them.
    let cluster = Cluster::start();
    let superuser = cluster.superuser().await;
    run(&superuser, "create role builder login password 'secret'").await;
    run(&superuser, "create database built owner builder").await;
    let (_, address) = cluster.url.rsplit_once('@').expect("user:password@address");
    let address = address.strip_suffix("/listing").expect("host/database");
    let url = format!("postgres://builder:secret@{address}/built");

    let output = refinery(&url, &in_checkout("sql"));

    let refused = printed(&output);
    assert!(!output.status.success());
    assert!(
        refused.contains("builder may not create the role listing_api"),
        "{refused}"
    );
    let hint = "create role listing_api nologin; create role listing_auditor nologin;";
    assert!(refused.contains(hint), "{refused}");
    run(&superuser, hint).await;
    apply(&url, &in_checkout("sql"));
    // The owner of everything has no special privilege, and everything works.
    let mut config = cluster.config.clone();
    let builder = connect(config.user("builder").password("secret").dbname("built")).await;
    run(
        &builder,
        &format!("insert into listing (price, {OTHER_COLUMNS}) values (1, {OTHER_VALUES})"),
    )
    .await;
    run(&builder, "update listing set price = 2").await;
    assert_no_problem(&builder).await;
    assert_eq!(
        value(&builder, "select listing_price_log_prune(now())").await,
        "1"
    );
    assert_eq!(value(&builder, "show timezone").await, "UTC");
}
