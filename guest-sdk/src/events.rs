//! Event channels: ports as values, and waiting for them.
//!
//! Upcalls are masked whenever Rust runs. What is pending is collected by [`turn`], which everybody who waits calls: it
//! clears the pending bits, notes the ports and wakes their wakers. Sleeping is the block hypercall, which unmasks and
//! sleeps in one step, so an event that comes after the last look ends the sleep at once; the upcall stub returns masked.
//!
//! A domain begins with the two-level form, 4095 ports; [`Events::use_fifo`] turns it to the FIFO form. All else is the same in
//! both.

mod fifo;

use crate::hypercall::stub;
use crate::rt::{start, trap};
use alloc::vec::Vec;
use core::arch::asm;
use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use core::task::{Poll, Waker};
use core::time::Duration;
use hypercall_abi::evtchn::{
    EVTCHNSTAT_INTERDOMAIN, EvtchnAllocUnbound, EvtchnBindInterdomain, EvtchnBindIpi, EvtchnBindPirq,
    EvtchnBindVcpu, EvtchnBindVirq, EvtchnClose, EvtchnSend, EvtchnSetPriority, EvtchnStatus, EvtchnUnmask,
};
use hypercall_abi::subops::EvtchnOp;
use hypercall_abi::{DomId, Errno, Hypercall, Port, Virq};
use spin::Mutex;

/// Ports of the two-level layout.
const PORTS: u32 = hypercall_abi::shared_info::EVTCHN_2L_NR_CHANNELS;

/// The highest port that was opened.
static HIGHEST: AtomicU32 = AtomicU32::new(0);
/// Ports that fired and whose owner has not looked yet, in the two-level form.
static FIRED: [AtomicU64; 64] = [const { AtomicU64::new(0) }; 64];
/// Who hears of a port, by its number: ports are given out from the lowest one on.
static LISTENERS: Mutex<Vec<Listener>> = Mutex::new(Vec::new());

/// Who hears of a port's events.
enum Listener {
    Nobody,
    /// A task that waits for the next one.
    Once(Waker),
    /// Whoever is told of all of them.
    Always(Waker),
}

fn pending_word(word: usize) -> &'static AtomicU64 {
    let shared = start::shared_info();
    // SAFETY: shared_info is mapped from the start to the end, and this word is only accessed atomically.
    unsafe { AtomicU64::from_ptr((&raw mut (*shared).evtchn_pending).cast::<u64>().add(word % 64)) }
}

fn mask_word(word: usize) -> &'static AtomicU64 {
    let shared = start::shared_info();
    // SAFETY: as above.
    unsafe { AtomicU64::from_ptr((&raw mut (*shared).evtchn_mask).cast::<u64>().add(word % 64)) }
}

fn selector() -> &'static AtomicU64 {
    let shared = start::shared_info();
    // SAFETY: as above; vCPU 0 is the one that runs this.
    unsafe { AtomicU64::from_ptr(&raw mut (*shared).vcpu_info[0].evtchn_pending_sel) }
}

fn upcall_pending() -> &'static AtomicU8 {
    let shared = start::shared_info();
    // SAFETY: as above.
    unsafe { AtomicU8::from_ptr(&raw mut (*shared).vcpu_info[0].evtchn_upcall_pending) }
}

fn upcall_mask() -> *mut u8 {
    let shared = start::shared_info();
    // SAFETY: only the address is taken.
    unsafe { &raw mut (*shared).vcpu_info[0].evtchn_upcall_mask }
}

fn split(port: Port) -> (usize, u64) {
    (port.get() as usize / 64 % 64, 1 << (port.get() % 64))
}

/// Ports that are open: what [`idle_until`] polls, when there are few.
static OPEN: Mutex<Vec<Port>> = Mutex::new(Vec::new());
/// More ports than these are not polled.
const POLLED_MOST: usize = 16;

/// Masks every port: nothing is delivered before somebody binds it.
pub(crate) fn init() {
    for word in 0..64 {
        mask_word(word).store(!0, Ordering::Relaxed);
    }
}

