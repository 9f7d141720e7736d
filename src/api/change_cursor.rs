//! The opaque cursor of the change feed: a position between two snapshots, and the epoch of the database it belongs to.
//!
//! A batch is what the newer snapshot sees and the older one does not. So a cursor misses nothing that commits late, and a long
//! transaction delays its own changes only.

use std::error::Error;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::{Buf, BufMut, BytesMut};
use sha2::{Digest, Sha256};
use tokio_postgres::types::{FromSql, IsNull, ToSql, Type, accepts, to_sql_checked};

/// A transaction number, `xid8` in PostgreSQL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Xid(pub u64);

/// Which transactions are visible: those before `end`, without those that were running.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub end: Xid,
    /// In ascending order.
    pub running: Vec<Xid>,
}

/// The server, database and timeline of a snapshot, and its position in the write-ahead log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Epoch {
    /// A hash of server, database, table and the last `restart_change_feed()`.
    pub database: i64,
    pub timeline: u32,
    /// In the write-ahead log: at or beyond every commit that the snapshot sees.
    pub position: u64,
    /// Where the last recovery of the server ended, or 0. It changes with each crash.
    pub recovered: u64,
}

impl Epoch {
    /// Whether the same server has run without a crash or a promotion between the two.
    pub fn is_same_life(&self, other: &Self) -> bool {
        let life = |epoch: &Self| (epoch.database, epoch.timeline, epoch.recovered);
        life(self) == life(other)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursor {
    /// Of the newest snapshot.
    pub epoch: Epoch,
    /// The changes that this snapshot sees were delivered. `None`: none were.
    pub seen: Option<Snapshot>,
    /// `None`: the next batch begins.
    pub batch: Option<Position>,
}

/// A position in a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    /// The batch is what this snapshot sees.
    pub until: Snapshot,
    /// Whether the batch is too large to be sorted.
    pub is_large: bool,
    pub listing_id: i32,
    pub id: i64,
}

impl Snapshot {
    /// Whether this snapshot sees everything that the other one, of the same server, sees.
    pub fn includes(&self, other: &Self) -> bool {
        let mut running = self.running.iter().take_while(|xid| **xid < other.end);
        self.end >= other.end && running.all(|xid| other.runs(*xid))
    }

    fn runs(&self, xid: Xid) -> bool {
        self.running.binary_search(&xid).is_ok()
    }

