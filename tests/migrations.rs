//! The migrations, run by the refinery CLI.

use std::fs;
use std::path::Path;

use tokio_postgres::Client;

use crate::support::{
    Cluster, Database, HISTORY, OTHER_COLUMNS, OTHER_VALUES, apply, assert_no_problem, catalogue,
    connect, in_checkout, insert_listing, migrate, migration_names, migrations, printed, refinery,
    rows, run, value, version,
};

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

/// The migrations of 1.0.0 and their checksums, which refinery stores in each database. A database whose checksums differ is
/// refused by the CLI and by the service. A new migration adds a line.
const RELEASED: [&str; 8] = [
    "1|create_listing|11326611677842350345",
    "2|log_listing_prices|7283393568120672753",
    "3|query_price_history|787980927786009881",
    "4|maintain_price_history|11838545244039366331",
    "5|feed_price_changes|9029134448885757081",
    "6|control_access|18149432664270673025",
    "7|check_price_log|3930074844729393283",
    "8|remember_posts|8316613338038785479",
];

#[tokio::test]
async fn no_released_migration_has_changed() {
    let db = Database::migrated().await;
    let applied = "select version, name, checksum from refinery_schema_history order by version";
    assert_eq!(rows(&db.superuser, applied).await, RELEASED);
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
        "applied migration V2__log_listing_prices is different than filesystem one",
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
        "migration V3__query_price_history is missing",
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

#[tokio::test]
async fn every_object_has_a_comment() {
    let db = Database::migrated().await;
    let silent = "select relname::text from pg_class where relnamespace = 'public'::regnamespace and relkind in ('r', 'v') \
            and obj_description(oid, 'pg_class') is null and relname <> 'refinery_schema_history' \
        union all select proname from pg_proc where pronamespace = 'public'::regnamespace \
            and obj_description(oid, 'pg_proc') is null \
        union all select tgname from pg_trigger where not tgisinternal and obj_description(oid, 'pg_trigger') is null \
        union all select attname from pg_attribute where attrelid in ('listing_price_log'::regclass, 'api_key'::regclass, \
                'listing_deletion'::regclass, 'listing_price_log_maintenance'::regclass) \
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
    let import = "select import_price_history('given', 'id', 'price', 'day')";
    run(
        &builder,
        "create table given as select 1 as id, 5 as price, date '2020-01-01' as day",
    )
    .await;
    assert_eq!(value(&builder, import).await, "(imported,1)");
    let prune = "select prune_price_history(now())";
    assert_eq!(value(&builder, prune).await, "2");
    assert_no_problem(&builder).await;
    assert_eq!(value(&builder, "show timezone").await, "UTC");
}

#[tokio::test]
async fn a_schema_in_which_other_roles_may_create_stops_the_cli_with_the_statement_to_run() {
    let db = Database::empty().await;
    let _stranger = db.login("stranger", "").await;
    let stranger = format!("{}_stranger", db.name);
    for (grantees, hint) in [
        // As in every database that was created before PostgreSQL 15.
        (
            "public",
            "revoke create on schema public from public;".to_owned(),
        ),
        (
            &stranger,
            format!("revoke create on schema public from {stranger};"),
        ),
        (
            &format!("{stranger}, public"),
            format!(
                "revoke create on schema public from public; revoke create on schema public from {stranger};"
            ),
        ),
    ] {
        run(
            &db.superuser,
            &format!("grant create on schema public to {grantees}"),
        )
        .await;
        let output = db.migrate(&in_checkout("sql"));
        assert!(!output.status.success());
        let refused = printed(&output);
        assert!(
            refused.contains("other roles may create objects in the schema public"),
            "{refused}"
        );
        let advice = "Let a superuser or the owner of the schema run this, then migrate again: ";
        assert!(refused.contains(&format!("{advice}{hint}\n")), "{refused}");
        assert_empty(&db.superuser).await;
        run(&db.superuser, &hint).await;
    }
    // These can change the schema anyway.
    run(
        &db.superuser,
        &format!(
            "create role {0}_root superuser; create role {0}_owner; alter database {0} owner to {0}_owner; \
             grant create on schema public to {0}_root, {0}_owner",
            db.name
        ),
    )
    .await;
    migrate(&db);
    run(
        &db.superuser,
        &format!(
            "alter database {0} owner to postgres; drop owned by {0}_owner, {0}_root",
            db.name
        ),
    )
    .await;
    run(
        &db.superuser,
        &format!("drop role {0}_root, {0}_owner", db.name),
    )
    .await;
}

#[tokio::test]
async fn a_migration_calls_no_function_that_a_stranger_left_in_public() {
    let db = Database::empty().await;
    let stranger = db.login("stranger", "").await;
    let name = format!("{}_stranger", db.name);
    run(&db.superuser, "grant create on schema public to public").await;
    // Each fits the arguments of a call in the migrations better than the function of PostgreSQL.
    for signature in [
        "format(text, name, text)",
        "format(text, text, text)",
        "format(text, name)",
        "format(text, text)",
    ] {
        let sql = format!(
            "create function public.{signature} returns text language plpgsql \
             as $$ begin alter role {name} superuser; return null; end $$"
        );
        run(&stranger, &sql).await;
    }
    run(&db.superuser, "revoke create on schema public from public").await;
    migrate(&db);
    let is_superuser = format!("select rolsuper from pg_roles where rolname = '{name}'");
    assert_eq!(value(&db.superuser, &is_superuser).await, "f");
}

#[tokio::test]
async fn a_history_of_the_cli_that_a_stranger_made_stops_it_before_an_insert_runs_a_trigger() {
    let db = Database::empty().await;
    let stranger = db.login("stranger", "").await;
    let name = format!("{}_stranger", db.name);
    let create = format!("grant create on schema public to {name}");
    run(&db.superuser, &create).await;
    let plant = format!(
        "create table public.refinery_schema_history \
            (version int4 primary key, name varchar(255), applied_on varchar(255), checksum varchar(255)); \
         create function public.plant() returns trigger language plpgsql \
            as $$ begin alter role {name} superuser; return new; end $$; \
         create trigger plant before insert on public.refinery_schema_history for each row execute function plant(); \
         grant all on public.refinery_schema_history to public"
    );
    run(&stranger, &plant).await;
    let revoke = format!("revoke create on schema public from {name}");
    run(&db.superuser, &revoke).await;

    let output = db.migrate(&in_checkout("sql"));

    assert!(!output.status.success());
    let refused = printed(&output);
    let reason = format!("the table refinery_schema_history belongs to {name}\n");
    assert!(refused.contains(&reason), "{refused}");
    let hint = "drop table public.refinery_schema_history;";
    assert!(refused.contains(hint), "{refused}");
    run(&db.superuser, hint).await;
    migrate(&db);
    let is_superuser = format!("select rolsuper from pg_roles where rolname = '{name}'");
    assert_eq!(value(&db.superuser, &is_superuser).await, "f");
}

#[tokio::test]
async fn tables_of_another_role_stop_the_cli_with_the_statement_to_run() {
    let db = Database::empty().await;
    let _app = db.login("app", "").await;
    let app = format!("{}_app", db.name);
    for table in ["listing", "listing_price_log"] {
        let create =
            format!("create table {table} (id serial); alter table {table} owner to {app}");
        run(&db.superuser, &create).await;
        let output = db.migrate(&in_checkout("sql"));
        assert!(!output.status.success());
        let refused = printed(&output);
        let reason = format!("the table {table} belongs to {app}\n");
        assert!(refused.contains(&reason), "{refused}");
        let hint = format!("alter table public.{table} owner to postgres;");
        assert!(refused.contains(&hint), "{refused}");
        run(&db.superuser, &format!("drop table {table}")).await;
    }
    migrate(&db);
}

#[tokio::test]
async fn a_listing_whose_id_is_not_serial_stops_the_cli() {
    for id in ["integer", "bigserial"] {
        let db = Database::empty().await;
        run(&db.superuser, &format!("create table listing (id {id})")).await;
        let output = db.migrate(&in_checkout("sql"));
        assert!(!output.status.success());
        let refused = printed(&output);
        let reason = "the column id of the table listing is not of type serial\n";
        assert!(refused.contains(reason), "{refused}");
    }
}

#[tokio::test]
async fn a_history_of_the_cli_outside_public_stops_it_with_the_statement_to_run() {
    let db = Database::empty().await;
    run(&db.superuser, "create schema postgres").await;
    let output = db.migrate(&in_checkout("sql"));
    assert!(!output.status.success());
    let refused = printed(&output);
    assert!(
        refused.contains("refinery did not create its table in the schema public"),
        "{refused}"
    );
    let hint = format!(
        "alter role postgres in database {} set search_path = public;",
        db.name
    );
    assert!(
        refused.contains(&format!("Run this, then migrate again: {hint}\n")),
        "{refused}"
    );
    run(&db.superuser, &hint).await;
    migrate(&db);
}

#[tokio::test]
async fn a_server_that_is_too_old_is_named_before_anything_else() {
    let db = Database::empty().await;
    run(&db.superuser, "grant create on schema public to public").await;
    let folder = migrations();
    let first = folder.path().join(&migration_names()[0]);
    let sql = fs::read_to_string(&first).expect("a migration");
    // The newest server is too old for this file.
    fs::write(&first, sql.replace("< 150000", "< 990000")).expect("change a file");
    let output = db.migrate(folder.path());
    assert!(!output.status.success());
    let version = value(&db.superuser, "show server_version").await;
    let reason = format!("ERROR: PostgreSQL 15 or later is required, this server is {version}\n");
    assert!(printed(&output).contains(&reason), "{}", printed(&output));
}

/// PostgreSQL parses a whole file before it runs the first statement, so an older server must be able to parse the first one.
#[test]
fn the_first_migration_uses_no_grammar_that_is_newer_than_postgresql_13() {
    let sql =
        fs::read_to_string(in_checkout("sql").join(&migration_names()[0])).expect("read a file");
    let comment = |line: &&str| !line.trim_start().starts_with("--");
    let code: Vec<_> = sql
        .lines()
        .filter(comment)
        .flat_map(str::split_whitespace)
        .collect();
    let code = code.join(" ").to_lowercase();
    for newer in [
        "begin atomic",
        "return (",
        "merge into",
        "security_invoker",
        "nulls not distinct",
        "nulls distinct",
        " compression ",
        "create or replace trigger",
        "set expression",
        "not enforced",
        "without overlaps",
        " virtual",
        "json_table(",
        "any_value(",
    ] {
        assert!(!code.contains(newer), "{newer}");
    }
}
