//! What the shell does with devices: shows them, and reads, writes and measures disks.

use super::{Device, NetDevice, Storage, all, card, storage};
use crate::hypervisor;
use crate::say;
use crate::table::{Align, Table};
use crate::units::{Bytes, PAGE};
use crate::waiting::{First, first};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use blkback::disk::DiskError;
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use guest_sdk::hardware::DmaPage;
use guest_sdk::sync::Bell;
use guest_sdk::{executor, time};
use virtio::block::SECTOR;
use virtio::net::About;

/// Most sectors that are shown, or read at once.
const AT_ONCE: u64 = 256;

/// All devices, as a table.
pub fn table() -> String {
    let mut table = Table::new([
        ("NAME", Align::Left),
        ("PLACE", Align::Left),
        ("KIND", Align::Left),
        ("STATE", Align::Left),
        ("IN", Align::Right),
        ("OUT", Align::Right),
        ("REQUESTS", Align::Right),
        ("ERRORS", Align::Right),
        ("KICKS", Align::Right),
        ("INTERRUPTS", Align::Right),
    ]);
    for device in all() {
        match device {
            Device::Net(card) => {
                let (counters, (_, interrupts)) = (card.counters(), card.interrupts());
                table.row([
                    card.name().to_string(),
                    card.place().to_string(),
                    format!("network card: {}", card.about()),
                    state(card.is_broken()),
                    Bytes::new(counters.received_bytes).to_string(),
                    Bytes::new(counters.sent_bytes).to_string(),
                    (counters.received + counters.sent).to_string(),
                    counters.bad.to_string(),
                    "-".into(),
                    interrupts.to_string(),
                ]);
            }
            Device::Console(console) => {
                let (counters, (_, interrupts)) = (console.counters(), console.interrupts());
                table.row([
                    console.name().to_string(),
                    console.place().to_string(),
                    format!("console: {}", console.about()),
                    state(console.is_broken()),
                    Bytes::new(counters.received_bytes).to_string(),
                    Bytes::new(counters.sent_bytes).to_string(),
                    "-".into(),
                    "-".into(),
                    "-".into(),
                    interrupts.to_string(),
                ]);
            }
            Device::Disk(disk) => {
                let (counters, (_, interrupts)) = (disk.counters(), disk.interrupts());
                table.row([
                    disk.name().to_string(),
                    disk.place().to_string(),
                    format!("disk: {}", disk.about()),
                    state(disk.is_broken()),
                    Bytes::new(counters.sectors_read * SECTOR).to_string(),
                    Bytes::new(counters.sectors_written * SECTOR).to_string(),
                    counters.requests.to_string(),
                    counters.errors.to_string(),
                    counters.kicks.to_string(),
                    interrupts.to_string(),
                ]);
            }
        }
    }
    table.to_string()
}

fn state(broken: bool) -> String {
    if broken { "broken".into() } else { "up".into() }
}

/// Runs `device WORDS`.
///
/// # Errors
/// What to say; none when the words are no command of it.
pub async fn run(words: &[&str]) -> Result<(), Option<String>> {
    let number = |text: &str| text.parse::<u64>().map_err(|_| Some(format!("{text:?} is no number")));
    match words {
        ["read", disk, sector] => show(&storage(disk)?, number(sector)?).await?,
        ["crc", disk] => {
            let storage = storage(disk)?;
            let sectors = storage.geometry().sectors;
            say!("{disk}: CRC-32 {:08x} of {sectors} sectors", checksum(&storage, 0, sectors).await?);
        }
        ["crc", disk, sector, count] => {
            let (sector, count) = (number(sector)?, number(count)?);
            say!("{disk}: CRC-32 {:08x} of {count} sectors", checksum(&storage(disk)?, sector, count).await?);
        }
        ["write", disk, sector, text] => write(&storage(disk)?, number(sector)?, text).await?,
        ["fill", disk, sector, count, byte] => {
            let byte = u8::try_from(number(byte)?).map_err(|_| Some("a byte is 0 to 255".to_string()))?;
            fill(&storage(disk)?, number(sector)?, number(count)?, byte).await?;
        }
        ["zero", disk, sector, count] => {
            let (sector, count) = (number(sector)?, number(count)?);
            storage(disk)?.write_zeroes(sector, count).await.map_err(|error| error.to_string())?;
        }
        ["discard", disk, sector, count] => {
            let (sector, count) = (number(sector)?, number(count)?);
            storage(disk)?.discard(sector, count).await.map_err(|error| error.to_string())?;
        }
        ["arp", name, wanted, own] => {
            let mac = arp(&*card(name)?, address(wanted)?, address(own)?).await?;
            let bytes: Vec<String> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
            say!("it is at {}", bytes.join(":"));
        }
        ["ping", name, peer, own, depth, count] => {
            let (depth, count) = (number(depth)?, number(count)?);
            ping(&*card(name)?, address(peer)?, address(own)?, depth, count).await?;
        }
        ["flush", disk] => storage(disk)?.flush().await.map_err(|error| error.to_string())?,
        ["reset", disk] => storage(disk)?.device().restart(),
        ["measure", disk, depth, count, words @ ..] => {
            let work = Work::parse(number(depth)?, number(count)?, words)?;
            measure(&storage(disk)?, work).await?;
        }
        _ => return Err(None),
    }
    Ok(())
}

