//! A matcher for the few 64-bit instructions the hypervisor executes for a guest.
//!
//! An emulator that knows all of x86 has been a rich source of escapes (XSA-105, 106, 123, 195, 200, 204 and more), so
//! this is a whitelist: [`privileged`] knows the instructions that fault at CPL 3 and that a paravirtualized kernel may
//! still execute, [`store`] the stores a kernel may aim at a page table it sees read-only. Whatever is not in the list
//! decodes to nothing, and its fault goes to the guest. The host test compares every answer with a full decoder.
//!
//! Both are pure functions of at most [`MAX_LENGTH`] bytes. Stores are those of 64-bit code only; the privileged instructions of
//! 16- and 32-bit segments are decoded too, but for string I/O, which would need their data segments.

/// The longest an x86 instruction can be, in bytes.
pub const MAX_LENGTH: usize = 15;

/// A general register by its hardware number: 0 rax, 1 rcx, 2 rdx, 3 rbx, 4 rsp, 5 rbp, 6 rsi, 7 rdi, 8 to 15.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gpr(u8);

impl Gpr {
    /// The accumulator.
    pub const RAX: Gpr = Gpr(0);
    /// The count of shifts and repetitions.
    pub const RCX: Gpr = Gpr(1);
    /// The upper half of double-width operands.
    pub const RDX: Gpr = Gpr(2);
    /// The stack pointer.
    pub const RSP: Gpr = Gpr(4);
    /// The source of string instructions.
    pub const RSI: Gpr = Gpr(6);
    /// The destination of string instructions.
    pub const RDI: Gpr = Gpr(7);
    /// The register with this number; bits above the low four are dropped.
    pub const fn new_truncated(number: u8) -> Gpr {
        Gpr(number & 15)
    }
    /// Its number, 0 to 15.
    pub const fn number(self) -> u8 {
        self.0
    }
}

/// A control register that can be emulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum ControlReg {
    Cr0,
    Cr2,
    Cr3,
    Cr4,
}

/// Bytes that a port or memory access moves at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Width {
    Byte,
    Word,
    Dword,
    Qword,
}

impl Width {
    /// In bytes.
    pub const fn bytes(self) -> u8 {
        match self {
            Width::Byte => 1,
            Width::Word => 2,
            Width::Dword => 4,
            Width::Qword => 8,
        }
    }
    /// The bits of a value of this width.
    pub const fn mask(self) -> u64 {
        u64::MAX >> (64 - 8 * self.bytes() as u32)
    }
}

/// What kind of code segment the bytes are in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Mode {
    Bits16,
    Bits32,
    Bits64,
}

/// Where IN and OUT find the port number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// In the instruction.
    Immediate(u8),
    /// In dx.
    Dx,
}

/// The segment whose base is added to an address; all others are flat in 64-bit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Base {
    Flat,
    Fs,
    Gs,
}

/// One step, or as many as (e/r)cx says, of INS or OUTS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StringIo {
    /// Size of one step.
    pub width: Width,
    /// Whether it repeats (e/r)cx times.
    pub repeat: bool,
    /// Whether index and count registers are used as 32-bit registers.
    pub address32: bool,
    /// Segment of the memory operand (INS always stores flat).
    pub base: Base,
}

/// What a privileged instruction does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Op {
    ReadCr { cr: ControlReg, to: Gpr },
    WriteCr { cr: ControlReg, from: Gpr },
    ReadDr { dr: u8, to: Gpr },
    WriteDr { dr: u8, from: Gpr },
    Clts,
    Cli,
    Sti,
    Cpuid,
    Rdmsr,
    Wrmsr,
    Rdtsc,
    Rdtscp,
    Xsetbv,
    Wbinvd,
    In { port: Port, width: Width },
    Out { port: Port, width: Width },
    Ins(StringIo),
    Outs(StringIo),
}

/// A decoded instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Insn<T> {
    /// Its length in bytes, at most [`MAX_LENGTH`].
    pub len: u8,
    /// What it does.
    pub op: T,
}

