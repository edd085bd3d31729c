//! Randomness from the system. A generator in memory would give a forked child the same numbers as its parent.

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

/// Returns a random time between zero and `max`.
pub(crate) fn jitter(max: Duration) -> Duration {
    max.mul_f64(random_u64() as f64 / u64::MAX as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_differ_and_jitter_stays_within_its_limit() {
        assert_ne!(token(), token());
        assert_eq!(token().len(), 32);
        for _ in 0..1000 {
            assert!(jitter(Duration::from_millis(50)) <= Duration::from_millis(50));
        }
    }
}
