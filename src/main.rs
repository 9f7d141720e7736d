//! The program: its arguments, its log, and the exit code.

use std::process::ExitCode;

use actix_web::rt::System;

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
    env_logger::Builder::from_env(
        env_logger::Env::default().default_filter_or("info,actix_server=warn,actix_http=off"),
    )
    .init();
    match System::new().block_on(listing_api::run(check_only)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("listing-api: {reason}");
            ExitCode::FAILURE
        }
    }
}
