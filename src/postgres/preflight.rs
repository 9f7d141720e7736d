//! What can be verified before the service serves: its statements, how many connections fit, and encryption.

use std::error::Error as StdError;

use bytes::BytesMut;
use futures_util::future;
use tokio::time::timeout;
use tokio_postgres::config::TargetSessionAttrs;
use tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};

use super::connect::connect;
use super::error::{Error, describe};
use super::pool::Pool;
use super::server::Server;

/// What a server says about a session of the service.
pub struct Session {
    /// Whether the session is encrypted.
    pub encryption: String,
    /// Empty behind a connection pooler, which has limits of its own.
    pub limits: Vec<ConnectionLimit>,
}

pub struct ConnectionLimit {
    pub connections: i64,
    /// What sets the limit.
    pub name: String,
    /// How to raise it.
    pub mend: String,
}

/// The last condition recognizes a pooler: it does not pass on the settings of the session. No limit but `max_connections`
/// applies to superusers.
const SELECT_SESSION: &str = "select \
    case when pooled then 'encryption unknown behind a connection pooler' \
        when ssl.ssl then 'encrypted with ' || ssl.version else 'not encrypted' end as encryption, \
    allowed.connections::bigint, allowed.name, allowed.mend \
    from pg_stat_ssl as ssl \
    join pg_roles as role on role.rolname = session_user \
    join pg_database as database on database.datname = current_database() \
    cross join lateral (select source <> 'client' as pooled from pg_settings where name = 'plan_cache_mode') as settings \
    left join lateral (values \
        (current_setting('max_connections')::int - case when rolsuper then 0 else \
            current_setting('superuser_reserved_connections')::int \
            + case when pg_has_role(to_regrole('pg_use_reserved_connections'), 'usage') then 0 \
                else coalesce(current_setting('reserved_connections', true)::int, 0) end end, \
            'max_connections, less the reserved ones', 'raise max_connections'), \
        (case when not rolsuper then nullif(rolconnlimit, -1) end, format('connection limit of role %I', rolname), \
            format('run: alter role %I connection limit -1;', rolname)), \
        (case when not rolsuper then nullif(datconnlimit, -1) end, format('connection limit of database %I', datname), \
            format('run: alter database %I connection limit -1;', datname))) \
        as allowed (connections, name, mend) on not pooled and allowed.connections is not null \
    where ssl.pid = pg_backend_pid() order by allowed.connections";

impl Pool {
    /// Fails if PostgreSQL would refuse this statement: it cannot be prepared, or the role lacks a right. Does not run it.
    pub async fn explain(&self, sql: &str) -> Result<(), Error> {
        let parameters = (1..).take_while(|number| sql.contains(&format!("${number}")));
        let nulls: Vec<_> = parameters.map(|_| &Null as &(dyn ToSql + Sync)).collect();
        let explain = format!("explain (costs off) {sql}");
        self.read(&explain, &nulls).await.map(drop)
    }
}

/// Asks a server in a session that it ends. `None`: the server is down.
pub async fn ask(server: &Server) -> Option<Result<Session, Error>> {
    server.state().lag()?;
    let mut config = server.config.clone();
    config.target_session_attrs(TargetSessionAttrs::Any);
    let asking = async {
        let (client, _) = connect(config, server.tls.clone(), future::pending()).await?;
        let rows = client.query(SELECT_SESSION, &[]).await?;
        let mut session = Session {
            encryption: rows
                .first()
                .map_or(Ok(String::new()), |row| row.try_get("encryption"))?,
            limits: Vec::new(),
        };
        for row in rows {
            if let Some(connections) = row.try_get("connections")? {
                session.limits.push(ConnectionLimit {
                    connections,
                    name: row.try_get("name")?,
                    mend: row.try_get("mend")?,
                });
            }
        }
        Ok(session)
    };
    Some(match timeout(server.connect_timeout, asking).await {
        Ok(asked) => {
            asked.map_err(|error: tokio_postgres::Error| Error::unavailable(describe(&error)))
        }
        Err(_) => Err(Error::unavailable(
            "no connection to the database within the limit",
        )),
    })
}

/// A null of any type.
#[derive(Debug)]
struct Null;

impl ToSql for Null {
    fn to_sql(
        &self,
        _: &Type,
        _: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn StdError + Sync + Send>> {
        Ok(IsNull::Yes)
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    to_sql_checked!();
}
