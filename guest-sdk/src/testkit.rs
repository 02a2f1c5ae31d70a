//! What test guests are written with (feature `testkit`): cases, probes of single instructions, verdict lines.
//!
//! ```ignore
//! #[entry]
//! fn main(domain: Domain) {
//!     testkit::run(domain, &cases![null_hypercall, reads_need_a_mapping]);
//! }
//!
//! fn reads_need_a_mapping(_domain: &mut Domain) -> Verdict {
//!     let exception = expect_exception(try_read(8))?;
//!     check_eq!(exception.vector, 14);
//!     Ok(())
//! }
//! ```
//!
//! The command line chooses cases: `only=text+text` runs those whose name contains one of the texts, `skip=text+text` leaves
//! such out, `list` prints names, `events=fifo` takes that form of event channels. A text that begins with `=` is a whole name: `only==null_hypercall`. (A comma does as well as
//! a plus, but QEMU's `-initrd` takes commas for its own.) Each case prints one line, with `announce` one more before it
//! runs, so that it is known which one ended the domain. The last two lines are the counts and the verdict:
//! `Test result: SUCCESS`, `SKIP` (nothing ran), `ERROR` (a test could not do its work) or `FAILURE` (a check failed).
//! The domain powers off after SUCCESS and SKIP and crashes after the others.
//!
//! With `answers=zero` or `answers=enosys` each case runs while the hypervisor gives that answer to everything
//! ([`constant_answers`]); it must be a test build. `limit=MS` ends a case that hangs then.

use crate::Domain;
use crate::rt::trap::Exception;
use crate::{println, shutdown, time};
use alloc::string::{String, ToString};
use core::fmt::Display;
use hypercall_abi::{Errno, constant_answers};

pub use crate::events::window;
pub use crate::rt::start::fault_address;
pub use crate::rt::trap::{TrapFrame, set_handler, try_read, try_write};
pub use crate::user;
pub use crate::{case, cases, check, check_eq, probe};
/// Random numbers that can be had again from their seed, `Random::with_seed(seed)`. A guest prints the seed that it takes.
pub use fastrand::Rng as Random;

/// Has events of a channel stay pending: nobody collects them, and who polls the port finds it pending each time.
pub fn mask(channel: &crate::events::Channel) {
    crate::events::mask(channel.port());
}

/// Why a case ended without passing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// It cannot run here, for this reason; that is no fault of anybody.
    Skip(String),
    /// Something under test is wrong.
    Fail(String),
    /// The test could not do its work (no memory, say): nothing is known about what it tests.
    Error(String),
}

/// What a case returns; `?` turns texts and the SDK's errors into failures.
pub type Verdict = Result<(), Stop>;

/// Ends a case as skipped: `return skip("needs a second domain")`.
///
/// # Errors
/// Always.
pub fn skip<T>(reason: impl Display) -> Result<T, Stop> {
    Err(Stop::Skip(reason.to_string()))
}

/// Ends a case as failed.
///
/// # Errors
/// Always.
pub fn fail<T>(message: impl Display) -> Result<T, Stop> {
    Err(Stop::Fail(message.to_string()))
}

impl From<String> for Stop {
    fn from(message: String) -> Self {
        Stop::Fail(message)
    }
}

impl From<&str> for Stop {
    fn from(message: &str) -> Self {
        Stop::Fail(message.into())
    }
}

impl From<Errno> for Stop {
    fn from(error: Errno) -> Self {
        Stop::Fail(alloc::format!("a hypercall failed: {error}"))
    }
}

impl From<crate::grants::GrantError> for Stop {
    fn from(error: crate::grants::GrantError) -> Self {
        Stop::Fail(error.to_string())
    }
}

impl From<Exception> for Stop {
    fn from(exception: Exception) -> Self {
        Stop::Fail(alloc::format!("unexpected exception {exception}"))
    }
}

impl From<crate::memory::OutOfMemory> for Stop {
    fn from(error: crate::memory::OutOfMemory) -> Self {
        Stop::Error(error.to_string())
    }
}

/// A named case.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Its name: unique in the program, without spaces.
    pub name: &'static str,
    /// What it does.
    pub run: fn(&mut Domain) -> Verdict,
}

/// One [`Case`](crate::testkit::Case) from a function, named like it. The image's section `.test_cases` lists the names, a line
/// each, so that they are known without a boot.
#[macro_export]
macro_rules! case {
    ($function:path) => {{
        const LINE: &str = ::core::concat!(::core::stringify!($function), "\n");
        #[used]
        #[unsafe(link_section = ".test_cases")]
        static LISTED: [u8; LINE.len()] = $crate::testkit::bytes_of(LINE);
        $crate::testkit::Case { name: ::core::stringify!($function), run: $function }
    }};
}

