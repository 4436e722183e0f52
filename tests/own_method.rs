//! A method of another crate: registered through the public trait, it trains, saves and goes on as those of the
//! program do.
#![cfg(feature = "train")]

#[expect(dead_code, reason = "the program itself is not called but to pack images")]
mod support;

use detco::batch::Batch;
use detco::checkpoint;
use detco::config::{CROPS, Config};
use detco::method::{
    self, Around, Declare, Design, HeadDesign, Layer, Met, Method, PassDesign, Refused, Scores,
    Seen, StepError, TermDesign,
};
use detco::train::{Outcome, Start, train};
use serde::{Deserialize, Serialize};
use support::{path, shards};

/// Tells an image's mean colour from the pooled Res5.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Colour {
    scale: f64,
}

impl Default for Colour {
    fn default() -> Colour {
        Colour { scale: 1.0 }
    }
}

impl Declare for Colour {
    fn design(&self, channels: [i64; 4]) -> Design {
        let head = HeadDesign {
            scope: "colour".into(),
            whole: Layer::mlp(&[channels[3], 3]),
            width: 3,
            unit: false,
            ..HeadDesign::default()
        };
        let pass =
            PassDesign { scope: "colour".into(), group: CROPS.into(), images: 1, is_made: false };
        Design {
            groups: vec![CROPS.into()],
            heads: vec![head],
            passes: vec![pass],
            terms: vec![TermDesign { name: "res5/colour".into(), weight: self.scale }],
            readings: vec!["loss"],
            ..Design::default()
        }
    }

    fn check(&self, run: &Around<'_>) -> Result<(), Refused> {
        run.views(("views.crops", CROPS), |group| group.count == 1, "one view")
    }
}

impl Method for Colour {
    fn student(&self, batch: &Batch) -> Result<Seen, StepError> {
        let crop = &batch.exactly(CROPS, 1)?[0];
        let colour = crop.mean_dim([2_i64, 3].as_slice(), false, None); // [n, 3]
        Ok(Seen { images: vec![crop.shallow_clone()], labels: Some(colour) })
    }

    fn score(&self, met: &Met<'_>) -> Scores {
        let off = &met.outputs[0] - met.labels.unwrap();
        let loss = off.square().mean(None);
        let gradient = &off * (2.0 * self.scale * met.share / off.numel() as f64);
        Scores { readings: loss.view([1, 1]), gradients: vec![gradient] }
    }
}

fn losses(run: &std::path::Path) -> Vec<f64> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    lines.filter_map(|line| line["loss/res5/colour"].as_f64()).collect()
}

#[test]
fn a_method_of_another_crate_trains_ten_steps_and_goes_on() {
    method::register::<Colour>("colour").unwrap();
    assert_eq!(method::register::<Colour>("colour").unwrap_err().name, "colour");
    assert!(method::register::<Colour>("moco").is_err());

    let (folder, data) = shards(8); // 32 samples
    let file = folder.path().join("colour.toml");
    let text = "base = \"detco-small\"\n[method]\nname = \"colour\"\nscale = 2.0\n\
                [[views]]\nname = \"crops\"\ncount = 1\nsize = 32\n";
    std::fs::write(&file, text).unwrap();
    let load = |sets: &[&str]| {
        let small =
            ["model.width=8", "train.batch=16", "train.device=cpu", "monitor.every_steps=1"];
        let sets = small.iter().chain(sets).map(ToString::to_string).collect::<Vec<_>>();
        Config::load(path(&file), &sets)
    };
    let said = load(&["method.queue=64"]).unwrap_err().to_string();
    assert!(said.contains("unknown key `queue`") && said.contains("it is a key of moco"), "{said}");
    let said = load(&["views.crops.count=2"]).unwrap_err().to_string();
    assert!(said.contains("views.crops = 2 views: expected one view"), "{said}");

    let run = folder.path().join("run");
    let mut config = load(&["train.steps_max=10", "optim.lr=0.1"]).unwrap();
    config.data.shards = vec![path(&data).to_string()];
    let start = Start::New { run: run.clone(), config: Box::new(config), or_resume: false };
    assert_eq!(train(start, None).unwrap(), Outcome::Finished);
    let made = losses(&run);
    assert_eq!(made.len(), 10);
    let [first, last] = [&made[..5], &made[5..]].map(|losses| losses.iter().sum::<f64>());
    assert!(last < 0.9 * first, "it learns: {made:?}");
    let saved = checkpoint::open(&run, None).unwrap();
    assert_eq!((saved.state.step, saved.state.config.method.name()), (10, "colour"));
    let names: Vec<String> =
        saved.model_tensors().unwrap().into_iter().map(|(name, _)| name).collect();
    assert!(names.contains(&"query.colour.5.0.weight".to_string()), "{names:?}");
    assert!(
        names.iter().all(|name| name.starts_with("query.")),
        "no key encoder, no queues: {names:?}"
    );
    let overrides = vec!["train.steps_max=12".to_string()];
    let start = Start::Resume { run: run.clone(), overrides, data: Vec::new() };
    assert_eq!(train(start, None).unwrap(), Outcome::Finished);
    assert_eq!(losses(&run).len(), 12);
}
