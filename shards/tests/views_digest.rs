//! The views of DetCo, DetCo+AA, MoCo v2 and MoCo v1 are part of every run's identity: their drawn
//! numbers and their bytes, as batches bring them, are pinned by SHA-256.
//!
//! Pictures are PNG and made of integers, so that no decoder and no library of mathematics has a say.

use std::path::Path;
use std::sync::Arc;

use detco_shards::format::writer::ShardWriter;
use detco_shards::order::Order;
use detco_shards::pipeline::{Loader, LoaderOptions};
use detco_shards::stream::ShardSet;
use detco_shards::views::{Op, Recipe, SamplePlan, ViewPlan};
use sha2::{Digest, Sha256};

/// Blocks, ramps and a little noise.
fn picture(number: u32, width: u32, height: u32) -> image::RgbImage {
    image::RgbImage::from_fn(width, height, |x, y| {
        let noise = (x * 7919 + y * 104_729 + number * 31).wrapping_mul(2_654_435_761) >> 27;
        let block = if ((x / 37) ^ (y / 29)) % 2 == 0 { 60 } else { 0 };
        image::Rgb([
            (x * 150 / width + block + noise) as u8,
            (y * 120 / height + block + number * 9 % 60 + noise) as u8,
            ((x + y) * 170 / (width + height) + noise) as u8,
        ])
    })
}

fn shard(folder: &Path) -> Arc<ShardSet> {
    let mut shard = ShardWriter::create(folder, "000000.tar").unwrap();
    let sizes = [(500, 375), (375, 500), (256, 256), (640, 427), (64, 40), (901, 77), (31, 333)];
    for (number, (width, height)) in (0..).zip(sizes) {
        let mut bytes = std::io::Cursor::new(Vec::new());
        picture(number, width, height).write_to(&mut bytes, image::ImageFormat::Png).unwrap();
        shard.append(&format!("{number:03}.png"), bytes.get_ref()).unwrap();
    }
    shard.finish().unwrap().seal().unwrap();
    Arc::new(ShardSet::open(&[folder.to_str().unwrap().to_string()]).unwrap())
}

fn recipes() -> [(&'static str, Recipe); 4] {
    ["detco", "detco-aa", "moco-v2", "moco-v1"]
        .map(|name| (name, Recipe::preset(name).expect("a preset's name")))
}

fn hex(digest: Sha256) -> String {
    digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// All that was drawn for a view, in this order: side, box, operations, flip; of a patch set the
/// patch, the offsets and the order.
fn add_view(digest: &mut Sha256, view: &ViewPlan) {
    let crop = view.crop;
    for number in [view.size, crop.left, crop.top, crop.width, crop.height] {
        digest.update(number.to_le_bytes());
    }
    for op in &view.ops {
        let op: &Op = op;
        digest.update(serde_json::to_string(op).unwrap());
    }
    digest.update([u8::from(view.flip)]);
}

fn add_plan(digest: &mut Sha256, plan: &SamplePlan) {
    for view in &plan.views {
        add_view(digest, view);
        let Some(grid) = &view.grid else { continue };
        digest.update(grid.patch.to_le_bytes());
        for offset in grid.offsets.iter().flatten() {
            digest.update(offset.to_le_bytes());
        }
        digest.update(&grid.order);
    }
}

#[test]
fn drawn_numbers_are_pinned() {
    for ((name, recipe), expected) in recipes().into_iter().zip(NUMBERS) {
        let mut digest = Sha256::new();
        for sample in 0..2000u64 {
            for (seed, epoch) in [(0, 0), (7, 3), (u64::MAX, 199)] {
                let size = [(500, 375), (33, 1000), (1, 1), (4000, 3000)][sample as usize % 4];
                add_plan(&mut digest, &recipe.draw(size.0, size.1, seed, epoch, sample << 7));
            }
        }
        assert_eq!(hex(digest), expected, "{name}");
    }
}

#[test]
fn the_bytes_of_batches_are_pinned() {
    let folder = tempfile::tempdir().unwrap();
    let set = shard(folder.path());
    for ((name, recipe), expected) in recipes().into_iter().zip(BYTES) {
        let order = Order::shuffled(set.len(), 3, 7).unwrap();
        let sections = recipe.sections();
        let options = LoaderOptions::train(recipe, order, 7, 2);
        let mut digest = Sha256::new();
        for filled in Loader::start(Arc::clone(&set), options).unwrap() {
            let filled = filled.unwrap();
            for id in &filled.samples {
                digest.update(id.to_le_bytes());
            }
            for section in &sections {
                for view in 0..section.views {
                    digest.update(filled.view(&section.name, view));
                }
            }
        }
        assert_eq!(hex(digest), expected, "{name}");
    }
}

const NUMBERS: [&str; 4] = [
    "ecb7e1ba2139df3eb84e6aa0721c617d7d586bfa4f8ad01a5d1dc75a500d70a4",
    "884c2dd710ae4a9c28d0e03997cb5621141cf2d59a5d07e588d7d2f423772802",
    "429a91e96be3451fb453f8107bc35fecd7362146b0c1a2f27fead16c36d67417",
    "be946e9314af797df19cc0181f30dca9af7e4e52cc9ce3023d659ada86af24bb",
];
const BYTES: [&str; 4] = [
    "8dc3f41ed276be6c6839169e77218240edfa1161827e21046fa501ba8d971e6c",
    "f7195d48543ccc10b6cf191a6e7d63d0fa72d9ddb9ba5626bb5035d58ccb06f7",
    "546c713bf18191fc385b26b16b25b7ccb2a10d463f1d1f61cfa0a5871e729a98",
    "874fc5ce5873c8ead2c13ce512fd67c8314264693a0b52db6713026cbd89ddce",
];
