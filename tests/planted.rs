//! Functions, operators and tables that a stranger planted are never called: by the service, by a trigger, by a migration.

use std::fs;

use tokio_postgres::Client;

use crate::support::{
    Database, HISTORY, LOFT, Service, apply, bearer, create_administrator_key, in_checkout,
    insert_listing, printed, refusal, rows, run, value,
};

/// Creates functions and operators in `public` that fit the types of our columns better than those of PostgreSQL.
const PLANT: &str = "do $$ declare planted record; begin \
    create function public.planted(varchar, varchar) returns boolean language plpgsql as \
        'begin raise exception ''a planted function was called''; end'; \
    for planted in select distinct oprname from pg_operator where oprleft = 'text'::regtype and oprright = 'text'::regtype \
    loop \
        execute format('create operator public.%s (leftarg = varchar, rightarg = varchar, function = public.planted)', \
            planted.oprname); \
    end loop; \
    for planted in select distinct on (proname, arguments) proname, arguments, prorettype::regtype as result \
        from pg_proc, replace(oidvectortypes(proargtypes), 'text', 'character varying') as arguments \
        where pronamespace = 'pg_catalog'::regnamespace and prokind = 'f' and arguments ~ 'character varying' \
            and arguments || prorettype::regtype !~ 'any|internal|cstring|trigger' \
        union all select 'format', 'text, name, text', 'text' \
    loop \
        execute format('create function public.%I(%s) returns %s language plpgsql as %L', planted.proname, planted.arguments, \
            planted.result, 'begin raise exception ''a planted function was called''; end'); \
    end loop; end $$";

/// Asserts that what [`PLANT`] created is called in a session that has `public` in its search_path.
async fn assert_planted(client: &Client) {
    for sql in [
        "select 'a'::varchar = 'b'::varchar",
        "select format('%I %L', current_database(), 'UTC'::text)",
        "select hashtextextended('a'::varchar, 0)",
    ] {
        assert_eq!(
            refusal(client, sql).await,
            "P0001 a planted function was called",
            "{sql}"
        );
    }
}

#[tokio::test]
async fn planted_functions_are_called_neither_by_the_service_nor_by_a_trigger() {
    let db = Database::migrated().await;
    run(&db.superuser, PLANT).await;
    assert_planted(&db.superuser).await;
    let key = create_administrator_key(&db.superuser).await;
    let service = Service::start_on(db, &[("AUTH", "keys")]).await;
    let headers = bearer(&key);
    let paths = "listings listings?limit=1&city=Paris&postal_code=75011&country=FR&building_type=STUDIO&min_price=1 listings/1 \
        listings/1/prices listings/1/prices?limit=1&after=0&from=2020-01-01T00:00:00Z";
    assert_eq!(
        service.send("POST", "/listings", &headers, LOFT).status,
        201
    );
    for path in paths.split_whitespace() {
        let response = service.get(&format!("/{path}"));
        assert_eq!(response.status, 200, "{path} {}", response.text());
    }
    let put = LOFT.replace("480000", "1").replace("Paris", "Lyon");
    for (method, body, expected) in [
        ("PUT", &*put, 200),
        ("PATCH", "{\"latest_price_eur\":2}", 200),
        ("DELETE", "", 204),
    ] {
        let headers = format!(
            "{headers}if-match: {}\r\n",
            service.get("/listings/1").header("etag").expect("an ETag")
        );
        assert_eq!(
            service.send(method, "/listings/1", &headers, body).status,
            expected,
            "{method}"
        );
    }
    // A trigger, whatever the search_path of the writer.
    let sql = format!(
        "set listing.actor = 'ana'; {}; update listing set price = 4; delete from listing",
        insert_listing(9, "3")
    );
    run(service.superuser(), &sql).await;
    let deletions =
        "select listing_id, last_price, deleted_by, login_role from listing_deletion order by id";
    let expected = [
        format!("1|2.00|admin:1|{}_login", service.db().name),
        "9|4.00|ana|postgres".to_owned(),
    ];
    assert_eq!(rows(service.superuser(), deletions).await, expected);
}

#[tokio::test]
async fn planted_functions_are_not_called_by_a_migration() {
    let db = Database::empty().await;
    run(&db.superuser, PLANT).await;
    // An earlier log, whose rows the migration imports.
    run(
        &db.superuser,
        "create table listing_price_log (id serial primary key, listing_id integer, price_change float8, \
            updated_time timestamp); \
        insert into listing_price_log (listing_id, price_change, updated_time) values (1, 1, '2020-01-01')",
    )
    .await;
    apply(&db.url(), &in_checkout("sql"));
    assert_planted(&db.superuser).await;
}

