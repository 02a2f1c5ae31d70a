//! One connection for many tasks: each has its requests in turn, and the events of its own watches.

use super::{Client, Signal, StoreError, Xenstore};
use crate::events::Notifier;
use crate::executor;
use crate::memory::Shared;
use crate::ring::SharedPage;
use crate::sync::{Bell, Lock, Locked};
use alloc::collections::{BTreeMap, VecDeque};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use core::ops::{Deref, DerefMut};
use core::sync::atomic::{AtomicU64, Ordering};
use hypercall_abi::Errno;
use spin::Mutex;

/// The signal of a connection that several tasks wait for: one task has the channel and rings for all of them.
#[derive(Debug)]
pub struct HubSignal {
    notifier: Notifier,
    bell: Arc<Bell>,
    /// Rings that were looked after.
    seen: u64,
}

impl Signal for HubSignal {
    fn notify(&self) {
        // As for a channel of one's own: if nobody is connected, nobody is to be told.
        let _ = self.notifier.notify();
    }
    async fn fired(&mut self) {
        self.bell.after(self.seen).await;
        // What rings from here on has not been looked at.
        self.seen = self.bell.rings();
    }
}

#[derive(Debug)]
struct Inner<M, S> {
    client: Lock<Client<M, S>>,
    /// Events by the token of their watch.
    watches: Mutex<BTreeMap<String, VecDeque<String>>>,
    /// Something has come in, or was sorted.
    bell: Arc<Bell>,
    tokens: AtomicU64,
}

/// The connection to xenstore as a value that tasks share by cloning it.
#[derive(Debug)]
pub struct SharedStore<M = Shared, S = HubSignal> {
    inner: Arc<Inner<M, S>>,
}

impl<M, S> Clone for SharedStore<M, S> {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner) }
    }
}

impl SharedStore {
    /// Shares a connection. Starts a task of its own.
    #[must_use]
    pub fn new(client: Xenstore) -> Self {
        let bell = Arc::new(Bell::new());
        let (client, mut channel) = client.exchange_signal(|channel| {
            let signal = HubSignal { notifier: channel.notifier(), bell: Arc::clone(&bell), seen: 0 };
            (signal, channel)
        });
        let rung = Arc::clone(&bell);
        executor::spawn(async move {
            loop {
                channel.fired().await;
                rung.ring();
            }
        });
        Self::over(client, bell)
    }
}

impl<M: SharedPage, S: Signal> SharedStore<M, S> {
    /// Shares a client on other memory than a domain's own; whoever signals it rings `bell` after that.
    pub fn over(client: Client<M, S>, bell: Arc<Bell>) -> Self {
        let inner = Inner {
            client: Lock::new(client),
            watches: Mutex::new(BTreeMap::new()),
            bell,
            tokens: AtomicU64::new(0),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Waits for one's turn, for one request or several. [`Client::event`] is not for this: use [`watch`](Self::watch).
    pub async fn lock(&self) -> Turn<'_, M, S> {
        Turn { client: self.inner.client.lock().await, inner: &self.inner }
    }

    /// As [`Client::read`], but a node that is not there is `None`.
    ///
    /// # Errors
    /// Its others.
    pub async fn read(&self, path: &str) -> Result<Option<String>, StoreError> {
        match self.lock().await.read(path).await {
            Ok(value) => Ok(Some(String::from_utf8_lossy(&value).into_owned())),
            Err(StoreError::Refused(Errno::ENOENT)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// As [`Client::write`].
    ///
    /// # Errors
    /// Its.
    pub async fn write(&self, path: &str, value: &str) -> Result<(), StoreError> {
        self.lock().await.write(path, value.as_bytes()).await
    }

    /// Writes several nodes at once: others see all or none of them.
    ///
    /// # Errors
    /// As [`Client::write`]; then none is written.
    pub async fn write_all(&self, nodes: &[(String, String)]) -> Result<(), StoreError> {
        loop {
            let mut turn = self.lock().await;
            let mut transaction = turn.transaction().await?;
            for (path, value) in nodes {
                transaction.write(path, value.as_bytes()).await?;
            }
            match transaction.commit().await {
                Err(StoreError::Refused(Errno::EAGAIN)) => {}
                done => return done,
            }
        }
    }

    /// Watches a path until the watch is dropped. Its first event comes at once.
    ///
    /// # Errors
    /// As [`Client::watch`].
    pub async fn watch(&self, path: &str) -> Result<Watch<M, S>, StoreError> {
        let token = format!("w{}", self.inner.tokens.fetch_add(1, Ordering::Relaxed));
        self.inner.watches.lock().insert(token.clone(), VecDeque::new());
        let watch = Watch { store: self.clone(), path: path.to_string(), token };
        let mut turn = self.lock().await;
        // Those whose watches were dropped could not say so themselves.
        while let Some((path, token)) = turn.client.abandoned_watches.pop() {
            let _ = turn.unwatch(&path, &token).await;
        }
        turn.watch(path, &watch.token).await?;
        drop(turn);
        Ok(watch)
    }
}

/// A task's turn at a shared connection.
#[derive(Debug)]
pub struct Turn<'a, M: SharedPage, S: Signal> {
    client: Locked<'a, Client<M, S>>,
    inner: &'a Inner<M, S>,
}

impl<M: SharedPage, S: Signal> Deref for Turn<'_, M, S> {
    type Target = Client<M, S>;
    fn deref(&self) -> &Client<M, S> {
        &self.client
    }
}

impl<M: SharedPage, S: Signal> DerefMut for Turn<'_, M, S> {
    fn deref_mut(&mut self) -> &mut Client<M, S> {
        &mut self.client
    }
}

impl<M: SharedPage, S: Signal> Drop for Turn<'_, M, S> {
    fn drop(&mut self) {
        if self.client.events.is_empty() {
            return;
        }
        let mut watches = self.inner.watches.lock();
        for (path, token) in self.client.events.drain(..) {
            // Of a watch that was dropped there may still be some.
            if let Some(queue) = watches.get_mut(&token)
                && queue.back() != Some(&path)
            {
                queue.push_back(path);
            }
        }
        drop(watches);
        self.inner.bell.ring();
    }
}

/// A watch of a shared connection.
#[derive(Debug)]
pub struct Watch<M: SharedPage = Shared, S: Signal = HubSignal> {
    store: SharedStore<M, S>,
    path: String,
    token: String,
}

impl<M: SharedPage, S: Signal> Watch<M, S> {
    /// Waits for the next event; gives the path that it is about. Several that are alike and wait are one.
    ///
    /// # Errors
    /// [`StoreError::Broken`].
    pub async fn event(&mut self) -> Result<String, StoreError> {
        loop {
            let seen = self.store.inner.bell.rings();
            if let Some(path) = self.next() {
                return Ok(path);
            }
            let mut turn = self.store.lock().await;
            turn.take_events()?;
            drop(turn);
            if let Some(path) = self.next() {
                return Ok(path);
            }
            self.store.inner.bell.after(seen).await;
        }
    }

    fn next(&self) -> Option<String> {
        self.store.inner.watches.lock().get_mut(&self.token)?.pop_front()
    }
}

impl<M: SharedPage, S: Signal> Drop for Watch<M, S> {
    fn drop(&mut self) {
        self.store.inner.watches.lock().remove(&self.token);
        let (path, token) = (core::mem::take(&mut self.path), core::mem::take(&mut self.token));
        // The store hears of it before the next watch begins; until then its events are dropped.
        self.store.inner.client.try_with(|client| client.abandoned_watches.push((path, token)));
    }
}
