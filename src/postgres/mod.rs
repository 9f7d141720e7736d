//! Access to PostgreSQL. This module knows neither HTTP nor any table: `api/` passes it the SQL.
//!
//! [`Cluster`] holds what the process has: the servers, the pools, the schema check. [`Database`] is what a worker uses.
//!
//! - [`Database::read`] and [`Lookup::get`] read from a replica or the primary.
//! - [`Database::read_on_primary`] reads from the primary.
//! - [`Database::write`] and [`Database::write_repeatably`] write on the primary.
//! - [`Cluster::report`] tells operators how the servers and pools are.

mod batch;
mod connect;
mod error;
mod lookup;
mod monitor;
mod pool;
mod preflight;
mod probe;
mod replicas;
mod row_queue;
mod schema;
mod server;
mod statement;

use std::fmt::{self, Display};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;
use futures_util::future::join_all;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

pub use self::error::{Error, ErrorKind};
pub use self::lookup::{Key, LookupSql, Rows};
pub use self::preflight::{ConnectionLimit, Session};
pub use self::schema::newest as schema_version;
pub use self::server::State;
pub use self::statement::Parameters;

use self::lookup::{Limits, ServerLookup};
use self::monitor::Monitor;
use self::pool::{Pool, PoolStatus};
use self::replicas::Sources;
use self::row_queue::RowQueue;
use self::server::Server;
use self::statement::Access;
use crate::settings::Settings;

/// A value of a statement, for statements that are put together.
pub type Value = Box<dyn ToSql + Sync>;

/// The primary and its replicas, and the pools of every worker.
pub struct Cluster {
    monitor: Arc<Monitor>,
    workers: Vec<Pools>,
    next_worker: AtomicUsize,
    /// One connection for the schema check and the poll of the change feed.
    check: Pool,
    limits: Limits,
    is_proxy: bool,
}

#[derive(Clone)]
struct Pools {
    primary: Pool,
    replicas: Vec<Pool>,
}

/// What operators see.
pub struct Report {
    pub servers: Vec<ServerReport>,
    /// The pools of all workers, by role.
    pub pools: [(&'static str, PoolStatus); 2],
}

pub struct ServerReport {
    pub role: &'static str,
    /// `host:port`.
    pub name: String,
    pub state: State,
}

impl ServerReport {
    fn new(role: &'static str, server: &Server) -> Self {
        Self {
            role,
            name: server.name.clone(),
            state: server.state(),
        }
    }
}

impl Display for ServerReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.role, self.name, self.state)
    }
}

impl Cluster {
    /// Probes every server once. Fails on bad TLS settings, but not if a server is down.
    pub async fn start(settings: &Settings) -> Result<Self> {
        let tls = connect::tls(settings)?;
        let monitor = Monitor::start(settings, &tls).await?;
        let size = settings.pool_size.div_ceil(settings.workers);
        let pool = |route| Pool::new(settings, &tls, route, size);
        let pools = |_| {
            let primary = pool(monitor.primary())?;
            let replicas = monitor.replicas().map(pool).collect::<Result<_>>()?;
            Ok(Pools { primary, replicas })
        };
        Ok(Self {
            workers: (0..settings.workers).map(pools).collect::<Result<_>>()?,
            next_worker: AtomicUsize::new(0),
            check: Pool::new(settings, &tls, monitor.primary(), 1)?,
            limits: Limits {
                batch_size: settings.batch_size,
                queue_size: settings.queue_size,
            },
            is_proxy: settings.sharding_proxy,
            monitor,
        })
    }

    /// The databases of the next worker. Must be called on its thread.
    pub fn for_worker(&self) -> Database {
        let worker = self.next_worker.fetch_add(1, Ordering::Relaxed);
        let Pools { primary, replicas } = self.workers[worker % self.workers.len()].clone();
        let replicas = replicas.into_iter();
        let replicas = replicas.map(|pool| (pool.route.clone(), pool)).collect();
        Database {
            rows: RowQueue::new(self.limits.queue_size, primary.wait_timeout),
            pools: Sources::new(&self.monitor, primary, replicas),
            limits: self.limits,
        }
    }

    /// Fails with a sentence that names the remedy. Returns the first migration of the database that this release does not
    /// know, if there is one. Checks nothing behind a sharding proxy, which would ask one of its servers, up or down.
    pub async fn check_schema(&self) -> Result<Option<String>, String> {
        if self.is_proxy {
            return Ok(None);
        }
        schema::check(&self.check).await
    }

    /// Runs a statement on the primary, outside the pools of the workers.
    pub async fn read(&self, sql: &str, parameters: Parameters<'_>) -> Result<Vec<Row>, Error> {
        self.check.read(sql, parameters).await
    }

