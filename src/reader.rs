//! Reads by id. Requests on one worker share one connection and travel down it together, instead of waiting in turn for one
//! of their own.

use std::sync::Arc;

use tokio::sync::Mutex;
use tokio_postgres::{Client, Row, Statement};

use crate::database::{Database, Parameters};
use crate::error::{ApiError, connection_is_lost, statement_is_stale};
use crate::{listings, prices};

pub struct Reader {
    database: Database,
    session: Mutex<Option<Arc<Session>>>,
}

struct Session {
    client: Client,
    listing: Statement,
    prices: Statement,
}

impl Reader {
    pub fn new(database: Database) -> Self {
        Self {
            database,
            session: Mutex::default(),
        }
    }

    pub async fn listing(&self, id: i32) -> Result<Option<Row>, ApiError> {
        let mut rows = self.query(|session| &session.listing, &[&id]).await?;
        Ok(rows.pop())
    }

    /// The whole history of a listing. Empty also for a listing that is not there.
    pub async fn prices(&self, id: i32) -> Result<Vec<Row>, ApiError> {
        self.query(|session| &session.prices, &[&id]).await
    }

    /// A read that failed for want of a connection is tried once more, on a new one.
    async fn query(
        &self,
        statement: impl Fn(&Session) -> &Statement,
        parameters: Parameters<'_>,
    ) -> Result<Vec<Row>, ApiError> {
        let mut retried = false;
        loop {
            let session = self.database.connected_within_limit(self.session()).await?;
            let answer = session.client.query(statement(&session), parameters);
            match self.database.within_limit(answer).await {
                Some(Ok(rows)) => return Ok(rows),
                Some(Err(error)) if connection_is_lost(&error) || statement_is_stale(&error) => {
                    self.discard(&session).await;
                    if retried {
                        return Err(error.into());
                    }
                    retried = true;
                }
                Some(Err(error)) => return Err(error.into()),
                None => {
                    self.discard(&session).await;
                    return Err(ApiError::timed_out(
                        "no answer from the database within the limit",
                    ));
                }
            }
        }
    }

    /// The shared connection, made by the first who needs it while the others wait for it.
    async fn session(&self) -> Result<Arc<Session>, ApiError> {
        let mut slot = self.session.lock().await;
        if let Some(session) = slot.as_ref().filter(|session| !session.client.is_closed()) {
            return Ok(session.clone());
        }
        let client = self.database.connect().await?;
        let preparing = async {
            let listing = client.prepare(&listings::select_one()).await?;
            let prices = client.prepare(prices::SELECT_ALL).await?;
            Ok((listing, prices))
        };
        let prepared = self.database.within_limit(preparing).await;
        let (listing, prices) = prepared
            .ok_or_else(|| ApiError::timed_out("no statement prepared within the limit"))??;
        let session = Arc::new(Session {
            client,
            listing,
            prices,
        });
        *slot = Some(session.clone());
        Ok(session)
    }

    /// Leaves a broken connection behind, unless another request has replaced it already.
    async fn discard(&self, broken: &Arc<Session>) {
        let mut slot = self.session.lock().await;
        if slot
            .as_ref()
            .is_some_and(|session| Arc::ptr_eq(session, broken))
        {
            *slot = None;
        }
    }
}
