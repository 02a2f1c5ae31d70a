//! A hostile front end of a block device: whatever it does, it gets an error or is disconnected, and may begin anew.
//!
//! It wants a disk `xvda` of at least 64 KiB that can be written. As the first domain, which has no back end, it skips all.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::format;
use alloc::string::ToString;
use alloc::vec::Vec;
use core::future::Future;
use core::sync::atomic::Ordering;
use core::time::Duration;
use guest_sdk::abi::GrantRef;
use guest_sdk::abi::io::blkif::{
    ABI, BlkifOp, BlkifRequest, BlkifRequestDiscard, BlkifRequestIndirect, BlkifResponse, BlkifSegment,
    RSP_EOPNOTSUPP, RSP_ERROR, RSP_OKAY, keys,
};
use guest_sdk::abi::io::ring::RingHeader;
use guest_sdk::block::device_number;
use guest_sdk::events::{Channel, Events};
use guest_sdk::grants::GrantedPages;
use guest_sdk::memory::Access;
use guest_sdk::ring::{Front, SharedPage};
use guest_sdk::sync::{First, first};
use guest_sdk::testkit::{self, Random, Stop, Verdict, cases, check, check_eq, fail, skip};
use guest_sdk::xenbus::{Frontend, XenbusError, XenbusState as S};
use guest_sdk::xenstore::SharedStore;
use guest_sdk::{Domain, entry, executor, time};
use spin::Once;
use zerocopy::{FromBytes, Immutable, IntoBytes};

#[entry]
fn main(domain: Domain) {
    testkit::run(
        domain,
        &cases![
            bad_requests_are_answered,
            index_jumps_end_the_connection,
            requests_that_change_while_they_are_read,
            closing_half_way_frees_the_grants,
            an_event_storm_hides_no_request,
            nonsense_in_xenstore_is_refused,
            pages_kept_are_bounded,
        ],
    )
}

static STORE: Once<SharedStore> = Once::new();

type Ring = Front<GrantedPages, BlkifRequest, BlkifResponse>;

/// A connected front end that puts anything into its ring.
struct Raw {
    front: Frontend,
    ring: Ring,
    channel: Channel,
    pages: GrantedPages,
    device: u32,
}

fn failed(error: impl core::fmt::Display) -> Stop {
    Stop::Fail(error.to_string())
}

fn in_time<T>(what: &str, work: impl Future<Output = Result<T, Stop>>) -> Result<T, Stop> {
    executor::block_on(async {
        match first(work, time::after(Duration::from_secs(20))).await {
            First::One(result) => result,
            First::Other(()) => fail(format!("{what}: nothing for 20 seconds")),
        }
    })
}

fn store(domain: &mut Domain) -> Result<SharedStore, Stop> {
    if let Some(store) = STORE.get() {
        return Ok(store.clone());
    }
    match domain.xenstore() {
        Some(client) => Ok(STORE.call_once(|| SharedStore::new(client)).clone()),
        None => skip("the first domain has no back end"),
    }
}

async fn open(store: &SharedStore) -> Result<(Frontend, u32), Stop> {
    let device = device_number("xvda").ok_or("xvda has a number")?;
    let mut front = Frontend::open(store, &format!("device/vbd/{device}")).await.map_err(failed)?;
    front.set_state(S::Initialising).await.map_err(failed)?;
    loop {
        match front.wait_for(|state| state == S::InitWait).await {
            Ok(_) => return Ok((front, device)),
            Err(XenbusError::Closed) => front.changed().await.map_err(failed)?,
            Err(error) => return Err(failed(error)),
        };
    }
}

impl Raw {
    fn connect(domain: &mut Domain) -> Result<Self, Stop> {
        let store = store(domain)?;
        in_time("connecting", async {
            let (mut front, device) = open(&store).await?;
            let to = front.backend_id();
            let ring: Ring = Front::new(GrantedPages::new(1, to, Access::ReadWrite)?);
            let channel = Events::alloc_unbound(&domain.events, to)?;
            let reference = ring.page().references()[0];
            let nodes = [
                ("ring-ref", reference.to_string()),
                ("event-channel", channel.port().to_string()),
                (keys::PROTOCOL, ABI.to_string()),
                (keys::PERSISTENT, "1".to_string()),
            ];
            front.publish(&nodes, S::Initialised).await.map_err(failed)?;
            front.wait_for(|state| state == S::Connected).await.map_err(failed)?;
            front.set_state(S::Connected).await.map_err(failed)?;
            let pages = GrantedPages::new(12, to, Access::ReadWrite)?;
            Ok(Self { front, ring, channel, pages, device })
        })
    }

    fn segment(&self, page: usize) -> BlkifSegment {
        BlkifSegment { gref: self.pages.references()[page], first_sect: 0, last_sect: 7, pad0: 0 }
    }

    fn read(&self, id: u64, sector_number: u64, segments: &[BlkifSegment]) -> BlkifRequest {
        let mut request = BlkifRequest {
            operation: BlkifOp::Read.number() as u8,
            nr_segments: segments.len() as u8,
            handle: self.device as u16,
            id,
            sector_number,
            ..BlkifRequest::default()
        };
        for (to, from) in request.seg.iter_mut().zip(segments) {
            *to = *from;
        }
        request
    }

