//! The two-level protocol between the hypervisor, which raises events, and a guest, which takes them.
//!
//! ```text
//!   port p:  pending[p / 64] bit p % 64        shared_info, one bit per port
//!            mask[p / 64]    bit p % 64        shared_info, set by the guest to keep p quiet
//!   vCPU:    selector        bit p / 64        vcpu_info: which words of `pending` to look at
//!            upcall_pending  (one byte)        vcpu_info: look at the selector at all
//! ```
//!
//! The hypervisor goes down this list, the guest comes up (public/event_channel.h, public/xen.h):
//!
//! | raise | guest |
//! |---|---|
//! | 1. set pending; was it set: done | 1. clear upcall_pending |
//! | 2. masked: done | 2. exchange selector with 0 |
//! | 3. set selector bit; was it set: done | 3. for each pending bit that is not masked: clear it, handle the event |
//! | 4. set upcall_pending; was it set: done | |
//! | 5. wake and interrupt the vCPU | |
//!
//! Each step is one atomic read-modify-write, and all are sequentially consistent. So whenever a raise stops early because it
//! found a bit set, the guest had not cleared that bit yet, and everything the raise stored before is visible to the guest
//! when it comes to the level below: no event is lost, and none is announced for nothing but a wake-up too many.
//!
//! Step 2 against a guest that unmasks: the guest clears the mask, *then* reads pending (or has [`unmask`] do it); the raise
//! sets pending, *then* reads the mask. In one total order of the four accesses, at least one sees the other.
//!
//! The same holds for a vCPU that polls: it says so, *then* reads pending; the raise sets pending, *then* looks for pollers.
//!
//! The guest may write anything to these words at any time. It can only lose its own events by that.
//!
//! Generic over the word, so that tests run the very same code in every interleaving (`interleavings`), and under every order that the
//! memory model allows (`models`).

use core::sync::atomic::{AtomicU64, Ordering};

/// A 64-bit word shared with a guest; every operation is one sequentially consistent access.
pub trait Word {
    /// Sets bits; returns the value before.
    #[cfg_attr(all(loom, test), track_caller)]
    fn set_bits(&self, bits: u64) -> u64;
    /// Clears bits; returns the value before.
    #[cfg_attr(all(loom, test), track_caller)]
    fn clear_bits(&self, bits: u64) -> u64;
    /// Inverts bits.
    #[cfg_attr(all(loom, test), track_caller)]
    fn flip_bits(&self, bits: u64);
    /// Reads the word.
    #[cfg_attr(all(loom, test), track_caller)]
    fn read(&self) -> u64;
}

macro_rules! word {
    ($word:ty) => {
        impl Word for $word {
            fn set_bits(&self, bits: u64) -> u64 {
                self.fetch_or(bits, Ordering::SeqCst)
            }
            fn clear_bits(&self, bits: u64) -> u64 {
                self.fetch_and(!bits, Ordering::SeqCst)
            }
            fn flip_bits(&self, bits: u64) {
                self.fetch_xor(bits, Ordering::SeqCst);
            }
            fn read(&self) -> u64 {
                self.load(Ordering::SeqCst)
            }
        }
    };
}
word!(AtomicU64);
#[cfg(all(loom, test))]
word!(crate::sync::atomic::AtomicU64);

/// The words of one port.
#[derive(Clone, Copy)]
pub struct PortWords<'a, W> {
    /// Word of the pending bitmap.
    pub pending: &'a W,
    /// Word of the mask bitmap.
    pub mask: &'a W,
    /// The port's bit in both.
    pub bit: u64,
    /// The port's bit in the selector.
    pub selector_bit: u64,
}

/// The words of the vCPU that is told.
#[derive(Clone, Copy)]
pub struct VcpuWords<'a, W> {
    /// `evtchn_pending_sel`.
    pub selector: &'a W,
    /// The word whose lowest byte is `evtchn_upcall_pending`.
    pub upcall: &'a W,
}

