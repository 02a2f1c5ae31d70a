//! Exceptions, system calls, the return to guest code, debug registers, emulated instructions, segments.
#![no_std]
#![no_main]

extern crate alloc;

use conformance::{NOWHERE, TablePage, at, call, mmuext, protect, pte, shared};
use core::sync::atomic::{AtomicU64, Ordering};
use guest_sdk::abi::physdev::PhysdevSetIopl;
use guest_sdk::abi::subops::{MmuextCmd, PhysdevOp};
use guest_sdk::abi::vcpu::TrapInfo;
use guest_sdk::abi::{Errno, Hypercall, Mfn};
use guest_sdk::memory::{self, Access, Page, Range};
use guest_sdk::rt::trap::Exception;
use guest_sdk::testkit::{
    self, Stop, TrapFrame, Verdict, cases, check, check_eq, expect_errno, expect_vector, probe, set_handler,
    try_read, try_write, user,
};
use guest_sdk::{Domain, entry};

#[entry]
fn main(domain: Domain) {
    testkit::run(
        domain,
        &cases![
            kernel_breakpoint,
            kernel_invalid_instruction,
            kernel_divide_error,
            kernel_general_protection,
            kernel_page_fault_read,
            kernel_page_fault_write,
            kernel_page_fault_execute,
            kernel_software_interrupt,
            kernel_software_interrupt_without_gate,
            kernel_single_step,
            user_system_call,
            user_invalid_instruction,
            user_breakpoint,
            user_page_fault,
            user_general_protection,
            user_software_interrupt,
            user_interrupt_of_the_kernel,
            user_cannot_call_the_hypervisor,
            user_sees_not_the_kernel,
            user_cannot_touch_ports,
            user_registers_survive,
            iret_bad_selector_faults,
            iret_restores_flags,
            iret_unmasks_events,
            trap_table_entry_is_used,
            trap_table_can_be_cleared,
            trap_table_bad_address,
            fpu_taskswitch_raises_no_device,
            debugreg_write_and_read,
            debugreg_breakpoint_fires,
            debugreg_refuses_hypervisor_addresses,
            debugreg_unknown,
            emulated_control_registers,
            emulated_clts,
            emulated_msr_read,
            emulated_msr_write,
            emulated_msr_unknown,
            emulated_ports,
            emulated_in_32_bit_code,
            ports_that_nobody_has,
            ports_behind_an_index,
            ports_of_the_third_counter,
            emulated_cpuid_forced,
            emulated_wbinvd,
            emulated_xgetbv,
            refused_instructions,
            segment_base,
            segment_base_is_set_alone,
            segment_base_bad_address,
            segment_base_user_gs_selector,
            gdt_is_replaced,
            gdt_bad_arguments,
            descriptor_is_written,
            descriptor_refused,
            ldt_is_loaded,
            ldt_pages_are_brought_in,
            ldt_page_that_is_not_there,
            ldt_bad_arguments,
            stack_switch_moves_the_entry_stack,
            syscall_clears_no_guest_register,
        ],
    )
}

fn kernel_breakpoint(_: &mut Domain) -> Verdict {
    expect_vector(probe!("int3"), 3, 0)
}

fn kernel_invalid_instruction(_: &mut Domain) -> Verdict {
    expect_vector(probe!("ud2"), 6, 0)
}

fn kernel_divide_error(_: &mut Domain) -> Verdict {
    expect_vector(probe!(rax = 1, "div ecx"; in("ecx") 0, inout("edx") 0 => _), 0, 0)
}

fn kernel_general_protection(_: &mut Domain) -> Verdict {
    expect_vector(try_read(1 << 63), 13, 0)?;
    // A selector behind the end of the table: the error code is the selector.
    expect_vector(probe!("mov fs, {x:e}"; x = in(reg) 0xfff8u32), 13, 0xfff8)
}

fn kernel_page_fault_read(_: &mut Domain) -> Verdict {
    for address in [8, NOWHERE + 0x123, 0xffff_8880_0000_0000] {
        // The kernel's own access: the user bit is clear, though the processor ran in ring 3.
        expect_vector(try_read(address), 14, 0)?;
        check_eq!(testkit::fault_address(), address);
    }
    Ok(())
}

fn kernel_page_fault_write(_: &mut Domain) -> Verdict {
    // SAFETY: nothing is there.
    expect_vector(unsafe { try_write(NOWHERE, 1) }, 14, 2)?;
    let page = Page::new()?;
    protect(&page, false)?;
    // SAFETY: a page of this case.
    let refused = unsafe { try_write(page.address() + 16, 1) };
    protect(&page, true)?;
    expect_vector(refused, 14, 3)?;
    check_eq!(testkit::fault_address(), page.address() + 16);
    check_eq!(try_read(page.address() + 16), Ok(0));
    Ok(())
}

static EXECUTED: AtomicU64 = AtomicU64::new(0);

/// A fault at the instruction itself, reached by a call: returns from it.
fn return_from_call(frame: &mut TrapFrame) -> bool {
    EXECUTED.store(frame.error | 1 << 63, Ordering::Relaxed);
    // SAFETY: the call pushed its return address there.
    frame.rip = unsafe { *(frame.rsp as *const u64) };
    frame.rsp += 8;
    true
}

fn kernel_page_fault_execute(_: &mut Domain) -> Verdict {
    let page = Page::new()?;
    for (address, error) in [(page.address(), 0x11), (NOWHERE, 0x10)] {
        EXECUTED.store(0, Ordering::Relaxed);
        set_handler(14, Some(return_from_call));
        // SAFETY: the handler makes it return at once; a data page is not executable.
        unsafe { core::arch::asm!("call {}", in(reg) address, clobber_abi("sysv64")) };
        set_handler(14, None);
        check_eq!(EXECUTED.load(Ordering::Relaxed), error | 1 << 63, "address {address:#x}");
        check_eq!(testkit::fault_address(), address);
    }
    Ok(())
}

fn kernel_software_interrupt(_: &mut Domain) -> Verdict {
    expect_vector(probe!("int 0x80"), 128, 0)?;
    expect_vector(probe!("int 0x20"), 32, 0)?;
    // The kernel is privilege 1: gates of privilege 0 are for the processor alone.
    expect_vector(probe!("int 6"), 13, 6 << 3 | 2)
}

fn kernel_software_interrupt_without_gate(_: &mut Domain) -> Verdict {
    for (result, vector) in
        [(probe!("int 0x21"), 0x21), (probe!("int 0x81"), 0x81), (probe!("int 0xff"), 0xff)]
    {
        expect_vector(result, 13, vector << 3 | 2)?;
    }
    Ok(())
}

static STEPPED: AtomicU64 = AtomicU64::new(0);

fn stop_stepping(frame: &mut TrapFrame) -> bool {
    STEPPED.store(frame.rip, Ordering::Relaxed);
    frame.rflags &= !0x100;
    true
}

