//! Who executed how many instructions, from QEMU's log of executed blocks (`log exec,nochain,in_asm,int`).
//!
//! A block of translated instructions is listed when it is made, and told of, by its place in QEMU's memory, whenever it begins. One that has
//! begun is not always executed to its end, and all such cases are told, too:
//!
//! - `Stopped execution`: an interrupt or the end of the clock's slice came first, and nothing of it was executed.
//! - `rewound execution`: the instruction named here touches a device and has to be the last of a block, so what was executed before it counts,
//!   and it comes once more in a block of its own.
//! - `v=0e … i=0 … pc=`: the instruction there raised an exception.

use anyhow::{Context, Result};
use std::collections::HashMap;
use std::io::BufRead;

/// What is counted, by where its code lies.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts {
    /// Instructions of blocks that begin at an address, and how often they began.
    pub blocks: HashMap<u64, Executed>,
    /// Blocks that began without having been listed: what they executed is not known.
    pub unlisted: u64,
}

/// What was executed of a block.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Executed {
    pub times: i64,
    pub instructions: i64,
}

impl Counts {
    /// Instructions of blocks whose address is one of these.
    pub fn of(&self, layer: impl Fn(u64) -> bool) -> i64 {
        self.blocks.iter().filter(|(pc, _)| layer(**pc)).map(|(_, executed)| executed.instructions).sum()
    }

    /// What is more in these counts than in others.
    pub fn beyond(mut self, other: &Counts) -> Counts {
        for (pc, less) in &other.blocks {
            let here = self.blocks.entry(*pc).or_default();
            here.times -= less.times;
            here.instructions -= less.instructions;
        }
        self.unlisted += other.unlisted;
        self
    }
}

/// Reads logs of one QEMU, one after the other: blocks that an earlier one has listed are not listed again.
#[derive(Debug, Default)]
pub struct Reader {
    /// For each block, by its place, where its instructions are, from its beginning.
    listed: HashMap<u64, Vec<u64>>,
    /// The block that began last.
    last: Option<Begun>,
    /// Addresses of the block that is just being listed.
    listing: Vec<u64>,
}

#[derive(Debug, Clone, Copy)]
struct Begun {
    place: u64,
    pc: u64,
}

impl Reader {
    /// Counts what is executed until the log ends.
    ///
    /// # Errors
    /// When it cannot be read, or has a line of a known kind in another form.
    pub fn count(&mut self, mut log: impl BufRead) -> Result<Counts> {
        let mut counts = Counts::default();
        let mut line = Vec::new();
        self.last = None;
        loop {
            line.clear();
            if log.read_until(b'\n', &mut line).context("cannot read QEMU's log")? == 0 {
                return Ok(counts);
            }
            self.line(&line, &mut counts)
                .with_context(|| format!("QEMU's log: {:?}", String::from_utf8_lossy(&line).trim_end()))?;
        }
    }

    fn line(&mut self, line: &[u8], counts: &mut Counts) -> Result<()> {
        if let Some(rest) = line.strip_prefix(b"Trace ") {
            return self.begin(rest, counts).context("this is no block");
        }
        if line.starts_with(b"IN:") {
            self.listing.clear();
        } else if line.starts_with(b"0x") {
            self.list(line).context("this is no instruction")?;
        } else if line.starts_with(b"Stopped execution") {
            self.cut(0, counts);
        } else if let Some(at) = find(line, b"rewound execution of TB to ") {
            let (pc, _) = hex(line.get(at..).unwrap_or_default()).context("where to?")?;
            self.cut_at(pc, counts);
        } else if find(line, b": v=").is_some() && find(line, b" i=0 ").is_some() {
            let number = find(line, b": v=").and_then(|at| hex(line.get(at..)?));
            let at = find(line, b" pc=").and_then(|at| hex(line.get(at..)?));
            let ((number, _), (pc, _)) = number.zip(at).context("which, and where?")?;
            // Interrupts come between blocks.
            if number < 32 && number != 2 {
                self.cut_at(pc, counts);
            }
        }
        Ok(())
    }

    /// `0: 0x7f7504000100 [00000000/0000000000401000/0040c0b3/ff022200] name`
    fn begin(&mut self, rest: &[u8], counts: &mut Counts) -> Option<()> {
        let rest = rest.get(find(rest, b" 0x")?..)?;
        let (place, rest) = hex(rest)?;
        let (pc, _) = hex(rest.get(find(rest, b"/")?..)?)?;
        if let Some(first) = self.listing.first() {
            let offsets = self.listing.iter().map(|at| at.wrapping_sub(*first)).collect();
            self.listed.insert(place, offsets);
            self.listing.clear();
        }
        match self.listed.get(&place) {
            Some(offsets) => {
                let executed = counts.blocks.entry(pc).or_default();
                executed.times += 1;
                executed.instructions += offsets.len() as i64;
                self.last = Some(Begun { place, pc });
            }
            None => {
                counts.unlisted += 1;
                self.last = None;
            }
        }
        Some(())
    }

    /// `0x00401000:  48 89 e5                 movq     %rsp, %rbp`; more than eight bytes go on in a line without a name.
    fn list(&mut self, line: &[u8]) -> Option<()> {
        let (pc, rest) = hex(line.strip_prefix(b"0x")?)?;
        let words = rest.strip_prefix(b":")?.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
        let is_byte = |word: &[u8]| word.len() == 2 && word.iter().all(u8::is_ascii_hexdigit);
        if !words.into_iter().all(is_byte) {
            self.listing.push(pc);
        }
        Some(())
    }

