//! Misbehaves in the way that `deed=` says: `jump`, `garbage`, `handler`, `fault`, `flood`, `spin`, `end` (with `reason=`),
//! `random` (with `seed=`).
//!
//! Nothing it does may harm anybody else: dom0's shell answers, and `destroy` gets all its memory back.
#![no_std]
#![no_main]

use core::arch::{asm, global_asm};
use core::hint::black_box;
use guest_sdk::abi::sched::SchedShutdown;
use guest_sdk::abi::segment::FLAT_KERNEL_CS;
use guest_sdk::abi::subops::SchedOp;
use guest_sdk::abi::vcpu::TrapInfo;
use guest_sdk::hypercall::stub;
use guest_sdk::{Domain, entry, println};

#[entry]
fn main(domain: Domain) {
    match domain.command_line.value("deed") {
        Some("jump") => {
            println!("jumping to address 0");
            // SAFETY: none: this is the point.
            unsafe { asm!("jmp {}", in(reg) black_box(0u64), options(noreturn)) }
        }
        Some("garbage") => {
            println!("executing garbage without a trap table");
            // SAFETY: a null table unregisters all handlers.
            let _ = unsafe { stub::set_trap_table(0) };
            // SAFETY: none: this is the point.
            unsafe { asm!(".byte 0x0f, 0x0b, 0x06, 0xff, 0xff", options(noreturn)) }
        }
        Some("handler") => {
            println!("faulting with a fault handler that is not mapped");
            let entry = |vector| TrapInfo { vector, flags: 0, cs: FLAT_KERNEL_CS, pad0: 0, address: 0x1000 };
            let table = [entry(6), entry(13), entry(14), TrapInfo::default()];
            // SAFETY: the table lives through the call and ends with an empty entry. That it is no good is the point.
            let _ = unsafe { stub::set_trap_table(table.as_ptr() as u64) };
            // SAFETY: none: this is the point.
            unsafe { (black_box(0x10) as *mut u32).write_volatile(1) }
        }
        Some("fault") => {
            println!("faulting in the handler of the fault, without an end");
            let address = (&raw const __rogue_fault) as u64;
            let table =
                [TrapInfo { vector: 6, flags: 0, cs: FLAT_KERNEL_CS, pad0: 0, address }, TrapInfo::default()];
            // SAFETY: the table lives through the call and ends with an empty entry; the handler is below.
            let _ = unsafe { stub::set_trap_table(table.as_ptr() as u64) };
            // SAFETY: the handler goes on from this stack pointer and never comes back.
            unsafe { asm!("mov [rip + {}], rsp", "ud2", sym FAULT_STACK, options(noreturn)) }
        }
        Some("flood") => {
            for number in 0u64.. {
                println!("flood {number}: all work and no play makes a dull guest");
            }
        }
        Some("spin") => {
            println!("never yielding");
            loop {
                core::hint::spin_loop();
            }
        }
        Some("end") => {
            let shutdown = SchedShutdown { reason: domain.command_line.number("reason").unwrap_or(0) };
            println!("ending with reason {}", shutdown.reason);
            // SAFETY: the structure lives through the call, which does not return but for a suspended domain that is resumed.
            let _ =
                unsafe { stub::sched_op(SchedOp::Shutdown.number().into(), (&raw const shutdown) as u64) };
        }
        Some("random") => random(domain.command_line.number("seed").unwrap_or(1)),
        other => {
            println!(
                "deed= is {other:?}: there are jump, garbage, handler, fault, flood, spin, end and random"
            )
        }
    }
}

/// Stack pointer with which `__rogue_fault` faults each time.
static mut FAULT_STACK: u64 = 0;

global_asm!(
    ".pushsection .text.rogue, \"ax\"",
    "__rogue_fault:",
    "mov rsp, [rip + {stack}]",
    "ud2",
    ".popsection",
    stack = sym FAULT_STACK,
);

unsafe extern "C" {
    static __rogue_fault: u8;
}

/// Calls that with random arguments end the guest at once: trap table, GDT, stack, callbacks (two), the two sched_ops, iret,
/// segment bases, multicall. They come rarely, so that the others come often.
const SHORT_LIVED: [u64; 10] = [0, 2, 3, 4, 6, 13, 23, 25, 29, 30];

/// Hypercalls with random numbers and arguments, until something ends it.
fn random(seed: u64) {
    println!("random hypercalls from seed {seed}");
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut memory = [0u64; 64];
    loop {
        let mut argument = || match next() % 5 {
            0 => next() % 8,
            1 => next() % 4096,
            2 => memory.as_mut_ptr() as u64,
            3 => 0x7ff0,
            _ => next(),
        };
        let arguments = [argument(), argument(), argument(), argument(), argument()];
        let number = next() % 64;
        if SHORT_LIVED.contains(&number) && next() % 5000 != 0 {
            continue;
        }
        for word in &mut memory {
            *word = if next() % 2 == 0 { next() % 16 } else { next() };
        }
        // SAFETY: none: the guest may lose its memory or its life by this; that is the point.
        unsafe {
            asm!(
                "syscall",
                inlateout("rax") number => _,
                inlateout("rdi") arguments[0] => _,
                inlateout("rsi") arguments[1] => _,
                inlateout("rdx") arguments[2] => _,
                inlateout("r10") arguments[3] => _,
                inlateout("r8") arguments[4] => _,
                out("rcx") _, out("r11") _, lateout("r9") _,
            );
        }
    }
}
