//! The commands of `tests/db.sh`.

use std::fs;
use std::net::TcpListener;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio_postgres::Config;

use crate::support::{Cluster, connect, in_checkout, printed, rows, run, succeed, value};

#[tokio::test]
async fn a_second_call_of_up_finds_the_cluster_of_the_first() {
    let cluster = Cluster::start();
    run(&cluster.superuser().await, "create table kept (id integer)").await;
    let again = cluster.call("up");
    assert_eq!(again.trim_end(), cluster.url);
    rows(&cluster.superuser().await, "table kept").await;
}

#[tokio::test]
async fn down_removes_the_cluster() {
    let cluster = Cluster::start();
    cluster.call("down");
    assert!(!cluster.folder.path().join(".postgres").exists());
    assert!(cluster.config.connect(tokio_postgres::NoTls).await.is_err());
}

#[tokio::test]
async fn the_private_cluster_listens_on_loopback_and_requires_a_password() {
    let cluster = Cluster::start();
    let superuser = cluster.superuser().await;
    let settings = "select setting from pg_settings \
        where name in ('listen_addresses', 'unix_socket_directories') order by name";
    assert_eq!(rows(&superuser, settings).await, ["127.0.0.1", ""]);
    let refused = cluster
        .config
        .clone()
        .password("wrong")
        .connect(tokio_postgres::NoTls)
        .await;
    assert!(refused.is_err());
}

#[test]
fn a_stopped_cluster_starts_on_its_port_or_on_a_free_one() {
    let cluster = Cluster::start();
    stop(&cluster);
    assert_eq!(cluster.call("up").trim_end(), cluster.url);
    stop(&cluster);
    let port = cluster.config.get_ports()[0];
    let _taken = TcpListener::bind(("127.0.0.1", port)).expect("bind the port of the cluster");
    let moved = cluster.call("up");
    assert_ne!(moved.trim_end(), cluster.url);
}

