use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;

use super::*;
use crate::random::Random;

const ONODES: usize = 12;
const LEAVES: usize = 40;

/// An object as the model knows it.
#[derive(Default)]
struct Known {
    slot: u32,
    pins: u32,
    dirty: bool,
    listed: bool,
    /// Position -> leaf slot, and whether it has a shadow.
    leaves: BTreeMap<u8, (u32, Option<u32>)>,
}

impl Known {
    fn units(&self) -> u32 {
        let leaves = self.leaves.values().map(|(_, shadow)| 1 + u32::from(shadow.is_some()));
        ONODE_UNITS + leaves.sum::<u32>()
    }

    fn evictable(&self) -> bool {
        self.pins == 0 && !self.dirty && !self.listed
    }
}

type Key = (u32, u32);

#[derive(Default)]
struct Model {
    known: BTreeMap<Key, Known>,
    /// Evictable ones, last released in front.
    lru: VecDeque<Key>,
    evictions: u64,
}

impl Model {
    fn settle(&mut self, key: Key) {
        let evictable = self.known[&key].evictable();
        let linked = self.lru.contains(&key);
        if evictable && !linked {
            self.lru.push_front(key);
        }
        if !evictable {
            self.lru.retain(|other| *other != key);
        }
    }

    fn leaves(&self) -> usize {
        let each = self.known.values().flat_map(|known| known.leaves.values());
        each.map(|(_, shadow)| 1 + usize::from(shadow.is_some())).sum()
    }

    fn check(&self, onodes: &mut Onodes<'_>) {
        assert_eq!(onodes.used(), (self.known.len() as u32, self.leaves() as u32));
        assert_eq!(onodes.leaves_free() as usize, LEAVES - self.leaves());
        assert_eq!(onodes.evictable() as usize, self.lru.len());
        let kept = self.known.values().filter(|known| !known.evictable()).map(Known::units);
        assert_eq!(onodes.units_unevictable(), kept.sum::<u32>());
        let used = self.known.values().map(Known::units).sum();
        assert!(onodes.units_used() == used && onodes.units_held() >= used);
        assert_eq!(onodes.victim(), self.lru.back().map(|key| self.known[key].slot));
        assert_eq!(onodes.counters().evictions, self.evictions);
        let mut used: Vec<_> = self.known.values().map(|known| known.slot).collect();
        used.sort_unstable();
        assert!(onodes.iter().eq(used.iter().copied()));
        for volume in 0..3 {
            for object in 0..8 {
                let known = self.known.get(&(volume, object));
                let found = onodes.lookup(VolumeId(volume), object);
                assert_eq!(found, known.map(|known| known.slot));
            }
        }
        let mut leaves = Vec::new();
        for ((volume, object), known) in &self.known {
            let onode = onodes.get(known.slot);
            assert_eq!((onode.volume.0, onode.object, onode.pins), (*volume, *object, known.pins));
            for position in 0..ONODE_LEAVES as u8 {
                let block = u16::from(position) * LEAF_BLOCKS as u16 + 5;
                let leaf = known.leaves.get(&position);
                assert_eq!(onodes.block(known.slot, block), leaf.map(|(leaf, _)| (*leaf, 5)));
                let Some((leaf, shadow)) = leaf else { continue };
                assert_eq!(onodes.leaf(*leaf).shadow, shadow.unwrap_or(NIL));
                for slot in [Some(*leaf), *shadow].into_iter().flatten() {
                    let found = onodes.leaf(slot);
                    assert_eq!((found.onode, found.position), (known.slot, position));
                    assert_eq!(found.is_shadow, Some(slot) == *shadow);
                    leaves.push(slot);
                }
            }
        }
        leaves.sort_unstable();
        leaves.dedup();
        assert_eq!(leaves.len(), self.leaves(), "each leaf is used once");
    }
}

