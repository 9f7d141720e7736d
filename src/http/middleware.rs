//! What every response gets: a request id, CORS headers, a metric, and a line in the log.

use std::time::Instant;

use actix_web::body::MessageBody;
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::header::{self, HeaderMap, HeaderValue};
use actix_web::middleware::Next;
use actix_web::{Error, web};

use super::access_log::Entry;
use super::busy_poll::InFlight;
use super::error::Cause;
use super::exchange::{Served, Serving};
use super::metrics;
use super::request_id::{self, REQUEST_ID};
use crate::settings::Settings;

pub async fn middleware(
    mut request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<impl MessageBody>, Error> {
    let started = Instant::now();
    let serving = Serving::start(request.request());
    let id = request_id::of(request.headers());
    request.headers_mut().insert(REQUEST_ID, id.clone());
    keep_gzip_only(request.headers_mut());
    let origin = request.headers().get(header::ORIGIN).cloned();
    let settings = request.app_data::<web::Data<Settings>>().cloned();

    let in_flight = InFlight::start();
    let mut response = next.call(request).await?;
    in_flight.end();

    let route = response.request().match_pattern();
    let method = response.request().method().as_str();
    metrics::record(
        method,
        route.as_deref(),
        response.status(),
        started.elapsed(),
    );
    let cause = response.response_mut().extensions_mut().remove();
    let entry = Entry {
        request: response.request().clone(),
        id: id.clone(),
        started,
        status: response.status(),
        bytes: 0,
        cause: cause.map(|Cause(cause)| cause),
    };
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, id);
    if !headers.contains_key(header::VARY) {
        headers.insert(header::VARY, HeaderValue::from_static("Accept-Encoding"));
    }
    if let Some(settings) = settings {
        allow_origin(headers, &settings.cors_origins, origin);
    }
    Ok(response.map_body(|_, body| Served::new(body, serving, entry)))
}

/// Reduces `Accept-Encoding` to gzip, the one encoding that is served. A client that refuses every encoding gets none.
fn keep_gzip_only(headers: &mut HeaderMap) {
    let accepts_gzip = |entry: &str| {
        let (coding, quality) = entry.split_once(';').unwrap_or((entry, "q=1"));
        let quality = quality.trim().trim_start_matches("q=").parse();
        let refused = quality.is_ok_and(|quality: f32| quality <= 0.0);
        coding.trim().eq_ignore_ascii_case("gzip") && !refused
    };
    let gzip = headers
        .get_all(header::ACCEPT_ENCODING)
        .filter_map(|line| line.to_str().ok())
        .any(|line| line.split(',').any(accepts_gzip));
    headers.remove(header::ACCEPT_ENCODING);
    if gzip {
        headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("gzip"));
    }
}

/// An empty list allows any origin.
fn allow_origin(headers: &mut HeaderMap, allowed: &[String], origin: Option<HeaderValue>) {
    if allowed.is_empty() {
        headers.insert(
            header::ACCESS_CONTROL_ALLOW_ORIGIN,
            HeaderValue::from_static("*"),
        );
    } else {
        headers.append(header::VARY, HeaderValue::from_static("Origin"));
        let is_allowed = |origin: &HeaderValue| {
            let mut allowed = allowed.iter();
            allowed.any(|allowed| allowed.as_bytes() == origin.as_bytes())
        };
        let Some(origin) = origin.filter(is_allowed) else {
            return;
        };
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    }
    let exposed = HeaderValue::from_static(
        "ETag, Idempotent-Replayed, Link, Location, Retry-After, X-Request-Id",
    );
    headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, exposed);
}
