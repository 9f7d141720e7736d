//! Listings: what a response looks like, the handler of each method, and its SQL.

use actix_web::http::header::{ContentType, EntityTag, HeaderMap, HeaderName, HeaderValue};
use actix_web::http::{StatusCode, header};
use actix_web::web::{Data, Path, Payload};
use actix_web::{HttpRequest, HttpResponse};
use serde::Serialize;
use sha2::{Digest, Sha256};
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use super::auth::{Auth, Subject, Writer, with_random_key};
use super::listing_filter::Filter;
use super::listing_input::Input;
use crate::http::error::ApiError;
use crate::http::query::Query;
use crate::http::{body, conditional, json_array};
use crate::postgres::{Database, ErrorKind, Lookup, LookupSql, Parameters, Rows, Value};
use crate::settings::Settings;
use crate::types::euros::Euros;
use crate::types::timestamp::Timestamp;

/// Only on the response to a repeated POST.
const IDEMPOTENT_REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");

#[derive(Serialize)]
struct Listing<'a> {
    id: i32,
    name: &'a str,
    postal_address: PostalAddress<'a>,
    description: &'a str,
    building_type: &'a str,
    latest_price_eur: Euros,
    surface_area_m2: f64,
    rooms_count: i32,
    bedrooms_count: i32,
    #[serde(skip_serializing_if = "Option::is_none")]
    contact_phone_number: Option<&'a str>,
    created_date: Timestamp,
    updated_date: Timestamp,
}

#[derive(Serialize)]
struct PostalAddress<'a> {
    street_address: &'a str,
    postal_code: &'a str,
    city: &'a str,
    country: &'a str,
}

/// The columns that every statement returns. `xmin` changes with every write to the row, by any writer.
macro_rules! columns {
    () => {
        "id, name, street_address, postal_code, city, country, description, building_type, price, surface_area_m2, \
         rooms_count, bedrooms_count, contact_phone_number, created_date, updated_date, xmin::text as version"
    };
}

impl<'a> TryFrom<&'a Row> for Listing<'a> {
    type Error = tokio_postgres::Error;

    fn try_from(row: &'a Row) -> Result<Self, Self::Error> {
        Ok(Self {
            id: row.try_get("id")?,
            name: row.try_get("name")?,
            postal_address: PostalAddress {
                street_address: row.try_get("street_address")?,
                postal_code: row.try_get("postal_code")?,
                city: row.try_get("city")?,
                country: row.try_get("country")?,
            },
            description: row.try_get("description")?,
            building_type: row.try_get("building_type")?,
            latest_price_eur: row.try_get("price")?,
            surface_area_m2: row.try_get("surface_area_m2")?,
            rooms_count: row.try_get("rooms_count")?,
            bedrooms_count: row.try_get("bedrooms_count")?,
            contact_phone_number: row.try_get("contact_phone_number")?,
            created_date: row.try_get("created_date")?,
            updated_date: row.try_get("updated_date")?,
        })
    }
}

fn write(row: &Row, json: &mut Vec<u8>) -> Result<(), ApiError> {
    serde_json::to_writer(json, &Listing::try_from(row)?).map_err(ApiError::internal)
}

fn etag(row: &Row) -> Result<EntityTag, tokio_postgres::Error> {
    Ok(conditional::etag(row.try_get("version")?))
}

fn respond(status: StatusCode, row: &Row) -> Result<HttpResponse, ApiError> {
    let mut json = Vec::with_capacity(1024);
    write(row, &mut json)?;
    Ok(HttpResponse::build(status)
        .insert_header(header::ETag(etag(row)?))
        .insert_header((header::CACHE_CONTROL, "no-cache"))
        .content_type(ContentType::json())
        .body(json))
}

pub fn not_found(id: impl std::fmt::Display) -> ApiError {
    let message = format!("listing {id} does not exist");
    ApiError::new(StatusCode::NOT_FOUND, message)
}

/// The id in a path. Text that is not a positive 32-bit integer is the id of no listing.
pub fn parse_id(text: &str) -> Result<i32, ApiError> {
    // Only as the service writes it: neither +7 nor 07 is listing 7.
    let id = text
        .parse::<i32>()
        .ok()
        .filter(|id| *id > 0 && id.to_string() == text);
    id.ok_or_else(|| not_found(text))
}

