//! Guest-user code: run a function outside the guest kernel and see how it comes back.
//!
//! The hypervisor keeps two page-table roots for each vCPU, the kernel's and the user's, and switches between them. Here
//! user code runs like a call: [`run`] starts it with the given registers and returns with the registers at the next entry
//! to the kernel, whichever it was: a system call, an exception, or an event upcall. User code is interruptible anywhere.

use crate::hypercall::stub;
use crate::memory::{self, Access, Page};
use crate::rt::trap::{self, TrapFrame, enter_user};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::arch::{asm, naked_asm};
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering};
use hypercall_abi::mmu::{MmuCommand, MmuUpdate, MmuextOp};
use hypercall_abi::segment::{FLAT_KERNEL_SS, FLAT_USER_CS, FLAT_USER_SS};
use hypercall_abi::subops::MmuextCmd;
use hypercall_abi::{DomId, Errno, MachAddr, Mfn, PAGE_SIZE};

/// Flags that user code starts with: events are delivered.
const USER_FLAGS: u64 = 0x202;

#[repr(C, align(16))]
struct EntryStack(UnsafeCell<[u8; 4096]>);

// SAFETY: only the entry stubs write it, on the one vCPU that runs user code, and `run` copies the frame out at once.
unsafe impl Sync for EntryStack {}

/// Where frames of entries from user code land.
static ENTRY_STACK: EntryStack = EntryStack(UnsafeCell::new([0; 4096]));

/// The user root that the hypervisor has now.
static CURRENT_ROOT: AtomicU64 = AtomicU64::new(0);

/// Why user code came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It made a system call.
    SystemCall,
    /// It raised an exception.
    Exception(trap::Exception),
    /// An event is pending; [`crate::events::turn`] collects it, and running the same registers again goes on.
    Upcall,
}

/// The way in which a frame came back from user code.
#[must_use]
pub fn exit_of(frame: &TrapFrame) -> Exit {
    match frame.vector {
        trap::SYSCALL => Exit::SystemCall,
        trap::UPCALL => Exit::Upcall,
        vector => Exit::Exception(trap::Exception { vector: vector as u8, error: frame.error as u32 }),
    }
}

/// Registers for user code that starts at `rip` on the stack `rsp`.
#[must_use]
pub fn registers(rip: u64, rsp: u64) -> TrapFrame {
    TrapFrame {
        rip,
        rsp,
        cs: u64::from(FLAT_USER_CS),
        ss: u64::from(FLAT_USER_SS),
        rflags: USER_FLAGS,
        ..TrapFrame::default()
    }
}

fn extended(operation: MmuextOp) -> Result<(), Errno> {
    // SAFETY: one operation, alive through the call. The callers give operations on page tables that only user code uses.
    unsafe { stub::mmuext_op((&raw const operation) as u64, 1, 0, u64::from(DomId::SELF.get())) }.map(drop)
}

fn use_root(root: Mfn) -> Result<(), Errno> {
    if CURRENT_ROOT.load(Ordering::Relaxed) == root.get() {
        return Ok(());
    }
    let top = (&raw const ENTRY_STACK) as u64 + size_of::<EntryStack>() as u64;
    // SAFETY: the stack is only for entries from user code.
    unsafe { stub::stack_switch(u64::from(FLAT_KERNEL_SS), top)? };
    extended(MmuextOp::new(MmuextCmd::NewUserBaseptr, root.get(), 0))?;
    CURRENT_ROOT.store(root.get(), Ordering::Relaxed);
    Ok(())
}

fn enter(registers: &TrapFrame) -> TrapFrame {
    // User code may leave anything in the vector and floating-point control words; Rust wants the standard ones.
    let standard: u32 = 0x1f80;
    // SAFETY: the selectors are forced to user mode's here, so the frame cannot land in the kernel; use_root has set stack
    // and root. The result points into the entry stack, which nobody writes before the next entry from user code.
    unsafe {
        let mut frame = *registers;
        frame.cs = frame.cs & 0xffff | 3;
        frame.ss |= 3;
        frame.error = 0;
        let back = *enter_user(&raw const frame);
        asm!("fninit", "ldmxcsr [{}]", in(reg) &raw const standard, options(nostack));
        back
    }
}

/// Runs user code until it comes back.
///
/// # Errors
/// When the hypervisor does not take the page tables.
pub fn run(space: &Space, registers: &TrapFrame) -> Result<TrapFrame, Errno> {
    use_root(space.root.mfn())?;
    Ok(enter(registers))
}

/// Runs user code on the kernel's own page tables, where it can reach all that the kernel can.
///
/// # Errors
/// When the hypervisor does not take the page tables.
///
/// # Safety
/// What the code does to the kernel's memory is what Rust code might have done in its place.
pub unsafe fn run_in_kernel_space(registers: &TrapFrame) -> Result<TrapFrame, Errno> {
    use_root(memory::root())?;
    Ok(enter(registers))
}

/// What the return stub leaves in rax.
const RETURNED: u64 = 0x7265_7475_726e;

/// Where a function called by [`call`] returns to: hands its result over by a system call.
#[unsafe(naked)]
unsafe extern "C" fn return_from_user() {
    naked_asm!("mov rdi, rax", "mov rax, {returned}", "syscall", "ud2", returned = const RETURNED)
}

