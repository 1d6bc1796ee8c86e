mod handover;

use std::cell::RefCell;
use std::rc::Rc;

use heeler_core::block_set::BlockSet;
use heeler_core::event::PushRun;
use heeler_core::ids::BLOCK_BYTES;
use heeler_core::limits::{BATCH_BLOCKS_MAX, PACK_BLOCKS_MAX};
use heeler_core::time::Duration;
use heeler_core::wire::head::Head;
use heeler_core::wire::log::{Entry, FooterEntry};
use heeler_core::wire::names;
use heeler_core::wire::superblock::{Superblock, VolumeRow};

use super::*;
use crate::start::Plan;
use crate::wires::{CoreWires, wire};

const UUID: Uuid = Uuid([7; 16]);
const SHARDS: u16 = 3;
const CORES: usize = 2;

#[derive(Debug, Default)]
struct Objects {
    objects: BTreeMap<String, Vec<u8>>,
    /// The store cannot be reached.
    down: bool,
    /// Requests stay unanswered.
    held: bool,
    /// So many answers are left to give, if they are counted.
    answers: Option<u32>,
}

#[derive(Clone, Debug, Default)]
struct MemoryStore(Rc<RefCell<Objects>>, VecDeque<(Token, StoreAnswer)>);

impl MemoryStore {
    fn answer(&mut self, token: Token, f: impl FnOnce(&mut Objects) -> StoreAnswer) {
        let mut objects = self.0.borrow_mut();
        let answer = if objects.down {
            StoreAnswer::Failed { transient: true, text: "the wire is cut".into() }
        } else {
            f(&mut objects)
        };
        self.1.push_back((token, answer));
    }
}

impl StoreIo for MemoryStore {
    fn get(&mut self, token: Token, key: &str, range: Option<Range<u64>>) {
        self.answer(token, |store| match store.objects.get(key) {
            Some(bytes) => {
                let range = range.unwrap_or(0..bytes.len() as u64);
                let range = range.start as usize..range.end as usize;
                StoreAnswer::Got(Bytes::copy_from_slice(&bytes[range]))
            }
            None => StoreAnswer::NotFound,
        });
    }

    fn put(&mut self, token: Token, key: &str, pieces: Vec<Bytes>, create: bool) {
        self.answer(token, |store| {
            if create && store.objects.contains_key(key) {
                return StoreAnswer::AlreadyExists;
            }
            store.objects.insert(key.into(), pieces.concat());
            StoreAnswer::Done
        });
    }

    fn delete(&mut self, token: Token, key: &str) {
        self.answer(token, |store| {
            store.objects.remove(key);
            StoreAnswer::Done
        });
    }

    fn list(&mut self, token: Token, prefix: &str) {
        self.answer(token, |store| {
            let found = store.objects.iter().filter(|(key, _)| key.starts_with(prefix));
            let object = |(key, bytes): (&String, &Vec<u8>)| StoredObject {
                key: key.clone(),
                bytes: bytes.len() as u64,
            };
            StoreAnswer::Listed(found.map(object).collect())
        });
    }

    fn poll(&mut self) -> Option<(Token, StoreAnswer)> {
        let mut objects = self.0.borrow_mut();
        if objects.held || objects.answers == Some(0) || self.1.is_empty() {
            return None;
        }
        objects.answers = objects.answers.map(|left| left - 1);
        self.1.pop_front()
    }
}

/// A table that survives the control loop; `false`: the device is broken.
#[derive(Clone, Debug)]
struct MemoryTable(Rc<RefCell<(VolumeTable, bool)>>);

impl TableIo for MemoryTable {
    fn save(&mut self, table: &VolumeTable) -> Result<(), String> {
        let mut disk = self.0.borrow_mut();
        if !disk.1 {
            return Err("the device is broken".into());
        }
        assert!(table.generation > disk.0.generation);
        disk.0 = table.clone();
        Ok(())
    }
}

/// A control loop, its disk and store, and the cores' ends of its mailboxes.
struct Rig {
    control: Control<MemoryStore, MemoryTable>,
    store: Rc<RefCell<Objects>>,
    table: Rc<RefCell<(VolumeTable, bool)>>,
    cores: Vec<CoreWires>,
    now: Instant,
}

