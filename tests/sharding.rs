//! Behind a sharding proxy, each statement must name the listing that it reads or writes. So the proxy can send it to the server
//! that has this listing. PostgreSQL logs each statement, and the tests read that log.

use std::fs;
use std::thread;

use crate::support::{
    Cluster, LOFT, Service, alter_system, bearer, create_administrator_key, insert_listing, run,
};

/// A server that logs every statement, and a service that takes it for a sharding proxy.
struct Sharded {
    service: Service,
    cluster: Cluster,
    /// The headers of an administrator.
    json: String,
}

/// A statement of the service with the values of its parameters.
#[derive(Debug)]
struct Sent {
    sql: String,
    values: Vec<String>,
}

impl Sharded {
    async fn start() -> Self {
        let cluster = Cluster::migrated();
        let superuser = cluster.superuser().await;
        for id in 1..=8 {
            run(&superuser, &insert_listing(id, "100")).await;
        }
        run(&superuser, "select setval('listing_id_seq', 8)").await;
        let long = "update listing set price = price + 1 where id = 8;".repeat(150);
        run(&superuser, &long).await;
        alter_system(&superuser, "set log_line_prefix = '%a|'").await;
        run(&superuser, "alter role postgres set log_statement = 'all'").await;
        let settings = [("SHARDING_PROXY", "on"), ("AUTH", "keys")];
        let service = Service::start_at(&cluster.url, &settings);
        let json = bearer(&create_administrator_key(&superuser).await);
        Self {
            service,
            cluster,
            json,
        }
    }

    /// What the service has sent since `from`, a position in the log of the server.
    fn sent_since(&self, from: usize) -> Vec<Sent> {
        let log = self.log();
        let mut sent: Vec<Sent> = Vec::new();
        for line in log[from..].lines() {
            let Some((severity, text)) = line
                .strip_prefix("listing-api|")
                .and_then(|line| line.split_once(":  "))
            else {
                continue;
            };
            let statement = text.split_once(": ").map(|(_, sql)| sql.to_owned());
            match (severity, statement) {
                // With a name, it was prepared before, without values: a proxy would have asked every server.
                ("LOG", Some(sql)) if text.starts_with("execute <unnamed>") => sent.push(Sent {
                    sql,
                    values: Vec::new(),
                }),
                ("LOG", Some(sql)) => assert!(is_probe(&sql), "{text}"),
                ("DETAIL", Some(values)) => {
                    let last = sent.last_mut().expect("a statement before its values");
                    last.values = values.split(", $").map(value_of).collect();
                }
                _ => (),
            }
        }
        sent
    }

    fn log(&self) -> String {
        let file = self.cluster.folder.path().join(".postgres/server.log");
        fs::read_to_string(file).expect("read the log of the server")
    }
}

/// What a proxy answers itself.
fn is_probe(sql: &str) -> bool {
    ["begin", "rollback"].contains(&sql)
}

/// The value in `$1 = '7'`.
fn value_of(parameter: &str) -> String {
    let (_, value) = parameter
        .split_once(" = ")
        .expect("a parameter and its value");
    value.trim_matches('\'').to_owned()
}

impl Sent {
    fn listing(&self) -> Option<&str> {
        self.named(&["id = $", "listing_id = $"])
    }

    fn key(&self) -> Option<&str> {
        self.named(&["key = $", "idempotency_key.key = $"])
    }

    /// The value in the first condition of a query, if a proxy understands it: a column, `=`, a parameter.
    fn named(&self, columns: &[&str]) -> Option<&str> {
        let mut conditions = self.sql.split(" where ").skip(1);
        let number = conditions.find_map(|condition| {
            let mut columns = columns.iter();
            columns.find_map(|column| condition.strip_prefix(column))
        })?;
        let end = number.find(|c: char| !c.is_ascii_digit());
        let number: usize = number[..end.unwrap_or(number.len())].parse().ok()?;
        self.values.get(number - 1).map(String::as_str)
    }
}

