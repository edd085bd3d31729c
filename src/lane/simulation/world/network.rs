//! nats-server and the ways there and back; and how a process finds the lane that a message is for, as in `lanes.rs`.

use super::*;

impl World {
    pub(super) fn post(&mut self, packet: Packet, link: Link) {
        let weather = self.weather;
        let mut random = Random::new(packet.luck);
        let is_lane = matches!(packet.cargo, Cargo::Lane(_));
        if is_lane && random.chance(weather.drop) {
            return self.note(|| "    lost".into());
        }
        let copies = 1 + u32::from(is_lane && random.chance(weather.double));
        for _ in 0..copies {
            let mut at = self.now + 1 + random.below(weather.delay);
            if !weather.reorder {
                let process = self.process(packet.from.side);
                process.up_at = process.up_at.max(at);
                at = process.up_at;
            }
            self.at(at, Event::AtServer(Packet { luck: random.next(), ..packet.clone() }, link));
        }
    }

    pub(super) fn at_server(&mut self, mut packet: Packet, link: Link) {
        let mut random = Random::new(packet.luck);
        let from = &self.processes[packet.from.side as usize];
        let is_from_there = from.generation == packet.from.generation && from.link == Some(link);
        if !is_from_there && random.chance(50) {
            // The connection was lost before it was out.
            return;
        }
        let to = &self.processes[packet.to.side as usize];
        let is_request = matches!(packet.cargo, Cargo::Request(_));
        let there = to.link.filter(|_| is_request || to.generation == packet.to.generation);
        packet.luck = random.next();
        let (packet, link) = match (there, &packet.cargo) {
            (Some(there), _) => (Packet { to: Address { generation: to.generation, ..packet.to }, ..packet }, there),
            (None, Cargo::Lane(_)) if is_from_there => {
                if random.chance(self.weather.drop) {
                    return self.note(|| format!("503 to {} is lost", packet.from));
                }
                (Packet { from: packet.to, to: packet.from, cargo: Cargo::Nobody, luck: 0 }, link)
            }
            _ => return self.note(|| format!("{} is not there", packet.to)),
        };
        let mut at = self.now + 1 + random.below(self.weather.delay);
        if !self.weather.reorder {
            let process = self.process(packet.to.side);
            process.down_at = process.down_at.max(at);
            at = process.down_at;
        }
        self.at(at, Event::AtEnd(packet, link));
    }

    /// A message has come to a process: as `Lanes::message`.
    pub(super) fn arrive(&mut self, packet: Packet) {
        if self.failure.is_some() {
            return;
        }
        let Packet { from, to, cargo, .. } = packet;
        match cargo {
            Cargo::Request(stream) => self.accept(stream),
            Cargo::Nobody => {
                if let Some(index) = self.find(to) {
                    self.nobody_there(index);
                }
            }
            Cargo::Lane(message) => {
                let is_offer = to.side == Side::Gateway && to.number == 0;
                let known = if is_offer {
                    let known = |lane: &Lane| lane.own.side == Side::Gateway && lane.peer == from;
                    self.lanes.iter().position(known).or_else(|| self.begin(from, &message))
                } else {
                    self.find(to)
                };
                match known {
                    Some(index) if self.is_another(index, from) => self.end(index),
                    Some(index) => self.receive(index, &message),
                    None => self.disown(to, from, &message),
                }
            }
        }
    }

    /// A worker hears of an end that is not the one that it knows: that one is over.
    pub(super) fn is_another(&mut self, index: usize, from: Address) -> bool {
        let lane = &mut self.lanes[index];
        let is_end = lane.own.side == Side::Worker && from.number > 0;
        is_end && *lane.heard.get_or_insert(from) != from
    }

    pub(super) fn begin(&mut self, peer: Address, message: &Bytes) -> Option<usize> {
        let header = Header::read(message).ok()?;
        let is_first = header.has(frame::NEW) && header.sequence == 1 && message.len() > frame::HEADER;
        is_first.then(|| self.make(Side::Gateway, peer))
    }

    pub(super) fn disown(&mut self, own: Address, peer: Address, message: &Bytes) {
        let Ok(header) = Header::read(message) else { return };
        if header.has(frame::RESET) {
            return;
        }
        let is_new = header.has(frame::NEW);
        let worker = if own.side == Side::Worker { own } else { peer };
        if !is_new && !self.over.contains(&(own.side, own.generation, worker)) {
            return self.fail("only what is over is disowned", format!("{own} does not know {peer}"));
        }
        let flags = if is_new { frame::GAP | frame::PONG } else { frame::RESET };
        self.note(|| format!("{own} disowns {peer}: {}", names(flags)));
        let answer = Header { flags, sequence: 0, ack: 0 }.bytes().to_vec().into();
        let process = self.process(own.side);
        if let Some(link) = process.link {
            process.disowned += 1;
            let luck = mix(self.process(own.side).disowned ^ self.setup.luck.rotate_left(7));
            self.post(Packet { from: own, to: peer, cargo: Cargo::Lane(answer), luck }, link);
        }
    }
}