/// One random step, in the table and in the model.
fn step(random: &mut Random, onodes: &mut Onodes<'_>, model: &mut Model) {
    let keys: Vec<Key> = model.known.keys().copied().collect();
    let Some(key) = random.pick(&keys) else { return create(random, onodes, model) };
    let known = model.known.get_mut(&key).expect("picked");
    let slot = known.slot;
    match random.below(12) {
        10 => return pack_onode(onodes, model),
        11 => return pack_leaf(onodes, model),
        0 | 1 => return create(random, onodes, model),
        2 => {
            onodes.pin(slot);
            known.pins += 1;
        }
        3 | 4 => {
            if known.pins > 0 {
                onodes.unpin(slot);
                known.pins -= 1;
            }
        }
        5 => {
            known.dirty = !known.dirty;
            known.listed = known.dirty && random.below(2) == 0;
            let onode = onodes.get_mut(slot);
            onode.dirty_blocks = 0;
            onode.hole_dirty = [false; 2];
            let parity = random.below(2) as usize;
            match random.below(2) {
                0 => onode.dirty_blocks = u32::from(known.dirty) * 3,
                _ => onode.hole_dirty[parity] = known.dirty,
            }
            onode.listed = [known.listed, false];
            onodes.settle(slot);
        }
        6 | 7 => return add_leaf(random, onodes, model, key),
        8 => return drop_leaf(random, onodes, model, key),
        _ => return evict(onodes, model),
    }
    model.settle(key);
}

fn create(random: &mut Random, onodes: &mut Onodes<'_>, model: &mut Model) {
    let key = (random.below(3) as u32, random.below(8) as u32);
    if model.known.contains_key(&key) {
        return;
    }
    let found = onodes.create(VolumeId(key.0), key.1);
    assert_eq!(found.is_some(), model.known.len() < ONODES);
    if let Some(slot) = found {
        let onode = onodes.get(slot);
        assert!(!onode.hole && !onode.is_dirty() && onode.leaves.iter().all(|leaf| *leaf == NIL));
        model.known.insert(key, Known { slot, pins: 1, ..Known::default() });
    }
}

fn add_leaf(random: &mut Random, onodes: &mut Onodes<'_>, model: &mut Model, key: Key) {
    let free = model.leaves() < LEAVES;
    let known = model.known.get_mut(&key).expect("picked");
    let position = random.below(6) as u8;
    let block = u16::from(position) * LEAF_BLOCKS as u16 + random.below(16) as u16;
    let had = known.leaves.get(&position).copied();
    let found = onodes.leaf_for(known.slot, block);
    assert_eq!(found.is_some(), had.is_some() || free);
    let Some((leaf, index)) = found else { return };
    assert_eq!(index, usize::from(block) % LEAF_BLOCKS);
    let Some((old, shadow)) = had else {
        assert!(onodes.leaf(leaf).is_empty());
        known.leaves.insert(position, (leaf, None));
        return;
    };
    assert_eq!(leaf, old);
    let made = onodes.shadow_for(leaf);
    match shadow {
        Some(shadow) => assert_eq!(made, Some(shadow)),
        None => {
            assert_eq!(made.is_some(), free);
            known.leaves.insert(position, (leaf, made));
        }
    }
}

fn drop_leaf(random: &mut Random, onodes: &mut Onodes<'_>, model: &mut Model, key: Key) {
    let known = model.known.get_mut(&key).expect("picked");
    let positions: Vec<u8> = known.leaves.keys().copied().collect();
    let Some(position) = random.pick(&positions) else { return };
    let (leaf, shadow) = known.leaves[&position];
    // A leaf that says something stays.
    onodes.leaf_mut(leaf).zero = 1 << random.below(16);
    assert!(!onodes.free_if_empty(leaf));
    onodes.leaf_mut(leaf).zero = 0;
    assert_eq!(onodes.free_if_empty(leaf), shadow.is_none());
    match shadow {
        Some(shadow) => {
            assert!(!onodes.free_if_empty(shadow), "a shadow goes with its leaf's word only");
            onodes.free_shadow(leaf);
            known.leaves.insert(position, (leaf, None));
        }
        None => {
            known.leaves.remove(&position);
        }
    }
}

