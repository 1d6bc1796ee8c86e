//! Image files: raw, by the operating system's own means, and qcow2, by the library imago.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use imago::file::File as Storage;
use imago::qcow2::Qcow2;
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, Mapping,
    Storage as _, StorageCreateOptions, StorageOpenOptions,
};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::extents::Extents;
use super::place::Format;

/// An open image file.
pub(crate) struct Image {
    path: PathBuf,
    size: u64,
    /// Changes whenever the file does.
    version: String,
    kind: Kind,
}

enum Kind {
    Raw(File),
    Qcow2 { access: FormatAccess<Storage>, file_bytes: u64 },
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Image {
    /// Opens an image to read it. Its content says what it is, unless that is given.
    pub(crate) fn open(path: &Path, format: Option<Format>) -> Result<Self, String> {
        let named = |text: String| format!("{}: {text}", path.display());
        let failed = |e: io::Error| named(e.to_string());
        let mut file = File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(named("this is neither a file nor a block device".into()));
        }
        // A block device has no length of its own.
        let file_bytes = file.seek(io::SeekFrom::End(0)).map_err(failed)?;
        let head = Head::read(&mut file).map_err(failed)?;
        let format = head.judge(path, format).map_err(named)?;
        let version = version_of(&metadata);
        let (kind, size) = match format {
            Format::Raw => (Kind::Raw(file), file_bytes),
            Format::Qcow2 => {
                head.check_qcow2().map_err(named)?;
                let access = open_qcow2(path, false).map_err(failed)?;
                let size = access.size();
                (Kind::Qcow2 { access, file_bytes }, size)
            }
        };
        if size == 0 {
            return Err(named("this is empty, and no image of a disk".into()));
        }
        let path = fs::canonicalize(path).map_err(failed)?;
        Ok(Self { path, size, version, kind })
    }

    /// Makes an empty image, in place of what is there.
    pub(crate) fn create(path: &Path, format: Format, size: u64) -> Result<Self, String> {
        let create = || -> io::Result<Kind> {
            Ok(match format {
                Format::Raw => {
                    let file = File::create(path)?;
                    file.set_len(size)?;
                    Kind::Raw(file)
                }
                Format::Qcow2 => {
                    let options = StorageCreateOptions::new().filename(path).overwrite(true);
                    let storage = Storage::create_open(options)?;
                    let image = Qcow2::<Storage>::create_builder(storage)
                        .size(size)
                        .create_open(DenyImplicitOpenGate::default(), |storage| {
                            Ok(Qcow2::<Storage>::builder(storage).backing(None).write(true))
                        })?;
                    Kind::Qcow2 { access: FormatAccess::new(image), file_bytes: 0 }
                }
            })
        };
        Self::to_write(path, size, create())
    }

    /// Opens an image that was made by [`Image::create`], to go on writing it.
    pub(crate) fn reopen(path: &Path, format: Format, size: u64) -> Result<Self, String> {
        let open = || -> io::Result<Kind> {
            Ok(match format {
                Format::Raw => Kind::Raw(File::options().write(true).open(path)?),
                Format::Qcow2 => Kind::Qcow2 { access: open_qcow2(path, true)?, file_bytes: 0 },
            })
        };
        Self::to_write(path, size, open())
    }

    fn to_write(path: &Path, size: u64, kind: io::Result<Kind>) -> Result<Self, String> {
        let kind = kind.map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(Self { path: path.into(), size, version: String::new(), kind })
    }

    /// Bytes of the disk.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Where it is: the path without links, when it was opened to be read.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Of an image that was opened to be read: what changes whenever the file does.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    /// Fails if the file has changed since it was opened to be read.
    pub(crate) fn check_unchanged(&self) -> Result<(), String> {
        let metadata = fs::metadata(&self.path).map_err(|e| self.failed("its time", &e))?;
        if version_of(&metadata) == self.version {
            return Ok(());
        }
        Err(format!("{} was changed while it was read", self.path.display()))
    }

    /// Where there is data.
    pub(crate) fn extents(&self) -> Result<Extents, String> {
        let found = match &self.kind {
            Kind::Raw(file) => raw_extents(file, self.size),
            Kind::Qcow2 { access, file_bytes } => qcow2_extents(access, *file_bytes),
        };
        found.map_err(|e| self.failed("where its data is", &e))
    }

