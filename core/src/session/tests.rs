//! The session between a client and a cache that take a few lines each.

extern crate std;

use std::vec;
use std::vec::Vec;

use super::*;
use crate::event::{Advice, RequestKind};
use crate::ids::shard_of;

const BLOCK: u64 = BLOCK_BYTES as u64;
const UNIT: u64 = (REQUEST_BLOCKS_MAX * BLOCK_BYTES) as u64;
const SHARDS: u16 = 4;

mod model;
mod states;

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }
}

fn config() -> Config {
    Config { requests_max: 8, chunks_max: 6, shards: SHARDS, tx_window_bytes: 300_000 }
}

fn export(name: &str, volume: u32, bytes: u64, object_shift: u8) -> Export {
    let name = name.try_into().unwrap();
    Export { name, volume: VolumeId(volume), bytes, object_shift, read_only: false }
}

/// What the client sends.
mod client {
    use super::*;

    pub(super) const FLAGS: [u8; 4] = [0, 0, 0, 3];

    pub(super) fn option(option: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = b"IHAVEOPT".to_vec();
        bytes.extend(option.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
        bytes
    }

    /// The data of INFO and GO.
    pub(super) fn query(name: &str, infos: &[u16]) -> Vec<u8> {
        let mut data = (name.len() as u32).to_be_bytes().to_vec();
        data.extend(name.as_bytes());
        data.extend((infos.len() as u16).to_be_bytes());
        infos.iter().for_each(|info| data.extend(info.to_be_bytes()));
        data
    }

    /// The data of the options on metadata contexts.
    pub(super) fn contexts(name: &str, contexts: &[&str]) -> Vec<u8> {
        let mut data = (name.len() as u32).to_be_bytes().to_vec();
        data.extend(name.as_bytes());
        data.extend((contexts.len() as u32).to_be_bytes());
        for context in contexts {
            data.extend((context.len() as u32).to_be_bytes());
            data.extend(context.as_bytes());
        }
        data
    }

    pub(super) fn request(flags: u16, command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
        let mut bytes = vec![0x25, 0x60, 0x95, 0x13];
        bytes.extend(flags.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(len.to_be_bytes());
        bytes
    }
}

/// The volume behind the shards.
struct Disk {
    bytes: Vec<u8>,
    allocated: Vec<bool>,
}

impl Disk {
    fn new(len: u64) -> Self {
        Self { bytes: vec![0; len as usize], allocated: vec![false; len.div_ceil(BLOCK) as usize] }
    }

    fn change(&mut self, at: u64, bytes: &[u8], allocated: bool) {
        let at = at as usize;
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        if !bytes.is_empty() {
            let last = (at + bytes.len() - 1) / BLOCK_BYTES;
            self.allocated[at / BLOCK_BYTES..=last].fill(allocated);
        }
    }
}

/// A session, what was received for it and not taken, what it asked of shards, what it put out.
struct Rig {
    session: Session,
    exports: Vec<Export>,
    rx: Vec<u8>,
    /// Requests without a reply, writes with their bytes.
    asked: Vec<(Issue, Vec<u8>)>,
    wire: Vec<u8>,
    disk: Disk,
    /// What the last reply lent, by page number.
    pages: Vec<Vec<u8>>,
}

impl Rig {
    fn new(config: Config, exports: Vec<Export>) -> Self {
        let disk = Disk::new(exports[0].bytes);
        let session = Session::new(config);
        let (rx, asked, wire, pages) = (vec![], vec![], vec![], vec![]);
        let mut rig = Self { session, exports, rx, asked, wire, disk, pages };
        rig.drain();
        assert_eq!(rig.take_wire(), b"NBDMAGICIHAVEOPT\0\x03");
        rig
    }

    /// In transmission over the first export, with simple replies.
    fn simple(export: Export) -> Self {
        let mut rig = Self::new(config(), vec![export]);
        rig.send(&client::FLAGS);
        rig.send(&client::option(7, &client::query("", &[])));
        rig.take_wire();
        assert_eq!(rig.session.state(), State::Transmission);
        rig
    }

    /// In transmission over the first export, with structured replies and `base:allocation`.
    fn structured(export: Export) -> Self {
        let mut rig = Self::new(config(), vec![export]);
        rig.send(&client::FLAGS);
        rig.send(&client::option(8, &[]));
        rig.send(&client::option(10, &client::contexts("", &["base:allocation"])));
        rig.send(&client::option(7, &client::query("", &[])));
        rig.take_wire();
        assert_eq!(rig.session.state(), State::Transmission);
        rig
    }

    fn take_wire(&mut self) -> Vec<u8> {
        core::mem::take(&mut self.wire)
    }

    fn drain(&mut self) {
        while let Some(out) = self.session.poll_output() {
            match out {
                Out::Bytes(bytes) => self.wire.extend(bytes),
                Out::Zeroes(len) => self.wire.extend(vec![0; len as usize]),
                Out::Page { page, from, to } => {
                    let page = &self.pages[page.0 as usize];
                    self.wire.extend(&page[usize::from(from)..usize::from(to)]);
                }
            }
        }
    }

    /// Receives bytes and does all that can be done without replies.
    fn send(&mut self, bytes: &[u8]) {
        self.rx.extend(bytes);
        self.turn();
    }

    fn turn(&mut self) {
        loop {
            let taken = self.session.handle_bytes(&self.rx, &self.exports);
            self.drain();
            self.rx.drain(..taken.consumed);
            while let Some(issue) = self.session.poll_request() {
                self.ask(issue, Vec::new());
            }
            match taken.next {
                Next::Bytes | Next::Wait | Next::Closed => break,
                Next::Again => {}
                Next::Payload(issue) => {
                    let len = issue.request.len as usize;
                    assert_eq!(issue.payload, Payload::Received);
                    if self.rx.len() < len {
                        break;
                    }
                    let payload = self.rx.drain(..len).collect();
                    self.ask(issue, payload);
                    self.session.handle_payload(issue.request.len);
                    self.drain();
                }
            }
        }
    }

    /// Checks what a shard may rely on.
    fn ask(&mut self, issue: Issue, payload: Vec<u8>) {
        let request = issue.request;
        assert_eq!(request.id >> ID_BITS, 0);
        assert_eq!(request.volume, self.exports[0].volume);
        assert!(self.asked.iter().all(|(other, _)| other.request.id != request.id));
        if request.kind == RequestKind::Flush {
            assert!(issue.shard.0 < SHARDS);
        } else {
            assert_eq!(issue.shard, shard_of(request.volume, request.object, SHARDS));
            let (from, to) = (request.offset, request.offset + request.len);
            assert!(from < to && to <= 1 << self.exports[0].object_shift);
            assert!(self.at(&request) + u64::from(request.len) <= self.exports[0].bytes);
            if matches!(request.kind, RequestKind::Zero | RequestKind::Discard) {
                assert!(from % BLOCK as u32 == 0 && to % BLOCK as u32 == 0);
            } else {
                assert_eq!(from / UNIT as u32, (to - 1) / UNIT as u32);
            }
        }
        assert_eq!(issue.payload != Payload::None, request.kind == RequestKind::Write);
        self.asked.push((issue, payload));
    }

    fn at(&self, request: &Request) -> u64 {
        (u64::from(request.object) << self.exports[0].object_shift) + u64::from(request.offset)
    }

    /// The shard carries out the request at `index` of `asked`, and answers.
    fn reply(&mut self, index: usize) {
        let (issue, payload) = self.asked.remove(index);
        let request = issue.request;
        let at = self.at(&request);
        let zeroes = vec![0; request.len as usize];
        let mut blocks = Vec::new();
        match request.kind {
            RequestKind::Write if issue.payload == Payload::Zeroes => {
                self.disk.change(at, &zeroes, true);
            }
            RequestKind::Write => self.disk.change(at, &payload, true),
            RequestKind::Zero | RequestKind::Discard => self.disk.change(at, &zeroes, false),
            RequestKind::Read => blocks = self.lend(at, request.len),
            RequestKind::Status => blocks = self.extents(at, request.len),
            RequestKind::Flush | RequestKind::Cache => {}
        }
        self.answer(&request, Status::Ok, &blocks);
        // A lease ends when the output is drained: later use of the pages would read this.
        self.pages.iter_mut().for_each(|page| page.fill(0xee));
    }

    fn fail(&mut self, index: usize, status: Status) {
        let (issue, _) = self.asked.remove(index);
        self.answer(&issue.request, status, &[]);
    }

    fn answer(&mut self, request: &Request, status: Status, blocks: &[BlockRef]) {
        let reply = Reply { id: request.id, kind: request.kind, status, lease: None };
        self.session.handle_reply(&reply, blocks);
        self.drain();
        self.turn();
    }

    /// Answers all requests in the order in which they came.
    fn reply_all(&mut self) {
        while !self.asked.is_empty() {
            self.reply(0);
        }
    }

    fn lend(&mut self, at: u64, len: u32) -> Vec<BlockRef> {
        let (first, end) = (at / BLOCK, (at + u64::from(len)).div_ceil(BLOCK));
        self.pages.clear();
        let mut blocks = Vec::new();
        for block in first..end {
            if !self.disk.allocated[block as usize] {
                blocks.push(BlockRef::ZEROES);
                continue;
            }
            let bytes = &self.disk.bytes[(block * BLOCK) as usize..];
            blocks.push(BlockRef { page: PageId(self.pages.len() as u32), crc: 0 });
            self.pages.push(bytes[..BLOCK_BYTES.min(bytes.len())].to_vec());
        }
        blocks
    }

    fn extents(&self, at: u64, len: u32) -> Vec<BlockRef> {
        let blocks = at / BLOCK..(at + u64::from(len)) / BLOCK;
        let kind = |block: u64| u32::from(!self.disk.allocated[block as usize]);
        blocks.map(|block| BlockRef { page: PageId(1), crc: kind(block) }).collect()
    }
}

/// One message of the server, as a client reads it.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Message {
    Simple {
        cookie: u64,
        error: u32,
    },
    Chunk {
        cookie: u64,
        kind: u16,
        done: bool,
        data: Vec<u8>,
    },
    /// An answer to an option.
    Answer {
        option: u32,
        answer: u32,
        data: Vec<u8>,
    },
}

fn number(bytes: &mut &[u8], len: usize) -> u64 {
    let (head, tail) = bytes.split_at(len);
    *bytes = tail;
    head.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Reads the next message. The data of a simple reply is left for the caller.
fn message(bytes: &mut &[u8]) -> Message {
    match number(bytes, 4) {
        0x6744_6698 => {
            let error = number(bytes, 4) as u32;
            Message::Simple { error, cookie: number(bytes, 8) }
        }
        0x668e_33ef => {
            let done = number(bytes, 2) == 1;
            let (kind, cookie) = (number(bytes, 2) as u16, number(bytes, 8));
            let len = number(bytes, 4) as usize;
            let (data, rest) = bytes.split_at(len);
            *bytes = rest;
            Message::Chunk { cookie, kind, done, data: data.to_vec() }
        }
        0x0003_e889 => {
            assert_eq!(number(bytes, 4), 0x0455_65a9);
            let (option, answer) = (number(bytes, 4) as u32, number(bytes, 4) as u32);
            let len = number(bytes, 4) as usize;
            let (data, rest) = bytes.split_at(len);
            *bytes = rest;
            Message::Answer { option, answer, data: data.to_vec() }
        }
        other => panic!("no message starts with {other:#x}"),
    }
}

fn messages(mut bytes: &[u8]) -> Vec<Message> {
    let mut messages = Vec::new();
    while !bytes.is_empty() {
        messages.push(message(&mut bytes));
    }
    messages
}
