//! Randomness from the system. A generator in memory would give a forked child the same numbers as its parent.

use crate::sync::Mutex;
use std::time::Duration;

/// Returns 128 random bits in hex.
pub(crate) fn token() -> String {
    format!("{:016x}{:016x}", random_u64(), random_u64())
}

pub(crate) fn random_u64() -> u64 {
    // Without randomness the time and the process id make a number that others hardly have.
    getrandom::u64().unwrap_or_else(|_| {
        let elapsed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        elapsed.as_nanos() as u64 ^ (u64::from(std::process::id()) << 32)
    })
}

/// Random numbers that are drawn from the system many at a time. It must not be used in a forked child, which would get
/// the same numbers.
#[derive(Debug, Default)]
pub(crate) struct RandomPool(Mutex<Vec<u64>>);

impl RandomPool {
    pub(crate) fn next(&self) -> u64 {
        let mut drawn = self.0.lock();
        if drawn.is_empty() {
            let mut bytes = [0; 64 * size_of::<u64>()];
            if getrandom::fill(&mut bytes).is_ok() {
                drawn.extend(bytes.as_chunks().0.iter().map(|number| u64::from_le_bytes(*number)));
            }
        }
        drawn.pop().unwrap_or_else(random_u64)
    }
}

/// Returns a random time between zero and `max`.
pub(crate) fn jitter(max: Duration) -> Duration {
    max.mul_f64(random_u64() as f64 / u64::MAX as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_a_pool_differ() {
        let pool = RandomPool::default();
        let numbers: std::collections::HashSet<_> = (0..200).map(|_| pool.next()).collect();
        assert_eq!(numbers.len(), 200);
    }

    #[test]
    fn tokens_differ_and_jitter_stays_within_its_limit() {
        assert_ne!(token(), token());
        assert_eq!(token().len(), 32);
        for _ in 0..1000 {
            assert!(jitter(Duration::from_millis(50)) <= Duration::from_millis(50));
        }
    }
}
