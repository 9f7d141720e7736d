//! Clients that read and write without pause while a test makes something fail.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::{OnDrop, Response, Service};

/// Reads and writes listings 1 to 4 with one client each, without pause, while `event` runs. Returns the methods and the
/// responses.
pub fn under_load(service: &Service, event: impl FnOnce()) -> Vec<(&'static str, Response)> {
    let done = AtomicBool::new(false);
    let client = |id: usize| {
        let mut responses = Vec::new();
        let paths = ["", "/prices", "?", "/prices?limit=5"];
        for turn in 0.. {
            if done.load(Ordering::Relaxed) {
                break;
            }
            responses.push(if turn % 3 == 0 {
                let price = format!("{{\"latest_price_eur\":{turn}}}");
                ("PATCH", service.patch(&format!("/listings/{id}"), &price))
            } else {
                let path = format!("/listings/{id}{}", paths[turn % 4]);
                ("GET", service.get(&path))
            });
        }
        responses
    };
    thread::scope(|scope| {
        let clients: Vec<_> = (1..=4).map(|id| scope.spawn(move || client(id))).collect();
        let end = OnDrop(|| done.store(true, Ordering::Relaxed));
        event();
        drop(end);
        clients
            .into_iter()
            .flat_map(|client| client.join().expect("a client without a failure"))
            .collect()
    })
}

/// Asserts that every response is a 200, or a 503 that says when to retry. Returns how many reads and writes got a 503.
pub fn count_refused(responses: &[(&str, Response)]) -> (usize, usize) {
    for (method, response) in responses {
        match response.status {
            200 => (),
            503 => assert_eq!(response.header("retry-after"), Some("1"), "{response:?}"),
            _ => panic!("{method} {response:?}"),
        }
    }
    let count = |wanted| {
        responses
            .iter()
            .filter(|(method, response)| *method == wanted && response.status == 503)
            .count()
    };
    (count("GET"), count("PATCH"))
}
