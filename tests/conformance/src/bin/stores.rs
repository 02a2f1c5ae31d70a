//! Stores of a guest's kernel to its own page tables, which fault and which the hypervisor carries out: what each form does to
//! the entry, to the flags and to the registers, compared with the same instruction on plain memory.
#![no_std]
#![no_main]

extern crate alloc;

use conformance::{TablePage, by_privilege, call, hypervisor_frame, mmuext, protect, pte, update};
use core::sync::atomic::{AtomicU64, Ordering};
use guest_sdk::abi::mmu::MmuCommand;
use guest_sdk::abi::subops::{MmuextCmd, VmAssist};
use guest_sdk::abi::{Errno, Hypercall};
use guest_sdk::memory::{Access, Page, Range};
use guest_sdk::testkit::{
    self, TrapFrame, Verdict, cases, check, check_eq, expect_vector, probe, set_handler, skip,
};
use guest_sdk::{Domain, entry};

#[entry]
fn main(domain: Domain) {
    testkit::run(
        domain,
        &cases![
            stores_of_parts_of_entries,
            stores_by_exchange,
            stores_by_arithmetic,
            stores_by_shift,
            stores_of_bits,
            stores_of_conditions,
            stores_with_bytes_reversed,
            stores_behind_other_prefixes,
            stores_of_strings,
            stores_of_repeated_strings,
            stores_from_and_to_the_stack,
            stores_to_a_whole_address,
            stores_refused,
        ],
    )
}

/// Bits of a mapping.
const RO: u64 = 0x61 | 1 << 63;
/// The bit of an entry that lets ring 3 at the page: guests' kernels run there.
const USER: u64 = 1 << 2;
/// Bits of an entry that are the guest's to choose and that the hypervisor leaves as they are: present, writable, accessed,
/// dirty, the three free ones, and the low bits of the frame.
const CHOSEN: u64 = 0xffff_ffff_fe63;

fn assist(command: u64) -> Result<u64, Errno> {
    call(Hypercall::VmAssist, [command, u64::from(VmAssist::WritablePagetables.number()), 0, 0, 0])
}

/// A pinned table whose entries may be written by plain stores until it is dropped, and a page to point to.
struct StoredTable {
    table: TablePage,
    /// What the entries map.
    _page: Page,
}

impl StoredTable {
    fn new() -> Result<StoredTable, Errno> {
        let page = Page::new()?;
        let entry = pte(page.mfn().get(), RO);
        let table = TablePage::new(&[(2, entry), (3, entry)])?;
        mmuext(MmuextCmd::PinL1Table, table.mfn(), 0)?;
        assist(0)?;
        Ok(StoredTable { table, _page: page })
    }
    fn entry(&self, index: u64) -> u64 {
        self.table.address() + index * 8
    }

    /// Sees that it is a table: the hypervisor sets USER in each entry, memory that is none keeps what is stored.
    fn is_one(&self) -> Verdict {
        let entry = self.table.word(3);
        probe!(rax = entry & !USER, "mov [rdi], rax"; in("rdi") self.entry(3))?;
        check_eq!(self.table.word(3), entry | USER);
        Ok(())
    }
}

impl Drop for StoredTable {
    fn drop(&mut self) {
        let off = assist(1);
        let unpinned = mmuext(MmuextCmd::UnpinTable, self.table.mfn(), 0);
        assert!(off.is_ok() && unpinned.is_ok());
    }
}

