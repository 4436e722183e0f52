//! Files made to keep a decoder busy or to fill the memory: each is refused, or decoded, within
//! bounds of time and memory. The allocator of this program counts.

#![expect(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::fmt::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use detco_shards::decode::{DecodeError, Decoder, Image, PIXELS_MAX, SCANS_MAX, SEGMENTS_MAX};
use jpeg_encoder::{ColorType, Encoder, SamplingFactor};

struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn count(added: usize, removed: usize) {
    let now = NOW.fetch_add(added, Ordering::Relaxed) + added - removed;
    NOW.fetch_sub(removed, Ordering::Relaxed);
    PEAK.fetch_max(now, Ordering::Relaxed);
}

// SAFETY: every call is passed on to the system's allocator unchanged; counting touches atomics
// only.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: the caller keeps the rules of `alloc`, which are the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(0, layout.size());
        // SAFETY: as above; the pointer came from the system's allocator.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size, layout.size());
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A thousand times what any of them takes: who is not done by then is not going to be.
const TIME_MAX: Duration = Duration::from_secs(120);

/// What a file may make the decoder allocate besides a copy of the file: far below the gigabytes
/// that the bombs claim.
const MEMORY_MAX: usize = 24 << 20;

const SOI: [u8; 2] = [0xFF, 0xD8];
const EOI: [u8; 2] = [0xFF, 0xD9];

fn jpeg(sampling: SamplingFactor, progressive: bool) -> Vec<u8> {
    let pixels: Vec<u8> = (0..64 * 48 * 3).map(|i: u32| (i * i / 97) as u8).collect();
    let mut bytes = Vec::new();
    let mut encoder = Encoder::new(&mut bytes, 80);
    encoder.set_progressive(progressive);
    encoder.set_sampling_factor(sampling);
    encoder.encode(&pixels, 64, 48, ColorType::Rgb).expect("encodes");
    bytes
}

/// Where the first of a kind of marker stands.
fn marker(bytes: &[u8], kind: u8) -> usize {
    bytes.windows(2).position(|pair| pair == [0xFF, kind]).expect("the marker")
}

/// The same JPEG with another size in its frame.
fn resized(mut bytes: Vec<u8>, width: u16, height: u16) -> Vec<u8> {
    let kind = if bytes.windows(2).any(|pair| pair == [0xFF, 0xC2]) { 0xC2 } else { 0xC0 };
    let frame = marker(&bytes, kind);
    bytes[frame + 5..frame + 7].copy_from_slice(&height.to_be_bytes());
    bytes[frame + 7..frame + 9].copy_from_slice(&width.to_be_bytes());
    bytes
}

fn segment(kind: u8, body: &[u8]) -> Vec<u8> {
    let length = u16::try_from(body.len() + 2).expect("a segment's length");
    [&[0xFF, kind], &length.to_be_bytes()[..], body].concat()
}

/// The same JPEG with something behind its first marker.
fn with_front(bytes: &[u8], front: &[u8]) -> Vec<u8> {
    [&SOI, front, &bytes[2..]].concat()
}

/// The same JPEG with its last scan's header `times` times more, and no coded data in those.
fn with_scans(bytes: &[u8], times: usize) -> Vec<u8> {
    let start = bytes.windows(2).rposition(|pair| pair == [0xFF, 0xDA]).expect("a scan");
    let header = &bytes[start..start + 2 + usize::from(bytes[start + 3])];
    let data = &bytes[start + header.len()..bytes.len() - 2];
    // Each with a byte of data, so that a decoder has something to begin with.
    let again = [header, &data[..1]].concat().repeat(times);
    [&bytes[..bytes.len() - 2], &again, &EOI].concat()
}

/// A progressive JPEG with `times` short comments before its last scan.
fn between_scans(times: usize) -> Vec<u8> {
    let bytes = jpeg(SamplingFactor::F_2_2, true);
    let last = bytes.windows(2).rposition(|pair| pair == [0xFF, 0xDA]).expect("a scan");
    [&bytes[..last], &segment(0xFE, b"x").repeat(times), &bytes[last..]].concat()
}

