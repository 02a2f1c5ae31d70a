//! Hardware for the first domain: I/O privilege, ports, and a pin of the interrupt controller.
#![no_std]
#![no_main]

extern crate alloc;

use conformance::{NOWHERE, at, call, evtchn, pending, physdev, take_pending};
use guest_sdk::abi::evtchn::{EVTCHNSTAT_PIRQ, EvtchnBindPirq, EvtchnClose, EvtchnStatus, EvtchnUnmask};
use guest_sdk::abi::physdev::{
    MAP_PIRQ_TYPE_GSI, PhysdevEoi, PhysdevIrqStatusQuery, PhysdevMapPirq, PhysdevPirqEoiGmfn,
    PhysdevSetIobitmap, PhysdevSetIopl, PhysdevSetupGsi, PhysdevUnmapPirq,
};
use guest_sdk::abi::sched::SchedPoll;
use guest_sdk::abi::subops::{EvtchnOp, PhysdevOp, SchedOp};
use guest_sdk::abi::{DomId, Errno, Gfn, GuestHandle, Hypercall, Port};
use guest_sdk::memory::{Access, Page};
use guest_sdk::rt::trap::Exception;
use guest_sdk::testkit::{
    self, Stop, Verdict, cases, check, check_eq, expect_errno, expect_vector, probe, user,
};
use guest_sdk::time::now_ns;
use guest_sdk::{Domain, entry};

#[entry]
fn main(domain: Domain) {
    testkit::run(
        domain,
        &cases![
            iopl_opens_ports_to_user_mode,
            iopl_refused,
            iobitmap_opens_single_ports,
            iobitmap_refused,
            map_pirq_refused,
            bind_pirq_refused,
            clock_interrupt_arrives,
            a_pin_is_set_up_once,
            the_page_tells_which_interrupts_need_an_end,
            map_pirq_and_unmap,
            eoi_refused,
            irq_status_refused,
            physdev_unknown,
        ],
    )
}

fn iopl(level: u32) -> Result<u64, Errno> {
    physdev(PhysdevOp::SetIopl, &mut PhysdevSetIopl { iopl: level })
}

/// Runs `in al, 0x71; ud2` as user code: whether the port could be read.
fn user_reads_port() -> Result<bool, Stop> {
    let mut space = user::Space::new()?;
    let mut text = Page::new()?;
    text.bytes_mut()[..4].copy_from_slice(&[0xe4, 0x71, 0x0f, 0x0b]);
    space.map(0x1000_0000, text, Access::ReadExecute)?;
    let mut frame = user::registers(0x1000_0000, 0x1000_0000);
    loop {
        frame = user::run(&space, &frame)?;
        match (frame.vector, frame.rip) {
            (6, 0x1000_0002) => return Ok(true),
            (13, 0x1000_0000) => return Ok(false),
            (testkit_upcall, _) if testkit_upcall == guest_sdk::rt::trap::UPCALL => guest_sdk::events::turn(),
            other => return testkit::fail(format_args!("vector and rip {other:x?}")),
        }
    }
}

fn kernel_reads_port() -> Result<(), Exception> {
    probe!("in al, 0x71")
}

fn iopl_opens_ports_to_user_mode(_: &mut Domain) -> Verdict {
    // Level 0: nobody. 1: the guest's kernel. 3: its user mode, too.
    for (level, kernel, user) in
        [(0, false, false), (1, true, false), (2, true, false), (3, true, true), (0, false, false)]
    {
        check_eq!(iopl(level), Ok(0));
        check_eq!(kernel_reads_port().is_ok(), kernel, "kernel at level {level}");
        check_eq!(user_reads_port()?, user, "user at level {level}");
    }
    Ok(())
}

fn iopl_refused(_: &mut Domain) -> Verdict {
    check_eq!(iopl(4), Err(Errno::EINVAL));
    check_eq!(iopl(u32::MAX), Err(Errno::EINVAL));
    check_eq!(call(Hypercall::PhysdevOp, [6, NOWHERE, 0, 0, 0]), Err(Errno::EFAULT));
    Ok(())
}

