//! The hypervisor image: joins policy (the library `hv`) and machine (`arch`).
#![no_std]
#![no_main]

extern crate alloc;

mod arch;
mod heap;
mod rt;

use alloc::vec::Vec;

use arch::x86_64::clock::{self, Calibration};
use arch::x86_64::interrupts::Cause;
use arch::x86_64::machine::Machine;
use arch::x86_64::{boot, cpu, entry, epitaph, interrupts, ioapic, power, serial};
use hv::access::Rights;
use hv::build_dom::Dom0;
use hv::cmdline::Options;
use hv::domain::Cpu;
use hv::hypervisor::Hypervisor;
use hv::mm::Memory;
use hv::platform::{CpuId, Platform};
use hv::x86::clocksource::TscFacts;
use hypercall_abi::memory::E820Entry;
use hypercall_abi::{Mfn, PAGE_SIZE};

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
    #[cfg(feature = "constant-answers")]
    log::warn!("{}", hypercall_abi::constant_answers::MARK);
    for word in &options.unknown {
        log::warn!("command line: {word:?} is no option of the hypervisor, or its value cannot be read");
    }
    let machine = boot::machine();
    for region in &machine.regions {
        log::debug!("memory {:016x}-{:016x} type {}", region.start, region.end, region.e820_type);
    }
    let features = &machine.features;
    for (there, name) in [(features.smep, "SMEP"), (features.smap, "SMAP"), (features.nx, "NX")] {
        if !there {
            log::warn!("this processor has no {name}: one line of defence less against a bug in ring 0");
        }
    }

    let (records, m2p) = boot::frame_tables();
    let memory = Memory::new(records, m2p);
    let map =
        machine.regions.iter().map(|r| E820Entry { addr: r.start, size: r.end - r.start, kind: r.e820_type });
    memory.set_machine_map(map.collect::<Vec<_>>().leak());
    for (start, end) in machine.ram.iter() {
        memory.declare_ram(Mfn::new(start >> 12), (end - start) >> 12);
    }
    memory.set_m2p_frames(Mfn::new(machine.m2p.start), machine.m2p.end - machine.m2p.start);
    for (start, end) in machine.free.iter() {
        memory.add_free(Mfn::new(start >> 12), (end - start) >> 12);
    }
    let counters = clock::finish_calibration(calibration, options.calibrate, &machine.acpi.power, features);
    log::info!("free memory: {} KiB; heap: {} KiB", memory.free_frames() * 4, heap::usage().1 >> 10);
    let agree = boot::smp::start_others(options.max_cpus, !counters.may_be_clock(options.clock));
    let facts =
        TscFacts { invariant: features.invariant_tsc, virtual_machine: cpu::is_virtual_machine(), agree };
    clock::choose(&counters, options.clock, facts);
    let hv =
        HYPERVISOR.call_once(|| Hypervisor { policy: options.sharing, ..Hypervisor::new(Machine, memory) });
    hv.command_line.call_once(|| options.words);
    hv.watchdog.configure(options.watchdog_seconds, options.wedge);
    hv::sync::on_cpu(|| hypervisor().platform.this_cpu().0 as usize);
    hv::sync::on_relax(|| hypervisor().wait_round());

    log::debug!("{} interrupt pins", ioapic::pins());
    let Some(module) = machine.module else {
        epitaph::refuse(format_args!("no module: give dom0's image with -initrd"))
    };
    log::info!("module: {} bytes at {:#x}", module.len, module.start);
    build_dom0(&options);
    // The image has been copied: its memory is everybody's again.
    let (first, end) = (module.start >> 12, (module.start + module.len).div_ceil(4096));
    hypervisor().mm.add_free(Mfn::new(first), end - first);
    hypervisor().irqs.keep(console_pin());
    interrupts::open_console(console_pin());
    boot::smp::go();
    entry::run_guests(Cpu::new(CpuId(0)))
}

