//! Cells: domains of a few pages that do one thing all the time and count it.
//!
//! A cell has no kernel: its code is the assembly below, in one page, and each vCPU has a page for its data. The first word there
//! counts units of work, [`UNIT`] instructions each, so that under `-icount shift=0`, where an instruction takes a nanosecond,
//! work is measured to the nanosecond from inside the cell. Its data pages stay mapped here.

use alloc::vec::Vec;
use core::arch::global_asm;
use guest_sdk::abi::control::{CreateDomain, CreateFlags, VcpuInfo};
use guest_sdk::abi::segment::{FLAT_KERNEL_CS, FLAT_KERNEL_SS};
use guest_sdk::abi::vcpu::{CpuUserRegs, TrapInfo, VcpuContextFlags, VcpuGuestContext};
use guest_sdk::abi::{DomId, Errno};
use guest_sdk::control::{self, Foreign};
use guest_sdk::memory::Access;
use guest_sdk::ring::SharedPage;

/// Instructions in a unit of work of [`Deed::Spin`] and [`Deed::Doze`].
pub const UNIT: u64 = 256;
/// Where the code page is mapped; the data pages of its vCPUs follow.
const CODE: u64 = 0x1_0000;
const PAGE: u64 = 4096;
/// Frames before the first data page: four tables and the code.
const FIRST_DATA: u64 = 5;
const INVALID_OPCODE: u8 = 6;

// rbx: the vCPU's data page. r13: its number. r14, r15, rbp: arguments of the deed.
global_asm!(
    r#"
    .pushsection .rodata.cells, "a"
    .balign 16
    .global __cell_start, __cell_spin, __cell_doze, __cell_fault, __cell_fault_handler, __cell_storm, __cell_end
__cell_start:

    // A vCPU is born with a tick that nobody here wants.
    .macro no_tick
    mov eax, 24
    mov edi, 7
    mov rsi, r13
    xor edx, edx
    syscall
    .endm

__cell_spin:
    no_tick
2:  .rept 254
    nop
    .endr
    add qword ptr [rbx], 1
    jmp 2b

    // Runs for rbp to rbp + r15 units, which is about 0.1 to 4.3 ms, sleeps for as long; r14: system time minus time-stamp counter,
    // r12: random state.
__cell_doze:
    no_tick
3:  call 9f
    and eax, r15d
    lea ecx, [rax + rbp]
4:  .rept 253
    nop
    .endr
    add qword ptr [rbx], 1
    dec ecx
    jnz 4b
    call 9f
    and eax, 0x3fffff
    lea r8d, [rax + 100000]
    rdtsc
    shl rdx, 32
    or rax, rdx
    add rax, r14
    add rax, r8
    mov qword ptr [rbx + 64], 0
    mov qword ptr [rbx + 72], 0
    mov qword ptr [rbx + 80], rax
    mov eax, 29
    mov edi, 3
    lea rsi, [rbx + 64]
    syscall
    jmp 3b
9:  mov rax, r12
    shl rax, 13
    xor r12, rax
    mov rax, r12
    shr rax, 7
    xor r12, rax
    mov rax, r12
    shl rax, 17
    xor r12, rax
    mov eax, r12d
    ret

__cell_fault:
    no_tick
    ud2
    // The handler faults itself, on an empty stack each time.
__cell_fault_handler:
    lea rsp, [rbx + 4096]
    add qword ptr [rbx], 1
    ud2

    // Hypercall r14 with arguments r15, rbp and the data page.
__cell_storm:
    no_tick
5:  mov rax, r14
    mov rdi, r15
    mov rsi, rbp
    mov rdx, r12
    xor r10d, r10d
    syscall
    add qword ptr [rbx], 1
    jmp 5b
__cell_end:
    .popsection
    "#
);

unsafe extern "C" {
    static __cell_start: u8;
    static __cell_spin: u8;
    static __cell_doze: u8;
    static __cell_fault: u8;
    static __cell_fault_handler: u8;
    static __cell_storm: u8;
    static __cell_end: u8;
}

