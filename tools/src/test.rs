//! `cargo xtask test`: all tests, then those that need what this machine happens to have; or, with
//! `--cpu` or `--threads`, the numerical tests as another machine would run them.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::{check, shell};

/// Variables of other programs' that change what tests see: other packages for Python, colours in
/// words, and a launcher's world where the tests run inside a job.
const FOREIGN: [&str; 16] = [
    "PYTHONPATH",
    "PYTHONHOME",
    "CLICOLOR_FORCE",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_JOB_ID",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NTASKS",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
];

/// Tests whose numbers a processor's rounding reaches, and those of the views' vector code: the flag of
/// cargo, and its value.
const NUMERICAL: [(&str, &str); 16] = [
    ("--test", "golden"),
    ("--test", "knn"),
    ("--test", "linear"),
    ("--test", "model"),
    ("--test", "norm"),
    ("--test", "numerics"),
    ("--test", "parity"),
    ("--test", "parity_methods"),
    ("--test", "part"),
    ("--test", "pixels"),
    ("--test", "views"),
    ("--test", "views_digest"),
    ("--test", "views_oracle"),
    ("--test", "views_plain"),
    ("--test", "decode"),
    ("--test", "distributed"),
];

/// A kind of processor, and the variables that hold libraries and our own code to it.
struct Level {
    name: &'static str,
    /// Flags of /proc/cpuinfo that it takes.
    flags: &'static [&'static str],
    /// libtorch's own kernels, oneDNN, MKL, the views.
    variables: [(&'static str, &'static str); 4],
}

const LEVELS: [Level; 3] = [
    Level {
        name: "sse4",
        flags: &["sse4_1", "sse4_2"],
        variables: [
            ("ATEN_CPU_CAPABILITY", "default"),
            ("ONEDNN_MAX_CPU_ISA", "SSE41"),
            ("MKL_ENABLE_INSTRUCTIONS", "SSE4_2"),
            ("DETCO_SIMD", "plain"),
        ],
    },
    Level {
        name: "avx2",
        flags: &["avx2", "fma"],
        variables: [
            ("ATEN_CPU_CAPABILITY", "avx2"),
            ("ONEDNN_MAX_CPU_ISA", "AVX2"),
            ("MKL_ENABLE_INSTRUCTIONS", "AVX2"),
            ("DETCO_SIMD", "avx2"),
        ],
    },
    Level {
        name: "avx512",
        flags: &["avx512f", "avx512bw", "avx512vl", "avx512dq"],
        variables: [
            ("ATEN_CPU_CAPABILITY", "avx512"),
            ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE"),
            ("MKL_ENABLE_INSTRUCTIONS", "AVX512"),
            ("DETCO_SIMD", "avx2"),
        ],
    },
];

/// Something that a few tests need and many machines lack. Those tests are marked `#[ignore = "needs …"]`:
/// cargo counts them as ignored, and they run in a second pass where the machine has it.
struct Need {
    what: &'static str,
    is_here: fn(&Path) -> bool,
    /// The binaries of tests, and what the tests' names have in common.
    tests: (&'static [&'static str], &'static str),
}

const NEEDS: [Need; 5] = [
    Need { what: "a GPU", is_here: has_gpu, tests: (&["gpu", "norm"], "a_gpu") },
    Need {
        what: "the address ::1",
        is_here: |_| TcpListener::bind("[::1]:0").is_ok(),
        tests: (&["ranks"], "ipv6"),
    },
    Need {
        what: "the superuser, prlimit and setpriv, and a checkout that everybody may read",
        is_here: can_be_nobody,
        tests: (&["limits"], "no_more_threads"),
    },
    Need {
        what: "a kernel that does not promise more memory than there is",
        is_here: counts_memory,
        tests: (&["bounds"], "no_memory_holds"),
    },
    Need {
        what: "a folder of JPEGs named by DETCO_TEST_IMAGES",
        is_here: |_| std::env::var_os("DETCO_TEST_IMAGES").is_some(),
        tests: (&["decode", "pack"], "real_"),
    },
];

fn has_gpu(_root: &Path) -> bool {
    Path::new("/dev/nvidia0").exists()
}

fn counts_memory(_root: &Path) -> bool {
    std::fs::read_to_string("/proc/sys/vm/overcommit_memory").is_ok_and(|text| text.trim() != "1")
}

