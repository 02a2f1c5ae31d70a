//! The few ACPI facts ring 0 needs: processors, interrupt controllers and overrides (MADT), PM timer, power-off and reset
//! (FADT and the `_S5` object), the HPET. ACPI specification 6.5, sections 5.2.5 to 5.2.12; IA-PC HPET 1.0a, 3.2.4.
//!
//! Everything else of ACPI is dom0's. The crate `acpi` allocates and interprets AML; a scan for one constant package does
//! not earn that in ring 0.

use super::phys::{PhysMemory, u16_at, u32_at, u64_at};
use arrayvec::ArrayVec;

/// Processors we keep.
pub const MAX_CPUS: usize = 64;
/// I/O APICs we keep.
pub const MAX_IOAPICS: usize = 8;
/// Tables behind the root table that we look at.
const MAX_TABLES: usize = 128;
/// The longest table we read: beyond any real one.
const MAX_TABLE_LEN: usize = 4 << 20;

/// An I/O APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoApic {
    /// Its id.
    pub id: u8,
    /// Machine address of its registers.
    pub address: u64,
    /// First global system interrupt.
    pub gsi_base: u32,
}

/// Where an ISA interrupt really arrives, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Override {
    /// ISA interrupt number.
    pub isa: u8,
    /// Global system interrupt it is wired to.
    pub gsi: u32,
    /// Level-triggered rather than edge.
    pub level: bool,
    /// Active low rather than high.
    pub active_low: bool,
}

/// Registers for power and reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Power {
    /// Port of the PM1a control block.
    pub pm1a_control: u16,
    /// Port of the PM1b control block, 0 when there is none.
    pub pm1b_control: u16,
    /// Port of the power-management timer, 0 when there is none.
    pub pm_timer: u16,
    /// Whether that timer counts 32 bits instead of 24.
    pub pm_timer_32: bool,
    /// SLP_TYPa and SLP_TYPb of state S5, if the DSDT has the object in plain form.
    pub s5: Option<(u8, u8)>,
    /// Reset register in I/O space and the value that resets.
    pub reset: Option<(u16, u8)>,
    /// Offset of the century in CMOS memory, 0 for none.
    pub century: u8,
}

/// A processor by its two names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Processor {
    /// Its local APIC's, by which interrupts reach it.
    pub apic_id: u32,
    /// That of its object in firmware's tables (ACPI processor id or UID).
    pub acpi_id: u32,
}

/// What the tables say.
#[derive(Clone, Debug, Default)]
pub struct AcpiInfo {
    /// Usable processors, the boot processor wherever firmware put it.
    pub cpus: ArrayVec<Processor, MAX_CPUS>,
    /// How many usable processors there were beyond [`MAX_CPUS`].
    pub cpus_dropped: usize,
    /// Machine address of the local APICs.
    pub local_apic: u64,
    /// I/O APICs.
    pub ioapics: ArrayVec<IoApic, MAX_IOAPICS>,
    /// ISA interrupts that are not identity-mapped edge high.
    pub overrides: ArrayVec<Override, 16>,
    /// Power and reset.
    pub power: Power,
    /// Machine address of the first HPET's registers, if there is one.
    pub hpet: Option<u64>,
}

/// Why the tables could not be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AcpiError {
    /// No root pointer where it should be.
    NoRootPointer,
    /// The root pointer or root table is damaged.
    BadRoot,
    /// There is no (intact) MADT.
    NoMadt,
    /// There is no (intact) FADT.
    NoFadt,
}

impl core::fmt::Display for AcpiError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::NoRootPointer => "ACPI: no root pointer (RSDP)",
            Self::BadRoot => "ACPI: damaged root pointer or root table",
            Self::NoMadt => "ACPI: no intact MADT: processors and interrupt controllers are unknown",
            Self::NoFadt => "ACPI: no intact FADT: timer and power-off are unknown",
        })
    }
}

fn checksum(bytes: &[u8]) -> bool {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)) == 0
}

/// A whole table whose length and checksum hold.
fn table<M: PhysMemory>(memory: &M, at: u64) -> Option<&[u8]> {
    let len = usize::try_from(u32_at(memory.bytes(at, 36)?, 4)?).ok()?;
    if !(36..=MAX_TABLE_LEN).contains(&len) {
        return None;
    }
    memory.bytes(at, len).filter(|bytes| checksum(bytes))
}