/// Collects what is pending and wakes who waits for it. Never sleeps.
pub fn turn() {
    if fifo::is_on() {
        return fifo::turn();
    }
    // In this order, so that an event that comes in between is seen now or makes the next turn look again.
    if upcall_pending().swap(0, Ordering::SeqCst) == 0 && selector().load(Ordering::Relaxed) == 0 {
        return;
    }
    let mut words = selector().swap(0, Ordering::SeqCst);
    while words != 0 {
        let word = words.trailing_zeros() as usize;
        words &= words - 1;
        let live = pending_word(word).load(Ordering::Acquire) & !mask_word(word).load(Ordering::Relaxed);
        collect(word, live);
    }
}

fn collect(word: usize, mut bits: u64) {
    if bits == 0 {
        return;
    }
    pending_word(word).fetch_and(!bits, Ordering::AcqRel);
    if let Some(fired) = FIRED.get(word) {
        fired.fetch_or(bits, Ordering::Release);
    }
    while bits != 0 {
        let port = word as u32 * 64 + bits.trailing_zeros();
        bits &= bits - 1;
        wake(port);
    }
}

/// Puts down who hears of a port; gives back who did before: a waker may do anything when it is called or dropped.
fn set_listener(port: u32, listener: Listener) -> Listener {
    let mut listeners = LISTENERS.lock();
    let at = port as usize;
    if listeners.len() <= at {
        listeners.resize_with(at + 1, || Listener::Nobody);
    }
    match listeners.get_mut(at) {
        Some(place) => core::mem::replace(place, listener),
        None => Listener::Nobody,
    }
}

/// Whether a task waits for a port already.
fn waits(port: u32, waker: &Waker) -> bool {
    matches!(LISTENERS.lock().get(port as usize), Some(Listener::Once(there)) if there.will_wake(waker))
}

/// Wakes who hears of a port.
fn wake(port: u32) {
    let waker = match LISTENERS.lock().get_mut(port as usize) {
        Some(Listener::Always(waker)) => waker.clone(),
        Some(place) => match core::mem::replace(place, Listener::Nobody) {
            Listener::Once(waker) => waker,
            _ => return,
        },
        None => return,
    };
    waker.wake();
}

/// Collects one port, masked or not, for who has polled it.
pub(crate) fn collect_port(port: Port) {
    if fifo::is_on() {
        return fifo::collect(port.get(), true);
    }
    let (word, bit) = split(port);
    collect(word, pending_word(word).load(Ordering::Acquire) & bit);
}

/// Takes the note that a port fired.
pub(crate) fn take_fired(port: Port) -> bool {
    if fifo::is_on() {
        return fifo::take_fired(port);
    }
    let (word, bit) = split(port);
    FIRED.get(word).is_some_and(|fired| fired.fetch_and(!bit, Ordering::AcqRel) & bit != 0)
}

/// Sleeps until an event is delivered; returns at once if one is pending and not masked.
fn block() {
    // SAFETY: SCHEDOP_block takes no pointer. It clears the mask; the upcall, if one comes, runs on this stack below
    // everything the compiler uses (no `nostack`), changes no register and returns masked. The store afterwards masks in
    // case there was no upcall; r12 is no argument register, so no hypervisor changes it.
    unsafe {
        asm!(
            "syscall",
            "mov byte ptr [r12], 1",
            in("r12") upcall_mask(),
            inlateout("rax") Hypercall::SchedOp.number() => _,
            inlateout("rdi") 1u64 => _,
            inlateout("rsi") 0u64 => _,
            lateout("rdx") _, lateout("r10") _, lateout("r8") _, lateout("r9") _,
            lateout("rcx") _, lateout("r11") _,
        );
    }
}

