//! The program: its arguments, its log, and the exit code.

use std::io::{self, Write};
use std::mem;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use actix_web::rt::System;
use env_logger::{Builder, Env, Target};
use mimalloc::MiMalloc;

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

const USAGE: &str = "\
Serves real-estate listings over PostgreSQL, with the price history that the database keeps.

Usage: listing-api [--check | --help | --version]

  --check    verify settings, database and schema, then end: 0 if all is well, 1 with the reason
  --help     print this
  --version  print the version

Settings come from the environment:
";

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os()
        .skip(1)
        .map(|argument| argument.to_string_lossy().into_owned())
        .collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let check_only = match arguments[..] {
        [] => false,
        ["--check"] => true,
        ["--help"] => {
            println!("{USAGE}\n{}", listing_api::SETTINGS);
            return ExitCode::SUCCESS;
        }
        ["--version"] => {
            println!("listing-api {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        _ => {
            eprintln!(
                "listing-api: unknown arguments {}: see --help",
                arguments.join(" ")
            );
            return ExitCode::FAILURE;
        }
    };
    Builder::from_env(Env::default().default_filter_or("info,actix_server=warn,actix_http=off"))
        .target(Target::Pipe(Box::new(Log)))
        .init();
    thread::spawn(|| {
        loop {
            thread::sleep(Duration::from_millis(50));
            write_log();
        }
    });
    let ended = System::new().block_on(listing_api::run(check_only));
    write_log();
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("listing-api: {reason}");
            ExitCode::FAILURE
        }
    }
}

/// Lines on their way to stderr. A thread of their own brings them there, many at a time: one by one, they would cost each
/// request a call of the system, a fifteenth of all it costs.
static LOG: Mutex<Vec<u8>> = Mutex::new(Vec::new());

/// More than this is not kept but written at once, however long it takes.
const MAX_LOG_BYTES: usize = 1 << 20;

struct Log;

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut log = LOG.lock().unwrap_or_else(PoisonError::into_inner);
        log.extend_from_slice(line);
        let full = log.len() > MAX_LOG_BYTES;
        drop(log);
        if full {
            write_log();
        }
        Ok(line.len())
    }

    /// Called behind each line.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write_log() {
    /// What is being written. Both keep their room for the next lines.
    static WRITING: Mutex<Vec<u8>> = Mutex::new(Vec::new());
    let mut lines = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
    mem::swap(
        &mut *lines,
        &mut *LOG.lock().unwrap_or_else(PoisonError::into_inner),
    );
    // Nobody is left to tell that nobody reads the log.
    let _ = io::stderr().write_all(&lines);
    lines.clear();
}
