//! The negotiation: the client's flags and options, up to the choice of an export.

use super::cut::Open;
use super::{Export, Next, Phase, Reason, Session, Taken};
use crate::limits::{NBD_REQUEST_BYTES_MAX, OBJECT_SHIFT_MAX, OBJECT_SHIFT_MIN};
use crate::wire::nbd::{
    BASE_ALLOCATION, BASE_ALLOCATION_ID, CLIENT_FLAGS_BYTES, EXPORT_NAME_PADDING, ExportQuery,
    MetaQuery, OPTION_HEADER_BYTES, OptionHeader, answer, handshake, info, option, option_reply,
    transmission,
};

/// Bytes of an option's data at most; a longer one is skipped and answered "too big".
pub const OPTION_BYTES_MAX: usize = 8192;
/// Bytes of an option's data beyond which the session is closed.
const OPTION_SKIP_MAX: u32 = 1 << 20;
/// What clients are told to align to for speed.
const PREFERRED_BLOCK_BYTES: u32 = 4096;
const DESCRIPTION: &[u8] = b"heeler volume";

/// Where the negotiation stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Haggle {
    /// An option's header comes next.
    Option,
    /// The data of an option that is too long comes next.
    Skip { option: u32, left: u32 },
    /// LIST has been answered up to this export.
    List { next: usize },
}

impl Session {
    pub(super) fn take_client_flags(&mut self, rx: &[u8]) -> Taken {
        let Some(flags) = rx.first_chunk::<CLIENT_FLAGS_BYTES>() else {
            return Taken { consumed: 0, next: Next::Bytes };
        };
        let flags = u32::from_be_bytes(*flags);
        let known = handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES;
        if flags & !u32::from(known) != 0 {
            return self.violate("unknown client flags");
        }
        self.no_zeroes = flags & u32::from(handshake::NO_ZEROES) != 0;
        self.phase = Phase::Haggling(Haggle::Option);
        Taken { consumed: CLIENT_FLAGS_BYTES, next: Next::Again }
    }

    pub(super) fn take_haggling(&mut self, at: Haggle, rx: &[u8], exports: &[Export]) -> Taken {
        match at {
            Haggle::Option => self.take_option(rx, exports),
            Haggle::Skip { option, left } => self.skip_option(option, left, rx),
            Haggle::List { next } => self.list(next, exports),
        }
    }

    fn take_option(&mut self, rx: &[u8], exports: &[Export]) -> Taken {
        let Some((header, rest)) = rx.split_first_chunk::<OPTION_HEADER_BYTES>() else {
            return Taken { consumed: 0, next: Next::Bytes };
        };
        let Ok(OptionHeader { option, len }) = OptionHeader::decode(header) else {
            return self.violate("no option magic");
        };
        if len as usize > OPTION_BYTES_MAX {
            if option == option::EXPORT_NAME || len > OPTION_SKIP_MAX {
                return self.violate("option is too long");
            }
            self.phase = Phase::Haggling(Haggle::Skip { option, left: len });
            return Taken { consumed: OPTION_HEADER_BYTES, next: Next::Again };
        }
        let Some(data) = rest.get(..len as usize) else {
            return Taken { consumed: 0, next: Next::Bytes };
        };
        self.answer_option(option, data, exports);
        match self.phase {
            Phase::Closed(_) => Taken { consumed: rx.len(), next: Next::Closed },
            _ => Taken { consumed: OPTION_HEADER_BYTES + data.len(), next: Next::Again },
        }
    }

    fn skip_option(&mut self, option: u32, left: u32, rx: &[u8]) -> Taken {
        let skipped = rx.len().min(left as usize);
        let left = left - skipped as u32;
        if left > 0 {
            self.phase = Phase::Haggling(Haggle::Skip { option, left });
            return Taken { consumed: skipped, next: Next::Bytes };
        }
        self.put_answer(option, answer::ERR_TOO_BIG, &[]);
        self.phase = Phase::Haggling(Haggle::Option);
        Taken { consumed: skipped, next: Next::Again }
    }

    /// Names one export for each call, so that a call's output is bounded.
    fn list(&mut self, next: usize, exports: &[Export]) -> Taken {
        if let Some(export) = exports.get(next) {
            let name = export.name.as_bytes();
            let len = (name.len() as u32).to_be_bytes();
            self.put_answer(option::LIST, answer::SERVER, &[&len, name]);
            self.phase = Phase::Haggling(Haggle::List { next: next + 1 });
        } else {
            self.put_answer(option::LIST, answer::ACK, &[]);
            self.phase = Phase::Haggling(Haggle::Option);
        }
        Taken { consumed: 0, next: Next::Again }
    }

