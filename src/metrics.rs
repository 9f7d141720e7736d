//! What Prometheus reads: requests by route and status, and the pool.

use std::time::Duration;

use actix_web::http::StatusCode;
use prometheus::{Encoder, HistogramOpts, HistogramVec, IntGauge, Registry, TextEncoder};

use crate::database::Database;

pub struct Metrics {
    registry: Registry,
    requests: HistogramVec,
    pool: [IntGauge; 3],
    databases: Vec<Database>,
}

impl Metrics {
    pub fn new(databases: Vec<Database>) -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let buckets = vec![
            0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
        ];
        let help = "Seconds until the response began, by route, method and status. The count is the number of requests.";
        let requests = HistogramVec::new(
            HistogramOpts::new("http_request_duration_seconds", help).buckets(buckets),
            &["route", "method", "status"],
        )?;
        registry.register(Box::new(requests.clone()))?;
        let gauge = |name, help| -> Result<IntGauge, prometheus::Error> {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let pool = [
            gauge(
                "database_pool_size",
                "Connections of the pools for writes and lists.",
            )?,
            gauge("database_pool_available", "Those that nobody uses.")?,
            gauge("database_pool_waiting", "Requests that wait for one.")?,
        ];
        let build = IntGauge::with_opts(
            prometheus::Opts::new("listing_api_build_info", "1, with the version as a label.")
                .const_label("version", env!("CARGO_PKG_VERSION")),
        )?;
        build.set(1);
        registry.register(Box::new(build))?;
        Ok(Self {
            registry,
            requests,
            pool,
            databases,
        })
    }

    /// Counts a request by the pattern of its route, so that ids and unknown paths do not make a series each.
    pub fn observe(
        &self,
        method: &str,
        route: Option<&str>,
        status: StatusCode,
        duration: Duration,
    ) {
        let method = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
            .into_iter()
            .find(|known| *known == method)
            .unwrap_or("other");
        let labels = [route.unwrap_or("none"), method, status.as_str()];
        self.requests
            .with_label_values(&labels)
            .observe(duration.as_secs_f64());
    }

    pub fn render(&self) -> Result<String, prometheus::Error> {
        let mut sums = [0; 3];
        for database in &self.databases {
            let status = database.pool_status();
            let values = [status.size, status.available, status.waiting];
            for (sum, value) in sums.iter_mut().zip(values) {
                *sum += value;
            }
        }
        for (gauge, sum) in self.pool.iter().zip(sums) {
            gauge.set(i64::try_from(sum).unwrap_or(i64::MAX));
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        String::from_utf8(text).map_err(|error| prometheus::Error::Msg(error.to_string()))
    }
}
