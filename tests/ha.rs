//! Three PostgreSQL servers under Patroni with etcd, in the configuration of docs/patroni.md. The leader is killed, paused and
//! cut off while clients record every acknowledged write. In the end the database must contain all of them.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::support::{
    History, Link, Service, TWO_SECONDS, apply, connect, in_checkout, kill_postgres, run, setting,
    signal_postgres, succeed, within,
};

/// Far more than a failover takes, or the return of a server.
const LIMIT: Duration = Duration::from_mins(2);

/// What the test does. It happens to the leader, unless the name says otherwise.
#[derive(Clone, Copy, Debug)]
enum Fault {
    Switchover,
    /// Kills Patroni and PostgreSQL.
    Kill,
    /// Pauses both until another server leads.
    Pause,
    CutOffFromClients,
    CutOffFromEtcd,
    /// From etcd, the other Patronis and the standbys, but not from clients. So commits wait when the leader steps down.
    CutOffFromAllButClients,
    WipeStandby,
    RollingRestart,
}

const FAULTS: [Fault; 8] = [
    Fault::Switchover,
    Fault::Kill,
    Fault::CutOffFromAllButClients,
    Fault::WipeStandby,
    Fault::Pause,
    Fault::CutOffFromClients,
    Fault::CutOffFromEtcd,
    Fault::RollingRestart,
];

struct Node {
    name: &'static str,
    folder: PathBuf,
    /// Where PostgreSQL and Patroni listen.
    postgres: String,
    api: String,
    /// How clients, standbys and other Patronis reach it, and how its Patroni reaches etcd.
    clients: Link,
    standbys: Link,
    patronis: Link,
    etcd: Link,
    patroni: Child,
}

impl Node {
    fn start(name: &'static str, folder: PathBuf, etcd: &str) -> Self {
        fs::create_dir(&folder).expect("create a folder");
        let (postgres, api) = (server_address(), server_address());
        let [clients, standbys, patronis, etcd] =
            [&postgres, &postgres, &api, etcd].map(Link::to_address);
        let server = Command::new(in_checkout("tests/db.sh"))
            .arg("server")
            .output()
            .expect("run the script");
        let programs = String::from_utf8(server.stdout).expect("UTF-8");
        let page = fs::read_to_string(in_checkout("docs/patroni.md")).expect("read the page");
        let (_, settings) = page.split_once("```yaml\n").expect("a configuration");
        let (settings, _) = settings.split_once("```").expect("the end of the block");
        let mut settings = settings.to_owned();
        for (shown, used) in [
            ("name: db1\n", format!("name: {name}\n")),
            ("0.0.0.0:5432", postgres.clone()),
            ("db1:5432", standbys.address.clone()),
            ("0.0.0.0:8008", api.clone()),
            ("db1:8008", patronis.address.clone()),
            ("etcd1:2379,etcd2:2379,etcd3:2379", etcd.address.clone()),
            ("10.0.0.0/24", "127.0.0.1/32".to_owned()),
            ("/usr/lib/postgresql/17/bin", programs.trim().to_owned()),
            ("/var/lib/postgresql/", format!("{}/", folder.display())),
            ("/run/postgresql", folder.display().to_string()),
            // Nothing else may stop the machine.
            ("/dev/watchdog", "/dev/no-watchdog".to_owned()),
            ("…", "secret".to_owned()),
        ] {
            assert!(settings.contains(shown), "no {shown} in {settings}");
            settings = settings.replace(shown, &used);
        }
        fs::write(folder.join("patroni.yml"), settings).expect("write the configuration");
        let log = File::create(folder.join("log")).expect("create the log");
        let patroni = Self::spawn(&folder, log);
        Self {
            name,
            folder,
            postgres,
            api,
            clients,
            standbys,
            patronis,
            etcd,
            patroni,
        }
    }

    fn restart(&mut self) {
        let log = File::options().append(true).open(self.folder.join("log"));
        self.patroni = Self::spawn(&self.folder, log.expect("open the log"));
    }

    fn spawn(folder: &Path, log: File) -> Child {
        patroni("patroni")
            .arg(folder.join("patroni.yml"))
            .current_dir("/")
            .stdout(log.try_clone().expect("clone a file"))
            .stderr(log)
            .spawn()
            .expect("start Patroni")
    }

    fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    fn kill(&mut self) {
        // Fails if it has ended.
        let _ = self.patroni.kill();
        self.patroni.wait().expect("wait for Patroni");
        kill_postgres(&self.data());
    }

    fn signal(&self, signal: &str) {
        let mut kill = Command::new("kill");
        kill.args([signal, &self.patroni.id().to_string()]);
        succeed(kill, "");
        signal_postgres(signal, &self.data());
    }

