//! Scenes of the detection probe: composites against Pillow and by construction, photographs by construction.
#![cfg(feature = "train")]

mod export_oracle;
#[path = "support/photographs.rs"]
mod photographs;

use detco::eval::detect::annotated::Annotated;
use detco::eval::detect::composites::Composites;
use detco::eval::detect::layout::{OBJECT, Rules, What, overlap};
use detco::eval::detect::pictures::Pictures;
use detco::eval::detect::sources::{Scenes, Source, Split, Tools};
use detco::model::Draws;
use export_oracle::run;
use photographs::photographs;
use serde_json::json;

/// Pictures of smooth noise: pixels that a resize changes by more than rounding.
fn pictures(name: &str, edge: u32, count: u32) -> Pictures {
    let mut all = Pictures { edge, ..Pictures::default() };
    for index in 0..count {
        let mut draw = Draws::new(7, name, u64::from(index));
        let [a, b, c]: [f64; 3] = std::array::from_fn(|_| draw.unit() * 0.5);
        for at in 0..edge * edge {
            let [x, y] = [at % edge, at / edge].map(f64::from);
            for phase in 0..3 {
                let wave = (a * x + b * y + c * x * y / f64::from(edge) + f64::from(phase)).sin();
                all.pixels.push((127.0 + 90.0 * wave + 38.0 * draw.unit()) as u8);
            }
        }
        all.classes.push(index % 3);
    }
    all
}

fn composites(rules: Rules, seed: u64) -> Composites {
    let names = ["a", "b", "c"].map(String::from).to_vec();
    let (objects, photos) = (pictures("object", OBJECT, 20), pictures("photo", rules.photo(), 8));
    Composites::new(rules, seed, objects, None, &photos, names).unwrap()
}

fn make(source: &dyn Source, split: Split, count: usize, workers: usize) -> Scenes {
    Scenes::make(source, split, count, workers, &|_| {}).unwrap()
}

#[test]
fn scenes_depend_on_their_address_alone() {
    let source = composites(Rules::of_size(64), 3);
    let one = make(&source, Split::Train, 12, 1);
    let three = make(&source, Split::Train, 12, 3);
    assert!(one.pixels == three.pixels && one.scenes == three.scenes);
    // A scene alone, and of another source that is equal.
    let mut out = vec![0; one.bytes(5, 1).len()];
    let again = composites(Rules::of_size(64), 3);
    let scene = again.scene(Split::Train, 5, &mut Tools::new(), &mut out).unwrap();
    assert!(out == one.bytes(5, 1) && scene == one.scenes[5]);
    for (split, seed) in [(Split::Test, 3), (Split::Unlabelled, 3), (Split::Train, 4)] {
        let other = make(&composites(Rules::of_size(64), seed), split, 12, 2);
        assert!(other.pixels != one.pixels, "{split:?} {seed}");
    }
}

#[test]
fn test_scenes_show_other_pictures() {
    // Of 20 objects four are for testing, of 8 photos two: numbers count within a split.
    let source = composites(Rules::of_size(64), 1);
    for (split, objects, photos) in [(Split::Train, 16, 6), (Split::Test, 4, 2)] {
        let mut seen = [0, 0];
        for index in 0..200 {
            let layout = source.layout(split, index);
            seen[1] = seen[1].max(layout.background.photo + 1);
            for paste in layout.pastes {
                match paste.what {
                    What::Object(object) | What::Shuffled(object, _) => {
                        seen[0] = seen[0].max(object + 1)
                    }
                    What::Patch(cut) => seen[1] = seen[1].max(cut.photo + 1),
                }
            }
        }
        assert_eq!(seen, [objects, photos], "{split:?}");
    }
    let all = pictures("object", OBJECT, 20);
    let [train, test] = all.split(5);
    assert_eq!((train.len(), test.len()), (16, 4));
    assert!(test.get(0) == all.get(4) && train.get(4) == all.get(5));
}

