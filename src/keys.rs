//! Who writes: the key that a request presents, looked up anew for every request, so that a revocation has no cache to wait for.
//!
//! The key itself goes no further than this file, and its hash only to PostgreSQL.

use std::error::Error;
use std::fmt;
use std::rc::Rc;

use actix_web::HttpRequest;
use actix_web::http::header::{self, HeaderMap};
use actix_web::web::Payload;
use bytes::{Bytes, BytesMut};
use sha2::{Digest, Sha256};
use tokio_postgres::types::{FromSql, IsNull, ToSql, Type, accepts, to_sql_checked};

use crate::database::Database;
use crate::error::ApiError;
use crate::json;
use crate::reader::{Id, Lane};
use crate::settings::{Auth, Settings};

/// Whom a write is done for.
pub struct Writer {
    /// Whose listings may be written. `None`: all.
    pub owner: Option<String>,
    /// Who stands in the log. `None`: whom PostgreSQL itself finds there, the role that has logged in.
    pub actor: Option<String>,
}

/// `None`: nobody is asked for a key.
pub struct Keys(Option<Rc<Lane<KeyHash>>>);

impl Keys {
    /// The database is the one that is written to. A replica, or a standby that stands in for the primary, may know neither new
    /// keys nor revocations yet.
    pub fn new(settings: &Settings, database: &Database) -> Self {
        let sql = "select key_sha256, id, owner from public.find_api_keys($1)";
        let lane = || Lane::new(database, sql, settings.queue_size, true);
        Self((settings.auth == Auth::Keys).then(lane))
    }

    /// Whom a request writes for, and the body that it brings.
    pub async fn admit(
        &self,
        request: &HttpRequest,
        payload: Payload,
    ) -> Result<(Writer, Bytes), ApiError> {
        // Looked up when all is there, so that a revocation takes hold as late as it can.
        let body = json::read(payload).await;
        let Some(lane) = &self.0 else {
            let (owner, actor) = (None, None);
            return Ok((Writer { owner, actor }, body?));
        };
        let key = bearer(request.headers())?;
        let body = match body {
            // The connection ends with it, which leaves no time to look the key up.
            Err(error) if error.is_malformed() => return Err(error),
            body => body,
        };
        let found = lane.get(KeyHash(Sha256::digest(key).into())).await?;
        let row = found
            .first()
            .ok_or_else(|| ApiError::unauthorized("the key is not valid"))?;
        let owner: Option<String> = row.try_get("owner")?;
        let actor = match &owner {
            Some(owner) => owner.clone(),
            // No owner may look like this, by a rule of the table.
            None => format!("admin:{}", row.try_get::<_, i64>("id")?),
        };
        let actor = Some(actor);
        Ok((Writer { owner, actor }, body?))
    }
}

/// The key in the one `Authorization: Bearer …`, whatever the case of the scheme (RFC 9110) and made of what a key may be made
/// of (RFC 6750).
fn bearer(headers: &HeaderMap) -> Result<&str, ApiError> {
    let mut lines = headers.get_all(header::AUTHORIZATION);
    let line = lines
        .next()
        .ok_or_else(|| ApiError::unauthorized("is required, as Bearer and a key"))?;
    let key = || {
        let (scheme, key) = line.to_str().ok()?.split_once(' ')?;
        let key = key.trim_matches(' ');
        let may_stand_in_a_key = |c: char| c.is_ascii_alphanumeric() || "-._~+/".contains(c);
        let characters = key.trim_end_matches('=');
        let right = scheme.eq_ignore_ascii_case("Bearer")
            && !characters.is_empty()
            && characters.chars().all(may_stand_in_a_key);
        right.then_some(key)
    };
    match lines.next() {
        None => key(),
        Some(_) => None,
    }
    .ok_or_else(|| ApiError::unauthorized("must be Bearer and a key, once"))
}

/// What a key is looked up by.
#[derive(Clone, Eq, Hash, Ord, PartialEq, PartialOrd)]
struct KeyHash([u8; 32]);

impl Id for KeyHash {}

/// The driver writes the parameters of a statement into its log where somebody turns that on.
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
