//! The one error of the API, and the one table that turns database errors into statuses.

use std::fmt::{self, Display};

use actix_web::http::{StatusCode, header};
use actix_web::{HttpResponse, ResponseError};
use serde::Serialize;

use crate::postgres::{self, ErrorKind};

/// A response of 400 or above.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    message: String,
    /// For the log alone.
    cause: Option<String>,
}

/// A response carries its cause to the middleware, which logs it once, with the request id.
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
        }
    }

    /// 400: the body is not JSON, or a parameter breaks its rule.
    pub fn malformed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// 422: the body is JSON but breaks a rule.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, message)
    }

    /// 401: the message says what to correct in the header, and never whether a key was once valid.
    pub fn unauthorized(message: &str) -> Self {
        Self::new(
            StatusCode::UNAUTHORIZED,
            format!("authorization: {message}"),
        )
    }

    /// 500
    pub fn internal(cause: impl Display) -> Self {
        postgres::Error::internal(cause).into()
    }

    pub fn is_malformed(&self) -> bool {
        self.status == StatusCode::BAD_REQUEST
    }
}

impl From<postgres::Error> for ApiError {
    fn from(error: postgres::Error) -> Self {
        let (status, message) = match error.kind {
            ErrorKind::Unavailable => (
                StatusCode::SERVICE_UNAVAILABLE,
                "the database cannot be reached at the moment, try again later",
            ),
            ErrorKind::QueueFull => (
                StatusCode::SERVICE_UNAVAILABLE,
                "too many requests at the moment, try again later",
            ),
            ErrorKind::Conflict => (
                StatusCode::SERVICE_UNAVAILABLE,
                "another request is writing the same listing, try again",
            ),
            ErrorKind::TimedOut => (
                StatusCode::GATEWAY_TIMEOUT,
                "the database took too long to answer",
            ),
            ErrorKind::ForeignKey | ErrorKind::Duplicate | ErrorKind::Internal => {
                (StatusCode::INTERNAL_SERVER_ERROR, "internal error")
            }
        };
        // A full queue is no failure to look into, and would fill the log.
        let cause = (error.kind != ErrorKind::QueueFull).then(|| error.to_string());
        Self {
            cause,
            ..Self::new(status, message)
        }
    }
}

/// A column that cannot be read.
impl From<tokio_postgres::Error> for ApiError {
    fn from(error: tokio_postgres::Error) -> Self {
        postgres::Error::from(error).into()
    }
}

/// For the log.
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
