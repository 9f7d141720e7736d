//! What README.md and docs/ tell people is true: the queries run, the commands print what the page shows, the links lead
//! somewhere, and the pages are short.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use listing_api::{SETTINGS, Setting};

use crate::support::{Database, Service, create_key, in_checkout, insert_listing, printed, run};

/// The pages of docs/ and those at the top, by path.
fn pages() -> BTreeMap<String, String> {
    let docs = fs::read_dir(in_checkout("docs")).into_iter().flatten();
    let names = docs.map(|entry| entry.expect("a folder entry").file_name());
    let pages = names.filter(|name| Path::new(name).extension().is_some_and(|end| end == "md"));
    let paths = pages.map(|name| format!("docs/{}", name.display()));
    paths
        .chain(["README.md", "CHANGELOG.md", "SECURITY.md"].map(str::to_owned))
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

/// The commands of a console block, each with what it prints. The further lines of a command begin with four blanks.
fn commands(block: &str) -> Vec<(String, String)> {
    let mut commands: Vec<(String, String)> = Vec::new();
    for line in block.lines() {
        match (line.strip_prefix("$ "), commands.last_mut()) {
            (Some(command), _) => commands.push((command.to_owned(), String::new())),
            (None, Some((command, output))) if output.is_empty() && line.starts_with("    ") => {
                command.extend(["\n", line]);
            }
            (None, Some((_, output))) => output.extend([line, "\n"]),
            (None, None) => panic!("no command before {line}"),
        }
    }
    commands
}

/// The times and the ETags in the output of a command. They differ from run to run.
fn volatile(output: &str) -> Vec<&str> {
    let is_etag = |word: &&str| {
        let digits = word
            .strip_prefix('"')
            .and_then(|word| word.strip_suffix('"'));
        digits.is_some_and(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let is_time = |word: &&str| word.len() == 27 && word.ends_with('Z');
    let etags = output.split_whitespace().filter(is_etag);
    etags.chain(output.split('"').filter(is_time)).collect()
}

/// The text with the values of this run in place of those that the page shows.
fn renamed(text: &str, values: &BTreeMap<String, String>) -> String {
    let mut rest = text;
    let mut renamed = String::new();
    while let Some(first) = rest.chars().next() {
        let value = values
            .iter()
            .find_map(|(shown, value)| Some((value, rest.strip_prefix(shown.as_str())?)));
        if let Some((value, after)) = value {
            renamed += value;
            rest = after;
        } else {
            renamed.push(first);
            rest = &rest[first.len_utf8()..];
        }
    }
    renamed
}

#[tokio::test]
async fn every_command_of_the_api_prints_what_its_page_shows() {
    for (path, expected) in [
        ("README.md", 3),
        ("docs/api.md", 16),
        ("docs/api-reference.md", 1),
    ] {
        let service = Service::start().await;
        let with_keys = Service::start_at(&service.url, &[("AUTH", "keys")]);
        let key = create_key(service.superuser(), "alice").await;
        let folder = tempfile::tempdir().expect("a folder");
        let page = fs::read_to_string(in_checkout(path)).expect("read the page");
        let blocks = page.split("```console\n").skip(1);
        let blocks = blocks.filter_map(|block| block.split("```").next());
        let mut values = BTreeMap::new();
        let mut count = 0;
        for block in blocks.filter(|block| block.starts_with("$ ") && !block.contains("$ make ")) {
            let service = if block.contains("$KEY") {
                &with_keys
            } else {
                &service
            };
            let curlrc = format!("connect-to = \"localhost:8080:{}\"\n", service.address);
            fs::write(folder.path().join(".curlrc"), curlrc).expect("write .curlrc");
            for (command, shown) in commands(block) {
                let command = renamed(&command, &values);
                let output = Command::new("sh")
                    .args(["-c", &command])
                    .env("CURL_HOME", folder.path())
                    .env("KEY", &key)
                    .current_dir(folder.path())
                    .output()
                    .expect("run sh");
                let printed = printed(&output);
                for (shown, value) in volatile(&shown).into_iter().zip(volatile(&printed)) {
                    let value = value.to_owned();
                    values.entry(shown.to_owned()).or_insert(value);
                }
                assert_eq!(printed, renamed(&shown, &values), "{path}: {command}");
                count += 1;
            }
        }
        assert_eq!(count, expected, "{path}");
    }
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
fn the_contract_and_the_changelog_have_the_version_of_the_program() {
    let version = env!("CARGO_PKG_VERSION");
    for (path, line) in [
        ("src/api/openapi.yaml", format!("  version: {version}")),
        ("CHANGELOG.md", format!("## {version} - ")),
    ] {
        let text = fs::read_to_string(in_checkout(path)).expect("read a file");
        let has_version = text.lines().any(|text| text.starts_with(&line));
        assert!(has_version, "{path} has no line {line}");
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
