//! Invalid input gets the documented error and does not affect the next request.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::{
    Connection, Database, JSON, LOFT, Response, Service, in_checkout, rows, run, value,
};

/// Asserts an error, then that a valid request succeeds on the same connection and on a new one.
fn assert_refused(
    service: &Service,
    connection: &mut Connection,
    request: (&str, &str, &str, &[u8]),
    expected: (u16, &str),
) {
    let (method, path, headers, body) = request;
    let response = connection.send(method, path, headers, body);
    let sent = String::from_utf8_lossy(body);
    assert_eq!(
        response.error(),
        (expected.0, expected.1.to_owned()),
        "{method} {path} {headers} {sent}"
    );
    for connection in [connection, &mut service.connect()] {
        assert_eq!(
            connection.send("GET", "/listings/1", "", "").json()["name"],
            "Loft"
        );
    }
}

#[tokio::test]
async fn a_body_that_is_not_json_gets_400() {
    let service = Service::start().await;
    service.post(LOFT);
    let mut connection = service.connect();
    let with = |from: &str, to: &str| LOFT.replace(from, to).into_bytes();
    let mut not_utf8 = LOFT.as_bytes().to_vec();
    not_utf8[9] = 0xff;
    for body in [
        b"".to_vec(),
        b"{".to_vec(),
        with("480000", "NaN"),
        with("480000", "1e400"),
        with("480000", "-1e400"),
        with("480000", "0123"),
        with("480000", "+1"),
        with("480000", "Infinity"),
        with("Loft", r"\ud800"),
        with("Loft", r"\x"),
        with("Loft", "\n"),
        with("}", "},"),
        // Also in a field that is ignored.
        with(r#"{"name""#, r#"{"id":1e400,"name""#),
        with(r#"{"name""#, r#"{"created_date":"\ud800","name""#),
        [LOFT, "x"].concat().into_bytes(),
        not_utf8,
    ] {
        let response = connection.send("POST", "/listings", JSON, &body);
        let (status, message) = response.error();
        let sent = String::from_utf8_lossy(&body);
        assert_eq!(status, 400, "{sent}: {message}");
        assert!(
            message.starts_with("the body is not JSON: line "),
            "{message}"
        );
        assert_eq!(connection.send("GET", "/listings/1", "", "").status, 200);
    }
    assert_eq!(
        value(service.superuser(), "select count(*) from listing").await,
        "1"
    );
}

#[tokio::test]
#[expect(clippy::too_many_lines, reason = "a table of one row for each rule")]
async fn a_field_that_breaks_a_rule_gets_422_with_its_name() {
    let service = Service::start().await;
    service.post(LOFT);
    let mut connection = service.connect();
    let number = "must be an integer between -2147483648 and 2147483647";
    let range = "must be between 0 and 9999999999.99";
    let nul = "must not contain the character U+0000";
    let held = "must be only a number, such as 480000";
    let phone = "must be a phone number such as +33123456789";
    for (from, to, expected) in [
        (r#""name":"Loft","#, "", "name: is required"),
        (r#""Loft""#, "1", "name: must be a string"),
        (r#""Loft""#, "null", "name: must be a string"),
        (r#""Loft""#, r#""""#, "name: must not be empty"),
        (r#""Loft""#, r#""a\u0000b""#, &format!("name: {nul}")),
        (
            r#""name":"#,
            r#""name":"x","name":"#,
            "name: must be given only once",
        ),
        (
            r#""name":"#,
            r#""a\u0000":1,"name":"#,
            "a\u{0}: is not a field of a listing",
        ),
        (
            r#""name":"#,
            r#""updated_date":1,"updated_date":1,"name":"#,
            "updated_date: must be given only once",
        ),
        (
            r#""name":"#,
            r#""created_date":"a\u0000b","name":"#,
            &format!("created_date: {nul}"),
        ),
        (
            r#""name":"#,
            r#""updated_date":{"a":1,"a":[{"\\\u0000":1}]},"name":"#,
            &format!("updated_date: {nul}"),
        ),
        (r#""city":"Paris","#, "", "postal_address.city: is required"),
        (
            r#""Paris""#,
            r#""""#,
            "postal_address.city: must not be empty",
        ),
        (
            r#""Paris""#,
            r#""a\u0000""#,
            &format!("postal_address.city: {nul}"),
        ),
        (
            r#""FR""#,
            r#""fr""#,
            "postal_address.country: must be two capital letters",
        ),
        (
            r#""FR""#,
            r#""FRA""#,
            "postal_address.country: must be two capital letters",
        ),
        (
            r#""FR"}"#,
            r#""FR","planet":1}"#,
            "postal_address.planet: is not a field of a listing",
        ),
        (
            r#""FR"}"#,
            r#""FR","city":"x"}"#,
            "postal_address.city: must be given only once",
        ),
        (
            "APARTMENT",
            "CASTLE",
            "building_type: must be STUDIO, APARTMENT or HOUSE",
        ),
        (
            "APARTMENT",
            "house",
            "building_type: must be STUDIO, APARTMENT or HOUSE",
        ),
        ("480000", "-0.01", &format!("latest_price_eur: {range}")),
        (
            "480000",
            "10000000000",
            &format!("latest_price_eur: {range}"),
        ),
        ("480000", "1e300", &format!("latest_price_eur: {range}")),
        (
            "480000",
            "0.001",
            "latest_price_eur: must have at most 2 decimals",
        ),
        (
            "480000",
            "0.1000000000000000055",
            "latest_price_eur: must have at most 2 decimals",
        ),
        ("480000", r#""-1""#, &format!("latest_price_eur: {range}")),
        (
            "480000",
            r#""0.001""#,
            "latest_price_eur: must have at most 2 decimals",
        ),
        (
            "480000",
            r#""480 000 €""#,
            &format!("latest_price_eur: {held}"),
        ),
        (
            "480000",
            r#""480,000""#,
            &format!("latest_price_eur: {held}"),
        ),
        ("480000", r#""""#, &format!("latest_price_eur: {held}")),
        (
            "480000",
            r#"" 480000""#,
            &format!("latest_price_eur: {held}"),
        ),
        (
            "480000",
            r#""480000 ""#,
            &format!("latest_price_eur: {held}"),
        ),
        ("480000", r#""+1""#, &format!("latest_price_eur: {held}")),
        ("480000", r#""01""#, &format!("latest_price_eur: {held}")),
        ("480000", r#""1.""#, &format!("latest_price_eur: {held}")),
        ("480000", r#""null""#, &format!("latest_price_eur: {held}")),
        ("480000", r#""[1]""#, &format!("latest_price_eur: {held}")),
        (
            "480000",
            r#""\"480000\"""#,
            &format!("latest_price_eur: {held}"),
        ),
        ("480000", "true", "latest_price_eur: must be a number"),
        ("480000", "null", "latest_price_eur: must be a number"),
        ("480000", "[1]", "latest_price_eur: must be a number"),
        ("42.5", "-1", "surface_area_m2: must be 0 or more"),
        ("42.5", r#""-1""#, "surface_area_m2: must be 0 or more"),
        ("42.5", r#""NaN""#, &format!("surface_area_m2: {held}")),
        ("42.5", r#""inf""#, &format!("surface_area_m2: {held}")),
        ("42.5", r#""1e400""#, "surface_area_m2: must be a number"),
        (
            r#""rooms_count":2"#,
            r#""rooms_count":0"#,
            "rooms_count: must be 1 or more",
        ),
        (
            r#""rooms_count":2"#,
            r#""rooms_count":2.7"#,
            "rooms_count: must be an integer",
        ),
        (
            r#""rooms_count":2"#,
            r#""rooms_count":3000000000"#,
            &format!("rooms_count: {number}"),
        ),
        (
            r#""rooms_count":2"#,
            r#""rooms_count":1e300"#,
            &format!("rooms_count: {number}"),
        ),
        (
            r#""rooms_count":2"#,
            r#""rooms_count":"2.7""#,
            "rooms_count: must be an integer",
        ),
        (
            r#""rooms_count":2"#,
            r#""rooms_count":"two""#,
            &format!("rooms_count: {held}"),
        ),
        (
            r#""rooms_count":2"#,
            r#""rooms_count":true"#,
            "rooms_count: must be an integer",
        ),
        (
            r#""bedrooms_count":1"#,
            r#""bedrooms_count":-1"#,
            "bedrooms_count: must be 0 or more",
        ),
        (
            r#""bedrooms_count":1"#,
            r#""bedrooms_count":1.5"#,
            "bedrooms_count: must be an integer",
        ),
        (
            "+33123456789",
            "+0",
            &format!("contact_phone_number: {phone}"),
        ),
        (
            "+33123456789",
            "33123456789",
            &format!("contact_phone_number: {phone}"),
        ),
        (
            "+33123456789",
            "+1234567890123456",
            &format!("contact_phone_number: {phone}"),
        ),
        (
            "+33123456789",
            " ",
            &format!("contact_phone_number: {phone}"),
        ),
    ] {
        let body = LOFT.replacen(from, to, 1);
        assert_ne!(body, LOFT, "{from}");
        for (method, path) in [("POST", "/listings"), ("PUT", "/listings/1")] {
            assert_refused(
                &service,
                &mut connection,
                (method, path, JSON, body.as_bytes()),
                (422, expected),
            );
        }
        if !expected.contains("required") && !expected.contains("once") {
            assert_refused(
                &service,
                &mut connection,
                ("PATCH", "/listings/1", JSON, body.as_bytes()),
                (422, expected),
            );
        }
    }
    let id = "id: must be absent or 1, the id in the path";
    // Null is not the id in the path, unlike on POST, where it is ignored.
    let without_id = LOFT.replacen('{', r#"{"id":null,"#, 1);
    assert_refused(
        &service,
        &mut connection,
        ("PUT", "/listings/1", JSON, without_id.as_bytes()),
        (422, id),
    );
    for (body, expected) in [
        ("[]", "the body must be an object"),
        (" 1 ", "the body must be an object"),
        (r#"{"id":7}"#, id),
        (r#"{"id":"7"}"#, id),
        (r#"{"id":null}"#, id),
        (r#"{"id":1,"id":1}"#, "id: must be given only once"),
        ("null", "the body must be an object"),
        (
            r#"{"postal_address":null}"#,
            "postal_address: must be an object",
        ),
        (
            r#"{"postal_address":[]}"#,
            "postal_address: must be an object",
        ),
        (
            r#"{"name":1,"rooms_count":0,"x":{}}"#,
            "name: must be a string; rooms_count: must be 1 or more; x: is not a field of a listing",
        ),
    ] {
        assert_refused(
            &service,
            &mut connection,
            ("PATCH", "/listings/1", JSON, body.as_bytes()),
            (422, expected),
        );
    }
    assert_eq!(
        value(
            service.superuser(),
            "select count(*) from listing_price_log"
        )
        .await,
        "1"
    );
}

/// Chromium sent these requests for nine pages, such as were written against the earlier Flask service. A proxy recorded them,
/// and only their line ends are others in the file. The pages create by `FormData`, by numbers, by an object with an id of null,
/// and by jQuery; edit an object as it was read by `fetch`, with a header that belongs into responses, and by axios; list and
/// show a history; and let the browser post a form itself.
#[tokio::test]
async fn the_requests_that_a_browser_sent_for_nine_pages_get_what_the_pages_need() {
    let service = Service::start().await;
    let file = in_checkout("tests/browser_requests.http");
    let recorded = fs::read_to_string(file).expect("read the requests");
    let recorded = recorded.strip_suffix('\n').expect("a last line");
    let mut connection = service.connect();
    let mut answers = Vec::new();
    for request in recorded.split("\n=====\n") {
        let (head, body) = request.split_once("\n\n").expect("a head");
        let line: Vec<_> = head.split(' ').take(2).collect();
        let head = head.replace('\n', "\r\n");
        connection.write(format!("{head}\r\n\r\n{body}").as_bytes());
        let response = connection.receive_unchecked(line[0]);
        let origin = response.header("access-control-allow-origin");
        assert_eq!(origin, Some("*"), "{response:?}");
        answers.push(format!("{} {}", line.join(" "), response.status));
    }
    let expected = [
        "OPTIONS /listings 204",
        "POST /listings 201",
        "OPTIONS /listings 204",
        "POST /listings 201",
        "OPTIONS /listings 204",
        "POST /listings 201",
        "GET /listings/1 200",
        "OPTIONS /listings/1 204",
        "PUT /listings/1 200",
        "OPTIONS /listings/1 204",
        "GET /listings/1 200",
        "PUT /listings/1 200",
        "GET /listings 200",
        "OPTIONS /listings/2 204",
        "PUT /listings/2 200",
        "GET /listings/2/prices 200",
        "OPTIONS /listings 204",
        "POST /listings 201",
        "GET /listings/4/prices 200",
        "GET /listings 200",
        "GET /listings/1/prices 200",
        "GET /listings/1/prices.svg 200",
        "POST /listings 415",
        "GET /favicon.ico 404",
    ];
    assert_eq!(answers, expected);
    let db = service.superuser();
    let listings = "select id, name, price, surface_area_m2, rooms_count, bedrooms_count, contact_phone_number from listing order by id";
    let expected = [
        "1|Loft with a view|465000.00|42.5|2|1|null",
        "2|Loft|470000.00|42.5|2|1|null",
        "3|Loft|480000.00|42.5|2|1|+33123456789",
        "4|Loft|480000.00|42|2|1|+4930123456",
    ];
    assert_eq!(rows(db, listings).await, expected);
    let history = "select listing_id, new_price from listing_price_log order by id";
    let expected = [
        "1|480000.00",
        "2|480000.10",
        "3|480000.00",
        "1|465000.00",
        "2|470000.00",
        "4|480000.00",
    ];
    assert_eq!(rows(db, history).await, expected);
}

/// More that such pages send.
#[tokio::test]
async fn a_page_may_send_what_it_read_and_what_an_html_form_holds() {
    let service = Service::start().await;
    // A form holds only strings, and a page may send an id that it made itself, or none.
    let form = LOFT
        .replacen(
            '{',
            r#"{"id":null,"created_date":"","updated_date":null,"#,
            1,
        )
        .replace("480000", r#""480000.10""#)
        .replace("42.5", r#""42.5""#)
        .replace(r#"rooms_count":2"#, r#"rooms_count":"2""#)
        .replace(r#"bedrooms_count":1"#, r#"bedrooms_count":"1""#)
        .replace("+33123456789", "");
    let created = service.post(&form);
    let mut listing = created.json();
    assert_eq!(created.id(), 1);
    let amount = r#""latest_price_eur":480000.1,"surface_area_m2":42.5,"rooms_count":2,"bedrooms_count":1,"created_date""#;
    assert!(created.text().contains(amount), "{}", created.text());
    assert_eq!(
        service.post(&form.replace("null", "1")).id(),
        2,
        "the id of a new listing is ignored"
    );

    // The whole object back, as it was read.
    for method in ["PUT", "PATCH"] {
        let read = service.get("/listings/1");
        let written = service.send(method, "/listings/1", JSON, &read.body);
        assert_eq!(written.status, 200, "{written:?}");
        let updated = |response: &Response| response.json()["updated_date"].to_string();
        let with_old_date = written.text().replace(&updated(&written), &updated(&read));
        assert_eq!(with_old_date, read.text());
    }

    // The whole object back, with a price from a field of a form.
    listing["latest_price_eur"] = "9999999999.99".into();
    listing["id"] = "1".into();
    listing["contact_phone_number"] = "+4912".into();
    let sent = service.send("PUT", "/listings/1", JSON, listing.to_string());
    assert!(sent.text().contains(r#""latest_price_eur":9999999999.99,"#));
    assert_eq!(sent.json()["contact_phone_number"], "+4912");
    let blank = service.patch("/listings/1", r#"{"contact_phone_number":""}"#);
    assert_eq!(blank.json().get("contact_phone_number"), None);
    listing["id"] = 2.into();
    assert_eq!(
        service
            .send("PUT", "/listings/1", JSON, listing.to_string())
            .error(),
        (
            422,
            "id: must be absent or 1, the id in the path".to_owned()
        )
    );

    // A form that the browser posts itself is not JSON.
    let form = "content-type: application/x-www-form-urlencoded\r\n";
    let posted = service.send(
        "POST",
        "/listings",
        form,
        "name=Loft&latest_price_eur=480000",
    );
    let message = "content-type: must be application/json";
    assert_eq!(posted.error(), (415, message.to_owned()));

    let list = service.get("/listings").json();
    assert_eq!(list.as_array().map(Vec::len), Some(2));
    let prices = service.get("/listings/1/prices").json();
    let amounts: Vec<_> = prices.as_array().expect("an array").iter().collect();
    assert_eq!(amounts.len(), 2);
    assert_eq!(amounts[0]["price_eur"].to_string(), "480000.1");
    assert_eq!(amounts[1]["price_eur"].to_string(), "9999999999.99");
}

#[tokio::test]
async fn an_ignored_field_must_be_json_of_the_same_depth_as_any_other_and_may_hold_a_backslash() {
    let service = Service::start().await;
    let mut connection = service.connect();
    let mut send = |field: &str, value: &str| {
        let body = LOFT.replacen('{', &format!("{{\"{field}\":{value},"), 1);
        connection.send("POST", "/listings", JSON, body).status
    };
    assert_eq!(send("created_date", r#""\\u0000 \" \\""#), 201);
    assert_eq!(send("id", r#""\u0000""#), 422);
    let mut refused = 0;
    for depth in 120..135 {
        let value = "[".repeat(depth) + &"]".repeat(depth);
        let statuses = (send("created_date", &value), send("unknown", &value));
        assert!(
            [(201, 422), (400, 400)].contains(&statuses),
            "{depth}: {statuses:?}"
        );
        refused += usize::from(statuses.0 == 400);
    }
    assert!((1..15).contains(&refused), "{refused} of 15");
}

#[tokio::test]
async fn a_string_may_be_as_long_as_documented() {
    let service = Service::start().await;
    service.post(LOFT);
    for (field, limit) in [
        ("name", 500),
        ("postal_address.street_address", 500),
        ("postal_address.postal_code", 40),
        ("postal_address.city", 200),
    ] {
        let patch = |length| {
            let value = format!("\"{}\"", "é".repeat(length));
            let fields = field.rsplit('.');
            fields.fold(value, |inner, name| format!("{{\"{name}\":{inner}}}"))
        };
        assert_eq!(service.patch("/listings/1", &patch(limit)).status, 200);
        let message = format!("{field}: must have at most {limit} characters");
        let refused = service.patch("/listings/1", &patch(limit + 1));
        assert_eq!(refused.error(), (422, message));
    }
}

#[tokio::test]
async fn an_integer_may_be_written_with_a_decimal_point() {
    let service = Service::start().await;
    let body = LOFT
        .replace(r#""rooms_count":2"#, r#""rooms_count":2.0"#)
        .replace("480000", "4.8e5");
    let created = service.post(&body);
    assert_eq!(created.status, 201);
    assert!(
        created.text().contains(r#""latest_price_eur":480000,"#)
            && created.text().contains(r#""rooms_count":2,"#)
    );
}

#[tokio::test]
async fn a_body_that_is_not_declared_as_json_gets_415() {
    let service = Service::start().await;
    service.post(LOFT);
    let mut connection = service.connect();
    let json = "content-type: must be application/json";
    let merge = "content-type: must be application/merge-patch+json or application/json";
    for (method, path, message) in [
        ("POST", "/listings", json),
        ("PUT", "/listings/1", json),
        ("PATCH", "/listings/1", merge),
    ] {
        for headers in [
            "",
            "content-type: text/plain\r\n",
            "content-type: application/jsonp\r\n",
            "content-type: /\r\n",
        ] {
            assert_refused(
                &service,
                &mut connection,
                (method, path, headers, LOFT.as_bytes()),
                (415, message),
            );
        }
        let encoded = format!("{JSON}content-encoding: gzip\r\n");
        let message = "content-encoding: must be absent";
        assert_refused(
            &service,
            &mut connection,
            (method, path, &encoded, LOFT.as_bytes()),
            (415, message),
        );
    }
    for content_type in [
        "Application/JSON",
        "application/json; charset=utf-8",
        "application/json;charset=\"utf-8\"",
    ] {
        let headers = format!("content-type: {content_type}\r\n");
        assert_eq!(
            service.send("POST", "/listings", &headers, LOFT).status,
            201
        );
    }
}

#[tokio::test]
async fn a_body_of_64_kib_is_accepted_and_a_longer_one_gets_413() {
    let service = Service::start().await;
    service.post(LOFT);
    let of_length =
        |length: usize| LOFT.replace("Under the roof", &"x".repeat(length - LOFT.len() + 14));
    let mut connection = service.connect();
    let largest = of_length(64 * 1024);
    assert_eq!(
        connection.send("POST", "/listings", JSON, &largest).status,
        201
    );
    let larger = of_length(64 * 1024 + 1);
    let request = ("PUT", "/listings/1", JSON, larger.as_bytes());
    assert_refused(
        &service,
        &mut connection,
        request,
        (413, "the body must not exceed 64 KiB"),
    );
    // In chunks, without a content-length.
    connection.write(b"POST /listings HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n");
    for piece in larger.as_bytes().chunks(10_000) {
        connection.write(&[format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat());
    }
    connection.write(b"0\r\n\r\n");
    assert_eq!(connection.receive("POST", "/listings").status, 413);
    assert_eq!(service.get("/listings/1").status, 200);
}

#[tokio::test]
async fn an_unknown_id_or_path_gets_404() {
    let service = Service::start().await;
    service.post(LOFT);
    let mut connection = service.connect();
    for id in [
        "2",
        "0",
        "-1",
        "+1",
        "01",
        "1.0",
        "2147483648",
        "99999999999999999999",
        "abc",
        "%31x",
        "1%00",
    ] {
        for path in [format!("/listings/{id}"), format!("/listings/{id}/prices")] {
            let (status, message) = connection.send("GET", &path, "", "").error();
            assert!(
                status == 404
                    && message.starts_with("listing ")
                    && message.ends_with(" does not exist"),
                "{path}: {message}"
            );
        }
        for method in ["PUT", "PATCH"] {
            assert_eq!(
                connection
                    .send(method, &format!("/listings/{id}"), JSON, LOFT)
                    .status,
                404
            );
        }
        assert_eq!(
            connection
                .send("DELETE", &format!("/listings/{id}"), "", "")
                .status,
            404
        );
    }
    let nothing = "no such path, see /openapi.yaml";
    for path in [
        "/listings/",
        "/listings/1/",
        "/listings/1/prices/",
        "/listing",
        "/health/live",
        "/metrics",
        "//",
        "/docs/",
    ] {
        let (status, message) = connection.send("GET", path, "", "").error();
        assert!(
            status == 404 && (message == nothing || path == "/listings/" || path == "/docs/"),
            "{path}: {message}"
        );
    }
}

#[tokio::test]
#[expect(clippy::too_many_lines, reason = "a table of one row for each rule")]
async fn a_parameter_that_breaks_a_rule_gets_400_with_its_name() {
    let service = Service::start().await;
    service.post(LOFT);
    let mut connection = service.connect();
    for (query, expected) in [
        ("/listings?limit=0", "limit: must be between 1 and 1000"),
        ("/listings?limit=1001", "limit: must be between 1 and 1000"),
        ("/listings?limit=1e2", "limit: must be between 1 and 1000"),
        ("/listings?limit=", "limit: must be between 1 and 1000"),
        (
            "/listings?limit=1&limit=2",
            "limit: must be given only once",
        ),
        (
            "/listings?after=-1",
            "after: must be an integer between 0 and 2147483647",
        ),
        (
            "/listings?after=2147483648",
            "after: must be an integer between 0 and 2147483647",
        ),
        (
            "/listings?min_rooms=x",
            "min_rooms: must be an integer between 0 and 2147483647",
        ),
        (
            "/listings?building_type=house",
            "building_type: must be STUDIO, APARTMENT or HOUSE",
        ),
        (
            "/listings?country=fr",
            "country: must be two capital letters",
        ),
        ("/listings?city=", "city: must not be empty"),
        (
            "/listings?city=%00",
            "city: must not contain the character U+0000",
        ),
        (
            "/listings?min_price=-1",
            "min_price: must be between 0 and 9999999999.99",
        ),
        (
            "/listings?max_price=0.001",
            "max_price: must have at most 2 decimals",
        ),
        ("/listings?max_price=x", "max_price: must be a number"),
        ("/listings?min_price=0ejunk", "min_price: must be a number"),
        ("/listings?min_price=0e", "min_price: must be a number"),
        (
            "/listings?a&b&c&d&e&f&g&h&i&j&k&l&m&n&o&p&q&r&s&t&u",
            "the query must have at most 20 parameters",
        ),
        (
            "/listings?a&b&c&d&e&f&g&h&i&j&k&l&m&n&o&p&q&r&s&t&",
            "a: is not a parameter of this path",
        ),
        (
            "/listings?min_surface=NaN",
            "min_surface: must be a number, 0 or more",
        ),
        (
            "/listings?max_surface=-1",
            "max_surface: must be a number, 0 or more",
        ),
        (
            "/listings?min_bedrooms=1.5",
            "min_bedrooms: must be an integer between 0 and 2147483647",
        ),
        ("/listings?page=2", "page: is not a parameter of this path"),
        ("/listings?city=%FF", "city: must be UTF-8"),
        (
            "/listings/1/prices?limit=0",
            "limit: must be between 1 and 1000",
        ),
        (
            "/listings/1/prices?from=yesterday",
            "from: must be a date and time such as 2023-01-17T08:17:32Z",
        ),
        (
            "/listings/1/prices?to=2023-01-17",
            "to: must be a date and time such as 2023-01-17T08:17:32Z",
        ),
        (
            "/listings/1/prices?from=2023-01-17T08:17:32+01:00",
            "from: must have the + of its offset encoded as %2B",
        ),
        (
            "/listings/1/prices?after=x",
            "after: must come from a Link header",
        ),
        (
            "/listings/1/prices?at=now",
            "at: must be a date and time such as 2023-01-17T08:17:32Z",
        ),
        (
            "/listings/1/prices?at=2023-01-17T08:17:32Z&limit=1",
            "at: must be the only parameter",
        ),
        (
            "/listings/1/prices?from=2023-01-17T08:17:32Z&at=2023-01-17T08:17:32Z",
            "at: must be the only parameter",
        ),
        ("/listings/1/prices?x", "x: is not a parameter of this path"),
    ] {
        assert_refused(
            &service,
            &mut connection,
            ("GET", query, "", b""),
            (400, expected),
        );
    }
}

#[tokio::test]
async fn a_request_that_is_not_http_gets_400_and_its_connection_is_closed() {
    let service = Service::start().await;
    service.post(LOFT);
    for garbage in [
        &b"GARBAGE\r\n\r\n"[..],
        b"GET /\x01 HTTP/1.1\r\n\r\n",
        b"POST /listings HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST /listings HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
    ] {
        let mut connection = service.connect();
        // After a valid request on the same connection, which must get its whole response first.
        connection.write(&[b"GET /listings/1 HTTP/1.1\r\nhost: x\r\n\r\n", garbage].concat());
        assert_eq!(connection.receive("GET", "/listings/1").status, 200);
        let response = connection.receive("GET", "/");
        assert_eq!(
            response.error(),
            (400, "the request is not valid HTTP".to_owned())
        );
        assert_eq!(response.header("access-control-allow-origin"), Some("*"));
        connection.assert_closed();
        assert_eq!(service.get("/listings/1").status, 200);
    }
}

#[tokio::test]
async fn an_unknown_file_or_method_and_a_broken_body_or_head_are_explained() {
    let service = Service::start().await;
    let long_head = format!("x: {}\r\n", "x".repeat(128 * 1024));
    let chunked = format!("{JSON}transfer-encoding: chunked\r\n");
    for (method, path, headers, body, expected) in [
        ("GET", "/docs/x.js", "", "", (404, "no such file: x.js")),
        (
            "PUT",
            "/listings",
            "",
            "",
            (
                405,
                "PUT is not allowed on this path, use GET, HEAD, POST, OPTIONS",
            ),
        ),
        (
            "POST",
            "/listings",
            &chunked,
            "zz\r\n",
            (400, "the body is incomplete or does not match its headers"),
        ),
        (
            "GET",
            "/listings/1",
            &long_head,
            "",
            (431, "the request head is too large"),
        ),
    ] {
        let mut connection = service.connect();
        let head = format!("{method} {path} HTTP/1.1\r\nhost: x\r\n{headers}\r\n{body}");
        connection.write(head.as_bytes());
        let error = connection.receive(method, path).error();
        assert_eq!(error, (expected.0, expected.1.to_owned()));
    }
}

#[tokio::test]
async fn slow_requests_get_408_and_do_not_delay_others() {
    let service = Service::start().await;
    service.post(LOFT);
    let begun = Instant::now();
    let mut slow: Vec<_> = (0..200).map(|_| service.connect()).collect();
    for (index, connection) in slow.iter_mut().enumerate() {
        if index % 3 == 2 {
            assert_eq!(connection.send("GET", "/listings/1", "", "").status, 200);
        }
        connection.write(match index % 3 {
            0 | 2 => b"GET /listings/1 HTTP/1.1\r\nhos",
            _ => b"POST /listings HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{\"na",
        });
    }
    while begun.elapsed() < Duration::from_secs(8) {
        let sent = Instant::now();
        assert_eq!(service.get("/listings/1").status, 200);
        assert_eq!(service.post(LOFT).status, 201);
        assert!(
            sent.elapsed() < Duration::from_secs(2),
            "took {:?}",
            sent.elapsed()
        );
        thread::sleep(Duration::from_millis(50));
    }
    for (index, connection) in slow.iter_mut().enumerate() {
        let (status, message) = connection.receive("POST", "/").error();
        let expected = [
            "the request took too long to arrive",
            "the body took too long to arrive",
            "the request took too long to arrive",
        ][index % 3];
        assert_eq!((status, message.as_str()), (408, expected));
        connection.assert_closed();
    }
    assert!(
        begun.elapsed() < Duration::from_secs(15),
        "{:?}",
        begun.elapsed()
    );
}

#[tokio::test]
async fn a_slow_reader_of_a_long_list_holds_neither_memory_nor_a_connection() {
    let db = Database::migrated().await;
    let fill = "insert into listing (name, description, building_type, street_address, postal_code, city, country, \
        surface_area_m2, rooms_count, bedrooms_count, price) \
        select 'Loft', repeat('Under the roof. ', 10), 'HOUSE', 'x', 'x', 'x', 'FR', 1, 1, 1, n from generate_series(1, 300000) as n";
    run(&db.superuser, fill).await;
    run(&db.superuser, "analyze listing").await;
    let service = Service::start_on(db, &[("POOL_SIZE", "1"), ("WORKERS", "1")]).await;
    let mut slow = service.connect();
    slow.request("GET", "/listings", "", "");
    thread::sleep(Duration::from_millis(500));
    // The only connection of the pool is free while the client does not read.
    for _ in 0..20 {
        let sent = Instant::now();
        assert_eq!(service.get("/listings?limit=1").status, 200);
        assert!(
            sent.elapsed() < Duration::from_secs(1),
            "took {:?}",
            sent.elapsed()
        );
    }
    let listings = slow.receive_unchecked("GET").json();
    let listings = listings.as_array().expect("an array");
    assert_eq!(listings.len(), 300_000);
    assert!(
        listings
            .iter()
            .zip(1..)
            .all(|(listing, id)| listing["id"] == id)
    );
    assert!(
        service.resident_kib() < 64 * 1024,
        "{} KiB",
        service.resident_kib()
    );
}

#[tokio::test]
async fn a_list_that_fails_midway_closes_its_connection_and_logs_the_cause() {
    let db = Database::migrated().await;
    let fill = "insert into listing (name, description, building_type, street_address, postal_code, city, country, \
        surface_area_m2, rooms_count, bedrooms_count, price) \
        select 'Loft', repeat('x', 500), 'HOUSE', 'x', 'x', 'x', 'FR', 1, 1, 1, n from generate_series(1, 60000) as n";
    run(&db.superuser, fill).await;
    let service = Service::start_on(db, &[]).await;
    let mut slow = service.connect();
    slow.write(b"GET /listings HTTP/1.1\r\nhost: x\r\nx-request-id: slow\r\n\r\n");
    slow.wait_for_the_first_byte();
    run(service.superuser(), "alter table listing rename to moved").await;
    // Without the last chunk, the client knows that the list is incomplete.
    assert!(!slow.rest().ends_with(b"0\r\n\r\n"));
    let causes = service.logged("broke off");
    assert_eq!(causes.len(), 1, "{causes:?}");
    assert!(
        causes[0].contains("slow: the response broke off: ERROR 42P01: relation"),
        "{causes:?}"
    );
}

#[tokio::test]
async fn a_replacement_that_must_create_gets_412() {
    let service = Service::start().await;
    let etag = service.post(LOFT).header("etag").map(str::to_owned);
    let mut connection = service.connect();
    let headers = format!("{JSON}if-none-match: *\r\n");
    for id in [1, 2] {
        let error = connection
            .send("PUT", &format!("/listings/{id}"), &headers, LOFT)
            .error();
        let message = "if-none-match: PUT never creates a listing, use POST";
        assert_eq!(error, (412, message.to_owned()));
    }
    let after = service.get("/listings/1").header("etag").map(str::to_owned);
    assert_eq!(after, etag);
}

#[tokio::test]
async fn a_connect_or_upgrade_is_answered_at_once() {
    let service = Service::start().await;
    service.post(LOFT);
    let upgrade = "connection: upgrade\r\nupgrade: WebSocket\r\nsec-websocket-version: 13\r\n";
    let with_body = format!("{upgrade}{JSON}content-length: 2\r\n");
    for (line, headers, status) in [
        ("CONNECT example.com:443", "", 404),
        ("CONNECT /listings", "", 405),
        ("GET /listings/1", upgrade, 200),
        ("GET /nothing", upgrade, 400),
        ("POST /listings", &with_body, 400),
    ] {
        let mut connection = service.connect();
        let begun = Instant::now();
        connection.write(format!("{line} HTTP/1.1\r\nhost: x\r\n{headers}\r\n").as_bytes());
        let response = connection.receive_unchecked("GET");
        assert_eq!(response.status, status, "{line}: {response:?}");
        connection.assert_closed();
        assert!(begun.elapsed() < Duration::from_secs(3), "{line}");
    }
    // A client that offers HTTP/2 gets HTTP/1.1.
    let headers = format!("{JSON}connection: upgrade\r\nupgrade: h2c\r\n");
    let created = service.send("POST", "/listings", &headers, LOFT);
    assert_eq!(created.status, 201);
}

/// The server and a proxy before it must not disagree about where a request ends.
#[tokio::test]
async fn a_request_whose_end_is_ambiguous_gets_400_and_its_connection_is_closed() {
    let service = Service::start().await;
    service.post(LOFT);
    let chunked = "transfer-encoding: chunked\r\n";
    for (headers, body) in [
        (
            "content-length: 5\r\ntransfer-encoding: chunked\r\n",
            "0\r\n\r\n",
        ),
        (
            "transfer-encoding: chunked\r\ncontent-length: 5\r\n",
            "0\r\n\r\n",
        ),
        ("content-length: 2\r\ncontent-length: 2\r\n", "{}"),
        ("content-length: 2\r\ncontent-length: 3\r\n", "{}"),
        ("content-length: 2, 2\r\n", "{}"),
        ("content-length: +2\r\n", "{}"),
        ("content-length: -2\r\n", "{}"),
        ("content-length: 0x2\r\n", "{}"),
        ("content-length: 2 2\r\n", "{}"),
        ("content-length:\r\n", "{}"),
        ("content-length: 18446744073709551616\r\n", "{}"),
        ("content-length : 2\r\n", "{}"),
        (" content-length: 2\r\n", "{}"),
        ("x: 1\r\n content-length: 2\r\n", "{}"),
        ("x: 1\r\n\tcontent-length: 2\r\n", "{}"),
        ("x: 1\rcontent-length: 2\r\n", "{}"),
        ("x\0: 1\r\ncontent-length: 2\r\n", "{}"),
        // A line that ends without a carriage return, also the empty one.
        ("x: 1\ncontent-length: 2\r\n", "{}"),
        ("content-length: 2\n", "{}"),
        ("content-length: 2\r\n\n{}", ""),
        (
            "transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n",
            "0\r\n\r\n",
        ),
        ("transfer-encoding: chunked, identity\r\n", "0\r\n\r\n"),
        ("transfer-encoding: gzip, chunked\r\n", "0\r\n\r\n"),
        ("transfer-encoding: xchunked\r\n", "0\r\n\r\n"),
        ("transfer-encoding: identity\r\n", "{}"),
        ("transfer-encoding: \"chunked\"\r\n", "0\r\n\r\n"),
        ("transfer-encoding:\u{b}chunked\r\n", "0\r\n\r\n"),
        (chunked, "+2\r\n{}\r\n0\r\n\r\n"),
        (chunked, "-2\r\n{}\r\n0\r\n\r\n"),
        (chunked, "0x2\r\n{}\r\n0\r\n\r\n"),
        (chunked, "2\n{}\n0\n\n"),
        (chunked, "2\r\n{}0\r\n\r\n"),
        (chunked, "2\r\n{}x\r\n0\r\n\r\n"),
        (chunked, "\r\n{}\r\n0\r\n\r\n"),
        (chunked, "fffffffffffffffff\r\n{}\r\n0\r\n\r\n"),
        (chunked, "2;x=\n\r\n{}\r\n0\r\n\r\n"),
    ] {
        let mut connection = service.connect();
        let head = format!("POST /listings HTTP/1.1\r\nhost: x\r\n{JSON}{headers}\r\n");
        let next = "GET /listings/1 HTTP/1.1\r\nhost: x\r\n\r\n";
        connection.write(format!("{head}{body}{next}").as_bytes());
        let response = connection.receive("POST", "/listings");
        assert_eq!(response.status, 400, "{headers}{body}: {response:?}");
        connection.assert_closed();
    }
    let count = "select count(*) from listing";
    assert_eq!(value(service.superuser(), count).await, "1");
}
