//! The policies over simulated CPUs and vCPUs: shares, caps, affinity, latency and the price of switching.

use alloc::collections::BinaryHeap;
use alloc::vec::Vec;
use core::cmp::Reverse;

use fastrand::Rng;

use super::policy::{Affinity, Arrival, Fair, LIMIT_NS, Null, Policy, Preempt, SHORTEST_RUN_NS, View};
use super::{Cap, DEFAULT_WEIGHT, FairQueue, Guarantee, SLICE_NS, WAKE_BONUS_NS};
use crate::platform::{CpuId, CpuSet};

const MS: u64 = 1_000_000;
/// Events at one moment that are not plausible: with so few vCPUs, CPUs ask each other for help without end.
const AT_ONCE: u32 = 1000;

/// What a simulated vCPU does all the time.
#[derive(Clone, Copy)]
enum Habit {
    Spin,
    /// Runs and sleeps for random times in these ranges.
    Doze {
        run: (u64, u64),
        sleep: (u64, u64),
    },
}

struct Task {
    weight: u64,
    habit: Habit,
    affinity: Affinity,
    cap: Cap,
    guarantee: Guarantee,
    /// Whether it waits by its weight and goes before others later; which time it does that.
    anew: u64,
    virtual_ns: u64,
    last: usize,
    /// Running still to do before it sleeps.
    burst: u64,
    ran: u64,
    /// Since when it waits for a CPU.
    waits_since: Option<u64>,
    longest_wait: u64,
    /// When it woke, and the longest from there to the end of its burst.
    woke: u64,
    longest_answer: u64,
    moves: u64,
}

struct Cpu {
    queue: FairQueue<usize>,
    running: Option<usize>,
    /// Until when its running time is charged.
    charged: u64,
    /// When the present vCPU was put on.
    since: u64,
    clock: u64,
    /// Events for an older epoch are void.
    epoch: u64,
    switches: u64,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Cpu(usize, u64),
    /// Another CPU asks this one to look around.
    Asked(usize),
    Wake(usize),
    /// A task has guaranteed time again.
    Anew(usize, u64),
}

struct Simulation<P> {
    policy: P,
    cpus: Vec<Cpu>,
    tasks: Vec<Task>,
    now: u64,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    random: Rng,
    serial: u64,
    /// What a switch takes of the CPU's time.
    switch_ns: u64,
}

impl<P: Policy> Simulation<P> {
    fn new(policy: P, cpus: usize) -> Self {
        let cpu = |_| Cpu {
            queue: FairQueue::new(),
            running: None,
            charged: 0,
            since: 0,
            clock: 0,
            epoch: 0,
            switches: 0,
        };
        Simulation {
            policy,
            cpus: (0..cpus).map(cpu).collect(),
            tasks: Vec::new(),
            now: 0,
            events: BinaryHeap::new(),
            random: Rng::with_seed(1),
            serial: 0,
            switch_ns: 0,
        }
    }

    /// A new task of `weight` times a quarter of the default.
    fn add(&mut self, weight: u64, habit: Habit) -> usize {
        let task = self.tasks.len();
        self.tasks.push(Task {
            weight: weight * u64::from(DEFAULT_WEIGHT) / 4,
            habit,
            affinity: Affinity::ANY,
            cap: Cap::NONE,
            guarantee: Guarantee::default(),
            anew: 0,
            virtual_ns: 0,
            last: 0,
            burst: 0,
            ran: 0,
            waits_since: None,
            longest_wait: 0,
            woke: 0,
            longest_answer: 0,
            moves: 0,
        });
        self.at(self.now, Event::Wake(task));
        task
    }

    fn at(&mut self, time: u64, event: Event) {
        self.serial += 1;
        self.events.push(Reverse((time, self.serial, event)));
    }

    fn between(&mut self, (low, high): (u64, u64)) -> u64 {
        self.random.u64(low..=high)
    }

