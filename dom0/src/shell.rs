//! The shell: what each command does.

use crate::accounts::{self, Accounts, DomainAccount, Key, Report, VcpuAccount};
use crate::archive::Archive;
use crate::backend;
use crate::cards::{CardSpec, parse_rules};
use crate::channel::PROTOCOL;
use crate::description::{Description, OWN_NAME};
use crate::devices;
use crate::disks::DiskSpec;
use crate::editor::{Action, LineEditor};
use crate::guests::{self, Follow, State, Then};
use crate::hypervisor::{self, DomainInfo, VcpuInfo, VcpuUsage};
use crate::say;
use crate::schedule::{self, Schedule};
use crate::scrollback::printable;
use crate::store;
use crate::table::{Align, Table};
use crate::terminal::{self, Keys};
use crate::units::{Bytes, PAGE, cpu_bits, cpu_list, millis, seconds};
use crate::waiting::First;
use crate::words;
use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::future::ready;
use core::pin::Pin;
use core::time::Duration;
use domain_builder::{Kernel, Role};
use guest_sdk::{hypercall, memory, print, time};
use hashbrown::HashMap;
use hypercall_abi::DomId;
use spin::{Mutex, Once};

/// What stands before each line.
pub const PROMPT: &str = "dom0> ";
/// ctrl-].
const DETACH: u8 = 0x1d;
const CTRL_C: u8 = 3;
/// How long `destroy` waits for others to let go of the domain's memory.
const DESTROY_PATIENCE: Duration = Duration::from_secs(3);
/// How long `free` waits at most: Xen frees what describes a dead domain only once no CPU can be looking at it any more.
const SETTLING: Duration = Duration::from_secs(1);
/// How long `shutdown` waits for the domain.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(10);
/// Clears the screen, cursor at its top.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// A command's answer: an error is a text that names the cause and what to do.
pub type Outcome = Result<Next, String>;

/// What comes after a command.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// The next command.
    Go,
    /// The machine is to be switched off.
    PowerOff,
}

/// One command of the shell.
struct Command {
    name: &'static str,
    arguments: &'static str,
    about: &'static str,
    more: &'static str,
    run: for<'a> fn(&'a mut Shell, &'a [String]) -> Running<'a>,
}

/// A command at work.
pub type Running<'a> = Pin<Box<dyn Future<Output = Outcome> + Send + 'a>>;

macro_rules! commands {
    ($($name:literal $arguments:literal $run:ident $about:literal $more:literal)*) => {
        const COMMANDS: &[Command] = &[$(Command {
            name: $name,
            arguments: $arguments,
            about: $about,
            more: $more,
            run: |shell, words| Box::pin(shell.$run(words)),
        }),*];
    };
}

commands! {
    "list" "[--json]" list "show all domains"
        "NAME and ID name a domain in other commands. MEMORY and VCPUS are what it has; CPU TIME is what it has used.\n\
         --json gives one line with everything that is counted, of each vCPU too: times in ns, since the domain was made."
    "vcpus" "NAME" vcpus "show a domain's vCPUs"
        "CPU is the processor that each is on, or was last on. Its time is what it used (CPU TIME), what it wanted and did not\n\
         get (STOLEN), what it waited for events (WAITING), and what it was down or paused (OFF). SWITCHES are the times that it\n\
         was put on a CPU, MOVES those on another one than before."
    "pin" "NAME VCPU|all [CPUS|all [CPUS|all]]" pin "let a vCPU run on these CPUs only, rather on those"
        "CPUS are numbers and ranges, as in 0,2-3; without them it is shown where the vCPU may run. The second list is where it\n\
         should run when there is a choice. `info` says how many CPUs there are, `vcpus NAME` where each vCPU is."
    "weight" "NAME [WEIGHT]" weight "show or set a domain's share of CPU time against others"
        "From 1 to 65535; a domain that nobody weighted has 256. It counts for each of its vCPUs."
    "cap" "NAME [PERCENT]" cap "show or set the most CPU time that a domain gets"
        "In percent of one CPU, for all its vCPUs together: 150 is one and a half. 0 lifts the cap."
    "create" "[--paused] FILE|IMAGE|NAME [KEY=VALUE]... [+ ...]" create "build domains and start them"
        "FILE is a description in the boot archive, or the name of the domain that one describes; IMAGE is a guest image there\n\
         (`images` lists both); any other NAME needs image=IMAGE. Keys are name, image, memory, vcpus, cpu_weight, cap,\n\
         cpus, cpus_soft, max_event_channels,\n\
         max_grant_frames, max_maptrack_frames, cmdline, autostart, after, on_crash, on_poweroff, on_reboot, disk and card; KEY=VALUE sets one\n\
         for this time, as in `create demo name=other memory=8M disk=xvda:ram:8M`.\n\
         With `+` between them, several are made at once, and none starts before all are built. {domid:NAME} in a cmdline\n\
         stands for the number of another domain, as in `create producer + consumer`. --paused leaves them paused: `unpause`."
    "run" "FILE|IMAGE|NAME [KEY=VALUE]... [+ ...]" run_to_end "the same, show their output, and wait until they have ended"
        "With several, each line has the name of its domain before it. It fails when one does not power off by itself within\n\
         60 seconds, or those that timeout=SECONDS says; what still runs then is destroyed. on_reboot is destroy here."
    "destroy" "NAME" destroy "end a domain at once and give its memory back"
        "Nothing in the domain can prevent this, and it is not asked. `logs NAME` still shows its last output."
    "pause" "NAME" pause "stop a domain's vCPUs until `unpause`" ""
    "unpause" "NAME" unpause "let a paused domain go on" ""
    "shutdown" "NAME|--all [SECONDS]" shutdown "ask a domain to power itself off (it has 10 seconds unless said)"
        "It is asked through xenstore (control/shutdown). If it does not listen, or does not end in time, it is switched off as\n\
         if it had powered itself off. Its on_poweroff is applied either way. --all does it with one domain after another, each before\n\
         those that it comes `after`."
    "disk" "[list|attach|detach|resize|restart|panic|format] ..." disk "show the disks of domains, or change them"
        "`disk attach NAME xvdb:ram:8M` adds a disk (also xvdb:image:FILE, xvdb:overlay:FILE[:CHANGES][:SIZE], xvdb:device:vda1,\n\
         xvdb:file:vda1/FILE[:SIZE], and :readonly behind them);\n\
         `disk detach NAME xvdb [force]` takes it away; `disk resize NAME xvdb 16M` makes it larger;\n\
         `disk restart NAME xvdb` lets its back end fail and come back; `disk panic NAME xvdb [N]` lets it panic when it next\n\
         touches its ring, or the N-th time;\n\
         `disk format vda1 [force]` makes a FAT file system on a disk of dom0's."
    "card" "[list|attach|detach|restart|panic|rules] ..." card "show the network cards of domains, or change them"
        "`card attach NAME lan` adds a card on the switch lan (also lan:mac=ADDRESS, lan:isolated, lan:rate=10M);\n\
         `card detach NAME 1 [force]` takes it away; `card restart NAME 1` lets its back end fail and come back;\n\
         `card panic NAME 1 [N]` lets its next turn panic, or the N-th step of its turns;\n\
         `card rules NAME 1 \"deny out tcp 25\" ...` sets what it may send and get (none: everything)."
    "switch" "[NAME]" switch "show the switches that cards are on, or what the router of one knows"
        "`switch` lists them; with NAME, its router's leases, forwarded ports and connections are shown, and what it dropped.\n\
         They are described in etc/network.toml of the boot archive; others are there as long as they have cards."
    "devices" "" devices "show the machine's own devices"
        "IN and OUT are what was read and written; KICKS are the times that a device was told of requests."
    "device" "read|write|fill|zero|discard|crc|flush|reset|measure|arp|ping NAME ..." device "try a device of the machine's"
        "`device read vda SECTOR` shows a sector, `device crc vda [SECTOR COUNT]` its CRC-32 or that of the whole disk;\n\
         `device write vda SECTOR TEXT` writes a text there; `fill vda SECTOR COUNT BYTE`, `zero vda SECTOR COUNT` and\n\
         `discard vda SECTOR COUNT` change many; `flush vda` has all of it durable. Guests that use the disk are not asked.\n\
         `device reset vda` resets the device and starts it again: what is under way fails, and so does the next flush of who has written.\n\
         `device measure vda DEPTH COUNT [BYTES] [sequential] [write]` reads COUNT times 4 KiB, DEPTH at a time, or as is said, and\n\
         says what one cost; `write` puts zeros over what is there.\n\
         `device arp net0 10.0.2.2 10.0.2.15` asks a card's network who has the first address, in the name of the second;\n\
         `device ping net0 10.0.2.2 10.0.2.15 DEPTH COUNT` has COUNT packets of 1500 bytes echoed, DEPTH at a time, and says how fast."
    "xenstore" "ls|read|write|rm|watch PATH [...]" xenstore "look into xenstore, or change it"
        "`xenstore ls [PATH]` shows a tree with its values; `read PATH`, `write PATH VALUE` and `rm PATH` do what they say;\n\
         `watch PATH [SECONDS]` shows what changes, until a key is pressed. PATH begins with / or is below dom0's own."
    "console" "[-f] NAME" console "type to a domain and see its output; ctrl-] leaves"
        "With -f the shell stays, and the domain's output is shown in it as it comes, each line with the name before it;\n\
         `console -f NAME` again ends that."
    "logs" "NAME [LINES]" logs "show the last output of a domain, also of one that is gone (20 lines unless said)" ""
    "wait" "NAME [SECONDS]" wait "wait until a domain has ended for good (at most 60 seconds unless said)" ""
    "images" "" images "list the guest images and descriptions in the boot archive" ""
    "info" "" info "facts about the machine, the hypervisor and their memory" ""
    "free" "[same]" free "free memory, and how it changed since `free` was used before"
        "With `same` it is an error when it has changed: for lists of commands."
    "dmesg" "[LINES]" dmesg "show the hypervisor's log"
        "Reports of crashed domains are here, with their registers."
    "log-level" "LEVEL" log_level "set how much the hypervisor logs: off, error, warn, info, debug, trace" ""
    "top" "[TIMES] [sort=KEY] [--json]" top "what CPUs and domains do, once a second until q is pressed"
        "KEY is cpu, stolen, time, memory, hypercalls, faults, disk, net, name or id; while it runs, a letter of one sorts by it.\n\
         CPU and STOLEN are time that the domain's vCPUs ran, and that they wanted to and did not. --json gives one line, once."
    "measure" "COMMAND" measure "run a command and say what it cost"
        "Time that CPUs were busy and idle meanwhile, and hypercalls of dom0. Whatever else runs counts, too. With `cargo xtask run\n\
         --icount` one nanosecond is one instruction of guest, hypervisor and dom0 together."
    "repeat" "COUNT COMMAND" repeat "run a command so many times"
        "In its words {n} stands for 1, 2, ... COUNT, as in `repeat 200 create guest{n} image=hello memory=4M`. The first time that fails\n\
         is the last."
    "sleep" "SECONDS" sleep "wait; ctrl-c ends it" ""
    "time" "COMMAND [ARGUMENT]..." time "run a command and say how long its answer took"
        "From the event that woke dom0 (the last key, or the end of a `sleep` before it) to the end of the answer, and how much of\n\
         this dom0 waited for a CPU."
    "history" "" history "show the lines typed before" ""
    "poweroff" "" poweroff "end all domains and switch the machine off" ""
    "version" "[--json]" version "what speaks here: dom0, its management channel, the hypervisor" ""
    "help" "[COMMAND]" help "this list, or more about one command" ""
}

