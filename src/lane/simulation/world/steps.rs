//! What each step does.

use super::*;

impl World {
    pub(super) fn step(&mut self, step: Step) {
        match step {
            Step::Wait(time) => self.pass(time),
            Step::Weather(weather) => {
                self.disturbed_at = self.now;
                self.weather = weather;
                self.max_delay = self.max_delay.max(weather.delay);
                self.has_lost_messages |= weather.drop > 0;
                self.has_disorder |= weather.drop > 0 || weather.reorder;
            }
            Step::Request(spec) => self.request(spec),
            Step::Send { stream, count } => {
                if let Some(sender) = self.number(stream, self.senders.len()) {
                    if self.senders[sender].finish.is_none() {
                        self.senders[sender].pending += count;
                    }
                    self.send(sender);
                }
            }
            Step::Finish { stream, error, now } => {
                if let Some(sender) = self.number(stream, self.senders.len())
                    && self.senders[sender].finish.is_none()
                {
                    self.senders[sender].finish = Some(error);
                    if now {
                        self.senders[sender].pending = 0;
                    }
                    self.send(sender);
                }
            }
            Step::Read { stream, reader } => {
                if let Some(stream) = self.number(stream, self.streams.len()) {
                    self.streams[stream].reader = reader;
                    self.read(stream, false);
                }
            }
            Step::Cancel { stream } => {
                if let Some(stream) = self.number(stream, self.streams.len()) {
                    self.cancel(stream);
                }
            }
            Step::Cut(side) => self.cut(side),
            Step::Link(side) => self.link(side),
            Step::Blink(side) => {
                self.cut(side);
                self.link(side);
            }
            Step::CutBoth => Side::BOTH.into_iter().for_each(|side| self.cut(side)),
            Step::LinkBoth => Side::BOTH.into_iter().for_each(|side| self.link(side)),
            Step::Route(is_up) => {
                if !self.setup.is_one_server {
                    self.disturbed_at = self.now;
                    (self.has_lost_messages, self.has_disorder) = (true, true);
                    self.is_route_up = is_up;
                }
            }
            Step::Suspend(side, time) => {
                if self.is_awake(side) {
                    self.max_pause = self.max_pause.max(time * MILLI);
                    self.disturbed_at = self.now;
                    let (now, until) = (self.now, self.now + time * MILLI);
                    let process = self.process(side);
                    process.suspensions += 1;
                    (process.suspended_at, process.suspended_until) = (now, Some(until));
                    self.at(until, Event::Resume(side));
                }
            }
            Step::Restart(side) => self.restart(side),
            Step::End(side) => {
                let open = |lane: &Lane| lane.own.side == side && !lane.state.is_closed();
                if let Some(index) = self.lanes.iter().rposition(open)
                    && self.is_awake(side)
                {
                    self.has_disorder = true;
                    self.end(index);
                }
            }
            Step::RequestAck(side) => {
                if self.is_awake(side) {
                    self.request_ack(side);
                }
            }
        }
    }

    pub(super) fn number(&self, number: usize, count: usize) -> Option<usize> {
        (count > 0).then(|| number % count)
    }

    pub(super) fn request(&mut self, spec: Spec) {
        let stream = self.streams.len();
        let process = &mut self.processes[Side::Gateway as usize];
        let (Some(link), None) = (process.link, process.suspended_until) else { return };
        let key = mix(self.setup.luck ^ stream as u64);
        process.asked.insert(key, stream);
        let from = Address { side: Side::Gateway, generation: process.generation, number: 0 };
        self.seen.streams += 1;
        self.streams.push(Stream {
            spec,
            key,
            generation: from.generation,
            on: None,
            got: 0,
            unread: VecDeque::new(),
            reader: spec.reader,
            will_read: false,
            window: ReadWindow::new(spec.window, spec.window_grows),
            window_size: spec.window,
            cancelled: None,
            is_done: false,
            is_closed: false,
            is_lost: false,
        });
        for copy in 0..1 + u64::from(spec.twice) {
            let to = Address { side: Side::Worker, generation: 0, number: 0 };
            let luck = mix(key ^ copy);
            self.post(Packet { from, to, cargo: Cargo::Request(stream), luck }, link);
        }
    }

