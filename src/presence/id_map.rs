//! A map from ids, for the registry: many threads, a million entries, and one cache miss to find one of them.
//!
//! DashMap, which serves everywhere else, takes two in a row (a control byte, then the entry), and twice the time for a
//! mark of one in a million clients. Here an entry is 32 bytes, ids of up to 24 bytes included, and stands where its hash
//! says, or right behind (linear probing; a removal moves the followers up, so there are no tombstones).

use crate::sync::Mutex;
use compact_str::CompactString;
use std::mem;

/// Many shards: each is small enough to be moved within the processor's cache when it grows.
const SHARDS: usize = 512;

pub(crate) struct IdMap<V> {
    shards: Box<[Mutex<Shard<V>>]>,
    hasher: ahash::RandomState,
}

/// On a cache line of its own, so that neighbours do not slow each other down.
#[repr(align(64))]
struct Shard<V> {
    /// None, or a power of two of them.
    slots: Vec<Slot<V>>,
    used: usize,
}

/// Aligned, so that it never lies on two cache lines.
#[repr(align(32))]
struct Slot<V>(Option<(CompactString, V)>);

impl<V> Default for IdMap<V> {
    fn default() -> IdMap<V> {
        let shards = (0..SHARDS).map(|_| Mutex::new(Shard { slots: Vec::new(), used: 0 })).collect();
        IdMap { shards, hasher: ahash::RandomState::new() }
    }
}

impl<V> IdMap<V> {
    pub(crate) fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().used).sum()
    }

    pub(crate) fn contains(&self, id: &str) -> bool {
        let hash = self.hash(id);
        self.shard(hash).lock().find(id, hash).is_ok()
    }

    /// Gives the id's value to `change`, and whether it was there before; if not, it is what `make` makes.
    ///
    /// The functions are called with the shard locked: they must not use the map.
    pub(crate) fn enter<T>(&self, id: &str, make: impl FnOnce() -> V, change: impl FnOnce(&mut V, bool) -> T) -> T {
        let hash = self.hash(id);
        let mut shard = self.shard(hash).lock();
        let found = shard.find(id, hash);
        if let Ok(at) = found
            && let Some((_, value)) = &mut shard.slots[at].0
        {
            return change(value, true);
        }
        let mut value = make();
        let result = change(&mut value, false);
        shard.insert((id.into(), value), hash, |id| self.hash(id));
        result
    }

    /// Removes the id if it is there and `condition`, which may change its value, says so; calls `absent` if it is not. Both
    /// are called with the shard locked.
    pub(crate) fn remove_or(
        &self,
        id: &str,
        condition: impl FnOnce(&mut V) -> bool,
        absent: impl FnOnce(),
    ) -> Option<V> {
        let hash = self.hash(id);
        let mut shard = self.shard(hash).lock();
        let Ok(at) = shard.find(id, hash) else {
            absent();
            return None;
        };
        let (_, value) = shard.slots[at].0.as_mut()?;
        if !condition(value) {
            return None;
        }
        shard.remove(at, |id| self.hash(id))
    }

    fn hash(&self, id: &str) -> u64 {
        self.hasher.hash_one(id.as_bytes())
    }

    /// By the upper bits; the lower ones choose the slot.
    fn shard(&self, hash: u64) -> &Mutex<Shard<V>> {
        &self.shards[(hash >> 32) as usize % SHARDS]
    }
}

impl<V> Shard<V> {
    /// The slot that holds the id, or else the one that would.
    fn find(&self, id: &str, hash: u64) -> Result<usize, usize> {
        if self.slots.is_empty() {
            return Err(0);
        }
        let mut at = self.home(hash);
        loop {
            match &self.slots[at].0 {
                None => return Err(at),
                Some((other, _)) if other == id => return Ok(at),
                Some(_) => at = self.next(at),
            }
        }
    }

    /// Adds an id that is not there.
    fn insert(&mut self, entry: (CompactString, V), hash: u64, hash_of: impl Fn(&str) -> u64) {
        // At most 13 of 16 slots are used: beyond, the ways to a free one become long.
        if (self.used + 1) * 16 > self.slots.len() * 13 {
            self.resize((self.slots.len() * 2).max(4), hash_of);
        }
        if let Err(free) = self.find(&entry.0, hash) {
            self.slots[free].0 = Some(entry);
            self.used += 1;
        }
    }

    fn remove(&mut self, at: usize, hash_of: impl Fn(&str) -> u64) -> Option<V> {
        let (_, value) = self.slots[at].0.take()?;
        self.used -= 1;
        // What stands behind moves up, unless it would come before its home.
        let (mut free, mut next) = (at, self.next(at));
        while let Some((id, _)) = &self.slots[next].0 {
            let home = self.home(hash_of(id));
            if self.distance(home, next) >= self.distance(free, next) {
                self.slots.swap(free, next);
                free = next;
            }
            next = self.next(next);
        }
        if self.slots.len() > 64 && self.used * 8 < self.slots.len() {
            self.resize(self.slots.len() / 4, hash_of);
        }
        Some(value)
    }