    fn view(&self, cpu: &Cpu) -> View {
        // What the one who runs there has run since it was last charged counts as well.
        let uncharged = self.now.saturating_sub(cpu.charged) * u64::from(DEFAULT_WEIGHT);
        let at = |task: &Task| View::advanced(self.standing(task, 0), uncharged / task.weight);
        View {
            running: cpu.running.and_then(|task| self.tasks.get(task)).map(at),
            first: cpu.queue.first(),
            clock: cpu.clock,
            waiting: cpu.queue.len() as u32,
        }
    }

    fn standing(&self, task: &Task, ran_ns: u64) -> u64 {
        let guaranteed = task.guarantee.percent != 0 && task.guarantee.holds(self.now);
        self.policy.standing(task.virtual_ns, guaranteed, ran_ns)
    }

    fn views(&self) -> Vec<(CpuId, View)> {
        self.cpus.iter().enumerate().map(|(id, cpu)| (CpuId(id as u32), self.view(cpu))).collect()
    }

    /// Lets a task come to a CPU; without an arrival it is put off by that CPU.
    fn arrive(&mut self, cpu: usize, task: usize, arrival: Option<Arrival>) {
        let queue = self.view(&self.cpus[cpu]).among(self.views().into_iter().map(|(_, view)| view));
        let it = &mut self.tasks[task];
        if let Some(arrival) = arrival {
            it.virtual_ns = self.policy.join(it.virtual_ns, queue, arrival);
        }
        it.moves += u64::from(it.last != cpu);
        it.last = cpu;
        it.waits_since.get_or_insert(self.now);
    }

    /// The same, and puts it into the queue.
    fn enqueue(&mut self, cpu: usize, task: usize, arrival: Option<Arrival>) {
        self.arrive(cpu, task, arrival);
        let standing = self.standing(&self.tasks[task], 0);
        self.cpus[cpu].queue.push(standing, task);
        let now = self.now;
        let it = &mut self.tasks[task];
        if it.guarantee.percent != 0 && !it.guarantee.holds(now) {
            it.anew += 1;
            let (again, serial) = (it.guarantee.again_ns(now), it.anew);
            self.at(again, Event::Anew(task, serial));
        }
    }

    /// Queues a task anew that still waits by its weight and has guaranteed time again.
    fn anew(&mut self, task: usize, serial: u64) {
        let (cpu, it) = (self.tasks[task].last, &self.tasks[task]);
        if it.anew == serial && self.cpus[cpu].queue.pop_where(|other| *other == task).is_some() {
            let standing = self.standing(&self.tasks[task], 0);
            self.cpus[cpu].queue.push(standing, task);
            self.choose(cpu, false);
        }
    }

    fn wake(&mut self, task: usize) {
        if let (0, Habit::Doze { run, .. }) = (self.tasks[task].burst, self.tasks[task].habit) {
            self.tasks[task].burst = self.between(run);
            self.tasks[task].woke = self.now;
        }
        let it = &self.tasks[task];
        let views = self.views();
        let cpu = self.policy.place(views.into_iter(), it.virtual_ns, CpuId(it.last as u32), it.affinity);
        assert!(it.affinity.allows(cpu), "placed where it must not run");
        self.enqueue(cpu.0 as usize, task, Some(Arrival::Woken));
        self.choose(cpu.0 as usize, false);
    }

    /// Counts what the running vCPU ran; returns whether it wants to go on.
    fn charge(&mut self, cpu: usize) -> bool {
        let now = self.now;
        let Some(task) = self.cpus[cpu].running else { return false };
        let ran = now.saturating_sub(self.cpus[cpu].charged);
        self.cpus[cpu].charged = self.cpus[cpu].charged.max(now);
        let it = &mut self.tasks[task];
        it.ran += ran;
        it.virtual_ns += it.guarantee.draw(ran, now) * u64::from(DEFAULT_WEIGHT) / it.weight;
        it.cap.charge(ran, now);
        let at = self.standing(&self.tasks[task], 0);
        let on = &mut self.cpus[cpu];
        on.clock = View::clock_after(on.clock, Some(at), on.queue.first());
        let it = &mut self.tasks[task];
        if let Habit::Doze { sleep, .. } = it.habit {
            it.burst = it.burst.saturating_sub(ran);
            if it.burst == 0 {
                it.longest_answer = it.longest_answer.max(now - it.woke);
                let wake = now + self.between(sleep);
                self.at(wake, Event::Wake(task));
                return false;
            }
        }
        let it = &mut self.tasks[task];
        if it.cap.allowed(now) == Some(0) {
            let again = it.cap.again(now);
            self.at(again, Event::Wake(task));
            return false;
        }
        true
    }

