//! Starts the service: settings, schema check, listeners. Then serves until a signal stops it.

use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::Ordering;
use std::time::Duration;

use actix_http::{HttpService, KeepAlive, Protocol};
use actix_server::{Server, ServerBuilder};
use actix_service::{ServiceFactoryExt, fn_service, map_config};
use actix_web::dev::AppConfig;
use actix_web::middleware::{Compress, from_fn};
use actix_web::rt::net::TcpStream;
use actix_web::web::Data;
use actix_web::{App, HttpServer, rt};
use anyhow::{Context, Result, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::SockRef;
use tokio::net::TcpSocket;
use tokio::signal::unix::{SignalKind, signal};

use crate::admin::{self, Stopping};
use crate::api::{self, Feed};
use crate::check::{Checked, check};
use crate::http::connection::Connection;
use crate::http::metrics;
use crate::http::middleware::middleware;
use crate::postgres::Cluster;
use crate::settings::{AuthMode, Settings};

/// Runs the service until a signal stops it. With `check_only`, only verifies that it could run.
#[expect(
    clippy::missing_errors_doc,
    reason = "the error is the reason, for the operator"
)]
pub async fn run(check_only: bool) -> Result<()> {
    let settings = Data::new(Settings::from_env()?);
    let cluster = Data::new(Cluster::start(&settings).await?);
    let Checked { warnings, servers } = check(&cluster, &settings).await?;
    if check_only {
        ensure!(warnings.is_empty(), "{}", warnings.join("\n"));
        let auth = settings.auth;
        let valid = if settings.sharding_proxy {
            "the settings are valid, and the proxy answers: check each of its servers with SHARDING_PROXY=off"
        } else {
            "settings, database and schema are valid"
        };
        println!("{}\n{valid}; {auth}", servers.join("\n"));
        return Ok(());
    }
    for warning in warnings {
        log::warn!("{warning}");
    }
    let stop = stop_signal()?;
    let (api_listener, listen) = bind("LISTEN_ADDR", settings.listen)?;
    let (admin_listener, admin_listen) = bind("ADMIN_ADDR", settings.admin)?;
    metrics::register()?;
    let stopping = Data::new(Stopping::default());
    let feed = Feed::start(cluster.clone())?;
    let api = serve_api(
        api_listener,
        settings.clone(),
        cluster.clone(),
        feed.clone(),
    )?;
    let admin = serve_admin(admin_listener, cluster.clone(), stopping.clone())?;
    for server in servers {
        log::info!("{server}");
    }
    // On a loopback address too: a proxy in front of it may be open to anyone.
    if settings.auth == AuthMode::Off {
        log::warn!("AUTH=off: anyone who can reach {listen}, also through a proxy, can write");
    }
    log::info!(
        "serving on http://{listen}, docs on http://{listen}/docs, health and metrics on http://{admin_listen}"
    );

    let (api_handle, admin_handle) = (api.handle(), admin.handle());
    rt::spawn(async move {
        stop.await;
        log::info!(
            "stopping: not ready, then no new connections, then waiting for requests in flight"
        );
        stopping.0.store(true, Ordering::Relaxed);
        rt::time::sleep(settings.shutdown_delay).await;
        // After the delay, so that clients that reconnect reach another instance.
        feed.stop();
        api_handle.stop(true).await;
        admin_handle.stop(false).await;
    });
    let (api, admin) = futures_util::join!(api, admin);
    api.and(admin)?;
    log::info!("stopped");
    Ok(())
}

