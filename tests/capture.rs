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
    let sql = "create function round_up() returns trigger language plpgsql set search_path = pg_catalog \
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
async fn a_deletion_is_logged_with_the_last_price_and_an_id_after_it() {
    let db = Database::migrated().await;
    run(&db.superuser, &insert_listing(1, "1")).await;
    run(&db.superuser, &insert_listing(2, "2")).await;
    let sql = "update listing set price = 7 where id = 1; begin; delete from listing where id = 1; \
        set local listing.actor = 'ana'; delete from listing where id = 2; \
        create table deleting as select pg_current_xact_id() as xact_id, now() as begun; commit";
    run(&db.superuser, sql).await;
    let deletions = "select listing_id, id, last_price, deleted_by, login_role, deletion.xact_id = deleting.xact_id, \
        deleted_at between begun and clock_timestamp() from listing_deletion as deletion, deleting order by id";
    assert_eq!(
        rows(&db.superuser, deletions).await,
        ["1|4|7.00|postgres|null|t|t", "2|5|2.00|ana|postgres|t|t"]
    );
}

#[tokio::test]
async fn a_rolled_back_delete_leaves_no_deletion_and_the_history() {
    let sql = "begin; delete from listing; rollback; \
        begin; savepoint s; delete from listing where id = 1; rollback to s; commit";
    let db = Database::migrated().await;
    run(&db.superuser, &insert_listing(1, "1")).await;
    run(&db.superuser, sql).await;
    let deletions = rows(&db.superuser, "table listing_deletion").await;
    assert_eq!(deletions, [""; 0]);
    assert_eq!(rows(&db.superuser, HISTORY).await, ["1|null|1.00"]);
}

#[tokio::test]
async fn each_deletion_of_a_listing_that_is_inserted_again_is_logged() {
    let db = Database::migrated().await;
    let insert = insert_listing(1, "1");
    let sql = format!("{insert}; delete from listing; {insert}; delete from listing; {insert}");
    run(&db.superuser, &sql).await;
    let log = "select listing_id, id, 'deletion' from listing_deletion \
        union all select listing_id, id, 'price' from listing_price_log order by id";
    assert_eq!(
        rows(&db.superuser, log).await,
        ["1|2|deletion", "1|4|deletion", "1|5|price"]
    );
}

#[tokio::test]
async fn the_role_that_logged_in_is_logged_beside_another_name() {
    let db = Database::migrated().await;
    run(&db.superuser, &insert_listing(1, "1")).await;
    let importer = db.login("importer", "in role listing_api").await;
    let name = format!("{}_importer", db.name);
    run(
        &db.superuser,
        "create function raise_price() returns void language sql security definer \
            begin atomic update public.listing set price = price + 1; end; \
        create function raise_price_as_the_owner() returns void language sql security definer set listing.actor = 'owner' \
            begin atomic update public.listing set price = price + 1; end",
    )
    .await;
    let update = "update listing set price = price + 1";
    let authorized = format!("set session authorization {name}; {update}");
    let own_name = format!("set listing.actor = '{name}'; {update}");
    let own = format!("{name}|null");
    for (client, sql, expected) in [
        (&importer, update, own.clone()),
        (&importer, &own_name, own.clone()),
        (
            &importer,
            "set role listing_api; update listing set price = price + 1",
            own.clone(),
        ),
        (&importer, "select raise_price()", own.clone()),
        (
            &importer,
            "select raise_price_as_the_owner()",
            format!("owner|{name}"),
        ),
        (
            &importer,
            "set role listing_api; set listing.actor = 'listing_api'; update listing set price = price + 1",
            format!("listing_api|{name}"),
        ),
        (
            &importer,
            "set listing.actor = 'postgres'; update listing set price = price + 1",
            format!("postgres|{name}"),
        ),
        // Only a superuser can log in as another role without its password.
        (&db.superuser, &authorized, own),
    ] {
        run(client, sql).await;
        run(
            client,
            "reset session authorization; reset role; reset listing.actor",
        )
        .await;
        let who = "select changed_by, login_role from listing_price_log order by id desc limit 1";
        assert_eq!(value(&db.superuser, who).await, expected, "{sql}");
    }
    let count = value(&db.superuser, "select count(*) from listing_price_log").await;
    assert_eq!(count, "9");
}

