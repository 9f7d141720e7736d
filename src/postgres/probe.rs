//! Asks one server whether it accepts writes and where it is in the write-ahead log.

use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future;
use tokio::time::{Instant, timeout};
use tokio_postgres::config::TargetSessionAttrs;
use tokio_postgres::{Client, SimpleQueryMessage};

use super::connect::connect;
use super::error::{connection_is_lost, describe};
use super::server::{Server, State};

/// Far more than a healthy server needs.
pub const TIMEOUT: Duration = Duration::from_secs(1);

/// The position is read before the timeline: a standby that changes to the primary's timeline has replayed nothing else before.
///
/// Plain roles see the timeline of a standby late, in its control file. `received_tli` is null for them, see
/// docs/high-availability.md. A standby receives a timeline only if all that it has replayed is part of it.
const QUERY: &str = "select current_setting('transaction_read_only') = 'off' as writable, \
    case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_flush_lsn() end - '0/0' as position, \
    case when pg_is_in_recovery() then greatest((pg_control_checkpoint()).timeline_id, \
            (pg_control_recovery()).min_recovery_end_timeline, (select received_tli from pg_stat_wal_receiver)) \
        else ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int end as timeline, \
    case when pg_is_in_recovery() \
        then coalesce(extract(epoch from clock_timestamp() - pg_last_xact_replay_timestamp()), 'infinity') end as replay_age";

/// How long new sessions must fail until the server counts as refusing them.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a new session is tried while they fail.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// The session of the probes of one server.
#[derive(Default)]
pub struct Session {
    pub client: Option<Client>,
    refusal: Option<Refusal>,
}

/// Set if the last try to open a session failed.
struct Refusal {
    since: Instant,
    tried: Instant,
    text: String,
}

pub struct Probe {
    pub writable: bool,
    pub wal: WalPosition,
}

/// Where a server is in the write-ahead log.
#[derive(Clone, Copy)]
pub struct WalPosition {
    pub timeline: i32,
    /// In bytes.
    pub position: u64,
    /// Of a standby: how long ago the last transaction that it has replayed was committed.
    pub replay_age: Option<Duration>,
}

pub struct ProbeError {
    pub text: String,
    /// Whether the server works for the sessions it has.
    pub is_up: bool,
    /// Set if the server answers but is not of the kind that its URL asks for.
    pub wal: Option<WalPosition>,
}

impl ProbeError {
    pub fn new(text: &str) -> Self {
        Self {
            text: text.to_owned(),
            is_up: false,
            wal: None,
        }
    }

    fn from_postgres(error: &tokio_postgres::Error) -> Self {
        Self {
            // A refusal of one more connection, for example.
            is_up: error.code().is_some() && !connection_is_lost(error),
            ..Self::new(&describe(error))
        }
    }
}

impl Session {
    /// Why new sessions have failed for some seconds.
    pub fn refusal(&self) -> Option<String> {
        let refusal = self.refusal.as_ref()?;
        let lasts = refusal.since.elapsed() >= REFUSAL_TIMEOUT;
        lasts.then(|| refusal.text.clone())
    }

    /// Whether to open another session: a request could not open one, or the last try failed.
    fn must_retry(&self, server: &Server) -> bool {
        let refused = server.refused.swap(false, Ordering::Relaxed);
        match &self.refusal {
            Some(refusal) => refusal.tried.elapsed() >= RETRY_INTERVAL,
            None => refused,
        }
    }

    async fn open(&mut self, server: &Server) -> Result<Client, ProbeError> {
        let opened = open(server).await;
        let now = Instant::now();
        self.refusal = opened.as_ref().err().map(|error| Refusal {
            since: self.refusal.as_ref().map_or(now, |refusal| refusal.since),
            tried: now,
            text: error.text.clone(),
        });
        opened
    }
}

/// Probes a server on its session. If the session was ended, probes once more on a new one.
pub async fn probe(server: &Server, session: &mut Session) -> Result<Probe, ProbeError> {
    if session.client.is_some()
        && session.must_retry(server)
        && let Ok(client) = session.open(server).await
    {
        session.client = Some(client);
    }
    loop {
        let (client, reused) = match session.client.take() {
            Some(client) => (client, true),
            None => (session.open(server).await?, false),
        };
        server.answered.store(false, Ordering::Relaxed);
        let answer = timeout(TIMEOUT, ask(&client, server.is_proxy)).await;
        let silent = |_| ProbeError {
            // A probe may be late under load.
            is_up: server.answered.load(Ordering::Relaxed),
            ..ProbeError::new("no answer within a second")
        };
        let probe = match answer.map_err(silent)? {
            Err(error) if reused && connection_is_lost(&error) => continue,
            probe => probe.map_err(|error| ProbeError::from_postgres(&error))?,
        };
        session.client = Some(client);
        let probe =
            probe.ok_or_else(|| ProbeError::new("the answer to the probe cannot be read"))?;
        let wrong_kind = |text| ProbeError {
            wal: Some(probe.wal),
            ..ProbeError::new(text)
        };
        return match (server.config.get_target_session_attrs(), probe.writable) {
            (TargetSessionAttrs::ReadWrite, false) => Err(wrong_kind("does not accept writes")),
            (TargetSessionAttrs::ReadOnly, true) => Err(wrong_kind("accepts writes")),
            _ => Ok(probe),
        };
    }
}

async fn open(server: &Server) -> Result<Client, ProbeError> {
    let mut config = server.config.clone();
    // Otherwise the driver would refuse a standby, and each probe of it would need a new session.
    config.target_session_attrs(TargetSessionAttrs::Any);
    let limit = match *server.state.borrow() {
        State::Down { .. } => server.connect_timeout,
        // Requests wait for the result.
        _ => server.connect_timeout.min(TIMEOUT),
    };
    let connecting = timeout(
        limit,
        connect(config, server.tls.clone(), future::pending()),
    );
    let late = |_| ProbeError::new("no connection to the database within the limit");
    match connecting.await.map_err(late)? {
        Ok((client, _)) => Ok(client),
        Err(error) => Err(ProbeError::from_postgres(&error)),
    }
}

async fn ask(client: &Client, is_proxy: bool) -> Result<Option<Probe>, tokio_postgres::Error> {
    if is_proxy {
        // The proxy answers these itself, so one server that is down does not make it count as down.
        client.batch_execute("begin").await?;
        client.batch_execute("rollback").await?;
        return Ok(Some(Probe {
            writable: true,
            wal: WalPosition {
                timeline: 0,
                position: 0,
                replay_age: None,
            },
        }));
    }
    let messages = client.simple_query(QUERY).await?;
    Ok(messages.iter().find_map(read))
}

fn read(message: &SimpleQueryMessage) -> Option<Probe> {
    let SimpleQueryMessage::Row(row) = message else {
        return None;
    };
    let replay_age = row.get("replay_age").map(|seconds| {
        // Negative if the clock of the primary is ahead.
        let seconds = seconds
            .parse()
            .map_or(f64::INFINITY, |age: f64| age.max(0.0));
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    });
    Some(Probe {
        writable: row.get("writable")? == "t",
        wal: WalPosition {
            timeline: row.get("timeline")?.parse().ok()?,
            // Null on a server that has not replayed anything yet.
            position: row
                .get("position")
                .and_then(|position| position.parse().ok())
                .unwrap_or(0),
            replay_age,
        },
    })
}
