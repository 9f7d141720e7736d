//! The servers of PostgreSQL: which of them takes the writes, which replicas can be read, and connecting to them.
//!
//! A task for each server keeps one connection and asks a question on it, four times a second. What becomes of requests
//! follows from the answers: those to a server that went away a moment ago wait for it, for as long as for a free connection,
//! so that a restart costs time and no error; then they are refused at once, without asking, so that a server that comes back
//! meets no crowd. Where several servers may be the primary, another one takes over as soon as it says that it takes writes.

use std::collections::VecDeque;
use std::fmt::{self, Display};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use actix_web::rt;
use futures_util::future::{self, BoxFuture};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_postgres::config::{Host, TargetSessionAttrs};
use tokio_postgres::{Client, Config, SimpleQueryMessage};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::error::{ApiError, connection_is_lost, describe};
use crate::settings::Settings;

const INTERVAL: Duration = Duration::from_millis(250);

/// A server that works has nothing to do for the question.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);

/// Whether the server takes writes, and how far the write-ahead log has come, in bytes.
const QUESTION: &str = "select current_setting('transaction_read_only') = 'off' as writable, \
    case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_flush_lsn() end - '0/0' as position";

pub struct Servers {
    /// Those of `DATABASE_URL`, of which one is the primary.
    candidates: Vec<Arc<Server>>,
    primary: watch::Sender<Arc<Server>>,
    /// Those of `DATABASE_READ_URL`. Each is the one at the end of its way, as the primary is of its own.
    replicas: Vec<watch::Sender<Arc<Server>>>,
    /// When the primary first was how far, for as long as a replica may reasonably be behind.
    positions: Mutex<VecDeque<(Instant, u64)>>,
    replica_lag: Duration,
}

/// The way to the primary, wherever it moves, or to a replica.
pub type Way = watch::Receiver<Arc<Server>>;

pub struct Server {
    pub name: String,
    config: Config,
    tls: MakeRustlsConnect,
    connect_timeout: Duration,
    /// How long requests wait for it when it goes away.
    patience: Duration,
    state: watch::Sender<State>,
    /// A request could not reach it.
    doubt: Notify,
    /// A request got an answer since it was asked.
    answered: AtomicBool,
}

#[derive(Clone)]
pub enum State {
    /// It answered. In doubt since, where a request could not reach it.
    Up {
        writable: bool,
        lag: Duration,
        in_doubt: bool,
    },
    /// Gone for a moment: requests wait.
    Missing { since: Instant, why: Why },
    /// Gone: requests are refused.
    Down { why: Why },
}

/// Why requests do not go to a server.
#[derive(Clone)]
pub struct Why {
    text: String,
    /// How far it is behind, where it answers, but is not the kind of server that its URL asks for.
    lag: Option<Duration>,
}

impl State {
    /// Where it answers, whether it takes writes.
    pub fn kind(&self) -> Option<bool> {
        match self {
            Self::Up { writable, .. } => Some(*writable),
            _ => None,
        }
    }

    /// Where it answers, how long ago the primary was where it is now.
    pub fn lag(&self) -> Option<Duration> {
        match self {
            Self::Up { lag, .. } => Some(*lag),
            Self::Missing { why, .. } | Self::Down { why } => why.lag,
        }
    }
}

impl Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Up { writable: true, .. } => return f.write_str("takes reads and writes"),
            Self::Up { .. } => f.write_str("takes reads only")?,
            Self::Missing { why, .. } | Self::Down { why } if why.lag.is_some() => {
                f.write_str(&why.text)?;
            }
            Self::Missing { why, .. } | Self::Down { why } => write!(f, "is gone: {}", why.text)?,
        }
        match self.lag() {
            None | Some(Duration::ZERO) => Ok(()),
            Some(Duration::MAX) => f.write_str(", further behind than is known"),
            Some(lag) => write!(f, ", {:.3} s behind", lag.as_secs_f64()),
        }
    }
}

struct Answer {
    writable: bool,
    position: u64,
}

