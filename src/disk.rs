//! Room on the disk for a run's checkpoints, told before the first is written.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::config::Config;
use crate::shapes;

/// What a run's checkpoints take, and what its file system has free. Quotas do not show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Bytes of a checkpoint.
    pub each: u64,
    /// How many are kept.
    pub keep: u64,
    /// Bytes that are free to this user.
    pub free: u64,
    /// A folder of that file system: the run's, or the nearest above it that exists.
    pub folder: PathBuf,
}

impl Disk {
    /// For a run of this config in `run`; none where the file system does not say what is free.
    pub fn of(config: &Config, run: &Path) -> Option<Disk> {
        let here = |folder: &Path| match folder.as_os_str().is_empty() {
            true => PathBuf::from("."),
            false => folder.to_path_buf(),
        };
        let folder = run.ancestors().map(here).find(|folder| folder.exists())?;
        let found = rustix::fs::statvfs(&folder).ok()?;
        let free = found.f_bavail.checked_mul(found.f_frsize)?;
        let each = shapes::checkpoint_bytes(config) as u64;
        Some(Disk { each, keep: config.checkpoint.keep as u64, free, folder })
    }

    /// The most that there is at a time: those that are kept, and the one being written.
    pub fn most(&self) -> u64 {
        self.each.saturating_mul(self.keep.saturating_add(1))
    }
}

impl fmt::Display for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mb = |bytes: u64| bytes as f64 / 1e6;
        let (each, most, free) = (mb(self.each), mb(self.most()), mb(self.free));
        write!(
            f,
            "a checkpoint takes {each:.1} MB, {} kept and one being written {most:.1} MB; {free:.1} MB are free in {}",
            self.keep,
            self.folder.display()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_is_not_there_yet_has_the_room_of_the_one_above() {
        let folder = tempfile::tempdir().unwrap();
        let config = Config::load("detco-small", &["checkpoint.keep=3".into()]).unwrap();
        let disk = Disk::of(&config, &folder.path().join("runs/a")).unwrap();
        assert_eq!(disk.folder, folder.path());
        assert!(disk.each > 1_000_000 && disk.free > 0);
        assert_eq!(disk.most(), 4 * disk.each);
        let relative = Disk::of(&config, Path::new("not/there")).unwrap();
        assert_eq!(relative.folder, Path::new("."));
        let said = Disk { free: 40_000_000, each: 131_200_000, keep: 2, ..disk }.to_string();
        assert!(said.starts_with(
            "a checkpoint takes 131.2 MB, 2 kept and one being written 393.6 MB; 40.0 MB"
        ));
    }
}
