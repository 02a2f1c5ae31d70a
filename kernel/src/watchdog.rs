//! The watchdog: finds a processor that no longer comes back from ring 0.
//!
//! Each processor keeps a word, [`CpuShared::entered`]: the time-stamp counter at which it entered ring 0, and 0 while it is in a guest
//! or sleeps. There it takes any interrupt at once, whatever the guest masks, so it cannot be stuck; and an entry's work has an end
//! (record 0004). So a processor is stuck when its word stays the same.
//!
//! Whoever *looks* compares all words with those of the look before. One that stays gets a *strike*; with [`Watchdog::configure`]'s limit of
//! strikes in a row its processor is stuck. Looks are a second apart or more. Counted are looks and not time: if the whole machine is
//! stopped and goes on (a debugger, a virtual machine below us), that costs one strike at most.
//!
//! There is no tick for this, and nothing on the way back to a guest but the word. Looks are taken
//! - with each timer interrupt and each choice of the scheduler that comes anyway;
//! - a second after a processor was found in ring 0, by who found it, as long as it stays there;
//! - a second after a processor was kicked, by who kicked it;
//! - in the loops in which one processor waits for another (`sync::relax`);
//! - by an idle processor after 2, 4, 8, ... seconds of idling: so a machine that sleeps hardly ever wakes for this, and one whose only
//!   busy processor is stuck is found so before it has been stuck for much longer than it had run well.
//!
//! A processor that waits for another one stays in ring 0 too. It is told apart by the rounds of waiting that it counts, and reported
//! beside the one that does not move at all; alone, it is a deadlock's.
//!
//! [`CpuShared::entered`]: crate::hypervisor::CpuShared::entered
#![forbid(unsafe_code)]

use alloc::boxed::Box;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::hypervisor::Hypervisor;
use crate::platform::{CpuId, CpuSet, Platform};

/// Time between two looks.
pub const PERIOD_NS: u64 = 1_000_000_000;
/// Strikes until a processor counts as stuck, unless the operator says otherwise: seconds, as Xen's `watchdog_timeout`.
pub const DEFAULT_LIMIT: u32 = 5;
/// After how long an idle processor looks first; then after twice that, and so on.
const FIRST_IDLE_LOOK_NS: u64 = 2 * PERIOD_NS;
/// When a processor that the operator named stops, on purpose, so that there is something to find.
const WEDGE_NS: u64 = 3_000_000_000;
/// A processor that waits looks at the clock once in so many rounds.
const ROUNDS: u64 = 1024;

/// What the watchdog keeps for one processor.
#[repr(align(64))]
#[derive(Default)]
struct Pulse {
    /// Rounds of waiting for another processor. It alone writes it, as the next three.
    waits: AtomicU64,
    /// When it owes a look; 0 for not at all.
    owed_ns: AtomicU64,
    /// When it looks although it idles, and how long after the look before; 0 while it runs guests.
    idle_ns: AtomicU64,
    idle_step_ns: AtomicU64,
    /// As of the last look, written by whoever looks.
    seen: AtomicU64,
    seen_waits: AtomicU64,
    strikes: AtomicU32,
}

/// Who is stuck.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stuck {
    /// They show no life at all.
    pub silent: CpuSet,
    /// They wait for another processor, without an end.
    pub waiting: CpuSet,
    /// For how many seconds.
    pub seconds: u32,
}

/// What a look found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    /// These are in ring 0.
    Inside(CpuSet),
    /// Some have been for too long.
    Stuck(Stuck),
}

/// The state of the watchdog.
pub struct Watchdog {
    pulses: Box<[Pulse]>,
    /// When the next look may be taken.
    next_ns: AtomicU64,
    limit: AtomicU32,
    /// Number of a processor that stops on purpose, plus one; 0 for none.
    wedge: AtomicU32,
}

impl Watchdog {
    /// A watchdog for processors 0 to `cpus` - 1.
    pub fn new(cpus: u32) -> Watchdog {
        Watchdog {
            pulses: (0..cpus).map(|_| Pulse::default()).collect(),
            next_ns: AtomicU64::new(0),
            limit: AtomicU32::new(DEFAULT_LIMIT),
            wedge: AtomicU32::new(0),
        }
    }

