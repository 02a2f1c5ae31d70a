//! Instructions carried out for the guest, after the processor refused them.
//!
//! The bytes are read from guest memory, decoded by the whitelist in [`decode`](super::decode), checked against the mode
//! the guest is in, and carried out on its virtual state. Whatever is not in the whitelist is [`Emulated::No`], and the
//! fault is the guest's.

use core::sync::atomic::Ordering;

use hypercall_abi::Mfn;
use hypercall_abi::subops::SegmentBase;

use super::bounce::{Flags, KERNEL_CS, KERNEL_SS, USER_CS32};
use super::cpuid;
use super::debug::{Refused, SINGLE_STEP};
use super::decode::{self, ControlReg, Gpr, Insn, MAX_LENGTH, Mode, Op, Port, StringIo, Width};
use super::deliver::{Exception, vector};
use super::descriptor::{self, CodeSegment, Legacy};
use super::msr::{self, Msr};
use crate::domain::{Current, GuestRegs, VcpuState};
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;
use crate::x86::layout::is_canonical;

/// What came of an attempt to carry out an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Emulated {
    /// It is none of ours: the fault is the guest's.
    No,
    /// Carried out.
    Done,
    /// Not yet or only partly: the guest executes it again.
    Again,
    /// Carried out, and these bits of DR6 say that a breakpoint or single step follows.
    Trapped(u64),
    /// Instead of it, the guest gets an exception.
    Raise(Exception),
    /// The domain is past repair.
    Crash(&'static str),
}

/// Bits of CR0 that guests see, fixed but for TS: PE MP ET NE WP AM PG.
const CR0_FIXED: u64 = 0x8005_0033;
const CR0_TS: u64 = 1 << 3;
/// CR4: RDTSC faults outside the kernel.
const CR4_TSD: u64 = 1 << 2;
/// CR4: debugging extensions.
pub(crate) const CR4_DE: u64 = 1 << 3;
const CR4_FSGSBASE: u64 = 1 << 16;
const CR4_OSXSAVE: u64 = 1 << 18;
/// Bits of CR4 that guests see whatever they write: PAE MCE OSFXSR OSXMMEXCPT.
const CR4_FIXED: u64 = 1 << 5 | 1 << 6 | 1 << 9 | 1 << 10;

/// The prefix that asks for emulation of the instruction behind it: `ud2` and "xen".
const FORCED_PREFIX: [u8; 5] = [0x0f, 0x0b, b'x', b'e', b'n'];
const CPUID: [u8; 2] = [0x0f, 0xa2];

impl VcpuState {
    /// Whether CR4.DE is set: DR4 and DR5 do not exist then, and breakpoints on ports do.
    pub(crate) fn debug_extensions(&self) -> bool {
        self.cr4 & CR4_DE != 0
    }
}

impl<P: Platform> Hypervisor<P> {
    /// Carries out the privileged instruction at rip.
    pub(crate) fn emulate_privileged(&self, current: &mut Current) -> Emulated {
        let rip = current.state.regs.rip;
        let (mode, insn) = match self.code_segment(&current.state) {
            CodeSegment::None => return Emulated::No,
            CodeSegment::Long => {
                (Mode::Bits64, self.fetch(rip, |bytes| decode::privileged(bytes, Mode::Bits64)))
            }
            CodeSegment::Legacy(segment) => {
                let (mode, decode): (_, fn(&[u8]) -> _) = match segment.big {
                    true => (Mode::Bits32, |bytes| decode::privileged(bytes, Mode::Bits32)),
                    false => (Mode::Bits16, |bytes| decode::privileged(bytes, Mode::Bits16)),
                };
                let offset = rip as u32;
                let insn = self.fetch(u64::from(segment.base.wrapping_add(offset)), decode);
                // All of it is in the segment.
                let fits = |insn: &Insn<Op>| {
                    offset
                        .checked_add(u32::from(insn.len).saturating_sub(1))
                        .is_some_and(|last| last <= segment.limit)
                };
                (mode, insn.filter(fits))
            }
        };
        let Some(insn) = insn else { return Emulated::No };
        match self.execute(current, insn.op, mode) {
            Ok(hits) => {
                let done = retire(&mut current.state.regs, insn.len, hits);
                if mode != Mode::Bits64 {
                    current.state.regs.rip &= u64::from(u32::MAX);
                }
                done
            }
            Err(other) => other,
        }
    }

