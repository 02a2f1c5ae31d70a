//! The guests: started from descriptions, watched, their consoles read, and what follows when they end.
//!
//! Each running guest has a task for its console, which owns the mapped ring and the event channel. One more task waits for
//! the hypervisor to say that some domain has ended. The table here is the only state they share; it is never locked over an
//! await, so on our one vCPU a lock is always free.

use crate::backend::Devices;
use crate::channel::Event;
use crate::description::{self, Description};
use crate::hypervisor::{self, Refusal, Share};
use crate::listeners::publish;
use crate::machine::Machine;
use crate::panics::Row;
use crate::policy::{Decision, Ending, Supervisor};
use crate::ring::{ConsoleBack, Output};
use crate::room::{self, New};
use crate::schedule::Schedule;
use crate::scrollback::{Lines, Scrollback, Text};
use crate::store;
use crate::terminal;
use crate::toolstack::{self, Created, Request};
use crate::units::seconds;
use crate::waiting::{Bell, First, first};
use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};
use guest_sdk::compartment::{self, Fuse, Panicked};
use guest_sdk::control::{self, Foreign};
use guest_sdk::events::{Channel, Events};
use guest_sdk::memory::Access;
use guest_sdk::{executor, time};
use hashbrown::HashMap;
use hypercall_abi::sched::ShutdownReason;
use hypercall_abi::{DomId, Virq};
use spin::{Lazy, Mutex};

use crate::say;

/// Bytes of console output kept for each guest.
const SCROLLBACK: usize = 32 * 1024;
/// Bytes of a guest's output taken before others get their turn.
const OUTPUT_PER_TURN: usize = 2048;

static GUESTS: Lazy<Mutex<HashMap<String, Guest>>> = Lazy::new(|| Mutex::new(HashMap::new()));
/// Which guest a domain is, for those that exist.
static NUMBERED: Lazy<Mutex<HashMap<DomId, String>>> = Lazy::new(|| Mutex::new(HashMap::new()));
/// Whose console the terminal is, and what of its text has come half.
static ATTACHED: Mutex<Option<(String, Text)>> = Mutex::new(None);
/// Rings when a guest's state changes.
pub static CHANGED: Bell = Bell::new();

/// How far a guest is.
#[derive(Clone)]
pub enum State {
    /// It is being built; its number, once it has one.
    Starting(Option<DomId>),
    /// It exists and has not ended.
    Running(Run),
    /// It has ended; what follows is being decided.
    Ended(Run),
    /// It has ended and is kept to be looked at.
    Kept(Run, Ending),
    /// It is being torn down.
    Leaving,
    /// It has ended, and is built anew at some system time, ns.
    Waiting(Ending, u64),
    /// It does not exist any more.
    Gone(Option<Ending>),
}

/// One life of a guest.
#[derive(Clone)]
pub struct Run {
    /// Its number.
    pub domain: DomId,
    /// System time of its start, ns.
    pub started_ns: u64,
    /// Its disks.
    pub devices: Arc<Devices>,
    console: Arc<Link>,
    store: Arc<store::Link>,
}

/// What the console's task and the others tell each other.
struct Link {
    input: Mutex<VecDeque<u8>>,
    stop: AtomicBool,
    stopped: AtomicBool,
    bell: Bell,
    /// For tests: a step of a turn panics when it blows.
    fuse: Fuse,
}

/// How a guest's output is shown in the shell as it comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Follow {
    /// Not at all.
    Off,
    /// Each line with the guest's name before it.
    Named,
    /// Each line as it is.
    Plain,
}

/// What a domain does once it is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// It runs.
    Run,
    /// It stays paused until somebody unpauses it.
    StayPaused,
}

struct Guest {
    description: Description,
    image: &'static [u8],
    state: State,
    supervisor: Supervisor,
    log: Scrollback,
    lines: Lines,
    follow: Follow,
}

impl Guest {
    fn show(&self, name: &str, lines: &[String]) {
        for line in lines {
            match self.follow {
                Follow::Off => {}
                Follow::Named => say!("[{name}] {line}"),
                Follow::Plain => say!("{line}"),
            }
        }
    }
}

/// What the shell shows of a guest.
pub struct View {
    /// Its name.
    pub name: String,
    /// How far it is.
    pub state: State,
}

