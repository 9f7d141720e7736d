//! Runs one statement in a transaction of its own, on a pooled connection.
//!
//! A statement is retried once if it certainly was not run. A read or a repeatable write is also retried if its connection was
//! lost.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use deadpool_postgres::{ClientWrapper, Object, PoolError, TimeoutType};
use tokio::time::timeout;
use tokio_postgres::Row;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::error::{Error, connection_is_lost, describe, is_refusal, statement_is_stale};
use super::pool::Pool;
use super::row_queue::RowLock;
use super::server::Server;

pub type Parameters<'a> = &'a [&'a (dyn ToSql + Sync)];

#[derive(Clone, Copy, PartialEq)]
pub enum Access {
    Read,
    Write,
    /// A write that changes nothing if it has been done before.
    RepeatableWrite,
}

/// An attempt that failed.
struct Failure {
    error: Error,
    retry: bool,
    /// When the connection was lost. Older connections are likely lost as well.
    lost_at: Option<Instant>,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self {
            error,
            retry: false,
            lost_at: None,
        }
    }
}

impl Pool {
    /// Gives the connection back before it returns.
    pub async fn read(&self, sql: &str, parameters: Parameters<'_>) -> Result<Vec<Row>, Error> {
        self.run(sql, parameters, Access::Read, None).await
    }

    /// The same for a write. It holds the lock until it has ended, also if this future is dropped before.
    pub async fn write(
        &self,
        sql: &str,
        parameters: Parameters<'_>,
        lock: Option<Arc<RowLock>>,
    ) -> Result<Vec<Row>, Error> {
        self.run(sql, parameters, Access::Write, lock).await
    }

    /// The same for a write that changes nothing if it has been done before.
    pub async fn write_repeatably(
        &self,
        sql: &str,
        parameters: Parameters<'_>,
        lock: Option<Arc<RowLock>>,
    ) -> Result<Vec<Row>, Error> {
        self.run(sql, parameters, Access::RepeatableWrite, lock)
            .await
    }

    async fn run(
        &self,
        sql: &str,
        parameters: Parameters<'_>,
        access: Access,
        lock: Option<Arc<RowLock>>,
    ) -> Result<Vec<Row>, Error> {
        let attempt = async |connected_after| {
            let in_flight = InFlight {
                client: None,
                access,
                lock: lock.clone(),
                tls: &self.tls,
            };
            self.attempt(sql, parameters, in_flight, connected_after)
                .await
        };
        let result = match attempt(None).await {
            Err(failure) if failure.retry => attempt(failure.lost_at).await,
            result => result,
        };
        result.map_err(|failure| failure.error)
    }

    async fn attempt(
        &self,
        sql: &str,
        parameters: Parameters<'_>,
        mut in_flight: InFlight<'_>,
        connected_after: Option<Instant>,
    ) -> Result<Vec<Row>, Failure> {
        let access = in_flight.access;
        let queued = self.queue.try_acquire().map_err(|_| Error::queue_full())?;
        let (server, _read) = match access {
            Access::Write | Access::RepeatableWrite => (self.writable().await?, None),
            Access::Read => {
                let (server, _) = self.available().await?;
                let late = |_| Error::unavailable("too many reads are in flight");
                let read = timeout(self.wait_timeout, self.reads.acquire()).await;
                (server, Some(read.map_err(late)?))
            }
        };
        let client = self.check_out(&server, connected_after).await?;
        drop(queued);
        let client = in_flight.client.insert(client);
        let mut sent = false;
        let answer = query(client, sql, parameters, server.is_proxy, &mut sent);
        let error = match self.within_answer_timeout(answer).await? {
            Ok(rows) => {
                server.record_answer();
                in_flight.finish();
                return Ok(rows);
            }
            Err(error) => error,
        };
        let lost = connection_is_lost(&error);
        if lost {
            server.suspect();
        } else {
            in_flight.finish();
        }
        let stale = statement_is_stale(&error);
        if stale {
            self.connections.manager().statement_caches.clear();
        }
        let not_run = lost && (!sent || is_refusal(&error));
        Err(Failure {
            retry: stale || not_run || lost && access != Access::Write,
            lost_at: lost.then(Instant::now),
            error: error.into(),
        })
    }

