//! The ends of lanes and their drivers, as in `driver.rs`.

use super::*;

impl World {
    pub(super) fn make(&mut self, side: Side, peer: Address) -> usize {
        let (now, lag) = (self.instant(), self.setup.lag);
        let timeouts = PeerTimeouts {
            heartbeat_interval: Duration::from_millis(self.setup.heartbeat_ms),
            local_grace: Duration::from_millis(self.setup.grace_ms),
            remote_grace: Duration::from_millis(self.setup.remote_grace_ms),
            peer_reconnect: Duration::from_millis(self.setup.reconnect_ms),
        };
        let process = self.process(side);
        process.lanes += 1;
        let own = Address { side, generation: process.generation, number: process.lanes };
        self.seen.lanes += 1;
        let mut state = State::new(side.role(), self.setup.limit, timeouts, now);
        state.set_max_payload(self.setup.max_payload);
        self.lanes.push(Lane {
            own,
            peer,
            state,
            driver: Driver::New(self.now + lag),
            heard: None,
            seen: None,
            opened: 0,
            published: 0,
            sent: Vec::new(),
            sent_last: 0,
            may_repeat: false,
            must_repeat: false,
            asked: Vec::new(),
            peer_server: 0,
            knows_trip: false,
            gap_followed: None,
            gap_reported: None,
            gap_reports: 0,
            taken: 0,
            gap_seen: None,
            must_report_gap: false,
            must_answer_by: None,
            is_reset: false,
            acked: 0,
            came: BTreeSet::new(),
            came_all: 0,
            heard_at: self.now,
            suspensions: self.processes[side as usize].suspensions,
            linked_at: self.now,
            is_relinked: false,
            suspect_since: None,
            is_probing: false,
            busy_since: None,
        });
        self.note(|| format!("{own} begins, with {peer}"));
        self.lanes.len() - 1
    }

    /// The worker accepts a request, as `Lanes::open` does.
    pub(super) fn accept(&mut self, stream: usize) {
        let peer = Address { side: Side::Gateway, generation: self.streams[stream].generation, number: 0 };
        let open = |lane: &Lane| lane.own.side == Side::Worker && lane.peer == peer && !lane.state.is_closed();
        let index = self.lanes.iter().position(open).unwrap_or_else(|| self.make(Side::Worker, peer));
        let (now, sender) = (self.instant(), self.senders.len());
        let Stream { key, spec, .. } = self.streams[stream];
        let lane = &mut self.lanes[index];
        lane.opened += 1;
        let (own, number) = (lane.own, lane.opened);
        let Some(window) = lane.state.open(key, spec.window, sender, now) else {
            return self.fail("an open lane opens streams", format!("{own} does not"));
        };
        self.note(|| format!("{own} accepts stream {stream} as {number}, sender {sender}"));
        self.senders.push(Sender {
            stream,
            lane: own,
            number,
            window,
            pending: 0,
            sent: 0,
            is_blocked: false,
            finish: None,
            finished: None,
            is_known: false,
            accept_undelivered: false,
            is_done: false,
            is_closed: false,
            is_lost: false,
        });
        self.changed(index);
    }

    /// To be called after each call of a lane's state.
    pub(super) fn changed(&mut self, index: usize) {
        let lane = &mut self.lanes[index];
        let must_wake = lane.state.must_wake();
        if let Driver::Asleep(until) = lane.driver {
            if must_wake {
                lane.driver = Driver::Ready(self.now);
            } else {
                self.check_sleep(index, until);
            }
        }
        self.note_over(index);
    }

    pub(super) fn note_over(&mut self, index: usize) {
        let lane = &self.lanes[index];
        if lane.state.is_closed() {
            let worker = if lane.own.side == Side::Worker { lane.own } else { lane.peer };
            self.over.insert((lane.own.side, lane.own.generation, worker));
        }
    }