    /// Sets after how many seconds in ring 0 a processor is stuck; 0: never. And which one is to stop, for a test.
    pub fn configure(&self, seconds: u32, wedge: Option<u32>) {
        self.limit.store(seconds, Ordering::Relaxed);
        self.wedge.store(wedge.map_or(0, |cpu| cpu.saturating_add(1)), Ordering::Relaxed);
        if let Some(pulse) = wedge.and_then(|cpu| self.pulse(CpuId(cpu))) {
            pulse.owed_ns.store(WEDGE_NS, Ordering::Relaxed);
        }
    }

    fn limit(&self) -> u32 {
        self.limit.load(Ordering::Relaxed)
    }

    /// A processor alone has nobody to look at it.
    fn is_on(&self) -> bool {
        self.limit() != 0 && self.pulses.len() > 1
    }

    /// Whether anybody has to look, or to stop.
    fn has_work(&self) -> bool {
        self.is_on() || self.wedge.load(Ordering::Relaxed) != 0
    }

    // Numbers come from the platform and are in range; none is worth a panic here.
    fn pulse(&self, cpu: CpuId) -> Option<&Pulse> {
        self.pulses.get(cpu.0 as usize)
    }

    /// When this processor's timer has to fire for the watchdog.
    pub fn wake_ns(&self, cpu: CpuId) -> Option<u64> {
        let pulse = self.pulse(cpu)?;
        [&pulse.owed_ns, &pulse.idle_ns]
            .into_iter()
            .map(|at| at.load(Ordering::Relaxed))
            .filter(|at| *at != 0)
            .min()
    }

    /// This processor idles from now on.
    pub fn idles(&self, cpu: CpuId, now: u64) {
        if let Some(pulse) = self.pulse(cpu)
            && self.is_on()
            && pulse.idle_ns.load(Ordering::Relaxed) == 0
        {
            pulse.idle_step_ns.store(FIRST_IDLE_LOOK_NS, Ordering::Relaxed);
            pulse.idle_ns.store(now.saturating_add(FIRST_IDLE_LOOK_NS), Ordering::Relaxed);
        }
    }

    /// This processor runs guests from now on.
    pub fn works(&self, cpu: CpuId) {
        if let Some(pulse) = self.pulse(cpu) {
            pulse.idle_ns.store(0, Ordering::Relaxed);
        }
    }

    /// This processor needs another one: it owes a look in a second. Whether it did not before, and its timer is to be set.
    fn owe(&self, cpu: CpuId, now: impl FnOnce() -> u64) -> bool {
        let Some(pulse) = self.pulse(cpu) else { return false };
        if !self.is_on() || pulse.owed_ns.load(Ordering::Relaxed) != 0 {
            return false;
        }
        pulse.owed_ns.store(now().saturating_add(PERIOD_NS), Ordering::Relaxed);
        true
    }

    /// Takes the look that is due at `now`, unless another processor does. `words` are those of all processors, from 0 on.
    fn look(&self, now: u64, words: impl Iterator<Item = u64>) -> Option<Found> {
        let due = self.next_ns.load(Ordering::Relaxed);
        let next = now.saturating_add(PERIOD_NS);
        // Acquire and release: what the last one that looked has noted is seen.
        if now < due || self.next_ns.compare_exchange(due, next, Ordering::AcqRel, Ordering::Relaxed).is_err()
        {
            return None;
        }
        let limit = self.limit();
        let mut inside = CpuSet::default();
        let mut stuck = Stuck { seconds: limit, ..Stuck::default() };
        for ((cpu, pulse), word) in (0..).map(CpuId).zip(&self.pulses).zip(words) {
            let waits = pulse.waits.load(Ordering::Relaxed);
            let waited = pulse.seen_waits.swap(waits, Ordering::Relaxed) != waits;
            if pulse.seen.swap(word, Ordering::Relaxed) != word || word == 0 {
                pulse.strikes.store(0, Ordering::Relaxed);
            } else if pulse.strikes.fetch_add(1, Ordering::Relaxed) + 1 >= limit {
                let kind = if waited { &mut stuck.waiting } else { &mut stuck.silent };
                *kind = kind.with(cpu);
            }
            if word != 0 {
                inside = inside.with(cpu);
            }
        }
        let well = stuck.silent.is_empty() && stuck.waiting.is_empty();
        Some(if well { Found::Inside(inside) } else { Found::Stuck(stuck) })
    }