/// Shows a sector, 16 bytes a line; lines that repeat are left out.
async fn show(storage: &Storage, sector: u64) -> Result<(), String> {
    let mut bytes = [0; SECTOR as usize];
    storage.read(sector, &mut bytes).await.map_err(|error| error.to_string())?;
    let mut before: Option<&[u8]> = None;
    let mut left_out = false;
    for (number, line) in bytes.chunks(16).enumerate() {
        if before == Some(line) {
            if !left_out {
                say!("*");
            }
            left_out = true;
            continue;
        }
        (before, left_out) = (Some(line), false);
        let hex: Vec<String> = line.iter().map(|byte| format!("{byte:02x}")).collect();
        let printable = |byte: &u8| if (0x20..0x7f).contains(byte) { char::from(*byte) } else { '.' };
        let text: String = line.iter().map(printable).collect();
        say!("{:08x}  {}  {text}", sector * SECTOR + number as u64 * 16, hex.join(" "));
    }
    Ok(())
}

/// CRC-32 (IEEE 802.3) of sectors, as `crc32` or `cksum -a crc32b` of a file on the host give it.
async fn checksum(storage: &Storage, sector: u64, count: u64) -> Result<u32, String> {
    let mut crc = u32::MAX;
    let mut bytes = alloc::vec![0; (AT_ONCE * SECTOR) as usize];
    let (mut sector, end) = (sector, sector.checked_add(count).ok_or("no disk is so large")?);
    while sector < end {
        let now = (end - sector).min(AT_ONCE);
        let part = bytes.get_mut(..(now * SECTOR) as usize).unwrap_or_default();
        storage.read(sector, part).await.map_err(|error| format!("sector {sector}: {error}"))?;
        crc = part.iter().fold(crc, |crc, byte| crc32(crc, *byte));
        sector += now;
    }
    Ok(!crc)
}

fn crc32(crc: u32, byte: u8) -> u32 {
    const POLYNOMIAL: u32 = 0xedb8_8320;
    (0..8).fold(crc ^ u32::from(byte), |crc, _| crc >> 1 ^ if crc & 1 != 0 { POLYNOMIAL } else { 0 })
}

/// Writes a text to the start of a sector, zeros behind it, and has it durable.
async fn write(storage: &Storage, sector: u64, text: &str) -> Result<(), String> {
    let mut bytes = [0; SECTOR as usize];
    let text = text.as_bytes();
    bytes.get_mut(..text.len()).ok_or("a sector has 512 bytes")?.copy_from_slice(text);
    storage.write(sector, &bytes).await.map_err(|error| error.to_string())?;
    storage.flush().await.map_err(|error| error.to_string())
}

async fn fill(storage: &Storage, sector: u64, count: u64, byte: u8) -> Result<(), String> {
    let bytes = alloc::vec![byte; (AT_ONCE.min(count) * SECTOR) as usize];
    let (mut sector, end) = (sector, sector.checked_add(count).ok_or("no disk is so large")?);
    while sector < end {
        let now = (end - sector).min(AT_ONCE);
        let part = bytes.get(..(now * SECTOR) as usize).unwrap_or_default();
        storage.write(sector, part).await.map_err(|error| format!("sector {sector}: {error}"))?;
        sector += now;
    }
    Ok(())
}

/// An IPv4 address.
fn address(text: &str) -> Result<[u8; 4], String> {
    let mut bytes = text.split('.').map(str::parse::<u8>);
    let address = core::array::from_fn(|_| bytes.next().and_then(Result::ok));
    match (address, bytes.next()) {
        ([Some(a), Some(b), Some(c), Some(d)], None) => Ok([a, b, c, d]),
        _ => Err(format!("{text:?} is no address, as in 10.0.2.2")),
    }
}

