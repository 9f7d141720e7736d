//! The metrics, the alerts and the dashboard. `make test` omits the test that needs Prometheus, `make monitoring` runs it.

use std::process::{Child, Command};
use std::time::Duration;
use std::{env, fs};

use serde_json::Value;
use tempfile::TempDir;

use crate::support::{Connection, LOFT, Service, free_address, in_checkout, rows, value, within};

const CHEAPER: &str = r#"{"latest_price_eur": 465000}"#;

/// A Prometheus that scrapes a service. Killed when dropped.
struct Prometheus {
    process: Child,
    address: String,
    _folder: TempDir,
}

impl Prometheus {
    fn start(service: &Service) -> Self {
        let program = env::var("PROMETHEUS").expect("PROMETHEUS is not set: run `make monitoring`");
        let folder = TempDir::new().expect("create a folder");
        let config = folder.path().join("prometheus.yml");
        let settings = format!(
            "global: {{scrape_interval: 500ms}}\n\
             scrape_configs: [{{job_name: listing-api, static_configs: [{{targets: ['{}']}}]}}]\n",
            service.admin_address
        );
        fs::write(&config, settings).expect("write the settings");
        let address = free_address();
        let process = Command::new(program)
            .arg(format!("--config.file={}", config.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                folder.path().join("data").display()
            ))
            .arg(format!("--web.listen-address={address}"))
            .arg("--log.level=error")
            .spawn()
            .expect("start Prometheus");
        let prometheus = Self {
            process,
            address,
            _folder: folder,
        };
        within(Duration::from_secs(30), "Prometheus serves", || {
            prometheus.ask("/-/ready").is_some()
        });
        prometheus
    }

    /// The body of a response with status 200.
    fn ask(&self, path: &str) -> Option<String> {
        let mut connection = Connection::try_to(&self.address).ok()?;
        connection.request("GET", path, "", "");
        let response = connection.receive_unchecked("GET");
        (response.status == 200).then(|| response.text().to_owned())
    }

    /// Whether a query returns a number now.
    fn answers(&self, expression: &str) -> bool {
        let query: String = form_urlencoded::byte_serialize(expression.as_bytes()).collect();
        let body = self.ask(&format!("/api/v1/query?query={query}"));
        let body: Value = serde_json::from_str(&body.expect(expression)).expect("JSON");
        let series = body["data"]["result"].as_array().expect(expression);
        series.iter().any(|series| series["value"][1] != "NaN")
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        self.process.kill().expect("kill Prometheus");
        self.process.wait().expect("wait for Prometheus");
    }
}

fn dashboard() -> Value {
    let text = fs::read_to_string(in_checkout("deploy/grafana/dashboard.json"));
    serde_json::from_str(&text.expect("read the dashboard")).expect("JSON")
}

/// The queries of the panels that read a data source.
fn queries(dashboard: &Value, source: &str, field: &str) -> Vec<String> {
    let panels = dashboard["panels"].as_array().expect("panels").iter();
    let panels = panels.filter(|panel| panel["datasource"]["uid"] == source);
    let targets = panels.flat_map(|panel| panel["targets"].as_array().expect("targets"));
    targets
        .map(|target| target[field].as_str().expect("a query").to_owned())
        .collect()
}

fn alerts() -> Vec<Value> {
    let rules = yaml("deploy/prometheus/rules.yml");
    rules["groups"][0]["rules"]
        .as_array()
        .expect("rules")
        .clone()
}

fn yaml(path: &str) -> Value {
    let text = fs::read_to_string(in_checkout(path)).expect("read a file");
    serde_yaml_ng::from_str(&text).expect("YAML")
}

fn page(path: &str) -> String {
    fs::read_to_string(in_checkout(path)).expect("read a page")
}

/// The metrics of an expression. Each has its labels behind its name.
fn metrics(expression: &str) -> Vec<&str> {
    let is_other = |c: char| !c.is_ascii_alphanumeric() && c != '_';
    let mut parts: Vec<_> = expression.split('{').collect();
    parts.pop();
    parts
        .iter()
        .filter_map(|part| part.rsplit(is_other).next())
        .collect()
}

