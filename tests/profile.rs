//! `detco profile`: the verdict names whatever is slow, and the program does what its page says.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use detco::config::{Window, gpu};
use detco::profile::Run;
use detco::profile::allocations::Counting;
use detco::profile::measure::{Mode, Plan, measure};
use detco_shards::device::{Decode, Number};
use detco_shards::format::writer::ShardWriter;
use detco_shards::stats::Stage;
use detco_shards::stream::ShardSet;
use detco_shards::trace::Trace;
use detco_shards::views::Recipe;
use serde_json::Value;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One shard of `samples` small JPEGs; those in `bad` hold no image.
fn shards(folder: &Path, samples: u32, bad: &[u32]) {
    std::fs::create_dir_all(folder).unwrap();
    let mut shard = ShardWriter::create(folder, "000000.tar").unwrap();
    for i in 0..samples {
        let picture = image::RgbImage::from_fn(90 + i % 13, 80 + i % 7, |x, y| {
            image::Rgb([(x * 2 + i) as u8, (y * 3) as u8, ((x ^ y) * 4 + i * 3) as u8])
        });
        let mut bytes = Vec::new();
        picture.write_to(&mut std::io::Cursor::new(&mut bytes), image::ImageFormat::Jpeg).unwrap();
        let bytes = if bad.contains(&i) { b"\xff\xd8 no image".to_vec() } else { bytes };
        shard.append(&format!("s{i:05}.jpg"), &bytes).unwrap();
    }
    shard.finish().unwrap().seal().unwrap();
}

fn set(folder: &Path) -> Arc<ShardSet> {
    Arc::new(ShardSet::open(&[folder.to_str().unwrap().to_owned()]).unwrap())
}

fn plan() -> Plan {
    Plan {
        mode: Mode::Detco,
        recipe: Recipe::detco().with_size(32),
        window: Window::All,
        seed: 7,
        batch: 16,
        decode: Decode::Cpu,
        gpu: gpu(Number::F32, None),
        batches_ahead: 3,
        reduce: true,
        workers: 2,
        seconds: 1.0,
        warm_up: 0.2,
        consumer: None,
        once: false,
        trace: None,
        handicap: None,
    }
}

fn run(set: &Arc<ShardSet>, plan: &Plan) -> Run {
    measure(set, plan, None).unwrap()
}

/// Measures with the first of these figures that gives what is expected, else with the last: on a machine
/// that is busy with other things a handicap must be larger to be the largest.
fn measured_with<T: Copy>(
    figures: [T; 3],
    measured: impl Fn(T) -> Run,
    expected: impl Fn(&Run) -> bool,
) -> Run {
    let [first, second, last] = figures;
    let found = [first, second].into_iter().map(&measured).find(&expected);
    found.unwrap_or_else(|| measured(last))
}

#[test]
fn the_verdict_names_the_stage_that_was_slowed() {
    let folder = tempfile::tempdir().unwrap();
    shards(folder.path(), 64, &[]);
    let set = set(folder.path());
    for (stage, name) in [
        (Stage::Read, "read"),
        (Stage::Decode, "decode"),
        (Stage::Views, "views"),
        (Stage::Get, "dispatch"),
        // Passed once a batch: with one sample a batch, once a sample.
        (Stage::Put, "put"),
    ] {
        let batch = if name == "put" { 1 } else { plan().batch };
        let slowed = |millis| {
            let handicap = Some((stage, Duration::from_millis(millis)));
            run(&set, &Plan { handicap, batch, ..plan() })
        };
        let found = measured_with([40, 160, 640], slowed, |run| run.verdict.bottleneck == name);
        assert_eq!(found.verdict.bottleneck, name, "{}", found.verdict.text);
        assert!(found.images > 0 && !found.verdict.text.is_empty());
        let Some(ms) = found.verdict.stage_ms.filter(|_| batch > 1) else { continue };
        // A sleep is never shorter; the last image of the window may lack it.
        assert!(ms >= 36.0, "{ms} ms: {}", found.verdict.text);
    }
}

