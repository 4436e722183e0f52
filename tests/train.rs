//! Training through the program: kills, signals, resumes, refusals.

#![cfg(feature = "train")]

#[expect(dead_code, reason = "most of what can go wrong is tested in the data plane")]
#[path = "../shards/tests/remote_server/mod.rs"]
mod remote_server;
mod support;
#[path = "support/tiny.rs"]
mod tiny;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use detco::checkpoint;
use remote_server::{Answer, Server};
use support::{DETCO, detco_fails, detco_ok, path, shards};
use tiny::TINY;

fn new_run<'a>(data: &'a Path, run: &'a Path, sets: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["train", "detco-small", "--data", path(data), "--out", path(run)];
    for set in TINY.iter().chain(sets) {
        args.extend(["--set", set]);
    }
    args
}

fn start(args: &[&str]) -> Child {
    let mut command = Command::new(DETCO);
    command.args(args).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().expect("the program starts")
}

/// `loss` by step; a step must not be written twice.
fn losses(run: &Path) -> BTreeMap<u64, String> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let mut losses = BTreeMap::new();
    for line in text.lines() {
        let value: serde_json::Value = serde_json::from_str(line).expect("whole lines");
        if let Some(loss) = value.get("loss") {
            let step = value["step"].as_u64().unwrap();
            assert!(losses.insert(step, loss.to_string()).is_none(), "step {step} twice");
        }
    }
    losses
}

fn assert_same_model(a: &Path, b: &Path) {
    let (a, b) = (checkpoint::open(a, None).unwrap(), checkpoint::open(b, None).unwrap());
    assert_eq!((a.state.step, a.state.cursor), (b.state.step, b.state.cursor));
    let pairs = [
        (a.model_tensors().unwrap(), b.model_tensors().unwrap()),
        (a.optim_tensors().unwrap(), b.optim_tensors().unwrap()),
    ];
    for (a, b) in pairs {
        let b: BTreeMap<_, _> = b.into_iter().collect();
        assert_eq!(a.len(), b.len());
        assert!(!a.is_empty());
        for (name, tensor) in a {
            assert!(tensor.equal(&b[&name]), "{name} differs");
        }
    }
}

fn wait_for_step(run: &Path, step: u64, child: &mut Child) {
    let start = Instant::now();
    loop {
        let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
        let seen = text.lines().filter(|line| line.contains("\"loss\"")).count() as u64;
        if seen >= step || child.try_wait().unwrap().is_some() {
            return;
        }
        assert!(start.elapsed() < Duration::from_secs(300), "no step {step} after five minutes");
        std::thread::sleep(Duration::from_millis(3));
    }
}

#[test]
fn a_run_killed_at_random_points_is_bit_identical_to_one_that_was_not() {
    let (folder, data) = shards(14); // 56 samples: 7 steps an epoch
    let sets = ["train.epochs=6", "checkpoint.every_steps=3", "data.workers=2"];
    let whole = folder.path().join("whole");
    detco_ok(&new_run(&data, &whole, &sets));

    let killed = folder.path().join("killed");
    let mut child = start(&new_run(&data, &killed, &sets));
    let mut kills = 0;
    for after in [4, 9, 10, 17, 22, 31, 38] {
        wait_for_step(&killed, after, &mut child);
        // Somewhere between two updates, in a write, in a rename: the clock decides.
        std::thread::sleep(Duration::from_millis(after * 7 % 23));
        child.kill().unwrap();
        kills += u32::from(!child.wait().unwrap().success());
        if checkpoint::list(&killed).unwrap().is_empty() {
            child = start(&new_run(&data, &killed, &sets));
        } else {
            child = start(&["train", "--resume", path(&killed)]);
        }
    }
    assert!(child.wait().unwrap().success(), "the last resume runs to the end");
    assert!(kills >= 3, "{kills} kills hit a running process");
    assert_eq!(losses(&whole).len(), 42);
    assert_eq!(losses(&whole), losses(&killed), "after {kills} kills");
    assert_same_model(&whole, &killed);
    println!("{kills} kills, 42 steps: losses, weights, momentum and queues bit-identical");
}

#[test]
fn workers_and_batches_ahead_do_not_change_a_bit() {
    let (folder, data) = shards(8);
    let (one, three) = (folder.path().join("one"), folder.path().join("three"));
    detco_ok(&new_run(&data, &one, &["train.epochs=2", "data.workers=1", "data.batches_ahead=1"]));
    detco_ok(&new_run(
        &data,
        &three,
        &["train.epochs=2", "data.workers=3", "data.batches_ahead=5"],
    ));
    assert_eq!(losses(&one), losses(&three));
    assert_same_model(&one, &three);
}

