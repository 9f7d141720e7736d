//! The one error of the service: what the client is told, and what the log is told.

use std::error::Error as _;
use std::fmt::{self, Display};
use std::io;

use actix_web::http::{StatusCode, header};
use actix_web::{HttpResponse, ResponseError};
use deadpool_postgres::PoolError;
use serde::Serialize;
use tokio_postgres::error::SqlState;

/// A response of 400 or above. The cause is for the log alone.
#[derive(Clone, Debug)]
pub struct ApiError {
    status: StatusCode,
    message: String,
    cause: Option<String>,
    refused: bool,
}

/// What a response carries to the access log, which writes it down once, with the request id.
pub struct Cause(pub String);

#[derive(Serialize)]
struct Body<'a> {
    message: &'a str,
}

impl ApiError {
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
            cause: None,
            refused: false,
        }
    }

    /// What cannot be read as JSON, or a parameter that breaks its rule.
    pub fn malformed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// JSON that breaks a rule of the contract.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, message)
    }

    pub fn no_listing(id: impl Display) -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            format!("listing {id} does not exist"),
        )
    }

    /// The message says what to mend in the header, and never whether a key once was valid.
    pub fn unauthorized(message: &str) -> Self {
        Self::new(
            StatusCode::UNAUTHORIZED,
            format!("authorization: {message}"),
        )
    }

    pub fn unavailable(cause: impl Display) -> Self {
        let message = "the database cannot be reached at the moment, try again later";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, message).because(cause)
    }

    /// More than may wait are waiting already.
    pub fn crowded<T>(_: T) -> Self {
        let message = "too many requests at the moment, try again later";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, message)
    }

    pub fn contended(cause: impl Display) -> Self {
        let message = "somebody else was writing the same, try again";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, message).because(cause)
    }

    pub fn no_connection(error: &tokio_postgres::Error) -> Self {
        Self::unavailable(describe(error))
    }

    pub fn timed_out(cause: impl Display) -> Self {
        Self::new(
            StatusCode::GATEWAY_TIMEOUT,
            "the database took too long to answer",
        )
        .because(cause)
    }

    pub fn internal(cause: impl Display) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal error").because(cause)
    }

    pub fn is_malformed(&self) -> bool {
        self.status == StatusCode::BAD_REQUEST
    }

    pub fn is_internal(&self) -> bool {
        self.status == StatusCode::INTERNAL_SERVER_ERROR
    }

    /// Whether PostgreSQL answered, and said no to the statement.
    pub fn is_refusal(&self) -> bool {
        self.refused
    }

    pub fn is_unavailable(&self) -> bool {
        self.status == StatusCode::SERVICE_UNAVAILABLE
    }

    /// Whether another server may do better. A replica also breaks off what stands in the way of its replay.
    pub fn is_of_this_server(&self) -> bool {
        self.is_unavailable() || self.is_internal()
    }

    fn because(mut self, cause: impl Display) -> Self {
        self.cause = Some(cause.to_string());
        self
    }
}

impl Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.cause.as_ref().unwrap_or(&self.message))
    }
}

impl std::error::Error for ApiError {}

impl ResponseError for ApiError {
    fn status_code(&self) -> StatusCode {
        self.status
    }

    fn error_response(&self) -> HttpResponse {
        let mut builder = HttpResponse::build(self.status);
        builder.insert_header((header::CACHE_CONTROL, "no-store"));
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            builder.insert_header((header::RETRY_AFTER, "1"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            builder.insert_header((header::WWW_AUTHENTICATE, "Bearer"));
        }
        let mut response = builder.json(Body {
            message: &self.message,
        });
        if let Some(cause) = &self.cause {
            response.extensions_mut().insert(Cause(cause.clone()));
        }
        response
    }
}

/// Whether a connection is of no more use after this error: gone, ended, or to a server that no longer takes writes.
pub fn connection_is_lost(error: &tokio_postgres::Error) -> bool {
    let lost_codes = [
        SqlState::ADMIN_SHUTDOWN,
        SqlState::CRASH_SHUTDOWN,
        SqlState::CANNOT_CONNECT_NOW,
        SqlState::IDLE_SESSION_TIMEOUT,
        SqlState::READ_ONLY_SQL_TRANSACTION,
    ];
    match error.code() {
        Some(code) => lost_codes.contains(code) || code.code().starts_with("08"),
        None => {
            error.is_closed()
                || error
                    .source()
                    .is_some_and(<dyn std::error::Error>::is::<io::Error>)
        }
    }
}

/// Whether PostgreSQL itself said no, and so has done nothing. Without an answer nobody can tell. A pooler in between answers
/// with codes of class 08 where it has none.
pub fn is_refusal(error: &tokio_postgres::Error) -> bool {
    error
        .code()
        .is_some_and(|code| !code.code().starts_with("08"))
}

/// Whether the statement was refused before it did anything, because its plan or its name has gone: prepare it anew.
pub fn statement_is_stale(error: &tokio_postgres::Error) -> bool {
    matches!(
        error.code(),
        Some(&(SqlState::FEATURE_NOT_SUPPORTED | SqlState::INVALID_SQL_STATEMENT_NAME))
    )
}

impl From<tokio_postgres::Error> for ApiError {
    fn from(error: tokio_postgres::Error) -> Self {
        // Without the detail, which quotes rows, and in one line.
        let cause = error.as_db_error().map_or_else(
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
        let lost = connection_is_lost(&error);
        let mut said = match error.code() {
            Some(&SqlState::QUERY_CANCELED) => Self::timed_out(cause),
            Some(&(SqlState::T_R_SERIALIZATION_FAILURE | SqlState::T_R_DEADLOCK_DETECTED)) => {
                Self::contended(cause)
            }
            _ if lost => Self::unavailable(cause),
            _ => Self::internal(cause),
        };
        said.refused = is_refusal(&error) && !lost;
        said
    }
}

impl From<PoolError> for ApiError {
    fn from(error: PoolError) -> Self {
        match error {
            PoolError::Backend(error) => Self::no_connection(&error),
            error => Self::unavailable(error),
        }
    }
}

/// An error with all that led to it, in one line.
pub fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
