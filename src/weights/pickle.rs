//! Reads the pickle inside a `.pth` file as data, never as a program: the opcodes that
//! `torch.save` writes for state dicts, and nothing that could call anything.
//!
//! Format: Python's `pickletools` (protocol 2), torch's `torch/serialization.py`. Foreign bytes end
//! in a value or in an error with the offset; containers live in arenas, so that no nesting in the
//! file becomes recursion here.

use std::collections::{BTreeMap, HashMap};

use tch::Kind;
use thiserror::Error;

/// libtorch's own limit on dimensions; it also bounds what a repeated reference can copy.
const RANK_MAX: usize = 64;

/// Why a pickle was refused, and at which byte of it.
#[derive(Debug, Error)]
#[error("byte {offset} of the pickle: {fault}")]
pub struct PickleError {
    /// Offset of the opcode in the pickle.
    pub offset: usize,
    /// What is wrong there.
    pub fault: PickleFault,
}

/// What is wrong with a pickle.
#[derive(Debug, Error)]
pub enum PickleFault {
    /// The bytes end inside an opcode or before `STOP`.
    #[error("truncated: {need} bytes are needed, {have} are left")]
    Truncated {
        /// Bytes the opcode asks for.
        need: usize,
        /// Bytes that are left.
        have: usize,
    },
    /// An opcode that torch does not write for state dicts.
    #[error("opcode {0:#04x} does not occur in state dicts that torch.save writes")]
    Opcode(u8),
    /// A pickle protocol other than 2.
    #[error("pickle protocol {0}; torch.save writes protocol 2")]
    Protocol(u8),
    /// The pickle names code to call that a state dict does not need.
    #[error(
        "it asks to import {module}.{name}, which a state dict does not need; save the state dict \
         alone: torch.save(model.state_dict(), file)"
    )]
    Global {
        /// Python module.
        module: String,
        /// Name in it.
        name: String,
    },
    /// More is taken from the stack than lies on it.
    #[error("takes from an empty stack")]
    StackEmpty,
    /// A tuple, list or dict is closed that was never opened.
    #[error("no mark on the stack")]
    NoMark,
    /// A memo slot is read that was never written.
    #[error("reads memo slot {0}, which was never written")]
    Memo(u32),
    /// Text that is not UTF-8.
    #[error("text that is not UTF-8")]
    Utf8,
    /// An opcode or a rebuild function was given something of another type or length.
    #[error("expected {expected}")]
    Expected {
        /// What torch writes here.
        expected: &'static str,
    },
}

/// A tensor as the pickle describes it: a window on a storage that lies beside the pickle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TensorRef<'a> {
    /// Element type of the storage.
    pub(super) kind: Kind,
    /// Name of the storage's record, below `data/`.
    pub(super) key: &'a str,
    /// Elements of the whole storage.
    pub(super) storage_len: i64,
    /// First element of the tensor in its storage.
    pub(super) offset: i64,
    /// Size of each dimension.
    pub(super) size: Vec<i64>,
    /// Stride of each dimension, in elements.
    pub(super) stride: Vec<i64>,
}

#[derive(Clone, Copy, Debug)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(Kind),
}

#[derive(Clone, Copy, Debug)]
enum Value<'a> {
    Bool,
    Int(i64),
    Str(&'a str),
    Tuple(usize),
    Dict(usize),
    Global(Global),
    Storage(usize),
    Tensor(usize),
    /// None, floats, long integers, lists: legal, and of no use here.
    Other,
}

#[derive(Clone, Copy, Debug)]
struct Storage<'a> {
    kind: Kind,
    key: &'a str,
    len: i64,
}

/// The named tensors of a pickled state dict.
///
/// The root is a dict; where it holds a dict under `state_dict` or `model`, that one is read.
/// Entries that are no tensors (epoch, optimizer, arguments) are passed over.
///
/// # Errors
/// [`PickleError`] for anything but the opcodes, imports and types of a state dict.
pub(super) fn tensors(bytes: &[u8]) -> Result<BTreeMap<String, TensorRef<'_>>, PickleError> {
    let mut machine = Machine::new(bytes);
    let root = machine.run().map_err(|fault| PickleError { offset: machine.opcode_at, fault })?;
    let Value::Dict(mut dict) = root else {
        let fault = PickleFault::Expected { expected: "a dict of named tensors" };
        return Err(PickleError { offset: machine.opcode_at, fault });
    };
    for name in ["state_dict", "model"] {
        let nested = machine.dicts[dict].iter().rev().find_map(|(key, value)| match (key, value) {
            (Value::Str(key), Value::Dict(inner)) if *key == name => Some(*inner),
            _ => None,
        });
        if let Some(inner) = nested {
            dict = inner;
            break;
        }
    }
    let mut found = BTreeMap::new();
    for (key, value) in &machine.dicts[dict] {
        if let (Value::Str(name), Value::Tensor(tensor)) = (key, value) {
            found.insert(name.to_string(), machine.tensors[*tensor].clone());
        }
    }
    Ok(found)
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    opcode_at: usize,
    stack: Vec<Value<'a>>,
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'a>>,
    tuples: Vec<Vec<Value<'a>>>,
    dicts: Vec<Vec<(Value<'a>, Value<'a>)>>,
    storages: Vec<Storage<'a>>,
    tensors: Vec<TensorRef<'a>>,
}

