//! What a client may write to a listing, and the rule of each field.

use tokio_postgres::types::ToSql;

use crate::http::error::ApiError;
use crate::http::fields;
use crate::types::euros::Euros;

/// The fields of a body. A field that the body does not contain is `None`.
pub struct Input {
    name: Option<String>,
    street_address: Option<String>,
    postal_code: Option<String>,
    city: Option<String>,
    country: Option<String>,
    description: Option<String>,
    building_type: Option<String>,
    price: Option<Euros>,
    surface_area_m2: Option<f64>,
    rooms_count: Option<i32>,
    bedrooms_count: Option<i32>,
    contact_phone_number: Option<String>,
    /// Whether the body contains a phone number or null, which removes it.
    pub sets_contact_phone_number: bool,
}

impl Input {
    /// Reads a body that must be `complete`, or one that contains only the fields to change. `id` is that of the path.
    pub fn parse(body: &[u8], complete: bool, id: Option<i32>) -> Result<Self, ApiError> {
        fields::parse(body, complete, |object, problems| {
            object.id(id, problems);
            object.read_only("created_date", problems);
            object.read_only("updated_date", problems);
            let name = object.string("name", problems, up_to_500);
            let (mut street_address, mut postal_code, mut city, mut country) =
                (None, None, None, None);
            if let Some(mut address) = object.object("postal_address", "postal_address.", problems)
            {
                street_address = address.string("street_address", problems, up_to_500);
                postal_code = address.string("postal_code", problems, up_to_40);
                city = address.string("city", problems, up_to_200);
                country = address.string("country", problems, two_capital_letters);
                address.finish(problems);
            }
            let contact_phone_number =
                object.nullable_string("contact_phone_number", problems, e164);
            Self {
                name,
                street_address,
                postal_code,
                city,
                country,
                description: object.string("description", problems, not_empty),
                building_type: object.string("building_type", problems, known_building_type),
                price: object.euros("latest_price_eur", problems),
                surface_area_m2: object.measure("surface_area_m2", problems),
                rooms_count: object.integer("rooms_count", problems, 1),
                bedrooms_count: object.integer("bedrooms_count", problems, 0),
                sets_contact_phone_number: contact_phone_number.is_some(),
                contact_phone_number: contact_phone_number.flatten(),
            }
        })
    }

    /// The values of the columns, as `$1` to `$12`.
    pub fn values(&self) -> [&(dyn ToSql + Sync); 12] {
        let Self {
            name,
            street_address,
            postal_code,
            city,
            country,
            description,
            building_type,
            price,
            surface_area_m2,
            rooms_count,
            bedrooms_count,
            contact_phone_number,
            sets_contact_phone_number: _,
        } = self;
        [
            name,
            street_address,
            postal_code,
            city,
            country,
            description,
            building_type,
            price,
            surface_area_m2,
            rooms_count,
            bedrooms_count,
            contact_phone_number,
        ]
    }
}

pub fn not_empty(value: &str) -> Result<(), &'static str> {
    if value.is_empty() {
        Err("must not be empty")
    } else {
        Ok(())
    }
}

fn up_to_500(value: &str) -> Result<(), &'static str> {
    up_to(500, value, "must have at most 500 characters")
}

fn up_to_200(value: &str) -> Result<(), &'static str> {
    up_to(200, value, "must have at most 200 characters")
}

fn up_to_40(value: &str) -> Result<(), &'static str> {
    up_to(40, value, "must have at most 40 characters")
}

fn up_to(limit: usize, value: &str, problem: &'static str) -> Result<(), &'static str> {
    not_empty(value)?;
    match value.chars().nth(limit) {
        Some(_) => Err(problem),
        None => Ok(()),
    }
}

pub fn two_capital_letters(value: &str) -> Result<(), &'static str> {
    let right = value.len() == 2 && value.bytes().all(|letter| letter.is_ascii_uppercase());
    if right {
        Ok(())
    } else {
        Err("must be two capital letters")
    }
}

pub fn known_building_type(value: &str) -> Result<(), &'static str> {
    let right = ["STUDIO", "APARTMENT", "HOUSE"].contains(&value);
    if right {
        Ok(())
    } else {
        Err("must be STUDIO, APARTMENT or HOUSE")
    }
}

fn e164(value: &str) -> Result<(), &'static str> {
    let digits = value.strip_prefix('+').unwrap_or_default().as_bytes();
    let right = (2..=15).contains(&digits.len())
        && digits.iter().all(u8::is_ascii_digit)
        && digits.first() != Some(&b'0');
    if right {
        Ok(())
    } else {
        Err("must be a phone number such as +33123456789")
    }
}
