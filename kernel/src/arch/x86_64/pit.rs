//! Channel 2 of the interval timer (8254), which counts without an interrupt: what the clock is calibrated with where there is
//! nothing better. Ports as on every PC.

use x86_64::instructions::port::Port;

const CHANNEL_2: u16 = 0x42;
const COMMAND: u16 = 0x43;
/// Bit 0 lets channel 2 count, bit 1 leads it to the speaker, bit 5 is its output.
const GATE: u16 = 0x61;

fn read(port: u16) -> u8 {
    // SAFETY: the ports of this module, which have been the timer's since the PC/AT; boot alone uses them.
    unsafe { Port::<u8>::new(port).read() }
}

fn write(port: u16, value: u8) {
    // SAFETY: as for `read`; channel 2 interrupts nobody.
    unsafe { Port::<u8>::new(port).write(value) }
}

/// Counts from 0 on, for 65535 ticks.
pub fn start() {
    write(GATE, read(GATE) & !2 | 1);
    // Channel 2, both bytes, mode 0: down to the end, once.
    write(COMMAND, 0xb0);
    write(CHANNEL_2, 0xff);
    write(CHANNEL_2, 0xff);
}

/// Ticks since [`start`]; the last value there is when they are over.
pub fn count() -> u64 {
    if read(GATE) & 0x20 != 0 {
        return 0xffff;
    }
    // Latch, then the lower byte and the upper one.
    write(COMMAND, 0x80);
    let low = read(CHANNEL_2);
    0xffff - u64::from(u16::from_le_bytes([low, read(CHANNEL_2)]))
}
