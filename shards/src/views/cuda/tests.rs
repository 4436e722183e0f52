//! The kernels against the CPU's renderer, byte for byte: their source compiled for the host, and
//! on a GPU themselves where there is one.

#![expect(unsafe_code, reason = "host memory stands in for the device's")]

use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::super::plan::{GridPlan, Rect, ViewPlan};
use super::super::{Filter, MEAN, Recipe, Renderer, STD, Step, Steps};
use super::*;
use crate::cuda::{Limits, Search};
use crate::decode::{Decoder, Image};
use detco_twin::driver;

#[path = "../../../tests/support/images.rs"]
mod images;

/// Of an H100, of an A100, and of a device whose shared memory holds no view.
const LIMITS: [Limits; 3] = [limits(232_448), limits(166_912), limits(49_152)];

const fn limits(shared: u32) -> Limits {
    Limits {
        multiprocessors: 132,
        threads_per_multiprocessor: 2048,
        shared_bytes_per_multiprocessor: shared + 1024,
        shared_bytes_per_block: shared,
    }
}

/// Of a batch of such plans.
fn shape(samples: usize, plan: &SamplePlan, element: Element) -> BatchShape {
    let views = plan.views.iter().map(ViewPlan::bytes).collect();
    BatchShape { samples, views, element, mean: MEAN, std: STD }
}

/// A tensor on the host for each view, as bytes.
fn tensors(shape: &BatchShape) -> Vec<Vec<u8>> {
    let bytes = shape.samples * shape.element.bytes();
    // A float that no pixel becomes, and no bfloat16 either.
    shape.views.iter().map(|numbers| vec![0x7F; numbers * bytes]).collect()
}

fn outputs(tensors: &mut [Vec<u8>]) -> Vec<DeviceSlice<'_>> {
    tensors.iter_mut().map(|tensor| slice_mut(tensor)).collect()
}

fn slice(bytes: &[u8]) -> DeviceSlice<'_> {
    // SAFETY: only the twin uses it, which takes host memory.
    unsafe { DeviceSlice::from_raw(bytes.as_ptr() as u64, bytes.len()) }
}

fn slice_mut(bytes: &mut [u8]) -> DeviceSlice<'_> {
    // SAFETY: as above; borrowed as long as the slice.
    unsafe { DeviceSlice::from_raw(bytes.as_mut_ptr() as u64, bytes.len()) }
}

fn frame(image: &Image) -> DeviceFrame<'_> {
    let pitch = image.width as usize * 3;
    DeviceFrame { pixels: slice(&image.pixels), width: image.width, height: image.height, pitch }
}

/// What the kernels leave in the tensors of the views.
fn twin(
    shape: &BatchShape,
    samples: &[(&Image, &SamplePlan)],
    limits: Limits,
    threads: u32,
) -> Vec<Vec<u8>> {
    let mut tensors = tensors(shape);
    let out = outputs(&mut tensors);
    let items: Vec<Item<'_>> = samples
        .iter()
        .enumerate()
        .map(|(slot, (image, plan))| Item { slot, frame: frame(image), plan })
        .collect();
    let mut packed = Packed::default();
    packed.fill(shape, &items, &out).unwrap();
    let layout = Layout::within(&packed, limits);
    // Words of 8 bytes: the kernel reads 64-bit numbers.
    let mut plans = vec![0_u64; packed.bytes_len().div_ceil(8)];
    // SAFETY: as many bytes as the words have; any bytes are words.
    let bytes = unsafe {
        std::slice::from_raw_parts_mut(plans.as_mut_ptr().cast::<u8>(), packed.bytes_len())
    };
    packed.write(bytes);
    let batch = BatchWords::new(&packed, &layout, shape, [plans.as_ptr() as u64, 0]);
    // SAFETY: a `Batch` as the renderer makes it; plans, frames and tensors are live and ours.
    unsafe {
        detco_twin::render((&raw const batch).cast(), layout.launch.shared_bytes, threads);
    }
    tensors
}

/// The CPU's views of a sample.
fn expected(renderer: &mut Renderer, image: &Image, plan: &SamplePlan) -> Vec<Vec<u8>> {
    let render = |plan: &ViewPlan| {
        let mut out = vec![0; plan.bytes()];
        renderer.view(image, plan, &mut out);
        out
    };
    plan.views.iter().map(render).collect()
}

fn normalised(byte: u8, at: usize) -> f32 {
    (f32::from(byte) / 255.0 - MEAN[at % 3]) / STD[at % 3]
}

