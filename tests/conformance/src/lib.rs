//! What the conformance guests share: raw calls, pages that are nobody's, and which hypervisor this is.
//!
//! Each program in `src/bin` is one family of the ABI as many small named cases. A case says precisely what it expects (the
//! error number, the effect that the guest sees), and was first run on real Xen 4.17: what Xen answers is right. Where the two
//! differ for a reason, the case says so with [`only_on`].
#![no_std]

extern crate alloc;

pub mod counts;
mod handlers;
pub mod handles;
pub mod owners;
pub mod peer;
pub mod state;

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};
use guest_sdk::CommandLine;
use guest_sdk::abi::mmu::{MmuCommand, MmuUpdate, MmuextOp};
use guest_sdk::abi::shared_info::SharedInfo;
use guest_sdk::abi::start_info::StartFlags;
use guest_sdk::abi::subops::{
    CallbackOp, EvtchnOp, GnttabOp, MemoryOp, MmuextCmd, PhysdevOp, SchedOp, VcpuOp, VersionOp,
};
use guest_sdk::abi::{DomId, Errno, Hypercall, MachAddr, Mfn, Port};
use guest_sdk::memory::{self, Access, Page, Range};
use guest_sdk::testkit::{self, Stop, skip, try_read};

unsafe extern "C" {
    static __shared_info: u8;
}

/// Issues a hypercall.
///
/// Not `unsafe`, though it can do anything to this guest: every case is written against the raw ABI, and its author answers
/// for the arguments, as in an unsafe block.
pub fn call(call: Hypercall, arguments: [u64; 5]) -> Result<u64, Errno> {
    raw(call.number(), arguments)
}

/// Issues a hypercall by number; as [`call`].
pub fn raw(number: u64, arguments: [u64; 5]) -> Result<u64, Errno> {
    // SAFETY: the case's author answers for the arguments.
    Errno::check(unsafe { guest_sdk::hypercall::raw(number, arguments) })
}

/// The address of a struct that a call reads or writes.
pub fn at<T>(value: &mut T) -> u64 {
    (&raw mut *value) as u64
}

/// A call with a command and one argument struct.
fn with<T>(which: Hypercall, command: u32, argument: &mut T) -> Result<u64, Errno> {
    call(which, [u64::from(command), at(argument), 0, 0, 0])
}

/// `event_channel_op`.
pub fn evtchn<T>(command: EvtchnOp, argument: &mut T) -> Result<u64, Errno> {
    with(Hypercall::EventChannelOp, command.number(), argument)
}

/// `sched_op`.
pub fn sched<T>(command: SchedOp, argument: &mut T) -> Result<u64, Errno> {
    with(Hypercall::SchedOp, command.number(), argument)
}

/// `memory_op`.
pub fn memop<T>(command: MemoryOp, argument: &mut T) -> Result<u64, Errno> {
    with(Hypercall::MemoryOp, command.number(), argument)
}

/// `physdev_op`.
pub fn physdev<T>(command: PhysdevOp, argument: &mut T) -> Result<u64, Errno> {
    with(Hypercall::PhysdevOp, command.number(), argument)
}

/// `xen_version`.
pub fn version<T>(command: VersionOp, argument: &mut T) -> Result<u64, Errno> {
    with(Hypercall::XenVersion, command.number(), argument)
}

/// `callback_op`.
pub fn callback<T>(command: CallbackOp, argument: &mut T) -> Result<u64, Errno> {
    with(Hypercall::CallbackOp, command.number(), argument)
}

/// `vcpu_op`.
pub fn vcpu<T>(command: VcpuOp, vcpu: u64, argument: &mut T) -> Result<u64, Errno> {
    call(Hypercall::VcpuOp, [u64::from(command.number()), vcpu, at(argument), 0, 0])
}

/// `grant_table_op` with a list of one.
pub fn grant<T>(command: GnttabOp, argument: &mut T) -> Result<u64, Errno> {
    call(Hypercall::GrantTableOp, [u64::from(command.number()), at(argument), 1, 0, 0])
}

