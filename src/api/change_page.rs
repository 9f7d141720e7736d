//! A page of the change feed: how the database is read, and a page as JSON and as events.

use std::fmt::Write;
use std::sync::OnceLock;

use bytes::Bytes;
use serde::Serialize;
use tokio_postgres::Row;

use super::change_cursor::{Cursor, Epoch, MAX_LENGTH, Position, Snapshot, Xid};
use crate::http::error::ApiError;
use crate::postgres::{Error, Parameters};
use crate::types::euros::Euros;
use crate::types::timestamp::Timestamp;

/// The present snapshot, and the position of the write-ahead log after it. No row on a standby, whose snapshot does not list the
/// running transactions.
const SELECT_HEAD: &str = "select pg_current_snapshot() as snapshot, \
    hashtextextended(concat_ws(' ', system_identifier, pg_database.oid, 'public.listing_price_log'::regclass::oid, \
        public.change_feed_epoch()), 0) as database, \
    ('x' || left(pg_walfile_name(position), 8))::bit(32)::bigint as timeline, (position - '0/0')::bigint as position, \
    (pg_last_wal_replay_lsn() - '0/0')::bigint as recovered, pg_last_wal_receive_lsn() is not null as was_standby \
    from pg_control_system(), pg_database, \
        (select case when not pg_is_in_recovery() then pg_current_wal_insert_lsn() end as position) as wal \
    where datname = current_database() and position is not null";

/// The rows of both tables, with the same columns.
macro_rules! changes {
    ($condition:literal, $order:literal) => {
        concat!(
            "(select listing_id, id, old_price, new_price, changed_at, xact_id from public.listing_price_log where ",
            $condition,
            " order by ",
            $order,
            ") union all (select listing_id, id, last_price, null, deleted_at, xact_id from public.listing_deletion where ",
            $condition,
            " order by ",
            $order,
            ")"
        )
    };
}

/// A batch with at most [`MAX_SORTED`] rows, found by their transactions. `size` is that of the batch.
///
/// A row is returned even if no change is found, unless the server is a standby, which may lack some.
const SELECT_SORTED: &str = concat!(
    "with batch as materialized (select change.* from unnest($1::xid8[], $2::xid8[]) as visible (first, last) \
        cross join lateral (",
    changes!("xact_id between visible.first and visible.last", "xact_id"),
    ") as change limit 5001) \
    select whole.size, page.listing_id is not null as is_change, page.* \
    from (select count(*) as size from batch having not pg_is_in_recovery()) as whole \
    left join (select listing_id, id, old_price, new_price, changed_at from batch \
        where (listing_id, id) > ($3, $4) order by listing_id, id limit $5) as page on true \
    order by page.listing_id, page.id"
);

/// About what can be sorted for each page in 5 ms.
const MAX_SORTED: i64 = 5000;

/// The next changes of a large batch, among the next 10,000 rows by the primary keys. That bounds the time of a page, however few
/// of the rows belong to the batch. If a page is short because of it, the last of the rows is returned too, as no change.
const SELECT_LARGE: &str = concat!(
    "with changes as materialized (select listing_id, id, old_price, new_price, changed_at from (",
    changes!("(listing_id, id) > ($1, $2)", "listing_id, id"),
    " order by listing_id, id limit 10000) as examined \
        where ($3::pg_snapshot is null or not pg_visible_in_snapshot(xact_id, $3)) and pg_visible_in_snapshot(xact_id, $4) \
        limit $5), \
    last as (select listing_id, id from (\
            (select listing_id, id from public.listing_price_log where (listing_id, id) > ($1, $2) order by listing_id, id) \
            union all (select listing_id, id from public.listing_deletion where (listing_id, id) > ($1, $2) order by listing_id, id) \
            order by listing_id, id offset 9999 limit 1) as examined \
        where (select count(*) from changes) < $5) \
    select page.* from (select where not pg_is_in_recovery()) as server left join (\
        select true as is_change, changes.* from changes \
        union all select false, listing_id, id, null, null, null from last) as page on true \
    order by page.listing_id, page.id, page.is_change desc"
);

/// The most changes of a page, and of a poll.
pub const MAX_PAGE: i64 = 1000;

/// Every statement of the feed, with a request that runs it.
pub fn statements() -> impl Iterator<Item = (&'static str, String)> {
    let statements = [SELECT_HEAD, SELECT_SORTED, SELECT_LARGE];
    statements
        .map(|sql| ("GET /changes", sql.to_owned()))
        .into_iter()
}

