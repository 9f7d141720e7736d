//! A date and time as the contract writes it: RFC 3339 in UTC with microseconds, ending in Z.

use std::error::Error;

use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Serialize, Serializer};
use tokio_postgres::types::{FromSql, Type, accepts};

pub struct Timestamp(DateTime<Utc>);

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // Always six decimals: the form of `DateTime` itself leaves out zeros at the end.
        serializer.serialize_str(&self.0.to_rfc3339_opts(SecondsFormat::Micros, true))
    }
}

impl FromSql<'_> for Timestamp {
    fn from_sql(kind: &Type, raw: &[u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        DateTime::from_sql(kind, raw).map(Self)
    }

    accepts!(TIMESTAMPTZ);
}
