//! Properties of the ring arithmetic, both ends: nothing is lost, nothing is made up, nobody sleeps through work, and a peer that
//! lies gets no further than an error.

use std::collections::VecDeque;

use hypercall_abi::io::ring::{BackIndices, FrontIndices, Overflow, RingHeader, must_notify};
use hypercall_abi::io::xenstore::{piece, waiting};
use proptest::prelude::*;

/// Where an index may start: everywhere, often just before it wraps round.
fn start() -> impl Strategy<Value = u32> {
    prop_oneof![any::<u32>(), (u32::MAX - 70)..=u32::MAX, 0u32..3]
}

/// Slots of a ring.
fn ring_size() -> impl Strategy<Value = u32> {
    (0u32..7).prop_map(|order| 1 << order)
}

/// What one end does next: the steps between which the other end may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Has work to look for, or new requests to make.
    Awake,
    /// Has stored its producer's index, from the first to the second, and not looked at the peer's event index yet.
    Produced(u32, u32),
    /// Has stored its own event index, and not looked for more yet.
    Armed,
    /// Waits for a notification.
    Asleep,
}

/// Two ends on one page, run in any order, one load or store at a time.
struct Pair {
    page: RingHeader,
    front: FrontIndices,
    back: BackIndices,
    front_step: Step,
    back_step: Step,
    /// Requests still to make.
    to_ask: u32,
    /// Indices of requests on their way, of requests taken, and of responses.
    asked: VecDeque<u32>,
    taken: VecDeque<u32>,
    answered: VecDeque<u32>,
    done: u32,
}

impl Pair {
    fn new(slots: u32, start: u32, to_ask: u32) -> Pair {
        let page = RingHeader {
            req_prod: start,
            rsp_prod: start,
            req_event: start.wrapping_add(1),
            rsp_event: start.wrapping_add(1),
            ..RingHeader::INITIAL
        };
        Pair {
            page,
            front: FrontIndices::attach(slots, start),
            back: BackIndices::new(slots, start),
            front_step: Step::Awake,
            back_step: Step::Asleep,
            to_ask,
            asked: VecDeque::new(),
            taken: VecDeque::new(),
            answered: VecDeque::new(),
            done: 0,
        }
    }

    /// The front end: takes responses, makes up to `burst` requests, sleeps when there is nothing to do.
    fn step_front(&mut self, burst: u32) {
        match self.front_step {
            Step::Asleep => {}
            Step::Produced(old, new) => {
                if must_notify(old, new, self.page.req_event) {
                    self.back_step = wake(self.back_step);
                }
                self.front_step = Step::Awake;
            }
            Step::Armed => {
                let more = self.page.rsp_prod != self.front.rsp_event().wrapping_sub(1);
                self.front_step = if more { Step::Awake } else { Step::Asleep };
            }
            Step::Awake => {
                let mut idle = true;
                while let Some(index) = self.front.next_response(self.page.rsp_prod).expect("an honest peer")
                {
                    assert_eq!(self.answered.pop_front(), Some(index), "responses in order, none made up");
                    self.done += 1;
                    idle = false;
                }
                let old = self.page.req_prod;
                for _ in 0..burst.min(self.to_ask) {
                    let Some(index) = self.front.next_request() else { break };
                    self.asked.push_back(index);
                    self.to_ask -= 1;
                }
                let new = self.front.req_prod();
                if new != old {
                    self.page.req_prod = new;
                    self.front_step = Step::Produced(old, new);
                } else if idle && (self.to_ask == 0 || self.front.free() == 0) {
                    self.page.rsp_event = self.front.rsp_event();
                    self.front_step = Step::Armed;
                }
            }
        }
    }

    /// The back end: takes requests, answers up to `burst`, sleeps when there is nothing to do.
    fn step_back(&mut self, burst: u32) {
        match self.back_step {
            Step::Asleep => {}
            Step::Produced(old, new) => {
                if must_notify(old, new, self.page.rsp_event) {
                    self.front_step = wake(self.front_step);
                }
                self.back_step = Step::Awake;
            }
            Step::Armed => {
                let more = self.page.req_prod != self.back.req_event().wrapping_sub(1);
                self.back_step = if more { Step::Awake } else { Step::Asleep };
            }
            Step::Awake => {
                while let Some(index) = self.back.next_request(self.page.req_prod).expect("an honest peer") {
                    assert_eq!(self.asked.pop_front(), Some(index), "requests in order, none made up");
                    self.taken.push_back(index);
                }
                let old = self.page.rsp_prod;
                for _ in 0..burst {
                    let Some(index) = self.back.next_response() else { break };
                    assert!(self.taken.pop_front().is_some(), "an answer to nothing");
                    self.answered.push_back(index);
                }
                let new = self.back.rsp_prod();
                if new != old {
                    self.page.rsp_prod = new;
                    self.back_step = Step::Produced(old, new);
                } else if self.back.unanswered() == 0 {
                    self.page.req_event = self.back.req_event();
                    self.back_step = Step::Armed;
                }
            }
        }
    }
}

