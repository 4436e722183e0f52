//! Our normalisation of groups against libtorch's: results, statistics and gradients.
#![cfg(feature = "train")]
#![expect(unsafe_code, reason = "a stand-in for a GPU's driver is a foreign library")]

mod kernels;

use std::sync::{Mutex, Once, PoisonError};

use detco::shim::ShimError;
use detco::shim::norm::{
    Layer, Moments, Normalised, Then, average, copies, normalise, normalise_both, ready, takes,
};
use tch::{Device, Kind, Tensor};

const EPS: f64 = 1e-5;

/// Who reads a result, and sends a gradient back.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Readers {
    Map,
    /// Only the second, where there is one.
    Again,
    /// Two, where there are two, each with a part of the gradient.
    Both,
}

/// What is normalised, and what a gradient of its result is.
struct Case {
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    /// What the residual is normalised with, if it is.
    other: [Tensor; 2],
    gradient: Tensor,
    groups: i64,
}

/// What comes behind a normalisation: nothing, a ReLU, a residual and a ReLU, a residual that is normalised
/// and a ReLU.
const THENS: usize = 4;

impl Case {
    /// Maps `[n, c, h, w]` with means and spreads of their own in each channel.
    fn new(shape: [i64; 4], groups: i64, kind: Kind) -> Case {
        // libtorch counts the GPUs at its first gradient, and never again: they have to be found before.
        static FOUND: Once = Once::new();
        FOUND.call_once(|| drop(detco::device::find(detco::config::Device::Auto)));
        // libtorch's generator is the process's: tests side by side take turns, so that each draws the
        // same whatever runs beside it.
        static TURN: Mutex<()> = Mutex::new(());
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        tch::manual_seed(shape.iter().sum::<i64>() + groups);
        let of = (Kind::Float, Device::Cpu);
        let c = shape[1];
        let offset = Tensor::randn([1, c, 1, 1], of) * 3.0;
        let spread = Tensor::rand([1, c, 1, 1], of) + 0.1;
        let map = |scale: f64| (Tensor::randn(shape, of) * scale).to_kind(kind);
        Case {
            x: (Tensor::randn(shape, of) * spread + offset).to_kind(kind),
            weight: Tensor::randn([c], of) + 1.0,
            bias: Tensor::randn([c], of),
            residual: map(1.0),
            other: [Tensor::randn([c], of) + 1.0, Tensor::randn([c], of)],
            gradient: map(0.5),
            groups,
        }
    }

    /// A leaf with the same values, to collect a gradient.
    fn leaf(tensor: &Tensor) -> Tensor {
        tensor.copy().set_requires_grad(true)
    }

    /// What is normalised of a group, its mean and its variance, in float64.
    fn normalised(&self, x: &Tensor, weight: &Tensor, bias: &Tensor) -> [Tensor; 3] {
        let (mut maps, mut means, mut variances) = (Vec::new(), Vec::new(), Vec::new());
        let none = None::<&Tensor>;
        for part in x.split(x.size()[0] / self.groups, 0) {
            let (w, b) = (Some(weight), Some(bias));
            maps.push(part.batch_norm(w, b, none, none, true, 0.0, EPS, false));
            let pixels = [0_i64, 2, 3];
            means.push(part.mean_dim(pixels.as_slice(), false, None));
            variances.push(part.var_dim(pixels.as_slice(), true, false));
        }
        [Tensor::cat(&maps, 0), Tensor::stack(&means, 0), Tensor::stack(&variances, 0)]
    }

    fn layer<'a>(&'a self, x: &'a Tensor) -> Layer<'a> {
        Layer { x, weight: &self.weight, bias: &self.bias }
    }

    /// By the kernels.
    fn run(&self, then: usize, leaves: &[Tensor; 6]) -> Result<Normalised, ShimError> {
        let [x, weight, bias, residual, other_weight, other_bias] = leaves;
        let layer = Layer { x, weight, bias };
        let then = match then {
            0 => Then::Nothing,
            1 => Then::Relu,
            2 => Then::AddThenRelu(residual),
            _ => {
                let other = Layer { x: residual, weight: other_weight, bias: other_bias };
                return normalise_both(layer, other, self.groups, EPS);
            }
        };
        normalise(layer, self.groups, EPS, then)
    }

