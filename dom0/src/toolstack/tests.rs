use super::{ControlInterface, CreateError, Limits, Request, Step, Window, create, destroy};
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::rc::Rc;
use alloc::string::ToString;
use alloc::vec;
use alloc::vec::Vec;
use core::cell::RefCell;
use core::future::{Future, ready};
use core::task::{Context, Poll, Waker};
use domain_builder::ImageError;
use hypercall_abi::vcpu::VcpuGuestContext;
use hypercall_abi::{DomId, Errno, GrantRef, Mfn, Port};

/// A hypervisor that counts, and refuses its `fail_at`th call.
#[derive(Default)]
struct Machine {
    free: Vec<u64>,
    /// Blocks of pages that lie behind each other; there are only single ones then.
    blocks: usize,
    /// Pages are zeroes when they are given.
    blank: bool,
    domains: BTreeMap<u16, Vec<u64>>,
    memory: BTreeMap<u64, Vec<u8>>,
    mapped: BTreeSet<u64>,
    pinned: Option<u64>,
    granted: Vec<(u32, u64)>,
    entry: Option<u64>,
    calls: u32,
    fail_at: Option<u32>,
    destroy_calls: u32,
    ends_by_itself: bool,
}

struct Fake(Rc<RefCell<Machine>>);

impl Fake {
    fn new(pages: u64) -> Self {
        // Descending and with gaps: nothing may take frames for consecutive.
        Fake(Rc::new(RefCell::new(Machine {
            free: (0..pages).map(|n| 1000 + 3 * n).collect(),
            blocks: 5,
            ..Machine::default()
        })))
    }
    fn call(&self) -> Result<(), Errno> {
        let mut machine = self.0.borrow_mut();
        machine.calls += 1;
        if machine.fail_at == Some(machine.calls) { Err(Errno::EPERM) } else { Ok(()) }
    }
}

struct FakeWindow(Rc<RefCell<Machine>>, Vec<u64>);

impl Window for FakeWindow {
    fn write(&self, page: usize, offset: usize, bytes: &[u8]) {
        let mut machine = self.0.borrow_mut();
        let frame = machine.memory.entry(self.1[page]).or_insert_with(|| vec![0; 4096]);
        frame[offset..][..bytes.len()].copy_from_slice(bytes);
    }
    fn zero(&self, page: usize) {
        self.0.borrow_mut().memory.insert(self.1[page], vec![0; 4096]);
    }
}

impl Drop for FakeWindow {
    fn drop(&mut self) {
        for frame in &self.1 {
            self.0.borrow_mut().mapped.remove(frame);
        }
    }
}

impl ControlInterface for Fake {
    type Window = FakeWindow;

    fn create_domain(&mut self, _: u32, _: u64, _: Limits) -> Result<(DomId, Mfn), Errno> {
        self.call()?;
        self.0.borrow_mut().domains.insert(5, Vec::new());
        Ok((DomId::new(5), Mfn::new(77)))
    }
    fn populate(&mut self, domain: DomId, order: u32, frames: &mut [u64]) -> Result<(), (usize, Errno)> {
        self.call().map_err(|errno| (0, errno))?;
        let machine = &mut *self.0.borrow_mut();
        let pages = 1 << order;
        for (given, frame) in frames.iter_mut().enumerate() {
            if order > 0 && machine.blocks == 0 {
                return Err((given, Errno::ENOMEM));
            }
            machine.blocks -= usize::from(order > 0);
            for page in 0..pages {
                let free = machine.free.pop().ok_or((given, Errno::ENOMEM))?;
                // A block's frames lie behind each other, and are no others'.
                let mfn = if order == 0 { free } else { (1 << 30) + (free << 10) };
                *frame = if page == 0 { mfn } else { *frame };
                machine.domains.get_mut(&domain.get()).unwrap().push(*frame + page);
            }
        }
        Ok(())
    }
    fn gives_blank_pages(&self) -> bool {
        self.0.borrow().blank
    }
    fn map(&mut self, domain: DomId, frames: &[Mfn]) -> Result<FakeWindow, Errno> {
        self.call()?;
        let frames: Vec<u64> = frames.iter().map(|frame| frame.get()).collect();
        let machine = &mut *self.0.borrow_mut();
        assert!(frames.iter().all(|frame| machine.domains[&domain.get()].contains(frame)));
        machine.mapped.extend(&frames);
        Ok(FakeWindow(Rc::clone(&self.0), frames))
    }
    fn hypercall_page(&mut self, _: DomId, frame: Mfn) -> Result<(), Errno> {
        self.call()?;
        self.0.borrow_mut().memory.insert(frame.get(), vec![0xcc; 4096]);
        Ok(())
    }
    fn port_for_caller(&mut self, _: DomId) -> Result<Port, Errno> {
        self.call()?;
        Ok(Port::new(self.0.borrow().calls))
    }
    fn grant_to_caller(&mut self, _: DomId, grant: GrantRef, frame: Mfn) -> Result<(), Errno> {
        self.call()?;
        self.0.borrow_mut().granted.push((grant.get(), frame.get()));
        Ok(())
    }
    fn pin_root(&mut self, _: DomId, frame: Mfn) -> Result<(), Errno> {
        self.call()?;
        let mut machine = self.0.borrow_mut();
        assert!(machine.mapped.is_empty(), "a writable mapping of a table is refused");
        machine.pinned = Some(frame.get());
        Ok(())
    }
    fn set_first_vcpu(&mut self, _: DomId, context: &VcpuGuestContext) -> Result<(), Errno> {
        self.call()?;
        self.0.borrow_mut().entry = Some(context.user_regs.rip);
        Ok(())
    }
    fn destroy_step(&mut self, domain: DomId) -> Result<bool, Errno> {
        let machine = &mut *self.0.borrow_mut();
        assert!(machine.mapped.is_empty(), "a mapped frame would stay behind");
        machine.destroy_calls += 1;
        if machine.destroy_calls == 2 && machine.ends_by_itself {
            machine.domains.remove(&domain.get());
        }
        if !machine.domains.contains_key(&domain.get()) {
            return Err(Errno::ESRCH);
        }
        if machine.destroy_calls < 3 {
            return Ok(false);
        }
        let frames = machine.domains.remove(&domain.get()).ok_or(Errno::ESRCH)?;
        machine.free.extend(frames);
        Ok(true)
    }
    fn free_pages(&mut self) -> Result<u64, Errno> {
        self.call()?;
        Ok(self.0.borrow().free.len() as u64)
    }
    fn turn(&self) -> impl Future<Output = ()> + Send {
        ready(())
    }
    fn moment(&self, _: u32) -> impl Future<Output = ()> + Send {
        ready(())
    }
}