/// What a raise came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Raised {
    /// The port was pending already: nobody needs to be told.
    WasPending,
    /// It is pending now, but masked or announced already: only pollers need to be told.
    Quiet,
    /// The vCPU must be woken.
    Notify,
}

/// Raises an event. `vcpu` is `None` for a vCPU that has no vcpu_info: the event stays pending.
pub fn raise<W: Word>(port: PortWords<'_, W>, vcpu: Option<VcpuWords<'_, W>>) -> Raised {
    if port.pending.set_bits(port.bit) & port.bit != 0 {
        return Raised::WasPending;
    }
    if port.mask.read() & port.bit != 0 {
        return Raised::Quiet;
    }
    announce(port.selector_bit, vcpu)
}

/// Clears the mask of a port, and announces what was held back. [`Raised::Notify`] when the vCPU must be woken.
pub fn unmask<W: Word>(port: PortWords<'_, W>, vcpu: Option<VcpuWords<'_, W>>) -> Raised {
    if port.mask.clear_bits(port.bit) & port.bit == 0 || port.pending.read() & port.bit == 0 {
        return Raised::Quiet;
    }
    announce(port.selector_bit, vcpu)
}

fn announce<W: Word>(selector_bit: u64, vcpu: Option<VcpuWords<'_, W>>) -> Raised {
    let Some(vcpu) = vcpu else { return Raised::Quiet };
    if vcpu.selector.set_bits(selector_bit) & selector_bit != 0 || vcpu.upcall.set_bits(1) & 1 != 0 {
        return Raised::Quiet;
    }
    Raised::Notify
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Guest {
        pending: AtomicU64,
        mask: AtomicU64,
        selector: AtomicU64,
        upcall: AtomicU64,
    }

    impl Guest {
        fn port(&self) -> PortWords<'_, AtomicU64> {
            PortWords { pending: &self.pending, mask: &self.mask, bit: 1 << 5, selector_bit: 1 << 3 }
        }
        fn vcpu(&self) -> Option<VcpuWords<'_, AtomicU64>> {
            Some(VcpuWords { selector: &self.selector, upcall: &self.upcall })
        }
        fn words(&self) -> [u64; 4] {
            [&self.pending, &self.mask, &self.selector, &self.upcall].map(|w| w.load(Ordering::SeqCst))
        }
    }

    #[test]
    fn a_raise_goes_all_the_way_once() {
        let guest = Guest::default();
        assert_eq!(raise(guest.port(), guest.vcpu()), Raised::Notify);
        assert_eq!(guest.words(), [1 << 5, 0, 1 << 3, 1]);
        assert_eq!(raise(guest.port(), guest.vcpu()), Raised::WasPending);
    }

    #[test]
    fn a_masked_port_stays_quiet_until_unmasked() {
        let guest = Guest::default();
        guest.mask.store(1 << 5, Ordering::SeqCst);
        assert_eq!(raise(guest.port(), guest.vcpu()), Raised::Quiet);
        assert_eq!(guest.words(), [1 << 5, 1 << 5, 0, 0]);
        assert_eq!(unmask(guest.port(), guest.vcpu()), Raised::Notify);
        assert_eq!(guest.words(), [1 << 5, 0, 1 << 3, 1]);
        assert_eq!(unmask(guest.port(), guest.vcpu()), Raised::Quiet);
    }

    #[test]
    fn an_announced_vcpu_is_not_told_again() {
        let guest = Guest::default();
        guest.upcall.store(0x101, Ordering::SeqCst);
        assert_eq!(raise(guest.port(), guest.vcpu()), Raised::Quiet);
        assert_eq!(guest.words(), [1 << 5, 0, 1 << 3, 0x101]);
        let without = Guest::default();
        assert_eq!(raise(without.port(), None), Raised::Quiet);
        assert_eq!(without.words(), [1 << 5, 0, 0, 0]);
    }
}