    /// Takes a connection from the pool, connected after a certain time.
    async fn check_out(
        &self,
        server: &Server,
        connected_after: Option<Instant>,
    ) -> Result<Object, Failure> {
        let retry = |error| Failure {
            error,
            retry: true,
            lost_at: None,
        };
        loop {
            let client = server.unless_left(&self.route, self.connections.get());
            match client.await.map_err(retry)? {
                Ok(client) => {
                    let connected = Object::metrics(&client).created;
                    if connected_after.is_none_or(|limit| connected >= limit) {
                        return Ok(client);
                    }
                    drop(Object::take(client));
                }
                Err(PoolError::Backend(error)) if connection_is_lost(&error) => {
                    server.suspect();
                    return Err(retry(error.into()));
                }
                Err(error) => {
                    if matches!(
                        error,
                        PoolError::Backend(_) | PoolError::Timeout(TimeoutType::Create)
                    ) {
                        server.record_refusal();
                    }
                    return Err(Error::from(error).into());
                }
            }
        }
    }
}

/// `sent` becomes true before the statement is sent. Preparing it does not count, and may wait for locks.
///
/// A sharding proxy chooses the server by the values, so it gets them together with the statement. It would ask every server to
/// prepare a statement without values.
async fn query(
    client: &Object,
    sql: &str,
    parameters: Parameters<'_>,
    is_proxy: bool,
    sent: &mut bool,
) -> Result<Vec<Row>, tokio_postgres::Error> {
    if is_proxy {
        *sent = true;
        let typed = parameters.iter().map(|value| (*value, type_of(*value)));
        return client.query_typed(sql, &typed.collect::<Vec<_>>()).await;
    }
    let statement = client.prepare_cached(sql).await?;
    *sent = true;
    client.query(&statement, parameters).await
}

/// The type that a value has by its Rust type.
fn type_of(value: &(dyn ToSql + Sync)) -> Type {
    let types = [
        Type::INT4,
        Type::INT8,
        Type::TEXT,
        Type::NUMERIC,
        Type::TIMESTAMPTZ,
        Type::FLOAT8,
        Type::BOOL,
        Type::BYTEA,
        Type::TEXT_ARRAY,
    ];
    let mut unused = BytesMut::new();
    let mut types = types.into_iter();
    let accepted = types.find(|kind| value.to_sql_checked(kind, &mut unused).is_ok());
    accepted.unwrap_or(Type::UNKNOWN)
}

/// A pooled connection with a statement in flight.
///
/// The client may disconnect or the answer be late before the statement ended. A read is then cancelled and its connection
/// closed: the driver would otherwise finish the statement while the next request waits for it.
///
/// A write runs to its end, and its connection keeps its place in the pool until then. If PostgreSQL cancels a commit that
/// waits for its synchronous standby, the commit becomes visible, and a promotion may still undo it.
struct InFlight<'a> {
    client: Option<Object>,
    access: Access,
    lock: Option<Arc<RowLock>>,
    tls: &'a MakeRustlsConnect,
}

impl InFlight<'_> {
    /// Gives the connection back to the pool.
    fn finish(mut self) {
        self.client = None;
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        let Some(client) = self.client.take() else {
            return;
        };
        // Without a runtime the process is ending.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        if client.is_closed() {
            return;
        }
        match self.access {
            Access::Read => runtime.spawn(cancel(Object::take(client), self.tls.clone())),
            Access::Write | Access::RepeatableWrite => {
                runtime.spawn(finish(client, self.lock.take()))
            }
        };
    }
}

async fn cancel(client: ClientWrapper, tls: MakeRustlsConnect) {
    let cancelled = async {
        client.cancel_token().cancel_query(tls).await?;
        // Keeps the connection until the statement has ended: a pooler forgets the statement of a closed one.
        client.batch_execute("").await
    };
    if let Ok(Err(error)) = timeout(Duration::from_secs(5), cancelled).await {
        log::debug!("a statement was not cancelled: {}", describe(&error));
    }
}

/// Waits for the end of a write. It has no time limit: the connection closes if its server goes down.
async fn finish(client: Object, _lock: Option<Arc<RowLock>>) {
    if let Err(error) = client.batch_execute("").await {
        log::debug!("a write was lost: {}", describe(&error));
    }
}
