//! A front end of network cards that does everything wrong that one can do, one deed after the other, and looks what comes of it.
//!
//! A bad frame is to be answered with an error, a bad ring or bad nodes are to end the connection, and after each deed the card is to work
//! again. Who else is on the switch is to notice nothing, which is for others to say.

use super::Random;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;
use core::time::Duration;
use guest_sdk::abi::DomId;
use guest_sdk::abi::io::netif::{EXTRA_FLAG_MORE, EXTRA_TYPE_GSO, GSO_TYPE_TCPV4, TxFlags};
use guest_sdk::events::Channel;
use guest_sdk::grants::GrantedPages;
use guest_sdk::memory::Access;
use guest_sdk::ring::SharedPage;
use guest_sdk::xenstore::Xenstore;
use guest_sdk::{Domain, println, time};

const PAGE: usize = 4096;
/// Where things are among the pages: both rings, and what is sent.
const TX: usize = 0;
const RX: usize = 1;
const DATA: usize = 2;
const PAGES: usize = 6;
/// Bytes of a ring's indexes, and its slots.
const HEADER: usize = 64;
const SLOTS: u32 = 256;
const TX_SLOT: usize = 12;
const RX_SLOT: usize = 8;
/// States (public/io/xenbus.h).
const INIT_WAIT: u8 = b'2';
const CONNECTED: u8 = b'4';
const CLOSING: u8 = b'5';
const CLOSED: u8 = b'6';
/// How often a card is tried that does not work yet.
const TRIES: usize = 5;
/// A reference that nobody has granted.
const NOBODYS: u32 = 0x7fff_ffff;
const OKAY: i16 = 0;
const ERROR: i16 = -1;
const NULL: i16 = 1;

/// A slot of the ring of what is sent.
type Slot = [u8; TX_SLOT];

