//! Values as the contract writes them and as PostgreSQL stores them.

pub mod euros;
pub mod timestamp;
