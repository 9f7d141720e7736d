//! A listing's whole life: what it looks like, how it is checked, and the statements behind each method.

use std::rc::Rc;

use actix_web::http::{StatusCode, header};
use actix_web::{HttpRequest, HttpResponse, web};
use serde::Serialize;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use crate::commits::{Commits, Value};
use crate::conditions::{self, IfMatch};
use crate::error::ApiError;
use crate::euros::Euros;
use crate::json::{self, Moment};
use crate::keys::{Keys, Writer};
use crate::pages;
use crate::parameters::Parameters;
use crate::reader::{Reader, Rows, Source};

#[derive(Serialize)]
pub struct Listing<'a> {
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
    created_date: Moment,
    updated_date: Moment,
}

#[derive(Serialize)]
struct PostalAddress<'a> {
    street_address: &'a str,
    postal_code: &'a str,
    city: &'a str,
    country: &'a str,
}

/// What every statement returns of a listing. `xmin` is another one after every write to the row, whoever writes.
macro_rules! columns {
    () => {
        "id, name, street_address, postal_code, city, country, description, building_type, price, surface_area_m2, \
         rooms_count, bedrooms_count, contact_phone_number, created_date, updated_date, xmin::text as version"
    };
}

impl<'a> TryFrom<&'a Row> for Listing<'a> {
    type Error = ApiError;

    fn try_from(row: &'a Row) -> Result<Self, ApiError> {
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

/// What a body asks for. A field that it does not name is `None`.
struct Input {
    name: Option<String>,
    street_address: Option<String>,
    postal_code: Option<String>,
    city: Option<String>,
    country: Option<String>,
    description: Option<String>,
    building_type: Option<String>,
    price: Option<Euros>,
    surface_area_m2: Option<f64>,
    rooms_count: Option<i32>,
    bedrooms_count: Option<i32>,
    /// `Some(None)` takes the number away.
    #[expect(
        clippy::option_option,
        reason = "absent, null and a string are three things"
    )]
    contact_phone_number: Option<Option<String>>,
}

impl Input {
    /// Reads a body: one that has to be `complete`, or one that names what to change.
    fn parse(body: &[u8], complete: bool) -> Result<Self, ApiError> {
        json::parse(body, complete, |object, problems| {
            let name = object.string("name", problems, not_empty);
            let (mut street_address, mut postal_code, mut city, mut country) =
                (None, None, None, None);
            if let Some(mut address) = object.object("postal_address", "postal_address.", problems)
            {
                street_address = address.string("street_address", problems, not_empty);
                postal_code = address.string("postal_code", problems, not_empty);
                city = address.string("city", problems, not_empty);
                country = address.string("country", problems, two_capital_letters);
                address.finish(problems);
            }
            Self {
                name,
                street_address,
                postal_code,
                city,
                country,
                description: object.string("description", problems, not_empty),
                building_type: object.string("building_type", problems, known_building_type),
                price: object.euros("latest_price_eur", problems),
                surface_area_m2: object.measure("surface_area_m2", problems),
                rooms_count: object.integer("rooms_count", problems, 1),
                bedrooms_count: object.integer("bedrooms_count", problems, 0),
                contact_phone_number: object.nullable_string(
                    "contact_phone_number",
                    problems,
                    e164,
                ),
            }
        })
    }
}

fn not_empty(value: &str) -> Result<(), &'static str> {
    if value.is_empty() {
        Err("must not be empty")
    } else {
        Ok(())
    }
}

pub fn two_capital_letters(value: &str) -> Result<(), &'static str> {
    let right = value.len() == 2 && value.bytes().all(|letter| letter.is_ascii_uppercase());
    if right {
        Ok(())
    } else {
        Err("must be two capital letters")
    }
}

pub fn known_building_type(value: &str) -> Result<(), &'static str> {
    let right = ["STUDIO", "APARTMENT", "HOUSE"].contains(&value);
    if right {
        Ok(())
    } else {
        Err("must be STUDIO, APARTMENT or HOUSE")
    }
}