#[tokio::test]
async fn an_actor_is_cleaned_and_costs_no_price() {
    let db = Database::migrated().await;
    run(&db.superuser, &insert_listing(1, "0")).await;
    let long = "x".repeat(200);
    let accents = "é".repeat(200);
    // The text of an E string, or an expression, and what is stored.
    for (actor, expected) in [
        ("E'Société d’agences'", "Société d’agences"),
        ("'  ana  '", "ana"),
        ("E'ana\\r\\n\\tadmin:1'", "ana admin:1"),
        ("E'\\u001b[2Jana\\u007f'", "[2Jana"),
        ("E'a\\u0085b\\u009b2Jc'", "a b 2Jc"),
        ("E'a\\u2028b\\u2029c'", "a b c"),
        (
            "E'a\\u202eb\\u2066c\\u2069d\\u200ee\\u200ff\\u061cg'",
            "a b c d e f g",
        ),
        ("repeat('x', 10000)", &long),
        ("repeat('é', 10000)", &accents),
        ("E'\\n\\u0007\\u2028\\u202e '", "postgres"),
        ("repeat(E'\\n', 10000)", "postgres"),
        ("repeat(' ', 10000)", "postgres"),
        ("'backfill'", "postgres"),
        ("'import'", "postgres"),
        ("'repair'", "postgres"),
    ] {
        // A setting of earlier services that changes how PostgreSQL reads the strings of functions.
        for strings in ["on", "off"] {
            let sql = format!(
                "set standard_conforming_strings = {strings}; set client_min_messages = error; \
                select set_config('listing.actor', {actor}, false) is null; update listing set price = price + 1"
            );
            run(&db.connect().await, &sql).await;
            let who = "select changed_by, coalesce(login_role, changed_by) from listing_price_log order by id desc limit 1";
            let expected = format!("{expected}|postgres");
            assert_eq!(value(&db.superuser, who).await, expected, "{actor}");
        }
    }
    let count = value(&db.superuser, "select count(*) from listing_price_log").await;
    assert_eq!(count, "31");
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

#[tokio::test]
async fn a_change_that_sets_no_updated_date_is_dated() {
    let db = Database::migrated().await;
    run(&db.superuser, &insert_listing(1, "1")).await;
    // A type that cannot be compared.
    let extra = "alter table listing add extra json not null default '{}'";
    run(&db.superuser, extra).await;
    let columns = "select string_agg(attname, ', ' order by attnum) from pg_attribute where attrelid = 'listing'::regclass \
        and attnum > 0 and attname not in ('id', 'updated_date')";
    let columns = value(&db.superuser, columns).await;
    for column in columns.split(", ") {
        let changed = match column {
            "building_type" => "'HOUSE'",
            "surface_area_m2" | "rooms_count" | "bedrooms_count" | "price" => "9",
            "created_date" => "'2020-01-01Z'",
            "extra" => "'[]'",
            _ => "'x'",
        };
        for (assignments, expected) in [
            (format!("{column} = {column}"), "unchanged"),
            (format!("{column} = {changed}"), "now"),
            (
                "price = price + 1, updated_date = '2020-01-02Z'".to_owned(),
                "as set",
            ),
        ] {
            run(
                &db.superuser,
                "update listing set updated_date = '2020-01-01Z'",
            )
            .await;
            run(&db.superuser, &format!("update listing set {assignments}")).await;
            let date = "select case updated_date when '2020-01-01Z' then 'unchanged' when '2020-01-02Z' then 'as set' \
                else case when updated_date > now() - interval '1 hour' then 'now' end end from listing";
            assert_eq!(value(&db.superuser, date).await, expected, "{assignments}");
        }
    }
}
