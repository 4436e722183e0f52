//! The drawn numbers: ranges, distributions, independence, and that they depend on nothing else.

use detco_shards::views::{
    Crop, Grid, GridPlan, Group, Note, Op, RandAugment, Recipe, RecipeError, Rect, Region,
    SamplePlan, Shuffle, Step, Steps, ViewPlan, permutations,
};

const SAMPLES: u64 = 20_000;

fn draw_all(recipe: &Recipe) -> Vec<SamplePlan> {
    (0..SAMPLES).map(|sample| recipe.draw(500, 375, 42, 3, sample)).collect()
}

fn views(plans: &[SamplePlan]) -> impl Iterator<Item = &ViewPlan> + Clone {
    plans.iter().flat_map(|plan| &plan.views)
}

/// Of DetCo: the first two views are crops, the others are cut into patches.
fn crops(plans: &[SamplePlan]) -> impl Iterator<Item = &ViewPlan> + Clone {
    plans.iter().flat_map(|plan| &plan.views[..2])
}

fn patches(plans: &[SamplePlan]) -> impl Iterator<Item = &ViewPlan> + Clone {
    plans.iter().flat_map(|plan| &plan.views[2..])
}

fn grids(plans: &[SamplePlan]) -> impl Iterator<Item = &GridPlan> + Clone {
    views(plans).filter_map(|view| view.grid.as_ref())
}

/// The steps of a recipe's first group.
fn steps(recipe: &mut Recipe) -> &mut Vec<Step> {
    match &mut recipe.groups[0].steps {
        Steps::Own(steps) => steps,
        Steps::Of(_) => panic!("the first group's steps are its own"),
    }
}

/// Mean of `values` must be within six standard errors of that of `[from, to]` uniform, and all of
/// them inside.
fn hold_uniform(what: &str, values: &[f64], from: f64, to: f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
    let (want_mean, want_variance) = ((from + to) / 2.0, (to - from).powi(2) / 12.0);
    let error = 6.0 * (want_variance / n).sqrt();
    assert!((mean - want_mean).abs() < error, "{what}: mean {mean}, not {want_mean} +- {error}");
    assert!((variance / want_variance - 1.0).abs() < 0.05, "{what}: variance {variance}");
    // A tenth of the values in each tenth of the range.
    let mut tenths = [0.0; 10];
    for value in values {
        assert!((from..=to).contains(&(*value + 0.0)), "{what}: {value} not in [{from}, {to}]");
        tenths[(((value - from) / (to - from) * 10.0) as usize).min(9)] += 1.0;
    }
    let chi: f64 = tenths.iter().map(|c: &f64| (c - n / 10.0).powi(2) / (n / 10.0)).sum();
    assert!(chi < 40.0, "{what}: chi-squared {chi} with 9 degrees of freedom: {tenths:?}");
}

fn hold_share(what: &str, hits: usize, of: usize, want: f64) {
    let share = hits as f64 / of as f64;
    let error = 6.0 * (want * (1.0 - want) / of as f64).sqrt() + 1e-12;
    assert!((share - want).abs() <= error, "{what}: {share}, not {want} +- {error}");
}

#[test]
fn crops_have_torchvisions_distribution() {
    let plans = draw_all(&Recipe::detco());
    let area = 500.0 * 375.0;
    for (what, least, crops) in [
        ("crops", 0.2, crops(&plans).map(|v| v.crop).collect::<Vec<_>>()),
        ("patches", 0.6, patches(&plans).map(|v| v.crop).collect()),
    ] {
        for crop in &crops {
            assert!(crop.width > 0 && crop.left + crop.width <= 500, "{crop:?}");
            assert!(crop.height > 0 && crop.top + crop.height <= 375, "{crop:?}");
            let share = f64::from(crop.width) * f64::from(crop.height) / area;
            let ratio = f64::from(crop.width) / f64::from(crop.height);
            assert!((least - 0.01..=1.0).contains(&share), "{what}: {share}");
            assert!((0.74..1.35).contains(&ratio), "{what}: {ratio}");
        }
        // Where every box fits, nothing is rejected: positions and log ratios are uniform.
        let small: Vec<_> = crops
            .iter()
            .filter(|c| f64::from(c.width) * f64::from(c.height) / area < 0.5)
            .collect();
        if small.len() > 1000 {
            let log =
                |c: &&detco_shards::views::Rect| (f64::from(c.width) / f64::from(c.height)).ln();
            let ratios: Vec<f64> = small.iter().map(log).collect();
            // Whole sides of 160 pixels and more move the ratio by 0.006 at most.
            let bound = (4.0f64 / 3.0).ln() + 0.006;
            hold_uniform("log ratio", &ratios, -bound, bound);
        }
    }
}

