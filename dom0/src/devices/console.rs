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
        interrupts.listen(events, move || asked.driver.lock().transport().cause() != 0);
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
        self.driver.lock().transport().address()
    }

    /// Whether it is broken for good.
    pub fn is_broken(&self) -> bool {
        self.driver.lock().is_broken()
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
            (driver.turn(), driver.take_fault(), driver.listen())
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
            interrupts.retarget(device.driver.lock().transport());
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

    /// Waits until somebody is at the host's end, and says that somebody is at this one: the host sends nothing before.
    pub async fn connected(&self) {
        self.until(|port| {
            self.device.driver.lock().set_open(port.number, true);
            port.host_open.then_some(())
        })
        .await;
    }

    /// Waits until `ready` gives something for the port.
    async fn until<T>(&self, mut ready: impl FnMut(&PortInfo) -> Option<T>) -> T {
        loop {
            let rings = self.device.bell.rings();
            if let Some(value) = self.info().and_then(|port| ready(&port)) {
                return value;
            }
            self.device.bell.after(rings).await;
        }
    }

    /// Reads what has come, at least one byte; 0 when nobody is at the host's end any more, and nothing is left of what came.
    pub async fn read(&self, to: &mut [u8]) -> usize {
        loop {
            let rings = self.device.bell.rings();
            let Some(port) = self.info() else { return 0 };
            let count = self.device.driver.lock().read(port.number, to);
            if count > 0 || !port.host_open {
                return count;
            }
            self.device.bell.after(rings).await;
        }
    }

    /// Writes all of it; gives how much, which is less when nobody is at the host's end any more.
    pub async fn write(&self, from: &[u8]) -> usize {
        let mut done = 0;
        while done < from.len() {
            let rings = self.device.bell.rings();
            let Some(port) = self.info().filter(|port| port.host_open) else { break };
            let now = self.device.driver.lock().write(port.number, from.get(done..).unwrap_or_default());
            done += now;
            if now == 0 {
                self.device.bell.after(rings).await;
            }
        }
        done
    }
}
