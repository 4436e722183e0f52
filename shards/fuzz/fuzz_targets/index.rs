//! No index makes the reader panic or hand out bytes outside the shard.
#![no_main]

use std::path::Path;
use std::sync::LazyLock;

use detco_shards::format::index::Table;
use detco_shards::format::map::Map;
use detco_shards::format::writer::ShardWriter;
use libfuzzer_sys::fuzz_target;

/// A shard of three samples; the seeds in `corpus/index` describe it.
static SHARD: LazyLock<Map> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a folder");
    let mut writer = ShardWriter::create(folder.path(), "000000.tar").expect("creates");
    for (key, size) in [("a/0", 700), ("a/1", 512), ("b/2", 3)] {
        writer.append(&format!("{key}.jpg"), &vec![7; size]).expect("appends");
        writer.append(&format!("{key}.cls"), b"1").expect("appends");
    }
    writer.finish().expect("finishes").seal().expect("seals");
    // The map outlives the name.
    Map::open(&folder.path().join("000000.tar")).expect("opens")
});

fuzz_target!(|text: &[u8]| {
    let Ok(table) = Table::read(text, Path::new("fuzz.idx"), &SHARD) else { return };
    let bytes = SHARD.bytes().len() as u64;
    for position in 0..table.len() {
        let entry = table.get(position).expect("a sample");
        assert!(!entry.key.is_empty() && entry.image.offset + entry.image.size <= bytes);
        assert!(entry.class.is_none_or(|class| class.offset + class.size <= bytes));
    }
    assert!(table.get(table.len()).is_none());
});
