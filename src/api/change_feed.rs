//! Polls the change feed for all listeners of this process at once, four times a second while there is one.
//!
//! A listener at the head gets the page that the poll read. Any other listener reads pages by itself until it reaches the head.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use actix_web::rt;
use actix_web::web::Data;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Gauge, register};
use tokio::sync::Notify;
use tokio::sync::broadcast::{self, Receiver};

use super::change_cursor::{Cursor, Epoch, Xid};
use super::change_page::{Head, MAX_PAGE, Page};
use crate::http::error::ApiError;
use crate::postgres::{Cluster, Error, Parameters};

/// A page of what became visible between two polls.
pub struct Tick {
    /// Where the page begins.
    from: Cursor,
    pub head: Head,
    /// `None` for the first poll, and for the rest of a batch that is too large to be shared.
    page: Option<Arc<Page>>,
}

impl Tick {
    /// The page, if it begins at this cursor.
    pub fn page(&self, cursor: &Cursor) -> Option<Arc<Page>> {
        let begins = cursor.seen == self.from.seen && cursor.batch == self.from.batch;
        self.page.clone().filter(|_| begins)
    }
}

/// `None`: the feed ends, because the primary has changed or failed, or the service stops.
pub type Ticks = Receiver<Option<Arc<Tick>>>;

/// The poll of this process. Its state is shared by all workers.
pub struct Feed {
    ticks: broadcast::Sender<Option<Arc<Tick>>>,
    joined: Notify,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The head of the last poll.
    last: Option<Head>,
    polled_at: Option<Instant>,
    /// The transactions that hold changes back, and when each was first seen.
    running: BTreeMap<Xid, Instant>,
    /// The database, its timeline, and where the timeline before ended.
    promotion: Option<(i64, u32, u64)>,
    is_stopping: bool,
}

const INTERVAL: Duration = Duration::from_millis(250);

/// The most pages of one poll that are shared. Listeners read the rest by themselves.
const MAX_SHARED: usize = 20;

/// Ticks that a listener may be late before it reads pages by itself.
const MAX_LATE: usize = 32;

impl Feed {
    /// Polls in the background, on the calling thread. Registers the metrics.
    pub fn start(cluster: Data<Cluster>) -> Result<Data<Self>, prometheus::Error> {
        let feed = Data::new(Self {
            ticks: broadcast::Sender::new(MAX_LATE),
            joined: Notify::new(),
            state: Mutex::default(),
        });
        register(Box::new(Metrics::new(feed.clone())?))?;
        rt::spawn(feed.clone().into_inner().run(cluster));
        Ok(feed)
    }

    async fn run(self: Arc<Self>, cluster: Data<Cluster>) {
        loop {
            if self.ticks.receiver_count() == 0 {
                self.rest();
                self.joined.notified().await;
                continue;
            }
            match self.poll(&cluster).await {
                Ok(()) => (),
                Err(error) => {
                    log::warn!(
                        "the poll of the change feed failed, so its listeners are disconnected: {error}"
                    );
                    self.state().last = None;
                    let _ = self.ticks.send(None);
                }
            }
            rt::time::sleep(INTERVAL).await;
        }
    }

    /// Forgets the last poll, because there is no listener.
    fn rest(&self) {
        let mut state = self.state();
        (state.last, state.polled_at) = (None, None);
        state.running.clear();
    }

    /// Sends what has become visible since the last poll.
    async fn poll(&self, cluster: &Cluster) -> Result<(), ApiError> {
        let read = async |sql: &str, values: Parameters<'_>| cluster.read(sql, values).await;
        let head = Head::read(read).await?;
        self.remember_promotion(&head);
        let Some(last) = self.state().last.clone() else {
            self.send(head.cursor(), &head, None);
            self.polled(head);
            return Ok(());
        };
        if !last.epoch.is_same_life(&head.epoch) {
            let cause = "the primary or the epoch of the feed has changed";
            return Err(Error::unavailable(cause).into());
        }
        if last.snapshot != head.snapshot {
            let mut cursor = last.cursor();
            for _ in 0..MAX_SHARED {
                let page = Arc::new(Page::read(read, &cursor, &head, MAX_PAGE).await?);
                let next = page.next.clone();
                self.send(cursor, &head, Some(page));
                cursor = next;
                if cursor.batch.is_none() {
                    break;
                }
            }
            if cursor.batch.is_some() {
                self.send(cursor, &head, None);
            }
        }
        self.polled(head);
        Ok(())
    }