    /// An undefined instruction: CPUID behind the forced-emulation prefix is carried out.
    pub(crate) fn forced_emulation(&self, current: &mut Current) -> Emulated {
        let rip = current.state.regs.rip;
        let mut prefix = [0; FORCED_PREFIX.len()];
        if self.platform.copy_from_guest(&mut prefix, rip).is_err() {
            return Emulated::Raise(Exception::page_fault(rip, false));
        }
        if prefix != FORCED_PREFIX {
            return Emulated::No;
        }
        let at = rip.wrapping_add(prefix.len() as u64);
        let mut insn = [0; CPUID.len()];
        if self.platform.copy_from_guest(&mut insn, at).is_err() {
            return Emulated::Raise(Exception::page_fault(at, false));
        }
        if insn != CPUID {
            return Emulated::No;
        }
        let forced = current.state.kernel_mode;
        self.guest_cpuid(current, forced);
        retire(&mut current.state.regs, (prefix.len() + insn.len()) as u8, 0)
    }

    /// Reads and decodes the instruction at `rip`, which may end right before a page that is not there.
    pub(crate) fn fetch<T>(&self, rip: u64, decode: fn(&[u8]) -> Option<Insn<T>>) -> Option<Insn<T>> {
        let mut bytes = [0; MAX_LENGTH];
        let in_page = (0x1000 - (rip & 0xfff)).min(MAX_LENGTH as u64) as usize;
        let (first, rest) = bytes.split_at_mut_checked(in_page)?;
        self.platform.copy_from_guest(first, rip).ok()?;
        if let Some(insn) = decode(first) {
            return Some(insn);
        }
        if rest.is_empty() {
            return None;
        }
        self.platform.copy_from_guest(rest, rip.wrapping_add(in_page as u64)).ok()?;
        decode(&bytes)
    }

    /// What kind of code the guest's CS selects.
    pub(crate) fn code_segment(&self, state: &VcpuState) -> CodeSegment {
        let selector = state.regs.cs as u16 | 3;
        match selector {
            KERNEL_CS => return CodeSegment::Long,
            USER_CS32 => return CodeSegment::Legacy(Legacy::FLAT),
            _ => {}
        }
        self.descriptor(state, selector).map_or(CodeSegment::None, descriptor::code_segment)
    }

    /// The word of the guest's own tables that a selector names; of the LDT only pages that are in use.
    fn descriptor(&self, state: &VcpuState, selector: u16) -> Option<u64> {
        let index = usize::from(selector >> 3);
        let frames: &[Option<Mfn>] = if selector & 4 != 0 {
            if index >= state.ldt.entries as usize {
                return None;
            }
            &state.ldt.frames
        } else {
            &state.gdt.frames
        };
        let mfn = (*frames.get(index / descriptor::PER_FRAME as usize)?)?;
        let word = self.platform.frame(mfn).get(index % descriptor::PER_FRAME as usize)?;
        Some(word.load(Ordering::Relaxed))
    }

    /// What loading a data segment register of the guest gives: the selector, null if it cannot be loaded, and the base.
    pub(crate) fn data_segment(&self, current: &mut Current, selector: u16) -> (u16, u64) {
        const NULL: (u16, u64) = (0, 0);
        if selector < 4 {
            return NULL;
        }
        let selector = descriptor::guest_selector(selector);
        if matches!(selector, KERNEL_CS | KERNEL_SS | USER_CS32) {
            return (selector, 0);
        }
        if selector & 4 != 0 {
            self.bring_in_ldt_page(current, u64::from(selector & !7));
        }
        let base = self.descriptor(&current.state, selector).and_then(descriptor::data_segment);
        base.map_or(NULL, |base| (selector, base))
    }

