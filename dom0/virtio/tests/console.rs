//! A console against a model of its device.

mod model;

use model::{Chain, EVENT_INDEX, Machine};
use virtio::console::{MOST_PORTS, PortInfo};
use virtio::{Console, Fault, Transport, Vectors};

const MULTIPORT: u64 = 1 << 1;
const NAME: &str = "org.xenolith.control";

fn machine(features: u64, ports: u32) -> Machine {
    let mut own = vec![80, 0, 25, 0];
    own.extend(ports.to_le_bytes());
    own.extend([0; 4]);
    Machine::new(3, features, &[64; 12], &own)
}

fn start(machine: &Machine) -> Console<Machine> {
    let transport = Transport::open(machine.clone(), machine.function()).unwrap();
    Console::start(transport, Vectors::Messages(2)).unwrap()
}

/// The messages that the driver has sent.
fn said(machine: &Machine) -> Vec<(u32, u16, u16)> {
    let mut all = Vec::new();
    while let Some(chain) = machine.pop(3) {
        let bytes = machine.gather(&chain.read);
        assert_eq!(bytes.len(), 8);
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        all.push((u32::from_le_bytes(bytes[..4].try_into().unwrap()), half(4), half(6)));
        machine.push(3, chain.head.into(), 0);
    }
    all
}

fn say(machine: &Machine, port: u32, event: u16, value: u16, name: &str) {
    let chain = machine.pop(2).expect("room for a message");
    let mut bytes = port.to_le_bytes().to_vec();
    bytes.extend(event.to_le_bytes());
    bytes.extend(value.to_le_bytes());
    bytes.extend(name.as_bytes());
    machine.scatter(&chain.write, &bytes);
    machine.push(2, chain.head.into(), bytes.len() as u32);
}

fn type_into(machine: &Machine, queue: usize, bytes: &[u8]) -> bool {
    let Some(chain) = machine.pop(queue) else { return false };
    machine.scatter(&chain.write, bytes);
    machine.push(queue, chain.head.into(), bytes.len() as u32);
    true
}

fn read(console: &mut Console<Machine>, port: u32, most: usize) -> Vec<u8> {
    let mut bytes = vec![0; most];
    let count = console.read(port, &mut bytes);
    bytes.truncate(count);
    bytes
}

/// A console with one named port, as the host would have it.
fn ready(machine: &Machine) -> Console<Machine> {
    let mut console = start(machine);
    assert_eq!(said(machine), [(0, 0, 1)], "it is ready");
    console.set_open(1, true);
    say(machine, 1, 1, 0, "");
    assert!(console.turn());
    assert_eq!(said(machine), [(1, 3, 1), (1, 6, 1)], "the port is ready, and somebody is there");
    say(machine, 1, 7, 1, NAME);
    say(machine, 1, 6, 1, "");
    assert!(console.turn() && !console.turn());
    console
}

#[test]
fn ports_have_names_and_somebody_at_the_other_end() {
    for features in [MULTIPORT | EVENT_INDEX, MULTIPORT] {
        let machine = machine(features, 4);
        let mut console = ready(&machine);
        let port = PortInfo { number: 1, name: Some(NAME.into()), host_open: true, opens: 1 };
        assert_eq!(console.ports().collect::<Vec<_>>(), [port]);
        assert_eq!((console.named(NAME), console.named("other")), (Some(1), None));
        say(&machine, 1, 6, 0, "");
        // Of ports that are not used, and of what nobody wants to know.
        say(&machine, MOST_PORTS, 1, 0, "");
        say(&machine, u32::MAX, 7, 0, "x");
        say(&machine, 1, 5, 0, "");
        assert!(console.turn());
        assert!(!console.ports().next().unwrap().host_open);
        // Who goes and comes between two looks is somebody else.
        say(&machine, 1, 6, 1, "");
        say(&machine, 1, 6, 0, "");
        say(&machine, 1, 6, 1, "");
        assert!(type_into(&machine, 4, b"new"));
        assert!(console.turn());
        let port = console.ports().next().unwrap();
        assert_eq!((port.host_open, port.opens), (true, 3), "before the first byte is read");
        assert_eq!(read(&mut console, 1, 10), b"new");
        say(&machine, 1, 2, 0, "");
        console.turn();
        assert_eq!(console.ports().count(), 0);
        assert_eq!(console.write(1, b"x"), 0, "nobody is there");
        drop(console);
        assert_eq!(machine.pages(), 0);
    }
}