/// Finds the root pointer in the BIOS areas, for loaders that name none.
fn find_root<M: PhysMemory>(memory: &M) -> Option<u64> {
    let in_area = |start: u64, len: u64| {
        (start..start.saturating_add(len))
            .step_by(16)
            .find(|&at| memory.bytes(at, 20).is_some_and(|b| b.starts_with(b"RSD PTR ") && checksum(b)))
    };
    let ebda = memory.bytes(0x40e, 2).and_then(|b| u16_at(b, 0)).map(|segment| u64::from(segment) << 4);
    ebda.filter(|&at| at >= 0x400).and_then(|at| in_area(at, 1024)).or_else(|| in_area(0xe_0000, 0x2_0000))
}

/// Reads the tables behind the root pointer at `rsdp` (0: look for it).
///
/// # Errors
/// An [`AcpiError`]; a missing `_S5` or reset register is no error.
pub fn parse<M: PhysMemory>(memory: &M, rsdp: u64) -> Result<AcpiInfo, AcpiError> {
    let rsdp = if rsdp != 0 { Some(rsdp) } else { find_root(memory) }.ok_or(AcpiError::NoRootPointer)?;
    let root = memory.bytes(rsdp, 20).filter(|b| b.starts_with(b"RSD PTR ") && checksum(b));
    let root = root.ok_or(AcpiError::NoRootPointer)?;
    let revision = root.get(15).copied().unwrap_or(0);
    let wide = (revision >= 2).then(|| memory.bytes(rsdp, 36).filter(|b| checksum(b))).flatten();
    let wide = wide.and_then(|b| u64_at(b, 24)).filter(|&at| at != 0);
    let (root_table, entry_size) = match wide {
        Some(at) => (at, 8),
        None => (u64::from(u32_at(root, 16).ok_or(AcpiError::BadRoot)?), 4),
    };
    let entries = table(memory, root_table).and_then(|b| b.get(36..)).ok_or(AcpiError::BadRoot)?;

    let mut info = AcpiInfo::default();
    let (mut madt, mut fadt) = (false, false);
    for entry in entries.chunks_exact(entry_size).take(MAX_TABLES) {
        let at = if entry_size == 8 { u64_at(entry, 0) } else { u32_at(entry, 0).map(u64::from) };
        let Some(bytes) = at.and_then(|at| table(memory, at)) else { continue };
        match bytes.get(..4) {
            Some(b"APIC") if !madt => madt = read_madt(bytes, &mut info).is_some(),
            Some(b"FACP") if !fadt => {
                if let Some(power) = read_fadt(memory, bytes) {
                    (info.power, fadt) = (power, true);
                }
            }
            // A damaged one is no HPET.
            Some(b"HPET") if info.hpet.is_none() => info.hpet = read_hpet(bytes),
            _ => {}
        }
    }
    match (madt, fadt) {
        (false, _) => Err(AcpiError::NoMadt),
        (_, false) => Err(AcpiError::NoFadt),
        _ => Ok(info),
    }
}

fn read_madt(bytes: &[u8], info: &mut AcpiInfo) -> Option<()> {
    info.local_apic = u64::from(u32_at(bytes, 36)?);
    let mut rest = bytes.get(44..)?;
    while let [kind, len, ..] = *rest {
        let len = usize::from(len);
        // A record shorter than its own header would loop for ever: the rest of the table cannot be trusted.
        if len < 2 {
            break;
        }
        let Some(record) = rest.get(..len) else { break };
        rest = rest.get(len..).unwrap_or(&[]);
        // A record too short for its kind is skipped.
        let _ = read_madt_record(kind, record, info);
    }
    Some(())
}

