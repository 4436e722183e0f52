//! Any bytes at 1/2 and 1/4 give as many pixels as are said, or an error. The last five bytes say of
//! which box and how finely: behind the end of a picture, any are allowed.
#![no_main]

use detco_shards::decode::{Decoder, Image, Part, Rect, probe};
use libfuzzer_sys::fuzz_target;

const PIXELS_MAX: u64 = 1 << 20;

fuzz_target!(|bytes: &[u8]| {
    let Some((_, [a, b, c, d, fine])) = bytes.split_last_chunk() else { return };
    let [left, top] = [[*a, *b], [*c, *d]].map(u16::from_le_bytes);
    let half = fine % 2 == 0;
    let Ok(header) = probe(bytes) else { return };
    if u64::from(header.width) * u64::from(header.height) > PIXELS_MAX {
        return;
    }
    let (left, top) = (u32::from(left) % header.width, u32::from(top) % header.height);
    let area = Rect { left, top, width: header.width - left, height: header.height - top };
    let wanted = Part { area, reduction: if half { 2 } else { 4 } };
    let (mut decoder, mut image) = (Decoder::new(), Image::new());
    match decoder.decode_part(bytes, &header, wanted, &mut image) {
        Ok(part) => {
            assert!(part.area.contains(&area) && part.reduction <= wanted.reduction);
            assert!(part.area.left % part.reduction == 0 && part.area.top % part.reduction == 0);
            let sides = [part.area.width, part.area.height].map(|s| s.div_ceil(part.reduction));
            assert_eq!([image.width, image.height], sides);
            assert_eq!(image.pixels.len() as u64, u64::from(sides[0]) * u64::from(sides[1]) * 3);
        }
        Err(error) => assert!(!error.to_string().contains("panicked"), "{error}"),
    }
});
