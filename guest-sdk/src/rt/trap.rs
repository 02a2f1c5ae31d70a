//! Exceptions, upcalls and system calls: how the hypervisor enters the guest kernel.
//!
//! Every entry finds on the stack, upward from rsp: rcx, r11, an error code where the vector has one, rip, cs (with the
//! saved event mask in its upper half), rflags, rsp, ss. The stubs make one [`TrapFrame`] of it, in which rax, r11, rcx and
//! the error code's slot lie just as the iret hypercall wants them.
//!
//! Three things can be on the other side:
//! - **Guest-user code**: the frame is left on the user-entry stack and [`crate::user::run`] returns.
//! - **A listed instruction** (section `.fixups`): its fix-up address is taken, and the frame's rax says which exception
//!   it was. Vector registers are untouched on this path: it is assembly from end to end.
//! - **Anything else** is a bug of this guest: registers are printed and the domain crashes. A handler that was set with
//!   [`set_handler`] is asked first.
//!
//! Events never interrupt Rust: they are masked from start to end and let in only by the instructions in
//! [`crate::events`]; the upcall stub counts the upcall and returns masked.

use crate::rt::start::fatal;
use core::arch::{asm, naked_asm};
use core::fmt;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// The registers of interrupted code, in the order in which the stubs save them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
#[allow(missing_docs, reason = "register names")]
pub struct TrapFrame {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    /// Which entry it was: 0 to 255 a vector, [`SYSCALL`], [`UPCALL`] or [`FAILSAFE`].
    pub vector: u64,
    pub rax: u64,
    pub r11: u64,
    pub rcx: u64,
    /// The exception's error code (0 where it has none); on the way back, the flags of the iret hypercall.
    pub error: u64,
    pub rip: u64,
    /// Selector in the low half (RPL 0: guest kernel, 3: guest user), saved event mask in bits 32 up.
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

/// [`TrapFrame::vector`] of a system call from guest-user code.
pub const SYSCALL: u64 = 256;
/// [`TrapFrame::vector`] of an event upcall.
pub const UPCALL: u64 = 257;
/// [`TrapFrame::vector`] of a failsafe callback: a selector could not be loaded on the way back to guest code.
pub const FAILSAFE: u64 = 258;

impl TrapFrame {
    /// Whether guest-user code was interrupted.
    #[must_use]
    pub fn from_user(&self) -> bool {
        self.cs & 3 == 3
    }
}

impl fmt::Display for TrapFrame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  rip {:016x} cs {:04x} rflags {:08x}", self.rip, self.cs & 0xffff, self.rflags)?;
        writeln!(f, "  rsp {:016x} ss {:04x} error code {:x}", self.rsp, self.ss & 0xffff, self.error)?;
        writeln!(
            f,
            "  rax {:016x} rbx {:016x} rcx {:016x} rdx {:016x}",
            self.rax, self.rbx, self.rcx, self.rdx
        )?;
        writeln!(
            f,
            "  rsi {:016x} rdi {:016x} rbp {:016x} r8  {:016x}",
            self.rsi, self.rdi, self.rbp, self.r8
        )?;
        writeln!(
            f,
            "  r9  {:016x} r10 {:016x} r11 {:016x} r12 {:016x}",
            self.r9, self.r10, self.r11, self.r12
        )?;
        write!(f, "  r13 {:016x} r14 {:016x} r15 {:016x}", self.r13, self.r14, self.r15)
    }
}

/// An exception that a listed instruction raised.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Exception {
    /// The vector.
    pub vector: u8,
    /// The error code, 0 where the vector has none.
    pub error: u32,
}

impl Exception {
    /// Unpacks what the fix-up path leaves in rax: vector in bits 32 to 39, error code below, bit 63 set.
    #[must_use]
    pub fn from_packed(packed: u64) -> Self {
        Self { vector: (packed >> 32) as u8, error: packed as u32 }
    }

    /// The name in the processor manuals, as `#PF`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        name(u64::from(self.vector))
    }
}

