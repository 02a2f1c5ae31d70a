//! What a request says: decoded from a copy, judged, nothing done.

use crate::disk::Properties;
use core::fmt;
use hypercall_abi::GrantRef;
use hypercall_abi::io::blkif::{
    BlkifOp, BlkifRequest, BlkifRequestDiscard, BlkifRequestIndirect, MAX_INDIRECT_PAGES_PER_REQUEST,
    MAX_SEGMENTS_PER_REQUEST, RSP_EOPNOTSUPP, RSP_ERROR, SEGMENTS_PER_INDIRECT_PAGE,
};
use zerocopy::{FromBytes, IntoBytes};

/// Most segments of an indirect request: what one page of segments could hold would be 512, 2 MiB a request; this is 256 KiB.
pub const MAX_INDIRECT_SEGMENTS: usize = 64;
const _: () = assert!(MAX_INDIRECT_SEGMENTS <= SEGMENTS_PER_INDIRECT_PAGE * MAX_INDIRECT_PAGES_PER_REQUEST);

/// What is wrong with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// An operation that is not in the protocol.
    Operation(u8),
    /// Discarding, on a disk that cannot.
    NoDiscard,
    /// No segments, more than there may be, or one that is no part of a page.
    Segments,
    /// Sectors outside the disk.
    Range,
    /// Another device than this one.
    Handle(u16),
    /// Writing to what is only read.
    ReadOnly,
    /// A page that is not granted to us, or not so.
    Grant,
}

impl Fault {
    /// The response's status.
    #[must_use]
    pub fn status(self) -> i16 {
        match self {
            Self::Operation(_) | Self::NoDiscard => RSP_EOPNOTSUPP,
            _ => RSP_ERROR,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Operation(number) => write!(f, "operation {number}, which is none"),
            Self::NoDiscard => f.write_str("a discard, which was not offered"),
            Self::Segments => f.write_str("segments that are no parts of pages, or too many"),
            Self::Range => f.write_str("sectors beyond the end of the disk"),
            Self::Handle(handle) => write!(f, "a request for another device ({handle})"),
            Self::ReadOnly => f.write_str("a write to a disk that is only read"),
            Self::Grant => f.write_str("a page that is not granted"),
        }
    }
}

/// A request that may be carried out, as far as can be said without its segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Reading or writing.
    Transfer {
        /// Writing.
        write: bool,
        /// After all before it, before all after it, and durable.
        ordered: bool,
        /// First sector.
        sector: u64,
        /// Where the segments are.
        segments: Segments,
    },
    /// Making durable what was written.
    Flush,
    /// Forgetting.
    Discard {
        /// First sector.
        sector: u64,
        /// How many.
        sectors: u64,
    },
}

/// Where a request's segments are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segments {
    /// So many in the request itself.
    Direct(usize),
    /// In pages of their own.
    Indirect {
        /// The pages; those behind the last one needed mean nothing.
        pages: [GrantRef; MAX_INDIRECT_PAGES_PER_REQUEST],
        /// How many segments.
        count: usize,
    },
}

/// The device as its requests name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The number of the virtual device.
    pub device: u32,
}

impl Identity {
    fn check(self, handle: u16) -> Result<(), Fault> {
        // The field is narrower than the numbers are.
        if handle == self.device as u16 { Ok(()) } else { Err(Fault::Handle(handle)) }
    }
}

/// The same bytes as another form of request; they have one length.
fn form<T: FromBytes>(raw: &BlkifRequest) -> Result<T, Fault> {
    T::read_from_prefix(raw.as_bytes()).map(|(form, _)| form).map_err(|_| Fault::Operation(raw.operation))
}

/// Identity of a request, for its response; it is at the same place in all forms.
#[must_use]
pub fn id(raw: &BlkifRequest) -> u64 {
    raw.id
}

