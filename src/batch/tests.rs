//! Bytes and batches, against sums by hand.

use super::*;

#[test]
fn bytes_become_channels_first_normalised_floats() {
    let bytes: Vec<u8> = (0..2 * 4 * 4 * 3).map(|i| (i * 37 % 256) as u8).collect();
    let x = images(&bytes, 2, 4, Device::Cpu).unwrap();
    assert_eq!(x.size(), [2, 3, 4, 4]);
    assert!(x.is_contiguous());
    for (n, c, y, column) in [(0, 0, 0, 0), (0, 2, 3, 1), (1, 1, 2, 3), (1, 2, 3, 3)] {
        let byte = bytes[((n * 4 + y) * 4 + column) * 3 + c];
        let expected = (f32::from(byte) / 255.0 - MEAN[c]) / STD[c];
        let found = x.double_value(&[n as i64, c as i64, y as i64, column as i64]) as f32;
        assert_eq!(found, expected, "{n} {c} {y} {column}");
    }
}

#[test]
fn patches_of_a_sample_stay_together() {
    let crops = [0_u8; 2 * 8 * 8 * 3];
    let patch = |n: usize, i: usize| vec![(n * 9 + i) as u8; 2 * 2 * 3];
    let patches: Vec<u8> = (0..2).flat_map(|n| (0..9).flat_map(move |i| patch(n, i))).collect();
    let sections = sections([&crops; 2], [&patches; 2], &[9, 2, 2, 3]);
    let batch = Batch::from_slab(&sections, Form::plain(Device::Cpu)).unwrap();
    let query = &batch.views(PATCHES).unwrap()[0];
    assert_eq!(query.size(), [2, 9, 3, 2, 2]);
    let value = query.double_value(&[1, 4, 0, 1, 1]) as f32;
    assert_eq!(value, (13.0 / 255.0 - MEAN[0]) / STD[0]);
}

#[test]
fn a_short_section_is_refused() {
    let error = images(&[0; 47], 1, 4, Device::Cpu).unwrap_err();
    assert!(matches!(error, BatchError::Length { images: 1, edge: 4, found: 47 }));
    assert!(images(&[], usize::MAX, 4, Device::Cpu).is_err());
}

/// Two views of two samples: crops of 8 pixels, and patches.
fn sections<'a>(crops: [&'a [u8]; 2], patches: [&'a [u8]; 2], shape: &'a [usize]) -> Sections<'a> {
    let crops = Section { name: CROPS, shape: &[8, 8, 3], views: crops.into() };
    let patches = Section { name: PATCHES, shape, views: patches.into() };
    Sections { n: 2, groups: vec![crops, patches] }
}

fn bytes(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|i| ((i + seed) * 37 % 251) as u8).collect()
}

#[test]
fn a_form_changes_where_channels_lie_and_how_far_pixels_are_rounded() {
    let (crops, patches) = (bytes(2 * 8 * 8 * 3, 0), bytes(2 * 9 * 4 * 4 * 3, 5));
    let sections = sections([&crops; 2], [&patches; 2], &[9, 4, 4, 3]);
    let plain = Batch::from_slab(&sections, Form::plain(Device::Cpu)).unwrap();
    for (channels_last, bf16) in [(true, false), (false, true), (true, true)] {
        let form = Form { device: Device::Cpu, channels_last, bf16 };
        let batch = Batch::from_slab(&sections, form).unwrap();
        let kind = if bf16 { Kind::BFloat16 } else { Kind::Float };
        assert_eq!(all(&batch).count(), 4);
        for (plain, formed) in all(&plain).zip(all(&batch)) {
            assert!(formed.equal(&plain.to_kind(kind)));
            assert_eq!(device::is_channels_last(formed), channels_last);
            assert!(!device::is_channels_last(plain));
        }
    }
}

/// Every byte in every channel: as by the quotients, to the bit.
#[test]
fn one_pass_to_bfloat16_is_what_the_quotients_round_to() {
    let bytes: Vec<u8> = (0..768).map(|i| ((i / 3) % 256) as u8).collect();
    let pixels = Tensor::from_slice(&bytes).view([1, 16, 16, 3]);
    for channels_last in [false, true] {
        let form = Form { device: Device::Cpu, channels_last, bf16: true };
        let apply = |folded| Scale::with(form, folded).unwrap().apply(&pixels);
        let (once, plain) = (apply(true), apply(false));
        assert_eq!((once.kind(), once.size()), (Kind::BFloat16, plain.size()));
        assert_eq!(device::is_channels_last(&once), channels_last);
        assert!(once.equal(&plain));
    }
}

fn all(batch: &Batch) -> impl Iterator<Item = &Tensor> {
    batch.groups().iter().flat_map(|(_, views)| views)
}

/// Two views' crops, and two views' patches.
type Kept = std::sync::Arc<([Vec<u8>; 2], [Vec<u8>; 2])>;

fn of_kept(kept: &Kept) -> Sections<'_> {
    let (crops, patches) = &**kept;
    let [crops, patches] = [crops, patches].map(|views| views.each_ref().map(Vec::as_slice));
    sections(crops, patches, &[9, 4, 4, 3])
}

/// The way to a GPU, with both of its ends on the CPU.
#[test]
fn batches_through_lanes_are_those_made_at_once() {
    let form = Form { device: Device::Cpu, channels_last: true, bf16: false };
    let length = 2 * (2 * 8 * 8 * 3 + 2 * 9 * 4 * 4 * 3);
    let mut feeder = Feeder { form, lanes: Some(Lanes::new(form, length).unwrap()) };
    for seed in 0..5 {
        let crops = [bytes(2 * 8 * 8 * 3, seed), bytes(2 * 8 * 8 * 3, seed + 90)];
        let patches = [bytes(2 * 9 * 4 * 4 * 3, seed), bytes(2 * 9 * 4 * 4 * 3, seed + 90)];
        let keep = std::sync::Arc::new((crops, patches));
        let at_once = Batch::from_slab(&of_kept(&keep), form).unwrap();
        let watch = std::sync::Arc::downgrade(&keep);
        let through = feeder.batch(keep, of_kept, || Ok(())).unwrap();
        assert!(watch.upgrade().is_some(), "kept until it is asked for");
        feeder.release().unwrap();
        assert!(watch.upgrade().is_none(), "its bytes have left");
        for (through, at_once) in all(&through).zip(all(&at_once)) {
            assert!(through.equal(at_once), "{seed}");
        }
    }
}