    /// As [`Watchdog::look`], by processor `me`, which notes when it has to look again.
    fn look_by(&self, me: CpuId, now: u64, words: impl Iterator<Item = u64>) -> Option<Stuck> {
        let pulse = self.pulse(me)?;
        let owed = pulse.owed_ns.load(Ordering::Relaxed);
        if owed != 0 && owed <= now {
            pulse.owed_ns.store(0, Ordering::Relaxed);
        }
        let idle = pulse.idle_ns.load(Ordering::Relaxed);
        if idle != 0 && idle <= now {
            let step = pulse.idle_step_ns.load(Ordering::Relaxed).saturating_mul(2);
            pulse.idle_step_ns.store(step, Ordering::Relaxed);
            pulse.idle_ns.store(now.saturating_add(step), Ordering::Relaxed);
        }
        match self.look(now, words)? {
            Found::Stuck(stuck) => Some(stuck),
            Found::Inside(inside) => {
                if !inside.without(me).is_empty() {
                    self.owe(me, || now);
                }
                None
            }
        }
    }
}

impl<P: Platform> Hypervisor<P> {
    /// Looks whether the other processors live, if it is time to. The caller sets its timer afterwards.
    #[inline(always)]
    pub fn look_around(&self, me: CpuId, now: u64) {
        if self.watchdog.has_work() {
            self.look_around_now(me, now);
        }
    }

    fn look_around_now(&self, me: CpuId, now: u64) {
        if self.watchdog.is_on() {
            let words = self.cpus.iter().map(|cpu| cpu.entered.load(Ordering::Relaxed));
            if let Some(stuck) = self.watchdog.look_by(me, now, words) {
                self.platform.report_stuck(stuck);
            }
        }
        if self.watchdog.wedge.load(Ordering::Relaxed) == me.0.wrapping_add(1) && now > WEDGE_NS {
            if self.cpu(me).view.view(now).running.is_some() {
                wedge();
            }
            // When it runs a guest.
            if let Some(pulse) = self.watchdog.pulse(me) {
                pulse.owed_ns.store(now.saturating_add(PERIOD_NS), Ordering::Relaxed);
            }
        }
    }

    /// One round of waiting for another processor: answers what others ask meanwhile, and looks whether they live.
    pub fn wait_round(&self) {
        self.answer_flushes();
        let me = self.platform.this_cpu();
        let Some(pulse) = self.watchdog.pulse(me) else { return };
        let waits = pulse.waits.load(Ordering::Relaxed).wrapping_add(1);
        pulse.waits.store(waits, Ordering::Relaxed);
        if waits.is_multiple_of(ROUNDS) {
            self.look_around(me, self.platform.now_ns());
        }
    }

    /// Makes another processor leave its guest or its sleep and look at its work; in a second, whether it did.
    pub fn kick(&self, cpu: CpuId) {
        self.platform.kick(cpu);
        let me = self.platform.this_cpu();
        if self.watchdog.owe(me, || self.platform.now_ns()) {
            // The timer is set where it is known what else it is for.
            self.cpu(me).timer_due.store(true, Ordering::Release);
        }
    }
}