/// All commands. Asked for, because what they are made of cannot be known while one of them is looked at.
fn commands() -> &'static [Command] {
    COMMANDS
}

/// A person, or a list of commands, at work.
pub struct Shell {
    keys: Keys,
    archive: Archive<'static>,
    editor: LineEditor,
    /// Nobody is at the keyboard: commands come from a list.
    scripted: bool,
    /// Free frames when `free` was used before.
    free_before: Arc<Mutex<Option<u64>>>,
    /// What dom0 had used when it last began to wait for something to do.
    idle_since: Effort,
}

impl Shell {
    /// A shell on the keyboard.
    pub fn new(keys: Keys, archive: Archive<'static>) -> Self {
        Self {
            keys,
            archive,
            editor: LineEditor::new(PROMPT),
            scripted: false,
            free_before: Arc::default(),
            idle_since: Effort::default(),
        }
    }

    /// A shell for one request after another, without a keyboard.
    pub fn for_requests(archive: Archive<'static>, free_before: Arc<Mutex<Option<u64>>>) -> Self {
        Self { scripted: true, free_before, ..Self::new(Keys::none(), archive) }
    }

    /// Runs commands one after another, printing each before its output. Returns how many there were and how many failed;
    /// `poweroff` ends the list.
    pub async fn run_script(&mut self, script: &str) -> (usize, usize) {
        self.scripted = true;
        let (mut total, mut failed) = (0, 0);
        for line in script.lines() {
            let commands = match words::parse(line) {
                Ok(commands) => commands,
                Err(error) => {
                    say!("{PROMPT}{line}\n{error}");
                    (total, failed) = (total + 1, failed + 1);
                    continue;
                }
            };
            for command in commands {
                total += 1;
                say!("{PROMPT}{}", words::unparse(&command));
                let outcome = self.run(&command).await;
                if command.first().is_none_or(|name| name != "sleep") {
                    self.idle_since = Effort::so_far();
                }
                match outcome {
                    Ok(Next::Go) => {}
                    Ok(Next::PowerOff) => return (total, failed),
                    Err(error) => {
                        failed += 1;
                        say!("{}: {error}", command.first().map_or("", String::as_str));
                    }
                }
            }
        }
        (total, failed)
    }

    /// Reads lines and runs them until somebody wants the machine off.
    pub async fn run_interactively(&mut self) {
        self.scripted = false;
        loop {
            let line = self.read_line().await;
            let commands = match words::parse(&line) {
                Ok(commands) => commands,
                Err(error) => {
                    say!("{error}");
                    continue;
                }
            };
            for command in commands {
                match self.run(&command).await {
                    Ok(Next::Go) => {}
                    Ok(Next::PowerOff) => return,
                    Err(error) => {
                        say!("{}: {error}", command.first().map_or("", String::as_str));
                        break;
                    }
                }
            }
        }
    }

    async fn read_line(&mut self) -> String {
        terminal::show_edited(Some(self.editor.render()));
        loop {
            self.idle_since = Effort::so_far();
            let byte = self.keys.key().await;
            let archive = self.archive;
            let action = self.editor.feed(byte, &|words, _| candidates(archive, words));
            match action {
                Action::Nothing => {}
                Action::Print(c) => terminal::extend_edited(c, self.editor.render()),
                Action::Redraw => terminal::show_edited(Some(self.editor.render())),
                Action::ClearScreen => {
                    print!("{CLEAR}");
                    terminal::show_edited(Some(self.editor.render()));
                }
                Action::Line(line) => {
                    terminal::show_edited(None);
                    say!("");
                    return line;
                }
                Action::Interrupt => {
                    terminal::show_edited(None);
                    say!("^C");
                    terminal::show_edited(Some(self.editor.render()));
                }
                Action::EndOfInput => {
                    say!("`poweroff` ends dom0 and the machine; from QEMU itself, ctrl-a x");
                }
                Action::Candidates(names) => {
                    say!("{}", names.join("  "));
                }
            }
        }
    }

