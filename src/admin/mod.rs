//! The admin listener: health and metrics, for operators.

mod health_check;
mod metrics;
mod version;

pub use health_check::check_health;
pub use version::version;

use std::sync::atomic::{AtomicBool, Ordering};

use actix_web::HttpResponse;
use actix_web::http::StatusCode;
use actix_web::web::{self, Data, ServiceConfig};

use crate::http::error::ApiError;
use crate::postgres::Cluster;

/// Becomes true when the service has been told to stop.
#[derive(Default)]
pub struct Stopping(pub AtomicBool);

pub fn configure(config: &mut ServiceConfig) {
    config
        .route("/health/live", web::get().to(live))
        .route("/health/ready", web::get().to(ready))
        .route("/metrics", web::get().to(show_metrics));
}

/// The process answers. Does not depend on the database: a restart of the service does not repair that.
async fn live() -> &'static str {
    "alive\n"
}

/// The service is not stopping, the primary accepts writes, and its schema is right. The body has the state of every server:
/// replicas are not needed to be ready.
async fn ready(cluster: Data<Cluster>, stopping: Data<Stopping>) -> Result<String, ApiError> {
    let not_ready = |reason: String| ApiError::new(StatusCode::SERVICE_UNAVAILABLE, reason);
    if stopping.0.load(Ordering::Relaxed) {
        return Err(not_ready("stopping".to_owned()));
    }
    let servers = cluster.report().servers;
    let servers: Vec<_> = servers.iter().map(ToString::to_string).collect();
    if !cluster.accepts_writes() {
        return Err(not_ready(servers.join("; ")));
    }
    cluster.check_schema().await.map_err(not_ready)?;
    Ok(format!("ready\n{}\n", servers.join("\n")))
}

async fn show_metrics(cluster: Data<Cluster>) -> Result<HttpResponse, ApiError> {
    let text = metrics::render(&cluster).map_err(ApiError::internal)?;
    Ok(HttpResponse::Ok()
        .content_type("text/plain; version=0.0.4")
        .body(text))
}
