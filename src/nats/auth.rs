//! Credentials of an agent: a process, or a thread of the host, that listens on a Unix socket (option `auth_socket`).
//!
//! For each attempt to connect the library connects to the socket, writes the nonce of nats-server and a line feed (an
//! empty line if the server has no nonce), and reads lines until the agent closes the connection. Each line is a name, a
//! space and a value; the names are those below. So the library needs neither a callback nor the secret.

use crate::error::{Error, Result};
use async_nats::Auth;
use std::path::Path;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// How much an agent may answer, in bytes.
const MAX_ANSWER: u64 = 64 << 10;

/// Asks the agent at `path` for the credentials of one attempt to connect.
pub(super) async fn ask(path: &Path, nonce: &[u8]) -> Result<Auth> {
    let wrong = |why: &str| Error::invalid(format!("auth_socket {}: {why}", path.display()));
    let failed = |error: std::io::Error| wrong(&error.to_string());
    let mut agent = UnixStream::connect(path).await.map_err(failed)?;
    agent.write_all(&[nonce, b"\n"].concat()).await.map_err(failed)?;
    let mut answer = Vec::new();
    agent.take(MAX_ANSWER + 1).read_to_end(&mut answer).await.map_err(failed)?;
    if answer.len() as u64 > MAX_ANSWER {
        return Err(wrong(&format!("the answer is too long; the limit is {MAX_ANSWER} bytes")));
    }
    // What the agent answers may be a secret, so errors have no part of it.
    let answer = String::from_utf8(answer).map_err(|_| wrong("the answer is not UTF-8"))?;
    parse(&answer).map_err(|why| wrong(&why))
}

fn parse(answer: &str) -> Result<Auth, String> {
    let mut auth = Auth::new();
    if answer.is_empty() {
        return Err("the answer is empty".into());
    }
    for (number, line) in answer.lines().enumerate() {
        let (name, value) = line.split_once(' ').unwrap_or((line, ""));
        match name {
            "user" => auth.username = Some(value.into()),
            "password" => auth.password = Some(value.into()),
            "token" => auth.token = Some(value.into()),
            "jwt" => auth.jwt = Some(value.into()),
            "nkey" => auth.nkey = Some(value.into()),
            "signature" => {
                auth.signature = Some(from_hex(value).ok_or("the signature is not a hexadecimal number")?);
            }
            "error" => return Err(value.into()),
            _ => {
                return Err(format!(
                    "line {} of the answer must be user, password, token, jwt, nkey, signature or error, a space and a \
                     value",
                    number + 1
                ));
            }
        }
    }
    Ok(auth)
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> =
        text.chars().map(|c| c.to_digit(16).and_then(|digit| digit.try_into().ok())).collect();
    let (pairs, rest) = digits.as_deref()?.as_chunks::<2>();
    rest.is_empty().then(|| pairs.iter().map(|[high, low]| high << 4 | low).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_parsed_and_errors_have_no_secrets() {
        let auth = parse("user a b\npassword \njwt x.y\nnkey UA\nsignature 00fFa1\ntoken t").unwrap();
        assert_eq!((auth.username.as_deref(), auth.password.as_deref()), (Some("a b"), Some("")));
        assert_eq!((auth.jwt.as_deref(), auth.nkey.as_deref()), (Some("x.y"), Some("UA")));
        assert_eq!((auth.signature, auth.token.as_deref()), (Some(vec![0, 0xff, 0xa1]), Some("t")));
        assert_eq!(parse("user a\nerror the vault is sealed").err().as_deref(), Some("the vault is sealed"));
        for wrong in ["", "hunter2", "user a\nhunter2 x", "signature 0", "signature hunter2", "\nuser a"] {
            let error = parse(wrong).err().unwrap();
            assert!(!error.contains("hunter2"), "{error}");
        }
    }
}