    /// Reads bytes.
    pub(crate) fn read(&self, at: u64, len: usize) -> Result<Vec<u8>, String> {
        let mut data = vec![0; len];
        let done = match &self.kind {
            Kind::Raw(file) => file.read_exact_at(&mut data, at),
            Kind::Qcow2 { access, .. } => access.read(&mut data, at),
        };
        done.map_err(|e| self.failed(&format!("{len} bytes at {at}"), &e))?;
        Ok(data)
    }

    /// Writes bytes.
    pub(crate) fn write(&self, at: u64, data: &[u8]) -> Result<(), String> {
        let done = match &self.kind {
            Kind::Raw(file) => file.write_all_at(data, at),
            Kind::Qcow2 { access, .. } => access.write(data, at),
        };
        done.map_err(|e| self.failed(&format!("{} bytes at {at}", data.len()), &e))
    }

    /// Makes all that was written durable.
    pub(crate) fn flush(&self) -> Result<(), String> {
        let done = match &self.kind {
            Kind::Raw(file) => file.sync_data(),
            Kind::Qcow2 { access, .. } => access.flush().and_then(|()| access.sync()),
        };
        done.map_err(|e| self.failed("the flush", &e))
    }

    fn failed(&self, what: &str, e: &io::Error) -> String {
        format!("{}: {what}: {e}", self.path.display())
    }
}

fn version_of(metadata: &fs::Metadata) -> String {
    format!("{}.{:09}", metadata.mtime(), metadata.mtime_nsec())
}

fn open_qcow2(path: &Path, write: bool) -> io::Result<FormatAccess<Storage>> {
    let storage = Storage::open(StorageOpenOptions::new().filename(path).write(write))?;
    // Nothing that the image may name is opened: it could be any file of this machine.
    let image = Qcow2::<Storage>::builder(storage).backing(None).write(write);
    image.open(DenyImplicitOpenGate::default()).map(FormatAccess::new)
}

fn raw_extents(file: &File, size: u64) -> io::Result<Extents> {
    let mut found = Extents::default();
    let mut at = 0;
    while at < size {
        let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) => data.min(size),
            // No data from here on.
            Err(Errno::NXIO) => break,
            // The file system, or the device, does not know.
            Err(Errno::INVAL) => at,
            Err(e) => return Err(e.into()),
        };
        let hole = match rustix::fs::seek(file, SeekFrom::Hole(data)) {
            Ok(hole) => hole.min(size),
            Err(Errno::INVAL) => size,
            Err(e) => return Err(e.into()),
        };
        found.push(data, hole - data);
        at = hole;
    }
    Ok(found)
}

fn qcow2_extents(access: &FormatAccess<Storage>, file_bytes: u64) -> io::Result<Extents> {
    let mut found = Extents::default();
    let mut at = 0;
    while at < access.size() {
        let (mapping, len) = access.get_mapping(at, access.size() - at)?;
        match mapping {
            Mapping::Zero { .. } => {}
            // The library would read zeroes there.
            Mapping::Raw { offset, .. } if offset + len > file_bytes => {
                return Err(io::Error::other(
                    "the file is cut short: some of its data would be behind its end",
                ));
            }
            _ => found.push(at, len),
        }
        if len == 0 {
            return Err(io::Error::other("its map ends before the disk does"));
        }
        at += len;
    }
    Ok(found)
}

/// Bytes that the header of a qcow2 image has in its shortest form of version 3.
const HEAD_BYTES: usize = 104;

/// The beginning of an image file; zeroes, where it ends before.
struct Head([u8; HEAD_BYTES]);