#[test]
fn a_slow_consumer_is_named_with_the_headroom() {
    let folder = tempfile::tempdir().unwrap();
    shards(folder.path(), 64, &[]);
    let set = set(folder.path());
    let slow = |rate| run(&set, &Plan { consumer: Some(rate), batch: 4, ..plan() });
    let is_ahead = |run: &Run| {
        run.verdict.bottleneck == "consumer"
            && run.consumer.wait_share < 0.2
            && run.verdict.potential_images_per_s > 1.5 * run.images_per_s
    };
    let found = measured_with([20.0, 8.0, 4.0], slow, is_ahead);
    assert_eq!(found.verdict.bottleneck, "consumer", "{}", found.verdict.text);
    assert!(found.consumer.wait_share < 0.2, "{}", found.consumer.wait_share);
    assert!(found.verdict.potential_images_per_s > 1.5 * found.images_per_s);
    let rate = found.verdict.target_images_per_s.expect("the consumer's");
    assert!(found.images_per_s <= rate, "{} of {rate}", found.images_per_s);
    // A consumer far faster than the loader is not.
    let found = run(&set, &Plan { consumer: Some(1e7), ..plan() });
    assert_ne!(found.verdict.bottleneck, "consumer", "{}", found.verdict.text);
    assert_eq!(found.verdict.target_images_per_s, Some(1e7));
}

#[test]
fn every_mode_counts_what_it_does() {
    let folder = tempfile::tempdir().unwrap();
    shards(folder.path(), 64, &[5]);
    let set = set(folder.path());
    for mode in [Mode::Read, Mode::Decode, Mode::Supervised, Mode::Detco] {
        let found = run(&set, &Plan { mode, seconds: 0.6, ..plan() });
        assert_eq!((found.mode.as_str(), found.workers), (mode.name(), 2));
        assert!(found.windows.len() >= 3, "{:?}", found.windows);
        // How they follow the counts stands beside them: here a machine may pause in one of them.
        assert!(found.windows.iter().all(|rate| rate.is_finite() && *rate >= 0.0));
        assert!(found.windows.iter().sum::<f64>() > 0.0 && found.images_per_s > 0.0);
        let shares: f64 = found.stages.values().map(|time| time.share).sum();
        assert!((shares - 1.0).abs() < 1e-6, "{shares}");
        let cpu = |stage: &str| found.stages[stage].cpu_ms_per_image;
        assert_eq!(cpu("decode") > 0.0, mode != Mode::Read);
        let draws = matches!(mode, Mode::Supervised | Mode::Detco);
        assert_eq!(cpu("views") > 0.01, draws, "{mode:?}: {}", cpu("views"));
        assert_eq!(found.slabs.bytes > 0, draws);
        // Only reading does not notice that sample 5 is no image.
        assert_eq!(found.bad_samples, u64::from(mode != Mode::Read), "{mode:?}: one, often drawn");
        assert_eq!(found.bad_first.is_some(), mode != Mode::Read, "{mode:?}");
        assert!(found.bad_first.is_none_or(|first| first.contains("sample \"s00005\" at byte")));
        assert!(found.channels["tasks"].get.count > 0 && found.channels["slabs"].capacity == 4);
    }
}

