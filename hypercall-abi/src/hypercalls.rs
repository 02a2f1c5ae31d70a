//! The table of hypercalls: number, name, arguments and who may call, once and for all.
//!
//! [`for_each_hypercall!`](crate::for_each_hypercall) hands the whole table to a macro of the caller's, so the enum below,
//! the hypervisor's dispatcher, the guest's stubs and the reference pages cannot disagree. Numbers are those of Xen's public
//! `xen.h`; what the hypervisor does not implement answers `-ENOSYS`.

use crate::table::{Answer, Caller, Facts, table_facts};

/// Calls `$callback! { $($extra)* rows… }` with one row per hypercall.
///
/// A row is `(number, Variant, name, Caller, (argument names), [answer], "one-line description", { facts });`, where answer and
/// facts are those of [`table`](crate::table). Arguments go to rdi, rsi, rdx, r10, r8 in that order; the number goes to rax and
/// the result comes back there.
#[macro_export]
macro_rules! for_each_hypercall {
    ($callback:ident $(, $($extra:tt)*)?) => {
        $callback! {
            $($($extra)*)?
            (0, SetTrapTable, set_trap_table, Guest, (traps), [Handled], "Loads entries into the vCPU's virtual trap table.", {});
            (1, MmuUpdate, mmu_update, Guest, (requests, count, done, domid), [Handled], "Writes page-table entries or machine-to-physical entries, checked.", {});
            (2, SetGdt, set_gdt, Guest, (frames, entries), [Handled], "Replaces the vCPU's descriptor table by up to 14 read-only frames.", {});
            (3, StackSwitch, stack_switch, Guest, (ss, rsp), [Handled], "Sets the stack that traps from guest user mode are delivered on.", {});
            (4, SetCallbacks, set_callbacks, Guest, (event, failsafe, syscall), [Handled], "Sets the three entry points of a 64-bit guest at once.", {});
            (5, FpuTaskswitch, fpu_taskswitch, Guest, (set), [Handled], "Sets or clears the guest's view of CR0.TS.", {});
            (6, SchedOpCompat, sched_op_compat, Guest, (command, argument), [Handled], "Scheduling in the form older than interface 0x00030101.", {});
            (7, PlatformOp, platform_op, Hardware, (operation), [Refused ENOSYS], "Machine settings: wall clock, firmware facts, processor power.", {});
            (8, SetDebugreg, set_debugreg, Guest, (register, value), [Handled], "Writes a debug register of the vCPU; breakpoints in hypervisor space are refused.", {});
            (9, GetDebugreg, get_debugreg, Guest, (register), [Handled], "Reads a debug register of the vCPU.", {});
            (10, UpdateDescriptor, update_descriptor, Guest, (address, descriptor), [Handled], "Writes one checked segment descriptor at a machine address.", {});
            (12, MemoryOp, memory_op, Guest, (command, argument), [Handled], "Reservations, memory maps and the machine-to-physical window.", {});
            (13, Multicall, multicall, Guest, (entries, count), [Handled], "Runs a list of hypercalls, each with its own result.", {});
            (14, UpdateVaMapping, update_va_mapping, Guest, (va, pte, flags), [Handled], "Writes the L1 entry that maps a virtual address, with the flush asked for.", {});
            (15, SetTimerOp, set_timer_op, Guest, (deadline_ns), [Handled], "Sets the vCPU's one-shot timer in system time; 0 stops it.", {});
            (16, EventChannelOpCompat, event_channel_op_compat, Guest, (operation), [Handled], "Event channels in the form older than interface 0x00030202.", {});
            (17, XenVersion, xen_version, Guest, (command, argument), [Handled], "Version, features and other facts about the hypervisor.", {});
            (18, ConsoleIo, console_io, Guest, (command, count, buffer), [Handled], "Writes to or reads from the hypervisor's console.", {});
            (19, PhysdevOpCompat, physdev_op_compat, Guest, (operation), [Handled], "Physical interrupts in the form older than interface 0x00030202.", {});
            (20, GrantTableOp, grant_table_op, Guest, (command, operations, count), [Handled], "Maps, copies and administers granted frames.", {});
            (21, VmAssist, vm_assist, Guest, (command, assist), [Handled], "Turns an assist of the hypervisor on or off.", {});
            (22, UpdateVaMappingOtherdomain, update_va_mapping_otherdomain, Guest, (va, pte, flags, domid), [Handled], "Like update_va_mapping for a frame of another domain.", {});
            (23, Iret, iret, Guest, (), [Handled], "Returns from a trap with the frame on the guest kernel's stack.", {});
            (24, VcpuOp, vcpu_op, Guest, (command, vcpu, argument), [Handled], "Starts, stops and queries vCPUs and registers their shared areas.", {});
            (25, SetSegmentBase, set_segment_base, Guest, (which, base), [Handled], "Sets FS base, a GS base, or the user GS selector.", {});
            (26, MmuextOp, mmuext_op, Guest, (operations, count, done, domid), [Handled], "Pins tables, switches page tables, flushes, and sets the LDT.", {});
            (27, XsmOp, xsm_op, Control, (operation), [Refused ENOSYS], "Security-module policy.", {});
            (28, NmiOp, nmi_op, Guest, (command, argument), [Handled], "Registers the callback for virtual NMIs.", {});
            (29, SchedOp, sched_op, Guest, (command, argument), [Handled], "Yields, blocks, polls, shuts down, sets the watchdog.", {});
            (30, CallbackOp, callback_op, Guest, (command, argument), [Handled], "Registers and unregisters guest entry points.", {});
            (31, XenoprofOp, xenoprof_op, Hardware, (command, argument), [Refused ENOSYS], "Profiling by sampling.", {});
            (32, EventChannelOp, event_channel_op, Guest, (command, argument), [Handled], "Creates, binds, signals and closes event channels.", {});
            (33, PhysdevOp, physdev_op, Guest, (command, argument), [Handled], "I/O privilege level, physical interrupts and PCI devices.", {});
            (34, HvmOp, hvm_op, Guest, (command, argument), [Refused ENOSYS], "Parameters of hardware-virtualized guests.", {});
            (35, Sysctl, sysctl, Control, (operation), [Refused ENOSYS], "Whole-machine control in Xen's own form.", {});
            (36, Domctl, domctl, Control, (operation), [Handled], "Domain control; the layout is this project's own (feature `control`).", {});
            (37, KexecOp, kexec_op, Hardware, (command, argument), [Refused ENOSYS], "Loads and starts another kernel in the hypervisor's place.", {});
            (38, TmemOp, tmem_op, Guest, (operations), [Refused ENOSYS], "Transcendent memory, gone from Xen.", {});
            (39, ArgoOp, argo_op, Guest, (command, arg1, arg2, arg3, arg4), [Refused ENOSYS], "Messages between domains through the hypervisor.", {});
            (40, XenpmuOp, xenpmu_op, Guest, (command, argument), [Refused ENOSYS], "Virtual performance counters.", {});
            (41, DmOp, dm_op, Control, (domid, buffers, count), [Refused ENOSYS], "Device-model control for hardware-virtualized guests.", {});
            (42, HypfsOp, hypfs_op, Control, (command, arg1, arg2, arg3, arg4), [Refused ENOSYS], "The hypervisor's parameter file system.", {});
            (48, Arch0, arch_0, Hardware, (operation), [Refused ENOSYS], "Architecture slot 0: machine-check reports (`mca`) on x86.", {});
            (49, Arch1, arch_1, Guest, (), [Refused ENOSYS], "Architecture slot 1: PAGING_DOMCTL_CONT inside Xen, never for guests.", {});
            (50, Arch2, arch_2, Guest, (), [Refused ENOSYS], "Architecture slot 2, unused.", {});
            (51, Arch3, arch_3, Guest, (), [Refused ENOSYS], "Architecture slot 3, unused.", {});
            (52, Arch4, arch_4, Guest, (), [Refused ENOSYS], "Architecture slot 4, unused.", {});
            (53, Arch5, arch_5, Guest, (), [Refused ENOSYS], "Architecture slot 5, unused.", {});
            (54, Arch6, arch_6, Guest, (), [Refused ENOSYS], "Architecture slot 6, unused.", {});
            (55, Arch7, arch_7, Guest, (), [Refused ENOSYS], "Architecture slot 7, unused.", {});
        }
    };
}

