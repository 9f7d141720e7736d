//! Clients that record each of their writes while a test makes servers fail, and the comparison of their records with the
//! database.

use std::collections::{BTreeMap, HashMap};
use std::io::ErrorKind;
use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use fastrand::Rng;
use serde_json::json;

use super::{Connection, JSON, LOFT, Mirror, Mirrored, Response, assert_no_problem, rows, within};

const WRITERS: u64 = 6;
const READERS: u64 = 2;

/// What a client knows about one of its writes.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Outcome {
    Acknowledged,
    Unknown,
}

/// All writes of one client to one listing. No other client writes that listing.
struct Record {
    name: String,
    id: Option<i64>,
    /// The first price is that of the insert. All prices of a run are different.
    prices: Vec<(i64, Outcome)>,
    deleted: Option<Outcome>,
    etag: Option<String>,
}

/// A request and whether it was served.
struct Observation {
    at: Instant,
    write: bool,
    served: bool,
}

#[derive(Default)]
struct Shared {
    done: AtomicBool,
    writers_ended: AtomicBool,
    observations: Mutex<Vec<Observation>>,
}

/// Eight clients and two consumers of the change feed, and what they know. When dropped, the clients end.
pub struct History {
    pub begun: Instant,
    shared: Arc<Shared>,
    clients: Vec<JoinHandle<Vec<Record>>>,
    mirrors: Vec<JoinHandle<Mirrored>>,
}

struct Client {
    number: i64,
    random: Rng,
    instances: Vec<String>,
    records: Vec<Record>,
    last_price: i64,
    shared: Arc<Shared>,
}

impl Client {
    fn read_and_write(mut self) -> Vec<Record> {
        while !self.shared.done.load(Ordering::Relaxed) {
            let alive = |record: &Record| record.id.is_some() && record.deleted.is_none();
            let alive: Vec<_> = (0..self.records.len())
                .filter(|record| alive(&self.records[*record]))
                .collect();
            match (self.random.u8(..100), self.random.choice(alive)) {
                (20..80, Some(record)) => self.reprice(record),
                (80..95, Some(record)) => self.read(record),
                (95.., Some(record)) => self.delete(record),
                _ => self.create(),
            }
        }
        self.records
    }

    /// Only reads, so that there are reads also while every writer waits.
    fn only_read(mut self) -> Vec<Record> {
        while !self.shared.done.load(Ordering::Relaxed) {
            if let Some(response) = self.send("GET", "/listings?limit=1", "", "") {
                assert_eq!(response.status, 200, "{response:?}");
            }
        }
        self.records
    }

    fn next_price(&mut self) -> i64 {
        self.last_price += 1;
        self.number * 1_000_000 + self.last_price
    }

    /// Sends a request to a random instance. Returns the response, unless there is none or it has a status of 500 or more.
    /// After some writes the client disconnects, at times while the commit waits for its standby.
    fn send(&mut self, method: &str, path: &str, headers: &str, body: &str) -> Option<Response> {
        let instance = self.random.usize(..self.instances.len());
        let connection = Connection::try_to(&self.instances[instance]);
        if method != "GET" && self.random.u8(..100) < 5 {
            let mut connection = connection.ok()?;
            // Fails if the instance has just ended.
            let _ = connection.try_request(method, path, headers, body.as_bytes());
            thread::sleep(Duration::from_millis(self.random.u64(..20)));
            return None;
        }
        let response = connection
            .and_then(|mut connection| connection.try_send(method, path, headers, body.as_bytes()));
        let served = response
            .as_ref()
            .is_ok_and(|response| response.status < 500);
        // A proxy would notice that the instance is down before it sends the request.
        let refused = response
            .as_ref()
            .is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused);
        if refused {
            thread::sleep(Duration::from_millis(10));
        } else {
            let observation = Observation {
                at: Instant::now(),
                write: method != "GET",
                served,
            };
            self.shared
                .observations
                .lock()
                .expect("lock")
                .push(observation);
        }
        if let Ok(response) = &response
            && response.status == 503
        {
            assert_eq!(response.header("retry-after"), Some("1"));
        }
        response.ok().filter(|_| served)
    }

    fn create(&mut self) {
        let price = self.next_price();
        let name = format!("client {} price {price}", self.number);
        let mut listing: serde_json::Value = serde_json::from_str(LOFT).expect("a listing");
        listing["name"] = json!(name);
        listing["latest_price_eur"] = json!(price);
        let response = self.send("POST", "/listings", JSON, &listing.to_string());
        let outcome = response
            .as_ref()
            .map_or(Outcome::Unknown, |_| Outcome::Acknowledged);
        self.records.push(Record {
            name,
            id: response.as_ref().map(|response| {
                assert_eq!(response.status, 201, "{response:?}");
                response.json()["id"].as_i64().expect("an id")
            }),
            prices: vec![(price, outcome)],
            deleted: None,
            etag: response.and_then(|response| response.header("etag").map(str::to_owned)),
        });
    }

    fn path(&self, record: usize) -> String {
        format!("/listings/{}", self.records[record].id.expect("an id"))
    }

    fn reprice(&mut self, record: usize) {
        let price = self.next_price();
        let body = format!("{{\"latest_price_eur\":{price}}}");
        let response = self.send("PATCH", &self.path(record), JSON, &body);
        let outcome = response.as_ref().map_or(Outcome::Unknown, |response| {
            assert_eq!(
                (
                    response.status,
                    response.json()["latest_price_eur"].as_i64()
                ),
                (200, Some(price)),
                "{response:?}"
            );
            Outcome::Acknowledged
        });
        let record = &mut self.records[record];
        record.prices.push((price, outcome));
        record.etag = response.and_then(|response| response.header("etag").map(str::to_owned));
    }

    /// Asserts that the last acknowledged price is still the price, or that a write with an unknown outcome was done since.
    fn read(&mut self, record: usize) {
        let Some(etag) = self.records[record].etag.clone() else {
            return;
        };
        let seen = format!("if-none-match: {etag}\r\n");
        if let Some(response) = self.send("GET", &self.path(record), &seen, "")
            && response.status != 304
        {
            let price = response.json()["latest_price_eur"].as_i64();
            let done_late = self.records[record]
                .prices
                .iter()
                .any(|write| Some(write.0) == price && write.1 == Outcome::Unknown);
            assert!(
                done_late,
                "{etag} of {:?}: {response:?}",
                self.records[record].prices.last()
            );
        }
    }

    fn delete(&mut self, record: usize) {
        let response = self.send("DELETE", &self.path(record), "", "");
        self.records[record].deleted = Some(response.map_or(Outcome::Unknown, |response| {
            assert_eq!(response.status, 204, "{response:?}");
            Outcome::Acknowledged
        }));
    }
}

