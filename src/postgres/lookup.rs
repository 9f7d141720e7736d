//! Reads by key on one server, in batches.
//!
//! Each worker has one connection for each lookup, so that no lookup waits for another. At 32 clients on two cores, batches read
//! 50 % more listings and 25 % more prices per second than one query per read. A second connection gives less, because batches
//! get smaller. Batches over 64 gain nothing.

use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::Hash;
use std::rc::Rc;
use std::sync::Arc;

use actix_web::rt;
use tokio_postgres::types::{FromSql, ToSql};
use tokio_postgres::{Client, Row, Statement};

use super::batch::{Batcher, Reply};
use super::error::{Error, ErrorKind, connection_is_lost, statement_is_stale};
use super::pool::Pool;
use super::server::Server;
use super::statement::{Access, Parameters};

const MAX_BATCH: usize = 64;

/// The rows of one key, shared by all requests of the batch that asked for it.
pub type Rows = Rc<Vec<Row>>;

pub trait Key: Clone + Hash + Ord + ToSql + Sync + for<'a> FromSql<'a> + 'static {}

impl Key for i32 {}

/// A statement that takes an array of keys and returns rows whose first column is their key.
pub struct ServerLookup<K> {
    pool: Pool,
    sql: &'static str,
    /// With `Write`, fails on a server that is read-only.
    access: Access,
    session: RefCell<Option<Rc<Session>>>,
    batcher: Batcher<K, Rows>,
}

struct Session {
    server: Arc<Server>,
    client: Client,
    statement: Statement,
}

impl<K: Key> ServerLookup<K> {
    pub fn new(pool: &Pool, sql: &'static str, access: Access, queue_size: usize) -> Rc<Self> {
        let lookup = Rc::new(Self {
            pool: pool.clone(),
            sql,
            access,
            session: RefCell::default(),
            batcher: Batcher::new(MAX_BATCH, queue_size, pool.answer_timeout),
        });
        let serving = lookup.clone();
        rt::spawn(async move {
            let run = async |batch| serving.run(batch).await;
            serving.batcher.serve(run).await;
        });
        lookup
    }

    pub async fn get(&self, key: K) -> Result<Rows, Error> {
        let alone = async |key| self.query(&[key]).await.map(Rc::new);
        self.batcher.submit(key, alone).await
    }

    async fn run(&self, batch: Vec<(K, Reply<Rows>)>) {
        let mut keys: Vec<_> = batch.iter().map(|(key, _)| key.clone()).collect();
        keys.sort_unstable();
        keys.dedup();
        match self.query(&keys).await.and_then(group_by_key::<K>) {
            Ok(found) => {
                for (key, reply) in batch {
                    let _ = reply.send(Ok(found.get(&key).cloned().unwrap_or_default()));
                }
            }
            // One of the rows cannot be read. The requests for the other keys must not fail with it.
            Err(error)
                if error.kind == ErrorKind::Internal
                    && keys.len() > 1
                    && self.session.borrow().is_some() =>
            {
                for (key, reply) in batch {
                    let _ = reply.send(self.query(&[key]).await.map(Rc::new));
                }
            }
            Err(error) => {
                for (_, reply) in batch {
                    let _ = reply.send(Err(error.clone()));
                }
            }
        }
    }

    /// Retries once on a new connection if the connection was lost.
    async fn query(&self, keys: &[K]) -> Result<Vec<Row>, Error> {
        let parameters: Parameters = &[&keys];
        let mut retried = false;
        loop {
            let session = match self.session().await {
                Ok(session) => session,
                Err(error) if error.kind == ErrorKind::Unavailable && !retried => {
                    retried = true;
                    continue;
                }
                Err(error) => {
                    self.batcher.fail_waiting(&error);
                    return Err(error);
                }
            };
            let answer = session.client.query(&session.statement, parameters);
            match self.pool.within_answer_timeout(answer).await {
                Ok(Ok(rows)) => {
                    session.server.record_answer();
                    return Ok(rows);
                }
                Ok(Err(error)) if connection_is_lost(&error) || statement_is_stale(&error) => {
                    self.session.take();
                    session.server.suspect_if_lost(&error);
                    if retried {
                        return Err(error.into());
                    }
                    retried = true;
                }
                Ok(Err(error)) => return Err(error.into()),
                Err(late) => {
                    self.session.take();
                    return Err(late);
                }
            }
        }
    }

    /// The session, opened if there is none that works.
    async fn session(&self) -> Result<Rc<Session>, Error> {
        if self.access == Access::Write {
            self.pool.writable().await?;
        }
        let session = self.session.borrow().clone();
        if let Some(session) = session.filter(|session| !session.client.is_closed()) {
            return Ok(session);
        }
        let (server, _) = self.pool.available().await?;
        let client = self.pool.connect(server.clone()).await?;
        // Preparing waits for locks, so it has the time limit of a statement.
        let prepared = self.pool.within_answer_timeout(client.prepare(self.sql));
        let prepared = prepared.await?;
        let statement = prepared.inspect_err(|error| server.suspect_if_lost(error))?;
        let session = Rc::new(Session {
            server,
            client,
            statement,
        });
        self.session.replace(Some(session.clone()));
        Ok(session)
    }
}

fn group_by_key<K: Key>(rows: Vec<Row>) -> Result<HashMap<K, Rows>, Error> {
    let mut found: HashMap<K, Vec<Row>> = HashMap::new();
    for row in rows {
        found.entry(row.try_get(0)?).or_default().push(row);
    }
    Ok(found
        .into_iter()
        .map(|(key, rows)| (key, Rc::new(rows)))
        .collect())
}
