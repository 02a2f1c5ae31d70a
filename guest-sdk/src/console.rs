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
use hypercall_abi::subops::{ConsoleIoOp, EvtchnOp};
use hypercall_abi::{Errno, Port, Virq};
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
/// Room for the note that says how much was dropped.
const ROOM_FOR_NOTE: u32 = 128;

/// What a ring's writer needs to know of the world: a reader that can be called, and the time.
trait Reader {
    /// Tells the reader that there is something.
    fn notify(&self);
    /// System time, ns.
    fn now_ns(&self) -> u64;
    /// Sleeps until the reader answers or the time has come; may return early.
    fn wait_until(&self, deadline_ns: u64);
}

/// The reader at the other end of an event channel.
struct Peer(Port);

impl Reader for Peer {
    fn notify(&self) {
        let argument = EvtchnSend { port: self.0 };
        // SAFETY: the command's own argument, alive through the call.
        let _ = unsafe {
            stub::event_channel_op(u64::from(EvtchnOp::Send.number()), (&raw const argument) as u64)
        };
    }

    fn now_ns(&self) -> u64 {
        crate::time::now_ns()
    }

    fn wait_until(&self, deadline_ns: u64) {
        // Nothing to do about a port that cannot be polled: the caller looks at the time.
        let _ = crate::hypercall::poll(&[self.0], deadline_ns);
        // The port's event is noted for who reads input, and the next poll sleeps again.
        events::collect_port(self.0);
    }
}

/// The ring page, as its guest sees it.
struct Ring<M, R> {
    page: M,
    reader: R,
    /// Bytes dropped since there last was room.
    dropped: AtomicU64,
}

static RING: Once<Ring<Shared, Peer>> = Once::new();
/// Keeps lines whole. The panic path writes without it.
static LINE: Mutex<()> = Mutex::new(());

/// Finds the ring; before this, and in the first domain always, text goes to the hypervisor.
pub(crate) fn init() {
    let Some(info) = start::start_info() else { return };
    if start::is_first_domain() {
        return;
    }
    if let Some(address) = memory::own_frame_address(info.console.mfn) {
        // SAFETY: the builder's page, mapped from start to end; it is in no memory that Rust hands out.
        let page = unsafe { Shared::new(address, 4096) };
        RING.call_once(|| Ring { page, reader: Peer(info.console.evtchn), dropped: AtomicU64::new(0) });
    }
}

fn write_to_hypervisor(text: &[u8]) {
    let command = u64::from(ConsoleIoOp::Write.number());
    // SAFETY: the hypervisor reads `len` bytes of a live slice. Refused to an unprivileged domain: nobody to tell.
    let _ = unsafe { stub::console_io(command, text.len() as u64, text.as_ptr() as u64) };
}

impl<M: SharedPage, R: Reader> Ring<M, R> {
    fn room(&self) -> u32 {
        let produced = self.page.word(OUT_PROD).load(Ordering::Relaxed);
        // A reader that writes nonsense gets no more text; it harms nobody else.
        OUT_SIZE.saturating_sub(produced.wrapping_sub(self.page.word(OUT_CONS).load(Ordering::Acquire)))
    }

    /// Waits for room; false when the reader takes too long, or has done so and not read since.
    fn wait_for_room(&self) -> bool {
        let deadline = self.reader.now_ns().saturating_add(PATIENCE_NS);
        while self.dropped.load(Ordering::Relaxed) == 0 {
            self.reader.notify();
            if self.room() != 0 {
                return true;
            }
            if self.reader.now_ns() >= deadline {
                return false;
            }
            self.reader.wait_until(deadline);
        }
        false
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
        if self.room() >= ROOM_FOR_NOTE {
            let dropped = self.dropped.swap(0, Ordering::Relaxed);
            if dropped != 0 {
                let _ = write!(Plain(self), "\n[{dropped} bytes were dropped: nobody was reading]\n");
            }
        }
        self.write_bytes(text);
        fence(Ordering::SeqCst);
        self.reader.notify();
    }

    fn write_bytes(&self, text: &[u8]) {
        for (at, &byte) in text.iter().enumerate() {
            if (byte == b'\n' && !self.put(b'\r')) || !self.put(byte) {
                self.dropped.fetch_add((text.len() - at) as u64, Ordering::Relaxed);
                return;
            }
        }
    }

    /// Takes input, as much as fits.
    fn read(&self, to: &mut [u8]) -> usize {
        let consumed = self.page.word(IN_CONS).load(Ordering::Relaxed);
        let ready = self.page.word(IN_PROD).load(Ordering::Acquire).wrapping_sub(consumed);
        // More than the ring holds is nonsense: what is there is taken as it is.
        let count = to.len().min(ready.min(IN_SIZE) as usize);
        for (index, byte) in to.iter_mut().take(count).enumerate() {
            let at = consumed.wrapping_add(index as u32) & (IN_SIZE - 1);
            self.page.read_bytes(IN + at as usize, core::slice::from_mut(byte));
        }
        if count != 0 {
            self.page.word(IN_CONS).store(consumed.wrapping_add(count as u32), Ordering::Release);
            self.reader.notify();
        }
        count
    }
}

