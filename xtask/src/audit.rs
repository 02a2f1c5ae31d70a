//! `cargo xtask audit`: what the images are made of, and what must not be in them.

use crate::images::{Image, Kind, Workspace};
use crate::source::{self, Counts, Source};
use crate::{build, recipe, sh, symbols};
use anyhow::{Context, Result, bail};
use iced_x86::{
    CpuidFeature, Decoder, DecoderOptions, FlowControl, Formatter, Instruction, IntelFormatter, Mnemonic,
    OpAccess, OpKind, Register,
};
use object::{Object, ObjectSegment, SegmentFlags};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Largest hypervisor: bytes of the file that are loaded.
const LIMIT: u64 = 560 * 1024;

/// Modules of the hypervisor whose functions may hold instructions that save, restore or reset guest FPU state; mark such
/// functions `#[inline(never)]`, so that they keep their names. Vector and x87 arithmetic is refused even there.
const FPU_STATE: &[&str] = &["arch::x86_64::fpu::"];

#[derive(clap::Args)]
pub struct Args {
    /// Image files, or names of guest images; without any: the hypervisor, all guests, and the source
    images: Vec<String>,
    /// Audit the given files as hypervisors, not as guests
    #[arg(long)]
    hypervisor: bool,
    /// List what is only counted otherwise
    #[arg(long, short)]
    verbose: bool,
}

/// How an image is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Ring 0: no vector instruction, a size limit, indirect branches counted.
    Hypervisor,
    /// Ring 3: the red zone matters.
    Guest,
}

/// What an audit found.
#[derive(Default)]
pub struct Report {
    /// What is wrong; empty when the image passes.
    pub errors: Vec<String>,
    /// Facts, one a line.
    pub facts: Vec<String>,
    /// Details for `--verbose`.
    pub details: Vec<String>,
}

pub fn main(args: Args) -> Result<ExitCode> {
    let workspace = Workspace::load()?;
    let mut subjects: Vec<(PathBuf, Role)> = Vec::new();
    if args.images.is_empty() {
        subjects.push((build::hypervisor(&workspace)?, Role::Hypervisor));
        let images: Vec<&Image> = workspace.guests.iter().collect();
        subjects.extend(recipe::guests(&workspace, &images)?.into_iter().map(|path| (path, Role::Guest)));
    }
    for name in &args.images {
        let path = Path::new(name);
        if path.is_file() {
            subjects.push((path.to_path_buf(), if args.hypervisor { Role::Hypervisor } else { Role::Guest }));
        } else if name == "xenolith" {
            subjects.push((build::hypervisor(&workspace)?, Role::Hypervisor));
        } else {
            let paths = recipe::guests(&workspace, &[workspace.guest(name)?])?;
            subjects.extend(paths.into_iter().map(|path| (path, Role::Guest)));
        }
    }
    let mut bad = 0;
    for (path, role) in &subjects {
        let report = image(path, *role)?;
        println!("{}", path.strip_prefix(sh::root()).unwrap_or(path).display());
        report.facts.iter().for_each(|fact| println!("    {fact}"));
        if args.verbose {
            report.details.iter().for_each(|detail| println!("        {detail}"));
        }
        report.errors.iter().for_each(|error| println!("    ERROR: {error}"));
        bad += report.errors.len();
    }
    if args.images.is_empty() {
        print!("{}", source_table()?);
    }
    if bad > 0 {
        bail!("{bad} audit errors, listed above");
    }
    Ok(ExitCode::SUCCESS)
}

/// Looks at one image.
///
/// # Errors
/// When the file cannot be read or is no ELF; what is wrong with a readable image is in the report.
pub fn image(path: &Path, role: Role) -> Result<Report> {
    let bytes = sh::read(path)?;
    let file = object::File::parse(&*bytes).with_context(|| format!("{} is not an ELF", path.display()))?;
    let mut report = Report::default();
    if role == Role::Hypervisor && is_test_build(&bytes) {
        report
            .errors
            .push("it was built with the feature `constant-answers`, which is for tests alone".into());
    }
    segments(&file, role, &mut report);
    code(&file, role, &mut report)?;
    Ok(report)
}

/// What only a hypervisor with the feature `constant-answers` contains: `constant_answers::MARK` of the ABI's package.
const TEST_BUILD: &[u8] = b"this is a test build: guests may ask for constant answers";

/// Whether these are the bytes of a hypervisor that gives guests constant answers.
pub fn is_test_build(bytes: &[u8]) -> bool {
    bytes.windows(TEST_BUILD.len()).any(|window| window == TEST_BUILD)
}

