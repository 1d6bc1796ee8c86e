//! When changes are answered in each mode, what a FLUSH waits for, and what is kept.

use super::*;

/// What is not carried out until the test says so.
#[derive(Clone, Copy)]
enum Held {
    Writes,
    Flushes,
    Push,
}

impl Held {
    fn holds(self, shard: &Shard<'_>, output: &Output) -> bool {
        match (self, output) {
            (Self::Writes, Output::DeviceWrite { .. })
            | (Self::Push, Output::Keeper(ToKeeper::Pushed { .. })) => true,
            (Self::Flushes, Output::DeviceFlush { op }) => {
                matches!(shard.op(*op), Some(Op::Flush(_)))
            }
            _ => false,
        }
    }
}

impl World<'_> {
    fn mode(&mut self, mode: Mode) {
        self.settings(mode, Buffering::default());
    }

    /// Everything goes on but this, which is returned.
    fn hold(&mut self, held: Held) -> Vec<Output> {
        let mut waiting = Vec::new();
        for _ in 0..8 {
            while let Some(output) = self.todo.pop_front() {
                if held.holds(&self.shard, &output) {
                    waiting.push(output);
                } else {
                    self.carry_out(output);
                }
            }
            self.tell(Input::Turn);
        }
        self.shard.check();
        waiting
    }

    fn go_on(&mut self, waiting: Vec<Output>) {
        self.todo.extend(waiting);
        self.settle();
    }

    /// Hands in a write of one block under a number of its own.
    fn write_as(&mut self, id: u64, fua: bool, block: u32) {
        self.request_as(id, (RequestKind::Write, fua), Advice::None, block, 1);
    }

    fn flush_as(&mut self, id: u64) {
        self.request_as(id, (RequestKind::Flush, false), Advice::None, 0, 0);
    }

    fn begin_push(&mut self) {
        self.open = self.open.next();
        self.tell(Input::Keeper(ToShard::Freeze { volume: VOLUME, next: self.open }));
    }

    fn answer(&self, id: u64) -> Option<Status> {
        self.answers.get(&id).copied()
    }

    fn is_on_nvme(&mut self, block: u32) -> bool {
        let onode = self.shard.onodes.lookup(VOLUME, block / OBJECT_BLOCKS);
        let place = (block % OBJECT_BLOCKS) as u16;
        let place = onode.and_then(|onode| self.shard.onodes.block(onode, place));
        place.is_some_and(|(leaf, index)| self.shard.onodes.leaf(leaf).nvme[index] != NIL)
    }

    fn flushes(&self) -> u64 {
        self.shard.counters().flushes
    }
}

fn asks_to_push(output: &Output) -> bool {
    matches!(output, Output::Keeper(ToKeeper::Sync { .. }))
}

#[test]
fn writeback_answers_when_the_log_has_it() {
    let mut storage = storage(Policy::default());
    let mut world = World::new(&mut storage, Policy::default());
    world.write_as(7, false, 0);
    let writes = world.hold(Held::Writes);
    assert_eq!(world.answer(7), None);
    world.todo.extend(writes);
    let flushes = world.hold(Held::Flushes);
    assert_eq!((world.answer(7), flushes.len()), (Some(Status::Ok), 0));
    world.flush_as(8);
    let flushes = world.hold(Held::Flushes);
    assert_eq!((world.answer(8), flushes.len()), (None, 1));
    world.go_on(flushes);
    assert_eq!(world.answer(8), Some(Status::Ok));
    // Nothing was answered since.
    let before = world.flushes();
    world.flush_as(9);
    world.settle();
    assert_eq!((world.answer(9), world.flushes()), (Some(Status::Ok), before));
}

#[test]
fn ram_answers_at_once_and_a_flush_waits_for_the_log() {
    let mut storage = storage(Policy::default());
    let mut world = World::new(&mut storage, Policy::default());
    world.mode(Mode::Ram);
    world.write_as(7, false, 0);
    world.request_as(8, (RequestKind::Zero, false), Advice::None, 1, 4);
    assert_eq!((world.answer(7), world.answer(8)), (Some(Status::Ok), Some(Status::Ok)));
    world.write_as(9, true, 5);
    world.flush_as(10);
    let writes = world.hold(Held::Writes);
    assert_eq!((world.answer(9), world.answer(10), world.flushes()), (None, None, 0));
    world.todo.extend(writes);
    let flushes = world.hold(Held::Flushes);
    assert_eq!((world.answer(9), world.answer(10), flushes.len()), (None, None, 1));
    world.go_on(flushes);
    assert_eq!((world.answer(9), world.answer(10)), (Some(Status::Ok), Some(Status::Ok)));
    assert_eq!(world.read(Advice::None, 0, 1), from_ram(1));
}