/// A baseline JPEG whose first scan holds one of its components only.
fn scan_of_one(times: usize) -> Vec<u8> {
    let bytes = jpeg(SamplingFactor::F_1_1, false);
    let start = marker(&bytes, 0xDA);
    let id = bytes[start + 5];
    let header = segment(0xDA, &[1, id, 0, 0, 63, 0]);
    let data = [0x55; 400];
    [&bytes[..start], &[&header[..], &data].concat().repeat(times), &EOI].concat()
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg())
        })
    })
}

fn chunk(kind: &[u8; 4], body: &[u8]) -> Vec<u8> {
    let checked = [&kind[..], body].concat();
    let length = (body.len() as u32).to_be_bytes();
    [&length, &checked[..], &crc32(&checked).to_be_bytes()].concat()
}

fn ihdr(width: u32, height: u32, depth: u8, kind: u8) -> Vec<u8> {
    let sides = [width.to_be_bytes(), height.to_be_bytes()].concat();
    chunk(b"IHDR", &[&sides[..], &[depth, kind, 0, 0, 0]].concat())
}

/// A PNG of these chunks.
fn png(chunks: &[Vec<u8>]) -> Vec<u8> {
    let signature = [0x89, b'P', b'N', b'G', 0x0D, 0x0A, 0x1A, 0x0A];
    [&signature[..], &chunks.concat(), &chunk(b"IEND", &[])].concat()
}

/// A zlib stream of `1 + 258 * repeats` zeros: 13 bits for each 258 of them.
fn zeros(repeats: u64) -> Vec<u8> {
    let (mut bytes, mut held, mut count) = (vec![0x78, 0x01], 0u32, 0);
    let mut put = |value: u32, bits: u32| {
        // Codes come with their first bit first, and bytes are filled from the low end.
        for bit in (0..bits).rev() {
            held |= (value >> bit & 1) << count;
            count += 1;
            if count == 8 {
                bytes.push(held as u8);
                (held, count) = (0, 0);
            }
        }
    };
    put(0b1, 1); // the last block
    put(0b10, 2); // fixed codes
    put(0x30, 8); // a literal zero
    for _ in 0..repeats {
        put(0b1100_0101, 8); // length 258
        put(0, 5); // distance 1
    }
    put(0, 7 + 8); // the end, and bits to fill the byte
    let length = (1 + 258 * repeats) % 65521;
    bytes.extend(((length as u32) << 16 | 1).to_be_bytes());
    bytes
}

/// What is expected of a bomb.
enum Expected {
    /// The picture behind it, 64x48.
    Decoded,
    Error(fn(&DecodeError) -> bool),
    /// Either: where the decoders differ, and both are right.
    Bounded,
}

use Expected::{Bounded, Decoded, Error};

fn is_malformed(error: &DecodeError) -> bool {
    matches!(error, DecodeError::Malformed { .. })
}

fn is_truncated(error: &DecodeError) -> bool {
    matches!(error, DecodeError::Truncated { .. })
}

fn is_too_large(error: &DecodeError) -> bool {
    matches!(error, DecodeError::TooLarge { .. })
}

fn is_too_short(error: &DecodeError) -> bool {
    matches!(error, DecodeError::TooShort { .. })
}

fn is_too_many(error: &DecodeError) -> bool {
    matches!(error, DecodeError::TooMany { .. })
}

fn is_damaged(error: &DecodeError) -> bool {
    matches!(error, DecodeError::Damaged { .. })
}

