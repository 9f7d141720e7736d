//! Keys and owners in SQL: what DBAs do with them, and what each role may see.

use tokio_postgres::Client;

use crate::support::{
    Database, OTHER_COLUMNS, OTHER_VALUES, create_administrator_key, create_key, insert_listing,
    insert_owned, refusal, revoke_key, rows, run, value,
};

#[tokio::test]
async fn a_key_is_random_and_only_its_hash_is_stored() {
    let db = Database::migrated().await;
    let made = "create temp table made as \
        select create_api_key('o' || n, 'note ' || n) as key from generate_series(1, 1000) as n";
    run(&db.superuser, made).await;
    let form = "select count(distinct key), count(distinct substr(key, 4, 8)), bool_and(key ~ '^lk_[0-9a-f]{64}$') from made";
    assert_eq!(rows(&db.superuser, form).await, ["1000|1000|t"]);
    let kept = "select count(*), count(*) filter (where owner = 'o' || id and note = 'note ' || id and revoked_at is null \
            and api_key::text !~ key) from made join api_key on key_sha256 = sha256(key::bytea)";
    assert_eq!(rows(&db.superuser, kept).await, ["1000|1000"]);
}

#[tokio::test]
async fn a_key_has_a_named_owner_or_is_an_administrators_key() {
    let db = Database::migrated().await;
    let one_of_both = "22023 a key needs either an owner or administrator => true";
    let broken = |rule: &str| {
        format!("23514 new row for relation \"api_key\" violates check constraint \"{rule}\"")
    };
    let name = broken("api_key_owner_is_a_name");
    let alike = broken("api_key_owner_does_not_look_like_an_administrator");
    for (arguments, expected) in [
        ("", one_of_both),
        ("null", one_of_both),
        ("null, 'note', null", one_of_both),
        ("'a', administrator => null", one_of_both),
        ("'a', administrator => true", one_of_both),
        ("''", &name),
        ("' a'", &name),
        ("'a '", &name),
        ("e'a\\nb'", &name),
        ("'admin:3'", &alike),
        ("'Admin : 3'", &alike),
    ] {
        let refused = refusal(
            &db.superuser,
            &format!("select create_api_key({arguments})"),
        )
        .await;
        assert_eq!(refused, expected, "{arguments}");
    }
    for name in [
        "a",
        "admin",
        "administrator: me",
        "Société d’agences",
        "a:3",
    ] {
        create_key(&db.superuser, name).await;
    }
    let short = refusal(
        &db.superuser,
        "insert into api_key (key_sha256) values ('x')",
    )
    .await;
    assert_eq!(short, broken("api_key_sha256_has_32_bytes"));
    let refused = refusal(&db.superuser, &insert_owned(1, "''")).await;
    assert!(refused.contains("listing_owner_is_a_name"), "{refused}");
}

#[tokio::test]
async fn a_revoked_key_stays_in_the_list_with_the_time_of_its_revocation() {
    let db = Database::migrated().await;
    for owner in ["a", "b"] {
        create_key(&db.superuser, owner).await;
    }
    create_administrator_key(&db.superuser).await;
    let revoked = value(&db.superuser, "select revoke_api_key(2)").await;
    assert_eq!(
        value(&db.superuser, "select revoke_api_key(2)").await,
        revoked
    );
    let list =
        "select id, owner, created_at <= clock_timestamp(), revoked_at, note from list_api_keys()";
    let expected = [
        "1|a|t|null|null",
        &format!("2|b|t|{revoked}|null"),
        "3|null|t|null|null",
    ];
    assert_eq!(rows(&db.superuser, list).await, expected);
    let whole = "select keys::text ~ encode(key_sha256, 'hex') from list_api_keys() as keys join api_key using (id)";
    assert_eq!(rows(&db.superuser, whole).await, ["f", "f", "f"]);
    let unknown = refusal(&db.superuser, "select revoke_api_key(4)").await;
    assert_eq!(unknown, "P0002 there is no key 4");
}

#[tokio::test]
async fn listings_are_handed_over_and_taken_back() {
    let db = Database::migrated().await;
    run(&db.superuser, &insert_listing(1, "1")).await;
    run(&db.superuser, &insert_owned(2, "'a'")).await;
    run(&db.superuser, &insert_owned(3, "'b'")).await;
    let owners = "select owner from listing order by id";
    assert_eq!(rows(&db.superuser, owners).await, ["null", "a", "b"]);
    for (arguments, count, after) in [
        ("array[1, 2, 9], 'b'", "2", ["b", "b", "b"]),
        ("array[1, 2, 3], 'b'", "0", ["b", "b", "b"]),
        (
            "array(select id from listing where id > 1), null",
            "2",
            ["b", "null", "null"],
        ),
        ("null, 'a'", "0", ["b", "null", "null"]),
    ] {
        let handed_over = format!("select hand_over_listings({arguments})");
        assert_eq!(value(&db.superuser, &handed_over).await, count);
        assert_eq!(rows(&db.superuser, owners).await, after);
    }
    let refused = refusal(&db.superuser, "select hand_over_listings(array[1], ' a')").await;
    assert!(refused.contains("listing_owner_is_a_name"), "{refused}");
    assert_eq!(
        value(&db.superuser, "select count(*) from listing_price_log").await,
        "3"
    );
}

