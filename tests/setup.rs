//! What `make run` and `make test` do on a machine that lacks what they need: tests/setup.sh.

use std::fs::{Permissions, copy, create_dir, set_permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::{Command, Output};

use tempfile::TempDir;

use crate::support::{in_checkout, printed, succeed};

/// Calls the script for a user who is not root, on a machine that has apt-get and the basic programs only.
fn setup(argument: &str) -> Output {
    let folder = TempDir::new().expect("create a folder");
    for name in ["bin", "tests"] {
        create_dir(folder.path().join(name)).expect("create a folder");
    }
    for name in ["", "bin", "tests"] {
        let public = Permissions::from_mode(0o755);
        set_permissions(folder.path().join(name), public).expect("make the folder public");
    }
    for file in ["Cargo.toml", "tests/db.sh", "tests/setup.sh"] {
        copy(in_checkout(file), folder.path().join(file)).expect("copy a file");
    }
    let programs = "awk cut dirname grep head id mktemp readlink rm sed sh sort tr uname";
    for program in programs.split(' ') {
        let mut find = Command::new("sh");
        find.args(["-c", &format!("command -v {program}")]);
        let found = succeed(find, "");
        symlink(found.trim_end(), folder.path().join("bin").join(program)).expect("create a link");
    }
    // It is looked for, but not run.
    symlink("/bin/sh", folder.path().join("bin/apt-get")).expect("create a link");

    let mut id = Command::new("id");
    id.arg("-u");
    let mut command = Command::new("env");
    if succeed(id, "") == "0\n" {
        command = Command::new("runuser");
        command.args(["-u", "nobody", "--", "env"]);
    }
    // This machine has a PostgreSQL.
    let settings = [
        "PG=18",
        "PG_BIN=/nowhere",
        "PG_WHEEL=nowhere",
        "REFINERY=nowhere",
    ];
    command.arg("-i").args(settings);
    command.arg(format!("PATH={}", folder.path().join("bin").display()));
    command
        .arg(folder.path().join("tests/setup.sh"))
        .arg(argument);
    command.output().expect("run the script")
}

#[test]
fn one_line_to_paste_installs_all_that_a_command_needs() {
    let rustup = "curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y && . \"$HOME/.cargo/env\"";
    let line = |packages: &str| {
        format!(
            "su - -c 'apt-get update && apt-get install -y --no-install-recommends {packages}' && {rustup}"
        )
    };
    let built = "Rust 1.92 or later, a C compiler with the headers of libc, the headers of OpenSSL, Python 3 with pip";
    for (command, missing, packages) in [
        (
            "run",
            "",
            "curl gcc libc6-dev libssl-dev pkg-config python3-pip",
        ),
        (
            "test",
            ", curl 7.84 or later, Python 3, ps",
            "curl gcc haproxy libc6-dev libssl-dev pkg-config procps python3 python3-pip",
        ),
    ] {
        let output = setup(command);
        assert!(!output.status.success());
        let expected = format!(
            "setup: make {command} needs what this machine lacks: {built}{missing}\n\
             Paste this line, then type make {command} again:\n\n    {}\n\n",
            line(packages)
        );
        assert_eq!(printed(&output), expected);
    }
}

#[test]
fn a_test_that_cannot_run_is_left_out_by_name_and_says_so() {
    let output = setup("skips");
    assert!(output.status.success());
    let told = String::from_utf8(output.stderr).expect("UTF-8");
    assert_eq!(
        told,
        "setup: left out: the test with monitoring::prometheus_ in its name, which needs Prometheus. make monitoring runs it\n\
         setup: left out: the test with ha::patroni_ in its name, which needs Patroni. make ha runs it\n\
         setup: left out: the test with behind_haproxy in its name, which needs HAProxy. make test-haproxy-tls runs it\n\
         setup: left out: the test with tls_verifies in its name, which needs PostgreSQL with TLS. make test-haproxy-tls runs it\n"
    );

    let options = String::from_utf8(output.stdout).expect("UTF-8");
    let tests = |options: &str| {
        let mut list = Command::new(std::env::current_exe().expect("this program"));
        list.arg("--list").args(options.split_whitespace());
        let listed = succeed(list, "");
        let tests = listed.lines().filter(|line| line.ends_with(": test"));
        tests.map(str::to_owned).collect::<Vec<_>>()
    };
    let (all, run) = (tests(""), tests(&options));
    let left_out: Vec<_> = all.iter().filter(|test| !run.contains(test)).collect();
    assert_eq!(
        left_out,
        [
            "ha::patroni_fails_over_without_the_loss_of_an_acknowledged_write: test",
            "monitoring::prometheus_answers_every_query_of_the_dashboard_and_has_every_metric_of_an_alert: test",
            "rollout::a_rolling_restart_behind_haproxy_fails_no_request: test",
            "start::tls_verifies_the_certificate_chain_and_the_host_name: test",
        ]
    );
}
