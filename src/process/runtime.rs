//! The process's one tokio runtime: made by the first connection, never ended.

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

/// The stack of the runtime's threads: what Rust gives by default. RUST_MIN_STACK in the host's environment would change
/// that, to too little for TLS and `getaddrinfo`.
const STACK: usize = 2 << 20;

thread_local! {
    /// Whether a panic on this thread is ours, and caught: it is one of the runtime's, or of the host's in our code.
    static IS_OURS: Cell<bool> = const { Cell::new(false) };
}

/// What the last panic on one of the runtime's threads said, where `keep_panics` was called.
static LAST_PANIC: Mutex<Option<String>> = Mutex::new(None);

static RUNTIME: PerProcess<OnceCell<Runtime>> = PerProcess::new();

/// Starts the runtime with so many threads, or gives the one that runs.
pub(crate) fn start(threads: usize) -> Result<&'static Handle> {
    fork::claim_runtime()?;
    let runtime = RUNTIME.get(OnceCell::new).get_or_try_init(|| build(threads))?;
    Ok(runtime.handle())
}

/// The runtime's threads handle none of the host's signals: SIGPIPE of a lost connection would end the host, and the
/// others are the host's to receive on its own threads. They inherit this thread's mask, which is as before afterwards.
fn build(threads: usize) -> Result<Runtime> {
    let mut blocked = SigSet::all();
    // Blocking the signals of a fault would end the process at the fault, past any handler for crashes.
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
    // It panics where the system gives no thread.
    IS_OURS.set(true);
    let built = panic::catch_unwind(build).unwrap_or_else(|panic| Err(io::Error::other(text_of(&*panic).to_owned())));
    IS_OURS.set(false);
    if let Ok(before) = before {
        // It cannot fail: this is the mask that the thread had.
        let _ = before.thread_set_mask();
    }
    built.map_err(|error| Error::new(Status::Full, format!("no threads to be had for the runtime: {error}")))
}

/// Keeps what a panic on the runtime's threads says for the DISCONNECTED event, instead of printing it: the NATS client can
/// panic at what a peer sends, which ends its task only. Panics of other threads are printed as before.
///
/// To be called by the C ABI only. There the hook belongs to this library's own copy of Rust's standard library. A Rust
/// host's hook is the host's, and sees these panics like all others.
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

/// Does a part of a task's work, of which a panic is an error: what depends on it is to be told, and the rest goes on.
pub(crate) async fn catch_panic<T>(what: &'static str, work: impl Future<Output = T>) -> Result<T> {
    #[cfg(test)]
    let work = crate::panics::forcible(what, work);
    // Unwind safe as in `ffi::boundary`.
    let done = AssertUnwindSafe(work).catch_unwind().await;
    done.map_err(|panic| {
        // It is told here.
        last_panic();
        Error::new(Status::Internal, format!("{what} has failed: {}", text_of(&*panic)))
    })
}

/// What the last panic on the runtime's threads said, told once.
pub(crate) fn last_panic() -> Option<String> {
    LAST_PANIC.lock().take()
}

/// Calls `then` after `delay`, if the runtime was started in this process.
pub(crate) fn later(delay: Duration, then: impl FnOnce() + Send + 'static) {
    if let Some(runtime) = RUNTIME.get(OnceCell::new).get() {
        runtime.spawn(async move {
            tokio::time::sleep(delay).await;
            then();
        });
    }
}
