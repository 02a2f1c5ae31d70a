//! Calls about the hypervisor and the vCPU's entry points: version, console, assists, multicall, callbacks, the legacy numbers.
#![no_std]
#![no_main]

extern crate alloc;

use conformance::{
    NOWHERE, at, by_privilege, call, callback, evtchn, is_privileged, is_xenolith, raw, shared, version,
};
use core::sync::atomic::{AtomicU64, Ordering};
use guest_sdk::abi::callback::{CALLBACKF_MASK_EVENTS, CallbackRegister, CallbackUnregister};
use guest_sdk::abi::evtchn::{EvtchnAllocUnbound, EvtchnClose, EvtchnStatus};
use guest_sdk::abi::mmu::MulticallEntry;
use guest_sdk::abi::nmi::NmiCallback;
use guest_sdk::abi::segment::{FLAT_RING3_CS32, FLAT_RING3_CS64, HYPERVISOR_VIRT_START};
use guest_sdk::abi::subops::{CallbackOp, CallbackType, EvtchnOp, NmiOp, VcpuOp, VersionOp, VmAssist};
use guest_sdk::abi::version::{CompileInfo, FeatureInfo, Features, PlatformParameters};
use guest_sdk::abi::{DomId, Errno, Hypercall, Port, VirtAddr};
use guest_sdk::memory::{Access, Page};
use guest_sdk::testkit::{self, TrapFrame, Verdict, cases, check, check_eq, expect_errno, set_handler, user};
use guest_sdk::{Domain, entry, println};

#[entry]
fn main(domain: Domain) {
    testkit::run(
        domain,
        &cases![
            numbers_of_nobody,
            version_is_a_number,
            version_texts,
            version_compile_info,
            version_platform_parameters,
            version_features,
            version_page_size,
            version_handle,
            version_build_id,
            version_command_line,
            version_unknown,
            version_bad_address,
            console_write,
            console_write_bad_address,
            console_read_without_input,
            console_unknown,
            assist_changes_features,
            assist_can_be_switched,
            assist_unknown,
            multicall_results,
            multicall_errors_do_not_stop_it,
            multicall_in_multicall,
            multicall_bad_address,
            multicall_of_many,
            callback_register_and_unregister,
            callback_bad_address,
            callback_unknown,
            callback_of_events_is_entered,
            callbacks_of_system_calls_are_entered,
            callback_of_sysenter_is_entered_where_the_processor_has_it,
            set_callbacks_takes_them,
            set_callbacks_ignores_bad_addresses,
            nmi_is_delivered,
            nmi_op_unknown,
            nmi_can_be_unregistered,
            legacy_sched_op,
            legacy_event_channel_op,
            legacy_physdev_op,
        ],
    )
}

fn numbers_of_nobody(_: &mut Domain) -> Verdict {
    for number in
        [11, 43, 44, 45, 46, 47, 50, 51, 52, 53, 54, 55, 56, 57, 63, 64, 111, 127, 128, 1 << 32, u64::MAX]
    {
        check_eq!(raw(number, [0; 5]), Err(Errno::ENOSYS), "hypercall {number}");
    }
    Ok(())
}

fn version_is_a_number(_: &mut Domain) -> Verdict {
    // 4.17, as a number; the argument is not looked at.
    check_eq!(call(Hypercall::XenVersion, [0, 0, 0, 0, 0]), Ok(0x0004_0011));
    check_eq!(call(Hypercall::XenVersion, [0, NOWHERE, 0, 0, 0]), Ok(0x0004_0011));
    Ok(())
}

/// A text that ends inside its room.
fn text(bytes: &[u8]) -> Option<&str> {
    let end = bytes.iter().position(|&byte| byte == 0)?;
    core::str::from_utf8(bytes.get(..end)?).ok()
}

