//! What can go wrong with a statement. Nothing here knows what a client is told about it.

use std::error::Error as StdError;
use std::fmt::{self, Display};
use std::io;

use deadpool_postgres::PoolError;
use tokio_postgres::error::{DbError, Severity, SqlState};

#[derive(Clone, Debug)]
pub struct Error {
    pub kind: ErrorKind,
    /// For the log. It may quote PostgreSQL.
    cause: String,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ErrorKind {
    /// No server can run the statement now, or the connection was lost while it ran.
    Unavailable,
    /// The queue is full.
    QueueFull,
    /// Another transaction writes the same row.
    Conflict,
    /// The statement ran into its time limit.
    TimedOut,
    /// A foreign key does not hold: a row of another table refers to this one, or this one refers to a row that is missing.
    ForeignKey,
    /// A row with the same unique values exists.
    Duplicate,
    /// PostgreSQL refused the statement, or its result cannot be read.
    Internal,
}

impl Error {
    pub fn unavailable(cause: impl Display) -> Self {
        Self::new(ErrorKind::Unavailable, cause)
    }

    pub fn queue_full() -> Self {
        Self::new(ErrorKind::QueueFull, "the queue is full")
    }

    pub fn conflict(cause: impl Display) -> Self {
        Self::new(ErrorKind::Conflict, cause)
    }

    pub fn internal(cause: impl Display) -> Self {
        Self::new(ErrorKind::Internal, cause)
    }

    fn new(kind: ErrorKind, cause: impl Display) -> Self {
        let cause = cause.to_string();
        Self { kind, cause }
    }
}

impl Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.cause)
    }
}

impl StdError for Error {}

impl From<tokio_postgres::Error> for Error {
    fn from(error: tokio_postgres::Error) -> Self {
        // One line, without the detail, which quotes rows.
        let mut cause = error.as_db_error().map_or_else(
            || describe(&error),
            |refusal| {
                format!(
                    "{} {}: {}",
                    refusal.severity(),
                    refusal.code().code(),
                    refusal.message()
                )
            },
        );
        let kind = match error.code() {
            Some(&SqlState::QUERY_CANCELED) => ErrorKind::TimedOut,
            Some(
                &(SqlState::T_R_SERIALIZATION_FAILURE
                | SqlState::T_R_DEADLOCK_DETECTED
                | SqlState::LOCK_NOT_AVAILABLE),
            ) => ErrorKind::Conflict,
            Some(&SqlState::UNIQUE_VIOLATION) => ErrorKind::Duplicate,
            // With `on delete restrict`, PostgreSQL 18 reports the second.
            Some(&(SqlState::FOREIGN_KEY_VIOLATION | SqlState::RESTRICT_VIOLATION)) => {
                ErrorKind::ForeignKey
            }
            // What a sharding proxy says about a server that it cannot reach.
            Some(&SqlState::SYSTEM_ERROR) => ErrorKind::Unavailable,
            _ if connection_is_lost(&error) => ErrorKind::Unavailable,
            _ => ErrorKind::Internal,
        };
        if error.code() == Some(&SqlState::SEQUENCE_GENERATOR_LIMIT_EXCEEDED) {
            cause += ": no row can be added until a DBA runs alter sequence, with a greater maxvalue, \
                or with restart at a number from which on no row exists";
        }
        Self { kind, cause }
    }
}

impl From<PoolError> for Error {
    fn from(error: PoolError) -> Self {
        match error {
            PoolError::Backend(error) => Self::unavailable(describe(&error)),
            error => Self::unavailable(error),
        }
    }
}

/// Whether the connection is unusable after this error: it was closed, or its server no longer accepts writes.
pub fn connection_is_lost(error: &tokio_postgres::Error) -> bool {
    let lost_codes = [
        SqlState::ADMIN_SHUTDOWN,
        SqlState::CRASH_SHUTDOWN,
        SqlState::CANNOT_CONNECT_NOW,
        SqlState::IDLE_SESSION_TIMEOUT,
        SqlState::READ_ONLY_SQL_TRANSACTION,
    ];
    match error.code() {
        // A sharding proxy closes the connection if its server ended during the statement.
        Some(&SqlState::SYSTEM_ERROR) => is_fatal(error),
        Some(code) => lost_codes.contains(code) || code.code().starts_with("08"),
        None => error.is_closed() || error.source().is_some_and(<dyn StdError>::is::<io::Error>),
    }
}

fn is_fatal(error: &tokio_postgres::Error) -> bool {
    let severity = error.as_db_error().and_then(DbError::parsed_severity);
    severity == Some(Severity::Fatal)
}

/// Whether PostgreSQL itself said that it did not run the statement. A proxy between them reports a lost connection with a code
/// of class 08 or 58, and then the statement may have run.
pub fn is_refusal(error: &tokio_postgres::Error) -> bool {
    let code = error.code().map(SqlState::code);
    code.is_some_and(|code| !code.starts_with("08") && !code.starts_with("58"))
}

/// Whether the statement has to be prepared again: its plan or its name is gone. PostgreSQL did not run it.
pub fn statement_is_stale(error: &tokio_postgres::Error) -> bool {
    matches!(
        error.code(),
        Some(&(SqlState::FEATURE_NOT_SUPPORTED | SqlState::INVALID_SQL_STATEMENT_NAME))
    )
}

/// An error and its causes in one line.
pub fn describe(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
