//! Faults and instructions that concern a guest's memory: page-table writes by the guest itself, its LDT, CR3.

use core::sync::atomic::Ordering;

use hypercall_abi::{DomId, MachAddr, Mfn};

use super::decode::{self, Gpr, Insn, Mem, MemBase, Source, Store, StoreOp, Width};
use super::deliver::{Exception, PF_USER, PF_WRITE};
use super::descriptor::CodeSegment;
use super::emulate::{Emulated, gpr, set_gpr};
use super::msr;
use crate::domain::{Current, GuestRegs};
use crate::hypercall::Budget;
use crate::hypervisor::Hypervisor;
use crate::mm::update::NotUpdated;
use crate::mm::{self, Pte, Stop, Unfinished};
use crate::page_ref::{SegDesc, Writable};
use crate::platform::Platform;
use crate::x86::layout::{
    DESCRIPTOR_WINDOW_SIZE, DESCRIPTOR_WINDOWS, HYPERVISOR_END, HYPERVISOR_START, LDT_PAGE, PAGE_SIZE,
    is_canonical,
};

/// Page-fault error code: the page was there, the access not allowed.
const PF_PRESENT: u64 = 1 << 0;
/// Page-fault error code: an entry had reserved bits set.
const PF_RESERVED: u64 = 1 << 3;
/// Page-fault error code: instruction fetch.
const PF_FETCH: u64 = 1 << 4;

/// Bit of `vm_assist`: the guest may write its L1 tables by plain stores.
const ASSIST_WRITABLE_PAGE_TABLES: u32 = 1 << 2;

/// Error code of a selector fault: the selector is of the LDT.
const SELECTOR_IN_LDT: u64 = 1 << 2;

impl<P: Platform> Hypervisor<P> {
    /// A page fault of the guest that may be the hypervisor's to fix. [`Emulated::No`] means it is the guest's.
    pub(super) fn fix_page_fault(&self, current: &mut Current, fault: Exception) -> Emulated {
        let code = u64::from(fault.error_code);
        if code & PF_RESERVED != 0 {
            // No table that was validated can say this.
            return Emulated::Crash("a reserved bit is set in its page tables");
        }
        if (HYPERVISOR_START..HYPERVISOR_END).contains(&fault.address) {
            // The processor reads descriptors as ring 0 whatever the mode: that is how these differ from a guest's own access.
            return if code & PF_USER == 0 { self.descriptor_fault(current, fault) } else { Emulated::No };
        }
        let assists = current.domain().vm_assist.load(Ordering::Relaxed);
        if assists & ASSIST_WRITABLE_PAGE_TABLES != 0
            && current.state.kernel_mode
            && code & (PF_WRITE | PF_PRESENT | PF_FETCH) == PF_WRITE | PF_PRESENT
        {
            return self.page_table_store(current, fault.address);
        }
        Emulated::No
    }

    /// The processor did not find a descriptor in this CPU's window: a page of the LDT is brought in, the rest is the
    /// guest's fault.
    fn descriptor_fault(&self, current: &mut Current, fault: Exception) -> Emulated {
        let window = DESCRIPTOR_WINDOWS + u64::from(self.platform.this_cpu().0) * DESCRIPTOR_WINDOW_SIZE;
        let Some(offset) = fault.address.checked_sub(window).filter(|o| *o < DESCRIPTOR_WINDOW_SIZE) else {
            return Emulated::No;
        };
        let Some(in_ldt) = offset.checked_sub(LDT_PAGE * PAGE_SIZE) else {
            // Behind the guest's GDT: what the processor says of a selector beyond the limit.
            return Emulated::Raise(Exception { error_code: (offset & !7) as u32, ..Exception::GP });
        };
        if self.bring_in_ldt_page(current, in_ldt) {
            return Emulated::Again;
        }
        let address = current.state.ldt.base.wrapping_add(in_ldt);
        if is_canonical(address) {
            Emulated::Raise(Exception { address, ..fault })
        } else {
            let error_code = (in_ldt & !7 | SELECTOR_IN_LDT) as u32;
            Emulated::Raise(Exception { error_code, ..Exception::GP })
        }
    }

