//! The domain as a value: everything it owns, handed out once.

use crate::console::Console;
use crate::events::Events;
use crate::rt::start;
use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};
use hypercall_abi::evtchn::{EvtchnAllocUnbound, EvtchnClose, EvtchnStatus};
use hypercall_abi::start_info::StartFlags;
use hypercall_abi::subops::EvtchnOp;
use hypercall_abi::{DomId, Port};

static TAKEN: AtomicBool = AtomicBool::new(false);

/// Everything this domain owns. There is one; `#[entry]` hands it to `main`.
#[derive(Debug)]
#[non_exhaustive]
pub struct Domain {
    /// Input and output.
    pub console: Console,
    /// Event channels.
    pub events: Events,
    /// Grants of own pages, and mappings of others'.
    pub grants: crate::grants::Grants,
    /// The command line.
    pub command_line: CommandLine,
}

impl Domain {
    /// The domain, the first time somebody asks; then `None`.
    pub fn take() -> Option<Domain> {
        if TAKEN.swap(true, Ordering::Relaxed) {
            return None;
        }
        Some(Domain {
            console: Console::new(),
            events: Events::new(),
            grants: crate::grants::Grants::new(),
            command_line: CommandLine::get(),
        })
    }

    /// Its number. Xen tells a PV guest only in passing: as the remote end of a port that it makes for itself.
    #[must_use]
    pub fn id(&self) -> DomId {
        id()
    }

    /// The connection to xenstore, the first time somebody asks; `None` then, and in the first domain, which has none.
    pub fn xenstore(&mut self) -> Option<crate::xenstore::Xenstore> {
        crate::xenstore::take()
    }

    /// The module (initrd, boot archive) that came with the image; empty when there is none.
    #[must_use]
    pub fn module(&self) -> &'static [u8] {
        let Some(info) = start::start_info() else { return &[] };
        // A guest of this SDK does not ask for modules by frame number (ELF note MOD_START_PFN).
        if info.mod_start == 0 || info.mod_len == 0 || info.flags().contains(StartFlags::MOD_START_PFN) {
            return &[];
        }
        // SAFETY: the builder has mapped these bytes, the heap begins behind them, and nobody writes them.
        unsafe { core::slice::from_raw_parts(info.mod_start as *const u8, info.mod_len as usize) }
    }
}

/// The number of this domain.
#[must_use]
pub fn id() -> DomId {
    static ID: spin::Once<DomId> = spin::Once::new();
    *ID.call_once(|| {
        let call = |operation: EvtchnOp, argument: u64| {
            // SAFETY: each call below passes the struct of its command, alive through the call.
            unsafe { crate::hypercall::stub::event_channel_op(u64::from(operation.number()), argument) }
        };
        let mut own = EvtchnAllocUnbound { dom: DomId::SELF, remote_dom: DomId::SELF, port: Port::new(0) };
        if call(EvtchnOp::AllocUnbound, (&raw mut own) as u64).is_err() {
            return DomId::SELF;
        }
        let mut status = EvtchnStatus { dom: DomId::SELF, port: own.port, ..EvtchnStatus::default() };
        let known = call(EvtchnOp::Status, (&raw mut status) as u64).is_ok();
        let mut close = EvtchnClose { port: own.port };
        // Our own port of a moment ago: nothing to be done if it cannot be closed.
        let _ = call(EvtchnOp::Close, (&raw mut close) as u64);
        if known { status.remote_domain() } else { DomId::SELF }
    })
}

/// The words that the domain was started with.
#[derive(Clone, Copy)]
pub struct CommandLine {
    text: &'static str,
}

impl CommandLine {
    /// The command line of this domain; bytes from the first one that is not UTF-8 on are left out.
    #[must_use]
    pub fn get() -> CommandLine {
        let bytes = start::start_info().map_or(&[][..], |info| info.command_line());
        CommandLine { text: valid(bytes) }
    }

    /// All of it.
    #[must_use]
    pub fn text(&self) -> &'static str {
        self.text
    }

    /// Its words.
    pub fn words(&self) -> impl Iterator<Item = &'static str> + use<> {
        self.text.split_ascii_whitespace()
    }

    /// Whether a word is there.
    #[must_use]
    pub fn has(&self, word: &str) -> bool {
        self.words().any(|other| other == word)
    }

    /// What follows `key=`; the last one counts.
    #[must_use]
    pub fn value(&self, key: &str) -> Option<&'static str> {
        self.words()
            .filter_map(|word| word.split_once('='))
            .filter(|(name, _)| *name == key)
            .map(|(_, value)| value)
            .last()
    }

    /// The number that follows `key=`, `None` when it is missing or none.
    pub fn number<T: core::str::FromStr>(&self, key: &str) -> Option<T> {
        self.value(key)?.parse().ok()
    }
}

impl fmt::Debug for CommandLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.text.fmt(f)
    }
}

fn valid(bytes: &[u8]) -> &str {
    match core::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => {
            bytes.get(..error.valid_up_to()).and_then(|good| core::str::from_utf8(good).ok()).unwrap_or("")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{CommandLine, valid};

    #[test]
    fn words_and_values() {
        let line = CommandLine { text: "  quiet peer=3 log=debug peer=4 empty= =x" };
        assert!(line.has("quiet") && !line.has("peer"));
        assert_eq!(line.number::<u16>("peer"), Some(4));
        assert_eq!(line.number::<u16>("log"), None);
        assert_eq!(line.value("empty"), Some(""));
        assert_eq!(line.value("missing"), None);
        assert_eq!(valid(b"good\xffbad"), "good");
    }
}
