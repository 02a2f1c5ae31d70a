//! Debug registers of a guest: what may be in them.
//!
//! Breakpoints never point into the hypervisor's range, so that no breakpoint of a guest fires in ring 0 by its address.
//! Breakpoints on ports are not loaded into the processor: every port access of a guest is emulated, and matched there.

use super::bounce::guest_address;

/// DR6 after reset: bits that read as 1.
pub const DR6_DEFAULT: u64 = 0xffff_0ff0;
/// DR7 after reset: the bit that reads as 1.
pub const DR7_DEFAULT: u64 = 0x400;
/// Bits of DR6 that read as 0.
const DR6_ZERO: u64 = 1 << 12;
/// Bits of DR7 that read as 0.
const DR7_ZERO: u64 = 3 << 11 | 3 << 14;
/// Faults on every access to a debug register: not for guests.
const GENERAL_DETECT: u64 = 1 << 13;
/// Local and global enable bits of the four breakpoints.
pub const ENABLES: u64 = 0xff;
/// Single step, in DR6.
pub const SINGLE_STEP: u64 = 1 << 14;

/// Why a value is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// There is no such register: an undefined instruction.
    NoRegister,
    /// Bits that must be zero are not.
    Reserved,
    /// Valid, but not for a guest.
    Denied,
}

/// The debug registers as a guest left them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DebugRegs {
    /// Addresses of the four breakpoints.
    pub address: [u64; 4],
    /// Status.
    pub dr6: u64,
    /// Control, without the enable bits of breakpoints on ports.
    pub dr7: u64,
    /// Enable bits of breakpoints on ports.
    pub dr7_ports: u64,
}

impl Default for DebugRegs {
    fn default() -> DebugRegs {
        DebugRegs { address: [0; 4], dr6: DR6_DEFAULT, dr7: DR7_DEFAULT, dr7_ports: 0 }
    }
}

impl DebugRegs {
    /// Reads register `number`. `extensions` is CR4.DE: without it, 4 and 5 are other names of 6 and 7.
    pub fn read(&self, number: u64, extensions: bool) -> Result<u64, Refused> {
        match number {
            0..=3 => self.address.get(number as usize).copied().ok_or(Refused::NoRegister),
            4 | 5 if extensions => Err(Refused::NoRegister),
            4 | 6 => Ok(self.dr6),
            5 | 7 => Ok(self.dr7 | self.dr7_ports),
            _ => Err(Refused::NoRegister),
        }
    }

    /// Writes register `number`.
    pub fn write(&mut self, number: u64, value: u64, extensions: bool) -> Result<(), Refused> {
        if number > 3 && number < 8 && !(extensions && number < 6) && value >> 32 != 0 {
            return Err(Refused::Reserved);
        }
        match number {
            0..=3 => {
                if !guest_address(value) {
                    return Err(Refused::Denied);
                }
                *self.address.get_mut(number as usize).ok_or(Refused::NoRegister)? = value;
            }
            4 | 5 if extensions => return Err(Refused::NoRegister),
            4 | 6 => self.dr6 = value & !DR6_ZERO | DR6_DEFAULT,
            5 | 7 => self.write_control(value & !DR7_ZERO | DR7_DEFAULT, extensions)?,
            _ => return Err(Refused::NoRegister),
        }
        Ok(())
    }

    fn write_control(&mut self, value: u64, extensions: bool) -> Result<(), Refused> {
        if value & GENERAL_DETECT != 0 {
            return Err(Refused::Denied);
        }
        let mut ports = 0;
        // With all breakpoints off their kinds do not matter.
        if value & ENABLES != 0 {
            for i in 0..4 {
                if kind(value, i) == KIND_PORT {
                    if !extensions {
                        return Err(Refused::Denied);
                    }
                    ports |= value & 3 << (2 * i);
                }
            }
        }
        self.dr7_ports = ports;
        self.dr7 = value & !ports;
        Ok(())
    }

    /// Which breakpoints (bits 0 to 3, as in DR6) an access to `bytes` ports from `port` up hits.
    pub fn port_hits(&self, port: u16, bytes: u8, extensions: bool) -> u64 {
        if self.dr7_ports == 0 || !extensions {
            return 0;
        }
        let (first, end) = (u64::from(port), u64::from(port) + u64::from(bytes));
        self.address.iter().enumerate().fold(0, |hits, (i, address)| {
            let width = match self.dr7 >> (18 + 4 * i) & 3 {
                0 => 1,
                1 => 2,
                2 => 8,
                _ => 4,
            };
            let start = address & !(width - 1);
            let hit =
                self.dr7_ports & 3 << (2 * i) != 0 && start < end && start.saturating_add(width) > first;
            hits | u64::from(hit) << i
        })
    }

