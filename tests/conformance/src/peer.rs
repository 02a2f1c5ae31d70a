//! Other domains that do what a case asks: for behaviour that takes two.
//!
//! A *leader* is any conformance image started with `peers=N`: the N domains whose numbers come right before its own are
//! peers, instances of the image `conf-peer`, each told by `leader=+K` that the leader's number is its own plus K. So whoever starts
//! them starts the peers first, one after another, and then the leader.
//!
//! The two talk through one page that the peer grants to its leader, always with the first reference that is not reserved
//! ([`BOOTSTRAP`]). The leader writes a request, the peer looks for one every few microseconds, carries it out and writes the
//! answer. No xenstore, no event channel and, once the page is mapped, no hypercall of the leader is part of this: what the
//! cases examine is not what carries them. A peer does any hypercall ([`Peer::call`]), reads and writes its own memory, and
//! gives out pages; everything else is made from that here.
//!
//! ```ignore
//! #[entry]
//! fn main(domain: Domain) {
//!     peer::connect(&domain);
//!     testkit::run(domain, &cases![a_signal_arrives])
//! }
//!
//! fn a_signal_arrives(domain: &mut Domain) -> Verdict {
//!     let peer = peer::any()?;
//!     let mut port = EvtchnAllocUnbound { dom: DomId::SELF, remote_dom: domain.id(), port: Port::new(0) };
//!     check_eq!(peer.with(Hypercall::EventChannelOp, [EvtchnOp::AllocUnbound.number().into(), BUFFER, 0, 0, 0], &mut port)?, Ok(0));
//!     ...
//! }
//! ```

use alloc::boxed::Box;
use alloc::format;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use core::time::Duration;

use guest_sdk::abi::sched::{SchedPoll, ShutdownReason};
use guest_sdk::abi::subops::SchedOp;
use guest_sdk::abi::{DomId, Errno, GrantRef, Hypercall, PAGE_SIZE, Port};
use guest_sdk::grants::{Grant, Mapping};
use guest_sdk::memory::{Access, Page, Range};
use guest_sdk::testkit::{Stop, skip, try_read, try_write};
use guest_sdk::{Domain, println, shutdown, time};
use spin::Mutex;

use crate::{raw, sched, take_pending};

/// The grant through which a leader reaches its peer: the first that is not reserved.
pub const BOOTSTRAP: GrantRef = GrantRef::new(guest_sdk::abi::grant::GNTTAB_NR_RESERVED_ENTRIES);

/// In the arguments of [`Peer::call`] and [`Peer::with`]: the peer's address of the buffer.
pub const BUFFER: u64 = 0xb0ff_b0ff_b0ff_b0ff;

/// Bytes that a call's arguments in memory may have.
pub const BUFFER_BYTES: usize = 2048;

/// What a peer writes when its mailbox is in use.
const HELLO: u64 = u64::from_le_bytes(*b"peer\0\0\0\x01");

/// How long a leader waits for peers to start, and for an answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a peer lives without a request.
const IDLE: Duration = Duration::from_secs(60);
/// Between two looks at the mailbox.
const LOOK_NS: u64 = 20_000;

/// The page between a leader and a peer. Words are copied in and out, never borrowed: each end may write at any time.
#[repr(C)]
struct Mailbox {
    /// [`HELLO`], once the peer is there.
    hello: AtomicU64,
    /// Requests made; the leader writes it last.
    asked: AtomicU64,
    /// Requests answered; the peer writes it last.
    answered: AtomicU64,
    /// What to do: a [`Verb`].
    verb: AtomicU64,
    /// The request's arguments, then the answer's.
    words: [AtomicU64; 8],
    unused: [AtomicU64; 244],
    /// What a hypercall's arguments point at.
    buffer: [AtomicU8; BUFFER_BYTES],
}

const _: () = assert!(size_of::<Mailbox>() == PAGE_SIZE);

/// What a peer can be asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
enum Verb {
    /// Number and five arguments of a hypercall; rax.
    Call = 1,
    /// An address; its word, 0 and 1 if it could not be read.
    Read,
    /// An address and a word; 1 if it could not be written.
    Write,
    /// A zeroed page; its address and machine frame.
    Page,
    /// The address of a page, for good.
    Free,
    /// How many pages of addresses; the first, nothing mapped there.
    Range,
    /// A port; whether it was pending, and is not any more.
    TakePending,
    /// Domain, and 1 for read-only: a page granted; reference, address, frame.
    Grant,
    /// A reference; 1 if the grant ended, 0 while it is in use.
    EndGrant,
    /// The addresses of the buffer and of shared_info.
    Places,
    /// Reason of its shutdown; it answers before.
    End,
}

