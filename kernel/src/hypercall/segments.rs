//! `set_gdt`, `update_descriptor`, `set_segment_base`: descriptor tables and segment bases.

use core::sync::atomic::Ordering;

use hypercall_abi::segment::FIRST_RESERVED_GDT_ENTRY;
use hypercall_abi::subops::SegmentBase;
use hypercall_abi::{Errno, MachAddr, Mfn, VirtAddr};

use super::{Args, HcResult};
use crate::domain::{Current, GDT_FRAMES};
use crate::hypercall::Budget;
use crate::hypervisor::Hypervisor;
use crate::mm::Kind;
use crate::page_ref::{SegDesc, Writable};
use crate::platform::Platform;
use crate::trap::descriptor;

/// Replaces the guest's GDT by the descriptors in a list of its frames.
///
/// `EINVAL` for more entries than there is room for, and for frames that are not the domain's, are in use as something
/// else, or hold a descriptor that a guest may not have; `EFAULT`.
pub fn set_gdt<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [list, entries, ..] = args;
    let entries = u64::from(entries as u32);
    if entries > FIRST_RESERVED_GDT_ENTRY as u64 {
        return Err(Errno::EINVAL.into());
    }
    let mut frames = [Mfn::new(0); GDT_FRAMES];
    let count = entries.div_ceil(u64::from(descriptor::PER_FRAME));
    for (i, frame) in frames.iter_mut().enumerate().take(count as usize) {
        *frame = hv.read_guest_item(list, i as u64)?;
    }
    let owner = current.domain().id;
    let gdt = hv.take_gdt(owner, &frames, entries).map_err(|_| Errno::EINVAL)?;
    let old = core::mem::replace(&mut current.state.gdt, gdt);
    // The processor forgets the old frames before anybody else may change them.
    hv.platform.load_descriptor_tables(&current.state);
    for mfn in old.frames.into_iter().flatten() {
        hv.release_descriptor_frame(mfn);
    }
    Ok(0)
}

/// Writes one descriptor at a machine address in a frame of the guest's.
///
/// `EINVAL` for an address that is not aligned or not the guest's, for a descriptor that a guest may not have, and for a
/// frame in use as a page table.
pub fn update_descriptor<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [address, raw, ..] = args;
    if !address.is_multiple_of(8) {
        return Err(Errno::EINVAL.into());
    }
    let descriptor = descriptor::sanitise(raw).ok_or(Errno::EINVAL)?;
    let address = MachAddr::new(address);
    let mfn = address.frame();
    let owner = current.domain().id;
    let page = hv.mm.get_page(mfn, owner).ok_or(Errno::EINVAL)?;
    let word = hv.platform.frame(mfn).get(address.offset() / 8).ok_or(Errno::EINVAL)?;
    if hv.mm.type_word(mfn).is_some_and(|w| w.kind() == Kind::SegDesc) {
        // Held as a page of descriptors while it is written, so that it cannot become anything else. One page of
        // descriptors to check at most: bounded work.
        let held = hv.pager().get_typed::<SegDesc>(mfn, owner, hv, &mut Budget::unlimited());
        let held = held.map_err(|_| Errno::EINVAL)?;
        word.store(descriptor, Ordering::Release);
        drop(held);
    } else {
        let (held, debt) = page.typed::<Writable>().map_err(|_| Errno::EINVAL)?;
        hv.pager().pay(debt);
        word.store(descriptor, Ordering::Release);
        drop(held);
    }
    Ok(0)
}

/// Sets the base of FS, of GS in the guest's user mode or kernel, or loads a selector into GS of user mode.
///
/// `EINVAL` for a base that is not canonical or an unknown register. A selector that cannot be loaded becomes null, without
/// an error: Linux gives up when this call fails.
pub fn set_segment_base<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [which, base, ..] = args;
    let which = SegmentBase::accept(which)?;
    if which != SegmentBase::GsUserSel && !VirtAddr::new(base).is_canonical() {
        return Err(Errno::EINVAL.into());
    }
    let selected = match which {
        SegmentBase::GsUserSel => hv.data_segment(current, base as u16),
        _ => (0, 0),
    };
    let state = &mut current.state;
    match which {
        SegmentBase::Fs => state.fs_base = base,
        SegmentBase::GsUser => state.gs_base_user = base,
        SegmentBase::GsKernel => state.gs_base_kernel = base,
        SegmentBase::GsUserSel => (state.selectors.gs, state.gs_base_user) = selected,
    }
    hv.platform.load_segment(state, which);
    Ok(0)
}