    /// Runs one command.
    ///
    /// # Errors
    /// What to say.
    pub fn run<'a>(&'a mut self, words: &'a [String]) -> Running<'a> {
        let Some((name, arguments)) = words.split_first() else { return Box::pin(ready(Ok(Next::Go))) };
        let Some(command) = commands().iter().find(|command| command.name == name) else {
            let hint = match words::nearest(name, commands().iter().map(|command| command.name)) {
                Some(known) => format!("did you mean `{known}`?"),
                None => "`help` lists what there is".into(),
            };
            return Box::pin(ready(Err(format!("there is no such command: {hint}"))));
        };
        (command.run)(self, arguments)
    }

    async fn list(&mut self, arguments: &[String]) -> Outcome {
        match arguments {
            [] => {}
            [word] if word == "--json" => {
                say!("{}", accounts::json(&accounts(true)?));
                return Ok(Next::Go);
            }
            _ => return Err(usage("list")),
        }
        let infos = hypervisor::get().domains().map_err(refused("list the domains"))?;
        let views = guests::all();
        let mut table = Table::new([
            ("NAME", Align::Left),
            ("ID", Align::Right),
            ("MEMORY", Align::Right),
            ("VCPUS", Align::Right),
            ("STATE", Align::Left),
            ("CPU TIME", Align::Right),
        ]);
        for info in &infos {
            table.row([
                name_of(info, &views),
                info.domain.get().to_string(),
                Bytes::of_pages(info.pages).to_string(),
                info.vcpus.to_string(),
                state_of(info),
                seconds(info.cpu_time_ns),
            ]);
        }
        let dash = || "-".to_string();
        for view in views {
            let state = match view.state {
                State::Gone(Some(ending)) => format!("gone ({ending})"),
                State::Gone(None) => "gone (destroyed)".into(),
                State::Starting(_) => "being built".into(),
                _ => continue,
            };
            table.row([view.name, dash(), dash(), dash(), state, dash()]);
        }
        print_block(&table.to_string());
        Ok(Next::Go)
    }

    async fn vcpus(&mut self, arguments: &[String]) -> Outcome {
        let wanted = one("vcpus", arguments)?;
        let domain = any_domain(wanted)?;
        let info = hypervisor::get().domain(domain).map_err(refused("tell about it"))?;
        let mut table = Table::new([
            ("VCPU", Align::Right),
            ("CPU", Align::Right),
            ("STATE", Align::Left),
            ("CPU TIME", Align::Right),
            ("STOLEN", Align::Right),
            ("WAITING", Align::Right),
            ("OFF", Align::Right),
            ("CALLS", Align::Right),
            ("FAULTS", Align::Right),
            ("EVENTS", Align::Right),
            ("SWITCHES", Align::Right),
            ("MOVES", Align::Right),
        ]);
        for number in 0..info.vcpus {
            let vcpu = hypervisor::get().vcpu(domain, number).map_err(refused("tell about its vCPUs"))?;
            let told = |value: fn(&VcpuUsage) -> String| vcpu.usage.as_ref().map_or("-".into(), value);
            table.row([
                number.to_string(),
                vcpu.cpu.to_string(),
                vcpu_state(&vcpu).into(),
                seconds(vcpu.cpu_time_ns),
                told(|usage| seconds(usage.runnable_ns)),
                told(|usage| seconds(usage.blocked_ns)),
                told(|usage| seconds(usage.offline_ns)),
                told(|usage| usage.hypercalls.to_string()),
                told(|usage| usage.faults.to_string()),
                told(|usage| usage.upcalls.to_string()),
                told(|usage| usage.switches.to_string()),
                told(|usage| usage.moves.to_string()),
            ]);
        }
        print_block(&table.to_string());
        Ok(Next::Go)
    }

    async fn pin(&mut self, arguments: &[String]) -> Outcome {
        let [wanted, which, cpus @ ..] = arguments else { return Err(usage("pin")) };
        let domain = any_domain(wanted)?;
        let (hard, soft) = match cpus {
            [] => (0, 0),
            [hard] => (schedule::cpus(hard)?, u64::MAX),
            [hard, soft] => (schedule::cpus(hard)?, schedule::cpus(soft)?),
            _ => return Err(usage("pin")),
        };
        let info = hypervisor::get().domain(domain).map_err(refused("tell about it"))?;
        let vcpus = match which.as_str() {
            "all" => 0..info.vcpus,
            number => {
                let vcpu: u32 =
                    number.parse().map_err(|_| format!("{number:?} is no vCPU: a number, or `all`"))?;
                vcpu..vcpu.saturating_add(1)
            }
        };
        let up = hypervisor::get().host().map_err(refused("tell about the machine"))?.cpus;
        for vcpu in vcpus {
            let (may, should) = hypervisor::get()
                .affinity(domain, vcpu, hard, soft)
                .map_err(|error| format!("vCPU {vcpu}: {error}"))?;
            let all = |set: u64| may & !set & cpu_bits(up) == 0;
            let rather =
                if all(should) { String::new() } else { format!(", rather {}", cpu_list(should, up)) };
            say!("vCPU {vcpu}: CPUs {}{rather}", cpu_list(may, up));
        }
        Ok(Next::Go)
    }

    async fn weight(&mut self, arguments: &[String]) -> Outcome {
        self.share("weight", schedule::WEIGHT, arguments)
    }

    async fn cap(&mut self, arguments: &[String]) -> Outcome {
        self.share("cap", schedule::CAP, arguments)
    }

    /// Shows a domain's share of the CPUs; changes what `key` names in it first, if a value is given.
    fn share(&self, command: &str, key: &str, arguments: &[String]) -> Outcome {
        let (wanted, value) = match arguments {
            [wanted] => (wanted, None),
            [wanted, value] => (wanted, Some(value)),
            _ => return Err(usage(command)),
        };
        let domain = any_domain(wanted)?;
        let mut share = hypervisor::get().share(domain).map_err(|refusal| refusal.to_string())?;
        if let Some(value) = value {
            let mut schedule = Schedule::default();
            schedule.set(key, value)?;
            share.weight = schedule.weight.unwrap_or(share.weight);
            share.cap_percent = schedule.cap.unwrap_or(share.cap_percent);
            hypervisor::get().set_share(domain, share).map_err(|refusal| refusal.to_string())?;
        }
        let cap = match share.cap_percent {
            0 => "no cap".into(),
            percent => format!("cap {percent} % of a CPU"),
        };
        say!("{wanted}: weight {}, {cap}", share.weight);
        Ok(Next::Go)
    }

    async fn create(&mut self, arguments: &[String]) -> Outcome {
        let (then, arguments) = match arguments.split_first() {
            Some((word, rest)) if word == "--paused" => (Then::StayPaused, rest),
            _ => (Then::Run, arguments),
        };
        let descriptions = self.describe_all("create", arguments)?;
        let names: Vec<String> = descriptions.iter().map(|description| description.name.clone()).collect();
        start(self.archive, descriptions, Follow::Off, then).await?;
        let how = if then == Then::Run { "runs" } else { "is paused" };
        for name in names {
            if let Ok(domain) = guests::domain(&name) {
                say!("{name} {how} as domain {domain}");
            }
        }
        Ok(Next::Go)
    }