    /// Carries out one decoded instruction. `Ok` says which breakpoints it hit.
    fn execute(&self, current: &mut Current, op: Op, mode: Mode) -> Result<u64, Emulated> {
        // Moves of control and debug registers are 4 bytes wide outside 64-bit code.
        let wide = if mode == Mode::Bits64 { u64::MAX } else { u64::from(u32::MAX) };
        // These are open to the guest's user mode, each by a rule of its own.
        match op {
            Op::In { port, width } => return self.port_in(current, port, width),
            Op::Out { port, width } => return self.port_out(current, port, width),
            Op::Ins(io) => return self.ins(current, io),
            Op::Outs(io) => return self.outs(current, io),
            Op::Cli | Op::Sti => {
                // Accepted without effect: a guest masks events in vcpu_info, and could restore flags by POPF, which
                // does not trap.
                return if self.iopl_allows(current) { Ok(0) } else { Err(Emulated::No) };
            }
            Op::Cpuid => {
                self.guest_cpuid(current, false);
                return Ok(0);
            }
            // It traps for the hypervisor's sake: the guest has not closed it to its user mode.
            Op::Rdtsc | Op::Rdtscp if self.platform.emulates_tsc() && current.state.cr4 & CR4_TSD == 0 => {
                self.read_tsc(&mut current.state, op);
                return Ok(0);
            }
            _ => {}
        }
        let state = &mut current.state;
        if !state.kernel_mode {
            return Err(Emulated::Raise(Exception::GP));
        }
        match op {
            Op::ReadCr { cr, to } => {
                let value = self.read_control(current, cr);
                set_gpr(&mut current.state.regs, to, value & wide);
            }
            Op::WriteCr { cr, from } => {
                let value = gpr(&state.regs, from) & wide;
                self.write_control(current, cr, value)?;
            }
            Op::ReadDr { dr, to } => {
                let value = state.debug.read(u64::from(dr), state.debug_extensions()).map_err(debug_fault)?;
                set_gpr(&mut state.regs, to, value & wide);
            }
            Op::WriteDr { dr, from } => {
                let value = gpr(&state.regs, from) & wide;
                self.write_debug(state, u64::from(dr), value).map_err(debug_fault)?;
            }
            Op::Clts => {
                state.task_switched = false;
                self.platform.set_task_switched(false);
            }
            Op::Rdmsr => {
                let number = state.regs.rcx as u32;
                let value = match self.read_msr(current, number) {
                    Ok(value) => value,
                    Err(_) if spared(&current.state, number) => 0,
                    Err(_) => return Err(Emulated::Raise(Exception::GP)),
                };
                set_pair(&mut current.state.regs, value);
            }
            Op::Wrmsr => {
                let number = state.regs.rcx as u32;
                let value = pair(&state.regs);
                if self.write_msr(current, number, value).is_err() && !spared(&current.state, number) {
                    return Err(Emulated::Raise(Exception::GP));
                }
            }
            Op::Rdtsc | Op::Rdtscp => self.read_tsc(state, op),
            Op::Xsetbv => self.xsetbv(state)?,
            // Guests have cached memory only, and a cache emptied by one would cost all.
            Op::Wbinvd => {}
            Op::In { .. } | Op::Out { .. } | Op::Ins(_) | Op::Outs(_) | Op::Cli | Op::Sti | Op::Cpuid => {}
        }
        Ok(0)
    }

    fn read_tsc(&self, state: &mut VcpuState, op: Op) {
        set_pair(&mut state.regs, self.platform.guest_tsc());
        if matches!(op, Op::Rdtscp) {
            state.regs.rcx = u64::from(state.tsc_aux);
        }
    }

    /// Writes a debug register of the running vCPU, in its state and in the processor.
    pub(crate) fn write_debug(&self, state: &mut VcpuState, number: u64, value: u64) -> Result<(), Refused> {
        let extensions = state.debug_extensions();
        state.debug.write(number, value, extensions)?;
        self.platform.load_debug_registers(state);
        Ok(())
    }

    fn guest_cpuid(&self, current: &mut Current, forced: bool) {
        let host = |leaf, subleaf| self.platform.cpuid(leaf, subleaf);
        let hardware = current.domain().is_hardware_domain();
        let state = &mut current.state;
        let context = cpuid::Context {
            offer: cpuid::Offer::from_host(host),
            osxsave: state.cr4 & CR4_OSXSAVE != 0,
            forced,
            hardware_kernel: hardware && state.kernel_mode,
            hardware,
            tsc_khz: tsc_khz(self.platform.time_scale()),
            tsc_scale: self.platform.time_scale(),
            tsc_emulated: self.platform.emulates_tsc(),
            machine_address_bits: u64::BITS - self.mm.max_frame().saturating_sub(1).leading_zeros() + 12,
        };
        let [a, b, c, d] =
            cpuid::guest(state.regs.rax as u32, state.regs.rcx as u32, context, host).map(u64::from);
        let regs = &mut state.regs;
        (regs.rax, regs.rbx, regs.rcx, regs.rdx) = (a, b, c, d);
    }

