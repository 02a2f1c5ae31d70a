//! Which segment descriptors a guest may have in its tables, and what a selector means.
//!
//! A descriptor of a guest must not give it privilege: code and data segments are forced to DPL 3, call gates to a form
//! that always faults, and system segments (task state, local tables, interrupt gates) are refused. Bases and limits need
//! no check: paging protects the hypervisor.

use super::bounce::KERNEL_CS;

/// Descriptors in one frame.
pub const PER_FRAME: u32 = 512;
/// First GDT entry that is the hypervisor's: 14 frames of the guest's come before it.
pub const FIRST_RESERVED: u32 = 14 * PER_FRAME;

const PRESENT: u64 = 1 << 47;
const CODE_OR_DATA: u64 = 1 << 44;
const CODE: u64 = 1 << 43;
const LONG: u64 = 1 << 53;
const DPL: u64 = 3 << 45;
const TYPE: u64 = 0xf << 40;
const CALL_GATE: u64 = 0xc << 40;

/// The descriptor that may stand in a guest's table where it asked for `raw`, or `None` if there is none.
///
/// Applied to all 512 words of a page that becomes a descriptor page, and to each word that
/// `update_descriptor` writes.
pub fn sanitise(raw: u64) -> Option<u64> {
    // A descriptor that is not present faults whenever it is used, whatever else it says.
    if raw & PRESENT == 0 {
        return Some(raw);
    }
    if raw & CODE_OR_DATA != 0 {
        return Some(raw | DPL);
    }
    match raw & TYPE {
        // The upper half of a 16-byte call gate looks like this; as a descriptor it is invalid and faults. Its DPL is
        // of no consequence.
        0 => Some(raw),
        CALL_GATE => {
            let target = (raw >> 16) as u16;
            // Bits 32 to 39 are reserved (parameter count of 32-bit gates).
            if !gate_target_ok(target) || raw >> 32 & 0xff != 0 {
                return None;
            }
            // DPL 0 makes every use fault. The privilege the guest wanted (at least 3) is kept in the selector.
            Some(raw & !DPL | 3 << 16)
        }
        _ => None,
    }
}

/// Whether a gate may lead to this selector: the guest's own segments and the flat kernel code segment.
fn gate_target_ok(selector: u16) -> bool {
    u32::from(selector >> 3) < FIRST_RESERVED || selector == KERNEL_CS || selector & 4 != 0
}

/// A segment of 16- or 32-bit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Legacy {
    /// Linear address of its first byte.
    pub base: u32,
    /// Offset of its last byte.
    pub limit: u32,
    /// Whether it is 32-bit code.
    pub big: bool,
}

impl Legacy {
    /// All of the first 4 GiB, 32-bit code.
    pub const FLAT: Legacy = Legacy { base: 0, limit: u32::MAX, big: true };
}

/// What instruction fetch by a code selector means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodeSegment {
    /// 64-bit code: flat.
    Long,
    /// 16- or 32-bit code.
    Legacy(Legacy),
    /// No present code segment.
    None,
}

/// Reads a descriptor as a code segment.
pub fn code_segment(raw: u64) -> CodeSegment {
    if raw & (PRESENT | CODE_OR_DATA | CODE) != PRESENT | CODE_OR_DATA | CODE {
        CodeSegment::None
    } else if raw & LONG != 0 {
        CodeSegment::Long
    } else {
        const BIG: u64 = 1 << 54;
        const PAGES: u64 = 1 << 55;
        let limit = (raw & 0xffff | raw >> 32 & 0xf_0000) as u32;
        CodeSegment::Legacy(Legacy {
            base: (raw >> 16 & 0xff_ffff | raw >> 32 & 0xff00_0000) as u32,
            limit: if raw & PAGES != 0 { limit << 12 | 0xfff } else { limit },
            big: raw & BIG != 0,
        })
    }
}

/// The base of a descriptor that a data segment register can hold; `None` for one whose load faults.
pub fn data_segment(raw: u64) -> Option<u64> {
    const READABLE: u64 = 1 << 41;
    // Data segments can always be read; code segments if they say so.
    let loads = raw & (PRESENT | CODE_OR_DATA) == PRESENT | CODE_OR_DATA && raw & (CODE | READABLE) != CODE;
    loads.then_some(raw >> 16 & 0xff_ffff | raw >> 32 & 0xff00_0000)
}

