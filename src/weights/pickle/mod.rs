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

use std::collections::BTreeMap;
use std::ops::Range;

use thiserror::Error;

use self::machine::{Machine, OPCODES_MAX};
use self::value::{Element, Value};
use super::Dtype;

mod machine;
mod objects;
mod value;

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

#[cfg(test)]
mod tests {
    use super::value::long;
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
