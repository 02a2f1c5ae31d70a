//! The SDK's front half of a device's handshake against the real store: ring, wire, permissions, watches.

use control_domain::store_ring::StoreBack;
use guest_sdk::ring::host::HostPages;
use guest_sdk::sync::Bell;
use guest_sdk::xenbus::{Frontend, XenbusError, XenbusState as S, devices};
use guest_sdk::xenstore::{Client, SharedStore, Signal};
use hypercall_abi::DomId;
use hypercall_abi::io::xenstore::{MessageHeader, MessageType};
use std::cell::RefCell;
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use xenstore::wire::Decoder;
use xenstore::{ClientId, Store};

const GUEST: DomId = DomId::new(3);
const FRONT: &str = "/local/domain/3/device/vbd/51712";
const BACK: &str = "/local/domain/0/backend/vbd/3/51712";

/// dom0's side: the store, and the other end of the guest's ring.
struct Server {
    store: Store,
    own: ClientId,
    back: StoreBack<&'static HostPages>,
    decoder: Decoder,
    output: Vec<u8>,
}

impl Server {
    fn new(page: &'static HostPages) -> Self {
        let mut store = Store::new();
        let own = store.connect();
        store.add_domain(GUEST, 0);
        store.introduced(GUEST, 0).unwrap();
        let mut server =
            Self { store, own, back: StoreBack::new(page), decoder: Decoder::default(), output: Vec::new() };
        for (path, permissions) in [("/local/domain/3", "n0\0r3\0"), (FRONT, "n3\0r0\0"), (BACK, "n0\0r3\0")]
        {
            server.ask(MessageType::Mkdir, &format!("{path}\0"));
            server.ask(MessageType::SetPerms, &format!("{path}\0{permissions}"));
        }
        for (name, value) in [("backend", BACK), ("backend-id", "0"), ("state", "1")] {
            server.write(&format!("{FRONT}/{name}"), value);
        }
        server.back_state(S::Initialising);
        server.write(&format!("{BACK}/online"), "1");
        server
    }

    fn ask(&mut self, kind: MessageType, payload: &str) -> Option<Vec<u8>> {
        let header = MessageHeader { kind: kind.number(), ..MessageHeader::default() };
        self.store.ask(self.own, header, payload.as_bytes(), 0).ok()
    }

    fn write(&mut self, path: &str, value: &str) {
        assert!(self.ask(MessageType::Write, &format!("{path}\0{value}")).is_some(), "{path}");
    }

    fn front(&mut self, name: &str) -> Option<String> {
        self.ask(MessageType::Read, &format!("{FRONT}/{name}\0"))
            .map(|value| String::from_utf8(value).unwrap())
    }

    fn back_state(&mut self, state: S) {
        self.write(&format!("{BACK}/state"), state.text());
    }

    /// Moves what can be moved; whether anything was.
    fn step(&mut self) -> bool {
        let mut moved = false;
        let client = ClientId::of(GUEST);
        loop {
            if self.output.is_empty() {
                self.output = self.store.next_output(client).unwrap_or_default();
            }
            let sent = self.back.write(&self.output).unwrap();
            self.output.drain(..sent);
            let bytes = self.back.read(self.decoder.wanted().unwrap()).unwrap();
            if sent == 0 && bytes.is_empty() {
                return moved;
            }
            moved = true;
            if let Some((header, payload)) = self.decoder.feed(&bytes).unwrap() {
                assert!(self.store.request(client, header, &payload, 0).is_none());
            }
        }
    }
}

/// The event channel: what is signalled is served when the front end waits.
struct Wire(Arc<Bell>);

impl Signal for Wire {
    fn notify(&self) {}
    async fn fired(&mut self) {
        let seen = self.0.rings();
        self.0.after(seen).await;
    }
}

type Host = SharedStore<&'static HostPages, Wire>;

/// Runs the front end's part, and serves it; `at_rest` is called each time that nothing moves, and says false when that is an error.
fn run<T>(test: impl AsyncFnOnce(Host) -> T, mut at_rest: impl FnMut(&mut Server) -> bool) -> T {
    let page: &'static HostPages = Box::leak(Box::new(HostPages::new(1, 0)));
    let bell = Arc::new(Bell::new());
    let server = Rc::new(RefCell::new(Server::new(page)));
    let store = SharedStore::over(Client::new(page, Wire(Arc::clone(&bell))), Arc::clone(&bell));
    let mut test = pin!(test(store));
    let mut context = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(value) = test.as_mut().poll(&mut context) {
            return value;
        }
        let mut server = server.borrow_mut();
        if !server.step() {
            assert!(at_rest(&mut server), "the front end waits for what does not come");
        }
        bell.ring();
    }
}

