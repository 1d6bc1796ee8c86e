//! A volume that is given up and comes back, and what is dirty of one that was lost.

use super::*;

impl World<'_> {
    /// Claimed again by the same cache.
    fn attach_again(&mut self, term: u32) {
        let committed = Epoch(self.open.0 - 1);
        self.open = Epoch::first_of_term(term);
        self.mail(ToShard::Attach {
            volume: VOLUME,
            object_shift: OBJECT_SHIFT,
            blocks: u64::from(OBJECTS * OBJECT_BLOCKS),
            open: self.open,
            committed,
        });
    }

    fn dirty_runs(&self) -> Vec<DirtyRun> {
        let (mut at, mut runs) = (SalvageAt::default(), Vec::new());
        loop {
            match self.shard.scan_dirty(VOLUME, &mut at) {
                DirtyScan::Run(run) => runs.push(run),
                DirtyScan::Later => {}
                DirtyScan::End => break,
            }
        }
        runs.sort_by_key(|run| (run.object, run.first));
        runs
    }

    /// Pushes, but the commit never comes.
    fn push_in_vain(&mut self) {
        self.stuck = true;
        self.open = self.open.next();
        self.mail(ToShard::Freeze { volume: VOLUME, next: self.open });
    }
}

fn run(object: u32, first: u16, count: u16, kind: DirtyKind) -> DirtyRun {
    DirtyRun { object, first, count, kind }
}

#[test]
fn a_volume_that_was_given_up_comes_back_with_its_contents() {
    let mut storage = storage(Policy::default());
    let mut world = World::new(&mut storage, Policy::default());
    world.write(Advice::None, 0, 8);
    world.write(Advice::DontNeed, 8, 8);
    world.push();
    world.mail(ToShard::Detach { volume: VOLUME });
    world.expected = Status::Gone;
    world.ask(RequestKind::Read, Advice::None, 0, 8);
    world.ask(RequestKind::Write, Advice::None, 0, 8);
    world.expected = Status::Ok;
    world.attach_again(5);
    assert_eq!(world.read(Advice::None, 0, 8), from_ram(8));
    assert_eq!(world.read(Advice::None, 8, 8), from_nvme(8));
    world.write(Advice::None, 4, 8);
    assert_eq!(world.dirty_runs(), [run(0, 4, 8, DirtyKind::Data)]);
    world.push();
    assert_eq!(world.dirty_runs(), []);
}

/// A write that reached the log after its volume was fenced, in the middle of a cut, was never
/// answered: nobody let the held answers go any more.
#[test]
fn a_write_under_way_is_answered_when_its_volume_is_lost_in_a_cut() {
    let mut storage = storage(Policy::default());
    let mut world = World::new(&mut storage, Policy::default());
    world.open = world.open.next();
    world.tell(Input::Keeper(ToShard::Freeze { volume: VOLUME, next: world.open }));
    world.todo.retain(|output| !matches!(output, Output::Keeper(_)));
    world.request(RequestKind::Write, Advice::None, 0, 4);
    let writes = world.turns(4, |output| matches!(output, Output::DeviceWrite { .. }));
    world.tell(Input::Keeper(ToShard::Fenced { volume: VOLUME }));
    writes.into_iter().for_each(|write| world.carry_out(write));
    world.turns(4, |_| false);
    assert_eq!(world.replies, 1);
}

/// A write of a part of a block that had to be fetched failed with EIO, when its volume was fenced.
#[test]
fn what_waits_for_the_store_when_a_volume_is_lost_is_told_so() {
    let mut storage = storage(Policy::default());
    let mut world = World::new(&mut storage, Policy::default());
    world.store(0..8);
    world.request(RequestKind::Read, Advice::None, 0, 8);
    let fetch = world.turns(4, |output| matches!(output, Output::Fetch { .. }));
    let [Output::Fetch { op, .. }] = fetch[..] else { panic!("{fetch:?}") };
    world.mail(ToShard::Fenced { volume: VOLUME });
    world.expected = Status::Gone;
    world.tell(Input::Fetched { op, ok: false, crcs: &[] });
    world.settle();
    assert_eq!(world.replies, 1);
}

#[test]
fn what_is_dirty_of_a_lost_volume_can_be_saved() {
    let mut storage = storage(Policy::default());
    let mut world = World::new(&mut storage, Policy::default());
    world.write(Advice::None, 0, 16);
    world.push();
    // Clean: 0 to 3 and 12 to 15. In the closed epoch and again in the open one: 4 to 7.
    world.write(Advice::DontNeed, 4, 8);
    world.ask(RequestKind::Discard, Advice::None, OBJECT_BLOCKS, OBJECT_BLOCKS);
    world.push_in_vain();
    world.write(Advice::DontNeed, 4, 4);
    world.ask(RequestKind::Zero, Advice::None, 40, 3);
    world.write(Advice::None, OBJECT_BLOCKS + 2, 2);
    world.mail(ToShard::Fenced { volume: VOLUME });
    let (data, zero) = (DirtyKind::Data, DirtyKind::Zero);
    let expected = [
        run(0, 4, 8, data),
        run(0, 40, 3, zero),
        run(1, 0, 2, zero),
        run(1, 2, 2, data),
        run(1, 4, OBJECT_BLOCKS as u16 - 4, zero),
    ];
    assert_eq!(world.dirty_runs(), expected);
    let before = world.shard.traffic();
    world.read(Advice::Salvage, 4, 4);
    world.read(Advice::Salvage, OBJECT_BLOCKS + 2, 2);
    assert_eq!(world.shard.traffic(), before, "no client read that");
    world.expected = Status::Gone;
    world.ask(RequestKind::Read, Advice::None, 4, 8);
    // Damaged before it was saved.
    let copies = world.region.iter_mut().filter(|page| **page == content(9));
    copies.for_each(|page| *page = 1);
    world.expected = Status::Io;
    world.ask(RequestKind::Read, Advice::Salvage, 8, 4);
    let found = world.dirty_runs();
    let lost = run(0, 9, 1, DirtyKind::Lost);
    assert_eq!(found[..3], [run(0, 4, 5, data), lost, run(0, 10, 2, data)]);
    world.mail(ToShard::Forget { volume: VOLUME });
    assert_eq!(world.dirty_runs(), []);
    assert_eq!(world.shard.usage().dirty_blocks, 0);
}