    /// The status and the body of a path of Patroni's API.
    fn ask(&self, path: &str) -> io::Result<(String, Value)> {
        let mut stream = TcpStream::connect(&self.api)?;
        stream.set_read_timeout(Some(TWO_SECONDS))?;
        write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
        let mut response = String::new();
        stream.read_to_string(&mut response)?;
        let (head, body) = response.split_once("\r\n\r\n").unwrap_or_default();
        let status = head.split(' ').nth(1).unwrap_or_default();
        Ok((status.to_owned(), serde_json::from_str(body)?))
    }

    fn is_leader(&self) -> bool {
        self.ask("/primary")
            .is_ok_and(|(status, _)| status == "200")
    }

    /// Whether the commits of a leader with this timeline may wait for it.
    fn is_synchronous(&self, timeline: &Value) -> bool {
        self.ask("/patroni").is_ok_and(|(_, it)| {
            it["replication_state"] == "streaming"
                && it["quorum_standby"] == true
                && it["timeline"] == *timeline
        })
    }
}

struct World {
    folder: TempDir,
    etcd: Child,
    nodes: Vec<Node>,
}

impl World {
    fn start() -> Self {
        let folder = TempDir::new().expect("create a folder");
        let [clients, peers] =
            [server_address(), server_address()].map(|it| format!("http://{it}"));
        // In memory: with a slow disk, etcd would take the lead from every server.
        let etcd = Command::new(setting("ETCD"))
            .args([
                "--listen-client-urls",
                &clients,
                "--advertise-client-urls",
                &clients,
            ])
            .args([
                "--listen-peer-urls",
                &peers,
                "--initial-advertise-peer-urls",
                &peers,
            ])
            .args([
                "--initial-cluster",
                &format!("default={peers}"),
                "--data-dir",
            ])
            .arg(folder.path().join("etcd"))
            .stderr(Stdio::null())
            .spawn()
            .expect("start etcd");
        let mut world = Self {
            folder,
            etcd,
            nodes: Vec::new(),
        };
        for name in ["db1", "db2", "db3"] {
            let folder = world.folder.path().join(name);
            let node = Node::start(name, folder, clients.trim_start_matches("http://"));
            world.nodes.push(node);
        }
        world.wait_until_healthy();
        world
    }

    fn leader(&self) -> Option<usize> {
        self.nodes.iter().position(Node::is_leader)
    }

    /// Waits for a leader, and until the other servers are its synchronous standbys.
    fn wait_until_healthy(&self) {
        within(LIMIT, "a leader and two synchronous standbys", || {
            let Some(leader) = self.leader() else {
                return false;
            };
            let Ok((_, leader)) = self.nodes[leader].ask("/patroni") else {
                return false;
            };
            let timeline = &leader["timeline"];
            let standbys = self
                .nodes
                .iter()
                .filter(|node| node.is_synchronous(timeline));
            standbys.count() == 2
        });
    }

    fn wait_for_another_leader(&self, former: usize) {
        within(LIMIT, "another leader", || {
            let mut nodes = self.nodes.iter().enumerate();
            nodes.any(|(number, node)| number != former && node.is_leader())
        });
    }

    fn patronictl(&self, arguments: &[&str]) {
        let mut command = patroni("patronictl");
        command
            .arg("-c")
            .arg(self.nodes[0].folder.join("patroni.yml"));
        command.args(arguments);
        succeed(command, "");
    }

