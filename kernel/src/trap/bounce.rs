//! Frames pushed on a guest's kernel stack when control is bounced to one of its handlers, as data.
//!
//! From low to high addresses: rcx, r11, (failsafe only: ds, es, fs, gs), (error code), rip, cs with the saved event mask
//! in bits 32 to 39, rflags, rsp, ss. The stack is aligned to 16 bytes before the frame. The guest sees its own event
//! mask as the interrupt flag, and tells kernel from user mode by the privilege bits of cs (public/arch-x86/xen.h,
//! x86_64 part).

pub use hypercall_abi::segment::{
    FLAT_KERNEL_CS as KERNEL_CS, FLAT_KERNEL_SS as KERNEL_SS, FLAT_RING3_CS32 as USER_CS32,
};

use crate::x86::layout::HYPERVISOR_END;

bitflags::bitflags! {
    /// The bits of rflags that trap handling touches.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Flags: u64 {
        /// Single step.
        const TF = 1 << 8;
        /// Interrupts; always set while a guest runs.
        const IF = 1 << 9;
        /// String direction.
        const DF = 1 << 10;
        /// I/O privilege level; always 0 while a guest runs.
        const IOPL = 3 << 12;
        /// Nested task.
        const NT = 1 << 14;
        /// Resume: no instruction breakpoint on the next instruction.
        const RF = 1 << 16;
        /// Virtual 8086 mode.
        const VM = 1 << 17;
        /// Alignment check.
        const AC = 1 << 18;
    }
}

/// What an entry into a handler clears.
const CLEARED: Flags = Flags::TF.union(Flags::NT).union(Flags::RF).union(Flags::VM).union(Flags::AC);

/// Whether `address` can be in a guest's address space: canonical, and outside the hypervisor's range.
pub const fn guest_address(address: u64) -> bool {
    address < 0x0000_8000_0000_0000 || address >= HYPERVISOR_END
}

/// What was interrupted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Interrupted {
    pub rcx: u64,
    pub r11: u64,
    pub rip: u64,
    pub cs: u16,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u16,
    /// Whether the guest's kernel (true) or its user mode was.
    pub kernel_mode: bool,
    /// The event mask byte of vcpu_info.
    pub upcall_mask: u8,
}

/// Where control goes, and with what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// The guest's handler, 0 when it has none.
    pub handler: u64,
    /// Whether events are masked on the way.
    pub mask_events: bool,
    /// Pushed below rip when present.
    pub error_code: Option<u32>,
    /// Pushed between r11 and rip when present: ds, es, fs, gs (failsafe callback only).
    pub selectors: Option<[u16; 4]>,
    /// Whether the direction flag is cleared (SYSCALL does, exceptions do not).
    pub clear_df: bool,
    /// I/O privilege shown in the pushed rflags: 0 unless the domain asked for the architectural one.
    pub shown_iopl: u8,
}

impl Delivery {
    /// An exception or callback without error code.
    pub const fn to(handler: u64, mask_events: bool) -> Delivery {
        Delivery { handler, mask_events, error_code: None, selectors: None, clear_df: false, shown_iopl: 0 }
    }
}

/// Longest frame, in words.
pub const MAX_WORDS: usize = 12;

/// A frame to write, and the registers to go on with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// The words, lowest address first.
    pub words: &'a [u64],
    /// Address of the lowest word, the handler's stack pointer.
    pub rsp: u64,
    /// The handler.
    pub rip: u64,
    /// Its flags.
    pub rflags: u64,
}

/// Why there can be no frame; the domain has no way on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoFrame {
    /// The guest registered no handler.
    NoHandler,
    /// Its stack is not in its address space.
    BadStack,
}

impl NoFrame {
    /// The reason, for the crash report.
    pub const fn reason(self) -> &'static str {
        match self {
            NoFrame::NoHandler => "a trap or callback for which it has no handler",
            NoFrame::BadStack => "its kernel stack is outside its address space",
        }
    }
}

