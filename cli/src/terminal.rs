//! Standard output, standard error and signals.

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io::{self, Write};
use std::time::Duration;

/// Writes to the standard output.
pub fn write(data: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(data)?;
    out.flush()
}

/// As `write`, but if the reader has closed the standard output, the program ends with success.
pub fn print(data: &[u8]) -> io::Result<()> {
    let written = write(data);
    if written.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::BrokenPipe) {
        std::process::exit(0);
    }
    written
}

/// Writes a line to the standard error, without control characters.
pub fn log(text: impl AsRef<str>) {
    let _ = writeln!(io::stderr(), "{}", printable(text.as_ref().as_bytes()));
}

/// A text of someone else without what could change the state of a terminal.
pub fn printable(text: &[u8]) -> String {
    let escape = |character: char| match character {
        '\n' | '\t' => character.to_string(),
        _ if character.is_control() => character.escape_default().to_string(),
        _ => character.to_string(),
    };
    String::from_utf8_lossy(text).chars().map(escape).collect()
}

/// The signals that ask a program to end, except those that whoever started it wants ignored, such as nohup.
pub fn ending_signals() -> io::Result<Vec<i32>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    Ok([SIGINT, SIGTERM, SIGHUP].into_iter().filter(|signal| ignored >> (signal - 1) & 1 == 0).collect())
}

/// Calls `handle` with each ending signal, and with these others, on a thread of its own.
pub fn on_signal(others: &[i32], mut handle: impl FnMut(i32) + Send + 'static) -> io::Result<()> {
    let mut signals = Signals::new(ending_signals()?.iter().chain(others))?;
    std::thread::Builder::new().spawn(move || signals.forever().for_each(&mut handle))?;
    Ok(())
}

/// Calls `then`, on a thread of its own, when the reader of the standard output has closed it.
pub fn on_reader_gone(then: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    // That is reported although nothing is asked for. A file is refused: it has no reader.
    if epoll.add(io::stdout(), EpollEvent::new(EpollFlags::empty(), 0)).is_ok() {
        std::thread::Builder::new().spawn(move || {
            while epoll.wait(&mut [EpollEvent::empty()], EpollTimeout::NONE) != Ok(1) {}
            then();
        })?;
    }
    Ok(())
}

/// Reads a duration such as 500ms, 2s, 1m. A number without a unit is seconds.
pub fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|character: char| !character.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let millis: u64 = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => 0,
    };
    let number: Option<u64> = number.parse().ok();
    // As much as the library takes: ten years.
    let found = number.and_then(|number| number.checked_mul(millis)).filter(|_| millis > 0);
    let found = found.filter(|millis| *millis <= 10 * 366 * 86_400_000).map(Duration::from_millis);
    found.ok_or_else(|| "expected a whole number with ms, s, m or h, such as 500ms or 2s".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, millis) in [("500ms", 500), ("2s", 2000), ("2", 2000), ("1m", 60_000), ("1h", 3_600_000)] {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for wrong in ["", "s", "-1", "1.5s", "1d", "99999999999999999999", "999999999h"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(printable(b"a\x1b[31mb\tc\xff"), "a\\u{1b}[31mb\tc\u{fffd}");
    }
}
