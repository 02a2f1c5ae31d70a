//! Handles that are no good, for every call that takes one: a table of what each call answers, and what it must leave alone.
//!
//! A [`Row`] is one argument in guest memory. [`run`] first makes the call with good handles, aligned and not, and has the row
//! look at the effect; then with each kind of bad handle, after which the row's state must be what it was.
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use guest_sdk::abi::Errno;
use guest_sdk::memory::{Access, Page, Range};
use guest_sdk::testkit::{Stop, Verdict, fail};

use crate::NOWHERE;

/// Addresses at which no guest may have an argument, and what they are.
pub const BAD: [(&str, u64); 7] = [
    ("null", 0),
    ("unmapped", NOWHERE),
    ("the first non-canonical address", 1 << 47),
    ("the last non-canonical address", 0xffff_7fff_ffff_fff8),
    ("the start of the hypervisor's range", 0xffff_8000_0000_0000),
    ("inside the hypervisor's range", 0xffff_8300_0000_0000),
    ("the end of the hypervisor's range", 0xffff_87ff_ffff_f000),
];

const PAGE: u64 = 4096;

/// What a call does with an argument on a page that may only be read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum ReadOnly {
    /// Works: the argument is only read.
    Works,
    /// `EFAULT`, and nothing else happened.
    Fails,
    /// `EFAULT`, but what was asked for is done: only the answer is lost.
    Done,
}

/// One argument of one call.
pub struct Row<'a> {
    /// The call.
    pub what: &'a str,
    /// What the argument holds before the call; its length is the argument's size in bytes.
    pub content: Vec<u8>,
    /// Makes the call with the argument at this address.
    pub call: &'a dyn Fn(u64) -> Result<u64, Errno>,
    /// After a call that worked, with its answer and what the argument holds then: whether the effect is there.
    pub seen: &'a dyn Fn(u64, &[u8]) -> bool,
    /// What the call would change.
    pub state: &'a dyn Fn() -> Vec<u64>,
    /// Brings back this state.
    pub undo: &'a dyn Fn(&[u64]),
    /// What comes of an argument on a page that may only be read.
    pub read_only: ReadOnly,
}

/// A page for arguments, with nothing mapped behind it.
struct Room {
    page: Page,
    range: Range,
}

impl Room {
    fn new() -> Result<Room, Stop> {
        Ok(Room { page: Page::new()?, range: Range::new(2)? })
    }

    fn map(&self, access: Access) -> Result<(), Stop> {
        // SAFETY: this module accesses the page by volatile reads and writes only.
        unsafe { self.range.map(0, self.page.mfn(), access)? };
        Ok(())
    }

    /// Puts down as much of the content at this offset as the page has room for; the address of it.
    fn put(&self, offset: u64, content: &[u8]) -> u64 {
        for (at, &byte) in (offset..PAGE).zip(content) {
            // SAFETY: inside the page, which is writable here.
            unsafe { ((self.page.address() + at) as *mut u8).write_volatile(byte) };
        }
        self.range.start() + offset
    }

    fn get(&self, offset: u64, length: usize) -> Vec<u8> {
        let bytes = (offset..PAGE).take(length);
        // SAFETY: inside the page.
        bytes.map(|at| unsafe { ((self.page.address() + at) as *const u8).read_volatile() }).collect()
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // The page returns to the heap only when nothing else leads to it; the range unmaps its own pages after this.
        self.range.unmap(0).expect("an own page can be unmapped");
    }
}

/// Makes the calls of a table.
///
/// # Errors
/// Every answer that is another, every effect that is not there, and every state that changed after an error.
pub fn run(table: &[Row<'_>]) -> Verdict {
    let mut wrong = String::new();
    for row in table {
        row.run(&mut wrong)?;
    }
    if wrong.is_empty() { Ok(()) } else { fail(format_args!("other answers:{wrong}")) }
}

impl Row<'_> {
    fn run(&self, wrong: &mut String) -> Verdict {
        let room = Room::new()?;
        let length = self.content.len();
        room.map(Access::ReadWrite)?;
        // The ABI promises no alignment: any address will do.
        for offset in [0, 1, 4, PAGE - length as u64] {
            self.good(&format!("at offset {offset}"), &room, offset, wrong);
        }

        for (kind, address) in BAD {
            self.bad(kind, address, wrong);
        }
        // One byte short, and one byte there.
        for inside in [length as u64 - 1, 1] {
            if inside > 0 && inside < length as u64 {
                let address = room.put(PAGE - inside, &self.content);
                self.bad(&format!("{inside} of {length} bytes mapped"), address, wrong);
            }
        }

        room.map(Access::Read)?;
        let address = room.put(8, &self.content);
        match self.read_only {
            ReadOnly::Works => self.good("read-only", &room, 8, wrong),
            ReadOnly::Fails => self.bad("read-only", address, wrong),
            ReadOnly::Done => {
                let before = (self.state)();
                let answer = (self.call)(address);
                if answer != Err(Errno::EFAULT) || (self.state)() == before {
                    *wrong += &format!("\n    {} read-only: {answer:x?}, not EFAULT and done", self.what);
                }
                (self.undo)(&before);
            }
        }
        if self.read_only != ReadOnly::Works && room.get(8, length) != self.content {
            *wrong += &format!("\n    {} read-only: the page was written", self.what);
        }
        Ok(())
    }

    fn good(&self, kind: &str, room: &Room, offset: u64, wrong: &mut String) {
        let before = (self.state)();
        let answer = (self.call)(room.put(offset, &self.content));
        let after = room.get(offset, self.content.len());
        if !answer.is_ok_and(|value| (self.seen)(value, &after)) {
            *wrong += &format!("\n    {} {kind}: {answer:x?}, or no effect", self.what);
        }
        (self.undo)(&before);
    }

    fn bad(&self, kind: &str, address: u64, wrong: &mut String) {
        let before = (self.state)();
        let answer = (self.call)(address);
        if answer != Err(Errno::EFAULT) {
            *wrong += &format!("\n    {} {kind}: {answer:x?}, not EFAULT", self.what);
        }
        if (self.state)() != before {
            *wrong += &format!("\n    {} {kind}: something changed", self.what);
            (self.undo)(&before);
        }
    }
}
