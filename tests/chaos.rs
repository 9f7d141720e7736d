//! Kills, pauses, disconnects, promotes and restarts servers while clients record every acknowledged write. In the end the
//! database must contain all of them, and consumers of the change feed must have the present prices. `make chaos` does the
//! same for longer and prints a report.

use std::collections::{BTreeMap, HashMap};
use std::env;
use std::io::ErrorKind;
use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use fastrand::Rng;
use serde_json::json;

use crate::support::{
    Cluster, Connection, JSON, LOFT, Link, Mirror, OnDrop, Response, Service, assert_no_problem,
    free_address, require_a_standby, rows, run, synchronous_pair, through,
};

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
    fn send(&mut self, method: &str, path: &str, headers: &str, body: &str) -> Option<Response> {
        let instance = self.random.usize(..self.instances.len());
        let response = Connection::try_to(&self.instances[instance])
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

/// What the test does to the servers.
#[derive(Clone, Copy, Debug)]
enum Fault {
    EndSessions,
    RestartPrimary,
    KillPrimary,
    PausePrimary,
    DisconnectPrimary,
    KillStandby,
    RestartInstance,
    KillInstance,
    KillAndPromote,
    PauseAndPromote,
    DisconnectAndPromote,
}

const FAULTS: [Fault; 11] = [
    Fault::KillAndPromote,
    Fault::PauseAndPromote,
    Fault::DisconnectAndPromote,
    Fault::EndSessions,
    Fault::RestartPrimary,
    Fault::KillPrimary,
    Fault::PausePrimary,
    Fault::DisconnectPrimary,
    Fault::KillStandby,
    Fault::RestartInstance,
    Fault::KillInstance,
];

struct World {
    random: Rng,
    primary: Cluster,
    standby: Cluster,
    /// The link to the primary and the link to the standby.
    links: [Link; 2],
    instances: Vec<Service>,
    read_url: String,
    url: String,
}

impl World {
    async fn new(random: Rng) -> Self {
        let (primary, standby) = synchronous_pair().await;
        let links = [Link::to(&primary), Link::to(&standby)];
        let url = through(&primary, &[&links[0].address, &links[1].address]);
        let mut world = Self {
            read_url: url.clone(),
            url: format!("{url}?target_session_attrs=read-write"),
            random,
            primary,
            standby,
            links,
            instances: Vec::new(),
        };
        for _ in 0..3 {
            let instance = world.instance(&free_address());
            world.instances.push(instance);
        }
        world
    }

    fn instance(&self, address: &str) -> Service {
        let settings = [
            ("DATABASE_READ_URL", &*self.read_url),
            ("LISTEN_ADDR", address),
        ];
        Service::start_at(&self.url, &settings)
    }

    fn some_seconds(&mut self) {
        thread::sleep(Duration::from_millis(self.random.u64(200..3500)));
    }

    async fn inject(&mut self, fault: Fault) {
        match fault {
            Fault::EndSessions => {
                let end = "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'listing-api'";
                run(&self.primary.superuser().await, end).await;
            }
            Fault::RestartPrimary => {
                self.primary.call("stop");
                self.primary.call("up");
            }
            Fault::KillPrimary => {
                self.primary.kill();
                self.primary.call("up");
            }
            Fault::PausePrimary => {
                self.primary.signal("-STOP");
                self.some_seconds();
                self.primary.signal("-CONT");
            }
            Fault::DisconnectPrimary => {
                self.links[0].cut(true);
                self.some_seconds();
                self.links[0].cut(false);
            }
            Fault::KillStandby => {
                self.standby.kill();
                self.some_seconds();
                self.standby.call("up");
            }
            Fault::RestartInstance => {
                let mut instance = self.take_instance();
                instance.signal("-TERM");
                assert_eq!(instance.wait(), Some(0));
                self.replace(&instance);
            }
            Fault::KillInstance => {
                let mut instance = self.take_instance();
                instance.signal("-KILL");
                assert_eq!(instance.wait(), None);
                self.replace(&instance);
            }
            Fault::KillAndPromote => {
                self.primary.kill();
                self.promote().await;
            }
            Fault::PauseAndPromote => {
                self.primary.signal("-STOP");
                self.standby.call("promote");
                // As a failover manager does, make sure that the former primary is dead.
                self.primary.kill();
                self.promote().await;
            }
            Fault::DisconnectAndPromote => {
                self.links[0].cut(true);
                self.standby.call("promote");
                self.primary.kill();
                self.links[0].cut(false);
                self.promote().await;
            }
        }
        require_a_standby(&self.primary).await;
    }

    /// Makes the standby the primary, and a new standby in place of the former primary.
    async fn promote(&mut self) {
        let in_recovery = rows(
            &self.standby.superuser().await,
            "select pg_is_in_recovery()",
        )
        .await;
        if in_recovery == ["t"] {
            self.standby.call("promote");
        }
        self.links.swap(0, 1);
        mem::swap(&mut self.primary, &mut self.standby);
        self.standby = self.primary.standby();
        self.links[1].lead_to(&self.standby);
    }

    fn take_instance(&mut self) -> Service {
        let number = self.random.usize(..self.instances.len());
        self.instances.swap_remove(number)
    }

    fn replace(&mut self, instance: &Service) {
        let instance = self.instance(&instance.address);
        self.instances.push(instance);
    }
}

/// Two consumers of the change feed, one by pages and one by events. They end at the last change of the writers.
fn mirrors(world: &World, shared: &Arc<Shared>) -> [JoinHandle<BTreeMap<i64, i64>>; 2] {
    [false, true].map(|by_events| {
        let instances = world.instances.iter();
        let instances = instances.map(|instance| instance.address.clone());
        let mirror = Mirror::new(instances.collect(), by_events);
        let shared = shared.clone();
        thread::spawn(move || mirror.follow(&shared.writers_ended))
    })
}

/// Asserts that the consumers have the present prices.
fn assert_mirrored(
    mirrors: [JoinHandle<BTreeMap<i64, i64>>; 2],
    listings: &BTreeMap<i64, (String, i64)>,
) {
    let prices = listings.iter().map(|(id, (_, price))| (*id, *price));
    let prices: BTreeMap<_, _> = prices.collect();
    for mirror in mirrors {
        assert_eq!(mirror.join().expect("a mirror without a failure"), prices);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_acknowledged_write_survives_every_fault() {
    let given = |name| env::var(name).ok().map(|value| value.parse().expect(name));
    let seed = given("CHAOS_SEED").unwrap_or_else(|| fastrand::u64(..1_000_000));
    let duration = Duration::from_secs(given("CHAOS_SECONDS").unwrap_or(8));
    // Printed if the test fails.
    println!("CHAOS_SEED={seed} repeats the choices of this run");
    let mut world = World::new(Rng::with_seed(seed)).await;
    let shared = Arc::new(Shared::default());
    let begun = Instant::now();
    let clients: Vec<_> = (1..=WRITERS + READERS)
        .map(|number| {
            let client = Client {
                number: number.try_into().expect("a number"),
                random: Rng::with_seed(seed + number),
                instances: world
                    .instances
                    .iter()
                    .map(|instance| instance.address.clone())
                    .collect(),
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
        })
        .collect();
    let mirrors = mirrors(&world, &shared);
    let end = OnDrop(|| shared.done.store(true, Ordering::Relaxed));

    let mut faults = Vec::new();
    let mut remaining = Vec::new();
    thread::sleep(Duration::from_secs(1));
    while begun.elapsed() < duration {
        if remaining.is_empty() {
            remaining = FAULTS.to_vec();
            world.random.shuffle(&mut remaining);
        }
        // The first fault is a failover, so that the shortest run has one.
        let fault = if faults.is_empty() {
            FAULTS[world.random.usize(..3)]
        } else {
            remaining.pop().expect("a fault")
        };
        let injected = Instant::now();
        world.inject(fault).await;
        let recovered = Instant::now();
        let served = || {
            let observations = shared.observations.lock().expect("lock");
            observations
                .iter()
                .rev()
                .take_while(|observation| observation.at > recovered)
                .any(|observation| observation.write && observation.served)
        };
        while !served() {
            assert!(
                recovered.elapsed() < Duration::from_secs(10),
                "no write is served after {fault:?}"
            );
            thread::sleep(Duration::from_millis(10));
        }
        thread::sleep(Duration::from_secs(1));
        faults.push((fault, injected, Instant::now()));
    }
    drop(end);
    let records: Vec<_> = clients
        .into_iter()
        .flat_map(|client| client.join().expect("a client without a failure"))
        .collect();

    let superuser = world.primary.superuser().await;
    assert_no_problem(&superuser).await;
    let text = rows(&superuser, "select id, name, price::bigint from listing").await;
    let mut listings: BTreeMap<i64, (String, i64)> = BTreeMap::new();
    for row in &text {
        let fields: Vec<_> = row.split('|').collect();
        listings.insert(number(fields[0]), (fields[1].to_owned(), number(fields[2])));
    }
    shared.writers_ended.store(true, Ordering::Relaxed);
    assert_mirrored(mirrors, &listings);
    let mut histories: HashMap<i64, Vec<i64>> = HashMap::new();
    for row in rows(
        &superuser,
        "select listing_id, new_price::bigint from listing_price_log order by id",
    )
    .await
    {
        let (listing, price) = row.split_once('|').expect("two columns");
        histories
            .entry(number(listing))
            .or_default()
            .push(number(price));
    }
    println!("{}", verify(&records, listings, histories));
    println!("{}", shared.report(begun, &faults));
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

impl Shared {
    /// For each fault, the longest time without a served write and without a served read.
    fn report(&self, begun: Instant, faults: &[(Fault, Instant, Instant)]) -> String {
        let observations = self.observations.lock().expect("lock");
        let longest = |write: bool, from: Instant, to: Instant| {
            let served = observations
                .iter()
                .filter(|observation| observation.write == write && observation.served);
            let within = |at: &Instant| from <= *at && *at <= to;
            let at = served.map(|observation| observation.at).filter(within);
            let mut at: Vec<_> = at.chain([from, to]).collect();
            at.sort();
            let gaps = at.windows(2).map(|pair| pair[1] - pair[0]);
            gaps.max().unwrap_or_default().as_secs_f64()
        };
        let lines = faults.iter().map(|(fault, from, to)| {
            let at = (*from - begun).as_secs_f64();
            let fault = format!("{fault:?}");
            let (writes, reads) = (longest(true, *from, *to), longest(false, *from, *to));
            format!("{at:6.1} | {fault:<16} | {writes:10.2} | {reads:9.2}")
        });
        let lines: Vec<_> = lines.collect();
        let served = observations
            .iter()
            .filter(|observation| observation.served)
            .count();
        format!(
            "  at s | what             | no write s | no read s\n{}\n{served} requests served and {} failed in {} s",
            lines.join("\n"),
            observations.len() - served,
            begun.elapsed().as_secs()
        )
    }
}
