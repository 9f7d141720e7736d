//! The price history of a listing, as the database logged it.

use actix_web::http::header::{self, EntityTag};
use actix_web::web::{Data, Path};
use actix_web::{HttpRequest, HttpResponse};
use chrono::{DateTime, Utc};
use serde::Serialize;
use tokio_postgres::Row;

use super::listings;
use crate::http::error::ApiError;
use crate::http::query::Query;
use crate::http::{conditional, json_array};
use crate::postgres::{Database, Lookup, LookupSql, Parameters, Rows};
use crate::types::euros::Euros;
use crate::types::timestamp::Timestamp;

#[derive(Serialize)]
struct Price {
    price_eur: Euros,
    created_date: Timestamp,
}

fn write(row: &Row, json: &mut Vec<u8>) -> Result<(), ApiError> {
    let price = Price {
        price_eur: row.try_get("new_price")?,
        created_date: row.try_get("changed_at")?,
    };
    serde_json::to_writer(json, &price).map_err(ApiError::internal)
}

/// The history of one listing, or of many at once, because concurrent reads share a statement. Reads the index alone. A history
/// over [`SHORT`] is cut off one row later.
const SELECT_BY_LISTING: LookupSql = LookupSql {
    one: "select listing_id, id, new_price, changed_at from public.listing_price_log \
        where listing_id = $1 order by id limit 101",
    many: "select listing_id, price.* from unnest($1::integer[]) as wanted (listing_id) \
        cross join lateral (select id, new_price, changed_at from public.listing_price_log as log \
            where log.listing_id = wanted.listing_id order by id limit 101) as price",
};

/// A longer history is read by itself, page by page, so that it delays no other request.
const SHORT: usize = 100;

/// The batched lookup of short histories.
pub struct ByListing(Lookup<i32>);

impl ByListing {
    pub fn new(database: &Database) -> Self {
        Self(database.lookup(SELECT_BY_LISTING))
    }
}

const SELECT_PAGE: &str = "select id, new_price, changed_at from public.listing_price_log \
    where listing_id = $1 and id > $2 \
    and ($3::timestamptz is null or changed_at >= $3) and ($4::timestamptz is null or changed_at < $4) \
    and id <= $5 order by id limit $6";

/// The price in force at a moment. Like the history, it follows the order of `id`, which is right also if a clock was set back.
const SELECT_AT: &str = "select id, new_price, changed_at from public.listing_price_log \
    where listing_id = $1 and changed_at <= $2 order by id desc limit 1";

/// The version of a history that is too long to be read at once.
const SELECT_VERSION: &str = "select count(*), coalesce(max(id), 0) as last from public.listing_price_log \
    where listing_id = $1 and id > $2 \
    and ($3::timestamptz is null or changed_at >= $3) and ($4::timestamptz is null or changed_at < $4)";

/// Every statement of this file, with a request that runs it.
pub fn statements() -> impl Iterator<Item = (&'static str, String)> {
    let LookupSql { one, many } = SELECT_BY_LISTING;
    let statements = [one, many, SELECT_PAGE, SELECT_AT, SELECT_VERSION];
    statements
        .map(|sql| ("GET /listings/{id}/prices", sql.to_owned()))
        .into_iter()
}

