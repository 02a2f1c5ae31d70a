//! Building and tearing down domains, over any control interface.
//!
//! [`ControlInterface`] is what a hypervisor must offer; ours does through its control hypercall, and real Xen's domctls can
//! be put behind the same trait. Everything that a guest could notice is decided by the shared domain builder.
//!
//! A domain is made in this order: empty and paused, its memory, its two ports, what the builder writes through a window of
//! mapped frames, the window closed, grants for the two rings, its root table pinned (which checks all tables), its first
//! vCPU's state. It is left paused. Whatever fails, what was made before is torn down again.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;
use core::future::Future;
use domain_builder::{BuildTarget, Builder, ImageError, Kernel, LayoutError, Parameters, Role};
use hypercall_abi::vcpu::VcpuGuestContext;
use hypercall_abi::{DomId, Errno, GrantRef, Mfn, PAGE_SIZE, Pfn, Port};

use crate::units::Bytes;

/// Pages mapped at a time while a domain is written.
const WINDOW_PAGES: u64 = 64;
/// Pages asked for at a time.
const POPULATE_PAGES: u64 = 512;
/// Pages in a block that is asked for as one, as a power of two: so few that nobody waits for them long.
const BLOCK_ORDER: u32 = 6;
/// Builder steps between two chances for other tasks.
const STEPS_PER_TURN: u32 = 32;

/// Reserved grants that lead to the rings (public/grant_table.h).
const CONSOLE_GRANT: GrantRef = GrantRef::new(0);
/// The grant of the xenstore ring.
pub const STORE_GRANT: GrantRef = GrantRef::new(1);

/// Frames of a domain under construction, mapped here until dropped.
pub trait Window {
    /// Copies bytes into page `page` of the window from byte `offset` on; they do not cross its end.
    fn write(&self, page: usize, offset: usize, bytes: &[u8]);
    /// Fills page `page` of the window with zeroes.
    fn zero(&self, page: usize);
}

/// What building a domain takes from a hypervisor.
pub trait ControlInterface {
    /// Mapped frames.
    type Window: Window;

    /// Makes a paused domain without memory; returns its number and the frame of its shared page.
    ///
    /// # Errors
    /// The hypervisor's.
    fn create_domain(&mut self, vcpus: u32, max_pages: u64, limits: Limits) -> Result<(DomId, Mfn), Errno>;

    /// Gives pages, 2^`order` behind each other for each of `frames`, which holds guest frame numbers, and machine frames afterwards.
    ///
    /// # Errors
    /// `ENOMEM` when there are not enough, or none so large; others as the hypervisor's. With how many of them were given before it.
    fn populate(&mut self, domain: DomId, order: u32, frames: &mut [u64]) -> Result<(), (usize, Errno)>;

    /// Whether pages that it gives are zeroes.
    fn gives_blank_pages(&self) -> bool;

    /// Maps frames of a paused domain, writable.
    ///
    /// # Errors
    /// The hypervisor's.
    fn map(&mut self, domain: DomId, frames: &[Mfn]) -> Result<Self::Window, Errno>;

    /// Fills a frame with the hypercall stubs.
    ///
    /// # Errors
    /// The hypervisor's.
    fn hypercall_page(&mut self, domain: DomId, frame: Mfn) -> Result<(), Errno>;

    /// Makes a port of the domain that the caller's domain may connect to.
    ///
    /// # Errors
    /// The hypervisor's.
    fn port_for_caller(&mut self, domain: DomId) -> Result<Port, Errno>;

    /// Lets the caller's domain map a frame through one of the reserved grants.
    ///
    /// # Errors
    /// The hypervisor's.
    fn grant_to_caller(&mut self, domain: DomId, grant: GrantRef, frame: Mfn) -> Result<(), Errno>;

    /// Makes a frame the root of page tables, for good.
    ///
    /// # Errors
    /// `EINVAL` when it, or a table below, is none.
    fn pin_root(&mut self, domain: DomId, frame: Mfn) -> Result<(), Errno>;

    /// Sets the first vCPU's state and marks it as up.
    ///
    /// # Errors
    /// The hypervisor's.
    fn set_first_vcpu(&mut self, domain: DomId, context: &VcpuGuestContext) -> Result<(), Errno>;

    /// Tears down a domain as far as one call goes; true when it is gone.
    ///
    /// # Errors
    /// `ESRCH` when there is no such domain.
    fn destroy_step(&mut self, domain: DomId) -> Result<bool, Errno>;