    /// What a CPU does when something happened: goes on with what it runs or takes another.
    fn choose(&mut self, cpu: usize, asked: bool) {
        let here = CpuId(cpu as u32);
        let stays = self.charge(cpu);
        let current = self.cpus[cpu].running.filter(|_| stays);
        let first = self.cpus[cpu].queue.first();
        let ran = self.now - self.cpus[cpu].since.min(self.now);
        let standing = current.map(|task| self.standing(&self.tasks[task], ran));
        let own = [standing, first].into_iter().flatten().min();
        let mut taken = None;
        if let Some(from) = self.policy.help(self.views().into_iter(), here, own) {
            let tasks = &self.tasks;
            taken = self.cpus[from.0 as usize].queue.pop_where(|task| tasks[*task].affinity.allows(here));
            if let Some((_, task)) = taken {
                // What is taken from elsewhere runs at once.
                self.arrive(cpu, task, Some(Arrival::Moved));
            }
        }
        let first = self.cpus[cpu].queue.first();
        let mut until = u64::MAX;
        let put_off = match (current, first) {
            _ if taken.is_some() => true,
            (None, _) => true,
            (Some(_), None) => false,
            (Some(_), Some(first)) => match self.policy.preempts(first, standing.unwrap_or(0), ran) {
                Preempt::Now => true,
                Preempt::In(rest) => {
                    until = self.now + rest;
                    false
                }
                Preempt::No => false,
            },
        };
        if put_off {
            self.cpus[cpu].running = None;
            if let Some(task) = current {
                self.enqueue(cpu, task, None);
            }
            if let Some((_, task)) = taken.or_else(|| self.cpus[cpu].queue.pop()) {
                let start = self.now + self.switch_ns;
                let it = &mut self.tasks[task];
                it.longest_wait = it.longest_wait.max(start - it.waits_since.take().unwrap_or(start));
                let on = &mut self.cpus[cpu];
                (on.running, on.charged, on.since) = (Some(task), start, start);
                on.switches += 1;
            }
        }
        // Who was asked and goes on as before has nothing new to tell.
        self.plan(cpu, until, !asked || put_off && current.is_some());
    }

    /// Says when this CPU has to look again, and, if it `asks`, asks another for help if somebody waits here.
    fn plan(&mut self, cpu: usize, mut until: u64, asks: bool) {
        let now = self.now;
        let on = &mut self.cpus[cpu];
        on.epoch += 1;
        let (epoch, start, waiting) = (on.epoch, on.charged.max(now), !on.queue.is_empty());
        if let Some(task) = on.running {
            let it = &mut self.tasks[task];
            if let Some(slice) = self.policy.slice_ns().filter(|_| waiting) {
                let guaranteed = it.guarantee.percent != 0 && it.guarantee.holds(now);
                let slice = if guaranteed { slice.min(it.guarantee.left(now)) } else { slice };
                until = until.min(start + slice);
            }
            if let Habit::Doze { .. } = it.habit {
                until = until.min(start + it.burst);
            }
            if let Some(left) = it.cap.allowed(now) {
                until = until.min(start + left.max(1));
            }
            if until != u64::MAX {
                self.at(until.max(now), Event::Cpu(cpu, epoch));
            }
        }
        if let Some((first, task)) = self.cpus[cpu].queue.peek().filter(|_| asks) {
            let affinity = self.tasks[*task].affinity;
            let helper =
                self.policy.call_for_help(self.views().into_iter(), CpuId(cpu as u32), first, affinity);
            if let Some(helper) = helper {
                self.at(now, Event::Asked(helper.0 as usize));
            }
        }
    }

