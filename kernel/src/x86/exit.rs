//! What may be handed to IRET and SYSRET: the last decision before a guest runs.

use super::layout::is_canonical;
use crate::domain::GuestRegs;

/// Flat 64-bit guest code, as SYSRET loads it.
const FLAT_CODE: u64 = 0xe033;
/// Flat guest stack, as SYSRET loads it.
const FLAT_STACK: u64 = 0xe02b;

const TF: u64 = 1 << 8;
const IF: u64 = 1 << 9;
const NT: u64 = 1 << 14;
const RF: u64 = 1 << 16;
/// What a guest may choose: CF PF AF ZF SF TF DF OF NT RF AC ID.
const GUEST_FLAGS: u64 = 0xcd5 | TF | NT | RF | 1 << 18 | 1 << 21;

/// Makes registers safe to resume with, whatever policy put there: ring 3, interrupts on, no I/O privilege.
pub fn sanitize(regs: &mut GuestRegs) {
    regs.cs = regs.cs & 0xffff | 3;
    // A null stack selector is legal in 64-bit ring 3 code only with a requested privilege of 3, like any other.
    regs.ss = regs.ss & 0xffff | 3;
    regs.rflags = regs.rflags & GUEST_FLAGS | IF | 2;
}

/// Whether SYSRET may resume `regs` (sanitized). `clobber` says that the guest expects SYSRET's rcx and r11; without, they
/// must hold what SYSRET puts there anyway.
///
/// A non-canonical RIP makes SYSRET fault in ring 0 on Intel processors, on the guest's stack. SYSRET loads fixed
/// selectors and clears RF; a single step or a nested task is left to IRET.
#[must_use]
pub fn may_sysret(regs: &GuestRegs, clobber: bool) -> bool {
    (clobber || regs.rcx == regs.rip && regs.r11 == regs.rflags)
        && is_canonical(regs.rip)
        && regs.cs == FLAT_CODE
        && regs.ss == FLAT_STACK
        && regs.rflags & (TF | NT | RF) == 0
        && regs.rflags & IF != 0
}

/// Flags of which [`sanitize`] changes none and [`may_sysret`] minds none.
const PLAIN_FLAGS: u64 = GUEST_FLAGS & !(TF | NT | RF);

/// Both: makes registers safe to resume with, and tells whether SYSRET may do it.
#[inline(always)]
#[must_use]
pub fn ready(regs: &mut GuestRegs, clobber: bool) -> bool {
    let plain = regs.cs == FLAT_CODE && regs.ss == FLAT_STACK && regs.rflags & !PLAIN_FLAGS == IF | 2;
    if plain && clobber {
        return is_canonical(regs.rip);
    }
    ready_others(regs, clobber)
}

#[inline(never)]
fn ready_others(regs: &mut GuestRegs, clobber: bool) -> bool {
    sanitize(regs);
    may_sysret(regs, clobber)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flat() -> GuestRegs {
        let (rip, rflags) = (0xffff_ffff_8000_1234, 0x246);
        GuestRegs { rip, rcx: rip, rflags, r11: rflags, cs: FLAT_CODE, ss: FLAT_STACK, ..Default::default() }
    }

    #[test]
    fn sysret_only_where_it_gives_what_iret_would() {
        assert!(may_sysret(&flat(), false));
        for spoil in [|r: &mut GuestRegs| r.rcx = 0, |r: &mut GuestRegs| r.r11 = 0x202] {
            let mut r = flat();
            spoil(&mut r);
            assert!(!may_sysret(&r, false));
            assert!(may_sysret(&r, true), "a guest that gives these registers up");
        }
        for spoil in [
            |r: &mut GuestRegs| r.rip = 0x8000_0000_0000,
            |r: &mut GuestRegs| r.rip = 0xffff_7fff_ffff_ffff,
            |r: &mut GuestRegs| r.cs = 0x33,
            |r: &mut GuestRegs| r.cs = 0xe023,
            |r: &mut GuestRegs| r.ss = 0x2b,
            |r: &mut GuestRegs| r.ss = 0,
            |r: &mut GuestRegs| r.rflags |= TF,
            |r: &mut GuestRegs| r.rflags |= NT,
            |r: &mut GuestRegs| r.rflags |= RF,
            |r: &mut GuestRegs| r.rflags &= !IF,
        ] {
            let mut r = flat();
            spoil(&mut r);
            (r.rcx, r.r11) = (r.rip, r.rflags);
            assert!(!may_sysret(&r, false), "{r:x?}");
            assert!(!may_sysret(&r, true), "{r:x?}");
        }
    }

    #[test]
    fn what_is_plain_is_as_if_it_were_not() {
        let each_flag = (0..64).map(|bit| 1u64 << bit);
        let flags = each_flag.flat_map(|flag| [0x246 | flag, 0x246 & !flag, flag]).chain([0, u64::MAX]);
        for rflags in flags {
            for (cs, ss) in [(FLAT_CODE, FLAT_STACK), (0xe023, FLAT_STACK), (FLAT_CODE, 0x2b), (0xe008, 0)] {
                for rip in [0xffff_ffff_8000_1234, 0x8000_0000_0000] {
                    for clobber in [false, true] {
                        let mut regs = GuestRegs { rflags, cs, ss, rip, ..flat() };
                        let mut other = regs;
                        let sysret = ready(&mut regs, clobber);
                        assert_eq!((sysret, regs), (ready_others(&mut other, clobber), other), "{rflags:x}");
                    }
                }
            }
        }
    }

    #[test]
    fn nothing_resumes_in_ring_0_or_with_interrupts_off() {
        let mut r = GuestRegs { cs: 0x1_e008, ss: 0, rflags: !IF, ..flat() };
        sanitize(&mut r);
        assert_eq!((r.cs, r.ss), (0xe00b, 3));
        assert_eq!(r.rflags & (3 << 12 | 1 << 17 | 1 << 19 | 1 << 20), 0, "IOPL, VM, VIF, VIP");
        assert_eq!(r.rflags >> 22, 0);
        assert_eq!(r.rflags & (IF | 2), IF | 2);
        let mut good = flat();
        sanitize(&mut good);
        assert_eq!(good, flat());
    }
}
