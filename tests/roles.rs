//! Which role has which right on which object: all of them, from the catalog.

use tokio_postgres::Client;

use crate::support::{Database, apply, in_checkout, insert_listing, refusal, rows, run};

/// Every right that a role other than the owner has on an object in `public`. A new object needs a line here.
const RIGHTS: [&str; 38] = [
    "api_key: nothing",
    "api_key_id_seq: nothing",
    "change_feed_epoch(): execute listing_api",
    "create_api_key(text,text,boolean): nothing",
    "find_api_keys(bytea[]): execute listing_api",
    "hand_over_listings(integer[],text): nothing",
    "idempotency_key: insert listing_api; select listing_api",
    "import_price_history(regclass,name,name,name): nothing",
    "list_api_keys(): execute listing_auditor",
    "listing: delete listing_api, older; \
        insert listing_api (name, description, building_type, street_address, postal_code, city, country, surface_area_m2, \
        rooms_count, bedrooms_count, price, contact_phone_number, owner), older; \
        select listing_api, listing_auditor, older; \
        update listing_api (name, description, building_type, street_address, postal_code, city, country, surface_area_m2, \
        rooms_count, bedrooms_count, price, contact_phone_number, updated_date), older",
    "listing_access: select listing_api, listing_auditor",
    "listing_deletion: select listing_api, listing_auditor",
    "listing_id_seq: usage listing_api, older",
    "listing_price_activity(timestamp with time zone,timestamp with time zone): execute listing_auditor",
    "listing_price_at(integer,timestamp with time zone): execute listing_auditor",
    "listing_price_change: select listing_auditor",
    "listing_price_difference(timestamp with time zone,timestamp with time zone): execute listing_auditor",
    "listing_price_log: select listing_api, listing_auditor",
    "listing_price_log_id_seq: nothing",
    "listing_price_log_maintenance: select listing_auditor",
    "listing_price_log_maintenance_id_seq: nothing",
    "listing_price_log_problem: select listing_auditor",
    "listing_price_log_problem_since(xid8): execute listing_auditor",
    "listing_price_trend(timestamp with time zone,timestamp with time zone): execute listing_auditor",
    "listing_setup_problem: select listing_api, listing_auditor",
    "log_listing_price(): nothing",
    "prunable_prices(timestamp with time zone): execute listing_auditor",
    "prune_idempotency_keys(interval): nothing",
    "prune_price_history(timestamp with time zone): nothing",
    "refinery_schema_history: select listing_api, listing_auditor",
    "refuse_listing_price_log_change(): nothing",
    "replace_actor(text,text): nothing",
    "reset_listing_access(): nothing",
    "restart_change_feed(): nothing",
    "revoke_api_key(bigint): nothing",
    "schema public: usage listing_api, listing_auditor, older, stranger",
    "set_listing_updated_date(): nothing",
    "undo_price_changes(xid8): nothing",
];

/// Reads [`RIGHTS`] from the catalog, by the functions with which PostgreSQL itself answers what a role may do.
async fn rights(client: &Client, database: &str) -> Vec<String> {
    let sql = format!(
        "with role (name, shown) as ( \
            values ('listing_api', 'listing_api'), ('listing_auditor', 'listing_auditor'), \
                ('{database}_older', 'older'), ('{database}_stranger', 'stranger')), \
        object as ( \
            select oid, case relkind when 'S' then 's' else 'r' end as kind, relname::text as name from pg_class \
                where relnamespace = 'public'::regnamespace and relkind in ('r', 'v', 'm', 'f', 'p', 'S') \
            union all select oid, 'f', oid::regprocedure::text from pg_proc where pronamespace = 'public'::regnamespace \
            union all select oid, 'n', 'schema public' from pg_namespace where nspname = 'public'), \
        privilege as ( \
            select kind, lower(privilege_type) || option as name \
            from unnest(array['r', 's', 'f', 'n']) as kind, aclexplode(acldefault(kind::\"char\", 10)), \
                unnest(array['', ' with grant option']) as option group by 1, 2), \
        held as ( \
            select object.oid, privilege.name as privilege, role.shown, case object.kind \
                when 'r' then has_table_privilege(role.name, object.oid, privilege.name) \
                when 's' then has_sequence_privilege(role.name, object.oid, privilege.name) \
                when 'f' then has_function_privilege(role.name, object.oid, privilege.name) \
                else has_schema_privilege(role.name, object.oid, privilege.name) end as whole, \
                (select string_agg(attname, ', ' order by attnum) from pg_attribute \
                    where object.kind = 'r' and attrelid = object.oid and attnum > 0 \
                        and privilege.name ~ '^(select|insert|update|references)' \
                        and case when privilege.name ~ '^(select|insert|update|references)' \
                            then has_column_privilege(role.name, object.oid, attnum, privilege.name) end) as columns \
            from object join privilege on privilege.kind = object.kind cross join role) \
        select object.name || ': ' || coalesce(string_agg(granted.text, '; ' order by granted.text), 'nothing') \
        from object left join ( \
            select oid, privilege || ' ' || string_agg(shown || case when whole then '' else ' (' || columns || ')' end, ', ' \
                order by shown) as text from held where whole or columns is not null group by oid, privilege \
        ) as granted on granted.oid = object.oid \
        group by object.oid, object.name order by object.name collate \"C\""
    );
    rows(client, &sql).await
}

