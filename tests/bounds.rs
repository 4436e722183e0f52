//! No configuration, however absurd, ends in a panic: it is refused, or all arithmetic that it goes into holds.

#![cfg(feature = "train")]

use detco::config::{Config, RECIPES};
use detco::disk::Disk;
use detco::feed::Way;
use detco::memory::{Needs, accumulate_for};
use detco::plan::Load;
use detco::profile::flops;
use detco::schedule::{learning_rate, steps_in_all, steps_to_fill};
use detco::shapes;
use detco_shards::device::{self, Number};
use detco_shards::order::Order;
use detco_shards::pipeline::{Loader, LoaderOptions, Views};
use proptest::prelude::*;
use tch::Device;

/// Keys of the configuration, all of them, as they are written out.
fn keys() -> Vec<String> {
    let all: Vec<String> = Config::default().flat().into_keys().collect();
    assert!(all.len() > 60, "{all:?}");
    all
}

/// A value in TOML: what is at home in configurations, what is at the edges of types, and any number.
fn value() -> impl Strategy<Value = String> {
    let edges = [
        "-9223372036854775808",
        "-1",
        "0",
        "1",
        "2",
        "3",
        "5",
        "7",
        "8",
        "16",
        "64",
        "255",
        "256",
        "512",
        "4096",
        "4097",
        "8192",
        "65536",
        "1048576",
        "1048577",
        "16777216",
        "2147483647",
        "2147483648",
        "4294967295",
        "4294967296",
        "9007199254740992",
        "9223372036854775807",
        "nan",
        "inf",
        "-inf",
        "-0.0",
        "1e-320",
        "1e-9",
        "0.5",
        "1.0",
        "1e308",
        "true",
        "false",
        "\"\"",
        "\"auto\"",
        "\"all\"",
        "\"cpu\"",
        "\"f32\"",
        "\"bf16\"",
        "\"resnet101\"",
        "\"cifar\"",
        "\"9c-9c\"",
        "\"pirl\"",
        "\"9223372036854775807\"",
        "\"18446744073709551615B\"",
        "\"99999999TB\"",
        "[]",
        "[2]",
        "[5]",
        "[2, 3, 4, 5]",
        "[0.0, 0.0]",
        "[1.0, 1.0, 1.0, 1.0]",
        "[nan]",
        "[1e-320, 1e308]",
        "[4294967295]",
        "{}",
    ];
    prop_oneof![
        6 => prop::sample::select(edges.to_vec()).prop_map(String::from),
        1 => any::<i64>().prop_map(|number| number.to_string()),
        1 => (0i64..5000).prop_map(|number| number.to_string()),
        1 => any::<f64>().prop_map(|number| format!("{number:?}")),
    ]
}

/// Everything that is computed of a configuration before the first tensor is made.
fn arithmetic(config: &Config) {
    let again = Config::from_toml(&config.to_toml(), "again").expect("what is legal stays legal");
    // Not a number is not itself.
    assert_eq!(again.to_toml(), config.to_toml());
    let (net, design) = (&config.model, config.design());
    let (parameters, model) = (shapes::parameters(net, &design), shapes::model_bytes(net, &design));
    assert!(parameters > 0 && model > parameters && shapes::checkpoint_bytes(config) > model);
    for ranks in [1, 3, 64] {
        for (device, way) in [
            (Device::Cpu, Way::Copied),
            (Device::Cuda(0), Way::Copied),
            (Device::Cuda(0), Way::Lent),
        ] {
            let needs = Needs::of(config, ranks, device, way);
            assert!(needs.sum() > 0 && !needs.to_string().contains('-'), "{needs}");
        }
    }
    let few = accumulate_for(config, 1, Device::Cpu, Way::Copied, 1);
    assert!(few.is_none(), "nothing fits a byte");
    let load = Load::of(config);
    assert_eq!(load.parameters, parameters as u64);
    assert!(flops::training(config) > 0.0 && flops::supervised(config) > 0.0);
    for each in [1, 5004, 1 << 40] {
        let steps = steps_in_all(config, each);
        assert!(steps_to_fill(config) <= 1 << 24 && steps > 0);
        let last = config.train.epochs - 1;
        assert!(!learning_rate(config, last, each - 1, each).is_nan());
    }
    assert!(
        Disk::of(config, std::path::Path::new(".")).is_none_or(|disk| disk.most() >= disk.each)
    );
    let views = Views::Recipe(config.training_views());
    assert!(device::bytes(&views.layout(config.train.batch as usize), Number::F32) > 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn any_configuration_is_refused_or_holds(
        recipe in 0..RECIPES.len(),
        sets in prop::collection::vec((prop::sample::select(keys()), value()), 1..5),
    ) {
        let sets: Vec<String> = sets.into_iter().map(|(key, value)| format!("{key}={value}")).collect();
        match Config::load(RECIPES[recipe].0, &sets) {
            Ok(config) => arithmetic(&config),
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }
}

/// All bounds at once.
#[test]
fn the_largest_configuration_of_all_holds() {
    let largest = [
        "train.batch=1048576",
        "method.queue=16777216",
        "model.width=512",
        "method.dim=8192",
        "model.bn_splits=4",
        "model.backbone=resnet101",
        "model.stem=cifar",
        "method.local_head=9c-9c",
        "views.crops.size=4096",
        "views.patches.size=4095",
        "views.patches.grid.patch=1365",
        "data.workers=1024",
        "data.batches_ahead=64",
        "train.epochs=4294967295",
        "data.cache_size=\"1000000TB\"",
        "checkpoint.keep=9223372036854775807",
    ];
    let config = Config::load("detco-r50", &largest.map(String::from)).unwrap();
    arithmetic(&config);
}

/// Slabs are made before the first sample is read.
#[test]
#[ignore = "needs a kernel that does not promise more memory than there is"]
fn batches_that_no_memory_holds_are_an_error() {
    use detco_shards::format::writer::ShardWriter;
    use detco_shards::pipeline::PipelineError;
    use detco_shards::stream::ShardSet;

    let folder = tempfile::tempdir().unwrap();
    let mut shard = ShardWriter::create(folder.path(), "000000.tar").unwrap();
    for i in 0..20_000 {
        shard.append(&format!("{i:05}.jpg"), b"never read").unwrap();
    }
    shard.finish().unwrap().seal().unwrap();
    let set = ShardSet::open(&[folder.path().to_str().unwrap().to_owned()]).unwrap();
    let config = Config::load("moco-v2-r50", &["views.crops.size=4096".into()]).unwrap();
    let order = Order::shuffled(set.len(), set.len(), 1).unwrap();
    let options = LoaderOptions {
        workers: 1,
        batches_ahead: 64,
        ..LoaderOptions::train(config.training_views(), order, 1, 1)
    };
    // 20,000 times two crops of 50 MB with a note of 36 bytes, 65 times.
    let error = Loader::start(set.into(), options).unwrap_err();
    assert!(matches!(error, PipelineError::Memory { bytes: 2_013_267_360_000 }), "{error}");
}