fn kernel_single_step(_: &mut Domain) -> Verdict {
    let after: u64;
    set_handler(1, Some(stop_stepping));
    STEPPED.store(0, Ordering::Relaxed);
    // SAFETY: the trap comes after the first instruction behind popf; the handler clears the flag.
    unsafe {
        core::arch::asm!(
            "pushfq", "or qword ptr [rsp], 0x100", "popfq",
            "lea {after}, [rip + 2f]",
            "2: nop",
            after = out(reg) after, out("rax") _, out("rcx") _, out("r11") _,
        );
    }
    set_handler(1, None);
    check_eq!(STEPPED.load(Ordering::Relaxed), after);
    Ok(())
}

/// Code and data of guest-user mode, and the registers to start at its first byte.
fn user_code(code: &[u8]) -> Result<(user::Space, TrapFrame), testkit::Stop> {
    let mut space = user::Space::new()?;
    let mut text = Page::new()?;
    text.bytes_mut()[..code.len()].copy_from_slice(code);
    space.map(TEXT, text, Access::ReadExecute)?;
    space.map(DATA, Page::new()?, Access::ReadWrite)?;
    Ok((space, user::registers(TEXT, DATA + 0x800)))
}

/// The selectors that user code starts with.
const USER_CS: u64 = 0xe033;
const USER_SS: u64 = 0xe02b;

const TEXT: u64 = 0x1000_0000;
const DATA: u64 = 0x1100_0000;

/// Runs user code, through upcalls, until it comes back with something else.
fn run(space: &user::Space, frame: &TrapFrame) -> Result<TrapFrame, testkit::Stop> {
    let mut back = user::run(space, frame)?;
    while user::exit_of(&back) == user::Exit::Upcall {
        guest_sdk::events::turn();
        back = user::run(space, &back)?;
    }
    Ok(back)
}

/// Runs user code and expects this exception, at this distance from its start.
fn user_raises(code: &[u8], vector: u64, error: u64, at: u64) -> Result<TrapFrame, testkit::Stop> {
    let (space, frame) = user_code(code)?;
    let back = run(&space, &frame)?;
    check_eq!((back.vector, back.error, back.rip), (vector, error, TEXT + at), "vector, error code, rip");
    check!(back.from_user());
    check_eq!(back.rsp, frame.rsp, "rsp");
    Ok(back)
}

fn user_system_call(_: &mut Domain) -> Verdict {
    // mov eax, 0x1234; syscall; syscall
    let (space, mut frame) = user_code(&[0xb8, 0x34, 0x12, 0, 0, 0x0f, 0x05, 0x0f, 0x05])?;
    frame.rdi = 7;
    frame.r10 = 8;
    frame.r9 = 9;
    let back = run(&space, &frame)?;
    check_eq!(user::exit_of(&back), user::Exit::SystemCall);
    check_eq!((back.rax, back.rdi, back.r10, back.r9), (0x1234, 7, 8, 9));
    check_eq!(back.rip, TEXT + 7);
    check_eq!(back.rsp, frame.rsp);
    check_eq!(back.cs & 3, 3);
    // And on from there.
    let back = run(&space, &back)?;
    check_eq!((user::exit_of(&back), back.rip), (user::Exit::SystemCall, TEXT + 9));
    Ok(())
}

fn user_invalid_instruction(_: &mut Domain) -> Verdict {
    user_raises(&[0x90, 0x0f, 0x0b], 6, 0, 1).map(drop)
}

fn user_breakpoint(_: &mut Domain) -> Verdict {
    user_raises(&[0xcc], 3, 0, 1).map(drop)
}

fn user_page_fault(_: &mut Domain) -> Verdict {
    // mov [rax], rax with rax = 0; then the same by reading.
    user_raises(&[0x31, 0xc0, 0x48, 0x89, 0x00], 14, 6, 2)?;
    check_eq!(testkit::fault_address(), 0);
    user_raises(&[0x31, 0xc0, 0x48, 0x8b, 0x00], 14, 4, 2)?;
    // Its own code is not writable: lea rax, [rip]; mov [rax], eax
    user_raises(&[0x48, 0x8d, 0x05, 0, 0, 0, 0, 0x89, 0x00], 14, 7, 7)?;
    check_eq!(testkit::fault_address(), TEXT + 7);
    // Its data is not executable: mov eax, DATA; jmp rax
    let (space, frame) = user_code(&[0xb8, 0, 0, 0, 0x11, 0xff, 0xe0])?;
    let back = run(&space, &frame)?;
    check_eq!((back.vector, back.error, back.rip), (14, 0x15, DATA));
    Ok(())
}

fn user_general_protection(_: &mut Domain) -> Verdict {
    // hlt, cli, sti, mov cr0, rdmsr, lgdt: nothing of that is emulated for user mode.
    for code in [
        &[0xf4][..],
        &[0xfa],
        &[0xfb],
        &[0x0f, 0x20, 0xc0],
        &[0x0f, 0x32],
        &[0x0f, 0x01, 0x10],
        &[0x0f, 0x06],
    ] {
        user_raises(code, 13, 0, 0)?;
    }
    Ok(())
}

fn user_software_interrupt(_: &mut Domain) -> Verdict {
    user_raises(&[0xcd, 0x80], 128, 0, 2)?;
    user_raises(&[0xcd, 0x20], 32, 0, 2).map(drop)
}

fn user_interrupt_of_the_kernel(_: &mut Domain) -> Verdict {
    // Gates of privilege 0, and no gate at all.
    for vector in [0x06u8, 0x0e, 0x21, 0x82] {
        user_raises(&[0xcd, vector], 13, u64::from(vector) << 3 | 2, 0)?;
    }
    Ok(())
}

fn user_cannot_call_the_hypervisor(_: &mut Domain) -> Verdict {
    // SYSCALL from user mode is the guest kernel's, whatever is in rax: a shutdown, say.
    // mov eax, 29; mov edi, 2; syscall
    let (space, frame) = user_code(&[0xb8, 29, 0, 0, 0, 0xbf, 2, 0, 0, 0, 0x0f, 0x05])?;
    let back = run(&space, &frame)?;
    check_eq!((user::exit_of(&back), back.rax, back.rdi), (user::Exit::SystemCall, 29, 2));
    Ok(())
}

fn user_sees_not_the_kernel(_: &mut Domain) -> Verdict {
    // mov rax, [rdi]: the kernel's page is in no table of the user's.
    let (space, mut frame) = user_code(&[0x48, 0x8b, 0x07])?;
    for address in [shared() as u64, 0xffff_8300_0000_0000, 0xffff_82d0_4000_0000] {
        frame.rdi = address;
        let back = run(&space, &frame)?;
        check_eq!((back.vector, back.error & !1, back.rip), (14, 4, TEXT), "{address:#x}");
        check_eq!(testkit::fault_address(), address);
    }
    Ok(())
}

fn user_cannot_touch_ports(_: &mut Domain) -> Verdict {
    // in al, 0x71; out 0x70, al
    user_raises(&[0xe4, 0x71], 13, 0, 0)?;
    user_raises(&[0xe6, 0x70], 13, 0, 0).map(drop)
}

