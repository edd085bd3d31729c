//! The worker's side: a service takes requests, a sender answers one.

pub(crate) mod sender;
pub(crate) mod service;
