//! The fields of a JSON body, read one by one, so that one answer names every field that is wrong.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::error::ApiError;
use crate::types::euros::{Euros, INTEGER_RANGE, whole};

/// Reads a body that must be an object, with a function that takes its fields. If it is `complete`, absent fields are refused.
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
    // A body that is not JSON is refused as such, whatever was found in it.
    if let Err(error) = serde_json::from_slice::<serde_json::Value>(body) {
        // Only the position: the library's own message may quote the body.
        let message = format!(
            "the body is not JSON: line {}, column {}",
            error.line(),
            error.column()
        );
        return Err(ApiError::malformed(message));
    }
    Err(ApiError::invalid(problems.0.join("; ")))
}

/// The problems of a body, each with the path of its field.
#[derive(Default)]
pub struct Problems(Vec<String>);

impl Problems {
    fn add(&mut self, path: &str, name: &str, problem: &str) {
        // Report at most 20 problems.
        if self.0.len() < 20 {
            self.0.push(format!("{path}{name}: {problem}"));
        }
    }
}

/// The fields of a JSON object that have not been read yet.
pub struct Object<'a> {
    path: &'static str,
    fields: Vec<(Name<'a>, &'a RawValue)>,
    /// Whether an absent field is a problem.
    complete: bool,
}

/// Copied only if it has escapes.
#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'a> Object<'a> {
    /// `None` if the text is not an object.
    fn of(text: &'a str, path: &'static str, complete: bool) -> Option<Self> {
        let Fields(fields) = serde_json::from_str(text).ok()?;
        Some(Self {
            path,
            fields,
            complete,
        })
    }

    fn take(&mut self, name: &str, problems: &mut Problems) -> Option<&'a RawValue> {
        let has_name = |(field, _): &(Name, _)| field.0 == name;
        let index = self.fields.iter().position(has_name)?;
        let (_, value) = self.fields.remove(index);
        if self.fields.iter().any(has_name) {
            problems.add(self.path, name, "must be given only once");
            self.fields.retain(|field| !has_name(field));
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

    /// An object in a field. `path` is the name of the field and a dot.
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

    /// A required field, read by a function whose error says what is wrong.
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

    /// A string that is never required and may be null.
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

    pub fn integer(&mut self, name: &str, problems: &mut Problems, min: i32) -> Option<i32> {
        self.field(name, problems, |text| match i32::try_from(whole(text)?) {
            Ok(value) if value >= min => Ok(value),
            Ok(_) if min == 1 => Err("must be 1 or more"),
            Ok(_) => Err("must be 0 or more"),
            Err(_) => Err(INTEGER_RANGE),
        })
    }

    pub fn measure(&mut self, name: &str, problems: &mut Problems) -> Option<f64> {
        self.field(name, problems, |text| match text.parse::<f64>() {
            Ok(value) if value.is_finite() && value >= 0.0 => Ok(value + 0.0),
            Ok(value) if value.is_finite() => Err("must be 0 or more"),
            _ => Err("must be a number"),
        })
    }

    /// Reports the fields that are left: the contract knows no others.
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

/// All fields in their order, duplicates included.
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