    fn describe_all(&self, command: &str, arguments: &[String]) -> Result<Vec<Description>, String> {
        if arguments.is_empty() {
            return Err(usage(command));
        }
        let one = |words: &[String]| {
            let (file, changes) = words.split_first().ok_or_else(|| usage(command))?;
            describe(self.archive, file, changes)
        };
        arguments.split(|word| word == "+").map(one).collect()
    }

    async fn run_to_end(&mut self, arguments: &[String]) -> Outcome {
        let mut limit = Duration::from_secs(60);
        let mut words = Vec::new();
        for word in arguments {
            match word.strip_prefix("timeout=") {
                Some(text) => limit = duration(text)?,
                None => words.push(word.clone()),
            }
        }
        let mut descriptions = self.describe_all("run", &words)?;
        for description in &mut descriptions {
            // This is one run: what follows it is the next command's.
            description.policy = description.policy.without_restarts();
        }
        let names: Vec<String> = descriptions.iter().map(|description| description.name.clone()).collect();
        let follow = if names.len() == 1 { Follow::Plain } else { Follow::Named };
        start(self.archive, descriptions, follow, Then::Run).await?;
        let end = deadline(limit);
        let mut wrong = Vec::new();
        for name in &names {
            match guests::wait_for_end(name, end).await {
                Some(State::Gone(Some(ending)) | State::Kept(_, ending)) if ending.is_poweroff() => {}
                Some(State::Gone(Some(ending)) | State::Kept(_, ending)) => {
                    wrong.push(format!("{name} {ending}"));
                }
                Some(State::Gone(None)) | None => wrong.push(format!("{name} was destroyed")),
                Some(_) => {
                    guests::destroy(name, deadline(DESTROY_PATIENCE)).await?;
                    wrong.push(format!("{name} ran for {} s and was destroyed", limit.as_secs_f32()));
                }
            }
        }
        if wrong.is_empty() { Ok(Next::Go) } else { Err(wrong.join(", ")) }
    }

    async fn destroy(&mut self, arguments: &[String]) -> Outcome {
        let name = guests::resolve(one("destroy", arguments)?)?;
        if guests::destroy(&name, deadline(DESTROY_PATIENCE)).await? {
            return Ok(Next::Go);
        }
        Err(format!(
            "{name} is dead, but not all of its memory is back: other domains still have pages of it mapped by grant, or a disk has \
             not answered what it asked for. It comes back when they let go or are destroyed"
        ))
    }

    async fn pause(&mut self, arguments: &[String]) -> Outcome {
        let name = guests::resolve(one("pause", arguments)?)?;
        let domain = guests::domain(&name)?;
        if is_paused(domain) {
            return Err(format!("{name} is paused already: `unpause {name}` lets it go on"));
        }
        hypervisor::get().pause(domain).map_err(refused("pause it"))?;
        Ok(Next::Go)
    }

    async fn unpause(&mut self, arguments: &[String]) -> Outcome {
        let name = guests::resolve(one("unpause", arguments)?)?;
        let domain = guests::domain(&name)?;
        if !is_paused(domain) {
            return Err(format!("{name} is not paused"));
        }
        hypervisor::get().unpause(domain).map_err(refused("unpause it"))?;
        Ok(Next::Go)
    }

    async fn shutdown(&mut self, arguments: &[String]) -> Outcome {
        let (name, patience) = match arguments {
            [name] => (name, SHUTDOWN_PATIENCE),
            [name, patience] => (name, duration(patience)?),
            _ => return Err(usage("shutdown")),
        };
        let names = match name.as_str() {
            "--all" => guests::in_order_of_end(),
            name => Vec::from([guests::resolve(name)?]),
        };
        for name in names {
            if let Some(note) = guests::shut_down(&name, deadline(patience)).await? {
                say!("{note}");
            }
        }
        Ok(Next::Go)
    }

    async fn disk(&mut self, arguments: &[String]) -> Outcome {
        let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
        match words.as_slice() {
            [] | ["list"] => print_block(&disk_table()),
            ["attach", name, disk] => {
                guests::devices(&guests::resolve(name)?)?.attach(&DiskSpec::parse(disk)?).await?
            }
            ["detach", name, disk] => guests::devices(&guests::resolve(name)?)?.detach(disk, false).await?,
            ["detach", name, disk, "force"] => {
                guests::devices(&guests::resolve(name)?)?.detach(disk, true).await?
            }
            ["resize", name, disk, size] => {
                let bytes = crate::disks::parse_size(size).map_err(|why| format!("{size:?}: {why}"))?;
                guests::devices(&guests::resolve(name)?)?.disk(disk)?.resize(bytes)?;
            }
            ["restart", name, disk] => guests::devices(&guests::resolve(name)?)?.disk(disk)?.restart(),
            ["format", disk] | ["format", disk, "force"] => {
                Box::pin(backend::format_drive(disk, words.len() == 3)).await?;
                say!("{disk}: formatted");
            }
            ["panic", name, disk] => guests::devices(&guests::resolve(name)?)?.disk(disk)?.kind.fuse.set(1),
            ["panic", name, disk, n] => {
                guests::devices(&guests::resolve(name)?)?.disk(disk)?.kind.fuse.set(number(n)?);
            }
            _ => return Err(usage("disk")),
        }
        Ok(Next::Go)
    }

    async fn switch(&mut self, arguments: &[String]) -> Outcome {
        match arguments {
            [] => print_block(&backend::switch_table()),
            [name] => print_block(&backend::switch_details(name)?),
            _ => return Err(usage("switch")),
        }
        Ok(Next::Go)
    }

    async fn card(&mut self, arguments: &[String]) -> Outcome {
        let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let devices = |name: &str| guests::devices(&guests::resolve(name)?);
        match words.as_slice() {
            [] | ["list"] => print_block(&card_table()),
            ["attach", name, card] => {
                let number = devices(name)?.attach_card(&parse_card(card)?)?;
                say!("card {number}");
            }
            ["detach", name, number] => devices(name)?.detach_card(number, false).await?,
            ["detach", name, number, "force"] => devices(name)?.detach_card(number, true).await?,
            ["restart", name, number] => devices(name)?.card(number)?.restart(),
            ["panic", name, number] => devices(name)?.card(number)?.kind.fuse.set(1),
            ["panic", name, card, n] => devices(name)?.card(card)?.kind.fuse.set(number(n)?),
            ["rules", name, number, rules @ ..] => {
                let filter = parse_rules(rules)?;
                devices(name)?.card(number)?.kind.set_filter(filter);
            }
            _ => return Err(usage("card")),
        }
        Ok(Next::Go)
    }

    async fn devices(&mut self, arguments: &[String]) -> Outcome {
        if !arguments.is_empty() {
            return Err(usage("devices"));
        }
        print_block(&devices::shell::table());
        Ok(Next::Go)
    }

    async fn device(&mut self, arguments: &[String]) -> Outcome {
        let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let done = devices::shell::run(&words).await;
        done.map(|()| Next::Go).map_err(|why| why.unwrap_or_else(|| usage("device")))
    }

    async fn xenstore(&mut self, arguments: &[String]) -> Outcome {
        let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let path = words.get(1).copied().unwrap_or("/");
        let because = |error| format!("xenstore answers {error} to {path:?}");
        match words.as_slice() {
            ["ls"] | ["ls", _] => print_block(&store_tree(path).map_err(because)?),
            ["read", _] => say!("{}", printable(&store::read(path).map_err(because)?)),
            ["write", _, value] => store::write(path, value).map_err(because)?,
            ["rm", _] => store::remove(path).map_err(because)?,
            ["watch", _] => self.watch_store(path, None).await?,
            ["watch", _, limit] => self.watch_store(path, Some(duration(limit)?)).await?,
            _ => return Err(usage("xenstore")),
        }
        Ok(Next::Go)
    }