fn user_registers_survive(_: &mut Domain) -> Verdict {
    let (space, mut frame) = user_code(&[0x0f, 0x0b])?;
    frame.rax = 1;
    frame.rbx = 2;
    frame.rcx = 3;
    frame.rdx = 4;
    frame.rsi = 5;
    frame.rdi = 6;
    frame.rbp = 7;
    frame.r8 = 8;
    frame.r9 = 9;
    frame.r10 = 10;
    frame.r11 = 11;
    frame.r12 = 12;
    frame.r13 = 13;
    frame.r14 = 14;
    frame.r15 = 15;
    let back = run(&space, &frame)?;
    let list = |f: &TrapFrame| {
        [
            f.rax, f.rbx, f.rcx, f.rdx, f.rsi, f.rdi, f.rbp, f.r8, f.r9, f.r10, f.r11, f.r12, f.r13, f.r14,
            f.r15,
        ]
    };
    check_eq!(list(&back), list(&frame));
    Ok(())
}

fn iret_bad_selector_faults(_: &mut Domain) -> Verdict {
    let (space, mut frame) = user_code(&[0x0f, 0x0b])?;
    // An empty slot of the hypervisor's part of the table: the return itself faults, and the kernel hears of it.
    frame.cs = 0xe0fb;
    let back = run(&space, &frame)?;
    check_eq!((back.vector, back.error), (13, 0xe0f8));
    check_eq!(back.rip, TEXT);
    Ok(())
}

fn iret_restores_flags(_: &mut Domain) -> Verdict {
    // pushfq; pop rax; ud2
    let (space, mut frame) = user_code(&[0x9c, 0x58, 0x0f, 0x0b])?;
    for (given, seen) in [
        // Carry, zero, sign, overflow, direction, the nested-task and ID flags are its own.
        (0x202 | 0x1, 0x202 | 0x1),
        (0x202 | 0xcd5, 0x202 | 0xcd5),
        (0x202 | 1 << 21, 0x202 | 1 << 21),
        // The processor's interrupt flag is on and its I/O privilege is none, whatever the frame says.
        (0x2, 0x202),
        (0x3202, 0x202),
    ] {
        frame.rflags = given;
        let back = run(&space, &frame)?;
        check_eq!((back.vector, back.rip), (6, TEXT + 2));
        check_eq!(back.rax & !0x44 | seen & 0x44, seen, "flags of {given:#x}");
    }
    Ok(())
}

fn iret_unmasks_events(domain: &mut Domain) -> Verdict {
    // User code runs with events on: one that is pending comes before its first instruction, from user mode.
    let port = domain.events.bind_ipi()?;
    let (space, frame) = user_code(&[0x0f, 0x0b])?;
    port.notify()?;
    let back = user::run(&space, &frame)?;
    check_eq!((user::exit_of(&back), back.rip), (user::Exit::Upcall, TEXT));
    check!(port.poll());
    let back = run(&space, &back)?;
    check_eq!((back.vector, back.rip), (6, TEXT));
    Ok(())
}

static OWN_TRAP: AtomicU64 = AtomicU64::new(0);

conformance::counting_handler! {
    /// Counts and goes on behind the instruction: `int n` reports the next one.
    own_trap: OWN_TRAP
}

fn trap_table(list: &mut [TrapInfo]) -> Result<u64, Errno> {
    call(Hypercall::SetTrapTable, [list.as_mut_ptr() as u64, 0, 0, 0, 0])
}

fn own_entry(vector: u8, flags: u8) -> TrapInfo {
    TrapInfo { vector, flags, cs: 0xe033, pad0: 0, address: own_trap as *const () as u64 }
}

fn trap_table_entry_is_used(_: &mut Domain) -> Verdict {
    let before = OWN_TRAP.load(Ordering::Relaxed);
    check_eq!(trap_table(&mut [own_entry(0x41, 3), own_entry(0x42, 1), TrapInfo::default()]), Ok(0));
    check_eq!(probe!("int 0x41"), Ok(()));
    check_eq!(OWN_TRAP.load(Ordering::Relaxed), before + 1);
    // Privilege 1 is the kernel's.
    check_eq!(probe!("int 0x42"), Ok(()));
    check_eq!(OWN_TRAP.load(Ordering::Relaxed), before + 2);
    user_raises(&[0xcd, 0x42], 13, 0x42 << 3 | 2, 0)?;
    // What the list does not name stays as it was.
    expect_vector(probe!("ud2"), 6, 0)
}

fn trap_table_can_be_cleared(_: &mut Domain) -> Verdict {
    check_eq!(trap_table(&mut [own_entry(0x43, 3), TrapInfo::default()]), Ok(0));
    check_eq!(probe!("int 0x43"), Ok(()));
    // No list at all clears the whole table; then everything is registered anew, from the SDK's own stubs.
    let mut saved = [TrapInfo::default(); 257];
    let mut count = 0;
    for (vector, address, privilege) in guest_sdk::rt::trap::vectors() {
        saved[count] = TrapInfo { vector, flags: privilege | 4, cs: 0xe033, pad0: 0, address };
        count += 1;
    }
    check_eq!(call(Hypercall::SetTrapTable, [0; 5]), Ok(0));
    check_eq!(trap_table(&mut saved[..=count]), Ok(0));
    expect_vector(probe!("int 0x43"), 13, 0x43 << 3 | 2)
}

fn trap_table_bad_address(_: &mut Domain) -> Verdict {
    check_eq!(call(Hypercall::SetTrapTable, [NOWHERE, 0, 0, 0, 0]), Err(Errno::EFAULT));
    let mut bad = [TrapInfo { address: 1 << 47, ..own_entry(0x44, 3) }, TrapInfo::default()];
    expect_errno(trap_table(&mut bad), Errno::EINVAL)
}

fn fpu_taskswitch_raises_no_device(_: &mut Domain) -> Verdict {
    let set = |on: u64| call(Hypercall::FpuTaskswitch, [on, 0, 0, 0, 0]);
    check_eq!(set(1), Ok(0));
    let first = probe!("fldz", "fstp st(0)");
    // The fault has cleared it.
    let second = probe!("fldz", "fstp st(0)");
    check_eq!(set(0), Ok(0));
    expect_vector(first, 7, 0)?;
    check_eq!(second, Ok(()));
    Ok(())
}

fn set_debugreg(register: u64, value: u64) -> Result<u64, Errno> {
    call(Hypercall::SetDebugreg, [register, value, 0, 0, 0])
}

fn get_debugreg(register: u64) -> u64 {
    // A value may look like an error number.
    // SAFETY: a read of a register.
    unsafe { guest_sdk::hypercall::raw(Hypercall::GetDebugreg.number(), [register, 0, 0, 0, 0]) }
}

fn debugreg_write_and_read(_: &mut Domain) -> Verdict {
    for register in 0..4 {
        check_eq!(set_debugreg(register, 0x1234_5000 + register), Ok(0));
        check_eq!(get_debugreg(register), 0x1234_5000 + register, "dr{register}");
    }
    check_eq!(set_debugreg(6, 0), Ok(0));
    check_eq!(get_debugreg(6) & 0xe00f, 0, "dr6 {:#x}", get_debugreg(6));
    check_eq!(set_debugreg(7, 0x400), Ok(0));
    for register in 0..4 {
        check_eq!(set_debugreg(register, 0), Ok(0));
    }
    Ok(())
}

static BROKE: AtomicU64 = AtomicU64::new(0);

fn broke(frame: &mut TrapFrame) -> bool {
    BROKE.fetch_add(1, Ordering::Relaxed);
    // Resume flag: the instruction runs this time.
    frame.rflags |= 1 << 16;
    true
}

