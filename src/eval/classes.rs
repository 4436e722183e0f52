//! Which class of one set is which class of another.
//!
//! Sets that were packed apart number their classes apart, so that numbers alone say nothing where
//! there are names: classes are the same where their names are.

use std::collections::HashMap;

/// Names that a note shows.
const SHOWN_MAX: usize = 5;

/// Classes of a test set as those of the training set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Classes {
    /// The common number of each class of the training set, where that is another one.
    train: Option<Vec<u32>>,
    /// Of the test set.
    test: Option<Vec<u32>>,
    /// What the user should know.
    notes: Vec<String>,
}

/// No class of the test set is one of the training set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NothingInCommon {
    /// The first names of the training set.
    pub train: String,
    /// The first names of the test set.
    pub test: String,
}

impl Classes {
    /// Compares the names of two sets' classes; none mean that a set has only numbers.
    ///
    /// - Both have names: by name. A class that only the test set has can never be right.
    /// - Names that are numbers (`7`, `007`) are those numbers: folders `0` to `999` are sorted as
    ///   text, and another set's numbers are meant.
    /// - One has names that are no numbers, the other none: nothing can be compared; a note says so
    ///   and numbers are taken as they are.
    ///
    /// # Errors
    /// [`NothingInCommon`] where both have names and share none.
    pub fn compare(train: &[String], test: &[String]) -> Result<Classes, NothingInCommon> {
        let numbered = |names: &[String], set, other| match numbers(names) {
            Some(table) => (Some(table), Vec::new()),
            None => (None, vec![uncompared(names, set, other)]),
        };
        Ok(match (train.is_empty(), test.is_empty()) {
            (true, true) => Classes::default(),
            (false, false) => return by_name(train, test),
            (true, false) => {
                let (test, notes) = numbered(test, "test", "train");
                Classes { train: None, test, notes }
            }
            (false, true) => {
                let (train, notes) = numbered(train, "train", "test");
                Classes { train, test: None, notes }
            }
        })
    }

    /// A class of the training set.
    pub fn of_train(&self, class: u32) -> u32 {
        common(self.train.as_deref(), class)
    }

    /// A class of the test set as the training set's.
    pub fn of_test(&self, class: u32) -> u32 {
        common(self.test.as_deref(), class)
    }

    /// What the user should know, a line each.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }
}

/// A number without a name is no class of the other set: it is moved above all that have one.
fn common(table: Option<&[u32]>, class: u32) -> u32 {
    match table {
        None => class,
        Some(table) => {
            let beyond = || class.saturating_add(UNNAMED);
            table.get(class as usize).copied().unwrap_or_else(beyond)
        }
    }
}

/// Where numbers begin that stand for classes whose name the training set does not have.
const UNKNOWN: u32 = 1 << 30;
/// Where numbers begin that stand for classes without a name.
const UNNAMED: u32 = 1 << 31;

fn by_name(train: &[String], test: &[String]) -> Result<Classes, NothingInCommon> {
    if train == test {
        return Ok(Classes::default());
    }
    if let (Some(train), Some(test)) = (numbers(train), numbers(test)) {
        let known: std::collections::HashSet<u32> = train.iter().copied().collect();
        let only = test.iter().filter(|number| !known.contains(number));
        let only: Vec<String> = only.map(u32::to_string).collect();
        if only.len() < test.len() {
            let notes = unknown(&only).into_iter().collect();
            return Ok(Classes { train: Some(train), test: Some(test), notes });
        }
    }
    let places: HashMap<&str, u32> = train.iter().map(String::as_str).zip(0..).collect();
    let mut only = Vec::new();
    let mut table = Vec::with_capacity(test.len());
    for (name, number) in test.iter().zip(UNKNOWN..) {
        table.push(places.get(name.as_str()).copied().unwrap_or_else(|| {
            only.push(name.clone());
            number
        }));
    }
    if only.len() == test.len() {
        return Err(NothingInCommon { train: shown(train), test: shown(test) });
    }
    Ok(Classes { train: None, test: Some(table), notes: unknown(&only).into_iter().collect() })
}

fn uncompared(names: &[String], set: &str, other: &str) -> String {
    format!(
        "warning: the classes of the {set} set have names ({}), those of the {other} set only numbers: \
         they could not be compared, and class 0 here is taken for class 0 there. If that is wrong, so \
         is the figure; pack the {other} set from class folders of those names",
        shown(names)
    )
}

