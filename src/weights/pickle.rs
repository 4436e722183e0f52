//! Reads a pickle as data, never as a program.
//!
//! All opcodes of protocols 0 to 5 are followed, but nothing is imported, called or built: an object
//! of a class that weights do not need is an opaque value, of which only the items and attributes
//! that are pickled as such are kept. So the tensors of a checkpoint are found beside arguments,
//! NumPy numbers, configurations and dates, and inside whole modules and TorchScript archives.
//!
//! Format: Python's `pickletools`, torch's `torch/serialization.py` and `torch/_utils.py`. Foreign
//! bytes end in a value or in an error with the offset. Containers live in arenas, so that no nesting
//! in the file becomes recursion here, and the number of opcodes is bounded, so memory is as well.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use thiserror::Error;

use super::Dtype;

/// Dimensions of a tensor: far more than any layer has, few enough to be copied with each reference.
const RANK_MAX: usize = 16;
/// Opcodes of a pickle: ten times those of a checkpoint that lists a million file names. One makes
/// at most some 100 bytes here.
const OPCODES_MAX: usize = 1 << 24;
/// Containers within containers that are looked into: a module of modules takes two each.
const DEPTH_MAX: usize = 40;
/// Bytes of a tensor's name, with those of the containers around it.
const NAME_MAX: usize = 512;
/// Containers and tensors that are looked at, and items in them. A pickle without references to
/// what stands elsewhere has fewer than opcodes.
const VISITS_MAX: usize = 1 << 20;
const ITEMS_MAX: usize = 1 << 26;

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
    /// A byte that is no opcode.
    #[error("{0:#04x} is no opcode of pickle protocols 0 to 5")]
    Opcode(u8),
    /// An object named by a number that only the program knows that wrote it.
    #[error("an object is named by a code of Python's extension registry, which no file explains")]
    Extension,
    /// A protocol that does not exist yet.
    #[error("pickle protocol {0}; protocols 0 to 5 are known")]
    Protocol(u8),
    /// More opcodes than any checkpoint has.
    #[error("more than {OPCODES_MAX} opcodes: no checkpoint of weights has as many")]
    Long,
    /// Containers that are referred to again and again.
    #[error("its containers refer to each other too often to be listed")]
    Tangled,
    /// More is taken from the stack than lies on it.
    #[error("takes from an empty stack")]
    StackEmpty,
    /// A tuple, list or dict is closed that was never opened.
    #[error("no mark on the stack")]
    NoMark,
    /// A memo slot is read that was never written.
    #[error("reads memo slot {0}, which was never written")]
    Memo(u64),
    /// Text that is not UTF-8.
    #[error("text that is not UTF-8")]
    Utf8,
    /// An opcode or a rebuild function was given something of another type or length.
    #[error("expected {expected}")]
    Expected {
        /// What belongs here.
        expected: &'static str,
    },
}

/// Where a tensor's elements are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Data {
    /// A storage beside the pickle, by its key; how many elements the pickle says it has.
    Storage { key: String, len: i64 },
    /// These bytes of the pickle.
    Inline(Range<usize>),
    /// These bytes of the pickle are UTF-8, of which each character is a byte: how protocol 2
    /// writes bytes.
    Latin1(Range<usize>),
    /// These bytes of the pickle are protocol 0's text, of which each character is a byte.
    Escaped(Range<usize>),
}

/// A tensor as a file describes it: a window on its elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TensorRef {
    /// Element type; none for those that weights do not have.
    pub(super) dtype: Option<Dtype>,
    /// The element type's name in the file.
    pub(super) dtype_name: String,
    /// Where the elements are.
    pub(super) data: Data,
    /// First element of the tensor there.
    pub(super) offset: i64,
    /// Size of each dimension.
    pub(super) size: Vec<i64>,
    /// Stride of each dimension, in elements.
    pub(super) stride: Vec<i64>,
}

/// An element type by the name that a file has for it.
#[derive(Clone, Copy, Debug)]
struct Element<'a> {
    dtype: Option<Dtype>,
    name: &'a str,
}

#[derive(Clone, Copy, Debug)]
enum Global<'a> {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    /// `_rebuild_from_type_v2(function, type, arguments, state)`.
    RebuildFromType,
    Storage(Element<'a>),
    NumpyReconstruct,
    NumpyFromBuffer,
    NumpyDtype,
    CodecsEncode,
    Unknown,
}

