//! Frames gather in batches until they are sent: each batch becomes one message.

use crate::wire::frame;
use bytes::{Bytes, BytesMut};
use std::collections::VecDeque;

/// The largest message with several frames, in bytes.
pub(super) const MAX_BATCH: usize = 16 << 10;
/// How many empty buffers are kept.
const MAX_SPARES: usize = 256;

#[derive(Default)]
pub(super) struct Batcher {
    /// Each begins with space for its header.
    pub(super) batches: VecDeque<BytesMut>,
    /// Bytes of the frames in all batches.
    pub(super) bytes: usize,
    last_size: usize,
    /// Empty buffers of full size. To allocate fresh ones costs the system more than to fill them.
    spares: Vec<BytesMut>,
}

impl Batcher {
    /// Appends a frame to the last batch, or to a new one if the last would exceed `max_size`.
    #[inline]
    pub(super) fn append(&mut self, kind: u8, stream: u32, body: &[u8], max_size: usize) {
        let size = body.len() + frame::MAX_FRAME_HEADER;
        if self.batches.back().is_none_or(|batch| batch.len() + size > max_size) {
            // As large as the last one, so that a busy lane does not copy and an idle one wastes no memory.
            let capacity = (frame::HEADER + size).max(self.last_size.next_power_of_two().min(MAX_BATCH));
            let spare = if capacity == MAX_BATCH { self.spares.pop() } else { None };
            let mut batch = spare.unwrap_or_else(|| BytesMut::with_capacity(capacity));
            batch.extend_from_slice(&[0; frame::HEADER]);
            self.batches.push_back(batch);
        }
        if let Some(batch) = self.batches.back_mut() {
            let before = batch.len();
            frame::write(batch, kind, stream, body);
            self.bytes += batch.len() - before;
        }
    }

    /// Takes the next batch, whose header is still to be written.
    pub(super) fn pop(&mut self) -> Option<BytesMut> {
        let batch = self.batches.pop_front()?;
        self.last_size = batch.len();
        self.bytes -= batch.len() - frame::HEADER;
        Some(batch)
    }

    /// Keeps the buffer of a message that was acknowledged, for another batch.
    pub(super) fn recycle(&mut self, message: Bytes) {
        if self.spares.len() < MAX_SPARES
            && let Ok(mut buffer) = message.try_into_mut()
            && buffer.capacity() == MAX_BATCH
        {
            buffer.clear();
            self.spares.push(buffer);
        }
    }

    /// Frees the empty buffers: a lane that sends little keeps nothing.
    pub(super) fn free_spares(&mut self) {
        self.spares = Vec::new();
    }
}
