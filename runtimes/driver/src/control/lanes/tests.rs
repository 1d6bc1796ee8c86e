use super::*;

const MIB: u64 = 1 << 20;
const PACK: u64 = 8 * MIB;

fn secs(at: f64) -> Instant {
    Instant((at * 1e9) as u64)
}

/// A store that does a request in `latency`, and moves `rate` bytes a second, of all requests
/// together.
struct Sim {
    lanes: Lanes<u64>,
    now: Instant,
    latency: Duration,
    rate: u64,
    /// When it has moved all that it was given.
    moved: Instant,
    /// Requests by the time of their answers.
    answers: BTreeMap<(Instant, Token), Option<u64>>,
    /// Requests that it was given: when, and whose.
    sent: Vec<(Instant, u64)>,
    away: bool,
    tokens: u64,
    /// Bytes stored, by flow.
    stored: BTreeMap<u64, u64>,
    most: usize,
}

/// The flow of what is no put.
const PROMPT: u64 = 0;

impl Sim {
    fn new(latency_ms: u64, rate: u64) -> Self {
        Self {
            lanes: Lanes::new(1 << 40, 7),
            now: Instant(1),
            latency: Duration::from_millis(latency_ms),
            rate,
            moved: Instant(0),
            answers: BTreeMap::new(),
            sent: Vec::new(),
            away: false,
            tokens: 0,
            stored: BTreeMap::new(),
            most: 0,
        }
    }

    fn add(&mut self, lane: Lane) -> Token {
        self.tokens += 1;
        let flow = if let Lane::Push { flow, .. } = lane { flow } else { PROMPT };
        self.lanes.add(self.now, Token(self.tokens), lane, flow);
        Token(self.tokens)
    }

    fn put(&mut self, flow: u64, bytes: u64, backlog: Option<u64>) -> Token {
        self.add(Lane::Push { flow, bytes, backlog })
    }

    /// Packs of a push with nothing behind them.
    fn packs(&mut self, flow: u64, count: u64) {
        for left in (1..=count).rev() {
            self.put(flow, PACK, Some(left * PACK));
        }
    }

    fn send(&mut self) {
        while let Some((token, flow)) = self.lanes.poll_ready(self.now) {
            let bytes = put_bytes(self.lanes.under_way[&token].lane);
            self.sent.push((self.now, flow));
            let moved = self.moved.max(self.now);
            self.moved = moved + Duration((bytes as f64 / self.rate as f64 * 1e9) as u64);
            let end = if self.away { self.now } else { self.moved };
            self.answers.insert((end + self.latency, token), (flow != PROMPT).then_some(bytes));
            self.most = self.most.max(self.answers.len());
        }
    }

    /// Until then, or until nothing is left to do.
    fn run(&mut self, until: Instant) {
        loop {
            self.send();
            let answer = self.answers.keys().next().map(|(at, _)| *at);
            let next = answer.into_iter().chain(self.lanes.poll_timeout()).min();
            let Some(next) = next.filter(|next| *next <= until) else {
                self.now = until;
                return;
            };
            assert!(next >= self.now || answer != Some(next), "answers come in order");
            self.now = self.now.max(next);
            while let Some(first) = self.answers.first_entry() {
                if first.key().0 > self.now {
                    break;
                }
                let ((_, token), bytes) = first.remove_entry();
                self.end(token, bytes);
            }
        }
    }

    fn end(&mut self, token: Token, bytes: Option<u64>) {
        let lane = self.lanes.under_way[&token].lane;
        let end = if self.away { End::Failed("no route") } else { End::Answered };
        self.lanes.handle_end(self.now, token, end);
        if let (Lane::Push { flow, .. }, Some(bytes), false) = (lane, bytes, self.away) {
            *self.stored.entry(flow).or_default() += bytes;
        } else if self.away {
            // Whoever asked asks again at once: nobody is that impatient, but some are many.
            self.add(lane);
        }
    }
}

#[test]
fn volumes_share_by_bytes_and_not_by_requests() {
    let mut sim = Sim::new(5, 100 * MIB);
    for flow in [1, 2, 3] {
        sim.lanes.begin_push(sim.now, flow, None);
    }
    sim.packs(1, 100);
    for _ in 0..2000 {
        sim.put(2, MIB / 2, Some(PACK));
    }
    sim.packs(3, 100);
    sim.run(secs(6.0));
    let all: u64 = sim.stored.values().sum();
    assert!(all > 550 * MIB, "{all}: the store is busy all the time");
    for (flow, bytes) in &sim.stored {
        let share = *bytes as f64 / all as f64;
        assert!((0.30..0.37).contains(&share), "flow {flow} has {share}");
    }
}

#[test]
fn reads_and_heads_go_out_at_once_behind_nothing() {
    let mut sim = Sim::new(20, 50 * MIB);
    sim.lanes.begin_push(sim.now, 1, None);
    sim.packs(1, 100);
    sim.run(secs(1.0));
    assert!(!sim.lanes.window.has_room() && sim.lanes.status().waiting > 0);
    for lane in [Lane::Read, Lane::Head] {
        sim.add(lane);
        sim.send();
        assert_eq!(sim.sent.last(), Some(&(sim.now, PROMPT)));
    }
}

