//! Clients contend for the same listings, mostly with `If-Match`, while servers fail. For each listing, a checker decides
//! whether one register with compare-and-set explains what all clients saw. `make chaos` does the same for longer.

use std::collections::HashMap;
use std::env;
use std::io::ErrorKind;
use std::mem;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use fastrand::Rng;
use serde_json::{Value, json};
use todc_utils::Action::{Call, Response as Return};
use todc_utils::{History, Specification, WGLChecker};

use crate::support::{
    Cluster, Connection, JSON, LOFT, Link, OnDrop, Response, Service, free_address, pause_replay,
    require_a_standby, run, synchronous_pair, through, within,
};

const CLIENTS: u64 = 6;

/// How many listings the clients contend for at a time. A new one replaces each that is used up or deleted.
const LISTINGS: usize = 2;

/// A listing is used up after so many operations, if its last unknown outcome is half as many operations ago. This and the
/// next bound keep the checker fast: 20 ms for a listing in a debug build.
const OPERATIONS: usize = 300;

/// From then on clients only read a listing. After the first unknown outcome they write only with `If-Match`. Such a write fits
/// only behind its version. An unconditional one fits everywhere, and each can double the time of the checker.
const UNKNOWN: usize = 8;

const REPLICA_LAG: Duration = Duration::from_millis(500);

/// What `docs/scaling.md` promises for reads of replicas.
const MAX_AGE: Duration = REPLICA_LAG.saturating_add(Duration::from_secs(1));

/// An operation and its outcome. Every write sets a price of its own, so a price stands for a version and its tag.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Operation {
    Create(i64),
    /// No price: there is no such listing. A write that gets 404 is also such a read.
    Read(Option<i64>),
    /// A write that was done. No new price: a deletion.
    Done(Write),
    /// A write that got 412.
    Refused(Write),
    /// A write that got a status of 500 or more, or no response.
    Unknown(Write),
    /// Comes last of all whose outcome is known.
    End,
}

#[derive(Clone, Copy, PartialEq, Debug)]
struct Write {
    /// The price of the version in `If-Match`.
    expected: Option<i64>,
    new: Option<i64>,
}

/// The state of a listing: its price, or none before its POST and after its deletion.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct State {
    price: Option<i64>,
    ended: bool,
}

struct Register;

impl Specification for Register {
    type State = State;
    type Operation = Operation;

    fn init() -> State {
        let (price, ended) = (None, false);
        State { price, ended }
    }

    fn apply(operation: &Operation, state: &State) -> (bool, State) {
        let exists = state.price.is_some();
        let matches =
            |write: &Write| exists && (write.expected.is_none() || write.expected == state.price);
        let to = |price| State { price, ..*state };
        match operation {
            Operation::Create(price) => (!exists, to(Some(*price))),
            Operation::Read(price) => (*price == state.price, *state),
            Operation::Refused(write) => (exists && !matches(write), *state),
            // What takes effect after the end never does.
            Operation::Unknown(_) if state.ended => (true, *state),
            Operation::Done(write) | Operation::Unknown(write) => (matches(write), to(write.new)),
            Operation::End => (
                true,
                State {
                    ended: true,
                    ..*state
                },
            ),
        }
    }
}

/// An operation of a client, with the times of its request and its response.
#[derive(Clone, Copy, Debug)]
struct Record {
    operation: Operation,
    started: Instant,
    ended: Instant,
}

/// Whether the register explains these operations.
fn is_linearizable(records: &[Record]) -> bool {
    // The checker pairs the calls and returns of a process, so each operation is a process.
    let mut actions = Vec::new();
    for (process, record) in records.iter().enumerate() {
        let is_unknown = matches!(record.operation, Operation::Unknown(_));
        let (call, end) = (Call(record.operation), Return(record.operation));
        actions.push((0, record.started, (process, call)));
        // An operation with an unknown outcome may take effect at any time from its start.
        let rank = if is_unknown { 3 } else { 0 };
        actions.push((rank, record.ended, (process, end)));
    }
    let now = Instant::now();
    let end = records.len();
    actions.push((1, now, (end, Call(Operation::End))));
    actions.push((2, now, (end, Return(Operation::End))));
    // At the same time, calls come first: the operations are then concurrent.
    actions.sort_by_key(|(rank, at, (_, action))| (*rank, *at, matches!(action, Return(_))));
    let actions = actions.into_iter().map(|(.., action)| action).collect();
    WGLChecker::<Register>::is_linearizable(History::from_actions(actions))
}

