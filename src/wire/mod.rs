//! Byte formats on the wire. Nothing here does I/O.

pub(crate) mod frame;
pub(crate) mod level0;
pub(crate) mod stream_error;
