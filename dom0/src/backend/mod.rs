//! The back ends of guests' devices: what a guest's description asks for, attached before it starts, changed while it runs, and let
//! go of before its memory goes back.

mod block;
mod carrier;
mod device;
mod disk;
mod drives;
pub(crate) mod held;
mod net;
mod pages;

use block::Block;
pub use block::Vbd;
use net::Card;
pub use net::{Vif, switch_details, switch_table};
pub use pages::Page;

use crate::accounts::Traffic;
use crate::archive::Archive;
use crate::cards::CardSpec;
use crate::channel::Event;
use crate::devices::NetDevice;
use crate::disks::DiskSpec;
use crate::listeners::publish;
use crate::room::{self, New};
use crate::waiting::{Bell, First, first};
use crate::{say, switches};
use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::time::Duration;
use guest_sdk::{executor, time};
use hypercall_abi::DomId;
use spin::{Mutex, Once};

/// How long a guest has to let go of a device.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long taking a device away may take before the shell goes on.
const STOP_PATIENCE: Duration = Duration::from_secs(3);

/// The devices of one life of a guest.
pub struct Devices {
    domain: DomId,
    guest: String,
    disks: Mutex<Vec<Arc<Vbd>>>,
    cards: Mutex<Vec<Arc<Vif>>>,
    /// What went through those that it has no more.
    past: Mutex<Traffic>,
}

static ARCHIVE: Once<Archive<'static>> = Once::new();

/// What is said about switches.
const NETWORK: &str = "etc/network.toml";

/// Says where files are found.
pub fn init(archive: Archive<'static>) {
    ARCHIVE.call_once(|| archive);
}

/// Makes the switches that are described, over the machine's own cards.
pub fn start_network(cards: Vec<Arc<NetDevice>>) {
    let described = ARCHIVE.get().and_then(|archive| archive.find(NETWORK));
    let specs = described.map_or(Ok(Vec::new()), switches::parse);
    // Without a description that can be read, guests' switches are internal ones.
    if let Err(error) = specs.and_then(|specs| net::start(specs, cards)) {
        say!("dom0: {NETWORK}: {error}");
    }
}

/// Whether dom0 can go on when a back end panics: it holds nothing that others need. The panic handler asks this.
pub(crate) fn is_intact() -> bool {
    held::none() && crate::store::is_intact() && crate::terminal::is_intact()
}

/// A file that may be a disk.
fn file(name: &str) -> Result<&'static [u8], String> {
    let found = ARCHIVE.get().and_then(|archive| archive.find(&format!("disks/{name}")));
    found.ok_or_else(|| {
        let names: Vec<&str> = ARCHIVE.get().map_or(Vec::new(), |archive| {
            let files = archive.files().filter_map(Result::ok);
            files.filter_map(|file| file.name.strip_prefix("disks/")).collect()
        });
        let there = if names.is_empty() { "none".to_string() } else { names.join(", ") };
        format!("the boot archive holds no disks/{name}: there is {there}")
    })
}

pub use drives::format as format_drive;

/// What is wrong with disks, as far as it can be said before their domain is made.
///
/// # Errors
/// What to say.
pub fn check(disks: &[DiskSpec]) -> Result<(), String> {
    disks.iter().try_for_each(|spec| disk::check(spec).map_err(|why| format!("disk {}: {why}", spec.name)))
}

/// Until when a guest may take to let go of something, ns.
fn patience() -> u64 {
    time::now_ns().saturating_add(PATIENCE.as_nanos() as u64)
}

impl Devices {
    /// Makes the devices of a domain that has not run yet.
    ///
    /// # Errors
    /// What to say; none is left then.
    pub async fn start(
        domain: DomId,
        guest: &str,
        disks: &[DiskSpec],
        cards: &[CardSpec],
    ) -> Result<Arc<Self>, String> {
        let devices = Arc::new(Self {
            domain,
            guest: guest.to_string(),
            disks: Mutex::new(Vec::new()),
            cards: Mutex::new(Vec::new()),
            past: Mutex::default(),
        });
        let mut made = Ok(());
        for spec in disks {
            made = devices.attach(spec).await;
            if made.is_err() {
                break;
            }
        }
        let made = made.and_then(|()| cards.iter().try_for_each(|spec| devices.attach_card(spec).map(drop)));
        if let Err(error) = made {
            devices.stop().await;
            return Err(format!("{guest}: {error}"));
        }
        Ok(devices)
    }

    fn tell_attached(&self, device: String) {
        publish(Event::DeviceAttached { name: self.guest.clone(), device });
    }

    fn tell_detached(&self, device: String) {
        publish(Event::DeviceDetached { name: self.guest.clone(), device });
    }

    /// Adds a network card; returns its number.
    ///
    /// # Errors
    /// What to say.
    pub fn attach_card(&self, spec: &CardSpec) -> Result<u32, String> {
        room::check(New::Device)?;
        let mut cards = self.cards.lock();
        let taken = |number: &u32| cards.iter().any(|vif| vif.number() == *number);
        let number = (0..).find(|number| !taken(number)).unwrap_or(0);
        let card = Card::new(spec, &self.guest, number).map_err(|why| format!("card {number}: {why}"))?;
        let vif = Vif::start(self.domain, &self.guest, card)
            .map_err(|error| format!("card {number}: xenstore answers {error}"))?;
        cards.push(vif);
        self.tell_attached(format!("card {number}"));
        Ok(number)
    }

    /// The card of this number.
    ///
    /// # Errors
    /// What to say.
    pub fn card(&self, number: &str) -> Result<Arc<Vif>, String> {
        let wanted: u32 = number.parse().map_err(|_| format!("{number:?} is no number of a card"))?;
        let cards = self.cards.lock();
        let found = cards.iter().find(|vif| vif.number() == wanted);
        found.cloned().ok_or_else(|| format!("{} has no card {wanted}: it has {}", self.guest, cards.len()))
    }