/// A listing and what the clients saw of it.
struct Listing {
    id: i64,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    records: Vec<Record>,
    /// The prices that a replica may have answered with, and the times of the requests.
    on_replicas: Vec<(i64, Instant)>,
    /// The price of each tag.
    prices: HashMap<String, i64>,
    unknown: usize,
    /// How many operations had ended when the last unknown outcome came.
    last_unknown: usize,
    is_gone: bool,
}

impl Listing {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().expect("lock")
    }

    fn record(&self, started: Instant, operation: Operation) {
        let ended = Instant::now();
        let record = Record {
            operation,
            started,
            ended,
        };
        self.seen().add(record);
    }
}

impl Seen {
    fn is_used_up(&self) -> bool {
        let count = self.records.len();
        self.is_gone || count >= OPERATIONS && count >= self.last_unknown + OPERATIONS / 2
    }

    fn add(&mut self, record: Record) {
        self.records.push(record);
        match record.operation {
            Operation::Read(None) | Operation::Done(Write { new: None, .. }) => self.is_gone = true,
            Operation::Unknown(_) => {
                self.unknown += 1;
                self.last_unknown = self.records.len();
            }
            _ => (),
        }
    }

    /// The records with the microseconds of their times, one a line.
    fn as_text(&self) -> String {
        let begun = self.records[0].started;
        let lines = self.records.iter().map(|record| {
            let at = |time: Instant| time.duration_since(begun).as_micros();
            let (started, ended) = (at(record.started), at(record.ended));
            format!("{started:>9} {ended:>9} {:?}\n", record.operation)
        });
        lines.collect()
    }

    /// Asserts that replicas answered only with prices that were present within the promised time.
    fn assert_replica_reads(&self, id: i64) {
        for (price, asked) in &self.on_replicas {
            let shows = |record: &Record| record.operation.shows(Some(*price));
            let known = self
                .records
                .iter()
                .filter(|record| shows(record) == Some(true));
            // Without one, only replicas showed the outcome of the write.
            let Some(known) = known.map(|record| record.ended).min() else {
                continue;
            };
            let replaced = self.records.iter();
            let replaced =
                replaced.filter(|record| record.started > known && shows(record) == Some(false));
            if let Some(replaced) = replaced.map(|record| record.ended).min() {
                let age = asked.saturating_duration_since(replaced);
                assert!(age <= MAX_AGE, "listing {id}: {price} is {age:?} old");
            }
        }
    }
}

impl Operation {
    /// Whether the listing had this price at a moment of the operation. `None` if that is not known.
    fn shows(&self, price: Option<i64>) -> Option<bool> {
        match self {
            Self::Create(created) => Some(Some(*created) == price),
            Self::Read(read) => Some(*read == price),
            Self::Done(write) => Some(write.new == price),
            _ => None,
        }
    }
}

/// What all clients share.
struct Shared {
    /// Two instances that read on the primary, and one that reads on replicas.
    instances: [String; 3],
    /// Whether clients compare the tag themselves and then write without `If-Match`.
    compares_before: bool,
    current: [Mutex<Option<Arc<Listing>>>; LISTINGS],
    all: Mutex<Vec<Arc<Listing>>>,
    last_price: AtomicI64,
    writes_done: AtomicUsize,
    is_over: AtomicBool,
}

impl Shared {
    fn new(instances: [&Service; 3], compares_before: bool) -> Arc<Self> {
        Arc::new(Self {
            instances: instances.map(|instance| instance.address.clone()),
            compares_before,
            current: Default::default(),
            all: Mutex::default(),
            last_price: AtomicI64::default(),
            writes_done: AtomicUsize::default(),
            is_over: AtomicBool::default(),
        })
    }

