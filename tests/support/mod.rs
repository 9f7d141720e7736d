//! What several tests share: databases, clusters, the running service, its client, and a network link that can fail.

mod client;
mod cluster;
mod database;
mod history;
mod link;
mod load;
mod migrations;
mod mirror;
mod openapi;
mod service;

pub use client::*;
pub use cluster::*;
pub use database::*;
pub use history::*;
pub use link::*;
pub use load::*;
pub use migrations::*;
pub use mirror::*;
pub use openapi::*;
pub use service::*;

use std::env;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

pub const TWO_SECONDS: Duration = Duration::from_secs(2);

/// Waits until a condition is true. Fails if that takes longer than the limit.
pub fn within(limit: Duration, what: &str, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < limit, "not within {limit:?}: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Calls a function when it is dropped, also if the test panics.
pub struct OnDrop<F: Fn()>(pub F);

impl<F: Fn()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// A loopback address whose port is free.
pub fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind a port");
    listener.local_addr().expect("local address").to_string()
}

/// Runs a program that must succeed, with this text as its input. Returns its output.
pub fn succeed(mut command: Command, input: &str) -> String {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let mut stdin = child.stdin.take().expect("stdin is a pipe");
    let input = input.to_owned();
    let writer = thread::spawn(move || std::io::Write::write_all(&mut stdin, input.as_bytes()));
    let output = child.wait_with_output().expect("wait for the program");
    assert!(output.status.success(), "{command:?}: {}", printed(&output));
    let written = writer.join().expect("the writer thread did not panic");
    written.expect("the program read all of its input");
    String::from_utf8(output.stdout).expect("output is UTF-8")
}

/// All that a program printed, to stdout and to stderr.
pub fn printed(output: &Output) -> String {
    [&output.stdout, &output.stderr]
        .map(|text| String::from_utf8_lossy(text))
        .concat()
}

/// A PostgreSQL program such as psql, found the same way as `make psql` finds it.
pub fn program(name: &str) -> Command {
    let mut command = Command::new(in_checkout("tests/db.sh"));
    command.args(["run", name]);
    command
}

/// Applies the migrations in a folder with the refinery CLI.
pub fn refinery(url: &str, folder: &Path) -> Output {
    Command::new(setting("REFINERY"))
        .args(["migrate", "-e", "DATABASE_URL", "-g", "-d", "-m", "-p"])
        .arg(folder)
        .env("DATABASE_URL", url)
        .output()
        .expect("run the refinery CLI")
}

/// Applies the migrations in a folder, which must succeed. Returns what the CLI printed.
pub fn apply(url: &str, folder: &Path) -> String {
    let output = refinery(url, folder);
    let printed = printed(&output);
    assert!(output.status.success(), "{printed}");
    printed
}

pub fn in_checkout(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// An environment variable that `make test` sets.
pub fn setting(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| {
        panic!("{name} is not set: run the tests with `make test`, which starts a database")
    })
}
