//! Handles that are looked up: numbers in the form of pointers, and a table for each type.
//!
//! A number that is not in the table was freed. So a handle can be freed twice and used after it was freed, from any
//! thread, and no freed memory is read. (Senders and options are real pointers, see `raw`: senders for the speed of
//! sends, options for simplicity.)

use super::raw::check_out;
use super::types::{presence_conn, presence_queue, presence_service, presence_session, presence_stream};
use crate::connection::Connection;
use crate::error::{Error, Result, Status};
use crate::events::Queue;
use crate::gateway::stream::Stream;
use crate::presence::registry::Session;
use crate::process::fork::{self, PerProcess};
use crate::sync::RwLock;
use crate::worker::service::Service;
use std::cell::Cell;
use std::collections::HashMap;
use std::ptr;
use std::sync::Arc;

/// Enough shards that threads with different handles rarely wait for each other.
const SHARDS: usize = 64;

/// The objects of one type by their handle ids. Its locks are safe to use in a forked child, unlike DashMap's.
pub(super) struct Table<T> {
    shards: [RwLock<HashMap<u64, Arc<T>, ahash::RandomState>>; SHARDS],
}

impl<T> Default for Table<T> {
    fn default() -> Table<T> {
        Table { shards: std::array::from_fn(|_| RwLock::default()) }
    }
}

impl<T> Table<T> {
    fn shard(&self, handle_id: u64) -> &RwLock<HashMap<u64, Arc<T>, ahash::RandomState>> {
        &self.shards[handle_id as usize % SHARDS]
    }

    fn insert(&self, handle_id: u64, object: Arc<T>) {
        self.shard(handle_id).write().insert(handle_id, object);
    }

    fn get(&self, handle_id: u64) -> Option<Arc<T>> {
        self.shard(handle_id).read().get(&handle_id).map(Arc::clone)
    }

    fn remove(&self, handle_id: u64) -> Option<Arc<T>> {
        self.shard(handle_id).write().remove(&handle_id)
    }
}

/// A type of handle that is a number in a table.
pub(super) trait Handle: Sized {
    type Object: 'static;
    fn table() -> &'static Table<Self::Object>;
    fn handle_id(object: &Self::Object) -> u64;
}

macro_rules! handle_type {
    ($handle:ty, $object:ty, $($handle_id:ident).+) => {
        impl Handle for $handle {
            type Object = $object;
            fn table() -> &'static Table<$object> {
                static TABLE: PerProcess<Table<$object>> = PerProcess::new();
                TABLE.get(Table::default)
            }
            fn handle_id(object: &$object) -> u64 {
                object.$($handle_id).+
            }
        }
    };
}
handle_type!(presence_conn, Connection, handle_id);
handle_type!(presence_queue, Queue, handle_id);
handle_type!(presence_service, Service, handle_id);
handle_type!(presence_session, Session, handle_id);
handle_type!(presence_stream, Stream, source.handle_id);

/// The pointers begin above the page of NULL and look aligned, because tools and garbage collectors check pointers.
const BASE: usize = 1 << 16;
const STEP: usize = 16;

/// The handle with an id.
pub(super) fn pointer<H>(handle_id: u64) -> *mut H {
    ptr::without_provenance_mut(BASE + usize::try_from(handle_id).unwrap_or_default() * STEP)
}

fn id_of<H>(handle: *const H) -> Result<u64> {
    if handle.is_null() {
        return Err(Error::invalid(format!("{} is NULL", name_of::<H>())));
    }
    let handle_id = (handle.addr().wrapping_sub(BASE) / STEP) as u64;
    fork::check(handle_id)?;
    Ok(handle_id)
}

fn name_of<H>() -> &'static str {
    std::any::type_name::<H>().rsplit("::").next().unwrap_or_default()
}

/// Creates an object, and writes its handle to `out`.
///
/// # Safety
/// `out` is NULL or writable.
pub(super) unsafe fn create<H: Handle, O: Into<Arc<H::Object>>>(
    out: *mut *mut H,
    make: impl FnOnce() -> Result<O>,
) -> Result<()> {
    // SAFETY: the caller's promise is create_registered's.
    unsafe {
        create_registered(out, |register| {
            let object = make()?.into();
            register(&object);
            Ok(object)
        })
    }
}

/// As `create`, for an object that events may name before `make` returns: `make` calls its argument before there can be
/// one.
///
/// # Safety
/// `out` is NULL or writable.
pub(super) unsafe fn create_registered<H: Handle>(
    out: *mut *mut H,
    make: impl FnOnce(&dyn Fn(&Arc<H::Object>)) -> Result<Arc<H::Object>>,
) -> Result<()> {
    check_out(out).map_err(|error| Error::invalid(format!("{error}: it must point to a {}*", name_of::<H>())))?;
    let registered = Cell::new(None);
    let register = |object: &Arc<H::Object>| {
        let handle_id = H::handle_id(object);
        H::table().insert(handle_id, Arc::clone(object));
        registered.set(Some(handle_id));
    };
    match make(&register) {
        Ok(object) => {
            // SAFETY: not NULL and aligned, so it is writable, by the caller's promise.
            unsafe { out.write(pointer(H::handle_id(&object))) };
            Ok(())
        }
        Err(error) => {
            registered.get().and_then(|handle_id| H::table().remove(handle_id));
            Err(error)
        }
    }
}

/// The object of a handle.
pub(super) fn borrow<H: Handle>(handle: *const H) -> Result<Arc<H::Object>> {
    H::table().get(id_of(handle)?).ok_or_else(ended::<H>)
}

/// The object of a handle, which ends here.
pub(super) fn take<H: Handle>(handle: *mut H) -> Result<Arc<H::Object>> {
    H::table().remove(id_of(handle)?).ok_or_else(ended::<H>)
}

/// Ends a handle, and calls `free` with its object. No effect on NULL or a handle that has ended.
pub(super) fn release<H: Handle>(handle: *mut H, free: impl FnOnce(&H::Object)) -> Result<()> {
    if let Ok(object) = take(handle) {
        free(&object);
    }
    Ok(())
}

fn ended<H>() -> Error {
    Error::new(Status::Closed, format!("the {} has ended already", name_of::<H>()))
}