fn version_texts(_: &mut Domain) -> Verdict {
    let mut extra = [0xffu8; 16];
    check_eq!(version(VersionOp::Extraversion, &mut extra), Ok(0));
    check!(text(&extra).is_some_and(|text| text.starts_with('.')), "extraversion {extra:x?}");
    let mut capabilities = [0xffu8; 1024];
    check_eq!(version(VersionOp::Capabilities, &mut capabilities), Ok(0));
    check!(text(&capabilities).is_some_and(|text| text.split(' ').any(|word| word == "xen-3.0-x86_64")));
    let mut changeset = [0xffu8; 64];
    check_eq!(version(VersionOp::Changeset, &mut changeset), Ok(0));
    // Debian's Xen does not know its own.
    check!(text(&changeset).is_some());
    Ok(())
}

fn version_compile_info(_: &mut Domain) -> Verdict {
    let mut room = [0xffu8; size_of::<CompileInfo>() + 1];
    check_eq!(version(VersionOp::CompileInfo, &mut room), Ok(0));
    for (start, length) in [(0, 64), (64, 16), (80, 32), (112, 32)] {
        check!(text(&room[start..start + length]).is_some(), "the text at {start} does not end");
    }
    check!(text(&room).is_some_and(|compiler| !compiler.is_empty()));
    check_eq!(room[size_of::<CompileInfo>()], 0xff, "the byte behind it");
    Ok(())
}

fn version_platform_parameters(_: &mut Domain) -> Verdict {
    let mut parameters = PlatformParameters::default();
    check_eq!(version(VersionOp::PlatformParameters, &mut parameters), Ok(0));
    check_eq!(parameters.virt_start, HYPERVISOR_VIRT_START);
    Ok(())
}

fn features() -> Result<Features, Errno> {
    let mut info = FeatureInfo { submap_idx: 0, submap: 0 };
    version(VersionOp::GetFeatures, &mut info)?;
    Ok(Features::from_bits_retain(info.submap))
}

fn version_features(domain: &mut Domain) -> Verdict {
    let features = features()?;
    check!(features.contains(Features::MMU_PT_UPDATE_PRESERVE_AD | Features::HIGHMEM_ASSIST));
    check!(features.contains(Features::GNTTAB_MAP_AVAIL_BITS));
    check!(!features.intersects(Features::AUTO_TRANSLATED_PHYSMAP | Features::WRITABLE_PAGE_TABLES));
    check_eq!(features.contains(Features::DOM0), domain.id() == DomId::ZERO);
    let mut info = FeatureInfo { submap_idx: 1, submap: 0 };
    expect_errno(version(VersionOp::GetFeatures, &mut info), Errno::EINVAL)
}

fn version_page_size(_: &mut Domain) -> Verdict {
    check_eq!(call(Hypercall::XenVersion, [7, 0, 0, 0, 0]), Ok(4096));
    expect_errno(call(Hypercall::XenVersion, [7, 1, 0, 0, 0]), Errno::EINVAL)
}

fn version_handle(_: &mut Domain) -> Verdict {
    let mut handle = [0xa5u8; 17];
    check_eq!(version(VersionOp::GuestHandle, &mut handle), Ok(0));
    check_eq!(handle[16], 0xa5, "the byte behind it");
    check!(handle[..16] != [0xa5; 16], "nothing was written");
    Ok(())
}

fn version_build_id(_: &mut Domain) -> Verdict {
    if !is_privileged() {
        return expect_errno(version(VersionOp::BuildId, &mut [0u32; 16]), Errno::EPERM);
    }
    if is_xenolith() {
        // There is none: it would differ between builds that are otherwise the same.
        let mut room = [0u32; 16];
        check_eq!(version(VersionOp::BuildId, &mut room), Err(Errno::EINVAL), "no room");
        room[0] = 60;
        return expect_errno(version(VersionOp::BuildId, &mut room), Errno::ENODATA);
    }
    // Its length, then in full.
    let length = call(Hypercall::XenVersion, [10, 0, 0, 0, 0])?;
    check!(length > 0 && length < 60, "{length} bytes");
    let mut room = [0u32; 16];
    room[0] = length as u32;
    check_eq!(version(VersionOp::BuildId, &mut room), Ok(length));
    room[0] = 1;
    expect_errno(version(VersionOp::BuildId, &mut room), Errno::ENOBUFS)
}

