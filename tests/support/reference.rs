//! A script of `tools/reference` at work.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::{Kind, Tensor};

/// Steps that are compared.
pub(crate) const STEPS: u64 = 5;

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
