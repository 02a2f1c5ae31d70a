//! What a row of the tables says beside its number and its name.
//!
//! Hypercalls are listed in [`for_each_hypercall!`](crate::for_each_hypercall), their operations in [`subops`](crate::subops).
//! Both kinds of row end in the same *facts*, in braces: what the operation takes, what it returns, which errors it gives and
//! why, and which rules of ordering it obeys:
//!
//! ```text
//! {
//!     [takes InOut evtchn::EvtchnBindVirq]    // or [value "what the argument register is"]
//!     [returns "the port"]                    // 0 when left out
//!     [errors EINVAL "no such interrupt"; EEXIST "it is bound already";]
//!     [statuses "GNTST_bad_page" "…";]        // of elements of a list
//!     [rules "the port is pending only after …";]
//! }
//! ```
//!
//! and in front of them stands the *answer*: `[Handled]`, `[Refused ENOSYS]` or `[LeftOut ENOSYS "why"]`. The hypervisor's
//! dispatcher is made from the answers, so a refusal that depends on nothing is a row here and needs no code; the reference
//! pages are made from all of it, and `cargo xtask tidy` compares both with the handlers and with the conformance cases.

use crate::{Errno, Hypercall};

/// How the hypervisor answers a hypercall or one of its operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// By code: the dispatcher or the handler of the family names it.
    Handled,
    /// With this error, whatever the arguments are, as Xen answers a guest that it is not for.
    Refused(Errno),
    /// With this error, whatever the arguments are, although Xen carries it out: left out for the reason given.
    LeftOut(Errno, &'static str),
}

impl Answer {
    /// The error that is the whole answer, if it is one.
    #[must_use]
    pub const fn refusal(self) -> Option<Errno> {
        match self {
            Answer::Handled => None,
            Answer::Refused(errno) | Answer::LeftOut(errno, _) => Some(errno),
        }
    }
}

/// Who a hypercall or an operation is for; single operations may still ask for more, or for less of another domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller {
    /// Any domain, for itself or for domains that it has rights over.
    Guest,
    /// A domain with rights over hardware.
    Hardware,
    /// A domain with control verbs.
    Control,
}

impl Caller {
    /// In words, for the reference pages.
    #[must_use]
    pub const fn describe(self) -> &'static str {
        match self {
            Caller::Guest => "any domain",
            Caller::Hardware => "a domain with rights over hardware",
            Caller::Control => "a domain with control verbs",
        }
    }
}

/// Which way an argument's structure goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The caller fills it in.
    In,
    /// The hypervisor fills it in.
    Out,
    /// Some fields each, as the structure says.
    InOut,
}

/// What the argument register of an operation holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Argument {
    /// Nothing that is looked at.
    None,
    /// Something else than the address of a structure of this crate, in words.
    Value(&'static str),
    /// The address of a structure of this crate (`module::Type`), or of a list of them where the hypercall takes a count.
    Structure(Direction, &'static str),
}

/// An error and what causes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cause {
    /// The error.
    pub errno: Errno,
    /// What the caller did, or what the hypervisor lacks.
    pub why: &'static str,
}

/// What a row says beside number, name, caller and answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// The argument.
    pub takes: Argument,
    /// What rax holds when it worked.
    pub returns: &'static str,
    /// Errors, in the order in which they are looked for as far as that is promised.
    pub errors: &'static [Cause],
    /// Numbers in the status field of a list's element, with their meanings, where the call itself succeeds.
    pub statuses: &'static [(&'static str, &'static str)],
    /// Memory-ordering rules, and others that no type shows.
    pub rules: &'static [&'static str],
}

/// A row of an operation table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// The number in the command argument or field.
    pub number: u32,
    /// The name in Xen's header.
    pub name: &'static str,
    /// The variant of the family's enum.
    pub variant: &'static str,
    /// What it does.
    pub description: &'static str,
    /// Who it is for.
    pub caller: Caller,
    /// How the hypervisor answers it.
    pub answer: Answer,
    /// The rest.
    pub facts: Facts,
}

