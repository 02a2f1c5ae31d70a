//! Messages made by hand, good and bad, and what has to come back (docs/misc/xenstore.txt of Xen 4.17).
#![allow(clippy::octal_escapes, reason = "a zero byte and a digit are meant")]

mod harness;

use harness::Harness;
use hypercall_abi::DomId;
use hypercall_abi::io::xenstore::{MessageHeader, MessageType as M};
use proptest::prelude::*;
use xenstore::{Action, ClientId, NewNode, Path, Permission, Quota};

fn event(path: &str, token: &str) -> (String, String) {
    (path.into(), token.into())
}

#[test]
fn values_and_lists() {
    let mut h = Harness::new();
    let guest = h.add(5);
    assert_eq!(h.ask(guest, M::Write, 0, b"data/x/y\0one\0two"), Ok(b"OK\0".to_vec()));
    assert_eq!(h.ask(guest, M::Read, 0, b"data/x/y\0"), Ok(b"one\0two".to_vec()));
    assert_eq!(h.text(guest, M::Read, "/local/domain/5/data/x/y\0"), Ok("one two".into()));
    assert_eq!(h.text(guest, M::Read, "data/x\0"), Ok(String::new()));
    assert_eq!(h.text(guest, M::Write, "data/x/a\0"), Ok("OK".into()));
    assert_eq!(h.ask(guest, M::Directory, 0, b"data/x\0"), Ok(b"a\0y\0".to_vec()));
    assert_eq!(h.ask(guest, M::Directory, 0, b"data/x/a\0"), Ok(Vec::new()));
    assert_eq!(h.text(guest, M::GetPerms, "data/x\0"), Ok("n5".into()));
    assert_eq!(h.text(guest, M::GetDomainPath, "005\0"), Ok("/local/domain/5".into()));
    assert_eq!(h.text(guest, M::Mkdir, "data/x/y\0"), Ok("OK".into()));
    assert_eq!(h.text(guest, M::Read, "data/x/y\0"), Ok("one two".into()), "it was there and is left alone");
    assert_eq!(h.text(guest, M::Rm, "data/x\0"), Ok("OK".into()));
    assert_eq!(h.text(guest, M::Read, "data/x/y\0"), Err("ENOENT".into()));
    assert_eq!(h.text(guest, M::Rm, "data/x\0"), Ok("OK".into()), "gone is gone");
    assert_eq!(h.text(guest, M::Rm, "data/x/y\0"), Err("ENOENT".into()), "its parent is not there");
    let control = h.control;
    assert_eq!(h.text(control, M::Rm, "/\0"), Err("EINVAL".into()));
    assert_eq!(h.text(control, M::Directory, "/\0"), Ok("local tool".into()));
}

#[test]
fn payloads_that_cannot_be() {
    let mut h = Harness::new();
    let guest = h.add(5);
    h.text(guest, M::Write, "data/x\0keep").unwrap();
    let control = h.control;
    for (kind, payload) in [
        (M::Read, &b""[..]),
        (M::Read, b"data/x"),
        (M::Read, b"data/x\0\0"),
        (M::Read, b"data/x\0more\0"),
        (M::Read, b"\0"),
        (M::Read, b"/\xff\0"),
        (M::Read, b"data//x\0"),
        (M::Read, b"data/x/\0"),
        (M::Read, b"@releaseDomain\0"),
        (M::Directory, b"data"),
        (M::DirectoryPart, b"data\0"),
        (M::DirectoryPart, b"data\00"),
        (M::DirectoryPart, b"data\00\00\0"),
        (M::Write, b"data/x"),
        (M::Write, b""),
        (M::Write, b"data/ \0v"),
        (M::Mkdir, b"data/y"),
        (M::Rm, b"data/x\0\0"),
        (M::GetPerms, b"data/x"),
        (M::SetPerms, b"data/x\0"),
        (M::SetPerms, b"data/x\0n5"),
        (M::SetPerms, b"data/x\0q5\0"),
        (M::SetPerms, b"data/x\0n5\0r\0"),
        (M::SetPerms, b"@other\0n5\0"),
        (M::Watch, b"data\0"),
        (M::Watch, b"data\0token"),
        (M::Watch, b"data\0token\0x\0"),
        (M::Watch, b"data//x\0token\0"),
        (M::Watch, b"data\0token\01\01\0"),
        (M::Unwatch, b"data\0"),
        (M::Unwatch, b"data\0token\0more\0"),
        (M::TransactionEnd, b"T"),
        (M::TransactionEnd, b"X\0"),
        (M::TransactionEnd, b""),
        (M::GetDomainPath, b"5"),
        (M::GetDomainPath, b"x\0"),
        (M::GetDomainPath, b"65536\0"),
    ] {
        assert_eq!(h.ask(guest, kind, 0, payload), Err("EINVAL".into()), "{kind:?} {payload:?}");
    }
    for (kind, payload) in [
        (M::Introduce, &b"5\00\0"[..]),
        (M::Introduce, b"5\00\00\0"),
        (M::Introduce, b"0\00\03\0"),
        (M::Introduce, b"32752\00\03\0"),
        (M::Release, b"0\0"),
        (M::Release, b""),
        (M::Resume, b"0\0"),
        (M::SetTarget, b"5\0"),
        (M::IsDomainIntroduced, b"x\0"),
        (M::Control, b"quota\0set\0nodes\0"),
        (M::Control, b"quota\0set\0nodes\0x\0"),
        (M::Control, b"live-update\0"),
        (M::Control, b""),
    ] {
        assert_eq!(h.ask(control, kind, 0, payload), Err("EINVAL".into()), "{kind:?} {payload:?}");
    }
    for number in [M::WatchEvent.number(), M::Error.number(), 20, 23, 0xffff, u32::MAX] {
        assert_eq!(h.ask_number(guest, number, 0, b"data\0"), Err("ENOSYS".into()), "{number}");
    }
    assert_eq!(h.text(guest, M::Read, "data/x\0"), Ok("keep".into()));
    assert_eq!(h.store.usage(DomId::new(5)).unwrap().watches, 0);
    assert_eq!(h.store.check(), None);
}

