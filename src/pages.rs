//! Rows as a JSON array: at once, or page by page where there may be many.

use actix_web::http::Method;
use actix_web::{HttpRequest, HttpResponse, HttpResponseBuilder};
use bytes::Bytes;
use futures_util::stream::{self, TryStreamExt};
use tokio_postgres::Row;

use crate::edge::request_id;
use crate::error::ApiError;

/// Rows read at a time. Each page gives its connection back before it is sent.
pub const PAGE: i64 = 1000;

/// Takes away what is more than was asked for, and says whether there was.
pub fn cut(rows: &mut Vec<Row>, limit: i64) -> bool {
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let more = rows.len() > limit;
    rows.truncate(limit);
    more
}

/// Appends the JSON of a row.
pub type Write = fn(&Row, &mut Vec<u8>) -> Result<(), ApiError>;

/// An array of these rows.
pub fn array(rows: &[Row], write: Write) -> Result<Vec<u8>, ApiError> {
    let mut array = Vec::with_capacity(rows.len() * 80 + 2);
    let mut separator = b'[';
    append(&mut array, &mut separator, rows, write)?;
    end(&mut array, separator);
    Ok(array)
}

/// Responds with an array in pieces. `read` gives the first page or the one behind a row, and is asked when the client has
/// taken the page before.
pub async fn respond(
    request: &HttpRequest,
    mut response: HttpResponseBuilder,
    read: impl AsyncFn(Option<&Row>) -> Result<Vec<Row>, ApiError> + 'static,
    write: Write,
) -> Result<HttpResponse, ApiError> {
    // Before the response begins, so that a failure still has a status.
    let first = read(None).await?;
    response.content_type("application/json");
    if *request.method() == Method::HEAD {
        return Ok(response.streaming(stream::empty::<Result<Bytes, ApiError>>()));
    }
    let begin = Some((read, Next::Page(first), b'['));
    let pieces = stream::try_unfold(begin, move |state| async move {
        let Some((read, next, mut separator)) = state else {
            return Ok(None);
        };
        let mut rows = match next {
            Next::Page(rows) => rows,
            Next::PageBehind(row) => read(Some(&row)).await?,
        };
        let mut piece = Vec::with_capacity(rows.len() * 512 + 2);
        append(&mut piece, &mut separator, &rows, write)?;
        let full = i64::try_from(rows.len()).is_ok_and(|size| size >= PAGE);
        let last = rows.pop().filter(|_| full);
        if last.is_none() {
            end(&mut piece, separator);
        }
        let state = last.map(|last| (read, Next::PageBehind(last), separator));
        Ok(Some((Bytes::from(piece), state)))
    });
    let id = request_id(request.headers());
    // The response is under way, so this is the one place that can still tell of a failure.
    let pieces =
        pieces.inspect_err(move |error: &ApiError| log::error!("{id:?} broken off: {error}"));
    Ok(response.streaming(pieces))
}

enum Next {
    Page(Vec<Row>),
    PageBehind(Row),
}

fn append(
    array: &mut Vec<u8>,
    separator: &mut u8,
    rows: &[Row],
    write: Write,
) -> Result<(), ApiError> {
    for row in rows {
        array.push(*separator);
        *separator = b',';
        write(row, array)?;
    }
    Ok(())
}

fn end(array: &mut Vec<u8>, separator: u8) {
    if separator == b'[' {
        array.push(b'[');
    }
    array.push(b']');
}
