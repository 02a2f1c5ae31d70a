//! The console: [`print!`](crate::print), [`println!`](crate::println), and input.
//!
//! The first domain writes to the hypervisor's console; all others have a ring page that the control domain reads. When
//! nobody reads for a second, text is dropped rather than the guest stopped, and the next reader is told how much.

use crate::events::{self, Channel};
use crate::hypercall::stub;
use crate::memory::{self, Shared};
use crate::ring::SharedPage;
use crate::rt::start;
use core::fmt::{self, Write};
use core::sync::atomic::{AtomicU64, Ordering, fence};
use hypercall_abi::evtchn::EvtchnSend;
use hypercall_abi::sched::SchedPoll;
use hypercall_abi::subops::{ConsoleIoOp, EvtchnOp, SchedOp};
use hypercall_abi::{Errno, GuestHandle, Port, Virq};
use spin::{Mutex, Once};

// Offsets in the ring page (public io/console.h).
const IN: usize = 0;
const IN_SIZE: u32 = 1024;
const OUT: usize = 1024;
const OUT_SIZE: u32 = 2048;
const IN_CONS: usize = 3072;
const IN_PROD: usize = 3076;
const OUT_CONS: usize = 3080;
const OUT_PROD: usize = 3084;

/// A full ring is given this long before text is dropped.
const PATIENCE_NS: u64 = 1_000_000_000;

struct Ring {
    page: Shared,
    port: Port,
}

static RING: Once<Ring> = Once::new();
/// Keeps lines whole. The panic path writes without it.
static LINE: Mutex<()> = Mutex::new(());
/// Bytes dropped since somebody last read.
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Finds the ring; before this, and in the first domain always, text goes to the hypervisor.
pub(crate) fn init() {
    let Some(info) = start::start_info() else { return };
    if start::is_first_domain() {
        return;
    }
    if let Some(address) = memory::own_frame_address(info.console.mfn) {
        // SAFETY: the builder's page, mapped from start to end; it is in no memory that Rust hands out.
        let page = unsafe { Shared::new(address, 4096) };
        RING.call_once(|| Ring { page, port: info.console.evtchn });
    }
}

fn write_to_hypervisor(text: &[u8]) {
    let command = u64::from(ConsoleIoOp::Write.number());
    // SAFETY: the hypervisor reads `len` bytes of a live slice. Refused to an unprivileged domain: nobody to tell.
    let _ = unsafe { stub::console_io(command, text.len() as u64, text.as_ptr() as u64) };
}

impl Ring {
    fn notify(&self) {
        let argument = EvtchnSend { port: self.port };
        // SAFETY: the command's own argument, alive through the call.
        let _ = unsafe {
            stub::event_channel_op(u64::from(EvtchnOp::Send.number()), (&raw const argument) as u64)
        };
    }

    fn room(&self) -> u32 {
        let used = self
            .page
            .word(OUT_PROD)
            .load(Ordering::Relaxed)
            .wrapping_sub(self.page.word(OUT_CONS).load(Ordering::Acquire));
        // A reader that writes nonsense gets no more text; it harms nobody else.
        OUT_SIZE.saturating_sub(used)
    }

    /// Waits for room; false when the reader takes too long.
    fn wait_for_room(&self) -> bool {
        let deadline = crate::time::now_ns().saturating_add(PATIENCE_NS);
        loop {
            self.notify();
            // The port's earlier events are noted for who reads input; what comes from here on ends the poll.
            events::collect_port(self.port);
            if self.room() != 0 {
                return true;
            }
            if DROPPED.load(Ordering::Relaxed) != 0 || crate::time::now_ns() >= deadline {
                return false;
            }
            let port = self.port;
            let argument = SchedPoll {
                ports: GuestHandle::new((&raw const port) as u64),
                nr_ports: 1,
                pad0: 0,
                timeout: deadline,
            };
            // SAFETY: the command's own argument and one port, alive through the call.
            let _ =
                unsafe { stub::sched_op(u64::from(SchedOp::Poll.number()), (&raw const argument) as u64) };
        }
    }

    fn put(&self, byte: u8) -> bool {
        if self.room() == 0 && !self.wait_for_room() {
            return false;
        }
        let at = self.page.word(OUT_PROD).load(Ordering::Relaxed);
        self.page.write_bytes(OUT + (at & (OUT_SIZE - 1)) as usize, &[byte]);
        self.page.word(OUT_PROD).store(at.wrapping_add(1), Ordering::Release);
        true
    }

    fn write(&self, text: &[u8]) {
        if DROPPED.load(Ordering::Relaxed) != 0 && self.room() > 64 {
            let dropped = DROPPED.swap(0, Ordering::Relaxed);
            let _ = write!(Plain(self), "\n[{dropped} bytes of output were dropped: nobody was reading]\n");
        }
        self.write_bytes(text);
        fence(Ordering::SeqCst);
        self.notify();
    }

    fn write_bytes(&self, text: &[u8]) {
        for (at, &byte) in text.iter().enumerate() {
            if (byte == b'\n' && !self.put(b'\r')) || !self.put(byte) {
                DROPPED.fetch_add((text.len() - at) as u64, Ordering::Relaxed);
                return;
            }
        }
    }
}

