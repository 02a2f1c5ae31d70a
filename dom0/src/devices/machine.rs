//! The machine below the drivers: configuration space, registers, pages, and interrupts as events.

use crate::waiting::Bell;
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::future::{Future, poll_fn};
use core::pin::pin;
use core::sync::atomic::{AtomicU64, Ordering};
use core::task::Poll;
use guest_sdk::events::{Channel, Events};
use guest_sdk::executor;
use guest_sdk::hardware::{ConfigPorts, DmaPage, Line, Message, Registers};
use hypercall_abi::Errno;
use spin::{Mutex, Once};
use virtio::{Platform, Transport, Vectors};

/// The machine.
pub struct Machine {
    config: ConfigPorts,
}

impl Platform for Machine {
    type Config = ConfigPorts;
    type Registers = Registers;
    type Page = DmaPage;

    fn config(&self) -> &ConfigPorts {
        &self.config
    }
    fn map(&self, address: u64, bytes: u64) -> Result<Registers, Errno> {
        Registers::map(address, bytes)
    }
    fn page(&self) -> Option<DmaPage> {
        DmaPage::new().ok()
    }
}

static MACHINE: Once<Machine> = Once::new();

/// The one machine.
///
/// # Errors
/// Without the right to its ports.
pub fn machine() -> Result<&'static Machine, Errno> {
    MACHINE.try_call_once(|| ConfigPorts::open().map(|config| Machine { config }))
}

/// How often it is asked where messages are to go, in interrupts: a vCPU that moves among CPUs takes its interrupts with it then.
const RETARGET_EVERY: u64 = 256;

/// A message, and its port. The port is closed first.
struct Heard {
    channel: Channel,
    message: Message,
}

/// The interrupts of a device, as its task waits for them.
pub struct Interrupts {
    messages: Vec<Heard>,
    /// The table is the hypervisor's affair.
    theirs: bool,
    line: Option<Arc<Bell>>,
    seen: u64,
    counted: Arc<AtomicU64>,
}

impl Interrupts {
    /// As many messages as the device has, up to `wanted`; or its line.
    ///
    /// Xenolith hands out stores, which are written into the device's table here. Xen writes tables itself.
    pub fn take(
        events: &Events,
        transport: &mut Transport<&'static Machine>,
        wanted: u16,
    ) -> (Interrupts, Vectors) {
        let mut all =
            Interrupts { messages: Vec::new(), theirs: false, line: None, seen: 0, counted: Arc::default() };
        let entries = transport.msix().map_or(0, |msix| msix.entries()).min(wanted);
        for entry in 0..entries {
            if all.add(events, transport, entry).is_err() {
                break;
            }
        }
        if all.messages.is_empty() {
            let bell = Arc::new(Bell::new());
            all.line = Some(bell);
            return (all, Vectors::Line);
        }
        let vectors = Vectors::Messages(all.messages.len() as u16);
        (all, vectors)
    }

    fn add(
        &mut self,
        events: &Events,
        transport: &mut Transport<&'static Machine>,
        entry: u16,
    ) -> Result<(), Errno> {
        let ours = if self.theirs { Err(Errno::ENOSYS) } else { Message::allocate() };
        let message = match ours {
            Ok(message) => message,
            Err(errno) => {
                // Another control interface: it is Xen's, or there is none.
                let (bus, devfn) = transport.address().numbers();
                let config = transport.platform().config();
                let base = transport.msix().and_then(|msix| msix.base(config)).ok_or(errno)?;
                let message = Message::for_entry(bus, devfn, entry, base)?;
                self.theirs = true;
                message
            }
        };
        let channel = events.bind_pirq(message.pirq())?;
        if !self.theirs {
            if entry == 0 {
                transport.map_messages().map_err(|_| Errno::ENODEV)?;
            }
            transport.set_message(entry, message.store()?).map_err(|_| Errno::ENODEV)?;
        }
        self.messages.push(Heard { channel, message });
        Ok(())
    }

    /// What they are, for people.
    pub fn about(&self) -> &'static str {
        if self.line.is_some() { "line" } else { "MSI-X" }
    }

    /// How many came, for who shows it.
    pub fn counted(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.counted)
    }

    /// Has the lines' task ask `cause` at each interrupt of a line: whether it was this device, which ends it.
    pub fn listen(&self, events: &Events, cause: impl Fn() -> bool + Send + Sync + 'static) {
        if let Some(bell) = &self.line {
            let bell = Arc::clone(bell);
            lines(
                events,
                Box::new(move || {
                    if cause() {
                        bell.ring()
                    }
                }),
            );
        }
    }

    /// Waits until the device interrupts, or `also` is ready. True when it may be about its configuration.
    pub async fn any(&mut self, also: impl Future<Output = ()>) -> bool {
        let mut also = pin!(also);
        let line = self.line.clone();
        let seen = self.seen;
        let mut rung = pin!(async {
            match &line {
                Some(bell) => bell.after(seen).await,
                None => core::future::pending().await,
            }
        });
        let messages = &mut self.messages;
        let (mut config, mut fired) = (false, 0);
        poll_fn(|context| {
            let mut ready = also.as_mut().poll(context).is_ready();
            for (index, heard) in messages.iter_mut().enumerate() {
                if pin!(heard.channel.fired()).poll(context).is_ready() {
                    // The first is for changes of the configuration.
                    config |= index == 0;
                    fired += 1;
                    ready = true;
                }
            }
            if rung.as_mut().poll(context).is_ready() {
                config = true;
                fired += 1;
                ready = true;
            }
            if ready { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        if let Some(line) = &self.line {
            self.seen = line.rings();
        }
        self.counted.fetch_add(fired, Ordering::Relaxed);
        config
    }

    /// Whether it is time to look where messages are to go.
    pub fn is_due(&self) -> bool {
        !self.theirs
            && self.line.is_none()
            && self.counted.load(Ordering::Relaxed).is_multiple_of(RETARGET_EVERY)
    }

    /// Writes the stores anew that changed.
    pub fn retarget(&self, transport: &Transport<&'static Machine>) {
        for (entry, heard) in (0..).zip(&self.messages) {
            if let Ok(store) = heard.message.store() {
                // It is ours, and it was there before.
                let _ = transport.set_message(entry, store);
            }
        }
    }
}

/// Pins that PCI's lines may lead to. Which one a device's does is in tables that only an interpreter can read, so all are listened to.
const PINS: core::ops::Range<u32> = 16..24;

type Cause = Box<dyn Fn() + Send + Sync>;

static CAUSES: Mutex<Vec<Arc<Cause>>> = Mutex::new(Vec::new());

/// Adds a device to those that are asked when a line is raised. The first one binds the lines.
fn lines(events: &Events, cause: Cause) {
    let mut causes = CAUSES.lock();
    causes.push(Arc::new(cause));
    if causes.len() > 1 {
        return;
    }
    for pin in PINS {
        if let Ok(line) = Line::bind(events, pin) {
            executor::spawn(serve_line(line));
        }
    }
}

async fn serve_line(mut line: Line) {
    loop {
        line.channel.fired().await;
        let causes = CAUSES.lock().clone();
        causes.iter().for_each(|cause| cause());
        // Devices have taken it back, or it comes again.
        let _ = line.end();
    }
}