#[test]
fn what_is_the_control_domains() {
    let mut h = Harness::new();
    let guest = h.add(5);
    for kind in [M::Control, M::Introduce, M::Release, M::IsDomainIntroduced, M::Resume, M::SetTarget] {
        assert_eq!(h.text(guest, kind, "5\05\05\0"), Err("EACCES".into()), "{kind:?}");
    }
    let control = h.control;
    assert_eq!(h.text(control, M::IsDomainIntroduced, "5\0"), Ok("T".into()));
    assert_eq!(h.text(control, M::IsDomainIntroduced, "6\0"), Ok("F".into()));
    assert_eq!(h.text(control, M::IsDomainIntroduced, "32752\0"), Ok("T".into()));
    assert_eq!(h.text(control, M::Control, "check\0"), Ok("OK".into()));
    assert_eq!(h.text(control, M::Control, "quota\0set\0nodes\02\0"), Ok("OK".into()));
    h.text(guest, M::Mkdir, "data/one\0").unwrap();
    assert_eq!(h.text(guest, M::Mkdir, "data/two\0"), Err("ENOSPC".into()));
    // An introduction is done by whoever has the rings.
    let header = MessageHeader { kind: M::Introduce.number(), req_id: 77, tx_id: 0, len: 0 };
    let action = h.store.request(control, header, b"9\01234\07\0", 0);
    let domain = DomId::new(9);
    assert_eq!(action, Some(Action::Introduce { client: control, header, domain, port: 7 }));
    assert!(!h.store.has_output(control));
    h.store.answer(control, header, Ok(b"OK\0".to_vec()));
    assert_eq!(h.drain(control)[0].1, b"OK\0");
    let action = h.store.request(control, MessageHeader { kind: M::Release.number(), ..header }, b"5\0", 0);
    assert_eq!(action, Some(Action::Release { domain: DomId::new(5) }));
    h.drain(control);
    assert_eq!(h.text(control, M::IsDomainIntroduced, "5\0"), Ok("F".into()));
}

/// Of what Xen's xenstored answers, lines that tools look at are the same.
#[test]
fn what_the_store_tells_of_itself() {
    let mut h = Harness::new();
    let (guest, control) = (h.add(5), h.control);
    h.text(guest, M::Watch, "data\0token\0").unwrap();
    h.start(guest);
    let settings = h.text(control, M::Control, "quota\0").unwrap();
    assert!(settings.starts_with("Quota settings:\nnodes            :     1000 "), "{settings}");
    for line in
        ["transaction-nodes:     1024 ", "memory           :  2621440 ", "node-size        :     2048 "]
    {
        assert!(settings.contains(&format!("\n{line}")), "{settings}");
    }
    let usage = h.text(control, M::Control, "quota\05\0").unwrap();
    let lines: Vec<&str> = usage.lines().collect();
    assert_eq!(
        lines[..5],
        [
            "Domain 5:",
            "nodes           :        1",
            "watches         :        1",
            "transactions    :        1",
            "outstanding     :        0"
        ]
    );
    assert!(lines.len() == 6 && lines[5].starts_with("memory          : "), "{usage}");
    assert_eq!(h.text(control, M::Control, "quota\09\0"), Err("ENOENT".into()));
    for name in
        ["nodes", "watches", "transactions", "outstanding", "transaction-nodes", "node-size", "permissions"]
    {
        assert_eq!(h.text(control, M::Control, &format!("quota\0set\0{name}\077\0")), Ok("OK".into()));
        let told = h.text(control, M::Control, "quota\0").unwrap();
        assert!(told.contains(&format!("\n{name:<17}:       77 ")), "{told}");
    }
    assert_eq!(h.text(control, M::Control, "help\0").unwrap().lines().next(), Some("check\t"));
    assert_eq!(h.text(control, M::Control, "print\0x\0"), Ok("OK".into()));
    for wrong in [
        "quota\0set\0nodes\00\0",
        "quota\0set\0nodes\0-1\0",
        "quota\0set\0size\05\0",
        "quota\0set\0nodes\0",
        "quota\0set\0nodes\05\06\0",
        "check\0now\0",
        "help\0me\0",
        "print\0",
        "log\0on\0",
        "memreport\0",
        "quota-soft\0",
        "Check\0",
        "check",
    ] {
        assert_eq!(h.text(control, M::Control, wrong), Err("EINVAL".into()), "{wrong:?}");
    }
}

