//! Arbitrary bytes from a client and arbitrary answers from shards: a session never panics, asks
//! only for what lies in the volume, and gives out as many pages as it was lent.
#![no_main]

use heeler_core::event::{Reply, Request, RequestKind, Status};
use heeler_core::ids::{BLOCK_BYTES, BlockRef, PageId, VolumeId};
use heeler_core::session::{Config, Export, ID_BITS, Issue, Next, Out, Session, State};
use libfuzzer_sys::fuzz_target;

const VOLUME_BYTES: u64 = 1 << 20;

fuzz_target!(|data: &[u8]| {
    let mut data = Data(data);
    let mut rig = Rig::new(&mut data);
    while !data.0.is_empty() && rig.session.state() != State::Closed {
        rig.step(&mut data);
    }
    rig.session.handle_hangup();
    while let Some(issue) = rig.asked.pop() {
        rig.answer(&issue.request, Status::Ok, &mut data);
    }
    assert_eq!(rig.session.in_flight(), 0);
});

/// The fuzzer's bytes; zeroes after their end.
struct Data<'a>(&'a [u8]);

impl Data<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn bytes(&mut self, len: usize) -> &[u8] {
        let (head, tail) = self.0.split_at(len.min(self.0.len()));
        self.0 = tail;
        head
    }

    fn number(&mut self) -> u64 {
        self.bytes(8).iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }
}

struct Rig {
    session: Session,
    exports: Vec<Export>,
    rx: Vec<u8>,
    asked: Vec<Issue>,
    /// Payload bytes that went out since this was last zero.
    payload: u64,
}

impl Rig {
    fn new(data: &mut Data<'_>) -> Self {
        let config = Config { requests_max: 4, chunks_max: 5, shards: 3, tx_window_bytes: 1 << 18 };
        let mode = data.byte();
        let export = Export {
            name: "disk".try_into().expect("a short name"),
            volume: VolumeId(1),
            bytes: VOLUME_BYTES,
            object_shift: 16 + mode % 7,
            read_only: mode & 0x40 != 0,
        };
        let session = Session::new(config);
        let (exports, rx, asked) = (vec![export], Vec::new(), Vec::new());
        let mut rig = Self { session, exports, rx, asked, payload: 0 };
        rig.drain();
        // Without help it takes long to find the way into transmission.
        if mode & 0x80 == 0 {
            rig.send(b"\0\0\0\x03");
            if mode & 0x20 == 0 {
                rig.send(b"IHAVEOPT\0\0\0\x08\0\0\0\0");
                rig.send(
                    b"IHAVEOPT\0\0\0\x0a\0\0\0\x1b\0\0\0\0\0\0\0\x01\0\0\0\x0fbase:allocation",
                );
            }
            rig.send(b"IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0\0\0\0\0");
            assert_eq!(rig.session.state(), State::Transmission);
        }
        rig
    }

    fn step(&mut self, data: &mut Data<'_>) {
        match data.byte() % 8 {
            0 | 1 => {
                let len = usize::from(data.byte());
                let bytes = data.bytes(len).to_vec();
                self.send(&bytes);
            }
            2 | 3 => self.request(data),
            4 => self.send(&vec![0; 600 * usize::from(data.byte())]),
            5 | 6 if !self.asked.is_empty() => {
                let issue = self.asked.remove(usize::from(data.byte()) % self.asked.len());
                let status = match data.byte() {
                    0 => Status::Io,
                    1 => Status::Full,
                    2 => Status::Gone,
                    3 => Status::Invalid,
                    _ => Status::Ok,
                };
                self.answer(&issue.request, status, data);
            }
            7 if data.byte() == 0 => {
                self.session.handle_shutdown();
                self.drain();
            }
            _ => self.stray(data),
        }
    }

    /// A request that is nearly right.
    fn request(&mut self, data: &mut Data<'_>) {
        let mut header = vec![0x25, 0x60, 0x95, 0x13, 0, data.byte() & 0x3f, 0, data.byte() % 9];
        header.extend(data.number().to_be_bytes());
        header.extend((data.number() % (VOLUME_BYTES + 2)).to_be_bytes());
        let len = u32::try_from(data.number() >> 32).expect("half a number");
        header.extend((len >> (data.byte() % 32)).to_be_bytes());
        self.send(&header);
    }

    /// A reply that belongs to nothing.
    fn stray(&mut self, data: &mut Data<'_>) {
        let id = data.number();
        if self.asked.iter().all(|issue| issue.request.id >> 16 != id >> 16) {
            let reply = Reply { id, kind: RequestKind::Write, status: Status::Ok, lease: None };
            let strays = self.session.strays();
            self.session.handle_reply(&reply, &[]);
            assert_eq!(self.session.strays(), strays + 1);
            self.drain();
        }
    }

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
                self.ask(issue);
            }
            match taken.next {
                Next::Again => {}
                Next::Payload(issue) if self.rx.len() >= issue.request.len as usize => {
                    self.rx.drain(..issue.request.len as usize);
                    self.ask(issue);
                    self.session.handle_payload(issue.request.len);
                    self.drain();
                }
                _ => return,
            }
        }
    }

    fn ask(&mut self, issue: Issue) {
        let Request { id, kind, object, offset, len, .. } = issue.request;
        assert!(issue.shard.0 < 3 && id >> ID_BITS == 0);
        let shift = self.exports[0].object_shift;
        let end = u64::from(offset) + u64::from(len);
        assert!(end <= 1 << shift && (u64::from(object) << shift) + end <= VOLUME_BYTES);
        assert!(len > 0 || kind == RequestKind::Flush);
        self.asked.push(issue);
    }

    fn answer(&mut self, request: &Request, status: Status, data: &mut Data<'_>) {
        let Request { id, kind, offset, len, .. } = *request;
        let blocks: Vec<BlockRef> = match kind {
            RequestKind::Read if status == Status::Ok => {
                let last = (offset as usize + len as usize - 1) / BLOCK_BYTES;
                let blocks = offset as usize / BLOCK_BYTES..=last;
                let holes = data.byte();
                let page = |block: usize| match holes >> (block % 8) & 1 {
                    0 => PageId(block as u32),
                    _ => PageId::NONE,
                };
                blocks.map(|block| BlockRef { page: page(block), crc: 0 }).collect()
            }
            RequestKind::Status => (0..data.byte() % 33)
                .map(|_| BlockRef { page: PageId(data.byte().into()), crc: data.byte().into() })
                .collect(),
            _ => Vec::new(),
        };
        self.payload = 0;
        self.session.handle_reply(&Reply { id, kind, status, lease: None }, &blocks);
        self.drain();
        assert!(self.payload == 0 || self.payload == u64::from(len));
        self.turn();
    }

    fn drain(&mut self) {
        while let Some(out) = self.session.poll_output() {
            match out {
                Out::Bytes(bytes) => assert!(!bytes.is_empty()),
                Out::Zeroes(len) => self.payload += u64::from(len),
                Out::Page { page, from, to } => {
                    assert!(page.is_some() && from < to && usize::from(to) <= BLOCK_BYTES);
                    self.payload += u64::from(to - from);
                }
            }
        }
    }
}
