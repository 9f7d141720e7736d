//! Kills, pauses, disconnects, promotes and restarts servers while clients record every acknowledged write. In the end the
//! database must contain all of them, and consumers of the change feed must have the present prices. `make chaos` does the
//! same for longer and prints a report.

use std::env;
use std::mem;
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;

use crate::support::{
    Cluster, History, Link, Service, free_address, require_a_standby, rows, run, synchronous_pair,
    through,
};

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

#[tokio::test(flavor = "multi_thread")]
async fn every_acknowledged_write_survives_every_fault() {
    let given = |name| env::var(name).ok().map(|value| value.parse().expect(name));
    let seed = given("CHAOS_SEED").unwrap_or_else(|| fastrand::u64(..1_000_000));
    let duration = Duration::from_secs(given("CHAOS_SECONDS").unwrap_or(8));
    // Printed if the test fails.
    println!("CHAOS_SEED={seed} repeats the choices of this run");
    let mut world = World::new(Rng::with_seed(seed)).await;
    let addresses = world.instances.iter();
    let addresses: Vec<_> = addresses.map(|it| it.address.clone()).collect();
    let mut history = History::record(&addresses, seed);
    let mut remaining = Vec::new();
    thread::sleep(Duration::from_secs(1));
    // The first fault is a failover, so that the shortest run has one.
    let mut fault = FAULTS[world.random.usize(..3)];
    while history.begun.elapsed() < duration {
        let injected = Instant::now();
        world.inject(fault).await;
        history.recovered(&format!("{fault:?}"), injected, Duration::from_secs(10));
        if remaining.is_empty() {
            remaining = FAULTS.to_vec();
            world.random.shuffle(&mut remaining);
        }
        fault = remaining.pop().expect("a fault");
    }
    history.verify(&world.primary.superuser().await).await;
}