#[test]
fn layouts_keep_their_rules() {
    let rules = Rules::of_size(128);
    let source = composites(rules, 0);
    let (mut crowded, mut kinds, mut seams) = (0, [0; 3], [0; 5]);
    let mut sides = [u32::MAX, 0];
    for index in 0..400 {
        let layout = source.layout(Split::Train, index);
        let targets = layout.pastes.iter().filter(|one| matches!(one.what, What::Object(_)));
        assert!((1..=3).contains(&targets.count()));
        assert!(layout.pastes.len() <= 6 && (43..=128).contains(&layout.reduced));
        let cut = layout.background;
        assert!(cut.side >= 128 && cut.left.max(cut.top) + cut.side <= rules.photo());
        for (at, paste) in layout.pastes.iter().enumerate() {
            let [left, top, right, bottom] = paste.corners;
            assert!(left < right && top < bottom && right <= 128 && bottom <= 128);
            for side in [right - left, bottom - top] {
                assert!((32..=96).contains(&side), "{:?}", paste.corners);
                sides = [sides[0].min(side), sides[1].max(side)];
            }
            for other in &layout.pastes[at + 1..] {
                let shared = overlap(paste.corners, other.corners);
                assert!(shared <= 0.3, "{shared}");
                crowded += usize::from(shared > 0.0);
            }
            seams[paste.seam as usize] += 1;
            match &paste.what {
                What::Object(_) => kinds[0] += 1,
                What::Patch(cut) => {
                    assert!(cut.left.max(cut.top) + cut.side <= rules.photo());
                    kinds[1] += 1;
                }
                What::Shuffled(_, order) => {
                    let mut order = order.clone();
                    order.sort_unstable();
                    assert_eq!(order, (0..16).collect::<Vec<i64>>());
                    kinds[2] += 1;
                }
            }
        }
    }
    assert!(crowded > 100 && kinds.iter().all(|kind| *kind > 150), "{crowded} {kinds:?}");
    assert!([0, 2, 4].iter().all(|seam| seams[*seam] > 200) && seams[1] + seams[3] == 0);
    assert!(sides[0] <= 34 && sides[1] >= 90, "{sides:?}");
    let bare = composites(Rules { distractors: false, ..rules }, 0);
    let only = |index| bare.layout(Split::Train, index).pastes.into_iter();
    assert!((0..50).flat_map(only).all(|paste| matches!(paste.what, What::Object(_))));
}

/// White objects without seams on black photos: what is white is the boxes.
#[test]
fn boxes_are_exact() {
    let rules = Rules { distractors: false, seams: [0; 3], ..Rules::of_size(128) };
    let flat = |edge: u32, value: u8, count: usize| Pictures {
        edge,
        pixels: vec![value; 3 * (edge * edge) as usize * count],
        classes: vec![0; count],
    };
    let (objects, photos) = (flat(OBJECT, 255, 5), flat(rules.photo(), 0, 4));
    let source = Composites::new(rules, 0, objects, None, &photos, vec!["it".into()]).unwrap();
    let scenes = make(&source, Split::Train, 40, 2);
    for (index, scene) in scenes.scenes.iter().enumerate() {
        let pixels = scenes.bytes(index, 1);
        for y in 0..128 {
            for x in 0..128 {
                let inside = scene.objects.iter().any(|object| {
                    let [left, top, right, bottom] = object.corners.map(|at| at as usize);
                    (left..right).contains(&x) && (top..bottom).contains(&y)
                });
                let found = pixels[(y * 128 + x) * 3];
                assert_eq!(found, if inside { 255 } else { 0 }, "scene {index} at {x}, {y}");
            }
        }
        for object in &scene.objects {
            let [left, top, right, bottom] = object.corners.map(f64::from);
            assert_eq!(object.bounds, [left, top, right - left, bottom - top]);
            assert_eq!(object.area, object.bounds[2] * object.bounds[3]);
        }
    }
    let truth = scenes.truth(source.classes(), false);
    assert_eq!((truth.images.len(), truth.objects.len()), (40, scenes.objects()));
}