pub async fn list(
    request: HttpRequest,
    path: Path<String>,
    database: Data<Database>,
    by_listing: Data<ByListing>,
    listings: Data<listings::ById>,
) -> Result<HttpResponse, ApiError> {
    let id = listings::parse_id(&path)?;
    let mut query = Query::parse(&request)?;
    let limit = query.limit()?;
    // Imported prices can have negative ids.
    let after = query.long("after")?.unwrap_or(i64::MIN);
    let (from, to) = (query.timestamp("from")?, query.timestamp("to")?);
    let at = query.timestamp("at")?;
    query.finish()?;
    if at.is_some() && !query.is_single() {
        let message = "at: must be the only parameter";
        return Err(ApiError::malformed(message));
    }

    // A replica may not have the listing, or the version that the client names, yet.
    let is_fresh = |version: Result<Version, ApiError>| {
        version.is_ok_and(|version| {
            version.count > 0 && conditional::is_fresh(&request, &version.etag())
        })
    };
    let prices = if at.is_some() {
        let is_fresh = |rows: &Vec<Row>| is_fresh(Version::of(rows, None));
        Some(Rows::new(
            database.read(SELECT_AT, &[&id, &at], is_fresh).await?,
        ))
    } else if let Some(limit) = limit {
        let is_fresh = |rows: &Vec<Row>| is_fresh(Version::of(rows, Some(limit)));
        // The extra row tells whether there is a further page.
        let values: Parameters = &[&id, &after, &from, &to, &i64::MAX, &(limit + 1)];
        Some(Rows::new(
            database.read(SELECT_PAGE, values, is_fresh).await?,
        ))
    } else if request.query_string().is_empty() {
        let is_short = |rows: &Rows| rows.len() <= SHORT;
        let is_fresh = |rows: &Rows| !is_short(rows) || is_fresh(Version::of(rows, None));
        let prices = by_listing.0.get(id, is_fresh).await?;
        is_short(&prices).then_some(prices)
    } else {
        None
    };
    let version = if let Some(prices) = &prices {
        Version::of(prices, limit)?
    } else {
        let is_fresh = |rows: &Vec<Row>| is_fresh(Version::selected(rows));
        let values: Parameters = &[&id, &after, &from, &to];
        let rows = database.read(SELECT_VERSION, values, is_fresh).await?;
        Version::selected(&rows)?
    };
    // Every listing has a price, so there is no listing, or none of its prices was asked for.
    if version.count == 0 && listings.0.get_on_primary(id).await?.is_empty() {
        return Err(listings::not_found(id));
    }
    let etag = version.etag();
    if conditional::is_known(&request, &etag) {
        return Ok(conditional::not_modified(etag));
    }
    let mut response = HttpResponse::Ok();
    response.insert_header(header::ETag(etag));
    response.insert_header((header::CACHE_CONTROL, "no-cache"));
    let Version { last, more, .. } = version;
    if more {
        let next = query.next_page(request.path(), &last.to_string());
        response.insert_header((header::LINK, next));
    }
    if let Some(prices) = prices {
        let shown = prices.len() - usize::from(more);
        return json_array::respond(response, prices.get(..shown).unwrap_or_default(), write);
    }
    let read = async move |row: Option<&Row>| {
        let after = row.map_or(Ok(after), |row| row.try_get("id"))?;
        if after >= last {
            return Ok(Vec::new());
        }
        let values: Parameters = &[&id, &after, &from, &to, &last, &json_array::PAGE_SIZE];
        // A replica has a listing's prices in order. A page that is full or reaches the last price lacks none of them.
        let is_whole = |rows: &Vec<Row>| {
            let reached = rows.last().map(|row| row.try_get::<_, i64>("id"));
            i64::try_from(rows.len()) == Ok(json_array::PAGE_SIZE)
                || matches!(reached, Some(Ok(id)) if id == last)
        };
        Ok(database.read(SELECT_PAGE, values, is_whole).await?)
    };
    json_array::stream(&request, response, read, write).await
}

/// Passes the whole history to a function, page by page. If it must not be stale, the primary is read.
pub async fn read_all(
    id: i32,
    database: &Database,
    by_listing: &ByListing,
    may_be_stale: bool,
    mut add: impl FnMut(&[Row]) -> Result<(), ApiError>,
) -> Result<(), ApiError> {
    // A replica may not have the listing yet.
    let is_fresh = |rows: &Rows| may_be_stale && !rows.is_empty();
    let short = by_listing.0.get(id, is_fresh).await?;
    add(&short)?;
    let mut last = short.get(SHORT).map(|row| row.try_get("id")).transpose()?;
    while let Some(after) = last {
        let none = None::<DateTime<Utc>>;
        let values: Parameters = &[&id, &after, &none, &none, &i64::MAX, &json_array::PAGE_SIZE];
        let page = database.read(SELECT_PAGE, values, |_| may_be_stale).await?;
        add(&page)?;
        let is_full = i64::try_from(page.len()) == Ok(json_array::PAGE_SIZE);
        let row = page.last().filter(|_| is_full);
        last = row.map(|row| row.try_get::<_, i64>("id")).transpose()?;
    }
    Ok(())
}

/// What identifies the state of a history: rows are added after the last one, or pruned.
struct Version {
    count: i64,
    /// The id of the last price.
    last: i64,
    /// Whether there is a further page.
    more: bool,
}

impl Version {
    /// The version of a page. Ignores the extra row that signals a further page.
    fn of(rows: &[Row], limit: Option<i64>) -> Result<Self, ApiError> {
        let all = i64::try_from(rows.len()).map_err(ApiError::internal)?;
        let more = limit.is_some_and(|limit| all > limit);
        let last = rows.iter().rev().nth(usize::from(more));
        Ok(Self {
            count: all - i64::from(more),
            last: last.map_or(Ok(0), |row| row.try_get("id"))?,
            more,
        })
    }

    /// The version that [`SELECT_VERSION`] returned.
    fn selected(rows: &[Row]) -> Result<Self, ApiError> {
        let row = rows
            .first()
            .ok_or_else(|| ApiError::internal("a count returned no row"))?;
        Ok(Self {
            count: row.try_get("count")?,
            last: row.try_get("last")?,
            more: false,
        })
    }

    fn etag(&self) -> EntityTag {
        let mark = if self.more { "+" } else { "" };
        conditional::etag(&format!("{}-{}{mark}", self.count, self.last))
    }
}
