//! Reads by id, which requests share.
//!
//! Those that go together ([`crate::gathering`]) are one question about many ids. Each worker has a connection for listings,
//! one for prices, and with `AUTH=keys` one for keys ([`crate::keys`]), so that none waits for another. Measured, with two
//! cores for the service, PostgreSQL and the load: a second or fourth connection of a kind serves a tenth or a quarter less,
//! because batches get smaller, and so do batches of 8 or 16; from 64 on nothing is gained. Against one question for each read,
//! batches serve a half more listings and a quarter more prices at 32 clients.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::hash::Hash;
use std::rc::Rc;
use std::sync::Arc;

use actix_web::rt;
use tokio_postgres::types::{FromSql, ToSql};
use tokio_postgres::{Client, Row, Statement};

use crate::database::{Database, Parameters};
use crate::error::{ApiError, connection_is_lost, statement_is_stale};
use crate::gathering::{Gathering, Waiter, refuse};
use crate::servers::{Server, Servers};
use crate::{listings, prices};

/// Requests that travel together at most.
const BATCH: usize = 64;

/// What a worker reads from.
pub struct Reader {
    servers: Arc<Servers>,
    primary: Rc<Source>,
    replicas: Vec<Rc<Source>>,
    /// The replica that is asked next.
    turn: Cell<usize>,
}

/// One server to read from.
pub struct Source {
    pub database: Database,
    listings: Rc<Lane<i32>>,
    prices: Rc<Lane<i32>>,
}

impl Reader {
    pub fn new(
        servers: &Arc<Servers>,
        primary: &Database,
        replicas: &[Database],
        queue: usize,
    ) -> Self {
        let source = |database: &Database| {
            Rc::new(Source {
                database: database.clone(),
                listings: Lane::new(database, listings::SELECT_BATCH, queue, false),
                prices: Lane::new(database, prices::SELECT_BATCH, queue, false),
            })
        };
        Self {
            servers: servers.clone(),
            primary: source(primary),
            replicas: replicas.iter().map(source).collect(),
            turn: Cell::default(),
        }
    }

    /// Asks one of the replicas, in turn, or the next where that one fails. The primary is asked where there is none, and
    /// where the answer does not stand, because a replica may not have seen yet what the client has.
    pub async fn ask<T>(
        &self,
        question: impl AsyncFn(Rc<Source>) -> Result<T, ApiError>,
        stands: impl Fn(&T) -> bool,
    ) -> Result<T, ApiError> {
        let turn = self.turn.get();
        self.turn.set(turn.wrapping_add(1));
        let count = self.replicas.len();
        let in_turn = self.replicas.iter().cycle().skip(turn % count.max(1));
        for replica in in_turn.take(count) {
            if !self.servers.is_current(&replica.database.server()) {
                continue;
            }
            match question(replica.clone()).await {
                Ok(answer) if stands(&answer) => return Ok(answer),
                Ok(_) => break,
                Err(error) if error.is_of_this_server() => (),
                Err(error) => return Err(error),
            }
        }
        question(self.primary.clone()).await
    }

    pub fn primary(&self) -> &Rc<Source> {
        &self.primary
    }
}

impl Source {
    /// The row of a listing. None if there is no such listing.
    pub async fn listing(&self, id: i32) -> Result<Rows, ApiError> {
        self.listings.get(id).await
    }

    /// The history of a listing, or the beginning of a long one. None also if there is no such listing.
    pub async fn prices(&self, id: i32) -> Result<Rows, ApiError> {
        self.prices.get(id).await
    }
}

/// The rows of one id, shared by all who asked for it at once.
pub type Rows = Rc<Vec<Row>>;

/// What things are asked for by.
pub trait Id: Clone + Hash + Ord + ToSql + Sync + for<'a> FromSql<'a> + 'static {}

impl Id for i32 {}

/// One kind of read: a statement that takes an array of ids and returns rows that begin with theirs.
pub struct Lane<I> {
    database: Database,
    sql: &'static str,
    writable: bool,
    session: RefCell<Option<Rc<Session>>>,
    gathering: Gathering<I, Rows>,
}

