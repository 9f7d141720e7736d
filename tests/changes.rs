//! `GET /changes` delivers every committed change at least once, in the order of each listing, and none that was rolled back.

use serde_json::{Value, json};

use crate::support::{LOFT, Response, Service, run};

/// The address of the next page, which every page has.
fn next(page: &Response) -> String {
    assert_eq!(page.status, 200, "{page:?}");
    let link = page.header("link").expect("a link").strip_prefix('<');
    let path = link.and_then(|link| link.strip_suffix(">; rel=\"next\""));
    path.expect("a link to the next page").to_owned()
}

fn changes(page: &Response) -> Vec<Value> {
    assert_eq!(page.status, 200, "{page:?}");
    page.json().as_array().expect("an array").clone()
}

/// The changes of all pages until one is empty and does not move, and the address after them.
fn all_after(service: &Service, path: &str) -> (Vec<Value>, String) {
    let (mut all, mut path) = (Vec::new(), path.to_owned());
    loop {
        let page = service.get(&path);
        let (found, following) = (changes(&page), next(&page));
        if found.is_empty() && following == path {
            return (all, path);
        }
        all.extend(found);
        path = following;
    }
}

/// A change without its date.
fn without_date(mut change: Value) -> Value {
    let date = change["created_date"].take();
    assert!(date.as_str().is_some_and(|date| date.ends_with('Z')));
    change
        .as_object_mut()
        .expect("an object")
        .remove("created_date");
    change
}

#[tokio::test]
async fn a_page_has_prices_and_deletions_of_all_listings() {
    let service = Service::start().await;
    service.post(LOFT);
    service.patch("/listings/1", r#"{"latest_price_eur":465000.5}"#);
    service.send("DELETE", "/listings/1", "", "");
    service.post(LOFT);
    service.patch("/listings/2", r#"{"latest_price_eur":1}"#);
    let page = service.get("/changes");
    assert_eq!(page.header("cache-control"), Some("no-cache"));
    let found: Vec<_> = changes(&page).into_iter().map(without_date).collect();
    // The prices of the first listing were deleted with it.
    let expected = [
        json!({"listing_id": 1, "id": 3, "deleted": true, "previous_price_eur": 465_000.5}),
        json!({"listing_id": 2, "id": 4, "price_eur": 480_000, "previous_price_eur": null}),
        json!({"listing_id": 2, "id": 5, "price_eur": 1, "previous_price_eur": 480_000}),
    ];
    assert_eq!(found, expected);
    let (none, path) = all_after(&service, &next(&page));
    assert_eq!(none, [Value::Null; 0]);
    service.patch("/listings/2", r#"{"latest_price_eur":2}"#);
    let page = service.get(&path);
    let text = page.text();
    let begin = r#"[{"listing_id":2,"id":6,"price_eur":2,"previous_price_eur":1,"created_date":""#;
    assert!(text.starts_with(begin), "{text}");
    service.send("DELETE", "/listings/2", "", "");
    let page = service.get(&next(&page));
    let begin = r#"[{"listing_id":2,"id":7,"deleted":true,"previous_price_eur":2,"created_date":""#;
    assert!(page.text().starts_with(begin), "{}", page.text());
}

#[tokio::test]
async fn the_link_keeps_limit_and_wait_and_each_page_has_at_most_the_limit() {
    let service = Service::start().await;
    let fill = "insert into listing (id, price, name, description, building_type, street_address, postal_code, city, country, \
        surface_area_m2, rooms_count, bedrooms_count) \
        select n, n, 'x', 'x', 'HOUSE', 'x', 'x', 'x', 'FR', 1, 1, 1 from generate_series(1, 25) as n";
    run(service.superuser(), fill).await;
    let mut path = "/changes?limit=10&wait=0".to_owned();
    let mut ids = Vec::new();
    for expected in [10, 10, 5] {
        let page = service.get(&path);
        assert_eq!(changes(&page).len(), expected);
        ids.extend(
            changes(&page)
                .iter()
                .map(|change| change["listing_id"].as_i64()),
        );
        path = next(&page);
        assert!(
            path.starts_with("/changes?limit=10&wait=0&after="),
            "{path}"
        );
    }
    assert_eq!(ids, (1..=25).map(Some).collect::<Vec<_>>());
    run(
        service.superuser(),
        "update listing set price = price + 1 where id <= 12",
    )
    .await;
    for expected in [10, 2, 0] {
        let page = service.get(&path);
        assert_eq!(changes(&page).len(), expected);
        path = next(&page);
    }
}

#[tokio::test]
async fn after_now_begins_with_the_next_change() {
    let service = Service::start().await;
    service.post(LOFT);
    let page = service.get("/changes?after=now");
    assert_eq!(changes(&page), [Value::Null; 0]);
    service.patch("/listings/1", r#"{"latest_price_eur":5}"#);
    let found = changes(&service.get(&next(&page)));
    assert_eq!(found.len(), 1);
    assert_eq!(found[0]["price_eur"], 5);
}
