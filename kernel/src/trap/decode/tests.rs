//! Compares the matcher with iced-x86: same length and operands for what it accepts, and nothing of the whitelist missed.

use std::vec;
use std::vec::Vec;

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use proptest::prelude::*;

use super::*;

/// Every prefix byte of 64-bit code.
fn prefix_bytes() -> impl Iterator<Item = u8> + Clone {
    [0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x66, 0x67, 0xf0, 0xf2, 0xf3].into_iter().chain(0x40..=0x4f)
}

/// No prefix, every prefix, every pair.
fn prefix_sets() -> Vec<Vec<u8>> {
    let mut sets = vec![vec![]];
    sets.extend(prefix_bytes().map(|p| vec![p]));
    sets.extend(prefix_bytes().flat_map(|p| prefix_bytes().map(move |q| vec![p, q])));
    sets
}

fn iced(bytes: &[u8]) -> Option<Instruction> {
    iced_of(bytes, Mode::Bits64)
}

fn iced_of(bytes: &[u8], mode: Mode) -> Option<Instruction> {
    let bits = match mode {
        Mode::Bits16 => 16,
        Mode::Bits32 => 32,
        Mode::Bits64 => 64,
    };
    let insn = Decoder::with_ip(bits, bytes, 0, DecoderOptions::NONE).decode();
    (insn.code() != Code::INVALID).then_some(insn)
}

/// Number of a 16-, 32- or 64-bit general register.
fn number(reg: Register) -> u8 {
    assert!(reg.is_gpr16() || reg.is_gpr32() || reg.is_gpr64(), "{reg:?}");
    reg.number() as u8
}

fn width(bytes: usize) -> Width {
    match bytes {
        1 => Width::Byte,
        2 => Width::Word,
        4 => Width::Dword,
        8 => Width::Qword,
        _ => panic!("{bytes}"),
    }
}

fn segment(insn: &Instruction) -> Base {
    match insn.segment_prefix() {
        Register::FS => Base::Fs,
        Register::GS => Base::Gs,
        _ => Base::Flat,
    }
}

/// What a full decoder makes of the whitelisted instructions.
fn expected(insn: &Instruction) -> Option<Op> {
    let gpr = |op| Gpr::new_truncated(number(insn.op_register(op)));
    let port = |op: u32| match insn.op_kind(op) {
        OpKind::Immediate8 => Port::Immediate(insn.immediate8()),
        _ => Port::Dx,
    };
    let cr = |reg: Register| match reg {
        Register::CR0 => Some(ControlReg::Cr0),
        Register::CR2 => Some(ControlReg::Cr2),
        Register::CR3 => Some(ControlReg::Cr3),
        Register::CR4 => Some(ControlReg::Cr4),
        _ => None,
    };
    let string = |mem_op: u32| {
        let kind = insn.op_kind(mem_op);
        StringIo {
            width: width(insn.memory_size().size()),
            repeat: insn.has_rep_prefix() || insn.has_repne_prefix(),
            address32: matches!(kind, OpKind::MemoryESEDI | OpKind::MemorySegESI),
            base: if matches!(kind, OpKind::MemorySegESI | OpKind::MemorySegRSI) {
                segment(insn)
            } else {
                Base::Flat
            },
        }
    };
    Some(match insn.code() {
        Code::Mov_r64_cr | Code::Mov_r32_cr => Op::ReadCr { cr: cr(insn.op1_register())?, to: gpr(0) },
        Code::Mov_cr_r64 | Code::Mov_cr_r32 => Op::WriteCr { cr: cr(insn.op0_register())?, from: gpr(1) },
        Code::Mov_r64_dr | Code::Mov_r32_dr => {
            Op::ReadDr { dr: insn.op1_register().number() as u8, to: gpr(0) }
        }
        Code::Mov_dr_r64 | Code::Mov_dr_r32 => {
            Op::WriteDr { dr: insn.op0_register().number() as u8, from: gpr(1) }
        }
        Code::Clts => Op::Clts,
        Code::Cli => Op::Cli,
        Code::Sti => Op::Sti,
        Code::Cpuid => Op::Cpuid,
        Code::Rdmsr => Op::Rdmsr,
        Code::Wrmsr => Op::Wrmsr,
        Code::Rdtsc => Op::Rdtsc,
        Code::Rdtscp => Op::Rdtscp,
        Code::Xsetbv => Op::Xsetbv,
        Code::Wbinvd | Code::Wbnoinvd => Op::Wbinvd,
        _ => match insn.mnemonic() {
            Mnemonic::In => Op::In { port: port(1), width: width(insn.op0_register().size()) },
            Mnemonic::Out => Op::Out { port: port(0), width: width(insn.op1_register().size()) },
            Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => Op::Ins(string(0)),
            Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => Op::Outs(string(1)),
            _ => return None,
        },
    })
}