/// The subject of a write to this path. The key is verified before the id.
fn subject(path: &str) -> Subject<'_> {
    parse_id(path).map_or(Subject::Any, Subject::Listing)
}

/// An expression that sets `listing.actor` for this transaction before it returns its value. So the actor is known before any
/// trigger of the row fires. A trigger before the statement sees none: it fires before any expression is evaluated.
macro_rules! with_actor {
    ($actor:literal, $value:literal) => {
        concat!(
            "case when ",
            $actor,
            "::text is null or set_config('listing.actor', ",
            $actor,
            ", true) is not null \
             then ",
            $value,
            " end"
        )
    };
}

macro_rules! insert {
    () => {
        concat!(
            "insert into public.listing (name, street_address, postal_code, city, country, description, building_type, \
             price, surface_area_m2, rooms_count, bedrooms_count, contact_phone_number, owner) \
             values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, ",
            with_actor!("$14", "$13::text"),
            ") returning ",
            columns!()
        )
    };
}

/// A query that PostgreSQL does not run, because nothing refers to it. A sharding proxy reads it, and sends all statements with
/// the same key to the same server.
macro_rules! with_key {
    ($key:literal) => {
        concat!(
            "with subject as (select from public.idempotency_key where key = ",
            $key,
            ")"
        )
    };
}

const INSERT: &str = insert!();

/// The same with a random key, behind a sharding proxy.
const INSERT_BY_KEY: &str = concat!(with_key!("$15"), " ", insert!());

/// Fails if the key exists. Then neither of both rows is inserted.
const INSERT_ONCE: &str = concat!(
    with_key!("$15"),
    ", created as (",
    insert!(),
    "), remembered as (insert into public.idempotency_key (owner, key, body_sha256, listing_id) \
     select $13, $15, $16, id from created) select * from created"
);

/// The listing that a key made. Its columns are null if it was deleted since.
///
/// The message is empty. It makes the commit wait for a synchronous standby, which may still lack the listing: after a crash,
/// PostgreSQL shows rows whose commit was still waiting.
const SELECT_REPEATED: &str = concat!(
    "select pg_logical_emit_message(true, '', ''), body_sha256 = $3 as same_body, listing.* \
     from public.idempotency_key left join lateral (select ",
    columns!(),
    " from public.listing where id = listing_id) as listing on true \
     where idempotency_key.key = $2 and idempotency_key.owner is not distinct from $1"
);

pub async fn create(
    request: HttpRequest,
    payload: Payload,
    auth: Data<Auth>,
    database: Data<Database>,
    settings: Data<Settings>,
) -> Result<HttpResponse, ApiError> {
    let key = idempotency_key(request.headers());
    let subject = match key {
        Ok(Some(key)) => Subject::Key(key),
        _ => Subject::Any,
    };
    let (writer, body) = auth.admit(&request, payload, subject).await?;
    let Writer {
        owner,
        actor,
        key: random,
    } = writer;
    body::require_type(&request, &["application/json"])?;
    let key = key?;
    let input = Input::parse(&body, true, None)?;
    let Some(key) = key else {
        let select = async |key: &str| database.read_on_primary(SELECT_BY_KEY, &[&key]).await;
        let random = match random {
            None if settings.sharding_proxy => Some(with_random_key(select).await?.0),
            random => random,
        };
        let who: Parameters = &[&owner, &actor];
        let values = [&input.values(), who].concat();
        let Some(random) = random else {
            return created(&database.write(None, INSERT, &values).await?);
        };
        let key: Parameters = &[&random];
        let values = [&values, key].concat();
        return created(&database.write(None, INSERT_BY_KEY, &values).await?);
    };
    let who: Parameters = &[&owner, &actor, &key];
    let values = [&input.values(), who].concat();
    let hash = Sha256::digest(&body).to_vec();
    let body_sha256: Parameters = &[&hash];
    let values = [&values, body_sha256].concat();
    // Repetitions wait for each other before they take a connection. No listing has a negative id.
    let queue = i32::from_be_bytes([hash[0], hash[1], hash[2], hash[3]]) | i32::MIN;
    let inserted = database.write_repeatably(queue, INSERT_ONCE, &values);
    let duplicate = match inserted.await {
        Err(error) if error.kind == ErrorKind::Duplicate => error,
        inserted => return created(&inserted?),
    };
    let parameters: Parameters = &[&owner, &key, &hash];
    let repeated = database.write_repeatably(queue, SELECT_REPEATED, parameters);
    let rows = repeated.await?;
    // Without a row, another unique index refused the listing.
    let row = rows.first().ok_or(duplicate)?;
    if !row.try_get("same_body")? {
        let message = "idempotency-key: was used with another body, use a new key";
        return Err(ApiError::invalid(message));
    }
    if row.try_get::<_, Option<i32>>("id")?.is_none() {
        let message = "idempotency-key: its listing was deleted, use a new key";
        return Err(ApiError::new(StatusCode::CONFLICT, message));
    }
    let mut response = created(&rows)?;
    let (name, value) = (IDEMPOTENT_REPLAYED, HeaderValue::from_static("true"));
    response.headers_mut().insert(name, value);
    Ok(response)
}

