//! Where Xenolith may differ from Xen: the reviewed list, and the judgement of a run by it.

use super::{Place, Role, Row, Selection, Verdict};
use crate::qemu::Host;
use crate::sh;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// The list.
const FILE: &str = "tests/conformance/differences.toml";

/// Why the two differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Xenolith has something that Xen has not.
    OurExtension,
    /// Xen does something that Xenolith refuses on purpose.
    RefusedQuirk,
    /// QEMU gets something wrong that touches only one of them.
    Emulator,
    /// A role has different rights on the two.
    Privilege,
}

/// A difference that was looked at and found right.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listed {
    /// `image::case`.
    pub case: String,
    /// The role in which they differ.
    pub role: Role,
    /// The kind of reason.
    pub kind: Kind,
    /// The reason.
    pub text: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    #[serde(default)]
    difference: Vec<Listed>,
}

/// Reads the list.
///
/// # Errors
/// When it has a mistake; the message names it.
pub fn load() -> Result<Vec<Listed>> {
    let text = String::from_utf8(sh::read(&sh::root().join(FILE))?).with_context(|| FILE.to_owned())?;
    parse(&text).with_context(|| FILE.to_owned())
}

fn parse(text: &str) -> Result<Vec<Listed>> {
    let list: List = toml::from_str(text)?;
    let mut seen = BTreeSet::new();
    for entry in &list.difference {
        if entry.text.trim().is_empty() {
            bail!("{}: say in `text` why they differ", entry.case);
        }
        if !seen.insert((&entry.case, entry.role)) {
            bail!("{} as {} is there twice", entry.case, entry.role);
        }
    }
    Ok(list.difference)
}

/// A difference that was found.
#[derive(Debug)]
pub struct Found {
    /// `image::case`.
    pub case: String,
    /// The role.
    pub role: Role,
    /// What Xenolith had to say.
    pub xenolith: Verdict,
    /// What Xen had to say.
    pub xen: Verdict,
    /// The entry for it, if it is listed.
    pub listed: Option<Listed>,
}

/// What is wrong with a run.
#[derive(Debug, Default)]
pub struct Judgement {
    /// All differences.
    pub differences: Vec<Found>,
    /// Entries of the list whose case does not differ.
    pub stale: Vec<Listed>,
    /// Verdicts that are bad on their own: `image::case`, place.
    pub bad: Vec<(String, Place)>,
}

impl Judgement {
    /// Nothing is wrong.
    pub fn is_good(&self) -> bool {
        self.bad.is_empty()
            && self.stale.is_empty()
            && self.differences.iter().all(|found| found.listed.is_some())
    }
}

/// Judges a run. A bad verdict is bad wherever it was; on real Xen it may be listed. An entry for a case that is not among `all`
/// is stale in any run.
pub fn judge(rows: &[Row], places: &[Place], list: &[Listed], all: &Selection) -> Judgement {
    let exists = |name: &str| {
        let parts = name.split_once("::");
        parts.is_some_and(|(image, case)| all.get(image).is_some_and(|cases| cases.iter().any(|c| c == case)))
    };
    let mut judgement = Judgement {
        stale: list.iter().filter(|entry| !exists(&entry.case)).cloned().collect(),
        ..Judgement::default()
    };
    for row in rows {
        let name = row.name();
        let entry = |role| list.iter().find(|entry| entry.case == name && entry.role == role);
        for place in places {
            let excused = place.host == Host::Xen && entry(place.role).is_some();
            if row.at(*place).is_none_or(|verdict| verdict.is_bad() && !excused) {
                judgement.bad.push((name.clone(), *place));
            }
        }
        for role in [Role::Dom0, Role::Domu] {
            let at = |host| row.at(Place { host, role });
            let (Some(xenolith), Some(xen)) = (at(Host::Xenolith), at(Host::Xen)) else { continue };
            let listed = entry(role);
            if xenolith.word() != xen.word() {
                judgement.differences.push(Found {
                    case: name.clone(),
                    role,
                    xenolith: xenolith.clone(),
                    xen: xen.clone(),
                    listed: listed.cloned(),
                });
            } else if let Some(listed) = listed {
                judgement.stale.push(listed.clone());
            }
        }
    }
    judgement
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(xenolith: Verdict, xen: Verdict) -> Row {
        Row { image: "i".into(), case: "c".into(), verdicts: [Some(xenolith), None, Some(xen), None] }
    }

    fn places() -> [Place; 2] {
        [Host::Xenolith, Host::Xen].map(|host| Place { host, role: Role::Dom0 })
    }

    fn judge(rows: &[Row], places: &[Place], list: &[Listed]) -> Judgement {
        super::judge(rows, places, list, &Selection::from([("i".into(), vec!["c".into()])]))
    }

    fn list() -> Vec<Listed> {
        parse("[[difference]]\ncase = 'i::c'\nrole = 'dom0'\nkind = 'our-extension'\ntext = 'x'\n").unwrap()
    }

    fn skip() -> Verdict {
        Verdict::Skip { reason: "ours".into() }
    }

    #[test]
    fn a_difference_must_be_listed_and_a_listed_one_must_differ() {
        let differ = [row(Verdict::Pass, skip())];
        assert!(!judge(&differ, &places(), &[]).is_good());
        assert!(judge(&differ, &places(), &list()).is_good());
        let same = [row(Verdict::Pass, Verdict::Pass)];
        assert!(judge(&same, &places(), &[]).is_good());
        assert_eq!(judge(&same, &places(), &list()).stale.len(), 1);
        assert_eq!(super::judge(&[], &places(), &list(), &Selection::new()).stale.len(), 1, "no such case");
    }

    #[test]
    fn only_xen_may_be_excused() {
        let fail = || Verdict::Fail { reason: String::new() };
        assert!(judge(&[row(Verdict::Pass, fail())], &places(), &list()).is_good());
        assert!(!judge(&[row(fail(), Verdict::Pass)], &places(), &list()).is_good());
        assert!(!judge(&[row(fail(), fail())], &places(), &[]).is_good(), "the same, and wrong");
    }

    #[test]
    fn the_list_says_why() {
        assert!(parse("[[difference]]\ncase='a'\nrole='domu'\nkind='emulator'\ntext=' '\n").is_err());
        assert!(parse("[[difference]]\ncase='a'\nrole='domu'\nkind='because'\ntext='x'\n").is_err());
    }

    #[test]
    fn the_list_of_this_repository_can_be_read() -> Result<()> {
        load().map(drop)
    }
}