/// Also the one of a terminal that closes.
#[test]
fn a_signal_writes_a_checkpoint_and_says_so_with_its_code() {
    use rustix::process::Signal;

    let (folder, data) = shards(8);
    for signal in [Signal::TERM, Signal::HUP] {
        let run = folder.path().join(format!("{signal:?}"));
        // Whoever runs the tests under nohup has SIGHUP ignored, and so has the program then.
        let mut command = Command::new("env");
        command.args(["--default-signal=HUP", DETCO]);
        command.args(new_run(&data, &run, &["train.epochs=500", "checkpoint.every_epochs=0"]));
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().expect("env starts");
        wait_for_step(&run, 3, &mut child);
        let id = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(id, signal).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(75), "{signal:?}");
        let saved = checkpoint::open(&run, None).unwrap();
        assert!(saved.state.step >= 3, "step {}", saved.state.step);
        assert_eq!(losses(&run).len() as u64, saved.state.step);
    }
}

#[test]
fn each_knn_is_written_once_however_often_a_run_is_resumed() {
    let (folder, data) = shards(8); // 32 samples: 4 steps an epoch
    let run = folder.path().join("run");
    let test = format!("monitor.knn_test=[{data:?}]");
    let sets =
        [test.as_str(), "monitor.knn_every_epochs=1", "train.epochs=2", "checkpoint.keep=10"];
    detco_ok(&new_run(&data, &run, &[&sets[..], &["checkpoint.every_epochs=1"]].concat()));
    assert_eq!(knn_steps(&run), [0, 4, 8]);
    let resume = || {
        let output = support::detco(&["train", "--resume", path(&run)]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        said
    };
    let said = resume();
    assert!(said.contains("nothing was left to do") && said.contains("--init "), "{said}");
    assert_eq!(knn_steps(&run), [0, 4, 8]);

    // The last one is not written down, as after a signal: it is made up for, once.
    let metrics = run.join("metrics.jsonl");
    let whole = std::fs::read_to_string(&metrics).unwrap();
    let (before, last) = whole.trim_end().rsplit_once('\n').unwrap();
    assert!(last.contains("knn/top1"), "{last}");
    std::fs::write(&metrics, format!("{before}\n")).unwrap();
    for _ in 0..2 {
        resume();
        assert_eq!(knn_steps(&run), [0, 4, 8]);
    }
    // From the untrained network, whose kNN is written down.
    for name in checkpoint::list(&run).unwrap().iter().skip(1) {
        std::fs::remove_dir_all(run.join("checkpoints").join(name)).unwrap();
    }
    resume();
    assert_eq!(knn_steps(&run), [0, 4, 8]);
    assert_eq!(losses(&run).len(), 8);
}

/// Under `nohup` a run outlives its terminal.
#[test]
fn a_hangup_that_is_ignored_stays_ignored() {
    let (folder, data) = shards(8);
    let run = folder.path().join("run");
    let mut command = Command::new("nohup");
    command.arg(DETCO).args(new_run(&data, &run, &["train.epochs=500"]));
    command.stdout(Stdio::null()).stderr(Stdio::null()).stdin(Stdio::null());
    let mut child = command.spawn().expect("nohup is there");
    wait_for_step(&run, 3, &mut child);
    let id = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(id, rustix::process::Signal::HUP).unwrap();
    wait_for_step(&run, losses(&run).len() as u64 + 10, &mut child);
    assert!(child.try_wait().unwrap().is_none(), "it has ended");
    child.kill().unwrap();
    child.wait().unwrap();
}

/// A log on a full disk, or a `tee` that has ended.
#[test]
fn a_run_goes_on_where_nobody_reads_what_it_says() {
    let (folder, data) = shards(8);
    let run = folder.path().join("run");
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").expect("Linux has it");
    let run_with = |args: &[&str]| {
        let mut command = Command::new(DETCO);
        command.args(args).stdout(full()).stderr(full()).status().expect("it starts").code()
    };
    let args = new_run(&data, &run, &["train.epochs=2", "monitor.every_steps=1"]);
    assert_eq!(run_with(&args), Some(0));
    assert_eq!(losses(&run).len(), 8);
    // Results that cannot be written are an error, and no panic.
    let knn = ["eval", "knn", path(&run), "--train", path(&data), "--test", path(&data)];
    let weights = folder.path().join("weights.pth");
    let export = ["export", path(&run), "-o", path(&weights)];
    let dry = [&args[..], &["--dry-run"]].concat();
    let print = ["train", "detco-small", "--print-config"];
    for args in [&knn[..], &[&knn[..], &["--json"]].concat(), &export, &dry, &print] {
        assert_eq!(run_with(args), Some(1), "{args:?}");
    }
    assert!(weights.is_file());
}

#[test]
fn a_run_goes_on_from_the_newest_checkpoint_that_is_whole() {
    let (folder, data) = shards(8);
    let run = folder.path().join("run");
    detco_ok(&new_run(&data, &run, &["train.epochs=3", "checkpoint.every_epochs=1"]));
    let whole = folder.path().join("whole");
    detco_ok(&new_run(&data, &whole, &["train.epochs=3", "checkpoint.every_epochs=1"]));
    let newest = checkpoint::open(&run, None).unwrap().folder;
    let model = newest.join("model.safetensors");
    let bytes = std::fs::read(&model).unwrap();
    std::fs::write(&model, &bytes[..1000]).unwrap();
    let copy = run.join("config.toml");
    let text = std::fs::read_to_string(&copy).unwrap();
    std::fs::write(&copy, text.replace("weight_decay = ", "weight_decay = 1")).unwrap();
    let output = support::detco(&["train", "--resume", path(&run)]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    for words in [
        "size in bytes is 1000",
        "is damaged",
        "goes on from",
        "step-000000008",
        "optim.weight_decay: the run has",
        "a copy that no run reads",
    ] {
        assert!(said.contains(words), "{words} is not in\n{said}");
    }
    assert_same_model(&whole, &run);
    assert_eq!(losses(&whole), losses(&run));
    let damaged = run.join("checkpoints/damaged-1-step-000000012/model.safetensors");
    assert_eq!(std::fs::read(damaged).unwrap().len(), 1000, "kept as it was");
}

#[test]
fn a_diverging_run_stops_before_its_weights_are_touched() {
    let (folder, data) = shards(8);
    let run = folder.path().join("run");
    let sets = ["train.epochs=50", "optim.lr=1e30", "checkpoint.every_steps=1"];
    let error = detco_fails(&new_run(&data, &run, &sets), 70);
    assert!(error.contains("not finite") && error.contains("step-0000000"), "{error}");
    let saved = checkpoint::open(&run, None).unwrap();
    for (name, tensor) in saved.model_tensors().unwrap() {
        let finite = tensor.isfinite().all().int64_value(&[]) == 1;
        assert!(finite, "{name} of {}", saved.folder.display());
    }
}

#[test]
fn a_collapse_is_named() {
    let (folder, data) = shards(8);
    let run = folder.path().join("run");
    // The threshold is put where any network lies below it.
    let sets = ["train.epochs=50", "monitor.collapse_share=0.99", "monitor.collapse_steps=5"];
    let error = detco_fails(&new_run(&data, &run, &sets), 70);
    assert!(error.contains("collapse: since step 1 ") && error.contains("Res"), "{error}");
}

/// Steps before a restart count.
#[test]
fn a_collapse_goes_on_over_a_restart() {
    let (folder, data) = shards(8);
    let run = folder.path().join("run");
    let sets = ["train.epochs=50", "monitor.collapse_share=0.99", "monitor.collapse_steps=5"];
    let resume = |steps| support::detco(&["train", "--resume", path(&run), "--set", steps]);
    detco_ok(&new_run(&data, &run, &[&sets[..], &["train.steps_max=2"]].concat()));
    let saved = checkpoint::open(&run, None).unwrap().state.collapsing;
    assert!(saved.contains(&Some(1)), "{saved:?}");
    assert!(resume("train.steps_max=4").status.success());
    let output = resume("train.steps_max=50");
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(70), "{error}");
    assert!(error.contains("collapse: since step 1 ") && error.contains(" at step 5)"), "{error}");
}

#[test]
fn what_cannot_be_resumed_says_why() {
    let (folder, data) = shards(8);
    let run = folder.path().join("run");
    detco_ok(&new_run(&data, &run, &["train.epochs=1"]));

    let error = detco_fails(&new_run(&data, &run, &["train.epochs=1"]), 1);
    assert!(error.contains("already holds checkpoints"), "{error}");

    let error = detco_fails(&["train", "--resume", path(&run), "--set", "optim.lr=0.1"], 1);
    assert!(error.contains("change the mathematics"), "{error}");
    assert!(error.contains("optim.lr: the run has ") && error.contains("now 0.1"), "{error}");
    let again = new_run(&data, &run, &["train.epochs=2", "optim.momentum=0.5"]);
    let error = detco_fails(&[&again[..], &["--or-resume"]].concat(), 1);
    let changes = "optim.momentum: the run has 0.9, now 0.5; train.epochs: the run has 1, now 2.";
    assert!(error.contains(changes) && !error.contains("--set with"), "{error}");

    let (_other, data) = shards(9);
    let error = detco_fails(&["train", "--resume", path(&run), "--data", path(&data)], 1);
    assert!(error.contains("the data is not what the run was started with"), "{error}");

    let nowhere = folder.path().join("nowhere");
    let error = detco_fails(&["train", "--resume", path(&nowhere)], 1);
    assert!(error.contains("holds no checkpoint"), "{error}");

    std::fs::rename(folder.path().join("shards"), folder.path().join("moved")).unwrap();
    let error = detco_fails(&["train", "--resume", path(&run)], 1);
    assert!(error.contains("--data SHARDS says where the data is now"), "{error}");
}

#[test]
fn a_run_in_use_is_left_alone() {
    let (folder, data) = shards(8);
    let run = folder.path().join("run");
    let mut child = start(&new_run(&data, &run, &["train.epochs=500"]));
    wait_for_step(&run, 2, &mut child);
    let error = detco_fails(&["train", "--resume", path(&run)], 1);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(error.contains("in use by another process"), "{error}");
}

#[test]
fn a_damaged_sample_ends_a_run_or_is_replaced() {
    let (folder, data) = shards(8);
    let shard = data.join("000000.tar");
    let mut bytes = std::fs::read(&shard).unwrap();
    // The first JPEG's payload begins after its header: nothing of it is left but its place.
    bytes[512..1024].fill(0);
    std::fs::write(&shard, bytes).unwrap();

    let run = folder.path().join("fail");
    let error = detco_fails(&new_run(&data, &run, &["train.epochs=1"]), 65);
    assert!(error.contains("000000.tar") && error.contains("byte 512"), "{error}");

    let run = folder.path().join("skip");
    let skip = ["train.epochs=2", "data.on_bad_sample=skip", "data.bad_share_max=0.05"];
    // The monitor meets the sample as well, and goes by the same policy.
    let test = format!("monitor.knn_test=[{data:?}]");
    let monitor = [test.as_str(), "monitor.knn_every_epochs=1"];
    let output = support::detco(&new_run(&data, &run, &[&skip[..], &monitor].concat()));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("2 bad samples replaced by others: see "), "{said}");
    let quarantine = std::fs::read_to_string(run.join("quarantine.jsonl")).unwrap();
    assert_eq!(quarantine.lines().count(), 2, "once an epoch: {quarantine}");
    assert_eq!(losses(&run).len(), 8);

    // One is always allowed, unless none is.
    let run = folder.path().join("one");
    let skip = ["train.epochs=1", "data.on_bad_sample=skip"];
    detco_ok(&new_run(&data, &run, &skip));
    let run = folder.path().join("budget");
    let none = [&skip[..], &["data.bad_share_max=0"]].concat();
    let error = detco_fails(&new_run(&data, &run, &none), 65);
    assert!(error.contains("more than the budget of 0"), "{error}");
    let quarantine = std::fs::read_to_string(run.join("quarantine.jsonl")).unwrap();
    assert!(quarantine.lines().count() == 1 && quarantine.contains("000000.tar"), "{quarantine}");
}

