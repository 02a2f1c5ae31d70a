//! Guests that work until the toolstack asks them to end.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, Ordering};
use guest_sdk::xenstore::SharedStore;
use guest_sdk::{executor, println, shutdown};

/// Whether this guest was asked to end.
#[derive(Clone)]
pub struct Asked(Arc<AtomicBool>);

impl Asked {
    /// Listens from here on, by a task of its own.
    pub fn listen(store: &SharedStore) -> Self {
        let (store, asked) = (store.clone(), Self(Arc::default()));
        let told = asked.clone();
        executor::spawn(async move {
            match shutdown::requested(&store).await {
                Ok(request) => println!("  asked: {request:?}"),
                Err(error) => println!("  nobody can ask this guest to end: {error}"),
            }
            told.0.store(true, Ordering::Relaxed);
        });
        asked
    }

    /// Whether it was.
    pub fn to_end(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
