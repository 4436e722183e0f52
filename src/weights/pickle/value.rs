//! Values of a pickle: what stands on the stack, and the classes and element types that weights need.

use crate::weights::Dtype;

/// An element type by the name that a file has for it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Element<'a> {
    pub(super) dtype: Option<Dtype>,
    pub(super) name: &'a str,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Global<'a> {
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
pub(super) enum Value<'a> {
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
pub(super) struct Dict<'a> {
    pub(super) items: Vec<(Value<'a>, Value<'a>)>,
    /// Of an object: the dict of its attributes.
    pub(super) attributes: Option<usize>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Storage<'a> {
    pub(super) element: Element<'a>,
    pub(super) key: &'a str,
    pub(super) len: i64,
    /// Where it begins in the storage of that key: torch before 0.4 wrote views of storages.
    pub(super) start: i64,
}

#[derive(Clone, Debug)]
pub(super) struct Tensor<'a> {
    pub(super) element: Element<'a>,
    pub(super) elements: Elements<'a>,
    pub(super) offset: i64,
    pub(super) size: Vec<i64>,
    pub(super) stride: Vec<i64>,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Elements<'a> {
    Storage(&'a str, i64),
    Bytes(&'a [u8]),
    Latin1(&'a str),
    Escaped(&'a [u8]),
    /// A NumPy array whose state has not come.
    None,
}

/// Text of a line, which escapes make opaque.
pub(super) fn text(line: &str) -> Value<'_> {
    if line.contains('\\') { Value::Other } else { Value::Text(line) }
}

/// What weights need of what a pickle names; the rest is opaque.
pub(super) fn global<'a>(module: &'a str, name: &'a str) -> Global<'a> {
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

pub(super) fn numpy(code: &str) -> Element<'_> {
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
pub(super) fn long(raw: &[u8]) -> Value<'_> {
    if raw.len() > 8 {
        return Value::Long(raw);
    }
    let sign = if raw.last().is_some_and(|byte| byte & 0x80 != 0) { 0xff } else { 0 };
    let mut word = [sign; 8];
    word[..raw.len()].copy_from_slice(raw);
    Value::Int(i64::from_le_bytes(word))
}
