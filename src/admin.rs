//! What operators ask, on a listener of its own: is it alive, is it ready, what does it do.

use std::sync::atomic::{AtomicBool, Ordering};

use actix_web::HttpResponse;
use actix_web::http::StatusCode;
use actix_web::web::{self, Data, ServiceConfig};

use crate::database::Database;
use crate::error::ApiError;
use crate::metrics::Metrics;

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

/// The database can be reached and written to, its schema is the one built in, and nobody has asked for a stop.
async fn ready(
    database: Data<Database>,
    stopping: Data<Stopping>,
) -> Result<&'static str, ApiError> {
    let not_ready = |why: String| ApiError::new(StatusCode::SERVICE_UNAVAILABLE, why);
    if stopping.0.load(Ordering::Relaxed) {
        return Err(not_ready("stopping".to_owned()));
    }
    database.check_schema().await.map_err(not_ready)?;
    let rows = database
        .query(
            "select current_setting('transaction_read_only') = 'off' as writable",
            &[],
        )
        .await?;
    match rows.first().map(|row| row.try_get("writable")) {
        Some(Ok(true)) => Ok("ready\n"),
        _ => Err(not_ready("the database is read-only".to_owned())),
    }
}

async fn metrics(metrics: Data<Metrics>) -> Result<HttpResponse, ApiError> {
    let text = metrics.render().map_err(ApiError::internal)?;
    Ok(HttpResponse::Ok()
        .content_type("text/plain; version=0.0.4")
        .body(text))
}