    fn answer_option(&mut self, option: u32, data: &[u8], exports: &[Export]) {
        match option {
            option::EXPORT_NAME => self.enter_by_name(data, exports),
            option::INFO | option::GO => self.describe(option, data, exports),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.meta_context(option, data, exports);
            }
            option::ABORT => {
                self.put_answer(option, answer::ACK, &[]);
                self.phase = Phase::Draining(Reason::Aborted);
            }
            option::LIST if data.is_empty() => {
                self.phase = Phase::Haggling(Haggle::List { next: 0 })
            }
            option::STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                self.put_answer(option, answer::ACK, &[]);
            }
            option::LIST | option::STRUCTURED_REPLY => {
                self.put_answer(option, answer::ERR_INVALID, &[]);
            }
            _ => self.put_answer(option, answer::ERR_UNSUP, &[]),
        }
    }

    fn enter_by_name(&mut self, name: &[u8], exports: &[Export]) {
        let Some(export) = find(name, exports) else {
            return self.close(Reason::UnknownExport);
        };
        self.put(&export.bytes.to_be_bytes());
        self.put(&self.transmission_flags(export).to_be_bytes());
        if !self.no_zeroes {
            self.put(&[0; EXPORT_NAME_PADDING]);
        }
        self.enter(export);
    }

    /// INFO and GO.
    fn describe(&mut self, option: u32, data: &[u8], exports: &[Export]) {
        let Some(query) = ExportQuery::decode(data) else {
            return self.put_answer(option, answer::ERR_INVALID, &[]);
        };
        let Some(export) = find(query.name, exports) else {
            return self.put_answer(option, answer::ERR_UNKNOWN, &[]);
        };
        let flags = self.transmission_flags(export).to_be_bytes();
        let size = export.bytes.to_be_bytes();
        self.put_answer(option, answer::INFO, &[&info::EXPORT.to_be_bytes(), &size, &flags]);
        if query.wants_name {
            let name = export.name.as_bytes();
            self.put_answer(option, answer::INFO, &[&info::NAME.to_be_bytes(), name]);
        }
        if query.wants_description {
            let kind = info::DESCRIPTION.to_be_bytes();
            self.put_answer(option, answer::INFO, &[&kind, DESCRIPTION]);
        }
        let (min, max) = (1u32.to_be_bytes(), NBD_REQUEST_BYTES_MAX.to_be_bytes());
        let kind = info::BLOCK_SIZE.to_be_bytes();
        let preferred = PREFERRED_BLOCK_BYTES.to_be_bytes();
        self.put_answer(option, answer::INFO, &[&kind, &min, &preferred, &max]);
        self.put_answer(option, answer::ACK, &[]);
        if option == option::GO {
            self.enter(export);
        }
    }

    fn meta_context(&mut self, option: u32, data: &[u8], exports: &[Export]) {
        let set = option == option::SET_META_CONTEXT;
        if set {
            // A new choice replaces the old one even when it fails.
            self.status_of = None;
        }
        let query = MetaQuery::decode(data);
        let Some(query) = query.filter(|_| self.structured) else {
            return self.put_answer(option, answer::ERR_INVALID, &[]);
        };
        let Some(export) = find(query.name, exports) else {
            return self.put_answer(option, answer::ERR_UNKNOWN, &[]);
        };
        let listed = !set && (query.queries == 0 || query.base_namespace);
        if query.base_allocation || listed {
            // The number means something only in answers to SET_META_CONTEXT.
            let id = if set { BASE_ALLOCATION_ID } else { 0 };
            self.put_answer(option, answer::META_CONTEXT, &[&id.to_be_bytes(), BASE_ALLOCATION]);
        }
        if set && query.base_allocation {
            self.status_of = Some(export.volume);
        }
        self.put_answer(option, answer::ACK, &[]);
    }

    fn enter(&mut self, export: &Export) {
        let shift = u32::from(export.object_shift);
        assert!((OBJECT_SHIFT_MIN..=OBJECT_SHIFT_MAX).contains(&shift), "object size of an export");
        assert!(export.bytes >> shift <= u64::from(u32::MAX), "size of an export");
        // Contexts chosen for another export do not hold for this one.
        self.open = Open::new(export, self.status_of == Some(export.volume));
        self.phase = Phase::Transmission;
    }

    fn transmission_flags(&self, export: &Export) -> u16 {
        let mut flags = transmission::HAS_FLAGS
            | transmission::SEND_FLUSH
            | transmission::SEND_FUA
            | transmission::SEND_CACHE
            | transmission::CAN_MULTI_CONN;
        if export.read_only {
            flags |= transmission::READ_ONLY;
        } else {
            flags |= transmission::SEND_TRIM
                | transmission::SEND_WRITE_ZEROES
                | transmission::SEND_FAST_ZERO;
        }
        if self.structured {
            flags |= transmission::SEND_DF;
        }
        flags
    }

    fn put_answer(&mut self, option: u32, answer: u32, parts: &[&[u8]]) {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        self.put(&option_reply(option, answer, len as u32));
        for part in parts {
            self.put(part);
        }
    }
}

/// The export of that name; the first one for the empty name.
fn find<'e>(name: &[u8], exports: &'e [Export]) -> Option<&'e Export> {
    if name.is_empty() {
        return exports.first();
    }
    exports.iter().find(|export| export.name.as_bytes() == name)
}