/// Opens a window in which upcalls are delivered, and returns how many were: 0 or 1, since the stub returns masked.
///
/// What was delivered stays pending for [`turn`].
pub fn window() -> u64 {
    let before = trap::UPCALLS.load(Ordering::Relaxed);
    // SAFETY: as block; xen_version(XENVER_version) has no effect, and on its way back what is pending is delivered.
    unsafe {
        asm!(
            "mov byte ptr [r12], 0",
            "syscall",
            "mov byte ptr [r12], 1",
            in("r12") upcall_mask(),
            inlateout("rax") Hypercall::XenVersion.number() => _,
            inlateout("rdi") 0u64 => _,
            inlateout("rsi") 0u64 => _,
            lateout("rdx") _, lateout("r10") _, lateout("r8") _, lateout("r9") _,
            lateout("rcx") _, lateout("r11") _,
        );
    }
    trap::UPCALLS.load(Ordering::Relaxed).wrapping_sub(before)
}

/// The time that [`idle_until`] has set the timer to, if nobody has set it anew since; 0 for none.
static ARMED: AtomicU64 = AtomicU64::new(0);

/// The time until which [`idle_until`] last meant to sleep, of those times for which it needed a hypercall; 0 for none.
static ASKED: AtomicU64 = AtomicU64::new(0);

/// As [`sleep_until`], for who sleeps often: as cheaply as can be.
///
/// The block hypercall looks at no port and, with an upcall that returns by itself, is the cheapest. It needs the timer set. That is left
/// as it is when something else ends the sleep: one that is set to an earlier time than is asked for ends some later sleep early, and is
/// set anew then. So a deadline that moves on with each sleep, as that of an answer does, costs a hypercall once in its length. Who sleeps
/// to the end each time would pay for the timer each time: then, with few ports, it is the poll hypercall, which takes a deadline.
pub(crate) fn idle_until(deadline_ns: Option<u64>) {
    static BEAT: spin::Once = spin::Once::new();
    BEAT.call_once(|| {
        // A vCPU is born with a beat of 10 ms, which nobody here waits for.
        let _ = crate::hypercall::stop_periodic_timer(0);
    });
    if let Some(deadline) = deadline_ns {
        let deadline = deadline.max(1);
        // Bound before it is set: whoever fires without a port is not heard.
        let port = timer_port();
        // It counts down once: after it has fired it is to be set again, also to the same time.
        if take_fired(port) {
            ARMED.store(0, Ordering::Relaxed);
        }
        if !(1..=deadline).contains(&ARMED.load(Ordering::Relaxed)) {
            let to_the_end = crate::time::now_ns() >= ASKED.swap(deadline, Ordering::Relaxed);
            if to_the_end && poll_open(deadline) {
                return turn();
            }
            // SAFETY: a number only.
            let set = unsafe { stub::set_timer_op(deadline) };
            ARMED.store(if set.is_ok() { deadline } else { 0 }, Ordering::Relaxed);
        }
    }
    block();
    turn();
}

/// Polls all ports that are open; false when they are too many, or cannot be polled.
fn poll_open(deadline_ns: u64) -> bool {
    let mut ports = [Port::new(0); POLLED_MOST];
    let count = {
        let open = OPEN.lock();
        ports.iter_mut().zip(open.iter()).for_each(|(to, from)| *to = *from);
        open.len()
    };
    ports.get(..count).is_some_and(|ports| crate::hypercall::poll(ports, deadline_ns).is_ok())
}

/// Sleeps until something happens or system time reaches `deadline_ns`, and collects it; returns early now and then.
pub fn sleep_until(deadline_ns: Option<u64>) {
    ARMED.store(0, Ordering::Relaxed);
    let armed = deadline_ns.is_some_and(|deadline| {
        timer_port();
        // SAFETY: a number only. 0 would stop the timer.
        unsafe { stub::set_timer_op(deadline.max(1)) }.is_ok()
    });
    block();
    if armed {
        // SAFETY: a number only.
        let _ = unsafe { stub::set_timer_op(0) };
    }
    turn();
}

static TIMER: spin::Once<Port> = spin::Once::new();