/// A table of operations: the commands of one hypercall, or the values of another of its arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Family {
    /// The name of the enum.
    pub name: &'static str,
    /// Whose.
    pub call: Hypercall,
    /// What the table is, from the enum's documentation.
    pub description: &'static str,
    /// How many low bits of the register or field are looked at.
    pub bits: u32,
    /// What a number gets that is in no row.
    pub unknown: Errno,
    /// The rows.
    pub operations: &'static [Operation],
}

/// An operation whose argument is one structure, as a type: what a guest needs to call it without a mistake in number or type.
///
/// Each family has a module of them, as [`subops::sched`](crate::subops::sched) for `sched_op`:
///
/// ```
/// use hypercall_abi::subops::evtchn::BindVirq;
/// use hypercall_abi::table::TypedOperation;
/// use hypercall_abi::{Hypercall, evtchn::EvtchnBindVirq};
///
/// fn registers<O: TypedOperation>(argument: &mut O::Argument) -> [u64; 3] {
///     [O::CALL.number(), u64::from(O::COMMAND), (&raw mut *argument) as u64]
/// }
/// let mut argument = EvtchnBindVirq { virq: 0, vcpu: 0, port: Default::default() };
/// let [number, command, address] = registers::<BindVirq>(&mut argument);
/// assert_eq!((number, command), (Hypercall::EventChannelOp.number(), 1));
/// assert_eq!(address % 4, 0);
/// ```
pub trait TypedOperation {
    /// The structure.
    type Argument;
    /// The hypercall.
    const CALL: Hypercall;
    /// The operation's number.
    const COMMAND: u32;
}

/// Makes an [`Answer`] of a row's bracket.
#[doc(hidden)]
#[macro_export]
macro_rules! table_answer {
    ([Handled]) => {
        $crate::table::Answer::Handled
    };
    ([Refused $errno:ident]) => {
        $crate::table::Answer::Refused($crate::Errno::$errno)
    };
    ([LeftOut $errno:ident $why:literal]) => {
        $crate::table::Answer::LeftOut($crate::Errno::$errno, $why)
    };
}

/// Makes [`Facts`] of a row's braces.
macro_rules! table_facts {
    ({
        $([takes $direction:ident $first:ident $(:: $rest:ident)*])?
        $([value $value:literal])?
        $([returns $returns:literal])?
        $([errors $($errno:ident $why:literal;)*])?
        $([statuses $($status:literal $meaning:literal;)*])?
        $([rules $($rule:literal;)*])?
    }) => {
        $crate::table::Facts {
            takes: $crate::table::table_argument!(
                $($direction $first $(:: $rest)*)? $($value)?
            ),
            returns: {
                #[allow(unused_mut, unused_assignments, reason = "replaced where the row says something")]
                let mut returns = "0";
                $(returns = $returns;)?
                returns
            },
            errors: &[$($($crate::table::Cause { errno: $crate::Errno::$errno, why: $why }),*)?],
            statuses: &[$($(($status, $meaning)),*)?],
            rules: &[$($($rule),*)?],
        }
    };
}
pub(crate) use table_facts;

/// Makes a [`TypedOperation`] of a row that takes a structure.
macro_rules! typed_operation {
    (
        $call:ident, $variant:ident, $number:literal, ($($doc:literal)*),
        { [takes $direction:ident $first:ident $(:: $rest:ident)*] $($more:tt)* }
    ) => {
        $(#[doc = $doc])*
        #[derive(Clone, Copy, Debug)]
        pub struct $variant;
        impl $crate::table::TypedOperation for $variant {
            type Argument = $crate::$first $(:: $rest)*;
            const CALL: $crate::Hypercall = $crate::Hypercall::$call;
            const COMMAND: u32 = $number;
        }
    };
    ($($other:tt)*) => {};
}
pub(crate) use typed_operation;

macro_rules! table_argument {
    () => {
        $crate::table::Argument::None
    };
    ($value:literal) => {
        $crate::table::Argument::Value($value)
    };
    ($direction:ident $first:ident $(:: $rest:ident)*) => {{
        // The structure is there.
        const _: usize = size_of::<$crate::$first $(:: $rest)*>();
        $crate::table::Argument::Structure(
            $crate::table::Direction::$direction,
            concat!(stringify!($first) $(, "::", stringify!($rest))*),
        )
    }};
}
pub(crate) use table_argument;