    fn resize(&mut self, slots: usize, hash_of: impl Fn(&str) -> u64) {
        let before = mem::replace(&mut self.slots, (0..slots).map(|_| Slot(None)).collect());
        for entry in before.into_iter().filter_map(|slot| slot.0) {
            if let Err(free) = self.find(&entry.0, hash_of(&entry.0)) {
                self.slots[free].0 = Some(entry);
            }
        }
    }

    fn home(&self, hash: u64) -> usize {
        hash as usize & (self.slots.len() - 1)
    }

    fn next(&self, at: usize) -> usize {
        (at + 1) & (self.slots.len() - 1)
    }

    /// How many steps lead from one slot to another.
    fn distance(&self, from: usize, to: usize) -> usize {
        to.wrapping_sub(from) & (self.slots.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    /// A random sequence of operations gives what the standard library's map gives.
    #[test]
    fn agrees_with_the_standard_map() {
        let (map, mut model) = (IdMap::<u64>::default(), HashMap::new());
        let mut random = 88_172_645_463_325_252_u64;
        for step in 0..300_000_u64 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            // Few ids and then many, so that shards grow, fill, and shrink again.
            let ids = if step / 100_000 == 1 { 20_000 } else { 200 };
            let id = format!("{}{}", random % ids, "-long".repeat((random % 8) as usize));
            match random >> 62 {
                0 | 1 => {
                    let was = map.enter(
                        &id,
                        || step,
                        |value, was| {
                            *value = step;
                            was
                        },
                    );
                    assert_eq!(was, model.insert(id, step).is_some());
                }
                2 => assert_eq!(map.remove_or(&id, |_| true, || ()), model.remove(&id)),
                _ => {
                    assert_eq!(map.remove_or(&id, |_| false, || ()), None);
                    assert_eq!(map.contains(&id), model.contains_key(&id));
                }
            }
        }
        assert_eq!(map.len(), model.len());
        for (id, value) in model {
            assert_eq!(map.remove_or(&id, |_| true, || ()), Some(value));
        }
        assert_eq!(map.len(), 0);
    }

    #[test]
    fn what_was_large_becomes_small_again() {
        let map = IdMap::<()>::default();
        let slots = |map: &IdMap<()>| map.shards.iter().map(|shard| shard.lock().slots.len()).sum::<usize>();
        for number in 0..100_000 {
            map.enter(&number.to_string(), || (), |(), _| ());
        }
        assert!(slots(&map) >= 100_000);
        for number in 0..100_000 {
            map.remove_or(&number.to_string(), |()| true, || ());
        }
        assert!(slots(&map) <= 64 * SHARDS);
    }

    #[test]
    fn ids_are_spread_over_the_shards() {
        let map = IdMap::<()>::default();
        for number in 0..100_000 {
            map.enter(&number.to_string(), || (), |(), _| ());
        }
        // 195 on average.
        assert!(map.shards.iter().all(|shard| (50..400).contains(&shard.lock().used)));
    }

    #[test]
    fn thirteen_of_sixteen_slots_are_used_and_no_more() {
        let mut shard = Shard { slots: Vec::new(), used: 0 };
        let slots = (0..14_u64).map(|number| {
            let hash_of = |id: &str| id.parse().unwrap();
            shard.insert((number.to_string().into(), ()), number, hash_of);
            shard.slots.len()
        });
        assert_eq!(slots.collect::<Vec<_>>(), [4, 4, 4, 8, 8, 8, 16, 16, 16, 16, 16, 16, 16, 32]);
    }

    #[test]
    fn what_was_needed_once_is_given_back() {
        let hash_of = |id: &str| id.parse().unwrap();
        let mut shard = Shard { slots: Vec::new(), used: 0 };
        (0..200_u64).for_each(|number| shard.insert((number.to_string().into(), ()), number, hash_of));
        let slots: Vec<_> = (0..200_u64)
            .map(|number| {
                let at = shard.find(&number.to_string(), number).unwrap();
                shard.remove(at, hash_of);
                (shard.used, shard.slots.len())
            })
            .collect();
        let shrunk = |used: usize| if used < 32 { 64 } else { 256 };
        assert!(slots.iter().all(|(used, slots)| *slots == shrunk(*used)), "{slots:?}");
    }

    #[test]
    fn an_id_is_looked_for_where_its_hash_says() {
        let mut shard = Shard { slots: Vec::new(), used: 0 };
        for number in (0..13_u64).rev() {
            shard.insert((number.to_string().into(), ()), number, |id| id.parse().unwrap());
        }
        let homes = shard.slots.iter().map(|slot| slot.0.as_ref().map(|(id, ())| id.parse().unwrap()));
        assert!(homes.eq((0..16).map(|number| (number < 13).then_some(number))));
    }

    #[test]
    fn an_entry_is_half_a_cache_line() {
        assert_eq!(size_of::<Slot<Box<u64>>>(), 32);
    }
}
