//! What every test stands on: a real PostgreSQL and a database of the test's own, cloned from a template that the real
//! refinery CLI migrated once. Everything a test makes is gone when it ends, also when it fails.

use std::env;
use std::fs::Permissions;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{LazyLock, Mutex, mpsc};

use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::OnceCell;
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage};

/// The columns of a listing that say nothing about its price, and values for them.
pub const OTHER_COLUMNS: &str = "name, description, building_type, street_address, postal_code, city, country, \
    surface_area_m2, rooms_count, bedrooms_count";
pub const OTHER_VALUES: &str =
    "'Loft', 'Under the roof', 'APARTMENT', '1 rue Oberkampf', '75011', 'Paris', 'FR', 42.5, 2, 1";

/// The whole history of every listing, oldest first.
pub const HISTORY: &str =
    "select listing_id, old_price, new_price from public.listing_price_log order by listing_id, id";

/// The statement that inserts one listing with this id and price.
pub fn insert_listing(id: i32, price: &str) -> String {
    format!(
        "insert into public.listing (id, price, {OTHER_COLUMNS}) values ({id}, {price}, {OTHER_VALUES})"
    )
}

/// A database of the test's own. Dropped at the end, with the roles that [`Database::login`] made.
pub struct Database {
    pub name: String,
    /// A session of the superuser.
    pub superuser: Client,
    roles: Mutex<Vec<String>>,
}

impl Database {
    /// A database with every migration applied and no listing.
    pub async fn migrated() -> Self {
        let template = TEMPLATE.get_or_init(make_template).await;
        Self::create(&format!("template {template}")).await
    }

    /// A database with nothing in it.
    pub async fn empty() -> Self {
        Self::create("").await
    }

    async fn create(options: &str) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("listing_test_{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let sql = format!("create database {name} {options}");
        let admin = ADMIN.get_or_init(connect_admin).await;
        admin.batch_execute(&sql).await.expect("a new database");
        let superuser = connect(server().dbname(&name)).await;
        Self {
            name,
            superuser,
            roles: Mutex::default(),
        }
    }

    /// Its address for programs.
    pub fn url(&self) -> String {
        url_of(&self.name)
    }

    /// The server that it is on, as `host:port`.
    pub fn address(&self) -> String {
        let url = self.url();
        let (_, address) = url.rsplit_once('@').expect("user:password@address");
        address.split('/').next().expect("an address").to_owned()
    }

    /// A further session of the superuser.
    pub async fn connect(&self) -> Client {
        connect(server().dbname(&self.name)).await
    }

    /// A session of a new role that can log in and has no rights but those of the groups it is `in_role` of.
    pub async fn login(&self, suffix: &str, in_role: &str) -> Client {
        let role = format!("{}_{suffix}", self.name);
        let sql = format!("create role {role} login password 'secret' {in_role}");
        run(&self.superuser, &sql).await;
        self.drop_role_at_end(&role);
        connect(server().dbname(&self.name).user(&role).password("secret")).await
    }

    pub fn drop_role_at_end(&self, role: &str) {
        self.roles.lock().expect("a lock").push(role.to_owned());
    }

    /// Applies the migrations of a folder with the real CLI, as `make migrate` does.
    pub fn migrate(&self, folder: &Path) -> Output {
        refinery(&self.url(), folder)
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let mut statements = vec![format!("drop database {} with (force)", self.name)];
        let roles = self.roles.lock().expect("a lock");
        statements.extend(roles.iter().map(|role| format!("drop role {role}")));
        let (done, wait) = mpsc::channel();
        RUNTIME.spawn(async move {
            let admin = ADMIN.get().expect("the session that made the database");
            for statement in statements {
                admin.batch_execute(&statement).await.expect(&statement);
            }
            done.send(()).expect("somebody who waits");
        });
        let dropped = wait.recv();
        assert!(dropped.is_ok() || std::thread::panicking(), "not dropped");
    }
}

/// A private cluster of the test's own, made by `tests/db.sh` in a folder that only the user who runs the tests can enter.
pub struct Cluster {
    pub folder: TempDir,
    pub config: Config,
    pub url: String,
}

impl Cluster {
    pub fn start() -> Self {
        Self::make(&["up"])
    }

    /// With every migration applied.
    pub fn migrated() -> Self {
        let cluster = Self::start();
        let output = refinery(&cluster.url, &in_checkout("sql"));
        assert!(output.status.success(), "{}", printed(&output));
        cluster
    }