/// The newest changes that can be read.
#[derive(Clone)]
pub struct Head {
    pub snapshot: Snapshot,
    pub epoch: Epoch,
    /// Whether the server was a standby before it became the primary.
    pub was_standby: bool,
}

impl Head {
    pub async fn read(
        read: impl AsyncFn(&str, Parameters) -> Result<Vec<Row>, Error>,
    ) -> Result<Self, ApiError> {
        let rows = read(SELECT_HEAD, &[]).await?;
        let row = rows.first().ok_or_else(is_standby)?;
        let unsigned = |column| {
            let value: Option<i64> = row.try_get(column)?;
            u64::try_from(value.unwrap_or_default()).map_err(ApiError::internal)
        };
        Ok(Self {
            snapshot: row.try_get("snapshot")?,
            epoch: Epoch {
                database: row.try_get("database")?,
                timeline: unsigned("timeline")?
                    .try_into()
                    .map_err(ApiError::internal)?,
                position: unsigned("position")?,
                recovered: unsigned("recovered")?,
            },
            was_standby: row.try_get("was_standby")?,
        })
    }

    /// The cursor behind all changes so far.
    pub fn cursor(&self) -> Cursor {
        Cursor {
            epoch: self.epoch.clone(),
            seen: Some(self.snapshot.clone()),
            batch: None,
        }
    }
}

fn is_standby() -> ApiError {
    Error::unavailable("the database is read-only").into()
}

pub struct Change {
    listing_id: i32,
    id: i64,
    is_deletion: bool,
    pub json: String,
}

#[derive(Serialize)]
struct Json {
    listing_id: i32,
    id: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    price_eur: Option<Euros>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    deleted: bool,
    previous_price_eur: Option<Euros>,
    created_date: Timestamp,
}

impl Change {
    fn of(row: &Row) -> Result<Self, ApiError> {
        let price_eur = row.try_get("new_price")?;
        let change = Json {
            listing_id: row.try_get("listing_id")?,
            id: row.try_get("id")?,
            price_eur,
            deleted: price_eur.is_none(),
            previous_price_eur: row.try_get("old_price")?,
            created_date: row.try_get("changed_at")?,
        };
        Ok(Self {
            json: serde_json::to_string(&change).map_err(ApiError::internal)?,
            listing_id: change.listing_id,
            id: change.id,
            is_deletion: change.deleted,
        })
    }
}

/// Some changes of one batch. It can be short, or even empty, before the end of the batch.
pub struct Page {
    pub changes: Vec<Change>,
    /// The cursor behind the last change.
    pub next: Cursor,
    /// A cursor in the batch.
    batch: Cursor,
    /// Rendered once, for all listeners.
    events: OnceLock<Bytes>,
}

impl Page {
    /// The page after a cursor. If its batch has ended, the next one ends at the head.
    pub async fn read(
        read: impl AsyncFn(&str, Parameters) -> Result<Vec<Row>, Error>,
        cursor: &Cursor,
        head: &Head,
        limit: i64,
    ) -> Result<Self, ApiError> {
        let mut page = Self {
            changes: Vec::new(),
            next: cursor.clone(),
            batch: cursor.clone(),
            events: OnceLock::new(),
        };
        let mut position = if let Some(position) = &cursor.batch {
            position.clone()
        } else if let Some(position) = next_batch(cursor.seen.as_ref(), head) {
            page.batch.epoch = head.epoch.clone();
            position
        } else {
            // Otherwise an idle client would keep the epoch of a former primary.
            if !cursor.epoch.is_same_life(&head.epoch) {
                page.next.epoch = head.epoch.clone();
            }
            return Ok(page);
        };
        // The extra row tells whether the batch has more.
        let limit = limit + 1;
        let (listing_id, id) = (position.listing_id, position.id);
        let seen = cursor.seen.as_ref();
        let sorted = match seen {
            Some(seen) if !position.is_large => {
                let (first, last) = between(seen, &position.until);
                let values: Parameters = &[&first, &last, &listing_id, &id, &limit];
                let rows = read(SELECT_SORTED, values).await?;
                // The first page of a batch shows its size.
                let size: i64 = rows.first().ok_or_else(is_standby)?.try_get("size")?;
                (size <= MAX_SORTED).then_some(rows)
            }
            _ => None,
        };
        position.is_large = sorted.is_none();
        let rows = if let Some(rows) = sorted {
            rows
        } else {
            let values: Parameters = &[&listing_id, &id, &seen, &position.until, &limit];
            read(SELECT_LARGE, values).await?
        };
        let mut more = false;
        if let Some(last) = rows.last().filter(|_| position.is_large) {
            more = last.try_get::<_, Option<bool>>("is_change")? == Some(false);
            if more {
                (position.listing_id, position.id) =
                    (last.try_get("listing_id")?, last.try_get("id")?);
            }
        } else if rows.is_empty() {
            return Err(is_standby());
        }
        for row in &rows {
            let is_change: Option<bool> = row.try_get("is_change")?;
            if is_change == Some(true) {
                page.changes.push(Change::of(row)?);
            }
        }
        if i64::try_from(page.changes.len()) == Ok(limit) {
            page.changes.pop();
            more = true;
            if let Some(last) = page.changes.last() {
                (position.listing_id, position.id) = (last.listing_id, last.id);
            }
        }
        page.batch.batch = Some(position.clone());
        page.next = page.batch.clone();
        if !more {
            let seen = position.until;
            page.next.batch = next_batch(Some(&seen), head);
            if page.next.batch.is_some() {
                page.next.epoch = head.epoch.clone();
            }
            page.next.seen = Some(seen);
        }
        Ok(page)
    }

