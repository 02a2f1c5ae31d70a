//! Ends badly, to see what is reported: `how=panic`, `error`, `fault`, `execute`, `overflow`, `memory`.
#![no_std]
#![no_main]

extern crate alloc;

use core::hint::black_box;
use guest_sdk::abi::Errno;
use guest_sdk::{Domain, entry, println};

#[entry]
fn main(domain: Domain) -> Result<(), Errno> {
    match domain.command_line.value("how") {
        Some("panic") => panic!("asked to"),
        Some("error") => return Err(Errno::EINVAL),
        // SAFETY: none: this is the point.
        Some("fault") => unsafe { (black_box(0x10) as *mut u32).write_volatile(1) },
        Some("execute") => {
            let code = black_box([0x90u8; 16]);
            // SAFETY: none: the heap and the stack cannot be executed.
            unsafe { core::mem::transmute::<*const u8, extern "C" fn()>(code.as_ptr())() }
        }
        Some("overflow") => println!("{} came back", overflow(1)),
        Some("memory") => println!("{} bytes", alloc::vec![1u8; 1 << 40].len()),
        other => println!("how= is {other:?}: nothing to do"),
    }
    Ok(())
}

#[allow(unconditional_recursion, reason = "this is the point")]
#[inline(never)]
fn overflow(depth: u64) -> u64 {
    let block = black_box([depth; 64]);
    block[3] + overflow(depth + 1) + block[5]
}