/// Bad samples once each, however often they are drawn; what comes of them, and what else training refuses.
#[test]
fn what_training_would_do_is_foretold() {
    let folder = tempfile::tempdir().unwrap();
    shards(folder.path(), 64, &[5, 9]);
    let data = folder.path().to_str().unwrap();
    let quick = [data, "--seconds", "0.5", "--warm-up", "0", "--workers", "2"];
    let run = |sets: &[&str]| {
        let sets = sets.iter().flat_map(|set| ["--set", *set]);
        let args: Vec<&str> = quick.into_iter().chain(sets).collect();
        let output = detco(&args);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let text = run(&[]);
    for words in [
        "2 samples bad and replaced",
        "warning: train will refuse this data: 64 samples are fewer than one global batch of 256",
        "warning: 2 bad samples among 64: train will stop (data.on_bad_sample = \"fail\"). The first: ",
        ": sample \"s0000",
    ] {
        assert!(text.contains(words), "{words} is not in\n{text}");
    }
    let skip = ["data.on_bad_sample=skip", "train.batch=8", "model.bn_splits=2"];
    let text = run(&skip);
    assert!(
        text.contains("train will stop: 1 an epoch are allowed (data.bad_share_max)"),
        "{text}"
    );
    assert!(
        text.contains("warning: method.queue = 65536 keys are more than the 64 samples"),
        "{text}"
    );
    let text = run(&[&skip[..], &["data.bad_share_max=0.05"]].concat());
    assert!(text.contains("train will replace them") && !text.contains("will stop"), "{text}");
}

#[test]
fn steady_state_reuses_its_slabs() {
    let folder = tempfile::tempdir().unwrap();
    shards(folder.path(), 64, &[]);
    let found = run(&set(folder.path()), &plan());
    assert_eq!(found.slabs.count, 4);
    assert!(found.slabs.reuses > 0);
    // Tests beside this one allocate too: how little an image takes is checked of the program.
    assert!(found.allocations_per_image.is_some());
}

#[test]
fn a_timeline_has_the_spans_of_every_thread() {
    let folder = tempfile::tempdir().unwrap();
    shards(folder.path(), 64, &[]);
    let trace = Arc::new(Trace::new(10_000));
    run(&set(folder.path()), &Plan { trace: Some(Arc::clone(&trace)), ..plan() });
    let tracks = trace.take();
    let names: Vec<&str> = tracks.iter().map(|track| track.name.as_str()).collect();
    assert_eq!(names, ["consumer", "detco-dispatcher", "detco-worker-0", "detco-worker-1"]);
    let did = |track: usize, what: &str| tracks[track].spans.iter().any(|span| span.name == what);
    assert!(did(0, "wait") && did(0, "step") && did(1, "read ahead") && did(1, "wait for a slab"));
    for worker in [2, 3] {
        assert!(["get", "read", "decode", "views"].iter().all(|stage| did(worker, stage)));
        // One thread's spans follow each other.
        let spans = &tracks[worker].spans;
        assert!(spans.windows(2).all(|two| two[0].start + two[0].nanos <= two[1].start));
    }
}

#[test]
fn a_cold_run_reads_everything_once_at_most() {
    let folder = tempfile::tempdir().unwrap();
    shards(folder.path(), 64, &[]);
    let set = set(folder.path());
    let found = run(&set, &Plan { once: true, batch: 4, seconds: 60.0, warm_up: 60.0, ..plan() });
    assert!(found.images <= 64 && found.images >= 16, "{}", found.images);
    let error = measure(&set, &Plan { once: true, batch: 64, ..plan() }, None).unwrap_err();
    assert!(error.to_string().contains("smaller --batch"), "{error}");
}

fn detco(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_detco"));
    command.arg("profile").args(arguments).stdin(Stdio::null()).output().expect("starts")
}

fn said(output: &Output) -> String {
    String::from_utf8([&output.stdout[..], &output.stderr[..]].concat()).expect("text")
}

#[test]
fn the_program_says_who_decodes_and_what_it_missed() {
    let root = tempfile::tempdir().unwrap();
    shards(root.path(), 48, &[]);
    let run = |decode: &str| {
        let data = root.path().to_str().unwrap();
        let short = ["--seconds", "0.5", "--warm-up", "0", "--batch", "8"];
        let arguments = [&[data, "--decode", decode][..], &short].concat();
        let output = detco(&arguments);
        (output.status.success(), said(&output))
    };
    let (ok, cpu) = run("cpu");
    assert!(ok && cpu.contains(" on the CPU\n") && !cpu.contains("since"), "{cpu}");
    let (ok, auto) = run("auto");
    assert!(ok, "{auto}");
    let (ok, nvjpeg) = run("nvjpeg");
    if ok {
        assert!(nvjpeg.contains("decoding with nvJPEG 13"), "{nvjpeg}");
        assert!(nvjpeg.contains("share of the hardware: "), "{nvjpeg}");
    } else {
        let missing = ["CUDA", "--features nvjpeg"];
        assert!(missing.iter().any(|what| nvjpeg.contains(what)), "{nvjpeg}");
        assert_eq!(auto.matches(" on the CPU, since ").count(), 1, "said once: {auto}");
    }
    let (ok, wrong) = run("gpu");
    assert!(!ok && wrong.contains("auto, cpu or nvjpeg"), "{wrong}");
}

#[test]
fn the_program_writes_what_it_is_asked_for() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path().join("<i>data & \"more\"");
    shards(&data, 48, &[]);
    let file = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
    let (json, html, trace) = (file("p.json"), file("p.html"), file("t.json"));
    let data = data.to_str().unwrap();
    let quick = ["--recipe", "detco-small", "--batch", "8", "--seconds", "0.5", "--warm-up", "0.1"];
    let outputs = ["--workers", "1,2", "--json", &json, "--html", &html, "--trace", &trace];
    let output = detco(&[&[data], &quick[..], &outputs[..]].concat());
    let text = said(&output);
    assert!(output.status.success(), "{text}");
    assert!(output.stderr.is_empty(), "no progress line outside a terminal");
    for word in ["images/s", "views", "on a CPU", "times the first", "bottleneck", "page faults"] {
        assert!(text.contains(word), "{word}: {text}");
    }

    let report: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    assert_eq!((&report["version"], &report["runs"][1]["workers"]), (&1.into(), &2.into()));
    assert!(text.contains(report["verdict"]["text"].as_str().unwrap()));
    assert!(report["machine"]["cores"].as_u64().is_some_and(|cores| cores > 0));
    for run in report["runs"].as_array().unwrap() {
        assert!(run["images_per_s"].as_f64().unwrap() > 0.0);
        assert!(run["megabytes_per_s"].as_f64().unwrap() > 0.0);
        assert!(run["windows"].as_array().unwrap().len() >= 3);
        for stage in ["get", "read", "decode", "views", "put"] {
            for value in ["cpu_ms_per_image", "wall_ms_per_image", "share"] {
                assert!(run["stages"][stage][value].is_f64(), "{stage} {value}");
            }
        }
        for channel in ["tasks", "batches", "slabs"] {
            let channel = &run["channels"][channel];
            assert!(channel["get"]["p99"].is_f64() && channel["put"]["p50"].is_f64());
            assert!(channel["occupancy"].is_f64() && channel["capacity"].is_u64());
        }
        assert!(run["ops"]["resize crops"].as_f64().unwrap() > 0.0);
        assert!(run["page_faults"]["major"].is_u64() && run["slabs"]["reuses"].is_u64());
        assert!(run["allocations_per_image"].as_f64().is_some_and(|n| n < 100.0), "{run}");
        assert!(run["verdict"]["bottleneck"].is_string());
    }

    let page = std::fs::read_to_string(&html).unwrap();
    assert!(page.starts_with("<!doctype html>") && page.contains("<svg"));
    assert!(page.contains("&lt;i&gt;data &amp; &quot;more&quot;") && !page.contains("<i>"));
    assert!(!page.contains("http") && !page.contains("<script"), "nothing from elsewhere");
    assert!(page.contains("prefers-color-scheme: dark"));

    let timeline: Value = serde_json::from_slice(&std::fs::read(&trace).unwrap()).unwrap();
    let events = timeline["traceEvents"].as_array().unwrap();
    let tracks = events.iter().filter(|event| event["name"] == "thread_name").count();
    assert_eq!(tracks, 3 + 4, "workers, dispatcher and consumer of both runs");
    let left: Vec<_> = std::fs::read_dir(root.path()).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(left.len(), 4, "no temp file is left: {left:?}");
}