    /// The transactions that ran in the older snapshot and have ended in this one.
    pub fn ended_since(&self, older: &Self) -> Vec<Xid> {
        let mut ended = older.running.clone();
        ended.retain(|xid| !self.runs(*xid));
        ended
    }
}

/// Characters. Servers and proxies accept an address of this length.
pub const MAX_LENGTH: usize = 2000;

const KIND_HEAD: u8 = 1;
const KIND_SORTED: u8 = 2;
const KIND_LARGE: u8 = 3;
const KIND_FIRST: u8 = 4;

/// The bytes of the hash at the end, which tell a mangled cursor. Not a secret: a forged cursor reads what all may read.
const CHECK_BYTES: usize = 4;

impl Cursor {
    pub fn encode(&self) -> String {
        let mut bytes = Vec::with_capacity(128);
        bytes.push(match (&self.batch, &self.seen) {
            (None, _) => KIND_HEAD,
            (Some(_), None) => KIND_FIRST,
            (Some(position), _) if position.is_large => KIND_LARGE,
            (Some(_), _) => KIND_SORTED,
        });
        bytes.put_i64(self.epoch.database);
        put(&mut bytes, self.epoch.timeline.into());
        put(&mut bytes, self.epoch.position);
        put(&mut bytes, self.epoch.recovered);
        let until = self.batch.as_ref().map(|position| &position.until);
        let mut start = 0;
        for Snapshot { end, .. } in self.seen.iter().chain(until) {
            put(&mut bytes, end.0);
            start = end.0.max(start);
        }
        for running in running_in(self.seen.as_ref(), until) {
            put(&mut bytes, running.len() as u64);
            let mut above = start;
            // Differences of neighbours are small.
            for xid in running.iter().rev() {
                put(&mut bytes, above - xid.0);
                above = xid.0;
            }
        }
        if let Some(position) = &self.batch {
            bytes.put_i32(position.listing_id);
            bytes.put_i64(position.id);
        }
        let check = Sha256::digest(&bytes);
        bytes.extend(check.iter().take(CHECK_BYTES));
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// `None`: the text was not made by [`encode`](Self::encode).
    pub fn decode(text: &str) -> Option<Self> {
        // A forged one could name many more transactions, and take PostgreSQL long.
        if text.len() > 8 * MAX_LENGTH {
            return None;
        }
        let bytes = URL_SAFE_NO_PAD.decode(text).ok()?;
        let (mut bytes, check) = bytes.split_at_checked(bytes.len().checked_sub(CHECK_BYTES)?)?;
        if !Sha256::digest(bytes).starts_with(check) {
            return None;
        }
        let kind = bytes.try_get_u8().ok()?;
        let epoch = Epoch {
            database: bytes.try_get_i64().ok()?,
            timeline: take(&mut bytes)?.try_into().ok()?,
            position: take(&mut bytes)?,
            recovered: take(&mut bytes)?,
        };
        let (seen, until) = match kind {
            KIND_HEAD => (Some(take(&mut bytes)?), None),
            KIND_SORTED | KIND_LARGE => (Some(take(&mut bytes)?), Some(take(&mut bytes)?)),
            KIND_FIRST => (None, Some(take(&mut bytes)?)),
            _ => return None,
        };
        let start = seen.max(until)?;
        let in_seen = take_running(&mut bytes, start)?;
        let in_both = take_running(&mut bytes, start)?;
        let in_until = take_running(&mut bytes, start)?;
        let seen = match seen {
            Some(end) => Some(snapshot(end, [&in_seen, &in_both])?),
            None => None,
        };
        let batch = match until {
            Some(end) => Some(Position {
                until: snapshot(end, [&in_until, &in_both])?,
                is_large: kind != KIND_SORTED,
                listing_id: bytes.try_get_i32().ok()?,
                id: bytes.try_get_i64().ok()?,
            }),
            None => None,
        };
        bytes.is_empty().then_some(Self { epoch, seen, batch })
    }
}

/// Appends a number in groups of seven bits, the lowest first.
fn put(bytes: &mut Vec<u8>, mut number: u64) {
    loop {
        let [lowest, ..] = number.to_le_bytes();
        number >>= 7;
        if number == 0 {
            return bytes.push(lowest);
        }
        bytes.push(lowest | 0x80);
    }
}

fn take(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    // 63 bits are more than PostgreSQL ever counts.
    for shift in (0..63).step_by(7) {
        let byte = bytes.try_get_u8().ok()?;
        number |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(number);
        }
    }
    None
}

/// The transactions that run only in the first snapshot, in both, and only in the second. Most run in both, and are written once.
fn running_in(seen: Option<&Snapshot>, until: Option<&Snapshot>) -> [Vec<Xid>; 3] {
    let running = |at: Option<&Snapshot>| at.map(|at| at.running.clone()).unwrap_or_default();
    let runs = |at: Option<&Snapshot>, xid| at.is_some_and(|at| at.runs(xid));
    let (in_both, in_seen) = running(seen).iter().partition(|xid| runs(until, **xid));
    let mut in_until = running(until);
    in_until.retain(|xid| !runs(seen, *xid));
    [in_seen, in_both, in_until]
}

/// Whether PostgreSQL gives this number to a transaction. Of each four billion, it leaves out the first three.
fn is_xid(number: u64) -> bool {
    number & 0xffff_ffff >= 3
}

fn take_running(bytes: &mut &[u8], start: u64) -> Option<Vec<Xid>> {
    let count = take(bytes)?;
    let mut running = Vec::new();
    let mut above = start;
    for _ in 0..count {
        let below = take(bytes).filter(|difference| *difference > 0)?;
        above = above.checked_sub(below).filter(|xid| is_xid(*xid))?;
        running.push(Xid(above));
    }
    running.reverse();
    Some(running)
}

/// A snapshot that PostgreSQL accepts.
fn snapshot(end: u64, running: [&[Xid]; 2]) -> Option<Snapshot> {
    let mut running = running.concat();
    running.sort_unstable();
    let end = Xid(end);
    let is_ascending = running.iter().chain([&end]).is_sorted_by(|a, b| a < b);
    let is_valid = is_xid(end.0) && is_ascending;
    is_valid.then_some(Snapshot { end, running })
}

impl ToSql for Xid {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        out.put_u64(self.0);
        Ok(IsNull::No)
    }

