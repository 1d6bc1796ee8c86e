//! Salvage: names what a cache holds of a volume that it cannot push, and saves it to a file.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use heeler_core::ids::ShardId;
use heeler_core::shard::{DirtyKind, DirtyRun, SalvageAt};
use heeler_driver::control::{Event, VolumeStatus};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::{Lines, PROGRESS_EVERY, Server};
use crate::api::{Answer, DirtyRange, Salvaged, StrandedInfo};
use crate::lines::bytes;

/// Reads under way at the same time.
const READS_MAX: usize = 16;
/// Ranges that `volume info` names.
const NAMED_MAX: usize = 16;

/// Everything that is dirty of one volume, in order.
#[derive(Debug)]
pub(super) struct DirtyMap {
    object_blocks: u64,
    runs: Vec<(ShardId, DirtyRun)>,
}

impl DirtyMap {
    fn new(object_shift: u8, mut runs: Vec<(ShardId, DirtyRun)>) -> Self {
        // What was found twice is the same twice.
        runs.sort_unstable_by_key(|(_, run)| (run.object, run.first, run.count));
        runs.dedup_by_key(|(_, run)| (run.object, run.first));
        Self { object_blocks: (1 << object_shift) / bytes(1), runs }
    }

    /// Dirty blocks.
    pub(super) fn blocks(&self) -> u64 {
        self.runs.iter().map(|(_, run)| u64::from(run.count)).sum()
    }

    fn at(&self, run: &DirtyRun) -> u64 {
        bytes(u64::from(run.object) * self.object_blocks + u64::from(run.first))
    }

    /// (first byte, bytes, kind), in order, neighbours of a kind in one.
    fn ranges(&self) -> Vec<(u64, u64, DirtyKind)> {
        let mut ranges: Vec<(u64, u64, DirtyKind)> = Vec::new();
        for (_, run) in &self.runs {
            let (at, len) = (self.at(run), bytes(run.count.into()));
            match ranges.last_mut() {
                Some((from, so_far, kind)) if *from + *so_far == at && *kind == run.kind => {
                    *so_far += len;
                }
                _ => ranges.push((at, len, run.kind)),
            }
        }
        ranges
    }

    /// The same for people.
    pub(super) fn info(&self) -> StrandedInfo {
        let ranges = self.ranges();
        let named = |(offset_bytes, length_bytes, kind): &(u64, u64, DirtyKind)| DirtyRange {
            offset_bytes: *offset_bytes,
            length_bytes: *length_bytes,
            kind: name(*kind).into(),
        };
        StrandedInfo {
            bytes: bytes(self.blocks()),
            ranges: ranges.len() as u64,
            first: ranges.iter().take(NAMED_MAX).map(named).collect(),
        }
    }

    /// A line for each range: offset and length in bytes, and its kind.
    fn text(&self) -> String {
        let mut text = String::from("# offset length kind\n");
        for (at, len, kind) in self.ranges() {
            writeln!(text, "{at} {len} {}", name(kind)).expect("text grows");
        }
        text
    }

    fn bytes_of(&self, kind: DirtyKind) -> u64 {
        let runs = self.runs.iter().filter(|(_, run)| run.kind == kind);
        runs.map(|(_, run)| bytes(run.count.into())).sum()
    }
}

fn name(kind: DirtyKind) -> &'static str {
    match kind {
        DirtyKind::Data => "data",
        DirtyKind::Zero => "zero",
        DirtyKind::Lost => "lost",
    }
}

/// The files of a salvage. They go if they are not finished.
#[derive(Debug)]
struct Files {
    path: PathBuf,
    image: Arc<File>,
    map_path: PathBuf,
    map: Arc<File>,
    finished: bool,
}

impl Files {
    /// New files: what is there is never overwritten.
    fn create(path: &Path, bytes: u64) -> Result<Self, String> {
        let mut map_path = path.as_os_str().to_owned();
        map_path.push(".map");
        let map_path = PathBuf::from(map_path);
        let create = |path: &Path| {
            let made = File::options().write(true).create_new(true).open(path);
            made.map_err(|e| match e.kind() {
                io::ErrorKind::AlreadyExists => {
                    format!("{} exists: name another file", path.display())
                }
                _ => failed(path, &e),
            })
        };
        let image = Arc::new(create(path)?);
        let map = create(&map_path).inspect_err(|_| _ = fs::remove_file(path))?;
        let files =
            Self { path: path.into(), image, map_path, map: Arc::new(map), finished: false };
        files.image.set_len(bytes).map_err(|e| failed(path, &e))?;
        Ok(files)
    }

    /// Writes a part of the image.
    async fn write(&self, bytes: Vec<u8>, at: u64) -> Result<(), String> {
        let image = self.image.clone();
        let written = blocking(move || image.write_all_at(&bytes, at)).await;
        written.map_err(|e| failed(&self.path, &e))
    }

    /// Writes the list, and makes both files durable.
    async fn finish(mut self, list: String) -> Result<PathBuf, String> {
        let (image, map) = (self.image.clone(), self.map.clone());
        let done = blocking(move || {
            map.write_all_at(list.as_bytes(), 0)?;
            map.sync_all()?;
            image.sync_all()
        });
        done.await.map_err(|e| failed(&self.path, &e))?;
        self.finished = true;
        Ok(self.map_path.clone())
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        if !self.finished {
            let _ = fs::remove_file(&self.path);
            let _ = fs::remove_file(&self.map_path);
        }
    }
}