    /// Maps the page of the guest's LDT that holds byte `offset` into the window, if its kernel's page tables map it and it
    /// is a page of descriptors that a guest may have.
    pub(super) fn bring_in_ldt_page(&self, current: &mut Current, offset: u64) -> bool {
        let state = &mut current.state;
        if offset / 8 >= u64::from(state.ldt.entries) {
            return false;
        }
        let page = (offset / PAGE_SIZE) as usize;
        if !matches!(state.ldt.frames.get(page), Some(None)) {
            return false;
        }
        let Some(root) = state.kernel_root else { return false };
        let Some(pte) = self.guest_l1_entry(root, state.ldt.base.wrapping_add(offset)) else { return false };
        if !pte.is_present() {
            return false;
        }
        let owner = current.domain().id;
        // A page of 512 descriptors: bounded work.
        let taken = self.pager().get_typed::<SegDesc>(pte.mfn(), owner, self, &mut Budget::unlimited());
        let Ok(frame) = taken else { return false };
        let mfn = frame.into_pte();
        if let Some(slot) = current.state.ldt.frames.get_mut(page) {
            *slot = Some(mfn);
        }
        self.platform.map_ldt_page(page, mfn);
        true
    }

    /// The L1 entry that translates `va` in the address space of `root`.
    fn guest_l1_entry(&self, root: Mfn, va: u64) -> Option<Pte> {
        let (table, index) = self.pager().find_l1(root, va)?;
        let word = self.platform.frame(table).get(index)?;
        Some(Pte::from_bits(word.load(Ordering::Relaxed)))
    }

    /// Gives back a frame that was part of a GDT or LDT. Descriptor pages have no entries to give back: constant work.
    pub(crate) fn release_descriptor_frame(&self, mfn: Mfn) {
        let _done = self.pager().release_stored(mfn, &mut Budget::unlimited());
    }

    /// CR3 written by the guest's kernel: as `mmuext_op(NEW_BASEPTR)`.
    pub(super) fn write_cr3(&self, current: &mut Current, value: u64) -> Result<(), Emulated> {
        let owner = current.domain().id;
        let mut budget = self.entry_budget();
        match self.new_kernel_root(current, owner, Mfn::new(value >> 12), &mut budget) {
            Ok(()) => Ok(()),
            Err(Stop::Preempted) => Err(Emulated::Again),
            Err(Stop::Failed(_)) => Err(Emulated::Raise(Exception::GP)),
        }
    }

    /// The register that fills a page of the guest's with hypercall stubs: a machine address, and in its low bits the number
    /// of the page, of which there is one.
    pub(super) fn fill_hypercall_page(&self, current: &Current, value: u64) -> Result<(), msr::Fault> {
        let address = MachAddr::new(value);
        if address.offset() != 0 {
            return Err(msr::Fault);
        }
        let page = self.mm.get_page(address.frame(), current.domain().id).ok_or(msr::Fault)?;
        let (page, debt) = page.typed::<Writable>().map_err(|_| msr::Fault)?;
        self.pager().pay(debt);
        crate::hypercall::write_hypercall_page(&self.platform, page.mfn());
        Ok(())
    }

    fn new_kernel_root(
        &self,
        current: &mut Current,
        owner: DomId,
        root: Mfn,
        budget: &mut Budget,
    ) -> Result<(), Stop> {
        self.finish_pending(&mut current.state.unfinished, budget)?;
        self.drop_ldt(current);
        let state = &mut current.state;
        let load = || self.load_guest_root(root);
        let left =
            self.pager().replace_root(&mut state.kernel_root, Some(root), owner, load, self, budget)?;
        if let Some(Unfinished(mfn)) = left {
            state.unfinished = Some(mfn);
        }
        Ok(())
    }

