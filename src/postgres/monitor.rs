//! Probes every server four times a second, chooses the primary, and measures the lag of the others.
//!
//! The primary stays the primary while it accepts writes. If `DATABASE_URL` names several hosts, another one becomes the
//! primary as soon as it accepts writes and the former one does not, or was promoted before it.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use actix_web::rt;
use anyhow::{Context, Result};
use futures_util::future;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::probe::{self, Probe, ProbeError, Session, WalPosition, probe};
use super::server::{Reason, Route, Server, State};
use crate::settings::Settings;

const INTERVAL: Duration = Duration::from_millis(250);

pub struct Monitor {
    /// The hosts of `DATABASE_URL`. One of them is the primary.
    candidates: Vec<Arc<Server>>,
    primary: watch::Sender<Arc<Server>>,
    /// The hosts of `DATABASE_READ_URL`. Their routes never change.
    replicas: Vec<watch::Sender<Arc<Server>>>,
    history: Mutex<History>,
    max_lag: Duration,
}

/// What the probes of the primary have seen of its write-ahead log. Empty until the first one has ended.
#[derive(Default)]
struct History {
    timeline: Option<i32>,
    /// When the primary was last seen at which position.
    positions: VecDeque<(Instant, u64)>,
}

impl Monitor {
    /// Probes every server once and then in the background.
    pub async fn start(settings: &Settings, tls: &MakeRustlsConnect) -> Result<Arc<Self>> {
        let server = |config, grace_period| Server::new(config, settings, tls, grace_period);
        let candidates: Vec<_> = settings
            .database
            .iter()
            .map(|config| server(config, settings.pool_wait))
            .collect();
        let first = candidates.first().context("DATABASE_URL has no host")?;
        // No grace period: another server answers in place of a replica.
        let replicas = settings
            .replicas
            .iter()
            .map(|config| watch::Sender::new(server(config, Duration::ZERO)));
        let monitor = Arc::new(Self {
            primary: watch::Sender::new(first.clone()),
            replicas: replicas.collect(),
            candidates,
            history: Mutex::default(),
            max_lag: settings.replica_lag,
        });
        let servers = monitor.servers();
        let started = servers.into_iter().map(|(_, server)| async {
            let mut session = Session::default();
            let result = probe(&server, &mut session).await;
            monitor.update(&server, result, session.refusal());
            rt::spawn(monitor.clone().run(server, session));
        });
        future::join_all(started).await;
        Ok(monitor)
    }

    async fn run(self: Arc<Self>, server: Arc<Server>, mut session: Session) {
        loop {
            let mut former = None;
            tokio::select! {
                () = sleep(INTERVAL) => (),
                // On a new session: a server that shuts down may still answer on old ones.
                () = server.suspected.notified() => former = session.client.take(),
            }
            let result = {
                let mut probed = pin!(probe(&server, &mut session));
                if let Ok(result) = timeout_at(end_of_grace_period(&server), &mut probed).await {
                    result
                } else {
                    server.give_up();
                    probed.await
                }
            };
            if matches!(result, Err(ProbeError { is_up: true, .. })) {
                // The server may have no connection left for a new session.
                session.client = former;
            }
            let before = server.state();
            self.update(&server, result, session.refusal());
            let state = server.state();
            match (before.writable(), state.writable()) {
                (before, after) if before == after => (),
                (_, Some(_)) => log::info!("database server {} {state}", server.name),
                (_, None) => log::warn!("database server {} {state}", server.name),
            }
            match (before.refusal(), state.refusal()) {
                (None, Some(_)) => log::warn!("database server {} {state}", server.name),
                (Some(_), None) if state.writable().is_some() => {
                    log::info!("database server {} accepts new sessions again", server.name);
                }
                _ => (),
            }
        }
    }

    /// Updates the state of a server from the result of a probe.
    fn update(
        &self,
        server: &Arc<Server>,
        result: Result<Probe, ProbeError>,
        refusal: Option<String>,
    ) {
        let result = result.and_then(|probe| self.require_timeline(server, probe));
        if let Ok(probe) = &result {
            server.timeline.store(probe.wal.timeline, Ordering::Relaxed);
        }
        let state = match (result, server.state()) {
            (Ok(Probe { writable, wal }), _) => State::Up {
                writable,
                lag: self.lag(server, wal),
                suspect: false,
                refusal,
            },
            (Err(ProbeError { is_up: true, .. }), State::Up { writable, lag, .. }) => State::Up {
                writable,
                // Not measured, so it may have grown by as much as a probe takes.
                lag: if writable {
                    lag
                } else {
                    lag.saturating_add(probe::TIMEOUT)
                },
                suspect: false,
                refusal,
            },
            (Err(ProbeError { text, is_up, wal }), before) => {
                let lag = wal.map(|wal| self.lag(server, wal));
                let reason = Reason {
                    text,
                    lag,
                    is_refusal: is_up,
                };
                let since = match before {
                    State::Up { .. } => Some(Instant::now()),
                    State::Missing { since, .. } => Some(since),
                    State::Down { .. } => None,
                };
                match since {
                    Some(since) if since.elapsed() < server.grace_period => {
                        State::Missing { since, reason }
                    }
                    _ => State::Down { reason },
                }
            }
        };
        server.state.send_replace(state);
        self.choose_primary();
    }

