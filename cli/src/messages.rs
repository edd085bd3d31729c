//! Cuts the output of a command into messages.

/// How output becomes messages.
pub struct Messages {
    /// Each piece of output is a message as it comes; otherwise each line is one, without its newline.
    is_raw: bool,
    /// The beginning of a line whose end has not come.
    line: Vec<u8>,
}

impl Messages {
    pub fn new(is_raw: bool) -> Messages {
        Messages { is_raw, line: Vec::new() }
    }

    /// Calls `send` with each message that `output` completes, until it fails. A line that is longer than `limit` is
    /// given to `send` before its end, so that it need not be kept.
    pub fn add<E>(
        &mut self,
        output: &[u8],
        limit: usize,
        mut send: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.is_raw {
            return output.chunks(limit.max(1)).try_for_each(send);
        }
        for part in output.split_inclusive(|byte| *byte == b'\n') {
            match part.strip_suffix(b"\n") {
                Some(end) if self.line.is_empty() => send(end)?,
                Some(end) => {
                    self.line.extend_from_slice(end);
                    send(&self.line)?;
                    self.line.clear();
                }
                None => self.line.extend_from_slice(part),
            }
        }
        if self.line.len() > limit { send(&self.line) } else { Ok(()) }
    }

    /// Calls `send` with the last line if it has no newline.
    pub fn finish<E>(&mut self, mut send: impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        if self.line.is_empty() { Ok(()) } else { send(&std::mem::take(&mut self.line)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds pieces and returns the messages; a message longer than 8 bytes is refused.
    fn cut(is_raw: bool, pieces: &[&[u8]]) -> Result<Vec<Vec<u8>>, usize> {
        let (mut messages, mut found) = (Messages::new(is_raw), Vec::new());
        let mut send = |message: &[u8]| {
            found.push(message.to_vec());
            if message.len() > 8 { Err(message.len()) } else { Ok(()) }
        };
        for piece in pieces {
            messages.add(piece, 8, &mut send)?;
        }
        messages.finish(&mut send)?;
        Ok(found)
    }

    #[test]
    fn lines_may_come_in_any_pieces() {
        let output = b"one\n\ntw\xff\0o\r\nend";
        let expected: Vec<&[u8]> = vec![b"one", b"", b"tw\xff\0o\r", b"end"];
        for size in 1..=output.len() {
            let pieces: Vec<&[u8]> = output.chunks(size).collect();
            assert_eq!(cut(false, &pieces).unwrap(), expected, "{size}");
        }
        assert_eq!(cut(false, &[b"a\n"]).unwrap(), [b"a"]);
        assert!(cut(false, &[]).unwrap().is_empty());
    }

    #[test]
    fn long_line_is_refused_before_its_end() {
        assert_eq!(cut(false, &[b"12345", b"6789", b"not kept"]), Err(9));
    }

    #[test]
    fn raw_output_is_cut_at_the_limit_only() {
        let expected: Vec<&[u8]> = vec![b"12345678", b"9\n", b"x"];
        assert_eq!(cut(true, &[b"123456789\n", b"x"]).unwrap(), expected);
    }
}
