//! What can be built and booted, as cargo knows it: nothing is listed by hand.

use crate::sh;
use anyhow::{Context, Result, bail};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The workspace, as far as images go.
pub struct Workspace {
    /// Where cargo builds; images get folders of their own below it.
    pub target_dir: PathBuf,
    /// Whether the hypervisor's binary exists.
    pub has_hypervisor: bool,
    /// dom0, the examples, the conformance guests, those of scenarios: in this order, each by name.
    pub guests: Vec<Image>,
}

/// One guest image.
#[derive(Debug)]
pub struct Image {
    /// Name of its cargo target, and its name in the boot archive.
    pub name: String,
    /// Package that it is built from.
    pub package: String,
    /// Which room it comes from.
    pub kind: Kind,
    /// `[package.metadata.scenario]`: how a test guest wants to be run.
    pub scenario: Option<serde_json::Value>,
    /// How it is run as a conformance test, from `[package.metadata.conformance]`.
    pub conformance: Conformance,
}

/// How an image of conformance cases is run.
#[derive(Debug, Clone, Default)]
pub struct Conformance {
    /// Domains that it needs beside itself as an unprivileged domain: instances of the helper image.
    pub peers: u32,
    /// Whether the clock counts instructions.
    pub icount: bool,
    /// Why it cannot run as an unprivileged domain, if so.
    pub only_dom0: Option<String>,
    /// vCPUs of the domain, in both roles.
    pub vcpus: u32,
    /// Processors that the machine has at least.
    pub smp: u32,
}

/// `[package.metadata.conformance]` of a package of test guests.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
struct ConformanceKeys {
    /// Images that are no test themselves.
    helpers: Vec<String>,
    /// For an image, how many helpers it needs.
    peers: BTreeMap<String, u32>,
    /// Images that want a clock which counts instructions.
    icount: Vec<String>,
    /// For an image that cannot run as an unprivileged domain, why.
    only_dom0: BTreeMap<String, String>,
    /// For an image, how many vCPUs it has, if not 2.
    vcpus: BTreeMap<String, u32>,
    /// For an image, how many processors it wants, if more than one.
    smp: BTreeMap<String, u32>,
}

impl ConformanceKeys {
    fn of(&self, image: &str) -> Conformance {
        Conformance {
            peers: self.peers.get(image).copied().unwrap_or(0),
            icount: self.icount.iter().any(|name| name == image),
            only_dom0: self.only_dom0.get(image).cloned(),
            vcpus: self.vcpus.get(image).copied().unwrap_or(2),
            smp: self.smp.get(image).copied().unwrap_or(1),
        }
    }
}

/// Rooms that guest images live in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The control domain.
    Dom0,
    /// A cargo example of guest-sdk.
    Example,
    /// A package below guest-sdk (its examples and demos).
    Demo,
    /// A package below tests/conformance.
    Conformance,
    /// A guest there that only helps others to be tested.
    Helper,
    /// A package below tests/attacks, tests/benchmarks or tests/scheduling: a test that scenarios boot.
    Scenario,
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    target_directory: PathBuf,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    manifest_path: PathBuf,
    targets: Vec<Target>,
    metadata: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

impl Workspace {
    /// Asks cargo.
    ///
    /// # Errors
    /// When a Cargo.toml is broken.
    pub fn load() -> Result<Workspace> {
        let text = sh::output(sh::cargo().args(["metadata", "--format-version=1", "--no-deps"]))?;
        let metadata: Metadata = serde_json::from_str(&text).context("cannot understand `cargo metadata`")?;
        let root = sh::root();
        let mut workspace = Workspace {
            target_dir: metadata.target_directory,
            has_hypervisor: metadata
                .packages
                .iter()
                .any(|package| package.name == "xenolith" && package.targets.iter().any(|t| is(t, "bin"))),
            guests: Vec::new(),
        };
        for package in metadata.packages {
            let place = package.manifest_path.strip_prefix(&root).unwrap_or(&package.manifest_path);
            let conformance = package.metadata.as_ref().and_then(|data| data.get("conformance"));
            let conformance =
                conformance.map(ConformanceKeys::deserialize).transpose().with_context(|| {
                    format!("Cargo.toml of package {}: [package.metadata.conformance]", package.name)
                })?;
            let conformance = conformance.unwrap_or_default();
            for target in &package.targets {
                let Some(mut kind) = kind(place, target) else { continue };
                if conformance.helpers.contains(&target.name) {
                    kind = Kind::Helper;
                }
                let scenario = package.metadata.as_ref().and_then(|data| data.get("scenario")).cloned();
                workspace.guests.push(Image {
                    name: target.name.clone(),
                    package: package.name.clone(),
                    kind,
                    scenario,
                    conformance: conformance.of(&target.name),
                });
            }
        }
        workspace.guests.sort_by(|a, b| (a.kind, &a.package, &a.name).cmp(&(b.kind, &b.package, &b.name)));
        Ok(workspace)
    }

    /// The guest image of this name.
    ///
    /// # Errors
    /// When there is none; the message lists those that exist.
    pub fn guest(&self, name: &str) -> Result<&Image> {
        match self.guests.iter().find(|image| image.name == name) {
            Some(image) => Ok(image),
            None => {
                let names: Vec<&str> = self.guests.iter().map(|image| image.name.as_str()).collect();
                bail!("no guest image is called `{name}`; there are: {}", names.join(", "))
            }
        }
    }
}

fn is(target: &Target, kind: &str) -> bool {
    target.kind.iter().any(|k| k == kind)
}

fn kind(manifest: &Path, target: &Target) -> Option<Kind> {
    let room = |prefix: &str| manifest.starts_with(prefix);
    match () {
        () if room("guest-sdk") && is(target, "bin") => Some(Kind::Demo),
        () if manifest == Path::new("guest-sdk/Cargo.toml") && is(target, "example") => Some(Kind::Example),
        () if !is(target, "bin") => None,
        () if room("dom0") => Some(Kind::Dom0),
        () if room("tests/conformance") => Some(Kind::Conformance),
        () if room("tests/attacks") || room("tests/benchmarks") || room("tests/scheduling") => {
            Some(Kind::Scenario)
        }
        () => None,
    }
}