    /// Pages that a new domain could get.
    ///
    /// # Errors
    /// The hypervisor's.
    fn free_pages(&mut self) -> Result<u64, Errno>;

    /// Lets other work go on; long operations call it between steps.
    fn turn(&self) -> impl Future<Output = ()> + Send;

    /// Waits for something that others have to do first; longer, the more often (`waited`) it was in vain.
    fn moment(&self, waited: u32) -> impl Future<Output = ()> + Send;
}

/// What was being done when the hypervisor refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Asking for free memory.
    Ask,
    /// Making the domain.
    Create,
    /// Giving it memory.
    Populate,
    /// Making its ports.
    Ports,
    /// Mapping its memory.
    Map,
    /// Writing its hypercall page.
    HypercallPage,
    /// Granting its rings.
    Grants,
    /// Having its page tables checked.
    Pin,
    /// Setting its vCPU's state.
    Vcpu,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ask => "telling how much memory is free",
            Self::Create => "making the domain",
            Self::Populate => "giving it memory",
            Self::Ports => "making its event channels",
            Self::Map => "mapping its memory",
            Self::HypercallPage => "writing its hypercall page",
            Self::Grants => "granting its rings",
            Self::Pin => "checking its page tables",
            Self::Vcpu => "setting its first vCPU's state",
        })
    }
}

/// Why a domain could not be made. Nothing of it is left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CreateError {
    /// The image is no kernel for a guest.
    Image(ImageError),
    /// The kernel does not fit the description.
    Layout(LayoutError),
    /// More than the machine has free.
    Memory {
        /// Pages wanted.
        wanted: u64,
        /// Pages free.
        free: u64,
    },
    /// The hypervisor refused a step.
    Refused(Step, Errno),
}

impl fmt::Display for CreateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image(error) => write!(f, "{error}"),
            Self::Layout(error @ LayoutError::NotEnoughMemory { .. }) => {
                write!(f, "{error}: raise `memory` in the description")
            }
            Self::Layout(error @ LayoutError::CommandLineTooLong { .. }) => {
                write!(f, "{error}: shorten `cmdline` in the description")
            }
            Self::Layout(error) => write!(f, "{error}"),
            Self::Memory { wanted, free } => write!(
                f,
                "not enough memory: it wants {} and {} are free. Lower `memory`, destroy another domain (`list` shows \
                 them), or start the machine with more (`cargo xtask run --mem SIZE`)",
                Bytes::of_pages(*wanted),
                Bytes::of_pages(*free)
            ),
            // The rest of that request is ours, and right.
            Self::Refused(Step::Create, Errno::ENOSPC) => f.write_str(
                "with sched=null each vCPU has a CPU of its own, and fewer are free: lower `vcpus`, or destroy another domain",
            ),
            Self::Refused(Step::Create, Errno::EINVAL) => {
                f.write_str("the hypervisor makes no domain with so many vCPUs: lower `vcpus`")
            }
            Self::Refused(step, errno) => {
                write!(f, "the hypervisor refused {step}: {errno}; `dmesg` may say more")
            }
        }
    }
}

impl core::error::Error for CreateError {}

/// How much of the hypervisor a domain may use. What is `None` is the hypervisor's default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The highest port it may have.
    pub max_port: u32,
    /// Frames of its grant table.
    pub grant_frames: Option<u32>,
    /// Frames for the grants of others that it has mapped, [`MAPPINGS_PER_FRAME`] in each.
    pub maptrack_frames: Option<u32>,
}

/// Mappings that Xen counts as one frame.
pub const MAPPINGS_PER_FRAME: u32 = 256;

/// What a domain is made of.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// An ELF kernel.
    pub image: &'a [u8],
    /// Its memory in pages.
    pub pages: u64,
    /// Its vCPUs.
    pub vcpus: u32,
    /// What else it may use.
    pub limits: Limits,
    /// Its kernel's command line.
    pub command_line: &'a str,
}

/// A new domain, paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Created {
    /// Its number.
    pub domain: DomId,
    /// Frame of its console ring.
    pub console: Mfn,
    /// Its end of the console's event channel.
    pub console_port: Port,
    /// Frame of its xenstore ring.
    pub store: Mfn,
    /// Its end of xenstore's event channel.
    pub store_port: Port,
}

/// A new domain, paused, without memory: it has a number that others can be told before its own kernel is placed.
#[derive(Debug)]
pub struct Empty {
    /// Its number.
    pub domain: DomId,
    shared_info: Mfn,
}

