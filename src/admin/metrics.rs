//! The metrics that Prometheus reads: servers and pools from a report, requests from their own counters.

use std::time::Duration;

use prometheus::{GaugeVec, Opts, Registry, TextEncoder};

use super::version::{COMMIT, VERSION};
use crate::postgres::{Cluster, schema_version};

pub fn render(cluster: &Cluster) -> Result<String, prometheus::Error> {
    // A new registry each time: a server that changed its role must not leave a series behind.
    let registry = Registry::new();
    let gauge = |name, help, labels: &[&str]| {
        let gauge = GaugeVec::new(Opts::new(name, help), labels)?;
        registry.register(Box::new(gauge.clone()))?;
        Ok::<_, prometheus::Error>(gauge)
    };
    let server = ["server", "part"];
    let up = gauge("database_server_up", "1 if the server answers.", &server)?;
    let writable = gauge(
        "database_server_writable",
        "1 if the server accepts writes.",
        &server,
    )?;
    let lag = gauge(
        "database_server_lag_seconds",
        "How far the server is behind the primary.",
        &server,
    )?;
    let size = gauge("database_pool_size", "Pooled connections.", &["part"])?;
    let available = gauge(
        "database_pool_available",
        "Idle pooled connections.",
        &["part"],
    )?;
    let waiting = gauge(
        "database_pool_waiting",
        "Requests that wait for a connection.",
        &["part"],
    )?;
    let build = ["commit", "schema", "version"];
    let build = gauge("listing_api_build_info", "Always 1.", &build)?;

    let report = cluster.report();
    for server in report.servers {
        let labels = [server.name.as_str(), server.role];
        let seconds = match server.state.lag() {
            Some(Duration::MAX) => f64::INFINITY,
            Some(lag) => lag.as_secs_f64(),
            None => f64::NAN,
        };
        let accepts_writes = server.state.writable() == Some(true);
        up.with_label_values(&labels)
            .set(number(server.state.lag().is_some()));
        writable
            .with_label_values(&labels)
            .set(number(accepts_writes));
        lag.with_label_values(&labels).set(seconds);
    }
    for (role, pool) in report.pools {
        for (gauge, count) in [
            (&size, pool.size),
            (&available, pool.available),
            (&waiting, pool.waiting),
        ] {
            let count = u32::try_from(count).unwrap_or(u32::MAX);
            gauge.with_label_values(&[role]).set(count.into());
        }
    }
    build
        .with_label_values(&[COMMIT, &schema_version(), VERSION])
        .set(1.0);

    let mut families = registry.gather();
    families.extend(prometheus::gather());
    TextEncoder::new().encode_to_string(&families)
}

fn number(yes: bool) -> f64 {
    f64::from(u8::from(yes))
}
