//! What every response shares, whatever produced it: a request id, CORS, the error body, a line in the log, a metric.

use std::time::Instant;

use actix_web::body::MessageBody;
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::header::{self, HeaderMap, HeaderName, HeaderValue};
use actix_web::middleware::Next;
use actix_web::{Error, web};

use crate::awake::UnderWay;
use crate::error::Cause;
use crate::metrics::Metrics;
use crate::settings::Settings;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

pub async fn edge(
    mut request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<impl MessageBody>, Error> {
    let begun = Instant::now();
    let id = request_id(request.headers());
    request.headers_mut().insert(REQUEST_ID, id.clone());
    offer_gzip_or_nothing(request.headers_mut());
    let origin = request.headers().get(header::ORIGIN).cloned();
    let settings = request.app_data::<web::Data<Settings>>().cloned();
    let metrics = request.app_data::<web::Data<Metrics>>().cloned();

    let under_way = UnderWay::begin();
    let mut response = next.call(request).await?;
    under_way.end();

    if let Some(metrics) = metrics {
        let route = response.request().match_pattern();
        let method = response.request().method().as_str();
        metrics.observe(method, route.as_deref(), response.status(), begun.elapsed());
    }
    let cause = response.response_mut().extensions_mut().remove();
    if let Some(Cause(cause)) = cause {
        log::error!(
            "{} {}: {cause}",
            id.to_str().unwrap_or_default(),
            response.status().as_u16()
        );
    }
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, id);
    if !headers.contains_key(header::VARY) {
        headers.insert(header::VARY, HeaderValue::from_static("Accept-Encoding"));
    }
    if let Some(settings) = settings {
        allow_origin(headers, &settings.cors_origins, origin);
    }
    Ok(response)
}

/// The client's request id where it has one that can stand in a log, else a new one.
pub fn request_id(headers: &HeaderMap) -> HeaderValue {
    let usable = |id: &&HeaderValue| {
        let id = id.as_bytes();
        (1..=64).contains(&id.len()) && id.iter().all(|c| c.is_ascii_alphanumeric() || *c == b'-')
    };
    let given = headers.get(REQUEST_ID).filter(usable).cloned();
    given.unwrap_or_else(|| {
        HeaderValue::from_str(&new_request_id()).unwrap_or(HeaderValue::from_static("0"))
    })
}

pub fn new_request_id() -> String {
    format!("{:016x}", fastrand::u64(..))
}

/// Leaves of what the client accepts the one encoding that is served. A client that refuses even the plain form gets it.
fn offer_gzip_or_nothing(headers: &mut HeaderMap) {
    let gzip = headers
        .get_all(header::ACCEPT_ENCODING)
        .filter_map(|line| line.to_str().ok())
        .any(|line| {
            line.split(',').any(|entry| {
                let (coding, quality) = entry.split_once(';').unwrap_or((entry, "q=1"));
                let refused = quality
                    .trim()
                    .trim_start_matches("q=")
                    .parse()
                    .is_ok_and(|quality: f32| quality <= 0.0);
                coding.trim().eq_ignore_ascii_case("gzip") && !refused
            })
        });
    headers.remove(header::ACCEPT_ENCODING);
    if gzip {
        headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("gzip"));
    }
}

fn allow_origin(headers: &mut HeaderMap, allowed: &[String], origin: Option<HeaderValue>) {
    if allowed.is_empty() {
        headers.insert(
            header::ACCESS_CONTROL_ALLOW_ORIGIN,
            HeaderValue::from_static("*"),
        );
    } else {
        headers.append(header::VARY, HeaderValue::from_static("Origin"));
        let Some(origin) = origin.filter(|origin| {
            allowed
                .iter()
                .any(|allowed| allowed.as_bytes() == origin.as_bytes())
        }) else {
            return;
        };
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    }
    let exposed = HeaderValue::from_static("ETag, Link, Location, Retry-After, X-Request-Id");
    headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, exposed);
}
