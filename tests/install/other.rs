//! Another static library made by Rust, in the same program as nats-presence.

use std::panic::catch_unwind;

/// Panics, catches the panic, and returns 1.
#[unsafe(no_mangle)]
pub extern "C" fn other_panics() -> i32 {
    catch_unwind(|| panic!("a panic of the other library")).is_err().into()
}