/// For the store a domain that is released has ended: what was its own goes, and what was said about it counts no more.
#[test]
fn a_domain_that_is_released_begins_anew() {
    let mut h = Harness::new();
    let (one, two, control) = (h.add(1), h.add(2), h.control);
    h.text(control, M::Watch, "@releaseDomain\0out\0").unwrap();
    h.take_events(control);
    h.text(one, M::Write, "data/x\0mine").unwrap();
    h.text(two, M::Write, "data/y\0shared").unwrap();
    h.text(two, M::SetPerms, "data/y\0n2\0r1\0").unwrap();
    assert_eq!(h.text(one, M::Read, "/local/domain/2/data/y\0"), Ok("shared".into()));
    let header = MessageHeader { kind: M::Release.number(), ..MessageHeader::default() };
    assert_eq!(h.store.request(control, header, b"1\0", 0), Some(Action::Release { domain: DomId::new(1) }));
    h.drain(control);
    assert_eq!(h.take_events(control), [event("@releaseDomain", "out")]);
    assert_eq!(h.text(control, M::Read, "/local/domain/1/data/x\0"), Err("ENOENT".into()));
    assert_eq!(h.text(control, M::Directory, "/local/domain/1\0"), Ok(String::new()), "not its own");
    let again = h.store.request(control, header, b"1\0", 0);
    assert_eq!((again, h.drain(control)[0].1.as_slice()), (None, &b"ENOENT\0"[..]));
    // It exists: who names it means what it is from here on.
    h.text(two, M::Write, "data/z\0new").unwrap();
    h.text(two, M::SetPerms, "data/z\0n2\0r1\0").unwrap();
    h.store.introduced(DomId::new(1), 0).unwrap();
    assert_eq!(h.text(one, M::Read, "/local/domain/2/data/y\0"), Err("EACCES".into()));
    assert_eq!(h.text(one, M::Read, "/local/domain/2/data/z\0"), Ok("new".into()));
    h.store.remove_domain(DomId::new(1), 0);
    assert_eq!(h.take_events(control), [event("@releaseDomain", "out")]);
    assert_eq!(h.store.check(), None);
}

/// All nodes below a path: with value and permissions.
fn tree_at(h: &mut Harness, path: &str) -> Vec<(String, String, String)> {
    let control = h.control;
    let mut all = vec![(
        path.to_string(),
        h.text(control, M::Read, &format!("{path}\0")).unwrap(),
        h.text(control, M::GetPerms, &format!("{path}\0")).unwrap(),
    )];
    let children = h.text(control, M::Directory, &format!("{path}\0")).unwrap();
    for child in children.split_whitespace() {
        all.extend(tree_at(h, &format!("{path}/{child}")));
    }
    all
}

