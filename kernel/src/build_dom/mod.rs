//! Building dom0, the one domain that ring 0 makes itself.
//!
//! The same builder as the toolstack's lays the domain out and fills it; here it writes straight to machine frames. Everything
//! it makes passes the checks of any guest's page tables: the root is validated like one that a guest pins.
#![forbid(unsafe_code)]

use crate::domain::DomainError;
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use domain_builder::{BuildTarget, Builder, ImageError, Kernel, LayoutError, Parameters, Role};
use hypercall_abi::vcpu::VcpuGuestContext;
use hypercall_abi::{DomId, Mfn, PAGE_SIZE, Pfn, Port, VcpuId};

use crate::access::Rights;
use crate::domain::{Domain, NewDomain, VcpuRef, block};
use crate::hypercall::{Budget, Exit, write_hypercall_page};
use crate::hypervisor::Hypervisor;
use crate::mm::{Level, MAX_ORDER};
use crate::platform::Platform;

/// Why dom0 could not be built.
#[derive(Debug)]
pub enum BuildError {
    /// The boot module is no kernel that can be started.
    Image(ImageError),
    /// It does not fit the memory dom0 gets.
    Layout(LayoutError),
    /// Making the domain failed.
    Domain(DomainError),
    /// The machine has not enough free memory: pages wanted, pages free.
    Memory(u64, u64),
    /// The domain's first page tables or context were refused.
    Context(Exit),
}

impl fmt::Display for BuildError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BuildError::Image(error) => write!(f, "dom0's image: {error}"),
            BuildError::Layout(error) => write!(f, "dom0's memory: {error}"),
            BuildError::Domain(error) => write!(f, "dom0 could not be made: {error}"),
            BuildError::Memory(wanted, free) => {
                write!(f, "dom0 wants {wanted} pages and {free} are free: give less with dom0_mem=")
            }
            BuildError::Context(exit) => write!(f, "dom0's first context was refused: {exit:?}"),
        }
    }
}

/// What dom0 is made of.
pub struct Dom0<'a> {
    /// Its kernel, an ELF image.
    pub kernel: &'a [u8],
    /// Its own module: what followed the ELF in the boot module.
    pub module: &'a [u8],
    /// Its command line.
    pub command_line: &'a str,
    /// Its memory in pages.
    pub pages: u64,
    /// Its vCPUs.
    pub vcpus: u32,
    /// Its rights.
    pub rights: Rights,
}

/// A run of frames behind consecutive pfns.
struct Extent {
    pfn: u64,
    mfn: u64,
    count: u64,
}

/// dom0's memory while it is built.
struct Memory<'h, P: Platform> {
    hv: &'h Hypervisor<P>,
    extents: Vec<Extent>,
}

impl<P: Platform> Memory<'_, P> {
    /// Gives `domain` its memory in runs as long as can be had, and enters it in the machine-to-physical table.
    fn populate(&mut self, domain: &Domain, pages: u64) -> Result<(), BuildError> {
        let mut pfn = 0;
        let mut order = MAX_ORDER;
        while pfn < pages {
            order = order.min((pages - pfn).ilog2());
            match self.hv.give_frames(domain, order, u64::MAX) {
                Ok(first) => {
                    let count = 1 << order;
                    for i in 0..count {
                        self.hv.mm.m2p().set(Mfn::new(first.get() + i), pfn + i);
                    }
                    self.extents.push(Extent { pfn, mfn: first.get(), count });
                    pfn += count;
                }
                Err(_) if order > 0 => order -= 1,
                Err(_) => return Err(BuildError::Memory(pages, pfn + self.hv.mm.free_frames() as u64)),
            }
        }
        Ok(())
    }
}

impl<P: Platform> BuildTarget for Memory<'_, P> {
    type Error = BuildError;

    fn mfn_of(&mut self, pfn: Pfn) -> Result<Mfn, BuildError> {
        let i = self.extents.partition_point(|e| e.pfn + e.count <= pfn.get());
        let extent =
            self.extents.get(i).filter(|e| e.pfn <= pfn.get()).ok_or(BuildError::Memory(pfn.get(), 0))?;
        Ok(Mfn::new(extent.mfn + (pfn.get() - extent.pfn)))
    }

    fn write(&mut self, pfn: Pfn, offset: usize, bytes: &[u8]) -> Result<(), BuildError> {
        let mfn = self.mfn_of(pfn)?;
        self.hv.platform.write_frame(mfn, offset, bytes);
        Ok(())
    }

    fn zero(&mut self, pfn: Pfn) -> Result<(), BuildError> {
        let mfn = self.mfn_of(pfn)?;
        self.hv.platform.zero_frame(mfn);
        Ok(())
    }

    fn hypercall_page(&mut self, pfn: Pfn) -> Result<(), BuildError> {
        let mfn = self.mfn_of(pfn)?;
        write_hypercall_page(&self.hv.platform, mfn);
        Ok(())
    }
}

impl<P: Platform> Hypervisor<P> {
    /// Builds dom0 and makes it runnable. Boot only: it takes as long as it takes.
    pub fn build_dom0(&self, dom0: &Dom0<'_>) -> Result<Arc<Domain>, BuildError> {
        let kernel = Kernel::parse(dom0.kernel, Role::Initial).map_err(BuildError::Image)?;
        let domain = self
            .create_domain(NewDomain {
                id: Some(DomId::ZERO),
                handle: [0; 16],
                vcpus: dom0.vcpus,
                max_pages: u64::MAX,
                rights: dom0.rights.clone(),
            })
            .map_err(BuildError::Domain)?;
        let parameters = Parameters {
            module: dom0.module,
            command_line: dom0.command_line.as_bytes(),
            shared_info: domain.shared_info.address(),
            store_port: Port::new(0),
            console_port: Port::new(0),
        };
        let mut builder = Builder::new(kernel, dom0.pages, parameters).map_err(BuildError::Layout)?;
        let mut memory = Memory { hv: self, extents: Vec::new() };
        memory.populate(&domain, dom0.pages)?;
        let built = builder.run(&mut memory)?;
        log::debug!(
            "dom0: entry {:#x}, {} of {} pages in use, module of {} KiB",
            built.entry.get(),
            builder.layout().used_pages(),
            dom0.pages,
            dom0.module.len().div_ceil(PAGE_SIZE) * 4
        );
        let context: Box<VcpuGuestContext> = Box::new(built.vcpu_context());
        let vcpu = VcpuRef::new(&domain, VcpuId::new(0)).ok_or(BuildError::Domain(DomainError::Invalid))?;
        let mut budget = Budget::unlimited();
        self.pager()
            .pin(built.root, Level::L4, domain.id, self, &mut budget)
            .map_err(|_| BuildError::Context(DomainError::Invalid.into()))?;
        self.set_vcpu_context(&vcpu, &context, [0; 6], &mut budget).map_err(BuildError::Context)?;
        vcpu.blocked.fetch_and(!block::DOWN, core::sync::atomic::Ordering::AcqRel);
        self.unpause_domain(&domain).map_err(BuildError::Domain)?;
        Ok(domain)
    }
}
