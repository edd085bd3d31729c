//! Generates `include/nats_presence.h`, and sets the name and the permanence of the shared library.

#[path = "src/config/keys.rs"]
mod keys;

use std::fmt::Write;
use std::path::Path;
use std::process::ExitCode;
use std::{env, fs};

const ABI: u32 = 0;

/// What the header is generated from: the core's types that are part of the ABI, and the functions.
const SOURCES: [&str; 4] = ["src/error.rs", "src/events/event.rs", "src/connection/stats.rs", "src/ffi/mod.rs"];

/// The header's groups of functions, each with its first function.
const GROUPS: [(&str, &str); 8] = [
    ("presence_status_text", "Texts"),
    ("presence_connect", "Connect"),
    ("presence_queue_new", "Read events"),
    ("presence_serve", "Serve: the worker's side"),
    ("presence_request", "Request: the gateway's side"),
    ("mark_client_online", "Presence: who is online"),
    ("presence_config_new", "Options"),
    ("presence_conn_stats", "Statistics"),
];

fn main() -> ExitCode {
    SOURCES.iter().for_each(|source| println!("cargo:rerun-if-changed={source}"));
    println!("cargo:rerun-if-changed=src/ffi");
    println!("cargo:rerun-if-changed=src/config/keys.rs");
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

/// The macros for the versions of the library and of its ABI.
fn versions() -> Result<String, String> {
    let part = |name: &str| env::var(format!("CARGO_PKG_VERSION_{name}")).map_err(|error| error.to_string());
    let (major, minor, patch) = (part("MAJOR")?, part("MINOR")?, part("PATCH")?);
    Ok(format!(
        r#"
/* The version of this header. presence_version returns that of the library. */
#define PRESENCE_VERSION "{major}.{minor}.{patch}"
#define PRESENCE_VERSION_MAJOR {major}
#define PRESENCE_VERSION_MINOR {minor}
#define PRESENCE_VERSION_PATCH {patch}
/* The same as one number, for comparisons: 1.2.3 is 10203. */
#define PRESENCE_VERSION_NUMBER (PRESENCE_VERSION_MAJOR * 10000 + PRESENCE_VERSION_MINOR * 100 + PRESENCE_VERSION_PATCH)
/* The version of the ABI, which is also the version in the library's SONAME. */
#define PRESENCE_ABI {ABI}

/* For functions whose result must not be ignored. */
#ifndef PRESENCE_NODISCARD
#if (defined(__cplusplus) && __cplusplus >= 201703L) || (defined(__STDC_VERSION__) && __STDC_VERSION__ >= 202311L)
#define PRESENCE_NODISCARD [[nodiscard]]
#elif defined(__GNUC__)
#define PRESENCE_NODISCARD __attribute__((warn_unused_result))
#else
#define PRESENCE_NODISCARD
#endif
#endif
"#
    ))
}

/// The macros for the names of options.
fn options() -> String {
    let mut text = String::from("/* The names of options, which presence_config_set describes. */\n");
    for key in keys::CONNECT.iter().chain(&keys::REQUEST) {
        let _ = writeln!(text, "#define PRESENCE_OPTION_{} \"{key}\"", key.to_uppercase());
    }
    let _ = writeln!(text, "/* Before the name of a header: PRESENCE_OPTION_HEADER \"X-Model\" */");
    let _ = writeln!(text, "#define PRESENCE_OPTION_HEADER \"{}\"\n", keys::HEADER);
    text
}

/// Writes the header to where it is checked in, but only if it changed, so that a build of a clean checkout leaves it
/// clean.
fn header() -> Result<(), String> {
    let root = env::var("CARGO_MANIFEST_DIR").map_err(|error| error.to_string())?;
    let root = Path::new(&root);
    let path = root.join("include/nats_presence.h");
    let mut config = cbindgen::Config::from_file(root.join("cbindgen.toml"))?;
    config.after_includes = Some(versions()?);
    let builder = SOURCES
        .iter()
        .fold(cbindgen::Builder::new().with_config(config), |builder, source| builder.with_src(root.join(source)));
    let mut text = Vec::new();
    builder.generate().map_err(|error| error.to_string())?.write(&mut text);
    let text = String::from_utf8(text).map_err(|error| error.to_string())?;
    // cbindgen begins each constant with the whole name of its type.
    let mut text = text.replace("PRESENCE_STATUS_", "PRESENCE_").replace("PRESENCE_EVENT_KIND_", "PRESENCE_EVENT_");
    for (function, title) in GROUPS {
        let declaration = text.rfind(&format!("{function}(")).ok_or_else(|| format!("{function} is missing"))?;
        let comment = text[..declaration].rfind("/**\n").ok_or_else(|| format!("{function} has no comment"))?;
        let macros = if title == "Options" { options() } else { String::new() };
        text.insert_str(comment, &format!("/* ---- {title} {} */\n\n{macros}", "-".repeat(100 - title.len())));
    }
    // Read-only sources (a registry's copy) are built with the header that they contain.
    if fs::read_to_string(&path).ok().as_deref() != Some(&text[..]) && fs::write(&path, &text).is_err() {
        println!("cargo:warning=include/nats_presence.h is outdated and cannot be written");
    }
    Ok(())
}