    fn run(&mut self, total_ns: u64) -> &mut Self {
        let end = self.now + total_ns;
        let mut at_once = 0;
        while let Some(Reverse((time, ..))) = self.events.peek() {
            if *time > end {
                break;
            }
            let Some(Reverse((time, _, event))) = self.events.pop() else { break };
            at_once = if time > self.now { 0 } else { at_once + 1 };
            assert!(at_once < AT_ONCE, "CPUs ask each other without end: {:?}", self.views());
            self.now = self.now.max(time);
            match event {
                Event::Wake(task) => self.wake(task),
                Event::Anew(task, serial) => self.anew(task, serial),
                Event::Cpu(cpu, epoch) if self.cpus[cpu].epoch == epoch => self.choose(cpu, false),
                Event::Asked(cpu) => self.choose(cpu, true),
                Event::Cpu(..) => {}
            }
        }
        self.now = end;
        for cpu in 0..self.cpus.len() {
            self.charge(cpu);
        }
        self
    }

    /// Asserts that `task` had `due` of all that was run since `before`, within 2 %.
    fn assert_share(&self, task: usize, due: u64, what: &str) {
        let ran = self.tasks[task].ran;
        assert!(
            ran.abs_diff(due) * 50 <= due,
            "{what}: task {task} ran {} us, due {} us",
            ran / 1000,
            due / 1000
        );
    }
}

/// Weights 1 to 8, over 60 s.
fn weighted(cpus: usize, habit: impl Fn(usize) -> Habit, what: &str) {
    let mut simulation = Simulation::new(Fair, cpus);
    for task in 0..8 {
        simulation.add(task as u64 + 1, habit(task));
    }
    simulation.run(60_000 * MS);
    let total: u64 = simulation.tasks.iter().map(|task| task.ran).sum();
    assert!(
        total * 100 >= 60_000 * MS * cpus as u64 * 99,
        "{what}: the CPUs were busy for {} ms only",
        total / MS
    );
    for task in 0..8 {
        simulation.assert_share(task, total * (task as u64 + 1) / 36, what);
    }
}

#[test]
fn spinners_share_by_weight() {
    for cpus in 1..=4 {
        weighted(cpus, |_| Habit::Spin, &alloc::format!("{cpus} CPUs"));
    }
}

#[test]
fn nobody_is_due_more_than_a_cpu_and_the_rest_is_shared() {
    let mut simulation = Simulation::new(Fair, 4);
    let weights = [1, 1, 1, 2, 2, 4, 16, 16];
    for weight in weights {
        simulation.add(weight, Habit::Spin);
    }
    simulation.run(60_000 * MS);
    // The last two fill a CPU each; the others have 11 parts of two CPUs.
    for (task, weight) in weights.into_iter().enumerate() {
        let due = if weight == 16 { 60_000 * MS } else { 120_000 * MS * weight / 11 };
        simulation.assert_share(task, due, "two of eight fill a CPU");
    }
}

#[test]
fn sleepers_on_several_cpus_get_their_weight() {
    // The light half sleeps half of the time.
    let doze = Habit::Doze { run: (MS / 10, 43 * MS / 10), sleep: (MS / 10, 43 * MS / 10) };
    let mut simulation = Simulation::new(Fair, 4);
    let weights = [1, 1, 2, 2, 7, 7, 8, 8];
    for (task, weight) in weights.into_iter().enumerate() {
        simulation.add(weight, if task < 4 { doze } else { Habit::Spin });
    }
    simulation.run(60_000 * MS);
    for (task, weight) in weights.into_iter().enumerate() {
        simulation.assert_share(task, 240_000 * MS * weight / 36, "four of eight doze");
    }
}

#[test]
fn sleepers_due_nearly_what_they_want_get_it() {
    // Half a CPU each, and 0.44 are due.
    let doze = Habit::Doze { run: (MS / 10, 43 * MS / 10), sleep: (MS / 10, 43 * MS / 10) };
    let mut simulation = Simulation::new(Fair, 4);
    for task in 0..8 {
        simulation.add(if task < 4 { 4 } else { 5 }, if task < 4 { doze } else { Habit::Spin });
    }
    simulation.run(60_000 * MS);
    for task in 0..8 {
        simulation.assert_share(task, 240_000 * MS * if task < 4 { 4 } else { 5 } / 36, "four of eight doze");
    }
}