fn compare_privileged(bytes: &[u8]) {
    for mode in [Mode::Bits64, Mode::Bits32, Mode::Bits16] {
        let ours = privileged(bytes, mode);
        // String I/O outside 64-bit code is left to the guest.
        let known = |op: &Op| mode == Mode::Bits64 || !matches!(op, Op::Ins(_) | Op::Outs(_));
        let op = |i: &Instruction| expected(i).filter(known);
        let theirs = iced_of(bytes, mode).and_then(|i| Some(Insn { len: i.len() as u8, op: op(&i)? }));
        assert_eq!(ours, theirs, "{mode:?} {bytes:02x?}");
    }
}

/// All prefix pairs, all opcodes of one byte and of two bytes after 0F, and all ModRM bytes where there is one.
#[test]
fn privileged_agrees_with_iced_over_all_opcodes() {
    let mut accepted = 0;
    for set in prefix_sets() {
        let mut bytes = set.clone();
        bytes.extend([0, 0, 0x12, 0x34, 0x56, 0x78, 0x9a]);
        let at = set.len();
        for opcode in 0..=255u8 {
            bytes[at] = opcode;
            // The byte after matters to IN/OUT (port) and to the two-byte opcodes.
            let seconds = if matches!(opcode, 0x0f | 0xe4..=0xe7) { 0..=255u8 } else { 0xa2..=0xa2 };
            for second in seconds {
                bytes[at + 1] = second;
                let modrms = match (opcode, second) {
                    (0x0f, 0x01 | 0x20..=0x23) => 0..=255u8,
                    _ => 0x12..=0x12,
                };
                for modrm in modrms {
                    bytes[at + 2] = modrm;
                    compare_privileged(&bytes);
                    accepted += u64::from(privileged(&bytes, Mode::Bits64).is_some());
                }
            }
        }
    }
    // The comparison is about something: the whitelist was met many times.
    assert!(accepted > 500_000, "{accepted}");
}

#[test]
fn an_instruction_cut_short_or_too_long_is_refused() {
    assert_eq!(privileged(&[], Mode::Bits64), None);
    assert_eq!(privileged(&[0x0f], Mode::Bits64), None);
    assert_eq!(privileged(&[0x0f, 0x20], Mode::Bits64), None);
    assert_eq!(privileged(&[0xe4], Mode::Bits64), None);
    let mut long = vec![0x66; 14];
    long.push(0xfa);
    assert_eq!(privileged(&long, Mode::Bits64), Some(Insn { len: 15, op: Op::Cli }));
    long.insert(0, 0x66);
    assert_eq!(privileged(&long, Mode::Bits64), None);
}

/// Whether an instruction has its address in itself as a whole, and not 32 bits of it, sign-extended.
fn has_whole_address(insn: &Instruction) -> bool {
    matches!(
        insn.code(),
        Code::Mov_moffs64_RAX | Code::Mov_moffs32_EAX | Code::Mov_moffs16_AX | Code::Mov_moffs8_AL
    )
}