    fn read_control(&self, current: &Current, cr: ControlReg) -> u64 {
        let state = &current.state;
        match cr {
            ControlReg::Cr0 => CR0_FIXED | if state.task_switched { CR0_TS } else { 0 },
            ControlReg::Cr2 => self.guest_cr2(current),
            ControlReg::Cr3 => state.kernel_root.map_or(0, |root| root.address().get()),
            ControlReg::Cr4 => state.cr4 | CR4_FIXED,
        }
    }

    fn write_control(&self, current: &mut Current, cr: ControlReg, value: u64) -> Result<(), Emulated> {
        match cr {
            ControlReg::Cr0 => {
                if (value ^ CR0_FIXED) & !CR0_TS != 0 {
                    return Err(Emulated::Raise(Exception::GP));
                }
                current.state.task_switched = value & CR0_TS != 0;
                self.platform.set_task_switched(current.state.task_switched);
            }
            ControlReg::Cr2 => self.set_guest_cr2(current, value),
            ControlReg::Cr3 => return self.write_cr3(current, value),
            ControlReg::Cr4 => {
                // TSD and DE take effect as the guest resumes.
                current.state.cr4 = self.guest_cr4(value);
            }
        }
        Ok(())
    }

    /// What becomes of a value that a guest gives CR4: the bits that are its own.
    pub(crate) fn guest_cr4(&self, value: u64) -> u64 {
        let offer = cpuid::Offer::from_host(|leaf, subleaf| self.platform.cpuid(leaf, subleaf));
        let mut own = CR4_TSD | CR4_DE;
        if offer.fsgsbase {
            own |= CR4_FSGSBASE;
        }
        if offer.xsave {
            own |= CR4_OSXSAVE;
        }
        value & own
    }

    fn msr_context(&self, current: &Current) -> msr::Context {
        let host = |leaf, subleaf| self.platform.cpuid(leaf, subleaf);
        msr::Context {
            vendor: cpuid::Vendor::from_leaf0(host(0, 0)),
            boot_vcpu: current.vcpu.id.get() == 0,
            nx: host(0x8000_0001, 0)[3] & 1 << 20 != 0,
            tsc_aux: cpuid::has_tsc_aux(host),
            hardware: current.domain().is_hardware_domain(),
        }
    }

    fn read_msr(&self, current: &mut Current, number: u32) -> Result<u64, msr::Fault> {
        let msr = msr::lookup(number, self.msr_context(current));
        if matches!(msr, Msr::FsBase | Msr::GsBase | Msr::UserGsBase) {
            self.platform.read_live_segments(&mut current.state);
        }
        let state = &current.state;
        match msr {
            Msr::FsBase => Ok(state.fs_base),
            Msr::GsBase => Ok(state.gs_base_kernel),
            Msr::UserGsBase => Ok(state.gs_base_user),
            Msr::Tsc => Ok(self.platform.guest_tsc()),
            Msr::TscAux => Ok(u64::from(state.tsc_aux)),
            Msr::McgStatus => Ok(state.mcg_status),
            Msr::Machine(machine) => {
                self.platform.read_msr(number).map(|v| machine.shown(v)).ok_or(msr::Fault)
            }
            other => msr::read_fixed(other),
        }
    }

    fn write_msr(&self, current: &mut Current, number: u32, value: u64) -> Result<(), msr::Fault> {
        match msr::lookup(number, self.msr_context(current)) {
            base @ (Msr::FsBase | Msr::GsBase | Msr::UserGsBase) => {
                if !is_canonical(value) {
                    return Err(msr::Fault);
                }
                let state = &mut current.state;
                let which = match base {
                    Msr::FsBase => SegmentBase::Fs,
                    Msr::GsBase => SegmentBase::GsKernel,
                    _ => SegmentBase::GsUser,
                };
                match base {
                    Msr::FsBase => state.fs_base = value,
                    Msr::GsBase => state.gs_base_kernel = value,
                    _ => state.gs_base_user = value,
                }
                self.platform.load_segment(state, which);
                Ok(())
            }
            Msr::TscAux => {
                current.state.tsc_aux = u32::try_from(value).map_err(|_| msr::Fault)?;
                self.platform.load_readable(&current.state);
                Ok(())
            }
            Msr::McgStatus => {
                current.state.mcg_status = value;
                Ok(())
            }
            Msr::Machine(machine) => match machine.writes {
                msr::Writes::Dropped if self.platform.read_msr(number).is_some() => Ok(()),
                msr::Writes::Zero if value == 0 => Ok(()),
                _ => Err(msr::Fault),
            },
            Msr::HypercallPage => self.fill_hypercall_page(current, value),
            other => msr::write_fixed(other, value),
        }
    }