/// All guests that were ever created, by name.
pub fn all() -> Vec<View> {
    let guests = GUESTS.lock();
    let mut views: Vec<View> =
        guests.iter().map(|(name, guest)| View { name: name.clone(), state: guest.state.clone() }).collect();
    views.sort_by(|a, b| a.name.cmp(&b.name));
    views
}

fn state(name: &str) -> Option<State> {
    GUESTS.lock().get(name).map(|guest| guest.state.clone())
}

fn set_state(name: &str, state: State) {
    if let Some(guest) = GUESTS.lock().get_mut(name) {
        guest.state = state;
    }
    CHANGED.ring();
}

/// The guest that somebody calls `text`: its name, or its number.
///
/// # Errors
/// What to say when there is none.
pub fn resolve(text: &str) -> Result<String, String> {
    if text == crate::description::OWN_NAME || text == "0" {
        return Err("dom0 is the domain you are typing to: only `poweroff` ends it".into());
    }
    let guests = GUESTS.lock();
    if guests.contains_key(text) {
        return Ok(text.into());
    }
    if let Ok(number) = text.parse()
        && let Some(name) = NUMBERED.lock().get(&DomId::new(number))
    {
        return Ok(name.clone());
    }
    let mut names: Vec<&str> = guests.keys().map(String::as_str).collect();
    names.sort_unstable();
    Err(if names.is_empty() {
        format!("no guest was created yet, so there is no {text:?}: `create FILE.toml` makes one")
    } else {
        format!("there is no guest called {text:?}: there are {}", names.join(", "))
    })
}

/// The domain of a guest that exists.
///
/// # Errors
/// What to say when it does not.
pub fn domain(name: &str) -> Result<DomId, String> {
    match state(name) {
        Some(State::Running(run) | State::Ended(run) | State::Kept(run, _)) => Ok(run.domain),
        Some(State::Starting(_)) => Err(format!("{name} is being built: try again in a moment")),
        Some(State::Leaving) => Err(format!("{name} is being torn down")),
        Some(State::Waiting(ending, at_ns)) => Err(format!(
            "{name} {ending} and is started again in {}; `destroy {name}` prevents that",
            seconds(at_ns.saturating_sub(time::now_ns()))
        )),
        Some(State::Gone(ending)) => {
            let how = ending.map_or("was destroyed".into(), |ending| ending.to_string());
            Err(format!(
                "{name} {how} and is gone; `logs {name}` shows its last output, `create` makes it anew"
            ))
        }
        None => Err(format!("there is no guest called {name:?}")),
    }
}

/// A guest to be made.
pub struct Wanted {
    /// What it is to be.
    pub description: Description,
    /// Its kernel.
    pub image: &'static [u8],
}

/// The devices of a guest that runs.
///
/// # Errors
/// What to say when it does not.
pub fn devices(name: &str) -> Result<Arc<Devices>, String> {
    running(name).map(|run| run.devices)
}

/// The life of a guest that runs.
fn running(name: &str) -> Result<Run, String> {
    match state(name) {
        Some(State::Running(run)) => Ok(run),
        _ => domain(name).and(Err(format!("{name} does not run any more"))),
    }
}

/// Builds guests and lets them run, all or none. They can be told each other's numbers: see [`Description::command_line`].
///
/// # Errors
/// What to say; nothing is left then.
pub async fn start(wanted: Vec<Wanted>, follow: Follow, then: Then) -> Result<(), String> {
    let named: Vec<_> = wanted.iter().map(|wanted| named(&wanted.description)).collect();
    let order = description::in_order(&named).map_err(|names| description::circle(&names))?;
    let names: Vec<String> =
        order.iter().filter_map(|index| Some(wanted.get(*index)?.description.name.clone())).collect();
    let result = match enter(wanted, follow) {
        Ok(()) => run(&names, then).await,
        // What was there before is left alone.
        Err(error) => return Err(error),
    };
    if result.is_err() {
        GUESTS.lock().retain(|name, _| !names.contains(name));
        CHANGED.ring();
    }
    result
}

/// A domain, as what is ordered by [`description::in_order`].
fn named(description: &Description) -> (Vec<&str>, Vec<&str>) {
    (Vec::from([description.name.as_str()]), description.after.iter().map(String::as_str).collect())
}

