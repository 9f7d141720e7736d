//! The stream between the HTTP parser and the socket, for two things that the parser does not do.
//!
//! A client that has gone is not worked for: the end of what it sends is an error here, which drops its request, and with that
//! cancels the statement.
//!
//! The few errors that the parser answers by itself, before there is a request, get the form of the contract. For a head that
//! is malformed, too long or too slow it writes a bare status and ends the connection. The error body takes its place here.
//! The parser's own responses are the only ones of 400 or above without a body, and always the last of their connection.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use actix_web::http::StatusCode;
use actix_web::rt::net::TcpStream;
use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::edge::new_request_id;

pub struct Wire {
    socket: TcpStream,
    /// Whether pages of any origin may read what is written here.
    any_origin: bool,
    /// What is written in place of a bare error, as far as it is not written yet.
    instead: Option<Bytes>,
}

impl Wire {
    pub fn new(socket: TcpStream, any_origin: bool) -> Self {
        Self {
            socket,
            any_origin,
            instead: None,
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let filled = buffer.filled().len();
        ready!(Pin::new(&mut self.socket).poll_read(cx, buffer))?;
        if buffer.filled().len() == filled && buffer.remaining() > 0 {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        let wire = &mut *self;
        if wire.instead.is_none() {
            match bare_error(buffer) {
                Some((0, status)) => wire.instead = Some(error_response(status, wire.any_origin)),
                // The responses before it go first, as they are.
                Some((start, _)) => {
                    let before = buffer.get(..start).unwrap_or_default();
                    return Pin::new(&mut wire.socket).poll_write(cx, before);
                }
                None => return Pin::new(&mut wire.socket).poll_write(cx, buffer),
            }
        }
        while let Some(instead) = wire.instead.as_mut().filter(Buf::has_remaining) {
            let written = ready!(Pin::new(&mut wire.socket).poll_write(cx, instead))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            instead.advance(written);
        }
        wire.instead = None;
        Poll::Ready(Ok(buffer.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

/// Where in what is about to be written a bare error begins, and which.
fn bare_error(buffer: &[u8]) -> Option<(usize, StatusCode)> {
    // Nearly every write ends in a body.
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
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => "the head of the request is too long",
        _ => "the request is not well-formed HTTP",
    };
    let body = format!("{{\"message\":\"{message}\"}}");
    let id = new_request_id();
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
