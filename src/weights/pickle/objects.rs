//! Objects of a pickle: what the calls that weights are saved with would have built.

use super::machine::Machine;
use super::value::{Dict, Element, Elements, Global, Storage, Tensor, Value, numpy};
use super::{Data, Key, PickleFault, TensorRef};

/// Dimensions of a tensor: far more than any layer has, few enough to be copied with each reference.
const RANK_MAX: usize = 16;

impl<'a> Machine<'a> {
    /// The items of a tuple that are looked at: no function that is known takes more, and a tuple
    /// can be handed over again and again.
    pub(super) fn arguments(&self, tuple: usize) -> Vec<Value<'a>> {
        self.tuples[tuple].iter().take(16).copied().collect()
    }

    /// `("storage", type, key, location, elements)`, before torch 1.6 with a view or None behind.
    pub(super) fn persistent(&mut self, id: Value<'a>) -> Result<Value<'a>, PickleFault> {
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
    pub(super) fn call(
        &mut self,
        function: Value<'a>,
        arguments: Vec<Value<'a>>,
    ) -> Result<(), PickleFault> {
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
    pub(super) fn build(&mut self, object: Value<'a>, state: Value<'a>) {
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
    pub(super) fn children(
        &self,
        value: Value<'a>,
        each: &mut dyn FnMut(Key<'a>, Value<'a>) -> bool,
    ) {
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
    pub(super) fn reference(&self, tensor: usize) -> Option<TensorRef> {
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