/// The roles of the matrix that belong to the test.
async fn create_roles(db: &Database) -> (Client, Client) {
    (db.login("older", "").await, db.login("stranger", "").await)
}

#[tokio::test]
async fn each_role_has_exactly_the_listed_rights() {
    let db = Database::migrated().await;
    let _sessions = create_roles(&db).await;
    run(
        &db.superuser,
        &format!(
            "grant select, insert, update, delete on listing to {0}_older; \
            grant usage on sequence listing_id_seq to {0}_older",
            db.name
        ),
    )
    .await;
    assert_eq!(rights(&db.superuser, &db.name).await, RIGHTS);
}

#[tokio::test]
async fn every_object_but_listing_has_an_entry_in_listing_access() {
    let db = Database::migrated().await;
    let missing = "select oid::regclass::text from pg_class where relnamespace = 'public'::regnamespace \
            and relkind in ('r', 'v', 'm', 'f', 'p', 'S') \
            and oid not in ('listing'::regclass, pg_get_serial_sequence('listing', 'id')::regclass) \
            and oid not in (select object_id from listing_access where kind <> 'function') \
        union all select oid::regprocedure::text from pg_proc where pronamespace = 'public'::regnamespace \
            and oid not in (select object_id from listing_access where kind = 'function') \
        union all select object from listing_access where object_id is null";
    assert_eq!(rows(&db.superuser, missing).await, [""; 0]);
}

#[tokio::test]
async fn a_function_without_an_entry_for_a_role_is_refused_to_it() {
    let db = Database::migrated().await;
    let (_, stranger) = create_roles(&db).await;
    let api = db.login("api", "in role listing_api").await;
    let auditor = db.login("auditor", "in role listing_auditor").await;
    let mut refused = 0;
    for (client, role) in [
        (&stranger, ""),
        (&api, "listing_api"),
        (&auditor, "listing_auditor"),
    ] {
        let calls = format!(
            "select format('select %s(%s)', oid::regproc, (select string_agg('null::' || type::regtype, ', ') \
                from unnest(proargtypes) as type)), proname \
            from listing_access join pg_proc on oid = object_id where kind = 'function' and not '{role}' = any (roles)"
        );
        for call in rows(&db.superuser, &calls).await {
            let (sql, name) = call.split_once('|').expect("two columns");
            let expected = format!("42501 permission denied for function {name}");
            assert_eq!(refusal(client, sql).await, expected, "{role}");
            refused += 1;
        }
    }
    assert!(refused > 40, "only {refused} calls");
}

/// A database in which `alter default privileges` granted everything to every role before the migration.
async fn migrated_with_default_privileges() -> (Database, Client) {
    // Makes sure that the roles of the migrations exist.
    drop(Database::migrated().await);
    let db = Database::empty().await;
    let (_, old_app) = create_roles(&db).await;
    for objects in ["tables", "sequences", "functions"] {
        for place in ["", "in schema public"] {
            let sql = format!(
                "alter default privileges {place} grant all on {objects} to public, listing_api, listing_auditor; \
                alter default privileges {place} grant all on {objects} to {}_stranger with grant option",
                db.name
            );
            run(&db.superuser, &sql).await;
        }
    }
    apply(&db.url(), &in_checkout("sql"));
    (db, old_app)
}