macro_rules! define_hypercalls {
    ($(($number:literal, $variant:ident, $name:ident, $caller:ident, ($($argument:ident),*), $answer:tt, $doc:literal, $facts:tt);)*) => {
        /// A hypercall number that Xen's ABI names.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Hypercall {
            $(#[doc = $doc] $variant = $number,)*
        }

        impl Hypercall {
            /// All hypercalls, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The hypercall of a guest's rax, or `None` (the guest gets `-ENOSYS`).
            #[must_use]
            pub const fn from_number(number: u64) -> Option<Self> {
                match number {
                    $($number => Some(Self::$variant),)*
                    _ => None,
                }
            }

            /// The number that a guest puts into rax.
            #[must_use]
            pub const fn number(self) -> u64 {
                self as u64
            }

            /// The name in Xen's header, without `__HYPERVISOR_`.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => stringify!($name),)*
                }
            }

            /// Who the hypercall is for.
            #[must_use]
            pub const fn caller(self) -> Caller {
                match self {
                    $(Self::$variant => Caller::$caller,)*
                }
            }

            /// Names of the arguments, in register order.
            #[must_use]
            pub const fn arguments(self) -> &'static [&'static str] {
                match self {
                    $(Self::$variant => &[$(stringify!($argument)),*],)*
                }
            }

            /// How the hypervisor answers it.
            #[must_use]
            pub const fn answer(self) -> Answer {
                match self {
                    $(Self::$variant => crate::table_answer!($answer),)*
                }
            }

            /// What holds for all its operations: argument, errors, rules.
            #[must_use]
            pub const fn facts(self) -> &'static Facts {
                match self {
                    $(Self::$variant => {
                        const FACTS: &Facts = &table_facts!($facts);
                        FACTS
                    })*
                }
            }

            /// The name of the variant.
            #[must_use]
            pub const fn variant(self) -> &'static str {
                match self {
                    $(Self::$variant => stringify!($variant),)*
                }
            }

            /// What it does, in one line.
            #[must_use]
            pub const fn description(self) -> &'static str {
                match self {
                    $(Self::$variant => $doc,)*
                }
            }
        }
    };
}

for_each_hypercall!(define_hypercalls);

/// Stubs in a hypercall page: 4096 bytes of 32-byte stubs.
pub const HYPERCALL_PAGE_STUBS: usize = 128;

/// Size in bytes of one stub in a hypercall page.
pub const HYPERCALL_STUB_SIZE: usize = 32;

#[cfg(test)]
mod tests {
    use super::Hypercall;

    #[test]
    fn numbers_round_trip_and_ascend() {
        for pair in Hypercall::ALL.windows(2) {
            assert!(pair[0].number() < pair[1].number(), "{pair:?}");
        }
        for &call in Hypercall::ALL {
            assert_eq!(Hypercall::from_number(call.number()), Some(call));
            assert!(call.arguments().len() <= 5, "{call:?} has more arguments than registers");
        }
    }

    #[test]
    fn gaps_of_the_table_are_nobodys() {
        for number in [11, 43, 47, 56, 127, 128, 0x1_0000_0000, u64::MAX] {
            assert_eq!(Hypercall::from_number(number), None);
        }
    }
}