impl Servers {
    /// Asks every server for the first time, then goes on asking.
    pub async fn watch(settings: &Settings, tls: &MakeRustlsConnect) -> Result<Arc<Self>, String> {
        let server = |config: &Config, patience| {
            Arc::new(Server {
                name: name(config),
                config: prepared(config.clone(), settings),
                tls: tls.clone(),
                connect_timeout: settings.connect_timeout,
                patience,
                state: watch::Sender::new(State::Down {
                    why: Why {
                        text: "not asked yet".to_owned(),
                        lag: None,
                    },
                }),
                doubt: Notify::new(),
                answered: AtomicBool::new(false),
            })
        };
        let candidates: Vec<_> = settings
            .database
            .iter()
            .map(|config| server(config, settings.pool_wait))
            .collect();
        // Others answer in the place of a replica.
        let replicas = settings
            .replicas
            .iter()
            .map(|config| watch::Sender::new(server(config, Duration::ZERO)));
        let first = candidates
            .first()
            .ok_or("DATABASE_URL names no host")?
            .clone();
        let servers = Arc::new(Self {
            primary: watch::Sender::new(first),
            replicas: replicas.collect(),
            candidates,
            positions: Mutex::default(),
            replica_lag: settings.replica_lag,
        });
        let replicas = servers
            .replicas
            .iter()
            .map(|replica| replica.borrow().clone());
        let all = servers.candidates.iter().cloned().chain(replicas);
        let begun = all.map(|server| async {
            let mut session = None;
            let answer = server.ask(&mut session).await;
            servers.note(&server, answer);
            rt::spawn(servers.clone().keep_asking(server, session));
        });
        future::join_all(begun).await;
        Ok(servers)
    }

    async fn keep_asking(self: Arc<Self>, server: Arc<Server>, mut session: Option<Client>) {
        loop {
            let mut former = None;
            tokio::select! {
                () = sleep(INTERVAL) => (),
                // A server that is shutting down may still answer those whom it knows.
                () = server.doubt.notified() => former = session.take(),
            }
            let answer = {
                let mut asked = std::pin::pin!(server.ask(&mut session));
                if let Ok(answer) = timeout_at(server.end_of_patience(), &mut asked).await {
                    answer
                } else {
                    server.give_up();
                    asked.await
                }
            };
            if matches!(answer, Err(Trouble { there: true, .. })) {
                // There may not be another one for a while.
                session = former;
            }
            let before = server.state();
            self.note(&server, answer);
            let state = server.state();
            match (before.kind(), state.kind()) {
                (before, after) if before == after => (),
                (_, Some(_)) => log::info!("database server {} {state}", server.name),
                (_, None) => log::warn!("database server {} {state}", server.name),
            }
        }
    }

    /// Draws the conclusions from an answer, or from its absence.
    fn note(&self, server: &Arc<Server>, answer: Result<Answer, Trouble>) {
        let before = server.state();
        let state = match answer {
            Ok(Answer { writable, position }) => State::Up {
                writable,
                lag: self.lag(server, position),
                in_doubt: false,
            },
            Err(Trouble {
                text,
                there,
                position,
            }) => {
                let lag = position.map(|position| self.lag(server, position));
                let why = Why { text, lag };
                match before {
                    // Whatever it has against one more connection.
                    State::Up { writable, lag, .. } if there => State::Up {
                        writable,
                        lag,
                        in_doubt: false,
                    },
                    State::Up { .. } if server.patience > Duration::ZERO => State::Missing {
                        since: Instant::now(),
                        why,
                    },
                    State::Missing { since, .. } if since.elapsed() < server.patience => {
                        State::Missing { since, why }
                    }
                    _ => State::Down { why },
                }
            }
        };
        server.state.send_replace(state);
        self.choose_the_primary();
    }

    /// The primary stays the primary while it takes writes. It is not moved on a doubt alone.
    fn choose_the_primary(&self) {
        let writable = |server: &&Arc<Server>| server.state().kind() == Some(true);
        let readable = |server: &&Arc<Server>| server.state().kind().is_some();
        let primary = self.primary.borrow().clone();
        if writable(&&primary) {
            return;
        }
        let down = matches!(primary.state(), State::Down { .. });
        let next = self.candidates.iter().find(writable);
        let next = next.or_else(|| {
            self.candidates
                .iter()
                .find(|server| down && readable(server))
        });
        if let Some(next) = next.filter(|next| !Arc::ptr_eq(next, &primary)) {
            log::warn!(
                "database server {} is the primary now, in place of {}",
                next.name,
                primary.name
            );
            self.primary.send_replace(next.clone());
            self.positions
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clear();
        }
    }

    /// How long ago the primary was where this server is now. The longest of all times if that was before it was asked first.
    fn lag(&self, server: &Arc<Server>, position: u64) -> Duration {
        /// Some twenty minutes.
        const MEMORY: usize = 5000;
        let mut positions = self
            .positions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if Arc::ptr_eq(server, &self.primary.borrow()) {
            if positions
                .back()
                .is_none_or(|(_, newest)| position > *newest)
            {
                positions.push_back((Instant::now(), position));
            }
            if positions.len() > MEMORY {
                positions.pop_front();
            }
            return Duration::ZERO;
        }
        match positions.partition_point(|(_, reached)| *reached <= position) {
            0 => Duration::MAX,
            reached => positions
                .get(reached)
                .map_or(Duration::ZERO, |(since, _)| since.elapsed()),
        }
    }

