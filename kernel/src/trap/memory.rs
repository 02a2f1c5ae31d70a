//! Faults and instructions that concern a guest's memory: page-table writes by the guest itself, its LDT, CR3.

use core::sync::atomic::Ordering;

use hypercall_abi::{DomId, MachAddr, Mfn};

use super::bounce::Flags;
use super::decode::{
    self, Advance, Alu, Bit, Gpr, Insn, Mem, MemBase, Shift, Source, Store, StoreOp, Unary, Width,
};
use super::deliver::{Exception, PF_USER, PF_WRITE};
use super::descriptor::CodeSegment;
use super::emulate::{Emulated, gpr, set_gpr};
use super::msr;
use crate::domain::{Current, Domain, GuestRegs};
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
        if current.state.kernel_mode
            && code & (PF_WRITE | PF_PRESENT | PF_FETCH) == PF_WRITE | PF_PRESENT
            && may_store_to_page_tables(current.domain())
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
        if insn.op.advance == (Advance::String { repeat: true })
            && remaining(&current.state.regs, &insn.op) == 0
        {
            // It stores nothing, so it was another one that faulted.
            return Emulated::Again;
        }
        let base = self.segment_base(current, insn.op.mem.segment);
        let Some(access) = Access::new(&current.state.regs, &insn, base) else { return Emulated::No };
        // The processor faulted at the first byte of an aligned access, or at the word that a bit offset leads to.
        if access.address != address {
            return Emulated::No;
        }
        let input = match self.memory_source(current, &insn) {
            Ok(input) => input,
            Err(fault) => return Emulated::Raise(fault),
        };
        let regs = &current.state.regs;
        let index = (address as usize & 0xfff) / 8;
        let Some(word) = self.platform.frame(pte.mfn()).get(index) else { return Emulated::No };
        let old = word.load(Ordering::Acquire);
        let outcome = if insn.op.op == StoreOp::Cmpxchg16b {
            let next = self.platform.frame(pte.mfn()).get(index + 1).map(|w| w.load(Ordering::Acquire));
            next.and_then(|next| compare_pair(regs, [old, next]))
        } else {
            access.compute(regs, &insn.op, old, input)
        };
        let Some(outcome) = outcome else { return Emulated::No };
        if let Some(new) = outcome.new {
            // Read-modify-write instructions must not lose what the processor or another vCPU writes in between: then the
            // guest executes it again.
            let how = match insn.op.op {
                StoreOp::Mov(_) | StoreOp::Movbe(_) if insn.op.width == Width::Qword => mm::Store::Plain,
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
            regs.rflags = regs.rflags & !mask | bits & mask;
        }
        // A string instruction that is not at its end stays where it is, with its next step before it.
        let len = if advance(regs, &insn.op) { 0 } else { insn.len };
        super::emulate::retire(regs, len, 0)
    }

    /// The value that a string instruction, a PUSH or a POP takes from memory; 0 for all others.
    fn memory_source(&self, current: &mut Current, insn: &Insn<Store>) -> Result<u64, Exception> {
        let StoreOp::Mov(Source::Mem(mem)) = insn.op.op else { return Ok(0) };
        let base = self.segment_base(current, mem.segment);
        let address = effective_address(&current.state.regs, &mem, insn.len, base);
        let mut value = [0; 8];
        let bytes = value.get_mut(..usize::from(insn.op.width.bytes())).unwrap_or_default();
        self.platform.copy_from_guest(bytes, address).map_err(|_| Exception::page_fault(address, false))?;
        Ok(u64::from_le_bytes(value))
    }
}

