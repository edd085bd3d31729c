//! What a connection counts, and the metrics of the process.

use super::boundary::{guard, guard_value};
use super::codes::presence_status;
use super::handles::borrow;
use super::raw::{text_out, write_out};
use super::types::presence_conn;
use crate::connection::{self, Stats};
use std::ffi::c_char;

/// Fills `out` with the statistics of a connection.
///
/// Returns PRESENCE_OK or PRESENCE_CLOSED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_conn_stats(conn: *const presence_conn, out: *mut Stats) -> presence_status {
    // SAFETY: the caller's promise is write_out's.
    guard(|| unsafe { write_out(out, || Ok(borrow(conn)?.stats())) })
}

/// Writes the metrics of this process, which are those of all its connections together, as OpenMetrics text: the body
/// of an answer to Prometheus, with the content type "application/openmetrics-text; version=1.0.0; charset=utf-8".
///
/// At most `cap` bytes are written, with a NUL after the text, which is truncated if it does not fit. The last line of
/// a complete text is "# EOF". `buf` may be NULL if `cap` is 0. No label has a client's id; a service's metrics have its
/// subject. docs/metrics.md describes each metric.
///
/// Returns the length of the text without the NUL. If it is `cap` or more the text was truncated: call again with a
/// larger buffer, and compare again, because the text may have grown. Returns a negative presence_status for an invalid
/// `buf`.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_metrics(buf: *mut c_char, cap: usize) -> i64 {
    // SAFETY: the caller's promise is text_out's.
    let written = guard_value(|| unsafe { text_out("buf", buf, cap, connection::metrics) });
    match written {
        Ok(length) => i64::try_from(length).unwrap_or(i64::MAX),
        Err(status) => status.code().into(),
    }
}
