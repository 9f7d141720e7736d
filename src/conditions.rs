//! Conditional requests: what a client has seen, as it says by ETag.

use actix_web::http::header;
use actix_web::{HttpRequest, HttpResponse};

pub fn etag(version: &str) -> String {
    format!("\"{version}\"")
}

/// Whether the client has what it asks for already (`If-None-Match`, by weak comparison).
pub fn is_known(request: &HttpRequest, etag: &str) -> bool {
    let mut tags = tags(request, &header::IF_NONE_MATCH);
    tags.any(|tag| tag == "*" || tag.trim_start_matches("W/") == etag)
}

/// Whether a replica may answer with this version. Of other versions that a client names, only the primary can say that they
/// are outdated.
pub fn agrees(request: &HttpRequest, etag: &str) -> bool {
    let named = tags(request, &header::IF_NONE_MATCH).count();
    named == 0 || named == 1 && is_known(request, etag)
}

pub fn not_modified(etag: String) -> HttpResponse {
    HttpResponse::NotModified()
        .insert_header((header::ETAG, etag))
        .insert_header((header::CACHE_CONTROL, "no-cache"))
        .finish()
}

/// The versions of a listing that a write may replace. `None`: any.
pub struct IfMatch(Option<Vec<String>>);

impl IfMatch {
    pub fn of(request: &HttpRequest) -> Self {
        if !request.headers().contains_key(header::IF_MATCH) {
            return Self(None);
        }
        if tags(request, &header::IF_MATCH).any(|tag| tag == "*") {
            return Self(None);
        }
        let strong = |tag: &str| Some(tag.strip_prefix('"')?.strip_suffix('"')?.to_owned());
        Self(Some(
            tags(request, &header::IF_MATCH)
                .filter_map(strong)
                .collect(),
        ))
    }

    pub fn versions(&self) -> Option<Vec<String>> {
        self.0.clone()
    }

    pub fn is_any(&self) -> bool {
        self.0.is_none()
    }
}

/// The entries of a header, which may be given in several lines. No ETag of ours holds a comma.
fn tags<'a>(
    request: &'a HttpRequest,
    name: &'a header::HeaderName,
) -> impl Iterator<Item = &'a str> {
    let lines = request
        .headers()
        .get_all(name)
        .filter_map(|line| line.to_str().ok());
    lines.flat_map(|line| line.split(',')).map(str::trim)
}
