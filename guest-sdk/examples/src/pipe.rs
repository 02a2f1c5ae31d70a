//! Buffers from one domain to another, by grant and event channel, as fast as it goes.
//!
//! The producer grants a ring page and a pool of buffers, and makes a port for its peer. A request in the ring names a
//! full buffer by its grant reference; the response gives it back. Buffers are mapped by the consumer in batches, one
//! hypercall to map and one to unmap each, and both ends are notified only when they sleep.
//!
//! The two find each other without xenstore: the ring is the first grant that the producer makes, so its reference is the
//! first that is not reserved, and the consumer tries the peer's ports until one takes it. When the other one goes away,
//! either gives back what it holds and waits for it to come again.

use alloc::vec::Vec;
use core::time::Duration;
use guest_sdk::abi::grant::GNTTAB_NR_RESERVED_ENTRIES;
use guest_sdk::abi::{DomId, GrantRef, PAGE_SIZE, Port};
use guest_sdk::events::{Channel, Events};
use guest_sdk::grants::{Grant, GrantError, Grants, Mapping};
use guest_sdk::memory::Access;
use guest_sdk::ring::{Back, Front, SharedPage};
use guest_sdk::{CommandLine, println, time};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A full buffer.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Full {
    /// The buffer's grant.
    pub reference: u32,
    /// Bytes in it.
    pub bytes: u32,
    /// Counts up from 0.
    pub sequence: u64,
}

/// The buffer of a request, empty again.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Empty {
    /// The buffer's grant.
    pub reference: u32,
    /// 1 when the content was wrong.
    pub wrong: u32,
}

/// Buffers in the pool, unless the command line says otherwise.
pub const BUFFERS: usize = 64;

/// Why an end of the pipe ended.
#[derive(Clone, Copy, Debug)]
pub enum PipeError {
    /// Nobody said which domain the other end is.
    NoPeer,
    /// A grant or a port was refused.
    Grant(GrantError),
}

impl core::fmt::Display for PipeError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::NoPeer => f.write_str("say peer=NUMBER: the domain at the other end"),
            Self::Grant(error) => write!(f, "{error}"),
        }
    }
}

impl From<GrantError> for PipeError {
    fn from(error: GrantError) -> Self {
        Self::Grant(error)
    }
}

/// The domain at the other end, as the command line says.
///
/// # Errors
/// [`PipeError::NoPeer`] when it does not.
pub fn peer(line: CommandLine) -> Result<DomId, PipeError> {
    line.number("peer").map(DomId::new).ok_or(PipeError::NoPeer)
}

/// Ports of the producer that the consumer tries.
const PORTS: core::ops::Range<u32> = 1..64;

/// How long an end waits before it looks whether the other one is still there.
const PATIENCE: Duration = Duration::from_millis(500);

