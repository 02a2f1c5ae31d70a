//! The whole context of a vCPU: set by the builder or by a sibling, read by the toolstack.

use super::DomainError;
use alloc::boxed::Box;
use core::ops::Range;
use core::sync::atomic::Ordering;

use arrayvec::ArrayVec;
use hypercall_abi::vcpu::{VcpuContextFlags, VcpuGuestContext};
use hypercall_abi::{DomId, Mfn, VirtAddr};

use super::{Callback, GDT_FRAMES, GuestGdt, GuestRegs, TrapEntry, Vcpu, VcpuRef, VcpuState, block};
use crate::hypercall::{Args, Budget, Exit};
use crate::hypervisor::Hypervisor;
use crate::mm::{Failure, Stop, Unfinished};
use crate::page_ref::{L4, SegDesc, TypedRef};
use crate::platform::Platform;
use crate::trap::debug::DebugRegs;

/// Flags of rflags that a guest may have: CF PF AF ZF SF TF DF OF NT RF AC ID, and IF which is always on.
const FLAGS_ALLOWED: u64 = 0x0025_4fd5;
/// IF and the bit that is always one.
const FLAGS_FORCED: u64 = 0x202;
/// Descriptors in a frame.
const DESCRIPTORS_PER_FRAME: u64 = 512;
/// Most entries of an LDT.
const LDT_ENTRIES_MAX: u64 = 8192;

impl<P: Platform> Hypervisor<P> {
    /// Gives a vCPU that is off a whole new context. The context says whether it is up then, or down.
    ///
    /// `EINVAL` for an address that is not canonical, tables out of range or frames that are not the domain's; `EBUSY` while it
    /// runs. `args` are what a preempted call is repeated with.
    pub fn set_vcpu_context(
        &self,
        vcpu: &VcpuRef,
        context: &VcpuGuestContext,
        args: Args,
        budget: &mut Budget,
    ) -> Result<(), Exit> {
        check(context)?;
        let mut parked = vcpu.parked.lock().take().ok_or(DomainError::Busy)?;
        let result = self.replace_context(vcpu, &mut parked, context, budget);
        *vcpu.parked.lock() = Some(parked);
        match result {
            Ok(()) => {
                vcpu.initialised.store(true, Ordering::Release);
                if context.flags & VcpuContextFlags::ONLINE.bits() != 0 {
                    vcpu.blocked.fetch_and(!block::DOWN, Ordering::AcqRel);
                    self.wake(vcpu);
                } else {
                    vcpu.blocked.fetch_or(block::DOWN, Ordering::AcqRel);
                }
                Ok(())
            }
            Err(Stop::Preempted) => Err(Exit::Preempted(args)),
            Err(Stop::Failed(_)) => Err(DomainError::Invalid.into()),
        }
    }

    fn replace_context(
        &self,
        vcpu: &VcpuRef,
        state: &mut Box<VcpuState>,
        context: &VcpuGuestContext,
        budget: &mut Budget,
    ) -> Result<(), Stop> {
        // What an earlier context holds goes first; a restart finds it gone and goes on.
        self.release_vcpu_memory(state, budget)?;
        let pager = self.pager();
        let owner = vcpu.domain().id;
        // The tables in force come first: they are what takes long, and a restart finds them validated.
        let kernel: TypedRef<'_, L4> =
            pager.get_typed(root_frame(context.ctrlreg[3]), owner, self, budget)?;
        let user = match context.ctrlreg[1] {
            0 => None,
            cr3 => match pager.get_typed::<L4>(root_frame(cr3), owner, self, budget) {
                Ok(user) => Some(user),
                Err(stop) => {
                    note(state, pager.release(kernel, budget));
                    return Err(stop);
                }
            },
        };
        let gdt = match self.take_gdt(owner, &context.gdt_frames, context.gdt_ents) {
            Ok(gdt) => gdt,
            Err(failure) => {
                note(state, pager.release(kernel, budget));
                if let Some(user) = user {
                    note(state, pager.release(user, budget));
                }
                return Err(failure.into());
            }
        };
        load(state, context);
        state.cr4 = self.guest_cr4(context.ctrlreg[4]);
        state.kernel_root = Some(kernel.into_pte());
        state.user_root = user.map(TypedRef::into_pte);
        state.gdt = gdt;
        self.platform.init_vector_state(state.vectors.bytes_mut());
        if context.flags & VcpuContextFlags::I387_VALID.bits() != 0 {
            state.vectors.load_legacy(&context.fpu_ctxt);
        }
        Ok(())
    }

