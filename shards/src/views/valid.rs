//! What may stand in a recipe: checks of its numbers, and the errors that name them.

/// Largest side of a view. Slab sizes are products of it, so it is bounded where it enters.
const SIDE_MAX: u32 = 4096;

/// A recipe that cannot be drawn from.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RecipeError {
    /// A number lies outside what is allowed, or is not a number.
    #[error("{field} = {value}: must lie in [{least}, {largest}]")]
    OutOfRange {
        /// The field as a recipe file spells it.
        field: String,
        /// What was given.
        value: f64,
        /// Least allowed value.
        least: f64,
        /// Largest allowed value.
        largest: f64,
    },
    /// A share of an image that is nothing, more than the image, or not a number.
    #[error("{field} = {value:?}: must be above 0 and at most 1")]
    NotAShare {
        /// The field as a recipe file spells it.
        field: String,
        /// What was given.
        value: f64,
    },
    /// A range whose lower end is above its upper end.
    #[error("{field} = [{from}, {to}]: the first must not be above the second")]
    Reversed {
        /// The field as a recipe file spells it.
        field: String,
        /// Given lower end.
        from: f64,
        /// Given upper end.
        to: f64,
    },
    /// An image that is to be cut has no equal columns.
    #[error("{name}.size = {size}: must be a multiple of {name}.grid.cells = {cells}")]
    NotAGrid {
        /// The group.
        name: String,
        /// What was given.
        size: u32,
        /// Cells along a side.
        cells: u32,
    },
    /// A patch does not fit into its cell.
    #[error("{name}.grid.patch = {patch}: must be at most {cell}, a cell of {name}.size = {size}")]
    PatchTooLarge {
        /// The group.
        name: String,
        /// What was given.
        patch: u32,
        /// Side of a cell.
        cell: u32,
        /// Side of the image that is cut.
        size: u32,
    },
    /// A step appears twice.
    #[error("{field}: {step} appears twice")]
    RepeatedStep {
        /// The field as a recipe file spells it.
        field: String,
        /// The step.
        step: &'static str,
    },
    /// A group has no name that a batch could give its views by.
    #[error("name = {name:?}: a group of views has a name of small letters, digits, - and _")]
    Name {
        /// What was given.
        name: String,
    },
    /// Two groups have one name.
    #[error("name = {name:?}: two groups of views have this name")]
    RepeatedName {
        /// The name.
        name: String,
    },
    /// Steps are another group's, which is not there or has none of its own.
    #[error("{name}.steps = {of:?}: there is no such group of views with a list of steps")]
    StepsOf {
        /// The group.
        name: String,
        /// Whose steps it names.
        of: String,
    },
}

pub(super) fn within(field: &str, value: f64, least: f64, largest: f64) -> Result<(), RecipeError> {
    // Written so that NaN fails too.
    if value >= least && value <= largest {
        return Ok(());
    }
    Err(RecipeError::OutOfRange { field: field.to_owned(), value, least, largest })
}

pub(super) fn range(
    field: &str,
    [from, to]: [f64; 2],
    least: f64,
    largest: f64,
) -> Result<(), RecipeError> {
    within(field, from, least, largest)?;
    within(field, to, least, largest)?;
    ordered(field, [from, to])
}

pub(super) fn ordered(field: &str, [from, to]: [f64; 2]) -> Result<(), RecipeError> {
    if from > to {
        return Err(RecipeError::Reversed { field: field.to_owned(), from, to });
    }
    Ok(())
}

pub(super) fn side(field: &str, value: u32, least: u32) -> Result<(), RecipeError> {
    within(field, f64::from(value), f64::from(least), f64::from(SIDE_MAX))
}

pub(super) fn share(field: &str, value: f64) -> Result<(), RecipeError> {
    // Written so that NaN fails too.
    let share = value > 0.0 && value <= 1.0;
    if !share {
        return Err(RecipeError::NotAShare { field: field.to_owned(), value });
    }
    Ok(())
}