/// What the vCPUs of a cell do.
#[derive(Clone, Copy, Debug)]
pub enum Deed {
    /// They run, with events masked, as any new vCPU.
    Spin,
    /// They run and sleep, for 0.1 to 4.3 ms each. Wants a TSC of 1 GHz.
    Doze,
    /// They fault in the handler of their fault.
    Fault,
    /// They call the hypervisor: each another of these calls, in turn, given by number and the first two arguments. An argument of
    /// [`DATA`] stands for the address of the data page.
    Storm(&'static [(u64, u64, u64)]),
}

/// See [`Deed::Storm`].
pub const DATA: u64 = u64::MAX;
/// Where in the data page that is.
const DATA_OFFSET: u64 = 128;

fn code() -> &'static [u8] {
    let (start, end) = (&raw const __cell_start, &raw const __cell_end);
    // SAFETY: the two symbols are around the code above, which is read-only data here.
    unsafe { core::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}

fn entry(symbol: *const u8) -> u64 {
    CODE + (symbol as u64 - (&raw const __cell_start) as u64)
}

/// A domain that does one thing. It is destroyed when this is dropped.
pub struct Cell {
    /// Its number.
    pub id: DomId,
    vcpus: u32,
    data: Option<Foreign>,
}

impl Cell {
    /// Makes a cell, paused.
    ///
    /// # Errors
    /// The hypervisor's.
    pub fn new(vcpus: u32, deed: Deed) -> Result<Cell, Errno> {
        Cell::with_flags(vcpus, deed, CreateFlags::empty())
    }

    /// As [`Cell::new`], with flags for its making.
    ///
    /// # Errors
    /// The hypervisor's.
    pub fn with_flags(vcpus: u32, deed: Deed, flags: CreateFlags) -> Result<Cell, Errno> {
        let pages = FIRST_DATA + u64::from(vcpus);
        let flags = flags.bits();
        let request = CreateDomain { flags, max_vcpus: vcpus, max_pages: pages, ..CreateDomain::default() };
        let id = control::create_domain(DomId::INVALID, request)?.domid;
        let mut cell = Cell { id, vcpus, data: None };
        let mut frames: Vec<u64> = (0..pages).collect();
        control::populate(id, &mut frames).map_err(|(_, errno)| errno)?;
        let frames: Vec<_> = frames.into_iter().map(guest_sdk::abi::Mfn::new).collect();
        {
            let tables = Foreign::map(id, &frames, Access::ReadWrite)?;
            tables.fill(0, frames.len() * PAGE as usize, 0);
            let put = |page: usize, index: u64, word: u64| {
                tables.write_bytes(page * PAGE as usize + index as usize * 8, &word.to_le_bytes());
            };
            // Present, writable, user, accessed, dirty; the code is not writable.
            let entry = |frame: usize, bits: u64| frames[frame].address().get() | bits;
            for level in 0..3 {
                put(level, 0, entry(level + 1, 0x67));
            }
            put(3, CODE / PAGE, entry(4, 0x65));
            for vcpu in 0..u64::from(vcpus) {
                put(3, CODE / PAGE + 1 + vcpu, entry((FIRST_DATA + vcpu) as usize, 0x67));
            }
            tables.write_bytes(4 * PAGE as usize, code());
        }
        control::pin_table_for(id, 4, frames[0])?;
        cell.data = Some(Foreign::map(id, &frames[FIRST_DATA as usize..], Access::ReadWrite)?);
        for vcpu in 0..vcpus {
            control::set_vcpu_context(id, vcpu, &context(vcpu, deed, frames[0].address().get()))?;
        }
        Ok(cell)
    }

    /// As [`Cell::new`], with a weight.
    ///
    /// # Errors
    /// The hypervisor's.
    pub fn weighted(weight: u32, deed: Deed) -> Result<Cell, Errno> {
        let cell = Cell::new(1, deed)?;
        control::set_weight(cell.id, weight)?;
        Ok(cell)
    }