    /// The first changes, with the cursor behind them.
    pub fn first(&self, limit: i64) -> (&[Change], Cursor) {
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        match self.changes.get(..limit) {
            Some(changes) if changes.len() < self.changes.len() => {
                let mut next = self.batch.clone();
                if let (Some(position), Some(last)) = (&mut next.batch, changes.last()) {
                    (position.listing_id, position.id) = (last.listing_id, last.id);
                }
                (changes, next)
            }
            _ => (&self.changes, self.next.clone()),
        }
    }

    /// The changes as server-sent events, with the cursor behind each. If cursors are long, only some events have one, so that a
    /// cursor has at most twice the bytes of the changes before it.
    pub fn events(&self) -> Bytes {
        let render = || {
            let mut text = String::with_capacity(self.changes.len() * 300);
            let mut cursor = self.batch.clone();
            let id_length = self.next.encode().len().max(cursor.encode().len());
            let mut without_id = 0;
            for (index, change) in self.changes.iter().enumerate() {
                if let Some(position) = &mut cursor.batch {
                    (position.listing_id, position.id) = (change.listing_id, change.id);
                }
                let is_last = index + 1 == self.changes.len();
                without_id += change.json.len();
                if is_last || without_id * 2 >= id_length {
                    without_id = 0;
                    let id = if is_last { &self.next } else { &cursor }.encode();
                    text.extend(["id: ", &id, "\n"]);
                }
                let event = if change.is_deletion {
                    "deletion"
                } else {
                    "price"
                };
                // Writing to a string cannot fail.
                let _ = write!(text, "event: {event}\ndata: {}\n\n", change.json);
            }
            text.into()
        };
        self.events.get_or_init(render).clone()
    }
}

/// The batch after a snapshot that was seen. `None`: the head has nothing more.
fn next_batch(seen: Option<&Snapshot>, head: &Head) -> Option<Position> {
    let begin = |until| Position {
        until,
        is_large: false,
        listing_id: i32::MIN,
        id: i64::MIN,
    };
    let whole = begin(head.snapshot.clone());
    let Some(seen) = seen else {
        return Some(whole);
    };
    if seen.includes(&head.snapshot) {
        return None;
    }
    let mut running = head.snapshot.running.clone();
    running.retain(|xid| *xid < seen.end);
    let mut cursor = head.cursor();
    cursor.seen = Some(seen.clone());
    cursor.batch = Some(whole);
    // The two snapshots can have so much apart that the cursor gets too long. Then the transactions that ran in the older one
    // and have ended are a batch of their own. After it, nothing that runs is in the older one alone.
    if running.len() < seen.running.len() && cursor.encode().len() > MAX_LENGTH {
        let end = seen.end;
        return Some(begin(Snapshot { end, running }));
    }
    cursor.batch
}

/// The first and last transactions of each range that one snapshot sees and an older one does not.
fn between(seen: &Snapshot, until: &Snapshot) -> (Vec<Xid>, Vec<Xid>) {
    let mut first = until.ended_since(seen);
    let mut last = first.clone();
    let mut start = seen.end;
    for end in until
        .running
        .iter()
        .chain([&until.end])
        .filter(|xid| **xid >= seen.end)
    {
        if start < *end {
            first.push(start);
            last.push(Xid(end.0 - 1));
        }
        start = Xid(end.0 + 1);
    }
    (first, last)
}

#[cfg(test)]
mod tests {
    use std::iter;
    use std::sync::OnceLock;

    use super::{Change, Cursor, Epoch, Head, Page, Position, Snapshot, Xid, between, next_batch};