    accepts!(XID8);
    to_sql_checked!();
}

/// PostgreSQL sends a `pg_snapshot` as the number of running transactions, the first of them or the end, the end, and the running
/// transactions.
impl ToSql for Snapshot {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        out.put_u32(self.running.len().try_into()?);
        out.put_u64(self.running.first().unwrap_or(&self.end).0);
        out.put_u64(self.end.0);
        for xid in &self.running {
            out.put_u64(xid.0);
        }
        Ok(IsNull::No)
    }

    accepts!(PG_SNAPSHOT);
    to_sql_checked!();
}

impl FromSql<'_> for Snapshot {
    fn from_sql(_: &Type, mut raw: &[u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        let count = raw.try_get_u32()?;
        let _first = raw.try_get_u64()?;
        let end = Xid(raw.try_get_u64()?);
        let running = (0..count).map(|_| Ok(Xid(raw.try_get_u64()?)));
        let running = running.collect::<Result<_, bytes::TryGetError>>()?;
        Ok(Self { end, running })
    }

    accepts!(PG_SNAPSHOT);
}

#[cfg(test)]
mod tests {
    use super::{Cursor, Epoch, Position, Snapshot, Xid};

    fn snapshot(end: u64, running: &[u64]) -> Snapshot {
        let running = running.iter().map(|xid| Xid(*xid)).collect();
        Snapshot {
            end: Xid(end),
            running,
        }
    }

    fn cursor(seen: Option<Snapshot>, batch: Option<Position>) -> Cursor {
        let epoch = Epoch {
            database: -5,
            timeline: 2,
            position: 1 << 40,
            recovered: 0,
        };
        Cursor { epoch, seen, batch }
    }

    fn position(until: Snapshot, is_large: bool) -> Position {
        Position {
            until,
            is_large,
            listing_id: -7,
            id: i64::MIN,
        }
    }

    #[test]
    fn a_forged_cursor_with_a_number_of_no_transaction_is_refused() {
        for end in [0, 2, 1 << 32, (1 << 32) + 2] {
            assert!(Cursor::decode(&cursor(Some(snapshot(end, &[])), None).encode()).is_none());
            let running = cursor(Some(snapshot(1 << 40 | 9, &[end])), None);
            assert!(Cursor::decode(&running.encode()).is_none());
        }
    }

    #[test]
    fn a_forged_cursor_with_very_many_transactions_is_refused() {
        let forged = |running: &[u64]| cursor(Some(snapshot(1_000_000, running)), None).encode();
        let many = |count| {
            (0..count)
                .map(|number| 1000 + 2 * number)
                .collect::<Vec<_>>()
        };
        assert!(Cursor::decode(&forged(&many(1000))).is_some());
        assert!(Cursor::decode(&forged(&many(45_000))).is_none());
    }

    #[test]
    fn a_cursor_is_decoded_as_it_was_encoded() {
        let (older, newer) = (
            snapshot(900, &[3, 400, 899]),
            snapshot((1 << 35) + 7, &[899]),
        );
        for cursor in [
            cursor(Some(older.clone()), None),
            cursor(Some(older.clone()), Some(position(newer.clone(), false))),
            cursor(Some(older), Some(position(newer.clone(), true))),
            cursor(None, Some(position(newer, true))),
        ] {
            assert_eq!(Cursor::decode(&cursor.encode()), Some(cursor));
        }
    }

    #[test]
    fn a_snapshot_includes_what_ended_before_it() {
        let older = snapshot(10, &[4, 8]);
        for (newer, includes) in [
            (snapshot(10, &[4, 8]), true),
            (snapshot(10, &[8]), true),
            (snapshot(12, &[4, 11]), true),
            (snapshot(12, &[5]), false),
            (snapshot(9, &[]), false),
        ] {
            assert_eq!(newer.includes(&older), includes, "{newer:?}");
        }
        assert_eq!(snapshot(12, &[8, 11]).ended_since(&older), [Xid(4)]);
    }
}
