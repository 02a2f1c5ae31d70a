/// Defines a handler of the guest that counts its calls in a static and returns by hypercall `iret`.
///
/// For what the hypervisor calls with rcx and r11 above the frame and no error code: events, NMIs, `int n`. Instructions given
/// behind the counter run with the frame on top of the stack: rip, cs, rflags, rsp, ss.
///
/// ```ignore
/// static NMIS: AtomicU64 = AtomicU64::new(0);
/// conformance::counting_handler! {
///     /// Counts NMIs.
///     own_nmi: NMIS
/// }
/// ```
#[macro_export]
macro_rules! counting_handler {
    ($(#[$attribute:meta])* $name:ident: $counter:path $(, $instruction:literal)*) => {
        $(#[$attribute])*
        #[unsafe(naked)]
        unsafe extern "C" fn $name() {
            core::arch::naked_asm!(
                "lock inc qword ptr [rip + {counter}]",
                "pop rcx",
                "pop r11",
                $($instruction,)*
                // What hypercall iret (23) takes: flags, r11, rcx, rax, then the frame.
                "push 0",
                "push rcx",
                "push r11",
                "push rax",
                "mov eax, 23",
                "syscall",
                "ud2",
                counter = sym $counter,
            )
        }
    };
}