    pub(super) fn cancel(&mut self, number: usize) {
        let stream = &mut self.streams[number];
        if stream.is_closed || self.processes[Side::Gateway as usize].suspended_until.is_some() {
            return;
        }
        stream.is_closed = true;
        self.processes[Side::Gateway as usize].asked.remove(&stream.key);
        let Some((lane, stream_number, _)) = stream.on else { return };
        let reason = 1 + (number % 250) as u8;
        if !stream.is_done {
            stream.is_done = true;
            stream.cancelled = Some(reason);
        }
        if let Some(index) = self.find(lane) {
            self.lanes[index].state.cancel(stream_number, reason);
            self.changed(index);
        }
    }

    pub(super) fn cut(&mut self, side: Side) {
        let process = &mut self.processes[side as usize];
        if process.link.take().is_none() {
            return;
        }
        (self.disturbed_at, self.has_disorder) = (self.now, true);
        process.socket.clear();
        // Requests that were not accepted end with the connection.
        for (_, stream) in process.asked.drain() {
            self.streams[stream].is_closed = true;
        }
        self.at(self.now + self.setup.lag, Event::Notice(side));
    }

    pub(super) fn link(&mut self, side: Side) {
        let process = &mut self.processes[side as usize];
        if process.link.is_some() {
            return;
        }
        self.disturbed_at = self.now;
        process.links += 1;
        process.link = Some(process.links);
        self.at(self.now + self.setup.lag, Event::Notice(side));
    }

    /// Drivers learn that the connection was lost or made.
    pub(super) fn notice(&mut self, side: Side) {
        self.disturbed_at = self.now;
        let (link, now) = (self.process(side).link, self.instant());
        for lane in self.lanes.iter_mut().filter(|lane| lane.own.side == side) {
            if lane.seen == link || matches!(lane.driver, Driver::New(_)) {
                continue;
            }
            lane.seen = link;
            lane.state.disconnected();
            lane.asked.clear();
            lane.knows_trip = false;
            lane.suspect_since = None;
            (lane.must_repeat, lane.must_report_gap, lane.must_answer_by) = (false, false, None);
            if link.is_some() {
                lane.state.reconnected(self.setup.server(side), now);
                (lane.linked_at, lane.is_relinked, lane.is_probing) = (self.now, true, true);
            }
            lane.driver = Driver::Ready(self.now);
        }
    }

    pub(super) fn restart(&mut self, side: Side) {
        self.disturbed_at = self.now;
        (self.has_restarted, self.has_disorder) = (true, true);
        self.lanes.retain(|lane| lane.own.side != side);
        let resumed_at = self.now;
        let process = self.process(side);
        *process = Process { resumed_at, ..Process::new(process.generation + 1, process.links) };
        match side {
            Side::Worker => self.senders.iter_mut().for_each(|sender| {
                sender.is_lost |= !sender.is_closed;
                (sender.is_done, sender.is_closed) = (true, true);
            }),
            Side::Gateway => self.streams.iter_mut().for_each(|stream| {
                stream.is_lost |= !stream.is_closed;
                (stream.is_done, stream.is_closed) = (true, true);
            }),
        }
    }

    pub(super) fn resume(&mut self, side: Side) {
        let now = self.now;
        let process = self.process(side);
        if process.suspended_until != Some(now) {
            return;
        }
        self.disturbed_at = self.now;
        let process = self.process(side);
        process.suspended_until = None;
        process.resumed_at = now;
        let luck = mix(self.setup.luck ^ now);
        self.note(|| format!("{side:?} resumes"));
        if luck & 1 == 0 {
            // Timers are handled before messages.
            for own in self.lanes.iter().map(|lane| lane.own).collect::<Vec<_>>() {
                if own.side == side
                    && let Some(index) = self.find(own)
                    && self.due(index).is_some_and(|due| due <= now)
                {
                    self.drive(index);
                }
            }
        }
        while let Some(packet) = self.process(side).socket.pop_front() {
            self.arrive(packet);
        }
        match side {
            Side::Worker => (0..self.senders.len()).for_each(|sender| self.send(sender)),
            Side::Gateway => (0..self.streams.len()).for_each(|stream| self.read(stream, false)),
        }
    }

    pub(super) fn request_ack(&mut self, side: Side) {
        let now = self.instant();
        for index in 0..self.lanes.len() {
            if self.lanes[index].own.side == side {
                self.lanes[index].state.request_ack(now);
                self.changed(index);
            }
        }
    }
}