#[test]
fn the_window_grows_with_latency_and_not_with_a_queue() {
    // 200 ms away and 400 MiB/s: 10 packs under way fill the line.
    let mut far = Sim::new(200, 400 * MIB);
    far.lanes.begin_push(far.now, 1, None);
    far.packs(1, 1000);
    far.run(secs(10.0));
    let before = far.stored[&1];
    far.run(secs(20.0));
    let rate = (far.stored[&1] - before) / 10;
    assert!(rate > 340 * MIB, "{} MiB/s", rate / MIB);
    // At hand, and 100 MiB/s: more than two would only wait for each other.
    let mut near = Sim::new(1, 100 * MIB);
    near.lanes.begin_push(near.now, 1, None);
    near.packs(1, 300);
    near.run(secs(20.0));
    assert!(near.stored[&1] > 19 * 95 * MIB);
    assert!(near.lanes.status().window <= 3, "{:?}", near.lanes.status());
    assert!(far.most <= WINDOW_MAX as usize);
}

#[test]
fn a_store_that_becomes_slower_is_learned_anew() {
    let mut sim = Sim::new(50, 10_000 * MIB);
    sim.lanes.begin_push(sim.now, 1, None);
    sim.packs(1, 2000);
    sim.run(secs(5.0));
    assert_eq!(sim.lanes.status().window, WINDOW_MAX);
    sim.latency = Duration::from_millis(400);
    sim.run(secs(60.0));
    assert_eq!(sim.lanes.status().window, WINDOW_MAX);
}

#[test]
fn failures_halve_the_window_once_for_all_that_were_under_way() {
    let mut sim = Sim::new(10, 1000 * MIB);
    sim.lanes.begin_push(sim.now, 1, None);
    sim.packs(1, 20);
    sim.send();
    let tokens: Vec<Token> = sim.lanes.under_way.keys().copied().collect();
    assert_eq!(tokens.len(), 4);
    sim.now = secs(0.1);
    sim.lanes.handle_end(sim.now, tokens[0], End::Failed("slow down"));
    sim.lanes.handle_end(sim.now, tokens[1], End::Failed("slow down"));
    assert_eq!((sim.lanes.status().window, sim.lanes.status().away), (2, None));
    sim.lanes.handle_end(sim.now, tokens[2], End::Answered);
    let next = sim.lanes.poll_ready(sim.now).expect("room for one").0;
    sim.now = secs(0.2);
    sim.lanes.handle_end(sim.now, next, End::Failed("slow down"));
    assert_eq!(sim.lanes.status().window, 1);
}

#[test]
fn a_push_by_age_is_spread_over_its_time() {
    let mut sim = Sim::new(5, 1000 * MIB);
    sim.lanes.begin_push(sim.now, 1, Some(secs(5.0)));
    sim.packs(1, 10);
    // What comes behind the packs is not spread.
    sim.put(1, MIB, None);
    sim.run(secs(20.0));
    let times: Vec<f64> = sim.sent.iter().map(|(at, _)| at.0 as f64 / 1e9).collect();
    assert!(times[0] < 0.01 && times[9] < 5.0 && times[10] < 5.0, "{times:?}");
    for pair in times[..10].windows(2) {
        let gap = pair[1] - pair[0];
        assert!((0.3..0.7).contains(&gap), "{times:?}");
    }
}

#[test]
fn a_push_that_is_late_has_no_time_to_take() {
    let mut sim = Sim::new(5, 1000 * MIB);
    sim.now = secs(9.0);
    sim.lanes.begin_push(sim.now, 1, Some(secs(8.0)));
    sim.packs(1, 10);
    sim.run(secs(9.5));
    assert_eq!(sim.stored[&1], 10 * PACK);
}

#[test]
fn nobody_takes_his_time_while_somebody_waits() {
    let mut sim = Sim::new(5, 1000 * MIB);
    sim.lanes.begin_push(sim.now, 1, Some(secs(5.0)));
    sim.lanes.begin_push(sim.now, 2, Some(secs(5.0)));
    sim.packs(1, 50);
    sim.run(secs(1.0));
    assert!(sim.stored[&1] < 15 * PACK, "{}", sim.stored[&1] / PACK);
    sim.lanes.hurry(2);
    sim.run(secs(2.0));
    assert_eq!(sim.stored[&1], 50 * PACK, "it would keep the other's batches out");
    // Nobody waits for a push that has ended.
    sim.lanes.end_push(2);
    sim.lanes.hurry(2);
    sim.lanes.begin_push(sim.now, 1, Some(secs(8.0)));
    sim.packs(1, 50);
    sim.run(secs(3.0));
    assert!(sim.stored[&1] < 65 * PACK);
}