/// Differences of bytes from what floats say, in levels.
#[derive(Debug, Default)]
struct Levels {
    sum: f64,
    most: f64,
    count: usize,
}

impl Levels {
    fn add(&mut self, tensor: &[u8], bytes: &[u8]) {
        assert_eq!(tensor.len(), 4 * bytes.len());
        for (at, (number, byte)) in tensor.as_chunks::<4>().0.iter().zip(bytes).enumerate() {
            let number = f32::from_ne_bytes(*number);
            let exact = number == normalised(*byte, at);
            let level =
                (f64::from(number) * f64::from(STD[at % 3]) + f64::from(MEAN[at % 3])) * 255.0;
            let error = if exact { 0.0 } else { (level - f64::from(*byte)).abs() };
            self.sum += error;
            self.most = self.most.max(error);
            self.count += 1;
        }
    }

    /// Says mean and maximum, and demands that both are 0.
    fn hold(&self, what: &str) {
        let mean = self.sum / self.count.max(1) as f64;
        println!("{what}: mean {mean} levels, maximum {} of {} bytes", self.most, self.count);
        assert!(self.count > 0 && mean == 0.0 && self.most == 0.0, "{what}: {self:?}");
    }
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        (0.0f32..2.5).prop_map(Op::Brightness),
        (0.0f32..2.5).prop_map(Op::Contrast),
        (0.0f32..2.5).prop_map(Op::Saturation),
        (-0.5f32..0.5).prop_map(Op::Hue),
        Just(Op::Gray),
        (0.01f32..6.0).prop_map(Op::Blur),
        (0.1f32..2.0).prop_map(Op::Blur),
        Just(Op::Invert),
        (0u8..=8).prop_map(Op::Posterize),
        (0u16..=256).prop_map(Op::Solarize),
        any::<u8>().prop_map(Op::SolarizeAdd),
        Just(Op::Flip),
        Just(Op::AutoContrast),
        Just(Op::Equalize),
        (0.0f32..2.5).prop_map(Op::Sharpness),
        (prop::array::uniform6(-1.5f64..1.5), -40.0f64..40.0, any::<bool>()).prop_map(
            |([a, b, c, d, e, f], shift, bicubic)| {
                let matrix = [a, b, 20.0 * c + shift, d, e, 20.0 * f + shift];
                Op::Affine { matrix, bicubic }
            }
        ),
    ]
}

fn view(size: u32) -> impl Strategy<Value = Drawn> {
    (
        prop::collection::vec(op(), 0..6),
        prop::array::uniform4(0.0f64..=1.0),
        any::<bool>(),
        prop::sample::select(vec![Filter::Bilinear, Filter::Bilinear, Filter::Bicubic]),
        Just(size),
    )
}

/// Operations, a crop, whether it is mirrored, the resize's filter, the side.
type Drawn = (Vec<Op>, [f64; 4], bool, Filter, u32);

fn plan((ops, [x, y, w, h], flip, filter, size): Drawn, image: &Image) -> ViewPlan {
    let part = |of: u32, share: f64| (f64::from(of) * share) as u32;
    let (left, top) = (part(image.width - 1, x), part(image.height - 1, y));
    let width = 1 + part(image.width - left - 1, w);
    let crop = Rect { left, top, width, height: 1 + part(image.height - top - 1, h) };
    ViewPlan { size, crop, filter, ops, flip, ..ViewPlan::default() }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn the_kernels_on_the_host_have_the_renderers_bytes(
        (width, height) in (1u32..300, 1u32..300),
        seed: u64,
        noise: bool,
        (a, b) in (1u32..150).prop_flat_map(|size| (view(size), view(size))),
        (cells, order) in prop_oneof![
            Just((2u32, (0u8..4).collect::<Vec<u8>>())),
            Just((3, (0..9).collect())),
        ].prop_flat_map(|(cells, order)| (Just(cells), Just(order).prop_shuffle())),
        cell in 1u32..100,
        (c, d) in (view(1), view(1)),
        offsets in prop::array::uniform9(prop::array::uniform2(0.0f64..1.0)),
        patch in 0.0f64..1.0,
        limits in prop::sample::select(LIMITS.to_vec()),
        threads in prop::sample::select(vec![1u32, 1, 1, 3]),
    ) {
        let make = if noise { images::noise } else { images::textured };
        let image = make(width, height, seed >> 40);
        let patch = 1 + (patch * f64::from(cell)) as u32;
        let room = f64::from(cell - patch + 1);
        let offsets = offsets.iter().take(order.len());
        let offsets = offsets.map(|at| at.map(|part| (part * room) as u32)).collect();
        let grid = GridPlan { cells, patch, offsets, order, permutation: None };
        let cut = |view| {
            let plan = plan(view, &image);
            ViewPlan { size: cells * cell, grid: Some(grid.clone()), ..plan }
        };
        let views = vec![plan(a, &image), plan(b, &image), cut(c), cut(d)];
        let sample = SamplePlan { views };
        let shape = shape(1, &sample, Element::F32);
        let found = twin(&shape, &[(&image, &sample)], limits, threads);
        let bytes = expected(&mut Renderer::plain(), &image, &sample);
        for (which, (tensor, bytes)) in found.iter().zip(&bytes).enumerate() {
            let numbers: Vec<f32> =
                bytes.iter().enumerate().map(|(at, byte)| normalised(*byte, at)).collect();
            let numbers: Vec<u8> = numbers.iter().flat_map(|number| number.to_ne_bytes()).collect();
            let differ = tensor.iter().zip(&numbers).position(|(a, b)| a != b);
            prop_assert_eq!(differ.map(|at| at / 4), None, "view {}: {:?}", which, sample);
        }
    }
}

