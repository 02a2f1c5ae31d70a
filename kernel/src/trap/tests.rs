//! Traps and the hypercalls about them, on the simulated machine: a guest with real page tables, whose registers are set by
//! hand and whose stack is read afterwards.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use hypercall_abi::{DomId, Errno, Hypercall, Mfn, VcpuId};

use super::bounce::{Flags, KERNEL_CS, KERNEL_SS};
use super::debug::{DR6_DEFAULT, SINGLE_STEP};
use crate::access::Rights;
use crate::domain::{
    Callback, Cpu, Current, Domain, DomainConfig, ENTRY_IRET_FAULT, ENTRY_SYSCALL, ENTRY_SYSCALL32,
    ENTRY_SYSENTER, TrapEntry, VcpuRef, VcpuState,
};
use crate::hypercall::{Budget, Exit, dispatch};
use crate::hypervisor::Hypervisor;
use crate::mm::{FrameRecord, Kind, Memory};
use crate::page_ref::L4;
use crate::platform::sim::SimMachine;
use crate::platform::{CpuId, Platform};

const FRAMES: usize = 128;
/// Virtual pages 1 to 31 are mapped: code, data, stacks. Page n is at n << 12.
const PAGES: u64 = 32;
const CODE: u64 = 0x1000;
const DATA: u64 = 0x4000;
/// The last mapped page before a hole.
const LAST: u64 = (PAGES - 1) << 12;
const STACK: u64 = 0x9000;
const KERNEL_STACK: u64 = 0xb000;
/// Virtual page that shows the L1 table itself, read-only.
const L1_WINDOW: u64 = 0x1e_000;
const HANDLER: u64 = 0x2000;
/// Present, writable, user, accessed, dirty.
const RW: u64 = 0x67;
const RO: u64 = 0x65;

struct Guest {
    hv: Hypervisor<SimMachine>,
    cpu: Cpu,
    /// Frame of each virtual page.
    frames: Vec<Mfn>,
    l1: Mfn,
}

fn guest_with(rights: Rights) -> Guest {
    let records: &'static [FrameRecord] = Box::leak((0..FRAMES).map(|_| FrameRecord::new()).collect());
    let m2p: &'static [AtomicU64] = Box::leak((0..FRAMES).map(|_| AtomicU64::new(0)).collect());
    let memory = Memory::new(records, m2p);
    memory.declare_ram(Mfn::new(0), FRAMES as u64);
    memory.add_free(Mfn::new(1), FRAMES as u64 - 1);
    let hv = Hypervisor::new(SimMachine::new(FRAMES), memory);
    // As many steps as the string instructions below count on.
    hv.steps_per_entry.store(64, Ordering::Relaxed);
    let id = DomId::new(1);
    let shared_info = hv.allocate_hypervisor_page(id).unwrap();
    let config = DomainConfig { id, handle: [0; 16], vcpus: 1, max_pages: 100, rights, shared_info };
    let domain = alloc::sync::Arc::new(Domain::new(config, &hv.platform));
    domain.vcpus[0].set_info_location(shared_info, 0);
    domain.vcpus[0].blocked.store(0, Ordering::Relaxed);
    domain.pauses.store(0, Ordering::Relaxed);
    assert!(hv.domains.insert(domain.clone()));

    let give = || hv.give_frames(&domain, 0, u64::MAX).unwrap();
    let frames: Vec<Mfn> = (0..PAGES).map(|_| give()).collect();
    let tables: Vec<Mfn> = (0..8).map(|_| give()).collect();
    let set = |table: Mfn, index: usize, target: Mfn, flags: u64| {
        hv.platform.frame(table)[index].store(target.get() << 12 | flags, Ordering::SeqCst);
    };
    let [l1, l2, l3, l4, u1, u2, u3, u4] = tables.try_into().unwrap();
    for (page, frame) in frames.iter().enumerate().skip(1) {
        set(l1, page, *frame, RW);
    }
    set(l1, (L1_WINDOW >> 12) as usize, l1, RO);
    // User mode sees the code, the data and its stack, not the kernel's.
    for page in [1, 4, 8, 9] {
        set(u1, page, frames[page], RW);
    }
    for [l4, l3, l2, l1] in [[l4, l3, l2, l1], [u4, u3, u2, u1]] {
        set(l2, 0, l1, RW);
        set(l3, 0, l2, RW);
        set(l4, 0, l3, RW);
    }
    let mut state = Box::new(VcpuState::new(&hv.platform));
    let root = |mfn| hv.pager().get_typed::<L4>(mfn, id, &hv, &mut Budget::unlimited()).unwrap().into_pte();
    state.kernel_root = Some(root(l4));
    state.user_root = Some(root(u4));
    state.regs.cs = u64::from(KERNEL_CS);
    state.regs.ss = u64::from(KERNEL_SS);
    state.regs.rip = CODE;
    state.regs.rsp = STACK;
    state.regs.rflags = 0x202;
    state.kernel_sp = KERNEL_STACK;
    state.budget = Budget::new(64);
    hv.platform.load_root(l4);
    let vcpu = VcpuRef::new(&domain, VcpuId::new(0)).unwrap();
    let cpu = Cpu { current: Some(Current { vcpu, state }), ..Cpu::new(CpuId(0)) };
    Guest { hv, cpu, frames, l1 }
}

fn guest() -> Guest {
    guest_with(Rights::none())
}

impl Guest {
    fn current(&mut self) -> &mut Current {
        self.cpu.current.as_mut().unwrap()
    }
    fn state(&mut self) -> &mut VcpuState {
        &mut self.current().state
    }
    /// Puts bytes into the page that is mapped at `va`.
    fn put(&self, va: u64, bytes: &[u8]) {
        for (i, byte) in bytes.iter().enumerate() {
            let at = va + i as u64;
            let word = &self.hv.platform.frame(self.frames[(at >> 12) as usize])[(at & 0xfff) as usize / 8];
            let mut old = word.load(Ordering::SeqCst).to_le_bytes();
            old[at as usize % 8] = *byte;
            word.store(u64::from_le_bytes(old), Ordering::SeqCst);
        }
    }
    fn put_words(&self, va: u64, words: &[u64]) {
        self.put(va, &words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<_>>());
    }
    fn words<const N: usize>(&self, va: u64) -> [u64; N] {
        core::array::from_fn(|i| {
            let at = va + 8 * i as u64;
            let frame = self.frames[(at >> 12) as usize];
            self.hv.platform.frame(frame)[(at & 0xfff) as usize / 8].load(Ordering::SeqCst)
        })
    }
    fn handle(&mut self, vector: usize, flags: u8) {
        self.state().traps[vector] = TrapEntry { address: HANDLER + vector as u64, cs: KERNEL_CS, flags };
    }
    fn drop_to_user(&mut self) {
        let root = self.state().user_root.unwrap();
        self.state().kernel_mode = false;
        self.hv.platform.load_root(root);
    }
    fn exception(&mut self, vector: u64, error_code: u64, detail: u64) {
        self.state().regs.vector = vector;
        self.state().regs.error_code = error_code;
        self.hv.on_exception(&mut self.cpu, detail);
    }
    /// The guest executes this and gets a general protection fault from the processor.
    fn privileged(&mut self, code: &[u8]) {
        self.put(CODE, code);
        self.state().regs.rip = CODE;
        self.exception(13, 0, 0);
    }
    fn crashed(&mut self) -> bool {
        self.current().domain().is_shut_down.load(Ordering::Relaxed)
    }
    fn call(&mut self, call: Hypercall, args: &[u64]) -> Result<u64, Exit> {
        let mut all = [0; 6];
        all[..args.len()].copy_from_slice(args);
        dispatch(&self.hv, self.cpu.current.as_mut().unwrap(), call.number(), all)
    }
    /// The word of vcpu_info with the event bytes, or with CR2.
    fn info(&mut self, index: usize) -> u64 {
        let shared = self.current().domain().shared_info;
        self.hv.platform.frame(shared)[index].load(Ordering::SeqCst)
    }
    fn set_info(&mut self, index: usize, value: u64) {
        let shared = self.current().domain().shared_info;
        self.hv.platform.frame(shared)[index].store(value, Ordering::SeqCst);
    }
}

const GP: usize = 13;

// ── bounces ──

