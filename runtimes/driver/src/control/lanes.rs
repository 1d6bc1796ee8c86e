//! Lanes: which request goes to the store now, and which waits.
//!
//! One machine between all who ask something of the store and the store itself. It knows neither:
//! a request is a token, a [`Lane`], and a job that comes out again when its time has come.
//!
//! * **Reads and heads go out at once.** Clients wait for reads; a commit or a claim waits for
//!   its head, and everybody waits for the commit. No put keeps them waiting.
//! * **Puts share a window** of requests under way, which adapts to the store: it grows while
//!   latency stays what it is when the store is idle, shrinks when requests queue up in the
//!   store, and is halved by a failure.
//! * **Volumes share the window fairly**, by bytes: deficit round robin (Shreedhar and Varghese
//!   1995).
//! * **A push by age takes its time**: its packs are spread so that the last one is stored by its
//!   deadline. One that somebody waits for takes all it can get, and while there is one, or several
//!   fill the memory that waits here, nobody takes its time.
//! * **When the store is away nobody hammers it**: after some failures in a row everything waits
//!   but one request now and then, and goes out as soon as that one, or any other, has an answer.
//!   Reads do not wait for ever: see [`Lanes::poll_overdue`].

use std::collections::{BTreeMap, VecDeque};

use heeler_core::time::{Duration, Instant};

use super::Token;

/// Puts and deletes under way at most.
pub(super) const WINDOW_MAX: u32 = 16;
/// The same before anything is known of the store.
const WINDOW_START: f64 = 4.0;
/// Of requests as large as this latency says something about the store, not only about noise.
const TELLING_BYTES: u64 = 64 << 10;
/// Requests queue up in the store when they take so many times as long as in an idle one.
const QUEUEING: u64 = 2;
/// What a volume may put before the next one has its turn: the largest pack.
const QUANTUM: u64 = 9 << 20;
/// What the smallest request counts for.
const COST_MIN: u64 = 64 << 10;
/// Failures in a row after which the store counts as away.
const FAILURES_MAX: u32 = 3;
/// First and longest time between two tries of a store that is away.
const PROBE_AFTER: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(5));
/// How long a read waits for a store that is away.
const READ_PATIENCE: Duration = Duration::from_secs(15);
/// Seconds over which rates are taken.
const RATE_SECONDS: u64 = 5;

/// What a request is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Lane {
    /// A client may wait for it.
    Read,
    /// A claim, a commit, or what follows from them.
    Head,
    /// Part of a push.
    Push {
        /// Whose.
        flow: u64,
        /// Of the put.
        bytes: u64,
        /// Of a pack: bytes of the push that are not stored yet, its own included. The others
        /// come when all packs are stored, and are not spread.
        backlog: Option<u64>,
    },
}

/// How fast a push is to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Pace {
    /// None is running.
    Idle,
    /// Spread until then.
    Until(Instant),
    /// Somebody waits for it.
    Hurry,
}

/// A request that has not gone out.
#[derive(Debug)]
struct Waiting<J> {
    token: Token,
    lane: Lane,
    since: Instant,
    job: J,
}

/// The puts of one volume.
#[derive(Debug)]
struct Flow<J> {
    number: u64,
    queue: VecDeque<Waiting<J>>,
    /// Bytes that it may put in its turn.
    credit: u64,
    pace: Pace,
    /// The next pack of a push that takes its time goes out then.
    next_at: Instant,
    stored: Meter,
}

impl<J> Flow<J> {
    fn new(number: u64) -> Self {
        Self {
            number,
            queue: VecDeque::new(),
            credit: 0,
            pace: Pace::Idle,
            next_at: Instant(0),
            stored: Meter::default(),
        }
    }

    /// When its first request may go out; `None` if it has none.
    fn due(&self, spread: bool) -> Option<Instant> {
        let first = self.queue.front()?;
        let pack = matches!(first.lane, Lane::Push { backlog: Some(_), .. });
        let waits = spread && pack && matches!(self.pace, Pace::Until(_));
        Some(if waits { self.next_at } else { Instant(0) })
    }

    /// Its first request goes out: says when the next pack is due.
    fn take(&mut self, now: Instant) -> Waiting<J> {
        let waiting = self.queue.pop_front().expect("the caller has seen it");
        if let (Lane::Push { bytes, backlog: Some(backlog), .. }, Pace::Until(end)) =
            (waiting.lane, self.pace)
        {
            let part = bytes as f64 / backlog.max(bytes).max(1) as f64;
            self.next_at = now + Duration(((end - now).0 as f64 * part) as u64);
        }
        waiting
    }
}

