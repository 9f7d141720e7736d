//! The routes of the API: every path with its methods and handlers.

mod auth;
mod change_cursor;
mod change_feed;
mod change_page;
mod changes;
mod chart;
mod docs;
mod listing_filter;
mod listing_input;
mod listings;
mod prices;

use actix_web::http::{Method, StatusCode, header};
use actix_web::web::{self, Data, ServiceConfig};
use actix_web::{HttpRequest, HttpResponse, Resource, Route, guard};

pub use self::change_feed::Feed;

use crate::http::body;
use crate::http::error::ApiError;
use crate::postgres::Database;
use crate::settings::{AuthMode, Settings};

/// Adds the routes, and what their handlers need on this worker.
pub fn configure(
    config: &mut ServiceConfig,
    database: Database,
    feed: Data<Feed>,
    settings: &Settings,
) {
    let database = Data::new(database);
    config
        .app_data(Data::new(listings::ById::new(&database)))
        .app_data(Data::new(prices::ByListing::new(&database)))
        .app_data(Data::new(auth::Auth::new(&database, settings)))
        .app_data(database)
        .app_data(feed)
        .service(
            resource("/listings", "GET, HEAD, POST, OPTIONS")
                .route(get().to(listings::list))
                .route(web::post().to(listings::create)),
        )
        .service(
            resource("/listings/{id}", "GET, HEAD, PUT, PATCH, DELETE, OPTIONS")
                .route(get().to(listings::get))
                .route(web::put().to(listings::replace))
                .route(web::patch().to(listings::patch))
                .route(web::delete().to(listings::delete)),
        )
        .service(
            resource("/listings/{id}/prices", "GET, HEAD, OPTIONS").route(get().to(prices::list)),
        )
        .service(
            resource("/listings/{id}/prices.svg", "GET, HEAD, OPTIONS").route(get().to(chart::get)),
        )
        .service(resource("/", "GET, HEAD, OPTIONS").route(get().to(docs::root)))
        .service(resource("/changes", "GET, HEAD, OPTIONS").route(get().to(changes::list)))
        .service(resource("/openapi.yaml", "GET, HEAD, OPTIONS").route(get().to(docs::openapi)))
        .service(resource("/docs", "GET, HEAD, OPTIONS").route(get().to(docs::page)))
        .service(resource("/docs/{file}", "GET, HEAD, OPTIONS").route(get().to(docs::file)))
        .default_service(web::to(no_such_path));
}

/// Every statement that the API runs, with a request that runs it.
pub fn statements(auth: AuthMode) -> Vec<(&'static str, String)> {
    let mut statements = listings::statements();
    statements.extend(prices::statements());
    statements.extend(change_page::statements());
    if auth == AuthMode::Keys {
        let keys = auth::STATEMENTS.map(|sql| ("a lookup of API keys", sql.to_owned()));
        statements.extend(keys);
    }
    statements
}

/// How many lookups each worker has on a replica, and on the primary. Each has a connection of its own.
pub fn lookups(auth: AuthMode) -> (usize, usize) {
    (2, 2 + usize::from(auth == AuthMode::Keys))
}

/// Every GET also answers HEAD.
fn get() -> Route {
    web::route().guard(guard::Any(guard::Get()).or(guard::Head()))
}

/// A path that answers OPTIONS, and refuses every other method that has no route.
fn resource(path: &str, allow: &'static str) -> Resource {
    let fallback = move |request: HttpRequest, payload: web::Payload| async move {
        body::read(&request, payload).await?;
        if *request.method() == Method::OPTIONS {
            return Ok(options(&request, allow));
        }
        let message = format!(
            "{} is not allowed on this path, use {allow}",
            request.method()
        );
        let error = ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message);
        let mut response = HttpResponse::from_error(error);
        let allow = header::HeaderValue::from_static(allow);
        response.headers_mut().insert(header::ALLOW, allow);
        Ok::<_, ApiError>(response)
    };
    web::resource(path).default_service(web::to(fallback))
}

/// Also answers the preflight of a browser, which may ask for any header.
fn options(request: &HttpRequest, allow: &'static str) -> HttpResponse {
    let mut response = HttpResponse::NoContent();
    response.insert_header((header::ALLOW, allow));
    let headers = request.headers();
    if headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD) {
        response
            .insert_header((header::ACCESS_CONTROL_ALLOW_METHODS, allow))
            .insert_header((header::ACCESS_CONTROL_MAX_AGE, "86400"));
    }
    if let Some(requested) = headers.get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
        response
            .insert_header((header::ACCESS_CONTROL_ALLOW_HEADERS, requested))
            .insert_header((header::VARY, "Access-Control-Request-Headers"));
    }
    response.finish()
}

async fn no_such_path(
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, ApiError> {
    body::read(&request, payload).await?;
    Err(ApiError::new(
        StatusCode::NOT_FOUND,
        "no such path, see /openapi.yaml",
    ))
}
