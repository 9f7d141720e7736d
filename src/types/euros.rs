//! Exact money: from the digits of a JSON number to `numeric(12,2)` and back, never through a float.

use std::error::Error;
use std::fmt;

use bytes::{Buf, BufMut, BytesMut};
use serde::{Serialize, Serializer, ser};
use serde_json::value::RawValue;
use tokio_postgres::types::{FromSql, IsNull, ToSql, Type, accepts, to_sql_checked};

/// An amount from 0 to 9,999,999,999.99 euros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Euros {
    cents: i64,
}

impl Euros {
    const MAX_CENTS: i64 = 999_999_999_999;

    pub fn cents(self) -> i64 {
        self.cents
    }

    /// Reads the text of a JSON number. The error says what the amount must be.
    pub fn parse(number: &str) -> Result<Self, &'static str> {
        match scaled(number, 2) {
            Scaled::Exact(cents) if (0..=Self::MAX_CENTS).contains(&cents) => Ok(Self { cents }),
            Scaled::Exact(_) | Scaled::TooLarge => Err("must be between 0 and 9999999999.99"),
            Scaled::TooFine => Err("must have at most 2 decimals"),
            Scaled::NotANumber => Err("must be a number"),
        }
    }
}

/// The shortest form: `710000`, `0.1`, `12.34`.
impl fmt::Display for Euros {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.cents / 100, self.cents % 100) {
            (euros, 0) => write!(f, "{euros}"),
            (euros, cents) if cents % 10 == 0 => write!(f, "{euros}.{}", cents / 10),
            (euros, cents) => write!(f, "{euros}.{cents:02}"),
        }
    }
}

impl Serialize for Euros {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.cents % 100 == 0 {
            return serializer.serialize_i64(self.cents / 100);
        }
        let number = RawValue::from_string(self.to_string()).map_err(ser::Error::custom)?;
        number.serialize(serializer)
    }
}

/// PostgreSQL sends a `numeric` as five parts: the number of digits to base 10,000, the power of the first digit, the sign, the
/// number of decimals, and the digits.
impl FromSql<'_> for Euros {
    fn from_sql(_: &Type, mut numeric: &[u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        let digits = numeric.try_get_u16()?;
        let first_power = numeric.try_get_i16()?;
        let sign = numeric.try_get_u16()?;
        let _decimals = numeric.try_get_u16()?;
        let mut cents = 0;
        for power in (0..digits).map(|index| i32::from(first_power) - i32::from(index)) {
            let digit = i64::from(numeric.try_get_u16()?);
            cents += match power {
                2 => digit * 10_000_000_000,
                1 => digit * 1_000_000,
                0 => digit * 100,
                -1 if digit % 100 == 0 => digit / 100,
                _ => return Err("more digits than numeric(12,2) has".into()),
            };
        }
        if sign != 0 || cents > Self::MAX_CENTS {
            return Err("not an amount from 0 to 9999999999.99".into());
        }
        Ok(Self { cents })
    }

    accepts!(NUMERIC);
}

impl ToSql for Euros {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        let (euros, cents) = (self.cents / 100, self.cents % 100);
        for field in [4, 2, 0, 2] {
            out.put_u16(field);
        }
        for digit in [
            euros / 100_000_000,
            euros / 10_000 % 10_000,
            euros % 10_000,
            cents * 100,
        ] {
            out.put_u16(u16::try_from(digit)?);
        }
        Ok(IsNull::No)
    }

    accepts!(NUMERIC);
    to_sql_checked!();
}

/// What an integer that PostgreSQL can store must be.
pub const INTEGER_RANGE: &str = "must be an integer between -2147483648 and 2147483647";

/// Reads the text of a JSON number as an integer. JSON Schema says that `2.0` is one. The error says what it must be.
pub fn whole(number: &str) -> Result<i64, &'static str> {
    match scaled(number, 0) {
        Scaled::Exact(value) => Ok(value),
        Scaled::TooLarge => Err(INTEGER_RANGE),
        Scaled::TooFine | Scaled::NotANumber => Err("must be an integer"),
    }
}