/// A request on its way.
#[derive(Clone, Copy, Debug)]
struct UnderWay {
    lane: Lane,
    begun: Instant,
    /// It was the last for which the window had room.
    filled: bool,
    /// It was the only one.
    alone: bool,
}

/// How a request ended, as far as it says something about the store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum End<'a> {
    /// The store did what it was asked, or refused it.
    Answered,
    /// It did not, and may the next time; the text says what happened.
    Failed(&'a str),
}

/// What an administrator sees of the lanes.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct LanesStatus {
    /// Puts and deletes that may be under way now.
    pub window: u32,
    /// Puts and deletes under way.
    pub puts: u32,
    /// Requests that wait for their turn, or for the store.
    pub waiting: u64,
    /// The store does not answer.
    pub away: Option<Away>,
}

/// A store that does not answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Away {
    /// When it was found out.
    pub since: Instant,
    /// When it is tried the next time.
    pub next_try: Instant,
    /// What it said last.
    pub reason: String,
    wait: Duration,
}

/// See the [module](self).
///
/// * `add` takes requests in; `poll_ready` and `poll_overdue` are then drained;
/// * `handle_end` says how one ended;
/// * `poll_timeout` says when to poll again.
#[derive(Debug)]
pub(super) struct Lanes<J> {
    prompt: VecDeque<Waiting<J>>,
    flows: VecDeque<Flow<J>>,
    under_way: BTreeMap<Token, UnderWay>,
    window: Window,
    /// Failures since the last answer.
    failures: u32,
    away: Option<Away>,
    queued_bytes: u64,
    /// With more than this waiting several pushes do not take their time.
    spread_bytes_max: u64,
    random: u64,
}

impl<J> Lanes<J> {
    /// Lanes without requests. Several pushes do not take their time while more
    /// than `spread_bytes_max` wait.
    pub(super) fn new(spread_bytes_max: u64, seed: u64) -> Self {
        Self {
            prompt: VecDeque::new(),
            flows: VecDeque::new(),
            under_way: BTreeMap::new(),
            window: Window::new(),
            failures: 0,
            away: None,
            queued_bytes: 0,
            spread_bytes_max,
            random: seed | 1,
        }
    }

    /// A request that wants to go to the store.
    pub(super) fn add(&mut self, now: Instant, token: Token, lane: Lane, job: J) {
        let waiting = Waiting { token, lane, since: now, job };
        match lane {
            Lane::Read | Lane::Head => self.prompt.push_back(waiting),
            Lane::Push { flow, bytes, .. } => {
                self.queued_bytes += bytes;
                self.flow(flow).queue.push_back(waiting);
            }
        }
    }

    /// A push begins: to be stored by `end`, or as fast as possible.
    pub(super) fn begin_push(&mut self, now: Instant, flow: u64, end: Option<Instant>) {
        let flow = self.flow(flow);
        flow.pace = end.map_or(Pace::Hurry, Pace::Until);
        flow.next_at = now;
    }

    /// Somebody waits for the push that is running.
    pub(super) fn hurry(&mut self, flow: u64) {
        let flow = self.flow(flow);
        if flow.pace != Pace::Idle {
            flow.pace = Pace::Hurry;
        }
    }

    /// The push has ended.
    pub(super) fn end_push(&mut self, flow: u64) {
        self.flow(flow).pace = Pace::Idle;
    }

    /// A volume has ended: the tokens of its puts that have not gone out, and never will.
    pub(super) fn cancel(&mut self, flow: u64) -> Vec<Token> {
        let Some(at) = self.flows.iter().position(|known| known.number == flow) else {
            return Vec::new();
        };
        let gone = self.flows.remove(at).expect("just found");
        self.queued_bytes -= gone.queue.iter().map(|put| put_bytes(put.lane)).sum::<u64>();
        gone.queue.into_iter().map(|put| put.token).collect()
    }

    /// A request that goes to the store now.
    pub(super) fn poll_ready(&mut self, now: Instant) -> Option<(Token, J)> {
        let probe = match &self.away {
            Some(away) if now < away.next_try => return None,
            Some(_) => true,
            None => false,
        };
        let waiting = match self.prompt.pop_front() {
            Some(waiting) => waiting,
            None if probe || self.window.has_room() => self.next_put(now, probe)?,
            None => return None,
        };
        if probe {
            self.note_probe(now);
        }
        if let Lane::Push { bytes, .. } = waiting.lane {
            self.queued_bytes -= bytes;
            self.window.under_way += 1;
        }
        let filled = !self.window.has_room();
        let alone = filled && self.window.under_way == 1;
        let under_way = UnderWay { lane: waiting.lane, begun: now, filled, alone };
        self.under_way.insert(waiting.token, under_way);
        Some((waiting.token, waiting.job))
    }

