//! How many: counts of none, of more than there can be, and of so many that their size is no number, for every call that takes
//! one.
use alloc::boxed::Box;
use alloc::vec::Vec;

use guest_sdk::testkit::Verdict;

use crate::handles::{Answer, Undo};
use crate::state::{self, Findings};

/// Whether a call does something.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Effect {
    /// All is as it was.
    Nothing,
    /// What the row's state shows has changed.
    Done,
}

/// One count of one call.
pub struct Count<'a> {
    what: &'a str,
    call: Box<dyn Fn(u64) -> Answer + 'a>,
    state: Box<dyn Fn() -> Vec<u64> + 'a>,
    undo: Undo<'a>,
    answers: Vec<(u64, Answer, Effect)>,
}

impl<'a> Count<'a> {
    /// `call` makes the call with this count.
    pub fn new(what: &'a str, call: impl Fn(u64) -> Answer + 'a) -> Count<'a> {
        Count {
            what,
            call: Box::new(call),
            state: Box::new(Vec::new),
            undo: Box::new(|_| {}),
            answers: Vec::new(),
        }
    }

    /// What the call changes when it works, and how to bring that back.
    pub fn state(self, state: impl Fn() -> Vec<u64> + 'a, undo: impl Fn(&[u64]) + 'a) -> Self {
        Count { state: Box::new(state), undo: Box::new(undo), ..self }
    }

    /// These counts get this answer, and change nothing.
    pub fn refused(self, counts: &[u64], answer: Answer) -> Self {
        self.answer(counts, answer, Effect::Nothing)
    }

    /// With these counts it works.
    pub fn works(self, counts: &[u64], answer: Answer) -> Self {
        self.answer(counts, answer, Effect::Done)
    }

    fn answer(mut self, counts: &[u64], answer: Answer, effect: Effect) -> Self {
        self.answers.extend(counts.iter().map(|count| (*count, answer, effect)));
        self
    }

    fn run(&self, wrong: &mut Findings) {
        for &(count, expected, effect) in &self.answers {
            let (before, common) = ((self.state)(), state::common());
            let answer = (self.call)(count);
            if answer != expected {
                wrong.add(format_args!("{} {count:#x}: {answer:x?}, not {expected:x?}", self.what));
            }
            let changed = (self.state)() != before;
            match (changed, effect) {
                (true, Effect::Nothing) => {
                    wrong.add(format_args!("{} {count:#x}: something changed", self.what));
                }
                (false, Effect::Done) => {
                    wrong.add(format_args!("{} {count:#x}: nothing was done", self.what));
                }
                _ => {}
            }
            if changed {
                (self.undo)(&before);
            }
            if state::common() != common {
                wrong.add(format_args!("{} {count:#x}: something else changed", self.what));
            }
        }
    }
}

/// Makes the calls of a table.
///
/// # Errors
/// Every answer that is another, and every state that is not as it should be.
pub fn run(table: &[Count<'_>]) -> Verdict {
    let mut wrong = Findings::default();
    for row in table {
        row.run(&mut wrong);
    }
    wrong.verdict()
}