/// A box of the whole image in a square: area share uniform, position uniform.
#[test]
fn crop_area_and_position_are_uniform() {
    let mut recipe = Recipe::moco_v2();
    recipe.groups[0].crop = Crop::random([0.1, 0.5]);
    let crops: Vec<_> = (0..SAMPLES)
        .flat_map(|s| recipe.draw(3000, 3000, 1, 0, s).views)
        .map(|view| view.crop)
        .collect();
    let share = |c: &detco_shards::views::Rect| f64::from(c.width) * f64::from(c.height) / 9e6;
    // Boxes have whole sides: the share moves by up to a row and a column of 3000.
    hold_uniform("area", &crops.iter().map(share).collect::<Vec<_>>(), 0.0996, 0.5004);
    let left = |c: &detco_shards::views::Rect| f64::from(c.left) / f64::from(3000 - c.width);
    hold_uniform("left", &crops.iter().map(left).collect::<Vec<_>>(), 0.0, 1.0);
    let top = |c: &detco_shards::views::Rect| f64::from(c.top) / f64::from(3000 - c.height);
    hold_uniform("top", &crops.iter().map(top).collect::<Vec<_>>(), 0.0, 1.0);
}

/// An image that no box fits into: torchvision's central box.
#[test]
fn strips_fall_back_to_the_centre() {
    let recipe = Recipe::moco_v2();
    for sample in 0..50 {
        for view in recipe.draw(1000, 100, 0, 0, sample).views {
            let crop = view.crop;
            assert!(crop.width <= 133 && crop.height <= 100, "{crop:?}");
        }
        for view in recipe.draw(1, 400, 0, 0, sample).views {
            assert_eq!((view.crop.left, view.crop.width, view.crop.height), (0, 1, 1));
            assert!(view.crop.top == 199 || view.crop.height == 1, "{:?}", view.crop);
        }
        for view in recipe.draw(1, 1, 0, 0, sample).views {
            assert_eq!((view.crop.width, view.crop.height), (1, 1));
        }
    }
}

fn value(op: &Op) -> (usize, f64) {
    match *op {
        Op::Brightness(x) => (0, x.into()),
        Op::Contrast(x) => (1, x.into()),
        Op::Saturation(x) => (2, x.into()),
        Op::Hue(x) => (3, x.into()),
        Op::Gray => (4, 0.0),
        Op::Blur(x) => (5, x.into()),
        _ => panic!("{op:?} is RandAugment's"),
    }
}