impl Verb {
    const ALL: [Verb; 11] = [
        Verb::Call,
        Verb::Read,
        Verb::Write,
        Verb::Page,
        Verb::Free,
        Verb::Range,
        Verb::TakePending,
        Verb::Grant,
        Verb::EndGrant,
        Verb::Places,
        Verb::End,
    ];
}

/// System time at which patience is over.
fn deadline() -> u64 {
    time::now_ns() + PATIENCE.as_nanos() as u64
}

/// Sleeps for a few microseconds without a port. On a hypervisor that does not do its work this returns at once.
fn pause() {
    let mut poll = SchedPoll { nr_ports: 0, timeout: time::now_ns() + LOOK_NS, ..SchedPoll::default() };
    let _ = sched(SchedOp::Poll, &mut poll);
}

// ---- The peer's side.

/// The main function of `conf-peer`: does what its leader asks, until it is told to end or nobody asks for a minute.
pub fn serve(domain: &Domain) -> ! {
    let Some(distance) = domain.command_line.number::<u16>("leader") else {
        println!("peer: give leader=+K, the distance to the leader's number");
        shutdown::crash()
    };
    let own = domain.id();
    let leader = DomId::new(own.get() + distance);
    let page = match domain.grants.grant_new(leader, Access::ReadWrite) {
        Ok(grant) => grant,
        Err(error) => {
            println!("peer: no page for domain {leader}: {error}");
            shutdown::crash()
        }
    };
    if page.reference() != BOOTSTRAP {
        println!("peer: the first grant is {}, not {BOOTSTRAP}", page.reference());
        shutdown::crash()
    }
    // SAFETY: the grant's page, never given back, since this function does not return. All fields are atomic.
    let mailbox = unsafe { &*(grant_address(&page) as *const Mailbox) };
    let mut servant = Servant { domain, mailbox, pages: Vec::new(), ranges: Vec::new(), grants: Vec::new() };
    mailbox.hello.store(HELLO, Ordering::Release);
    let mut done = 0;
    let mut deadline = time::now_ns() + IDLE.as_nanos() as u64;
    loop {
        if mailbox.asked.load(Ordering::Acquire) == done {
            if time::now_ns() > deadline {
                shutdown::poweroff()
            }
            pause();
            continue;
        }
        done += 1;
        deadline = time::now_ns() + IDLE.as_nanos() as u64;
        let words: [u64; 8] = core::array::from_fn(|index| mailbox.words[index].load(Ordering::Relaxed));
        let verb = mailbox.verb.load(Ordering::Relaxed);
        let verb = Verb::ALL.into_iter().find(|known| *known as u64 == verb);
        let answer = verb.map_or([u64::MAX; 4], |verb| servant.obey(verb, words));
        for (word, value) in mailbox.words.iter().zip(answer) {
            word.store(value, Ordering::Relaxed);
        }
        mailbox.answered.store(done, Ordering::Release);
        if verb == Some(Verb::End) {
            match words[0] {
                reason if reason == ShutdownReason::Crash as u64 => shutdown::crash(),
                reason if reason == ShutdownReason::Reboot as u64 => shutdown::reboot(),
                _ => shutdown::poweroff(),
            }
        }
    }
}

fn grant_address(grant: &Grant) -> u64 {
    use guest_sdk::ring::SharedPage;
    core::ptr::from_ref(grant.word(0)) as u64
}

struct Servant<'a> {
    domain: &'a Domain,
    mailbox: &'static Mailbox,
    pages: Vec<Page>,
    ranges: Vec<Range>,
    grants: Vec<Grant>,
}

