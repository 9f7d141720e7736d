//! Conditional requests: `ETag`, `If-None-Match`, `If-Match`.

use actix_web::http::header::{self, EntityTag, Header, IfMatch, IfNoneMatch};
use actix_web::{HttpRequest, HttpResponse};

/// A strong tag.
pub fn etag(version: &str) -> EntityTag {
    EntityTag::new_strong(version.to_owned())
}

/// Whether the client already has this version (`If-None-Match`, weak comparison).
pub fn is_known(request: &HttpRequest, etag: &EntityTag) -> bool {
    named_tags(request).is_none_or(|tags| tags.iter().any(|tag| tag.weak_eq(etag)))
}

/// Whether a replica may answer with this version. If the client names another version, or several, only the primary knows
/// which is the newest.
pub fn is_fresh(request: &HttpRequest, etag: &EntityTag) -> bool {
    named_tags(request).is_none_or(|tags| match &tags[..] {
        [] => true,
        [tag] => tag.weak_eq(etag),
        _ => false,
    })
}

/// The tags of `If-None-Match`. `None` means any. A header that cannot be read has none.
fn named_tags(request: &HttpRequest) -> Option<Vec<EntityTag>> {
    match IfNoneMatch::parse(request) {
        Ok(IfNoneMatch::Any) => None,
        Ok(IfNoneMatch::Items(tags)) => Some(tags),
        Err(_) => Some(Vec::new()),
    }
}

/// Whether a write must create what it writes (`If-None-Match: *`).
pub fn must_create(request: &HttpRequest) -> bool {
    matches!(IfNoneMatch::parse(request), Ok(IfNoneMatch::Any))
}

pub fn not_modified(etag: EntityTag) -> HttpResponse {
    HttpResponse::NotModified()
        .insert_header(header::ETag(etag))
        .insert_header((header::CACHE_CONTROL, "no-cache"))
        .finish()
}

/// The versions that a write may replace, from `If-Match`. `None` means any. A header without a strong tag matches no
/// version.
pub fn expected_versions(request: &HttpRequest) -> Option<Vec<String>> {
    if !request.headers().contains_key(IfMatch::name()) {
        return None;
    }
    let strong = |tag: &EntityTag| (!tag.weak).then(|| tag.tag().to_owned());
    match IfMatch::parse(request) {
        Ok(IfMatch::Any) => None,
        Ok(IfMatch::Items(tags)) => Some(tags.iter().filter_map(strong).collect()),
        Err(_) => Some(Vec::new()),
    }
}
