//! The switch of test builds: a hypervisor that, for the caller's domain, does nothing and gives one answer to everything.
//!
//! `cargo xtask conformance --vacuity` lets each conformance case run between two calls of [`NUMBER`], to see that it does not
//! pass. Only a hypervisor built with the feature `constant-answers` knows the number; to all others it is empty (`-ENOSYS`).

/// The last stub of the hypercall page.
///
/// Arguments: 1 to begin or 0 to end; the answer that each hypercall but iret gives from here on ([`ZERO`] or [`ENOSYS`], or
/// any other word); nanoseconds after which the domain is ended by a watchdog, 0 for never. Gives 0.
pub const NUMBER: u64 = 127;
/// The answer "done".
pub const ZERO: u64 = 0;
/// The answer "there is no such hypercall". Instructions that trap crash the domain.
pub const ENOSYS: u64 = crate::Errno::ENOSYS.to_ret();
/// A text that only a test build contains, and logs when it starts; `cargo xtask audit` looks for it.
pub const MARK: &str = "this is a test build: guests may ask for constant answers";
