//! What a new domain finds in rsi: the start-info page (public/xen.h `start_info`).

use bitflags::bitflags;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::{Mfn, Port};

/// Bytes for the command line, with its zero.
pub const MAX_GUEST_CMDLINE: usize = 1024;

bitflags! {
    /// Bits of [`StartInfo::flags`].
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct StartFlags: u32 {
        /// The domain has control rights.
        const PRIVILEGED = 1 << 0;
        /// It is the first domain.
        const INITDOMAIN = 1 << 1;
        /// `mod_start` points at a [`MultibootModule`] list.
        const MULTIBOOT_MOD = 1 << 2;
        /// `mod_start` is a frame number and the module is not mapped.
        const MOD_START_PFN = 1 << 3;
        /// Whoever saves the domain understands a linear physical-to-machine table.
        const VIRT_P2M_4TOOLS = 1 << 4;
        /// Power-management options.
        const PM_MASK = 0xff << 8;
    }
}

/// Start of day, one page, mapped writable in the guest.
///
/// Written by the builder before the first instruction; when a domain resumes, the fields up to the console are written anew.
/// On suspend the guest puts frame numbers of its own in place of `store_mfn` and the console's frame, for the saver.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct StartInfo {
    /// "xen-3.0-x86_64", zero-padded.
    pub magic: [u8; 32],
    /// Pages the domain has.
    pub nr_pages: u64,
    /// Machine address of the shared page.
    pub shared_info: u64,
    /// [`StartFlags`].
    pub flags: u32,
    /// Padding.
    pub pad0: u32,
    /// Machine frame of the xenstore ring.
    pub store_mfn: Mfn,
    /// Its port.
    pub store_evtchn: Port,
    /// Padding.
    pub pad1: u32,
    /// [`ConsoleStart`]: where the console is; for the first domain [`Dom0ConsoleStart`] lies here instead.
    pub console: ConsoleStart,
    /// Virtual address of the root page table.
    pub pt_base: u64,
    /// Page-table frames from there on.
    pub nr_pt_frames: u64,
    /// Virtual address of the physical-to-machine list.
    pub mfn_list: u64,
    /// Virtual address (or frame number, see the flags) of the module; 0 when there is none.
    pub mod_start: u64,
    /// Its length in bytes.
    pub mod_len: u64,
    /// Command line, ended by a zero.
    pub cmd_line: [u8; MAX_GUEST_CMDLINE],
    /// First frame of the physical-to-machine list when it has an address of its own.
    pub first_p2m_pfn: u64,
    /// Frames of it.
    pub nr_p2m_frames: u64,
}

/// The console of a domain other than the first: a ring page and a port.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ConsoleStart {
    /// Machine frame of the ring.
    pub mfn: Mfn,
    /// Its port.
    pub evtchn: Port,
    /// Padding.
    pub pad0: u32,
}

/// The first domain's view of the same bytes: the video console's description in the start-info page.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Dom0ConsoleStart {
    /// Offset of the description from the start of the page; 0 when there is none.
    pub info_off: u32,
    /// Its size in bytes.
    pub info_size: u32,
    /// Padding to the size of [`ConsoleStart`].
    pub pad0: u64,
}

/// One module of a multiboot list, when the flags say so.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct MultibootModule {
    /// Address of the first byte.
    pub mod_start: u32,
    /// Address of the last byte.
    pub mod_end: u32,
    /// Address of the command line.
    pub cmdline: u32,
    /// Zero.
    pub pad: u32,
}

impl StartInfo {
    /// The magic of this interface.
    pub const MAGIC: &'static [u8] = b"xen-3.0-x86_64";

    /// All zero but the magic: a base to fill in.
    #[must_use]
    pub fn new() -> Self {
        let mut info = Self::new_zeroed();
        for (to, from) in info.magic.iter_mut().zip(Self::MAGIC) {
            *to = *from;
        }
        info
    }

    /// Stores a command line; what does not fit before the final zero is cut off. Tells whether all fitted.
    pub fn set_command_line(&mut self, text: &[u8]) -> bool {
        self.cmd_line = [0; MAX_GUEST_CMDLINE];
        for (to, from) in self.cmd_line.iter_mut().take(MAX_GUEST_CMDLINE - 1).zip(text) {
            *to = *from;
        }
        text.len() < MAX_GUEST_CMDLINE
    }

    /// The command line without its zero.
    #[must_use]
    pub fn command_line(&self) -> &[u8] {
        let end = self.cmd_line.iter().position(|&byte| byte == 0).unwrap_or(self.cmd_line.len());
        self.cmd_line.get(..end).unwrap_or(&[])
    }

    /// The flags, unknown bits kept.
    #[must_use]
    pub const fn flags(&self) -> StartFlags {
        StartFlags::from_bits_retain(self.flags)
    }
}

impl Default for StartInfo {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_is_cut_with_room_for_its_zero() {
        let mut info = StartInfo::new();
        assert!(info.set_command_line(b"console=hvc0"));
        assert_eq!(info.command_line(), b"console=hvc0");
        assert!(info.set_command_line(&[b'x'; 1023]));
        assert!(!info.set_command_line(&[b'x'; 1024]));
        assert_eq!(info.command_line().len(), 1023);
        assert_eq!(info.cmd_line[1023], 0);
        assert!(info.magic.starts_with(b"xen-3.0-x86_64\0"));
    }
}
