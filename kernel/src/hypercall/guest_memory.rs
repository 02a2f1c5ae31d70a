//! Typed copies between guest memory and the hypervisor: copy in once, decide on the copy, copy out.

use hypercall_abi::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::hypervisor::Hypervisor;
use crate::platform::Platform;

impl<P: Platform> Hypervisor<P> {
    /// Copies one `T` from guest virtual address `va` of the running vCPU. `EFAULT` when it cannot be read.
    pub fn read_guest<T: FromBytes + IntoBytes>(&self, va: u64) -> Result<T, Errno> {
        let mut value = T::new_zeroed();
        self.platform.copy_from_guest(value.as_mut_bytes(), va).map_err(|_| Errno::EFAULT)?;
        Ok(value)
    }

    /// Copies one `T` to guest virtual address `va` of the running vCPU. `EFAULT` when it cannot be written.
    pub fn write_guest<T: IntoBytes + Immutable>(&self, va: u64, value: &T) -> Result<(), Errno> {
        self.platform.copy_to_guest(va, value.as_bytes()).map_err(|_| Errno::EFAULT)
    }

    /// Copies element `index` of an array of `T` at `va`.
    pub fn read_guest_item<T: FromBytes + IntoBytes>(&self, va: u64, index: u64) -> Result<T, Errno> {
        self.read_guest(item_address::<T>(va, index)?)
    }

    /// Writes element `index` of an array of `T` at `va`.
    pub fn write_guest_item<T: IntoBytes + Immutable>(
        &self,
        va: u64,
        index: u64,
        value: &T,
    ) -> Result<(), Errno> {
        self.write_guest(item_address::<T>(va, index)?, value)
    }
}

/// Address of an array element; wrapping round the address space is a fault.
pub fn item_address<T>(va: u64, index: u64) -> Result<u64, Errno> {
    index.checked_mul(size_of::<T>() as u64).and_then(|o| va.checked_add(o)).ok_or(Errno::EFAULT)
}

/// Whether a list at `va` may be the guest's: what Xen asks of a handle before it looks at what is there. A list that begins
/// in the guest's part runs into addresses that no entry translates before it reaches the hypervisor's.
pub fn is_guest_list(va: u64) -> bool {
    !(1 << 47..0xffff_8800_0000_0000).contains(&va)
}

/// Whether elements `first` to `last` of a list of `T` at `va` may be the guest's: as [`is_guest_list`], and so few that their
/// size is a number.
pub fn is_guest_part<T>(va: u64, first: u64, last: u64) -> bool {
    let size = size_of::<T>().max(1) as u64;
    let count = last.wrapping_sub(first).wrapping_add(1);
    count < u64::MAX / size && is_guest_list(va.wrapping_add(first.wrapping_mul(size)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_the_guest() {
        for (va, whose) in [
            (0, true),
            ((1 << 47) - 1, true),
            (1 << 47, false),
            (0xffff_7fff_ffff_ffff, false),
            (0xffff_87ff_ffff_ffff, false),
            (0xffff_8800_0000_0000, true),
            (u64::MAX, true),
        ] {
            assert_eq!(is_guest_list(va), whose, "{va:#x}");
            assert_eq!(is_guest_part::<u64>(va, 0, 0), whose, "{va:#x}");
        }
        // The part that is left is looked at, wherever the list began.
        assert!(!is_guest_part::<u64>((1 << 47) - 8, 1, 1));
        assert!(is_guest_part::<u64>(0xffff_87ff_ffff_fff8, 1, 1));
        assert!(is_guest_part::<u64>(0, 0, u64::MAX / 8 - 2));
        for last in [u64::MAX / 8 - 1, u64::MAX / 8, u64::MAX - 1] {
            assert!(!is_guest_part::<u64>(0, 0, last), "{last:#x}");
        }
        assert!(is_guest_part::<u64>(0, u64::MAX, u64::MAX), "one element");
    }
}