fn debugreg_breakpoint_fires(_: &mut Domain) -> Verdict {
    static WORD: AtomicU64 = AtomicU64::new(0);
    BROKE.store(0, Ordering::Relaxed);
    check_eq!(set_debugreg(0, WORD.as_ptr() as u64), Ok(0));
    // Breakpoint 0, 8 bytes, writes.
    check_eq!(set_debugreg(7, 0x401 | 0b1001 << 16), Ok(0));
    set_handler(1, Some(broke));
    // SAFETY: a word of this case. One instruction, which the data breakpoint reports behind it.
    unsafe { core::arch::asm!("mov qword ptr [{}], 1", "nop", in(reg) WORD.as_ptr()) };
    let hits = BROKE.load(Ordering::Relaxed);
    let status = get_debugreg(6);
    check_eq!(set_debugreg(7, 0), Ok(0));
    check_eq!(set_debugreg(6, 0), Ok(0));
    WORD.store(2, Ordering::SeqCst);
    set_handler(1, None);
    check_eq!((hits, BROKE.load(Ordering::Relaxed)), (1, 1));
    check_eq!(status & 0xf, 1, "dr6 {status:#x}");
    Ok(())
}

fn debugreg_refuses_hypervisor_addresses(_: &mut Domain) -> Verdict {
    for address in [0xffff_8000_0000_0000u64, 0xffff_82d0_4000_0000, 0xffff_87ff_ffff_ffff] {
        check_eq!(set_debugreg(1, address), Err(Errno::EPERM), "{address:#x}");
        check_eq!(get_debugreg(1), 0);
    }
    check!(set_debugreg(1, 1 << 47).is_err(), "an address that is not canonical");
    Ok(())
}

fn debugreg_unknown(_: &mut Domain) -> Verdict {
    for register in [8, 9, 100] {
        check_eq!(get_debugreg(register), Errno::ENODEV.to_ret(), "dr{register}");
        check_eq!(set_debugreg(register, 0), Err(Errno::ENODEV), "dr{register}");
    }
    Ok(())
}

fn control_register(number: u32) -> Result<u64, testkit::Stop> {
    let value: u64;
    match number {
        0 => probe!("mov rax, cr0", "mov {v}, rax"; v = out(reg) value)?,
        2 => probe!("mov rax, cr2", "mov {v}, rax"; v = out(reg) value)?,
        3 => probe!("mov rax, cr3", "mov {v}, rax"; v = out(reg) value)?,
        _ => probe!("mov rax, cr4", "mov {v}, rax"; v = out(reg) value)?,
    };
    Ok(value)
}

fn emulated_control_registers(_: &mut Domain) -> Verdict {
    let cr0 = control_register(0)?;
    check_eq!(cr0 & 0x8000_0001, 0x8000_0001, "paging and protection");
    check_eq!(control_register(3)?, memory::root().address().get());
    check!(control_register(4)? & 0x20 != 0, "physical address extension");
    expect_vector(try_read(NOWHERE + 0x18), 14, 0)?;
    check_eq!(control_register(2)?, NOWHERE + 0x18);
    // Writing back what was read is allowed; TS can be set, other bits of CR0 cannot be changed.
    probe!(rax = cr0, "mov cr0, rax")?;
    probe!(rax = cr0 | 8, "mov cr0, rax")?;
    check_eq!(control_register(0)? & 8, 8, "TS");
    probe!(rax = cr0 & !8, "mov cr0, rax")?;
    check_eq!(control_register(0)?, cr0 & !8);
    probe!(rax = 0x1234, "mov cr2, rax")?;
    check_eq!(control_register(2)?, 0x1234);
    expect_vector(probe!(rax = cr0 & !1, "mov cr0, rax"), 13, 0)
}

fn emulated_clts(_: &mut Domain) -> Verdict {
    check_eq!(call(Hypercall::FpuTaskswitch, [1, 0, 0, 0, 0]), Ok(0));
    check_eq!(control_register(0)? & 8, 8);
    probe!("clts")?;
    check_eq!(control_register(0)? & 8, 0);
    check_eq!(probe!("fldz", "fstp st(0)"), Ok(()));
    Ok(())
}

fn read_msr(number: u32) -> Result<u64, Exception> {
    let (low, high): (u64, u64);
    probe!("rdmsr", "mov {low}, rax"; low = out(reg) low, in("ecx") number, out("rdx") high)?;
    Ok(low & 0xffff_ffff | high << 32)
}

fn write_msr(number: u32, value: u64) -> Result<(), Exception> {
    probe!(rax = value & 0xffff_ffff, "wrmsr"; in("ecx") number, in("edx") (value >> 32) as u32)
}

const EFER: u32 = 0xc000_0080;
const FS_BASE: u32 = 0xc000_0100;
const GS_BASE: u32 = 0xc000_0101;
const KERNEL_GS_BASE: u32 = 0xc000_0102;

fn emulated_msr_read(_: &mut Domain) -> Verdict {
    let efer = read_msr(EFER)?;
    check_eq!(efer & 0x500, 0x500, "long mode on and active");
    check_eq!(read_msr(FS_BASE)?, 0);
    Ok(())
}

fn fs_word() -> u64 {
    let value;
    // SAFETY: callers have set the base to a word.
    unsafe { core::arch::asm!("mov {}, fs:[0]", out(reg) value) };
    value
}

fn gs_word() -> u64 {
    let value;
    // SAFETY: as above.
    unsafe { core::arch::asm!("mov {}, gs:[0]", out(reg) value) };
    value
}

fn emulated_msr_write(_: &mut Domain) -> Verdict {
    let word = 0x55aau64;
    let address = (&raw const word) as u64;
    write_msr(FS_BASE, address)?;
    check_eq!((fs_word(), read_msr(FS_BASE)?), (word, address));
    write_msr(GS_BASE, address)?;
    check_eq!((gs_word(), read_msr(GS_BASE)?), (word, address));
    write_msr(KERNEL_GS_BASE, 0x1000)?;
    check_eq!(read_msr(KERNEL_GS_BASE)?, 0x1000);
    // A base that is not canonical faults as on the processor.
    expect_vector(write_msr(FS_BASE, 1 << 47), 13, 0)?;
    write_msr(FS_BASE, 0)?;
    write_msr(GS_BASE, 0)?;
    write_msr(KERNEL_GS_BASE, 0)?;
    Ok(())
}

fn emulated_msr_unknown(_: &mut Domain) -> Verdict {
    for number in [0x4000_1234, 0xdead_beef] {
        expect_vector(read_msr(number), 13, 0)?;
        expect_vector(write_msr(number, 0), 13, 0)?;
    }
    Ok(())
}

