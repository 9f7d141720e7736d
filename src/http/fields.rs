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
    // The whole body first. The fields are read from raw values, which may be what JSON forbids, such as 1e400.
    if let Err(error) = serde_json::from_slice::<serde_json::Value>(body) {
        // Only the position: the library's own message may quote the body.
        let message = format!(
            "the body is not JSON: line {}, column {}",
            error.line(),
            error.column()
        );
        return Err(ApiError::malformed(message));
    }
    let text = std::str::from_utf8(body).ok();
    let Some(mut object) = text.and_then(|text| Object::of(text, "", complete)) else {
        return Err(ApiError::invalid("the body must be an object"));
    };
    let mut problems = Problems::default();
    let value = read(&mut object, &mut problems);
    object.finish(&mut problems);
    if problems.0.is_empty() {
        Ok(value)
    } else {
        Err(ApiError::invalid(problems.0.join("; ")))
    }
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

    /// Drops a field that only the service sets. A client may send it back as it was read.
    pub fn read_only(&mut self, name: &str, problems: &mut Problems) {
        if self
            .take(name, problems)
            .is_some_and(|value| has_nul(value.get()))
        {
            problems.add(self.path, name, NUL);
        }
    }

    /// The id of what the path names, which a client may send back too. A new object has no id yet, so any is ignored.
    pub fn id(&mut self, id: Option<i32>, problems: &mut Problems) {
        let Some(id) = id else {
            return self.read_only("id", problems);
        };
        if let Some(value) = self.take("id", problems) {
            let given = number(value.get()).and_then(|number| whole(&number));
            if given != Ok(i64::from(id)) {
                problems.add(
                    self.path,
                    "id",
                    &format!("must be absent or {id}, the id in the path"),
                );
            }
        }
    }

    /// A string that is never required. Null and an empty string mean none.
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
            "null" | "\"\"" => Ok(None),
            text => string(text, rule).map(Some),
        };
        read.map_err(|problem| problems.add(self.path, name, problem))
            .ok()
    }

    pub fn euros(&mut self, name: &str, problems: &mut Problems) -> Option<Euros> {
        self.field(name, problems, |text| Euros::parse(&number(text)?))
    }

    pub fn integer(&mut self, name: &str, problems: &mut Problems, min: i32) -> Option<i32> {
        self.field(name, problems, |text| {
            match i32::try_from(whole(&number(text)?)?) {
                Ok(value) if value >= min => Ok(value),
                Ok(_) if min == 1 => Err("must be 1 or more"),
                Ok(_) => Err("must be 0 or more"),
                Err(_) => Err(INTEGER_RANGE),
            }
        })
    }

    pub fn measure(&mut self, name: &str, problems: &mut Problems) -> Option<f64> {
        self.field(name, problems, |text| match number(text)?.parse::<f64>() {
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

/// The text of a number. HTML forms send numbers as strings, so a string that holds a JSON number and nothing else is one too.
fn number(text: &str) -> Result<Cow<'_, str>, &'static str> {
    if !text.starts_with('"') {
        return Ok(text.into());
    }
    let held: String = serde_json::from_str(text).unwrap_or_default();
    let is_number = held.ends_with(|last: char| last.is_ascii_digit())
        && held.starts_with(|first: char| first == '-' || first.is_ascii_digit())
        && serde_json::from_str::<&RawValue>(&held).is_ok();
    let problem = "must be only a number, such as 480000";
    is_number.then_some(held.into()).ok_or(problem)
}

fn string(
    text: &str,
    rule: impl FnOnce(&str) -> Result<(), &'static str>,
) -> Result<String, &'static str> {
    let value: String = serde_json::from_str(text).map_err(|_| "must be a string")?;
    if value.contains('\0') {
        return Err(NUL);
    }
    rule(&value).map(|()| value)
}

const NUL: &str = "must not contain the character U+0000";

/// Whether a string in a JSON text contains U+0000, which can only be written as an escape.
fn has_nul(json: &str) -> bool {
    let mut rest = json;
    while let Some((_, escape)) = rest.split_once('\\') {
        if escape.starts_with("u0000") {
            return true;
        }
        // The escaped character may be a backslash.
        rest = escape.get(1..).unwrap_or_default();
    }
    false
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
