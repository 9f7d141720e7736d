//! The price history of a listing, as the database wrote it.

use std::rc::Rc;

use actix_web::http::header;
use actix_web::{HttpRequest, HttpResponse, web};
use chrono::{DateTime, Utc};
use serde::Serialize;
use tokio_postgres::Row;

use crate::conditions;
use crate::database;
use crate::error::ApiError;
use crate::euros::Euros;
use crate::json::Moment;
use crate::listings;
use crate::pages;
use crate::parameters::Parameters;
use crate::reader::{Reader, Rows, Source};

#[derive(Serialize)]
struct Price {
    price_eur: Euros,
    created_date: Moment,
}

fn write(row: &Row, json: &mut Vec<u8>) -> Result<(), ApiError> {
    let price = Price {
        price_eur: row.try_get("new_price")?,
        created_date: row.try_get("changed_at")?,
    };
    serde_json::to_writer(json, &price).map_err(ApiError::internal)
}

/// What the reader asks of many listings at once: the whole of a short history, the beginning of a long one. It is read from
/// the index alone.
pub const SELECT_BATCH: &str = "select listing_id, price.* from unnest($1::integer[]) as wanted (listing_id) \
    cross join lateral (select id, new_price, changed_at from public.listing_price_log as log \
        where log.listing_id = wanted.listing_id order by id limit 101) as price";

/// A history longer than this is read by itself, page by page, so that it holds up nobody. The batch's limit is one more.
const SHORT: usize = 100;

const SELECT_EXTENT: &str = "select count(*), coalesce(max(id), 0) as last from public.listing_price_log \
    where listing_id = $1 and id > $2 \
    and ($3::timestamptz is null or changed_at >= $3) and ($4::timestamptz is null or changed_at < $4)";

const SELECT_PAGE: &str = "select id, new_price, changed_at from public.listing_price_log \
    where listing_id = $1 and id > $2 \
    and ($3::timestamptz is null or changed_at >= $3) and ($4::timestamptz is null or changed_at < $4) \
    and id <= $5 order by id limit $6";

/// What is asked for.
struct Wanted {
    id: i32,
    limit: Option<i64>,
    after: i64,
    from: Option<DateTime<Utc>>,
    to: Option<DateTime<Utc>>,
    /// No parameter was given.
    plain: bool,
}

/// What a server has of it.
struct Found {
    source: Rc<Source>,
    /// None where there are so many that they are read page by page.
    prices: Option<Rows>,
    count: i64,
    /// The id of the last one.
    last: i64,
    /// Whether there is a further page.
    more: bool,
}

impl Wanted {
    async fn find(&self, source: Rc<Source>) -> Result<Found, ApiError> {
        let Self {
            id,
            limit,
            after,
            from,
            to,
            plain,
        } = self;
        let mut more = false;
        let prices = if let Some(limit) = limit {
            // One more than asked for tells whether there is a further page.
            let values: database::Parameters = &[id, after, from, to, &i64::MAX, &(limit + 1)];
            let mut prices = source.database.read(SELECT_PAGE, values).await?;
            more = pages::cut(&mut prices, *limit);
            Some(Rc::new(prices))
        } else if *plain {
            let prices = source.prices(*id).await?;
            (prices.len() <= SHORT).then_some(prices)
        } else {
            None
        };
        let (count, last) = if let Some(prices) = &prices {
            let last = prices.last().map_or(Ok(0), |last| last.try_get("id"))?;
            (prices.len().try_into().map_err(ApiError::internal)?, last)
        } else {
            let extent = source
                .database
                .read(SELECT_EXTENT, &[id, after, from, to])
                .await?;
            let extent = extent
                .first()
                .ok_or_else(|| ApiError::internal("a count returned no row"))?;
            (extent.try_get("count")?, extent.try_get("last")?)
        };
        Ok(Found {
            source,
            prices,
            count,
            last,
            more,
        })
    }
}

impl Found {
    /// Rows are only ever added behind the last or, by a prune, taken away.
    fn etag(&self) -> String {
        let mark = if self.more { "+" } else { "" };
        conditions::etag(&format!("{}-{}{mark}", self.count, self.last))
    }
}

pub async fn list(
    request: HttpRequest,
    path: web::Path<String>,
    reader: web::Data<Reader>,
) -> Result<HttpResponse, ApiError> {
    let id = listings::id(&path)?;
    let mut parameters = Parameters::of(&request)?;
    let wanted = Wanted {
        id,
        limit: parameters.limit()?,
        after: parameters.long("after")?.unwrap_or(0),
        from: parameters.moment("from")?,
        to: parameters.moment("to")?,
        plain: request.query_string().is_empty(),
    };
    parameters.finish()?;

    let stands = |found: &Found| found.count > 0 && conditions::agrees(&request, &found.etag());
    let found = reader
        .ask(async |source| wanted.find(source).await, stands)
        .await?;
    // Every listing has a price, so this is rare: no listing, or none of its prices asked for.
    if found.count == 0 && found.source.listing(id).await?.is_empty() {
        return Err(ApiError::no_listing(id));
    }
    let etag = found.etag();
    if conditions::is_known(&request, &etag) {
        return Ok(conditions::not_modified(etag));
    }
    let mut response = HttpResponse::Ok();
    response.insert_header((header::ETAG, etag));
    response.insert_header((header::CACHE_CONTROL, "no-cache"));
    let Found {
        source,
        prices,
        last,
        more,
        ..
    } = found;
    if more {
        let next = parameters.next_page(request.path(), &last.to_string());
        response.insert_header((header::LINK, next));
    }
    if let Some(prices) = prices {
        response.content_type("application/json");
        return Ok(response.body(pages::array(&prices, write)?));
    }
    // From the server whose count the client was told.
    let primary = reader.primary().clone();
    let read = async move |row: Option<&Row>| {
        let after = row.map_or(Ok(wanted.after), |row| row.try_get("id"))?;
        let values: database::Parameters =
            &[&id, &after, &wanted.from, &wanted.to, &last, &pages::PAGE];
        match source.database.read(SELECT_PAGE, values).await {
            // The primary has all that a replica has.
            Err(error) if error.is_of_this_server() && !Rc::ptr_eq(&source, &primary) => {
                primary.database.read(SELECT_PAGE, values).await
            }
            page => page,
        }
    };
    pages::respond(&request, response, read, write).await
}
