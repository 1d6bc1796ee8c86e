//! A disk with a volatile cache, as an NBD server. SIGKILL is the power cut.
//!
//! What is durable is in a file. A write that has no FUA, and no flush behind it, stays in this
//! process, but each of its sectors goes to the file at once with a chosen probability, as a
//! drive's cache gives up what it likes: so what is left after a cut is torn and out of order. A
//! *lying* disk says yes to FUA and flush and does nothing for it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, ErrorKind, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};

use heeler_core::wire::nbd::{
    CLIENT_FLAGS_BYTES, EXPORT_NAME_PADDING, GREETING_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC,
    OptionHeader, REQUEST_BYTES, RequestHeader, SIMPLE_REPLY_MAGIC, answer, command, errno, flag,
    handshake, info, option, transmission,
};
use heeler_hw::sim::Rng;

const SECTOR: usize = 512;
/// The longest request, and the longest option, that is taken.
const REQUEST_BYTES_MAX: u32 = 32 << 20;
const OPTION_BYTES_MAX: u32 = 4096;
const FLAGS: u16 = transmission::HAS_FLAGS | transmission::SEND_FLUSH | transmission::SEND_FUA;

struct Disk {
    file: File,
    bytes: u64,
    /// Sectors that a power cut would take.
    volatile: BTreeMap<u64, [u8; SECTOR]>,
    /// So many of 100 sectors do not stay in `volatile`.
    evict: u64,
    rng: Rng,
    lying: bool,
}