enum Scaled {
    Exact(i64),
    TooFine,
    TooLarge,
    NotANumber,
}

/// A JSON number times 10 to the power of `places`.
fn scaled(number: &str, places: i64) -> Scaled {
    let (mantissa, exponent) = number.split_once(['e', 'E']).unwrap_or((number, "0"));
    let (sign, mantissa) = mantissa
        .strip_prefix('-')
        .map_or((1, mantissa), |rest| (-1, rest));
    let (integer, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = [integer, fraction].concat();
    let magnitude = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
    let is_digits = |text: &str| text.bytes().all(|digit| digit.is_ascii_digit());
    if integer.is_empty() || magnitude.is_empty() || !is_digits(&digits) || !is_digits(magnitude) {
        return Scaled::NotANumber;
    }
    let significant = digits.trim_end_matches('0');
    if significant.is_empty() {
        return Scaled::Exact(0);
    }
    let Ok(exponent) = exponent.parse::<i32>() else {
        return if exponent.starts_with('-') {
            Scaled::TooFine
        } else {
            Scaled::TooLarge
        };
    };
    let trimmed = i64::try_from(digits.len() - significant.len());
    let (Ok(trimmed), Ok(decimals)) = (trimmed, i64::try_from(fraction.len())) else {
        return Scaled::TooLarge;
    };
    let power = i64::from(exponent) + places + trimmed - decimals;
    let Ok(power) = u32::try_from(power) else {
        return if power < 0 {
            Scaled::TooFine
        } else {
            Scaled::TooLarge
        };
    };
    let value = significant
        .parse::<i64>()
        .ok()
        .and_then(|value| value.checked_mul(10_i64.checked_pow(power)?));
    value.map_or(Scaled::TooLarge, |value| Scaled::Exact(sign * value))
}

#[cfg(test)]
mod tests {
    use super::{Euros, INTEGER_RANGE, whole};

    #[test]
    fn an_amount_is_written_as_it_was_read() {
        for (number, expected) in [
            ("0", "0"),
            ("-0", "0"),
            ("0.1", "0.1"),
            ("0.10", "0.1"),
            ("0.01", "0.01"),
            ("710000", "710000"),
            ("710000.0", "710000"),
            ("7.1e5", "710000"),
            ("71E4", "710000"),
            ("1234e-2", "12.34"),
            ("0.000e-9", "0"),
            ("0e99999999999", "0"),
            ("9999999999.99", "9999999999.99"),
            ("9999999999.990000000000000000000000", "9999999999.99"),
        ] {
            assert_eq!(
                Euros::parse(number).map(|euros| euros.to_string()),
                Ok(expected.to_owned())
            );
        }
    }

    #[test]
    fn an_amount_that_is_not_exact_is_refused() {
        for number in [
            "0.001",
            "1e-3",
            "9999999999.999",
            "1e-99999999999",
            "0.30000000000000004",
        ] {
            assert_eq!(
                Euros::parse(number),
                Err("must have at most 2 decimals"),
                "{number}"
            );
        }
    }

    #[test]
    fn an_amount_out_of_range_is_refused() {
        for number in [
            "-0.01",
            "10000000000",
            "1e10",
            "1e300",
            "1e99999999999",
            "99999999999999999999",
        ] {
            assert_eq!(
                Euros::parse(number),
                Err("must be between 0 and 9999999999.99"),
                "{number}"
            );
        }
    }

    #[test]
    fn a_whole_number_may_have_a_decimal_point() {
        assert_eq!(whole("2.0"), Ok(2));
        assert_eq!(whole("2e0"), Ok(2));
        assert_eq!(whole("-3"), Ok(-3));
        assert_eq!(whole("2.7"), Err("must be an integer"));
        assert_eq!(whole("1e30"), Err(INTEGER_RANGE));
    }
}
