//! Volumes that are given up and come back, or are lost.

use heeler_core::shard::{DirtyKind, DirtyRun, SalvageAt};

use super::*;

impl Rig {
    /// Takes all mail; gives the numbers of orders to close a volume, and says whether it may be
    /// opened, if that changed.
    fn closing(&mut self) -> (Vec<(usize, u64)>, Option<bool>) {
        let (mut orders, mut open) = (Vec::new(), None);
        for core in 0..CORES {
            for mail in self.mail_of(core) {
                match mail {
                    FromControl::Close { ticket, .. } => orders.push((core, ticket)),
                    FromControl::Exports(exports) => open = Some(!exports.is_empty()),
                    _ => {}
                }
            }
        }
        (orders, open)
    }

    fn close(&mut self, orders: &[(usize, u64)]) {
        for (core, ticket) in orders {
            self.send(*core, ToControl::Closed { ticket: *ticket });
        }
    }

    /// As [`Self::push`], with so many batches of 1 MiB.
    fn push_batches(&mut self, volume: VolumeId, batches: u64) {
        self.turn();
        let mut closed = None;
        for core in 0..CORES {
            for mail in self.mail_of(core) {
                if let FromControl::Shard { shard, mail: ToShard::Freeze { next, .. } } = mail {
                    let epoch = Epoch(next.0 - 1);
                    closed = Some(epoch);
                    let blocks = if shard.0 == 0 { batches * 256 } else { 0 };
                    self.keeper_mail(shard.0, ToKeeper::Frozen { volume, epoch, blocks });
                }
            }
        }
        let epoch = closed.expect("a push began");
        let bytes = vec![7; 256 * BLOCK_BYTES];
        let crcs = vec![crc32c(0, &bytes[..BLOCK_BYTES]); 256];
        for batch in 0..batches {
            self.turn();
            let object = batch as u32;
            self.send(
                0,
                ToControl::Batch {
                    shard: ShardId(0),
                    volume,
                    epoch,
                    runs: vec![PushRun { object, first: 0, count: 256, zero: false }],
                    crcs: crcs.clone(),
                    bytes: bytes.clone(),
                },
            );
        }
        (0..SHARDS).for_each(|shard| self.keeper_mail(shard, ToKeeper::Pushed { volume, epoch }));
        (0..20).for_each(|_| self.after(Duration::from_millis(10)));
    }

    /// Detaches, with a last push of nothing.
    fn detach(&mut self, volume: VolumeId) {
        self.control.detach(self.now, UUID).expect("it is served");
        self.push(volume, &[]);
        let (orders, _) = self.closing();
        self.close(&orders);
        self.push(volume, &[]);
        assert!(matches!(self.events()[..], [Event::Detached { detached: true, .. }]));
    }

    fn attach(&mut self, takeover: bool, dirty_blocks: u64) -> Vec<Event> {
        let attached = self.control.attach(self.now, UUID, "disk0", takeover, dirty_blocks);
        attached.expect("it can be claimed");
        self.turn();
        for core in 0..CORES {
            let mail = self.mail_of(core);
            self.answer_reports(core, &mail);
        }
        self.turn();
        self.events()
    }

    /// Whether clients are served while it is detached.
    fn is_open(&self) -> bool {
        self.control.volumes[0].leaving.expect("it is being detached").is_open()
    }

    fn state(&self) -> &'static str {
        self.control.volumes()[0].state
    }
}

/// A volume that has more than a last push takes.
fn large() -> Rig {
    let rig = rig();
    let head = Head::first(UUID, "disk0", 1 << 16, 20, 5);
    rig.store.borrow_mut().objects.insert(names::head_key(UUID, 1), head.encode(crc32c));
    rig
}

