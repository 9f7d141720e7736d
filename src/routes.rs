//! The one table of routes: every path with its methods, and what the rest gets.

use actix_web::http::{Method, StatusCode, header};
use actix_web::web::{self, ServiceConfig};
use actix_web::{HttpRequest, HttpResponse, Resource, Route, guard};

use crate::error::ApiError;
use crate::{docs, json, listings, prices};

pub fn routes(config: &mut ServiceConfig) {
    config
        .service(resource(
            "/listings",
            "GET, HEAD, POST, OPTIONS",
            |resource| {
                resource
                    .route(get().to(listings::list))
                    .route(web::post().to(listings::create))
            },
        ))
        .service(resource(
            "/listings/{id}",
            "GET, HEAD, PUT, PATCH, DELETE, OPTIONS",
            |resource| {
                resource
                    .route(get().to(listings::get))
                    .route(web::put().to(listings::replace))
                    .route(web::patch().to(listings::patch))
                    .route(web::delete().to(listings::delete))
            },
        ))
        .service(resource(
            "/listings/{id}/prices",
            "GET, HEAD, OPTIONS",
            |resource| resource.route(get().to(prices::list)),
        ))
        .service(resource(
            "/openapi.yaml",
            "GET, HEAD, OPTIONS",
            |resource| resource.route(get().to(docs::openapi)),
        ))
        .service(resource("/docs", "GET, HEAD, OPTIONS", |resource| {
            resource.route(get().to(docs::page))
        }))
        .service(resource("/docs/{file}", "GET, HEAD, OPTIONS", |resource| {
            resource.route(get().to(docs::file))
        }))
        .default_service(web::to(no_such_path));
}

/// Every GET answers HEAD as well.
fn get() -> Route {
    web::route().guard(guard::Any(guard::Get()).or(guard::Head()))
}

/// A path with its methods. It answers OPTIONS too, and any other method with those that it has.
fn resource(
    path: &str,
    allow: &'static str,
    methods: impl FnOnce(Resource) -> Resource,
) -> Resource {
    methods(web::resource(path)).default_service(web::to(
        move |request: HttpRequest, payload: web::Payload| async move {
            json::read(payload).await?;
            if *request.method() == Method::OPTIONS {
                return Ok(options(&request, allow));
            }
            let message = format!("{} is not served here, only {allow}", request.method());
            let mut response =
                HttpResponse::from_error(ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message));
            response
                .headers_mut()
                .insert(header::ALLOW, header::HeaderValue::from_static(allow));
            Ok::<_, ApiError>(response)
        },
    ))
}

/// Also what a browser asks before it lets a page of another origin write.
fn options(request: &HttpRequest, allow: &'static str) -> HttpResponse {
    let mut response = HttpResponse::NoContent();
    response.insert_header((header::ALLOW, allow));
    if request
        .headers()
        .contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
    {
        response
            .insert_header((header::ACCESS_CONTROL_ALLOW_METHODS, allow))
            .insert_header((
                header::ACCESS_CONTROL_ALLOW_HEADERS,
                "Authorization, Content-Type, If-Match, If-None-Match, X-Request-Id",
            ))
            .insert_header((header::ACCESS_CONTROL_MAX_AGE, "86400"));
    }
    response.finish()
}

async fn no_such_path(payload: web::Payload) -> Result<HttpResponse, ApiError> {
    json::read(payload).await?;
    Err(ApiError::new(
        StatusCode::NOT_FOUND,
        "there is nothing at this path, see /openapi.yaml",
    ))
}
