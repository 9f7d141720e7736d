//! The socket of a client, between the network and the HTTP parser.
//!
//! The parser takes in all that it is given, so the connection gives it one head, and then nothing but the body until the
//! request is served. What a client sends ahead stays in the socket, and in the end with the client.
//!
//! The head of each request has to arrive in time. The parser's own limit is for the first request only. A client that reads
//! nothing of a response for too long is disconnected.
//!
//! If the client disconnects, the parser gets an error instead of the end of its input, and drops the request in flight. If the
//! client has sent something behind that request, this shows only after the response. The parser's own `h1_allow_half_closed(false)` also drops the responses before a malformed
//! request.
//!
//! The parser answers a malformed or oversized head itself, with a bare status, and closes the connection. This wrapper
//! writes the error of the contract instead. The parser's own responses are the only ones of 400 or above without a body, and
//! always the last of their connection.

use std::io;
use std::mem;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use actix_web::http::StatusCode;
use actix_web::rt::net::TcpStream;
use bytes::{Buf, Bytes, BytesMut};
use log::Level;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

use super::access_log::Line;
use super::body::READ_TIMEOUT;
use super::exchange::Exchange;
use super::request_id;

/// No head may contain it.
const INVALID: &[u8] = b"\0";

/// What is read at a time. Most requests are shorter.
const PIECE_BYTES: usize = 2048;

/// How long a client may read nothing of a response.
const STALL_TIMEOUT: Duration = Duration::from_mins(1);

/// What the parser has got last.
#[derive(Default)]
struct Given {
    /// Whether it was a part of a head, and not yet the end of it.
    is_head: bool,
    byte: u8,
    /// Whether the line of that byte has no other characters.
    line_is_empty: bool,
}

pub struct Connection {
    socket: TcpStream,
    exchange: Rc<Exchange>,
    /// What was read and not given to the parser yet.
    ahead: BytesMut,
    given: Given,
    /// Whether the parser has to look at what it got before it gets more.
    parse_first: bool,
    /// How many requests had begun when the head of the next one began, and when that was.
    head: (u64, Instant),
    /// May fire before a deadline. It is reset only after it fired, by at most [`READ_TIMEOUT`].
    timer: Pin<Box<Sleep>>,
    is_late: bool,
    /// Whether pages of any origin may read the response.
    any_origin: bool,
    /// The rest of the error that replaces a bare one.
    replacement: Option<Bytes>,
}

impl Connection {
    pub fn new(socket: TcpStream, any_origin: bool) -> Self {
        Self {
            socket,
            exchange: Rc::default(),
            ahead: BytesMut::new(),
            given: Given::default(),
            parse_first: false,
            head: (0, Instant::now()),
            timer: Box::pin(sleep(READ_TIMEOUT)),
            is_late: false,
            any_origin,
            replacement: None,
        }
    }

    pub fn exchange(&self) -> Rc<Exchange> {
        self.exchange.clone()
    }

    /// Waits until the request is served. Notices a client that disconnects without having sent more.
    fn poll_hold(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.ahead.is_empty() {
            let mut byte = [0];
            let peeked = ready!(self.socket.poll_peek(cx, &mut ReadBuf::new(&mut byte)))?;
            if peeked == 0 {
                return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
            }
        }
        self.exchange.hold(cx);
        Poll::Pending
    }

    /// Passes on what the parser may get of what was read. Returns how many bytes are used up.
    fn pass(&mut self, bytes: &[u8], buffer: &mut ReadBuf<'_>) -> usize {
        if let Some(length) = self.exchange.take_body(bytes.len()) {
            buffer.put_slice(&bytes[..length]);
            return length;
        }
        let is_head = !self.exchange.is_in_chunks();
        let mut start = 0;
        if is_head && !self.given.is_head {
            let is_line_end = |byte: &&u8| matches!(byte, b'\r' | b'\n');
            start = bytes.iter().take_while(is_line_end).count();
            if start == bytes.len() {
                return start;
            }
            self.given.is_head = true;
        }
        self.note_head();
        for (index, byte) in bytes.iter().enumerate().skip(start) {
            let last = mem::replace(&mut self.given.byte, *byte);
            match byte {
                // The parser would accept it as the end of a line, but other servers do not.
                b'\n' if is_head && last != b'\r' => {
                    buffer.put_slice(&bytes[start..index]);
                    buffer.put_slice(INVALID);
                    return index + 1;
                }
                b'\n' if mem::replace(&mut self.given.line_is_empty, true) => {
                    self.given.is_head = false;
                    self.parse_first = true;
                    buffer.put_slice(&bytes[start..=index]);
                    return index + 1;
                }
                b'\n' | b'\r' => (),
                _ => self.given.line_is_empty = false,
            }
        }
        buffer.put_slice(&bytes[start..]);
        bytes.len()
    }