/// The bytes of a text as an array, for [`case!`](crate::case).
#[must_use]
pub const fn bytes_of<const LENGTH: usize>(text: &str) -> [u8; LENGTH] {
    let mut bytes = [0; LENGTH];
    bytes.copy_from_slice(text.as_bytes());
    bytes
}

/// An array of cases from functions, each named like its function.
#[macro_export]
macro_rules! cases {
    ($($function:path),* $(,)?) => { [$($crate::case!($function)),*] };
}

/// Fails the case when the condition does not hold; the message is the condition, or the text after it.
#[macro_export]
macro_rules! check {
    ($condition:expr $(,)?) => {
        $crate::check!($condition, "{}", ::core::stringify!($condition))
    };
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return $crate::testkit::fail(::core::format_args!(
                "line {}: {}", ::core::line!(), ::core::format_args!($($message)+)));
        }
    };
}

/// Fails the case when the two differ, and says what they are.
#[macro_export]
macro_rules! check_eq {
    ($left:expr, $right:expr $(,)?) => { $crate::check_eq!($left, $right, "{}", ::core::stringify!($left)) };
    ($left:expr, $right:expr, $($message:tt)+) => {
        match (&$left, &$right) {
            (left, right) => {
                if *left != *right {
                    return $crate::testkit::fail(::core::format_args!(
                        "line {}: {} is {:x?}, not {:x?}",
                        ::core::line!(), ::core::format_args!($($message)+), left, right));
                }
            }
        }
    };
}

/// Runs one instruction that may raise an exception.
///
/// `probe!("instruction", "more"...; operands...)`: the first instruction is the one that may fault; the others run after it
/// if it did not, for instance to move a result out of rax. Operands are those of `asm!`, without rax; `probe!(rax = value,
/// "..."; ...)` sets rax before. Gives `Result<(), Exception>`. A trap that is reported behind the instruction (`int3`,
/// `int n`, single step) counts as raised by it.
///
/// # Safety
/// It expands to an unsafe block: the caller vouches for what the instruction does when it does not fault.
#[macro_export]
macro_rules! probe {
    (rax = $rax:expr, $first:literal $(, $more:literal)* $(; $($operand:tt)*)?) => {{
        let exception: u64;
        let rax: u64 = $rax;
        // SAFETY: the instruction is listed, so an exception of it ends this block; what else it does is the caller's.
        unsafe {
            ::core::arch::asm!(
                "773:",
                $first,
                "775:",
                $($more,)*
                "xor eax, eax",
                "774:",
                ".pushsection .fixups, \"a\"",
                ".quad 773b, 774b",
                ".quad 775b, 774b",
                ".popsection",
                inlateout("rax") rax => exception,
                $($($operand)*)?
            );
        }
        if exception == 0 {
            ::core::result::Result::Ok(())
        } else {
            ::core::result::Result::Err($crate::rt::trap::Exception::from_packed(exception))
        }
    }};
    ($first:literal $(, $more:literal)* $(; $($operand:tt)*)?) => {
        $crate::probe!(rax = 0, $first $(, $more)* $(; $($operand)*)?)
    };
}

/// The exception that must have come.
///
/// # Errors
/// A failure when there was none.
pub fn expect_exception<T>(result: Result<T, Exception>) -> Result<Exception, Stop> {
    match result {
        Err(exception) => Ok(exception),
        Ok(_) => fail("there was no exception"),
    }
}

/// Checks for an exception with this vector and error code.
///
/// # Errors
/// A failure that says what came instead.
pub fn expect_vector<T>(result: Result<T, Exception>, vector: u8, error: u32) -> Verdict {
    match expect_exception(result)? {
        exception if exception == (Exception { vector, error }) => Ok(()),
        other => fail(format_args!("{other} instead of {}", Exception { vector, error })),
    }
}

/// Checks that a call failed with this error.
///
/// # Errors
/// A failure that says what came instead.
pub fn expect_errno<T>(result: Result<T, Errno>, wanted: Errno) -> Verdict {
    match result {
        Err(error) if error == wanted => Ok(()),
        Err(error) => fail(format_args!("failed with {error} instead of {wanted}")),
        Ok(_) => fail(format_args!("succeeded instead of failing with {wanted}")),
    }
}

/// Upcalls that the kernel-mode stub has counted so far.
#[must_use]
pub fn upcalls() -> u64 {
    crate::rt::trap::UPCALLS.load(core::sync::atomic::Ordering::Relaxed)
}

