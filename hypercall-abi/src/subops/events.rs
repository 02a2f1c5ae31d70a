//! Event channels: the commands of `event_channel_op`.

use super::operations;

operations! {
    /// Commands of `event_channel_op`; the argument structs are in [`evtchn`](crate::evtchn).
    EvtchnOp of EventChannelOp, "EVTCHNOP_", 32 bits, else ENOSYS {
        /// Connects a new local port to a remote unbound one.
        BindInterdomain = 0, "bind_interdomain", Guest, [Handled], {};
        /// Binds a virtual interrupt to a new port.
        BindVirq = 1, "bind_virq", Guest, [Handled], {};
        /// Binds a physical interrupt to a new port.
        BindPirq = 2, "bind_pirq", Guest, [Handled], {};
        /// Closes a port.
        Close = 3, "close", Guest, [Handled], {};
        /// Signals the other end of a port.
        Send = 4, "send", Guest, [Handled], {};
        /// Tells what a port is bound to.
        Status = 5, "status", Guest, [Handled], {};
        /// Makes a port that a named domain may connect to.
        AllocUnbound = 6, "alloc_unbound", Guest, [Handled], {};
        /// Makes a port that interrupts one of the domain's own vCPUs.
        BindIpi = 7, "bind_ipi", Guest, [Handled], {};
        /// Moves a port to another vCPU.
        BindVcpu = 8, "bind_vcpu", Guest, [Handled], {};
        /// Unmasks a port and delivers what is pending.
        Unmask = 9, "unmask", Guest, [Handled], {};
        /// Closes all ports of a domain.
        Reset = 10, "reset", Guest, [Handled], {};
        /// Switches to the FIFO layout.
        InitControl = 11, "init_control", Guest, [Handled], {};
        /// Adds a frame to the FIFO's event array.
        ExpandArray = 12, "expand_array", Guest, [Handled], {};
        /// Sets a FIFO event's priority.
        SetPriority = 13, "set_priority", Guest, [Handled], {};
        /// A preempted `reset` going on; hypervisor-internal.
        ResetCont = 14, "reset_cont", Guest, [Handled], {};
    }
}
