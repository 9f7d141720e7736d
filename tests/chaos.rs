//! Servers are killed, paused, cut off, promoted and restarted, while clients write down what they were promised. In the end
//! the database has to hold every word of it. `make chaos` does the same for longer and prints what happened.

use std::collections::{BTreeMap, HashMap};
use std::env;
use std::io::ErrorKind;
use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use serde_json::json;

use crate::failover::{insist_on_a_standby, pair};
use crate::harness::{Cluster, Database, assert_no_problem, rows, run};
use crate::outage::{Finally, Link, ask, over};
use crate::rollout::free_address;
use crate::service::{JSON, LOFT, Service};

const WRITERS: u64 = 6;
const READERS: u64 = 2;

/// What a client was told of a write: that it is done, or nothing that it could rely on.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Told {
    Done,
    Nothing,
}

/// All that one client asked for one listing, which nobody else writes.
struct Tale {
    name: String,
    id: Option<i64>,
    /// The first one from its creation. No two prices of a run are the same.
    prices: Vec<(i64, Told)>,
    deleted: Option<Told>,
    etag: Option<String>,
}

/// A request as its client saw it.
struct Sight {
    at: Instant,
    write: bool,
    served: bool,
}

#[derive(Default)]
struct Shared {
    done: AtomicBool,
    sights: Mutex<Vec<Sight>>,
}

struct Client {
    number: i64,
    random: Rng,
    instances: Vec<String>,
    tales: Vec<Tale>,
    last_price: i64,
    shared: Arc<Shared>,
}

impl Client {
    fn run(mut self) -> Vec<Tale> {
        while !self.shared.done.load(Ordering::Relaxed) {
            let alive = |tale: &Tale| tale.id.is_some() && tale.deleted.is_none();
            let alive: Vec<_> = (0..self.tales.len())
                .filter(|tale| alive(&self.tales[*tale]))
                .collect();
            match (self.random.u8(..100), self.random.choice(alive)) {
                (20..80, Some(tale)) => self.reprice(tale),
                (80..95, Some(tale)) => self.read(tale),
                (95.., Some(tale)) => self.delete(tale),
                _ => self.create(),
            }
        }
        self.tales
    }

    /// Looks at what others write, so that there are reads also while every writer waits.
    fn look_on(mut self) -> Vec<Tale> {
        while !self.shared.done.load(Ordering::Relaxed) {
            if let Some(reply) = self.ask("GET", "/listings?limit=1", "", "") {
                assert_eq!(reply.status, 200, "{reply:?}");
            }
        }
        self.tales
    }

    fn next_price(&mut self) -> i64 {
        self.last_price += 1;
        self.number * 1_000_000 + self.last_price
    }

