//! Groups concurrent requests into batches.
//!
//! If nothing is in flight, a request runs immediately, alone. Otherwise it joins the next batch, which runs as soon as the
//! one in flight has ended. So an idle service adds no delay, and the busier it is, the larger its batches.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::{Mutex, Notify, oneshot};
use tokio::time::timeout;

use super::error::Error;

pub struct Batcher<K, R> {
    max_batch: usize,
    queue_size: usize,
    /// How long a request may wait for its batch to start.
    wait_timeout: Duration,
    in_flight: Mutex<()>,
    waiting: RefCell<Vec<Waiting<K, R>>>,
    arrived: Notify,
}

struct Waiting<K, R> {
    /// Empty once the batch has started, or once the request has stopped waiting for that.
    key: Rc<Cell<Option<K>>>,
    reply: Reply<R>,
}

/// Where the result for a key is sent. Sending fails if the client has disconnected, and then needs no result.
pub type Reply<R> = oneshot::Sender<Result<R, Error>>;

impl<K, R> Batcher<K, R> {
    pub fn new(max_batch: usize, queue_size: usize, wait_timeout: Duration) -> Self {
        Self {
            max_batch,
            queue_size,
            wait_timeout,
            in_flight: Mutex::new(()),
            waiting: RefCell::default(),
            arrived: Notify::new(),
        }
    }

    /// Runs `alone`, or joins the next batch of [`serve`](Self::serve).
    pub async fn submit(
        &self,
        key: K,
        alone: impl AsyncFnOnce(K) -> Result<R, Error>,
    ) -> Result<R, Error> {
        if let Ok(_in_flight) = self.in_flight.try_lock() {
            return alone(key).await;
        }
        let key = Rc::new(Cell::new(Some(key)));
        let mut result = self.enqueue(key.clone())?;
        let result = match timeout(self.wait_timeout, &mut result).await {
            Ok(result) => result,
            Err(_) if key.take().is_some() => {
                return Err(Error::unavailable("no batch started within the limit"));
            }
            // Its batch is in flight, with limits of its own.
            Err(_) => result.await,
        };
        result.map_err(Error::internal)?
    }

    fn enqueue(
        &self,
        key: Rc<Cell<Option<K>>>,
    ) -> Result<oneshot::Receiver<Result<R, Error>>, Error> {
        let mut waiting = self.waiting.borrow_mut();
        if waiting.len() >= self.queue_size {
            waiting.retain(|request| !request.reply.is_closed());
        }
        if waiting.len() >= self.queue_size {
            return Err(Error::queue_full());
        }
        let (reply, result) = oneshot::channel();
        waiting.push(Waiting { key, reply });
        self.arrived.notify_one();
        Ok(result)
    }

    /// Runs one batch after the other. Never returns.
    pub async fn serve(&self, run: impl AsyncFn(Vec<(K, Reply<R>)>)) {
        loop {
            self.arrived.notified().await;
            loop {
                let _in_flight = self.in_flight.lock().await;
                let batch = self.next_batch();
                if batch.is_empty() {
                    break;
                }
                run(batch).await;
            }
        }
    }

    fn next_batch(&self) -> Vec<(K, Reply<R>)> {
        let mut waiting = self.waiting.borrow_mut();
        waiting.retain(|request| !request.reply.is_closed());
        let size = waiting.len().min(self.max_batch);
        let batch = waiting.drain(..size);
        batch
            .filter_map(|request| Some((request.key.take()?, request.reply)))
            .collect()
    }

    /// Fails all waiting requests, for an error that each of them would meet.
    pub fn fail_waiting(&self, error: &Error) {
        for request in self.waiting.take() {
            let _ = request.reply.send(Err(error.clone()));
        }
    }
}
