//! nats-server and the ways to it and from it; and how a process finds the lane of a message, as in `lanes.rs`.

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
            let delay = 1 + random.below(weather.delay);
            let at = self.way(packet.from.side, Way::Up, delay, &packet.cargo);
            self.at(at, Event::AtServer(Packet { luck: random.next(), ..packet.clone() }, link));
        }
    }

    pub(super) fn at_server(&mut self, mut packet: Packet, link: Link) {
        let mut random = Random::new(packet.luck);
        let from = &self.processes[packet.from.side as usize];
        let is_from_there = from.generation == packet.from.generation && from.link == Some(link);
        if !is_from_there && random.chance(50) {
            // The connection was lost before the message was out.
            return;
        }
        let to = &self.processes[packet.to.side as usize];
        let is_request = matches!(packet.cargo, Cargo::Request(_));
        let is_linked = self.setup.is_one_server || self.is_route_up;
        let there = to.link.filter(|_| is_linked && (is_request || to.generation == packet.to.generation));
        packet.luck = random.next();
        let (packet, link) = match (there, &packet.cargo) {
            (Some(there), _) => (Packet { to: Address { generation: to.generation, ..packet.to }, ..packet }, there),
            (None, Cargo::Lane(_)) if is_from_there => {
                if random.chance(self.weather.drop) {
                    return self.note(|| format!("503 to {} is lost", packet.from));
                }
                (Packet { from: packet.to, to: packet.from, cargo: Cargo::NoResponders, luck: 0 }, link)
            }
            _ => return self.note(|| format!("{} is not there", packet.to)),
        };
        let delay = 1 + random.below(self.weather.delay);
        let at = self.way(packet.to.side, Way::Down, delay, &packet.cargo);
        self.at(at, Event::AtEnd(packet, link));
    }

    /// When a message that is sent now arrives: after those before it.
    fn way(&mut self, side: Side, way: Way, delay: Time, cargo: &Cargo) -> Time {
        let (now, weather) = (self.now, self.weather);
        let size = if let Cargo::Lane(message) = cargo { message.len() as u64 + 100 } else { 100 };
        let process = self.process(side);
        let (busy_until, last_at) = match way {
            Way::Up => (&mut process.up_busy, &mut process.up_at),
            Way::Down => (&mut process.down_busy, &mut process.down_at),
        };
        if let Some(takes) = (size * SECOND).checked_div(weather.rate) {
            *busy_until = now.max(*busy_until) + takes;
        }
        let mut at = now.max(*busy_until) + delay;
        if !weather.reorder {
            *last_at = at.max(*last_at);
            at = *last_at;
        }
        self.max_delay = self.max_delay.max(at - now);
        at
    }

    /// A message has come to a process, as in `Lanes::message`.
    pub(super) fn arrive(&mut self, packet: Packet) {
        if self.failure.is_some() {
            return;
        }
        let Packet { from, to, cargo, .. } = packet;
        match cargo {
            Cargo::Request(stream) => self.accept(stream),
            Cargo::NoResponders => {
                if let Some(index) = self.find(to) {
                    self.no_responders(index);
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
                    Some(index) if self.is_other_end(index, from) => self.end(index),
                    Some(index) => self.receive(index, &message),
                    None => self.reject_unknown_lane(to, from, &message),
                }
            }
        }
    }

    /// Whether the message comes from another end of the gateway than those before: then the lane is closed.
    pub(super) fn is_other_end(&mut self, index: usize, from: Address) -> bool {
        let lane = &mut self.lanes[index];
        let is_end = lane.own.side == Side::Worker && from.number > 0;
        is_end && *lane.heard.get_or_insert(from) != from
    }

    pub(super) fn begin(&mut self, peer: Address, message: &Bytes) -> Option<usize> {
        let header = Header::read(message).ok()?;
        let is_first = header.has(frame::NEW) && header.sequence == 1 && message.len() > frame::HEADER;
        is_first.then(|| self.make(Side::Gateway, peer))
    }

    pub(super) fn reject_unknown_lane(&mut self, own: Address, peer: Address, message: &Bytes) {
        let Ok(header) = Header::read(message) else { return };
        if header.has(frame::RESET) {
            return;
        }
        let is_new = header.has(frame::NEW);
        let worker = if own.side == Side::Worker { own } else { peer };
        if !is_new && !self.over.contains(&(own.side, own.generation, worker)) {
            return self.fail("only closed lanes are rejected", format!("{own} does not know {peer}"));
        }
        let answer = unknown_lane_reply(&header, is_new);
        self.note(|| format!("{own} rejects {peer}: {}", names(answer.flags)));
        let answer = answer.bytes().to_vec().into();
        let process = self.process(own.side);
        if let Some(link) = process.link {
            process.rejected += 1;
            let luck = mix(self.process(own.side).rejected ^ self.setup.luck.rotate_left(7));
            self.post(Packet { from: own, to: peer, cargo: Cargo::Lane(answer), luck }, link);
        }
    }
}
