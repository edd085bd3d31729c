//! A panic in each function of the header becomes a status, and the next call works.

use super::*;
use crate::error::Status;
use std::cell::Cell;
use std::collections::BTreeSet;
use std::ffi::c_char;
use std::panic;
use std::ptr::{null, null_mut};

thread_local! {
    static FORCED: Cell<bool> = const { Cell::new(false) };
}

/// Panics once after `force` on this thread.
pub(super) fn if_forced() {
    if FORCED.take() {
        panic::resume_unwind(Box::new("forced"));
    }
}

/// What a function returns.
#[derive(Debug, PartialEq)]
enum Returned {
    Status(i64),
    Nothing,
}

impl From<i32> for Returned {
    fn from(status: i32) -> Returned {
        Returned::Status(status.into())
    }
}

impl From<presence_status> for Returned {
    fn from(status: presence_status) -> Returned {
        Returned::from(status as i32)
    }
}

impl From<i64> for Returned {
    fn from(status: i64) -> Returned {
        Returned::Status(status)
    }
}

impl From<()> for Returned {
    fn from((): ()) -> Returned {
        Returned::Nothing
    }
}

macro_rules! functions {
    ($($name:ident($($argument:expr),*)),* $(,)?) => {
        // SAFETY: NULL is allowed for each pointer, with length 0.
        &[$((stringify!($name), || unsafe { $name($($argument),*) }.into())),*]
    };
}

type Call = (&'static str, fn() -> Returned);

#[allow(unused_unsafe)]
const STATUSES: &[Call] = functions![
    mark_client_online(null()),
    mark_client_offline(null()),
    presence_mark_online(null(), 0),
    presence_mark_offline(null(), 0),
    presence_mark_many(false, null(), null(), 0, null_mut()),
    presence_session_open(null(), 0, null_mut()),
    presence_session_close(null_mut()),
    presence_config_set(null_mut(), null(), null()),
    presence_config_error(null(), null_mut()),
    presence_config_free(null_mut()),
    presence_connect(null(), null(), null_mut(), null_mut()),
    presence_listen_offline(null_mut()),
    presence_conn_watch(null_mut(), null_mut(), 0),
    presence_close(null_mut(), 0),
    presence_conn_stats(null(), null_mut()),
    presence_metrics(null_mut(), 0),
    presence_queue_new(null_mut()),
    presence_queue_fd(null()),
    presence_queue_wait(null_mut(), null_mut(), 0, 0),
    presence_queue_wake(null_mut()),
    presence_queue_free(null_mut()),
    presence_watch(null_mut(), 0),
    presence_serve(null_mut(), null_mut(), null(), null(), 0, 0, null_mut(), null_mut()),
    presence_service_stop(null_mut()),
    presence_service_free(null_mut()),
    presence_sender_set_tag(null_mut(), 0),
    presence_sender_send(null_mut(), null(), 0),
    presence_sender_send_many(null_mut(), null(), null(), 0),
    presence_sender_send_wait(null_mut(), null(), 0, 0),
    presence_sender_error(null_mut(), null(), 0),
    presence_sender_error_code(null_mut(), 0, null(), 0),
    presence_sender_end(null_mut()),
    presence_sender_header(null(), null(), null_mut(), null_mut()),
    presence_sender_header_at(null(), 0, null_mut(), null_mut(), null_mut(), null_mut()),
    presence_sender_free(null_mut()),
    presence_request(null_mut(), null_mut(), null(), null_mut(), null_mut()),
    presence_stream_consumed(null_mut(), 0),
    presence_stream_cancel(null_mut()),
    presence_stream_free(null_mut()),
];

/// Functions that return constants, and cannot panic.
const CONSTANTS: [&str; 3] = ["presence_event_kind_text", "presence_status_text", "presence_version"];

fn force<T>(call: impl FnOnce() -> T) -> T {
    FORCED.set(true);
    let returned = call();
    assert!(!FORCED.take(), "the call did not reach its guard");
    returned
}

fn in_header() -> BTreeSet<&'static str> {
    let header = include_str!("../../include/nats_presence.h");
    let lines = header.lines().map(|line| line.strip_prefix("PRESENCE_NODISCARD ").unwrap_or(line));
    let declarations = lines.filter(|line| line.starts_with(|c: char| c.is_ascii_lowercase()));
    let heads = declarations.filter_map(|line| line.split_once('(')).map(|(head, _)| head);
    heads.filter_map(|head| head.rsplit([' ', '*']).next()).filter(|name| !name.is_empty()).collect()
}

#[test]
fn each_function_returns_a_status_and_works_again() {
    let internal = Returned::from(Status::Internal.code());
    let mut seen: BTreeSet<&str> = CONSTANTS.into();
    for (name, call) in STATUSES {
        let forced = force(call);
        let usual = call();
        match forced {
            Returned::Status(_) => assert_eq!(forced, internal, "{name}"),
            Returned::Nothing => {}
        }
        assert_ne!(usual, internal, "{name} does not work afterwards");
        seen.insert(name);
    }
    // Functions that cannot return a status return what they return for NULL.
    // SAFETY: NULL is allowed for each pointer.
    unsafe {
        assert!(force(|| presence_config_new()).is_null());
        assert!(!force(|| is_client_online(c"".as_ptr())) && is_client_online(c"".as_ptr()));
        assert!(!force(|| presence_is_online(null(), 0)) && presence_is_online(null(), 0));
        assert_eq!(force(|| presence_online_count()), 0);
        assert!(!force(|| presence_session_is_open(null())));
        assert!(force(|| presence_sender_is_closed(null())));
        assert_eq!(force(|| presence_sender_max_message(null())), 0);
        assert_eq!(force(|| presence_sender_send_count(null())), 0);
        assert!(force(|| presence_sender_status_word(null())).is_null());
        assert!(force(|| presence_sender_reply(null(), null_mut())).is_null());
        assert_eq!(force(|| presence_stream_tag(null())), 0);
        assert!(force(|| presence_stream_client(null(), null_mut())).is_null());
    }
    seen.extend([
        "presence_config_new",
        "is_client_online",
        "presence_is_online",
        "presence_online_count",
        "presence_session_is_open",
        "presence_sender_is_closed",
        "presence_sender_max_message",
        "presence_sender_send_count",
        "presence_sender_status_word",
        "presence_sender_reply",
        "presence_stream_tag",
        "presence_stream_client",
    ]);
    assert_eq!(seen, in_header());
}

#[test]
fn the_error_is_filled() {
    let mut error = presence_error { status: 0, message: [0x55; PRESENCE_ERROR_MESSAGE] };
    // SAFETY: NULL is allowed; the error is writable.
    unsafe { force(|| presence_connect(null(), null(), null_mut(), &raw mut error)) };
    assert_eq!(error.status, Status::Internal.code());
    let message: Vec<u8> =
        error.message.iter().flat_map(|c: &c_char| c.to_ne_bytes()).take_while(|c| *c != 0).collect();
    assert_eq!(message, Status::Internal.to_string().as_bytes());
}
