//! A private PostgreSQL cluster for one test, and a standby or replica of it.

use std::fs::Permissions;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;
use tokio_postgres::{Client, Config};

use super::{address_in, apply, connect, in_checkout, run, succeed, wait_for};

/// A cluster made by `tests/db.sh`, in a folder that only the current user can enter.
pub struct Cluster {
    pub folder: TempDir,
    pub config: Config,
    pub url: String,
}

impl Cluster {
    pub fn start() -> Self {
        Self::make(&["up"])
    }

    /// A cluster whose database has every migration applied.
    pub fn migrated() -> Self {
        let cluster = Self::start();
        apply(&cluster.url, &in_checkout("sql"));
        cluster
    }

    /// A new streaming replica of this cluster.
    pub fn standby(&self) -> Self {
        Self::make(&["follow", &self.url])
    }

    fn make(arguments: &[&str]) -> Self {
        let folder = Self::folder();
        let private = Permissions::from_mode(0o700);
        std::fs::set_permissions(folder.path(), private).expect("make the folder private");
        let mut command = Self::script(folder.path(), arguments[0]);
        command.args(&arguments[1..]);
        let url = succeed(command, "").trim_end().to_owned();
        Self {
            config: url.parse().expect("a valid URL"),
            folder,
            url,
        }
    }

    /// A folder for a cluster, with a link to the script. A copy could not be run while another thread forks: the child
    /// inherits the file that is open for writing.
    pub fn folder() -> TempDir {
        let folder = TempDir::new().expect("create a folder");
        std::fs::create_dir(folder.path().join("tests")).expect("create a folder");
        let script = folder.path().join("tests/db.sh");
        symlink(in_checkout("tests/db.sh"), script).expect("create a link");
        folder
    }

    /// The command that calls the script for the cluster in a folder.
    pub fn script(folder: &Path, argument: &str) -> Command {
        let mut command = Command::new(folder.join("tests/db.sh"));
        command.arg(argument);
        command.env_remove("DATABASE_URL").env_remove("PG_HOME");
        command
    }

    /// Calls the script: `up`, `stop`, `promote`. Returns its output.
    pub fn call(&self, argument: &str) -> String {
        succeed(Self::script(self.folder.path(), argument), "")
    }

    /// Changes a setting and restarts. A reload would not do: each process applies it at a time of its own.
    pub async fn restart_with(&self, change: &str) {
        alter_system(&self.superuser().await, change).await;
        self.call("stop");
        self.call("up");
    }

    /// Kills all processes with SIGKILL.
    pub fn kill(&self) {
        kill_postgres(&self.data());
    }

    /// Sends a signal to all processes.
    pub fn signal(&self, signal: &str) {
        signal_postgres(signal, &self.data());
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join(".postgres/data")
    }

    pub fn pid_file(&self) -> PathBuf {
        self.data().join("postmaster.pid")
    }

    /// `host:port`.
    pub fn address(&self) -> &str {
        address_in(&self.url)
    }

    pub fn superuser(&self) -> impl Future<Output = Client> {
        connect(&self.config)
    }

    /// Waits until a query returns this value.
    pub async fn wait_for(&self, sql: &str, expected: &str) {
        wait_for(&self.superuser().await, sql, expected).await;
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.call("down");
    }
}

/// Kills the server in this folder, with all of its processes.
pub fn kill_postgres(data: &Path) {
    let processes = processes_of(data);
    send("-KILL", &processes);
    while list_of_processes()
        .iter()
        .any(|[id, _, state]| processes.contains(id) && !state.starts_with('Z'))
    {
        std::thread::yield_now();
    }
    // Without an init process that reaps orphans, pg_ctl takes the zombie for a running server.
    std::fs::remove_file(data.join("postmaster.pid")).expect("remove postmaster.pid");
}

/// Sends a signal to the server in this folder, and to all of its processes.
pub fn signal_postgres(signal: &str, data: &Path) {
    send(signal, &processes_of(data));
}

fn processes_of(data: &Path) -> Vec<String> {
    let file = std::fs::read_to_string(data.join("postmaster.pid")).expect("read postmaster.pid");
    let postmaster = file.lines().next().expect("a process id");
    list_of_processes()
        .into_iter()
        .filter(|[id, parent, _]| id == postmaster || parent == postmaster)
        .map(|[id, ..]| id)
        .collect()
}

fn send(signal: &str, processes: &[String]) {
    let mut kill = Command::new("kill");
    kill.arg(signal).args(processes).stderr(Stdio::null());
    // The exit code does not matter: a session may have ended in the meantime.
    kill.status().expect("run kill");
}

/// The id, parent and state of every process.
fn list_of_processes() -> Vec<[String; 3]> {
    let mut list = Command::new("ps");
    list.args(["-A", "-o", "pid=,ppid=,stat="]);
    let fields = |line: &str| -> Vec<_> { line.split_whitespace().map(str::to_owned).collect() };
    succeed(list, "")
        .lines()
        .filter_map(|line| fields(line).try_into().ok())
        .collect()
}

/// Changes a setting for the whole server.
pub async fn alter_system(client: &Client, change: &str) {
    run(client, &format!("alter system {change}")).await;
    run(client, "select pg_reload_conf()").await;
}

/// A primary whose commits wait for its standby, and that standby.
pub async fn synchronous_pair() -> (Cluster, Cluster) {
    let primary = Cluster::migrated();
    let standby = primary.standby();
    require_a_standby(&primary).await;
    (primary, standby)
}

/// Makes each commit wait for a standby. Returns when the standby is connected and counts as synchronous.
pub async fn require_a_standby(primary: &Cluster) {
    let superuser = primary.superuser().await;
    alter_system(&superuser, "set synchronous_standby_names = '*'").await;
    let synchronous = "select count(*) from pg_stat_replication where sync_state = 'sync'";
    wait_for(&superuser, synchronous, "1").await;
    // The checkpointer turns the waiting of commits on. It has read the setting once it has written a checkpoint.
    run(&superuser, "checkpoint").await;
}

/// Waits until a replica has the first listing, then pauses its replay. Returns a session on the replica.
pub async fn pause_after_the_first_listing(replica: &Cluster) -> Client {
    let superuser = replica.superuser().await;
    wait_for(&superuser, "select count(*) from listing_price_log", "1").await;
    pause_replay(&superuser).await;
    superuser
}

pub async fn pause_replay(superuser: &Client) {
    run(superuser, "select pg_wal_replay_pause()").await;
    let state = "select pg_get_wal_replay_pause_state()";
    wait_for(superuser, state, "paused").await;
}
