#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| nats_presence::fuzz::level0(data));