/// Builds dom0 from the boot module: its ELF image, and behind that, from the next page on, its own module.
fn build_dom0(options: &Options<'_>) {
    let hv = hypervisor();
    let bytes = boot::module_bytes();
    let end = match domain_builder::elf_end(bytes) {
        Ok(end) => end,
        Err(error) => epitaph::refuse(format_args!("dom0's image: {error}")),
    };
    let module = bytes.get(end.next_multiple_of(PAGE_SIZE)..).unwrap_or(&[]);
    let free = hv.mm.free_frames() as u64;
    let pages = options.dom0_mem.map_or(free / 2, |bytes| bytes / PAGE_SIZE as u64);
    let dom0 = Dom0 {
        kernel: bytes.get(..end).unwrap_or(bytes),
        module,
        command_line: options.dom0,
        pages,
        vcpus: options.dom0_max_vcpus,
        rights: dom0_rights(),
    };
    match hv.build_dom0(&dom0) {
        Ok(domain) => domain.guarantee.set(options.dom0_guarantee),
        Err(error) => epitaph::refuse(format_args!("{error}")),
    }
    log::info!("dom0: {} KiB, {} vCPUs; {} KiB left", pages * 4, dom0.vcpus, hv.mm.free_frames() * 4);
    log::info!("dom0 may drive devices without an IOMMU: what they can reach by DMA, it can (SECURITY.md)");
}

/// All rights but those to the devices that the hypervisor drives itself.
fn dom0_rights() -> Rights {
    let mut rights = Rights::all(ioapic::pins());
    let acpi = &boot::machine().acpi;
    let mut fits = true;
    // Interrupt controllers, timers, the console's serial port; PCI configuration, whose index each domain has for itself.
    let pm_timer = u64::from(acpi.power.pm_timer);
    let denied = [
        (0x20, 0x21),
        (0xa0, 0xa1),
        (0x40, 0x43),
        (0x61, 0x61),
        (pm_timer, pm_timer + 3),
        (0xcfc, 0xcff),
        (0x3f8, 0x3ff),
    ];
    for (first, last) in denied.into_iter().filter(|(first, _)| *first != 0) {
        fits &= rights.ports.remove(first, last);
    }
    let ioapics = acpi.ioapics.iter().map(|chip| chip.address);
    for address in ioapics.chain([acpi.local_apic]).chain(acpi.hpet) {
        fits &= rights.iomem.remove(address >> 12, address >> 12);
    }
    // What the processor cannot address; a guest that uses such an entry is crashed.
    let end = 1u64 << (cpu::physical_address_bits() - 12);
    fits &= rights.iomem.remove(end, u64::MAX);
    assert!(fits, "too many interrupt controllers and timers to keep them from dom0");
    rights
}

/// The pin of the console's serial port: its ISA interrupt, where an override put it.
fn console_pin() -> u32 {
    let isa = serial::COM1_IRQ;
    let overrides = &boot::machine().acpi.overrides;
    overrides.iter().find(|entry| entry.isa == isa).map_or(u32::from(isa), |entry| entry.gsi)
}

/// Work that an interrupt brought.
pub fn on_interrupt(cause: Cause) {
    if let Some(hv) = HYPERVISOR.get() {
        hv.note_entry(hv.platform.this_cpu());
    }
    match cause {
        Cause::Timer => hypervisor().on_timer(),
        Cause::Flush => hypervisor().answer_flushes(),
        Cause::Pin(pin) => hypervisor().on_irq(pin),
        // Numbered behind the pins.
        Cause::Message(index) => hypervisor().on_irq(hypervisor().irqs.pins() + index),
        Cause::Unknown(vector) => hypervisor().on_unknown_vector(vector),
        Cause::Console => hypervisor().on_console_input(),
        // A kick has done its work by arriving: the way back looks at what waits.
        Cause::Kick | Cause::Nothing => {}
    }
}
