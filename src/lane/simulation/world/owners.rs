//! Those who own senders and streams: what they hear, and what they do then.

use super::*;

impl World {
    /// A lane tells its owners: what it says is checked now, and they react soon.
    pub(super) fn told(&mut self, index: usize, tells: Vec<LaneEvent<usize>>, message: &Bytes) {
        let own = self.lanes[index].own;
        let mut reactions = Vec::new();
        for tell in tells {
            self.note(|| format!("{own} tells {tell:?}"));
            let (number, is_last) = match &tell {
                LaneEvent::Unheard(number) => {
                    let sender = &mut self.senders[*number];
                    sender.is_unheard = true;
                    if sender.finished.is_none() {
                        self.fail("only what has ended is unheard of", format!("sender {number}"));
                    }
                    continue;
                }
                LaneEvent::Data(number, _) | LaneEvent::Room(number) => (*number, false),
                LaneEvent::End(number) | LaneEvent::Error(number, _) | LaneEvent::Overrun(number) => (*number, true),
                LaneEvent::Cancelled(number, _) | LaneEvent::Gone(number, _) => (*number, true),
            };
            let is_done = match own.side {
                Side::Worker => &mut self.senders[number].is_done,
                Side::Gateway => &mut self.streams[number].is_done,
            };
            let was_done = *is_done;
            *is_done |= is_last;
            if was_done {
                self.fail("nothing follows the end", format!("{own} tells {tell:?}"));
            }
            match tell {
                LaneEvent::Data(stream, run) => {
                    let mut bytes = 0;
                    let mut count = 0;
                    for body in run.bodies(message) {
                        self.check_data(stream, body);
                        bytes += body.len() as u64;
                        count += 1;
                    }
                    if (count, bytes) != (run.count, run.bytes) {
                        self.fail("runs are counted", format!("{run:?} of {count} messages, {bytes} bytes"));
                    }
                    reactions.push(Reaction::Read(stream));
                }
                LaneEvent::End(stream) => {
                    self.check_end(stream, false);
                    reactions.push(Reaction::StreamOver(stream));
                }
                LaneEvent::Error(stream, text) => {
                    if text != ERROR_TEXT {
                        self.fail("errors have their text", format!("{text:?}"));
                    }
                    self.check_end(stream, true);
                    reactions.push(Reaction::StreamOver(stream));
                }
                LaneEvent::Overrun(stream) => self.fail("honest workers do not overrun", format!("stream {stream}")),
                LaneEvent::Cancelled(sender, why) => {
                    self.seen.cancelled += 1;
                    self.check_cancelled(sender, why);
                    reactions.push(Reaction::SenderOver(sender));
                }
                LaneEvent::Unheard(_) => {}
                LaneEvent::Room(sender) => reactions.push(Reaction::Room(sender)),
                LaneEvent::Gone(number, knew) => {
                    self.seen.gone += 1;
                    if own.side == Side::Worker {
                        if knew && !self.senders[number].is_known {
                            self.fail("who knew of a stream is known", format!("sender {number}"));
                        }
                        reactions.push(Reaction::SenderOver(number));
                    } else {
                        reactions.push(Reaction::StreamOver(number));
                    }
                }
            }
        }
        if own.side == Side::Worker && self.lanes[index].state.is_over() {
            let is_forgotten = |sender: &Sender| {
                sender.lane == own && sender.finished.is_some() && !sender.is_known && !sender.is_unheard
            };
            if let Some(number) = self.senders.iter().position(is_forgotten) {
                self.fail("who ended unheard of is told", format!("sender {number}"));
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
            Reaction::Room(sender) => {
                self.senders[sender].wants_room = false;
                self.send(sender);
            }
            Reaction::SenderOver(sender) => self.senders[sender].is_closed = true,
            Reaction::StreamOver(stream) => self.streams[stream].is_closed = true,
            Reaction::Retry(lane) => {
                for sender in 0..self.senders.len() {
                    if self.senders[sender].lane == lane {
                        self.senders[sender].wants_room = false;
                        self.send(sender);
                    }
                }
            }
        }
    }

    /// A sender's owner sends what is pending, as far as there is room, and ends the stream if it wants to.
    pub(super) fn send(&mut self, number: usize) {
        if !self.is_awake(Side::Worker) || self.failure.is_some() {
            return;
        }
        while self.senders[number].pending > 0 && !self.senders[number].is_closed && !self.senders[number].wants_room {
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
                let credit = Arc::clone(&self.senders[number].credit);
                self.lanes[index].state.finish(&credit, error.then_some(ERROR_TEXT));
                self.changed(index);
                self.check_memory(index);
            }
        }
    }

    pub(super) fn send_some(&mut self, number: usize) {
        let Some(index) = self.find(self.senders[number].lane) else {
            // It is over, and the owner will hear of it.
            self.senders[number].wants_room = true;
            return;
        };
        let Sender { sent, pending, .. } = self.senders[number];
        let mut data = std::mem::take(&mut self.buffer);
        data.clear();
        let count = if self.setup.many { pending } else { 1 };
        let lengths: Vec<usize> = (sent..sent + count).map(|index| self.message(number, index, &mut data)).collect();
        let credit = Arc::clone(&self.senders[number].credit);
        let state = &mut self.lanes[index].state;
        let (sent, result) = if self.setup.many {
            state.send_many(&credit, &data, &lengths)
        } else {
            let result = state.send(&credit, &data);
            (usize::from(result.is_ok()), result)
        };
        let most = sent.checked_sub(1).map(|last| self.setup.limit.max(lengths[last]) + frame::MAX_FRAME_HEADER);
        let backlog = state.backlog();
        if result == Err(Refusal::Full) && !self.setup.waits {
            state.want_room(&credit);
        }
        self.changed(index);
        self.buffer = data;
        let sender = &mut self.senders[number];
        sender.sent += sent as u32;
        sender.pending -= sent as u32;
        sender.wants_room = result.is_err();
        self.seen.refused += u64::from(result.is_err());
        if result == Err(Refusal::TooLarge) {
            self.fail("messages that fit are taken", format!("{lengths:?}"));
        }
        if let Some(most) = most.filter(|most| backlog > *most) {
            self.fail("a lane's limit holds", format!("{backlog} bytes wait after a send, {most} may"));
        }
    }

    /// A reader takes what it wants of what waits.
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
            if let Some(told) = self.streams[number].grant.take(weight)
                && !self.streams[number].is_closed
                && let Some(index) = self.find(lane)
            {
                self.lanes[index].state.grant(stream_number, told);
                self.changed(index);
                self.check_memory(index);
            }
        }
    }

    /// Appends the content of a sender's message, and returns its length.
    pub(super) fn message(&self, sender: usize, index: u32, data: &mut Vec<u8>) -> usize {
        let spec = &self.streams[self.senders[sender].stream].spec;
        let content = mix((sender as u64) << 32 ^ u64::from(index));
        let most = spec.size.min(level0::max_message(self.setup.max_payload));
        let size = if spec.is_varied { content as usize % (most + 1) } else { most };
        data.extend(content.to_le_bytes().into_iter().cycle().take(size));
        size
    }
}
