//! Every change of a price is logged, whatever statement makes it. Nothing else is logged.

use futures_util::SinkExt;
use std::pin::pin;

use crate::support::{
    Database, HISTORY, OTHER_COLUMNS, OTHER_VALUES, assert_no_problem, insert_listing, rows, run,
    value,
};

/// Runs statements on a database where listing 1 costs 100 and listing 2 costs 200. Asserts the log rows that they add.
async fn assert_logged(sql: &str, expected: &[&str]) {
    let db = Database::migrated().await;
    run(&db.superuser, &insert_listing(1, "100")).await;
    run(&db.superuser, &insert_listing(2, "200")).await;
    run(&db.superuser, sql).await;
    let added =
        "select listing_id, old_price, new_price from listing_price_log where id > 2 order by id";
    assert_eq!(rows(&db.superuser, added).await, expected);
    assert_no_problem(&db.superuser).await;
}

#[tokio::test]
async fn an_insert_is_logged_as_the_first_price() {
    assert_logged(&insert_listing(3, "300.5"), &["3|null|300.50"]).await;
}

#[tokio::test]
async fn every_row_of_a_multi_row_insert_is_logged() {
    let sql = format!(
        "insert into listing (id, price, {OTHER_COLUMNS}) values (3, 1, {OTHER_VALUES}), (4, 0, {OTHER_VALUES})"
    );
    assert_logged(&sql, &["3|null|1.00", "4|null|0.00"]).await;
}

#[tokio::test]
async fn a_copy_is_logged() {
    let db = Database::migrated().await;
    let copy = format!("copy listing (id, price, {OTHER_COLUMNS}) from stdin with (format csv)");
    let mut sink = pin!(db.superuser.copy_in(&copy).await.expect("copy"));
    for (id, price) in [(1, "9.99"), (2, "0.1")] {
        let line = format!("{id},{price},Loft,Attic,HOUSE,x,x,x,FR,1,1,0\n");
        let sent = sink.send(std::io::Cursor::new(line.into_bytes())).await;
        sent.expect("send a line");
    }
    assert_eq!(sink.finish().await.expect("copy"), 2);
    assert_eq!(
        rows(&db.superuser, HISTORY).await,
        ["1|null|9.99", "2|null|0.10"]
    );
}

#[tokio::test]
async fn an_upsert_is_logged_as_an_insert_or_an_update_of_each_row() {
    let sql = format!(
        "insert into listing (id, price, {OTHER_COLUMNS}) \
         values (1, 101, {OTHER_VALUES}), (2, 200, {OTHER_VALUES}), (3, 300, {OTHER_VALUES}) \
         on conflict (id) do update set price = excluded.price, name = 'Upserted'"
    );
    assert_logged(&sql, &["1|100.00|101.00", "3|null|300.00"]).await;
}

#[tokio::test]
async fn a_merge_is_logged_as_an_insert_or_an_update_of_each_row() {
    let sql = format!(
        "merge into listing using (values (1, 90), (2, 200), (3, 300)) as offer (id, price) on listing.id = offer.id \
         when matched then update set price = offer.price \
         when not matched then insert (id, price, {OTHER_COLUMNS}) values (offer.id, offer.price, {OTHER_VALUES})"
    );
    assert_logged(&sql, &["1|100.00|90.00", "3|null|300.00"]).await;
}

#[tokio::test]
async fn an_update_of_the_price_is_logged() {
    assert_logged(
        "update listing set price = 99.99 where id = 1",
        &["1|100.00|99.99"],
    )
    .await;
}

#[tokio::test]
async fn an_update_of_the_price_among_other_columns_is_logged_once() {
    let sql = "update listing set name = 'Flat', price = 110, city = 'Lyon' where id = 1";
    assert_logged(sql, &["1|100.00|110.00"]).await;
}