/// Making many nodes at once, which goes the way to them only once when nobody watches, is as making one after the other.
#[test]
fn nodes_that_are_made_at_once_are_as_others() {
    let domain = DomId::new(7);
    let list = |text: &str| -> Vec<Permission> {
        text.split(',').map(|entry| Permission::parse(entry.as_bytes()).unwrap()).collect()
    };
    let (readable, own, other) = (list("n0,r7"), list("n7"), list("r8,b7"));
    let node =
        |below, value: &'static str, permissions| NewNode { below, value: value.as_bytes(), permissions };
    let first = [
        node("", "", Some(&readable[..])),
        node("name", "x", None),
        node("a/b/c", "deep", Some(&own)),
        node("a/b/d", "", None),
        node("a/b", "", Some(&own)),
        node("data", "", Some(&own)),
        node("data/sub", "inherits", None),
        node("data/theirs", "", Some(&other)),
    ];
    let second = [
        node("name", "longer", None),
        node("name", "", None),
        node("a/b", "value", Some(&readable[..])),
        node("data", "", Some(&other)),
        node("", "top", Some(&own)),
    ];
    let at = |slowly: bool| {
        let mut h = Harness::new();
        h.store.add_domain(domain, 0);
        h.store.add_domain(DomId::new(8), 0);
        let control = h.control;
        if slowly {
            h.text(control, M::Watch, "/x/y/z\0token\0").unwrap();
        }
        let top = Path::absolute("/x/y").unwrap();
        let mut found = Vec::new();
        for nodes in [&first[..], &second[..], &first[..]] {
            h.store.plant(&top, nodes, 0).unwrap();
            assert_eq!(h.store.check(), None);
            let usage = [0, 7, 8].map(|number| h.store.usage(DomId::new(number)).unwrap());
            found.push((tree_at(&mut h, "/x"), usage.map(|usage| (usage.nodes, usage.memory))));
        }
        let wrong = [node("new", "", None), node("name", "y", Some(&[]))];
        assert!(h.store.plant(&top, &wrong, 0).is_err());
        found.push((tree_at(&mut h, "/x"), Default::default()));
        h.store.remove_domain(domain, 0);
        assert_eq!(h.store.check(), None);
        found.push((tree_at(&mut h, "/x"), Default::default()));
        found
    };
    let (quick, slow) = (at(false), at(true));
    assert!(quick[0].0.len() > 8 && quick[0].1[1].0 > 0 && quick[3].0 == quick[2].0, "{quick:?}");
    assert_eq!(quick, slow);
}

#[test]
fn a_helper_has_no_rights_on_the_next_domain_of_its_targets_number() {
    let mut h = Harness::new();
    let (_, two, control) = (h.add(1), h.add(2), h.control);
    h.text(control, M::SetTarget, "2\01\0").unwrap();
    assert_eq!(h.text(two, M::Write, "/local/domain/1/data/x\0y"), Ok("OK".into()));
    h.store.remove_domain(DomId::new(1), 0);
    h.add(1);
    assert_eq!(h.text(two, M::Write, "/local/domain/1/data/x\0y"), Err("EACCES".into()));
    h.text(control, M::SetTarget, "2\01\0").unwrap();
    assert_eq!(h.text(two, M::Write, "/local/domain/1/data/x\0y"), Ok("OK".into()));
}

#[test]
fn permissions_hide_and_protect() {
    let mut h = Harness::new();
    let (one, two) = (h.add(1), h.add(2));
    h.text(one, M::Write, "data/secret\0x").unwrap();
    assert_eq!(h.text(two, M::Read, "/local/domain/1/data/secret\0"), Err("EACCES".into()));
    assert_eq!(
        h.text(two, M::Read, "/local/domain/1/data/nothing\0"),
        Err("EACCES".into()),
        "it may not know"
    );
    assert_eq!(h.text(two, M::Write, "/local/domain/1/data/new\0x"), Err("EACCES".into()));
    assert_eq!(h.text(one, M::Write, "name\0x"), Err("EACCES".into()), "its home is not its own");
    assert_eq!(h.text(one, M::SetPerms, "data/secret\0n1\0r2\0"), Ok("OK".into()));
    assert_eq!(h.text(two, M::Read, "/local/domain/1/data/secret\0"), Ok("x".into()));
    assert_eq!(h.text(two, M::SetPerms, "/local/domain/1/data/secret\0n1\0b2\0"), Err("EACCES".into()));
    assert_eq!(h.text(one, M::SetPerms, "data/secret\0n2\0"), Err("EPERM".into()));
    assert_eq!(h.text(one, M::SetPerms, "data/secret\0n9\0"), Err("ENOENT".into()));
    assert_eq!(h.text(one, M::SetPerms, "data/secret\0n1\0r2\0r2\0r2\0r2\0r2\0"), Err("ENOSPC".into()));
    assert_eq!(h.text(one, M::SetPerms, "@releaseDomain\0n1\0"), Err("EACCES".into()));
    // A helper acts for its target.
    let control = h.control;
    h.text(control, M::SetTarget, "2\01\0").unwrap();
    assert_eq!(h.text(two, M::Write, "/local/domain/1/data/new\0x"), Ok("OK".into()));
    assert_eq!(h.text(control, M::SetTarget, "2\09\0"), Err("ENOENT".into()));
    // Rights named a domain, not a number.
    h.add(2);
    assert_eq!(h.text(two, M::Read, "/local/domain/1/data/secret\0"), Err("EACCES".into()));
}

