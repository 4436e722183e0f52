//! Tests of the cache.

use std::sync::atomic::Ordering;

use sha2::{Digest as _, Sha256};

use super::*;
use crate::files::hex;

fn name(number: u8) -> String {
    format!("{}.tar", format!("{number:02x}").repeat(32))
}

fn not(_: &str) -> Priority {
    Priority::Unneeded
}

fn put(cache: &Cache, number: u8, bytes: usize, priority: &dyn Fn(&str) -> Priority) -> bool {
    match cache.admit(&name(number), bytes as u64, priority).unwrap() {
        Admitted::Part(mut part) => {
            part.append(&vec![number; bytes]).unwrap();
            part.flush().unwrap();
            part.finish().unwrap();
            true
        }
        Admitted::NoRoom { .. } => false,
        other => panic!("{other:?}"),
    }
}

/// Uses a file: file systems keep times that are apart by a tick of the clock.
fn touch(cache: &Cache, number: u8, bytes: u64) {
    std::thread::sleep(Duration::from_millis(12));
    assert!(cache.take(&name(number), bytes).unwrap().is_some());
}

fn there(cache: &Cache) -> Vec<u8> {
    (0..=9).filter(|number| cache.path(&name(*number)).exists()).collect()
}

#[test]
fn the_least_recently_used_goes_first_and_the_bound_holds() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("not-ours.tar"), [0; 500]).unwrap();
    let cache = Cache::open(folder.path(), 300).unwrap();
    for number in 0..3 {
        assert!(put(&cache, number, 100, &not));
        touch(&cache, number, 100);
    }
    touch(&cache, 0, 100);
    assert_eq!(cache.usage().unwrap(), Usage { bytes: 300, files: 3, parts: 0 });
    assert!(put(&cache, 3, 150, &not));
    assert_eq!(there(&cache), [0, 3], "1 and 2 were used before 0");
    assert!(!put(&cache, 4, 301, &not), "more than there may ever be");
    assert!(folder.path().join("not-ours.tar").exists());
}

/// A part that is renamed while another process lists the cache is counted by that process, under
/// either name: it was once counted under neither, and the bound was exceeded by a shard.
#[test]
fn the_bound_holds_while_parts_are_finished() {
    let folder = tempfile::tempdir().unwrap();
    let open = || Cache::open(folder.path(), 500).unwrap();
    let (most, writers) = (std::sync::atomic::AtomicU64::new(0), std::sync::Barrier::new(4));
    std::thread::scope(|scope| {
        for writer in 0..4 {
            let (cache, most, writers) = (open(), &most, &writers);
            scope.spawn(move || {
                writers.wait();
                for number in 0..250 {
                    put(&cache, writer + 4 * (number % 60), 100, &not);
                    most.fetch_max(cache.usage().unwrap().bytes, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(most.into_inner(), 500);
}

#[test]
fn what_is_needed_stays_and_the_latest_needed_goes_before_the_sooner() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::open(folder.path(), 300).unwrap();
    for number in 0..3 {
        put(&cache, number, 100, &not);
    }
    let priority = |other: &str| match (0..9).find(|number| name(*number) == other) {
        Some(number @ 0..=4) => Priority::NeededAfter(10 - u32::from(number)), // 4 is needed first
        _ => Priority::Unneeded,
    };
    assert!(put(&cache, 4, 100, &priority));
    assert_eq!(there(&cache), [1, 2, 4], "0 is needed last");
    assert!(!put(&cache, 0, 100, &priority), "nothing is needed later than 0");
    assert!(!put(&cache, 5, 100, &priority), "all others are needed, 5 is not");
    let pin = cache.take(&name(1), 100).unwrap();
    assert!(put(&cache, 3, 100, &priority));
    assert_eq!(there(&cache), [1, 3, 4], "1 is in use");
    drop(pin);
    // By another process as well, which opens the same folder: one descriptor, many locks.
    let other = Cache::open(folder.path(), 300).unwrap();
    let pins = [1, 3, 4].map(|number| other.take(&name(number), 100).unwrap().unwrap());
    assert!(!cache.evict_one(&name(9), &not).unwrap(), "all in use elsewhere");
    drop(pins);
    assert!(cache.evict_one(&name(9), &not).unwrap());
}

#[test]
fn a_part_reserves_its_room_and_is_gone_on_with() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::open(folder.path(), 300).unwrap();
    let admit = |number| cache.admit(&name(number), 200, &not).unwrap();
    let Admitted::Part(mut part) = admit(1) else { panic!("room") };
    part.append(b"half").unwrap();
    assert_eq!(cache.usage().unwrap(), Usage { bytes: 200, files: 0, parts: 1 });
    assert!(matches!(admit(1), Admitted::Elsewhere), "it has one writer");
    assert!(matches!(admit(2), Admitted::NoRoom { kept: 200 }), "its room is promised");
    drop(part);
    let Admitted::Part(mut part) = admit(1) else { panic!("left by its writer") };
    assert_eq!((part.have(), part.sha256()), (4, hex(&Sha256::digest(b"half"))));
    part.append(b" and half").unwrap();
    assert_eq!(part.sha256(), hex(&Sha256::digest(b"half and half")));
    part.restart().unwrap();
    part.append(&[7; 200]).unwrap();
    part.flush().unwrap();
    part.finish().unwrap();
    assert!(matches!(admit(1), Admitted::Present));
    assert_eq!(cache.read(&name(1)).unwrap(), Some(vec![7; 200]));
    // A part that nobody writes is worth no more than its room.
    drop(cache.admit(&name(3), 100, &not).unwrap());
    assert!(put(&cache, 2, 300, &not));
    assert_eq!(cache.usage().unwrap(), Usage { bytes: 300, files: 1, parts: 0 });
    let wrong = cache.take(&name(2), 299).unwrap_err().to_string();
    assert!(wrong.contains("cannot use"), "{wrong}");
}

#[test]
fn an_index_goes_for_no_shard_that_comes_the_same_day() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::open(folder.path(), 300).unwrap();
    let index = name(1).replace(".tar", ".idx");
    cache.store(&index, &[1; 100], &not).unwrap();
    assert!(!put(&cache, 2, 250, &not));
    let old = SystemTime::now() - 2 * INDEX_REST;
    let file = File::open(cache.path(&index)).unwrap();
    file.set_times(FileTimes::new().set_accessed(old)).unwrap();
    assert!(put(&cache, 2, 250, &not));
    assert_eq!(cache.read(&index).unwrap(), None);
    // Without room a small file is not kept, which is no error.
    let pin = cache.take(&name(2), 250).unwrap();
    cache.store(&index, &[1; 100], &not).unwrap();
    assert_eq!(cache.read(&index).unwrap(), None);
    drop(pin);
}
