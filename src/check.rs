//! What `--check` and each start verify: schema, statements, setup, connections.

use std::collections::BTreeMap;
use std::iter;

use anyhow::{Error, Result, ensure};
use tokio_postgres::Row;

use crate::api;
use crate::postgres::{Cluster, ConnectionLimit, ErrorKind, ServerReport, Session};
use crate::settings::{AuthMode, Settings};

/// A service that can serve.
pub struct Checked {
    /// Problems that must not stop a service: a right that was granted by mistake, for example. `--check` fails on them.
    pub warnings: Vec<String>,
    /// One line for each server.
    pub servers: Vec<String>,
}

/// Fails if the service could not serve every request, with sentences that name the remedy.
pub async fn check(cluster: &Cluster, settings: &Settings) -> Result<Checked> {
    if settings.sharding_proxy {
        return check_proxy(cluster);
    }
    check_schema(cluster).await?;
    let mut warnings = match check_statements(cluster, settings.auth).await? {
        Some(unverified) => vec![unverified],
        None => setup_problems(cluster).await?,
    };
    let servers = check_servers(cluster, settings, &mut warnings).await;
    if !cluster.accepts_writes() {
        warnings.push(format!(
            "no server of DATABASE_URL accepts writes: {}",
            servers.join("; ")
        ));
    }
    Ok(Checked { warnings, servers })
}

/// A sharding proxy passes each question to one of its servers, up or down. So operators check each server at its own address.
fn check_proxy(cluster: &Cluster) -> Result<Checked> {
    let servers = cluster.report().servers;
    let servers: Vec<_> = servers.iter().map(ToString::to_string).collect();
    ensure!(cluster.accepts_writes(), "{}", servers.join("; "));
    Ok(Checked {
        warnings: Vec::new(),
        servers,
    })
}

async fn check_schema(cluster: &Cluster) -> Result<()> {
    let unknown = cluster.check_schema().await.map_err(|reason| {
        let servers = cluster.report().servers;
        let states = servers
            .iter()
            .map(|server| format!("{} {}", server.name, server.state));
        // With several hosts, the reason alone does not tell which one failed.
        let states = states.filter(|_| servers.len() > 1);
        let lines: Vec<_> = iter::once(reason).chain(states).collect();
        Error::msg(lines.join("; "))
    })?;
    if let Some(unknown) = unknown {
        log::warn!(
            "the database has migration {unknown}, which this release does not know; a newer release is being rolled out"
        );
    }
    Ok(())
}

/// Fails with a sentence for each reason why PostgreSQL would refuse a statement. Returns a warning if it did not say, because
/// a table is locked, for example.
async fn check_statements(cluster: &Cluster, auth: AuthMode) -> Result<Option<String>> {
    let mut statements = api::statements(auth);
    statements.push(("the check of the setup", SELECT_SETUP_PROBLEMS.to_owned()));
    let mut refused: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    let mut unverified = None;
    for (request, sql) in statements {
        match cluster.explain(&sql).await {
            Ok(()) => (),
            Err(error) if error.kind == ErrorKind::Internal => {
                let requests = refused.entry(error.to_string()).or_default();
                requests.push(request);
                requests.dedup();
            }
            // The other statements may each take as long.
            Err(error) => {
                unverified = Some(format!("cannot verify {request}: {error}"));
                break;
            }
        }
    }
    if refused.is_empty() && unverified.is_none() {
        for row in cluster.read(SELECT_REFUSED_SEQUENCE, &[]).await? {
            refused.insert(row.try_get("reason")?, vec!["POST /listings"]);
        }
    }
    let mut sentences = Vec::new();
    for (reason, requests) in refused {
        // PostgreSQL's code for a missing right, or no code.
        let mend = if reason.contains(" 42501: ") || reason.starts_with("role ") {
            grant(cluster).await?
        } else {
            "the schema is not as the migrations left it, restore it from a backup".to_owned()
        };
        sentences.push(format!(
            "PostgreSQL refuses {}: {reason}: {mend}",
            requests.join(", ")
        ));
    }
    ensure!(sentences.is_empty(), "{}", sentences.join("\n"));
    Ok(unverified)
}

const SELECT_GRANT: &str = "select 'run: ' || case when pg_has_role(session_user, 'listing_api', 'usage') \
    then 'select public.reset_listing_access();' else format('grant listing_api to %I;', session_user) end as mend";

/// How the role gets the rights of the service.
async fn grant(cluster: &Cluster) -> Result<String> {
    let rows = cluster.read(SELECT_GRANT, &[]).await?;
    let mend = rows
        .first()
        .map_or(Ok(String::new()), |row| row.try_get("mend"))?;
    Ok(mend)
}

/// The sequence that gives out ids, if the role may not use it. That right is not part of the plan of an insert.
const SELECT_REFUSED_SEQUENCE: &str = "select format('role %I may not use the sequence %s', session_user, sequence) as reason \
    from pg_get_serial_sequence('public.listing', 'id') as sequence where not has_sequence_privilege(sequence, 'usage, update')";

/// What keeps the database from logging every price, and rights that no role needs.
const SELECT_SETUP_PROBLEMS: &str = "select explanation, mend from public.listing_setup_problem";

/// Each problem of the setup with the statement that repairs it.
async fn setup_problems(cluster: &Cluster) -> Result<Vec<String>> {
    let rows = cluster.read(SELECT_SETUP_PROBLEMS, &[]).await?;
    let problem = |row: &Row| {
        let (explanation, mend) = (row.try_get("explanation")?, row.try_get("mend")?);
        let (explanation, mend): (&str, &str) = (explanation, mend);
        Ok(format!("{explanation} Run: {mend}"))
    };
    rows.iter().map(problem).collect()
}

/// Returns a line for each server. Adds a warning for each that allows fewer connections than this instance may open.
async fn check_servers(
    cluster: &Cluster,
    settings: &Settings,
    warnings: &mut Vec<String>,
) -> Vec<String> {
    let sessions = cluster.sessions().await;
    let mut lines = Vec::new();
    for (server, session) in &sessions {
        let name = &server.name;
        // A host may be in both URLs.
        let same = sessions.iter().filter(|(other, _)| other.name == *name);
        let opened = same
            .map(|(other, _)| max_connections(other, settings))
            .sum();
        let line = match session {
            None => server.to_string(),
            Some(Err(error)) => {
                warnings.push(format!("{name} does not open another session: {error}"));
                server.to_string()
            }
            Some(Ok(Session { encryption, limits })) => {
                let low = limits.iter().find(|limit| limit.connections < opened);
                warnings.extend(low.map(|ConnectionLimit { connections, name: cause, mend }| format!(
                    "{name} allows {connections} connections ({cause}), but this instance opens up to {opened}: \
                     lower POOL_SIZE or WORKERS, or {mend}"
                )));
                format!("{server}, {encryption}")
            }
        };
        lines.push(line);
    }
    warnings.dedup();
    lines
}

/// How many connections this instance opens to a server at most.
fn max_connections(server: &ServerReport, settings: &Settings) -> i64 {
    let (on_replica, on_primary) = api::lookups(settings.auth);
    let pool = settings.pool_size.next_multiple_of(settings.workers);
    let connections = match server.role {
        "replica" => pool + on_replica * settings.workers + 1,
        // A standby may become the primary.
        _ => pool + on_primary * settings.workers + 2,
    };
    i64::try_from(connections).unwrap_or(i64::MAX)
}