/// Whether a domain's kernel may write its L1 tables by plain stores: if it asked for that. Xen carries out the first domain's in
/// any case, since it looks at its faults for another reason too.
fn may_store_to_page_tables(domain: &Domain) -> bool {
    domain.vm_assist.load(Ordering::Relaxed) & ASSIST_WRITABLE_PAGE_TABLES != 0 || domain.is_hardware_domain()
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
/// What arithmetic sets.
const ARITHMETIC: u64 = CARRY | PARITY | ADJUST | ZERO | SIGN | OVERFLOW;
/// What shifts set: the adjust flag is undefined after them.
const SHIFTED: u64 = ARITHMETIC & !ADJUST;

impl Access {
    /// `None` for an access that is not aligned to its size: it could touch two entries.
    fn new(regs: &GuestRegs, insn: &Insn<Store>, segment_base: u64) -> Option<Access> {
        let store = &insn.op;
        let size = match store.op {
            StoreOp::Cmpxchg16b => 16,
            _ => u64::from(store.width.bytes()),
        };
        let mut moved = *regs;
        match store.advance {
            Advance::Push => moved.rsp = moved.rsp.wrapping_sub(size),
            Advance::Pop => moved.rsp = moved.rsp.wrapping_add(size),
            Advance::None | Advance::String { .. } => {}
        }
        let mut address = effective_address(&moved, &store.mem, insn.len, segment_base);
        let bits = size as u32 * 8;
        let mut bit = 0;
        match store.op {
            // A bit number in a register reaches beyond the addressed word, in both directions; a constant does not.
            StoreOp::Bit(_, Source::Reg(r)) => {
                let offset = match store.width {
                    Width::Qword => gpr(regs, r) as i64,
                    Width::Word => i64::from(gpr(regs, r) as i16),
                    _ => i64::from(gpr(regs, r) as i32),
                };
                let words = offset.div_euclid(i64::from(bits));
                address = address.wrapping_add((words as u64).wrapping_mul(size));
                bit = offset.rem_euclid(i64::from(bits)) as u32;
            }
            StoreOp::Bit(_, Source::Imm(i)) => bit = i as u32 % bits,
            _ => {}
        }
        address.is_multiple_of(size).then_some(Access { address, bit })
    }

    /// What the store does; `input` is what it read from other memory. `None` for [`StoreOp::Cmpxchg16b`], which
    /// [`compare_pair`] is for.
    fn compute(&self, regs: &GuestRegs, store: &Store, word: u64, input: u64) -> Option<Outcome> {
        let width = store.width;
        let mask = width.mask();
        let shift = (self.address as u32 & 7) * 8;
        let old = word.checked_shr(shift)? & mask;
        let part = if store.high { 8 } else { 0 };
        // A result of 4 bytes clears the rest of its register, a shorter one keeps it.
        let loaded = |r, value: u64, part: u32| match width {
            Width::Byte | Width::Word => Some((r, gpr(regs, r) & !(mask << part) | value << part)),
            Width::Dword | Width::Qword => Some((r, value)),
        };
        let register = |r| gpr(regs, r) >> part & mask;
        let value = |source| match source {
            Source::Reg(r) => register(r),
            Source::Imm(i) => i as i64 as u64 & mask,
            Source::Mem(_) => input & mask,
            Source::Flags => regs.rflags & !Flags::RF.bits() & mask,
        };
        let count = |source| match source {
            Source::Imm(i) => i as u32,
            _ => regs.rcx as u32,
        };
        let write = |new: u64| Outcome {
            new: Some(word & !(mask << shift) | (new & mask) << shift),
            ..Outcome::default()
        };
        let with_flags = |new, flags, which| Outcome { flags: Some((flags, which)), ..write(new) };
        Some(match store.op {
            StoreOp::Mov(source) => write(value(source)),
            StoreOp::Movbe(r) => write(register(r).swap_bytes() >> (64 - 8 * u32::from(width.bytes()))),
            StoreOp::Set(condition) => write(u64::from(holds(condition, regs.rflags))),
            StoreOp::Xchg(r) => Outcome { registers: [loaded(r, old, part), None], ..write(register(r)) },
            StoreOp::Cmpxchg(r) => {
                let wanted = regs.rax & mask;
                let (_, flags) = subtract(wanted, old, false, width);
                if wanted == old {
                    with_flags(register(r), flags, ARITHMETIC)
                } else {
                    let registers = [loaded(Gpr::RAX, old, 0), None];
                    Outcome { new: None, registers, flags: Some((flags, ARITHMETIC)) }
                }
            }
            StoreOp::Alu(alu, source) => {
                let right = value(source);
                let carry = regs.rflags & CARRY != 0;
                let logic = |new| (new, status(new, width));
                let (new, flags) = match alu {
                    Alu::Add => add(old, right, false, width),
                    Alu::Adc => add(old, right, carry, width),
                    Alu::Sub => subtract(old, right, false, width),
                    Alu::Sbb => subtract(old, right, carry, width),
                    Alu::Or => logic(old | right),
                    Alu::And => logic(old & right),
                    Alu::Xor => logic(old ^ right),
                };
                with_flags(new, flags, ARITHMETIC)
            }
            StoreOp::Unary(unary) => {
                let (new, flags) = match unary {
                    Unary::Inc => add(old, 1, false, width),
                    Unary::Dec => subtract(old, 1, false, width),
                    Unary::Neg => subtract(0, old, false, width),
                    Unary::Not => (!old, 0),
                };
                let which = match unary {
                    // These two leave the carry.
                    Unary::Inc | Unary::Dec => ARITHMETIC & !CARRY,
                    Unary::Neg => ARITHMETIC,
                    Unary::Not => 0,
                };
                with_flags(new, flags, which)
            }
            StoreOp::Bit(bit, _) => {
                let selected = 1u64.checked_shl(self.bit)?;
                let new = match bit {
                    Bit::Set => old | selected,
                    Bit::Reset => old & !selected,
                    Bit::Complement => old ^ selected,
                };
                with_flags(new, flag(old & selected != 0, CARRY), CARRY)
            }
            StoreOp::Shift(kind, source) => {
                let (new, flags, which) = shifted(kind, old, count(source), regs.rflags, width);
                with_flags(new, flags, which)
            }
            StoreOp::DoubleShift { left, from, count: source } => {
                let (new, flags, which) = double_shifted(left, old, register(from), count(source), width);
                with_flags(new, flags, which)
            }
            StoreOp::Xadd(r) => {
                let (new, flags) = add(old, register(r), false, width);
                let registers = [loaded(r, old, part), None];
                Outcome { registers, ..with_flags(new, flags, ARITHMETIC) }
            }
            StoreOp::Cmpxchg8b => {
                let low = |value: u64| value & 0xffff_ffff;
                if old == low(regs.rax) | regs.rdx << 32 {
                    with_flags(low(regs.rbx) | regs.rcx << 32, ZERO, ZERO)
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

/// How often a repeated string instruction has still to store.
fn remaining(regs: &GuestRegs, store: &Store) -> u64 {
    if store.mem.address32 { regs.rcx & 0xffff_ffff } else { regs.rcx }
}

/// Moves the registers that lead a store; whether the instruction has another step to do.
fn advance(regs: &mut GuestRegs, store: &Store) -> bool {
    let size = u64::from(store.width.bytes());
    match store.advance {
        Advance::None => false,
        Advance::Push => {
            regs.rsp = regs.rsp.wrapping_sub(size);
            false
        }
        Advance::Pop => {
            regs.rsp = regs.rsp.wrapping_add(size);
            false
        }
        Advance::String { repeat } => {
            let back = regs.rflags & Flags::DF.bits() != 0;
            let step = if back { size.wrapping_neg() } else { size };
            let cut = if store.mem.address32 { 0xffff_ffff } else { u64::MAX };
            regs.rdi = regs.rdi.wrapping_add(step) & cut;
            if matches!(store.op, StoreOp::Mov(Source::Mem(_))) {
                regs.rsi = regs.rsi.wrapping_add(step) & cut;
            }
            if !repeat {
                return false;
            }
            regs.rcx = regs.rcx.wrapping_sub(1) & cut;
            regs.rcx != 0
        }
    }
}

fn flag(on: bool, bit: u64) -> u64 {
    if on { bit } else { 0 }
}

/// The highest bit of this width.
fn top(width: Width) -> u64 {
    width.mask() ^ width.mask() >> 1
}

/// Whether a condition of Jcc and SETcc holds: pairs of conditions that differ in their lowest bit are opposites.
fn holds(condition: u8, flags: u64) -> bool {
    let on = |bit| flags & bit != 0;
    let less = on(SIGN) != on(OVERFLOW);
    let even = match condition >> 1 & 7 {
        0 => on(OVERFLOW),
        1 => on(CARRY),
        2 => on(ZERO),
        3 => on(CARRY) || on(ZERO),
        4 => on(SIGN),
        5 => on(PARITY),
        6 => less,
        _ => less || on(ZERO),
    };
    even != (condition & 1 != 0)
}

/// The flags that follow from a result alone.
fn status(result: u64, width: Width) -> u64 {
    flag((result as u8).count_ones().is_multiple_of(2), PARITY)
        | flag(result & width.mask() == 0, ZERO)
        | flag(result & top(width) != 0, SIGN)
}

/// `left + right + carry` and its flags.
fn add(left: u64, right: u64, carry: bool, width: Width) -> (u64, u64) {
    let full = u128::from(left) + u128::from(right) + u128::from(carry);
    let sum = full as u64 & width.mask();
    let flags = status(sum, width)
        | flag(full > u128::from(width.mask()), CARRY)
        | flag((left ^ right ^ sum) & 0x10 != 0, ADJUST)
        | flag((left ^ sum) & (right ^ sum) & top(width) != 0, OVERFLOW);
    (sum, flags)
}

/// `left - right - borrow` and its flags.
fn subtract(left: u64, right: u64, borrow: bool, width: Width) -> (u64, u64) {
    let difference = left.wrapping_sub(right).wrapping_sub(u64::from(borrow)) & width.mask();
    let flags = status(difference, width)
        | flag(u128::from(left) < u128::from(right) + u128::from(borrow), CARRY)
        | flag((left ^ right ^ difference) & 0x10 != 0, ADJUST)
        | flag((left ^ right) & (left ^ difference) & top(width) != 0, OVERFLOW);
    (difference, flags)
}

/// The part of a count that shifts heed.
fn steps(count: u32, width: Width) -> u32 {
    if width == Width::Qword { count & 63 } else { count & 31 }
}

/// A shift or rotation, bit by bit: the result, its flags, and which of them it sets. The overflow flag is defined for one step
/// only, and is that of the last one.
fn shifted(kind: Shift, mut value: u64, count: u32, flags: u64, width: Width) -> (u64, u64, u64) {
    let (mask, top) = (width.mask(), top(width));
    let (mut carry, mut overflow) = (flags & CARRY != 0, false);
    for _ in 0..steps(count, width) {
        let (high, low) = (value & top != 0, value & 1 != 0);
        let left = |fill: bool| value << 1 & mask | u64::from(fill);
        let right = |fill: bool| value >> 1 | flag(fill, top);
        let before = value;
        (value, carry) = match kind {
            Shift::Rol => (left(high), high),
            Shift::Rcl => (left(carry), high),
            Shift::Shl => (left(false), high),
            Shift::Ror => (right(low), low),
            Shift::Rcr => (right(carry), low),
            Shift::Shr => (right(false), low),
            Shift::Sar => (right(high), low),
        };
        overflow = match kind {
            Shift::Rol | Shift::Rcl | Shift::Shl => (value & top != 0) != carry,
            _ => (value ^ before) & top != 0,
        };
    }
    let which = match kind {
        _ if steps(count, width) == 0 => 0,
        Shift::Rol | Shift::Ror | Shift::Rcl | Shift::Rcr => CARRY | OVERFLOW,
        Shift::Shl | Shift::Shr | Shift::Sar => SHIFTED,
    };
    (value, status(value, width) | flag(carry, CARRY) | flag(overflow, OVERFLOW), which)
}

/// SHLD and SHRD, bit by bit, as [`shifted`].
fn double_shifted(left: bool, mut value: u64, mut from: u64, count: u32, width: Width) -> (u64, u64, u64) {
    let (mask, top, start) = (width.mask(), top(width), value);
    let mut carry = false;
    for _ in 0..steps(count, width) {
        if left {
            carry = value & top != 0;
            value = value << 1 & mask | u64::from(from & top != 0);
            from = from << 1 & mask;
        } else {
            carry = value & 1 != 0;
            value = value >> 1 | flag(from & 1 != 0, top);
            from >>= 1;
        }
    }
    let which = if steps(count, width) == 0 { 0 } else { SHIFTED };
    let overflow = (value ^ start) & top != 0;
    (value, status(value, width) | flag(carry, CARRY) | flag(overflow, OVERFLOW), which)
}

fn effective_address(regs: &GuestRegs, mem: &Mem, len: u8, segment_base: u64) -> u64 {
    let base = match mem.base {
        Some(MemBase::Reg(r)) => gpr(regs, r),
        Some(MemBase::NextRip) => regs.rip.wrapping_add(u64::from(len)),
        None => 0,
    };
    let index = mem.index.map_or(0, |(r, scale)| gpr(regs, r) << scale);
    let mut sum = base.wrapping_add(index).wrapping_add(mem.disp as u64);
    if mem.address32 {
        sum &= 0xffff_ffff;
    }
    sum.wrapping_add(segment_base)
}