struct Plain<'a, M, R>(&'a Ring<M, R>);

impl<M: SharedPage, R: Reader> Write for Plain<'_, M, R> {
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
        ring.reader.notify();
        crate::hypercall::yield_now();
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

/// Nobody is in the middle of a line.
pub(crate) fn is_intact() -> bool {
    !LINE.is_locked()
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
            Some(ring) => ring.read(to),
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
                Some(ring) => Channel::adopt(ring.reader.0)?,
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

#[cfg(test)]
mod tests {
    use super::{IN_CONS, IN_PROD, OUT, OUT_CONS, OUT_PROD, OUT_SIZE, PATIENCE_NS, Reader, Ring};
    use crate::ring::SharedPage;
    use crate::ring::host::HostPages;
    use alloc::string::String;
    use core::cell::{Cell, RefCell};
    use core::sync::atomic::{AtomicU64, Ordering};

    /// A reader that takes everything when it is called, unless it sleeps.
    struct Host<'a> {
        page: &'a HostPages,
        asleep: Cell<bool>,
        clock: Cell<u64>,
        text: RefCell<String>,
    }

    impl Reader for &Host<'_> {
        fn notify(&self) {
            if self.asleep.get() {
                return;
            }
            let end = self.page.word(OUT_PROD).load(Ordering::Acquire);
            let mut at = self.page.word(OUT_CONS).load(Ordering::Relaxed);
            while at != end {
                let mut byte = [0];
                self.page.read_bytes(OUT + (at % OUT_SIZE) as usize, &mut byte);
                self.text.borrow_mut().push(char::from(byte[0]));
                at = at.wrapping_add(1);
            }
            self.page.word(OUT_CONS).store(at, Ordering::Release);
        }
        fn now_ns(&self) -> u64 {
            self.clock.get()
        }
        fn wait_until(&self, deadline_ns: u64) {
            self.clock.set(deadline_ns);
        }
    }

    fn with_ring(start: u32, test: impl FnOnce(&Ring<&HostPages, &Host<'_>>, &Host<'_>)) {
        let page = HostPages::new(1, 0xa5a5_a5a5);
        for index in [IN_CONS, IN_PROD, OUT_CONS, OUT_PROD] {
            page.word(index).store(start, Ordering::Relaxed);
        }
        let host = Host {
            page: &page,
            asleep: Cell::new(false),
            clock: Cell::new(0),
            text: RefCell::new(String::new()),
        };
        test(&Ring { page: &page, reader: &host, dropped: AtomicU64::new(0) }, &host);
    }

    #[test]
    fn text_arrives_whole_across_the_wrap() {
        with_ring(u32::MAX - 1000, |ring, host| {
            let line = "a line of text, and another one of the same\n".repeat(200);
            ring.write(line.as_bytes());
            assert_eq!(*host.text.borrow(), line.replace('\n', "\r\n"));
            assert_eq!(host.clock.get(), 0, "it waited for a reader that was there");
        });
    }

    #[test]
    fn a_sleeping_reader_costs_one_wait_and_hears_of_the_loss() {
        with_ring(0, |ring, host| {
            host.asleep.set(true);
            ring.write(&[b'x'; 3000]);
            assert_eq!(host.clock.get(), PATIENCE_NS);
            ring.write(&[b'y'; 500]);
            assert_eq!(host.clock.get(), PATIENCE_NS, "it waited again");
            host.asleep.set(false);
            (&host).notify();
            assert_eq!(host.text.borrow().len(), OUT_SIZE as usize);
            host.text.borrow_mut().clear();
            ring.write(b"back\n");
            let lost = 3000 - OUT_SIZE + 500;
            assert_eq!(
                *host.text.borrow(),
                alloc::format!("\r\n[{lost} bytes were dropped: nobody was reading]\r\nback\r\n")
            );
        });
    }

    #[test]
    fn a_reader_that_writes_nonsense_gets_nothing() {
        with_ring(0, |ring, host| {
            host.asleep.set(true);
            host.page.word(OUT_CONS).store(77, Ordering::Relaxed);
            assert_eq!(ring.room(), 0);
            ring.write(b"lost");
            assert_eq!(ring.dropped.load(Ordering::Relaxed), 4);
        });
    }

    #[test]
    fn input_is_taken_in_order_and_as_much_as_fits() {
        with_ring(u32::MAX - 2, |ring, host| {
            for byte in *b"typed" {
                let produced = host.page.word(IN_PROD).load(Ordering::Relaxed);
                host.page.write_bytes((produced % 1024) as usize, &[byte]);
                host.page.word(IN_PROD).store(produced.wrapping_add(1), Ordering::Release);
            }
            let mut some = [0; 3];
            assert_eq!((ring.read(&mut some), &some), (3, b"typ"));
            assert_eq!((ring.read(&mut some), &some[..2]), (2, &b"ed"[..]));
            assert_eq!(ring.read(&mut some), 0);
        });
    }
}