/// Guests that exist, in the order in which they are to end: each before those that it comes after.
pub fn in_order_of_end() -> Vec<String> {
    let guests = GUESTS.lock();
    let all: Vec<&Guest> = guests.values().filter(|guest| matches!(guest.state, State::Running(_))).collect();
    let named: Vec<_> = all.iter().map(|guest| named(&guest.description)).collect();
    // None was started against it; those that were described anew since then end in any order.
    let order = description::in_order(&named).unwrap_or_else(|_| (0..all.len()).collect());
    order.iter().rev().filter_map(|index| Some(all.get(*index)?.description.name.clone())).collect()
}

/// Enters guests into the table, in state `Starting`.
fn enter(wanted: Vec<Wanted>, follow: Follow) -> Result<(), String> {
    let mut guests = GUESTS.lock();
    for (index, Wanted { description, .. }) in wanted.iter().enumerate() {
        let name = &description.name;
        if wanted.iter().take(index).any(|other| other.description.name == *name) {
            return Err(format!("{name} is there twice: add name=OTHER to one of them"));
        }
        if guests.get(name).is_some_and(|guest| !matches!(guest.state, State::Gone(_))) {
            return Err(format!("a guest called {name} exists: `destroy {name}` first, or use another name"));
        }
        let there = |other: &String| {
            wanted.iter().any(|wanted| wanted.description.name == *other)
                || guests.get(other).is_some_and(|guest| matches!(guest.state, State::Running(_)))
        };
        if let Some(other) = wanted.get(index).and_then(|it| it.description.after.iter().find(|o| !there(o)))
        {
            return Err(format!(
                "{name} is not started: it comes after {other}, which does not run. `create {other}` first, or both at \
                 once, as in `create {other} + {name}`"
            ));
        }
    }
    for Wanted { description, image } in wanted {
        let name = description.name.clone();
        let old = guests.remove(&name);
        let guest = Guest {
            description,
            image,
            state: State::Starting(None),
            supervisor: Supervisor::default(),
            log: old.map_or(Scrollback::new(SCROLLBACK), |old| old.log),
            lines: Lines::default(),
            follow,
        };
        guests.insert(name, guest);
    }
    Ok(())
}

/// The number of a guest that exists or is being built.
fn number_of(name: &str) -> Option<DomId> {
    match state(name)? {
        State::Starting(number) => number,
        State::Running(run) | State::Ended(run) | State::Kept(run, _) => Some(run.domain),
        State::Leaving | State::Waiting(..) | State::Gone(_) => None,
    }
}

/// A copy of what a guest in the table is made of.
fn wanted(name: &str) -> Result<Wanted, String> {
    let guests = GUESTS.lock();
    let guest = guests.get(name).ok_or("the guest was forgotten")?;
    Ok(Wanted { description: guest.description.clone(), image: guest.image })
}

/// Builds guests in state `Starting`, and lets them run when all are built.
async fn run(names: &[String], then: Then) -> Result<(), String> {
    // First all the numbers, so that each can be told the others'.
    let mut empty = VecDeque::new();
    let mut result = Ok(());
    for name in names {
        match make_empty(name) {
            Ok(domain) => empty.push_back(domain),
            Err(error) => {
                result = Err(error);
                break;
            }
        }
    }
    let mut built = 0;
    while result.is_ok()
        && let Some((name, domain)) = names.get(built).zip(empty.pop_front())
    {
        result = build(name, domain).await;
        built += usize::from(result.is_ok());
    }
    if result.is_ok() && then == Then::Run {
        for name in names {
            result = result.and(unpause(name));
        }
    }
    if result.is_ok() {
        for name in names {
            if let Some(domain) = number_of(name) {
                publish(Event::DomainCreated { name: name.clone(), domain: domain.get() });
            }
        }
    }
    if result.is_err() {
        for domain in empty {
            // It is ours and has never run: this cannot fail.
            let _ = toolstack::destroy(&mut Machine::named(""), domain.domain).await;
        }
        for name in names.iter().take(built) {
            if let Some(State::Running(run) | State::Ended(run)) = state(name) {
                // What went wrong first is the better message.
                let _ = tear_down(name, run, State::Gone(None)).await;
            }
        }
    }
    result
}