impl<'a> Machine<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Machine {
            bytes,
            at: 0,
            opcode_at: 0,
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
            tuples: Vec::new(),
            dicts: Vec::new(),
            storages: Vec::new(),
            tensors: Vec::new(),
        }
    }

    fn run(&mut self) -> Result<Value<'a>, PickleFault> {
        loop {
            self.opcode_at = self.at;
            match self.take(1)?[0] {
                b'.' => return self.pop(),
                opcode => self.one(opcode)?,
            }
        }
    }

    fn one(&mut self, opcode: u8) -> Result<(), PickleFault> {
        match opcode {
            // PROTO
            0x80 => match self.take(1)?[0] {
                2 => {}
                other => return Err(PickleFault::Protocol(other)),
            },
            b'(' => self.marks.push(self.stack.len()),
            // EMPTY_DICT, EMPTY_LIST, EMPTY_TUPLE
            b'}' => self.push_dict(),
            b']' => self.stack.push(Value::Other),
            b')' => self.push_tuple(Vec::new()),
            // TUPLE, TUPLE1, TUPLE2, TUPLE3
            b't' => {
                let items = self.pop_to_mark()?;
                self.push_tuple(items);
            }
            0x85..=0x87 => {
                let items = self.pop_n(usize::from(opcode - 0x84))?;
                self.push_tuple(items);
            }
            // NONE, NEWTRUE, NEWFALSE
            b'N' => self.stack.push(Value::Other),
            0x88 | 0x89 => self.stack.push(Value::Bool),
            // BININT, BININT1, BININT2: little-endian, only the first is signed
            b'J' => {
                let raw = self.word::<4>()?;
                self.stack.push(Value::Int(i64::from(i32::from_le_bytes(raw))));
            }
            b'K' => {
                let [byte] = self.word::<1>()?;
                self.stack.push(Value::Int(i64::from(byte)));
            }
            b'M' => {
                let raw = self.word::<2>()?;
                self.stack.push(Value::Int(i64::from(u16::from_le_bytes(raw))));
            }
            // LONG1: a length byte, then little-endian two's complement
            0x8a => {
                let len = usize::from(self.take(1)?[0]);
                let raw = self.take(len)?;
                self.stack.push(long(raw));
            }
            // BINFLOAT
            b'G' => {
                self.take(8)?;
                self.stack.push(Value::Other);
            }
            // BINUNICODE
            b'X' => {
                let len = u32::from_le_bytes(self.word::<4>()?);
                // A length beyond the address space is beyond the bytes as well.
                let raw = self.take(usize::try_from(len).unwrap_or(usize::MAX))?;
                let text = std::str::from_utf8(raw).map_err(|_| PickleFault::Utf8)?;
                self.stack.push(Value::Str(text));
            }
            // BINGET, LONG_BINGET, BINPUT, LONG_BINPUT
            b'h' | b'j' => {
                let slot = self.slot(opcode == b'j')?;
                let value = *self.memo.get(&slot).ok_or(PickleFault::Memo(slot))?;
                self.stack.push(value);
            }
            b'q' | b'r' => {
                let slot = self.slot(opcode == b'r')?;
                let top = *self.stack.last().ok_or(PickleFault::StackEmpty)?;
                self.memo.insert(slot, top);
            }
            b'c' => {
                let global = self.global()?;
                self.stack.push(Value::Global(global));
            }
            // BINPERSID
            b'Q' => {
                let id = self.pop()?;
                self.persistent(id)?;
            }
            b'R' => {
                let arguments = self.pop()?;
                let function = self.pop()?;
                self.reduce(function, arguments)?;
            }
            // BUILD: state dicts carry `_metadata` as an attribute of their OrderedDict.
            b'b' => {
                self.pop()?;
                if !matches!(self.stack.last(), Some(Value::Dict(_))) {
                    return Err(PickleFault::Expected { expected: "attributes of a dict only" });
                }
            }
            // APPEND, APPENDS: what is in lists is of no use here
            b'a' => {
                self.pop()?;
                self.stack.last().ok_or(PickleFault::StackEmpty)?;
            }
            b'e' => {
                self.pop_to_mark()?;
                self.stack.last().ok_or(PickleFault::StackEmpty)?;
            }
            // SETITEM, SETITEMS
            b's' => {
                let items = self.pop_n(2)?;
                self.set_items(&items)?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.set_items(&items)?;
            }
            other => return Err(PickleFault::Opcode(other)),
        }
        Ok(())
    }

    fn take(&mut self, need: usize) -> Result<&'a [u8], PickleFault> {
        let have = self.bytes.len() - self.at;
        if need > have {
            return Err(PickleFault::Truncated { need, have });
        }
        let taken = &self.bytes[self.at..self.at + need];
        self.at += need;
        Ok(taken)
    }

    fn word<const N: usize>(&mut self) -> Result<[u8; N], PickleFault> {
        let mut word = [0; N];
        word.copy_from_slice(self.take(N)?);
        Ok(word)
    }

    fn slot(&mut self, long: bool) -> Result<u32, PickleFault> {
        Ok(if long { u32::from_le_bytes(self.word::<4>()?) } else { self.take(1)?[0].into() })
    }

    /// The lowest stack position that may be popped: what lies below an open mark stays.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn pop(&mut self) -> Result<Value<'a>, PickleFault> {
        if self.stack.len() <= self.floor() {
            return Err(PickleFault::StackEmpty);
        }
        self.stack.pop().ok_or(PickleFault::StackEmpty)
    }

    fn pop_n(&mut self, n: usize) -> Result<Vec<Value<'a>>, PickleFault> {
        let from = self.stack.len().checked_sub(n).ok_or(PickleFault::StackEmpty)?;
        if from < self.floor() {
            return Err(PickleFault::StackEmpty);
        }
        Ok(self.stack.split_off(from))
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Value<'a>>, PickleFault> {
        let mark = self.marks.pop().ok_or(PickleFault::NoMark)?;
        // `pop` and `pop_n` stop at the mark, so the stack is at least this long.
        Ok(self.stack.split_off(mark))
    }

    fn push_tuple(&mut self, items: Vec<Value<'a>>) {
        self.tuples.push(items);
        self.stack.push(Value::Tuple(self.tuples.len() - 1));
    }

    fn push_dict(&mut self) {
        self.dicts.push(Vec::new());
        self.stack.push(Value::Dict(self.dicts.len() - 1));
    }

    fn set_items(&mut self, items: &[Value<'a>]) -> Result<(), PickleFault> {
        let Some(Value::Dict(dict)) = self.stack.last().copied() else {
            return Err(PickleFault::Expected { expected: "items of a dict" });
        };
        if !items.len().is_multiple_of(2) {
            return Err(PickleFault::Expected { expected: "as many values as keys" });
        }
        self.dicts[dict].extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
        Ok(())
    }

    fn line(&mut self) -> Result<&'a str, PickleFault> {
        let rest = &self.bytes[self.at..];
        let end = rest
            .iter()
            .position(|byte| *byte == b'\n')
            .ok_or(PickleFault::Truncated { need: rest.len() + 1, have: rest.len() })?;
        let raw = self.take(end + 1)?;
        std::str::from_utf8(&raw[..end]).map_err(|_| PickleFault::Utf8)
    }

    fn global(&mut self) -> Result<Global, PickleFault> {
        let (module, name) = (self.line()?, self.line()?);
        let storage = |kind| Ok(Global::Storage(kind));
        match (module, name) {
            ("collections", "OrderedDict") => Ok(Global::OrderedDict),
            ("torch._utils", "_rebuild_tensor_v2") => Ok(Global::RebuildTensor),
            ("torch._utils", "_rebuild_parameter") => Ok(Global::RebuildParameter),
            ("torch", "FloatStorage") => storage(Kind::Float),
            ("torch", "DoubleStorage") => storage(Kind::Double),
            ("torch", "HalfStorage") => storage(Kind::Half),
            ("torch", "BFloat16Storage") => storage(Kind::BFloat16),
            ("torch", "LongStorage") => storage(Kind::Int64),
            ("torch", "IntStorage") => storage(Kind::Int),
            ("torch", "ShortStorage") => storage(Kind::Int16),
            ("torch", "CharStorage") => storage(Kind::Int8),
            ("torch", "ByteStorage") => storage(Kind::Uint8),
            ("torch", "BoolStorage") => storage(Kind::Bool),
            _ => Err(PickleFault::Global { module: module.into(), name: name.into() }),
        }
    }

    /// `("storage", type, key, location, elements)`.
    fn persistent(&mut self, id: Value<'a>) -> Result<(), PickleFault> {
        let fault = PickleFault::Expected { expected: "the five fields of a torch storage" };
        let Value::Tuple(tuple) = id else { return Err(fault) };
        let [
            Value::Str("storage"),
            Value::Global(Global::Storage(kind)),
            Value::Str(key),
            Value::Str(_),
            Value::Int(len),
        ] = self.tuples[tuple][..]
        else {
            return Err(fault);
        };
        if len < 0 {
            return Err(fault);
        }
        self.storages.push(Storage { kind, key, len });
        self.stack.push(Value::Storage(self.storages.len() - 1));
        Ok(())
    }

    fn reduce(&mut self, function: Value<'a>, arguments: Value<'a>) -> Result<(), PickleFault> {
        let (Value::Global(function), Value::Tuple(arguments)) = (function, arguments) else {
            return Err(PickleFault::Expected { expected: "a known function and its arguments" });
        };
        match (function, &self.tuples[arguments][..]) {
            (Global::OrderedDict, []) => self.push_dict(),
            (
                Global::RebuildTensor,
                [
                    Value::Storage(storage),
                    Value::Int(offset),
                    Value::Tuple(size),
                    Value::Tuple(stride),
                    Value::Bool,
                    ..,
                ],
            ) => {
                let Storage { kind, key, len } = self.storages[*storage];
                let (size, stride) = (self.integers(*size)?, self.integers(*stride)?);
                let offset = *offset;
                self.tensors.push(TensorRef { kind, key, storage_len: len, offset, size, stride });
                self.stack.push(Value::Tensor(self.tensors.len() - 1));
            }
            (Global::RebuildParameter, [tensor @ Value::Tensor(_), Value::Bool, ..]) => {
                let tensor = *tensor;
                self.stack.push(tensor);
            }
            _ => return Err(PickleFault::Expected { expected: "the arguments that torch writes" }),
        }
        Ok(())
    }

    fn integers(&self, tuple: usize) -> Result<Vec<i64>, PickleFault> {
        let items = &self.tuples[tuple];
        if items.len() > RANK_MAX {
            return Err(PickleFault::Expected { expected: "at most 64 dimensions" });
        }
        let integer = |item: &Value<'_>| match item {
            Value::Int(number) => Ok(*number),
            _ => Err(PickleFault::Expected { expected: "integers as sizes and strides" }),
        };
        items.iter().map(integer).collect()
    }
}