fn iobitmap(bitmap: u64, nr_ports: u32) -> Result<u64, Errno> {
    physdev(
        PhysdevOp::SetIobitmap,
        &mut PhysdevSetIobitmap { bitmap: GuestHandle::new(bitmap), nr_ports, pad0: 0 },
    )
}

fn iobitmap_opens_single_ports(_: &mut Domain) -> Verdict {
    // A clear bit allows. Port 0x71 is bit 1 of byte 14.
    static mut MAP: [u8; 32] = [0xff; 32];
    let map = &raw mut MAP;
    check_eq!(iobitmap(map as u64, 256), Ok(0));
    let closed = (user_reads_port()?, kernel_reads_port());
    // SAFETY: a byte of this case; the hypervisor only reads it.
    unsafe { (&raw mut (*map)[14]).write_volatile(0xfd) };
    let open = (user_reads_port()?, kernel_reads_port());
    // Only ports below the limit are looked up.
    check_eq!(iobitmap(map as u64, 0x71), Ok(0));
    let beyond = user_reads_port()?;
    check_eq!(iobitmap(0, 0), Ok(0));
    check_eq!(closed.0, false);
    expect_vector(closed.1, 13, 0)?;
    check_eq!(open, (true, Ok(())));
    check_eq!(beyond, false);
    check_eq!(user_reads_port()?, false, "taken back");
    Ok(())
}

fn iobitmap_refused(_: &mut Domain) -> Verdict {
    check_eq!(iobitmap(0, 65537), Err(Errno::EINVAL));
    check_eq!(iobitmap(0xffff_8300_0000_0000, 256), Err(Errno::EINVAL), "the hypervisor's");
    check_eq!(call(Hypercall::PhysdevOp, [7, NOWHERE, 0, 0, 0]), Err(Errno::EFAULT));
    Ok(())
}

fn map_pirq(kind: i32, index: i32, pirq: i32) -> Result<i32, Errno> {
    let mut argument = PhysdevMapPirq { domid: DomId::SELF, kind, index, pirq, ..PhysdevMapPirq::default() };
    physdev(PhysdevOp::MapPirq, &mut argument)?;
    Ok(argument.pirq)
}

fn unmap_pirq(pirq: i32) -> Result<u64, Errno> {
    physdev(PhysdevOp::UnmapPirq, &mut PhysdevUnmapPirq { domid: DomId::SELF, pad0: 0, pirq })
}

fn bind_pirq(pirq: u32) -> Result<Port, Errno> {
    let mut argument = EvtchnBindPirq { pirq, flags: 0, port: Port::new(0) };
    evtchn(EvtchnOp::BindPirq, &mut argument)?;
    Ok(argument.port)
}

/// The clock chip's pin.
const CLOCK: u32 = 8;

fn map_pirq_and_unmap(_: &mut Domain) -> Verdict {
    if !conformance::is_privileged() {
        return expect_errno(map_pirq(MAP_PIRQ_TYPE_GSI, CLOCK as i32, CLOCK as i32), Errno::EPERM);
    }
    // Last: Xen takes the right to the interrupt away with the mapping.
    check_eq!(map_pirq(MAP_PIRQ_TYPE_GSI, CLOCK as i32, CLOCK as i32), Ok(CLOCK as i32));
    check_eq!(unmap_pirq(CLOCK as i32), Ok(0));
    expect_errno(unmap_pirq(CLOCK as i32), Errno::EINVAL)
}

fn map_pirq_refused(_: &mut Domain) -> Verdict {
    if !conformance::is_privileged() {
        check_eq!(map_pirq(MAP_PIRQ_TYPE_GSI, CLOCK as i32, CLOCK as i32), Err(Errno::EPERM));
        return expect_errno(call(Hypercall::PhysdevOp, [13, NOWHERE, 0, 0, 0]), Errno::EFAULT);
    }
    check_eq!(map_pirq(MAP_PIRQ_TYPE_GSI, 100_000, 8), Err(Errno::EINVAL), "no such pin");
    check_eq!(map_pirq(MAP_PIRQ_TYPE_GSI, -1, 8), Err(Errno::EINVAL), "no such pin");
    check_eq!(map_pirq(77, 8, 8), Err(Errno::EINVAL), "no such kind");
    check_eq!(unmap_pirq(100_000), Err(Errno::EINVAL));
    check_eq!(call(Hypercall::PhysdevOp, [13, NOWHERE, 0, 0, 0]), Err(Errno::EFAULT));
    check_eq!(call(Hypercall::PhysdevOp, [14, NOWHERE, 0, 0, 0]), Err(Errno::EFAULT));
    Ok(())
}