    /// A read that has waited too long for a store that is away, and why it failed. Whoever asked
    /// may ask again.
    pub(super) fn poll_overdue(&mut self, now: Instant) -> Option<(Token, String)> {
        let away = self.away.as_ref()?;
        let is_over = |waiting: &Waiting<J>| read_ends(waiting).is_some_and(|end| end <= now);
        let at = self.prompt.iter().position(is_over)?;
        let reason = format!("the store is away: {}", away.reason);
        self.prompt.remove(at).map(|read| (read.token, reason))
    }

    /// A request has ended.
    ///
    /// # Panics
    /// If it is not under way.
    pub(super) fn handle_end(&mut self, now: Instant, token: Token, end: End<'_>) {
        let request = self.under_way.remove(&token).expect("a request ends once");
        if let Lane::Push { flow, bytes, .. } = request.lane {
            self.window.under_way -= 1;
            if end == End::Answered {
                self.window.note_answer(now - request.begun, bytes, &request);
                if let Some(flow) = self.flows.iter_mut().find(|known| known.number == flow) {
                    flow.stored.add(now, bytes);
                }
            } else {
                self.window.note_failure(now, request.begun);
            }
        }
        match end {
            End::Answered => self.note_answer(now),
            End::Failed(reason) => self.note_failure(now, reason),
        }
    }

    /// When to poll again, if no request ends before.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        let spread = self.spreads();
        let mut puts = self.flows.iter().filter_map(|flow| flow.due(spread));
        match &self.away {
            Some(away) => {
                let overdue = self.prompt.iter().filter_map(read_ends).min();
                let waits = !self.prompt.is_empty() || puts.next().is_some();
                waits.then_some(away.next_try).into_iter().chain(overdue).min()
            }
            None if self.window.has_room() => puts.min(),
            None => None,
        }
    }

    /// What there is to see.
    pub(super) fn status(&self) -> LanesStatus {
        let puts: usize = self.flows.iter().map(|flow| flow.queue.len()).sum();
        LanesStatus {
            window: self.window.size as u32,
            puts: self.window.under_way,
            waiting: (self.prompt.len() + puts) as u64,
            away: self.away.clone(),
        }
    }

    /// Bytes a second of a volume's that were stored in the last seconds.
    pub(super) fn rate(&self, now: Instant, flow: u64) -> u64 {
        let flow = self.flows.iter().find(|known| known.number == flow);
        flow.map_or(0, |flow| flow.stored.rate(now))
    }

    fn flow(&mut self, number: u64) -> &mut Flow<J> {
        let at = self.flows.iter().position(|flow| flow.number == number);
        let at = at.unwrap_or_else(|| {
            self.flows.push_back(Flow::new(number));
            self.flows.len() - 1
        });
        &mut self.flows[at]
    }

    /// Whether pushes may take their time.
    fn spreads(&self) -> bool {
        let running = self.flows.iter().filter(|flow| flow.pace != Pace::Idle).count();
        let crowded = running > 1 && self.queued_bytes > self.spread_bytes_max;
        !crowded && self.flows.iter().all(|flow| flow.pace != Pace::Hurry)
    }

    /// The put whose turn it is. A probe is not spread. The first of the flows has its turn; it
    /// gives it up for a share of its own at the next one, so each comes round twice at most.
    fn next_put(&mut self, now: Instant, probe: bool) -> Option<Waiting<J>> {
        let spread = self.spreads() && !probe;
        for _ in 0..2 * self.flows.len() {
            let flow = self.flows.front_mut()?;
            match flow.due(spread) {
                Some(due) if due <= now => {
                    let cost = put_bytes(flow.queue[0].lane).clamp(COST_MIN, QUANTUM);
                    if flow.credit >= cost {
                        flow.credit -= cost;
                        return Some(flow.take(now));
                    }
                    flow.credit += QUANTUM;
                }
                Some(_) => {}
                None => flow.credit = 0,
            }
            self.flows.rotate_left(1);
        }
        None
    }

    fn note_answer(&mut self, now: Instant) {
        self.failures = 0;
        if let Some(away) = self.away.take() {
            log::info!("the store answers again, after {} s", (now - away.since).0 / 1_000_000_000);
        }
    }

    fn note_failure(&mut self, now: Instant, reason: &str) {
        self.failures += 1;
        if let Some(away) = &mut self.away {
            away.reason = reason.into();
        } else if self.failures >= FAILURES_MAX {
            log::warn!("the store does not answer; it is tried now and then: {reason}");
            let (wait, _) = PROBE_AFTER;
            let next_try = now + self.jittered(wait);
            self.away = Some(Away { since: now, next_try, reason: reason.into(), wait });
        }
    }

    /// The store is tried. If it does not answer soon, something else is tried.
    fn note_probe(&mut self, now: Instant) {
        let (_, longest) = PROBE_AFTER;
        let Some(wait) = self.away.as_ref().map(|away| away.wait) else { return };
        let wait = Duration(wait.0 * 2).min(longest);
        let next_try = now + self.jittered(wait);
        if let Some(away) = &mut self.away {
            (away.wait, away.next_try) = (wait, next_try);
        }
    }

    /// Between half of a span and all of it, so that many servers do not come back at once.
    fn jittered(&mut self, span: Duration) -> Duration {
        // Xorshift (Marsaglia 2003).
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        Duration(span.0 / 2 + self.random % (span.0 / 2 + 1))
    }
}