#[test]
fn several_do_not_take_their_time_while_much_memory_waits() {
    let mut sim = Sim::new(5, 1000 * MIB);
    sim.lanes = Lanes::new(2 * PACK, 7);
    sim.lanes.begin_push(sim.now, 1, Some(secs(5.0)));
    sim.packs(1, 10);
    sim.run(secs(0.5));
    assert!(sim.stored[&1] < 3 * PACK, "it keeps nobody out");
    sim.lanes.begin_push(sim.now, 2, Some(secs(5.0)));
    sim.run(secs(1.0));
    assert_eq!(sim.lanes.queued_bytes, 2 * PACK);
}

#[test]
fn a_store_that_is_away_is_tried_now_and_then_and_used_at_once_when_it_is_back() {
    let mut sim = Sim::new(5, 1000 * MIB);
    sim.away = true;
    for flow in 1..=50 {
        sim.lanes.begin_push(sim.now, flow, None);
        sim.packs(flow, 2);
    }
    sim.run(secs(0.3));
    let away = sim.lanes.status().away.expect("it was found out");
    assert_eq!(away.reason, "no route");
    let before = sim.sent.len();
    assert!(before <= 7, "{before}: a window's worth, and no more");
    sim.run(secs(60.0));
    let tries = sim.sent.len() - before;
    assert!((12..30).contains(&tries), "{tries} in a minute, of 100 that wait");
    sim.away = false;
    let next = sim.lanes.status().away.expect("still").next_try;
    sim.run(next + Duration::from_millis(1000));
    assert_eq!(sim.lanes.status().away, None);
    assert_eq!(sim.stored.values().sum::<u64>(), 100 * PACK, "all of it");
}

#[test]
fn any_answer_says_that_the_store_is_back() {
    let mut sim = Sim::new(5, 1000 * MIB);
    let tokens: Vec<Token> = (0..4).map(|_| sim.add(Lane::Head)).collect();
    sim.send();
    sim.answers.clear();
    tokens[..3].iter().for_each(|token| {
        sim.lanes.handle_end(sim.now, *token, End::Failed("gone"));
    });
    assert!(sim.lanes.status().away.is_some());
    sim.add(Lane::Read);
    assert!(sim.lanes.poll_ready(sim.now).is_none());
    sim.lanes.handle_end(sim.now, tokens[3], End::Answered);
    assert!(sim.lanes.poll_ready(sim.now).is_some());
}

#[test]
fn a_store_without_requests_is_not_tried() {
    let mut sim = Sim::new(5, 1000 * MIB);
    for _ in 0..3 {
        let token = sim.add(Lane::Head);
        sim.send();
        sim.answers.clear();
        sim.lanes.handle_end(sim.now, token, End::Failed("gone"));
    }
    assert!(sim.lanes.status().away.is_some());
    assert_eq!(sim.lanes.poll_timeout(), None);
}

#[test]
fn a_read_does_not_wait_for_ever_and_a_put_does() {
    let mut sim = Sim::new(5, 1000 * MIB);
    let first: Vec<Token> = (0..3).map(|_| sim.add(Lane::Head)).collect();
    sim.send();
    sim.answers.clear();
    first.iter().for_each(|token| sim.lanes.handle_end(sim.now, *token, End::Failed("gone")));
    // These are the tries; they hang.
    for _ in 0..20 {
        sim.add(Lane::Head);
    }
    let read = sim.add(Lane::Read);
    let put = sim.put(1, PACK, Some(PACK));
    let mut at = sim.now;
    while at < sim.now + READ_PATIENCE {
        assert_eq!(sim.lanes.poll_overdue(at), None);
        while sim.lanes.poll_ready(at).is_some() {}
        at = sim.lanes.poll_timeout().expect("the next try").max(at);
    }
    let (overdue, reason) = sim.lanes.poll_overdue(at).expect("its time has come");
    assert_eq!((overdue, reason.as_str()), (read, "the store is away: gone"));
    assert_eq!(sim.lanes.poll_overdue(at), None);
    assert_eq!(sim.lanes.cancel(1), [put]);
}

#[test]
fn the_puts_of_a_volume_that_has_ended_never_go_out() {
    let mut sim = Sim::new(5, 1000 * MIB);
    sim.lanes.begin_push(sim.now, 1, None);
    sim.packs(1, 6);
    sim.put(2, PACK, Some(PACK));
    sim.send();
    assert_eq!(sim.lanes.cancel(1).len() + sim.sent.len(), 7);
    sim.run(secs(5.0));
    let flows: Vec<u64> = sim.sent.iter().map(|(_, flow)| *flow).collect();
    assert_eq!(flows.iter().filter(|flow| **flow == 2).count(), 1);
    assert!(flows.len() < 7 && sim.lanes.queued_bytes == 0);
    assert_eq!(sim.lanes.cancel(1), []);
}

#[test]
fn rates_are_of_the_last_seconds() {
    let mut sim = Sim::new(5, 64 * MIB);
    sim.lanes.begin_push(sim.now, 1, None);
    sim.packs(1, 1000);
    sim.run(secs(10.5));
    let rate = sim.lanes.rate(sim.now, 1);
    assert!((55..70).contains(&(rate / MIB)), "{} MiB/s", rate / MIB);
    assert_eq!(sim.lanes.rate(secs(60.0), 1), 0);
    assert_eq!(sim.lanes.rate(sim.now, 2), 0);
}
