//! A machine with one virtio device, as far as a driver sees it: configuration space, registers, memory by machine address.
//!
//! Memory exists as long as its page: a device that touches what the driver has taken back fails the test, as does one that touches
//! anything while it may not master the bus.
#![allow(dead_code, reason = "each test file uses a part of it")]

use guest_sdk::ring::SharedPage;
use hypercall_abi::Errno;
use pci::{Address, Config, Registers};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicU32, Ordering};
use virtio::{DmaPage, Platform};

/// Where the device is.
pub const PLACE: Address = Address::new(0, 3, 0);
const REGISTERS: u64 = 0xfe00_0000;
const MSIX_TABLE: u64 = 0xfd00_0000;
const COMMON: u64 = 0;
const ISR: u64 = 0x1000;
const OWN: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MULTIPLIER: u64 = 4;

pub const INDIRECT: u64 = 1 << 28;
pub const EVENT_INDEX: u64 = 1 << 29;
pub const VERSION_1: u64 = 1 << 32;

type Words = Box<[AtomicU32]>;

/// A page of the machine's memory.
#[derive(Debug)]
pub struct Page {
    machine: u64,
    words: Rc<Words>,
}

impl SharedPage for Page {
    fn size(&self) -> usize {
        4096
    }
    fn read_bytes(&self, offset: usize, to: &mut [u8]) {
        for (at, byte) in (offset..).zip(to) {
            *byte = self.words[at / 4].load(Ordering::Relaxed).to_le_bytes()[at % 4];
        }
    }
    fn write_bytes(&self, offset: usize, from: &[u8]) {
        for (at, byte) in (offset..).zip(from) {
            set_byte(&self.words, at, *byte);
        }
    }
    fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4));
        &self.words[offset / 4]
    }
}

impl DmaPage for Page {
    fn machine_address(&self) -> u64 {
        self.machine
    }
}

fn set_byte(words: &Words, at: usize, byte: u8) {
    let mut bytes = words[at / 4].load(Ordering::Relaxed).to_le_bytes();
    bytes[at % 4] = byte;
    words[at / 4].store(u32::from_le_bytes(bytes), Ordering::Relaxed);
}

/// A queue as the device knows it.
#[derive(Clone, Debug, Default)]
pub struct DeviceQueue {
    pub most: u16,
    pub size: u16,
    pub vector: u16,
    pub enabled: bool,
    descriptors: u64,
    available: u64,
    used: u64,
    seen: u16,
    pub used_index: u16,
    pub kicks: u64,
}

/// What the device is, and how it misbehaves.
pub struct Device {
    pub id: u32,
    words: [u32; 64],
    pub features: u64,
    pub agreed: u64,
    select: [u32; 2],
    pub status: u8,
    generation: u8,
    queue_select: u16,
    pub queues: Vec<DeviceQueue>,
    pub own: Vec<u8>,
    pub config_vector: u16,
    pub isr: u8,
    /// Messages that it can use; more than these are refused.
    pub vectors: u16,
    pub refuses_features: bool,
    pub never_resets: bool,
    pub gone: bool,
    pub resets: u32,
    pub table: [u32; 16],
    pub msix_on: bool,
}

struct Inner {
    memory: RefCell<BTreeMap<u64, Weak<Words>>>,
    next: Cell<u64>,
    pub pages_left: Cell<usize>,
    device: RefCell<Device>,
}

/// The machine.
#[derive(Clone)]
pub struct Machine(Rc<Inner>);

/// A request as the device finds it.
#[derive(Clone, Debug)]
pub struct Chain {
    pub head: u16,
    pub read: Vec<(u64, u32)>,
    pub write: Vec<(u64, u32)>,
    pub indirect: bool,
}

fn capability(words: &mut [u32; 64], at: usize, next: u8, kind: u8, bytes: u8, offset: u64, length: u32) {
    words[at / 4] = 0x09 | u32::from(next) << 8 | u32::from(bytes) << 16 | u32::from(kind) << 24;
    words[at / 4 + 1] = 4;
    words[at / 4 + 2] = offset as u32;
    words[at / 4 + 3] = length;
    if bytes == 20 {
        words[at / 4 + 4] = MULTIPLIER as u32;
    }
}

