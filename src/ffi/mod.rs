//! The C ABI. Each function is one call into the core. `boundary` catches panics, `handles` and `raw` turn pointers
//! into Rust values.
//!
//! The doc comments here are the documentation of `include/nats_presence.h`, which build.rs generates. The modules are
//! in the order of the header, which rustfmt keeps because of the blank lines.
#![allow(unsafe_code, non_camel_case_types)]
// The header states the preconditions of all functions once, at its top.
#![allow(clippy::missing_safety_doc)]

mod codes;
mod types;

mod connection;

mod queue;

mod worker;

mod gateway;

mod presence;

mod options;

mod stats;

mod boundary;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod handles;
mod host;
#[cfg(test)]
mod panics;
mod raw;

pub use codes::{presence_event_kind, presence_status};
pub use connection::*;
pub use gateway::*;
pub(crate) use host::reset_scheduling;
pub use options::*;
pub use presence::*;
pub use queue::*;
pub use stats::*;
pub use types::*;
pub use worker::*;
