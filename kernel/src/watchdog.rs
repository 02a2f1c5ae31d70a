//! The watchdog: finds a processor that no longer comes back from ring 0.
//!
//! Each processor counts its *beats*: the times that it is about to return to a guest, and the times that it has woken from
//! idling. One that runs a guest is made to beat by a kick, which guests cannot hold off (they run with interrupts on, whatever
//! they mask), and an entry's work has an end (record 0004). So only ring 0 can make a processor miss its beats.
//!
//! Once a second whoever passes by looks at all of them. A processor that has not beaten since the last look gets a *strike*
//! and a kick; with [`Watchdog::limit`] strikes in a row it is stuck. Counted are looks and not time: if the whole machine is
//! stopped and goes on (a debugger, a virtual machine below us), that costs one strike at most.
//!
//! There is no tick for this. A processor looks when it beats, or while it waits for another one in ring 0 (`sync::relax`), and has
//! its timer wake it for the next look only while a strike is out. Who notices a stuck processor is who needs it: to
//! wake a vCPU there is to kick it, and whoever waits for its lock or its flush looks in the loop.
//!
//! One that waits misses its own beats too. It is told apart by the rounds of waiting that it counts, and reported beside the one
//! that does not move at all; alone, it is a deadlock's.
#![forbid(unsafe_code)]

use alloc::boxed::Box;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::hypervisor::Hypervisor;
use crate::platform::{CpuId, CpuSet, Platform};

/// Time between two looks.
pub const PERIOD_NS: u64 = 1_000_000_000;
/// Looks without a beat until a processor counts as stuck, unless the operator says otherwise: seconds, as Xen's `watchdog_timeout`.
pub const DEFAULT_LIMIT: u32 = 5;
/// When a processor that the operator named stops, on purpose, so that there is something to find.
const WEDGE_NS: u64 = 3_000_000_000;

/// What one processor shows of its life.
#[repr(align(64))]
#[derive(Default)]
struct Pulse {
    /// Beats. It alone writes it.
    beats: AtomicU64,
    /// Rounds of waiting for another processor. It alone writes it.
    waits: AtomicU64,
    /// Time-stamp counter at which it last asked for the time. It alone writes it.
    looked: AtomicU64,
    /// When it wants to be woken for a look; 0 for not at all. It alone writes it.
    wake_ns: AtomicU64,
    /// As of the last look, written by whoever looks.
    seen_beats: AtomicU64,
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
    /// These have not beaten since the last look.
    Late(CpuSet),
    /// Some have not for too long.
    Stuck(Stuck),
}

/// The state of the watchdog.
pub struct Watchdog {
    pulses: Box<[Pulse]>,
    /// When the next look is due.
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

    /// Sets after how many seconds without a beat a processor is stuck; 0: never. And which one is to stop, for a test.
    pub fn configure(&self, seconds: u32, wedge: Option<u32>) {
        self.limit.store(seconds, Ordering::Relaxed);
        self.wedge.store(wedge.map_or(0, |cpu| cpu.saturating_add(1)), Ordering::Relaxed);
    }

    fn limit(&self) -> u32 {
        self.limit.load(Ordering::Relaxed)
    }

    // Numbers come from the platform and are in range; none is worth a panic here.
    fn pulse(&self, cpu: CpuId) -> Option<&Pulse> {
        self.pulses.get(cpu.0 as usize)
    }

    /// When this processor's timer has to fire for the watchdog.
    pub fn wake_ns(&self, cpu: CpuId) -> Option<u64> {
        self.pulse(cpu).map(|pulse| pulse.wake_ns.load(Ordering::Relaxed)).filter(|at| *at != 0)
    }

    /// Takes the look that is due at `now`, unless another processor does.
    fn look(&self, now: u64) -> Option<Found> {
        let due = self.next_ns.load(Ordering::Relaxed);
        let next = now.saturating_add(PERIOD_NS);
        // Acquire and release: what the last one that looked has noted is seen.
        if now < due || self.next_ns.compare_exchange(due, next, Ordering::AcqRel, Ordering::Relaxed).is_err()
        {
            return None;
        }
        let limit = self.limit();
        let mut late = CpuSet::default();
        let mut stuck = Stuck { seconds: limit, ..Stuck::default() };
        for (cpu, pulse) in (0..).map(CpuId).zip(&self.pulses) {
            let beats = pulse.beats.load(Ordering::Relaxed);
            let waits = pulse.waits.load(Ordering::Relaxed);
            let waited = pulse.seen_waits.swap(waits, Ordering::Relaxed) != waits;
            if pulse.seen_beats.swap(beats, Ordering::Relaxed) != beats {
                pulse.strikes.store(0, Ordering::Relaxed);
                continue;
            }
            late = late.with(cpu);
            if pulse.strikes.fetch_add(1, Ordering::Relaxed) + 1 > limit {
                let kind = if waited { &mut stuck.waiting } else { &mut stuck.silent };
                *kind = kind.with(cpu);
            }
        }
        let found = stuck.silent.is_empty() && stuck.waiting.is_empty();
        Some(if found { Found::Late(late) } else { Found::Stuck(stuck) })
    }
}

