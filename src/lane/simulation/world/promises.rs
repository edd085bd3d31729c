//! The promises that must always hold.

use super::*;

impl World {
    /// Before a message is sent.
    pub(super) fn check_message(&mut self, index: usize, message: &Bytes) {
        let Ok(header) = Header::read(message) else {
            return self.fail("messages are well-formed", described(message));
        };
        let lane = &mut self.lanes[index];
        let (own, is_over) = (lane.own, lane.state.is_closed());
        let has_frames = message.len() > frame::HEADER;
        lane.is_reset |= header.has(frame::RESET);
        lane.must_answer_by = None;
        lane.must_report_gap &= !header.has(frame::GAP);
        if header.has(frame::PING) {
            if lane.asked.last().is_some_and(|(number, ..)| header.ping <= *number) {
                return self.fail("PING numbers rise", format!("{own}: {}", described(message)));
            }
            lane.asked.push((header.ping, header.sequence, true));
        }
        if header.has(frame::GAP) && !header.has(frame::PING) {
            // Once; and once more if what was missing came while the report was about to be sent.
            lane.gap_reports = if lane.gap_reported == Some(header.ack) { lane.gap_reports + 1 } else { 1 };
            lane.gap_reported = Some(header.ack);
            if lane.gap_reports > 2 {
                return self.fail("a gap is reported once", format!("{own}: {}", described(message)));
            }
        }
        if message.len() > self.setup.max_payload {
            return self.fail("messages fit into max_payload", format!("{own}: {} bytes", message.len()));
        }
        if header.has(frame::RESET) != is_over {
            return self
                .fail("a lane sends RESET only when it is closed", format!("{own} sends {}", described(message)));
        }
        if header.ack > lane.came_all {
            let text = format!("{own} acknowledges {}, it has all up to {}", header.ack, lane.came_all);
            return self.fail("only messages that came are acknowledged", text);
        }
        if !has_frames {
            return;
        }
        if lane.is_probing {
            return self.fail("only PINGs are sent while probing", format!("{own}: {}", described(message)));
        }
        // The next message, or again from the first that is not acknowledged.
        let missing = lane.acked + 1;
        let repeats = header.sequence == missing && lane.sent_last >= missing;
        let is_next = header.sequence == missing.max(lane.sent_last + 1);
        if !(header.sequence == missing || is_next && !lane.must_repeat) {
            let text = format!("{own} sends #{} after #{}, missing is #{missing}", header.sequence, lane.sent_last);
            return self.fail("messages are sent again in order", text);
        }
        if repeats && !lane.may_repeat {
            return self
                .fail("messages are sent again only after a reported loss", format!("{own}: {}", described(message)));
        }
        if header.sequence <= lane.sent.len() as u64 && !self.has_disorder {
            return self.fail("without a loss nothing is sent twice", format!("{own}: {}", described(message)));
        }
        lane.sent_last = header.sequence;
        lane.may_repeat &= !repeats;
        lane.must_repeat = false;
        let frames = &message[frame::HEADER..];
        let frames = (frames.iter().fold(7, |sum, byte| mix(sum ^ u64::from(*byte))), frames.len());
        let next = lane.sent.len() as u64 + 1;
        if header.sequence == next {
            lane.sent.push(frames);
            let most = lane.sent[lane.acked as usize..].iter().map(|(_, size)| size).sum::<usize>();
            self.check_backlog(index, most);
        } else if header.sequence > next || lane.sent[header.sequence as usize - 1] != frames {
            self.fail("a message that is sent again is the same", format!("{own}: {}", described(message)));
        } else {
            self.seen.sent_again += 1;
        }
    }

    /// Its driver sleeps: nothing may be left to do.
    pub(super) fn check_sleep(&mut self, index: usize, until: Option<Time>) {
        let lane = &self.lanes[index];
        let own = lane.own;
        if lane.seen.is_none() {
            return;
        }
        if lane.state.is_closed() {
            if !lane.is_reset {
                self.fail("closing a lane sends RESET", format!("{own} does not"));
            }
            return;
        }
        let (must_repeat, must_report_gap) = (lane.must_repeat && !lane.is_probing, lane.must_report_gap);
        let is_late = lane.must_answer_by.is_some_and(|by| until.is_none_or(|until| until > by.max(self.now) + MILLI));
        if must_repeat {
            self.fail("missing messages are sent again at once", format!("{own} sleeps"));
        }
        if must_report_gap {
            self.fail("a gap is reported at once", format!("{own} sleeps"));
        }
        if is_late {
            self.fail("messages are acknowledged in time", format!("{own} sleeps until {until:?}"));
        }
    }

