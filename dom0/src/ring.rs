//! The back end of a PV console ring (public io/console.h): takes what a guest wrote and gives it what was typed.
//!
//! The guest owns the page and may write anything into it at any time. Its two indexes are claims: they are read once per
//! turn, differences are cut to the ring's size, and positions are taken modulo that size, so nothing it does can lead
//! outside the page. Our own indexes live here and are only published there.

use alloc::vec::Vec;
use core::mem::offset_of;
use core::sync::atomic::Ordering;
use guest_sdk::ring::SharedPage;
use hypercall_abi::io::console::XenconsInterface;

const OUT: usize = offset_of!(XenconsInterface, out);
const OUT_CONS: usize = offset_of!(XenconsInterface, out_cons);
const OUT_PROD: usize = offset_of!(XenconsInterface, out_prod);
const IN_CONS: usize = offset_of!(XenconsInterface, in_cons);
const IN_PROD: usize = offset_of!(XenconsInterface, in_prod);
const OUT_SIZE: u32 = 2048;
const IN_SIZE: u32 = 1024;

/// The console of one guest.
#[derive(Debug)]
pub struct ConsoleBack<M> {
    page: M,
    out_cons: u32,
    in_prod: u32,
}

/// What a turn brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// Text of the guest.
    pub bytes: Vec<u8>,
    /// Bytes that the guest overwrote before anybody could read them, by its own index.
    pub lost: u32,
    /// More was there than the turn's budget.
    pub more: bool,
}

impl<M: SharedPage> ConsoleBack<M> {
    /// Takes over a ring where its indexes are.
    pub fn new(page: M) -> Self {
        let out_cons = page.word(OUT_CONS).load(Ordering::Relaxed);
        let in_prod = page.word(IN_PROD).load(Ordering::Relaxed);
        Self { page, out_cons, in_prod }
    }

    /// Whether there is nothing to be read.
    pub fn is_quiet(&self) -> bool {
        self.page.word(OUT_PROD).load(Ordering::Acquire) == self.out_cons
    }

    /// How far it has read.
    pub const fn place(&self) -> u32 {
        self.out_cons
    }

    /// Takes over a ring whose output was read as far as `place`, and leaves out what was printed since; says how many bytes that is.
    pub fn skipping(page: M, place: u32) -> (Self, u32) {
        let mut back = Self::new(page);
        let produced = back.page.word(OUT_PROD).load(Ordering::Acquire);
        let skipped = produced.wrapping_sub(place).min(OUT_SIZE);
        back.out_cons = produced;
        back.page.word(OUT_CONS).store(produced, Ordering::Release);
        (back, skipped)
    }

    /// Takes at most `budget` bytes of output. The guest may be waiting for room: notify it when this gave any.
    pub fn read(&mut self, budget: usize) -> Output {
        let claimed = self.page.word(OUT_PROD).load(Ordering::Acquire).wrapping_sub(self.out_cons);
        // A producer that is further ahead than the ring is long has overwritten its own text, or lies; the newest is left.
        let lost = claimed.saturating_sub(OUT_SIZE);
        self.out_cons = self.out_cons.wrapping_add(lost);
        let ready = claimed - lost;
        let count = u32::try_from(budget).unwrap_or(u32::MAX).min(ready);
        let mut bytes = alloc::vec![0; count as usize];
        let first = (OUT_SIZE - self.out_cons % OUT_SIZE).min(count) as usize;
        let (head, tail) = bytes.split_at_mut(first);
        self.page.read_bytes(OUT + (self.out_cons % OUT_SIZE) as usize, head);
        self.page.read_bytes(OUT, tail);
        self.out_cons = self.out_cons.wrapping_add(count);
        self.page.word(OUT_CONS).store(self.out_cons, Ordering::Release);
        Output { bytes, lost, more: count < ready }
    }

    /// Gives the guest input, as much as there is room for; returns how many bytes. Notify it when there were any.
    pub fn write(&mut self, input: &[u8]) -> usize {
        let used = self.in_prod.wrapping_sub(self.page.word(IN_CONS).load(Ordering::Acquire));
        // A consumer that claims to have read more than there was gets nothing more: it has no room.
        let count = (IN_SIZE.saturating_sub(used) as usize).min(input.len());
        let (given, _) = input.split_at(count);
        for &byte in given {
            self.page.write_bytes((self.in_prod % IN_SIZE) as usize, &[byte]);
            self.in_prod = self.in_prod.wrapping_add(1);
        }
        self.page.word(IN_PROD).store(self.in_prod, Ordering::Release);
        count
    }
}