    /// Those that get a gradient; the others are not used.
    fn leaves(&self, of: impl Fn(&Tensor) -> Tensor) -> [Tensor; 6] {
        let [other_weight, other_bias] = &self.other;
        [&self.x, &self.weight, &self.bias, &self.residual, other_weight, other_bias].map(of)
    }

    /// How many of them are used.
    fn used(then: usize) -> usize {
        [3, 3, 4, 6][then]
    }

    /// The gradient of the result, without the values that rounding lifts above or below a ReLU's
    /// zero: their gradients are all or nothing.
    fn gradient(&self, then: usize) -> Tensor {
        let leaves = self.leaves(|tensor| tensor.to_kind(Kind::Double));
        let (before, _) = self.before(then, &leaves);
        match then {
            0 => self.gradient.shallow_clone(),
            _ => &self.gradient * before.abs().ge(1e-4).to_kind(self.gradient.kind()),
        }
    }

    /// What is before the ReLU, and the moments.
    fn before(&self, then: usize, leaves: &[Tensor; 6]) -> (Tensor, Vec<Tensor>) {
        let [x, weight, bias, residual, other_weight, other_bias] = leaves;
        let [map, mean, variance] = self.normalised(x, weight, bias);
        let mut moments = vec![mean, variance];
        let map = match then {
            0 | 1 => map,
            2 => map + residual,
            _ => {
                let [other, mean, variance] = self.normalised(residual, other_weight, other_bias);
                moments.extend([mean, variance]);
                map + other
            }
        };
        (map, moments)
    }

    /// The kernels' results on a device, brought back.
    fn ours_on(&self, then: usize, readers: Readers, device: Device) -> Outcome {
        let leaves = self.leaves(|tensor| Case::leaf(&tensor.to_device(device)));
        let gradient = self.gradient(then).to_device(device);
        let Normalised { map, again, moments, other } = self.run(then, &leaves).unwrap();
        assert_eq!((again.is_some(), other.is_some()), (then >= 2, then == 3));
        let product = |map: &Tensor, gradient: &Tensor| (map * gradient).sum(Kind::Float);
        let loss = match (&again, readers) {
            (None, _) | (_, Readers::Map) => product(&map, &gradient),
            (Some([again, _]), Readers::Again) => product(again, &gradient),
            (Some([again, _]), Readers::Both) => {
                // Halves, and so their sum, are exact.
                let part = &gradient * 0.5;
                product(&map, &part) + product(again, &part)
            }
        };
        loss.backward();
        for reader in again.iter().flatten() {
            assert_eq!(reader.data_ptr(), map.data_ptr());
        }
        let back = |tensor: Tensor| tensor.to_device(Device::Cpu);
        let gradients = leaves[..Case::used(then)].iter().map(|leaf| back(leaf.grad())).collect();
        let moments = std::iter::once(moments).chain(other);
        let moments = moments.flat_map(|Moments { mean, variance }| [mean, variance]);
        Outcome { map: back(map), moments: moments.map(back).collect(), gradients }
    }

    /// By libtorch, group by group, in float64.
    fn theirs(&self, then: usize) -> Outcome {
        let leaves = self.leaves(|tensor| Case::leaf(&tensor.to_kind(Kind::Double)));
        let (map, moments) = self.before(then, &leaves);
        let map = if then == 0 { map } else { map.relu() };
        (&map * self.gradient(then).to_kind(Kind::Double)).sum(Kind::Double).backward();
        let gradients = leaves[..Case::used(then)].iter().map(Tensor::grad).collect();
        Outcome { map, moments, gradients }
    }
}

struct Outcome {
    map: Tensor,
    moments: Vec<Tensor>,
    gradients: Vec<Tensor>,
}

/// The largest difference, relative to the largest value.
fn error(ours: &Tensor, theirs: &Tensor) -> f64 {
    assert_eq!(ours.size(), theirs.size());
    let difference = (ours.to_kind(Kind::Double) - theirs).abs().max();
    difference.double_value(&[]) / theirs.abs().max().double_value(&[]).max(1e-30)
}

fn compare(case: &Case, bound: f64) {
    compare_on(case, bound, Device::Cpu);
}

