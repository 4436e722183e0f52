//! No bytes make the walker panic, run backwards, leave the file, or end quietly.
#![no_main]

use detco_shards::format::tar::{BLOCK, Walker};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut end = 0;
    let mut whole = true;
    for member in Walker::new(bytes) {
        let Ok(member) = member else {
            whole = false;
            break;
        };
        assert!(member.start >= end && member.data >= member.start + BLOCK);
        assert!(member.end() <= bytes.len() as u64 && !member.name.is_empty());
        let range = bytes.as_ptr_range();
        let payload = member.payload.as_ptr_range();
        assert!(range.start <= payload.start && payload.end <= range.end);
        end = member.end();
    }
    if whole {
        // Only zeros, two blocks at least, are a quiet end.
        let rest = &bytes[end as usize..];
        assert!(rest.len() >= 2 * BLOCK as usize && rest.iter().all(|byte| *byte == 0));
    }
});
