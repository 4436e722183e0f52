//! No text makes the configuration's reader panic, and what it takes it writes so that it takes it
//! again.
#![no_main]

use detco::config::Config;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(config) = Config::from_toml(text, "fuzz") else { return };
    let own = config.to_toml();
    assert_eq!(Config::from_toml(&own, "its own").map(|again| again.to_toml()).ok(), Some(own));
});