    fn send(&self, from: Cursor, head: &Head, page: Option<Arc<Page>>) {
        let head = head.clone();
        // It fails if the last listener has just left.
        let _ = self.ticks.send(Some(Arc::new(Tick { from, head, page })));
    }

    fn polled(&self, head: Head) {
        let now = Instant::now();
        let state = &mut *self.state();
        let snapshot = &head.snapshot;
        state.polled_at = Some(now);
        state
            .running
            .retain(|xid, _| snapshot.running.binary_search(xid).is_ok());
        for xid in &snapshot.running {
            state.running.entry(*xid).or_insert(now);
        }
        state.last = Some(head);
    }

    /// Listens from now on. `None`: the service stops.
    pub fn join(&self) -> Option<Ticks> {
        let state = self.state();
        if state.is_stopping {
            return None;
        }
        let ticks = self.ticks.subscribe();
        self.joined.notify_one();
        Some(ticks)
    }

    /// Ends the feed for all listeners.
    pub fn stop(&self) {
        self.state().is_stopping = true;
        let _ = self.ticks.send(None);
    }

    /// Whether a cursor is where the last poll ended.
    pub fn is_head(&self, cursor: &Cursor) -> bool {
        let last = self.state().last.clone();
        last.is_some_and(|last| last.cursor() == *cursor)
    }

    /// Whether everything that a cursor has seen is still in the database.
    pub fn is_valid(&self, cursor: &Cursor, head: &Head) -> bool {
        self.remember_promotion(head);
        let (old, new) = (&cursor.epoch, &head.epoch);
        if old.database != new.database {
            return false;
        }
        if old.timeline == new.timeline {
            return match new.recovered {
                recovered if recovered == old.recovered => old.position <= new.position,
                // Another standby was promoted to the same timeline.
                _ if head.was_standby => false,
                // A clean restart.
                0 => old.position <= new.position,
                // A crash.
                recovered => old.position <= recovered,
            };
        }
        let promotion = self.state().promotion;
        promotion.is_some_and(|(database, timeline, end)| {
            (database, timeline) == (new.database, new.timeline)
                && old.timeline.checked_add(1) == Some(timeline)
                && old.position <= end
        })
    }

    /// PostgreSQL tells until its restart where a promoted standby ended its recovery.
    fn remember_promotion(&self, head: &Head) {
        if head.was_standby {
            let Epoch {
                database,
                timeline,
                recovered,
                ..
            } = head.epoch;
            self.state().promotion = Some((database, timeline, recovered));
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Read when the metrics are, so that ages are current.
struct Metrics {
    feed: Data<Feed>,
    listeners: Gauge,
    lag: Gauge,
    running: Gauge,
    oldest: Gauge,
}

impl Metrics {
    fn new(feed: Data<Feed>) -> Result<Self, prometheus::Error> {
        Ok(Self {
            feed,
            listeners: Gauge::new("change_feed_listeners", "Requests that wait for changes.")?,
            lag: Gauge::new(
                "change_feed_lag_seconds",
                "Age of the last successful poll. NaN if no client waits.",
            )?,
            running: Gauge::new(
                "change_feed_running_transactions",
                "Transactions that may hold back changes of their own.",
            )?,
            oldest: Gauge::new(
                "change_feed_oldest_transaction_seconds",
                "How long the poll has seen the oldest running transaction. 0 if there is none.",
            )?,
        })
    }

    fn gauges(&self) -> [&Gauge; 4] {
        [&self.listeners, &self.lag, &self.running, &self.oldest]
    }
}

impl Collector for Metrics {
    fn desc(&self) -> Vec<&Desc> {
        self.gauges()
            .into_iter()
            .flat_map(Collector::desc)
            .collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let state = self.feed.state();
        let age = |since: Option<&Instant>| since.map(|since| since.elapsed().as_secs_f64());
        let count = |count: usize| f64::from(u32::try_from(count).unwrap_or(u32::MAX));
        self.listeners.set(count(self.feed.ticks.receiver_count()));
        self.lag
            .set(age(state.polled_at.as_ref()).unwrap_or(f64::NAN));
        self.running.set(count(state.running.len()));
        self.oldest
            .set(age(state.running.values().min()).unwrap_or(0.0));
        self.gauges()
            .into_iter()
            .flat_map(Collector::collect)
            .collect()
    }
}
