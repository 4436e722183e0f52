//! How long a data set of ImageNet's size takes to open, by index and by walking its headers:
//! `cargo bench -p detco-shards --bench open`.
//!
//! By index: 1,281 shards of 1,000 samples of 110 kB, whose tars are sparse files with a
//! first header (opening looks at that one; a sample's header is looked at when the sample is). By walking: shards with real
//! headers and small members, fewer of them, because each takes two pages of the disk.

use std::io::Write;
use std::time::Instant;

use detco_shards::format::index::{IndexText, Span};
use detco_shards::format::writer::ShardWriter;
use detco_shards::stream::ShardSet;

const SAMPLES: u64 = 1000;
const IMAGE: u64 = 110_000;
const BLOCK: u64 = 512;

fn main() {
    let measured = std::env::args().any(|argument| argument == "--bench");
    let (indexed, walked, rounds) = if measured { (1281, 100, 5) } else { (2, 1, 1) };

    let folder = tempfile::tempdir().expect("a folder");
    let header = first_header();
    for shard in 0..indexed {
        let mut text = IndexText::default();
        let mut at = 0;
        for sample in 0..SAMPLES {
            let key = format!("n{:08}/n{:08}_{sample:05}", shard * 7, shard * 7);
            for (extension, size) in [("jpg", IMAGE), ("cls", 3)] {
                let name = format!("{key}.{extension}");
                text.push(&name, Span { offset: at + BLOCK, size });
                at += BLOCK + size.next_multiple_of(BLOCK);
            }
        }
        let path = folder.path().join(format!("{shard:06}.tar"));
        let mut file = std::fs::File::create(&path).expect("a tar");
        file.write_all(&header).expect("a header");
        file.set_len(at + 2 * BLOCK).expect("a length");
        std::fs::write(path.with_extension("idx"), text.finish()).expect("an index");
    }
    time("by index", folder.path(), indexed * SAMPLES, rounds);

    let folder = tempfile::tempdir().expect("a folder");
    for shard in 0..walked {
        let mut writer =
            ShardWriter::create(folder.path(), &format!("{shard:06}.tar")).expect("a shard");
        for sample in 0..SAMPLES {
            let key = format!("n{shard:08}/n{shard:08}_{sample:05}");
            writer.append(&format!("{key}.jpg"), &[0; 100]).expect("a member");
            writer.append(&format!("{key}.cls"), b"7").expect("a member");
        }
        writer.finish().expect("a file").seal().expect("a shard");
    }
    for entry in std::fs::read_dir(folder.path()).expect("a list") {
        let path = entry.expect("an entry").path();
        if path.extension().is_some_and(|extension| extension == "idx") {
            std::fs::remove_file(path).expect("removes");
        }
    }
    time("by walking", folder.path(), walked * SAMPLES, rounds);
}

/// The header of a shard's first member, which is looked at when its index is read.
fn first_header() -> Vec<u8> {
    let folder = tempfile::tempdir().expect("a folder");
    let mut writer = ShardWriter::create(folder.path(), "000000.tar").expect("a shard");
    writer.append("n00000000/n00000000_00000.jpg", &vec![0; IMAGE as usize]).expect("a member");
    writer.append("n00000000/n00000000_00000.cls", b"7").expect("a member");
    writer.finish().expect("a file").seal().expect("a shard");
    let bytes = std::fs::read(folder.path().join("000000.tar")).expect("reads");
    bytes[..BLOCK as usize].to_vec()
}

fn time(how: &str, folder: &std::path::Path, samples: u64, rounds: u32) {
    let spec = [folder.to_str().expect("text").to_owned()];
    let mut seconds: Vec<f64> = (0..rounds)
        .map(|_| {
            let start = Instant::now();
            let set = ShardSet::open(&spec).expect("the set opens");
            let elapsed = start.elapsed().as_secs_f64();
            assert_eq!(set.len(), samples);
            elapsed
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2];
    println!(
        "{how}: {samples} samples in {median:.3} s (median of {rounds}, {:.3} to {:.3}), {:.2} us a sample",
        seconds[0],
        seconds[seconds.len() - 1],
        median / samples as f64 * 1e6
    );
}