/// Fifteen operations, each as often and as strong as timm's `rand-n2-m10-mstd0.5` draws it, on the
/// global views alone.
#[test]
fn randaugment_has_timms_distribution() {
    let mut recipe = Recipe::detco();
    let own = Steps::Own(steps(&mut recipe).clone());
    recipe.groups[1].steps = own;
    *steps(&mut recipe) = vec![Step::RandAugment(RandAugment::default()), Step::Flip { p: 0.5 }];
    let plans = draw_all(&recipe);
    let mut kinds = std::collections::BTreeMap::<String, usize>::new();
    let (mut levels, mut negative, mut bicubics, mut affine) = (Vec::new(), 0, 0, 0);
    let mut counts = [0; 3];
    for view in crops(&plans) {
        counts[view.ops.len()] += 1;
        for op in &view.ops {
            let mut kind = format!("{op:?}").split(['(', ' ']).next().unwrap().to_owned();
            match *op {
                Op::Affine { matrix: [a, b, c, d, e, f], bicubic } => {
                    affine += 1;
                    bicubics += usize::from(bicubic);
                    let (name, x) = if a != 1.0 {
                        assert!((a - e).abs() < 1e-15 && (b + d).abs() < 1e-15);
                        // The centre stays where it is.
                        assert!((a * 112.0 + b * 112.0 + c - 112.0).abs() < 1e-9);
                        assert!((d * 112.0 + e * 112.0 + f - 112.0).abs() < 1e-9);
                        ("rotate", d.asin().to_degrees() / 30.0)
                    } else if b != 0.0 {
                        ("shear x", b / 0.3)
                    } else if d != 0.0 {
                        ("shear y", d / 0.3)
                    } else if c != 0.0 {
                        ("translate x", c / (0.45 * 224.0))
                    } else {
                        ("translate y", f / (0.45 * 224.0))
                    };
                    kind = name.into();
                    negative += usize::from(x < 0.0);
                    levels.push(x.abs());
                }
                Op::Saturation(x) | Op::Contrast(x) | Op::Brightness(x) | Op::Sharpness(x) => {
                    levels.push((f64::from(x) - 0.1) / 1.8);
                }
                Op::Posterize(bits) => assert!(bits == 4 || bits == 3, "{bits}"),
                Op::Solarize(threshold) => assert!((192..=256).contains(&threshold)),
                Op::SolarizeAdd(add) => assert!((85..=110).contains(&add)),
                _ => {}
            }
            *kinds.entry(kind).or_default() += 1;
        }
    }
    let (total, applied) = (2 * plans.len(), kinds.values().sum::<usize>());
    hold_share("none of two", counts[0], total, 0.25);
    hold_share("both", counts[2], total, 0.25);
    assert_eq!(kinds.len(), 15, "{kinds:?}");
    for (kind, count) in kinds {
        hold_share(&kind, count, applied, 1.0 / 15.0);
    }
    hold_share("negative", negative, affine, 0.5);
    hold_share("bicubic", bicubics, affine, 0.5);
    // 10 + 0.5 z, at most 10: half of them at the end, a sixth below 9.5.
    let n = levels.len();
    hold_share("at most", levels.iter().filter(|x| **x > 0.999_999).count(), n, 0.5);
    hold_share("a deviation less", levels.iter().filter(|x| **x < 0.95).count(), n, 0.158_66);
    let turned = |view: &ViewPlan| view.ops.iter().any(|op| matches!(op, Op::Affine { .. }));
    assert!(!patches(&plans).any(turned));

    let mut taken_over = recipe.clone();
    taken_over.groups[1].steps = Steps::Of("crops".to_owned());
    assert!(patches(&draw_all(&taken_over)).any(turned));
}

#[test]
fn colors_have_moco_v2s_distribution() {
    let plans = draw_all(&Recipe::detco());
    let mut values = vec![Vec::new(); 6];
    let mut orders = std::collections::BTreeMap::<Vec<usize>, usize>::new();
    let (mut flips, mut total) = (0, 0);
    for view in views(&plans) {
        total += 1;
        flips += usize::from(view.flip);
        let kinds: Vec<usize> = view.ops.iter().map(|op| value(op).0).collect();
        for op in &view.ops {
            values[value(op).0].push(value(op).1);
        }
        // Jitter all or nothing, then gray, then blur.
        let jitter: Vec<usize> = kinds.iter().copied().filter(|k| *k < 4).collect();
        assert!(jitter.is_empty() || jitter.len() == 4, "{kinds:?}");
        assert!(kinds[jitter.len()..].is_sorted() && kinds[..jitter.len()] == jitter[..]);
        if !jitter.is_empty() {
            *orders.entry(jitter).or_default() += 1;
        }
    }
    let jittered = values[0].len();
    hold_share("jitter", jittered, total, 0.8);
    hold_share("gray", values[4].len(), total, 0.2);
    hold_share("blur", values[5].len(), total, 0.5);
    hold_share("flip", flips, total, 0.5);
    for factor in &values[..3] {
        hold_uniform("factor", factor, 0.6, 1.4000001);
    }
    hold_uniform("hue", &values[3], -0.1000001, 0.1000001);
    hold_uniform("sigma", &values[5], 0.1, 2.0000001);
    assert_eq!(orders.len(), 24, "all orders of the four");
    for (order, count) in orders {
        hold_share(&format!("order {order:?}"), count, jittered, 1.0 / 24.0);
    }
}

