//! Event channels: the commands of `event_channel_op`.

use super::operations;

operations! {
    /// Commands of `event_channel_op`; the argument structs are in [`evtchn`](crate::evtchn).
    EvtchnOp of EventChannelOp as evtchn, "EVTCHNOP_", 32 bits, else ENOSYS {
        /// Connects a new local port to a remote unbound one.
        BindInterdomain = 0, "bind_interdomain", Guest, [Handled], {
            [takes InOut evtchn::EvtchnBindInterdomain]
            [errors
                ESRCH "there is no such domain";
                ENOSPC "no port is free";
                ENOMEM "there is no memory for the port";
                EINVAL "the remote port is not an unbound one that waits for the caller";
            ]
            [rules
                "The new port starts pending: the other side may have signalled before anybody listened.";
                "Each side may send at once; what either wrote before it sent is seen by the other once it sees the port pending.";
            ]
        };
        /// Binds a virtual interrupt to a new port.
        BindVirq = 1, "bind_virq", Guest, [Handled], {
            [takes InOut evtchn::EvtchnBindVirq]
            [errors
                EINVAL "there is no such interrupt, or it is one for the whole domain and the vCPU is not 0";
                ENOENT "there is no such vCPU";
                EEXIST "it is bound already";
                ENOSPC "no port is free";
                ENOMEM "there is no memory for the port";
            ]
        };
        /// Binds a physical interrupt to a new port.
        BindPirq = 2, "bind_pirq", Guest, [Handled], {
            [takes InOut evtchn::EvtchnBindPirq]
            [errors
                EINVAL "there is no such interrupt";
                EPERM "the domain has no right to it";
                EEXIST "the domain has bound it already";
                EBUSY "another domain has bound it, or the hypervisor handles it itself";
                ENOSPC "no port is free";
                ENOMEM "there is no memory for the port";
            ]
        };
        /// Closes a port.
        Close = 3, "close", Guest, [Handled], {
            [takes In evtchn::EvtchnClose]
            [errors
                EINVAL "there is no such port, or it is closed";
            ]
            [rules
                "A connected peer is unbound again, for the caller to reconnect to. Pending and mask bits of the port are cleared before its number can be given out anew.";
            ]
        };
        /// Signals the other end of a port.
        Send = 4, "send", Guest, [Handled], {
            [takes In evtchn::EvtchnSend]
            [errors
                EINVAL "there is no such port, or it is closed or one for interrupts";
            ]
            [rules
                "A full barrier: what the sender wrote before is seen by the receiver that found the port pending.";
                "Sending to an unbound port succeeds and does nothing.";
            ]
        };
        /// Tells what a port is bound to.
        Status = 5, "status", Guest, [Handled], {
            [takes InOut evtchn::EvtchnStatus]
            [errors
                ESRCH "there is no such domain";
                EPERM "another domain, and the caller has no control over it";
                EINVAL "there is no such port";
            ]
        };
        /// Makes a port that a named domain may connect to.
        AllocUnbound = 6, "alloc_unbound", Guest, [Handled], {
            [takes InOut evtchn::EvtchnAllocUnbound]
            [errors
                ESRCH "there is no domain `dom`";
                EPERM "`dom` is another domain, and the caller has no control over it";
                ENOSPC "no port is free";
                ENOMEM "there is no memory for the port";
            ]
            [rules
                "Whether `remote_dom` exists is not asked.";
            ]
        };
        /// Makes a port that interrupts one of the domain's own vCPUs.
        BindIpi = 7, "bind_ipi", Guest, [Handled], {
            [takes InOut evtchn::EvtchnBindIpi]
            [errors
                ENOENT "there is no such vCPU";
                ENOSPC "no port is free";
                ENOMEM "there is no memory for the port";
            ]
        };
        /// Moves a port to another vCPU.
        BindVcpu = 8, "bind_vcpu", Guest, [Handled], {
            [takes In evtchn::EvtchnBindVcpu]
            [errors
                ENOENT "there is no such vCPU";
                EINVAL "there is no such port, or it is closed or belongs to one vCPU";
            ]
            [rules
                "What is pending already stays with the vCPU that it was raised for.";
            ]
        };
        /// Unmasks a port and delivers what is pending.
        Unmask = 9, "unmask", Guest, [Handled], {
            [takes In evtchn::EvtchnUnmask]
            [errors
                EINVAL "there is no such port";
            ]
            [rules
                "Clears the mask bit, then looks at the pending bit: an event that comes between the two is delivered by one of them.";
            ]
        };
        /// Closes all ports of a domain.
        Reset = 10, "reset", Guest, [Handled], {
            [takes In evtchn::EvtchnReset]
            [errors
                ESRCH "there is no such domain";
                EPERM "another domain, and the caller has no control over it";
                EINVAL "another domain that is not held paused";
                EBUSY "a reset is under way";
                EAGAIN "a port is in use by the hypervisor or was opened meanwhile";
            ]
        };
        /// Switches to the FIFO layout.
        InitControl = 11, "init_control", Guest, [Handled], {
            [takes InOut evtchn::EvtchnInitControl]
            [errors
                ENOENT "there is no such vCPU";
                EINVAL "the block is misaligned or crosses the end of the page, the vCPU has one, or the frame is not a writable one of the domain's";
                ENOMEM "there is no memory";
            ]
            [rules
                "The first call of a domain switches it to the FIFO layout, with all its ports; there is no way back but reset.";
            ]
        };
        /// Adds a frame to the FIFO's event array.
        ExpandArray = 12, "expand_array", Guest, [Handled], {
            [takes In evtchn::EvtchnExpandArray]
            [errors
                EOPNOTSUPP "the domain uses the two-level layout";
                ENOSPC "the array has its most pages";
                EINVAL "the frame is not a writable one of the domain's";
            ]
            [rules
                "Events that were raised while their word was missing are raised again.";
            ]
        };
        /// Sets a FIFO event's priority.
        SetPriority = 13, "set_priority", Guest, [Handled], {
            [takes In evtchn::EvtchnSetPriority]
            [errors
                EINVAL "there is no such port, or no such priority";
                EACCES "the port is closed";
                ENOSYS "the domain uses the two-level layout";
            ]
            [rules
                "A change takes effect when the event is raised next.";
            ]
        };
        /// A preempted `reset` going on; hypervisor-internal.
        ResetCont = 14, "reset_cont", Guest, [Handled], {
            [takes In evtchn::EvtchnReset]
            [errors
                ESRCH "as for reset";
                EPERM "as for reset";
                EINVAL "as for reset";
                EBUSY "no reset is under way";
                EAGAIN "as for reset";
            ]
            [rules
                "The hypervisor makes this of a preempted reset; a guest has no use for it.";
            ]
        };
    }
}