/// The port of the timer interrupt, bound at first use.
fn timer_port() -> Port {
    *TIMER.call_once(|| {
        let port = bind_virq_raw(Virq::TIMER).expect("every vCPU has a timer");
        // A vCPU is born with a beat of 10 ms, which nobody here waits for.
        let _ = crate::hypercall::stop_periodic_timer(0);
        make_room(port).expect("the port is a new one");
        unmask(port).expect("the port is ours");
        port
    })
}

fn bind_virq_raw(virq: Virq) -> Result<Port, Errno> {
    let mut argument = EvtchnBindVirq { virq: virq.get(), vcpu: 0, port: Port::new(0) };
    operation(EvtchnOp::BindVirq, &mut argument)?;
    Ok(argument.port)
}

/// Issues an event-channel operation with the argument that belongs to it.
fn operation<T>(operation: EvtchnOp, argument: &mut T) -> Result<u64, Errno> {
    // SAFETY: each caller in this module pairs the command with its own struct, which lives through the call. Closing or
    // binding ports changes no memory but the bits that this module watches.
    unsafe { stub::event_channel_op(u64::from(operation.number()), (&raw mut *argument) as u64) }
}

/// Makes this module's records reach to a port that was opened. `ENOSPC`, `ENOMEM`: it cannot be used.
fn make_room(port: Port) -> Result<(), Errno> {
    HIGHEST.fetch_max(port.get(), Ordering::Relaxed);
    match fifo::is_on() {
        true => fifo::reach(port.get()),
        false if port.get() < PORTS => Ok(()),
        false => Err(Errno::ENOSPC),
    }
}

fn unmask(port: Port) -> Result<(), Errno> {
    operation(EvtchnOp::Unmask, &mut EvtchnUnmask { port }).map(drop)
}

/// Masks a port: what comes by it is noted as pending, and is not collected.
pub(crate) fn mask(port: Port) {
    if fifo::is_on() {
        return fifo::mask(port);
    }
    let (word, bit) = split(port);
    mask_word(word).fetch_or(bit, Ordering::AcqRel);
}

/// How many ports this domain has open by way of this module, all its vCPUs together.
#[must_use]
pub fn open_ports() -> usize {
    OPEN.lock().len()
}

/// The highest port that this domain can have in the form that is in force. The hypervisor may allow fewer.
#[must_use]
pub fn highest_port() -> u32 {
    let ports = if fifo::is_on() { hypercall_abi::evtchn::EVTCHN_FIFO_NR_CHANNELS } else { PORTS };
    ports - 1
}

/// What a port is bound to.
///
/// # Errors
/// `EINVAL` for a port that cannot exist; `EPERM` for another domain without the right to ask.
pub fn status(domain: DomId, port: Port) -> Result<EvtchnStatus, Errno> {
    let mut argument = EvtchnStatus { dom: domain, port, ..EvtchnStatus::default() };
    operation(EvtchnOp::Status, &mut argument)?;
    Ok(argument)
}

/// Nobody is in the middle of changing what this module keeps.
pub(crate) fn is_intact() -> bool {
    !LISTENERS.is_locked() && !OPEN.is_locked() && !fifo::COUNT.is_locked()
}

/// The domain's event channels: makes [`Channel`]s. Clones are the same.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Events {}

impl Events {
    pub(crate) fn new() -> Self {
        Events {}
    }

    /// Turns the domain to the FIFO form: up to 131071 ports, events in the order in which they come. What is bound stays bound, and
    /// what is pending or noted stays so. Once is enough; it costs two pages, and one more for every 1024 ports.
    ///
    /// # Errors
    /// `ENOSYS` from a hypervisor without that form, `ENOMEM`: the domain keeps the two-level form.
    pub fn use_fifo(&self) -> Result<(), Errno> {
        if fifo::is_on() {
            return Ok(());
        }
        // Collected as far as it was announced; the rest moves over.
        turn();
        fifo::begin(HIGHEST.load(Ordering::Relaxed))
    }

