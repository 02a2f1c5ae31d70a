//! dom0: the domain that builds the others, watches them and gives a shell.
//!
//! Parts that need no machine, each with its host tests:
//!
//! | I want to… | go to |
//! |---|---|
//! | find a file in the boot archive | [`archive`] |
//! | know what a description may say | [`description`], [`disks`], [`cards`], [`switches`] |
//! | build or tear down a domain | [`toolstack`] |
//! | decide what follows a crash | [`policy`] |
//! | read a guest's console | [`ring`], [`scrollback`] |
//! | serve a guest's xenstore ring | [`store_ring`], and the package `xenstore` |
//! | speak to a program outside | [`channel`] |
//! | edit, split and complete command lines | [`editor`], [`words`] |
//! | print tables, sizes, times | [`table`], [`units`] |
//!
//! On top of them, what needs one: [`session`] (start to end), `shell` (what each command does), `guests` (one task for each
//! console, one that waits for domains to end), `store` (one for each xenstore ring, and what guests expect to find there),
//! `backend` (the guests' disks, over the package `blkback`), `devices` (the machine's own, over the package `virtio`), `terminal` (the one screen and keyboard), `machine` (what building takes from it), `hypervisor` (Xenolith's control interface
//! or Xen's).
#![no_std]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod accounts;
pub mod archive;
mod backend;
pub mod cards;
pub mod channel;
pub mod description;
mod devices;
pub mod disks;
pub mod editor;
mod guests;
mod hypervisor;
mod listeners;
mod machine;
mod management;
mod panics;
pub mod policy;
pub mod ring;
mod room;
pub mod schedule;
pub mod scrollback;
pub mod session;
mod shell;
mod store;
pub mod store_ring;
pub mod switches;
pub mod table;
mod terminal;
pub mod toolstack;
pub mod units;
mod waiting;
pub mod words;

use terminal::say;
