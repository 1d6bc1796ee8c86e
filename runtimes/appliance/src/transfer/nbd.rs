//! An NBD client: fixed newstyle, structured replies where the server has them, many requests in
//! flight on one connection.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use heeler_core::limits::NBD_REQUEST_BYTES_MAX;
use heeler_core::wire::nbd::{
    BASE_ALLOCATION, CHUNK_HEADER_BYTES, CHUNK_MAGIC, GREETING_MAGIC, OPTION_MAGIC,
    OPTION_REPLY_MAGIC, REQUEST_BYTES, REQUEST_MAGIC, SIMPLE_REPLY_BYTES, SIMPLE_REPLY_MAGIC,
    STATE_ZERO, answer, chunk, command, errno, handshake, info, option, transmission,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{mpsc, oneshot};

use super::extents::Extents;
use super::place::{Address, NbdUrl};

/// How long a server may take to open an export.
const OPEN_TIME: Duration = Duration::from_secs(15);
/// Bytes that are taken from the socket at once.
const READER_BYTES: usize = 256 << 10;
/// Bytes of an answer to an option, or of a chunk without data, at most.
const ANSWER_BYTES_MAX: u32 = 1 << 20;
/// Bytes of a range that one request names at most: a multiple of 4096 that 32 bits can say.
const RANGE_BYTES_MAX: u64 = u32::MAX as u64 & !4095;

type Reader = BufReader<Box<dyn AsyncRead + Send + Unpin>>;
type Writer = Box<dyn AsyncWrite + Send + Unpin>;

/// An open export.
pub(crate) struct Client {
    url: NbdUrl,
    size: u64,
    flags: u16,
    /// The number that the server gave to `base:allocation`.
    context: Option<u32>,
    shared: Arc<Shared>,
    /// To the task that writes requests: whoever waits for a reply need not be awake for others'
    /// requests to go out.
    requests: mpsc::UnboundedSender<Request>,
}

/// A request's header and what it writes.
type Request = ([u8; REQUEST_BYTES], Bytes);

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("url", &self.url).finish_non_exhaustive()
    }
}

/// What the task that reads replies shares with those who wait for them.
#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    waiting: HashMap<u64, Waiting>,
    last_cookie: u64,
    /// Why no reply will come any more.
    broken: Option<String>,
}

/// A request without its whole reply.
#[derive(Debug)]
struct Waiting {
    command: u16,
    offset: u64,
    /// Of reads: what was read, and how much of it has come.
    data: Vec<u8>,
    come: usize,
    /// Of queries of the status: lengths and states.
    extents: Vec<(u32, u32)>,
    error: Option<String>,
    done: oneshot::Sender<Result<Reply, String>>,
}

#[derive(Debug)]
struct Reply {
    data: Vec<u8>,
    extents: Vec<(u32, u32)>,
}

impl Client {
    /// Connects to an export.
    pub(crate) async fn connect(url: &NbdUrl) -> Result<Self, String> {
        let opened = tokio::time::timeout(OPEN_TIME, async {
            let (reader, mut writer) = open(&url.address).await.map_err(|e| e.to_string())?;
            let mut reader = BufReader::with_capacity(READER_BYTES, reader);
            let haggle = Haggle { reader: &mut reader, writer: &mut writer };
            let agreed = haggle.run(&url.export).await?;
            Ok((reader, writer, agreed))
        });
        let opened = opened.await.unwrap_or_else(|_| Err("the server does not answer".into()));
        let (reader, writer, agreed) = opened.map_err(|e: String| format!("{url}: {e}"))?;
        let shared = Arc::new(Shared::default());
        let (requests, queue) = mpsc::unbounded_channel();
        drop(tokio::spawn(receive(reader, shared.clone(), agreed.context)));
        drop(tokio::spawn(send(writer, queue, shared.clone())));
        Ok(Self {
            url: url.clone(),
            size: agreed.size,
            flags: agreed.flags,
            context: agreed.context,
            shared,
            requests,
        })
    }