/// Judges a request.
///
/// # Errors
/// What is wrong with it.
pub fn decode(raw: &BlkifRequest, identity: Identity, disk: &Properties) -> Result<Work, Fault> {
    let operation = BlkifOp::from_number(u64::from(raw.operation)).ok_or(Fault::Operation(raw.operation))?;
    let writable = || if disk.readonly { Err(Fault::ReadOnly) } else { Ok(()) };
    match operation {
        BlkifOp::Read | BlkifOp::Write | BlkifOp::WriteBarrier | BlkifOp::FlushDiskcache => {
            identity.check(raw.handle)?;
            let count = usize::from(raw.nr_segments);
            if count > MAX_SEGMENTS_PER_REQUEST {
                return Err(Fault::Segments);
            }
            if count == 0 {
                return match operation {
                    // An empty barrier is a flush, as Linux has it.
                    BlkifOp::FlushDiskcache | BlkifOp::WriteBarrier => Ok(Work::Flush),
                    _ => Err(Fault::Segments),
                };
            }
            let write = operation != BlkifOp::Read;
            if write {
                writable()?;
            }
            let ordered = matches!(operation, BlkifOp::WriteBarrier | BlkifOp::FlushDiskcache);
            let (sector, segments) = (raw.sector_number, Segments::Direct(count));
            Ok(Work::Transfer { write, ordered, sector, segments })
        }
        BlkifOp::Indirect => {
            let raw: BlkifRequestIndirect = form(raw)?;
            identity.check(raw.handle)?;
            let write = match BlkifOp::from_number(u64::from(raw.indirect_op)) {
                Some(BlkifOp::Read) => false,
                Some(BlkifOp::Write) => true,
                _ => return Err(Fault::Operation(raw.indirect_op)),
            };
            let count = usize::from(raw.nr_segments);
            if count == 0 || count > MAX_INDIRECT_SEGMENTS {
                return Err(Fault::Segments);
            }
            if write {
                writable()?;
            }
            let segments = Segments::Indirect { pages: raw.indirect_grefs, count };
            Ok(Work::Transfer { write, ordered: false, sector: raw.sector_number, segments })
        }
        BlkifOp::Discard => {
            // Without a look at the handle: Linux leaves it out here.
            let raw: BlkifRequestDiscard = form(raw)?;
            if disk.discard_granularity.is_none() {
                return Err(Fault::NoDiscard);
            }
            writable()?;
            check_range(raw.sector_number, raw.nr_sectors, disk)?;
            Ok(Work::Discard { sector: raw.sector_number, sectors: raw.nr_sectors })
        }
        BlkifOp::Reserved1 => Err(Fault::Operation(raw.operation)),
    }
}