/// The last slot is free, or its onode is evictable and moves below: the table is one shorter.
fn pack_onode(onodes: &mut Onodes<'_>, model: &mut Model) {
    let Some(last) = onodes.slots().checked_sub(1) else { return };
    let key = model.known.iter().find(|(_, known)| known.slot == last).map(|(key, _)| *key);
    let room = (model.known.len() as u32) < onodes.slots();
    let movable = key.is_none_or(|key| room && model.known[&key].evictable());
    assert_eq!(onodes.pack_onode(), movable);
    assert_eq!(onodes.slots(), last + u32::from(!movable));
    if let (true, Some(key)) = (movable, key) {
        let slot = onodes.lookup(VolumeId(key.0), key.1).expect("it has moved");
        assert!(slot < last && model.known.values().all(|known| known.slot != slot));
        model.known.get_mut(&key).expect("found").slot = slot;
    }
}

/// Free leaves at the end go; the last one in use moves to a free one.
fn pack_leaf(onodes: &mut Onodes<'_>, model: &mut Model) {
    let top = onodes.top_leaf();
    let held = onodes.units_held() - ONODE_UNITS * onodes.slots();
    assert_eq!(top.is_some(), model.leaves() > 0 && held as usize > model.leaves());
    let Some((from, to)) = top else { return };
    assert_eq!(from + 1, held);
    let onode = onodes.leaf(from).onode;
    if onodes.get(onode).pins > 0 {
        return;
    }
    onodes.leaf_mut(from).crc[3] = 77;
    onodes.move_leaf(from, to);
    assert_eq!(onodes.leaf(to).crc[3], 77);
    let leaves = model.known.values_mut().flat_map(|known| known.leaves.values_mut());
    for (leaf, shadow) in leaves {
        for slot in [Some(leaf), shadow.as_mut()].into_iter().flatten() {
            if *slot == from {
                *slot = to;
            }
        }
    }
}

fn evict(onodes: &mut Onodes<'_>, model: &mut Model) {
    let Some(victim) = onodes.victim() else { return };
    let key = model.lru.pop_back().expect("the table has a victim");
    let known = model.known.remove(&key).expect("on the list");
    assert_eq!(known.slot, victim);
    for (leaf, shadow) in known.leaves.into_values() {
        if shadow.is_some() {
            onodes.free_shadow(leaf);
        }
        assert!(onodes.free_if_empty(leaf));
    }
    onodes.remove(victim);
    model.evictions += 1;
}

#[test]
fn random_steps_agree_with_a_model() {
    for seed in 0..40 {
        let mut random = Random(seed);
        let mut storage = OnodeStorage::new(ONODES);
        let mut onodes = Onodes::new(&mut storage, LEAVES);
        let mut model = Model::default();
        for _ in 0..800 {
            step(&mut random, &mut onodes, &mut model);
            model.check(&mut onodes);
        }
        assert!(model.evictions > 0);
    }
}

#[test]
fn objects_that_differ_in_any_part_are_told_apart() {
    let mut storage = OnodeStorage::new(64);
    let mut onodes = Onodes::new(&mut storage, 1);
    let key = |index: u32| (VolumeId(1 << (index % 8)), 1 << (index / 8 * 4));
    for index in 0..64 {
        let (volume, object) = key(index);
        assert_eq!(onodes.lookup(volume, object), None);
        assert_eq!(onodes.create(volume, object), Some(index));
    }
    assert_eq!(onodes.create(VolumeId(0), 0), None, "the table is full");
    for index in 0..64 {
        let (volume, object) = key(index);
        assert_eq!(onodes.lookup(volume, object), Some(index));
    }
    assert_eq!((onodes.counters().hits, onodes.counters().misses), (64, 64));
    assert_eq!(onodes.victim(), None, "all are pinned");
}

#[test]
#[should_panic(expected = "nobody holds")]
fn an_unpin_too_much_is_seen() {
    let mut storage = OnodeStorage::new(1);
    let mut onodes = Onodes::new(&mut storage, 1);
    let onode = onodes.create(VolumeId(1), 1).expect("a free slot");
    onodes.unpin(onode);
    onodes.unpin(onode);
}