impl Machine {
    /// One with a device of virtio's number `kind`.
    pub fn new(kind: u16, features: u64, queues: &[u16], own: &[u8]) -> Machine {
        let mut words = [0; 64];
        words[1] = 1 << 20;
        words[13] = 0x40;
        // The bus has a bridge and another vendor's capability in front, as real ones do.
        words[16] = 0x5001;
        capability(&mut words, 0x50, 0x60, 1, 16, COMMON, 0x38);
        capability(&mut words, 0x60, 0x70, 3, 16, ISR, 4);
        capability(&mut words, 0x70, 0x80, 4, 16, OWN, own.len() as u32);
        capability(&mut words, 0x80, 0x98, 2, 20, NOTIFY, 0x1000);
        words[0x98 / 4] = 0x11 | 3 << 16;
        words[0x98 / 4 + 1] = 1;
        words[4 + 1] = MSIX_TABLE as u32;
        words[4 + 4] = REGISTERS as u32 | 0xc;
        let queue =
            |most: &u16| DeviceQueue { most: *most, size: *most, vector: 0xffff, ..Default::default() };
        let device = Device {
            id: 0x1af4 | u32::from(0x1040 + kind) << 16,
            words,
            features: features | VERSION_1,
            agreed: 0,
            select: [0; 2],
            status: 0,
            generation: 0,
            queue_select: 0,
            queues: queues.iter().map(queue).collect(),
            own: own.to_vec(),
            config_vector: 0xffff,
            isr: 0,
            vectors: 4,
            refuses_features: false,
            never_resets: false,
            gone: false,
            resets: 0,
            table: [0; 16],
            msix_on: false,
        };
        Machine(Rc::new(Inner {
            memory: RefCell::default(),
            next: Cell::new(0x10_0000),
            pages_left: Cell::new(1000),
            device: RefCell::new(device),
        }))
    }

    /// Its device's function.
    pub fn function(&self) -> pci::Function {
        virtio::find(self)[0].0
    }

    /// Looks at the device, or changes it.
    pub fn device<R>(&self, look: impl FnOnce(&mut Device) -> R) -> R {
        look(&mut self.0.device.borrow_mut())
    }

    /// Takes a capability away (its offset in configuration space).
    pub fn without_capability(&self, at: usize) {
        self.device(|device| device.words[at / 4] |= 0xff << 24);
    }

    /// How many pages can be had.
    pub fn limit_pages(&self, pages: usize) {
        self.0.pages_left.set(pages);
    }

    /// Whether the device may reach memory.
    pub fn masters_bus(&self) -> bool {
        self.device(|device| device.words[1] & 4 != 0)
    }

    /// Pages that exist.
    pub fn pages(&self) -> usize {
        self.0.memory.borrow().values().filter(|page| page.strong_count() > 0).count()
    }

    fn words_at(&self, address: u64) -> Rc<Words> {
        assert!(self.masters_bus(), "the device touches memory at {address:#x}, cut off");
        let found = self.0.memory.borrow().get(&(address & !4095)).and_then(Weak::upgrade);
        found.unwrap_or_else(|| panic!("the device touches memory at {address:#x}, which is nobody's"))
    }

    /// The device reads memory, within a page.
    pub fn read_memory(&self, address: u64, bytes: usize) -> Vec<u8> {
        let words = self.words_at(address);
        let at = (address & 4095) as usize;
        assert!(at + bytes <= 4096, "{bytes} bytes at {address:#x} cross a page");
        (at..at + bytes).map(|at| words[at / 4].load(Ordering::Relaxed).to_le_bytes()[at % 4]).collect()
    }

    /// The device writes memory, within a page.
    pub fn write_memory(&self, address: u64, bytes: &[u8]) {
        let words = self.words_at(address);
        let at = (address & 4095) as usize;
        assert!(at + bytes.len() <= 4096, "{} bytes at {address:#x} cross a page", bytes.len());
        (at..).zip(bytes).for_each(|(at, byte)| set_byte(&words, at, *byte));
    }