#[tokio::test]
async fn default_privileges_give_no_right_on_what_the_migrations_create() {
    let (db, _old_app) = migrated_with_default_privileges().await;
    // Other roles keep what they have on listing.
    let but_listing =
        |right: &String| !right.starts_with("listing:") && !right.starts_with("listing_id_seq:");
    let mut rights = rights(&db.superuser, &db.name).await;
    rights.retain(but_listing);
    let mut expected = RIGHTS.map(str::to_owned).to_vec();
    expected.retain(but_listing);
    assert_eq!(rights, expected);
    let problems = "select problem, replace(mend, current_database(), 'db') from listing_setup_problem order by 2";
    let mends = ["public", "db_stranger"].map(|role| {
        ["REFERENCES", "TRIGGER", "TRUNCATE"].map(|right| {
            format!("foreign right|revoke {right} on table public.listing from {role} cascade;")
        })
    });
    let mut mends = mends.concat();
    mends.sort();
    assert_eq!(rows(&db.superuser, problems).await, mends);
}

#[tokio::test]
async fn a_role_with_default_privileges_can_neither_forge_nor_lose_a_price() {
    let (db, old_app) = migrated_with_default_privileges().await;
    run(&db.superuser, &insert_listing(1, "1")).await;
    run(
        &db.superuser,
        &format!("create schema own authorization {}_stranger", db.name),
    )
    .await;
    run(
        &old_app,
        "create table own.listing (id integer, price numeric)",
    )
    .await;
    for (sql, object) in [
        ("delete from listing_price_log", "table listing_price_log"),
        (
            "update listing_price_log set new_price = 2",
            "table listing_price_log",
        ),
        (
            "insert into listing_price_log (listing_id, old_price, new_price, changed_by, changed_at) \
            values (1, 1, 2, 'admin:1', '2020-01-01')",
            "table listing_price_log",
        ),
        ("delete from listing_deletion", "table listing_deletion"),
        (
            "insert into listing_deletion values (1, 9, 2, now(), 'admin:1')",
            "table listing_deletion",
        ),
        (
            "delete from listing_price_log_maintenance",
            "table listing_price_log_maintenance",
        ),
        (
            "select nextval('listing_price_log_id_seq')",
            "sequence listing_price_log_id_seq",
        ),
        (
            "create trigger forged after insert on own.listing for each row execute function log_listing_price()",
            "function log_listing_price",
        ),
        (
            "select prune_price_history('infinity')",
            "function prune_price_history",
        ),
        (
            "select replace_actor('postgres', 'me')",
            "function replace_actor",
        ),
        (
            "select create_api_key(administrator => true)",
            "function create_api_key",
        ),
        ("select key_sha256 from api_key", "table api_key"),
    ] {
        let expected = format!("42501 permission denied for {object}");
        assert_eq!(refusal(&old_app, sql).await, expected, "{sql}");
    }
}

#[tokio::test]
async fn reset_listing_access_revokes_rights_that_were_granted_later() {
    let db = Database::migrated().await;
    let (_older, stranger) = create_roles(&db).await;
    let before = rights(&db.superuser, &db.name).await;
    let grant = "grant insert on listing_price_log to {0}_stranger with grant option; \
        grant update (new_price) on listing_price_log to {0}_older; \
        grant usage on sequence listing_price_log_id_seq to public; \
        grant execute on function log_listing_price, prune_price_history to public; \
        grant insert, update on listing to listing_api; grant update (owner) on listing to listing_auditor; \
        revoke select on listing_price_log from listing_api";
    run(&db.superuser, &grant.replace("{0}", &db.name)).await;
    run(
        &stranger,
        &format!("grant insert on listing_price_log to {}_older", db.name),
    )
    .await;
    assert_ne!(rights(&db.superuser, &db.name).await, before);
    run(&db.superuser, "select reset_listing_access()").await;
    assert_eq!(rights(&db.superuser, &db.name).await, before);
}