    /// Takes references to the frames of a GDT, each checked to hold only descriptors that a guest may have.
    ///
    /// Fails for more entries than fit 14 frames, and for frames that are not the domain's or hold a forbidden descriptor.
    pub fn take_gdt(&self, domain: DomId, frames: &[Mfn], entries: u64) -> Result<GuestGdt, Failure> {
        let count = entries.div_ceil(DESCRIPTORS_PER_FRAME) as usize;
        let mut taken: ArrayVec<TypedRef<'_, SegDesc>, GDT_FRAMES> = ArrayVec::new();
        for &mfn in frames.get(..count).ok_or(Failure::Invalid)? {
            let frame = match self.pager().get_typed(mfn, domain, self, &mut Budget::unlimited()) {
                Ok(frame) => frame,
                Err(Stop::Failed(failure)) => return Err(failure),
                Err(Stop::Preempted) => return Err(Failure::Invalid),
            };
            taken.try_push(frame).map_err(|_| Failure::Invalid)?;
        }
        let mut gdt = GuestGdt { entries: entries as u32, ..GuestGdt::default() };
        for (slot, frame) in gdt.frames.iter_mut().zip(taken) {
            *slot = Some(frame.into_pte());
        }
        Ok(gdt)
    }

    /// The context of a vCPU that is off, as [`Hypervisor::set_vcpu_context`] would take it. `EBUSY` while it runs.
    pub fn vcpu_context(&self, vcpu: &Vcpu) -> Result<Box<VcpuGuestContext>, DomainError> {
        let mut parked = vcpu.parked.lock();
        let state = parked.as_mut().ok_or(DomainError::Busy)?;
        let mut context = Box::new(VcpuGuestContext::default());
        store(state, &mut context);
        if vcpu.blocked.load(Ordering::Acquire) & block::DOWN == 0 {
            context.flags |= VcpuContextFlags::ONLINE.bits();
        }
        Ok(context)
    }
}

/// Remembers a table whose teardown is not finished, for the next operation on page tables to help with.
fn note(state: &mut VcpuState, done: Result<(), Unfinished>) {
    if let Err(Unfinished(mfn)) = done {
        state.unfinished = Some(mfn);
    }
}

/// The frame in a control register: machine address of the root, in the 64-bit form.
fn root_frame(cr3: u64) -> Mfn {
    Mfn::new(cr3 >> 12)
}

/// Everything that can be refused without looking at memory.
fn check(context: &VcpuGuestContext) -> Result<(), DomainError> {
    let regs = &context.user_regs;
    let addresses = [
        regs.rip,
        regs.rsp,
        context.kernel_sp,
        context.event_callback_eip,
        context.failsafe_callback_eip,
        context.syscall_callback_eip,
        context.fs_base,
        context.gs_base_kernel,
        context.gs_base_user,
    ];
    let canonical = addresses.into_iter().all(|a| VirtAddr::new(a).is_canonical());
    let traps = context.trap_ctxt.iter().all(|t| VirtAddr::new(t.address).is_canonical());
    let ldt_base = VirtAddr::new(context.ldt_base);
    let ldt = context.ldt_ents <= LDT_ENTRIES_MAX
        && context.ldt_base & 0xfff == 0
        && ldt_base.is_canonical()
        && !ldt_base.is_hypervisor();
    // A vCPU that begins in its user mode needs page tables for it.
    let mode = context.flags & VcpuContextFlags::IN_KERNEL.bits() != 0 || context.ctrlreg[1] != 0;
    if canonical && traps && ldt && mode { Ok(()) } else { Err(DomainError::Invalid) }
}

/// Data selectors of guests are always of ring 3; the null selector stays.
fn ring3(selector: u16) -> u16 {
    if selector & !3 == 0 { selector } else { selector | 3 }
}

