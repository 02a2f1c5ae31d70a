//! The hypervisor image: joins policy (the library `hv`) and machine (`arch`).
#![no_std]
#![no_main]

extern crate alloc;

mod arch;
mod heap;
mod rt;

use arch::x86_64::clock::{self, Calibration};
use arch::x86_64::interrupts::Cause;
use arch::x86_64::machine::Machine;
use arch::x86_64::{boot, entry, epitaph, interrupts, ioapic, power, serial};
use hv::domain::Cpu;
use hv::hypervisor::Hypervisor;
use hv::mm::Memory;
use hv::platform::CpuId;
use hypercall_abi::Mfn;

static HYPERVISOR: spin::Once<Hypervisor<Machine>> = spin::Once::new();

/// The one hypervisor.
pub fn hypervisor() -> &'static Hypervisor<Machine> {
    HYPERVISOR.get().expect("made before the first interrupt is let in")
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    epitaph::panic(info)
}

/// Called by the boot code on the first CPU, once its tables are final.
fn start(calibration: Calibration) -> ! {
    let line = core::str::from_utf8(boot::command_line()).unwrap_or("");
    let options = hv::cmdline::parse(line);
    serial::init(options.baud);
    if let Some(port) = options.debug_exit {
        epitaph::set_debug_exit(port);
    }
    if options.noreboot {
        power::never_reset();
    }
    hv::log::init(hv::log::Backend { write: serial::write_bytes, now_ns: clock::now_ns }, options.log_level);
    log::info!("Xenolith {}", env!("CARGO_PKG_VERSION"));
    log::info!("command line: {line}");
    for word in &options.unknown {
        log::warn!("command line: {word:?} is no option of the hypervisor, or its value cannot be read");
    }
    let machine = boot::machine();
    for region in &machine.regions {
        log::info!("memory {:016x}-{:016x} type {}", region.start, region.end, region.e820_type);
    }
    let features = &machine.features;
    for (there, name) in [(features.smep, "SMEP"), (features.smap, "SMAP")] {
        if !there {
            log::warn!("this processor has no {name}: one line of defence less against a bug in ring 0");
        }
    }

    let (records, m2p) = boot::frame_tables();
    let memory = Memory::new(records, m2p);
    for (start, end) in machine.ram.iter() {
        memory.declare_ram(Mfn::new(start >> 12), (end - start) >> 12);
    }
    for (start, end) in machine.free.iter() {
        memory.add_free(Mfn::new(start >> 12), (end - start) >> 12, false);
    }
    clock::finish_calibration(calibration, &machine.acpi.power);
    log::info!(
        "TSC {} kHz{}",
        clock::hz() / 1000,
        if features.invariant_tsc { "" } else { ", not marked invariant" }
    );
    log::info!("free memory: {} KiB; heap: {} KiB", memory.free_frames() * 4, heap::usage().1 >> 10);
    HYPERVISOR.call_once(|| Hypervisor::new(Machine, memory));

    let Some(module) = machine.module else { panic!("no module: give dom0's image with -initrd") };
    log::info!("module: {} bytes at {:#x}", module.len, module.start);
    interrupts::open_console(console_pin());
    log::debug!("{} interrupt pins", ioapic::pins());
    entry::run_guests(Cpu { id: CpuId(0), current: None })
}

/// The pin of the console's serial port: its ISA interrupt, where an override put it.
fn console_pin() -> u32 {
    let isa = serial::COM1_IRQ;
    let overrides = &boot::machine().acpi.overrides;
    overrides.iter().find(|entry| entry.isa == isa).map_or(u32::from(isa), |entry| entry.gsi)
}

/// Work that an interrupt brought.
pub fn on_interrupt(cause: Cause) {
    match cause {
        Cause::Timer => hypervisor().on_timer(),
        Cause::Pin(_) | Cause::Console => {}
        // A kick has done its work by arriving: the way back looks at what waits.
        Cause::Kick | Cause::Nothing => {}
    }
}