fn bind_pirq_refused(_: &mut Domain) -> Verdict {
    check_eq!(bind_pirq(100_000), Err(Errno::EINVAL));
    check_eq!(bind_pirq(u32::MAX), Err(Errno::EINVAL));
    Ok(())
}

fn cmos_write(register: u8, value: u8) -> Result<(), Exception> {
    probe!(rax = u64::from(register), "out 0x70, al")?;
    probe!(rax = u64::from(value), "out 0x71, al")
}

fn cmos_read(register: u8) -> Result<u8, Exception> {
    let value: u64;
    probe!(rax = u64::from(register), "out 0x70, al")?;
    probe!("in al, 0x71", "mov {v}, rax"; v = out(reg) value)?;
    Ok(value as u8)
}

fn clock_interrupt_arrives(_: &mut Domain) -> Verdict {
    conformance::only_privileged("the clock's interrupt is the first domain's")?;
    check_eq!(iopl(1), Ok(0));
    check_eq!(map_pirq(MAP_PIRQ_TYPE_GSI, CLOCK as i32, CLOCK as i32), Ok(CLOCK as i32));
    let port = bind_pirq(CLOCK)?;
    let mut status = EvtchnStatus { dom: DomId::SELF, port, ..EvtchnStatus::default() };
    check_eq!(evtchn(EvtchnOp::Status, &mut status), Ok(0));
    check_eq!((status.status, status.u0), (EVTCHNSTAT_PIRQ, CLOCK));
    check_eq!(bind_pirq(CLOCK), Err(Errno::EEXIST), "bound already");
    let mut query = PhysdevIrqStatusQuery { irq: CLOCK, flags: u32::MAX };
    check_eq!(physdev(PhysdevOp::IrqStatusQuery, &mut query), Ok(0));
    check_eq!(query.flags & !3, 0, "flags");
    // 16 Hz, periodic interrupt on.
    let (a, b) = (cmos_read(10)?, cmos_read(11)?);
    cmos_write(10, a & 0xf0 | 12)?;
    cmos_write(11, b | 0x40)?;
    cmos_read(12)?;
    take_pending(port);
    check_eq!(evtchn(EvtchnOp::Unmask, &mut EvtchnUnmask { port }), Ok(0));
    let mut beats = 0;
    let start = now_ns();
    let mut list = [port];
    while beats < 4 && now_ns() - start < 3_000_000_000 {
        let ports = GuestHandle::new(list.as_mut_ptr() as u64);
        let timeout = start + 3_000_000_000;
        conformance::sched(SchedOp::Poll, &mut SchedPoll { ports, nr_ports: 1, pad0: 0, timeout })?;
        if take_pending(port) {
            // The chip says that it was it, and the reading ends its request.
            check_eq!(cmos_read(12)? & 0xc0, 0xc0, "register C");
            check_eq!(physdev(PhysdevOp::Eoi, &mut PhysdevEoi { irq: CLOCK }), Ok(0));
            beats += 1;
        }
    }
    let took = now_ns() - start;
    cmos_write(11, b)?;
    cmos_write(10, a)?;
    cmos_read(12)?;
    check_eq!(beats, 4, "beats of the clock in 3 s");
    check!(took > 150_000_000, "four beats of 16 Hz in {took} ns");
    check_eq!(evtchn(EvtchnOp::Close, &mut EvtchnClose { port }), Ok(0));
    check!(!pending(port));
    check_eq!(iopl(0), Ok(0));
    Ok(())
}

/// A pin that a PCI device's line may lead to, and that no driver here uses.
const LINE: u32 = 20;

fn setup_gsi(gsi: i32, triggering: u8, polarity: u8) -> Result<u64, Errno> {
    physdev(PhysdevOp::SetupGsi, &mut PhysdevSetupGsi { gsi, triggering, polarity, ..Default::default() })
}

