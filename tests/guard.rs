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
    let insert = |column: &str, value: &str| {
        format!(
            "insert into listing (price, {column}, {OTHER_COLUMNS}) values (1, {value}, {OTHER_VALUES})"
        )
    };
    let with_id = insert("id", "9");
    let overriding = with_id.replace("values", "overriding system value values");
    let (created, updated) = (
        insert("created_date", "now()"),
        insert("updated_date", "now()"),
    );
    let denied = "42501 permission denied for";
    for (sql, expected) in [
        (with_id.as_str(), format!("{denied} table listing")),
        (&overriding, format!("{denied} table listing")),
        (&created, format!("{denied} table listing")),
        (&updated, format!("{denied} table listing")),
        (
            "update listing set id = 9",
            format!("{denied} table listing"),
        ),
        (
            "update listing set created_date = now()",
            format!("{denied} table listing"),
        ),
        (
            "update listing set owner = 'me'",
            format!("{denied} table listing"),
        ),
        (
            "truncate listing cascade",
            format!("{denied} table listing"),
        ),
        (
            "select setval('listing_id_seq', 1)",
            format!("{denied} sequence listing_id_seq"),
        ),
        (
            "insert into listing_price_log (listing_id, new_price, changed_by) values (1, 2, 'me')",
            format!("{denied} table listing_price_log"),
        ),
        (
            "update listing_price_log set new_price = 2",
            format!("{denied} table listing_price_log"),
        ),
        (
            "delete from listing_price_log",
            format!("{denied} table listing_price_log"),
        ),
        (
            "truncate listing_price_log",
            format!("{denied} table listing_price_log"),
        ),
        (
            "delete from listing_deletion",
            format!("{denied} table listing_deletion"),
        ),
        (
            "select nextval('listing_price_log_id_seq')",
            format!("{denied} sequence listing_price_log_id_seq"),
        ),
        (
            "update refinery_schema_history set version = 0",
            format!("{denied} table refinery_schema_history"),
        ),
        (
            "create trigger forged after insert on other for each row execute function log_listing_price()",
            format!("{denied} function log_listing_price"),
        ),
        ("create table forged ()", format!("{denied} schema public")),
        (
            "alter table listing disable trigger all",
            "42501 must be owner of table listing".to_owned(),
        ),
        (
            "drop trigger listing_price_logged_on_update on listing",
            "42501 must be owner of relation listing".to_owned(),
        ),
        (
            "set session_replication_role = replica",
            "42501 permission denied to set parameter \"session_replication_role\"".to_owned(),
        ),
    ] {
        assert_eq!(refusal(&service, sql).await, expected, "{sql}");
    }
    // The setting by which the maintenance functions pass is no right.
    run(&service, "set listing.maintenance = on").await;
    let refused = refusal(&service, "delete from listing_price_log").await;
    assert_eq!(refused, format!("{denied} table listing_price_log"));
    assert_eq!(rows(&db.superuser, HISTORY).await, ["1|null|1.00"]);
}

#[tokio::test]
async fn the_service_role_cannot_replace_the_history_of_a_listing() {
    let db = Database::migrated().await;
    let service = db.login("service", "in role listing_api").await;
    let insert = format!("insert into listing (price, {OTHER_COLUMNS}) values (1, {OTHER_VALUES})");
    run(&service, &format!("{insert}; update listing set price = 2")).await;
    run(&service, "set listing.actor = 'admin:1'").await;
    let same_id = insert_listing(1, "5");
    let forge = format!("delete from listing where id = 1; {same_id}");
    assert_eq!(
        refusal(&service, &forge).await,
        "42501 permission denied for table listing"
    );
    run(
        &service,
        &format!("delete from listing where id = 1; {insert}"),
    )
    .await;
    // All that is left of listing 1 is its deletion.
    assert_eq!(rows(&service, HISTORY).await, ["2|null|1.00"]);
    let deletions =
        "select listing_id, id, last_price, deleted_by, login_role from listing_deletion";
    // The refused attempt has used up id 3.
    let expected = format!("1|4|2.00|admin:1|{}_service", db.name);
    assert_eq!(rows(&service, deletions).await, [expected]);
}