#[test]
fn beyond_the_bound_ram_waits_for_the_log() {
    let mut storage = storage(Policy::default());
    let mut world = World::new(&mut storage, Policy::default());
    world.mode(Mode::Ram);
    let bound = u64::from(world.shard.buffers().capacity() / 8);
    for id in 0..bound + 2 {
        world.write_as(id, false, id as u32);
    }
    assert_eq!(world.answers.len() as u64, bound);
    let writes = world.hold(Held::Writes);
    assert_eq!(world.answers.len() as u64, bound);
    world.go_on(writes);
    assert_eq!(world.answers.len() as u64, bound + 2);
    world.write_as(1000, false, 0);
    assert_eq!(world.answer(1000), Some(Status::Ok), "there is room again");
    world.settle();
}

/// A write that was answered from RAM and then lost to the device must not be lost in silence.
#[test]
fn a_flush_tells_of_records_that_the_device_did_not_take() {
    let mut storage = storage(Policy::default());
    let mut world = World::new(&mut storage, Policy::default());
    world.mode(Mode::Ram);
    world.write_as(7, false, 0);
    for _ in 0..3 {
        for output in world.hold(Held::Writes) {
            let Output::DeviceWrite { op, .. } = output else { unreachable!("held") };
            world.tell(Input::Device { op, ok: false, crcs: &[] });
        }
    }
    world.flush_as(8);
    world.settle();
    world.write_as(9, false, 1);
    world.flush_as(10);
    world.settle();
    assert_eq!((world.answer(7), world.answer(8)), (Some(Status::Ok), Some(Status::Io)));
    assert_eq!((world.answer(9), world.answer(10)), (Some(Status::Ok), Some(Status::Ok)));
}

/// The image must not hold a write whose client had seen the answer to one that is not in it.
#[test]
fn no_answer_from_ram_overtakes_a_cut() {
    let mut storage = storage(Policy::default());
    let mut world = World::new(&mut storage, Policy::default());
    world.mode(Mode::Ram);
    world.write_as(7, false, 0);
    world.open = world.open.next();
    world.tell(Input::Keeper(ToShard::Freeze { volume: VOLUME, next: world.open }));
    let frozen = core::mem::take(&mut world.todo);
    world.write_as(8, false, 1);
    world.settle();
    assert_eq!(world.answer(8), None, "another shard may not have closed the epoch");
    world.go_on(frozen.into());
    assert_eq!(world.answer(8), Some(Status::Ok));
    assert_eq!(world.store.get(&(0, 0)), Some(&content(0)), "what was in RAM was pushed");
    assert_eq!(world.store.get(&(0, 1)), None);
}

#[test]
fn the_store_s_modes_answer_when_it_has_committed() {
    for mode in [Mode::WriteThrough, Mode::WriteAround, Mode::None] {
        let mut storage = storage(Policy::default());
        let mut world = World::new(&mut storage, Policy::default());
        world.mode(mode);
        let pages = world.transit.len();
        world.write_as(7, false, 0);
        world.write_as(8, true, 1);
        world.request_as(9, (RequestKind::Discard, false), Advice::None, 2, 4);
        let asked = world.turns(8, asks_to_push);
        assert_eq!((world.answers.len(), asked.len()), (0, 1), "{mode:?}: one for all");
        assert_eq!(world.transit.len(), pages, "{mode:?}: the pages are back already");
        assert_eq!(world.shard.usage().tasks, 0, "{mode:?}: and so are the tasks");
        world.begin_push();
        let pushed = world.hold(Held::Push);
        assert_eq!(world.answers.len(), 0, "{mode:?}: all but the commit is done");
        world.write_as(10, false, 7);
        world.todo.extend(pushed);
        let asked = world.turns(16, asks_to_push);
        let ok: Vec<_> = (7..10).map(|id| world.answer(id)).collect();
        assert_eq!(ok, [Some(Status::Ok); 3], "{mode:?}");
        assert_eq!((world.answer(10), asked.len()), (None, 1), "{mode:?}: its epoch is open");
        // What was answered is in the store, so there is nothing to flush.
        let flushes = world.flushes();
        world.flush_as(11);
        assert_eq!((world.answer(11), world.flushes()), (Some(Status::Ok), flushes), "{mode:?}");
        world.push();
        assert_eq!(world.answer(10), Some(Status::Ok), "{mode:?}");
    }
}