fn rig() -> Rig {
    let store = Rc::new(RefCell::new(Objects::default()));
    let head = Head::first(UUID, "disk0", 4096, 22, 5);
    let key = names::head_key(UUID, 1);
    store.borrow_mut().objects.insert(key, head.encode(crc32c));
    let table = Rc::new(RefCell::new((VolumeTable::default(), true)));
    boot(store, table, 1, BTreeMap::new())
}

fn boot(
    store: Rc<RefCell<Objects>>,
    table: Rc<RefCell<(VolumeTable, bool)>>,
    seed: u8,
    logged: BTreeMap<VolumeId, Logged>,
) -> Rig {
    let (cores, wires) = wire(CORES, false).expect("mailboxes");
    let mut count = 0;
    let random = move || {
        count += 1;
        std::array::from_fn(|i| seed.wrapping_mul(31).wrapping_add(count + i as u8))
    };
    let setup = Setup {
        cache: Uuid([seed; 16]),
        shards: SHARDS,
        host: format!("host{seed}"),
        clock: (Instant(0), 1000),
        random: Box::new(random),
        table: table.borrow().0.clone(),
        logged,
        memory: memory(),
        push_after: Duration::from_secs(5),
        cores: wires.links,
    };
    let io = MemoryStore(store.clone(), VecDeque::new());
    let control = Control::new(setup, io, MemoryTable(table.clone()));
    Rig { control, store, table, cores, now: Instant(0) }
}

/// The memory of a cache as small as can be.
fn memory() -> Memory {
    let superblock = Superblock::layout([1; 16], SHARDS, Superblock::bytes_min(SHARDS)).unwrap();
    let needed = Plan::new(&superblock, CORES as u16, 0, 1 << 30, &[]).unwrap_err();
    let (plan, lending) = Plan::new(&superblock, CORES as u16, needed, 1 << 30, &[]).unwrap();
    let arena = plan.arena().unwrap();
    let batch_bytes = plan.batch_bytes() * CORES;
    Memory { lending, arena, fetch_bytes: plan.fetch_bytes(), batch_bytes }
}

impl Rig {
    /// Turns until nothing is due now.
    fn turn(&mut self) {
        for _ in 0..1000 {
            if self.control.turn(self.now).is_none_or(|due| due > self.now)
                && self.control.store.1.is_empty()
            {
                return;
            }
            if self.store.borrow().held {
                return;
            }
        }
        panic!("the loop does not come to rest");
    }

    fn after(&mut self, span: Duration) {
        self.now = self.now + span;
        self.turn();
    }

    fn mail_of(&mut self, core: usize) -> Vec<FromControl> {
        std::iter::from_fn(|| self.cores[core].from_control.pop().ok()).collect()
    }

    fn send(&mut self, core: usize, mail: ToControl) {
        self.cores[core].to_control.0.push(mail).expect("room");
    }

    fn keeper_mail(&mut self, shard: u16, mail: ToKeeper) {
        let mail = ToControl::Keeper { shard: ShardId(shard), mail };
        self.send(usize::from(shard) % CORES, mail);
    }

    fn events(&mut self) -> Vec<Event> {
        std::iter::from_fn(|| self.control.poll_event()).collect()
    }

    /// Answers all questions for reports in `mail`.
    fn answer_reports(&mut self, core: usize, mail: &[FromControl]) {
        for mail in mail {
            if let FromControl::Report { ticket } = mail {
                let core_id = CoreId(core as u16);
                let status = CoreStatus::default();
                self.send(core, ToControl::Status { ticket: *ticket, core: core_id, status });
            }
        }
    }

    /// Claims the volume and introduces it.
    fn serve(&mut self, takeover: bool) -> VolumeId {
        self.control.add_volume(self.now, UUID, "disk0", takeover);
        self.turn();
        for core in 0..CORES {
            let mail = self.mail_of(core);
            self.answer_reports(core, &mail);
        }
        self.turn();
        assert!(matches!(&self.events()[..], [Event::Served { name }] if name == "disk0"));
        (0..CORES).for_each(|core| _ = self.mail_of(core));
        self.control.volumes()[0].number
    }