#[test]
fn transactions_that_conflict_and_that_do_not() {
    let mut h = Harness::new();
    let (one, two, control) = (h.add(1), h.add(2), h.control);
    h.text(control, M::SetPerms, "/local/domain/1/data\0b1\0").unwrap();
    let shared = "/local/domain/1/data";
    let (a, b) = (h.start(one), h.start(two));
    assert_eq!(h.ask(one, M::TransactionStart, a, b"\0"), Err("EBUSY".into()));
    assert_eq!(h.ask(two, M::Read, a + 7, b"data\0"), Err("ENOENT".into()));
    // Each makes a child of the same node.
    h.ask(one, M::Write, a, b"data/a\0one").unwrap();
    h.ask(two, M::Write, b, format!("{shared}/b\0two").as_bytes()).unwrap();
    assert_eq!(h.text(one, M::Read, "data/a\0"), Err("ENOENT".into()), "nobody sees it yet");
    assert_eq!(h.ask(one, M::Read, a, b"data/a\0"), Ok(b"one".to_vec()));
    assert!(h.end(one, a, true).is_ok() && h.end(two, b, true).is_ok());
    assert_eq!(h.text(one, M::Directory, "data\0"), Ok("a b".into()));
    assert_eq!(h.end(one, a, true), Err("ENOENT".into()), "it has ended");
    // Who has listed the children has seen them.
    let a = h.start(one);
    h.ask(one, M::Directory, a, b"data\0").unwrap();
    h.text(two, M::Write, &format!("{shared}/c\0x")).unwrap();
    assert_eq!(h.ask(one, M::Directory, a, b"data\0"), Ok(b"a\0b\0".to_vec()), "a snapshot does not move");
    assert_eq!(h.end(one, a, true), Err("EAGAIN".into()));
    // Written by both.
    let a = h.start(one);
    h.ask(one, M::Write, a, b"data/a\0mine").unwrap();
    h.text(one, M::Write, "data/a\0other").unwrap();
    assert_eq!(h.end(one, a, true), Err("EAGAIN".into()));
    assert_eq!(h.text(one, M::Read, "data/a\0"), Ok("other".into()));
    // Thrown away.
    let a = h.start(one);
    h.ask(one, M::Rm, a, b"data/a\0").unwrap();
    assert!(h.end(one, a, false).is_ok());
    assert_eq!(h.text(one, M::Read, "data/a\0"), Ok("other".into()));
    // Watches are told at the end, once for each path.
    h.text(one, M::Watch, "data\0w\0").unwrap();
    h.take_events(one);
    let a = h.start(one);
    for value in [b"data/a\0first", b"data/a\0again"] {
        h.ask(one, M::Write, a, value).unwrap();
    }
    assert_eq!(h.take_events(one), []);
    h.end(one, a, true).unwrap();
    assert_eq!(h.take_events(one), [event("data/a", "w")]);
    h.start(one);
    h.text(one, M::Mkdir, "data/d\0").unwrap();
    h.text(one, M::ResetWatches, "\0").unwrap();
    let usage = h.store.usage(DomId::new(1)).unwrap();
    assert_eq!((usage.watches, usage.transactions), (0, 0));
    h.take_events(one);
    h.text(one, M::Write, "data/a\0x").unwrap();
    assert_eq!(h.take_events(one), []);
    assert_eq!(h.store.check(), None);
}

#[test]
fn watches() {
    let mut h = Harness::new();
    let (one, two, control) = (h.add(1), h.add(2), h.control);
    h.text(one, M::Write, "data/a/b\0x").unwrap();
    assert_eq!(h.text(one, M::Watch, "data/a\0t\0"), Ok("OK".into()));
    assert_eq!(h.take_events(one), [event("data/a", "t")], "the first comes at once");
    assert_eq!(h.text(one, M::Watch, "data/a\0t\0"), Err("EEXIST".into()));
    h.text(one, M::Watch, "/local/domain/1/data\0abs\01\0").unwrap();
    h.text(two, M::Watch, "/local/domain/1/data\0spy\0").unwrap();
    h.take_events(one);
    h.take_events(two);
    h.text(one, M::Write, "data/a/b\0y").unwrap();
    // The other is too deep for the second watch.
    assert_eq!(h.take_events(one), [event("data/a/b", "t")]);
    assert_eq!(h.take_events(two), []);
    h.text(one, M::SetPerms, "data/a\0r1\0").unwrap();
    assert_eq!(h.take_events(two), [event("/local/domain/1/data/a", "spy")]);
    h.take_events(one);
    h.text(control, M::Rm, "/local/domain/1/data\0").unwrap();
    // What is below is told only to who watches it.
    assert_eq!(h.take_events(one), [event("data/a", "t"), event("/local/domain/1/data", "abs")]);
    assert_eq!(h.text(one, M::Unwatch, "data/a\0t\0"), Ok("OK".into()));
    assert_eq!(h.text(one, M::Unwatch, "data/a\0t\0"), Err("ENOENT".into()));
    assert_eq!(h.text(one, M::Unwatch, "/local/domain/1/data\0other\0"), Err("ENOENT".into()));
}

