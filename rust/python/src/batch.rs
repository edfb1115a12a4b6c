//! The class `RolloutBatch`.

use gad_fast_core::rollout::{AdvantageOptions, PackedRows, RolloutBatch as CoreBatch};
use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::arrays::{copied, view};
use crate::errors::to_python;

/// Tokens, position ids, response mask and `cu_seqlens`, as numpy arrays.
type PackedArrays<'py> = (
    Bound<'py, PyArray1<i32>>,
    Bound<'py, PyArray1<i32>>,
    Bound<'py, PyArray1<bool>>,
    Bound<'py, PyArray1<i32>>,
);

/// A column that is there once the batch is scored.
type Scores<'py> = Option<Bound<'py, PyArray1<f32>>>;

/// The rollouts of whole groups, sealed.
#[pyclass(module = "gad_fast._core", frozen)]
pub(crate) struct RolloutBatch {
    pub(crate) batch: CoreBatch,
}

#[pymethods]
impl RolloutBatch {
    fn __len__(&self) -> usize {
        self.batch.num_rows()
    }

    #[getter]
    fn num_groups(&self) -> usize {
        self.batch.num_groups()
    }

    #[getter]
    fn group_size(&self) -> usize {
        self.batch.group_size()
    }

    #[getter]
    fn streams<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.batch.stream_names())
    }

    #[getter]
    fn tokens<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyArray1<i32>>> {
        view(slf, |this| this.batch.tokens())
    }

    #[getter]
    fn offsets<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyArray1<i64>>> {
        view(slf, |this| this.batch.offsets())
    }

    #[getter]
    fn prompt_lengths<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyArray1<i64>>> {
        view(slf, |this| this.batch.prompt_lengths())
    }

    #[getter]
    fn response_offsets<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyArray1<i64>>> {
        view(slf, |this| this.batch.response_offsets())
    }

    #[getter]
    fn group_ids<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyArray1<i64>>> {
        view(slf, |this| this.batch.group_ids())
    }

    #[getter]
    fn finish_reasons<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyArray1<u8>>> {
        view(slf, |this| this.batch.finish_reasons())
    }

    #[getter]
    fn weight_versions<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyArray1<i64>>> {
        view(slf, |this| this.batch.weight_versions())
    }

    #[getter]
    fn teacher_tokens<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyArray1<i32>>> {
        view(slf, |this| this.batch.teacher_tokens())
    }

    #[getter]
    fn teacher_offsets<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyArray1<i64>>> {
        view(slf, |this| this.batch.teacher_offsets())
    }

    fn stream<'py>(slf: &Bound<'py, Self>, name: &str) -> PyResult<Bound<'py, PyArray1<f32>>> {
        // Asked twice, so that the view itself cannot fail.
        slf.get().batch.stream(name).map_err(to_python)?;
        view(slf, |this| this.batch.stream(name).unwrap_or_default())
    }

    #[getter]
    fn scores<'py>(slf: &Bound<'py, Self>) -> PyResult<Scores<'py>> {
        if slf.get().batch.scores().is_none() {
            return Ok(None);
        }
        view(slf, |this| this.batch.scores().unwrap_or_default()).map(Some)
    }

    #[getter]
    fn rewards<'py>(slf: &Bound<'py, Self>) -> PyResult<Scores<'py>> {
        if slf.get().batch.rewards().is_none() {
            return Ok(None);
        }
        view(slf, |this| this.batch.rewards().unwrap_or_default()).map(Some)
    }

    #[pyo3(signature = (scores, rewards = None))]
    fn with_scores(
        &self,
        py: Python<'_>,
        scores: PyReadonlyArray1<'_, f32>,
        rewards: Option<PyReadonlyArray1<'_, f32>>,
    ) -> PyResult<Self> {
        let scores = copied("scores", &scores)?;
        let rewards = rewards
            .map(|rewards| copied("rewards", &rewards))
            .transpose()?;
        let batch = py
            .detach(|| self.batch.with_scores(scores, rewards))
            .map_err(to_python)?;
        Ok(Self { batch })
    }

    #[pyo3(signature = (scale = "std", std_floor = 0.0, leave_one_out = false, eps = 1e-6))]
    fn advantages<'py>(
        &self,
        py: Python<'py>,
        scale: &str,
        std_floor: f64,
        leave_one_out: bool,
        eps: f64,
    ) -> PyResult<Bound<'py, PyArray1<f32>>> {
        let options = AdvantageOptions {
            is_scaled: is_scaled(scale)?,
            leave_one_out,
            std_floor,
            eps,
        };
        let advantages = py
            .detach(|| self.batch.advantages(&options))
            .map_err(to_python)?;
        Ok(advantages.into_pyarray(py))
    }

    fn gather<'py>(
        &self,
        py: Python<'py>,
        indices: PyReadonlyArray1<'_, i64>,
    ) -> PyResult<PackedArrays<'py>> {
        let indices = copied("indices", &indices)?;
        let rows = py
            .detach(|| self.batch.gather(&indices))
            .map_err(to_python)?;
        let PackedRows {
            tokens,
            position_ids,
            response_mask,
            cu_seqlens,
        } = rows;
        Ok((
            tokens.into_pyarray(py),
            position_ids.into_pyarray(py),
            response_mask.into_pyarray(py),
            cu_seqlens.into_pyarray(py),
        ))
    }

    fn gather_stream<'py>(
        &self,
        py: Python<'py>,
        name: &str,
        indices: PyReadonlyArray1<'_, i64>,
    ) -> PyResult<Bound<'py, PyArray1<f32>>> {
        let indices = copied("indices", &indices)?;
        let stream = py
            .detach(|| self.batch.gather_stream(name, &indices))
            .map_err(to_python)?;
        Ok(stream.into_pyarray(py))
    }

    fn gather_groups<'py>(
        &self,
        py: Python<'py>,
        group_indices: PyReadonlyArray1<'_, i64>,
    ) -> PyResult<Bound<'py, PyArray1<i32>>> {
        let groups = copied("group_indices", &group_indices)?;
        let tokens = py
            .detach(|| self.batch.gather_groups(&groups))
            .map_err(to_python)?;
        Ok(tokens.into_pyarray(py))
    }

    fn spread<'py>(
        &self,
        py: Python<'py>,
        values: PyReadonlyArray1<'_, f32>,
        indices: PyReadonlyArray1<'_, i64>,
    ) -> PyResult<Bound<'py, PyArray1<f32>>> {
        let values = copied("values", &values)?;
        let indices = copied("indices", &indices)?;
        let spread = py
            .detach(|| self.batch.spread(&values, &indices))
            .map_err(to_python)?;
        Ok(spread.into_pyarray(py))
    }
}

fn is_scaled(scale: &str) -> PyResult<bool> {
    match scale {
        "std" => Ok(true),
        "none" => Ok(false),
        _ => Err(PyValueError::new_err(format!(
            "scale must be \"std\" or \"none\", got {scale:?}"
        ))),
    }
}
