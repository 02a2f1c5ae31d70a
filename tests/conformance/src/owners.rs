//! Whose: every kind of domain number for every call that takes one, and frames, ports and references of others.
//!
//! A [`Row`] is one argument that names something; the table is run over all kinds of what there is to name. Who there is
//! differs with the role: dom0 is alone, an unprivileged domain has peers and dom0 itself ([`Who`]).
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt::Debug;

use guest_sdk::abi::grant::GNTST_OKAY;
use guest_sdk::abi::{DomId, Errno};
use guest_sdk::testkit::Verdict;

use crate::state::{self, Findings};

/// Why a call did nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// The call's own answer.
    Errno(Errno),
    /// What stands in the operation's status.
    Status(i16),
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Refusal {
        Refusal::Errno(errno)
    }
}

/// What came of it.
pub type Outcome = Result<(), Refusal>;

/// The outcome of a grant operation that was carried out with this status.
///
/// # Errors
/// Any status but `GNTST_okay`.
pub fn granted(answer: Result<u64, Errno>, status: i16) -> Outcome {
    answer?;
    if status == GNTST_OKAY { Ok(()) } else { Err(Refusal::Status(status)) }
}

/// The kinds of domain numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Who {
    /// `DOMID_SELF`.
    SelfName,
    /// The caller's own number.
    Own,
    /// Another domain that is alive: a peer, and dom0 for others.
    Other,
    /// A domain that has ended.
    Dead,
    /// A number that no domain has or can have.
    Nobody,
    /// `DOMID_IO`.
    Io,
    /// `DOMID_XEN`.
    Xen,
    /// `DOMID_COW`.
    Cow,
    /// `DOMID_INVALID`.
    Invalid,
    /// `DOMID_IDLE`.
    Idle,
}

/// The numbers to try for a domain with this number, beside which these others are alive and these have ended.
#[must_use]
pub fn domains(own: DomId, others: &[DomId], dead: &[DomId]) -> Vec<(Who, DomId)> {
    let mut all = alloc::vec![(Who::Own, own), (Who::SelfName, DomId::SELF)];
    all.extend(others.iter().map(|id| (Who::Other, *id)));
    all.extend(dead.iter().map(|id| (Who::Dead, *id)));
    all.extend([(Who::Io, DomId::IO), (Who::Xen, DomId::XEN), (Who::Cow, DomId::COW)]);
    all.extend([(Who::Invalid, DomId::INVALID), (Who::Idle, DomId::IDLE)]);
    // The last that a domain could have, one that is reserved for nothing, and those with the highest bit.
    all.extend([7777, 0x7fef, 0x7ff5, 0x8000, 0xfffe].map(|number| (Who::Nobody, DomId::new(number))));
    all
}

/// One argument that names one of several kinds `W` of things by an `S`.
pub struct Row<'a, W, S> {
    what: &'a str,
    call: Box<dyn Fn(S) -> Outcome + 'a>,
    undo: Box<dyn Fn() + 'a>,
    state: Box<dyn Fn() -> Vec<u64> + 'a>,
    otherwise: Outcome,
    /// Kinds that get another outcome, or are not tried.
    outcomes: Vec<(W, Option<Outcome>)>,
}

impl<'a, W: Copy + PartialEq + Debug, S: Copy + Debug> Row<'a, W, S> {
    /// `call` makes the call about this one; all get `otherwise` of which the row says nothing else.
    pub fn new(what: &'a str, call: impl Fn(S) -> Outcome + 'a, otherwise: Outcome) -> Row<'a, W, S> {
        Row {
            what,
            call: Box::new(call),
            undo: Box::new(|| {}),
            state: Box::new(Vec::new),
            otherwise,
            outcomes: Vec::new(),
        }
    }

    /// What comes of such.
    pub fn with(mut self, kinds: &[W], outcome: Outcome) -> Self {
        self.outcomes.retain(|(of, _)| !kinds.contains(of));
        self.outcomes.extend(kinds.iter().map(|kind| (*kind, Some(outcome))));
        self
    }

    /// Such are not tried.
    pub fn without(mut self, kinds: &[W]) -> Self {
        self.outcomes.retain(|(of, _)| !kinds.contains(of));
        self.outcomes.extend(kinds.iter().map(|kind| (*kind, None)));
        self
    }

    /// Brings back what was before a call that worked.
    pub fn undo<T>(self, undo: impl Fn() -> T + 'a) -> Self {
        let undo = move || {
            undo();
        };
        Row { undo: Box::new(undo), ..self }
    }

    /// What a call that works changes, beyond [`state::common`].
    pub fn state(self, state: impl Fn() -> Vec<u64> + 'a) -> Self {
        Row { state: Box::new(state), ..self }
    }

    fn run(&self, subjects: &[(W, S)], wrong: &mut Findings) {
        for &(kind, subject) in subjects {
            let expected = match self.outcomes.iter().find(|(of, _)| *of == kind) {
                Some((_, None)) => continue,
                Some((_, Some(outcome))) => *outcome,
                None => self.otherwise,
            };
            let (before, common) = ((self.state)(), state::common());
            let outcome = (self.call)(subject);
            if outcome != expected {
                wrong.add(format_args!("{} {kind:?} {subject:?}: {outcome:?}, not {expected:?}", self.what));
            }
            let changed = (self.state)() != before;
            if outcome.is_ok() {
                if !changed && !before.is_empty() {
                    wrong.add(format_args!("{} {kind:?} {subject:?}: no effect", self.what));
                }
                (self.undo)();
            } else if changed {
                wrong.add(format_args!("{} {kind:?} {subject:?}: something changed", self.what));
            }
            if state::common() != common {
                wrong.add(format_args!("{} {kind:?} {subject:?}: something else changed", self.what));
            }
        }
    }
}

/// Makes the calls of a table, each for all of these.
///
/// # Errors
/// Every outcome that is another, every effect that is not there, and every state that changed after an error.
pub fn run<W: Copy + PartialEq + Debug, S: Copy + Debug>(
    subjects: &[(W, S)],
    table: &[Row<'_, W, S>],
) -> Verdict {
    let mut wrong = Findings::default();
    for row in table {
        row.run(subjects, &mut wrong);
    }
    wrong.verdict()
}