fn version_command_line(_: &mut Domain) -> Verdict {
    let mut line = [0xffu8; 1024];
    if !is_privileged() {
        check_eq!(version(VersionOp::Commandline, &mut line), Ok(0));
        check_eq!(text(&line), Some("<denied>"));
        check_eq!(line[9], 0xff, "the byte behind it");
        return expect_errno(call(Hypercall::XenVersion, [9, NOWHERE, 0, 0, 0]), Errno::EFAULT);
    }
    check_eq!(version(VersionOp::Commandline, &mut line), Ok(0));
    check!(text(&line).is_some_and(|text| text.contains("dom0_mem=")));
    Ok(())
}

fn version_unknown(_: &mut Domain) -> Verdict {
    check!(call(Hypercall::XenVersion, [0, 0, 0, 0, 0])? >= 4 << 16, "the version");
    for command in [11, 12, 0xffff_ffff] {
        check_eq!(
            call(Hypercall::XenVersion, [command, 0, 0, 0, 0]),
            Err(Errno::ENOSYS),
            "command {command}"
        );
    }
    Ok(())
}

fn version_bad_address(_: &mut Domain) -> Verdict {
    for command in [1, 2, 3, 4, 5, 6, 8] {
        for address in [NOWHERE, HYPERVISOR_VIRT_START + (3 << 39), 1 << 63] {
            check_eq!(
                call(Hypercall::XenVersion, [command, address, 0, 0, 0]),
                Err(Errno::EFAULT),
                "command {command} at {address:#x}"
            );
        }
    }
    Ok(())
}

fn console_write(_: &mut Domain) -> Verdict {
    let text = b"[this line was written by console_io]\n";
    if !is_privileged() {
        // Xen hears unprivileged domains only when it was built for debugging.
        return expect_errno(
            call(Hypercall::ConsoleIo, [0, text.len() as u64, text.as_ptr() as u64, 0, 0]),
            Errno::EPERM,
        );
    }
    check_eq!(call(Hypercall::ConsoleIo, [0, text.len() as u64, text.as_ptr() as u64, 0, 0]), Ok(0));
    check_eq!(call(Hypercall::ConsoleIo, [0, 0, text.as_ptr() as u64, 0, 0]), Ok(0));
    // Longer than any buffer in between.
    let long = [b'.'; 300];
    check_eq!(call(Hypercall::ConsoleIo, [0, long.len() as u64, long.as_ptr() as u64, 0, 0]), Ok(0));
    println!();
    Ok(())
}

fn console_write_bad_address(_: &mut Domain) -> Verdict {
    if !is_privileged() {
        // Xen hears unprivileged domains only when it was built for debugging.
        return expect_errno(call(Hypercall::ConsoleIo, [0, 8, NOWHERE, 0, 0]), Errno::EPERM);
    }
    check_eq!(call(Hypercall::ConsoleIo, [0, 8, NOWHERE, 0, 0]), Err(Errno::EFAULT));
    check_eq!(
        call(Hypercall::ConsoleIo, [0, 8, HYPERVISOR_VIRT_START + (3 << 39), 0, 0]),
        Err(Errno::EFAULT)
    );
    Ok(())
}

fn console_read_without_input(_: &mut Domain) -> Verdict {
    let mut room = [0xa5u8; 16];
    if !is_privileged() {
        // Xen hears unprivileged domains only when it was built for debugging.
        return expect_errno(call(Hypercall::ConsoleIo, [1, 16, at(&mut room), 0, 0]), Errno::EPERM);
    }
    check_eq!(call(Hypercall::ConsoleIo, [1, 16, at(&mut room), 0, 0]), Ok(0));
    // A count must not look like an error.
    for count in [1 << 31, 0xffff_ffff] {
        check_eq!(
            call(Hypercall::ConsoleIo, [1, count, at(&mut room), 0, 0]),
            Err(Errno::E2BIG),
            "{count:#x}"
        );
    }
    check_eq!(room, [0xa5; 16]);
    Ok(())
}

fn console_unknown(_: &mut Domain) -> Verdict {
    let wanted = by_privilege(Errno::ENOSYS, Errno::EPERM);
    expect_errno(call(Hypercall::ConsoleIo, [2, 0, 0, 0, 0]), wanted)
}