#[test]
fn cpus_do_not_ask_each_other_in_vain() {
    let doze = Habit::Doze { run: (MS / 10, 43 * MS / 10), sleep: (MS / 10, 43 * MS / 10) };
    let mut simulation = Simulation::new(Fair, 4);
    for task in 0..8 {
        simulation.add(4, if task < 4 { doze } else { Habit::Spin });
    }
    simulation.run(300_000 * MS);
}

#[test]
fn sleepers_get_their_weight_too() {
    let doze = Habit::Doze { run: (MS / 10, 5 * MS), sleep: (MS / 100, MS / 10) };
    for half in 0..2 {
        let habit = |task| if task % 2 == half { doze } else { Habit::Spin };
        weighted(1, habit, &alloc::format!("half {half} dozes"));
    }
}

#[test]
fn sleepers_with_long_sleeps_get_their_weight_too() {
    // Each of them wants more than its weight gives, whatever it sleeps.
    let doze = Habit::Doze { run: (MS / 10, 5 * MS), sleep: (MS / 10, 5 * MS) };
    weighted(1, |task| if task < 4 { doze } else { Habit::Spin }, "the light half dozes");
}

#[test]
fn three_equals_share_two_cpus() {
    let mut simulation = Simulation::new(Fair, 2);
    for _ in 0..3 {
        simulation.add(4, Habit::Spin);
    }
    simulation.run(30_000 * MS);
    for task in 0..3 {
        simulation.assert_share(task, 20_000 * MS, "two CPUs");
    }
}

#[test]
fn many_spinners_lose_little_to_switching() {
    for cpus in [1, 2, 4] {
        let mut simulation = Simulation::new(Fair, cpus);
        // Far more than a switch costs: page tables, vector state, cold caches.
        simulation.switch_ns = 100_000;
        for _ in 0..128 {
            simulation.add(4, Habit::Spin);
        }
        simulation.run(60_000 * MS);
        let total: u64 = simulation.tasks.iter().map(|task| task.ran).sum();
        assert!(total * 100 >= 98 * cpus as u64 * 60_000 * MS, "{cpus} CPUs: only {} ms", total / MS);
        let round = 128 / cpus as u64 * 11 * MS;
        for task in &simulation.tasks {
            assert!(task.longest_wait <= 2 * round, "waited {} ms", task.longest_wait / MS);
        }
    }
}

#[test]
fn one_who_wakes_is_served_at_once() {
    for cpus in [1, 2] {
        let mut simulation = Simulation::new(Fair, cpus);
        let io = Habit::Doze { run: (MS / 20, MS / 5), sleep: (MS, 10 * MS) };
        let first = simulation.add(4, io);
        for _ in 0..16 {
            simulation.add(4, Habit::Spin);
        }
        simulation.run(1_000 * MS);
        // It waited at the start, when all came at once.
        simulation.tasks[first].longest_wait = 0;
        simulation.run(30_000 * MS);
        let waited = simulation.tasks[first].longest_wait;
        assert!(waited <= SHORTEST_RUN_NS, "{cpus} CPUs: waited {} us", waited / 1000);
    }
}

/// The longest from a wake-up to the end of what is to be done, of one that has up to `burst` to do now and then, beside a storm of
/// 64 and two more that spin.
fn answer(cpus: usize, burst: u64, percent: u32) -> u64 {
    let mut simulation = Simulation::new(Fair, cpus);
    simulation.switch_ns = 5_000;
    let shell = simulation.add(4, Habit::Doze { run: (MS / 10, burst), sleep: (100 * MS, 400 * MS) });
    simulation.tasks[shell].guarantee.percent = percent;
    for _ in 0..66 {
        simulation.add(4, Habit::Spin);
    }
    simulation.run(1_000 * MS);
    simulation.tasks[shell].longest_answer = 0;
    simulation.run(60_000 * MS);
    simulation.tasks[shell].longest_answer
}

