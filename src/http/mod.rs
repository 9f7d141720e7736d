//! What all requests share: bodies, parameters, errors, conditional requests, metrics, the log.

pub mod access_log;
pub mod body;
pub mod busy_poll;
pub mod conditional;
pub mod connection;
pub mod error;
pub mod exchange;
pub mod fields;
pub mod json_array;
pub mod metrics;
pub mod middleware;
pub mod query;
pub mod request_id;
