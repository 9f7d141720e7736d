//! `GET /changes`: the price changes and deletions of all listings, as pages, as a long poll, or as server-sent events.

use std::sync::Arc;
use std::time::Duration;

use actix_web::http::header::{self, ContentType};
use actix_web::http::{Method, StatusCode};
use actix_web::web::Data;
use actix_web::{HttpRequest, HttpResponse};
use bytes::Bytes;
use futures_util::stream;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::yield_now;
use tokio::time::{Instant, timeout_at};
use tokio_postgres::Row;

use super::change_cursor::Cursor;
use super::change_feed::{Feed, Tick, Ticks};
use super::change_page::{Change, Head, MAX_PAGE, Page};
use crate::http::error::ApiError;
use crate::http::query::Query;
use crate::postgres::{Database, Error, Parameters};
use crate::settings::Settings;

/// Keeps the connection alive and the cursor of an idle client fresh.
const EVENTS_KEEP_ALIVE: Duration = Duration::from_secs(15);

pub async fn list(
    request: HttpRequest,
    settings: Data<Settings>,
    database: Data<Database>,
    feed: Data<Feed>,
) -> Result<HttpResponse, ApiError> {
    if settings.sharding_proxy {
        // Each server has transaction numbers of its own.
        let cause = "SHARDING_PROXY=on: an instance at the server itself must serve its changes";
        return Err(Error::unavailable(cause).into());
    }
    let mut query = Query::parse(&request)?;
    let limit = query.limit()?.unwrap_or(MAX_PAGE);
    let wait = query.wait()?;
    let after = query.string("after", |_| Ok(()))?;
    query.finish()?;
    let reader = Reader {
        database,
        feed,
        limit,
    };
    if accepts_events(&request) {
        let start = match request.headers().get("last-event-id") {
            // A text that is not ASCII is no cursor.
            Some(id) => Start::parse("last-event-id", Some(id.to_str().unwrap_or_default()))?,
            None => Start::parse("after", after.as_deref())?,
        };
        return respond_with_events(&request, reader, start).await;
    }
    let start = Start::parse("after", after.as_deref())?;
    let is_head = *request.method() == Method::HEAD;
    let wait = if is_head { Duration::ZERO } else { wait };
    let (changes, next) = reader.wait(start, wait).await?;
    let link = query.next_page(request.path(), &next.encode());
    Ok(HttpResponse::Ok()
        .insert_header((header::LINK, link))
        .insert_header((header::CACHE_CONTROL, "no-cache"))
        .insert_header((header::VARY, "Accept, Accept-Encoding"))
        .content_type(ContentType::json())
        .body(changes))
}

async fn respond_with_events(
    request: &HttpRequest,
    reader: Reader,
    start: Start,
) -> Result<HttpResponse, ApiError> {
    // Read before the response starts, so that a failure still has a status.
    let (cursor, _) = reader.open(start).await?;
    let mut response = HttpResponse::Ok();
    response
        .insert_header((header::CACHE_CONTROL, "no-store"))
        .insert_header((header::VARY, "Accept"))
        // Keeps this service from compressing events, and nginx from holding them back.
        .insert_header((header::CONTENT_ENCODING, "identity"))
        .insert_header(("x-accel-buffering", "no"))
        .content_type("text/event-stream");
    if *request.method() == Method::HEAD {
        return Ok(response.streaming(stream::empty::<Result<Bytes, ApiError>>()));
    }
    let events = Events {
        reader,
        cursor,
        ticks: None,
        keep_alive_at: Instant::now(),
        rest: Bytes::new(),
    };
    let chunks = stream::try_unfold(events, async |mut events| {
        let chunk = events.next().await?;
        Ok::<_, ApiError>(chunk.map(|chunk| (chunk, events)))
    });
    Ok(response.streaming(chunks))
}

fn accepts_events(request: &HttpRequest) -> bool {
    let lines = request.headers().get_all(header::ACCEPT);
    let mut entries = lines
        .filter_map(|line| line.to_str().ok())
        .flat_map(|line| line.split(','));
    entries.any(|entry| {
        let media_type = entry.split(';').next().unwrap_or_default();
        media_type.trim().eq_ignore_ascii_case("text/event-stream")
    })
}

/// Where a client wants to begin.
enum Start {
    /// With all changes that are kept.
    First,
    /// With the next change.
    Now,
    After(Cursor),
}

impl Start {
    fn parse(name: &str, text: Option<&str>) -> Result<Self, ApiError> {
        match text {
            None => Ok(Self::First),
            Some("now") => Ok(Self::Now),
            Some(text) => {
                let mangled = || {
                    ApiError::malformed(format!(
                        "{name}: must be now, or come from a Link header or an event"
                    ))
                };
                Cursor::decode(text).map(Self::After).ok_or_else(mangled)
            }
        }
    }
}

/// Reads the feed for one client.
struct Reader {
    database: Data<Database>,
    feed: Data<Feed>,
    limit: i64,
}

impl Reader {
    async fn query(&self, sql: &str, values: Parameters<'_>) -> Result<Vec<Row>, Error> {
        self.database.read_on_primary(sql, values).await
    }

