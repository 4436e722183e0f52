//! `detco plan` as a program; the arithmetic is tested beside it.

use std::process::Command;

use serde_json::Value;

fn detco(words: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_detco")).arg("plan").args(words).output();
    let output = output.expect("the program starts");
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(text).expect("text"))
}

#[test]
fn eight_gpus_are_planned_for() {
    let (code, text) =
        detco(&["--gpus", "8", "--step-ms", "200", "--link", "1e6", "--latency-us", "0"]);
    assert_eq!(code, Some(0), "{text}");
    // 256 images in 0.2 s, 200 x 1,281,167 of them; 107.7 kB and 3.26 ms each.
    for words in ["1,280, 160 a GPU", "2.32 days", "138 MB/s", "0.5 a GPU", "Computing limits it"] {
        assert!(text.contains(words), "{words}: {text}");
    }
    let sent = "29 MB of images, 0.9 of embeddings, 561 of gradients a step";
    assert!(text.contains(sent), "{text}");
}

#[test]
fn json_holds_what_went_in_and_what_came_out() {
    let words = ["--gpus", "4", "--nodes", "2", "--net", "10", "--step-ms", "100", "--store", "50"];
    let (code, text) = detco(&[&words[..], &["--recipe", "moco-v2-r50", "--json"]].concat());
    assert_eq!(code, Some(0), "{text}");
    let found: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(found["forecast"]["bottleneck"], "store");
    assert_eq!(found["cluster"]["net"], 1.25e9);
    assert_eq!(found["model"]["image_values"], 3 * 224 * 224);
    let rate = found["forecast"]["images_per_s"].as_f64().unwrap();
    let image = found["cluster"]["image_bytes"].as_f64().unwrap();
    assert!((rate * image / 50e6 - 1.0).abs() < 1e-9, "{text}");
    assert!(found["text"].as_str().unwrap().starts_with("The store limits it"), "{text}");
}

#[test]
fn a_step_comes_from_the_gpu_check() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("results.json");
    let results =
        r#"{"device": "one", "step-detco-r50-kernels": {"batch": 256, "window_ms": 512.0}}"#;
    std::fs::write(&file, results).expect("writes");
    let file = file.to_str().expect("a plain name");
    let (code, text) = detco(&["--gpus", "1", "--gpu-check", file, "--json"]);
    assert_eq!(code, Some(0), "{text}");
    let found: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(found["forecast"]["images_per_s"], 500.0);
    let words = ["--gpus", "1", "--gpu-check", file, "--recipe", "moco-v2-r50"];
    let (code, text) = detco(&words);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("has no step of moco-v2-r50"), "{text}");
}

#[test]
fn what_makes_no_sense_is_refused() {
    let (code, text) = detco(&["--gpus", "8", "--nodes", "2", "--step-ms", "100"]);
    assert_eq!(code, Some(1));
    assert!(text.contains("2 nodes need --net"), "{text}");
    for words in [
        ["--step-ms", "0"],
        ["--step-ms", "-5"],
        ["--step-ms", "nan"],
        ["--gpus", "0"],
        ["--backward", "1.5"],
        ["--net", "inf"],
    ] {
        assert_eq!(detco(&[&["--gpus", "8", "--step-ms", "1"], &words[..]].concat()).0, Some(2));
    }
    let (code, text) = detco(&["--gpus", "1", "--step-ms", "1", "--profile", "nowhere.json"]);
    assert_eq!(code, Some(1));
    assert!(text.contains("cannot read nowhere.json"), "{text}");
}
