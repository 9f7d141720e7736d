//! A network link between the service and a PostgreSQL server, which a test can make fail.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use super::Cluster;

/// A TCP proxy in front of a server.
pub struct Link {
    pub address: String,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    server: Mutex<String>,
    /// The client's end of each connection.
    clients: Mutex<Vec<TcpStream>>,
    cut: AtomicBool,
    connections: AtomicUsize,
}

impl Link {
    pub fn to(server: &Cluster) -> Self {
        Self::to_address(server.address())
    }

    pub fn to_address(server: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind a port");
        let address = listener.local_addr().expect("local address").to_string();
        let link = Self {
            address,
            state: Arc::default(),
        };
        server.clone_into(&mut link.state.server.lock().expect("lock"));
        let state = link.state.clone();
        thread::spawn(move || {
            for client in listener.incoming() {
                let (client, state) = (client.expect("a connection"), state.clone());
                state.connections.fetch_add(1, Ordering::Relaxed);
                let clone = client.try_clone().expect("clone a socket");
                state.clients.lock().expect("lock").push(clone);
                thread::spawn(move || serve(client, &state));
            }
        });
        link
    }

    /// Connects new clients to another server.
    pub fn lead_to(&self, server: &Cluster) {
        server
            .address()
            .clone_into(&mut self.state.server.lock().expect("lock"));
    }

    /// Holds back all bytes while `cut` is true. No connection is closed.
    pub fn cut(&self, cut: bool) {
        self.state.cut.store(cut, Ordering::Relaxed);
    }

    /// Closes every connection, as a machine does that shuts down.
    pub fn close_connections(&self) {
        for client in self.state.clients.lock().expect("lock").drain(..) {
            // Fails if the connection has ended.
            let _ = client.shutdown(Shutdown::Both);
        }
    }

    /// How many connections clients have opened so far.
    pub fn connections(&self) -> usize {
        self.state.connections.load(Ordering::Relaxed)
    }
}

impl State {
    fn wait_while_cut(&self) {
        while self.cut.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

fn serve(client: TcpStream, state: &Arc<State>) {
    state.wait_while_cut();
    let server = state.server.lock().expect("lock").clone();
    // A refusal by the server closes the client's connection.
    let Ok(server) = TcpStream::connect(server) else {
        client.shutdown(Shutdown::Both).expect("close");
        return;
    };
    let clone = |stream: &TcpStream| stream.try_clone().expect("clone a socket");
    let (from, to, state_back) = (clone(&server), clone(&client), state.clone());
    thread::spawn(move || copy(from, to, &state_back));
    copy(client, server, state);
}

/// Copies bytes in one direction until either end closes.
fn copy(mut from: TcpStream, mut to: TcpStream, state: &State) {
    let mut piece = [0; 16384];
    while let Ok(length @ 1..) = from.read(&mut piece) {
        state.wait_while_cut();
        if to.write_all(&piece[..length]).is_err() {
            break;
        }
    }
    // Each fails if that end has closed.
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

/// The URL of a cluster's database through these addresses.
pub fn through(cluster: &Cluster, addresses: &[&str]) -> String {
    cluster.url.replace(cluster.address(), &addresses.join(","))
}
