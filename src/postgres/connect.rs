//! Opens a session: TLS, and the settings that every session has.

use std::future::poll_fn;
use std::time::Duration;

use actix_web::rt;
use anyhow::{Context, Result, ensure};
use futures_util::future::BoxFuture;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use tokio::task::JoinHandle;
use tokio_postgres::config::Host;
use tokio_postgres::error::DbError;
use tokio_postgres::{AsyncMessage, Client, Config};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::error::describe;
use crate::settings::Settings;

pub type Connecting = BoxFuture<'static, Result<(Client, JoinHandle<()>), tokio_postgres::Error>>;

/// Connects. The session ends when `close` does. Its task runs on the calling worker, which saves a thread switch for each
/// message. Boxed, because the future is large and would be part of every request.
pub fn connect(
    config: Config,
    tls: MakeRustlsConnect,
    close: impl Future<Output = ()> + Send + 'static,
) -> Connecting {
    Box::pin(async move {
        let (client, mut connection) = config.connect(tls).await?;
        let task = rt::spawn(async move {
            let ended = async {
                while let Some(message) = poll_fn(|cx| connection.poll_message(cx)).await {
                    match message {
                        Ok(AsyncMessage::Notice(notice)) if is_unsafe(&notice) => {
                            log::warn!("a promotion may undo a write: {}", notice.message());
                            return;
                        }
                        Ok(AsyncMessage::Notice(notice)) => log::info!("{notice}"),
                        Ok(_) => (),
                        // The requests in flight get the error too, and report it.
                        Err(error) => {
                            log::debug!("a database connection ended: {}", describe(&error));
                            return;
                        }
                    }
                }
            };
            // Requests in flight fail as if the connection were lost.
            tokio::select! {
                () = ended => (),
                () = close => (),
            }
        });
        Ok((client, task))
    })
}

/// Whether PostgreSQL cancelled a commit that waits for its synchronous standby. It then reports success, but a promotion may undo
/// the write. The message may be translated, and its code is that of any warning.
fn is_unsafe(notice: &DbError) -> bool {
    notice.routine() == Some("SyncRepWaitForLSN")
}

/// `host:port`.
pub fn address(config: &Config) -> String {
    let host = config
        .get_hosts()
        .first()
        .map_or(String::new(), |host| match host {
            Host::Tcp(host) => host.clone(),
            Host::Unix(folder) => folder.display().to_string(),
        });
    format!("{host}:{}", config.get_ports().first().unwrap_or(&5432))
}

/// Adds the settings of the service to those of the URL.
pub fn with_session_settings(mut config: Config, settings: &Settings) -> Config {
    // A generic plan always uses the index of a filter, also when statistics favour another path. A short batch of ids is not
    // worth a plan of its own. The cost says that most pages are cached: otherwise a plan that was made for a small table reads and
    // sorts all of it for each page of the change feed.
    // The path does not contain public, so no function or operator that is placed there is ever called. PostgreSQL uses the last
    // of several values. So an option of the URL wins over the settings before it, but not over the path.
    let options = format!(
        "-c statement_timeout={} -c plan_cache_mode=force_generic_plan -c random_page_cost=1.1 {} \
         -c search_path=pg_catalog,pg_temp",
        settings.statement_timeout.as_millis(),
        config.get_options().unwrap_or_default()
    );
    config
        .options(options)
        .application_name("listing-api")
        .connect_timeout(settings.connect_timeout)
        .keepalives_idle(Duration::from_secs(30));
    config
}

/// TLS that verifies the certificate chain and the host name, against `DATABASE_CA_FILE` or the authorities of the system.
/// Made once, because reading the authorities takes some milliseconds.
pub fn tls(settings: &Settings) -> Result<MakeRustlsConnect> {
    let mut roots = RootCertStore::empty();
    if let Some(file) = &settings.ca_file {
        let name = || format!("DATABASE_CA_FILE={}", file.display());
        for certificate in CertificateDer::pem_file_iter(file).with_context(name)? {
            roots
                .add(certificate.with_context(name)?)
                .with_context(name)?;
        }
        ensure!(!roots.is_empty(), "{} contains no certificate", name());
    } else {
        // Missing authorities matter only if the server uses TLS. Connecting then fails with the reason.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    }
    let provider = rustls::crypto::ring::default_provider().into();
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(MakeRustlsConnect::new(config))
}