fn now<T>(future: impl Future<Output = T>) -> T {
    match core::pin::pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("nothing here waits"),
    }
}

/// The least that a builder takes: one segment, notes XEN_VERSION, LOADER and HYPERCALL_PAGE.
fn kernel() -> Vec<u8> {
    let mut notes = Vec::new();
    let page = 0x10_1000u64.to_le_bytes();
    for (kind, text) in [(5u32, &b"xen-3.0\0"[..]), (8, b"generic\0"), (2, &page)] {
        for word in [4, text.len() as u32, kind] {
            notes.extend(word.to_le_bytes());
        }
        notes.extend(b"Xen\0");
        notes.extend(text);
    }
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 62, 0, 1, 0, 0, 0];
    for word in [0x10_0000u64, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend([0; 4]);
    for half in [64u16, 56, 2, 64, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    let code = vec![0x90u8; 10_000];
    let notes_at = 64 + 2 * 56u64;
    for (kind, flags, offset, paddr, filesz, memsz) in [
        (4u32, 4u32, notes_at, 0, notes.len() as u64, notes.len() as u64),
        (1, 7, notes_at + notes.len() as u64, 0x10_0000, 10_000, 20_000),
    ] {
        elf.extend(kind.to_le_bytes());
        elf.extend(flags.to_le_bytes());
        for word in [offset, paddr, paddr, filesz, memsz, 4096] {
            elf.extend(word.to_le_bytes());
        }
    }
    elf.extend(notes);
    elf.extend(code);
    elf
}

fn request(image: &[u8], pages: u64) -> Request<'_> {
    Request {
        image,
        pages,
        vcpus: 1,
        limits: Limits { max_port: 1023, grant_frames: None, maptrack_frames: None },
        command_line: "hello",
    }
}

#[test]
fn a_domain_is_built() {
    let image = kernel();
    let mut fake = Fake::new(2000);
    let created = now(create(&mut fake, &request(&image, 1024))).unwrap();
    let machine = fake.0.borrow();
    assert_eq!((created.domain.get(), machine.entry), (5, Some(0x10_0000)));
    assert_eq!(machine.granted, [(0, created.console.get()), (1, created.store.get())]);
    assert_ne!(created.console_port, created.store_port);
    assert!(machine.mapped.is_empty() && machine.pinned.is_some());
    // The image is where it belongs: pfn 256 on, its second page taken by the hypercall stubs.
    let frames = &machine.domains[&5];
    assert_eq!((machine.memory[&frames[256]][0], machine.memory[&frames[257]][0]), (0x90, 0xcc));
    assert_eq!(machine.memory[&frames[258]][10_000 - 8192..][..2], [0, 0]);
}

#[test]
fn whatever_fails_nothing_is_left() {
    let image = kernel();
    let mut refusals = 0;
    for fail_at in 1.. {
        let mut fake = Fake::new(2000);
        fake.0.borrow_mut().fail_at = Some(fail_at);
        match now(create(&mut fake, &request(&image, 1024))) {
            Err(CreateError::Refused(_, Errno::EPERM)) => refusals += 1,
            Err(error) => panic!("{error}"),
            Ok(_) => break,
        }
        let machine = fake.0.borrow();
        assert!(machine.domains.is_empty() && machine.mapped.is_empty(), "call {fail_at}");
        assert_eq!(machine.free.len(), 2000, "call {fail_at}");
    }
    assert!(refusals >= 12, "{refusals} calls were seen to fail");
}

