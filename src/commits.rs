//! Writes, of which those that go together share a commit.
//!
//! The commit, for which PostgreSQL waits for the disk, is most of what a write costs. So those that go together
//! ([`crate::gathering`]) are one transaction, in which each has a statement and an answer of its own. Measured against a commit
//! for each: a third more updates and a half more inserts with 32 clients, twice as many with 128. One commit at a time serves a
//! fifth more still with 32, but with four clients a sixth less, because then one works while the other waits for the disk.
//!
//! A write that waits for somebody's lock, or takes long, holds up no other. Those in one transaction may do so for a moment only,
//! and then each goes by itself; who goes by itself leaves its place after a moment; and the writers of one listing go one by one,
//! so that a listing which somebody has locked keeps a single connection waiting.
//!
//! A listing is written once in a transaction, so that each of its versions has an `xmin` of its own. And all who write in it say
//! as whom, or none does, because that depends on the service: nobody writes in the name of the one before.

use std::cell::RefCell;
use std::collections::HashMap;
use std::pin::pin;
use std::sync::Arc;

use actix_web::{rt, web};
use futures_util::future::join_all;
use tokio::sync::{Mutex, OwnedMutexGuard, Semaphore};
use tokio::time::timeout;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use crate::database::{Database, LOCK_LIMIT};
use crate::error::ApiError;
use crate::gathering::{Gathering, Waiter, refuse};

pub struct Commits {
    pub database: Database,
    gathering: Gathering<Write, Vec<Row>>,
    /// The listings that are being written, each with the turn of its writers.
    turns: RefCell<HashMap<i32, Arc<Mutex<()>>>>,
    /// Places for those who wait for their turn, which are taken from nobody else.
    turns_queue: Semaphore,
}

struct Write {
    /// Of which listing, if it is there already.
    listing: Option<i32>,
    sql: &'static str,
    values: Vec<Value>,
}

pub type Value = Box<dyn ToSql + Sync>;

impl Commits {
    pub fn new(database: &Database, queue: usize) -> web::Data<Self> {
        const COMMITS: usize = 2;
        /// More gain nothing.
        const TOGETHER: usize = 16;
        let commits = web::Data::new(Self {
            database: database.clone(),
            gathering: Gathering::new(queue, database.pool_wait, COMMITS, TOGETHER),
            turns: RefCell::default(),
            turns_queue: Semaphore::new(queue),
        });
        for _ in 0..COMMITS {
            let serving = commits.clone();
            rt::spawn(async move {
                let answer = async |batch| {
                    // What takes longer goes on without its place.
                    let commits = serving.clone();
                    let answered = rt::spawn(async move { commits.answer(batch).await });
                    let _ = timeout(LOCK_LIMIT, answered).await;
                };
                serving.gathering.serve(answer).await;
            });
        }
        commits
    }

    /// Runs a statement that writes, to a listing if it is there already, together with others, where there are any.
    pub async fn share(
        &self,
        listing: Option<i32>,
        sql: &'static str,
        values: Vec<Value>,
    ) -> Result<Vec<Row>, ApiError> {
        let _turn = match listing {
            Some(listing) => Some(self.turn(listing).await?),
            None => None,
        };
        let write = Write {
            listing,
            sql,
            values,
        };
        let alone = async |write, place| {
            let mut running = pin!(self.run(&write));
            if let Ok(answer) = timeout(LOCK_LIMIT, &mut running).await {
                return answer;
            }
            drop(place);
            running.await
        };
        self.gathering.join(write, alone).await
    }

    /// Runs one that may take long, and so by itself.
    pub async fn alone(
        &self,
        listing: i32,
        sql: &'static str,
        values: Vec<Value>,
    ) -> Result<Vec<Row>, ApiError> {
        let _turn = self.turn(listing).await?;
        let write = Write {
            listing: Some(listing),
            sql,
            values,
        };
        self.run(&write).await
    }

    async fn run(&self, write: &Write) -> Result<Vec<Row>, ApiError> {
        let mut rows = self
            .database
            .write(&[(write.sql, &write.parameters())])
            .await?;
        Ok(rows.pop().unwrap_or_default())
    }

    async fn answer(&self, mut batch: Vec<Waiter<Write, Vec<Row>>>) {
        // In an order that all follow, so that no two wait for each other; and new listings last, which nobody knows yet.
        batch.sort_by_key(|(write, _)| (write.listing.is_none(), write.listing));
        let parameters: Vec<_> = batch.iter().map(|(write, _)| write.parameters()).collect();
        let statements: Vec<_> = batch
            .iter()
            .zip(&parameters)
            .map(|((write, _), parameters)| (write.sql, &parameters[..]))
            .collect();
        match self.database.write(&statements).await {
            Ok(rows) => {
                for ((_, waiter), rows) in batch.into_iter().zip(rows) {
                    // Whoever has gone needs no answer, here and below.
                    let _ = waiter.send(Ok(rows));
                }
            }
            // PostgreSQL refused one of them and so has done none. The others shall not suffer from it.
            Err(error) if error.is_refusal() && batch.len() > 1 => {
                let each = batch.into_iter().map(async |(write, mut waiter)| {
                    let done = tokio::select! {
                        biased;
                        () = waiter.closed() => return,
                        done = self.run(&write) => done,
                    };
                    let _ = waiter.send(done);
                });
                join_all(each).await;
            }
            Err(error) => refuse(batch, &error),
        }
    }

    async fn turn(&self, listing: i32) -> Result<Turn<'_>, ApiError> {
        let mut turn = Turn {
            commits: self,
            listing,
            held: None,
        };
        let mine = self.turns.borrow_mut().entry(listing).or_default().clone();
        if let Ok(held) = mine.clone().try_lock_owned() {
            turn.held = Some(held);
            return Ok(turn);
        }
        let _place = self.turns_queue.try_acquire().map_err(ApiError::crowded)?;
        let held = timeout(self.database.pool_wait, mine.lock_owned()).await;
        turn.held =
            Some(held.map_err(|_| ApiError::contended("others are writing the same listing"))?);
        Ok(turn)
    }
}

impl Write {
    fn parameters(&self) -> Vec<&(dyn ToSql + Sync)> {
        self.values.iter().map(|value| &**value).collect()
    }
}

/// The turn of a writer, or its place among those who wait for theirs. The last one removes the listing.
struct Turn<'a> {
    commits: &'a Commits,
    listing: i32,
    held: Option<OwnedMutexGuard<()>>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.held = None;
        let mut turns = self.commits.turns.borrow_mut();
        if turns
            .get(&self.listing)
            .is_some_and(|turn| Arc::strong_count(turn) == 1)
        {
            turns.remove(&self.listing);
        }
    }
}