    fn inject(&mut self, fault: Fault) {
        let leader = self.leader().expect("a leader");
        let others = [(leader + 1) % 3, (leader + 2) % 3];
        match fault {
            Fault::Switchover => {
                self.patronictl(&["switchover", "listing", "--force"]);
                self.wait_for_another_leader(leader);
            }
            Fault::Kill => {
                self.nodes[leader].kill();
                self.wait_for_another_leader(leader);
                self.nodes[leader].restart();
            }
            Fault::Pause => {
                self.nodes[leader].signal("-STOP");
                self.wait_for_another_leader(leader);
                self.nodes[leader].signal("-CONT");
            }
            Fault::CutOffFromClients => {
                self.nodes[leader].clients.cut(true);
                thread::sleep(Duration::from_secs(5));
                self.nodes[leader].clients.cut(false);
            }
            Fault::CutOffFromEtcd => {
                self.nodes[leader].etcd.cut(true);
                // Longer than `ttl`.
                thread::sleep(Duration::from_secs(25));
                assert!(self.nodes[leader].is_leader());
                self.nodes[leader].etcd.cut(false);
            }
            Fault::CutOffFromAllButClients => {
                let node = &self.nodes[leader];
                let others = others.map(|other| &self.nodes[other]);
                let links = [&node.patronis, &others[0].patronis, &others[1].patronis];
                node.etcd.cut(true);
                node.standbys.cut(true);
                for link in links {
                    link.cut(true);
                }
                within(LIMIT, "the end of the leader", || {
                    node.ask("/patroni")
                        .is_ok_and(|(_, it)| it["state"] != "running")
                });
                for link in links {
                    link.cut(false);
                }
                self.wait_for_another_leader(leader);
                node.etcd.cut(false);
                node.standbys.cut(false);
            }
            Fault::WipeStandby => {
                let standby = self.nodes[others[0]].name;
                self.patronictl(&["reinit", "listing", standby, "--force", "--wait"]);
            }
            Fault::RollingRestart => self.patronictl(&["restart", "listing", "--force"]),
        }
        self.wait_until_healthy();
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            if thread::panicking() {
                let log = fs::read_to_string(node.folder.join("log")).unwrap_or_default();
                let lines: Vec<_> = log.lines().rev().take(60).collect();
                let lines: Vec<_> = lines.into_iter().rev().collect();
                println!("log of {}:\n{}", node.name, lines.join("\n"));
            }
            // Each fails if it has ended.
            let _ = node.patroni.kill();
            let _ = node.patroni.wait();
            let data = node.data();
            if data.join("postmaster.pid").exists() {
                signal_postgres("-CONT", &data);
                kill_postgres(&data);
            }
        }
        let _ = self.etcd.kill();
        let _ = self.etcd.wait();
    }
}

/// A loopback address below the range of ports for outgoing connections, one of which would take the port while a server is down.
fn server_address() -> String {
    loop {
        let address = format!("127.0.0.1:{}", fastrand::u16(15000..32000));
        if std::net::TcpListener::bind(&address).is_ok() {
            return address;
        }
    }
}

/// A program of Patroni. Root runs it as the user postgres, who can still enter the folders of root.
fn patroni(program: &str) -> Command {
    let installed = PathBuf::from(setting("PATRONI"));
    let is_root = fs::metadata("/proc/self").is_ok_and(|it| it.uid() == 0);
    let mut command = Command::new(if is_root { "setpriv" } else { "python3" });
    if is_root {
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]);
        command.args([
            "--inh-caps=+dac_override",
            "--ambient-caps=+dac_override",
            "python3",
        ]);
    }
    command
        .arg(installed.join("bin").join(program))
        .env("PYTHONPATH", &installed)
        // Otherwise Patroni asks etcd for its address, and goes around the link.
        .env("PATRONI_ETCD3_USE_PROXIES", "true");
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn patroni_fails_over_without_the_loss_of_an_acknowledged_write() {
    let duration = setting("HA_SECONDS").parse().expect("HA_SECONDS");
    let duration = Duration::from_secs(duration);
    let mut world = World::start();
    let url = |role: &str, hosts: &[&str], database: &str| {
        format!("postgres://{role}:secret@{}/{database}", hosts.join(","))
    };
    let leader = &world.nodes[world.leader().expect("a leader")].postgres;
    let superuser = url("postgres", &[leader], "postgres").parse();
    let superuser = connect(&superuser.expect("a URL")).await;
    run(&superuser, "create database listing").await;
    apply(&url("postgres", &[leader], "listing"), &in_checkout("sql"));
    let role = "create role listing_service login password 'secret' in role listing_api, pg_read_all_stats";
    run(&superuser, role).await;

    let hosts = world.nodes.iter().map(|node| &*node.clients.address);
    let read_url = url("listing_service", &hosts.collect::<Vec<_>>(), "listing");
    let url_of_primary = format!("{read_url}?target_session_attrs=read-write");
    let settings = [("DATABASE_READ_URL", &*read_url)];
    let instances = [(); 3].map(|()| Service::start_at(&url_of_primary, &settings));
    let addresses = instances.each_ref().map(|it| it.address.clone());
    let mut history = History::record(&addresses, fastrand::u64(..1_000_000));
    thread::sleep(Duration::from_secs(1));
    for (number, fault) in FAULTS.into_iter().cycle().enumerate() {
        if number >= FAULTS.len() && history.begun.elapsed() > duration {
            break;
        }
        let begun = Instant::now();
        world.inject(fault);
        history.recovered(&format!("{fault:?}"), begun, Duration::from_secs(10));
    }
    let leader = &world.nodes[world.leader().expect("a leader")].postgres;
    let superuser = url("postgres", &[leader], "listing").parse();
    history
        .verify(&connect(&superuser.expect("a URL")).await)
        .await;
}