    /// The block that began last was left before the instruction at `pc`, if that is one of it.
    fn cut_at(&mut self, pc: u64, counts: &mut Counts) {
        let Some(last) = self.last else { return };
        let offset = pc.wrapping_sub(last.pc);
        let offsets = self.listed.get(&last.place);
        if let Some(before) = offsets.and_then(|offsets| offsets.iter().position(|at| *at == offset)) {
            self.cut(before, counts);
        }
    }

    /// Only so many instructions of the block that began last were executed.
    fn cut(&mut self, instructions: usize, counts: &mut Counts) {
        let Some(Begun { place, pc }) = self.last.take() else { return };
        let all = self.listed.get(&place).map_or(0, Vec::len);
        let executed = counts.blocks.entry(pc).or_default();
        executed.instructions -= all as i64 - instructions as i64;
        executed.times -= i64::from(instructions == 0);
    }
}

/// The place behind the first occurrence.
fn find(line: &[u8], what: &[u8]) -> Option<usize> {
    line.windows(what.len()).position(|window| window == what).map(|at| at + what.len())
}

/// The hexadecimal number that a text begins with, and what follows it.
fn hex(text: &[u8]) -> Option<(u64, &[u8])> {
    let digits = text.iter().take_while(|c| c.is_ascii_hexdigit()).take(16).count();
    let (number, rest) = text.split_at(digits);
    let add = |value: u64, digit: &u8| Some(value << 4 | u64::from(char::from(*digit).to_digit(16)?));
    (digits > 0).then_some((number.iter().try_fold(0, add)?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn executed(counts: &Counts) -> Vec<(u64, i64, i64)> {
        let mut all: Vec<_> = counts.blocks.iter().map(|(pc, e)| (*pc, e.times, e.instructions)).collect();
        all.sort_unstable();
        all
    }

    /// As QEMU 10.0 writes it. The second instruction has eleven bytes.
    const LOG: &str = "----------------\n\
        IN: \n\
        0x40001000:  55                       pushq    %rbp\n\
        0x40001001:  48 c7 05 34 12 00 00 01  movq     $1, 0x1234(%rip)\n\
        0x40001009:  00 00 00\n\
        0x4000100c:  ff d0                    callq    *%rax\n\
        \n\
        Trace 0: 0x7f7504000100 [00000000/0000000040001000/0040c0b3/ff000201] \n\
        ----------------\n\
        IN: \n\
        0xffff82d040200000:  90                       nop      \n\
        0xffff82d040200001:  0f 07                    sysretq  \n\
        \n\
        Trace 0: 0x7f7504000240 [00000000/ffff82d040200000/004000b0/ff000201] name\n\
        Trace 0: 0x7f7504000100 [00000000/0000000040001000/0040c0b3/ff000201] \n";

    #[test]
    fn counts_each_block_as_often_as_it_begins() -> Result<()> {
        let mut reader = Reader::default();
        let counts = reader.count(LOG.as_bytes())?;
        assert_eq!(executed(&counts), [(0x4000_1000, 2, 6), (0xffff_82d0_4020_0000, 1, 2)]);
        assert_eq!(counts.of(|pc| pc < 0x8000_0000), 6);
        // What is listed stays listed; the same code may be at another address.
        let again = "Trace 0: 0x7f7504000240 [00000000/0000000000400000/004000b0/ff000201] \n";
        assert_eq!(executed(&reader.count(again.as_bytes())?), [(0x40_0000, 1, 2)]);
        let counts = counts.beyond(&reader.count(again.as_bytes())?);
        assert_eq!(counts.of(|pc| pc == 0x40_0000), -2);
        Ok(())
    }

    #[test]
    fn a_place_that_is_used_again_is_another_block() -> Result<()> {
        let again = "IN: \n0x00400000:  90                       nop      \n\n\
            Trace 0: 0x7f7504000100 [00000000/0000000000400000/0040c0b3/ff000201] \n";
        let counts = Reader::default().count(format!("{LOG}{again}").as_bytes())?;
        assert_eq!(counts.of(|pc| pc == 0x40_0000), 1);
        Ok(())
    }

    #[test]
    fn what_is_left_early_counts_as_far_as_it_was_executed() -> Result<()> {
        let count = |more: &str| Reader::default().count(format!("{LOG}{more}").as_bytes());
        let dom0 = |counts: &Counts| counts.blocks.get(&0x4000_1000).copied().unwrap_or_default();
        let stopped = count("Stopped execution of TB chain before 0x7f7504000100 [0000000040001000] \n")?;
        assert_eq!(dom0(&stopped), Executed { times: 1, instructions: 3 });
        let rewound = count("cpu_io_recompile: rewound execution of TB to 0000000040001001\n")?;
        assert_eq!(dom0(&rewound), Executed { times: 2, instructions: 4 });
        let fault =
            "    9: v=0e e=0006 i=0 cpl=3 IP=e033:000000004000100c pc=000000004000100c SP=e02b:0 CR2=0\n";
        assert_eq!(dom0(&count(fault)?).instructions, 5);
        // Interrupts come between blocks, wherever they say that they do; so do software's.
        for other in [fault.replace("v=0e", "v=fb"), fault.replace("i=0", "i=1")] {
            assert_eq!(dom0(&count(&other)?).instructions, 6);
        }
        // A fault of another block, as when an upcall cannot be delivered.
        assert_eq!(dom0(&count(&fault.replace("4000100c", "40002000"))?).instructions, 6);
        Ok(())
    }

    #[test]
    fn what_was_never_listed_is_told() -> Result<()> {
        let unknown = "Trace 0: 0x7f7504009900 [00000000/0000000000400000/0040c0b3/ff000201] \n";
        let counts = Reader::default().count(unknown.as_bytes())?;
        assert_eq!((counts.unlisted, counts.blocks.len()), (1, 0));
        assert!(Reader::default().count("Trace 0: what?\n".as_bytes()).is_err());
        Ok(())
    }
}