/// What the back end does when nothing moves: one after another.
fn script<const N: usize>(steps: [fn(&mut Server); N]) -> impl FnMut(&mut Server) -> bool {
    let mut steps = steps.into_iter();
    move |server| steps.next().map(|step| step(server)).is_some()
}

#[test]
fn a_device_is_met_used_and_left() {
    run(
        async |store| {
            assert_eq!(devices(&store, "vbd").await.unwrap(), ["51712"]);
            assert_eq!(devices(&store, "vif").await.unwrap(), [""; 0]);
            let mut front = Frontend::open(&store, "device/vbd/51712").await.unwrap();
            assert_eq!(front.backend_id(), DomId::new(0));
            front.wait_for(|state| state == S::InitWait).await.unwrap();
            let nodes = [("ring-ref", "8".to_string()), ("event-channel", "3".to_string())];
            front.publish(&nodes, S::Initialised).await.unwrap();
            front.wait_for(|state| state == S::Connected).await.unwrap();
            assert_eq!(front.need::<u64>("sectors").await, Ok(2048));
            assert_eq!(front.read::<u64>("nothing").await, Ok(None));
            assert_eq!(front.need::<u64>("nothing").await, Err(XenbusError::Missing("nothing".into())));
            let malformed = XenbusError::Malformed("nonsense".into(), "1x".into());
            assert_eq!(front.offers("nonsense").await, Err(malformed));
            assert_eq!(front.offers("feature-persistent").await, Ok(true));
            front.set_state(S::Connected).await.unwrap();
            assert_eq!(front.changed().await, Ok(S::Closing), "it has changed");
            assert_eq!(front.is_leaving().await, Ok(false));
            front.close().await.unwrap();
            front.set_state(S::Initialising).await.unwrap();
            assert_eq!(front.wait_for(|state| state == S::InitWait).await, Err(XenbusError::Closed));
            assert_eq!(front.changed().await, Ok(S::InitWait), "it is back");
            loop {
                match front.changed().await {
                    Ok(_) => {}
                    gone => break assert_eq!(gone, Err(XenbusError::Gone)),
                }
            }
            assert_eq!(Frontend::open(&store, "device/vbd/51712").await.err(), Some(XenbusError::Gone));
        },
        script([
            |server| server.back_state(S::InitWait),
            |server| {
                for (name, value) in [("state", "3"), ("ring-ref", "8"), ("event-channel", "3")] {
                    assert_eq!(server.front(name).as_deref(), Some(value), "all at once");
                }
                for (name, value) in [("sectors", "2048"), ("nonsense", "1x"), ("feature-persistent", "1")] {
                    server.write(&format!("{BACK}/{name}"), value);
                }
                server.back_state(S::Connected);
            },
            |server| {
                assert_eq!(server.front("state").as_deref(), Some("4"));
                server.back_state(S::Closing);
            },
            |server| {
                assert_eq!(server.front("state").as_deref(), Some("5"));
                server.back_state(S::Closed);
            },
            |server| {
                assert_eq!(server.front("state").as_deref(), Some("1"));
                server.back_state(S::InitWait);
            },
            |server| {
                for path in [BACK, FRONT] {
                    server.ask(MessageType::Rm, &format!("{path}\0")).unwrap();
                }
            },
        ]),
    );
}

#[test]
fn devices_share_one_connection() {
    run(
        async |store| {
            // Two watches, and requests between their events.
            let mut one = store.watch("data/one").await.unwrap();
            let mut other = store.watch("data/other").await.unwrap();
            assert_eq!(
                (one.event().await.unwrap(), other.event().await.unwrap()),
                ("data/one".into(), "data/other".into())
            );
            assert_eq!(store.read("data/one").await, Ok(None));
            assert_eq!(other.event().await.unwrap(), "data/other");
            assert_eq!(store.read("data/other").await, Ok(Some("x".into())));
            assert_eq!(one.event().await.unwrap(), "data/one");
            drop(one);
            // The next watch has events of its own only.
            let mut again = store.watch("data/one").await.unwrap();
            assert_eq!(again.event().await.unwrap(), "data/one");
        },
        script([
            |server| {
                server.ask(MessageType::Mkdir, "/local/domain/3/data\0").unwrap();
                server.ask(MessageType::SetPerms, "/local/domain/3/data\0n3\0").unwrap();
                server.write("/local/domain/3/data/other", "x");
            },
            |server| server.write("/local/domain/3/data/one", "y"),
        ]),
    );
}