fn request<'a>(wanted: &'a Wanted, command_line: &'a str) -> Request<'a> {
    Request {
        image: wanted.image,
        pages: wanted.description.memory.pages(),
        vcpus: wanted.description.vcpus,
        limits: wanted.description.limits,
        command_line,
    }
}

fn cannot_create(description: &Description) -> impl Fn(toolstack::CreateError) -> String {
    move |error| format!("cannot create {} from image {}: {error}", description.name, description.image)
}

/// Makes the domain of a guest, so that it has a number.
fn make_empty(name: &str) -> Result<toolstack::Empty, String> {
    room::check(New::Domain).map_err(|why| format!("cannot create {name}: {why}"))?;
    let wanted = wanted(name)?;
    let request = request(&wanted, &wanted.description.cmdline);
    let empty = toolstack::create_empty(&mut Machine::named(name), &request)
        .map_err(cannot_create(&wanted.description))?;
    set_state(name, State::Starting(Some(empty.domain)));
    Ok(empty)
}

/// Fills the domain of a guest and opens its console; it is left paused. What fails leaves nothing.
async fn build(name: &str, empty: toolstack::Empty) -> Result<(), String> {
    let wanted = wanted(name)?;
    let domain = empty.domain;
    let mut machine = Machine::named(name);
    let command_line = match wanted.description.command_line(number_of) {
        Ok(line) => line,
        Err(error) => {
            let _ = toolstack::destroy(&mut machine, domain).await;
            return Err(error);
        }
    };
    let created = toolstack::fill(&mut machine, &request(&wanted, &command_line), empty)
        .await
        .map_err(cannot_create(&wanted.description))?;
    let equipped = match schedule(domain, &wanted.description) {
        Ok(()) => equip(&wanted.description, &created).await,
        Err(error) => Err(error),
    };
    match equipped {
        Ok((store, devices, console)) => {
            let started_ns = time::now_ns();
            NUMBERED.lock().insert(domain, name.to_string());
            set_state(name, State::Running(Run { domain, started_ns, devices, console, store }));
            Ok(())
        }
        Err(error) => {
            let _ = toolstack::destroy(&mut machine, domain).await;
            Err(error)
        }
    }
}

/// Gives a new domain its share of the CPUs and its places there, where its description says something.
fn schedule(domain: DomId, description: &Description) -> Result<(), String> {
    let Schedule { weight, cap, cpus, cpus_soft } = description.schedule;
    let refused = |what: &'static str| {
        let name = &description.name;
        move |refusal: Refusal| format!("cannot set {what} of {name}: {refusal}")
    };
    if weight.is_some() || cap.is_some() {
        let now = hypervisor::get().share(domain).map_err(refused("the share"))?;
        let share =
            Share { weight: weight.unwrap_or(now.weight), cap_percent: cap.unwrap_or(now.cap_percent) };
        hypervisor::get().set_share(domain, share).map_err(refused("the share"))?;
    }
    if cpus.is_some() || cpus_soft.is_some() {
        for vcpu in 0..description.vcpus {
            hypervisor::get()
                .affinity(domain, vcpu, cpus.unwrap_or(u64::MAX), cpus_soft.unwrap_or(u64::MAX))
                .map_err(refused("the CPUs"))?;
        }
    }
    Ok(())
}

/// Connects a new domain to its services. What fails leaves none of them.
async fn equip(
    description: &Description,
    created: &Created,
) -> Result<(Arc<store::Link>, Arc<Devices>, Arc<Link>), String> {
    let name = &description.name;
    let store = store::connect(description, created)?;
    let result = match Devices::start(created.domain, name, &description.disks, &description.cards).await {
        Ok(devices) => match connect(name, created) {
            Ok(console) => return Ok((store, devices, console)),
            Err(error) => {
                devices.stop().await;
                Err(error)
            }
        },
        Err(error) => Err(error),
    };
    store::disconnect(&store).await;
    result
}

fn unpause(name: &str) -> Result<(), String> {
    let domain = domain(name)?;
    hypervisor::get().unpause(domain).map_err(|errno| format!("cannot start {name}: unpause gives {errno}"))
}