    /// XSETBV: the guest chooses among the components that it is offered.
    fn xsetbv(&self, state: &mut VcpuState) -> Result<(), Emulated> {
        if state.cr4 & CR4_OSXSAVE == 0 {
            return Err(Emulated::Raise(Exception::UD));
        }
        let offered = cpuid::XCR0_OFFERED & u64::from(self.platform.cpuid(0xd, 0)[0]);
        let chosen = pair(&state.regs);
        if state.regs.rcx as u32 != 0 || !cpuid::is_xcr0(chosen, offered) {
            return Err(Emulated::Raise(Exception::GP));
        }
        state.xcr0 = chosen;
        self.platform.load_readable(state);
        Ok(())
    }

    /// Whether the I/O privilege level that the guest gave itself covers the mode it is in.
    fn iopl_allows(&self, current: &Current) -> bool {
        let ring = match (current.state.kernel_mode, self.architectural_iopl(current)) {
            (false, _) => 3,
            (true, true) => 0,
            (true, false) => 1,
        };
        ring <= current.state.iopl
    }

    /// Whether the guest lets its present mode use these ports: by I/O privilege, or by the bitmap that its kernel
    /// registered.
    fn guest_allows_ports(&self, current: &Current, port: u16, bytes: u8) -> bool {
        if self.iopl_allows(current) {
            return true;
        }
        let (bitmap, limit) = current.state.io_bitmap;
        if u32::from(port) + u32::from(bytes) > limit {
            return false;
        }
        // The bitmap is in the kernel's address space. What cannot be read allows nothing.
        let state = &current.state;
        if !state.kernel_mode
            && let Some(root) = state.kernel_root
        {
            self.load_guest_root(root);
        }
        let mut mask = [0xff; 2];
        for (i, byte) in mask.iter_mut().enumerate() {
            let at = bitmap.wrapping_add(u64::from(port / 8) + i as u64);
            if self.platform.copy_from_guest(core::slice::from_mut(byte), at).is_err() {
                *byte = 0xff;
            }
        }
        if !state.kernel_mode
            && let Some(root) = state.user_root
        {
            self.load_guest_root(root);
        }
        u16::from_le_bytes(mask) >> (port % 8) & ((1 << bytes) - 1) == 0
    }

    fn port_hits(&self, state: &VcpuState, port: u16, width: Width) -> u64 {
        state.debug.port_hits(port, width.bytes(), state.debug_extensions())
    }

    fn port_in(&self, current: &mut Current, port: Port, width: Width) -> Result<u64, Emulated> {
        let port = port_number(&current.state.regs, port);
        if !self.guest_allows_ports(current, port, width.bytes()) {
            return Err(Emulated::No);
        }
        let value = u64::from(self.read_ports(current, port, width)) & width.mask();
        let rax = current.state.regs.rax;
        // A 32-bit result clears the upper half, smaller ones leave the rest.
        current.state.regs.rax = if width == Width::Dword { value } else { rax & !width.mask() | value };
        Ok(self.port_hits(&current.state, port, width))
    }

    fn port_out(&self, current: &mut Current, port: Port, width: Width) -> Result<u64, Emulated> {
        let port = port_number(&current.state.regs, port);
        if !self.guest_allows_ports(current, port, width.bytes()) {
            return Err(Emulated::No);
        }
        self.write_ports(current, port, width, (current.state.regs.rax & width.mask()) as u32);
        Ok(self.port_hits(&current.state, port, width))
    }

