//! The store against a model that is slow and plain: a map from paths to nodes, copied whole for each transaction.

mod harness;

use harness::{Harness, Reply};
use hypercall_abi::DomId;
use hypercall_abi::io::xenstore::MessageType;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use xenstore::ClientId;

type Entry = (Option<u16>, char);

#[derive(Clone, Debug, PartialEq)]
struct Node {
    value: Vec<u8>,
    permissions: Vec<(u16, Entry)>,
}

/// What an entry of a list means: the letter, and the domain if it is still the one that was named.
type Tree = BTreeMap<String, Node>;

#[derive(Clone, Debug)]
enum Op {
    Read(String),
    Directory(String),
    GetPerms(String),
    Write(String, Vec<u8>),
    Mkdir(String),
    Rm(String),
    SetPerms(String, Vec<(char, u16)>),
}

fn parent(path: &str) -> Option<String> {
    let (above, name) = path.rsplit_once('/')?;
    if name.is_empty() {
        return None;
    }
    Some(if above.is_empty() { "/".into() } else { above.into() })
}

fn below(path: &str, above: &str) -> bool {
    above == "/" || path == above || path.starts_with(&format!("{above}/"))
}

fn access(node: &Node, who: u16) -> (bool, bool) {
    let (owner, others) = node.permissions.split_first().unwrap();
    if who == 0 || owner.1.0 == Some(who) {
        return (true, true);
    }
    let letter = others.iter().find(|entry| entry.1.0 == Some(who)).unwrap_or(owner).1.1;
    (matches!(letter, 'r' | 'b'), matches!(letter, 'w' | 'b'))
}

struct Told {
    path: String,
    exact: bool,
    readers: Vec<Node>,
}

