//! The first losses of every recipe, from JPEGs to the update: a change of any bit of views, order,
//! initial weights, loss or optimiser moves them, and is then a line of CHANGELOG.md.
//!
//! Each recipe is made small enough for a second a run: a narrow ResNet-18, small views, 8 samples.
//! `tests/golden.txt` holds five losses a recipe. Processors round differently, so losses are
//! held to [`TOLERANCE`]; `cargo xtask test --cpu LEVEL` runs this for SSE4, AVX2 and AVX-512.
#![cfg(feature = "train")]

#[path = "support/numerical.rs"]
#[expect(dead_code, reason = "no tensors are compared here")]
mod numerical;
#[expect(dead_code, reason = "nothing is refused here")]
mod support;

use std::collections::BTreeMap;
use std::path::Path;

use detco::config::{Config, PATCHES, RECIPES};
use detco::method::{Byol, Densecl, Jigsaw, Moco, Swav};
use support::{detco_ok, path, shards};

const STEPS: usize = 5;
/// Of a loss, relative. Between SSE4 and AVX2 with one and two threads losses differ by up to 2.4e-5.
const TOLERANCE: f64 = 2e-4;

/// What makes a recipe small. The learning rate is, too: what a ReLU decides otherwise on another processor, at
/// the recipes' rates, moves the fourth loss by two percent. Losses then show everything but the size of the
/// updates, which tests/parity.rs compares number by number. Everything else stays as the recipe has it.
const SMALL: [&str; 12] = [
    "model.backbone=resnet18",
    "model.width=8",
    "model.bn_splits=2",
    "train.batch=8",
    "train.device=cpu",
    "train.precision=f32",
    "train.epochs=1",
    "optim.lr=0.00001",
    "optim.lr_batch=8",
    "optim.warmup_epochs=0",
    "views.crops.size=32",
    "monitor.every_steps=1",
];

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden.txt");
const CHANGELOG: &str = include_str!("../CHANGELOG.md");

/// The first losses of a recipe's small form.
fn losses(recipe: &str, data: &Path, run: &Path) -> Vec<f64> {
    let config = Config::load(recipe, &[]).unwrap();
    let mut args = vec!["train", recipe, "--data", path(data), "--out", path(run)];
    let mut sets: Vec<String> = SMALL.map(String::from).to_vec();
    sets.push(format!("train.threads={}", numerical::set_threads()));
    if config.views.group(PATCHES).is_some() {
        sets.extend(["views.patches.size=36", "views.patches.grid.patch=8"].map(String::from));
    }
    for (group, small) in [("first", 32), ("second", 32), ("small", 16)] {
        if config.views.group(group).is_some() {
            sets.push(format!("views.{group}.size={small}"));
        }
    }
    if config.method.as_a::<Jigsaw>().is_some() {
        let more = ["method.hidden=16", "method.permutations=12", "views.patches.grid.shuffle=12"];
        sets.extend(more.map(String::from));
    }
    if config.method.as_a::<Moco>().is_some() {
        sets.extend(["method.dim=16", "method.queue=64"].map(String::from));
    }
    if config.method.as_a::<Densecl>().is_some() {
        // Of the smaller crops Res5 has one cell.
        let more = ["method.dim=16", "method.queue=64", "views.crops.size=64"];
        sets.extend(more.map(String::from));
    }
    if config.method.as_a::<Byol>().is_some() {
        sets.extend(["method.dim=16", "method.hidden=64"].map(String::from));
    }
    if config.method.as_a::<Swav>().is_some() {
        let more = ["method.dim=16", "method.hidden=64", "method.prototypes=32"];
        sets.extend(more.map(String::from));
    }
    for set in &sets {
        args.extend(["--set", set]);
    }
    detco_ok(&args);
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let records = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    records.filter_map(|record| record.get("loss")?.as_f64()).collect()
}

/// Recipes and their losses, one line each.
fn recorded(text: &str) -> BTreeMap<&str, Vec<f64>> {
    let line = |line: &'static str| {
        let mut words = line.split_whitespace();
        let recipe = words.next().expect("a recipe's name");
        (recipe, words.map(|word| word.parse().expect("a loss")).collect())
    };
    // Lives as long as the test: the file is read once.
    String::leak(text.to_string()).lines().map(line).collect()
}

#[test]
fn every_recipe_begins_with_the_losses_on_record() {
    let (folder, data) = shards(14); // 56 samples: 7 steps
    let found: Vec<(&str, Vec<f64>)> = RECIPES
        .iter()
        .map(|(recipe, ..)| {
            let losses = losses(recipe, &data, &folder.path().join(recipe));
            assert!(losses.len() >= STEPS, "{recipe}: {losses:?}");
            (*recipe, losses[..STEPS].to_vec())
        })
        .collect();
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        // What is within the tolerance stays: another processor's rounding is no change.
        let text = std::fs::read_to_string(FILE).unwrap_or_default();
        let before = recorded(&text);
        let same = |(loss, golden): (&f64, &f64)| (loss - golden).abs() <= TOLERANCE * golden.abs();
        let line = |(recipe, losses): &(&str, Vec<f64>)| {
            let kept = before.get(recipe).filter(|kept| losses.iter().zip(*kept).all(same));
            let losses: Vec<String> =
                kept.unwrap_or(losses).iter().map(|loss| format!("{loss:.9}")).collect();
            format!("{recipe} {}\n", losses.join(" "))
        };
        std::fs::write(FILE, found.iter().map(line).collect::<String>()).unwrap();
    }
    let text = std::fs::read_to_string(FILE).unwrap_or_default();
    let recorded = recorded(&text);
    let known: Vec<&str> = recorded.keys().copied().collect();
    let mut recipes: Vec<&str> = RECIPES.iter().map(|(recipe, ..)| *recipe).collect();
    recipes.sort_unstable();
    assert_eq!(known, recipes, "{FILE} has other recipes: UPDATE_GOLDEN=1 writes it anew");
    let mut largest: f64 = 0.0;
    for (recipe, losses) in &found {
        for (step, (loss, golden)) in losses.iter().zip(&recorded[recipe]).enumerate() {
            let off = (loss - golden).abs() / golden.abs();
            println!("{recipe} step {}: {loss:.6}, on record {golden:.6}, {off:.1e}", step + 1);
            largest = largest.max(off);
            assert!(
                off <= TOLERANCE,
                "{recipe}: the loss of step {} is {loss:.6}, and {golden:.6} is on record. If that is \
                 meant, UPDATE_GOLDEN=1 records it, and CHANGELOG.md says why",
                step + 1
            );
        }
    }
    println!("largest relative difference {largest:.1e}");
    let line = format!("golden losses {:08x}", crc32c::crc32c(text.as_bytes()));
    assert!(
        CHANGELOG.contains(&line),
        "a line of CHANGELOG.md says what changed and ends in ({line})"
    );
}