/// Each word of a buffer, by the buffer's number.
fn stamp(sequence: u64, at: usize) -> u64 {
    (sequence << 16 | at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Counts what goes through and says so every second.
struct Meter {
    name: &'static str,
    since_ns: u64,
    buffers: u64,
    bytes: u64,
    sleeps: u64,
}

impl Meter {
    fn new(name: &'static str) -> Self {
        Meter { name, since_ns: time::now_ns(), buffers: 0, bytes: 0, sleeps: 0 }
    }

    /// True when a second was over and a line was printed.
    fn count(&mut self, bytes: u64) -> bool {
        self.buffers += 1;
        self.bytes += bytes;
        // Looking at the clock costs about as much as a small buffer.
        if !self.buffers.is_multiple_of(64) {
            return false;
        }
        let took = time::now_ns().saturating_sub(self.since_ns);
        if took < 1_000_000_000 {
            return false;
        }
        let per_second =
            |count: u64| u64::try_from(u128::from(count) * 1_000_000_000 / u128::from(took)).unwrap_or(0);
        let (buffers, tenths) = (per_second(self.buffers), per_second(self.bytes * 10) >> 20);
        println!(
            "{}: {buffers} buffers/s, {}.{} MiB/s, {} sleeps/s",
            self.name,
            tenths / 10,
            tenths % 10,
            per_second(self.sleeps)
        );
        *self = Meter::new(self.name);
        true
    }
}

/// Why one connection ended.
#[derive(PartialEq)]
enum End {
    /// The time is over.
    Time,
    /// The other end is gone.
    Gone,
}

/// Fills buffers and sends them to `peer`, for `seconds` or for ever.
///
/// # Errors
/// When the domain has no memory, grant or port left, or the consumer's end of the ring is broken.
pub async fn produce(
    events: &Events,
    grants: &Grants,
    peer: DomId,
    buffers: usize,
    mut seconds: Option<u64>,
) -> Result<(), GrantError> {
    while serve(events, grants, peer, buffers, &mut seconds).await? == End::Gone {
        println!("producer: domain {peer} is gone; starting over");
    }
    Ok(())
}

/// One connection of the producer.
async fn serve(
    events: &Events,
    grants: &Grants,
    peer: DomId,
    buffers: usize,
    seconds: &mut Option<u64>,
) -> Result<End, GrantError> {
    // Dropped in reverse order, so that the ring is the first grant of the next connection too.
    let ring = grants.grant_new(peer, Access::ReadWrite)?;
    println!("producer: ring is grant {}", ring.reference());
    let mut front: Front<Grant, Full, Empty> = Front::new(ring);
    let count = buffers.min(front.capacity() as usize);
    let pool: Vec<Grant> = (0..count)
        .map(|_| grants.grant_new(peer, Access::Read))
        .collect::<Result<Vec<Grant>, GrantError>>()?;
    let first = pool.first().map_or(0, |grant| grant.reference().get());
    let mut free: Vec<usize> = (0..count).collect();
    // The port last: who can connect finds everything ready.
    let mut channel = events.alloc_unbound(peer)?;
    println!("producer: {count} buffers for domain {peer} at port {}", channel.port());
    let (mut sequence, mut meter) = (0u64, Meter::new("producer"));
    let (mut wrong, mut connected) = (0u64, false);
    loop {
        let mut sent = false;
        while let Some(index) = free.pop() {
            let Some(buffer) = pool.get(index) else { continue };
            fill(buffer, sequence);
            let request = Full { reference: buffer.reference().get(), bytes: PAGE_SIZE as u32, sequence };
            if front.push(request).is_err() {
                free.push(index);
                break;
            }
            sequence += 1;
            sent = true;
        }
        if sent && front.publish() {
            // Before the consumer has connected there is nobody to hear it; it looks at the ring when it has.
            let _ = channel.notify();
        }
        let mut taken = false;
        while let Some(response) = front.pop().map_err(|_| GrantError::Status(-1))? {
            taken = true;
            wrong += u64::from(response.wrong);
            // The consumer's word: anything but one of our buffers is ignored.
            if let Some(index) =
                response.reference.checked_sub(first).filter(|&index| (index as usize) < count)
            {
                free.push(index as usize);
            }
            if meter.count(PAGE_SIZE as u64) {
                if wrong != 0 {
                    println!("producer: {wrong} buffers arrived damaged");
                }
                if let Some(left) = seconds.as_mut() {
                    *left = left.saturating_sub(1);
                    if *left == 0 {
                        return Ok(End::Time);
                    }
                }
            }
        }
        if !taken && !front.prepare_to_wait() {
            meter.sleeps += 1;
            if channel.fired_within(PATIENCE).await || channel.is_connected() {
                connected = true;
            } else if connected {
                return Ok(End::Gone);
            }
        }
    }
}

fn fill(buffer: &Grant, sequence: u64) {
    let mut words = [0u64; PAGE_SIZE / 8];
    for (at, word) in words.iter_mut().enumerate() {
        *word = stamp(sequence, at);
    }
    buffer.write_bytes(0, words.as_bytes());
}

fn is_right(mapping: &Mapping, page: usize, request: &Full) -> bool {
    let mut words = [0u64; PAGE_SIZE / 8];
    mapping.read_bytes(page * PAGE_SIZE, words.as_mut_bytes());
    words.iter().enumerate().all(|(at, &word)| word == stamp(request.sequence, at))
}

async fn find(events: &Events, peer: DomId) -> Channel {
    let mut told = false;
    loop {
        for port in PORTS {
            if let Ok(channel) = events.bind_interdomain(peer, Port::new(port)) {
                return channel;
            }
        }
        if !core::mem::replace(&mut told, true) {
            println!("consumer: waiting for domain {peer}");
        }
        time::after(Duration::from_millis(50)).await;
    }
}

/// Takes buffers from `peer` and checks them, for ever.
///
/// # Errors
/// When the ring cannot be mapped, or the producer's end of it is broken.
pub async fn consume(events: &Events, grants: &Grants, peer: DomId) -> Result<(), GrantError> {
    loop {
        take(events, grants, peer).await?;
        println!("consumer: domain {peer} is gone");
    }
}

/// One connection of the consumer.
async fn take(events: &Events, grants: &Grants, peer: DomId) -> Result<(), GrantError> {
    let mut channel = find(events, peer).await;
    let ring = grants.map(peer, &[GrantRef::new(GNTTAB_NR_RESERVED_ENTRIES)], Access::ReadWrite)?;
    println!("consumer: connected to domain {peer} by port {}", channel.port());
    let mut back: Back<Mapping, Full, Empty> = Back::new(ring);
    let mut meter = Meter::new("consumer");
    let mut batch: Vec<Full> = Vec::new();
    loop {
        batch.clear();
        while batch.len() < 32 {
            match back.pop().map_err(|_| GrantError::Status(-1))? {
                Some(request) => batch.push(request),
                None => break,
            }
        }
        if batch.is_empty() {
            if !back.prepare_to_wait() {
                meter.sleeps += 1;
                if !channel.fired_within(PATIENCE).await && !channel.is_connected() {
                    return Ok(());
                }
            }
            continue;
        }
        let references: Vec<GrantRef> =
            batch.iter().map(|request| GrantRef::new(request.reference)).collect();
        let mapping = match grants.map(peer, &references, Access::Read) {
            Ok(mapping) => mapping,
            // A producer that is being destroyed grants nothing more.
            Err(_) if !channel.is_connected() => return Ok(()),
            Err(error) => return Err(error),
        };
        for (page, request) in batch.iter().enumerate() {
            let right = is_right(&mapping, page, request);
            back.push(Empty { reference: request.reference, wrong: u32::from(!right) });
            if !right {
                println!("consumer: buffer {} is damaged", request.sequence);
            }
            meter.count(u64::from(request.bytes));
        }
        // Unmapped before the producer may write them again.
        drop(mapping);
        if back.publish() {
            // A producer that is gone is noticed at the next wait.
            let _ = channel.notify();
        }
    }
}