/// Does an operation; the reply, and what is to be told.
fn act(tree: &mut Tree, alive: &BTreeSet<u16>, who: u16, op: &Op, told: &mut Vec<Told>) -> Reply {
    let path = match op {
        Op::Read(path)
        | Op::Directory(path)
        | Op::GetPerms(path)
        | Op::Write(path, _)
        | Op::Mkdir(path)
        | Op::Rm(path)
        | Op::SetPerms(path, _) => path.clone(),
    };
    let reading = matches!(op, Op::Read(_) | Op::Directory(_) | Op::GetPerms(_));
    if let Op::SetPerms(_, list) = op
        && !alive.contains(&list[0].1)
    {
        return Err("ENOENT".into());
    }
    // The nearest node that exists decides what one may know.
    let mut nearest = path.clone();
    while !tree.contains_key(&nearest) {
        nearest = parent(&nearest).unwrap();
    }
    let may = access(&tree[&nearest], who);
    if !(if reading { may.0 } else { may.1 }) {
        return Err("EACCES".into());
    }
    let exists = nearest == path;
    let ok = Ok(b"OK\0".to_vec());
    let readers = |tree: &Tree, path: &str| -> Vec<Node> {
        [Some(path.to_string()), parent(path)].into_iter().flatten().map(|path| tree[&path].clone()).collect()
    };
    match op {
        Op::Read(_) if exists => Ok(tree[&path].value.clone()),
        Op::Directory(_) if exists => {
            let children = tree.keys().filter(|other| parent(other).as_ref() == Some(&path));
            Ok(children
                .flat_map(|child| [child.rsplit_once('/').unwrap().1.as_bytes(), b"\0"].concat())
                .collect())
        }
        Op::GetPerms(_) if exists => {
            let list =
                tree[&path].permissions.iter().map(|(domain, (_, letter))| format!("{letter}{domain}\0"));
            Ok(list.collect::<String>().into_bytes())
        }
        Op::Read(_) | Op::Directory(_) | Op::GetPerms(_) => Err("ENOENT".into()),
        Op::Mkdir(_) if exists => ok,
        Op::Write(..) | Op::Mkdir(_) => {
            let mut missing = Vec::new();
            let mut at = path.clone();
            while !tree.contains_key(&at) {
                missing.push(at.clone());
                at = parent(&at).unwrap();
            }
            for path in missing.into_iter().rev() {
                let mut permissions = tree[&parent(&path).unwrap()].permissions.clone();
                if who != 0 {
                    permissions[0] = (who, (Some(who), permissions[0].1.1));
                }
                tree.insert(path, Node { value: Vec::new(), permissions });
            }
            if let Op::Write(_, value) = op {
                tree.get_mut(&path).unwrap().value = value.clone();
            }
            told.push(Told { exact: false, readers: readers(tree, &path), path });
            ok
        }
        Op::Rm(_) if !exists => {
            if parent(&path) == Some(nearest) {
                ok
            } else {
                Err("ENOENT".into())
            }
        }
        Op::Rm(_) if path == "/" => Err("EINVAL".into()),
        Op::Rm(_) => {
            let gone: Vec<String> = tree.keys().filter(|other| below(other, &path)).cloned().collect();
            for gone in &gone {
                told.push(Told { path: gone.clone(), exact: *gone != path, readers: readers(tree, gone) });
            }
            gone.iter().for_each(|gone| drop(tree.remove(gone)));
            ok
        }
        Op::SetPerms(..) if !exists => Err("ENOENT".into()),
        Op::SetPerms(_, list) => {
            let before = tree[&path].clone();
            let owner = before.permissions[0].1.0;
            if who != 0 && owner != Some(who) {
                return Err("EACCES".into());
            }
            if who != 0 && list[0].1 != who {
                return Err("EPERM".into());
            }
            if path == "/" && list[0].1 != 0 {
                return Err("EINVAL".into());
            }
            let named = |&(letter, domain): &(char, u16)| {
                (domain, (alive.contains(&domain).then_some(domain), letter))
            };
            tree.get_mut(&path).unwrap().permissions = list.iter().map(named).collect();
            let mut readers = readers(tree, &path);
            readers.push(before);
            told.push(Told { path, exact: false, readers });
            ok
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// Who, in which of its transactions (0: none), what.
    Do(u16, usize, Op),
    Start(u16, usize),
    End(u16, usize, bool),
    Watch(u16, String, u32, bool),
    Unwatch(u16, String),
    /// A domain dies, and another one of its number is born.
    Rebirth(u16),
}

fn paths() -> impl Strategy<Value = String> {
    let root = prop::sample::select(vec![
        "",
        "/local/domain/1",
        "/local/domain/2",
        "/local/domain/1/data",
        "/local/domain/2/data",
    ]);
    let rest = prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 0..4);
    (root, rest).prop_map(|(root, rest)| {
        let path = rest.iter().fold(root.to_string(), |path, name| format!("{path}/{name}"));
        if path.is_empty() { "/".into() } else { path }
    })
}

fn ops() -> impl Strategy<Value = Op> {
    let list = prop::collection::vec((prop::sample::select(vec!['n', 'r', 'w', 'b']), 0u16..4), 1..4);
    prop_oneof![
        2 => paths().prop_map(Op::Read),
        1 => paths().prop_map(Op::Directory),
        1 => paths().prop_map(Op::GetPerms),
        6 => (paths(), prop::collection::vec(any::<u8>(), 0..3)).prop_map(|(path, value)| Op::Write(path, value)),
        2 => paths().prop_map(Op::Mkdir),
        2 => paths().prop_map(Op::Rm),
        3 => (paths(), list).prop_map(|(path, list)| Op::SetPerms(path, list)),
    ]
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (0u16..3, 0usize..3, ops()).prop_map(|(who, slot, op)| Step::Do(who, slot, op)),
        2 => (0u16..3, 1usize..3).prop_map(|(who, slot)| Step::Start(who, slot)),
        3 => (0u16..3, 1usize..3, prop::bool::weighted(0.8)).prop_map(|(who, slot, keep)| Step::End(who, slot, keep)),
        2 => (0u16..3, paths(), 0u32..4, any::<bool>()).prop_map(|(who, path, depth, deep)| Step::Watch(who, path, depth, deep)),
        1 => (0u16..3, paths()).prop_map(|(who, path)| Step::Unwatch(who, path)),
        1 => (1u16..3).prop_map(Step::Rebirth),
    ]
}

struct Copy {
    id: u32,
    tree: Tree,
    done: Vec<(Op, Reply)>,
    /// Others have changed something since it began.
    disturbed: bool,
}

struct Model {
    tree: Tree,
    alive: BTreeSet<u16>,
    watches: BTreeMap<(u16, String), Option<u32>>,
    copies: BTreeMap<(u16, usize), Copy>,
}