impl Servant<'_> {
    fn buffer(&self) -> u64 {
        self.mailbox.buffer.as_ptr() as u64
    }

    fn obey(&mut self, verb: Verb, words: [u64; 8]) -> [u64; 4] {
        let [first, second, ..] = words;
        match verb {
            Verb::Call => {
                let argument = |word: u64| if word == BUFFER { self.buffer() } else { word };
                let [_, a, b, c, d, e, ..] = words.map(argument);
                [raw(first, [a, b, c, d, e]).unwrap_or_else(Errno::to_ret), 0, 0, 0]
            }
            Verb::Read => try_read(first).map_or([0, 1, 0, 0], |word| [word, 0, 0, 0]),
            // SAFETY: the leader's case answers for what it lets its peer write, as for its own raw calls.
            Verb::Write => [u64::from(unsafe { try_write(first, second) }.is_err()), 0, 0, 0],
            Verb::Page => match Page::new() {
                Ok(page) => {
                    let answer = [page.address(), page.mfn().get(), 0, 0];
                    self.pages.push(page);
                    answer
                }
                Err(_) => [0; 4],
            },
            Verb::Free => {
                self.pages.retain(|page| page.address() != first);
                [0; 4]
            }
            Verb::Range => match Range::new(first) {
                Ok(range) => {
                    let start = range.start();
                    self.ranges.push(range);
                    [start, 0, 0, 0]
                }
                Err(_) => [0; 4],
            },
            Verb::TakePending => [u64::from(take_pending(Port::new(first as u32))), 0, 0, 0],
            Verb::Grant => {
                let access = if second & 1 != 0 { Access::Read } else { Access::ReadWrite };
                let Ok(page) = Page::new() else { return [0; 4] };
                let frame = page.mfn().get();
                match self.domain.grants.grant(page, DomId::new(first as u16), access) {
                    Ok(grant) => {
                        let answer = [grant.reference().get().into(), grant_address(&grant), frame, 0];
                        self.grants.push(grant);
                        answer
                    }
                    Err(_) => [0; 4],
                }
            }
            Verb::EndGrant => {
                let found = self.grants.iter().position(|grant| u64::from(grant.reference().get()) == first);
                let Some(index) = found else { return [0; 4] };
                match self.grants.swap_remove(index).end() {
                    Ok(page) => {
                        self.pages.push(page);
                        [1, 0, 0, 0]
                    }
                    Err(grant) => {
                        self.grants.push(grant);
                        [0; 4]
                    }
                }
            }
            Verb::Places => [self.buffer(), crate::shared() as u64, 0, 0],
            Verb::End => [0; 4],
        }
    }
}

// ---- The leader's side.

/// A domain that does what it is asked.
pub struct Peer {
    domain: DomId,
    mailbox: Mutex<Mapping>,
}

/// A page of a peer's own memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerPage {
    /// Where the peer reads and writes it.
    pub address: u64,
    /// Its machine frame.
    pub frame: u64,
}

/// A page that a peer has granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerGrant {
    /// The grant.
    pub reference: GrantRef,
    /// The page.
    pub page: PeerPage,
}

struct Peers {
    /// Whether the command line named any.
    wanted: bool,
    /// Lives as long as the leader.
    lasting: Option<&'static Peer>,
    /// For cases that end one.
    mortal: Vec<Peer>,
}

static PEERS: Mutex<Peers> = Mutex::new(Peers { wanted: false, lasting: None, mortal: Vec::new() });

/// Finds the peers that the command line promises (`peers=N`). An image with cases for peers calls it before its first case.
///
/// A peer that does not answer is reported; cases that need it end with an error then.
pub fn connect(domain: &Domain) {
    let count: u16 = domain.command_line.number("peers").unwrap_or(0);
    let own = domain.id().get();
    let mut peers = PEERS.lock();
    peers.wanted = count > 0;
    for number in own.saturating_sub(count)..own {
        match Peer::find(domain, DomId::new(number)) {
            Ok(peer) if peers.lasting.is_none() => peers.lasting = Some(Box::leak(Box::new(peer))),
            Ok(peer) => peers.mortal.push(peer),
            Err(why) => println!("domain {number} is no peer: {why:?}"),
        }
    }
}

fn none<T>(wanted: bool) -> Result<T, Stop> {
    if wanted {
        return Err(Stop::Error("the peer that the command line promises is not there, or no more".into()));
    }
    skip("needs a second domain: only as unprivileged domain")
}

/// The peer that all cases share. A case leaves it as it was found.
///
/// # Errors
/// A skip where there are no peers.
pub fn any() -> Result<&'static Peer, Stop> {
    let peers = PEERS.lock();
    peers.lasting.map_or_else(|| none(peers.wanted), Ok)
}

