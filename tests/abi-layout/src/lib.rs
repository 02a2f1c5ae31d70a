//! Compares `hypercall-abi` with Xen's public C headers.
//!
//! Facts are pairs of a C expression and the number our crate has for it. [`program`] makes a C program that prints all the
//! expressions, [`differences`] reads its output. The layouts come from the crate's own table; constants are listed in
//! [`constants`].

mod constants;
mod layouts;

pub use constants::constants;
pub use layouts::layouts;

/// A C expression and the number that our crate has for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fact {
    /// The expression, an integer constant.
    pub c: String,
    /// Our number.
    pub ours: i128,
}

impl Fact {
    /// A fact.
    pub fn new(c: impl Into<String>, ours: impl Into<i128>) -> Fact {
        Fact { c: c.into(), ours: ours.into() }
    }
}

/// Everything there is to compare.
#[must_use]
pub fn facts() -> Vec<Fact> {
    let mut facts = layouts();
    facts.extend(constants());
    facts
}

/// Headers that the program needs.
pub const HEADERS: &[&str] = &[
    "xen/xen.h",
    "xen/errno.h",
    "xen/vcpu.h",
    "xen/callback.h",
    "xen/nmi.h",
    "xen/event_channel.h",
    "xen/grant_table.h",
    "xen/sched.h",
    "xen/version.h",
    "xen/physdev.h",
    "xen/memory.h",
    "xen/platform.h",
    "xen/hvm/params.h",
    "xen/domctl.h",
    "xen/sysctl.h",
    "xen/elfnote.h",
    "xen/pmu.h",
    "xen/kexec.h",
    "xen/xenoprof.h",
    "xen/hypfs.h",
    "xen/argo.h",
    "xen/hvm/hvm_op.h",
    "xen/hvm/dm_op.h",
    "xen/arch-x86/xen-mca.h",
    "xen/xsm/flask_op.h",
    "xen/io/xs_wire.h",
    "xen/io/xenbus.h",
    "xen/io/console.h",
    "xen/io/blkif.h",
    "xen/io/netif.h",
];

/// A C program that prints each fact's number, one a line, unsigned ones above the signed range included.
#[must_use]
pub fn program(facts: &[Fact]) -> String {
    let mut text = String::from(
        "#define __XEN_TOOLS__ 1\n#define __XEN_INTERFACE_VERSION__ 0x00040d00\n\
         #include <stdio.h>\n#include <stdint.h>\n#include <stddef.h>\n#include <errno.h>\n",
    );
    for header in HEADERS {
        text.push_str(&format!("#include <{header}>\n"));
    }
    // A negative number has all bits above 63 set, an unsigned one none: `> 0` of the expression's own type tells them apart.
    text.push_str(
        "#define SHOW(e) do { if ((e) < 1 && (e) != 0) printf(\"%lld\\n\", (long long)(e)); \
         else printf(\"%llu\\n\", (unsigned long long)(e)); } while (0)\nint main(void) {\n",
    );
    for fact in facts {
        text.push_str(&format!("    SHOW({});\n", fact.c));
    }
    text.push_str("    return 0;\n}\n");
    text
}

/// Compares the program's output with our numbers: one line for each that differs.
#[must_use]
pub fn differences(facts: &[Fact], output: &str) -> Vec<String> {
    let theirs: Vec<&str> = output.lines().collect();
    if theirs.len() != facts.len() {
        return vec![format!("the program printed {} numbers for {} facts", theirs.len(), facts.len())];
    }
    facts
        .iter()
        .zip(theirs)
        .filter_map(|(fact, theirs)| match theirs.parse::<i128>() {
            Ok(number) if number == fact.ours => None,
            Ok(number) => {
                Some(format!("{}: the headers say {number}, hypercall-abi says {}", fact.c, fact.ours))
            }
            Err(_) => Some(format!("{}: the program printed {theirs:?}", fact.c)),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_number_and_a_missing_line_are_reported() {
        let facts = [Fact::new("A", 1), Fact::new("B", -2)];
        assert_eq!(differences(&facts, "1\n-2\n"), Vec::<String>::new());
        assert_eq!(differences(&facts, "1\n3\n"), ["B: the headers say 3, hypercall-abi says -2"]);
        assert_eq!(differences(&facts, "1\n").len(), 1);
        assert_eq!(differences(&facts, "1\nx\n").len(), 1);
    }
}