    /// A standby of this one.
    pub fn standby(&self) -> Self {
        Self::make(&["follow", &self.url])
    }

    fn make(arguments: &[&str]) -> Self {
        let folder = Self::folder();
        let private = Permissions::from_mode(0o700);
        std::fs::set_permissions(folder.path(), private).expect("a private folder");
        let mut command = Self::script(folder.path(), arguments[0]);
        command.args(&arguments[1..]);
        let url = succeed(command, "").trim_end().to_owned();
        Self {
            config: url.parse().expect("a DATABASE_URL"),
            folder,
            url,
        }
    }

    /// A folder for a cluster, with the script. Not a copy of it: while that is written, whatever another thread starts holds
    /// it open too, and what is open for writing cannot be run.
    pub fn folder() -> TempDir {
        let folder = TempDir::new().expect("a folder");
        std::fs::create_dir(folder.path().join("tests")).expect("a folder");
        let script = folder.path().join("tests/db.sh");
        symlink(in_checkout("tests/db.sh"), script).expect("a link");
        folder
    }

    /// The command that calls the script of a cluster in a folder.
    pub fn script(folder: &Path, argument: &str) -> Command {
        let mut command = Command::new(folder.join("tests/db.sh"));
        command.arg(argument).env_remove("DATABASE_URL");
        command
    }

    /// Calls its script: `up`, `stop`, `promote`.
    pub fn call(&self, argument: &str) {
        succeed(Self::script(self.folder.path(), argument), "");
    }

    /// Changes a setting, and restarts it, because each process of one that runs heeds the change in its own time.
    pub async fn restart_with(&self, change: &str) {
        alter_system(&self.superuser().await, change).await;
        self.call("stop");
        self.call("up");
    }

    /// Ends all its processes at once.
    pub fn kill(&self) {
        let processes = self.processes();
        send("-KILL", &processes);
        while list_of_processes()
            .iter()
            .any(|[id, _, state]| processes.contains(id) && !state.starts_with('Z'))
        {
            std::thread::yield_now();
        }
        // Where nobody reaps orphans, the first process still counts as one that runs.
        std::fs::remove_file(self.running()).expect("the file of its process");
    }

    /// Sends a signal to all its processes.
    pub fn signal(&self, signal: &str) {
        send(signal, &self.processes());
    }

    fn running(&self) -> PathBuf {
        self.folder.path().join(".postgres/data/postmaster.pid")
    }

    fn processes(&self) -> Vec<String> {
        let file = std::fs::read_to_string(self.running()).expect("the id of its process");
        let first = file.lines().next().expect("a line");
        let list = list_of_processes().into_iter();
        let ours = list.filter(|[id, parent, _]| id == first || parent == first);
        ours.map(|[id, ..]| id).collect()
    }

    /// `host:port`.
    pub fn address(&self) -> &str {
        let (_, address) = self.url.rsplit_once('@').expect("user:password@address");
        address.split('/').next().expect("an address")
    }

    pub fn superuser(&self) -> impl Future<Output = Client> {
        connect(&self.config)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        succeed(Self::script(self.folder.path(), "down"), "");
    }
}

fn send(signal: &str, processes: &[String]) {
    let mut kill = Command::new("kill");
    kill.arg(signal).args(processes).stderr(Stdio::null());
    // It fails where a session has ended since.
    kill.status().expect("kill");
}

