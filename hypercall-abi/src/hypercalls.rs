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
            (0, SetTrapTable, set_trap_table, Guest, (traps), [Handled], "Loads entries into the vCPU's virtual trap table.", {
                [takes In vcpu::TrapInfo]
                [errors
                    EFAULT "the list cannot be read";
                    EINVAL "an address that is not canonical; entries before it are made";
                ]
                [rules
                    "`traps` is a list that ends with an entry whose address is 0; vectors that it does not name keep their handlers. A null list clears the table.";
                ]
            });
            (1, MmuUpdate, mmu_update, Guest, (requests, count, done, domid), [Handled], "Writes page-table entries or machine-to-physical entries, checked.", {
                [takes In mmu::MmuUpdate]
                [errors
                    EFAULT "the list cannot be read; requests before the unreadable one are done";
                    ESRCH "no such domain, or the caller names itself by number";
                    ENOSYS "a command of nobody";
                ]
                [rules
                    "`requests` is a list of `count`; the first that is refused ends it. `done`, unless null, is told how many were done, also when all were.";
                    "The lower half of `domid` names the domain that owns the frames, the upper half, less one, the domain that owns the tables; 0 in the upper half is the caller.";
                    "Each entry is stored atomically. When the call returns, no processor uses a translation that a stored upper-level entry no longer gives; flushes for L1 entries are the guest's own business until a frame changes its owner or its type.";
                ]
            });
            (2, SetGdt, set_gdt, Guest, (frames, entries), [Handled], "Replaces the vCPU's descriptor table by up to 14 read-only frames.", {
                [value "frames: a list of frame numbers; entries: how many descriptors, up to 7168"]
                [errors
                    EINVAL "more entries than there is room for, a frame that is not the domain's or in use as something else, or one with a descriptor that a guest may not have";
                    EFAULT "the list cannot be read";
                ]
                [rules
                    "The frames are held as descriptor pages: the guest cannot write them but by `update_descriptor`. What the processor has loaded of the old table stays until it is loaded anew.";
                ]
            });
            (3, StackSwitch, stack_switch, Guest, (ss, rsp), [Handled], "Sets the stack that traps from guest user mode are delivered on.", {
                [rules
                    "The stack segment's privilege is forced to 3.";
                ]
            });
            (4, SetCallbacks, set_callbacks, Guest, (event, failsafe, syscall), [Handled], "Sets the three entry points of a 64-bit guest at once.", {
                [rules
                    "An address that is not canonical leaves that callback as it was, without an error.";
                ]
            });
            (5, FpuTaskswitch, fpu_taskswitch, Guest, (set), [Handled], "Sets or clears the guest's view of CR0.TS.", {
                [rules
                    "While set, vector instructions of the guest raise its #NM; that handler is entered with it clear.";
                ]
            });
            (6, SchedOpCompat, sched_op_compat, Guest, (command, argument), [Handled], "Scheduling in the form older than interface 0x00030101.", {
                [errors
                    ENOSYS "a command other than yield, block and shutdown";
                ]
                [rules
                    "The argument of shutdown is the reason itself.";
                ]
            });
            (7, PlatformOp, platform_op, Hardware, (operation), [Handled], "Machine settings: wall clock, firmware facts, processor power.", {
                [errors
                    EFAULT "the argument cannot be read";
                    EACCES "another version of the interface";
                    EPERM "the caller has no control verbs";
                ]
            });
            (8, SetDebugreg, set_debugreg, Guest, (register, value), [Handled], "Writes a debug register of the vCPU; breakpoints in hypervisor space are refused.", {
                [errors
                    ENODEV "there is no such register";
                    EINVAL "bits above the low 32 of dr6 or dr7";
                    EPERM "an address in the hypervisor's range, a breakpoint on ports without CR4.DE, or general detect";
                ]
            });
            (9, GetDebugreg, get_debugreg, Guest, (register), [Handled], "Reads a debug register of the vCPU.", {
                [returns "the value"]
                [errors
                    ENODEV "there is no such register";
                ]
            });
            (10, UpdateDescriptor, update_descriptor, Guest, (address, descriptor), [Handled], "Writes one checked segment descriptor at a machine address.", {
                [value "address: machine address, 8-byte aligned; descriptor: the 8 bytes"]
                [errors
                    EINVAL "an address that is misaligned or not in a frame of the domain's, a descriptor that a guest may not have, or a frame in use as a page table";
                ]
                [rules
                    "The descriptor is stored atomically.";
                ]
            });
            (12, MemoryOp, memory_op, Guest, (command, argument), [Handled], "Reservations, memory maps and the machine-to-physical window.", {
                [errors
                    EFAULT "the argument cannot be read, or its answer not written";
                    ENOSYS "a start above 0 in the command, for one that has no list";
                ]
                [rules
                    "Bits 6 and up of the command are the extent to start at: the hypervisor sets them when a preempted call is executed again.";
                ]
            });
            (13, Multicall, multicall, Guest, (entries, count), [Handled], "Runs a list of hypercalls, each with its own result.", {
                [takes InOut mmu::MulticallEntry]
                [errors
                    EFAULT "the list cannot be read or answered; entries before are done";
                ]
                [rules
                    "`entries` is a list of `count`, carried out in order; each has its own result. A multicall in a multicall is `EINVAL` in its entry. An iret ends the list.";
                ]
            });
            (14, UpdateVaMapping, update_va_mapping, Guest, (va, pte, flags), [Handled], "Writes the L1 entry that maps a virtual address, with the flush asked for.", {
                [errors
                    EINVAL "no L1 table of the domain's maps the address, or the entry has bits that a guest may not set";
                    EBUSY "the entry maps a frame that is not the owner's, or that cannot be writable while it is something else";
                    EACCES "the entry asks for another caching of a frame that the hypervisor shares with the guest";
                    EPERM "the entry is for device memory that the domain has no right to";
                    EFAULT "the flags are the address of a bitmap of vCPUs that cannot be read; the entry is stored";
                ]
                [rules
                    "`flags` says what is flushed (nothing, the address, all) and where: here, on all processors of the domain, or for a bitmap of vCPUs whose address it is.";
                ]
            });
            (15, SetTimerOp, set_timer_op, Guest, (deadline_ns), [Handled], "Sets the vCPU's one-shot timer in system time; 0 stops it.", {
                [value "system time in ns; 0 stops the timer"]
                [rules
                    "`VIRQ_TIMER` is raised once, when the time has come. Times of the past fire at once; times with bit 63 set, or more than 2^50 ns ahead, fire after 100 ms.";
                ]
            });
            (16, EventChannelOpCompat, event_channel_op_compat, Guest, (operation), [Handled], "Event channels in the form older than interface 0x00030202.", {
                [value "one structure: the command, then the argument of `event_channel_op`"]
                [errors
                    EFAULT "the structure cannot be read in the size of its largest member, or its answer not written";
                    ENOSYS "a command above `EVTCHNOP_unmask`, or one of nobody";
                ]
                [rules
                    "All other errors are those of the same command of `event_channel_op`.";
                ]
            });
            (17, XenVersion, xen_version, Guest, (command, argument), [Handled], "Version, features and other facts about the hypervisor.", {
                [errors
                    EFAULT "the argument cannot be read, or the answer not written";
                ]
            });
            (18, ConsoleIo, console_io, Guest, (command, count, buffer), [Handled], "Writes to or reads from the hypervisor's console.", {
                [errors
                    EPERM "the caller has no right to the console";
                    EFAULT "the buffer cannot be read or written";
                ]
            });
            (19, PhysdevOpCompat, physdev_op_compat, Guest, (operation), [Handled], "Physical interrupts in the form older than interface 0x00030202.", {
                [value "one structure: the command, then at byte 8 the argument of `physdev_op`"]
                [errors
                    EFAULT "the structure cannot be read, or its answer not written";
                    ENOSYS "a command that is newer than this form";
                ]
                [rules
                    "All other errors are those of the same command of `physdev_op`.";
                ]
            });
            (20, GrantTableOp, grant_table_op, Guest, (command, operations, count), [Handled], "Maps, copies and administers granted frames.", {
                [errors
                    EINVAL "a count of 2^31 or more, or bits between the command and 2^12";
                    EFAULT "an element that cannot be read or answered; those before it are done";
                ]
                [statuses
                    "GNTST_okay" "done";
                    "GNTST_general_error" "the entry does not allow it, or the request asks for nothing or too much";
                    "GNTST_bad_domain" "there is no such domain";
                    "GNTST_bad_gntref" "there is no such reference";
                    "GNTST_bad_handle" "there is no such handle";
                    "GNTST_bad_virt_addr" "the address cannot be used";
                    "GNTST_bad_dev_addr" "the device address is not that of the mapping";
                    "GNTST_no_device_space" "there is no room for a device mapping";
                    "GNTST_permission_denied" "the caller has no right over the domain";
                    "GNTST_bad_page" "the frame cannot be shared or is not the domain's";
                    "GNTST_bad_copy_arg" "a copy crosses the end of a frame or of what is granted";
                    "GNTST_address_too_big" "the frame lies above what the other domain can use";
                    "GNTST_eagain" "the entry is in use: try again";
                    "GNTST_no_space" "there is no room for a handle";
                ]
                [rules
                    "`operations` is a list of `count`; each has its own `status`, a `GNTST_*` number, and the call itself succeeds whatever they are.";
                ]
            });
            (21, VmAssist, vm_assist, Guest, (command, assist), [Handled], "Turns an assist of the hypervisor on or off.", {
                [rules
                    "For the whole domain, from then on.";
                ]
            });
            (22, UpdateVaMappingOtherdomain, update_va_mapping_otherdomain, Guest, (va, pte, flags, domid), [Handled], "Like update_va_mapping for a frame of another domain.", {
                [errors
                    ESRCH "no such domain, or the caller names itself by number";
                    EPERM "another domain over which the caller has no control, or device memory that the domain has no right to";
                    EINVAL "no L1 table of the domain's maps the address, or the entry has bits that a guest may not set";
                    EBUSY "the entry maps a frame that is not the owner's, or that cannot be writable while it is something else";
                    EACCES "the entry asks for another caching of a frame that the hypervisor shares with the guest";
                    EFAULT "the flags are the address of a bitmap of vCPUs that cannot be read; the entry is stored";
                ]
                [rules
                    "`flags` says what is flushed (nothing, the address, all) and where: here, on all processors of the domain, or for a bitmap of vCPUs whose address it is.";
                ]
            });
            (23, Iret, iret, Guest, (), [Handled], "Returns from a trap with the frame on the guest kernel's stack.", {
                [takes In vcpu::IretContext]
                [returns "no result: the registers are those of the frame"]
                [rules
                    "The frame is at rsp. A guest whose frame cannot be read, or that returns to its user mode without page tables for it, is crashed.";
                    "The interrupt flag of the frame becomes the event mask, the privilege of cs says whether the kernel's or the user's page tables are used; what is pending is delivered before the next instruction.";
                ]
            });
            (24, VcpuOp, vcpu_op, Guest, (command, vcpu, argument), [Handled], "Starts, stops and queries vCPUs and registers their shared areas.", {
                [errors
                    ENOENT "there is no such vCPU";
                    EFAULT "the argument cannot be read, or its answer not written";
                ]
            });
            (25, SetSegmentBase, set_segment_base, Guest, (which, base), [Handled], "Sets FS base, a GS base, or the user GS selector.", {
                [value "which: one of the values below; base: an address, or a selector"]
                [errors
                    EINVAL "an address that is not canonical";
                ]
                [rules
                    "In force when the call returns. A selector that cannot be loaded becomes null, without an error.";
                ]
            });
            (26, MmuextOp, mmuext_op, Guest, (operations, count, done, domid), [Handled], "Pins tables, switches page tables, flushes, and sets the LDT.", {
                [takes In mmu::MmuextOp]
                [errors
                    EFAULT "the list cannot be read; requests before the unreadable one are done";
                    ESRCH "no such domain, or the caller names itself by number";
                    EPERM "another domain over which the caller has no control";
                ]
                [rules
                    "`operations` is a list of `count`; the first that is refused ends it. `done`, unless null, is told how many were done, also when all were.";
                    "`domid` names the domain that owns the frames, `DOMID_SELF` the caller.";
                ]
            });
            (27, XsmOp, xsm_op, Control, (operation), [Refused ENOSYS], "Security-module policy.", {});
            (28, NmiOp, nmi_op, Guest, (command, argument), [Handled], "Registers the callback for virtual NMIs.", {
                [errors
                    EFAULT "the argument cannot be read";
                ]
            });
            (29, SchedOp, sched_op, Guest, (command, argument), [Handled], "Yields, blocks, polls, shuts down, sets the watchdog.", {
                [errors
                    EFAULT "the argument cannot be read";
                ]
            });
            (30, CallbackOp, callback_op, Guest, (command, argument), [Handled], "Registers and unregisters guest entry points.", {
                [errors
                    EFAULT "the argument cannot be read";
                ]
            });
            (31, XenoprofOp, xenoprof_op, Hardware, (command, argument), [Handled], "Profiling by sampling.", {
                [errors
                    EFAULT "the argument of init cannot be read";
                ]
            });
            (32, EventChannelOp, event_channel_op, Guest, (command, argument), [Handled], "Creates, binds, signals and closes event channels.", {
                [errors
                    EFAULT "the argument cannot be read, or its answer not written; a port that was opened stays open then";
                ]
            });
            (33, PhysdevOp, physdev_op, Guest, (command, argument), [Handled], "I/O privilege level, physical interrupts and PCI devices.", {
                [errors
                    EFAULT "the argument cannot be read, or its answer not written";
                ]
            });
            (34, HvmOp, hvm_op, Guest, (command, argument), [Handled], "Parameters of hardware-virtualized guests.", {});
            (35, Sysctl, sysctl, Control, (operation), [Handled], "Whole-machine control in Xen's own form.", {
                [errors
                    EFAULT "the argument cannot be read";
                    EACCES "another version of the interface";
                    EPERM "the caller has no control verbs";
                    ENOSYS "it has; the control interface is another";
                ]
            });
            (36, Domctl, domctl, Control, (operation), [Handled], "Domain control; the layout is this project's own (feature `control`).", {
                [errors
                    EPERM "the caller has no control verbs";
                    EACCES "another version of the interface";
                    EFAULT "the argument cannot be read, or its answer not written";
                    ENOSYS "a command of nobody";
                ]
            });
            (37, KexecOp, kexec_op, Hardware, (command, argument), [Handled], "Loads and starts another kernel in the hypervisor's place.", {
                [errors
                    EPERM "the caller has no control verbs";
                ]
            });
            (38, TmemOp, tmem_op, Guest, (operations), [Refused ENOSYS], "Transcendent memory, gone from Xen.", {});
            (39, ArgoOp, argo_op, Guest, (command, arg1, arg2, arg3, arg4), [Refused ENOSYS], "Messages between domains through the hypervisor.", {});
            (40, XenpmuOp, xenpmu_op, Guest, (command, argument), [Refused EOPNOTSUPP], "Virtual performance counters.", {});
            (41, DmOp, dm_op, Control, (domid, count, buffers), [Handled], "Device-model control for hardware-virtualized guests.", {
                [errors
                    ENODATA "no buffers";
                    E2BIG "more buffers than there are commands for";
                    EFAULT "the buffers cannot be read";
                    ESRCH "there is no such domain";
                    EPERM "the caller itself";
                    EINVAL "another domain: none is hardware-virtualized";
                ]
            });
            (42, HypfsOp, hypfs_op, Control, (command, arg1, arg2, arg3, arg4), [Handled], "The hypervisor's parameter file system.", {
                [errors
                    EPERM "the caller has no control verbs";
                ]
            });
            (48, Arch0, arch_0, Hardware, (operation), [Handled], "Architecture slot 0: machine-check reports (`mca`) on x86.", {
                [errors
                    EPERM "the caller has no control verbs";
                    EFAULT "the argument cannot be read";
                    EACCES "another version of the interface";
                ]
            });
            (49, Arch1, arch_1, Control, (operation), [Handled], "Architecture slot 1: how Xen continues a long domctl; nothing that a guest makes itself.", {
                [errors
                    EFAULT "the argument cannot be read";
                    EOPNOTSUPP "anything but a `domctl` about shadow tables, or one about a PV domain";
                    ESRCH "there is no such domain";
                    EPERM "the caller has no control over it";
                ]
            });
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
            #[inline(always)]
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