/// A memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mem {
    /// Segment base to add.
    pub segment: Base,
    /// Base register.
    pub base: Option<MemBase>,
    /// Index register and the shift of its scale (0 to 3).
    pub index: Option<(Gpr, u8)>,
    /// Displacement: 32 bits, sign-extended, but for the moves between the accumulator and an address in the instruction.
    pub disp: i64,
    /// Whether the sum is cut to 32 bits before the segment base is added.
    pub address32: bool,
}

/// The base of a memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemBase {
    /// A general register.
    Reg(Gpr),
    /// The address of the next instruction.
    NextRip,
}

/// Where a store takes a value from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A register.
    Reg(Gpr),
    /// A constant, sign-extended.
    Imm(i32),
    /// Memory: of a string instruction, a PUSH or a POP.
    Mem(Mem),
    /// The flags register.
    Flags,
}

/// Arithmetic and logic of two operands, in the order of the opcodes; the eighth, CMP, stores nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Alu {
    Add,
    Or,
    Adc,
    Sbb,
    And,
    Sub,
    Xor,
}

/// Arithmetic and logic of one operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Unary {
    Inc,
    Dec,
    Not,
    Neg,
}

/// What happens to one bit, whose old value the carry flag gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Bit {
    Set,
    Reset,
    Complement,
}

/// A shift or rotation of one operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Shift {
    Rol,
    Ror,
    Rcl,
    Rcr,
    Shl,
    Shr,
    Sar,
}

/// How a store computes what it writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum StoreOp {
    /// Writes the source.
    Mov(Source),
    /// Writes the source with its bytes in reverse order.
    Movbe(Gpr),
    /// Writes 1 if a condition holds, else 0: the number of the condition as in the opcode.
    Set(u8),
    /// Exchanges memory and register, atomically.
    Xchg(Gpr),
    /// Writes the register if memory equals rax, and loads rax otherwise.
    Cmpxchg(Gpr),
    Alu(Alu, Source),
    Unary(Unary),
    /// A register may select a bit outside the addressed word.
    Bit(Bit, Source),
    /// By a constant, or by cl.
    Shift(Shift, Source),
    /// SHLD or SHRD: the register's bits come in; by a constant, or by cl.
    DoubleShift {
        left: bool,
        from: Gpr,
        count: Source,
    },
    /// Writes the sum of memory and register, and loads the register with what memory held.
    Xadd(Gpr),
    /// Writes ecx:ebx if memory equals edx:eax, and loads edx:eax otherwise.
    Cmpxchg8b,
    /// Writes rcx:rbx if 16 bytes of memory equal rdx:rax, and loads rdx:rax otherwise.
    Cmpxchg16b,
}

/// What a store does to the registers that lead it, besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advance {
    /// Nothing.
    None,
    /// A string instruction steps rdi, and rsi if it reads memory, by the direction flag.
    String {
        /// It does so (e/r)cx times.
        repeat: bool,
    },
    /// PUSH: rsp goes down first, and leads to the operand.
    Push,
    /// POP: rsp goes up before it takes part in the address.
    Pop,
}

/// A store to memory of 1 to 8 bytes, or the one of 16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Store {
    /// What is written.
    pub op: StoreOp,
    /// How wide; `Qword` also for the halves of [`StoreOp::Cmpxchg16b`].
    pub width: Width,
    /// Whether the register operand is bits 8 to 15 of its register: ah, ch, dh, bh.
    pub high: bool,
    /// Where.
    pub mem: Mem,
    /// Whether it carries a LOCK prefix.
    pub lock: bool,
    /// What becomes of rsp, rsi, rdi and rcx.
    pub advance: Advance,
}

/// Legacy and REX prefixes in front of an opcode.
#[derive(Clone, Copy, Default)]
struct Prefixes {
    operand16: bool,
    address32: bool,
    lock: bool,
    /// The last of F2 and F3.
    repeat: Option<u8>,
    segment: Option<Base>,
    rex: u8,
}

