//! Each problem of the log or of its setup is reported with its causes and a statement that repairs it.

use crate::support::{Database, assert_no_problem, insert_listing, rows, run, unguarded, value};

const PROBLEMS: &str = "select problem, listing_id, log_id from listing_price_log_problem";

/// A database where listing 1 has had the prices 1, 2 and 3, with the log ids 1, 3 and 4, and listing 2 costs 5.
async fn two_listings() -> Database {
    let db = Database::migrated().await;
    for sql in [
        &insert_listing(1, "1"),
        &insert_listing(2, "5"),
        "update listing set price = 2 where id = 1",
        "update listing set price = 3 where id = 1",
    ] {
        run(&db.superuser, sql).await;
    }
    assert_no_problem(&db.superuser).await;
    db
}

/// Makes problems. Asserts how they are reported, and that the reported statements repair them.
async fn assert_reported_and_repaired(
    db: &Database,
    cause: &str,
    problems: &[&str],
    explanation: &str,
) {
    let client = &db.superuser;
    run(client, cause).await;
    assert_eq!(rows(client, PROBLEMS).await, problems, "{cause}");
    let first = "select explanation from listing_price_log_problem limit 1";
    assert_eq!(value(client, first).await, explanation);

    // Each repair leaves fewer problems.
    for _ in problems {
        let mends = rows(client, "select mend from listing_price_log_problem").await;
        if let Some(mend) = mends.first() {
            run(client, mend).await;
        }
    }
    assert_no_problem(client).await;
    let unsigned = "select * from listing_price_log where changed_by = 'repair' and login_role is distinct from session_user";
    assert_eq!(rows(client, unsigned).await, [""; 0]);
    // The repaired log keeps logging.
    run(client, "update listing set price = price + 1").await;
    assert_no_problem(client).await;
}

/// The statement, run while neither triggers nor foreign keys fire.
fn as_replica(statement: &str) -> String {
    format!("set session_replication_role = replica; {statement}; reset session_replication_role")
}

#[tokio::test]
async fn a_listing_without_a_price_is_reported_with_every_cause() {
    for (cause, id) in [
        (as_replica(&insert_listing(9, "9")), 9),
        (
            unguarded("delete from listing_price_log where listing_id = 1"),
            1,
        ),
    ] {
        assert_reported_and_repaired(
            &two_listings().await,
            &cause,
            &[&format!("listing without a price|{id}|null")],
            &format!(
                "Listing {id} has no price in the log. Possible causes: it was inserted while the trigger did not fire; its \
                 prices were removed; its id was changed while the foreign key was not enforced."
            ),
        )
        .await;
    }
}

#[tokio::test]
async fn prices_without_a_listing_are_reported_with_every_cause() {
    let explanation = "Listing 1 is gone but its prices are not. Possible causes, while the foreign key was not enforced: it \
        was deleted; its id was changed; its prices were added.";
    assert_reported_and_repaired(
        &two_listings().await,
        &as_replica("delete from listing where id = 1"),
        &["prices without a listing|1|4"],
        explanation,
    )
    .await;
}

#[tokio::test]
async fn a_changed_id_is_reported_for_both_ids() {
    assert_reported_and_repaired(
        &two_listings().await,
        &as_replica("update listing set id = 9 where id = 1"),
        &["listing without a price|9|null", "prices without a listing|1|4"],
        "Listing 9 has no price in the log. Possible causes: it was inserted while the trigger did not fire; its prices were \
         removed; its id was changed while the foreign key was not enforced.",
    )
    .await;
}

#[tokio::test]
async fn a_last_price_that_differs_is_reported_with_every_cause() {
    for (cause, log_id, price, logged) in [
        (
            as_replica("update listing set price = 9 where id = 1"),
            4,
            "9.00",
            "3.00",
        ),
        (
            unguarded("delete from listing_price_log where id = 4"),
            3,
            "3.00",
            "2.00",
        ),
        (
            unguarded("update listing_price_log set new_price = 8 where id = 4"),
            4,
            "3.00",
            "8.00",
        ),
        (
            "insert into listing_price_log (listing_id, old_price, new_price, changed_by) values (1, 3, 7, 'x')".to_owned(),
            5,
            "3.00",
            "7.00",
        ),
    ] {
        assert_reported_and_repaired(
            &two_listings().await,
            &cause,
            &[&format!("last price differs|1|{log_id}")],
            &format!(
                "Listing 1 costs {price} but its last logged price is {logged}. Possible causes: its price was changed while \
                 the trigger did not fire, or in an AFTER trigger; rows at the end of its history were removed, altered or \
                 added."
            ),
        )
        .await;
    }
}

