//! `multicall`: a list of hypercalls in one entry.

use hypercall_abi::mmu::MulticallEntry;
use hypercall_abi::{Errno, Hypercall};

use super::guest_memory::is_guest_list;
use super::{Args, Exit, HcResult, dispatch};
use crate::domain::Current;
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;

/// Byte offset of `result` in an entry.
const RESULT_OFFSET: u64 = 8;

/// `multicall(list, count)`: runs the entries in order and stores each one's result in it.
///
/// `EFAULT` when the list cannot be read or written; `EINVAL` for a multicall inside a multicall. An entry that is preempted is
/// stored back with the arguments to go on with, and the list goes on from there. An iret entry ends the list: what follows is
/// not run.
pub fn multicall<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [mut list, count, ..] = args;
    // Even one of no calls.
    if !is_guest_list(list) {
        return Err(Errno::EFAULT.into());
    }
    let mut left = count & 0xffff_ffff;
    while left > 0 {
        let mut entry: MulticallEntry = hv.read_guest(list)?;
        let result_at = list.checked_add(RESULT_OFFSET).ok_or(Errno::EFAULT)?;
        let sub_args =
            [entry.args[0], entry.args[1], entry.args[2], entry.args[3], entry.args[4], entry.args[5]];
        let result = match Hypercall::from_number(entry.op) {
            Some(Hypercall::Multicall) => Err(Errno::EINVAL.into()),
            _ => dispatch(hv, current, entry.op, sub_args),
        };
        match result {
            Ok(value) => hv.write_guest(result_at, &value)?,
            Err(Exit::Errno(errno)) => hv.write_guest(result_at, &errno.to_ret())?,
            Err(Exit::Preempted(again)) => {
                entry.args = again;
                hv.write_guest(list, &entry)?;
                return Err(preempted(args, list, left));
            }
            // The registers are another context's now: nothing may be written for the old one.
            Err(exit @ (Exit::RegistersReplaced | Exit::Crash(_))) => return Err(exit),
        }
        left -= 1;
        list = list.checked_add(size_of::<MulticallEntry>() as u64).ok_or(Errno::EFAULT)?;
        if left > 0 && (current.state.budget.step().is_err() || hv.platform.interrupt_pending()) {
            return Err(preempted(args, list, left));
        }
    }
    Ok(0)
}

fn preempted(args: Args, list: u64, left: u64) -> Exit {
    let mut again = args;
    again[0] = list;
    again[1] = left;
    Exit::Preempted(again)
}