fn stores_of_parts_of_entries(_: &mut Domain) -> Verdict {
    let t = StoredTable::new()?;
    t.is_one()?;
    let (at, table) = (t.entry(2), &t.table);
    let start = table.word(2);
    // Bits 9 to 11 are free: one byte, by a low and by a high register.
    let value = start >> 8 & 0xff ^ 0x0e;
    probe!(rax = value, "mov [rdi + 1], al"; in("rdi") at)?;
    check_eq!(table.word(2) & CHOSEN, (start ^ 0xe00) & CHOSEN);
    let value = (start >> 8 & 0xff ^ 0x02) << 8;
    probe!(rax = value, "mov [rdi + 1], ah"; in("rdi") at)?;
    check_eq!(table.word(2) & CHOSEN, (start ^ 0x200) & CHOSEN);
    // Two bytes, and what an exchange gives back fills no more of the register.
    let before = table.word(2);
    let mut rcx = 0x1234_5678_9abc_0000 | before & 0xffff ^ 0xc00;
    probe!("xchg [rdi], cx"; in("rdi") at, inlateout("rcx") rcx)?;
    check_eq!(rcx, 0x1234_5678_9abc_0000 | before & 0xffff);
    check_eq!(table.word(2) & CHOSEN, (before ^ 0xc00) & CHOSEN);
    probe!("and word ptr [rdi], 0xf1ff"; in("rdi") at)?;
    check_eq!(table.word(2) & CHOSEN, start & !0xe00 & CHOSEN);
    probe!("lock bts word ptr [rdi], 10"; in("rdi") at)?;
    check_eq!(table.word(2) & CHOSEN, (start | 0x400) & CHOSEN);
    check_eq!(table.word(3) & CHOSEN, start & CHOSEN, "the neighbour");
    Ok(())
}

fn stores_by_exchange(_: &mut Domain) -> Verdict {
    let t = StoredTable::new()?;
    t.is_one()?;
    let (at, table) = (t.entry(2), &t.table);
    let start = table.word(2);
    let mut rcx = 0x400u64;
    probe!("lock xadd [rdi], rcx"; in("rdi") at, inlateout("rcx") rcx)?;
    check_eq!(rcx, start);
    check_eq!(table.word(2) & CHOSEN, (start + 0x400) & CHOSEN);
    // Equal: stored. Not equal: loaded.
    let before = table.word(2);
    let after = before ^ 0xc00;
    let (mut rax, mut rdx) = (before & 0xffff_ffff, before >> 32);
    for equal in [true, false] {
        let set: u8;
        // SAFETY: an entry of this case; rbx, which the compiler keeps for itself, is as before at the end.
        unsafe {
            core::arch::asm!(
                "xchg rbx, rsi", "lock cmpxchg8b [rdi]", "sete r8b", "xchg rbx, rsi",
                in("rdi") at, inout("rsi") after & 0xffff_ffff => _, in("rcx") after >> 32,
                inout("rax") rax, inout("rdx") rdx, out("r8b") set,
            );
        }
        check_eq!(set == 1, equal);
        check_eq!(table.word(2) & CHOSEN, after & CHOSEN);
        if equal {
            (rax, rdx) = (u64::MAX, u64::MAX);
        }
    }
    check_eq!((rax, rdx), (table.word(2) & 0xffff_ffff, table.word(2) >> 32));
    // Two entries are compared.
    let low: u64;
    let mut rdx = 0u64;
    probe!(rax = 0, "lock cmpxchg16b [rdi]", "mov rsi, rax";
        in("rdi") at, inlateout("rdx") rdx, in("rcx") 0, out("rsi") low)?;
    check_eq!((low, rdx), (table.word(2), table.word(3)));
    Ok(())
}

// ── each form, on plain memory and on a table ──

/// Registers before an instruction; rdi is its operand's address, and rsi that of other memory.
#[derive(Clone, Copy)]
struct Start {
    rax: u64,
    rcx: u64,
    rdx: u64,
    rdi: u64,
    rsi: u64,
    /// Arithmetic flags.
    flags: u64,
}

/// An instruction under test.
struct Form {
    text: &'static str,
    /// Bytes of its operand.
    bytes: u64,
    /// Which flags it defines.
    defined: u64,
    /// Executes it with single step on.
    run: fn(&Start),
}

/// CF PF AF ZF SF DF OF.
const ALL: u64 = 0xcd5;
const ADJUST: u64 = 1 << 4;
const OVERFLOW: u64 = 1 << 11;

/// An instruction, given as its text, with the byte count of its operand and the flags that it defines.
macro_rules! form {
    ($bytes:expr, $defined:expr, $text:expr) => {{
        fn run(s: &Start) {
            // SAFETY: the operands are memory of the case; a fault goes on behind it, and the first single step ends them.
            unsafe {
                core::arch::asm!(
                    "lea r9, [rip + 774f]", "push r8", "popfq", $text, "774:", "cld",
                    in("r8") s.flags | 0x302, out("r9") _, inlateout("rax") s.rax => _, inlateout("rcx") s.rcx => _,
                    inlateout("rdx") s.rdx => _, inlateout("rdi") s.rdi => _, inlateout("rsi") s.rsi => _,
                );
            }
        }
        Form { text: $text, bytes: $bytes, defined: $defined, run }
    }};
}

