//! One device for many disks, as dom0 has them.
//!
//! Each [`Port`] is a disk of its own: it gets its jobs back, and only those. One task drives the device for all of them
//! ([`Shared::poll`]), woken by the device's interrupt, and wakes those whose jobs are done. A port that is dropped while the device works
//! for it stays in the table, with its pages, until the device has given everything back.

use blkback::disk::{Disk, Done, Job, Properties};
use spin::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::vec::Vec;

/// What is known of a port.
struct Client<P> {
    /// Whose the jobs are that the device works on.
    owners: Vec<Option<(u32, u32)>>,
    free: Vec<u32>,
    /// How many the device works on.
    open: usize,
    done: VecDeque<Done<P>>,
    waker: Option<Waker>,
    /// The port is gone.
    gone: bool,
}

struct State<P, D> {
    device: D,
    clients: Vec<Option<Client<P>>>,
}

/// A device, shared.
pub struct Shared<P, D>(Arc<Mutex<State<P, D>>>);

impl<P, D> Clone for Shared<P, D> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

/// A disk on a shared device: the whole device.
pub struct Port<P, D> {
    shared: Shared<P, D>,
    number: u32,
}

impl<P, D: Disk<P>> Shared<P, D> {
    /// Shares a device.
    pub fn new(device: D) -> Self {
        Self(Arc::new(Mutex::new(State { device, clients: Vec::new() })))
    }

    /// What the device is.
    pub fn properties(&self) -> Properties {
        self.0.lock().device.properties()
    }

    /// A disk on it.
    pub fn port(&self) -> Port<P, D> {
        let client = Client {
            owners: Vec::new(),
            free: Vec::new(),
            open: 0,
            done: VecDeque::new(),
            waker: None,
            gone: false,
        };
        let clients = &mut self.0.lock().clients;
        let number = match clients.iter().position(Option::is_none) {
            Some(number) => number,
            None => {
                clients.push(None);
                clients.len() - 1
            }
        };
        if let Some(slot) = clients.get_mut(number) {
            *slot = Some(client);
        }
        Port { shared: self.clone(), number: number as u32 }
    }

    /// Takes what the device has done and wakes those whom it was for. The waker of `context` is told when there is more: it has to
    /// come back here.
    pub fn poll(&self, context: &mut Context<'_>) {
        let mut state = self.0.lock();
        let State { device, clients } = &mut *state;
        while let Poll::Ready(mut done) = device.poll_done(context) {
            let (number, job) = done.job.owner;
            let Some(slot) = clients.get_mut(number as usize) else { continue };
            let Some(client) = slot else { continue };
            let Some(owner) = client.owners.get_mut(job as usize).and_then(Option::take) else { continue };
            client.free.push(job);
            client.open -= 1;
            if client.gone {
                if client.open == 0 {
                    *slot = None;
                }
                continue;
            }
            done.job.owner = owner;
            client.done.push_back(done);
            if let Some(waker) = client.waker.take() {
                waker.wake();
            }
        }
    }

    /// Does something with the device itself.
    pub fn with<R>(&self, work: impl FnOnce(&mut D) -> R) -> R {
        work(&mut self.0.lock().device)
    }
}

impl<P, D: Disk<P>> Disk<P> for Port<P, D> {
    fn properties(&self) -> Properties {
        self.shared.properties()
    }

    fn submit(&mut self, mut job: Job<P>) -> Option<Done<P>> {
        let mut state = self.shared.0.lock();
        let State { device, clients } = &mut *state;
        let client = clients.get_mut(self.number as usize)?.as_mut()?;
        let owner = job.owner;
        let number = client.free.pop().unwrap_or(client.owners.len() as u32);
        match client.owners.get_mut(number as usize) {
            Some(slot) => *slot = Some(owner),
            None => client.owners.push(Some(owner)),
        }
        job.owner = (self.number, number);
        let Some(mut done) = device.submit(job) else {
            client.open += 1;
            return None;
        };
        if let Some(slot) = client.owners.get_mut(number as usize) {
            *slot = None;
        }
        client.free.push(number);
        done.job.owner = owner;
        Some(done)
    }

    fn poll_done(&mut self, context: &mut Context<'_>) -> Poll<Done<P>> {
        let mut state = self.shared.0.lock();
        let Some(Some(client)) = state.clients.get_mut(self.number as usize) else { return Poll::Pending };
        if let Some(done) = client.done.pop_front() {
            return Poll::Ready(done);
        }
        match &client.waker {
            Some(waker) if waker.will_wake(context.waker()) => {}
            _ => client.waker = Some(context.waker().clone()),
        }
        Poll::Pending
    }
}

impl<P, D> Drop for Port<P, D> {
    fn drop(&mut self) {
        let mut state = self.shared.0.lock();
        let Some(slot) = state.clients.get_mut(self.number as usize) else { return };
        if let Some(client) = slot
            && client.open > 0
        {
            client.gone = true;
            client.done.clear();
            client.waker = None;
        } else {
            *slot = None;
        }
    }
}