    /// A port that `remote` may connect to.
    ///
    /// # Errors
    /// `ENOSPC` when the domain has no free port.
    pub fn alloc_unbound(&self, remote: DomId) -> Result<Channel, Errno> {
        let mut argument = EvtchnAllocUnbound { dom: DomId::SELF, remote_dom: remote, port: Port::new(0) };
        operation(EvtchnOp::AllocUnbound, &mut argument)?;
        Channel::open(argument.port)
    }

    /// Connects to a port that `remote` has made for this domain.
    ///
    /// The new channel has fired once already, so that what the other side did before is not missed.
    ///
    /// # Errors
    /// `EINVAL` when that port is not waiting for this domain; `ESRCH` when there is no such domain.
    pub fn bind_interdomain(&self, remote: DomId, port: Port) -> Result<Channel, Errno> {
        let mut argument = EvtchnBindInterdomain {
            remote_dom: remote,
            pad0: 0,
            remote_port: port,
            local_port: Port::new(0),
        };
        operation(EvtchnOp::BindInterdomain, &mut argument)?;
        Channel::open(argument.local_port)
    }

    /// A port for a virtual interrupt. The timer's is the runtime's own: use [`crate::time`].
    ///
    /// # Errors
    /// `EEXIST` when it is bound already, `EPERM` when it is not for this domain.
    pub fn bind_virq(&self, virq: Virq) -> Result<Channel, Errno> {
        Channel::open(bind_virq_raw(virq)?)
    }

    /// A port for a device's interrupt, a pin or a message ([`crate::hardware`]).
    ///
    /// # Errors
    /// `EEXIST` when it is bound already, `EPERM` or `EINVAL` when it is not for this domain.
    pub fn bind_pirq(&self, pirq: u32) -> Result<Channel, Errno> {
        let mut argument = EvtchnBindPirq { pirq, flags: 0, port: Port::new(0) };
        operation(EvtchnOp::BindPirq, &mut argument)?;
        Channel::open(argument.port)
    }

    /// A port that this domain signals to itself.
    ///
    /// # Errors
    /// `ENOSPC` when the domain has no free port.
    pub fn bind_ipi(&self) -> Result<Channel, Errno> {
        let mut argument = EvtchnBindIpi { vcpu: 0, port: Port::new(0) };
        operation(EvtchnOp::BindIpi, &mut argument)?;
        Channel::open(argument.port)
    }
}

/// A port of this domain, closed when dropped.
#[derive(Debug)]
pub struct Channel {
    port: Port,
    owned: bool,
}

impl Channel {
    fn open(port: Port) -> Result<Channel, Errno> {
        OPEN.lock().push(port);
        if let Err(error) = make_room(port) {
            let _ = operation(EvtchnOp::Close, &mut EvtchnClose { port });
            OPEN.lock().retain(|open| *open != port);
            return Err(error);
        }
        let channel = Channel { port, owned: true };
        // Nothing of an earlier owner of the same number is left.
        take_fired(port);
        unmask(port)?;
        Ok(channel)
    }

    /// Takes over a port that the builder has made; it stays open when the channel is dropped.
    pub(crate) fn adopt(port: Port) -> Result<Channel, Errno> {
        make_room(port)?;
        unmask(port)?;
        OPEN.lock().push(port);
        Ok(Channel { port, owned: false })
    }

    /// Its number.
    #[must_use]
    pub fn port(&self) -> Port {
        self.port
    }

    /// Signals the other end.
    ///
    /// # Errors
    /// `EINVAL` for a port that cannot be signalled: one bound to an interrupt, or not connected yet on some hypervisors.
    pub fn notify(&self) -> Result<(), Errno> {
        operation(EvtchnOp::Send, &mut EvtchnSend { port: self.port }).map(drop)
    }

    /// What signals the other end without having the channel.
    #[must_use]
    pub fn notifier(&self) -> Notifier {
        Notifier { port: self.port }
    }