/// One form for each width: by an 8, 16, 32 and 64 bit register.
macro_rules! by_width {
    ($defined:expr, $head:expr, $b:expr, $w:expr, $d:expr, $q:expr) => {
        [
            form!(1, $defined, concat!($head, " byte ptr [rdi]", $b)),
            form!(2, $defined, concat!($head, " word ptr [rdi]", $w)),
            form!(4, $defined, concat!($head, " dword ptr [rdi]", $d)),
            form!(8, $defined, concat!($head, " qword ptr [rdi]", $q)),
        ]
    };
}

/// Arithmetic with registers, among them the high byte ones, and with constants of each size.
macro_rules! arithmetic {
    ($($name:literal),*) => {
        [$(
            by_width!(ALL, $name, ", cl", ", cx", ", ecx", ", rcx"),
            by_width!(ALL, $name, ", dh", ", 0x1234", ", 0x12345678", ", -0x7edcba98"),
            by_width!(ALL, $name, ", -5", ", -5", ", 5", ", -6"),
        )*]
    };
}

macro_rules! without_operand {
    ($defined:expr, $($name:literal),*) => {
        [$( by_width!($defined, $name, "", "", "", "") ),*]
    };
}

macro_rules! shifts {
    ($($name:literal),*) => {
        [$(
            by_width!(ALL & !ADJUST, $name, ", 1", ", 1", ", 1", ", 1"),
            by_width!(ALL & !ADJUST & !OVERFLOW, $name, ", 3", ", 3", ", 7", ", 33"),
            by_width!(ALL & !ADJUST & !OVERFLOW, $name, ", cl", ", cl", ", cl", ", cl"),
        )*]
    };
}

/// rip, flags, rax, rcx, rdx, rdi, rsi and rsp after the instruction.
static AFTER: [AtomicU64; 8] = [const { AtomicU64::new(0) }; 8];

fn record(frame: &mut TrapFrame) -> bool {
    let seen = [frame.rip, frame.rflags, frame.rax, frame.rcx, frame.rdx, frame.rdi, frame.rsi, frame.rsp];
    for (slot, value) in AFTER.iter().zip(seen) {
        slot.store(value, Ordering::Relaxed);
    }
    frame.rflags &= !0x100;
    // Of a repeated instruction only the first step.
    frame.rcx = 0;
    true
}

/// A page fault reported to the guest: nothing is recorded, and the instruction is left out.
fn leave_out(frame: &mut TrapFrame) -> bool {
    frame.rip = frame.r9;
    frame.rflags &= !0x100;
    true
}

/// Executes a form, and tells what it left: rip and rdi (from its operand), the defined flags, other registers.
#[inline(never)]
fn execute(form: &Form, start: &Start) -> [u64; 8] {
    for slot in &AFTER {
        slot.store(0, Ordering::Relaxed);
    }
    set_handler(1, Some(record));
    set_handler(14, Some(leave_out));
    (form.run)(start);
    set_handler(1, None);
    set_handler(14, None);
    let mut seen = [0; 8];
    for (value, slot) in seen.iter_mut().zip(&AFTER) {
        *value = slot.load(Ordering::Relaxed);
    }
    seen[1] &= form.defined;
    seen[5] = seen[5].wrapping_sub(start.rdi);
    seen[6] = seen[6].wrapping_sub(start.rsi);
    seen
}

/// Numbers that look random, the same on every run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 24 ^ self.0 << 40
    }
    /// Often one at an edge.
    fn value(&mut self) -> u64 {
        match self.next() % 8 {
            0 => 0,
            1 => u64::MAX,
            2 => 1 << 63,
            3 => 0x7f7f_7f7f_7f7f_7f7f,
            4 => 0x8080_8080_8080_8080,
            _ => self.next(),
        }
    }
}

/// How often each form is tried.
const TRIES: usize = 24;