#[test]
fn a_set_with_1_percent_damaged_trains_under_2_percent_and_stops_under_the_default() {
    let (folder, data) = shards(50); // 200 samples in shards of 20: 25 steps an epoch
    for shard in ["000002.tar", "000007.tar"] {
        let shard = data.join(shard);
        let mut bytes = std::fs::read(&shard).unwrap();
        bytes[512..1024].fill(0);
        std::fs::write(&shard, bytes).unwrap();
    }
    let skip = [
        "train.epochs=2",
        "checkpoint.every_steps=4",
        "data.workers=2",
        "data.on_bad_sample=skip",
        "data.bad_share_max=0.02",
    ];
    let whole = folder.path().join("whole");
    detco_ok(&new_run(&data, &whole, &skip));
    assert_eq!(losses(&whole).len(), 50, "every batch is full, so every step is there");
    let quarantine = std::fs::read_to_string(whole.join("quarantine.jsonl")).unwrap();
    assert_eq!(quarantine.lines().count(), 4, "two an epoch: {quarantine}");
    for shard in ["000002.tar", "000007.tar"] {
        assert_eq!(quarantine.matches(shard).count(), 2, "{quarantine}");
    }

    let killed = folder.path().join("killed");
    let mut child = start(&new_run(&data, &killed, &skip));
    wait_for_step(&killed, 18, &mut child);
    child.kill().unwrap();
    child.wait().unwrap();
    detco_ok(&["train", "--resume", path(&killed)]);
    assert_eq!(losses(&whole), losses(&killed));
    assert_same_model(&whole, &killed);

    let run = folder.path().join("default");
    let error = detco_fails(&new_run(&data, &run, &skip[..4]), 65);
    assert!(error.contains("more than the budget of 1 (data.bad_share_max)"), "{error}");
}