    async fn head(&self) -> Result<Head, ApiError> {
        Head::read(async |sql: &str, values: Parameters<'_>| self.query(sql, values).await).await
    }

    /// The cursor where a client begins.
    async fn open(&self, start: Start) -> Result<(Cursor, Head), ApiError> {
        let head = self.head().await?;
        let cursor = match start {
            Start::Now => head.cursor(),
            Start::First => Cursor {
                seen: None,
                ..head.cursor()
            },
            Start::After(cursor) if self.feed.is_valid(&cursor, &head) => cursor,
            Start::After(_) => {
                return Err(ApiError::new(
                    StatusCode::GONE,
                    "the cursor is from before a restore or a failover of the database: begin anew, without a cursor",
                ));
            }
        };
        Ok((cursor, head))
    }

    async fn page(&self, cursor: &Cursor, head: &Head) -> Result<Page, ApiError> {
        let query = async |sql: &str, values: Parameters<'_>| self.query(sql, values).await;
        Page::read(query, cursor, head, self.limit).await
    }

    /// The page of a tick after a cursor, and whether it is shared.
    async fn page_of(&self, tick: &Tick, cursor: &Cursor) -> Result<(Arc<Page>, bool), ApiError> {
        match tick.page(cursor) {
            Some(page) => Ok((page, true)),
            None => Ok((Arc::new(self.page(cursor, &tick.head).await?), false)),
        }
    }

    /// A page as JSON. If there is nothing yet, waits for the next change.
    async fn wait(&self, start: Start, wait: Duration) -> Result<(Vec<u8>, Cursor), ApiError> {
        let until = Instant::now() + wait;
        // Joins first, so that no tick is missed.
        let mut ticks = if wait.is_zero() {
            None
        } else {
            self.feed.join()
        };
        let mut cursor = match start {
            // The poll has just found nothing new.
            Start::After(cursor) if ticks.is_some() && self.feed.is_head(&cursor) => cursor,
            start => {
                let (cursor, head) = self.open(start).await?;
                let page = self.page(&cursor, &head).await?;
                if !page.changes.is_empty() || page.next.batch.is_some() {
                    return Ok((array(&page.changes), page.next));
                }
                // A client at the head keeps its cursor, so that the next tick begins there.
                let keeps = cursor.seen.is_some()
                    && cursor.batch.is_none()
                    && cursor.epoch.is_same_life(&head.epoch);
                if keeps { cursor } else { page.next }
            }
        };
        while let Some(ticks) = &mut ticks {
            let Ok(Some(tick)) = timeout_at(until, next(ticks)).await else {
                break;
            };
            let (page, _) = self.page_of(&tick, &cursor).await?;
            let (changes, next) = page.first(self.limit);
            if !changes.is_empty() || next.batch.is_some() {
                return Ok((array(changes), next));
            }
            cursor = next;
        }
        Ok((array(&[]), cursor))
    }
}

/// The next tick. `None`: the feed ends.
async fn next(ticks: &mut Ticks) -> Option<Arc<Tick>> {
    loop {
        match ticks.recv().await {
            Ok(tick) => return tick,
            Err(RecvError::Closed) => return None,
            // The page of the next tick does not begin at the cursor, so another one is read.
            Err(RecvError::Lagged(_)) => (),
        }
    }
}

fn array(changes: &[Change]) -> Vec<u8> {
    let changes: Vec<_> = changes.iter().map(|change| change.json.as_str()).collect();
    format!("[{}]", changes.join(",")).into()
}

/// The events of one client.
struct Events {
    reader: Reader,
    cursor: Cursor,
    /// Set while the client follows the poll. Otherwise it reads pages by itself.
    ticks: Option<Ticks>,
    keep_alive_at: Instant,
    /// What was not sent yet.
    rest: Bytes,
}

/// A chunk has whole events. Each connection has a copy of the chunk that it sends, in a buffer of 8 KiB that it has anyway.
const CHUNK_BYTES: usize = 8000;

impl Events {
    /// The next chunk of the response. `None`: the response ends.
    async fn next(&mut self) -> Result<Option<Bytes>, ApiError> {
        // Lets the connection write the last chunk. Otherwise it would copy several, into a larger buffer that it keeps.
        yield_now().await;
        if self.rest.is_empty() {
            match self.next_events().await? {
                Some(events) => self.rest = events,
                None => return Ok(None),
            }
            self.keep_alive_at = Instant::now() + EVENTS_KEEP_ALIVE;
        }
        let most = self.rest.len().min(CHUNK_BYTES);
        let end = self.rest[..most].windows(2).rposition(|end| end == b"\n\n");
        let length = end.map_or(most, |end| end + 2);
        Ok(Some(self.rest.split_to(length)))
    }

    async fn next_events(&mut self) -> Result<Option<Bytes>, ApiError> {
        loop {
            let page = if let Some(ticks) = &mut self.ticks {
                let Ok(tick) = timeout_at(self.keep_alive_at, next(ticks)).await else {
                    return Ok(Some(self.id()));
                };
                let Some(tick) = tick else {
                    return Ok(None);
                };
                let (page, is_shared) = self.reader.page_of(&tick, &self.cursor).await?;
                // The next tick has the rest of a batch only if this one had the beginning.
                if page.next.batch.is_some() && !is_shared {
                    self.ticks = None;
                }
                page
            } else {
                // Joins first, so that no tick is missed.
                let Some(ticks) = self.reader.feed.join() else {
                    return Ok(None);
                };
                let start = Start::After(self.cursor.clone());
                let (cursor, head) = self.reader.open(start).await?;
                let page = self.reader.page(&cursor, &head).await?;
                if page.changes.is_empty() && page.next.batch.is_none() {
                    self.ticks = Some(ticks);
                    self.cursor = page.next;
                    // A client that has received no change yet can resume here too.
                    return Ok(Some(self.id()));
                }
                Arc::new(page)
            };
            self.cursor = page.next.clone();
            if !page.changes.is_empty() {
                return Ok(Some(page.events()));
            }
            if self.cursor.batch.is_some() {
                return Ok(Some(self.id()));
            }
        }
    }

    /// Tells the client its cursor, without an event.
    fn id(&self) -> Bytes {
        format!("id: {}\n\n", self.cursor.encode()).into()
    }
}
