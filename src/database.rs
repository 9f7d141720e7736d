//! The way to PostgreSQL: connecting, the pool of connections for writes and lists, and the check of the schema.

use std::time::Duration;

use actix_web::rt;
use deadpool_postgres::{Connect, Manager, ManagerConfig, Object, Pool, RecyclingMethod, Runtime};
use futures_util::future::BoxFuture;
use refinery::embed_migrations;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Config, Row};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::error::{ApiError, connection_is_lost, describe, statement_is_stale};
use crate::settings::Settings;

embed_migrations!("sql");

pub type Parameters<'a> = &'a [&'a (dyn ToSql + Sync)];

#[derive(Clone)]
pub struct Database {
    config: Config,
    tls: MakeRustlsConnect,
    pool: Pool,
    connect_timeout: Duration,
    /// The server ends a statement by itself after its own limit. This one, a second later, is for a server that is gone.
    answer_timeout: Duration,
}

impl Database {
    /// Prepares the way without connecting yet. A connection lives on the thread that made it, and ends with it: every thread
    /// has a way of its own.
    pub fn new(
        settings: &Settings,
        tls: &MakeRustlsConnect,
        pool_size: usize,
    ) -> Result<Self, String> {
        let mut config = settings.database.clone();
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
        let recycling = ManagerConfig {
            recycling_method: RecyclingMethod::Fast,
        };
        let connector = Connector { tls: tls.clone() };
        let manager = Manager::from_connect(config.clone(), connector, recycling);
        let pool = Pool::builder(manager)
            .max_size(pool_size)
            .wait_timeout(Some(settings.pool_wait))
            .create_timeout(Some(settings.connect_timeout))
            .recycle_timeout(Some(settings.connect_timeout))
            .runtime(Runtime::Tokio1)
            .build()
            .map_err(|error| describe(&error))?;
        let answer_timeout = settings.statement_timeout + Duration::from_secs(1);
        Ok(Self {
            config,
            tls: tls.clone(),
            pool,
            connect_timeout: settings.connect_timeout,
            answer_timeout,
        })
    }

    pub fn pool_status(&self) -> deadpool_postgres::Status {
        self.pool.status()
    }

    /// A connection outside the pool. TLS and authentication count against the limit too.
    pub async fn connect(&self) -> Result<Client, ApiError> {
        let connecting = connect(self.config.clone(), self.tls.clone());
        let connected = self.connected_within_limit(async {
            let unreachable = |error| ApiError::unavailable(describe(&error));
            connecting.await.map_err(unreachable)
        });
        Ok(connected.await?.0)
    }

    /// Waits for a connection that is ready for use no longer than making one may take.
    pub async fn connected_within_limit<T>(
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
        let late = |_| ApiError::timed_out("no answer from the database within the limit");
        timeout(self.answer_timeout, answer).await.map_err(late)
    }

    /// Runs one statement on a connection of its own, and gives the connection back before it returns.
    pub async fn query(&self, sql: &str, parameters: Parameters<'_>) -> Result<Vec<Row>, ApiError> {
        let mut retried = false;
        loop {
            let mut busy = Busy {
                client: None,
                tls: &self.tls,
            };
            let client = busy.client.insert(self.pool.get().await?);
            let answer = self.within_limit(async {
                let statement = client.prepare_cached(sql).await?;
                client.query(&statement, parameters).await
            });
            match answer.await? {
                Err(error) if statement_is_stale(&error) && !retried => retried = true,
                Err(error) => {
                    if !connection_is_lost(&error) {
                        busy.give_back();
                    }
                    return Err(error.into());
                }
                Ok(rows) => {
                    busy.give_back();
                    return Ok(rows);
                }
            }
        }
    }

    /// Why this service cannot work with the schema that it found, in a sentence that names the mend.
    pub async fn check_schema(&self) -> Result<(), String> {
        let client = self
            .connect()
            .await
            .map_err(|error| {
            format!(
                "cannot connect to the database: {error}: check that it runs, and host, port, user and password in DATABASE_URL"
            )
        })?;
        let sql = "select version, name, checksum from refinery_schema_history order by version";
        let rows = self
            .within_limit(client.query(sql, &[]))
            .await
            .map_err(|error| error.to_string())?;
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
        if let Some((version, name, _)) = applied.get(built.len()) {
            return Err(format!(
                "the database is ahead, it has V{version}__{name}: run a newer release of the service"
            ));
        }
        Ok(())
    }
}

/// How the pool connects.
struct Connector {
    tls: MakeRustlsConnect,
}

impl Connect for Connector {
    fn connect(&self, config: &Config) -> Connecting {
        connect(config.clone(), self.tls.clone())
    }
}

type Connecting = BoxFuture<'static, Result<(Client, JoinHandle<()>), tokio_postgres::Error>>;

/// Connects, and carries the messages of the connection among the tasks of the worker, where they cost no detour. Boxed,
/// because it is large and rare, and would lie within every request.
fn connect(config: Config, tls: MakeRustlsConnect) -> Connecting {
    Box::pin(async move {
        let (client, connection) = config.connect(tls).await?;
        let task = rt::spawn(async move {
            // The requests that this concerns get the error too, and report it.
            if let Err(error) = connection.await {
                log::debug!("a database connection ended: {}", describe(&error));
            }
        });
        Ok((client, task))
    })
}

/// A pooled connection with a statement under way. Dropped before it is given back, because the request was dropped or went
/// wrong, the statement is cancelled and the connection closed: the driver would go on with it, for the next to wait for.
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
            let (cancel, tls) = (client.cancel_token(), self.tls.clone());
            drop(client);
            // At the very end of a stop there is nothing left that could send the cancellation.
            let Ok(runtime) = tokio::runtime::Handle::try_current() else {
                return;
            };
            runtime.spawn(async move {
                if let Ok(Err(error)) =
                    timeout(Duration::from_secs(5), cancel.cancel_query(tls)).await
                {
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