fn load(state: &mut VcpuState, context: &VcpuGuestContext) {
    let r = &context.user_regs;
    state.regs = GuestRegs {
        r15: r.r15,
        r14: r.r14,
        r13: r.r13,
        r12: r.r12,
        rbp: r.rbp,
        rbx: r.rbx,
        r11: r.r11,
        r10: r.r10,
        r9: r.r9,
        r8: r.r8,
        rax: r.rax,
        rcx: r.rcx,
        rdx: r.rdx,
        rsi: r.rsi,
        rdi: r.rdi,
        vector: 0,
        error_code: 0,
        rip: r.rip,
        cs: u64::from(r.cs | 3),
        rflags: r.rflags & FLAGS_ALLOWED | FLAGS_FORCED,
        rsp: r.rsp,
        ss: u64::from(r.ss | 3),
    };
    state.iopl = (r.rflags >> 12 & 3) as u8;
    state.kernel_mode = context.flags & VcpuContextFlags::IN_KERNEL.bits() != 0;
    state.sysret_ok = false;
    state.selectors.es = ring3(r.es);
    state.selectors.ds = ring3(r.ds);
    state.selectors.fs = ring3(r.fs);
    state.selectors.gs = ring3(r.gs);
    state.fs_base = context.fs_base;
    state.gs_base_kernel = context.gs_base_kernel;
    state.gs_base_user = context.gs_base_user;
    state.kernel_ss = context.kernel_ss as u16 | 3;
    state.kernel_sp = context.kernel_sp;
    for (entry, given) in state.traps.iter_mut().zip(&context.trap_ctxt) {
        *entry = if given.address == 0 {
            TrapEntry::default()
        } else {
            TrapEntry { address: given.address, cs: given.cs | 3, flags: given.flags }
        };
    }
    let masks = |bit: VcpuContextFlags| context.flags & bit.bits() != 0;
    state.callbacks.event = Callback { address: context.event_callback_eip, mask_events: true };
    state.callbacks.failsafe = Callback {
        address: context.failsafe_callback_eip,
        mask_events: masks(VcpuContextFlags::FAILSAFE_DISABLES_EVENTS),
    };
    state.callbacks.syscall = Callback {
        address: context.syscall_callback_eip,
        mask_events: masks(VcpuContextFlags::SYSCALL_DISABLES_EVENTS),
    };
    state.task_switched = context.ctrlreg[0] & 8 != 0;
    state.debug = DebugRegs::default();
    for (number, value) in context.debugreg.iter().enumerate().filter(|(n, _)| !matches!(n, 4 | 5)) {
        // What a guest may not have stays at its reset value.
        let _ = state.debug.write(number as u64, *value, true);
    }
    state.ldt.base = context.ldt_base;
    state.ldt.entries = context.ldt_ents as u32;
}

