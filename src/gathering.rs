//! Requests that travel together.
//!
//! Who finds a place free goes at once, alone. Who finds none waits for the next that becomes free, and then takes it together
//! with all who have come meanwhile: the busier the service, the less PostgreSQL has to do for each. Nobody waits for company.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, SemaphorePermit, oneshot};
use tokio::time::timeout;

use crate::error::ApiError;

pub struct Gathering<Q, A> {
    /// How many may wait.
    queue: usize,
    /// How long each may wait for a place. Whoever is under way then gets the answer, however long it takes.
    patience: Duration,
    places: Semaphore,
    /// How many go together at most.
    most: usize,
    waiting: RefCell<Vec<Waiter<Untaken<Q>, A>>>,
    arrival: Notify,
}

/// What is asked, and who is to get the answer.
pub type Waiter<Q, A> = (Q, oneshot::Sender<Result<A, ApiError>>);

/// What nobody has begun to answer, as long as it is there.
type Untaken<Q> = Rc<Cell<Option<Q>>>;

impl<Q, A> Gathering<Q, A> {
    pub fn new(queue: usize, patience: Duration, places: usize, most: usize) -> Self {
        Self {
            queue,
            patience,
            places: Semaphore::new(places),
            most,
            waiting: RefCell::default(),
            arrival: Notify::new(),
        }
    }

    /// Goes `alone`, which has the place to give back, or with others, whom somebody has to [`serve`](Self::serve).
    pub async fn join<'a>(
        &'a self,
        question: Q,
        alone: impl AsyncFnOnce(Q, SemaphorePermit<'a>) -> Result<A, ApiError>,
    ) -> Result<A, ApiError> {
        if let Ok(place) = self.places.try_acquire() {
            return alone(question, place).await;
        }
        let question = Rc::new(Cell::new(Some(question)));
        let (waiter, mut answer) = oneshot::channel();
        {
            let mut waiting = self.waiting.borrow_mut();
            if waiting.len() >= self.queue {
                waiting.retain(|(_, waiter)| !waiter.is_closed());
            }
            if waiting.len() >= self.queue {
                return Err(ApiError::crowded(()));
            }
            waiting.push((question.clone(), waiter));
        }
        self.arrival.notify_one();
        let answer = match timeout(self.patience, &mut answer).await {
            Ok(answer) => answer,
            Err(_) if question.take().is_some() => {
                return Err(ApiError::unavailable(
                    "no place among others within the limit",
                ));
            }
            Err(_) => answer.await,
        };
        answer.map_err(ApiError::internal)?
    }

    /// Takes one place after the other for those who wait.
    pub async fn serve(&self, answer: impl AsyncFn(Vec<Waiter<Q, A>>)) {
        loop {
            self.arrival.notified().await;
            while let Ok(_place) = self.places.acquire().await {
                let batch = self.next_batch();
                if batch.is_empty() {
                    break;
                }
                answer(batch).await;
            }
        }
    }

    fn next_batch(&self) -> Vec<Waiter<Q, A>> {
        let mut waiting = self.waiting.borrow_mut();
        waiting.retain(|(_, waiter)| !waiter.is_closed());
        let size = waiting.len().min(self.most);
        let batch = waiting.drain(..size);
        batch
            .filter_map(|(question, waiter)| Some((question.take()?, waiter)))
            .collect()
    }

    /// Tells all who wait now what they would only find out one after the other.
    pub fn refuse(&self, error: &ApiError) {
        refuse(self.waiting.take(), error);
    }
}

/// Gives all the same error. Whoever has gone needs none.
pub fn refuse<Q, A>(batch: Vec<Waiter<Q, A>>, error: &ApiError) {
    for (_, waiter) in batch {
        let _ = waiter.send(Err(error.clone()));
    }
}