#[tokio::test]
async fn a_planted_price_log_runs_nothing_in_the_migration() {
    for (planted, refused) in [
        (
            "create view listing_price_log as select 1 as listing_id, cost(0) as price_change, now() as updated_time",
            "listing_price_log is not a table",
        ),
        (
            "create type money_of_mallory as (amount numeric); \
        create function cost(money_of_mallory) returns numeric language sql return cost(0); \
        create cast (money_of_mallory as numeric) with function cost(money_of_mallory); \
        create table listing_price_log (listing_id integer, price_change money_of_mallory, updated_time timestamp); \
        insert into listing_price_log values (1, row(1), now())",
            "public.earlier_listing_price_log is not a table whose columns have built-in types",
        ),
        // The trigger takes the ids of deletions from this sequence.
        (
            "create sequence listing_price_log_id_seq",
            "relation \"listing_price_log_id_seq\" already exists",
        ),
    ] {
        let db = Database::empty().await;
        let cost = "create function cost(integer) returns numeric language plpgsql as \
            'begin raise exception ''a planted function was called''; end'";
        run(&db.superuser, &format!("{cost}; {planted}")).await;
        let output = db.migrate(&in_checkout("sql"));
        assert!(!output.status.success());
        let printed = printed(&output);
        assert!(printed.contains(refused), "{printed}");
    }
}

#[test]
fn every_migration_sets_the_search_path_first_and_resets_it_last() {
    let mut files = 0;
    for entry in fs::read_dir(in_checkout("sql")).expect("read sql/") {
        let path = entry.expect("a folder entry").path();
        let text = fs::read_to_string(&path).expect("read a migration");
        let statements: Vec<_> = text
            .lines()
            .filter(|line| !line.starts_with("--") && !line.is_empty())
            .collect();
        assert_eq!(
            statements.first(),
            Some(&"set local search_path = pg_catalog, pg_temp;"),
            "{path:?}"
        );
        assert_eq!(
            statements.last(),
            Some(&"set local search_path to default;"),
            "{path:?}"
        );
        files += 1;
    }
    assert!(files >= 6, "only {files} migrations");
}

#[tokio::test]
async fn a_hostile_search_path_changes_nothing() {
    let db = Database::migrated().await;
    run(&db.superuser, &insert_listing(1, "1")).await;
    let service = db.login("service", "in role listing_api").await;
    run(
        &db.superuser,
        &format!("create schema hostile authorization {}_service", db.name),
    )
    .await;
    run(
        &service,
        "create table hostile.listing_price_log (like public.listing_price_log including defaults); \
         create function hostile.current_setting(text, boolean) returns text language sql return 'forged'; \
         create function hostile.clock_timestamp() returns timestamptz language sql return 'epoch'::timestamptz; \
         create function hostile.differ(numeric, numeric) returns boolean language sql return false; \
         create operator hostile.= (leftarg = numeric, rightarg = numeric, function = hostile.differ); \
         set search_path = hostile, public, pg_catalog; \
         update public.listing set price = 2::numeric(12,2)",
    )
    .await;
    assert_eq!(
        value(&service, "select count(*) from hostile.listing_price_log").await,
        "0"
    );
    let logged = "select old_price, new_price, changed_by, changed_at > now() - interval '1 hour' \
        from public.listing_price_log where old_price is not null";
    let expected = format!("1.00|2.00|{}_service|t", db.name);
    assert_eq!(rows(&db.superuser, logged).await, [expected]);
}

#[tokio::test]
async fn a_hostile_temporary_table_changes_nothing() {
    let db = Database::migrated().await;
    run(&db.superuser, &insert_listing(1, "1")).await;
    let service = db.login("service", "in role listing_api").await;
    run(
        &service,
        "create temp table listing_price_log (like public.listing_price_log including defaults); \
         set search_path = pg_temp, public; \
         update listing set price = 2",
    )
    .await;
    assert_eq!(
        rows(&service, "table pg_temp.listing_price_log").await,
        [""; 0]
    );
    assert_eq!(
        rows(&service, HISTORY).await,
        ["1|null|1.00", "1|1.00|2.00"]
    );
}