impl Prefixes {
    fn rex_w(self) -> bool {
        self.rex & 8 != 0
    }
    /// The register numbered by three bits of ModRM and one bit of REX.
    fn reg(self, modrm: u8) -> Gpr {
        Gpr((modrm >> 3 & 7) | (self.rex & 4) << 1)
    }
    fn rm(self, modrm: u8) -> Gpr {
        Gpr((modrm & 7) | (self.rex & 1) << 3)
    }
    fn base(self) -> Base {
        self.segment.unwrap_or(Base::Flat)
    }
    /// Width of an operand in memory.
    fn width(self, byte: bool) -> Width {
        match (byte, self.rex_w(), self.operand16) {
            (true, ..) => Width::Byte,
            (_, true, _) => Width::Qword,
            (_, false, true) => Width::Word,
            (_, false, false) => Width::Dword,
        }
    }
    /// Width of an operand on the stack: there is none of 4 bytes.
    fn stack_width(self) -> Width {
        if self.operand16 && !self.rex_w() { Width::Word } else { Width::Qword }
    }
    /// Width of a port access by an opcode whose low bit says whether it is a byte.
    fn port_width(self, opcode: u8) -> Width {
        if opcode & 1 == 0 {
            Width::Byte
        } else if self.operand16 && !self.rex_w() {
            Width::Word
        } else {
            // There are no 64-bit port accesses.
            Width::Dword
        }
    }
}

/// Reads an instruction byte by byte.
struct Cursor<'a> {
    bytes: &'a [u8],
    read: u8,
}

