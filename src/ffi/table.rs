//! The handles of one type that this process gave out, by number.

use crate::sync::RwLock;
use std::collections::HashMap;
use std::sync::Arc;

/// Handles of different numbers rarely meet in the same shard, so that threads do not wait for each other.
const SHARDS: usize = 64;

/// A map from numbers to what their handles stand for. Its locks are safe to use in a forked child, unlike DashMap's.
pub(super) struct Table<T> {
    shards: [RwLock<HashMap<u64, Arc<T>, ahash::RandomState>>; SHARDS],
}

impl<T> Default for Table<T> {
    fn default() -> Table<T> {
        Table { shards: std::array::from_fn(|_| RwLock::default()) }
    }
}

impl<T> Table<T> {
    fn shard(&self, number: u64) -> &RwLock<HashMap<u64, Arc<T>, ahash::RandomState>> {
        &self.shards[number as usize % SHARDS]
    }

    pub(super) fn insert(&self, number: u64, value: Arc<T>) {
        self.shard(number).write().insert(number, value);
    }

    pub(super) fn get(&self, number: u64) -> Option<Arc<T>> {
        self.shard(number).read().get(&number).map(Arc::clone)
    }

    pub(super) fn remove(&self, number: u64) -> Option<Arc<T>> {
        self.shard(number).write().remove(&number)
    }
}