/// On each worker, an app with the worker's own database connections.
fn serve_api(
    listener: TcpListener,
    settings: Data<Settings>,
    cluster: Data<Cluster>,
    feed: Data<Feed>,
) -> Result<Server> {
    let workers = settings.workers;
    let max_connections = max_connections(&settings)?;
    let shutdown_timeout = settings.shutdown_timeout.as_millis().div_ceil(1000);
    let builder = Server::build();
    let stop_signal = builder.graceful_shutdown_signal();
    // Called once for each worker, on its thread.
    let service = move || {
        let database = cluster.for_worker();
        let feed = feed.clone();
        let app = App::new()
            .app_data(settings.clone())
            .configure(|config| api::configure(config, database, feed, &settings))
            .wrap(Compress::default())
            .wrap(from_fn(middleware));
        let stop_signal = stop_signal.clone();
        let http = HttpService::build()
            // At a stop, idle connections close at once.
            .graceful_shutdown_signal(move || {
                let signal = stop_signal.clone();
                async move { signal.notified().await }
            })
            // The connection has its own, for the head of every request.
            .client_request_timeout(Duration::ZERO)
            .client_disconnect_timeout(Duration::from_secs(1))
            .keep_alive(KeepAlive::Timeout(Duration::from_secs(75)))
            .on_connect_ext(|connection: &Connection, data| {
                data.insert(connection.exchange());
            })
            .finish(map_config(app, |()| AppConfig::default()));
        let any_origin = settings.cors_origins.is_empty();
        let accept = move |socket: TcpStream| async move {
            // It fails if the client has disconnected already, which the first read will show.
            let _ = socket.set_nodelay(true);
            let peer = socket.peer_addr().ok();
            Ok((Connection::new(socket, any_origin), Protocol::Http1, peer))
        };
        fn_service(accept).and_then(http)
    };
    let server = builder
        .workers(workers)
        .max_concurrent_connections(max_connections)
        .shutdown_timeout(u64::try_from(shutdown_timeout)?)
        .disable_signals()
        .listen("api", listener, service)
        .map(ServerBuilder::run)?;
    Ok(server)
}

fn serve_admin(
    listener: TcpListener,
    cluster: Data<Cluster>,
    stopping: Data<Stopping>,
) -> Result<actix_web::dev::Server> {
    let app = move || {
        App::new()
            .app_data(cluster.clone())
            .app_data(stopping.clone())
            .configure(admin::configure)
    };
    let server = HttpServer::new(app).workers(1).disable_signals();
    Ok(server.listen(listener)?.run())
}

/// Client connections per worker. Each takes a file, and so does each database connection, for which some files are kept.
/// Further clients wait in the backlog of the listener.
fn max_connections(settings: &Settings) -> Result<usize> {
    /// More clients do not get faster answers.
    const MAX: usize = 25_000;
    let limit = getrlimit(Resource::Nofile);
    // The soft limit is often 1024. A process may raise it to the hard limit.
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    let files = setrlimit(Resource::Nofile, raised)
        .map_or(limit, |()| raised)
        .current;
    let files = usize::try_from(files.unwrap_or(u64::MAX).min(1 << 32))?;
    let servers = settings.database.len() + settings.replicas.len();
    let kept = (settings.pool_size + 5 * settings.workers) * servers + 100;
    let clients = files.saturating_sub(kept) / settings.workers;
    ensure!(
        clients > 0,
        "a limit of {files} open files is too low: the service needs {kept}, and one for each client"
    );
    Ok(clients.min(MAX))
}

/// The listener and its address. With port 0 the system chooses the port.
fn bind(name: &str, address: SocketAddr) -> Result<(TcpListener, SocketAddr)> {
    /// With the 128 of the standard library, some of many new clients retry only after a second.
    const BACKLOG: u32 = 4096;
    /// How many bytes of a response the system buffers before it sends them.
    const UNSENT_BYTES: u32 = 128 * 1024;
    let bound = || {
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4()?,
            SocketAddr::V6(_) => TcpSocket::new_v6()?,
        };
        socket.set_reuseaddr(true)?;
        // Inherited by each connection. A client that stops reading then shows soon, and little waits for it in the system.
        SockRef::from(&socket).set_tcp_notsent_lowat(UNSENT_BYTES)?;
        socket.bind(address)?;
        let listener = socket.listen(BACKLOG)?.into_std()?;
        let address = listener.local_addr()?;
        Ok::<_, std::io::Error>((listener, address))
    };
    bound().with_context(|| format!("cannot listen on {name}={address}"))
}

/// Completes at the first SIGTERM or SIGINT.
fn stop_signal() -> Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for signals")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => (),
            _ = interrupt.recv() => (),
        }
    })
}