    /// The answer of any of the instances, unless it is no answer.
    fn ask(
        &mut self,
        method: &str,
        path: &str,
        headers: &str,
        body: &str,
    ) -> Option<crate::outage::Reply> {
        let instance = self.random.usize(..self.instances.len());
        let reply = ask(&self.instances[instance], method, path, headers, body);
        let served = reply.as_ref().is_ok_and(|reply| reply.status < 500);
        // An instance that is not there is found out by a proxy, before it would send anything.
        let refused = reply
            .as_ref()
            .is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused);
        if refused {
            thread::sleep(Duration::from_millis(10));
        } else {
            let sight = Sight {
                at: Instant::now(),
                write: method != "GET",
                served,
            };
            self.shared.sights.lock().expect("a lock").push(sight);
        }
        if let Ok(reply) = &reply
            && reply.status == 503
        {
            assert_eq!(reply.header("retry-after"), Some("1"));
        }
        reply.ok().filter(|_| served)
    }

    fn create(&mut self) {
        let price = self.next_price();
        let name = format!("client {} price {price}", self.number);
        let mut listing: serde_json::Value = serde_json::from_str(LOFT).expect("a listing");
        listing["name"] = json!(name);
        listing["latest_price_eur"] = json!(price);
        let reply = self.ask("POST", "/listings", JSON, &listing.to_string());
        let told = reply.as_ref().map_or(Told::Nothing, |_| Told::Done);
        self.tales.push(Tale {
            name,
            id: reply.as_ref().map(|reply| {
                assert_eq!(reply.status, 201, "{reply:?}");
                reply.json()["id"].as_i64().expect("an id")
            }),
            prices: vec![(price, told)],
            deleted: None,
            etag: reply.and_then(|reply| reply.header("etag").map(str::to_owned)),
        });
    }

    fn path(&self, tale: usize) -> String {
        format!("/listings/{}", self.tales[tale].id.expect("an id"))
    }

    fn reprice(&mut self, tale: usize) {
        let price = self.next_price();
        let body = format!("{{\"latest_price_eur\":{price}}}");
        let reply = self.ask("PATCH", &self.path(tale), JSON, &body);
        let told = reply.as_ref().map_or(Told::Nothing, |reply| {
            assert_eq!(
                (reply.status, reply.json()["latest_price_eur"].as_i64()),
                (200, Some(price)),
                "{reply:?}"
            );
            Told::Done
        });
        let tale = &mut self.tales[tale];
        tale.prices.push((price, told));
        tale.etag = reply.and_then(|reply| reply.header("etag").map(str::to_owned));
    }

    /// What it was told last is still so, or became another price that it once asked for in vain.
    fn read(&mut self, tale: usize) {
        let Some(etag) = self.tales[tale].etag.clone() else {
            return;
        };
        let seen = format!("if-none-match: {etag}\r\n");
        if let Some(reply) = self.ask("GET", &self.path(tale), &seen, "") {
            let price = reply.json()["latest_price_eur"].as_i64();
            let late = self.tales[tale]
                .prices
                .iter()
                .any(|asked| Some(asked.0) == price && asked.1 == Told::Nothing);
            assert!(
                reply.status == 304 || late,
                "{etag} of {:?}: {reply:?}",
                self.tales[tale].prices.last()
            );
        }
    }

    fn delete(&mut self, tale: usize) {
        let reply = self.ask("DELETE", &self.path(tale), "", "");
        self.tales[tale].deleted = Some(reply.map_or(Told::Nothing, |reply| {
            assert_eq!(reply.status, 204, "{reply:?}");
            Told::Done
        }));
    }
}

/// What is done to the servers.
#[derive(Clone, Copy, Debug)]
enum Blow {
    EndSessions,
    RestartPrimary,
    KillPrimary,
    PausePrimary,
    CutOffPrimary,
    KillStandby,
    RestartInstance,
    KillInstance,
    KillAndPromote,
    PauseAndPromote,
    CutOffAndPromote,
}

const BLOWS: [Blow; 11] = [
    Blow::KillAndPromote,
    Blow::PauseAndPromote,
    Blow::CutOffAndPromote,
    Blow::EndSessions,
    Blow::RestartPrimary,
    Blow::KillPrimary,
    Blow::PausePrimary,
    Blow::CutOffPrimary,
    Blow::KillStandby,
    Blow::RestartInstance,
    Blow::KillInstance,
];

struct World {
    random: Rng,
    primary: Cluster,
    standby: Cluster,
    /// To the primary, and to the standby.
    links: [Link; 2],
    instances: Vec<Service>,
    read_url: String,
    url: String,
}