/// A peer of the case's own, which it may end.
///
/// # Errors
/// A skip where there are no peers; an error when all are used up: `peers` in this package's Cargo.toml says how many.
pub fn mortal() -> Result<Peer, Stop> {
    let mut peers = PEERS.lock();
    let wanted = peers.wanted;
    peers.mortal.pop().map_or_else(|| none(wanted), Ok)
}

impl Peer {
    fn find(domain: &Domain, number: DomId) -> Result<Peer, Stop> {
        let deadline = deadline();
        loop {
            let mapped = domain.grants.map(number, &[BOOTSTRAP], Access::ReadWrite);
            if let Ok(mapping) = mapped {
                let peer = Peer { domain: number, mailbox: Mutex::new(mapping) };
                while time::now_ns() < deadline {
                    if peer.on_mailbox(|mailbox| mailbox.hello.load(Ordering::Acquire)) == HELLO {
                        return Ok(peer);
                    }
                    pause();
                }
            }
            if time::now_ns() >= deadline {
                return Err(Stop::Error(format!("domain {number} grants no mailbox")));
            }
            pause();
        }
    }

    /// Its number.
    #[must_use]
    pub fn domain(&self) -> DomId {
        self.domain
    }

    fn on_mailbox<T>(&self, work: impl FnOnce(&Mailbox) -> T) -> T {
        let mapping = self.mailbox.lock();
        // SAFETY: mapped writable and whole while the lock is held; all fields are atomic.
        work(unsafe { &*(mapping.address() as *const Mailbox) })
    }

    fn ask(&self, verb: Verb, words: &[u64], buffer: Option<&mut [u8]>) -> Result<[u64; 4], Stop> {
        self.on_mailbox(|mailbox| {
            let room = |bytes: &[u8]| bytes.len() <= BUFFER_BYTES;
            assert!(
                words.len() <= 8 && buffer.as_deref().is_none_or(room),
                "a request that fits the mailbox"
            );
            for (place, word) in mailbox.words.iter().zip(words) {
                place.store(*word, Ordering::Relaxed);
            }
            for (place, byte) in mailbox.buffer.iter().zip(buffer.as_deref().unwrap_or_default()) {
                place.store(*byte, Ordering::Relaxed);
            }
            mailbox.verb.store(verb as u64, Ordering::Relaxed);
            let number = mailbox.asked.load(Ordering::Relaxed) + 1;
            mailbox.asked.store(number, Ordering::Release);
            let deadline = deadline();
            while mailbox.answered.load(Ordering::Acquire) != number {
                if time::now_ns() > deadline {
                    return Err(Stop::Error(format!("domain {} does not answer", self.domain)));
                }
                pause();
            }
            for (place, byte) in mailbox.buffer.iter().zip(buffer.unwrap_or_default()) {
                *byte = place.load(Ordering::Relaxed);
            }
            Ok(core::array::from_fn(|index| mailbox.words[index].load(Ordering::Relaxed)))
        })
    }

    /// Lets it issue a hypercall. An argument [`BUFFER`] becomes its address of the buffer, which holds `buffer` before and is
    /// copied back after.
    ///
    /// # Errors
    /// Outside, that it does not answer; inside, what the hypervisor told it.
    pub fn call(
        &self,
        call: Hypercall,
        arguments: [u64; 5],
        buffer: &mut [u8],
    ) -> Result<Result<u64, Errno>, Stop> {
        let [a, b, c, d, e] = arguments;
        let [rax, ..] = self.ask(Verb::Call, &[call.number(), a, b, c, d, e], Some(buffer))?;
        Ok(Errno::check(rax))
    }