/// Executes each form with many operands on plain memory and on an entry of a table, and compares what is left. The entry is one
/// that is not present, or the one that a table of this case has: any other value would be refused for what it maps.
fn compare<'a>(forms: impl Iterator<Item = &'a Form>, mut choose: impl FnMut(&Form, &mut Start)) -> Verdict {
    let t = StoredTable::new()?;
    t.is_one()?;
    let mut plain = Page::new()?;
    let other = Page::new()?;
    let mapped = t.table.word(2);
    let mut numbers = Numbers(1);
    for form in forms {
        let mut compared = 0;
        for attempt in 0..TRIES {
            // Operands below 8 bytes are at the end of an entry, away from its lowest bit.
            let offset = 8 - form.bytes;
            let word = if attempt % 4 == 3 { mapped } else { numbers.value() & !1 };
            let mut start = Start {
                rax: numbers.value(),
                rcx: numbers.value(),
                rdx: numbers.value(),
                rdi: plain.address() + 16 + offset,
                rsi: other.address() + 64,
                flags: numbers.next() & 0x8d5,
            };
            if attempt % 3 == 0 {
                // Equal to what is there, for comparisons.
                start.rax = word >> (8 * offset);
            }
            choose(form, &mut start);
            plain.bytes_mut()[..64].fill(0);
            plain.bytes_mut()[16..24].copy_from_slice(&word.to_le_bytes());
            let wanted = execute(form, &start);
            let result = plain_word(&plain, 2);
            if result & 1 != 0 && result != mapped {
                continue;
            }
            compared += 1;
            check_eq!(update(MmuCommand::NormalPtUpdate, t.table.place(2), word), Ok(0));
            check_eq!(t.table.word(2), word, "the entry before");
            start.rdi = t.entry(2) + offset;
            let seen = execute(form, &start);
            let name = form.text;
            check_eq!(seen, wanted, "{name}: rip, flags, rax, rcx, rdx, rdi, rsi, rsp");
            check_eq!(t.table.word(2), result, "{name}: the entry, from {word:#x}");
        }
        check!(compared >= 4, "{}: {compared} comparisons", form.text);
    }
    Ok(())
}

/// Word `index` of a page that an instruction wrote.
fn plain_word(page: &Page, index: u64) -> u64 {
    // SAFETY: inside the page, mapped for reading.
    unsafe { ((page.address() + index * 8) as *const u64).read_volatile() }
}

fn stores_by_arithmetic(_: &mut Domain) -> Verdict {
    let two = arithmetic!("add", "or", "adc", "sbb", "and", "sub", "xor", "lock add", "lock sbb");
    compare(two.as_flattened().iter(), |_, _| ())?;
    let one = without_operand!(ALL, "inc", "dec", "not", "neg", "lock inc", "lock neg");
    compare(one.as_flattened().iter(), |_, _| ())?;
    let exchanges = [
        by_width!(ALL, "xchg", ", cl", ", cx", ", ecx", ", rcx"),
        by_width!(ALL, "lock xadd", ", ch", ", cx", ", ecx", ", rcx"),
        by_width!(ALL, "xadd", ", cl", ", dx", ", edx", ", rax"),
        by_width!(ALL, "cmpxchg", ", cl", ", cx", ", ecx", ", rcx"),
        by_width!(ALL, "lock cmpxchg", ", dh", ", dx", ", edx", ", rdx"),
    ];
    compare(exchanges.as_flattened().iter(), |_, _| ())
}

fn stores_by_shift(_: &mut Domain) -> Verdict {
    let counted = |_: &Form, start: &mut Start| start.rcx %= 8;
    let single = shifts!("rol", "ror", "rcl", "rcr", "shl", "shr", "sar");
    compare(single.as_flattened().iter(), counted)?;
    const DEFINED: u64 = ALL & !ADJUST & !OVERFLOW;
    let double = [
        form!(2, ALL & !ADJUST, "shld word ptr [rdi], dx, 1"),
        form!(4, DEFINED, "shld dword ptr [rdi], edx, 9"),
        form!(8, DEFINED, "shld qword ptr [rdi], rdx, cl"),
        form!(2, DEFINED, "shrd word ptr [rdi], dx, cl"),
        form!(4, ALL & !ADJUST, "shrd dword ptr [rdi], edx, 1"),
        form!(8, DEFINED, "shrd qword ptr [rdi], rdx, 35"),
    ];
    compare(double.iter(), counted)
}