fn segments(file: &object::File, role: Role, report: &mut Report) {
    let (mut loaded, mut zeroed) = (0, 0);
    for segment in file.segments() {
        let (_, size) = segment.file_range();
        loaded += size;
        zeroed += segment.size().saturating_sub(size);
        let SegmentFlags::Elf { p_flags } = segment.flags() else { continue };
        if p_flags & 3 == 3 {
            report.errors.push(format!(
                "the segment at {:#x} is writable and executable: give code and data sections segments of their own in \
                 the linker script",
                segment.address()
            ));
        }
    }
    report.facts.push(format!("{} KiB loaded, {} KiB zeroed", loaded.div_ceil(1024), zeroed.div_ceil(1024)));
    if role == Role::Hypervisor && loaded > LIMIT {
        report.errors.push(format!(
            "{loaded} bytes are loaded, more than {LIMIT}: `nm --size-sort` on the image shows the big ones"
        ));
    }
}

fn code(file: &object::File, role: Role, report: &mut Report) -> Result<()> {
    let mut red_zone = BTreeSet::new();
    let mut indirect: BTreeMap<String, usize> = BTreeMap::new();
    let mut refused: BTreeMap<String, (usize, String)> = BTreeMap::new();
    let mut formatter = IntelFormatter::new();
    let functions = symbols::functions(file)?;
    for (start, end, name) in &functions {
        let Some(bytes) = bytes_at(file, *start, *end) else { continue };
        let mut decoder = Decoder::with_ip(64, bytes, *start, DecoderOptions::NONE);
        let mut instruction = Instruction::default();
        while decoder.can_decode() {
            decoder.decode_out(&mut instruction);
            if matches!(instruction.flow_control(), FlowControl::IndirectBranch | FlowControl::IndirectCall) {
                *indirect.entry(name.clone()).or_default() += 1;
            }
            if uses_red_zone(&instruction) {
                red_zone.insert(name.clone());
            }
            if role == Role::Hypervisor && is_refused(&instruction, name) {
                let entry = refused.entry(name.clone()).or_insert_with(|| {
                    let mut text = String::new();
                    formatter.format(&instruction, &mut text);
                    (0, format!("{text} at {:#x}", instruction.ip()))
                });
                entry.0 += 1;
            }
        }
    }
    if functions.is_empty() {
        report
            .errors
            .push("the image has no function symbols, so nothing could be audited: link without -s".into());
    }
    for (name, (count, first)) in refused {
        report.errors.push(format!("{name}: {count} vector or x87 instructions, the first is `{first}`"));
    }
    report.facts.push(format!("{} functions, {} use the red zone", functions.len(), red_zone.len()));
    report.details.extend(red_zone.iter().map(|name| format!("red zone: {name}")));
    let total: usize = indirect.values().sum();
    report.facts.push(format!("{total} indirect branches in {} functions", indirect.len()));
    report.details.extend(indirect.iter().map(|(name, count)| format!("indirect: {count} in {name}")));
    Ok(())
}

fn bytes_at<'a>(file: &object::File<'a>, start: u64, end: u64) -> Option<&'a [u8]> {
    file.segments().find_map(|segment| segment.data_range(start, end.checked_sub(start)?).ok()?)
}

/// Reads or writes below the stack pointer, where the next upcall frame goes.
fn uses_red_zone(instruction: &Instruction) -> bool {
    let memory = (0..instruction.op_count()).any(|i| instruction.op_kind(i) == OpKind::Memory);
    memory
        && instruction.memory_base() == Register::RSP
        && (instruction.memory_displacement64() as i64) < 0
        && !matches!(instruction.mnemonic(), Mnemonic::Lea | Mnemonic::Nop)
}

/// Whether ring 0 must not execute this: guests' vector and x87 state is live while it runs.
fn is_refused(instruction: &Instruction, function: &str) -> bool {
    let mut factory = iced_x86::InstructionInfoFactory::new();
    let touches_vectors = factory.info(instruction).used_registers().iter().any(|used| {
        let register = used.register();
        let vector = register.is_vector_register() || register.is_mm() || register.is_st() || register.is_k();
        vector && used.access() != OpAccess::None && used.access() != OpAccess::NoMemAccess
    });
    let state = matches!(
        instruction.mnemonic(),
        Mnemonic::Fxsave
            | Mnemonic::Fxsave64
            | Mnemonic::Fxrstor
            | Mnemonic::Fxrstor64
            | Mnemonic::Xsave
            | Mnemonic::Xsave64
            | Mnemonic::Xsaveopt
            | Mnemonic::Xsaveopt64
            | Mnemonic::Xsavec
            | Mnemonic::Xsavec64
            | Mnemonic::Xrstor
            | Mnemonic::Xrstor64
            | Mnemonic::Ldmxcsr
            | Mnemonic::Stmxcsr
            | Mnemonic::Fninit
            | Mnemonic::Fnclex
            | Mnemonic::Fldcw
            | Mnemonic::Fnstcw
            | Mnemonic::Fnstsw
            | Mnemonic::Emms
    );
    if state {
        return !FPU_STATE.iter().any(|module| function.contains(module));
    }
    let x87 = instruction.cpuid_features().iter().any(|feature| {
        matches!(feature, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387 | CpuidFeature::MMX)
    });
    // WAIT is of the FPU, too, and harmless only to those who know: refused with the rest.
    touches_vectors || x87
}

