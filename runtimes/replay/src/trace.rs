//! What a recording touched, block by block.

use heeler_core::cache::Access;
use heeler_core::ids::{BLOCK_SHIFT, VolumeId};
use heeler_core::limits::OBJECT_BLOCKS_MAX;

use crate::footprint::Footprint;
use crate::records::{ReadError, Record};

/// How many references found their block.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Hits {
    /// Of reads and writes.
    pub all: u64,
    /// Of reads.
    pub reads: u64,
}

/// A recording, ready for replay: each request as the 4 KiB blocks it touches, cut at objects. A
/// reference is one touch of one block.
#[derive(Debug)]
pub struct Trace {
    accesses: Vec<Access>,
    /// The dense number of the block of each reference.
    pub(crate) blocks: Vec<u32>,
    requests: u64,
    read_references: u64,
    unique_blocks: u32,
    leaves: usize,
    objects: usize,
    volumes: usize,
}

impl Trace {
    /// Reads a recording to its end. Takes 4 bytes for each reference and 16 for each request.
    ///
    /// # Errors
    ///
    /// Those of the records, [`ReadError::Empty`] and [`ReadError::Long`].
    pub fn new(
        records: impl IntoIterator<Item = Result<Record, ReadError>>,
    ) -> Result<Self, ReadError> {
        let mut footprint = Footprint::default();
        let mut trace = Self {
            accesses: Vec::new(),
            blocks: Vec::new(),
            requests: 0,
            read_references: 0,
            unique_blocks: 0,
            leaves: 0,
            objects: 0,
            volumes: 0,
        };
        for record in records {
            trace.add(&record?, &mut footprint)?;
        }
        if trace.requests == 0 {
            return Err(ReadError::Empty);
        }
        trace.unique_blocks = footprint.blocks();
        trace.leaves = footprint.leaves();
        trace.objects = footprint.objects();
        trace.volumes = footprint.volumes();
        Ok(trace)
    }

    fn add(&mut self, record: &Record, footprint: &mut Footprint) -> Result<(), ReadError> {
        let first = record.offset >> BLOCK_SHIFT;
        let end = ((record.offset + record.length - 1) >> BLOCK_SHIFT) + 1;
        if self.blocks.len() as u64 + (end - first) > u64::from(u32::MAX) {
            return Err(ReadError::Long);
        }
        for block in first..end {
            self.blocks.push(footprint.number(record.volume, block).ok_or(ReadError::Long)?);
        }
        self.requests += 1;
        if !record.write {
            self.read_references += end - first;
        }
        let object_blocks = OBJECT_BLOCKS_MAX as u64;
        let mut block = first;
        while block < end {
            let object = block / object_blocks;
            let cut = end.min((object + 1) * object_blocks);
            self.accesses.push(Access {
                volume: VolumeId(record.volume),
                object: object as u32,
                first: (block % object_blocks) as u16,
                count: (cut - block) as u16,
                write: record.write,
            });
            block = cut;
        }
        Ok(())
    }

    /// The requests, cut at objects, in order.
    #[must_use]
    pub fn accesses(&self) -> &[Access] {
        &self.accesses
    }

    /// Requests of the recording.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.requests
    }

    /// Blocks touched, each time counted.
    #[must_use]
    pub fn references(&self) -> u64 {
        self.blocks.len() as u64
    }

    /// Those of reads.
    #[must_use]
    pub fn read_references(&self) -> u64 {
        self.read_references
    }

    /// Different blocks: the footprint.
    #[must_use]
    pub fn unique_blocks(&self) -> u32 {
        self.unique_blocks
    }

    /// Different leaves (64 KiB).
    #[must_use]
    pub fn leaves(&self) -> usize {
        self.leaves
    }

    /// Different objects (4 MiB).
    #[must_use]
    pub fn objects(&self) -> usize {
        self.objects
    }

    /// Different volumes.
    #[must_use]
    pub fn volumes(&self) -> usize {
        self.volumes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(volume: u32, offset: u64, length: u64, write: bool) -> Record {
        Record { volume, offset, length, write }
    }

    fn trace(records: &[Record]) -> Trace {
        Trace::new(records.iter().map(|record| Ok(*record))).expect("a trace")
    }

    #[test]
    fn requests_become_the_blocks_they_touch() {
        // Two halves of neighbours; one byte; volume 1 has blocks of its own.
        let trace = trace(&[
            record(0, 6144, 4096, false),
            record(0, 8192, 1, true),
            record(1, 0, 8192, false),
        ]);
        assert_eq!(trace.blocks, [0, 1, 1, 2, 3]);
        assert_eq!((trace.requests(), trace.references(), trace.read_references()), (3, 5, 4));
        assert_eq!((trace.unique_blocks(), trace.leaves(), trace.objects()), (4, 2, 2));
        assert_eq!(trace.volumes(), 2);
    }

    #[test]
    fn requests_are_cut_at_objects() {
        let trace = trace(&[record(3, (4 << 20) - 4096, (8 << 20) + 4097, true)]);
        let access = |object, first, count| Access {
            volume: VolumeId(3),
            object,
            first,
            count,
            write: true,
        };
        assert_eq!(
            trace.accesses(),
            [access(0, 1023, 1), access(1, 0, 1024), access(2, 0, 1024), access(3, 0, 1)]
        );
        assert_eq!((trace.objects(), trace.leaves(), trace.requests()), (4, 130, 1));
    }

    #[test]
    fn nothing_is_not_a_trace() {
        assert!(matches!(Trace::new([]), Err(ReadError::Empty)));
        assert!(matches!(Trace::new([Err(ReadError::Long)]), Err(ReadError::Long)));
    }
}