fn read_madt_record(kind: u8, record: &[u8], info: &mut AcpiInfo) -> Option<()> {
    let mut add_cpu = |apic_id: u32, flags: u32, acpi_id: u32| {
        let known = info.cpus.iter().any(|cpu| cpu.apic_id == apic_id);
        if flags & 1 != 0 && !known && info.cpus.try_push(Processor { apic_id, acpi_id }).is_err() {
            info.cpus_dropped = info.cpus_dropped.saturating_add(1);
        }
    };
    match kind {
        0 => add_cpu(u32::from(*record.get(3)?), u32_at(record, 4)?, u32::from(*record.get(2)?)),
        9 => add_cpu(u32_at(record, 4)?, u32_at(record, 8)?, u32_at(record, 12)?),
        1 => {
            let ioapic = IoApic {
                id: *record.get(2)?,
                address: u64::from(u32_at(record, 4)?),
                gsi_base: u32_at(record, 8)?,
            };
            info.ioapics.try_push(ioapic).ok()?;
        }
        2 => {
            let flags = u16_at(record, 8)?;
            // Polarity in bits 0-1 and trigger in bits 2-3: 3 is low and level, 0 the bus default (ISA: high and edge).
            let entry = Override {
                isa: *record.get(3)?,
                gsi: u32_at(record, 4)?,
                level: (flags >> 2) & 3 == 3,
                active_low: flags & 3 == 3,
            };
            info.overrides.try_push(entry).ok()?;
        }
        5 => info.local_apic = u64_at(record, 4)?,
        _ => {}
    }
    Some(())
}

fn read_fadt<M: PhysMemory>(memory: &M, bytes: &[u8]) -> Option<Power> {
    let port = |offset| u32_at(bytes, offset).and_then(|v| u16::try_from(v).ok());
    let flags = u32_at(bytes, 112)?;
    // RESET_REG is valid when flag 10 says so; address space 1 is I/O.
    let reset = (flags & (1 << 10) != 0 && bytes.get(116) == Some(&1))
        .then(|| Some((u16::try_from(u64_at(bytes, 120)?).ok()?, *bytes.get(128)?)))
        .flatten();
    let dsdt = u64_at(bytes, 140).filter(|&at| at != 0).or_else(|| u32_at(bytes, 40).map(u64::from))?;
    // X_PM_TMR_BLK, for firmware that fills only the new field; in I/O space, as the old one is.
    let new_timer =
        || u64_at(bytes, 212).filter(|_| bytes.get(208) == Some(&1)).and_then(|at| u16::try_from(at).ok());
    Some(Power {
        pm1a_control: port(64)?,
        pm1b_control: port(68)?,
        // What is beyond the ports is no timer; the rest of the table may still be right.
        pm_timer: port(76).filter(|port| *port != 0).or_else(new_timer).unwrap_or(0),
        pm_timer_32: flags & (1 << 8) != 0,
        s5: table(memory, dsdt).and_then(find_s5),
        reset,
        century: bytes.get(108).copied().unwrap_or(0),
    })
}

/// Address of the registers, in memory and where there can be some.
fn read_hpet(bytes: &[u8]) -> Option<u64> {
    // A generic address: space, width, offset, access size, address. Then number, least period, page protection.
    bytes.get(..56)?;
    let at = u64_at(bytes, 44)?;
    // 1 KiB of registers, in a page that page-table entries can name.
    (bytes.get(40) == Some(&0) && at != 0 && at % 1024 == 0 && at < 1 << 52).then_some(at)
}

/// The constant package `Name (_S5, Package () {a, b, ...})` in AML, without interpreting anything else.
fn find_s5(aml: &[u8]) -> Option<(u8, u8)> {
    let at = aml.windows(4).enumerate().find_map(|(at, name)| {
        let named = at >= 1 && aml.get(at.wrapping_sub(1)) == Some(&0x08)
            || at >= 2 && aml.get(at.wrapping_sub(2)..at) == Some(b"\x08\\".as_slice());
        (name == b"_S5_" && named && aml.get(at.saturating_add(4)) == Some(&0x12)).then_some(at)
    })?;
    let package = aml.get(at.checked_add(5)?..)?;
    // PkgLength: the two top bits of its first byte say how many bytes follow. Then the element count.
    let skip = usize::from(package.first()? >> 6).checked_add(2)?;
    let mut rest = package.get(skip..)?;
    let mut number = || {
        let (value, used) = match *rest {
            [0x0a, value, ..] => (value, 2),
            [value @ (0 | 1), ..] => (value, 1),
            _ => return None,
        };
        rest = rest.get(used..)?;
        Some(value & 7)
    };
    Some((number()?, number()?))
}

#[cfg(test)]
mod tests {
    use super::super::phys::Blocks;
    use super::*;
    use std::vec;
    use std::vec::Vec;

    fn seal(signature: &[u8; 4], body: &[u8]) -> Vec<u8> {
        let mut t = signature.to_vec();
        t.extend((36 + body.len() as u32).to_le_bytes());
        t.resize(36, 0);
        t.extend(body);
        t[9] = 0u8.wrapping_sub(t.iter().fold(0, |s: u8, b| s.wrapping_add(*b)));
        t
    }