    fn publish(&mut self) {
        if self.ring.publish() {
            let _ = self.channel.notify();
        }
    }

    /// The next answer.
    fn answer(&mut self) -> Result<BlkifResponse, Stop> {
        let (ring, channel) = (&mut self.ring, &mut self.channel);
        in_time("an answer", async {
            loop {
                if let Some(response) = ring.pop().map_err(failed)? {
                    return Ok(response);
                }
                if !ring.prepare_to_wait() {
                    channel.fired().await;
                }
            }
        })
    }

    fn ask(&mut self, request: &BlkifRequest) -> Result<i16, Stop> {
        check!(self.ring.push(*request).is_ok(), "the ring is full");
        self.publish();
        let response = self.answer()?;
        check_eq!(response.id, request.id);
        Ok(response.status)
    }

    fn still_works(&mut self) -> Verdict {
        let request = self.read(4711, 0, &[self.segment(0)]);
        check_eq!(self.ask(&request)?, RSP_OKAY);
        Ok(())
    }

    fn wait_closing(&mut self) -> Verdict {
        let front = &mut self.front;
        in_time("the back end closing", async {
            front.wait_for(|state| matches!(state, S::Closing | S::Closed)).await.map_err(failed)
        })
        .map(drop)
    }

    /// Closes from this side; all grants are free afterwards.
    fn close(mut self) -> Verdict {
        let front = &mut self.front;
        in_time("closing", async { front.close().await.map_err(failed) })?;
        check!(!self.ring.page().in_use(), "the ring is still mapped");
        check!(!self.pages.in_use(), "pages are still mapped");
        Ok(())
    }
}

fn widen(form: &(impl IntoBytes + Immutable)) -> BlkifRequest {
    let mut bytes = [0; size_of::<BlkifRequest>()];
    bytes[..form.as_bytes().len()].copy_from_slice(form.as_bytes());
    BlkifRequest::read_from_bytes(&bytes).unwrap_or_default()
}

fn bad_requests_are_answered(domain: &mut Domain) -> Verdict {
    let mut raw = Raw::connect(domain)?;
    let good = raw.segment(1);
    let nobodys = BlkifSegment { gref: GrantRef::new(30_000), ..good };
    let huge = BlkifSegment { gref: GrantRef::new(u32::MAX), ..good };
    let backwards = BlkifSegment { first_sect: 5, last_sect: 4, ..good };
    let beyond = BlkifSegment { last_sect: 8, ..good };
    let list = raw.pages.references()[11];
    let indirect = |indirect_op: u8, nr_segments: u16, page: GrantRef| {
        let mut request = BlkifRequestIndirect {
            operation: BlkifOp::Indirect.number() as u8,
            indirect_op,
            nr_segments,
            id: 7,
            handle: raw.device as u16,
            ..Default::default()
        };
        request.indirect_grefs[0] = page;
        widen(&request)
    };
    raw.pages.write_bytes(11 * 4096, [nobodys, backwards].as_bytes());
    let discard = |sector_number, nr_sectors| {
        widen(&BlkifRequestDiscard { operation: 5, id: 7, sector_number, nr_sectors, ..Default::default() })
    };
    let bad = [
        ("a grant that is none", raw.read(7, 0, &[nobodys]), RSP_ERROR),
        ("one far outside the table", raw.read(7, 0, &[good, huge]), RSP_ERROR),
        ("sectors beyond the end", raw.read(7, 1 << 40, &[good]), RSP_ERROR),
        ("sectors whose sum overflows", raw.read(7, u64::MAX - 2, &[good]), RSP_ERROR),
        ("a segment backwards", raw.read(7, 0, &[backwards]), RSP_ERROR),
        ("a segment beyond its page", raw.read(7, 0, &[beyond]), RSP_ERROR),
        ("no segment", raw.read(7, 0, &[]), RSP_ERROR),
        ("255 segments", BlkifRequest { nr_segments: 255, ..raw.read(7, 0, &[good]) }, RSP_ERROR),
        ("another device", BlkifRequest { handle: 1, ..raw.read(7, 0, &[good]) }, RSP_ERROR),
        ("operation 200", BlkifRequest { operation: 200, ..raw.read(7, 0, &[good]) }, RSP_EOPNOTSUPP),
        ("indirect segments that are bad", indirect(0, 2, list), RSP_ERROR),
        ("indirect segments that are nowhere", indirect(1, 2, GrantRef::new(29_999)), RSP_ERROR),
        ("65535 indirect segments", indirect(0, 65535, list), RSP_ERROR),
        ("an indirect discard", indirect(5, 1, list), RSP_EOPNOTSUPP),
        ("a discard beyond the end", discard(0, 1 << 50), RSP_ERROR),
        ("a discard whose sum overflows", discard(u64::MAX - 1, 8), RSP_ERROR),
        ("a discard of nothing", discard(0, 0), RSP_ERROR),
    ];
    for (about, request, status) in &bad {
        let got = raw.ask(request)?;
        check!(got == *status, "{about}: {got} instead of {status}");
        raw.still_works()?;
    }
    raw.close()
}