impl History {
    /// Starts clients that use these instances. The seed determines what they do.
    pub fn record(instances: &[String], seed: u64) -> Self {
        let shared = Arc::new(Shared::default());
        let client = |number: u64| {
            let client = Client {
                number: number.try_into().expect("a number"),
                random: Rng::with_seed(seed + number),
                instances: instances.to_vec(),
                records: Vec::new(),
                last_price: 0,
                shared: shared.clone(),
            };
            thread::spawn(move || {
                if number > WRITERS {
                    client.only_read()
                } else {
                    client.read_and_write()
                }
            })
        };
        // They end at the last change of the writers.
        let mirror = |by_events| {
            let (mirror, shared) = (Mirror::new(instances.to_vec(), by_events), shared.clone());
            thread::spawn(move || mirror.follow(&shared.writers_ended))
        };
        println!("  at s | what                    | no write s | no read s");
        Self {
            begun: Instant::now(),
            clients: (1..=WRITERS + READERS).map(client).collect(),
            mirrors: [false, true].map(mirror).into(),
            shared,
        }
    }

    /// Waits until a write is served after a fault, and a second more. Prints the longest time without a served write, and
    /// without a served read, since the fault.
    pub fn recovered(&self, fault: &str, from: Instant, limit: Duration) {
        let repaired = Instant::now();
        within(limit, &format!("a write after {fault}"), || {
            let observations = self.shared.observations.lock().expect("lock");
            let mut later = observations.iter().rev().take_while(|it| it.at > repaired);
            later.any(|observation| observation.write && observation.served)
        });
        thread::sleep(Duration::from_secs(1));
        let to = Instant::now();
        let observations = self.shared.observations.lock().expect("lock");
        let longest = |write: bool| {
            let served = observations
                .iter()
                .filter(|observation| observation.write == write && observation.served);
            let at = served.map(|observation| observation.at);
            let within = at.filter(|at| (from..=to).contains(at));
            let mut at: Vec<_> = within.chain([from, to]).collect();
            at.sort();
            let gaps = at.windows(2).map(|pair| pair[1] - pair[0]);
            gaps.max().unwrap_or_default().as_secs_f64()
        };
        let at = (from - self.begun).as_secs_f64();
        let (writes, reads) = (longest(true), longest(false));
        println!("{at:6.1} | {fault:<23} | {writes:10.2} | {reads:9.2}");
    }

    /// Ends the clients and compares what they and the consumers recorded with the database. Prints a summary.
    pub async fn verify(&mut self, superuser: &tokio_postgres::Client) {
        self.shared.done.store(true, Ordering::Relaxed);
        let records: Vec<_> = mem::take(&mut self.clients)
            .into_iter()
            .flat_map(|client| client.join().expect("a client without a failure"))
            .collect();
        assert_no_problem(superuser).await;
        let mut listings: BTreeMap<i64, (String, i64)> = BTreeMap::new();
        for row in rows(superuser, "select id, name, price::bigint from listing").await {
            let fields: Vec<_> = row.split('|').collect();
            listings.insert(number(fields[0]), (fields[1].to_owned(), number(fields[2])));
        }
        let log = "select listing_id, id, new_price::bigint from listing_price_log order by id";
        let mut histories: HashMap<i64, Vec<(i64, i64)>> = HashMap::new();
        for row in rows(superuser, log).await {
            let fields: Vec<_> = row.split('|').map(number).collect();
            histories
                .entry(fields[0])
                .or_default()
                .push((fields[1], fields[2]));
        }
        self.shared.writers_ended.store(true, Ordering::Relaxed);
        let mut restarts = 0;
        for mirror in mem::take(&mut self.mirrors) {
            let mirrored = mirror.join().expect("a mirror without a failure");
            assert_mirrored(&mirrored, &listings, &histories);
            restarts += mirrored.restarts;
        }
        let histories = histories.into_iter().map(|(listing, history)| {
            let prices = history.into_iter().map(|(_, price)| price);
            (listing, prices.collect())
        });
        println!("{}", verify(&records, listings, histories.collect()));
        println!("the consumers of the feed began anew {restarts} times, after a 410");
        let observations = self.shared.observations.lock().expect("lock");
        let served = observations.iter().filter(|it| it.served).count();
        let failed = observations.len() - served;
        let seconds = self.begun.elapsed().as_secs();
        println!("{served} requests served and {failed} failed in {seconds} s");
    }
}