struct Session {
    server: Arc<Server>,
    client: Client,
    statement: Statement,
}

impl<I: Id> Lane<I> {
    /// `writable`: asks only a server that takes writes.
    pub fn new(database: &Database, sql: &'static str, queue: usize, writable: bool) -> Rc<Self> {
        let lane = Rc::new(Self {
            database: database.clone(),
            sql,
            writable,
            session: RefCell::default(),
            gathering: Gathering::new(queue, database.answer_timeout, 1, BATCH),
        });
        let serving = lane.clone();
        rt::spawn(async move {
            let answer = async |batch| serving.answer(batch).await;
            serving.gathering.serve(answer).await;
        });
        lane
    }

    pub async fn get(&self, id: I) -> Result<Rows, ApiError> {
        let alone = async |id, _place| self.ask(&[id]).await.map(Rc::new);
        self.gathering.join(id, alone).await
    }

    async fn answer(&self, batch: Vec<Waiter<I, Rows>>) {
        let mut ids: Vec<_> = batch.iter().map(|(id, _)| id.clone()).collect();
        ids.sort_unstable();
        ids.dedup();
        match self.ask(&ids).await.and_then(by_id::<I>) {
            Ok(found) => {
                for (id, waiter) in batch {
                    // Whoever has gone needs no answer, here and below.
                    let _ = waiter.send(Ok(found.get(&id).cloned().unwrap_or_default()));
                }
            }
            // On a connection that works, something is wrong with one of the rows. The others shall not suffer from it.
            Err(error)
                if error.is_internal() && ids.len() > 1 && self.session.borrow().is_some() =>
            {
                for (id, waiter) in batch {
                    let _ = waiter.send(self.ask(&[id]).await.map(Rc::new));
                }
            }
            Err(error) => refuse(batch, &error),
        }
    }

    /// A read that failed for want of a connection is tried once more, on a new one.
    async fn ask(&self, ids: &[I]) -> Result<Vec<Row>, ApiError> {
        let parameters: Parameters = &[&ids];
        let mut retried = false;
        loop {
            let session = match self.session().await {
                Ok(session) => session,
                Err(error) if error.is_unavailable() && !retried => {
                    retried = true;
                    continue;
                }
                Err(error) => {
                    self.gathering.refuse(&error);
                    return Err(error);
                }
            };
            let answer = session.client.query(&session.statement, parameters);
            match self.database.within_limit(answer).await {
                Ok(Ok(rows)) => {
                    session.server.answered();
                    return Ok(rows);
                }
                Ok(Err(error)) if connection_is_lost(&error) || statement_is_stale(&error) => {
                    self.session.take();
                    session.server.doubt_if_lost(&error);
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

    /// The connection of this lane, made where there is none that works.
    async fn session(&self) -> Result<Rc<Session>, ApiError> {
        if self.writable {
            self.database.writable().await?;
        }
        let session = self.session.borrow().clone();
        if let Some(session) = session.filter(|session| !session.client.is_closed()) {
            return Ok(session);
        }
        let (server, _) = self.database.available().await?;
        let client = self.database.connect(server.clone()).await?;
        // This waits for locks.
        let prepared = self.database.within_limit(client.prepare(self.sql));
        let prepared = prepared.await?;
        let statement = prepared.inspect_err(|error| server.doubt_if_lost(error))?;
        let session = Rc::new(Session {
            server,
            client,
            statement,
        });
        self.session.replace(Some(session.clone()));
        Ok(session)
    }
}

fn by_id<I: Id>(rows: Vec<Row>) -> Result<HashMap<I, Rows>, ApiError> {
    let mut found: HashMap<I, Vec<Row>> = HashMap::new();
    for row in rows {
        found.entry(row.try_get(0)?).or_default().push(row);
    }
    Ok(found
        .into_iter()
        .map(|(id, rows)| (id, Rc::new(rows)))
        .collect())
}