    fn row(&self) -> VolumeRow {
        let table = &self.table.borrow().0;
        *table.rows.iter().find(|row| row.uuid == UUID.0).expect("a row")
    }

    fn newest_head(&self) -> Head {
        let store = self.store.borrow();
        let prefix = names::head_prefix(UUID);
        let newest = store.objects.iter().rfind(|(key, _)| key.starts_with(&prefix));
        let (key, bytes) = newest.expect("a head");
        let number = key[prefix.len()..].parse().expect("a number");
        Head::decode(bytes, UUID, number, crc32c).expect("a sound head")
    }

    /// Plays the shards in one push: shard 0 has `blocks` of object 0, the others nothing.
    fn push(&mut self, volume: VolumeId, blocks: &[[u8; BLOCK_BYTES]]) {
        self.turn();
        let mut closed = None;
        for core in 0..CORES {
            for mail in self.mail_of(core) {
                if let FromControl::Shard { shard, mail: ToShard::Freeze { next, .. } } = mail {
                    let epoch = Epoch(next.0 - 1);
                    closed = Some(epoch);
                    let blocks = if shard.0 == 0 { blocks.len() as u64 } else { 0 };
                    self.keeper_mail(shard.0, ToKeeper::Frozen { volume, epoch, blocks });
                }
            }
        }
        let epoch = closed.expect("a push began");
        self.turn();
        if !blocks.is_empty() {
            let count = blocks.len() as u16;
            self.send(
                0,
                ToControl::Batch {
                    shard: ShardId(0),
                    volume,
                    epoch,
                    runs: vec![PushRun { object: 0, first: 3, count, zero: false }],
                    crcs: blocks.iter().map(|block| crc32c(0, block)).collect(),
                    bytes: blocks.concat(),
                },
            );
        }
        (0..SHARDS).for_each(|shard| self.keeper_mail(shard, ToKeeper::Pushed { volume, epoch }));
        self.turn();
    }

    fn fetch(&mut self, volume: VolumeId, first: u16, count: u16) {
        let op = OpId { slot: 9, generation: 1 };
        let shard = ShardId(0);
        let (object, gaps) = (0, BlockSet::EMPTY);
        self.send(0, ToControl::Fetch { shard, op, volume, object, first, count, gaps });
        self.turn();
    }
}

/// The one answer to a fetch among mail.
fn fetched(mail: Vec<FromControl>) -> Option<Vec<(u16, Vec<u8>)>> {
    let mut answers = mail.into_iter().filter_map(|mail| match mail {
        FromControl::Fetched { shard: ShardId(0), op: OpId { slot: 9, .. }, pieces } => {
            Some(pieces)
        }
        _ => None,
    });
    let answer = answers.next().expect("an answer");
    assert!(answers.next().is_none(), "one answer");
    let mut pieces: Vec<_> =
        answer?.into_iter().map(|piece| (piece.at, piece.bytes.to_vec())).collect();
    pieces.sort();
    Some(pieces)
}

fn forgotten(mail: &[FromControl]) -> Vec<(ShardId, VolumeId)> {
    let forget = mail.iter().filter_map(|mail| match mail {
        FromControl::Shard { shard, mail: ToShard::Forget { volume } } => Some((*shard, *volume)),
        _ => None,
    });
    forget.collect()
}

#[test]
fn a_volume_is_served_when_every_core_has_heard_of_it() {
    let mut rig = rig();
    rig.control.add_volume(rig.now, UUID, "disk0", false);
    rig.turn();
    assert_eq!(rig.row().pending, [0; 16]);
    assert_eq!(rig.row().nonce, rig.newest_head().nonce.0);
    assert!(!rig.newest_head().released && !rig.row().released);
    for core in 0..CORES {
        let mail = rig.mail_of(core);
        let attached: Vec<u16> = mail
            .iter()
            .filter_map(|mail| match mail {
                FromControl::Shard { shard, mail: ToShard::Attach { blocks: 4096, .. } } => {
                    Some(shard.0)
                }
                _ => None,
            })
            .collect();
        assert_eq!(attached, if core == 0 { vec![0, 2] } else { vec![1] });
        assert!(matches!(mail.last(), Some(FromControl::Report { .. })));
        assert!(rig.events().is_empty());
        rig.answer_reports(core, &mail);
        rig.turn();
    }
    assert!(matches!(&rig.events()[..], [Event::Served { .. }]));
    for core in 0..CORES {
        let mail = rig.mail_of(core);
        let [FromControl::Exports(exports)] = &mail[..] else { panic!("{mail:?}") };
        assert_eq!((exports[0].name.as_str(), exports[0].bytes), ("disk0", 16 << 20));
    }
    assert_eq!(rig.control.volumes()[0].state, "served");
}

