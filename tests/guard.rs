//! What each role can do with the log, and what no role can.

use crate::support::{
    Database, HISTORY, OTHER_COLUMNS, OTHER_VALUES, insert_listing, refusal, rows, run, value,
};

#[tokio::test]
async fn the_service_role_reads_and_writes_listings_and_reads_the_log() {
    let db = Database::migrated().await;
    let service = db.login("service", "in role listing_api").await;
    let sql = format!(
        "insert into listing (price, {OTHER_COLUMNS}) values (1, {OTHER_VALUES}), (2, {OTHER_VALUES}); \
         update listing set price = 3, updated_date = now() where id = 1; delete from listing where id = 2"
    );
    run(&service, &sql).await;
    assert_eq!(
        rows(&service, HISTORY).await,
        ["1|null|1.00", "1|1.00|3.00"]
    );
    assert_eq!(
        rows(&service, "select id, price from listing").await,
        ["1|3.00"]
    );
    let applied = "select count(*) > 0 from refinery_schema_history";
    assert_eq!(value(&service, applied).await, "t");
}

#[tokio::test]
async fn the_service_role_can_do_nothing_else() {
    let db = Database::migrated().await;
    run(&db.superuser, &insert_listing(1, "1")).await;
    run(
        &db.superuser,
        "create table other (id integer, price numeric); grant all on other to listing_api",
    )
    .await;
    let service = db.login("service", "in role listing_api").await;
    for (sql, expected) in [
        (
            "insert into listing_price_log (listing_id, new_price, changed_by) values (1, 2, 'me')",
            "42501 permission denied for table listing_price_log",
        ),
        (
            "update listing_price_log set new_price = 2",
            "42501 permission denied for table listing_price_log",
        ),
        (
            "delete from listing_price_log",
            "42501 permission denied for table listing_price_log",
        ),
        (
            "truncate listing_price_log",
            "42501 permission denied for table listing_price_log",
        ),
        (
            "select nextval('listing_price_log_id_seq')",
            "42501 permission denied for sequence listing_price_log_id_seq",
        ),
        (
            "truncate listing cascade",
            "42501 permission denied for table listing",
        ),
        (
            "alter table listing disable trigger all",
            "42501 must be owner of table listing",
        ),
        (
            "drop trigger listing_price_logged_on_update on listing",
            "42501 must be owner of relation listing",
        ),
        (
            "set session_replication_role = replica",
            "42501 permission denied to set parameter \"session_replication_role\"",
        ),
        (
            "select log_listing_price()",
            "42501 permission denied for function log_listing_price",
        ),
        (
            "create trigger forged after insert on other for each row execute function log_listing_price()",
            "42501 permission denied for function log_listing_price",
        ),
        (
            "select listing_price_log_prune(now())",
            "42501 permission denied for function listing_price_log_prune",
        ),
        (
            "update refinery_schema_history set version = 0",
            "42501 permission denied for table refinery_schema_history",
        ),
    ] {
        assert_eq!(refusal(&service, sql).await, expected, "{sql}");
    }
    assert_eq!(rows(&db.superuser, HISTORY).await, ["1|null|1.00"]);
}

#[tokio::test]
async fn the_id_of_a_listing_with_a_history_cannot_change() {
    let db = Database::migrated().await;
    run(&db.superuser, &insert_listing(1, "1")).await;
    let service = db.login("service", "in role listing_api").await;
    let another_in_its_place = format!(
        "with moved as (update listing set id = 2 returning id) \
         insert into listing (id, price, {OTHER_COLUMNS}) select 1, 5, {OTHER_VALUES} from moved"
    );
    for client in [&service, &db.superuser] {
        for sql in [
            "update listing set id = 2, price = 3",
            &another_in_its_place,
        ] {
            let refused = refusal(client, sql).await;
            assert!(
                refused.contains("listing_price_log_listing_id_fkey"),
                "{refused}"
            );
        }
    }
    run(&service, "update listing set id = id, price = 2").await;
    assert_eq!(
        rows(&service, HISTORY).await,
        ["1|null|1.00", "1|1.00|2.00"]
    );
}

