//! Compares the migrations of the database with those that this program was built with.

use deadpool_postgres::Object;
use refinery::{Migration, embed_migrations};
use tokio_postgres::Row;
use tokio_postgres::error::SqlState;

use super::error::{Error, connection_is_lost, describe};
use super::pool::Pool;

embed_migrations!("sql");

const SELECT_APPLIED: &str =
    "select version, name, checksum from public.refinery_schema_history order by version";

const MIGRATE: &str = "run: refinery migrate -e DATABASE_URL -p sql -g -d -m";

/// Fails if the service cannot work with the schema, with a sentence that names the remedy. Returns the first migration that
/// this program does not know, if there is one: operators upgrade the schema before the service.
pub async fn check(pool: &Pool) -> Result<Option<String>, String> {
    let applied = applied(pool).await?;
    let runner = migrations::runner();
    let mut built = runner.get_migrations().clone();
    built.sort();
    for (migration, (version, name, checksum)) in built.iter().zip(&applied) {
        if migration.version() != *version || migration.checksum().to_string() != *checksum {
            return Err(format!(
                "migration V{version}__{name} of the database differs from the one of this release: \
                 use the service and the migrations of the same release"
            ));
        }
    }
    if let Some(missing) = built.get(applied.len()) {
        return Err(format!("the database lacks migration {missing}: {MIGRATE}"));
    }
    let unknown = applied.get(built.len());
    Ok(unknown.map(|(version, name, _)| format!("V{version}__{name}")))
}

/// The newest migration that this program was built with, such as `V8`.
pub fn newest() -> String {
    let runner = migrations::runner();
    let versions = runner.get_migrations().iter().map(Migration::version);
    format!("V{}", versions.max().unwrap_or_default())
}

/// Version, name and checksum of each migration of the database.
async fn applied(pool: &Pool) -> Result<Vec<(i32, String, String)>, String> {
    let unreachable = |error: Error| {
        format!(
            "cannot connect to the database: {error}: check that the server runs, and the host, port, user, password and database in DATABASE_URL"
        )
    };
    pool.available().await.map_err(unreachable)?;
    let mut retried = false;
    let rows = loop {
        let client = pool.connections.get().await;
        let client = client.map_err(|error| unreachable(error.into()))?;
        let rows = pool.within_answer_timeout(client.query(SELECT_APPLIED, &[]));
        match rows.await.map_err(|error| error.to_string())? {
            // The session was idle, and has been ended since.
            Err(error) if connection_is_lost(&error) && !retried => {
                drop(Object::take(client));
                retried = true;
            }
            rows => break rows,
        }
    };
    let rows = rows.map_err(|error| match error.code() {
        Some(&SqlState::UNDEFINED_TABLE) => format!("the database has no schema yet: {MIGRATE}"),
        _ => format!("cannot read refinery_schema_history: {}", describe(&error)),
    })?;
    let read = |row: &Row| {
        Ok((
            row.try_get("version")?,
            row.try_get("name")?,
            row.try_get("checksum")?,
        ))
    };
    let applied: Result<_, tokio_postgres::Error> = rows.iter().map(read).collect();
    applied.map_err(|error| describe(&error))
}