/// Maps the console ring, connects to its port and starts the console's task.
fn connect(name: &str, created: &Created) -> Result<Arc<Link>, String> {
    let page = Foreign::map(created.domain, &[created.console], Access::ReadWrite)
        .map_err(|errno| format!("cannot map the console of {name}: {errno}"))?;
    let channel = control::connect(created.domain, created.console_port)
        .map_err(|errno| format!("cannot connect to the console of {name}: {errno}"))?;
    let link = Arc::new(Link {
        input: Mutex::new(VecDeque::new()),
        stop: AtomicBool::new(false),
        stopped: AtomicBool::new(false),
        bell: Bell::new(),
        fuse: Fuse::new(),
    });
    executor::spawn(serve_console(name.to_string(), Arc::new(page), channel, Arc::clone(&link)));
    Ok(link)
}

/// A guest's console ring.
type Console = ConsoleBack<Arc<Foreign>>;

/// What a turn of a console works on. It moves into the turn's compartment, and comes back with what came of it.
struct Turn {
    back: Console,
    /// What is to be typed; how much of that the guest took.
    typed: Vec<u8>,
    taken: usize,
    output: Output,
    /// For who follows the guest: the beginning of a line, and the lines that are complete.
    lines: Option<Lines>,
    complete: Vec<String>,
    /// For who is attached: the beginning of a character, and the text that is complete.
    text: Option<Text>,
    shown: String,
}

impl Turn {
    /// Moves bytes both ways, and makes of a guest's what is printed.
    fn run(&mut self, fuse: &Fuse) {
        fuse.reached();
        self.taken = self.back.write(&self.typed);
        fuse.reached();
        self.output = self.back.read(OUTPUT_PER_TURN);
        if self.output.lost > 0 {
            self.show(lost(self.output.lost).as_bytes());
        }
        let bytes = core::mem::take(&mut self.output.bytes);
        self.show(&bytes);
        self.output.bytes = bytes;
        fuse.reached();
    }

    fn show(&mut self, bytes: &[u8]) {
        if let Some(lines) = &mut self.lines {
            self.complete.extend(lines.push(bytes));
        }
        if let Some(text) = &mut self.text {
            self.shown += &text.push(bytes);
        }
    }
}

fn lost(bytes: u32) -> String {
    format!("\n[{bytes} bytes of output were lost]\n")
}

/// Takes a turn of a console in a compartment (design record 0066). Gives the console back, whether the guest took anything, and what it
/// printed.
fn turn(name: &str, back: Console, link: &Arc<Link>) -> Result<(Console, bool, Output), Panicked> {
    let typed: Vec<u8> = link.input.lock().iter().copied().collect();
    if typed.is_empty() && back.is_quiet() {
        return Ok((back, false, Output::default()));
    }
    let text = match &mut *ATTACHED.lock() {
        Some((attached, text)) if attached == name => Some(core::mem::take(text)),
        _ => None,
    };
    let lines = match GUESTS.lock().get_mut(name) {
        Some(guest) if guest.follow != Follow::Off => Some(core::mem::take(&mut guest.lines)),
        _ => None,
    };
    let mut turn = Turn {
        back,
        typed,
        taken: 0,
        output: Output::default(),
        lines,
        complete: Vec::new(),
        text,
        shown: String::new(),
    };
    let link_there = Arc::clone(link);
    let work = move || {
        turn.run(&link_there.fuse);
        turn
    };
    let Turn { back, taken, output, lines, complete, text, shown, .. } =
        compartment::run(crate::backend::is_intact, work)?;
    if taken > 0 {
        link.input.lock().drain(..taken);
    }
    if let Some(text) = text {
        if let Some((_, place)) = &mut *ATTACHED.lock() {
            *place = text;
        }
        terminal::raw(&shown);
    }
    if let Some(guest) = GUESTS.lock().get_mut(name) {
        if output.lost > 0 {
            guest.log.push(lost(output.lost).as_bytes());
        }
        guest.log.push(&output.bytes);
        if let Some(lines) = lines {
            guest.lines = lines;
        }
        if shown.is_empty() {
            guest.show(name, &complete);
        }
    }
    Ok((back, taken > 0, output))
}