type Bomb = (&'static str, Vec<u8>, Expected);

fn sizes() -> Vec<Bomb> {
    let base = || jpeg(SamplingFactor::F_2_2, false);
    let progressive = || jpeg(SamplingFactor::F_2_2, true);
    let rare = || jpeg(SamplingFactor::F_4_1, true);
    vec![
        ("65500x65500", resized(base(), 65500, 65500), Error(is_too_large)),
        ("65500x65500 progressive", resized(progressive(), 65500, 65500), Error(is_too_large)),
        ("16384x16384", resized(base(), 16384, 16384), Error(is_too_short)),
        ("16384x16384 progressive", resized(progressive(), 16384, 16384), Error(is_too_short)),
        ("16384x16384 4:1:1", resized(rare(), 16384, 16384), Error(is_too_short)),
        ("65535x1", resized(base(), 65535, 1), Bounded),
        ("1x65535", resized(base(), 1, 65535), Bounded),
        ("width 0", resized(base(), 0, 48), Error(is_malformed)),
        ("height 0", resized(base(), 64, 0), Error(is_malformed)),
        ("both 0", resized(base(), 0, 0), Error(is_malformed)),
        ("two frames", two_frames(), Error(is_malformed)),
        // libjpeg skips stuffing and the bytes behind it, and so does whoever reads this header.
        ("a frame behind stuffing", frame_behind_stuffing(), Decoded),
        ("16384x16384 arithmetic", arithmetic(resized(base(), 16384, 16384)), Error(is_too_short)),
    ]
}

/// The same bytes, said to be of arithmetic coding.
fn arithmetic(mut bytes: Vec<u8>) -> Vec<u8> {
    let frame = marker(&bytes, 0xC0);
    bytes[frame + 1] = 0xC9;
    bytes
}

/// A second frame of another size before the scan.
fn two_frames() -> Vec<u8> {
    let bytes = jpeg(SamplingFactor::F_2_2, false);
    let frame = marker(&bytes, 0xC0);
    let other = &resized(bytes.clone(), 4000, 4000)[frame..frame + 19];
    [&bytes[..frame], other, &bytes[frame..]].concat()
}

/// A frame that one reader of headers takes for a frame and another for stuffing.
fn frame_behind_stuffing() -> Vec<u8> {
    let bytes = jpeg(SamplingFactor::F_2_2, false);
    let frame = marker(&bytes, 0xC0);
    let mut other = resized(bytes.clone(), 4000, 4000)[frame..frame + 19].to_vec();
    other.insert(1, 0);
    [&bytes[..frame], &other, &bytes[frame..]].concat()
}

fn scans() -> Vec<Bomb> {
    let progressive = jpeg(SamplingFactor::F_2_2, true);
    let rare = jpeg(SamplingFactor::F_4_1, true);
    // Large enough in claim that each scan would be a walk over 4 million blocks.
    let huge = resized(with_scans(&progressive, 100_000), 16384, 16384);
    // Enough bytes for so many pixels, and few enough scans for fewer pixels.
    let comments = segment(0xFE, &[0x41; 65_533]).repeat(5);
    let few = with_front(&resized(with_scans(&progressive, 40), 16384, 16384), &comments);
    vec![
        ("100,000 scans", with_scans(&progressive, 100_000), Error(is_too_many)),
        ("100,000 scans, 4:1:1", with_scans(&rare, 100_000), Error(is_too_many)),
        ("100,000 scans of 268 megapixels", huge, Error(is_too_many)),
        ("100,000 scans of one component", scan_of_one(100_000), Error(is_too_many)),
        ("50 scans of 268 megapixels", few, Error(is_too_many)),
        ("100,000 comments between two scans", between_scans(100_000), Error(is_too_many)),
        ("150 scans", with_scans(&progressive, 150), Error(is_too_many)),
        ("100 scans of one component", scan_of_one(SCANS_MAX), Bounded),
        ("95 scans of 2 megapixels", resized(with_scans(&progressive, 85), 2048, 1024), Bounded),
        (
            "100,000 scans behind the end",
            [&jpeg(SamplingFactor::F_2_2, false)[..], &with_scans(&progressive, 100_000)].concat(),
            Bounded,
        ),
    ]
}

fn markers() -> Vec<Bomb> {
    let base = jpeg(SamplingFactor::F_2_2, false);
    let full = vec![0x41; 65_533];
    let comments = segment(0xFE, &full).repeat(300);
    let profile: Vec<u8> = (1..=255)
        .flat_map(|i| segment(0xE2, &[&b"ICC_PROFILE\0"[..], &[i, 255], &full[..65_000]].concat()))
        .collect();
    let piece = |offset: u32| {
        let front = [&b"http://ns.adobe.com/xmp/extension/\0"[..], &[b'G'; 32]].concat();
        segment(
            0xE1,
            &[&front[..], &1_000_000u32.to_be_bytes(), &offset.to_be_bytes(), b"x"].concat(),
        )
    };
    let pieces = |count: u32| (0..count).flat_map(piece).collect::<Vec<u8>>();
    let exif_loop = segment(
        0xE1,
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0\x01\0\0\0\x01\0\0\0\x08\0\0\0",
    );
    let table = segment(0xDB, &[&[0][..], &[16; 64]].concat());
    let restarts = [&segment(0xDD, &[0, 1])[..]].concat();
    let storm: Vec<u8> = (0..500_000u32).flat_map(|i| [0xFF, 0xD0 + (i % 8) as u8]).collect();
    let scan = marker(&base, 0xDA);
    let mut stormy = with_front(&base, &restarts);
    stormy.splice(scan + restarts.len() + 14..scan + restarts.len() + 14, storm);
    vec![
        ("300 comments of 65,533 bytes", with_front(&base, &comments), Decoded),
        ("a colour profile of 16 MB", with_front(&base, &profile), Decoded),
        ("4,000 pieces of XMP", with_front(&base, &pieces(4000)), Decoded),
        ("100,000 pieces of XMP", with_front(&base, &pieces(100_000)), Error(is_too_many)),
        (
            "100,000 empty comments",
            with_front(&base, &segment(0xFE, &[]).repeat(100_000)),
            Error(is_too_many),
        ),
        ("100,000 tables", with_front(&base, &table.repeat(100_000)), Error(is_too_many)),
        (
            "stuffing 3 million times",
            with_front(&base, &[0xFF, 0].repeat(3_000_000)),
            Error(is_too_many),
        ),
        ("a start 3 million times", with_front(&base, &SOI.repeat(3_000_000)), Error(is_malformed)),
        ("10 MB of fill bytes", with_front(&base, &vec![0xFF; 10 << 20]), Bounded),
        ("10 MB of zeros", with_front(&base, &vec![0; 10 << 20]), Decoded),
        ("a segment of length 0", with_front(&base, &[0xFF, 0xE5, 0, 0]), Error(is_malformed)),
        ("a segment of length 1", with_front(&base, &[0xFF, 0xE5, 0, 1]), Error(is_malformed)),
        (
            "a segment beyond the end",
            [&SOI[..], &[0xFF, 0xE5, 0xFF, 0xFF, 1]].concat(),
            Error(is_truncated),
        ),
        ("EXIF with 65,535 entries", with_front(&base, &exif_loop), Decoded),
        ("500,000 restarts", stormy, Bounded),
        ("20 MB behind the end", [&base[..], &vec![0xFF; 20 << 20]].concat(), Decoded),
    ]
}

fn pngs() -> Vec<Bomb> {
    let small = || ihdr(64, 48, 8, 2);
    // 48 rows of a filter byte and 64 pixels: 36 repeats are 9,289 bytes, 9,264 are needed.
    let data = || chunk(b"IDAT", &zeros(36));
    let long = |length: u32, kind: &[u8; 4]| [&length.to_be_bytes()[..], kind, &[0; 64]].concat();
    let profile = |repeats| chunk(b"iCCP", &[b"p\0\0", &zeros(repeats)[..]].concat());
    let text = |repeats| chunk(b"zTXt", &[b"k\0\0", &zeros(repeats)[..]].concat());
    let side = (PIXELS_MAX as f64).sqrt() as u32;
    vec![
        (
            "a PNG of 2^31 - 1 squared",
            png(&[ihdr(0x7FFF_FFFF, 0x7FFF_FFFF, 16, 6), data()]),
            Error(is_too_large),
        ),
        ("a PNG of 16384x16384", png(&[ihdr(side, side, 8, 2), data()]), Error(is_too_short)),
        ("a PNG of one bit a pixel", png(&[ihdr(side, side, 1, 0), data()]), Error(is_too_short)),
        ("a PNG of width 0", png(&[ihdr(0, 48, 8, 2), data()]), Error(is_malformed)),
        ("a PNG of height 0", png(&[ihdr(64, 0, 8, 2), data()]), Error(is_malformed)),
        ("a PNG", png(&[small(), data()]), Decoded),
        (
            "a PNG with 1 GB more than its pixels",
            png(&[small(), chunk(b"IDAT", &zeros(4_000_000))]),
            Bounded,
        ),
        ("a PNG with a profile of 1 GB", png(&[small(), profile(4_000_000), data()]), Bounded),
        ("a PNG with a text of 1 GB", png(&[small(), text(4_000_000), data()]), Bounded),
        ("a chunk of 2^31 bytes", png(&[small(), long(1 << 31, b"IDAT")]), Error(is_damaged)),
        ("a chunk of 2^32 - 1 bytes", png(&[small(), long(u32::MAX, b"tEXt")]), Error(is_damaged)),
        (
            "a chunk of 2^31 - 1 bytes",
            png(&[small(), long((1 << 31) - 1, b"tEXt")]),
            Error(is_damaged),
        ),
        (
            "300,000 empty IDATs",
            png(&[small(), chunk(b"IDAT", &[]).repeat(300_000)]),
            Error(is_damaged),
        ),
        (
            "100,000 texts",
            png(&[small(), chunk(b"tEXt", b"k\0v").repeat(100_000), data()]),
            Bounded,
        ),
        ("a PNG of nothing", png(&[small()]), Error(is_damaged)),
    ]
}

/// Decodes a bomb and holds it against what is expected; returns what was measured.
fn explode(decoder: &mut Decoder, (name, bytes, expected): &Bomb) -> String {
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let mut image = Image::new();
    let start = Instant::now();
    let result = decoder.decode(bytes, &mut image);
    let took = start.elapsed();
    let peak = PEAK.load(Ordering::Relaxed) - before;
    let limit = MEMORY_MAX + 2 * bytes.len();
    assert!(took < TIME_MAX, "{name}: {took:.2?}");
    assert!(peak < limit, "{name}: {peak} bytes at the peak, {limit} allowed");
    match (&result, expected) {
        (Ok(()), Decoded) => assert_eq!((image.width, image.height), (64, 48), "{name}"),
        (Ok(()), Bounded) => {
            let pixels = image.width as usize * image.height as usize;
            assert_eq!(image.pixels.len(), pixels * 3, "{name}");
        }
        (Err(error), Error(right)) => assert!(right(error), "{name}: {error:?}"),
        (Err(_), Bounded) => {}
        (Ok(()), Error(_)) => panic!("{name}: decoded to {}x{}", image.width, image.height),
        (Err(error), Decoded) => panic!("{name}: {error}"),
    }
    let mut line =
        format!("{name}: {} bytes, {took:.1?}, {:.2} MB", bytes.len(), peak as f64 / 1e6);
    match result {
        Ok(()) => write!(line, ", {}x{}", image.width, image.height),
        Err(error) => write!(line, ", {error}"),
    }
    .expect("a string");
    line
}

#[test]
fn decompression_bombs_54_of_them_take_bounded_time_and_memory() {
    let bombs: Vec<Bomb> = [sizes(), scans(), markers(), pngs()].into_iter().flatten().collect();
    let good = jpeg(SamplingFactor::F_2_2, false);
    let mut whole = Image::new();
    Decoder::new().decode(&good, &mut whole).expect("decodes");
    let mut decoder = Decoder::new();
    for bomb in &bombs {
        println!("  {}", explode(&mut decoder, bomb));
    }
    let mut image = Image::new();
    decoder.decode(&good, &mut image).expect("decodes after all of them");
    assert!(image == whole);
    assert_eq!(bombs.len(), 54);
    const { assert!(SEGMENTS_MAX > 4000 && SCANS_MAX == 100) };
}
