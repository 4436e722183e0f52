//! No bytes make the readers of weights (safetensors, torch's zip, its older format, pickles) panic
//! or read more than there is.
#![no_main]

use std::path::Path;

use detco::weights::WeightsFile;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(mut file) = WeightsFile::from_bytes(Path::new("fuzz"), bytes.to_vec()) else { return };
    let names: Vec<String> = file.names().map(String::from).collect();
    for name in &names {
        let Ok(read) = file.read(&[name]) else { continue };
        let elements: i64 = read[0].size.iter().product();
        assert_eq!(read[0].bytes.len(), elements as usize * read[0].dtype.bytes());
    }
    if let Ok(choice) = file.backbone(None) {
        let chosen: Vec<&str> = choice.names.iter().map(|(name, _)| name.as_str()).collect();
        if let Ok(read) = file.read(&chosen) {
            let all: usize = read.iter().map(|tensor| tensor.bytes.len()).sum();
            assert!(all <= bytes.len() + (1 << 20), "{all} of {} bytes", bytes.len());
        }
    }
});
