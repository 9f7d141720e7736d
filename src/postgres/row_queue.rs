//! Queues the writers of one row. So a locked row occupies one connection of a worker, not all of them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedMutexGuard, Semaphore};
use tokio::time::timeout;

use super::error::Error;

pub struct RowQueue {
    /// The rows that are being written, by id.
    rows: Mutex<HashMap<i32, Row>>,
    /// Permits to wait for a row.
    queue: Semaphore,
    wait_timeout: Duration,
}

type Row = Arc<tokio::sync::Mutex<()>>;

/// The right to write a row.
pub struct RowLock {
    queue: Arc<RowQueue>,
    id: i32,
    guard: Option<OwnedMutexGuard<()>>,
}

impl RowQueue {
    pub fn new(queue_size: usize, wait_timeout: Duration) -> Arc<Self> {
        Arc::new(Self {
            rows: Mutex::default(),
            queue: Semaphore::new(queue_size),
            wait_timeout,
        })
    }

    pub async fn lock(self: &Arc<Self>, id: i32) -> Result<RowLock, Error> {
        // Made first, so that it is dropped last and finds no other reference to the row.
        let mut lock = RowLock {
            queue: self.clone(),
            id,
            guard: None,
        };
        let row = self.rows().entry(id).or_default().clone();
        if let Ok(guard) = row.clone().try_lock_owned() {
            lock.guard = Some(guard);
            return Ok(lock);
        }
        let _queued = self.queue.try_acquire().map_err(|_| Error::queue_full())?;
        let guard = timeout(self.wait_timeout, row.lock_owned()).await;
        let late = |_| Error::conflict("other requests are writing the same row");
        lock.guard = Some(guard.map_err(late)?);
        Ok(lock)
    }

    fn rows(&self) -> MutexGuard<'_, HashMap<i32, Row>> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for RowLock {
    fn drop(&mut self) {
        self.guard = None;
        let mut rows = self.queue.rows();
        // The last writer removes the row from the map.
        if rows
            .get(&self.id)
            .is_some_and(|row| Arc::strong_count(row) == 1)
        {
            rows.remove(&self.id);
        }
    }
}
