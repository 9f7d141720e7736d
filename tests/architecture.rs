//! Imports in `src/` run one way, and `src/postgres/` knows nothing about HTTP or our tables.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use crate::support::in_checkout;

/// Each module may import only modules further right. `main`, `lib` and `log_writer` are exempt.
const LAYERS: [&str; 6] = [
    "service",
    "check",
    "api admin",
    "http",
    "postgres",
    "settings types",
];
const EXEMPT: [&str; 3] = ["main", "lib", "log_writer"];
const FORBIDDEN_IN_POSTGRES: &str = "actix_web::http StatusCode ApiError public.listing api_key";

/// Adds the code below a folder, by module path (`http`, `http::error`).
fn read(folder: &Path, parent: &str, modules: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(folder).expect("read a folder") {
        let path = entry.expect("a folder entry").path();
        let stem = path.file_stem().expect("a name").display().to_string();
        let name = match (parent, &*stem) {
            ("", _) => stem,
            (_, "mod") => parent.to_owned(),
            _ => format!("{parent}::{stem}"),
        };
        if path.is_dir() {
            read(&path, &name, modules);
        } else if path.extension().is_some_and(|end| end == "rs") {
            let text = fs::read_to_string(&path).expect("read a source file");
            let code = text.split("#[cfg(test)]").next().unwrap_or_default();
            let code = code.lines().filter(|line| !line.trim().starts_with("//"));
            modules.insert(name, code.collect::<Vec<_>>().join("\n"));
        }
    }
}

/// The paths at the start of a text, each below a root: `a::b` and `a::c::d` for `a::{b, c::d}`.
fn paths(root: &str, text: &str) -> Vec<String> {
    let (mut path, mut groups, mut found) = (root.to_owned(), Vec::new(), Vec::new());
    for character in text.chars() {
        match character {
            '{' if path.is_empty() || path.ends_with("::") => groups.push(path.clone()),
            ',' | '}' if !groups.is_empty() => {
                let group = groups[groups.len() - 1].clone();
                found.push(std::mem::replace(&mut path, group));
                groups.truncate(groups.len() - usize::from(character == '}'));
            }
            _ if character.is_alphanumeric() || "_:".contains(character) => path.push(character),
            _ if groups.is_empty() => break,
            _ => (),
        }
    }
    found.push(path);
    found
}

/// The paths in a module that may lead to our own modules.
fn imports(name: &str, code: &str) -> Vec<String> {
    let parent = name
        .rsplit_once("::")
        .map(|(parent, _)| parent.to_owned() + "::");
    let mut found = Vec::new();
    for (keyword, root) in [("crate::", ""), ("super::", &parent.unwrap_or_default())] {
        let texts = code.split(keyword).skip(1);
        found.extend(texts.flat_map(|text| paths(root, text)));
    }
    // `child::x` in `mod.rs`.
    let direct = code.split(|c: char| !c.is_alphanumeric() && !"_:".contains(c));
    let direct = direct.filter(|path| path.contains("::"));
    found.extend(direct.map(|path| format!("{name}::{path}")));
    found.retain(|path| !path.is_empty() && !path.ends_with("::"));
    found
}

#[test]
fn imports_run_one_way_and_postgres_knows_no_http_and_no_table() {
    let mut modules = BTreeMap::new();
    read(&in_checkout("src"), "", &mut modules);
    modules.retain(|name, _| !EXEMPT.contains(&&**name));
    let layer = |path: &str| path.split("::").next().unwrap_or_default().to_owned();
    let rank_of = |layer: &str| {
        let in_layer = |names: &&str| names.split(' ').any(|name| name == layer);
        LAYERS.iter().position(in_layer)
    };
    let layers: BTreeSet<_> = modules.keys().map(|name| layer(name)).collect();
    let expected = LAYERS.join(" ");
    assert_eq!(layers, expected.split(' ').map(str::to_owned).collect());
    let (mut problems, mut edges) = (BTreeSet::new(), BTreeSet::new());
    for (name, code) in &modules {
        let own = layer(name);
        for import in imports(name, code) {
            let target = layer(&import);
            if target != own && rank_of(&target).is_some_and(|rank| Some(rank) <= rank_of(&own)) {
                problems.insert(format!("{name} imports {import}"));
            }
            let begins_with =
                |file: &&String| format!("{import}::").starts_with(&format!("{file}::"));
            let file = modules.keys().rfind(begins_with);
            let file = file.filter(|file| layer(file) == own && *file != name);
            edges.extend(file.map(|file| (name, file)));
        }
        let words = FORBIDDEN_IN_POSTGRES.split(' ');
        let found = words.filter(|word| own == "postgres" && code.contains(word));
        problems.extend(found.map(|word| format!("{name} contains {word}")));
    }
    // Drops the files that import no other file of their folder, again and again. A circle remains.
    for _ in 0..modules.len() {
        let importing: BTreeSet<_> = edges.iter().map(|(name, _)| *name).collect();
        edges.retain(|(_, file)| importing.contains(file));
    }
    for (name, file) in edges {
        problems.insert(format!("{name} imports {file}, in or before a circle"));
    }
    assert!(problems.is_empty(), "{problems:#?}");
}
