//! What the store holds of a volume, counted from nothing: which packs its image and its snapshots
//! need, and what nobody does: orphans of pushes that were never committed.
//!
//! It runs beside pushes and checkpoints, one read at a time.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::string::String;
use alloc::vec::Vec;

use super::held::fault;
use super::store::{Call, Fault, Io, Request, Task};
use super::usage::Usage;
use super::{Listed, StoreResult};
use crate::ids::Epoch;
use crate::wire::head::{Head, PageRef, Snapshot};
use crate::wire::map_page::{MapPage, PackRef};
use crate::wire::names::{self, ObjectName};

#[derive(Debug)]
pub(super) struct Scan {
    /// Objects of later epochs were not in the list for sure.
    newest: Epoch,
    listed: bool,
    map_objects: Vec<(u32, Epoch)>,
    old_heads: Vec<u32>,
    /// Pages of the newest image that have not been counted.
    todo: BTreeSet<u32>,
    /// Snapshots that have not been looked at, and the pages of one that have not.
    snapshots: Vec<u32>,
    of_snapshot: BTreeMap<(u32, Epoch), Epoch>,
    /// Versions of map pages that something needs.
    needed: BTreeSet<(u32, Epoch)>,
    /// Its one operation is under way.
    busy: bool,
}

impl Scan {
    pub(super) fn start(io: &mut Io<'_>, head: &Head) -> Self {
        io.start(Task::ScanList, Call::List(names::volume_prefix(head.volume)));
        Self {
            newest: head.epoch,
            listed: false,
            map_objects: Vec::new(),
            old_heads: Vec::new(),
            todo: head.pages.keys().copied().collect(),
            snapshots: head.snapshots.iter().map(|snapshot| snapshot.number).collect(),
            of_snapshot: BTreeMap::new(),
            needed: BTreeSet::new(),
            busy: true,
        }
    }

    /// Whether a page of the newest image is among those that have been counted.
    pub(super) fn has_counted(&self, page: u32) -> bool {
        !self.todo.contains(&page)
    }

    /// The end of one of its operations.
    pub(super) fn handle_done(
        &mut self,
        io: &mut Io<'_>,
        head: &Head,
        usage: &mut Usage,
        request: Request,
        result: StoreResult<'_>,
    ) {
        self.busy = false;
        let again = match (request.task, result) {
            (Task::ScanList, StoreResult::Listed(keys)) => {
                self.list(head, usage, keys);
                None
            }
            (Task::ScanHead { number }, result) => {
                let is_snapshot = |snapshot: &Snapshot| snapshot.number == number;
                let decoded = match result {
                    StoreResult::Got(bytes) => {
                        Head::decode(bytes, head.volume, number, io.config.crc32c).ok()
                    }
                    _ => None,
                };
                match decoded {
                    Some(kept) => {
                        self.take_snapshot(usage, &kept);
                        None
                    }
                    // Without it nothing can be said; it may have been dropped meanwhile.
                    None => head.snapshots.iter().any(is_snapshot).then(|| fault(result)),
                }
            }
            (Task::ScanPage { page, at, snapshot }, StoreResult::Got(bytes)) => {
                let volumes = (&head.volumes()[..], at.source);
                match MapPage::decode(bytes, volumes, page, at.epoch, io.config.crc32c) {
                    Ok(found) => {
                        match snapshot {
                            None => self.count(head, usage, page, at, &found),
                            Some(epoch) => {
                                let packs = own(&found);
                                let names = packs.iter().map(|(pack, _)| (pack.epoch, pack.n));
                                names.for_each(|name| usage.note_snapshot(name, epoch));
                            }
                        }
                        None
                    }
                    Err(_) => Some(Fault::WRONG),
                }
            }
            // Superseded, or of a snapshot that was dropped, while it was on its way.
            (Task::ScanPage { page, at, snapshot: None }, StoreResult::NotFound)
                if head.pages.get(&page) != Some(&at) =>
            {
                None
            }
            (Task::ScanPage { snapshot: Some(_), .. }, StoreResult::NotFound) => None,
            (_, result) => Some(fault(result)),
        };
        if let Some(fault) = again {
            self.busy = true;
            io.again(request, fault);
        }
    }