/// Images and the plans that recipes draw for them: what training sees.
fn drawn(recipe: &Recipe) -> Vec<(Image, SamplePlan)> {
    let mut images = vec![
        images::textured(500, 375, 1),
        images::textured(375, 500, 2),
        images::noise(640, 427, 3),
        images::textured(64, 80, 4),
        images::textured(2000, 37, 5),
    ];
    let (mut decoder, mut image) = (Decoder::new(), Image::new());
    for file in images::real_files().iter().take(60) {
        decoder.decode(&std::fs::read(file).unwrap(), &mut image).unwrap();
        images.push(image.clone());
    }
    let plan = |(sample, image): (usize, Image)| {
        let plan = recipe.draw(image.width, image.height, 1, 0, sample as u64);
        (image, plan)
    };
    images.into_iter().enumerate().map(plan).collect()
}

/// The presets whose images are cropped as they are, and DetCo with RandAugment always applied.
fn recipes() -> Vec<(&'static str, Recipe)> {
    let preset = |name| (name, Recipe::preset(name).unwrap());
    let direct = |recipe: &Recipe| recipe.groups.iter().all(|group| group.crop.resize.is_none());
    let mut recipes: Vec<_> =
        Recipe::presets().map(preset).filter(|(_, recipe)| direct(recipe)).collect();
    assert!(recipes.len() >= 11);
    let mut augmented = Recipe::detco_aa();
    let Steps::Own(steps) = &mut augmented.groups[0].steps else { panic!("the crops' own") };
    for step in steps.iter_mut() {
        if let Step::RandAugment(randaugment) = step {
            randaugment.p = 1.0;
        }
    }
    // With the flip first, so that it stands among the operations.
    steps.rotate_right(1);
    recipes.push(("detco with RandAugment", augmented));
    recipes
}

#[test]
fn whole_batches_of_each_recipe_have_the_renderers_bytes() {
    for (name, recipe) in recipes() {
        let samples = drawn(&recipe);
        let pairs: Vec<_> = samples.iter().map(|(image, plan)| (image, plan)).collect();
        let shape = shape(pairs.len(), pairs[0].1, Element::F32);
        assert!(pairs.iter().all(|(_, plan)| supports(plan)));
        let found = twin(&shape, &pairs, LIMITS[0], 1);
        let mut levels = Levels::default();
        let mut renderer = Renderer::new();
        for (slot, (image, plan)) in samples.iter().enumerate() {
            for (tensor, bytes) in found.iter().zip(expected(&mut renderer, image, plan)) {
                let len = 4 * bytes.len();
                levels.add(&tensor[slot * len..][..len], &bytes);
            }
        }
        levels.hold(&format!("{name}, {} images", pairs.len()));
    }
}