    /// The parser closes the connection after an error of its own. If input was unread, the system would reset the connection,
    /// and the client could lose the response.
    fn discard_input(&self) {
        let mut unread = [0; PIECE_BYTES];
        for _ in 0..64 {
            if !matches!(self.socket.try_read(&mut unread), Ok(1..)) {
                break;
            }
        }
    }

    /// Notes when a head begins.
    fn note_head(&mut self) {
        let begun = self.exchange.begun();
        if !self.exchange.is_serving() && self.head.0 != begun {
            self.head = (begun, Instant::now());
        }
    }

    /// If a head is late, makes the parser answer in turn and close.
    fn poll_late(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let (begun, started) = self.head;
        if self.is_late || begun != self.exchange.begun() {
            return Poll::Pending;
        }
        while started.elapsed() < READ_TIMEOUT {
            ready!(self.timer.as_mut().poll(cx));
            self.timer.as_mut().reset(started + READ_TIMEOUT);
        }
        if self.exchange.is_in_chunks() {
            // The rest of a body that no handler reads. Its request has been answered.
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        self.is_late = true;
        buffer.put_slice(INVALID);
        Poll::Ready(Ok(()))
    }

    fn poll_write_to_socket(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write(cx, bytes);
        if written.is_ready() {
            if self.exchange.stalled.take().is_some() {
                cx.waker().wake_by_ref();
            }
            return written;
        }
        let stalled = self.exchange.stalled.get().unwrap_or_else(Instant::now);
        self.exchange.stalled.set(Some(stalled));
        let deadline = stalled + STALL_TIMEOUT;
        loop {
            ready!(self.timer.as_mut().poll(cx));
            let now = Instant::now();
            if now >= deadline {
                // Discards what the system still keeps for the client.
                self.socket.set_zero_linger()?;
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            self.timer.as_mut().reset(deadline.min(now + READ_TIMEOUT));
        }
    }

    /// The error of the contract. Writes it to the log.
    fn error_response(&self, status: StatusCode) -> Bytes {
        let message = match status {
            StatusCode::REQUEST_TIMEOUT => "the request took too long to arrive",
            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => "the request head is too large",
            _ => "the request is not valid HTTP",
        };
        let body = format!("{{\"message\":\"{message}\"}}");
        let id = request_id::new();
        let peer = self.socket.peer_addr().ok();
        let line = Line {
            level: Level::Info,
            client: peer.map(|peer| peer.ip().to_canonical()),
            method: None,
            path: None,
            status,
            bytes: body.len(),
            started: self.head.1.into_std(),
            request_id: &id,
            cause: Some(message),
        };
        line.write();
        let origin = if self.any_origin {
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
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let connection = &mut *self;
        let filled = buffer.filled().len();
        while buffer.filled().len() == filled {
            if mem::take(&mut connection.parse_first) {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            // A client that does not read gets no more requests served. The next write wakes the task.
            if connection.exchange.stalled.get().is_some() {
                return Poll::Pending;
            }
            if connection.exchange.is_held() {
                return connection.poll_hold(cx);
            }
            let most = buffer.remaining().min(PIECE_BYTES);
            if !connection.ahead.is_empty() {
                let mut ahead = mem::take(&mut connection.ahead);
                let used = connection.pass(&ahead[..ahead.len().min(most)], buffer);
                ahead.advance(used);
                connection.ahead = ahead;
                continue;
            }
            let mut bytes = [0; PIECE_BYTES];
            let mut piece = ReadBuf::new(&mut bytes[..most]);
            let read = Pin::new(&mut connection.socket).poll_read(cx, &mut piece)?;
            if read.is_pending() {
                return connection.poll_late(cx, buffer);
            }
            let piece = piece.filled();
            if piece.is_empty() {
                return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
            }
            let used = connection.pass(piece, buffer);
            // A shorter piece emptied the socket.
            connection.parse_first &= used < piece.len() || piece.len() == most;
            connection.ahead.extend_from_slice(&piece[used..]);
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
                    let status = if connection.is_late {
                        StatusCode::REQUEST_TIMEOUT
                    } else {
                        status
                    };
                    connection.replacement = Some(connection.error_response(status));
                }
                // The responses before it are written first.
                Some((start, _)) => {
                    let before = buffer.get(..start).unwrap_or_default();
                    return connection.poll_write_to_socket(cx, before);
                }
                None => return connection.poll_write_to_socket(cx, buffer),
            }
        }
        while let Some(mut rest) = connection.replacement.take().filter(Buf::has_remaining) {
            let written = connection.poll_write_to_socket(cx, &rest);
            if let Poll::Ready(Ok(written)) = written {
                rest.advance(written);
            }
            connection.replacement = Some(rest);
            if ready!(written)? == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
        }
        connection.discard_input();
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
