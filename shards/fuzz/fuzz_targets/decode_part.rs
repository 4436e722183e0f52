//! Of any bytes, the pixels in a box are those of the whole picture. The last eight bytes say which
//! box: behind the end of a picture, any are allowed.
#![no_main]

use detco_shards::decode::{Decoder, Image, Part, Rect, probe};
use libfuzzer_sys::fuzz_target;

const PIXELS_MAX: u64 = 1 << 18;

fuzz_target!(|bytes: &[u8]| {
    let Some((_, [a, b, c, d, e, f, g, h])) = bytes.split_last_chunk() else { return };
    let [left, top, width, height] =
        [[*a, *b], [*c, *d], [*e, *f], [*g, *h]].map(u16::from_le_bytes);
    let Ok(header) = probe(bytes) else { return };
    if u64::from(header.width) * u64::from(header.height) > PIXELS_MAX {
        return;
    }
    let side = |from: u16, length: u16, all: u32| {
        let from = u32::from(from) % all;
        (from, 1 + u32::from(length) % (all - from))
    };
    let (left, width) = side(left, width, header.width);
    let (top, height) = side(top, height, header.height);
    let area = Rect { left, top, width, height };
    let (mut decoder, mut image, mut all) = (Decoder::new(), Image::new(), Image::new());
    let part = decoder.decode_part(bytes, &header, Part { area, reduction: 1 }, &mut image);
    if let Err(error) = &part {
        assert!(!error.to_string().contains("panicked"), "{error}");
    }
    // Damage below the box may go unnoticed.
    let (Ok(part), Ok(())) = (part, decoder.decode(bytes, &mut all)) else { return };
    assert!(part.area.contains(&area) && part.reduction == 1);
    assert_eq!((image.width, image.height), (part.area.width, part.area.height));
    let row = |image: &Image, left: u32, y: u32| {
        let at = (y as usize * image.width as usize + left as usize) * 3;
        image.pixels[at..at + width as usize * 3].to_vec()
    };
    for y in top..top + height {
        let own = row(&image, left - part.area.left, y - part.area.top);
        assert!(own == row(&all, left, y), "row {y} of {area:?}, decoded {part:?}");
    }
});