#[cfg(test)]
mod tests {
    use super::{ConsoleBack, IN_CONS, IN_PROD, OUT_CONS, OUT_PROD, Output};
    use alloc::vec::Vec;
    use core::sync::atomic::Ordering;
    use guest_sdk::ring::SharedPage;
    use guest_sdk::ring::host::HostPages;

    /// What a guest does to print.
    fn print(page: &HostPages, text: &[u8]) {
        let mut at = page.word(OUT_PROD).load(Ordering::Relaxed);
        for byte in text {
            page.write_bytes(1024 + (at % 2048) as usize, &[*byte]);
            at = at.wrapping_add(1);
        }
        page.word(OUT_PROD).store(at, Ordering::Release);
    }

    #[test]
    fn what_was_not_read_can_be_left_out() {
        let page = HostPages::new(1, 0);
        print(&page, b"before");
        let place = ConsoleBack::new(&page).place();
        // Whether it was read and lost, or never read.
        page.word(OUT_CONS).store(4, Ordering::Relaxed);
        let (mut back, skipped) = ConsoleBack::skipping(&page, place);
        assert_eq!((skipped, page.word(OUT_CONS).load(Ordering::Relaxed)), (6, 6));
        print(&page, b"after");
        assert_eq!(back.read(100).bytes, b"after");
    }

    #[test]
    fn text_goes_through_in_order_across_all_wraps() {
        let page = HostPages::new(1, 0);
        // Close to where the free-running indexes wrap.
        page.word(OUT_CONS).store(u32::MAX - 100, Ordering::Relaxed);
        page.word(OUT_PROD).store(u32::MAX - 100, Ordering::Relaxed);
        let mut back = ConsoleBack::new(&page);
        let (mut sent, mut got): (Vec<u8>, Vec<u8>) = Default::default();
        for round in 0..300usize {
            let used = page
                .word(OUT_PROD)
                .load(Ordering::Relaxed)
                .wrapping_sub(page.word(OUT_CONS).load(Ordering::Relaxed));
            let text: Vec<u8> =
                (0..(round * 13 % 700).min(2048 - used as usize)).map(|at| (at ^ round) as u8).collect();
            print(&page, &text);
            sent.extend(&text);
            let output = back.read(round * 7 % 900);
            assert_eq!(output.lost, 0);
            got.extend(output.bytes);
        }
        while got.len() < sent.len() {
            got.extend(back.read(64).bytes);
        }
        assert!(sent.len() > 50_000 && sent == got);
        assert_eq!(back.read(100), Output::default());
    }

    #[test]
    fn a_budget_leaves_the_rest_for_later() {
        let page = HostPages::new(1, 0);
        let mut back = ConsoleBack::new(&page);
        print(&page, b"hello world");
        assert_eq!(back.read(5), Output { bytes: b"hello".to_vec(), lost: 0, more: true });
        assert_eq!(back.read(50), Output { bytes: b" world".to_vec(), lost: 0, more: false });
    }

    #[test]
    fn wild_producers_lose_text_and_nothing_else() {
        let page = HostPages::new(1, 0);
        let mut back = ConsoleBack::new(&page);
        page.word(OUT_PROD).store(u32::MAX, Ordering::Relaxed);
        let output = back.read(usize::MAX);
        assert_eq!((output.bytes.len(), output.lost, output.more), (2048, u32::MAX - 2048, false));
        assert_eq!(page.word(OUT_CONS).load(Ordering::Relaxed), u32::MAX);
        // And it is heard again once it behaves.
        print(&page, b"sorry");
        assert_eq!(back.read(100).bytes, b"sorry");
        let mut random = 7u32;
        for _ in 0..10_000 {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            page.word(OUT_PROD).store(random, Ordering::Relaxed);
            page.word(OUT_CONS).store(!random, Ordering::Relaxed);
            page.word(IN_CONS).store(random.rotate_left(9), Ordering::Relaxed);
            page.word(IN_PROD).store(random.rotate_left(19), Ordering::Relaxed);
            assert!(back.read(random as usize % 5000).bytes.len() <= 2048);
            assert!(back.write(&[1; 2000]) <= 1024);
        }
    }

    #[test]
    fn input_waits_for_room() {
        let page = HostPages::new(1, 0);
        let mut back = ConsoleBack::new(&page);
        assert_eq!(back.write(&[b'x'; 1500]), 1024);
        assert_eq!(back.write(b"y"), 0);
        assert_eq!(page.word(IN_PROD).load(Ordering::Relaxed), 1024);
        page.word(IN_CONS).store(3, Ordering::Relaxed);
        assert_eq!(back.write(b"abcdef"), 3);
        let mut start = [0; 4];
        page.read_bytes(0, &mut start);
        assert_eq!(&start, b"abcx");
    }
}
