//! Writes the log to stderr from a thread of its own, many lines at once. A system call for each line would take a fifteenth
//! of a request's time.
//!
//! Logging never waits for stderr, which may be a pipe that no process reads. Lines that do not fit into the buffer are
//! dropped and counted.

use std::io::{self, ErrorKind, Write};
use std::mem;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use env_logger::{Builder, Env, Target};
use prometheus::{IntCounter, register_int_counter};

const INTERVAL: Duration = Duration::from_millis(50);

/// Above this size the thread writes at once.
const BATCH_BYTES: usize = 1 << 20;

/// Above this size lines are dropped.
const MAX_BYTES: usize = 4 << 20;

/// How long the end of the process waits for the last lines.
const LAST_WRITE_TIMEOUT: Duration = Duration::from_secs(1);

struct Buffer {
    lines: Vec<u8>,
    /// Whether the thread is writing lines that it took from the buffer.
    is_writing: bool,
    /// How many lines were dropped since the last batch.
    dropped: u64,
}

static BUFFER: Mutex<Buffer> = Mutex::new(Buffer {
    lines: Vec::new(),
    is_writing: false,
    dropped: 0,
});

/// The thread has to write, or has written.
static CHANGED: Condvar = Condvar::new();

/// Set by [`start`], so that counting a line cannot fail.
static DROPPED: OnceLock<IntCounter> = OnceLock::new();

/// Sets up the log. Call [`finish`] before the process ends.
pub fn start(default_filter: &str) {
    Builder::from_env(Env::default().default_filter_or(default_filter))
        .target(Target::Pipe(Box::new(LogWriter)))
        .init();
    let help = "Lines of the log that were dropped, because stderr did not take them.";
    // Fails only if the name is taken.
    if let Ok(counter) = register_int_counter!("log_lines_dropped_total", help) {
        DROPPED.get_or_init(|| counter);
    }
    thread::spawn(write_batches);
}

/// Adds a line without a level or a time.
pub fn add(line: &[u8]) {
    let mut buffer = lock();
    if buffer.lines.len() + line.len() > MAX_BYTES {
        buffer.dropped += 1;
        count_dropped(1);
        return;
    }
    buffer.lines.extend_from_slice(line);
    if buffer.lines.len() > BATCH_BYTES {
        CHANGED.notify_all();
    }
}

/// Waits until all lines are written, for at most a second.
pub fn finish() {
    let unwritten = |buffer: &mut Buffer| buffer.is_writing || !buffer.lines.is_empty();
    CHANGED.notify_all();
    drop(CHANGED.wait_timeout_while(lock(), LAST_WRITE_TIMEOUT, unwritten));
}

fn write_batches() {
    // Both buffers keep their memory for the next lines.
    let mut batch = Vec::new();
    loop {
        let waited = CHANGED.wait_timeout(lock(), INTERVAL);
        let (mut buffer, _) = waited.unwrap_or_else(PoisonError::into_inner);
        mem::swap(&mut batch, &mut buffer.lines);
        buffer.is_writing = true;
        let dropped = mem::take(&mut buffer.dropped);
        drop(buffer);
        if dropped > 0 {
            let gap = format!(
                "listing-api: dropped {dropped} lines at about this time, because stderr did not take them\n"
            );
            batch.extend_from_slice(gap.as_bytes());
        }
        write(&batch);
        batch.clear();
        lock().is_writing = false;
        CHANGED.notify_all();
    }
}

fn write(mut lines: &[u8]) {
    while !lines.is_empty() {
        match io::stderr().write(lines) {
            Ok(written) => lines = lines.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == ErrorKind::Interrupted => (),
            // Another process made stderr non-blocking.
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(INTERVAL),
            Err(_) => {
                let rest = lines.iter().filter(|byte| **byte == b'\n');
                count_dropped(rest.count() as u64);
                return;
            }
        }
    }
}

fn count_dropped(lines: u64) {
    if let Some(counter) = DROPPED.get() {
        counter.inc_by(lines);
    }
}

fn lock() -> MutexGuard<'static, Buffer> {
    BUFFER.lock().unwrap_or_else(PoisonError::into_inner)
}

struct LogWriter;

impl Write for LogWriter {
    /// Called with a whole line.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        add(line);
        Ok(line.len())
    }

    /// Called after each line, which the thread writes.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
