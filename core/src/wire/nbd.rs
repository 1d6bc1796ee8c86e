//! The NBD protocol as bytes: fixed newstyle negotiation, transmission with 32-bit headers, simple
//! and structured replies. All numbers are big-endian.

/// First bytes of the server's greeting: "NBDMAGIC".
pub const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second magic of the greeting and first of every option: "IHAVEOPT".
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First of every answer to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First of every request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First of each chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Bytes of the client's flags after the greeting.
pub const CLIENT_FLAGS_BYTES: usize = 4;
/// Bytes of an option's header.
pub const OPTION_HEADER_BYTES: usize = 16;
/// Bytes of the header of an answer to an option.
pub const OPTION_REPLY_BYTES: usize = 20;
/// Bytes of a request's header.
pub const REQUEST_BYTES: usize = 28;
/// Bytes of a simple reply.
pub const SIMPLE_REPLY_BYTES: usize = 16;
/// Bytes of the header of a structured reply's chunk.
pub const CHUNK_HEADER_BYTES: usize = 20;
/// Zeroes after the answer to EXPORT_NAME, unless the client declined them.
pub const EXPORT_NAME_PADDING: usize = 124;

/// Handshake flags, the same bits from the server (offered) and from the client (taken).
pub mod handshake {
    /// Options are answered, unknown ones too.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// No padding after the answer to EXPORT_NAME.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Options of the negotiation.
pub mod option {
    /// Enter transmission with the named export; no error can be answered.
    pub const EXPORT_NAME: u32 = 1;
    /// End the session.
    pub const ABORT: u32 = 2;
    /// Name all exports.
    pub const LIST: u32 = 3;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Describe an export and enter transmission with it.
    pub const GO: u32 = 7;
    /// Use structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Name the metadata contexts of an export.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose metadata contexts of an export.
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Kinds of answers to options.
pub mod answer {
    /// Done.
    pub const ACK: u32 = 1;
    /// An export's name.
    pub const SERVER: u32 = 2;
    /// A piece of information on an export.
    pub const INFO: u32 = 3;
    /// A metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// The option is not supported.
    pub const ERR_UNSUP: u32 = 0x8000_0001;
    /// The option's data is malformed.
    pub const ERR_INVALID: u32 = 0x8000_0003;
    /// There is no such export.
    pub const ERR_UNKNOWN: u32 = 0x8000_0006;
    /// The option's data is too long.
    pub const ERR_TOO_BIG: u32 = 0x8000_0009;
    /// The bit that all errors have.
    pub const ERR_FLAG: u32 = 1 << 31;
}

/// Pieces of information on an export.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// The export's name.
    pub const NAME: u16 = 1;
    /// A text for people.
    pub const DESCRIPTION: u16 = 2;
    /// Minimum, preferred and maximum block size.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags: what an export can do.
pub mod transmission {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Refuses changes.
    pub const READ_ONLY: u16 = 1 << 1;
    /// Knows FLUSH.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// Knows the FUA flag.
    pub const SEND_FUA: u16 = 1 << 3;
    /// Knows TRIM.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// Knows WRITE_ZEROES.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// Knows the DF flag.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers all connections.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// Knows CACHE.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// Knows the FAST_ZERO flag.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Commands of the transmission phase.
pub mod command {
    /// Read bytes.
    pub const READ: u16 = 0;
    /// Write the bytes that follow the header.
    pub const WRITE: u16 = 1;
    /// End the session; has no reply.
    pub const DISC: u16 = 2;
    /// Make all acknowledged changes durable.
    pub const FLUSH: u16 = 3;
    /// The content is no longer needed: what heeler calls discard.
    pub const TRIM: u16 = 4;
    /// Prefetch.
    pub const CACHE: u16 = 5;
    /// Make bytes read as zeroes.
    pub const WRITE_ZEROES: u16 = 6;
    /// Describe extents.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of commands.
pub mod flag {
    /// The reply waits until the change is durable.
    pub const FUA: u16 = 1 << 0;
    /// WRITE_ZEROES: keep the range allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// READ: the data comes in one chunk.
    pub const DF: u16 = 1 << 2;
    /// BLOCK_STATUS: one extent is enough.
    pub const REQ_ONE: u16 = 1 << 3;
    /// WRITE_ZEROES: fail rather than be as slow as a write.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Error numbers on the wire.
pub mod errno {
    /// The export is read-only.
    pub const EPERM: u32 = 1;
    /// Input or output failed.
    pub const EIO: u32 = 5;
    /// The request is malformed or out of range.
    pub const EINVAL: u32 = 22;
    /// No room, or a change beyond the end.
    pub const ENOSPC: u32 = 28;
    /// What was asked for cannot be done, or not as fast as asked.
    pub const ENOTSUP: u32 = 95;
    /// The server is going away.
    pub const ESHUTDOWN: u32 = 108;
}

/// Kinds of chunks in a structured reply.
pub mod chunk {
    /// Flag: the last chunk of the reply.
    pub const DONE: u16 = 1 << 0;
    /// Nothing but the end of the reply.
    pub const NONE: u16 = 0;
    /// An offset and data.
    pub const OFFSET_DATA: u16 = 1;
    /// An offset and a length of zeroes.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents of a metadata context.
    pub const BLOCK_STATUS: u16 = 5;
    /// An error and a message.
    pub const ERROR: u16 = 0x8001;
    /// The bit that all errors have.
    pub const ERROR_FLAG: u16 = 1 << 15;
}

/// The metadata context that tells data from holes.
pub const BASE_ALLOCATION: &[u8] = b"base:allocation";
/// The namespace of [`BASE_ALLOCATION`]: as a query, all contexts in it.
pub const BASE_NAMESPACE: &[u8] = b"base:";
/// The number by which `BLOCK_STATUS` chunks name [`BASE_ALLOCATION`].
pub const BASE_ALLOCATION_ID: u32 = 1;
/// `base:allocation`: not allocated, and reads as zeroes.
pub const STATE_HOLE_ZERO: u32 = 0b11;
/// `base:allocation`: the bit that says that it reads as zeroes.
pub const STATE_ZERO: u32 = 0b10;

/// The bytes do not start with the magic number they must start with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BadMagic;

/// The header of an option.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OptionHeader {
    /// Which option.
    pub option: u32,
    /// Bytes of data after the header.
    pub len: u32,
}

impl OptionHeader {
    /// Reads an option's header.
    ///
    /// # Errors
    ///
    /// [`BadMagic`] if this is no option.
    pub fn decode(bytes: &[u8; OPTION_HEADER_BYTES]) -> Result<Self, BadMagic> {
        let mut reader = Reader(bytes);
        let fields = (|| Some((reader.u64()?, reader.u32()?, reader.u32()?)))();
        match fields {
            Some((OPTION_MAGIC, option, len)) => Ok(Self { option, len }),
            _ => Err(BadMagic),
        }
    }
}

/// The header of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RequestHeader {
    /// Bits of [`flag`].
    pub flags: u16,
    /// One of [`command`], or unknown.
    pub command: u16,
    /// The client's name for the request.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
}

impl RequestHeader {
    /// Reads a request's header.
    ///
    /// # Errors
    ///
    /// [`BadMagic`] if this is no request.
    #[inline]
    pub fn decode(bytes: &[u8; REQUEST_BYTES]) -> Result<Self, BadMagic> {
        let magic = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        if magic != REQUEST_MAGIC {
            return Err(BadMagic);
        }
        let u64_at = |at: usize| {
            let mut number = [0; 8];
            number.copy_from_slice(&bytes[at..at + 8]);
            u64::from_be_bytes(number)
        };
        Ok(Self {
            flags: u16::from_be_bytes([bytes[4], bytes[5]]),
            command: u16::from_be_bytes([bytes[6], bytes[7]]),
            cookie: u64_at(8),
            offset: u64_at(16),
            len: u32::from_be_bytes([bytes[24], bytes[25], bytes[26], bytes[27]]),
        })
    }
}

/// The data of INFO and GO.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExportQuery<'a> {
    /// The export's name; empty for the default one.
    pub name: &'a [u8],
    /// NAME was asked for.
    pub wants_name: bool,
    /// DESCRIPTION was asked for.
    pub wants_description: bool,
}

impl<'a> ExportQuery<'a> {
    /// Reads the data of INFO or GO; `None` if it is malformed.
    #[must_use]
    pub fn decode(data: &'a [u8]) -> Option<Self> {
        let mut reader = Reader(data);
        let name_len = reader.u32()? as usize;
        let name = reader.take(name_len)?;
        let mut query = Self { name, wants_name: false, wants_description: false };
        for _ in 0..reader.u16()? {
            match reader.u16()? {
                info::NAME => query.wants_name = true,
                info::DESCRIPTION => query.wants_description = true,
                _ => {}
            }
        }
        reader.0.is_empty().then_some(query)
    }
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MetaQuery<'a> {
    /// The export's name; empty for the default one.
    pub name: &'a [u8],
    /// How many contexts were asked for.
    pub queries: u32,
    /// One of them is `base:allocation`.
    pub base_allocation: bool,
    /// One of them is the whole namespace `base:`.
    pub base_namespace: bool,
}

impl<'a> MetaQuery<'a> {
    /// Reads the data of either option; `None` if it is malformed.
    #[must_use]
    pub fn decode(data: &'a [u8]) -> Option<Self> {
        let mut reader = Reader(data);
        let name_len = reader.u32()? as usize;
        let name = reader.take(name_len)?;
        let queries = reader.u32()?;
        let mut query = Self { name, queries, base_allocation: false, base_namespace: false };
        for _ in 0..queries {
            let len = reader.u32()? as usize;
            let context = reader.take(len)?;
            query.base_allocation |= context == BASE_ALLOCATION;
            query.base_namespace |= context == BASE_NAMESPACE;
        }
        reader.0.is_empty().then_some(query)
    }
}

/// The server's first bytes.
#[must_use]
pub fn greeting(flags: u16) -> [u8; 18] {
    let mut bytes = [0; 18];
    bytes[..8].copy_from_slice(&GREETING_MAGIC.to_be_bytes());
    bytes[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    bytes[16..].copy_from_slice(&flags.to_be_bytes());
    bytes
}

/// The header of an answer to `option`: one of [`answer`] and `len` bytes of data.
#[must_use]
pub fn option_reply(option: u32, answer: u32, len: u32) -> [u8; OPTION_REPLY_BYTES] {
    let mut bytes = [0; OPTION_REPLY_BYTES];
    bytes[..8].copy_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    bytes[8..12].copy_from_slice(&option.to_be_bytes());
    bytes[12..16].copy_from_slice(&answer.to_be_bytes());
    bytes[16..].copy_from_slice(&len.to_be_bytes());
    bytes
}

/// A simple reply. `error` is one of [`errno`], 0 for none.
#[inline]
#[must_use]
pub fn simple_reply(cookie: u64, error: u32) -> [u8; SIMPLE_REPLY_BYTES] {
    let mut bytes = [0; SIMPLE_REPLY_BYTES];
    bytes[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

/// The header of a chunk: `done` marks the last of a reply, `kind` is one of [`chunk`], `len` the
/// bytes after the header.
#[inline]
#[must_use]
pub fn chunk_header(cookie: u64, kind: u16, done: bool, len: u32) -> [u8; CHUNK_HEADER_BYTES] {
    let mut bytes = [0; CHUNK_HEADER_BYTES];
    bytes[..4].copy_from_slice(&CHUNK_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&(if done { chunk::DONE } else { 0 }).to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..].copy_from_slice(&len.to_be_bytes());
    bytes
}

/// Takes numbers and slices off the front of bytes; `None` when there are too few.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(len)?;
        self.0 = tail;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk()?;
        self.0 = tail;
        Some(*head)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_laid_out_as_the_protocol_says() {
        let greeting = greeting(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        assert_eq!(&greeting, b"NBDMAGICIHAVEOPT\x00\x03");
        assert_eq!(
            option_reply(7, answer::ERR_UNKNOWN, 5),
            *b"\x00\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\x80\0\0\x06\0\0\0\x05",
        );
        assert_eq!(
            simple_reply(0x0102_0304_0506_0708, errno::EIO),
            *b"\x67\x44\x66\x98\0\0\0\x05\x01\x02\x03\x04\x05\x06\x07\x08",
        );
        assert_eq!(
            chunk_header(0x0102_0304_0506_0708, chunk::ERROR, true, 6),
            *b"\x66\x8e\x33\xef\0\x01\x80\x01\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\x06",
        );
    }

    #[test]
    fn a_request_is_read_field_by_field() {
        let bytes = b"\x25\x60\x95\x13\0\x03\0\x06\0\0\0\0\0\0\0\x09\0\0\0\0\x01\0\0\0\0\0\x10\0";
        let header = RequestHeader::decode(bytes).unwrap();
        assert_eq!(header.flags, flag::FUA | flag::NO_HOLE);
        assert_eq!(header.command, command::WRITE_ZEROES);
        assert_eq!((header.cookie, header.offset, header.len), (9, 1 << 24, 4096));
        let mut bad = *bytes;
        bad[0] ^= 1;
        assert_eq!(RequestHeader::decode(&bad), Err(BadMagic));
    }

    #[test]
    fn an_option_without_its_magic_is_refused() {
        let mut bytes = *b"IHAVEOPT\0\0\0\x03\0\0\0\x02";
        assert_eq!(OptionHeader::decode(&bytes), Ok(OptionHeader { option: 3, len: 2 }));
        bytes[7] = b'S';
        assert_eq!(OptionHeader::decode(&bytes), Err(BadMagic));
    }

    #[test]
    fn an_export_query_must_fill_its_data_exactly() {
        let good = b"\0\0\0\x02ab\0\x03\0\x01\0\x02\0\x09";
        let query = ExportQuery::decode(good).unwrap();
        assert_eq!(query.name, b"ab");
        assert!(query.wants_name && query.wants_description);
        for len in 0..good.len() {
            assert_eq!(ExportQuery::decode(&good[..len]), None, "{len} bytes");
        }
        assert_eq!(ExportQuery::decode(b"\0\0\0\x02ab\0\0\0"), None);
        assert_eq!(ExportQuery::decode(b"\xff\xff\xff\xffab\0\0"), None);
    }

    #[test]
    fn a_meta_query_must_fill_its_data_exactly() {
        let good = b"\0\0\0\x01d\0\0\0\x02\0\0\0\x05base:\0\0\0\x0fbase:allocation";
        let query = MetaQuery::decode(good).unwrap();
        assert_eq!((query.name, query.queries), (&b"d"[..], 2));
        assert!(query.base_allocation && query.base_namespace);
        for len in 0..good.len() {
            assert_eq!(MetaQuery::decode(&good[..len]), None, "{len} bytes");
        }
        assert_eq!(MetaQuery::decode(b"\0\0\0\0\xff\xff\xff\xff\0\0\0\0"), None);
    }
}
