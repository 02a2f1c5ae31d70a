//! The FIFO form of event channels, as a guest takes part in it: more than 4096 ports, events in the order of their raising, 16
//! priorities.
//!
//! The hypervisor appends events to queues in pages of this domain; [`turn`] takes them from the front. A word leaves its queue in one
//! access that also reads where the queue goes on, and its event is looked for only afterwards: whatever the hypervisor does
//! meanwhile either lands in the word before, and is found, or makes the hypervisor announce the event anew. The
//! hypervisor's side of the argument is in its book, chapter "Event channels".

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use hypercall_abi::evtchn::{
    EVTCHN_FIFO_LINK_MASK, EVTCHN_FIFO_LINKED, EVTCHN_FIFO_MASKED, EVTCHN_FIFO_MAX_QUEUES,
    EVTCHN_FIFO_NR_CHANNELS, EVTCHN_FIFO_PENDING, EvtchnExpandArray, EvtchnFifoControlBlock,
    EvtchnInitControl,
};
use hypercall_abi::subops::EvtchnOp;
use hypercall_abi::{Errno, Gfn, Port};
use spin::{Mutex, Once};

use super::{FIRED, PORTS, mask_word, operation, upcall_pending, wake};
use crate::memory::Page;

const PENDING: u32 = 1 << EVTCHN_FIFO_PENDING;
const MASKED: u32 = 1 << EVTCHN_FIFO_MASKED;
const LINKED: u32 = 1 << EVTCHN_FIFO_LINKED;
/// Event words in a page.
const WORDS: usize = 1024;
const PAGES: usize = EVTCHN_FIFO_NR_CHANNELS as usize / WORDS;

/// Words of a control block: ready, a reserved one, the heads.
const CONTROL_WORDS: usize = size_of::<EvtchnFifoControlBlock>() / 4;
const HEADS: usize = 2;

/// A page of event words, which the hypervisor writes too, and notes of the ports that fired.
struct Chunk {
    words: &'static [AtomicU32; WORDS],
    fired: [AtomicU64; WORDS / 64],
}

/// The first vCPU's queues.
struct Queues {
    control: &'static [AtomicU32; CONTROL_WORDS],
    /// The next port of each queue, 0 when it is in the control block.
    next: [AtomicU32; EVTCHN_FIFO_MAX_QUEUES],
}

static QUEUES: Once<Queues> = Once::new();
static CHUNKS: [Once<Chunk>; PAGES] = [const { Once::new() }; PAGES];
/// How many chunks there are; held while one is added.
pub(super) static COUNT: Mutex<usize> = Mutex::new(0);

/// Whether the domain has this form.
pub(super) fn is_on() -> bool {
    QUEUES.is_completed()
}

/// A page as words that the hypervisor shares from now on.
fn share<const N: usize>(page: Page) -> &'static [AtomicU32; N] {
    const { assert!(N <= WORDS) };
    // SAFETY: the page is aligned, has that many words, and is leaked: it lives for ever, and nobody accesses it but through this
    // reference and, atomically, the hypervisor.
    unsafe { &*(page.leak() as *const [AtomicU32; N]) }
}

/// Turns the domain to this form, with words for the ports up to `highest`.
pub(super) fn begin(highest: u32) -> Result<(), Errno> {
    let page = Page::new().map_err(|_| Errno::ENOMEM)?;
    // All that is needed is there before the point of no return.
    let words: Result<Vec<Page>, _> = (0..=highest as usize / WORDS).map(|_| Page::new()).collect();
    let words = words.map_err(|_| Errno::ENOMEM)?;
    let mut argument = EvtchnInitControl {
        control_gfn: Gfn::new(page.mfn().get()),
        offset: 0,
        vcpu: 0,
        ..EvtchnInitControl::default()
    };
    operation(EvtchnOp::InitControl, &mut argument)?;
    QUEUES.call_once(|| Queues {
        control: share(page),
        next: [const { AtomicU32::new(0) }; EVTCHN_FIFO_MAX_QUEUES],
    });
    let mut count = COUNT.lock();
    words.into_iter().try_for_each(|page| add(&mut count, page))
}