#[test]
fn pixels_are_pillows() {
    let rules = Rules::of_size(128);
    let source = composites(rules, 11);
    let [objects, _] = pictures("object", OBJECT, 20).split(5);
    let [photos, _] = pictures("photo", rules.photo(), 8).split(4);
    let layouts: Vec<_> = (0..30).map(|index| source.layout(Split::Train, index)).collect();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("objects.bin"), &objects.pixels).unwrap();
    std::fs::write(at("photos.bin"), &photos.pixels).unwrap();
    let said = json!({ "rules": rules, "layouts": layouts });
    std::fs::write(at("layouts.json"), said.to_string()).unwrap();
    run("detect.py", &[&"scenes", &folder.path()]);
    let theirs = std::fs::read(at("scenes.bin")).unwrap();
    let ours = make(&source, Split::Train, 30, 1).pixels;
    assert_eq!(ours.len(), theirs.len());
    let differ = ours.iter().zip(&theirs).filter(|(a, b)| a != b).count();
    assert_eq!(differ, 0, "of {} bytes", ours.len());
}

/// What of a scene is brighter than half, as a box.
fn bright(scenes: &Scenes, index: usize, rows: usize) -> [usize; 4] {
    let (size, pixels) = (scenes.size as usize, scenes.bytes(index, 1));
    let mut found = [size, size, 0, 0];
    for y in 0..rows {
        for x in 0..size {
            if pixels[(y * size + x) * 3] > 127 {
                found =
                    [found[0].min(x), found[1].min(y), found[2].max(x + 1), found[3].max(y + 1)];
            }
        }
    }
    found
}

#[test]
fn photographs_keep_their_ratio_and_boxes() {
    let folder = tempfile::tempdir().unwrap();
    let (coco, voc) = photographs(folder.path());
    let source = Annotated::coco((&folder.path().join("coco.json"), &coco), None, 160).unwrap();
    assert_eq!((source.most(Split::Train), source.most(Split::Test)), (8, 2));
    assert_eq!(source.classes(), [(3, "cat".to_owned()), (7, "dog".to_owned())]);
    let scenes = make(&source, Split::Train, 100, 2);
    assert_eq!(scenes.len(), 8);
    for (index, scene) in scenes.scenes.iter().enumerate() {
        assert_eq!(scene.scale, 4.0);
        let object = &scene.objects[0];
        // 40 x 20 pixels in 160 x 80: the enlarged edge is half as bright where the box ends.
        assert_eq!(bright(&scenes, index, 80), object.corners.map(|at| at as usize));
        assert_eq!(object.class, 1);
    }
    // Below the picture is what normalises to zero.
    let below = &scenes.bytes(0, 1)[80 * 160 * 3..];
    assert!(below.chunks_exact(3).all(|pixel| pixel == [124, 116, 104]));
    let crowd = &scenes.scenes[0].objects[1];
    assert!(crowd.is_ignored && !crowd.is_learned);
    let truth = scenes.truth(source.classes(), false);
    assert_eq!(truth.images[0], "100");
    assert_eq!(truth.objects[0].bounds, [2.0, 4.0, 12.0, 8.0]);

    let source = Annotated::voc(&voc, ["trainval", "test"], 160).unwrap();
    assert_eq!((source.most(Split::Train), source.most(Split::Test)), (6, 4));
    let scenes = make(&source, Split::Train, 100, 1);
    for (index, scene) in scenes.scenes.iter().enumerate() {
        let [dog, cat] = &scene.objects[..] else { panic!("two objects") };
        assert_eq!(bright(&scenes, index, 80), dog.corners.map(|at| at as usize));
        assert!(cat.is_ignored && cat.is_learned && cat.class == 0 && dog.class == 1);
    }
}

#[test]
fn parts_are_nested_and_of_their_size() {
    let scenes = make(&composites(Rules::of_size(64), 0), Split::Train, 40, 2);
    let [small, large, all] = [2.5, 25.0, 100.0].map(|percent| scenes.part(percent, 3));
    assert_eq!((small.len(), large.len(), all.len()), (1, 10, 40));
    assert!(small.iter().all(|one| large.contains(one)) && large.windows(2).all(|p| p[0] < p[1]));
    assert!(scenes.part(25.0, 4) != large && scenes.part(0.01, 0).len() == 1);
}
