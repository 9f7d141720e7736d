//! Maintenance of the log: prune, undo and replaced names.

use std::fs;
use std::path::Path;

use crate::support::{
    Database, HISTORY, OTHER_COLUMNS, WAITING, assert_no_problem, in_checkout, insert_listing,
    printed, program, refusal, rows, run, unguarded, value,
};

/// What the maintenance functions recorded, but not when.
const RECORDED: &str =
    "select task, performed_by, row_count, detail from listing_price_log_maintenance order by id";

#[tokio::test]
async fn a_prune_changes_no_price_after_its_time() {
    let db = Database::migrated().await;
    let client = &db.superuser;
    let listings = format!(
        "insert into listing (price, {OTHER_COLUMNS}) \
         select id, 'Loft', 'x', 'HOUSE', 'x', 'x', 'x', 'FR', 1, 1, 1 from generate_series(1, 50) as id"
    );
    run(client, &listings).await;
    for _ in 0..6 {
        let change = "update listing set price = price + 1 + id % 3 where random() < 0.7";
        run(client, change).await;
    }
    // The time of a change in the middle, so the row of that change and the row before it must stay.
    let before = value(
        client,
        "select changed_at from listing_price_log order by id offset (select count(*) / 2 from listing_price_log) limit 1",
    )
    .await;
    // The time of every change, and a microsecond before each.
    let moments = "create table moment as select changed_at as at from listing_price_log \
        union select changed_at - interval '1 microsecond' from listing_price_log";
    run(client, moments).await;
    let answers = format!(
        "select listing.id, at, listing_price_at(listing.id, at) from listing, moment where at >= '{before}' order by 1, 2"
    );
    let answers_before = rows(client, &answers).await;
    let log = "select listing_id, id from listing_price_log";
    let kept = format!(
        "{log} except select listing_id, id from prunable_prices('{before}') order by 1, 2"
    );
    let kept = rows(client, &kept).await;
    let count = |condition: &str| {
        format!("select count(*) from listing_price_log where changed_at < '{before}' {condition}")
    };
    // Each of the 50 listings keeps one price from before.
    let removable = format!("select ({}) - 50", count(""));
    let removable = value(client, &removable).await;

    let prune = format!("select prune_price_history('{before}')");
    assert_eq!(value(client, &prune).await, removable);

    assert_eq!(value(client, &count("")).await, "50");
    assert_eq!(rows(client, &format!("{log} order by 1, 2")).await, kept);
    assert_eq!(rows(client, &answers).await, answers_before);
    assert_no_problem(client).await;
    assert_eq!(value(client, &prune).await, "0");
    let recorded = format!(
        "select task, performed_by, row_count, pruned_before = '{before}', detail from listing_price_log_maintenance"
    );
    assert_eq!(
        rows(client, &recorded).await,
        [format!("prune|postgres|{removable}|t|null")]
    );
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
    let prune = "select prune_price_history('infinity')";
    assert_eq!(value(&db.superuser, prune).await, "2");
    run(&db.superuser, "update listing set price = 4").await;
    assert_eq!(
        rows(&db.superuser, HISTORY).await,
        ["1|2.00|3.00", "1|3.00|4.00"]
    );
    assert_no_problem(&db.superuser).await;
}

#[tokio::test]
async fn an_undo_restores_the_prices_that_nothing_changed_since_and_names_the_others() {
    let db = Database::migrated().await;
    let client = &db.superuser;
    for id in 1..=7 {
        run(client, &insert_listing(id, "10")).await;
    }
    run(
        client,
        &format!(
            "begin; \
             update listing set price = 20 where id in (1, 4, 6, 7); \
             update listing set price = 20 where id = 2; update listing set price = 30 where id = 2; \
             update listing set price = 20 where id = 3; update listing set price = 10 where id = 3; \
             {}; update listing set price = 20 where id = 8; \
             create table undone as select pg_current_xact_id() as xact_id; \
             commit",
            insert_listing(8, "10")
        ),
    )
    .await;
    run(
        client,
        // Listing 4 returns to the price of the transaction, and listing 6 changes without a trace in the log.
        "update listing set price = 50 where id = 4; update listing set price = 20 where id = 4; \
         alter table listing disable trigger user; \
         update listing set price = 60 where id = 6; \
         alter table listing enable trigger user; \
         delete from listing where id = 7",
    )
    .await;

    let undo = "select undo.* from undone, undo_price_changes(xact_id) as undo";
    assert_eq!(
        rows(client, undo).await,
        [
            "1|20.00|10.00|restored",
            "2|30.00|10.00|restored",
            "3|10.00|null|same price",
            "4|20.00|null|changed since",
            "6|60.00|null|changed since",
            "8|20.00|null|first price",
        ]
    );
    let prices = "select id, price from listing order by id";
    assert_eq!(
        rows(client, prices).await,
        [
            "1|10.00", "2|10.00", "3|10.00", "4|20.00", "5|10.00", "6|60.00", "8|20.00"
        ]
    );
    assert_eq!(
        rows(client, undo).await,
        [
            "1|10.00|null|changed since",
            "2|10.00|null|changed since",
            "3|10.00|null|same price",
            "4|20.00|null|changed since",
            "6|60.00|null|changed since",
            "8|20.00|null|first price",
        ]
    );
}