#[test]
fn moco_trains_with_the_same_code() {
    let (folder, data) = shards(8);
    let run = folder.path().join("run");
    let mut args = new_run(&data, &run, &["train.epochs=2", "train.accumulate=2"]);
    args[1] = "moco-v2-small";
    detco_ok(&args);
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    assert!(text.contains("loss/res5/gg") && !text.contains("/ll"), "{text}");
}

#[test]
fn a_dry_run_says_what_a_run_will_take_and_writes_nothing() {
    let (folder, data) = shards(8);
    let run = folder.path().join("run");
    let mut args = new_run(&data, &run, &["train.epochs=3", "train.accumulate=2"]);
    args.push("--dry-run");
    let text = detco_ok(&args);
    for line in
        ["samples        32", "steps          12: 3 epochs of 4", "2 micro-batches", "sum", "fits"]
    {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    assert!(!run.exists());
    let error = detco_fails(&["train", "detco-small", "--dry-run"], 1);
    assert!(error.contains("no shards"), "{error}");
}

/// From a URL with room for all it is the run that it is from the folder; in windows it is another,
/// which goes on after a stop as if there had been none, also with more room than before.
#[test]
fn training_from_a_url_is_training_from_its_folder() {
    let (folder, data) = shards(14); // three shards; 7 steps an epoch
    let server = Server::start(folder.path(), |request| match request.before {
        0 if request.name.ends_with(".tar") => Answer::DropAfter(5000),
        _ => Answer::Well,
    });
    let (url, cache) = (server.url("shards"), folder.path().join("cache"));
    let cache = format!("data.cache={}", path(&cache));
    let run = |name: &str| folder.path().join(name);
    let sets = ["train.epochs=2", cache.as_str()];
    detco_ok(&new_run(&data, &run("local"), &sets));
    detco_ok(&new_run(Path::new(&url), &run("url"), &sets));
    assert_same_model(&run("local"), &run("url"));

    let windowed = [&sets[..], &["data.window=1"]].concat();
    detco_ok(&new_run(Path::new(&url), &run("whole"), &windowed));
    assert_ne!(losses(&run("whole")), losses(&run("local")));
    let stopped = [&windowed[..], &["train.steps_max=5"]].concat();
    detco_ok(&new_run(Path::new(&url), &run("parts"), &stopped));
    let parts = run("parts");
    detco_ok(&["train", "--resume", path(&parts), "--set", "train.steps_max=0"]);
    assert_same_model(&run("whole"), &parts);
    let error = detco_fails(
        &["train", "--resume", path(&parts), "--set", "data.window=2", "--set", "train.epochs=2"],
        1,
    );
    assert!(error.contains("not data.window"), "{error}");
}

/// Neither the run's configuration nor a checkpoint keeps what a URL holds of secrets; so a run from
/// signed URLs goes on with new ones.
#[test]
fn a_run_keeps_no_secret_of_its_urls() {
    let (folder, _) = shards(14);
    let server = Server::start(folder.path(), |request| match request.query.as_str() {
        "sv=1&sig=first-signature" | "sv=2&sig=second-signature" => Answer::Well,
        _ => Answer::Status(403),
    });
    let cache = format!("data.cache={}", path(&folder.path().join("cache")));
    let url = |query: &str| {
        let url = server.url(&format!("shards?{query}"));
        url.replace("http://", "http://me:pass-word@")
    };
    let run = folder.path().join("run");
    let (first, second) = (url("sv=1&sig=first-signature"), url("sv=2&sig=second-signature"));
    let sets = ["train.steps_max=1", cache.as_str()];
    detco_ok(&new_run(Path::new(&first), &run, &sets));
    let mut folders = vec![run.clone(), folder.path().join("cache")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let bytes = std::fs::read(&path).unwrap();
            let holds = |word: &[u8]| bytes.windows(word.len()).any(|bytes| bytes == word);
            let secret = [&b"signature"[..], b"pass-word"].into_iter().any(holds);
            assert!(!secret, "{}", path.display());
        }
    }
    let run = path(&run);
    let error = detco_fails(&["train", "--resume", run, "--set", "train.steps_max=2"], 1);
    assert!(error.contains("shards?…") && error.contains("name the data again"), "{error}");
    let more = ["train", "--resume", run, "--set", "train.steps_max=2", "--data", &second];
    detco_ok(&more);
    let printed = detco_ok(&["train", "detco-small", "--data", &second, "--print-config"]);
    assert!(printed.contains("shards?…") && !printed.contains("pass-word"), "{printed}");
}

