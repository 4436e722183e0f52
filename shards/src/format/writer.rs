//! Writes a shard: the same members give the same bytes, on any machine, at any time.
//!
//! ustar headers with fixed owner, mode and time; a pax header only where a name needs one (longer
//! than ustar holds, or not ASCII). The shard grows in a sibling temp file and appears under its
//! name, whole and synced, when it is sealed. A sealed shard is never overwritten.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::ShardError;
use super::index::{IndexText, Span};
use super::manifest::ShardRecord;
use super::tar::{BLOCK, SIZE_MAX};
use crate::files::{hex, sync_folder, temp_name};

/// Modification time of every member: 1980-01-01, which every tool takes without a warning.
const TIME: u64 = 315_532_800;

/// Writes one shard and its index.
#[derive(Debug)]
pub struct ShardWriter {
    path: PathBuf,
    temp: PathBuf,
    file: BufWriter<File>,
    digest: Sha256,
    offset: u64,
    index: IndexText,
    members: u64,
    crcs: String,
}

/// A shard whose bytes are on disk under temporary names.
#[derive(Debug)]
pub struct Written {
    /// What the manifest will say of it.
    pub record: ShardRecord,
    path: PathBuf,
}

impl ShardWriter {
    /// Starts `folder/name`, which must not exist.
    ///
    /// # Errors
    ///
    /// The name is taken, or the temp file cannot be created.
    pub fn create(folder: &Path, name: &str) -> Result<ShardWriter, ShardError> {
        let path = folder.join(name);
        refuse_sealed(&path)?;
        let temp = temp_name(&path);
        let file = File::create(&temp).map_err(ShardError::io(&temp, "create"))?;
        Ok(ShardWriter {
            path,
            temp,
            // One large write for a few images: a shard goes to disk in order.
            file: BufWriter::with_capacity(1 << 20, file),
            digest: Sha256::new(),
            offset: 0,
            index: IndexText::default(),
            members: 0,
            crcs: String::new(),
        })
    }

    /// Adds a member. Members of a sample must be neighbours.
    ///
    /// # Errors
    ///
    /// The name holds white space or control characters (the index could not name it), the payload
    /// is too large, or the disk is full.
    pub fn append(&mut self, name: &str, payload: &[u8]) -> Result<(), ShardError> {
        use std::fmt::Write as _;
        let size = payload.len() as u64;
        if size > SIZE_MAX {
            return Err(ShardError::MemberTooLarge { name: name.to_owned(), bytes: size });
        }
        if name.is_empty() || name.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err(ShardError::MemberName { name: name.to_owned() });
        }
        let head = headers(name, size);
        self.write(&head)?;
        self.index.push(name, Span { offset: self.offset, size });
        self.write(payload)?;
        self.write(&ZEROS[..padding(size)])?;
        // Writing into a String cannot fail.
        let _ = write!(self.crcs, "{:08x}", crc32c::crc32c(payload));
        self.members += 1;
        Ok(())
    }

    /// Samples so far.
    pub fn samples(&self) -> u64 {
        self.index.samples()
    }

    /// Bytes so far, headers and padding included.
    pub fn bytes(&self) -> u64 {
        self.offset
    }

    /// Ends the archive and brings shard and index to disk, still under temporary names.
    ///
    /// # Errors
    ///
    /// The disk is full.
    pub fn finish(mut self) -> Result<Written, ShardError> {
        self.write(&ZEROS)?;
        self.write(&ZEROS)?;
        self.file.flush().map_err(ShardError::io(&self.temp, "write"))?;
        self.file.get_ref().sync_all().map_err(ShardError::io(&self.temp, "sync"))?;
        let name = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let samples = self.index.samples();
        // After the shard, so that the index is never the older of the two.
        let index = self.index.finish();
        let index_temp = temp_name(&self.path.with_extension("idx"));
        let mut file = File::create(&index_temp).map_err(ShardError::io(&index_temp, "create"))?;
        file.write_all(index.as_bytes()).map_err(ShardError::io(&index_temp, "write"))?;
        file.sync_all().map_err(ShardError::io(&index_temp, "sync"))?;
        let record = ShardRecord {
            name,
            samples,
            members: self.members,
            bytes: self.offset,
            sha256: hex(&self.digest.finalize()),
            index_crc32c: format!("{:08x}", crc32c::crc32c(index.as_bytes())),
            crc32c: self.crcs,
        };
        Ok(Written { record, path: self.path })
    }

    /// Gives up: removes the temp file.
    pub fn discard(self) {
        // It is only a temp file: the next run would overwrite it.
        let _ = std::fs::remove_file(&self.temp);
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), ShardError> {
        self.digest.update(bytes);
        self.offset += bytes.len() as u64;
        self.file.write_all(bytes).map_err(ShardError::io(&self.temp, "write"))
    }
}