#[tokio::test]
async fn a_history_without_a_beginning_is_reported_with_every_cause() {
    for (cause, log_id, old_price) in [
        ("delete from listing_price_log where id = 1", 3, "1.00"),
        (
            "delete from listing_price_log where listing_id = 1 and id < 4",
            4,
            "2.00",
        ),
        (
            "update listing_price_log set old_price = 7 where id = 1",
            1,
            "7.00",
        ),
    ] {
        assert_reported_and_repaired(
            &two_listings().await,
            &unguarded(cause),
            &[&format!("history without a beginning|1|{log_id}")],
            &format!(
                "The history of listing 1 begins with a change from {old_price}. Possible causes: the rows before it were \
                 removed, and not by prune_price_history(); this row was altered. Restore the history from a backup, or accept \
                 the loss."
            ),
        )
        .await;
    }
}

#[tokio::test]
async fn a_prune_explains_the_histories_that_begin_before_its_time_only() {
    let db = two_listings().await;
    run(&db.superuser, "select prune_price_history(now())").await;
    assert_no_problem(&db.superuser).await;
    run(
        &db.superuser,
        "update listing set price = 6 where id = 2; update listing set price = 7 where id = 2",
    )
    .await;
    let removed = unguarded("delete from listing_price_log where listing_id = 2 and new_price < 7");
    run(&db.superuser, &removed).await;
    assert_eq!(
        rows(&db.superuser, PROBLEMS).await,
        ["history without a beginning|2|6"]
    );
}

#[tokio::test]
async fn a_broken_chain_is_reported_with_every_cause() {
    for (cause, log_id, old_price, before, price_before) in [
        (
            unguarded("delete from listing_price_log where id = 3"),
            4,
            "2.00",
            1,
            "1.00",
        ),
        (
            unguarded("update listing_price_log set new_price = 2.5 where id = 3"),
            4,
            "2.00",
            3,
            "2.50",
        ),
        // The altered row equals the next.
        (
            unguarded("update listing_price_log set new_price = 3 where id = 3"),
            4,
            "2.00",
            3,
            "3.00",
        ),
        (
            unguarded("update listing_price_log set old_price = null where id = 3"),
            3,
            "nothing",
            1,
            "1.00",
        ),
        (
            "insert into listing_price_log (listing_id, id, old_price, new_price, changed_by) overriding system value \
                 values (1, 2, 1, 8, 'x')"
                .to_owned(),
            3,
            "1.00",
            2,
            "8.00",
        ),
        (
            format!(
                "{}; update listing set price = 3.5 where id = 1",
                as_replica("update listing set price = 9 where id = 1")
            ),
            5,
            "9.00",
            4,
            "3.00",
        ),
    ] {
        assert_reported_and_repaired(
            &two_listings().await,
            &cause,
            &[&format!("broken chain|1|{log_id}")],
            &format!(
                "Row {log_id} of listing 1 says that the price before was {old_price}, but row {before} before it says \
                 {price_before}. Possible causes: rows between them were removed; one of the two was altered or added; a price \
                 was changed while the trigger did not fire, or in an AFTER trigger. Restore the history from a backup, or \
                 close the gap."
            ),
        )
        .await;
    }
}

#[tokio::test]
async fn a_price_changed_in_an_after_trigger_is_reported_as_a_broken_chain_with_another_last_price()
{
    let db = two_listings().await;
    let trigger = "create function round_up() returns trigger language plpgsql set search_path = public as \
            $$ begin update listing set price = ceil(new.price) where id = new.id; return null; end $$; \
        create trigger a after update on listing for each row when (new.price <> ceil(new.price)) execute function round_up(); \
        update listing set price = 3.5 where id = 1; \
        drop trigger a on listing";
    run(&db.superuser, trigger).await;
    let mut reported = rows(&db.superuser, PROBLEMS).await;
    reported.sort();
    assert_eq!(
        reported,
        [
            "broken chain|1|5",
            "broken chain|1|6",
            "last price differs|1|6"
        ]
    );
}

#[tokio::test]
async fn a_hole_with_equal_ends_is_not_found() {
    let db = two_listings().await;
    run(
        &db.superuser,
        "update listing set price = 2 where id = 1; update listing set price = 9 where id = 1",
    )
    .await;
    let hole = unguarded("delete from listing_price_log where id in (4, 5)");
    run(&db.superuser, &hole).await;
    assert_no_problem(&db.superuser).await;
}

/// The triggers of the migrations: table, name, and what a problem with them means.
const TRIGGERS: [(&str, &str, &str); 6] = [
    (
        "listing",
        "listing_price_logged_on_insert",
        "first prices are not logged",
    ),
    (
        "listing",
        "listing_price_logged_on_update",
        "price changes are not logged",
    ),
    (
        "listing",
        "listing_deletion_logged_on_delete",
        "deletions are not logged",
    ),
    (
        "listing_price_log",
        "listing_price_log_append_only",
        "its rows can be changed",
    ),
    (
        "listing_deletion",
        "listing_deletion_append_only",
        "its rows can be changed",
    ),
    (
        "listing_price_log_maintenance",
        "listing_price_log_maintenance_append_only",
        "its rows can be changed",
    ),
];

