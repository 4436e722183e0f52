//! The renderer with vector instructions against the one in plain loops, to the byte.

use detco_shards::decode::Image;
use detco_shards::views::{Filter, GridPlan, Op, Recipe, Rect, Renderer, ViewPlan};
use proptest::prelude::*;

/// Noise, flat areas, or a ramp: the ways a filter goes wrong differ.
fn image() -> impl Strategy<Value = Image> {
    let sizes = (1u32..400, 1u32..300);
    (sizes, 0u8..3, any::<u64>()).prop_map(|((width, height), kind, seed)| {
        let mut state = seed | 1;
        let pixels = (0..width * height * 3)
            .map(|i| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let noise = (state >> 56) as u8;
                match kind {
                    0 => noise,
                    1 => [0, 255][usize::from(noise > 250)],
                    _ => (i / 3 % width + i % 3 * 40) as u8,
                }
            })
            .collect();
        Image { width, height, pixels }
    })
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        (0.0f32..2.5).prop_map(Op::Brightness),
        (0.0f32..2.5).prop_map(Op::Contrast),
        (0.0f32..2.5).prop_map(Op::Saturation),
        (-0.5f32..0.5).prop_map(Op::Hue),
        Just(Op::Gray),
        (0.01f32..4.0).prop_map(Op::Blur),
        (0.1f32..2.0).prop_map(Op::Blur),
        Just(Op::Solarize(128)),
        Just(Op::Flip),
    ]
}

fn crop(image: &Image, [x, y, w, h]: [f64; 4]) -> Rect {
    let part = |of: u32, share: f64| (f64::from(of) * share) as u32;
    let (left, top) = (part(image.width - 1, x), part(image.height - 1, y));
    let width = 1 + part(image.width - left - 1, w);
    Rect { left, top, width, height: 1 + part(image.height - top - 1, h) }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_global_view_has_the_same_bytes(
        image in image(),
        at in prop::array::uniform4(0.0f64..=1.0),
        ops in prop::collection::vec(op(), 0..5),
        size in 1u32..270,
        flip: bool,
        filter in prop::sample::select(vec![Filter::Bilinear, Filter::Bicubic]),
    ) {
        let crop = crop(&image, at);
        let plan = ViewPlan { size, crop, filter, ops, flip, ..ViewPlan::default() };
        let [fast, plain] = [Renderer::new(), Renderer::plain()].map(|mut renderer| {
            let mut out = vec![0; (size * size * 3) as usize];
            renderer.view(&image, &plan, &mut out);
            out
        });
        let differ = fast.iter().zip(&plain).position(|(a, b)| a != b);
        prop_assert_eq!(differ, None, "{:?}", plan);
    }

    #[test]
    fn a_patch_set_has_the_same_bytes(
        image in image(),
        ops in prop::collection::vec(op(), 0..6),
        patch in 1u32..70,
        room in 0u32..22,
        flip: bool,
    ) {
        let recipe = Recipe::detco();
        let drawn = recipe.draw(image.width, image.height, 1, 0, u64::from(patch));
        let mut plan = drawn.views[2].clone();
        let drawn = plan.grid.expect("DetCo's third view is cut");
        let offsets = drawn.offsets.iter().map(|at| at.map(|offset| offset.min(room))).collect();
        let grid = Some(GridPlan { patch, offsets, ..drawn });
        plan = ViewPlan { size: 3 * (patch + room), ops, flip, grid, ..plan };
        let [fast, plain] = [Renderer::new(), Renderer::plain()].map(|mut renderer| {
            let mut out = vec![0; (9 * patch * patch * 3) as usize];
            renderer.view(&image, &plan, &mut out);
            out
        });
        let differ = fast.iter().zip(&plain).position(|(a, b)| a != b);
        prop_assert_eq!(differ, None, "{:?}", plan);
    }
}

/// One renderer for many views: nothing of the one before shows in the next.
#[test]
fn scratch_memory_leaves_no_trace() {
    let mut used = Renderer::new();
    for (width, height, size) in [(300, 200, 224), (17, 400, 48), (90, 90, 255), (5, 5, 3)] {
        let pixels = (0..width * height * 3).map(|i| (i * 7 % 251) as u8).collect();
        let image = Image { width, height, pixels };
        let crop = Rect { left: 0, top: 0, width, height };
        let ops = vec![Op::Blur(1.2), Op::Hue(0.1)];
        let plan = ViewPlan { size, crop, ops, ..ViewPlan::default() };
        let mut outs = [(); 2].map(|()| vec![0; (size * size * 3) as usize]);
        used.view(&image, &plan, &mut outs[0]);
        Renderer::new().view(&image, &plan, &mut outs[1]);
        assert!(outs[0] == outs[1], "{width}x{height} to {size}");
    }
}
