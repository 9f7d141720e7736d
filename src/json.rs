//! JSON bodies: read field by field, so that the answer names each field that is wrong, and written.

use std::borrow::Cow;
use std::error::Error;
use std::fmt;
use std::time::Duration;

use actix_web::error::PayloadError;
use actix_web::http::{StatusCode, header};
use actix_web::{HttpMessage, HttpRequest, web};
use bytes::{Bytes, BytesMut};
use chrono::{DateTime, Datelike, Timelike, Utc};
use futures_util::StreamExt;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer, ser};
use serde_json::value::RawValue;
use tokio::time::timeout;
use tokio_postgres::types::{FromSql, Type, accepts};

use crate::error::ApiError;
use crate::euros::{Euros, whole};

const MAX_BODY_BYTES: usize = 64 * 1024;
pub const TRICKLE_LIMIT: Duration = Duration::from_secs(10);

/// Refuses a request that does not declare its body as one of these.
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

/// The body of a request. It is read before anything is refused, so that the connection can serve the next request.
pub async fn read(mut payload: web::Payload) -> Result<Bytes, ApiError> {
    let too_large = || {
        ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "the body must not exceed 64 KiB",
        )
    };
    let read = async {
        let mut body = BytesMut::new();
        while let Some(chunk) = payload.next().await {
            let chunk = chunk.map_err(|error| match error {
                PayloadError::Overflow => too_large(),
                _ => ApiError::malformed(
                    "the body broke off, or is not in the form that its head says",
                ),
            })?;
            if body.len() + chunk.len() > MAX_BODY_BYTES {
                return Err(too_large());
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body.freeze())
    };
    let late = |_| {
        ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            "the body took too long to arrive",
        )
    };
    timeout(TRICKLE_LIMIT, read).await.map_err(late)?
}

/// Reads a body that has to be an object, by a function that takes its fields.
pub fn parse<T>(
    body: &[u8],
    complete: bool,
    read: impl FnOnce(&mut Object, &mut Problems) -> T,
) -> Result<T, ApiError> {
    let mut problems = Problems::default();
    let text = std::str::from_utf8(body).ok();
    let object = text.and_then(|text| Object::of(text, "", complete));
    let value = object.map(|mut object| {
        let value = read(&mut object, &mut problems);
        object.finish(&mut problems);
        value
    });
    match value {
        Some(value) if problems.0.is_empty() => return Ok(value),
        Some(_) => (),
        None => problems.0.push("the body must be an object".to_owned()),
    }
    // What is no JSON, down to the escapes and the size of the numbers, is refused as such, whatever was found in it.
    if let Err(error) = serde_json::from_slice::<serde_json::Value>(body) {
        // The position, without the words of the library, which may quote what was sent.
        let message = format!(
            "the body is not JSON: line {}, column {}",
            error.line(),
            error.column()
        );
        return Err(ApiError::malformed(message));
    }
    Err(ApiError::invalid(problems.0.join("; ")))
}

/// What is wrong with a body, each with the path of its field.
#[derive(Default)]
pub struct Problems(Vec<String>);

impl Problems {
    fn add(&mut self, path: &str, name: &str, problem: &str) {
        // Nobody mends more at once.
        if self.0.len() < 20 {
            self.0.push(format!("{path}{name}: {problem}"));
        }
    }
}

/// The fields of a JSON object, still as text.
pub struct Object<'a> {
    path: &'static str,
    fields: Vec<(Name<'a>, &'a RawValue)>,
    /// Whether a field that is not there is a problem.
    complete: bool,
}