impl fmt::Display for Exception {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{:x}]", self.name(), self.error)
    }
}

impl fmt::Debug for Exception {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The short name of an entry.
#[must_use]
pub fn name(vector: u64) -> &'static str {
    match vector {
        0 => "#DE divide error",
        1 => "#DB debug",
        2 => "NMI",
        3 => "#BP breakpoint",
        4 => "#OF overflow",
        5 => "#BR bound",
        6 => "#UD invalid instruction",
        7 => "#NM no device",
        8 => "#DF double fault",
        10 => "#TS invalid TSS",
        11 => "#NP segment not present",
        12 => "#SS stack segment",
        13 => "#GP general protection",
        14 => "#PF page fault",
        16 => "#MF x87",
        17 => "#AC alignment",
        18 => "#MC machine check",
        19 => "#XM SIMD",
        20 => "#VE virtualization",
        21 => "#CP control protection",
        SYSCALL => "system call",
        UPCALL => "event upcall",
        FAILSAFE => "failsafe callback",
        _ => "interrupt",
    }
}

/// One instruction that may fault and where to go on.
#[repr(C)]
struct Fixup {
    at: u64,
    resume: u64,
}

unsafe extern "C" {
    static __fixups_start: Fixup;
    static __fixups_end: Fixup;
}

/// How many upcalls were delivered, counted by the stub.
pub static UPCALLS: AtomicU64 = AtomicU64::new(0);

/// Stack pointer at which [`crate::user::run`] waits for guest-user code to come back; 0 while no user code runs.
pub static USER_RETURN: AtomicUsize = AtomicUsize::new(0);

/// Looks at an exception before it becomes fatal: true means that the frame was changed and code goes on with it.
pub type Handler = fn(&mut TrapFrame) -> bool;

static HANDLERS: [AtomicUsize; 256] = [const { AtomicUsize::new(0) }; 256];

/// Sets or removes the function that is asked about kernel-mode entries with this vector.
///
/// The interrupted code is Rust, whose state the handler must leave whole: it may skip a listed instruction, not repair
/// just anything. Vector registers are saved around it.
pub fn set_handler(vector: u8, handler: Option<Handler>) {
    let address = handler.map_or(0, |handler| handler as usize);
    if let Some(slot) = HANDLERS.get(usize::from(vector)) {
        slot.store(address, Ordering::Relaxed);
    }
}

/// Called by the stubs for a kernel-mode entry that the fix-up table does not name.
extern "C" fn kernel_trap(frame: &mut TrapFrame) {
    let slot = HANDLERS.get(frame.vector as usize).map_or(0, |slot| slot.load(Ordering::Relaxed));
    if slot != 0 {
        // SAFETY: only set_handler stores here, and it stores a Handler.
        let handler = unsafe { core::mem::transmute::<usize, Handler>(slot) };
        if handler(frame) {
            return;
        }
    }
    fatal(frame)
}

