//! A host on a network: a card with the stack smoltcp above it, and an address.

use alloc::vec::Vec;
use guest_sdk::net::stack::{self, Device};
use guest_sdk::net::{Card, NetError, Options};
use guest_sdk::xenstore::SharedStore;
use guest_sdk::{CommandLine, Domain, memory, println, time};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::dhcpv4;
use smoltcp::wire::{IpCidr, Ipv4Address, Ipv4Cidr};

/// The store by which a domain finds its cards; says so when there is none.
pub fn store(domain: &mut Domain) -> Option<SharedStore> {
    let store = domain.xenstore().map(SharedStore::new);
    if store.is_none() {
        println!("the first domain has no xenstore, and no cards");
    }
    store
}

/// The host. Its sockets are the user's.
pub struct Host {
    /// The card.
    pub device: Device,
    /// Addresses and routes.
    pub interface: Interface,
    /// All sockets.
    pub sockets: SocketSet<'static>,
    /// Who is asked for names.
    pub dns: Vec<Ipv4Address>,
    client: Option<SocketHandle>,
}

impl Host {
    /// Opens the card that the words name, and gets its address: `card=0`, `ip=10.0.0.2/24` or else by DHCP; `offload=none` has
    /// checksums made and segments sent one by one, `offload=checksums` leaves only checksums out; `queues=4` are as many, each with a
    /// quarter of the pages.
    ///
    /// # Errors
    /// [`NetError`].
    pub async fn open(store: &SharedStore, words: CommandLine) -> Result<Self, NetError> {
        // The examples have one vCPU.
        let _ = memory::use_wide_copies();
        let options = match words.value("offload") {
            Some("none") => Options::default(),
            Some("checksums") => Options { segments: false, ..Options::offloading() },
            _ => Options::offloading(),
        };
        let queues: usize = words.number("queues").unwrap_or(1).max(1);
        let options = Options {
            receive_pages: options.receive_pages / queues,
            transmit_pages: options.transmit_pages / queues,
            queues,
            ..options
        };
        let card = Card::open_with(store, words.number("card").unwrap_or(0), options).await?;
        match card.queues() {
            1 => println!("card {}", card.mac()),
            several => println!("card {}, {several} queues", card.mac()),
        }
        let mut device = Device::new(card);
        let mut config = Config::new(device.hardware_address());
        // No secret: it keeps the numbers of hosts that start at the same time apart.
        let own = device.card().mac().0.iter().fold(0, |seed, byte| seed << 8 | u64::from(*byte));
        config.random_seed = own ^ time::now_ns();
        let interface = Interface::new(config, &mut device, stack::now());
        let mut host =
            Self { device, interface, sockets: SocketSet::new(Vec::new()), dns: Vec::new(), client: None };
        match words.number::<Ipv4Cidr>("ip") {
            Some(address) => host.set_address(Some(address), None),
            None => {
                host.client = Some(host.sockets.add(dhcpv4::Socket::new()));
                while host.address().is_none() {
                    host.poll();
                    if host.address().is_none() {
                        host.wait().await?;
                    }
                }
            }
        }
        Ok(host)
    }

    /// Its address.
    #[must_use]
    pub fn address(&self) -> Option<Ipv4Address> {
        self.interface.ipv4_addr()
    }

    fn set_address(&mut self, address: Option<Ipv4Cidr>, router: Option<Ipv4Address>) {
        self.interface.update_ip_addrs(|addresses| {
            addresses.clear();
            if let Some(address) = address {
                println!("address {address}");
                // It is the only one.
                let _ = addresses.push(IpCidr::Ipv4(address));
            }
        });
        match router {
            Some(router) => {
                let _ = self.interface.routes_mut().add_default_ipv4_route(router);
            }
            None => drop(self.interface.routes_mut().remove_default_ipv4_route()),
        }
    }

    /// Lets the stack do what is to be done.
    pub fn poll(&mut self) {
        self.device.poll(&mut self.interface, &mut self.sockets);
        let Some(client) = self.client else { return };
        match self.sockets.get_mut::<dhcpv4::Socket<'_>>(client).poll() {
            Some(dhcpv4::Event::Configured(config)) => {
                let (address, router) = (config.address, config.router);
                self.dns = config.dns_servers.iter().copied().collect();
                self.set_address(Some(address), router);
            }
            Some(dhcpv4::Event::Deconfigured) => self.set_address(None, None),
            None => {}
        }
    }

    /// Says what went through each queue, if there are several.
    pub fn tell_queues(&self) {
        let counts = self.device.card().queue_counts();
        if counts.len() > 1 {
            let used = counts.iter().filter(|(sent, received)| sent + received > 0).count();
            println!("{used} of {} queues used, frames sent and received: {counts:?}", counts.len());
        }
    }

    /// Waits until there is something to be done.
    ///
    /// # Errors
    /// [`NetError::Gone`].
    pub async fn wait(&mut self) -> Result<(), NetError> {
        self.device.wait(&mut self.interface, &self.sockets).await
    }
}
