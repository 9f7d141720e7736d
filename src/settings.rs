//! Settings come from the environment. Each has a default but `DATABASE_URL`; a bad one stops the start, by name.

use std::env;
use std::fmt::{self, Display};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use tokio_postgres::Config;

pub struct Settings {
    /// One for each host of the URL, and below.
    pub database: Vec<Config>,
    pub replicas: Vec<Config>,
    pub replica_lag: Duration,
    pub ca_file: Option<PathBuf>,
    pub listen: SocketAddr,
    pub admin: SocketAddr,
    pub auth: Auth,
    pub workers: usize,
    pub pool_size: usize,
    pub pool_wait: Duration,
    pub queue_size: usize,
    pub connect_timeout: Duration,
    pub statement_timeout: Duration,
    pub shutdown_delay: Duration,
    pub shutdown_timeout: Duration,
    /// Empty: any origin.
    pub cors_origins: Vec<String>,
}

/// Who may write.
#[derive(Clone, Copy, PartialEq)]
pub enum Auth {
    Off,
    Keys,
}

impl Display for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "with AUTH=off anybody may write",
            Self::Keys => "with AUTH=keys whoever writes needs a key",
        })
    }
}

/// What `--help` prints of them.
pub const HELP: &str = "\
DATABASE_URL          postgres://user:password@host:port/database, required;
                      host:port,host:port/database?target_session_attrs=read-write
                      is whichever of them takes writes
DATABASE_READ_URL     replicas to read from, in the same form          none
REPLICA_LAG_MS        how far behind a replica may be that is asked    5000
DATABASE_CA_FILE      certificate authority of the database, PEM; those of the system where not set
LISTEN_ADDR           address of the API                               127.0.0.1:8080
ADMIN_ADDR            address of /health and /metrics                  127.0.0.1:8081
AUTH                  who may write: keys, those who have one, or off,
                      anybody; needed beyond loopback                  off
WORKERS               threads that serve requests                      one for each core,
                                                                       8 at most
POOL_SIZE             database connections for writes and lists, shared
                      out among the workers, a quarter for lists       16, or 4 for each worker
POOL_WAIT_MS          how long a request waits at a time: for one of
                      them, to write with others, or behind them       2000
QUEUE_SIZE            requests that may wait on each worker: for listings,
                      for prices, to write with others, for keys, and
                      for a connection                                 5000
CONNECT_TIMEOUT_MS    how long connecting may take                     3000
STATEMENT_TIMEOUT_MS  how long a statement may take                    5000
SHUTDOWN_DELAY_MS     from not ready to no new connections             0
SHUTDOWN_TIMEOUT_MS   for the requests under way                       30000
CORS_ORIGINS          origins of browsers, separated by commas         *
RUST_LOG              what is logged, as env_logger reads it           info";

impl Settings {
    pub fn from_env() -> Result<Self, String> {
        let listen = setting("LISTEN_ADDR", "127.0.0.1:8080", "an address and a port")?;
        // With no more, an instance is content with the 100 connections that PostgreSQL has by default.
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let workers = at_least_one("WORKERS", cores.min(8))?;
        Ok(Self {
            database: database("DATABASE_URL")?,
            replicas: match env::var_os("DATABASE_READ_URL") {
                Some(url) if !url.is_empty() => database("DATABASE_READ_URL")?,
                _ => Vec::new(),
            },
            replica_lag: milliseconds("REPLICA_LAG_MS", 5_000)?,
            ca_file: env::var_os("DATABASE_CA_FILE")
                .filter(|file| !file.is_empty())
                .map(PathBuf::from),
            listen,
            admin: setting("ADMIN_ADDR", "127.0.0.1:8081", "an address and a port")?,
            auth: auth(listen)?,
            workers,
            // So that none has all of its connections taken by one locked listing and one long list.
            pool_size: at_least_one("POOL_SIZE", (4 * workers).clamp(16, 10_000))?,
            pool_wait: milliseconds("POOL_WAIT_MS", 2_000)?,
            queue_size: at_least_one("QUEUE_SIZE", 5_000)?,
            connect_timeout: milliseconds("CONNECT_TIMEOUT_MS", 3_000)?,
            statement_timeout: milliseconds("STATEMENT_TIMEOUT_MS", 5_000)?,
            shutdown_delay: Duration::from_millis(setting(
                "SHUTDOWN_DELAY_MS",
                "0",
                "milliseconds",
            )?),
            shutdown_timeout: milliseconds("SHUTDOWN_TIMEOUT_MS", 30_000)?,
            cors_origins: cors_origins()?,
        })
    }
}