/// Makes the event array reach to a port.
///
/// # Errors
/// `ENOMEM`, `ENOSPC`: the port cannot be used.
pub(super) fn reach(port: u32) -> Result<(), Errno> {
    let mut count = COUNT.lock();
    while *count <= port as usize / WORDS {
        add(&mut count, Page::new().map_err(|_| Errno::ENOMEM)?)?;
    }
    Ok(())
}

/// Adds a page to the event array. What was masked in the two-level form is, and so is what was not there.
fn add(count: &mut usize, page: Page) -> Result<(), Errno> {
    let chunk = CHUNKS.get(*count).ok_or(Errno::ENOSPC)?;
    let frame = page.mfn();
    let made =
        chunk.call_once(|| Chunk { words: share(page), fired: [const { AtomicU64::new(0) }; WORDS / 64] });
    for (index, word) in made.words.iter().enumerate() {
        let port = *count * WORDS + index;
        let masked =
            port >= PORTS as usize || mask_word(port / 64).load(Ordering::Relaxed) >> (port % 64) & 1 != 0;
        word.store(if masked { MASKED } else { 0 }, Ordering::Relaxed);
    }
    for (fired, old) in made.fired.iter().zip(FIRED.iter().skip(*count * WORDS / 64)) {
        fired.store(old.swap(0, Ordering::AcqRel), Ordering::Release);
    }
    operation(EvtchnOp::ExpandArray, &mut EvtchnExpandArray { array_gfn: Gfn::new(frame.get()) })?;
    *count += 1;
    Ok(())
}

fn chunk(port: u32) -> Option<(&'static Chunk, usize)> {
    Some((CHUNKS.get(port as usize / WORDS)?.get()?, port as usize % WORDS))
}

fn word(port: u32) -> Option<&'static AtomicU32> {
    let (chunk, index) = chunk(port)?;
    chunk.words.get(index)
}

/// Keeps a port silent.
pub(super) fn mask(port: Port) {
    if let Some(word) = word(port.get()) {
        word.fetch_or(MASKED, Ordering::SeqCst);
    }
}

/// Takes the note that a port fired.
pub(super) fn take_fired(port: Port) -> bool {
    let Some((chunk, index)) = chunk(port.get()) else { return false };
    let bit = 1 << (index % 64);
    chunk.fired.get(index / 64).is_some_and(|fired| fired.fetch_and(!bit, Ordering::AcqRel) & bit != 0)
}

/// Notes a port's event if one is pending and, unless `even_masked`, not masked.
pub(super) fn collect(port: u32, even_masked: bool) {
    let Some((chunk, index)) = chunk(port) else { return };
    let (Some(word), Some(fired)) = (chunk.words.get(index), chunk.fired.get(index / 64)) else { return };
    let now = word.load(Ordering::SeqCst);
    if now & PENDING == 0 || now & MASKED != 0 && !even_masked {
        return;
    }
    word.fetch_and(!PENDING, Ordering::SeqCst);
    fired.fetch_or(1 << (index % 64), Ordering::Release);
    wake(port);
}

/// Collects what is in the queues, the most urgent first. Never sleeps.
pub(super) fn turn() {
    let Some(queues) = QUEUES.get() else { return };
    let [ready, _, heads @ ..] = queues.control;
    const { assert!(HEADS + EVTCHN_FIFO_MAX_QUEUES == CONTROL_WORDS) };
    // In this order, so that an event that comes in between is seen now or makes the next turn look again.
    if upcall_pending().swap(0, Ordering::SeqCst) == 0 && ready.load(Ordering::Relaxed) == 0 {
        return;
    }
    let mut waiting = ready.swap(0, Ordering::SeqCst);
    while waiting != 0 {
        let queue = waiting.trailing_zeros() as usize;
        let (Some(next), Some(head)) = (queues.next.get(queue), heads.get(queue)) else { return };
        let port = match next.load(Ordering::Relaxed) {
            0 => head.load(Ordering::SeqCst),
            port => port,
        };
        let link = match word(port) {
            Some(word) => word.fetch_and(!(LINKED | EVTCHN_FIFO_LINK_MASK), Ordering::SeqCst),
            None => 0,
        } & EVTCHN_FIFO_LINK_MASK;
        next.store(link, Ordering::Relaxed);
        if link == 0 {
            waiting &= !(1 << queue);
        }
        collect(port, false);
        // What became more urgent meanwhile comes first.
        waiting |= ready.swap(0, Ordering::SeqCst);
    }
}