impl Written {
    /// Gives index and shard their names, in this order, so that a shard under its name is whole and
    /// has its index.
    ///
    /// # Errors
    ///
    /// The shard's name is taken, or a rename is refused.
    pub fn seal(self) -> Result<ShardRecord, ShardError> {
        refuse_sealed(&self.path)?;
        for path in [&self.path.with_extension("idx"), &self.path] {
            let rename = std::fs::rename(temp_name(path), path);
            rename.map_err(ShardError::io(path, "rename the temp file to"))?;
        }
        sync_folder(self.path.parent().unwrap_or(Path::new(".")))?;
        Ok(self.record)
    }
}

fn refuse_sealed(path: &Path) -> Result<(), ShardError> {
    let exists = path.try_exists().map_err(ShardError::io(path, "look for"))?;
    if exists { Err(ShardError::Sealed { path: path.to_path_buf() }) } else { Ok(()) }
}

const ZEROS: [u8; BLOCK as usize] = [0; BLOCK as usize];

/// Zeros that follow a payload.
fn padding(size: u64) -> usize {
    // At most 511.
    (size.next_multiple_of(BLOCK) - size) as usize
}

/// The header of a member, with a pax header in front where its name needs one.
fn headers(name: &str, size: u64) -> Vec<u8> {
    if let Some((prefix, rest)) = split_ustar(name) {
        return header(prefix, rest, size, b'0').to_vec();
    }
    let record = pax_record("path", name);
    let record_size = record.len() as u64;
    // For readers without pax: recognisable, ASCII, short enough.
    let plain: String = name.chars().map(|c| if c.is_ascii() { c } else { '_' }).collect();
    let tail = &plain[plain.len().saturating_sub(100)..];
    let mut bytes = header("PaxHeaders", &tail[tail.len().min(1)..], record_size, b'x').to_vec();
    bytes.extend_from_slice(record.as_bytes());
    bytes.extend_from_slice(&ZEROS[..padding(record_size)]);
    bytes.extend_from_slice(&header("", tail, size, b'0'));
    bytes
}

/// The ustar prefix and name, if the name fits.
fn split_ustar(name: &str) -> Option<(&str, &str)> {
    if !name.is_ascii() {
        return None;
    }
    if name.len() <= 100 {
        return Some(("", name));
    }
    name.match_indices('/')
        .map(|(slash, _)| (&name[..slash], &name[slash + 1..]))
        .find(|(prefix, rest)| (1..=155).contains(&prefix.len()) && (1..=100).contains(&rest.len()))
}

/// `LENGTH KEY=VALUE\n`, where LENGTH counts its own digits too.
fn pax_record(key: &str, value: &str) -> String {
    let body = key.len() + value.len() + 3;
    let mut length = body + 1;
    while length != body + length.to_string().len() {
        length += 1;
    }
    format!("{length} {key}={value}\n")
}

fn header(prefix: &str, name: &str, size: u64, flag: u8) -> [u8; BLOCK as usize] {
    let mut block = ZEROS;
    let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, name.as_bytes());
    put(100, b"0000644\0");
    put(108, b"0000000\0"); // owner
    put(116, b"0000000\0"); // group
    put(124, format!("{size:011o}\0").as_bytes());
    put(136, format!("{TIME:011o}\0").as_bytes());
    put(148, b"        "); // checksum, summed as blanks
    put(156, &[flag]);
    put(257, b"ustar\x0000");
    put(329, b"0000000\0"); // device, major
    put(337, b"0000000\0"); // device, minor
    put(345, prefix.as_bytes());
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pax_lengths_count_their_own_digits() {
        for length in [1, 2, 3, 80, 85, 86, 87, 88, 89, 90, 91, 92, 93, 985, 990, 995, 9990] {
            let record = pax_record("path", &"x".repeat(length));
            let (stated, _) = record.split_once(' ').expect("a record has a blank");
            assert_eq!(stated.parse::<usize>().expect("digits"), record.len());
        }
    }

    #[test]
    fn names_take_the_plainest_form_that_holds_them() {
        let hundred = "n".repeat(100);
        assert_eq!(split_ustar(&hundred), Some(("", hundred.as_str())));
        assert_eq!(split_ustar(&"n".repeat(101)), None);
        let long = format!("{}/{}", "p".repeat(155), "n".repeat(100));
        assert_eq!(split_ustar(&long), Some((&long[..155], &long[156..])));
        assert_eq!(split_ustar(&format!("{}/{}", "p".repeat(156), "n".repeat(99))), None);
        assert_eq!(split_ustar("ümlaut"), None);
    }
}