fn a_pin_is_set_up_once(_: &mut Domain) -> Verdict {
    check_eq!(setup_gsi(-1, 1, 1), Err(Errno::EINVAL));
    if !conformance::is_privileged() {
        return expect_errno(setup_gsi(LINE as i32, 1, 1), Errno::EPERM);
    }
    check_eq!(setup_gsi(LINE as i32, 1, 1), Ok(0));
    check_eq!(setup_gsi(LINE as i32, 0, 0), Err(Errno::EEXIST));
    Ok(())
}

fn eoi_page(command: PhysdevOp, gmfn: u64) -> Result<u64, Errno> {
    physdev(command, &mut PhysdevPirqEoiGmfn { gmfn: Gfn::new(gmfn) })
}

fn the_page_tells_which_interrupts_need_an_end(_: &mut Domain) -> Verdict {
    let page = Page::new()?;
    let frame = page.mfn().get();
    let address = page.leak();
    let bit = |pirq: u32| -> Result<bool, Exception> {
        Ok(testkit::try_read(address + u64::from(pirq / 64) * 8)? >> (pirq % 64) & 1 != 0)
    };
    check_eq!(eoi_page(PhysdevOp::PirqEoiGmfnV1, u64::MAX >> 12), Err(Errno::EINVAL), "no frame");
    // SAFETY: a word of the page that was leaked just now; nobody else knows it yet.
    unsafe { (address as *mut u64).write_volatile(1 << CLOCK) };
    check_eq!(eoi_page(PhysdevOp::PirqEoiGmfnV1, frame), Ok(0));
    check_eq!(eoi_page(PhysdevOp::PirqEoiGmfnV1, frame), Err(Errno::EBUSY));
    check_eq!(eoi_page(PhysdevOp::PirqEoiGmfnV2, frame), Err(Errno::EBUSY));
    if !conformance::is_privileged() {
        check_eq!(bit(CLOCK), Ok(true), "nobody has bound it");
        return Ok(());
    }
    // The clock's is triggered by an edge, the other by a level.
    for (pirq, needs_an_end) in [(CLOCK, false), (LINE, true)] {
        check_eq!(map_pirq(MAP_PIRQ_TYPE_GSI, pirq as i32, pirq as i32), Ok(pirq as i32));
        let port = bind_pirq(pirq)?;
        check_eq!(bit(pirq), Ok(needs_an_end), "pin {pirq}");
        // Who registered the page by the first command has ends unmask the port.
        conformance::mask(port);
        check_eq!(physdev(PhysdevOp::Eoi, &mut PhysdevEoi { irq: pirq }), Ok(0));
        check!(!conformance::masked(port), "pin {pirq}");
        check_eq!(evtchn(EvtchnOp::Close, &mut EvtchnClose { port }), Ok(0));
    }
    Ok(())
}

fn eoi_refused(_: &mut Domain) -> Verdict {
    check_eq!(physdev(PhysdevOp::Eoi, &mut PhysdevEoi { irq: 100_000 }), Err(Errno::EINVAL));
    check_eq!(call(Hypercall::PhysdevOp, [12, NOWHERE, 0, 0, 0]), Err(Errno::EFAULT));
    Ok(())
}

fn irq_status_refused(_: &mut Domain) -> Verdict {
    let mut query = PhysdevIrqStatusQuery { irq: 100_000, flags: 0 };
    check_eq!(physdev(PhysdevOp::IrqStatusQuery, &mut query), Err(Errno::EINVAL));
    check_eq!(call(Hypercall::PhysdevOp, [5, NOWHERE, 0, 0, 0]), Err(Errno::EFAULT));
    Ok(())
}

fn physdev_unknown(_: &mut Domain) -> Verdict {
    check_eq!(iopl(0), Ok(0));
    let mut room = [0u64; 8];
    for command in [0, 3, 18, 22, 32, 1000] {
        check_eq!(
            call(Hypercall::PhysdevOp, [command, at(&mut room), 0, 0, 0]),
            Err(Errno::ENOSYS),
            "command {command}"
        );
    }
    Ok(())
}
