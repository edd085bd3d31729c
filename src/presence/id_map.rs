//! The registry's map from client ids: many threads, a million entries, and one cache miss to find one of them.
//!
//! DashMap, which the rest of the library uses, takes two misses in a row (a control byte, then the entry), and twice
//! the time to mark one of a million clients. Here an entry is 32 bytes, ids of up to 24 bytes included. It is in the
//! slot that its hash chooses, or in one of the next (linear probing; a removal moves the followers up, so there are no
//! tombstones).

use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Mutex, MutexGuard};
use compact_str::CompactString;
use std::hash::{BuildHasher, Hasher};
use std::{hint, mem};

/// With so many, a shard that grows is small enough to be copied within the processor's cache.
const SHARDS: usize = 512;

/// The number of ids that are sorted by their shards at a time.
const BATCH: usize = 16_384;

pub(crate) struct IdMap<V> {
    shards: Box<[LockedShard<V>]>,
    hasher: ahash::RandomState,
}

/// On a cache line of its own, so that threads that use neighbouring shards do not slow each other down.
#[repr(align(64))]
struct LockedShard<V> {
    shard: Mutex<Shard<V>>,
    /// Incremented with the shard locked when an id gets a value or loses it.
    version: AtomicU64,
}

struct Shard<V> {
    /// Their number is 0 or a power of two.
    slots: Vec<Slot<V>>,
    used: usize,
}

/// Aligned, so that it never spans two cache lines.
#[repr(align(32))]
struct Slot<V>(Option<(CompactString, V)>);

impl<V> Default for IdMap<V> {
    fn default() -> IdMap<V> {
        let shards = (0..SHARDS).map(|_| LockedShard {
            shard: Mutex::new(Shard { slots: Vec::new(), used: 0 }),
            version: AtomicU64::new(0),
        });
        let shards = shards.collect();
        IdMap { shards, hasher: ahash::RandomState::new() }
    }
}

impl<V> IdMap<V> {
    pub(crate) fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.shard.lock().used).sum()
    }

    /// Other bytes than UTF-8 never have a value.
    pub(crate) fn look_up(&self, id: &[u8]) -> Lookup<'_> {
        let hash = self.hash(id);
        let LockedShard { shard, version } = self.shard(hash);
        let shard = shard.lock();
        Lookup { has_value: shard.find(id, hash).is_ok(), hash, version, at: version.load(Ordering::Relaxed) }
    }

    /// Locks the id's entry, and with it the id's shard: the thread must not use the map until it drops the entry.
    pub(crate) fn lock<'a>(&'a self, id: &'a str) -> Entry<'a, V> {
        let hash = self.hash(id.as_bytes());
        Entry::new(self, self.shard(hash).shard.lock(), id, hash)
    }

    /// Locks the entry of each id in turn, and calls `visit` with it. Locks each shard once for many ids, and calls
    /// `unlocked` whenever it has unlocked one. The same id comes as often and in the same order as in `ids`; otherwise
    /// the order is the shards'.
    pub(crate) fn lock_each(&self, ids: &[&str], mut visit: impl FnMut(&mut Entry<'_, V>), mut unlocked: impl FnMut()) {
        for ids in ids.chunks(BATCH) {
            let hashes: Vec<_> = ids.iter().map(|id| self.hash(id.as_bytes())).collect();
            // Sorts the indexes of the ids by shard, by counting.
            let mut starts = [0; SHARDS];
            hashes.iter().for_each(|hash| starts[shard_index(*hash)] += 1);
            let mut sum = 0;
            starts.iter_mut().for_each(|start| sum += mem::replace(start, sum));
            let mut order = vec![0; ids.len()];
            for (index, hash) in hashes.iter().enumerate() {
                let start = &mut starts[shard_index(*hash)];
                order[*start] = index;
                *start += 1;
            }
            for indexes in order.chunk_by(|a, b| shard_index(hashes[*a]) == shard_index(hashes[*b])) {
                let mut shard = self.shard(hashes[indexes[0]]).shard.lock();
                // Reads the slots of all of them first, so that the cache misses overlap.
                hint::black_box(indexes.iter().map(|index| shard.touch(hashes[*index])).sum::<usize>());
                for index in indexes {
                    let mut entry = Entry::new(self, shard, ids[*index], hashes[*index]);
                    visit(&mut entry);
                    shard = entry.shard;
                }
                drop(shard);
                unlocked();
            }
        }
    }

    fn hash(&self, id: &[u8]) -> u64 {
        let mut hasher = self.hasher.build_hasher();
        hasher.write(id);
        hasher.finish()
    }

    fn shard(&self, hash: u64) -> &LockedShard<V> {
        &self.shards[shard_index(hash)]
    }
}