/// A guest's console, from start to end.
///
/// The page stays here, whatever becomes of a turn: after one that panicked, the next begins with what is printed from then on.
async fn serve_console(name: String, page: Arc<Foreign>, mut channel: Channel, link: Arc<Link>) {
    let mut back = Some(ConsoleBack::new(Arc::clone(&page)));
    let mut panics = Row::default();
    loop {
        let seen = link.bell.rings();
        let stop = link.stop.load(Ordering::Acquire);
        let (mut moved, mut printed, mut more) = (false, false, false);
        let place = back.as_ref().map_or(0, ConsoleBack::place);
        match back.take().map(|back| turn(&name, back, &link)) {
            Some(Ok((console, typed, output))) => {
                back = Some(console);
                (printed, more) = (!output.bytes.is_empty(), output.more);
                moved = typed || printed;
            }
            Some(Err(panic)) => {
                let borne = panics.bears_another(time::now_ns());
                let then = if borne { "" } else { ": again and again, so nothing more is taken from it" };
                say!("{name}: its console panicked: {panic}{then}");
                let (console, skipped) = ConsoleBack::skipping(Arc::clone(&page), place);
                if let Some(guest) = GUESTS.lock().get_mut(&name).filter(|_| skipped > 0) {
                    guest.log.push(lost(skipped).as_bytes());
                }
                (back, moved) = (borne.then_some(console), true);
            }
            // Given up: the guest's end stays as it is.
            None => {}
        }
        if moved {
            // It may have closed its end or be gone: then there is nobody to tell.
            let _ = channel.notify();
        }
        if stop && !more {
            break;
        }
        if printed {
            // More may have come meanwhile, but the others come first.
            executor::yield_now().await;
        } else {
            first(channel.fired(), link.bell.after(seen)).await;
        }
    }
    drop((back, channel));
    // A turn that panicked keeps its reference for ever.
    page.end();
    if let Some(guest) = GUESTS.lock().get_mut(&name) {
        let rest = guest.lines.rest();
        guest.show(&name, rest.as_slice());
    }
    link.stopped.store(true, Ordering::Release);
    CHANGED.ring();
}

/// Lets the `n`-th step from here on of a guest's console panic.
///
/// # Errors
/// What to say when it does not run.
pub fn panic_console(name: &str, n: u64) -> Result<(), String> {
    running(name).map(|run| run.console.fuse.set(n))
}

/// Lets the `n`-th step from here on of what xenstore does for a guest panic.
///
/// # Errors
/// What to say when it does not run.
pub fn panic_store(name: &str, part: store::Part, n: u64) -> Result<(), String> {
    running(name).map(|run| run.store.panic(part, n))
}

/// Keeps what crosses a guest's xenstore ring from here on, for [`store::take_trace`].
///
/// # Errors
/// What to say when it does not run.
pub fn trace_store(name: &str) -> Result<(), String> {
    running(name).map(|run| run.store.trace())
}

/// Takes what is left of a guest's output and lets go of its console.
async fn close_console(run: &Run) {
    run.console.stop.store(true, Ordering::Release);
    run.console.bell.ring();
    loop {
        let seen = CHANGED.rings();
        if run.console.stopped.load(Ordering::Acquire) {
            break;
        }
        CHANGED.after(seen).await;
    }
}

/// Ends the console's task, then the domain; its state is `then` afterwards. Its log stays.
///
/// # Errors
/// What to say.
async fn tear_down(name: &str, run: Run, then: State) -> Result<(), String> {
    set_state(name, State::Leaving);
    NUMBERED.lock().remove(&run.domain);
    close_console(&run).await;
    // What is mapped from it is let go first: its memory can only come back then.
    run.devices.stop().await;
    store::disconnect(&run.store).await;
    let result = toolstack::destroy(&mut Machine::named(name), run.domain).await;
    set_state(name, then);
    if result.is_ok() {
        publish(Event::DomainGone { name: name.to_string(), domain: run.domain.get() });
    }
    result
        .map_err(|errno| format!("the hypervisor refused to destroy {name} (domain {}): {errno}", run.domain))
}