    async fn watch_store(&mut self, path: &str, limit: Option<Duration>) -> Result<(), String> {
        if self.scripted && limit.is_none() {
            return Err("nobody is at the keyboard to end it: say for how many seconds".into());
        }
        let watcher = store::Own::new();
        watcher.watch(path).map_err(|error| format!("xenstore answers {error} to {path:?}"))?;
        let until = limit.map_or(u64::MAX, deadline);
        loop {
            let event = crate::waiting::first(watcher.event(), time::until_ns(until));
            let event = if self.scripted {
                event.await
            } else {
                match crate::waiting::first(event, self.keys.key()).await {
                    First::One(event) => event,
                    First::Other(_) => return Ok(()),
                }
            };
            match event {
                First::One(changed) => say!("{changed}"),
                First::Other(()) => return Ok(()),
            }
        }
    }

    async fn console(&mut self, arguments: &[String]) -> Outcome {
        if let [flag, name] = arguments
            && flag == "-f"
        {
            let name = guests::resolve(name)?;
            let verb = if guests::toggle_follow(&name) {
                "is shown here from now on"
            } else {
                "is not shown any more"
            };
            say!("the output of {name} {verb}");
            return Ok(Next::Go);
        }
        let name = guests::resolve(one("console", arguments)?)?;
        guests::domain(&name)?;
        if self.scripted {
            return Err(format!("nobody is at the keyboard: use `logs {name}`"));
        }
        say!("This is the console of {name}; ctrl-] leads back to dom0.");
        let shown = guests::last_lines(&name, 10);
        if !shown.is_empty() {
            print_block(&shown);
        }
        guests::attach(Some(&name));
        loop {
            let seen = guests::CHANGED.rings();
            if !guests::is_alive(&name) {
                break;
            }
            match crate::waiting::first(self.keys.key(), guests::CHANGED.after(seen)).await {
                crate::waiting::First::One(DETACH) => break,
                crate::waiting::First::One(key) => {
                    guests::type_in(&name, &[key]);
                }
                crate::waiting::First::Other(()) => {}
            }
        }
        guests::attach(None);
        say!("\nBack in dom0.");
        Ok(Next::Go)
    }

    async fn logs(&mut self, arguments: &[String]) -> Outcome {
        let (name, lines) = match arguments {
            [name] => (name, 20),
            [name, lines] => (name, number::<usize>(lines)?),
            _ => return Err(usage("logs")),
        };
        let name = guests::resolve(name)?;
        let text = guests::last_lines(&name, lines);
        if text.is_empty() {
            say!("{name} has printed nothing");
        } else {
            print_block(&text);
        }
        Ok(Next::Go)
    }

    async fn wait(&mut self, arguments: &[String]) -> Outcome {
        let (name, limit) = match arguments {
            [name] => (name, Duration::from_secs(60)),
            [name, limit] => (name, duration(limit)?),
            _ => return Err(usage("wait")),
        };
        let name = guests::resolve(name)?;
        match guests::wait_for_end(&name, deadline(limit)).await {
            Some(State::Kept(..) | State::Gone(_)) | None => Ok(Next::Go),
            Some(_) => Err(format!("{name} still runs after {} s", limit.as_secs_f32())),
        }
    }

    async fn images(&mut self, arguments: &[String]) -> Outcome {
        none("images", arguments)?;
        let mut images = Table::new([("IMAGE", Align::Left), ("SIZE", Align::Right), ("", Align::Left)]);
        let mut descriptions = Table::new([
            ("DESCRIPTION", Align::Left),
            ("NAME", Align::Left),
            ("IMAGE", Align::Left),
            ("MEMORY", Align::Right),
            ("", Align::Left),
        ]);
        for file in self.archive.files() {
            let file = file.map_err(|error| error.to_string())?;
            if let Some(name) = file.name.strip_prefix("images/") {
                let verdict = match Kernel::parse(file.data, Role::Guest) {
                    Ok(_) => String::new(),
                    Err(error) => format!("unusable: {error}"),
                };
                images.row([name.into(), format!("{} KiB", file.data.len().div_ceil(1024)), verdict]);
            } else if file.name.ends_with(".toml") {
                let file_name = file.name.to_string();
                descriptions.row(match Description::parse(file.data) {
                    Ok(d) => {
                        let auto = if d.autostart { "starts with dom0" } else { "" };
                        [file_name, d.name, d.image, d.memory.to_string(), auto.into()]
                    }
                    Err(error) => [file_name, "?".into(), "?".into(), "?".into(), error.to_string()],
                });
            }
        }
        print_block(&format!("{images}\n{descriptions}"));
        Ok(Next::Go)
    }

    async fn info(&mut self, arguments: &[String]) -> Outcome {
        none("info", arguments)?;
        let info = hypervisor::get().host().map_err(refused("tell about the machine"))?;
        let memory = memory::usage();
        let mut table = Table::new([("", Align::Left), ("", Align::Left)]);
        let mut row = |name: &str, value: String| table.row([name.into(), value]);
        let up = info.own.map(|own| format!(", up {}", seconds(own.uptime_ns))).unwrap_or_default();
        row("hypervisor", hypervisor::get().about() + &up);
        row(
            "CPUs",
            format!("{} at {}.{:03} GHz", info.cpus, info.cpu_khz / 1_000_000, info.cpu_khz / 1000 % 1000),
        );
        row("memory", Bytes::of_pages(info.total_pages).to_string());
        row("free", format!("{} ({} frames)", Bytes::of_pages(info.free_pages), info.free_pages));
        match info.own {
            Some(own) => {
                row("hypervisor's own", Bytes::of_pages(own.pages).to_string());
                row(
                    "hypervisor's heap",
                    format!("{} of {} KiB in use", own.heap_used.div_ceil(1024), own.heap_size / 1024),
                );
            }
            None => row("hypervisor's own", "it does not say".into()),
        }
        row(
            "dom0's heap",
            format!("{} KiB in use of {} MiB memory", memory.heap_used.div_ceil(1024), memory.total >> 20),
        );
        row("panics of back ends", guest_sdk::compartment::abandoned().to_string());
        row("domains", info.domains.to_string());
        if let Some(own) = info.own {
            row("dropped interrupts", own.dropped_interrupts.to_string());
        }
        row("dom0's ports", format!("up to {}", guest_sdk::events::highest_port()));
        print_block(table.to_string().trim_start_matches('\n'));
        Ok(Next::Go)
    }

    async fn free(&mut self, arguments: &[String]) -> Outcome {
        let must_be_same = match arguments {
            [] => false,
            [word] if word == "same" => true,
            _ => return Err(usage("free")),
        };
        let free = self.settled_free_pages(must_be_same).await?;
        let known = self.free_before.lock().replace(free);
        let before = known.unwrap_or(free);
        let change = match known {
            None => String::new(),
            Some(before) if free == before => ", as before".into(),
            Some(before) if free > before => format!(", {} more than before", free - before),
            Some(before) => format!(", {} fewer than before", before - free),
        };
        say!("{} free: {free} frames{change}", Bytes::of_pages(free));
        if must_be_same && free != before {
            return Err(format!("{before} frames were free before, now {free}: `list` shows who has them"));
        }
        Ok(Next::Go)
    }

