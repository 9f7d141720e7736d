//! What README.md and docs/ tell people is true: the queries run, the links lead somewhere, and the pages are short.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use listing_api::{SETTINGS, Setting};

use crate::support::{Database, in_checkout, insert_listing, run};

/// README.md and the pages of docs/, by path.
fn pages() -> BTreeMap<String, String> {
    let docs = fs::read_dir(in_checkout("docs")).into_iter().flatten();
    let names = docs.map(|entry| entry.expect("a folder entry").file_name());
    let pages = names.filter(|name| Path::new(name).extension().is_some_and(|end| end == "md"));
    let paths = pages.map(|name| format!("docs/{}", name.display()));
    paths
        .chain(["README.md".to_owned()])
        .map(|path| {
            let text = fs::read_to_string(in_checkout(&path)).expect("read a page");
            (path, text)
        })
        .collect()
}

/// The lines of a page outside its code blocks.
fn prose(page: &str) -> String {
    let mut in_code = false;
    let mut is_prose = |line: &&str| {
        let fence = line.trim_start().starts_with("```");
        in_code ^= fence;
        !in_code && !fence
    };
    page.lines()
        .filter(&mut is_prose)
        .collect::<Vec<_>>()
        .join("\n")
}

/// The anchors of the headings of a page, as GitHub makes them.
fn anchors(page: &str) -> Vec<String> {
    let anchor = |heading: &str| {
        let heading = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = heading
            .chars()
            .filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    let prose = prose(page);
    let headings = prose.lines().filter(|line| line.starts_with('#'));
    headings.map(anchor).collect()
}

#[tokio::test]
async fn every_query_runs() {
    let mut queries = 0;
    for (path, page) in pages() {
        let blocks = page.split("```sql\n").skip(1);
        let blocks: Vec<_> = blocks
            .filter_map(|block| block.split("```").next())
            .collect();
        if blocks.is_empty() {
            continue;
        }
        println!("queries of {path}");
        let db = Database::migrated().await;
        run(&db.superuser, &insert_listing(3, "210000")).await;
        run(&db.superuser, "update listing set price = 199500").await;
        for query in &blocks {
            run(&db.superuser, query).await;
        }
        queries += blocks.len();
    }
    assert!(queries >= 8, "only {queries} queries found");
}

#[test]
fn the_configuration_page_lists_the_settings_of_the_program() {
    let page = fs::read_to_string(in_checkout("docs/configuration.md")).expect("read the page");
    let documented: Vec<_> = page
        .lines()
        .filter(|line| line.starts_with("| `"))
        .collect();
    let row = |setting: &Setting| {
        let Setting {
            name,
            meaning,
            default,
        } = setting;
        format!("| `{name}` | {meaning} | {default} |")
    };
    let settings: Vec<_> = SETTINGS.iter().map(row).collect();
    assert_eq!(documented[..settings.len()], settings);
}

#[test]
fn every_link_leads_to_a_file_and_a_heading() {
    let pages = pages();
    for (path, page) in &pages {
        let prose = prose(page);
        let targets = prose
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next());
        for target in targets.filter(|target| !target.contains("://")) {
            let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
            let folder = in_checkout(path);
            let folder = folder.parent().expect("a folder");
            let linked = if file.is_empty() {
                in_checkout(path)
            } else {
                folder.join(file)
            };
            assert!(linked.exists(), "{path}: no file for the link {target}");
            if !anchor.is_empty()
                && linked
                    .extension()
                    .is_some_and(|extension| extension == "md")
            {
                let linked = fs::read_to_string(linked).expect("read a page");
                let there = anchors(&linked).iter().any(|heading| heading == anchor);
                assert!(there, "{path}: no heading for the link {target}");
            }
        }
    }
}

#[test]
fn every_page_is_short() {
    let pages = pages();
    assert!(pages.len() > 1, "no pages in docs/");
    for (path, page) in &pages {
        let limit = if path == "README.md" { 200 } else { 150 };
        let lines = page.lines().count();
        assert!(
            lines <= limit,
            "{path} has {lines} lines, more than {limit}"
        );
    }
}
