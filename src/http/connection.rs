//! The socket of a client, between the network and the HTTP parser.
//!
//! If the client disconnects, the parser gets an error instead of the end of its input. It then drops the request in flight,
//! which cancels the statement. The parser's own `h1_allow_half_closed(false)` also drops the responses before a malformed
//! request.
//!
//! The parser answers a malformed, oversized or slow head itself, with a bare status, and closes the connection. This wrapper
//! writes the error of the contract instead. The parser's own responses are the only ones of 400 or above without a body, and
//! always the last of their connection.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use actix_web::http::StatusCode;
use actix_web::rt::net::TcpStream;
use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::request_id;

pub struct Connection {
    socket: TcpStream,
    /// Whether pages of any origin may read the response.
    any_origin: bool,
    /// The rest of the error that replaces a bare one.
    replacement: Option<Bytes>,
}

impl Connection {
    pub fn new(socket: TcpStream, any_origin: bool) -> Self {
        Self {
            socket,
            any_origin,
            replacement: None,
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let filled = buffer.filled().len();
        ready!(Pin::new(&mut self.socket).poll_read(cx, buffer))?;
        let is_end = buffer.filled().len() == filled && buffer.remaining() > 0;
        if is_end {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        let connection = &mut *self;
        if connection.replacement.is_none() {
            match bare_error(buffer) {
                Some((0, status)) => {
                    connection.replacement = Some(error_response(status, connection.any_origin));
                }
                // The responses before it are written first.
                Some((start, _)) => {
                    let before = buffer.get(..start).unwrap_or_default();
                    return Pin::new(&mut connection.socket).poll_write(cx, before);
                }
                None => return Pin::new(&mut connection.socket).poll_write(cx, buffer),
            }
        }
        while let Some(replacement) = connection.replacement.as_mut().filter(Buf::has_remaining) {
            let written = ready!(Pin::new(&mut connection.socket).poll_write(cx, replacement))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            replacement.advance(written);
        }
        connection.replacement = None;
        Poll::Ready(Ok(buffer.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

/// The position and status of a bare error in what is about to be written.
fn bare_error(buffer: &[u8]) -> Option<(usize, StatusCode)> {
    // Nearly every write ends with a body.
    let head = buffer.strip_suffix(b"\r\n\r\n")?;
    let text = head.utf8_chunks().last()?.valid();
    let start = text.rfind("HTTP/1.")?;
    let head = text.get(start..)?;
    let status = head
        .get(9..12)?
        .parse::<u16>()
        .ok()
        .filter(|status| *status >= 400)?;
    let bare = head
        .lines()
        .any(|line| line.eq_ignore_ascii_case("content-length: 0"));
    let status = StatusCode::from_u16(status).ok()?;
    bare.then(|| (buffer.len() - 4 - text.len() + start, status))
}

fn error_response(status: StatusCode, any_origin: bool) -> Bytes {
    let message = match status {
        StatusCode::REQUEST_TIMEOUT => "the request took too long to arrive",
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => "the request head is too large",
        _ => "the request is not valid HTTP",
    };
    let body = format!("{{\"message\":\"{message}\"}}");
    let id = request_id::new();
    log::info!("- - {} {} - {id}: {message}", status.as_u16(), body.len());
    let origin = if any_origin {
        "access-control-allow-origin: *\r\n"
    } else {
        ""
    };
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\ncache-control: no-store\r\n\
         {origin}x-request-id: {id}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    (head + &body).into()
}