#[tokio::test]
async fn a_trigger_that_does_not_fire_for_every_writer_is_reported() {
    let db = two_listings().await;
    for (table, name, effect) in TRIGGERS {
        for state in ["disable", "enable replica"] {
            assert_reported_and_repaired(
                &db,
                &format!("alter table {table} {state} trigger {name}"),
                &["trigger not enabled|null|null"],
                &format!("Trigger {name} on {table} does not fire for every writer, so {effect}."),
            )
            .await;
        }
    }
}

#[tokio::test]
async fn a_missing_or_altered_trigger_is_reported() {
    let db = two_listings().await;
    for (table, name, effect) in TRIGGERS {
        for cause in [
            format!("drop trigger {name} on {table}"),
            // It fires for fewer events.
            format!(
                "drop trigger {name} on {table}; create trigger {name} after update on {table} for each row \
                 when (false) execute function log_listing_price()"
            ),
        ] {
            assert_reported_and_repaired(
                &db,
                &cause,
                &["trigger missing or altered|null|null"],
                &format!("Trigger {name} on {table} is missing or altered, so {effect}."),
            )
            .await;
        }
    }
}

#[tokio::test]
async fn a_trigger_that_also_fires_for_replication_is_no_problem() {
    let db = Database::migrated().await;
    for (table, name, _) in TRIGGERS {
        let always = format!("alter table {table} enable always trigger {name}");
        run(&db.superuser, &always).await;
    }
    assert_no_problem(&db.superuser).await;
}

#[tokio::test]
async fn a_missing_or_altered_foreign_key_is_reported() {
    let db = two_listings().await;
    let drop = "alter table listing_price_log drop constraint listing_price_log_listing_id_fkey";
    let add = "add constraint listing_price_log_listing_id_fkey foreign key (listing_id) references listing (id)";
    for cause in [
        drop.to_owned(),
        // It lets ids change.
        format!("{drop}, {add} on delete cascade"),
        // It keeps a listing from being deleted.
        format!("{drop}, {add} on update restrict"),
        format!("{drop}, {add} on update restrict on delete cascade not valid"),
    ] {
        assert_reported_and_repaired(
            &db,
            &cause,
            &["foreign key missing or altered|null|null"],
            "The foreign key of listing_price_log, which deletes prices with their listing and keeps its id, is missing or \
             altered.",
        )
        .await;
    }
}

#[tokio::test]
async fn a_foreign_key_that_is_not_enforced_is_reported() {
    let db = two_listings().await;
    for table in ["listing", "listing_price_log"] {
        assert_reported_and_repaired(
            &db,
            &format!("alter table {table} disable trigger all; alter table {table} enable trigger user"),
            &["foreign key not enforced|null|null"],
            &format!(
                "The foreign key of listing_price_log is not enforced on {table}, because its triggers there are disabled."
            ),
        )
        .await;
    }
}

#[tokio::test]
async fn a_right_that_the_migrations_did_not_grant_is_reported() {
    let db = two_listings().await;
    let stranger = db.create_role("stranger", "").await;
    for (right, object, role) in [
        ("select", "table public.listing_price_log", &*stranger),
        ("insert", "table public.listing_price_log", "listing_api"),
        (
            "update (new_price)",
            "table public.listing_price_log",
            &*stranger,
        ),
        ("delete", "table public.listing_deletion", "public"),
        (
            "insert",
            "table public.listing_price_log_maintenance",
            &*stranger,
        ),
        (
            "select (key_sha256)",
            "table public.api_key",
            "listing_auditor",
        ),
        (
            "usage",
            "sequence public.listing_price_log_id_seq",
            &*stranger,
        ),
        (
            "execute",
            "function public.undo_price_changes(xid8)",
            "public",
        ),
        ("execute", "function public.log_listing_price()", &*stranger),
        // To attach to listing or to truncate it.
        ("truncate", "table public.listing", &*stranger),
        ("trigger", "table public.listing", &*stranger),
        ("references", "table public.listing", &*stranger),
        ("references (id)", "table public.listing", &*stranger),
        // The service must not choose an id or a creation date, nor change an owner.
        ("insert", "table public.listing", "listing_api"),
        ("insert (id)", "table public.listing", "listing_api"),
        (
            "update (created_date)",
            "table public.listing",
            "listing_api",
        ),
        ("update (owner)", "table public.listing", "listing_api"),
        ("update (price)", "table public.listing", "listing_auditor"),
    ] {
        let (_, name) = object.split_once(' ').expect("kind and name");
        assert_reported_and_repaired(
            &db,
            &format!("grant {right} on {object} to {role}"),
            &["foreign right|null|null"],
            &format!(
                "Role {role} has the right {right} on {name}, which the migrations did not grant."
            ),
        )
        .await;
    }
}