/// Files that are surely no raw image, by how they begin.
const OTHERS: &[(&[u8], &str)] = &[
    (b"KDMV", "a VMDK image"),
    (b"# Disk DescriptorFile", "a VMDK image"),
    (b"vhdxfile", "a VHDX image"),
    (b"conectix", "a VHD image"),
    (b"<<< Oracle VM VirtualBox Disk Image >>>", "a VDI image"),
    (b"QED\0", "a QED image"),
    (b"\x1f\x8b\x08", "compressed by gzip"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd"),
    (b"\xfd7zXZ\0", "compressed by xz"),
    (b"BZh9", "compressed by bzip2"),
];

impl Head {
    fn read(file: &mut File) -> io::Result<Self> {
        let mut head = Vec::with_capacity(HEAD_BYTES);
        file.rewind()?;
        file.take(HEAD_BYTES as u64).read_to_end(&mut head)?;
        head.resize(HEAD_BYTES, 0);
        Ok(Self(head.try_into().expect("so many bytes")))
    }

    /// What the file is.
    fn judge(&self, path: &Path, asked: Option<Format>) -> Result<Format, String> {
        let qcow2 = self.0.starts_with(b"QFI\xfb");
        let named = Format::of_name(path) == Format::Qcow2;
        match asked {
            Some(Format::Raw) => return Ok(Format::Raw),
            Some(Format::Qcow2) if !qcow2 => return Err("this is no qcow2 image".into()),
            _ if qcow2 => return Ok(Format::Qcow2),
            _ if named => {
                return Err("this has the name of a qcow2 image, but is none; to take it as it \
                            is, say --format raw"
                    .into());
            }
            _ => {}
        }
        match OTHERS.iter().find(|(magic, _)| self.0.starts_with(magic)) {
            Some((_, what)) => Err(format!(
                "this is {what}, which heeler does not know: convert or unpack it before; to take \
                 it as it is, say --format raw"
            )),
            None => Ok(Format::Raw),
        }
    }

    fn number<const N: usize>(&self, at: usize) -> u64 {
        self.0[at..at + N].iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    /// Refuses what the library would not read as QEMU does, with a message that says what to do.
    fn check_qcow2(&self) -> Result<(), String> {
        const DIRTY: u64 = 1 << 0;
        const CORRUPT: u64 = 1 << 1;
        const EXTERNAL_DATA: u64 = 1 << 2;
        let version = self.number::<4>(4);
        let features = if version >= 3 { self.number::<8>(72) } else { 0 };
        let convert = "make a plain one with `qemu-img convert -O qcow2`";
        if !(2..=3).contains(&version) {
            Err(format!("this is a qcow image of version {version}: {convert}"))
        } else if self.number::<8>(8) != 0 {
            Err(format!("this qcow2 image is the overlay of another: {convert}"))
        } else if self.number::<4>(32) != 0 {
            Err(format!("this qcow2 image is encrypted: {convert}"))
        } else if features & EXTERNAL_DATA != 0 {
            Err(format!("this qcow2 image has its data in another file: {convert}"))
        } else if features & (DIRTY | CORRUPT) != 0 {
            Err("this qcow2 image is damaged, or in use: close what uses it, and see `qemu-img \
                 check -r all`"
                .into())
        } else if features != 0 {
            Err(format!(
                "this qcow2 image is of a kind (features {features:#x}) that heeler does \
                         not know, such as compression by zstd: {convert}"
            ))
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(begin: &[u8]) -> Head {
        let mut head = [0; HEAD_BYTES];
        head[..begin.len()].copy_from_slice(begin);
        Head(head)
    }

    #[test]
    fn the_content_says_what_an_image_is() {
        let plain = Path::new("disk");
        let qcow2 = Path::new("disk.qcow2");
        assert_eq!(head(b"QFI\xfb").judge(plain, None), Ok(Format::Qcow2));
        assert_eq!(head(b"QFI\xfb").judge(plain, Some(Format::Raw)), Ok(Format::Raw));
        assert_eq!(head(b"").judge(plain, None), Ok(Format::Raw));
        assert_eq!(head(b"").judge(qcow2, Some(Format::Raw)), Ok(Format::Raw));
        assert!(head(b"").judge(qcow2, None).is_err());
        assert!(head(b"").judge(plain, Some(Format::Qcow2)).is_err());
        for (magic, what) in OTHERS {
            assert!(head(magic).judge(plain, None).unwrap_err().contains(what));
            assert_eq!(head(magic).judge(plain, Some(Format::Raw)), Ok(Format::Raw));
        }
    }

    #[test]
    fn qcow2_images_that_would_be_read_wrong_are_refused() {
        let with = |at: usize, byte: u8| {
            let mut head = head(b"QFI\xfb\0\0\0\x03");
            head.0[at] = byte;
            head.check_qcow2()
        };
        assert_eq!(with(7, 3), Ok(()));
        assert_eq!(with(7, 2), Ok(()));
        for (at, byte, what) in [
            (7, 1, "version 1"),
            (15, 1, "overlay"),
            (35, 2, "encrypted"),
            (79, 1 << 0, "in use"),
            (79, 1 << 2, "another file"),
            (79, 1 << 3, "zstd"),
        ] {
            let error = with(at, byte).expect_err(what);
            assert!(error.contains(what), "{error}");
        }
    }
}
