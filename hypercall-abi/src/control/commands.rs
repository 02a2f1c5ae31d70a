//! Numbers of the control commands.

use crate::subops::command_enum;

command_enum! {
    /// Commands of the control interface; each has a payload struct of the same name.
    Command, "control_" {
        /// What the hypervisor can do.
        Version = 0, "version";
        /// Makes a paused, empty domain.
        CreateDomain = 1, "create_domain";
        /// Starts to tear a domain down.
        Destroy = 2, "destroy";
        /// Stops a domain's vCPUs.
        Pause = 3, "pause";
        /// Lets them go on.
        Unpause = 4, "unpause";
        /// Limits a domain's memory.
        SetMaxPages = 5, "set_max_pages";
        /// Fills one of the domain's frames with hypercall stubs.
        HypercallPage = 6, "hypercall_page";
        /// Sets a vCPU's whole state.
        SetVcpuContext = 7, "set_vcpu_context";
        /// Reads a vCPU's whole state.
        GetVcpuContext = 8, "get_vcpu_context";
        /// State of one domain.
        DomainInfo = 9, "domain_info";
        /// State of many domains.
        ListDomains = 10, "list_domains";
        /// State of one vCPU.
        VcpuInfo = 11, "vcpu_info";
        /// What a domain's frames are used as.
        PageTypes = 12, "page_types";
        /// Fills one of the reserved grant entries of a new domain.
        GrantSeed = 13, "grant_seed";
        /// A domain's share of CPU time.
        SetWeight = 14, "set_weight";
        /// Where a vCPU may run.
        SetAffinity = 15, "set_affinity";
        /// The most CPU time that a domain gets.
        SetCap = 16, "set_cap";
        /// Facts about the machine.
        PhysInfo = 32, "phys_info";
        /// Reads the hypervisor's log.
        ReadLog = 33, "read_log";
        /// Sets how much it logs.
        SetLogLevel = 34, "set_log_level";
        /// What a CPU did.
        CpuInfo = 35, "cpu_info";
        /// Grants or revokes an interrupt.
        IrqPermission = 48, "irq_permission";
        /// Grants or revokes I/O ports.
        IoportPermission = 49, "ioport_permission";
        /// Grants or revokes machine frames that are not RAM.
        IomemPermission = 50, "iomem_permission";
        /// Limits how many message interrupts a domain may have.
        MessagePermission = 51, "message_permission";
        /// Takes a message interrupt.
        AllocateMessage = 52, "allocate_message";
        /// Where an interrupt goes, and what a device has to write for it.
        InterruptInfo = 53, "interrupt_info";
    }
}
