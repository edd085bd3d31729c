//! Byte formats on the wire. Nothing here does input or output.

pub(crate) mod frame;
pub(crate) mod level0;
