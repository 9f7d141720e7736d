//! Each inconsistency of the log is reported with a statement that repairs it.

use crate::support::{Database, assert_no_problem, insert_listing, rows, run, value};

/// Makes a problem on a database where listing 1 has had the prices 1, 2 and 3 and listing 2 costs 5. Asserts how the problem
/// is reported, runs the reported statement, and asserts that no problem is left.
async fn assert_reported_and_repaired(cause: &str, problem: &str, advice: &str) {
    let db = Database::migrated().await;
    run(&db.superuser, &insert_listing(1, "1")).await;
    run(&db.superuser, &insert_listing(2, "5")).await;
    run(
        &db.superuser,
        "update listing set price = 2 where id = 1; update listing set price = 3 where id = 1",
    )
    .await;
    assert_no_problem(&db.superuser).await;

    run(&db.superuser, cause).await;
    let reported = rows(
        &db.superuser,
        "select problem, listing_id, log_id from listing_price_log_problem",
    )
    .await;
    assert_eq!(reported, [problem]);
    let explanation = value(
        &db.superuser,
        "select explanation from listing_price_log_problem",
    )
    .await;
    assert!(explanation.starts_with(advice), "{explanation}");

    let mend = value(&db.superuser, "select mend from listing_price_log_problem").await;
    run(&db.superuser, &mend).await;
    assert_no_problem(&db.superuser).await;
    // The repaired log keeps logging.
    run(
        &db.superuser,
        "reset session_replication_role; update listing set price = price + 1",
    )
    .await;
    assert_no_problem(&db.superuser).await;
}

#[tokio::test]
async fn a_listing_inserted_without_the_trigger_is_reported() {
    let insert = insert_listing(9, "9");
    assert_reported_and_repaired(
        &format!(
            "set session_replication_role = replica; {insert}; reset session_replication_role"
        ),
        "listing without a log|9|null",
        "Listing 9 has no price in the log: it was inserted while the trigger did not fire.",
    )
    .await;
}

#[tokio::test]
async fn a_listing_deleted_without_the_foreign_key_is_reported() {
    assert_reported_and_repaired(
        "set session_replication_role = replica; delete from listing where id = 1; reset session_replication_role",
        "log without a listing|1|4",
        "Listing 1 is gone but its history is not",
    )
    .await;
}

#[tokio::test]
async fn a_price_changed_without_the_trigger_is_reported() {
    assert_reported_and_repaired(
        "set session_replication_role = replica; update listing set price = 9 where id = 1",
        "last price differs|1|4",
        "Listing 1 costs 9.00 but its last logged price is 3.00: it was changed while the trigger did not fire.",
    )
    .await;
}

#[tokio::test]
async fn a_row_removed_from_the_middle_is_reported() {
    assert_reported_and_repaired(
        "delete from listing_price_log where id = 3",
        "broken chain|1|4",
        "Row 4 of listing 1 says that the price before was 2.00, but row 1 before it says 1.00: what stood between was removed, or one of the two altered.",
    )
    .await;
}

#[tokio::test]
async fn a_price_altered_in_the_middle_is_reported() {
    assert_reported_and_repaired(
        "alter table listing_price_log disable trigger user; \
         update listing_price_log set new_price = 2.5 where id = 3; \
         alter table listing_price_log enable trigger user",
        "broken chain|1|4",
        "Row 4 of listing 1 says that the price before was 2.00, but row 3 before it says 2.50",
    )
    .await;
}

#[tokio::test]
async fn an_old_price_erased_in_the_middle_is_reported() {
    assert_reported_and_repaired(
        "alter table listing_price_log disable trigger user; \
         update listing_price_log set old_price = null where id = 3; \
         alter table listing_price_log enable trigger user",
        "broken chain|1|3",
        "Row 3 of listing 1 says that the price before was nothing, but row 1 before it says 1.00",
    )
    .await;
}

#[tokio::test]
async fn a_row_removed_from_the_end_is_reported() {
    assert_reported_and_repaired(
        "delete from listing_price_log where id = 4",
        "last price differs|1|3",
        "Listing 1 costs 3.00 but its last logged price is 2.00",
    )
    .await;
}

#[tokio::test]
async fn a_whole_history_removed_is_reported() {
    assert_reported_and_repaired(
        "delete from listing_price_log where listing_id = 1",
        "listing without a log|1|null",
        "Listing 1 has no price in the log",
    )
    .await;
}

#[tokio::test]
async fn a_disabled_trigger_is_reported() {
    assert_reported_and_repaired(
        "alter table listing disable trigger listing_price_logged_on_insert",
        "trigger not enabled|null|null",
        "Trigger listing_price_logged_on_insert on listing does not fire for every writer.",
    )
    .await;
}