/// The numbers that names are, if they are all numbers and no two the same.
fn numbers(names: &[String]) -> Option<Vec<u32>> {
    let is_number = |name: &String| name.bytes().all(|byte| byte.is_ascii_digit());
    let parse = |name: &String| is_number(name).then(|| name.parse::<u32>().ok()).flatten();
    let numbers = names.iter().map(parse).collect::<Option<Vec<u32>>>()?;
    let mut sorted = numbers.clone();
    sorted.sort_unstable();
    sorted.dedup();
    (sorted.len() == numbers.len() && sorted.iter().all(|n| *n < UNKNOWN)).then_some(numbers)
}

fn unknown(only: &[String]) -> Option<String> {
    let (classes, are, their) =
        if only.len() == 1 { ("class", "is", "its") } else { ("classes", "are", "their") };
    (!only.is_empty()).then(|| {
        format!(
            "warning: {} {classes} of the test set {are} not in the train set, {their} samples count as \
             wrong: {}",
            only.len(),
            shown(only)
        )
    })
}

fn shown(names: &[String]) -> String {
    let mut text = names.iter().take(SHOWN_MAX).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN_MAX {
        text.push_str(&format!(", … ({})", names.len()));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Vec<String> {
        text.split_whitespace().map(String::from).collect()
    }

    fn compare(train: &str, test: &str) -> Classes {
        Classes::compare(&names(train), &names(test)).unwrap()
    }

    /// The test set's classes as the training set's.
    fn mapped(classes: &Classes, n: u32) -> Vec<u32> {
        (0..n).map(|class| classes.of_test(class)).collect()
    }

    #[test]
    fn names_decide_and_a_missing_class_is_fine() {
        let same = compare("cat dog fox", "cat dog fox");
        assert_eq!((mapped(&same, 3), same.notes()), (vec![0, 1, 2], &[][..]));
        // `fox` is 1 in a test set without dogs.
        let fewer = compare("cat dog fox", "cat fox");
        assert_eq!((mapped(&fewer, 2), fewer.notes()), (vec![0, 2], &[][..]));
        assert_eq!(fewer.of_train(2), 2);
        let more = compare("cat fox", "cat dog fox owl");
        assert_eq!((more.of_test(0), more.of_test(2)), (0, 1));
        for unknown in [1, 3] {
            assert!(more.of_test(unknown) >= 2, "no class of the training set");
        }
        let [note] = more.notes() else { panic!("{:?}", more.notes()) };
        assert!(note.contains("2 classes") && note.ends_with("dog, owl"), "{note}");
        let error = Classes::compare(&names("cat dog"), &names("n01 n02")).unwrap_err();
        assert_eq!((error.train.as_str(), error.test.as_str()), ("cat, dog", "n01, n02"));
    }

    #[test]
    fn names_that_are_numbers_are_those_numbers() {
        // Sorted as text, as class folders are.
        let sorted = "0 1 10 11 2 3 4 5 6 7 8 9";
        for (classes, of) in [(compare("", sorted), "test"), (compare(sorted, ""), "train")] {
            let class = |n| if of == "test" { classes.of_test(n) } else { classes.of_train(n) };
            assert_eq!((class(2), class(4), class(11)), (10, 2, 9), "{of}");
            assert!(classes.notes().is_empty());
        }
        let padded = compare("00 01 02 10", "0 1 10 2");
        assert_eq!(mapped(&padded, 4), [0, 1, 10, 2]);
        assert_eq!((padded.of_train(3), padded.of_train(2)), (10, 2));
        // Two names of one number are names.
        assert_eq!(mapped(&compare("0 00 1", "00 1"), 2), [1, 2]);
    }

    #[test]
    fn names_and_bare_numbers_are_not_compared_and_that_is_said() {
        for classes in [compare("cat dog", ""), compare("", "cat dog")] {
            assert_eq!((classes.of_train(1), classes.of_test(1)), (1, 1));
            let [note] = classes.notes() else { panic!("{:?}", classes.notes()) };
            assert!(note.contains("could not be compared") && note.contains("cat, dog"), "{note}");
        }
        assert_eq!(compare("", ""), Classes::default());
    }

    #[test]
    fn a_number_without_a_name_is_nobodys_class() {
        let classes = compare("cat dog fox", "fox cat");
        assert_eq!(mapped(&classes, 2), [2, 0]);
        assert!(classes.of_test(2) > 1000);
    }
}
