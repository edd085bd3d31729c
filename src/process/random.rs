//! Randomness from the system: unlike a generator's in memory, it is another process's own after a fork.

use std::time::Duration;

/// 128 bits, in hex.
pub(crate) fn token() -> String {
    format!("{:016x}{:016x}", random_u64(), random_u64())
}

pub(crate) fn random_u64() -> u64 {
    // Without a source of randomness the time must do; to be unlike others is all that is needed then.
    getrandom::u64().unwrap_or_else(|_| {
        let elapsed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        elapsed.as_nanos() as u64 ^ (u64::from(std::process::id()) << 32)
    })
}

/// A time between zero and `most`.
pub(crate) fn jitter(most: Duration) -> Duration {
    most.mul_f64(random_u64() as f64 / u64::MAX as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_differ_and_jitter_stays_below_its_limit() {
        assert_ne!(token(), token());
        assert_eq!(token().len(), 32);
        for _ in 0..1000 {
            assert!(jitter(Duration::from_millis(50)) <= Duration::from_millis(50));
        }
    }
}