/// Destroys a guest, whatever it does; false when it is not all gone by `deadline_ns`, and goes on then.
///
/// # Errors
/// What to say.
pub async fn destroy(name: &str, deadline_ns: u64) -> Result<bool, String> {
    let mut asked = false;
    loop {
        let seen = CHANGED.rings();
        let (run, ending) = match state(name) {
            Some(State::Running(run)) => (run, None),
            Some(State::Kept(run, ending)) => (run, Some(ending)),
            Some(State::Gone(_)) if asked => return Ok(true),
            Some(State::Waiting(ending, _)) => {
                set_state(name, State::Gone(Some(ending)));
                return Ok(true);
            }
            Some(State::Gone(_)) | None => return domain(name).map(|_| true),
            // Somebody is at it.
            Some(State::Starting(_) | State::Ended(..) | State::Leaving) => {
                asked = true;
                match first(CHANGED.after(seen), time::until_ns(deadline_ns)).await {
                    First::One(()) => continue,
                    First::Other(()) => return Ok(false),
                }
            }
        };
        asked = true;
        set_state(name, State::Leaving);
        let name = name.to_string();
        // A task of its own: it takes as long as others have the domain's pages mapped.
        executor::spawn(async move {
            if let Err(error) = tear_down(&name, run, State::Gone(ending)).await {
                say!("{error}");
            }
        });
    }
}

/// Asks a guest to power itself off, as Xen's tools do, and waits until it has and its memory and devices are back; what does not
/// listen, or does not end before `deadline_ns`, is ended as if it had. Gives what to say of it, when it was not the guest that did it.
///
/// # Errors
/// What to say.
pub async fn shut_down(name: &str, deadline_ns: u64) -> Result<Option<String>, String> {
    let domain = domain(name)?;
    let asked = store::listens(domain)
        && store::write(&format!("{}/control/shutdown", store::home(domain)), "poweroff").is_ok();
    if asked {
        loop {
            let seen = CHANGED.rings();
            let ended = match state(name) {
                Some(State::Running(run)) if run.domain == domain => false,
                Some(State::Ended(run)) if run.domain == domain => true,
                Some(State::Leaving) => true,
                // By now it may run again, as another domain.
                _ => return Ok(None),
            };
            if let First::One(()) = first(CHANGED.after(seen), time::until_ns(deadline_ns)).await {
                continue;
            }
            if ended {
                return Ok(Some(format!(
                    "{name} has ended, and not all of its memory is back: others use it"
                )));
            }
            break;
        }
    }
    control::remote_shutdown(domain, ShutdownReason::Poweroff)
        .map_err(|errno| format!("the hypervisor refused to shut {name} down: {errno}"))?;
    let why = if asked {
        "was asked and did not end"
    } else {
        "watches nothing in xenstore, so it could not be asked"
    };
    Ok(Some(format!("{name} {why}: it was switched off")))
}

/// Waits until a guest has ended for good, or system time reaches `deadline_ns`; tells how it is then.
pub async fn wait_for_end(name: &str, deadline_ns: u64) -> Option<State> {
    loop {
        let seen = CHANGED.rings();
        match state(name) {
            Some(state @ (State::Kept(..) | State::Gone(_))) => return Some(state),
            None => return None,
            Some(state) => {
                if let First::Other(()) = first(CHANGED.after(seen), time::until_ns(deadline_ns)).await {
                    return Some(state);
                }
            }
        }
    }
}

/// Makes the terminal a guest's console, or nobody's.
pub fn attach(name: Option<&str>) {
    if ATTACHED.lock().is_some() {
        terminal::restore();
    }
    *ATTACHED.lock() = name.map(|name| (name.to_string(), Text::default()));
}

/// Types into a guest's console; false when there is no such console any more.
pub fn type_in(name: &str, bytes: &[u8]) -> bool {
    match state(name) {
        Some(State::Running(run)) => {
            let mut input = run.console.input.lock();
            // What it does not read is not kept for ever.
            let room = 4096usize.saturating_sub(input.len());
            input.extend(bytes.iter().take(room));
            drop(input);
            run.console.bell.ring();
            true
        }
        _ => false,
    }
}

/// Whether a guest is running, or will again.
pub fn is_alive(name: &str) -> bool {
    matches!(state(name), Some(State::Running(_) | State::Starting(_) | State::Waiting(..)))
}