/// The upper bits of a hash choose the shard; the lower ones choose the slot.
fn shard_index(hash: u64) -> usize {
    (hash >> 32) as usize % SHARDS
}

/// The locked entry of an id, with or without a value.
pub(crate) struct Entry<'a, V> {
    map: &'a IdMap<V>,
    shard: MutexGuard<'a, Shard<V>>,
    id: &'a str,
    hash: u64,
    /// The slot that holds the id, or else the one that would.
    place: Result<usize, usize>,
}

impl<'a, V> Entry<'a, V> {
    fn new(map: &'a IdMap<V>, shard: MutexGuard<'a, Shard<V>>, id: &'a str, hash: u64) -> Entry<'a, V> {
        let place = shard.find(id.as_bytes(), hash);
        Entry { map, shard, id, hash, place }
    }

    pub(crate) fn id(&self) -> &'a str {
        self.id
    }

    pub(crate) fn get(&self) -> Option<&V> {
        self.shard.slots[self.place.ok()?].0.as_ref().map(|(_, value)| value)
    }

    pub(crate) fn get_mut(&mut self) -> Option<&mut V> {
        self.shard.slots[self.place.ok()?].0.as_mut().map(|(_, value)| value)
    }

    pub(crate) fn get_or_insert_with(&mut self, make: impl FnOnce() -> V) -> &mut V {
        let at = match self.place {
            Ok(at) => at,
            Err(free) => {
                self.change_version();
                self.shard.reserve(free, self.id, self.hash, |id| self.map.hash(id.as_bytes()))
            }
        };
        self.place = Ok(at);
        let (_, value) = self.shard.slots[at].0.get_or_insert_with(|| (self.id.into(), make()));
        value
    }

    /// Called with the shard locked: a lookup that begins after it is unlocked reads the new version. A store is enough,
    /// because only the thread that has locked the shard writes it.
    fn change_version(&self) {
        let version = &self.map.shard(self.hash).version;
        version.store(version.load(Ordering::Relaxed) + 1, Ordering::Release);
    }

    /// Removes the value. Must not be followed by an insertion.
    pub(crate) fn remove(&mut self) -> Option<V> {
        // What moves up may be anywhere: an insertion panics.
        let at = mem::replace(&mut self.place, Err(usize::MAX)).ok()?;
        self.change_version();
        self.shard.remove(at, |id| self.map.hash(id.as_bytes()))
    }
}

/// Whether an id had a value when its shard was locked.
pub(crate) struct Lookup<'a> {
    pub(crate) has_value: bool,
    pub(crate) hash: u64,
    version: &'a AtomicU64,
    at: u64,
}

impl Lookup<'_> {
    /// Returns true only if no id of the shard has got a value or lost it since.
    pub(crate) fn is_current(&self) -> bool {
        self.version.load(Ordering::Acquire) == self.at
    }
}

impl<V> Shard<V> {
    /// The slot that holds the id, or else the one that would.
    fn find(&self, id: &[u8], hash: u64) -> Result<usize, usize> {
        if self.slots.is_empty() {
            return Err(0);
        }
        let mut at = self.home(hash);
        loop {
            match &self.slots[at].0 {
                None => return Err(at),
                Some((other, _)) if other.as_bytes() == id => return Ok(at),
                Some(_) => at = self.next(at),
            }
        }
    }

    /// Counts one more id, and returns the slot for it: `free`, where `find` would put it, unless the shard has to
    /// grow.
    fn reserve(&mut self, free: usize, id: &str, hash: u64, hash_of: impl Fn(&str) -> u64) -> usize {
        self.used += 1;
        // At most 13 of 16 slots are used: beyond that, free slots become far apart.
        if self.used * 16 <= self.slots.len() * 13 {
            return free;
        }
        self.resize((self.slots.len() * 2).max(4), hash_of);
        let (Ok(place) | Err(place)) = self.find(id.as_bytes(), hash);
        place
    }

    fn remove(&mut self, at: usize, hash_of: impl Fn(&str) -> u64) -> Option<V> {
        let (_, value) = self.slots[at].0.take()?;
        self.used -= 1;
        // The entries that follow move up, unless one would come before the slot that its hash chooses.
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
        // Reads every slot once before it moves any, so that the cache misses overlap.
        hint::black_box(self.slots.iter().filter(|slot| slot.0.is_some()).count());
        let before = mem::replace(&mut self.slots, (0..slots).map(|_| Slot(None)).collect());
        for entry in before.into_iter().filter_map(|slot| slot.0) {
            let mut at = self.home(hash_of(&entry.0));
            while self.slots[at].0.is_some() {
                at = self.next(at);
            }
            self.slots[at].0 = Some(entry);
        }
    }

