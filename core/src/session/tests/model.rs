//! Random requests, received in random pieces and answered in random order, against a model of the
//! volume.

use super::*;

/// What one request in flight must be answered with.
struct Expected {
    cookie: u64,
    error: u32,
    /// Of a read: where and what.
    read: Option<(u64, Vec<u8>)>,
    /// Of a status query: where and at most how much.
    status: Option<(u64, u32)>,
    /// Bytes of a structured read seen so far.
    seen: Vec<bool>,
}

struct Model {
    rng: Rng,
    rig: Rig,
    structured: bool,
    /// What the volume must hold once all requests sent were carried out.
    disk: Disk,
    cookie: u64,
    expected: Vec<Expected>,
    unread: Vec<u8>,
}

impl Model {
    fn new(seed: u64) -> Self {
        let mut rng = Rng(seed);
        let shift = 16 + rng.below(4) as u8;
        let bytes = (1 + rng.below(4)) << 18;
        let export = export("disk", 3, bytes, shift);
        let structured = rng.chance(2);
        let rig = if structured { Rig::structured(export) } else { Rig::simple(export) };
        let disk = Disk::new(bytes);
        Self { rng, rig, structured, disk, cookie: 0, expected: vec![], unread: vec![] }
    }

    /// Some requests over ranges that do not touch the same blocks, so that their order means
    /// nothing. Returns the bytes that the client sends.
    fn batch(&mut self) -> Vec<u8> {
        let mut sent = Vec::new();
        let mut at = 0;
        let size = self.rig.exports[0].bytes;
        while self.expected.len() < 12 {
            let from = at + self.rng.below(20) * BLOCK + self.rng.below(3) * self.rng.below(BLOCK);
            let len = match self.rng.below(3) {
                0 => 1 + self.rng.below(2 * BLOCK),
                1 => BLOCK * (1 + self.rng.below(16)),
                _ => 1 + self.rng.below(3 * UNIT),
            };
            let to = (from + len).min(size);
            if from >= to {
                break;
            }
            at = to.next_multiple_of(BLOCK);
            sent.extend(self.request(from, (to - from) as u32));
            if self.rng.chance(8) {
                sent.extend(self.odd_request(size));
            }
        }
        sent
    }

    fn expect(&mut self, error: u32) -> u64 {
        self.cookie += 1;
        let (cookie, seen) = (self.cookie, Vec::new());
        self.expected.push(Expected { cookie, error, read: None, status: None, seen });
        cookie
    }

    fn request(&mut self, from: u64, len: u32) -> Vec<u8> {
        let cookie = self.expect(0);
        let range = from as usize..from as usize + len as usize;
        let fua = if self.rng.chance(4) { flag::FUA } else { 0 };
        let zeroes = vec![0; len as usize];
        match self.rng.below(if self.structured { 7 } else { 6 }) {
            0 | 1 => {
                let bytes = self.disk.bytes[range].to_vec();
                let expected = self.expected.last_mut().unwrap();
                expected.seen = vec![false; bytes.len()];
                expected.read = Some((from, bytes));
                let df = if self.structured && self.rng.chance(3) { flag::DF } else { 0 };
                client::request(df, command::READ, cookie, from, len)
            }
            2 => {
                let payload: Vec<u8> = range.map(|_| 1 + self.rng.below(255) as u8).collect();
                self.disk.change(from, &payload, true);
                let header = client::request(fua, command::WRITE, cookie, from, len);
                [header, payload].concat()
            }
            3 => {
                let allocate = self.rng.chance(2);
                self.disk.change(from, &zeroes, true);
                if !allocate {
                    self.punch(from, len);
                }
                let flags = fua | if allocate { flag::NO_HOLE } else { flag::FAST_ZERO };
                client::request(flags, command::WRITE_ZEROES, cookie, from, len)
            }
            4 => {
                self.punch(from, len);
                client::request(fua, command::TRIM, cookie, from, len)
            }
            5 => client::request(0, command::CACHE, cookie, from, len),
            _ => {
                self.expected.last_mut().unwrap().status = Some((from, len));
                let one = if self.rng.chance(3) { flag::REQ_ONE } else { 0 };
                client::request(one, command::BLOCK_STATUS, cookie, from, len)
            }
        }
    }

    /// A request that touches no block: a flush, or one that is refused.
    fn odd_request(&mut self, size: u64) -> Vec<u8> {
        match self.rng.below(3) {
            0 => {
                let cookie = self.expect(0);
                client::request(0, command::FLUSH, cookie, 0, 0)
            }
            1 => {
                let cookie = self.expect(errno::EINVAL);
                client::request(0, command::READ, cookie, size - 1, 2)
            }
            _ => {
                let cookie = self.expect(errno::ENOSPC);
                let len = 1 + self.rng.below(2 * UNIT) as u32;
                let header = client::request(0, command::WRITE, cookie, size, len);
                [header, vec![0xaa; len as usize]].concat()
            }
        }
    }

    /// The blocks wholly inside become a hole.
    fn punch(&mut self, from: u64, len: u32) {
        let first = from.next_multiple_of(BLOCK);
        let end = (from + u64::from(len)) / BLOCK * BLOCK;
        if first < end {
            self.disk.change(first, &vec![0; (end - first) as usize], false);
        }
    }

