//! The HTTP client of the tests. It checks each response of the service against the OpenAPI document.

use std::fmt;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::assert_documented;

/// A listing as a client sends it.
pub const LOFT: &str = r#"{"name":"Loft","postal_address":{"street_address":"1 rue Oberkampf","postal_code":"75011","city":"Paris","country":"FR"},"description":"Under the roof","building_type":"APARTMENT","latest_price_eur":480000,"surface_area_m2":42.5,"rooms_count":2,"bedrooms_count":1,"contact_phone_number":"+33123456789"}"#;

pub const JSON: &str = "content-type: application/json\r\n";

/// The headers of a write with an API key.
pub fn bearer(key: &str) -> String {
    format!("{JSON}authorization: Bearer {key}\r\n")
}

/// A connection to the service or to a proxy. The methods without `try_` fail the test if the connection fails.
pub struct Connection {
    stream: BufReader<TcpStream>,
    sent: Instant,
}

impl Connection {
    pub fn to(address: &str) -> Self {
        Self::try_to(address).expect("connect")
    }

    pub fn try_to(address: &str) -> io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        Ok(Self {
            stream: BufReader::new(stream),
            sent: Instant::now(),
        })
    }

    pub fn write(&mut self, bytes: &[u8]) {
        self.try_write(bytes).expect("send");
    }

    fn try_write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.sent = Instant::now();
        self.stream.get_mut().write_all(bytes)
    }

    /// Sends a request and does not wait for the response.
    pub fn request(&mut self, method: &str, path: &str, headers: &str, body: impl AsRef<[u8]>) {
        self.try_request(method, path, headers, body.as_ref())
            .expect("send");
    }

    pub fn try_request(
        &mut self,
        method: &str,
        path: &str,
        headers: &str,
        body: &[u8],
    ) -> io::Result<()> {
        let length = if body.is_empty() && ["GET", "HEAD", "DELETE", "OPTIONS"].contains(&method) {
            String::new()
        } else {
            format!("content-length: {}\r\n", body.len())
        };
        let head = format!("{method} {path} HTTP/1.1\r\nhost: test\r\n{headers}{length}\r\n");
        self.try_write(&[head.as_bytes(), body].concat())
    }

    /// Sends a request and returns the response.
    pub fn send(
        &mut self,
        method: &str,
        path: &str,
        headers: &str,
        body: impl AsRef<[u8]>,
    ) -> Response {
        self.try_send(method, path, headers, body.as_ref())
            .expect("a response")
    }

    pub fn try_send(
        &mut self,
        method: &str,
        path: &str,
        headers: &str,
        body: &[u8],
    ) -> io::Result<Response> {
        self.try_request(method, path, headers, body)?;
        let response = self.try_receive_unchecked(method)?;
        assert_documented(&response, method, path);
        Ok(response)
    }

    /// Reads the response to a request that was sent before.
    pub fn receive(&mut self, method: &str, path: &str) -> Response {
        let response = self.receive_unchecked(method);
        assert_documented(&response, method, path);
        response
    }

    /// Reads a response that the OpenAPI document does not describe, or that is too large to check.
    pub fn receive_unchecked(&mut self, method: &str) -> Response {
        self.try_receive_unchecked(method).expect("a response")
    }

    pub fn try_receive_unchecked(&mut self, method: &str) -> io::Result<Response> {
        let status_line = self.line()?;
        let status = status_line
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok());
        let mut headers = Vec::new();
        while let Some((name, value)) = self.line()?.split_once(": ") {
            headers.push((name.to_ascii_lowercase(), value.to_owned()));
        }
        let mut response = Response {
            status: status.ok_or(ErrorKind::InvalidData)?,
            headers,
            body: Vec::new(),
            took: Duration::ZERO,
        };
        if method != "HEAD" && ![204, 304].contains(&response.status) {
            response.body = if let Some(length) = response.header("content-length") {
                self.bytes(length.parse().expect("a length"))?
            } else {
                assert_eq!(response.header("transfer-encoding"), Some("chunked"));
                self.chunks()?
            };
        }
        response.took = self.sent.elapsed();
        Ok(response)
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        let line = line.strip_suffix("\r\n").ok_or(ErrorKind::UnexpectedEof)?;
        Ok(line.to_owned())
    }

    fn bytes(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn chunks(&mut self) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            let size = usize::from_str_radix(&self.line()?, 16).expect("the size of a chunk");
            body.extend(self.bytes(size)?);
            assert_eq!(self.line()?, "");
            if size == 0 {
                return Ok(body);
            }
        }
    }

    pub fn wait_for_the_first_byte(&mut self) {
        assert!(!self.stream.fill_buf().expect("a byte").is_empty());
    }

    /// All bytes until the connection ends or is reset.
    pub fn rest(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        // An error means that the connection was reset. The bytes before it stay in the vector.
        let _ = self.stream.read_to_end(&mut rest);
        rest
    }

    /// Asserts that the other side closes the connection and sends nothing more.
    pub fn assert_closed(&mut self) {
        let rest = self.rest();
        assert!(rest.is_empty(), "{}", String::from_utf8_lossy(&rest));
    }
}

pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// From the last byte sent to the last byte received.
    pub took: Duration,
}

impl Response {
    /// The value of a header that is given at most once. `Vary` may be given several times.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut values = self.headers.iter().filter(|(given, _)| given == name);
        let value = values.next().map(|(_, value)| value.as_str());
        assert!(
            name == "vary" || values.next().is_none(),
            "{name} is given twice"
        );
        value
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("the body is UTF-8")
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("not JSON: {self:?}"))
    }

    /// The status and the message of an error.
    pub fn error(&self) -> (u16, String) {
        let message = self.json()["message"].as_str().map(str::to_owned);
        (self.status, message.expect("a message"))
    }

    /// The id of a listing that was created.
    pub fn id(&self) -> i64 {
        assert_eq!(self.status, 201, "{self:?}");
        self.json()["id"].as_i64().expect("an id")
    }
}

impl fmt::Debug for Response {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let body = String::from_utf8_lossy(&self.body);
        write!(
            formatter,
            "{} {:?} {body} in {:?}",
            self.status, self.headers, self.took
        )
    }
}