fn compare_on(case: &Case, bound: f64, device: Device) {
    use Readers::{Again, Both, Map};
    let alone = (0..THENS).map(|then| (then, Map));
    for (then, readers) in alone.chain([(2, Again), (2, Both), (3, Both)]) {
        let (ours, theirs) = (case.ours_on(then, readers, device), case.theirs(then));
        let mut pairs = vec![(&ours.map, &theirs.map)];
        pairs.extend(ours.moments.iter().zip(&theirs.moments));
        pairs.extend(ours.gradients.iter().zip(&theirs.gradients));
        let counts = [&ours, &theirs].map(|one| (one.moments.len(), one.gradients.len()));
        assert_eq!(counts[0], counts[1]);
        for (i, (ours, theirs)) in pairs.into_iter().enumerate() {
            let error = error(ours, theirs);
            let at = format!("then {then}, {readers:?}, tensor {i}");
            assert!(error < bound, "{at}: {error:.2e} of {bound:.0e}");
        }
    }
}

#[test]
fn float_groups_are_libtorchs() {
    for (shape, groups) in [
        ([8, 16, 7, 5], 4),
        ([6, 8, 9, 9], 1),
        ([6, 64, 3, 2], 6),
        ([4, 24, 1, 2], 2),
        ([2, 8, 40, 33], 2),
    ] {
        compare(&Case::new(shape, groups, Kind::Float), 3e-5);
    }
}

/// Maps have 8 bits of mantissa; statistics and the gradients of weights are kept in float32.
#[test]
fn bfloat16_groups_are_libtorchs_within_their_bits() {
    for (shape, groups) in [([8, 16, 7, 5], 4), ([6, 64, 5, 5], 2)] {
        compare(&Case::new(shape, groups, Kind::BFloat16), 8e-3);
    }
}

/// The GPU's kernels as they are, block by block and thread by thread, on the host: the shapes of blocks
/// that a GPU gets, shares of rows, channels that fill no block, their arguments in their order.
#[test]
fn the_gpus_kernels_are_libtorchs_operations_on_the_host() {
    let _on_the_host = kernels::OnTheHost::begin();
    let shapes = [
        ([8, 16, 7, 5], 4),
        ([6, 8, 9, 9], 1),
        ([6, 64, 3, 2], 6),
        ([4, 24, 1, 2], 2),
        ([2, 256, 36, 36], 1), // 40 shares
        ([8, 256, 8, 8], 4),   // two of each group
        ([2, 8, 80, 80], 1),
        ([4, 512, 4, 4], 2),
        ([4, 264, 5, 5], 2),
    ];
    for (shape, groups) in shapes {
        compare(&Case::new(shape, groups, Kind::Float), 3e-5);
        compare(&Case::new(shape, groups, Kind::BFloat16), 8e-3);
    }
}

/// The ReLU's map, which is never written, and libtorch's max pool of it: the same values, the same of
/// equal ones picked, the same gradients but for the order in which four are added.
fn compare_pooled(case: &Case, bound: f64, device: Device) {
    let there = |tensor: &Tensor| tensor.to_device(device);
    let (weight, bias) = (there(&case.weight), there(&case.bias));
    // Drawn once: other tests draw from the same numbers meanwhile.
    let gradient = there(&case.gradient.max_pool2d([3, 3], [2, 2], [1, 1], [1, 1], false));
    let run = |fused: bool| {
        let [x, weight, bias] = [&there(&case.x), &weight, &bias].map(Case::leaf);
        let then = if fused { Then::ReluThenPool } else { Then::Relu };
        let layer = Layer { x: &x, weight: &weight, bias: &bias };
        let Normalised { map, again, moments: Moments { mean, variance }, .. } =
            normalise(layer, case.groups, EPS, then).unwrap();
        assert!(again.is_none());
        let map = match fused {
            true => map,
            false => map.max_pool2d([3, 3], [2, 2], [1, 1], [1, 1], false),
        };
        (&map * &gradient).sum(Kind::Float).backward();
        ([map, mean, variance], [x.grad(), weight.grad(), bias.grad()])
    };
    let (ours, our_gradients) = run(true);
    let (theirs, their_gradients) = run(false);
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert!(ours.equal(theirs), "{:?}", case.x.size());
    }
    for (i, (ours, theirs)) in our_gradients.iter().zip(their_gradients).enumerate() {
        let error = error(ours, &theirs.to_kind(Kind::Double));
        assert!(error < bound, "{:?}, gradient {i}: {error:.2e} of {bound:.0e}", case.x.size());
    }
}