/// A memory operand of iced's; the address size is the caller's to find.
fn memory(insn: &Instruction) -> Mem {
    let displacement = insn.memory_displacement64();
    let (base, disp) = match insn.memory_base() {
        Register::None if has_whole_address(insn) => (None, displacement as i64),
        Register::None => (None, i64::from(displacement as i32)),
        Register::RIP | Register::EIP => {
            // iced gives the target; the matcher the distance from the next instruction.
            (Some(MemBase::NextRip), i64::from(displacement.wrapping_sub(insn.len() as u64) as i32))
        }
        reg => (Some(MemBase::Reg(Gpr::new_truncated(number(reg)))), i64::from(displacement as i32)),
    };
    let index = match insn.memory_index() {
        Register::None => None,
        reg => Some((Gpr::new_truncated(number(reg)), insn.memory_index_scale().trailing_zeros() as u8)),
    };
    Mem { segment: segment(insn), base, index, disp, address32: false }
}

/// The operand that a string instruction or the stack has in memory.
fn implied(register: Gpr, segment: Base) -> Mem {
    Mem { segment, base: Some(MemBase::Reg(register)), index: None, disp: 0, address32: false }
}

/// PUSH and the string instructions, whose destination is implied.
fn expected_implied(insn: &Instruction) -> Option<Store> {
    let store = |source, size, mem, advance| {
        let op = StoreOp::Mov(source);
        Some(Store { op, width: width(size), high: false, mem, lock: false, advance })
    };
    let repeat = insn.has_rep_prefix() || insn.has_repne_prefix();
    let size = insn.memory_size().size();
    match insn.mnemonic() {
        Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => {
            let mem = implied(Gpr::RDI, Base::Flat);
            store(Source::Reg(Gpr::RAX), size, mem, Advance::String { repeat })
        }
        Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq
            if insn.is_string_instruction() =>
        {
            let source = Source::Mem(implied(Gpr::RSI, segment(insn)));
            store(source, size, implied(Gpr::RDI, Base::Flat), Advance::String { repeat })
        }
        Mnemonic::Push | Mnemonic::Pushf | Mnemonic::Pushfq => {
            let source = match (insn.mnemonic(), insn.op0_kind()) {
                (Mnemonic::Push, OpKind::Register) if insn.op0_register().is_segment_register() => {
                    return None;
                }
                (Mnemonic::Push, OpKind::Register) => {
                    Source::Reg(Gpr::new_truncated(number(insn.op0_register())))
                }
                (Mnemonic::Push, OpKind::Memory) => Source::Mem(memory(insn)),
                (Mnemonic::Push, _) => Source::Imm(insn.immediate(0) as i32),
                _ => Source::Flags,
            };
            let size = insn.stack_pointer_increment().unsigned_abs() as usize;
            let source = match source {
                Source::Imm(i) if size == 2 => Source::Imm(i32::from(i as i16)),
                other => other,
            };
            store(source, size, implied(Gpr::RSP, Base::Flat), Advance::Push)
        }
        Mnemonic::Pop if insn.op0_kind() == OpKind::Memory => {
            let source = Source::Mem(implied(Gpr::RSP, Base::Flat));
            store(source, size, memory(insn), Advance::Pop)
        }
        _ => None,
    }
}