    /// Bytes of the export.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Whether changes are refused.
    pub(crate) fn is_read_only(&self) -> bool {
        self.flags & transmission::READ_ONLY != 0
    }

    fn can(&self, what: u16) -> bool {
        self.flags & what != 0
    }

    /// Reads bytes.
    pub(crate) async fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, String> {
        let reply = self.request(command::READ, offset, len as u32, Bytes::new()).await?;
        Ok(reply.data)
    }

    /// Writes bytes.
    pub(crate) async fn write(&self, offset: u64, data: Bytes) -> Result<(), String> {
        self.request(command::WRITE, offset, data.len() as u32, data).await.map(drop)
    }

    /// Makes bytes read as zeroes.
    pub(crate) async fn zero(&self, mut offset: u64, mut len: u64) -> Result<(), String> {
        let zeroes = if self.can(transmission::SEND_WRITE_ZEROES) { &[] } else { ZEROES };
        while len > 0 {
            let most = if zeroes.is_empty() { RANGE_BYTES_MAX } else { zeroes.len() as u64 };
            let step = len.min(most) as u32;
            if zeroes.is_empty() {
                self.request(command::WRITE_ZEROES, offset, step, Bytes::new()).await?;
            } else {
                self.write(offset, Bytes::from_static(&zeroes[..step as usize])).await?;
            }
            offset += u64::from(step);
            len -= u64::from(step);
        }
        Ok(())
    }

    /// Makes all that was written durable.
    pub(crate) async fn flush(&self) -> Result<(), String> {
        if self.can(transmission::SEND_FLUSH) {
            self.request(command::FLUSH, 0, 0, Bytes::new()).await?;
        }
        Ok(())
    }

    /// Where there is data. All of it, if the server does not say.
    pub(crate) async fn extents(&self) -> Result<Extents, String> {
        let mut found = Extents::default();
        if self.context.is_none() {
            found.push(0, self.size);
            return Ok(found);
        }
        let mut at = 0;
        while at < self.size {
            let len = (self.size - at).min(RANGE_BYTES_MAX) as u32;
            let reply = self.request(command::BLOCK_STATUS, at, len, Bytes::new()).await?;
            let before = at;
            for (len, state) in reply.extents {
                let len = u64::from(len).min(self.size - at);
                if state & STATE_ZERO == 0 {
                    found.push(at, len);
                }
                at += len;
            }
            if at == before {
                return Err(self.strange("it described no extent"));
            }
        }
        Ok(found)
    }

    fn strange(&self, what: &str) -> String {
        format!("{}: the server broke the protocol: {what}", self.url)
    }

    async fn request(
        &self,
        command: u16,
        offset: u64,
        len: u32,
        payload: Bytes,
    ) -> Result<Reply, String> {
        let failed = |e: &dyn fmt::Display| match command {
            command::FLUSH => format!("{}: the flush: {e}", self.url),
            _ => format!("{}: {len} bytes at {offset}: {e}", self.url),
        };
        debug_assert!(payload.len() <= NBD_REQUEST_BYTES_MAX as usize);
        let (done, reply) = oneshot::channel();
        let data = if command == command::READ { vec![0; len as usize] } else { Vec::new() };
        let waiting =
            Waiting { command, offset, data, come: 0, extents: Vec::new(), error: None, done };
        let cookie = self.shared.enter(waiting).map_err(|e| failed(&e))?;
        let header = request_header(command, cookie, offset, len);
        // If that task has ended, it has failed all that wait.
        let _ = self.requests.send((header, payload));
        let reply = reply.await.unwrap_or_else(|_| Err("the connection broke".into()));
        reply.map_err(|e| failed(&e))
    }
}

/// A buffer for servers that know no WRITE_ZEROES.
static ZEROES: &[u8] = &[0; 1 << 20];

impl Shared {
    fn enter(&self, waiting: Waiting) -> Result<u64, String> {
        let mut state = self.state.lock().expect("no thread panicked with it");
        if let Some(why) = &state.broken {
            return Err(why.clone());
        }
        state.last_cookie += 1;
        let cookie = state.last_cookie;
        state.waiting.insert(cookie, waiting);
        Ok(cookie)
    }