#[test]
fn moco_v1_has_gray_first_jitter_always_and_no_blur() {
    let plans = draw_all(&Recipe::moco_v1());
    let mut grays = 0;
    let mut hues = Vec::new();
    for view in views(&plans) {
        let kinds: Vec<usize> = view.ops.iter().map(|op| value(op).0).collect();
        grays += usize::from(kinds[0] == 4);
        assert_eq!(kinds.len(), 4 + usize::from(kinds[0] == 4), "{kinds:?}");
        assert!(!kinds.contains(&5));
        hues.extend(view.ops.iter().filter(|op| matches!(op, Op::Hue(_))).map(|op| value(op).1));
    }
    hold_share("gray", grays, 2 * plans.len(), 0.2);
    hold_uniform("hue", &hues, -0.4000001, 0.4000001);
    assert!(grids(&plans).next().is_none());
}

#[test]
fn offsets_are_uniform_and_reach_21() {
    let plans = draw_all(&Recipe::detco());
    let n = grids(&plans).count() as f64;
    for cell in 0..9 {
        for axis in 0..2 {
            let mut counts = [0.0; 22];
            for local in grids(&plans) {
                counts[local.offsets[cell][axis] as usize] += 1.0;
            }
            let want = n / 22.0;
            let chi: f64 = counts.iter().map(|c: &f64| (c - want).powi(2) / want).sum();
            assert!(chi < 65.0, "cell {cell} axis {axis}: chi-squared {chi} with 21: {counts:?}");
        }
    }
    // Each cell and axis has its own: the correlation of any two is noise.
    let series = |cell: usize, axis: usize| -> Vec<f64> {
        grids(&plans).map(|l| f64::from(l.offsets[cell][axis])).collect()
    };
    let bound = 6.0 / n.sqrt();
    for (a, b) in [((0, 0), (0, 1)), ((0, 0), (1, 0)), ((4, 0), (8, 1)), ((2, 1), (3, 0))] {
        let r = correlation(&series(a.0, a.1), &series(b.0, b.1));
        assert!(r.abs() < bound, "offsets of {a:?} and {b:?}: correlation {r}");
    }
}

#[test]
fn permutations_are_uniform() {
    let plans = draw_all(&Recipe::detco());
    let total = grids(&plans).count();
    let mut counts = [[0usize; 9]; 9];
    for local in grids(&plans) {
        let mut sorted = local.order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, [0, 1, 2, 3, 4, 5, 6, 7, 8]);
        for (slot, cell) in local.order.iter().enumerate() {
            counts[slot][usize::from(*cell)] += 1;
        }
    }
    for (slot, row) in counts.iter().enumerate() {
        for (cell, count) in row.iter().enumerate() {
            hold_share(&format!("cell {cell} in slot {slot}"), *count, total, 1.0 / 9.0);
        }
    }
}

fn correlation(a: &[f64], b: &[f64]) -> f64 {
    let n = a.len() as f64;
    let (mean_a, mean_b) = (a.iter().sum::<f64>() / n, b.iter().sum::<f64>() / n);
    let covariance: f64 = a.iter().zip(b).map(|(x, y)| (x - mean_a) * (y - mean_b)).sum();
    let spread = |v: &[f64], mean: f64| v.iter().map(|x| (x - mean).powi(2)).sum::<f64>().sqrt();
    covariance / (spread(a, mean_a) * spread(b, mean_b))
}