    fn number(&self, address: u64, bytes: usize) -> u64 {
        let mut value = [0; 8];
        value[..bytes].copy_from_slice(&self.read_memory(address, bytes));
        u64::from_le_bytes(value)
    }

    /// The next chain that the driver has shown, as the device would take it.
    pub fn pop(&self, number: usize) -> Option<Chain> {
        let (queue, agreed, status) =
            self.device(|device| (device.queues[number].clone(), device.agreed, device.status));
        if status & 4 == 0 || !queue.enabled {
            return None;
        }
        let index = self.number(queue.available + 2, 2) as u16;
        if index == queue.seen {
            return None;
        }
        let slot = u64::from(queue.seen % queue.size);
        let head = self.number(queue.available + 4 + 2 * slot, 2) as u16;
        assert!(head < queue.size, "descriptor {head} of {}", queue.size);
        let mut chain = Chain { head, read: Vec::new(), write: Vec::new(), indirect: false };
        let (mut table, mut entries, mut at) = (queue.descriptors, queue.size, head);
        for _ in 0..=queue.size {
            assert!(at < entries, "descriptor {at} of {entries}");
            let place = table + 16 * u64::from(at);
            let (address, bytes) = (self.number(place, 8), self.number(place + 8, 4) as u32);
            let (flags, next) = (self.number(place + 12, 2), self.number(place + 14, 2) as u16);
            if flags & 4 != 0 {
                assert!(agreed & INDIRECT != 0 && flags == 4 && !chain.indirect && bytes.is_multiple_of(16));
                chain.indirect = true;
                (table, entries, at) = (address, (bytes / 16) as u16, 0);
                continue;
            }
            assert!(bytes > 0, "an empty descriptor");
            if flags & 2 != 0 {
                chain.write.push((address, bytes));
            } else {
                assert!(chain.write.is_empty(), "read behind written");
                chain.read.push((address, bytes));
            }
            if flags & 1 == 0 {
                self.device(|device| {
                    device.queues[number].seen = queue.seen.wrapping_add(1);
                });
                if agreed & EVENT_INDEX != 0 {
                    // It wants to be told of the next one.
                    let event = queue.seen.wrapping_add(1);
                    self.write_memory(queue.used + 4 + 8 * u64::from(queue.size), &event.to_le_bytes());
                }
                return Some(chain);
            }
            at = next;
        }
        panic!("a chain without an end");
    }

    /// The device says that `id` is done.
    pub fn push(&self, number: usize, id: u32, bytes: u32) {
        let queue = self.device(|device| device.queues[number].clone());
        let place = queue.used + 4 + 8 * u64::from(queue.used_index % queue.size);
        self.write_memory(place, &id.to_le_bytes());
        self.write_memory(place + 4, &bytes.to_le_bytes());
        self.set_used_index(number, queue.used_index.wrapping_add(1));
    }

    /// Whatever the device says how many are done.
    pub fn set_used_index(&self, number: usize, index: u16) {
        let used = self.device(|device| {
            device.queues[number].used_index = index;
            device.queues[number].used
        });
        self.write_memory(used + 2, &index.to_le_bytes());
    }

    /// Whether the driver wants an interrupt for what the device has used since `old`.
    pub fn wants_interrupt(&self, number: usize, old: u16) -> bool {
        let (queue, agreed) = self.device(|device| (device.queues[number].clone(), device.agreed));
        if agreed & EVENT_INDEX == 0 {
            return self.number(queue.available, 2) & 1 == 0;
        }
        let event = self.number(queue.available + 4 + 2 * u64::from(queue.size), 2) as u16;
        queue.used_index.wrapping_sub(event).wrapping_sub(1) < queue.used_index.wrapping_sub(old)
    }

