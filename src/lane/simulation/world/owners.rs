//! The owners of senders and streams: the events that they get, and what they do then.

use super::*;

impl World {
    /// A lane reports events to its owners. They are checked now, and the owners react soon.
    pub(super) fn deliver(&mut self, index: usize, events: LaneEvents<usize>, message: &Bytes) {
        let own = self.lanes[index].own;
        let mut reactions = Vec::new();
        for (number, event) in events {
            self.note(|| format!("{own} reports {event:?} of {number}"));
            if matches!(event, LaneEvent::AcceptUndelivered) {
                let sender = &mut self.senders[number];
                sender.accept_undelivered = true;
                if sender.finished.is_none() {
                    self.fail("only ended streams report AcceptUndelivered", format!("sender {number}"));
                }
                continue;
            }
            let is_last = !matches!(event, LaneEvent::Data { .. } | LaneEvent::Writable);
            let is_done = match own.side {
                Side::Worker => &mut self.senders[number].is_done,
                Side::Gateway => &mut self.streams[number].is_done,
            };
            let was_done = *is_done;
            *is_done |= is_last;
            if was_done {
                self.fail("no event follows a stream's end", format!("{own} reports {event:?} of {number}"));
            }
            match event {
                LaneEvent::Data { run, .. } => {
                    let mut bytes = 0;
                    let mut count = 0;
                    for body in run.bodies(message) {
                        self.check_data(number, body);
                        bytes += body.len() as u64;
                        count += 1;
                    }
                    if (count, bytes) != (run.count, run.bytes) {
                        self.fail("runs have the right counts", format!("{run:?} of {count} messages, {bytes} bytes"));
                    }
                    reactions.push(Reaction::Read(number));
                }
                LaneEvent::Ended => {
                    self.check_end(number, false);
                    reactions.push(Reaction::StreamOver(number));
                }
                LaneEvent::Failed(code, text) => {
                    if text != ERROR_TEXT {
                        self.fail("errors keep their text", format!("{text:?}"));
                    }
                    if self.streams[number].on.is_some_and(|(_, _, sender)| code != error_code(sender)) {
                        self.fail("errors keep their code", format!("{code}, stream {number}"));
                    }
                    self.check_end(number, true);
                    reactions.push(Reaction::StreamOver(number));
                }
                LaneEvent::WindowExceeded => self.fail("no honest worker exceeds a window", format!("stream {number}")),
                LaneEvent::Cancelled(why) => {
                    self.seen.cancelled += 1;
                    self.check_cancelled(number, why);
                    reactions.push(Reaction::SenderOver(number));
                }
                LaneEvent::AcceptUndelivered => {}
                LaneEvent::Writable => reactions.push(Reaction::Writable(number)),
                LaneEvent::PeerGone { accept_acked } => {
                    self.seen.gone += 1;
                    if own.side == Side::Worker {
                        if accept_acked && !self.senders[number].is_known {
                            self.fail("accept_acked implies that the ACCEPT came", format!("sender {number}"));
                        }
                        reactions.push(Reaction::SenderOver(number));
                    } else {
                        reactions.push(Reaction::StreamOver(number));
                    }
                }
            }
        }
        if own.side == Side::Worker && self.lanes[index].state.is_closed() {
            let is_forgotten = |sender: &Sender| {
                sender.lane == own && sender.finished.is_some() && !sender.is_known && !sender.accept_undelivered
            };
            if let Some(number) = self.senders.iter().position(is_forgotten) {
                self.fail("undelivered ACCEPTs are reported", format!("sender {number}"));
            }
        }
        if own.side == Side::Worker && self.setup.waits {
            reactions.push(Reaction::Retry(own));
        }
        for reaction in reactions {
            if self.setup.lag == 0 {
                self.react(reaction);
            } else {
                self.at(self.now + self.setup.lag / 2, Event::React(own.side, own.generation, reaction));
            }
        }
    }

    pub(super) fn react(&mut self, reaction: Reaction) {
        match reaction {
            Reaction::Read(stream) => self.read(stream, false),
            Reaction::Writable(sender) => {
                self.senders[sender].is_blocked = false;
                self.send(sender);
            }
            Reaction::SenderOver(sender) => self.senders[sender].is_closed = true,
            Reaction::StreamOver(stream) => self.streams[stream].is_closed = true,
            Reaction::Retry(lane) => {
                for sender in 0..self.senders.len() {
                    if self.senders[sender].lane == lane {
                        self.senders[sender].is_blocked = false;
                        self.send(sender);
                    }
                }
            }
        }
    }