#[tokio::test]
async fn behind_a_sharding_proxy_each_statement_names_one_listing() {
    let sharded = Sharded::start().await;
    let json = &sharded.json;
    let wrong = &format!("{json}if-match: \"0\"\r\n");
    for (method, path, headers, body, status) in [
        ("GET", "/listings/7", "", "", 200),
        ("GET", "/listings/9", "", "", 404),
        ("GET", "/listings/7/prices", "", "", 200),
        ("GET", "/listings/9/prices", "", "", 404),
        ("GET", "/listings/8/prices", "", "", 200),
        ("GET", "/listings/8/prices?limit=5", "", "", 200),
        (
            "GET",
            "/listings/8/prices?from=2020-01-01T00:00:00Z",
            "",
            "",
            200,
        ),
        (
            "GET",
            "/listings/8/prices?at=2099-01-01T00:00:00Z",
            "",
            "",
            200,
        ),
        ("GET", "/listings/7/prices.svg", "", "", 200),
        ("GET", "/listings/8/prices.svg", "", "", 200),
        ("PUT", "/listings/7", json, LOFT, 200),
        (
            "PATCH",
            "/listings/7",
            json,
            "{\"latest_price_eur\": 5}",
            200,
        ),
        (
            "PATCH",
            "/listings/7",
            wrong,
            "{\"latest_price_eur\": 6}",
            412,
        ),
        ("DELETE", "/listings/7", wrong, "", 412),
        ("DELETE", "/listings/7", json, "", 204),
        ("DELETE", "/listings/7", json, "", 404),
        ("DELETE", "/listings/1%00", json, "", 404),
    ] {
        let begin = sharded.log().len();
        let response = sharded.service.send(method, path, headers, body);
        assert_eq!(
            response.status,
            status,
            "{method} {path}: {}",
            response.text()
        );
        let id = path.split('/').nth(2).expect("the id in the path");
        let sent = sharded.sent_since(begin);
        assert!(!sent.is_empty(), "{method} {path} sent nothing");
        for sent in sent {
            let named = sent.listing().or(sent.key());
            let expected = if id == "1%00" { sent.key() } else { Some(id) };
            assert!(named.is_some(), "{method} {path} sent {sent:?}");
            assert_eq!(named, expected, "{method} {path} sent {sent:?}");
        }
    }
}

#[tokio::test]
async fn behind_a_sharding_proxy_concurrent_reads_share_no_statement() {
    let sharded = Sharded::start().await;
    let begin = sharded.log().len();
    thread::scope(|scope| {
        for id in 1..=8 {
            let service = &sharded.service;
            scope.spawn(move || {
                let mut client = service.connect();
                for _ in 0..20 {
                    for path in [format!("/listings/{id}"), format!("/listings/{id}/prices")] {
                        assert_eq!(client.send("GET", &path, "", "").status, 200);
                    }
                }
            });
        }
    });
    let sent = sharded.sent_since(begin);
    let named = sent.iter().filter(|sent| sent.listing().is_some()).count();
    // The history of listing 8 takes three statements.
    assert_eq!(named, sent.len(), "{sent:?}");
    assert!(named >= 8 * 20 * 2, "{named} statements");
}

#[tokio::test]
async fn behind_a_sharding_proxy_all_statements_of_a_post_name_the_same_key() {
    let sharded = Sharded::start().await;
    let json = &sharded.json;
    let keyed = format!("{json}idempotency-key: one\r\n");
    for (headers, body, status) in [
        (&keyed, LOFT, 201),
        (&keyed, LOFT, 201),
        (&keyed, "{}", 422),
        (json, LOFT, 201),
        (json, LOFT, 201),
    ] {
        let begin = sharded.log().len();
        let response = sharded.service.send("POST", "/listings", headers, body);
        assert_eq!(response.status, status, "{:?}", sharded.service.log());
        let sent = sharded.sent_since(begin);
        let keys: Option<Vec<_>> = sent.iter().map(Sent::key).collect();
        let keys = keys.unwrap_or_else(|| panic!("a statement without a key: {sent:?}"));
        assert!(keys.iter().all(|key| *key == keys[0]), "{sent:?}");
        assert_eq!(keys[0] == "one", *headers == *keyed, "{sent:?}");
    }
}

#[tokio::test]
async fn behind_a_sharding_proxy_the_feed_is_refused_and_the_log_says_why() {
    let service = Service::start_with(&[("SHARDING_PROXY", "on")]).await;
    let response = service.send("GET", "/changes", "x-request-id: feed\r\n", "");
    assert_eq!(response.status, 503);
    let line = service.logged("feed").concat();
    assert!(line.contains("SHARDING_PROXY=on: an instance"), "{line}");
}

#[tokio::test]
async fn a_server_that_the_proxy_cannot_reach_costs_503_and_the_write_is_not_repeated() {
    let service = Service::start_with(&[("SHARDING_PROXY", "on")]).await;
    assert_eq!(service.post(LOFT).status, 201);
    // What PgDog says about a server that is down.
    let fails = "create function fail() returns trigger language plpgsql as $$ begin \
        raise warning 'attempt'; raise exception 'checkout timeout' using errcode = '58000'; end $$; \
        create trigger fails before update on listing for each row execute function fail()";
    run(service.superuser(), fails).await;
    let response = service.patch("/listings/1", r#"{"latest_price_eur": 5}"#);
    assert_eq!(response.status, 503);
    assert_eq!(response.header("retry-after"), Some("1"));
    service.logged("ERROR 58000: checkout timeout");
    assert_eq!(service.logged("attempt").len(), 1);
    assert_eq!(service.get("/listings/1").status, 200);
}