/// Whether sectors are all on the disk, and at least one.
///
/// # Errors
/// [`Fault::Range`].
pub fn check_range(sector: u64, sectors: u64, disk: &Properties) -> Result<(), Fault> {
    let end = sector.checked_add(sectors).ok_or(Fault::Range)?;
    if sectors == 0 || end > disk.sectors { Err(Fault::Range) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::{Fault, Identity, Segments, Work, check_range, decode};
    use crate::disk::Properties;
    use hypercall_abi::io::blkif::{BlkifRequest, BlkifRequestDiscard, BlkifRequestIndirect};
    use zerocopy::{FromBytes, IntoBytes};

    const DISK: Properties =
        Properties { sectors: 100, readonly: false, discard_granularity: Some(4096), physical_sector: 512 };
    const READONLY: Properties = Properties { readonly: true, discard_granularity: None, ..DISK };
    const IDENTITY: Identity = Identity { device: 0x1234_ca00 };

    fn request(operation: u8, nr_segments: u8) -> BlkifRequest {
        BlkifRequest { operation, nr_segments, handle: 0xca00, sector_number: 7, ..Default::default() }
    }

    fn wide<T: IntoBytes + zerocopy::Immutable>(form: &T) -> BlkifRequest {
        let mut bytes = [0; size_of::<BlkifRequest>()];
        bytes[..size_of::<T>()].copy_from_slice(form.as_bytes());
        BlkifRequest::read_from_bytes(&bytes).unwrap()
    }

    #[test]
    fn reads_and_writes_have_one_to_eleven_segments() {
        for (operation, write, ordered) in
            [(0, false, false), (1, true, false), (2, true, true), (3, true, true)]
        {
            let segments = Segments::Direct(11);
            let work = Work::Transfer { write, ordered, sector: 7, segments };
            assert_eq!(decode(&request(operation, 11), IDENTITY, &DISK), Ok(work));
            assert_eq!(decode(&request(operation, 12), IDENTITY, &DISK), Err(Fault::Segments));
            assert_eq!(decode(&request(operation, 255), IDENTITY, &DISK), Err(Fault::Segments));
            let none = if ordered { Ok(Work::Flush) } else { Err(Fault::Segments) };
            assert_eq!(decode(&request(operation, 0), IDENTITY, &DISK), none);
            let refused = decode(&request(operation, 1), IDENTITY, &READONLY);
            assert_eq!(refused.is_err(), write);
            let other = BlkifRequest { handle: 3, ..request(operation, 1) };
            assert_eq!(decode(&other, IDENTITY, &DISK), Err(Fault::Handle(3)));
        }
        assert_eq!(decode(&request(3, 0), IDENTITY, &READONLY), Ok(Work::Flush), "nothing is written");
    }

    #[test]
    fn operations_that_are_none_are_not_supported() {
        for operation in (4..=255).filter(|&number| number != 5 && number != 6) {
            let fault = decode(&request(operation, 1), IDENTITY, &DISK).unwrap_err();
            assert_eq!((fault, fault.status()), (Fault::Operation(operation), -2));
        }
    }

    #[test]
    fn indirect_requests_are_reads_or_writes() {
        let indirect = |indirect_op, nr_segments| {
            wide(&BlkifRequestIndirect {
                operation: 6,
                indirect_op,
                nr_segments,
                handle: 0xca00,
                ..Default::default()
            })
        };
        for (kind, count, good) in
            [(0, 1, true), (1, 64, true), (0, 0, false), (0, 65, false), (1, 65535, false)]
        {
            assert_eq!(decode(&indirect(kind, count), IDENTITY, &DISK).is_ok(), good, "{kind} {count}");
        }
        for kind in [2, 3, 5, 6, 99] {
            assert_eq!(decode(&indirect(kind, 1), IDENTITY, &DISK), Err(Fault::Operation(kind)));
        }
        assert_eq!(decode(&indirect(1, 1), IDENTITY, &READONLY), Err(Fault::ReadOnly));
        let other = BlkifRequestIndirect { operation: 6, nr_segments: 1, ..Default::default() };
        assert_eq!(decode(&wide(&other), IDENTITY, &DISK), Err(Fault::Handle(0)));
    }

    #[test]
    fn discards_are_checked_with_overflow() {
        let discard = |sector_number, nr_sectors| {
            wide(&BlkifRequestDiscard { operation: 5, sector_number, nr_sectors, ..Default::default() })
        };
        assert_eq!(decode(&discard(1, 99), IDENTITY, &DISK), Ok(Work::Discard { sector: 1, sectors: 99 }));
        for (sector, count) in [(1, 100), (0, 0), (u64::MAX, 1), (1, u64::MAX), (100, 1)] {
            assert_eq!(decode(&discard(sector, count), IDENTITY, &DISK), Err(Fault::Range));
        }
        assert_eq!(decode(&discard(0, 1), IDENTITY, &READONLY).map_err(Fault::status), Err(-2));
    }

    #[test]
    fn a_range_ends_with_the_disk() {
        assert_eq!(check_range(99, 1, &DISK), Ok(()));
        for (sector, count) in [(99, 2), (100, 0), (u64::MAX - 3, 8)] {
            assert_eq!(check_range(sector, count, &DISK), Err(Fault::Range));
        }
    }
}
