//! Frames, raw: `role=send` sends to everybody on its network, `role=take` looks whether they come as they were sent, until nothing
//! has come for two seconds. Both say what a frame took. Under `--icount` a nanosecond is an instruction, and they are those of both
//! guests, hypervisor and dom0 together.
//!
//! `frames=1000` of each length, or of `bytes=1514` only, are sent, at most `batch=32` with one notification; `pause=` milliseconds between batches let a
//! receiver keep up. Who takes with `check=0` looks at the head of each frame only, where it is.
//!
//! `role=echo ip=10.0.2.60 peer=10.0.2.2` has `frames=` packets of 1500 bytes echoed, `depth=16` at a time, and says how fast, as dom0's
//! `device ping` does by the machine's card.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec::Vec;
use core::time::Duration;
use guest_examples::host;
use guest_sdk::net::{Card, Mac, NetError, Options};
use guest_sdk::sync::{First, first};
use guest_sdk::{Domain, entry, memory, println, time};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, Icmpv4Packet,
    Icmpv4Repr, IpProtocol, Ipv4Address, Ipv4Packet, Ipv4Repr,
};

const LENGTHS: [usize; 4] = [60, 1514, 9014, 65535];
/// The head of a frame, with a type that is free for experiments; then the number of its length, and its own.
const HEAD: usize = 14 + 8;

#[entry]
async fn main(mut domain: Domain) -> Result<(), NetError> {
    let Some(store) = host::store(&mut domain) else { return Ok(()) };
    let words = domain.command_line;
    // This domain has one vCPU.
    let _ = memory::use_wide_copies();
    // A whole ring to receive into, as Linux has it: who sends faster than this one takes is let go on for longer.
    let options = Options { receive_pages: 256, ..Options::default() };
    let card = Card::open_with(&store, words.number("card").unwrap_or(0), options).await?;
    println!("card {}, {} bytes in a frame", card.mac(), card.max_frame());
    match words.value("role") {
        Some("send") => {
            let pause = Duration::from_millis(words.number("pause").unwrap_or(0));
            let (frames, batch) =
                (words.number("frames").unwrap_or(1000), words.number("batch").unwrap_or(32));
            send(&card, frames, batch, pause, words.number("bytes")).await?;
        }
        Some("take") => take(&card, words.number("check") != Some(0)).await?,
        Some("echo") => match (words.number("ip"), words.number("peer")) {
            (Some(own), Some(peer)) => {
                let (frames, depth) =
                    (words.number("frames").unwrap_or(1000), words.number("depth").unwrap_or(16));
                echo(&card, own, peer, frames, depth).await?;
            }
            _ => println!("ip=ADDRESS peer=ADDRESS?"),
        },
        _ => println!("role=send, role=take or role=echo?"),
    }
    println!("{:?}", card.counters());
    Ok(())
}

/// Puts the head of a frame there.
fn fill(frame: &mut [u8], mac: Mac, length: u32) {
    let head = [0xff; 6].into_iter().chain(mac.0).chain([0x88, 0xb5]).chain(length.to_le_bytes());
    frame.iter_mut().zip(head).for_each(|(to, byte)| *to = byte);
}

/// Numbers a frame.
fn number(frame: &mut [u8], number: u32) {
    if let Some(place) = frame.get_mut(HEAD - 4..HEAD) {
        place.copy_from_slice(&number.to_le_bytes());
    }
}

/// What is behind the head, the same in all frames of a length.
fn content(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at ^ at >> 8 ^ bytes) as u8).collect()
}

async fn send(
    card: &Card,
    frames: u32,
    batch: u32,
    pause: Duration,
    only: Option<usize>,
) -> Result<(), NetError> {
    // Receivers come up meanwhile.
    time::after(Duration::from_secs(1)).await;
    let wanted = |bytes| bytes <= card.max_frame() && only.is_none_or(|only| only == bytes);
    for (length, bytes) in LENGTHS.into_iter().enumerate().filter(|(_, bytes)| wanted(*bytes)) {
        let mut frame = content(bytes);
        fill(&mut frame, card.mac(), length as u32);
        let mut sent = 0;
        let mut paused = Duration::ZERO;
        let begun = time::now();
        while sent < frames {
            let last = frames.min(sent + batch.max(1));
            while sent < last {
                number(&mut frame, sent);
                if card.queue(&frame)? {
                    sent += 1;
                } else {
                    card.room(bytes).await?;
                }
            }
            card.flush()?;
            if !pause.is_zero() {
                let before = time::now();
                time::after(pause).await;
                paused += time::now() - before;
            }
        }
        let spent = (time::now() - begun - paused).as_nanos() as u64;
        println!("{bytes} bytes: {frames} frames sent, {} ns each", spent / u64::from(frames.max(1)));
        time::after(Duration::from_millis(100)).await;
    }
    Ok(())
}

/// What came of a length.
#[derive(Clone, Copy, Default)]
struct Came {
    frames: u64,
    wrong: u64,
    /// The highest number that a frame had, and one.
    of: u64,
    first: Duration,
    last: Duration,
    /// Those that `last` is the time of.
    timed: u64,
}

impl Came {
    /// Notes a frame with this number.
    fn note(&mut self, number: u64, right: bool) {
        if self.frames == 0 {
            self.first = time::now();
        }
        self.frames += 1;
        // They come in order, if they come.
        self.wrong += u64::from(number < self.of || !right);
        self.of = number + 1;
    }