fn emulated_ports(_: &mut Domain) -> Verdict {
    // The clock chip's ports are the first domain's: its seconds, as two decimal digits.
    let value: u64;
    let iopl = |level: u32| conformance::physdev(PhysdevOp::SetIopl, &mut PhysdevSetIopl { iopl: level });
    check_eq!(iopl(0), Ok(0));
    expect_vector(probe!(rax = 0, "out 0x70, al"), 13, 0)?;
    check_eq!(iopl(1), Ok(0));
    probe!(rax = 0, "out 0x70, al")?;
    probe!("in al, 0x71", "mov {v}, rax"; v = out(reg) value)?;
    if conformance::is_privileged() {
        check!(value & 0xf < 10 && value >> 4 & 0xf < 6, "seconds {value:#x}");
    } else {
        check_eq!(value, 0xff, "a port of somebody else");
    }
    // The same through dx, and by words: what is no device's reads as ones.
    let wide: u64;
    probe!("in eax, dx", "mov {v}, rax"; v = out(reg) wide, in("dx") 0x1f0cu16)?;
    check_eq!(wide, 0xffff_ffff);
    // The serial port of the console is the hypervisor's, whoever asks: a read gives ones, a write does nothing.
    let status: u64;
    probe!(rax = 0, "in al, dx", "mov {v}, rax"; v = out(reg) status, in("dx") 0x3fdu16)?;
    check_eq!(status, 0xff);
    check_eq!(probe!(rax = u64::from(b'?'), "out dx, al"; in("dx") 0x3f8u16), Ok(()));
    check_eq!(iopl(0), Ok(0));
    Ok(())
}

fn port_in(port: u16, bytes: u32) -> Result<u64, Exception> {
    let value: u64;
    match bytes {
        1 => probe!("in al, dx", "mov {v}, rax"; v = out(reg) value, in("dx") port)?,
        2 => probe!("in ax, dx", "mov {v}, rax"; v = out(reg) value, in("dx") port)?,
        _ => probe!("in eax, dx", "mov {v}, rax"; v = out(reg) value, in("dx") port)?,
    }
    Ok(value)
}

fn port_out(port: u16, bytes: u32, value: u64) -> Result<(), Exception> {
    match bytes {
        1 => probe!(rax = value, "out dx, al"; in("dx") port),
        _ => probe!(rax = value, "out dx, eax"; in("dx") port),
    }
}

fn io_privilege(level: u32) -> Result<u64, Errno> {
    conformance::physdev(PhysdevOp::SetIopl, &mut PhysdevSetIopl { iopl: level })
}

fn ports_that_nobody_has(_: &mut Domain) -> Verdict {
    expect_vector(port_in(0x20, 1), 13, 0)?;
    io_privilege(1)?;
    // Interrupt controllers, the interval timer's first counters, the console's serial port.
    for port in [0x20, 0x21, 0xa0, 0xa1, 0x40, 0x41].into_iter().chain(0x3f8..0x400) {
        check_eq!(port_in(port, 1), Ok(0xff), "port {port:#x}");
    }
    // A port beside them that the first domain has: the keyboard controller's status, whose device is there.
    let status = port_in(0x64, 1)?;
    check_eq!(status == 0xff, !conformance::is_privileged(), "keyboard controller: {status:#x}");
    // Two at once, of which the second is nobody's.
    check_eq!(port_in(0x1f, 2), Ok(0xffff));
    check_eq!(io_privilege(0), Ok(0));
    Ok(())
}

fn ports_behind_an_index(_: &mut Domain) -> Verdict {
    io_privilege(1)?;
    // The index is everybody's own, the data are the first domain's. Register 10 of the clock says at which rate it runs.
    port_out(0x70, 1, 10)?;
    let (index, data) = (port_in(0x70, 1)?, port_in(0x71, 1)?);
    check_eq!(
        (index, data & 0x70),
        conformance::by_privilege((10, 0x20), (10, 0x70)),
        "the clock: {data:#x}"
    );
    // PCI: vendor and device of what is at 0:0.0.
    for (written, bytes, seen) in
        [(0x8000_0000u64, 4, 0x8000_0000u64), (0x8000_0008, 4, 0x8000_0008), (1, 1, 0x8000_0008)]
    {
        port_out(0xcf8, bytes, written)?;
        check_eq!(port_in(0xcf8, 4), Ok(seen), "after {bytes} bytes of {written:#x}");
    }
    port_out(0xcf8, 4, 0x8000_0000)?;
    let (whole, low, high) = (port_in(0xcfc, 4)?, port_in(0xcfc, 2)?, port_in(0xcfe, 2)?);
    if conformance::is_privileged() {
        check!(low != 0xffff && low != 0, "vendor {low:#x}");
    } else {
        check_eq!(low, 0xffff);
    }
    check_eq!(whole, low | high << 16);
    check_eq!(io_privilege(0), Ok(0));
    Ok(())
}

fn ports_of_the_third_counter(_: &mut Domain) -> Verdict {
    io_privilege(1)?;
    let before = port_in(0x61, 1)?;
    // Gate on, loudspeaker off; a square wave of 0x1000 ticks.
    port_out(0x61, 1, before & !3 | 1)?;
    let gate = port_in(0x61, 1)?;
    port_out(0x43, 1, 0xb6)?;
    port_out(0x42, 1, 0x00)?;
    port_out(0x42, 1, 0x10)?;
    // Latched, low byte first.
    port_out(0x43, 1, 0x80)?;
    let count = port_in(0x42, 1)? | port_in(0x42, 1)? << 8;
    let mode = port_in(0x43, 1)?;
    port_out(0x61, 1, before)?;
    check_eq!(io_privilege(0), Ok(0));
    if conformance::is_privileged() {
        check_eq!((gate & 3, mode), (1, 0));
        check!(count <= 0x1000, "count {count:#x}");
    } else {
        check_eq!((before, gate, count, mode), (0xff, 0xff, 0xffff, 0xff));
    }
    Ok(())
}

fn emulated_in_32_bit_code(_: &mut Domain) -> Verdict {
    const FLAT_CODE_32: u64 = 0xe023;
    // A segment of 32-bit code that begins at TEXT and has 4 KiB, and one of 16-bit code.
    let from_text =
        |flags: u64| (TEXT >> 24) << 56 | flags << 52 | 0xfb << 40 | (TEXT & 0xff_ffff) << 16 | 0xfff;
    let page = TablePage::new(&[(3, from_text(4)), (4, from_text(0))])?;
    let mut frames = [page.mfn()];
    check_eq!(call(Hypercall::SetGdt, [at(&mut frames), 512, 0, 0, 0]), Ok(0));
    io_privilege(3)?;
    // in al, 0x20; in eax, 0x20 (ax in 16-bit code); 66 in; cli; int3: what nobody has reads as ones.
    let (space, start) = user_code(&[0xe4, 0x20, 0x90, 0xe5, 0x20, 0x90, 0x66, 0xe5, 0x20, 0xfa, 0xcc])?;
    let mut seen = [(0, 0, 0); 4];
    let segments = [(start.cs, TEXT), (FLAT_CODE_32, TEXT), (0x1b, 0), (0x23, 0)];
    for (seen, (cs, rip)) in seen.iter_mut().zip(segments) {
        let mut frame = start;
        (frame.cs, frame.rip, frame.rax) = (cs, rip, 0);
        let back = run(&space, &frame)?;
        *seen = (back.vector, back.rip - rip, back.rax);
    }
    // Behind the end of its segment nothing is carried out; what needs the kernel is not the user's here either.
    let mut frame = start;
    (frame.cs, frame.rip) = (0x1b, 0x1000);
    let outside = run(&space, &frame)?;
    let (space, mut frame) = user_code(&[0x0f, 0x20, 0xc0])?;
    frame.cs = FLAT_CODE_32;
    let refused = run(&space, &frame)?;
    check_eq!(io_privilege(0), Ok(0));
    check_eq!(call(Hypercall::SetGdt, [at(&mut frames), 0, 0, 0, 0]), Ok(0));
    for (seen, (cs, _)) in seen.into_iter().zip(segments) {
        check_eq!(seen, (3, 11, 0xffff_ffff), "code segment {cs:#x}");
    }
    // QEMU looks at no limit of a code segment and fetches what is not there; processors fault at once.
    check!(matches!(outside.vector, 13 | 14), "behind the end: {}", outside.vector);
    check_eq!((refused.vector, refused.error, refused.rip), (13, 0, TEXT));
    Ok(())
}