/// Stops the server of a cluster without the script, as a reboot would.
pub fn stop(cluster: &Cluster) {
    let running = cluster.pid_file();
    let pid = fs::read_to_string(&running).expect("read postmaster.pid");
    let mut kill = Command::new("kill");
    kill.args(["-INT", pid.lines().next().expect("a process id")]);
    succeed(kill, "");
    let begun = Instant::now();
    while running.exists() {
        assert!(
            begun.elapsed() < Duration::from_secs(30),
            "the server does not stop"
        );
        sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_given_database_url_is_used_instead_of_a_private_cluster() {
    let folder = Cluster::folder();
    let mut up = Cluster::script(folder.path(), "up");
    up.env("DATABASE_URL", "postgres://me@elsewhere/mine");
    assert_eq!(succeed(up, ""), "postgres://me@elsewhere/mine\n");
    assert!(!folder.path().join(".postgres").exists());
}

#[test]
fn a_pg_bin_without_a_server_is_refused_by_name() {
    let mut up = Cluster::script(&in_checkout(""), "up");
    let output = up
        .env("PG_BIN", "/nowhere")
        .output()
        .expect("run the script");
    assert!(!output.status.success());
    assert_eq!(
        printed(&output),
        "db: PG_BIN=/nowhere contains no PostgreSQL server, 15 or later\n"
    );
}

#[test]
fn a_cluster_of_another_version_is_refused() {
    let cluster = Cluster::start();
    let version = cluster.folder.path().join(".postgres/data/PG_VERSION");
    let original = fs::read_to_string(&version).expect("read the version");
    fs::write(&version, "14\n").expect("write another version");
    let output = Cluster::script(cluster.folder.path(), "up")
        .output()
        .expect("run the script");
    fs::write(&version, original).expect("restore the version");
    assert!(!output.status.success());
    let printed = printed(&output);
    assert!(
        printed.contains("was created by PostgreSQL 14, not by the one in"),
        "{printed}"
    );
    assert!(printed.contains("make clean removes it"), "{printed}");
}

#[test]
fn a_server_that_does_not_start_shows_its_log() {
    let cluster = Cluster::start();
    stop(&cluster);
    let settings = cluster
        .folder
        .path()
        .join(".postgres/data/postgresql.auto.conf");
    let original = fs::read_to_string(&settings).expect("read the settings");
    fs::write(&settings, "nonsense = on\n").expect("write wrong settings");
    let output = Cluster::script(cluster.folder.path(), "up")
        .output()
        .expect("run the script");
    fs::write(&settings, original).expect("restore the settings");
    assert!(!output.status.success());
    let printed = printed(&output);
    assert!(
        printed.contains("unrecognized configuration parameter \"nonsense\""),
        "{printed}"
    );
    assert!(printed.contains("PostgreSQL did not start"), "{printed}");
}

#[test]
fn concurrent_calls_make_one_cluster() {
    let folder = Cluster::folder();
    let calls = [(); 3].map(|()| {
        let up = Cluster::script(folder.path(), "up");
        std::thread::spawn(move || succeed(up, ""))
    });
    let [first, second, third] = calls.map(|call| call.join().expect("a URL"));
    succeed(Cluster::script(folder.path(), "down"), "");
    assert!(!first.is_empty() && first == second && second == third);
}

#[tokio::test]
async fn a_stopped_cluster_keeps_its_data_and_takes_new_settings() {
    let cluster = Cluster::start();
    run(&cluster.superuser().await, "create table kept ()").await;
    cluster.call("stop");
    assert!(cluster.config.connect(tokio_postgres::NoTls).await.is_err());
    let mut up = Cluster::script(cluster.folder.path(), "up");
    up.env("PG_SETTINGS", "-c work_mem=7MB");
    assert_eq!(succeed(up, "").trim_end(), cluster.url);
    let client = cluster.superuser().await;
    assert_eq!(value(&client, "show work_mem").await, "7MB");
    assert_eq!(value(&client, "select count(*) from kept").await, "0");
}

#[test]
fn a_pg_home_that_is_no_cluster_is_refused_and_keeps_its_files() {
    let script = Cluster::folder();
    for file in ["thesis.txt", "PG_VERSION", "data"] {
        let home = TempDir::new().expect("create a folder");
        let kept = home.path().join(file);
        fs::write(&kept, "mine").expect("write a file");
        for argument in ["up", "down"] {
            let mut command = Cluster::script(script.path(), argument);
            let output = command.env("PG_HOME", home.path()).output();
            let printed = printed(&output.expect("run the script"));
            let refused = format!(
                "db: {} is no cluster of this script, so it is neither used nor removed: set PG_HOME to a new folder\n",
                home.path().display()
            );
            assert!(printed.ends_with(&refused), "{argument}: {printed}");
            assert_eq!(fs::read_to_string(&kept).expect(file), "mine");
        }
    }
}

#[tokio::test]
async fn a_second_login_keeps_the_password_of_the_first() {
    let cluster = Cluster::migrated();
    let first = cluster.call("login");
    assert_eq!(cluster.call("login"), first);
    let login: Config = first.trim_end().parse().expect("a valid URL");
    rows(&connect(&login).await, "table listing").await;
}

#[tokio::test]
async fn a_login_on_a_given_server_takes_its_password_and_changes_no_role() {
    let cluster = Cluster::migrated();
    let login = |password: Option<&str>| {
        let mut login = Cluster::script(cluster.folder.path(), "login");
        login
            .env("DATABASE_URL", &cluster.url)
            .env_remove("SERVICE_PASSWORD");
        login.envs(password.map(|password| ("SERVICE_PASSWORD", password)));
        printed(&login.output().expect("run the script"))
    };
    assert_eq!(
        login(None),
        "db: DATABASE_URL is set: set SERVICE_PASSWORD too, the password of the role listing_service on that server\n"
    );
    assert_eq!(
        login(Some("a'b")),
        "db: SERVICE_PASSWORD must be letters and digits: it becomes part of a URL\n"
    );
    let first: Config = login(Some("first"))
        .trim_end()
        .parse()
        .expect("a valid URL");
    let second: Config = login(Some("second"))
        .trim_end()
        .parse()
        .expect("a valid URL");
    assert!(second.connect(tokio_postgres::NoTls).await.is_err());
    rows(&connect(&first).await, "table listing").await;
}
