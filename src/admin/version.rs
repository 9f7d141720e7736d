//! What was built: `--version` and a metric name it.

use crate::postgres::schema_version;

pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Set by build.rs.
pub const COMMIT: &str = env!("COMMIT");

#[must_use]
pub fn version() -> String {
    format!("{VERSION} (commit {COMMIT}, schema {})", schema_version())
}