    /// Says when the newest frames were taken: a clock for each would cost more than some of them.
    fn time(&mut self) {
        if core::mem::replace(&mut self.timed, self.frames) != self.frames {
            self.last = time::now();
        }
    }
}

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// Who has an address (RFC 826); `None` when nobody says so.
async fn find(card: &Card, own: Ipv4Address, peer: Ipv4Address) -> Result<Option<EthernetAddress>, NetError> {
    let mac = EthernetAddress(card.mac().0);
    let question = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr: mac,
        source_protocol_addr: own,
        target_hardware_addr: EthernetAddress([0; 6]),
        target_protocol_addr: peer,
    };
    let mut frame = alloc::vec![0; 60];
    let mut ethernet = EthernetFrame::new_unchecked(&mut frame);
    ethernet.set_src_addr(mac);
    ethernet.set_dst_addr(EthernetAddress::BROADCAST);
    ethernet.set_ethertype(EthernetProtocol::Arp);
    question.emit(&mut ArpPacket::new_unchecked(ethernet.payload_mut()));
    card.send(&frame).await?;
    let answer = async {
        let mut frame = alloc::vec![0; 1600];
        loop {
            let bytes = card.receive(&mut frame).await?.bytes;
            let Ok(ethernet) = EthernetFrame::new_checked(frame.get(..bytes).unwrap_or_default()) else {
                continue;
            };
            let answer = ArpPacket::new_checked(ethernet.payload()).and_then(|arp| ArpRepr::parse(&arp));
            if let (
                EthernetProtocol::Arp,
                Ok(ArpRepr::EthernetIpv4 {
                    operation: ArpOperation::Reply,
                    source_hardware_addr,
                    source_protocol_addr,
                    ..
                }),
            ) = (ethernet.ethertype(), answer)
                && source_protocol_addr == peer
            {
                return Ok(source_hardware_addr);
            }
        }
    };
    match first(answer, time::after(PATIENCE)).await {
        First::One(found) => found.map(Some),
        First::Other(()) => Ok(None),
    }
}

/// Has packets of 1500 bytes echoed (RFC 792), so many at a time.
async fn echo(
    card: &Card,
    own: Ipv4Address,
    peer: Ipv4Address,
    frames: u64,
    depth: u64,
) -> Result<(), NetError> {
    const IDENT: u16 = 0x22b;
    let Some(mac) = find(card, own, peer).await? else {
        println!("nobody has {peer}");
        return Ok(());
    };
    let content: Vec<u8> = (0..1472).map(|at| at as u8).collect();
    let message = Icmpv4Repr::EchoRequest { ident: IDENT, seq_no: 1, data: &content };
    let packet = Ipv4Repr {
        src_addr: own,
        dst_addr: peer,
        next_header: IpProtocol::Icmp,
        payload_len: message.buffer_len(),
        hop_limit: 64,
    };
    let mut request = alloc::vec![0; 1514];
    let mut ethernet = EthernetFrame::new_unchecked(&mut request);
    ethernet.set_src_addr(EthernetAddress(card.mac().0));
    ethernet.set_dst_addr(mac);
    ethernet.set_ethertype(EthernetProtocol::Ipv4);
    let mut ip = Ipv4Packet::new_unchecked(ethernet.payload_mut());
    packet.emit(&mut ip, &ChecksumCapabilities::default());
    message.emit(&mut Icmpv4Packet::new_unchecked(ip.payload_mut()), &ChecksumCapabilities::default());
    let is_answer = |frame: &[u8], _| {
        let field = |from: usize, to: usize| frame.get(from..to).unwrap_or_default();
        let head = frame.len() == 1514 && field(12, 14) == [8, 0] && field(23, 24) == [1];
        u64::from(head && field(34, 36) == [0, 0] && field(38, 40) == IDENT.to_be_bytes())
    };
    let (mut sent, mut came) = (0, 0);
    let begun = time::now_ns();
    while came < frames {
        while sent < frames && sent - came < depth && card.queue(&request)? {
            sent += 1;
        }
        card.flush()?;
        if let First::Other(()) = first(card.ready(), time::after(PATIENCE)).await {
            println!("{came} of {sent} packets came back");
            return Ok(());
        }
        while let Some(answers) = card.receive_with(is_answer)? {
            came += answers;
        }
    }
    let spent = (time::now_ns() - begun).max(1);
    println!(
        "{frames} packets of 1500 bytes echoed, {depth} at a time: {} a second",
        frames * 1_000_000_000 / spent
    );
    Ok(())
}

/// The length and the number of a frame of ours.
fn read(frame: &[u8]) -> Option<(usize, u64)> {
    let number = |at: usize| frame.get(at..)?.first_chunk().map(|word| u32::from_le_bytes(*word));
    Some((number(HEAD - 8)? as usize, number(HEAD - 4)?.into()))
}

async fn take(card: &Card, check: bool) -> Result<(), NetError> {
    let contents = LENGTHS.map(content);
    let mut came = [Came::default(); LENGTHS.len()];
    loop {
        let mut look = |frame: &[u8]| {
            let Some((length, number)) = read(frame) else { return };
            if let (Some(came), Some(content)) = (came.get_mut(length), contents.get(length)) {
                came.note(number, !check || frame.get(HEAD..) == content.get(HEAD..));
            }
        };
        // As many as there are; then it waits.
        while card.receive_with(|frame, _| look(frame))?.is_some() {}
        came.iter_mut().for_each(Came::time);
        let begun = card.counters().received > 0;
        let quiet = Duration::from_secs(if begun { 2 } else { 3600 });
        match first(card.ready(), time::after(quiet)).await {
            First::One(result) => result?,
            First::Other(()) => break,
        }
    }
    for (bytes, Came { frames, wrong, of, first, last, .. }) in LENGTHS.into_iter().zip(came) {
        let each = (last - first).as_nanos() as u64 / frames.max(2).saturating_sub(1);
        println!("{bytes} bytes: {frames} of {of} frames came, {wrong} were wrong, {each} ns each");
    }
    Ok(())
}
