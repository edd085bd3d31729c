//! The ends of lanes and their drivers, as in `driver.rs`.

use super::*;

impl World {
    pub(super) fn make(&mut self, side: Side, peer: Address) -> usize {
        let (now, lag) = (self.instant(), self.setup.lag);
        let patience = PeerTimeouts {
            heartbeat: Duration::from_millis(self.setup.heartbeat_ms),
            grace: Duration::from_millis(self.setup.grace_ms),
            remote_grace: Duration::from_millis(self.setup.remote_grace_ms),
            reconnect: Duration::from_millis(self.setup.reconnect_ms),
        };
        let process = self.process(side);
        process.lanes += 1;
        let own = Address { side, generation: process.generation, number: process.lanes };
        self.seen.lanes += 1;
        let mut state = State::new(side == Side::Worker, self.setup.limit, patience, now);
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
            gap_heard: None,
            gap_told: None,
            gaps_told: 0,
            taken: 0,
            gap_seen: None,
            must_tell: false,
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
            is_held: false,
            busy_since: None,
        });
        self.note(|| format!("{own} begins, with {peer}"));
        self.lanes.len() - 1
    }

    /// The worker accepts a request: as `Lanes::open`.
    pub(super) fn accept(&mut self, stream: usize) {
        let peer = Address { side: Side::Gateway, generation: self.streams[stream].generation, number: 0 };
        let open = |lane: &Lane| lane.own.side == Side::Worker && lane.peer == peer && !lane.state.is_over();
        let index = self.lanes.iter().position(open).unwrap_or_else(|| self.make(Side::Worker, peer));
        let (now, sender) = (self.instant(), self.senders.len());
        let Stream { key, spec, .. } = self.streams[stream];
        let lane = &mut self.lanes[index];
        lane.opened += 1;
        let (own, number) = (lane.own, lane.opened);
        let Some(credit) = lane.state.open(key, spec.window, sender, now) else {
            return self.fail("an open lane opens streams", format!("{own} does not"));
        };
        self.note(|| format!("{own} accepts stream {stream} as {number}, sender {sender}"));
        self.senders.push(Sender {
            stream,
            lane: own,
            number,
            credit,
            pending: 0,
            sent: 0,
            wants_room: false,
            finish: None,
            finished: None,
            is_known: false,
            is_unheard: false,
            is_done: false,
            is_closed: false,
            is_lost: false,
        });
        self.changed(index);
    }

    /// After each call of a lane's state.
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
        if lane.state.is_over() {
            let worker = if lane.own.side == Side::Worker { lane.own } else { lane.peer };
            self.over.insert((lane.own.side, lane.own.generation, worker));
        }
    }

    /// What the lane's task does when it runs: as `Lane::drive`.
    pub(super) fn drive(&mut self, index: usize) {
        let now = self.instant();
        let lane = &mut self.lanes[index];
        if matches!(lane.driver, Driver::New(_)) {
            lane.seen = self.processes[lane.own.side as usize].link;
            if lane.seen.is_some() {
                lane.state.begin(self.setup.server(lane.own.side));
            }
        }
        let mut tells = Vec::new();
        let was_over = lane.state.is_over();
        let message = lane.state.poll(now, &mut tells);
        let (deadline, is_over, seen) = (lane.state.deadline(), lane.state.is_over(), lane.seen);
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
        if !tells.is_empty() || is_over {
            self.told(index, tells, &Bytes::new());
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
        // A gateway answers to the inbox of its worker, and its own one stands behind.
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
        let was_over = self.lanes[index].state.is_over();
        if !was_over {
            self.hear(index, message);
        }
        let Self { lanes, streams, senders, processes, .. } = self;
        let asked = &mut processes[own.side as usize].asked;
        let mut nobody = None;
        let mut tells = Vec::new();
        let received = lanes[index].state.receive(message, now, &mut tells, |key, number| {
            let Some(sender) = senders.iter().position(|sender| sender.lane == peer && sender.number == number) else {
                nobody = Some(number);
                return None;
            };
            senders[sender].is_known = true;
            let stream = asked.remove(&key)?;
            let window = streams[stream].spec.window;
            streams[stream].on = Some((own, number, sender));
            Some((stream, window))
        });
        if let Some(number) = nobody {
            self.fail("what is accepted was opened", format!("{peer} accepts a stream {number}"));
        }
        // An honest worker answers to an earlier end at most, one that is over.
        if received.is_err() {
            self.has_restarted = true;
            if !self.over.contains(&(Side::Gateway, own.generation, peer)) {
                self.fail("messages are well-formed", format!("{own} refuses {}", described(message)));
            }
        }
        self.changed(index);
        self.told(index, tells, message);
        self.check_memory(index);
    }

    pub(super) fn end(&mut self, index: usize) {
        self.has_restarted = true;
        let mut tells = Vec::new();
        self.lanes[index].state.end(&mut tells);
        self.changed(index);
        self.told(index, tells, &Bytes::new());
    }

    pub(super) fn nobody_there(&mut self, index: usize) {
        let now = self.instant();
        let lane = &mut self.lanes[index];
        let (own, was_over) = (lane.own, lane.state.is_over());
        self.seen.nobody_there += 1;
        if lane.seen.is_some() && !was_over && lane.suspect_since.is_none() {
            lane.suspect_since = Some(self.now);
            if !lane.is_held {
                lane.asked.iter_mut().for_each(|(_, _, counts)| *counts = false);
            }
            lane.is_held = true;
        }
        let mut tells = Vec::new();
        lane.state.nobody_there(now, &mut tells);
        let is_over = lane.state.is_over();
        self.note(|| format!("{own}: nobody there"));
        if is_over && !was_over {
            self.check_gone(index);
        }
        self.changed(index);
        self.told(index, tells, &Bytes::new());
    }
}
