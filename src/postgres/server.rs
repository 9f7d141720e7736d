//! One PostgreSQL server: its last known state, waiting for it, connecting to it.
//!
//! A request for a server that went down a moment ago waits for it, so a quick restart costs time and no error. If
//! the server stays down, requests fail at once, so a returning server gets no backlog.

use std::fmt::{self, Display};
use std::mem::replace;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_postgres::Config;
use tokio_postgres_rustls::MakeRustlsConnect;

use super::connect::{Connecting, address, connect, with_session_settings};
use super::error::{Error, connection_is_lost};
use crate::settings::Settings;

pub struct Server {
    /// `host:port`.
    pub(super) name: String,
    pub(super) config: Config,
    pub(super) tls: MakeRustlsConnect,
    pub(super) connect_timeout: Duration,
    /// Whether this is a sharding proxy, not a server.
    pub(super) is_proxy: bool,
    /// How long requests wait for this server after it went down.
    pub(super) grace_period: Duration,
    pub(super) state: watch::Sender<State>,
    /// That of the last probe. Each promotion begins a greater one.
    pub(super) timeline: AtomicI32,
    /// Wakes the monitor: a request lost its connection.
    pub(super) suspected: Notify,
    /// Whether a request got an answer since the last probe was sent.
    pub(super) answered: AtomicBool,
    /// Whether a request could not open a session since the monitor last tried.
    pub(super) refused: AtomicBool,
}

#[derive(Clone)]
pub enum State {
    /// The last probe was answered. Suspect: a request lost its connection since.
    Up {
        writable: bool,
        lag: Duration,
        suspect: bool,
        /// Why new sessions have failed for some seconds. The sessions that are open work.
        refusal: Option<String>,
    },
    /// Down for less than the grace period: requests wait.
    Missing { since: Instant, reason: Reason },
    /// Requests are refused.
    Down { reason: Reason },
}

/// Why requests do not go to a server.
#[derive(Clone)]
pub struct Reason {
    pub text: String,
    /// Set if the server answers but is not of the kind that its URL asks for.
    pub lag: Option<Duration>,
    /// Whether the server answered and refused the session.
    pub is_refusal: bool,
}

/// The current server for a role: the primary, which changes at a failover, or one replica.
pub type Route = watch::Receiver<Arc<Server>>;

impl State {
    /// Whether the server accepts writes, if it is up.
    pub fn writable(&self) -> Option<bool> {
        match self {
            Self::Up { writable, .. } => Some(*writable),
            _ => None,
        }
    }

    /// Why new sessions have failed for some seconds, if the server is up.
    pub fn refusal(&self) -> Option<&str> {
        match self {
            Self::Up { refusal, .. } => refusal.as_deref(),
            _ => None,
        }
    }

    /// How far the server is behind the primary, if it answers.
    pub fn lag(&self) -> Option<Duration> {
        match self {
            Self::Up { lag, .. } => Some(*lag),
            Self::Missing { reason, .. } | Self::Down { reason } => reason.lag,
        }
    }
}

impl Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Up { writable: true, .. } => f.write_str("accepts writes")?,
            Self::Up { .. } => f.write_str("is read-only")?,
            Self::Missing { reason, .. } | Self::Down { reason } if reason.lag.is_some() => {
                f.write_str(&reason.text)?;
            }
            Self::Missing { reason, .. } | Self::Down { reason } if reason.is_refusal => {
                write!(f, "refuses sessions: {}", reason.text)?;
            }
            Self::Missing { reason, .. } | Self::Down { reason } => {
                write!(f, "is down: {}", reason.text)?;
            }
        }
        match self.lag() {
            _ if self.writable() == Some(true) => (),
            None | Some(Duration::ZERO) => (),
            Some(Duration::MAX) => f.write_str(", lag unknown")?,
            Some(lag) => write!(f, ", {:.3} s behind", lag.as_secs_f64())?,
        }
        match self.refusal() {
            Some(refusal) => write!(f, ", refuses new sessions: {refusal}"),
            None => Ok(()),
        }
    }
}

