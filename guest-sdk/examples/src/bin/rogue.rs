//! Misbehaves in the way that `deed=` says: `jump`, `garbage`, `handler`, `fault`, `flood`, `spin`, `end` (with `reason=`),
//! `random` (with `seed=`), `devices` (with `seed=`, for the disks and cards that it has), `netif` (with `seed=`, for its cards).
//!
//! Nothing it does may harm anybody else: dom0's shell answers, and `destroy` gets all its memory back.
#![no_std]
#![no_main]

extern crate alloc;

#[path = "rogue/netif.rs"]
mod netif;

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::arch::{asm, global_asm};
use core::hint::black_box;
use core::time::Duration;
use guest_sdk::abi::sched::SchedShutdown;
use guest_sdk::abi::segment::FLAT_KERNEL_CS;
use guest_sdk::abi::subops::SchedOp;
use guest_sdk::abi::vcpu::TrapInfo;
use guest_sdk::abi::{DomId, Errno};
use guest_sdk::grants::GrantedPages;
use guest_sdk::hypercall::stub;
use guest_sdk::memory::Access;
use guest_sdk::ring::SharedPage;
use guest_sdk::testkit::Random;
use guest_sdk::{Domain, entry, events, executor, println, time};

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
        Some("devices") => {
            let seed = domain.command_line.number("seed").unwrap_or(1);
            if let Err(error) = executor::block_on(devices(domain, seed)) {
                println!("it is over: {error:?}");
            }
        }
        Some("netif") => {
            let mut domain = domain;
            let seed = domain.command_line.number("seed").unwrap_or(1);
            if let Some(store) = domain.xenstore() {
                executor::block_on(netif::run(domain, store, seed));
            }
        }
        other => {
            println!(
                "deed= is {other:?}: there are jump, garbage, handler, fault, flood, spin, end, random, devices and netif"
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
    let mut random = Random::with_seed(seed);
    let mut next = || random.u64(..);
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

/// Bytes of a ring page that its requests begin at (public io/ring.h).
const REQUESTS: usize = 64;

/// Front ends that say and do whatever comes to their minds: nodes, states, rings, events. Much of it is right, so that it gets far.
async fn devices(mut domain: Domain, seed: u64) -> Result<(), Errno> {
    let mut random = Random::with_seed(seed);
    let Some(mut store) = domain.xenstore() else { return Ok(()) };
    let mut fronts = Vec::new();
    for class in ["vbd", "vif"] {
        for number in store.directory(&format!("device/{class}")).await.unwrap_or_default() {
            fronts.push((class, format!("device/{class}/{number}")));
        }
    }
    println!("{} devices, seed {seed}", fronts.len());
    let Ok(pages) = GrantedPages::new(8, DomId::ZERO, Access::ReadWrite) else { return Ok(()) };
    let channels = [domain.events.alloc_unbound(DomId::ZERO)?, domain.events.alloc_unbound(DomId::ZERO)?];
    let (mut rounds, mut connected) = (0u64, 0u64);
    loop {
        rounds += 1;
        for (class, front) in &fronts {
            for (name, value) in nodes(class, &pages, &channels, &mut random) {
                // It may refuse: too long, or the device is gone.
                let _ = store.write(&format!("{front}/{name}"), &value).await;
            }
            let state = match random.u64(..16) {
                0 => b"".to_vec(),
                1 => b"99999999999999999999".to_vec(),
                2 => alloc::vec![0xff; 200],
                3..6 => random.u64(..10).to_string().into_bytes(),
                6..8 => b"3".to_vec(),
                _ => b"4".to_vec(),
            };
            let _ = store.write(&format!("{front}/state"), &state).await;
        }
        for _ in 0..random.u64(..200) {
            scribble(&pages, &mut random);
            let channel = &channels[random.usize(..2)];
            connected += u64::from(channel.notify().is_ok() && channel.is_connected());
            if random.u64(..8) == 0 {
                time::after(Duration::from_micros(random.u64(..2000))).await;
            }
        }
        for (_, front) in &fronts {
            // Half-way through, in any order, or in the right one: the back end is to be there again next time.
            for state in ["5", "6", "1"] {
                if random.u64(..5) != 0 {
                    let _ = store.write(&format!("{front}/state"), state.as_bytes()).await;
                    time::after(Duration::from_micros(500)).await;
                }
            }
        }
        if rounds.is_power_of_two() {
            println!("round {rounds}: {connected} signals of nonsense were heard");
        }
    }
}

/// What a front end says of itself.
fn nodes(
    class: &str,
    pages: &GrantedPages,
    channels: &[events::Channel; 2],
    random: &mut Random,
) -> Vec<(String, Vec<u8>)> {
    let page = |number: usize| pages.references().get(number).map_or(0, |gref| gref.get()).to_string();
    let mut nodes: Vec<(String, String)> = Vec::new();
    let mut say = |name: &str, value: String| nodes.push((name.into(), value));
    let ports = [channels[0].port().to_string(), channels[1].port().to_string()];
    if class == "vbd" {
        let order = random.u64(..3);
        say("ring-page-order", order.to_string());
        say("ring-ref", page(0));
        (0..1 << order).for_each(|number| say(&format!("ring-ref{number}"), page(number)));
        say("event-channel", ports[0].clone());
        say("protocol", "x86_64-abi".into());
        say("feature-persistent", random.u64(..2).to_string());
    } else {
        say("tx-ring-ref", page(4));
        say("rx-ring-ref", page(5));
        say("event-channel", ports[1].clone());
        say("request-rx-copy", "1".into());
        say("feature-sg", random.u64(..2).to_string());
        say("feature-gso-tcpv4", random.u64(..2).to_string());
        say("feature-no-csum-offload", random.u64(..2).to_string());
    }
    let spoil = |(name, value): (String, String)| {
        let value = match random.u64(..40) {
            0 => b"4294967295".to_vec(),
            1 => b"-1".to_vec(),
            2 => alloc::vec![0xc3; 60],
            3 => alloc::vec![b'7'; 1500],
            4 => Vec::new(),
            5 => random.u64(..64).to_string().into_bytes(),
            _ => value.into_bytes(),
        };
        (name, value)
    };
    nodes.into_iter().map(spoil).collect()
}

/// Writes into a ring: requests of small numbers, so that some of them make sense, and indexes a little further or anywhere.
fn scribble(pages: &GrantedPages, random: &mut Random) {
    let page = random.usize(..8) * 4096;
    for _ in 0..random.u64(..24) {
        let at = REQUESTS + random.usize(..(4096 - REQUESTS) / 4) * 4;
        let value = match random.u64(..4) {
            0 => pages.references().get(random.usize(..8)).map_or(0, |gref| gref.get()),
            1 => random.u32(..16),
            2 => random.u32(..4096),
            _ => random.u32(..),
        };
        pages.write_bytes(page + at, &value.to_le_bytes());
    }
    // The producer of requests, or both ends' event indexes.
    let index = random.usize(..4) * 4;
    let mut old = [0; 4];
    pages.read_bytes(page + index, &mut old);
    let old = u32::from_le_bytes(old);
    let new = match random.u64(..64) {
        0 => random.u32(..),
        1 => old.wrapping_sub(1),
        _ => old.wrapping_add(random.u32(..8)),
    };
    pages.write_bytes(page + index, &new.to_le_bytes());
}