/// Shards made for something else: labels as words, or none.
#[test]
fn labels_that_are_no_numbers_stop_only_who_counts_classes() {
    use detco_shards::format::writer::ShardWriter;

    let folder = tempfile::tempdir().unwrap();
    support::images(&folder.path().join("images"), 1, 16);
    let mut shard = ShardWriter::create(folder.path(), "a.tar").unwrap();
    for i in 0..16 {
        let jpeg = std::fs::read(folder.path().join(format!("images/class0/{i:04}.jpg"))).unwrap();
        shard.append(&format!("{i:04}.jpg"), &jpeg).unwrap();
        let label = ["3", "dog", "-1"].get(i % 4);
        if let Some(label) = label {
            shard.append(&format!("{i:04}.cls"), label.as_bytes()).unwrap();
        }
    }
    shard.finish().unwrap().seal().unwrap();
    let data = folder.path().join("a.tar");
    let run = folder.path().join("run");
    detco_ok(&new_run(&data, &run, &["train.epochs=1"]));
    let text = detco_ok(&["inspect", path(&data)]);
    assert!(text.contains("1, of 4 to 4 samples"), "{text}");
    assert!(
        text.contains("8; training needs none. The first: ") && text.contains("`dog`"),
        "{text}"
    );
    let error =
        detco_fails(&["eval", "knn", path(&run), "--train", path(&data), "--test", path(&data)], 1);
    assert!(error.contains("0001") && error.contains("`dog`, a class number"), "{error}");
}

/// Rates, learning rate and epoch are those of the updates that a record names, whenever it is written.
#[test]
fn a_record_is_of_its_own_updates() {
    let (folder, data) = shards(8); // four steps an epoch
    let run = folder.path().join("run");
    let sets = ["train.epochs=3", "method.fill_first=false", "optim.schedule=cosine"];
    detco_ok(&new_run(&data, &run, &sets));
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let records = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let steps: Vec<_> = records.filter(|record| record.get("loss").is_some()).collect();
    assert_eq!(steps.len(), 12);
    let (base, mut rates) = (0.2, Vec::new());
    for record in &steps {
        let step = record["step"].as_u64().unwrap();
        assert_eq!(record["epoch"], (step - 1) / 4, "{record}");
        let share = record["wait_share"].as_f64().unwrap();
        assert!((0.0..=1.0).contains(&share), "{record}");
        rates.push(record["lr"].as_f64().unwrap());
    }
    assert!((rates[0] - base).abs() < 1e-9, "{rates:?}");
    assert!(rates[11] > 0.0 && rates[11] < rates[0], "{rates:?}");
}

