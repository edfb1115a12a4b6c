//! The functions that pack and balance.

use gad_fast_core::rollout::{self, Bins, CostModel, GroupLayout, GroupLengths, PackingLimits};
use numpy::{IntoPyArray, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1};
use pyo3::prelude::*;

use crate::arrays::{BinArrays, copied, not_an_array, to_arrays};
use crate::errors::to_python;

/// Position ids, segment ids and `cu_seqlens`, as numpy arrays.
type LayoutArrays<'py> = (
    Bound<'py, PyArray1<i32>>,
    Bound<'py, PyArray1<i32>>,
    Bound<'py, PyArray1<i32>>,
);

#[pyfunction]
#[pyo3(signature = (lengths, *, token_budget, max_sequences = None, pad_to_multiple = 1))]
pub(crate) fn pack_sequences<'py>(
    py: Python<'py>,
    lengths: PyReadonlyArray1<'py, i64>,
    token_budget: i64,
    max_sequences: Option<i64>,
    pad_to_multiple: i64,
) -> PyResult<BinArrays<'py>> {
    let limits = PackingLimits {
        token_budget,
        max_sequences,
        pad_to_multiple,
    };
    let lengths = copied("lengths", &lengths)?;
    let bins = py
        .detach(|| rollout::pack_sequences(&lengths, &limits))
        .map_err(to_python)?;
    Ok(to_arrays(py, bins))
}

#[pyfunction]
#[pyo3(signature = (prompt_lengths, response_lengths, group_offsets, teacher_lengths, *, token_budget))]
pub(crate) fn pack_groups<'py>(
    py: Python<'py>,
    prompt_lengths: PyReadonlyArray1<'py, i64>,
    response_lengths: PyReadonlyArray1<'py, i64>,
    group_offsets: PyReadonlyArray1<'py, i64>,
    teacher_lengths: PyReadonlyArray1<'py, i64>,
    token_budget: i64,
) -> PyResult<BinArrays<'py>> {
    let prompts = copied("prompt_lengths", &prompt_lengths)?;
    let responses = copied("response_lengths", &response_lengths)?;
    let offsets = copied("group_offsets", &group_offsets)?;
    let teachers = copied("teacher_lengths", &teacher_lengths)?;
    let bins = py
        .detach(|| GroupLengths::new(&prompts, &responses, &offsets, &teachers)?.pack(token_budget))
        .map_err(to_python)?;
    Ok(to_arrays(py, bins))
}

#[pyfunction]
#[pyo3(signature = (prompt_lengths, response_lengths, group_offsets, teacher_lengths, group_indices))]
pub(crate) fn group_layout<'py>(
    py: Python<'py>,
    prompt_lengths: PyReadonlyArray1<'py, i64>,
    response_lengths: PyReadonlyArray1<'py, i64>,
    group_offsets: PyReadonlyArray1<'py, i64>,
    teacher_lengths: PyReadonlyArray1<'py, i64>,
    group_indices: PyReadonlyArray1<'py, i64>,
) -> PyResult<LayoutArrays<'py>> {
    let prompts = copied("prompt_lengths", &prompt_lengths)?;
    let responses = copied("response_lengths", &response_lengths)?;
    let offsets = copied("group_offsets", &group_offsets)?;
    let teachers = copied("teacher_lengths", &teacher_lengths)?;
    let groups = copied("group_indices", &group_indices)?;
    let layout = py
        .detach(|| GroupLengths::new(&prompts, &responses, &offsets, &teachers)?.layout(&groups))
        .map_err(to_python)?;
    let GroupLayout {
        position_ids,
        segment_ids,
        cu_seqlens,
    } = layout;
    Ok((
        position_ids.into_pyarray(py),
        segment_ids.into_pyarray(py),
        cu_seqlens.into_pyarray(py),
    ))
}

#[pyfunction]
#[pyo3(signature = (costs_or_lengths, num_ranks, *, linear = 1.0, quadratic = 0.0))]
pub(crate) fn balance<'py>(
    py: Python<'py>,
    costs_or_lengths: Bound<'py, PyAny>,
    num_ranks: i64,
    linear: f64,
    quadratic: f64,
) -> PyResult<BinArrays<'py>> {
    let sizes = to_float64("costs_or_lengths", &costs_or_lengths)?;
    let model = CostModel { linear, quadratic };
    let ranks = py
        .detach(|| rollout::balance(&sizes, model, num_ranks))
        .map_err(to_python)?;
    Ok(to_arrays(py, ranks))
}

#[pyfunction]
pub(crate) fn same_count<'py>(
    py: Python<'py>,
    indices: PyReadonlyArray1<'py, i64>,
    offsets: PyReadonlyArray1<'py, i64>,
) -> PyResult<Bound<'py, PyArray2<i64>>> {
    let indices = copied("indices", &indices)?;
    let offsets = copied("offsets", &offsets)?;
    let (schedule, num_ranks, count) = py
        .detach(|| {
            let ranks = Bins::new(indices, offsets)?;
            let (schedule, count) = rollout::same_count(&ranks)?;
            Ok((schedule, ranks.len(), count))
        })
        .map_err(to_python)?;
    schedule.into_pyarray(py).reshape([num_ranks, count])
}

/// Sizes from either kind of Python's numbers.
#[expect(
    clippy::cast_precision_loss,
    reason = "a cost needs no more than 53 bits of its length"
)]
fn to_float64(name: &str, sizes: &Bound<'_, PyAny>) -> PyResult<Vec<f64>> {
    if let Ok(costs) = sizes.extract::<PyReadonlyArray1<'_, f64>>() {
        return copied(name, &costs);
    }
    let lengths = sizes
        .extract::<PyReadonlyArray1<'_, i64>>()
        .map_err(|_| not_an_array(name, "int64 or float64", sizes))?;
    let lengths = copied(name, &lengths)?;
    Ok(lengths.into_iter().map(|length| length as f64).collect())
}
