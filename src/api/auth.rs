//! Who may write: looks up the API key of each request, without a cache, so that a revoked key stops at once.
//!
//! The key goes no further than this file, and its hash only to PostgreSQL.

use std::error::Error as StdError;
use std::fmt;
use std::time::{Duration, Instant};

use actix_web::HttpRequest;
use actix_web::http::header::{self, HeaderMap};
use actix_web::web::{Data, Payload};
use bytes::{Bytes, BytesMut};
use sha2::{Digest, Sha256};
use tokio_postgres::types::{FromSql, IsNull, ToSql, Type, accepts, to_sql_checked};

use crate::http::body;
use crate::http::error::ApiError;
use crate::postgres::{Database, Error, ErrorKind, Key, Lookup, LookupSql, Rows};
use crate::settings::{AuthMode, Settings};

/// Who a write is for.
pub struct Writer {
    /// The owner whose listings may be written. `None`: all listings.
    pub owner: Option<String>,
    /// The value of `changed_by` in the log. `None`: the role that the service logged in as.
    pub actor: Option<String>,
    /// Behind a sharding proxy, the random key whose server had the API key.
    pub key: Option<String>,
}

/// What a write is about. A sharding proxy sends the lookup of the API key to the same server, so no other one has to be up.
pub enum Subject<'a> {
    Listing(i32),
    /// A new listing with an idempotency key.
    Key(&'a str),
    /// Each server has all API keys.
    Any,
}

/// `None`: no key is needed.
pub struct Auth(Option<Keys>);

enum Keys {
    Batched(Lookup<KeyHash>),
    /// Behind a sharding proxy.
    Routed(Data<Database>),
}

const SELECT_KEYS: LookupSql = LookupSql {
    one: "select key_sha256, id, owner from public.find_api_keys(array[$1::bytea])",
    many: "select key_sha256, id, owner from public.find_api_keys($1)",
};

/// The proxy reads the first query. PostgreSQL does not run it.
const SELECT_KEY_AT_LISTING: &str = "with subject as (select from public.listing where id = $2) \
    select key_sha256, id, owner from public.find_api_keys(array[$1::bytea])";
const SELECT_KEY_AT_KEY: &str = "with subject as (select from public.idempotency_key where key = $2) \
    select key_sha256, id, owner from public.find_api_keys(array[$1::bytea])";

/// Every statement of this file.
pub const STATEMENTS: [&str; 4] = [
    SELECT_KEYS.one,
    SELECT_KEYS.many,
    SELECT_KEY_AT_LISTING,
    SELECT_KEY_AT_KEY,
];

impl Auth {
    /// Keys are looked up on the primary alone. A replica may not know new keys and revocations yet.
    pub fn new(database: &Data<Database>, settings: &Settings) -> Self {
        Self(match settings.auth {
            AuthMode::Off => None,
            AuthMode::Keys if settings.sharding_proxy => Some(Keys::Routed(database.clone())),
            AuthMode::Keys => Some(Keys::Batched(database.lookup_on_primary(SELECT_KEYS))),
        })
    }

    /// The writer of a request, and its body.
    pub async fn admit(
        &self,
        request: &HttpRequest,
        payload: Payload,
        subject: Subject<'_>,
    ) -> Result<(Writer, Bytes), ApiError> {
        // Looked up after the body has arrived, so that a revocation counts as late as possible.
        let body = body::read(request, payload).await;
        let Some(keys) = &self.0 else {
            let writer = Writer {
                owner: None,
                actor: None,
                key: None,
            };
            return Ok((writer, body?));
        };
        let key = bearer(request.headers())?;
        let body = match body {
            // The connection closes after this error. There is no time for the lookup.
            Err(error) if error.is_malformed() => return Err(error),
            body => body,
        };
        let hash = KeyHash(Sha256::digest(key).into());
        let (key, rows) = keys.find(hash, subject).await?;
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
        Ok((Writer { owner, actor, key }, body?))
    }
}

impl Keys {
    async fn find(
        &self,
        hash: KeyHash,
        subject: Subject<'_>,
    ) -> Result<(Option<String>, Rows), Error> {
        let database = match self {
            Self::Batched(lookup) => return Ok((None, lookup.get_on_primary(hash).await?)),
            Self::Routed(database) => database,
        };
        let select = async |sql: &str, value: &(dyn ToSql + Sync)| {
            database.read_on_primary(sql, &[&hash, value]).await
        };
        let (key, rows) = match subject {
            Subject::Listing(id) => (None, select(SELECT_KEY_AT_LISTING, &id).await?),
            Subject::Key(key) => (None, select(SELECT_KEY_AT_KEY, &key).await?),
            Subject::Any => {
                let select = async |key: &str| select(SELECT_KEY_AT_KEY, &key).await;
                let (key, rows) = with_random_key(select).await?;
                (Some(key), rows)
            }
        };
        Ok((key, Rows::new(rows)))
    }
}

/// Runs a query that a sharding proxy sends to a server by its key, with random keys until a server answers. Returns the key.
pub async fn with_random_key<T>(
    query: impl AsyncFn(&str) -> Result<T, Error>,
) -> Result<(String, T), Error> {
    /// With half of the servers down, one of 256 requests finds none.
    const MAX_ATTEMPTS: usize = 8;
    const TIMEOUT: Duration = Duration::from_secs(2);
    let begun = Instant::now();
    let mut attempts = 0;
    loop {
        attempts += 1;
        let may_repeat = attempts < MAX_ATTEMPTS && begun.elapsed() < TIMEOUT;
        let key = fastrand::u64(..).to_string();
        match query(&key).await {
            Err(error) if error.kind == ErrorKind::Unavailable && may_repeat => (),
            result => return Ok((key, result?)),
        }
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
    ) -> Result<IsNull, Box<dyn StdError + Sync + Send>> {
        self.0.as_slice().to_sql(kind, out)
    }

    accepts!(BYTEA);
    to_sql_checked!();
}

impl FromSql<'_> for KeyHash {
    fn from_sql(kind: &Type, raw: &[u8]) -> Result<Self, Box<dyn StdError + Sync + Send>> {
        Ok(Self(<&[u8]>::from_sql(kind, raw)?.try_into()?))
    }

    accepts!(BYTEA);
}
