//! External interrupts: from a vector to policy's question "what happened?".

use super::{apic, ioapic, serial};
use core::sync::atomic::{AtomicU32, Ordering};
use x86_64::instructions::port::Port;

/// Pin of the console's serial port, which is the hypervisor's own.
static CONSOLE_PIN: AtomicU32 = AtomicU32::new(u32::MAX);

/// Vector of the last pin that there can be.
const LAST_PIN: u8 = 0x7f;
/// Vector of the first message interrupt: behind the one that guests may raise.
const FIRST_MESSAGE: u8 = 0x81;
/// The vector after the last; those above are the processors' own.
const END_OF_MESSAGES: u8 = 0xf0;
/// How many message interrupts there are.
pub const MESSAGES: u32 = (END_OF_MESSAGES - FIRST_MESSAGE) as u32;
/// Where a device writes to interrupt a processor: bits 12-19 say which (Intel SDM 3, 11.11.1).
const MESSAGE_ADDRESS: u64 = 0xfee0_0000;

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
    /// A device's message, by its number.
    Message(u32),
    /// A vector that nobody was given.
    Unknown(u8),
    /// Something was typed at the console.
    Console,
    /// Nothing: the interrupt was withdrawn.
    Nothing,
}

/// Acknowledges the interrupt of `vector` and says what it was.
pub fn acknowledge(vector: u8) -> Cause {
    let cause = match vector {
        apic::VECTOR_SPURIOUS => return Cause::Nothing,
        apic::VECTOR_TIMER => Cause::Timer,
        apic::VECTOR_KICK => Cause::Kick,
        apic::VECTOR_FLUSH => Cause::Flush,
        ioapic::FIRST_VECTOR..=LAST_PIN => {
            let pin = u32::from(vector - ioapic::FIRST_VECTOR);
            if pin == CONSOLE_PIN.load(Ordering::Relaxed) {
                serial::receive();
                Cause::Console
            } else {
                ioapic::begin(pin);
                Cause::Pin(pin)
            }
        }
        FIRST_MESSAGE..END_OF_MESSAGES => Cause::Message(u32::from(vector - FIRST_MESSAGE)),
        _ => Cause::Unknown(vector),
    };
    apic::end_of_interrupt();
    cause
}

/// Address and value of the store that raises message `index` (fixed, by edge) on the processor with this APIC id. `None` when
/// there is no such message, or the address has no room for the id.
pub fn message(index: u32, apic_id: u32) -> Option<(u64, u32)> {
    let vector = u8::try_from(index).ok().filter(|_| index < MESSAGES)? + FIRST_MESSAGE;
    let destination = apic::device_destination(apic_id)?;
    apic::watch(vector);
    Some((MESSAGE_ADDRESS | u64::from(destination) << 12, u32::from(vector)))
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
