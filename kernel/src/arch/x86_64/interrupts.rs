//! External interrupts: from a vector to policy's question "what happened?".

use super::{apic, ioapic, serial};
use core::sync::atomic::{AtomicU32, Ordering};
use x86_64::instructions::port::Port;

/// Pin of the console's serial port, which is the hypervisor's own.
static CONSOLE_PIN: AtomicU32 = AtomicU32::new(u32::MAX);

/// What an interrupt was about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// This CPU's timer.
    Timer,
    /// Another CPU left work here.
    Kick,
    /// Another CPU wants translations dropped.
    Flush,
    /// A device's pin.
    Pin(u32),
    /// Something was typed at the console.
    Console,
    /// Nothing: the interrupt was withdrawn, or nobody knows it.
    Nothing,
}

/// Acknowledges the interrupt of `vector` and says what it was.
pub fn acknowledge(vector: u8) -> Cause {
    let cause = match vector {
        apic::VECTOR_SPURIOUS => return Cause::Nothing,
        apic::VECTOR_TIMER => Cause::Timer,
        apic::VECTOR_KICK => Cause::Kick,
        apic::VECTOR_FLUSH => Cause::Flush,
        ioapic::FIRST_VECTOR..0x80 => {
            let pin = u32::from(vector - ioapic::FIRST_VECTOR);
            if pin == CONSOLE_PIN.load(Ordering::Relaxed) {
                serial::receive();
                Cause::Console
            } else {
                ioapic::begin(pin);
                Cause::Pin(pin)
            }
        }
        _ => Cause::Nothing,
    };
    apic::end_of_interrupt();
    cause
}

/// Shuts both old interrupt controllers: all lines masked, their vectors moved off the exceptions.
pub fn silence_pics() {
    for (port, value) in [
        (0x20, 0x11),
        (0xa0, 0x11),
        (0x21, 0x20),
        (0xa1, 0x28),
        (0x21, 4),
        (0xa1, 2),
        (0x21, 1),
        (0xa1, 1),
        (0x21, 0xff),
        (0xa1, 0xff),
    ] {
        // SAFETY: the two controllers' initialisation sequence, on ports that are theirs on every PC.
        unsafe { Port::<u8>::new(port).write(value) };
    }
}

/// Opens the console's pin.
pub fn open_console(pin: u32) {
    CONSOLE_PIN.store(pin, Ordering::Relaxed);
    serial::enable_receive_interrupt();
    ioapic::mask(pin, false);
}
