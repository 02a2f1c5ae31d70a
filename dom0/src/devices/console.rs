//! The machine's consoles: ports that lead to the host.

use super::machine::{Interrupts, Machine};
use crate::say;
use crate::waiting::Bell;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};
use guest_sdk::events::Events;
use guest_sdk::executor;
use spin::Mutex;
use virtio::console::{Counters, PortInfo};
use virtio::{Console, Error, Transport};

/// A console of the machine's.
pub struct ConsoleDevice {
    name: String,
    driver: Mutex<Console<&'static Machine>>,
    /// Rung when anything is new: bytes, room, ports, somebody at the other end.
    bell: Bell,
    interrupts: Arc<AtomicU64>,
    about: &'static str,
}

/// A port of a console, by its name, whether it is there or not.
#[derive(Clone)]
pub struct Port {
    device: Arc<ConsoleDevice>,
    name: String,
}

impl ConsoleDevice {
    /// Brings a console up, and starts its task.
    ///
    /// # Errors
    /// Why it cannot be used.
    pub fn start(
        name: &str,
        mut transport: Transport<&'static Machine>,
        events: &Events,
    ) -> Result<Arc<ConsoleDevice>, Error> {
        // One for changes of its configuration, one for all its queues.
        let (interrupts, vectors) = Interrupts::take(events, &mut transport, 2);
        let console = Console::start(transport, vectors)?;
        let device = Arc::new(ConsoleDevice {
            name: name.to_string(),
            driver: Mutex::new(console),
            bell: Bell::new(),
            interrupts: interrupts.counted(),
            about: interrupts.about(),
        });
        let asked = Arc::clone(&device);
        interrupts.listen(events, move || asked.driver.lock().device().transport().cause() != 0);
        executor::spawn(serve(Arc::clone(&device), interrupts));
        Ok(device)
    }

    /// As the shell knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The ports that there are.
    pub fn ports(&self) -> Vec<PortInfo> {
        self.driver.lock().ports().collect()
    }

    /// What went through it.
    pub fn counters(&self) -> Counters {
        *self.driver.lock().counters()
    }

    /// How it interrupts, and how often it has.
    pub fn interrupts(&self) -> (&'static str, u64) {
        (self.about, self.interrupts.load(Ordering::Relaxed))
    }

    /// Where it is.
    pub fn place(&self) -> pci::Address {
        self.driver.lock().device().transport().address()
    }

    /// Whether it is broken for good.
    pub fn is_broken(&self) -> bool {
        self.driver.lock().device().is_broken()
    }

    /// In one line, for people. Its ports are known a little after it has been started.
    pub fn about(&self) -> String {
        let mut text = String::new();
        for port in self.ports() {
            let name = port.name.unwrap_or_else(|| format!("port {}", port.number));
            text += &format!("{name}{}, ", if port.host_open { " (open)" } else { "" });
        }
        text + self.about
    }
}

/// A console's task.
async fn serve(device: Arc<ConsoleDevice>, mut interrupts: Interrupts) {
    loop {
        let (news, fault, more) = {
            let mut driver = device.driver.lock();
            (driver.turn(), driver.device_mut().take_fault(), driver.listen())
        };
        if news {
            device.bell.ring();
        }
        if let Some(fault) = fault {
            let then = if device.is_broken() { "it is given up" } else { "it was reset" };
            say!("console {}: {fault}; {then}", device.name);
        }
        if more {
            executor::yield_now().await;
            continue;
        }
        if interrupts.any(core::future::pending()).await {
            device.driver.lock().changed();
        }
        if interrupts.is_due() {
            interrupts.retarget(device.driver.lock().device().transport());
        }
    }
}

impl Port {
    /// The port `name` of a console. It may come and go.
    pub fn new(device: &Arc<ConsoleDevice>, name: &str) -> Port {
        Port { device: Arc::clone(device), name: name.to_string() }
    }

    /// What is known of it; none while there is no such port.
    pub fn info(&self) -> Option<PortInfo> {
        self.device.ports().into_iter().find(|port| port.name.as_deref() == Some(&*self.name))
    }

    /// Says that somebody is at this end, once there is such a port: the host sends nothing before. Gives how often somebody has come to
    /// the other end.
    pub fn attend(&self) -> u64 {
        let Some(port) = self.info() else { return 0 };
        self.device.driver.lock().set_open(port.number, true);
        port.opens
    }

    /// Takes what has come, if anything has.
    pub fn read(&self, to: &mut [u8]) -> usize {
        self.info().map_or(0, |port| self.device.driver.lock().read(port.number, to))
    }

    /// Gives bytes away; returns how many were taken, which are all when nobody is there to get them.
    pub fn write(&self, from: &[u8]) -> usize {
        match self.info().filter(|port| port.host_open) {
            Some(port) => self.device.driver.lock().write(port.number, from),
            None => from.len(),
        }
    }

    /// Whether the host has got all that was written.
    pub fn has_sent(&self) -> bool {
        self.info().is_none_or(|port| self.device.driver.lock().has_sent(port.number))
    }

    /// How often anything was new: taken before looking.
    pub fn changes(&self) -> u64 {
        self.device.bell.rings()
    }

    /// Waits until anything is newer than that.
    pub async fn changed(&self, since: u64) {
        self.device.bell.after(since).await;
    }
}
