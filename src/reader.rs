//! Reads by id, which requests share.
//!
//! An idle reader asks at once. What arrives while a question is under way waits for its end and then travels together, as one
//! question about many ids: the busier the service, the less PostgreSQL has to do for each. Nobody waits for company.
//!
//! Each worker has a connection for listings, one for prices, and with `AUTH=keys` one for keys ([`crate::keys`]), so that none
//! waits for another. Measured, with two cores for the service, PostgreSQL and the load: a second or fourth connection of a
//! kind serves a tenth or a quarter less, because batches get smaller, and so do batches of 8 or 16; from 64 on nothing is
//! gained. Against one question for each read, batches serve a half more listings and a quarter more prices at 32 clients.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::hash::Hash;
use std::rc::Rc;
use std::sync::Arc;

use actix_web::rt;
use tokio::sync::{Notify, oneshot};
use tokio_postgres::types::{FromSql, ToSql};
use tokio_postgres::{Client, Row, Statement};

use crate::database::{Database, Parameters};
use crate::error::{ApiError, connection_is_lost, statement_is_stale};
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

    pub fn primary(&self) -> &Source {
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
type Waiter<I> = (I, oneshot::Sender<Result<Rows, ApiError>>);

/// What things are asked for by.
pub trait Id: Clone + Hash + Ord + ToSql + Sync + for<'a> FromSql<'a> + 'static {}

impl Id for i32 {}

/// One kind of read: a statement that takes an array of ids and returns rows that begin with theirs.
pub struct Lane<I> {
    database: Database,
    sql: &'static str,
    /// Requests that wait at most.
    queue: usize,
    writable: bool,
    session: RefCell<Option<Rc<Session>>>,
    /// Whether a question is under way. Its end begins the next, or leaves the lane idle.
    busy: Cell<bool>,
    waiting: RefCell<Vec<Waiter<I>>>,
    turn: Notify,
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
            queue,
            writable,
            session: RefCell::default(),
            busy: Cell::new(false),
            waiting: RefCell::default(),
            turn: Notify::new(),
        });
        rt::spawn(lane.clone().answer_those_who_wait());
        lane
    }

    pub async fn get(&self, id: I) -> Result<Rows, ApiError> {
        if !self.busy.replace(true) {
            let _turn = Turn(self);
            return self.ask(&[id]).await.map(Rc::new);
        }
        let (waiter, answer) = oneshot::channel();
        self.join_those_who_wait(id, waiter)?;
        let answer = self.database.within_limit(answer).await?;
        answer.map_err(ApiError::internal)?
    }

    fn join_those_who_wait(
        &self,
        id: I,
        waiter: oneshot::Sender<Result<Rows, ApiError>>,
    ) -> Result<(), ApiError> {
        let mut waiting = self.waiting.borrow_mut();
        if waiting.len() >= self.queue {
            waiting.retain(|(_, waiter)| !waiter.is_closed());
        }
        if waiting.len() >= self.queue {
            return Err(ApiError::crowded(()));
        }
        waiting.push((id, waiter));
        Ok(())
    }

    /// Gives those who wait their turn, together, as soon as the lane is free and while there are any.
    async fn answer_those_who_wait(self: Rc<Self>) {
        loop {
            self.turn.notified().await;
            loop {
                let batch = self.next_batch();
                if batch.is_empty() {
                    break;
                }
                self.answer(batch).await;
            }
            self.busy.set(false);
        }
    }

    fn next_batch(&self) -> Vec<Waiter<I>> {
        let mut waiting = self.waiting.borrow_mut();
        waiting.retain(|(_, waiter)| !waiter.is_closed());
        let size = waiting.len().min(BATCH);
        waiting.drain(..size).collect()
    }

    async fn answer(&self, batch: Vec<Waiter<I>>) {
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
            Err(error) => {
                for (_, waiter) in batch {
                    let _ = waiter.send(Err(error.clone()));
                }
            }
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
                    self.database.server().doubt();
                    retried = true;
                    continue;
                }
                Err(error) => {
                    // They would all find out the same, one limit after the other.
                    for (_, waiter) in self.waiting.take() {
                        let _ = waiter.send(Err(error.clone()));
                    }
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
                    if !statement_is_stale(&error) {
                        session.server.doubt();
                    }
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
        let connecting = async {
            let (server, _) = self.database.available().await?;
            let client = self.database.connect(server.clone()).await?;
            let statement = client.prepare(self.sql).await?;
            Ok(Session {
                server,
                client,
                statement,
            })
        };
        let session = Rc::new(self.database.connected_within_limit(connecting).await?);
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

/// A question under way. Its end, also where its request was dropped, is the turn of those who wait.
struct Turn<'a, I>(&'a Lane<I>);

impl<I> Drop for Turn<'_, I> {
    fn drop(&mut self) {
        if self.0.waiting.borrow().is_empty() {
            self.0.busy.set(false);
        } else {
            self.0.turn.notify_one();
        }
    }
}