#[test]
fn what_is_pushed_can_be_fetched_and_damage_is_not_handed_on() {
    let mut rig = rig();
    let volume = rig.serve(false);
    let blocks = [[1; BLOCK_BYTES], [2; BLOCK_BYTES]];
    let ticket = rig.control.push(rig.now, UUID).expect("a volume");
    rig.push(volume, &blocks);
    let done = rig.events();
    assert!(matches!(&done[..], [Event::Pushed { ticket: t, committed: true }] if *t == ticket));
    let committed = (0..CORES)
        .flat_map(|core| rig.mail_of(core))
        .filter(|mail| matches!(mail, FromControl::Shard { mail: ToShard::Committed { .. }, .. }));
    assert_eq!(committed.count(), usize::from(SHARDS));
    assert!(rig.control.batches.is_empty(), "batches go when they are stored");

    rig.fetch(volume, 2, 4);
    let pieces = fetched(rig.mail_of(0)).expect("readable");
    assert_eq!(pieces, [(1, blocks.concat())]);
    rig.fetch(volume, 100, 4);
    assert_eq!(fetched(rig.mail_of(0)), Some(vec![]));

    let pack = names::pack_key(UUID, rig.newest_head().epoch, 0);
    let damage = |store: &mut Objects| {
        *store.objects.get_mut(&pack).expect("a pack").last_mut().expect("bytes") ^= 1;
    };
    damage(&mut rig.store.borrow_mut());
    rig.fetch(volume, 2, 4);
    assert!(rig.mail_of(0).is_empty(), "tried again first");
    (0..3).for_each(|_| rig.after(Duration::from_secs(1)));
    assert_eq!(fetched(rig.mail_of(0)), None);
    rig.fetch(volume, 3, 1);
    assert_eq!(fetched(rig.mail_of(0)).expect("sound"), [(0, blocks[0].to_vec())]);
}

#[test]
fn a_fetch_outlasts_an_outage_but_not_for_ever() {
    let mut rig = rig();
    let volume = rig.serve(false);
    rig.control.push(rig.now, UUID);
    rig.push(volume, &[[5; BLOCK_BYTES]]);
    (0..CORES).for_each(|core| _ = rig.mail_of(core));
    rig.store.borrow_mut().down = true;
    rig.fetch(volume, 3, 1);
    (0..20).for_each(|_| rig.after(Duration::from_secs(1)));
    assert!(rig.mail_of(0).is_empty());
    rig.store.borrow_mut().down = false;
    rig.after(Duration::from_secs(1));
    assert_eq!(fetched(rig.mail_of(0)).expect("back again"), [(0, vec![5; BLOCK_BYTES])]);
    rig.store.borrow_mut().down = true;
    rig.fetch(volume, 3, 1);
    (0..70).for_each(|_| rig.after(Duration::from_secs(1)));
    assert_eq!(fetched(rig.mail_of(0)), None);
}