fn stores_of_bits(_: &mut Domain) -> Verdict {
    const CARRY: u64 = 1;
    let by_constant = [
        form!(2, CARRY, "bts word ptr [rdi], 10"),
        form!(4, CARRY, "btr dword ptr [rdi], 29"),
        form!(8, CARRY, "btc qword ptr [rdi], 61"),
        form!(4, CARRY, "lock btc dword ptr [rdi], 31"),
    ];
    compare(by_constant.iter(), |_, _| ())?;
    let by_register = [
        form!(2, CARRY, "bts [rdi], cx"),
        form!(4, CARRY, "bts [rdi], ecx"),
        form!(8, CARRY, "lock bts [rdi], rcx"),
        form!(2, CARRY, "lock btr [rdi], cx"),
        form!(4, CARRY, "btr [rdi], ecx"),
        form!(8, CARRY, "btr [rdi], rcx"),
        form!(2, CARRY, "btc [rdi], cx"),
        form!(4, CARRY, "lock btc [rdi], ecx"),
        form!(8, CARRY, "btc [rdi], rcx"),
    ];
    // A bit of the entry, which may be before the operand.
    compare(by_register.iter(), |form, start| {
        start.rcx = (start.rcx >> 7) % 64;
        start.rcx = start.rcx.wrapping_sub((8 - form.bytes) * 8);
    })
}

fn stores_of_conditions(_: &mut Domain) -> Verdict {
    let forms = [
        form!(1, ALL, "seto [rdi]"),
        form!(1, ALL, "setno [rdi]"),
        form!(1, ALL, "setb [rdi]"),
        form!(1, ALL, "setae [rdi]"),
        form!(1, ALL, "sete [rdi]"),
        form!(1, ALL, "setne [rdi]"),
        form!(1, ALL, "setbe [rdi]"),
        form!(1, ALL, "seta [rdi]"),
        form!(1, ALL, "sets [rdi]"),
        form!(1, ALL, "setns [rdi]"),
        form!(1, ALL, "setp [rdi]"),
        form!(1, ALL, "setnp [rdi]"),
        form!(1, ALL, "setl [rdi]"),
        form!(1, ALL, "setge [rdi]"),
        form!(1, ALL, "setle [rdi]"),
        form!(1, ALL, "setg [rdi]"),
    ];
    compare(forms.iter(), |_, _| ())
}

fn stores_with_bytes_reversed(_: &mut Domain) -> Verdict {
    let forms = [
        form!(2, ALL, "movbe [rdi], cx"),
        form!(4, ALL, "movbe [rdi], ecx"),
        form!(8, ALL, "movbe [rdi], rcx"),
    ];
    if core::arch::x86_64::__cpuid(1).ecx >> 22 & 1 == 0 {
        return skip("this processor has no MOVBE");
    }
    compare(forms.iter(), |_, _| ())
}

fn stores_behind_other_prefixes(_: &mut Domain) -> Verdict {
    let forms = [
        form!(8, ALL, "movnti [rdi], rcx"),
        form!(4, ALL, "movnti [rdi], ecx"),
        // Hints about lock elision, and prefixes without a meaning.
        form!(8, ALL, ".byte 0xf2; lock xchg [rdi], rcx"),
        form!(8, ALL, ".byte 0xf3; mov [rdi], rcx"),
        form!(4, ALL, ".byte 0xf3; lock add dword ptr [rdi], ecx"),
        form!(2, ALL, ".byte 0xf2; mov [rdi], cx"),
        form!(8, ALL, ".byte 0x2e; mov [rdi], rcx"),
        form!(4, ALL, ".byte 0x3e; or dword ptr [rdi], ecx"),
    ];
    compare(forms.iter(), |_, _| ())
}

fn stores_of_strings(_: &mut Domain) -> Verdict {
    let forms = [
        form!(1, ALL, "stosb"),
        form!(2, ALL, "stosw"),
        form!(4, ALL, "stosd"),
        form!(8, ALL, "stosq"),
        form!(1, ALL, "movsb"),
        form!(2, ALL, "movsw"),
        form!(4, ALL, "movsd"),
        form!(8, ALL, "movsq"),
        // With a count the single step comes after the first of them.
        form!(1, ALL, "rep stosb"),
        form!(2, ALL, "rep stosw"),
        form!(8, ALL, "rep stosq"),
        form!(4, ALL, ".byte 0xf2; stosd"),
        form!(4, ALL, "rep movsd"),
        form!(8, ALL, "rep movsq"),
    ];
    compare(forms.iter(), |_, start| {
        start.rcx = start.rcx % 3 + 2;
        // Downwards in half of them.
        start.flags |= (start.rdx & 1) << 10;
        // What moves: a word of the other page.
        // SAFETY: inside a page of the caller's that nothing else uses.
        unsafe { (start.rsi as *mut u64).write_volatile(start.rax) };
    })
}

