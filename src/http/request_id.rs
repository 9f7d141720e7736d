//! The request id: the client's own if it is safe to log, otherwise a new one.

use actix_web::http::header::{HeaderMap, HeaderName, HeaderValue};

pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

pub fn of(headers: &HeaderMap) -> HeaderValue {
    let is_safe = |id: &&HeaderValue| {
        let id = id.as_bytes();
        (1..=64).contains(&id.len()) && id.iter().all(|c| c.is_ascii_alphanumeric() || *c == b'-')
    };
    let given = headers.get(REQUEST_ID).filter(is_safe).cloned();
    given.unwrap_or_else(|| HeaderValue::from_str(&new()).unwrap_or(HeaderValue::from_static("0")))
}

pub fn new() -> String {
    format!("{:016x}", fastrand::u64(..))
}