/// One `mmuext_op` for this domain.
pub fn mmuext(command: MmuextCmd, arg1: u64, arg2: u64) -> Result<u64, Errno> {
    let mut operation = MmuextOp::new(command, arg1, arg2);
    call(Hypercall::MmuextOp, [at(&mut operation), 1, 0, SELF, 0])
}

/// One `mmu_update` for this domain.
pub fn update(command: MmuCommand, place: u64, value: u64) -> Result<u64, Errno> {
    let mut request = MmuUpdate::new(command, MachAddr::new(place), value);
    call(Hypercall::MmuUpdate, [at(&mut request), 1, 0, SELF, 0])
}

/// `DOMID_SELF` in a register.
pub const SELF: u64 = DomId::SELF.get() as u64;

/// An address at which nothing is mapped, in the guest's part.
pub const NOWHERE: u64 = 0x7000_0000_0000;

/// The page shared with the hypervisor.
pub fn shared() -> *mut SharedInfo {
    (&raw const __shared_info) as *mut SharedInfo
}

/// Whether Xenolith runs this guest; otherwise it is Xen itself. Known before the first case runs.
pub fn is_xenolith() -> bool {
    testkit::hypervisor().windows(8).any(|part| part == b"xenolith")
}

/// By how much the clocks of two vCPUs may differ, in nanoseconds.
///
/// Not at all: but Xen without an invariant TSC (QEMU's TCG has none) measures each processor's TSC by itself, once a second and with
/// an error of as long as the measurement was interrupted. 27 ms were seen where QEMU runs its processors in turn.
pub fn clock_skew() -> u64 {
    if is_xenolith() { 0 } else { 200_000_000 }
}

/// Whether this domain is privileged: it was built by the hypervisor itself, as dom0.
///
/// Where the hypervisor gives one answer to everything (`answers=`), rights make no difference but to the case, so that there the
/// word `privileged` lets it believe that it has them: no boot for each case that only a privileged domain runs.
pub fn is_privileged() -> bool {
    let line = CommandLine::get();
    if line.has("privileged") && line.value("answers").is_some() {
        return true;
    }
    let flags = guest_sdk::rt::start::start_info().map(|info| info.flags());
    flags.is_some_and(|flags| flags.contains(StartFlags::PRIVILEGED))
}

/// Skips a case that only a privileged domain can run.
///
/// # Errors
/// The skip.
pub fn only_privileged(reason: &str) -> Result<(), Stop> {
    if is_privileged() { Ok(()) } else { skip(reason) }
}

/// What a call gives a privileged domain, and what it gives any other.
pub fn by_privilege<T>(privileged: T, other: T) -> T {
    if is_privileged() { privileged } else { other }
}

/// Skips a case elsewhere, for this reason.
///
/// # Errors
/// The skip, on the other hypervisor.
pub fn only_on(xenolith: bool, reason: &str) -> Result<(), Stop> {
    if is_xenolith() == xenolith { Ok(()) } else { skip(reason) }
}

/// A page whose own mapping is read-only while this lives, so that it may become a table; then it is an ordinary page again.
pub struct TablePage(Option<Page>);

impl TablePage {
    /// A page with this content, read-only now.
    ///
    /// # Errors
    /// No memory, or as the hypervisor says.
    pub fn new(words: &[(usize, u64)]) -> Result<TablePage, Errno> {
        let mut page = Page::new()?;
        for &(index, value) in words {
            if let Some(bytes) = page.bytes_mut().get_mut(index * 8..index * 8 + 8) {
                bytes.copy_from_slice(&value.to_le_bytes());
            }
        }
        protect(&page, false)?;
        Ok(TablePage(Some(page)))
    }

    fn page(&self) -> &Page {
        self.0.as_ref().expect("it is there until it is dropped")
    }