#[tokio::test]
async fn a_price_changed_by_another_trigger_is_logged_as_stored() {
    let sql = "create function round_up() returns trigger language plpgsql \
               as $$ begin new.price = ceil(new.price / 1000) * 1000; return new; end $$; \
               create trigger rounded before update on listing for each row execute function round_up(); \
               update listing set name = 'Flat' where id = 1";
    assert_logged(sql, &["1|100.00|1000.00"]).await;
}

#[tokio::test]
async fn every_row_of_a_bulk_update_is_logged() {
    assert_logged(
        "update listing set price = price * 1.015",
        &["1|100.00|101.50", "2|200.00|203.00"],
    )
    .await;
}

#[tokio::test]
async fn an_update_through_a_view_is_logged() {
    let sql = "create view cheap as select id, price from listing where price < 150; update cheap set price = 120";
    assert_logged(sql, &["1|100.00|120.00"]).await;
}

#[tokio::test]
async fn each_of_several_prices_in_one_transaction_is_logged() {
    let db = Database::migrated().await;
    let sql = format!(
        "begin; {}; update listing set price = 2; update listing set price = 1; commit",
        insert_listing(1, "1")
    );
    run(&db.superuser, &sql).await;
    let log = "select old_price, new_price, xact_id = max(xact_id) over () from listing_price_log order by id";
    assert_eq!(
        rows(&db.superuser, log).await,
        ["null|1.00|t", "1.00|2.00|t", "2.00|1.00|t"]
    );
}

#[tokio::test]
async fn an_unchanged_price_is_not_logged_again() {
    let sql = "update listing set price = price; update listing set price = 100.0 where id = 1; \
               update listing set price = 100.004 where id = 1; update listing set name = 'Flat', description = ''";
    assert_logged(sql, &[]).await;
}

#[tokio::test]
async fn a_rolled_back_update_leaves_no_price() {
    let sql = "begin; update listing set price = 1; rollback; \
               begin; update listing set price = 2 where id = 1; savepoint s; update listing set price = 3; \
               rollback to s; commit";
    assert_logged(sql, &["1|100.00|2.00"]).await;
}

#[tokio::test]
async fn deleting_a_listing_deletes_its_history() {
    let db = Database::migrated().await;
    run(&db.superuser, &insert_listing(1, "1")).await;
    run(&db.superuser, &insert_listing(2, "2")).await;
    run(
        &db.superuser,
        "update listing set price = 3; delete from listing where id = 1",
    )
    .await;
    assert_eq!(
        rows(&db.superuser, HISTORY).await,
        ["2|null|2.00", "2|2.00|3.00"]
    );
}

#[tokio::test]
async fn a_listing_inserted_again_under_its_id_starts_a_new_history() {
    let sql = format!(
        "delete from listing where id = 1; {}",
        insert_listing(1, "70")
    );
    assert_logged(&sql, &["1|null|70.00"]).await;
}

#[tokio::test]
async fn a_change_is_attributed_to_the_role_that_logged_in() {
    let db = Database::migrated().await;
    let client = db.login("importer", "in role listing_api").await;
    run(
        &client,
        &format!("set role listing_api; {}", insert_listing(1, "1")),
    )
    .await;
    let changed_by = value(&client, "select changed_by from listing_price_log").await;
    assert_eq!(changed_by, format!("{}_importer", db.name));
}

#[tokio::test]
async fn a_change_is_attributed_to_the_actor_if_one_is_set() {
    let db = Database::migrated().await;
    let sql = format!(
        "set listing.actor = 'import-2026-11'; {}; \
         begin; set local listing.actor = 'ana'; update listing set price = 2; commit; \
         update listing set price = 3; set listing.actor = ''; update listing set price = 4; \
         reset listing.actor; update listing set price = 5",
        insert_listing(1, "1")
    );
    run(&db.superuser, &sql).await;
    let user = value(&db.superuser, "select session_user").await;
    assert_eq!(
        rows(
            &db.superuser,
            "select changed_by from listing_price_log order by id"
        )
        .await,
        ["import-2026-11", "ana", "import-2026-11", &user, &user]
    );
}
