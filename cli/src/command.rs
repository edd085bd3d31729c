//! The command that answers one request: started, read, and stopped with its process group.

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// How much output is read at once.
const PIECE: usize = 64 << 10;
/// How long to wait before checking whether the processes that a command left behind have ended, at first and at most.
/// The system has no event for it.
const FIRST_CHECK: Duration = Duration::from_millis(5);
const LAST_CHECK: Duration = Duration::from_millis(320);

/// What a new pipe takes at least.
const PIPE: usize = 4096;

/// Wakes the thread of one command: its stream has changed, a child process has ended, or the command is to be killed.
pub struct Wakeup {
    event: EventFd,
    kills: AtomicBool,
}

impl Wakeup {
    pub fn new() -> io::Result<Wakeup> {
        Ok(Wakeup { event: EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?, kills: AtomicBool::new(false) })
    }

    pub fn wake(&self) {
        // It cannot fail before it has counted to 2^64.
        let _ = self.event.write(1);
    }

    /// Makes the command end without its grace period.
    pub fn kill(&self) {
        self.kills.store(true, Ordering::Release);
        self.wake();
    }

    pub fn kills(&self) -> bool {
        self.kills.load(Ordering::Acquire)
    }

    /// Waits for a wakeup, and uses it.
    pub fn wait(&self) {
        // After a signal it returns early, and the caller looks again.
        let _ = self.event.read();
    }
}

/// What a running command has next.
pub enum Progress<'a> {
    Output(&'a [u8]),
    Exited(ExitStatus),
    /// The wakeup was used.
    Woken,
}

/// A running command, the leader of its own process group.
pub struct Running<'w> {
    child: Child,
    group: Pid,
    output: Option<ChildStdout>,
    wakeup: &'w Wakeup,
    /// Has the output and the wakeup.
    epoll: Epoll,
    piece: Box<[u8]>,
}

const OUTPUT: u64 = 0;
const WAKEUP: u64 = 1;

impl<'w> Running<'w> {
    /// Starts a command with `input` as its standard input. `set` sets its environment.
    pub fn start(
        command: &[OsString],
        input: Vec<u8>,
        set: impl FnOnce(&mut Command),
        wakeup: &'w Wakeup,
    ) -> io::Result<Running<'w>> {
        let (program, arguments) = command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&wakeup.event, EpollEvent::new(EpollFlags::EPOLLIN, WAKEUP))?;
        let mut command = Command::new(program);
        set(&mut command);
        command.args(arguments).process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let group = Pid::from_raw(child.id().cast_signed());
        let (stdin, output) = (child.stdin.take(), child.stdout.take());
        let running = Running { child, group, output, wakeup, epoll, piece: vec![0; PIECE].into() };
        if let Some(output) = &running.output {
            running.epoll.add(output, EpollEvent::new(EpollFlags::EPOLLIN, OUTPUT))?;
        }
        if let Some(mut stdin) = stdin {
            // A command need not read its input.
            let is_short = input.len() <= PIPE;
            let mut write = move || drop(stdin.write_all(&input));
            if is_short { write() } else { drop(thread::Builder::new().name("input".into()).spawn(write)?) }
        }
        Ok(running)
    }

    /// Waits for output, for the exit once there is no more output, or for a wakeup.
    pub fn next(&mut self) -> io::Result<Progress<'_>> {
        loop {
            if self.output.is_none()
                && let Some(status) = self.child.try_wait()?
            {
                return Ok(Progress::Exited(status));
            }
            let (has_output, is_woken) = self.wait(None)?;
            if is_woken {
                return Ok(Progress::Woken);
            }
            if has_output {
                let length = self.read()?;
                if length > 0 {
                    return Ok(Progress::Output(&self.piece[..length]));
                }
            }
        }
    }

    /// Sends SIGTERM to the command and all other processes of its group. `wait_for_group` must follow.
    pub fn terminate(&self) {
        // The group exists at least until its leader is reaped, which only this thread does.
        let _ = killpg(self.group, Signal::SIGTERM);
    }

    /// Waits for the end of the group. After `grace`, what is left of it gets SIGKILL.
    pub fn wait_for_group(mut self, grace: Duration) -> io::Result<()> {
        let (deadline, mut next_check) = (Instant::now() + grace, FIRST_CHECK);
        loop {
            let is_reaped = self.child.try_wait()?.is_some();
            if is_reaped && !is_running(self.group) {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.wakeup.kills() {
                let _ = killpg(self.group, Signal::SIGKILL);
                self.child.wait()?;
                return Ok(());
            }
            let limit = if is_reaped { left.min(next_check) } else { left };
            // Its output is still read, because a command whose output is full may be unable to end.
            if self.wait(Some(limit))?.0 {
                self.read()?;
            } else if is_reaped {
                next_check = LAST_CHECK.min(2 * next_check);
            }
        }
    }

    /// Waits. Returns two flags: there is output or its end; the wakeup was used.
    fn wait(&self, limit: Option<Duration>) -> io::Result<(bool, bool)> {
        // Rounded up, so that a wait does not end just before the limit.
        let limit = limit.map(|limit| EpollTimeout::try_from(limit + Duration::from_millis(1)));
        let limit = limit.map_or(EpollTimeout::NONE, |limit| limit.unwrap_or(EpollTimeout::MAX));
        let mut events = [EpollEvent::empty(); 2];
        let count = match self.epoll.wait(&mut events, limit) {
            Err(nix::Error::EINTR) => 0,
            count => count?,
        };
        let is_ready = |data| events[..count].iter().any(|event| event.data() == data);
        if is_ready(WAKEUP) {
            self.wakeup.wait();
        }
        Ok((is_ready(OUTPUT), is_ready(WAKEUP)))
    }

    /// Reads into `piece`. Returns 0 at the end, after which the output is closed.
    fn read(&mut self) -> io::Result<usize> {
        let Some(output) = &mut self.output else { return Ok(0) };
        let length = output.read(&mut self.piece)?;
        if length == 0 {
            self.output = None;
        }
        Ok(length)
    }
}

impl Drop for Running<'_> {
    /// A command that is still running here could not be read any longer.
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = killpg(self.group, Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

/// Returns true if a process of the group is running. A zombie does not count: in a container it may never be reaped.
fn is_running(group: Pid) -> bool {
    let is_running = |process: fs::DirEntry| {
        let stat = fs::read_to_string(process.path().join("stat")).unwrap_or_default();
        // After the name, which may contain anything: state, parent, group.
        let mut words = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        let state = words.next();
        state != Some("Z") && words.nth(1).and_then(|word| word.parse().ok()) == Some(group.as_raw())
    };
    killpg(group, None).is_ok() && fs::read_dir("/proc").map_or(true, |all| all.flatten().any(is_running))
}

/// Says how a command has failed, as a code and a text, or returns `None` for success.
pub fn failure(status: ExitStatus) -> Option<(i32, String)> {
    match (status.code(), status.signal()) {
        (Some(0), _) => None,
        (Some(code), _) => Some((code, format!("the command exited with status {code}"))),
        (None, signal) => {
            let signal = signal.unwrap_or_default();
            Some((128 + signal, format!("the command was killed by signal {signal}")))
        }
    }
}
