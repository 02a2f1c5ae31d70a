//! Handles that are no good, for every call that takes one: a table of what each call answers, and what it must leave alone.
//!
//! A [`Row`] is one argument in guest memory. [`run`] first makes the call with good handles, aligned and not, and has the row
//! look at the effect; then with each kind of bad handle, after which the row's state and all that the domain can ask for
//! ([`state::common`]) must be what it was. A call whose argument is one struct is one line:
//!
//! ```ignore
//! Row::operation("send", EventChannelOp, EvtchnOp::Send.number(), &EvtchnSend { port }).effect(|_, _| take_pending(port))
//! ```
use alloc::boxed::Box;
use alloc::format;
use alloc::vec::Vec;

use guest_sdk::abi::{Errno, Hypercall};
use guest_sdk::memory::{Access, Page, Range};
use guest_sdk::testkit::{Stop, Verdict};
use zerocopy::{Immutable, IntoBytes};

use crate::state::{self, Findings};
use crate::{NOWHERE, call};

/// Why an address is no good.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// It is 0.
    Null,
    /// Nothing is mapped there.
    Unmapped,
    /// No pointer can have it.
    NonCanonical,
    /// It is in the part of the hypervisor.
    Hypervisor,
    /// The last word of the address space, behind which it goes round.
    LastWord,
    /// The argument begins on a page and ends on one that is not mapped.
    Partial,
    /// The page may only be read.
    ReadOnly,
}

/// Addresses at which no guest may have an argument, and what they are.
pub const BAD: [(Kind, &str, u64); 8] = [
    (Kind::Null, "null", 0),
    (Kind::Unmapped, "unmapped", NOWHERE),
    (Kind::NonCanonical, "the first non-canonical address", 1 << 47),
    (Kind::NonCanonical, "the last non-canonical address", 0xffff_7fff_ffff_fff8),
    (Kind::Hypervisor, "the start of the hypervisor's range", 0xffff_8000_0000_0000),
    (Kind::Hypervisor, "inside the hypervisor's range", 0xffff_8300_0000_0000),
    (Kind::Hypervisor, "the end of the hypervisor's range", 0xffff_87ff_ffff_f000),
    (Kind::LastWord, "the last word of the address space", 0xffff_ffff_ffff_fff8),
];

const PAGE: u64 = 4096;

/// What a call answers.
pub type Answer = Result<u64, Errno>;

/// What a good handle brings.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Good {
    /// The call is carried out.
    Works,
    /// The call is refused for what the argument says: it was read.
    Refused(Errno),
    /// Not tried: the domain would not survive it.
    NotTried,
}

/// Whether the effect is there: the answer, and what the argument holds then.
type Seen<'a> = Box<dyn Fn(u64, &[u8]) -> bool + 'a>;
/// Brings back a state.
pub(crate) type Undo<'a> = Box<dyn Fn(&[u64]) + 'a>;

/// One argument of one call.
pub struct Row<'a> {
    what: &'a str,
    content: Box<dyn Fn() -> Vec<u8> + 'a>,
    call: Box<dyn Fn(u64) -> Answer + 'a>,
    good: Good,
    seen: Seen<'a>,
    state: Box<dyn Fn() -> Vec<u64> + 'a>,
    undo: Undo<'a>,
    /// Whether the call only reads it.
    input: bool,
    bad: Answer,
    /// Kinds that get another answer than `bad`, or none.
    except: Vec<(Kind, Option<Answer>)>,
    /// Kinds with which what was asked for is done all the same.
    done: Vec<Kind>,
    alignment: u64,
}