#[tokio::test]
async fn prometheus_answers_every_query_of_the_dashboard_and_has_every_metric_of_an_alert() {
    let service = Service::start().await;
    let prometheus = Prometheus::start(&service);
    // The feed polls only while a client waits.
    let mut stream = service.connect();
    let accept = "accept: text/event-stream\r\n";
    stream.request("GET", "/changes?after=now", accept, "");

    let dashboard = dashboard();
    let mut expressions = queries(&dashboard, "prometheus", "expr");
    for expression in &mut expressions {
        assert!(
            expression.contains("{instance=~'$instance'"),
            "{expression}"
        );
        *expression = expression
            .replace("$instance", &service.admin_address)
            .replace("$__rate_interval", "10s");
    }
    let variable = dashboard["templating"]["list"][0]["query"].as_str();
    assert_eq!(
        variable,
        Some("label_values(listing_api_build_info, instance)")
    );
    expressions.push(format!(
        "listing_api_build_info{{instance='{}'}}",
        service.admin_address
    ));
    for alert in alerts() {
        let expression = alert["expr"].as_str().expect("an expression");
        let metrics = metrics(expression);
        assert!(!metrics.is_empty(), "{expression}");
        expressions.extend(
            metrics
                .iter()
                .map(|metric| format!("{metric}{{job='listing-api'}}")),
        );
    }

    service.post(LOFT).id();
    for expression in &expressions {
        within(Duration::from_secs(30), expression, || {
            service.patch("/listings/1", CHEAPER);
            service.get("/listings/1");
            prometheus.answers(expression)
        });
    }
}

#[tokio::test]
async fn every_sql_query_of_the_dashboard_returns_rows_to_an_auditor() {
    let service = Service::start().await;
    service.post(LOFT).id();
    // So that the price differs between the start and the end of the period.
    let from = value(service.superuser(), "select clock_timestamp()").await;
    service.patch("/listings/1", CHEAPER);
    let auditor = service.db().login("grafana", "in role listing_auditor");
    let auditor = auditor.await;
    let queries = queries(&dashboard(), "listing", "rawSql");
    assert!(!queries.is_empty());
    for query in queries {
        let sql = query
            .replace("$__timeFrom()", &format!("'{from}'"))
            .replace("$__timeTo()", "'2120-01-01T00:00:00Z'");
        let rows = rows(&auditor, &sql).await;
        assert!(!rows.is_empty(), "{sql}");
        if sql.contains("as problems") {
            assert_eq!(rows, ["0"]);
        }
    }
}

#[test]
fn every_alert_is_documented_and_has_a_test_in_which_it_fires_and_one_in_which_it_does_not() {
    let page = page("docs/monitoring.md").replace('`', "");
    let page: Vec<_> = page.split_whitespace().collect();
    let page = page.join(" ");
    let tests = yaml("deploy/prometheus/rules_test.yml");
    let tests = tests["tests"].as_array().expect("tests");
    let alerts = alerts();
    for alert in &alerts {
        let string = |value: &Value| value.as_str().expect("a string").to_owned();
        let name = string(&alert["alert"]);
        let severity = string(&alert["labels"]["severity"]);
        assert!(["critical", "warning"].contains(&&*severity), "{name}");
        let description = string(&alert["annotations"]["description"]);
        let line = format!("- {name} ({severity}): {description}");
        assert!(page.contains(&line), "docs/monitoring.md lacks: {line}");

        let test = tests.iter().find(|test| test["name"] == alert["alert"]);
        let test = test.unwrap_or_else(|| panic!("no test of {name}"));
        let cases = test["promql_expr_test"].as_array().expect("cases");
        let selector = format!("ALERTS{{alertname=\"{name}\", alertstate=\"firing\"}}");
        let fires = |case: &Value| {
            assert!(string(&case["expr"]).contains(&selector), "{name}");
            !case["exp_samples"].as_array().expect("samples").is_empty()
        };
        assert!(cases.iter().any(fires), "{name} fires in no test");
        assert!(!cases.iter().all(fires), "{name} fires in every test");
    }
    let documented = page.matches("(critical): ").count() + page.matches("(warning): ").count();
    assert_eq!(documented, alerts.len());
}

#[tokio::test]
async fn every_metric_is_documented() {
    let service = Service::start().await;
    let pages = page("docs/monitoring.md") + &page("docs/change-feed.md");
    service.get("/listings");
    let metrics = service.admin("/metrics");
    let types = metrics.text().lines();
    let types = types.filter_map(|line| line.strip_prefix("# TYPE "));
    for name in types.filter_map(|line| line.split(' ').next()) {
        assert!(pages.contains(&format!("`{name}`")), "{name}");
    }
}