/// Builds the frame for `delivery` in `room`. `kernel_sp` is the stack that the guest's kernel registered for entries from its user
/// mode.
#[inline(always)]
pub fn frame<'a>(
    room: &'a mut [u64; MAX_WORDS],
    from: &Interrupted,
    kernel_sp: u64,
    delivery: &Delivery,
) -> Result<Frame<'a>, NoFrame> {
    if delivery.handler == 0 {
        return Err(NoFrame::NoHandler);
    }
    let masked = from.upcall_mask != 0;
    // The guest's kernel finds out by the privilege bits where it came from; both its modes really run in ring 3.
    let cs = if from.kernel_mode { from.cs & !3 } else { from.cs };
    let mut pushed = from.rflags & 0xffff_ffff & !(Flags::IF | Flags::IOPL).bits();
    if !masked {
        pushed |= Flags::IF.bits();
    }
    pushed |= u64::from(delivery.shown_iopl & 3) << 12;

    let mut rflags = from.rflags & !CLEARED.bits();
    if delivery.clear_df {
        rflags &= !Flags::DF.bits();
    }
    let cs = u64::from(cs) | u64::from(from.upcall_mask) << 32;
    // From its end: what differs comes below what does not.
    let mut first = MAX_WORDS;
    let mut push = |word: u64| {
        first = first.saturating_sub(1);
        if let Some(place) = room.get_mut(first) {
            *place = word;
        }
    };
    for word in [u64::from(from.ss), from.rsp, pushed, cs, from.rip] {
        push(word);
    }
    if let Some(error_code) = delivery.error_code {
        push(u64::from(error_code));
    }
    for selector in delivery.selectors.iter().flatten().rev() {
        push(u64::from(*selector));
    }
    push(from.r11);
    push(from.rcx);

    let words = room.get(first..).unwrap_or_default();
    let top = if from.kernel_mode { from.rsp } else { kernel_sp } & !0xf;
    let rsp = top.checked_sub(8 * words.len() as u64).ok_or(NoFrame::BadStack)?;
    if !guest_address(rsp) || !guest_address(top - 1) {
        return Err(NoFrame::BadStack);
    }
    Ok(Frame { words, rsp, rip: delivery.handler, rflags })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86::layout::HYPERVISOR_START;

    fn frame(from: &Interrupted, kernel_sp: u64, delivery: &Delivery) -> Result<Frame<'static>, NoFrame> {
        let room = alloc::boxed::Box::leak(alloc::boxed::Box::new([0; MAX_WORDS]));
        super::frame(room, from, kernel_sp, delivery)
    }

    fn interrupted() -> Interrupted {
        Interrupted {
            rcx: 0xcc,
            r11: 0x11,
            rip: 0x40_1000,
            cs: KERNEL_CS,
            rflags: 0x246,
            rsp: 0x7_fff8,
            ss: KERNEL_SS,
            kernel_mode: true,
            upcall_mask: 0,
        }
    }

    #[test]
    fn an_exception_of_the_kernel_stays_on_its_stack() {
        let delivery = Delivery { error_code: Some(0x10), ..Delivery::to(0x1234, false) };
        let f = frame(&interrupted(), 0x9000, &delivery).unwrap();
        assert_eq!(f.words, [0xcc, 0x11, 0x10, 0x40_1000, 0xe030, 0x246, 0x7_fff8, 0xe02b]);
        assert_eq!(f.rsp, 0x7_fff0 - 64);
        assert_eq!((f.rip, f.rflags), (0x1234, 0x246));
    }

    #[test]
    fn an_entry_from_user_mode_uses_the_registered_stack_and_keeps_the_privilege() {
        let from = Interrupted { kernel_mode: false, cs: 0x33, ss: 0x2b, upcall_mask: 1, ..interrupted() };
        let f = frame(&from, 0x9008, &Delivery::to(0x1234, true)).unwrap();
        assert_eq!(f.words, [0xcc, 0x11, 0x40_1000, 0x1_0000_0033, 0x046, 0x7_fff8, 0x2b]);
        assert_eq!(f.rsp, 0x9000 - 56);
    }

    #[test]
    fn the_failsafe_frame_carries_the_data_selectors() {
        let delivery = Delivery { selectors: Some([1, 2, 3, 4]), ..Delivery::to(0x1234, true) };
        let f = frame(&interrupted(), 0, &delivery).unwrap();
        assert_eq!(f.words, [0xcc, 0x11, 1, 2, 3, 4, 0x40_1000, 0xe030, 0x246, 0x7_fff8, 0xe02b]);
    }

    #[test]
    fn handlers_start_without_trap_nested_resume_and_alignment_flags() {
        let all = Flags::all().bits() | 0x8d7;
        let f = frame(&Interrupted { rflags: all, ..interrupted() }, 0, &Delivery::to(1, false)).unwrap();
        assert_eq!(f.rflags, all & !0x0007_4100);
        // What is pushed keeps them, but shows the event mask as IF and hides IOPL.
        assert_eq!(f.words[4], all & !0x3000);
        let syscall = Delivery { clear_df: true, ..Delivery::to(1, false) };
        let f = frame(&Interrupted { rflags: all, ..interrupted() }, 0, &syscall).unwrap();
        assert_eq!(f.rflags & Flags::DF.bits(), 0);
    }

    #[test]
    fn the_architectural_iopl_is_shown_on_request() {
        let delivery = Delivery { shown_iopl: 1, ..Delivery::to(1, false) };
        assert_eq!(frame(&interrupted(), 0, &delivery).unwrap().words[4], 0x1246);
    }

    #[test]
    fn a_stack_that_touches_the_hypervisor_or_wraps_is_refused() {
        let delivery = Delivery::to(1, false);
        for rsp in [0, 0x30, HYPERVISOR_START + 8, HYPERVISOR_END, HYPERVISOR_END + 48, 0x0000_8000_0000_0010]
        {
            let from = Interrupted { rsp, ..interrupted() };
            assert_eq!(frame(&from, 0, &delivery), Err(NoFrame::BadStack), "{rsp:#x}");
        }
        for rsp in [0x40, HYPERVISOR_END + 64, u64::MAX, 0x0000_8000_0000_0000] {
            assert!(frame(&Interrupted { rsp, ..interrupted() }, 0, &delivery).is_ok(), "{rsp:#x}");
        }
    }

    #[test]
    fn without_a_handler_there_is_no_frame() {
        assert_eq!(frame(&interrupted(), 0, &Delivery::to(0, false)), Err(NoFrame::NoHandler));
    }
}