    /// Sends in pieces, answers in any order, until all is answered.
    fn run(&mut self, sent: &[u8]) {
        let mut sent = sent;
        while !(sent.is_empty() && self.rig.asked.is_empty()) {
            let asked = self.rig.asked.len() as u64;
            if !sent.is_empty() && (asked == 0 || self.rng.chance(2)) {
                let len = match self.rng.below(3) {
                    0 => 1 + self.rng.below(40),
                    1 => 1 + self.rng.below(5000),
                    _ => 1 + self.rng.below(200_000),
                };
                let (piece, rest) = sent.split_at(sent.len().min(len as usize));
                sent = rest;
                self.rig.send(piece);
            } else {
                let index = self.rng.below(asked) as usize;
                self.rig.reply(index);
            }
            let wire = self.rig.take_wire();
            self.unread.extend(wire);
        }
        let wire = core::mem::take(&mut self.unread);
        self.check(&mut wire.as_slice());
        assert!(self.expected.is_empty(), "every request is answered");
        assert!(self.rig.disk.bytes == self.disk.bytes, "the volume holds what was written");
        assert!(self.rig.disk.allocated == self.disk.allocated, "holes are where they belong");
        assert_eq!((self.rig.session.in_flight(), self.rig.session.reserved_bytes), (0, 0));
        assert!(self.rig.session.ops.is_empty());
    }

    fn check(&mut self, wire: &mut &[u8]) {
        while !wire.is_empty() {
            match message(wire) {
                Message::Simple { cookie, error } => {
                    let expected = self.take_expected(cookie, true);
                    assert_eq!(error, expected.error);
                    if let Some((_, bytes)) = expected.read {
                        let (data, rest) = wire.split_at(bytes.len());
                        assert!(data == bytes, "what is read is what was written");
                        *wire = rest;
                    }
                }
                Message::Chunk { cookie, kind, done, data } => {
                    let expected = self.take_expected(cookie, done);
                    let expected = self.check_chunk(expected, kind, done, &data);
                    if !done {
                        self.expected.push(expected);
                    }
                }
                other => panic!("{other:?} in transmission"),
            }
        }
    }

    fn take_expected(&mut self, cookie: u64, done: bool) -> Expected {
        let at = self.expected.iter().position(|expected| expected.cookie == cookie);
        let expected = self.expected.remove(at.expect("an answer to a request in flight"));
        assert!(done || expected.read.is_some());
        expected
    }

    fn check_chunk(&self, mut expected: Expected, kind: u16, done: bool, data: &[u8]) -> Expected {
        let mut data = data;
        match kind {
            chunk::ERROR => {
                assert_eq!(number(&mut data, 4), u64::from(expected.error));
                assert_ne!(expected.error, 0);
            }
            chunk::BLOCK_STATUS => {
                assert_eq!(number(&mut data, 4), u64::from(BASE_ALLOCATION_ID));
                let (from, len) = expected.status.expect("a status query");
                self.check_extents(from, len, data);
            }
            chunk::OFFSET_DATA | chunk::OFFSET_HOLE => {
                let (from, bytes) = expected.read.as_ref().expect("a read");
                let start = (number(&mut data, 8) - from) as usize;
                let hole = kind == chunk::OFFSET_HOLE;
                let len = if hole { number(&mut data, 4) as usize } else { data.len() };
                let zeroes = vec![0; len];
                let got = if hole { zeroes.as_slice() } else { data };
                assert!(bytes[start..start + len] == *got, "what is read is what was written");
                assert!(!expected.seen[start..start + len].contains(&true), "bytes come once");
                expected.seen[start..start + len].fill(true);
                assert_eq!(done, !expected.seen.contains(&false), "the last chunk says so");
            }
            other => panic!("chunk of kind {other}"),
        }
        expected
    }

    fn check_extents(&self, from: u64, len: u32, mut data: &[u8]) {
        let mut at = from;
        assert!(!data.is_empty());
        while !data.is_empty() {
            let (extent, state) = (number(&mut data, 4), number(&mut data, 4));
            assert!(extent > 0);
            for block in at / BLOCK..(at + extent).div_ceil(BLOCK) {
                let allocated = self.disk.allocated[block as usize];
                assert_eq!(state, if allocated { 0 } else { 3 }, "block {block}");
            }
            at += extent;
        }
        assert!(at <= from + u64::from(len));
    }
}

#[test]
fn random_requests_agree_with_the_model() {
    for seed in 0..if cfg!(miri) { 1 } else { 150 } {
        std::eprintln!("seed {seed}");
        let mut model = Model::new(seed);
        for _ in 0..6 {
            let sent = model.batch();
            model.run(&sent);
        }
    }
}

#[test]
fn random_bytes_never_panic() {
    for seed in 0..if cfg!(miri) { 10 } else { 3000 } {
        let mut rng = Rng(seed);
        let export = export("disk", 3, 1 << 20, 16 + rng.below(7) as u8);
        let mut rig = match rng.below(3) {
            0 => Rig::new(config(), vec![export]),
            1 => Rig::simple(export),
            _ => Rig::structured(export),
        };
        for _ in 0..rng.below(30) {
            let mut bytes = match rng.below(4) {
                0 => client::option(rng.below(13) as u32, &rng.next().to_be_bytes()),
                1 => client::option(rng.below(13) as u32, &client::query("disk", &[1, 2])),
                _ => {
                    let (flags, command) = (1 << rng.below(16), rng.below(9) as u16);
                    let len = rng.next() as u32 >> rng.below(32);
                    client::request(flags, command, 1, rng.below(1 << 20), len)
                }
            };
            if rng.chance(10) {
                let at = rng.below(bytes.len() as u64) as usize;
                bytes[at] ^= 1 << rng.below(8);
            }
            rig.send(&bytes);
            if !rig.asked.is_empty() && rng.chance(2) {
                let index = rng.below(rig.asked.len() as u64) as usize;
                if rng.chance(4) {
                    rig.fail(index, Status::Io);
                } else {
                    rig.reply(index);
                }
            }
            if rng.chance(50) {
                rig.session.handle_shutdown();
                rig.drain();
            }
        }
        rig.session.handle_hangup();
        rig.reply_all();
        assert_eq!(rig.session.in_flight(), 0);
    }
}
