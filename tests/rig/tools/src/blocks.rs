//! A block device under a load that says, for every block, which versions of it may be found.
//!
//! A block's *floor* is the newest version that a flush covered, or that was written with FUA; its
//! *ceiling* is the newest that was ever asked for. After a power cut every block must be, whole,
//! of a version between. What was found then is its floor from then on: a disk does not forget
//! what it has shown after a power cut.
//!
//! Writes are of 1 to 16 blocks of 4 KiB. Each thread has blocks of its own, groups that are spread
//! over the device, and reads them back now and then.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use heeler_hw::AlignedBuf;
use heeler_hw::sim::Rng;

const BLOCK: usize = 4096;
const THREADS: usize = 4;
/// Groups of a thread.
const GROUPS: usize = 24;
/// Blocks of a group.
const GROUP: usize = 16;
/// Bytes from one group to the next one on the device.
const STRIDE: u64 = 1 << 20;
const MAGIC: u64 = 0x7067_6972_6b63_6f6c;

/// The versions of a block that may be found.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Known {
    floor: u64,
    ceiling: u64,
}

/// What is known of all blocks; thread by thread, group by group.
type Knowledge = Vec<Known>;

const BLOCKS: usize = THREADS * GROUPS * GROUP;

/// Where a block is on the device.
fn place(block: usize) -> u64 {
    let (thread, group) = (block / (GROUPS * GROUP), block / GROUP % GROUPS);
    (group * THREADS + thread) as u64 * STRIDE + (block % GROUP * BLOCK) as u64
}

/// The content of a version of a block. Version 0 is what a new device has: zeroes.
fn content(block: usize, version: u64) -> Vec<u8> {
    let mut content = vec![0; BLOCK];
    if version > 0 {
        Rng::new(version << 20 | block as u64).fill(&mut content[24..]);
        for (field, value) in content.chunks_mut(8).zip([MAGIC, block as u64, version]) {
            field.copy_from_slice(&value.to_le_bytes());
        }
    }
    content
}

/// The version that these bytes are of a block, if they are one.
fn version(block: usize, bytes: &[u8]) -> Option<u64> {
    let version = u64::from_le_bytes(bytes[16..24].try_into().expect("8 bytes"));
    (bytes == content(block, version)).then_some(version)
}

fn load(state: &str) -> Result<Knowledge, String> {
    let text = match fs::read_to_string(state) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(vec![Known::default(); BLOCKS]);
        }
        read => read.map_err(|error| format!("{state}: {error}"))?,
    };
    let known = text.lines().map(|line| {
        let (floor, ceiling) = line.split_once(' ')?;
        Some(Known { floor: floor.parse().ok()?, ceiling: ceiling.parse().ok()? })
    });
    let known: Option<Knowledge> = known.collect();
    known.filter(|known| known.len() == BLOCKS).ok_or(format!("{state} is no such file"))
}

fn save(state: &str, known: &[Known]) -> Result<(), String> {
    let mut text = String::new();
    for known in known {
        writeln!(text, "{} {}", known.floor, known.ceiling).expect("a string takes it");
    }
    fs::write(state, text).map_err(|error| format!("{state}: {error}"))
}

/// Opens without the page cache.
fn open(device: &str, flags: i32) -> Result<File, String> {
    let mut options = File::options();
    options.read(true).write(true).custom_flags(libc::O_DIRECT | flags);
    options.open(device).map_err(|error| format!("{device}: {error}"))
}

/// How a thread's work ended.
#[derive(PartialEq, Eq, Debug)]
enum End {
    /// By its own time.
    Time,
    /// The device failed.
    Failed,
    /// A block was not what it was written to be, while nothing had failed.
    Wrong(String),
}

struct Writer<'a> {
    /// Its first block.
    first: usize,
    /// Of its own blocks.
    known: &'a mut [Known],
    newest: u64,
    plain: File,
    /// Opened with O_DSYNC: its writes have FUA.
    durable: File,
    buf: AlignedBuf,
    rng: Rng,
}

impl Writer<'_> {
    fn run(&mut self, end: Instant, failed: &AtomicBool) -> End {
        while Instant::now() < end {
            let done = match self.rng.below(20) {
                0..9 => self.write(false),
                9..12 => self.write(true),
                12..16 => self.flush(),
                _ => match self.read() {
                    Ok(Some(wrong)) => return End::Wrong(wrong),
                    read => read.map(|_| ()),
                },
            };
            // A device that has failed one of them has failed: nobody writes to it any longer.
            if done.is_err() || failed.load(Ordering::Relaxed) {
                failed.store(true, Ordering::Relaxed);
                return End::Failed;
            }
        }
        End::Time
    }

    fn write(&mut self, durable: bool) -> io::Result<()> {
        let group = self.rng.index(GROUPS);
        let from = self.rng.index(GROUP);
        let count = 1 + self.rng.index(GROUP - from);
        let blocks = group * GROUP + from..group * GROUP + from + count;
        self.newest += 1;
        self.buf = AlignedBuf::zeroed(count);
        for (index, bytes) in blocks.clone().zip(self.buf.chunks_mut(BLOCK)) {
            bytes.copy_from_slice(&content(self.first + index, self.newest));
            self.known[index].ceiling = self.newest;
        }
        let file = if durable { &self.durable } else { &self.plain };
        file.write_all_at(&self.buf, place(self.first + blocks.start))?;
        if durable {
            self.known[blocks].iter_mut().for_each(|known| known.floor = known.ceiling);
            println!("safe {}", self.newest);
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.plain.sync_data()?;
        self.known.iter_mut().for_each(|known| known.floor = known.ceiling);
        println!("safe {}", self.newest);
        Ok(())
    }

    /// Reads a group; what is wrong with it.
    fn read(&mut self) -> io::Result<Option<String>> {
        let first = self.rng.index(GROUPS) * GROUP;
        self.buf = AlignedBuf::zeroed(GROUP);
        self.plain.read_exact_at(&mut self.buf, place(self.first + first))?;
        for (index, bytes) in (first..).zip(self.buf.chunks(BLOCK)) {
            let (block, wanted) = (self.first + index, self.known[index].ceiling);
            let found = version(block, bytes);
            if found != Some(wanted) {
                return Ok(Some(format!("block {block} is {found:?}, written was {wanted}")));
            }
        }
        Ok(None)
    }
}