/// What a notification makes of an end; one that is awake, or about to look once more, needs none.
fn wake(step: Step) -> Step {
    if step == Step::Asleep { Step::Awake } else { step }
}

proptest! {
    #[test]
    fn nobody_sleeps_through_work(
        slots in ring_size(),
        start in start(),
        to_ask in 0u32..200,
        schedule in prop::collection::vec((any::<bool>(), 1u32..5), 0..2000),
    ) {
        let mut pair = Pair::new(slots, start, to_ask);
        // The schedule first, then each in turn until both sleep for good.
        let rest = (0..20_000u32).map(|n| (n % 2 == 0, 3));
        for (front, burst) in schedule.into_iter().chain(rest) {
            if front { pair.step_front(burst) } else { pair.step_back(burst) }
            prop_assert!(pair.front.outstanding() <= slots);
            if pair.front_step == Step::Asleep && pair.back_step == Step::Asleep {
                break;
            }
        }
        prop_assert_eq!((pair.front_step, pair.back_step), (Step::Asleep, Step::Asleep), "they never come to rest");
        prop_assert_eq!((pair.to_ask, pair.done, pair.asked.len(), pair.taken.len()), (0, to_ask, 0, 0));
    }

    #[test]
    fn a_lying_back_end_is_seen_or_harmless(
        slots in ring_size(),
        start in start(),
        claims in prop::collection::vec((0u32..4, prop_oneof![any::<u32>(), (0u32..80)]), 0..300),
    ) {
        let mut front = FrontIndices::attach(slots, start);
        let mut answers = 0u64;
        let mut requests = 0u64;
        for (asks, claim) in claims {
            for _ in 0..asks {
                requests += u64::from(front.next_request().is_some());
            }
            // Numbers near the truth and numbers from nowhere.
            let claim = if claim < 80 { start.wrapping_add(claim) } else { claim };
            let truth = front.req_prod().wrapping_sub(front.outstanding());
            match front.next_response(claim) {
                Ok(Some(index)) => {
                    prop_assert_eq!(index, truth);
                    answers += 1;
                }
                Ok(None) => prop_assert_eq!(claim, truth),
                Err(Overflow) => prop_assert!(claim.wrapping_sub(truth) > front.outstanding()),
            }
            prop_assert!(front.free() <= slots && answers <= requests);
        }
    }

    #[test]
    fn a_lying_front_end_is_seen_or_harmless(
        slots in ring_size(),
        start in start(),
        claims in prop::collection::vec((0u32..4, prop_oneof![any::<u32>(), (0u32..80)]), 0..300),
    ) {
        let mut back = BackIndices::new(slots, start);
        let mut consumed = start;
        for (answers, claim) in claims {
            for _ in 0..answers {
                back.next_response();
            }
            let claim = if claim < 80 { start.wrapping_add(claim) } else { claim };
            match back.next_request(claim) {
                Ok(Some(index)) => {
                    prop_assert_eq!(index, consumed);
                    consumed = consumed.wrapping_add(1);
                }
                Ok(None) => prop_assert_eq!(claim, consumed),
                Err(Overflow) => prop_assert!(
                    claim.wrapping_sub(back.rsp_prod()) > slots || claim.wrapping_sub(consumed) > slots
                ),
            }
            prop_assert!(back.unanswered() <= slots, "never more work than the ring holds");
        }
    }

    #[test]
    fn notified_exactly_when_the_event_is_passed(old in start(), produced in 0u32..300, ahead in -400i64..400) {
        let new = old.wrapping_add(produced);
        let event = old.wrapping_add(ahead as u32);
        let passed = (1..=produced).any(|n| old.wrapping_add(n) == event);
        prop_assert_eq!(must_notify(old, new, event), passed);
    }

    #[test]
    fn byte_rings_give_back_what_was_written(
        start in start(),
        pieces in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..2000), 0usize..2000), 0..40),
    ) {
        const SIZE: usize = 1024;
        let mut ring = [0u8; SIZE];
        let (mut producer, mut consumer) = (start, start);
        let mut expected = VecDeque::new();
        for (bytes, read) in pieces {
            let mut left = &bytes[..bytes.len().min(SIZE - waiting(producer, consumer, SIZE).expect("honest"))];
            while !left.is_empty() {
                let (at, length) = piece(producer, left.len(), SIZE);
                ring[at..at + length].copy_from_slice(&left[..length]);
                expected.extend(&left[..length]);
                producer = producer.wrapping_add(length as u32);
                left = &left[length..];
            }
            let mut left = read.min(waiting(producer, consumer, SIZE).expect("honest"));
            while left > 0 {
                let (at, length) = piece(consumer, left, SIZE);
                for byte in &ring[at..at + length] {
                    prop_assert_eq!(expected.pop_front(), Some(*byte));
                }
                consumer = consumer.wrapping_add(length as u32);
                left -= length;
            }
        }
    }
}