fn assist(enable: bool, kind: u64) -> Result<u64, Errno> {
    call(Hypercall::VmAssist, [u64::from(!enable), kind, 0, 0, 0])
}

fn assist_changes_features(_: &mut Domain) -> Verdict {
    let kind = u64::from(VmAssist::PaeExtendedCr3.number());
    let before = features()?.contains(Features::PAE_PGDIR_ABOVE_4GB);
    for on in [true, false, true, before] {
        check_eq!(assist(on, kind), Ok(0));
        check_eq!(features()?.contains(Features::PAE_PGDIR_ABOVE_4GB), on);
    }
    Ok(())
}

fn assist_can_be_switched(_: &mut Domain) -> Verdict {
    for kind in [VmAssist::FourGbSegments, VmAssist::FourGbSegmentsNotify, VmAssist::ArchitecturalIopl] {
        let kind = u64::from(kind.number());
        check_eq!(assist(true, kind), Ok(0), "assist {kind}");
        check_eq!(assist(false, kind), Ok(0), "assist {kind}");
    }
    check_eq!(assist(true, 6), Err(Errno::EINVAL), "one that is not there");
    Ok(())
}

fn assist_unknown(_: &mut Domain) -> Verdict {
    for kind in [6, 31, 33, 63, 64] {
        check_eq!(assist(true, kind), Err(Errno::EINVAL), "assist {kind}");
    }
    check_eq!(call(Hypercall::VmAssist, [2, 0, 0, 0, 0]), Err(Errno::ENOSYS));
    Ok(())
}

fn entry_of(call: Hypercall, args: [u64; 6]) -> MulticallEntry {
    MulticallEntry { op: call.number(), result: 0xdead, args }
}

fn multicall(list: &mut [MulticallEntry]) -> Result<u64, Errno> {
    call(Hypercall::Multicall, [list.as_mut_ptr() as u64, list.len() as u64, 0, 0, 0])
}

fn multicall_results(_: &mut Domain) -> Verdict {
    let mut list = [
        entry_of(Hypercall::XenVersion, [0; 6]),
        entry_of(Hypercall::XenVersion, [7, 0, 0, 0, 0, 0]),
        entry_of(Hypercall::FpuTaskswitch, [0; 6]),
    ];
    check_eq!(multicall(&mut list), Ok(0));
    check_eq!(list[0].result, 0x0004_0011);
    check_eq!(list[1].result, 4096);
    check_eq!(list[2].result, 0);
    check_eq!(multicall(&mut []), Ok(0));
    Ok(())
}

fn multicall_errors_do_not_stop_it(_: &mut Domain) -> Verdict {
    let mut list = [
        entry_of(Hypercall::XenVersion, [7, 1, 0, 0, 0, 0]),
        MulticallEntry { op: 11, result: 1, args: [0; 6] },
        MulticallEntry { op: u64::MAX, result: 1, args: [0; 6] },
        entry_of(Hypercall::XenVersion, [7, 0, 0, 0, 0, 0]),
    ];
    check_eq!(multicall(&mut list), Ok(0));
    check_eq!(list[0].result, Errno::EINVAL.to_ret());
    check_eq!(list[1].result, Errno::ENOSYS.to_ret());
    check_eq!(list[2].result, Errno::ENOSYS.to_ret());
    check_eq!(list[3].result, 4096);
    Ok(())
}

fn multicall_in_multicall(_: &mut Domain) -> Verdict {
    let mut inner = [entry_of(Hypercall::XenVersion, [0; 6])];
    let mut outer = [entry_of(Hypercall::Multicall, [inner.as_mut_ptr() as u64, 1, 0, 0, 0, 0])];
    check_eq!(multicall(&mut outer), Ok(0));
    check_eq!(outer[0].result, Errno::EINVAL.to_ret());
    check_eq!(inner[0].result, 0xdead, "the inner call did not run");
    Ok(())
}

fn multicall_bad_address(_: &mut Domain) -> Verdict {
    check_eq!(call(Hypercall::Multicall, [NOWHERE, 1, 0, 0, 0]), Err(Errno::EFAULT));
    check_eq!(
        call(Hypercall::Multicall, [HYPERVISOR_VIRT_START + (3 << 39), 1, 0, 0, 0]),
        Err(Errno::EFAULT)
    );
    Ok(())
}

