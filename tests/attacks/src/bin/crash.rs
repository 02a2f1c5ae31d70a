//! Guests that end themselves badly, by `deed=`: the hypervisor must crash this one domain with a report, and live on.
#![no_std]
#![no_main]

use core::arch::asm;
use core::hint::black_box;
use guest_sdk::abi::segment::FLAT_KERNEL_CS;
use guest_sdk::abi::vcpu::TrapInfo;
use guest_sdk::hypercall::stub;
use guest_sdk::{Domain, entry, println};

#[entry]
fn main(domain: Domain) {
    let deed = domain.command_line.value("deed").unwrap_or("none");
    println!("attack: {deed}");
    match deed {
        "jump" => {
            forget_traps();
            // SAFETY: none: this is the point, here and below.
            unsafe { asm!("jmp {}", in(reg) black_box(0u64), options(noreturn)) }
        }
        "garbage" => {
            forget_traps();
            // SAFETY: as above.
            unsafe { asm!(".byte 0x0f, 0x0b, 0x06, 0xff, 0xff", options(noreturn)) }
        }
        "handler" => {
            // The handler of page faults is itself not mapped.
            let entry = |vector| TrapInfo { vector, flags: 0, cs: FLAT_KERNEL_CS, pad0: 0, address: 0x1000 };
            let table = [entry(6), entry(13), entry(14), TrapInfo::default()];
            // SAFETY: as above.
            unsafe {
                let _ = stub::set_trap_table(table.as_ptr() as u64);
                asm!("mov qword ptr [0x10], 1", options(noreturn))
            }
        }
        // No stack to push the frame of an exception on; then one that reaches into the hypervisor.
        // SAFETY: as above.
        "nostack" => unsafe { asm!("xor esp, esp", "ud2", options(noreturn)) },
        // SAFETY: as above.
        "ourstack" => unsafe {
            asm!("mov rsp, {}", "ud2", in(reg) 0xffff_8300_0010_0000u64, options(noreturn))
        },
        // A return frame that cannot be read.
        // SAFETY: as above.
        "iret" => unsafe { asm!("xor esp, esp", "mov eax, 23", "syscall", "ud2", options(noreturn)) },
        // Sleeps for ever with events masked would be no crash; a triple fault of the real machine would.
        // SAFETY: as above.
        "lidt" => unsafe {
            forget_traps();
            asm!("sub rsp, 16", "lidt [rsp]", "int3", options(noreturn))
        },
        other => println!("there is no deed {other}"),
    }
}

/// No trap table at all.
fn forget_traps() {
    // SAFETY: what is raised from here on kills the domain, as the deed wants.
    let _ = unsafe { stub::set_trap_table(0) };
}