fn stores_of_repeated_strings(_: &mut Domain) -> Verdict {
    let t = StoredTable::new()?;
    t.is_one()?;
    let mut from = Page::new()?;
    for i in 0..64u64 {
        from.bytes_mut()[i as usize * 8..][..8].copy_from_slice(&(i << 32 | 0x1000).to_le_bytes());
    }
    let (mut rcx, mut rdi, mut rsi) = (40u64, t.entry(16), from.address());
    // SAFETY: a table of this case; entries that are not present may be anything.
    unsafe {
        core::arch::asm!("rep movsq", inout("rcx") rcx, inout("rdi") rdi, inout("rsi") rsi);
    }
    check_eq!((rcx, rdi, rsi), (0, t.entry(56), from.address() + 320));
    for i in 0..40 {
        check_eq!(t.table.word(16 + i), i << 32 | 0x1000);
    }
    check_eq!(t.table.word(56), 0);
    (rcx, rdi) = (10, t.entry(25));
    // SAFETY: as above.
    unsafe {
        core::arch::asm!("std", "rep stosq", "cld", inout("rcx") rcx, inout("rdi") rdi, in("rax") 0x7000u64);
    }
    check_eq!((rcx, rdi), (0, t.entry(15)));
    for i in 0..40 {
        check_eq!(t.table.word(16 + i), if i < 10 { 0x7000 } else { i << 32 | 0x1000 }, "{i}");
    }
    // One that cannot be stored ends it, where it is.
    let bad = pte(hypervisor_frame()?, RO);
    from.bytes_mut()[16..24].copy_from_slice(&bad.to_le_bytes());
    (rcx, rdi, rsi) = (5, t.entry(60), from.address());
    let refused = probe!("rep movsq"; inlateout("rcx") rcx, inlateout("rdi") rdi, inlateout("rsi") rsi);
    expect_vector(refused, 14, 3)?;
    check_eq!(testkit::fault_address(), t.entry(62));
    check_eq!((rcx, rdi, rsi), (3, t.entry(62), from.address() + 16));
    check_eq!((t.table.word(61), t.table.word(62)), (1 << 32 | 0x1000, 0));
    Ok(())
}

fn stores_from_and_to_the_stack(_: &mut Domain) -> Verdict {
    let t = StoredTable::new()?;
    t.is_one()?;
    let other = 0x1234_5678_9abc_def0u64;
    let end = t.entry(20);
    // While rsp leads to the table no exception could be delivered; the hypervisor's emulation delivers none.
    macro_rules! pushing {
        ($text:literal) => {{
            let after: u64;
            // SAFETY: events are masked, and the stack is back before anything else uses it.
            unsafe {
                core::arch::asm!(
                    "mov r9, rsp", "mov rsp, {end}", $text, "xchg rsp, r9",
                    end = in(reg) end, out("r9") after, out("r10") _, in("rax") other, in("rdi") &raw const other,
                );
            }
            after
        }};
    }
    check_eq!((pushing!("push rax"), t.table.word(19)), (end - 8, other));
    check_eq!((pushing!("push ax"), t.table.word(19)), (end - 2, other & !0 >> 16 | other << 48));
    check_eq!((pushing!("push -2"), t.table.word(19)), (end - 8, 2u64.wrapping_neg()));
    check_eq!((pushing!("push 0x12345678"), t.table.word(19)), (end - 8, 0x1234_5678));
    check_eq!((pushing!("push qword ptr [rdi]"), t.table.word(19)), (end - 8, other));
    // The stack pointer as it was.
    check_eq!((pushing!("push rsp"), t.table.word(19)), (end - 8, end));
    check_eq!(pushing!("xor r10d, r10d; pushf"), end - 8);
    check_eq!(t.table.word(19) & ALL, 0x44, "zero, even parity");
    // And the other way.
    let after: u64;
    // SAFETY: what is pushed is popped.
    unsafe {
        core::arch::asm!(
            "mov r9, rsp", "push rax", "pop qword ptr [rdi]", "sub r9, rsp",
            in("rax") other, in("rdi") t.entry(18), out("r9") after,
        );
    }
    check_eq!((after, t.table.word(18)), (0, other));
    Ok(())
}

