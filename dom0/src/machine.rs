//! The machine, behind the toolstack's trait: the hypervisor below, mappings through our own page tables, our clock.

use crate::hypervisor::{self, Hypervisor};
use crate::toolstack::{ControlInterface, Limits, Window};
use core::future::Future;
use core::time::Duration;
use guest_sdk::control::{self, Foreign};
use guest_sdk::memory::Access;
use guest_sdk::ring::SharedPage;
use guest_sdk::{executor, time};
use hypercall_abi::vcpu::VcpuGuestContext;
use hypercall_abi::{DomId, Errno, GrantRef, Mfn, PAGE_SIZE, Port};

/// The hypervisor, for making one domain.
pub struct Machine {
    hypervisor: &'static dyn Hypervisor,
    handle: [u8; 16],
}

impl Machine {
    /// Domains are made with as much of `name` as their handle holds.
    pub fn named(name: &str) -> Self {
        let mut handle = [0; 16];
        for (to, from) in handle.iter_mut().zip(name.bytes()) {
            *to = from;
        }
        Self { hypervisor: hypervisor::get(), handle }
    }
}

/// Frames mapped through our own page tables.
pub struct Mapped(Foreign);

impl Window for Mapped {
    fn write(&self, page: usize, offset: usize, bytes: &[u8]) {
        self.0.write_bytes(page * PAGE_SIZE + offset, bytes);
    }
    fn zero(&self, page: usize) {
        self.0.fill(page * PAGE_SIZE, PAGE_SIZE, 0);
    }
}

impl ControlInterface for Machine {
    type Window = Mapped;

    fn create_domain(&mut self, vcpus: u32, max_pages: u64, limits: Limits) -> Result<(DomId, Mfn), Errno> {
        self.hypervisor.create_domain(self.handle, vcpus, max_pages, limits)
    }

    fn populate(&mut self, domain: DomId, order: u32, frames: &mut [u64]) -> Result<(), (usize, Errno)> {
        control::populate_blocks(domain, order, frames)
    }

    fn gives_blank_pages(&self) -> bool {
        self.hypervisor.gives_blank_pages()
    }

    fn map(&mut self, domain: DomId, frames: &[Mfn]) -> Result<Mapped, Errno> {
        Foreign::map(domain, frames, Access::ReadWrite).map(Mapped)
    }

    fn hypercall_page(&mut self, domain: DomId, frame: Mfn) -> Result<(), Errno> {
        self.hypervisor.hypercall_page(domain, frame)
    }

    fn port_for_caller(&mut self, domain: DomId) -> Result<Port, Errno> {
        control::alloc_unbound_for(domain, guest_sdk::id())
    }

    fn grant_to_caller(&mut self, domain: DomId, grant: GrantRef, frame: Mfn) -> Result<(), Errno> {
        self.hypervisor.grant_seed(domain, grant, guest_sdk::id(), frame)
    }

    fn pin_root(&mut self, domain: DomId, frame: Mfn) -> Result<(), Errno> {
        control::pin_table_for(domain, 4, frame)
    }

    fn set_first_vcpu(&mut self, domain: DomId, context: &VcpuGuestContext) -> Result<(), Errno> {
        self.hypervisor.set_vcpu(domain, 0, context)
    }

    fn destroy_step(&mut self, domain: DomId) -> Result<bool, Errno> {
        self.hypervisor.destroy_step(domain)
    }

    fn free_pages(&mut self) -> Result<u64, Errno> {
        self.hypervisor.host().map(|host| host.free_pages)
    }

    fn turn(&self) -> impl Future<Output = ()> + Send {
        executor::yield_now()
    }

    fn moment(&self, waited: u32) -> impl Future<Output = ()> + Send {
        time::after(Duration::from_millis(u64::from(waited.clamp(1, 100))))
    }
}