fn multicall_of_many(_: &mut Domain) -> Verdict {
    // Long enough to be interrupted by a timer tick of the hypervisor, and restarted where it stopped.
    let mut list = alloc::vec![entry_of(Hypercall::XenVersion, [0; 6]); 20_000];
    check_eq!(multicall(&mut list), Ok(0));
    let wrong = list.iter().position(|entry| entry.result != 0x0004_0011 || entry.op != 17);
    check_eq!(wrong, None, "the first entry with a wrong result");
    Ok(())
}

fn registration(kind: u32, address: u64) -> CallbackRegister {
    CallbackRegister { kind: kind as u16, flags: 1, pad0: 0, address: VirtAddr::new(address) }
}

fn callback_register_and_unregister(_: &mut Domain) -> Verdict {
    // The one for NMIs comes and goes; the three that every vCPU needs stay.
    let nmi = CallbackType::Nmi.number();
    check_eq!(callback(CallbackOp::Register, &mut registration(nmi, 0x40_0000)), Ok(0));
    let mut gone = CallbackUnregister { kind: nmi as u16, unused: 0 };
    check_eq!(callback(CallbackOp::Unregister, &mut gone), Ok(0));
    for kind in [CallbackType::Event, CallbackType::Failsafe, CallbackType::Syscall] {
        let mut gone = CallbackUnregister { kind: kind.number() as u16, unused: 0 };
        check_eq!(callback(CallbackOp::Unregister, &mut gone), Err(Errno::EINVAL), "{kind:?}");
    }
    Ok(())
}

fn callback_bad_address(_: &mut Domain) -> Verdict {
    let kinds = [CallbackType::Event, CallbackType::Failsafe, CallbackType::Syscall, CallbackType::Nmi];
    for kind in kinds {
        let bad = callback(CallbackOp::Register, &mut registration(kind.number(), 1 << 47));
        check_eq!(bad, Err(Errno::EINVAL), "{kind:?}");
    }
    check_eq!(call(Hypercall::CallbackOp, [0, NOWHERE, 0, 0, 0]), Err(Errno::EFAULT));
    check_eq!(call(Hypercall::CallbackOp, [1, NOWHERE, 0, 0, 0]), Err(Errno::EFAULT));
    Ok(())
}

fn callback_unknown(_: &mut Domain) -> Verdict {
    let nmi = CallbackType::Nmi.number();
    check_eq!(callback(CallbackOp::Register, &mut registration(nmi, 0x40_0000)), Ok(0));
    check_eq!(callback(CallbackOp::Unregister, &mut registration(nmi, 0)), Ok(0));
    for kind in [3, 6, 8, 0xffff] {
        let bad = callback(CallbackOp::Register, &mut registration(kind, 0x40_0000));
        check_eq!(bad, Err(Errno::ENOSYS), "type {kind}");
        let mut gone = CallbackUnregister { kind: kind as u16, unused: 0 };
        check_eq!(callback(CallbackOp::Unregister, &mut gone), Err(Errno::ENOSYS), "type {kind}");
    }
    check_eq!(call(Hypercall::CallbackOp, [2, 0, 0, 0, 0]), Err(Errno::ENOSYS));
    Ok(())
}

static UPCALLED: AtomicU64 = AtomicU64::new(0);

conformance::counting_handler! {
    /// Counts, masks events in the frame and returns: what the SDK's own upcall stub does, with a counter of ours.
    own_upcall: UPCALLED, "and dword ptr [rsp + 16], ~0x200"
}

fn callback_of_events_is_entered(domain: &mut Domain) -> Verdict {
    let event = CallbackType::Event.number();
    check_eq!(
        callback(CallbackOp::Register, &mut registration(event, own_upcall as *const () as u64)),
        Ok(0)
    );
    let port = domain.events.bind_ipi()?;
    port.notify()?;
    let before = UPCALLED.load(Ordering::Relaxed);
    testkit::window();
    check_eq!(UPCALLED.load(Ordering::Relaxed) - before, 1, "upcalls at the new entry");
    check!(port.poll());
    // One that is refused leaves it.
    check_eq!(callback(CallbackOp::Register, &mut registration(event, 1 << 47)), Err(Errno::EINVAL));
    port.notify()?;
    testkit::window();
    check_eq!(UPCALLED.load(Ordering::Relaxed) - before, 2, "upcalls at the same entry");
    check!(port.poll());
    Ok(())
}