fn forced_cpuid(leaf: u32, sub: u32) -> [u32; 4] {
    let (a, b, c, d): (u32, u64, u32, u32);
    // SAFETY: the prefix asks the hypervisor to emulate the instruction; rbx is LLVM's.
    unsafe {
        core::arch::asm!(
            "push rbx", ".byte 0x0f, 0x0b, 0x78, 0x65, 0x6e", "cpuid", "mov {b}, rbx", "pop rbx",
            b = out(reg) b, inlateout("eax") leaf => a, inlateout("ecx") sub => c, lateout("edx") d,
        );
    }
    [a, b as u32, c, d]
}

fn emulated_cpuid_forced(_: &mut Domain) -> Verdict {
    let [top, b, c, d] = forced_cpuid(0x4000_0000, 0);
    check_eq!([b, c, d], [0x566e_6558, 0x6558_4d4d, 0x4d4d_566e], "XenVMMXenVMM");
    check!(top >= 0x4000_0002, "highest leaf {top:#x}");
    check_eq!(forced_cpuid(0x4000_0001, 0)[0], 0x0004_0011, "version");
    let [max, ..] = forced_cpuid(0, 0);
    check!(max >= 1);
    let [_, _, c, d] = forced_cpuid(1, 0);
    check_eq!(c >> 31, 1, "a hypervisor is there");
    check_eq!(d & (1 << 25 | 1 << 26), 1 << 25 | 1 << 26, "SSE and SSE2");
    check_eq!(c >> 5 & 1, 0, "no hardware virtualization for guests");
    Ok(())
}

fn emulated_wbinvd(_: &mut Domain) -> Verdict {
    check_eq!(probe!("wbinvd"), Ok(()));
    check_eq!(probe!("invd"), Ok(()));
    // TCG lets both pass in ring 3; this one traps everywhere.
    let cr0: u64;
    probe!("mov rax, cr0", "mov {v}, rax"; v = out(reg) cr0)?;
    check!(cr0 & 1 != 0, "cr0 {cr0:#x}");
    Ok(())
}

fn emulated_xgetbv(_: &mut Domain) -> Verdict {
    if forced_cpuid(1, 0)[2] >> 26 & 1 == 0 {
        return testkit::skip("this processor has no XSAVE");
    }
    let value: u64;
    let cr4 = control_register(4)?;
    probe!(rax = cr4 | 1 << 18, "mov cr4, rax")?;
    check_eq!(control_register(4)? >> 18 & 1, 1, "OSXSAVE");
    probe!("xgetbv", "mov {v}, rax"; v = out(reg) value, in("ecx") 0, out("rdx") _)?;
    check_eq!(value & 1, 1, "x87 state");
    // What it says now can be written; without x87 it cannot.
    probe!(rax = value, "xsetbv"; in("ecx") 0, in("edx") 0)?;
    expect_vector(probe!(rax = value & !1, "xsetbv"; in("ecx") 0, in("edx") 0), 13, 0)
}

fn refused(name: &str, result: Result<(), Exception>) -> Verdict {
    check_eq!(result, Err(Exception { vector: 13, error: 0 }), "{name}");
    Ok(())
}

fn refused_instructions(_: &mut Domain) -> Verdict {
    let table = [0u64; 2];
    refused("hlt", probe!("hlt"))?;
    refused("lgdt", probe!("lgdt [{t}]"; t = in(reg) table.as_ptr()))?;
    refused("lidt", probe!("lidt [{t}]"; t = in(reg) table.as_ptr()))?;
    refused("ltr", probe!("ltr {s:x}"; s = in(reg) 8u32))?;
    refused("lldt", probe!("lldt {s:x}"; s = in(reg) 8u32))?;
    refused("lmsw", probe!("lmsw {s:x}"; s = in(reg) 1u32))?;
    refused("swapgs", probe!("swapgs"))?;
    refused("sti", probe!("sti"))?;
    refused("cli", probe!("cli"))?;
    Ok(())
}

fn set_base(which: u64, base: u64) -> Result<u64, Errno> {
    call(Hypercall::SetSegmentBase, [which, base, 0, 0, 0])
}

fn segment_base(_: &mut Domain) -> Verdict {
    let word = 0x1234_5678_9abcu64;
    let address = (&raw const word) as u64;
    check_eq!(set_base(0, address), Ok(0));
    check_eq!(fs_word(), word);
    // The kernel's GS is in force now; the user's waits.
    check_eq!(set_base(2, address), Ok(0));
    check_eq!(gs_word(), word);
    check_eq!(set_base(1, address + 8), Ok(0));
    check_eq!(gs_word(), word);
    check_eq!(read_msr(KERNEL_GS_BASE)?, address + 8);
    for which in 0..3 {
        check_eq!(set_base(which, 0), Ok(0));
    }
    Ok(())
}

fn segment_base_bad_address(_: &mut Domain) -> Verdict {
    for which in 0..3 {
        check_eq!(set_base(which, 1 << 47), Err(Errno::EINVAL), "segment {which}");
    }
    check_eq!(set_base(4, 0), Err(Errno::EINVAL));
    Ok(())
}

fn segment_base_user_gs_selector(_: &mut Domain) -> Verdict {
    check_eq!(set_base(3, 0), Ok(0));
    check_eq!(set_base(3, 0xe02b), Ok(0));
    // One that cannot be loaded becomes the null selector; the call succeeds.
    check_eq!(set_base(3, 0xfff8), Ok(0));
    check_eq!(set_base(3, 0), Ok(0));
    check_eq!(set_base(4, 0), Err(Errno::EINVAL), "there are four");
    Ok(())
}

/// A flat data segment for ring 3.
const FLAT_DATA: u64 = 0x00cf_f300_0000_ffff;

/// Loads a selector into FS and back to null.
fn load(selector: u64) -> Result<(), Exception> {
    probe!("mov fs, {s:e}"; s = in(reg) selector)?;
    probe!("mov fs, {s:e}"; s = in(reg) 0u64)
}

