//! Who is online in this process.

pub(crate) mod client_id;
pub(crate) mod id_map;
pub(crate) mod registry;
