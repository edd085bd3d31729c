//! What a connection counts.

use super::boundary::guard;
use super::codes::presence_status;
use super::handles::borrow;
use super::raw::write_out;
use super::types::presence_conn;
use crate::connection::Stats;

/// Fills `out` with the statistics of a connection.
///
/// Returns PRESENCE_OK or PRESENCE_CLOSED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_conn_stats(conn: *const presence_conn, out: *mut Stats) -> presence_status {
    // SAFETY: the caller's promise is write_out's.
    guard(|| unsafe { write_out(out, || Ok(borrow(conn)?.stats())) })
}
