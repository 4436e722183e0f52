//! What can be wrong with a shard, its index, a sample, or with what is to be opened.

use std::path::PathBuf;

use thiserror::Error;

use super::tar::TarFault;

/// How an index and its shard differ.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum StaleFault {
    /// A member lies outside the shard.
    #[error("line {line} names bytes {offset} to {end}, the shard has {bytes}")]
    Outside {
        /// Line of the index, counted from 1.
        line: u64,
        /// First byte of the member.
        offset: u64,
        /// One past its last byte.
        end: u64,
        /// Size of the shard.
        bytes: u64,
    },
    /// No header where a member's header must be.
    #[error("no header of a member before offset {offset}: {fault}")]
    Header {
        /// First byte of the member according to the index.
        offset: u64,
        /// What stands there instead.
        fault: TarFault,
    },
    /// Sizes differ.
    #[error(
        "the member at offset {offset} has {indexed} bytes by the index, {actual} by the shard"
    )]
    Size {
        /// First byte of the member.
        offset: u64,
        /// Size in the index.
        indexed: u64,
        /// Size in the shard.
        actual: u64,
    },
    /// A member of the shard is missing in the index.
    #[error("member `{name}` at offset {offset} is not in the index")]
    Unindexed {
        /// Name of the member.
        name: String,
        /// First byte of the member.
        offset: u64,
    },
    /// The texts differ although nothing above did.
    #[error("line {line} differs from what the shard holds")]
    Line {
        /// Line of the index, counted from 1.
        line: u64,
    },
}

/// The change of a file after it was opened.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ChangeFault {
    /// It became shorter or longer.
    #[error("it had {mapped} bytes when it was opened and has {now} now")]
    Size {
        /// Bytes when it was opened.
        mapped: u64,
        /// Bytes now.
        now: u64,
    },
    /// It was written to.
    #[error("it was written to after it was opened")]
    Written,
    /// Bytes were missing when they were needed.
    #[error("some of its bytes could not be read: it was shortened, or a disk or server failed")]
    Unreadable,
}

/// Why a sample cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SampleFault {
    /// No member holds an image.
    #[error("no image: none of its members is a .jpg, .jpeg or .png")]
    NoImage,
    /// An image in a format that training does not read; `detco pack` may.
    #[error(
        "no image: none of its members is a .jpg, .jpeg or .png, but one is a .{extension}: \
         `detco pack` on the folder of tars makes JPEGs of WebP and BMP"
    )]
    OtherFormat {
        /// Its extension.
        extension: String,
    },
    /// Several images, none with a plain extension: their names contain dots.
    #[error(
        "no image: none of its members is a .jpg, .jpeg or .png, since a key ends at the first dot of \
         a name: `{key}.{extension}` was split into the key `{key}` and the extension `{extension}`, \
         and {pictures} pictures share this key; `detco pack THE.tar OUT` gives each a key of its own"
    )]
    Dots {
        /// The key.
        key: String,
        /// What follows it in the name of the first picture.
        extension: String,
        /// Pictures with this key.
        pictures: u64,
    },
    /// An image or label that is a link.
    #[error(
        "its member `{name}` is a link to `{target}`, which has no bytes of its own in a shard: \
         `detco pack THE.tar OUT` makes a file of it"
    )]
    Link {
        /// The member's name.
        name: String,
        /// Where it points.
        target: String,
    },
    /// Two members with one name.
    #[error("two members with the extension .{extension}")]
    DuplicateMember {
        /// The extension they share, lower case.
        extension: String,
    },
    /// The class member is not a number. Only reading the class gives this error.
    #[error("the .cls member holds `{text}`, a class number was expected")]
    Class {
        /// Its content, shortened.
        text: String,
    },
    /// A number that is too large for the tables.
    #[error("{what} is {value}, at most {limit} is possible")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The largest possible.
        limit: u64,
    },
    /// A name that is not UTF-8.
    #[error("its name is not UTF-8")]
    Name,
    /// Members overlap or run backwards.
    #[error("it starts before the member in front of it ends, at {end}")]
    Overlap {
        /// Where the member in front ends, its padding included.
        end: u64,
    },
}

/// Why a data argument names no shards.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SpecFault {
    /// It does not exist.
    #[error("no such file or folder")]
    Missing,
    /// A folder without shards.
    #[error("no .tar in this folder")]
    Empty,
    /// A folder of files that data sets come in and that are no shards.
    #[error("no .tar in this folder, but `{name}`, {kind}")]
    Others {
        /// One of them.
        name: String,
        /// What such files are and what to do with them.
        kind: &'static str,
    },
    /// A folder of images that nobody has packed.
    #[error("no .tar in this folder, but images: pack it first: `detco pack {} OUT`", .folder.display())]
    Images {
        /// The folder.
        folder: PathBuf,
    },
    /// One shard where all of a folder were expected.
    #[error("not a folder: its whole folder is verified, {}", .folder.display())]
    NotFolder {
        /// Where it lies.
        folder: PathBuf,
    },
    /// A pattern that no file matches.
    #[error("no file matches")]
    NoMatch,
    /// An invalid pattern.
    #[error("not a pattern: {reason}")]
    Pattern {
        /// What is wrong with it.
        reason: String,
    },
    /// The same shard twice.
    #[error("{} is named twice", .shard.display())]
    Twice {
        /// The shard.
        shard: PathBuf,
    },
    /// Manifests that disagree on the classes.
    #[error("{} and {} list different classes", .one.display(), .other.display())]
    Classes {
        /// A manifest.
        one: PathBuf,
        /// Another.
        other: PathBuf,
    },
    /// A shard that is not in the manifest beside it.
    #[error("{} is not in the manifest beside it", .shard.display())]
    Unlisted {
        /// The shard.
        shard: PathBuf,
    },
    /// A shard of the manifest is missing.
    #[error("{} is in the manifest but not in the folder", .shard.display())]
    Lost {
        /// The shard.
        shard: PathBuf,
    },
    /// A data set packed in parts, of which some are missing.
    #[error("packed as {of} parts, part {missing} is missing")]
    Part {
        /// The first part that is not there, from 1.
        missing: u32,
        /// Number of parts.
        of: u32,
    },
    /// Parts of different packings.
    #[error("{} and {} are parts of different totals: pack into another folder",
        .one.display(), .other.display())]
    Totals {
        /// A manifest.
        one: PathBuf,
        /// Another.
        other: PathBuf,
    },
    /// Packing is under way or was interrupted.
    #[error("packing has not finished: go on with `detco pack --resume`")]
    Unfinished,
    /// No samples at all.
    #[error("the shards hold no samples")]
    NoSamples,
    /// URLs and files.
    #[error("URLs and files cannot be mixed in one data set")]
    Mixed,
}
