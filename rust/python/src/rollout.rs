//! The function `plan_micro_batches`.

use gad_fast_core::Error;
use gad_fast_core::rollout::{self, MicroBatchItem};
use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::errors::to_python;

#[pyfunction]
#[pyo3(signature = (rows, prompt_lengths, response_lengths, *, token_budget))]
pub(crate) fn plan_micro_batches<'py>(
    py: Python<'py>,
    rows: PyReadonlyArray1<'py, i64>,
    prompt_lengths: PyReadonlyArray1<'py, i64>,
    response_lengths: PyReadonlyArray1<'py, i64>,
    token_budget: i64,
) -> PyResult<Vec<Bound<'py, PyArray1<i64>>>> {
    let token_budget = u64::try_from(token_budget)
        .map_err(|_| to_python(Error::TokenBudgetTooSmall { token_budget }))?;
    let items = to_items(&rows, &prompt_lengths, &response_lengths)?;
    let batches = py
        .detach(|| rollout::plan_micro_batches(&items, token_budget))
        .map_err(to_python)?;
    Ok(batches
        .into_iter()
        .map(|indices| to_int64(indices).into_pyarray(py))
        .collect())
}

/// Reads the three arrays side by side.
fn to_items(
    rows: &PyReadonlyArray1<'_, i64>,
    prompt_lengths: &PyReadonlyArray1<'_, i64>,
    response_lengths: &PyReadonlyArray1<'_, i64>,
) -> PyResult<Vec<MicroBatchItem>> {
    let (rows, prompt_lengths, response_lengths) = (
        rows.as_array(),
        prompt_lengths.as_array(),
        response_lengths.as_array(),
    );
    if prompt_lengths.len() != rows.len() || response_lengths.len() != rows.len() {
        return Err(PyValueError::new_err(format!(
            "rows, prompt_lengths and response_lengths must have one entry an item, got {}, {} and {}",
            rows.len(),
            prompt_lengths.len(),
            response_lengths.len()
        )));
    }
    (0..rows.len())
        .map(|index| {
            Ok(MicroBatchItem {
                rows: to_count("rows", index, rows[index])?,
                prompt_length: to_count("prompt_lengths", index, prompt_lengths[index])?,
                response_length: to_count("response_lengths", index, response_lengths[index])?,
            })
        })
        .collect()
}

fn to_count(name: &str, index: usize, value: i64) -> PyResult<u64> {
    u64::try_from(value).map_err(|_| {
        PyValueError::new_err(format!("{name}[{index}] must be at least 0, got {value}"))
    })
}

#[expect(
    clippy::cast_possible_wrap,
    reason = "an index of a Vec is at most isize::MAX"
)]
fn to_int64(indices: Vec<usize>) -> Vec<i64> {
    indices.into_iter().map(|index| index as i64).collect()
}
