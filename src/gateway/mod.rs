//! The gateway's side: streams that were requested from workers.

pub(crate) mod stream;
