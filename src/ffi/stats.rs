//! What a connection counts.

use super::boundary::guard;
use super::codes::presence_status;
use super::handles::borrow;
use super::raw::write_out;
use super::types::{presence_conn, presence_stats};
use crate::connection::Stats;

/// Fills `out` with the statistics of a connection.
///
/// Returns PRESENCE_OK or PRESENCE_CLOSED.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_conn_stats(conn: *const presence_conn, out: *mut presence_stats) -> presence_status {
    // SAFETY: the caller's promise is write_out's.
    guard(|| unsafe { write_out(out, || Ok(export(&borrow(conn)?.stats()))) })
}

fn export(stats: &Stats) -> presence_stats {
    presence_stats {
        connected: stats.connected.into(),
        connects: stats.connects,
        streams: stats.streams,
        senders: stats.senders,
        requests: stats.requests,
        requests_busy: stats.requests_busy,
        requests_ignored: stats.requests_ignored,
        messages_out: stats.messages_out,
        messages_in: stats.messages_in,
        messages_ignored: stats.messages_ignored,
        offline_out: stats.offline_out,
        offline_in: stats.offline_in,
        bytes_waiting: stats.bytes_waiting,
        lanes: stats.lanes,
        reserved: [0; 6],
    }
}