    /// Starts the clients, which end once the test is over.
    fn start(self: &Arc<Self>, seed: u64) -> Vec<JoinHandle<()>> {
        let clients = (1..=CLIENTS).map(|number| {
            let client = Client::new(self, seed + number);
            thread::spawn(move || client.contend())
        });
        clients.collect()
    }

    fn listings(&self) -> Vec<Arc<Listing>> {
        self.all.lock().expect("lock").clone()
    }

    /// Reads every listing once more. Asserts that the register explains all that the clients saw. Returns a summary.
    fn verify(self: &Arc<Self>) -> String {
        let (mut count, mut unknown, mut on_replicas) = (0, 0, 0);
        let (mut took, listings) = (Vec::new(), self.listings());
        let mut last = Client::new(self, 0);
        for listing in &listings {
            let before = listing.seen().records.len();
            last.read(listing, 0, None);
            let seen = listing.seen();
            let is_read = seen.records.len() > before;
            assert!(is_read, "listing {} cannot be read", listing.id);
            seen.assert_replica_reads(listing.id);
            let begun = Instant::now();
            let explained = is_linearizable(&seen.records);
            took.push(begun.elapsed());
            assert!(explained, "listing {}:\n{}", listing.id, seen.as_text());
            count += seen.records.len();
            unknown += seen.unknown;
            on_replicas += seen.on_replicas.len();
        }
        assert!(count > 300, "{count}");
        format!(
            "{count} operations on {} listings, {unknown} with an unknown outcome: linearizable, decided in {:.1?}, the longest in \
             {:.1?}\n{on_replicas} reads on replicas: none too old",
            listings.len(),
            took.iter().sum::<Duration>(),
            took.iter().max().expect("a listing")
        )
    }
}

/// Why a request got no useful response.
enum Failure {
    NotSent,
    Unknown,
}

/// A price and its tag.
#[derive(Clone)]
struct Version {
    price: i64,
    tag: String,
}

struct Client {
    random: Rng,
    shared: Arc<Shared>,
    /// The last version that this client saw of each listing.
    last: HashMap<i64, Version>,
}

impl Client {
    fn new(shared: &Arc<Shared>, seed: u64) -> Self {
        let (shared, random, last) = (shared.clone(), Rng::with_seed(seed), HashMap::new());
        Self {
            random,
            shared,
            last,
        }
    }

    fn contend(mut self) {
        while !self.shared.is_over.load(Ordering::Relaxed) {
            let place = self.random.usize(..LISTINGS);
            let listing = self.shared.current[place].lock().expect("lock").clone();
            match listing {
                Some(listing) if !listing.seen().is_used_up() => self.read_or_write(&listing),
                used_up => self.replace(place, used_up.as_ref()),
            }
        }
    }

    fn read_or_write(&mut self, listing: &Listing) {
        let last = self.last.get(&listing.id).cloned();
        let unknown = listing.seen().unknown;
        match (self.random.u8(..100), last) {
            (..10, last) => self.read(listing, 2, last.as_ref()),
            (10..15, _) if unknown == 0 => self.write(listing, None),
            (15..60, Some(last)) if unknown < UNKNOWN => self.write(listing, Some(&last)),
            (choice, _) => self.read(listing, usize::from(choice % 3), None),
        }
    }

    fn send(
        &mut self,
        instance: usize,
        method: &str,
        path: &str,
        headers: &str,
        body: &str,
    ) -> Result<Response, Failure> {
        let response = Connection::try_to(&self.shared.instances[instance])
            .and_then(|mut connection| connection.try_send(method, path, headers, body.as_bytes()));
        match response {
            Ok(response) if response.status < 500 => Ok(response),
            Ok(response) => {
                let wait = response
                    .header("retry-after")
                    .map_or(0, |wait| wait.parse().expect("seconds"));
                thread::sleep(Duration::from_secs(wait));
                Err(Failure::Unknown)
            }
            Err(error) => {
                thread::sleep(Duration::from_millis(10));
                let was_sent = error.kind() != ErrorKind::ConnectionRefused;
                Err(if was_sent {
                    Failure::Unknown
                } else {
                    Failure::NotSent
                })
            }
        }
    }