/// When a read has waited too long.
fn read_ends<J>(waiting: &Waiting<J>) -> Option<Instant> {
    (waiting.lane == Lane::Read).then_some(waiting.since + READ_PATIENCE)
}

fn put_bytes(lane: Lane) -> u64 {
    match lane {
        Lane::Push { bytes, .. } => bytes,
        Lane::Read | Lane::Head => 0,
    }
}

/// How many puts may be under way. What it goes by is latency, as TCP Vegas does (Brakmo and
/// Peterson 1995): the store's queue is where requests only wait.
#[derive(Debug)]
struct Window {
    size: f64,
    under_way: u32,
    /// What a request of 2^i bytes takes in an idle store, as far as is known.
    idle: [Option<Duration>; 64],
    /// Failures of requests from before this have halved it already.
    halved_at: Instant,
}

impl Window {
    const fn new() -> Self {
        Self { size: WINDOW_START, under_way: 0, idle: [None; 64], halved_at: Instant(0) }
    }

    fn has_room(&self) -> bool {
        self.under_way < self.size as u32
    }

    /// One that was alone says anew what an idle store takes: it may have become slower.
    fn note_answer(&mut self, took: Duration, bytes: u64, request: &UnderWay) {
        if bytes < TELLING_BYTES {
            return;
        }
        let idle = &mut self.idle[bytes.ilog2() as usize];
        let least = match *idle {
            Some(idle) if request.alone => Duration(idle.0.midpoint(took.0)),
            Some(idle) => idle.min(took),
            None => took,
        };
        *idle = Some(least);
        if took.0 > least.0 * QUEUEING {
            self.size -= 1.0 / self.size;
        } else if request.filled {
            self.size += 1.0 / self.size;
        }
        self.size = self.size.clamp(1.0, f64::from(WINDOW_MAX));
    }

    fn note_failure(&mut self, now: Instant, begun: Instant) {
        if begun >= self.halved_at {
            self.size = (self.size / 2.0).max(1.0);
            self.halved_at = now;
        }
    }
}

/// What was stored in the last seconds.
#[derive(Debug, Default)]
struct Meter {
    /// By second.
    bytes: VecDeque<(u64, u64)>,
}

impl Meter {
    fn add(&mut self, now: Instant, bytes: u64) {
        let second = now.seconds();
        self.bytes.retain(|(at, _)| at + RATE_SECONDS > second);
        match self.bytes.back_mut() {
            Some((at, sum)) if *at == second => *sum += bytes,
            _ => self.bytes.push_back((second, bytes)),
        }
    }

    /// Bytes a second since the first second that counts.
    fn rate(&self, now: Instant) -> u64 {
        let recent = self.bytes.iter().filter(|(at, _)| at + RATE_SECONDS > now.seconds());
        let (first, sum) =
            recent.fold((None, 0), |(first, sum), (at, bytes)| (first.or(Some(*at)), sum + bytes));
        let Some(first) = first else { return 0 };
        let span = (now - Instant(first * 1_000_000_000)).0.max(1_000_000_000);
        (u128::from(sum) * 1_000_000_000 / u128::from(span)) as u64
    }
}

#[cfg(test)]
mod tests;