    /// The same with a struct of the public interface.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn with<T: zerocopy::FromBytes + zerocopy::IntoBytes>(
        &self,
        call: Hypercall,
        arguments: [u64; 5],
        argument: &mut T,
    ) -> Result<Result<u64, Errno>, Stop> {
        self.call(call, arguments, argument.as_mut_bytes())
    }

    /// Lets it issue a hypercall with a command and one struct.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn operation<T: zerocopy::FromBytes + zerocopy::IntoBytes>(
        &self,
        call: Hypercall,
        command: u32,
        argument: &mut T,
    ) -> Result<Result<u64, Errno>, Stop> {
        self.with(call, [command.into(), BUFFER, 1, 0, 0], argument)
    }

    /// A word of its memory.
    ///
    /// # Errors
    /// It does not answer, or the word cannot be read there.
    pub fn read(&self, address: u64) -> Result<u64, Stop> {
        match self.ask(Verb::Read, &[address], None)? {
            [word, 0, ..] => Ok(word),
            _ => Err(Stop::Fail(format!("domain {} cannot read at {address:#x}", self.domain))),
        }
    }

    /// Writes a word of its memory; false when that faults there.
    ///
    /// # Errors
    /// It does not answer.
    pub fn write(&self, address: u64, word: u64) -> Result<bool, Stop> {
        Ok(self.ask(Verb::Write, &[address, word], None)?[0] == 0)
    }

    /// A zeroed page of its own.
    ///
    /// # Errors
    /// It does not answer, or has no memory.
    pub fn page(&self) -> Result<PeerPage, Stop> {
        match self.ask(Verb::Page, &[], None)? {
            [0, ..] => Err(Stop::Error(format!("domain {} has no memory", self.domain))),
            [address, frame, ..] => Ok(PeerPage { address, frame }),
        }
    }

    /// Takes a page back to its heap.
    ///
    /// # Errors
    /// It does not answer.
    pub fn free(&self, page: PeerPage) -> Result<(), Stop> {
        self.ask(Verb::Free, &[page.address], None).map(drop)
    }

    /// Addresses of its own with page tables behind them and nothing mapped.
    ///
    /// # Errors
    /// It does not answer, or has no memory.
    pub fn range(&self, pages: u64) -> Result<u64, Stop> {
        match self.ask(Verb::Range, &[pages], None)? {
            [0, ..] => Err(Stop::Error(format!("domain {} has no addresses", self.domain))),
            [start, ..] => Ok(start),
        }
    }

    /// Whether a port of its own was pending; it is not after this.
    ///
    /// # Errors
    /// It does not answer.
    pub fn take_pending(&self, port: Port) -> Result<bool, Stop> {
        Ok(self.ask(Verb::TakePending, &[port.get().into()], None)?[0] != 0)
    }

    /// Lets it grant a zeroed page of its own to a domain.
    ///
    /// # Errors
    /// It does not answer, or cannot.
    pub fn grant(&self, to: DomId, readonly: bool) -> Result<PeerGrant, Stop> {
        match self.ask(Verb::Grant, &[to.get().into(), readonly.into()], None)? {
            [0, ..] => Err(Stop::Error(format!("domain {} cannot grant a page", self.domain))),
            [reference, address, frame, ..] => Ok(PeerGrant {
                reference: GrantRef::new(reference as u32),
                page: PeerPage { address, frame },
            }),
        }
    }

    /// Ends a grant that it made; false while it is in use.
    ///
    /// # Errors
    /// It does not answer.
    pub fn end_grant(&self, reference: GrantRef) -> Result<bool, Stop> {
        Ok(self.ask(Verb::EndGrant, &[reference.get().into()], None)?[0] != 0)
    }

    /// Its addresses of the buffer and of shared_info.
    ///
    /// # Errors
    /// It does not answer.
    pub fn places(&self) -> Result<(u64, u64), Stop> {
        let [buffer, shared, ..] = self.ask(Verb::Places, &[], None)?;
        Ok((buffer, shared))
    }

    /// Lets go of the mailbox of one that will end by itself.
    #[must_use]
    pub fn let_go(self) -> DomId {
        self.domain
    }

    /// Ends it: from here on its number names a domain that is shut down, and once the toolstack has seen it, one that is dying
    /// or none. The leader lets go of the mailbox, so that nothing of the facility keeps it.
    ///
    /// # Errors
    /// It does not answer.
    pub fn end(self, reason: ShutdownReason) -> Result<DomId, Stop> {
        self.ask(Verb::End, &[reason as u64], None)?;
        Ok(self.domain)
    }
}

/// Waits until `done` says so; false when it does not within the usual patience.
pub fn wait_until(mut done: impl FnMut() -> bool) -> bool {
    let deadline = deadline();
    while !done() {
        if time::now_ns() > deadline {
            return false;
        }
        pause();
    }
    true
}