/// Where user code of a case is.
const TEXT: u64 = 0x1000_0000;

/// Runs `code` in guest user mode with this code selector until it comes back.
fn user_comes_back(code: &[u8], selector: u16) -> Result<TrapFrame, testkit::Stop> {
    let mut space = user::Space::new()?;
    let mut text = Page::new()?;
    text.bytes_mut()[..code.len()].copy_from_slice(code);
    space.map(TEXT, text, Access::ReadExecute)?;
    let mut frame = user::registers(TEXT, TEXT + 0x800);
    frame.cs = selector.into();
    loop {
        frame = user::run(&space, &frame)?;
        if user::exit_of(&frame) != user::Exit::Upcall {
            return Ok(frame);
        }
        guest_sdk::events::turn();
    }
}

/// The entry point that the SDK has for a vector: what arrives there says which it was.
fn entry_point(vector: u8) -> Result<u64, testkit::Stop> {
    let found = guest_sdk::rt::trap::vectors().find(|(number, ..)| *number == vector);
    Ok(found.ok_or("the SDK has no such entry")?.1)
}

/// Whether events are masked: what the hypervisor left when it entered this kernel.
fn events_are_masked() -> bool {
    // SAFETY: a byte of the shared page, which the hypervisor writes, too.
    unsafe { (&raw const (*shared()).vcpu_info[0].evtchn_upcall_mask).read_volatile() != 0 }
}

fn mask_events() {
    // SAFETY: as everywhere in the SDK: Rust runs with events masked.
    unsafe { (&raw mut (*shared()).vcpu_info[0].evtchn_upcall_mask).write_volatile(1) }
}

/// `syscall`, in either mode.
const SYSCALL: [u8; 2] = [0x0f, 0x05];

fn callbacks_of_system_calls_are_entered(_: &mut Domain) -> Verdict {
    let compatible = forced_cpuid_vendor() == *b"AuthenticAMD";
    for (kind, selector, vector) in
        [(CallbackType::Syscall, FLAT_RING3_CS64, 32), (CallbackType::Syscall32, FLAT_RING3_CS32, 128)]
    {
        if kind == CallbackType::Syscall32 && !compatible {
            // SYSCALL in compatibility mode is AMD's.
            continue;
        }
        for flags in [CALLBACKF_MASK_EVENTS, 0, CALLBACKF_MASK_EVENTS] {
            let mut request = registration(kind.number(), entry_point(vector)?);
            request.flags = flags;
            check_eq!(callback(CallbackOp::Register, &mut request), Ok(0), "{kind:?}");
            let back = user_comes_back(&SYSCALL, selector)?;
            let masked = events_are_masked();
            mask_events();
            check_eq!((back.vector, back.rip), (vector.into(), TEXT + 2), "{kind:?}");
            check_eq!(back.cs & 0xffff, selector.into(), "{kind:?}");
            // The flag of one kind of call is that of both: Xen looks at the 64-bit one's.
            check_eq!(masked, kind == CallbackType::Syscall32 || flags != 0, "{kind:?} with flags {flags}");
        }
    }
    Ok(())
}

/// Who made the processor, by CPUID that asks the hypervisor.
fn forced_cpuid_vendor() -> [u8; 12] {
    let (b, c, d): (u32, u32, u32);
    // SAFETY: the prefix asks the hypervisor to carry the instruction out; rbx, which the compiler keeps, is as before.
    unsafe {
        core::arch::asm!(
            "mov rsi, rbx", ".byte 0x0f, 0x0b, 0x78, 0x65, 0x6e, 0x0f, 0xa2", "xchg rsi, rbx",
            inout("eax") 0 => _, out("rsi") b, out("ecx") c, out("edx") d,
        );
    }
    let mut name = [0; 12];
    for (bytes, word) in name.chunks_mut(4).zip([b, d, c]) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    name
}