fn compare_pools(device: Device) {
    let shapes = [
        ([8, 16, 8, 6], 4),
        ([4, 8, 7, 9], 2),
        ([4, 64, 32, 32], 2),
        ([2, 24, 1, 2], 1),
        ([3, 8, 1, 1], 3),
        ([4, 8, 2, 3], 1),
    ];
    for (shape, groups) in shapes {
        compare_pooled(&Case::new(shape, groups, Kind::Float), 1e-5, device);
        // Many of a window's values are equal once they are rounded.
        compare_pooled(&Case::new(shape, groups, Kind::BFloat16), 1e-2, device);
        // Whole windows that the ReLU shuts; all of a window equal.
        let mut shut = Case::new(shape, groups, Kind::Float);
        shut.bias = &shut.bias - 1.5;
        compare_pooled(&shut, 1e-5, device);
        shut.x = shut.x.round();
        compare_pooled(&shut, 1e-5, device);
    }
}

/// libtorch's mean, to the bit, forward and backward.
#[test]
fn an_average_is_libtorchs() {
    for kind in [Kind::Float, Kind::BFloat16, Kind::Double] {
        let case = Case::new([4, 8, 5, 3], 1, Kind::Float);
        let run = |ours: bool| {
            let x = Case::leaf(&case.x.to_kind(kind));
            let mean = match ours {
                true => average(&x).unwrap(),
                false => x.mean_dim([2_i64, 3].as_slice(), false, None),
            };
            let gradient = Tensor::arange(mean.numel() as i64, (kind, Device::Cpu)) * 0.37;
            (&mean * gradient.view_as(&mean)).sum(None).backward();
            (mean, x.grad())
        };
        let ((ours, our_gradient), (theirs, their_gradient)) = (run(true), run(false));
        assert!(ours.equal(&theirs) && our_gradient.equal(&their_gradient), "{kind:?}");
    }
    assert!(average(&Tensor::zeros([2, 3], (Kind::Float, Device::Cpu))).is_err());
}

#[test]
fn a_max_pool_that_follows_is_libtorchs() {
    compare_pools(Device::Cpu);
    let _on_the_host = kernels::OnTheHost::begin();
    compare_pools(Device::Cpu);
}

/// A pool's result where nobody asks for gradients, as keys are made, is the same.
#[test]
fn a_max_pool_without_gradients_is_the_same() {
    let case = Case::new([4, 16, 9, 8], 2, Kind::BFloat16);
    let run = |x: &Tensor| normalise(case.layer(x), 2, EPS, Then::ReluThenPool).unwrap().map;
    let with = run(&Case::leaf(&case.x));
    let without = tch::no_grad(|| run(&case.x));
    assert!(with.requires_grad() && !without.requires_grad() && with.equal(&without));
}

/// Two readers' gradients of a bfloat16 map are rounded once they are added, as libtorch would.
#[test]
fn a_sum_of_gradients_is_rounded_as_libtorchs() {
    let case = Case::new([4, 8, 5, 5], 2, Kind::BFloat16);
    let second = case.gradient.flip([0]);
    let run = |gradients: [&Tensor; 2]| {
        let [x, residual] = [&case.x, &case.residual].map(Case::leaf);
        let then = Then::AddThenRelu(&residual);
        let Normalised { map, again, .. } = normalise(case.layer(&x), 2, EPS, then).unwrap();
        let [one, other] = gradients;
        (&map * one + &again.unwrap()[0] * other).sum(Kind::Float).backward();
        [x.grad(), residual.grad()]
    };
    let nothing = case.gradient.zeros_like();
    let sum = &case.gradient + &second;
    for (two, one) in run([&case.gradient, &second]).iter().zip(run([&sum, &nothing])) {
        assert!(two.equal(&one));
    }
}