impl World {
    async fn new(random: Rng) -> Self {
        let (primary, standby) = pair().await;
        let links = [Link::to(&primary), Link::to(&standby)];
        let url = over(&primary, &[&links[0].address, &links[1].address]);
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
            let instance = world.instance(&free_address()).await;
            world.instances.push(instance);
        }
        world
    }

    async fn instance(&self, address: &str) -> Service {
        let settings = [
            ("DATABASE_READ_URL", &*self.read_url),
            ("LISTEN_ADDR", address),
        ];
        Service::start_at(&self.url, Database::empty().await, &settings)
    }

    fn some_seconds(&mut self) {
        thread::sleep(Duration::from_millis(self.random.u64(200..3500)));
    }

    async fn strike(&mut self, blow: Blow) {
        match blow {
            Blow::EndSessions => {
                let end = "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'listing-api'";
                run(&self.primary.superuser().await, end).await;
            }
            Blow::RestartPrimary => {
                self.primary.call("stop");
                self.primary.call("up");
            }
            Blow::KillPrimary => {
                self.primary.kill();
                self.primary.call("up");
            }
            Blow::PausePrimary => {
                self.primary.signal("-STOP");
                self.some_seconds();
                self.primary.signal("-CONT");
            }
            Blow::CutOffPrimary => {
                self.links[0].cut(true);
                self.some_seconds();
                self.links[0].cut(false);
            }
            Blow::KillStandby => {
                self.standby.kill();
                self.some_seconds();
                self.standby.call("up");
            }
            Blow::RestartInstance => {
                let mut instance = self.take_instance();
                instance.signal("-TERM");
                assert_eq!(instance.wait(), Some(0));
                self.replace(&instance).await;
            }
            Blow::KillInstance => {
                let mut instance = self.take_instance();
                instance.signal("-KILL");
                assert_eq!(instance.wait(), None);
                self.replace(&instance).await;
            }
            Blow::KillAndPromote => {
                self.primary.kill();
                self.promote().await;
            }
            Blow::PauseAndPromote => {
                self.primary.signal("-STOP");
                self.standby.call("promote");
                // Whoever promotes sees to it that the former primary stays out.
                self.primary.kill();
                self.promote().await;
            }
            Blow::CutOffAndPromote => {
                self.links[0].cut(true);
                self.standby.call("promote");
                self.primary.kill();
                self.links[0].cut(false);
                self.promote().await;
            }
        }
        insist_on_a_standby(&self.primary).await;
    }

    /// The standby becomes the primary, and the former primary is made anew as its standby.
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

    async fn replace(&mut self, instance: &Service) {
        let instance = self.instance(&instance.address).await;
        self.instances.push(instance);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_promise_is_kept_whatever_happens_to_the_servers() {
    let given = |name| env::var(name).ok().map(|value| value.parse().expect(name));
    let seed = given("CHAOS_SEED").unwrap_or_else(|| fastrand::u64(..1_000_000));
    let duration = Duration::from_secs(given("CHAOS_SECONDS").unwrap_or(8));
    // Shown where it fails.
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
                tales: Vec::new(),
                last_price: 0,
                shared: shared.clone(),
            };
            thread::spawn(move || {
                if number > WRITERS {
                    client.look_on()
                } else {
                    client.run()
                }
            })
        })
        .collect();
    let end = Finally(|| shared.done.store(true, Ordering::Relaxed));

    let mut blows = Vec::new();
    let mut deck = Vec::new();
    thread::sleep(Duration::from_secs(1));
    while begun.elapsed() < duration {
        if deck.is_empty() {
            deck = BLOWS.to_vec();
            world.random.shuffle(&mut deck);
        }
        // One of the three promotions first, so that the shortest run has one.
        let blow = if blows.is_empty() {
            BLOWS[world.random.usize(..3)]
        } else {
            deck.pop().expect("a blow")
        };
        let struck = Instant::now();
        world.strike(blow).await;
        let recovered = Instant::now();
        let served = || {
            let sights = shared.sights.lock().expect("a lock");
            sights
                .iter()
                .rev()
                .take_while(|sight| sight.at > recovered)
                .any(|sight| sight.write && sight.served)
        };
        while !served() {
            assert!(
                recovered.elapsed() < Duration::from_secs(10),
                "no write is served after {blow:?}"
            );
            thread::sleep(Duration::from_millis(10));
        }
        thread::sleep(Duration::from_secs(1));
        blows.push((blow, struck, Instant::now()));
    }
    drop(end);
    let tales: Vec<_> = clients
        .into_iter()
        .flat_map(|client| client.join().expect("a client without objections"))
        .collect();

    let superuser = world.primary.superuser().await;
    assert_no_problem(&superuser).await;
    let text = rows(&superuser, "select id, name, price::bigint from listing").await;
    let mut listings: BTreeMap<i64, (String, i64)> = BTreeMap::new();
    for row in &text {
        let fields: Vec<_> = row.split('|').collect();
        listings.insert(number(fields[0]), (fields[1].to_owned(), number(fields[2])));
    }
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
    println!("{}", verify(&tales, listings, histories));
    println!("{}", shared.report(begun, &blows));
}

fn number(text: &str) -> i64 {
    text.parse().expect("a number")
}