struct Plain<'a>(&'a Ring);

impl Write for Plain<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.write_bytes(text.as_bytes());
        Ok(())
    }
}

fn write(text: &[u8]) {
    match RING.get() {
        Some(ring) => ring.write(text),
        None => write_to_hypervisor(text),
    }
}

/// Writes without waiting for a lock: for last words.
pub(crate) struct Emergency;

impl Write for Emergency {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        write(text.as_bytes());
        Ok(())
    }
}

/// Gives the reader a last moment to take what is in the ring.
pub(crate) fn flush() {
    let Some(ring) = RING.get() else { return };
    let deadline = crate::time::now_ns().saturating_add(PATIENCE_NS / 4);
    while ring.room() < OUT_SIZE && crate::time::now_ns() < deadline {
        ring.notify();
        // SAFETY: no pointer.
        let _ = unsafe { stub::sched_op(u64::from(SchedOp::Yield.number()), 0) };
    }
}

/// One line's worth of text, collected so that it goes out in one piece.
struct Buffered {
    bytes: [u8; 256],
    used: usize,
}

impl Buffered {
    fn flush(&mut self) {
        if self.used != 0 {
            write(self.bytes.get(..self.used).unwrap_or(&[]));
            self.used = 0;
        }
    }
}

impl Write for Buffered {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for &byte in text.as_bytes() {
            if self.used == self.bytes.len() {
                self.flush();
            }
            if let Some(slot) = self.bytes.get_mut(self.used) {
                *slot = byte;
                self.used += 1;
            }
        }
        Ok(())
    }
}

/// Prints to the console; [`print!`](crate::print) and [`println!`](crate::println) come here.
#[doc(hidden)]
pub fn print(text: fmt::Arguments<'_>) {
    let _line = LINE.lock();
    let mut out = Buffered { bytes: [0; 256], used: 0 };
    let _ = out.write_fmt(text);
    out.flush();
}

/// Prints to the console.
#[macro_export]
macro_rules! print {
    ($($part:tt)*) => { $crate::console::print(::core::format_args!($($part)*)) };
}

/// Prints a line to the console.
#[macro_export]
macro_rules! println {
    () => { $crate::console::print(::core::format_args!("\n")) };
    ($($part:tt)*) => { $crate::console::print(::core::format_args!("{}\n", ::core::format_args!($($part)*))) };
}

/// The domain's console: text out by [`fmt::Write`], bytes in.
#[derive(Debug)]
pub struct Console {
    input: Option<Channel>,
}

impl Console {
    pub(crate) fn new() -> Self {
        Console { input: None }
    }

    /// Takes what has been typed, as much as fits; 0 when there is nothing.
    pub fn read(&mut self, to: &mut [u8]) -> usize {
        match RING.get() {
            Some(ring) => {
                let consumed = ring.page.word(IN_CONS).load(Ordering::Relaxed);
                let ready =
                    ring.page.word(IN_PROD).load(Ordering::Acquire).wrapping_sub(consumed).min(IN_SIZE);
                let count = to.len().min(ready as usize);
                for (at, byte) in to.iter_mut().take(count).enumerate() {
                    let index = consumed.wrapping_add(at as u32) & (IN_SIZE - 1);
                    ring.page.read_bytes(IN + index as usize, core::slice::from_mut(byte));
                }
                if count != 0 {
                    ring.page.word(IN_CONS).store(consumed.wrapping_add(count as u32), Ordering::Release);
                    ring.notify();
                }
                count
            }
            None => {
                let command = u64::from(ConsoleIoOp::Read.number());
                // SAFETY: the hypervisor writes at most `len` bytes into a live buffer.
                let read = unsafe { stub::console_io(command, to.len() as u64, to.as_mut_ptr() as u64) };
                read.map_or(0, |count| (count as usize).min(to.len()))
            }
        }
    }

    fn channel(&mut self) -> Result<&mut Channel, Errno> {
        if self.input.is_none() {
            let channel = match RING.get() {
                Some(ring) => Channel::adopt(ring.port)?,
                None => crate::events::Events::new().bind_virq(Virq::CONSOLE)?,
            };
            self.input = Some(channel);
        }
        self.input.as_mut().ok_or(Errno::ENODEV)
    }

    /// Sleeps until something has been typed, and takes it.
    ///
    /// # Errors
    /// When the console cannot tell that there is input.
    pub fn read_blocking(&mut self, to: &mut [u8]) -> Result<usize, Errno> {
        loop {
            let channel = self.channel()?;
            channel.poll();
            match self.read(to) {
                0 => self.channel()?.wait(),
                count => return Ok(count),
            }
        }
    }

    /// Waits, as a task, until something has been typed, and takes it.
    ///
    /// # Errors
    /// When the console cannot tell that there is input.
    pub async fn read_async(&mut self, to: &mut [u8]) -> Result<usize, Errno> {
        loop {
            self.channel()?;
            match self.read(to) {
                0 => self.channel()?.fired().await,
                count => return Ok(count),
            }
        }
    }
}

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let _line = LINE.lock();
        write(text.as_bytes());
        Ok(())
    }
}
