//! Busy-polls while a single request is in flight, to avoid wake-up latency.
//!
//! To wake a sleeping worker takes some 20 µs on a virtual machine, more than its work takes. So a worker with the only
//! request in flight polls for PostgreSQL's answer. After the response, it polls for the next request. With one client and two
//! cores this gives a third to a half more requests per second. If a second request is in flight, workers sleep as usual, because
//! others can use the processor.

use std::cell::Cell;
use std::num::NonZero;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, available_parallelism};
use std::time::{Duration, Instant};

use actix_web::rt;
use tokio::task;

/// Two or three wake-ups. A longer time gains nothing. A request can cost this much extra twice: before and
/// after its response.
const POLL_TIME: Duration = Duration::from_micros(50);

/// On a single core, another process can always use it.
static ENABLED: LazyLock<bool> =
    LazyLock::new(|| available_parallelism().is_ok_and(|cores| cores > NonZero::<usize>::MIN));

/// Requests in flight on all workers.
static IN_FLIGHT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Until when this worker polls.
    static POLL_UNTIL: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// A request in flight. It is counted until it ends or is dropped.
pub struct InFlight;

impl InFlight {
    pub fn start() -> Self {
        if IN_FLIGHT.fetch_add(1, Ordering::Relaxed) == 0 {
            poll();
        }
        Self
    }

    pub fn end(self) {
        drop(self);
        if IN_FLIGHT.load(Ordering::Relaxed) == 0 {
            poll();
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        IN_FLIGHT.fetch_sub(1, Ordering::Relaxed);
    }
}

fn poll() {
    let until = Some(Instant::now() + POLL_TIME);
    if !*ENABLED || POLL_UNTIL.replace(until).is_some() {
        return;
    }
    rt::spawn(async {
        while POLL_UNTIL.get().is_some_and(|until| Instant::now() < until)
            && IN_FLIGHT.load(Ordering::Relaxed) <= 1
        {
            // PostgreSQL may be waiting for this core.
            thread::yield_now();
            // The runtime looks at its sockets and comes back at once, because this task is ready.
            task::yield_now().await;
        }
        POLL_UNTIL.set(None);
    });
}