#[test]
fn a_page_fault_of_user_mode_goes_to_the_kernel() {
    let mut g = guest();
    g.handle(14, 4);
    g.drop_to_user();
    g.state().regs.rcx = 0xc;
    g.state().regs.r11 = 0xb;
    g.exception(14, 0x6, 0xdead_b000);
    let at = KERNEL_STACK - 64;
    assert_eq!(g.words(at), [0xc, 0xb, 0x6, CODE, 0xe033, 0x202, STACK, 0xe02b]);
    assert_eq!(g.info(2), 0xdead_b000);
    assert_eq!(g.info(0) >> 8 & 0xff, 1, "the entry asked for events to be masked");
    let root = g.hv.platform.root();
    let s = g.state();
    assert_eq!(root, s.kernel_root);
    assert!(s.kernel_mode);
    assert_eq!((s.regs.rip, s.regs.rsp, s.regs.cs, s.regs.ss), (HANDLER + 14, at, 0xe033, 0xe02b));
}

#[test]
fn a_page_fault_of_the_kernel_is_no_user_fault() {
    let mut g = guest();
    g.handle(14, 0);
    g.exception(14, 0x6, 0x5000);
    assert_eq!(g.words::<8>(STACK - 64)[2..8], [0x2, CODE, 0xe030, 0x202, STACK, 0xe02b]);
    assert_eq!(g.info(0), 0);
}

#[test]
fn an_exception_without_handler_or_stack_crashes_the_domain_alone() {
    let mut g = guest();
    g.exception(0, 0, 0);
    assert!(g.crashed());
    let mut g = guest();
    g.handle(0, 0);
    g.state().regs.rsp = 0x10_0000;
    g.exception(0, 0, 0);
    assert!(g.crashed());
    // In the hypervisor's range it is not even tried.
    let mut g = guest();
    g.handle(0, 0);
    g.state().regs.rsp = 0xffff_8300_0000_1000;
    g.exception(0, 0, 0);
    assert!(g.crashed());
}

#[test]
fn a_reserved_bit_fault_crashes() {
    let mut g = guest();
    g.handle(14, 0);
    g.exception(14, 0x9, 0x5000);
    assert!(g.crashed());
}

#[test]
fn system_calls_are_bounced() {
    let mut g = guest();
    g.state().callbacks.syscall = Callback { address: HANDLER, mask_events: true };
    g.drop_to_user();
    g.state().regs.vector = ENTRY_SYSCALL;
    g.state().regs.rflags = 0x602;
    g.hv.on_syscall(&mut g.cpu);
    assert_eq!(g.words::<8>(KERNEL_STACK - 56)[2..7], [CODE, 0xe033, 0x602, STACK, 0xe02b]);
    assert_eq!(g.state().regs.rflags, 0x202, "DF is clear in the handler");
    assert_eq!(g.info(0) >> 8 & 0xff, 1);
}

#[test]
fn both_forms_of_syscall_mask_events_as_the_64_bit_one_says() {
    for (first, second) in [(true, false), (false, true)] {
        let mut g = guest();
        g.state().callbacks.syscall = Callback { address: HANDLER, mask_events: first };
        g.state().callbacks.syscall32 = Callback { address: HANDLER + 1, mask_events: second };
        g.drop_to_user();
        g.state().regs.vector = ENTRY_SYSCALL32;
        g.hv.on_syscall(&mut g.cpu);
        assert_eq!(g.state().regs.rip, HANDLER + 1);
        assert_eq!(g.info(0) >> 8 & 0xff, u64::from(first));
    }
}

#[test]
fn system_calls_without_callback_are_exceptions() {
    let mut g = guest();
    g.handle(6, 0);
    g.drop_to_user();
    g.state().regs.rip = CODE + 2;
    g.state().regs.vector = ENTRY_SYSCALL;
    g.hv.on_syscall(&mut g.cpu);
    assert_eq!(g.words::<8>(KERNEL_STACK - 56)[2], CODE);
    assert_eq!(g.state().regs.rip, HANDLER + 6);
    let mut g = guest();
    g.handle(GP, 0);
    g.drop_to_user();
    g.state().regs.vector = ENTRY_SYSENTER;
    g.hv.on_syscall(&mut g.cpu);
    assert_eq!(g.state().regs.rip, HANDLER + 13);
    assert_eq!(g.words::<8>(KERNEL_STACK - 64)[2..4], [0, CODE]);
}

#[test]
fn events_are_delivered_once_with_the_mask_set() {
    let mut g = guest();
    g.state().callbacks.event = Callback { address: HANDLER, mask_events: true };
    g.set_info(0, 0x0001);
    let Guest { hv, cpu, .. } = &mut g;
    hv.deliver_pending(cpu.current.as_mut().unwrap());
    assert_eq!(g.state().regs.rip, HANDLER);
    assert_eq!(g.info(0), 0x0101);
    assert_eq!(g.words::<8>(STACK - 56)[2..5], [CODE, 0xe030, 0x202]);
    let Guest { hv, cpu, .. } = &mut g;
    hv.deliver_pending(cpu.current.as_mut().unwrap());
    assert_eq!(g.state().regs.rsp, STACK - 56);
}

#[test]
fn an_nmi_waits_for_the_end_of_the_one_before() {
    let mut g = guest();
    g.put_words(DATA, &[HANDLER, 0]);
    assert_eq!(g.call(Hypercall::NmiOp, &[0, DATA]), Ok(0));
    for expected in [STACK - 56, STACK - 56] {
        g.current().vcpu.nmi_pending.store(true, Ordering::Relaxed);
        let Guest { hv, cpu, .. } = &mut g;
        hv.deliver_pending(cpu.current.as_mut().unwrap());
        assert_eq!(g.state().regs.rsp, expected);
    }
    assert!(g.current().vcpu.nmi_pending.load(Ordering::Relaxed), "the second waits");
    g.put_words(DATA, &[0, 0, 0, 0, CODE, 0xe030, 0x202, STACK, 0xe02b]);
    g.state().regs.rsp = DATA;
    assert_eq!(g.call(Hypercall::Iret, &[]), Err(Exit::RegistersReplaced));
    let Guest { hv, cpu, .. } = &mut g;
    hv.deliver_pending(cpu.current.as_mut().unwrap());
    assert_eq!(g.state().regs.rip, HANDLER);
    assert!(!g.current().vcpu.nmi_pending.load(Ordering::Relaxed));
}

// ── software interrupts ──

#[test]
fn int_n_asks_the_guests_own_table() {
    let mut g = guest();
    g.handle(0x21, 3);
    g.drop_to_user();
    g.exception(13, 0x21 << 3 | 2, 0);
    assert_eq!(g.state().regs.rip, HANDLER + 0x21);
    assert_eq!(g.words::<8>(KERNEL_STACK - 56)[2], CODE + 2, "behind the instruction, without error code");
}

#[test]
fn int_n_without_privilege_is_a_fault_at_the_instruction() {
    let mut g = guest();
    g.handle(0x21, 1);
    g.handle(GP, 0);
    g.drop_to_user();
    g.exception(13, 0x21 << 3 | 2, 0);
    assert_eq!(g.words::<8>(KERNEL_STACK - 64)[2..4], [0x21 << 3 | 2, CODE]);
    // The guest's kernel counts as ring 1.
    let mut g = guest();
    g.handle(0x21, 1);
    g.exception(13, 0x21 << 3 | 2, 0);
    assert_eq!(g.state().regs.rip, HANDLER + 0x21);
}

#[test]
fn the_old_system_call_has_a_gate_of_its_own() {
    let mut g = guest();
    g.handle(0x80, 3);
    g.drop_to_user();
    g.state().regs.rip = CODE + 2;
    g.exception(0x80, 0, 0);
    assert_eq!((g.state().regs.rip, g.words::<8>(KERNEL_STACK - 56)[2]), (HANDLER + 0x80, CODE + 2));
    let mut g = guest();
    g.handle(GP, 0);
    g.drop_to_user();
    g.state().regs.rip = CODE + 2;
    g.exception(0x80, 0, 0);
    assert_eq!(g.words::<8>(KERNEL_STACK - 64)[2..4], [0x402, CODE]);
}

