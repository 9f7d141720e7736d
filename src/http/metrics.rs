//! Counts and times every request.

use std::sync::LazyLock;
use std::time::Duration;

use actix_web::http::StatusCode;
use prometheus::{HistogramVec, histogram_opts, register_histogram_vec};

#[expect(clippy::expect_used, reason = "it fails at start or never")]
static REQUESTS: LazyLock<HistogramVec> = LazyLock::new(|| {
    let help = "Seconds until the response began, by route, method and status. The count is the number of requests.";
    let buckets = vec![
        0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
    ];
    let options = histogram_opts!("http_request_duration_seconds", help, buckets);
    register_histogram_vec!(options, &["route", "method", "status"])
        .expect("the metric has a valid name, and is registered once")
});

/// Registers the metrics, so that a mistake in them shows at start.
pub fn register() {
    LazyLock::force(&REQUESTS);
}

/// `route` is the pattern of the path: ids and unknown paths must not make a series each.
pub fn record(method: &str, route: Option<&str>, status: StatusCode, duration: Duration) {
    let method = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
        .into_iter()
        .find(|known| *known == method)
        .unwrap_or("other");
    let labels = [route.unwrap_or("none"), method, status.as_str()];
    REQUESTS
        .with_label_values(&labels)
        .observe(duration.as_secs_f64());
}
