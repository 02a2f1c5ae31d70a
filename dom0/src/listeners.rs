//! Who listens at the management channel, and is told of events. Whatever has something to tell knows this and nothing of who asked.

use crate::channel::{Channel, Event};
use crate::waiting::Bell;
use alloc::sync::Arc;
use alloc::vec::Vec;
use guest_sdk::time;
use spin::Mutex;

/// A channel, and the bell of whoever serves it.
#[derive(Default)]
pub struct Listener {
    /// What is said and heard.
    pub channel: Mutex<Channel>,
    /// Rings when there is something to say.
    pub bell: Bell,
}

/// One for each program that is, or may be, at the other end. Nobody leaves: the ports of the machine's console stay.
static ALL: Mutex<Vec<Arc<Listener>>> = Mutex::new(Vec::new());

/// One more, told of all that happens from here on.
pub fn join() -> Arc<Listener> {
    let listener = Arc::<Listener>::default();
    ALL.lock().push(Arc::clone(&listener));
    listener
}

/// Tells everybody who listens that something has happened.
pub fn publish(event: Event) {
    let now_ns = time::now_ns();
    for listener in ALL.lock().iter() {
        listener.channel.lock().event(&event, now_ns);
        listener.bell.ring();
    }
}