impl<'a> Row<'a> {
    /// An argument that the call only reads. What it holds comes from `content` anew for each call; its length is the
    /// argument's size in bytes. `call` makes the call with the argument at this address.
    pub fn new(
        what: &'a str,
        content: impl Fn() -> Vec<u8> + 'a,
        call: impl Fn(u64) -> Answer + 'a,
    ) -> Row<'a> {
        Row {
            what,
            content: Box::new(content),
            call: Box::new(call),
            good: Good::Works,
            seen: Box::new(|_, _| true),
            state: Box::new(Vec::new),
            undo: Box::new(|_| {}),
            input: true,
            bad: Err(Errno::EFAULT),
            except: Vec::new(),
            done: Vec::new(),
            alignment: 1,
        }
    }

    /// The struct of a call whose first two arguments are a command and a pointer to it.
    pub fn operation<T: IntoBytes + Immutable>(
        what: &'a str,
        which: Hypercall,
        command: u32,
        argument: &T,
    ) -> Row<'a> {
        let content = argument.as_bytes().to_vec();
        // The last is the length of the list, where there is one.
        Row::new(
            what,
            move || content.clone(),
            move |address| call(which, [command.into(), address, 1, 0, 0]),
        )
    }

    /// After a call that worked, with its answer and what the argument holds then: whether the effect is there.
    pub fn effect(self, seen: impl Fn(u64, &[u8]) -> bool + 'a) -> Self {
        Row { seen: Box::new(seen), ..self }
    }

    /// The call only writes it, or writes an answer to it and does nothing else: without a place for it, nothing happens.
    pub fn output(self) -> Self {
        Row { input: false, ..self }
    }

    /// The call writes an answer to it when all is done: only the answer is lost.
    pub fn answer(self) -> Self {
        self.output().done_with(&[Kind::ReadOnly])
    }

    /// With such handles what was asked for is done, whatever the answer.
    pub fn done_with(mut self, kinds: &[Kind]) -> Self {
        self.done.extend(kinds);
        self
    }

    /// What the call would change, beyond [`state::common`].
    pub fn state(self, state: impl Fn() -> Vec<u64> + 'a) -> Self {
        Row { state: Box::new(state), ..self }
    }

    /// Brings back this state.
    pub fn undo<T>(self, undo: impl Fn(&[u64]) -> T + 'a) -> Self {
        let undo = move |state: &[u64]| {
            undo(state);
        };
        Row { undo: Box::new(undo), ..self }
    }

    /// The argument is one that is refused with this error once it is read.
    pub fn refused(self, errno: Errno) -> Self {
        Row { good: Good::Refused(errno), ..self }
    }

    /// An argument that can be read would end the domain, or take from it what the next cases need.
    pub fn never_good(self) -> Self {
        Row { good: Good::NotTried, ..self }
    }

    /// What bad handles get, where it is not `EFAULT`.
    pub fn bad(self, answer: Answer) -> Self {
        Row { bad: answer, ..self }
    }

    /// What such handles get.
    pub fn except(mut self, kind: Kind, answer: Answer) -> Self {
        self.except.push((kind, Some(answer)));
        self
    }

    /// Such handles mean something else to this call.
    pub fn without(mut self, kind: Kind) -> Self {
        self.except.push((kind, None));
        self
    }

    /// Only multiples of this can be said: the other bits mean something else.
    pub fn aligned(self, alignment: u64) -> Self {
        Row { alignment, ..self }
    }
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
    let mut wrong = Findings::default();
    for row in table {
        row.run(&mut wrong)?;
    }
    wrong.verdict()
}

impl Row<'_> {
    fn run(&self, wrong: &mut Findings) -> Verdict {
        let room = Room::new()?;
        let length = (self.content)().len() as u64;
        room.map(Access::ReadWrite)?;
        // The ABI promises no alignment: any address will do.
        for offset in [0, 1, 4, PAGE - length] {
            if offset % self.alignment == 0 {
                self.good(&format!("at offset {offset}"), &room, offset, wrong);
            }
        }

        for (kind, name, address) in BAD {
            self.bad_handle(kind, name, wrong, |_| address);
        }
        // One byte short, and one byte there.
        for inside in [length - 1, 1] {
            if inside > 0 && inside < length {
                let name = format!("{inside} of {length} bytes mapped");
                self.bad_handle(Kind::Partial, &name, wrong, |content| room.put(PAGE - inside, content));
            }
        }

        room.map(Access::Read)?;
        if self.input {
            self.good("read-only", &room, 8, wrong);
        } else {
            self.bad_handle(Kind::ReadOnly, "read-only", wrong, |content| room.put(8, content));
        }
        Ok(())
    }

    fn good(&self, kind: &str, room: &Room, offset: u64, wrong: &mut Findings) {
        if self.good == Good::NotTried {
            return;
        }
        let content = (self.content)();
        let (before, common) = ((self.state)(), state::common());
        let answer = (self.call)(room.put(offset, &content));
        let after = room.get(offset, content.len());
        match self.good {
            Good::Refused(errno) => {
                if answer != Err(errno) {
                    wrong.add(format_args!("{} {kind}: {answer:x?}, not {errno}", self.what));
                }
                if (self.state)() != before || state::common() != common {
                    wrong.add(format_args!("{} {kind}: refused, but something changed", self.what));
                }
            }
            _ if !answer.is_ok_and(|value| (self.seen)(value, &after)) => {
                wrong.add(format_args!("{} {kind}: {answer:x?}, or no effect", self.what));
            }
            _ => {}
        }
        (self.undo)(&before);
        let left = state::common();
        if left != common {
            let at = left.iter().zip(&common).position(|(is, was)| is != was);
            wrong.add(format_args!("{} {kind}: more than the effect is left ({at:?})", self.what));
        }
    }

    fn bad_handle(&self, kind: Kind, name: &str, wrong: &mut Findings, place: impl Fn(&[u8]) -> u64) {
        let expected = match self.except.iter().find(|(of, _)| *of == kind) {
            Some((_, None)) => return,
            Some((_, Some(answer))) => *answer,
            None => self.bad,
        };
        let content = (self.content)();
        let address = place(&content);
        if !address.is_multiple_of(self.alignment) {
            return;
        }
        let (before, common) = ((self.state)(), state::common());
        let answer = (self.call)(address);
        if answer != expected {
            wrong.add(format_args!("{} {name}: {answer:x?}, not {expected:x?}", self.what));
        }
        let changed = (self.state)() != before || state::common() != common;
        match (changed, self.done.contains(&kind)) {
            (true, false) => wrong.add(format_args!("{} {name}: something changed", self.what)),
            (false, true) => wrong.add(format_args!("{} {name}: nothing was done", self.what)),
            _ => {}
        }
        if changed {
            (self.undo)(&before);
        }
    }
}