    /// Bytes of pieces, one behind the other.
    pub fn gather(&self, pieces: &[(u64, u32)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (address, length) in pieces {
            let (mut at, mut left) = (*address, *length as usize);
            while left > 0 {
                let now = left.min(4096 - (at & 4095) as usize);
                bytes.extend(self.read_memory(at, now));
                (at, left) = (at + now as u64, left - now);
            }
        }
        bytes
    }

    /// Bytes into pieces, as far as both go.
    pub fn scatter(&self, pieces: &[(u64, u32)], bytes: &[u8]) {
        let mut from = bytes;
        for (address, length) in pieces {
            let (mut at, mut left) = (*address, *length as usize);
            while left > 0 && !from.is_empty() {
                let now = left.min(4096 - (at & 4095) as usize).min(from.len());
                self.write_memory(at, &from[..now]);
                (at, left, from) = (at + now as u64, left - now, &from[now..]);
            }
        }
    }
}

impl Config for Machine {
    fn read(&self, at: Address, offset: u8) -> u32 {
        if at != PLACE {
            return u32::MAX;
        }
        self.device(|device| match offset {
            0 => device.id,
            _ => device.words[usize::from(offset) / 4],
        })
    }
    fn write(&self, at: Address, offset: u8, value: u32) {
        assert_eq!(at, PLACE);
        self.device(|device| {
            let word = &mut device.words[usize::from(offset) / 4];
            *word = match offset {
                4 => *word & !0xffff | value & 0xffff,
                // 4 KiB of memory; 16 KiB of it, above 4 GiB if somebody says so.
                0x14 => *word & 0xfff | value & !0xfff,
                0x20 => *word & 0x3fff | value & !0x3fff,
                0x24 => value,
                _ => *word,
            };
        });
    }
    fn write16(&self, at: Address, offset: u8, value: u16) {
        assert_eq!((at, offset), (PLACE, 0x9a), "only the MSI-X capability is written by halves");
        self.device(|device| device.msix_on = value & 0x8000 != 0);
    }
}

impl Platform for Machine {
    type Config = Machine;
    type Registers = Mapped;
    type Page = Page;

    fn config(&self) -> &Machine {
        self
    }
    fn map(&self, address: u64, bytes: u64) -> Result<Mapped, Errno> {
        Ok(Mapped { machine: self.clone(), address, bytes })
    }
    fn page(&self) -> Option<Page> {
        self.0.pages_left.set(self.0.pages_left.get().checked_sub(1)?);
        let machine = self.0.next.get();
        // No two are side by side.
        self.0.next.set(machine + 0x3000);
        let words: Rc<Words> = Rc::new((0..1024).map(|_| AtomicU32::new(0)).collect());
        self.0.memory.borrow_mut().insert(machine, Rc::downgrade(&words));
        Some(Page { machine, words })
    }
}

/// Registers, mapped.
pub struct Mapped {
    machine: Machine,
    address: u64,
    bytes: u64,
}

impl Mapped {
    fn access(&self, offset: u64, width: u64, value: Option<u32>) -> u32 {
        assert!(offset.is_multiple_of(width) && offset + width <= self.bytes, "register {offset:#x}");
        let at = self.address + offset;
        if (MSIX_TABLE..MSIX_TABLE + 64).contains(&at) {
            let word = ((at - MSIX_TABLE) / 4) as usize;
            return self.machine.device(|device| {
                device.table[word] = value.unwrap_or(device.table[word]);
                device.table[word]
            });
        }
        self.machine.device(|device| device.register(at - REGISTERS, width, value))
    }
}

impl Registers for Mapped {
    fn read(&self, offset: u64) -> u32 {
        self.access(offset, 4, None)
    }
    fn write(&self, offset: u64, value: u32) {
        self.access(offset, 4, Some(value));
    }
    fn read16(&self, offset: u64) -> u16 {
        self.access(offset, 2, None) as u16
    }
    fn write16(&self, offset: u64, value: u16) {
        self.access(offset, 2, Some(value.into()));
    }
    fn read8(&self, offset: u64) -> u8 {
        self.access(offset, 1, None) as u8
    }
    fn write8(&self, offset: u64, value: u8) {
        self.access(offset, 1, Some(value.into()));
    }
}

impl Device {
    fn register(&mut self, at: u64, width: u64, value: Option<u32>) -> u32 {
        if self.gone {
            return u32::MAX;
        }
        match at {
            ISR => core::mem::take(&mut self.isr).into(),
            OWN..NOTIFY => {
                assert!(value.is_none());
                let at = (at - OWN) as usize;
                let mut bytes = [0; 4];
                bytes[..width as usize].copy_from_slice(&self.own[at..at + width as usize]);
                u32::from_le_bytes(bytes)
            }
            NOTIFY.. => {
                let number = value.expect("nobody reads this");
                assert_eq!(at, NOTIFY + u64::from(number) * MULTIPLIER, "told of another queue");
                self.queues[number as usize].kicks += 1;
                0
            }
            _ => self.common(at, width, value),
        }
    }

