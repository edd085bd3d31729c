//! Generates `include/nats_presence.h` and gives the shared library its name and its permanence.

use std::path::Path;
use std::process::ExitCode;
use std::{env, fs};

const ABI: u32 = 0;

fn main() -> ExitCode {
    println!("cargo:rerun-if-changed=src/ffi");
    println!("cargo:rerun-if-changed=cbindgen.toml");
    let os = env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    if os == "linux" {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libnats_presence.so.{ABI}");
        // The runtime's threads outlive dlclose: the code they run must stay where it is.
        println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    }
    match header() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("include/nats_presence.h: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Writes the header where it is checked in, and only when it changed, so that a build from a clean checkout leaves it clean.
fn header() -> Result<(), String> {
    let root = env::var("CARGO_MANIFEST_DIR").map_err(|error| error.to_string())?;
    let root = Path::new(&root);
    let path = root.join("include/nats_presence.h");
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml"))?;
    let builder = cbindgen::Builder::new().with_config(config).with_src(root.join("src/ffi/mod.rs"));
    let mut text = Vec::new();
    builder.generate().map_err(|error| error.to_string())?.write(&mut text);
    // Read-only sources (a registry's copy) are built with the header they came with.
    if fs::read(&path).ok().as_deref() != Some(&text[..]) && fs::write(&path, &text).is_err() {
        println!("cargo:warning=include/nats_presence.h is stale and cannot be written");
    }
    Ok(())
}