#[test]
fn a_return_that_faults_is_the_guests_fault_and_nothing_is_emulated() {
    let mut g = guest();
    g.handle(GP, 0);
    g.put(CODE, &[0x0f, 0x06]);
    g.state().task_switched = true;
    g.exception(ENTRY_IRET_FAULT + 13, 0, 0);
    assert_eq!(g.state().regs.rip, HANDLER + 13);
    assert!(g.state().task_switched);
    // The vector is the fault's: a segment that is not present.
    g.handle(11, 0);
    g.exception(ENTRY_IRET_FAULT + 11, 0x1c, 0);
    assert_eq!(g.state().regs.rip, HANDLER + 11);
}

// ── emulation ──

#[test]
fn cpuid_by_the_forced_prefix() {
    let mut g = guest();
    g.put(CODE, &[0x0f, 0x0b, b'x', b'e', b'n', 0x0f, 0xa2]);
    g.state().regs.rax = 0x4000_0000;
    g.exception(6, 0, 0);
    let r = g.state().regs;
    assert_eq!((r.rip, r.rax, r.rbx), (CODE + 7, 0x4000_0005, 0x566e_6558));
    // Before anything else the undefined instruction is the guest's.
    g.handle(6, 0);
    g.put(CODE, &[0x0f, 0x0b, b'x', b'e', b'n', 0x90, 0x90]);
    g.state().regs.rip = CODE;
    g.exception(6, 0, 0);
    assert_eq!(g.state().regs.rip, HANDLER + 6);
}

#[test]
fn control_registers() {
    let mut g = guest();
    g.handle(GP, 0);
    g.privileged(&[0x0f, 0x20, 0xc0]); // mov rax, cr0
    assert_eq!((g.state().regs.rax, g.state().regs.rip), (0x8005_0033, CODE + 3));
    g.state().regs.rax = 0x8005_003b;
    g.privileged(&[0x0f, 0x22, 0xc0]); // mov cr0, rax
    assert!(g.state().task_switched);
    g.privileged(&[0x0f, 0x06]); // clts
    assert!(!g.state().task_switched);
    g.state().regs.rbx = 0x1234;
    g.privileged(&[0x0f, 0x22, 0xd3]); // mov cr2, rbx
    g.privileged(&[0x0f, 0x20, 0xd1]); // mov rcx, cr2
    assert_eq!(g.state().regs.rcx, 0x1234);
    g.privileged(&[0x0f, 0x20, 0xd8]); // mov rax, cr3
    let root = g.state().kernel_root.unwrap().get() << 12;
    assert_eq!(g.state().regs.rax, root);
    g.state().regs.rax = u64::MAX;
    g.privileged(&[0x0f, 0x22, 0xe0]); // mov cr4, rax
    g.privileged(&[0x0f, 0x20, 0xe0]); // mov rax, cr4
    assert_eq!(g.state().regs.rax, 0x66c, "TSD and DE are the guest's; PAE MCE OSFXSR OSXMMEXCPT are shown");
    // Protected mode cannot be left.
    g.state().regs.rax = 0x8005_0032;
    g.privileged(&[0x0f, 0x22, 0xc0]);
    assert_eq!(g.state().regs.rip, HANDLER + 13);
}

#[test]
fn a_tsc_that_traps_for_our_sake_is_shown_to_user_mode_unless_the_guest_closed_it() {
    const TSD: u64 = 1 << 2;
    let mut g = guest();
    g.handle(GP, 0);
    g.hv.platform.advance(0x5_0000_0000);
    for emulated in [false, true] {
        g.hv.platform.tsc_emulated.store(emulated, Ordering::Relaxed);
        for tsd in [0, TSD] {
            for user in [false, true] {
                for (code, rdtscp) in [(&[0x0f, 0x31][..], false), (&[0x0f, 0x01, 0xf9], true)] {
                    g.state().cr4 = tsd;
                    g.state().tsc_aux = 7;
                    let regs = &mut g.state().regs;
                    (regs.rax, regs.rcx, regs.rdx, regs.rsp) = (1, 1, 1, STACK);
                    if user {
                        g.drop_to_user();
                    }
                    let time = g.hv.platform.guest_tsc();
                    g.privileged(code);
                    let what = (emulated, tsd, user, rdtscp);
                    let r = g.state().regs;
                    if user && (!emulated || tsd != 0) {
                        assert_eq!((r.rip, r.rax), (HANDLER + 13, 1), "{what:?}");
                    } else {
                        assert_eq!(
                            (r.rip, r.rax | r.rdx << 32),
                            (CODE + code.len() as u64, time),
                            "{what:?}"
                        );
                        assert_eq!(r.rcx, if rdtscp { 7 } else { 1 }, "{what:?}");
                    }
                    if user {
                        let root = g.state().kernel_root.unwrap();
                        g.state().kernel_mode = true;
                        g.hv.platform.load_root(root);
                    }
                }
            }
        }
    }
}

#[test]
fn cr3_switches_to_another_root_of_the_guests_and_to_nothing_else() {
    let mut g = guest();
    g.handle(GP, 0);
    let user = g.state().user_root.unwrap();
    g.state().regs.rax = user.get() << 12;
    g.privileged(&[0x0f, 0x22, 0xd8]);
    assert_eq!((g.state().kernel_root, g.hv.platform.root()), (Some(user), Some(user)));
    let mut g = guest();
    g.handle(GP, 0);
    let before = g.state().kernel_root;
    for bad in [0, 1 << 30, u64::MAX, g.l1.get() << 12] {
        g.state().regs.rax = bad;
        g.state().regs.rsp = STACK;
        g.privileged(&[0x0f, 0x22, 0xd8]);
        assert_eq!(g.state().regs.rip, HANDLER + 13, "{bad:#x}");
        assert_eq!(g.state().kernel_root, before);
    }
}

#[test]
fn user_mode_may_execute_nothing_of_this() {
    for code in [
        &[0x0f, 0x20, 0xc0][..],
        &[0x0f, 0x22, 0xd8],
        &[0x0f, 0x21, 0xc0],
        &[0x0f, 0x23, 0xc0],
        &[0x0f, 0x06],
        &[0x0f, 0x32],
        &[0x0f, 0x30],
        &[0x0f, 0x31],
        &[0x0f, 0x09],
        &[0x0f, 0x01, 0xd1],
        &[0xfa],
        &[0xe4, 0x80],
        &[0x6c],
    ] {
        let mut g = guest();
        g.handle(GP, 0);
        g.drop_to_user();
        let before = g.state().regs;
        g.privileged(code);
        assert_eq!(g.state().regs.rip, HANDLER + 13, "{code:02x?}");
        assert_eq!(g.words::<8>(KERNEL_STACK - 64)[3], CODE);
        assert_eq!((g.state().regs.rax, g.state().regs.rdx), (before.rax, before.rdx));
    }
}

#[test]
fn msrs() {
    let mut g = guest();
    g.handle(GP, 0);
    g.state().regs.rcx = 0xc000_0101;
    (g.state().regs.rax, g.state().regs.rdx) = (0x5678, 0x1234);
    g.privileged(&[0x0f, 0x30]);
    assert_eq!(g.state().gs_base_kernel, 0x1234_0000_5678);
    (g.state().regs.rax, g.state().regs.rdx) = (0, 0);
    g.privileged(&[0x0f, 0x32]);
    assert_eq!((g.state().regs.rax, g.state().regs.rdx), (0x5678, 0x1234));
    // Not canonical.
    (g.state().regs.rax, g.state().regs.rdx) = (0, 0x8000);
    g.privileged(&[0x0f, 0x30]);
    assert_eq!(g.state().regs.rip, HANDLER + 13);
    assert_eq!(g.state().gs_base_kernel, 0x1234_0000_5678);
    // LSTAR.
    g.state().regs.rcx = 0xc000_0082;
    g.privileged(&[0x0f, 0x32]);
    assert_eq!(g.state().regs.rip, HANDLER + 13);
}

#[test]
fn unknown_msrs_do_not_kill_a_kernel_that_has_no_handler_yet() {
    let mut g = guest();
    g.state().regs.rcx = 0x123;
    g.state().regs.rax = 7;
    g.privileged(&[0x0f, 0x32]);
    assert_eq!((g.state().regs.rax, g.state().regs.rip), (0, CODE + 2));
    g.privileged(&[0x0f, 0x30]);
    assert_eq!(g.state().regs.rip, CODE + 2);
    assert!(!g.crashed());
}