#[tokio::test]
async fn an_undo_restores_nothing_that_is_pruned_or_deleted() {
    let db = Database::migrated().await;
    run(&db.superuser, &insert_listing(1, "10")).await;
    run(&db.superuser, &insert_listing(2, "10")).await;
    run(
        &db.superuser,
        "begin; update listing set price = 20 where id = 1; update listing set price = 30 where id = 1; \
         delete from listing where id = 2; create table undone as select pg_current_xact_id() as xact_id; commit; \
         select prune_price_history('infinity')",
    )
    .await;
    // Listing 1 has only the row from 20 to 30, but never cost 20 after a commit.
    let undo = "select undo.* from undone, undo_price_changes(xact_id) as undo";
    assert_eq!(
        rows(&db.superuser, undo).await,
        ["1|30.00|null|pruned", "2|10.00|null|deleted"]
    );
}

#[tokio::test]
async fn an_undo_is_logged_and_can_be_undone() {
    let db = Database::migrated().await;
    let client = &db.superuser;
    run(client, &insert_listing(1, "10")).await;
    run(client, "update listing set price = 20").await;
    run(client, "set listing.actor = 'undo'").await;
    let undo = "select restored_price, outcome from undo_price_changes(\
        (select xact_id from listing_price_log order by id desc limit 1))";
    assert_eq!(rows(client, undo).await, ["10.00|restored"]);
    assert_eq!(rows(client, undo).await, ["20.00|restored"]);
    let log =
        "select old_price, new_price, changed_by, login_role from listing_price_log order by id";
    assert_eq!(
        rows(client, log).await,
        [
            "null|10.00|postgres|null",
            "10.00|20.00|postgres|null",
            "20.00|10.00|undo|postgres",
            "10.00|20.00|undo|postgres",
        ]
    );
    assert_no_problem(client).await;
}

#[tokio::test]
async fn an_undo_keeps_a_price_that_a_running_transaction_is_changing() {
    let db = Database::migrated().await;
    let other = db.connect().await;
    run(&db.superuser, &insert_listing(1, "10")).await;
    run(&db.superuser, "update listing set price = 20").await;
    run(&other, "begin; update listing set price = 30").await;
    let undo = async {
        let sql = "select undo.* from listing_price_log as log, undo_price_changes(log.xact_id) as undo where log.new_price = 20";
        rows(&db.superuser, sql).await
    };
    let commit = async {
        db.wait_for(WAITING, "1").await;
        run(&other, "commit").await;
    };
    let (outcome, ()) = tokio::join!(undo, commit);
    assert_eq!(outcome, ["1|30.00|null|changed since"]);
}

#[tokio::test]
async fn a_replaced_name_is_nowhere_in_the_log() {
    let db = Database::migrated().await;
    let client = &db.superuser;
    let anna = db.login("anna", "in role listing_api").await;
    let name = value(&anna, "select session_user").await;
    let insert = format!(
        "insert into listing (price, {OTHER_COLUMNS}) values (1, 'Loft', 'x', 'HOUSE', 'x', 'x', 'x', 'FR', 1, 1, 1)"
    );
    // As herself, under another name, and a deletion of both kinds.
    for sql in [
        &insert,
        &insert,
        &insert,
        "delete from listing where id = 1",
        "set listing.actor = 'shop'",
        "update listing set price = 2 where id = 2",
        "delete from listing where id = 2",
        "update listing set price = 2",
    ] {
        run(&anna, sql).await;
    }
    run(client, &insert_listing(9, "1")).await;
    let maintenance = format!(
        "insert into listing_price_log_maintenance (task, performed_by, row_count) values ('prune', '{name}', 1)"
    );
    run(client, &maintenance).await;

    // The name was a replacement itself once.
    let nothing = format!("select replace_actor('nobody', '{name}')");
    assert_eq!(value(client, &nothing).await, "0");
    let replace = format!("select replace_actor('{name}', 'erased-1')");
    assert_eq!(value(client, &replace).await, "6");

    let log =
        "select listing_id, new_price, changed_by, login_role from listing_price_log order by id";
    assert_eq!(
        rows(client, log).await,
        [
            "3|1.00|erased-1|null",
            "3|2.00|shop|erased-1",
            "9|1.00|postgres|null"
        ]
    );
    let deletions = "select listing_id, deleted_by, login_role from listing_deletion order by id";
    assert_eq!(
        rows(client, deletions).await,
        ["1|erased-1|null", "2|shop|erased-1"]
    );
    assert_eq!(
        rows(client, RECORDED).await,
        [
            "prune|erased-1|1|null",
            "replace_actor|postgres|0|erased-1",
            "replace_actor|postgres|6|erased-1",
        ]
    );
    assert_no_problem(client).await;
}

