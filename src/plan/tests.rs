//! The formulas, against sums by hand.

use super::*;
use crate::config::Backbone;
use crate::method::{GLOBAL, LOCAL};
use crate::shapes::{Conv, ResNet};

fn load() -> Load {
    let bucket = (25 << 20) as f64;
    let (parameters, image_values, embedding_values) = (10_000_000, 1_000, 100);
    let (local_parameters, crops) = (0, 1.0);
    Load { parameters, image_values, embedding_values, bucket, local_parameters, crops }
}

/// Two nodes of four GPUs: W = 8, B = 80. Sent by hand: images 10 x 7/8 x 4,000 = 35,000 bytes;
/// embeddings 7 x 10 x 400 = 28,000; gradients 2 x 7/8 x 40 MB = 70 MB.
fn cluster() -> Cluster {
    Cluster {
        nodes: 2,
        gpus: 4,
        batch: 10,
        step: 0.1,
        backward: 0.5,
        link: 20e9,
        net: Some(1e9 / OURS),
        latency: 0.0,
        gradient_bytes: 4.0,
        storage: None,
        store: None,
        cores: None,
        cpu_ms: 4.0,
        image_bytes: 100e3,
        samples: 1_000_000,
        epochs: 200,
    }
}

fn close(found: f64, expected: f64) {
    assert!((found / expected - 1.0).abs() < 1e-9, "{found} for {expected}");
}

#[test]
fn a_cluster_by_hand() {
    let found = cluster().forecast(&load());
    close(found.sent.images, 35_000.0);
    close(found.sent.embeddings, 28_000.0);
    close(found.sent.gradients, 70e6);
    // 40 images of a node, half of them leave: 80 kB at 1 GB/s = 80 us. Embeddings 28 us.
    // Gradients 70 ms, of which 50 could hide behind backward, but not those of the last bucket:
    // of 40 MB what is left after 1 MiB and 25 MiB, 12.737024 MB, 22.29 ms.
    close(found.exposed, 80e-6 + 28e-6 + 0.022289792);
    close(found.network, 80e-6 + 28e-6 + 0.07);
    close(found.images_per_s, 80.0 / 0.122397792);
    close(found.days, 200e6 / (80.0 / 0.122397792) / 86_400.0);
    close(found.reads, 80.0 / 0.122397792 * 100e3);
    close(found.cores_per_gpu, 10.0 / 0.122397792 * 4e-3);
    close(found.node_sends, (80_000.0 + 28_000.0 + 70e6) / 0.122397792);
    assert_eq!((found.ranks, found.bottleneck), (8, Bottleneck::Gpu));
    close(found.limits.gpu, 800.0);
    close(found.limits.network.unwrap(), 80.0 / 0.070108);
}

/// Half of backward goes through patches; of the local heads' 20 MB one bucket is full early.
#[test]
fn weights_that_crops_and_patches_share_are_ready_late() {
    let load = Load { local_parameters: 5_000_000, crops: 0.5, ..load() };
    let found = cluster().forecast(&load);
    // 1.048576 of 40 MB travel at once; the rest of 70 ms begins after 25 of 50 ms.
    close(found.exposed, 80e-6 + 28e-6 + 0.025 + 0.07 - 0.001835008 - 0.05);
}

#[test]
fn latencies_are_counted_by_rings() {
    let slow = Cluster { latency: 1e-3, ..cluster() };
    let more = slow.forecast(&load()).network - cluster().forecast(&load()).network;
    // 40 MB are three buckets: 3 x 14, and 7, and 1.
    close(more, 50e-3);
}

#[test]
fn one_rank_sends_nothing_and_one_node_needs_no_network() {
    let one = Cluster { nodes: 1, gpus: 1, net: None, ..cluster() };
    let found = one.forecast(&load());
    assert_eq!((found.sent, found.exposed), (Sent::default(), 0.0));
    assert_eq!((found.limits.network, found.node_sends), (None, 0.0));
    close(found.images_per_s, 100.0);
    let node = Cluster { nodes: 1, net: None, ..cluster() };
    let found = node.forecast(&load());
    // W = 4: gradients 2 x 3/4 x 40 MB at 20 GB/s = 3 ms, hidden.
    close(found.network, 30_000.0 / 20e9 + 3.0 * 10.0 * 400.0 / 20e9 + 3e-3);
    assert_eq!(found.node_sends, 0.0);
}