fn wire(op: &Op) -> (MessageType, Vec<u8>) {
    use MessageType as M;
    let one = |path: &str| format!("{path}\0").into_bytes();
    match op {
        Op::Read(path) => (M::Read, one(path)),
        Op::Directory(path) => (M::Directory, one(path)),
        Op::GetPerms(path) => (M::GetPerms, one(path)),
        Op::Write(path, value) => (M::Write, [one(path), value.clone()].concat()),
        Op::Mkdir(path) => (M::Mkdir, one(path)),
        Op::Rm(path) => (M::Rm, one(path)),
        Op::SetPerms(path, list) => {
            let list: String = list.iter().map(|(letter, domain)| format!("{letter}{domain}\0")).collect();
            (M::SetPerms, [one(path), list.into_bytes()].concat())
        }
    }
}

impl Model {
    /// Who hears what, each once.
    fn heard(&self, told: &[Told]) -> BTreeSet<(u16, String, String)> {
        let mut heard = BTreeSet::new();
        for told in told {
            for ((who, path), depth) in &self.watches {
                let names = |path: &str| path.split('/').filter(|name| !name.is_empty()).count();
                let fits = if told.exact { *path == told.path } else { below(&told.path, path) }
                    && depth.is_none_or(|depth| names(&told.path) - names(path) <= depth as usize);
                if fits && told.readers.iter().any(|node| access(node, *who).0) {
                    heard.insert((*who, told.path.clone(), path.clone()));
                }
            }
        }
        heard
    }
}

fn client(harness: &Harness, who: u16) -> ClientId {
    if who == 0 { harness.control } else { ClientId::of(DomId::new(who)) }
}