impl Drop for History {
    fn drop(&mut self) {
        self.shared.done.store(true, Ordering::Relaxed);
    }
}

/// Asserts that a consumer has the present prices, and that each price that it saw is in the log.
fn assert_mirrored(
    mirrored: &Mirrored,
    listings: &BTreeMap<i64, (String, i64)>,
    histories: &HashMap<i64, Vec<(i64, i64)>>,
) {
    let prices = listings.iter().map(|(id, (_, price))| (*id, *price));
    assert_eq!(mirrored.prices, prices.collect());
    for ((listing, id), price) in &mirrored.seen {
        if let (Some(price), Some(history)) = (price, histories.get(listing)) {
            assert!(
                history.contains(&(*id, *price)),
                "price {id} of listing {listing} was undone: {history:?}"
            );
        }
    }
}

fn number(text: &str) -> i64 {
    text.parse().expect("a number")
}

/// Compares what the clients recorded with the database. Returns a summary.
fn verify(
    records: &[Record],
    mut listings: BTreeMap<i64, (String, i64)>,
    mut histories: HashMap<i64, Vec<i64>>,
) -> String {
    let (mut acknowledged, mut done, mut not_done) = (0, 0, 0);
    let mut count_unknown = |is: bool| if is { done += 1 } else { not_done += 1 };
    for record in records {
        let by_name = listings
            .iter()
            .find(|(_, (name, _))| *name == record.name)
            .map(|(id, _)| *id);
        let id = record.id.or(by_name);
        let listing = id.and_then(|id| listings.remove(&id));
        let history = id.and_then(|id| histories.remove(&id));
        assert_eq!(
            listing.is_some(),
            history.is_some(),
            "listing without history, or the reverse: {}",
            record.name
        );
        match (record.prices[0].1, record.deleted) {
            (Outcome::Acknowledged, None) => assert!(listing.is_some(), "{} is lost", record.name),
            (_, Some(Outcome::Acknowledged)) => {
                assert!(listing.is_none(), "{} is back", record.name);
            }
            (_, Some(Outcome::Unknown)) => count_unknown(listing.is_none()),
            (Outcome::Unknown, None) => count_unknown(listing.is_some()),
        }
        acknowledged += usize::from(record.prices[0].1 == Outcome::Acknowledged)
            + usize::from(record.deleted == Some(Outcome::Acknowledged));
        let (Some((_, price)), Some(history)) = (listing, history) else {
            // A deleted listing has no log.
            continue;
        };
        assert_eq!(
            (history.first(), history.last()),
            (Some(&record.prices[0].0), Some(&price)),
            "{}",
            record.name
        );
        for (price, outcome) in &record.prices[1..] {
            let times = history.iter().filter(|logged| *logged == price).count();
            match outcome {
                Outcome::Acknowledged => {
                    assert_eq!(times, 1, "{price} of {}: {history:?}", record.name);
                    acknowledged += 1;
                }
                Outcome::Unknown => {
                    assert!(times <= 1, "{price} of {}: {history:?}", record.name);
                    count_unknown(times == 1);
                }
            }
        }
        let told_done = |price: &&i64| {
            record
                .prices
                .iter()
                .any(|write| write.0 == **price && write.1 == Outcome::Acknowledged)
        };
        let in_order: Vec<_> = history.iter().filter(told_done).copied().collect();
        let acknowledged: Vec<_> = record
            .prices
            .iter()
            .filter(|write| write.1 == Outcome::Acknowledged)
            .map(|write| write.0)
            .collect();
        assert_eq!(in_order, acknowledged, "{}", record.name);
        let written = |price: &i64| record.prices.iter().any(|write| write.0 == *price);
        assert!(
            history.iter().all(written),
            "a price that no client wrote: {history:?}"
        );
    }
    assert!(
        listings.is_empty() && histories.is_empty(),
        "no client wrote {listings:?} {histories:?}"
    );
    assert!(acknowledged > 50, "{acknowledged}");
    format!(
        "{acknowledged} acknowledged writes (prices of deleted listings not counted): all present, each price once and in order, \
         no problem in listing_price_log_problem\n\
         {} writes got a 5xx or no response: {done} done, {not_done} not done, none in part",
        done + not_done
    )
}