#[test]
fn bytes_go_both_ways_and_wait_for_room() {
    let machine = machine(MULTIPORT | EVENT_INDEX, 2);
    let mut console = ready(&machine);
    // To the host: as much as there are pages.
    let text: Vec<u8> = (0..20_000u32).map(|at| (at % 251) as u8).collect();
    let first = console.write(1, &text);
    assert_eq!(first, 4 * 4096);
    assert_eq!(console.write(1, &text[first..]), 0);
    assert!(!console.has_sent(1));
    let mut got = Vec::new();
    let take = |got: &mut Vec<u8>| {
        let chains: Vec<Chain> = std::iter::from_fn(|| machine.pop(5)).collect();
        for chain in chains {
            got.extend(machine.gather(&chain.read));
            machine.push(5, chain.head.into(), 0);
        }
    };
    take(&mut got);
    assert!(console.turn(), "there is room again");
    assert_eq!(console.write(1, &text[first..]), text.len() - first);
    take(&mut got);
    assert_eq!(got, text);
    assert!(console.turn() && console.has_sent(1));
    // From the host: what is not read makes it wait.
    for number in 0..4u8 {
        assert!(type_into(&machine, 4, &[number; 1000]));
    }
    assert!(!type_into(&machine, 4, b"more"), "no room");
    assert!(console.turn());
    assert!(!type_into(&machine, 4, b"more"), "nobody has read anything");
    assert_eq!(read(&mut console, 1, 1500), [vec![0; 1000], vec![1; 500]].concat());
    assert!(type_into(&machine, 4, b"more"));
    assert!(!type_into(&machine, 4, b"too much"));
    console.turn();
    let rest = read(&mut console, 1, 10_000);
    assert_eq!(rest, [vec![1; 500], vec![2; 1000], vec![3; 1000], b"more".to_vec()].concat());
    assert!(read(&mut console, 1, 100).is_empty());
    assert_eq!((console.counters().received_bytes, console.counters().sent_bytes), (4004, 20_000));
    assert!(read(&mut console, 7, 10).is_empty(), "there is no such port");
}

#[test]
fn a_console_without_messages_has_one_port() {
    let machine = machine(0, 0);
    let mut console = start(&machine);
    assert_eq!(console.ports().map(|port| (port.number, port.host_open)).collect::<Vec<_>>(), [(0, true)]);
    assert_eq!(console.write(0, b"hello"), 5);
    assert_eq!(machine.gather(&machine.pop(1).unwrap().read), b"hello");
    assert!(type_into(&machine, 0, b"typed"));
    assert!(console.turn());
    assert_eq!(read(&mut console, 0, 3), b"typ");
    assert_eq!(read(&mut console, 0, 30), b"ed");
}

/// What is wrong, and how it comes to be so.
type Spoiled = (Fault, fn(&Machine));

#[test]
fn nonsense_starts_it_again_and_it_learns_its_ports_anew() {
    let faults: [Spoiled; 4] = [
        (Fault::Message, |machine| {
            let chain = machine.pop(2).unwrap();
            machine.push(2, chain.head.into(), 7);
        }),
        (Fault::Id(63), |machine| machine.push(5, 63, 0)),
        (Fault::Id(99), |machine| machine.push(4, 99, 0)),
        (Fault::Length { said: 4097, room: 4096 }, |machine| {
            let chain = machine.pop(4).unwrap();
            machine.push(4, chain.head.into(), 4097);
        }),
    ];
    for (fault, spoil) in faults {
        let machine = machine(MULTIPORT, 2);
        let mut console = ready(&machine);
        console.write(1, b"lost");
        spoil(&machine);
        assert!(console.turn());
        assert_eq!((console.device_mut().take_fault(), console.device().revivals()), (Some(fault), 1));
        assert_eq!(console.ports().count(), 0, "nobody has told of them yet");
        assert_eq!(said(&machine), [(0, 0, 1)]);
        say(&machine, 1, 1, 0, "");
        console.turn();
        assert_eq!(said(&machine), [(1, 3, 1), (1, 6, 1)], "it is open as it was");
        assert_eq!(console.write(1, b"again"), 5);
        assert_eq!(machine.gather(&machine.pop(5).unwrap().read), b"again");
        assert!(type_into(&machine, 4, b"in"));
        console.turn();
        assert_eq!(read(&mut console, 1, 10), b"in");
        machine.device(|device| (device.never_resets, device.status) = (true, device.status | 0x40));
        console.changed();
        assert!(console.device().is_broken() && !machine.masters_bus());
        assert!(!console.turn() && !console.listen() && console.write(1, b"x") == 0);
    }
}