/// Calls a function as user code, on the kernel's page tables and a stack of its own; upcalls meanwhile are collected.
///
/// # Errors
/// The registers at an exception or a system call that is not the function's return.
///
/// # Safety
/// As [`run_in_kernel_space`]. The function must not issue hypercalls (they would be system calls), so it neither prints nor
/// allocates.
pub unsafe fn call(function: extern "C" fn(u64) -> u64, argument: u64) -> Result<u64, Box<TrapFrame>> {
    const WORDS: usize = 2048;
    let mut stack: Vec<u64> = alloc::vec![0; WORDS];
    // At a function's first instruction rsp is 8 below a multiple of 16, and points at the return address.
    let rsp = ((stack.as_mut_ptr() as u64 + WORDS as u64 * 8) & !15) - 24;
    // SAFETY: inside the vector, aligned to 8.
    unsafe { (rsp as *mut u64).write(return_from_user as *const () as u64) };
    let mut frame = registers(function as *const () as u64, rsp);
    frame.rdi = argument;
    loop {
        // SAFETY: the caller's.
        match unsafe { run_in_kernel_space(&frame) } {
            Ok(back) => frame = back,
            Err(_) => return Err(Box::new(frame)),
        }
        match exit_of(&frame) {
            Exit::Upcall => crate::events::turn(),
            Exit::SystemCall if frame.rax == RETURNED => return Ok(frame.rdi),
            _ => return Err(Box::new(frame)),
        }
    }
}

/// An address space for user code: page tables of its own, with pages that it owns and nothing of the kernel.
#[derive(Debug)]
pub struct Space {
    root: Page,
    tables: Vec<Page>,
    pages: Vec<(u64, Page)>,
}

impl Space {
    /// An empty address space.
    ///
    /// # Errors
    /// `ENOMEM`, or as the hypervisor says.
    pub fn new() -> Result<Space, Errno> {
        let root = Page::new()?;
        root.protect(Access::Read)?;
        if let Err(error) = extended(MmuextOp::new(MmuextCmd::PinL4Table, root.mfn().get(), 0)) {
            root.protect(Access::ReadWrite)?;
            return Err(error);
        }
        Ok(Space { root, tables: Vec::new(), pages: Vec::new() })
    }

    /// Maps a page for user code and keeps it.
    ///
    /// # Errors
    /// `EINVAL` for an address that is no page of the lower half or is taken, `ENOMEM`, or as the hypervisor says.
    pub fn map(&mut self, address: u64, page: Page, access: Access) -> Result<(), Errno> {
        if !address.is_multiple_of(PAGE_SIZE as u64) || address >> 47 != 0 || self.page(address).is_some() {
            return Err(Errno::EINVAL);
        }
        let mut table = self.root.mfn();
        for level in [4, 3, 2] {
            let place = entry_place(table, address, level);
            table = match self.entry(table, address, level) {
                0 => {
                    let page = Page::new()?;
                    page.protect(Access::Read)?;
                    let frame = page.mfn();
                    self.tables.push(page);
                    update(place, frame.get() << 12 | 0x67)?;
                    frame
                }
                entry => hypercall_abi::mmu::pte_frame(entry),
            };
        }
        update(entry_place(table, address, 1), page.mfn().get() << 12 | access.bits() | 4)?;
        self.pages.push((address, page));
        Ok(())
    }

    fn entry(&self, table: Mfn, address: u64, level: u32) -> u64 {
        let page = core::iter::once(&self.root).chain(&self.tables).find(|page| page.mfn() == table);
        let at = (address >> (12 + 9 * (level - 1)) & 511) * 8;
        // SAFETY: a table of ours, mapped read-only; the hypervisor writes it, so volatile.
        page.map_or(0, |page| unsafe { ((page.address() + at) as *const u64).read_volatile() })
    }

    /// The page at an address.
    #[must_use]
    pub fn page(&self, address: u64) -> Option<&Page> {
        self.pages.iter().find(|(at, _)| *at == address).map(|(_, page)| page)
    }

    /// The page at an address, to change while user code does not run.
    pub fn page_mut(&mut self, address: u64) -> Option<&mut Page> {
        self.pages.iter_mut().find(|(at, _)| *at == address).map(|(_, page)| page)
    }
}

fn entry_place(table: Mfn, address: u64, level: u32) -> MachAddr {
    MachAddr::new(table.address().get() + (address >> (12 + 9 * (level - 1)) & 511) * 8)
}

fn update(place: MachAddr, value: u64) -> Result<(), Errno> {
    let request = MmuUpdate::new(MmuCommand::NormalPtUpdate, place, value);
    // SAFETY: one request, alive through the call, about a table that only user code uses and a page that `Space` owns.
    unsafe { stub::mmu_update((&raw const request) as u64, 1, 0, u64::from(DomId::SELF.get())) }.map(drop)
}

impl Drop for Space {
    fn drop(&mut self) {
        let root = self.root.mfn();
        if CURRENT_ROOT.load(Ordering::Relaxed) == root.get() {
            let _ = extended(MmuextOp::new(MmuextCmd::NewUserBaseptr, 0, 0));
            CURRENT_ROOT.store(0, Ordering::Relaxed);
        }
        let unpinned = extended(MmuextOp::new(MmuextCmd::UnpinTable, root.get(), 0));
        // Unpinned, the tables are ordinary pages again, and may be written and freed. If that failed they must not be.
        let whole = unpinned.and_then(|()| {
            core::iter::once(&self.root)
                .chain(&self.tables)
                .try_for_each(|page| page.protect(Access::ReadWrite))
        });
        if let Err(error) = whole {
            log::error!("an address space cannot be taken apart: {error}; its pages are lost");
            for page in self.tables.drain(..).chain(self.pages.drain(..).map(|(_, page)| page)) {
                page.leak();
            }
            if let Ok(spare) = Page::new() {
                core::mem::replace(&mut self.root, spare).leak();
            }
        }
    }
}
