//! Stop work for clients who have left: presence, and streams that know of it, over NATS.
//!
//! A client's browser is connected to a *gateway*; the gateway asks a *worker* for a stream of messages; the client
//! leaves. From then on the worker's [`Sender`] refuses to send, and its process is told.
//!
//! The map of the crate, from what depends on most to what depends on nothing:
//!
//! | room | what is in it |
//! |---|---|
//! | [`ffi`] | the C ABI, from which `include/nats_presence.h` is made; the only place with `unsafe` |
//! | `service`, `sender` | the worker's side |
//! | `stream`, `unanswered` | the gateway's side · streams that ended before their worker answered |
//! | `connection` | nats-server: the NATS client supervised, replaced, drained |
//! | `dial`, `tls`, `inbound`, `drive`, `outbox` | how a server is reached · certificates and keys · messages in · messages out · what waits for it |
//! | `lane` | streams batched, flow-controlled and resumed, where both ends run this library |
//! | `registry`, `id_map` | who is online; stops senders and streams · the map of them |
//! | `queue`, `readers` | events out of the library · whom to call when they come |
//! | `config`, `wire`, `client`, `error` | options · level 0 byte for byte · ids · statuses |
//! | `runtime`, `fork`, `random` | the process: its tokio runtime, what a forked child may still use, randomness |
//!
//! From Rust, every handle is an `Arc`; [`Connection::close`], [`Queue::close`] and the `free` of a [`Sender`] and a
//! [`Stream`] end what C ends by its `_free` functions. Dropping them does not.

#[cfg(not(all(target_pointer_width = "64", target_endian = "little")))]
compile_error!("nats-presence supports 64-bit little-endian targets only");

mod client;
mod config;
mod connection;
mod dial;
mod drive;
mod error;
pub mod ffi;
mod fork;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
mod id_map;
mod inbound;
mod lane;
mod outbox;
#[cfg(test)]
mod panics;
mod queue;
mod random;
mod readers;
mod registry;
mod runtime;
mod sender;
mod service;
mod stream;
mod sync;
mod tls;
mod unanswered;
mod wire;

pub use client::MAX_ID;
pub use config::Config;
pub use connection::{Connection, Stats};
pub use error::{Error, Result, Status};
pub use queue::{Event, Kind, Queue};
pub use registry::{Session, is_online, mark_offline, mark_online, online_count, watch};
pub use sender::Sender;
pub use service::Service;
pub use stream::Stream;