#[test]
fn the_hypercall_page_msr_writes_pages_of_the_guest_only() {
    let mut g = guest();
    g.handle(GP, 0);
    g.state().regs.rcx = 0x4000_0000;
    g.state().regs.rax = g.frames[4].get() << 12;
    g.privileged(&[0x0f, 0x30]);
    assert_eq!(g.words::<1>(DATA)[0].to_le_bytes()[..4], [0x51, 0x41, 0x53, 0xb8]);
    for bad in [0, 1, g.l1.get() << 12, g.frames[4].get() << 12 | 1] {
        g.state().regs.rax = bad;
        g.state().regs.rsp = STACK;
        g.privileged(&[0x0f, 0x30]);
        assert_eq!(g.state().regs.rip, HANDLER + 13, "{bad:#x}");
    }
    assert_eq!(g.hv.mm.type_word(g.l1).unwrap().kind(), Kind::L1);
}

#[test]
fn a_stepped_instruction_traps_after_it() {
    let mut g = guest();
    g.handle(1, 0);
    g.state().regs.rflags |= Flags::TF.bits();
    g.privileged(&[0x0f, 0x06]);
    assert_eq!(g.state().regs.rip, HANDLER + 1);
    assert_eq!(g.words::<8>(STACK - 56)[2], CODE + 2);
    assert_eq!(g.state().debug.dr6, DR6_DEFAULT | SINGLE_STEP);
}

#[test]
fn an_instruction_across_pages_is_read_from_both() {
    let mut g = guest();
    g.put(0x1fff, &[0x0f, 0x20, 0xc0]);
    g.state().regs.rip = 0x1fff;
    g.exception(13, 0, 0);
    assert_eq!(g.state().regs.rip, 0x2002);
    // At the end of what is mapped it is decoded from what can be read.
    g.put(LAST + 0xffe, &[0x0f, 0x06]);
    g.state().regs.rip = LAST + 0xffe;
    g.exception(13, 0, 0);
    assert_eq!(g.state().regs.rip, LAST + 0x1000);
}

#[test]
fn code_in_32_bit_segments_is_emulated_and_other_segments_are_none() {
    let mut g = guest();
    g.state().regs.cs = 0xe023;
    g.state().task_switched = true;
    g.privileged(&[0x0f, 0x06]);
    assert_eq!((g.state().regs.rip, g.state().task_switched), (CODE + 2, false));
    for cs in [0x13, 0x0f] {
        let mut g = guest();
        g.handle(GP, 0);
        g.state().regs.cs = cs;
        g.privileged(&[0x0f, 0x06]);
        assert_eq!(g.state().regs.rip, HANDLER + 13, "{cs:#x}");
    }
}

// ── ports ──

#[test]
fn ports_need_the_guests_own_permission_first() {
    let mut g = guest();
    g.handle(GP, 0);
    g.privileged(&[0xe4, 0x80]);
    assert_eq!(g.state().regs.rip, HANDLER + 13);
    g.put_words(DATA, &[1]);
    assert_eq!(g.call(Hypercall::PhysdevOp, &[6, DATA]), Ok(0));
    g.state().regs.rax = 0x1111_1111_1111_1100;
    g.privileged(&[0xe4, 0x80]);
    assert_eq!((g.state().regs.rip, g.state().regs.rax), (CODE + 2, 0x1111_1111_1111_11ff));
    g.privileged(&[0xe5, 0x80]);
    assert_eq!(g.state().regs.rax, 0xffff_ffff);
    // cli and sti are accepted.
    g.privileged(&[0xfa]);
    assert_eq!(g.state().regs.rip, CODE + 1);
    g.drop_to_user();
    g.privileged(&[0xe4, 0x80]);
    assert_eq!(g.state().regs.rip, HANDLER + 13, "level 1 is not for user mode");
}

#[test]
fn a_port_bitmap_opens_single_ports_to_user_mode() {
    let mut g = guest();
    g.handle(GP, 0);
    g.put(DATA + 0x100, &[0xff; 64]);
    g.put(DATA + 0x100 + 0x80 / 8, &[0xfe]);
    g.put_words(DATA, &[DATA + 0x100, 0x200]);
    assert_eq!(g.call(Hypercall::PhysdevOp, &[7, DATA]), Ok(0));
    g.drop_to_user();
    g.privileged(&[0xe4, 0x80]);
    assert_eq!(g.state().regs.rip, CODE + 2);
    assert_eq!(g.hv.platform.root(), g.state().user_root, "back in its own tables");
    g.privileged(&[0xe4, 0x81]);
    assert_eq!(g.state().regs.rip, HANDLER + 13);
}

#[test]
fn string_input_stops_at_a_fault_having_done_what_it_could() {
    let mut g = guest();
    g.handle(14, 0);
    g.state().iopl = 1;
    g.state().regs.rdi = LAST + 0xff0;
    g.state().regs.rcx = 32;
    g.privileged(&[0xf3, 0x6c]);
    assert_eq!((g.state().regs.rcx, g.state().regs.rdi), (16, LAST + 0x1000));
    assert_eq!(g.info(2), LAST + 0x1000);
    assert_eq!(g.words::<8>(STACK - 64)[2..4], [2, CODE]);
    assert_eq!(g.words(LAST + 0xff0), [u64::MAX, u64::MAX]);
}

#[test]
fn string_output_is_preemptible() {
    let mut g = guest();
    g.state().iopl = 1;
    g.state().regs.rsi = DATA;
    g.state().regs.rcx = 100_000;
    g.privileged(&[0xf3, 0x6e]);
    let r = g.state().regs;
    assert_eq!(r.rip, CODE, "executed again");
    assert!(r.rcx < 100_000 && r.rcx > 90_000);
    assert_eq!(r.rsi - DATA, 100_000 - r.rcx);
}

// ── page-table stores ──

fn page_table_guest() -> Guest {
    page_table_guest_with(Rights::none())
}

fn page_table_guest_with(rights: Rights) -> Guest {
    let mut g = guest_with(rights);
    g.handle(14, 0);
    assert_eq!(g.call(Hypercall::VmAssist, &[0, 2]), Ok(0));
    g
}

impl Guest {
    /// The guest's kernel executes `code` at an L1 entry of its own, through the read-only window, and faults.
    fn store(&mut self, page: u64, code: &[u8]) -> u64 {
        let at = L1_WINDOW + 8 * page;
        self.put(CODE, code);
        self.state().regs.rip = CODE;
        self.state().regs.rdi = at;
        self.state().regs.rsp = STACK;
        self.exception(14, 3, at);
        self.hv.platform.frame(self.l1)[page as usize].load(Ordering::SeqCst)
    }
}

#[test]
fn a_store_to_an_l1_table_is_checked_and_carried_out() {
    let mut g = page_table_guest();
    let frame = g.frames[5].get() << 12;
    let old = g.hv.platform.frame(g.l1)[6].load(Ordering::SeqCst);
    g.state().regs.rax = frame | RW;
    assert_eq!(g.store(6, &[0x48, 0x89, 0x07]) & !0xf80, frame | RW); // mov [rdi], rax
    assert_eq!(g.state().regs.rip, CODE + 3);
    // xchg returns what was there; 0 takes the mapping away.
    g.state().regs.rax = 0;
    assert_eq!(g.store(7, &[0x48, 0x87, 0x07]), 0);
    assert_ne!(g.state().regs.rax, 0);
    // lock and [rdi], ~2: read-only from now on.
    let now = g.store(8, &[0xf0, 0x48, 0x83, 0x27, 0xfd]);
    assert_eq!(now & 3, 1);
    // lock btr [rdi], 0.
    assert_eq!(g.store(9, &[0xf0, 0x48, 0x0f, 0xba, 0x37, 0x00]) & 1, 0);
    assert_eq!(g.state().regs.rflags & 1, 1, "the bit was set before");
    // cmpxchg that fails changes nothing but rax.
    let before = g.hv.platform.frame(g.l1)[10].load(Ordering::SeqCst);
    g.state().regs.rax = 1;
    assert_eq!(g.store(10, &[0xf0, 0x48, 0x0f, 0xb1, 0x0f]), before);
    assert_eq!((g.state().regs.rax, g.state().regs.rflags & 0x40), (before, 0));
    assert_ne!(old, 0);
}

