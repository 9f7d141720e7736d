//! A consumer of the change feed that mirrors all present prices through every failure of servers and instances.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::Value;

use super::Connection;

/// What a consumer has in the end.
pub struct Mirrored {
    pub prices: BTreeMap<i64, i64>,
    /// The price of every change by its listing and id, since it last began anew. No price: a deletion.
    pub seen: BTreeMap<(i64, i64), Option<i64>>,
    /// How often its cursor became invalid.
    pub restarts: usize,
}

#[derive(Default)]
pub struct Mirror {
    instances: Vec<String>,
    /// Whether to read events, or else pages.
    by_events: bool,
    cursor: Option<String>,
    /// The price of every change by its listing and id, and of the last change of each listing. No price: a deletion.
    seen: BTreeMap<(i64, i64), Option<i64>>,
    prices: BTreeMap<i64, Option<i64>>,
    restarts: usize,
}

impl Mirror {
    pub fn new(instances: Vec<String>, by_events: bool) -> Self {
        Self {
            instances,
            by_events,
            ..Self::default()
        }
    }

    /// Reads until the end and then what is left.
    pub fn follow(mut self, ended: &AtomicBool) -> Mirrored {
        for turn in 0.. {
            let is_last = ended.load(Ordering::Relaxed);
            let instance = self.instances[turn % self.instances.len()].clone();
            let read = if self.by_events {
                self.read_events(&instance, is_last)
            } else {
                self.read_page(&instance)
            };
            match read {
                Ok(true) if is_last => break,
                Ok(_) => (),
                Err(_) => thread::sleep(Duration::from_millis(20)),
            }
        }
        let prices = self.prices.into_iter();
        let present = prices.filter_map(|(listing, price)| Some((listing, price?)));
        Mirrored {
            prices: present.collect(),
            seen: self.seen,
            restarts: self.restarts,
        }
    }

    /// Whether there is nothing more yet.
    fn read_page(&mut self, instance: &str) -> io::Result<bool> {
        let after = self
            .cursor
            .as_ref()
            .map(|cursor| format!("&after={cursor}"));
        let path = format!("/changes?wait=1{}", after.unwrap_or_default());
        let page = Connection::try_to(instance)?.try_send("GET", &path, "", b"")?;
        self.check(page.status)?;
        let link = page.header("link").expect("a link");
        let (_, cursor) = link.split_once("after=").expect("a cursor");
        self.cursor = cursor.split_once('>').map(|(cursor, _)| cursor.to_owned());
        let changes = page.json();
        let changes = changes.as_array().expect("an array");
        for change in changes {
            self.receive(change);
        }
        Ok(changes.is_empty())
    }

    /// The last time, ends at the first id without a change, which says that there is nothing more.
    fn read_events(&mut self, instance: &str, is_last: bool) -> io::Result<bool> {
        let mut stream = TcpStream::connect(instance)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let after = self
            .cursor
            .as_ref()
            .map(|cursor| format!("last-event-id: {cursor}\r\n"));
        let after = after.unwrap_or_default();
        write!(
            stream,
            "GET /changes HTTP/1.1\r\nhost: x\r\naccept: text/event-stream\r\n{after}\r\n"
        )?;
        let mut lines = BufReader::new(stream).lines();
        let status = lines.next().ok_or(io::ErrorKind::UnexpectedEof)??;
        self.check(status[9..12].parse().expect("a status"))?;
        let (mut id, mut change) = (None, None);
        for line in lines {
            let line = line?;
            if let Some(cursor) = line.strip_prefix("id: ") {
                id = Some(cursor.to_owned());
            } else if let Some(data) = line.strip_prefix("data: ") {
                change = Some(serde_json::from_str(data).expect("JSON"));
            } else if line.is_empty() && id.is_some() {
                self.cursor = id.take();
                match change.take() {
                    Some(change) => self.receive(&change),
                    None if is_last => return Ok(true),
                    None => (),
                }
            }
        }
        Err(io::ErrorKind::UnexpectedEof.into())
    }

    /// Begins anew if the cursor has become invalid.
    fn check(&mut self, status: u16) -> io::Result<()> {
        match status {
            200 => return Ok(()),
            410 => {
                self.cursor = None;
                self.seen.clear();
                self.prices.clear();
                self.restarts += 1;
            }
            _ => assert_eq!(status, 503),
        }
        Err(io::ErrorKind::Interrupted.into())
    }

    fn receive(&mut self, change: &Value) {
        let number = |field: &str| change[field].as_i64();
        let listing = number("listing_id").expect("a listing");
        let id = number("id").expect("an id");
        let later = (listing, id + 1)..=(listing, i64::MAX);
        let is_late = self.seen.range(later).next().is_some();
        let price = number("price_eur");
        let before = self.seen.insert((listing, id), price);
        assert!(before.is_none_or(|before| before == price), "{change}");
        assert!(before.is_some() || !is_late, "{change} after a later one");
        if !is_late {
            self.prices.insert(listing, price);
        }
    }
}
