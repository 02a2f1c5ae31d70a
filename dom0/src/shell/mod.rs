//! The shell: its commands, and how they come to it. What each of them does is in the modules below, by what it is about.

mod create;
mod devices;
mod domains;
mod load;
mod machine;
mod meters;
mod xenstore;

pub use create::start;

use crate::archive::Archive;
use crate::channel::PROTOCOL;
use crate::editor::{Action, LineEditor};
use crate::guests;
use crate::hypervisor;
use crate::say;
use crate::table::{Align, Table};
use crate::terminal::{self, Keys};
use crate::words;
use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::future::ready;
use core::pin::Pin;
use core::time::Duration;
use guest_sdk::print;
use meters::Effort;
use spin::Mutex;

/// What stands before each line.
pub const PROMPT: &str = "dom0> ";
const CTRL_C: u8 = 3;
/// How long `destroy` waits for others to let go of the domain's memory.
const DESTROY_PATIENCE: Duration = Duration::from_secs(3);
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
    "destroy" "NAME [SECONDS]" destroy "end a domain at once and give its memory back"
        "Nothing in the domain can prevent this, and it is not asked. `logs NAME` still shows its last output. It waits until others have\n\
         let go of the domain's memory, at most 3 seconds unless said."
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
    "xenstore" "ls|read|write|rm|watch|trace|control|panic ..." xenstore "look into xenstore, or change it"
        "`xenstore ls [PATH]` shows a tree with its values; `read PATH`, `write PATH VALUE` and `rm PATH` do what they say;\n\
         `watch PATH [SECONDS]` shows what changes, until a key is pressed. PATH begins with / or is below dom0's own.\n\
         `trace NAME` keeps all that a domain asks and gets from here on, until `trace off`, and `trace` shows what was kept, at most 256 KiB\n\
         at a time. For all of it: `create --paused`, `xenstore trace`, `unpause`.\n\
         `control quota`, `control quota NUMBER` and `control quota set NAME VALUE` show or set what domains may have kept there,\n\
         `control check` looks whether its accounts are right, `control help` lists all.\n\
         `xenstore panic NAME [N]` lets the next request of a domain panic, or the N-th place where its requests have changed something;\n\
         `xenstore panic NAME ring` lets what moves their bytes panic."
    "console" "[-f|panic] NAME [N]" console "type to a domain and see its output; ctrl-] leaves"
        "With -f the shell stays, and the domain's output is shown in it as it comes, each line with the name before it;\n\
         `console -f NAME` again ends that. `console panic NAME [N]` lets its next turn panic, or the N-th step of its turns."
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
