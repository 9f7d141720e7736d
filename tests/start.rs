//! Start, stop, health and limits: each error names its cause, and a stop breaks off no request.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

use crate::support::{
    Cluster, Connection, Database, JSON, LOFT, Service, TWO_SECONDS, WAITING, command, in_checkout,
    migration_names, printed, rows, run, value, wait_for, within,
};

/// Asserts that the program prints exactly this sentence and ends within 10 s with exit code 1.
fn assert_refuses(mut command: Command, sentence: &str) {
    for argument in [None, Some("--check")] {
        let begun = Instant::now();
        let output = command.args(argument).output().expect("run the program");
        assert_eq!(printed(&output), format!("listing-api: {sentence}\n"));
        assert_eq!(output.status.code(), Some(1));
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
}

#[test]
fn behind_a_sharding_proxy_batches_and_replicas_are_refused() {
    for (name, value, sentence) in [
        (
            "BATCH_SIZE",
            "2",
            "SHARDING_PROXY=on and BATCH_SIZE=2: unset BATCH_SIZE, a statement must name one listing",
        ),
        (
            "DATABASE_READ_URL",
            "postgres://h/d",
            "SHARDING_PROXY=on and DATABASE_READ_URL is set: unset it, and let the proxy read from replicas",
        ),
        (
            "DATABASE_URL",
            "postgres://h/d?target_session_attrs=read-write",
            "SHARDING_PROXY=on and DATABASE_URL has target_session_attrs: remove it from the URL",
        ),
    ] {
        let mut command = command("postgres://h/d");
        command.env("SHARDING_PROXY", "on").env(name, value);
        let printed = printed(&command.output().expect("run the program"));
        assert!(printed.contains(sentence), "{printed}");
    }
}

#[test]
#[expect(clippy::too_many_lines, reason = "one table of all settings")]
fn an_invalid_setting_is_reported_with_its_value_and_the_valid_form() {
    for (name, value, sentence) in [
        (
            "DATABASE_URL",
            "nonsense",
            "DATABASE_URL is not a valid URL: must be postgres://user:password@host:port/database",
        ),
        (
            "DATABASE_URL",
            "postgres://u:secret@h",
            "DATABASE_URL has no database: must be postgres://user:password@host:port/database",
        ),
        (
            "DATABASE_URL",
            "postgres://u:secret@h/d?sslrootcert=x",
            "DATABASE_URL is not a valid URL (unknown option sslrootcert): must be postgres://user:password@host:port/database",
        ),
        (
            "DATABASE_URL",
            "postgres://u:p@ss?secret=@h/d",
            "DATABASE_URL is not a valid URL: must be postgres://user:password@host:port/database",
        ),
        (
            "DATABASE_READ_URL",
            "postgres://u:secret@h/d?sslmode=allow",
            "DATABASE_READ_URL has an invalid sslmode: must be disable, prefer, require, verify-ca or verify-full",
        ),
        (
            "DATABASE_URL_FILE",
            "/nowhere",
            "cannot read DATABASE_URL_FILE=/nowhere: No such file or directory",
        ),
        (
            "DATABASE_URL_FILE",
            "Cargo.toml",
            "DATABASE_URL and DATABASE_URL_FILE are both set: unset one of them",
        ),
        (
            "DATABASE_PASSWORD_FILE",
            "/dev/null",
            "DATABASE_PASSWORD_FILE=/dev/null is an empty file",
        ),
        (
            "LISTEN_ADDR",
            "8080",
            "LISTEN_ADDR=8080 is invalid: must be an address and a port, such as 127.0.0.1:8080",
        ),
        (
            "ADMIN_ADDR",
            "x",
            "ADMIN_ADDR=x is invalid: must be an address and a port, such as 127.0.0.1:8081",
        ),
        (
            "AUTH",
            "on",
            "AUTH=on is invalid: must be keys (a write needs an API key) or off (anyone can write)",
        ),
        (
            "WORKERS",
            "0",
            "WORKERS=0 is invalid: must be an integer from 1 to 10000, such as ",
        ),
        (
            "POOL_SIZE",
            "many",
            "POOL_SIZE=many is invalid: must be an integer from 1 to 10000, such as ",
        ),
        (
            "BATCH_SIZE",
            "0",
            "BATCH_SIZE=0 is invalid: must be an integer from 1 to 10000, such as ",
        ),
        (
            "SHARDING_PROXY",
            "yes",
            "SHARDING_PROXY=yes is invalid: must be on or off",
        ),
        (
            "POOL_WAIT_MS",
            "0",
            "POOL_WAIT_MS=0 is invalid: must be 1 to 3600000 milliseconds, such as 2000",
        ),
        (
            "CONNECT_TIMEOUT_MS",
            "-1",
            "CONNECT_TIMEOUT_MS=-1 is invalid: must be 1 to 3600000 milliseconds, such as 3000",
        ),
        (
            "STATEMENT_TIMEOUT_MS",
            "1s",
            "STATEMENT_TIMEOUT_MS=1s is invalid: must be 1 to 3600000 milliseconds, such as 5000",
        ),
        (
            "SHUTDOWN_DELAY_MS",
            "x",
            "SHUTDOWN_DELAY_MS=x is invalid: must be 0 to 3600000 milliseconds, such as 0",
        ),
        (
            "SHUTDOWN_TIMEOUT_MS",
            "0",
            "SHUTDOWN_TIMEOUT_MS=0 is invalid: must be 1 to 3600000 milliseconds, such as 30000",
        ),
        (
            "CORS_ORIGINS",
            "example.com",
            "CORS_ORIGINS=example.com is invalid: must be * or origins such as https://example.com, separated by commas",
        ),
        (
            "TRUSTED_PROXIES",
            "10.0.0.0/33",
            "TRUSTED_PROXIES=10.0.0.0/33 is invalid: must be addresses or networks such as 10.0.0.0/8, separated by commas",
        ),
        (
            "TRUSTED_PROXIES",
            "127.0.0.1,proxy",
            "TRUSTED_PROXIES=127.0.0.1,proxy is invalid: must be addresses or networks such as 10.0.0.0/8, separated by commas",
        ),
        (
            "LOG_FORMAT",
            "JSON",
            "LOG_FORMAT=JSON is invalid: must be text or json",
        ),
        (
            "DATABASE_CA_FILE",
            "/nowhere",
            "DATABASE_CA_FILE=/nowhere: ",
        ),
    ] {
        let output = command("postgres://u@127.0.0.1:1/d")
            .env(name, value)
            .output()
            .expect("run the program");
        let printed = printed(&output);
        assert!(
            printed.starts_with(&format!("listing-api: {sentence}")),
            "{printed}"
        );
        assert_eq!(
            (printed.lines().count(), output.status.code()),
            (1, Some(1)),
            "{printed}"
        );
        assert!(!printed.contains("secret"));
    }
    let mut unset = command("");
    unset.env_remove("DATABASE_URL");
    assert_refuses(
        unset,
        "DATABASE_URL is not set: must be postgres://user:password@host:port/database",
    );
}

#[tokio::test]
async fn a_database_without_the_right_schema_is_refused_with_the_command_to_run() {
    let repair = "run: refinery migrate -e DATABASE_URL -p sql -g -d -m";
    let db = Database::empty().await;
    assert_refuses(
        command(&db.url()),
        &format!("the database has no schema yet: {repair}"),
    );

    let db = Database::migrated().await;
    let url = db.service_url().await;
    run(
        &db.superuser,
        "delete from refinery_schema_history where version >= 5",
    )
    .await;
    assert_refuses(
        command(&url),
        &format!("the database lacks migration V5__feed_price_changes: {repair}"),
    );
    run(
        &db.superuser,
        "update refinery_schema_history set checksum = '1' where version = 2",
    )
    .await;
    assert_refuses(
        command(&url),
        "migration V2__log_listing_prices of the database differs from the one of this release: use the service and the migrations of the same release",
    );
}

#[tokio::test]
async fn a_problem_of_the_setup_fails_the_check_and_is_logged_at_the_start() {
    let db = Database::migrated().await;
    let url = db.service_url().await;
    let trigger = "create function public.note_change() returns trigger language plpgsql as 'begin return new; end'; \
        create trigger noted before update on listing for each row execute function public.note_change()";
    let problems = [
        (
            "grant create on schema public to public",
            "Role public may create functions and operators in the schema public, which other sessions then call. \
             Run: revoke create on schema public from public;",
        ),
        (
            trigger,
            "Trigger noted on public.listing calls public.note_change(), which has no search_path of its own. \
             The service has only pg_catalog in its path, so names without a schema are not found there. \
             Run: alter function public.note_change() set search_path = pg_catalog, public, pg_temp;",
        ),
    ];
    for (cause, _) in problems {
        run(&db.superuser, cause).await;
    }
    let check = || command(&url).arg("--check").output().expect("run --check");
    let output = check();
    let expected = format!("listing-api: {}\n{}\n", problems[0].1, problems[1].1);
    assert_eq!(
        (printed(&output), output.status.code()),
        (expected, Some(1))
    );
    let service = Service::start_at(&url, &[]);
    for (_, problem) in problems {
        assert_eq!(service.logged(problem).len(), 1, "{problem}");
    }

    for (_, problem) in problems {
        let (_, mend) = problem.split_once("Run: ").expect("a statement");
        run(&db.superuser, mend).await;
    }
    assert_eq!(check().status.code(), Some(0));
}

#[tokio::test]
async fn a_statement_that_postgresql_would_refuse_fails_the_check_and_the_start() {
    let grant = "run: grant listing_api to {role};";
    let reset = "run: select public.reset_listing_access();";
    let restore = "the schema is not as the migrations left it, restore it from a backup";
    let refusals: [(&str, &[&str], &str); 9] = [
        (
            "drop table listing_price_log cascade",
            &[
                "PostgreSQL refuses GET /listings/{id}/prices, GET /changes: ERROR 42P01: relation \"public.listing_price_log\" does not exist",
                "PostgreSQL refuses the check of the setup: ERROR 42P01: relation \"public.listing_setup_problem\" does not exist",
            ],
            restore,
        ),
        (
            "alter table listing rename rooms_count to rooms",
            &[
                "PostgreSQL refuses GET /listings, POST /listings, GET /listings/{id}, PATCH /listings/{id}: ERROR 42703: column \"rooms_count\" does not exist",
                "PostgreSQL refuses POST /listings: ERROR 42703: column \"rooms_count\" of relation \"listing\" does not exist",
            ],
            restore,
        ),
        (
            "revoke listing_api from {role}; grant listing_auditor to {role}",
            &[
                "PostgreSQL refuses GET /changes: ERROR 42501: permission denied for function change_feed_epoch",
                "PostgreSQL refuses a lookup of API keys: ERROR 42501: permission denied for function find_api_keys",
                "PostgreSQL refuses POST /listings: ERROR 42501: permission denied for table idempotency_key",
                "PostgreSQL refuses POST /listings, PATCH /listings/{id}, DELETE /listings/{id}: ERROR 42501: permission denied for table listing",
            ],
            grant,
        ),
        (
            "revoke insert (owner) on listing from listing_api",
            &[
                "PostgreSQL refuses POST /listings: ERROR 42501: permission denied for table listing",
            ],
            reset,
        ),
        (
            "revoke update (price) on listing from listing_api",
            &[
                "PostgreSQL refuses PATCH /listings/{id}: ERROR 42501: permission denied for table listing",
            ],
            reset,
        ),
        (
            "revoke select on listing_price_log from listing_api",
            &[
                "PostgreSQL refuses GET /listings/{id}/prices, GET /changes: ERROR 42501: permission denied for table listing_price_log",
            ],
            reset,
        ),
        (
            "revoke execute on function change_feed_epoch from listing_api",
            &[
                "PostgreSQL refuses GET /changes: ERROR 42501: permission denied for function change_feed_epoch",
            ],
            reset,
        ),
        (
            "revoke execute on function find_api_keys from listing_api",
            &[
                "PostgreSQL refuses a lookup of API keys: ERROR 42501: permission denied for function find_api_keys",
            ],
            reset,
        ),
        (
            "revoke usage on sequence listing_id_seq from listing_api",
            &[
                "PostgreSQL refuses POST /listings: role {role} may not use the sequence public.listing_id_seq",
            ],
            reset,
        ),
    ];
    for (cause, reasons, mend) in refusals {
        let db = Database::migrated().await;
        let url = db.service_url().await;
        let login = format!("{}_login", db.name);
        run(&db.superuser, &cause.replace("{role}", &login)).await;
        let sentences = reasons.iter().map(|reason| format!("{reason}: {mend}"));
        let sentences = sentences.collect::<Vec<_>>().join("\n");
        let mut command = command(&url);
        command.env("AUTH", "keys");
        assert_refuses(command, &sentences.replace("{role}", &login));
    }
}

#[tokio::test]
async fn a_locked_table_fails_the_check_and_does_not_stop_the_start() {
    let db = Database::migrated().await;
    let url = db.service_url().await;
    run(&db.superuser, "begin; lock table listing").await;
    let limit = [("STATEMENT_TIMEOUT_MS", "300")];
    let check = command(&url).arg("--check").envs(limit).output();
    let check = check.expect("run --check");
    let sentence =
        "cannot verify GET /listings: ERROR 57014: canceling statement due to statement timeout";
    assert_eq!(
        (printed(&check), check.status.code()),
        (format!("listing-api: {sentence}\n"), Some(1))
    );
    let service = Service::start_at(&url, &limit);
    assert_eq!(service.logged(sentence).len(), 1);
    drop(service);
    // What PostgreSQL has refused before still prevents the start.
    run(
        &db.superuser,
        "commit; alter table listing rename rooms_count to rooms",
    )
    .await;
    run(&db.superuser, "begin; lock table listing_price_log").await;
    let mut command = command(&url);
    command.envs(limit);
    let refused = printed(&command.output().expect("run the program"));
    assert!(refused.contains("refuses GET /listings"), "{refused}");
}

#[tokio::test]
async fn more_connections_than_a_server_allows_fail_the_check_and_are_logged_at_the_start() {
    let db = Database::migrated().await;
    let url = db.service_url().await;
    let (server, database, role) = (db.address(), &db.name, format!("{}_login", db.name));
    for (cause, allowed, mend) in [
        (
            "select".to_owned(),
            "297 connections (max_connections, less the reserved ones)",
            "raise max_connections".to_owned(),
        ),
        (
            format!("alter database {database} connection limit 40"),
            &format!("40 connections (connection limit of database {database})"),
            format!("run: alter database {database} connection limit -1;"),
        ),
        (
            format!("alter role {role} connection limit 30"),
            &format!("30 connections (connection limit of role {role})"),
            format!("run: alter role {role} connection limit -1;"),
        ),
    ] {
        run(&db.superuser, &cause).await;
        let settings = [("POOL_SIZE", "3999"), ("WORKERS", "2"), ("AUTH", "keys")];
        let sentence = format!(
            "{server} allows {allowed}, but this instance opens up to 4008: lower POOL_SIZE or WORKERS, or {mend}"
        );
        let check = command(&url).arg("--check").envs(settings).output();
        let check = check.expect("run --check");
        assert_eq!(
            (printed(&check), check.status.code()),
            (format!("listing-api: {sentence}\n"), Some(1))
        );
        let service = Service::start_at(&url, &settings);
        assert_eq!(service.logged(&sentence).len(), 1);
        assert_eq!(service.get("/listings/1").status, 404);
    }
    let replica = format!(
        "{server} allows 30 connections (connection limit of role {role}), but this instance opens up to 40:"
    );
    let check = command(&url)
        .arg("--check")
        .env("DATABASE_READ_URL", &url)
        .envs([("POOL_SIZE", "16"), ("WORKERS", "1"), ("AUTH", "keys")])
        .output();
    let check = printed(&check.expect("run --check"));
    assert!(
        check.contains(&replica) && check.lines().count() == 1,
        "{check}"
    );
    let few = [("POOL_SIZE", "24"), ("WORKERS", "1"), ("AUTH", "off")];
    let check = command(&url).arg("--check").envs(few).output();
    assert_eq!(check.expect("run --check").status.code(), Some(0));
}

#[tokio::test]
async fn a_primary_that_is_read_only_fails_the_check() {
    let db = Database::migrated().await;
    let url = db.service_url().await;
    let read_only = format!(
        "alter role {}_login set default_transaction_read_only = on",
        db.name
    );
    run(&db.superuser, &read_only).await;
    let check = command(&url).arg("--check").output().expect("run --check");
    let sentence = format!(
        "listing-api: no server of DATABASE_URL accepts writes: primary {} is read-only, not encrypted\n",
        db.address()
    );
    assert_eq!((printed(&check), check.status.code()), (sentence, Some(1)));
}

#[tokio::test]
async fn a_database_that_cannot_be_reached_is_reported_without_secrets() {
    let db = Database::migrated().await;
    let url = db.service_url().await;
    let (login, address) = url.rsplit_once('@').expect("user:password@address");
    for (url, reason) in [
        (
            url.replace(":secret@", ":hidden@"),
            "refuses sessions: db error: FATAL: password authentication failed",
        ),
        (
            "postgres://u:hidden@127.0.0.1:1/d".to_owned(),
            "is down: error connecting to server: Connection refused",
        ),
        (
            format!(
                "{login}@{}",
                address.replace(&db.name, "listing_test_nowhere")
            ),
            "refuses sessions: db error: FATAL: database \"listing_test_nowhere\" does not exist",
        ),
    ] {
        let begun = Instant::now();
        let output = command(&url).output().expect("run the program");
        let printed = printed(&output);
        assert!(
            printed.starts_with("listing-api: cannot connect to the database: "),
            "{printed}"
        );
        assert!(
            printed.contains(reason) && printed.lines().count() == 1,
            "{printed}"
        );
        assert!(
            !printed.contains("hidden") && !printed.contains("secret"),
            "{printed}"
        );
        assert_eq!(output.status.code(), Some(1));
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
    // A listener that accepts connections and never answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("bind a port");
    let address = silent.local_addr().expect("local address");
    let limit = "no connection to the database within the limit";
    assert_refuses(
        command(&format!("postgres://u@{address}/d")),
        &format!(
            "cannot connect to the database: {address} is down: {limit}: check that the server runs, and the host, port, user, password and database in DATABASE_URL"
        ),
    );
}

/// The output of `--version`, which must name a commit of this checkout and the newest migration.
fn version() -> String {
    let mut command = command("");
    let output = command.arg("--version").output().expect("run the program");
    let version = printed(&output);
    let (start, rest) = version.split_once(" (commit ").expect("a commit");
    assert_eq!(
        start,
        concat!("listing-api ", env!("CARGO_PKG_VERSION")),
        "{version}"
    );
    let (commit, schema) = rest.split_once(", schema ").expect("a schema");
    let git = |arguments: &[&str]| {
        let mut git = Command::new("git");
        git.args(arguments).current_dir(in_checkout("")).output()
    };
    match std::env::var("GIT_COMMIT") {
        Ok(given) if !given.is_empty() => assert!(given.starts_with(commit), "{version}"),
        _ if in_checkout(".git").exists()
            && git(&["rev-parse"]).is_ok_and(|output| output.status.success()) =>
        {
            assert_eq!(commit.len(), 8, "{version}");
            // A commit may have been added since the build.
            let ancestor = git(&["merge-base", "--is-ancestor", commit, "HEAD"]);
            assert!(ancestor.expect("run git").status.success(), "{version}");
        }
        // Without git or a repository that it accepts, there is no commit to name.
        _ => assert_eq!(commit, "unknown"),
    }
    let newest = migration_names().pop().expect("a migration");
    let (newest, _) = newest.split_once("__").expect("a version");
    assert_eq!(schema, format!("{newest})\n"));
    version
}

#[tokio::test]
async fn each_argument_prints_its_output() {
    let help = command("").arg("--help").output().expect("run the program");
    assert!(help.status.success());
    for name in [
        "DATABASE_URL",
        "LISTEN_ADDR",
        "AUTH",
        "CORS_ORIGINS",
        "--check",
        "--health ready",
    ] {
        assert!(printed(&help).contains(name), "{name}");
    }
    version();
    let unknown = command("")
        .arg("--chekc")
        .output()
        .expect("run the program");
    assert_eq!(unknown.status.code(), Some(1));
    assert_eq!(
        printed(&unknown),
        "listing-api: unknown arguments --chekc: see --help\n"
    );
    let db = Database::migrated().await;
    let url = db.service_url().await;
    let server = db.address();
    for (auth, who) in [
        ("off", "AUTH=off: anyone can write"),
        ("keys", "AUTH=keys: a write needs an API key"),
    ] {
        let mut check = command(&url);
        let check = check.arg("--check").env("AUTH", auth).output();
        let check = check.expect("run the program");
        assert_eq!(
            printed(&check),
            format!(
                "primary {server} accepts writes, not encrypted\nsettings, database and schema are valid; {who}\n"
            )
        );
        assert!(check.status.success());
    }
}

#[tokio::test]
async fn auth_must_be_set_before_other_machines_can_reach_the_service() {
    let db = Database::migrated().await;
    let url = db.service_url().await;
    for address in ["0.0.0.0:8080", "[::]:8080", "192.0.2.1:8080"] {
        for auth in [None, Some(("AUTH", ""))] {
            let mut unsaid = command(&url);
            unsaid.env("LISTEN_ADDR", address).envs(auth);
            let sentence = format!(
                "AUTH is not set, but LISTEN_ADDR={address} can be reached from other machines: \
                 must be keys (a write needs an API key) or off (anyone can write)"
            );
            assert_refuses(unsaid, &sentence);
        }
    }
    for address in ["127.0.0.2:8080", "[::1]:8080", "[::ffff:127.0.0.1]:8080"] {
        let mut unsaid = command(&url);
        let check = unsaid.env("LISTEN_ADDR", address).arg("--check").output();
        assert!(printed(&check.expect("run the program")).contains("AUTH=off: anyone can write"));
    }
}

#[tokio::test]
async fn every_start_with_auth_off_logs_a_warning() {
    let db = Database::migrated().await;
    let url = db.service_url().await;
    for (address, auth, warned) in [
        ("127.0.0.1:0", "", true),
        ("127.0.0.1:0", "off", true),
        ("0.0.0.0:0", "off", true),
        ("0.0.0.0:0", "keys", false),
    ] {
        let settings = [("LISTEN_ADDR", address), ("AUTH", auth)];
        let service = Service::start_at(&url, &settings);
        let mut warnings = service.log();
        warnings.retain(|line| line.contains("WARN"));
        assert_eq!(warnings.len(), usize::from(warned), "{warnings:?}");
        let warning = format!(
            "AUTH=off: anyone who can reach {}, also through a proxy, can write",
            service.address
        );
        assert!(
            warnings.iter().all(|line| line.contains(&warning)),
            "{warnings:?}"
        );
    }
}

#[tokio::test]
async fn an_address_in_use_is_reported() {
    let service = Service::start().await;
    let output = command(&service.url)
        .env("LISTEN_ADDR", &service.address)
        .output()
        .expect("run the program");
    let expected = format!(
        "listing-api: cannot listen on LISTEN_ADDR={}: ",
        service.address
    );
    assert!(
        printed(&output).starts_with(&expected),
        "{}",
        printed(&output)
    );
}

#[tokio::test]
async fn a_stop_waits_for_requests_in_flight() {
    for signal in ["-TERM", "-INT"] {
        let mut service = Service::start_with(&[("SHUTDOWN_DELAY_MS", "1000")]).await;
        service.post(LOFT);
        let mut waiting = patch_that_waits(&service).await;
        service.signal(signal);
        // The health report says that the service is stopping, while it still serves requests.
        let signalled = Instant::now();
        let not_ready = loop {
            let response = service.admin("/health/ready");
            if response.status != 200 || signalled.elapsed() > Duration::from_secs(10) {
                break response;
            }
        };
        assert_eq!(not_ready.error(), (503, "stopping".to_owned()));
        assert_eq!(service.get("/listings/1").status, 200);
        while std::net::TcpStream::connect(&service.address).is_ok() {
            assert!(
                signalled.elapsed() < Duration::from_secs(10),
                "new connections are still accepted"
            );
            thread::sleep(Duration::from_millis(20));
        }
        run(service.superuser(), "commit").await;
        assert_eq!(waiting.receive("PATCH", "/listings/1").status, 200);
        // Idle connections do not delay the end.
        let answered = Instant::now();
        assert_eq!(service.wait(), Some(0));
        assert!(
            answered.elapsed() < Duration::from_secs(5),
            "{:?}",
            answered.elapsed()
        );
        assert_eq!(service.logged("stopped").len(), 1);
    }
}

/// The exit code and the output of `--health`, without a DATABASE_URL.
fn health(admin_address: &str, arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = command("");
    command.env_remove("DATABASE_URL").arg("--health");
    let command = command.args(arguments).env("ADMIN_ADDR", admin_address);
    let output = command.output().expect("run the program");
    (output.status.code(), printed(&output))
}

#[tokio::test]
async fn the_program_asks_a_running_instance_for_its_health() {
    for admin in ["127.0.0.1:0", "0.0.0.0:0", "[::]:0"] {
        let mut service =
            Service::start_with(&[("ADMIN_ADDR", admin), ("SHUTDOWN_DELAY_MS", "60000")]).await;
        let admin = service.admin_address.clone();
        assert_eq!(health(&admin, &[]), (Some(0), "alive\n".to_owned()));
        let server = service.db().address();
        let ready = format!("ready\nprimary {server} accepts writes\n");
        assert_eq!(health(&admin, &["ready"]), (Some(0), ready));

        // Begins to stop.
        service.signal("-TERM");
        service.logged("stopping: ");
        let stopping = format!(
            "listing-api: http://{admin}/health/ready answers 503: {{\"message\":\"stopping\"}}\n"
        );
        within(TWO_SECONDS, "not ready", || {
            health(&admin, &["ready"]) == (Some(1), stopping.clone())
        });
        assert_eq!(health(&admin, &[]), (Some(0), "alive\n".to_owned()));
        service.signal("-KILL");
        service.wait();
        let refused =
            format!("listing-api: no answer from http://{admin}/health/live: Connection refused");
        let (code, reason) = health(&admin, &[]);
        assert!(code == Some(1) && reason.starts_with(&refused), "{reason}");
    }
}

#[test]
fn the_program_waits_only_some_seconds_for_an_instance_that_hangs() {
    // A listener that accepts connections and never answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("bind a port");
    let admin = silent.local_addr().expect("local address").to_string();
    let begun = Instant::now();
    let late =
        format!("listing-api: no answer from http://{admin}/health/live: timed out after 3s\n");
    assert_eq!(health(&admin, &[]), (Some(1), late));
    assert!(begun.elapsed() < Duration::from_secs(6));
    let invalid = "listing-api: ADMIN_ADDR=x is invalid: must be an address and a port, such as 127.0.0.1:8081\n";
    assert_eq!(health("x", &[]), (Some(1), invalid.to_owned()));
}

#[tokio::test]
async fn health_and_metrics_report_requests_and_the_database() {
    let service = Service::start().await;
    service.post(LOFT);
    service.get("/listings/1");
    service.get("/listings/7");
    service.get("/nothing/here");
    let ask = |path: &str| service.admin(path);
    assert_eq!(
        (ask("/health/live").status, ask("/health/ready").status),
        (200, 200)
    );
    let metrics = ask("/metrics");
    let version = version();
    let version: Vec<_> = version.split([' ', ',', ')']).collect();
    let [_, version, _, commit, _, _, schema, ..] = version[..] else {
        panic!("{version:?}");
    };
    for line in [
        r#"http_request_duration_seconds_count{method="POST",route="/listings",status="201"} 1"#,
        r#"http_request_duration_seconds_count{method="GET",route="/listings/{id}",status="200"} 1"#,
        r#"http_request_duration_seconds_count{method="GET",route="/listings/{id}",status="404"} 1"#,
        r#"http_request_duration_seconds_count{method="GET",route="none",status="404"} 1"#,
        r#"database_pool_waiting{part="primary"} 0"#,
        &format!(
            r#"database_server_writable{{part="primary",server="{}"}} 1"#,
            service.db().address()
        ),
        &format!(
            r#"listing_api_build_info{{commit="{commit}",schema="{schema}",version="{version}"}} 1"#
        ),
    ] {
        assert!(
            metrics.text().lines().any(|given| given == line),
            "{line} in {}",
            metrics.text()
        );
    }
    run(
        service.superuser(),
        &format!(
            "alter database {} set default_transaction_read_only = on",
            service.db().name
        ),
    )
    .await;
    let terminate = "select pg_terminate_backend(pid) from pg_stat_activity where usename ~ '_login$' and datname = current_database()";
    run(service.superuser(), terminate).await;
    within(TWO_SECONDS, "not ready", || {
        ask("/health/ready").status == 503
    });
    let read_only = format!("primary {} is read-only", service.db().address());
    assert_eq!(ask("/health/ready").error(), (503, read_only));
    assert_eq!(service.patch("/listings/1", "{}").status, 503);
    assert_eq!(service.get("/listings/1").status, 200);
    run(
        service.superuser(),
        "update refinery_schema_history set checksum = '1' where version = 2",
    )
    .await;
    assert_eq!(ask("/health/ready").status, 503);
    assert_eq!(ask("/health/live").status, 200);
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn metrics_report_the_processor_time_memory_and_files_of_the_process() {
    let service = Service::start().await;
    let metric = |name: &str| {
        let metrics = service.admin("/metrics");
        let mut lines = metrics.text().lines();
        let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.expect(name).parse::<f64>().expect("a number")
    };
    let now = std::time::UNIX_EPOCH
        .elapsed()
        .expect("the time")
        .as_secs_f64();
    // Whole seconds, and as exact as the time at which the system believes to have started.
    let age = now - metric("process_start_time_seconds");
    assert!((-3.0..30.0).contains(&age), "{age}");
    let resident = metric("process_resident_memory_bytes");
    assert!((1e6..1e9).contains(&resident), "{resident}");
    assert!(metric("process_virtual_memory_bytes") > resident);
    let open = metric("process_open_fds");
    let clients: Vec<_> = (0..20).map(|_| service.connect()).collect();
    within(TWO_SECONDS, "more open files", || {
        metric("process_open_fds") >= open + 20.0
    });
    drop(clients);
    assert!(metric("process_max_fds") > open + 20.0);
    assert!(metric("process_threads") >= 3.0);
    within(Duration::from_secs(30), "a second of work", || {
        service.get("/openapi.yaml");
        service.processor_time() >= Duration::from_secs(1)
    });
    // Whole seconds.
    let seconds = metric("process_cpu_seconds_total");
    assert!((1.0..30.0).contains(&seconds), "{seconds}");
}

#[tokio::test]
async fn without_a_database_requests_get_503_and_each_cause_is_logged_once() {
    let cluster = Cluster::migrated();
    let limits = [("POOL_WAIT_MS", "500"), ("CONNECT_TIMEOUT_MS", "500")];
    let service = Service::start_at(&cluster.url, &limits);
    assert_eq!(service.post(LOFT).status, 201);
    assert_eq!(service.get("/listings/1").status, 200);
    cluster.call("stop");
    let message = "the database cannot be reached at the moment, try again later";
    for (method, path, body) in [
        ("GET", "/listings/1", ""),
        ("GET", "/listings/1/prices", ""),
        ("GET", "/listings", ""),
        ("POST", "/listings", LOFT),
    ] {
        let begun = Instant::now();
        let response = service.send(method, path, JSON, body);
        assert_eq!(response.error(), (503, message.to_owned()));
        assert_eq!(response.header("retry-after"), Some("1"));
        assert!(begun.elapsed() < Duration::from_secs(3));
        let id = response.header("x-request-id").expect("a request id");
        let causes = service
            .logged(id)
            .into_iter()
            .filter(|line| line.contains("ERROR"))
            .collect::<Vec<_>>();
        assert_eq!(causes.len(), 1, "{causes:?}");
        assert!(!causes[0].contains("password"), "{causes:?}");
    }
    cluster.call("up");
    within(TWO_SECONDS, "a read", || {
        service.get("/listings/1").status == 200
    });
    assert_eq!(service.post(LOFT).status, 201);
}

#[tokio::test]
async fn requests_to_a_silent_database_get_503_within_the_limit() {
    let cluster = Cluster::migrated();
    let limits = [
        ("CONNECT_TIMEOUT_MS", "500"),
        ("POOL_WAIT_MS", "500"),
        ("WORKERS", "1"),
    ];
    let service = Service::start_at(&cluster.url, &limits);
    assert_eq!(service.post(LOFT).status, 201);
    cluster.call("stop");
    // In its place, a listener that accepts connections and never answers.
    let address = ("127.0.0.1", cluster.config.get_ports()[0]);
    let _silent = std::net::TcpListener::bind(address).expect("bind the port of the database");
    let begun = Instant::now();
    thread::scope(|scope| {
        for path in [
            "/listings/1",
            "/listings/1/prices",
            "/listings",
            "/listings/2",
        ]
        .repeat(3)
        {
            let service = &service;
            scope.spawn(move || assert_eq!(service.get(path).status, 503, "{path}"));
        }
    });
    assert!(
        begun.elapsed() < Duration::from_secs(3),
        "{:?}",
        begun.elapsed()
    );
}

/// Fills the pipe of the log, which is not read, and the buffer of the service. The line of each request has 8 KB.
fn fill_the_log(service: &Service) {
    let path = format!("/{}", "x".repeat(8000));
    let mut connection = service.connect();
    for _ in 0..700 {
        connection.request("GET", &path, "", "");
        assert_eq!(connection.receive_unchecked("GET").status, 404);
    }
}

#[tokio::test]
async fn a_log_that_is_not_read_stops_neither_a_request_nor_the_end() {
    let mut service = Service::start().await;
    let unread = service.stop_reading();
    fill_the_log(&service);
    assert_eq!(service.post(LOFT).status, 201);
    let metrics = service.admin("/metrics");
    let dropped = metrics
        .text()
        .lines()
        .find_map(|line| line.strip_prefix("log_lines_dropped_total "))
        .expect("the metric");
    assert!(dropped.parse::<f64>().is_ok_and(|dropped| dropped > 0.0));
    let signalled = Instant::now();
    service.signal("-TERM");
    assert_eq!(service.wait(), Some(0));
    assert!(signalled.elapsed() < Duration::from_secs(5));
    drop(unread);
}

#[tokio::test]
async fn a_log_that_is_read_again_says_how_many_lines_were_dropped() {
    let service = Service::start().await;
    let unread = service.stop_reading();
    fill_the_log(&service);
    drop(unread);
    let gap = service.logged("listing-api: dropped ").concat();
    let dropped = gap.split(' ').nth(2).expect("a number");
    assert_eq!(
        gap,
        format!(
            "listing-api: dropped {dropped} lines at about this time, because stderr did not take them"
        )
    );
    let dropped: usize = dropped.parse().expect("a number");
    within(TWO_SECONDS, "all other lines", || {
        let written = service.log().into_iter();
        written.filter(|line| line.contains("xxx")).count() == 700 - dropped
    });
    service.get("/listings/1");
    service.logged("GET /listings/1 ");
}

#[tokio::test]
async fn a_stop_ends_after_its_timeout_despite_requests_in_flight() {
    let settings = [("SHUTDOWN_TIMEOUT_MS", "500")];
    let mut service = Service::start_with(&settings).await;
    service.post(LOFT);
    let _waiting = patch_that_waits(&service).await;
    service.signal("-TERM");
    assert_eq!(service.wait(), Some(0));
    run(service.superuser(), "rollback").await;
}

#[tokio::test]
async fn the_cause_of_an_internal_error_is_logged_and_not_returned() {
    let service = Service::start().await;
    let rule = "alter table listing add constraint secret_rule check (name <> 'Loft')";
    run(service.superuser(), rule).await;
    let response = service.post(LOFT);
    assert_eq!(response.error(), (500, "internal error".to_owned()));
    // The line of a later request comes after all lines of this one.
    service.send("GET", "/listings/9", "x-request-id: later\r\n", "");
    service.logged("later");
    let id = response.header("x-request-id").expect("a request id");
    let log = service.log();
    let causes: Vec<_> = log.iter().filter(|line| line.contains("ERROR")).collect();
    assert_eq!(causes.len(), 1, "{causes:?}");
    assert!(
        causes[0].contains(id) && causes[0].contains("secret_rule"),
        "{causes:?}"
    );
    assert!(
        !log.iter().any(|line| line.contains("+33123456789")),
        "{log:?}"
    );
}

#[tokio::test]
async fn a_statement_that_takes_too_long_gets_504_and_frees_its_connection() {
    let settings = [
        ("STATEMENT_TIMEOUT_MS", "300"),
        ("POOL_SIZE", "2"),
        ("POOL_WAIT_MS", "1000"),
    ];
    let service = Service::start_with(&settings).await;
    service.post(LOFT);
    run(service.superuser(), "begin; update listing set price = 1").await;
    let response = service.send("PUT", "/listings/1", JSON, LOFT);
    assert_eq!(
        response.error(),
        (504, "the database took too long to answer".to_owned())
    );
    run(service.superuser(), "rollback").await;
    for _ in 0..4 {
        assert_eq!(service.send("PUT", "/listings/1", JSON, LOFT).status, 200);
    }
}

#[tokio::test]
async fn a_role_that_does_not_wait_for_locks_gets_503_for_a_locked_listing() {
    let db = Database::migrated().await;
    let url = db.service_url().await;
    let role = format!("alter role {}_login set lock_timeout = '100ms'", db.name);
    run(&db.superuser, &role).await;
    let service = Service::start_at(&url, &[]);
    service.post(LOFT);
    run(&db.superuser, "begin; update listing set price = 1").await;
    let message = "another request is writing the same listing, try again";
    let refused = service.patch("/listings/1", "{}");
    assert_eq!(refused.error(), (503, message.to_owned()));
    run(&db.superuser, "rollback").await;
}

#[tokio::test]
async fn a_sequence_at_its_end_is_logged_with_the_command_that_helps() {
    let service = Service::start().await;
    let end = "select setval('listing_id_seq', 2147483647)";
    run(service.superuser(), end).await;
    let refused = service.post(LOFT);
    assert_eq!(refused.error(), (500, "internal error".to_owned()));
    let line = "reached maximum value of sequence \"listing_id_seq\" (2147483647): no row can be added until a DBA runs \
        alter sequence, with a greater maxvalue, or with restart at a number from which on no row exists";
    assert_eq!(service.logged(line).len(), 1);
}

#[tokio::test]
async fn a_listing_that_another_table_needs_is_not_deleted() {
    let service = Service::start().await;
    let path = format!("/listings/{}", service.post(LOFT).id());
    for on_delete in ["no action", "restrict"] {
        let table = format!(
            "create table visit (listing_id integer references listing on delete {on_delete}); \
             insert into visit select id from listing"
        );
        run(service.superuser(), &table).await;
        let refused = service.send("DELETE", &path, "", "");
        let message = "a row of another table still needs listing 1";
        assert_eq!(refused.error(), (409, message.to_owned()), "{on_delete}");
        run(service.superuser(), "drop table visit").await;
    }
    assert_eq!(service.send("DELETE", &path, "", "").status, 204);
}

/// A trigger that adds settings of the session to a table.
const NOTE_SETTINGS: &str = "create table public.noted (path text, plan_mode text);
    grant insert on public.noted to public;
    create function public.note() returns trigger language plpgsql as $$ begin
        insert into public.noted values (current_setting('search_path'), current_setting('plan_cache_mode'));
        return null;
    end $$;
    create trigger noted before insert on public.listing for each statement execute function public.note()";

#[tokio::test]
async fn an_option_in_the_url_wins_over_those_of_the_service_but_not_over_the_search_path() {
    let db = Database::migrated().await;
    run(&db.superuser, NOTE_SETTINGS).await;
    let options = "?options=-c%20plan_cache_mode%3Dforce_custom_plan%20-c%20search_path%3Dpublic";
    let url = db.service_url().await;
    for (options, mode) in [("", "force_generic_plan"), (options, "force_custom_plan")] {
        let service = Service::start_at(&format!("{}{options}", url.trim_end_matches('?')), &[]);
        service.post(LOFT).id();
        let noted = rows(&db.superuser, "delete from noted returning path, plan_mode").await;
        assert_eq!(noted, [format!("pg_catalog,pg_temp|{mode}")]);
    }
}

#[tokio::test]
async fn the_first_read_of_a_locked_table_gets_504() {
    let settings = [
        ("CONNECT_TIMEOUT_MS", "1000"),
        ("STATEMENT_TIMEOUT_MS", "1500"),
    ];
    let service = Service::start_with(&settings).await;
    run(service.superuser(), "begin; lock table listing").await;
    assert_eq!(service.get("/listings/1").status, 504);
}

#[tokio::test]
async fn a_read_whose_client_hangs_up_is_cancelled() {
    let settings = [
        ("POOL_SIZE", "1"),
        ("WORKERS", "1"),
        ("STATEMENT_TIMEOUT_MS", "60000"),
    ];
    let service = Service::start_with(&settings).await;
    run(service.superuser(), "begin; lock table listing").await;
    let mut connection = service.connect();
    connection.request("GET", "/listings", "", "");
    service.db().wait_for(WAITING, "1").await;
    drop(connection);
    service.db().wait_for(WAITING, "0").await;
    run(service.superuser(), "rollback").await;
    assert_eq!(service.get("/listings").status, 200);
}

#[tokio::test]
async fn a_write_whose_client_hangs_up_is_done_and_keeps_its_connection_until_then() {
    let settings = [
        ("POOL_SIZE", "2"),
        ("WORKERS", "1"),
        ("POOL_WAIT_MS", "200"),
        ("STATEMENT_TIMEOUT_MS", "60000"),
    ];
    let service = Service::start_with(&settings).await;
    service.post(LOFT);
    service.post(LOFT);
    drop(patch_that_waits(&service).await);
    // It also keeps its place in the queue of the row, so further writes of the row take no connection.
    for _ in 0..3 {
        let refused = service.patch("/listings/1", "{}").error();
        let message = "another request is writing the same listing, try again";
        assert_eq!(refused, (503, message.to_owned()));
    }
    service.db().wait_for(WAITING, "1").await;
    let size = |size| format!("database_pool_size{{part=\"primary\"}} {size}\n");
    assert_eq!(service.patch("/listings/2", "{}").status, 200);
    assert!(service.admin("/metrics").text().contains(&size(2)));
    run(service.superuser(), "commit").await;
    let written = "select count(*) from listing where updated_date <> created_date and id = 1";
    wait_for(service.superuser(), written, "1").await;
    assert_eq!(service.patch("/listings/1", "{}").status, 200);
    assert!(service.admin("/metrics").text().contains(&size(2)));
}

/// A PATCH of listing 1 in flight. It waits for the open transaction of the superuser.
async fn patch_that_waits(service: &Service) -> Connection {
    let lock = "begin; update listing set price = 1 where id = 1";
    run(service.superuser(), lock).await;
    let mut connection = service.connect();
    connection.request("PATCH", "/listings/1", JSON, "{}");
    service.db().wait_for(WAITING, "1").await;
    connection
}

#[tokio::test]
async fn a_request_that_waits_too_long_for_a_connection_or_a_row_gets_503() {
    let settings = [
        ("POOL_SIZE", "1"),
        ("POOL_WAIT_MS", "200"),
        ("WORKERS", "1"),
    ];
    let service = Service::start_with(&settings).await;
    service.post(LOFT);
    service.post(LOFT);
    let mut waiting = patch_that_waits(&service).await;
    for (path, message) in [
        (
            "/listings/1",
            "another request is writing the same listing, try again",
        ),
        (
            "/listings/2",
            "the database cannot be reached at the moment, try again later",
        ),
    ] {
        let refused = service.patch(path, "{}");
        assert_eq!(refused.error(), (503, message.to_owned()));
        assert_eq!(refused.header("retry-after"), Some("1"));
    }
    assert_eq!(service.get("/listings/1").status, 200);
    run(service.superuser(), "rollback").await;
    assert_eq!(waiting.receive("PATCH", "/listings/1").status, 200);
}

#[tokio::test]
async fn tls_verifies_the_certificate_chain_and_the_host_name() {
    let cluster = Cluster::migrated();
    let ca_key = KeyPair::generate().expect("generate a key");
    let mut authority = CertificateParams::new([]).expect("certificate parameters");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = authority.self_signed(&ca_key).expect("sign the authority");
    let issuer = Issuer::new(authority, ca_key);
    let server_key = KeyPair::generate().expect("generate a key");
    let server = CertificateParams::new(["localhost".to_owned()]).expect("certificate parameters");
    let server = server
        .signed_by(&server_key, &issuer)
        .expect("sign a certificate");
    let another = KeyPair::generate().expect("generate a key");
    let another = CertificateParams::new([])
        .expect("certificate parameters")
        .self_signed(&another)
        .expect("sign a certificate");
    let folder = tempfile::tempdir().expect("create a folder");
    let (ours, theirs) = (
        folder.path().join("ca.pem"),
        folder.path().join("another.pem"),
    );
    std::fs::write(&ours, ca.pem()).expect("write a file");
    std::fs::write(&theirs, another.pem()).expect("write a file");

    // The server writes the files, because it must own its key.
    let superuser = cluster.superuser().await;
    for (file, pem) in [
        ("server.crt", server.pem()),
        ("server.key", server_key.serialize_pem()),
    ] {
        let lines = pem.trim_end().replace('\n', "'), ('");
        let write = format!("copy (values ('{lines}')) to program 'umask 077; cat > {file}'");
        run(&superuser, &write).await;
    }
    cluster.restart_with("set ssl = on").await;
    let superuser = cluster.superuser().await;

    let url = |host, mode| format!("{}{mode}", cluster.url.replace("127.0.0.1", host));
    for mode in [
        "",
        "?sslmode=prefer",
        "?sslmode=require",
        "?sslmode=verify-ca",
        "?sslmode=verify-full",
    ] {
        let ca_file = [("DATABASE_CA_FILE", ours.to_str().expect("a path in UTF-8"))];
        let service = Service::start_at(&url("localhost", mode), &ca_file);
        assert_eq!(
            service
                .logged(" accepts writes, encrypted with TLSv1.3")
                .len(),
            1
        );
        let encrypted = "select distinct ssl from pg_stat_ssl join pg_stat_activity using (pid) where application_name = 'listing-api'";
        assert_eq!(value(&superuser, encrypted).await, "t", "{mode}");
    }
    let not_valid = "certificate not valid for name \"127.0.0.1\"";
    for (url, ca_file, reason) in [
        (url("localhost", ""), &theirs, "invalid peer certificate"),
        (url("127.0.0.1", ""), &ours, not_valid),
        (url("127.0.0.1", "?sslmode=verify-ca"), &ours, not_valid),
    ] {
        let output = command(&url)
            .arg("--check")
            .env("DATABASE_CA_FILE", ca_file)
            .output()
            .expect("run the program");
        let refused = printed(&output);
        assert!(!output.status.success());
        assert!(
            refused.starts_with("listing-api: cannot connect to the database: "),
            "{refused}"
        );
        assert!(
            refused.contains(reason) && refused.lines().count() == 1,
            "{refused}"
        );
    }
}

#[tokio::test]
async fn a_server_without_tls_gets_no_password_unless_sslmode_allows_it() {
    let db = Database::migrated().await;
    let url = db.service_url().await;
    let url = url.trim_end_matches('?');
    // Reaches this machine, but is not a loopback address.
    let beyond = url.replace("127.0.0.1", "0.0.0.0");
    // Any authority is enough for this.
    let key = KeyPair::generate().expect("generate a key");
    let authority = CertificateParams::new([]).expect("certificate parameters");
    let authority = authority.self_signed(&key).expect("sign the authority");
    let ca_file = tempfile::NamedTempFile::new().expect("create a file");
    std::fs::write(ca_file.path(), authority.pem()).expect("write a file");
    for (url, ca_file) in [
        (&*beyond, None),
        (url, Some(("DATABASE_CA_FILE", ca_file.path()))),
        (&format!("{url}?sslmode=verify-full"), None),
    ] {
        let output = command(url).arg("--check").envs(ca_file).output();
        let output = printed(&output.expect("run the program"));
        assert!(output.contains("server does not support TLS"), "{output}");
    }
    for url in [
        url.to_owned(),
        format!("{beyond}?sslmode=prefer"),
        format!("{beyond}?sslmode=disable"),
    ] {
        let service = Service::start_at(&url, &[]);
        assert_eq!(service.logged(" accepts writes, not encrypted").len(), 1);
    }
}

#[tokio::test]
async fn urls_and_the_password_may_come_from_files() {
    let db = Database::migrated().await;
    let url = db.service_url().await;
    let password = " p/a?s@s:w#ö%20'rd\\ ";
    let role = format!(
        "alter role {}_login password '{}'",
        db.name,
        password.replace('\'', "''")
    );
    run(&db.superuser, &role).await;
    let folder = tempfile::tempdir().expect("create a folder");
    let file = |name: &str, content: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, content).expect("write a file");
        path
    };
    let url_file = file("url", &format!("{}\n", url.replace(":secret", "")));
    let password_file = file("password", &format!("{password}\n"));
    let mut command = command("");
    command
        .env("DATABASE_URL_FILE", &url_file)
        .env("DATABASE_READ_URL_FILE", &url_file)
        .env("DATABASE_PASSWORD_FILE", &password_file)
        .env("RUST_LOG", "debug");
    let service = Service::run(command, &url, None);
    assert_eq!(service.post(LOFT).status, 201);
    assert_eq!(service.logged("replica").len(), 1);
    assert!(!service.log().concat().contains("s@s"));

    let mut twice = self::command(&url);
    twice.env("DATABASE_PASSWORD_FILE", &password_file);
    assert_refuses(
        twice,
        "DATABASE_URL contains a password and DATABASE_PASSWORD_FILE is set: remove one of them",
    );
}
