//! Arrays on their way in and out.

use numpy::{Element, PyArray1, PyReadonlyArray1, PyUntypedArrayMethods};
use numpy::{IntoPyArray, ndarray::ArrayView1};
use pyo3::PyClass;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use gad_fast_core::rollout::Bins;

/// Indices of all bins, and where each bin starts and the last one ends.
pub(crate) type BinArrays<'py> = (Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<i64>>);

/// What an array holds.
///
/// Copied, because another thread may write to the array once the interpreter is released.
pub(crate) fn copied<T: Element + Copy>(
    name: &str,
    array: &PyReadonlyArray1<'_, T>,
) -> PyResult<Vec<T>> {
    if let Ok(values) = array.as_slice() {
        return Ok(values.to_vec());
    }
    if !array.is_aligned() {
        return Err(PyValueError::new_err(format!(
            "{name} must lie at an aligned address (copy it first)"
        )));
    }
    Ok(array.as_array().to_vec())
}

/// The error for what is no array of one dimension with one of these types.
pub(crate) fn not_an_array(name: &str, dtypes: &str, value: &Bound<'_, PyAny>) -> PyErr {
    let described = |name: &str| value.getattr(name).map(|it| format!(", {name} {it}"));
    PyTypeError::new_err(format!(
        "{name} must be a numpy array of one dimension, {dtypes}, got {}{}{}",
        value.get_type(),
        described("shape").unwrap_or_default(),
        described("dtype").unwrap_or_default(),
    ))
}

/// The read-only array of a column that `owner` holds, without a copy.
///
/// The array keeps `owner` alive. numpy refuses to make it writable again, since an object that offers
/// no writable memory is behind it.
pub(crate) fn view<'py, C, T>(
    owner: &Bound<'py, C>,
    column: impl FnOnce(&C) -> &[T],
) -> PyResult<Bound<'py, PyArray1<T>>>
where
    C: PyClass<Frozen = pyo3::pyclass::boolean_struct::True> + Sync,
    T: Element,
{
    let values = ArrayView1::from(column(owner.get()));
    #[expect(
        unsafe_code,
        reason = "the column is borrowed from the frozen owner, which the array keeps alive"
    )]
    // SAFETY: `owner` is frozen, so nothing moves what its columns point to until it is dropped; and it
    // is the base of the array, so that is not before the array is dropped.
    let array = unsafe { PyArray1::borrow_from_array(&values, owner.clone().into_any()) };
    array.call_method1("setflags", (false,))?;
    Ok(array)
}

/// Hands over bins as two arrays.
pub(crate) fn to_arrays(py: Python<'_>, bins: Bins) -> BinArrays<'_> {
    (bins.indices.into_pyarray(py), bins.offsets.into_pyarray(py))
}