    /// Free frames, once the number stands still; `wanted` waits longer for that of the last time.
    async fn settled_free_pages(&self, wanted: bool) -> Result<u64, String> {
        let ask = || match hypervisor::get().host() {
            Ok(host) => Ok(host.free_pages),
            Err(errno) => Err(refused("tell about its memory")(errno)),
        };
        let end = deadline(SETTLING);
        let mut free = ask()?;
        loop {
            time::after(SETTLING / 20).await;
            let before = core::mem::replace(&mut free, ask()?);
            let known = *self.free_before.lock();
            let done = free == before && (!wanted || known.is_none_or(|known| known == free));
            if done || time::now_ns() >= end {
                return Ok(free);
            }
        }
    }

    async fn dmesg(&mut self, arguments: &[String]) -> Outcome {
        let lines = match arguments {
            [] => usize::MAX,
            [lines] => number(lines)?,
            _ => return Err(usage("dmesg")),
        };
        let (mut log, mut index, mut lost) = (Vec::new(), 0, 0);
        let mut chunk = [0; 512];
        loop {
            let part = hypervisor::get().read_log(index, &mut chunk).map_err(refused("show its log"))?;
            if part.bytes == 0 {
                break;
            }
            log.extend_from_slice(chunk.get(..part.bytes).unwrap_or(&[]));
            lost += part.lost;
            index = part.next;
        }
        if lost > 0 && lines == usize::MAX {
            say!("[{lost} bytes before this are gone: the log keeps the newest]");
        }
        let text = crate::scrollback::printable(&log);
        let all: Vec<&str> = text.lines().collect();
        let tail = all.get(all.len().saturating_sub(lines)..).unwrap_or(&[]);
        if !tail.is_empty() {
            print_block(&tail.join("\n"));
        }
        Ok(Next::Go)
    }

    async fn log_level(&mut self, arguments: &[String]) -> Outcome {
        const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
        let wanted = one("log-level", arguments)?;
        let level = LEVELS
            .iter()
            .position(|&level| level == wanted)
            .ok_or_else(|| format!("{wanted:?} is no level: there are {}", LEVELS.join(", ")))?;
        hypervisor::get().set_log_level(level as u32).map_err(|refusal| refusal.to_string())?;
        Ok(Next::Go)
    }

    async fn top(&mut self, arguments: &[String]) -> Outcome {
        let (mut left, mut key, mut as_json) = (None, Key::Cpu, false);
        for word in arguments {
            match word.strip_prefix("sort=") {
                Some(name) => key = Key::parse(name)?,
                None if word == "--json" => as_json = true,
                None => left = Some(number::<u64>(word)?),
            }
        }
        if as_json {
            left = Some(1);
        }
        let mut left = match left {
            None if self.scripted => {
                return Err("nobody can press q here: say how often, as in `top 3`".into());
            }
            left => left.unwrap_or(u64::MAX),
        };
        let mut before = accounts(false)?;
        let mut report: Option<Report> = None;
        while left > 0 {
            let letter = self.keys.key_before(before.system_time_ns + 1_000_000_000).await;
            match letter {
                Some(b'q' | b'Q' | CTRL_C) => break,
                Some(letter) => {
                    key = Key::of_letter(letter).unwrap_or(key);
                    // At once, of the numbers that are there.
                    let Some(report) = &mut report else { continue };
                    report.sort(key);
                    self.show_top(report, key);
                    continue;
                }
                None => {}
            }
            left -= 1;
            let now = accounts(false)?;
            let mut latest = Report::between(&before, &now);
            latest.sort(key);
            if as_json {
                say!("{}", accounts::json(&latest));
            } else {
                self.show_top(&latest, key);
            }
            (before, report) = (now, Some(latest));
        }
        Ok(Next::Go)
    }

    fn show_top(&self, report: &Report, key: Key) {
        let screen = report.show(key);
        if self.scripted {
            return print_block(&screen);
        }
        let letters: Vec<String> =
            Key::ALL.iter().map(|(_, word, letter)| format!("{} {word}", char::from(*letter))).collect();
        print!("{CLEAR}{screen}\nq ends this; sort by: {}\n", letters.join(", "));
    }

    async fn measure(&mut self, arguments: &[String]) -> Outcome {
        if arguments.is_empty() {
            return Err(usage("measure"));
        }
        let before = Cost::now()?;
        let outcome = self.run(arguments).await;
        let after = Cost::now()?;
        let total_ns = after.time_ns.saturating_sub(before.time_ns);
        let idle_ns = after.idle_ns.saturating_sub(before.idle_ns);
        // Each CPU was busy or idle all the time.
        let busy_ns = total_ns.saturating_mul(u64::from(after.cpus)).saturating_sub(idle_ns);
        let hypercalls = after.hypercalls.saturating_sub(before.hypercalls);
        say!("measured: {busy_ns} ns busy, {idle_ns} ns idle, {hypercalls} hypercalls of dom0");
        outcome
    }

    async fn repeat(&mut self, arguments: &[String]) -> Outcome {
        let (count, command) = match arguments.split_first() {
            Some((count, command)) if !command.is_empty() => (count, command),
            _ => return Err(usage("repeat")),
        };
        let count: u32 = count.parse().map_err(|_| format!("{count:?} is no number"))?;
        for n in 1..=count {
            let words: Vec<String> = command.iter().map(|word| word.replace("{n}", &n.to_string())).collect();
            match Box::pin(self.run(&words)).await {
                Ok(Next::Go) => {}
                Ok(Next::PowerOff) => return Ok(Next::PowerOff),
                Err(error) => return Err(format!("number {n}: {error}")),
            }
        }
        Ok(Next::Go)
    }

    async fn sleep(&mut self, arguments: &[String]) -> Outcome {
        let until = deadline(duration(one("sleep", arguments)?)?);
        self.idle_since = Effort::so_far();
        while let Some(key) = self.keys.key_before(until).await {
            if key == CTRL_C {
                return Err("interrupted".into());
            }
        }
        Ok(Next::Go)
    }

    async fn time(&mut self, arguments: &[String]) -> Outcome {
        if arguments.is_empty() {
            return Err(usage("time"));
        }
        let (idle, start, start_ns) = (self.idle_since, Effort::so_far(), time::now_ns());
        let outcome = Box::pin(self.run(arguments)).await;
        let (end, took) = (Effort::so_far(), time::now_ns().saturating_sub(start_ns));
        // Since it woke dom0 has done nothing but run and wait for a CPU.
        let answer = start.total().saturating_sub(idle.total()).saturating_add(took);
        let waited = end.runnable_ns.saturating_sub(idle.runnable_ns);
        say!("answered in {}, of which dom0 waited {} for a CPU", millis(answer), millis(waited));
        outcome
    }

    async fn history(&mut self, arguments: &[String]) -> Outcome {
        none("history", arguments)?;
        for line in self.editor.history() {
            say!("{line}");
        }
        Ok(Next::Go)
    }

    async fn version(&mut self, arguments: &[String]) -> Outcome {
        let (dom0, below) = (env!("CARGO_PKG_VERSION"), hypervisor::get().about());
        match arguments {
            [] => say!("dom0 {dom0}, management protocol {PROTOCOL}, on {below}"),
            [word] if word == "--json" => {
                say!("{}", serde_json::json!({ "dom0": dom0, "protocol": PROTOCOL, "hypervisor": below }));
            }
            _ => return Err(usage("version")),
        }
        Ok(Next::Go)
    }

    async fn poweroff(&mut self, arguments: &[String]) -> Outcome {
        none("poweroff", arguments)?;
        Ok(Next::PowerOff)
    }