/// How long somebody has to answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// Asks who has an address (RFC 826); the switches do not hear the card meanwhile.
async fn arp(card: &NetDevice, wanted: [u8; 4], own: [u8; 4]) -> Result<[u8; 6], String> {
    let _lent = card.lend();
    let mac = card.mac();
    // Ethernet, IPv4, lengths of their addresses, a request.
    let what = [8, 6, 0, 1, 8, 0, 6, 4, 0, 1];
    let request = [&[0xff; 6][..], &mac, &what, &mac, &own, &[0; 6], &wanted, &[0; 18]].concat();
    // A moment later: somebody is waiting by then, so the answer interrupts.
    let ask = async {
        time::after(Duration::from_millis(20)).await;
        // Without room for it nobody answers.
        card.send(About::default(), &request);
        card.kick();
        core::future::pending::<()>().await;
    };
    let answer = async {
        let mut frame = [0; 1600];
        loop {
            let (count, _) = card.receive(&mut frame).await;
            let field = |from: usize, to: usize| frame.get(from..to).unwrap_or_default();
            // A reply from the one that was asked for.
            if count >= 42
                && field(12, 14) == [8, 6]
                && field(20, 22) == [0, 2]
                && field(28, 32) == wanted
                && let Some(mac) = field(22, 28).first_chunk::<6>()
            {
                return *mac;
            }
        }
    };
    match first(first(answer, ask), time::after(PATIENCE)).await {
        First::One(First::One(found)) => Ok(found),
        First::One(First::Other(())) | First::Other(()) => Err("nobody answers".into()),
    }
}

/// The checksum of the Internet (RFC 1071), of an even number of bytes.
fn internet_checksum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes.chunks_exact(2).filter_map(|word| word.first_chunk());
    // At most 750 words: this does not overflow.
    let sum: u32 = words.map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    (!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes()
}

/// Has `count` packets of 1500 bytes echoed (RFC 792), `depth` at a time, and says how many came back in a second.
///
/// `role=echo` of the guest `frames` does the same by a virtual card.
async fn ping(card: &NetDevice, peer: [u8; 4], own: [u8; 4], depth: u64, count: u64) -> Result<(), String> {
    const IDENT: [u8; 2] = [0x22, 0x2c];
    if count == 0 || !(1..=64).contains(&depth) {
        return Err("at least one packet, 1 to 64 at a time".into());
    }
    let mac = arp(card, peer, own).await?;
    let _lent = card.lend();
    let mut packet = [&[0x45, 0, 5, 220, 0, 0, 0, 0, 64, 1, 0, 0], &own[..], &peer].concat();
    let sum = internet_checksum(&packet);
    if let Some(place) = packet.get_mut(10..12) {
        place.copy_from_slice(&sum);
    }
    let content: Vec<u8> = (0..1472).map(|at| at as u8).collect();
    let sum = internet_checksum(&[&[8, 0, 0, 0], &IDENT[..], &[0, 1], &content].concat());
    let echo = [&[8, 0], &sum[..], &IDENT, &[0, 1], &content].concat();
    let request = [&mac[..], &card.mac(), &[8, 0], &packet, &echo].concat();
    let (mut sent, mut came) = (0, 0);
    let mut frame = [0; 1600];
    let begun = time::now_ns();
    while came < count {
        while sent < count && sent - came < depth && card.send(About::default(), &request) {
            sent += 1;
        }
        card.kick();
        match first(card.receive(&mut frame), time::after(PATIENCE)).await {
            First::One((bytes, _)) => {
                let field = |from: usize, to: usize| frame.get(from..to).unwrap_or_default();
                let head = bytes == request.len() && field(12, 14) == [8, 0] && field(23, 24) == [1];
                came += u64::from(head && field(34, 36) == [0, 0] && field(38, 40) == IDENT);
            }
            First::Other(()) => return Err(format!("{came} of {sent} packets came back")),
        }
    }
    let spent = (time::now_ns() - begun).max(1);
    say!(
        "{count} packets of 1500 bytes echoed, {depth} at a time: {} a second",
        count * 1_000_000_000 / spent
    );
    Ok(())
}

/// What a disk is measured with.
struct Work {
    write: bool,
    /// One after the other instead of here and there.
    sequential: bool,
    /// Of a request: whole pages.
    bytes: u64,
    /// Requests under way at a time.
    depth: u64,
    count: u64,
}

/// Bytes of a request at most.
const MOST_MEASURED: u64 = 256 * 1024;