    fn next_price(&self) -> i64 {
        self.shared.last_price.fetch_add(1, Ordering::Relaxed)
    }

    /// Replaces a listing that is used up, unless another client does.
    fn replace(&mut self, place: usize, used_up: Option<&Arc<Listing>>) {
        let (price, started, instance) =
            (self.next_price(), Instant::now(), self.random.usize(..3));
        let body = with_price(price);
        let Ok(response) = self.send(instance, "POST", "/listings", JSON, &body) else {
            return;
        };
        let listing = Arc::new(Listing {
            id: response.id(),
            seen: Mutex::default(),
        });
        listing.record(started, Operation::Create(price));
        self.remember(&listing, &response);
        let mut current = self.shared.current[place].lock().expect("lock");
        if current.as_ref().map(Arc::as_ptr) == used_up.map(Arc::as_ptr) {
            *current = Some(listing.clone());
            self.shared.all.lock().expect("lock").push(listing);
        }
    }

    /// Remembers the price and the tag of a response. Returns the price.
    fn remember(&mut self, listing: &Listing, response: &Response) -> i64 {
        let price = response.json()["latest_price_eur"]
            .as_i64()
            .expect("a price");
        let tag = response.header("etag").expect("a tag").to_owned();
        let known = *listing.seen().prices.entry(tag.clone()).or_insert(price);
        assert_eq!(
            known, price,
            "{tag} stands for two versions of listing {}",
            listing.id
        );
        self.last.insert(listing.id, Version { price, tag });
        price
    }

    /// Reads on an instance, with `If-None-Match` if a version is given.
    fn read(&mut self, listing: &Listing, instance: usize, known: Option<&Version>) {
        let (path, started) = (format!("/listings/{}", listing.id), Instant::now());
        let header = known.map(|known| format!("if-none-match: {}\r\n", known.tag));
        let Ok(response) = self.send(instance, "GET", &path, &header.unwrap_or_default(), "")
        else {
            return;
        };
        // A replica does not answer that there is no listing, or with another version than that in If-None-Match.
        let (price, of_primary) = match (response.status, known) {
            (200, _) => (
                Some(self.remember(listing, &response)),
                instance < 2 || known.is_some(),
            ),
            (304, Some(known)) => (Some(known.price), instance < 2),
            (404, _) => (None, true),
            _ => panic!("{response:?}"),
        };
        match price {
            Some(price) if !of_primary => listing.seen().on_replicas.push((price, started)),
            price => listing.record(started, Operation::Read(price)),
        }
    }

    /// Writes a new price, or deletes the listing. With `If-Match` if a version is given.
    fn write(&mut self, listing: &Listing, expected: Option<&Version>) {
        let (price, started) = (self.next_price(), Instant::now());
        let path = format!("/listings/{}", listing.id);
        let (method, body) = match self.random.u8(..) {
            0 => ("DELETE", String::new()),
            1..128 => ("PATCH", json!({ "latest_price_eur": price }).to_string()),
            128.. => ("PUT", with_price(price)),
        };
        let write = Write {
            expected: expected.map(|expected| expected.price),
            new: (method != "DELETE").then_some(price),
        };
        let mut if_match = expected.map(|expected| format!("if-match: {}\r\n", expected.tag));
        if let Some(expected) = expected
            && self.shared.compares_before
        {
            let Ok(response) = self.send(0, "GET", &path, "", "") else {
                return;
            };
            if response.status == 200 && response.header("etag") != Some(&expected.tag) {
                self.last.remove(&listing.id);
                return listing.record(started, Operation::Refused(write));
            }
            if_match = None;
        }
        let headers = [JSON, &if_match.unwrap_or_default()].concat();
        let instance = self.random.usize(..3);
        let operation = match self.send(instance, method, &path, &headers, &body) {
            Ok(response) => {
                self.last.remove(&listing.id);
                match response.status {
                    200 => {
                        assert_eq!(self.remember(listing, &response), price);
                        Operation::Done(write)
                    }
                    204 => Operation::Done(write),
                    412 if expected.is_some() => Operation::Refused(write),
                    404 => Operation::Read(None),
                    _ => panic!("{response:?}"),
                }
            }
            Err(Failure::Unknown) => Operation::Unknown(write),
            Err(Failure::NotSent) => return,
        };
        if matches!(operation, Operation::Done(_)) {
            self.shared.writes_done.fetch_add(1, Ordering::Relaxed);
        }
        listing.record(started, operation);
    }
}