/// A fetch was planned, and before it could read, the pack was rewritten and deleted: what a client
/// asked for would have been an I/O error.
#[test]
fn a_fetch_whose_pack_has_gone_is_planned_again() {
    let mut rig = rig();
    let volume = rig.serve(false);
    rig.control.push(rig.now, UUID);
    rig.push(volume, &[[5; BLOCK_BYTES]]);
    let pack = rig.newest_head().tail[0];
    rig.store.borrow_mut().down = true;
    rig.fetch(volume, 3, 1);
    rig.store.borrow_mut().down = false;
    rig.control.push(rig.now, UUID);
    rig.push(volume, &[[6; BLOCK_BYTES]]);
    (0..CORES).for_each(|core| _ = rig.mail_of(core));
    let key = names::pack_key(UUID, pack.epoch, pack.n);
    assert!(rig.store.borrow_mut().objects.remove(&key).is_some());
    rig.after(Duration::from_secs(1));
    assert_eq!(fetched(rig.mail_of(0)).expect("found"), [(0, vec![6; BLOCK_BYTES])]);
    // What is nowhere is an error, and not tried for ever.
    let pack = rig.newest_head().tail[1];
    let key = names::pack_key(UUID, pack.epoch, pack.n);
    assert!(rig.store.borrow_mut().objects.remove(&key).is_some());
    rig.fetch(volume, 3, 1);
    assert_eq!(fetched(rig.mail_of(0)), None);
}

#[test]
fn a_core_that_does_not_read_loses_nothing() {
    let mut rig = rig();
    let volume = rig.serve(false);
    let op = |n: u32| OpId { slot: n, generation: 1 };
    let mut got = Vec::new();
    for n in 0..1000 {
        let mail = ToControl::Fetch {
            shard: ShardId(0),
            op: op(n),
            volume,
            object: 0,
            first: 0,
            count: 1,
            gaps: BlockSet::EMPTY,
        };
        rig.send(0, mail);
        rig.control.turn(rig.now);
    }
    assert!(!rig.control.links.is_drained());
    while got.len() < 1000 {
        let mail = rig.mail_of(0);
        assert!(!mail.is_empty());
        got.extend(mail.into_iter().map(|mail| match mail {
            FromControl::Fetched { op, .. } => op.slot,
            other => panic!("{other:?}"),
        }));
        rig.turn();
    }
    assert_eq!(got, (0..1000).collect::<Vec<_>>());
}

#[test]
fn a_drain_pushes_releases_and_stops() {
    let mut rig = rig();
    let volume = rig.serve(false);
    rig.keeper_mail(0, ToKeeper::Dirtied { volume });
    rig.control.drain();
    rig.turn();
    for core in 0..CORES {
        assert!(matches!(rig.mail_of(core)[..], [FromControl::Drain]));
        assert!(rig.events().is_empty());
        rig.send(core, ToControl::Drained(CoreId(core as u16)));
        rig.turn();
    }
    rig.push(volume, &[[9; BLOCK_BYTES]]);
    assert!(rig.newest_head().released && rig.row().released);
    assert!(rig.newest_head().tail.len() == 1, "the last push is in the released head");
    assert!(matches!(rig.events().last(), Some(Event::Stopped)));
    for core in 0..CORES {
        assert!(matches!(rig.mail_of(core).last(), Some(FromControl::Stop)));
    }

    // The same cache comes back and keeps what it has.
    let mut again = boot(rig.store, rig.table, 1, BTreeMap::new());
    assert_eq!(again.serve(false), volume);
}

#[test]
fn a_claim_cut_short_is_known_again() {
    let mut rig = rig();
    let volume = rig.serve(false);
    let (store, table) = (rig.store, rig.table);
    // Killed just after the head's creation, or just before it, again and again.
    for seed in 2..8 {
        let mut cut = boot(store.clone(), table.clone(), seed, BTreeMap::new());
        store.borrow_mut().answers = Some(1);
        cut.control.add_volume(cut.now, UUID, "disk0", false);
        // What was asked outside of a turn goes out in the next one.
        _ = cut.control.turn(cut.now);
        _ = cut.control.turn(cut.now);
        store.borrow_mut().answers = Some(1);
        store.borrow_mut().down = seed % 2 == 0;
        _ = cut.control.turn(cut.now);
        assert_ne!(cut.row().pending, [0; 16]);
        assert_eq!(cut.newest_head().nonce.0 == cut.row().pending, seed > 2);
        assert_eq!(cut.row().number, volume);
        (store.borrow_mut().down, store.borrow_mut().answers) = (false, None);
    }
    let mut last = boot(store, table, 9, BTreeMap::new());
    assert_eq!(last.serve(false), volume, "contents are kept");
}

