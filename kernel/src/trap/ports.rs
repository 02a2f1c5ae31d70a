//! Ports of the machine as a domain sees them.
//!
//! A port that a domain has the right to is the machine's, with exceptions that are Xen's too. Ports that lead to more than one
//! register by an index (the CMOS RAM with the clock, PCI configuration) have an index register for each domain: two domains that
//! use them by turns do not meet in the machine's. And of the interval timer, which nobody has the right to, the first domain gets
//! the third counter, the one behind the loudspeaker.

use core::sync::atomic::Ordering;

use super::decode::Width;
use crate::domain::{Current, Domain};
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;

/// Count of the interval timer's third counter.
const PIT_COUNTER_2: u32 = 0x42;
/// Command register of the interval timer.
const PIT_MODE: u32 = 0x43;
/// Gate of the third counter, and the loudspeaker.
const SPEAKER: u32 = 0x61;
/// The bits of [`SPEAKER`] that are not somebody else's.
const SPEAKER_BITS: u32 = 3;
/// Index and data of the CMOS RAM.
const CMOS_INDEX: u32 = 0x70;
const CMOS_DATA: u32 = 0x71;
/// Index register of PCI configuration: only as 4 bytes at once.
const PCI_INDEX: u32 = 0xcf8;
/// Its data, 4 bytes.
const PCI_DATA: u32 = 0xcfc;
const PCI_DATA_END: u32 = 0xcff;
/// Bit of the PCI index: the data are configuration space.
const PCI_ENABLE: u32 = 1 << 31;

impl<P: Platform> Hypervisor<P> {
    /// Reads ports; those that the domain does not have read as all ones.
    pub(super) fn read_ports(&self, current: &Current, port: u16, width: Width) -> u32 {
        let (domain, port, bytes) = (current.domain(), u32::from(port), width.bytes());
        if reaches(domain, port, bytes) {
            return self.machine_in(port, bytes);
        }
        let (mut value, mut done) = (0, 0);
        while done < bytes {
            let (part, size) = self.read_part(domain, port + u32::from(done), bytes - done);
            value |= (part & ones(size)) << (8 * done);
            done += size;
        }
        value
    }

    /// Writes ports; for those that the domain does not have the value is dropped.
    pub(super) fn write_ports(&self, current: &Current, port: u16, width: Width, value: u32) {
        let (domain, port, bytes) = (current.domain(), u32::from(port), width.bytes());
        if reaches(domain, port, bytes) {
            return self.machine_out(port, bytes, value);
        }
        let mut done = 0;
        while done < bytes {
            let rest = value >> (8 * done);
            done += self.write_part(domain, port + u32::from(done), bytes - done, rest);
        }
    }

    /// Reads as many ports from `port` on, of `left`, as are one register; says how many.
    fn read_part(&self, domain: &Domain, port: u32, left: u8) -> (u32, u8) {
        match port {
            PIT_COUNTER_2 | SPEAKER if domain.is_hardware_domain() => (self.machine_in(port, 1), 1),
            // The command register cannot be read.
            PIT_MODE if domain.is_hardware_domain() => (0, 1),
            CMOS_INDEX => (u32::from(domain.cmos_index.load(Ordering::Relaxed)), 1),
            CMOS_DATA if has(domain, CMOS_INDEX, 2) => {
                let _both = self.indexed_ports.lock();
                self.machine_out(CMOS_INDEX, 1, cmos_index(domain));
                (self.machine_in(CMOS_DATA, 1), 1)
            }
            CMOS_DATA => (u32::MAX, 1),
            PCI_INDEX if left == 4 => (domain.pci_index.load(Ordering::Relaxed), 4),
            PCI_DATA..=PCI_DATA_END => {
                let size = pci_size(port, left);
                if !domain.is_hardware_domain() {
                    return (u32::MAX, size);
                }
                let _both = self.indexed_ports.lock();
                self.machine_out(PCI_INDEX, 4, domain.pci_index.load(Ordering::Relaxed));
                (self.machine_in(port, size), size)
            }
            _ if !has(domain, port, 1) => (u32::MAX, 1),
            _ => {
                let size = pair(domain, port, left);
                (self.machine_in(port, size), size)
            }
        }
    }

