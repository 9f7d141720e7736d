//! Who may write: looks up the API key of each request, without a cache, so that a revoked key stops at once.
//!
//! The key goes no further than this file, and its hash only to PostgreSQL.

use std::error::Error;
use std::fmt;

use actix_web::HttpRequest;
use actix_web::http::header::{self, HeaderMap};
use actix_web::web::Payload;
use bytes::{Bytes, BytesMut};
use sha2::{Digest, Sha256};
use tokio_postgres::types::{FromSql, IsNull, ToSql, Type, accepts, to_sql_checked};

use crate::http::body;
use crate::http::error::ApiError;
use crate::postgres::{Database, Key, Lookup};
use crate::settings::AuthMode;

/// Who a write is for.
pub struct Writer {
    /// The owner whose listings may be written. `None`: all listings.
    pub owner: Option<String>,
    /// The value of `changed_by` in the log. `None`: the role that the service logged in as.
    pub actor: Option<String>,
}

/// `None`: no key is needed.
pub struct Auth(Option<Lookup<KeyHash>>);

pub const SELECT_KEYS: &str = "select key_sha256, id, owner from public.find_api_keys($1)";

impl Auth {
    /// Keys are looked up on the primary alone. A replica may not know new keys and revocations yet.
    pub fn new(database: &Database, mode: AuthMode) -> Self {
        let lookup = || database.lookup_on_primary(SELECT_KEYS);
        Self((mode == AuthMode::Keys).then(lookup))
    }

    /// The writer of a request, and its body.
    pub async fn admit(
        &self,
        request: &HttpRequest,
        payload: Payload,
    ) -> Result<(Writer, Bytes), ApiError> {
        // Looked up after the body has arrived, so that a revocation counts as late as possible.
        let body = body::read(request, payload).await;
        let Some(keys) = &self.0 else {
            let (owner, actor) = (None, None);
            return Ok((Writer { owner, actor }, body?));
        };
        let key = bearer(request.headers())?;
        let body = match body {
            // The connection closes after this error. There is no time for the lookup.
            Err(error) if error.is_malformed() => return Err(error),
            body => body,
        };
        let hash = KeyHash(Sha256::digest(key).into());
        let rows = keys.get(hash, |_| true).await?;
        let row = rows
            .first()
            .ok_or_else(|| ApiError::unauthorized("the key is not valid"))?;
        let owner: Option<String> = row.try_get("owner")?;
        let actor = match &owner {
            Some(owner) => owner.clone(),
            // A constraint of the table keeps owners from having such a name.
            None => format!("admin:{}", row.try_get::<_, i64>("id")?),
        };
        let actor = Some(actor);
        Ok((Writer { owner, actor }, body?))
    }
}

/// The key in the single `Authorization: Bearer …`. The case of the scheme does not matter (RFC 9110). The key has only the
/// characters of RFC 6750.
fn bearer(headers: &HeaderMap) -> Result<&str, ApiError> {
    let mut lines = headers.get_all(header::AUTHORIZATION);
    let line = lines
        .next()
        .ok_or_else(|| ApiError::unauthorized("is required, as Bearer followed by a key"))?;
    let key = || {
        let (scheme, key) = line.to_str().ok()?.split_once(' ')?;
        let key = key.trim_matches(' ');
        let is_key_character = |c: char| c.is_ascii_alphanumeric() || "-._~+/".contains(c);
        let characters = key.trim_end_matches('=');
        let right = scheme.eq_ignore_ascii_case("Bearer")
            && !characters.is_empty()
            && characters.chars().all(is_key_character);
        right.then_some(key)
    };
    match lines.next() {
        None => key(),
        Some(_) => None,
    }
    .ok_or_else(|| ApiError::unauthorized("must be one header, Bearer followed by a key"))
}

#[derive(Clone, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct KeyHash([u8; 32]);

impl Key for KeyHash {}

/// The driver can log the parameters of a statement. The hash must not be among them.
impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the hash of a key")
    }
}

impl ToSql for KeyHash {
    fn to_sql(
        &self,
        kind: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        self.0.as_slice().to_sql(kind, out)
    }

    accepts!(BYTEA);
    to_sql_checked!();
}

impl FromSql<'_> for KeyHash {
    fn from_sql(kind: &Type, raw: &[u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        Ok(Self(<&[u8]>::from_sql(kind, raw)?.try_into()?))
    }

    accepts!(BYTEA);
}