    async fn help(&mut self, arguments: &[String]) -> Outcome {
        match arguments {
            [] => {
                let mut table = Table::new([("", Align::Left), ("", Align::Left)]);
                for command in commands() {
                    table.row([synopsis(command), command.about.into()]);
                }
                print_block(table.to_string().trim_start_matches('\n'));
                say!(
                    "NAME is a domain's name or number. Commands can be separated by `;`, and tab completes them."
                );
            }
            [name] => {
                let command = commands()
                    .iter()
                    .find(|command| command.name == name)
                    .ok_or("there is no such command: `help` lists all")?;
                say!("{}: {}", synopsis(command), command.about);
                if !command.more.is_empty() {
                    say!("{}", command.more);
                }
            }
            _ => return Err(usage("help")),
        }
        Ok(Next::Go)
    }
}

/// A card as one word. Its mistakes begin with what the command is called already.
fn parse_card(word: &str) -> Result<CardSpec, String> {
    CardSpec::parse(word).map_err(|error| error.strip_prefix("card: ").unwrap_or(&error).into())
}

/// What `measure` takes the difference of.
struct Cost {
    cpus: u32,
    time_ns: u64,
    /// Of all CPUs.
    idle_ns: u64,
    hypercalls: u64,
}

impl Cost {
    fn now() -> Result<Self, String> {
        let below = hypervisor::get();
        let idle = below.idle_ns().map_err(refused("tell about its CPUs"))?;
        let own = below.domain(guest_sdk::id()).map_err(refused("tell about dom0"))?;
        let cpus = below.host().map_err(refused("tell about the machine"))?.cpus;
        Ok(Self {
            cpus,
            idle_ns: idle.iter().sum(),
            hypercalls: own.usage.map_or(0, |usage| usage.hypercalls),
            // Last before the command, so that little of this is counted.
            time_ns: time::now_ns(),
        })
    }
}

/// Builds and starts domains with images from the archive, all or none.
///
/// # Errors
/// What to say.
pub async fn start(
    archive: Archive<'static>,
    descriptions: Vec<Description>,
    follow: Follow,
    then: Then,
) -> Result<(), String> {
    let with_image = |description: Description| {
        let Some(image) = find(archive, &format!("images/{}", description.image)) else {
            return Err(format!(
                "{}: there is no image {:?} in the boot archive: `images` lists those there are",
                description.name, description.image
            ));
        };
        backend::check(&description.disks).map_err(|why| format!("{}: {why}", description.name))?;
        Ok(guests::Wanted { description, image })
    };
    let wanted: Vec<guests::Wanted> = descriptions.into_iter().map(with_image).collect::<Result<_, _>>()?;
    guests::start(wanted, follow, then).await
}

/// The description of a domain: of a file in the archive, of an image there, or of nothing but `changes`.
///
/// # Errors
/// What to say.
pub fn describe(archive: Archive<'static>, name: &str, changes: &[String]) -> Result<Description, String> {
    let mut description = match find_description(archive, name) {
        Some((file, text)) => Description::parse(text).map_err(|error| format!("{file}: {error}"))?,
        None if find(archive, &format!("images/{name}")).is_some() => Description::of_image(name, name)?,
        None if changes.iter().any(|change| change.starts_with("image=")) => {
            Description::of_image(name, name)?
        }
        None => {
            let files = archive.files().filter_map(Result::ok).map(|file| file.name);
            let known: Vec<&str> = files
                .filter_map(|name| {
                    name.strip_prefix("images/").or_else(|| name.strip_suffix(".toml").and(Some(name)))
                })
                .collect();
            return Err(format!(
                "the boot archive holds no {name}: there are {}. Another name needs image=IMAGE",
                known.join(", ")
            ));
        }
    };
    for change in changes {
        let (key, value) = change
            .split_once('=')
            .ok_or_else(|| format!("{change:?} is no KEY=VALUE: write it as in `create {name} memory=8M`"))?;
        description = description.with(key, value)?;
    }
    Ok(description)
}

/// A file of the boot archive. They are read once, not for each domain that is made.
fn find(archive: Archive<'static>, name: &str) -> Option<&'static [u8]> {
    static FILES: Once<HashMap<&'static str, &'static [u8]>> = Once::new();
    let files = FILES.call_once(|| {
        // Of two of a name the first counts.
        let mut files = HashMap::new();
        for name in archive.names() {
            if let Some(data) = archive.find(name) {
                files.insert(name, data);
            }
        }
        files
    });
    files.get(name).copied()
}

/// A description by the name of its file, with or without ending, or by the name that it gives.
fn find_description(archive: Archive<'static>, name: &str) -> Option<(String, &'static [u8])> {
    /// Names that descriptions give, each with its file: they are read once, not for each domain that is made.
    static GIVEN: Once<Vec<(String, &'static str)>> = Once::new();
    let given = GIVEN.call_once(|| {
        let files = archive.files().filter_map(Result::ok).filter(|file| file.name.ends_with(".toml"));
        files.filter_map(|file| Some((Description::parse(file.data).ok()?.name, file.name))).collect()
    });
    let file = if name.ends_with(".toml") { name.to_string() } else { format!("{name}.toml") };
    match find(archive, &file) {
        Some(text) => Some((file, text)),
        None => {
            let (_, file) = given.iter().find(|(other, _)| other == name)?;
            Some((file.to_string(), find(archive, file)?))
        }
    }
}

fn candidates(archive: Archive<'static>, words: &[&str]) -> Vec<String> {
    match words {
        [] => commands().iter().map(|command| command.name.to_string()).collect(),
        ["help"] => commands().iter().map(|command| command.name.to_string()).collect(),
        ["create" | "run"] => {
            let files = archive.files().filter_map(Result::ok).map(|file| file.name);
            files.filter(|name| name.ends_with(".toml")).map(ToString::to_string).collect()
        }
        [
            "destroy" | "pause" | "unpause" | "vcpus" | "pin" | "weight" | "cap" | "shutdown" | "console"
            | "logs" | "wait",
        ]
        | ["console", "-f"] => guests::all().into_iter().map(|view| view.name).collect(),
        _ => Vec::new(),
    }
}

fn synopsis(command: &Command) -> String {
    format!("{} {}", command.name, command.arguments).trim_end().into()
}

fn usage(name: &str) -> String {
    let command = commands().iter().find(|command| command.name == name);
    format!("use it as `{}`", command.map(synopsis).unwrap_or_default())
}

fn none(name: &str, arguments: &[String]) -> Result<(), String> {
    if arguments.is_empty() { Ok(()) } else { Err(usage(name)) }
}

fn one<'a>(name: &str, arguments: &'a [String]) -> Result<&'a str, String> {
    match arguments {
        [one] => Ok(one),
        _ => Err(usage(name)),
    }
}

fn number<T: core::str::FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{text:?} is not a whole number"))
}

fn duration(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("{text:?} is no number of seconds"))?;
    Duration::try_from_secs_f64(seconds).map_err(|_| format!("{text:?} is no number of seconds"))
}

fn deadline(time: Duration) -> u64 {
    guest_sdk::time::now_ns().saturating_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
}

fn refused(what: &str) -> impl Fn(hypercall_abi::Errno) -> String {
    move |errno| {
        let hint = match errno {
            hypercall_abi::Errno::ENOSYS | hypercall_abi::Errno::EACCES => {
                format!(": it is {}", hypervisor::get().about())
            }
            _ => String::new(),
        };
        format!("the hypervisor refused to {what} ({errno}){hint}")
    }
}

/// Prints text of more than one line.
fn print_block(text: &str) {
    say!("{}", text.trim_end_matches('\n'));
}