    fn common(&mut self, at: u64, width: u64, value: Option<u32>) -> u32 {
        let widths = match at {
            0..16 | 32..56 => 4,
            20 | 21 => 1,
            _ => 2,
        };
        assert_eq!(width, widths, "a register is accessed in its width: {at}");
        let vector = |wanted: u32, vectors: u16| {
            if wanted < vectors.into() { wanted as u16 } else { 0xffff }
        };
        let vectors = self.vectors;
        let number = usize::from(self.queue_select);
        if at >= 24 && number >= self.queues.len() {
            return 0;
        }
        let half = |place: &mut u64, upper: bool, value: u32| {
            *place = if upper {
                *place & 0xffff_ffff | u64::from(value) << 32
            } else {
                *place & !0xffff_ffff | u64::from(value)
            };
        };
        let Some(value) = value else {
            return match at {
                4 => self.features.checked_shr(32 * self.select[0]).unwrap_or(0) as u32,
                16 => self.config_vector.into(),
                18 => self.queues.len() as u32,
                20 => self.status.into(),
                21 => self.generation.into(),
                24 => self.queues[number].size.into(),
                26 => self.queues[number].vector.into(),
                28 => self.queues[number].enabled.into(),
                30 => number as u32,
                _ => panic!("nobody reads {at}"),
            };
        };
        match at {
            0 => self.select[0] = value,
            8 => self.select[1] = value,
            12 => half(&mut self.agreed, self.select[1] == 1, value),
            16 => self.config_vector = vector(value, vectors),
            20 => self.set_status(value as u8),
            22 => self.queue_select = value as u16,
            24 => self.queues[number].size = value as u16,
            26 => self.queues[number].vector = vector(value, vectors),
            28 => self.queues[number].enabled = true,
            32 | 36 => half(&mut self.queues[number].descriptors, at == 36, value),
            40 | 44 => half(&mut self.queues[number].available, at == 44, value),
            48 | 52 => half(&mut self.queues[number].used, at == 52, value),
            _ => panic!("nobody writes {at}"),
        }
        0
    }

    fn set_status(&mut self, status: u8) {
        if status == 0 {
            if !self.never_resets {
                self.resets += 1;
                self.status = 0;
                self.agreed = 0;
                self.config_vector = 0xffff;
                for queue in &mut self.queues {
                    let (most, kicks) = (queue.most, queue.kicks);
                    *queue = DeviceQueue { most, size: most, vector: 0xffff, kicks, ..Default::default() };
                }
            }
            return;
        }
        assert_eq!(self.status & !status & !0x40, 0, "bits are added one by one");
        let refuses = self.refuses_features || self.agreed & !self.features != 0;
        self.status = if refuses { status & !8 } else { status };
        if status & 4 != 0 {
            assert!(self.words[1] & 4 != 0, "it works, and may not reach memory");
        }
    }

    /// Changes its registers, and says so.
    pub fn set_own(&mut self, at: usize, bytes: &[u8]) {
        self.own[at..at + bytes.len()].copy_from_slice(bytes);
        self.generation = self.generation.wrapping_add(1);
    }
}