    pub fn primary(&self) -> Way {
        self.primary.subscribe()
    }

    pub fn replicas(&self) -> impl Iterator<Item = Way> {
        self.replicas.iter().map(watch::Sender::subscribe)
    }

    /// Whether a replica answers and is not too far behind.
    pub fn is_current(&self, replica: &Server) -> bool {
        matches!(*replica.state.borrow(), State::Up { lag, in_doubt: false, .. } if lag <= self.replica_lag)
    }

    /// Every server by its part, for operators.
    pub fn report(&self) -> Vec<(&'static str, Arc<Server>)> {
        let primary = self.primary.borrow().clone();
        let part = |server: &Arc<Server>| {
            if Arc::ptr_eq(server, &primary) {
                "primary"
            } else {
                "standby"
            }
        };
        let candidates = self
            .candidates
            .iter()
            .map(|server| (part(server), server.clone()));
        let replicas = self
            .replicas
            .iter()
            .map(|replica| ("replica", replica.borrow().clone()));
        candidates.chain(replicas).collect()
    }
}

struct Trouble {
    text: String,
    /// Whether the server works all the same.
    there: bool,
    /// Where it answers, but is not the kind of server that its URL asks for.
    position: Option<u64>,
}

impl Trouble {
    fn of(error: &tokio_postgres::Error) -> Self {
        Self {
            there: error.code().is_some() && !connection_is_lost(error),
            ..Self::because(&describe(error))
        }
    }

    fn because(text: &str) -> Self {
        Self {
            text: text.to_owned(),
            there: false,
            position: None,
        }
    }
}

pub type Connecting = BoxFuture<'static, Result<(Client, JoinHandle<()>), tokio_postgres::Error>>;

impl Server {
    pub fn state(&self) -> State {
        self.state.borrow().clone()
    }

    /// Asks on the session that is kept, and once more on a new one where somebody ended that.
    async fn ask(&self, session: &mut Option<Client>) -> Result<Answer, Trouble> {
        loop {
            let (client, kept) = match session.take() {
                Some(client) => (client, true),
                None => (self.connect_to_ask().await?, false),
            };
            self.answered.store(false, Ordering::Relaxed);
            let answer = timeout(ANSWER_LIMIT, client.simple_query(QUESTION));
            let silent = |_| Trouble {
                // Under a crowd of requests the question may come late.
                there: self.answered.load(Ordering::Relaxed),
                ..Trouble::because("no answer within a second")
            };
            match answer.await.map_err(silent)? {
                Err(error) if kept && connection_is_lost(&error) => (),
                Err(error) => return Err(Trouble::of(&error)),
                Ok(messages) => {
                    let answer = messages.iter().find_map(Answer::read);
                    let answer =
                        answer.ok_or_else(|| Trouble::because("an answer that is none"))?;
                    *session = Some(client);
                    let unfit = |text| Trouble {
                        position: Some(answer.position),
                        ..Trouble::because(text)
                    };
                    return match (self.config.get_target_session_attrs(), answer.writable) {
                        (TargetSessionAttrs::ReadWrite, false) => Err(unfit("takes no writes")),
                        (TargetSessionAttrs::ReadOnly, true) => Err(unfit("takes writes")),
                        _ => Ok(answer),
                    };
                }
            }
        }
    }

    async fn connect_to_ask(&self) -> Result<Client, Trouble> {
        let mut config = self.config.clone();
        // Otherwise a new session would be made for each question to a standby, which is asked for when it will take writes.
        config.target_session_attrs(TargetSessionAttrs::Any);
        let limit = match *self.state.borrow() {
            State::Down { .. } => self.connect_timeout,
            // Others wait to hear of it.
            _ => self.connect_timeout.min(ANSWER_LIMIT),
        };
        let connecting = timeout(limit, connect(config, self.tls.clone(), future::pending()));
        let late = |_| Trouble::because("no connection to the database within the limit");
        let connected = connecting.await.map_err(late)?;
        connected
            .map(|(client, _)| client)
            .map_err(|error| Trouble::of(&error))
    }

    /// Until when requests may wait for it.
    fn end_of_patience(&self) -> Instant {
        match *self.state.borrow() {
            State::Missing { since, .. } => since + self.patience,
            // Far enough: asking has limits of its own.
            _ => Instant::now() + self.connect_timeout + 2 * ANSWER_LIMIT,
        }
    }

    fn give_up(&self) {
        self.state.send_if_modified(|state| {
            let State::Missing { why, .. } = state else {
                return false;
            };
            *state = State::Down { why: why.clone() };
            true
        });
    }

    /// Has been heard of by a request.
    pub fn answered(&self) {
        // Looked at first, because all threads look and one has to write.
        if !self.answered.load(Ordering::Relaxed) {
            self.answered.store(true, Ordering::Relaxed);
        }
    }