    /// Takes over what the processor reported in DR6 (`hardware`) for a debug exception in the guest: bits that it set
    /// or, of those that read as 1 by default, cleared.
    pub fn record(&mut self, hardware: u64) {
        self.dr6 |= hardware & !DR6_DEFAULT;
        self.dr6 &= hardware | !DR6_DEFAULT;
    }
}

const KIND_PORT: u64 = 2;

/// What breakpoint `i` waits for: 0 execution, 1 writes, 2 port accesses, 3 reads and writes.
fn kind(dr7: u64, i: u64) -> u64 {
    dr7 >> (16 + 4 * i) & 3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn breakpoints_stay_out_of_the_hypervisor() {
        let mut d = DebugRegs::default();
        for bad in [0xffff_8000_0000_0000, 0xffff_82d0_4000_0000, 0xffff_87ff_ffff_ffff, 0x8000_0000_0000] {
            assert_eq!(d.write(1, bad, false), Err(Refused::Denied));
        }
        for good in [0, 0x7fff_ffff_ffff, 0xffff_8800_0000_0000, u64::MAX] {
            assert_eq!(d.write(1, good, false), Ok(()));
            assert_eq!(d.read(1, false), Ok(good));
        }
    }

    #[test]
    fn reserved_bits_read_as_they_must() {
        let mut d = DebugRegs::default();
        assert_eq!(d.write(6, 1 << 32, false), Err(Refused::Reserved));
        assert_eq!(d.write(7, 1 << 32, false), Err(Refused::Reserved));
        assert_eq!(d.write(6, 0xffff_ffff, false), Ok(()));
        assert_eq!(d.read(6, false), Ok(0xffff_efff));
        assert_eq!(d.write(6, 0, false), Ok(()));
        assert_eq!(d.read(6, false), Ok(DR6_DEFAULT));
        assert_eq!(d.write(7, 0, false), Ok(()));
        assert_eq!(d.read(7, false), Ok(DR7_DEFAULT));
        assert_eq!(d.write(7, 1 << 13, false), Err(Refused::Denied));
    }

    #[test]
    fn four_and_five_are_aliases_without_extensions() {
        let mut d = DebugRegs::default();
        assert_eq!(d.write(5, 3, false), Ok(()));
        assert_eq!(d.read(7, false), Ok(0x403));
        assert_eq!(d.read(4, false), d.read(6, false));
        assert_eq!(d.read(4, true), Err(Refused::NoRegister));
        assert_eq!(d.write(5, 1 << 40, true), Err(Refused::NoRegister));
        assert_eq!(d.read(8, false), Err(Refused::NoRegister));
        assert_eq!(d.write(u64::MAX, 0, false), Err(Refused::NoRegister));
    }

    #[test]
    fn port_breakpoints_are_kept_from_the_processor_and_matched_by_emulation() {
        let mut d = DebugRegs::default();
        // Breakpoint 1: local, on ports, 2 bytes.
        let dr7 = 1 << 2 | 2 << 20 | 1 << 22;
        assert_eq!(d.write(7, dr7, false), Err(Refused::Denied), "only with CR4.DE");
        d.write(1, 0x70, true).unwrap();
        d.write(7, dr7, true).unwrap();
        assert_eq!(d.dr7 & ENABLES, 0);
        assert_eq!(d.read(7, true), Ok(dr7 | DR7_DEFAULT));
        assert_eq!(d.port_hits(0x71, 1, true), 2);
        assert_eq!(d.port_hits(0x6e, 4, true), 2);
        assert_eq!(d.port_hits(0x72, 4, true), 0);
        assert_eq!(d.port_hits(0x71, 1, false), 0);
        d.write(7, 0, true).unwrap();
        assert_eq!(d.port_hits(0x71, 1, true), 0);
    }

    #[test]
    fn hardware_status_is_merged() {
        let mut d = DebugRegs::default();
        d.record(DR6_DEFAULT | 1 | SINGLE_STEP);
        assert_eq!(d.dr6, DR6_DEFAULT | 1 | SINGLE_STEP);
        // Bit 16 reads as 1 unless a transaction was involved.
        d.record(DR6_DEFAULT & !(1 << 16));
        assert_eq!(d.dr6, (DR6_DEFAULT | 1 | SINGLE_STEP) & !(1 << 16));
    }
}
