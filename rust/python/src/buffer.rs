//! The class `RolloutBuffer`.

use std::time::{Duration, Instant};

use gad_fast_core::rollout::{FinishReason, Rollout, RolloutBuffer as CoreBuffer, Taken};
use numpy::PyReadonlyArray1;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};

use crate::arrays::{copied, not_an_array};
use crate::batch::RolloutBatch;
use crate::errors::to_python;
use crate::tokenizer::{Tokenizer, borrow_all};

/// How long a wait may hold off a signal.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(50);

/// Collects rollouts from many threads, and gives them out in whole groups.
#[pyclass(module = "gad_fast._core", frozen)]
pub(crate) struct RolloutBuffer {
    buffer: CoreBuffer,
}

#[pymethods]
impl RolloutBuffer {
    #[new]
    #[pyo3(signature = (group_size, *, streams = vec!["logprobs".to_owned()], max_staleness = None))]
    fn new(group_size: i64, streams: Vec<String>, max_staleness: Option<i64>) -> PyResult<Self> {
        let buffer = CoreBuffer::new(group_size, streams, max_staleness).map_err(to_python)?;
        Ok(Self { buffer })
    }

    #[pyo3(signature = (group_id, prompt_ids, response_ids, *, finish_reason, weight_version, **streams))]
    #[expect(
        clippy::too_many_arguments,
        reason = "the fields of a rollout, by name"
    )]
    fn push(
        &self,
        py: Python<'_>,
        group_id: i64,
        prompt_ids: PyReadonlyArray1<'_, i32>,
        response_ids: PyReadonlyArray1<'_, i32>,
        finish_reason: i64,
        weight_version: i64,
        streams: Option<Bound<'_, PyDict>>,
    ) -> PyResult<()> {
        let rollout = Rollout {
            prompt_ids: copied("prompt_ids", &prompt_ids)?,
            response_ids: copied("response_ids", &response_ids)?,
            finish_reason: FinishReason::from_code(finish_reason).map_err(to_python)?,
            weight_version,
            streams: streams
                .as_ref()
                .map_or_else(|| Ok(Vec::new()), to_streams)?,
        };
        py.detach(|| self.buffer.push(group_id, rollout))
            .map_err(to_python)
    }

    #[pyo3(signature = (group_id, tokenizer, text, *, end_id, max_tokens))]
    fn push_teacher(
        &self,
        py: Python<'_>,
        group_id: i64,
        tokenizer: &Bound<'_, Tokenizer>,
        text: Bound<'_, PyString>,
        end_id: i32,
        max_tokens: i64,
    ) -> PyResult<()> {
        let codec = &tokenizer.get().codec;
        let texts = [text];
        let texts = borrow_all(&texts)?;
        py.detach(|| {
            self.buffer
                .encode_teacher(group_id, codec, texts[0], end_id, max_tokens)
        })
        .map_err(to_python)
    }

    #[pyo3(signature = (num_groups, *, current_version, timeout = None))]
    fn take(
        &self,
        py: Python<'_>,
        num_groups: i64,
        current_version: i64,
        timeout: Option<f64>,
    ) -> PyResult<Option<RolloutBatch>> {
        let start = Instant::now();
        let timeout = timeout.map_or(Ok(Duration::MAX), to_duration)?;
        loop {
            let rest = timeout.saturating_sub(start.elapsed());
            let taken = py
                .detach(|| {
                    self.buffer
                        .take(num_groups, current_version, rest.min(SIGNAL_INTERVAL))
                })
                .map_err(to_python)?;
            match taken {
                Taken::Batch(batch) => return Ok(Some(RolloutBatch { batch })),
                Taken::Closed => return Ok(None),
                Taken::TimedOut if rest.is_zero() => return Ok(None),
                Taken::TimedOut => py.check_signals()?,
            }
        }
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.buffer.close());
    }

    #[getter]
    fn is_closed(&self, py: Python<'_>) -> bool {
        py.detach(|| self.buffer.is_closed())
    }

    #[getter]
    fn ready_groups(&self, py: Python<'_>) -> usize {
        py.detach(|| self.buffer.num_ready())
    }

    #[getter]
    fn num_dropped(&self, py: Python<'_>) -> u64 {
        py.detach(|| self.buffer.num_dropped())
    }

    fn __len__(&self, py: Python<'_>) -> usize {
        py.detach(|| self.buffer.num_rollouts())
    }
}

fn to_streams(streams: &Bound<'_, PyDict>) -> PyResult<Vec<(String, Vec<f32>)>> {
    streams
        .iter()
        .map(|(name, values)| {
            let name: String = name.extract()?;
            let Ok(array) = values.extract::<PyReadonlyArray1<'_, f32>>() else {
                return Err(not_an_array(&name, "float32", &values));
            };
            let values = copied(&name, &array)?;
            Ok((name, values))
        })
        .collect()
}

fn to_duration(seconds: f64) -> PyResult<Duration> {
    if seconds.is_nan() || seconds < 0.0 {
        return Err(PyValueError::new_err(format!(
            "timeout must be at least 0 seconds, or None to wait for ever, got {seconds}"
        )));
    }
    // What is too long to count is for ever.
    Ok(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
}
