//! `console_io`: the hypervisor's own console, for domains with the right to it.

use hypercall_abi::Errno;
use hypercall_abi::subops::ConsoleIoOp;

use super::guest_memory::item_address;
use super::{Args, Exit, HcResult};
use crate::access::Verbs;
use crate::domain::Current;
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;

/// Bytes copied at once.
const CHUNK: usize = 128;

/// Writes to the console, or takes what was typed. Returns 0, or the number of bytes read.
///
/// `EPERM` without the right, `EFAULT`, `E2BIG` for a read of 2 GiB or more, `ENOSYS`.
pub fn console_io<P: Platform>(hv: &Hypervisor<P>, current: &mut Current, args: Args) -> HcResult {
    let [command, count, buffer, ..] = args;
    if !current.domain().rights.lock().verbs.contains(Verbs::CONSOLE) {
        return Err(Errno::EPERM.into());
    }
    let count = u64::from(count as u32);
    match ConsoleIoOp::accept(command)? {
        ConsoleIoOp::Write => write(hv, current, command, count, buffer),
        ConsoleIoOp::Read => read(hv, count, buffer),
    }
}

fn write<P: Platform>(
    hv: &Hypervisor<P>,
    current: &mut Current,
    command: u64,
    mut count: u64,
    mut buffer: u64,
) -> HcResult {
    let mut chunk = [0; CHUNK];
    while count > 0 {
        let bytes = chunk.get_mut(..count.min(CHUNK as u64) as usize).unwrap_or_default();
        hv.platform.copy_from_guest(bytes, buffer).map_err(|_| Errno::EFAULT)?;
        hv.platform.console_write(bytes);
        count -= bytes.len() as u64;
        buffer = item_address::<u8>(buffer, bytes.len() as u64)?;
        // A real port is slow: 128 bytes take 11 ms at 115200 baud. Who waits for this CPU waits for no more than that.
        if count > 0 && (current.state.budget.step().is_err() || hv.platform.interrupt_pending()) {
            return Err(Exit::Preempted([command, count, buffer, 0, 0, 0]));
        }
    }
    Ok(0)
}

fn read<P: Platform>(hv: &Hypervisor<P>, count: u64, buffer: u64) -> HcResult {
    if count > i32::MAX as u64 {
        return Err(Errno::E2BIG.into());
    }
    let mut chunk = [0; CHUNK];
    let wanted = chunk.get_mut(..count.min(CHUNK as u64) as usize).unwrap_or_default();
    let got = hv.platform.console_read(wanted);
    if got == 0 {
        // As on Xen, nobody looks at where nothing is to go.
        return Ok(0);
    }
    // What was taken and cannot be stored is lost, as from a terminal.
    hv.platform.copy_to_guest(buffer, wanted.get(..got).unwrap_or_default()).map_err(|_| Errno::EFAULT)?;
    Ok(got as u64)
}