    /// Before a message is received: tracks what it says.
    pub(super) fn track_received(&mut self, index: usize, message: &Bytes) {
        let Ok(header) = Header::read(message) else { return };
        let lane = &mut self.lanes[index];
        if !header.has(frame::RESET) {
            (lane.heard_at, lane.is_relinked, lane.suspect_since) = (self.now, false, None);
            lane.suspensions = self.processes[lane.own.side as usize].suspensions;
            if header.server != 0 {
                lane.peer_server = header.server;
            }
            lane.acked = lane.acked.max(header.ack);
            let is_missing = lane.sent.len() as u64 > lane.acked;
            let answered = lane.asked.iter().position(|(number, ..)| header.has(frame::PONG) && *number == header.pong);
            let answered = answered.and_then(|index| lane.asked.drain(..=index).next_back());
            lane.knows_trip |= answered.is_some();
            let answered = answered.filter(|(_, _, counts)| *counts);
            lane.is_probing &= answered.is_none();
            let shows_loss = answered.is_some_and(|(_, covers, _)| header.ack < covers);
            let asks = header.has(frame::GAP) && (header.has(frame::PING) || lane.gap_followed != Some(header.ack));
            if asks {
                lane.gap_followed = is_missing.then_some(header.ack);
            }
            let is_gap = asks && is_missing;
            lane.may_repeat |= is_gap || shows_loss;
            lane.must_repeat = is_missing && (is_gap || shows_loss || lane.must_repeat);
            if (asks || shows_loss) && !lane.is_probing {
                lane.asked.iter_mut().for_each(|(_, _, counts)| *counts = false);
            }
        }
        lane.is_reset |= header.has(frame::RESET);
        let has_frames = message.len() > frame::HEADER;
        if has_frames && header.sequence == lane.taken + 1 {
            lane.taken += 1;
            lane.must_answer_by.get_or_insert(self.now + ACK_DELAY);
        } else if has_frames && header.sequence <= lane.taken {
            lane.must_answer_by = Some(self.now);
        } else if header.sequence > lane.taken && lane.gap_seen.replace(lane.taken) != Some(lane.taken) {
            lane.must_report_gap = true;
        }
        if has_frames {
            lane.came.insert(header.sequence);
            while lane.came.remove(&(lane.came_all + 1)) {
                lane.came_all += 1;
            }
        }
    }

    pub(super) fn check_data(&mut self, number: usize, body: &[u8]) {
        let stream = &self.streams[number];
        let Some((_, _, sender)) = stream.on else {
            return self.fail("data comes after ACCEPT", format!("stream {number}"));
        };
        let mut expected = std::mem::take(&mut self.buffer);
        expected.clear();
        self.message(sender, stream.got, &mut expected);
        if self.streams[number].got >= self.senders[sender].sent || body != expected {
            let text = format!("stream {number}, message {}: {} bytes", self.streams[number].got, body.len());
            self.fail("received messages are the sent ones", text);
        }
        self.buffer = expected;
        let stream = &mut self.streams[number];
        let (weight, window) = (body.len() as u64 + OVERHEAD, u64::from(stream.window_size));
        let unread = stream.unread.iter().sum::<u64>();
        stream.got += 1;
        stream.unread.push_back(weight);
        if unread > window / 2 && unread + weight > window {
            self.fail(
                "unread messages fit into the window",
                format!("stream {number}: {unread} + {weight} unread, window {window}"),
            );
        }
    }

    pub(super) fn check_end(&mut self, number: usize, error: bool) {
        let stream = &self.streams[number];
        let Some((_, _, sender)) = stream.on else {
            return self.fail("the end comes after ACCEPT", format!("stream {number}"));
        };
        let sender = &self.senders[sender];
        if sender.finished != Some(error) || stream.got != sender.sent {
            let text = format!("stream {number} got {} of {}, {:?}", stream.got, sender.sent, sender.finished);
            return self.fail("an ended stream is complete", text);
        }
        self.seen.complete += 1;
    }

    pub(super) fn check_cancelled(&mut self, number: usize, why: u8) {
        let sender = &self.senders[number];
        let stream = &self.streams[sender.stream];
        let is_its = stream.on.is_some_and(|(_, _, accepted)| accepted == number);
        let is_right = match stream.cancelled {
            Some(reason) if is_its && why == reason => true,
            // The request was given up, or the stream has ended at the gateway.
            _ => why == 0 && (!is_its || stream.is_done),
        };
        if !is_right {
            self.fail("only cancelled streams report Cancelled", format!("sender {number}, reason {why}"));
        }
    }

    pub(super) fn check_memory(&mut self, index: usize) {
        let backlog = self.lanes[index].state.backlog();
        self.check_backlog(index, backlog);
    }

    /// The backlog is limited, except for control frames, and these are limited by the number of streams.
    pub(super) fn check_backlog(&mut self, index: usize, backlog: usize) {
        const CONTROL: usize = frame::MAX_FRAME_HEADER + 8;
        // A window doubles from one byte to the largest at most.
        const GROWTHS: usize = MAX_WINDOW.ilog2() as usize;
        let lane = &self.lanes[index];
        let (data, streams) = match lane.own.side {
            Side::Worker => (self.setup.limit.max(self.setup.max_payload), lane.opened as usize),
            Side::Gateway => (0, self.senders.iter().filter(|sender| sender.lane == lane.peer).count()),
        };
        let most = data + CONTROL + streams * ((5 + GROWTHS) * CONTROL + ERROR_TEXT.len());
        if backlog > most {
            let text = format!("{}: {backlog} bytes of backlog; the limit is {most}", lane.own);
            self.fail("the backlog is bounded", text);
        }
    }

