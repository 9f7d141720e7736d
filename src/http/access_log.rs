//! The line that the log gets for each request, with the cause of a failure.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use actix_web::HttpRequest;
use actix_web::http::header::HeaderValue;
use actix_web::http::{Method, StatusCode};
use actix_web::web::Data;
use log::Level;

use crate::settings::{Network, Settings};

/// What the log says about a request. One that the parser refused has no method and no path.
pub struct Line<'a> {
    pub level: Level,
    pub client: Option<IpAddr>,
    pub method: Option<&'a str>,
    /// With the query.
    pub path: Option<&'a str>,
    pub status: StatusCode,
    pub bytes: usize,
    pub started: Instant,
    pub request_id: &'a str,
    pub cause: Option<&'a str>,
}

impl Line<'_> {
    /// Writes the fields, for JSON, and the same as a sentence.
    pub fn write(self) {
        let Self {
            level,
            client,
            method,
            path,
            status,
            bytes,
            started,
            request_id,
            cause,
        } = self;
        let client = client.map(|client| client.to_string());
        let client = client.as_deref();
        let status = status.as_u16();
        let ms = (started.elapsed().as_secs_f64() * 1e6).round() / 1e3;
        log::log!(
            target: "request", level,
            request_id, client, method, path, status, bytes, ms, cause;
            "{} {} {} {status} {bytes} {ms}ms {request_id}{}{}",
            client.unwrap_or("-"),
            method.unwrap_or("-"),
            path.unwrap_or("-"),
            if cause.is_some() { ": " } else { "" },
            cause.unwrap_or_default()
        );
    }
}

/// A request that gets its response. Writes the line when it is dropped, after the last chunk of the response.
pub struct Entry {
    pub request: HttpRequest,
    pub id: HeaderValue,
    pub started: Instant,
    pub status: StatusCode,
    pub bytes: usize,
    pub cause: Option<String>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let request = &self.request;
        let settings = request.app_data::<Data<Settings>>();
        let trusted = settings.map_or(&[][..], |settings| &settings.trusted_proxies);
        let path = request.uri().path_and_query();
        let line = Line {
            level: self.cause.as_ref().map_or(Level::Info, |_| Level::Error),
            client: client(request, trusted),
            method: Some(request.method().as_str()),
            path: Some(path.map_or(request.path(), |path| path.as_str())),
            status: self.status,
            // HEAD has a body here too, but it is not sent.
            bytes: match *request.method() {
                Method::HEAD => 0,
                _ => self.bytes,
            },
            started: self.started,
            request_id: self.id.to_str().unwrap_or_default(),
            cause: self.cause.as_deref(),
        };
        line.write();
    }
}

/// The address of the peer. If that is a trusted proxy, the address that it got the request from, and so on.
fn client(request: &HttpRequest, trusted: &[Network]) -> Option<IpAddr> {
    let mut client = request.peer_addr()?.ip().to_canonical();
    let lines = request.headers().get_all("x-forwarded-for").rev();
    for entry in lines.flat_map(|line| line.to_str().unwrap_or_default().rsplit(',')) {
        if !trusted.iter().any(|network| network.contains(client)) {
            break;
        }
        let entry = entry.trim();
        // Some proxies add the port.
        let with_port = || entry.parse().map(|address: SocketAddr| address.ip());
        match entry.parse::<IpAddr>().or_else(|_| with_port()) {
            Ok(address) => client = address.to_canonical(),
            // Not an address, so this proxy is the last one that is known.
            Err(_) => break,
        }
    }
    Some(client)
}