/// Finds out which random key belongs to a server that answers, for a new listing behind a sharding proxy.
const SELECT_BY_KEY: &str = "select from public.idempotency_key where key = $1 limit 0";

fn created(rows: &[Row]) -> Result<HttpResponse, ApiError> {
    let row = rows
        .first()
        .ok_or_else(|| ApiError::internal("an insert returned no row"))?;
    let location = format!("/listings/{}", row.try_get::<_, i32>("id")?);
    let mut response = respond(StatusCode::CREATED, row)?;
    let location = location.parse().map_err(ApiError::internal)?;
    response.headers_mut().insert(header::LOCATION, location);
    Ok(response)
}

/// The key of a POST, without quotes around it.
fn idempotency_key(headers: &HeaderMap) -> Result<Option<&str>, ApiError> {
    let mut lines = headers.get_all("idempotency-key");
    let Some(line) = lines.next() else {
        return Ok(None);
    };
    let key = || {
        let line = line.to_str().ok()?;
        let quoted = line.strip_prefix('"').and_then(|key| key.strip_suffix('"'));
        let key = quoted.unwrap_or(line);
        let right =
            (1..=255).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic());
        right.then_some(key)
    };
    let key = key().filter(|_| lines.next().is_none());
    key.map(Some).ok_or_else(|| {
        ApiError::malformed(
            "idempotency-key: must be one header of 1 to 255 visible ASCII characters",
        )
    })
}

/// One listing, or many at once, because concurrent reads share a statement.
const SELECT_BY_ID: LookupSql = LookupSql {
    one: concat!("select ", columns!(), " from public.listing where id = $1"),
    many: concat!(
        "select ",
        columns!(),
        " from public.listing where id = any($1)"
    ),
};

/// The batched lookup of [`get`].
pub struct ById(pub Lookup<i32>);

impl ById {
    pub fn new(database: &Database) -> Self {
        Self(database.lookup(SELECT_BY_ID))
    }
}

pub async fn get(
    request: HttpRequest,
    path: Path<String>,
    by_id: Data<ById>,
) -> Result<HttpResponse, ApiError> {
    let id = parse_id(&path)?;
    // A replica may not have the listing, or the version that the client names, yet.
    let is_fresh = |rows: &Rows| {
        let etag = rows.first().map(etag);
        matches!(etag, Some(Ok(etag)) if conditional::is_fresh(&request, &etag))
    };
    let rows = by_id.0.get(id, is_fresh).await?;
    let row = rows.first().ok_or_else(|| not_found(id))?;
    let etag = etag(row)?;
    if conditional::is_known(&request, &etag) {
        return Ok(conditional::not_modified(etag));
    }
    respond(StatusCode::OK, row)
}