#[test]
fn stores_of_one_and_two_bytes_change_their_part_of_an_entry_and_of_a_register() {
    let mut g = page_table_guest();
    let entry = |g: &Guest, page: usize| g.hv.platform.frame(g.l1)[page].load(Ordering::SeqCst);
    let software = 0xe00;
    // Two bytes across a boundary of two are not one access.
    let before = entry(&g, 11);
    g.state().regs.rdi = L1_WINDOW + 8 * 11;
    g.put(CODE, &[0x66, 0x89, 0x47, 0x01]);
    g.state().regs.rip = CODE;
    g.exception(14, 3, L1_WINDOW + 8 * 11 + 1);
    assert_eq!(g.state().regs.rip, HANDLER + 14);
    assert_eq!(entry(&g, 11), before);
    let mut g = page_table_guest();
    // mov [rdi], al; the byte's bits other than writable stay.
    let before = entry(&g, 6);
    g.state().regs.rax = !0xff | before & 0xfd;
    assert_eq!(g.store(6, &[0x88, 0x07]), before & !2);
    assert_eq!(g.state().regs.rip, CODE + 2);
    // xchg [rdi], ch: no REX, the second byte of rcx; only that byte is loaded.
    let before = entry(&g, 7);
    g.state().regs.rcx = 0x1111_2222_3333_0044 | (before & 0xfd) << 8;
    assert_eq!(g.store(7, &[0x86, 0x2f]), before & !2);
    assert_eq!(g.state().regs.rcx, 0x1111_2222_3333_0044 | (before & 0xff) << 8);
    // With REX the same number is bpl.
    let before = entry(&g, 8);
    g.state().regs.rbp = before & 0xfd;
    assert_eq!(g.store(8, &[0x40, 0x86, 0x2f]), before & !2);
    assert_eq!(g.state().regs.rbp, before & 0xff);
    // xor word [rdi], 0xe00.
    let before = entry(&g, 9);
    assert_eq!(g.store(9, &[0x66, 0x81, 0x37, 0x00, 0x0e]), before ^ software);
    assert_eq!(g.state().regs.rip, CODE + 5);
    // A word compare that fails loads ax alone.
    let before = entry(&g, 10);
    g.state().regs.rax = 0x5555_5555_5555_0000;
    assert_eq!(g.store(10, &[0x66, 0x0f, 0xb1, 0x0f]), before);
    assert_eq!(g.state().regs.rax, 0x5555_5555_5555_0000 | before & 0xffff);
    assert_eq!(g.state().regs.rflags & 0x40, 0);
}

#[test]
fn exchanges_with_addition_and_of_register_pairs() {
    let mut g = page_table_guest();
    let entry = |g: &Guest, page: usize| g.hv.platform.frame(g.l1)[page].load(Ordering::SeqCst);
    // lock xadd [rdi], rcx.
    let before = entry(&g, 6);
    g.state().regs.rcx = 2u64.wrapping_neg();
    assert_eq!(g.store(6, &[0xf0, 0x48, 0x0f, 0xc1, 0x0f]), before - 2);
    assert_eq!(g.state().regs.rcx, before);
    assert_eq!(g.state().regs.rflags & 0x8c1, 1, "carry, no zero, no sign, no overflow");
    // cmpxchg8b [rdi]: equal, then not.
    let (before, pair) = (entry(&g, 7), [0x0f, 0xc7, 0x0f]);
    (g.state().regs.rax, g.state().regs.rdx) = (before & 0xffff_ffff, before >> 32);
    (g.state().regs.rbx, g.state().regs.rcx) = (before & 0xffff_fffd, before >> 32);
    assert_eq!(g.store(7, &pair), before & !2);
    assert_eq!(g.state().regs.rflags & 0x40, 0x40);
    (g.state().regs.rax, g.state().regs.rdx) = (u64::MAX, u64::MAX);
    assert_eq!(g.store(7, &pair), before & !2);
    let r = g.state().regs;
    assert_eq!((r.rax, r.rdx, r.rflags & 0x40), (before & 0xffff_fffd, before >> 32, 0));
    // cmpxchg16b [rdi]: what is there is loaded, but two entries are not stored at once.
    let (pair, words) = ([0x48, 0x0f, 0xc7, 0x0f], (entry(&g, 8), entry(&g, 9)));
    (g.state().regs.rax, g.state().regs.rdx) = (words.0, 0);
    assert_eq!(g.store(8, &pair), words.0);
    let r = g.state().regs;
    assert_eq!((r.rip, r.rax, r.rdx, r.rflags & 0x40), (CODE + 4, words.0, words.1, 0));
    (g.state().regs.rbx, g.state().regs.rcx) = (0, 0);
    assert_eq!(g.store(8, &pair), words.0);
    assert_eq!(g.state().regs.rip, HANDLER + 14);
    assert_eq!(entry(&g, 9), words.1);
}

#[test]
fn string_stores_go_step_by_step_and_the_stack_moves() {
    let mut g = page_table_guest();
    let entry = |g: &Guest, page: usize| g.hv.platform.frame(g.l1)[page].load(Ordering::SeqCst);
    // rep stosq: one entry each time it faults, at the instruction until the last.
    (g.state().regs.rax, g.state().regs.rcx) = (0, 2);
    assert_eq!(g.store(6, &[0xf3, 0x48, 0xab]), 0);
    let r = g.state().regs;
    assert_eq!((r.rip, r.rcx, r.rdi), (CODE, 1, L1_WINDOW + 56));
    assert_eq!(g.store(7, &[0xf3, 0x48, 0xab]), 0);
    let r = g.state().regs;
    assert_eq!((r.rip, r.rcx, r.rdi), (CODE + 3, 0, L1_WINDOW + 64));
    // With nothing left to store it cannot be what faulted.
    let before = entry(&g, 8);
    assert_eq!(g.store(8, &[0xf3, 0x48, 0xab]), before);
    assert_eq!(g.state().regs.rip, CODE);
    // movsd downwards, from the guest's data, and from where nothing is.
    let before = entry(&g, 9);
    g.put_words(DATA, &[before & !2]);
    g.state().regs.rflags |= 1 << 10;
    g.state().regs.rsi = DATA;
    assert_eq!(g.store(9, &[0xa5]), before & !2);
    let r = g.state().regs;
    assert_eq!((r.rip, r.rsi, r.rdi), (CODE + 1, DATA - 4, L1_WINDOW + 68));
    g.state().regs.rsi = LAST + 0x1000;
    assert_eq!(g.store(9, &[0x48, 0xa5]), before & !2);
    assert_eq!(g.state().regs.rip, HANDLER + 14);
    assert_eq!(g.state().regs.rsi, LAST + 0x1000);
    // pop [rdi].
    g.put_words(STACK, &[0]);
    g.state().regs.rflags &= !(1 << 10);
    assert_eq!(g.store(10, &[0x8f, 0x07]), 0);
    assert_eq!((g.state().regs.rip, g.state().regs.rsp), (CODE + 2, STACK + 8));
    // An immediate bit number stays in its word; a register's does not.
    let before = entry(&g, 11);
    assert_eq!(g.store(11, &[0x48, 0x0f, 0xba, 0x37, 0x41]), before & !2);
    let before = entry(&g, 12);
    g.put(CODE, &[0x48, 0x0f, 0xb3, 0x0f]);
    g.state().regs.rip = CODE;
    g.state().regs.rdi = L1_WINDOW + 8 * 13;
    g.state().regs.rcx = 63u64.wrapping_neg();
    g.exception(14, 3, L1_WINDOW + 8 * 12);
    assert_eq!(entry(&g, 12), before & !2);
    assert_eq!(g.state().regs.rip, CODE + 4);
}

#[test]
fn a_forbidden_entry_is_a_page_fault_for_the_guest() {
    let mut g = page_table_guest();
    // A writable mapping of the table itself, and a frame that is not the guest's.
    for bad in [g.l1.get() << 12 | RW, RW, 0x7fff_ffff_f000 | RW] {
        let before = g.hv.platform.frame(g.l1)[6].load(Ordering::SeqCst);
        g.state().regs.rax = bad;
        assert_eq!(g.store(6, &[0x48, 0x89, 0x07]), before, "{bad:#x}");
        assert_eq!(g.state().regs.rip, HANDLER + 14);
    }
}