#[test]
fn ephemeral_promises_nothing_and_asks_for_no_push() {
    let mut storage = storage(Policy::default());
    let mut world = World::new(&mut storage, Policy::default());
    world.mode(Mode::Ephemeral);
    world.write_as(7, true, 0);
    world.flush_as(8);
    let tells = |output: &Output| matches!(output, Output::Keeper(ToKeeper::Dirtied { .. }));
    let told = world.turns(8, tells);
    assert_eq!((world.answer(7), world.answer(8)), (Some(Status::Ok), Some(Status::Ok)));
    assert_eq!((told.len(), world.flushes()), (0, 0));
    // What is dirty becomes the keeper's business with the mode, and a FLUSH counts again.
    let (mode, volume, buffering) = (Mode::WriteBack, VOLUME, Buffering::default());
    world.tell(Input::Keeper(ToShard::Settings { volume, mode, buffering, pinned: false }));
    assert_eq!(world.turns(8, tells).len(), 1);
    world.flush_as(9);
    world.settle();
    assert_eq!((world.answer(9), world.flushes()), (Some(Status::Ok), 1));
}

#[test]
fn an_ephemeral_volume_is_pushed_when_the_log_needs_room() {
    let mut storage = storage(Policy::default());
    let mut world = World::new(&mut storage, Policy::default());
    world.mode(Mode::Ephemeral);
    let presses = |output: &Output| matches!(output, Output::Keeper(ToKeeper::Pressure { .. }));
    let mut pressed = 0;
    for first in (0..1536).step_by(32) {
        world.request(RequestKind::Write, Advice::None, first, 32);
        pressed += world.turns(8, presses).len();
    }
    assert_eq!(pressed, 1, "{:?}", world.shard.usage());
}

#[test]
fn writearound_keeps_nothing_that_was_written_and_serves_nothing_old() {
    let mut storage = storage(Policy::default());
    let mut world = World::new(&mut storage, Policy::default());
    world.store(0..64);
    world.read(Advice::WillNeed, 0, 8);
    world.read(Advice::WillNeed, 0, 8);
    assert!((0..8).all(|block| world.is_in_ram(block) && world.is_on_nvme(block)));
    world.mode(Mode::WriteAround);
    for id in 0..4 {
        world.write_as(id, false, id as u32);
        world.settle();
    }
    world.request_as(4, (RequestKind::Zero, false), Advice::None, 4, 1);
    world.settle();
    assert!((0..4).all(|block| world.is_in_ram(block)), "the push and readers need it");
    world.push();
    assert!((0..5).all(|block| !world.is_in_ram(block) && !world.is_on_nvme(block)));
    assert!((5..8).all(|block| world.is_in_ram(block) && world.is_on_nvme(block)));
    assert_eq!(world.read(Advice::None, 0, 4), from_store(4));
    // What is read stays, as ever.
    assert_eq!(world.read(Advice::None, 0, 4), from_ram(4));
}

/// A discarded object is known as a hole. Of data written into it and dropped from the cache,
/// nothing was known, and so it read as zeroes.
#[test]
fn what_is_written_around_into_a_hole_is_not_taken_for_zeroes() {
    let mut storage = storage(Policy::default());
    let mut world = World::new(&mut storage, Policy::default());
    world.ask(RequestKind::Discard, Advice::None, 0, OBJECT_BLOCKS);
    world.push();
    world.mode(Mode::WriteAround);
    world.request(RequestKind::Write, Advice::None, 3, 2);
    world.settle();
    world.push();
    assert_eq!(world.read(Advice::None, 3, 2), from_store(2));
}

#[test]
fn none_keeps_nothing_that_was_read() {
    let mut storage = storage(Policy::default());
    let mut world = World::new(&mut storage, Policy::default());
    world.store(0..256);
    world.read(Advice::None, 0, 8);
    world.mode(Mode::None);
    for advice in [Advice::None, Advice::WillNeed] {
        // A stream, too: nothing is read ahead.
        for first in (64..192).step_by(32) {
            assert_eq!(world.read(advice, first, 32), from_store(32));
        }
    }
    world.ask(RequestKind::Cache, Advice::WillNeed, 200, 8);
    // What had been cached before is good, and leaves RAM with its reader.
    assert_eq!(world.read(Advice::None, 0, 8), from_ram(8));
    assert_eq!(world.shard.usage().ram_blocks, 0);
    assert_eq!(world.shard.usage().nvme_blocks, 8, "those read before");
    // What the store lacks stays until it has it.
    world.request(RequestKind::Write, Advice::None, 64, 1);
    world.turns(8, |_| false);
    assert_eq!(world.read(Advice::None, 64, 1), from_ram(1));
    assert!(world.is_in_ram(64));
    world.push();
    assert!(!world.is_in_ram(64) && !world.is_on_nvme(64));
}