#[test]
fn a_second_server_is_refused_or_takes_over_and_fences() {
    let mut first = rig();
    let volume = first.serve(false);
    let table = Rc::new(RefCell::new((VolumeTable::default(), true)));
    let mut second = boot(first.store.clone(), table.clone(), 2, BTreeMap::new());
    second.control.add_volume(second.now, UUID, "disk0", false);
    second.turn();
    let events = second.events();
    let [Event::Refused { reason, .. }] = &events[..] else { panic!("{events:?}") };
    assert!(reason.contains("host1") && reason.contains("--takeover"), "{reason}");
    assert_eq!(second.control.volumes()[0].state, "refused");

    let mut second = boot(first.store.clone(), table, 2, BTreeMap::new());
    second.serve(true);
    first.control.push(first.now, UUID);
    first.push(volume, &[[1; BLOCK_BYTES]]);
    assert_eq!(first.control.volumes()[0].state, "fenced");
    assert_eq!(second.newest_head().host, "host2");
    let last = first.mail_of(0).pop();
    assert!(matches!(last, Some(FromControl::Exports(exports)) if exports.is_empty()));

    // Back with dirty blocks in its log: refused, until they are given up.
    let logged = BTreeMap::from([(volume, Logged { dirty_blocks: 3, epoch: Epoch(1 << 33) })]);
    let mut back = boot(first.store.clone(), first.table.clone(), 1, logged);
    back.control.add_volume(back.now, UUID, "disk0", false);
    back.turn();
    let status = back.control.volumes().remove(0);
    let reason = status.reason.expect("refused");
    assert!(reason.contains("12288 dirty bytes") && reason.contains("purge --force"), "{reason}");
    assert_eq!(back.control.stranded_blocks(), 3);
    assert_eq!(forgotten(&back.mail_of(0)), []);
    let purged = back.control.purge(back.now, true).expect("purges");
    assert_eq!(purged.stranded_blocks, 3);
    back.turn();
    let mail = back.mail_of(0);
    assert_eq!(forgotten(&mail), [(ShardId(0), volume), (ShardId(2), volume)]);
    assert!(back.row().number != volume && back.control.stranded_blocks() == 0);
    let reason = back.control.volumes().remove(0).reason.expect("still the other's");
    assert!(reason.contains("owned by host2"), "{reason}");
}

#[test]
fn numbers_without_a_row_are_forgotten() {
    let first = rig();
    let logged = BTreeMap::from([(VolumeId(5), Logged::default())]);
    let mut rig = boot(first.store, first.table, 1, logged);
    rig.turn();
    assert_eq!(forgotten(&rig.mail_of(1)), [(ShardId(1), VolumeId(5))]);
}

#[test]
fn what_the_log_forgot_is_not_counted() {
    let entry = |seq, volume, kind, epoch| LogEntry {
        at: FooterEntry {
            entry: Entry {
                volume: VolumeId(volume),
                object: 0,
                first: 0,
                count: 2,
                kind,
                epoch: Epoch(epoch),
            },
            page: 1,
            seq,
        },
        crc: 0,
    };
    let mut found = BTreeMap::from([(VolumeId(1), Logged { dirty_blocks: 1, epoch: Epoch(3) })]);
    Logged::add(
        &mut found,
        &[
            entry(9, 2, EntryKind::Forget, 0),
            entry(1, 1, EntryKind::Dirty, 7),
            entry(2, 1, EntryKind::Clean, 8),
            entry(3, 1, EntryKind::Kept, 9),
            entry(8, 2, EntryKind::Dirty, 7),
        ],
    );
    let logged = Logged { dirty_blocks: 3, epoch: Epoch(8) };
    assert_eq!(found, BTreeMap::from([(VolumeId(1), logged)]));
}

