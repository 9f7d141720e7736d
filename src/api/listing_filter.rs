//! The query parameters that filter the list of listings, and their conditions in SQL.

use tokio_postgres::types::ToSql;

use super::listing_input::{known_building_type, not_empty, two_capital_letters};
use crate::http::error::ApiError;
use crate::http::query::Query;
use crate::postgres::Value;
use crate::types::euros::Euros;

pub struct Filter {
    building_type: Option<String>,
    country: Option<String>,
    city: Option<String>,
    postal_code: Option<String>,
    min_price: Option<Euros>,
    max_price: Option<Euros>,
    min_surface: Option<f64>,
    max_surface: Option<f64>,
    min_rooms: Option<i32>,
    min_bedrooms: Option<i32>,
}

impl Filter {
    pub fn parse(query: &mut Query) -> Result<Self, ApiError> {
        Ok(Self {
            building_type: query.string("building_type", known_building_type)?,
            country: query.string("country", two_capital_letters)?,
            city: query.string("city", not_empty)?,
            postal_code: query.string("postal_code", not_empty)?,
            min_price: query.euros("min_price")?,
            max_price: query.euros("max_price")?,
            min_surface: query.measure("min_surface")?,
            max_surface: query.measure("max_surface")?,
            min_rooms: query.integer("min_rooms")?,
            min_bedrooms: query.integer("min_bedrooms")?,
        })
    }

    /// A filter by everything.
    pub fn by_everything() -> Self {
        Self {
            building_type: Some(String::new()),
            country: Some(String::new()),
            city: Some(String::new()),
            postal_code: Some(String::new()),
            min_price: Euros::parse("0").ok(),
            max_price: Euros::parse("0").ok(),
            min_surface: Some(0.0),
            max_surface: Some(0.0),
            min_rooms: Some(0),
            min_bedrooms: Some(0),
        }
    }

    /// The conditions of the given filters, and their values from parameter `first` on. An absent filter has no condition, so
    /// that PostgreSQL can use an index for the others.
    pub fn into_conditions(self, first: usize) -> (String, Vec<Value>) {
        let Self {
            building_type,
            country,
            city,
            postal_code,
            min_price,
            max_price,
            min_surface,
            max_surface,
            min_rooms,
            min_bedrooms,
        } = self;
        let conditions = [
            ("building_type = $", value(building_type)),
            ("country = $", value(country)),
            // The indexes contain hashes.
            (
                "hashtextextended(city, 0) = hashtextextended($, 0) and city = $",
                value(city),
            ),
            (
                "hashtextextended(postal_code, 0) = hashtextextended($, 0) and postal_code = $",
                value(postal_code),
            ),
            ("price >= $", value(min_price)),
            ("price <= $", value(max_price)),
            ("surface_area_m2 >= $", value(min_surface)),
            ("surface_area_m2 <= $", value(max_surface)),
            ("rooms_count >= $", value(min_rooms)),
            ("bedrooms_count >= $", value(min_bedrooms)),
        ];
        let given = conditions
            .into_iter()
            .filter_map(|(condition, value)| Some((condition, value?)));
        let (conditions, values): (Vec<_>, _) = (first..)
            .zip(given)
            .map(|(number, (condition, value))| {
                let condition = condition.replace('$', &format!("${number}"));
                (format!(" and {condition}"), value)
            })
            .unzip();
        (conditions.concat(), values)
    }
}

fn value(value: Option<impl ToSql + Sync + 'static>) -> Option<Value> {
    value.map(|value| Box::new(value) as Value)
}