    fn ins(&self, current: &mut Current, io: StringIo) -> Result<u64, Emulated> {
        self.string_io(current, io, Gpr::RDI, |hv, current, port, at| {
            let value = hv.read_ports(current, port, io.width).to_le_bytes();
            let value = value.get(..usize::from(io.width.bytes())).unwrap_or(&value);
            hv.platform.copy_to_guest(at, value).map_err(|_| Emulated::Raise(Exception::page_fault(at, true)))
        })
    }

    fn outs(&self, current: &mut Current, io: StringIo) -> Result<u64, Emulated> {
        self.string_io(current, io, Gpr::RSI, |hv, current, port, at| {
            let mut value = [0; 4];
            let bytes = value.get_mut(..usize::from(io.width.bytes())).unwrap_or_default();
            let fault = |_| Emulated::Raise(Exception::page_fault(at, false));
            hv.platform.copy_from_guest(bytes, at).map_err(fault)?;
            hv.write_ports(current, port, io.width, u32::from_le_bytes(value));
            Ok(())
        })
    }

    /// INS and OUTS, step by step: the registers say after each how far it is, so that a fault or a spent budget leaves
    /// the guest to execute the rest.
    fn string_io(
        &self,
        current: &mut Current,
        io: StringIo,
        index: Gpr,
        mut step: impl FnMut(&Self, &mut Current, u16, u64) -> Result<(), Emulated>,
    ) -> Result<u64, Emulated> {
        let port = port_number(&current.state.regs, Port::Dx);
        if !self.guest_allows_ports(current, port, io.width.bytes()) {
            return Err(Emulated::No);
        }
        let address_mask = if io.address32 { 0xffff_ffff } else { u64::MAX };
        let base = self.segment_base(current, io.base);
        let hits = self.port_hits(&current.state, port, io.width);
        let mut budget = self.entry_budget();
        loop {
            let regs = &current.state.regs;
            if io.repeat && regs.rcx & address_mask == 0 {
                return Ok(0);
            }
            let offset = gpr(regs, index) & address_mask;
            let back = regs.rflags & Flags::DF.bits() != 0;
            step(self, current, port, base.wrapping_add(offset))?;
            let size = u64::from(io.width.bytes());
            let next = if back { offset.wrapping_sub(size) } else { offset.wrapping_add(size) };
            let regs = &mut current.state.regs;
            set_gpr(regs, index, next & address_mask);
            if !io.repeat {
                return Ok(hits);
            }
            regs.rcx = regs.rcx.wrapping_sub(1) & address_mask;
            if regs.rcx == 0 {
                return Ok(hits);
            }
            if hits != 0 {
                return Err(Emulated::Trapped(hits));
            }
            if budget.step().is_err() {
                return Err(Emulated::Again);
            }
        }
    }

    /// The base of a segment as the processor holds it now.
    pub(crate) fn segment_base(&self, current: &mut Current, base: decode::Base) -> u64 {
        if base == decode::Base::Flat {
            return 0;
        }
        self.platform.read_live_segments(&mut current.state);
        let state = &current.state;
        match (base, state.kernel_mode) {
            (decode::Base::Fs, _) => state.fs_base,
            (_, true) => state.gs_base_kernel,
            (_, false) => state.gs_base_user,
        }
    }
}

/// Ends a carried-out instruction as the processor would: the next one, no resume flag, and a debug exception if it was
/// single-stepped or hit a breakpoint.
pub(crate) fn retire(regs: &mut GuestRegs, len: u8, hits: u64) -> Emulated {
    regs.rip = regs.rip.wrapping_add(u64::from(len));
    regs.rflags &= !Flags::RF.bits();
    let step = if regs.rflags & Flags::TF.bits() != 0 { SINGLE_STEP } else { 0 };
    match hits | step {
        0 => Emulated::Done,
        hits => Emulated::Trapped(hits),
    }
}

/// Early boot code of guests touches registers that may be missing before it can handle the fault.
fn spared(state: &VcpuState, number: u32) -> bool {
    let unprepared = state.traps.get(usize::from(vector::GENERAL_PROTECTION)).is_some_and(|t| t.address == 0);
    unprepared && number >> 16 != msr::HYPERCALL_PAGE >> 16
}

fn debug_fault(refused: Refused) -> Emulated {
    Emulated::Raise(match refused {
        Refused::NoRegister => Exception::UD,
        Refused::Reserved | Refused::Denied => Exception::GP,
    })
}