fn callback_of_sysenter_is_entered_where_the_processor_has_it(_: &mut Domain) -> Verdict {
    let mut request = registration(CallbackType::Sysenter.number(), entry_point(128)?);
    check_eq!(callback(CallbackOp::Register, &mut request), Ok(0));
    let back = user_comes_back(&[0x0f, 0x34], FLAT_RING3_CS64)?;
    let masked = events_are_masked();
    mask_events();
    // AMD's processors do not know the instruction in long mode.
    let wanted = if forced_cpuid_vendor() == *b"AuthenticAMD" { 6 } else { 128 };
    check_eq!(back.vector, wanted);
    check!(masked || wanted == 6);
    request.address = VirtAddr::new(1 << 47);
    check_eq!(callback(CallbackOp::Register, &mut request), Err(Errno::EINVAL));
    Ok(())
}

fn set_callbacks_takes_them(domain: &mut Domain) -> Verdict {
    // The failsafe and syscall entries are not used in this program, so only the event entry has to be a good one.
    let address = own_upcall as *const () as u64;
    check_eq!(call(Hypercall::SetCallbacks, [address, address, address, 0, 0]), Ok(0));
    let port = domain.events.bind_ipi()?;
    port.notify()?;
    // The console's events come there, too.
    let before = UPCALLED.load(Ordering::Relaxed);
    testkit::window();
    check_eq!(UPCALLED.load(Ordering::Relaxed) - before, 1, "upcalls at the new entry");
    check!(port.poll());
    Ok(())
}

fn set_callbacks_ignores_bad_addresses(domain: &mut Domain) -> Verdict {
    let good = own_upcall as *const () as u64;
    for list in [[1 << 47, good, good], [good, 1 << 47, good], [good, good, 1 << 47]] {
        let [event, failsafe, syscall] = list;
        // No error, but the entry that was there stays.
        check_eq!(call(Hypercall::SetCallbacks, [event, failsafe, syscall, 0, 0]), Ok(0), "{list:x?}");
    }
    let before = UPCALLED.load(Ordering::Relaxed);
    let port = domain.events.bind_ipi()?;
    port.notify()?;
    testkit::window();
    check_eq!(UPCALLED.load(Ordering::Relaxed), before + 1);
    check!(port.poll());
    Ok(())
}

static NMIS: AtomicU64 = AtomicU64::new(0);

fn count_nmi(_: &mut TrapFrame) -> bool {
    NMIS.fetch_add(1, Ordering::Relaxed);
    true
}

conformance::counting_handler! {
    /// The address that the SDK registered for vector 2 is not public: an own stub, which counts and returns.
    own_nmi: NMIS
}

fn send_nmi(vcpu: u64) -> Result<u64, Errno> {
    call(Hypercall::VcpuOp, [u64::from(VcpuOp::SendNmi.number()), vcpu, 0, 0, 0])
}

fn nmi_is_delivered(_: &mut Domain) -> Verdict {
    set_handler(2, Some(count_nmi));
    let mut request = NmiCallback { handler_address: own_nmi as *const () as u64, pad: 0 };
    check_eq!(call(Hypercall::NmiOp, [0, at(&mut request), 0, 0, 0]), Ok(0));
    for wanted in 1..4 {
        check_eq!(send_nmi(0), Ok(0));
        // Masked events do not hold it back.
        check_eq!(NMIS.load(Ordering::Relaxed), wanted, "NMIs");
    }
    check_eq!(send_nmi(4000), Err(Errno::ENOENT));
    let mut bad = NmiCallback { handler_address: 1 << 47, pad: 0 };
    check_eq!(call(Hypercall::NmiOp, [0, at(&mut bad), 0, 0, 0]), Err(Errno::EINVAL));
    check_eq!(call(Hypercall::NmiOp, [0, NOWHERE, 0, 0, 0]), Err(Errno::EFAULT));
    Ok(())
}

fn nmi_op_unknown(_: &mut Domain) -> Verdict {
    check_eq!(call(Hypercall::NmiOp, [NmiOp::UnregisterCallback.number().into(), 0, 0, 0, 0]), Ok(0));
    expect_errno(call(Hypercall::NmiOp, [2, 0, 0, 0, 0]), Errno::ENOSYS)
}

