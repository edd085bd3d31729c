//! The process's one tokio runtime: made by the first connection, never ended.

use crate::error::{Error, Result, Status};
use crate::fork::{self, PerProcess};
use crate::sync::Mutex;
use futures_util::FutureExt;
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use once_cell::sync::OnceCell;
use std::any::Any;
use std::cell::Cell;
use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;
use std::thread;
use std::time::Duration;
use tokio::runtime::{Builder, Handle, Runtime};

/// The name of the runtime's threads.
const THREAD: &str = "presence";

thread_local! {
    /// Whether a panic on this thread of the host's is one of ours, and caught.
    static IS_OURS: Cell<bool> = const { Cell::new(false) };
}

/// What the last panic on one of the runtime's threads said.
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
    static LISTENS: Once = Once::new();
    LISTENS.call_once(listen_to_panics);
    let before = blocked.thread_swap_mask(SigmaskHow::SIG_BLOCK);
    let build = || Builder::new_multi_thread().worker_threads(threads).thread_name(THREAD).enable_all().build();
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

/// A NATS client can panic at what a peer sends. That ends its task only, and is told by DISCONNECTED; on the host's standard
/// error, where a panic is printed, nobody expects it. Panics of other threads are printed as ever.
fn listen_to_panics() {
    let before = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if thread::current().name() == Some(THREAD) || IS_OURS.get() {
            *LAST_PANIC.lock() = Some(text_of(info.payload()).to_owned());
        } else {
            before(info);
        }
    }));
}

fn text_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic")
}

/// Does a part of a task's work, of which a panic is an error: what depends on it is to be told, and the rest goes on.
pub(crate) async fn contain<T>(what: &'static str, work: impl Future<Output = T>) -> Result<T> {
    #[cfg(test)]
    let work = crate::panics::forcible(what, work);
    // Unwind safe as in `ffi::guard`.
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
