//! What clients can rely on: each endpoint with valid input.

use std::thread;

use serde_json::{Value, json};

use crate::support::{
    Connection, JSON, LOFT, OPENAPI, OPENAPI_YAML, Service, connect, program, refusal, rows, run,
    succeed, unguarded, validator, value,
};

/// The listing without its dates, to compare whole bodies.
fn without_dates(mut listing: Value) -> Value {
    for name in ["created_date", "updated_date"] {
        let date = listing[name].take();
        let date = date.as_str().expect("a date");
        assert!(
            date.len() == 27 && date.ends_with('Z') && date.contains('T'),
            "{date}"
        );
        listing.as_object_mut().expect("an object").remove(name);
    }
    listing
}

#[tokio::test]
async fn a_listing_is_created_read_replaced_changed_and_deleted() {
    let service = Service::start().await;
    let created = service.post(LOFT);
    assert_eq!(created.status, 201);
    assert_eq!(created.header("location"), Some("/listings/1"));
    let expected: Value = serde_json::from_str(LOFT).expect("JSON");
    let mut listing = without_dates(created.json());
    assert_eq!(listing["id"].take(), 1);
    listing.as_object_mut().expect("an object").remove("id");
    assert_eq!(listing, expected);

    let read = service.get("/listings/1");
    assert_eq!((read.status, read.text()), (200, created.text()));
    assert_eq!(read.header("etag"), created.header("etag"));
    assert_eq!(read.header("cache-control"), Some("no-cache"));

    let smaller = LOFT
        .replace("480000", "479999.5")
        .replace(r#","contact_phone_number":"+33123456789""#, "");
    let replaced = service.send("PUT", "/listings/1", JSON, &smaller);
    assert_eq!(replaced.status, 200);
    assert_ne!(replaced.header("etag"), read.header("etag"));
    assert_eq!(replaced.json()["created_date"], read.json()["created_date"]);
    assert_eq!(replaced.json()["latest_price_eur"], json!(479_999.5));
    assert_eq!(replaced.json().get("contact_phone_number"), None);

    let merge = "content-type: application/merge-patch+json\r\n";
    let patch = r#"{"postal_address":{"city":"Lyon"},"contact_phone_number":"+4912"}"#;
    let patched = service.send("PATCH", "/listings/1", merge, patch).json();
    assert_eq!(
        patched["postal_address"],
        json!({"street_address": "1 rue Oberkampf", "postal_code": "75011", "city": "Lyon", "country": "FR"})
    );
    assert_eq!(patched["contact_phone_number"], "+4912");
    let patched = service.send(
        "PATCH",
        "/listings/1",
        JSON,
        r#"{"contact_phone_number":null}"#,
    );
    assert_eq!(patched.json().get("contact_phone_number"), None);

    let deleted = service.send("DELETE", "/listings/1", "", "");
    assert_eq!((deleted.status, deleted.body.len()), (204, 0));
    for path in ["/listings/1", "/listings/1/prices"] {
        assert_eq!(
            service.get(path).error(),
            (404, "listing 1 does not exist".to_owned())
        );
    }
    assert_eq!(service.send("DELETE", "/listings/1", "", "").status, 404);
    assert_eq!(service.send("PUT", "/listings/1", JSON, LOFT).status, 404);
    assert_eq!(service.send("PATCH", "/listings/1", JSON, "{}").status, 404);
}

#[tokio::test]
async fn the_fields_of_a_listing_come_in_the_order_of_the_contract() {
    let service = Service::start().await;
    let text = service.post(LOFT).text().to_owned();
    let mut from = 0;
    for name in [
        "id",
        "name",
        "postal_address",
        "street_address",
        "postal_code",
        "city",
        "country",
        "description",
        "building_type",
        "latest_price_eur",
        "surface_area_m2",
        "rooms_count",
        "bedrooms_count",
        "contact_phone_number",
        "created_date",
        "updated_date",
    ] {
        let at = text[from..].find(&format!("\"{name}\":"));
        from += at.unwrap_or_else(|| panic!("{name} is out of order in {text}"));
    }
}

#[tokio::test]
async fn the_history_shows_every_price_also_those_set_in_sql() {
    let service = Service::start().await;
    service.post(LOFT);
    run(
        service.superuser(),
        "update listing set price = 465000.10; update listing set name = 'x'",
    )
    .await;
    let prices = service.get("/listings/1/prices");
    let amounts: Vec<_> = prices
        .json()
        .as_array()
        .expect("an array")
        .iter()
        .map(|price| price["price_eur"].to_string())
        .collect();
    assert_eq!(amounts, ["480000", "465000.1"]);
    assert!(
        prices
            .text()
            .starts_with(r#"[{"price_eur":480000,"created_date":""#),
        "{}",
        prices.text()
    );
    let etag = prices.header("etag").expect("an ETag").to_owned();
    let known = format!("if-none-match: \"other\", {etag}\r\n");
    assert_eq!(
        service.send("GET", "/listings/1/prices", &known, "").status,
        304
    );
    run(service.superuser(), "update listing set price = 1").await;
    assert_eq!(
        service.send("GET", "/listings/1/prices", &known, "").status,
        200
    );
}

#[tokio::test]
async fn each_page_of_prices_but_the_last_links_to_the_next() {
    let service = Service::start().await;
    service.post(LOFT);
    for price in 1..=4 {
        run(
            service.superuser(),
            &format!("update listing set price = {price}"),
        )
        .await;
    }
    let all = service.get("/listings/1/prices").json();
    let mut path = "/listings/1/prices?limit=2".to_owned();
    let mut all_pages = Vec::new();
    for expected in [2, 2, 1] {
        let page = service.get(&path);
        let prices = page.json().as_array().expect("an array").clone();
        assert_eq!(prices.len(), expected);
        all_pages.extend(prices);
        match page.header("link") {
            Some(link) => path = next(link),
            None => assert_eq!(all_pages.len(), 5),
        }
    }
    assert_eq!(Value::Array(all_pages), all);
    assert_eq!(
        service.get("/listings/1/prices?limit=5").header("link"),
        None
    );

    let at = |index: usize| {
        all[index]["created_date"]
            .as_str()
            .expect("a date")
            .to_owned()
    };
    let some = service
        .get(&format!("/listings/1/prices?from={}&to={}", at(1), at(3)))
        .json();
    assert_eq!(some, json!([all[1], all[2]]));
    assert_eq!(
        service
            .get("/listings/1/prices?to=2000-01-01T00:00:00Z")
            .json(),
        json!([])
    );
    assert_eq!(
        service
            .get("/listings/2/prices?to=2000-01-01T00:00:00Z")
            .status,
        404
    );
}

#[tokio::test]
async fn the_price_in_force_at_a_moment_is_the_last_one_set_until_then() {
    let service = Service::start().await;
    service.post(LOFT);
    let sql = "update listing set price = 2; update listing set price = 3";
    run(service.superuser(), sql).await;
    let all = service.get("/listings/1/prices").json();
    let at = |moment: &str| service.get(&format!("/listings/1/prices?at={moment}"));
    for price in all.as_array().expect("an array") {
        let set = price["created_date"].as_str().expect("a date");
        assert_eq!(at(set).json(), json!([price]));
    }
    let last = at("2999-01-01T00:00:00%2B14:00");
    assert_eq!(last.json(), json!([all[2]]));
    assert_eq!(last.header("link"), None);
    let known = format!(
        "if-none-match: {}\r\n",
        last.header("etag").expect("an ETag")
    );
    let path = "/listings/1/prices?at=2999-01-01T00:00:00Z";
    assert_eq!(service.send("GET", path, &known, "").status, 304);
    run(service.superuser(), "update listing set price = 4").await;
    assert_eq!(service.send("GET", path, &known, "").status, 200);

    // The clock of the server was set back before the last change.
    let set_back =
        "update listing_price_log set changed_at = changed_at - interval '1 hour' where id = 4";
    run(service.superuser(), &unguarded(set_back)).await;
    let first = all[0]["created_date"].as_str().expect("a date");
    assert_eq!(at(first).json()[0]["price_eur"], 4);

    let before = at("2000-01-01T00:00:00Z");
    assert_eq!((before.status, before.json()), (200, json!([])));
    let unknown = "/listings/2/prices?at=2000-01-01T00:00:00Z";
    assert_eq!(service.get(unknown).status, 404);
}

fn next(link: &str) -> String {
    let path = link
        .strip_prefix('<')
        .and_then(|link| link.strip_suffix(">; rel=\"next\""));
    path.unwrap_or_else(|| panic!("no link to a next page: {link}"))
        .to_owned()
}

#[tokio::test]
async fn lists_are_filtered_and_paged() {
    let service = Service::start().await;
    // Each listing has one bedroom less than rooms, and 10 m² a room.
    for (building_type, city, price, rooms) in [
        ("HOUSE", "Paris", "100", 1),
        ("STUDIO", "Lyon & Co", "200.5", 2),
        ("HOUSE", "Lyon & Co", "300", 3),
        ("HOUSE", "Lyon & Co", "400", 4),
    ] {
        let body = LOFT
            .replace("APARTMENT", building_type)
            .replace("\"Paris\"", &format!("\"{city}\""))
            .replace("480000", price)
            .replace("\"rooms_count\":2", &format!("\"rooms_count\":{rooms}"))
            .replace(
                "bedrooms_count\":1",
                &format!("bedrooms_count\":{}", rooms - 1),
            )
            .replace("42.5", &format!("{rooms}0.5"));
        service.post(&body).id();
    }
    for (query, expected) in [
        ("", vec![1, 2, 3, 4]),
        ("?building_type=HOUSE", vec![1, 3, 4]),
        ("?city=Lyon%20%26%20Co&building_type=HOUSE", vec![3, 4]),
        ("?city=Lyon+%26+Co&limit=1&after=2", vec![3]),
        ("?country=DE", vec![]),
        ("?postal_code=75011&min_rooms=2", vec![2, 3, 4]),
        ("?min_price=200.5&max_price=300", vec![2, 3]),
        ("?min_price=200.51&max_price=300.00&limit=7", vec![3]),
        ("?min_surface=30.5&after=3", vec![4]),
        ("?min_surface=40.51", vec![]),
        ("?max_surface=20.5", vec![1, 2]),
        ("?min_surface=20.5&max_surface=30.49", vec![2]),
        ("?max_surface=10.49", vec![]),
        ("?min_bedrooms=0", vec![1, 2, 3, 4]),
        ("?min_bedrooms=2&limit=9", vec![3, 4]),
        ("?min_bedrooms=4", vec![]),
    ] {
        let response = service.get(&format!("/listings{query}"));
        assert_eq!(response.status, 200, "{}", response.text());
        let listings = response.json();
        let ids: Vec<_> = listings
            .as_array()
            .expect("an array")
            .iter()
            .map(|listing| listing["id"].clone())
            .collect();
        assert_eq!(ids, expected, "{query}");
    }
    let page = service.get("/listings?limit=1&city=Lyon%20%26%20Co");
    let second = service.get(&next(page.header("link").expect("a link")));
    assert_eq!(second.json()[0]["id"], 3);
}

#[tokio::test]
async fn a_list_longer_than_one_fetch_is_complete() {
    let service = Service::start().await;
    let fill = "insert into listing (name, description, building_type, street_address, postal_code, city, country, \
        surface_area_m2, rooms_count, bedrooms_count, price) \
        select 'Loft', 'x', 'HOUSE', 'x', 'x', 'x', 'FR', 1, 1, 1, n from generate_series(1, 3000) as n";
    run(service.superuser(), fill).await;
    for (query, expected) in [
        ("", 3000),
        ("?min_price=2001", 1000),
        ("?min_price=2000", 1001),
        ("?limit=1000", 1000),
    ] {
        let listings = service.get(&format!("/listings{query}")).json();
        assert_eq!(
            listings.as_array().expect("an array").len(),
            expected,
            "{query}"
        );
    }
}

#[tokio::test]
async fn rows_of_older_clients_are_served_unchanged() {
    let service = Service::start().await;
    let sql = "insert into listing (name, description, building_type, street_address, postal_code, city, country, \
        surface_area_m2, rooms_count, bedrooms_count, price) values ('', '', 'HOUSE', '', '', '', 'France', 0, 0, 0, 0)";
    run(service.superuser(), sql).await;
    let listing = without_dates(service.get("/listings/1").json());
    assert_eq!(
        listing,
        json!({
            "id": 1, "name": "", "description": "", "building_type": "HOUSE", "latest_price_eur": 0, "surface_area_m2": 0.0,
            "postal_address": {"street_address": "", "postal_code": "", "city": "", "country": "France"},
            "rooms_count": 0, "bedrooms_count": 0,
        })
    );
    assert_eq!(service.get("/listings/1/prices").json()[0]["price_eur"], 0);
    assert_eq!(
        service
            .send("PATCH", "/listings/1", JSON, r#"{"latest_price_eur":5}"#)
            .status,
        200
    );
}

#[tokio::test]
async fn an_amount_of_money_is_the_same_everywhere() {
    let service = Service::start().await;
    let mut connection = service.connect();
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut amounts = Vec::new();
    for index in 0..10_000_u64 {
        // Xorshift: scattered, and the same in every run.
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        let cents = seed % 10_u64.pow(u32::try_from(index % 13).expect("a small number"));
        amounts.push(match (cents / 100, cents % 100) {
            (euros, 0) => euros.to_string(),
            (euros, cents) if cents % 10 == 0 => format!("{euros}.{}", cents / 10),
            (euros, cents) => format!("{euros}.{cents:02}"),
        });
    }
    let amount_in = |text: &str, name: &str| {
        let (_, rest) = text.split_once(&format!("\"{name}\":")).expect("an amount");
        rest.split([',', '}']).next().expect("its end").to_owned()
    };
    for (id, amount) in (1..).zip(&amounts) {
        let created = connection.send("POST", "/listings", JSON, LOFT.replace("480000", amount));
        assert_eq!(&amount_in(created.text(), "latest_price_eur"), amount);
        let read = connection.send("GET", &format!("/listings/{id}"), "", "");
        assert_eq!(&amount_in(read.text(), "latest_price_eur"), amount);
        let replaced = connection.send(
            "PUT",
            &format!("/listings/{id}"),
            JSON,
            LOFT.replace("480000", amount),
        );
        assert_eq!(&amount_in(replaced.text(), "latest_price_eur"), amount);
        let prices = connection.send("GET", &format!("/listings/{id}/prices"), "", "");
        assert_eq!(
            prices.json().as_array().map(Vec::len),
            Some(1),
            "the same price is no change"
        );
        assert_eq!(&amount_in(prices.text(), "price_eur"), amount);
    }
    let sql = "select trim_scale(price) from listing order by id";
    assert_eq!(rows(service.superuser(), sql).await, amounts);
    let mut psql = program("psql");
    psql.args([
        "--no-psqlrc",
        "--tuples-only",
        "--no-align",
        "--command",
        sql,
        &service.db().url(),
    ]);
    assert_eq!(succeed(psql, "").lines().collect::<Vec<_>>(), amounts);
}

#[tokio::test]
async fn of_two_writes_with_the_same_etag_one_succeeds() {
    let service = Service::start().await;
    service.post(LOFT);
    let mut mine = service.connect();
    let mut theirs = service.connect();
    for _ in 0..200 {
        let etag = service
            .get("/listings/1")
            .header("etag")
            .expect("an ETag")
            .to_owned();
        let headers = format!("{JSON}if-match: {etag}\r\n");
        let put = |connection: &mut Connection| {
            connection.send("PUT", "/listings/1", &headers, LOFT).status
        };
        let mut statuses = thread::scope(|scope| {
            let other = scope.spawn(|| put(&mut theirs));
            [put(&mut mine), other.join().expect("a status")]
        });
        statuses.sort_unstable();
        assert_eq!(statuses, [200, 412]);
    }
}

#[tokio::test]
async fn if_match_fails_after_another_write() {
    let service = Service::start().await;
    let etag = service
        .post(LOFT)
        .header("etag")
        .expect("an ETag")
        .to_owned();
    let current = format!("{JSON}if-match: {etag}\r\n");
    let any_of = format!("{JSON}if-match: \"0\", {etag}\r\n");
    assert_eq!(
        service.send("PATCH", "/listings/1", &any_of, "{}").status,
        200
    );
    for (method, body) in [("PUT", LOFT), ("PATCH", "{}"), ("DELETE", "")] {
        run(service.superuser(), "update listing set name = 'psql'").await;
        for stale in [
            &current,
            &format!("{JSON}if-match: nonsense\r\n"),
            &format!("{JSON}if-match: W/{etag}\r\n"),
        ] {
            let expected = (
                412,
                "if-match: listing 1 has changed, read it again".to_owned(),
            );
            assert_eq!(
                service.send(method, "/listings/1", stale, body).error(),
                expected
            );
            assert_eq!(service.send(method, "/listings/9", stale, body).status, 404);
        }
    }
    let any = format!("{JSON}if-match: *\r\n");
    assert_eq!(service.send("PUT", "/listings/1", &any, LOFT).status, 200);
    let etag = service
        .get("/listings/1")
        .header("etag")
        .expect("an ETag")
        .to_owned();
    let current = format!("if-match: {etag}\r\n");
    assert_eq!(
        service.send("DELETE", "/listings/1", &current, "").status,
        204
    );
}

#[tokio::test]
async fn a_get_with_the_current_etag_gets_304() {
    let service = Service::start().await;
    let etag = service
        .post(LOFT)
        .header("etag")
        .expect("an ETag")
        .to_owned();
    for known in [
        etag.clone(),
        format!("W/{etag}"),
        format!("\"x\", {etag}"),
        "*".to_owned(),
    ] {
        let response = service.send(
            "GET",
            "/listings/1",
            &format!("if-none-match: {known}\r\n"),
            "",
        );
        assert_eq!(
            (response.status, response.header("etag")),
            (304, Some(etag.as_str()))
        );
    }
    assert_eq!(
        service
            .send("GET", "/listings/1", "if-none-match: \"x\"\r\n", "")
            .status,
        200
    );
}

#[tokio::test]
async fn every_get_path_accepts_head_and_every_path_accepts_options() {
    let service = Service::start().await;
    service.post(LOFT);
    for (template, operations) in OPENAPI["paths"].as_object().expect("paths") {
        let path = template.replace("{id}", "1").replace("{file}", "start.js");
        let mut connection = service.connect();
        let get = connection.send("GET", &path, "", "");
        let head = connection.send("HEAD", &path, "", "");
        let status = if path == "/" { 302 } else { 200 };
        assert_eq!((get.status, head.status), (status, status), "{path}");
        assert!(head.body.is_empty());
        assert_eq!(head.header("content-type"), get.header("content-type"));
        let options = connection.send("OPTIONS", &path, "", "");
        let allow = options.header("allow").expect("an Allow header");
        let served: Vec<_> = allow
            .split(", ")
            .filter(|method| !["HEAD", "OPTIONS"].contains(method))
            .collect();
        let known = ["get", "post", "put", "patch", "delete"];
        let documented: Vec<_> = known
            .iter()
            .filter(|method| operations.get(**method).is_some())
            .map(|method| method.to_uppercase())
            .collect();
        assert_eq!(served, documented, "{path}");
        for method in ["GET", "POST", "PUT", "PATCH", "DELETE", "TRACE"] {
            let response = service.send(method, &path.replace('1', "9"), JSON, "{}");
            let refused = response.status == 405;
            assert_eq!(refused, !served.contains(&method), "{method} {path}");
            if refused {
                assert_eq!(response.header("allow"), Some(allow));
            }
        }
    }
}

#[test]
fn every_route_is_in_the_openapi_document() {
    let routes = include_str!("../src/api/mod.rs");
    let mut paths = 0;
    for line in routes.split("resource(").skip(1) {
        let line = line.trim_start();
        if let Some(path) = line
            .strip_prefix('"')
            .and_then(|rest| rest.split('"').next())
        {
            assert!(OPENAPI["paths"].get(path).is_some(), "{path}");
            paths += 1;
        }
    }
    assert_eq!(paths, OPENAPI["paths"].as_object().expect("paths").len());
}

/// The examples of a parameter, a header or a body.
fn examples_of(described: &'static Value) -> Vec<&'static Value> {
    let resolved = |example: &'static Value| match example["$ref"].as_str() {
        Some(path) => OPENAPI.pointer(path.trim_start_matches('#')).expect(path),
        None => example,
    };
    let named = described["examples"].as_object().into_iter().flatten();
    let named = named.map(|(_, example)| &resolved(example)["value"]);
    let of_schema = described["schema"]["examples"].as_array();
    let of_schema = of_schema.into_iter().flatten();
    let all = described.get("example").into_iter().chain(named);
    all.chain(of_schema).collect()
}

#[test]
fn everything_has_an_example_that_matches_its_schema() {
    fn check(described: &'static Value, checked: &mut usize) {
        if let Some(schema) = described.get("schema") {
            let examples = examples_of(described);
            assert!(!examples.is_empty(), "no example: {described}");
            for example in examples {
                let errors: Vec<_> = validator(schema)
                    .iter_errors(example)
                    .map(|error| error.to_string())
                    .collect();
                assert!(errors.is_empty(), "{example}: {errors:?}");
                *checked += 1;
            }
            let is_parameter = described.get("in").is_some();
            let is_explained = described.get("description").is_some();
            assert!(is_explained || !is_parameter, "{described}");
        }
        let members = described.as_object().into_iter().flatten();
        let items = described.as_array().into_iter().flatten();
        let children = members.map(|(_, member)| member).chain(items);
        children.for_each(|child| check(child, checked));
    }
    let mut checked = 0;
    check(&OPENAPI, &mut checked);
    assert!(checked >= 60, "{checked}");
}

#[tokio::test]
async fn every_origin_is_allowed_unless_cors_origins_is_set() {
    let service = Service::start().await;
    let preflight = "origin: https://a.example\r\naccess-control-request-method: PUT\r\n\
        access-control-request-headers: if-match, x-anything, access-control-allow-origin\r\n";
    let response = service.send("OPTIONS", "/listings/1", preflight, "");
    assert_eq!(response.status, 204);
    assert_eq!(response.header("access-control-allow-origin"), Some("*"));
    assert!(
        response
            .header("access-control-allow-methods")
            .expect("methods")
            .contains("PATCH")
    );
    // A request may have any header.
    let allowed = response.header("access-control-allow-headers");
    let allowed = allowed.expect("headers").to_lowercase();
    for header in ["if-match", "x-anything", "access-control-allow-origin"] {
        assert!(allowed.contains(header), "{header} in {allowed}");
    }
    let error = service.send("GET", "/listings/7", "origin: https://a.example\r\n", "");
    assert_eq!(error.header("access-control-allow-origin"), Some("*"));
    let exposed = "ETag, Idempotent-Replayed, Link, Location, Retry-After, X-Request-Id";
    assert_eq!(error.header("access-control-expose-headers"), Some(exposed));

    let origins = [("CORS_ORIGINS", "https://a.example, http://localhost:3000")];
    let service = Service::start_with(&origins).await;
    for (origin, allowed) in [
        ("https://a.example", true),
        ("http://localhost:3000", true),
        ("https://b.example", false),
    ] {
        let response = service.send("GET", "/listings", &format!("origin: {origin}\r\n"), "");
        let expected = allowed.then_some(origin);
        assert_eq!(response.header("access-control-allow-origin"), expected);
        let varies = |(name, value): &(String, String)| {
            name == "vary" && value.to_lowercase().contains("origin")
        };
        assert!(response.headers.iter().any(varies));
    }
}

#[tokio::test]
async fn a_request_id_is_kept_or_generated_and_logged() {
    let service = Service::start().await;
    let response = service.send("GET", "/listings?limit=1", "x-request-id: Mine-1\r\n", "");
    assert_eq!(response.header("x-request-id"), Some("Mine-1"));
    let lines = service.logged("Mine-1");
    assert_eq!(lines.len(), 1);
    for part in ["GET /listings?limit=1", " 200 ", " 2 ", "ms"] {
        assert!(lines[0].contains(part), "{part} in {}", lines[0]);
    }
    let long = "a".repeat(65);
    for unusable in ["", "with space", "a_b", long.as_str()] {
        let response = service.send(
            "GET",
            "/listings/1",
            &format!("x-request-id: {unusable}\r\n"),
            "",
        );
        let made = response.header("x-request-id").expect("a request id");
        assert!(made != unusable && made.len() == 16, "{made}");
    }
}

#[tokio::test]
async fn responses_are_compressed_for_clients_that_ask() {
    let service = Service::start().await;
    let plain = service.get("/openapi.yaml");
    assert_eq!(plain.header("vary"), Some("Accept-Encoding"));
    assert_eq!(
        (plain.header("content-encoding"), plain.text()),
        (None, OPENAPI_YAML)
    );
    let mut connection = service.connect();
    connection.request("GET", "/openapi.yaml", "accept-encoding: gzip\r\n", "");
    let response = connection.receive("HEAD", "/openapi.yaml");
    assert_eq!(response.header("content-encoding"), Some("gzip"));
    // A client that accepts no encoding gets the plain response and no error.
    for accepted in ["br", "identity;q=0", "gzip;q=0, *;q=0"] {
        let response = service.send(
            "GET",
            "/listings",
            &format!("accept-encoding: {accepted}\r\n"),
            "",
        );
        assert_eq!((response.status, response.text()), (200, "[]"));
        assert_eq!(response.header("content-encoding"), None);
    }
}

#[test]
fn every_write_and_no_read_documents_a_key() {
    let scheme = &OPENAPI["components"]["securitySchemes"]["key"];
    assert_eq!(
        (&scheme["type"], &scheme["scheme"]),
        (&json!("http"), &json!("bearer"))
    );
    let mut writes = 0;
    for (path, operations) in OPENAPI["paths"].as_object().expect("paths") {
        for (method, operation) in operations.as_object().expect("operations") {
            let writes_one = ["put", "patch", "delete"].contains(&method.as_str());
            let takes_a_key = writes_one || method == "post";
            let responses = &operation["responses"];
            assert_eq!(
                operation["security"] == json!([{"key": []}, {}]),
                takes_a_key,
                "{method} {path}"
            );
            assert_eq!(responses["401"].is_object(), takes_a_key, "{method} {path}");
            assert_eq!(responses["403"].is_object(), writes_one, "{method} {path}");
            writes += usize::from(takes_a_key);
        }
    }
    assert_eq!(writes, 4);
}

#[tokio::test]
async fn the_docs_page_loads_nothing_from_other_hosts() {
    let service = Service::start().await;
    let root = service.get("/");
    let page = service.get(root.header("location").expect("a location"));
    assert!(!page.text().contains("//"), "{}", page.text());
    for part in page
        .text()
        .split(['"', '\''])
        .filter(|part| part.starts_with("/docs/"))
    {
        assert_eq!(service.get(part).status, 200, "{part}");
    }
    assert!(
        page.header("content-security-policy")
            .expect("a policy")
            .starts_with("default-src 'self'")
    );
}

#[tokio::test]
async fn the_service_cannot_change_the_log() {
    let service = Service::start().await;
    service.post(LOFT);
    let config: tokio_postgres::Config = service.url.parse().expect("its own address");
    let client = connect(&config).await;
    assert_eq!(
        value(&client, "select session_user = current_user").await,
        "t"
    );
    for sql in [
        "update listing_price_log set new_price = 1",
        "delete from listing_price_log",
        "truncate listing_price_log",
    ] {
        let refused = refusal(&client, sql).await;
        assert_eq!(
            refused,
            "42501 permission denied for table listing_price_log"
        );
    }
}
