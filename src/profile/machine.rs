//! A description of the machine, without which a figure is worth nothing.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// Cores, vectors, memory, file system.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Machine {
    /// Cores that this process may use.
    pub cores: usize,
    /// The processor's name.
    pub cpu: Option<String>,
    /// The widest vector instructions that it has.
    pub simd: &'static str,
    /// Memory in bytes.
    pub memory_bytes: Option<u64>,
    /// The file system of the data.
    pub file_system: Option<String>,
    /// The kernel's version.
    pub kernel: Option<String>,
    /// The JPEG decoder.
    pub decoder: &'static str,
}

impl Machine {
    /// This machine, and the file system of `data`.
    pub fn of(data: &Path) -> Machine {
        let read = |path: &str| fs::read_to_string(path).ok();
        let data = fs::canonicalize(data).unwrap_or_else(|_| data.to_path_buf());
        Machine {
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            cpu: read("/proc/cpuinfo").and_then(|text| field(&text, "model name")),
            simd: simd(),
            memory_bytes: memory("MemTotal"),
            file_system: read("/proc/self/mountinfo").and_then(|text| file_system(&text, &data)),
            kernel: read("/proc/sys/kernel/osrelease").map(|text| text.trim().to_owned()),
            decoder: detco_shards::decode::Decoder::new().name(),
        }
    }
}

/// Memory in bytes by its name in `/proc/meminfo`: `MemTotal`, `MemAvailable`.
pub fn memory(name: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    field(&text, name)?.strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Bytes of memory available to this process: the machine's, or fewer where its control group (a container)
/// limits them. `None` if the system does not tell.
pub fn memory_left() -> Option<u64> {
    let of_group = |file: &str| fs::read_to_string(format!("/sys/fs/cgroup/memory.{file}")).ok();
    let left = || {
        // "max" is no number. What was read from files counts as used, and is given back when it is needed.
        let most = of_group("max")?.trim().parse::<u64>().ok()?;
        let used = of_group("current")?.trim().parse::<u64>().ok()?;
        let stat = of_group("stat").unwrap_or_default();
        let cached = stat.lines().find_map(|line| line.strip_prefix("inactive_file "));
        let cached = cached.and_then(|bytes| bytes.trim().parse::<u64>().ok()).unwrap_or(0);
        Some(most.saturating_sub(used.saturating_sub(cached)))
    };
    let available = memory("MemAvailable")?;
    Some(left().map_or(available, |left| left.min(available)))
}

/// Page faults and disk reads of this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Paging {
    /// Page faults that waited for a disk.
    pub major: u64,
    /// Page faults that did not.
    pub minor: u64,
    /// Bytes read from disks, read-ahead included.
    pub disk_bytes: u64,
}

impl Paging {
    /// The counts so far; zeros where the kernel does not tell.
    pub fn now() -> Paging {
        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        let io = fs::read_to_string("/proc/self/io").unwrap_or_default();
        let (minor, major) = faults(&stat).unwrap_or_default();
        let disk_bytes = field(&io, "read_bytes").and_then(|text| text.parse().ok()).unwrap_or(0);
        Paging { major, minor, disk_bytes }
    }

    /// The counts since an earlier moment.
    pub fn since(self, earlier: Paging) -> Paging {
        Paging {
            major: self.major.saturating_sub(earlier.major),
            minor: self.minor.saturating_sub(earlier.minor),
            disk_bytes: self.disk_bytes.saturating_sub(earlier.disk_bytes),
        }
    }
}

/// Minor and major faults in `/proc/self/stat`: fields 10 and 12, where the second field is a name
/// in parentheses that may hold anything.
fn faults(stat: &str) -> Option<(u64, u64)> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(7);
    let minor = fields.next()?.parse().ok()?;
    Some((minor, fields.nth(1)?.parse().ok()?))
}

/// The value after `name:` in the kernel's tables.
fn field(text: &str, name: &str) -> Option<String> {
    let mut lines = text.lines().filter_map(|line| line.split_once(':'));
    lines.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim().to_owned())
}

/// The type of the file system with the longest mount point above `path`.
fn file_system(mounts: &str, path: &Path) -> Option<String> {
    let mut best: Option<(PathBuf, String)> = None;
    for line in mounts.lines() {
        let Some((mount, kind)) = line.split_once(" - ") else { continue };
        let Some(point) = mount.split(' ').nth(4).map(unescape) else { continue };
        let Some(kind) = kind.split(' ').next() else { continue };
        // Of two mounts on one point the later hides the earlier.
        let longer = best.as_ref().is_none_or(|(known, _)| point.starts_with(known));
        if path.starts_with(&point) && longer {
            best = Some((point, kind.to_owned()));
        }
    }
    best.map(|(_, kind)| kind)
}

/// Mount points have spaces, tabs, line ends and backslashes as three octal digits.
fn unescape(text: &str) -> PathBuf {
    let mut parts = text.split('\\');
    let mut path = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                path.push(char::from(byte));
                path.push_str(&part[3..]);
            }
            None => path.push_str(part),
        }
    }
    PathBuf::from(path)
}

#[cfg(target_arch = "x86_64")]
fn simd() -> &'static str {
    use std::arch::is_x86_feature_detected as has;
    match () {
        () if has!("avx512bw") && has!("avx512vbmi") => "AVX-512 with VBMI",
        () if has!("avx512bw") => "AVX-512",
        () if has!("avx2") => "AVX2",
        () if has!("sse4.1") => "SSE4.1",
        () => "SSE2",
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn simd() -> &'static str {
    if cfg!(target_arch = "aarch64") { "NEON" } else { "none known" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_mount_is_the_file_system() {
        let mounts = "\
22 1 254:0 / / rw,noatime - ext4 /dev/root rw
30 22 0:26 / /data rw shared:3 - nfs4 server:/export rw
31 22 0:27 / /data\\040two rw - xfs /dev/sdb rw
32 30 0:28 / /data/fast rw - tmpfs tmpfs rw
33 22 0:29 / /data rw - fuse.sshfs other rw";
        for (path, kind) in [
            ("/srv/a", "ext4"),
            ("/data/train", "fuse.sshfs"),
            ("/data two/x", "xfs"),
            ("/data/fast/000000.tar", "tmpfs"),
            ("/database", "ext4"),
        ] {
            assert_eq!(file_system(mounts, Path::new(path)).as_deref(), Some(kind), "{path}");
        }
        assert_eq!(file_system("", Path::new("/")), None);
    }

    #[test]
    fn faults_are_found_behind_any_name() {
        let stat = "12 (a ) (b) S 1 12 12 0 -1 4194304 345 0 7 0 3 1 0 0 20 0 1 0 99";
        assert_eq!(faults(stat), Some((345, 7)));
        assert_eq!(faults("torn"), None);
    }

    #[test]
    fn this_machine_has_cores_memory_and_faults() {
        let machine = Machine::of(Path::new("."));
        assert!(machine.cores > 0 && machine.memory_bytes.is_some_and(|bytes| bytes > 1 << 20));
        assert!(machine.file_system.is_some() && machine.kernel.is_some());
        assert!(Paging::now().minor > 0);
    }
}
