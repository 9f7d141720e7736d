//! Staying awake for a request that is alone.
//!
//! A worker that waits is put to sleep, and to be woken takes it longer than its work does: some 20 µs each time, where the
//! processors are virtual. So while a request is the only one in the service, its worker does not wait for PostgreSQL's answer
//! but looks for it, for a moment, and after its response for the client's next request. Measured with one client and two
//! cores: a third to a half more answers. As soon as there is a second request the workers wait as ever, because others
//! can use the processor.

use std::cell::Cell;
use std::num::NonZero;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, available_parallelism};
use std::time::{Duration, Instant};

use actix_web::rt;
use tokio::task;

/// Two or three wake-ups long. Longer gains nothing, and this is what a lone request may cost on top, twice.
const MOMENT: Duration = Duration::from_micros(50);

/// With one core, or a share of one, somebody always has a use for it.
static ENOUGH_CORES: LazyLock<bool> =
    LazyLock::new(|| available_parallelism().is_ok_and(|cores| cores > NonZero::<usize>::MIN));

/// Requests under way on all workers.
static UNDER_WAY: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Until when this worker stays awake.
    static UNTIL: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// A request under way, also where it is dropped.
pub struct UnderWay;

impl UnderWay {
    pub fn begin() -> Self {
        if UNDER_WAY.fetch_add(1, Ordering::Relaxed) == 0 {
            stay_awake();
        }
        Self
    }

    pub fn end(self) {
        drop(self);
        if UNDER_WAY.load(Ordering::Relaxed) == 0 {
            stay_awake();
        }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        UNDER_WAY.fetch_sub(1, Ordering::Relaxed);
    }
}

fn stay_awake() {
    if !*ENOUGH_CORES || UNTIL.replace(Some(Instant::now() + MOMENT)).is_some() {
        return;
    }
    rt::spawn(async {
        while UNTIL.get().is_some_and(|until| Instant::now() < until)
            && UNDER_WAY.load(Ordering::Relaxed) <= 1
        {
            // PostgreSQL may have been put on the same core.
            thread::yield_now();
            // Comes back when the runtime has looked at all its sockets, which it does without a wait because of this task.
            task::yield_now().await;
        }
        UNTIL.set(None);
    });
}
