//! Event channels.
#![forbid(unsafe_code)]

use hypercall_abi::Virq;

use crate::domain::VcpuRef;
use crate::hypervisor::Hypervisor;
use crate::platform::Platform;

/// The event channels of a domain.
#[derive(Default)]
pub struct PortTable {}

impl PortTable {
    /// No ports.
    pub const fn new() -> PortTable {
        PortTable {}
    }
}

/// Interrupt pins and who listens.
pub struct IrqTable {}

impl IrqTable {
    /// `pins` pins, nobody listening.
    pub fn new(_pins: u32) -> IrqTable {
        IrqTable {}
    }
}

impl<P: Platform> Hypervisor<P> {
    /// Raises a virtual interrupt at the port that the vCPU bound to it, if any.
    pub fn raise_virq(&self, _vcpu: &VcpuRef, _virq: Virq) {}
}