#[test]
fn domains_that_come_and_go() {
    let mut h = Harness::new();
    let (one, control) = (h.add(1), h.control);
    for (path, token) in [
        ("@introduceDomain", "in"),
        ("@releaseDomain", "out"),
        ("@releaseDomain", "who\01"),
        ("@releaseDomain/7", "seven"),
    ] {
        h.text(control, M::Watch, &format!("{path}\0{token}\0")).unwrap();
    }
    h.text(one, M::Watch, "@releaseDomain\0t\0").unwrap();
    h.take_events(control);
    h.take_events(one);
    h.add(7);
    assert_eq!(h.take_events(control), [event("@introduceDomain", "in")]);
    h.store.shut_down(DomId::new(7), 0);
    h.store.shut_down(DomId::new(7), 0);
    let out = || {
        vec![
            event("@releaseDomain", "out"),
            event("@releaseDomain/7", "who"),
            event("@releaseDomain/7", "seven"),
        ]
    };
    assert_eq!(h.take_events(control), out(), "told once");
    assert_eq!(h.take_events(one), [], "it may not know");
    h.text(control, M::Resume, "7\0").unwrap();
    h.store.shut_down(DomId::new(7), 0);
    assert_eq!(h.take_events(control), out());
    h.text(control, M::SetPerms, "@releaseDomain\0n0\0r1\0").unwrap();
    h.store.remove_domain(DomId::new(7), 0);
    assert_eq!(h.take_events(control), out());
    assert_eq!(h.take_events(one), [event("@releaseDomain", "t")]);
    assert_eq!(
        h.text(control, M::Directory, "/local/domain/7\0"),
        Ok(String::new()),
        "its own nodes are gone"
    );
    assert_eq!(h.store.check(), None);
    // Its client is gone with it.
    let header = MessageHeader { kind: M::Read.number(), ..MessageHeader::default() };
    assert_eq!(h.store.request(ClientId::of(DomId::new(7)), header, b"data\0", 0), None);
    assert!(!h.store.has_output(ClientId::of(DomId::new(7))));
}

#[test]
fn lists_longer_than_a_message() {
    let mut h = Harness::new();
    let (guest, control) = (h.add(5), h.control);
    for index in 0..900 {
        h.text(guest, M::Mkdir, &format!("data/child-{index:05}\0")).unwrap();
    }
    assert_eq!(h.text(guest, M::Directory, "data\0"), Err("E2BIG".into()));
    let mut list = Vec::new();
    let mut generation = None;
    loop {
        let part = h.ask(guest, M::DirectoryPart, 0, format!("data\0{}\0", list.len()).as_bytes()).unwrap();
        let end = part.iter().position(|&byte| byte == 0).unwrap();
        assert_eq!(*generation.get_or_insert(part[..end].to_vec()), part[..end]);
        list.extend_from_slice(&part[end + 1..]);
        // An empty name is the end.
        if list.ends_with(b"\0\0") {
            break;
        }
    }
    let names: Vec<_> = list.split(|&byte| byte == 0).filter(|name| !name.is_empty()).collect();
    assert_eq!(names.len(), 900);
    let past = h.ask(guest, M::DirectoryPart, 0, b"data\0999999\0").unwrap();
    assert!(past.ends_with(b"\0\0"));
    // Xen's store reads the offset as C does, and stops at the last zero byte.
    assert_eq!(h.ask(guest, M::DirectoryPart, 0, b"data\0-1\0").unwrap(), past);
    let whole = h.ask(guest, M::DirectoryPart, 0, b"data\00\0").unwrap();
    for same in [&b"data\0x\0"[..], b"data\0 0y\0", b"data\0\0", b"data\00\0rest"] {
        assert_eq!(h.ask(guest, M::DirectoryPart, 0, same).unwrap(), whole, "{same:?}");
    }
    h.text(guest, M::Rm, "data/child-00000\0").unwrap();
    let part = h.ask(guest, M::DirectoryPart, 0, b"data\00\0").unwrap();
    assert!(!part.starts_with(&[generation.unwrap(), vec![0]].concat()), "the list has changed");
    h.text(control, M::Rm, "/local/domain/5/data\0").unwrap();
    assert_eq!(h.store.usage(DomId::new(5)).unwrap().nodes, 0);
}