    /// A write of the guest's kernel to a page that it maps read-only: carried out if the page is one of its L1 tables and
    /// the instruction one of the stores that [`decode::store`] knows.
    fn page_table_store(&self, current: &mut Current, address: u64) -> Emulated {
        if self.code_segment(&current.state) != CodeSegment::Long {
            return Emulated::No;
        }
        let Some(root) = current.state.kernel_root else { return Emulated::No };
        let Some(pte) = self.guest_l1_entry(root, address) else { return Emulated::No };
        if !pte.is_present() || pte.is_writable() {
            return Emulated::No;
        }
        let owner = current.domain().id;
        let Some(table) = self.mm.get_page(pte.mfn(), owner) else { return Emulated::No };
        if self.mm.type_word(pte.mfn()).is_none_or(|w| w.kind() != mm::Kind::L1) {
            return Emulated::No;
        }
        let Some(insn) = self.fetch(current.state.regs.rip, decode::store) else { return Emulated::No };
        let base = self.segment_base(current, insn.op.mem.segment);
        let regs = &current.state.regs;
        let Some(access) = Access::new(regs, &insn, base) else { return Emulated::No };
        // The processor faulted at the first byte of an aligned access, or at the word that a bit offset leads to.
        if access.address != address {
            return Emulated::No;
        }
        let index = (address as usize & 0xfff) / 8;
        let Some(word) = self.platform.frame(pte.mfn()).get(index) else { return Emulated::No };
        let old = word.load(Ordering::Acquire);
        let outcome = if insn.op.op == StoreOp::Cmpxchg16b {
            let next = self.platform.frame(pte.mfn()).get(index + 1).map(|w| w.load(Ordering::Acquire));
            next.and_then(|next| compare_pair(regs, [old, next]))
        } else {
            access.compute(regs, &insn.op, old)
        };
        let Some(outcome) = outcome else { return Emulated::No };
        if let Some(new) = outcome.new {
            // Read-modify-write instructions must not lose what the processor or another vCPU writes in between: then the
            // guest executes it again.
            let how = match insn.op.op {
                StoreOp::Mov(_) if insn.op.width == Width::Qword => mm::Store::Plain,
                _ => mm::Store::IfEqual(Pte::from_bits(old)),
            };
            match self.pager().update_l1(&table, index, Pte::from_bits(new), how, owner, self) {
                Ok(()) => {}
                Err(NotUpdated::Differs(_) | NotUpdated::Stop(Stop::Preempted)) => return Emulated::Again,
                Err(NotUpdated::Stop(Stop::Failed(_))) => return Emulated::No,
            }
        }
        let regs = &mut current.state.regs;
        for (register, value) in outcome.registers.into_iter().flatten() {
            set_gpr(regs, register, value);
        }
        if let Some((bits, mask)) = outcome.flags {
            regs.rflags = regs.rflags & !mask | bits;
        }
        super::emulate::retire(regs, insn.len, 0)
    }
}

/// Where a store goes: a naturally aligned word of 1 to 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Access {
    address: u64,
    /// Which bit of the word a bit instruction means.
    bit: u32,
}

/// What a store does when the 8-byte word around it holds a known value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Outcome {
    /// The 8-byte word afterwards; `None` when it stays.
    new: Option<u64>,
    /// Registers that change, and to what as a whole.
    registers: [Option<(Gpr, u64)>; 2],
    /// Flags that change: their values and which.
    flags: Option<(u64, u64)>,
}

const CARRY: u64 = 1 << 0;
const PARITY: u64 = 1 << 2;
const ADJUST: u64 = 1 << 4;
const ZERO: u64 = 1 << 6;
const SIGN: u64 = 1 << 7;
const OVERFLOW: u64 = 1 << 11;

