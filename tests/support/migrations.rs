//! The files in `sql/`, and the schema that they make.

use std::fs;

use tempfile::TempDir;

use super::{Database, apply, in_checkout, program, succeed};

/// Applies all migrations to a database. Returns what the CLI printed.
pub fn migrate(db: &Database) -> String {
    apply(&db.url(), &in_checkout("sql"))
}

/// A copy of the migrations that a test may change.
pub fn migrations() -> TempDir {
    let folder = TempDir::new().expect("a folder");
    for name in migration_names() {
        let copy = folder.path().join(&name);
        fs::copy(in_checkout("sql").join(name), copy).expect("copy a file");
    }
    folder
}

/// The file names of the migrations, by version.
pub fn migration_names() -> Vec<String> {
    let folder = fs::read_dir(in_checkout("sql")).expect("read sql/");
    let name = |entry: std::io::Result<fs::DirEntry>| {
        let name = entry.expect("a folder entry").file_name();
        name.into_string().expect("a name in UTF-8")
    };
    let mut names: Vec<_> = folder.map(name).collect();
    names.sort_by_key(|name| version(name));
    names
}

pub fn version(name: &str) -> Option<u32> {
    name.strip_prefix('V')?.split_once("__")?.0.parse().ok()
}

/// The schema of a database as SQL.
pub fn catalogue(db: &Database) -> String {
    let mut pg_dump = program("pg_dump");
    pg_dump.args(["--schema-only", &format!("--dbname={}", db.url())]);
    // These lines contain a key that is different in each dump.
    let restrict =
        |line: &&str| !line.starts_with("\\restrict") && !line.starts_with("\\unrestrict");
    let dump = succeed(pg_dump, "");
    dump.lines().filter(restrict).collect::<Vec<_>>().join("\n")
}
