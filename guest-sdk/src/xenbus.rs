//! The front end's half of a device's handshake over xenstore (public/io/xenbus.h), whatever the device.
//!
//! ```ignore
//! let store = SharedStore::new(domain.xenstore()?);
//! let mut device = Frontend::open(&store, "device/vbd/51712").await?;
//! device.wait_for(|state| state == XenbusState::InitWait).await?;
//! device.publish(&[("ring-ref", "8"), ("event-channel", "3")], XenbusState::Initialised).await?;
//! device.wait_for(|state| state == XenbusState::Connected).await?;
//! device.set_state(XenbusState::Connected).await?;
//! ```
//! Two directories, each written by one side and read by the other, hold a `state` each. The back end waits (`InitWait`) until the
//! front end has said where its rings are (`Initialised`), joins them (`Connected`), and so is the front end then. Either side ends it
//! by `Closing` and `Closed`. A back end that closes and is not told to go away comes back: after `Closed` the front end says
//! `Initialising` and waits for `InitWait` again.

use crate::memory::Shared;
use crate::ring::SharedPage;
use crate::xenstore::{HubSignal, SharedStore, Signal, StoreError, Watch};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;
use core::str::FromStr;
use hypercall_abi::DomId;
pub use hypercall_abi::io::xenbus::XenbusState;

/// Why a device cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum XenbusError {
    /// There is no such device, or it was taken away.
    Gone,
    /// A node that has to be there is not; its name.
    Missing(String),
    /// A node's value makes no sense: its name, and the value.
    Malformed(String, String),
    /// The back end is closed; it may come back.
    Closed,
    /// xenstore itself failed.
    Store(StoreError),
}

