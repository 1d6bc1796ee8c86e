//! Where a disk has data: ascending ranges; what lies between them reads as zeroes.

/// A gap between data that is shorter is taken as data: to ask for it costs more than to read it.
const GAP_BYTES_MIN: u64 = 64 << 10;

/// A range of bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Extent {
    /// The first byte.
    pub(crate) at: u64,
    /// Bytes.
    pub(crate) len: u64,
}

impl Extent {
    fn end(self) -> u64 {
        self.at + self.len
    }
}

/// A range to copy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Piece {
    /// Where.
    pub(crate) extent: Extent,
    /// Whether there may be something else than zeroes.
    pub(crate) data: bool,
}

/// Ascending ranges of data, none empty, with gaps between them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Extents(Vec<Extent>);

impl Extents {
    /// Adds a range behind all others.
    pub(crate) fn push(&mut self, at: u64, len: u64) {
        match self.0.last_mut() {
            _ if len == 0 => {}
            Some(last) if at < last.end() + GAP_BYTES_MIN => {
                debug_assert!(at >= last.end(), "ranges ascend");
                last.len = at + len - last.at;
            }
            _ => self.0.push(Extent { at, len }),
        }
    }

    /// What is data here or there.
    pub(crate) fn union(&self, other: &Self) -> Self {
        let mut all = [&self.0[..], &other.0].concat();
        all.sort_unstable();
        let mut union = Self::default();
        let mut end = 0;
        for extent in all {
            let at = extent.at.max(end);
            union.push(at, extent.end().saturating_sub(at));
            end = end.max(extent.end());
        }
        union
    }

    /// Bytes of data from a byte on.
    pub(crate) fn data_bytes(&self, from: u64) -> u64 {
        self.0.iter().map(|extent| extent.end().saturating_sub(extent.at.max(from))).sum()
    }

    /// Cuts the disk from a byte on into pieces that begin and end at multiples of `step`, or where
    /// data does. Without `zeroes`, those that have no data are left out.
    pub(crate) fn pieces(
        &self,
        from: u64,
        size: u64,
        step: u64,
        zeroes: bool,
    ) -> impl Iterator<Item = Piece> {
        let mut at = 0;
        let ends = self.0.iter().copied().chain([Extent { at: size, len: 0 }]);
        ends.flat_map(move |extent| {
            let gap = Extent { at, len: extent.at - at };
            at = extent.end();
            [(gap, false), (extent, true)]
        })
        .filter(move |(_, data)| zeroes || *data)
        .flat_map(move |(extent, data)| {
            let first = extent.at.max(from);
            // Zeroes are no data to carry: only their number counts.
            let step = if data { step } else { ZEROES_STEP };
            cut(first, extent.end(), step).map(move |extent| Piece { extent, data })
        })
    }
}

/// Bytes of zeroes that are written at once.
const ZEROES_STEP: u64 = 1 << 30;

fn cut(from: u64, end: u64, step: u64) -> impl Iterator<Item = Extent> {
    let mut at = from;
    std::iter::from_fn(move || {
        let len = (step - at % step).min(end.saturating_sub(at));
        let piece = Extent { at, len };
        at += len;
        (len > 0).then_some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const K: u64 = 1 << 10;
    const M: u64 = 1 << 20;

    fn extents(ranges: &[(u64, u64)]) -> Extents {
        let mut extents = Extents::default();
        for (at, len) in ranges {
            extents.push(*at, *len);
        }
        extents
    }

    fn pieces(extents: &Extents, from: u64, size: u64, zeroes: bool) -> Vec<(u64, u64, bool)> {
        let pieces = extents.pieces(from, size, M, zeroes);
        pieces.map(|piece| (piece.extent.at, piece.extent.len, piece.data)).collect()
    }

    #[test]
    fn short_gaps_are_data() {
        let extents = extents(&[(0, 4 * K), (8 * K, 4 * K), (M, 0), (M, 4 * K)]);
        assert_eq!(extents.0, [Extent { at: 0, len: 12 * K }, Extent { at: M, len: 4 * K }]);
        assert_eq!(extents.data_bytes(0), 16 * K);
        assert_eq!(extents.data_bytes(8 * K), 8 * K);
        assert_eq!(extents.data_bytes(2 * M), 0);
    }

    #[test]
    fn pieces_cover_the_disk_once() {
        let extents = extents(&[(M / 2, M), (5 * M, 3 * M)]);
        let all = pieces(&extents, 0, 8 * M, true);
        assert_eq!(
            all,
            [
                (0, M / 2, false),
                (M / 2, M / 2, true),
                (M, M / 2, true),
                (3 * M / 2, 7 * M / 2, false),
                (5 * M, M, true),
                (6 * M, M, true),
                (7 * M, M, true),
            ]
        );
        let data: Vec<_> = all.into_iter().filter(|(_, _, data)| *data).collect();
        assert_eq!(pieces(&extents, 0, 8 * M, false), data);
    }

    #[test]
    fn pieces_from_a_mark_on_cover_what_is_left() {
        let extents = extents(&[(0, 2 * M), (5 * M, M)]);
        let left = pieces(&extents, M + 100, 8 * M, true);
        assert_eq!(
            left,
            [
                (M + 100, M - 100, true),
                (2 * M, 3 * M, false),
                (5 * M, M, true),
                (6 * M, 2 * M, false)
            ]
        );
        assert_eq!(pieces(&extents, 8 * M, 8 * M, true), []);
        assert_eq!(pieces(&Extents::default(), 0, 100, true), [(0, 100, false)]);
    }

    #[test]
    fn a_union_has_all_data_of_both() {
        let a = extents(&[(0, M), (4 * M, 4 * M)]);
        let b = extents(&[(M / 2, M), (5 * M, M), (9 * M, M)]);
        let union = extents(&[(0, 3 * M / 2), (4 * M, 4 * M), (9 * M, M)]);
        assert_eq!(a.union(&b), union);
        assert_eq!(b.union(&a), union);
    }
}
