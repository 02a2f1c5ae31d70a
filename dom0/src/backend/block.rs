//! Virtual block devices: what a front end is told of its disk, and the task that serves its rings.
//!
//! The task lives as long as a connection: it waits for the rings' event channels and for the disk, and has nothing to do with xenstore.

use super::device::{Device, Kind, Link, Nodes};
use super::disk::Handle;
use super::pages::{Fused, Pages};
use crate::accounts::Traffic;
use crate::disks::DiskSpec;
use crate::say;
use crate::waiting::Bell;
use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use blkback::backend::{Backend, MOST_QUEUES, MOST_RING_PAGE_ORDER};
use blkback::grants::MOST as MOST_KEPT;
use blkback::queue::{Counters, REQUESTS_PER_TURN};
use blkback::request::{Fault, Identity, MAX_INDIRECT_SEGMENTS};
use core::future::{Future, poll_fn};
use core::pin::pin;
use core::task::{Context, Poll};
use guest_sdk::compartment::{self, Fuse, Panicked};
use guest_sdk::events::Channel;
use guest_sdk::grants::{Lease, Mapping};
use guest_sdk::{control, executor};
use hypercall_abi::io::blkif::{ABI, SECTOR_SIZE, VDISK_READONLY, keys};
use hypercall_abi::{GrantRef, Port};
use spin::Mutex;

/// A virtual block device.
pub type Vbd = Device<Block>;

/// What makes a device one for blocks.
pub struct Block {
    /// What it was made from.
    pub spec: DiskSpec,
    disk: Handle,
    status: Mutex<Status>,
    /// For tests: its back end panics when it blows.
    pub fuse: Arc<Fuse>,
}

/// How a device is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Status {
    /// What was done, in all its connections.
    pub counters: Counters,
    /// Pages of the guest that are kept mapped.
    pub kept_pages: usize,
    /// Times that its back end panicked.
    pub panics: u32,
}

/// What a front end says of its rings.
struct Rings {
    /// References of each ring's pages, and its event channel.
    rings: Vec<(Vec<GrantRef>, Port)>,
    persistent: bool,
}

impl Block {
    /// A device for a disk.
    pub fn new(spec: DiskSpec, disk: Handle) -> Self {
        Self { spec, disk, status: Mutex::new(Status::default()), fuse: Arc::default() }
    }

    /// Its back end panicked. Returns how many requests were taken before, in all its connections.
    fn count_panic(&self) -> u64 {
        let mut status = self.status.lock();
        status.kept_pages = 0;
        status.panics += 1;
        status.counters.requests
    }

    /// How it is.
    pub fn status(&self) -> Status {
        *self.status.lock()
    }

    /// What it moved.
    pub fn traffic(&self) -> Traffic {
        let Counters { requests, sectors_read, sectors_written, errors } = self.status.lock().counters;
        let bytes = |sectors: u64| sectors.saturating_mul(SECTOR_SIZE as u64);
        Traffic {
            block_requests: requests,
            block_read_bytes: bytes(sectors_read),
            block_written_bytes: bytes(sectors_written),
            block_errors: errors,
            ..Traffic::default()
        }
    }

    /// Requests that the disk has not answered.
    pub fn at_work(&self) -> usize {
        self.disk.at_work()
    }

    /// Bytes of the disk.
    pub fn bytes(&self) -> u64 {
        self.disk.properties().sectors * SECTOR_SIZE as u64
    }
}

impl Vbd {
    /// Makes the disk larger, and says so to the guest.
    ///
    /// # Errors
    /// What to say.
    pub async fn resize(&self, bytes: u64) -> Result<(), String> {
        // Of its own: a file system is looked into, which takes much.
        Box::pin(self.kind.disk.resize(&self.kind.spec.kind, bytes)).await?;
        self.changed()
    }