fn run(steps: Vec<Step>) {
    let mut harness = Harness::new();
    let mut model =
        Model { tree: Tree::new(), alive: [0].into(), watches: BTreeMap::new(), copies: BTreeMap::new() };
    let top = |list: Vec<(u16, Entry)>| Node { value: Vec::new(), permissions: list };
    let nobody = || top(vec![(0, (Some(0), 'n'))]);
    for path in ["/", "/tool", "/tool/xenstored"] {
        model.tree.insert(path.into(), nobody());
    }
    let birth = |harness: &mut Harness, model: &mut Model, who: u16| {
        harness.add(who);
        model.alive.insert(who);
        let mut told = Vec::new();
        let home = format!("/local/domain/{who}");
        for op in [
            Op::Mkdir(home.clone()),
            Op::SetPerms(home.clone(), vec![('n', 0), ('r', who)]),
            Op::Mkdir(format!("{home}/data")),
            Op::SetPerms(format!("{home}/data"), vec![('n', who)]),
        ] {
            act(&mut model.tree, &model.alive, 0, &op, &mut told).unwrap();
        }
    };
    birth(&mut harness, &mut model, 1);
    birth(&mut harness, &mut model, 2);
    for step in steps {
        (0..3).for_each(|who| drop(harness.take_events(client(&harness, who))));
        let mut told = Vec::new();
        let mut changed_by = None;
        match step {
            Step::Do(who, slot, op) => {
                let (kind, payload) = wire(&op);
                let Model { tree, alive, copies, .. } = &mut model;
                if let Some(copy) = copies.get_mut(&(who, slot)) {
                    let expected = act(&mut copy.tree, alive, who, &op, &mut Vec::new());
                    let got = harness.ask(client(&harness, who), kind, copy.id, &payload);
                    assert_eq!(got, expected, "{who} in a transaction: {op:?}");
                    copy.done.push((op, got));
                } else {
                    let expected = act(tree, alive, who, &op, &mut told);
                    let got = harness.ask(client(&harness, who), kind, 0, &payload);
                    assert_eq!(got, expected, "{who}: {op:?}");
                    changed_by = (!told.is_empty()).then_some((who, 0));
                }
            }
            Step::Start(who, slot) => {
                if !model.copies.contains_key(&(who, slot)) {
                    let id = harness.start(client(&harness, who));
                    let copy = Copy { id, tree: model.tree.clone(), done: Vec::new(), disturbed: false };
                    model.copies.insert((who, slot), copy);
                }
            }
            Step::End(who, slot, keep) => {
                let Some(copy) = model.copies.remove(&(who, slot)) else { continue };
                let got = harness.end(client(&harness, who), copy.id, keep);
                if got == Err("EAGAIN".into()) {
                    assert!(keep && copy.disturbed, "a conflict with nothing: {:?}", copy.done);
                } else {
                    assert_eq!(got, Ok(b"OK\0".to_vec()));
                    if keep {
                        // All of it, done now, gives the same answers: what was committed is serial.
                        for (op, reply) in &copy.done {
                            let again = act(&mut model.tree, &model.alive, who, op, &mut told);
                            assert_eq!(
                                again, *reply,
                                "{who} would see something else: {op:?} of {:?}",
                                copy.done
                            );
                        }
                        if !copy.disturbed {
                            assert_eq!(model.tree, copy.tree);
                        }
                        changed_by = (!told.is_empty()).then_some((who, slot));
                    }
                }
            }
            Step::Watch(who, path, depth, deep) => {
                let depth = (!deep).then_some(depth);
                let mut payload = format!("{path}\0{path}\0");
                if let Some(depth) = depth {
                    payload += &format!("{depth}\0");
                }
                let got = harness.text(client(&harness, who), MessageType::Watch, &payload);
                if model.watches.contains_key(&(who, path.clone())) {
                    assert_eq!(got, Err("EEXIST".into()));
                } else {
                    assert_eq!(got, Ok("OK".into()));
                    assert_eq!(harness.take_events(client(&harness, who)), [(path.clone(), path.clone())]);
                    model.watches.insert((who, path), depth);
                }
                continue;
            }
            Step::Unwatch(who, path) => {
                let got =
                    harness.text(client(&harness, who), MessageType::Unwatch, &format!("{path}\0{path}\0"));
                let known = model.watches.remove(&(who, path)).is_some();
                assert_eq!(got.is_ok(), known);
                continue;
            }
            Step::Rebirth(who) => {
                harness.store.remove_domain(DomId::new(who), 0);
                model.alive.remove(&who);
                model.watches.retain(|(owner, _), _| *owner != who);
                model.copies.retain(|(owner, _), _| *owner != who);
                let owned: Vec<String> = model
                    .tree
                    .iter()
                    .filter(|(_, node)| node.permissions[0].1.0 == Some(who))
                    .map(|(path, _)| path.clone())
                    .collect();
                for path in owned {
                    let _ = act(&mut model.tree, &model.alive, 0, &Op::Rm(path), &mut told);
                }
                // Who named it meant the one that is gone.
                let lists = model
                    .tree
                    .values_mut()
                    .chain(model.copies.values_mut().flat_map(|copy| copy.tree.values_mut()));
                for node in lists {
                    node.permissions
                        .iter_mut()
                        .filter(|entry| entry.1.0 == Some(who))
                        .for_each(|entry| entry.1.0 = None);
                }
                assert_eq!(harness.store.check(), None);
                for watcher in 0..3 {
                    let got: BTreeSet<_> =
                        harness.take_events(client(&harness, watcher)).into_iter().collect();
                    let heard = model.heard(&told).into_iter().filter(|event| event.0 == watcher);
                    assert_eq!(got, heard.map(|(_, path, token)| (path, token)).collect(), "to {watcher}");
                }
                told.clear();
                birth(&mut harness, &mut model, who);
                (0..3).for_each(|who| drop(harness.take_events(client(&harness, who))));
                model.copies.values_mut().for_each(|copy| copy.disturbed = true);
            }
        }
        if let Some(by) = changed_by {
            model
                .copies
                .iter_mut()
                .filter(|(key, _)| **key != by)
                .for_each(|(_, copy)| copy.disturbed = true);
        }
        let expected = model.heard(&told);
        for who in 0..3 {
            let list = harness.take_events(client(&harness, who));
            let got: BTreeSet<_> = list.iter().cloned().collect();
            assert_eq!(got.len(), list.len(), "an event that says nothing new");
            let heard = expected.iter().filter(|event| event.0 == who);
            assert_eq!(
                got,
                heard.map(|(_, path, token)| (path.clone(), token.clone())).collect(),
                "to {who}"
            );
        }
    }
    assert_eq!(harness.store.check(), None);
    // The whole tree, read through the front door.
    let control = harness.control;
    for (path, node) in &model.tree {
        assert_eq!(
            harness.ask(control, MessageType::Read, 0, format!("{path}\0").as_bytes()),
            Ok(node.value.clone())
        );
    }
    let nodes: u32 =
        (0..3).filter_map(|who| harness.store.usage(DomId::new(who))).map(|usage| usage.nodes).sum();
    assert_eq!(nodes as usize, model.tree.len());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn it_does_what_a_map_of_paths_does(steps in prop::collection::vec(steps(), 1..60)) {
        run(steps);
    }
}
