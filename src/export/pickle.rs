//! Writes pickles: the few opcodes that a dict of tensors or arrays needs.
//!
//! Format: Python's `pickletools`. Nothing is memoised: a reader does not need it, and the files
//! are a few kilobytes of names beside megabytes of weights.

/// A pickle being written.
pub(super) struct Pickle(Vec<u8>);

impl Pickle {
    /// Starts a pickle of this protocol: 2 for torch, 3 where there are `bytes`.
    pub(super) fn new(protocol: u8) -> Pickle {
        Pickle(vec![0x80, protocol])
    }

    /// Ends it and hands out the bytes.
    pub(super) fn stop(mut self) -> Vec<u8> {
        self.0.push(b'.');
        self.0
    }

    pub(super) fn empty_dict(&mut self) {
        self.0.push(b'}');
    }

    pub(super) fn empty_tuple(&mut self) {
        self.0.push(b')');
    }

    pub(super) fn mark(&mut self) {
        self.0.push(b'(');
    }

    /// Everything since the mark as a tuple.
    pub(super) fn tuple(&mut self) {
        self.0.push(b't');
    }

    /// Everything since the mark as keys and values of the dict below it.
    pub(super) fn set_items(&mut self) {
        self.0.push(b'u');
    }

    pub(super) fn global(&mut self, module: &str, name: &str) {
        self.0.push(b'c');
        for line in [module, name] {
            self.0.extend(line.as_bytes());
            self.0.push(b'\n');
        }
    }

    /// Calls the function below the tuple on top.
    pub(super) fn reduce(&mut self) {
        self.0.push(b'R');
    }

    /// Hands the state on top to the object below it.
    pub(super) fn build(&mut self) {
        self.0.push(b'b');
    }

    /// Replaces the tuple on top with what the reader keeps under it.
    pub(super) fn persistent(&mut self) {
        self.0.push(b'Q');
    }

    pub(super) fn none(&mut self) {
        self.0.push(b'N');
    }

    pub(super) fn bool(&mut self, value: bool) {
        self.0.push(if value { 0x88 } else { 0x89 });
    }

    pub(super) fn int(&mut self, value: i64) {
        if let Ok(byte) = u8::try_from(value) {
            self.0.extend([b'K', byte]);
        } else if let Ok(word) = i32::try_from(value) {
            self.0.push(b'J');
            self.0.extend(word.to_le_bytes());
        } else {
            self.0.extend([0x8a, 8]);
            self.0.extend(value.to_le_bytes());
        }
    }

    /// A tuple of integers.
    pub(super) fn ints(&mut self, values: &[i64]) {
        self.mark();
        values.iter().for_each(|value| self.int(*value));
        self.tuple();
    }

    /// Text; names are far below the format's 4 GiB.
    pub(super) fn text(&mut self, text: &str) {
        self.0.push(b'X');
        self.0.extend((text.len() as u32).to_le_bytes());
        self.0.extend(text.as_bytes());
    }

    /// The head of a `bytes` object, whose `len` bytes must follow.
    pub(super) fn bytes(&mut self, len: u32) {
        self.0.push(b'B');
        self.0.extend(len.to_le_bytes());
    }

    pub(super) fn extend(&mut self, raw: &[u8]) {
        self.0.extend(raw);
    }

    /// Hands out what was written so far, so that large pickles need not be held whole.
    pub(super) fn drain(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.0)
    }
}
