//! A script of `tools/reference` at work, and errors against it.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::{Kind, Tensor};

/// Steps that are compared.
pub(crate) const STEPS: u64 = 5;

/// One each, so that both sides sum in the same order.
pub(crate) const THREADS: i32 = 1;

fn python() -> PathBuf {
    let own = || Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/python");
    let python = std::env::var_os("DETCO_PYTHON").map_or_else(own, PathBuf::from);
    assert!(python.is_file(), "no Python at {}: run `cargo xtask setup`", python.display());
    python
}

/// A script of `tools/reference` at work. Its `tensors.py` says how tensors travel.
pub(crate) struct Reference {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

/// What a tensor's bytes follow.
#[derive(Serialize, Deserialize)]
struct Head {
    name: String,
    dtype: String,
    shape: Vec<i64>,
}

impl Reference {
    pub(crate) fn start(script: &str, settings: &Value) -> Reference {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/reference").join(script);
        let mut child = Command::new(python())
            .arg(script)
            // torchvision makes this folder, which stays empty, wherever it is told to.
            .env("TORCHINDUCTOR_CACHE_DIR", env!("CARGO_TARGET_TMPDIR"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        writeln!(input, "{settings}").unwrap();
        Reference { child, input, output }
    }

    pub(crate) fn send<N: AsRef<str>, T: AsRef<Tensor>>(&mut self, group: &[(N, T)]) {
        for (name, tensor) in group {
            let (name, tensor) = (name.as_ref().to_string(), tensor.as_ref());
            let head = Head { name, dtype: dtype(tensor.kind()).into(), shape: tensor.size() };
            let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
            tensor.copy_data_u8(&mut bytes, tensor.numel());
            writeln!(self.input, "{}", serde_json::to_string(&head).unwrap()).unwrap();
            self.input.write_all(&bytes).unwrap();
        }
        writeln!(self.input).unwrap();
    }

    /// The next tensor of a group, `None` at its end.
    pub(crate) fn receive(&mut self) -> Option<(String, Tensor)> {
        let mut line = String::new();
        let read = self.output.read_line(&mut line).unwrap();
        assert!(read > 0, "the reference ended early");
        if line == "\n" {
            return None;
        }
        let Head { name, dtype: theirs, shape } = serde_json::from_str(&line).unwrap();
        let kinds = [Kind::Float, Kind::Double, Kind::Int64];
        let kind = kinds.into_iter().find(|kind| dtype(*kind) == theirs).unwrap();
        let numbers = usize::try_from(shape.iter().product::<i64>()).unwrap();
        let mut bytes = vec![0; numbers * kind.elt_size_in_bytes()];
        self.output.read_exact(&mut bytes).unwrap();
        Some((name, Tensor::from_data_size(&bytes, &shape, kind)))
    }

    pub(crate) fn end(self) {
        let Reference { mut child, input, output } = self;
        drop((input, output));
        let status = child.wait().expect("the reference was started by this test");
        assert!(status.success(), "the reference failed: {status}");
    }
}

/// What torch calls it.
pub(crate) fn dtype(kind: Kind) -> &'static str {
    match kind {
        Kind::Float => "float32",
        Kind::Double => "float64",
        Kind::Int64 => "int64",
        kind => panic!("nothing here is compared in {kind:?}"),
    }
}

/// `max |a - b| / max |b|`.
pub(crate) fn error(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    let (a, b) = (a.detach().to_kind(Kind::Double), b.detach().to_kind(Kind::Double));
    let scale = b.abs().max().double_value(&[]).max(f64::MIN_POSITIVE);
    (a - b).abs().max().double_value(&[]) / scale
}

/// Worst error of each kind, and where.
#[derive(Default)]
pub(crate) struct Worst(pub(crate) BTreeMap<String, (Vec<f64>, f64, String)>);

impl Worst {
    pub(crate) fn note(&mut self, kind: &str, name: &str, step: u64, error: f64) {
        assert!(!error.is_nan(), "{kind} {name} is not a number");
        let fresh = || (vec![0.0; STEPS as usize], -1.0, String::new());
        let (by_step, worst, place) = self.0.entry(kind.to_string()).or_insert_with(fresh);
        let of_step = &mut by_step[step as usize];
        *of_step = of_step.max(error);
        if error > *worst {
            (*worst, *place) = (error, format!("{name} after step {}", step + 1));
        }
    }
}