    fn take(&self, cookie: u64) -> Result<Waiting, String> {
        let mut state = self.state.lock().expect("no thread panicked with it");
        state.waiting.remove(&cookie).ok_or_else(|| "a reply to no request".into())
    }

    fn put_back(&self, cookie: u64, waiting: Waiting) {
        self.state.lock().expect("no thread panicked with it").waiting.insert(cookie, waiting);
    }

    fn fail_all(&self, why: &str) {
        let mut state = self.state.lock().expect("no thread panicked with it");
        state.broken = Some(why.into());
        for (_, waiting) in state.waiting.drain() {
            // Nobody waits any more if the transfer has failed already.
            let _ = waiting.done.send(Err(why.into()));
        }
    }
}

impl Waiting {
    /// The reply is whole.
    fn finish(self) {
        let whole = self.command != command::READ || self.come == self.data.len();
        let result = match self.error {
            Some(error) => Err(error),
            None if !whole => Err("the server sent less than was asked for".into()),
            None => Ok(Reply { data: self.data, extents: self.extents }),
        };
        // Nobody waits any more if the transfer has failed already.
        let _ = self.done.send(result);
    }

    /// The part of the data that a chunk covers.
    fn part(&mut self, offset: u64, len: u32) -> Result<&mut [u8], String> {
        let begin = offset.checked_sub(self.offset).and_then(|begin| usize::try_from(begin).ok());
        let part = begin.and_then(|begin| {
            let end = begin.checked_add(len as usize)?;
            self.data.get_mut(begin..end)
        });
        self.come += len as usize;
        part.ok_or_else(|| "data that was not asked for".into())
    }
}

