//! The views and functions for DBAs, and what they read.

use tokio_postgres::Client;

use crate::support::{Database, OTHER_COLUMNS, insert_listing, rows, run, unguarded, value};

/// Inserts a listing and replaces its history by these prices, with the rights of the owner of the log.
async fn write_history(client: &Client, id: i32, prices: &[(&str, &str)]) {
    run(client, &insert_listing(id, "-0")).await;
    let delete = format!("delete from listing_price_log where listing_id = {id}");
    run(client, &unguarded(&delete)).await;
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

/// Listings with prices in January and February of 2026. The session is not in UTC.
async fn january_and_february() -> Database {
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
                ("2026-02-05Z", "100"),
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
    let lyon = "update listing set city = 'Lyon' where id = 4";
    run(&db.superuser, lyon).await;
    db
}

#[tokio::test]
async fn the_trend_counts_changes_by_month_and_place() {
    let db = january_and_february().await;
    let january = [
        "2026-01-01|FR|Lyon|APARTMENT|1|1|0|-100.00",
        "2026-01-01|FR|Paris|APARTMENT|3|2|1|-10.00",
    ];
    let february = [
        "2026-02-01|FR|Lyon|APARTMENT|1|0|1|null",
        "2026-02-01|FR|Paris|APARTMENT|3|1|2|-20.00",
    ];
    let both = [january, february].concat();
    for (period, expected) in [
        ("", &both[..]),
        ("'2026-01-01Z', '2026-02-01Z'", &january),
        ("'2026-02-01Z'", &february),
        ("'2026-01-01Z', '2026-01-01Z'", &[]),
        // The beginning counts, the end does not.
        (
            "'2026-02-05Z'",
            &[
                "2026-02-01|FR|Lyon|APARTMENT|1|0|1|null",
                "2026-02-01|FR|Paris|APARTMENT|2|1|1|-50.00",
            ],
        ),
        (
            "'2026-02-01Z', '2026-02-05Z'",
            &["2026-02-01|FR|Paris|APARTMENT|1|0|1|10.00"],
        ),
    ] {
        let trend = format!("select * from listing_price_trend({period})");
        assert_eq!(rows(&db.superuser, &trend).await, expected, "{period}");
    }
}

#[tokio::test]
async fn the_difference_of_two_times_is_that_of_the_prices_at_both() {
    let db = january_and_february().await;
    let difference =
        "select * from listing_price_difference('2026-01-05Z', '2026-02-05Z') order by 1";
    assert_eq!(
        rows(&db.superuser, difference).await,
        [
            "1|100.00|99.00|-1.00|-1.00|2",
            "2|150.00|75.00|-75.00|-50.00|1",
            "3|0.00|100.00|100.00|null|1",
            "4|0.00|1.00|1.00|null|1",
        ]
    );
    // A new listing has no price at the first time. Listing 3 costs the same at both times.
    let since_the_beginning = "select * from listing_price_difference('2025-12-31Z', '2026-01-05Z') \
        union all select * from listing_price_difference('2026-01-01Z', '2026-02-05Z') where listing_id in (2, 3) order by 1, 2";
    assert_eq!(
        rows(&db.superuser, since_the_beginning).await,
        [
            "1|null|100.00|null|null|1",
            "2|100.00|75.00|-25.00|-25.00|2",
            "2|null|150.00|null|null|2",
            "3|null|0.00|null|null|2",
            "4|null|0.00|null|null|2",
        ]
    );

    let times = "values ('2025-12-31Z'::timestamptz), ('2026-01-01Z'), ('2026-01-05Z'), ('2026-02-01Z'), ('2026-02-05Z')";
    let disagreement = format!(
        "with moment (at) as ({times}) \
         select since.at, until.at, listing.id from moment as since join moment as until on since.at < until.at, listing \
         left join lateral (select * from listing_price_difference(since.at, until.at) where listing_id = listing.id) as found \
            on true \
         where (found.old_price, found.new_price) is distinct from \
             (listing_price_at(listing.id, since.at), listing_price_at(listing.id, until.at)) \
             and (found.listing_id is not null \
                 or listing_price_at(listing.id, since.at) is distinct from listing_price_at(listing.id, until.at))"
    );
    assert_eq!(rows(&db.superuser, &disagreement).await, [""; 0]);
}

#[tokio::test]
async fn the_activity_shows_who_changed_how_much_by_day() {
    let db = january_and_february().await;
    run(
        &db.superuser,
        &unguarded(
            "update listing_price_log set changed_by = 'anna', login_role = 'shop' where listing_id = 2; \
             update listing_price_log set changed_by = 'bob' where listing_id = 3",
        ),
    )
    .await;
    let january = [
        "2026-01-01|anna|shop|1|1|0|0|null",
        "2026-01-01|bob|bob|1|1|0|0|null",
        "2026-01-01|test|test|2|2|0|0|null",
        "2026-01-05|anna|shop|1|0|0|1|50.00",
        "2026-01-05|bob|bob|1|0|1|0|-100.00",
        "2026-01-05|test|test|1|0|1|0|-100.00",
        "2026-01-31|test|test|1|0|1|0|-10.00",
    ];
    let february = [
        "2026-02-01|test|test|1|0|0|1|9.00",
        "2026-02-05|anna|shop|1|0|1|0|-75.00",
        "2026-02-05|bob|bob|1|0|0|1|100.00",
        "2026-02-05|test|test|1|0|0|1|1.00",
    ];
    for (period, expected) in [
        ("", &[&january[..], &february].concat()[..]),
        ("'2026-01-01Z', '2026-02-01Z'", &january),
        ("'2026-02-01Z'", &february),
    ] {
        let activity = format!("select * from listing_price_activity({period})");
        assert_eq!(rows(&db.superuser, &activity).await, expected, "{period}");
    }
}

#[tokio::test]
async fn every_comment_fits_a_column_of_psql() {
    let db = Database::migrated().await;
    // Objects that initdb made have lower oids.
    let long = "select description from pg_description where objoid >= 16384 and length(description) >= 100";
    assert_eq!(rows(&db.superuser, long).await, [""; 0]);
}

#[tokio::test]
async fn every_column_whose_name_does_not_say_all_has_a_comment() {
    let db = Database::migrated().await;
    let silent = "select relname, string_agg(attname, ' ' order by attnum) \
        from pg_attribute join pg_class on pg_class.oid = attrelid \
        where relnamespace = 'public'::regnamespace and relkind in ('r', 'v') and attnum > 0 and not attisdropped \
            and relname <> 'refinery_schema_history' and col_description(attrelid, attnum) is null \
        group by relname order by relname";
    assert_eq!(
        rows(&db.superuser, silent).await,
        [
            "listing|id name description street_address postal_code city surface_area_m2 rooms_count bedrooms_count created_date",
            "listing_access|object",
            "listing_price_change|listing_id id old_price new_price",
        ]
    );
}

/// A database with 51,000 prices of 1,000 listings in seven months, in the order of their time.
async fn many_prices() -> Database {
    let db = Database::migrated().await;
    let listings = format!(
        "insert into listing (price, {OTHER_COLUMNS}) \
         select 1000, 'Loft', 'x', 'HOUSE', 'x', 'x', 'Town ' || id % 20, 'FR', 1, 1, 1 from generate_series(1, 1000) as id"
    );
    run(&db.superuser, &listings).await;
    let prices = "delete from listing_price_log; \
        insert into listing_price_log (listing_id, old_price, new_price, changed_at, changed_by) \
        select id, case when step > 0 then 1000 + (step - 1) % 2 end, 1000 + step % 2, \
            '2026-06-01Z'::timestamptz + step * interval '4 days' + id * interval '1 minute', 'test' \
        from generate_series(0, 50) as step, generate_series(1, 1000) as id";
    run(&db.superuser, &unguarded(prices)).await;
    run(&db.superuser, "vacuum analyze").await;
    db
}

/// How many prices of the table a query reads in sequence and by an index, not counting those that the index alone returns.
async fn prices_read(client: &Client, query: &str) -> (u32, u32) {
    let read = "select coalesce(sum(seq_tup_read), 0), coalesce(sum(idx_tup_fetch), 0) \
        from pg_stat_xact_user_tables where relname = 'listing_price_log'";
    let numbers = async || {
        let read = value(client, read).await;
        let (in_sequence, by_index) = read.split_once('|').expect("two columns");
        [in_sequence, by_index].map(|number| number.parse::<u32>().expect("a number"))
    };
    // Parallel workers have statistics of their own.
    run(
        client,
        "begin; set local max_parallel_workers_per_gather = 0",
    )
    .await;
    let before = numbers().await;
    value(client, query).await;
    let after = numbers().await;
    run(client, "rollback").await;
    (after[0] - before[0], after[1] - before[1])
}

#[tokio::test]
async fn a_question_about_a_listing_a_transaction_or_a_month_does_not_read_the_whole_log() {
    let db = many_prices().await;
    let client = &db.superuser;
    let checked = value(client, "select pg_current_xact_id()").await;
    let changes = "update listing set price = price + 1 where id in (7, 8)";
    let xact_id = value(
        client,
        &format!("with changed as ({changes} returning id) select distinct pg_current_xact_id() from changed"),
    )
    .await;

    let month = "'2026-10-01Z', '2026-11-01Z'";
    for (question, most) in [
        (
            "(select * from listing_price_log_problem where listing_id = 7) as problem",
            110,
        ),
        (
            &format!("listing_price_log_problem_since('{checked}')"),
            220,
        ),
        (
            "(select * from listing_price_change where listing_id = 7) as change",
            60,
        ),
        ("listing_price_at(7, '2026-07-01Z')", 60),
        (&format!("undo_price_changes('{xact_id}')"), 20),
        // A month has 8,000 prices.
        (&format!("listing_price_trend({month})"), 20_000),
        (&format!("listing_price_activity({month})"), 20_000),
        (&format!("listing_price_difference({month})"), 20_000),
    ] {
        let explained = format!("select count(*) from {question}");
        let (in_sequence, by_index) = prices_read(client, &explained).await;
        assert_eq!(in_sequence, 0, "{question}");
        assert!(by_index <= most, "{question} reads {by_index} prices");
    }
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
        plan.contains("Index Only Scan using listing_price_log_pkey"),
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
        prepare city (int, bigint, text) as select name from listing \
            where id > $1 and hashtextextended(city, 0) = hashtextextended($3, 0) and city = $3 order by id limit $2; \
        prepare postal_code (int, bigint, text) as select name from listing \
            where id > $1 and hashtextextended(postal_code, 0) = hashtextextended($3, 0) and postal_code = $3 \
            order by id limit $2";
    run(&db.superuser, page).await;
    for (filter, index, common, rare) in [
        ("city", "listing_city_hash_id_idx", "Paris", "Town 6000"),
        (
            "postal_code",
            "listing_postal_code_hash_id_idx",
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
