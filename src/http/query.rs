//! The parameters of a query. Each has a rule and may be given only once.

use std::time::Duration;

use actix_web::HttpRequest;
use actix_web::web;
use chrono::{DateTime, Utc};
use percent_encoding::percent_decode_str;

use super::error::ApiError;
use crate::types::euros::{Euros, whole};

pub struct Query {
    given: Vec<(String, String)>,
    /// The names that were read. All others are unknown.
    known: Vec<&'static str>,
}

/// More than any path has. The time to check the names grows with the square of their number.
const MAX_PARAMETERS: usize = 20;

impl Query {
    pub fn parse(request: &HttpRequest) -> Result<Self, ApiError> {
        let pairs = || request.query_string().split('&');
        let given = pairs().filter(|pair| !pair.is_empty());
        if given.take(MAX_PARAMETERS + 1).count() > MAX_PARAMETERS {
            return Err(ApiError::malformed(format!(
                "the query must have at most {MAX_PARAMETERS} parameters"
            )));
        }
        for pair in pairs() {
            if percent_decode_str(pair).decode_utf8().is_err() {
                let name = pair.split('=').next().unwrap_or_default();
                return Err(ApiError::malformed(format!("{name}: must be UTF-8")));
            }
        }
        let query = web::Query::<Vec<(String, String)>>::from_query(request.query_string());
        let given = query
            .map_err(|_| ApiError::malformed("the query cannot be read"))?
            .into_inner();
        for (index, (name, _)) in given.iter().enumerate() {
            if given.iter().take(index).any(|(seen, _)| seen == name) {
                return Err(ApiError::malformed(format!(
                    "{name}: must be given only once"
                )));
            }
        }
        Ok(Self {
            given,
            known: Vec::new(),
        })
    }

    fn read<T>(
        &mut self,
        name: &'static str,
        read: impl FnOnce(&str) -> Result<T, &'static str>,
    ) -> Result<Option<T>, ApiError> {
        self.known.push(name);
        let value = self.given.iter().find(|(given, _)| given == name);
        let read = value.map(|(_, value)| read(value)).transpose();
        read.map_err(|problem| ApiError::malformed(format!("{name}: {problem}")))
    }

    pub fn limit(&mut self) -> Result<Option<i64>, ApiError> {
        self.read("limit", |text| match digits(text) {
            Some(limit @ 1..=1000) => Ok(limit),
            _ => Err("must be between 1 and 1000"),
        })
    }

    /// How long to wait, if there is nothing to return yet.
    pub fn wait(&mut self) -> Result<Duration, ApiError> {
        let wait = self.read("wait", |text| match digits(text).map(u64::try_from) {
            Some(Ok(seconds @ 0..=60)) => Ok(Duration::from_secs(seconds)),
            _ => Err("must be between 0 and 60"),
        })?;
        Ok(wait.unwrap_or_default())
    }

    pub fn integer(&mut self, name: &'static str) -> Result<Option<i32>, ApiError> {
        self.read(name, |text| {
            let value = digits(text).and_then(|value| i32::try_from(value).ok());
            value.ok_or("must be an integer between 0 and 2147483647")
        })
    }

    pub fn long(&mut self, name: &'static str) -> Result<Option<i64>, ApiError> {
        self.read(name, |text| {
            let magnitude = text.strip_prefix('-').unwrap_or(text);
            let value = digits(magnitude).and_then(|_| text.parse().ok());
            value.ok_or("must come from a Link header")
        })
    }

    pub fn euros(&mut self, name: &'static str) -> Result<Option<Euros>, ApiError> {
        self.read(name, Euros::parse)
    }

    pub fn measure(&mut self, name: &'static str) -> Result<Option<f64>, ApiError> {
        self.read(name, |text| match text.parse::<f64>() {
            Ok(value) if value.is_finite() && value >= 0.0 => Ok(value),
            _ => Err("must be a number, 0 or more"),
        })
    }

    pub fn string(
        &mut self,
        name: &'static str,
        rule: impl FnOnce(&str) -> Result<(), &'static str>,
    ) -> Result<Option<String>, ApiError> {
        self.read(name, |text| {
            if text.contains('\0') {
                return Err("must not contain the character U+0000");
            }
            rule(text).map(|()| text.to_owned())
        })
    }

    pub fn timestamp(&mut self, name: &'static str) -> Result<Option<DateTime<Utc>>, ApiError> {
        self.read(name, |text| match DateTime::parse_from_rfc3339(text) {
            Ok(timestamp) => Ok(timestamp.to_utc()),
            // In a query, + means a space.
            Err(_) if DateTime::parse_from_rfc3339(&text.replace(' ', "+")).is_ok() => {
                Err("must have the + of its offset encoded as %2B")
            }
            Err(_) => Err("must be a date and time such as 2023-01-17T08:17:32Z"),
        })
    }

    /// Refuses unknown parameters. Call it after all others have been read.
    pub fn finish(&self) -> Result<(), ApiError> {
        match self
            .given
            .iter()
            .find(|(name, _)| !self.known.contains(&name.as_str()))
        {
            Some((name, _)) => Err(ApiError::malformed(format!(
                "{name}: is not a parameter of this path"
            ))),
            None => Ok(()),
        }
    }

    /// Whether one parameter is given.
    pub fn is_single(&self) -> bool {
        self.given.len() == 1
    }

    /// The `Link` to the page after this position, with the same other parameters.
    pub fn next_page(&self, path: &str, after: &str) -> String {
        let mut query = form_urlencoded::Serializer::new(String::new());
        query.extend_pairs(self.given.iter().filter(|(name, _)| name != "after"));
        query.append_pair("after", after);
        format!("<{path}?{}>; rel=\"next\"", query.finish())
    }
}

fn digits(text: &str) -> Option<i64> {
    let plain = !text.is_empty() && text.bytes().all(|digit| digit.is_ascii_digit());
    if plain { whole(text).ok() } else { None }
}