fn can_be_nobody(root: &Path) -> bool {
    let program = root.join("target/debug/detco");
    let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups", "prlimit", "--nofile=64"];
    let mut command = Command::new("setpriv");
    command.args(nobody).arg(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// All tests of the workspace; `arguments` go to `cargo test`, but for `--cpu` and `--threads`.
pub(crate) fn test(root: &Path, arguments: &[String]) -> Result<()> {
    let mut level = None;
    let mut threads = None;
    let mut rest = Vec::new();
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--cpu" => level = Some(self::level(arguments.next())?),
            "--threads" => {
                let value = arguments.next().context("--threads needs a number")?;
                ensure!(
                    value.parse().is_ok_and(|threads: u32| (1..=64).contains(&threads)),
                    "--threads {value}: expected a number from 1 to 64"
                );
                threads = Some(value);
            }
            "--" => {
                rest.push(argument);
                rest.extend(arguments.by_ref());
            }
            _ => rest.push(argument),
        }
    }
    check::ready(root)?;
    let mut command = cargo_test(root);
    if level.is_none() && threads.is_none() {
        shell::step(command.args(&rest))?;
        return if rest.is_empty() { needed(root) } else { Ok(()) };
    }
    for (name, value) in level.iter().flat_map(|level| level.variables) {
        command.env(name, value);
    }
    if let Some(threads) = threads {
        command.env("DETCO_TEST_THREADS", threads);
    }
    let said = level.map_or(String::new(), |level| format!(" held to {}", level.name));
    let threads = threads.map_or(String::new(), |threads| format!(" with --threads {threads}"));
    eprintln!("numerical tests{said}{threads}");
    let targets = NUMERICAL.iter().flat_map(|(flag, name)| [*flag, *name]);
    // Where one fails the others still say what moved.
    shell::step(command.arg("--no-fail-fast").args(targets).args(&rest))
}

/// The level of that name, if this processor has it.
fn level(name: Option<&String>) -> Result<&'static Level> {
    let names = LEVELS.each_ref().map(|level| level.name).join(", ");
    let name = name.with_context(|| format!("--cpu needs one of {names}"))?;
    let found = LEVELS.iter().find(|level| level.name == name);
    let level = found.with_context(|| format!("--cpu {name}: expected one of {names}"))?;
    let processor = std::fs::read_to_string("/proc/cpuinfo").context("/proc/cpuinfo")?;
    let flags = processor.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let lacks: Vec<&str> = level
        .flags
        .iter()
        .copied()
        .filter(|flag| !flags.split_whitespace().any(|has| has == *flag))
        .collect();
    if !lacks.is_empty() {
        bail!("--cpu {name}: this processor lacks {}", lacks.join(", "));
    }
    Ok(level)
}

/// What tests need beyond a machine's common parts: they run, or are said to have been left out.
fn needed(root: &Path) -> Result<()> {
    let (here, missing): (Vec<_>, Vec<_>) = NEEDS.iter().partition(|need| (need.is_here)(root));
    let mut command = cargo_test(root);
    for target in here.iter().flat_map(|need| need.tests.0) {
        command.args(["--test", target]);
    }
    command.args(["--", "--ignored"]).args(here.iter().map(|need| need.tests.1));
    if !here.is_empty() {
        shell::step(&mut command)?;
    }
    for need in missing {
        let (targets, name) = need.tests;
        eprintln!(
            "skipped: tests of {} with `{name}` in their names need {}",
            targets.join(", "),
            need.what
        );
    }
    Ok(())
}

fn cargo_test(root: &Path) -> Command {
    let mut command = shell::cargo(root);
    for name in FOREIGN {
        command.env_remove(name);
    }
    // The tests' servers are on loopback, whatever proxy the machine has.
    for name in ["NO_PROXY", "no_proxy"] {
        command.env(name, "127.0.0.1,localhost,::1");
    }
    // Threads of libtorch that wait for each other spin, by default so long that a second program on these cores
    // makes small operations twenty times slower.
    if std::env::var_os("OMP_WAIT_POLICY").is_none() && std::env::var_os("GOMP_SPINCOUNT").is_none()
    {
        command.env("GOMP_SPINCOUNT", "3000");
    }
    command.args(["test", "--workspace"]);
    command
}
