//! The log: one line for each request, as text or as JSON, with the cause of a failure.

use std::io::{Read, Write};
use std::net::TcpStream;

use serde_json::{Value, json};

use crate::support::{Connection, Database, LOFT, Service, command, printed, run};

/// The object of the request with this id, without the time and the duration, which it checks.
fn object(service: &Service, id: &str) -> Value {
    let lines = service.logged(&format!(r#""request_id":"{id}""#));
    assert_eq!(lines.len(), 1, "{lines:?}");
    let mut object: Value = serde_json::from_str(&lines[0]).expect("JSON");
    let fields = object.as_object_mut().expect("an object");
    let time = fields.remove("time");
    assert_time(time.as_ref().and_then(Value::as_str).expect("a time"));
    let ms = fields.remove("ms").and_then(|ms| ms.as_f64());
    assert!(ms.is_some_and(|ms| ms > 0.0 && ms < 60_000.0), "{lines:?}");
    object
}

/// Asserts that a text is like 2026-11-28T05:18:53.123Z.
fn assert_time(time: &str) {
    let digits = |c: char| if c.is_ascii_digit() { '0' } else { c };
    let form: String = time.chars().map(digits).collect();
    assert_eq!(form, "0000-00-00T00:00:00.000Z");
}

fn assert_each_line_is_an_object(service: &Service) {
    for line in service.log() {
        let object: Value = serde_json::from_str(&line).expect(&line);
        assert_time(object["time"].as_str().expect("a time"));
        let is_request = object["target"] == "request";
        assert!(
            object["message"].is_string() != is_request && object["level"].is_string(),
            "{line}"
        );
    }
}

/// Sends bytes and returns the request id of the response.
fn send(service: &Service, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(&service.address).expect("connect");
    stream.write_all(request).expect("send");
    let mut response = Vec::new();
    stream.read_to_end(&mut response).expect("a response");
    let response = String::from_utf8_lossy(&response).to_lowercase();
    let id = response.split("x-request-id: ").nth(1).expect("an id");
    id.split("\r\n").next().expect("a line").to_owned()
}

#[tokio::test]
async fn each_request_makes_one_object_in_json() {
    let service = Service::start_with(&[("LOG_FORMAT", "json")]).await;
    let created = service.post(LOFT);
    let id = created.header("x-request-id").expect("a request id");
    assert_eq!(
        object(&service, id),
        json!({
            "level": "INFO", "target": "request", "request_id": id, "client": "127.0.0.1", "method": "POST",
            "path": "/listings", "status": 201, "bytes": created.body.len(),
        })
    );
    for (method, path, status) in [
        ("GET", "/listings?city=Caf%C3%A9%0A&limit=1", 200),
        ("HEAD", "/listings/1", 200),
        ("GET", "/%0a%22\"{\\}\\u0000", 404),
    ] {
        let mut connection = service.connect();
        connection.request(method, path, "", "");
        let response = connection.receive_unchecked(method);
        let id = response.header("x-request-id").expect("a request id");
        assert_eq!(
            object(&service, id),
            json!({
                "level": "INFO", "target": "request", "request_id": id, "client": "127.0.0.1", "method": method,
                "path": path, "status": status, "bytes": response.body.len(),
            })
        );
    }
    // An id that is not safe to log is replaced. The client gets the one of the log.
    for hostile in [&b"a\tb"[..], b"\"}", b"\xff\xc3", b"a\x85b"] {
        let request = [
            b"GET /listings/1 HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-request-id: ",
            hostile,
            b"\r\n\r\n",
        ];
        let id = send(&service, &request.concat());
        assert_eq!(
            (id.len(), &object(&service, &id)["status"]),
            (16, &json!(200))
        );
    }
    // Requests that the parser refuses.
    for request in [
        &b"GET /\xff\n HTTP/1.1\r\n\r\n"[..],
        b"\x16\x03\x01\r\n\r\n",
    ] {
        let id = send(&service, request);
        assert_eq!(
            object(&service, &id),
            json!({
                "level": "INFO", "target": "request", "request_id": id, "client": "127.0.0.1",
                "status": 400, "bytes": 43, "cause": "the request is not valid HTTP",
            })
        );
    }
    assert_each_line_is_an_object(&service);
}

#[tokio::test]
async fn a_request_makes_one_line_of_text() {
    let service = Service::start().await;
    service.send("GET", "/listings?limit=1", "x-request-id: Mine-1\r\n", "");
    let lines = service.logged("Mine-1");
    assert_eq!(lines.len(), 1, "{lines:?}");
    let (head, line) = lines[0].split_once("] ").expect("a head");
    let time = head
        .strip_prefix('[')
        .and_then(|head| head.strip_suffix(" INFO  request"));
    assert_time(time.expect(head));
    let (fields, rest) = line.split_at("127.0.0.1 GET /listings?limit=1 200 2 ".len());
    let (ms, id) = rest.split_once("ms ").expect("milliseconds");
    assert_eq!(
        (fields, id),
        ("127.0.0.1 GET /listings?limit=1 200 2 ", "Mine-1")
    );
    assert!(ms.parse::<f64>().is_ok_and(|ms| ms > 0.0), "{ms}");

    let id = send(&service, b"nonsense\r\n\r\n");
    let line = service.logged(&id).concat();
    assert!(
        line.contains("] 127.0.0.1 - - 400 43 ")
            && line.ends_with(": the request is not valid HTTP"),
        "{line}"
    );
}

/// A trigger that raises an error with a line that looks like one of the log.
const RAISE: &str = "create function public.refuse() returns trigger language plpgsql set search_path = pg_catalog as $$ \
    begin raise 'refused\n{\"level\":\"INFO\"} \u{1b}[2J %', new.name; end $$; \
    create trigger refused before insert on listing for each row execute function public.refuse()";

#[tokio::test]
async fn the_cause_of_a_failure_is_in_the_line_of_its_request() {
    for format in ["text", "json"] {
        // The documented filter for failures alone.
        let filter = "info,actix_server=warn,actix_http=off,request=warn";
        let settings = [("LOG_FORMAT", format), ("RUST_LOG", filter)];
        let service = Service::start_with(&settings).await;
        run(service.superuser(), RAISE).await;
        service.send("GET", "/listings/1", "x-request-id: quiet\r\n", "");
        let failed = service.post(LOFT);
        assert_eq!(failed.error(), (500, "internal error".to_owned()));
        let id = failed.header("x-request-id").expect("a request id");
        if format == "json" {
            assert_eq!(
                object(&service, id),
                json!({
                    "level": "ERROR", "target": "request", "request_id": id, "client": "127.0.0.1", "method": "POST",
                    "path": "/listings", "status": 500, "bytes": failed.body.len(),
                    "cause": "ERROR P0001: refused\n{\"level\":\"INFO\"} \u{1b}[2J Loft",
                })
            );
            assert_each_line_is_an_object(&service);
        } else {
            let line = service.logged(id).concat();
            let cause =
                format!("ms {id}: ERROR P0001: refused\\n{{\"level\":\"INFO\"}} \\x1b[2J Loft");
            assert!(
                line.contains(" ERROR request] 127.0.0.1 POST /listings 500 ")
                    && line.ends_with(&cause),
                "{line}"
            );
        }
        let log = service.log();
        assert!(log.iter().all(|line| !line.contains("quiet")), "{log:?}");
    }
}

#[tokio::test]
async fn a_trusted_proxy_names_the_client() {
    let db = Database::migrated().await;
    let url = db.service_url().await;
    for (trusted, forwarded, client) in [
        ("", "x-forwarded-for: 192.0.2.1\r\n", "127.0.0.1"),
        ("10.0.0.0/8", "x-forwarded-for: 192.0.2.1\r\n", "127.0.0.1"),
        ("127.0.0.1", "", "127.0.0.1"),
        ("127.0.0.1", "x-forwarded-for: 192.0.2.1\r\n", "192.0.2.1"),
        (
            "127.0.0.1/32",
            "x-forwarded-for: 2001:db8::1\r\n",
            "2001:db8::1",
        ),
        // What the client itself claims is further left.
        (
            "127.0.0.0/8",
            "x-forwarded-for: 198.51.100.7, 192.0.2.1\r\n",
            "192.0.2.1",
        ),
        (
            "127.0.0.1, 10.0.0.0/8",
            "x-forwarded-for: 192.0.2.1, 10.255.255.255\r\n",
            "192.0.2.1",
        ),
        (
            "127.0.0.1,10.0.0.0/15",
            "x-forwarded-for: 192.0.2.1, 10.2.0.0\r\n",
            "10.2.0.0",
        ),
        (
            "0.0.0.0/0",
            "x-forwarded-for: 10.0.0.1, 10.0.0.2\r\n",
            "10.0.0.1",
        ),
        (
            "127.0.0.1,2001:db8::/32",
            "x-forwarded-for: 192.0.2.1, [2001:db8::1]:443\r\n",
            "192.0.2.1",
        ),
        (
            "127.0.0.1",
            "x-forwarded-for: 192.0.2.1:5000\r\n",
            "192.0.2.1",
        ),
        (
            "127.0.0.1",
            "x-forwarded-for: ::ffff:192.0.2.1\r\n",
            "192.0.2.1",
        ),
        // Two lines are one list.
        (
            "127.0.0.1",
            "x-forwarded-for: 192.0.2.1\r\nx-forwarded-for: 192.0.2.2\r\n",
            "192.0.2.2",
        ),
        // From the right up to what is no address.
        (
            "127.0.0.1",
            "x-forwarded-for: 192.0.2.1, unknown\r\n",
            "127.0.0.1",
        ),
        (
            "0.0.0.0/0",
            "x-forwarded-for: 192.0.2.1, , 10.0.0.1\r\n",
            "10.0.0.1",
        ),
    ] {
        let settings = [("LOG_FORMAT", "json"), ("TRUSTED_PROXIES", trusted)];
        let service = Service::start_at(&url, &settings);
        let response = service.send("GET", "/listings/1", forwarded, "");
        let id = response.header("x-request-id").expect("a request id");
        assert_eq!(
            object(&service, id)["client"],
            client,
            "{trusted} {forwarded}"
        );
    }
}

#[tokio::test]
async fn a_client_of_an_ipv6_listener_is_logged_with_its_ipv4_address() {
    let settings = [
        ("LOG_FORMAT", "json"),
        ("LISTEN_ADDR", "[::]:0"),
        ("AUTH", "off"),
        ("TRUSTED_PROXIES", "127.0.0.1"),
    ];
    let service = Service::start_with(&settings).await;
    let address = service.address.replace("[::]", "127.0.0.1");
    let mut connection = Connection::to(&address);
    let response = connection.send("GET", "/listings/1", "x-forwarded-for: 192.0.2.1\r\n", "");
    let id = response.header("x-request-id").expect("a request id");
    assert_eq!(object(&service, id)["client"], "192.0.2.1");
}

#[tokio::test]
async fn the_lines_of_a_start_and_of_a_refusal_are_objects_in_json() {
    let db = Database::migrated().await;
    let url = db.service_url().await;
    let mut service = Service::start_at(&url, &[("LOG_FORMAT", "json")]);
    service.signal("-TERM");
    assert_eq!(service.wait(), Some(0));
    service.logged(r#""message":"stopped""#);
    assert_each_line_is_an_object(&service);

    run(&db.superuser, "drop table listing_price_log cascade").await;
    for (argument, is_json) in [(None, true), (Some("--check"), false)] {
        let mut refused = command(&url);
        refused.env("LOG_FORMAT", "json").args(argument);
        let refused = printed(&refused.output().expect("run the program"));
        if is_json {
            let object: Value = serde_json::from_str(&refused).expect("one line of JSON");
            assert_eq!(
                (&object["level"], &object["target"]),
                (&json!("ERROR"), &json!("listing-api"))
            );
            assert_time(object["time"].as_str().expect("a time"));
            let reasons = object["message"].as_str().expect("a message");
            assert!(
                reasons.starts_with("PostgreSQL refuses ") && reasons.lines().count() == 2,
                "{reasons}"
            );
        } else {
            assert!(
                refused.starts_with("listing-api: PostgreSQL refuses "),
                "{refused}"
            );
        }
    }
}