fn store(state: &mut VcpuState, context: &mut VcpuGuestContext) {
    let r = &state.regs;
    let out = &mut context.user_regs;
    (out.r15, out.r14, out.r13, out.r12) = (r.r15, r.r14, r.r13, r.r12);
    (out.rbp, out.rbx, out.r11, out.r10) = (r.rbp, r.rbx, r.r11, r.r10);
    (out.r9, out.r8, out.rax, out.rcx) = (r.r9, r.r8, r.rax, r.rcx);
    (out.rdx, out.rsi, out.rdi) = (r.rdx, r.rsi, r.rdi);
    (out.rip, out.rsp) = (r.rip, r.rsp);
    out.rflags = r.rflags & !(3 << 12) | u64::from(state.iopl) << 12;
    (out.cs, out.ss) = (r.cs as u16, r.ss as u16);
    let s = state.selectors;
    (out.es, out.ds, out.fs, out.gs) = (s.es, s.ds, s.fs, s.gs);
    context.flags = VcpuContextFlags::I387_VALID.bits();
    if state.kernel_mode {
        context.flags |= VcpuContextFlags::IN_KERNEL.bits();
    }
    if state.callbacks.failsafe.mask_events {
        context.flags |= VcpuContextFlags::FAILSAFE_DISABLES_EVENTS.bits();
    }
    if state.callbacks.syscall.mask_events {
        context.flags |= VcpuContextFlags::SYSCALL_DISABLES_EVENTS.bits();
    }
    store_vectors(state.vectors.bytes_mut(), &mut context.fpu_ctxt);
    for (vector, (out, entry)) in context.trap_ctxt.iter_mut().zip(&state.traps).enumerate() {
        (out.vector, out.flags, out.cs, out.address) = (vector as u8, entry.flags, entry.cs, entry.address);
    }
    context.event_callback_eip = state.callbacks.event.address;
    context.failsafe_callback_eip = state.callbacks.failsafe.address;
    context.syscall_callback_eip = state.callbacks.syscall.address;
    (context.fs_base, context.gs_base_kernel, context.gs_base_user) =
        (state.fs_base, state.gs_base_kernel, state.gs_base_user);
    (context.kernel_ss, context.kernel_sp) = (u64::from(state.kernel_ss), state.kernel_sp);
    (context.ldt_base, context.ldt_ents) = (state.ldt.base, u64::from(state.ldt.entries));
    store_gdt(&state.gdt, context);
    for (number, out) in context.debugreg.iter_mut().enumerate() {
        *out = state.debug.read(number as u64, true).unwrap_or(0);
    }
    context.ctrlreg[0] = 0x8005_003b | if state.task_switched { 8 } else { 0 };
    context.ctrlreg[3] = state.kernel_root.map_or(0, |m| m.get() << 12);
    context.ctrlreg[1] = state.user_root.map_or(0, |m| m.get() << 12);
    context.ctrlreg[4] = state.cr4;
}

/// Bytes of the x87 registers in a legacy image: control words before MXCSR, and the stack.
const X87: [Range<usize>; 2] = [0..24, 32..160];
/// Bytes of the SSE registers.
const SSE: Range<usize> = 160..416;
/// Where an XSAVE area says which components it holds.
const XSTATE_BV: Range<usize> = 512..520;

/// The legacy part of a saved area. XSAVE does not write components that are in their initial state: what the area holds there is
/// of an earlier time.
fn store_vectors(area: &[u8], out: &mut [u8]) {
    for (to, from) in out.iter_mut().zip(area) {
        *to = *from;
    }
    let Some(held) = area.get(XSTATE_BV).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes)
    else {
        return;
    };
    let mut clear = |range: Range<usize>| out.get_mut(range).unwrap_or_default().fill(0);
    if held & 1 == 0 {
        X87.into_iter().for_each(&mut clear);
    }
    if held & 2 == 0 {
        clear(SSE);
    }
    if held & 1 == 0 {
        // FCW after FNINIT.
        out.iter_mut().zip(0x037f_u16.to_le_bytes()).for_each(|(to, byte)| *to = byte);
    }
}

fn store_gdt(gdt: &GuestGdt, context: &mut VcpuGuestContext) {
    for (out, frame) in context.gdt_frames.iter_mut().zip(gdt.frames) {
        *out = frame.unwrap_or(Mfn::new(0));
    }
    context.gdt_ents = u64::from(gdt.entries);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn components_in_their_initial_state_are_stored_so() {
        let mut area = [0xaa; 576];
        let mut out = [0x55; 512];
        let image = |held: u64, area: &mut [u8; 576], out: &mut [u8; 512]| {
            area[XSTATE_BV].copy_from_slice(&held.to_le_bytes());
            store_vectors(area, out);
        };
        image(3, &mut area, &mut out);
        assert_eq!(out[..], area[..512]);
        image(1, &mut area, &mut out);
        assert!(out[SSE].iter().all(|b| *b == 0) && out[..160].iter().all(|b| *b == 0xaa));
        image(2, &mut area, &mut out);
        assert_eq!(out[..4], [0x7f, 3, 0, 0]);
        assert!(out[32..160].iter().all(|b| *b == 0) && out[SSE].iter().all(|b| *b == 0xaa));
        assert_eq!(out[24..28], [0xaa; 4], "MXCSR is stored in any case");
        // Without XSAVE there is nothing that says.
        store_vectors(&area[..512], &mut out);
        assert_eq!(out[..], area[..512]);
    }
}