    /// Its machine frame.
    pub fn mfn(&self) -> u64 {
        self.page().mfn().get()
    }

    /// Machine address of word `index`.
    pub fn place(&self, index: u64) -> u64 {
        (self.mfn() << 12) + index * 8
    }

    /// Where it can be read.
    pub fn address(&self) -> u64 {
        self.page().address()
    }

    /// Word `index` as it is now; the hypervisor writes it too.
    pub fn word(&self, index: u64) -> u64 {
        assert!(index < 512);
        // SAFETY: inside the page, which is mapped for reading.
        unsafe { ((self.address() + index * 8) as *const u64).read_volatile() }
    }
}

impl Drop for TablePage {
    fn drop(&mut self) {
        let Some(page) = self.0.take() else { return };
        if protect(&page, true).is_err() {
            // Still a table somewhere: nobody may write it any more.
            page.leak();
        }
    }
}

/// Makes a page's own mapping writable or not.
///
/// # Errors
/// As the hypervisor says: `EINVAL` for a frame whose type does not allow it.
pub fn protect(page: &Page, writable: bool) -> Result<(), Errno> {
    let bits = if writable { 0x63 } else { 0x61 };
    // SAFETY: callers write a page only while it is writable.
    unsafe { memory::set_leaf(page.address(), page.mfn().get() << 12 | bits | 1 << 63) }
}

/// A frame of the hypervisor: a table that the guest's own root leads to.
///
/// # Errors
/// As the hypervisor says about reading that root.
pub fn hypervisor_frame() -> Result<u64, Stop> {
    let range = Range::new(1)?;
    // SAFETY: the root, for reading.
    unsafe { range.map(0, memory::root(), Access::Read)? };
    for slot in 256..272 {
        let entry = try_read(range.start() + slot * 8)?;
        if entry & 1 != 0 {
            return Ok(entry >> 12 & 0xff_ffff_ffff);
        }
    }
    Err(Stop::Error("nothing of the hypervisor is in the root".into()))
}

/// `count` pages.
///
/// # Errors
/// No memory.
pub fn pages(count: usize) -> Result<Vec<Page>, Stop> {
    let mut pages = Vec::new();
    for _ in 0..count {
        pages.push(Page::new()?);
    }
    Ok(pages)
}

/// A page-table entry.
pub fn pte(frame: u64, bits: u64) -> u64 {
    Mfn::new(frame).address().get() | bits
}

/// The word of pending bits that a port's bit is in, and the bit.
fn pending_bit(port: Port) -> (&'static AtomicU64, u64) {
    let (word, bit) = (port.get() as usize / 64 % 64, 1 << (port.get() % 64));
    // SAFETY: the shared page stays mapped, and the word is only accessed atomically.
    unsafe { (AtomicU64::from_ptr((&raw mut (*shared()).evtchn_pending).cast::<u64>().add(word)), bit) }
}

/// The word of mask bits that a port's bit is in.
fn mask_word(port: Port) -> &'static AtomicU64 {
    let word = port.get() as usize / 64 % 64;
    // SAFETY: as for the pending bits.
    unsafe { AtomicU64::from_ptr((&raw mut (*shared()).evtchn_mask).cast::<u64>().add(word)) }
}

/// Masks a port.
pub fn mask(port: Port) {
    mask_word(port).fetch_or(1 << (port.get() % 64), Ordering::AcqRel);
}

/// Whether a port is masked.
pub fn masked(port: Port) -> bool {
    mask_word(port).load(Ordering::Acquire) >> (port.get() % 64) & 1 != 0
}

/// Whether a port is pending.
pub fn pending(port: Port) -> bool {
    let (word, bit) = pending_bit(port);
    word.load(Ordering::Acquire) & bit != 0
}

/// Whether a port was pending; it is not after this.
pub fn take_pending(port: Port) -> bool {
    let (word, bit) = pending_bit(port);
    word.fetch_and(!bit, Ordering::AcqRel) & bit != 0
}