fn expected_store(insn: &Instruction) -> Option<Store> {
    if let Some(store) = expected_implied(insn) {
        return Some(store);
    }
    if insn.op0_kind() != OpKind::Memory || insn.is_string_instruction() {
        return None;
    }
    let size = insn.memory_size().size();
    if size > 16 {
        return None;
    }
    let mut high = false;
    let mut general = |register: Register| {
        high = matches!(register, Register::AH | Register::CH | Register::DH | Register::BH);
        register.is_gpr().then(|| Gpr::new_truncated(register.full_register().number() as u8))
    };
    let source = match insn.op1_kind() {
        _ if insn.op_count() == 1 => Source::Imm(0),
        OpKind::Register => Source::Reg(general(insn.op1_register())?),
        OpKind::Immediate8to16 => Source::Imm(i32::from(insn.immediate8to16())),
        OpKind::Immediate16 => Source::Imm(i32::from(insn.immediate16() as i16)),
        OpKind::Immediate8 => Source::Imm(i32::from(insn.immediate8() as i8)),
        OpKind::Immediate8to32 => Source::Imm(insn.immediate8to32()),
        OpKind::Immediate8to64 => Source::Imm(insn.immediate8to64() as i32),
        OpKind::Immediate32 => Source::Imm(insn.immediate32() as i32),
        OpKind::Immediate32to64 => Source::Imm(insn.immediate32to64() as i32),
        _ => return None,
    };
    let reg = || match source {
        Source::Reg(r) => Some(r),
        _ => None,
    };
    let count = |operand| match insn.op_kind(operand) {
        OpKind::Immediate8 => Source::Imm(i32::from(insn.immediate(operand) as u8)),
        _ => Source::Reg(Gpr::RCX),
    };
    let alu = |alu| StoreOp::Alu(alu, source);
    let shift = |kind| StoreOp::Shift(kind, count(1));
    let op = match insn.mnemonic() {
        Mnemonic::Mov | Mnemonic::Movnti => StoreOp::Mov(source),
        Mnemonic::Movbe => StoreOp::Movbe(reg()?),
        Mnemonic::Xchg => StoreOp::Xchg(reg()?),
        Mnemonic::Cmpxchg => StoreOp::Cmpxchg(reg()?),
        Mnemonic::Add => alu(Alu::Add),
        Mnemonic::Or => alu(Alu::Or),
        Mnemonic::Adc => alu(Alu::Adc),
        Mnemonic::Sbb => alu(Alu::Sbb),
        Mnemonic::And => alu(Alu::And),
        Mnemonic::Sub => alu(Alu::Sub),
        Mnemonic::Xor => alu(Alu::Xor),
        Mnemonic::Inc => StoreOp::Unary(Unary::Inc),
        Mnemonic::Dec => StoreOp::Unary(Unary::Dec),
        Mnemonic::Not => StoreOp::Unary(Unary::Not),
        Mnemonic::Neg => StoreOp::Unary(Unary::Neg),
        Mnemonic::Bts => StoreOp::Bit(Bit::Set, source),
        Mnemonic::Btr => StoreOp::Bit(Bit::Reset, source),
        Mnemonic::Btc => StoreOp::Bit(Bit::Complement, source),
        Mnemonic::Rol => shift(Shift::Rol),
        Mnemonic::Ror => shift(Shift::Ror),
        Mnemonic::Rcl => shift(Shift::Rcl),
        Mnemonic::Rcr => shift(Shift::Rcr),
        Mnemonic::Shl | Mnemonic::Sal => shift(Shift::Shl),
        Mnemonic::Shr => shift(Shift::Shr),
        Mnemonic::Sar => shift(Shift::Sar),
        shift @ (Mnemonic::Shld | Mnemonic::Shrd) => {
            StoreOp::DoubleShift { left: shift == Mnemonic::Shld, from: reg()?, count: count(2) }
        }
        Mnemonic::Xadd => StoreOp::Xadd(reg()?),
        Mnemonic::Cmpxchg8b => StoreOp::Cmpxchg8b,
        Mnemonic::Cmpxchg16b => StoreOp::Cmpxchg16b,
        _ => StoreOp::Set(match insn.code() {
            Code::Seto_rm8 => 0,
            Code::Setno_rm8 => 1,
            Code::Setb_rm8 => 2,
            Code::Setae_rm8 => 3,
            Code::Sete_rm8 => 4,
            Code::Setne_rm8 => 5,
            Code::Setbe_rm8 => 6,
            Code::Seta_rm8 => 7,
            Code::Sets_rm8 => 8,
            Code::Setns_rm8 => 9,
            Code::Setp_rm8 => 10,
            Code::Setnp_rm8 => 11,
            Code::Setl_rm8 => 12,
            Code::Setge_rm8 => 13,
            Code::Setle_rm8 => 14,
            Code::Setg_rm8 => 15,
            _ => return None,
        }),
    };
    // The count of a shift is cl, which is not the register that the ModRM byte names.
    let high = high && !matches!(op, StoreOp::Shift(..));
    Some(Store {
        op,
        width: if size == 16 { Width::Qword } else { width(size) },
        high,
        mem: memory(insn),
        lock: insn.has_lock_prefix(),
        advance: Advance::None,
    })
}

