//! Rows as a JSON array: in one piece, or streamed page by page.

use actix_web::http::Method;
use actix_web::http::header::ContentType;
use actix_web::{HttpRequest, HttpResponse, HttpResponseBuilder};
use bytes::Bytes;
use futures_util::stream;
use tokio_postgres::Row;

use super::error::ApiError;

/// Rows of one page of a streamed array. Each page gives its connection back before it is sent.
pub const PAGE_SIZE: i64 = 1000;

/// Appends the JSON of a row.
pub type WriteRow = fn(&Row, &mut Vec<u8>) -> Result<(), ApiError>;

/// Drops the extra row that signals a further page. Returns whether there was one.
pub fn trim_to_limit(rows: &mut Vec<Row>, limit: i64) -> bool {
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let more = rows.len() > limit;
    rows.truncate(limit);
    more
}

/// Responds with all rows at once.
pub fn respond(
    mut response: HttpResponseBuilder,
    rows: &[Row],
    write: WriteRow,
) -> Result<HttpResponse, ApiError> {
    let mut array = Vec::with_capacity(rows.len() * 80 + 2);
    let mut separator = b'[';
    append(&mut array, &mut separator, rows, write)?;
    close(&mut array, separator);
    Ok(response.content_type(ContentType::json()).body(array))
}

/// Responds page by page. `read` returns the first page, or the page after a row. It is called when the client has taken the
/// page before.
pub async fn stream(
    request: &HttpRequest,
    mut response: HttpResponseBuilder,
    read: impl AsyncFn(Option<&Row>) -> Result<Vec<Row>, ApiError> + 'static,
    write: WriteRow,
) -> Result<HttpResponse, ApiError> {
    // Read before the response starts, so that a failure still has a status.
    let first = read(None).await?;
    response.content_type(ContentType::json());
    if *request.method() == Method::HEAD {
        return Ok(response.streaming(stream::empty::<Result<Bytes, ApiError>>()));
    }
    let start = Some((read, Next::Page(first), b'['));
    let chunks = stream::try_unfold(start, move |state| async move {
        let Some((read, next, mut separator)) = state else {
            return Ok(None);
        };
        let mut rows = match next {
            Next::Page(rows) => rows,
            Next::PageAfter(row) => read(Some(&row)).await?,
        };
        let mut chunk = Vec::with_capacity(rows.len() * 512 + 2);
        append(&mut chunk, &mut separator, &rows, write)?;
        let is_full = i64::try_from(rows.len()).is_ok_and(|size| size >= PAGE_SIZE);
        let last = rows.pop().filter(|_| is_full);
        if last.is_none() {
            close(&mut chunk, separator);
        }
        let state = last.map(|last| (read, Next::PageAfter(last), separator));
        Ok::<_, ApiError>(Some((Bytes::from(chunk), state)))
    });
    Ok(response.streaming(chunks))
}

enum Next {
    Page(Vec<Row>),
    PageAfter(Row),
}

fn append(
    array: &mut Vec<u8>,
    separator: &mut u8,
    rows: &[Row],
    write: WriteRow,
) -> Result<(), ApiError> {
    for row in rows {
        array.push(*separator);
        *separator = b',';
        write(row, array)?;
    }
    Ok(())
}

fn close(array: &mut Vec<u8>, separator: u8) {
    if separator == b'[' {
        array.push(b'[');
    }
    array.push(b']');
}
