//! TensorBoard event files, written by hand: TFRecord frames (length, masked CRC32C, payload,
//! masked CRC32C) around `tensorflow.Event` protobufs with scalar summaries.
//!
//! Formats: tensorflow/core/lib/io/record_writer.h, core/util/event.proto,
//! core/framework/summary.proto; the protobuf wire format.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::{MetricsError, Record, fault};

/// An event file being written.
#[derive(Debug)]
pub(super) struct Events {
    path: PathBuf,
    file: File,
}

impl Events {
    /// A new event file in the run's folder. TensorBoard reads those of a folder in the order of
    /// their names as one run, and drops what it read of steps from `purge` on.
    pub(super) fn create(run: &Path, time: f64, purge: u64) -> Result<Events, MetricsError> {
        let stem = format!("events.out.tfevents.{:010}.detco.{}", time as u64, std::process::id());
        let mut path = run.join(&stem);
        let mut again = 0;
        let file = loop {
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => break file,
                // A second start within the same second.
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                    again += 1;
                    path = run.join(format!("{stem}.{again}"));
                }
                Err(error) => return Err(fault("create", &path)(error)),
            }
        };
        let mut events = Events { path, file };
        let mut version = Message::at(time, 0);
        version.bytes(3, b"brain.Event:2");
        events.append(&version)?;
        let mut session = Message::default();
        session.varint(1, 1); // SessionLog.status = START
        let mut start = Message::at(time, purge);
        start.bytes(7, &session.0);
        events.append(&start)?;
        Ok(events)
    }

    pub(super) fn write(&mut self, time: f64, record: &Record) -> Result<(), MetricsError> {
        let mut summary = Message::default();
        let epoch = ("epoch", f64::from(record.epoch));
        let values = record.values.iter().map(|(name, value)| (name.as_str(), *value));
        for (name, value) in std::iter::once(epoch).chain(values) {
            let mut scalar = Message::default();
            scalar.bytes(1, name.as_bytes());
            scalar.float(2, value as f32);
            summary.bytes(1, &scalar.0);
        }
        let mut event = Message::at(time, record.step);
        event.bytes(5, &summary.0);
        self.append(&event)
    }

    pub(super) fn sync(&mut self) -> Result<(), MetricsError> {
        self.file.sync_data().map_err(fault("flush", &self.path))
    }

    fn append(&mut self, message: &Message) -> Result<(), MetricsError> {
        self.file.write_all(&frame(&message.0)).map_err(fault("write", &self.path))
    }
}

/// One TFRecord.
fn frame(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u64).to_le_bytes();
    let mut frame = Vec::with_capacity(payload.len() + 16);
    frame.extend(length);
    frame.extend(masked_crc(&length).to_le_bytes());
    frame.extend(payload);
    frame.extend(masked_crc(payload).to_le_bytes());
    frame
}

/// The checksum is masked because a CRC of data that holds its own CRC says little.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// A protobuf message being encoded.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    /// An `Event`'s first two fields: wall time in seconds, step.
    fn at(time: f64, step: u64) -> Message {
        let mut message = Message::default();
        message.tag(1, 1);
        message.0.extend(time.to_le_bytes());
        message.varint(2, step);
        message
    }

    fn tag(&mut self, field: u8, wire: u8) {
        self.0.push(field << 3 | wire);
    }

    fn varint(&mut self, field: u8, value: u64) {
        self.tag(field, 0);
        self.raw_varint(value);
    }

    fn float(&mut self, field: u8, value: f32) {
        self.tag(field, 5);
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, field: u8, bytes: &[u8]) {
        self.tag(field, 2);
        self.raw_varint(bytes.len() as u64);
        self.0.extend(bytes);
    }

    fn raw_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crcs_are_castagnoli_masked() {
        // RFC 3720, B.4: 32 zero bytes have the CRC32C 0x8a9136aa.
        let crc: u32 = 0x8a91_36aa;
        let masked = crc.rotate_right(15).wrapping_add(0xa282_ead8);
        assert_eq!(masked_crc(&[0; 32]), masked);
    }

    #[test]
    fn varints_are_little_endian_base_128() {
        let mut message = Message::default();
        message.varint(2, 300);
        assert_eq!(message.0, [0x10, 0xac, 0x02]);
    }
}