fn gdt_is_replaced(_: &mut Domain) -> Verdict {
    expect_vector(load(0x1b), 13, 0x18)?;
    let page = TablePage::new(&[(3, FLAT_DATA), (4, 1)])?;
    let mut frames = [page.mfn()];
    check_eq!(call(Hypercall::SetGdt, [at(&mut frames), 512, 0, 0, 0]), Ok(0));
    let loaded = load(0x1b);
    let not_present = load(0x23);
    // The frame is a descriptor table now: it cannot become writable, nor a page table.
    let table = mmuext(MmuextCmd::PinL1Table, page.mfn(), 0);
    check_eq!(call(Hypercall::SetGdt, [at(&mut frames), 0, 0, 0, 0]), Ok(0));
    check_eq!(loaded, Ok(()));
    check!(not_present.is_err());
    check_eq!(table, Err(Errno::EINVAL));
    expect_vector(load(0x1b), 13, 0x18)
}

fn gdt_bad_arguments(_: &mut Domain) -> Verdict {
    let mut frames = [0u64; 16];
    check_eq!(call(Hypercall::SetGdt, [NOWHERE, 512, 0, 0, 0]), Err(Errno::EFAULT));
    check_eq!(
        call(Hypercall::SetGdt, [at(&mut frames), 14 * 512 + 1, 0, 0, 0]),
        Err(Errno::EINVAL),
        "too many entries"
    );
    // A page that is mapped writable.
    let page = Page::new()?;
    frames[0] = page.mfn().get();
    check_eq!(call(Hypercall::SetGdt, [at(&mut frames), 512, 0, 0, 0]), Err(Errno::EINVAL));
    // A gate into the hypervisor.
    let bad = TablePage::new(&[(3, 0x0000_ec00_e008_0000)])?;
    frames[0] = bad.mfn();
    expect_errno(call(Hypercall::SetGdt, [at(&mut frames), 512, 0, 0, 0]), Errno::EINVAL)
}

fn descriptor_is_written(_: &mut Domain) -> Verdict {
    let page = TablePage::new(&[])?;
    let mut frames = [page.mfn()];
    check_eq!(call(Hypercall::SetGdt, [at(&mut frames), 512, 0, 0, 0]), Ok(0));
    let before = load(0x2b);
    let written = call(Hypercall::UpdateDescriptor, [page.place(5), FLAT_DATA, 0, 0, 0]);
    let after = load(0x2b);
    check_eq!(call(Hypercall::SetGdt, [at(&mut frames), 0, 0, 0, 0]), Ok(0));
    expect_vector(before, 13, 0x28)?;
    check_eq!((written, after), (Ok(0), Ok(())));
    check_eq!(page.word(5) & !(1 << 40), FLAT_DATA & !(1 << 40));
    Ok(())
}

fn descriptor_refused(_: &mut Domain) -> Verdict {
    let page = TablePage::new(&[])?;
    let update = |place: u64, value: u64| call(Hypercall::UpdateDescriptor, [place, value, 0, 0, 0]);
    // A call gate, an interrupt gate, a task-state segment, a code segment for ring 0 by a gate of privilege 3.
    for value in [0x0000_ec00_e008_0000, 0x0000_ee00_e008_0000, 0x0000_8900_0000_0067] {
        check_eq!(update(page.place(5), value), Err(Errno::EINVAL), "{value:#x}");
        check_eq!(page.word(5), 0);
    }
    check_eq!(update(page.place(5) + 4, FLAT_DATA), Err(Errno::EINVAL), "misaligned");
    // A page table is no descriptor table.
    let table = TablePage::new(&[])?;
    check_eq!(mmuext(MmuextCmd::PinL1Table, table.mfn(), 0), Ok(0));
    check_eq!(update(table.place(5), FLAT_DATA), Err(Errno::EINVAL));
    check_eq!(table.word(5), 0);
    check_eq!(mmuext(MmuextCmd::UnpinTable, table.mfn(), 0), Ok(0));
    Ok(())
}

fn ldt_is_loaded(_: &mut Domain) -> Verdict {
    expect_vector(load(0xf), 13, 0xc)?;
    let page = TablePage::new(&[(1, FLAT_DATA)])?;
    check_eq!(mmuext(MmuextCmd::SetLdt, page.address(), 512), Ok(0));
    let loaded = load(0xf);
    let beyond = load(0x17);
    let writable = memory::translate(page.address()).map(|frame| pte(frame.get(), 0x63 | 1 << 63));
    // SAFETY: refused, since the page is a descriptor table.
    let refused = writable.map(|entry| unsafe { memory::set_leaf(page.address(), entry) });
    check_eq!(mmuext(MmuextCmd::SetLdt, 0, 0), Ok(0));
    check_eq!(loaded, Ok(()));
    expect_vector(beyond, 13, 0x14)?;
    check_eq!(refused, Some(Err(Errno::EBUSY)));
    expect_vector(load(0xf), 13, 0xc)
}

fn segment_base_is_set_alone(_: &mut Domain) -> Verdict {
    // A selector whose descriptor is gone stays loaded, as on a processor, until somebody loads it again: the call about one base
    // does not. A switch to another domain and back does: the load fails then, and the failsafe callback is called.
    if !conformance::is_privileged() {
        return testkit::skip("needs to be the only domain: a switch loads all selectors again");
    }
    let page = TablePage::new(&[(3, FLAT_DATA)])?;
    let mut frames = [page.mfn()];
    check_eq!(call(Hypercall::SetGdt, [at(&mut frames), 512, 0, 0, 0]), Ok(0));
    let held = |what: fn() -> Result<(), Stop>| {
        let selector: u64;
        check_eq!(call(Hypercall::UpdateDescriptor, [page.place(3), FLAT_DATA, 0, 0, 0]), Ok(0));
        probe!("mov es, {s:e}"; s = in(reg) 0x1bu64)?;
        check_eq!(call(Hypercall::UpdateDescriptor, [page.place(3), 0, 0, 0, 0]), Ok(0));
        what()?;
        probe!("mov {v:e}, es", "mov es, {n:e}"; v = out(reg) selector, n = in(reg) 0u64)?;
        Ok::<u64, Stop>(selector & 0xffff)
    };
    let seen = [
        held(|| set_base(0, 8).map(drop).map_err(Stop::from)),
        held(|| set_base(1, 8).map(drop).map_err(Stop::from)),
        held(|| set_base(2, 0).map(drop).map_err(Stop::from)),
        held(|| set_base(3, 0).map(drop).map_err(Stop::from)),
        held(|| probe!(rax = 0, "wrmsr"; in("ecx") 0xc000_0100u32, in("edx") 0).map_err(Stop::from)),
    ];
    check_eq!(call(Hypercall::SetGdt, [at(&mut frames), 0, 0, 0, 0]), Ok(0));
    for (index, selector) in seen.into_iter().enumerate() {
        check_eq!(selector?, 0x1b, "after call {index}");
    }
    // Without the descriptor it can be loaded no more.
    expect_vector(load(0x1b), 13, 0x18)
}

/// A 64-bit code segment for ring 3.
const CODE_64: u64 = 0x00af_fb00_0000_ffff;