fn is_paused(domain: DomId) -> bool {
    hypervisor::get().domain(domain).is_ok_and(|info| info.paused)
}

/// What back ends moved for a domain, if dom0 has made it.
fn traffic_of(info: &DomainInfo, views: &[guests::View]) -> Option<accounts::Traffic> {
    views.iter().find_map(|view| match &view.state {
        State::Running(run) | State::Ended(run) | State::Kept(run, _) if run.domain == info.domain => {
            Some(run.devices.traffic())
        }
        _ => None,
    })
}

fn name_of(info: &DomainInfo, views: &[guests::View]) -> String {
    if info.domain == guest_sdk::id() {
        return OWN_NAME.into();
    }
    let known = views.iter().find(|view| {
        matches!(&view.state, State::Running(run) | State::Ended(run) | State::Kept(run, _) if run.domain == info.domain)
    });
    match known {
        Some(view) => view.name.clone(),
        // Being built or torn down: it is known by what it was made with.
        None => {
            let end = info.handle.iter().position(|&byte| byte == 0).unwrap_or(info.handle.len());
            crate::scrollback::printable(info.handle.get(..end).unwrap_or(&[]))
        }
    }
}

fn state_of(info: &DomainInfo) -> String {
    match info {
        info if info.dying => "being torn down".into(),
        DomainInfo { ending: Some(ending), .. } => ending.to_string(),
        info if info.paused => "paused".into(),
        info if info.running => "running".into(),
        info if info.blocked => "waiting".into(),
        _ => "ready".into(),
    }
}

/// All network cards of all domains.
fn card_table() -> String {
    let mut table = Table::new([
        ("NAME", Align::Left),
        ("CARD", Align::Right),
        ("SWITCH", Align::Left),
        ("MAC", Align::Left),
        ("ADDRESS", Align::Left),
        ("STATE", Align::Left),
        ("SENT", Align::Right),
        ("BYTES", Align::Right),
        ("RECEIVED", Align::Right),
        ("BYTES", Align::Right),
        ("DROPPED", Align::Right),
        ("MISSED", Align::Right),
    ]);
    for view in guests::all() {
        let (State::Running(run) | State::Ended(run) | State::Kept(run, _)) = view.state else { continue };
        for vif in run.devices.cards() {
            let (counters, missed) = vif.kind.counters();
            table.row([
                view.name.clone(),
                vif.number().to_string(),
                vif.kind.switch().to_string(),
                vif.kind.mac(),
                vif.kind.ip().map_or("-".into(), |address| address.to_string()),
                vif.state().map_or("-".into(), |state| format!("{state:?}").to_lowercase()),
                counters.sent_frames.to_string(),
                counters.sent_bytes.to_string(),
                counters.received_frames.to_string(),
                counters.received_bytes.to_string(),
                counters.dropped.iter().sum::<u64>().to_string(),
                (counters.refused + missed.no_room + missed.too_long + missed.failed).to_string(),
            ]);
        }
    }
    table.to_string()
}

/// All disks of all domains.
fn disk_table() -> String {
    let mut table = Table::new([
        ("NAME", Align::Left),
        ("DISK", Align::Left),
        ("SIZE", Align::Right),
        ("KIND", Align::Left),
        ("STATE", Align::Left),
        ("REQUESTS", Align::Right),
        ("READ", Align::Right),
        ("WRITTEN", Align::Right),
        ("ERRORS", Align::Right),
    ]);
    let kib = |sectors: u64| format!("{} KiB", sectors / 2);
    for view in guests::all() {
        let (State::Running(run) | State::Ended(run) | State::Kept(run, _)) = view.state else { continue };
        for vbd in run.devices.disks() {
            let (spec, status) = (&vbd.kind.spec, vbd.kind.status());
            let kind = spec.kind.to_string();
            table.row([
                view.name.clone(),
                spec.name.clone(),
                kib(vbd.kind.bytes() / 512),
                if spec.readonly { format!("{kind}, read only") } else { kind },
                vbd.state().map_or("-".into(), |state| format!("{state:?}").to_lowercase()),
                status.counters.requests.to_string(),
                kib(status.counters.sectors_read),
                kib(status.counters.sectors_written),
                status.counters.errors.to_string(),
            ]);
        }
    }
    table.to_string()
}

/// A node and all below it, each in a line, indented by its depth.
fn store_tree(top: &str) -> Result<String, xenstore::Error> {
    let mut text = String::new();
    let mut left = alloc::vec![(top.trim_end_matches('/').to_string(), 0)];
    // Its root has no name of its own, and may not be there.
    store::children(top)?;
    while let Some((path, depth)) = left.pop() {
        let whole = if path.is_empty() { "/" } else { path.as_str() };
        // What goes away meanwhile is left out.
        let Ok(value) = store::read(whole) else { continue };
        let name = if depth == 0 { whole } else { path.rsplit('/').next().unwrap_or("") };
        text += &format!("{:depth$}{name} = \"{}\"\n", "", printable(&value));
        let children = store::children(whole).unwrap_or_default();
        left.extend(children.into_iter().rev().map(|child| (format!("{path}/{child}"), depth + 1)));
    }
    Ok(text)
}

/// All accounts as they are now; with those of each vCPU if `whole`.
fn accounts(whole: bool) -> Result<Accounts, String> {
    let views = guests::all();
    let below = hypervisor::get();
    let infos = below.domains().map_err(refused("list the domains"))?;
    let vcpus = |info: &DomainInfo| {
        // One that goes meanwhile has none.
        let all = (0..info.vcpus).filter_map(|id| Some((id, below.vcpu(info.domain, id).ok()?)));
        all.map(|(id, vcpu)| VcpuAccount {
            id,
            cpu: vcpu.cpu,
            state: vcpu_state(&vcpu),
            running_ns: vcpu.cpu_time_ns,
            usage: vcpu.usage,
        })
        .collect()
    };
    let domain = |info: &DomainInfo| DomainAccount {
        name: name_of(info, &views),
        id: info.domain.get(),
        state: state_of(info),
        memory_bytes: info.pages.saturating_mul(PAGE),
        vcpus: info.vcpus,
        cpu_time_ns: info.cpu_time_ns,
        usage: info.usage,
        traffic: traffic_of(info, &views),
        vcpu: if whole { vcpus(info) } else { Vec::new() },
    };
    Ok(Accounts {
        cpu_idle_ns: below.idle_ns().map_err(refused("tell about its CPUs"))?,
        system_time_ns: time::now_ns(),
        domains: infos.iter().map(domain).collect(),
    })
}

/// Time that dom0's vCPU has run, and wanted to.
#[derive(Clone, Copy, Default)]
struct Effort {
    running_ns: u64,
    runnable_ns: u64,
}

impl Effort {
    fn so_far() -> Self {
        // A vCPU may always ask about itself.
        let [running_ns, runnable_ns, ..] = hypercall::runstate(0).map_or([0; 4], |info| info.time);
        Self { running_ns, runnable_ns }
    }

    fn total(self) -> u64 {
        self.running_ns.saturating_add(self.runnable_ns)
    }
}

fn vcpu_state(vcpu: &VcpuInfo) -> &'static str {
    match vcpu {
        VcpuInfo { online: false, .. } => "off",
        VcpuInfo { running: true, .. } => "running",
        VcpuInfo { blocked: true, .. } => "waiting",
        _ => "ready",
    }
}

/// The domain that somebody calls `text`, which may be dom0 itself.
fn any_domain(text: &str) -> Result<DomId, String> {
    if text == OWN_NAME || text == "0" {
        return Ok(guest_sdk::id());
    }
    guests::domain(&guests::resolve(text)?)
}