#[test]
fn writes_that_waited_for_the_store_go_on_when_the_mode_asks_for_less() {
    let mut storage = storage(Policy::default());
    let mut world = World::new(&mut storage, Policy::default());
    world.mode(Mode::WriteThrough);
    world.write_as(7, false, 0);
    world.write_as(8, true, 1);
    world.settle();
    assert_eq!(world.answers.len(), 0);
    let (mode, volume, buffering) = (Mode::WriteBack, VOLUME, Buffering::default());
    world.tell(Input::Keeper(ToShard::Settings { volume, mode, buffering, pinned: false }));
    let flushes = world.hold(Held::Flushes);
    assert_eq!((world.answer(7), world.answer(8)), (Some(Status::Ok), None));
    world.go_on(flushes);
    assert_eq!(world.answer(8), Some(Status::Ok));
    // Both count for the next FLUSH.
    let flushes = world.flushes();
    world.write_as(9, false, 2);
    world.settle();
    world.flush_as(10);
    world.settle();
    assert_eq!((world.answer(10), world.flushes()), (Some(Status::Ok), flushes + 1));
}

#[test]
fn a_flush_covers_what_was_answered_in_weaker_modes() {
    for before in [Mode::WriteBack, Mode::Ram, Mode::Ephemeral] {
        for after in [Mode::WriteBack, Mode::Ram, Mode::WriteThrough, Mode::None] {
            let mut storage = storage(Policy::default());
            let mut world = World::new(&mut storage, Policy::default());
            world.mode(before);
            world.write_as(7, false, 0);
            let writes = world.hold(Held::Writes);
            let (mode, volume, buffering) = (after, VOLUME, Buffering::default());
            world.tell(Input::Keeper(ToShard::Settings { volume, mode, buffering, pinned: false }));
            world.todo.extend(if before == Mode::WriteBack { writes.clone() } else { vec![] });
            world.flush_as(8);
            let mut waiting = world.hold(Held::Flushes);
            let answered = world.answer(7).is_some();
            assert_eq!(answered, before != Mode::WriteBack || !after.waits_for_store());
            if before != Mode::WriteBack {
                assert_eq!(world.answer(8), None, "{before:?} {after:?}: not even written");
                world.todo.extend(writes);
                waiting.extend(world.hold(Held::Flushes));
                assert_eq!(world.answer(8), None, "{before:?} {after:?}: not durable");
            }
            world.go_on(waiting);
            assert_eq!(world.answer(8), Some(Status::Ok), "{before:?} {after:?}");
        }
    }
}

#[test]
fn a_lost_volume_answers_what_waited_for_the_store() {
    let mut storage = storage(Policy::default());
    let mut world = World::new(&mut storage, Policy::default());
    world.mode(Mode::WriteThrough);
    world.write_as(7, false, 0);
    world.settle();
    world.write_as(8, false, 1);
    world.mail(ToShard::Fenced { volume: VOLUME });
    assert_eq!((world.answer(7), world.answer(8)), (Some(Status::Gone), Some(Status::Gone)));
    world.mail(ToShard::Forget { volume: VOLUME });
    assert_eq!(world.shard.usage().onodes, 0);
}

/// With the store away, writes that waited for it took all tasks, and every other volume's
/// requests waited behind them.
#[test]
fn a_volume_that_waits_for_the_store_does_not_stop_another() {
    const OTHER: VolumeId = VolumeId(4);
    let mut storage = storage(Policy::default());
    let mut world = World::new(&mut storage, Policy::default());
    let (open, committed) = (Epoch::first_of_term(5), Epoch::first_of_term(4));
    let (volume, blocks) = (OTHER, 1024);
    world.mail(ToShard::Attach { volume, object_shift: OBJECT_SHIFT, blocks, open, committed });
    world.mode(Mode::WriteThrough);
    for id in 0..300 {
        world.write_as(id, false, id as u32);
        world.settle();
    }
    assert_eq!((world.answers.len(), world.shard.usage().tasks), (0, 0));
    let page = world.transit.pop().expect("pages are left");
    let (kind, fua, advice) = (RequestKind::Write, true, Advice::None);
    let (offset, len) = (0, BLOCK);
    let request = Request { id: 999, kind, fua, advice, volume, object: 0, offset, len };
    world.tell(Input::Request(request, &[BlockRef { page, crc: 0 }]));
    world.settle();
    assert_eq!(world.answer(999), Some(Status::Ok));
    world.begin_push();
    world.settle();
    assert_eq!(world.answers.len(), 301);
}
