//! Python values as JSON.

use gad_fast_core::Error;
use pyo3::exceptions::{PyRecursionError, PyTypeError, PyUnicodeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBool, PyDict, PyFloat, PyInt, PyList, PyString, PyTuple};
use serde_json::{Map, Number, Value};

use crate::errors::to_python;

/// What is nested deeper is left to Python's encoder, and to the limit of the reader behind it.
const MAX_DEPTH: usize = 64;

/// `value` as JSON, as Python's `json` would have it; `field` is what an error calls it.
pub(crate) fn to_json(field: &'static str, value: &Bound<'_, PyAny>) -> PyResult<Value> {
    match walk(value, MAX_DEPTH)? {
        Some(json) => Ok(json),
        None => encode(field, value),
    }
}

/// A value of exact built-in types; None for everything else, which is rare.
fn walk(value: &Bound<'_, PyAny>, depth: usize) -> PyResult<Option<Value>> {
    if depth == 0 {
        return Ok(None);
    }
    if let Ok(text) = value.cast_exact::<PyString>() {
        return Ok(Some(Value::String(text.to_cow()?.into_owned())));
    }
    if let Ok(dict) = value.cast_exact::<PyDict>() {
        return walk_dict(dict, depth);
    }
    if let Ok(list) = value.cast_exact::<PyList>() {
        return walk_items(list.iter(), depth);
    }
    if let Ok(tuple) = value.cast_exact::<PyTuple>() {
        return walk_items(tuple.iter(), depth);
    }
    Ok(walk_scalar(value))
}

fn walk_scalar(value: &Bound<'_, PyAny>) -> Option<Value> {
    if value.is_none() {
        Some(Value::Null)
    } else if value.is_exact_instance_of::<PyBool>() {
        value.extract().ok().map(Value::Bool)
    } else if let Ok(float) = value.cast_exact::<PyFloat>() {
        Number::from_f64(float.value()).map(Value::Number)
    } else if value.is_exact_instance_of::<PyInt>() {
        value.extract::<i64>().ok().map(Value::from)
    } else {
        None
    }
}

fn walk_dict(dict: &Bound<'_, PyDict>, depth: usize) -> PyResult<Option<Value>> {
    let mut map = Map::new();
    // Nothing below runs Python, which might change the dict meanwhile.
    for (name, value) in dict.iter() {
        let (Ok(name), Some(json)) = (name.cast_exact::<PyString>(), walk(&value, depth - 1)?)
        else {
            return Ok(None);
        };
        map.insert(name.to_cow()?.into_owned(), json);
    }
    Ok(Some(Value::Object(map)))
}

fn walk_items<'py>(
    items: impl Iterator<Item = Bound<'py, PyAny>>,
    depth: usize,
) -> PyResult<Option<Value>> {
    items
        .map(|item| walk(&item, depth - 1))
        .collect::<PyResult<Option<Vec<_>>>>()
        .map(|items| items.map(Value::Array))
}

fn encode(field: &'static str, value: &Bound<'_, PyAny>) -> PyResult<Value> {
    let py = value.py();
    let text = encoder(py)?
        .call1((value,))
        .map_err(|error| no_json(py, field, error))?;
    let text: PyBackedStr = text.extract()?;
    serde_json::from_str(&text).map_err(|source| {
        to_python(Error::CacheRequestInvalid {
            field,
            reason: format!("it is no JSON: {source}"),
        })
    })
}

/// Python's encoder, without NaN: it is no JSON, and no two of them are equal.
fn encoder(py: Python<'_>) -> PyResult<&Bound<'_, PyAny>> {
    static ENCODE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let encode = ENCODE.get_or_try_init(py, || {
        let options = PyDict::new(py);
        options.set_item("ensure_ascii", false)?;
        options.set_item("allow_nan", false)?;
        let class = py.import("json")?.getattr("JSONEncoder")?;
        PyResult::Ok(class.call((), Some(&options))?.getattr("encode")?.unbind())
    })?;
    Ok(encode.bind(py))
}

fn no_json(py: Python<'_>, field: &'static str, error: PyErr) -> PyErr {
    let is_of_value = error.is_instance_of::<PyTypeError>(py)
        || error.is_instance_of::<PyRecursionError>(py)
        || error.is_instance_of::<PyValueError>(py) && !error.is_instance_of::<PyUnicodeError>(py);
    if !is_of_value {
        return error;
    }
    to_python(Error::CacheRequestInvalid {
        field,
        reason: format!(
            "it must be JSON: {} (pass lists, dicts, texts and finite numbers)",
            error.value(py)
        ),
    })
}