/// What an average's reader sends back, a number a sample and channel, is as if it were written for every
/// pixel and added to what the others send: to the bit, and nothing is copied.
fn compare_readers(case: &Case, device: Device) {
    let there = |tensor: &Tensor| tensor.to_device(device);
    let second = there(&case.gradient.flip([0]));
    let gradient = there(&case.gradient);
    let each = there(&case.gradient.narrow(2, 0, 1).narrow(3, 0, 1).flip([1]).contiguous());
    let pixels = (case.x.size()[2] * case.x.size()[3]) as f64;
    let wide = |tensor: &Tensor| tensor.to_kind(Kind::Float);
    for then in [2, 3] {
        // As often as it is said, each reader reads.
        let run = |gradients: [Option<&Tensor>; 3]| {
            let leaves = case.leaves(|tensor| Case::leaf(&there(tensor)));
            let Normalised { map, again, .. } = case.run(then, &leaves).unwrap();
            let [again, averaged] = again.unwrap();
            let [of_map, of_again, of_average] = gradients;
            // A product's gradient has the layout of what the map is multiplied with.
            let last = |gradient: &Tensor| {
                gradient.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2])
            };
            let readers = [(&map, of_map), (&again, of_again)];
            let mut loss = Tensor::zeros([], (Kind::Float, device));
            for (reader, gradient) in readers {
                if let Some(gradient) = gradient {
                    loss += (reader * last(gradient)).sum(None).to_kind(Kind::Float);
                }
            }
            if let Some(gradient) = of_average {
                let mean = average(&averaged).unwrap();
                loss += (mean * gradient.flatten(1, -1)).sum(Kind::Float);
            }
            let before = copies();
            loss.backward();
            let copied = copies() - before;
            (leaves[..Case::used(then)].iter().map(Tensor::grad).collect::<Vec<_>>(), copied)
        };
        let of_average = (&each / pixels).expand_as(&gradient);
        let sum = |of: &[&Tensor]| {
            let sum = of.iter().map(|tensor| wide(tensor)).reduce(|sum, one| sum + one);
            sum.unwrap().to_kind(case.x.kind())
        };
        // Three maps are two for the kernels, where a layer is added.
        let together = &gradient + &of_average;
        let three = match then {
            2 => vec![&gradient, &second, &of_average],
            _ => vec![&together, &second],
        };
        let cases = [
            ([Some(&gradient), Some(&second), Some(&each)], three),
            ([Some(&gradient), None, Some(&each)], vec![&gradient, &of_average]),
            ([None, Some(&second), Some(&each)], vec![&second, &of_average]),
            ([None, None, Some(&each)], vec![&of_average]),
        ];
        for (i, (three, all)) in cases.into_iter().enumerate() {
            let (ours, copied) = run(three);
            let (theirs, _) = run([Some(&sum(&all)), None, None]);
            let shape = case.x.size();
            for (ours, theirs) in ours.iter().zip(&theirs) {
                assert!(ours.equal(theirs), "{shape:?}, then {then}, case {i}");
            }
            // libtorch's engine works in this thread on the CPU alone.
            if device == Device::Cpu {
                assert_eq!(copied, i64::from(then == 3), "{shape:?}, then {then}, case {i}");
            }
        }
    }
}

fn compare_all_readers(device: Device) {
    for kind in [Kind::Float, Kind::BFloat16] {
        for (shape, groups) in
            [([8, 16, 7, 5], 4), ([4, 264, 5, 5], 2), ([6, 24, 1, 2], 1), ([4, 8, 40, 33], 2)]
        {
            compare_readers(&Case::new(shape, groups, kind), device);
        }
    }
}

#[test]
fn an_averages_gradient_is_added_on_the_way() {
    compare_all_readers(Device::Cpu);
    let _on_the_host = kernels::OnTheHost::begin();
    compare_all_readers(Device::Cpu);
}

#[test]
fn a_large_mean_does_not_drown_a_small_spread() {
    let mut case = Case::new([4, 8, 16, 16], 2, Kind::Float);
    case.x = case.x.randn_like() * 0.01 + 1000.0;
    // The float itself rounds such values to 6e-5, a 160th of the spread.
    let (ours, theirs) = (case.ours_on(0, Readers::Map, Device::Cpu), case.theirs(0));
    assert!(error(&ours.moments[0], &theirs.moments[0]) < 1e-7);
    assert!(error(&ours.moments[1], &theirs.moments[1]) < 1e-4);
}

#[test]
fn channels_last_maps_and_others_are_the_same() {
    let case = Case::new([4, 16, 6, 5], 2, Kind::Float);
    let last = case.x.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2]);
    let run = |x: &Tensor| normalise(case.layer(x), 2, EPS, Then::Relu).unwrap().map;
    assert!(run(&last).equal(&run(&case.x)));
}

