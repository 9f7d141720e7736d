//! Settings, check of the schema, serve, stop.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use actix_http::{HttpService, KeepAlive, Protocol};
use actix_server::{Server, ServerBuilder};
use actix_service::{ServiceFactoryExt, fn_service, map_config};
use actix_web::dev::AppConfig;
use actix_web::middleware::{Compress, Logger, from_fn};
use actix_web::rt::net::TcpStream;
use actix_web::web::Data;
use actix_web::{App, HttpServer, rt};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpSocket;
use tokio::signal::unix::{SignalKind, signal};

use crate::admin::{self, Stopping};
use crate::commits::Commits;
use crate::database::{Database, tls};
use crate::edge::edge;
use crate::error::describe;
use crate::json::TRICKLE_LIMIT;
use crate::keys::Keys;
use crate::metrics::Metrics;
use crate::reader::Reader;
use crate::routes::routes;
use crate::servers::Servers;
use crate::settings::{Auth, Settings, is_loopback};
use crate::wire::Wire;

/// Runs the service until it is told to stop, or only checks that it could. The error is what stands in the way.
#[expect(clippy::missing_errors_doc, reason = "the sentence above says it")]
pub async fn run(check_only: bool) -> Result<(), String> {
    let settings = Data::new(Settings::from_env()?);
    let tls = tls(&settings)?;
    let servers = Servers::watch(&settings, &tls).await?;
    let database = Data::new(Database::new(&settings, &tls, servers.primary(), 1)?);
    let ahead = database.check_schema().await.map_err(|reason| {
        let servers = servers.report();
        let states = servers
            .iter()
            .map(|(_, server)| format!("; {} {}", server.name, server.state()));
        let states = if servers.len() > 1 {
            states.collect()
        } else {
            String::new()
        };
        reason + &states
    })?;
    if let Some(ahead) = ahead {
        log::warn!(
            "the database has {ahead}, which this release does not know: a newer one is on its way"
        );
    }
    if check_only {
        for (part, server) in servers.report() {
            println!("{part} {} {}", server.name, server.state());
        }
        println!(
            "settings, database and schema are as they should be, and {}",
            settings.auth
        );
        return Ok(());
    }
    let stop = stop_signal()?;
    let (api_listener, listen) = bind("LISTEN_ADDR", settings.listen)?;
    let (admin_listener, admin_listen) = bind("ADMIN_ADDR", settings.admin)?;
    let shutdown_delay = settings.shutdown_delay;
    let pool_size = settings.pool_size.div_ceil(settings.workers);
    let way_of = |way| Database::new(&settings, &tls, way, pool_size);
    let way_of_worker = |_| {
        let replicas = servers.replicas().map(way_of).collect::<Result<_, _>>()?;
        Ok((way_of(servers.primary())?, replicas))
    };
    let ways = (0..settings.workers)
        .map(way_of_worker)
        .collect::<Result<Vec<_>, String>>()?;
    let metrics = Metrics::new(servers.clone(), ways.clone()).map_err(|error| describe(&error))?;
    let metrics = Data::new(metrics);
    let stopping = Data::new(Stopping::default());

    let api = serve(
        api_listener,
        settings.clone(),
        servers.clone(),
        ways,
        metrics.clone(),
    )?;
    let admin = {
        let (stopping, servers) = (stopping.clone(), Data::from(servers.clone()));
        HttpServer::new(move || {
            App::new()
                .app_data(database.clone())
                .app_data(servers.clone())
                .app_data(metrics.clone())
                .app_data(stopping.clone())
                .configure(admin::routes)
        })
        .workers(1)
        .disable_signals()
        .listen(admin_listener)
        .map_err(|error| describe(&error))?
        .run()
    };
    for (part, server) in servers.report() {
        log::info!("{part} {} {}", server.name, server.state());
    }
    if settings.auth == Auth::Off && !is_loopback(listen) {
        log::warn!("anybody may write who reaches {listen}, because of AUTH=off");
    }
    log::info!(
        "serving on http://{listen}, docs on http://{listen}/docs, health and metrics on http://{admin_listen}"
    );

    let (api_handle, admin_handle) = (api.handle(), admin.handle());
    rt::spawn(async move {
        stop.await;
        log::info!(
            "stopping: no longer ready, then no new connections, then the end of the requests under way"
        );
        stopping.0.store(true, Ordering::Relaxed);
        rt::time::sleep(shutdown_delay).await;
        api_handle.stop(true).await;
        admin_handle.stop(false).await;
    });
    let (api, admin) = futures_util::join!(api, admin);
    api.and(admin).map_err(|error| describe(&error))?;
    log::info!("stopped");
    Ok(())
}