#[test]
fn guaranteed_time_bounds_answers_beside_a_storm() {
    for cpus in [1, 4] {
        // As long as its own work takes, the run that it interrupts, and two switches.
        for burst in [5 * MS, 30 * MS, 50 * MS] {
            let took = answer(cpus, burst, 50);
            assert!(took <= burst + SHORTEST_RUN_NS + 100_000, "{cpus} CPUs, {burst} ns: {} us", took / 1000);
        }
        // Beyond what is saved up, it gets half.
        let took = answer(cpus, 75 * MS, 50);
        assert!(took <= 100 * MS + 15 * MS, "{cpus} CPUs: {} us", took / 1000);
    }
    // Without it, the guarantee is what makes the difference.
    assert!(answer(1, 30 * MS, 0) > 300 * MS, "shares alone do");
}

#[test]
fn who_wants_more_than_is_guaranteed_gets_that_and_a_share_of_the_rest() {
    for cpus in [1, 2] {
        let mut simulation = Simulation::new(Fair, cpus);
        let greedy = simulation.add(4, Habit::Spin);
        simulation.tasks[greedy].guarantee.percent = 30;
        for _ in 0..40 {
            simulation.add(4, Habit::Spin);
        }
        simulation.run(60_000 * MS);
        let all = 60_000 * MS * cpus as u64;
        let rest = (all - 18_000 * MS) / 41;
        let ran = simulation.tasks[greedy].ran;
        assert!(ran >= 18_000 * MS && ran <= 18_000 * MS + 2 * rest, "{cpus} CPUs: {} ms", ran / MS);
        for task in 1..=40 {
            let ran = simulation.tasks[task].ran;
            assert!(
                ran.abs_diff(rest) * 20 <= rest,
                "{cpus} CPUs: {task} ran {} of {} ms",
                ran / MS,
                rest / MS
            );
        }
    }
}

#[test]
fn many_that_come_at_once_late_run_in_turn() {
    for cpus in [1, 2] {
        let mut simulation = Simulation::new(Fair, cpus);
        simulation.add(4, Habit::Spin);
        simulation.run(10_000 * MS);
        for _ in 0..128 {
            simulation.add(4, Habit::Spin);
        }
        simulation.run(30_000 * MS);
        let round = 129 / cpus as u64 * 11 * MS;
        for (index, task) in simulation.tasks.iter().enumerate() {
            assert!(
                task.longest_wait <= 2 * round,
                "{cpus} CPUs: {index} waited {} ms",
                task.longest_wait / MS
            );
        }
    }
}

#[test]
fn caps_hold_on_an_idle_machine_and_under_load() {
    for load in [0, 1, 5] {
        let mut simulation = Simulation::new(Fair, 2);
        let capped = simulation.add(8, Habit::Spin);
        simulation.tasks[capped].cap.set(20, 0);
        for _ in 0..load {
            simulation.add(4, Habit::Spin);
        }
        simulation.run(30_000 * MS);
        simulation.assert_share(capped, 6_000 * MS, "capped at 20 %");
        let others: u64 = simulation.tasks.iter().skip(1).map(|task| task.ran).sum();
        if load >= 2 {
            assert!(others >= 53_900 * MS, "the rest is used: {} ms", others / MS);
        }
    }
}

#[test]
fn affinity_is_kept_and_the_rest_makes_room() {
    let mut simulation = Simulation::new(Fair, 2);
    let pinned = simulation.add(4, Habit::Spin);
    simulation.tasks[pinned].affinity.hard = CpuSet::one(CpuId(1));
    let others: Vec<_> = (0..2).map(|_| simulation.add(4, Habit::Spin)).collect();
    simulation.run(30_000 * MS);
    for task in others.into_iter().chain([pinned]) {
        simulation.assert_share(task, 20_000 * MS, "one of three is pinned");
    }
    assert_eq!(simulation.tasks[pinned].last, 1);
}

#[test]
fn pins_that_leave_no_balance_starve_nobody() {
    let mut simulation = Simulation::new(Fair, 2);
    // One has CPU 0 for itself, four share CPU 1; then a fifth may run on either.
    for cpu in [0, 1, 1, 1, 1] {
        let task = simulation.add(4, Habit::Spin);
        simulation.tasks[task].affinity.hard = CpuSet::one(CpuId(cpu));
    }
    simulation.run(60_000 * MS);
    let late = simulation.add(4, Habit::Doze { run: (MS, 5 * MS), sleep: (MS, 5 * MS) });
    simulation.run(10_000 * MS);
    for task in &simulation.tasks {
        assert!(task.longest_wait <= 1_000 * MS, "waited {} ms", task.longest_wait / MS);
    }
    assert!(simulation.tasks[late].ran >= 1_000 * MS, "it ran {} ms", simulation.tasks[late].ran / MS);
}

