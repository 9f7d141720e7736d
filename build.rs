//! Unpacks the two files of Swagger UI that the page at /docs needs, so that they become part of the program. Finds out which
//! commit is built.

use std::error::Error;
use std::io::{Cursor, copy};
use std::path::Path;
use std::process::Command;
use std::{env, fs::File};

use utoipa_swagger_ui_vendored::SWAGGER_UI_VENDORED;
use zip::ZipArchive;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=sql");
    println!("cargo::rustc-env=COMMIT={:.8}", commit());
    let out = env::var("OUT_DIR")?;
    let mut archive = ZipArchive::new(Cursor::new(SWAGGER_UI_VENDORED))?;
    for index in 0..archive.len() {
        let mut file = archive.by_index(index)?;
        for name in ["swagger-ui.css", "swagger-ui-bundle.js"] {
            if file.name()?.ends_with(&format!("/dist/{name}")) {
                copy(&mut file, &mut File::create(Path::new(&out).join(name))?)?;
            }
        }
    }
    Ok(())
}

/// The commit in `GIT_COMMIT`, for a build without the repository. Otherwise the one that is checked out.
fn commit() -> String {
    println!("cargo::rerun-if-env-changed=GIT_COMMIT");
    if let Some(commit) = env::var("GIT_COMMIT").ok().filter(|set| !set.is_empty()) {
        return commit;
    }
    // Without this, a repository around this folder would be asked.
    if !Path::new(".git").exists() {
        return "unknown".to_owned();
    }
    // A checkout changes HEAD, a commit changes its branch. In a worktree, both are elsewhere.
    for path in ["HEAD", "refs/heads"] {
        if let Some(path) = git(&["rev-parse", "--git-path", path]) {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    git(&["rev-parse", "HEAD"]).unwrap_or_else(|| "unknown".to_owned())
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let printed = String::from_utf8(output.stdout).ok()?;
    output
        .status
        .success()
        .then(|| printed.trim_end().to_owned())
}