#[test]
fn a_domain_that_ends_between_two_steps_is_gone() {
    let image = kernel();
    let mut fake = Fake::new(2000);
    let created = now(create(&mut fake, &request(&image, 1024))).unwrap();
    fake.0.borrow_mut().ends_by_itself = true;
    assert_eq!(now(destroy(&mut fake, created.domain)), Ok(()));
    assert_eq!(fake.0.borrow().destroy_calls, 2);
    assert_eq!(now(destroy(&mut fake, created.domain)), Err(Errno::ESRCH));
}

#[test]
fn mistakes_are_told_before_anything_is_made() {
    let image = kernel();
    let long = "x".repeat(1024);
    let mut no_elf = image.clone();
    no_elf[0] = 0;
    let mut narrow = image.clone();
    narrow[4] = 1;
    for (request, message) in [
        (request(&image[..image.len() - 1], 1024), "ends"),
        (request(&no_elf, 1024), "ELF"),
        (request(&narrow, 1024), "32-bit"),
        (request(b"", 1024), "ends"),
        (request(&image, 200), "raise `memory`"),
        (request(&image, 5000), "wants 19.5 MiB and 7.8 MiB are free"),
        (request(&image, u64::MAX), "limit"),
        (Request { command_line: &long, ..request(&image, 1024) }, "shorten `cmdline`"),
    ] {
        let mut fake = Fake::new(2000);
        let error = now(create(&mut fake, &request)).unwrap_err().to_string();
        assert!(error.contains(message), "{message}: {error}");
        assert!(fake.0.borrow().domains.is_empty() && fake.0.borrow().destroy_calls == 0);
    }
    let image = kernel().into_iter().map(|byte| if byte == b'X' { b'Y' } else { byte }).collect::<Vec<u8>>();
    let error = now(create(&mut Fake::new(2000), &request(&image, 1024))).unwrap_err();
    assert_eq!(error, CreateError::Image(ImageError::NoXenNotes));
    assert!(
        CreateError::Refused(Step::Pin, Errno::EINVAL)
            .to_string()
            .contains("checking its page tables: EINVAL")
    );
}

#[test]
fn memory_that_runs_out_meanwhile_is_given_back() {
    let image = kernel();
    let mut fake = Fake::new(2000);
    struct Greedy<'a>(&'a mut Fake);
    impl ControlInterface for Greedy<'_> {
        type Window = FakeWindow;
        fn create_domain(&mut self, vcpus: u32, pages: u64, limits: Limits) -> Result<(DomId, Mfn), Errno> {
            // Somebody else takes most of it between the question and the first page.
            self.0.0.borrow_mut().free.truncate(700);
            self.0.create_domain(vcpus, pages, limits)
        }
        fn populate(&mut self, domain: DomId, order: u32, frames: &mut [u64]) -> Result<(), (usize, Errno)> {
            self.0.populate(domain, order, frames)
        }
        fn gives_blank_pages(&self) -> bool {
            false
        }
        fn map(&mut self, domain: DomId, frames: &[Mfn]) -> Result<FakeWindow, Errno> {
            self.0.map(domain, frames)
        }
        fn hypercall_page(&mut self, domain: DomId, frame: Mfn) -> Result<(), Errno> {
            self.0.hypercall_page(domain, frame)
        }
        fn port_for_caller(&mut self, domain: DomId) -> Result<Port, Errno> {
            self.0.port_for_caller(domain)
        }
        fn grant_to_caller(&mut self, domain: DomId, grant: GrantRef, frame: Mfn) -> Result<(), Errno> {
            self.0.grant_to_caller(domain, grant, frame)
        }
        fn pin_root(&mut self, domain: DomId, frame: Mfn) -> Result<(), Errno> {
            self.0.pin_root(domain, frame)
        }
        fn set_first_vcpu(&mut self, domain: DomId, context: &VcpuGuestContext) -> Result<(), Errno> {
            self.0.set_first_vcpu(domain, context)
        }
        fn destroy_step(&mut self, domain: DomId) -> Result<bool, Errno> {
            self.0.destroy_step(domain)
        }
        fn free_pages(&mut self) -> Result<u64, Errno> {
            self.0.free_pages()
        }
        fn turn(&self) -> impl Future<Output = ()> + Send {
            ready(())
        }
        fn moment(&self, _: u32) -> impl Future<Output = ()> + Send {
            ready(())
        }
    }
    let error = now(create(&mut Greedy(&mut fake), &request(&image, 1024))).unwrap_err();
    assert!(matches!(error, CreateError::Memory { wanted: 1024, .. }), "{error:?}");
    assert_eq!(fake.0.borrow().free.len(), 700);
}