#[tokio::test]
async fn each_role_sees_only_the_keys_and_owners_that_it_needs() {
    let db = Database::migrated().await;
    let (valid, revoked) = (
        create_key(&db.superuser, "a").await,
        create_key(&db.superuser, "b").await,
    );
    revoke_key(&db.superuser, &revoked).await;
    run(&db.superuser, &insert_owned(1, "'a'")).await;
    let service = db.login("service", "in role listing_api").await;
    let auditor = db.login("auditor", "in role listing_auditor").await;
    let stranger = db.login("stranger", "").await;

    let find = format!(
        "select key_sha256 = sha256('{valid}'), id, owner \
        from find_api_keys(array[sha256('{valid}'), sha256('{revoked}'), '\\x'])"
    );
    assert_eq!(rows(&service, &find).await, ["t|1|a"]);
    for nothing in ["null", "'{}'", "array[null::bytea]"] {
        let found = rows(&service, &format!("select from find_api_keys({nothing})")).await;
        assert_eq!(found, [""; 0], "{nothing}");
    }
    // The insert of the earlier services, which names no owner.
    let insert = format!(
        "insert into listing (price, {OTHER_COLUMNS}) values (1, {OTHER_VALUES}) returning owner"
    );
    run(&db.superuser, "select setval('listing_id_seq', 9)").await;
    assert_eq!(rows(&service, &insert).await, ["null"]);
    assert_eq!(
        value(&auditor, "select count(*) from list_api_keys()").await,
        "2"
    );
    assert_eq!(
        value(&auditor, "select owner from listing where id = 1").await,
        "a"
    );

    let table = "42501 permission denied for table";
    let function = "42501 permission denied for function";
    for (sql, object, let_in) in [
        (
            "update listing set owner = 'b'",
            format!("{table} listing"),
            None,
        ),
        ("select id from api_key", format!("{table} api_key"), None),
        (
            "select key_sha256 from api_key",
            format!("{table} api_key"),
            None,
        ),
        ("table api_key", format!("{table} api_key"), None),
        (
            "insert into api_key (key_sha256) values (sha256('x'))",
            format!("{table} api_key"),
            None,
        ),
        (
            "update api_key set revoked_at = null",
            format!("{table} api_key"),
            None,
        ),
        ("delete from api_key", format!("{table} api_key"), None),
        (
            "select create_api_key('b')",
            format!("{function} create_api_key"),
            None,
        ),
        (
            "select revoke_api_key(1)",
            format!("{function} revoke_api_key"),
            None,
        ),
        (
            "select hand_over_listings('{1}', 'b')",
            format!("{function} hand_over_listings"),
            None,
        ),
        (
            "select list_api_keys()",
            format!("{function} list_api_keys"),
            Some("auditor"),
        ),
        (
            "select find_api_keys('{}')",
            format!("{function} find_api_keys"),
            Some("service"),
        ),
    ] {
        for (name, client) in [
            ("service", &service),
            ("auditor", &auditor),
            ("stranger", &stranger),
        ] {
            if let_in == Some(name) {
                run(client, sql).await;
            } else {
                assert_eq!(refusal(client, sql).await, object, "{name}: {sql}");
            }
        }
    }
}

#[tokio::test]
async fn every_security_definer_function_has_a_fixed_search_path() {
    let db = Database::migrated().await;
    let unbound = "select proname from pg_proc where pronamespace = 'public'::regnamespace and prosecdef \
        and (proconfig is null or not proconfig @> array['search_path=pg_catalog, pg_temp'])";
    assert_eq!(rows(&db.superuser, unbound).await, [""; 0]);
}

#[tokio::test]
async fn a_key_among_many_is_found_by_its_index() {
    let db = Database::migrated().await;
    run(
        &db.superuser,
        "select create_api_key('o' || n) from generate_series(1, 10000) as n; analyze api_key",
    )
    .await;
    run(&db.superuser, "set plan_cache_mode = force_generic_plan").await;
    let before = reads(&db.superuser).await;
    let find = "select found.owner from api_key, find_api_keys(array[api_key.key_sha256]) as found where api_key.id = 4711";
    assert_eq!(rows(&db.superuser, find).await, ["o4711"]);
    // One scan for the hash of key 4711, one for the key with that hash.
    let expected = [before[0], before[1] + 2];
    assert_eq!(reads(&db.superuser).await, expected);
}

/// How many rows of `api_key` sequential scans have read, and how many index scans there were.
async fn reads(client: &Client) -> Vec<u64> {
    // Otherwise the statistics are late.
    rows(client, "select pg_stat_force_next_flush()").await;
    let reads = "select seq_tup_read, idx_scan from pg_stat_user_tables where relname = 'api_key'";
    let row = value(client, reads).await;
    let count = |count: &str| count.parse().expect("a number");
    row.split('|').map(count).collect()
}