/// Writes until the device fails, or for so many seconds, and prints a line whenever something has
/// become safe; then keeps in the file `state` what must be there.
pub(crate) fn write(device: &str, state: &str, seconds: u64, seed: u64) -> Result<(), String> {
    let mut known = load(state)?;
    if known.iter().any(|known| known.floor != known.ceiling) {
        return Err(format!("{state}: check the device first"));
    }
    let newest = known.iter().map(|known| known.ceiling).max().expect("there are blocks");
    let end = Instant::now() + Duration::from_secs(seconds);
    let failed = AtomicBool::new(false);
    let mut rng = Rng::new(seed);
    let mut writers = Vec::new();
    for (thread, known) in known.chunks_mut(GROUPS * GROUP).enumerate() {
        writers.push(Writer {
            first: thread * GROUPS * GROUP,
            known,
            newest,
            plain: open(device, 0)?,
            durable: open(device, libc::O_DSYNC)?,
            buf: AlignedBuf::zeroed(1),
            rng: rng.fork(),
        });
    }
    let ends: Vec<End> = std::thread::scope(|scope| {
        let run = |mut writer: Writer<'_>, failed| writer.run(end, failed);
        let threads: Vec<_> = (writers.into_iter())
            .map(|writer| {
                let failed = &failed;
                scope.spawn(move || run(writer, failed))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("no thread panics")).collect()
    });
    save(state, &known)?;
    for end in &ends {
        if let End::Wrong(wrong) = end {
            return Err(wrong.clone());
        }
    }
    let sum = |field: fn(&Known) -> u64| known.iter().map(field).max().expect("there are blocks");
    let how = if ends.contains(&End::Failed) { "until the device failed" } else { "in time" };
    println!(
        "versions up to {} written {how}, up to {} are safe",
        sum(|known| known.ceiling),
        sum(|known| known.floor)
    );
    Ok(())
}

/// Whether every block is of a version that may be found; what was found is kept as what must be
/// there from now on.
pub(crate) fn check(device: &str, state: &str) -> Result<(), String> {
    let mut known = load(state)?;
    let file = open(device, 0)?;
    let mut wrong = Vec::new();
    let mut lost = 0;
    for first in (0..BLOCKS).step_by(GROUP) {
        let mut buf = AlignedBuf::zeroed(GROUP);
        let read = file.read_exact_at(&mut buf, place(first));
        read.map_err(|error| format!("{device}: at {}: {error}", place(first)))?;
        for (block, bytes) in (first..).zip(buf.chunks(BLOCK)) {
            let Known { floor, ceiling } = known[block];
            match version(block, bytes) {
                Some(found) if (floor..=ceiling).contains(&found) => {
                    lost += u64::from(found < ceiling);
                    known[block] = Known { floor: found, ceiling: found };
                }
                found => wrong.push(format!("block {block}: {found:?}, not {floor} to {ceiling}")),
            }
        }
    }
    if !wrong.is_empty() {
        wrong.truncate(20);
        return Err(wrong.join("\n"));
    }
    save(state, &known)?;
    let written = known.iter().filter(|known| known.ceiling > 0).count();
    println!("{written} blocks are what they may be; of {lost} the newest version is gone");
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// A file in a folder that does direct I/O, and one for what is known of it.
    struct Scratch([String; 2]);

    impl Scratch {
        fn new(name: &str) -> Self {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../target");
            fs::create_dir_all(&dir).expect("a folder");
            let name = format!("rig-tool-{name}-{}", std::process::id());
            let text = |end: &str| dir.join(format!("{name}{end}")).to_str().expect("ASCII").into();
            let scratch = Self([text(".img"), text(".state")]);
            let file = File::create(&scratch.0[0]).expect("a file");
            file.set_len(STRIDE * (THREADS * GROUPS) as u64).expect("its size");
            scratch
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            self.0.iter().for_each(|path| drop(fs::remove_file(path)));
        }
    }

    #[test]
    fn blocks_do_not_overlap() {
        let mut places: Vec<u64> = (0..BLOCKS).map(place).collect();
        places.sort_unstable();
        assert!(places.windows(2).all(|pair| pair[1] - pair[0] >= BLOCK as u64));
    }

    #[test]
    fn what_was_written_passes_and_what_went_back_does_not() {
        let scratch = Scratch::new("blocks");
        let [device, state] = &scratch.0;
        write(device, state, 1, 7).expect("writes");
        check(device, state).expect("it is all there");
        let known = load(state).expect("was saved");
        let block =
            known.iter().position(|known| known.ceiling > 1).expect("something was written");
        let newest = known[block].ceiling;
        let file = File::options().write(true).open(device).expect("it is there");
        let wrong = [content(block, newest - 1), content(block + 1, newest), vec![1; BLOCK]];
        for content in wrong {
            file.write_all_at(&content, place(block)).expect("written");
            assert!(check(device, state).unwrap_err().contains(&format!("block {block}:")));
        }
        file.write_all_at(&content(block, newest), place(block)).expect("written");
        check(device, state).expect("it is all there again");
        write(device, state, 1, 8).expect("goes on");
        check(device, state).expect("it is all there");
    }
}