#[derive(Clone, Copy, Debug)]
enum Value<'a> {
    Bool(bool),
    Int(i64),
    /// An integer beyond 64 bits, little-endian.
    Long(&'a [u8]),
    Text(&'a str),
    Bytes(&'a [u8]),
    /// Text whose characters are bytes.
    Latin1(&'a str),
    /// Text in protocol 0's escapes.
    Escaped(&'a [u8]),
    Tuple(usize),
    List(usize),
    Dict(usize),
    /// An object of a class that is not known: its items and attributes are in a `Dict`'s place.
    Object(usize),
    Global(Global<'a>),
    Storage(usize),
    Tensor(usize),
    NumpyDtype(usize),
    /// None, floats, sets, what other programs persist: legal, and of no use here.
    Other,
}

#[derive(Clone, Debug, Default)]
struct Dict<'a> {
    items: Vec<(Value<'a>, Value<'a>)>,
    /// Of an object: the dict of its attributes.
    attributes: Option<usize>,
}

#[derive(Clone, Copy, Debug)]
struct Storage<'a> {
    element: Element<'a>,
    key: &'a str,
    len: i64,
    /// Where it begins in the storage of that key: torch before 0.4 wrote views of storages.
    start: i64,
}

#[derive(Clone, Debug)]
struct Tensor<'a> {
    element: Element<'a>,
    elements: Elements<'a>,
    offset: i64,
    size: Vec<i64>,
    stride: Vec<i64>,
}

#[derive(Clone, Copy, Debug)]
enum Elements<'a> {
    Storage(&'a str, i64),
    Bytes(&'a [u8]),
    Latin1(&'a str),
    Escaped(&'a [u8]),
    /// A NumPy array whose state has not come.
    None,
}

/// A pickle that has been read.
#[derive(Debug)]
pub(super) struct Pickle<'a> {
    machine: Machine<'a>,
    root: Value<'a>,
}

impl<'a> Pickle<'a> {
    /// Reads the pickle that begins at byte `start`.
    ///
    /// # Errors
    /// [`PickleError`], with an offset from the beginning of `bytes`.
    pub(super) fn load(bytes: &'a [u8], start: usize) -> Result<Pickle<'a>, PickleError> {
        let mut machine = Machine::new(bytes, start);
        match machine.run() {
            Ok(root) => Ok(Pickle { machine, root }),
            Err(fault) => Err(PickleError { offset: machine.opcode_at, fault }),
        }
    }

    /// The byte behind its `STOP`.
    pub(super) fn end(&self) -> usize {
        self.machine.at
    }

    /// An error about its contents.
    pub(super) fn error(&self, fault: PickleFault) -> PickleError {
        PickleError { offset: self.machine.opcode_at, fault }
    }

    /// The integer that it is, little-endian, if it is one beyond 64 bits.
    pub(super) fn as_long(&self) -> Option<&'a [u8]> {
        match self.root {
            Value::Long(raw) => Some(raw),
            _ => None,
        }
    }

    /// The integer that it is.
    pub(super) fn as_int(&self) -> Option<i64> {
        match self.root {
            Value::Int(number) => Some(number),
            _ => None,
        }
    }

    /// The truth value under this key, if it is a dict that has one.
    pub(super) fn flag(&self, name: &str) -> Option<bool> {
        let Value::Dict(dict) = self.root else { return None };
        self.machine.dicts[dict].items.iter().rev().find_map(|(key, value)| match (key, value) {
            (Value::Text(key), Value::Bool(flag)) if *key == name => Some(*flag),
            _ => None,
        })
    }

    /// The texts that it is a list of.
    pub(super) fn texts(&self) -> Option<Vec<&'a str>> {
        let Value::List(list) = self.root else { return None };
        let text = |value: &Value<'a>| match value {
            Value::Text(text) => Some(*text),
            _ => None,
        };
        self.machine.lists[list].iter().map(text).collect()
    }

    /// Of each storage that it refers to: key, and bytes an element, where known.
    pub(super) fn storages(&self) -> impl Iterator<Item = (&'a str, Option<usize>)> {
        let size = |element: &Element<'a>| match element.dtype {
            Some(dtype) => Some(dtype.bytes()),
            None => match element.name {
                "QInt8Storage" | "QUInt8Storage" | "QUInt4x2Storage" | "QUInt2x4Storage" => Some(1),
                "QInt32Storage" => Some(4),
                "ComplexFloatStorage" => Some(8),
                "ComplexDoubleStorage" => Some(16),
                _ => None,
            },
        };
        self.machine.storages.iter().map(move |storage| (storage.key, size(&storage.element)))
    }

    /// All its tensors. Names are those of the containers around a tensor and its own, joined by
    /// dots; of a module's attributes the parameters, buffers and modules have no name of their own,
    /// as in its state dict. Where a name comes twice, the later tensor has it, as in Python.
    ///
    /// # Errors
    /// [`PickleFault::Tangled`].
    pub(super) fn tensors(&self) -> Result<BTreeMap<String, TensorRef>, PickleFault> {
        let mut found = BTreeMap::new();
        let mut open = vec![(self.root, String::new(), 0)];
        let (mut visits, mut items) = (0, 0);
        while let Some((value, name, depth)) = open.pop() {
            if let Value::Tensor(tensor) = value {
                if let Some(tensor) = self.machine.reference(tensor) {
                    found.insert(name, tensor);
                }
                continue;
            }
            let before = open.len();
            self.machine.children(value, &mut |key, child| {
                items += 1;
                let is_open = matches!(
                    child,
                    Value::Tensor(_)
                        | Value::Dict(_)
                        | Value::Object(_)
                        | Value::List(_)
                        | Value::Tuple(_)
                );
                let longer = || join(&name, key);
                if let Some(name) = (is_open && depth < DEPTH_MAX).then(longer).flatten() {
                    open.push((child, name, depth + 1));
                }
                open.len() + visits <= VISITS_MAX && items <= ITEMS_MAX
            });
            visits += open.len() - before;
            if open.len() + visits > VISITS_MAX || items > ITEMS_MAX {
                return Err(PickleFault::Tangled);
            }
            // Taken from the end: the first comes first.
            open[before..].reverse();
        }
        Ok(found)
    }
}

/// What a container calls its item.
#[derive(Clone, Copy)]
enum Key<'a> {
    Text(&'a str),
    Number(i64),
    /// What makes no name.
    Other,
}

/// `outer.key`, if it is no longer than names are.
fn join(outer: &str, key: Key<'_>) -> Option<String> {
    let key = match key {
        Key::Text("_parameters" | "_buffers" | "_modules") => return Some(outer.to_string()),
        Key::Text(text) => std::borrow::Cow::from(text),
        Key::Number(number) => number.to_string().into(),
        Key::Other => return None,
    };
    let fits = outer.len() + key.len() < NAME_MAX;
    fits.then(|| if outer.is_empty() { key.into_owned() } else { format!("{outer}.{key}") })
}

#[derive(Debug)]
struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    opcode_at: usize,
    stack: Vec<Value<'a>>,
    marks: Vec<usize>,
    memo: HashMap<u64, Value<'a>>,
    tuples: Vec<Vec<Value<'a>>>,
    lists: Vec<Vec<Value<'a>>>,
    dicts: Vec<Dict<'a>>,
    storages: Vec<Storage<'a>>,
    tensors: Vec<Tensor<'a>>,
    dtypes: Vec<Element<'a>>,
}

