//! Chooses the server of a read: the replicas in turn, or the primary.

use std::cell::Cell;
use std::sync::Arc;

use super::error::{Error, ErrorKind};
use super::monitor::Monitor;
use super::server::Route;

/// One `T` for each server that can be read.
pub struct Sources<T> {
    monitor: Arc<Monitor>,
    pub primary: T,
    replicas: Vec<(Route, T)>,
    /// The replica of the next read.
    next: Cell<usize>,
}

impl<T> Sources<T> {
    pub fn new(monitor: &Arc<Monitor>, primary: T, replicas: Vec<(Route, T)>) -> Self {
        Self {
            monitor: monitor.clone(),
            primary,
            replicas,
            next: Cell::default(),
        }
    }

    /// The same for something else on each server.
    pub fn map<U>(&self, make: impl Fn(&T) -> U) -> Sources<U> {
        let replicas = self.replicas.iter();
        let replicas = replicas.map(|(route, replica)| (route.clone(), make(replica)));
        Sources::new(&self.monitor, make(&self.primary), replicas.collect())
    }

    /// The same without the replicas.
    pub fn map_primary<U>(&self, make: impl Fn(&T) -> U) -> Sources<U> {
        Sources::new(&self.monitor, make(&self.primary), Vec::new())
    }

    /// Reads from a replica whose lag is within the limit, or from the next one if that fails or its answer is not fresh: it may
    /// lack what the client has already seen. Reads from the primary if no replica has a fresh answer.
    pub async fn read<R>(
        &self,
        read: impl AsyncFn(&T) -> Result<R, Error>,
        is_fresh: impl Fn(&R) -> bool,
    ) -> Result<R, Error> {
        let next = self.next.get();
        self.next.set(next.wrapping_add(1));
        let count = self.replicas.len();
        let in_turn = self.replicas.iter().cycle().skip(next % count.max(1));
        for (route, replica) in in_turn.take(count) {
            let server = route.borrow().clone();
            if !self.monitor.is_current(&server) {
                continue;
            }
            match read(replica).await {
                Ok(answer) if is_fresh(&answer) => return Ok(answer),
                // The next replica would need as long.
                Err(error) if error.kind == ErrorKind::TimedOut => return Err(error),
                // Also after an internal error: a replica cancels a read that blocks its replay.
                Ok(_) | Err(_) => (),
            }
        }
        read(&self.primary).await
    }
}
