//! Reads the body of a request, within limits of size and time.

use std::time::Duration;

use actix_web::error::PayloadError;
use actix_web::http::header::{self, HeaderValue};
use actix_web::http::{Method, StatusCode};
use actix_web::{HttpMessage, HttpRequest, web};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use tokio::time::timeout;

use super::error::ApiError;
use super::exchange::Receiving;

const MAX_BYTES: usize = 64 * 1024;

/// For the head of a request, and again for its body.
pub const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// Reads the body to its end. A handler does this before it refuses a request, so that the connection can serve the next one.
pub async fn read(request: &HttpRequest, mut payload: web::Payload) -> Result<Bytes, ApiError> {
    // For actix-http, the body of these requests never ends.
    if request.method() == Method::CONNECT {
        return Ok(Bytes::new());
    }
    let is_websocket = |value: &HeaderValue| value.as_bytes().eq_ignore_ascii_case(b"websocket");
    if request.headers().get_all(header::UPGRADE).any(is_websocket) {
        return Err(ApiError::malformed("upgrade: websocket is not supported"));
    }
    let too_large = || {
        let message = "the body must not exceed 64 KiB";
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message)
    };
    let receiving = Receiving::start(request);
    let read = async {
        let mut body = BytesMut::new();
        while let Some(chunk) = payload.next().await {
            let chunk = chunk.map_err(|error| match error {
                PayloadError::Overflow => too_large(),
                _ => ApiError::malformed("the body is incomplete or does not match its headers"),
            })?;
            if body.len() + chunk.len() > MAX_BYTES {
                return Err(too_large());
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body.freeze())
    };
    let late = |_| {
        let message = "the body took too long to arrive";
        ApiError::new(StatusCode::REQUEST_TIMEOUT, message)
    };
    let body = timeout(READ_TIMEOUT, read).await.map_err(late)??;
    if let Some(receiving) = receiving {
        receiving.complete();
    }
    Ok(body)
}

/// Refuses a request whose body is not declared as one of these media types.
pub fn require_type(request: &HttpRequest, media_types: &[&str]) -> Result<(), ApiError> {
    let declared = request.content_type().to_ascii_lowercase();
    let message = if !media_types.contains(&declared.as_str()) {
        format!("content-type: must be {}", media_types.join(" or "))
    } else if request.headers().contains_key(header::CONTENT_ENCODING) {
        "content-encoding: must be absent".to_owned()
    } else {
        return Ok(());
    };
    Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message))
}