    /// Reads the cache line of the slot that the hash chooses, and the next one.
    fn touch(&self, hash: u64) -> usize {
        if self.slots.is_empty() {
            return 0;
        }
        let at = self.home(hash);
        [at, self.next(self.next(at))].iter().filter(|at| self.slots[**at].0.is_some()).count()
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
        // Few ids and then many, so that shards grow, fill, and shrink again.
        let (steps, many): (u64, u64) = if cfg!(miri) { (100, 50) } else { (100_000, 20_000) };
        for step in 0..3 * steps {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let ids = if step / steps == 1 { many } else { many.div_ceil(100) };
            let id = format!("{}{}", random % ids, "-long".repeat((random % 8) as usize));
            match random >> 62 {
                0 | 1 => {
                    let mut entry = map.lock(&id);
                    let was = entry.get().copied();
                    let value = entry.get_or_insert_with(|| step);
                    assert_eq!(*value, was.unwrap_or(step));
                    *value = step;
                    assert_eq!(entry.get(), Some(&step));
                    assert_eq!(was, model.insert(id.clone(), step));
                }
                2 => assert_eq!(map.lock(&id).remove(), model.remove(&id)),
                _ => {
                    assert_eq!(map.lock(&id).get_mut().copied(), model.get(&id).copied());
                    assert_eq!(map.look_up(id.as_bytes()).has_value, model.contains_key(&id));
                }
            }
        }
        assert_eq!(map.len(), model.len());
        for (id, value) in model {
            assert_eq!(map.lock(&id).remove(), Some(value));
        }
        assert_eq!(map.len(), 0);
    }

    #[test]
    fn an_emptied_map_gives_its_memory_back() {
        let map = IdMap::<()>::default();
        let slots = |map: &IdMap<()>| map.shards.iter().map(|shard| shard.shard.lock().slots.len()).sum::<usize>();
        for number in 0..100_000 {
            map.lock(&number.to_string()).get_or_insert_with(|| ());
        }
        assert!(slots(&map) >= 100_000);
        for number in 0..100_000 {
            map.lock(&number.to_string()).remove();
        }
        assert!(slots(&map) <= 64 * SHARDS);
    }

    #[test]
    fn ids_are_spread_over_the_shards() {
        let map = IdMap::<()>::default();
        for number in 0..100_000 {
            map.lock(&number.to_string()).get_or_insert_with(|| ());
        }
        // 195 on average.
        assert!(map.shards.iter().all(|shard| (50..400).contains(&shard.shard.lock().used)));
    }

    /// Inserts a number whose hash is the number itself.
    fn insert(shard: &mut Shard<()>, number: u64) {
        let id = number.to_string();
        let free = shard.find(id.as_bytes(), number).unwrap_err();
        let at = shard.reserve(free, &id, number, |id| id.parse().unwrap());
        shard.slots[at].0 = Some((id.into(), ()));
    }

    #[test]
    fn at_most_thirteen_of_sixteen_slots_are_used() {
        let mut shard = Shard { slots: Vec::new(), used: 0 };
        let slots = (0..14_u64).map(|number| {
            insert(&mut shard, number);
            shard.slots.len()
        });
        assert_eq!(slots.collect::<Vec<_>>(), [4, 4, 4, 8, 8, 8, 16, 16, 16, 16, 16, 16, 16, 32]);
    }

    #[test]
    fn a_shard_shrinks_when_few_slots_are_used() {
        let hash_of = |id: &str| id.parse().unwrap();
        let mut shard = Shard { slots: Vec::new(), used: 0 };
        (0..200_u64).for_each(|number| insert(&mut shard, number));
        let slots: Vec<_> = (0..200_u64)
            .map(|number| {
                let at = shard.find(number.to_string().as_bytes(), number).unwrap();
                shard.remove(at, hash_of);
                (shard.used, shard.slots.len())
            })
            .collect();
        let shrunk = |used: usize| if used < 32 { 64 } else { 256 };
        assert!(slots.iter().all(|(used, slots)| *slots == shrunk(*used)), "{slots:?}");
    }

    #[test]
    fn an_id_is_in_the_slot_that_its_hash_chooses() {
        let mut shard = Shard { slots: Vec::new(), used: 0 };
        for number in (0..13_u64).rev() {
            insert(&mut shard, number);
        }
        let homes = shard.slots.iter().map(|slot| slot.0.as_ref().map(|(id, ())| id.parse().unwrap()));
        assert!(homes.eq((0..16).map(|number| (number < 13).then_some(number))));
    }

    #[test]
    fn an_entry_is_half_a_cache_line() {
        assert_eq!(size_of::<Slot<Box<u64>>>(), 32);
    }
}