/// Lines of code and of unsafe for each package, as a table.
///
/// # Errors
/// When a file cannot be read.
pub fn source_table() -> Result<String> {
    let mut packages: BTreeMap<String, Counts> = BTreeMap::new();
    let files = source::files()?;
    let manifests: Vec<&Path> =
        files.iter().filter(|path| path.ends_with("Cargo.toml")).filter_map(|path| path.parent()).collect();
    for path in files.iter().filter(|path| path.extension().is_some_and(|ext| ext == "rs" || ext == "S")) {
        // The nearest folder above with a Cargo.toml is the package.
        let Some(package) = path.ancestors().skip(1).find(|dir| manifests.contains(dir)) else { continue };
        *packages.entry(package.display().to_string()).or_default() += Source::load(path)?.counts();
    }
    let mut out =
        format!("{:<28}{:>8}{:>8}{:>16}{:>14}\n", "package", "code", "tests", "unsafe items", "unsafe lines");
    let mut total = Counts::default();
    for (name, counts) in packages {
        out += &row(&name, &counts);
        total += counts;
    }
    Ok(out + &row("all", &total))
}

fn row(name: &str, counts: &Counts) -> String {
    format!(
        "{name:<28}{:>8}{:>8}{:>16}{:>14}\n",
        counts.code, counts.tests, counts.unsafe_items, counts.unsafe_lines
    )
}

/// Every audit that `cargo xtask test` makes: an image's name, and what is wrong with it.
///
/// # Errors
/// When an image cannot be read.
pub fn all(workspace: &Workspace, built: &build::Built) -> Result<Vec<(String, Report)>> {
    let mut out = vec![("xenolith".to_owned(), image(&built.hypervisor, Role::Hypervisor)?)];
    for guest in workspace.guests.iter().filter(|guest| guest.kind != Kind::Scenario) {
        let path = built.guests.get(&guest.name).with_context(|| format!("{} was not built", guest.name))?;
        out.push((guest.name.clone(), image(path, Role::Guest)?));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(bytes: &[u8], function: &str) -> bool {
        let mut decoder = Decoder::with_ip(64, bytes, 0x1000, DecoderOptions::NONE);
        is_refused(&decoder.decode(), function)
    }

    #[test]
    fn ring_0_may_not_touch_vectors() {
        assert!(refused(&[0x0f, 0x28, 0xc1], "hv::start"), "movaps xmm0, xmm1");
        assert!(refused(&[0x0f, 0x28, 0xc1], "hv::arch::x86_64::fpu::save"), "not even there");
        assert!(refused(&[0xd9, 0xe8], "hv::start"), "fld1");
        assert!(refused(&[0x0f, 0x6f, 0xc1], "hv::start"), "movq mm0, mm1");
        assert!(refused(&[0xc5, 0xf8, 0x28, 0xc1], "hv::start"), "vmovaps xmm0, xmm1");
        assert!(!refused(&[0x48, 0x89, 0xc1], "hv::start"), "mov rcx, rax");
        assert!(!refused(&[0x0f, 0xae, 0xf8], "hv::start"), "sfence touches no register");
        assert!(!refused(&[0x0f, 0xc3, 0x07], "hv::start"), "movnti is an integer store");
    }

    #[test]
    fn only_the_fpu_cell_may_move_state() {
        let xsave = [0x48, 0x0f, 0xae, 0x27];
        assert!(refused(&xsave, "hv::start"));
        assert!(!refused(&xsave, "hv::arch::x86_64::fpu::save"));
    }

    #[test]
    fn sees_the_red_zone() {
        let uses =
            |bytes: &[u8]| uses_red_zone(&Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).decode());
        assert!(uses(&[0x48, 0x89, 0x44, 0x24, 0xf8]), "mov [rsp-8], rax");
        assert!(!uses(&[0x48, 0x89, 0x44, 0x24, 0x08]), "mov [rsp+8], rax");
        assert!(!uses(&[0x48, 0x8d, 0x44, 0x24, 0xf8]), "lea rax, [rsp-8]");
    }
}
