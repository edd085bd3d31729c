//! Selects the model checker's atomics and locks in the library's source. (RUSTFLAGS would compile all dependencies
//! again.)

fn main() {
    println!("cargo::rustc-cfg=shuttle");
    println!("cargo::rerun-if-changed=build.rs");
}