pub async fn replace(
    request: HttpRequest,
    path: Path<String>,
    payload: Payload,
    auth: Data<Auth>,
    database: Data<Database>,
) -> Result<HttpResponse, ApiError> {
    let (writer, body) = auth.admit(&request, payload, subject(&path)).await?;
    let id = parse_id(&path)?;
    body::require_type(&request, &["application/json"])?;
    let mut input = Input::parse(&body, true, Some(id))?;
    if conditional::must_create(&request) {
        let message = "if-none-match: PUT never creates a listing, use POST";
        return Err(ApiError::new(StatusCode::PRECONDITION_FAILED, message));
    }
    // A replacement without a phone number removes it.
    input.sets_contact_phone_number = true;
    update(&request, &database, writer, id, input).await
}

pub async fn patch(
    request: HttpRequest,
    path: Path<String>,
    payload: Payload,
    auth: Data<Auth>,
    database: Data<Database>,
) -> Result<HttpResponse, ApiError> {
    let (writer, body) = auth.admit(&request, payload, subject(&path)).await?;
    let id = parse_id(&path)?;
    body::require_type(
        &request,
        &["application/merge-patch+json", "application/json"],
    )?;
    let input = Input::parse(&body, false, Some(id))?;
    update(&request, &database, writer, id, input).await
}

/// Changes the given fields if the version and the owner match. Both conditions are in the statement, so of two writers
/// with the same `If-Match` only one succeeds. If the statement waits for a row lock, PostgreSQL checks the conditions again on
/// the new row, so a concurrent change of owner is safe too.
const UPDATE: &str = concat!(
    "update public.listing set \
     name = coalesce($1, name), \
     street_address = coalesce($2, street_address), \
     postal_code = coalesce($3, postal_code), \
     city = coalesce($4, city), \
     country = coalesce($5, country), \
     description = coalesce($6, description), \
     building_type = coalesce($7, building_type), \
     price = coalesce($8, price), \
     surface_area_m2 = coalesce($9, surface_area_m2), \
     rooms_count = coalesce($10, rooms_count), \
     bedrooms_count = coalesce($11, bedrooms_count), \
     contact_phone_number = case when $13 then $12 else contact_phone_number end, \
     updated_date = ",
    with_actor!("$17", "statement_timestamp()"),
    " where id = $14 and ($15::text[] is null or xmin::text = any($15)) and ($16::text is null or owner = $16) returning ",
    columns!()
);

async fn update(
    request: &HttpRequest,
    database: &Database,
    writer: Writer,
    id: i32,
    input: Input,
) -> Result<HttpResponse, ApiError> {
    let Writer { owner, actor, .. } = writer;
    let versions = conditional::expected_versions(request);
    let sets_phone = input.sets_contact_phone_number;
    let which: Parameters = &[&sets_phone, &id, &versions, &owner, &actor];
    let values = [&input.values(), which].concat();
    let rows = database.write(Some(id), UPDATE, &values).await?;
    match rows.first() {
        Some(row) => respond(StatusCode::OK, row),
        None => Err(why_not_written(database, id, versions, owner).await),
    }
}

/// The history is deleted with the listing. The actor is for row triggers of the DBA.
const DELETE: &str = "delete from public.listing \
    where id = $1 and ($2::text[] is null or xmin::text = any($2)) and ($3::text is null or owner = $3) \
    and ($4::text is null or set_config('listing.actor', $4, true) is not null) returning id";

pub async fn delete(
    request: HttpRequest,
    path: Path<String>,
    payload: Payload,
    auth: Data<Auth>,
    database: Data<Database>,
) -> Result<HttpResponse, ApiError> {
    let admitted = auth.admit(&request, payload, subject(&path));
    let (Writer { owner, actor, .. }, _) = admitted.await?;
    let id = parse_id(&path)?;
    let versions = conditional::expected_versions(&request);
    let values: Parameters = &[&id, &versions, &owner, &actor];
    let rows = database.write(Some(id), DELETE, values).await;
    let rows = rows.map_err(|error| match error.kind {
        ErrorKind::ForeignKey => {
            let message = format!("a row of another table still needs listing {id}");
            ApiError::new(StatusCode::CONFLICT, message)
        }
        _ => error.into(),
    })?;
    if rows.is_empty() {
        return Err(why_not_written(&database, id, versions, owner).await);
    }
    Ok(HttpResponse::NoContent().finish())
}