/// The four views of a sample, the same view of neighbouring samples, epochs and seeds: unrelated.
#[test]
fn views_samples_epochs_and_seeds_are_independent() {
    let recipe = Recipe::detco();
    let area = |view: &ViewPlan| f64::from(view.crop.width) * f64::from(view.crop.height);
    let series = |seed: u64, epoch: u32, shift: u64, view: usize| -> Vec<f64> {
        (0..8000)
            .map(|sample| {
                let plan = recipe.draw(640, 480, seed, epoch, sample + shift);
                area(&plan.views[view])
            })
            .collect()
    };
    let base = series(9, 0, 0, 0);
    let bound = 6.0 / (base.len() as f64).sqrt();
    for (what, other) in [
        ("view 1", series(9, 0, 0, 1)),
        ("local 0", series(9, 0, 0, 2)),
        ("local 1", series(9, 0, 0, 3)),
        ("next sample", series(9, 0, 1, 0)),
        ("next epoch", series(9, 1, 0, 0)),
        ("next seed", series(10, 0, 0, 0)),
        ("far sample", series(9, 0, 1 << 40, 0)),
    ] {
        let r = correlation(&base, &other);
        assert!(r.abs() < bound, "{what}: correlation {r}, bound {bound}");
    }
    assert_eq!(recipe.draw(640, 480, 9, 0, 7), recipe.draw(640, 480, 9, 0, 7));
}

