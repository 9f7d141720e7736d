//! The views and functions for DBAs, before and after a prune.

use tokio_postgres::Client;

use crate::support::{
    Database, HISTORY, OTHER_COLUMNS, assert_no_problem, insert_listing, rows, run, value,
};

/// Inserts a listing and replaces its history by these prices, with the rights of the owner of the log.
async fn write_history(client: &Client, id: i32, prices: &[(&str, &str)]) {
    run(client, &insert_listing(id, "-0")).await;
    run(
        client,
        &format!("delete from listing_price_log where listing_id = {id}"),
    )
    .await;
    let mut old_price = "null";
    for (changed_at, price) in prices {
        let row = format!("{id}, {old_price}, {price}, '{changed_at}', 'test'");
        run(
            client,
            &format!(
                "insert into listing_price_log (listing_id, old_price, new_price, changed_at, changed_by) values ({row}); \
                 alter table listing disable trigger user; \
                 update listing set price = {price} where id = {id}; \
                 alter table listing enable trigger user"
            ),
        )
        .await;
        old_price = price;
    }
}

#[tokio::test]
async fn a_change_shows_its_amount_and_its_period() {
    let db = Database::migrated().await;
    let prices = [
        ("2026-01-01 00:00Z", "200"),
        ("2026-01-02 00:00Z", "150"),
        ("2026-01-03 00:00Z", "0"),
        ("2026-01-04 00:00Z", "99.99"),
    ];
    write_history(&db.superuser, 1, &prices).await;
    let changes = "select old_price, new_price, delta, percent, valid_from::date, valid_to::date, changed_by \
        from listing_price_change where listing_id = 1 order by id";
    assert_eq!(
        rows(&db.superuser, changes).await,
        [
            "null|200.00|null|null|2026-01-01|2026-01-02|test",
            "200.00|150.00|-50.00|-25.00|2026-01-02|2026-01-03|test",
            "150.00|0.00|-150.00|-100.00|2026-01-03|2026-01-04|test",
            "0.00|99.99|99.99|null|2026-01-04|null|test",
        ]
    );
}

#[tokio::test]
async fn the_price_at_a_time_is_the_last_one_logged_until_then() {
    let db = Database::migrated().await;
    let prices = [("2026-01-01 12:00Z", "200"), ("2026-01-02 12:00Z", "150")];
    write_history(&db.superuser, 1, &prices).await;
    for (at, expected) in [
        ("2026-01-01 11:59:59.999999Z", "null"),
        ("2026-01-01 12:00Z", "200.00"),
        ("2026-01-02 11:59:59.999999Z", "200.00"),
        ("2026-01-02 12:00Z", "150.00"),
        ("infinity", "150.00"),
    ] {
        let sql = format!("select listing_price_at(1, '{at}')");
        assert_eq!(value(&db.superuser, &sql).await, expected, "{at}");
    }
    assert_eq!(
        value(&db.superuser, "select listing_price_at(2, now())").await,
        "null"
    );
}

#[tokio::test]
async fn the_trend_counts_changes_by_month_and_place() {
    let db = Database::migrated().await;
    run(&db.superuser, "set timezone = 'Pacific/Auckland'").await;
    for (id, prices) in [
        (
            1,
            [
                ("2026-01-01Z", "100"),
                ("2026-01-31 23:59Z", "90"),
                ("2026-02-01 00:00Z", "99"),
            ],
        ),
        (
            2,
            [
                ("2026-01-01Z", "100"),
                ("2026-01-05Z", "150"),
                ("2026-02-05Z", "75"),
            ],
        ),
        (
            3,
            [
                ("2026-01-01Z", "100"),
                ("2026-01-05Z", "0"),
                ("2026-02-05Z", "1"),
            ],
        ),
        (
            4,
            [
                ("2026-01-01Z", "100"),
                ("2026-01-05Z", "0"),
                ("2026-02-05Z", "1"),
            ],
        ),
    ] {
        write_history(&db.superuser, id, &prices).await;
    }
    run(
        &db.superuser,
        "update listing set city = 'Lyon' where id = 4",
    )
    .await;
    assert_eq!(
        rows(
            &db.superuser,
            "select * from listing_price_trend order by month, city"
        )
        .await,
        [
            "2026-01-01|FR|Lyon|APARTMENT|1|1|0|-100.00",
            "2026-01-01|FR|Paris|APARTMENT|3|2|1|-10.00",
            "2026-02-01|FR|Lyon|APARTMENT|1|0|1|null",
            "2026-02-01|FR|Paris|APARTMENT|3|1|2|-20.00",
        ]
    );
}