    /// Reads what the front end says of its rings.
    fn rings(&self) -> Result<Rings, String> {
        match self.said::<String>(keys::PROTOCOL)? {
            Some(protocol) if protocol != ABI => return Err(format!("it speaks {protocol:?}, not {ABI}")),
            // A front end that says nothing has the layout of its own kind, which is ours.
            _ => {}
        }
        let order: u32 = self.said(keys::RING_PAGE_ORDER)?.unwrap_or(0);
        if order > MOST_RING_PAGE_ORDER {
            return Err(format!("its ring has 2^{order} pages: 2^{MOST_RING_PAGE_ORDER} were offered"));
        }
        let queues: Option<u32> = self.said(keys::NUM_QUEUES)?;
        if queues.is_some_and(|queues| queues == 0 || queues > MOST_QUEUES) {
            return Err(format!("it wants {} rings: 1 to {MOST_QUEUES} were offered", queues.unwrap_or(0)));
        }
        let ring = |prefix: &str| -> Result<(Vec<GrantRef>, Port), String> {
            let reference = |name: &str| self.needs::<u32>(&format!("{prefix}{name}")).map(GrantRef::new);
            let pages = if order == 0 && self.said::<u32>(&format!("{prefix}ring-ref0"))?.is_none() {
                Vec::from([reference("ring-ref")?])
            } else {
                (0..1 << order).map(|page| reference(&format!("ring-ref{page}"))).collect::<Result<_, _>>()?
            };
            Ok((pages, Port::new(self.needs(&format!("{prefix}event-channel"))?)))
        };
        let rings = match queues {
            None | Some(1) if self.said::<u32>("queue-0/event-channel")?.is_none() => Vec::from([ring("")?]),
            queues => (0..queues.unwrap_or(1))
                .map(|queue| ring(&format!("queue-{queue}/")))
                .collect::<Result<_, _>>()?,
        };
        let persistent = self.said::<u32>(keys::PERSISTENT)?.is_some_and(|wanted| wanted != 0);
        Ok(Rings { rings, persistent })
    }
}

impl Kind for Block {
    const CLASS: &'static str = "vbd";

    fn number(&self) -> u32 {
        self.spec.device
    }

    fn name(&self) -> String {
        format!("disk {}", self.spec.name)
    }

    fn front_nodes(&self) -> Nodes {
        Vec::from([("virtual-device", self.spec.device.to_string()), ("device-type", "disk".into())])
    }

    fn back_nodes(&self) -> Nodes {
        let mode = if self.disk.properties().readonly { "r" } else { "w" };
        Vec::from([
            ("removable", "0".into()),
            ("bootable", "1".into()),
            ("dev", self.spec.name.clone()),
            ("type", "phy".into()),
            ("mode", mode.into()),
            ("device-type", "disk".into()),
        ])
    }

    fn offers(&self) -> Nodes {
        let mut nodes = Vec::from([
            (keys::FLUSH_CACHE, "1".into()),
            (keys::BARRIER, "1".into()),
            (keys::PERSISTENT, "1".into()),
            (keys::MAX_INDIRECT_SEGMENTS, MAX_INDIRECT_SEGMENTS.to_string()),
            (keys::MAX_RING_PAGE_ORDER, MOST_RING_PAGE_ORDER.to_string()),
            (keys::MAX_QUEUES, MOST_QUEUES.to_string()),
        ]);
        if let Some(granularity) = self.disk.properties().discard_granularity {
            nodes.extend([
                (keys::DISCARD, "1".into()),
                (keys::DISCARD_GRANULARITY, granularity.to_string()),
                (keys::DISCARD_ALIGNMENT, "0".into()),
                (keys::DISCARD_SECURE, "0".into()),
            ]);
        }
        nodes
    }

    fn connected(&self) -> Nodes {
        let properties = self.disk.properties();
        let info = if properties.readonly { VDISK_READONLY } else { 0 };
        Vec::from([
            (keys::SECTORS, properties.sectors.to_string()),
            (keys::SECTOR_SIZE, SECTOR_SIZE.to_string()),
            (keys::PHYSICAL_SECTOR_SIZE, properties.physical_sector.to_string()),
            (keys::INFO, info.to_string()),
        ])
    }

    fn connect(vbd: &Arc<Vbd>) -> Result<Arc<Link>, String> {
        let Rings { rings, persistent } = vbd.rings()?;
        let (mut pages, mut channels, mut leases) = (Vec::new(), Vec::new(), Vec::new());
        for (references, port) in &rings {
            let mapped = control::map_granted_pages(vbd.domain, references)
                .map_err(|error| format!("its ring cannot be mapped: {error}"))?;
            let channel = control::connect(vbd.domain, *port)
                .map_err(|errno| format!("its event channel {port} cannot be bound: {errno}"))?;
            leases.push(mapped.lease());
            pages.push(Fused::new(mapped, Arc::clone(&vbd.kind.fuse)));
            channels.push(channel);
        }
        let most = MOST_KEPT + pages.len() * REQUESTS_PER_TURN as usize * (MAX_INDIRECT_SEGMENTS + 1);
        let mapper = Pages::new(vbd.domain, most);
        leases.push(mapper.lease());
        let identity = Identity { device: vbd.kind.spec.device };
        let (disk, link) = (vbd.kind.disk.clone(), Link::new());
        let work = move || Box::new(Backend::new(pages, identity, persistent, mapper, disk));
        match compartment::run(super::is_intact, work) {
            Ok(backend) => {
                executor::spawn(serve(Arc::clone(vbd), backend, leases, channels, Arc::clone(&link)));
            }
            Err(panic) => {
                leases.into_iter().for_each(Lease::end);
                drop(channels);
                let requests = vbd.kind.count_panic();
                vbd.panicked(Some(&link), &panic, requests);
            }
        }
        Ok(link)
    }
}

