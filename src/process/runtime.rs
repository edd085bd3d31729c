//! The tokio runtime of the process: the first connection makes it, and it never ends. And panics of its tasks, which
//! it turns into errors.

use crate::error::{Error, Result, Status};
use crate::ffi;
use crate::process::fork::{self, PerProcess};
use crate::sync::Mutex;
use futures_util::FutureExt;
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use once_cell::sync::OnceCell;
use std::any::Any;
use std::cell::Cell;
use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;
use std::time::Duration;
use tokio::runtime::{Builder, Handle, Runtime};

/// The name of the runtime's threads.
const THREAD: &str = "presence";

/// The stack of the runtime's threads: Rust's default. RUST_MIN_STACK in the host's environment could make it too small
/// for TLS and `getaddrinfo`.
const STACK: usize = 2 << 20;

thread_local! {
    /// True on the runtime's threads, and on a thread of the host while it builds the runtime: a panic here is caught
    /// by us.
    static IS_OURS: Cell<bool> = const { Cell::new(false) };
}

/// The text of the last panic on a thread of the runtime, if `keep_panics` was called.
static LAST_PANIC: Mutex<Option<String>> = Mutex::new(None);

static RUNTIME: PerProcess<OnceCell<Runtime>> = PerProcess::new();

/// Starts the runtime with this many threads, or returns the one that is running.
pub(crate) fn start(threads: usize) -> Result<&'static Handle> {
    fork::claim_runtime()?;
    let runtime = RUNTIME.get(OnceCell::new).get_or_try_init(|| build(threads))?;
    Ok(runtime.handle())
}

/// The runtime's threads block the host's signals: the SIGPIPE of a lost connection would end the host, and the host
/// must get all others on its own threads. The threads inherit the mask of this thread, which is restored afterwards.
fn build(threads: usize) -> Result<Runtime> {
    let mut blocked = SigSet::all();
    // A fault whose signal is blocked ends the process without calling its crash handler.
    for fault in [
        Signal::SIGSEGV,
        Signal::SIGBUS,
        Signal::SIGFPE,
        Signal::SIGILL,
        Signal::SIGTRAP,
        Signal::SIGSYS,
        Signal::SIGABRT,
    ] {
        blocked.remove(fault);
    }
    let before = blocked.thread_swap_mask(SigmaskHow::SIG_BLOCK);
    let build = || {
        Builder::new_multi_thread()
            .worker_threads(threads)
            .thread_name(THREAD)
            .thread_stack_size(STACK)
            .on_thread_start(|| {
                IS_OURS.set(true);
                ffi::reset_scheduling();
            })
            .enable_all()
            .build()
    };
    // tokio panics when it cannot start a thread.
    IS_OURS.set(true);
    let built = panic::catch_unwind(build).unwrap_or_else(|panic| Err(io::Error::other(text_of(&*panic).to_owned())));
    IS_OURS.set(false);
    if let Ok(before) = before {
        // This cannot fail: the thread had this mask before.
        let _ = before.thread_set_mask();
    }
    built.map_err(|error| Error::new(Status::Full, format!("cannot start the threads of the runtime: {error}")))
}

/// Installs a panic hook that keeps the text of a panic on the runtime's threads for the DISCONNECTED event, instead of
/// printing it: the NATS client can panic at what a peer sends, which ends its task only. Panics of other threads are
/// printed as before.
///
/// Only the C ABI calls this: there, the library has its own copy of Rust's standard library, and with it its own hook.
/// A Rust host has one hook for all its crates, which this library leaves alone (`tests/rust_host.rs`); it sees these
/// panics, too.
pub(crate) fn keep_panics() {
    static KEPT: Once = Once::new();
    KEPT.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if IS_OURS.get() {
                *LAST_PANIC.lock() = Some(text_of(info.payload()).to_owned());
            } else {
                before(info);
            }
        }));
    });
}

fn text_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic")
}

/// Runs a part of a task, and turns a panic into an error: the caller ends what depends on this part, and goes on.
pub(crate) async fn catch_panic<T>(what: &'static str, work: impl Future<Output = T>) -> Result<T> {
    #[cfg(all(test, not(shuttle)))]
    let work = crate::server_tests::panics::forcible(what, work);
    // Unwind safe as in `ffi::boundary`.
    let done = AssertUnwindSafe(work).catch_unwind().await;
    done.map_err(|panic| {
        // The error has it.
        last_panic();
        Error::new(Status::Internal, format!("{what} has failed: {}", text_of(&*panic)))
    })
}

/// Takes the text of the last panic on the runtime's threads.
pub(crate) fn last_panic() -> Option<String> {
    LAST_PANIC.lock().take()
}

/// Calls `then` after `delay`. Does nothing if the runtime was not started in this process.
pub(crate) fn later(delay: Duration, then: impl FnOnce() + Send + 'static) {
    if let Some(runtime) = RUNTIME.get(OnceCell::new).get() {
        runtime.spawn(async move {
            tokio::time::sleep(delay).await;
            then();
        });
    }
}
