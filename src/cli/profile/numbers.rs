//! Numbers on the command line: workers, times and rates.

/// Numbers of workers, in the order of the runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Workers(pub(super) Vec<usize>);

/// Threads beyond this are a typing error.
const WORKERS_MAX: usize = 1024;

/// `1,2,4,8`.
pub(super) fn workers(text: &str) -> Result<Workers, String> {
    let mut all = Vec::new();
    for word in text.split(',') {
        let number = word.trim().parse().ok().filter(|number| (1..=WORKERS_MAX).contains(number));
        let number = number.ok_or(format!("{word:?} is no number from 1 to {WORKERS_MAX}"))?;
        if all.contains(&number) {
            return Err(format!("{number} is there twice"));
        }
        all.push(number);
    }
    Ok(Workers(all))
}

pub(super) fn number(text: &str, least: f64) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "expected a number".to_owned())?;
    if number.is_finite() && number >= least {
        Ok(number)
    } else {
        Err(format!("at least {least}"))
    }
}

/// A measured time: short enough to be meant, long enough for its windows.
pub(super) fn seconds(text: &str) -> Result<f64, String> {
    number(text, 0.5).and_then(|s| if s <= 86_400.0 { Ok(s) } else { Err("at most a day".into()) })
}

pub(super) fn seconds_or_none(text: &str) -> Result<f64, String> {
    number(text, 0.0).and_then(|s| if s <= 86_400.0 { Ok(s) } else { Err("at most a day".into()) })
}

pub(super) fn positive(text: &str) -> Result<f64, String> {
    number(text, 0.001)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_workers_are_numbers_that_make_sense() {
        assert_eq!(workers("1,2, 8"), Ok(Workers(vec![1, 2, 8])));
        for wrong in ["", "0", "1,,2", "two", "4,4", "-1", "100000", "1.5"] {
            assert!(workers(wrong).is_err(), "{wrong}");
        }
    }
}