#[test]
fn json_on_standard_output_is_all_there_is() {
    let folder = tempfile::tempdir().unwrap();
    shards(folder.path(), 32, &[]);
    let data = folder.path().to_str().unwrap();
    let output = detco(&[
        data,
        "--json",
        "-",
        "--mode",
        "decode",
        "--batch",
        "4",
        "--seconds",
        "0.5",
        "--cold",
        "--consumer-rate",
        "50",
        "--workers",
        "1",
    ]);
    assert!(output.status.success(), "{}", said(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&report["settings"]["cold"], &report["runs"][0]["mode"]),
        (&true.into(), &"decode".into())
    );
    assert_eq!(report["settings"]["consumer_images_per_s"], 50.0);
}

#[test]
fn a_device_of_a_known_speed_is_simulated() {
    let folder = tempfile::tempdir().unwrap();
    shards(folder.path(), 32, &[]);
    let data = folder.path().to_str().unwrap();
    let quick = ["--recipe", "detco-small", "--batch", "4", "--seconds", "0.5", "--warm-up", "0"];
    let output = detco(&[&[data, "--json", "-", "--consumer-gflops", "10"], &quick[..]].concat());
    assert!(output.status.success(), "{}", said(&output));
    let settings = serde_json::from_slice::<Value>(&output.stdout).unwrap()["settings"].clone();
    let image = settings["consumer_gflops"][1].as_f64().unwrap();
    let rate = settings["consumer_images_per_s"].as_f64().unwrap();
    assert!(image > 0.0 && (rate * image - 10.0).abs() < 1e-6, "{settings}");
}