#[test]
fn a_table_that_cannot_be_written_claims_nothing() {
    let mut rig = rig();
    rig.table.borrow_mut().1 = false;
    rig.control.add_volume(rig.now, UUID, "disk0", false);
    rig.turn();
    let status = rig.control.volumes().remove(0);
    assert_eq!(status.state, "refused");
    assert!(status.reason.expect("why").contains("the device is broken"));
    assert!(rig.newest_head().released && rig.newest_head().number == 1);
    rig.control.drain();
    (0..CORES).for_each(|core| rig.send(core, ToControl::Drained(CoreId(core as u16))));
    rig.turn();
    assert!(matches!(rig.events().last(), Some(Event::Stopped)));
}

#[test]
fn a_volume_appears_when_the_store_answers() {
    let mut rig = rig();
    rig.store.borrow_mut().down = true;
    rig.control.add_volume(rig.now, UUID, "disk0", false);
    (0..60).for_each(|_| rig.after(Duration::from_secs(1)));
    let status = rig.control.volumes().remove(0);
    assert_eq!(status.state, "starting");
    assert_eq!(status.last_failure.as_deref(), Some("list heads: the wire is cut"));
    rig.store.borrow_mut().down = false;
    (0..20).for_each(|_| rig.after(Duration::from_secs(1)));
    assert!(rig.control.volumes()[0].blocks > 0);
}

#[test]
fn a_deletion_waits_for_what_is_on_its_way() {
    let mut rig = rig();
    let volume = rig.serve(false);
    rig.control.push(rig.now, UUID);
    rig.turn();
    (0..CORES).for_each(|core| _ = rig.mail_of(core));
    let epoch = Epoch::first_of_term(2);
    for shard in 0..SHARDS {
        rig.keeper_mail(shard, ToKeeper::Frozen { volume, epoch, blocks: 1 });
    }
    rig.turn();
    rig.store.borrow_mut().held = true;
    rig.send(
        0,
        ToControl::Batch {
            shard: ShardId(0),
            volume,
            epoch,
            runs: vec![PushRun { object: 0, first: 0, count: 1, zero: false }],
            crcs: vec![crc32c(0, &[1; BLOCK_BYTES])],
            bytes: vec![1; BLOCK_BYTES],
        },
    );
    (0..SHARDS).for_each(|shard| rig.keeper_mail(shard, ToKeeper::Pushed { volume, epoch }));
    rig.turn();
    assert!(rig.control.volumes[0].ops > 0, "a pack is on its way");
    let ticket = rig.control.begin_delete(UUID).expect("a volume");
    rig.turn();
    assert!(rig.events().is_empty());
    rig.fetch(volume, 0, 1);
    let mail = rig.mail_of(0);
    assert!(mail.iter().any(|m| matches!(m, FromControl::Exports(exports) if exports.is_empty())));
    assert_eq!(fetched(mail), None);
    rig.store.borrow_mut().held = false;
    rig.turn();
    let events = rig.events();
    assert!(matches!(&events[..], [Event::Quiet { ticket: t }] if *t == ticket), "{events:?}");
    rig.control.finish_delete(UUID).expect("forgets");
    rig.turn();
    assert_eq!(forgotten(&rig.mail_of(1)), [(ShardId(1), volume)]);
    assert!(rig.table.borrow().0.rows.is_empty() && rig.control.volumes().is_empty());
    assert!(rig.control.batches.is_empty());
}

#[test]
fn rows_of_volumes_that_the_store_lost_stay_while_they_are_dirty() {
    let mut first = rig();
    let volume = first.serve(false);
    let logged = BTreeMap::from([(volume, Logged { dirty_blocks: 3, epoch: Epoch(1 << 33) })]);
    let mut dirty = boot(first.store.clone(), first.table.clone(), 1, logged);
    dirty.control.forget_unlisted().expect("saves");
    assert_eq!(dirty.control.unlisted(), [UUID]);
    let mut clean = boot(first.store, first.table, 1, BTreeMap::new());
    clean.control.forget_unlisted().expect("saves");
    assert!(clean.control.unlisted().is_empty());
}

/// Packs in the store.
fn packs(rig: &Rig) -> usize {
    rig.store.borrow().objects.keys().filter(|key| key.contains("/pack/")).count()
}