#[test]
fn clients_go_on_while_a_volume_is_pushed_and_are_gone_before_it_is_released() {
    let mut rig = rig();
    let volume = rig.serve(false);
    let ticket = rig.control.detach(rig.now, UUID).expect("it is served");
    assert!(rig.control.detach(rig.now, UUID).is_err(), "one order is enough");
    rig.push(volume, &[[1; BLOCK_BYTES]]);
    assert_eq!(rig.state(), "detaching");
    let (orders, open) = rig.closing();
    assert_eq!((orders.len(), open), (CORES, Some(false)), "new clients are refused from now on");
    rig.close(&orders[..1]);
    rig.turn();
    assert!(rig.closing().0.is_empty() && !rig.newest_head().released);
    rig.close(&orders[1..]);
    // What was written up to the end is in the last push.
    rig.push(volume, &[[2; BLOCK_BYTES], [3; BLOCK_BYTES]]);
    assert!(rig.newest_head().released && rig.row().released);
    assert_eq!(rig.state(), "detached");
    let done = rig.events();
    assert!(
        matches!(done[..], [Event::Detached { ticket: t, detached: true }] if t == ticket),
        "{done:?}"
    );
    let rest = ToShard::Detach { volume };
    let told = rig.mail_of(1).into_iter();
    let told = told.filter(|mail| matches!(mail, FromControl::Shard { mail, .. } if *mail == rest));
    assert_eq!(told.count(), 1, "the shard serves it no more");
    // Nobody had it between: the contents are good.
    assert!(matches!(rig.attach(false, 0)[..], [Event::Served { .. }]));
    assert_eq!(rig.control.volumes()[0].number, volume);
    assert!(!rig.row().released);
}

#[test]
fn as_long_as_much_is_dirty_clients_are_served() {
    let mut rig = large();
    let volume = rig.serve(false);
    rig.control.detach(rig.now, UUID).expect("it is served");
    // Batches have 256 blocks each; clients write half as much during each push as before it.
    for batches in [64, 32, 16] {
        rig.push_batches(volume, batches);
        assert_eq!(rig.is_open(), batches > 16, "after a push of {batches} MiB");
    }
}

#[test]
fn clients_that_write_as_fast_as_it_is_pushed_are_not_waited_for() {
    let mut rig = large();
    let volume = rig.serve(false);
    rig.control.detach(rig.now, UUID).expect("it is served");
    for (batches, last) in [(40, false), (30, true)] {
        rig.push_batches(volume, batches);
        assert_eq!(rig.is_open(), !last);
    }
}

#[test]
fn a_detach_can_be_called_off() {
    let mut rig = rig();
    let volume = rig.serve(false);
    assert!(rig.control.stay(rig.now, UUID).is_err(), "nothing to call off");
    // While it pushes.
    rig.control.detach(rig.now, UUID).expect("it is served");
    rig.control.stay(rig.now, UUID).expect("early enough");
    rig.push(volume, &[]);
    let (orders, _) = rig.closing();
    assert!(orders.is_empty());
    assert!(matches!(rig.events()[0], Event::Detached { detached: false, .. }));
    // While clients are being disconnected.
    rig.control.detach(rig.now, UUID).expect("it is served");
    rig.push(volume, &[]);
    let (orders, open) = rig.closing();
    assert_eq!(open, Some(false));
    rig.control.stay(rig.now, UUID).expect("early enough");
    rig.close(&orders);
    rig.turn();
    assert_eq!((rig.closing().1, rig.state()), (Some(true), "served"));
    // While the last push runs.
    rig.control.detach(rig.now, UUID).expect("it is served");
    rig.push(volume, &[]);
    let (orders, _) = rig.closing();
    rig.close(&orders);
    rig.turn();
    rig.control.stay(rig.now, UUID).expect("early enough");
    rig.push(volume, &[[1; BLOCK_BYTES]]);
    assert!(!rig.newest_head().released && rig.state() == "served");
    _ = rig.events();
    // While the release is on its way.
    rig.control.detach(rig.now, UUID).expect("it is served");
    rig.push(volume, &[]);
    let (orders, _) = rig.closing();
    rig.close(&orders);
    rig.store.borrow_mut().held = true;
    rig.push(volume, &[]);
    let late = rig.control.stay(rig.now, UUID).expect_err("nobody can call it back");
    assert!(late.contains("too late"), "{late}");
    rig.store.borrow_mut().held = false;
    rig.turn();
    assert_eq!(rig.state(), "detached");
    assert!(matches!(rig.events()[..], [Event::Detached { detached: true, .. }]));
}

