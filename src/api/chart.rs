//! The price history of a listing as a chart. SVG is text, so `format!` draws it.
//!
//! The chart contains numbers and dates only. A text that a client wrote would have to be escaped.

use std::fmt::Write;
use std::{iter, ptr};

use actix_web::http::header;
use actix_web::web::{Data, Path};
use actix_web::{HttpRequest, HttpResponse};
use bytes::Bytes;
use chrono::{DateTime, Datelike, NaiveDate, Utc};
use sha2::{Digest, Sha256};
use tokio_postgres::Row;

use super::{listings, prices};
use crate::http::conditional;
use crate::http::error::ApiError;
use crate::http::query::Query;
use crate::postgres::Database;
use crate::types::euros::Euros;

pub async fn get(
    request: HttpRequest,
    path: Path<String>,
    database: Data<Database>,
    by_listing: Data<prices::ByListing>,
) -> Result<HttpResponse, ApiError> {
    let id = listings::parse_id(&path)?;
    Query::parse(&request)?.finish()?;
    let mut history = History {
        prices: Vec::new(),
        count: 0,
        now: Utc::now().timestamp_millis(),
    };
    // If the client names a version, only the primary knows whether it is the newest.
    let may_be_stale = !request.headers().contains_key(header::IF_NONE_MATCH);
    let add = |rows: &[Row]| history.add(rows);
    prices::read_all(id, &database, &by_listing, may_be_stale, add).await?;
    // Every listing has a price.
    let svg = history.draw(id).ok_or_else(|| listings::not_found(id))?;
    // The line ends now, so the chart also changes without a write. Its bytes tell when.
    let etag = conditional::etag(&format!(
        "{:x}",
        Bytes::copy_from_slice(&Sha256::digest(&svg))
    ));
    if conditional::is_known(&request, &etag) {
        return Ok(conditional::not_modified(etag));
    }
    let policy = "default-src 'none'; style-src 'unsafe-inline'";
    Ok(HttpResponse::Ok()
        .content_type("image/svg+xml")
        .insert_header(header::ETag(etag))
        .insert_header((header::CACHE_CONTROL, "no-cache"))
        .insert_header((header::CONTENT_SECURITY_POLICY, policy))
        .body(svg))
}

/// Milliseconds.
const SECOND: i64 = 1000;
const MINUTE: i64 = 60 * SECOND;
const HOUR: i64 = 60 * MINUTE;
const DAY: i64 = 24 * HOUR;

const MAX_STEPS: usize = 1000;

/// A history with more steps keeps the first, lowest, highest and last price of each of these parts of its time. The line is
/// then exact except within a part, which is two or three pixels wide.
const PARTS: i64 = 250;

#[derive(Clone, Copy)]
struct Price {
    /// Milliseconds since 1970.
    at: i64,
    cents: i64,
}

struct History {
    /// At most [`MAX_STEPS`].
    prices: Vec<Price>,
    /// How many prices there are, also those that are not kept.
    count: usize,
    now: i64,
}

impl History {
    fn add(&mut self, rows: &[Row]) -> Result<(), ApiError> {
        for row in rows {
            let at: DateTime<Utc> = row.try_get("changed_at")?;
            let price: Euros = row.try_get("new_price")?;
            // The order of the rows is the true one, also if a clock was set back.
            let before = self.prices.last().map_or(i64::MIN, |price| price.at);
            self.prices.push(Price {
                at: at.timestamp_millis().max(before),
                cents: price.cents(),
            });
        }
        self.count += rows.len();
        self.thin();
        Ok(())
    }

    /// Always divides the same time, so that the result does not depend on how many rows come at once.
    fn thin(&mut self) {
        let start = self.prices.first().map_or(0, |price| price.at);
        if self.prices.len() <= MAX_STEPS {
            return;
        }
        let length = (self.now - start).max(0) + 1;
        let part = |price: &Price| ((price.at - start) * PARTS / length).min(PARTS - 1);
        let parts = self.prices.chunk_by(|a, b| part(a) == part(b));
        let kept = parts.flat_map(|part| {
            let kept = [
                part.first(),
                part.iter().min_by_key(|price| price.cents),
                part.iter().max_by_key(|price| price.cents),
                part.last(),
            ];
            let is_kept =
                move |price: &&Price| kept.into_iter().flatten().any(|k| ptr::eq(k, *price));
            part.iter().filter(is_kept).copied()
        });
        self.prices = kept.collect();
    }