    fn rsdp(rsdt: u32) -> Vec<u8> {
        let mut r = b"RSD PTR \0XENOLI\0".to_vec();
        r.extend(rsdt.to_le_bytes());
        r[8] = 0u8.wrapping_sub(r.iter().fold(0, |s: u8, b| s.wrapping_add(*b)));
        r
    }

    fn fadt() -> Vec<u8> {
        let mut body = vec![0u8; 148 - 36];
        let mut put = |at: usize, bytes: &[u8]| body[at - 36..at - 36 + bytes.len()].copy_from_slice(bytes);
        put(40, &0x5000u32.to_le_bytes());
        put(64, &0x604u32.to_le_bytes());
        put(76, &0x608u32.to_le_bytes());
        put(108, &[0x32]);
        put(112, &(1u32 << 10 | 1 << 8).to_le_bytes());
        put(116, &[1, 8, 0, 1]);
        put(120, &0xcf9u64.to_le_bytes());
        put(128, &[0x0f]);
        seal(b"FACP", &body)
    }

    fn madt(extra: &[u8]) -> Vec<u8> {
        let mut body = 0xfee0_0000u32.to_le_bytes().to_vec();
        body.extend(1u32.to_le_bytes());
        body.extend([0, 8, 0, 0, 1, 0, 0, 0]);
        body.extend([0, 8, 5, 1, 1, 0, 0, 0]);
        body.extend([0, 8, 2, 2, 0, 0, 0, 0]); // not usable
        body.extend([1, 12, 7, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
        body.extend([2, 10, 0, 9, 9, 0, 0, 0, 0x0d, 0]);
        body.extend([2, 10, 0, 0, 2, 0, 0, 0, 0, 0]);
        body.extend(extra);
        seal(b"APIC", &body)
    }

    fn machine(madt: Vec<u8>, dsdt: &[u8]) -> Blocks {
        let rsdt = seal(b"RSDT", &[0x3000u32.to_le_bytes(), 0x4000u32.to_le_bytes()].concat());
        Blocks(vec![
            (0x1000, rsdp(0x2000)),
            (0x2000, rsdt),
            (0x3000, madt),
            (0x4000, fadt()),
            (0x5000, seal(b"DSDT", dsdt)),
        ])
    }

    const S5: &[u8] = &[1, 2, 3, 0x08, b'_', b'S', b'5', b'_', 0x12, 0x06, 0x04, 0x0a, 5, 0, 0, 0];

    #[test]
    fn reads_processors_controllers_and_power() {
        let info = parse(&machine(madt(&[]), S5), 0x1000).unwrap();
        let [first, second] = [(0, 0), (1, 5)].map(|(apic_id, acpi_id)| Processor { apic_id, acpi_id });
        assert_eq!(info.cpus.as_slice(), [first, second]);
        assert_eq!(info.local_apic, 0xfee0_0000);
        assert_eq!(info.ioapics.as_slice(), [IoApic { id: 7, address: 0xfec0_0000, gsi_base: 0 }]);
        assert_eq!(info.overrides[0], Override { isa: 9, gsi: 9, level: true, active_low: false });
        assert_eq!(info.overrides[1], Override { isa: 0, gsi: 2, level: false, active_low: false });
        let want = Power {
            pm1a_control: 0x604,
            pm1b_control: 0,
            pm_timer: 0x608,
            pm_timer_32: true,
            s5: Some((5, 0)),
            reset: Some((0xcf9, 0x0f)),
            century: 0x32,
        };
        assert_eq!(info.power, want);
    }

    #[test]
    fn damaged_tables_are_not_read() {
        let mut broken = machine(madt(&[]), S5);
        broken.0[2].1[40] ^= 1;
        assert_eq!(parse(&broken, 0x1000).unwrap_err(), AcpiError::NoMadt);
        assert_eq!(parse(&broken, 0x9000).unwrap_err(), AcpiError::NoRootPointer);
        broken.0[1].1[36] ^= 1;
        assert_eq!(parse(&broken, 0x1000).unwrap_err(), AcpiError::BadRoot);
    }

    /// A machine with one more table, `extra`.
    fn machine_with(extra: Vec<u8>) -> Blocks {
        let mut machine = machine(madt(&[]), S5);
        let pointers = [0x3000u32, 0x6000, 0x4000].map(u32::to_le_bytes).concat();
        machine.0[1].1 = seal(b"RSDT", &pointers);
        machine.0.push((0x6000, extra));
        machine
    }

    fn hpet(space: u8, at: u64) -> Vec<u8> {
        let mut body = 0x8086_a201u32.to_le_bytes().to_vec();
        body.extend([space, 64, 0, 0]);
        body.extend(at.to_le_bytes());
        body.extend([0, 0, 0, 0]);
        seal(b"HPET", &body)
    }

    #[test]
    fn a_hpet_is_found_and_a_bad_one_is_none() {
        let found = |table: Vec<u8>| parse(&machine_with(table), 0x1000).unwrap().hpet;
        assert_eq!(found(hpet(0, 0xfed0_0000)), Some(0xfed0_0000));
        assert_eq!(parse(&machine(madt(&[]), S5), 0x1000).unwrap().hpet, None);
        assert_eq!(found(hpet(1, 0xfed0)), None, "in I/O space");
        for bad in [0, 0xfed0_0001, 1 << 52, u64::MAX] {
            assert_eq!(found(hpet(0, bad)), None, "{bad:#x}");
        }
        let whole = hpet(0, 0xfed0_0000);
        for len in 0..whole.len() {
            // Cut short, and its length as it was or as it is.
            assert_eq!(found(whole[..len].to_vec()), None, "{len} bytes");
            if len >= 36 {
                assert_eq!(found(seal(b"HPET", &whole[36..len])), None, "{len} bytes, sealed");
            }
        }
        for at in 0..whole.len() {
            let mut bad = whole.clone();
            bad[at] ^= 0x40;
            assert_eq!(found(bad), None, "byte {at} is spoilt");
        }
        let mut huge = whole;
        huge[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(found(huge), None);
    }

    #[test]
    fn a_pm_timer_may_stand_in_either_field_or_none() {
        let fadt = |old: u32, new: Option<(u8, u64)>| {
            let mut body = fadt()[36..].to_vec();
            body[76 - 36..80 - 36].copy_from_slice(&old.to_le_bytes());
            if let Some((space, at)) = new {
                body.resize(220 - 36, 0);
                body[208 - 36] = space;
                body[212 - 36..].copy_from_slice(&at.to_le_bytes());
            }
            let mut machine = machine(madt(&[]), S5);
            machine.0[3].1 = seal(b"FACP", &body);
            let power = parse(&machine, 0x1000).unwrap().power;
            assert_eq!(power.pm1a_control, 0x604, "the rest is read");
            power.pm_timer
        };
        assert_eq!(fadt(0x608, Some((1, 0x708))), 0x608);
        assert_eq!(fadt(0, Some((1, 0x708))), 0x708);
        assert_eq!(fadt(0, None), 0);
        assert_eq!(fadt(0, Some((0, 0xfed8_0008))), 0, "in memory");
        assert_eq!(fadt(0x1_0608, Some((1, 0x1_0000))), 0, "no ports");
    }

    #[test]
    fn a_fadt_cut_anywhere_is_none_and_no_panic() {
        let whole = fadt();
        for len in 36..whole.len() {
            let mut machine = machine(madt(&[]), S5);
            machine.0[3].1 = seal(b"FACP", &whole[36..len]);
            let _ = parse(&machine, 0x1000);
            machine.0[3].1 = whole[..len].to_vec();
            assert_eq!(parse(&machine, 0x1000).unwrap_err(), AcpiError::NoFadt, "{len} bytes");
        }
    }

    #[test]
    fn a_record_of_length_zero_ends_the_madt() {
        let info = parse(&machine(madt(&[0, 0, 0, 8, 9, 9, 1, 0, 0, 0]), S5), 0x1000).unwrap();
        assert_eq!(info.cpus.len(), 2);
    }

    #[test]
    fn s5_is_taken_only_as_a_plain_package() {
        assert_eq!(find_s5(S5), Some((5, 0)));
        assert_eq!(find_s5(b"_S5_\x12\x06\x04\x0a\x05"), None, "a use is not a definition");
        assert_eq!(find_s5(b"\x08_S5_\x12"), None);
        assert_eq!(find_s5(b"\x08\\_S5_\x12\x40\x06\x04\x01\x0a\x07"), Some((1, 7)));
    }
}