impl<'a> Machine<'a> {
    fn new(bytes: &'a [u8], at: usize) -> Self {
        Machine {
            bytes,
            at,
            opcode_at: at,
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
            tuples: vec![Vec::new()], // the empty one, of which there are many
            lists: Vec::new(),
            dicts: Vec::new(),
            storages: Vec::new(),
            tensors: Vec::new(),
            dtypes: Vec::new(),
        }
    }

    fn run(&mut self) -> Result<Value<'a>, PickleFault> {
        for _ in 0..OPCODES_MAX {
            self.opcode_at = self.at;
            match self.take(1)?[0] {
                b'.' => return self.pop(),
                opcode => self.one(opcode)?,
            }
        }
        Err(PickleFault::Long)
    }

    fn one(&mut self, opcode: u8) -> Result<(), PickleFault> {
        match opcode {
            // PROTO
            0x80 => match self.take(1)?[0] {
                0..=5 => {}
                other => return Err(PickleFault::Protocol(other)),
            },
            // FRAME: a hint for readers of streams
            0x95 => {
                self.take(8)?;
            }
            b'(' => self.marks.push(self.stack.len()),
            // POP, POP_MARK, DUP
            b'0' if self.stack.len() > self.floor() => {
                self.stack.pop();
            }
            b'0' | b'1' => {
                self.pop_to_mark()?;
            }
            b'2' => self.stack.push(self.top()?),
            // EXT1, EXT2, EXT4
            0x82..=0x84 => return Err(PickleFault::Extension),
            b'I'
            | b'L'
            | b'F'
            | b'S'
            | b'V'
            | b'J'
            | b'K'
            | b'M'
            | b'G'
            | b'N'
            | b'T'
            | b'U'
            | b'X'
            | b'B'
            | b'C'
            | 0x88..=0x8b
            | 0x8c..=0x8e
            | 0x96..=0x98 => self.plain(opcode)?,
            b'p' | b'q' | b'r' | b'g' | b'h' | b'j' | 0x94 => self.memorise(opcode)?,
            b'c' | b'i' | b'o' | b'P' | b'Q' | b'R' | b'b' | 0x81 | 0x92 | 0x93 => {
                self.object(opcode)?;
            }
            other => self.container(other)?,
        }
        Ok(())
    }

    /// Numbers, texts and bytes.
    fn plain(&mut self, opcode: u8) -> Result<(), PickleFault> {
        let value = match opcode {
            // INT, LONG, FLOAT: decimal, in a line
            b'I' => match self.line()? {
                "00" => Value::Bool(false),
                "01" => Value::Bool(true),
                digits => digits.trim().parse().map_or(Value::Other, Value::Int),
            },
            b'L' => {
                self.line()?.trim().trim_end_matches('L').parse().map_or(Value::Other, Value::Int)
            }
            b'F' => {
                self.line()?;
                Value::Other
            }
            // STRING, in quotes, and UNICODE; with escapes it is no name of a tensor
            b'S' => text(self.line()?.trim().trim_matches(['\'', '"'])),
            b'V' => match self.line_bytes()? {
                raw if raw.is_ascii() && !raw.contains(&b'\\') => {
                    Value::Text(std::str::from_utf8(raw).map_err(|_| PickleFault::Utf8)?)
                }
                raw => Value::Escaped(raw),
            },
            // BININT, BININT1, BININT2: little-endian, only the first is signed
            b'J' => Value::Int(i64::from(i32::from_le_bytes(self.word::<4>()?))),
            b'K' => Value::Int(i64::from(self.take(1)?[0])),
            b'M' => Value::Int(i64::from(u16::from_le_bytes(self.word::<2>()?))),
            // LONG1, LONG4: a length, then little-endian two's complement
            0x8a => long(self.counted::<1>()?),
            0x8b => long(self.counted::<4>()?),
            // BINFLOAT
            b'G' => {
                self.take(8)?;
                Value::Other
            }
            // NEWTRUE, NEWFALSE
            0x88 | 0x89 => Value::Bool(opcode == 0x88),
            // BINSTRING, SHORT_BINSTRING: Python 2's, for texts and bytes alike
            b'T' | b'U' => {
                let raw = if opcode == b'T' { self.counted::<4>()? } else { self.counted::<1>()? };
                std::str::from_utf8(raw).map_or(Value::Bytes(raw), Value::Text)
            }
            // SHORT_BINUNICODE, BINUNICODE, BINUNICODE8
            0x8c | b'X' | 0x8d => {
                let raw = match opcode {
                    0x8c => self.counted::<1>()?,
                    b'X' => self.counted::<4>()?,
                    _ => self.counted::<8>()?,
                };
                Value::Text(std::str::from_utf8(raw).map_err(|_| PickleFault::Utf8)?)
            }
            // SHORT_BINBYTES, BINBYTES, BINBYTES8, BYTEARRAY8
            b'C' => Value::Bytes(self.counted::<1>()?),
            b'B' => Value::Bytes(self.counted::<4>()?),
            0x8e | 0x96 => Value::Bytes(self.counted::<8>()?),
            // READONLY_BUFFER changes nothing
            0x98 => return self.top().map(|_| ()),
            // NONE; NEXT_BUFFER, whose bytes are not in the file
            _ => Value::Other,
        };
        self.stack.push(value);
        Ok(())
    }

    /// GET and PUT, by line, byte and word, and MEMOIZE.
    fn memorise(&mut self, opcode: u8) -> Result<(), PickleFault> {
        let slot = match opcode {
            b'p' | b'g' => self
                .line()?
                .trim()
                .parse()
                .map_err(|_| PickleFault::Expected { expected: "the number of a memo slot" })?,
            b'q' | b'h' => u64::from(self.take(1)?[0]),
            b'r' | b'j' => u64::from(u32::from_le_bytes(self.word::<4>()?)),
            _ => self.memo.len() as u64,
        };
        if matches!(opcode, b'g' | b'h' | b'j') {
            let value = *self.memo.get(&slot).ok_or(PickleFault::Memo(slot))?;
            self.stack.push(value);
        } else {
            let top = self.top()?;
            self.memo.insert(slot, top);
        }
        Ok(())
    }

    /// What names classes and functions, calls them, and fills objects.
    fn object(&mut self, opcode: u8) -> Result<(), PickleFault> {
        match opcode {
            // GLOBAL
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.stack.push(Value::Global(global(module, name)));
            }
            // STACK_GLOBAL
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let known = match (module, name) {
                    (Value::Text(module), Value::Text(name)) => global(module, name),
                    _ => return Err(PickleFault::Expected { expected: "a module and a name" }),
                };
                self.stack.push(Value::Global(known));
            }
            // PERSID, BINPERSID
            b'P' => {
                self.line()?;
                self.stack.push(Value::Other);
            }
            b'Q' => {
                let id = self.pop()?;
                let value = self.persistent(id)?;
                self.stack.push(value);
            }
            // INST, OBJ: a class, its arguments since the mark
            b'i' => {
                let known = global(self.line()?, self.line()?);
                let arguments = self.pop_to_mark()?;
                self.call(Value::Global(known), arguments)?;
            }
            b'o' => {
                let mut arguments = self.pop_to_mark()?;
                if arguments.is_empty() {
                    return Err(PickleFault::StackEmpty);
                }
                let class = arguments.remove(0);
                self.call(class, arguments)?;
            }
            // REDUCE, NEWOBJ, NEWOBJ_EX
            b'R' | 0x81 | 0x92 => {
                let _keywords = if opcode == 0x92 { Some(self.pop()?) } else { None };
                let (arguments, function) = (self.pop()?, self.pop()?);
                let arguments = match arguments {
                    Value::Tuple(tuple) => self.arguments(tuple),
                    _ => Vec::new(),
                };
                self.call(function, arguments)?;
            }
            // BUILD
            _ => {
                let state = self.pop()?;
                let object = self.top()?;
                self.build(object, state);
            }
        }
        Ok(())
    }

    /// Tuples, lists, dicts and sets.
    fn container(&mut self, opcode: u8) -> Result<(), PickleFault> {
        match opcode {
            // EMPTY_TUPLE, TUPLE1, TUPLE2, TUPLE3, TUPLE
            b')' => self.stack.push(Value::Tuple(0)),
            0x85..=0x87 => {
                let items = self.pop_n(usize::from(opcode - 0x84))?;
                self.push_tuple(items);
            }
            b't' => {
                let items = self.pop_to_mark()?;
                self.push_tuple(items);
            }
            // EMPTY_LIST, LIST, APPEND, APPENDS
            b']' => self.push_list(Vec::new()),
            b'l' => {
                let items = self.pop_to_mark()?;
                self.push_list(items);
            }
            b'a' => {
                let item = self.pop()?;
                self.append(vec![item])?;
            }
            b'e' => {
                let items = self.pop_to_mark()?;
                self.append(items)?;
            }
            // EMPTY_DICT, DICT, SETITEM, SETITEMS
            b'}' => self.push_dict(),
            b'd' => {
                let items = self.pop_to_mark()?;
                self.push_dict();
                self.set_items(&items)?;
            }
            b's' => {
                let items = self.pop_n(2)?;
                self.set_items(&items)?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.set_items(&items)?;
            }
            // EMPTY_SET, ADDITEMS, FROZENSET
            0x8f => self.stack.push(Value::Other),
            0x90 => {
                self.pop_to_mark()?;
                self.top()?;
            }
            0x91 => {
                self.pop_to_mark()?;
                self.stack.push(Value::Other);
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

    /// Bytes behind their number, which has `N` bytes itself.
    fn counted<const N: usize>(&mut self) -> Result<&'a [u8], PickleFault> {
        let mut word = [0; 8];
        word[..N].copy_from_slice(self.take(N)?);
        // A length beyond the address space is beyond the bytes as well.
        self.take(usize::try_from(u64::from_le_bytes(word)).unwrap_or(usize::MAX))
    }

    fn line(&mut self) -> Result<&'a str, PickleFault> {
        std::str::from_utf8(self.line_bytes()?).map_err(|_| PickleFault::Utf8)
    }

    fn line_bytes(&mut self) -> Result<&'a [u8], PickleFault> {
        let rest = &self.bytes[self.at..];
        let end = rest
            .iter()
            .position(|byte| *byte == b'\n')
            .ok_or(PickleFault::Truncated { need: rest.len() + 1, have: rest.len() })?;
        Ok(&self.take(end + 1)?[..end])
    }

    /// The lowest stack position that may be popped: what lies below an open mark stays.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn top(&self) -> Result<Value<'a>, PickleFault> {
        match self.stack.len() > self.floor() {
            true => self.stack.last().copied().ok_or(PickleFault::StackEmpty),
            false => Err(PickleFault::StackEmpty),
        }
    }

    fn pop(&mut self) -> Result<Value<'a>, PickleFault> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
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
        if items.is_empty() {
            self.stack.push(Value::Tuple(0));
            return;
        }
        self.tuples.push(items);
        self.stack.push(Value::Tuple(self.tuples.len() - 1));
    }

    fn push_list(&mut self, items: Vec<Value<'a>>) {
        self.lists.push(items);
        self.stack.push(Value::List(self.lists.len() - 1));
    }

    fn push_dict(&mut self) {
        self.dicts.push(Dict::default());
        self.stack.push(Value::Dict(self.dicts.len() - 1));
    }

    fn append(&mut self, items: Vec<Value<'a>>) -> Result<(), PickleFault> {
        if let Value::List(list) = self.top()? {
            self.lists[list].extend(items);
        }
        Ok(())
    }

    fn set_items(&mut self, items: &[Value<'a>]) -> Result<(), PickleFault> {
        if !items.len().is_multiple_of(2) {
            return Err(PickleFault::Expected { expected: "as many values as keys" });
        }
        if let Value::Dict(dict) | Value::Object(dict) = self.top()? {
            let pairs = items.chunks_exact(2).map(|pair| (pair[0], pair[1]));
            self.dicts[dict].items.extend(pairs);
        }
        Ok(())
    }

    /// The items of a tuple that are looked at: no function that is known takes more, and a tuple
    /// can be handed over again and again.
    fn arguments(&self, tuple: usize) -> Vec<Value<'a>> {
        self.tuples[tuple].iter().take(16).copied().collect()
    }

    /// `("storage", type, key, location, elements)`, before torch 1.6 with a view or None behind.
    fn persistent(&mut self, id: Value<'a>) -> Result<Value<'a>, PickleFault> {
        let Value::Tuple(tuple) = id else { return Ok(Value::Other) };
        let [Value::Text("storage"), class, Value::Text(key), _, Value::Int(len), ref view @ ..] =
            self.tuples[tuple][..]
        else {
            return Ok(Value::Other); // what another program persists
        };
        let element = match class {
            Value::Global(Global::Storage(element)) => element,
            _ => Element { dtype: None, name: "an unknown storage" },
        };
        let start = match view {
            [Value::Tuple(view)] => match self.tuples[*view][..] {
                [Value::Text(_), Value::Int(start), Value::Int(_)] => start,
                _ => {
                    return Err(PickleFault::Expected {
                        expected: "key, offset and size of a view",
                    });
                }
            },
            _ => 0,
        };
        if len < 0 || start < 0 {
            return Err(PickleFault::Expected { expected: "a storage of 0 elements or more" });
        }
        self.storages.push(Storage { element, key, len, start });
        Ok(Value::Storage(self.storages.len() - 1))
    }

    /// Pushes what a call would return, as far as it is known without calling.
    fn call(&mut self, function: Value<'a>, arguments: Vec<Value<'a>>) -> Result<(), PickleFault> {
        let Value::Global(known) = function else { return self.push_object(&arguments) };
        let value = match (known, arguments.as_slice()) {
            (Global::OrderedDict, []) => {
                self.push_dict();
                return Ok(());
            }
            // Python 2 hands over all pairs at once.
            (Global::OrderedDict, [Value::List(pairs)]) => return self.push_pairs(*pairs),
            (Global::RebuildTensor, [Value::Storage(storage), rest @ ..]) => {
                self.rebuild(*storage, rest)?
            }
            (Global::RebuildParameter, [tensor @ Value::Tensor(_), ..]) => *tensor,
            (Global::RebuildFromType, [function, _, Value::Tuple(inner), ..]) => {
                let inner = self.arguments(*inner);
                return match function {
                    Value::Global(Global::RebuildTensor | Global::RebuildParameter) => {
                        self.call(*function, inner)
                    }
                    _ => self.push_object(&inner),
                };
            }
            (Global::NumpyReconstruct, _) => self.push_tensor(Tensor {
                element: Element { dtype: None, name: "an array without a state" },
                elements: Elements::None,
                offset: 0,
                size: Vec::new(),
                stride: Vec::new(),
            }),
            (Global::NumpyFromBuffer, [data, Value::NumpyDtype(dtype), shape, order, ..]) => {
                let fortran = matches!(order, Value::Text("F"));
                match self.array(*data, *dtype, *shape, fortran)? {
                    Some(tensor) => self.push_tensor(tensor),
                    None => Value::Other,
                }
            }
            (Global::NumpyDtype, [Value::Text(code), ..]) => {
                self.dtypes.push(numpy(code));
                Value::NumpyDtype(self.dtypes.len() - 1)
            }
            (Global::CodecsEncode, [Value::Text(text), Value::Text("latin1" | "latin-1")]) => {
                Value::Latin1(text)
            }
            (
                Global::CodecsEncode,
                [text @ Value::Escaped(_), Value::Text("latin1" | "latin-1")],
            ) => *text,
            _ => return self.push_object(&arguments),
        };
        self.stack.push(value);
        Ok(())
    }

    /// An object that stays opaque. A dict among its arguments may be what it holds.
    fn push_object(&mut self, arguments: &[Value<'a>]) -> Result<(), PickleFault> {
        let attributes = arguments.iter().find_map(|argument| match argument {
            Value::Dict(dict) => Some(*dict),
            _ => None,
        });
        self.dicts.push(Dict { items: Vec::new(), attributes });
        self.stack.push(Value::Object(self.dicts.len() - 1));
        Ok(())
    }

    /// A dict of the pairs in a list. They are moved: a list handed over twice makes no second copy.
    fn push_pairs(&mut self, list: usize) -> Result<(), PickleFault> {
        let pairs = std::mem::take(&mut self.lists[list]);
        let pair = |value: &Value<'a>| {
            let items = match value {
                Value::List(list) => &self.lists[*list],
                Value::Tuple(tuple) => &self.tuples[*tuple],
                _ => return None,
            };
            <[Value<'a>; 2]>::try_from(items.as_slice()).ok().map(|[key, value]| (key, value))
        };
        let items = pairs.iter().map(pair).collect::<Option<Vec<_>>>();
        let items =
            items.ok_or(PickleFault::Expected { expected: "pairs of a key and a value" })?;
        self.dicts.push(Dict { items, attributes: None });
        self.stack.push(Value::Dict(self.dicts.len() - 1));
        Ok(())
    }

    fn push_tensor(&mut self, tensor: Tensor<'a>) -> Value<'a> {
        self.tensors.push(tensor);
        Value::Tensor(self.tensors.len() - 1)
    }

    /// `(storage, offset, size, stride, …)`.
    fn rebuild(&mut self, storage: usize, rest: &[Value<'a>]) -> Result<Value<'a>, PickleFault> {
        let [Value::Int(offset), Value::Tuple(size), Value::Tuple(stride), ..] = *rest else {
            let expected = "offset, size and stride of a tensor";
            return Err(PickleFault::Expected { expected });
        };
        let Storage { element, key, len, start } = self.storages[storage];
        let offset = offset
            .checked_add(start)
            .ok_or(PickleFault::Expected { expected: "an offset within the storage" })?;
        let (size, stride) = (self.integers(size)?, self.integers(stride)?);
        let elements = Elements::Storage(key, len);
        Ok(self.push_tensor(Tensor { element, elements, offset, size, stride }))
    }

    fn integers(&self, tuple: usize) -> Result<Vec<i64>, PickleFault> {
        let items = &self.tuples[tuple];
        if items.len() > RANK_MAX {
            return Err(PickleFault::Expected { expected: "at most 16 dimensions" });
        }
        let integer = |item: &Value<'_>| match item {
            Value::Int(number) => Ok(*number),
            _ => Err(PickleFault::Expected { expected: "integers as sizes and strides" }),
        };
        items.iter().map(integer).collect()
    }

    /// Gives an object its attributes, a NumPy array its elements, a NumPy type its byte order.
    fn build(&mut self, object: Value<'a>, state: Value<'a>) {
        match (object, state) {
            (Value::Object(object), Value::Dict(attributes)) => {
                self.dicts[object].attributes = Some(attributes);
            }
            // Attributes, and those in slots.
            (Value::Object(object), Value::Tuple(both)) => {
                let dict = self.tuples[both].iter().take(2).find_map(|value| match value {
                    Value::Dict(dict) => Some(*dict),
                    _ => None,
                });
                self.dicts[object].attributes = dict.or(self.dicts[object].attributes);
            }
            (Value::NumpyDtype(dtype), Value::Tuple(state)) => {
                let big = matches!(self.tuples[state].get(1), Some(Value::Text(">")));
                let element = &mut self.dtypes[dtype];
                if big && element.dtype.is_some_and(|dtype| dtype.bytes() > 1) {
                    *element = Element { dtype: None, name: "big-endian numbers" };
                }
            }
            (Value::Tensor(tensor), Value::Tuple(state)) => {
                let is_array = matches!(self.tensors[tensor].elements, Elements::None);
                let [Value::Int(_), shape, Value::NumpyDtype(dtype), Value::Bool(fortran), data] =
                    self.tuples[state][..]
                else {
                    return;
                };
                if let (true, Ok(Some(array))) = (is_array, self.array(data, dtype, shape, fortran))
                {
                    self.tensors[tensor] = array;
                }
            }
            _ => {}
        }
    }

    /// A NumPy array, unless its elements are objects.
    fn array(
        &self,
        data: Value<'a>,
        dtype: usize,
        shape: Value<'a>,
        fortran: bool,
    ) -> Result<Option<Tensor<'a>>, PickleFault> {
        let Value::Tuple(shape) = shape else { return Ok(None) };
        let elements = match data {
            Value::Bytes(raw) => Elements::Bytes(raw),
            Value::Text(text) => Elements::Bytes(text.as_bytes()),
            Value::Latin1(text) => Elements::Latin1(text),
            Value::Escaped(raw) => Elements::Escaped(raw),
            _ => return Ok(None),
        };
        let size = self.integers(shape)?;
        let mut stride = vec![1; size.len()];
        let mut step = 1_i64;
        let axes: Vec<usize> =
            if fortran { (0..size.len()).collect() } else { (0..size.len()).rev().collect() };
        for axis in axes {
            stride[axis] = step;
            step = step.saturating_mul(size[axis].max(1)); // beyond any window: refused there
        }
        Ok(Some(Tensor { element: self.dtypes[dtype], elements, offset: 0, size, stride }))
    }

    /// Calls `each` for what a container holds, until it says no.
    fn children(&self, value: Value<'a>, each: &mut dyn FnMut(Key<'a>, Value<'a>) -> bool) {
        match value {
            Value::Dict(dict) | Value::Object(dict) => {
                let attributes = match value {
                    Value::Object(_) => self.dicts[dict].attributes,
                    _ => None,
                };
                let attributes = attributes.map_or(&[][..], |dict| &self.dicts[dict].items);
                for (key, value) in attributes.iter().chain(&self.dicts[dict].items) {
                    let key = match key {
                        Value::Text(text) => Key::Text(text),
                        Value::Int(number) => Key::Number(*number),
                        _ => Key::Other,
                    };
                    if !each(key, *value) {
                        return;
                    }
                }
            }
            Value::List(list) => numbered(&self.lists[list], each),
            Value::Tuple(tuple) => numbered(&self.tuples[tuple], each),
            _ => {}
        }
    }

    /// A tensor with offsets in place of references; `None` for an array that was never filled.
    fn reference(&self, tensor: usize) -> Option<TensorRef> {
        let Tensor { element, elements, offset, size, stride } = self.tensors[tensor].clone();
        let range = |part: &[u8]| {
            let start = part.as_ptr() as usize - self.bytes.as_ptr() as usize;
            start..start + part.len()
        };
        let data = match elements {
            Elements::Storage(key, len) => Data::Storage { key: key.to_string(), len },
            Elements::Bytes(raw) => Data::Inline(range(raw)),
            Elements::Latin1(text) => Data::Latin1(range(text.as_bytes())),
            Elements::Escaped(raw) => Data::Escaped(range(raw)),
            Elements::None => return None,
        };
        let dtype_name = element.name.to_string();
        Some(TensorRef { dtype: element.dtype, dtype_name, data, offset, size, stride })
    }
}

fn numbered<'a>(items: &[Value<'a>], each: &mut dyn FnMut(Key<'a>, Value<'a>) -> bool) {
    for (number, item) in items.iter().enumerate() {
        if !each(Key::Number(number as i64), *item) {
            return;
        }
    }
}