fn stores_to_a_whole_address(_: &mut Domain) -> Verdict {
    let t = StoredTable::new()?;
    t.is_one()?;
    // movabs [address], al / ax / eax / rax; ret
    for (opcode, bytes) in [(&[0xa2u8][..], 1), (&[0x66, 0xa3], 2), (&[0xa3], 4), (&[0x48, 0xa3], 8)] {
        let mut code = Page::new()?;
        let address = t.entry(16) + 8 - bytes;
        let end = opcode.len();
        code.bytes_mut()[..end].copy_from_slice(opcode);
        code.bytes_mut()[end..end + 8].copy_from_slice(&address.to_le_bytes());
        code.bytes_mut()[end + 8] = 0xc3;
        check_eq!(update(MmuCommand::NormalPtUpdate, t.table.place(16), 0), Ok(0));
        protect(&code, false)?;
        let range = Range::new(1)?;
        // SAFETY: code of this case.
        unsafe { range.map(0, code.mfn(), Access::ReadExecute)? };
        let value = 0x7654_3210_fedc_ba98u64;
        // SAFETY: it stores to the table and returns.
        unsafe { core::arch::asm!("call {}", in(reg) range.start(), in("rax") value) };
        range.unmap(0)?;
        protect(&code, true)?;
        let shift = 64 - 8 * bytes;
        check_eq!(t.table.word(16), value << shift, "{bytes} bytes");
    }
    Ok(())
}

fn stores_refused(_: &mut Domain) -> Verdict {
    let t = StoredTable::new()?;
    t.is_one()?;
    let (at, table) = (t.entry(2), &t.table);
    let before = table.word(2);
    let theirs = pte(hypervisor_frame()?, RO);
    // A frame of somebody else, and the table itself, writable.
    for bad in [theirs, pte(table.mfn(), 0x63 | 1 << 63)] {
        expect_vector(probe!(rax = bad, "mov [rdi], rax"; in("rdi") at), 14, 3)?;
        check_eq!((testkit::fault_address(), table.word(2)), (at, before));
        expect_vector(probe!(rax = bad ^ before, "lock xor [rdi], rax"; in("rdi") at), 14, 3)?;
        check_eq!(table.word(2), before);
    }
    // An operand that is not at a multiple of its size.
    expect_vector(probe!(rax = 0, "mov [rdi], ax"; in("rdi") at + 1), 14, 3)?;
    // Vector registers, and segment selectors.
    expect_vector(probe!("movq qword ptr [rdi], xmm0"; in("rdi") at), 14, 3)?;
    expect_vector(probe!("mov word ptr [rdi], ds"; in("rdi") at), 14, 3)?;
    // Two entries at once: the comparison is carried out, the store is not.
    let pair = (table.word(2), table.word(3));
    // rbx, which the compiler keeps for itself, and rcx are what would be stored.
    let refused = probe!(rax = pair.0, "lock cmpxchg16b [rdi]"; in("rdi") at, inlateout("rdx") pair.1 => _, in("rcx") 0);
    expect_vector(refused, 14, 3)?;
    check_eq!((table.word(2), table.word(3)), pair);
    // A page that is no table: its pages are read-only for another reason.
    let page = Page::new()?;
    protect(&page, false)?;
    let refused = probe!(rax = 1, "mov [rdi], rax"; in("rdi") page.address());
    protect(&page, true)?;
    expect_vector(refused, 14, 3)?;
    check_eq!(plain_word(&page, 0), 0);
    // Without the assist: the first domain's stores are carried out all the same, nobody else's.
    check_eq!(assist(1), Ok(0));
    let stored = probe!(rax = 0, "mov [rdi], rax"; in("rdi") at);
    let entry = table.word(2);
    check_eq!(assist(0), Ok(0));
    check_eq!((stored.is_ok(), entry), by_privilege((true, 0), (false, before)));
    Ok(())
}
