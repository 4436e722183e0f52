//! Limits of the system: which one an error comes from, its value, and how to raise it.
//!
//! These sentences are added to the system's own words.

use std::fs;
use std::io;

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use thiserror::Error;

/// No memory for an allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("no memory for {bytes} bytes")]
pub struct NoMemory {
    /// Bytes that were asked for.
    pub bytes: u128,
}

/// Bytes of a page of memory.
pub fn page_size() -> usize {
    rustix::param::page_size()
}

/// The limit behind an error of a file operation, such as "open" or "map"; empty if there is none.
pub fn of_file(action: &str, error: &io::Error) -> String {
    match Errno::from_io_error(error) {
        Some(Errno::MFILE) => {
            let most = soft(Resource::Nofile);
            format!(
                " (this process has as many files open as it may, {most}: `ulimit -n` raises it)"
            )
        }
        Some(Errno::NFILE) => {
            " (the system has as many files open as it may: fs.file-max raises it)".to_owned()
        }
        Some(Errno::NOMEM) if action == "map" => of_maps(maps(), maps_max()),
        Some(Errno::NODEV) if action == "map" => {
            " (its file system has no memory maps: copy the file to another one)".to_owned()
        }
        Some(Errno::FBIG) => {
            let most = soft(Resource::Fsize);
            format!(" (a file may have {most} bytes: `ulimit -f` raises it)")
        }
        Some(Errno::NOLCK | Errno::OPNOTSUPP) if action == "lock" => {
            " (its file system has no locks)".to_owned()
        }
        _ => String::new(),
    }
}

/// For a refused map: the limit of maps if it is reached, else memory.
fn of_maps(maps: Option<usize>, most: Option<usize>) -> String {
    match (maps, most) {
        // Some are kept for threads and the heap.
        (Some(maps), Some(most)) if maps + maps / 50 >= most => format!(
            " (this process has {maps} memory maps and may have {most}, one a shard: raise vm.max_map_count \
             with `sysctl`, or pack fewer and larger shards with --shard-size)"
        ),
        _ => " (no memory or no addresses for the map: see `ulimit -v`)".to_owned(),
    }
}

/// A hint for a thread that cannot be started.
pub fn of_threads(error: &io::Error) -> String {
    if Errno::from_io_error(error) != Some(Errno::AGAIN) {
        return String::new();
    }
    let mut limits = vec![format!("`ulimit -u` is {}", soft(Resource::Nproc))];
    limits.extend(pids_max().map(|most| format!("pids.max of the control group is {most}")));
    format!(
        "\nhint: this user or container has as many threads as it may ({}): raise that, or ask for fewer \
         (--workers, data.workers, train.threads)",
        limits.join(", ")
    )
}

fn soft(resource: Resource) -> String {
    getrlimit(resource).current.map_or("unlimited".to_owned(), |most| most.to_string())
}

fn maps() -> Option<usize> {
    let maps = fs::read("/proc/self/maps").ok()?;
    Some(maps.iter().filter(|byte| **byte == b'\n').count())
}

fn maps_max() -> Option<usize> {
    fs::read_to_string("/proc/sys/vm/max_map_count").ok()?.trim().parse().ok()
}

/// `pids.max` of this process's control group (version 2); none where there is no number.
fn pids_max() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let group = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    fs::read_to_string(format!("/sys/fs/cgroup{group}/pids.max")).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_named_with_what_raises_them() {
        let of = |errno: Errno| io::Error::from_raw_os_error(errno.raw_os_error());
        for (action, errno, word) in [
            ("open", Errno::MFILE, "`ulimit -n`"),
            ("open", Errno::NFILE, "fs.file-max"),
            ("map", Errno::NODEV, "no memory maps"),
            ("map", Errno::NOMEM, "`ulimit -v`"),
            ("write", Errno::FBIG, "`ulimit -f`"),
            ("lock", Errno::NOLCK, "no locks"),
        ] {
            let said = of_file(action, &of(errno));
            assert!(said.contains(word), "{action} {errno}: {said}");
        }
        assert_eq!(of_file("read", &of(Errno::NOMEM)), "");
        assert_eq!(of_file("open", &of(Errno::NOENT)), "");
        assert!(of_threads(&of(Errno::AGAIN)).contains("`ulimit -u` is "));
        assert_eq!(of_threads(&of(Errno::NOMEM)), "");
    }

    #[test]
    fn the_limit_of_maps_is_told_from_memory() {
        let said = of_maps(Some(65_500), Some(65_530));
        assert!(said.contains("65500 memory maps and may have 65530"), "{said}");
        assert!(!of_maps(Some(900), Some(65_530)).contains("max_map_count"));
        assert!(maps().is_none_or(|maps| maps > 10));
        assert!(page_size().is_power_of_two() && page_size() >= 4096);
    }
}
