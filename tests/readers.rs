//! Configurations and checkpoints as somebody may have changed them: no text makes their readers
//! panic.

use detco::config::{Config, RECIPES};
use proptest::prelude::*;
use proptest::sample::Index;

/// A change of a text: a byte replaced, a line left out, doubled or moved, a value swapped for one
/// that is hard to take.
#[derive(Clone, Debug)]
enum Change {
    Byte(Index, u8),
    LineOut(Index),
    LineTwice(Index, Index),
    Value(Index, &'static str),
}

/// Values of every kind, some beyond what numbers hold.
const VALUES: &[&str] = &[
    "-1",
    "0",
    "9223372036854775807",
    "-9223372036854775808",
    "18446744073709551616",
    "1e308",
    "-1e-320",
    "nan",
    "inf",
    "true",
    "\"\"",
    "\"999999999999 TB\"",
    "[]",
    "[[[[[[[[]]]]]]]]",
    "{}",
    "1979-05-27T07:32:00Z",
];

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Change::Byte(at, byte)),
        any::<Index>().prop_map(Change::LineOut),
        (any::<Index>(), any::<Index>()).prop_map(|(from, to)| Change::LineTwice(from, to)),
        (any::<Index>(), prop::sample::select(VALUES)).prop_map(|(at, v)| Change::Value(at, v)),
    ]
}

fn changed(text: &str, changes: &[Change]) -> String {
    let mut text = text.to_string();
    for change in changes {
        let mut lines: Vec<String> = text.lines().map(String::from).collect();
        if lines.is_empty() || text.is_empty() {
            break;
        }
        match change {
            Change::Byte(at, byte) => {
                let mut bytes = text.into_bytes();
                let at = at.index(bytes.len());
                bytes[at] = *byte;
                text = String::from_utf8_lossy(&bytes).into_owned();
                continue;
            }
            Change::LineOut(at) => {
                lines.remove(at.index(lines.len()));
            }
            Change::LineTwice(from, to) => {
                let line = lines[from.index(lines.len())].clone();
                lines.insert(to.index(lines.len()), line);
            }
            Change::Value(at, value) => {
                let line = &mut lines[at.index(text.lines().count())];
                let separator = line.find(['=', ':']).map(|at| line[at..=at].to_string());
                if let Some((key, _)) = separator.as_deref().and_then(|s| line.split_once(s)) {
                    *line = format!("{key}{} {value}", separator.as_deref().unwrap_or_default());
                }
            }
        }
        text = lines.join("\n");
    }
    text
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_changed_recipe_is_read_or_refused(
        recipe in 0..RECIPES.len(),
        changes in prop::collection::vec(change(), 1..5),
    ) {
        let text = changed(RECIPES[recipe].2, &changes);
        // What is read is written so that it can be read again.
        if let Ok(config) = Config::from_toml(&text, "a recipe") {
            let again = Config::from_toml(&config.to_toml(), "its own text");
            prop_assert_eq!(again.ok().map(|again| again.to_toml()), Some(config.to_toml()));
        }
    }

    #[test]
    fn any_text_is_a_configuration_or_none(text in "\\PC{0,200}", set in "[a-z_.=\\[\\]{}\"0-9-]{0,40}") {
        // Either outcome is right: the property is that there is one.
        let _ = Config::from_toml(&text, "a text");
        let _ = Config::load("detco-small", &[set]);
    }
}

/// Nesting that would take a recursive reader's stack.
#[test]
fn deep_nesting_is_refused() {
    for text in [
        format!("a = {}{}", "[".repeat(100_000), "]".repeat(100_000)),
        format!("a = {}{}", "{a=".repeat(100_000), "}".repeat(100_000)),
        format!("[{}]", "a.".repeat(100_000) + "a"),
        format!("{}a = 1", "a.".repeat(100_000)),
    ] {
        assert!(Config::from_toml(&text, "a text").is_err());
    }
}

#[cfg(feature = "train")]
mod checkpoints {
    use detco::checkpoint::{self, State};
    use detco_shards::order::Cursor;

    use super::*;

    fn state() -> State {
        State {
            config: Config::load("detco-small", &[]).unwrap(),
            cursor: Cursor { epoch: 3, step: 7 },
            step: 12,
            fingerprint: u64::MAX - 1,
            samples: 999,
            ranks: 4,
            collapsing: vec![None, Some(11)],
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_changed_state_is_read_or_refused(
            changes in prop::collection::vec(change(), 1..4),
        ) {
            let run = tempfile::tempdir().unwrap();
            let folder = checkpoint::save(run.path(), &state(), &[], &[]).unwrap();
            let path = folder.join("state.json");
            let whole = std::fs::read_to_string(&path).unwrap();
            let text = changed(&whole, &changes);
            std::fs::write(&path, &text).unwrap();
            let _ = State::from_text(&text);
            // A change of what it says is seen: its checksum does not hold.
            if let Ok(saved) = checkpoint::open(run.path(), None) {
                let same = |text: &str| serde_json::from_str::<serde_json::Value>(text).ok();
                let is_same = same(&text) == same(&whole) || !text.contains("crc32c");
                prop_assert!(is_same || saved.state == state(), "{}", text);
            }
        }
    }
}