#[test]
fn preferred_cpus_are_taken_while_they_are_idle() {
    let mut simulation = Simulation::new(Fair, 4);
    let doze = Habit::Doze { run: (MS, 2 * MS), sleep: (MS, 2 * MS) };
    let choosy = simulation.add(4, doze);
    simulation.tasks[choosy].affinity.soft = CpuSet::one(CpuId(3));
    simulation.add(4, doze);
    simulation.run(10_000 * MS);
    assert_eq!(simulation.tasks[choosy].last, 3);
    assert_eq!(simulation.tasks[choosy].moves, 1);
}

#[test]
fn spinners_that_fill_the_machine_are_not_moved() {
    let mut simulation = Simulation::new(Fair, 4);
    for _ in 0..4 {
        simulation.add(4, Habit::Spin);
    }
    simulation.run(10_000 * MS);
    assert!(simulation.tasks.iter().all(|task| task.moves <= 1));
    assert!(simulation.cpus.iter().all(|cpu| cpu.switches == 1));
}

#[test]
fn null_never_moves_or_preempts() {
    let mut simulation = Simulation::new(Null, 2);
    for cpu in 0..2 {
        let task = simulation.add(4, Habit::Doze { run: (MS, 30 * MS), sleep: (MS / 10, MS) });
        simulation.tasks[task].affinity.hard = CpuSet::one(CpuId(cpu));
    }
    simulation.run(10_000 * MS);
    for (cpu, task) in simulation.tasks.iter().enumerate() {
        assert_eq!(task.last, cpu);
        assert!(task.longest_wait == 0, "nobody competes");
    }
}

#[test]
fn time_goes_on_beside_one_with_guaranteed_time() {
    // Somebody has run alone for five seconds, and one with guaranteed time runs for a moment: a newcomer competes with the former.
    let alone = 5_000 * MS;
    for running in [Fair.standing(77 * MS, true, 0), Fair.standing(77 * MS, true, SLICE_NS)] {
        let view =
            View { running: Some(View::advanced(running, MS)), first: Some(alone), clock: 10, waiting: 1 };
        assert_eq!(Fair.join(0, view, Arrival::Woken), alone - WAKE_BONUS_NS);
        let view = View { running: Some(View::advanced(alone, MS)), first: Some(running), ..view };
        assert_eq!(Fair.join(0, view, Arrival::Woken), alone + MS - WAKE_BONUS_NS);
    }
    // With nobody else there, what the clock was before holds.
    let view = View { running: Some(0), first: None, clock: alone, waiting: 0 };
    assert_eq!(Fair.join(0, view, Arrival::Woken), alone - WAKE_BONUS_NS);
}

#[test]
fn nobody_competes_with_one_that_has_guaranteed_time() {
    // Here one ran that was due more than a CPU, so this CPU's clock is far behind the other's; who comes from there is not.
    let (behind, elsewhere) = (1_000 * MS, 9_000 * MS);
    let other = View { running: Some(elsewhere), first: Some(elsewhere), clock: elsewhere, waiting: 1 };
    for running in [None, Some(Fair.standing(77 * MS, true, 0)), Some(Fair.standing(77 * MS, true, SLICE_NS))]
    {
        let here = View { running, first: None, clock: behind, waiting: 0 };
        assert_eq!(Fair.join(elsewhere, here.among([here, other].into_iter()), Arrival::Moved), elsewhere);
    }
    // It does compete with one that has none, and with who waits.
    let rival = View { running: Some(behind), first: None, clock: behind, waiting: 0 };
    let waits = View { running: Some(0), first: Some(behind), clock: behind, waiting: 1 };
    for here in [rival, waits] {
        assert_eq!(
            Fair.join(elsewhere, here.among([here, other].into_iter()), Arrival::Moved),
            behind + LIMIT_NS
        );
    }
}