/// Text of a line, which escapes make opaque.
fn text(line: &str) -> Value<'_> {
    if line.contains('\\') { Value::Other } else { Value::Text(line) }
}

/// What weights need of what a pickle names; the rest is opaque.
fn global<'a>(module: &'a str, name: &'a str) -> Global<'a> {
    match (module, name) {
        ("collections", "OrderedDict") => Global::OrderedDict,
        ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2" | "_rebuild_tensor_v3") => {
            Global::RebuildTensor
        }
        ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => {
            Global::RebuildParameter
        }
        ("torch._tensor", "_rebuild_from_type_v2") => Global::RebuildFromType,
        ("torch" | "torch.cuda" | "torch.storage", storage) if storage.ends_with("Storage") => {
            Global::Storage(Element { dtype: storage_of(storage), name: storage })
        }
        ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct") => {
            Global::NumpyReconstruct
        }
        ("numpy.core.numeric" | "numpy._core.numeric", "_frombuffer") => Global::NumpyFromBuffer,
        ("numpy", "dtype") => Global::NumpyDtype,
        ("_codecs", "encode") => Global::CodecsEncode,
        _ => Global::Unknown,
    }
}

fn storage_of(name: &str) -> Option<Dtype> {
    Some(match name {
        "DoubleStorage" => Dtype::F64,
        "FloatStorage" => Dtype::F32,
        "HalfStorage" => Dtype::F16,
        "BFloat16Storage" => Dtype::BF16,
        "LongStorage" => Dtype::I64,
        "IntStorage" => Dtype::I32,
        "ShortStorage" => Dtype::I16,
        "CharStorage" => Dtype::I8,
        "ByteStorage" => Dtype::U8,
        "BoolStorage" => Dtype::Bool,
        _ => return None,
    })
}

