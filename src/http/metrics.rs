//! Counts and times every request.

use std::sync::OnceLock;
use std::time::Duration;

use actix_web::http::StatusCode;
use prometheus::{HistogramVec, histogram_opts, register_histogram_vec};

static REQUESTS: OnceLock<HistogramVec> = OnceLock::new();

/// Registers the metrics. Fails if one is registered already or has a bad name.
pub fn register() -> Result<(), prometheus::Error> {
    let help = "Seconds until the response began, by route, method and status. The count is the number of requests.";
    let buckets = vec![
        0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
    ];
    let options = histogram_opts!("http_request_duration_seconds", help, buckets);
    let requests = register_histogram_vec!(options, &["route", "method", "status"])?;
    REQUESTS.get_or_init(|| requests);
    Ok(())
}

/// `route` is the pattern of the path: ids and unknown paths must not make a series each.
pub fn record(method: &str, route: Option<&str>, status: StatusCode, duration: Duration) {
    let method = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
        .into_iter()
        .find(|known| *known == method)
        .unwrap_or("other");
    let labels = [route.unwrap_or("none"), method, status.as_str()];
    if let Some(requests) = REQUESTS.get() {
        let requests = requests.with_label_values(&labels);
        requests.observe(duration.as_secs_f64());
    }
}