fn port_number(regs: &GuestRegs, port: Port) -> u16 {
    match port {
        Port::Immediate(number) => u16::from(number),
        Port::Dx => regs.rdx as u16,
    }
}

/// edx:eax.
fn pair(regs: &GuestRegs) -> u64 {
    regs.rax & 0xffff_ffff | regs.rdx << 32
}

fn set_pair(regs: &mut GuestRegs, value: u64) {
    regs.rax = value & 0xffff_ffff;
    regs.rdx = value >> 32;
}

/// Frequency that a time scale stands for, in kHz.
fn tsc_khz(scale: crate::platform::TimeScale) -> u32 {
    if scale.mul == 0 {
        return 0;
    }
    // One tick is mul * 2^(shift - 32) ns.
    let per_ms = u128::from(1_000_000u32) << 32;
    let ticks = per_ms / u128::from(scale.mul);
    let ticks = if scale.shift < 0 {
        ticks.checked_shl(u32::from(scale.shift.unsigned_abs())).unwrap_or(0)
    } else {
        ticks >> scale.shift
    };
    u32::try_from(ticks).unwrap_or(u32::MAX)
}

/// The value of a register.
pub(crate) fn gpr(regs: &GuestRegs, number: Gpr) -> u64 {
    match number.number() {
        0 => regs.rax,
        1 => regs.rcx,
        2 => regs.rdx,
        3 => regs.rbx,
        4 => regs.rsp,
        5 => regs.rbp,
        6 => regs.rsi,
        7 => regs.rdi,
        8 => regs.r8,
        9 => regs.r9,
        10 => regs.r10,
        11 => regs.r11,
        12 => regs.r12,
        13 => regs.r13,
        14 => regs.r14,
        _ => regs.r15,
    }
}

/// Sets a whole register.
pub(crate) fn set_gpr(regs: &mut GuestRegs, number: Gpr, value: u64) {
    *match number.number() {
        0 => &mut regs.rax,
        1 => &mut regs.rcx,
        2 => &mut regs.rdx,
        3 => &mut regs.rbx,
        4 => &mut regs.rsp,
        5 => &mut regs.rbp,
        6 => &mut regs.rsi,
        7 => &mut regs.rdi,
        8 => &mut regs.r8,
        9 => &mut regs.r9,
        10 => &mut regs.r10,
        11 => &mut regs.r11,
        12 => &mut regs.r12,
        13 => &mut regs.r13,
        14 => &mut regs.r14,
        _ => &mut regs.r15,
    } = value;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::TimeScale;

    #[test]
    fn the_frequency_follows_from_the_time_scale() {
        assert_eq!(tsc_khz(TimeScale { mul: 1 << 31, shift: 1 }), 1_000_000);
        // 2.5 GHz: 0.4 ns a tick.
        assert_eq!(tsc_khz(TimeScale { mul: 0x6666_6666, shift: 0 }), 2_500_000);
        assert_eq!(tsc_khz(TimeScale { mul: 0xcccc_cccc, shift: -1 }), 2_500_000);
        assert_eq!(tsc_khz(TimeScale { mul: 0, shift: 0 }), 0);
    }

    #[test]
    fn registers_are_found_by_their_hardware_numbers() {
        let mut regs = GuestRegs::default();
        for number in 0..16 {
            set_gpr(&mut regs, Gpr::new_truncated(number), u64::from(number) + 100);
        }
        assert_eq!((regs.rax, regs.rcx, regs.rdx, regs.rbx), (100, 101, 102, 103));
        assert_eq!((regs.rsp, regs.rbp, regs.rsi, regs.rdi), (104, 105, 106, 107));
        assert_eq!((regs.r8, regs.r12, regs.r15), (108, 112, 115));
        for number in 0..16 {
            assert_eq!(gpr(&regs, Gpr::new_truncated(number)), u64::from(number) + 100);
        }
    }

    #[test]
    fn an_instruction_ends_with_a_debug_exception_when_stepped() {
        let mut regs = GuestRegs { rip: u64::MAX, rflags: Flags::RF.bits(), ..Default::default() };
        assert_eq!(retire(&mut regs, 2, 0), Emulated::Done);
        assert_eq!((regs.rip, regs.rflags), (1, 0));
        regs.rflags = Flags::TF.bits();
        assert_eq!(retire(&mut regs, 2, 1), Emulated::Trapped(SINGLE_STEP | 1));
    }
}