    /// The right end of the chart. It moves in units, so that the chart stays the same for a while. A unit above a second is
    /// at most a 500th of the width.
    fn end(&self, start: i64) -> i64 {
        let is_fine = |unit: &i64| self.now - start >= 500 * unit;
        let unit = [DAY, HOUR, MINUTE].into_iter().find(is_fine);
        let end = self.now - self.now.rem_euclid(unit.unwrap_or(SECOND));
        // The clock of the server may be ahead.
        self.prices.last().map_or(end, |last| end.max(last.at))
    }

    /// `None` if there is no price.
    fn draw(&self, id: i32) -> Option<String> {
        let (first, last) = (self.prices.first()?, self.prices.last()?);
        let cents = || self.prices.iter().map(|price| price.cents);
        let (lowest, highest) = (cents().min()?, cents().max()?);
        let end = self.end(first.at);
        // The chart of a new listing begins before its first price.
        let start = first.at.min(end - MINUTE);
        let (times, time_format) = time_ticks(start, end);
        let shows_hours = time_format.starts_with("%H");
        let prices = price_ticks(lowest, highest);
        let (bottom_price, top_price) = (*prices.first()?, *prices.last()?);

        let labels: Vec<_> = prices.iter().map(|cents| euros(*cents)).collect();
        let longest = labels.iter().map(|label| label.chars().count()).max()?;
        let left = 32 + 8 * i64::try_from(longest).ok()?;
        let x = |at: i64| coordinate(left, RIGHT, at - start, end - start);
        let y =
            |cents: i64| coordinate(BOTTOM, TOP, cents - bottom_price, top_price - bottom_price);

        let mut grid = String::new();
        let mut axes = String::new();
        for (cents, label) in prices.iter().zip(&labels) {
            let y = y(*cents);
            write!(grid, "M{left} {y:.1}H{RIGHT}").ok()?;
            let (x, y) = (left - 8, y + 4.5);
            writeln!(
                axes,
                r#"<text class="end" x="{x}" y="{y:.1}">{label}</text>"#
            )
            .ok()?;
        }
        for at in times {
            let x = x(at);
            write!(grid, "M{x:.1} {BOTTOM}v5").ok()?;
            let begins_day = shows_hours && at.rem_euclid(DAY) == 0;
            let label = date(at, if begins_day { "%-d %b" } else { time_format });
            let y = BOTTOM + 22;
            writeln!(
                axes,
                r#"<text class="middle" x="{x:.1}" y="{y}">{label}</text>"#
            )
            .ok()?;
        }
        // Each price holds until the next.
        let mut line = format!("M{:.1} {:.1}", x(first.at), y(first.cents));
        for price in self.prices.iter().skip(1) {
            write!(line, "H{:.1}V{:.1}", x(price.at), y(price.cents)).ok()?;
        }
        write!(line, "H{RIGHT}").ok()?;

        let day = if shows_hours {
            "%-d %b %Y, %H:%M UTC"
        } else {
            "%-d %b %Y"
        };
        let (since, until) = (date(first.at, day), date(end, day));
        let change = change(first.cents, last.cents);
        let (now, highest, lowest) = (euros(last.cents), euros(highest), euros(lowest));
        let from_to = format!("From {} on {since} to {now} on {until}", euros(first.cents));
        let count = grouped(&self.count.to_string());
        let last_y = y(last.cents);
        Some(format!(
            r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img"
 aria-labelledby="title desc">
<title id="title">Price of listing {id}: {now}</title>
<desc id="desc">{from_to}: {change}. Number of prices: {count}. Highest {highest}, lowest {lowest}.</desc>
<style>{STYLE}</style>
<rect width="{WIDTH}" height="{HEIGHT}" rx="8"/>
<text class="now" x="24" y="44">{now}</text>
<text x="24" y="66">{change} since {since}</text>
<text class="end" x="{RIGHT}" y="44">highest {highest}</text>
<text class="end" x="{RIGHT}" y="66">lowest {lowest}</text>
<path class="grid" d="{grid}"/>
{axes}<path class="line" d="{line}"/>
<circle cx="{RIGHT}" cy="{last_y:.1}" r="4"/>
</svg>
"#
        ))
    }
}

