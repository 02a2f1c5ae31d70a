//! What a machine of a test has in RAM when it powers on: garbage.
//!
//! QEMU's RAM begins as zeroes, but for what firmware and loader leave; a real machine's, or one that was reset, does not. Who
//! relies on zeroes is found out at once here, instead of in one memory layout of fifty.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result};

/// MiB of garbage there are. A machine with more has RAM as QEMU makes it.
const MIB: u64 = 512;

/// Tests run side by side: one of them writes the file.
static WRITING: Mutex<()> = Mutex::new(());

/// The file that a machine with `mem` of memory (as in QEMU's `-m`) begins with, if it is not larger than the file.
///
/// # Errors
/// When it cannot be written.
pub fn garbage(target_dir: &Path, mem: &str) -> Result<Option<PathBuf>> {
    let small = mem.strip_suffix('M').and_then(|mib| mib.parse().ok()).is_some_and(|mib: u64| mib <= MIB);
    if !small {
        return Ok(None);
    }
    let path = target_dir.join("image/garbage-ram");
    let _alone = WRITING.lock();
    if std::fs::metadata(&path).is_ok_and(|file| file.len() == MIB << 20) {
        return Ok(Some(path));
    }
    let write = || -> std::io::Result<()> {
        // Under its own name only when it is whole.
        let part = path.with_extension("part");
        let mut file = std::fs::File::create(&part)?;
        let mib: Vec<u8> = words().take(1 << 17).flat_map(u64::to_le_bytes).collect();
        for _ in 0..MIB {
            file.write_all(&mib)?;
        }
        std::fs::rename(part, &path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))?;
    Ok(Some(path))
}

/// Words of all sizes: counts, frame numbers, entries of tables, addresses.
fn words() -> impl Iterator<Item = u64> {
    let mut random = fastrand::Rng::with_seed(1);
    std::iter::repeat_with(move || random.u64(..) >> random.u32(..64))
}

#[cfg(test)]
mod tests {
    use super::words;

    #[test]
    fn garbage_has_words_of_all_sizes() {
        let sizes = words().take(1 << 17).fold([0u32; 65], |mut sizes, word| {
            sizes[(64 - word.leading_zeros()) as usize] += 1;
            sizes
        });
        assert!(sizes[1..].iter().all(|count| *count > 500), "{sizes:?}");
    }
}
