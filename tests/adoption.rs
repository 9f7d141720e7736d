//! Databases of the earlier services, with price histories that other people added to them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};
use std::{fs, iter};

use tokio_postgres::types::Type;

use crate::support::{
    Database, HISTORY, Service, WAITING, apply, assert_no_problem, catalogue, in_checkout,
    insert_listing, migrate, migration_names, migrations, printed, refusal, rows, run, value,
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
            .execute(&update, &[&19.99, &(noon + Duration::from_secs(1)), &id])
            .await
            .expect("update");
        let text =
            format!("update listing set created_date = '2023-11-14 22:13:20' where id = {id}");
        run(&client, &text).await;

        let dates = format!(
            "select extract(epoch from created_date)::bigint, extract(epoch from updated_date)::bigint from listing where id = {id}"
        );
        assert_eq!(rows(&db.superuser, &dates).await, ["1700000000|1700000001"]);
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_backfill_misses_no_concurrent_write() {
    let db = inherited().await;
    let folder = migrations();
    for name in migration_names().iter().skip(1) {
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

/// A table of prices that somebody added to the earlier service.
struct History {
    /// Creates the table and what fills it from now on.
    create: &'static str,
    /// The moments are the start of a day in UTC.
    fill: &'static str,
    /// The arguments of `import_price_history`, or nothing if the migration imports the table.
    import: &'static str,
    drop: &'static str,
}

const HISTORIES: [History; 6] = [
    History {
        create: "create table listing_price_log (id serial primary key, \
                listing_id integer not null references listing (id), price_change float8, updated_time timestamp); \
            create index on listing_price_log (listing_id); \
            create function log_change() returns trigger language plpgsql as $$ begin \
                insert into listing_price_log (listing_id, price_change, updated_time) values (new.id, new.price, now()); \
                return new; \
            end $$; \
            create trigger log_price after insert on listing for each row execute function log_change(); \
            create trigger log_change after update of price on listing for each row \
                when (old.price is distinct from new.price) execute function log_change()",
        fill: "insert into listing_price_log (listing_id, price_change, updated_time) values \
            (1, 100, '2020-01-01'), (1, 120.5, '2020-06-01'), (1, 110, '2020-12-01'), (2, 50, '2020-03-01')",
        import: "",
        drop: "drop table earlier_listing_price_log; drop function log_change()",
    },
    History {
        create: "create table price_history (id bigserial primary key, listing_id integer references listing (id), \
            price numeric(10,2), created_at timestamp default now())",
        // In the order of insertion, not of time.
        fill: "insert into price_history (listing_id, price, created_at) values \
            (1, 110, '2020-12-01'), (2, 50, '2020-03-01'), (1, 120.5, '2020-06-01'), (1, 100, '2020-01-01')",
        import: "'price_history', 'listing_id', 'price', 'created_at'",
        drop: "drop table price_history",
    },
    History {
        create: "create table listing_price_history (listing_id integer not null, new_price numeric not null, \
            changed_at timestamptz not null, primary key (listing_id, changed_at))",
        fill: "insert into listing_price_history values (1, 100, '2020-01-01 00:00Z'), (1, 120.499, '2020-06-01 02:00+02'), \
            (1, 110, '2020-12-01 00:00Z'), (2, 50, '2020-02-29 19:00-05')",
        import: "'listing_price_history', 'listing_id', 'new_price', 'changed_at'",
        drop: "drop table listing_price_history",
    },
    History {
        create: "create table prices (listing integer, day date, amount numeric)",
        fill: "insert into prices values (1, '2020-01-01', 100), (1, '2020-01-02', 100), (1, '2020-06-01', 120.50), \
            (1, '2020-12-01', 110), (2, '2020-03-01', 50)",
        import: "'prices', 'listing', 'amount', 'day'",
        drop: "drop table prices",
    },
    History {
        create: "create schema audit; create table audit.\"Price\" (\"listingId\" integer, price_eur real, updated_date timestamp)",
        fill: "insert into audit.\"Price\" values (1, 100, '2020-01-01'), (1, 120.5, '2020-06-01'), (1, 110, '2020-12-01'), \
            (2, 50, '2020-03-01')",
        import: "'audit.\"Price\"', 'listingId', 'price_eur', 'updated_date'",
        drop: "drop schema audit cascade",
    },
    History {
        create: "create table old_prices (listing_id bigint, cents bigint, price float8 generated always as (cents / 100.0) stored, \
            at timestamptz)",
        fill: "insert into old_prices values (1, 10000, default, '2020-01-01 00:00Z'), (3000000000, 1, default, '2020-01-01'), \
            (1, 12050, default, '2020-06-01 00:00Z'), (1, 11000, default, '2020-12-01 00:00Z'), \
            (2, 5000, default, '2020-03-01 00:00Z'), (77, 1, default, '2020-01-01'), (null, 1, default, '2020-01-01')",
        import: "'old_prices', 'listing_id', 'price', 'at'",
        drop: "drop table old_prices",
    },
];

/// A database of the earlier services with two listings and a table of earlier prices. Its time zone is not UTC.
async fn inherited_with(history: &History) -> Database {
    let db = Database::empty().await;
    let History { create, fill, .. } = history;
    let sql = format!(
        "alter database {} set timezone = 'Europe/Paris'; {INHERITED_TABLE}; \
         insert into listing select id, 'Old', '', 'HOUSE', '', '', '', 'France', 12.5, 1, 0, price, null, day, day \
         from (values (1, 110, timestamp '2020-12-02'), (2, 60, '2020-12-02')) as old (id, price, day); {create}; {fill}",
        db.name
    );
    run(&db.superuser, &sql).await;
    db
}

fn import(arguments: &str) -> String {
    format!("select * from import_price_history({arguments})")
}

#[tokio::test]
async fn an_earlier_price_history_of_any_shape_becomes_the_history_and_ends_in_the_same_schema() {
    let fresh = catalogue(&Database::migrated().await);
    for history in &HISTORIES {
        let db = inherited_with(history).await;
        migrate(&db);
        let now = db.connect().await;
        if !history.import.is_empty() {
            let outcomes = rows(&now, &import(history.import)).await;
            assert_eq!(outcomes[0], "imported|4", "{outcomes:?}");
        }
        let prices = "select listing_id, old_price, new_price, changed_at, changed_by \
            from listing_price_log order by listing_id, id";
        let expected = [
            "1|null|100.00|2020-01-01 00:00:00+00|import",
            "1|100.00|120.50|2020-06-01 00:00:00+00|import",
            "1|120.50|110.00|2020-12-01 00:00:00+00|import",
            "2|null|50.00|2020-03-01 00:00:00+00|import",
            "2|50.00|60.00|2020-12-02 00:00:00+00|backfill",
        ];
        assert_eq!(rows(&now, prices).await, expected, "{}", history.create);
        assert_no_problem(&now).await;
        run(&now, history.drop).await;
        assert_eq!(catalogue(&db), fresh, "{}", history.create);
    }
}

#[tokio::test]
async fn a_listing_whose_prices_were_in_an_earlier_price_log_is_changed_and_deleted_like_any_other()
{
    let db = inherited_with(&HISTORIES[0]).await;
    migrate(&db);
    let earlier = rows(&db.superuser, "table earlier_listing_price_log").await;
    run(
        &db.superuser,
        "update listing set price = 70 where id = 2; delete from listing where id = 1",
    )
    .await;
    let expected = ["2|null|50.00", "2|50.00|60.00", "2|60.00|70.00"];
    assert_eq!(rows(&db.superuser, HISTORY).await, expected);
    assert_eq!(
        rows(&db.superuser, "table earlier_listing_price_log").await,
        earlier
    );
    assert_eq!(earlier.len(), 4);
    assert_no_problem(&db.superuser).await;
}

#[tokio::test]
async fn an_earlier_price_log_with_unknown_columns_stops_the_migration_with_advice() {
    let db = inherited_with(&HISTORIES[0]).await;
    run(
        &db.superuser,
        "alter table listing_price_log rename price_change to amount",
    )
    .await;
    let output = printed(&db.migrate(&in_checkout("sql")));
    assert!(
        output.contains("the columns of the existing table listing_price_log are unknown"),
        "{output}"
    );
    let hint = "Rename the table, migrate again, then call import_price_history().";
    assert!(output.contains(hint), "{output}");
}

#[tokio::test]
async fn dates_with_a_time_zone_and_exact_prices_are_kept() {
    let db = inherited().await;
    run(
        &db.superuser,
        "delete from listing where created_date is null or updated_date is null; alter table listing \
            alter column price type numeric(12,2), alter column created_date type timestamptz, alter column updated_date type timestamptz",
    )
    .await;
    // Written as seconds, because the migration changes the time zone of the database.
    let kept = "select id, price, extract(epoch from created_date), extract(epoch from updated_date) from listing order by id";
    let before = rows(&db.superuser, kept).await;
    migrate(&db);
    assert_eq!(rows(&db.connect().await, kept).await, before);
    assert!(before.len() > 200);
    assert_eq!(catalogue(&db), catalogue(&Database::migrated().await));
}

#[tokio::test]
async fn a_trigger_on_the_price_stops_the_migration_with_its_name() {
    let db = inherited().await;
    run(
        &db.superuser,
        "create function note() returns trigger language plpgsql as 'begin return new; end'; \
         create trigger note_price after update of price on listing for each row execute function note()",
    )
    .await;
    let output = printed(&db.migrate(&in_checkout("sql")));
    assert!(
        output.contains("trigger note_price on table public.listing depends on column \"price\""),
        "{output}"
    );
}

/// The history of every listing, with the ids, and with `now` for a time of the last hour.
const LOG: &str = "select listing_id, id, old_price, new_price, \
        case when changed_at > now() - interval '1 hour' then 'now' else changed_at::date::text end, changed_by \
    from listing_price_log order by listing_id, id";

/// What an import of the table `given` reports.
const IMPORT: &str =
    "select * from import_price_history('given', 'listing_id', 'price', 'moment') order by outcome";

/// A migrated database with a table `given` of prices to import.
async fn with_given(rows: &str) -> Database {
    let db = Database::migrated().await;
    give(&db, rows).await;
    db
}

async fn give(db: &Database, rows: &str) {
    let sql = format!(
        "drop table if exists given; create table given (listing_id bigint, price float8, moment timestamptz); \
         insert into given values {rows}"
    );
    run(&db.superuser, &sql).await;
}

/// Inserts listing 1 with this price, and the row that the migration of an inherited database would log.
async fn backfill(db: &Database, price: &str, date: &str) {
    let sql = format!(
        "begin; set local session_replication_role = replica; {}; commit; \
         insert into listing_price_log (listing_id, new_price, changed_at, changed_by) values (1, {price}, '{date}', 'backfill')",
        insert_listing(1, price)
    );
    run(&db.superuser, &sql).await;
}

/// Logs the first price of listing 1, 100, in this way.
async fn log(db: &Database, way: &str) {
    if way.contains("backfill") {
        backfill(db, "100", "2021-01-01").await;
    } else {
        run(&db.superuser, &insert_listing(1, "100")).await;
    }
    if way.contains("update") {
        run(&db.superuser, "update listing set price = 110").await;
    }
    if way == "nothing" {
        run(
            &db.superuser,
            "set session_replication_role = replica; delete from listing_price_log; reset session_replication_role",
        )
        .await;
    }
}

#[tokio::test]
async fn an_import_reports_what_it_took_and_what_it_left_and_takes_nothing_twice() {
    let db = Database::migrated().await;
    for id in 1..=3 {
        run(&db.superuser, &insert_listing(id, "100")).await;
    }
    let prune =
        "update listing set price = 200 where id = 2; select prune_price_history('infinity')";
    run(&db.superuser, prune).await;
    give(
        &db,
        "(1, 90, '2020-01-01'), (1, 90, '2020-02-01'), (1, 95.555, '2020-03-01'), (1, 100, '2020-04-01'), \
         (1, 80, now() + interval '1 hour'), (1, 80, null), (1, 80, 'infinity'), (1, 80, '-infinity'), \
         (1, 80, '0001-01-01 BC'), (1, 'NaN', '2020-01-01'), (1, -1, '2020-01-01'), (1, 9999999999.995, '2020-01-01'), \
         (1, 'infinity', '2020-01-01'), (1, null, '2020-01-01'), \
         (1, 80, (select changed_at from listing_price_log where listing_id = 1)), \
         (2, 80, '2020-01-01'), (3, 100, '2020-01-01'), \
         (0, 80, '2020-01-01'), (4, 80, '2020-01-01'), (3000000000, 80, '2020-01-01'), (null, 80, '2020-01-01')",
    )
    .await;

    let reported = rows(&db.superuser, IMPORT).await;

    let expected = [
        "imported|2",
        "invalid price|5",
        "invalid time|5",
        "not before the first logged price|1",
        "same price as before or after|3",
        "the history of the listing was pruned|1",
        "unknown listing|4",
    ];
    assert_eq!(reported, expected);
    let log = [
        "1|-2|null|90.00|2020-01-01|import",
        "1|-1|90.00|95.56|2020-03-01|import",
        "1|1|95.56|100.00|now|postgres",
        "2|4|100.00|200.00|now|postgres",
        "3|3|null|100.00|now|postgres",
    ];
    assert_eq!(rows(&db.superuser, LOG).await, log);
    let maintenance = "select task, performed_by, row_count, pruned_before, detail \
        from listing_price_log_maintenance where task = 'import'";
    let recorded = ["import|postgres|2|null|public.given"];
    assert_eq!(rows(&db.superuser, maintenance).await, recorded);
    assert_no_problem(&db.superuser).await;

    let expected = [
        "imported|0",
        "invalid price|5",
        "invalid time|5",
        "not before the first logged price|5",
        "same price as before or after|1",
        "the history of the listing was pruned|1",
        "unknown listing|4",
    ];
    assert_eq!(rows(&db.superuser, IMPORT).await, expected);
    assert_eq!(rows(&db.superuser, LOG).await, log);
    assert_eq!(rows(&db.superuser, maintenance).await, recorded);
}

#[tokio::test]
async fn imported_prices_continue_with_the_prices_that_were_logged() {
    for (logged, given, expected) in [
        (
            "backfill",
            "(1, 100, '2020-06-01'), (1, 90, '2020-01-01')",
            // The first logged price was the price of the migration, and the import knows its date.
            &[
                "1|-1|null|90.00|2020-01-01|import",
                "1|0|90.00|100.00|2020-06-01|import",
            ][..],
        ),
        (
            "backfill",
            "(1, 90, '2020-01-01'), (1, 80, '2022-01-01')",
            &[
                "1|-1|null|90.00|2020-01-01|import",
                "1|0|90.00|80.00|2022-01-01|import",
                "1|1|80.00|100.00|2022-01-01|backfill",
            ],
        ),
        (
            "backfill, update",
            "(1, 90, '2020-01-01'), (1, 100, '2022-01-01'), (1, 70, '2022-06-01')",
            &[
                "1|-2|null|90.00|2020-01-01|import",
                "1|-1|90.00|100.00|2022-01-01|import",
                "1|0|100.00|70.00|2022-06-01|import",
                "1|1|70.00|100.00|2022-06-01|backfill",
                "1|2|100.00|110.00|now|postgres",
            ],
        ),
        (
            "insert, update",
            "(1, 90, '2020-01-01'), (1, 80, '2022-01-01')",
            &[
                "1|-1|null|90.00|2020-01-01|import",
                "1|0|90.00|80.00|2022-01-01|import",
                "1|1|80.00|100.00|now|postgres",
                "1|2|100.00|110.00|now|postgres",
            ],
        ),
        (
            "insert",
            // Two prices of the same moment are in the order of the table.
            "(1, 90, '2020-01-01'), (1, 95, '2020-01-01'), (1, 80, '2019-01-01')",
            &[
                "1|-2|null|80.00|2019-01-01|import",
                "1|-1|80.00|90.00|2020-01-01|import",
                "1|0|90.00|95.00|2020-01-01|import",
                "1|1|95.00|100.00|now|postgres",
            ],
        ),
        (
            "insert",
            "(1, 100, '2020-01-01')",
            &["1|1|null|100.00|now|postgres"],
        ),
        (
            "nothing",
            "(1, 90, '2020-01-01'), (1, 100, '2022-01-01')",
            &[
                "1|-2|null|90.00|2020-01-01|import",
                "1|-1|90.00|100.00|2022-01-01|import",
            ],
        ),
    ] {
        let db = with_given(given).await;
        log(&db, logged).await;
        rows(&db.superuser, IMPORT).await;
        assert_eq!(
            rows(&db.superuser, LOG).await,
            expected,
            "{logged}: {given}"
        );
        assert_no_problem(&db.superuser).await;
        assert_eq!(
            rows(&db.superuser, IMPORT).await[0],
            "imported|0",
            "{logged}: {given}"
        );
        assert_eq!(
            rows(&db.superuser, LOG).await,
            expected,
            "{logged}: {given}"
        );

        // Another table with older prices extends the history again.
        give(&db, "(1, 50, '2010-01-01'), (1, 60, '2011-01-01')").await;
        assert_eq!(
            rows(&db.superuser, IMPORT).await,
            ["imported|2"],
            "{logged}: {given}"
        );
        assert_no_problem(&db.superuser).await;
    }
}

#[tokio::test]
async fn a_hundred_thousand_prices_are_imported_in_seconds_and_none_twice() {
    let db = Database::migrated().await;
    run(
        &db.superuser,
        "set session_replication_role = replica; \
         insert into listing (id, price, name, description, building_type, street_address, postal_code, city, country, \
            surface_area_m2, rooms_count, bedrooms_count) \
         select n, 10, '', '', 'HOUSE', '', '', '', '', 1, 1, 0 from generate_series(1, 1000) as n; \
         reset session_replication_role; \
         insert into listing_price_log (listing_id, new_price, changed_at, changed_by) \
            select id, price, '2021-01-01', 'backfill' from listing where id % 2 = 0; \
         insert into listing_price_log (listing_id, new_price, changed_by) \
            select id, price, 'earlier' from listing where id % 2 = 1; \
         update listing set price = 20 where id % 3 = 0; select setseed(0.5); \
         create table given as select 1 + n % 1000 as listing_id, 1 + (20 * random())::integer as price, \
            timestamp '2020-01-01' + random() * interval '5 years' as moment from generate_series(1, 100000) as n",
    )
    .await;
    let begun = Instant::now();
    let reported = rows(&db.superuser, IMPORT).await;
    assert!(
        begun.elapsed() < Duration::from_secs(20),
        "{:?}",
        begun.elapsed()
    );
    assert_no_problem(&db.superuser).await;

    // The import of each listing is the changes in the order of time, up to the first logged price.
    let different = "with change as ( \
            select *, lag(price) over (partition by listing_id order by moment) as before from given \
        ), expected as ( \
            select listing_id, price, moment at time zone 'UTC' as moment from change where price is distinct from before \
        ), imported as ( \
            select listing_id, new_price::integer, changed_at from listing_price_log where changed_by = 'import' \
        ), last as ( \
            select distinct on (listing_id) listing_id, price, moment from expected order by listing_id, moment desc \
        ) \
        select 'missing', * from (table expected except table imported) as missing \
            where not exists (select from last where last = missing and listing_id % 2 = 1 and price = 10) \
        union all select 'additional', * from (table imported except table expected) as additional";
    assert_eq!(rows(&db.superuser, different).await, [""; 0]);
    let total: usize = reported
        .iter()
        .filter_map(|row| row.split('|').nth(1)?.parse::<usize>().ok())
        .sum();
    assert_eq!(total, 100_000);

    let second = rows(&db.superuser, IMPORT).await;
    assert_eq!(second[0], "imported|0", "{second:?}");
    assert_no_problem(&db.superuser).await;
}

#[tokio::test]
async fn only_the_owner_may_import() {
    let db = with_given("(1, 90, '2020-01-01')").await;
    run(&db.superuser, "grant all on given to public").await;
    for (suffix, in_role) in [
        ("service", "in role listing_api"),
        ("auditor", "in role listing_auditor"),
        ("stranger", ""),
    ] {
        let client = db.login(suffix, in_role).await;
        let refused = refusal(&client, IMPORT).await;
        assert_eq!(
            refused,
            "42501 permission denied for function import_price_history"
        );
    }
}

#[tokio::test]
async fn an_import_waits_for_writers_and_then_sees_what_they_wrote() {
    for (writes, expected) in [
        (insert_listing(2, "10"), &["imported|2"][..]),
        (
            "update listing set price = 110 where id = 1".to_owned(),
            &["imported|1", "unknown listing|1"],
        ),
        (
            "delete from listing where id = 1".to_owned(),
            &["imported|0", "unknown listing|2"],
        ),
        (
            "select prune_price_history('infinity')".to_owned(),
            &[
                "imported|0",
                "the history of the listing was pruned|1",
                "unknown listing|1",
            ],
        ),
    ] {
        let db = with_given("(1, 90, '2020-01-01'), (2, 90, '2020-01-01')").await;
        run(&db.superuser, &insert_listing(1, "100")).await;
        run(&db.superuser, "update listing set price = 105").await;
        let writer = db.connect().await;
        run(&writer, &format!("begin; {writes}")).await;
        let (reported, ()) = tokio::join!(rows(&db.superuser, IMPORT), async {
            db.wait_for(WAITING, "1").await;
            run(&writer, "commit").await;
        });
        assert_eq!(reported, expected, "{writes}");
        assert_no_problem(&db.superuser).await;
    }
}

#[tokio::test]
async fn a_writer_waits_for_an_import_and_continues_its_history() {
    let db = with_given("(1, 90, '2020-01-01')").await;
    backfill(&db, "100", "2021-01-01").await;
    run(&db.superuser, "begin").await;
    assert_eq!(rows(&db.superuser, IMPORT).await, ["imported|1"]);
    let writer = db.connect().await;
    tokio::join!(run(&writer, "update listing set price = 110"), async {
        db.wait_for(WAITING, "1").await;
        run(&db.superuser, "commit").await;
    });
    assert_eq!(
        rows(&writer, HISTORY).await,
        ["1|null|90.00", "1|90.00|100.00", "1|100.00|110.00"]
    );
    assert_no_problem(&writer).await;
}

#[tokio::test]
async fn a_copy_gives_a_time_zone_to_local_times() {
    let db = Database::migrated().await;
    run(&db.superuser, &insert_listing(1, "100")).await;
    run(
        &db.superuser,
        "create temporary table local as select 1 as listing_id, 90 as price, timestamp '2020-06-01 12:00' as moment; \
         create temporary table given as select listing_id, price, moment at time zone 'Europe/Paris' as moment from local",
    )
    .await;
    assert_eq!(rows(&db.superuser, IMPORT).await, ["imported|1"]);
    let moment = "select changed_at from listing_price_log where changed_by = 'import'";
    assert_eq!(value(&db.superuser, moment).await, "2020-06-01 10:00:00+00");
}

#[tokio::test]
async fn an_import_names_a_column_that_is_no_time() {
    let db = with_given("(1, 90, '2020-01-01')").await;
    for column in ["price", "missing"] {
        let sql = import(&format!("'given', 'listing_id', 'price', '{column}'"));
        let expected = format!(
            "42703 public.given has no column {column} of type date, timestamp or timestamptz"
        );
        assert_eq!(refusal(&db.superuser, &sql).await, expected);
    }
}

#[tokio::test]
async fn the_api_serves_imported_prices_whole_and_by_pages() {
    let db = with_given(
        "(1, 90, '2020-01-01'), (1, 80, '2021-01-01'), (1, 70, '2022-01-01'), (1, 60, '2023-01-01'), (1, 50, '2024-01-01')",
    )
    .await;
    backfill(&db, "40", "2025-01-01").await;
    assert_eq!(rows(&db.superuser, IMPORT).await, ["imported|5"]);
    let service = Service::start_on(db, &[]).await;
    let price = |(year, price): (i32, i32)| {
        format!(r#"{{"price_eur":{price},"created_date":"{year}-01-01T00:00:00.000000Z"}}"#)
    };
    let prices: Vec<_> = (2020..).zip([90, 80, 70, 60, 50, 40]).map(price).collect();

    let whole = service.get("/listings/1/prices");
    assert_eq!(whole.text(), format!("[{}]", prices.join(",")));

    let mut next = Some("/listings/1/prices?limit=2".to_owned());
    let pages: Vec<_> = iter::from_fn(|| {
        let page = service.get(next.as_ref()?);
        next = page.header("link").map(|link| {
            let (address, _) = link[1..].split_once('>').expect("<address>");
            address.to_owned()
        });
        Some(page.text().to_owned())
    })
    .collect();
    let expected: Vec<_> = prices
        .chunks(2)
        .map(|page| format!("[{}]", page.join(",")))
        .collect();
    assert_eq!(pages, expected);

    let at = service.get("/listings/1/prices?from=2021-06-01T00:00:00Z&to=2023-06-01T00:00:00Z");
    assert_eq!(at.text(), format!("[{}]", prices[2..4].join(",")));
}
