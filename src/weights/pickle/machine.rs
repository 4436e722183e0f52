//! The machine that follows a pickle's opcodes: a stack, marks and a memo.

use std::collections::HashMap;

use super::PickleFault;
use super::value::{Dict, Element, Storage, Tensor, Value, global, long, text};

/// Opcodes of a pickle: ten times those of a checkpoint that lists a million file names. One makes
/// at most some 100 bytes here.
pub(super) const OPCODES_MAX: usize = 1 << 24;

#[derive(Debug)]
pub(super) struct Machine<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) at: usize,
    pub(super) opcode_at: usize,
    pub(super) stack: Vec<Value<'a>>,
    marks: Vec<usize>,
    pub(super) memo: HashMap<u64, Value<'a>>,
    pub(super) tuples: Vec<Vec<Value<'a>>>,
    pub(super) lists: Vec<Vec<Value<'a>>>,
    pub(super) dicts: Vec<Dict<'a>>,
    pub(super) storages: Vec<Storage<'a>>,
    pub(super) tensors: Vec<Tensor<'a>>,
    pub(super) dtypes: Vec<Element<'a>>,
}

impl<'a> Machine<'a> {
    pub(super) fn new(bytes: &'a [u8], at: usize) -> Self {
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

    pub(super) fn run(&mut self) -> Result<Value<'a>, PickleFault> {
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

    pub(super) fn take(&mut self, need: usize) -> Result<&'a [u8], PickleFault> {
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

    pub(super) fn pop(&mut self) -> Result<Value<'a>, PickleFault> {
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

    pub(super) fn push_dict(&mut self) {
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
}