/// The id, parent and state of every process.
fn list_of_processes() -> Vec<[String; 3]> {
    let mut list = Command::new("ps");
    list.args(["-A", "-o", "pid=,ppid=,stat="]);
    let list = succeed(list, "");
    let fields = |line: &str| {
        line.split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    list.lines()
        .filter_map(|line| fields(line).try_into().ok())
        .collect()
}

/// Runs statements that must succeed.
pub async fn run(client: &Client, sql: &str) {
    if let Err(error) = client.batch_execute(sql).await {
        panic!("{error:?}\nin: {sql}");
    }
}

/// Changes a setting of the server, as `alter system` has it, for everybody.
pub async fn alter_system(client: &Client, change: &str) {
    run(client, &format!("alter system {change}")).await;
    run(client, "select pg_reload_conf()").await;
}

/// Runs statements that must be refused, and returns the code and the message of the refusal.
pub async fn refusal(client: &Client, sql: &str) -> String {
    let error = client.batch_execute(sql).await.expect_err(sql);
    let error = error.as_db_error().expect("a refusal by PostgreSQL");
    format!("{} {}", error.code().code(), error.message())
}

/// The rows of a query as text, in the way of `psql -At -P null=null`.
pub async fn rows(client: &Client, sql: &str) -> Vec<String> {
    let messages = match client.simple_query(sql).await {
        Ok(messages) => messages,
        Err(error) => panic!("{error:?}\nin: {sql}"),
    };
    let row = |message| match message {
        SimpleQueryMessage::Row(row) => {
            let columns: Vec<_> = (0..row.len())
                .map(|column| row.get(column).unwrap_or("null"))
                .collect();
            Some(columns.join("|"))
        }
        _ => None,
    };
    messages.into_iter().filter_map(row).collect()
}

/// The one value that a query returns.
pub async fn value(client: &Client, sql: &str) -> String {
    let rows = rows(client, sql).await;
    assert_eq!(rows.len(), 1, "rows of {sql}");
    rows.concat()
}

/// Asserts that the log is whole, by the view that DBAs ask.
pub async fn assert_no_problem(client: &Client) {
    let problems = rows(client, "table public.listing_price_log_problem").await;
    assert_eq!(problems, [""; 0]);
}

pub async fn connect(config: &Config) -> Client {
    let (client, connection) = config.connect(NoTls).await.expect("a connection");
    tokio::spawn(connection);
    client
}

/// Runs a program that must succeed, with this text as its input, and returns what it printed.
pub fn succeed(mut command: Command, input: &str) -> String {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let mut stdin = child.stdin.take().expect("a pipe");
    let input = input.to_owned();
    let writer =
        std::thread::spawn(move || std::io::Write::write_all(&mut stdin, input.as_bytes()));
    let output = child.wait_with_output().expect("its end");
    assert!(output.status.success(), "{command:?}: {}", printed(&output));
    writer.join().expect("its end").expect("all input taken");
    String::from_utf8(output.stdout).expect("text")
}

/// All that a program printed.
pub fn printed(output: &Output) -> String {
    [&output.stdout, &output.stderr]
        .map(|text| String::from_utf8_lossy(text))
        .concat()
}

/// One of the programs of the server, by the way that `make psql` finds it.
pub fn program(name: &str) -> Command {
    let mut command = Command::new(in_checkout("tests/db.sh"));
    command.args(["run", name]);
    command
}

pub fn refinery(url: &str, folder: &Path) -> Output {
    Command::new(setting("REFINERY"))
        .args(["migrate", "-e", "DATABASE_URL", "-g", "-d", "-m", "-p"])
        .arg(folder)
        .env("DATABASE_URL", url)
        .output()
        .expect("the refinery CLI")
}

pub fn in_checkout(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The address of the server's database of this name.
fn url_of(database: &str) -> String {
    let url = setting("DATABASE_URL");
    let (address, options) = url.split_once('?').unwrap_or((&url, ""));
    let (server, _) = address.rsplit_once('/').expect("postgres://…/database");
    format!("{server}/{database}?{options}")
}

fn server() -> Config {
    setting("DATABASE_URL").parse().expect("a DATABASE_URL")
}

fn setting(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| {
        panic!("{name} is not set: run the tests with `make test`, which starts a database")
    })
}

/// Runs what outlives a single test: the session that makes and drops the databases.
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().expect("a runtime"));
static ADMIN: OnceCell<Client> = OnceCell::const_new();
static TEMPLATE: OnceCell<String> = OnceCell::const_new();

async fn connect_admin() -> Client {
    let connecting = RUNTIME.spawn(async { connect(&server()).await });
    let admin = connecting.await.expect("a session");
    // Two runs on one server would take each other's databases: the second waits for the end of the first.
    run(&admin, "select pg_advisory_lock(hashtext('listing_test'))").await;
    let leftovers = "select format('drop database %I with (force)', datname) from pg_database where datname ~ '^listing_test_' \
        union all select format('drop role %I', rolname) from pg_roles where rolname ~ '^listing_test_'";
    for statement in rows(&admin, leftovers).await {
        run(&admin, &statement).await;
    }
    admin
}

async fn make_template() -> String {
    let name = "listing_test_template".to_owned();
    let admin = ADMIN.get_or_init(connect_admin).await;
    run(admin, &format!("create database {name}")).await;
    let output = refinery(&url_of(&name), &in_checkout("sql"));
    assert!(output.status.success(), "{}", printed(&output));
    name
}