/// What all entries share. On entry: [rsp] = rax, r11, rcx, error, rip, cs, rflags, rsp, ss; eax = vector.
#[unsafe(naked)]
unsafe extern "C" fn common() {
    naked_asm!(
        "push rax",
        "push rdi",
        "push rsi",
        "push rdx",
        "push r8",
        "push r9",
        "push r10",
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "cld",
        "test byte ptr [rsp + {cs}], 3",
        "jz 2f",
        // From user code: the frame stays where it is; its address is the result of the function that started the code.
        "mov rax, rsp",
        "mov rsp, [rip + {user_return}]",
        "mov qword ptr [rip + {user_return}], 0",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbx",
        "pop rbp",
        "ret",
        // From kernel code: a listed instruction?
        "2: mov rdx, [rsp + {rip}]",
        "lea rsi, [rip + {fixups}]",
        "lea rdi, [rip + {fixups_end}]",
        "3: cmp rsi, rdi",
        "jae 4f",
        "add rsi, 16",
        "cmp rdx, [rsi - 16]",
        "jne 3b",
        "mov rdx, [rsi - 8]",
        "mov [rsp + {rip}], rdx",
        "mov eax, [rsp + {error}]",
        "mov rcx, [rsp + {vector}]",
        "shl rcx, 32",
        "or rax, rcx",
        // Never zero, also for vector 0.
        "bts rax, 63",
        "mov [rsp + {rax}], rax",
        "jmp 5f",
        // No: Rust decides. Its vector registers are saved around the call.
        "4: mov rdi, rsp",
        "mov rbx, rsp",
        "sub rsp, 512",
        "and rsp, -16",
        "fxsave64 [rsp]",
        "call {kernel_trap}",
        "fxrstor64 [rsp]",
        "mov rsp, rbx",
        "5: mov qword ptr [rsp + {error}], 0",
        "jmp {restore}",
        cs = const core::mem::offset_of!(TrapFrame, cs),
        rip = const core::mem::offset_of!(TrapFrame, rip),
        error = const core::mem::offset_of!(TrapFrame, error),
        vector = const core::mem::offset_of!(TrapFrame, vector),
        rax = const core::mem::offset_of!(TrapFrame, rax),
        user_return = sym USER_RETURN,
        fixups = sym __fixups_start,
        fixups_end = sym __fixups_end,
        kernel_trap = sym kernel_trap,
        restore = sym restore,
    )
}

/// Continues the frame at rsp by the iret hypercall (number 23).
#[unsafe(naked)]
unsafe extern "C" fn restore() {
    naked_asm!(
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "pop r10",
        "pop r9",
        "pop r8",
        "pop rdx",
        "pop rsi",
        "pop rdi",
        "add rsp, 8",
        "mov eax, {iret}",
        "syscall",
        "ud2",
        iret = const crate::hypercall::IRET,
    )
}

/// Starts guest-user code and returns where its frame lies when it comes back.
///
/// # Safety
/// `frame` is outside the user-entry stack, and its cs and ss have RPL 3. Kernel stack and user page tables are set.
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn enter_user(frame: *const TrapFrame) -> *const TrapFrame {
    naked_asm!(
        "push rbp",
        "push rbx",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov [rip + {user_return}], rsp",
        // The hypercall reads its frame from the stack: run on a copy of it below this one.
        "mov rsi, rdi",
        "sub rsp, {size}",
        "mov rdi, rsp",
        "mov ecx, {words}",
        "rep movsq",
        "jmp {restore}",
        user_return = sym USER_RETURN,
        size = const core::mem::size_of::<TrapFrame>(),
        words = const core::mem::size_of::<TrapFrame>() / 8,
        restore = sym restore,
    )
}

macro_rules! stubs {
    ($($name:ident $number:literal $prefix:literal;)*) => {
        $(
            #[unsafe(naked)]
            unsafe extern "C" fn $name() {
                naked_asm!(
                    "pop rcx",
                    "pop r11",
                    $prefix,
                    "push rcx",
                    "push r11",
                    "push rax",
                    "mov eax, {number}",
                    "jmp {common}",
                    number = const $number,
                    common = sym common,
                )
            }
        )*

        /// The stub of a vector, if it has one.
        fn stub(vector: u64) -> Option<unsafe extern "C" fn()> {
            match vector {
                $($number => Some($name),)*
                _ => None,
            }
        }
    };
}

// Vectors 8, 10 to 14, 17, 21 push an error code; for the others the stub makes the slot.
stubs! {
    vector_0 0 "push 0";
    vector_1 1 "push 0";
    vector_2 2 "push 0";
    vector_3 3 "push 0";
    vector_4 4 "push 0";
    vector_5 5 "push 0";
    vector_6 6 "push 0";
    vector_7 7 "push 0";
    vector_8 8 "";
    vector_10 10 "";
    vector_11 11 "";
    vector_12 12 "";
    vector_13 13 "";
    vector_14 14 "";
    vector_16 16 "push 0";
    vector_17 17 "";
    vector_18 18 "push 0";
    vector_19 19 "push 0";
    vector_32 32 "push 0";
    vector_128 128 "push 0";
    system_call 256 "push 0";
    upcall_from_user 257 "push 0";
}