fn request_header(command: u16, cookie: u64, offset: u64, len: u32) -> [u8; REQUEST_BYTES] {
    let mut header = [0; REQUEST_BYTES];
    header[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    header[6..8].copy_from_slice(&command.to_be_bytes());
    header[8..16].copy_from_slice(&cookie.to_be_bytes());
    header[16..24].copy_from_slice(&offset.to_be_bytes());
    header[24..].copy_from_slice(&len.to_be_bytes());
    header
}

async fn open(address: &Address) -> std::io::Result<(Box<dyn AsyncRead + Send + Unpin>, Writer)> {
    match address {
        Address::Tcp(address) => {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            let (reader, writer) = stream.into_split();
            Ok((Box::new(reader), Box::new(writer)))
        }
        Address::Unix(path) => {
            let (reader, writer) = UnixStream::connect(path).await?.into_split();
            Ok((Box::new(reader), Box::new(writer)))
        }
    }
}

/// Writes requests until there can be no more, or the connection breaks.
async fn send(
    mut writer: Writer,
    mut queue: mpsc::UnboundedReceiver<Request>,
    shared: Arc<Shared>,
) {
    while let Some((header, payload)) = queue.recv().await {
        let sent = async {
            writer.write_all(&header).await?;
            writer.write_all(&payload).await
        };
        if let Err(e) = sent.await {
            return shared.fail_all(&gone(e));
        }
    }
}

/// Passes replies on until the connection ends.
async fn receive(mut reader: Reader, shared: Arc<Shared>, context: Option<u32>) {
    loop {
        if let Err(why) = receive_one(&mut reader, &shared, context).await {
            return shared.fail_all(&why);
        }
    }
}

async fn receive_one(
    reader: &mut Reader,
    shared: &Shared,
    context: Option<u32>,
) -> Result<(), String> {
    let magic = reader.read_u32().await.map_err(gone)?;
    let mut rest = [0; CHUNK_HEADER_BYTES - 4];
    match magic {
        SIMPLE_REPLY_MAGIC => {
            let rest = &mut rest[..SIMPLE_REPLY_BYTES - 4];
            reader.read_exact(rest).await.map_err(gone)?;
            let mut waiting = shared.take(u64_at(rest, 4))?;
            match u32_at(rest, 0) {
                0 => {
                    reader.read_exact(&mut waiting.data).await.map_err(gone)?;
                    waiting.come = waiting.data.len();
                }
                error => waiting.error = Some(error_name(error)),
            }
            waiting.finish();
        }
        CHUNK_MAGIC => {
            reader.read_exact(&mut rest).await.map_err(gone)?;
            let flags = u16::from_be_bytes([rest[0], rest[1]]);
            let kind = u16::from_be_bytes([rest[2], rest[3]]);
            let (cookie, len) = (u64_at(&rest, 4), u32_at(&rest, 12));
            let mut waiting = shared.take(cookie)?;
            receive_chunk(reader, &mut waiting, kind, len, context).await?;
            if flags & chunk::DONE != 0 {
                waiting.finish();
            } else {
                shared.put_back(cookie, waiting);
            }
        }
        _ => return Err("the server sent no reply, but something else".into()),
    }
    Ok(())
}

async fn receive_chunk(
    reader: &mut Reader,
    waiting: &mut Waiting,
    kind: u16,
    len: u32,
    context: Option<u32>,
) -> Result<(), String> {
    if kind == chunk::OFFSET_DATA {
        let len = len.checked_sub(8).ok_or("a chunk that is too short")?;
        let offset = reader.read_u64().await.map_err(gone)?;
        reader.read_exact(waiting.part(offset, len)?).await.map_err(gone)?;
        return Ok(());
    }
    if len > ANSWER_BYTES_MAX {
        return Err(format!("a chunk of {len} bytes"));
    }
    let mut body = vec![0; len as usize];
    reader.read_exact(&mut body).await.map_err(gone)?;
    match kind {
        chunk::NONE => {}
        chunk::OFFSET_HOLE if body.len() == 12 => {
            // The buffer was made of zeroes.
            waiting.part(u64_at(&body, 0), u32_at(&body, 8))?;
        }
        chunk::BLOCK_STATUS if body.len() % 8 == 4 => {
            if context == Some(u32_at(&body, 0)) {
                let pairs = body[4..].chunks_exact(8);
                waiting.extents.extend(pairs.map(|pair| (u32_at(pair, 0), u32_at(pair, 4))));
            }
        }
        kind if kind & chunk::ERROR_FLAG != 0 && body.len() >= 6 => {
            let text = body[6..].get(..usize::from(u16::from_be_bytes([body[4], body[5]])));
            let text = String::from_utf8_lossy(text.unwrap_or_default());
            let name = error_name(u32_at(&body, 0));
            waiting.error = Some(if text.is_empty() { name } else { format!("{name} ({text})") });
        }
        kind => return Err(format!("a chunk of kind {kind} and {len} bytes")),
    }
    Ok(())
}

fn gone(e: std::io::Error) -> String {
    match e.kind() {
        std::io::ErrorKind::UnexpectedEof => "the server closed the connection".into(),
        _ => format!("the connection broke: {e}"),
    }
}

fn error_name(error: u32) -> String {
    match error {
        errno::EPERM => "the export is read-only".into(),
        errno::EIO => "input/output error".into(),
        errno::EINVAL => "the request is refused".into(),
        errno::ENOSPC => "no space left".into(),
        errno::ESHUTDOWN => "the server is shutting down".into(),
        error => format!("error {error}"),
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// What the negotiation came to.
struct Agreed {
    size: u64,
    flags: u16,
    context: Option<u32>,
}

/// The negotiation.
struct Haggle<'a> {
    reader: &'a mut Reader,
    writer: &'a mut Writer,
}

impl Haggle<'_> {
    async fn run(mut self, export: &str) -> Result<Agreed, String> {
        self.greet().await?;
        let mut structured = false;
        self.send(option::STRUCTURED_REPLY, &[]).await?;
        self.answers(option::STRUCTURED_REPLY, |kind, _| structured |= kind == answer::ACK).await?;
        let mut context = None;
        if structured {
            let query = [
                &(export.len() as u32).to_be_bytes()[..],
                export.as_bytes(),
                &1u32.to_be_bytes(),
                &(BASE_ALLOCATION.len() as u32).to_be_bytes(),
                BASE_ALLOCATION,
            ];
            self.send(option::SET_META_CONTEXT, &query.concat()).await?;
            self.answers(option::SET_META_CONTEXT, |kind, body| {
                if kind == answer::META_CONTEXT && body.len() >= 4 {
                    context = Some(u32_at(body, 0));
                }
            })
            .await?;
        }
        let (size, flags) = self.go(export).await?;
        Ok(Agreed { size, flags, context })
    }

    async fn greet(&mut self) -> Result<(), String> {
        let mut greeting = [0; 18];
        self.reader.read_exact(&mut greeting).await.map_err(gone)?;
        let flags = u16::from_be_bytes([greeting[16], greeting[17]]);
        let newstyle = u64_at(&greeting, 8) == OPTION_MAGIC;
        if u64_at(&greeting, 0) != GREETING_MAGIC {
            return Err("this is no NBD server".into());
        }
        if !newstyle || flags & handshake::FIXED_NEWSTYLE == 0 {
            return Err("the server speaks an NBD that is too old".into());
        }
        let taken = flags & (handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        self.put(&u32::from(taken).to_be_bytes()).await
    }

    /// Enters transmission; size and flags of the export.
    async fn go(&mut self, export: &str) -> Result<(u64, u16), String> {
        // No further information is asked for.
        let query =
            [&(export.len() as u32).to_be_bytes()[..], export.as_bytes(), &0u16.to_be_bytes()];
        self.send(option::GO, &query.concat()).await?;
        let mut found = None;
        let last = self
            .answers(option::GO, |kind, body| {
                let export = info::EXPORT.to_be_bytes();
                if kind == answer::INFO && body.len() == 12 && body.starts_with(&export) {
                    found = Some((u64_at(body, 2), u16::from_be_bytes([body[10], body[11]])));
                }
            })
            .await?;
        match (last, found) {
            (answer::ACK, Some(found)) => Ok(found),
            (answer::ACK, None) => Err("the server does not say how large the export is".into()),
            (answer::ERR_UNKNOWN, _) => Err(format!("the server has no export '{export}'")),
            (error, _) => Err(format!("the export '{export}' is refused: answer {error:#x}")),
        }
    }

    async fn send(&mut self, option: u32, data: &[u8]) -> Result<(), String> {
        let header = [
            &OPTION_MAGIC.to_be_bytes()[..],
            &option.to_be_bytes(),
            &(data.len() as u32).to_be_bytes(),
            data,
        ];
        self.put(&header.concat()).await
    }

    async fn put(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.writer.write_all(bytes).await.map_err(gone)?;
        self.writer.flush().await.map_err(gone)
    }

    /// Takes the answers to an option, up to the last, whose kind it returns.
    async fn answers(
        &mut self,
        option: u32,
        mut each: impl FnMut(u32, &[u8]),
    ) -> Result<u32, String> {
        loop {
            let magic = self.reader.read_u64().await.map_err(gone)?;
            let named = self.reader.read_u32().await.map_err(gone)?;
            let kind = self.reader.read_u32().await.map_err(gone)?;
            let len = self.reader.read_u32().await.map_err(gone)?;
            if magic != OPTION_REPLY_MAGIC || named != option || len > ANSWER_BYTES_MAX {
                return Err("the server answers something else than was asked".into());
            }
            let mut body = vec![0; len as usize];
            self.reader.read_exact(&mut body).await.map_err(gone)?;
            each(kind, &body);
            if kind == answer::ACK || kind & answer::ERR_FLAG != 0 {
                return Ok(kind);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use heeler_core::wire::nbd::RequestHeader;

    #[test]
    fn requests_are_as_the_server_reads_them() {
        let header = request_header(command::WRITE, 7, 1 << 40, 4096);
        let expected = RequestHeader {
            flags: 0,
            command: command::WRITE,
            cookie: 7,
            offset: 1 << 40,
            len: 4096,
        };
        assert_eq!(RequestHeader::decode(&header), Ok(expected));
    }
}