/// Holds what clients were told against what there is. What it found, in figures.
fn verify(
    tales: &[Tale],
    mut listings: BTreeMap<i64, (String, i64)>,
    mut histories: HashMap<i64, Vec<i64>>,
) -> String {
    let (mut promised, mut done, mut not_done) = (0, 0, 0);
    let mut unpromised = |is: bool| if is { done += 1 } else { not_done += 1 };
    for tale in tales {
        let by_name = listings
            .iter()
            .find(|(_, (name, _))| *name == tale.name)
            .map(|(id, _)| *id);
        let id = tale.id.or(by_name);
        let listing = id.and_then(|id| listings.remove(&id));
        let history = id.and_then(|id| histories.remove(&id));
        assert_eq!(
            listing.is_some(),
            history.is_some(),
            "half of {}",
            tale.name
        );
        match (tale.prices[0].1, tale.deleted) {
            (Told::Done, None) => assert!(listing.is_some(), "{} is lost", tale.name),
            (_, Some(Told::Done)) => assert!(listing.is_none(), "{} is back", tale.name),
            (_, Some(Told::Nothing)) => unpromised(listing.is_none()),
            (Told::Nothing, None) => unpromised(listing.is_some()),
        }
        promised += usize::from(tale.prices[0].1 == Told::Done)
            + usize::from(tale.deleted == Some(Told::Done));
        let (Some((_, price)), Some(history)) = (listing, history) else {
            // Their log went with them.
            continue;
        };
        assert_eq!(
            (history.first(), history.last()),
            (Some(&tale.prices[0].0), Some(&price)),
            "{}",
            tale.name
        );
        for (price, told) in &tale.prices[1..] {
            let times = history.iter().filter(|logged| *logged == price).count();
            match told {
                Told::Done => {
                    assert_eq!(times, 1, "{price} of {}: {history:?}", tale.name);
                    promised += 1;
                }
                Told::Nothing => {
                    assert!(times <= 1, "{price} of {}: {history:?}", tale.name);
                    unpromised(times == 1);
                }
            }
        }
        let told_done = |price: &&i64| {
            tale.prices
                .iter()
                .any(|asked| asked.0 == **price && asked.1 == Told::Done)
        };
        let in_order: Vec<_> = history.iter().filter(told_done).copied().collect();
        let promised: Vec<_> = tale
            .prices
            .iter()
            .filter(|asked| asked.1 == Told::Done)
            .map(|asked| asked.0)
            .collect();
        assert_eq!(in_order, promised, "{}", tale.name);
        let asked = |price: &i64| tale.prices.iter().any(|asked| asked.0 == *price);
        assert!(
            history.iter().all(asked),
            "a price that nobody asked for: {history:?}"
        );
    }
    assert!(
        listings.is_empty() && histories.is_empty(),
        "nobody asked for {listings:?} {histories:?}"
    );
    assert!(promised > 50, "{promised}");
    format!(
        "{promised} acknowledged writes, but for prices of listings that are gone: all there, each price once and in order, no problem in listing_price_log_problem\n\
         {} were answered 5xx or not at all: {done} done, {not_done} not, none by half",
        done + not_done
    )
}

impl Shared {
    /// What clients saw of each blow: the longest time without a write that was served, and without a read.
    fn report(&self, begun: Instant, blows: &[(Blow, Instant, Instant)]) -> String {
        let sights = self.sights.lock().expect("a lock");
        let longest = |write: bool, from: Instant, to: Instant| {
            let served = sights
                .iter()
                .filter(|sight| sight.write == write && sight.served);
            let within = |at: &Instant| from <= *at && *at <= to;
            let at = served.map(|sight| sight.at).filter(within);
            let mut at: Vec<_> = at.chain([from, to]).collect();
            at.sort();
            let gaps = at.windows(2).map(|pair| pair[1] - pair[0]);
            gaps.max().unwrap_or_default().as_secs_f64()
        };
        let lines = blows.iter().map(|(blow, from, to)| {
            let at = (*from - begun).as_secs_f64();
            let blow = format!("{blow:?}");
            let (writes, reads) = (longest(true, *from, *to), longest(false, *from, *to));
            format!("{at:6.1} | {blow:<16} | {writes:10.2} | {reads:9.2}")
        });
        let lines: Vec<_> = lines.collect();
        let served = sights.iter().filter(|sight| sight.served).count();
        format!(
            "  at s | what             | no write s | no read s\n{}\n{served} requests served and {} failed in {} s",
            lines.join("\n"),
            sights.len() - served,
            begun.elapsed().as_secs()
        )
    }
}
