//! Statements on a pool of connections to one server, for writes and lists, and the check of the schema.

use std::sync::Arc;
use std::time::{Duration, Instant};

use deadpool_postgres::{
    Connect, Manager, ManagerConfig, Object, Pool, PoolError, RecyclingMethod, Runtime,
};
use futures_util::future::join_all;
use refinery::embed_migrations;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Config, Row};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::error::{ApiError, connection_is_lost, describe, is_refusal, statement_is_stale};
use crate::servers::{Connecting, Server, Way, available};
use crate::settings::Settings;

embed_migrations!("sql");

/// How long a statement that has others in its transaction waits for a lock.
pub const LOCK_LIMIT: Duration = Duration::from_millis(50);
/// What a transaction of many statements begins with. Each may take an eighth of what it may alone, so that 16 stay within the
/// limit for their answers.
fn begin(statement_timeout: Duration) -> String {
    format!(
        "begin; set local lock_timeout = {}; set local statement_timeout = {}",
        LOCK_LIMIT.as_millis(),
        (statement_timeout / 8).as_millis().max(1)
    )
}

pub type Parameters<'a> = &'a [&'a (dyn ToSql + Sync)];

/// A way to a server, with a pool of connections. Connections live on the thread that made them, and end with it: every
/// thread has a pool of its own.
#[derive(Clone)]
pub struct Database {
    way: Way,
    tls: MakeRustlsConnect,
    pool: Pool,
    /// Places for those who wait for a connection.
    queue: Arc<Semaphore>,
    queue_size: usize,
    /// The connections that may read at a time: enough to keep the processors busy. With more, statements get into each
    /// other's way and some take many times as long as others; and slow ones leave nothing over for writes.
    readers: Arc<Semaphore>,
    pub pool_wait: Duration,
    connect_timeout: Duration,
    begin: String,
    /// The server ends a statement by itself after its own limit. This one, a second later, is for a server that is gone.
    pub answer_timeout: Duration,
}

impl Database {
    /// Prepares the way without connecting yet.
    pub fn new(
        settings: &Settings,
        tls: &MakeRustlsConnect,
        way: Way,
        pool_size: usize,
    ) -> Result<Self, String> {
        let recycling = ManagerConfig {
            recycling_method: RecyclingMethod::Fast,
        };
        let manager = Manager::from_connect(Config::new(), Connector(way.clone()), recycling);
        let pool = Pool::builder(manager)
            .max_size(pool_size)
            .wait_timeout(Some(settings.pool_wait))
            .create_timeout(Some(settings.connect_timeout))
            .recycle_timeout(Some(settings.connect_timeout))
            .runtime(Runtime::Tokio1)
            .build()
            .map_err(|error| describe(&error))?;
        Ok(Self {
            way,
            tls: tls.clone(),
            pool,
            queue: Arc::new(Semaphore::new(settings.queue_size)),
            queue_size: settings.queue_size,
            readers: Arc::new(Semaphore::new(pool_size.div_ceil(4))),
            pool_wait: settings.pool_wait,
            connect_timeout: settings.connect_timeout,
            begin: begin(settings.statement_timeout),
            answer_timeout: settings.statement_timeout + Duration::from_secs(1),
        })
    }

    /// How many connections there are, how many of them nobody uses, and how many requests wait for one.
    pub fn pool_status(&self) -> [usize; 3] {
        let status = self.pool.status();
        let waiting = self.queue_size - self.queue.available_permits();
        [status.size, status.available, waiting]
    }

    pub fn server(&self) -> Arc<Server> {
        self.way.borrow().clone()
    }

    /// The server, once it can be reached, and whether it takes writes.
    pub async fn available(&self) -> Result<(Arc<Server>, bool), ApiError> {
        self.connected_within_limit(available(&self.way)).await
    }

    /// The server, once it can be reached. An error if it takes no writes.
    pub async fn writable(&self) -> Result<Arc<Server>, ApiError> {
        match self.available().await? {
            (server, true) => Ok(server),
            (_, false) => Err(ApiError::unavailable("the database is read-only")),
        }
    }

    /// A connection outside the pool. TLS and authentication count against the limit too.
    pub async fn connect(&self, server: Arc<Server>) -> Result<Client, ApiError> {
        let connecting = server.clone().connect(self.way.clone());
        let connected = self.connected_within_limit(async {
            let connected = server.unless_left(&self.way, connecting).await?;
            connected.map_err(|error| {
                server.doubt_if_lost(&error);
                ApiError::no_connection(&error)
            })
        });
        Ok(connected.await?.0)
    }

    /// Waits for a connection that is ready for use no longer than making one may take.
    async fn connected_within_limit<T>(
        &self,
        connecting: impl Future<Output = Result<T, ApiError>>,
    ) -> Result<T, ApiError> {
        let late = |_| ApiError::unavailable("no connection to the database within the limit");
        timeout(self.connect_timeout, connecting)
            .await
            .map_err(late)?
    }

    /// Waits for an answer no longer than any statement may take.
    pub async fn within_limit<T>(&self, answer: impl Future<Output = T>) -> Result<T, ApiError> {
        self.within_limits(1, answer).await
    }

    async fn within_limits<T>(
        &self,
        limits: u32,
        answer: impl Future<Output = T>,
    ) -> Result<T, ApiError> {
        let late = |_| ApiError::unavailable("no answer from the database within the limit");
        timeout(self.answer_timeout * limits, answer)
            .await
            .map_err(late)
    }

    /// Runs one statement that only reads.
    pub async fn read(&self, sql: &str, parameters: Parameters<'_>) -> Result<Vec<Row>, ApiError> {
        let mut rows = self.run(&[(sql, parameters)], false).await?;
        Ok(rows.pop().unwrap_or_default())
    }

    /// Runs statements that write, at most 16, and returns the rows of each. More than one are a transaction, in which all have
    /// to be quick, because they wait for each other.
    pub async fn write(
        &self,
        statements: &[(&str, Parameters<'_>)],
    ) -> Result<Vec<Vec<Row>>, ApiError> {
        self.run(statements, true).await
    }

    /// Runs statements on a connection of their own, and gives the connection back before it returns. What has not been done
    /// for want of a connection is tried once more: a write that was sent only if the server said so itself.
    async fn run(
        &self,
        statements: &[(&str, Parameters<'_>)],
        writes: bool,
    ) -> Result<Vec<Vec<Row>>, ApiError> {
        let mut retried = false;
        let mut lost_at = None;
        let places = statements.len().min(self.queue_size);
        let places = u32::try_from(places).map_err(ApiError::internal)?;
        loop {
            let waiting = self.queue.try_acquire_many(places);
            let waiting = waiting.map_err(ApiError::crowded)?;
            let server = if writes {
                self.writable().await?
            } else {
                self.available().await?.0
            };
            let _reader = if writes {
                None
            } else {
                let reader = timeout(self.pool_wait, self.readers.acquire()).await;
                let late = |_| ApiError::unavailable("too many are reading");
                Some(reader.map_err(late)?)
            };
            let connected = server.unless_left(&self.way, self.pool.get()).await;
            drop(waiting);
            let connected = match connected {
                Ok(connected) => connected,
                Err(left) if retried => return Err(left),
                Err(_) => {
                    retried = true;
                    continue;
                }
            };
            let mut busy = Busy {
                client: None,
                tls: &self.tls,
            };
            let client = match connected {
                Ok(client)
                    if lost_at
                        .is_some_and(|lost_at| Object::metrics(&client).created < lost_at) =>
                {
                    // Likely lost as well.
                    drop(Object::take(client));
                    continue;
                }
                Ok(client) => busy.client.insert(client),
                Err(PoolError::Backend(error)) if connection_is_lost(&error) && !retried => {
                    server.doubt();
                    retried = true;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let mut progress = Progress::default();
            let answer = execute(client, &self.begin, statements, &mut progress);
            // Of many statements, each may take a while.
            let limits = if statements.len() > 1 { 2 } else { 1 };
            let error = match self.within_limits(limits, answer).await? {
                Ok(rows) => {
                    server.answered();
                    busy.give_back();
                    return Ok(rows);
                }
                Err(error) => error,
            };
            let lost = connection_is_lost(&error);
            if lost {
                server.doubt();
                lost_at = Some(Instant::now());
            } else if !progress.transaction_open {
                busy.give_back();
            }
            let stale = statement_is_stale(&error);
            if stale {
                self.pool.manager().statement_caches.clear();
            }
            let not_done = stale || lost && (is_refusal(&error) || !writes || !progress.sent);
            if retried || !not_done {
                return Err(error.into());
            }
            retried = true;
        }
    }

    /// Why this service cannot work with the schema that it found, in a sentence that names the mend. Or, where it can, the
    /// first migration that this release does not know: the schema is upgraded before the service.
    pub async fn check_schema(&self) -> Result<Option<String>, String> {
        let unreachable = |error: ApiError| {
            format!(
                "cannot connect to the database: {error}: check that it runs, and host, port, user and password in DATABASE_URL"
            )
        };
        self.available().await.map_err(unreachable)?;
        let sql = "select version, name, checksum from refinery_schema_history order by version";
        let mut retried = false;
        let rows = loop {
            let client = self.pool.get().await;
            let client = client.map_err(|error| unreachable(error.into()))?;
            let rows = self.within_limit(client.query(sql, &[])).await;
            match rows.map_err(|error| error.to_string())? {
                // Of a session that somebody has ended since.
                Err(error) if connection_is_lost(&error) && !retried => {
                    drop(Object::take(client));
                    retried = true;
                }
                rows => break rows,
            }
        };
        let migrate = "run: refinery migrate -e DATABASE_URL -p sql -g -d -m";
        let applied = match rows {
            Ok(rows) => rows,
            Err(error) if error.code().is_some_and(|code| code.code() == "42P01") => {
                return Err(format!("the database has no schema yet: {migrate}"));
            }
            Err(error) => {
                return Err(format!(
                    "cannot read refinery_schema_history: {}",
                    describe(&error)
                ));
            }
        };
        let read = |row: &Row| -> Result<_, tokio_postgres::Error> {
            Ok((
                row.try_get::<_, i32>("version")?,
                row.try_get::<_, String>("name")?,
                row.try_get::<_, String>("checksum")?,
            ))
        };
        let applied = applied
            .iter()
            .map(read)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| describe(&error))?;
        let runner = migrations::runner();
        let mut built = runner.get_migrations().clone();
        built.sort();
        for (migration, (version, name, checksum)) in built.iter().zip(&applied) {
            if migration.version() != *version || migration.checksum().to_string() != *checksum {
                return Err(format!(
                    "migration V{version}__{name} of the database is not the one that this service was built with: \
                     run the service and the migrations of the same release"
                ));
            }
        }
        if let Some(behind) = built.get(applied.len()) {
            return Err(format!(
                "the database is behind, it lacks {behind}: {migrate}"
            ));
        }
        let ahead = applied.get(built.len());
        Ok(ahead.map(|(version, name, _)| format!("V{version}__{name}")))
    }
}

/// How far it came, also where it failed.
#[derive(Default)]
struct Progress {
    /// The connection is of no further use.
    transaction_open: bool,
    /// What was not sent has not been done.
    sent: bool,
}

/// Runs one statement, or several in a transaction.
async fn execute(
    client: &deadpool_postgres::Client,
    begin: &str,
    statements: &[(&str, Parameters<'_>)],
    progress: &mut Progress,
) -> Result<Vec<Vec<Row>>, tokio_postgres::Error> {
    let several = statements.len() > 1;
    if several {
        progress.transaction_open = true;
        client.batch_execute(begin).await?;
    }
    let mut prepared = Vec::with_capacity(statements.len());
    for (sql, _) in statements {
        // The first time, this waits for locks as well.
        prepared.push(client.prepare_cached(sql).await?);
    }
    progress.sent = true;
    // Each is sent when it is first asked for its answer, in this order, and all have to be asked until the last has come.
    let queries = prepared.iter().zip(statements);
    let queries =
        join_all(queries.map(|(statement, (_, parameters))| client.query(statement, parameters)));
    if !several {
        return queries.await.into_iter().collect();
    }
    let (rows, committed) = futures_util::join!(queries, client.batch_execute("commit"));
    progress.transaction_open = committed.is_err();
    let rows = rows.into_iter().collect::<Result<_, _>>()?;
    committed?;
    Ok(rows)
}

/// How the pool connects.
struct Connector(Way);

impl Connect for Connector {
    fn connect(&self, _: &Config) -> Connecting {
        let server = self.0.borrow().clone();
        server.connect(self.0.clone())
    }
}

/// A pooled connection with a statement under way. Dropped before it is given back, because the request was dropped or went
/// wrong, the statement is cancelled and the connection closed behind it: the driver would go on with it, for the next to wait for.
struct Busy<'a> {
    client: Option<Object>,
    tls: &'a MakeRustlsConnect,
}

impl Busy<'_> {
    fn give_back(mut self) {
        self.client = None;
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        if let Some(client) = self.client.take() {
            let client = Object::take(client);
            if client.is_closed() {
                return;
            }
            let (cancel, tls) = (client.cancel_token(), self.tls.clone());
            // At the very end of a stop there is nothing left that could send the cancellation.
            let Ok(runtime) = tokio::runtime::Handle::try_current() else {
                return;
            };
            runtime.spawn(async move {
                // The connection stays until the statement has ended: a pooler forgets who has gone.
                let cancelled = async {
                    cancel.cancel_query(tls).await?;
                    client.batch_execute("").await
                };
                if let Ok(Err(error)) = timeout(Duration::from_secs(5), cancelled).await {
                    log::debug!("a statement was not cancelled: {}", describe(&error));
                }
            });
        }
    }
}

/// TLS that verifies the chain and the name: against a private authority where one is set, else those of the system. Reading
/// these takes some milliseconds, so it is made once for all.
pub fn tls(settings: &Settings) -> Result<MakeRustlsConnect, String> {
    let mut roots = RootCertStore::empty();
    if let Some(file) = &settings.ca_file {
        let wrong = |error| format!("DATABASE_CA_FILE={}: {error}", file.display());
        for certificate in
            CertificateDer::pem_file_iter(file).map_err(|error| wrong(error.to_string()))?
        {
            let certificate = certificate.map_err(|error| wrong(error.to_string()))?;
            roots
                .add(certificate)
                .map_err(|error| wrong(error.to_string()))?;
        }
        if roots.is_empty() {
            return Err(wrong("holds no certificate".to_owned()));
        }
    } else {
        // A system without authorities matters only where the server wants TLS, and is named then.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    }
    let provider = rustls::crypto::ring::default_provider().into();
    let builder = ClientConfig::builder_with_provider(provider);
    let builder = builder
        .with_safe_default_protocol_versions()
        .map_err(|error| describe(&error))?;
    let config = builder.with_root_certificates(roots).with_no_client_auth();
    Ok(MakeRustlsConnect::new(config))
}