const SELECT_MAY_WRITE: &str = "select $2::text is null or owner is not distinct from $2 as may_write \
    from public.listing where id = $1";

/// Why a write found no row: the listing does not exist, belongs to another owner, or has another version.
async fn why_not_written(
    database: &Database,
    id: i32,
    versions: Option<Vec<String>>,
    owner: Option<String>,
) -> ApiError {
    if versions.is_none() && owner.is_none() {
        return not_found(id);
    }
    let values: Parameters = &[&id, &owner];
    let rows = match database.read_on_primary(SELECT_MAY_WRITE, values).await {
        Ok(rows) => rows,
        Err(error) => return error.into(),
    };
    match rows.first().map(|row| row.try_get("may_write")) {
        None => not_found(id),
        Some(Ok(true)) if versions.is_some() => {
            let message = format!("if-match: listing {id} has changed, read it again");
            ApiError::new(StatusCode::PRECONDITION_FAILED, message)
        }
        // Also if the listing got this owner after the write.
        Some(Ok(_)) => {
            let message = format!("this key may not change listing {id}");
            ApiError::new(StatusCode::FORBIDDEN, message)
        }
        Some(Err(error)) => error.into(),
    }
}

pub async fn list(
    request: HttpRequest,
    database: Data<Database>,
) -> Result<HttpResponse, ApiError> {
    let mut query = Query::parse(&request)?;
    let limit = query.limit()?;
    let after = query.integer("after")?.unwrap_or(0);
    let filter = Filter::parse(&mut query)?;
    query.finish()?;

    let page = Page::new(filter);
    let mut response = HttpResponse::Ok();
    response.insert_header((header::CACHE_CONTROL, "no-cache"));
    let Some(limit) = limit else {
        let read = async move |last: Option<&Row>| {
            let after = last.map_or(Ok(after), |row| row.try_get("id"))?;
            page.read(&database, after, json_array::PAGE_SIZE).await
        };
        return json_array::stream(&request, response, read, write).await;
    };
    // The extra row tells whether there is a further page.
    let mut rows = page.read(&database, after, limit + 1).await?;
    if json_array::trim_to_limit(&mut rows, limit)
        && let Some(last) = rows.last()
    {
        let last: i32 = last.try_get("id")?;
        let next = query.next_page(request.path(), &last.to_string());
        response.insert_header((header::LINK, next));
    }
    json_array::respond(response, &rows, write)
}

/// Every statement of this file, with a request that runs it.
pub fn statements() -> Vec<(&'static str, String)> {
    vec![
        ("GET /listings", Page::new(Filter::by_everything()).sql),
        ("POST /listings", INSERT.to_owned()),
        ("POST /listings", INSERT_BY_KEY.to_owned()),
        ("POST /listings", INSERT_ONCE.to_owned()),
        ("POST /listings", SELECT_REPEATED.to_owned()),
        ("POST /listings", SELECT_BY_KEY.to_owned()),
        ("GET /listings/{id}", SELECT_BY_ID.one.to_owned()),
        ("GET /listings/{id}", SELECT_BY_ID.many.to_owned()),
        ("PATCH /listings/{id}", UPDATE.to_owned()),
        ("PATCH /listings/{id}", SELECT_MAY_WRITE.to_owned()),
        ("DELETE /listings/{id}", DELETE.to_owned()),
    ]
}

/// The statement for a page of a filtered list.
struct Page {
    sql: String,
    filter_values: Vec<Value>,
}

impl Page {
    fn new(filter: Filter) -> Self {
        // $1 is the id after which the page begins, $2 its size.
        let (conditions, filter_values) = filter.into_conditions(3);
        let columns = columns!();
        let sql = format!(
            "select {columns} from public.listing where id > $1{conditions} order by id limit $2"
        );
        Self { sql, filter_values }
    }

    async fn read(&self, database: &Database, after: i32, size: i64) -> Result<Vec<Row>, ApiError> {
        let mut parameters: Vec<&(dyn ToSql + Sync)> = vec![&after, &size];
        for value in &self.filter_values {
            parameters.push(value.as_ref());
        }
        Ok(database.read(&self.sql, &parameters, |_| true).await?)
    }
}
