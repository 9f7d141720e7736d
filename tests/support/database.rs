//! A database for each test, cloned from a template that the refinery CLI migrated once. It is dropped when the test ends,
//! also if the test fails.

use std::path::Path;
use std::process::Output;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{LazyLock, Mutex, mpsc};
use std::time::{Duration, Instant};

use tokio::runtime::Runtime;
use tokio::sync::OnceCell;
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage};

use super::{apply, in_checkout, refinery, setting};

/// All required columns of a listing but its price, and values for them.
pub const OTHER_COLUMNS: &str = "name, description, building_type, street_address, postal_code, city, country, \
    surface_area_m2, rooms_count, bedrooms_count";
pub const OTHER_VALUES: &str =
    "'Loft', 'Under the roof', 'APARTMENT', '1 rue Oberkampf', '75011', 'Paris', 'FR', 42.5, 2, 1";

/// The price history of every listing, oldest first.
pub const HISTORY: &str =
    "select listing_id, old_price, new_price from public.listing_price_log order by listing_id, id";

/// Counts the statements that wait for a lock.
pub const WAITING: &str = "select count(*) from pg_stat_activity \
    where wait_event_type = 'Lock' and datname = current_database()";

/// The statement that inserts one listing with this id and price.
pub fn insert_listing(id: i32, price: &str) -> String {
    format!(
        "insert into public.listing (id, price, {OTHER_COLUMNS}) values ({id}, {price}, {OTHER_VALUES})"
    )
}

/// The statement, run while the append-only trigger of the log does not fire.
pub fn unguarded(statement: &str) -> String {
    format!(
        "alter table public.listing_price_log disable trigger user; {statement}; \
         alter table public.listing_price_log enable trigger user"
    )
}

/// The statement that inserts one listing with this owner, given as an SQL literal.
pub fn insert_owned(id: i32, owner: &str) -> String {
    format!(
        "insert into listing (id, price, owner, {OTHER_COLUMNS}) values ({id}, 1, {owner}, {OTHER_VALUES})"
    )
}

/// A database for one test. When dropped, it drops the database and the roles that [`Database::login`] made.
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

    pub async fn empty() -> Self {
        Self::create("").await
    }

    async fn create(options: &str) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("listing_test_{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let sql = format!("create database {name} {options}");
        let admin = ADMIN.get_or_init(connect_admin).await;
        admin.batch_execute(&sql).await.expect("create a database");
        let superuser = connect(server().dbname(&name)).await;
        Self {
            name,
            superuser,
            roles: Mutex::default(),
        }
    }

    pub fn url(&self) -> String {
        url_of(&self.name)
    }

    /// The `host:port` of its server.
    pub fn address(&self) -> String {
        address_in(&self.url()).to_owned()
    }

    /// Another session of the superuser.
    pub async fn connect(&self) -> Client {
        connect(server().dbname(&self.name)).await
    }

    /// A session of a new role, a member of the groups in `in_role` and nothing else.
    pub async fn login(&self, suffix: &str, in_role: &str) -> Client {
        let role = self.create_role(suffix, in_role).await;
        connect(server().dbname(&self.name).user(&role).password("secret")).await
    }

    /// A URL for a new role that has the rights of the service.
    pub async fn service_url(&self) -> String {
        let role = self.create_role("login", "in role listing_api").await;
        let url = self.url();
        let (_, address) = url.rsplit_once('@').expect("user:password@address");
        format!("postgres://{role}:secret@{address}")
    }

    /// A new role that can log in.
    pub async fn create_role(&self, suffix: &str, in_role: &str) -> String {
        let role = format!("{}_{suffix}", self.name);
        let sql = format!("create role {role} login password 'secret' {in_role}");
        run(&self.superuser, &sql).await;
        self.roles.lock().expect("lock").push(role.clone());
        role
    }

    /// Waits until a query returns this value, in a session of its own: the superuser may be in a transaction.
    pub async fn wait_for(&self, sql: &str, expected: &str) {
        wait_for(&self.connect().await, sql, expected).await;
    }

    /// Applies the migrations in a folder with the refinery CLI, as `make migrate` does.
    pub fn migrate(&self, folder: &Path) -> Output {
        refinery(&self.url(), folder)
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let mut statements = vec![format!("drop database {} with (force)", self.name)];
        let roles = self.roles.lock().expect("lock");
        statements.extend(roles.iter().map(|role| format!("drop role {role}")));
        let (done, wait) = mpsc::channel();
        RUNTIME.spawn(async move {
            let admin = ADMIN.get().expect("the session that made the database");
            for statement in statements {
                admin.batch_execute(&statement).await.expect(&statement);
            }
            done.send(()).expect("the test waits for this");
        });
        let dropped = wait.recv();
        assert!(dropped.is_ok() || std::thread::panicking(), "not dropped");
    }
}