/// A sample has two small views and two large ones: an odd number of blocks, taking them in turn, has each
/// block meet all kinds.
#[test]
fn no_block_gets_all_the_large_views() {
    let recipe = Recipe::detco();
    let image = images::textured(50, 40, 1);
    let plan = recipe.draw(50, 40, 1, 0, 0);
    for (samples, blocks) in [(33, 132), (34, 131), (256, 131)] {
        let shape = shape(samples, &plan, Element::Bf16);
        let mut tensors = tensors(&shape);
        let out = outputs(&mut tensors);
        let items: Vec<_> =
            (0..samples).map(|slot| Item { slot, frame: frame(&image), plan: &plan }).collect();
        let mut packed = Packed::default();
        packed.fill(&shape, &items, &out).unwrap();
        // All of them at once, or an odd number in turn: the fourth view from here is another's.
        assert_eq!(Layout::within(&packed, LIMITS[0]).launch.grid, [blocks, 1, 1]);
    }
}

#[test]
fn bfloat16_is_the_nearest_to_the_float() {
    let recipe = Recipe::moco_v2().with_size(64);
    let image = images::noise(90, 70, 1);
    let plan = recipe.draw(90, 70, 1, 0, 0);
    let samples = [(&image, &plan)];
    let [floats, halves] = [Element::F32, Element::Bf16]
        .map(|element| twin(&shape(1, &plan, element), &samples, LIMITS[0], 1).swap_remove(0));
    assert_eq!(floats.len(), 2 * halves.len());
    for (float, half) in floats.as_chunks::<4>().0.iter().zip(halves.as_chunks::<2>().0) {
        let (float, half) = (f32::from_ne_bytes(*float), u16::from_ne_bytes(*half));
        let value = |bits: u16| f32::from_bits(u32::from(bits) << 16);
        let error = (value(half) - float).abs();
        let others =
            [half.wrapping_sub(1), half.wrapping_add(1)].map(|bits| (value(bits) - float).abs());
        let nearest =
            others.iter().all(|other| error < *other || (error == *other && half % 2 == 0));
        assert!(nearest, "{float} became {}", value(half));
    }
}

#[test]
fn frames_may_have_a_pitch_and_slots_left_out_stay_as_they_were() {
    let recipe = Recipe::moco_v2().with_size(32);
    let image = images::textured(50, 40, 1);
    let plan = recipe.draw(50, 40, 1, 0, 0);
    let (width, pitch) = (50 * 3, 192);
    let mut padded = vec![0xEE; 40 * pitch];
    for (to, from) in padded.chunks_exact_mut(pitch).zip(image.pixels.chunks_exact(width)) {
        to[..width].copy_from_slice(from);
    }
    // Without the padding of the last row, as a decoder may leave it.
    padded.truncate(39 * pitch + width);
    let shape = shape(3, &plan, Element::F32);
    let mut tensors = tensors(&shape);
    let out = outputs(&mut tensors);
    let frame = DeviceFrame { pixels: slice(&padded), width: 50, height: 40, pitch };
    let mut packed = Packed::default();
    packed.fill(&shape, &[Item { slot: 1, frame, plan: &plan }], &out).unwrap();
    let layout = Layout::within(&packed, LIMITS[1]);
    let mut plans = vec![0_u8; packed.bytes_len()];
    packed.write(&mut plans);
    let plans: Vec<u64> = plans
        .chunks(8)
        .map(|chunk| {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            u64::from_ne_bytes(word)
        })
        .collect();
    let batch = BatchWords::new(&packed, &layout, &shape, [plans.as_ptr() as u64, 0]);
    // SAFETY: as for `twin`.
    unsafe { detco_twin::render((&raw const batch).cast(), layout.launch.shared_bytes, 2) };
    let bytes = expected(&mut Renderer::plain(), &image, &plan);
    let len = 4 * shape.views[0];
    let mut levels = Levels::default();
    for (tensor, bytes) in tensors.iter().zip(&bytes) {
        assert!(tensor[..len].iter().chain(&tensor[2 * len..]).all(|byte| *byte == 0x7F));
        levels.add(&tensor[len..2 * len], bytes);
    }
    levels.hold("a frame with a pitch");
}