fn ldt_pages_are_brought_in(_: &mut Domain) -> Verdict {
    // Two pages: code and a stack in the first, data in the second.
    let first = TablePage::new(&[(1, CODE_64), (2, FLAT_DATA)])?;
    let second = TablePage::new(&[(3, FLAT_DATA)])?;
    let both = Range::new(2)?;
    // SAFETY: read-only mappings of pages of this case.
    unsafe {
        both.map(0, Mfn::new(first.mfn()), Access::Read)?;
        both.map(1, Mfn::new(second.mfn()), Access::Read)?;
    }
    let set = || mmuext(MmuextCmd::SetLdt, both.start(), 1024);
    let (code, stack, data) = (1 << 3 | 7, 2 << 3 | 7, 515 << 3 | 7);
    // mov es, eax; mov edx, es; mov ecx, cs; ud2
    let (space, mut frame) = user_code(&[0x8e, 0xc0, 0x8c, 0xc2, 0x8c, 0xc9, 0x0f, 0x0b])?;
    frame.rax = data;
    let mut seen = [[0; 5]; 3];
    let mut result = Ok(0);
    for (seen, selectors) in seen.iter_mut().zip([(code, USER_SS), (USER_CS, stack), (code, stack)]) {
        // None of its pages is in use after this: the return to user mode is what needs the first.
        result = result.and(set());
        (frame.cs, frame.ss) = selectors;
        let back = run(&space, &frame)?;
        *seen = [back.vector, back.rip - TEXT, back.cs & 0xffff, back.ss, back.rdx];
    }
    // A kernel loads a data segment through a page that is not in yet.
    result = result.and(set());
    let loaded = load(data);
    // ES is as the user left it. Without the table a switch to another domain and back could not load it: the failsafe callback.
    let cleared = probe!("mov es, {n:e}"; n = in(reg) 0u64);
    check_eq!(mmuext(MmuextCmd::SetLdt, 0, 0), Ok(0));
    check_eq!((result, loaded, cleared), (Ok(0), Ok(()), Ok(())));
    for (seen, (cs, ss)) in seen.iter().zip([(code, USER_SS), (USER_CS, stack), (code, stack)]) {
        check_eq!(*seen, [6, 6, cs, ss, data], "vector, rip, cs, ss, es");
    }
    // Without a table the same return faults, and names the selector.
    frame.cs = code;
    let back = run(&space, &frame)?;
    check_eq!((back.vector, back.error, back.rip), (13, code & !3, TEXT));
    Ok(())
}

fn ldt_page_that_is_not_there(_: &mut Domain) -> Verdict {
    // The first page is a table, behind it is nothing.
    const PRESENT: u64 = 1 << 47;
    let first = TablePage::new(&[(1, CODE_64), (3, CODE_64 & !PRESENT), (4, FLAT_DATA & !PRESENT)])?;
    let range = Range::new(2)?;
    // SAFETY: a read-only mapping of a page of this case.
    unsafe { range.map(0, Mfn::new(first.mfn()), Access::Read)? };
    check_eq!(mmuext(MmuextCmd::SetLdt, range.start(), 1024), Ok(0));
    let (space, mut frame) = user_code(&[0x0f, 0x0b])?;
    frame.cs = 515 << 3 | 7;
    let back = run(&space, &frame)?;
    let at = testkit::fault_address();
    let loaded = load(515 << 3 | 7);
    let loaded_at = testkit::fault_address();
    // What is in the first page still serves.
    frame.cs = 1 << 3 | 7;
    let good = run(&space, &frame)?;
    // A segment that is marked as not there is that exception, and a stack of such another.
    frame.cs = 3 << 3 | 7;
    let absent = run(&space, &frame)?;
    (frame.cs, frame.ss) = (USER_CS, 4 << 3 | 7);
    let no_stack = run(&space, &frame)?;
    check_eq!(mmuext(MmuextCmd::SetLdt, 0, 0), Ok(0));
    check_eq!((good.vector, good.cs & 0xffff), (6, 1 << 3 | 7));
    check_eq!((absent.vector, absent.error), (11, 3 << 3 | 4));
    // QEMU says 11 here, processors 12.
    check!(matches!(no_stack.vector, 11 | 12) && no_stack.error == 4 << 3 | 4, "{}", no_stack.vector);
    // The kernel hears of a page fault at its own address of the descriptor.
    check_eq!((back.vector, back.error, at), (14, 4, range.start() + 515 * 8), "the return");
    expect_vector(loaded, 14, 0)?;
    check_eq!(loaded_at, range.start() + 515 * 8);
    Ok(())
}

fn ldt_bad_arguments(_: &mut Domain) -> Verdict {
    check_eq!(mmuext(MmuextCmd::SetLdt, 0x1008, 1), Err(Errno::EINVAL), "not at a page");
    check_eq!(mmuext(MmuextCmd::SetLdt, 0x1000, 8193), Err(Errno::EINVAL), "too many entries");
    check_eq!(mmuext(MmuextCmd::SetLdt, 0xffff_8300_0000_0000, 512), Err(Errno::EINVAL), "the hypervisor's");
    Ok(())
}

fn stack_switch_moves_the_entry_stack(_: &mut Domain) -> Verdict {
    // An event may come in user mode, and is handled on it too.
    const WORDS: usize = 4096;
    #[repr(align(16))]
    struct Stack([AtomicU64; WORDS]);
    static STACK: Stack = Stack([const { AtomicU64::new(0) }; WORDS]);
    let (space, frame) = user_code(&[0x0f, 0x0b])?;
    // Once through the SDK's own stack, so that it does not set that again.
    check_eq!(run(&space, &frame)?.vector, 6);
    let top = (&raw const STACK) as u64 + size_of::<Stack>() as u64;
    check_eq!(call(Hypercall::StackSwitch, [0xe02b, top, 0, 0, 0]), Ok(0));
    let back = run(&space, &frame)?;
    check_eq!((back.vector, back.rip), (6, TEXT));
    // The frame went there: rip is five words below the top.
    check_eq!(STACK.0[WORDS - 5].load(Ordering::Relaxed), TEXT);
    // The next use of another address space sets the SDK's stack again.
    drop(space);
    let (space, frame) = user_code(&[0xcc])?;
    STACK.0[WORDS - 5].store(0, Ordering::Relaxed);
    check_eq!(run(&space, &frame)?.vector, 3);
    check_eq!(STACK.0[WORDS - 5].load(Ordering::Relaxed), 0);
    Ok(())
}

fn syscall_clears_no_guest_register(_: &mut Domain) -> Verdict {
    // rbx, rbp, r9 and r12 to r15 are the guest's across a hypercall; r9 is the sixth argument, which none of these has.
    let (rax, r9, r12, r13, r14, r15): (u64, u64, u64, u64, u64, u64);
    // SAFETY: xen_version has no effect.
    unsafe {
        core::arch::asm!("syscall",
            inlateout("rax") 17u64 => rax, inlateout("rdi") 0u64 => _, inlateout("rsi") 0u64 => _,
            inlateout("rdx") 0u64 => _, inlateout("r10") 0u64 => _, inlateout("r8") 0u64 => _,
            inlateout("r9") 9u64 => r9, inlateout("r12") 12u64 => r12, inlateout("r13") 13u64 => r13,
            inlateout("r14") 14u64 => r14, inlateout("r15") 15u64 => r15,
            lateout("rcx") _, lateout("r11") _);
    }
    check!(rax >> 16 == 4, "the version is {rax:#x}");
    check_eq!((r9, r12, r13, r14, r15), (9, 12, 13, 14, 15));
    Ok(())
}