    /// Has it asked at once, because a request could not reach it. Others wait for its answer.
    pub fn doubt(&self) {
        let doubted = self.state.send_if_modified(|state| match state {
            State::Up { in_doubt, .. } => !std::mem::replace(in_doubt, true),
            _ => false,
        });
        if doubted {
            self.doubt.notify_one();
        }
    }

    pub fn doubt_if_lost(&self, error: &tokio_postgres::Error) {
        if connection_is_lost(error) {
            self.doubt();
        }
    }

    /// Waits for something of it for as long as it is not left.
    pub async fn unless_left<T>(
        &self,
        way: &Way,
        awaited: impl Future<Output = T>,
    ) -> Result<T, ApiError> {
        tokio::select! {
            biased;
            result = awaited => Ok(result),
            () = self.left(way) => Err(self.gone()),
        }
    }

    /// Until it is given up, or is no longer the one at the end of the way.
    async fn left(&self, way: &Way) {
        let mut way = way.clone();
        tokio::select! {
            () = self.given_up() => (),
            _ = way.wait_for(|server| !std::ptr::eq(Arc::as_ptr(server), self)) => (),
        }
    }

    async fn given_up(&self) {
        let mut state = self.state.subscribe();
        // No more news: the service ends.
        let _ = state
            .wait_for(|state| matches!(state, State::Down { .. }))
            .await;
    }

    fn gone(&self) -> ApiError {
        ApiError::unavailable(format!("{} {}", self.name, self.state()))
    }

    /// Connects. The connection ends when the server is left.
    pub fn connect(self: Arc<Self>, way: Way) -> Connecting {
        let (config, tls) = (self.config.clone(), self.tls.clone());
        connect(config, tls, async move { self.left(&way).await })
    }
}

/// The server at the end of a way, once it can be reached. An error if it is given up.
pub async fn available(way: &Way) -> Result<(Arc<Server>, bool), ApiError> {
    let mut way = way.clone();
    loop {
        let server = way.borrow_and_update().clone();
        let mut state = server.state.subscribe();
        // Not looked at under its lock, which whoever tells of a change waits for.
        let found = state.borrow_and_update().clone();
        match found {
            State::Up {
                writable,
                in_doubt: false,
                ..
            } => return Ok((server, writable)),
            State::Down { .. } => return Err(server.gone()),
            _ => (),
        }
        tokio::select! {
            _ = way.changed() => (),
            _ = state.changed() => (),
        }
    }
}

impl Answer {
    fn read(message: &SimpleQueryMessage) -> Option<Self> {
        let SimpleQueryMessage::Row(row) = message else {
            return None;
        };
        Some(Self {
            writable: row.get("writable")? == "t",
            // A server that has not replayed anything yet says nothing.
            position: row
                .get("position")
                .and_then(|position| position.parse().ok())
                .unwrap_or(0),
        })
    }
}

/// Connects, and carries the messages of the connection among the tasks of the worker, where they cost no detour. Boxed,
/// because it is large and rare, and would lie within every request.
fn connect(
    config: Config,
    tls: MakeRustlsConnect,
    of_no_more_use: impl Future<Output = ()> + Send + 'static,
) -> Connecting {
    Box::pin(async move {
        let (client, connection) = config.connect(tls).await?;
        let task = rt::spawn(async move {
            tokio::select! {
                // The requests that this concerns get the error too, and report it.
                ended = connection => if let Err(error) = ended {
                    log::debug!("a database connection ended: {}", describe(&error));
                },
                // All that is under way on it ends as by a lost connection.
                () = of_no_more_use => (),
            }
        });
        Ok((client, task))
    })
}

fn name(config: &Config) -> String {
    let host = config
        .get_hosts()
        .first()
        .map_or(String::new(), |host| match host {
            Host::Tcp(host) => host.clone(),
            Host::Unix(folder) => folder.display().to_string(),
        });
    format!("{host}:{}", config.get_ports().first().unwrap_or(&5432))
}

fn prepared(mut config: Config, settings: &Settings) -> Config {
    // One plan for all values of a statement: it uses the index of a filter also where statistics make another way look
    // shorter, and no short batch of ids is worth a plan of its own.
    let ours = format!(
        "-c statement_timeout={} -c plan_cache_mode=force_generic_plan",
        settings.statement_timeout.as_millis()
    );
    let options = config
        .get_options()
        .map_or(ours.clone(), |options| format!("{options} {ours}"));
    config
        .options(options)
        .application_name("listing-api")
        .connect_timeout(settings.connect_timeout)
        .keepalives_idle(Duration::from_secs(30));
    config
}