    /// Fails if PostgreSQL would refuse a statement. Does not run it.
    pub async fn explain(&self, sql: &str) -> Result<(), Error> {
        self.check.explain(sql).await
    }

    /// What each server says about a session of the service. `None`: the server is down.
    pub async fn sessions(&self) -> Vec<(ServerReport, Option<Result<Session, Error>>)> {
        let ask = |(role, server): (_, Arc<Server>)| async move {
            (
                ServerReport::new(role, &server),
                preflight::ask(&server).await,
            )
        };
        join_all(self.monitor.servers().into_iter().map(ask)).await
    }

    /// Whether the primary is up and accepts writes and new sessions.
    pub fn accepts_writes(&self) -> bool {
        let state = self.check.server().state();
        state.writable() == Some(true) && state.refusal().is_none()
    }

    pub fn report(&self) -> Report {
        let servers = self.monitor.servers().into_iter();
        let primaries = self.workers.iter().map(|pools| &pools.primary);
        let replicas = self.workers.iter().flat_map(|pools| &pools.replicas);
        Report {
            servers: servers
                .map(|(role, server)| ServerReport::new(role, &server))
                .collect(),
            pools: [("primary", sum(primaries)), ("replica", sum(replicas))],
        }
    }
}

fn sum<'a>(pools: impl Iterator<Item = &'a Pool>) -> PoolStatus {
    pools.fold(PoolStatus::default(), |sum, pool| {
        let status = pool.status();
        PoolStatus {
            size: sum.size + status.size,
            available: sum.available + status.available,
            waiting: sum.waiting + status.waiting,
        }
    })
}

/// The databases of one worker.
pub struct Database {
    pools: Sources<Pool>,
    rows: Arc<RowQueue>,
    limits: Limits,
}

impl Database {
    /// Reads from a replica, or from the primary if no replica has a fresh answer.
    pub async fn read(
        &self,
        sql: &str,
        parameters: Parameters<'_>,
        is_fresh: impl Fn(&Vec<Row>) -> bool,
    ) -> Result<Vec<Row>, Error> {
        let read = async |pool: &Pool| pool.read(sql, parameters).await;
        self.pools.read(read, is_fresh).await
    }

    pub async fn read_on_primary(
        &self,
        sql: &str,
        parameters: Parameters<'_>,
    ) -> Result<Vec<Row>, Error> {
        self.pools.primary.read(sql, parameters).await
    }

    /// Writes in a transaction of its own. Writers that name the same row wait for each other before they take a connection.
    pub async fn write(
        &self,
        row: Option<i32>,
        sql: &str,
        parameters: Parameters<'_>,
    ) -> Result<Vec<Row>, Error> {
        let lock = match row {
            Some(id) => Some(Arc::new(self.rows.lock(id).await?)),
            None => None,
        };
        self.pools.primary.write(sql, parameters, lock).await
    }

    /// The same for a statement that changes nothing if it has been done before. It is sent again if its answer is lost.
    pub async fn write_repeatably(
        &self,
        row: i32,
        sql: &str,
        parameters: Parameters<'_>,
    ) -> Result<Vec<Row>, Error> {
        let lock = Some(Arc::new(self.rows.lock(row).await?));
        let primary = &self.pools.primary;
        primary.write_repeatably(sql, parameters, lock).await
    }

    /// A batched read from replicas and primary.
    pub fn lookup<K: Key>(&self, sql: LookupSql) -> Lookup<K> {
        let new = |pool: &Pool| ServerLookup::new(pool, sql, Access::Read, self.limits);
        Lookup(self.pools.map(new))
    }

    /// The same from the primary alone, while it accepts writes.
    pub fn lookup_on_primary<K: Key>(&self, sql: LookupSql) -> Lookup<K> {
        let new = |pool: &Pool| ServerLookup::new(pool, sql, Access::Write, self.limits);
        Lookup(self.pools.map_primary(new))
    }
}

/// Reads by key, in batches.
pub struct Lookup<K>(Sources<Rc<ServerLookup<K>>>);

impl<K: Key> Lookup<K> {
    /// The rows of a key, from a replica, or from the primary if no replica has a fresh answer.
    pub async fn get(&self, key: K, is_fresh: impl Fn(&Rows) -> bool) -> Result<Rows, Error> {
        let read = async |lookup: &Rc<ServerLookup<K>>| lookup.get(key.clone()).await;
        self.0.read(read, is_fresh).await
    }

    pub async fn get_on_primary(&self, key: K) -> Result<Rows, Error> {
        self.0.primary.get(key).await
    }
}
