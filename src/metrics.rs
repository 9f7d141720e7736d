//! What Prometheus reads: requests by route and status, the servers of the database, and the pools.

use std::sync::Arc;
use std::time::Duration;

use actix_web::http::StatusCode;
use prometheus::{
    Encoder, GaugeVec, HistogramOpts, HistogramVec, IntGauge, Opts, Registry, TextEncoder,
};

use crate::database::Database;
use crate::server::Ways;
use crate::servers::Servers;

pub struct Metrics {
    registry: Registry,
    requests: HistogramVec,
    /// Whether each answers, takes writes, and how many seconds it is behind.
    states: [GaugeVec; 3],
    servers: Arc<Servers>,
    /// Of the primary, and of the replicas.
    pools: [(Vec<Database>, [IntGauge; 3]); 2],
}

impl Metrics {
    pub fn new(servers: Arc<Servers>, ways: Vec<Ways>) -> Result<Self, prometheus::Error> {
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
        let of_server = |name, help| -> Result<GaugeVec, prometheus::Error> {
            let gauge = GaugeVec::new(Opts::new(name, help), &["server", "part"])?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let states = [
            of_server("database_server_up", "1 if the server answers.")?,
            of_server("database_server_writable", "1 if it takes writes.")?,
            of_server(
                "database_server_lag_seconds",
                "How long ago the primary was where this server is now.",
            )?,
        ];
        let of_pools = |part| -> Result<[IntGauge; 3], prometheus::Error> {
            let gauge = |name, help| {
                let gauge = IntGauge::with_opts(Opts::new(name, help).const_label("part", part))?;
                registry.register(Box::new(gauge.clone()))?;
                Ok::<_, prometheus::Error>(gauge)
            };
            Ok([
                gauge(
                    "database_pool_size",
                    "Connections of the pools for writes and lists.",
                )?,
                gauge("database_pool_available", "Those that nobody uses.")?,
                gauge("database_pool_waiting", "Requests that wait for one.")?,
            ])
        };
        let (primary, replicas): (_, Vec<_>) = ways.into_iter().unzip();
        let pools = [
            (primary, of_pools("primary")?),
            (
                replicas.into_iter().flatten().collect(),
                of_pools("replica")?,
            ),
        ];
        let build = IntGauge::with_opts(
            Opts::new("listing_api_build_info", "1, with the version as a label.")
                .const_label("version", env!("CARGO_PKG_VERSION")),
        )?;
        build.set(1);
        registry.register(Box::new(build))?;
        Ok(Self {
            registry,
            requests,
            states,
            servers,
            pools,
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
        for (databases, gauges) in &self.pools {
            let mut sums = [0; 3];
            for database in databases {
                for (sum, value) in sums.iter_mut().zip(database.pool_status()) {
                    *sum += value;
                }
            }
            for (gauge, sum) in gauges.iter().zip(sums) {
                gauge.set(i64::try_from(sum).unwrap_or(i64::MAX));
            }
        }
        for gauge in &self.states {
            // A server may have another part by now.
            gauge.reset();
        }
        for (part, server) in self.servers.report() {
            let state = server.state();
            let (up, lag) = match state.lag() {
                Some(Duration::MAX) => (1.0, f64::INFINITY),
                Some(lag) => (1.0, lag.as_secs_f64()),
                None => (0.0, f64::NAN),
            };
            let writable = f64::from(u8::from(state.kind() == Some(true)));
            let values = [up, writable, lag];
            for (gauge, value) in self.states.iter().zip(values) {
                gauge
                    .with_label_values(&[server.name.as_str(), part])
                    .set(value);
            }
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        String::from_utf8(text).map_err(|error| prometheus::Error::Msg(error.to_string()))
    }
}