/// A plan survives JSON, and a recipe survives TOML's lack of null.
#[test]
fn plans_and_recipes_are_data() {
    let plan = Recipe::detco().draw(320, 240, 1, 2, 3);
    let text = serde_json::to_string(&plan).unwrap();
    assert_eq!(serde_json::from_str::<SamplePlan>(&text).unwrap(), plan);
    for name in Recipe::presets() {
        let recipe = Recipe::preset(name).unwrap();
        let text = serde_json::to_string(&recipe).unwrap();
        assert_eq!(serde_json::from_str::<Recipe>(&text).unwrap(), recipe, "{text}");
        recipe.validate().unwrap();
        recipe.with_size(32).validate().unwrap();
    }
    let read = |text: &str| serde_json::from_str::<Recipe>(text);
    assert_eq!(read("[]").unwrap(), Recipe { groups: Vec::new() });
    let group = |more: &str| read(&format!(r#"[{{"name": "image", "size": 224{more}}}]"#));
    assert_eq!(group("").unwrap().groups, [Group::default()]);
    for (more, named) in [
        (r#", "sise": 3"#, "unknown field `sise`"),
        (r#", "steps": [{"step": "gray", "q": 0.1}]"#, "unknown field `q`"),
        (r#", "steps": [{"step": "grey", "p": 0.1}]"#, "unknown variant `grey`"),
        (r#", "steps": [{"step": "gray"}]"#, "missing field `p`"),
        (r#", "steps": [{"step": "randaugment", "k": 3}]"#, "unknown field `k`"),
        (r#", "steps": 3"#, "a list of steps, or the name of a group"),
        (r#", "crop": {"share": 3}"#, "unknown field `share`"),
        (r#", "crop": {"center": 0.5, "scale": [0.1, 1.0]}"#, "a crop has one of"),
        (r#", "grid": {"cells": 3, "patch": 64, "shuffle": "much"}"#, "true, false, or the number"),
        (r#", "grid": {"cells": 3, "patch": 64, "shuffle": -1}"#, "a negative number"),
    ] {
        let error = group(more).unwrap_err().to_string();
        assert!(error.contains(named), "{more}: {error}");
    }
    // As recipes were written before views were a list.
    let old = read(r#"{"global": {"size": 224}, "local": false}"#).unwrap_err().to_string();
    assert!(old.contains("[[views]] with name = \"crops\""), "{old}");
    let [crops, patches] = &Recipe::detco().sections()[..] else { panic!("two groups") };
    assert_eq!((crops.views, crops.bytes()), (2, 224 * 224 * 3));
    assert_eq!((patches.views, patches.bytes()), (2, 9 * 64 * 64 * 3));
}

#[test]
fn a_recipe_of_some_groups_draws_for_the_first_what_all_draw() {
    let whole = Recipe::detco();
    assert_eq!(whole.only(&["crops"]), Recipe::moco_v2());
    let plan = whole.only(&["crops"]).draw(500, 375, 1, 2, 3);
    assert_eq!(plan.views, whole.draw(500, 375, 1, 2, 3).views[..2]);
    // Patches alone keep the steps that they took over.
    let patches = whole.only(&["patches"]);
    patches.validate().unwrap();
    assert_eq!(patches.steps(&patches.groups[0]).len(), 4);
    // A group of no views is left out.
    let mut without = whole;
    without.group_mut("patches").unwrap().count = 0;
    without.validate().unwrap();
    assert_eq!(without.draw(500, 375, 1, 2, 3).views, plan.views);
    assert_eq!(without.sections().len(), 1);
}

#[test]
fn impossible_recipes_are_named() {
    let broken = |change: fn(&mut Recipe)| {
        let mut recipe = Recipe::detco();
        change(&mut recipe);
        recipe.validate().unwrap_err()
    };
    fn grid(recipe: &mut Recipe) -> &mut Grid {
        recipe.groups[1].grid.as_mut().unwrap()
    }
    let name = || "patches".to_owned();
    assert_eq!(
        broken(|r| grid(r).patch = 86),
        RecipeError::PatchTooLarge { name: name(), patch: 86, cell: 85, size: 255 }
    );
    assert_eq!(
        broken(|r| r.groups[1].size = 256),
        RecipeError::NotAGrid { name: name(), size: 256, cells: 3 }
    );
    let of = |of: &str| RecipeError::StepsOf { name: name(), of: of.to_owned() };
    assert_eq!(broken(|r| r.groups[1].steps = Steps::Of("crop".into())), of("crop"));
    assert_eq!(broken(|r| r.groups[1].steps = Steps::Of("patches".into())), of("patches"));
    let repeated = RecipeError::RepeatedName { name: "crops".to_owned() };
    assert_eq!(broken(|r| r.groups[1].name = "crops".into()), repeated);
    fn crop(recipe: &mut Recipe, scale: [f64; 2]) {
        recipe.groups[0].crop = Crop::random(scale);
    }
    fn replace(recipe: &mut Recipe, at: usize, step: Step) {
        steps(recipe)[at] = step;
    }
    for (field, error) in [
        ("crops.steps.flip.p", broken(|r| replace(r, 3, Step::Flip { p: 1.5 }))),
        ("crops.crop.scale", broken(|r| crop(r, [0.0, 1.0]))),
        ("crops.crop.scale", broken(|r| crop(r, [0.9, 0.2]))),
        ("crops.crop.center", broken(|r| r.groups[0].crop = Crop::center(0.0))),
        ("crops.crop.resize", broken(|r| r.groups[0].crop.resize = Some(5000))),
        (
            "crops.steps.jitter.hue",
            broken(|r| match &mut steps(r)[0] {
                Step::Jitter { hue, .. } => *hue = 0.6,
                step => panic!("{step:?}"),
            }),
        ),
        (
            "crops.steps.blur.sigma",
            broken(|r| replace(r, 2, Step::Blur { p: 0.5, sigma: [0.1, f64::NAN] })),
        ),
        (
            "crops.steps.solarize.threshold",
            broken(|r| steps(r).push(Step::Solarize { p: 0.2, threshold: 257 })),
        ),
        ("crops.size", broken(|r| r.groups[0].size = 0)),
        ("crops.count", broken(|r| r.groups[0].count = 65)),
        ("count of all groups", broken(many)),
        ("name = \"Crops\"", broken(|r| r.groups[0].name = "Crops".into())),
        ("patches.grid.cells", broken(|r| grid(r).cells = 5)),
        ("patches.grid.patch", broken(|r| grid(r).patch = 0)),
        ("patches.grid.shuffle", broken(|r| grid(r).shuffle = Shuffle::Set(10_001))),
        (
            "crops.steps",
            broken(|r| {
                let again = steps(r)[0].clone();
                steps(r).push(again);
            }),
        ),
    ] {
        assert!(error.to_string().starts_with(field), "{error}");
    }
    let scale = |scale: [f64; 2]| {
        let mut recipe = Recipe::detco();
        recipe.groups[1].crop = Crop::random(scale);
        recipe.validate().unwrap_err().to_string()
    };
    // Not the smallest of all numbers, with its 324 digits.
    assert_eq!(scale([0.0, 0.0]), "patches.crop.scale = 0.0: must be above 0 and at most 1");
    assert_eq!(scale([0.5, 1.5]), "patches.crop.scale = 1.5: must be above 0 and at most 1");
    assert_eq!(scale([f64::NAN, 1.0]), "patches.crop.scale = NaN: must be above 0 and at most 1");
    let mut least = Recipe::detco();
    crop(&mut least, [5e-324, 5e-324]);
    least.validate().unwrap();
    let crop = least.draw(640, 480, 7, 0, 0).views[0].crop;
    assert!(crop.width > 0 && crop.height > 0, "{crop:?}");
}

/// Groups that are right by themselves, and too many together.
fn many(recipe: &mut Recipe) {
    recipe.groups =
        (0..5).map(|at| Group { name: format!("g{at}"), count: 64, ..Group::default() }).collect();
}

#[test]
fn solarize_and_flip_are_steps_with_probabilities_of_their_own() {
    let plans = draw_all(&Recipe::byol());
    for (at, blur, solarize) in [(0, 1.0, 0.0), (1, 0.1, 0.2)] {
        let views: Vec<&ViewPlan> = plans.iter().map(|plan| &plan.views[at]).collect();
        let count =
            |of: fn(&Op) -> bool| views.iter().filter(|view| view.ops.iter().any(of)).count();
        hold_share("blur", count(|op| matches!(op, Op::Blur(_))), views.len(), blur);
        hold_share("solarize", count(|op| *op == Op::Solarize(128)), views.len(), solarize);
        hold_share("flip", views.iter().filter(|view| view.flip).count(), views.len(), 0.5);
        hold_share("jitter", count(|op| matches!(op, Op::Hue(_))), views.len(), 0.8);
        // The last of its operations.
        let last = |view: &&ViewPlan| view.ops.iter().rposition(|op| *op == Op::Solarize(128));
        assert!(views.iter().all(|view| last(view).is_none_or(|at| at + 1 == view.ops.len())));
    }
    // Independent: a fifth of a tenth of the second views has both.
    let both = |plan: &&SamplePlan| {
        let ops = &plan.views[1].ops;
        ops.contains(&Op::Solarize(128)) && ops.iter().any(|op| matches!(op, Op::Blur(_)))
    };
    hold_share("both", plans.iter().filter(both).count(), plans.len(), 0.02);
}

/// Mirroring is last, unless something follows that knows left and right.
#[test]
fn a_flip_stands_before_what_turns() {
    let mut recipe = Recipe::moco_v2();
    let randaugment = Step::RandAugment(RandAugment { p: 1.0, n: 3, ..RandAugment::default() });
    *steps(&mut recipe) = vec![Step::Flip { p: 0.5 }, randaugment];
    let plans = draw_all(&recipe);
    let mut early = 0;
    for view in views(&plans) {
        let turn = view.ops.iter().position(|op| matches!(op, Op::Affine { .. }));
        let flip = view.ops.iter().position(|op| *op == Op::Flip);
        if let Some(flip) = flip {
            early += 1;
            assert!(!view.flip && turn == Some(flip + 1), "{view:?}");
        }
        assert!(!(view.flip && turn.is_some()), "{view:?}");
        assert_eq!(Note::of(view).flip, view.flip || flip.is_some());
    }
    assert!(early > 1000, "{early}");
    let mirrored = views(&plans).filter(|view| Note::of(view).flip).count();
    hold_share("flip", mirrored, 2 * plans.len(), 0.5);
}

#[test]
fn swavs_small_crops_are_small() {
    let plans = draw_all(&Recipe::swav());
    for plan in &plans {
        assert_eq!(plan.views.len(), 8);
        for (at, view) in plan.views.iter().enumerate() {
            let share = f64::from(view.crop.width) * f64::from(view.crop.height) / 187_500.0;
            let (size, least, most) = if at < 2 { (224, 0.14, 1.0) } else { (96, 0.05, 0.14) };
            assert_eq!(view.size, size);
            assert!((least - 0.005..=most + 0.005).contains(&share), "{share}");
        }
    }
    let bound = 6.0 / (plans.len() as f64).sqrt();
    let left = |at: usize| -> Vec<f64> {
        plans.iter().map(|plan| f64::from(plan.views[at].crop.left)).collect()
    };
    for at in 3..8 {
        let r = correlation(&left(2), &left(at));
        assert!(r.abs() < bound, "small crops 0 and {}: correlation {r}", at - 2);
    }
}

#[test]
fn jigsaws_labels_are_uniform_and_name_the_order() {
    let recipe = {
        let mut recipe = Recipe::jigsaw();
        recipe.groups[0].grid.as_mut().unwrap().shuffle = Shuffle::Set(50);
        recipe
    };
    let plans = draw_all(&recipe);
    let (mut counts, set) = ([0usize; 50], permutations(9, 50));
    for view in views(&plans) {
        let (grid, label) = (view.grid.as_ref().unwrap(), Note::of(view).permutation.unwrap());
        assert_eq!(grid.order, set[label as usize]);
        counts[label as usize] += 1;
        // 500 x 375 to a short side of 256, and 255 of it.
        assert_eq!((view.resized, view.crop.width, view.crop.height), (Some([341, 256]), 255, 255));
        assert!(view.crop.left <= 86 && view.crop.top <= 1);
        assert_eq!(Note::of(view).picture, [341, 256]);
    }
    for (label, count) in counts.into_iter().enumerate() {
        hold_share(&format!("label {label}"), count, plans.len(), 0.02);
    }
    let lefts: Vec<f64> = views(&plans).map(|view| f64::from(view.crop.left) / 86.0).collect();
    let mean = lefts.iter().sum::<f64>() / lefts.len() as f64;
    assert!((mean - 0.5).abs() < 0.015, "{mean}");
    let grays = views(&plans).filter(|view| view.ops == [Op::Gray]).count();
    hold_share("gray", grays, plans.len(), 0.66);
}

#[test]
fn quarter_turns_are_uniform_and_change_nothing_else() {
    let plans = draw_all(&Recipe::rotation());
    for turn in 0..4 {
        let count = views(&plans).filter(|view| Note::of(view).rotation == turn).count();
        hold_share(&format!("{turn} quarter turns"), count, plans.len(), 0.25);
    }
    let mut still = Recipe::rotation();
    still.groups[0].rotate = false;
    for (turned, still) in plans.iter().zip(draw_all(&still)).take(100) {
        assert_eq!(ViewPlan { rotation: 0, ..turned.views[0].clone() }, still.views[0]);
    }
}

#[test]
fn evaluations_boxes_do_not_depend_on_chance() {
    let draw = |recipe: &Recipe, sample| recipe.draw(500, 375, 1, 0, sample).views.remove(0);
    for (recipe, resized, crop) in [
        (Recipe::center(224, 0.875), None, [86, 23, 328, 328]),
        (Recipe::center(32, 1.0), None, [62, 0, 375, 375]),
        (Recipe::squash(256, 224), Some([341, 256]), [0, 0, 341, 256]),
    ] {
        let view = draw(&recipe, 0);
        let [left, top, width, height] = crop;
        assert_eq!((view.resized, view.crop), (resized, Rect { left, top, width, height }));
        assert_eq!(view, draw(&recipe, 1));
        assert_eq!((&view.ops[..], view.flip), (&[][..], false));
    }
    // torchvision's Resize(256) and CenterCrop(224).
    let mut usual = Recipe::center(224, 0.875);
    usual.groups[0].crop.resize = Some(256);
    assert_eq!(usual.groups[0].crop.region, Region::Center(0.875));
    let view = draw(&usual, 0);
    assert_eq!(view.crop, Rect { left: 58, top: 16, width: 224, height: 224 });
}
