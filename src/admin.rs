//! What operators ask, on a listener of its own: is it alive, is it ready, what does it do.

use std::sync::atomic::{AtomicBool, Ordering};

use actix_web::HttpResponse;
use actix_web::http::StatusCode;
use actix_web::web::{self, Data, ServiceConfig};

use crate::database::Database;
use crate::error::ApiError;
use crate::metrics::Metrics;
use crate::servers::Servers;

/// Set when the service has been told to stop.
#[derive(Default)]
pub struct Stopping(pub AtomicBool);

pub fn routes(config: &mut ServiceConfig) {
    config
        .route("/health/live", web::get().to(live))
        .route("/health/ready", web::get().to(ready))
        .route("/metrics", web::get().to(metrics));
}

/// The process answers. Says nothing of the database, whose trouble no restart of this service mends.
async fn live() -> &'static str {
    "alive\n"
}

/// The primary can be reached and written to, its schema is the one built in, and nobody has asked for a stop. Below that, in
/// what state each server is: one that is only read from is not needed.
async fn ready(
    database: Data<Database>,
    servers: Data<Servers>,
    stopping: Data<Stopping>,
) -> Result<String, ApiError> {
    let not_ready = |why: String| ApiError::new(StatusCode::SERVICE_UNAVAILABLE, why);
    if stopping.0.load(Ordering::Relaxed) {
        return Err(not_ready("stopping".to_owned()));
    }
    let report: Vec<_> = servers
        .report()
        .iter()
        .map(|(part, server)| format!("{part} {} {}", server.name, server.state()))
        .collect();
    if database.server().state().kind() != Some(true) {
        return Err(not_ready(report.join("; ")));
    }
    database.check_schema().await.map_err(not_ready)?;
    Ok(format!("ready\n{}\n", report.join("\n")))
}

async fn metrics(metrics: Data<Metrics>) -> Result<HttpResponse, ApiError> {
    let text = metrics.render().map_err(ApiError::internal)?;
    Ok(HttpResponse::Ok()
        .content_type("text/plain; version=0.0.4")
        .body(text))
}
