//! Operation numbers inside the hypercalls that take one, with what each operation is: one table per family.
//!
//! Every enum has `from_number(u64)` (a full register or a widened field; bits past the known numbers make it `None`),
//! `number()` and `name()` as in Xen's header. Families of the hypervisor's calls also have `accept`, which looks at as many
//! bits as Xen does and answers what needs no code; [`FAMILIES`] lists them all, for the reference pages and the checks.
//!
//! A row is `Variant = number, "name", Caller, [answer], { facts };`; what stands in answer and facts is said in
//! [`table`](crate::table).

mod cpu;
mod devices;
mod events;
mod facts;
mod grants;
mod machine;
mod memory;
mod mmu;

pub use cpu::{callback, nmi, sched, vcpu};
pub use devices::physdev;
pub use events::evtchn;
pub use facts::version;
pub use grants::grant;
pub use memory::xenmem;

pub use cpu::{CallbackOp, CallbackType, NmiOp, SchedOp, SegmentBase, VcpuOp, VmAssist, VmAssistCmd};
pub use devices::{ConsoleIoOp, PhysdevOp};
pub use events::EvtchnOp;
pub use facts::VersionOp;
pub use grants::GnttabOp;
pub use machine::{ArgoOp, DmOp, FlaskOp, HvmOp, HypfsOp, KexecOp, McaOp, PlatformOp, XenoprofOp, XenpmuOp};
pub use memory::MemoryOp;
pub use mmu::{MmuCommand, MmuextCmd};

use crate::table::Family;