/// Never returns and takes no interrupt: what the watchdog is for. Only the operator's `wedge=` leads here.
#[inline(never)]
fn wedge() {
    loop {
        core::hint::spin_loop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: u64 = PERIOD_NS;

    fn wait(dog: &Watchdog, cpu: u32) {
        dog.pulses[cpu as usize].waits.fetch_add(1, Ordering::Relaxed);
    }

    fn inside(cpus: &[u32]) -> Option<Found> {
        Some(Found::Inside(cpus.iter().fold(CpuSet::default(), |set, cpu| set.with(CpuId(*cpu)))))
    }

    #[test]
    fn a_processor_that_stays_in_ring_0_is_found_after_the_limit() {
        let dog = Watchdog::new(4);
        dog.configure(4, None);
        for at in 1..=4u64 {
            wait(&dog, 2);
            // 0 comes and goes, 1 and 2 stay, 3 is in a guest.
            let words = || [at, 77, 99, 0].into_iter();
            assert_eq!(dog.look(at * PERIOD, words()), inside(&[0, 1, 2]), "{at}");
            assert_eq!(dog.look(at * PERIOD + 1, words()), None, "the look is taken");
        }
        wait(&dog, 2);
        let stuck = Stuck { silent: CpuSet::one(CpuId(1)), waiting: CpuSet::one(CpuId(2)), seconds: 4 };
        assert_eq!(dog.look(5 * PERIOD, [5, 77, 99, 0].into_iter()), Some(Found::Stuck(stuck)));
    }

    #[test]
    fn a_guest_between_two_looks_takes_all_strikes_back() {
        let dog = Watchdog::new(2);
        dog.configure(2, None);
        for at in 1..100u64 {
            let found = dog.look(at * PERIOD, [0, if at % 3 == 0 { 0 } else { 77 }].into_iter());
            assert!(matches!(found, Some(Found::Inside(_))), "{at}: {found:?}");
        }
        for at in 100..200u64 {
            let found = dog.look(at * PERIOD, [0, at / 2].into_iter());
            assert!(matches!(found, Some(Found::Inside(_))), "entered anew: {at}: {found:?}");
        }
    }

    #[test]
    fn a_machine_that_stood_still_is_not_taken_for_stuck() {
        let dog = Watchdog::new(2);
        dog.configure(2, None);
        assert_eq!(dog.look(PERIOD, [0, 77].into_iter()), inside(&[1]));
        // An hour later, in which nobody looked.
        assert_eq!(dog.look(3_600 * PERIOD, [0, 77].into_iter()), inside(&[1]));
    }

    /// Lets an idle processor sleep from one of its looks to the next until `end`; who is found stuck, and how often it woke.
    fn sleep(dog: &Watchdog, end: u64, word: impl Fn(u64) -> u64) -> (Option<u64>, u32) {
        let me = CpuId(0);
        let mut wakes = 0;
        dog.idles(me, 0);
        while let Some(now) = dog.wake_ns(me).filter(|at| *at < end) {
            wakes += 1;
            if dog.look_by(me, now, [0, word(now)].into_iter()).is_some() {
                return (Some(now), wakes);
            }
        }
        (None, wakes)
    }

    #[test]
    fn who_idles_wakes_ever_more_rarely_and_finds_who_is_stuck() {
        let dog = |limit| {
            let dog = Watchdog::new(2);
            dog.configure(limit, None);
            dog
        };
        let (found, wakes) = sleep(&dog(5), 3_600 * PERIOD, |_| 0);
        assert!(found.is_none() && wakes == 10, "{wakes} times in an hour");
        assert_eq!(sleep(&dog(0), 3_600 * PERIOD, |_| 0), (None, 0), "it is off");
        // Stuck after a hundred seconds.
        let (found, wakes) = sleep(&dog(5), 3_600 * PERIOD, |now| if now < 100 * PERIOD { 0 } else { 77 });
        assert_eq!((found, wakes), (Some(131 * PERIOD), 11));
    }

    #[test]
    fn who_kicks_another_looks_a_second_later_and_once() {
        let dog = Watchdog::new(2);
        let me = CpuId(0);
        assert!(dog.owe(me, || 5) && !dog.owe(me, || 6));
        assert_eq!(dog.wake_ns(me), Some(5 + PERIOD));
        assert_eq!(dog.look_by(me, 5 + PERIOD, [9, 0].into_iter()), None);
        assert_eq!(dog.wake_ns(me), None, "nobody else is in ring 0");
        assert!(dog.owe(me, || 2 * PERIOD));
        assert_eq!(dog.look_by(me, 3 * PERIOD, [9, 77].into_iter()), None);
        assert_eq!(dog.wake_ns(me), Some(4 * PERIOD), "somebody is");
    }

    #[test]
    fn an_idle_processor_that_works_again_is_not_woken() {
        let dog = Watchdog::new(2);
        dog.idles(CpuId(0), 0);
        dog.works(CpuId(0));
        assert_eq!(dog.wake_ns(CpuId(0)), None);
    }
}
