//! The chart of a price history.

use serde_json::Value;

use crate::support::{JSON, LOFT, Response, Service, run, unguarded};

/// Replaces the history of listing 1 by these prices: a query of times and amounts.
async fn set_history(service: &Service, prices: &str) {
    let sql = format!(
        "delete from listing_price_log; \
         insert into listing_price_log (listing_id, id, old_price, new_price, changed_at, changed_by) overriding system value \
         select 1, row_number() over (order by at), lag(price) over (order by at), price, at, 'test' \
         from ({prices}) as history (at, price)"
    );
    run(service.superuser(), &unguarded(&sql)).await;
}

fn chart(service: &Service) -> Response {
    let chart = service.get("/listings/1/prices.svg");
    assert_eq!(chart.status, 200, "{chart:?}");
    assert_eq!(chart.header("content-type"), Some("image/svg+xml"));
    assert_is_xml(chart.text());
    chart
}

/// Asserts that each element is closed in its order. The chart has no comments, entities or `>` in texts.
fn assert_is_xml(svg: &str) {
    let mut open = Vec::new();
    for tag in svg.split('<').skip(1) {
        let (tag, _) = tag.split_once('>').expect("the end of the tag");
        let name = tag.split([' ', '/']).find(|name| !name.is_empty());
        if tag.starts_with('/') {
            assert_eq!(open.pop(), name, "{svg}");
        } else if !tag.ends_with('/') {
            open.push(name.expect("a name"));
        }
    }
    assert!(open.is_empty() && !svg.contains('&'), "{svg}");
}

/// What stands between two texts.
fn between<'a>(svg: &'a str, start: &str, end: &str) -> &'a str {
    let (_, rest) = svg
        .split_once(start)
        .unwrap_or_else(|| panic!("no {start} in {svg}"));
    rest.split(end).next().expect("its end")
}

