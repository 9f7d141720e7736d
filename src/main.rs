//! The program: its arguments and its exit code.

mod log_writer;

use std::process::ExitCode;

use actix_web::rt::System;
use anyhow::bail;
use mimalloc::MiMalloc;

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

const USAGE: &str = "\
Serves real-estate listings over PostgreSQL, with the price history that the database logs.

Usage: listing-api [--check | --health [ready] | --help | --version]

  --check         verify the settings, the database and its schema, then exit: 0 if all is valid, else 1 with the reason
  --health        ask the running instance at ADMIN_ADDR for /health/live, then exit: 0 if it is alive, else 1 with the reason
  --health ready  the same for /health/ready
  --help          print this
  --version       print the version, the commit and the newest migration that were built

Settings are environment variables:
";

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os()
        .skip(1)
        .map(|argument| argument.to_string_lossy().into_owned())
        .collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        [] => run(false),
        ["--check"] => run(true),
        _ => match answer(&arguments) {
            Ok(answer) => {
                print!("{answer}");
                ExitCode::SUCCESS
            }
            Err(reason) => {
                eprintln!("listing-api: {reason:#}");
                ExitCode::FAILURE
            }
        },
    }
}

/// What the program prints instead of running.
fn answer(arguments: &[&str]) -> anyhow::Result<String> {
    match arguments {
        ["--health"] => listing_api::check_health("live"),
        ["--health", "ready"] => listing_api::check_health("ready"),
        ["--help"] => Ok(format!("{USAGE}\n{}", listing_api::help())),
        ["--version"] => Ok(format!("listing-api {}\n", listing_api::version())),
        _ => bail!("unknown arguments {}: see --help", arguments.join(" ")),
    }
}

fn run(check_only: bool) -> ExitCode {
    let logs_json = listing_api::logs_json();
    // A person reads what the check prints.
    let is_json = !check_only && logs_json.as_ref().is_ok_and(|json| *json);
    log_writer::start(listing_api::default_of("RUST_LOG"), is_json);
    let ended = logs_json.and_then(|_| System::new().block_on(listing_api::run(check_only)));
    if let Err(reason) = &ended {
        log_writer::add(&format!("{reason:#}"));
    }
    log_writer::finish();
    ended.map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS)
}