/// A name, which is copied only where it has escapes.
#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'a> Object<'a> {
    /// None if it is something else.
    fn of(text: &'a str, path: &'static str, complete: bool) -> Option<Self> {
        let Fields(fields) = serde_json::from_str(text).ok()?;
        Some(Self {
            path,
            fields,
            complete,
        })
    }

    fn take(&mut self, name: &str, problems: &mut Problems) -> Option<&'a RawValue> {
        let is_it = |(field, _): &(Name, _)| field.0 == name;
        let index = self.fields.iter().position(is_it)?;
        let (_, value) = self.fields.remove(index);
        if self.fields.iter().any(is_it) {
            problems.add(self.path, name, "must be given once");
            self.fields.retain(|field| !is_it(field));
        }
        Some(value)
    }

    fn take_required(&mut self, name: &str, problems: &mut Problems) -> Option<&'a RawValue> {
        let value = self.take(name, problems);
        if value.is_none() && self.complete {
            problems.add(self.path, name, "is required");
        }
        value
    }

    /// An object in a field. `path` is the name of the field with a dot behind it.
    pub fn object(
        &mut self,
        name: &str,
        path: &'static str,
        problems: &mut Problems,
    ) -> Option<Self> {
        let value = self.take_required(name, problems)?;
        let object = Self::of(value.get(), path, self.complete);
        if object.is_none() {
            problems.add(self.path, name, "must be an object");
        }
        object
    }

    /// A field of a type, read by a function that says what is wrong with it.
    fn field<T>(
        &mut self,
        name: &str,
        problems: &mut Problems,
        read: impl FnOnce(&str) -> Result<T, &'static str>,
    ) -> Option<T> {
        let value = self.take_required(name, problems)?;
        let read = read(value.get());
        read.map_err(|problem| problems.add(self.path, name, problem))
            .ok()
    }

    pub fn string(
        &mut self,
        name: &str,
        problems: &mut Problems,
        rule: impl FnOnce(&str) -> Result<(), &'static str>,
    ) -> Option<String> {
        self.field(name, problems, |text| string(text, rule))
    }

    /// A string that is never required, and may be null, which is not the same as not being there.
    #[expect(
        clippy::option_option,
        reason = "absent, null and a string are three things"
    )]
    pub fn nullable_string(
        &mut self,
        name: &str,
        problems: &mut Problems,
        rule: impl FnOnce(&str) -> Result<(), &'static str>,
    ) -> Option<Option<String>> {
        let read = match self.take(name, problems)?.get() {
            "null" => Ok(None),
            text => string(text, rule).map(Some),
        };
        read.map_err(|problem| problems.add(self.path, name, problem))
            .ok()
    }

    pub fn euros(&mut self, name: &str, problems: &mut Problems) -> Option<Euros> {
        self.field(name, problems, Euros::parse)
    }

    pub fn integer(&mut self, name: &str, problems: &mut Problems, least: i32) -> Option<i32> {
        self.field(name, problems, |text| {
            if !text.starts_with(|first: char| first == '-' || first.is_ascii_digit()) {
                return Err("must be an integer");
            }
            match whole(text).map(i32::try_from) {
                Some(Ok(value)) if value >= least => Ok(value),
                Some(Ok(_)) => Err(if least == 1 {
                    "must be 1 or more"
                } else {
                    "must be 0 or more"
                }),
                _ => Err("must be an integer between -2147483648 and 2147483647"),
            }
        })
    }

    pub fn measure(&mut self, name: &str, problems: &mut Problems) -> Option<f64> {
        self.field(name, problems, |text| match text.parse::<f64>() {
            Ok(value) if value.is_finite() && value >= 0.0 => Ok(value + 0.0),
            Ok(value) if value.is_finite() => Err("must be 0 or more"),
            _ => Err("must be a number"),
        })
    }

    /// Reports the fields that nobody took: the contract knows no others.
    pub fn finish(self, problems: &mut Problems) {
        for (Name(name), _) in &self.fields {
            problems.add(self.path, name, "is not a field of a listing");
        }
    }
}

fn string(
    text: &str,
    rule: impl FnOnce(&str) -> Result<(), &'static str>,
) -> Result<String, &'static str> {
    let value: String = serde_json::from_str(text).map_err(|_| "must be a string")?;
    if value.contains('\0') {
        return Err("must not contain the character U+0000");
    }
    rule(&value).map(|()| value)
}

/// All fields in their order, also those that are given twice.
struct Fields<'a>(Vec<(Name<'a>, &'a RawValue)>);

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FieldsVisitor;
        impl<'de> Visitor<'de> for FieldsVisitor {
            type Value = Fields<'de>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields = Vec::with_capacity(12);
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(FieldsVisitor)
    }
}

/// A moment as the contract writes it: RFC 3339, in UTC, with microseconds, ending in Z.
pub struct Moment(pub DateTime<Utc>);

impl Serialize for Moment {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (date, time) = (self.0.date_naive(), self.0.time());
        // Digit by digit, because every answer holds moments and the formatting of chrono would be half of its cost.
        let mut text = [0; 27];
        let mut rest = text.iter_mut();
        let mut push = |byte| rest.next().map(|place| *place = byte);
        for (number, mut place, end) in [
            (date.year().unsigned_abs(), 1000, b'-'),
            (date.month(), 10, b'-'),
            (date.day(), 10, b'T'),
            (time.hour(), 10, b':'),
            (time.minute(), 10, b':'),
            (time.second(), 10, b'.'),
            (time.nanosecond() / 1000, 100_000, b'Z'),
        ] {
            while place > 0 {
                push(b'0' + u8::try_from(number / place % 10).unwrap_or_default());
                place /= 10;
            }
            push(end);
        }
        serializer.serialize_str(std::str::from_utf8(&text).map_err(ser::Error::custom)?)
    }
}

impl FromSql<'_> for Moment {
    fn from_sql(kind: &Type, raw: &[u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        DateTime::from_sql(kind, raw).map(Self)
    }

    accepts!(TIMESTAMPTZ);
}