fn with_price(price: i64) -> String {
    let mut listing: Value = serde_json::from_str(LOFT).expect("a listing");
    listing["latest_price_eur"] = json!(price);
    listing.to_string()
}

/// What the test does to the servers.
#[derive(Clone, Copy, Debug)]
enum Fault {
    KillAndPromote,
    PauseAndPromote,
    DisconnectAndPromote,
    KillPrimary,
    PausePrimary,
    DisconnectPrimary,
    EndSessions,
    KillInstance,
    DelayReplica,
}

const FAULTS: [Fault; 9] = [
    Fault::KillAndPromote,
    Fault::PauseAndPromote,
    Fault::DisconnectAndPromote,
    Fault::KillPrimary,
    Fault::PausePrimary,
    Fault::DisconnectPrimary,
    Fault::EndSessions,
    Fault::KillInstance,
    Fault::DelayReplica,
];

struct World {
    random: Rng,
    primary: Cluster,
    standby: Cluster,
    /// The link to the primary and the link to the standby.
    links: [Link; 2],
    url: String,
    instances: [Service; 3],
}

impl World {
    async fn new(random: Rng) -> Self {
        let (primary, standby) = synchronous_pair().await;
        let links = [Link::to(&primary), Link::to(&standby)];
        let url = through(&primary, &[&links[0].address, &links[1].address]);
        let instances = [0, 1, 2].map(|number| instance(&url, number, &free_address()));
        Self {
            random,
            primary,
            standby,
            links,
            url,
            instances,
        }
    }

    fn some_seconds(&mut self) {
        thread::sleep(Duration::from_millis(self.random.u64(200..3500)));
    }