/// The lines of a file of the run, as JSON.
fn json_lines(path: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).expect("whole lines")).collect()
}

fn steps_of(lines: &[serde_json::Value]) -> Vec<u64> {
    lines.iter().map(|line| line["step"].as_u64().unwrap()).collect()
}

/// A step has one number in all files, the number of updates made with it; files from before it was so are counted
/// on when a run is resumed.
#[test]
fn steps_have_one_number_in_all_files_of_a_run() {
    let (folder, data) = shards(8); // four steps an epoch
    let shard = data.join("000000.tar");
    let mut bytes = std::fs::read(&shard).unwrap();
    bytes[512..1024].fill(0);
    std::fs::write(&shard, bytes).unwrap();
    let run = folder.path().join("run");
    let sets =
        ["train.epochs=2", "monitor.samples=true", "data.on_bad_sample=skip", "train.steps_max=5"];
    detco_ok(&new_run(&data, &run, &sets));
    let [samples, quarantine] = ["samples.jsonl", "quarantine.jsonl"].map(|name| run.join(name));
    assert_eq!(losses(&run).into_keys().collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    assert_eq!(steps_of(&json_lines(&samples)), [1, 2, 3, 4, 5]);
    let bad = json_lines(&quarantine);
    for one in &bad {
        let of_step = |line: &&serde_json::Value| line["step"] == one["step"];
        let lines = json_lines(&samples);
        let made_of = lines.iter().find(of_step).unwrap()["samples"].as_array().unwrap().clone();
        assert!(made_of.contains(&one["substitute"]), "{one} is not in {made_of:?}");
    }

    // As they were written before: from 0, without a rank.
    for file in [&samples, &quarantine] {
        let old = json_lines(file).into_iter().map(|mut line| {
            line["step"] = (line["step"].as_u64().unwrap() - 1).into();
            line.as_object_mut().unwrap().remove("rank");
            format!("{line}\n")
        });
        std::fs::write(file, old.collect::<String>()).unwrap();
    }
    detco_ok(&["train", "--resume", path(&run), "--set", "train.steps_max=0"]);
    assert_eq!(steps_of(&json_lines(&samples)), (1..=8).collect::<Vec<_>>());
    assert_eq!(json_lines(&quarantine).len(), 2, "once an epoch");
    assert!(json_lines(&quarantine).starts_with(&bad), "what was there stays");
}

#[test]
fn pixels_are_mathematics_and_who_decodes_is_not_where_it_is_the_cpu() {
    let (folder, data) = shards(8);
    let run = folder.path().join("run");
    detco_ok(&new_run(&data, &run, &["train.epochs=1"]));
    let resumed = |set| ["train", "--resume", path(&run), "--set", set];
    let error = detco_fails(&resumed("data.reduce=false"), 1);
    assert!(error.contains("data.reduce: the run has true, now false"), "{error}");
    let error = detco_fails(&resumed("data.decode=nvjpeg"), 1);
    assert!(error.contains("data.decode: the run has \"auto\", now \"nvjpeg\""), "{error}");
    // On the CPU as before.
    detco_ok(&resumed("data.decode=cpu"));
}

/// The disk fails below the newest checkpoint: EIO, as /proc/self/mem gives it.
#[test]
fn a_checkpoint_that_the_disk_cannot_read_is_named_and_the_one_before_is_taken() {
    let (folder, data) = shards(8);
    let run = folder.path().join("run");
    detco_ok(&new_run(&data, &run, &["train.epochs=2"]));
    let newest = checkpoint::open(&run, None).unwrap().folder.join("optim.safetensors");
    std::fs::remove_file(&newest).unwrap();
    std::os::unix::fs::symlink("/proc/self/mem", &newest).unwrap();
    let output = support::detco(&["train", "--resume", path(&run)]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let read = format!("cannot read {}: Input/output error", newest.display());
    assert!(said.contains(&read) && said.contains("goes on from"), "{said}");
    assert_eq!(losses(&run).len(), 8);
}

/// Its shards cannot be had, whatever the policy says of bad samples: a restart may help.
#[test]
fn a_store_that_is_lost_ends_a_run_with_its_own_code() {
    let (folder, data) = shards(14); // three shards
    assert!(data.join("000001.tar").is_file());
    let server = Server::start(folder.path(), |request| match request.name.as_str() {
        "000001.tar" => Answer::Status(403),
        _ => Answer::Well,
    });
    let url = server.url("shards");
    for policy in ["fail", "skip"] {
        let run = folder.path().join(policy);
        let cache = format!("data.cache={}", path(&folder.path().join(format!("cache-{policy}"))));
        let policy = format!("data.on_bad_sample={policy}");
        let sets = ["train.epochs=1", cache.as_str(), policy.as_str(), "data.bad_share_max=1.0"];
        let error = detco_fails(&new_run(Path::new(&url), &run, &sets), 69);
        assert!(error.contains("000001.tar") && error.contains("cannot be had"), "{error}");
        assert!(!run.join("quarantine.jsonl").exists(), "no sample is bad");
    }
}

/// kNN records of a run: the steps they are of.
fn knn_steps(run: &Path) -> Vec<u64> {
    let lines = json_lines(&run.join("metrics.jsonl"));
    let of_knn = lines.into_iter().filter(|line| line.get("knn/top1").is_some());
    steps_of(&of_knn.collect::<Vec<_>>())
}

#[test]
fn a_knn_that_a_signal_cut_off_is_owed_and_none_is_written_twice() {
    let (folder, data) = shards(150); // long enough to be met by a signal, on most machines
    let run = folder.path().join("run");
    let test = format!("monitor.knn_test=[{data:?}]");
    let sets = [
        test.as_str(),
        "monitor.knn_every_epochs=1",
        "train.epochs=1",
        "train.steps_max=0",
        "train.batch=64",
        "checkpoint.keep=9",
    ];
    let mut child = start(&new_run(&data, &run, &sets));
    let steps = 9; // of 600 samples
    wait_for_step(&run, steps, &mut child);
    let id = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(id, rustix::process::Signal::TERM).unwrap();
    let (code, found) = (child.wait().unwrap().code(), knn_steps(&run));
    let cut_off = found == [0];
    assert!(cut_off || found == [0, steps], "{found:?}");
    assert_eq!(code, Some(if cut_off { 75 } else { 0 }), "{found:?}");
    println!("the signal met the last kNN: {cut_off}");
    detco_ok(&["train", "--resume", path(&run)]);
    assert_eq!(knn_steps(&run), [0, steps]);
    // From the first checkpoint, whose kNN is there already.
    let newest = checkpoint::open(&run, None).unwrap().folder;
    assert!(checkpoint::list(&run).unwrap().len() > 1);
    std::fs::remove_dir_all(newest).unwrap();
    assert_eq!(checkpoint::open(&run, None).unwrap().state.step, 0);
    detco_ok(&["train", "--resume", path(&run)]);
    assert_eq!(knn_steps(&run), [0, steps]);
}

#[test]
fn a_second_signal_ends_a_run_at_once_and_wrong_words_are_usage() {
    use rustix::process::Signal;

    let (folder, data) = shards(8);
    let run = folder.path().join("run");
    let mut child = start(&new_run(&data, &run, &["train.epochs=500"]));
    wait_for_step(&run, 2, &mut child);
    let id = rustix::process::Pid::from_child(&child);
    for signal in [Signal::TERM, Signal::INT] {
        rustix::process::kill_process(id, signal).unwrap();
    }
    let code = child.wait().unwrap().code();
    assert!(matches!(code, Some(130 | 143)), "{code:?}");
    detco_fails(&["train", "--no-such-flag"], 2);
    let table = detco_ok(&["train", "--help"]);
    for line in detco::exit::TABLE.lines() {
        assert!(table.contains(line.trim()), "{line} is not in\n{table}");
    }
    let codes =
        [detco::exit::ERROR, detco::exit::BAD_DATA, detco::exit::LOST, detco::exit::DIVERGED];
    for code in codes.into_iter().chain([detco::exit::STOPPED]) {
        assert!(
            detco::exit::TABLE.lines().any(|line| line.trim().starts_with(&format!("{code} ")))
        );
    }
}

/// What limits files in size stands for a full disk: at the first checkpoint the run ends with a word, and no
/// signal; later it goes on as long as an older one is whole.
#[test]
fn a_disk_that_is_full_ends_a_run_only_where_nothing_was_saved() {
    use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};

    let (folder, data) = shards(8);
    let run = folder.path().join("none");
    let args = new_run(&data, &run, &["train.epochs=1"]);
    let limit = Command::new("bash")
        .args(["-c", "ulimit -f 100; exec \"$0\" \"$@\"", DETCO])
        .args(&args)
        .output();
    let output = limit.expect("bash is there");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("File too large") && said.contains("`ulimit -f`"), "{said}");
    assert_eq!(checkpoint::list(&run).unwrap().len(), 0);

    let run = folder.path().join("later");
    let sets = ["train.epochs=500", "checkpoint.every_steps=2", "monitor.every_steps=1"];
    let mut command = Command::new(DETCO);
    command.args(new_run(&data, &run, &sets)).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    wait_for_step(&run, 3, &mut child);
    let id = Pid::from_child(&child);
    let set = |current| {
        let limit = Rlimit { current, maximum: None };
        prlimit(Some(id), Resource::Fsize, limit).unwrap();
    };
    set(Some(400_000)); // more than the metrics of a hundred steps, less than a checkpoint
    let before = losses(&run).len() as u64;
    wait_for_step(&run, before + 8, &mut child);
    assert!(child.try_wait().unwrap().is_none(), "it has ended");
    let saved = checkpoint::list(&run).unwrap();
    assert!(!saved.is_empty());
    set(None);
    kill_process(id, Signal::TERM).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(75), "{said}");
    assert!(said.contains("no checkpoint of step ") && said.contains("training goes on"), "{said}");
    assert!(said.contains("`ulimit -f`"), "{said}");
    let state = checkpoint::open(&run, None).unwrap().state;
    assert_eq!(state.step, losses(&run).len() as u64, "saved when there was room again");
}