#[test]
fn mistakes_are_named_before_anything_is_measured() {
    let root = tempfile::tempdir().unwrap();
    let (data, empty) = (root.path().join("data"), root.path().join("empty"));
    shards(&data, 8, &[]);
    std::fs::create_dir(&empty).unwrap();
    let (data, empty) = (data.to_str().unwrap(), empty.to_str().unwrap());
    let missing = format!("{empty}/none/p.json");
    for (arguments, code, words) in [
        (&[][..], 2, "required"),
        (&["/nowhere/at/all"], 1, "/nowhere/at/all"),
        (&[empty], 1, empty),
        (&["ftp://host/train.tar"], 1, "ftp://host/train.tar"),
        (&[data, "--workers", "1,x"], 2, "\"x\" is no number"),
        (&[data, "--workers", "0"], 2, "from 1 to"),
        (&[data, "--workers", "2,2"], 2, "twice"),
        (&[data, "--seconds", "0"], 2, "at least 0.5"),
        (&[data, "--batch", "0"], 2, "0 is not in"),
        (&[data, "--mode", "all"], 2, "possible values"),
        (&[data, "--consumer-rate", "-5"], 2, "at least 0.001"),
        (&[data, "--consumer-rate", "5", "--consumer-gflops", "5"], 2, "cannot be used with"),
        (&[data, "--run", empty], 2, "cannot be used with"),
        (&["--run", empty, "--cold"], 2, "cannot be used with"),
        (&["--run", empty], 1, "config.toml"),
        (&[data, "--recipe", "detco-r5"], 1, "detco-r50"),
        (&[data, "--json", &missing], 1, &missing),
        (&[data, "--html", empty], 1, "is a folder"),
        (&[data, "--html", "x", "--json", "x"], 1, "two outputs"),
    ] {
        let output = detco(arguments);
        let text = said(&output);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
        assert!(text.contains(words), "{arguments:?}: {text}");
        assert!(output.stdout.is_empty(), "{arguments:?}: {text}");
        assert!(!text.contains("images/s"), "{arguments:?}: something was measured: {text}");
    }
    assert_eq!(std::fs::read_dir(empty).unwrap().count(), 0, "something was left behind");
}
