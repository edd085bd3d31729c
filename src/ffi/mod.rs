//! The C ABI. Each function is one call into the core; `guard` alone turns pointers, NULL and panics into Rust.
//!
//! The doc comments here are the C documentation: build.rs puts them into `include/nats_presence.h`.
#![allow(unsafe_code, non_camel_case_types)]

mod codes;
mod connection;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod gateway;
mod guard;
mod host;
#[cfg(test)]
mod panics;
mod presence;
mod queue;
mod table;
mod worker;

pub use codes::{presence_event_kind, presence_status};
pub use connection::*;
pub use gateway::*;
pub use guard::{PRESENCE_ERROR_MESSAGE, presence_error};
pub(crate) use host::reset_scheduling;
pub use presence::*;
pub use queue::*;
pub use worker::*;