#[test]
fn a_dry_run_knows_ranks_monitor_disk_and_bad_samples() {
    let (folder, data) = shards(8);
    let (run, own) = (folder.path().join("run"), folder.path().join("monitor"));
    let images = folder.path().join("images");
    detco_ok(&["pack", path(&images), path(&own)]);
    let test = format!("monitor.knn_test=[{own:?}]");
    let sets = [test.as_str(), "monitor.knn_every_epochs=1", "train.epochs=3", "checkpoint.keep=4"];
    let dry = |sets: &[&str], more: &[&'static str]| -> Vec<String> {
        let args = [&new_run(&data, &run, sets)[..], more, &["--dry-run"]].concat();
        args.into_iter().map(String::from).collect()
    };
    let ok = |sets: &[&str], more: &[&'static str]| {
        let args = dry(sets, more);
        detco_ok(&args.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let fails = |sets: &[&str], more: &[&'static str]| {
        let args = dry(sets, more);
        detco_fails(&args.iter().map(String::as_str).collect::<Vec<_>>(), 1)
    };
    let text = ok(&sets, &["--ranks", "2"]);
    for line in [
        "2 ranks, each on the CPU",
        "batch 4 of each rank",
        "averaging",
        "kNN monitor    32 samples against 32",
        "checkpoints    a checkpoint takes ",
        ", 4 kept and one being written ",
        "warning: method.queue = 64 keys are more than the 32 samples",
        "GB free for each rank",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    assert!(!run.exists());
    // As the run would refuse.
    let error = fails(&sets, &["--ranks", "3"]);
    assert!(error.contains("do not divide into 3 ranks"), "{error}");
    let error = fails(&["monitor.knn_every_epochs=1", "monitor.knn_test=[\"nowhere\"]"], &[]);
    assert!(error.contains("nowhere"), "{error}");
    let no_weights = folder.path().join("none.pth");
    let error = fails(&[&format!("model.init={}", path(&no_weights))], &[]);
    assert!(error.contains("none.pth"), "{error}");
    assert!(!text.contains("will stop"), "{text}");
    // By arithmetic: 0.9 TB are not touched.
    let huge = ["model.width=512", "method.local_head=9c-9c", "model.backbone=resnet101"];
    let args = dry(&huge, &[]);
    let output = support::detco(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let both = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&both);
    assert!(said.contains("does not fit") || said.contains("no room for a checkpoint"), "{said}");

    let shard = data.join("000000.tar");
    let mut bytes = std::fs::read(&shard).unwrap();
    bytes[512..1024].fill(0);
    std::fs::write(&shard, bytes).unwrap();
    let text = ok(&sets, &[]);
    assert!(text.contains("000000.tar: sample ") && text.contains("at byte 512"), "{text}");
    assert!(text.contains("train will stop (data.on_bad_sample = \"fail\")"), "{text}");
    let text = detco_ok(&["inspect", path(&data)]);
    assert!(text.contains("train stops at these") && text.contains("at byte 512"), "{text}");
}

/// What is absurd is refused, with its bound or with what it would take; nothing ends by a signal.
#[test]
fn what_no_machine_has_memory_for_is_an_error() {
    let (folder, data) = shards(8);
    let run = folder.path().join("run");
    let wide = [
        "model.width=512",
        "method.local_head=9c-9c",
        "model.backbone=resnet101",
        "method.dim=8192",
    ];
    let error = detco_fails(&new_run(&data, &run, &wide), 1);
    assert!(
        error.contains("no memory for the model") || error.contains("no room for a checkpoint"),
        "{error}"
    );
    for (set, bound) in [
        ("method.queue=9007199254740992", "at most 16777216"),
        ("train.batch=1073741824", "1 to 1048576"),
        ("data.cache_size=\"9000000TB\"", "at most 1 EiB"),
        ("model.width=100000", "1 to 512"),
    ] {
        let error = detco_fails(&new_run(&data, &run, &[set]), 1);
        assert!(error.contains(bound), "{set}: {error}");
    }
    let out = folder.path().join("v.png");
    let sheet = ["views", path(&data), "-o", path(&out), "--samples", "1000"];
    let large = ["--set", "views.crops.size=4096", "--set", "views.patches.size=4095"];
    // Thirty-two rows fit; what is asked for is bounded by the samples there are.
    let patch = ["--set", "views.patches.grid.patch=1365"];
    let error = detco_fails(&[&sheet[..], &large, &patch].concat(), 1);
    assert!(error.contains("lower --samples"), "{error}");
}
