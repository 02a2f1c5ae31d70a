//! The hypervisor image: joins policy (the library `hv`) and machine (`arch`).
#![no_std]
#![no_main]

extern crate alloc;

mod arch;
mod heap;
mod rt;

use arch::x86_64::{boot, epitaph, serial};

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    epitaph::panic(info)
}

/// Called by the boot code on the first CPU, once its tables are final.
fn run() -> ! {
    let line = core::str::from_utf8(boot::command_line()).unwrap_or("");
    let options = hv::cmdline::parse(line);
    serial::init(options.baud);
    if let Some(port) = options.debug_exit {
        epitaph::set_debug_exit(port);
    }
    hv::log::init(hv::log::Backend { write: serial::write_bytes, now_ns: || 0 }, options.log_level);
    log::info!("Xenolith {}", env!("CARGO_PKG_VERSION"));
    log::info!("command line: {line}");
    for word in &options.unknown {
        log::warn!("command line: {word:?} is no option of the hypervisor, or its value cannot be read");
    }
    let machine = boot::machine();
    for region in &machine.regions {
        log::info!("memory {:016x}-{:016x} type {}", region.start, region.end, region.e820_type);
    }
    match machine.module {
        Some(module) => log::info!("module: {} bytes at {:#x}", module.len, module.start),
        None => log::error!("no module: give dom0's image with -initrd"),
    }
    log::info!("free after boot: {} KiB", machine.free.total() >> 10);
    let features = &machine.features;
    for (there, name) in [(features.smep, "SMEP"), (features.smap, "SMAP")] {
        if !there {
            log::warn!("this processor has no {name}: one line of defence less against a bug in ring 0");
        }
    }
    epitaph::stop()
}