fn nmi_can_be_unregistered(_: &mut Domain) -> Verdict {
    let before = NMIS.load(Ordering::Relaxed);
    // Twice is no error. (One that is sent now has nowhere to go.)
    check_eq!(call(Hypercall::NmiOp, [NmiOp::UnregisterCallback.number().into(), 0, 0, 0, 0]), Ok(0));
    check_eq!(call(Hypercall::NmiOp, [NmiOp::UnregisterCallback.number().into(), 0, 0, 0, 0]), Ok(0));
    let mut again = registration(CallbackType::Nmi.number(), own_nmi as *const () as u64);
    check_eq!(callback(CallbackOp::Register, &mut again), Ok(0));
    check_eq!(NMIS.load(Ordering::Relaxed), before);
    check_eq!(send_nmi(0), Ok(0));
    check_eq!(NMIS.load(Ordering::Relaxed), before + 1);
    Ok(())
}

fn legacy_sched_op(_: &mut Domain) -> Verdict {
    check_eq!(call(Hypercall::SchedOpCompat, [0, 0, 0, 0, 0]), Ok(0), "yield");
    for command in [3, 4, 1 << 31] {
        check_eq!(
            call(Hypercall::SchedOpCompat, [command, 0, 0, 0, 0]),
            Err(Errno::ENOSYS),
            "command {command}"
        );
    }
    Ok(())
}

/// The old form: the command, then the argument, in one struct.
#[repr(C)]
struct OldEvtchn<T> {
    command: u32,
    argument: T,
}

fn legacy_event_channel_op(_: &mut Domain) -> Verdict {
    let mut new = OldEvtchn {
        command: EvtchnOp::AllocUnbound.number(),
        argument: EvtchnAllocUnbound { dom: DomId::SELF, remote_dom: DomId::SELF, port: Port::new(0) },
    };
    check_eq!(call(Hypercall::EventChannelOpCompat, [at(&mut new), 0, 0, 0, 0]), Ok(0));
    let port = new.argument.port;
    let mut status = EvtchnStatus { dom: DomId::SELF, port, ..EvtchnStatus::default() };
    check_eq!(evtchn(EvtchnOp::Status, &mut status), Ok(0));
    check_eq!(status.status, 1, "unbound");
    let mut close = OldEvtchn { command: EvtchnOp::Close.number(), argument: EvtchnClose { port } };
    check_eq!(call(Hypercall::EventChannelOpCompat, [at(&mut close), 0, 0, 0, 0]), Ok(0));
    check_eq!(
        call(Hypercall::EventChannelOpCompat, [at(&mut close), 0, 0, 0, 0]),
        Err(Errno::EINVAL),
        "again"
    );
    let mut unknown = OldEvtchn { command: 10, argument: [0u64; 4] };
    check_eq!(call(Hypercall::EventChannelOpCompat, [at(&mut unknown), 0, 0, 0, 0]), Err(Errno::ENOSYS));
    expect_errno(call(Hypercall::EventChannelOpCompat, [NOWHERE, 0, 0, 0, 0]), Errno::EFAULT)
}

fn legacy_physdev_op(_: &mut Domain) -> Verdict {
    // SET_IOPL in the old form; 4 is no level.
    let mut request = [6u32, 0, 0, 0, 0, 0, 0, 0];
    check_eq!(call(Hypercall::PhysdevOpCompat, [at(&mut request), 0, 0, 0, 0]), Ok(0));
    request[2] = 4;
    check_eq!(call(Hypercall::PhysdevOpCompat, [at(&mut request), 0, 0, 0, 0]), Err(Errno::EINVAL));
    let mut unknown = [1000u32, 0, 0, 0, 0, 0, 0, 0];
    check_eq!(call(Hypercall::PhysdevOpCompat, [at(&mut unknown), 0, 0, 0, 0]), Err(Errno::ENOSYS));
    expect_errno(call(Hypercall::PhysdevOpCompat, [NOWHERE, 0, 0, 0, 0]), Errno::EFAULT)
}
