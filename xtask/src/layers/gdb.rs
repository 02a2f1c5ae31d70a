//! QEMU's gdb stub, as far as it takes to stop the machine at an address and to give QEMU commands meanwhile: its clock stands still then, so
//! what runs in it does not notice.
//!
//! The protocol: `$packet#checksum`, answered by `+` and a packet of the other side ("GDB Remote Serial Protocol" in gdb's manual).

use anyhow::{Context, Result, bail, ensure};
use std::io::{BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// A machine that stands still.
pub struct Stub {
    from: BufReader<UnixStream>,
    to: UnixStream,
}

/// Number of the stack pointer among the registers of x86-64.
const RSP: usize = 7;

impl Stub {
    /// Connects to the stub's socket; that stops the machine.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn connect(socket: &Path) -> Result<Self> {
        let to = UnixStream::connect(socket)?;
        Ok(Self { from: BufReader::new(to.try_clone()?), to })
    }

    /// Lets the machine run until it comes to `address`; `None` when it ends before.
    ///
    /// # Errors
    /// When the stub answers something else.
    pub fn run_to(&mut self, address: u64) -> Result<Option<()>> {
        // Kind 1: of the breakpoint instruction's length, which says nothing to QEMU.
        ensure!(self.ask(&format!("Z0,{address:x},1"))? == "OK", "no breakpoint at {address:#x}");
        self.send("c")?;
        loop {
            // A socket that is closed, or a packet that says how the machine ended.
            let Ok(answer) = self.receive() else { return Ok(None) };
            match answer.as_bytes().first() {
                Some(b'O') => {}
                Some(b'T' | b'S') => break,
                Some(b'W' | b'X') => return Ok(None),
                _ => bail!("the gdb stub answers {answer:?} to `c`"),
            }
        }
        ensure!(self.ask(&format!("z0,{address:x},1"))? == "OK", "the breakpoint stays");
        Ok(Some(()))
    }

    /// Where the function returns to that has just been called.
    ///
    /// # Errors
    /// When the stub does not tell.
    pub fn return_address(&mut self) -> Result<u64> {
        let registers = self.ask("g")?;
        let rsp = little(registers.get(RSP * 16..).unwrap_or_default()).context("no stack pointer")?;
        let answer = self.ask(&format!("m{rsp:x},8"))?;
        little(&answer).with_context(|| format!("the gdb stub answers {answer:?} about the stack"))
    }

    /// Gives QEMU's monitor a command.
    ///
    /// # Errors
    /// When it has something to say: those that are given here say nothing.
    pub fn monitor(&mut self, command: &str) -> Result<()> {
        let hex: String = command.bytes().map(|byte| format!("{byte:02x}")).collect();
        let mut answer = self.ask(&format!("qRcmd,{hex}"))?;
        let mut said = Vec::new();
        while let Some(text) = answer.strip_prefix('O').filter(|text| *text != "K") {
            let bytes = (0..text.len() / 2).filter_map(|at| text.get(2 * at..2 * at + 2));
            said.extend(bytes.filter_map(|byte| u8::from_str_radix(byte, 16).ok()));
            answer = self.receive()?;
        }
        let said = String::from_utf8_lossy(&said);
        ensure!(answer == "OK" && said.trim().is_empty(), "QEMU's monitor: {command}: {said}{answer}");
        Ok(())
    }

    fn ask(&mut self, packet: &str) -> Result<String> {
        self.send(packet)?;
        self.receive()
    }

    fn send(&mut self, packet: &str) -> Result<()> {
        self.to.write_all(frame(packet).as_bytes()).context("QEMU's gdb stub is gone")
    }

    fn receive(&mut self) -> Result<String> {
        let mut byte = || -> Result<u8> {
            let mut byte = [0];
            self.from.read_exact(&mut byte).context("QEMU's gdb stub is gone")?;
            Ok(byte[0])
        };
        // Acknowledgements come before it.
        while byte()? != b'$' {}
        let mut packet = Vec::new();
        loop {
            match byte()? {
                b'#' => break,
                other => packet.push(other),
            }
        }
        // The checksum: a local socket loses nothing.
        byte()?;
        byte()?;
        self.to.write_all(b"+").context("QEMU's gdb stub is gone")?;
        Ok(String::from_utf8_lossy(&packet).into_owned())
    }
}

fn frame(packet: &str) -> String {
    let sum = packet.bytes().fold(0u8, u8::wrapping_add);
    format!("${packet}#{sum:02x}")
}

/// A number of 64 bits from hexadecimal digits, its lowest byte first.
fn little(digits: &str) -> Option<u64> {
    u64::from_str_radix(digits.get(..16)?, 16).ok().map(u64::swap_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn packets_and_numbers() {
        // From gdb's manual: the checksum is the sum of all characters modulo 256.
        assert_eq!(frame("OK"), "$OK#9a");
        assert_eq!(little("00100040000000001"), Some(0x4000_1000));
        assert_eq!(little("0010"), None);
    }

    /// A stub that expects these packets and gives these answers.
    fn scripted(name: &str, script: &'static [(&str, &[&str])]) -> Result<Stub> {
        let socket = std::env::temp_dir().join(format!("xtask-gdb-{name}-{}", std::process::id()));
        let listener = UnixListener::bind(&socket)?;
        let stub = Stub::connect(&socket)?;
        std::fs::remove_file(&socket)?;
        std::thread::spawn(move || -> Result<()> {
            let (to, _) = listener.accept()?;
            let mut other = Stub { from: BufReader::new(to.try_clone()?), to };
            for (wanted, answers) in script {
                let got = other.receive()?;
                for answer in *answers {
                    let answer = if got == *wanted { answer } else { "E01" };
                    other.send(answer)?;
                }
            }
            Ok(())
        });
        Ok(stub)
    }

    #[test]
    fn stops_and_goes_on_until_the_machine_ends() -> Result<()> {
        let mut stub = scripted(
            "run",
            &[
                ("Z0,401000,1", &["OK"]),
                ("c", &["O41", "T05thread:01;"]),
                ("z0,401000,1", &["OK"]),
                ("qRcmd,6c6f67206e6f6e65", &["OK"]),
                ("qRcmd,6c6f67", &["O6e6f", "O0a", "OK"]),
                ("Z0,401000,1", &["OK"]),
                ("c", &[]),
            ],
        )?;
        assert_eq!(stub.run_to(0x40_1000)?, Some(()));
        stub.monitor("log none")?;
        assert!(stub.monitor("log").unwrap_err().to_string().contains("no"));
        assert_eq!(stub.run_to(0x40_1000)?, None);
        Ok(())
    }
}
