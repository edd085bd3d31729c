//! The connection's task: connects, runs the writer on the client, and connects again when the client has ended.

use crate::config::SUCCESSFUL_ATTEMPT;
use crate::connection::Connection;
use crate::connection::writer::Writer;
use crate::error::{Result, Status};
use crate::metrics::count;
use crate::nats::client::Client;
use crate::nats::outbox::DurableMessage;
use crate::presence::registry;
use crate::process::random::jitter;
use crate::process::runtime;
use crate::sync::atomic::Ordering;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// After a connection that lasted less than this there is a pause before the next one. It doubles each time, up to a
/// limit.
const SHORT_LIVED: Duration = Duration::from_millis(100);
const MAX_PAUSE: Duration = Duration::from_millis(100);

impl Connection {
    /// Connects for the first time, unless the option is to retry that, and calls `ready`. Returns when the connection
    /// is closed.
    pub(super) async fn run(self: Arc<Self>, ready: impl FnOnce(Result<()>)) {
        let mut first = None;
        if !self.options.retry_on_initial_connect {
            match self.pool.connect().await {
                Ok(client) => {
                    self.use_client(&client).await;
                    first = Some(client);
                }
                Err(error) => return ready(Err(error)),
            }
        }
        ready(Ok(()));
        let wakeups = Arc::clone(&self.wakeups);
        let caller = self
            .runtime
            .spawn(async move { while runtime::catch_panic("calling wakeups", wakeups.run()).await.is_err() {} });
        self.supervise(first).await;
        caller.abort();
        self.wakeups.end();
    }

    async fn supervise(&self, mut client: Option<Client>) {
        let mut pause = Duration::ZERO;
        loop {
            if let Some(client) = client.take() {
                let begun = Instant::now();
                let mut writer = Writer::new(self, &client);
                let written = tokio::select! {
                    written = runtime::catch_panic("sending", writer.run()) => Some(written),
                    () = self.end.notified() => None,
                };
                self.disconnect(writer.into_unconfirmed());
                let Some(written) = written else { return client.close().await };
                let why = match written {
                    Err(error) => Some(format!(": {error}")),
                    Ok(()) => runtime::last_panic().map(|panic| format!(": the NATS client failed: {panic}")),
                };
                let text = format!("the connection to nats-server is lost{}", why.unwrap_or_default());
                self.log.push_disconnected(Status::Disconnected, &text);
                pause = match begun.elapsed() < SHORT_LIVED {
                    true => (pause * 2).max(self.options.reconnect_min).min(MAX_PAUSE).min(self.options.reconnect_max),
                    false => Duration::ZERO,
                };
            }
            let next = tokio::select! {
                client = self.reconnect(pause) => client,
                () = self.end.notified() => return,
            };
            match next {
                Some(next) => match runtime::catch_panic("subscribing", self.use_client(&next)).await {
                    Ok(()) => client = Some(next),
                    Err(error) => {
                        self.disconnect(VecDeque::default());
                        self.log(error.status, || error.to_string());
                    }
                },
                None => return self.give_up(),
            }
        }
    }

    /// Tries to connect until that succeeds; None after the maximum number of attempts.
    async fn reconnect(&self, pause: Duration) -> Option<Client> {
        let mut delay = self.options.reconnect_min.min(self.options.reconnect_max);
        let mut failed = 0;
        // The first attempt follows at once, but with jitter: a server that restarts disconnects all clients together.
        sleep(pause / 2 + jitter(delay.max(pause / 2))).await;
        loop {
            match self.pool.connect().await {
                Ok(client) => return Some(client),
                Err(error) => self.log(error.status, || format!("cannot connect: {error}")),
            }
            failed += 1;
            if failed == self.options.max_reconnects {
                return None;
            }
            sleep(delay / 2 + jitter(delay / 2)).await;
            delay = (delay * 2).min(self.options.reconnect_max);
        }
    }

    fn give_up(&self) {
        self.closed.store(true, Ordering::Release);
        registry::remove_announcer(self.handle_id);
        self.end_handlers(Status::Closed);
        self.inbox.give_up_answers();
        self.lanes.end();
        let text = format!("gave up after {} failed attempts to reconnect", self.options.max_reconnects);
        self.log.push_disconnected(Status::Closed, &text);
    }

    /// Makes this client the current one.
    async fn use_client(&self, client: &Client) {
        self.max_payload.store(client.max_payload(), Ordering::Relaxed);
        self.pool.learn(&client.cluster_addresses());
        self.inbound.reset();
        let is_reconnect = self.counters.connects.load(Ordering::Relaxed) > 0;
        let others_are_back = Instant::now() + self.options.reconnect_max + SUCCESSFUL_ATTEMPT;
        self.announcements.reconnected(is_reconnect.then(|| others_are_back.into()));
        // In the order of their ids: announcements come before the services that depend on them.
        let subscriptions = self.subscriptions.lock().clone();
        for (id, subscription) in subscriptions {
            self.inbound.subscribe(client, id, subscription).await;
        }
        count(&self.counters.connects);
        if is_reconnect {
            count(&self.counters.reconnects);
        }
        self.lanes.set_client(Some(client.clone()));
        self.log.set_connected(&client.address());
    }

    /// Gives up the current client, and ends what runs on it. `unconfirmed`: durable messages that the server may not
    /// have.
    fn disconnect(&self, unconfirmed: VecDeque<DurableMessage>) {
        self.log.set_disconnected();
        self.lanes.set_client(None);
        self.inbound.reset();
        self.end_handlers(Status::Disconnected);
        self.outbox.connection_lost(unconfirmed);
    }
}