#[tokio::test]
async fn a_trigger_that_fires_for_replication_only_is_reported() {
    assert_reported_and_repaired(
        "alter table listing enable replica trigger listing_price_logged_on_update",
        "trigger not enabled|null|null",
        "Trigger listing_price_logged_on_update on listing does not fire for every writer.",
    )
    .await;
}

#[tokio::test]
async fn a_disabled_guard_trigger_is_reported() {
    assert_reported_and_repaired(
        "alter table listing_price_log disable trigger user",
        "trigger not enabled|null|null",
        "Trigger listing_price_log_refused_on_update_and_truncate on listing_price_log does not fire for every writer.",
    )
    .await;
}

#[tokio::test]
async fn a_dropped_trigger_is_reported() {
    assert_reported_and_repaired(
        "drop trigger listing_price_logged_on_update on listing",
        "trigger missing or altered|null|null",
        "Trigger listing_price_logged_on_update on listing is not as it was made, so prices go by unlogged.",
    )
    .await;
}

#[tokio::test]
async fn a_dropped_guard_trigger_is_reported() {
    assert_reported_and_repaired(
        "drop trigger listing_price_log_refused_on_update_and_truncate on listing_price_log",
        "trigger missing or altered|null|null",
        "Trigger listing_price_log_refused_on_update_and_truncate on listing_price_log is not as it was made, so the log can be rewritten.",
    )
    .await;
}

#[tokio::test]
async fn a_trigger_that_fires_for_fewer_updates_is_reported() {
    assert_reported_and_repaired(
        "create or replace trigger listing_price_logged_on_update after update of price on listing for each row \
         when (old.price is distinct from new.price) execute function log_listing_price()",
        "trigger missing or altered|null|null",
        "Trigger listing_price_logged_on_update on listing is not as it was made",
    )
    .await;
}

#[tokio::test]
async fn an_altered_row_that_equals_the_next_is_reported() {
    assert_reported_and_repaired(
        "alter table listing_price_log disable trigger user; \
         update listing_price_log set new_price = 3 where id = 3; \
         alter table listing_price_log enable trigger user",
        "broken chain|1|4",
        "Row 4 of listing 1 says that the price before was 2.00, but row 3 before it says 3.00",
    )
    .await;
}

#[tokio::test]
async fn a_dropped_foreign_key_is_reported() {
    assert_reported_and_repaired(
        "alter table listing_price_log drop constraint listing_price_log_listing_id_fkey",
        "foreign key missing or altered|null|null",
        "No foreign key lets a history go with its listing",
    )
    .await;
}

#[tokio::test]
async fn a_foreign_key_that_lets_ids_change_is_reported() {
    assert_reported_and_repaired(
        "alter table listing_price_log drop constraint listing_price_log_listing_id_fkey, \
         add constraint listing_price_log_listing_id_fkey foreign key (listing_id) references listing (id) on delete cascade",
        "foreign key missing or altered|null|null",
        "No foreign key lets a history go with its listing",
    )
    .await;
}

#[tokio::test]
async fn a_foreign_key_that_is_not_enforced_is_reported() {
    assert_reported_and_repaired(
        "alter table listing disable trigger all; alter table listing enable trigger user",
        "foreign key not enforced|null|null",
        "The foreign key of the log is not enforced on listing",
    )
    .await;
}

#[tokio::test]
async fn a_repair_that_comes_too_late_changes_nothing() {
    let db = Database::migrated().await;
    run(&db.superuser, &insert_listing(1, "1")).await;
    let past = "set session_replication_role = replica; update listing set price = 2; reset session_replication_role";
    run(&db.superuser, past).await;
    let mend = value(&db.superuser, "select mend from listing_price_log_problem").await;
    run(&db.superuser, "update listing set price = 3").await;
    run(&db.superuser, &mend).await;
    let log = "select old_price, new_price from listing_price_log order by id";
    assert_eq!(rows(&db.superuser, log).await, ["null|1.00", "2.00|3.00"]);
    let mend = value(&db.superuser, "select mend from listing_price_log_problem").await;
    run(&db.superuser, &mend).await;
    assert_no_problem(&db.superuser).await;
}

#[tokio::test]
async fn no_search_path_of_the_reader_causes_a_problem() {
    let db = Database::migrated().await;
    for path in ["public", "pg_catalog", "''"] {
        run(&db.superuser, &format!("set search_path = {path}")).await;
        assert_no_problem(&db.superuser).await;
    }
}

#[tokio::test]
async fn a_trigger_that_also_fires_for_replication_is_no_problem() {
    let db = Database::migrated().await;
    run(
        &db.superuser,
        "alter table listing enable always trigger listing_price_logged_on_insert",
    )
    .await;
    assert_no_problem(&db.superuser).await;
}
