//! Writes the log to stderr from a thread of its own, many lines at once. A system call for each line would take a fifteenth
//! of a request's time. A line is text or, with `LOG_FORMAT=json`, a JSON object.
//!
//! Logging never waits for stderr, which may be a pipe that no process reads. Lines that do not fit into the buffer are
//! dropped and counted.

use std::fmt::Display;
use std::io::{self, ErrorKind, Write};
use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime};

use chrono::{DateTime, SecondsFormat, Utc};
use env_logger::fmt::Formatter;
use env_logger::{Builder, Env, Target};
use log::kv::{self, Key, Value, VisitSource, VisitValue};
use log::{Level, Record};
use prometheus::{IntCounter, register_int_counter};
use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};

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

static IS_JSON: AtomicBool = AtomicBool::new(false);

/// Sets up the log. Call [`finish`] before the process ends.
pub fn start(default_filter: &str, is_json: bool) {
    IS_JSON.store(is_json, Ordering::Relaxed);
    Builder::from_env(Env::default().default_filter_or(default_filter))
        .target(Target::Pipe(Box::new(LogWriter)))
        .format(if is_json { write_json } else { write_text })
        .init();
    let help = "Lines of the log that were dropped, because stderr did not take them.";
    // Fails only if the name is taken.
    if let Ok(counter) = register_int_counter!("log_lines_dropped_total", help) {
        DROPPED.get_or_init(|| counter);
    }
    thread::spawn(write_batches);
}

/// Adds a line that no filter drops.
pub fn add(message: &str) {
    add_line(&line(message));
}

fn line(message: &str) -> Vec<u8> {
    if !IS_JSON.load(Ordering::Relaxed) {
        return format!("listing-api: {message}\n").into_bytes();
    }
    let time = DateTime::<Utc>::from(SystemTime::now());
    let time = time.to_rfc3339_opts(SecondsFormat::Millis, true);
    let mut record = Record::builder();
    let record = record.level(Level::Error).target("listing-api");
    let mut line = Vec::new();
    // Nothing can fail in memory.
    let _ = write_object(
        &mut line,
        &time,
        &record.args(format_args!("{message}")).build(),
    );
    line
}

fn add_line(line: &[u8]) {
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
                "dropped {dropped} lines at about this time, because stderr did not take them"
            );
            batch.extend_from_slice(&line(&gap));
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
        add_line(line);
        Ok(line.len())
    }

    /// Called after each line, which the thread writes.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write_text(line: &mut Formatter, record: &Record) -> io::Result<()> {
    let (time, level, target) = (line.timestamp_millis(), record.level(), record.target());
    write!(line, "[{time} {level:<5} {target}] ")?;
    write!(Escaped(line), "{}", record.args())?;
    line.write_all(b"\n")
}

/// Escapes control characters: a name in the error of a trigger, for example, must not make a line of its own.
struct Escaped<'a>(&'a mut Formatter);

impl Write for Escaped<'_> {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        for part in text.chunk_by(|a, b| a.is_ascii_control() == b.is_ascii_control()) {
            if part.first().is_some_and(u8::is_ascii_control) {
                write!(self.0, "{}", part.escape_ascii())?;
            } else {
                self.0.write_all(part)?;
            }
        }
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write_json(line: &mut Formatter, record: &Record) -> io::Result<()> {
    let time = line.timestamp_millis();
    write_object(line, &time, record)
}

/// A record has fields of its own, or else a message.
fn write_object(mut line: impl Write, time: &impl Display, record: &Record) -> io::Result<()> {
    let mut object = serde_json::Serializer::new(&mut line);
    let mut object = object.serialize_map(None)?;
    object.serialize_entry("time", &format_args!("{time}"))?;
    object.serialize_entry("level", record.level().as_str())?;
    object.serialize_entry("target", record.target())?;
    let fields = record.key_values();
    if fields.count() == 0 {
        object.serialize_entry("message", record.args())?;
    }
    let written = fields.visit(&mut Fields(&mut object));
    written.map_err(io::Error::other)?;
    object.end()?;
    line.write_all(b"\n")
}

/// Adds fields to an object.
struct Fields<'a, O>(&'a mut O);

impl<'kvs, O: SerializeMap> VisitSource<'kvs> for Fields<'_, O> {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), kv::Error> {
        value.visit(Field {
            object: self.0,
            name: key.as_str(),
        })
    }
}

struct Field<'a, O> {
    object: &'a mut O,
    name: &'a str,
}

impl<O: SerializeMap> Field<'_, O> {
    fn add(&mut self, value: &(impl Serialize + ?Sized)) -> Result<(), kv::Error> {
        let added = self.object.serialize_entry(self.name, value);
        added.map_err(|_| kv::Error::msg("a field cannot be serialized"))
    }
}

impl<O: SerializeMap> VisitValue<'_> for Field<'_, O> {
    fn visit_null(&mut self) -> Result<(), kv::Error> {
        Ok(())
    }

    fn visit_u64(&mut self, value: u64) -> Result<(), kv::Error> {
        self.add(&value)
    }

    fn visit_f64(&mut self, value: f64) -> Result<(), kv::Error> {
        self.add(&value)
    }

    fn visit_str(&mut self, value: &str) -> Result<(), kv::Error> {
        self.add(value)
    }

    fn visit_any(&mut self, value: Value) -> Result<(), kv::Error> {
        self.add(&format_args!("{value}"))
    }
}
