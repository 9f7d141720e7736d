//! The program: its arguments and its exit code.

mod log_writer;

use std::process::ExitCode;

use actix_web::rt::System;
use mimalloc::MiMalloc;

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

const USAGE: &str = "\
Serves real-estate listings over PostgreSQL, with the price history that the database logs.

Usage: listing-api [--check | --help | --version]

  --check    verify the settings, the database and its schema, then exit: 0 if all is valid, else 1 with the reason
  --help     print this
  --version  print the version

Settings are environment variables:
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
            print!("{USAGE}\n{}", listing_api::help());
            return ExitCode::SUCCESS;
        }
        ["--version"] => {
            println!("listing-api {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        _ => {
            let arguments = arguments.join(" ");
            eprintln!("listing-api: unknown arguments {arguments}: see --help");
            return ExitCode::FAILURE;
        }
    };
    log_writer::start(listing_api::default_of("RUST_LOG"));
    let ended = System::new().block_on(listing_api::run(check_only));
    if let Err(reason) = &ended {
        log_writer::add(format!("listing-api: {reason:#}\n").as_bytes());
    }
    log_writer::finish();
    ended.map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS)
}
