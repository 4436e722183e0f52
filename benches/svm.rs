//! Time of the support vector machines of VOC 2007 on generated features: `cargo bench --bench svm`.
//!
//! 5,011 and 4,952 rows of 8,192 features, 20 classes, 19 costs, 3 folds: 1,140 machines to choose costs and 20 to
//! test. With `-- --scikit-learn PYTHON` a tenth of it, two classes of the twenty with all costs and folds, by
//! scikit-learn as the published scripts call it, a process a core, on the same features:
//!
//! ```text
//! cargo bench --bench svm -- --scikit-learn .venv/bin/python
//! ```
#![cfg(feature = "train")]

use std::ops::ControlFlow;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use detco::eval::svm::protocol::Set;
use detco::eval::svm::{Difficult, Label, Settings, costs_openselfsup, evaluate, normalised};
use detco::model::Draws;
use tch::{Kind, Tensor};

/// Classes of the tenth that scikit-learn does.
const TENTH: usize = 2;

struct Size {
    train: i64,
    test: i64,
    features: i64,
    classes: i64,
}

/// Rows as after a ReLU, from a few factors, noise, and what classes bring: `[n, d]`, and of each class who shows it.
fn generated(size: &Size) -> (Tensor, Vec<Vec<Label>>) {
    let (n, d, k) = (size.train + size.test, size.features, size.classes);
    let draw = |name: &str, shape: &[i64]| Draws::new(1, name, 0).normal(shape, 1.0);
    // From 4 % to 27 % of the images show a class; VOC's are 4 % to 42 %.
    let bounds = Tensor::linspace(1.7, 0.6, k, (Kind::Float, tch::Device::Cpu));
    let shows = draw("shows", &[n, k]).gt_tensor(&bounds).to_kind(Kind::Float);
    let factors = draw("factors", &[n, 64]).matmul(&draw("loadings", &[64, d])) / 8.0;
    let rows =
        factors + shows.matmul(&draw("centres", &[k, d])) * 0.15 + draw("noise", &[n, d]) * 0.5;
    let labels = (0..k).map(|class| {
        let of = Vec::<f32>::try_from(shows.select(1, class)).expect("a column of floats");
        of.into_iter().map(|one| if one > 0.0 { Label::Present } else { Label::Absent }).collect()
    });
    (rows.relu(), labels.collect())
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let measured = arguments.iter().any(|argument| argument == "--bench");
    let size = match measured {
        true => Size { train: 5011, test: 4952, features: 8192, classes: 20 },
        false => Size { train: 300, test: 200, features: 64, classes: 2 },
    };
    let (rows, labels) = generated(&size);
    let (train, test) = (rows.narrow(0, 0, size.train), rows.narrow(0, size.train, size.test));
    let cut = size.train as usize;
    let (of_train, of_test): (Vec<_>, Vec<_>) =
        labels.iter().map(|labels| (labels[..cut].to_vec(), labels[cut..].to_vec())).unzip();
    let settings =
        Settings { costs: costs_openselfsup(), folds: 3, difficult: Difficult::AsPublished };
    let start = Instant::now();
    let found = evaluate(
        &Set { rows: &train, labels: &of_train },
        &Set { rows: &test, labels: &of_test },
        &settings,
        &mut |stage| {
            eprintln!(
                "{} of {} after {:.1} s",
                stage.done,
                stage.total,
                start.elapsed().as_secs_f64()
            );
            ControlFlow::Continue(())
        },
    );
    let seconds = start.elapsed().as_secs_f64();
    let found = found.expect("a minimum").expect("nobody stops it");
    let mean = found.iter().map(|class| class.ap).sum::<f64>() / found.len() as f64;
    println!(
        "detco: {seconds:.1} s, mAP {mean:.2}, costs {:?}",
        found.iter().map(|class| class.cost).collect::<Vec<_>>()
    );
    let python = arguments.iter().position(|argument| argument == "--scikit-learn");
    let Some(python) = python.and_then(|at| arguments.get(at + 1)) else { return };
    let folder = tempfile::tempdir().expect("a temp folder");
    let file = folder.path().join("rows");
    let targets: Vec<Tensor> = of_train
        .iter()
        .take(TENTH)
        .map(|of| {
            let of: Vec<i64> =
                of.iter().map(|label| if *label == Label::Present { 1 } else { -1 }).collect();
            Tensor::from_slice(&of)
        })
        .collect();
    let tensors = [
        ("rows", normalised(&train)),
        ("targets", Tensor::stack(&targets, 1)),
        ("costs", Tensor::from_slice(&settings.costs)),
    ];
    Tensor::write_safetensors(&tensors, &file).expect("room for 330 MB");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/oracle/svm.py");
    let status = Command::new(python).arg(script).arg("timed").arg(&file).status();
    assert!(status.expect("Python starts").success());
    for class in found.iter().take(TENTH) {
        println!("detco: cost {}, cross-validation {:.4?}", class.cost, class.curve);
    }
}
