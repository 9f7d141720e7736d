//! What the README tells people to run does run.

use crate::support::{Database, in_checkout, insert_listing, run};

#[tokio::test]
async fn every_query_of_the_readme_runs() {
    let db = Database::migrated().await;
    run(&db.superuser, &insert_listing(3, "210000")).await;
    run(&db.superuser, "update listing set price = 199500").await;
    let readme = std::fs::read_to_string(in_checkout("README.md")).expect("the README");
    let mut queries = 0;
    for block in readme.split("```sql\n").skip(1) {
        let (query, _) = block.split_once("```").expect("the end of a block");
        run(&db.superuser, query).await;
        queries += 1;
    }
    assert!(queries >= 8, "{queries} queries found");
}