#[test]
fn stores_are_not_emulated_without_the_assist_nor_for_user_mode_nor_elsewhere() {
    let mut g = page_table_guest();
    assert_eq!(g.call(Hypercall::VmAssist, &[1, 2]), Ok(0));
    g.state().regs.rax = 0;
    assert_ne!(g.store(6, &[0x48, 0x89, 0x07]), 0);
    assert_eq!(g.state().regs.rip, HANDLER + 14);
    // The first domain does not have to ask.
    let rights = Rights { verbs: crate::access::Verbs::PLATFORM, ..Rights::none() };
    let mut g = page_table_guest_with(rights);
    assert_eq!(g.call(Hypercall::VmAssist, &[1, 2]), Ok(0));
    g.state().regs.rax = 0;
    assert_eq!(g.store(6, &[0x48, 0x89, 0x07]), 0);
    assert_eq!(g.state().regs.rip, CODE + 3);
    // An instruction that means another address than the one that faulted.
    let mut g = page_table_guest();
    g.state().regs.rax = 0;
    assert_ne!(g.store(6, &[0x48, 0x89, 0x47, 0x08]), 0);
    assert_eq!(g.state().regs.rip, HANDLER + 14);
}

// ── iret ──

#[test]
fn iret_returns_to_user_mode() {
    let mut g = guest();
    g.put_words(DATA, &[0xa, 0xb, 0xc, 0, 0x40_0000, 0x33, 0x3_7202, 0x7000, 0x2b]);
    g.state().regs.rsp = DATA;
    assert_eq!(g.call(Hypercall::Iret, &[]), Err(Exit::RegistersReplaced));
    let (root, r) = (g.hv.platform.root(), g.state().regs);
    assert_eq!((r.rax, r.r11, r.rcx), (0xa, 0xb, 0xc));
    assert_eq!((r.rip, r.cs, r.rflags, r.rsp, r.ss), (0x40_0000, 0x33, 0x1_4202, 0x7000, 0x2b));
    assert!(!g.state().kernel_mode && !g.state().sysret_ok);
    assert_eq!(root, g.state().user_root);
    assert_eq!(g.info(0), 0);
}

#[test]
fn iret_within_the_kernel_forces_privilege_and_restores_the_mask() {
    let mut g = guest();
    g.put_words(DATA, &[0xa, 0xb, 0xc, 0x100, CODE, 0xe030, 0x2, STACK, 0xe028]);
    g.state().regs.rsp = DATA;
    (g.state().regs.rcx, g.state().regs.r11) = (1, 2);
    assert_eq!(g.call(Hypercall::Iret, &[]), Err(Exit::RegistersReplaced));
    let r = g.state().regs;
    assert_eq!((r.cs, r.ss, r.rcx, r.r11), (0xe033, 0xe02b, 1, 2));
    assert_eq!(r.rflags, 0x202, "interrupts stay on, the mask is the guest's");
    assert!(g.state().kernel_mode && g.state().sysret_ok);
    assert_eq!(g.info(0), 0x100);
}

#[test]
fn iret_that_leads_nowhere_is_a_crash() {
    let mut g = guest();
    g.state().regs.rsp = 0x10_0000;
    assert!(matches!(g.call(Hypercall::Iret, &[]), Err(Exit::Crash(_))));
    let mut g = guest();
    g.put_words(DATA, &[0, 0, 0, 0, CODE, 0x33, 2, STACK, 0x2b]);
    g.state().regs.rsp = DATA;
    g.state().user_root = None;
    assert!(matches!(g.call(Hypercall::Iret, &[]), Err(Exit::Crash(_))));
}

// ── small hypercalls ──

fn errno(errno: Errno) -> Result<u64, Exit> {
    Err(Exit::Errno(errno))
}

#[test]
fn set_trap_table_adds_clears_and_checks() {
    let mut g = guest();
    let entry = |vector: u64, flags: u64, cs: u64| vector | flags << 8 | cs << 16;
    g.put_words(DATA, &[entry(3, 3, 0xe030), 0x111, entry(14, 4, 0x10), 0x222, 0, 0]);
    assert_eq!(g.call(Hypercall::SetTrapTable, &[DATA]), Ok(0));
    assert_eq!(g.state().traps[3], TrapEntry { address: 0x111, cs: 0xe033, flags: 3 });
    assert_eq!(g.state().traps[14], TrapEntry { address: 0x222, cs: 0x13, flags: 4 });
    g.put_words(DATA, &[entry(4, 0, 0), 0x333, entry(5, 0, 0), 1 << 63, 0, 0]);
    assert_eq!(g.call(Hypercall::SetTrapTable, &[DATA]), errno(Errno::EINVAL));
    assert_eq!((g.state().traps[4].address, g.state().traps[3].address), (0x333, 0x111));
    assert_eq!(g.call(Hypercall::SetTrapTable, &[0x10_0000]), errno(Errno::EFAULT));
    assert_eq!(g.call(Hypercall::SetTrapTable, &[0]), Ok(0));
    assert!(g.state().traps.iter().all(|t| t.address == 0));
}

#[test]
fn set_trap_table_goes_on_where_it_stopped() {
    let mut g = guest();
    let list: Vec<u64> = (0..20).flat_map(|v| [v, 0x1000 + v]).chain([0, 0]).collect();
    g.put_words(DATA, &list);
    let mut at = DATA;
    let mut restarts = 0;
    loop {
        g.state().budget = Budget::new(1);
        match g.call(Hypercall::SetTrapTable, &[at]) {
            Ok(0) => break,
            Err(Exit::Preempted(args)) => at = args[0],
            other => panic!("{other:?}"),
        }
        restarts += 1;
    }
    assert_eq!(restarts, 20);
    assert!((0..20).all(|v| g.state().traps[v].address == 0x1000 + v as u64));
}

#[test]
fn callbacks() {
    let mut g = guest();
    assert_eq!(g.call(Hypercall::SetCallbacks, &[0x10, 1 << 63, 0x30]), Ok(0));
    assert_eq!(g.state().callbacks.event, Callback { address: 0x10, mask_events: true });
    assert_eq!(g.state().callbacks.failsafe.address, 0);
    assert_eq!(g.state().callbacks.syscall.address, 0x30);
    let request = |kind: u64, flags: u64| kind | flags << 16;
    g.put_words(DATA, &[request(7, 1), 0x777]);
    assert_eq!(g.call(Hypercall::CallbackOp, &[0, DATA]), Ok(0));
    assert_eq!(g.state().callbacks.syscall32, Callback { address: 0x777, mask_events: true });
    g.put_words(DATA, &[request(4, 0), 0x444]);
    assert_eq!(g.call(Hypercall::CallbackOp, &[0, DATA]), Ok(0));
    assert_eq!(g.state().traps[2], TrapEntry { address: 0x444, cs: 0xe033, flags: 4 });
    assert_eq!(g.call(Hypercall::CallbackOp, &[1, DATA]), Ok(0));
    assert_eq!(g.state().traps[2].address, 0);
    for (command, words, error) in [
        (0, [request(0, 0), 1 << 63], Errno::EINVAL),
        (0, [request(3, 0), 0], Errno::ENOSYS),
        (0, [request(99, 0), 0], Errno::ENOSYS),
        (1, [request(0, 0), 0], Errno::EINVAL),
        (1, [request(99, 0), 0], Errno::ENOSYS),
        (2, [0, 0], Errno::ENOSYS),
    ] {
        g.put_words(DATA, &words);
        assert_eq!(g.call(Hypercall::CallbackOp, &[command, DATA]), errno(error), "{command} {words:x?}");
    }
    assert_eq!(g.call(Hypercall::CallbackOp, &[0, 0x10_0000]), errno(Errno::EFAULT));
    assert_eq!(g.call(Hypercall::NmiOp, &[1, 0]), Ok(0));
    assert_eq!(g.call(Hypercall::NmiOp, &[2, 0]), errno(Errno::ENOSYS));
}

#[test]
fn stack_switch_forces_privilege() {
    let mut g = guest();
    assert_eq!(g.call(Hypercall::StackSwitch, &[0xe028, 0x5000]), Ok(0));
    assert_eq!((g.state().kernel_ss, g.state().kernel_sp), (0xe02b, 0x5000));
}