/// Those of the last push.
fn newest_packs(rig: &Rig) -> usize {
    let objects = &rig.store.borrow().objects;
    let packs: Vec<&String> = objects.keys().filter(|key| key.contains("/pack/")).collect();
    let push = |key: &str| key.rsplit_once('-').expect("an epoch and a number").0.to_owned();
    let newest = packs.last().map(|key| push(key));
    packs.iter().filter(|key| Some(push(key)) == newest).count()
}

/// Plays shard 0 in a push of so many full packs, up to where nothing is left but to put them.
fn freeze_and_send(rig: &mut Rig, volume: VolumeId, packs: u64) {
    rig.turn();
    let mut closed = None;
    for core in 0..CORES {
        for mail in rig.mail_of(core) {
            if let FromControl::Shard { shard, mail: ToShard::Freeze { next, .. } } = mail {
                let epoch = Epoch(next.0 - 1);
                closed = Some(epoch);
                let blocks = if shard.0 == 0 { packs * PACK_BLOCKS_MAX as u64 } else { 0 };
                rig.keeper_mail(shard.0, ToKeeper::Frozen { volume, epoch, blocks });
            }
        }
    }
    let epoch = closed.expect("a push began");
    rig.turn();
    let count = BATCH_BLOCKS_MAX;
    for batch in 0..packs as usize * PACK_BLOCKS_MAX / count {
        let (object, first) = (batch * count / 1024, batch * count % 1024);
        let run = PushRun {
            object: object as u32,
            first: first as u16,
            count: count as u16,
            zero: false,
        };
        let (runs, bytes) = (vec![run], vec![1; count * BLOCK_BYTES]);
        let crcs = vec![crc32c(0, &[1; BLOCK_BYTES]); count];
        rig.send(0, ToControl::Batch { shard: ShardId(0), volume, epoch, runs, crcs, bytes });
    }
    (0..SHARDS).for_each(|shard| rig.keeper_mail(shard, ToKeeper::Pushed { volume, epoch }));
    rig.turn();
}

#[test]
fn a_push_by_age_takes_its_time_until_somebody_waits_for_it() {
    let mut rig = rig();
    let volume = rig.serve(false);
    rig.keeper_mail(0, ToKeeper::Dirtied { volume });
    rig.turn();
    rig.after(Duration::from_secs(5));
    freeze_and_send(&mut rig, volume, 2);
    assert_eq!(packs(&rig), 1, "half of it");
    rig.after(Duration::from_millis(2400));
    assert_eq!(packs(&rig), 1);
    rig.after(Duration::from_millis(200));
    assert_eq!(packs(&rig), 2, "in half of its time");
    (0..CORES).for_each(|core| _ = rig.mail_of(core));
    // Enough to fill packs is a reason to push, but not to hurry.
    rig.keeper_mail(0, ToKeeper::Grown { volume });
    freeze_and_send(&mut rig, volume, 2);
    assert_eq!(packs(&rig), 3);
    rig.keeper_mail(1, ToKeeper::Pressure { volume });
    rig.turn();
    assert_eq!(packs(&rig), 4, "room is short");
    // What the pressure asked for begins at once, and hurries. What it replaces goes.
    freeze_and_send(&mut rig, volume, 2);
    assert_eq!(newest_packs(&rig), 2);
    let ticket = rig.control.push(rig.now, UUID).expect("served");
    freeze_and_send(&mut rig, volume, 1);
    assert!(rig.events().iter().any(|event| {
        matches!(event, Event::Pushed { ticket: ended, committed: true } if *ended == ticket)
    }));
}

#[test]
fn what_waits_of_a_volume_that_is_deleted_never_goes_out() {
    let mut rig = rig();
    let volume = rig.serve(false);
    rig.keeper_mail(0, ToKeeper::Dirtied { volume });
    rig.turn();
    rig.after(Duration::from_secs(5));
    freeze_and_send(&mut rig, volume, 2);
    assert_eq!(packs(&rig), 1);
    let ticket = rig.control.begin_delete(UUID).expect("known");
    rig.after(Duration::from_secs(10));
    let quiet = |event: &Event| matches!(event, Event::Quiet { ticket: of } if *of == ticket);
    assert!(rig.events().iter().any(quiet), "nothing is on its way");
    assert_eq!(packs(&rig), 1);
}
