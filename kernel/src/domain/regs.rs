//! Registers of a vCPU, in the order in which the entry code saves them.

/// General registers and interrupt frame of a vCPU at its last entry into ring 0.
///
/// `arch::x86_64::entry` pushes these words from the end (`ss`) to the beginning (`r15`), straight into the vCPU that runs:
/// the order is part of that assembly.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct GuestRegs {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    /// How ring 0 was entered: an interrupt vector, or one of the `ENTRY_*` numbers above 255.
    pub vector: u64,
    /// The processor's error code, 0 where the vector has none.
    pub error_code: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

/// Entered by SYSCALL from 64-bit code.
pub const ENTRY_SYSCALL: u64 = 0x100;
/// Entered by SYSCALL from 32-bit code.
pub const ENTRY_SYSCALL32: u64 = 0x101;
/// Entered by SYSENTER.
pub const ENTRY_SYSENTER: u64 = 0x102;
/// The IRET back to the guest faulted, with the vector that is added to this: the registers are those it was to resume with.
pub const ENTRY_IRET_FAULT: u64 = 0x200;
/// The last of them: vector 31.
pub const ENTRY_IRET_FAULT_LAST: u64 = ENTRY_IRET_FAULT + 31;

impl GuestRegs {
    /// The arguments of a hypercall: rdi, rsi, rdx, r10, r8, r9.
    pub fn args(&self) -> [u64; 6] {
        [self.rdi, self.rsi, self.rdx, self.r10, self.r8, self.r9]
    }
    /// Replaces the arguments of a hypercall that is restarted.
    ///
    /// No hypercall has a sixth argument, so guests (Linux among them) count on finding r9 as they left it.
    pub fn set_args(&mut self, args: [u64; 6]) {
        [self.rdi, self.rsi, self.rdx, self.r10, self.r8, _] = args;
    }
}