    /// All its cards.
    pub fn cards(&self) -> Vec<Arc<Vif>> {
        self.cards.lock().clone()
    }

    /// Takes a card away. The guest is asked to let go of it; `force` does not wait for that.
    ///
    /// # Errors
    /// What to say: it keeps the card then.
    pub async fn detach_card(&self, number: &str, force: bool) -> Result<(), String> {
        let vif = self.card(number)?;
        if !force && !vif.leave(patience()).await {
            return Err(format!(
                "{guest} does not let go of card {number}; `card detach {guest} {number} force` takes it away all the same",
                guest = self.guest
            ));
        }
        vif.stop().await;
        self.cards.lock().retain(|other| other.number() != vif.number());
        *self.past.lock() += vif.kind.traffic();
        self.tell_detached(format!("card {number}"));
        Ok(())
    }

    /// Adds a disk.
    ///
    /// # Errors
    /// What to say.
    pub async fn attach(&self, spec: &DiskSpec) -> Result<(), String> {
        if let Ok(vbd) = self.find(spec.device) {
            return Err(format!("disk {}: {} has it already", vbd.kind.spec.name, self.guest));
        }
        room::check(New::Device).map_err(|why| format!("disk {}: {why}", spec.name))?;
        let by = format!("{}'s {}", self.guest, spec.name);
        // Of its own: what it takes to look into a file system is much, and most domains need none of it.
        let opened = Box::pin(disk::open(spec, &by)).await;
        let disk = opened.map_err(|why| format!("disk {}: {why}", spec.name))?;
        // Somebody may have been faster while it was opened.
        if self.find(spec.device).is_ok() {
            return Err(format!("disk {}: {} has it already", spec.name, self.guest));
        }
        let vbd = Vbd::start(self.domain, &self.guest, Block::new(spec.clone(), disk))
            .map_err(|error| format!("disk {}: xenstore answers {error}", spec.name))?;
        self.disks.lock().push(vbd);
        self.tell_attached(format!("disk {}", spec.name));
        Ok(())
    }

    fn find(&self, device: u32) -> Result<Arc<Vbd>, String> {
        let disks = self.disks.lock();
        let found = disks.iter().find(|vbd| vbd.kind.spec.device == device);
        found.cloned().ok_or_else(|| {
            let names: Vec<&str> = disks.iter().map(|vbd| vbd.kind.spec.name.as_str()).collect();
            let there = if names.is_empty() { "no disks".to_string() } else { names.join(", ") };
            format!("{} has no such disk: it has {there}", self.guest)
        })
    }

    /// The disk of this name.
    ///
    /// # Errors
    /// What to say.
    pub fn disk(&self, name: &str) -> Result<Arc<Vbd>, String> {
        self.find(
            guest_sdk::block::device_number(name).ok_or_else(|| format!("{name:?} is no name of a disk"))?,
        )
    }

    /// All its disks.
    pub fn disks(&self) -> Vec<Arc<Vbd>> {
        self.disks.lock().clone()
    }

    /// Takes a disk away. The guest is asked to let go of it; `force` does not wait for that.
    ///
    /// # Errors
    /// What to say: it keeps the disk then.
    pub async fn detach(self: &Arc<Self>, name: &str, force: bool) -> Result<(), String> {
        let vbd = self.disk(name)?;
        let silent = |vbd: &Vbd| {
            let count = vbd.kind.at_work();
            (count > 0).then(|| format!("what is below has not answered {count} requests"))
        };
        if !force && !vbd.leave(patience()).await {
            let why = silent(&vbd).unwrap_or_else(|| "it may be in use there".into());
            return Err(format!(
                "{} does not let go of {name}: {why}; `disk detach {} {name} force` takes it away all the same, and what it has \
                 not written yet is lost",
                self.guest, self.guest
            ));
        }
        let (devices, leaving, gone) = (Arc::clone(self), Arc::clone(&vbd), Arc::new(Bell::new()));
        let (told, seen) = (Arc::clone(&gone), gone.rings());
        // A task of its own: it takes as long as a disk of the machine's has pages of the guest.
        executor::spawn(async move {
            leaving.stop().await;
            // Another command may have wanted the same.
            let found = devices.disks.lock().extract_if(.., |other| Arc::ptr_eq(other, &leaving)).next();
            if let Some(vbd) = found {
                *devices.past.lock() += vbd.kind.traffic();
                devices.tell_detached(format!("disk {}", vbd.kind.spec.name));
            }
            told.ring();
        });
        match first(gone.after(seen), time::after(STOP_PATIENCE)).await {
            First::One(()) => Ok(()),
            First::Other(()) => {
                let why = silent(&vbd).unwrap_or_else(|| "its back end has not come to an end".into());
                Err(format!("{}'s {name} is taken away, but {why}: it is gone when that is over", self.guest))
            }
        }
    }

    /// What went through all its disks and cards, also those that are gone.
    pub fn traffic(&self) -> Traffic {
        let mut all = *self.past.lock();
        self.disks.lock().iter().for_each(|vbd| all += vbd.kind.traffic());
        self.cards.lock().iter().for_each(|vif| all += vif.kind.traffic());
        all
    }

    /// Lets go of all that is the guest's: nothing of it is mapped afterwards.
    pub async fn stop(&self) {
        let disks = core::mem::take(&mut *self.disks.lock());
        for vbd in disks {
            vbd.stop().await;
            *self.past.lock() += vbd.kind.traffic();
        }
        let cards = core::mem::take(&mut *self.cards.lock());
        for vif in cards {
            vif.stop().await;
            *self.past.lock() += vif.kind.traffic();
        }
    }
}