#[tokio::test]
async fn the_id_of_a_listing_with_a_history_cannot_change() {
    let db = Database::migrated().await;
    run(&db.superuser, &insert_listing(1, "1")).await;
    let older = db.login("older", "").await;
    run(
        &db.superuser,
        &format!(
            "grant select, insert, update, delete on listing to {}_older",
            db.name
        ),
    )
    .await;
    let another_in_its_place = format!(
        "with moved as (update listing set id = 2 returning id) \
         insert into listing (id, price, {OTHER_COLUMNS}) select 1, 5, {OTHER_VALUES} from moved"
    );
    for client in [&older, &db.superuser] {
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
    run(&older, "update listing set id = id, price = 2").await;
    assert_eq!(
        rows(&db.superuser, HISTORY).await,
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
        "listing_deletion",
        "listing_price_log_maintenance",
        "listing_price_change",
        "listing_price_log_problem",
        "listing_setup_problem",
        "listing_access",
        "listing_price_trend()",
        "listing_price_activity()",
        "listing_price_difference('-infinity', 'infinity')",
        "listing_price_log_problem_since('3')",
        "prunable_prices(now())",
        "list_api_keys()",
        "refinery_schema_history",
    ] {
        run(&auditor, &format!("select from {relation}")).await;
    }
    assert_eq!(
        value(&auditor, "select listing_price_at(1, now())").await,
        "1.00"
    );
    for (sql, object) in [
        ("update listing set price = 2", "listing"),
        ("delete from listing", "listing"),
        ("delete from listing_price_log", "listing_price_log"),
        ("delete from listing_deletion", "listing_deletion"),
        ("select key_sha256 from api_key", "api_key"),
    ] {
        let denied = format!("42501 permission denied for table {object}");
        assert_eq!(refusal(&auditor, sql).await, denied);
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
async fn the_owner_and_a_superuser_cannot_delete_update_or_truncate_what_is_logged() {
    let db = Database::migrated().await;
    let owner = db.login("owner", "").await;
    let name = format!("{}_owner", db.name);
    run(&db.superuser, &format!("grant listing_auditor to {name}")).await;
    for table in [
        "listing",
        "listing_price_log",
        "listing_deletion",
        "listing_price_log_maintenance",
    ] {
        run(
            &db.superuser,
            &format!("alter table {table} owner to {name}"),
        )
        .await;
    }
    for (id, client) in [(1, &owner), (3, &db.superuser)] {
        let (deleted, kept) = (insert_listing(id, "1"), insert_listing(id + 1, "1"));
        let sql = format!(
            "{deleted}; {kept}; update listing set price = 2; delete from listing where id = {id}; \
            insert into listing_price_log_maintenance (task, row_count) values ('import', 1)"
        );
        run(client, &sql).await;
    }
    let logged = "select (select jsonb_agg(log order by id) from listing_price_log as log), \
        (select jsonb_agg(deletion order by id) from listing_deletion as deletion), \
        (select jsonb_agg(maintenance order by id) from listing_price_log_maintenance as maintenance)";
    let before = rows(&db.superuser, logged).await;
    for client in [&owner, &db.superuser] {
        for (table, column) in [
            ("listing_price_log", "changed_by"),
            ("listing_deletion", "deleted_by"),
            ("listing_price_log_maintenance", "performed_by"),
        ] {
            for (sql, refused) in [
                (format!("delete from {table}"), "delete"),
                (format!("delete from {table} where false"), "delete"),
                (format!("update {table} set {column} = 'me'"), "update"),
                (
                    format!("update {table} set {column} = 'me' where false"),
                    "update",
                ),
                (format!("truncate {table}"), "truncate"),
                (format!("truncate {table} cascade"), "truncate"),
            ] {
                let expected = format!("42501 {table} is append-only: {refused} is refused");
                assert_eq!(refusal(client, &sql).await, expected, "{sql}");
            }
        }
        let merge = "merge into listing_price_log as log using listing on listing.id = log.listing_id when matched then delete";
        let refused = "42501 listing_price_log is append-only: delete is refused";
        assert_eq!(refusal(client, merge).await, refused);
        let refused = "42501 listing_price_log is append-only: truncate is refused";
        assert_eq!(refusal(client, "truncate listing cascade").await, refused);
    }
    assert_eq!(rows(&db.superuser, logged).await, before);
    assert_eq!(
        rows(&db.superuser, HISTORY).await,
        ["2|null|1.00", "2|1.00|2.00", "4|null|1.00", "4|1.00|2.00"]
    );
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
