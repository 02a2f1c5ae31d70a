//! COM1, the hypervisor's console: polled output from the first instruction of Rust on, input by interrupt later.
//!
//! Not the crate `uart_16550`: it fixes line speed and interrupts at its own choice, and what is left of it is this file.

use core::sync::atomic::{AtomicBool, Ordering};
use hv::sync::PlainMutex;
use x86_64::instructions::port::Port;

const COM1: u16 = 0x3f8;
/// ISA interrupt of COM1.
pub const COM1_IRQ: u8 = 4;
/// Polls for room in the transmitter before a byte is given up: a dead port must not stop the host.
const PATIENCE: u32 = 100_000;

static PORT_LOCK: PlainMutex<()> = PlainMutex::new(());
static DEAD: AtomicBool = AtomicBool::new(false);

fn write(register: u16, value: u8) {
    // SAFETY: COM1's registers are the hypervisor's alone (no domain is given them), and no write to them touches memory.
    unsafe { Port::<u8>::new(COM1 + register).write(value) }
}

fn read(register: u16) -> u8 {
    // SAFETY: as in `write`.
    unsafe { Port::<u8>::new(COM1 + register).read() }
}

/// Sets 8n1 at `baud` and both FIFOs; interrupts are off.
pub fn init(baud: u32) {
    let divisor = (115_200 / baud.max(1)).clamp(1, 0xffff).to_le_bytes();
    write(1, 0);
    write(3, 0x80);
    write(0, divisor[0]);
    write(1, divisor[1]);
    write(3, 0x03);
    write(2, 0x07);
    write(4, 0x0b);
}

/// Lets received bytes raise an interrupt.
pub fn enable_receive_interrupt() {
    write(1, 1);
}

fn put(byte: u8) {
    if DEAD.load(Ordering::Relaxed) {
        return;
    }
    if (0..PATIENCE).any(|_| read(5) & 0x20 != 0) {
        write(0, byte);
    } else {
        DEAD.store(true, Ordering::Relaxed);
    }
}

/// Writes text, a line feed becoming carriage return and line feed.
pub fn write_bytes(text: &[u8]) {
    let _guard = PORT_LOCK.lock();
    write_unlocked(text);
}

/// Writes text without the lock: for the last words of a host that died, perhaps while it held the lock.
pub fn write_unlocked(text: &[u8]) {
    for &byte in text {
        if byte == b'\n' {
            put(b'\r');
        }
        put(byte);
    }
}

/// Bytes typed and not yet read by anybody.
struct Input {
    bytes: [u8; 256],
    start: usize,
    len: usize,
}

static INPUT: PlainMutex<Input> = PlainMutex::new(Input { bytes: [0; 256], start: 0, len: 0 });

/// Takes received bytes out of the port; what does not fit is lost, as on any terminal.
pub fn receive() {
    let mut input = INPUT.lock();
    // Bounded: a port that is always ready is no port.
    for _ in 0..256 {
        if read(5) & 1 == 0 {
            break;
        }
        let byte = read(0);
        let Input { bytes, start, len } = &mut *input;
        if *len < bytes.len() {
            bytes[(*start + *len) % 256] = byte;
            *len += 1;
        }
    }
}

/// Takes bytes that were typed; returns how many.
pub fn take_input(buf: &mut [u8]) -> usize {
    let mut input = INPUT.lock();
    let count = buf.len().min(input.len);
    for slot in &mut buf[..count] {
        *slot = input.bytes[input.start];
        input.start = (input.start + 1) % 256;
        input.len -= 1;
    }
    count
}