fn e164(value: &str) -> Result<(), &'static str> {
    let digits = value.strip_prefix('+').unwrap_or_default().as_bytes();
    let right = (2..=15).contains(&digits.len())
        && digits.iter().all(u8::is_ascii_digit)
        && digits.first() != Some(&b'0');
    if right {
        Ok(())
    } else {
        Err("must be a phone number such as +33123456789")
    }
}

/// The id in a path. What is no positive integer of 32 bits is the id of no listing.
pub fn id(text: &str) -> Result<i32, ApiError> {
    // Written as the service writes it: neither +7 nor 07 is listing 7.
    let id = text
        .parse::<i32>()
        .ok()
        .filter(|id| *id > 0 && id.to_string() == text);
    id.ok_or_else(|| ApiError::no_listing(text))
}

/// A value of the row to be written which, on the way, says who writes it: so it is said before any trigger of the row fires,
/// and for no longer than the transaction.
macro_rules! written_by {
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

/// The values of a statement, in the order of its parameters.
macro_rules! values {
    ($($value:expr),+ $(,)?) => {
        vec![$(Box::new($value) as Value),+]
    };
}

const INSERT: &str = concat!(
    "insert into public.listing (name, street_address, postal_code, city, country, description, building_type, \
     price, surface_area_m2, rooms_count, bedrooms_count, contact_phone_number, owner) \
     values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, ",
    written_by!("$14", "$13::text"),
    ") returning ",
    columns!()
);

pub async fn create(
    request: HttpRequest,
    payload: web::Payload,
    keys: web::Data<Keys>,
    commits: web::Data<Commits>,
) -> Result<HttpResponse, ApiError> {
    let (Writer { owner, actor }, body) = keys.admit(&request, payload).await?;
    json::require_type(&request, &["application/json"])?;
    let Input {
        name,
        street_address,
        postal_code,
        city,
        country,
        description,
        building_type,
        price,
        surface_area_m2,
        rooms_count,
        bedrooms_count,
        contact_phone_number,
    } = Input::parse(&body, true)?;
    let values = values![
        name,
        street_address,
        postal_code,
        city,
        country,
        description,
        building_type,
        price,
        surface_area_m2,
        rooms_count,
        bedrooms_count,
        contact_phone_number.flatten(),
        owner,
        actor,
    ];
    let rows = commits.share(None, INSERT, values).await?;
    let row = rows
        .first()
        .ok_or_else(|| ApiError::internal("an insert returned no row"))?;
    let location = format!("/listings/{}", row.try_get::<_, i32>("id")?);
    let mut response = respond(row, StatusCode::CREATED)?;
    let location = location.parse().map_err(ApiError::internal)?;
    response.headers_mut().insert(header::LOCATION, location);
    Ok(response)
}

pub async fn get(
    request: HttpRequest,
    path: web::Path<String>,
    reader: web::Data<Reader>,
) -> Result<HttpResponse, ApiError> {
    let id = id(&path)?;
    let stands = |rows: &Rows| {
        let version = rows.first().map(|row| row.try_get("version"));
        matches!(version, Some(Ok(version)) if conditions::agrees(&request, &conditions::etag(version)))
    };
    let rows = reader
        .ask(async |source| source.listing(id).await, stands)
        .await?;
    let row = rows.first().ok_or_else(|| ApiError::no_listing(id))?;
    let etag = conditions::etag(row.try_get("version")?);
    if conditions::is_known(&request, &etag) {
        return Ok(conditions::not_modified(etag));
    }
    respond(row, StatusCode::OK)
}

/// What the reader asks of many listings at once.
pub const SELECT_BATCH: &str = concat!(
    "select ",
    columns!(),
    " from public.listing where id = any($1)"
);

pub async fn replace(
    request: HttpRequest,
    path: web::Path<String>,
    payload: web::Payload,
    keys: web::Data<Keys>,
    commits: web::Data<Commits>,
) -> Result<HttpResponse, ApiError> {
    let (writer, body) = keys.admit(&request, payload).await?;
    let id = id(&path)?;
    json::require_type(&request, &["application/json"])?;
    let mut input = Input::parse(&body, true)?;
    // A replacement that names no number takes it away.
    input.contact_phone_number.get_or_insert(None);
    update(&request, &commits, writer, id, input).await
}

pub async fn patch(
    request: HttpRequest,
    path: web::Path<String>,
    payload: web::Payload,
    keys: web::Data<Keys>,
    commits: web::Data<Commits>,
) -> Result<HttpResponse, ApiError> {
    let (writer, body) = keys.admit(&request, payload).await?;
    let id = id(&path)?;
    json::require_type(
        &request,
        &["application/merge-patch+json", "application/json"],
    )?;
    let input = Input::parse(&body, false)?;
    update(&request, &commits, writer, id, input).await
}

/// Changes what is given, if the row still is what the client has seen, and still the writer's: all in one statement, so that
/// of two who saw the same, one wins, and so that a listing handed over meanwhile is safe. Where the statement waits for
/// another's, PostgreSQL holds these conditions against the row as that one left it.
const UPDATE: &str = concat!(
    "update public.listing set \
     name = coalesce($3, name), \
     street_address = coalesce($4, street_address), \
     postal_code = coalesce($5, postal_code), \
     city = coalesce($6, city), \
     country = coalesce($7, country), \
     description = coalesce($8, description), \
     building_type = coalesce($9, building_type), \
     price = coalesce($10, price), \
     surface_area_m2 = coalesce($11, surface_area_m2), \
     rooms_count = coalesce($12, rooms_count), \
     bedrooms_count = coalesce($13, bedrooms_count), \
     contact_phone_number = case when $14 then $15 else contact_phone_number end, \
     updated_date = ",
    written_by!("$17", "statement_timestamp()"),
    " where id = $1 and ($2::text[] is null or xmin::text = any($2)) and ($16::text is null or owner = $16) returning ",
    columns!()
);

async fn update(
    request: &HttpRequest,
    commits: &Commits,
    writer: Writer,
    id: i32,
    input: Input,
) -> Result<HttpResponse, ApiError> {
    let Input {
        name,
        street_address,
        postal_code,
        city,
        country,
        description,
        building_type,
        price,
        surface_area_m2,
        rooms_count,
        bedrooms_count,
        contact_phone_number,
    } = input;
    let Writer { owner, actor } = writer;
    let if_match = IfMatch::of(request);
    let values = values![
        id,
        if_match.versions(),
        name,
        street_address,
        postal_code,
        city,
        country,
        description,
        building_type,
        price,
        surface_area_m2,
        rooms_count,
        bedrooms_count,
        contact_phone_number.is_some(),
        contact_phone_number.flatten(),
        owner.clone(),
        actor,
    ];
    let rows = commits.share(Some(id), UPDATE, values).await?;
    match rows.first() {
        Some(row) => respond(row, StatusCode::OK),
        None => Err(why_not(commits, id, &if_match, owner).await),
    }
}

/// The history goes with the listing, but triggers of others may want to know who took it away.
const DELETE: &str = "delete from public.listing \
    where id = $1 and ($2::text[] is null or xmin::text = any($2)) and ($3::text is null or owner = $3) \
    and ($4::text is null or set_config('listing.actor', $4, true) is not null) returning id";

pub async fn delete(
    request: HttpRequest,
    path: web::Path<String>,
    payload: web::Payload,
    keys: web::Data<Keys>,
    commits: web::Data<Commits>,
) -> Result<HttpResponse, ApiError> {
    let (Writer { owner, actor }, _) = keys.admit(&request, payload).await?;
    let id = id(&path)?;
    let if_match = IfMatch::of(&request);
    let values = values![id, if_match.versions(), owner.clone(), actor];
    // A long history takes its time.
    let rows = commits.alone(id, DELETE, values).await?;
    if rows.is_empty() {
        return Err(why_not(&commits, id, &if_match, owner).await);
    }
    Ok(HttpResponse::NoContent().finish())
}

const IS_THEIRS: &str = "select $2::text is null or owner is not distinct from $2 as is_theirs \
    from public.listing where id = $1";

/// Why a write found no row: nothing there, not the writer's, or not what the client has seen.
async fn why_not(
    commits: &Commits,
    id: i32,
    if_match: &IfMatch,
    owner: Option<String>,
) -> ApiError {
    if if_match.is_any() && owner.is_none() {
        return ApiError::no_listing(id);
    }
    let rows = match commits.database.read(IS_THEIRS, &[&id, &owner]).await {
        Ok(rows) => rows,
        Err(error) => return error,
    };
    match rows.first().map(|row| row.try_get("is_theirs")) {
        None => ApiError::no_listing(id),
        Some(Ok(true)) if !if_match.is_any() => {
            let message = format!("if-match: listing {id} has changed since, read it again");
            ApiError::new(StatusCode::PRECONDITION_FAILED, message)
        }
        // Also what has become theirs since.
        Some(Ok(_)) => {
            let message = format!("this key may not change listing {id}");
            ApiError::new(StatusCode::FORBIDDEN, message)
        }
        Some(Err(error)) => error.into(),
    }
}

fn respond(row: &Row, status: StatusCode) -> Result<HttpResponse, ApiError> {
    let mut json = Vec::with_capacity(1024);
    write(row, &mut json)?;
    Ok(HttpResponse::build(status)
        .insert_header((header::ETAG, conditions::etag(row.try_get("version")?)))
        .insert_header((header::CACHE_CONTROL, "no-cache"))
        .content_type("application/json")
        .body(json))
}

pub async fn list(
    request: HttpRequest,
    reader: web::Data<Reader>,
) -> Result<HttpResponse, ApiError> {
    let mut parameters = Parameters::of(&request)?;
    let limit = parameters.limit()?;
    let after = parameters.integer("after")?.unwrap_or(0);
    let mut filter = Filter::default();
    filter.add(
        "building_type =",
        parameters.string("building_type", known_building_type)?,
    );
    filter.add(
        "country =",
        parameters.string("country", two_capital_letters)?,
    );
    filter.add("city =", parameters.string("city", not_empty)?);
    filter.add(
        "postal_code =",
        parameters.string("postal_code", not_empty)?,
    );
    filter.add("price >=", parameters.euros("min_price")?);
    filter.add("price <=", parameters.euros("max_price")?);
    filter.add("surface_area_m2 >=", parameters.measure("min_surface")?);
    filter.add("rooms_count >=", parameters.integer("min_rooms")?);
    parameters.finish()?;

    let mut response = HttpResponse::Ok();
    response.insert_header((header::CACHE_CONTROL, "no-cache"));
    let Some(limit) = limit else {
        let read = async move |row: Option<&Row>| {
            let after = row.map_or(Ok(after), |row| row.try_get("id"))?;
            filter.page(&reader, after, pages::PAGE).await
        };
        return pages::respond(&request, response, read, write).await;
    };
    // One more than asked for tells whether there is a further page.
    let mut rows = filter.page(&reader, after, limit + 1).await?;
    if pages::cut(&mut rows, limit)
        && let Some(last) = rows.last()
    {
        let last: i32 = last.try_get("id")?;
        let next = parameters.next_page(request.path(), &last.to_string());
        response.insert_header((header::LINK, next));
    }
    response.content_type("application/json");
    Ok(response.body(pages::array(&rows, write)?))
}

/// The conditions of a list and their values.
#[derive(Default)]
struct Filter {
    conditions: String,
    values: Vec<Value>,
}

impl Filter {
    fn add(&mut self, condition: &str, value: Option<impl ToSql + Sync + 'static>) {
        if let Some(value) = value {
            self.values.push(Box::new(value));
            // $1 is the id after which the page begins, $2 its size.
            let number = self.values.len() + 2;
            self.conditions = format!("{} and {condition} ${number}", self.conditions);
        }
    }

    async fn page(&self, reader: &Reader, after: i32, size: i64) -> Result<Vec<Row>, ApiError> {
        let conditions = &self.conditions;
        let sql = format!(
            "select {} from public.listing where id > $1{conditions} order by id limit $2",
            columns!()
        );
        let mut parameters: Vec<&(dyn ToSql + Sync)> = vec![&after, &size];
        for value in &self.values {
            parameters.push(value.as_ref());
        }
        let question = async |source: Rc<Source>| source.database.read(&sql, &parameters).await;
        reader.ask(question, |_| true).await
    }
}