impl Access {
    /// `None` for an access that is not aligned to its size: it could touch two entries.
    fn new(regs: &GuestRegs, insn: &Insn<Store>, segment_base: u64) -> Option<Access> {
        let store = &insn.op;
        let size = match store.op {
            StoreOp::Cmpxchg16b => 16,
            _ => u64::from(store.width.bytes()),
        };
        let mut address = effective_address(regs, &store.mem, insn.len, segment_base);
        let bits = size as u32 * 8;
        let mut bit = 0;
        match store.op {
            // A bit number in a register reaches beyond the addressed word, in both directions; a constant does not.
            StoreOp::Bts(Source::Reg(r)) | StoreOp::Btr(Source::Reg(r)) => {
                let offset = match store.width {
                    Width::Qword => gpr(regs, r) as i64,
                    Width::Word => i64::from(gpr(regs, r) as i16),
                    _ => i64::from(gpr(regs, r) as i32),
                };
                let words = offset.div_euclid(i64::from(bits));
                address = address.wrapping_add((words as u64).wrapping_mul(size));
                bit = offset.rem_euclid(i64::from(bits)) as u32;
            }
            StoreOp::Bts(Source::Imm(i)) | StoreOp::Btr(Source::Imm(i)) => bit = i as u32 % bits,
            _ => {}
        }
        address.is_multiple_of(size).then_some(Access { address, bit })
    }

    /// `None` for [`StoreOp::Cmpxchg16b`], which [`compare_pair`] is for.
    fn compute(&self, regs: &GuestRegs, store: &Store, word: u64) -> Option<Outcome> {
        let mask = store.width.mask();
        let shift = (self.address as u32 & 7) * 8;
        let old = word.checked_shr(shift)? & mask;
        let part = if store.high { 8 } else { 0 };
        // A result of 4 bytes clears the rest of its register, a shorter one keeps it.
        let loaded = |r, value: u64, part: u32| match store.width {
            Width::Byte | Width::Word => Some((r, gpr(regs, r) & !(mask << part) | value << part)),
            Width::Dword | Width::Qword => Some((r, value)),
        };
        let value = |source| match source {
            Source::Reg(r) => gpr(regs, r) >> part & mask,
            Source::Imm(i) => i as i64 as u64 & mask,
        };
        let in_word = |new: u64| Some(word & !(mask << shift) | (new & mask) << shift);
        let logic = |new: u64| {
            let parity = if (new as u8).count_ones().is_multiple_of(2) { PARITY } else { 0 };
            let zero = if new == 0 { ZERO } else { 0 };
            let sign = if new & (mask ^ mask >> 1) != 0 { SIGN } else { 0 };
            let flags = Some((parity | zero | sign, CARRY | PARITY | ADJUST | ZERO | SIGN | OVERFLOW));
            Outcome { new: in_word(new), registers: [None; 2], flags }
        };
        let carry = |old: u64| Some((if old >> self.bit & 1 != 0 { CARRY } else { 0 }, CARRY));
        Some(match store.op {
            StoreOp::Mov(source) => Outcome { new: in_word(value(source)), ..Outcome::default() },
            StoreOp::Xchg(r) => {
                let registers = [loaded(r, old, part), None];
                Outcome { new: in_word(value(Source::Reg(r))), registers, flags: None }
            }
            StoreOp::Cmpxchg(r) => {
                let wanted = regs.rax & mask;
                let flags = compare_flags(wanted, old, store.width);
                if wanted == old {
                    Outcome { new: in_word(value(Source::Reg(r))), registers: [None; 2], flags }
                } else {
                    Outcome { new: None, registers: [loaded(Gpr::RAX, old, 0), None], flags }
                }
            }
            StoreOp::And(source) => logic(old & value(source)),
            StoreOp::Or(source) => logic(old | value(source)),
            StoreOp::Xor(source) => logic(old ^ value(source)),
            StoreOp::Bts(_) => {
                Outcome { new: in_word(old | 1 << self.bit), registers: [None; 2], flags: carry(old) }
            }
            StoreOp::Btr(_) => {
                Outcome { new: in_word(old & !(1 << self.bit)), registers: [None; 2], flags: carry(old) }
            }
            StoreOp::Xadd(r) => {
                let added = value(Source::Reg(r));
                let flags = sum_flags(old, added, store.width);
                let registers = [loaded(r, old, part), None];
                Outcome { new: in_word(old.wrapping_add(added)), registers, flags }
            }
            StoreOp::Cmpxchg8b => {
                let low = |value: u64| value & 0xffff_ffff;
                if old == low(regs.rax) | regs.rdx << 32 {
                    let new = Some(low(regs.rbx) | regs.rcx << 32);
                    Outcome { new, registers: [None; 2], flags: Some((ZERO, ZERO)) }
                } else {
                    let registers = [Some((Gpr::RAX, low(old))), Some((Gpr::RDX, old >> 32))];
                    Outcome { new: None, registers, flags: Some((0, ZERO)) }
                }
            }
            StoreOp::Cmpxchg16b => return None,
        })
    }
}