    async fn inject(&mut self, fault: Fault) {
        match fault {
            Fault::KillAndPromote => {
                self.primary.kill();
                self.standby.call("promote");
                self.follow();
            }
            // As a failover manager does, both of these make sure that the former primary is dead.
            Fault::PauseAndPromote => {
                self.primary.signal("-STOP");
                self.standby.call("promote");
                self.primary.kill();
                self.follow();
            }
            Fault::DisconnectAndPromote => {
                self.links[0].cut(true);
                self.standby.call("promote");
                self.primary.kill();
                self.links[0].cut(false);
                self.follow();
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
            Fault::EndSessions => {
                let end = "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'listing-api'";
                run(&self.primary.superuser().await, end).await;
            }
            Fault::KillInstance => {
                let number = self.random.usize(..3);
                self.instances[number].signal("-KILL");
                assert_eq!(self.instances[number].wait(), None);
                let address = self.instances[number].address.clone();
                self.instances[number] = instance(&self.url, number, &address);
            }
            Fault::DelayReplica => {
                let superuser = self.standby.superuser().await;
                pause_replay(&superuser).await;
                self.some_seconds();
                run(&superuser, "select pg_wal_replay_resume()").await;
            }
        }
        require_a_standby(&self.primary).await;
    }

    /// Makes a new standby in place of the former primary.
    fn follow(&mut self) {
        mem::swap(&mut self.primary, &mut self.standby);
        self.links.swap(0, 1);
        self.standby = self.primary.standby();
        self.links[1].lead_to(&self.standby);
    }
}

/// Two instances read on the primary only, and the third one on replicas.
fn instance(url: &str, number: usize, address: &str) -> Service {
    let lag = REPLICA_LAG.as_millis().to_string();
    let settings = [
        ("LISTEN_ADDR", address),
        ("REPLICA_LAG_MS", &lag),
        ("DATABASE_READ_URL", url),
    ];
    let settings = &settings[..if number == 2 { 3 } else { 2 }];
    Service::start_at(&format!("{url}?target_session_attrs=read-write"), settings)
}

#[tokio::test(flavor = "multi_thread")]
async fn contended_conditional_writes_are_linearizable_through_every_fault() {
    let given = |name| env::var(name).ok().map(|value| value.parse().expect(name));
    let seed = given("CHAOS_SEED").unwrap_or_else(|| fastrand::u64(..1_000_000));
    let duration = Duration::from_secs(given("CHAOS_SECONDS").unwrap_or(8));
    // Printed if the test fails.
    println!("CHAOS_SEED={seed} repeats the choices of this run");
    let mut world = World::new(Rng::with_seed(seed)).await;
    let shared = Shared::new(world.instances.each_ref(), false);
    let end = OnDrop(|| shared.is_over.store(true, Ordering::Relaxed));
    let clients = shared.start(seed);
    let begun = Instant::now();
    let (mut remaining, mut faults) = (Vec::new(), 0);
    while begun.elapsed() < duration {
        if remaining.is_empty() {
            remaining = FAULTS.to_vec();
            world.random.shuffle(&mut remaining);
            // The last one comes first: a failover, so that the shortest run has one.
            remaining.push(FAULTS[world.random.usize(..3)]);
        }
        thread::sleep(Duration::from_secs(1));
        let fault = remaining.pop().expect("a fault");
        world.inject(fault).await;
        let done = || shared.writes_done.load(Ordering::Relaxed);
        let before = done();
        let what = format!("a write after {fault:?}");
        within(Duration::from_secs(10), &what, || done() > before);
        faults += 1;
    }
    drop(end);
    for client in clients {
        client.join().expect("a client without a failure");
    }
    println!("{faults} faults, {}", shared.verify());
}

/// The clients themselves have the fault: they compare the tag, and then write without `If-Match`.
#[tokio::test(flavor = "multi_thread")]
async fn a_tag_that_is_compared_before_the_write_is_found() {
    let service = Service::start().await;
    let shared = Shared::new([&service; 3], true);
    let end = OnDrop(|| shared.is_over.store(true, Ordering::Relaxed));
    let clients = shared.start(1);
    let done = || shared.writes_done.load(Ordering::Relaxed);
    within(Duration::from_secs(30), "200 writes", || done() > 200);
    drop(end);
    for client in clients {
        client.join().expect("a client without a failure");
    }
    let is_explained = |listing: &Arc<Listing>| is_linearizable(&listing.seen().records);
    assert!(!shared.listings().iter().all(is_explained));
}

#[test]
fn the_checker_accepts_an_unknown_write_that_was_done_late_or_never_but_no_lost_write() {
    let write = |expected, new| Write { expected, new };
    let (from_1_to_2, from_1_to_3) = (write(Some(1), Some(2)), write(Some(1), Some(3)));
    let (to_2, deletion) = (write(None, Some(2)), write(None, None));
    let read = |price| Operation::Read(Some(price));
    let (done, unknown) = (Operation::Done, Operation::Unknown);
    let refused = Operation::Refused(from_1_to_3);
    let cases: [(&[Operation], bool); _] = [
        (&[done(from_1_to_2), refused, read(2)], true),
        (&[done(from_1_to_2), read(1)], false),
        (&[done(from_1_to_2), done(from_1_to_3)], false),
        (&[refused], false),
        (&[unknown(from_1_to_2), read(1), read(2)], true),
        (&[unknown(from_1_to_2), read(2), read(1)], false),
        (&[unknown(from_1_to_2), done(from_1_to_3), read(3)], true),
        (&[unknown(from_1_to_2), done(from_1_to_3), read(2)], false),
        (&[unknown(to_2), refused], true),
        (&[unknown(to_2), read(1), read(2), read(1)], false),
        (&[unknown(deletion), read(1), Operation::Read(None)], true),
        (&[done(deletion), read(1)], false),
        (&[Operation::Read(None)], false),
        (&[read(2), unknown(to_2)], false),
    ];
    for (operations, expected) in cases {
        let operations = [&[Operation::Create(1)], operations].concat();
        let record = |operation| {
            let started = Instant::now();
            Record {
                operation,
                started,
                ended: Instant::now(),
            }
        };
        let records: Vec<_> = operations.iter().copied().map(record).collect();
        assert_eq!(is_linearizable(&records), expected, "{operations:?}");
    }
}