impl<'a> Cursor<'a> {
    fn new(bytes: &'a [u8]) -> Cursor<'a> {
        Cursor { bytes: bytes.get(..MAX_LENGTH).unwrap_or(bytes), read: 0 }
    }
    fn next(&mut self) -> Option<u8> {
        let (first, rest) = self.bytes.split_first()?;
        self.bytes = rest;
        self.read += 1;
        Some(*first)
    }
    fn next_i32(&mut self) -> Option<i32> {
        Some(i32::from_le_bytes([self.next()?, self.next()?, self.next()?, self.next()?]))
    }
    /// Reads a constant of an instruction of this width, sign-extended.
    fn immediate(&mut self, width: Width) -> Option<i32> {
        Some(match width {
            Width::Byte => i32::from(self.next()? as i8),
            Width::Word => i32::from(i16::from_le_bytes([self.next()?, self.next()?])),
            Width::Dword | Width::Qword => self.next_i32()?,
        })
    }
    /// Reads prefixes, and the first byte of the opcode after them.
    fn prefixes(&mut self, mode: Mode) -> Option<(Prefixes, u8)> {
        let small = mode == Mode::Bits16;
        let mut p = Prefixes { operand16: small, ..Prefixes::default() };
        loop {
            let byte = self.next()?;
            // REX counts only right before the opcode.
            let rex = core::mem::take(&mut p.rex);
            match byte {
                0x66 => p.operand16 = !small,
                0x67 => p.address32 = true,
                0xf0 => p.lock = true,
                0xf2 | 0xf3 => p.repeat = Some(byte),
                // The other four segments are flat in 64-bit mode and their prefixes are ignored.
                0x26 | 0x2e | 0x36 | 0x3e => {}
                0x64 => p.segment = Some(Base::Fs),
                0x65 => p.segment = Some(Base::Gs),
                0x40..=0x4f if mode == Mode::Bits64 => p.rex = byte,
                opcode => {
                    p.rex = rex;
                    return Some((p, opcode));
                }
            }
        }
    }
    /// The memory operand of a ModRM byte; `None` when it names a register.
    fn memory(&mut self, p: Prefixes, modrm: u8) -> Option<Mem> {
        let mode = modrm >> 6;
        if mode == 3 {
            return None;
        }
        let mut mem = Mem { segment: p.base(), base: None, index: None, disp: 0, address32: p.address32 };
        let mut disp32 = mode == 2;
        if modrm & 7 == 4 {
            let sib = self.next()?;
            let index = Gpr((sib >> 3 & 7) | (p.rex & 2) << 2);
            // Number 4 means no index; r12 is one.
            if index.0 != 4 {
                mem.index = Some((index, sib >> 6));
            }
            if sib & 7 == 5 && mode == 0 {
                disp32 = true;
            } else {
                mem.base = Some(MemBase::Reg(p.rm(sib)));
            }
        } else if modrm & 7 == 5 && mode == 0 {
            mem.base = Some(MemBase::NextRip);
            disp32 = true;
        } else {
            mem.base = Some(MemBase::Reg(p.rm(modrm)));
        }
        if disp32 {
            mem.disp = i64::from(self.next_i32()?);
        } else if mode == 1 {
            mem.disp = i64::from(self.next()? as i8);
        }
        Some(mem)
    }
}

/// Decodes a privileged instruction at the start of `bytes`.
///
/// Nothing is returned for an instruction outside the whitelist, one that would be undefined, or one cut off by the end
/// of `bytes`.
pub fn privileged(bytes: &[u8], mode: Mode) -> Option<Insn<Op>> {
    let mut c = Cursor::new(bytes);
    let (p, opcode) = c.prefixes(mode)?;
    // None of these takes LOCK: it makes them undefined.
    if p.lock {
        return None;
    }
    let string = || StringIo {
        width: p.port_width(opcode),
        repeat: p.repeat.is_some(),
        address32: p.address32,
        base: if opcode >= 0x6e { p.base() } else { Base::Flat },
    };
    let op = match opcode {
        0x6c..=0x6f if mode != Mode::Bits64 => return None,
        0x6c | 0x6d => Op::Ins(string()),
        0x6e | 0x6f => Op::Outs(string()),
        0xe4 | 0xe5 => Op::In { port: Port::Immediate(c.next()?), width: p.port_width(opcode) },
        0xe6 | 0xe7 => Op::Out { port: Port::Immediate(c.next()?), width: p.port_width(opcode) },
        0xec | 0xed => Op::In { port: Port::Dx, width: p.port_width(opcode) },
        0xee | 0xef => Op::Out { port: Port::Dx, width: p.port_width(opcode) },
        0xfa => Op::Cli,
        0xfb => Op::Sti,
        0x0f => match c.next()? {
            0x01 => match c.next()? {
                // XSETBV has no form with an operand-size or repeat prefix.
                0xd1 if p.operand16 == (mode == Mode::Bits16) && p.repeat.is_none() => Op::Xsetbv,
                0xf9 => Op::Rdtscp,
                _ => return None,
            },
            0x06 => Op::Clts,
            // With F3 it is WBNOINVD, which older processors execute as WBINVD.
            0x09 => Op::Wbinvd,
            0x30 => Op::Wrmsr,
            0x31 => Op::Rdtsc,
            0x32 => Op::Rdmsr,
            0xa2 => Op::Cpuid,
            move_ @ (0x20..=0x23) => {
                // The mode bits of ModRM are ignored: these forms always name registers.
                let modrm = c.next()?;
                let special = p.reg(modrm).number();
                let gpr = p.rm(modrm);
                let cr = || {
                    Some(match special {
                        0 => ControlReg::Cr0,
                        2 => ControlReg::Cr2,
                        3 => ControlReg::Cr3,
                        4 => ControlReg::Cr4,
                        _ => return None,
                    })
                };
                match move_ {
                    0x20 => Op::ReadCr { cr: cr()?, to: gpr },
                    0x22 => Op::WriteCr { cr: cr()?, from: gpr },
                    _ if special > 7 => return None,
                    0x21 => Op::ReadDr { dr: special, to: gpr },
                    _ => Op::WriteDr { dr: special, from: gpr },
                }
            }
            _ => return None,
        },
        _ => return None,
    };
    Some(Insn { len: c.read, op })
}

/// Decodes a store at the start of `bytes` as 64-bit code.
///
/// As with [`privileged`], whatever is not certain is not decoded. Repeat prefixes count for string instructions alone; in front
/// of others they are hints about lock elision, or nothing.
pub fn store(bytes: &[u8]) -> Option<Insn<Store>> {
    let mut c = Cursor::new(bytes);
    let (p, opcode) = c.prefixes(Mode::Bits64)?;
    let store = match opcode {
        0x50..=0x57 | 0x68 | 0x6a | 0x9c => push(&mut c, p, opcode)?,
        0xa2 | 0xa3 => store_to_offset(&mut c, p, opcode)?,
        0xa4 | 0xa5 | 0xaa | 0xab => string_store(p, opcode),
        _ => modrm_store(&mut c, p, opcode)?,
    };
    // LOCK is for instructions that read what they write; with others it is undefined.
    let read = !matches!(
        store.op,
        StoreOp::Mov(_)
            | StoreOp::Movbe(_)
            | StoreOp::Set(_)
            | StoreOp::Shift(..)
            | StoreOp::DoubleShift { .. }
    );
    (read || !store.lock).then_some(Insn { len: c.read, op: store })
}

/// An operand at the address in a register.
fn at(register: Gpr, segment: Base, address32: bool) -> Mem {
    Mem { segment, base: Some(MemBase::Reg(register)), index: None, disp: 0, address32 }
}

/// PUSH of a register, a constant, the flags.
fn push(c: &mut Cursor<'_>, p: Prefixes, opcode: u8) -> Option<Store> {
    let width = p.stack_width();
    let source = match opcode {
        0x68 => Source::Imm(c.immediate(width)?),
        0x6a => Source::Imm(i32::from(c.next()? as i8)),
        0x9c => Source::Flags,
        _ => Source::Reg(p.rm(opcode)),
    };
    Some(pushed(p, source, width))
}

fn pushed(p: Prefixes, source: Source, width: Width) -> Store {
    let mem = at(Gpr::RSP, Base::Flat, false);
    Store { op: StoreOp::Mov(source), width, high: false, mem, lock: p.lock, advance: Advance::Push }
}

/// MOV of the accumulator to an address that is in the instruction as a whole.
fn store_to_offset(c: &mut Cursor<'_>, p: Prefixes, opcode: u8) -> Option<Store> {
    let mut disp = u64::from(c.next_i32()? as u32);
    if !p.address32 {
        disp |= u64::from(c.next_i32()? as u32) << 32;
    }
    let mem = Mem { segment: p.base(), base: None, index: None, disp: disp as i64, address32: p.address32 };
    let (op, width) = (StoreOp::Mov(Source::Reg(Gpr::RAX)), p.width(opcode & 1 == 0));
    Some(Store { op, width, high: false, mem, lock: p.lock, advance: Advance::None })
}

/// STOS and MOVS.
fn string_store(p: Prefixes, opcode: u8) -> Store {
    let source = match opcode {
        0xa4 | 0xa5 => Source::Mem(at(Gpr::RSI, p.base(), p.address32)),
        _ => Source::Reg(Gpr::RAX),
    };
    Store {
        op: StoreOp::Mov(source),
        width: p.width(opcode & 1 == 0),
        high: false,
        // The destination's segment cannot be overridden.
        mem: at(Gpr::RDI, Base::Flat, p.address32),
        lock: p.lock,
        advance: Advance::String { repeat: p.repeat.is_some() },
    }
}

/// The stores with a ModRM byte.
fn modrm_store(c: &mut Cursor<'_>, p: Prefixes, opcode: u8) -> Option<Store> {
    let second = if opcode == 0x0f { Some(c.next()?) } else { None };
    let third = if second == Some(0x38) { Some(c.next()?) } else { None };
    let modrm = c.next()?;
    let group = modrm >> 3 & 7;
    if opcode == 0xff && group == 6 {
        let source = match c.memory(p, modrm) {
            Some(mem) => Source::Mem(mem),
            None if modrm >> 6 == 3 => Source::Reg(p.rm(modrm)),
            None => return None,
        };
        return Some(pushed(p, source, p.stack_width()));
    }
    let mem = c.memory(p, modrm)?;
    let byte = match (opcode, second) {
        (0x0f, Some(0x90..=0x9f | 0xb0 | 0xc0)) => true,
        // All others of two bytes, and POP, have no form of one byte.
        (0x0f | 0x8f, _) => false,
        _ => opcode & 1 == 0,
    };
    let mut width = p.width(byte);
    // Without REX, the byte registers 4 to 7 are the second bytes of the first four.
    let numbered = matches!(
        (opcode, second),
        (0x00 | 0x08 | 0x10 | 0x18 | 0x20 | 0x28 | 0x30 | 0x86 | 0x88, _) | (0x0f, Some(0xb0 | 0xc0))
    );
    let high = numbered && p.rex == 0 && group >= 4;
    let reg = if high { Gpr(group - 4) } else { p.reg(modrm) };
    let mut advance = Advance::None;
    let op = match (opcode, second) {
        (0x00..=0x31, _) if opcode & 7 < 2 => StoreOp::Alu(alu(opcode >> 3)?, Source::Reg(reg)),
        (0x80 | 0x81, _) => StoreOp::Alu(alu(group)?, Source::Imm(c.immediate(width)?)),
        (0x83, _) => StoreOp::Alu(alu(group)?, Source::Imm(i32::from(c.next()? as i8))),
        (0x86 | 0x87, _) => StoreOp::Xchg(reg),
        (0x88 | 0x89, _) => StoreOp::Mov(Source::Reg(reg)),
        (0x8f, _) if group == 0 => {
            (width, advance) = (p.stack_width(), Advance::Pop);
            StoreOp::Mov(Source::Mem(at(Gpr::RSP, Base::Flat, false)))
        }
        (0xc0 | 0xc1, _) => StoreOp::Shift(shift(group), Source::Imm(i32::from(c.next()?))),
        (0xc6 | 0xc7, _) if group == 0 => StoreOp::Mov(Source::Imm(c.immediate(width)?)),
        (0xd0 | 0xd1, _) => StoreOp::Shift(shift(group), Source::Imm(1)),
        (0xd2 | 0xd3, _) => StoreOp::Shift(shift(group), Source::Reg(Gpr::RCX)),
        (0xf6 | 0xf7, _) if group == 2 => StoreOp::Unary(Unary::Not),
        (0xf6 | 0xf7, _) if group == 3 => StoreOp::Unary(Unary::Neg),
        (0xfe | 0xff, _) if group == 0 => StoreOp::Unary(Unary::Inc),
        (0xfe | 0xff, _) if group == 1 => StoreOp::Unary(Unary::Dec),
        (0x0f, Some(second)) => match second {
            // With F2 it is CRC32, and with F3 nothing known.
            0x38 if third == Some(0xf1) && p.repeat.is_none() => StoreOp::Movbe(reg),
            0x90..=0x9f => StoreOp::Set(second & 15),
            0xa4 | 0xac => {
                let count = Source::Imm(i32::from(c.next()?));
                StoreOp::DoubleShift { left: second == 0xa4, from: reg, count }
            }
            0xa5 | 0xad => {
                StoreOp::DoubleShift { left: second == 0xa5, from: reg, count: Source::Reg(Gpr::RCX) }
            }
            0xab => StoreOp::Bit(Bit::Set, Source::Reg(reg)),
            0xb0 | 0xb1 => StoreOp::Cmpxchg(reg),
            0xb3 => StoreOp::Bit(Bit::Reset, Source::Reg(reg)),
            0xba => {
                let bit = Source::Imm(i32::from(c.next()? as i8));
                match group {
                    5 => StoreOp::Bit(Bit::Set, bit),
                    6 => StoreOp::Bit(Bit::Reset, bit),
                    7 => StoreOp::Bit(Bit::Complement, bit),
                    _ => return None,
                }
            }
            0xbb => StoreOp::Bit(Bit::Complement, Source::Reg(reg)),
            0xc0 | 0xc1 => StoreOp::Xadd(reg),
            // MOVNTI has no form with another prefix.
            0xc3 if !p.operand16 && p.repeat.is_none() => StoreOp::Mov(Source::Reg(reg)),
            0xc7 if group == 1 && p.rex_w() => StoreOp::Cmpxchg16b,
            0xc7 if group == 1 => {
                width = Width::Qword;
                StoreOp::Cmpxchg8b
            }
            _ => return None,
        },
        _ => return None,
    };
    Some(Store { op, width, high, mem, lock: p.lock, advance })
}

/// By three bits of an opcode or of ModRM.
fn alu(number: u8) -> Option<Alu> {
    Some(match number {
        0 => Alu::Add,
        1 => Alu::Or,
        2 => Alu::Adc,
        3 => Alu::Sbb,
        4 => Alu::And,
        5 => Alu::Sub,
        6 => Alu::Xor,
        _ => return None,
    })
}

/// By three bits of ModRM, of which 6 is another name for SHL.
fn shift(number: u8) -> Shift {
    match number & 7 {
        0 => Shift::Rol,
        1 => Shift::Ror,
        2 => Shift::Rcl,
        3 => Shift::Rcr,
        5 => Shift::Shr,
        7 => Shift::Sar,
        _ => Shift::Shl,
    }
}

#[cfg(test)]
mod tests;
