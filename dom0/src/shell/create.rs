//! Commands that make domains, and what they are made of.

use super::{DESTROY_PATIENCE, Next, Outcome, Shell, deadline, duration, usage};
use crate::archive::Archive;
use crate::backend;
use crate::description::Description;
use crate::guests::{self, Follow, State, Then};
use crate::say;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::time::Duration;
use hashbrown::HashMap;
use spin::Once;

impl Shell {
    pub(super) async fn create(&mut self, arguments: &[String]) -> Outcome {
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

    pub(super) async fn run_to_end(&mut self, arguments: &[String]) -> Outcome {
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