/// Adds one to a counter that only this processor writes.
fn count(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
}

impl<P: Platform> Hypervisor<P> {
    /// This processor is about to return to a guest, or has woken.
    /// `tsc` is the time-stamp counter, which the caller has read anyway.
    pub fn beat(&self, cpu: CpuId, tsc: u64) {
        let Some(pulse) = self.watchdog.pulse(cpu) else { return };
        count(&pulse.beats);
        self.look_around(cpu, pulse, tsc);
    }

    /// One round of waiting for another processor: answers what others ask meanwhile, and looks whether they live.
    pub fn wait_round(&self) {
        self.answer_flushes();
        let cpu = self.platform.this_cpu();
        let Some(pulse) = self.watchdog.pulse(cpu) else { return };
        count(&pulse.waits);
        self.look_around(cpu, pulse, self.platform.tsc());
    }

    fn look_around(&self, me: CpuId, pulse: &Pulse, tsc: u64) {
        // The counter is cheap, the clock may not be: it is read four times in a period, or to find a look due.
        let quarter = u64::from(self.platform.tsc_khz()) * (PERIOD_NS / 4_000_000);
        let wakes = pulse.wake_ns.load(Ordering::Relaxed);
        if wakes == 0 && tsc.wrapping_sub(pulse.looked.load(Ordering::Relaxed)) < quarter {
            return;
        }
        pulse.looked.store(tsc, Ordering::Relaxed);
        let now = self.platform.now_ns();
        if self.watchdog.limit() != 0 {
            match self.watchdog.look(now) {
                Some(Found::Stuck(stuck)) => self.platform.report_stuck(stuck),
                Some(Found::Late(late)) => {
                    for cpu in late.without(me).iter() {
                        self.platform.kick(cpu);
                    }
                    let again = if late.without(me).is_empty() { 0 } else { now.saturating_add(PERIOD_NS) };
                    pulse.wake_ns.store(again, Ordering::Relaxed);
                    if again != 0 {
                        // The timer is set where it is known what else it is for.
                        self.cpu(me).timer_due.store(true, Ordering::Release);
                    }
                }
                // Somebody else looks.
                None if wakes <= now => pulse.wake_ns.store(0, Ordering::Relaxed),
                None => {}
            }
        }
        if self.watchdog.wedge.load(Ordering::Relaxed) == me.0.wrapping_add(1) && now > WEDGE_NS {
            wedge();
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

    fn beat(dog: &Watchdog, cpu: u32) {
        count(&dog.pulses[cpu as usize].beats);
    }

    fn wait(dog: &Watchdog, cpu: u32) {
        count(&dog.pulses[cpu as usize].waits);
    }

    #[test]
    fn a_processor_that_misses_its_beats_is_found_after_the_limit() {
        let dog = Watchdog::new(3);
        dog.configure(4, None);
        for at in 1..=4u64 {
            beat(&dog, 0);
            wait(&dog, 2);
            let late = CpuSet::one(CpuId(1)).with(CpuId(2));
            assert_eq!(dog.look(at * PERIOD), Some(Found::Late(late)), "{at}");
            assert_eq!(dog.look(at * PERIOD + 1), None, "the look is taken");
        }
        wait(&dog, 2);
        let stuck = Stuck { silent: CpuSet::one(CpuId(1)), waiting: CpuSet::one(CpuId(2)), seconds: 4 };
        beat(&dog, 0);
        assert_eq!(dog.look(5 * PERIOD), Some(Found::Stuck(stuck)));
    }

    #[test]
    fn one_beat_takes_all_strikes_back() {
        let dog = Watchdog::new(2);
        dog.configure(2, None);
        for at in 1..100u64 {
            beat(&dog, 0);
            if at % 3 == 0 {
                beat(&dog, 1);
            }
            let found = dog.look(at * PERIOD);
            assert!(matches!(found, Some(Found::Late(_))), "{at}: {found:?}");
        }
    }

    #[test]
    fn a_machine_that_stood_still_is_not_taken_for_stuck() {
        let dog = Watchdog::new(2);
        dog.configure(2, None);
        beat(&dog, 0);
        assert_eq!(dog.look(PERIOD), Some(Found::Late(CpuSet::one(CpuId(1)))));
        beat(&dog, 0);
        // An hour later, in which nobody looked.
        assert_eq!(dog.look(3_600 * PERIOD), Some(Found::Late(CpuSet::one(CpuId(1)))));
    }
}