/// A server is identified by its address and the rest of its URL: behind a pooler, two databases may share an address.
impl PartialEq for Server {
    fn eq(&self, other: &Self) -> bool {
        self.config == other.config
    }
}

impl Server {
    pub fn new(
        config: &Config,
        settings: &Settings,
        tls: &MakeRustlsConnect,
        grace_period: Duration,
    ) -> Arc<Self> {
        let reason = Reason {
            text: "not probed yet".to_owned(),
            lag: None,
            is_refusal: false,
        };
        Arc::new(Self {
            name: address(config),
            config: with_session_settings(config.clone(), settings),
            tls: tls.clone(),
            connect_timeout: settings.connect_timeout,
            is_proxy: settings.sharding_proxy,
            grace_period,
            state: watch::Sender::new(State::Down { reason }),
            timeline: AtomicI32::new(0),
            suspected: Notify::new(),
            answered: AtomicBool::new(false),
            refused: AtomicBool::new(false),
        })
    }

    pub fn state(&self) -> State {
        self.state.borrow().clone()
    }

    /// Records that a request got an answer.
    pub fn record_answer(&self) {
        // Reads first, because all workers share the flag and few of them have to write it.
        if !self.answered.load(Ordering::Relaxed) {
            self.answered.store(true, Ordering::Relaxed);
        }
    }

    /// Has the server probed at once, because a request lost its connection. New requests wait for the result.
    pub fn suspect(&self) {
        let newly = self.state.send_if_modified(|state| match state {
            State::Up { suspect, .. } => !replace(suspect, true),
            _ => false,
        });
        if newly {
            self.suspected.notify_one();
        }
    }

    pub fn suspect_if_lost(&self, error: &tokio_postgres::Error) {
        if connection_is_lost(error) {
            self.suspect();
        }
    }

    /// Records that a request could not open a session. The sessions that are open may work.
    pub fn record_refusal(&self) {
        self.refused.store(true, Ordering::Relaxed);
    }

    /// Ends the grace period.
    pub fn give_up(&self) {
        self.state.send_if_modified(|state| {
            let State::Missing { reason, .. } = state else {
                return false;
            };
            let reason = reason.clone();
            *state = State::Down { reason };
            true
        });
    }

    /// Connects. The session ends when the server goes down or the route leads elsewhere.
    pub fn connect(self: Arc<Self>, route: Route) -> Connecting {
        let (config, tls) = (self.config.clone(), self.tls.clone());
        connect(config, tls, async move { self.left(&route).await })
    }

    /// Waits for a result from the server, but only while the route leads to it and it is not down.
    pub async fn unless_left<T>(
        &self,
        route: &Route,
        result: impl Future<Output = T>,
    ) -> Result<T, Error> {
        tokio::select! {
            biased;
            result = result => Ok(result),
            () = self.left(route) => Err(self.unavailable()),
        }
    }

    async fn left(&self, route: &Route) {
        let (mut route, mut state) = (route.clone(), self.state.subscribe());
        // Either wait fails only when the service ends.
        tokio::select! {
            _ = state.wait_for(|state| matches!(state, State::Down { .. })) => (),
            _ = route.wait_for(|server| **server != *self) => (),
        }
    }

    fn unavailable(&self) -> Error {
        Error::unavailable(format!("{} {}", self.name, self.state()))
    }
}

/// Waits until the current server is up. Returns it with whether it accepts writes. Fails if the server is down.
pub async fn available(route: &Route) -> Result<(Arc<Server>, bool), Error> {
    let mut route = route.clone();
    loop {
        let server = route.borrow_and_update().clone();
        let mut state = server.state.subscribe();
        // Cloned, because a sender waits for as long as the value is borrowed.
        let current = state.borrow_and_update().clone();
        match current {
            State::Up {
                writable,
                suspect: false,
                ..
            } => return Ok((server, writable)),
            State::Down { .. } => return Err(server.unavailable()),
            _ => (),
        }
        tokio::select! {
            _ = route.changed() => (),
            _ = state.changed() => (),
        }
    }
}