/// What CMPXCHG16B does on two entries: the comparison is carried out, a store of two entries at once is not (`None`), as on
/// Xen.
fn compare_pair(regs: &GuestRegs, words: [u64; 2]) -> Option<Outcome> {
    let [low, high] = words;
    let registers = [Some((Gpr::RAX, low)), Some((Gpr::RDX, high))];
    (words != [regs.rax, regs.rdx]).then_some(Outcome { new: None, registers, flags: Some((0, ZERO)) })
}

/// The flags of `left + right`.
fn sum_flags(left: u64, right: u64, width: Width) -> Option<(u64, u64)> {
    let mask = width.mask();
    let top = mask ^ mask >> 1;
    let sum = left.wrapping_add(right) & mask;
    let flag = |on: bool, bit: u64| if on { bit } else { 0 };
    let flags = flag(sum < left, CARRY)
        | flag((sum as u8).count_ones().is_multiple_of(2), PARITY)
        | flag((left ^ right ^ sum) & 0x10 != 0, ADJUST)
        | flag(sum == 0, ZERO)
        | flag(sum & top != 0, SIGN)
        | flag((left ^ sum) & (right ^ sum) & top != 0, OVERFLOW);
    Some((flags, CARRY | PARITY | ADJUST | ZERO | SIGN | OVERFLOW))
}

/// The flags of `left - right`.
fn compare_flags(left: u64, right: u64, width: Width) -> Option<(u64, u64)> {
    let mask = width.mask();
    let top = mask ^ mask >> 1;
    let difference = left.wrapping_sub(right) & mask;
    let flag = |on: bool, bit: u64| if on { bit } else { 0 };
    let flags = flag(left < right, CARRY)
        | flag((difference as u8).count_ones().is_multiple_of(2), PARITY)
        | flag((left ^ right ^ difference) & 0x10 != 0, ADJUST)
        | flag(difference == 0, ZERO)
        | flag(difference & top != 0, SIGN)
        | flag((left ^ right) & (left ^ difference) & top != 0, OVERFLOW);
    Some((flags, CARRY | PARITY | ADJUST | ZERO | SIGN | OVERFLOW))
}

fn effective_address(regs: &GuestRegs, mem: &Mem, len: u8, segment_base: u64) -> u64 {
    let base = match mem.base {
        Some(MemBase::Reg(r)) => gpr(regs, r),
        Some(MemBase::NextRip) => regs.rip.wrapping_add(u64::from(len)),
        None => 0,
    };
    let index = mem.index.map_or(0, |(r, scale)| gpr(regs, r) << scale);
    let mut sum = base.wrapping_add(index).wrapping_add(i64::from(mem.disp) as u64);
    if mem.address32 {
        sum &= 0xffff_ffff;
    }
    sum.wrapping_add(segment_base)
}