/// What is made the smallest is named, and gives the images a second.
#[test]
fn each_bottleneck_is_named_when_it_is_the_smallest() {
    let plenty = Cluster {
        storage: Some(1e12),
        store: Some(1e12),
        cores: Some(1e6),
        net: Some(1e12),
        link: 1e12,
        ..cluster()
    };
    let named = |cluster: Cluster| {
        let found = cluster.forecast(&load());
        (found.bottleneck, found.images_per_s)
    };
    assert_eq!(named(plenty.clone()).0, Bottleneck::Gpu);
    let (what, rate) = named(Cluster { net: Some(1e8 / OURS), ..plenty.clone() });
    assert_eq!(what, Bottleneck::Network);
    close(rate, 80.0 / (0.1 + 0.8e-3 + 0.28e-3 + 0.7 - 0.05));
    // 2 nodes x 1 core x 250 images/s.
    let (what, rate) = named(Cluster { cores: Some(1.0), ..plenty.clone() });
    assert_eq!(what, Bottleneck::Cores);
    close(rate, 500.0);
    let (what, rate) = named(Cluster { storage: Some(10e6), ..plenty.clone() });
    assert_eq!(what, Bottleneck::Storage);
    close(rate, 200.0);
    let (what, rate) = named(Cluster { store: Some(10e6), ..plenty.clone() });
    assert_eq!(what, Bottleneck::Store);
    close(rate, 100.0);
    // Of several that are scarce, the scarcest.
    let scarce = Cluster { store: Some(20e6), cores: Some(1.0), net: Some(1e8 / OURS), ..plenty };
    assert_eq!(named(scarce.clone()).0, Bottleneck::Network);
    let scarcer = Cluster { store: Some(10e6), ..scarce };
    assert_eq!(named(scarcer).0, Bottleneck::Store);
}

/// torchvision's counts (25,557,032 less the last layer's 2,049,000; 11,689,512 less 513,000),
/// and those of the heads by their sizes.
#[test]
fn parameters_are_counted_as_torchvision_does() {
    for (name, expected) in [
        (Backbone::Resnet18, 11_176_512),
        (Backbone::Resnet34, 21_284_672),
        (Backbone::Resnet50, 23_508_032),
        (Backbone::Resnet101, 42_500_160),
    ] {
        let mut config = Config::default();
        config.model.backbone = name;
        let backbone: i64 = ResNet::of(&config.model).convs().map(Conv::parameters).sum();
        assert_eq!(backbone, expected, "{name:?}");
    }
    // c = 256, 512, 1024, 2048: c c + c + 128 c + 128, and 9 c c + c + 128 c + 128.
    let design = Config::default().design();
    let of = |scope| design.heads_of(scope).map(HeadDesign::parameters).sum::<i64>();
    let [global, local] = [GLOBAL, LOCAL].map(of);
    assert_eq!(global, 5_570_560 + 3_840 + 128 * 3_840 + 4 * 128);
    assert_eq!(local, 9 * 5_570_560 + 3_840 + 128 * 3_840 + 4 * 128);
}

/// DetCo on eight GPUs of one node: 28 of 32 keys travel, 261,120 floats each; 7 x 32 x 1,024
/// floats of embeddings; 7/4 of 80.2 million floats of gradients.
#[test]
fn the_paper_on_eight_gpus() {
    let load = Load::of(&Config::default());
    assert_eq!((load.image_values, load.embedding_values), (261_120, 1_024));
    let paper = Cluster { nodes: 1, gpus: 8, batch: 32, net: None, ..cluster() };
    let sent = paper.forecast(&load).sent;
    close(sent.images, 28.0 * 261_120.0 * 4.0);
    close(sent.embeddings, 7.0 * 32.0 * 1_024.0 * 4.0);
    assert!((sent.gradients / 1e6 - 561.0).abs() < 1.0, "{}", sent.gradients);
    let bf16 = Cluster { gradient_bytes: 2.0, ..paper };
    close(bf16.forecast(&load).sent.gradients * 2.0, sent.gradients);
}
