//! A matcher for the few 64-bit instructions the hypervisor executes for a guest.
//!
//! An emulator that knows all of x86 has been a rich source of escapes (XSA-105, 106, 123, 195, 200, 204 and more), so
//! this is a whitelist: [`privileged`] knows the instructions that fault at CPL 3 and that a paravirtualized kernel may
//! still execute, [`store`] the stores a kernel may aim at a page table it sees read-only. Whatever is not in the list
//! decodes to nothing, and its fault goes to the guest. The host test compares every answer with a full decoder.
//!
//! Both are pure functions of at most [`MAX_LENGTH`] bytes and know 64-bit code only; code in 16- or 32-bit segments has
//! its faults delivered instead.

/// The longest an x86 instruction can be, in bytes.
pub const MAX_LENGTH: usize = 15;

/// A general register by its hardware number: 0 rax, 1 rcx, 2 rdx, 3 rbx, 4 rsp, 5 rbp, 6 rsi, 7 rdi, 8 to 15.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gpr(u8);

impl Gpr {
    /// The accumulator.
    pub const RAX: Gpr = Gpr(0);
    /// The upper half of double-width operands.
    pub const RDX: Gpr = Gpr(2);
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
    /// Displacement.
    pub disp: i32,
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

/// A value that a store takes from a register or from the instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A register.
    Reg(Gpr),
    /// A constant, sign-extended.
    Imm(i32),
}

/// How a store computes what it writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum StoreOp {
    /// Writes the source.
    Mov(Source),
    /// Exchanges memory and register, atomically.
    Xchg(Gpr),
    /// Writes the register if memory equals rax, and loads rax otherwise.
    Cmpxchg(Gpr),
    And(Source),
    Or(Source),
    Xor(Source),
    /// Sets one bit; a register may select a bit outside the addressed word.
    Bts(Source),
    /// Clears one bit; likewise.
    Btr(Source),
    /// Writes the sum of memory and register, and loads the register with what memory held.
    Xadd(Gpr),
    /// Writes ecx:ebx if memory equals edx:eax, and loads edx:eax otherwise.
    Cmpxchg8b,
    /// Writes rcx:rbx if 16 bytes of memory equal rdx:rax, and loads rdx:rax otherwise.
    Cmpxchg16b,
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
    fn prefixes(&mut self) -> Option<(Prefixes, u8)> {
        let mut p = Prefixes::default();
        loop {
            let byte = self.next()?;
            // REX counts only right before the opcode.
            let rex = core::mem::take(&mut p.rex);
            match byte {
                0x66 => p.operand16 = true,
                0x67 => p.address32 = true,
                0xf0 => p.lock = true,
                0xf2 | 0xf3 => p.repeat = Some(byte),
                // The other four segments are flat in 64-bit mode and their prefixes are ignored.
                0x26 | 0x2e | 0x36 | 0x3e => {}
                0x64 => p.segment = Some(Base::Fs),
                0x65 => p.segment = Some(Base::Gs),
                0x40..=0x4f => p.rex = byte,
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
            mem.disp = self.next_i32()?;
        } else if mode == 1 {
            mem.disp = i32::from(self.next()? as i8);
        }
        Some(mem)
    }
}

/// Decodes a privileged instruction at the start of `bytes` as 64-bit code.
///
/// Nothing is returned for an instruction outside the whitelist, one that would be undefined, or one cut off by the end
/// of `bytes`.
pub fn privileged(bytes: &[u8]) -> Option<Insn<Op>> {
    let mut c = Cursor::new(bytes);
    let (p, opcode) = c.prefixes()?;
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
                0xd1 if !p.operand16 && p.repeat.is_none() => Op::Xsetbv,
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
/// As with [`privileged`], whatever is not certain is not decoded.
pub fn store(bytes: &[u8]) -> Option<Insn<Store>> {
    let mut c = Cursor::new(bytes);
    let (p, opcode) = c.prefixes()?;
    // F2 and F3 mean lock elision hints on some of these, and nothing sure on others.
    if p.repeat.is_some() {
        return None;
    }
    let second = if opcode == 0x0f { Some(c.next()?) } else { None };
    let modrm = c.next()?;
    let mem = c.memory(p, modrm)?;
    let group = modrm >> 3 & 7;
    let byte = matches!(
        (opcode, second),
        (0x08 | 0x20 | 0x30 | 0x80 | 0x86 | 0x88 | 0xc6, _) | (_, Some(0xb0 | 0xc0))
    );
    let width = match (byte, p.rex_w(), p.operand16) {
        (true, ..) => Width::Byte,
        (_, true, _) => Width::Qword,
        (_, false, true) => Width::Word,
        (_, false, false) => Width::Dword,
    };
    // Without REX, the byte registers 4 to 7 are the second bytes of the first four.
    let immediate = matches!(opcode, 0x80 | 0xc6);
    let high = byte && !immediate && p.rex == 0 && group >= 4;
    let reg = if high { Gpr(group - 4) } else { p.reg(modrm) };
    let alu = |source| {
        Some(match group {
            1 => StoreOp::Or(source),
            4 => StoreOp::And(source),
            6 => StoreOp::Xor(source),
            _ => return None,
        })
    };
    let op = match (opcode, second) {
        (0x08 | 0x09, _) => StoreOp::Or(Source::Reg(reg)),
        (0x20 | 0x21, _) => StoreOp::And(Source::Reg(reg)),
        (0x30 | 0x31, _) => StoreOp::Xor(Source::Reg(reg)),
        (0x80 | 0x81, _) => alu(Source::Imm(c.immediate(width)?))?,
        (0x83, _) => alu(Source::Imm(i32::from(c.next()? as i8)))?,
        (0x86 | 0x87, _) => StoreOp::Xchg(reg),
        (0x88 | 0x89, _) => StoreOp::Mov(Source::Reg(reg)),
        (0xc6 | 0xc7, _) if group == 0 => StoreOp::Mov(Source::Imm(c.immediate(width)?)),
        (_, Some(0xab)) => StoreOp::Bts(Source::Reg(reg)),
        (_, Some(0xb0 | 0xb1)) => StoreOp::Cmpxchg(reg),
        (_, Some(0xb3)) => StoreOp::Btr(Source::Reg(reg)),
        (_, Some(0xc0 | 0xc1)) => StoreOp::Xadd(reg),
        (_, Some(0xc7)) if group == 1 && p.rex_w() => StoreOp::Cmpxchg16b,
        (_, Some(0xc7)) if group == 1 => StoreOp::Cmpxchg8b,
        (_, Some(0xba)) => {
            let bit = Source::Imm(i32::from(c.next()? as i8));
            match group {
                5 => StoreOp::Bts(bit),
                6 => StoreOp::Btr(bit),
                _ => return None,
            }
        }
        _ => return None,
    };
    // MOV with LOCK is undefined.
    if p.lock && matches!(op, StoreOp::Mov(_)) {
        return None;
    }
    let width = if op == StoreOp::Cmpxchg8b { Width::Qword } else { width };
    Some(Insn { len: c.read, op: Store { op, width, high, mem, lock: p.lock } })
}

#[cfg(test)]
mod tests;