#[test]
fn every_quota_ends_something_and_harms_nobody_else() {
    let mut h = Harness::new();
    let (bad, good) = (h.add(1), h.add(2));
    let limit = |h: &mut Harness, quota: Quota| h.store.set_quota(Some(DomId::new(1)), quota);
    // Nodes: the parents that would be made count.
    limit(&mut h, Quota { nodes: 4, ..Quota::default() });
    assert_eq!(h.text(bad, M::Mkdir, "data/1/2/3/4\0"), Err("ENOSPC".into()));
    assert_eq!(h.text(bad, M::Mkdir, "data/1/2/3\0"), Ok("OK".into()));
    let id = h.start(bad);
    assert_eq!(h.ask(bad, M::Mkdir, id, b"data/x\0"), Err("ENOSPC".into()));
    h.ask(bad, M::Rm, id, b"data/1\0").unwrap();
    h.ask(bad, M::Mkdir, id, b"data/x/y/z\0").unwrap();
    h.text(bad, M::Rm, "data/1/2/3\0").unwrap();
    h.text(bad, M::Mkdir, "data/w\0").unwrap();
    assert_eq!(h.end(bad, id, true), Err("EAGAIN".into()));
    // Values.
    limit(&mut h, Quota::default());
    let value = |len: usize| [b"data/v\0".to_vec(), vec![b'x'; len]].concat();
    assert_eq!(h.ask(bad, M::Write, 0, &value(2049)), Err("ENOSPC".into()));
    assert!(h.ask(bad, M::Write, 0, &value(2048)).is_ok());
    // Watches and transactions.
    // One more than the limit says, as Xen's store grants.
    for index in 0..=128 {
        h.text(bad, M::Watch, &format!("data\0{index}\0")).unwrap();
    }
    assert_eq!(h.text(bad, M::Watch, "data\0more\0"), Err("E2BIG".into()));
    let open: Vec<u32> = (0..=10).map(|_| h.start(bad)).collect();
    assert_eq!(h.text(bad, M::TransactionStart, "\0"), Err("ENOSPC".into()));
    let looked = (0..2000).find(|index| {
        h.ask(bad, M::Read, open[0], format!("data/{index}\0").as_bytes()) == Err("ENOSPC".into())
    });
    assert!(looked.is_some_and(|count| (1020..=1024).contains(&count)), "{looked:?}");
    open.into_iter().for_each(|id| drop(h.end(bad, id, false)));
    // Memory as a whole.
    limit(&mut h, Quota { memory: 100_000, ..Quota::default() });
    let full = (0..1000).find(|index| {
        let path = format!("data/m{index}\0");
        h.ask(bad, M::Write, 0, &[path.into_bytes(), vec![0; 2000]].concat()) == Err("ENOMEM".into())
    });
    assert!(full.is_some_and(|count| (10..60).contains(&count)), "{full:?}");
    assert!(h.text(good, M::Write, "data/fine\0x").is_ok());
    h.store.remove_domain(DomId::new(1), 0);
    assert_eq!(h.store.check(), None);
}

#[test]
fn a_full_store_keeps_nothing_new_for_domains() {
    let mut h = Harness::new();
    let guest = h.add(1);
    let control = h.control;
    h.text(guest, M::Write, "data/a\0old").unwrap();
    let id = h.start(guest);
    h.store.set_full(true);
    for (kind, payload) in [
        (M::Write, "data/a\0new"),
        (M::Mkdir, "data/b\0"),
        (M::SetPerms, "data/a\0n1\0r2\0"),
        (M::Watch, "data\0token\0"),
        (M::TransactionStart, "\0"),
    ] {
        assert_eq!(h.text(guest, kind, payload), Err("ENOMEM".into()), "{kind:?}");
    }
    assert_eq!(h.ask(guest, M::Write, id, b"data/a\0new"), Err("ENOMEM".into()));
    // What is there can be read, and removed; and who rules writes on.
    assert_eq!(h.text(guest, M::Read, "data/a\0").unwrap(), "old");
    h.end(guest, id, false).unwrap();
    h.text(control, M::Write, "/local/domain/1/control/shutdown\0poweroff").unwrap();
    h.text(guest, M::Rm, "data/a\0").unwrap();
    h.store.set_full(false);
    h.text(guest, M::Write, "data/a\0new").unwrap();
    assert_eq!(h.text(guest, M::Read, "data/a\0").unwrap(), "new");
}

#[test]
fn who_takes_no_replies_is_not_heard() {
    let mut h = Harness::new();
    let (bad, good) = (h.add(1), h.add(2));
    let header = MessageHeader { kind: M::Read.number(), ..MessageHeader::default() };
    let mut asked = 0;
    while h.store.may_request(bad) {
        h.store.request(bad, header, b"data\0", 0);
        asked += 1;
    }
    assert_eq!(asked, 20);
    assert!(h.store.may_request(good));
    h.store.take_woken();
    assert!(h.store.next_output(bad).is_some());
    assert!(
        h.store.may_request(bad) && h.store.take_woken().contains(&bad),
        "and it is told when it may again"
    );
}

