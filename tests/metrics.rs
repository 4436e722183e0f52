//! A run's TensorBoard events as an independent reader sees them.
#![cfg(feature = "train")]

mod export_oracle;

use std::path::PathBuf;

use detco::metrics::{Metrics, Record, Start, names};
use export_oracle::run;
use serde_json::Value;

fn events(folder: &std::path::Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let is_event = |path: &PathBuf| path.to_str().unwrap().contains("tfevents");
    let mut paths: Vec<PathBuf> = entries.filter(is_event).collect();
    paths.sort();
    paths
}

fn read(paths: &[PathBuf]) -> Vec<Value> {
    let arguments: Vec<&dyn AsRef<std::ffi::OsStr>> = paths.iter().map(|path| path as _).collect();
    let said = run("tfevents_read.py", &arguments);
    said.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn an_independent_reader_sees_the_events() {
    let folder = tempfile::tempdir().unwrap();
    let mut metrics = Metrics::open(folder.path(), Start::New).unwrap();
    let mut record = Record::new(1 << 40, 3);
    record.push(names::LOSS, 9.25);
    record.push(names::reading("loss", "res2/gl"), -0.5);
    metrics.write(&record).unwrap();
    metrics.sync().unwrap();
    drop(metrics);
    // A second start, within the same second or not, is a second file that comes after the first.
    let mut metrics = Metrics::open(folder.path(), Start::Resume { step: 700 }).unwrap();
    record.step = 701;
    metrics.write(&record).unwrap();
    let paths = events(folder.path());
    assert_eq!(paths.len(), 2);

    let first = read(&paths[..1]);
    assert_eq!(first.len(), 3);
    assert_eq!(first[0]["version"], "brain.Event:2");
    assert_eq!(first[2]["step"], 1_u64 << 40);
    assert_eq!(first[2]["values"]["loss"], 9.25);
    assert_eq!(first[2]["values"]["loss/res2/gl"], -0.5);
    assert_eq!(first[2]["values"]["epoch"], 3.0);
    assert!(first[2]["time"].as_f64().unwrap() > 1.7e9);
    let second = read(&paths[1..]);
    // The mark of a start makes TensorBoard drop what it has of this step and later ones.
    assert_eq!((&second[1]["session"], &second[1]["step"]), (&1.into(), &701.into()));
    assert_eq!(second[2]["step"], 701);
}
