//! The detector of the detection probe against PyTorch and torchvision.
#![cfg(feature = "train")]

mod export_oracle;

use detco::eval::detect::adamw::AdamW;
use detco::eval::detect::head::{self, Head, Shape};
use detco::eval::detect::nms::{self, Candidate};
use detco::eval::detect::{loss, targets};
use detco::model::Draws;
use export_oracle::run;
use tch::{Device, Kind, Tensor};

/// Sends tensors to the oracle and reads what it says.
fn ask(what: &str, tensors: &[(&str, &Tensor)]) -> Vec<(String, Tensor)> {
    let folder = tempfile::tempdir().unwrap();
    let (sent, said) =
        (folder.path().join("sent.safetensors"), folder.path().join("said.safetensors"));
    let tensors: Vec<(&str, Tensor)> =
        tensors.iter().map(|(name, tensor)| (*name, tensor.detach().contiguous())).collect();
    Tensor::write_safetensors(&tensors, &sent).unwrap();
    run("detect.py", &[&what, &sent, &said]);
    Tensor::read_safetensors(&said).unwrap()
}

fn named<'a>(all: &'a [(String, Tensor)], name: &str) -> &'a Tensor {
    &all.iter().find(|(own, _)| own == name).unwrap().1
}

fn worst(ours: &Tensor, theirs: &Tensor) -> f64 {
    assert_eq!(ours.size(), theirs.size());
    (ours.to_kind(Kind::Double) - theirs.to_kind(Kind::Double)).abs().max().double_value(&[])
}

#[test]
fn the_heads_layers_are_pytorchs() {
    let levels = [(2, 5), (3, 6), (4, 7), (5, 9)];
    for levels in [&levels[..], &levels[2..3]] {
        let shape = Shape { levels, width: 16, classes: 3, grid: 16 };
        let head = Head::new(&shape, 4, Device::Cpu);
        let edges = [16, 16, 8, 4];
        let maps: Vec<Tensor> = levels
            .iter()
            .map(|(level, channels)| {
                let edge = edges[usize::from(*level) - 2];
                Draws::new(1, "map", u64::from(*level)).normal(&[2, *channels, edge, edge], 1.0)
            })
            .collect();
        let grid = Tensor::from_slice(&[16_i64]);
        let names: Vec<String> = levels.iter().map(|(level, _)| format!("map{level}")).collect();
        let mut sent: Vec<(&str, &Tensor)> =
            head.parameters().iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        sent.extend(names.iter().map(String::as_str).zip(&maps));
        sent.push(("grid", &grid));
        let said = ask("head", &sent);
        let (logits, distances) = head.forward(&maps);
        assert!(worst(&logits, named(&said, "logits")) < 1e-5);
        assert!(worst(&distances, named(&said, "distances")) < 1e-4);
        assert_eq!(logits.size(), [2, 3, 16, 16]);
    }
}

#[test]
fn a_head_is_drawn_from_its_seed() {
    let shape = Shape { levels: &[(3, 8)], width: 64, classes: 10, grid: 16 };
    let more = Shape { levels: &[(2, 4), (3, 8)], ..shape.clone() };
    let get = |head: &Head, name: &str| named(head.parameters(), name).detach();
    let [a, b, c] = [(&shape, 0), (&more, 0), (&shape, 1)]
        .map(|(shape, seed)| get(&Head::new(shape, seed, Device::Cpu), "res3.weight"));
    assert!(a == b && a != c);
    let head = Head::new(&shape, 0, Device::Cpu);
    let conv = get(&head, "conv.weight");
    let std = conv.std(true).double_value(&[]);
    assert!((std - (2.0_f64 / 576.0).sqrt()).abs() < 1e-3, "{std}");
    let (logits, distances) =
        head.forward(&[Tensor::zeros([1, 8, 8, 8], (Kind::Float, Device::Cpu))]);
    let prior = logits.sigmoid().mean(Kind::Float).double_value(&[]);
    assert!((prior - 0.01).abs() < 1e-3, "{prior}");
    assert!((distances.mean(Kind::Float).double_value(&[]) - 20.0).abs() < 0.5);
}

#[test]
fn maps_that_are_finer_are_averaged() {
    let map = Draws::new(0, "map", 0).normal(&[1, 2, 32, 32], 1.0);
    let found = head::reduced(&map, 16).unwrap();
    let by_hand = map.view([1, 2, 16, 2, 16, 2]).mean_dim([3, 5].as_slice(), false, Kind::Float);
    assert!(worst(&found, &by_hand) < 1e-6);
    assert!(head::reduced(&map, 12).is_none());
    assert_eq!(head::reduced(&map, 32).unwrap(), map);
}