#[tokio::test]
async fn a_name_is_replaced_only_by_a_name() {
    let db = Database::migrated().await;
    for no_name in ["''", "null", "E'a\\nb'", "repeat('x', 201)"] {
        let replace = format!("select replace_actor('anna', {no_name})");
        assert_eq!(
            refusal(&db.superuser, &replace).await,
            "22023 the new name must have 1 to 200 characters, no control characters"
        );
    }
    assert_eq!(rows(&db.superuser, RECORDED).await, [""; 0]);
}

/// The text of docs/price-history.md between two others.
fn documented(begin: &str, end: &str) -> String {
    let page = fs::read_to_string(in_checkout("docs/price-history.md")).expect("read the page");
    let (_, rest) = page.split_once(begin).expect(begin);
    let (script, _) = rest.split_once(end).expect(end);
    script.to_owned()
}

/// A database where listing 1 has had a price until 2001, another until now, and a third.
async fn old_prices() -> Database {
    let db = Database::migrated().await;
    run(&db.superuser, &insert_listing(1, "1")).await;
    run(&db.superuser, "update listing set price = 2").await;
    let old = "update listing_price_log set xact_id = '7', changed_at = '2001-01-01Z'::timestamptz + id * interval '1 day'";
    run(&db.superuser, &unguarded(old)).await;
    run(&db.superuser, "update listing set price = 3").await;
    db
}

/// What the documented prunes write to their file.
const PRUNED: &str = "listing_id,id,old_price,new_price,changed_at,changed_by,login_role,xact_id\n\
    1,1,,1.00,2001-01-02 00:00:00+00,postgres,,7\n";

async fn assert_pruned(db: &Database) {
    let history = rows(&db.superuser, HISTORY).await;
    assert_eq!(history, ["1|1.00|2.00", "1|2.00|3.00"]);
    assert_no_problem(&db.superuser).await;
}

#[tokio::test]
async fn the_monthly_prune_by_cron_writes_the_prices_to_a_file_and_removes_none_that_it_cannot_write()
 {
    let db = old_prices().await;
    let folder = tempfile::tempdir().expect("a folder");
    let script = folder.path().join("prune.sql");
    fs::write(&script, documented("$ cat prune.sql\n", "$ crontab")).expect("write the script");
    let prune = |file: &Path| {
        program("psql")
            .args([&db.url(), "-X", "-v", "ON_ERROR_STOP=1", "-v"])
            .arg(format!("file={}", file.display()))
            .arg("-f")
            .arg(&script)
            .output()
            .expect("run psql")
    };
    let before = rows(&db.superuser, HISTORY).await;
    let refused = printed(&prune(Path::new("/no/such/folder")));
    assert!(refused.contains("No such file"), "{refused}");
    assert_eq!(rows(&db.superuser, HISTORY).await, before);

    let file = folder.path().join("pruned.csv");
    let output = prune(&file);
    assert!(output.status.success(), "{}", printed(&output));
    assert_eq!(fs::read_to_string(&file).expect("read the file"), PRUNED);
    assert_pruned(&db).await;
}

#[tokio::test]
async fn the_monthly_prune_by_pg_cron_writes_the_prices_to_a_file() {
    let db = old_prices().await;
    let file = format!("/tmp/{}.csv", db.name);
    let script = documented("'30 3 1 * *', $$\n", "$$");
    let documented_file = "/var/backups/pruned-$(date +%s).csv";
    assert!(script.contains(documented_file), "{script}");
    run(&db.superuser, &script.replace(documented_file, &file)).await;
    let written = value(&db.superuser, &format!("select pg_read_file('{file}')")).await;
    run(
        &db.superuser,
        &format!("copy (select) to program 'cat > /dev/null && rm {file}'"),
    )
    .await;
    assert_eq!(written, PRUNED);
    assert_pruned(&db).await;
}