fn request(gref: u32, offset: u16, flags: TxFlags, size: u16) -> Slot {
    let mut slot = [0; TX_SLOT];
    slot[..4].copy_from_slice(&gref.to_le_bytes());
    for (at, value) in [(4, offset), (6, flags.bits()), (8, 7), (10, size)] {
        slot[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    slot
}

fn extra(kind: u8, more: bool, size: u16, of: u8) -> Slot {
    let mut slot = [0; TX_SLOT];
    slot[0] = kind;
    slot[1] = if more { EXTRA_FLAG_MORE } else { 0 };
    slot[2..4].copy_from_slice(&size.to_le_bytes());
    slot[4] = of;
    slot
}

/// A card.
struct Front<'a> {
    store: &'a mut Xenstore,
    directory: String,
    back: String,
    pages: GrantedPages,
    channel: Channel,
    /// Free-running indexes: what was sent, what was answered.
    sent: u32,
    answered: u32,
    deeds: u64,
    wrong: u64,
}

impl<'a> Front<'a> {
    async fn new(store: &'a mut Xenstore, channel: Channel, directory: String) -> Option<Front<'a>> {
        let back = store.read(&format!("{directory}/backend")).await.ok()?;
        let back = String::from_utf8(back).ok()?;
        let pages = GrantedPages::new(PAGES, DomId::ZERO, Access::ReadWrite).ok()?;
        Some(Front { store, directory, back, pages, channel, sent: 0, answered: 0, deeds: 0, wrong: 0 })
    }

    fn gref(&self, page: usize) -> u32 {
        self.pages.references().get(page).map_or(NOBODYS, |gref| gref.get())
    }

    /// The whole first frame: for nobody, from nobody, with nothing in it.
    fn whole(&self, flags: TxFlags) -> Slot {
        request(self.gref(DATA), 0, flags, 60)
    }

    fn index(&self, ring: usize, at: usize) -> u32 {
        let mut bytes = [0; 4];
        self.pages.read_bytes(ring * PAGE + at * 4, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn set_index(&self, ring: usize, at: usize, value: u32) {
        self.pages.write_bytes(ring * PAGE + at * 4, &value.to_le_bytes());
    }

    async fn say(&mut self, name: &str, value: &[u8]) {
        // A guest may be refused what it says: too long, or the node is gone.
        let _ = self.store.write(&format!("{}/{name}", self.directory), value).await;
    }

    async fn back_state(&mut self) -> u8 {
        let state = self.store.read(&format!("{}/state", self.back)).await.unwrap_or_default();
        state.first().copied().unwrap_or(0)
    }

    /// Waits for one of these states of the back end; false if it does not come.
    async fn until(&mut self, states: &[u8]) -> bool {
        for _ in 0..400 {
            if states.contains(&self.back_state().await) {
                return true;
            }
            time::after(Duration::from_millis(5)).await;
        }
        false
    }

    /// The nodes of a front end as it should be.
    async fn describe(&mut self) {
        for (name, page) in [("tx-ring-ref", TX), ("rx-ring-ref", RX)] {
            let gref = self.gref(page).to_string();
            self.say(name, gref.as_bytes()).await;
        }
        let port = self.channel.port().to_string();
        for (name, value) in [
            ("event-channel", port.as_str()),
            ("request-rx-copy", "1"),
            ("feature-sg", "1"),
            ("feature-gso-tcpv4", "1"),
            ("feature-no-csum-offload", "0"),
        ] {
            self.say(name, value.as_bytes()).await;
        }
        for name in ["multi-queue-num-queues", "ctrl-ring-ref", "event-channel-ctrl"] {
            let _ = self.store.remove(&format!("{}/{name}", self.directory)).await;
        }
    }

    /// Begins anew, whatever was before; true when it is connected.
    async fn connect(&mut self) -> bool {
        self.close().await;
        for ring in [TX, RX] {
            self.pages.write_bytes(ring * PAGE, &[0; PAGE]);
            // Both ends want to hear of the first of everything.
            self.set_index(ring, 1, 1);
            self.set_index(ring, 3, 1);
        }
        // A frame to an address that nobody has, from one that is the locally administered of somebody.
        let mut frame = [0; 64];
        frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5]);
        self.pages.write_bytes(DATA * PAGE, &frame);
        (self.sent, self.answered) = (0, 0);
        self.describe().await;
        self.say("state", b"4").await;
        self.until(&[CONNECTED]).await
    }

    /// Lets go of the back end in the right order.
    async fn close(&mut self) {
        if self.back_state().await == INIT_WAIT {
            return;
        }
        self.say("state", b"5").await;
        self.until(&[CLOSED, CLOSING, INIT_WAIT]).await;
        self.say("state", b"6").await;
        self.until(&[CLOSED]).await;
        self.say("state", b"1").await;
        self.until(&[INIT_WAIT]).await;
    }

    /// Puts slots into the ring, where they come.
    fn put(&self, from: u32, slots: &[Slot]) {
        for (at, slot) in (from..).zip(slots) {
            self.pages.write_bytes(TX * PAGE + HEADER + (at % SLOTS) as usize * TX_SLOT, slot);
        }
    }

    fn send(&mut self, slots: &[Slot]) {
        self.put(self.sent, slots);
        self.sent = self.sent.wrapping_add(slots.len() as u32);
        self.set_index(TX, 0, self.sent);
        // A back end that has closed it is told by its state.
        let _ = self.channel.notify();
    }

    /// The status of so many answers; fewer if no more come.
    async fn answers(&mut self, count: usize) -> Vec<i16> {
        let mut answers = Vec::new();
        for _ in 0..400 {
            while answers.len() < count && self.index(TX, 2) != self.answered {
                let mut status = [0; 2];
                let at = HEADER + (self.answered % SLOTS) as usize * TX_SLOT + 2;
                self.pages.read_bytes(TX * PAGE + at, &mut status);
                answers.push(i16::from_le_bytes(status));
                self.answered = self.answered.wrapping_add(1);
            }
            if answers.len() == count {
                break;
            }
            time::after(Duration::from_millis(2)).await;
        }
        answers
    }

    fn judge(&mut self, what: &str, right: bool, got: &str) {
        self.deeds += 1;
        if !right {
            self.wrong += 1;
            println!("{}: {what}: {got}", self.directory);
        }
    }

    /// A frame that is to be answered so, and a good one behind it.
    async fn frame(&mut self, what: &str, slots: &[Slot], expected: &[i16]) {
        self.send(slots);
        let mut all = self.answers(slots.len()).await;
        let good = self.whole(TxFlags::empty());
        self.send(&[good]);
        all.extend(self.answers(1).await);
        let right = all.split_last() == Some((&OKAY, expected));
        self.judge(what, right, &format!("{all:?} instead of {expected:?} and {OKAY}"));
    }

    /// Something that is to end the connection; and another is to be had.
    async fn breaks(&mut self, what: &str) {
        let _ = self.channel.notify();
        let closed = self.until(&[CLOSING, CLOSED]).await;
        let again = self.connect().await;
        self.judge(what, closed && again, &format!("closed: {closed}, connected again: {again}"));
    }

    /// Whatever came of what was done: the card works in the end. What a connection was made for may still be coming apart when it is
    /// there: dom0 takes its time on a slow machine.
    async fn works(&mut self, what: &str) {
        let mut seen = Vec::new();
        for _ in 0..TRIES {
            let connected = self.connect().await;
            let good = self.whole(TxFlags::empty());
            self.send(&[good]);
            let answers = self.answers(1).await;
            if connected && answers == [OKAY] {
                return self.judge(what, true, "");
            }
            seen.push((connected, answers));
        }
        self.judge(what, false, &format!("connected, and then answered: {seen:?}"));
    }
}

/// Does it all. The cards that it has take turns, so that of each kind of deed the first is reported.
pub async fn run(domain: Domain, mut store: Xenstore, seed: u64) {
    let mut directories = Vec::new();
    for number in store.directory("device/vif").await.unwrap_or_default() {
        directories.push(format!("device/vif/{number}"));
    }
    let (mut deeds, mut wrong) = (0, 0);
    for (kind, directory) in directories.into_iter().enumerate() {
        let Ok(channel) = domain.events.alloc_unbound(DomId::ZERO) else { return };
        let Some(mut front) = Front::new(&mut store, channel, directory).await else { return };
        if !front.connect().await {
            println!("{}: it cannot be connected", front.directory);
            wrong += 1;
            continue;
        }
        match kind {
            0 => grants(&mut front, &domain).await,
            1 => shapes(&mut front).await,
            2 => extras(&mut front).await,
            3 => indexes(&mut front).await,
            4 => nodes(&mut front, &domain).await,
            _ => everything(&mut front, seed).await,
        }
        front.close().await;
        (deeds, wrong) = (deeds + front.deeds, wrong + front.wrong);
        println!("{}: {} deeds, {} wrong", front.directory, front.deeds, front.wrong);
    }
    println!("all cards: {deeds} deeds, {wrong} wrong");
}

/// Pages that are not granted, or not so, or not any more.
async fn grants(front: &mut Front<'_>, domain: &Domain) {
    let none = TxFlags::empty();
    front.frame("a reference of nobody's", &[request(NOBODYS, 0, none, 60)], &[ERROR]).await;
    front.frame("a reference beyond the table", &[request(400, 0, none, 60)], &[ERROR]).await;
    if let Ok(other) = domain.grants.grant_new(DomId::new(1), Access::ReadWrite) {
        let gref = other.reference().get();
        front.frame("a page granted to somebody else", &[request(gref, 0, none, 60)], &[ERROR]).await;
        // A frame is read to its end before anybody gets it.
        let two = [front.whole(TxFlags::MORE_DATA), request(gref, 0, none, 20)];
        front.frame("a second page granted to somebody else", &two, &[ERROR, ERROR]).await;
    }
    for round in 0..40 {
        let Ok(page) = domain.grants.grant_new(DomId::ZERO, Access::Read) else { return };
        let gref = page.reference().get();
        front.send(&[request(gref, 0, none, 60)]);
        if round % 2 == 0 {
            // Somewhere in the middle, or before, or after.
            time::after(Duration::from_micros(round * 10)).await;
        }
        drop(page);
        let answers = front.answers(1).await;
        front.judge("a grant that ends", matches!(answers[..], [OKAY | ERROR]), &format!("{answers:?}"));
    }
    // To receive into: nobody's, one's own to be read only, and one that ends. Broadcasts of others are what comes.
    let readonly = domain.grants.grant_new(DomId::ZERO, Access::Read).ok();
    let ended = domain.grants.grant_new(DomId::ZERO, Access::ReadWrite).ok();
    let grefs = [
        Some(NOBODYS),
        readonly.as_ref().map(|page| page.reference().get()),
        ended.as_ref().map(|page| page.reference().get()),
    ];
    let mut posted = 0u32;
    for gref in grefs.into_iter().flatten().cycle().take(60) {
        let mut slot = [0; RX_SLOT];
        slot[..2].copy_from_slice(&(posted as u16).to_le_bytes());
        slot[4..].copy_from_slice(&gref.to_le_bytes());
        front.pages.write_bytes(RX * PAGE + HEADER + posted as usize * RX_SLOT, &slot);
        posted += 1;
    }
    front.set_index(RX, 0, posted);
    let _ = front.channel.notify();
    drop(ended);
    time::after(Duration::from_millis(300)).await;
    front.works("bad pages to receive into").await;
}

/// Sizes, offsets, and numbers of slots.
async fn shapes(front: &mut Front<'_>) {
    let (none, more) = (TxFlags::empty(), TxFlags::MORE_DATA);
    let gref = front.gref(DATA);
    for (what, offset, size) in [
        ("no bytes", 0, 0),
        ("less than a header", 0, 13),
        ("beyond the page", 4000, 500),
        ("far beyond the page", 0xffff, 0xffff),
        ("more than a page", 0, 4097),
        ("all that can be said, in one slot", 0, 0xffff),
    ] {
        front.frame(what, &[request(gref, offset, none, size)], &[ERROR]).await;
    }
    for (what, first, second) in [
        ("a piece larger than the whole", 60, 61),
        ("an empty piece", 60, 0),
        ("a second piece beyond its page", 5000, 4096),
    ] {
        let slots = [request(gref, 0, more, first), request(gref, 100, none, second)];
        front.frame(what, &slots, &[ERROR, ERROR]).await;
    }
    for count in [19, 40] {
        let mut slots = vec![request(gref, 0, more, 10); count];
        slots[0] = request(gref, 0, more, 1000);
        slots[count - 1] = request(gref, 0, none, 10);
        front.frame(&format!("{count} slots"), &slots, &vec![ERROR; count]).await;
    }
    front.send(&[front.whole(more)]);
    front.breaks("a frame that goes on behind the ring's end").await;
    let slots = vec![request(gref, 0, more, 10); SLOTS as usize];
    front.send(&slots);
    front.breaks("a frame that is the whole ring").await;
}

/// What is said beside a frame.
async fn extras(front: &mut Front<'_>) {
    let first = front.whole(TxFlags::EXTRA_INFO);
    for kind in [0, 2, 3, 4, 5, 99, 255] {
        front.frame("something unknown", &[first, extra(kind, false, 1, 1)], &[ERROR, NULL]).await;
    }
    let segments = |size, more| extra(EXTRA_TYPE_GSO, more, size, GSO_TYPE_TCPV4);
    front
        .frame("segments of nothing known", &[first, extra(EXTRA_TYPE_GSO, false, 1000, 77)], &[ERROR, NULL])
        .await;
    front
        .frame("segments twice", &[first, segments(1000, true), segments(9, false)], &[ERROR, NULL, NULL])
        .await;
    for size in [0, 1, 7, 1460, 0xffff] {
        // It is no packet that can be cut.
        front.frame(&format!("segments of {size}"), &[first, segments(size, false)], &[ERROR, NULL]).await;
    }
    let chain: Vec<Slot> =
        core::iter::once(first).chain((0..30).map(|at| extra(99, at < 29, 0, 0))).collect();
    let expected: Vec<i16> = core::iter::once(ERROR).chain([NULL; 30]).collect();
    front.frame("a long chain", &chain, &expected).await;
    front.send(&[first]);
    front.breaks("a chain that goes on behind the ring's end").await;
    let chain: Vec<Slot> = core::iter::once(first).chain((1..SLOTS).map(|_| extra(99, true, 0, 0))).collect();
    front.send(&chain);
    front.breaks("a chain without an end").await;
}

/// Indexes of both rings, ahead of what is there and behind.
async fn indexes(front: &mut Front<'_>) {
    for ahead in [SLOTS + 1, 10_000, 0x8000_0000, u32::MAX] {
        for ring in [TX, RX] {
            let good = front.whole(TxFlags::empty());
            front.send(&[good]);
            front.answers(1).await;
            front.set_index(ring, 0, front.sent.wrapping_add(ahead));
            if ring == RX {
                // That ring is looked at when there is something to be put into it.
                front.works(&format!("{ahead} to receive into")).await;
            } else {
                front.breaks(&format!("{ahead} sent")).await;
            }
        }
    }
    // The other end's own indexes, and when it wants to be told.
    for (ring, at) in [(TX, 1), (TX, 2), (RX, 1), (RX, 2), (TX, 3), (RX, 3)] {
        front.set_index(ring, at, 0x1234_5678);
        front.works("what is not its own to say").await;
    }
}

/// What it says of itself, and in which order.
async fn nodes(front: &mut Front<'_>, domain: &Domain) {
    let elses = domain.grants.grant_new(DomId::new(1), Access::ReadWrite).ok();
    let elses = elses.as_ref().map_or(0, |page| page.reference().get()).to_string();
    let own = domain.events.alloc_unbound(DomId::new(1)).ok();
    let elses_port = own.as_ref().map_or(0, |channel| channel.port().get()).to_string();
    let long = "7".repeat(1500);
    for (name, values) in [
        ("tx-ring-ref", &["", "abc", "-1", "4294967295", "99999999999999999999", &elses, &long][..]),
        ("rx-ring-ref", &["", "\u{fffd}", "4294967295", &elses]),
        ("event-channel", &["", "0", "-1", "4294967295", "77777", &elses_port]),
        ("multi-queue-num-queues", &["0", "100000", "-1", "4294967296", "x"]),
        ("request-rx-copy", &["0", "2", "yes"]),
        ("ctrl-ring-ref", &["abc", "4294967295", &elses]),
    ] {
        for value in values {
            front.close().await;
            front.describe().await;
            front.say(name, value.as_bytes()).await;
            front.say("state", b"4").await;
            let refused = front.until(&[CLOSING, CLOSED]).await;
            front.judge(&format!("{name} is {:.20}", value), refused, "it was not refused");
        }
    }
    front.works("nodes of nonsense").await;
    for states in [
        &["6", "2", "4"][..],
        &["4", "4", "4"],
        &["1", "6", "1", "6", "1"],
        &["3", "4", "6", "1"],
        &["5", "1", "4"],
        &["0", "7", "8", "9", "-1", ""],
        &["4", "1", "4", "1", "4"],
        &["99999999999999999999", "\u{fffd}"],
    ] {
        for state in states {
            front.say("state", state.as_bytes()).await;
        }
        front.works(&format!("states {states:?}")).await;
    }
    // Without a state, and without anything at all: these are its own nodes.
    let path = format!("{}/state", front.directory);
    let _ = front.store.remove(&path).await;
    front.works("no state").await;
    for name in ["tx-ring-ref", "event-channel", "backend", "mac"] {
        let path = format!("{}/{name}", front.directory);
        let _ = front.store.remove(&path).await;
    }
    front.works("nodes that are gone while it is connected").await;
}

/// Frames with others' addresses, of all lengths, to everybody; signals without an end; requests that change while they are looked at.
async fn everything(front: &mut Front<'_>, seed: u64) {
    let mut random = Random::with_seed(seed);
    let gref = front.gref(DATA);
    for length in [14, 15, 59, 60, 1514, 1515, 4096] {
        let mut frame = vec![0; length];
        random.fill(&mut frame);
        front.pages.write_bytes(DATA * PAGE, &frame);
        front.send(&[request(gref, 0, TxFlags::empty(), length as u16)]);
        let answers = front.answers(1).await;
        front.judge("any frame", matches!(answers[..], [OKAY | ERROR]), &format!("{answers:?}"));
    }
    front.works("frames of all lengths").await;
    // From everybody, to everybody.
    for round in 0..200u32 {
        let mut frame = [0u8; 64];
        random.fill(&mut frame);
        let group = [0xff, 0x01, 0x33][round as usize % 3];
        frame[0] = group;
        frame[6..12].copy_from_slice(&[0, 0x16, 0x3e, random.u8(..), 0, 1]);
        front.pages.write_bytes(DATA * PAGE, &frame);
        front.send(&[request(gref, 0, TxFlags::empty(), 60)]);
        let answers = front.answers(1).await;
        front.judge("another's address", matches!(answers[..], [OKAY | ERROR]), &format!("{answers:?}"));
    }
    for _ in 0..20_000 {
        let _ = front.channel.notify();
    }
    front.works("signals").await;
    for _ in 0..20 {
        // Until the back end has enough of it.
        for _ in 0..100 {
            let slots: Vec<Slot> = (0..1 + random.u64(..8)).map(|_| any(front, &mut random)).collect();
            front.send(&slots);
            for _ in 0..random.u64(..40) {
                let at = front.sent.wrapping_sub(random.u32(..8));
                let changed = any(front, &mut random);
                front.put(at, &[changed]);
            }
            if random.u64(..16) == 0 {
                time::after(Duration::from_micros(random.u64(..200))).await;
            }
        }
        front.works("requests that change").await;
    }
}

/// A slot that may make sense.
fn any(front: &Front<'_>, random: &mut Random) -> Slot {
    if random.u64(..4) == 0 {
        let mut slot = [0; TX_SLOT];
        random.fill(&mut slot);
        return slot;
    }
    let gref = front.gref(DATA + random.usize(..4));
    let flags = TxFlags::from_bits_retain(random.u16(..16));
    request(gref, random.u16(..4096), flags, random.u16(..2000))
}