/// Makes a domain and leaves it paused.
///
/// # Errors
/// [`CreateError`]; nothing is left of the domain then.
pub async fn create<C: ControlInterface>(
    control: &mut C,
    request: &Request<'_>,
) -> Result<Created, CreateError> {
    let empty = create_empty(control, request)?;
    fill(control, request, empty).await
}

/// The first half of [`create`]: checks the request and makes the domain.
///
/// # Errors
/// [`CreateError`]; nothing is left of the domain then.
pub fn create_empty<C: ControlInterface>(
    control: &mut C,
    request: &Request<'_>,
) -> Result<Empty, CreateError> {
    // Planned once before anything is made: most mistakes end here.
    plan(request, Parameters::default())?;
    let free = control.free_pages().map_err(|errno| CreateError::Refused(Step::Ask, errno))?;
    if request.pages > free {
        return Err(CreateError::Memory { wanted: request.pages, free });
    }
    let (domain, shared_info) = control
        .create_domain(request.vcpus, request.pages, request.limits)
        .map_err(|errno| CreateError::Refused(Step::Create, errno))?;
    Ok(Empty { domain, shared_info })
}

/// The second half of [`create`]: memory, rings, kernel. The command line can be another than in the first half.
///
/// # Errors
/// [`CreateError`]; nothing is left of the domain then.
pub async fn fill<C: ControlInterface>(
    control: &mut C,
    request: &Request<'_>,
    empty: Empty,
) -> Result<Created, CreateError> {
    let domain = empty.domain;
    let result = furnish(control, request, empty).await;
    if result.is_err() {
        // It cannot fail: the domain is ours, exists and has never run.
        let _ = destroy(control, domain).await;
    }
    result
}

fn plan<'a>(request: &Request<'a>, parameters: Parameters<'a>) -> Result<Builder<'a>, CreateError> {
    let kernel = Kernel::parse(request.image, Role::Guest).map_err(CreateError::Image)?;
    let parameters = Parameters { command_line: request.command_line.as_bytes(), ..parameters };
    Builder::new(kernel, request.pages, parameters).map_err(CreateError::Layout)
}

async fn furnish<C: ControlInterface>(
    control: &mut C,
    request: &Request<'_>,
    empty: Empty,
) -> Result<Created, CreateError> {
    let at = |step: Step| move |errno| CreateError::Refused(step, errno);
    let Empty { domain, shared_info } = empty;
    let frames = populate(control, domain, request.pages).await?;
    let store_port = control.port_for_caller(domain).map_err(at(Step::Ports))?;
    let console_port = control.port_for_caller(domain).map_err(at(Step::Ports))?;
    let parameters =
        Parameters { shared_info: shared_info.address(), store_port, console_port, ..Parameters::default() };
    let mut builder = Box::new(plan(request, parameters)?);
    let mut memory = Memory { control, domain, frames, window: None };
    let mut steps = 0;
    let built = loop {
        if let Some(built) = builder.step(&mut memory)? {
            break built;
        }
        steps += 1;
        if steps % STEPS_PER_TURN == 0 {
            memory.control.turn().await;
        }
    };
    let frame = |page: Option<Pfn>| page.and_then(|pfn| memory.frame(pfn));
    let rings = builder.layout().rings;
    let (console, store) = (frame(rings.map(|rings| rings.console)), frame(rings.map(|rings| rings.store)));
    // A builder for guests places both.
    let (console, store) = console.zip(store).ok_or(CreateError::Refused(Step::Grants, Errno::EINVAL))?;
    // Pages that are mapped writable here cannot become page tables.
    drop(memory);
    control.grant_to_caller(domain, CONSOLE_GRANT, console).map_err(at(Step::Grants))?;
    control.grant_to_caller(domain, STORE_GRANT, store).map_err(at(Step::Grants))?;
    control.pin_root(domain, built.root).map_err(at(Step::Pin))?;
    let context = Box::new(built.vcpu_context());
    control.set_first_vcpu(domain, &context).map_err(at(Step::Vcpu))?;
    Ok(Created { domain, console, console_port, store, store_port })
}

