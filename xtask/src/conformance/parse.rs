//! What a conformance image prints, read back.

use super::Verdict;
use regex::Regex;
use std::sync::LazyLock;

/// A line of the testkit about one case. A console of real Xen may put its mark before it.
static LINE: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"(?m)^(?:\(\w+\) )?\[(RUN|PASS|SKIP|FAIL|ERROR)\] +([^\s:]+(?:::[^\s:]+)*)(?:: (.*)| \(\d+ us\))?\s*$")
        .expect("a pattern of this file")
});

/// One run of an image.
#[derive(Debug, Default)]
pub struct Parsed {
    /// Verdicts, in the order of the cases.
    pub verdicts: Vec<(String, Verdict)>,
    /// The case that was announced and gave none.
    pub running: Option<String>,
    /// How the run ended.
    pub end: String,
}

/// Reads the output of one image.
pub fn output(text: &str, end: String) -> Parsed {
    let mut parsed = Parsed { end, ..Parsed::default() };
    for found in LINE.captures_iter(text) {
        let name = |i: usize| found.get(i).map_or("", |group| group.as_str());
        // Cases are functions; their paths are those of the program.
        let case = name(2).rsplit("::").next().unwrap_or_default().to_owned();
        let reason = name(3).to_owned();
        let verdict = match name(1) {
            "RUN" => {
                parsed.running = Some(case);
                continue;
            }
            "PASS" => Verdict::Pass,
            "SKIP" => Verdict::Skip { reason },
            "FAIL" => Verdict::Fail { reason },
            _ => Verdict::Error { reason },
        };
        parsed.running = None;
        parsed.verdicts.push((case, verdict));
    }
    parsed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_each_verdict() {
        let text = "(XEN) noise\n[RUN]   a\n[PASS]  a (12 us)\n[RUN]   b\n[SKIP]  b: no such thing: here\n\
                    [FAIL]  c: line 5: x is 1, not 2\n[ERROR] d: out of memory\n(d7) [RUN]   m::e\n";
        let parsed = output(text, "crashed".into());
        let words: Vec<_> =
            parsed.verdicts.iter().map(|(case, verdict)| (case.as_str(), verdict.word())).collect();
        assert_eq!(words, [("a", "pass"), ("b", "skip"), ("c", "FAIL"), ("d", "ERROR")]);
        assert_eq!(parsed.verdicts[1].1.reason(), Some("no such thing: here"));
        assert_eq!(parsed.running.as_deref(), Some("e"));
    }
}