    /// A suspicion alone does not move the primary.
    fn choose_primary(&self) {
        let accepts_writes = |server: &&Arc<Server>| server.state().writable() == Some(true);
        let timeline = |server: &Arc<Server>| server.timeline.load(Ordering::Relaxed);
        let primary = self.primary.borrow().clone();
        let accepting = self.candidates.iter().filter(accepts_writes);
        // The first of those that were promoted last. The others are former primaries that still run.
        let newest = accepting.rev().max_by_key(|server| timeline(server));
        if accepts_writes(&&primary)
            && newest.is_none_or(|newest| timeline(newest) <= timeline(&primary))
        {
            return;
        }
        let is_down = matches!(primary.state(), State::Down { .. });
        let is_up = |server: &&Arc<Server>| is_down && server.state().writable().is_some();
        let next = newest.or_else(|| self.candidates.iter().find(is_up));
        if let Some(next) = next.filter(|next| **next != primary) {
            log::warn!(
                "database server {} is now the primary and replaces {}",
                next.name,
                primary.name
            );
            self.primary.send_replace(next.clone());
            if accepts_writes(&next) {
                self.forget_history();
            }
        }
    }

    /// Fails for a replica that may have replayed what is not part of the primary's write-ahead log.
    fn require_timeline(&self, server: &Arc<Server>, probe: Probe) -> Result<Probe, ProbeError> {
        let mut replicas = self.replicas.iter();
        let is_replica = replicas.any(|replica| Arc::ptr_eq(&replica.borrow(), server));
        let timeline = self.lock_history().timeline;
        match timeline.filter(|timeline| is_replica && *timeline != probe.wal.timeline) {
            Some(timeline) => Err(ProbeError {
                wal: Some(probe.wal),
                ..ProbeError::new(&format!("is not known to be on timeline {timeline}"))
            }),
            None => Ok(probe),
        }
    }

    /// How old the data of a server is at most, compared to the primary. The maximum if that is unknown.
    fn lag(&self, server: &Server, wal: WalPosition) -> Duration {
        if wal.replay_age.is_none() && *server == **self.primary.borrow() {
            self.record(wal);
            return Duration::ZERO;
        }
        let history = self.lock_history();
        let (timeline, positions) = (history.timeline, &history.positions);
        let next = positions.partition_point(|(_, reached)| *reached <= wal.position);
        let reached = next.checked_sub(1).and_then(|last| positions.get(last));
        let Some((seen, _)) = reached.filter(|_| timeline == Some(wal.timeline)) else {
            return Duration::MAX;
        };
        let age = seen.elapsed();
        if next < positions.len() {
            age
        } else if age <= INTERVAL + probe::TIMEOUT {
            Duration::ZERO
        } else {
            // The primary does not answer, and may be at any position.
            age.min(wal.replay_age.unwrap_or(Duration::MAX))
        }
    }

    /// Records where the primary is.
    fn record(&self, wal: WalPosition) {
        /// About twenty minutes.
        const MAX_POSITIONS: usize = 5000;
        let mut history = self.lock_history();
        let newest = history.positions.back().map(|(_, newest)| *newest);
        if history.timeline != Some(wal.timeline) || newest > Some(wal.position) {
            // Another server answers, or the same after a promotion.
            drop(history);
            self.forget_history();
            history = self.lock_history();
            history.timeline = Some(wal.timeline);
        }
        let positions = &mut history.positions;
        if newest == Some(wal.position) {
            positions.pop_back();
        }
        positions.push_back((Instant::now(), wal.position));
        if positions.len() > MAX_POSITIONS {
            positions.pop_front();
        }
    }

    /// Forgets the write-ahead log of the former primary. No replica is read until the new primary and the replica are probed.
    fn forget_history(&self) {
        *self.lock_history() = History::default();
        for replica in &self.replicas {
            replica.borrow().state.send_if_modified(|state| {
                let State::Up { lag, .. } = state else {
                    return false;
                };
                *lag = Duration::MAX;
                true
            });
        }
    }

    fn lock_history(&self) -> std::sync::MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn primary(&self) -> Route {
        self.primary.subscribe()
    }

    pub fn replicas(&self) -> impl Iterator<Item = Route> {
        self.replicas.iter().map(watch::Sender::subscribe)
    }

    /// Whether a replica is up, opens sessions, and its lag is within the limit.
    pub fn is_current(&self, replica: &Server) -> bool {
        matches!(
            *replica.state.borrow(),
            State::Up { lag, suspect: false, refusal: None, .. } if lag <= self.max_lag
        )
    }

    /// Every server with its role.
    pub fn servers(&self) -> Vec<(&'static str, Arc<Server>)> {
        let primary = self.primary.borrow().clone();
        let candidates = self.candidates.iter().map(|server| {
            let role = if *server == primary {
                "primary"
            } else {
                "standby"
            };
            (role, server.clone())
        });
        let replicas = self.replicas.iter();
        let replicas = replicas.map(|replica| ("replica", replica.borrow().clone()));
        candidates.chain(replicas).collect()
    }
}

fn end_of_grace_period(server: &Server) -> Instant {
    match *server.state.borrow() {
        State::Missing { since, .. } => since + server.grace_period,
        // Later than the probe's own timeouts.
        _ => Instant::now() + server.connect_timeout + 2 * probe::TIMEOUT,
    }
}
