//! All faults are repaired: then all streams must end, all lanes must drain, and only heartbeats may be sent.

use super::*;

impl World {
    /// Repairs all faults, and checks that everything ends.
    pub(super) fn heal(&mut self) {
        self.note(|| "-- all faults are repaired".into());
        let resumes = self.processes.iter().filter_map(|process| process.suspended_until).max();
        if let Some(until) = resumes {
            self.run_until(until, |_| false);
        }
        Side::BOTH.into_iter().for_each(|side| self.link(side));
        self.weather = Weather::CALM;
        self.is_route_up = true;
        self.disturbed_at = self.now;
        for number in 0..self.senders.len() {
            self.senders[number].finish.get_or_insert(false);
            self.send(number);
        }
        let blocked = self.setup.blocked;
        let is_blocked = move |stream: &Stream| blocked && stream.reader == Reader::Stopped;
        for number in 0..self.streams.len() {
            if !is_blocked(&self.streams[number]) {
                self.streams[number].reader = Reader::Eager;
                self.read(number, false);
            }
        }
        // Requests that are still on their way get senders that end at once.
        let settling_time = self.settling_time();
        self.finish_late_ones();
        let until = self.now + settling_time;
        self.run_until(until, |world| world.is_settled(is_blocked));
        self.check_settled(is_blocked, "streams end even if other readers are slow");
        for number in 0..self.streams.len() {
            self.streams[number].reader = Reader::Eager;
            self.read(number, false);
        }
        let until = self.now + settling_time;
        self.run_until(until, |world| world.is_settled(|_| false));
        self.check_settled(|_| false, "all streams end");
        // Requests that no worker accepts.
        (0..self.streams.len()).for_each(|stream| self.cancel(stream));
        Side::BOTH.into_iter().for_each(|side| self.request_ack(side));
        let until = self.now + settling_time;
        self.run_until(until, |world| world.lanes.iter().all(|lane| lane.state.is_drained()));
        let full = self.lanes.iter().find(|lane| !lane.state.is_drained() || lane.state.backlog() > 0);
        if let Some(lane) = full
            && self.failure.is_none()
        {
            let text = format!("{}: {} bytes wait", lane.own, lane.state.backlog());
            return self.fail("lanes drain", text);
        }
        self.pass(settling_time);
        let (published, lanes) = (self.seen.messages, self.lanes.len() as u64);
        self.pass(24 * self.heartbeat());
        let published = self.seen.messages - published;
        if published > 8 * lanes && self.failure.is_none() {
            self.fail("idle lanes are quiet", format!("{published} messages on {lanes} ends"));
        }
    }

    /// How long it may take until all streams have ended.
    pub(super) fn settling_time(&self) -> Time {
        let pending = self.senders.iter().map(|sender| u64::from(sender.pending) + 2).sum::<u64>();
        let judges = self.has_restarted || self.seen.lanes_gone > 0;
        let longest = self.max_grace().max(self.reconnect()).max(self.max_silence());
        let judgement = if judges { self.heartbeat() + longest } else { 0 };
        3 * SECOND + judgement + 60 * MILLI * pending + 4 * self.max_delay
    }

    pub(super) fn finish_late_ones(&mut self) {
        self.pass(2 * self.max_delay + 2 * self.setup.lag);
        for number in 0..self.senders.len() {
            self.senders[number].finish.get_or_insert(false);
            self.send(number);
        }
    }

    pub(super) fn is_settled(&self, is_blocked: impl Fn(&Stream) -> bool) -> bool {
        let is_over = |stream: &Stream| stream.is_closed || stream.on.is_none() || is_blocked(stream);
        self.senders.iter().all(|sender| sender.is_closed || is_blocked(&self.streams[sender.stream]))
            && self.streams.iter().all(is_over)
    }

    pub(super) fn check_settled(&mut self, is_blocked: impl Fn(&Stream) -> bool, promise: &'static str) {
        if self.is_settled(&is_blocked) || self.failure.is_some() {
            return;
        }
        let senders = self.senders.iter().enumerate();
        let senders = senders.filter(|(_, sender)| !sender.is_closed && !is_blocked(&self.streams[sender.stream]));
        let senders: Vec<_> = senders
            .map(|(number, sender)| {
                format!("sender {number} (of stream {}, {} pending)", sender.stream, sender.pending)
            })
            .collect();
        let streams = self.streams.iter().enumerate();
        let streams = streams.filter(|(_, stream)| !stream.is_closed && stream.on.is_some() && !is_blocked(stream));
        let streams: Vec<_> = streams.map(|(number, stream)| format!("stream {number} (got {})", stream.got)).collect();
        self.fail(promise, format!("these run: {}", [senders, streams].concat().join(", ")));
    }
}