impl From<StoreError> for XenbusError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl fmt::Display for XenbusError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gone => f.write_str("there is no such device, or it was taken away"),
            Self::Missing(node) => write!(f, "the other end has not said what {node:?} is"),
            Self::Malformed(node, value) => write!(f, "{node:?} cannot be {value:?}"),
            Self::Closed => f.write_str("the other end is closed"),
            Self::Store(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for XenbusError {}

/// A device of this domain, seen from its front end.
#[derive(Debug)]
pub struct Frontend<M: SharedPage = Shared, S: Signal = HubSignal> {
    store: SharedStore<M, S>,
    path: String,
    backend: String,
    backend_id: DomId,
    state: Watch<M, S>,
}

/// The devices of a kind (`vbd`, `vif`) that this domain has, by the names of their directories.
///
/// # Errors
/// [`StoreError`]; none at all is no error.
pub async fn devices<M: SharedPage, S: Signal>(
    store: &SharedStore<M, S>,
    kind: &str,
) -> Result<Vec<String>, StoreError> {
    match store.lock().await.directory(&format!("device/{kind}")).await {
        Ok(names) => Ok(names),
        Err(StoreError::Refused(hypercall_abi::Errno::ENOENT)) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

impl<M: SharedPage, S: Signal> Frontend<M, S> {
    /// Finds a device by its directory, as in `device/vbd/51712`, and begins to watch its back end.
    ///
    /// # Errors
    /// [`XenbusError::Gone`] when there is none, [`XenbusError::Malformed`] for a back end's domain that is no number.
    pub async fn open(store: &SharedStore<M, S>, path: &str) -> Result<Self, XenbusError> {
        let Some(backend) = store.read(&format!("{path}/backend")).await? else {
            return Err(XenbusError::Gone);
        };
        let node = format!("{path}/backend-id");
        let backend_id = store.read(&node).await?.ok_or(XenbusError::Missing("backend-id".into()))?;
        let backend_id = backend_id.parse().map_err(|_| XenbusError::Malformed(node, backend_id))?;
        let state = store.watch(&format!("{backend}/state")).await?;
        let backend_id = DomId::new(backend_id);
        Ok(Self { store: store.clone(), path: path.to_string(), backend, backend_id, state })
    }

    /// The domain of the back end.
    #[must_use]
    pub fn backend_id(&self) -> DomId {
        self.backend_id
    }

    /// Its own directory.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Says how far this end is.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn set_state(&self, state: XenbusState) -> Result<(), XenbusError> {
        Ok(self.store.write(&format!("{}/state", self.path), state.text()).await?)
    }

    /// A node of the other end's. One that was removed with all around it is below what this domain may not read.
    async fn peer(&self, name: &str) -> Result<Option<String>, StoreError> {
        match self.store.read(&format!("{}/{name}", self.backend)).await {
            Err(StoreError::Refused(hypercall_abi::Errno::EACCES)) => Ok(None),
            result => result,
        }
    }

    /// How far the other end is; `Unknown` when it has no state.
    ///
    /// # Errors
    /// [`XenbusError::Gone`] when the device was taken away.
    pub async fn backend_state(&self) -> Result<XenbusState, XenbusError> {
        if let Some(text) = self.peer("state").await? {
            return Ok(XenbusState::from_text(text.as_bytes()));
        }
        match self.store.read(&format!("{}/backend", self.path)).await? {
            Some(backend) if backend == self.backend => Ok(XenbusState::Unknown),
            _ => Err(XenbusError::Gone),
        }
    }

    /// Whether the other end, which is closing, means to stay away.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn is_leaving(&self) -> Result<bool, XenbusError> {
        let online = self.peer("online").await?;
        Ok(online.is_none_or(|online| online != "1"))
    }

    /// Waits until the other end's state may have changed; gives what it is now.
    ///
    /// # Errors
    /// As [`backend_state`](Self::backend_state).
    pub async fn changed(&mut self) -> Result<XenbusState, XenbusError> {
        self.state.event().await?;
        self.backend_state().await
    }

    /// Waits until the other end's state is one of those that are wanted.
    ///
    /// # Errors
    /// [`XenbusError::Closed`] when it closes, and that is not wanted; as [`backend_state`](Self::backend_state).
    pub async fn wait_for(
        &mut self,
        wanted: impl Fn(XenbusState) -> bool,
    ) -> Result<XenbusState, XenbusError> {
        let mut state = self.backend_state().await?;
        loop {
            if wanted(state) {
                return Ok(state);
            }
            if matches!(state, XenbusState::Closing | XenbusState::Closed) {
                return Err(XenbusError::Closed);
            }
            state = self.changed().await?;
        }
    }

    /// Writes own nodes and the state at once.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn publish(&self, nodes: &[(&str, String)], state: XenbusState) -> Result<(), XenbusError> {
        let mut all: Vec<(String, String)> =
            nodes.iter().map(|(name, value)| (format!("{}/{name}", self.path), value.clone())).collect();
        all.push((format!("{}/state", self.path), state.text().to_string()));
        Ok(self.store.write_all(&all).await?)
    }

    /// A node of the other end's, if it is there.
    ///
    /// # Errors
    /// [`XenbusError::Malformed`] when it is something else than a `T`.
    pub async fn read<T: FromStr>(&self, name: &str) -> Result<Option<T>, XenbusError> {
        self.parse(&self.backend, name).await
    }

    /// A node of its own directory, where the toolstack has put it, if it is there.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub async fn read_own<T: FromStr>(&self, name: &str) -> Result<Option<T>, XenbusError> {
        self.parse(&self.path, name).await
    }

    async fn parse<T: FromStr>(&self, directory: &str, name: &str) -> Result<Option<T>, XenbusError> {
        let Some(text) = self.store.read(&format!("{directory}/{name}")).await? else { return Ok(None) };
        match text.trim().parse() {
            Ok(value) => Ok(Some(value)),
            Err(_) => Err(XenbusError::Malformed(name.to_string(), text)),
        }
    }

    /// A node of the other end's that has to be there.
    ///
    /// # Errors
    /// [`XenbusError::Missing`]; as [`read`](Self::read).
    pub async fn need<T: FromStr>(&self, name: &str) -> Result<T, XenbusError> {
        self.read(name).await?.ok_or_else(|| XenbusError::Missing(name.to_string()))
    }

    /// Whether the other end offers something: a node that is `1`, or any other number but 0.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub async fn offers(&self, feature: &str) -> Result<bool, XenbusError> {
        Ok(self.read::<u32>(feature).await?.is_some_and(|value| value != 0))
    }

    /// Leaves the connection from this side: `Closing`, and `Closed` when the other end has let go.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn close(&mut self) -> Result<(), XenbusError> {
        self.set_state(XenbusState::Closing).await?;
        let gone = |state| {
            matches!(
                state,
                XenbusState::Closed
                    | XenbusState::InitWait
                    | XenbusState::Unknown
                    | XenbusState::Initialising
            )
        };
        loop {
            match self.backend_state().await {
                Ok(state) if !gone(state) => {}
                Ok(_) | Err(XenbusError::Gone) => break,
                Err(error) => return Err(error),
            }
            self.state.event().await?;
        }
        self.set_state(XenbusState::Closed).await
    }
}