const WIDTH: i64 = 720;
const HEIGHT: i64 = 320;
const RIGHT: i64 = WIDTH - 40;
const TOP: i64 = 96;
const BOTTOM: i64 = HEIGHT - 44;

/// The background makes the chart readable on a page that is always light or always dark.
const STYLE: &str = "
text{font:13px system-ui,sans-serif;fill:#59636e}
.now{font-size:26px;font-weight:600;fill:#1f2328}
.end{text-anchor:end}
.middle{text-anchor:middle}
rect{fill:#fff}
.grid{stroke:#d1d9e0}
.line{stroke:#0969da;stroke-width:2;stroke-linejoin:round;fill:none}
circle{fill:#0969da}
@media(prefers-color-scheme:dark){
text{fill:#9198a1}
.now{fill:#f0f6fc}
rect{fill:#0d1117}
.grid{stroke:#3d444d}
.line{stroke:#58a6ff}
circle{fill:#58a6ff}
}
";

/// Where a part of the whole is, between two coordinates.
#[expect(clippy::cast_precision_loss, reason = "a coordinate needs four digits")]
fn coordinate(from: i64, to: i64, part: i64, whole: i64) -> f64 {
    from as f64 + (to - from) as f64 * (part as f64 / whole as f64)
}

/// Round prices from at most the lowest to at least the highest: at most 7.
fn price_ticks(lowest: i64, highest: i64) -> Vec<i64> {
    let margin = if lowest == highest {
        (lowest / 10).max(100)
    } else {
        0
    };
    let (low, high) = ((lowest - margin).max(0), highest + margin);
    let powers = iter::successors(Some(1), |power| Some(power * 10));
    let mut steps = powers.flat_map(|power| [power, 2 * power, 5 * power]);
    let step = steps.find(|step| step * 5 >= high - low).unwrap_or(high);
    let ticks = low / step..=(high + step - 1) / step;
    ticks.map(|n| n * step).collect()
}

/// Round times between start and end: at most 7. And the format of their labels.
fn time_ticks(start: i64, end: i64) -> (Vec<i64>, &'static str) {
    let is_enough = |step: &i64| (end - start) / step < 7;
    let times = [
        (SECOND, "%H:%M:%S", &[10, 20, 30][..]),
        (MINUTE, "%H:%M", &[1, 2, 5, 10, 15, 30]),
        (HOUR, "%H:%M", &[1, 2, 3, 6, 12]),
        (DAY, "%-d %b", &[1, 2, 4, 7, 14]),
    ];
    for (unit, format, counts) in times {
        let mut steps = counts.iter().map(|count| count * unit);
        if let Some(step) = steps.find(is_enough) {
            // Weeks begin on Monday, and 5 January 1970 was one.
            let first = start + (4 * DAY - start).rem_euclid(step);
            let ticks = (first..=end).step_by(usize::try_from(step).unwrap_or(usize::MAX));
            return (ticks.collect(), format);
        }
    }
    let month = |at| {
        let date = DateTime::from_timestamp_millis(at).unwrap_or_default();
        date.year() * 12 + i32::try_from(date.month0()).unwrap_or_default()
    };
    let begin = |month: i32| {
        let date = NaiveDate::from_ymd_opt(
            month.div_euclid(12),
            month.rem_euclid(12).unsigned_abs() + 1,
            1,
        )?;
        Some(date.and_hms_opt(0, 0, 0)?.and_utc().timestamp_millis())
    };
    let (first, last) = (month(start), month(end));
    let steps = [1, 2, 3, 6, 12, 24, 60, 120, 240, 600, 1200, 6000, 12000];
    let step = steps
        .into_iter()
        .find(|step| (last - first) / step < 7)
        .unwrap_or(i32::MAX);
    let ticks = (first.div_euclid(step)..=last.div_euclid(step)).filter_map(|n| begin(n * step));
    let format = if step < 12 { "%b %Y" } else { "%Y" };
    (ticks.filter(|at| *at >= start).collect(), format)
}

fn date(at: i64, format: &str) -> String {
    let at = DateTime::from_timestamp_millis(at).unwrap_or_default();
    at.format(format).to_string()
}

/// `€480,000`, or `€480,000.50` if the amount has cents.
fn euros(cents: i64) -> String {
    let whole = grouped(&(cents / 100).to_string());
    match cents % 100 {
        0 => format!("€{whole}"),
        cents => format!("€{whole}.{cents:02}"),
    }
}

fn grouped(digits: &str) -> String {
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn change(first: i64, last: i64) -> String {
    let percent = coordinate(0, 100, (last - first).abs(), first.max(1));
    let sign = if last < first { '−' } else { '+' };
    let decimals = match percent {
        _ if first == last => return "unchanged".to_owned(),
        _ if first == 0 => return "up from €0".to_owned(),
        ..0.005 => return "almost unchanged".to_owned(),
        ..1.0 => 2,
        ..1000.0 => 1,
        _ => return format!("{sign}{}%", grouped(&format!("{percent:.0}"))),
    };
    format!("{sign}{percent:.decimals$}%")
}

#[cfg(test)]
mod tests {
    use super::{DAY, History, MINUTE, Price, change, euros, price_ticks, time_ticks};

    #[test]
    fn the_right_end_moves_by_at_most_a_500th_of_the_width() {
        let drawn = |now: i64| {
            let prices = [(0, 100), (DAY, 200)].map(|(at, cents)| Price { at, cents });
            let (prices, count) = (prices.to_vec(), 2);
            let history = History { prices, count, now };
            history.draw(1).expect("a chart")
        };
        for (length, unit) in [(3 * DAY, MINUTE), (30 * DAY, 60 * MINUTE), (501 * DAY, DAY)] {
            assert_eq!(drawn(length), drawn(length + unit - 1));
            assert_ne!(drawn(length), drawn(length + unit));
        }
    }

    #[test]
    fn an_axis_has_a_few_ticks() {
        let end = 1_700_000_000_000;
        let mut length = MINUTE;
        while length < 1_900 * 365 * DAY {
            let (ticks, _) = time_ticks(end - length, end);
            assert!((2..=7).contains(&ticks.len()), "{length}: {ticks:?}");
            let inside = |tick: &i64| (end - length..=end).contains(tick);
            assert!(ticks.iter().all(inside), "{length}: {ticks:?}");
            length += length / 7;
        }
        for lowest in [0, 1, 99, 48_000_000, 999_999_999_998] {
            for more in [0, 1, 7, 100, 12_345, 999_999_999_999] {
                let highest = (lowest + more).min(999_999_999_999);
                let ticks = price_ticks(lowest, highest);
                assert!((2..=7).contains(&ticks.len()), "{ticks:?}");
                let (first, last) = (ticks[0], ticks[ticks.len() - 1]);
                assert!(first <= lowest && highest <= last, "{ticks:?}");
            }
        }
    }

    #[test]
    fn amounts_are_written_as_people_read_them() {
        let written = [0, 5, 99_950, 100_000, 48_000_000, 999_999_999_999].map(euros);
        let expected = [
            "€0",
            "€0.05",
            "€999.50",
            "€1,000",
            "€480,000",
            "€9,999,999,999.99",
        ];
        assert_eq!(written, expected);
        for (first, last, expected) in [
            (480_000, 441_600, "−8.0%"),
            (480_000, 480_100, "+0.02%"),
            (480_000, 480_001, "almost unchanged"),
            (480_000, 480_000, "unchanged"),
            (0, 1, "up from €0"),
            (1, 0, "−100.0%"),
            (1, 999_999_999_999, "+99,999,999,999,800%"),
        ] {
            assert_eq!(change(first, last), expected);
        }
    }
}