impl Disk {
    fn read(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, at)?;
        let first = at / SECTOR as u64;
        let sectors = first..first + (bytes.len() / SECTOR) as u64;
        for (sector, content) in self.volatile.range(sectors) {
            let at = (sector - first) as usize * SECTOR;
            bytes[at..at + SECTOR].copy_from_slice(content);
        }
        Ok(())
    }

    fn write(&mut self, at: u64, bytes: &[u8], durable: bool) -> io::Result<()> {
        let durable = durable && !self.lying;
        for (sector, content) in (at / SECTOR as u64..).zip(bytes.chunks_exact(SECTOR)) {
            if durable || self.rng.chance(self.evict, 100) {
                self.volatile.remove(&sector);
                self.file.write_all_at(content, sector * SECTOR as u64)?;
            } else {
                self.volatile.insert(sector, content.try_into().expect("a sector"));
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.lying {
            return Ok(());
        }
        for (sector, content) in &self.volatile {
            self.file.write_all_at(content, sector * SECTOR as u64)?;
        }
        self.volatile.clear();
        Ok(())
    }

    /// Carries out a request; what is read goes into `payload`, what is written comes from it.
    fn handle(&mut self, request: &RequestHeader, payload: &mut [u8]) -> Result<(), u32> {
        let (at, bytes) = (request.offset, u64::from(request.len));
        let whole = (at | bytes).is_multiple_of(SECTOR as u64);
        if !whole || at.checked_add(bytes).is_none_or(|end| end > self.bytes) {
            return Err(errno::EINVAL);
        }
        let done = match request.command {
            command::READ => self.read(at, payload),
            command::WRITE => self.write(at, payload, request.flags & flag::FUA != 0),
            command::FLUSH => self.flush(),
            _ => return Err(errno::EINVAL),
        };
        done.map_err(|_| errno::EIO)
    }
}

/// Serves the file, whose size is the disk's, to one client after the other.
pub(crate) fn serve(
    socket: &str,
    path: &str,
    evict: u64,
    seed: u64,
    lying: bool,
) -> Result<(), String> {
    let file = File::options().read(true).write(true).open(path);
    let file = file.map_err(|error| format!("{path}: {error}"))?;
    let bytes = file.metadata().map_err(|error| format!("{path}: {error}"))?.len();
    let volatile = BTreeMap::new();
    let mut disk = Disk { file, bytes, volatile, evict, rng: Rng::new(seed), lying };
    let _ = fs::remove_file(socket);
    let listener = UnixListener::bind(socket).map_err(|error| format!("{socket}: {error}"))?;
    for client in listener.incoming() {
        let done = client.and_then(|client| attend(client, &mut disk));
        if let Err(error) = done {
            eprintln!("a connection has ended: {error}");
        }
    }
    Ok(())
}

fn attend(client: UnixStream, disk: &mut Disk) -> io::Result<()> {
    let mut from = BufReader::with_capacity(1 << 18, client.try_clone()?);
    let mut to = BufWriter::with_capacity(1 << 18, client);
    if !haggle(&mut from, &mut to, disk.bytes)? {
        return Ok(());
    }
    let mut payload = Vec::new();
    loop {
        // Before it waits for more, the client has all its answers.
        if from.buffer().is_empty() {
            to.flush()?;
        }
        let header: [u8; REQUEST_BYTES] = take(&mut from)?;
        let request = RequestHeader::decode(&header).map_err(|_| ErrorKind::InvalidData)?;
        if request.command == command::DISC {
            return Ok(());
        }
        let moves = matches!(request.command, command::READ | command::WRITE);
        if moves && request.len > REQUEST_BYTES_MAX {
            return Err(ErrorKind::InvalidData.into());
        }
        payload.resize(if moves { request.len as usize } else { 0 }, 0);
        if request.command == command::WRITE {
            from.read_exact(&mut payload)?;
        }
        let done = disk.handle(&request, &mut payload);
        to.write_all(&SIMPLE_REPLY_MAGIC.to_be_bytes())?;
        to.write_all(&done.err().unwrap_or(0).to_be_bytes())?;
        to.write_all(&request.cookie.to_be_bytes())?;
        if request.command == command::READ && done.is_ok() {
            to.write_all(&payload)?;
        }
    }
}

fn take<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// The negotiation; whether requests follow.
fn haggle(from: &mut impl Read, to: &mut impl Write, bytes: u64) -> io::Result<bool> {
    to.write_all(&GREETING_MAGIC.to_be_bytes())?;
    to.write_all(&OPTION_MAGIC.to_be_bytes())?;
    to.write_all(&(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES).to_be_bytes())?;
    to.flush()?;
    let flags = u32::from_be_bytes(take::<CLIENT_FLAGS_BYTES>(from)?);
    let mut export = [0; 10];
    export[..8].copy_from_slice(&bytes.to_be_bytes());
    export[8..].copy_from_slice(&FLAGS.to_be_bytes());
    loop {
        let header = OptionHeader::decode(&take(from)?).map_err(|_| ErrorKind::InvalidData)?;
        let OptionHeader { option: kind, len } = header;
        if len > OPTION_BYTES_MAX {
            return Err(ErrorKind::InvalidData.into());
        }
        from.read_exact(&mut vec![0; len as usize])?;
        let mut reply = |reply: u32, data: &[u8]| {
            to.write_all(&OPTION_REPLY_MAGIC.to_be_bytes())?;
            to.write_all(&kind.to_be_bytes())?;
            to.write_all(&reply.to_be_bytes())?;
            to.write_all(&(data.len() as u32).to_be_bytes())?;
            to.write_all(data)
        };
        match kind {
            option::INFO | option::GO => {
                reply(answer::INFO, &[&info::EXPORT.to_be_bytes(), &export[..]].concat())?;
                reply(answer::ACK, &[])?;
            }
            option::ABORT => reply(answer::ACK, &[])?,
            option::EXPORT_NAME => {
                to.write_all(&export)?;
                if flags & u32::from(handshake::NO_ZEROES) == 0 {
                    to.write_all(&[0; EXPORT_NAME_PADDING])?;
                }
            }
            _ => reply(answer::ERR_UNSUP, &[])?,
        }
        to.flush()?;
        match kind {
            option::GO | option::EXPORT_NAME => return Ok(true),
            option::ABORT => return Ok(false),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(evict: u64, lying: bool) -> Disk {
        let name = format!("rig-tool-disk-{}-{evict}-{lying}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let file = File::create_new(&path).expect("a file").set_len(1 << 20);
        file.expect("its size");
        let file = File::options().read(true).write(true).open(&path).expect("it is there");
        // It lives on as long as it is open.
        fs::remove_file(&path).expect("it is there");
        Disk { file, bytes: 1 << 20, volatile: BTreeMap::new(), evict, rng: Rng::new(3), lying }
    }

    fn request(disk: &mut Disk, command: u16, flags: u16, sector: u64, payload: &mut [u8]) {
        let (offset, len) = (sector * SECTOR as u64, payload.len() as u32);
        let header = RequestHeader { flags, command, cookie: 1, offset, len };
        disk.handle(&header, payload).expect("carried out");
    }

    /// Sectors of the file, which is what a power cut leaves, that were written.
    fn left(disk: &Disk) -> usize {
        let mut bytes = vec![0; 1 << 20];
        disk.file.read_exact_at(&mut bytes, 0).expect("read");
        bytes.chunks(SECTOR).filter(|sector| sector[0] == 7).count()
    }

    #[test]
    fn a_cut_takes_what_was_not_flushed() {
        let mut disk = disk(0, false);
        request(&mut disk, command::WRITE, 0, 8, &mut [7; 8 * SECTOR]);
        let mut seen = [0; 10 * SECTOR];
        request(&mut disk, command::READ, 0, 7, &mut seen);
        assert!(
            seen[0] == 0 && seen[SECTOR] == 7 && seen[8 * SECTOR] == 7 && seen[9 * SECTOR] == 0
        );
        assert_eq!(left(&disk), 0);
        request(&mut disk, command::WRITE, flag::FUA, 64, &mut [7; 2 * SECTOR]);
        assert_eq!(left(&disk), 2);
        request(&mut disk, command::FLUSH, 0, 0, &mut []);
        assert_eq!(left(&disk), 10);
    }

    #[test]
    fn some_sectors_go_at_once() {
        let mut disk = disk(40, false);
        request(&mut disk, command::WRITE, 0, 0, &mut [7; 1000 * SECTOR]);
        assert!((300..500).contains(&left(&disk)), "{}", left(&disk));
    }

    #[test]
    fn a_lying_disk_loses_all() {
        let mut disk = disk(0, true);
        request(&mut disk, command::WRITE, flag::FUA, 8, &mut [7; 8 * SECTOR]);
        request(&mut disk, command::FLUSH, 0, 0, &mut []);
        assert_eq!(left(&disk), 0);
    }

    #[test]
    fn what_lies_beyond_or_between_is_refused() {
        let mut disk = disk(0, false);
        for (offset, len) in [(1 << 20, 512), (u64::MAX - 511, 512), (100, 512), (0, 100)] {
            let (flags, command) = (0, command::WRITE);
            let header = RequestHeader { flags, command, cookie: 1, offset, len };
            let mut payload = vec![0; len as usize];
            assert_eq!(disk.handle(&header, &mut payload), Err(errno::EINVAL));
        }
    }
}