fn line(svg: &str) -> &str {
    between(svg, r#"<path class="line" d=""#, "\"")
}

#[tokio::test]
async fn a_chart_is_a_step_line_that_ends_now() {
    let service = Service::start().await;
    service.post(LOFT);
    set_history(
        &service,
        "values (timestamptz '2020-01-01', 480000), ('2022-01-01', 500000.5), ('2023-01-01', 441600)",
    )
    .await;
    let chart = chart(&service);
    let svg = chart.text();
    assert_eq!(
        between(svg, r#"<title id="title">"#, "<"),
        "Price of listing 1: €441,600"
    );
    let description = between(svg, r#"<desc id="desc">"#, "<");
    let (until_now, rest) = description.split_once(": ").expect("a change");
    assert!(until_now.starts_with("From €480,000 on 1 Jan 2020 to €441,600 on "));
    assert_eq!(
        rest,
        "−8.0%. Number of prices: 3. Highest €500,000.50, lowest €441,600."
    );
    for text in [
        ">€441,600</text>",
        ">−8.0% since 1 Jan 2020</text>",
        ">highest €500,000.50</text>",
        ">lowest €441,600</text>",
        ">€440,000</text>",
        ">2022</text>",
    ] {
        assert!(svg.contains(text), "{text} in {svg}");
    }
    // Only horizontal and vertical lines, first to last price and on to the right end.
    let steps: Vec<_> = line(svg)
        .split_inclusive(|c: char| c.is_ascii_digit())
        .collect();
    let letters: String = steps
        .concat()
        .chars()
        .filter(char::is_ascii_alphabetic)
        .collect();
    assert_eq!(letters, "MHVHVH");
    assert!(line(svg).ends_with("H680"), "{svg}");
    // It needs nothing else, and a program that shows it runs nothing.
    for forbidden in ["<script", "href", "url(", "@import", "@font-face", " on"] {
        assert!(
            !svg.replace(description, "").contains(forbidden),
            "{forbidden} in {svg}"
        );
    }
    let policy = chart.header("content-security-policy");
    assert_eq!(
        policy,
        Some("default-src 'none'; style-src 'unsafe-inline'")
    );
    assert!(svg.contains("@media(prefers-color-scheme:dark)"));
}

#[tokio::test]
async fn the_chart_of_a_new_listing_has_one_price() {
    let service = Service::start().await;
    service.post(&LOFT.replace("480000", "0"));
    let chart = chart(&service);
    let svg = chart.text();
    assert!(
        svg.contains(">€0</text>") && svg.contains(">unchanged since "),
        "{svg}"
    );
    assert!(svg.contains(" UTC</text>"), "{svg}");
    run(
        service.superuser(),
        "update listing set price = 9999999999.99",
    )
    .await;
    let chart = self::chart(&service);
    let svg = chart.text();
    assert!(svg.contains(">€9,999,999,999.99</text>"), "{svg}");
    assert!(svg.contains(">up from €0 since "), "{svg}");
    assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
}

#[tokio::test]
async fn a_long_history_is_drawn_in_at_most_1000_steps_with_its_extremes() {
    let service = Service::start().await;
    service.post(LOFT);
    // One price an hour, each a euro more, but for one that is far below and one far above.
    let hours = |last: i32| {
        format!(
            "select now() - interval '1 hour' * ({last} - n), \
             case n when 777 then 7 when 2500 then 900000.5 else 100000 + n end from generate_series(0, {last}) as n"
        )
    };
    set_history(&service, &hours(999)).await;
    assert_eq!(line(chart(&service).text()).matches('V').count(), 999);
    // 101 prices come with the first read, then pages of 1,000: the last page is empty, full or neither.
    for (last, count) in [(1000, "1,001"), (4100, "4,101"), (4500, "4,501")] {
        set_history(&service, &hours(last)).await;
        let chart = chart(&service);
        let svg = chart.text();
        let steps = line(svg).matches('V').count();
        assert!((200..1000).contains(&steps), "{steps} steps");
        assert!(
            svg.contains(&format!("Number of prices: {count}.")),
            "{svg}"
        );
        assert!(svg.contains("lowest €7."), "{svg}");
        let heights = line(svg).split('V').skip(1);
        let heights = heights.filter_map(|step| step.split('H').next()?.parse().ok());
        let heights: Vec<f64> = heights.collect();
        let is_drawn = |price: f64, top: f64| {
            let expected = 276.0 - 180.0 * price / top;
            heights
                .iter()
                .any(|height| (height - expected).abs() < 0.06)
        };
        let top = if last > 2500 { 1_000_000.0 } else { 150_000.0 };
        assert!(is_drawn(7.0, top), "{svg}");
        assert!(last < 2500 || is_drawn(900_000.5, top), "{svg}");
        assert!(is_drawn(f64::from(100_000 + last), top), "{svg}");
    }
}

#[tokio::test]
async fn a_price_from_a_clock_that_was_set_back_is_drawn_after_the_one_before() {
    let service = Service::start().await;
    service.post(LOFT);
    set_history(
        &service,
        "values (timestamptz '2020-01-01', 1), ('2022-01-01', 2), ('2023-01-01', 3)",
    )
    .await;
    let set_back = "update listing_price_log set changed_at = '2021-01-01' where id = 3";
    run(service.superuser(), &unguarded(set_back)).await;
    let chart = chart(&service);
    let times = line(chart.text()).split('H').skip(1);
    let times: Vec<_> = times.filter_map(|step| step.split('V').next()).collect();
    assert_eq!(times[0], times[1], "{times:?}");
}

#[tokio::test]
async fn a_chart_has_an_etag_that_changes_with_the_drawing() {
    let service = Service::start().await;
    service.post(LOFT);
    // The right end of a chart this long moves once a day.
    set_history(&service, "values (timestamptz '2020-01-01', 480000)").await;
    let path = "/listings/1/prices.svg";
    let first = chart(&service);
    assert_eq!(first.header("cache-control"), Some("no-cache"));
    let etag = first.header("etag").expect("an ETag");
    let known = format!("if-none-match: {etag}\r\n");
    for method in ["GET", "HEAD"] {
        let response = service.send(method, path, &known, "");
        assert_eq!(
            (response.status, response.header("etag")),
            (304, Some(etag))
        );
        assert_eq!(response.header("cache-control"), Some("no-cache"));
        let response = service.send(method, path, "", "");
        assert_eq!(
            (response.status, response.header("etag")),
            (200, Some(etag))
        );
    }
    // The name is not in the drawing, the price is.
    service.patch("/listings/1", r#"{"name":"x"}"#);
    assert_eq!(service.send("GET", path, &known, "").status, 304);
    service.patch("/listings/1", r#"{"latest_price_eur":1}"#);
    let second = service.send("GET", path, &known, "");
    assert_eq!(second.status, 200);
    assert_ne!(second.header("etag"), Some(etag));
}

#[tokio::test]
async fn a_chart_of_an_unknown_listing_or_with_a_parameter_is_refused() {
    let service = Service::start().await;
    service.post(LOFT);
    for (id, name) in [("2", "2"), ("01", "01"), ("x", "x")] {
        let path = format!("/listings/{id}/prices.svg");
        let expected = (404, format!("listing {name} does not exist"));
        assert_eq!(service.get(&path).error(), expected);
        assert_eq!(service.send("HEAD", &path, "", "").status, 404);
    }
    assert_eq!(
        service.get("/listings/1/prices.svg?width=9").error(),
        (400, "width: is not a parameter of this path".to_owned())
    );
    let posted = service.send("POST", "/listings/1/prices.svg", JSON, "{}");
    assert_eq!(posted.status, 405);
    assert!(matches!(posted.json(), Value::Object(_)));
}