    /// Writes as many ports from `port` on, of `left`, as are one register; says how many.
    fn write_part(&self, domain: &Domain, port: u32, left: u8, value: u32) -> u8 {
        match port {
            PIT_COUNTER_2 | PIT_MODE | SPEAKER => {
                if domain.is_hardware_domain() {
                    self.write_timer(port, value & 0xff);
                }
                1
            }
            CMOS_INDEX => {
                domain.cmos_index.store(value as u8, Ordering::Relaxed);
                1
            }
            CMOS_DATA => {
                if has(domain, CMOS_INDEX, 2) {
                    let _both = self.indexed_ports.lock();
                    self.machine_out(CMOS_INDEX, 1, cmos_index(domain));
                    self.machine_out(CMOS_DATA, 1, value & 0xff);
                }
                1
            }
            PCI_INDEX if left == 4 => {
                domain.pci_index.store(value, Ordering::Relaxed);
                4
            }
            PCI_DATA..=PCI_DATA_END => {
                let size = pci_size(port, left);
                let index = domain.pci_index.load(Ordering::Relaxed);
                if domain.is_hardware_domain() && index & PCI_ENABLE != 0 {
                    let _both = self.indexed_ports.lock();
                    self.machine_out(PCI_INDEX, 4, index);
                    self.machine_out(port, size, value & ones(size));
                }
                size
            }
            _ if !has(domain, port, 1) => 1,
            _ => {
                let size = pair(domain, port, left);
                self.machine_out(port, size, value & ones(size));
                size
            }
        }
    }

    /// A write of the first domain to what it has of the interval timer.
    fn write_timer(&self, port: u32, value: u32) {
        match port {
            PIT_COUNTER_2 => self.machine_out(PIT_COUNTER_2, 1, value),
            PIT_MODE => match value & 0xc0 {
                // A command to the third counter, and one that latches it: among several, only it.
                0x80 => self.machine_out(PIT_MODE, 1, value),
                0xc0 if value & 0x08 != 0 => self.machine_out(PIT_MODE, 1, value & 0xf8),
                // The other two count for the hypervisor.
                _ => {}
            },
            _ => {
                let _both = self.indexed_ports.lock();
                let others = self.machine_in(SPEAKER, 1) & !SPEAKER_BITS;
                self.machine_out(SPEAKER, 1, others & 0xff | value & SPEAKER_BITS);
            }
        }
    }

    /// A port that lies behind the last one reads as ones.
    fn machine_in(&self, port: u32, bytes: u8) -> u32 {
        u16::try_from(port).map_or(u32::MAX, |port| self.platform.port_in(port, bytes))
    }

    fn machine_out(&self, port: u32, bytes: u8, value: u32) {
        if let Ok(port) = u16::try_from(port) {
            self.platform.port_out(port, bytes, value);
        }
    }
}

/// Whether the domain was given these ports of the machine.
fn has(domain: &Domain, port: u32, bytes: u8) -> bool {
    let last = u64::from(port) + u64::from(bytes) - 1;
    domain.rights.lock().ports.contains(u64::from(port), last)
}

/// Whether an access goes to the machine as it is: the domain has all the ports, and none is behind an index of its own.
fn reaches(domain: &Domain, port: u32, bytes: u8) -> bool {
    let pci = port == PCI_INDEX && bytes == 4;
    let cmos = port <= CMOS_DATA && port + u32::from(bytes) > CMOS_INDEX;
    !pci && !cmos && has(domain, port, bytes)
}

/// The index of the CMOS RAM without its highest bit, which masks NMIs.
fn cmos_index(domain: &Domain) -> u32 {
    u32::from(domain.cmos_index.load(Ordering::Relaxed) & 0x7f)
}

/// How much of PCI configuration space an access of `left` bytes at `port` moves: 1, 2 or 4 bytes.
fn pci_size(port: u32, left: u8) -> u8 {
    match left.min(4 - (port & 3) as u8) {
        3 => 2,
        size => size,
    }
}

/// 2 for an even port with another that the domain has behind it, if as much is wanted, and 1 otherwise.
fn pair(domain: &Domain, port: u32, left: u8) -> u8 {
    if left > 1 && port & 1 == 0 && has(domain, port + 1, 1) { 2 } else { 1 }
}

/// A mask of this many bytes, 1 to 4.
fn ones(bytes: u8) -> u32 {
    u32::MAX >> (32 - 8 * u32::from(bytes))
}