/// The event callback. From kernel code: counts, and returns with events masked, so that Rust goes on undisturbed; the
/// pending bits are looked at by whoever let events in. From user code: as any entry.
///
/// Kernel code runs in ring 3 as this stub does, so the processor's own IRETQ leads back, without a hypercall: it takes no
/// notice of the interrupt flag there, and the event mask stays as the hypervisor has set it. Only the selectors, shown with the RPL
/// of a kernel, have to have the real one again.
#[unsafe(naked)]
unsafe extern "C" fn upcall() {
    naked_asm!(
        // rcx, r11, rip, cs, rflags, rsp, ss
        "test byte ptr [rsp + 24], 3",
        "jnz {from_user}",
        "lock inc qword ptr [rip + {upcalls}]",
        "pop rcx",
        "pop r11",
        "or byte ptr [rsp + 8], 3",
        "or byte ptr [rsp + 32], 3",
        "iretq",
        from_user = sym upcall_from_user,
        upcalls = sym UPCALLS,
    )
}

/// The failsafe callback: rcx, r11, ds, es, fs, gs, then the frame as usual. The selectors are dropped (the hypervisor has
/// loaded null ones), and the rest goes the way of an exception.
#[unsafe(naked)]
unsafe extern "C" fn failsafe() {
    naked_asm!(
        "pop rcx",
        "pop r11",
        "add rsp, 32",
        "push 0",
        "push rcx",
        "push r11",
        "push rax",
        "mov eax, {number}",
        "jmp {common}",
        number = const FAILSAFE,
        common = sym common,
    )
}

/// Addresses of the three callbacks: event, failsafe, system call.
pub(crate) fn callbacks() -> [u64; 3] {
    [upcall as *const () as u64, failsafe as *const () as u64, system_call as *const () as u64]
}

/// Every vector that has a stub, with its address and the privilege that `int n` needs: the trap table that was registered.
pub fn vectors() -> impl Iterator<Item = (u8, u64, u8)> {
    (0..=255u8).filter_map(|vector| {
        // Breakpoint, overflow and the two software vectors are for user code to raise.
        let privilege = if matches!(vector, 3 | 4 | 32 | 128) { 3 } else { 0 };
        stub(u64::from(vector)).map(|stub| (vector, stub as *const () as u64, privilege))
    })
}

/// Reads a word that may not be mapped.
///
/// # Errors
/// The exception that the read raised.
pub fn try_read(address: u64) -> Result<u64, Exception> {
    let (value, exception): (u64, u64);
    // SAFETY: the one access is a listed instruction; whatever it does ends in this block.
    unsafe {
        asm!(
            "xor eax, eax",
            "3: mov {value}, [{address}]",
            "4:",
            ".pushsection .fixups, \"a\"",
            ".quad 3b, 4b",
            ".popsection",
            address = in(reg) address,
            value = out(reg) value,
            out("rax") exception,
        );
    }
    if exception == 0 { Ok(value) } else { Err(Exception::from_packed(exception)) }
}

/// Writes a word that may not be mapped or may not be writable.
///
/// # Errors
/// The exception that the write raised.
///
/// # Safety
/// If the word can be written, nothing may rely on its value.
pub unsafe fn try_write(address: u64, value: u64) -> Result<(), Exception> {
    let exception: u64;
    // SAFETY: a listed instruction; the caller vouches for the word.
    unsafe {
        asm!(
            "xor eax, eax",
            "3: mov [{address}], {value}",
            "4:",
            ".pushsection .fixups, \"a\"",
            ".quad 3b, 4b",
            ".popsection",
            address = in(reg) address,
            value = in(reg) value,
            out("rax") exception,
        );
    }
    if exception == 0 { Ok(()) } else { Err(Exception::from_packed(exception)) }
}