    /// A lane has just given up its peer: had it reason to?
    pub(super) fn check_gone(&mut self, index: usize) {
        self.seen.lanes_gone += 1;
        let now = self.now;
        let lane = &self.lanes[index];
        let (own, peer) = (lane.own, lane.peer);
        let process = &self.processes[own.side as usize];
        let until = if lane.is_relinked { lane.linked_at + self.reconnect() } else { 0 };
        let suspect = lane.suspect_since.map(|since| (since + self.grace(lane)).max(until));
        let silent = (lane.heard_at.max(lane.linked_at) + 3 * self.heartbeat()).max(until);
        let is_due = suspect.is_some_and(|at| at <= now) || silent <= now;
        if !is_due {
            let text = format!("{own} gave up at {now}, not after {suspect:?} or {silent}");
            return self.fail("no peer is given up too early", text);
        }
        // Messages that came while the process stood still show that the peer was there. They must be read first, once.
        let waits = process.socket.iter().any(|packet| {
            let Cargo::Lane(message) = &packet.cargo else { return false };
            let is_to_it = packet.to == own || (own.side == Side::Gateway && packet.from == peer);
            is_to_it && Header::read(message).is_ok_and(|header| !header.has(frame::RESET))
        });
        let since = process.suspended_at;
        let due = suspect.map_or(since + self.heartbeat(), |at| at.max(since + LATE));
        let is_first = process.suspensions == lane.suspensions + 1;
        if process.resumed_at == now && waits && is_first && now > due + LATE && lane.busy_since.is_some() {
            let text = format!("{own} stood still since {since}, and has not read the messages that came");
            return self.fail("a process that stood still reads before it gives up a peer", text);
        }
        let them = &self.processes[peer.side as usize];
        let is_there = |lane: &Lane| !lane.state.is_closed() && (lane.own == peer || lane.peer == own);
        let is_alive = them.generation == peer.generation
            && self.lanes.iter().any(is_there)
            && self.processes.iter().all(|process| process.link.is_some() && process.suspended_until.is_none())
            && self.weather.drop == 0
            && (self.setup.is_one_server || self.is_route_up)
            // An answer takes less time than the heartbeats that wait for it.
            && 2 * self.heartbeat() > 4 * self.max_delay + 4 * self.setup.lag + 10 * MILLI;
        let worker = if own.side == Side::Worker { own } else { peer };
        let is_known = !self.over.contains(&(peer.side, peer.generation, worker));
        let mut slack = 8 * self.max_delay + 4 * self.setup.lag + LATE + 10 * MILLI;
        if self.has_lost_messages {
            slack += 13 * self.heartbeat() + path::FIRST_ASK.as_micros() as Time;
        }
        if is_alive && is_known && now > self.disturbed_at + slack {
            let text = format!("{own} gives up {peer}; nothing has happened since {}", self.disturbed_at);
            self.fail("a reachable peer is not given up", text);
        }
    }

    /// Between steps: a dead peer must be given up in time.
    pub(super) fn check_dead_peers(&mut self) {
        let slack = LATE + 4 * self.setup.lag + 10 * MILLI;
        for index in 0..self.lanes.len() {
            let lane = &self.lanes[index];
            let own = lane.own;
            let process = &self.processes[own.side as usize];
            let is_busy = match own.side {
                Side::Worker => self.senders.iter().any(|sender| sender.lane == own && !sender.is_done),
                Side::Gateway => {
                    self.streams.iter().any(|stream| stream.on.is_some_and(|(lane, ..)| lane == own) && !stream.is_done)
                }
            };
            let since = lane.busy_since.filter(|_| is_busy).or(is_busy.then_some(self.now));
            let is_running = lane.seen.is_some()
                && lane.seen == process.link
                && process.suspended_until.is_none()
                && !lane.state.is_closed()
                && self.now >= process.resumed_at + slack;
            let until = if lane.is_relinked { lane.linked_at + self.reconnect() } else { 0 };
            let first = path::FIRST_ANSWER.as_micros() as Time;
            let silence = if lane.knows_trip { self.max_silence() } else { first };
            let silent = since.map(|since| {
                let since = since.max(lane.heard_at).max(lane.linked_at).max(process.resumed_at);
                since.max(until).max(since + silence.max(3 * self.heartbeat())) + self.heartbeat()
            });
            let suspect = lane.suspect_since.map(|since| {
                let grace = self.grace(lane);
                let longest = if grace > 0 && lane.knows_trip { grace.max(silence) } else { grace };
                (since + longest).max(until).max(process.resumed_at)
            });
            let is_late = [silent, suspect].into_iter().flatten().any(|at| self.now > at + slack);
            self.lanes[index].busy_since = since;
            if is_running && is_late {
                let text = format!("{own} should have given up by {silent:?} or {suspect:?}");
                self.fail("a dead peer is given up in time", text);
            }
        }
    }
}
