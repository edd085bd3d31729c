//! Several threads end one stream, and one publishes what the end must reach.

use super::*;
use shuttle::sync::atomic::AtomicBool;
use shuttle::thread;
use std::sync::Arc;

/// One thread ends the stream, its reason stays, and each thread sees it from its own call on.
#[test]
fn one_thread_ends_the_stream() {
    shuttle::check_dfs(
        || {
            let word = Arc::new(StatusWord::default());
            let enders = [Status::Offline, Status::Closed].map(|why| {
                let word = Arc::clone(&word);
                thread::spawn(move || {
                    let is_first = word.try_stop(why);
                    assert!(!is_first || word.check() == Err(why));
                    assert!(word.check().is_err());
                    is_first
                })
            });
            let ended = enders.map(|ender| ender.join().unwrap());
            assert_ne!(ended[0], ended[1]);
            assert_eq!(word.check(), Err(if ended[0] { Status::Offline } else { Status::Closed }));
        },
        None,
    );
}

/// The thread that publishes sees the end, or the thread that ends sees what was published, or both.
#[test]
fn an_end_and_a_publication_do_not_miss_each_other() {
    shuttle::check_dfs(
        || {
            let (word, published) = (Arc::new(StatusWord::default()), Arc::new(AtomicBool::new(false)));
            let publisher = thread::spawn({
                let (word, published) = (Arc::clone(&word), Arc::clone(&published));
                move || {
                    published.store(true, Ordering::Relaxed);
                    word.check_after_publishing()
                }
            });
            assert!(word.try_stop(Status::Offline));
            let is_reached = published.load(Ordering::Relaxed);
            assert!(publisher.join().unwrap() == Err(Status::Offline) || is_reached);
        },
        None,
    );
}