fn numpy(code: &str) -> Element<'_> {
    let dtype = match code {
        "f8" => Some(Dtype::F64),
        "f4" => Some(Dtype::F32),
        "f2" => Some(Dtype::F16),
        "i8" => Some(Dtype::I64),
        "i4" => Some(Dtype::I32),
        "i2" => Some(Dtype::I16),
        "i1" => Some(Dtype::I8),
        "u1" => Some(Dtype::U8),
        "b1" => Some(Dtype::Bool),
        _ => None,
    };
    Element { dtype, name: code }
}

/// Little-endian two's complement of any length.
fn long(raw: &[u8]) -> Value<'_> {
    if raw.len() > 8 {
        return Value::Long(raw);
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

    fn tensors(bytes: &[u8]) -> Result<BTreeMap<String, TensorRef>, PickleError> {
        let pickle = Pickle::load(bytes, 0)?;
        pickle.tensors().map_err(|fault| pickle.error(fault))
    }

    /// `collections.OrderedDict()`-like calls of other names, each a way to say "run this".
    const CALL: &[u8] = b"cos\nsystem\nX\x02\0\0\0ls\x85R";

    /// A tensor of 2 x 3 f32 in storage `0`, as torch writes one.
    fn tensor() -> Vec<u8> {
        let mut bytes = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\n".to_vec();
        bytes.extend(
            b"FloatStorage\nX\x01\0\0\0\x30X\x03\0\0\0cpuK\x06tQK\0K\x02K\x03\x86K\x03K\x01",
        );
        bytes.extend(b"\x86\x89ccollections\nOrderedDict\n)RtR");
        bytes
    }

    fn key(name: &str) -> Vec<u8> {
        let mut bytes = vec![b'X'];
        bytes.extend((name.len() as u32).to_le_bytes());
        bytes.extend(name.as_bytes());
        bytes
    }

    #[test]
    fn longs_are_twos_complement() {
        for (raw, number) in
            [(&[][..], 0), (&[0xff], -1), (&[0x80, 0], 128), (&[0, 0, 0, 0, 0, 1], 1 << 40)]
        {
            assert!(matches!(long(raw), Value::Int(n) if n == number), "{raw:?}");
        }
        assert!(matches!(long(&[1; 9]), Value::Long([1, ..])));
    }

    /// Every way to name a class or a function and to call it leaves the tensors beside it.
    #[test]
    fn code_is_opaque_and_its_neighbours_are_read() {
        let ways: [&[u8]; 12] = [
            CALL,
            b"cdatetime\ndatetime\nC\x01a\x85R", // REDUCE
            b"cargparse\nNamespace\n)\x81}X\x01\0\0\0aK\x01sb", // NEWOBJ, BUILD
            b"cargparse\nNamespace\n)}\x92",     // NEWOBJ_EX
            b"\x8c\x02os\x8c\x06system\x93\x8c\x02ls\x85R", // STACK_GLOBAL
            b"(ios\nsystem\n",                   // INST
            b"(cos\nsystem\nX\x02\0\0\0lso",     // OBJ
            b"\x8f(K\x01K\x02\x90",              // a set
            b"(K\x01\x91",                       // a frozenset
            b"cos\nfoo\n)R(K\x01K\x02u",         // items of an opaque object
            b"cos\nfoo\n)R(K\x01K\x02e",         // and more of them
            b"\x97\x98",                         // bytes that are elsewhere
        ];
        for way in ways {
            let mut bytes = b"\x80\x05}(".to_vec();
            bytes.extend([key("args"), way.to_vec(), key("a.weight"), tensor()].concat());
            bytes.extend(b"u.");
            let found = tensors(&bytes).unwrap_or_else(|error| panic!("{way:?}: {error}"));
            assert_eq!(
                found.keys().map(String::as_str).collect::<Vec<_>>(),
                ["a.weight"],
                "{way:?}"
            );
            let tensor = &found["a.weight"];
            assert_eq!(
                (tensor.size.as_slice(), tensor.stride.as_slice()),
                (&[2, 3][..], &[3, 1][..])
            );
            assert_eq!(tensor.data, Data::Storage { key: "0".into(), len: 6 });
            assert_eq!(tensor.dtype, Some(Dtype::F32));
        }
        let error = tensors(b"\x80\x02\x82\x01.").unwrap_err();
        assert!(matches!(error.fault, PickleFault::Extension), "{error}");
        assert_eq!(error.offset, 2);
    }

    /// Items and attributes of opaque objects are looked into: dicts of other classes, modules,
    /// Python 2's dicts in order, lists.
    #[test]
    fn tensors_are_found_where_they_are_kept() {
        let weight = [key("weight"), tensor()].concat();
        let wrapped = |before: &[u8], after: &[u8]| [before, &weight, after].concat();
        let module = [
            b"cnet\nNet\n)\x81}(".as_slice(),
            &key("_parameters"),
            &wrapped(b"}(", b"u"),
            &key("_modules"),
            &[b"}(".as_slice(), &key("conv"), &wrapped(b"cnet\nConv\n)\x81}", b"sb"), b"u"]
                .concat(),
            b"ub",
        ];
        for (bytes, names) in [
            (wrapped(b"cmy\nDict\n)R(", b"u"), &["weight"][..]),
            (wrapped(b"cmy\nDict\n)\x81(", b"u"), &["weight"]),
            (wrapped(b"cmy\nNamespace\n)\x81}(", b"ub"), &["weight"]),
            (wrapped(b"cmy\nFrozen\n}(", b"u\x85R"), &["weight"]),
            (wrapped(b"ccollections\nOrderedDict\n](]", b"ea\x85R"), &[]),
            (wrapped(b"ccollections\nOrderedDict\n](](", b"ee\x85R"), &["weight"]),
            (wrapped(b"](}(", b"ue"), &["0.weight"]),
            (module.concat(), &["conv.weight", "weight"]),
        ] {
            let pickle = [b"\x80\x02".as_slice(), &bytes, b"."].concat();
            match tensors(&pickle) {
                Ok(found) => {
                    assert_eq!(found.keys().map(String::as_str).collect::<Vec<_>>(), names);
                }
                Err(error) => assert!(names.is_empty(), "{error}: {names:?}"),
            }
        }
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

    /// Forty dicts, each of which holds the next one twice: a million million paths in 600 bytes.
    #[test]
    fn a_bomb_of_references_is_refused() {
        let mut bytes = b"\x80\x02}q\0".to_vec();
        for depth in 1..40 {
            bytes.extend(b"}(");
            bytes.extend(
                [key("a"), vec![b'h', depth - 1], key("b"), vec![b'h', depth - 1]].concat(),
            );
            bytes.extend([b'u', b'q', depth]);
        }
        bytes.push(b'.');
        let error = tensors(&bytes).unwrap_err();
        assert!(matches!(error.fault, PickleFault::Tangled), "{error}");
        // A long list that a million dicts refer to.
        let mut bytes = b"\x80\x02](".to_vec();
        bytes.extend(std::iter::repeat_n(b'N', 100_000));
        bytes.extend(b"eq\0](");
        bytes.extend(b"h\0".repeat(100_000));
        bytes.extend(b"e.");
        let error = tensors(&bytes).unwrap_err();
        assert!(matches!(error.fault, PickleFault::Tangled), "{error}");
    }

    #[test]
    fn counts_beyond_the_bytes_are_truncation() {
        for bytes in [
            &b"X\xff\xff\xff\xff"[..],
            b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff",
            b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
            b"\x96\0\0\0\0\0\0\0\x80",
            b"\x8b\xff\xff\xff\xff",
            b"T\xff\xff\xff\xff",
            b"\x95\0",
            b"cos\nsys",
        ] {
            let error = tensors(bytes).unwrap_err();
            assert!(matches!(error.fault, PickleFault::Truncated { .. }), "{bytes:?}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_end_in_a_value_or_an_error(
            bytes in prop::collection::vec(
                prop::sample::select(
                    &b"\x80\x02(}])t\x85\x86\x87N\x88JKMGXhjqrcQRbaesu.\0\x01ab\n012dlioPpg\x81\x8c\x8f\x90\x91\x92\x93\x94\x95\x97\x98BCUTISVLF"[..],
                ),
                0..200,
            )
        ) {
            // Either outcome is right: the property is that there is one.
            let _ = tensors(&bytes);
        }

        #[test]
        fn a_real_pickle_with_bytes_changed_ends(
            flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        ) {
            let mut bytes = [b"\x80\x02}(".to_vec(), key("a"), tensor(), key("b"), CALL.to_vec()].concat();
            bytes.extend(b"u.");
            for (place, byte) in flips {
                let place = place.index(bytes.len());
                bytes[place] = byte;
            }
            let _ = tensors(&bytes);
        }
    }
}