/// Shows a guest's output as it comes, or stops that; true for the former.
pub fn toggle_follow(name: &str) -> bool {
    let mut guests = GUESTS.lock();
    let Some(guest) = guests.get_mut(name) else { return false };
    guest.follow = if guest.follow == Follow::Off { Follow::Named } else { Follow::Off };
    guest.lines = Lines::default();
    guest.follow != Follow::Off
}

/// The last lines of a guest's output.
pub fn last_lines(name: &str, count: usize) -> String {
    GUESTS.lock().get(name).map(|guest| guest.log.last_lines(count)).unwrap_or_default()
}

/// Waits for domains to end and does what their descriptions say.
pub async fn watch(events: Events) {
    let mut channel = match events.bind_virq(Virq::DOM_EXC) {
        Ok(channel) => channel,
        Err(errno) => {
            say!("dom0: no notice of domains that end (VIRQ_DOM_EXC: {errno}): `destroy` them by hand");
            return;
        }
    };
    loop {
        channel.fired().await;
        for (name, run, ending) in ended() {
            set_state(&name, State::Ended(run.clone()));
            store::ended(run.domain);
            executor::spawn(follow_up(name, run, ending));
        }
    }
}

/// Guests in state `Running` whose domains have ended.
fn ended() -> Vec<(String, Run, Ending)> {
    let Ok(domains) = hypervisor::get().ended() else { return Vec::new() };
    let (guests, numbered) = (GUESTS.lock(), NUMBERED.lock());
    let running = |name: &String| match &guests.get(name)?.state {
        State::Running(run) => Some(run.clone()),
        _ => None,
    };
    let one = |(domain, ending)| {
        let name = numbered.get(&domain)?;
        Some((name.clone(), running(name)?, ending))
    };
    domains.into_iter().filter_map(one).collect()
}

/// Reports the end of a guest and applies its policy.
async fn follow_up(name: String, run: Run, ending: Ending) {
    let now = time::now_ns();
    let decision = {
        let mut guests = GUESTS.lock();
        let Some(guest) = guests.get_mut(&name) else { return };
        guest.supervisor.ended(&guest.description.policy, ending, run.started_ns, now)
    };
    let (reason, action) = (ending.word(), decision.word());
    publish(Event::DomainEnded { name: name.clone(), domain: run.domain.get(), reason, action });
    let lived = seconds(now.saturating_sub(run.started_ns));
    // Its last words come before the word about it.
    close_console(&run).await;
    let hint = if ending.is_clean() {
        String::new()
    } else {
        format!(" (`dmesg`: the hypervisor's report; `logs {name}`: its last output)")
    };
    let next = match decision {
        Decision::Destroy => String::new(),
        Decision::Restart { not_before_ns } if not_before_ns > now => {
            format!("; it is started again in {}", seconds(not_before_ns - now))
        }
        Decision::Restart { .. } => "; it is started again".into(),
        Decision::Preserve => "; it is kept as it is until `destroy`".into(),
        Decision::GiveUp => "; it failed at once three times, so it is not started again".into(),
    };
    say!("{name} (domain {}) {ending} after {lived}{next}{hint}", run.domain);
    if decision == Decision::Preserve {
        return set_state(&name, State::Kept(run, ending));
    }
    let then = match decision {
        Decision::Restart { not_before_ns } => State::Waiting(ending, not_before_ns),
        _ => State::Gone(Some(ending)),
    };
    let torn_down = tear_down(&name, run, then).await;
    let result = match (torn_down, decision) {
        (Ok(()), Decision::Restart { not_before_ns }) => start_again(&name, not_before_ns).await,
        (result, _) => result,
    };
    if let Err(error) = result {
        say!("{error}");
        set_state(&name, State::Gone(Some(ending)));
    }
}

/// Starts a guest that waits for it, when it is time, unless somebody has destroyed it by then.
async fn start_again(name: &str, at_ns: u64) -> Result<(), String> {
    loop {
        let seen = CHANGED.rings();
        if !matches!(state(name), Some(State::Waiting(_, until_ns)) if until_ns == at_ns) {
            return Ok(());
        }
        if time::now_ns() >= at_ns {
            break;
        }
        first(CHANGED.after(seen), time::until_ns(at_ns)).await;
    }
    set_state(name, State::Starting(None));
    run(&[name.to_string()], Then::Run).await
}
