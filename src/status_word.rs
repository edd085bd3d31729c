//! The promise: once a client's offline mark has returned, no send to that client is accepted.
//!
//! Each sender and each requested stream has one [`StatusWord`]. It is 0 while the stream runs. Whoever ends the stream
//! first changes the word to the reason, and it never changes again. Sends ask nothing else: neither the registry nor
//! the connection.
//!
//! # Why no send is accepted after the mark has returned
//!
//! 1. *The mark stops every sender of the client.* A sender is in the client's entry of the registry before the worker
//!    learns of it. The mark locks the entry, calls [`try_stop`](StatusWord::try_stop) on each sender in it, and
//!    removes it. So a sender is either stopped by the mark, or it was attached later, for a client that has come back.
//! 2. *A word that was stopped stays stopped.* It changes once, by a compare-exchange from 0, so one thread ends the
//!    stream and there is one reason. All threads agree on the order of values of one atomic: whoever knows that the
//!    mark has returned, by whatever lock, message or event, cannot read the earlier 0, not even with a relaxed load.
//! 3. *No message follows the end.* A send reads the word with the lock of its outbox or lane held, and appends its
//!    message under the same lock. Whoever ends the stream changes the word first, and appends the stream's last
//!    message under that lock afterwards. So a send that races with the mark is either ahead of the last message, or it
//!    gets the lock later and reads the reason.
//!
//! # Memory orderings
//!
//! `try_stop` releases and [`check`](StatusWord::check) acquires: a thread that reads the reason sees what the thread
//! that ended the stream did before. A host may read the word with a relaxed load, as it wants the value only.
//!
//! Acquire and release do not order a store and a later load of something else. Where a thread publishes what the end
//! of the stream must reach (the lane that the stream runs on) while another one ends the stream, each of them stores
//! first and then looks at what the other has stored. A sequentially consistent fence between the two, in `try_stop`
//! and in [`check_after_publishing`](StatusWord::check_after_publishing), makes sure that at least one of them sees the
//! other.

use crate::error::Status;
use crate::sync::atomic::{AtomicU32, Ordering, fence};

/// 0 while a stream runs; then, for ever, the status that says why not.
#[derive(Debug, Default)]
pub struct StatusWord(AtomicU32);

impl StatusWord {
    /// Returns the reason as an error if the stream has ended.
    ///
    /// # Errors
    /// Why the stream has ended.
    #[inline]
    pub fn check(&self) -> Result<(), Status> {
        match self.0.load(Ordering::Acquire) {
            0 => Ok(()),
            code => Err(Status::from_code(code.cast_signed()).unwrap_or(Status::Internal)),
        }
    }

    /// As `check`, for a thread that has just stored what `try_stop`'s callers look for: if this returns `Ok`, they
    /// find it.
    pub(crate) fn check_after_publishing(&self) -> Result<(), Status> {
        fence(Ordering::SeqCst);
        self.check()
    }

    /// Ends the stream unless it has ended. Returns true for the one call that ended it.
    ///
    /// What its caller loads afterwards is not older than the word.
    pub(crate) fn try_stop(&self, why: Status) -> bool {
        let code = why.code().cast_unsigned();
        let is_first = self.0.compare_exchange(0, code, Ordering::AcqRel, Ordering::Acquire).is_ok();
        fence(Ordering::SeqCst);
        is_first
    }

    #[cfg(not(shuttle))]
    /// The word for readers in other languages: the code of the status as an unsigned number.
    pub fn as_ptr(&self) -> *const u32 {
        self.0.as_ptr().cast_const()
    }
}

#[cfg(all(test, shuttle))]
#[path = "../tests/interleavings/status_word.rs"]
mod interleavings;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::atomic::AtomicUsize;
    use std::thread;

    #[test]
    fn the_first_reason_stays() {
        let word = StatusWord::default();
        assert_eq!((word.check(), word.check_after_publishing()), (Ok(()), Ok(())));
        assert!(word.try_stop(Status::Offline));
        assert!(!word.try_stop(Status::Closed));
        assert_eq!((word.check(), word.check_after_publishing()), (Err(Status::Offline), Err(Status::Offline)));
    }

    #[test]
    fn every_status_can_be_read_back() {
        for why in &Status::ALL[1..] {
            let word = StatusWord::default();
            assert!(word.try_stop(*why));
            assert_eq!(word.check(), Err(*why));
            assert_eq!(word.0.into_inner().cast_signed(), why.code());
        }
    }

    #[test]
    fn one_of_many_threads_ends_the_stream() {
        let (word, ended) = (StatusWord::default(), AtomicUsize::new(0));
        thread::scope(|scope| {
            for why in [Status::Offline, Status::Closed, Status::Cancelled, Status::PeerGone] {
                let (word, ended) = (&word, &ended);
                scope.spawn(move || {
                    if word.try_stop(why) {
                        ended.fetch_add(1, Ordering::Relaxed);
                        assert_eq!(word.check(), Err(why));
                    }
                });
            }
        });
        assert_eq!(ended.into_inner(), 1);
    }
}
