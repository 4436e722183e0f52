//! No text makes the manifest reader panic, and what it accepts adds up.
#![no_main]

use detco_shards::format::manifest::Manifest;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| {
    let Ok(manifest) = Manifest::parse(text) else { return };
    assert_eq!(manifest.samples, manifest.shards.iter().map(|shard| shard.samples).sum::<u64>());
    for shard in &manifest.shards {
        let members = usize::try_from(shard.members).expect("each has eight digits in memory");
        assert!((0..members).all(|member| Manifest::crc_of(shard, member).is_some()));
        assert_eq!(Manifest::crc_of(shard, members), None);
    }
});
