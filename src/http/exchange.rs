//! How far a connection has come with the request that it serves. The middleware and the reading of bodies write it, the
//! connection reads it.

use std::cell::Cell;
use std::error::Error;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use actix_web::HttpRequest;
use actix_web::body::{BodySize, MessageBody};
use actix_web::http::header;
use bytes::Bytes;
use pin_project_lite::pin_project;
use tokio::time::Instant;

use super::access_log::Entry;

#[derive(Default)]
pub struct Exchange {
    /// The requests that have begun.
    begun: Cell<u64>,
    is_serving: Cell<bool>,
    /// How many bytes of the body have not been read, unless it is in chunks.
    body_left: Cell<usize>,
    /// Whether the body is in chunks and has not been read to its end.
    is_in_chunks: Cell<bool>,
    /// Whether a handler reads the body.
    is_receiving: Cell<bool>,
    /// The connection that holds back what the client sent ahead.
    held: Cell<Option<Waker>>,
    /// Since when the client has read nothing of what is written.
    pub stalled: Cell<Option<Instant>>,
}

/// A request is served until this is dropped.
pub struct Serving(Rc<Exchange>);

/// The body of a request is read until this is dropped.
pub struct Receiving(Rc<Exchange>);

impl Exchange {
    pub fn begun(&self) -> u64 {
        self.begun.get()
    }

    pub fn is_serving(&self) -> bool {
        self.is_serving.get()
    }

    pub fn is_in_chunks(&self) -> bool {
        self.is_in_chunks.get()
    }

    /// Whether nothing may be read now.
    pub fn is_held(&self) -> bool {
        let all_is_read = if self.is_in_chunks() {
            !self.is_receiving.get()
        } else {
            self.body_left.get() == 0
        };
        self.is_serving() && all_is_read
    }

    /// How many bytes of a body may be read. `None`: the end of the body is unknown, or a head is read.
    pub fn take_body(&self, most: usize) -> Option<usize> {
        if !self.is_serving() || self.is_in_chunks() {
            return None;
        }
        let left = self.body_left.get();
        let length = left.min(most);
        self.body_left.set(left - length);
        Some(length)
    }

    /// Wakes the task when the connection may read on.
    pub fn hold(&self, cx: &Context<'_>) {
        self.held.set(Some(cx.waker().clone()));
    }

    fn release(&self) {
        if let Some(held) = self.held.take() {
            held.wake();
        }
    }
}

fn of(request: &HttpRequest) -> Option<Rc<Exchange>> {
    request.conn_data::<Rc<Exchange>>().cloned()
}

impl Serving {
    pub fn start(request: &HttpRequest) -> Option<Self> {
        let exchange = of(request)?;
        exchange.begun.set(exchange.begun() + 1);
        exchange.is_serving.set(true);
        let length = request.headers().get(header::CONTENT_LENGTH);
        let length = length.and_then(|length| length.to_str().ok()?.parse().ok());
        exchange.body_left.set(length.unwrap_or(0));
        let in_chunks = request.headers().contains_key(header::TRANSFER_ENCODING);
        exchange.is_in_chunks.set(in_chunks);
        Some(Self(exchange))
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.is_serving.set(false);
        self.0.release();
    }
}

impl Receiving {
    pub fn start(request: &HttpRequest) -> Option<Self> {
        let exchange = of(request)?;
        exchange.is_receiving.set(true);
        exchange.release();
        Some(Self(exchange))
    }

    /// The body has ended.
    pub fn complete(self) {
        self.0.is_in_chunks.set(false);
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        self.0.is_receiving.set(false);
    }
}

pin_project! {
    /// The body of a response. When it is dropped, its request is no longer served, and the log gets a line.
    pub struct Served<B> {
        #[pin]
        body: B,
        serving: Option<Serving>,
        entry: Entry,
    }
}

impl<B> Served<B> {
    pub fn new(body: B, serving: Option<Serving>, entry: Entry) -> Self {
        Self {
            body,
            serving,
            entry,
        }
    }
}

impl<B: MessageBody> MessageBody for Served<B> {
    type Error = Box<dyn Error>;

    fn size(&self) -> BodySize {
        self.body.size()
    }

    fn poll_next(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, Self::Error>>> {
        let this = self.project();
        let exchange = this.serving.as_ref().map(|serving| &serving.0);
        // A client that does not read gets no more chunks. The next write wakes the task.
        if exchange.is_some_and(|exchange| exchange.stalled.get().is_some()) {
            return Poll::Pending;
        }
        let polled = this.body.poll_next(cx).map_err(Into::<Self::Error>::into);
        match &polled {
            Poll::Ready(Some(Ok(chunk))) => this.entry.bytes += chunk.len(),
            // The status has been sent, so the log is the only place left for the cause.
            Poll::Ready(Some(Err(error))) => {
                let cause = root_cause(error.as_ref());
                this.entry.cause = Some(format!("the response broke off: {cause}"));
            }
            Poll::Ready(None) | Poll::Pending => (),
        }
        polled
    }
}

/// The error of the handler, without those that the compression wraps around it.
fn root_cause(error: &dyn Error) -> &dyn Error {
    error.source().map_or(error, root_cause)
}
