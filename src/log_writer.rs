//! Writes the log to stderr from a thread of its own, many lines at once. A system call for each line would take a fifteenth
//! of a request's time.

use std::io::{self, Write};
use std::mem;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use env_logger::{Builder, Env, Target};

/// Lines that have not been written yet.
static LINES: Mutex<Vec<u8>> = Mutex::new(Vec::new());

/// Above this size the lines are written at once.
const MAX_BYTES: usize = 1 << 20;

/// Sets up the log. Call [`flush`] before the process ends.
pub fn start(default_filter: &str) {
    Builder::from_env(Env::default().default_filter_or(default_filter))
        .target(Target::Pipe(Box::new(LogWriter)))
        .init();
    thread::spawn(|| {
        loop {
            thread::sleep(Duration::from_millis(50));
            flush();
        }
    });
}

pub fn flush() {
    /// What is being written. Both buffers keep their memory for the next lines.
    static WRITING: Mutex<Vec<u8>> = Mutex::new(Vec::new());
    let mut writing = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
    mem::swap(
        &mut *writing,
        &mut *LINES.lock().unwrap_or_else(PoisonError::into_inner),
    );
    // There is no other place to report that stderr is closed.
    let _ = io::stderr().write_all(&writing);
    writing.clear();
}

struct LogWriter;

impl Write for LogWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut lines = LINES.lock().unwrap_or_else(PoisonError::into_inner);
        lines.extend_from_slice(line);
        let is_full = lines.len() > MAX_BYTES;
        drop(lines);
        if is_full {
            flush();
        }
        Ok(line.len())
    }

    /// Called after each line, which the thread writes.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