/// Runs statements that must succeed.
pub async fn run(client: &Client, sql: &str) {
    if let Err(error) = client.batch_execute(sql).await {
        panic!("{error:?}\nin: {sql}");
    }
}

/// Runs statements that PostgreSQL must refuse. Returns the code and the message of the error.
pub async fn refusal(client: &Client, sql: &str) -> String {
    let error = client.batch_execute(sql).await.expect_err(sql);
    let error = error.as_db_error().expect("an error from PostgreSQL");
    format!("{} {}", error.code().code(), error.message())
}

/// The rows of a query as text, like `psql -At -P null=null`.
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

/// The value of a query that returns one row.
pub async fn value(client: &Client, sql: &str) -> String {
    let rows = rows(client, sql).await;
    assert_eq!(rows.len(), 1, "rows of {sql}");
    rows.concat()
}

/// Waits until a query returns this value. Fails after 20 seconds.
pub async fn wait_for(client: &Client, sql: &str, expected: &str) {
    let begun = Instant::now();
    loop {
        let now = value(client, sql).await;
        if now == expected {
            return;
        }
        assert!(
            begun.elapsed() < Duration::from_secs(20),
            "{sql}: is {now}, not {expected}"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Asserts that the log is consistent, by the view that DBAs use.
pub async fn assert_no_problem(client: &Client) {
    let problems = rows(client, "table public.listing_price_log_problem").await;
    assert_eq!(problems, [""; 0]);
}

/// Creates an API key for an owner.
pub async fn create_key(client: &Client, owner: &str) -> String {
    value(client, &format!("select create_api_key('{owner}')")).await
}

pub async fn create_administrator_key(client: &Client) -> String {
    value(client, "select create_api_key(administrator => true)").await
}

pub async fn revoke_key(client: &Client, key: &str) {
    let sql = format!("select revoke_api_key(id) from api_key where key_sha256 = sha256('{key}')");
    value(client, &sql).await;
}

pub async fn connect(config: &Config) -> Client {
    let (client, connection) = config.connect(NoTls).await.expect("connect");
    tokio::spawn(connection);
    client
}

/// The `host:port` in a database URL.
pub fn address_in(url: &str) -> &str {
    let (_, address) = url.rsplit_once('@').expect("user:password@address");
    address.split('/').next().expect("address/database")
}

/// The URL of another database on the same server.
fn url_of(database: &str) -> String {
    let url = setting("DATABASE_URL");
    let (address, options) = url.split_once('?').unwrap_or((&url, ""));
    let (server, _) = address.rsplit_once('/').expect("postgres://…/database");
    format!("{server}/{database}?{options}")
}

fn server() -> Config {
    setting("DATABASE_URL").parse().expect("a valid URL")
}

/// Runs the session that creates and drops databases. It outlives the runtime of each test.
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().expect("a runtime"));
static ADMIN: OnceCell<Client> = OnceCell::const_new();
static TEMPLATE: OnceCell<String> = OnceCell::const_new();

async fn connect_admin() -> Client {
    let connecting = RUNTIME.spawn(async { connect(&server()).await });
    let admin = connecting.await.expect("connect");
    // Two test runs on one server use the same database names, so the second run waits for the first to end.
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
    apply(&url_of(&name), &in_checkout("sql"));
    name
}
