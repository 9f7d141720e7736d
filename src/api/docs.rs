//! The OpenAPI document, and a Swagger UI page for it. Both are part of the program.

use actix_web::http::{StatusCode, header};
use actix_web::{HttpResponse, web};

use crate::http::error::ApiError;

const OPENAPI: &str = include_str!("openapi.yaml");
const CSS: &str = include_str!(concat!(env!("OUT_DIR"), "/swagger-ui.css"));
const JAVASCRIPT: &str = include_str!(concat!(env!("OUT_DIR"), "/swagger-ui-bundle.js"));
const PAGE: &str = r#"<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Listing API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/docs/swagger-ui.css">
<div id="docs"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</html>
"#;
const START: &str = "SwaggerUIBundle({ url: '/openapi.yaml', dom_id: '#docs', validatorUrl: null, deepLinking: true });\n";

fn text(media_type: &'static str, text: &'static str) -> HttpResponse {
    HttpResponse::Ok()
        .content_type(media_type)
        .insert_header((header::CACHE_CONTROL, "no-cache"))
        // The page loads nothing from other hosts.
        .insert_header((
            header::CONTENT_SECURITY_POLICY,
            "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:",
        ))
        .body(text)
}

/// Leads a person who opens the address of the service to the page.
pub async fn root() -> HttpResponse {
    HttpResponse::Found()
        .insert_header((header::LOCATION, "/docs"))
        .insert_header((header::CACHE_CONTROL, "no-cache"))
        .finish()
}

pub async fn openapi() -> HttpResponse {
    text("application/yaml", OPENAPI)
}

pub async fn page() -> HttpResponse {
    text("text/html; charset=utf-8", PAGE)
}

pub async fn file(name: web::Path<String>) -> Result<HttpResponse, ApiError> {
    match name.as_str() {
        "swagger-ui.css" => Ok(text("text/css; charset=utf-8", CSS)),
        "swagger-ui-bundle.js" => Ok(text("text/javascript; charset=utf-8", JAVASCRIPT)),
        "start.js" => Ok(text("text/javascript; charset=utf-8", START)),
        name => Err(ApiError::new(
            StatusCode::NOT_FOUND,
            format!("no such file: {name}"),
        )),
    }
}