/// A selector with the least privilege bits a guest may have.
pub const fn guest_selector(selector: u16) -> u16 {
    selector | 3
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FLAT_CODE64: u64 = 0x00af_9b00_0000_ffff;
    const FLAT_DATA: u64 = 0x00cf_9300_0000_ffff;

    #[test]
    fn code_and_data_get_privilege_3() {
        assert_eq!(sanitise(FLAT_CODE64), Some(0x00af_fb00_0000_ffff));
        assert_eq!(sanitise(FLAT_DATA), Some(0x00cf_f300_0000_ffff));
        assert_eq!(sanitise(0x00cf_f300_0000_ffff), Some(0x00cf_f300_0000_ffff));
    }

    #[test]
    fn absent_descriptors_are_left_alone() {
        for raw in [0, 0x0000_0900_0000_0000, !PRESENT] {
            assert_eq!(sanitise(raw), Some(raw));
        }
    }

    #[test]
    fn system_segments_and_gates_are_refused() {
        for kind in [1, 2, 3, 5, 6, 7, 8, 9, 0xa, 0xb, 0xd, 0xe, 0xf] {
            assert_eq!(sanitise(PRESENT | kind << 40), None, "{kind:#x}");
        }
    }

    #[test]
    fn call_gates_always_fault_and_lead_to_guest_code_only() {
        let gate = |selector: u64, dpl: u64| PRESENT | CALL_GATE | dpl << 45 | selector << 16 | 0x1234;
        assert_eq!(sanitise(gate(0xe033, 3)), Some(gate(0xe033, 0)));
        assert_eq!(sanitise(gate(0x10, 0)), Some(gate(0x13, 0)));
        assert_eq!(sanitise(gate(0xe008, 3)), None, "the hypervisor's code segment");
        assert_eq!(sanitise(gate(0xe00c, 3)), Some(gate(0xe00f, 0)), "an LDT selector");
        assert_eq!(sanitise(gate(0x10, 3) | 1 << 32), None);
    }

    #[test]
    fn code_segments_are_recognised() {
        assert_eq!(code_segment(FLAT_CODE64), CodeSegment::Long);
        assert_eq!(code_segment(0x00cf_fb00_0000_ffff), CodeSegment::Legacy(Legacy::FLAT));
        let small = Legacy { base: 0x1234_5678, limit: 0x9_0fff, big: false };
        assert_eq!(code_segment(0x1209_fb34_5678_0fff), CodeSegment::Legacy(small));
        assert_eq!(code_segment(FLAT_DATA), CodeSegment::None);
        assert_eq!(code_segment(FLAT_CODE64 & !PRESENT), CodeSegment::None);
    }

    #[test]
    fn data_segments_give_their_base() {
        assert_eq!(data_segment(FLAT_DATA), Some(0));
        assert_eq!(data_segment(0x12cf_f334_5678_ffff), Some(0x1234_5678));
        assert_eq!(data_segment(FLAT_CODE64), Some(0));
        assert_eq!(data_segment(FLAT_CODE64 & !(1 << 41)), None, "code that cannot be read");
        assert_eq!(data_segment(0), None);
        assert_eq!(data_segment(PRESENT | CALL_GATE), None);
    }

    proptest! {
        /// Whatever is accepted gives no privilege, and accepting it again changes nothing.
        #[test]
        fn no_accepted_descriptor_gives_privilege(raw in any::<u64>()) {
            if let Some(safe) = sanitise(raw) {
                prop_assert_eq!(sanitise(safe), Some(safe));
                if safe & PRESENT != 0 && safe & CODE_OR_DATA != 0 {
                    prop_assert_eq!(safe & DPL, DPL);
                } else if safe & PRESENT != 0 {
                    prop_assert!(safe & TYPE == 0 || safe & (TYPE | DPL) == CALL_GATE);
                }
            }
        }
    }
}
