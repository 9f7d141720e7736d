//! A worker's connections to one server: the pool, its queue, and the time limits.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use deadpool_postgres::{Connect, Manager, ManagerConfig, RecyclingMethod, Runtime};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_postgres::{Client, Config};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::connect::Connecting;
use super::error::{Error, describe};
use super::server::{Route, Server, available};
use crate::settings::Settings;

/// Connections run on the thread that made them and end with it, so every worker has a pool of its own.
#[derive(Clone)]
pub struct Pool {
    pub route: Route,
    pub tls: MakeRustlsConnect,
    pub connections: deadpool_postgres::Pool,
    /// Permits to wait for a connection.
    pub queue: Arc<Semaphore>,
    queue_size: usize,
    /// Permits to read. A quarter of the connections keeps the processors busy. With more, reads compete and some take many
    /// times as long as others, and slow reads leave no connection for writes. Behind a sharding proxy, reads may use all: those of
    /// a server that is down take a while to fail.
    pub reads: Arc<Semaphore>,
    pub wait_timeout: Duration,
    connect_timeout: Duration,
    /// A second more than `statement_timeout`, which the server enforces itself. This limit is for a server that went silent.
    pub answer_timeout: Duration,
}

impl Pool {
    /// Does not connect yet.
    pub fn new(
        settings: &Settings,
        tls: &MakeRustlsConnect,
        route: Route,
        size: usize,
    ) -> Result<Self> {
        let recycling = ManagerConfig {
            recycling_method: RecyclingMethod::Fast,
        };
        let manager = Manager::from_connect(Config::new(), Connector(route.clone()), recycling);
        let connections = deadpool_postgres::Pool::builder(manager)
            .max_size(size)
            .wait_timeout(Some(settings.pool_wait))
            .create_timeout(Some(settings.connect_timeout))
            .recycle_timeout(Some(settings.connect_timeout))
            .runtime(Runtime::Tokio1)
            .build()?;
        Ok(Self {
            route,
            tls: tls.clone(),
            connections,
            queue: Arc::new(Semaphore::new(settings.queue_size)),
            queue_size: settings.queue_size,
            reads: Arc::new(Semaphore::new(if settings.sharding_proxy {
                size
            } else {
                size.div_ceil(4)
            })),
            wait_timeout: settings.pool_wait,
            connect_timeout: settings.connect_timeout,
            answer_timeout: settings.statement_timeout + Duration::from_secs(1),
        })
    }

    pub fn status(&self) -> PoolStatus {
        let status = self.connections.status();
        PoolStatus {
            size: status.size,
            available: status.available,
            waiting: self.queue_size - self.queue.available_permits(),
        }
    }

    /// The current server, whatever its state.
    pub fn server(&self) -> Arc<Server> {
        self.route.borrow().clone()
    }

    /// Waits until the server is up. Returns it with whether it accepts writes.
    pub async fn available(&self) -> Result<(Arc<Server>, bool), Error> {
        self.within_connect_timeout(available(&self.route)).await
    }

    /// Waits until the server is up. Fails if it is read-only.
    pub async fn writable(&self) -> Result<Arc<Server>, Error> {
        match self.available().await? {
            (server, true) => Ok(server),
            (_, false) => Err(Error::unavailable("the database is read-only")),
        }
    }

    /// A connection outside the pool.
    pub async fn connect(&self, server: Arc<Server>) -> Result<Client, Error> {
        let connecting = server.clone().connect(self.route.clone());
        let connected = self.within_connect_timeout(async {
            let connected = server.unless_left(&self.route, connecting).await?;
            connected.map_err(|error| {
                server.suspect_if_lost(&error);
                Error::unavailable(describe(&error))
            })
        });
        let connected = connected.await;
        Ok(connected.inspect_err(|_| server.record_refusal())?.0)
    }

    async fn within_connect_timeout<T>(
        &self,
        connected: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let late = |_| Error::unavailable("no connection to the database within the limit");
        timeout(self.connect_timeout, connected)
            .await
            .map_err(late)?
    }

    pub async fn within_answer_timeout<T>(
        &self,
        answer: impl Future<Output = T>,
    ) -> Result<T, Error> {
        let late = |_| Error::unavailable("no answer from the database within the limit");
        timeout(self.answer_timeout, answer).await.map_err(late)
    }
}

/// What the metrics show of a pool.
#[derive(Clone, Copy, Default)]
pub struct PoolStatus {
    pub size: usize,
    pub available: usize,
    pub waiting: usize,
}

/// Lets the pool connect to the current server of a route.
struct Connector(Route);

impl Connect for Connector {
    fn connect(&self, _: &Config) -> Connecting {
        let server = self.0.borrow().clone();
        server.connect(self.0.clone())
    }
}