impl Work {
    fn parse(depth: u64, count: u64, words: &[&str]) -> Result<Work, Option<String>> {
        let mut work = Work { write: false, sequential: false, bytes: PAGE, depth, count };
        for word in words {
            match *word {
                "write" => work.write = true,
                "sequential" => work.sequential = true,
                bytes => work.bytes = bytes.parse().map_err(|_| None)?,
            }
        }
        let whole = work.bytes.is_multiple_of(PAGE) && (1..=MOST_MEASURED).contains(&work.bytes);
        if !whole || count == 0 || !(1..=64).contains(&depth) {
            let most = Bytes::new(MOST_MEASURED);
            return Err(Some(format!(
                "at least one request of whole pages, up to {most}, and 1 to 64 at a time"
            )));
        }
        Ok(work)
    }

    /// Where a request begins: its number in blocks of its own size, of which the disk has `places`.
    fn place(&self, number: u64, places: u64) -> u64 {
        // Else places that are far apart, and each of them in the end.
        if self.sequential { number % places } else { number.wrapping_mul(7919) % places }
    }
}

/// Reads or writes `count` times, `depth` at a time, and says what one cost and how fast that was.
async fn measure(storage: &Storage, work: Work) -> Result<(), String> {
    let sectors = work.bytes / SECTOR;
    let places = storage.geometry().sectors / sectors;
    if places == 0 {
        return Err(format!("the disk has fewer than {sectors} sectors"));
    }
    let busy = || -> Result<(u64, u64), String> {
        let below = hypervisor::get();
        let idle = below.idle_ns().map_err(|errno| format!("the hypervisor answers {errno}"))?;
        let own = below.domain(guest_sdk::id()).map_err(|errno| format!("the hypervisor answers {errno}"))?;
        Ok((idle.iter().sum(), own.cpu_time_ns))
    };
    let work = Arc::new(work);
    let next = Arc::new(AtomicU64::new(0));
    let failed = Arc::new(AtomicU64::new(0));
    let left = Arc::new((AtomicU64::new(work.depth), Bell::new()));
    let (interrupts, kicks) = (storage.device().interrupts().1, storage.device().counters().kicks);
    let (start, before) = (time::now_ns(), busy()?);
    for _ in 0..work.depth {
        let (storage, work, next, failed, left) =
            (storage.clone(), Arc::clone(&work), Arc::clone(&next), Arc::clone(&failed), Arc::clone(&left));
        executor::spawn(async move {
            let mut pages = Vec::new();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= work.count {
                    break;
                }
                while (pages.len() as u64) < work.bytes / PAGE
                    && let Ok(page) = DmaPage::new()
                {
                    pages.push(page);
                }
                let sector = work.place(number, places) * sectors;
                let lent = core::mem::take(&mut pages);
                let result = if lent.len() as u64 * PAGE != work.bytes {
                    Err(DiskError::NoSpace)
                } else if work.write {
                    storage.write_pages(sector, lent).await
                } else {
                    storage.read_pages(sector, lent).await
                };
                match result {
                    Ok(back) => pages = back,
                    Err(_) => _ = failed.fetch_add(1, Ordering::Relaxed),
                }
            }
            if left.0.fetch_sub(1, Ordering::AcqRel) == 1 {
                left.1.ring();
            }
        });
    }
    loop {
        let rings = left.1.rings();
        if left.0.load(Ordering::Acquire) == 0 {
            break;
        }
        left.1.after(rings).await;
    }
    let (took, after) = (time::now_ns() - start, busy()?);
    let (interrupts, kicks) =
        (storage.device().interrupts().1 - interrupts, storage.device().counters().kicks - kicks);
    let idle = after.0.saturating_sub(before.0);
    let own = after.1.saturating_sub(before.1);
    let Work { write, sequential, bytes, depth, count } = *work;
    let kib_s = (count * bytes / 1024).saturating_mul(1_000_000_000) / took.max(1);
    say!(
        "{count} {}{} of {}, {depth} at a time: {} ns each of dom0's time ({took} ns in all, {idle} idle, {kib_s} KiB/s), {interrupts} \
         interrupts, {kicks} kicks, {} failed",
        if sequential { "sequential " } else { "" },
        if write { "writes" } else { "reads" },
        Bytes::new(bytes),
        own / count,
        failed.load(Ordering::Relaxed)
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_checksum_is_the_one_that_everybody_has() {
        let crc = b"123456789".iter().fold(u32::MAX, |crc, byte| super::crc32(crc, *byte));
        assert_eq!(!crc, 0xcbf4_3926);
    }
}