    /// Below 2^31, the most that PostgreSQL allows between a running transaction and the next one.
    const FAR: u64 = 2_140_000_000;

    /// A snapshot with 300 running transactions before its end.
    fn snapshot(end: u64, gap: impl FnMut() -> u64) -> Snapshot {
        let mut above = end;
        let below = iter::repeat_with(gap).map(|gap| {
            above -= gap;
            Xid(above)
        });
        let mut running: Vec<_> = below.take(300).collect();
        running.reverse();
        let end = Xid(end);
        Snapshot { end, running }
    }

    /// The batches from one snapshot to another. Asserts that each cursor is short, and that they have every transaction once.
    fn batches(seen: &Snapshot, until: &Snapshot) -> Vec<Snapshot> {
        let head = Head {
            snapshot: until.clone(),
            epoch: Epoch {
                database: -1,
                timeline: u32::MAX,
                position: 1 << 62,
                recovered: 1 << 62,
            },
            was_standby: false,
        };
        let mut batches = Vec::new();
        let (mut seen, mut found) = (seen.clone(), Vec::new());
        let expected = between(&seen, until);
        while let Some(position) = next_batch(Some(&seen), &head) {
            let until = position.until.clone();
            let cursor = Cursor {
                epoch: head.epoch.clone(),
                seen: Some(seen.clone()),
                batch: Some(position),
            };
            let text = cursor.encode();
            assert!(text.len() <= 2000, "{}", text.len());
            assert_eq!(Cursor::decode(&text), Some(cursor));
            let (first, last) = between(&seen, &until);
            found.extend(first.into_iter().zip(last));
            seen = until.clone();
            batches.push(until);
        }
        assert_eq!(found, iter::zip(expected.0, expected.1).collect::<Vec<_>>());
        assert_eq!(batches.last(), Some(until));
        batches
    }

    #[test]
    fn a_cursor_is_short_with_300_running_transactions_however_far_apart_they_are() {
        let mut random = 1_u64;
        let mut gap = |most: u64| {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            1 + (random >> 33) % most
        };
        for most in [2, 200, 16_384, 1 << 20, FAR / 300] {
            let older = snapshot(3 * FAR, || gap(most));
            // The same run, every second one has ended and another one runs, or all others.
            let mut half = older.clone();
            half.end = Xid(4 * FAR);
            let later = snapshot(4 * FAR, || gap(most)).running.into_iter();
            half.running = half.running.into_iter().chain(later).step_by(2).collect();
            let mut same = older.clone();
            same.end = Xid(4 * FAR);
            assert_eq!(batches(&older, &same).len(), 1);
            assert_eq!(
                batches(&older, &half).len(),
                1 + usize::from(most > 1 << 20)
            );
            let other = snapshot(5 * FAR, || gap(most));
            assert_eq!(
                batches(&older, &other).len(),
                1 + usize::from(most > 16_384)
            );
        }
        // Evenly, as far as PostgreSQL allows.
        let evenly = |end| snapshot(end, || FAR / 300);
        assert_eq!(batches(&evenly(3 * FAR), &evenly(5 * FAR)).len(), 2);
    }

    /// A page of 1,000 changes, in a batch with so many running transactions.
    fn page(running: u64) -> Page {
        let cursor = Cursor {
            epoch: Epoch {
                database: 1,
                timeline: 1,
                position: 1,
                recovered: 0,
            },
            seen: None,
            batch: Some(Position {
                until: Snapshot {
                    end: Xid(1_000_000),
                    running: (0..running).map(|number| Xid(1000 + 2 * number)).collect(),
                },
                is_large: true,
                listing_id: 1,
                id: 1,
            }),
        };
        let change = |id| Change {
            listing_id: 1,
            id,
            is_deletion: false,
            json: "x".repeat(100),
        };
        Page {
            changes: (1..=1000).map(change).collect(),
            next: cursor.clone(),
            batch: cursor,
            events: OnceLock::new(),
        }
    }

    fn ids(events: &[u8]) -> usize {
        let events = str::from_utf8(events).expect("UTF-8");
        events
            .lines()
            .filter(|line| line.starts_with("id: "))
            .count()
    }

    #[test]
    fn each_event_has_a_short_cursor() {
        assert_eq!(ids(&page(20).events()), 1000);
    }

    #[test]
    fn long_cursors_do_not_multiply_the_bytes_of_a_page() {
        let events = page(11_900).events();
        assert!(ids(&events) > 1);
        assert!(events.len() < 450_000, "{} bytes", events.len());
        assert!(events.ends_with(b"x\n\n"));
    }
}