    fn list(&mut self, head: &Head, usage: &mut Usage, keys: &[Listed<'_>]) {
        self.listed = true;
        for Listed { key, bytes } in keys {
            match names::parse_key(key) {
                Some((volume, _)) if volume != head.volume => {}
                Some((_, ObjectName::Pack { epoch, n })) => usage.add(epoch, n, *bytes),
                Some((_, ObjectName::Map { page, epoch })) => self.map_objects.push((page, epoch)),
                // Between the owner's claim and its newest head there are no other claims.
                Some((_, ObjectName::Head { number }))
                    if head.term < number && number < head.number =>
                {
                    self.old_heads.push(number);
                }
                _ => {}
            }
        }
        for pack in head.tail.iter().filter(|pack| pack.source == 0) {
            usage.enter_tail(pack.epoch, pack.n);
        }
    }

    /// Only what is the newest still counts: a page that changed meanwhile is read again.
    fn count(&mut self, head: &Head, usage: &mut Usage, page: u32, at: PageRef, found: &MapPage) {
        if head.pages.get(&page) == Some(&at) && self.todo.remove(&page) {
            usage.count(&own(found));
        }
        if at.source == 0 {
            self.needed.insert((page, at.epoch));
        }
    }

    fn take_snapshot(&mut self, usage: &mut Usage, kept: &Head) {
        for pack in kept.tail.iter().filter(|pack| pack.source == 0) {
            usage.note_snapshot((pack.epoch, pack.n), kept.epoch);
        }
        for (&page, at) in kept.pages.iter().filter(|(_, at)| at.source == 0) {
            if self.needed.insert((page, at.epoch)) {
                self.of_snapshot.insert((page, at.epoch), kept.epoch);
            }
        }
    }

    /// Starts the next read. True when everything has been counted.
    pub(super) fn settle(&mut self, io: &mut Io<'_>, head: &Head) -> bool {
        if self.busy {
            return false;
        }
        self.todo.retain(|page| head.pages.contains_key(page));
        let (task, key) = if let Some(&page) = self.todo.first() {
            scan_page(head, page, head.pages[&page], None)
        } else if let Some(((page, epoch), snapshot)) = self.of_snapshot.pop_first() {
            scan_page(head, page, PageRef { source: 0, epoch }, Some(snapshot))
        } else if let Some(number) = self.snapshots.pop() {
            (Task::ScanHead { number }, names::head_key(head.volume, number))
        } else {
            return true;
        };
        self.busy = true;
        io.start(task, Call::Get(key));
        false
    }

    /// Everything has been counted: what nobody needs.
    /// `folding`: the epoch in the names of map pages that no head names yet.
    pub(super) fn finish(
        self,
        head: &Head,
        usage: &mut Usage,
        folding: Option<Epoch>,
    ) -> Vec<ObjectName> {
        let mut gone = usage.take_orphans(self.newest);
        let page_gone = |&&(page, epoch): &&(u32, Epoch)| {
            let newest = head.pages.get(&page);
            let current = newest.is_some_and(|at| at.source == 0 && at.epoch == epoch);
            let old = epoch <= self.newest && folding != Some(epoch);
            let needed = self.needed.contains(&(page, epoch)) || usage.has_page(page, epoch);
            old && !current && !needed
        };
        let pages = self.map_objects.iter().filter(page_gone);
        gone.extend(pages.map(|&(page, epoch)| ObjectName::Map { page, epoch }));
        let kept = |number: &u32| head.snapshots.iter().any(|snapshot| snapshot.number == *number);
        let heads = self.old_heads.into_iter().filter(|number| !kept(number));
        gone.extend(heads.map(|number| ObjectName::Head { number }));
        gone
    }
}

/// The volume's own packs in a page.
pub(super) fn own(page: &MapPage) -> Vec<(PackRef, u16)> {
    page.packs().filter(|(pack, _)| pack.source == 0).collect()
}

fn scan_page(head: &Head, page: u32, at: PageRef, snapshot: Option<Epoch>) -> (Task, String) {
    let key = names::map_key(head.volume_of(at.source), page, at.epoch);
    (Task::ScanPage { page, at, snapshot }, key)
}
