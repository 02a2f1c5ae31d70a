//! The machine's devices, as QEMU's words: disks, a network card, a console port. All are modern virtio devices on PCI.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};

/// Bytes of a unix socket's name, at most (sockaddr_un).
const MOST_SOCKET_NAME: usize = 107;

/// A comma in a file's name stands for itself when it is doubled.
fn name(path: &str) -> String {
    path.replace(',', ",,")
}

/// Disk `number`: `FILE` or `FILE:ro`.
///
/// With `cache=writeback` QEMU has a flush of the guest's reach the file's disk (`fdatasync`), and tells the guest that there is a cache.
pub fn disk(number: usize, disk: &str, options: &str) -> Vec<String> {
    let (file, readonly) = match disk.strip_suffix(":ro") {
        Some(file) => (file, "on"),
        None => (disk, "off"),
    };
    let drive = format!(
        "id=disk{number},if=none,format=raw,cache=writeback,discard=unmap,readonly={readonly},file={}",
        name(file)
    );
    let mut device = format!("virtio-blk-pci,drive=disk{number},disable-legacy=on");
    if !options.is_empty() {
        device = format!("{device},{options}");
    }
    ["-drive".into(), drive, "-device".into(), device].into()
}

/// A network card: `user`, and ports of this host that lead to it, as in `user,tcp:8080-80`.
///
/// # Errors
/// What is wrong.
pub fn net(net: &str) -> Result<Vec<String>> {
    let mut words = net.split(',');
    if words.next() != Some("user") {
        bail!("--net {net}: there is `user`, QEMU's own network, as in --net user,tcp:8080-80");
    }
    let mut netdev = String::from("user,id=net0");
    for word in words {
        let ports = || {
            let (protocol, ports) = word.split_once(':')?;
            let (host, guest) = ports.split_once('-')?;
            let (host, guest) = (host.parse::<u16>().ok()?, guest.parse::<u16>().ok()?);
            matches!(protocol, "tcp" | "udp").then_some((protocol, host, guest))
        };
        let (protocol, host, guest) =
            ports().with_context(|| format!("--net: `{word}` is no port, as in tcp:8080-80"))?;
        netdev += &format!(",hostfwd={protocol}:127.0.0.1:{host}-:{guest}");
    }
    // No program of the card's own: there is nothing to boot from the network.
    let device = "virtio-net-pci,netdev=net0,disable-legacy=on,romfile=".into();
    Ok(["-netdev".into(), netdev, "-device".into(), device].into())
}

/// Console ports for dom0's management channel, each on a unix socket: one for each program that talks to it at the same time.
///
/// # Errors
/// When a socket cannot be called so.
pub fn channel(socket: &Path) -> Result<Vec<String>> {
    let mut words: Vec<String> = Vec::new();
    words.extend(["-device".into(), "virtio-serial-pci,id=serial0,disable-legacy=on,max_ports=8".into()]);
    for number in 0..CHANNEL_PORTS {
        let path = channel_socket(socket, number);
        let path = path.to_str().context("the management channel: its name is no text")?;
        if path.len() > MOST_SOCKET_NAME {
            bail!("{path}: a socket's name has {MOST_SOCKET_NAME} bytes at most: set CARGO_TARGET_DIR");
        }
        words.extend([
            "-chardev".into(),
            format!("socket,id=channel{number},server=on,wait=off,path={}", name(path)),
            "-device".into(),
            format!("virtserialport,bus=serial0.0,chardev=channel{number},name={}", channel_name(number)),
        ]);
    }
    Ok(words)
}

/// How many programs may talk to the management channel at a time.
pub const CHANNEL_PORTS: u32 = 4;

/// A port's name, by which dom0 finds it (`dom0/src/management.rs`).
fn channel_name(number: u32) -> String {
    if number == 0 { "org.xenolith.control".into() } else { format!("org.xenolith.control.{number}") }
}

/// The socket of a port, beside that of the first one.
pub fn channel_socket(first: &Path, number: u32) -> PathBuf {
    if number == 0 { first.to_path_buf() } else { first.with_extension(format!("{number}.sock")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_words_for_qemu() {
        let words = disk(1, "a,b.img:ro", "vectors=0");
        assert_eq!(
            words[1],
            "id=disk1,if=none,format=raw,cache=writeback,discard=unmap,readonly=on,file=a,,b.img"
        );
        assert_eq!(words[3], "virtio-blk-pci,drive=disk1,disable-legacy=on,vectors=0");
        assert!(disk(0, "a.img", "")[1].contains("readonly=off,file=a.img"));
    }

    #[test]
    fn ports_lead_to_the_card() {
        let words = net("user,tcp:8080-80,udp:53-5353").unwrap();
        assert_eq!(words[1], "user,id=net0,hostfwd=tcp:127.0.0.1:8080-:80,hostfwd=udp:127.0.0.1:53-:5353");
        for bad in ["tap", "user,8080-80", "user,tcp:8080", "user,tcp:99999-80", "user,icmp:1-2"] {
            assert!(net(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_socket_has_a_name_that_fits() -> Result<()> {
        assert!(channel(Path::new(&"x".repeat(108))).is_err());
        let words = channel(Path::new("target/a.sock"))?;
        for port in [
            "socket,id=channel0,server=on,wait=off,path=target/a.sock",
            "virtserialport,bus=serial0.0,chardev=channel0,name=org.xenolith.control",
            "socket,id=channel3,server=on,wait=off,path=target/a.3.sock",
            "virtserialport,bus=serial0.0,chardev=channel3,name=org.xenolith.control.3",
        ] {
            assert!(words.iter().any(|word| word == port), "{port}");
        }
        Ok(())
    }
}
