//! The wall around async-nats: no module above this folder names one of its types.
//!
//! | module | what is in it |
//! |---|---|
//! | [`client`] | one connection to one nats-server, and every workaround for async-nats |
//! | [`dial`] | which servers and addresses are tried, in which order |
//! | [`tls`] | certificates and keys |
//! | `auth` | credentials of an agent |
//! | [`inbound`] | the subscriptions of the current client; gives each message to its handler |
//! | [`inbox`] | the connection's own subject for answers |
//! | `encoded` | messages in the protocol of nats-server |
//! | [`outbox`] | messages that wait to be given to the NATS client |
//! | `message` | messages, subjects and headers |

mod auth;
pub(crate) mod client;
pub(crate) mod dial;
pub(crate) mod encoded;
pub(crate) mod inbound;
pub(crate) mod inbox;
mod message;
pub(crate) mod outbox;
pub(crate) mod tls;

pub(crate) use message::{HeaderMap, Message, Subject, detach};
