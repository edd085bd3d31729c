//! What a command finds about its request in its environment.
//!
//! As in CGI, a prefix of their own keeps the headers of a client from setting any other variable, such as PATH.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::process::Command;

const CLIENT: &str = "NATS_PRESENCE_CLIENT";
const SUBJECT: &str = "NATS_PRESENCE_SUBJECT";
const HEADER: &str = "NATS_PRESENCE_HEADER_";

/// How many bytes the variables of the headers may take. Linux starts no command with a variable of 128 KiB, nor with
/// an environment that takes a quarter of its stack.
const MAX_BYTES: usize = 64 << 10;

/// Returns the variables for the headers of a request, or which header cannot be passed on.
///
/// A header with several values has the first of them, as in the library. Nothing is left out silently: a command
/// that reads a header could take another one for it, or miss it.
pub fn header_variables<'h>(
    headers: impl Iterator<Item = (&'h str, &'h str)>,
) -> Result<HashMap<String, &'h str>, String> {
    let (mut variables, mut names, mut bytes) = (HashMap::new(), HashMap::new(), 0);
    for (name, value) in headers {
        let variable = variable(name);
        bytes += variable.len() + "=".len() + value.len() + "\0".len();
        if bytes > MAX_BYTES {
            return Err(format!("the request's headers take more than {MAX_BYTES} bytes, the limit of this worker"));
        }
        if value.chars().any(char::is_control) {
            return Err(format!("header {:?} has a control character, which this worker does not accept", short(name)));
        }
        match names.entry(variable.clone()) {
            Entry::Vacant(entry) => {
                entry.insert(name);
                variables.insert(variable, value);
            }
            Entry::Occupied(first) if *first.get() != name => {
                // Headers of different names come in no particular order.
                let (one, other) = (short(name.min(first.get())), short(name.max(first.get())));
                return Err(format!("headers {one:?} and {other:?} would be the same variable of the command"));
            }
            Entry::Occupied(_) => {}
        }
    }
    Ok(variables)
}

/// As much of a name as a message shows.
fn short(name: &str) -> String {
    name.chars().take(64).collect()
}

/// The name of the variable for a header.
fn variable(name: &str) -> String {
    let upper = name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' });
    HEADER.chars().chain(upper).collect()
}

/// Sets what the command finds about its request, and nothing that this program itself found about one.
pub fn set(command: &mut Command, client: &str, subject: &str, headers: &HashMap<String, &str>) {
    for (name, _) in std::env::vars_os() {
        if name.as_encoded_bytes().starts_with(HEADER.as_bytes()) {
            command.env_remove(name);
        }
    }
    command.env(CLIENT, client).env(SUBJECT, subject).envs(headers);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_upper_case_letters_digits_and_underscores() {
        let headers = [("X-Model", "small"), ("a.b$(c)'9", "\u{e4} $(d)"), ("\u{e4}", ""), ("PATH", "/tmp")];
        let variables = header_variables(headers.into_iter()).unwrap();
        let mut sorted: Vec<(&str, &str)> = variables.iter().map(|(name, value)| (&**name, *value)).collect();
        sorted.sort_unstable();
        let expected = [
            ("NATS_PRESENCE_HEADER_A_B__C__9", "\u{e4} $(d)"),
            ("NATS_PRESENCE_HEADER_PATH", "/tmp"),
            ("NATS_PRESENCE_HEADER_X_MODEL", "small"),
            ("NATS_PRESENCE_HEADER__", ""),
        ];
        assert_eq!(sorted, expected);
    }

    #[test]
    fn first_value_of_a_header_counts() {
        let headers = [("A", "1"), ("B", "2"), ("A", "3")];
        assert_eq!(header_variables(headers.into_iter()).unwrap()["NATS_PRESENCE_HEADER_A"], "1");
    }

    #[test]
    fn headers_that_cannot_be_passed_on_are_named() {
        let fails = |headers: &[(&str, &str)], text: &str| {
            let error = header_variables(headers.iter().copied()).unwrap_err();
            assert!(error.contains(text) && !error.contains("secret"), "{error}");
        };
        fails(&[("X-User", "me"), ("x_user", "secret")], "\"X-User\" and \"x_user\" would be the same");
        fails(&[("x_user", "me"), ("X-User", "secret")], "\"X-User\" and \"x_user\" would be the same");
        for value in ["secret\0", "secret\n", "secret\r", "\u{1b}[secret", "secret\u{85}"] {
            fails(&[("A", ""), ("X\u{7}", value)], "\"X\\u{7}\" has a control character");
        }
    }

    #[test]
    fn variables_have_a_limit() {
        let rest = MAX_BYTES - "NATS_PRESENCE_HEADER_A=\0".len();
        let (longest, longer) = ("x".repeat(rest), "x".repeat(rest + 1));
        assert!(header_variables([("a", &*longest)].into_iter()).is_ok());
        let error = header_variables([("a", &*longer)].into_iter()).unwrap_err();
        assert!(error.contains("more than 65536 bytes"), "{error}");
        // Values that are not passed on count, too: what a request costs is limited.
        assert!(header_variables(std::iter::repeat(("a", ""))).is_err());
    }
}
