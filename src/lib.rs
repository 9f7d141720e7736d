//! A REST API for real-estate listings over PostgreSQL, which logs the price history itself.
//!
//! To read an endpoint, open [`api`]: `mod.rs` has the routes, and each handler has its SQL beside it. You never need
//! `postgres` to understand one.
//!
//! Imports run one way, from top to bottom:
//!
//! - `service`: start, serve, stop. `check`: what is verified before.
//! - `api`: routes, handlers, SQL. `admin`: health and metrics.
//! - `http`: what all requests share.
//! - `postgres`: connections, failover, replicas, batches.
//! - `settings`, `types`: the environment; exact money and timestamps.

mod admin;
mod api;
mod check;
mod http;
mod postgres;
mod service;
mod settings;
mod types;

pub use admin::{check_health, version};
pub use service::run;
pub use settings::{SETTINGS, Setting, default_of, help, logs_json};