    /// Has another vCPU told from now on. A device's interrupt follows it to its CPU.
    ///
    /// # Errors
    /// `ENOENT` no such vCPU, `EINVAL` a port that belongs to one.
    pub fn bind_vcpu(&self, vcpu: u32) -> Result<(), Errno> {
        operation(EvtchnOp::BindVcpu, &mut EvtchnBindVcpu { port: self.port, vcpu }).map(drop)
    }

    /// Sets how urgent its events are, from the next one on: 0 comes first, 15 last, 7 if nobody says otherwise.
    ///
    /// # Errors
    /// `ENOSYS` in the two-level form, `EINVAL` above 15.
    pub fn set_priority(&self, priority: u32) -> Result<(), Errno> {
        operation(EvtchnOp::SetPriority, &mut EvtchnSetPriority { port: self.port, priority }).map(drop)
    }

    /// Whether it has fired since somebody last looked; looking takes it.
    pub fn poll(&self) -> bool {
        turn();
        take_fired(self.port)
    }

    /// Sleeps until it fires.
    pub fn wait(&self) {
        while !self.poll() {
            sleep_until(None);
        }
    }

    /// Sleeps until it fires, true, or the time is over, false.
    pub fn wait_timeout(&self, timeout: Duration) -> bool {
        let deadline = crate::time::deadline(timeout);
        loop {
            if self.poll() {
                return true;
            }
            if crate::time::now_ns() >= deadline {
                return false;
            }
            sleep_until(Some(deadline));
        }
    }

    /// Has a waker called each time it fires, from the next one on, until it is dropped; no task can wait for it beside that.
    pub fn wake_always(&mut self, waker: Waker) {
        drop(set_listener(self.port.get(), Listener::Always(waker)));
    }

    /// Waits, as a task, until it fires. One task can wait for a channel at a time.
    pub fn fired(&mut self) -> impl Future<Output = ()> + Send + '_ {
        core::future::poll_fn(|context| {
            if take_fired(self.port) {
                return Poll::Ready(());
            }
            // What fires from here on wakes it; what fired before is seen.
            if !waits(self.port.get(), context.waker()) {
                drop(set_listener(self.port.get(), Listener::Once(context.waker().clone())));
            }
            if take_fired(self.port) {
                drop(set_listener(self.port.get(), Listener::Nobody));
                return Poll::Ready(());
            }
            Poll::Pending
        })
    }

    /// Waits, as a task, until it fires, true, or the time is over, false.
    pub async fn fired_within(&mut self, timeout: Duration) -> bool {
        let mut over = core::pin::pin!(crate::time::after(timeout));
        let mut fired = core::pin::pin!(self.fired());
        core::future::poll_fn(|context| {
            if fired.as_mut().poll(context).is_ready() {
                return Poll::Ready(true);
            }
            over.as_mut().poll(context).map(|()| false)
        })
        .await
    }

    /// Whether another domain, or this one, is connected to it; it is not before the other end binds and after it closes.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.status().is_ok_and(|status| status.status == EVTCHNSTAT_INTERDOMAIN)
    }

    /// What it is bound to.
    ///
    /// # Errors
    /// As [`status`].
    pub fn status(&self) -> Result<EvtchnStatus, Errno> {
        status(DomId::SELF, self.port)
    }
}

/// Signals the other end of a [`Channel`]. When that is closed it signals nobody, or whoever has the port's number then, for whom it
/// is an event without a cause.
#[derive(Clone, Copy, Debug)]
pub struct Notifier {
    port: Port,
}

impl Notifier {
    /// Signals the other end.
    ///
    /// # Errors
    /// As [`Channel::notify`].
    pub fn notify(self) -> Result<(), Errno> {
        operation(EvtchnOp::Send, &mut EvtchnSend { port: self.port }).map(drop)
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        mask(self.port);
        OPEN.lock().retain(|open| *open != self.port);
        drop(set_listener(self.port.get(), Listener::Nobody));
        if self.owned {
            // The port is ours, so closing it cannot fail; if it did, the mask keeps it silent.
            let _ = operation(EvtchnOp::Close, &mut EvtchnClose { port: self.port });
        }
        take_fired(self.port);
    }
}