#[tokio::test]
async fn the_auditor_reads_everything_and_writes_nothing() {
    let db = Database::migrated().await;
    run(&db.superuser, &insert_listing(1, "1")).await;
    let auditor = db.login("auditor", "in role listing_auditor").await;
    for relation in [
        "listing",
        "listing_price_log",
        "listing_price_change",
        "listing_price_trend",
        "listing_price_log_problem",
        "refinery_schema_history",
    ] {
        run(&auditor, &format!("table {relation}")).await;
    }
    assert_eq!(
        value(&auditor, "select listing_price_at(1, now())").await,
        "1.00"
    );
    for (sql, object) in [
        ("update listing set price = 2", "table listing"),
        ("delete from listing", "table listing"),
        ("delete from listing_price_log", "table listing_price_log"),
        (
            "select listing_price_log_prune(now())",
            "function listing_price_log_prune",
        ),
    ] {
        assert_eq!(
            refusal(&auditor, sql).await,
            format!("42501 permission denied for {object}")
        );
    }
}

#[tokio::test]
async fn a_role_without_a_grant_sees_nothing() {
    let db = Database::migrated().await;
    let stranger = db.login("stranger", "").await;
    for relation in ["listing", "listing_price_log"] {
        let expected = format!("42501 permission denied for table {relation}");
        assert_eq!(
            refusal(&stranger, &format!("table {relation}")).await,
            expected
        );
    }
    // The views run with the rights of the reader, so a grant on a view is not enough.
    run(
        &db.superuser,
        "grant select on listing_price_change to public",
    )
    .await;
    let refused = refusal(&stranger, "table listing_price_change").await;
    assert_eq!(
        refused,
        "42501 permission denied for table listing_price_log"
    );
}

#[tokio::test]
async fn the_owner_cannot_update_or_truncate_the_log() {
    let db = Database::migrated().await;
    run(&db.superuser, &insert_listing(1, "1")).await;
    for (sql, refused) in [
        ("update listing_price_log set new_price = 2", "update"),
        (
            "update listing_price_log set new_price = 2 where false",
            "update",
        ),
        ("truncate listing_price_log", "truncate"),
        ("truncate listing cascade", "truncate"),
    ] {
        let expected = format!("42501 listing_price_log is append-only: {refused} is refused");
        assert_eq!(refusal(&db.superuser, sql).await, expected, "{sql}");
    }
    assert_eq!(rows(&db.superuser, HISTORY).await, ["1|null|1.00"]);
}

#[tokio::test]
async fn the_log_refuses_a_row_whose_two_prices_are_equal() {
    let db = Database::migrated().await;
    run(&db.superuser, &insert_listing(1, "1")).await;
    let sql = "insert into listing_price_log (listing_id, old_price, new_price, changed_by) values (1, 1, 1.00, 'me')";
    let refused = refusal(&db.superuser, sql).await;
    assert!(
        refused.contains("listing_price_log_row_is_a_change"),
        "{refused}"
    );
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

#[tokio::test]
async fn the_listing_table_refuses_values_that_break_a_rule() {
    let db = Database::migrated().await;
    run(&db.superuser, &insert_listing(1, "9999999999.99")).await;
    for (assignment, expected) in [
        ("price = 'NaN'", "listing_price_is_a_number"),
        ("price = 'infinity'", "numeric field overflow"),
        ("price = '-infinity'", "numeric field overflow"),
        ("price = 10000000000", "numeric field overflow"),
        ("price = 9999999999.995", "numeric field overflow"),
        ("price = -0.01", "listing_price_is_not_negative"),
        ("price = null", "null value in column \"price\""),
        ("surface_area_m2 = 'NaN'", "listing_surface_area_is_finite"),
        (
            "surface_area_m2 = 'infinity'",
            "listing_surface_area_is_finite",
        ),
        (
            "surface_area_m2 = -1",
            "listing_surface_area_is_not_negative",
        ),
        ("rooms_count = -1", "listing_rooms_count_is_not_negative"),
        (
            "bedrooms_count = -1",
            "listing_bedrooms_count_is_not_negative",
        ),
        ("building_type = 'CASTLE'", "listing_building_type_is_known"),
        (
            "created_date = 'infinity'",
            "listing_created_date_has_a_year_of_four_digits",
        ),
        (
            "updated_date = '-infinity'",
            "listing_updated_date_has_a_year_of_four_digits",
        ),
        (
            "created_date = null",
            "null value in column \"created_date\"",
        ),
        (
            "updated_date = null",
            "null value in column \"updated_date\"",
        ),
    ] {
        let refused = refusal(&db.superuser, &format!("update listing set {assignment}")).await;
        assert!(refused.contains(expected), "{assignment}: {refused}");
    }
    assert_eq!(rows(&db.superuser, HISTORY).await, ["1|null|9999999999.99"]);
}