    /// Writes to where [`DATA`] leads for a vCPU.
    pub fn put_data(&self, vcpu: u32, bytes: &[u8]) {
        if let Some(data) = &self.data {
            data.write_bytes((u64::from(vcpu) * PAGE + DATA_OFFSET) as usize, bytes);
        }
    }

    /// Lets it run.
    ///
    /// # Errors
    /// The hypervisor's.
    pub fn start(&self) -> Result<(), Errno> {
        control::unpause(self.id)
    }

    /// Units of work of all its vCPUs.
    pub fn work(&self) -> u64 {
        (0..self.vcpus).map(|vcpu| self.work_of(vcpu)).sum()
    }

    /// Units of work of one of its vCPUs.
    pub fn work_of(&self, vcpu: u32) -> u64 {
        let mut word = [0; 8];
        if let Some(data) = &self.data {
            data.read_bytes((u64::from(vcpu) * PAGE) as usize, &mut word);
        }
        u64::from_le_bytes(word)
    }

    /// Time that its vCPUs ran, ns.
    ///
    /// # Errors
    /// The hypervisor's.
    pub fn ran_ns(&self) -> Result<u64, Errno> {
        Ok(control::domain_info(self.id)?.cpu_time_ns)
    }

    /// State of one of its vCPUs.
    ///
    /// # Errors
    /// The hypervisor's.
    pub fn vcpu(&self, vcpu: u32) -> Result<VcpuInfo, Errno> {
        control::vcpu_info(self.id, vcpu)
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        self.data = None;
        while let Ok(false) = control::destroy_step(self.id) {}
    }
}

fn context(vcpu: u32, deed: Deed, root: u64) -> VcpuGuestContext {
    let data = CODE + PAGE * (1 + u64::from(vcpu));
    let mut regs = CpuUserRegs {
        rsp: data + PAGE,
        rbx: data,
        r12: 0x9e37_79b9_7f4a_7c15 ^ u64::from(vcpu + 1) << 32 ^ root,
        r13: u64::from(vcpu),
        rflags: 1 << 9,
        cs: FLAT_KERNEL_CS,
        ss: FLAT_KERNEL_SS,
        ..CpuUserRegs::default()
    };
    let mut context = VcpuGuestContext::ZERO;
    regs.rip = match deed {
        Deed::Spin => entry(&raw const __cell_spin),
        Deed::Doze => {
            // SAFETY: every processor has the counter.
            let tsc = unsafe { core::arch::x86_64::_rdtsc() };
            regs.r14 = guest_sdk::time::now_ns().wrapping_sub(tsc);
            // QEMU counts the instructions of all CPUs into one clock.
            let cpus = u64::from(control::phys_info().map_or(1, |info| info.cpus)).next_power_of_two();
            (regs.r15, regs.rbp) = (0x4000 / cpus - 1, 390 / cpus);
            entry(&raw const __cell_doze)
        }
        Deed::Fault => {
            let address = entry(&raw const __cell_fault_handler);
            let handler = TrapInfo { vector: INVALID_OPCODE, flags: 0, cs: FLAT_KERNEL_CS, pad0: 0, address };
            context.trap_ctxt[usize::from(INVALID_OPCODE)] = handler;
            entry(&raw const __cell_fault)
        }
        Deed::Storm(calls) => {
            let (number, first, second) = calls[vcpu as usize % calls.len()];
            let argument = |value| if value == DATA { data + DATA_OFFSET } else { value };
            (regs.r14, regs.r15, regs.rbp, regs.r12) =
                (number, argument(first), argument(second), data + 1024);
            entry(&raw const __cell_storm)
        }
    };
    context.user_regs = regs;
    context.kernel_ss = u64::from(FLAT_KERNEL_SS);
    context.kernel_sp = data + PAGE;
    context.flags = (VcpuContextFlags::IN_KERNEL | VcpuContextFlags::ONLINE).bits();
    context.ctrlreg[3] = root;
    context.debugreg[6] = 0xffff_0ff0;
    context.debugreg[7] = 0x400;
    context
}
