//! What the runtime's threads must not inherit from the thread that starts them: the CPUs that it is pinned to, and its
//! real-time priority. A thread of the host that spins there would keep them from running.

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use std::sync::OnceLock;

/// The CPUs that the process had when it loaded this library: those that the administrator gave it (taskset, a cpuset),
/// before any of its threads pinned itself.
static CPUS: OnceLock<CpuSet> = OnceLock::new();

const THIS_THREAD: Pid = Pid::from_raw(0);

extern "C" fn save_cpus() {
    if let Ok(cpus) = sched_getaffinity(THIS_THREAD) {
        let _ = CPUS.set(cpus);
    }
}

/// Called when the library is loaded.
#[used]
#[unsafe(link_section = ".init_array")]
static AT_LOAD: extern "C" fn() = save_cpus;

/// Gives the calling thread, which must be one of the runtime's, the process's CPUs and the normal priority.
pub(crate) fn reset_scheduling() {
    // If a call fails the thread stays as it is, and works.
    if let Some(cpus) = CPUS.get() {
        let _ = sched_setaffinity(THIS_THREAD, cpus);
    }
    let mut policy = 0;
    // SAFETY: a structure of numbers, whatever fields the C library gives it.
    let mut parameters: libc::sched_param = unsafe { std::mem::zeroed() };
    // SAFETY: both are writable, and pthread_self is the calling thread, which lives.
    unsafe {
        if libc::pthread_getschedparam(libc::pthread_self(), &raw mut policy, &raw mut parameters) == 0
            && matches!(policy & !libc::SCHED_RESET_ON_FORK, libc::SCHED_FIFO | libc::SCHED_RR)
        {
            parameters.sched_priority = 0;
            libc::pthread_setschedparam(libc::pthread_self(), libc::SCHED_OTHER, &raw const parameters);
        }
    }
}