#[test]
fn what_is_not_a_number_stays_none() {
    let case = Case::new([4, 8, 3, 3], 2, Kind::Float);
    let x = case.x.copy();
    let _ = x.narrow(0, 0, 1).fill_(f64::NAN);
    let y = normalise(case.layer(&x), 2, EPS, Then::Relu).unwrap().map;
    let nan = |rows: &Tensor| rows.isnan().sum(Kind::Int64).int64_value(&[]);
    assert_eq!(nan(&y.narrow(0, 0, 2)), 2 * 8 * 9, "its group");
    assert_eq!(nan(&y.narrow(0, 2, 2)), 0, "the other");
    for kind in [Kind::Float, Kind::BFloat16] {
        let x = x.to_kind(kind);
        let y = normalise(case.layer(&x), 2, EPS, Then::ReluThenPool).unwrap().map;
        assert_eq!(nan(&y.narrow(0, 0, 2)), 2 * 8 * 4, "its group, pooled");
        assert_eq!(nan(&y.narrow(0, 2, 2)), 0, "the other, pooled");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let case = Case::new([4, 8, 3, 3], 3, Kind::Float);
    let refused = |x: &Tensor, groups| {
        normalise(case.layer(x), groups, EPS, Then::Nothing).unwrap_err().to_string()
    };
    assert!(refused(&case.x, 3).contains("4 samples has no 3 groups"));
    assert!(refused(&case.x.to_kind(Kind::Double), 2).contains("float or bfloat16"));
    assert!(!takes(12) && takes(24));
    assert!(refused(&Tensor::zeros([4, 12, 3, 3], (Kind::Float, Device::Cpu)), 2).contains("12"));
}

#[test]
#[ignore = "needs a GPU"]
fn a_gpu_normalises_as_libtorch_does() {
    let found = detco::device::find(detco::config::Device::Cuda);
    let found = found.unwrap_or_else(|error| panic!("{error}"));
    ready(found.device).unwrap_or_else(|missing| panic!("{missing}"));
    // Blocks of all shapes: few channels and many, rows that fill no block, the maps of a ResNet-50.
    let shapes = [[8, 16, 7, 5], [6, 8, 9, 9], [6, 64, 3, 2], [4, 24, 1, 2], [16, 64, 56, 56]];
    let more = [[8, 256, 28, 28], [8, 2048, 7, 7], [18, 512, 2, 2], [8, 264, 5, 5]];
    for shape in shapes.into_iter().chain(more) {
        for groups in [1, 2] {
            compare_on(&Case::new(shape, groups, Kind::Float), 3e-5, found.device);
            compare_on(&Case::new(shape, groups, Kind::BFloat16), 8e-3, found.device);
        }
    }
    compare_pools(found.device);
    compare_all_readers(found.device);
    // The grids that training has.
    let stem = Case::new([64, 64, 112, 112], 8, Kind::BFloat16);
    compare_pooled(&stem, 1e-2, found.device);
    // The same bits every time.
    let case = Case::new([16, 64, 56, 56], 4, Kind::BFloat16);
    for then in [2, 3] {
        let run = || case.ours_on(then, Readers::Both, found.device);
        let (once, again) = (run(), run());
        assert!(once.map.equal(&again.map));
        for (once, again) in once.gradients.iter().zip(&again.gradients) {
            assert!(once.equal(again));
        }
    }
}

#[cfg(feature = "nvjpeg")]
#[test]
fn the_kernels_compile_for_each_generation_since_ampere() {
    use detco::shim::norm::{KERNELS, program};
    use detco_shards::cuda::{Architecture, Code, Nvrtc, Search};

    let libtorch = std::env::var_os("LIBTORCH").map(std::path::PathBuf::from).unwrap_or_default();
    let nvrtc = Nvrtc::open(&Search::beside_libtorch(&libtorch))
        .unwrap_or_else(|error| panic!("{error}: run `cargo xtask setup`"));
    for (major, name) in [(8, "sm_80"), (9, "sm_90"), (10, "sm_100")] {
        let architecture = Architecture { major, minor: 0 };
        let ptx = nvrtc.compile(&program(), architecture, Code::Ptx).unwrap();
        let ptx = String::from_utf8(ptx).unwrap();
        assert!(ptx.contains(&format!(".target {name}")), "{name}");
        for kernel in KERNELS {
            assert!(ptx.contains(&format!(".entry {kernel}(")), "{kernel} for {name}");
        }
    }
}