    /// The lane's task runs, as `Lane::run` does.
    pub(super) fn drive(&mut self, index: usize) {
        let now = self.instant();
        let lane = &mut self.lanes[index];
        if matches!(lane.driver, Driver::New(_)) {
            lane.seen = self.processes[lane.own.side as usize].link;
            if lane.seen.is_some() {
                lane.state.connected(self.setup.server(lane.own.side));
            }
        }
        let mut events = Vec::new();
        let was_over = lane.state.is_closed();
        let message = lane.state.poll(now, &mut events);
        let (deadline, is_over, seen) = (lane.state.deadline(), lane.state.is_closed(), lane.seen);
        let own = lane.own;
        if is_over && !was_over {
            self.check_gone(index);
        }
        let mut random = Random::new(mix(self.setup.luck ^ self.lanes[index].published));
        let late = random.below(self.setup.lag + 1);
        self.lanes[index].driver = match (&message, seen) {
            // It is written.
            (Some(_), Some(link)) if self.process(own.side).link == Some(link) => Driver::Ready(self.now + late),
            (Some(_), Some(_)) => Driver::Stuck,
            (Some(_), None) => Driver::Ready(self.now),
            (None, _) => Driver::Asleep(deadline.map(|at| {
                // Rounded up: a timer is never early.
                let at = at.saturating_duration_since(self.base).as_nanos().div_ceil(1000) as Time;
                at.max(self.now) + late.min(MILLI)
            })),
        };
        self.note_over(index);
        if let Driver::Asleep(until) = self.lanes[index].driver {
            self.check_sleep(index, until);
        }
        if !events.is_empty() || is_over {
            self.deliver(index, events, &Bytes::new());
        }
        match (message, seen) {
            (Some(message), Some(link)) => self.publish(own, message, link),
            (None, _) if is_over => {
                self.note(|| format!("{own} is over"));
                self.lanes.retain(|lane| lane.own != own);
            }
            _ => {}
        }
    }

    pub(super) fn publish(&mut self, own: Address, message: Bytes, link: Link) {
        let Some(index) = self.find(own) else { return };
        self.check_message(index, &message);
        let lane = &mut self.lanes[index];
        lane.published += 1;
        let (peer, count) = (lane.peer, lane.published);
        let luck = mix(self.setup.luck ^ mix(count ^ u64::from(own.number) << 32 ^ (own.side as u64) << 62));
        self.note(|| format!("{own} -> {peer}: {}", described(&message)));
        self.seen.messages += 1;
        if self.process(own.side).link == Some(link) {
            self.post(Packet { from: own, to: peer, cargo: Cargo::Lane(message), luck }, link);
        }
    }

    pub(super) fn receive(&mut self, index: usize, message: &Bytes) {
        let now = self.instant();
        let (own, peer) = (self.lanes[index].own, self.lanes[index].peer);
        self.note(|| format!("{own} <- {peer}: {}", described(message)));
        let was_over = self.lanes[index].state.is_closed();
        if !was_over {
            self.track_received(index, message);
        }
        let Self { lanes, streams, senders, processes, .. } = self;
        let asked = &mut processes[own.side as usize].asked;
        let mut unknown = None;
        let mut events = Vec::new();
        let received = lanes[index].state.receive(message, now, &mut events, |key, number| {
            let Some(sender) = senders.iter().position(|sender| sender.lane == peer && sender.number == number) else {
                unknown = Some(number);
                return None;
            };
            senders[sender].is_known = true;
            let stream = asked.remove(&key)?;
            let window = streams[stream].spec.window;
            streams[stream].on = Some((own, number, sender));
            Some((stream, window))
        });
        if let Some(number) = unknown {
            self.fail("accepted streams were opened", format!("{peer} accepts a stream {number}"));
        }
        // Only a worker's message to an earlier end, which is closed, may be malformed.
        if received.is_err() {
            self.has_restarted = true;
            if !self.over.contains(&(Side::Gateway, own.generation, peer)) {
                self.fail("messages are well-formed", format!("{own} refuses {}", described(message)));
            }
        }
        self.changed(index);
        self.deliver(index, events, message);
        self.check_memory(index);
    }

    pub(super) fn end(&mut self, index: usize) {
        self.has_restarted = true;
        let mut events = Vec::new();
        self.lanes[index].state.close(&mut events);
        self.changed(index);
        self.deliver(index, events, &Bytes::new());
    }

    pub(super) fn no_responders(&mut self, index: usize) {
        let now = self.instant();
        let lane = &mut self.lanes[index];
        let (own, was_over) = (lane.own, lane.state.is_closed());
        self.seen.no_responders += 1;
        if lane.seen.is_some() && !was_over && lane.suspect_since.is_none() {
            lane.suspect_since = Some(self.now);
            if !lane.is_probing {
                lane.asked.iter_mut().for_each(|(_, _, counts)| *counts = false);
            }
            lane.is_probing = true;
        }
        let mut events = Vec::new();
        lane.state.no_responders(now, &mut events);
        let is_over = lane.state.is_closed();
        self.note(|| format!("{own}: no responders"));
        if is_over && !was_over {
            self.check_gone(index);
        }
        self.changed(index);
        self.deliver(index, events, &Bytes::new());
    }
}