/// The hosts of a URL, each with all the rest of it. The URL holds a password, so no message repeats its value.
fn database(name: &str) -> Result<Vec<Config>, String> {
    let form = "it has to be postgres://user:password@host:port/database";
    let url = env::var(name).map_err(|_| format!("{name} is not set: {form}"))?;
    let configs = each_host(&url)
        .iter()
        .map(|url| url.parse())
        .collect::<Result<Vec<Config>, _>>()
        .map_err(|_| format!("{name} cannot be read: {form}"))?;
    if configs.iter().any(|config| config.get_hosts().is_empty()) {
        return Err(format!("{name} names no host: {form}"));
    }
    if configs.iter().any(|config| config.get_dbname().is_none()) {
        return Err(format!("{name} names no database: {form}"));
    }
    Ok(configs)
}

/// `postgres://user@one,two/database` as a URL for each of its hosts.
fn each_host(url: &str) -> Vec<String> {
    let begin = url.find("://").map_or(0, |scheme| scheme + 3);
    let (scheme, rest) = url.split_at(begin);
    let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    let hosts = authority.rfind('@').map_or(0, |at| at + 1);
    let (login, hosts) = authority.split_at(hosts);
    let url = |host| format!("{scheme}{login}{host}{path}");
    hosts.split(',').map(url).collect()
}

fn setting<T: FromStr>(name: &str, default: &str, right: impl Display) -> Result<T, String> {
    let value = match env::var(name) {
        Ok(value) if !value.is_empty() => value,
        Err(env::VarError::NotUnicode(value)) => {
            return Err(format!(
                "{name}={} is wrong: it has to be {right}",
                value.display()
            ));
        }
        _ => default.to_owned(),
    };
    value
        .parse()
        .map_err(|_| format!("{name}={value} is wrong: it has to be {right}, such as {default}"))
}

fn at_least_one(name: &str, default: usize) -> Result<usize, String> {
    match setting(name, &default.to_string(), "a whole number from 1 to 10000")? {
        value @ 1..=10_000 => Ok(value),
        value => Err(format!(
            "{name}={value} is wrong: it has to be a whole number from 1 to 10000, such as {default}"
        )),
    }
}

fn milliseconds(name: &str, default: u64) -> Result<Duration, String> {
    match setting(name, &default.to_string(), "milliseconds")? {
        value @ 1..=3_600_000 => Ok(Duration::from_millis(value)),
        value => Err(format!(
            "{name}={value} is wrong: it has to be 1 to 3600000 milliseconds, such as {default}"
        )),
    }
}

/// Off unless it is said, but only where nobody else can reach the service.
fn auth(listen: SocketAddr) -> Result<Auth, String> {
    let choices = "keys, so that only those write who have a key, or off, so that anybody may";
    match setting::<String>("AUTH", "", choices)?.as_str() {
        "keys" => Ok(Auth::Keys),
        "off" => Ok(Auth::Off),
        "" if is_loopback(listen) => Ok(Auth::Off),
        "" => Err(format!(
            "AUTH is not set, although others may reach LISTEN_ADDR={listen}: it has to be {choices}"
        )),
        value => Err(format!("AUTH={value} is wrong: it has to be {choices}")),
    }
}

pub fn is_loopback(address: SocketAddr) -> bool {
    address.ip().to_canonical().is_loopback()
}

fn cors_origins() -> Result<Vec<String>, String> {
    let value: String = setting("CORS_ORIGINS", "*", "origins")?;
    if value == "*" {
        return Ok(Vec::new());
    }
    let origin = |origin: &str| {
        let host = origin
            .strip_prefix("https://")
            .or_else(|| origin.strip_prefix("http://"))?;
        let plain = !host.is_empty()
            && host
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || ".-:[]".contains(c));
        plain.then(|| origin.to_owned())
    };
    let origins: Option<Vec<_>> = value.split(',').map(|entry| origin(entry.trim())).collect();
    origins.ok_or_else(|| {
        format!("CORS_ORIGINS={value} is wrong: it has to be * or origins such as https://example.com, separated by commas")
    })
}