fn compare_store(bytes: &[u8]) -> bool {
    let ours = store(bytes);
    let theirs = iced(bytes).and_then(|i| Some(Insn { len: i.len() as u8, op: expected_store(&i)? }));
    // iced has no flag for the address size: it follows from the prefixes, and the stack's is always whole.
    let address32 = bytes.iter().take_while(|b| prefix_bytes().any(|p| p == **b)).any(|b| *b == 0x67);
    let theirs = theirs.map(|mut i| {
        i.op.mem.address32 = address32 && i.op.advance != Advance::Push;
        if let StoreOp::Mov(Source::Mem(source)) = &mut i.op.op {
            source.address32 = address32 && i.op.advance != Advance::Pop;
        }
        i
    });
    assert_eq!(ours, theirs, "{bytes:02x?}");
    ours.is_some()
}

#[test]
fn store_agrees_with_iced_over_all_opcodes_and_modrm() {
    let mut accepted = 0u64;
    let opcodes: Vec<Vec<u8>> = (0..=255u8)
        .filter(|b| *b != 0x0f)
        .map(|b| vec![b])
        .chain((0..=255u8).map(|b| vec![0x0f, b]))
        .chain((0..=255u8).map(|b| vec![0x0f, 0x38, b]))
        .collect();
    let singles: Vec<Vec<u8>> = prefix_sets().into_iter().filter(|s| s.len() < 2).collect();
    for set in &singles {
        for opcode in &opcodes {
            for modrm in 0..=255u8 {
                for sib in [0x00, 0x25, 0x65, 0xa4, 0xed] {
                    let mut bytes = set.clone();
                    bytes.extend(opcode);
                    bytes.extend([modrm, sib, 0x81, 0x12, 0x34, 0xf6, 0x78, 0x9a, 0xbc, 0xde, 0xf0, 0x11]);
                    accepted += u64::from(compare_store(&bytes));
                }
            }
        }
    }
    assert!(accepted > 50_000, "{accepted}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200_000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Up to four prefixes, a likely opcode, and random bytes.
    #[test]
    fn random_instructions_agree(
        prefixes in prop::collection::vec(prop::sample::select(prefix_bytes().collect::<Vec<_>>()), 0..5),
        opcode in prop::sample::select(vec![
            vec![0x0f, 0x20], vec![0x0f, 0x22], vec![0x0f, 0x21], vec![0x0f, 0x23], vec![0x0f, 0x01], vec![0x0f, 0x09],
            vec![0x0f, 0xa2], vec![0x6c], vec![0x6d], vec![0x6e], vec![0x6f], vec![0xe5], vec![0xef], vec![0xfb],
            vec![0x09], vec![0x21], vec![0x31], vec![0x81], vec![0x83], vec![0x87], vec![0x89], vec![0xc7],
            vec![0x0f, 0xab], vec![0x0f, 0xb1], vec![0x0f, 0xb3], vec![0x0f, 0xba],
            vec![0x08], vec![0x20], vec![0x30], vec![0x80], vec![0x86], vec![0x88], vec![0xc6], vec![0x0f, 0xb0],
            vec![0x0f, 0xc0], vec![0x0f, 0xc1], vec![0x0f, 0xc7],
            vec![0x00], vec![0x11], vec![0x19], vec![0x29], vec![0x50], vec![0x57], vec![0x68], vec![0x6a], vec![0x8f],
            vec![0x9c], vec![0xa2], vec![0xa3], vec![0xa4], vec![0xa5], vec![0xaa], vec![0xab], vec![0xc0], vec![0xc1],
            vec![0xd0], vec![0xd1], vec![0xd2], vec![0xd3], vec![0xf6], vec![0xf7], vec![0xfe], vec![0xff],
            vec![0x0f, 0x38, 0xf1], vec![0x0f, 0x94], vec![0x0f, 0x9f], vec![0x0f, 0xa4], vec![0x0f, 0xa5],
            vec![0x0f, 0xac], vec![0x0f, 0xad], vec![0x0f, 0xbb], vec![0x0f, 0xc3], vec![],
        ]),
        tail in prop::collection::vec(any::<u8>(), 0..12),
    ) {
        let mut bytes = prefixes;
        bytes.extend(opcode);
        bytes.extend(tail);
        bytes.truncate(MAX_LENGTH);
        compare_privileged(&bytes);
        compare_store(&bytes);
    }
}