#[tokio::test]
async fn a_prune_changes_no_price_after_its_cut() {
    let db = Database::migrated().await;
    run(
        &db.superuser,
        &format!(
            "insert into listing (price, {OTHER_COLUMNS}) \
             select id, 'Loft', 'x', 'HOUSE', 'x', 'x', 'x', 'FR', 1, 1, 1 from generate_series(1, 50) as id"
        ),
    )
    .await;
    for _ in 0..6 {
        run(
            &db.superuser,
            "update listing set price = price + 1 + id % 3 where random() < 0.7",
        )
        .await;
    }
    // The cut is the time of a change in the middle, so the row of that change and the row before it must stay.
    let cut = value(
        &db.superuser,
        "select changed_at from listing_price_log order by id offset (select count(*) / 2 from listing_price_log) limit 1",
    )
    .await;
    // The time of every change, and a microsecond before each.
    let answers = format!(
        "select listing.id, at, listing_price_at(listing.id, at) from listing, \
             (select changed_at as at from moment union select changed_at - interval '1 microsecond' from moment) as moments \
         where at >= '{cut}' order by 1, 2"
    );
    run(
        &db.superuser,
        "create table moment as select changed_at from listing_price_log",
    )
    .await;
    let before = rows(&db.superuser, &answers).await;
    let count = "select count(*) from listing_price_log";
    let old = format!("{count} where changed_at < '{cut}'");
    let (rows_before, old_before) = (
        value(&db.superuser, count)
            .await
            .parse::<u32>()
            .expect("a number"),
        value(&db.superuser, &old)
            .await
            .parse::<u32>()
            .expect("a number"),
    );

    let pruned = value(
        &db.superuser,
        &format!("select listing_price_log_prune('{cut}')"),
    )
    .await;

    // Each of the 50 listings keeps one row from before the cut.
    assert_eq!(pruned, (old_before - 50).to_string());
    assert_eq!(
        value(&db.superuser, count).await,
        (rows_before - old_before + 50).to_string()
    );
    assert_eq!(rows(&db.superuser, &answers).await, before);
    assert_no_problem(&db.superuser).await;
    let again = value(
        &db.superuser,
        &format!("select listing_price_log_prune('{cut}')"),
    )
    .await;
    assert_eq!(again, "0");
}

#[tokio::test]
async fn a_prune_always_keeps_the_current_prices() {
    let db = Database::migrated().await;
    run(&db.superuser, &insert_listing(1, "1")).await;
    run(
        &db.superuser,
        "update listing set price = 2; update listing set price = 3",
    )
    .await;
    assert_eq!(
        value(&db.superuser, "select listing_price_log_prune('infinity')").await,
        "2"
    );
    run(&db.superuser, "update listing set price = 4").await;
    assert_eq!(
        rows(&db.superuser, HISTORY).await,
        ["1|2.00|3.00", "1|3.00|4.00"]
    );
    assert_no_problem(&db.superuser).await;
}

#[tokio::test]
async fn a_history_is_read_from_the_index_alone() {
    let db = Database::migrated().await;
    run(
        &db.superuser,
        &format!(
            "insert into listing (price, {OTHER_COLUMNS}) \
             select id, 'Loft', 'x', 'HOUSE', 'x', 'x', 'x', 'FR', 1, 1, 1 from generate_series(1, 2000) as id; \
             update listing set price = price + 1"
        ),
    )
    .await;
    run(&db.superuser, "vacuum analyze listing_price_log").await;
    let plan = rows(
        &db.superuser,
        "explain (analyze, costs off, timing off) \
         select new_price, changed_at from listing_price_log where listing_id = 7 order by id",
    )
    .await
    .join("\n");
    assert!(
        plan.contains("Index Only Scan using listing_price_log_listing_id_id"),
        "{plan}"
    );
    assert!(plan.contains("Heap Fetches: 0"), "{plan}");
    assert!(!plan.contains("Sort"), "{plan}");
}

#[tokio::test]
async fn a_page_filtered_by_city_or_postal_code_reads_no_other_listing() {
    let db = Database::migrated().await;
    // The first half of the listings has the common city and the common postal code. The page starts after it.
    run(
        &db.superuser,
        "insert into listing (price, name, description, building_type, street_address, postal_code, city, country, \
            surface_area_m2, rooms_count, bedrooms_count) \
         select id, 'Loft', 'x', 'HOUSE', 'x', case when id <= 10000 then '75011' else id::text end, \
            case when id <= 10000 then 'Paris' else 'Town ' || id / 3 end, 'FR', 1, 1, 1 \
         from generate_series(1, 20000) as id; \
         analyze listing",
    )
    .await;
    let page = "set plan_cache_mode = force_generic_plan; \
        prepare city (int, bigint, text) as select name from listing where id > $1 and city = $3 order by id limit $2; \
        prepare postal_code (int, bigint, text) as \
            select name from listing where id > $1 and postal_code = $3 order by id limit $2";
    run(&db.superuser, page).await;
    for (filter, index, common, rare) in [
        ("city", "listing_city_id_idx", "Paris", "Town 6000"),
        (
            "postal_code",
            "listing_postal_code_id_idx",
            "75011",
            "19999",
        ),
    ] {
        for (after, value) in [
            (0, common),
            (9990, common),
            (10000, common),
            (0, rare),
            (0, "Nowhere"),
        ] {
            let explain = "explain (analyze, costs off, timing off)";
            let execute = format!("{explain} execute {filter} ({after}, 101, '{value}')");
            let plan = rows(&db.superuser, &execute).await.join("\n");
            let by_index = plan.contains(&format!("Index Scan using {index}"));
            let passed_over = plan.contains("Removed by Filter") || plan.contains("Sort");
            assert!(by_index && !passed_over, "{plan}");
        }
    }
}

#[tokio::test]
async fn a_price_change_updates_no_index_of_the_listing() {
    let db = Database::migrated().await;
    run(&db.superuser, &insert_listing(1, "1")).await;
    run(
        &db.superuser,
        "begin; update listing set price = 2, updated_date = now()",
    )
    .await;
    let hot = "select pg_stat_get_xact_tuples_hot_updated('listing'::regclass)";
    assert_eq!(value(&db.superuser, hot).await, "1");
}