/// Defines a command enum with `from_number`, `number`, `name` and `ALL`.
macro_rules! command_enum {
    (
        $(#[$attribute:meta])*
        $enum:ident, $prefix:literal {
            $($(#[$doc:meta])* $variant:ident = $number:literal, $name:literal;)*
        }
    ) => {
        $(#[$attribute])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum $enum {
            $($(#[$doc])* $variant = $number,)*
        }

        impl $enum {
            /// All commands, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The command of a number, or `None` when nobody defined it.
            #[must_use]
            pub const fn from_number(number: u64) -> Option<Self> {
                match number {
                    $($number => Some(Self::$variant),)*
                    _ => None,
                }
            }

            /// The number on the wire.
            #[must_use]
            pub const fn number(self) -> u32 {
                self as u32
            }

            /// The name in Xen's public header.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => concat!($prefix, $name),)*
                }
            }
        }
    };
}
pub(crate) use command_enum;

/// Defines the table of a family: a command enum and what each row says; with `as module`, also a module of its operations that
/// take one structure, as types.
macro_rules! operations {
    (
        $(#[doc = $about:literal])*
        $enum:ident of $call:ident as $module:ident, $prefix:literal, $bits:literal bits, else $unknown:ident {
            $(
                $(#[doc = $doc:literal])*
                $variant:ident = $number:literal, $name:literal, $caller:ident, $answer:tt, $facts:tt;
            )*
        }
    ) => {
        operations! {
            $(#[doc = $about])*
            $enum of $call, $prefix, $bits bits, else $unknown {
                $($(#[doc = $doc])* $variant = $number, $name, $caller, $answer, $facts;)*
            }
        }

        #[doc = concat!("Operations of [`", stringify!($enum), "`](super::", stringify!($enum), ") that take one structure, as types.")]
        pub mod $module {
            $($crate::table::typed_operation!($call, $variant, $number, ($($doc)*), $facts);)*
        }
    };
    (
        $(#[doc = $about:literal])*
        $enum:ident of $call:ident, $prefix:literal, $bits:literal bits, else $unknown:ident {
            $(
                $(#[doc = $doc:literal])*
                $variant:ident = $number:literal, $name:literal, $caller:ident, $answer:tt, $facts:tt;
            )*
        }
    ) => {
        $crate::subops::command_enum! {
            $(#[doc = $about])*
            $enum, $prefix {
                $($(#[doc = $doc])* $variant = $number, $name;)*
            }
        }

        impl $enum {
            /// The table that this is.
            pub const FAMILY: &'static $crate::table::Family = &$crate::table::Family {
                name: stringify!($enum),
                call: $crate::Hypercall::$call,
                description: concat!($($about, "\n"),*),
                bits: $bits,
                unknown: $crate::Errno::$unknown,
                operations: &[$($crate::table::Operation {
                    number: $number,
                    name: concat!($prefix, $name),
                    variant: stringify!($variant),
                    description: concat!($($doc, "\n"),*),
                    caller: $crate::table::Caller::$caller,
                    answer: $crate::table_answer!($answer),
                    facts: $crate::table::table_facts!($facts),
                }),*],
            };

            /// How the hypervisor answers it.
            #[must_use]
            pub const fn answer(self) -> $crate::table::Answer {
                match self {
                    $(Self::$variant => $crate::table_answer!($answer),)*
                }
            }

            /// The operation of a guest's number, for the hypervisor's handler to carry out.
            ///
            /// Bits of the register that Xen does not look at are not looked at.
            ///
            /// # Errors
            /// For numbers of nobody the family's error, for refused operations theirs.
            pub const fn accept(number: u64) -> Result<Self, $crate::Errno> {
                match Self::from_number(number & (u64::MAX >> (64 - $bits))) {
                    Some(operation) => match operation.answer().refusal() {
                        None => Ok(operation),
                        Some(errno) => Err(errno),
                    },
                    None => Err($crate::Errno::$unknown),
                }
            }

            /// The error of a refused operation; of one that has a handler, that of an unknown number. It ends a handler's match.
            #[must_use]
            pub const fn refusal(self) -> $crate::Errno {
                match self.answer().refusal() {
                    Some(errno) => errno,
                    None => $crate::Errno::$unknown,
                }
            }
        }
    };
}
use operations;

/// All families, in the order of their hypercalls' numbers.
pub const FAMILIES: &[&Family] = &[
    MmuCommand::FAMILY,
    PlatformOp::FAMILY,
    MemoryOp::FAMILY,
    VersionOp::FAMILY,
    ConsoleIoOp::FAMILY,
    GnttabOp::FAMILY,
    VmAssistCmd::FAMILY,
    VmAssist::FAMILY,
    VcpuOp::FAMILY,
    SegmentBase::FAMILY,
    MmuextCmd::FAMILY,
    FlaskOp::FAMILY,
    NmiOp::FAMILY,
    SchedOp::FAMILY,
    CallbackOp::FAMILY,
    CallbackType::FAMILY,
    XenoprofOp::FAMILY,
    EvtchnOp::FAMILY,
    PhysdevOp::FAMILY,
    HvmOp::FAMILY,
    KexecOp::FAMILY,
    ArgoOp::FAMILY,
    XenpmuOp::FAMILY,
    DmOp::FAMILY,
    HypfsOp::FAMILY,
    McaOp::FAMILY,
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Errno;
    use crate::table::Answer;

    macro_rules! round_trip {
        ($($enum:ident)*) => {
            $(
                for &command in $enum::ALL {
                    assert_eq!($enum::from_number(u64::from(command.number())), Some(command));
                    assert_eq!($enum::from_number(u64::from(command.number()) | 1 << 32), None);
                    let accepted = $enum::accept(u64::from(command.number()));
                    assert_eq!(accepted.err(), command.answer().refusal(), "{}", command.name());
                }
                assert!($enum::accept(u64::MAX).is_err());
            )*
        };
    }

    #[test]
    fn numbers_round_trip_and_high_bits_are_refused() {
        round_trip!(PlatformOp MemoryOp VersionOp ConsoleIoOp GnttabOp VmAssistCmd VmAssist VcpuOp SegmentBase);
        round_trip!(MmuextCmd FlaskOp NmiOp SchedOp CallbackOp CallbackType XenoprofOp EvtchnOp PhysdevOp HvmOp KexecOp);
        round_trip!(ArgoOp XenpmuOp DmOp HypfsOp McaOp);
    }

    #[test]
    fn bits_that_xen_does_not_look_at_change_nothing() {
        assert_eq!(VersionOp::accept(1 << 32), Ok(VersionOp::Version));
        assert_eq!(CallbackType::accept(0x1_0000), Ok(CallbackType::Event));
        assert_eq!(EvtchnOp::accept(0xffff), Err(Errno::ENOSYS));
    }

    #[test]
    fn names_carry_the_prefix_of_the_header() {
        assert_eq!(MmuextCmd::NewUserBaseptr.name(), "MMUEXT_NEW_USER_BASEPTR");
        assert_eq!(VmAssist::FourGbSegments.name(), "VMASST_TYPE_4gb_segments");
    }

    #[test]
    fn families_are_whole() {
        for pair in FAMILIES.windows(2) {
            assert!(pair[0].call.number() <= pair[1].call.number(), "{} is out of order", pair[1].name);
        }
        for family in FAMILIES {
            for operation in family.operations {
                assert!(!operation.description.trim().is_empty(), "{} says nothing", operation.name);
                if let Answer::Refused(_) | Answer::LeftOut(..) = operation.answer {
                    assert!(operation.facts.errors.is_empty(), "{}: the answer is the error", operation.name);
                }
            }
        }
    }
}