fn failed(path: &Path, e: &io::Error) -> String {
    format!("{}: {e}", path.display())
}

/// Does what may take long on another thread.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

/// A read under way.
type Reading = (ShardId, DirtyRun, oneshot::Receiver<Event>);

impl Server {
    /// All that is dirty of a volume that the shards know.
    pub(super) async fn dirty_map(&self, status: &VolumeStatus) -> DirtyMap {
        let mut found = Vec::new();
        for shard in (0..self.facts.shards).map(ShardId) {
            let mut at = Some(SalvageAt::default());
            while let Some(from) = at.take() {
                let ticket = self.control.borrow_mut().list_dirty(status.uuid, shard, from);
                let Some(ticket) = ticket else { break };
                if let Ok(Event::Dirty { runs, next, .. }) = self.wait_for(ticket).await {
                    found.extend(runs.into_iter().map(|run| (shard, run)));
                    at = next;
                }
            }
        }
        DirtyMap::new(status.object_shift, found)
    }

    /// Writes what is dirty of a volume that is not served to a sparse file, and a list of it.
    pub(super) async fn salvage(
        &self,
        name: &str,
        path: &Path,
        out: &mut Lines,
    ) -> Result<Salvaged, String> {
        let status = self.find(name);
        let status = status.ok_or_else(|| format!("this server has no volume '{name}'"))?;
        if !status.is_stranded() {
            return Err(format!(
                "volume '{name}' is {}, so there is nothing to salvage: that is for a volume which \
                 this server lost or was refused, with something dirty in its cache",
                status.state
            ));
        }
        let map = self.dirty_map(&status).await;
        if map.runs.is_empty() {
            return Err(format!("the cache holds nothing of '{name}' that was never pushed"));
        }
        let files = Files::create(path, bytes(status.blocks))?;
        let saved = self.save(&status, &map, &files, out).await?;
        let map = files.finish(saved.text()).await?;
        Ok(Salvaged {
            data_bytes: saved.bytes_of(DirtyKind::Data),
            zero_bytes: saved.bytes_of(DirtyKind::Zero),
            lost_bytes: saved.bytes_of(DirtyKind::Lost),
            ranges: saved.ranges().len() as u64,
            map,
        })
    }

    /// Reads what is in a map and writes it to the image. Gives the map back, with what could not
    /// be read as lost.
    async fn save(
        &self,
        status: &VolumeStatus,
        map: &DirtyMap,
        files: &Files,
        out: &mut Lines,
    ) -> Result<DirtyMap, String> {
        let is_data = |(_, run): &&(ShardId, DirtyRun)| run.kind == DirtyKind::Data;
        let mut left: VecDeque<_> = map.runs.iter().filter(is_data).copied().collect();
        let mut saved: Vec<_> = map.runs.iter().filter(|run| !is_data(run)).copied().collect();
        let mut reading: VecDeque<Reading> = VecDeque::new();
        let total_bytes = map.bytes_of(DirtyKind::Data);
        let mut done_bytes = 0;
        let mut told = Instant::now();
        loop {
            while reading.len() < READS_MAX
                && let Some((shard, run)) = left.pop_front()
            {
                let ticket = self.control.borrow_mut().read_dirty(status.uuid, shard, run);
                let gone = || format!("volume '{}' was removed", status.name);
                reading.push_back((shard, run, self.wait_for(ticket.ok_or_else(gone)?)));
            }
            let Some((shard, run, answer)) = reading.pop_front() else { break };
            match answer.await {
                Ok(Event::Salvaged { bytes: Some(bytes), .. }) => {
                    done_bytes += bytes.len() as u64;
                    files.write(bytes, map.at(&run)).await?;
                    saved.push((shard, run));
                }
                // One of them cannot be read: the others can, one by one.
                _ if run.count > 1 => {
                    left.extend((0..run.count).map(|block| {
                        (shard, DirtyRun { first: run.first + block, count: 1, ..run })
                    }))
                }
                _ => saved.push((shard, DirtyRun { kind: DirtyKind::Lost, ..run })),
            }
            if told.elapsed() >= PROGRESS_EVERY {
                told = Instant::now();
                out.send(&Answer::Progress { done_bytes, total_bytes }).await?;
            }
        }
        Ok(DirtyMap::new(status.object_shift, saved))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_one_range_across_shards_and_objects() {
        let run = |object, first, count, kind| DirtyRun { object, first, count, kind };
        let map = DirtyMap::new(
            16,
            vec![
                (ShardId(1), run(1, 0, 2, DirtyKind::Data)),
                (ShardId(0), run(0, 12, 4, DirtyKind::Data)),
                (ShardId(1), run(1, 0, 2, DirtyKind::Data)),
                (ShardId(1), run(1, 2, 1, DirtyKind::Zero)),
                (ShardId(0), run(3, 15, 1, DirtyKind::Lost)),
            ],
        );
        assert_eq!(map.blocks(), 8);
        assert_eq!(
            map.text(),
            "# offset length kind\n49152 24576 data\n73728 4096 zero\n258048 4096 lost\n"
        );
        assert_eq!(map.info().ranges, 3);
    }
}
