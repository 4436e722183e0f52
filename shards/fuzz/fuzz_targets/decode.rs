//! No bytes make the decoder panic, hand out another size than the header's, or keep anything of one
//! picture for the next.
#![no_main]

use detco_shards::decode::{Decoder, Image, probe};
use libfuzzer_sys::fuzz_target;

/// Larger pictures take a while each and show nothing that smaller ones do not.
const PIXELS_MAX: u64 = 1 << 20;

fuzz_target!(|bytes: &[u8]| {
    let Ok(header) = probe(bytes) else {
        assert!(Decoder::new().decode(bytes, &mut Image::new()).is_err(), "refused, then decoded");
        return;
    };
    if u64::from(header.width) * u64::from(header.height) > PIXELS_MAX {
        return;
    }
    let (mut decoder, mut image) = (Decoder::new(), Image::new());
    let first = decoder.decode(bytes, &mut image);
    if let Err(error) = &first {
        assert!(!error.to_string().contains("panicked"), "{error}");
        return;
    }
    assert_eq!((image.width, image.height), (header.width, header.height));
    assert_eq!(image.pixels.len() as u64, u64::from(image.width) * u64::from(image.height) * 3);
    let seen = image.clone();
    decoder.decode(bytes, &mut image).expect("once more");
    assert!(image == seen, "other pixels the second time");
});