/// Gives the domain its pages; returns the machine frame behind each.
///
/// They are asked for in blocks, which cost much less; one by one where memory has no blocks any more, and at the end.
async fn populate<C: ControlInterface>(
    control: &mut C,
    domain: DomId,
    pages: u64,
) -> Result<Vec<Mfn>, CreateError> {
    let mut frames: Vec<Mfn> = Vec::new();
    let mut order = BLOCK_ORDER;
    loop {
        let next = frames.len() as u64;
        let left = pages.saturating_sub(next);
        if left == 0 {
            return Ok(frames);
        }
        if left < 1 << order {
            order = 0;
        }
        let blocks = (left >> order).min(POPULATE_PAGES >> order);
        let mut chunk: Vec<u64> = (0..blocks).map(|block| next + (block << order)).collect();
        let result = control.populate(domain, order, &mut chunk);
        let given = result.map_or_else(|(given, _)| given, |()| chunk.len());
        for first in chunk.into_iter().take(given) {
            frames.extend((first..first + (1 << order)).map(Mfn::new));
        }
        match result {
            Ok(()) => {}
            // There may be as much in smaller pieces.
            Err((_, Errno::ENOMEM)) if order > 0 => order = 0,
            Err((_, errno)) => {
                return Err(match (errno, control.free_pages()) {
                    // What it got so far is given back when it is destroyed.
                    (Errno::ENOMEM, Ok(free)) => {
                        CreateError::Memory { wanted: pages, free: free + frames.len() as u64 }
                    }
                    _ => CreateError::Refused(Step::Populate, errno),
                });
            }
        }
        control.turn().await;
    }
}

/// Tears a domain down and waits until it is gone.
///
/// # Errors
/// `ESRCH` when there is no such domain.
pub async fn destroy<C: ControlInterface>(control: &mut C, domain: DomId) -> Result<(), Errno> {
    let mut waited = 0;
    loop {
        match control.destroy_step(domain) {
            Ok(true) => return Ok(()),
            // The last one to let go of its pages ended it meanwhile.
            Err(Errno::ESRCH) if waited > 0 => return Ok(()),
            Ok(false) => control.moment(waited).await,
            Err(errno) => return Err(errno),
        }
        waited += 1;
    }
}

/// A domain's memory seen through a window that moves.
struct Memory<'c, C: ControlInterface> {
    control: &'c mut C,
    domain: DomId,
    frames: Vec<Mfn>,
    window: Option<(u64, C::Window)>,
}

impl<C: ControlInterface> Memory<'_, C> {
    fn frame(&self, pfn: Pfn) -> Option<Mfn> {
        self.frames.get(usize::try_from(pfn.get()).ok()?).copied()
    }

    /// Moves the window over `pfn`; returns it and the page's place in it.
    fn over(&mut self, pfn: Pfn) -> Result<(&C::Window, usize), CreateError> {
        let first = pfn.get() - pfn.get() % WINDOW_PAGES;
        let place = (pfn.get() - first) as usize;
        if self.window.as_ref().is_none_or(|(mapped, _)| *mapped != first) {
            self.window = None;
            let start = (first as usize).min(self.frames.len());
            let end = (start + WINDOW_PAGES as usize).min(self.frames.len());
            let frames = self.frames.get(start..end).unwrap_or(&[]);
            let refused = |errno| CreateError::Refused(Step::Map, errno);
            self.window = Some((first, self.control.map(self.domain, frames).map_err(refused)?));
        }
        match &self.window {
            Some((_, window)) => Ok((window, place)),
            None => Err(CreateError::Refused(Step::Map, Errno::EINVAL)),
        }
    }
}

impl<C: ControlInterface> BuildTarget for Memory<'_, C> {
    type Error = CreateError;

    fn mfn_of(&mut self, pfn: Pfn) -> Result<Mfn, CreateError> {
        self.frame(pfn).ok_or(CreateError::Refused(Step::Map, Errno::EINVAL))
    }

    fn write(&mut self, pfn: Pfn, offset: usize, bytes: &[u8]) -> Result<(), CreateError> {
        debug_assert!(offset + bytes.len() <= PAGE_SIZE);
        let (window, place) = self.over(pfn)?;
        window.write(place, offset, bytes);
        Ok(())
    }

    fn zero(&mut self, pfn: Pfn) -> Result<(), CreateError> {
        let (window, place) = self.over(pfn)?;
        window.zero(place);
        Ok(())
    }

    fn starts_blank(&self) -> bool {
        self.control.gives_blank_pages()
    }

    fn hypercall_page(&mut self, pfn: Pfn) -> Result<(), CreateError> {
        let frame = self.mfn_of(pfn)?;
        let refused = |errno| CreateError::Refused(Step::HypercallPage, errno);
        self.control.hypercall_page(self.domain, frame).map_err(refused)
    }
}

#[cfg(test)]
mod tests;