#[test]
fn what_does_not_fit_is_refused_before_it_reaches_the_device() {
    let recipe = Recipe::detco().with_size(32);
    let image = images::textured(50, 40, 1);
    let good = recipe.draw(50, 40, 1, 0, 0);
    let shape = shape(2, &good, Element::Bf16);
    let fill = |shape: &BatchShape, slot, frame: DeviceFrame<'_>, plan: &SamplePlan| {
        let mut tensors = tensors(shape);
        let out = outputs(&mut tensors);
        Packed::default().fill(shape, &[Item { slot, frame, plan }], &out)
    };
    let frame = frame(&image);
    fill(&shape, 1, frame, &good).unwrap();
    let refused = |slot, frame, plan: &SamplePlan| fill(&shape, slot, frame, plan).unwrap_err();
    use DeviceViewsError::{Above, Crop, Empty, Resized, Shape, Unsupported};
    assert!(matches!(refused(2, frame, &good), Above { most: 1, found: 2, .. }));
    let narrow = DeviceFrame { width: 20, ..frame };
    assert!(matches!(refused(0, narrow, &good), Crop { width: 20, .. }));
    let short = DeviceFrame { pixels: slice(&image.pixels[1..]), ..frame };
    assert!(matches!(refused(0, short, &good), Above { found: 6000, most: 5999, .. }));
    let pitch = DeviceFrame { pitch: 149, ..frame };
    assert!(matches!(refused(0, pitch, &good), Above { found: 150, most: 149, .. }));
    let endless = DeviceFrame { pitch: usize::MAX, ..frame };
    assert!(matches!(refused(0, endless, &good), Above { .. }));
    let fewer = SamplePlan { views: good.views[..2].to_vec() };
    assert!(matches!(refused(0, frame, &fewer), Shape { expected: 4, found: 2, .. }));
    let change = |change: &dyn Fn(&mut SamplePlan)| {
        let mut plan = good.clone();
        change(&mut plan);
        refused(0, frame, &plan)
    };
    assert!(matches!(change(&|plan| plan.views[1].size = 33), Shape { expected: 3072, .. }));
    let endless = Op::Blur(f32::INFINITY);
    assert!(matches!(change(&|plan| plan.views[0].ops.push(endless)), Unsupported { .. }));
    let resized = |plan: &mut SamplePlan| plan.views[0].resized = Some([50, 40]);
    assert!(matches!(change(&resized), Resized));
    fn grid(plan: &mut SamplePlan, view: usize) -> &mut GridPlan {
        plan.views[view].grid.as_mut().unwrap()
    }
    let leave = |plan: &mut SamplePlan| grid(plan, 2).offsets[3][1] = u32::MAX;
    assert!(matches!(change(&leave), Above { .. }));
    let cell = |plan: &mut SamplePlan| grid(plan, 3).order[0] = 9;
    assert!(matches!(change(&cell), Above { found: 9, .. }));
    let cells = |plan: &mut SamplePlan| grid(plan, 3).cells = 4;
    assert!(matches!(change(&cells), Above { found: 4, .. }));
    let short = |plan: &mut SamplePlan| grid(plan, 3).offsets.truncate(8);
    assert!(matches!(change(&short), Shape { expected: 9, found: 8, .. }));
    let empty = |plan: &mut SamplePlan| plan.views[3].size = 0;
    assert!(matches!(change(&empty), Empty | Above { .. }));
    let mut none = good.clone();
    (2..4).for_each(|view| grid(&mut none, view).patch = 0);
    let views = none.views.iter().map(ViewPlan::bytes).collect();
    let without = BatchShape { views, ..shape.clone() };
    assert!(matches!(fill(&without, 0, frame, &none).unwrap_err(), Empty));
}

#[test]
fn what_the_kernels_lack_is_left_to_the_cpu() {
    let mut plan = Recipe::detco().draw(50, 40, 1, 0, 0);
    assert!(supports(&plan));
    for sigma in [1e4, f32::INFINITY, f32::NAN, -1.0] {
        plan.views[3].ops = vec![Op::Gray, Op::Blur(sigma)];
        assert!(!supports(&plan), "{sigma}");
    }
    plan.views[3].ops = vec![Op::Blur(100.0)];
    assert!(supports(&plan));
    assert!(!supports(&Recipe::squash(256, 224).draw(50, 40, 1, 0, 0)));
}

/// Beside the libtorch of LIBTORCH, which `.cargo/config.toml` sets.
fn nvrtc() -> Nvrtc {
    let libtorch = std::env::var_os("LIBTORCH").map(PathBuf::from).unwrap_or_default();
    Nvrtc::open(&Search::beside_libtorch(&libtorch))
        .unwrap_or_else(|error| panic!("{error}: run `cargo xtask setup`"))
}

