//! Stop, send, end, wait and flush on level 0.

use super::*;
use shuttle::thread;
use std::sync::Mutex as RealMutex;

fn schedules() -> usize {
    std::env::var("INTERLEAVINGS").ok().map_or(2000, |n| n.parse().unwrap())
}

/// Random schedules, and schedules with few but adversarial thread switches.
pub(crate) fn search(test: impl Fn() + Send + Sync + Clone + 'static) {
    shuttle::check_random(test.clone(), schedules());
    shuttle::check_pct(test, schedules(), 3);
}

/// The published messages: their bodies, and E for the end.
fn written(outbox: &Outbox) -> String {
    use futures_util::FutureExt;
    let mut all = String::new();
    while let Some(batch) = outbox.take().now_or_never() {
        let weight = batch.items.iter().map(OutgoingItem::weight).sum();
        for item in batch.items {
            match item {
                OutgoingItem::Messages(mut messages, _) => {
                    while let Some(message) = messages.take_first() {
                        let body = str::from_utf8(&message.payload).unwrap();
                        all += if message.payload == level0::END { "E" } else { body };
                    }
                }
                _ => all += "E",
            }
        }
        outbox.release(weight);
    }
    all
}

fn count(item: &OutgoingItem) -> usize {
    if let OutgoingItem::Messages(messages, _) = item { messages.count } else { 1 }
}

fn send_some(outbox: &Outbox, word: &StatusWord, letters: &[&str]) -> String {
    let mut sent = String::new();
    for letter in letters {
        if outbox.send(word, "to", letter.as_bytes(), || None).is_ok() {
            sent += letter;
        }
    }
    sent
}

/// Nothing follows the end, whichever thread ends it; everything accepted precedes it; it ends once.
fn ends_race_with_sends() {
    let outbox = Arc::new(Outbox::new(1 << 20));
    let word = Arc::new(StatusWord::default());
    let sender = thread::spawn({
        let (outbox, word) = (Arc::clone(&outbox), Arc::clone(&word));
        move || send_some(&outbox, &word, &["a", "b"])
    });
    let ender = thread::spawn({
        let (outbox, word) = (Arc::clone(&outbox), Arc::clone(&word));
        move || outbox.finish(&word, || DurableMessage::End("to".into())).is_ok()
    });
    // Like the registry: the status word first, without the lock, and then the end.
    let stopped = word.try_stop(Status::Offline);
    let late = send_some(&outbox, &word, &["c"]);
    if stopped {
        outbox.push(DurableMessage::Error { to: "to".into(), code: 0, payload: Bytes::new() }.into());
    }
    assert_eq!(late, "", "sent after the stop was seen");
    let (sent, ended) = (sender.join().unwrap(), ender.join().unwrap());
    assert!(stopped != ended);
    assert_eq!(written(&outbox), sent + "E");
}

#[test]
fn no_message_follows_the_end() {
    search(ends_race_with_sends);
}

#[test]
fn nothing_follows_the_end_in_any_order() {
    // All schedules of one send, one end and one stop.
    let every = || {
        let outbox = Arc::new(Outbox::new(1 << 20));
        let word = Arc::new(StatusWord::default());
        let sender = thread::spawn({
            let (outbox, word) = (Arc::clone(&outbox), Arc::clone(&word));
            move || send_some(&outbox, &word, &["a"])
        });
        let stopped = word.try_stop(Status::Offline);
        let ended = outbox.finish(&word, || DurableMessage::End("to".into())).is_ok();
        assert!(stopped && !ended);
        outbox.push(DurableMessage::Error { to: "to".into(), code: 0, payload: Bytes::new() }.into());
        let sent = sender.join().unwrap();
        assert_eq!(written(&outbox), sent + "E");
    };
    shuttle::check_dfs(every, None);
}

/// A blocked send returns when the buffer drains, when its sender stops, or when the connection is lost.
/// (Otherwise shuttle reports a deadlock.)
#[test]
fn blocked_send_returns() {
    for case in 0..3 {
        search(move || {
            let outbox = Arc::new(Outbox::new(1));
            let word = Arc::new(StatusWord::default());
            assert_eq!(send_some(&outbox, &word, &["a"]), "a");
            let waiters: Vec<_> = (0..if case == 2 { 1 } else { 2 })
                .map(|_| {
                    let (outbox, word) = (Arc::clone(&outbox), Arc::clone(&word));
                    thread::spawn(move || outbox.send_wait(&word, "to", b"b", None))
                })
                .collect();
            match case {
                0 => {
                    // One fits at once, the other when the first has been flushed.
                    let mut all = String::new();
                    while all.len() < 3 {
                        all += &written(&outbox);
                        thread::yield_now();
                    }
                    assert_eq!(all, "abb");
                }
                1 => {
                    assert!(word.try_stop(Status::Offline));
                    outbox.push(DurableMessage::End("to".into()).into());
                }
                _ => {
                    // The connection's pending messages are dropped with it: the buffer is empty.
                    outbox.connection_lost([]);
                }
            }
            for waiter in waiters {
                let sent = waiter.join().unwrap();
                assert!(case == 1 || sent == Ok(()), "{sent:?}");
            }
            assert_eq!(outbox.blocked.load(Ordering::SeqCst), 0);
        });
    }
}

struct Told(RealMutex<u32>);

impl BlockedSender for Told {
    fn writable(&self) {
        *self.0.lock().unwrap() += 1;
    }
}

/// A sender that was refused is notified once, unless its own flush was the last.
#[test]
fn refused_sender_is_notified() {
    search(|| {
        let outbox = Arc::new(Outbox::new(1));
        let word = StatusWord::default();
        assert_eq!(send_some(&outbox, &word, &["a"]), "a");
        let hand_over = thread::spawn({
            let outbox = Arc::clone(&outbox);
            move || written(&outbox)
        });
        let told = Arc::new(Told(RealMutex::new(0)));
        let sent = outbox.send(&word, "to", b"b", || Some(Arc::clone(&told) as Arc<dyn BlockedSender>));
        hand_over.join().unwrap();
        let count = *told.0.lock().unwrap();
        assert_eq!(count, u32::from(sent == Err(Status::Full)));
        assert_eq!(outbox.blocked.load(Ordering::SeqCst), 0);
    });
}

/// The connection's task is woken for everything that is appended: a missed wakeup would leave it asleep.
#[test]
fn task_takes_everything() {
    search(|| {
        let outbox = Arc::new(Outbox::new(1 << 20));
        let word = Arc::new(StatusWord::default());
        let task = {
            let outbox = Arc::clone(&outbox);
            shuttle::future::spawn(async move {
                let mut all = 0;
                while all < 4 {
                    let batch = outbox.take().await;
                    all += batch.items.iter().map(count).sum::<usize>();
                    outbox.release(batch.items.iter().map(OutgoingItem::weight).sum());
                }
            })
        };
        let senders: Vec<_> = (0..2)
            .map(|_| {
                let (outbox, word) = (Arc::clone(&outbox), Arc::clone(&word));
                thread::spawn(move || assert_eq!(send_some(&outbox, &word, &["a", "b"]), "ab"))
            })
            .collect();
        senders.into_iter().for_each(|sender| sender.join().unwrap());
        shuttle::future::block_on(task).unwrap();
        assert_eq!(outbox.weight(), 0);
    });
}