#[test]
fn events_that_nobody_takes_stop_who_causes_them_and_are_given_up() {
    let mut h = Harness::new();
    let (writer, sleeper) = (h.add(1), h.add(2));
    h.text(writer, M::SetPerms, "data\0r1\0").unwrap();
    h.text(sleeper, M::Watch, "/local/domain/1/data\0t\0").unwrap();
    h.take_events(sleeper);
    let write = |h: &mut Harness, index: u32| h.text(writer, M::Write, &format!("data/{index}\0x"));
    for _ in 0..100 {
        write(&mut h, 0).unwrap();
    }
    assert_eq!(h.store.usage(DomId::new(1)).unwrap().caused, 1, "what is told already is not told again");
    let mut index = 0;
    while h.store.may_request(writer) {
        index += 1;
        write(&mut h, index).unwrap();
    }
    assert_eq!(index, 19);
    h.now_ns = 10_000_000_000;
    assert_eq!(h.store.expire(h.now_ns), Some(20_000_000_000));
    assert!(!h.store.may_request(writer));
    h.store.take_woken();
    h.now_ns = 20_000_000_000;
    assert_eq!(h.store.expire(h.now_ns), None);
    assert!(h.store.may_request(writer) && h.store.take_woken().contains(&writer));
    assert_eq!(h.take_events(sleeper), []);
    // It is as before, for who takes them.
    write(&mut h, 3).unwrap();
    assert_eq!(h.take_events(sleeper), [event("/local/domain/1/data/3", "t")]);
    assert_eq!(h.store.usage(DomId::new(1)).unwrap().caused, 0);
}

#[test]
fn a_snapshot_is_not_kept_for_ever() {
    let mut h = Harness::new();
    let (bad, good) = (h.add(1), h.add(2));
    let old = h.start(bad);
    assert_eq!(h.ask(bad, M::Read, old, b"data\0"), Ok(Vec::new()));
    let mut young = 0;
    for round in 0..3000 {
        if round == 2950 {
            young = h.start(good);
            h.ask(good, M::Write, young, b"data/y\0x").unwrap();
        }
        h.text(bad, M::Write, &format!("data/x\0{round}")).unwrap();
    }
    assert_eq!(h.ask(bad, M::Read, old, b"data/x\0").map(|value| value.len()), Ok(4), "a newer one");
    assert_eq!(h.end(bad, old, true), Err("EAGAIN".into()));
    assert!(h.end(good, young, true).is_ok(), "those who hurry are not disturbed");
    assert_eq!(h.store.usage(DomId::new(1)).unwrap().transactions, 0);
}

#[test]
fn the_deepest_tree_can_be_removed_on_a_small_stack() {
    let small = std::thread::Builder::new().stack_size(256 << 10);
    let test = || {
        let mut h = Harness::new();
        let guest = h.add(1);
        let deep = "/a".repeat(60);
        h.text(guest, M::Write, &format!("data{deep}\0x")).unwrap();
        let id = h.start(guest);
        h.ask(guest, M::Rm, id, b"data/a\0").unwrap();
        h.text(guest, M::Rm, "data/a\0").unwrap();
        h.end(guest, id, true).unwrap_err();
        assert_eq!(h.text(guest, M::Mkdir, &format!("data{}\0", "/a".repeat(61))), Err("EINVAL".into()));
    };
    small.spawn(test).unwrap().join().unwrap();
}

proptest! {
    /// Whatever a guest sends, it gets one reply, and what is not its own stays as it is.
    #[test]
    fn nonsense_harms_nobody(
        requests in prop::collection::vec(
            (0u32..26, 0u32..4, prop::collection::vec(prop::sample::select(b"data/xyT09nrwb@ \0\0\0".to_vec()), 0..24), any::<bool>()),
            1..80,
        ),
    ) {
        let mut h = Harness::new();
        let (bad, good, control) = (h.add(1), h.add(2), h.control);
        h.text(good, M::Write, "data/mine\0kept").unwrap();
        for (kind, transaction, bytes, start) in requests {
            let payload = if start { [b"data/".to_vec(), bytes].concat() } else { bytes };
            let _ = h.ask_number(bad, kind, transaction, &payload);
        }
        prop_assert_eq!(h.text(good, M::Read, "data/mine\0"), Ok("kept".into()));
        prop_assert_eq!(h.text(control, M::Directory, "/local/domain\0"), Ok("1 2".into()));
        prop_assert_eq!(h.store.check(), None);
        h.store.remove_domain(DomId::new(1), 0);
        prop_assert_eq!(h.store.check(), None);
        prop_assert_eq!(h.text(control, M::Directory, "/local/domain/1\0"), Ok(String::new()));
    }
}