#[test]
fn the_kernels_compile_for_each_generation_since_ampere() {
    let nvrtc = nvrtc();
    for (major, name) in [(8, "sm_80"), (9, "sm_90"), (10, "sm_100")] {
        let ptx = kernels_as_ptx(&nvrtc, Architecture { major, minor: 0 }).unwrap();
        let ptx = String::from_utf8(ptx).unwrap();
        assert!(ptx.contains(&format!(".target {name}")), "{name}");
        for kernel in ["detco_views", "detco_normalise"] {
            assert!(ptx.contains(&format!(".entry {kernel}")), "{kernel} for {name}");
        }
        assert!(!ptx.contains("fma.rn.f"), "{name}: a fused multiply-add changes bytes");
    }
}

/// Some bytes of the host on the device.
fn upload(device: &Arc<Device>, bytes: &[u8], stream: &Stream) -> DeviceBuffer {
    let mut pinned = PinnedBuffer::new(device, bytes.len()).unwrap();
    pinned.bytes_mut().unwrap().copy_from_slice(bytes);
    let buffer = DeviceBuffer::new(device, bytes.len()).unwrap();
    pinned.upload(0..bytes.len(), buffer.as_slice(), stream).unwrap();
    buffer
}

fn download(device: &Arc<Device>, buffer: &DeviceBuffer, stream: &Stream) -> Vec<u8> {
    let mut pinned = PinnedBuffer::new(device, buffer.len()).unwrap();
    pinned.download(0..buffer.len(), buffer.as_slice(), stream).unwrap();
    pinned.bytes().unwrap().to_vec()
}

/// The kernels themselves, where there is a GPU. Where there is none, the host's through its driver's
/// twin: what is launched with what, and when.
#[test]
fn a_device_renders_the_renderers_bytes() {
    let device = match Device::open(0) {
        Ok(device) => device,
        Err(error) => {
            println!("no GPU here: {error}");
            return driver::again(concat!(
                module_path!(),
                "::a_device_renders_the_renderers_bytes"
            ));
        }
    };
    println!("the kernels run on {}", device.name());
    let cache = tempfile::tempdir().unwrap();
    for (name, recipe) in recipes() {
        let samples = drawn(&recipe);
        let shape = shape(samples.len(), &samples[0].1, Element::F32);
        on_device(&device, cache.path(), &samples, shape, name);
    }
    driver::hold_nothing_against();
}

fn on_device(
    device: &Arc<Device>,
    cache: &Path,
    samples: &[(Image, SamplePlan)],
    shape: BatchShape,
    name: &str,
) {
    let stream = Stream::new(device).unwrap();
    let mut renderer = DeviceRenderer::new(
        device,
        &Kernels::load(device, &nvrtc(), cache).unwrap(),
        shape.clone(),
    )
    .unwrap();
    let frames: Vec<DeviceBuffer> =
        samples.iter().map(|(image, _)| upload(device, &image.pixels, &stream)).collect();
    let tensors: Vec<DeviceBuffer> =
        tensors(&shape).iter().map(|tensor| upload(device, tensor, &stream)).collect();
    let out: Vec<DeviceSlice<'_>> = tensors.iter().map(DeviceBuffer::as_slice).collect();
    let items: Vec<Item<'_>> = samples
        .iter()
        .zip(&frames)
        .enumerate()
        .map(|(slot, ((image, plan), buffer))| Item {
            slot,
            frame: DeviceFrame { pixels: buffer.as_slice(), ..frame(image) },
            plan,
        })
        .collect();
    // Twice: plans, scratch and shared memory are used again.
    renderer.render(&items, &out, &stream).unwrap();
    renderer.render(&items, &out, &stream).unwrap();
    let found: Vec<Vec<u8>> =
        tensors.iter().map(|tensor| download(device, tensor, &stream)).collect();
    let (mut levels, mut normalised) = (Levels::default(), Levels::default());
    let mut cpu = Renderer::new();
    for (slot, (image, plan)) in samples.iter().enumerate() {
        let views = expected(&mut cpu, image, plan);
        for (tensor, bytes) in found.iter().zip(&views) {
            let len = 4 * bytes.len();
            levels.add(&tensor[slot * len..][..len], bytes);
        }
        let bytes = upload(device, &views[0], &stream);
        let numbers = DeviceBuffer::new(device, 4 * views[0].len()).unwrap();
        renderer.normalise(bytes.as_slice(), numbers.as_slice(), &stream).unwrap();
        normalised.add(&download(device, &numbers, &stream), &views[0]);
    }
    levels.hold(&format!("{name} on the device"));
    normalised.hold(&format!("{name}, rendered on the CPU, normalised on the device"));
}