/// Boxes of two small scenes, one of them crowded and one empty.
fn crowded() -> Vec<Vec<([f32; 4], usize)>> {
    let mut draw = Draws::new(2, "boxes", 0);
    let mut scene = |count: usize| {
        let mut one = || {
            let [x, y] = [(); 2].map(|()| draw.below(50) as f32);
            let [w, h] = [(); 2].map(|()| 6.0 + draw.below(40) as f32);
            ([x, y, (x + w).min(64.0), (y + h).min(64.0)], draw.below(3) as usize)
        };
        (0..count).map(|_| one()).collect::<Vec<_>>()
    };
    let mut all: Vec<_> = (0..20).map(|n| scene(n % 7)).collect();
    // Two of one area: the first has the cell.
    all.push(vec![([0.0, 0.0, 32.0, 32.0], 1), ([0.0, 0.0, 32.0, 32.0], 2)]);
    all
}

#[test]
fn cells_get_their_boxes() {
    let scenes = crowded();
    let found = targets::assign(&scenes, 8);
    let classes = Vec::<i64>::try_from(found.classes.view(-1)).unwrap();
    let mut assigned = 0;
    for (n, boxes) in scenes.iter().enumerate() {
        for cell in 0..64 {
            let center = [(cell % 8 * 8 + 4) as f32, (cell / 8 * 8 + 4) as f32];
            // All that may have the cell, the smallest and first of them first.
            let mut may: Vec<(f32, usize)> = Vec::new();
            for (at, (corners, _)) in boxes.iter().enumerate() {
                let axis = |a: usize| {
                    let (low, high, c) = (corners[a], corners[a + 2], center[a]);
                    c > low && c < high && (c - (low + high) / 2.0).abs() < 12.0
                };
                if axis(0) && axis(1) {
                    may.push(((corners[2] - corners[0]) * (corners[3] - corners[1]), at));
                }
            }
            may.sort_by(|a, b| a.partial_cmp(b).unwrap());
            let class = classes[n * 64 + cell];
            let Some((_, at)) = may.first() else {
                assert_eq!(class, -1);
                continue;
            };
            let (corners, expected) = boxes[*at];
            assert_eq!(class, expected as i64);
            let sides = [
                center[0] - corners[0],
                center[1] - corners[1],
                corners[2] - center[0],
                corners[3] - center[1],
            ];
            for (side, expected) in (0..).zip(sides) {
                let place = [n as i64, side, cell as i64 / 8, cell as i64 % 8];
                assert_eq!(found.distances.double_value(&place) as f32, expected);
            }
            assigned += 1;
        }
    }
    assert!(assigned > 200, "{assigned}");
}

#[test]
fn losses_and_their_gradients_are_torchvisions() {
    let targets = targets::assign(&crowded(), 8);
    let n = targets.classes.size()[0];
    let leaf = |name: &str, channels: i64, exp: bool| {
        let drawn = Draws::new(5, name, 0).normal(&[n, channels, 8, 8], 1.0);
        let drawn = if exp { (drawn + 2.5).exp() } else { drawn * 3.0 };
        drawn.set_requires_grad(true)
    };
    let (logits, distances) = (leaf("logits", 3, false), leaf("distances", 4, true));
    let said = ask(
        "losses",
        &[
            ("logits", &logits),
            ("distances", &distances),
            ("classes", &targets.classes),
            ("targets", &targets.distances),
        ],
    );
    let focal = loss::focal(&logits, &targets.classes).double_value(&[]);
    let theirs = named(&said, "focal").double_value(&[]);
    assert!((focal - theirs).abs() < 1e-5 * theirs, "{focal} {theirs}");
    let positive = targets.classes.ge(0).to_kind(Kind::Float);
    let apart: Tensor = (1.0 - loss::giou(&distances, &targets.distances)) * &positive;
    let (apart, theirs) =
        (apart.sum(None).double_value(&[]), named(&said, "giou").double_value(&[]));
    assert!((apart - theirs).abs() < 1e-5 * theirs, "{apart} {theirs}");
    let all = loss::loss(&logits, &distances, &targets.classes, &targets.distances);
    let count = positive.sum(None).double_value(&[]);
    assert!((all.double_value(&[]) - (focal + apart) / count).abs() < 1e-4);
    all.backward();
    assert!(worst(&logits.grad(), named(&said, "logits")) < 1e-6);
    assert!(worst(&distances.grad(), named(&said, "distances")) < 1e-6);
    // Without an object there is a loss too, and it is finite.
    let none = Tensor::full([1, 8, 8], -1, (Kind::Int64, Device::Cpu));
    let first = |of: &Tensor| of.narrow(0, 0, 1);
    let empty = loss::loss(&first(&logits), &first(&distances), &none, &first(&targets.distances));
    assert!(empty.double_value(&[]).is_finite());
}

