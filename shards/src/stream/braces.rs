//! Brace lists, `train-{000000..001280}.tar` or `{train,val}/0.tar`, as words of a shell's.
//!
//! The crate `webdataset` expands them. It makes whatever list is asked for, so a list is counted
//! before it is made: `{000000..999999999}` would take the machine's memory.

/// Words that a brace list may stand for: as many shards as the largest data sets have, four times over.
const WORDS_MAX: u64 = 1 << 20;
/// Bytes of all words together.
const BYTES_MAX: u64 = 1 << 28;
/// Lists in lists.
const DEPTH_MAX: u32 = 16;
/// Digits of a number: sums of two such numbers hold in 64 bits.
const DIGITS_MAX: usize = 18;

/// The words that a brace list stands for; one that has no braces stands for itself.
///
/// # Errors
///
/// A sentence on what is wrong with the braces, which does not repeat the word.
pub(super) fn expand(word: &str) -> Result<Vec<String>, String> {
    let chars: Vec<char> = word.chars().collect();
    let words = count(&chars, 0)?;
    let most = WORDS_MAX.min(BYTES_MAX / (word.len() as u64).max(1));
    if words > most {
        return Err(format!("its braces stand for {words} names, {most} at most are taken"));
    }
    webdataset::braceexpand(word).map_err(|_| "its braces do not match".into())
}

/// How many words a pattern stands for, by the grammar of `webdataset::braceexpand`. More than 64 bits
/// hold count as the most that they do. Braces that do not match are left to the crate to tell.
fn count(pattern: &[char], depth: u32) -> Result<u64, String> {
    if depth > DEPTH_MAX {
        return Err(format!("its braces lie in each other more than {DEPTH_MAX} deep"));
    }
    let (mut words, mut open, mut start, mut at) = (1_u64, 0_u32, 0, 0);
    while at < pattern.len() {
        match pattern[at] {
            '\\' => at += 1,
            '{' => {
                if open == 0 {
                    start = at + 1;
                }
                open += 1;
            }
            '}' if open > 0 => {
                open -= 1;
                if open == 0 {
                    words = words.saturating_mul(group(&pattern[start..at], depth)?);
                }
            }
            _ => {}
        }
        at += 1;
    }
    Ok(words)
}

/// How many words the inside of a pair of braces stands for.
fn group(inside: &[char], depth: u32) -> Result<u64, String> {
    let text: String = inside.iter().collect();
    let parts: Vec<&str> = text.split("..").collect();
    if let [first, last, step @ ..] = &parts[..]
        && step.len() < 2
    {
        let step = step.first().copied().unwrap_or("1");
        if let (Some(first), Some(last)) = (integer(first)?, integer(last)?) {
            return Ok(first.abs_diff(last) / stride(step)? + 1);
        }
        if let (Some(first), Some(last)) = (letter(first), letter(last)) {
            return Ok(first.abs_diff(last) / stride(step)? + 1);
        }
    }
    let (mut words, mut open, mut start, mut at, mut arms) = (0_u64, 0_u32, 0, 0, 1);
    while at < inside.len() {
        match inside[at] {
            '\\' => at += 1,
            '{' => open += 1,
            '}' => open = open.saturating_sub(1),
            ',' if open == 0 => {
                words = words.saturating_add(count(&inside[start..at], depth + 1)?);
                (start, arms) = (at + 1, arms + 1);
            }
            _ => {}
        }
        at += 1;
    }
    // Braces around what is no list stand for themselves.
    match arms {
        1 => Ok(1),
        _ => Ok(words.saturating_add(count(&inside[start..], depth + 1)?)),
    }
}

/// The number that a range begins or ends with; `None` for what is none.
fn integer(text: &str) -> Result<Option<i64>, String> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    if digits.is_empty() || !digits.chars().all(|digit| digit.is_ascii_digit()) {
        return Ok(None);
    }
    match text.parse() {
        Ok(number) if digits.len() <= DIGITS_MAX => Ok(Some(number)),
        _ => Err(format!("a number in its braces has more than {DIGITS_MAX} digits")),
    }
}

/// The letter that a range begins or ends with, as a number.
fn letter(text: &str) -> Option<i64> {
    let mut letters = text.chars();
    let letter = letters.next().filter(char::is_ascii_alphabetic)?;
    letters.next().is_none().then_some(i64::from(u32::from(letter)))
}

/// The step of a range; one of 0 counts as 1.
fn stride(text: &str) -> Result<u64, String> {
    let wrong = || "the step of a range in its braces is no number".to_owned();
    let step = integer(text)?.ok_or_else(wrong)?.unsigned_abs();
    // Letters are stepped over in 32 bits.
    if step > i32::MAX as u64 / 2 {
        return Err("the step of a range in its braces is too large".into());
    }
    Ok(step.max(1))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lists_are_those_of_a_shell() {
        let shell = |word: &str| {
            let mut bash = std::process::Command::new("bash");
            let output = bash.args(["-c", &format!("printf '%s\\n' {word}")]).output().unwrap();
            assert!(output.status.success());
            String::from_utf8(output.stdout).unwrap().lines().map(String::from).collect::<Vec<_>>()
        };
        for word in [
            "a.tar",
            "{000..012}.tar",
            "{0..10..5}",
            "{5..1}",
            "{a,b}{1,2}.tar",
            "{train,val{0..2}}/{a..c}.tar",
            "x{}y",
            "{abc}",
            "{1..2..3..4}",
            "{c..a}",
        ] {
            assert_eq!(expand(word).unwrap(), shell(word), "{word}");
        }
    }

    #[test]
    fn lists_that_nobody_means_are_counted_and_not_made() {
        for (word, reason) in [
            ("{000000..999999999}.tar", "stand for 1000000000 names, 1048576 at most"),
            (&"{0..9}".repeat(7), "stand for 10000000 names"),
            (&"{0..9}".repeat(100), "stand for 18446744073709551615 names"),
            ("{9223372036854775806..9223372036854775807}", "more than 18 digits"),
            ("{0..5..99999999999999999999}", "more than 18 digits"),
            ("{a..f..4294967296}", "step of a range in its braces is too large"),
            ("{1..5..x}", "is no number"),
            (&format!("{}{}", "{,".repeat(100_000), "}".repeat(100_000)), "more than 16 deep"),
            ("{a,b", "do not match"),
            ("a}", "do not match"),
        ] {
            let said = expand(word).unwrap_err();
            assert!(said.contains(reason), "{}: {said}", &word[..word.len().min(40)]);
        }
        let long = format!("{}{{0..9999}}", "a".repeat(100_000));
        assert!(expand(&long).unwrap_err().contains("stand for 10000 names, 2684 at most"));
        assert_eq!(expand("{000000..999999}.tar").unwrap().len(), 1_000_000);
    }

    proptest! {
        #[test]
        fn the_count_is_that_of_the_list(word in "[ab0-3,{}.\\\\-]{0,14}") {
            if let Ok(words) = expand(&word) {
                let chars: Vec<char> = word.chars().collect();
                prop_assert_eq!(count(&chars, 0).unwrap(), words.len() as u64);
            }
        }
    }
}