/// Whether a text of `only=` or `skip=` means this name.
fn means(text: &str, name: &str) -> bool {
    text.strip_prefix('=').map_or_else(|| name.contains(text), |whole| name == whole)
}

/// The version text of the hypervisor (`XENVER_extraversion`), which says what it is. Asked once, before the first case: what a
/// hypervisor says of itself while it does nothing is no reason to skip.
pub fn hypervisor() -> &'static [u8; 16] {
    static TEXT: spin::Once<[u8; 16]> = spin::Once::new();
    TEXT.call_once(|| {
        let mut text = [0; 16];
        let command = u64::from(hypercall_abi::subops::VersionOp::Extraversion.number());
        // SAFETY: the command writes 16 bytes.
        let _ = unsafe { crate::hypercall::stub::xen_version(command, text.as_mut_ptr() as u64) };
        text
    })
}

/// What the hypervisor shall answer while a case runs.
struct Constant {
    answer: u64,
    limit_ns: u64,
}

impl Constant {
    fn from(line: crate::CommandLine) -> Option<Constant> {
        let answer = match line.value("answers")? {
            "zero" => constant_answers::ZERO,
            "enosys" => constant_answers::ENOSYS,
            other => panic!("answers={other}: there are zero and enosys"),
        };
        Some(Constant { answer, limit_ns: line.number("limit").unwrap_or(1000u64) * 1_000_000 })
    }

    fn switch(&self, on: bool) -> Result<(), Stop> {
        // SAFETY: the switch takes no pointer; on any other hypervisor the number is empty.
        let done = unsafe {
            crate::hypercall::raw(constant_answers::NUMBER, [on.into(), self.answer, self.limit_ns, 0, 0])
        };
        match done {
            0 => Ok(()),
            _ => Err(Stop::Error("this hypervisor is no test build: it has no constant answers".into())),
        }
    }

    /// Runs a case between the marks.
    fn run(&self, case: &Case, domain: &mut Domain) -> Verdict {
        self.switch(true)?;
        let verdict = (case.run)(domain);
        self.switch(false)?;
        verdict
    }
}

/// Runs the chosen cases, prints the verdict and ends the domain.
pub fn run(mut domain: Domain, cases: &[Case]) -> ! {
    let line = domain.command_line;
    let names = |key| line.value(key).map(|texts| texts.split(['+', ',']).filter(|text| !text.is_empty()));
    let chosen = |case: &&Case| {
        let matches = |key| names(key).map(|mut texts| texts.any(|text| means(text, case.name)));
        matches("only").unwrap_or(true) && !matches("skip").unwrap_or(false)
    };
    if line.has("list") {
        cases.iter().filter(chosen).for_each(|case| println!("{}", case.name));
        shutdown::poweroff()
    }
    if line.value("events") == Some("fifo") {
        domain.events.use_fifo().expect("the hypervisor has the FIFO form of event channels");
    }
    // Asked of a hypervisor that does its work.
    let _ = (hypervisor(), domain.id());
    let constant = Constant::from(line);
    let announce = line.has("announce");
    let (mut passed, mut failed, mut skipped, mut errors) = (0u32, 0u32, 0u32, 0u32);
    for case in cases.iter().filter(chosen) {
        if announce {
            println!("[RUN]   {}", case.name);
        }
        let start = time::now_ns();
        let verdict = match &constant {
            Some(constant) => constant.run(case, &mut domain),
            None => (case.run)(&mut domain),
        };
        let micros = time::now_ns().saturating_sub(start) / 1000;
        match verdict {
            Ok(()) => {
                passed += 1;
                println!("[PASS]  {} ({micros} us)", case.name);
            }
            Err(Stop::Skip(reason)) => {
                skipped += 1;
                println!("[SKIP]  {}: {reason}", case.name);
            }
            Err(Stop::Fail(message)) => {
                failed += 1;
                println!("[FAIL]  {}: {message}", case.name);
            }
            Err(Stop::Error(message)) => {
                errors += 1;
                println!("[ERROR] {}: {message}", case.name);
            }
        }
    }
    println!("{passed} passed, {} failed, {skipped} skipped", failed + errors);
    let result = match () {
        () if failed != 0 => "FAILURE",
        () if errors != 0 => "ERROR",
        () if passed == 0 => "SKIP",
        () => "SUCCESS",
    };
    println!("Test result: {result}");
    if failed + errors == 0 { shutdown::poweroff() } else { shutdown::crash() }
}