fn index_jumps_end_the_connection(domain: &mut Domain) -> Verdict {
    for wild in [33, 5000, 1 << 31, u32::MAX] {
        let mut raw = Raw::connect(domain)?;
        raw.still_works()?;
        let word = raw.ring.page().word(RingHeader::REQ_PROD);
        word.store(word.load(Ordering::Relaxed).wrapping_add(wild), Ordering::Release);
        raw.channel.notify()?;
        raw.wait_closing()?;
        raw.close()?;
    }
    // And it may begin anew.
    let mut raw = Raw::connect(domain)?;
    raw.still_works()?;
    raw.close()
}

fn requests_that_change_while_they_are_read(domain: &mut Domain) -> Verdict {
    let mut raw = Raw::connect(domain)?;
    let mut random = Random::with_seed(1);
    let (mut done, mut refused) = (0, 0);
    for _ in 0..50 {
        for id in 0..32 {
            let request = raw.read(id, id, &[raw.segment(id as usize % 11)]);
            check!(raw.ring.push(request).is_ok(), "the ring is full");
        }
        raw.publish();
        // On one processor dom0 reads while this is interrupted, on several at any moment.
        for _ in 0..200 {
            // Not the identities: the answers are counted by them.
            let slot = 64 + random.usize(..32) * 112;
            raw.ring.page().write_bytes(slot, &random.u64(..).to_le_bytes());
            raw.ring.page().write_bytes(slot + 16 + random.usize(..10) * 8, &random.u64(..).to_le_bytes());
        }
        for _ in 0..32 {
            if raw.answer()?.status == RSP_OKAY { done += 1 } else { refused += 1 }
        }
    }
    guest_sdk::println!("{done} done, {refused} refused");
    check_eq!(done + refused, 1600);
    raw.still_works()?;
    raw.close()
}

fn closing_half_way_frees_the_grants(domain: &mut Domain) -> Verdict {
    for _ in 0..8 {
        let mut raw = Raw::connect(domain)?;
        for id in 0..32 {
            let segments: Vec<BlkifSegment> = (0..11).map(|page| raw.segment(page)).collect();
            let request = raw.read(id, 0, &segments);
            check!(raw.ring.push(request).is_ok(), "the ring is full");
        }
        raw.publish();
        raw.close()?;
    }
    Ok(())
}

fn an_event_storm_hides_no_request(domain: &mut Domain) -> Verdict {
    let mut raw = Raw::connect(domain)?;
    for round in 0..20_000 {
        raw.channel.notify()?;
        if round % 1000 == 0 {
            raw.still_works()?;
        }
    }
    raw.close()
}

fn nonsense_in_xenstore_is_refused(domain: &mut Domain) -> Verdict {
    let store = store(domain)?;
    let cases = [
        [("ring-ref", "abc"), ("event-channel", "1")],
        [("ring-ref", "4000000000"), ("event-channel", "1")],
        [("ring-ref", "8"), ("event-channel", "99999")],
        [("ring-ref", ""), ("event-channel", "")],
        [(keys::RING_PAGE_ORDER, "77"), ("event-channel", "1")],
        [(keys::NUM_QUEUES, "100000"), ("event-channel", "1")],
        [(keys::PROTOCOL, "vax-abi"), ("event-channel", "1")],
    ];
    for nodes in cases {
        in_time("refusing nonsense", async {
            let (mut front, _) = open(&store).await?;
            let nodes = nodes.map(|(name, value)| (name, value.to_string()));
            front.publish(&nodes, S::Initialised).await.map_err(failed)?;
            front.wait_for(|state| matches!(state, S::Closing | S::Closed)).await.map_err(failed)?;
            front.close().await.map_err(failed)?;
            for (name, _) in &nodes {
                store.lock().await.remove(&format!("{}/{name}", front.path())).await.map_err(failed)?;
            }
            Ok(())
        })?;
    }
    let mut raw = Raw::connect(domain)?;
    raw.still_works()?;
    raw.close()
}

fn pages_kept_are_bounded(domain: &mut Domain) -> Verdict {
    let mut raw = Raw::connect(domain)?;
    let mut all = Vec::new();
    for _ in 0..300 {
        let pages = GrantedPages::new(10, raw.front.backend_id(), Access::ReadWrite)?;
        let segments: Vec<BlkifSegment> =
            pages.references().iter().map(|&gref| BlkifSegment { gref, ..raw.segment(0) }).collect();
        let request = raw.read(1, 0, &segments);
        check_eq!(raw.ask(&request)?, RSP_OKAY);
        all.push(pages);
    }
    // Ten at a time: some groups are kept, some not.
    let kept = all.iter().filter(|pages| pages.in_use()).count();
    guest_sdk::println!("{kept} of {} groups of pages are kept", all.len());
    check!(kept > 0 && kept < 260, "{kept} of {} groups are kept mapped", all.len());
    raw.still_works()?;
    raw.close()?;
    check!(!all.iter().any(GrantedPages::in_use), "pages are still mapped");
    Ok(())
}