/// A worker's own ways to the primary and to each of the replicas.
pub type Ways = (Database, Vec<Database>);

/// The API: on each worker the routes, with what they share and the worker's own ways to the database.
fn serve(
    listener: TcpListener,
    settings: Data<Settings>,
    servers: Arc<Servers>,
    ways: Vec<Ways>,
    metrics: Data<Metrics>,
) -> Result<Server, String> {
    let workers = settings.workers;
    let max_clients = max_clients(&settings, ways.len())?;
    let shutdown_timeout = settings.shutdown_timeout.as_millis().div_ceil(1000);
    let next = Arc::new(AtomicUsize::new(0));
    let builder = Server::build();
    let stop_signal = builder.graceful_shutdown_signal();
    // Called once for each worker, on its thread.
    let service = move || {
        let (primary, replicas) = &ways[next.fetch_add(1, Ordering::Relaxed) % ways.len()];
        let reader = Reader::new(&servers, primary, replicas, settings.queue_size);
        let app = App::new()
            .app_data(settings.clone())
            .app_data(metrics.clone())
            .app_data(Data::new(reader))
            .app_data(Data::new(Keys::new(&settings, primary)))
            .app_data(Commits::new(primary, settings.queue_size))
            .wrap(Compress::default())
            .wrap(from_fn(edge))
            .wrap(Logger::new("%r %s %b %Dms %{x-request-id}o"))
            .configure(routes);
        let stop_signal = stop_signal.clone();
        let http = HttpService::build()
            // At a stop, connections without a request under way end at once.
            .graceful_shutdown_signal(move || {
                let signal = stop_signal.clone();
                async move { signal.notified().await }
            })
            .client_request_timeout(TRICKLE_LIMIT)
            .client_disconnect_timeout(Duration::from_secs(1))
            .keep_alive(KeepAlive::Timeout(Duration::from_secs(75)))
            .finish(map_config(app, |()| AppConfig::default()));
        let any_origin = settings.cors_origins.is_empty();
        let accept = move |socket: TcpStream| async move {
            // A socket that refuses has gone already, which the first read will show.
            let _ = socket.set_nodelay(true);
            let peer = socket.peer_addr().ok();
            Ok((Wire::new(socket, any_origin), Protocol::Http1, peer))
        };
        fn_service(accept).and_then(http)
    };
    builder
        .workers(workers)
        .max_concurrent_connections(max_clients)
        .shutdown_timeout(u64::try_from(shutdown_timeout).unwrap_or(u64::MAX))
        .disable_signals()
        .listen("api", listener, service)
        .map_err(|error| describe(&error))
        .map(ServerBuilder::run)
}

/// How many clients a worker may have. Each takes a file, and so does each connection to the database, for which a crowd of
/// clients has to leave some over. The others wait until the system lets them in.
fn max_clients(settings: &Settings, workers: usize) -> Result<usize, String> {
    /// More do not get quicker answers.
    const MOST: usize = 25_000;
    let limit = getrlimit(Resource::Nofile);
    // What a process may have without asking is often as few as 1024.
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    let files = setrlimit(Resource::Nofile, raised)
        .map_or(limit, |()| raised)
        .current;
    let servers = settings.database.len() + settings.replicas.len();
    let ours = (settings.pool_size + 5 * workers) * servers + 100;
    let files = usize::try_from(files.unwrap_or(u64::MAX).min(1 << 32)).unwrap_or(usize::MAX);
    match files.saturating_sub(ours) / workers {
        0 => Err(format!(
            "{files} open files are too few: it takes {ours}, and one for each client"
        )),
        clients => Ok(clients.min(MOST)),
    }
}

/// A listener and its address, which port 0 leaves to the system.
fn bind(name: &str, address: SocketAddr) -> Result<(TcpListener, SocketAddr), String> {
    /// Connections that wait to be accepted. With the 128 of the standard library, a crowd waits a second for its next try.
    const BACKLOG: u32 = 4096;
    let bound = || {
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4()?,
            SocketAddr::V6(_) => TcpSocket::new_v6()?,
        };
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        let listener = socket.listen(BACKLOG)?.into_std()?;
        let address = listener.local_addr()?;
        Ok((listener, address))
    };
    bound().map_err(|error: io::Error| format!("cannot listen on {name}={address}: {error}"))
}

/// Ends at the first SIGTERM or SIGINT.
fn stop_signal() -> Result<impl Future<Output = ()>, String> {
    let handle = |kind| signal(kind).map_err(|error| format!("cannot wait for signals: {error}"));
    let (mut terminate, mut interrupt) = (
        handle(SignalKind::terminate())?,
        handle(SignalKind::interrupt())?,
    );
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => (),
            _ = interrupt.recv() => (),
        }
    })
}