#[tokio::test]
async fn an_earlier_service_that_writes_listings_with_a_role_of_its_own_is_no_problem() {
    let db = Database::migrated().await;
    let role = db.create_role("earlier", "").await;
    let grants = format!(
        "grant select, insert, update, delete on listing to {role}; grant usage on sequence listing_id_seq to {role}"
    );
    run(&db.superuser, &grants).await;
    assert_no_problem(&db.superuser).await;
}

#[tokio::test]
async fn a_writable_schema_is_reported() {
    let db = two_listings().await;
    let stranger = db.create_role("stranger", "").await;
    for role in [&*stranger, "public"] {
        assert_reported_and_repaired(
            &db,
            &format!("grant create on schema public to {role}"),
            &["schema public is writable|null|null"],
            &format!(
                "Role {role} may create functions and operators in the schema public, which other sessions then call."
            ),
        )
        .await;
    }
}

#[tokio::test]
async fn another_owner_a_rule_and_row_security_are_reported() {
    let db = two_listings().await;
    let stranger = db.create_role("stranger", "").await;
    for (cause, problem, explanation) in [
        (
            format!("alter table listing owner to {stranger}"),
            "different owners|null|null",
            format!(
                "listing belongs to {stranger}, and listing_price_log to postgres. \
                 The owner of the one can run code with the rights of the other."
            ),
        ),
        (
            "create rule swallow as on insert to listing_price_log where new.id < 0 do instead nothing".to_owned(),
            "rule on a table|null|null",
            "Rule swallow on listing_price_log can replace a write by something else.".to_owned(),
        ),
        (
            "alter table listing_price_log enable row level security".to_owned(),
            "row security on the log|null|null",
            "Row security on listing_price_log can hide rows from its readers.".to_owned(),
        ),
    ] {
        assert_reported_and_repaired(&db, &cause, &[problem], &explanation).await;
    }
}

#[tokio::test]
async fn a_trigger_without_a_search_path_is_reported() {
    assert_reported_and_repaired(
        &two_listings().await,
        "create table audit (listing_id integer); \
         create function note() returns trigger language plpgsql as \
            $$ begin insert into audit values (new.id); return null; end $$; \
         create trigger noted after update on listing for each row execute function note()",
        &["trigger without a search_path|null|null"],
        "Trigger noted on listing calls note(), which has no search_path of its own. The service has only pg_catalog in its \
         path, so names without a schema are not found there.",
    )
    .await;
}

#[tokio::test]
async fn a_repair_that_comes_too_late_changes_nothing() {
    let db = Database::migrated().await;
    run(&db.superuser, &insert_listing(1, "1")).await;
    run(&db.superuser, &as_replica("update listing set price = 2")).await;
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
async fn a_check_since_a_transaction_reports_the_listings_written_since() {
    let db = two_listings().await;
    let client = &db.superuser;
    run(client, &insert_listing(3, "3")).await;
    run(client, &insert_listing(4, "4")).await;
    run(
        client,
        &as_replica("update listing set price = 8 where id = 1"),
    )
    .await;
    let checked = value(client, "select pg_current_xact_id()").await;
    let since = format!(
        "select problem, listing_id from listing_price_log_problem_since('{checked}') order by listing_id"
    );
    assert_eq!(rows(client, &since).await, [""; 0]);

    for damage in [
        as_replica("update listing set price = 9 where id = 2"),
        // The deletion is logged, but the foreign key does not fire.
        "alter table listing disable trigger all; alter table listing enable trigger user; \
         delete from listing where id = 3; alter table listing enable trigger all"
            .to_owned(),
        "insert into listing_price_log (listing_id, id, old_price, new_price, changed_by) overriding system value \
             values (4, 100, 7, 4, 'x')"
            .to_owned(),
        "alter table listing disable trigger listing_price_logged_on_insert".to_owned(),
    ] {
        run(client, &damage).await;
    }
    assert_eq!(
        rows(client, &since).await,
        [
            "last price differs|2",
            "prices without a listing|3",
            "broken chain|4",
            "trigger not enabled|null"
        ]
    );
    let whole = "select problem, listing_id from listing_price_log_problem order by listing_id";
    assert_eq!(
        rows(client, whole).await,
        [
            "last price differs|1",
            "last price differs|2",
            "prices without a listing|3",
            "broken chain|4",
            "trigger not enabled|null"
        ]
    );
    let zero = whole.replace("problem order", "problem_since('0') order");
    assert_eq!(rows(client, &zero).await, rows(client, whole).await);
}
