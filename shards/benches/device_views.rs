//! Speed of the view kernels on a GPU: `cargo bench -p detco-shards --features cuda --bench
//! device_views`. Where there is no GPU it says so.
//!
//! A batch of DetCo views in bfloat16 from frames of ImageNet's common size, which lie on the
//! device. Beside it a copy on the same device, in the same bytes a second: read and written ones
//! added up. Of the views those bytes are counted that no kernel can avoid: the crops, no more than
//! the frame, and the tensors.

#[path = "../tests/support/images.rs"]
mod images;

use std::path::PathBuf;
use std::sync::Arc;

use detco_shards::cuda::{
    CudaError, Device, DeviceBuffer, Event, Nvrtc, PinnedBuffer, Search, Stream,
};
use detco_shards::pipeline::Views;
use detco_shards::views::cuda::{
    BatchShape, DeviceFrame, DeviceRenderer, DeviceViewsError, Element, Item, Kernels,
};
use detco_shards::views::{MEAN, Recipe, STD, SamplePlan};

/// Timed runs, after one that warms up.
const RUNS: usize = 11;
/// Batches of a run: while the device works on one, the host packs the next.
const BATCHES: usize = 4;

fn main() {
    let measured = std::env::args().any(|argument| argument == "--bench");
    let device = match Device::open(0) {
        Ok(device) => device,
        Err(error) => {
            println!("nothing is measured, for want of a GPU: {error}");
            return;
        }
    };
    let samples = if measured { 256 } else { 2 };
    if let Err(error) = measure(&device, samples) {
        println!("measuring failed: {error}");
        std::process::exit(1);
    }
}

fn measure(device: &Arc<Device>, samples: usize) -> Result<(), DeviceViewsError> {
    println!("{}, {}", device.name(), device.architecture());
    let stream = Stream::new(device)?;
    let copied = copy_bandwidth(device, &stream)?;
    println!("copy on the device: {:.0} GB/s read and written", copied / 1e9);
    let libtorch = std::env::var_os("LIBTORCH").map(PathBuf::from).unwrap_or_default();
    let nvrtc = Nvrtc::open(&Search::beside_libtorch(&libtorch))?;
    let cache = std::env::temp_dir().join("detco-bench-kernels");
    for name in ["detco", "moco-v2"] {
        let recipe = Recipe::preset(name).expect("a preset's name");
        let shape = BatchShape {
            samples,
            views: Views::Recipe(recipe.clone()).layout(1).view_bytes().collect(),
            element: Element::Bf16,
            mean: MEAN,
            std: STD,
        };
        let mut renderer =
            DeviceRenderer::new(device, &Kernels::load(device, &nvrtc, &cache)?, shape)?;
        let (seconds, bytes) = render(&mut renderer, &recipe, device, &stream)?;
        println!(
            "{name}: {:.0} images/s, {:.2} ms a batch of {samples}, {:.0} GB/s, {:.0} % of a copy's",
            samples as f64 / seconds,
            seconds * 1e3,
            bytes / seconds / 1e9,
            bytes / seconds / copied * 100.0
        );
    }
    Ok(())
}

/// Median seconds of a batch on the device, and the bytes that it cannot avoid.
fn render(
    renderer: &mut DeviceRenderer,
    recipe: &Recipe,
    device: &Arc<Device>,
    stream: &Stream,
) -> Result<(f64, f64), DeviceViewsError> {
    let shape = renderer.shape().clone();
    let (width, height) = (500, 375);
    let frame_bytes = width as usize * height as usize * 3;
    // Every sample has a frame of its own: no cache serves two of them.
    let mut host = PinnedBuffer::new(device, frame_bytes)?;
    let mut frames = Vec::new();
    for sample in 0..shape.samples {
        host.bytes_mut()?
            .copy_from_slice(&images::textured(width, height, sample as u64 % 4).pixels);
        let frame = DeviceBuffer::new(device, frame_bytes)?;
        host.upload(0..frame_bytes, frame.as_slice(), stream)?;
        frames.push(frame);
    }
    let plans: Vec<SamplePlan> =
        (0..shape.samples).map(|sample| recipe.draw(width, height, 1, 0, sample as u64)).collect();
    let items: Vec<Item<'_>> = plans
        .iter()
        .zip(&frames)
        .enumerate()
        .map(|(slot, (plan, frame))| {
            let pitch = width as usize * 3;
            let frame = DeviceFrame { pixels: frame.as_slice(), width, height, pitch };
            Item { slot, frame, plan }
        })
        .collect();
    let tensors = shape
        .views
        .iter()
        .map(|numbers| DeviceBuffer::new(device, shape.samples * numbers * shape.element.bytes()));
    let tensors = tensors.collect::<Result<Vec<_>, _>>()?;
    let out: Vec<_> = tensors.iter().map(DeviceBuffer::as_slice).collect();
    let written: usize = tensors.iter().map(DeviceBuffer::len).sum();
    let seconds = median(device, stream, || renderer.render(&items, &out, stream))?;
    let read: usize = plans.iter().map(|plan| crops(plan).min(frame_bytes)).sum();
    Ok((seconds, (read + written) as f64))
}

/// Bytes of a sample's crops.
fn crops(plan: &SamplePlan) -> usize {
    let area = |crop: detco_shards::views::Rect| crop.width as usize * crop.height as usize;
    plan.views.iter().map(|view| 3 * area(view.crop)).sum()
}

/// Bytes read and written a second by a copy.
fn copy_bandwidth(device: &Arc<Device>, stream: &Stream) -> Result<f64, CudaError> {
    let bytes = 1 << 30;
    let (from, to) = (DeviceBuffer::new(device, bytes)?, DeviceBuffer::new(device, bytes)?);
    let seconds = median(device, stream, || stream.copy(from.as_slice(), to.as_slice()))?;
    Ok(2.0 * bytes as f64 / seconds)
}

/// Median seconds of what `work` queues, by the device's clock.
fn median<E: From<CudaError>>(
    device: &Arc<Device>,
    stream: &Stream,
    mut work: impl FnMut() -> Result<(), E>,
) -> Result<f64, E> {
    work()?;
    let mut seconds = Vec::new();
    for _ in 0..RUNS {
        let (start, end) = (Event::timed(device)?, Event::timed(device)?);
        start.record(stream)?;
        for _ in 0..BATCHES {
            work()?;
        }
        end.record(stream)?;
        end.synchronize()?;
        seconds.push(f64::from(end.ms_since(&start)?) / 1e3 / BATCHES as f64);
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[RUNS / 2])
}
