//! The second serial port of a PC (16550A), as a stream for the management channel.

use crate::management::Stream;
use guest_sdk::events::Events;
use guest_sdk::hardware::{Line, Ports};

/// COM2: its first port and its interrupt pin.
const COM2: u16 = 0x2f8;
const PIN: u32 = 3;
/// Bytes that its transmitter takes when it is empty.
const FIFO: usize = 16;

// Registers, and what is used of them.
const DATA: u16 = 0;
const INTERRUPTS: u16 = 1;
const IDENTIFICATION: u16 = 2;
const LINE_CONTROL: u16 = 3;
const MODEM_CONTROL: u16 = 4;
const LINE_STATUS: u16 = 5;
const SCRATCH: u16 = 7;
const RECEIVED: u8 = 1;
const TRANSMITTER_EMPTY: u8 = 1 << 5;

/// The port.
pub struct Serial {
    ports: Ports,
    line: Line,
    /// The pin is held until [`Line::end`] is said.
    fired: bool,
}

impl Serial {
    /// The second port, if there is one.
    ///
    /// # Errors
    /// What to say when there is one that cannot be used.
    pub fn second(events: &Events) -> Result<Option<Self>, alloc::string::String> {
        let refused = |what: &str| alloc::format!("the second serial port is there, but {what}");
        let Ok(ports) = Ports::open(COM2, 8) else { return Ok(None) };
        // What is not there reads as ones, whatever was written.
        for pattern in [0x5a, 0xa5] {
            ports.write(SCRATCH, pattern);
            if ports.read(SCRATCH) != pattern {
                return Ok(None);
            }
        }
        ports.write(INTERRUPTS, 0);
        // The latch of the divisor, 115200 baud; eight bits, no parity; both queues on and empty.
        for (register, value) in [
            (LINE_CONTROL, 0x80),
            (DATA, 1),
            (INTERRUPTS, 0),
            (LINE_CONTROL, 3),
            (IDENTIFICATION, 7),
            (MODEM_CONTROL, 0xb),
        ] {
            ports.write(register, value);
        }
        let line = Line::bind(events, PIN)
            .map_err(|errno| refused(&alloc::format!("its interrupt is not: {errno}")))?;
        Ok(Some(Self { ports, line, fired: false }))
    }
}

impl Stream for Serial {
    fn read(&mut self, to: &mut [u8]) -> usize {
        let mut count = 0;
        for byte in to {
            if self.ports.read(LINE_STATUS) & RECEIVED == 0 {
                break;
            }
            *byte = self.ports.read(DATA);
            count += 1;
        }
        count
    }

    fn write(&mut self, from: &[u8]) -> usize {
        if from.is_empty() || self.ports.read(LINE_STATUS) & TRANSMITTER_EMPTY == 0 {
            return 0;
        }
        let count = from.len().min(FIFO);
        from.iter().take(count).for_each(|byte| self.ports.write(DATA, *byte));
        count
    }

    async fn changed(&mut self, read: bool, write: bool) {
        // What nobody takes care of may not hold the pin, which would interrupt without end.
        self.ports.write(INTERRUPTS, u8::from(read) | u8::from(write) << 1);
        // Reading it takes back that the transmitter is empty; what else there is stays.
        let _ = self.ports.read(IDENTIFICATION);
        if core::mem::take(&mut self.fired) {
            // None that is known.
            let _ = self.line.end();
        }
        // It may have become so before it was asked for.
        let status = self.ports.read(LINE_STATUS);
        if (read && status & RECEIVED != 0) || (write && status & TRANSMITTER_EMPTY != 0) {
            return;
        }
        self.line.channel.fired().await;
        self.fired = true;
    }
}