#[test]
fn debug_registers_by_hypercall() {
    let mut g = guest();
    assert_eq!(g.call(Hypercall::SetDebugreg, &[2, 0x1234]), Ok(0));
    assert_eq!(g.call(Hypercall::GetDebugreg, &[2]), Ok(0x1234));
    assert_eq!(g.call(Hypercall::SetDebugreg, &[2, 0xffff_8300_0000_0000]), errno(Errno::EPERM));
    assert_eq!(g.call(Hypercall::SetDebugreg, &[7, 1 << 32]), errno(Errno::EINVAL));
    assert_eq!(g.call(Hypercall::SetDebugreg, &[8, 0]), errno(Errno::ENODEV));
    assert_eq!(g.call(Hypercall::GetDebugreg, &[8]), errno(Errno::ENODEV));
}

#[test]
fn vm_assists() {
    let mut g = guest();
    for kind in 0..=5 {
        assert_eq!(g.call(Hypercall::VmAssist, &[0, kind]), Ok(0));
    }
    assert_eq!(g.current().domain().vm_assist.load(Ordering::Relaxed), 0x3f);
    assert_eq!(g.call(Hypercall::VmAssist, &[1, 0]), Ok(0));
    assert_eq!(g.current().domain().vm_assist.load(Ordering::Relaxed), 0x3e);
    assert_eq!(g.call(Hypercall::VmAssist, &[0, 6]), errno(Errno::EINVAL));
    assert_eq!(g.call(Hypercall::VmAssist, &[2, 2]), errno(Errno::ENOSYS));
}

const CODE64: u64 = 0x00af_9b00_0000_ffff;

#[test]
fn a_gdt_is_checked_and_held() {
    let mut g = guest();
    let frame = g.frames[20];
    let descriptors: Vec<u64> = [0, 0, CODE64].into_iter().chain([0; 509]).collect();
    g.put_words(20 << 12, &descriptors);
    g.put_words(DATA, &[frame.get()]);
    // Mapped writable: it cannot become a page of descriptors.
    assert_eq!(g.call(Hypercall::SetGdt, &[DATA, 16]), errno(Errno::EINVAL));
    let entry = frame.get() << 12;
    assert_eq!(g.call(Hypercall::UpdateVaMapping, &[20 << 12, entry | RO, 2]), Ok(0));
    assert_eq!(g.call(Hypercall::SetGdt, &[DATA, 16]), Ok(0));
    assert_eq!(g.hv.mm.type_word(frame).unwrap().kind(), Kind::SegDesc);
    let word = |g: &Guest, i: usize| g.hv.platform.frame(frame)[i].load(Ordering::SeqCst);
    assert_eq!(word(&g, 2), CODE64 | 3 << 45, "privilege 3 is forced");
    assert!(g.call(Hypercall::UpdateVaMapping, &[20 << 12, entry | RW, 2]).is_err());
    // Its code segment is one in which the guest's kernel is emulated.
    g.state().regs.cs = 0x13;
    g.privileged(&[0x0f, 0x06]);
    assert_eq!(g.state().regs.rip, CODE + 2);
    // A forbidden descriptor is refused, an allowed one written.
    assert_eq!(g.call(Hypercall::UpdateDescriptor, &[entry + 24, 1 << 47 | 9 << 40]), errno(Errno::EINVAL));
    assert_eq!(g.call(Hypercall::UpdateDescriptor, &[entry + 24, CODE64]), Ok(0));
    assert_eq!(word(&g, 3), CODE64 | 3 << 45);
    assert_eq!(g.call(Hypercall::UpdateDescriptor, &[entry + 25, 0]), errno(Errno::EINVAL));
    let l1 = g.l1.get() << 12;
    assert_eq!(g.call(Hypercall::UpdateDescriptor, &[l1, 0]), errno(Errno::EINVAL));
    assert_eq!(g.call(Hypercall::UpdateDescriptor, &[0, 0]), errno(Errno::EINVAL), "not the guest's frame");
    // Too many entries, a list that is not there, the end of it.
    assert_eq!(g.call(Hypercall::SetGdt, &[DATA, 7169]), errno(Errno::EINVAL));
    assert_eq!(g.call(Hypercall::SetGdt, &[0x10_0000, 1]), errno(Errno::EFAULT));
    assert_eq!(g.call(Hypercall::SetGdt, &[DATA, 0]), Ok(0));
    assert_eq!(
        g.call(Hypercall::UpdateVaMapping, &[20 << 12, entry | RW, 2]),
        Ok(0),
        "the frame is free again"
    );
}

#[test]
fn segment_bases() {
    let mut g = guest();
    for (which, base) in [(0, 0x111), (1, 0x222), (2, 0x333)] {
        assert_eq!(g.call(Hypercall::SetSegmentBase, &[which, base]), Ok(0));
        assert_eq!(g.call(Hypercall::SetSegmentBase, &[which, 1 << 47]), errno(Errno::EINVAL));
    }
    let s = g.state();
    assert_eq!((s.fs_base, s.gs_base_user, s.gs_base_kernel), (0x111, 0x222, 0x333));
    assert_eq!(g.call(Hypercall::SetSegmentBase, &[3, 0xe02b]), Ok(0));
    assert_eq!((g.state().selectors.gs, g.state().gs_base_user), (0xe02b, 0));
    // One that cannot be loaded becomes null, without an error.
    assert_eq!(g.call(Hypercall::SetSegmentBase, &[3, 0x2b]), Ok(0));
    assert_eq!((g.state().selectors.gs, g.state().gs_base_kernel), (0, 0x333));
    assert_eq!(g.call(Hypercall::SetSegmentBase, &[4, 0]), errno(Errno::EINVAL));
}

#[test]
fn task_switched_raises_no_device_once() {
    let mut g = guest();
    g.handle(7, 0);
    assert_eq!(g.call(Hypercall::FpuTaskswitch, &[1]), Ok(0));
    g.exception(7, 0, 0);
    assert_eq!(g.state().regs.rip, HANDLER + 7);
    assert!(!g.state().task_switched);
    g.state().regs.rip = CODE;
    g.exception(7, 0, 0);
    assert_eq!(g.state().regs.rip, CODE, "a stale one is nobody's");
}

// ── LDT ──

#[test]
fn ldt_pages_come_in_when_the_processor_misses_them() {
    use crate::x86::layout::{DESCRIPTOR_WINDOWS, LDT_PAGE, PAGE_SIZE};
    let mut g = guest();
    g.handle(14, 0);
    g.handle(GP, 0);
    let frame = g.frames[20];
    g.put_words(20 << 12, &[0; 512]);
    let entry = frame.get() << 12;
    assert_eq!(g.call(Hypercall::UpdateVaMapping, &[20 << 12, entry | RO, 2]), Ok(0));
    g.state().ldt.base = 20 << 12;
    g.state().ldt.entries = 4;
    let window = DESCRIPTOR_WINDOWS + LDT_PAGE * PAGE_SIZE;
    g.exception(14, 0, window + 8);
    assert_eq!(g.state().regs.rip, CODE, "executed again");
    assert_eq!(g.state().ldt.frames[0], Some(frame));
    assert_eq!(g.hv.mm.type_word(frame).unwrap().kind(), Kind::SegDesc);
    // Behind its end: a page fault at the address the guest knows.
    g.exception(14, 0, window + 0x100);
    assert_eq!((g.state().regs.rip, g.info(2)), (HANDLER + 14, (20 << 12) + 0x100));
    // Behind the GDT: a general protection fault with the selector.
    g.exception(14, 0, DESCRIPTOR_WINDOWS + 0x123);
    assert_eq!(g.state().regs.rip, HANDLER + 13);
    // The same address touched by the guest itself is an ordinary page fault.
    g.exception(14, 4, window + 8);
    assert_eq!((g.state().regs.rip, g.info(2)), (HANDLER + 14, window + 8));
}

// ── version and console ──