    /// A sender's owner sends pending messages until one is refused, and ends the stream if it wants to.
    pub(super) fn send(&mut self, number: usize) {
        if !self.is_awake(Side::Worker) || self.failure.is_some() {
            return;
        }
        while self.senders[number].pending > 0 && !self.senders[number].is_closed && !self.senders[number].is_blocked {
            self.send_some(number);
        }
        let sender = &mut self.senders[number];
        if let Some(error) = sender.finish
            && sender.pending == 0
            && !sender.is_closed
        {
            sender.is_closed = true;
            if !sender.is_done {
                sender.is_done = true;
                sender.finished = Some(error);
            }
            if let Some(index) = self.find(self.senders[number].lane) {
                let window = Arc::clone(&self.senders[number].window);
                let error = error.then(|| StreamError { code: error_code(number), text: ERROR_TEXT });
                self.lanes[index].state.finish(&window, error);
                self.changed(index);
                self.check_memory(index);
            }
        }
    }

    pub(super) fn send_some(&mut self, number: usize) {
        let Some(index) = self.find(self.senders[number].lane) else {
            // It is closed: the event is on its way to the owner.
            self.senders[number].is_blocked = true;
            return;
        };
        let Sender { sent, pending, .. } = self.senders[number];
        let mut data = std::mem::take(&mut self.buffer);
        data.clear();
        let count = if self.setup.many { pending } else { 1 };
        let lengths: Vec<usize> = (sent..sent + count).map(|index| self.message(number, index, &mut data)).collect();
        let window = Arc::clone(&self.senders[number].window);
        let state = &mut self.lanes[index].state;
        let (sent, result) = if self.setup.many {
            state.send_many(&window, &data, &lengths)
        } else {
            let result = state.send(&window, &data);
            (usize::from(result.is_ok()), result)
        };
        let most = sent.checked_sub(1).map(|last| self.setup.limit.max(lengths[last]) + frame::MAX_FRAME_HEADER);
        let backlog = state.backlog();
        if result == Err(Status::Full) && !self.setup.waits {
            state.notify_when_writable(&window);
        }
        self.changed(index);
        self.buffer = data;
        let sender = &mut self.senders[number];
        sender.sent += sent as u32;
        sender.pending -= sent as u32;
        sender.is_blocked = result.is_err();
        self.seen.refused += u64::from(result.is_err());
        if result == Err(Status::TooLarge) {
            self.fail("messages that fit are accepted", format!("{lengths:?}"));
        }
        if let Some(most) = most.filter(|most| backlog > *most) {
            self.fail(
                "the lane's limit holds",
                format!("{backlog} bytes of backlog after a send; the limit is {most}"),
            );
        }
    }

    /// A reader reads what it wants of the unread messages.
    pub(super) fn read(&mut self, number: usize, one: bool) {
        if !self.is_awake(Side::Gateway) {
            return;
        }
        let now = self.now;
        let stream = &mut self.streams[number];
        let count = match stream.reader {
            Reader::Eager => stream.unread.len(),
            Reader::Every(_) if one => stream.unread.len().min(1),
            _ => 0,
        };
        if let (Reader::Every(pause), false) = (stream.reader, stream.will_read || stream.unread.len() == count) {
            stream.will_read = true;
            self.at(now + pause * MILLI, Event::TakeOne(number));
        }
        if count == 0 {
            return;
        }
        let stream = &mut self.streams[number];
        let weight = stream.unread.drain(..count).sum::<u64>();
        let part = if stream.spec.in_parts { weight / 3 } else { 0 };
        let Some((lane, stream_number, _)) = stream.on else { return };
        for weight in [part, weight - part] {
            let stream = &mut self.streams[number];
            if let Some(weight) = stream.window.consume(weight)
                && !stream.is_closed
                && let Some(index) = self.find(lane)
            {
                let stream = &mut self.streams[number];
                let growth = stream.window.growth(weight, || Duration::from_micros(now), || None);
                if let Some(size) = growth.and_then(|growth| stream.window.grow(growth)) {
                    stream.window_size = size;
                    self.seen.grown_windows += 1;
                    self.lanes[index].state.set_window(stream_number, size);
                }
                self.lanes[index].state.return_credit(stream_number, weight);
                self.changed(index);
                self.check_memory(index);
            }
        }
    }

    /// Appends the content of a sender's message. Returns its length.
    pub(super) fn message(&self, sender: usize, index: u32, data: &mut Vec<u8>) -> usize {
        let spec = &self.streams[self.senders[sender].stream].spec;
        let content = mix((sender as u64) << 32 ^ u64::from(index));
        let most = spec.size.min(level0::max_message(self.setup.max_payload));
        let size = if spec.is_varied { content as usize % (most + 1) } else { most };
        data.extend(content.to_le_bytes().into_iter().cycle().take(size));
        size
    }
}
