//! With `AUTH=keys`: which key may write which listing, and which actor is logged.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use crate::support::{
    Cluster, Database, JSON, LOFT, Service, WAITING, bearer, command, create_administrator_key,
    create_key, insert_owned, pause_after_the_first_listing, printed, revoke_key, rows, run,
    through, value, within,
};

const NOT_VALID: &str = "authorization: the key is not valid";
const MALFORMED: &str = "authorization: must be one header, Bearer followed by a key";

async fn service_with_keys() -> Service {
    Service::start_with(&[("AUTH", "keys")]).await
}

fn priced(price: &str) -> String {
    LOFT.replace("480000", price)
}

#[tokio::test]
async fn each_key_writes_its_own_listings_and_every_client_reads() {
    let service = service_with_keys().await;
    let db = service.superuser();
    let revoked = create_key(db, "a").await;
    revoke_key(db, &revoked).await;
    let (a, b) = (create_key(db, "a").await, create_key(db, "b").await);
    let administrators = create_administrator_key(db).await;
    let unknown = a.replace("lk_", "lk_0");
    let mut connection = service.connect();
    let mut id = 1000;
    // The headers, and for a valid key the owner of its listings and the actor in the log.
    for (headers, writer) in [
        (JSON.to_owned(), None),
        (bearer("\"'"), None),
        (bearer(&unknown), None),
        (bearer(&revoked), None),
        (bearer(&a), Some(("a", "a"))),
        (bearer(&b), Some(("b", "b"))),
        (bearer(&administrators), Some(("null", "admin:4"))),
    ] {
        let created = connection.send("POST", "/listings", &headers, LOFT);
        if let Some((owner, actor)) = writer {
            let sql = format!(
                "select coalesce(owner, 'null'), changed_by from listing \
                join listing_price_log on listing_id = listing.id where listing.id = {}",
                created.id()
            );
            assert_eq!(rows(db, &sql).await, [format!("{owner}|{actor}")]);
            assert_eq!(created.json().get("owner"), None);
        } else {
            assert_eq!(created.status, 401);
        }
        for (listings_owner, there) in [("'a'", true), ("'b'", true), ("null", true), ("", false)] {
            for (method, body) in [
                ("PUT", priced("2")),
                ("PATCH", r#"{"latest_price_eur":2}"#.to_owned()),
                ("DELETE", String::new()),
            ] {
                id += 1;
                if there {
                    run(db, &insert_owned(id, listings_owner)).await;
                }
                let path = format!("/listings/{id}");
                let expected = match writer {
                    None => 401,
                    Some(_) if !there => 404,
                    Some(("null", _)) if method == "DELETE" => 204,
                    Some(("null", _)) => 200,
                    Some((owner, _)) if listings_owner != format!("'{owner}'") => 403,
                    Some(_) if method == "DELETE" => 204,
                    Some(_) => 200,
                };
                let response = connection.send(method, &path, &headers, &body);
                let case = format!("{method} {headers} {listings_owner}");
                assert_eq!(response.status, expected, "{case}");
                let read = if there && expected != 204 { 200 } else { 404 };
                for path in [&path, &format!("{path}/prices")] {
                    assert_eq!(connection.send("GET", path, &headers, "").status, read);
                }
                // The price, the owner and the actors: only a permitted write has changed anything.
                let actor = writer.map_or("", |(_, actor)| actor);
                let expected = match expected {
                    204 => vec![],
                    _ if !there => vec![],
                    200 => vec![format!("1.00|{listings_owner}|postgres,{actor}")],
                    _ => vec![format!("0.00|{listings_owner}|postgres")],
                };
                let sql = format!(
                    "select price - 1, coalesce(quote_literal(owner), 'null'), \
                    (select string_agg(changed_by, ',' order by id) from listing_price_log where listing_id = listing.id) \
                    from listing where id = {id}"
                );
                assert_eq!(rows(db, &sql).await, expected, "{case}");
            }
        }
        assert_eq!(
            connection.send("GET", "/listings", &headers, "").status,
            200
        );
    }
}

#[tokio::test]
async fn errors_are_reported_in_the_documented_order() {
    let service = service_with_keys().await;
    let db = service.superuser();
    let (a, b) = (create_key(db, "a").await, create_key(db, "b").await);
    run(db, &insert_owned(1, "'a'")).await;
    run(db, "select setval('listing_id_seq', 1)").await;
    let (too_large, stale) = ("x".repeat(65 * 1024), "if-match: \"0\"\r\n");
    let text = |key: &str| format!("authorization: Bearer {key}\r\n{stale}");
    let json = |key: &str| format!("{JSON}{}", text(key));
    let (another, a_stale, b_stale) = (text("another"), json(&a), json(&b));
    for method in ["PUT", "PATCH"] {
        for (headers, path, body, expected) in [
            (&another, "/listings/x", too_large.as_str(), 401),
            (&text(&b), "/listings/x", &too_large, 413),
            (&text(&b), "/listings/x", "{", 404),
            (&text(&b), "/listings/1", "{", 415),
            (&b_stale, "/listings/1", "{", 400),
            (&b_stale, "/listings/1", r#"{"name":1}"#, 422),
            (&b_stale, "/listings/9", LOFT, 404),
            (&b_stale, "/listings/1", LOFT, 403),
            (&a_stale, "/listings/1", LOFT, 412),
            (&bearer(&a), "/listings/1", LOFT, 200),
        ] {
            let response = service.send(method, path, headers, body);
            assert_eq!(response.status, expected, "{method} {path} {headers}");
        }
    }
    for (headers, path, expected) in [
        (&another, "/listings/x", 401),
        (&another, "/listings/9", 401),
        (&b_stale, "/listings/x", 404),
        (&b_stale, "/listings/9", 404),
        (&b_stale, "/listings/1", 403),
        (&a_stale, "/listings/1", 412),
    ] {
        let response = service.send("DELETE", path, headers, "");
        assert_eq!(response.status, expected, "DELETE {path} {headers}");
    }
    for (headers, body, expected) in [
        (&another, too_large.as_str(), 401),
        (&text(&a), &too_large, 413),
        (&text(&a), "{", 415),
        (&json(&a), "{", 400),
        (&json(&a), "{}", 422),
        (&json(&a), LOFT, 201),
    ] {
        let response = service.send("POST", "/listings", headers, body);
        assert_eq!(response.status, expected, "POST {headers}");
    }
    // A malformed body closes the connection before the key is looked up.
    let broken = |method: &str, headers: &str| {
        let mut connection = service.connect();
        let path = if method == "POST" {
            "/listings"
        } else {
            "/listings/1"
        };
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\n{headers}transfer-encoding: chunked\r\n\r\nzz\r\n"
        );
        connection.write(head.as_bytes());
        connection.receive(method, path).status
    };
    for method in ["POST", "PUT", "PATCH", "DELETE"] {
        let statuses = ["", &json(&a), &json("another")].map(|headers| broken(method, headers));
        assert_eq!(statuses, [401, 400, 400], "{method}");
    }
    // An unknown path and an unknown method need no key.
    assert_eq!(service.send("PUT", "/nothing", JSON, LOFT).status, 404);
    assert_eq!(service.send("PUT", "/listings", JSON, LOFT).status, 405);
}

#[tokio::test]
async fn a_slow_body_without_a_key_gets_401_and_with_a_key_408() {
    let service = service_with_keys().await;
    let key = create_key(service.superuser(), "a").await;
    let begin = |headers: &str| {
        let mut connection = service.connect();
        let head = "POST /listings HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n";
        connection.write(format!("{head}{headers}\r\n{{").as_bytes());
        connection
    };
    let (mut stranger, mut owner) = (begin(JSON), begin(&bearer(&key)));
    assert_eq!(stranger.receive("POST", "/listings").status, 401);
    assert_eq!(owner.receive("POST", "/listings").status, 408);
}

#[tokio::test]
async fn a_401_and_a_403_say_what_is_missing_and_no_more() {
    let service = service_with_keys().await;
    let db = service.superuser();
    let (a, revoked) = (create_key(db, "a").await, create_key(db, "a").await);
    revoke_key(db, &revoked).await;
    run(db, &insert_owned(1, "'b'")).await;
    let missing = "authorization: is required, as Bearer followed by a key";
    for (headers, expected) in [
        (JSON.to_owned(), (401, missing)),
        (bearer("lk_unknown"), (401, NOT_VALID)),
        (bearer(&revoked), (401, NOT_VALID)),
        (bearer(&a), (403, "this key may not change listing 1")),
    ] {
        let response = service.send("PUT", "/listings/1", &headers, LOFT);
        assert_eq!(response.error(), (expected.0, expected.1.to_owned()));
        let challenge = (expected.0 == 401).then_some("Bearer");
        assert_eq!(response.header("www-authenticate"), challenge);
        assert_eq!(response.header("access-control-allow-origin"), Some("*"));
    }
    // A preflight carries no key.
    let preflight = "origin: https://a.example\r\naccess-control-request-method: PUT\r\n\
        access-control-request-headers: authorization\r\n";
    let allowed = service.send("OPTIONS", "/listings/1", preflight, "");
    assert_eq!(allowed.status, 204);
    let headers = allowed.header("access-control-allow-headers");
    assert!(headers.is_some_and(|headers| headers.to_lowercase().contains("authorization")));
}

#[tokio::test]
async fn the_authorization_header_has_one_valid_form() {
    let service = service_with_keys().await;
    let db = service.superuser();
    let key = create_key(db, "a").await;
    let long = "k".repeat(8192);
    let sql = format!("insert into api_key (owner, key_sha256) values ('a', sha256('{long}'))");
    run(db, &sql).await;
    let mut connection = service.connect();
    let mut post = |authorization: &[u8]| {
        let head = format!(
            "POST /listings HTTP/1.1\r\nhost: x\r\n{JSON}content-length: {}\r\n",
            LOFT.len()
        );
        connection.write(&[head.as_bytes(), authorization, b"\r\n", LOFT.as_bytes()].concat());
        connection.receive("POST", "/listings")
    };
    for accepted in [
        format!("Authorization: Bearer {key}\r\n"),
        format!("AUTHORIZATION: bearer {key}\r\n"),
        format!("authorization:BEARER   {key}  \t \r\n"),
        format!("authorization: Bearer {long}\r\n"),
    ] {
        assert_eq!(post(accepted.as_bytes()).status, 201, "{accepted}");
    }
    for (refused, message) in [
        (
            format!("authorization: Bearer {}\r\n", "x".repeat(8192)),
            NOT_VALID,
        ),
        (
            format!("authorization: Bearer {}\r\n", key.to_uppercase()),
            NOT_VALID,
        ),
        (format!("authorization: Bearer {key}=\r\n"), NOT_VALID),
        (
            format!("authorization: Bearer {key}\r\nauthorization: Bearer {key}\r\n"),
            MALFORMED,
        ),
        (
            format!("authorization: Bearer {key}\r\nauthorization: \r\n"),
            MALFORMED,
        ),
        (
            format!("authorization: Bearer {key}, Bearer {key}\r\n"),
            MALFORMED,
        ),
        (format!("authorization: Bearer {key} {key}\r\n"), MALFORMED),
        (format!("authorization: Bearer\t{key}\r\n"), MALFORMED),
        (format!("authorization: Bearer{key}\r\n"), MALFORMED),
        (format!("authorization: Basic {key}\r\n"), MALFORMED),
        (format!("authorization: {key}\r\n"), MALFORMED),
        (format!("authorization: Bearer é{key}\r\n"), MALFORMED),
        ("authorization: Bearer\r\n".to_owned(), MALFORMED),
        ("authorization: Bearer   \r\n".to_owned(), MALFORMED),
        ("authorization: Bearer ==\r\n".to_owned(), MALFORMED),
        ("authorization:\r\n".to_owned(), MALFORMED),
    ] {
        let expected = (401, message.to_owned());
        assert_eq!(post(refused.as_bytes()).error(), expected, "{refused}");
    }
    let not_utf8 = post(b"authorization: Bearer \xff\xfe\r\n");
    assert_eq!(not_utf8.error(), (401, MALFORMED.to_owned()));
    assert_eq!(value(db, "select count(*) from listing").await, "4");
}

#[tokio::test]
async fn hostile_strings_are_stored_as_strings() {
    let service = service_with_keys().await;
    let db = service.superuser();
    let hostile = r#"'; drop table listing; -- "$1" \' {"a"} 💥"#;
    let owner = hostile.replace('\'', "''");
    let key = create_key(db, &owner).await;
    let name = serde_json::to_string(hostile).expect("JSON");
    let body = LOFT.replace(r#""Loft""#, &name);
    assert_eq!(
        service.send("POST", "/listings", &bearer(&key), &body).id(),
        1
    );
    let body = body.replace("480000", "5");
    assert_eq!(
        service
            .send("PUT", "/listings/1", &bearer(&key), &body)
            .status,
        200
    );
    let written = format!(
        "select count(*) from listing join listing_price_log on listing_id = listing.id \
        where name = '{owner}' and owner = '{owner}' and changed_by = '{owner}'"
    );
    assert_eq!(value(db, &written).await, "2");
    let headers = format!("{}if-match: \"' or true --\"\r\n", bearer(&key));
    assert_eq!(
        service.send("DELETE", "/listings/1", &headers, "").status,
        412
    );
    for hostile in [
        "'or(true)--",
        "$1",
        "{}",
        "\\x00",
        "'||(select(key_sha256)from(api_key))||'",
    ] {
        let response = service.send("DELETE", "/listings/1", &bearer(hostile), "");
        assert_eq!(response.error(), (401, MALFORMED.to_owned()), "{hostile}");
    }
    assert_eq!(value(db, "select count(*) from listing").await, "1");
}

#[tokio::test]
async fn row_triggers_see_the_actor_of_their_request_and_triggers_before_a_statement_see_none() {
    // One connection for all keys.
    let settings = [("AUTH", "keys"), ("WORKERS", "1"), ("POOL_SIZE", "1")];
    let service = Service::start_with(&settings).await;
    let db = service.superuser();
    let see = "create table seen (time text, actor text); grant insert on seen to public; \
        create function public.see() returns trigger language plpgsql as \
            'begin insert into public.seen values (lower(tg_when || '' '' || tg_level), current_setting(''listing.actor'', true)); \
            return coalesce(new, old); end'";
    run(db, see).await;
    for time in ["before", "after"] {
        for level in ["row", "statement"] {
            let trigger = format!(
                "create trigger {time}_{level} {time} insert or update or delete on listing \
                for each {level} execute function public.see()"
            );
            run(db, &trigger).await;
        }
    }
    for owner in ["a", "b"] {
        let key = bearer(&create_key(db, owner).await);
        let path = format!(
            "/listings/{}",
            service.send("POST", "/listings", &key, LOFT).id()
        );
        for (method, body) in [("PATCH", "{}"), ("PUT", LOFT), ("DELETE", "")] {
            let status = service.send(method, &path, &key, body).status;
            assert!([200, 204].contains(&status), "{method} {status}");
        }
        let seen = "select concat_ws(' ', time, nullif(actor, ''), count(*)) from seen group by time, nullif(actor, '') order by time";
        let expected = [
            format!("after row {owner} 4"),
            format!("after statement {owner} 4"),
            format!("before row {owner} 4"),
            "before statement 4".to_owned(),
        ];
        assert_eq!(rows(db, seen).await, expected);
        run(db, "delete from seen").await;
    }
}

#[tokio::test]
async fn a_write_is_logged_under_the_owner_of_its_key() {
    let db = Database::migrated().await;
    // The actor of the key overrides one that the DBA has set for the role.
    let url = db.service_url().await;
    let role = format!("{}_login", db.name);
    run(
        &db.superuser,
        &format!("alter role {role} set listing.actor = 'of the role'"),
    )
    .await;
    // A trigger of the DBA that fires before the write sees the actor too.
    run(
        &db.superuser,
        "create function tell() returns trigger language plpgsql as \
            'begin new.description = current_setting(''listing.actor''); return new; end'; \
        create trigger tell before insert or update on listing for each row execute function tell()",
    )
    .await;
    // One connection for all keys.
    let settings = [("AUTH", "keys"), ("WORKERS", "1"), ("POOL_SIZE", "1")];
    let mut command = command(&url);
    command.envs(settings);
    let service = Service::run(command, &url, Some(db));
    let db = service.superuser();
    let administrators = create_administrator_key(db).await;
    let keys = [
        create_key(db, "a").await,
        create_key(db, "b").await,
        administrators,
    ];
    let mut expected = Vec::new();
    for round in 0..20 {
        for (key, actor) in keys.iter().zip(["a", "b", "admin:1"]) {
            let lies = "x-changed-by: nobody\r\nx-forwarded-user: nobody\r\n";
            let headers = format!("{}{lies}", bearer(key));
            let created = service.send("POST", "/listings?owner=nobody", &headers, LOFT);
            assert_eq!(created.json()["description"], actor);
            let path = format!("/listings/{}?changed_by=nobody", created.id());
            let body = format!(r#"{{"latest_price_eur":{round}}}"#);
            let changed = service.send("PATCH", &path, &headers, &body);
            assert_eq!(changed.json()["description"], actor);
            expected.extend([actor, actor]);
        }
    }
    let log = "select changed_by from listing_price_log order by id";
    assert_eq!(rows(db, log).await, expected);
    for field in ["owner", "changed_by", "actor", "listing.actor"] {
        let body = LOFT.replacen('{', &format!(r#"{{"{field}":"b","#), 1);
        let refused = service.send("PUT", "/listings/1", &bearer(&keys[0]), &body);
        assert_eq!(
            refused.error(),
            (422, format!("{field}: is not a field of a listing"))
        );
    }
}

#[tokio::test]
async fn with_auth_off_no_key_is_checked_and_the_role_is_logged() {
    let db = Database::migrated().await;
    let key = create_key(&db.superuser, "a").await;
    run(&db.superuser, &insert_owned(7, "'b'")).await;
    let service = Service::start_on(db, &[("AUTH", "off")]).await;
    for headers in [JSON, &bearer(&key), &bearer("\"")] {
        assert_eq!(service.send("POST", "/listings", headers, LOFT).status, 201);
        assert_eq!(
            service.send("PUT", "/listings/7", headers, LOFT).status,
            200
        );
    }
    let sql = "select coalesce(owner, 'null'), changed_by = current_database() || '_login', count(*) from listing \
        join listing_price_log on listing_id = listing.id where new_price <> 1 group by 1, 2 order by 1";
    assert_eq!(rows(service.superuser(), sql).await, ["b|t|1", "null|t|3"]);
}

#[tokio::test]
async fn a_write_that_waits_for_a_hand_over_gets_403() {
    let service = service_with_keys().await;
    let db = service.superuser();
    let (a, b) = (create_key(db, "a").await, create_key(db, "b").await);
    for (id, (method, body)) in (1..).zip([("PUT", LOFT), ("PATCH", "{}"), ("DELETE", "")]) {
        run(db, &insert_owned(id, "'a'")).await;
        run(
            db,
            &format!("begin; select hand_over_listings(array[{id}], 'b')"),
        )
        .await;
        let path = format!("/listings/{id}");
        let mut connection = service.connect();
        connection.request(method, &path, &bearer(&a), body);
        service.db().wait_for(WAITING, "1").await;
        run(db, "commit").await;
        assert_eq!(connection.receive(method, &path).status, 403, "{method}");
        assert_eq!(service.send("PATCH", &path, &bearer(&b), "{}").status, 200);
    }
}

/// Updates the price of listing 1 until `stop` is set. Returns how many updates succeeded.
fn write_without_pause(service: &Service, key: &str, stop: &AtomicBool) -> usize {
    let (mut connection, mut written) = (service.connect(), 0);
    for price in 1_u64.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let body = format!(r#"{{"latest_price_eur":{price}}}"#);
        let response = connection.send("PATCH", "/listings/1", &bearer(key), &body);
        match response.status {
            200 => written += 1,
            status => assert_eq!(status, 403),
        }
    }
    written
}

#[tokio::test(flavor = "multi_thread")]
async fn the_former_owner_writes_nothing_after_a_hand_over() {
    let service = service_with_keys().await;
    let db = service.superuser();
    run(db, &insert_owned(1, "'a'")).await;
    let keys = [create_key(db, "a").await, create_key(db, "b").await];
    let (stop, runtime) = (AtomicBool::new(false), &Handle::current());
    let written: Vec<_> = thread::scope(|scope| {
        let writers: Vec<_> = keys
            .iter()
            .flat_map(|key| [key, key])
            .map(|key| scope.spawn(|| write_without_pause(&service, key, &stop)))
            .collect();
        let hand_over = move |owner: &str| {
            // Waits for a write of the present owner, so that every hand-over happens between writes.
            let newest = "select changed_by from listing_price_log order by id desc limit 1";
            let before = if owner == "a" { "b" } else { "a" };
            let begun = Instant::now();
            while runtime.block_on(value(db, newest)) != before {
                assert!(
                    begun.elapsed() < Duration::from_secs(10),
                    "no write of {before}"
                );
            }
            // A price of its own marks the hand-over in the log.
            let sql = format!(
                "begin; select hand_over_listings(array[1], '{owner}'); \
                set local listing.actor = 'to {owner}'; update listing set price = 0; commit"
            );
            runtime.block_on(run(db, &sql));
        };
        let rounds = scope.spawn(move || {
            for _ in 0..150 {
                hand_over("b");
                hand_over("a");
            }
        });
        let ended = rounds.join();
        stop.store(true, Ordering::Relaxed);
        ended.expect("300 hand-overs");
        writers
            .into_iter()
            .map(|writer| writer.join().expect("its end"))
            .collect()
    });
    assert!(written.iter().all(|times| *times > 0), "{written:?}");
    let wrong = "select count(*) filter (where changed_by ~ '^to '), \
            count(*) filter (where changed_by in ('a', 'b') and owner <> 'to ' || changed_by) \
        from (select changed_by, max(changed_by) over (partition by hand_over) as owner \
            from (select changed_by, count(*) filter (where changed_by ~ '^to ') over (order by id) as hand_over \
                from listing_price_log where id > 1) as log where hand_over > 0) as owned";
    assert_eq!(rows(db, wrong).await, ["300|0"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_writes_nothing_on_any_instance() {
    let service = service_with_keys().await;
    let db = service.superuser();
    run(db, &insert_owned(1, "'a'")).await;
    let another = Service::start_at(&service.url, &[("AUTH", "keys")]);
    let current = Mutex::new(create_key(db, "a").await);
    let (stop, runtime) = (AtomicBool::new(false), Handle::current());
    // For each response: the key, the time of the request, and the status.
    let answers = Mutex::new(Vec::new());
    let answered = |key: &str, status: u16| {
        let answers = answers.lock().expect("lock");
        answers
            .iter()
            .rev()
            .take(100)
            .any(|(of, _, with)| of == key && *with == status)
    };
    let revocations = thread::scope(|scope| {
        for instance in [&service, &another, &service, &another] {
            let (stop, current, answers) = (&stop, &current, &answers);
            scope.spawn(move || {
                let mut connection = instance.connect();
                while !stop.load(Ordering::Relaxed) {
                    let key = current.lock().expect("lock").clone();
                    let begun = Instant::now();
                    let response = connection.send("PATCH", "/listings/1", &bearer(&key), "{}");
                    let answer = (key, begun, response.status);
                    answers.lock().expect("lock").push(answer);
                }
            });
        }
        let (answered, runtime, current) = (&answered, &runtime, &current);
        let rounds = scope.spawn(move || {
            let wait_for_an_answer = |key: &str, status| {
                let begun = Instant::now();
                while !answered(key, status) {
                    assert!(begun.elapsed() < Duration::from_secs(10), "no {status}");
                    thread::yield_now();
                }
            };
            let round = |_| {
                let key = current.lock().expect("lock").clone();
                wait_for_an_answer(&key, 200);
                runtime.block_on(revoke_key(db, &key));
                let revoked = Instant::now();
                wait_for_an_answer(&key, 401);
                *current.lock().expect("lock") = runtime.block_on(create_key(db, "a"));
                (key, revoked)
            };
            (0..300).map(round).collect::<HashMap<_, _>>()
        });
        let ended = rounds.join();
        stop.store(true, Ordering::Relaxed);
        ended.expect("300 revocations")
    });
    assert_eq!(revocations.len(), 300);
    let answers = answers.into_inner().expect("lock");
    for (key, begun, status) in &answers {
        let late = revocations.get(key).is_some_and(|revoked| begun > revoked);
        assert!(
            *status == 401 || *status == 200 && !late,
            "{status}, sent after the revocation: {late}"
        );
    }
    let refused = answers
        .iter()
        .filter(|(_, _, status)| *status == 401)
        .count();
    assert!(refused >= 300, "{refused}");
}

#[tokio::test]
async fn a_key_lookup_is_retried_after_a_lost_connection() {
    let service = service_with_keys().await;
    let key = create_key(service.superuser(), "a").await;
    for lost in [false, true, true] {
        let cut = "select count(pg_terminate_backend(pid)) from pg_stat_activity where query ~ 'find_api_keys' \
            and datname = current_database() and pid <> pg_backend_pid() and state = 'idle'";
        let cut = value(service.superuser(), cut).await;
        assert_eq!(cut != "0", lost, "{cut}");
        let mut connection = service.connect();
        for _ in 0..4 {
            let created = connection.send("POST", "/listings", &bearer(&key), LOFT);
            assert_eq!(created.status, 201);
        }
    }
}

/// Asserts that a text contains neither a key nor its hash, in any common notation.
fn assert_keeps_secret(text: &str, key: &str, hash: &[u8]) {
    let hex = hash
        .iter()
        .fold(String::new(), |hex, byte| format!("{hex}{byte:02x}"));
    // The first bytes as Rust prints them, in decimal and as an escaped string.
    let decimal = format!("{:?}", &hash[..8]).replace(']', "");
    let escaped = hash[..8].escape_ascii().to_string();
    let text = text.to_lowercase();
    for secret in [key, &key[3..], &hex, &decimal, &escaped.to_lowercase()] {
        let line = text.lines().find(|line| line.contains(secret));
        assert_eq!(line, None, "{secret}");
    }
}

#[tokio::test]
async fn no_key_and_no_hash_is_logged_or_returned() {
    // A server of its own, which logs every statement.
    let cluster = Cluster::migrated();
    let superuser = cluster.superuser().await;
    for sql in [
        "create role listing_service login password 'secret' in role listing_api",
        // The documented settings for a server that logs statements.
        "alter role listing_service set log_parameter_max_length = 0",
        "alter role listing_service set log_parameter_max_length_on_error = 0",
        "alter system set log_statement = 'all'",
        "alter system set log_min_duration_statement = 0",
        "alter system set log_parameter_max_length_on_error = -1",
        "select pg_reload_conf()",
    ] {
        run(&superuser, sql).await;
    }
    let (_, address) = cluster.url.rsplit_once('@').expect("user:password@address");
    let url = format!("postgres://listing_service:secret@{address}");
    let settings = [
        ("AUTH", "keys"),
        ("RUST_LOG", "trace"),
        ("STATEMENT_TIMEOUT_MS", "2000"),
    ];
    let service = Service::start_at(&url, &settings);
    let key = create_key(&cluster.superuser().await, "a").await;
    let hash = superuser
        .query_one("select key_sha256 from api_key", &[])
        .await;
    let hash: Vec<u8> = hash.expect("a row").get(0);
    let mut outputs = Vec::new();
    let mut post = |headers: &str, status| {
        let response = service.send("POST", "/listings", headers, LOFT);
        assert_eq!(response.status, status, "{}", response.text());
        outputs.push(format!("{:?} {}", response.headers, response.text()));
    };
    post(&bearer(&key), 201);
    // A malformed header, and lookups that fail.
    post(&format!("{JSON}authorization: Basic {key}\r\n"), 401);
    run(&superuser, "begin; lock table api_key").await;
    post(&bearer(&key), 504);
    run(
        &superuser,
        "rollback; \
        revoke execute on all functions in schema public from listing_api",
    )
    .await;
    post(&bearer(&key), 500);
    run(
        &superuser,
        "grant execute on function find_api_keys, change_feed_epoch to listing_api",
    )
    .await;
    run(&superuser, "select revoke_api_key(1)").await;
    post(&bearer(&key), 401);

    outputs.push(service.admin("/metrics").text().to_owned());
    let check = command(&url).envs(settings).arg("--check").output();
    let check = printed(&check.expect("the program"));
    assert!(check.contains("AUTH=keys"), "{check}");
    outputs.push(check);
    // The line of a later request comes after all lines of these.
    service.send("GET", "/listings/9", "x-request-id: later\r\n", "");
    service.logged("later");
    outputs.extend(service.log());
    let logs_statements = outputs
        .iter()
        .any(|line| line.contains("executing statement"));
    assert!(logs_statements, "the driver logs no statement");
    outputs.extend(rows(&superuser, "select query from pg_stat_activity").await);
    let server_log = std::fs::read(cluster.folder.path().join(".postgres/server.log"));
    let server_log =
        String::from_utf8_lossy(&server_log.expect("read the log of the server")).into_owned();
    for statement in [
        "from public.find_api_keys($1)",
        "select create_api_key('a')",
    ] {
        assert!(server_log.contains(statement), "{statement}");
    }
    assert_keeps_secret(&outputs.join("\n"), &key, &hash);
    assert_keeps_secret(&server_log, &key, &hash);
}

#[tokio::test]
async fn a_key_is_looked_up_on_the_primary() {
    let primary = Cluster::migrated();
    let replica = primary.standby();
    let superuser = primary.superuser().await;
    let old = create_key(&superuser, "a").await;
    // Without target_session_attrs, the standby is read while the primary is down.
    let both = through(&primary, &[primary.address(), replica.address()]);
    let settings = [("DATABASE_READ_URL", &*replica.url), ("AUTH", "keys")];
    let service = Service::start_at(&both, &settings);
    let created = service.send("POST", "/listings", &bearer(&old), LOFT);
    assert_eq!(created.status, 201);
    let replaying = pause_after_the_first_listing(&replica).await;
    // The paused standby does not know these two.
    let new = create_key(&superuser, "a").await;
    revoke_key(&superuser, &old).await;
    let write = |key: &str| {
        service
            .send("PATCH", "/listings/1", &bearer(key), "{}")
            .status
    };
    assert_eq!((write(&old), write(&new)), (401, 200));
    primary.call("stop");
    within(Duration::from_secs(5), "reads from the standby", || {
        service.get("/listings/1").status == 200 && write(&new) == 503
    });
    assert_eq!((write(&old), write(&new)), (503, 503));
    run(&replaying, "select pg_wal_replay_resume()").await;
    replica.call("promote");
    within(Duration::from_secs(3), "a write", || write(&new) == 200);
    assert_eq!(write(&old), 401);
}