#[test]
fn version_queries() {
    let mut g = guest();
    assert_eq!(g.call(Hypercall::XenVersion, &[0, 0]), Ok(0x4_0011));
    assert_eq!(g.call(Hypercall::XenVersion, &[1, DATA]), Ok(0));
    assert_eq!(&g.words::<1>(DATA)[0].to_le_bytes(), b".0-xenol");
    assert_eq!(g.call(Hypercall::XenVersion, &[3, DATA]), Ok(0));
    assert_eq!(&g.words::<2>(DATA)[1].to_le_bytes(), b"x86_64 \0");
    assert_eq!(g.call(Hypercall::XenVersion, &[5, DATA]), Ok(0));
    assert_eq!(g.words(DATA), [0xffff_8000_0000_0000]);
    g.put_words(DATA, &[0]);
    assert_eq!(g.call(Hypercall::XenVersion, &[6, DATA]), Ok(0));
    assert_eq!(g.words::<1>(DATA)[0] >> 32, 1 << 5 | 1 << 6 | 1 << 7 | 1 << 13 | 1 << 17);
    assert_eq!(g.call(Hypercall::VmAssist, &[0, 3]), Ok(0));
    assert_eq!(g.call(Hypercall::XenVersion, &[6, DATA]), Ok(0));
    assert_ne!(g.words::<1>(DATA)[0] >> 32 & 1 << 4, 0);
    g.put_words(DATA, &[1]);
    assert_eq!(g.call(Hypercall::XenVersion, &[6, DATA]), errno(Errno::EINVAL));
    assert_eq!(g.call(Hypercall::XenVersion, &[7, 0]), Ok(4096));
    assert_eq!(g.call(Hypercall::XenVersion, &[7, DATA]), errno(Errno::EINVAL));
    assert_eq!(g.call(Hypercall::XenVersion, &[8, DATA]), Ok(0));
    g.hv.command_line.call_once(|| "dom0_mem=1G");
    assert_eq!(g.call(Hypercall::XenVersion, &[9, DATA]), Ok(0));
    assert_eq!(&g.words::<1>(DATA)[0].to_le_bytes(), b"<denied>", "not for everybody");
    assert_eq!(g.call(Hypercall::XenVersion, &[10, DATA]), errno(Errno::EPERM));
    assert_eq!(g.call(Hypercall::XenVersion, &[11, DATA]), errno(Errno::ENOSYS));
    assert_eq!(g.call(Hypercall::XenVersion, &[1, 0x10_0000]), errno(Errno::EFAULT));
}

#[test]
fn the_console_is_for_those_with_the_right() {
    let mut g = guest();
    assert_eq!(g.call(Hypercall::ConsoleIo, &[0, 5, DATA]), errno(Errno::EPERM));
    let mut g = guest_with(Rights::all(24));
    let text: Vec<u8> = (0..300u32).map(|i| b'a' + (i % 26) as u8).collect();
    g.put(DATA, &text);
    let mut args = [0, 300, DATA, 0, 0, 0];
    loop {
        g.state().budget = Budget::new(1);
        match g.call(Hypercall::ConsoleIo, &args) {
            Ok(0) => break,
            Err(Exit::Preempted(next)) => args = next,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(*g.hv.platform.console.lock(), text);
    assert_eq!(g.call(Hypercall::ConsoleIo, &[0, 5, 0x10_0000]), errno(Errno::EFAULT));
    assert_eq!(g.call(Hypercall::ConsoleIo, &[1, 1 << 31, DATA]), errno(Errno::E2BIG));
    assert_eq!(g.call(Hypercall::ConsoleIo, &[1, 10, DATA]), Ok(0));
    assert_eq!(g.call(Hypercall::ConsoleIo, &[2, 0, 0]), errno(Errno::ENOSYS));
}

#[test]
fn physdev_op_knows_the_domains_own_pins() {
    let mut g = guest();
    g.put_words(DATA, &[4]);
    assert_eq!(g.call(Hypercall::PhysdevOp, &[6, DATA]), errno(Errno::EINVAL));
    g.put_words(DATA, &[DATA, 0x1_0001]);
    assert_eq!(g.call(Hypercall::PhysdevOp, &[7, DATA]), errno(Errno::EINVAL));
    g.put_words(DATA, &[0xffff_8000_0000_0000, 1]);
    assert_eq!(g.call(Hypercall::PhysdevOp, &[7, DATA]), errno(Errno::EINVAL));
    g.put_words(DATA, &[3]);
    assert_eq!(g.call(Hypercall::PhysdevOp, &[12, DATA]), errno(Errno::EINVAL), "not bound");
    assert_eq!(g.call(Hypercall::PhysdevOp, &[5, DATA]), Ok(0));
    assert_eq!(g.words(DATA), [3 | 1 << 32]);
    g.put_words(DATA, &[99]);
    assert_eq!(g.call(Hypercall::PhysdevOp, &[5, DATA]), errno(Errno::EINVAL));
    // The old form: a number, and the argument 8 bytes on.
    g.put_words(DATA, &[6, 1]);
    assert_eq!(g.call(Hypercall::PhysdevOpCompat, &[DATA]), Ok(0));
    assert_eq!(g.state().iopl, 1);
    g.put_words(DATA, &[12, 1]);
    assert_eq!(g.call(Hypercall::PhysdevOpCompat, &[DATA]), errno(Errno::EINVAL), "not bound");
    g.put_words(DATA, &[1000, 1]);
    assert_eq!(g.call(Hypercall::PhysdevOpCompat, &[DATA]), errno(Errno::ENOSYS));
    // get_free_pirq: a global interrupt, then one past the pins, each number once.
    for wanted in [16, 17] {
        g.put_words(DATA, &[1]);
        assert_eq!(g.call(Hypercall::PhysdevOp, &[23, DATA]), Ok(0));
        assert_eq!(g.words(DATA), [1 | wanted << 32]);
    }
    g.put_words(DATA, &[0]);
    assert_eq!(g.call(Hypercall::PhysdevOp, &[23, DATA]), Ok(0));
    assert_eq!(g.words(DATA), [511 << 32]);
    // map_pirq: own domain, interrupt pin 5, any number.
    let request = [0x7ff0 | 1 << 32, 5 | 0xffff_ffff << 32, 0, 0, 0];
    g.put_words(DATA, &request);
    assert_eq!(g.call(Hypercall::PhysdevOp, &[13, DATA]), errno(Errno::EPERM));
    assert_eq!(g.call(Hypercall::PhysdevOp, &[25, DATA]), errno(Errno::EPERM));
    let mut g = guest_with(Rights::all(24));
    g.put_words(DATA, &request);
    assert_eq!(g.call(Hypercall::PhysdevOp, &[13, DATA]), Ok(0));
    assert_eq!(g.words::<2>(DATA)[1], 5 | 5 << 32);
    // What was mapped can be unmapped, once.
    g.put_words(DATA, &[0x7ff0 | 5 << 32]);
    assert_eq!(g.call(Hypercall::PhysdevOp, &[14, DATA]), Ok(0));
    assert_eq!(g.call(Hypercall::PhysdevOp, &[14, DATA]), errno(Errno::EINVAL));
    g.put_words(DATA, &[request[0], 24, 0, 0, 0]);
    assert_eq!(g.call(Hypercall::PhysdevOp, &[13, DATA]), errno(Errno::EINVAL));
    g.put_words(DATA, &[0x1234 | 1 << 32, 5, 0, 0, 0]);
    assert_eq!(g.call(Hypercall::PhysdevOp, &[13, DATA]), errno(Errno::ESRCH));
}

#[test]
fn a_selector_that_cannot_be_loaded_any_more_calls_the_failsafe_callback() {
    let mut g = guest();
    g.state().callbacks.failsafe = Callback { address: HANDLER, mask_events: true };
    g.state().selectors.ds = 0x63;
    g.state().selectors.gs = 0x2b;
    g.hv.platform.bad_selector.store(0x63, Ordering::SeqCst);
    // Off the CPU and on again.
    let Current { vcpu, state } = g.cpu.current.take().unwrap();
    *vcpu.parked.lock() = Some(state);
    g.hv.wake(&vcpu);
    g.hv.prepare_resume(&mut g.cpu);
    let state = g.state();
    assert_eq!((state.regs.rip, state.regs.rsp, state.selectors.ds), (HANDLER, STACK - 88, 0));
    let [rcx, r11, ds, es, fs, gs, rip, cs, rflags, rsp, ss] = g.words(STACK - 88);
    assert_eq!((ds, es, fs, gs), (0x63, 0, 0, 0x2b));
    assert_eq!(
        (rip, cs & 0xffff, rflags, rsp, ss),
        (CODE, u64::from(KERNEL_CS & !3), 0x202, STACK, u64::from(KERNEL_SS))
    );
    let _ = (rcx, r11);
}
