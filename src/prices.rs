//! The price history of a listing, as the database wrote it.

use actix_web::http::header;
use actix_web::{HttpRequest, HttpResponse, web};
use chrono::{DateTime, Utc};
use serde::Serialize;
use tokio_postgres::Row;

use crate::conditions;
use crate::database::Database;
use crate::error::ApiError;
use crate::euros::Euros;
use crate::json::Moment;
use crate::listings;
use crate::parameters::Parameters;
use crate::reader::Reader;

#[derive(Serialize)]
struct Price {
    price_eur: Euros,
    created_date: Moment,
}

impl TryFrom<&Row> for Price {
    type Error = ApiError;

    fn try_from(row: &Row) -> Result<Self, ApiError> {
        Ok(Self {
            price_eur: Euros::parse(row.try_get("price")?).map_err(ApiError::internal)?,
            created_date: Moment(row.try_get::<_, DateTime<Utc>>("changed_at")?),
        })
    }
}

/// The whole history, which the reader prepares. It is read from the index alone.
pub const SELECT_ALL: &str = "select id, new_price::text as price, changed_at from public.listing_price_log where listing_id = $1 order by id";

const SELECT_SOME: &str = "select id, new_price::text as price, changed_at from public.listing_price_log \
    where listing_id = $1 and ($2::timestamptz is null or changed_at >= $2) and ($3::timestamptz is null or changed_at < $3) \
    and id > $4 order by id limit $5";

pub async fn list(
    request: HttpRequest,
    path: web::Path<String>,
    reader: web::Data<Reader>,
    database: web::Data<Database>,
) -> Result<HttpResponse, ApiError> {
    let id = listings::id(&path)?;
    let mut parameters = Parameters::of(&request)?;
    let limit = parameters.limit()?;
    let after = parameters.long("after")?;
    let from = parameters.moment("from")?;
    let to = parameters.moment("to")?;
    parameters.finish()?;

    let mut rows = if limit.is_none() && after.is_none() && from.is_none() && to.is_none() {
        reader.prices(id).await?
    } else {
        // One more than asked for tells whether there is a further page.
        let rows_at_most = limit
            .map_or(Ok(i64::MAX), |limit| i64::try_from(limit + 1))
            .map_err(ApiError::internal)?;
        database
            .query(
                SELECT_SOME,
                &[&id, &from, &to, &after.unwrap_or(0), &rows_at_most],
            )
            .await?
    };
    // Every listing has a price, so this is rare: no listing, or none of its prices asked for.
    if rows.is_empty() && reader.listing(id).await?.is_none() {
        return Err(ApiError::no_listing(id));
    }
    let more = limit.is_some_and(|limit| rows.len() > limit);
    if more {
        rows.truncate(rows.len() - 1);
    }
    // Rows are only ever added behind the last or, by a prune, taken away.
    let last: i64 = rows.last().map_or(Ok(0), |last| last.try_get("id"))?;
    let mark = if more { "+" } else { "" };
    let etag = conditions::etag(&format!("{}-{last}{mark}", rows.len()));
    if conditions::is_known(&request, &etag) {
        return Ok(conditions::not_modified(etag));
    }
    let mut response = HttpResponse::Ok();
    response.insert_header((header::ETAG, etag));
    response.insert_header((header::CACHE_CONTROL, "no-cache"));
    if more {
        response.insert_header((
            header::LINK,
            parameters.next_page(request.path(), &last.to_string()),
        ));
    }
    let prices = rows
        .iter()
        .map(Price::try_from)
        .collect::<Result<Vec<_>, _>>()?;
    Ok(response.json(prices))
}
