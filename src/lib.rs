//! Stop work for clients that have left: presence, and streams that stop with it, over NATS.
//!
//! A client's browser is connected to a *gateway*, which requests a stream of messages from a *worker*. When the client
//! leaves, the worker's [`Sender`] refuses to send, and the worker's queue gets an event.
//!
//! The map of the crate. Each module uses only those below it, except that `process` calls `ffi::host`:
//!
//! | module | contents |
//! |---|---|
//! | [`ffi`] | the C ABI, from which `include/nats_presence.h` is generated; the only place with `unsafe` |
//! | `worker` | the worker's side: a service takes requests, a sender answers one |
//! | `gateway` | the gateway's side: a requested stream |
//! | `connection` | keeps one connection to nats-server up: subscriptions, announcements, drain, close |
//! | `lane` | streams batched, flow-controlled and resumed, where both ends run this library |
//! | `nats` | everything that touches async-nats: dialling, TLS, messages in, messages out |
//! | `presence` | who is online in this process; stops senders and streams when a client leaves |
//! | `events` | events, the queue that callers read them from, and the wakeups of waiting threads |
//! | `metrics` | what is counted, and the text format of OpenMetrics |
//! | `config` | options |
//! | `wire` | byte formats: level 0, which plain NATS peers speak, and the frames of lanes |
//! | `process` | the tokio runtime, what a forked child may still use, randomness |
//! | `status_word` | the promise: the word that each send reads, and why no send follows an offline mark |
//! | `error`, `sync` | statuses; atomics, and locks that survive a fork |
//!
//! In Rust every handle is an `Arc`. [`Connection::close`], [`Queue::close`], [`Sender::free`] and [`Stream::free`] do
//! what the functions `_close` and `_free` do in C. Dropping a handle does not.

#![cfg_attr(shuttle, allow(dead_code, unused_imports))]

#[cfg(not(all(target_pointer_width = "64", target_endian = "little")))]
compile_error!("nats-presence supports 64-bit little-endian targets only");

mod config;
mod connection;
mod error;
mod events;
#[cfg(not(shuttle))]
pub mod ffi;
#[cfg(shuttle)]
mod ffi {
    pub(crate) fn reset_scheduling() {}
}
#[cfg(any(test, fuzzing))]
#[cfg(not(shuttle))]
#[doc(hidden)]
pub mod fuzz;
mod gateway;
mod lane;
mod metrics;
mod nats;
mod presence;
mod process;
#[cfg(test)]
#[cfg(not(shuttle))]
#[path = "../tests/core/mod.rs"]
mod server_tests;
mod status_word;
mod sync;
mod wire;
mod worker;

pub use config::{Config, keys as option_keys};
pub use connection::{Connection, Stats, metrics};
pub use error::{Error, Result, Status};
pub use events::{Event, Kind, Queue};
pub use gateway::stream::Stream;
pub use presence::client_id::MAX_ID;
pub use presence::registry::{Session, is_online, mark_many, mark_offline, mark_online, online_count, watch};
pub use status_word::StatusWord;
pub use worker::sender::Sender;
pub use worker::service::Service;
