//! The time of each operation of the views, measured separately: on one thread, on real images with the
//! plans of a real epoch. Each plan is rendered with one more operation at a time, and an operation's time
//! is the difference that it makes, or 0 where that is lost in noise.
//!
//! The pipeline does not count this, since a clock around each operation would slow the fast ones; and
//! fused operations show only as differences.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::{Duration, Instant};

use detco_shards::decode::{DecodeError, Decoder, Frame, Image, Part, probe};
use detco_shards::stats::Mark;
use detco_shards::stream::ShardSet;
use detco_shards::views::{Op, Recipe, Renderer, ViewPlan, needed};

/// Number of images, at most.
const IMAGES_MAX: u64 = 48;
/// Time limit, from the second image on.
const TIME_MAX: Duration = Duration::from_secs(2);
/// Repetitions of each rendering; the least time counts.
const REPEATS: usize = 3;

/// Microseconds an image by operation: `draw`, for each group of views `resize` with its name (crop,
/// resize, and the way into the slab), then the operations by the names they have in plans. Images that
/// do not decode are passed over. `reduction_max` is the most that a picture is reduced by its decoder
/// ([`needed`]).
pub fn measure(
    set: &ShardSet,
    recipe: &Recipe,
    seed: u64,
    reduction_max: u32,
) -> BTreeMap<String, f64> {
    let mut bench = Bench {
        decoder: Decoder::new(),
        renderer: Renderer::new(),
        image: Image::new(),
        part: Part::whole(0, 0),
        out: vec![0; recipe.bytes()],
        sums: BTreeMap::new(),
    };
    let (mut done, count, begin) = (0, set.len().min(IMAGES_MAX), Instant::now());
    for number in 0..count {
        // Spread evenly; below `len`, in 128 bits so that the product fits.
        let id = (u128::from(number) * u128::from(set.len()) / u128::from(count)) as u64;
        let Ok(sample) = set.sample(id) else { continue };
        if bench.sample(sample.jpeg(), recipe, reduction_max, (seed, id)).is_ok() {
            done += 1;
        }
        if begin.elapsed() > TIME_MAX {
            break;
        }
    }
    let images = f64::from(done.max(1));
    bench.sums.into_iter().map(|(name, seconds)| (name, seconds.max(0.0) * 1e6 / images)).collect()
}

struct Bench {
    decoder: Decoder,
    renderer: Renderer,
    image: Image,
    part: Part,
    out: Vec<u8>,
    /// Seconds over all images.
    sums: BTreeMap<String, f64>,
}

impl Bench {
    fn sample(
        &mut self,
        jpeg: &[u8],
        recipe: &Recipe,
        reduction_max: u32,
        (seed, id): (u64, u64),
    ) -> Result<(), DecodeError> {
        let header = probe(jpeg)?;
        let draw = || recipe.draw(header.width, header.height, seed, 0, id);
        let plan = draw();
        let part = needed(&plan.views, reduction_max);
        let part = part.unwrap_or(Part::whole(header.width, header.height));
        self.part = self.decoder.decode_part(jpeg, &header, part, &mut self.image)?;
        let seconds = least(|| {
            black_box(draw());
        });
        self.add("draw", seconds);
        let groups = recipe.groups.iter().flat_map(|one| (0..one.count).map(move |_| one));
        for (view, group) in plan.views.iter().zip(groups) {
            self.prefixes(view, &format!("resize {}", group.name), |bench, ops| {
                let cut = ViewPlan { ops, ..view.clone() };
                let frame = Frame { image: &bench.image, part: bench.part };
                least(|| bench.renderer.view(frame, &cut, &mut bench.out[..cut.bytes()]))
            });
        }
        Ok(())
    }

    /// Times a view with none, one, two ... of its operations.
    fn prefixes(
        &mut self,
        plan: &ViewPlan,
        resize: &str,
        time: impl Fn(&mut Bench, Vec<Op>) -> f64,
    ) {
        let mut before = time(self, Vec::new());
        self.add(resize, before);
        for (at, op) in plan.ops.iter().enumerate() {
            let with = time(self, plan.ops[..=at].to_vec());
            self.add(&name(op), with - before);
            before = with;
        }
    }

    fn add(&mut self, name: &str, seconds: f64) {
        *self.sums.entry(name.to_owned()).or_default() += seconds;
    }
}

/// The least CPU time of some tries, in seconds: what other programs take does not count.
fn least(mut work: impl FnMut()) -> f64 {
    let time = || {
        let start = Mark::now();
        work();
        (Mark::now().cpu - start.cpu) as f64 / 1e9
    };
    std::iter::repeat_with(time).take(REPEATS).fold(f64::INFINITY, f64::min)
}

/// The operation's name in a plan: `brightness`, `blur`.
fn name(op: &Op) -> String {
    match serde_json::to_value(op) {
        Ok(serde_json::Value::String(name)) => name,
        Ok(serde_json::Value::Object(one)) => one.keys().next().cloned().unwrap_or_default(),
        _ => "other".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_have_the_names_of_plans() {
        assert_eq!(name(&Op::Blur(1.5)), "blur");
        assert_eq!(name(&Op::Gray), "gray");
        assert_eq!(name(&Op::Affine { matrix: [0.0; 6], bicubic: true }), "affine");
    }
}