#[test]
fn another_owner_between_makes_the_contents_void() {
    let mut first = rig();
    let volume = first.serve(false);
    first.detach(volume);
    let table = Rc::new(RefCell::new((VolumeTable::default(), true)));
    let mut second = boot(first.store.clone(), table, 2, BTreeMap::new());
    let at_second = second.serve(false);
    let events = first.attach(false, 0);
    let [Event::Refused { reason, .. }] = &events[..] else { panic!("{events:?}") };
    assert!(reason.contains("detach it there"), "{reason}");
    second.detach(at_second);
    (0..CORES).for_each(|core| _ = first.mail_of(core));
    assert!(matches!(first.attach(false, 0)[..], [Event::Served { .. }]));
    assert_ne!(first.control.volumes()[0].number, volume, "what it held is forgotten");
}

#[test]
fn what_a_lost_volume_left_is_kept_until_it_is_given_up() {
    let mut first = rig();
    let volume = first.serve(false);
    let table = Rc::new(RefCell::new((VolumeTable::default(), true)));
    let mut second = boot(first.store.clone(), table, 2, BTreeMap::new());
    let at_second = second.serve(true);
    first.control.push(first.now, UUID);
    first.push(volume, &[[1; BLOCK_BYTES]]);
    assert_eq!(first.state(), "fenced");
    second.detach(at_second);
    _ = first.events();
    // The log of before the start knew nothing of it: the shards do.
    let events = first.attach(false, 2);
    let [Event::Refused { reason, .. }] = &events[..] else { panic!("{events:?}") };
    assert!(reason.contains("8192 dirty bytes") && reason.contains("salvage"), "{reason}");
    assert!(first.control.volumes()[0].is_stranded() && first.control.stranded_blocks() == 0);
    let run = DirtyRun { object: 0, first: 3, count: 1, kind: DirtyKind::Data };
    let listed = first.control.list_dirty(UUID, ShardId(2), SalvageAt::default()).expect("it is");
    let read = first.control.read_dirty(UUID, ShardId(2), run).expect("it is there");
    first.turn();
    let mail = first.mail_of(0);
    assert!(mail.iter().any(|mail| matches!(mail, FromControl::ListDirty { ticket, .. }
        if *ticket == listed.0)));
    assert!(
        mail.iter().any(|mail| matches!(mail, FromControl::ReadDirty { ticket, volume: v, .. }
        if *ticket == read.0 && *v == volume))
    );
    first.control.forget_volume(UUID).expect("it is not in use");
    first.turn();
    assert_eq!(forgotten(&first.mail_of(1)), [(ShardId(1), volume)]);
    assert!(matches!(first.attach(false, 0)[..], [Event::Served { .. }]));
}

#[test]
fn the_log_of_a_refused_volume_is_taken_in_once() {
    let mut first = rig();
    let volume = first.serve(false);
    let table = Rc::new(RefCell::new((VolumeTable::default(), true)));
    let mut second = boot(first.store.clone(), table, 2, BTreeMap::new());
    second.serve(true);
    let logged = BTreeMap::from([(volume, Logged { dirty_blocks: 3, epoch: Epoch(1 << 33) })]);
    let mut back = boot(first.store.clone(), first.table.clone(), 1, logged);
    back.control.add_volume(back.now, UUID, "disk0", false);
    back.turn();
    assert!(matches!(back.events()[..], [Event::Stale { volume: UUID }]));
    assert_eq!(back.control.logged_blocks(UUID), 3);
    (0..CORES).for_each(|core| _ = back.mail_of(core));
    let geometry = Geometry { blocks: 4096, object_shift: 22 };
    back.control.take_in(UUID, geometry, Epoch(1 << 32));
    back.turn();
    let mail = back.mail_of(1);
    let [
        FromControl::Shard { mail: ToShard::Attach { open, committed, .. }, .. },
        FromControl::Shard { mail: ToShard::Fenced { .. }, .. },
    ] = &mail[..]
    else {
        panic!("{mail:?}")
    };
    assert!(*open > Epoch(1 << 33) && *committed == Epoch(1 << 32));
    // Claimed once more with what turned out to be dirty: so much, or nothing.
    assert!(matches!(back.attach(false, 1)[..], [Event::Refused { .. }]));
    back.control.take_in(UUID, geometry, Epoch(1 << 32));
    back.turn();
    assert!(back.mail_of(1).is_empty());
    let events = back.attach(false, 0);
    let [Event::Refused { reason, .. }] = &events[..] else { panic!("{events:?}") };
    assert!(reason.contains("owned by host2"), "{reason}");
    assert!(!back.control.volumes()[0].is_stranded(), "what is clean was forgotten");
    assert_ne!(back.row().number, volume);
}