#[test]
fn adamw_is_torchs() {
    let parameter = Draws::new(6, "parameter", 0).normal(&[30], 1.0);
    let gradients = Draws::new(6, "gradients", 0).normal(&[6, 30], 0.3);
    let rates: Vec<f32> = (1..=6).map(|step| 0.01 * step as f32).collect();
    let rates = Tensor::from_slice(&rates);
    let said =
        ask("adamw", &[("parameter", &parameter), ("gradients", &gradients), ("rates", &rates)]);
    let ours = parameter.copy().set_requires_grad(true);
    let mut optimizer = AdamW::new([ours.shallow_clone()], 0.01);
    for step in 0..6 {
        optimizer.zero_grad().unwrap();
        (&ours * gradients.get(step)).sum(None).backward();
        optimizer.step(rates.double_value(&[step]));
        assert!(worst(&ours.detach(), &named(&said, "after").get(step)) < 1e-6, "step {step}");
    }
}

#[test]
fn suppression_is_torchvisions() {
    let cases: Vec<Vec<Candidate>> = (0..4)
        .map(|case| {
            let mut draw = Draws::new(8, "nms", case);
            let candidate = |_| {
                let [x, y] = [(); 2].map(|()| draw.below(60) as f32);
                let [w, h] = [(); 2].map(|()| 4.0 + draw.below(40) as f32);
                // Scores that are often equal.
                let score = draw.below(50) as f32 / 50.0;
                let class = draw.below(3) as usize;
                Candidate { corners: [x, y, x + w, y + h], score, class }
            };
            (0..200).map(candidate).collect()
        })
        .collect();
    let all = || cases.iter().flatten();
    let flat: Vec<f32> = all().flat_map(|one| one.corners).collect();
    let scores: Vec<f32> = all().map(|one| one.score).collect();
    let classes: Vec<i64> = all().map(|one| one.class as i64).collect();
    let said = ask(
        "nms",
        &[
            ("boxes", &Tensor::from_slice(&flat).view([4, -1, 4])),
            ("scores", &Tensor::from_slice(&scores).view([4, -1])),
            ("classes", &Tensor::from_slice(&classes).view([4, -1])),
            ("overlap", &Tensor::from_slice(&[0.5_f32])),
        ],
    );
    for (case, candidates) in cases.iter().enumerate() {
        let theirs = named(&said, &format!("kept{case}"));
        let mut theirs = Vec::<i64>::try_from(theirs).unwrap();
        let kept = nms::suppress(candidates, 0.5);
        let score = |at: usize| candidates[at].score;
        assert!(kept.windows(2).all(|pair| score(pair[0]) >= score(pair[1])));
        let mut ours: Vec<i64> = kept.into_iter().map(|at| at as i64).collect();
        // Boxes of equal scores and different classes have no order.
        ours.sort_unstable();
        theirs.sort_unstable();
        assert_eq!(ours, theirs, "case {case}");
    }
}

#[test]
fn a_scene_has_at_most_a_hundred_detections() {
    let corners: Vec<[f32; 4]> = (0..256)
        .map(|cell| {
            let [x, y] = [cell % 16, cell / 16].map(|at| at as f32 * 8.0);
            [x, y, x + 8.0, y + 8.0]
        })
        .collect();
    let scores: Vec<f32> = (0..2560).map(|at| ((at * 7919) % 2560) as f32 / 2560.0).collect();
    let found = nms::detections(&scores, &corners);
    // No boxes of a class overlap: the hundred highest of all.
    let mut highest = scores.clone();
    highest.sort_by(|a, b| b.total_cmp(a));
    let ours: Vec<f32> = found.iter().map(|one| one.score).collect();
    assert_eq!(ours, highest[..100]);
    let first = &found[0];
    let at = scores.iter().position(|score| *score == first.score).unwrap();
    assert_eq!((first.class, first.corners), (at / 256, corners[at % 256]));
}