type Served = Backend<Fused<Mapping>, Pages, Handle>;

/// A connection, from start to end.
///
/// A turn runs in a compartment of its own: the back end moves into it and comes back, unless it panics there.
async fn serve(
    vbd: Arc<Vbd>,
    mut backend: Box<Served>,
    leases: Vec<Lease>,
    mut channels: Vec<Channel>,
    link: Arc<Link>,
) {
    let before = vbd.kind.status().counters;
    loop {
        let seen = link.bell.rings();
        if link.is_stopping() {
            break;
        }
        let waker = poll_fn(|context| Poll::Ready(context.waker().clone())).await;
        let work = move || {
            let turn = backend.turn(&mut Context::from_waker(&waker));
            let waits = turn.as_ref().is_ok_and(|turn| !turn.more) && !backend.prepare_to_wait();
            (backend, turn, waits)
        };
        let (turn, waits) = match compartment::run(super::is_intact, work) {
            Ok((back, turn, waits)) => {
                backend = back;
                (turn, waits)
            }
            Err(panic) => {
                // What the disk was given before has its pages until it is done with them.
                vbd.kind.disk.settled().await;
                leases.into_iter().for_each(Lease::end);
                drop(channels);
                let requests = vbd.kind.count_panic();
                return vbd.panicked(Some(&link), &panic, requests);
            }
        };
        let Ok(turn) = turn else {
            vbd.broke(&link);
            // The other task has to hear of it first; it stops this one.
            link.bell.after(seen).await;
            continue;
        };
        for (number, channel) in channels.iter().enumerate() {
            if turn.notify & 1 << number != 0 {
                // It may be gone: then there is nobody to tell.
                let _ = channel.notify();
            }
        }
        if let Some(fault) = turn.fault {
            report(&vbd, fault);
        }
        if turn.more {
            note(&vbd, &backend, before);
            executor::yield_now().await;
        } else if waits {
            note(&vbd, &backend, before);
            anything(&mut channels, &link.bell, seen).await;
        }
    }
    note(&vbd, &backend, before);
    vbd.kind.status.lock().kept_pages = 0;
    // Pages of the guest stay mapped until the disk lets go of them.
    let finished = finish(backend).await;
    let closed = match finished {
        Ok(backend) => compartment::run(super::is_intact, move || drop(backend.close())),
        Err(panic) => {
            vbd.kind.disk.settled().await;
            Err(panic)
        }
    };
    if let Err(panic) = closed {
        leases.into_iter().for_each(Lease::end);
        vbd.kind.count_panic();
        // The connection ends anyway: nothing is to be restarted.
        say!("{}: its back end panicked at its end: {panic}", vbd.kind.name());
    }
    drop(channels);
    link.end();
}

/// Waits until the disk has done all that it was given; each turn of it in a compartment, too: it writes to the rings.
async fn finish(backend: Box<Served>) -> Result<Box<Served>, Panicked> {
    let mut backend = Some(backend);
    poll_fn(move |context| {
        let Some(mut served) = backend.take() else { return Poll::Pending };
        let waker = context.waker().clone();
        let work = move || {
            let finished = served.poll_finish(&mut Context::from_waker(&waker));
            (served, finished)
        };
        match compartment::run(super::is_intact, work) {
            Ok((served, Poll::Ready(()))) => Poll::Ready(Ok(served)),
            Ok((served, Poll::Pending)) => {
                backend = Some(served);
                Poll::Pending
            }
            Err(panic) => Poll::Ready(Err(panic)),
        }
    })
    .await
}

fn report(vbd: &Vbd, fault: Fault) {
    vbd.report(&format!("refused {fault}; it is not told again when that happens"));
}

/// Keeps what was done where others see it.
fn note(vbd: &Vbd, backend: &Served, before: Counters) {
    let (now, kept) = (backend.counters(), backend.kept_pages());
    let mut status = vbd.kind.status.lock();
    status.kept_pages = kept;
    status.counters = Counters {
        requests: before.requests + now.requests,
        sectors_read: before.sectors_read + now.sectors_read,
        sectors_written: before.sectors_written + now.sectors_written,
        errors: before.errors + now.errors,
    };
}

/// Waits until a channel fires, the bell rings, or whatever else this task is woken by: the disk.
async fn anything(channels: &mut [Channel], bell: &Bell, seen: u64) {
    let mut woken = false;
    poll_fn(|context| {
        let mut ready = core::mem::replace(&mut woken, true);
        for channel in channels.iter_mut() {
            ready |= pin!(channel.fired()).poll(context).is_ready();
        }
        ready |= pin!(bell.after(seen)).poll(context).is_ready();
        if ready { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}
