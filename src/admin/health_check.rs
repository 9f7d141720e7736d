//! `--health`: asks the running instance for its health. An image without a shell or curl can check itself this way.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::settings;

/// For the connection, and again for the answer.
const TIMEOUT: Duration = Duration::from_secs(3);

/// Returns what `/health/live` or `/health/ready` of the instance at `ADMIN_ADDR` answers. Fails if the status is not 200.
///
/// A connection to 0.0.0.0 or [::] reaches this machine.
#[expect(
    clippy::missing_errors_doc,
    reason = "the error is the reason, for the operator"
)]
pub fn check_health(name: &str) -> Result<String> {
    let address = settings::admin_addr()?;
    let asked = format!("http://{address}/health/{name}");
    let answer = ask(address, name).map_err(|error| match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => {
            io::Error::other(format!("timed out after {TIMEOUT:?}"))
        }
        _ => error,
    });
    let answer = answer.with_context(|| format!("no answer from {asked}"))?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).unwrap_or("nothing");
    ensure!(status == "200", "{asked} answers {status}: {body}");
    Ok(body.to_owned())
}

fn ask(address: SocketAddr, name: &str) -> io::Result<String> {
    let mut instance = TcpStream::connect_timeout(&address, TIMEOUT)?;
    instance.set_read_timeout(Some(TIMEOUT))?;
    // With HTTP/1.0, the end of the connection is the end of the answer.
    write!(instance, "GET /health/{name} HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    instance.read_to_string(&mut answer)?;
    Ok(answer)
}
