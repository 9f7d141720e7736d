//! A REST API for real-estate listings over PostgreSQL, which keeps the price history by itself.
//!
//! [`server`] reads the [`settings`], checks the schema, serves and stops.
//! A request takes two hops: [`routes`] names the handler, and the handler holds its SQL.
//!
//! - [`listings`]: a listing's whole life. [`prices`]: the history. Start reading there.
//! - [`json`], [`parameters`], [`conditions`]: what clients send, checked. [`euros`]: exact money. [`pages`]: long lists.
//! - [`servers`]: which of them is the primary, who can be read. [`database`]: the pool for writes and lists, the check of the
//!   schema. [`gathering`]: requests that travel together. [`reader`]: reads by id, and [`commits`]: writes, which do.
//! - [`keys`]: who may write, and as whom.
//! - [`error`]: from every failure to a status and a message. [`edge`] and [`wire`]: what every response shares. [`awake`]:
//!   quick answers to whoever is alone.
//! - [`admin`] and [`metrics`]: for operators. [`docs`]: for consumers.

mod admin;
mod awake;
mod commits;
mod conditions;
mod database;
mod docs;
mod edge;
mod error;
mod euros;
mod gathering;
mod json;
mod keys;
mod listings;
mod metrics;
mod pages;
mod parameters;
mod prices;
mod reader;
mod routes;
mod server;
mod servers;
mod settings;
mod wire;

pub use server::run;
pub use settings::HELP as SETTINGS;