/// Little-endian two's complement of any length; beyond 64 bits it cannot be a size.
fn long(raw: &[u8]) -> Value<'static> {
    if raw.len() > 8 {
        return Value::Other;
    }
    let sign = if raw.last().is_some_and(|byte| byte & 0x80 != 0) { 0xff } else { 0 };
    let mut word = [sign; 8];
    word[..raw.len()].copy_from_slice(raw);
    Value::Int(i64::from_le_bytes(word))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn longs_are_twos_complement() {
        for (raw, number) in
            [(&[][..], 0), (&[0xff], -1), (&[0x80, 0], 128), (&[0, 0, 0, 0, 0, 1], 1 << 40)]
        {
            assert!(matches!(long(raw), Value::Int(n) if n == number), "{raw:?}");
        }
        assert!(matches!(long(&[1; 9]), Value::Other));
    }

    #[test]
    fn code_is_refused_by_name_and_offset() {
        let error = tensors(b"\x80\x02cos\nsystem\nX\x02\0\0\0lsR.").unwrap_err();
        assert_eq!(error.offset, 2);
        let text = error.to_string();
        assert!(text.contains("os.system"), "{text}");
    }

    #[test]
    fn what_lies_below_a_mark_stays() {
        for bytes in [&b"\x80\x02}(s."[..], b"K\x01(K\x02\x86.", b"t.", b"u.", b"}(K\x01u.", b"(."]
        {
            assert!(tensors(bytes).is_err(), "{bytes:?}");
        }
    }

    /// A million nested tuples and a dict that holds itself: neither recursion nor a loop.
    #[test]
    fn nesting_costs_no_stack() {
        let mut bytes = b"}q\0X\x01\0\0\0a)".to_vec();
        bytes.extend(std::iter::repeat_n(0x85, 1_000_000));
        bytes.extend(b"sX\x05\0\0\0modelh\0s.");
        assert!(tensors(&bytes).unwrap().is_empty());
    }

    proptest! {
        #[test]
        fn any_bytes_end_in_a_value_or_an_error(
            bytes in prop::collection::vec(
                prop::sample::select(&b"\x80\x02(}])t\x85\x86\x87N\x88JKMGXhjqrcQRbaesu.\0\x01ab\n"[..]),
                0..200,
            )
        ) {
            // Either outcome is right: the property is that there is one.
            let _ = tensors(&bytes);
        }
    }
}
