//! The class `Tokenizer`.

use std::path::PathBuf;

use gad_fast_core::Result;
use gad_fast_core::tokenize::{TextCodec, TokenBatch, split_texts};
use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;
use pyo3::types::PyString;

use crate::arrays::copied;
use crate::errors::{TokenizerError, to_python};
use crate::stream::DecodeStream;

/// Packed ids and their offsets, as numpy arrays.
type PackedIds<'py> = (Bound<'py, PyArray1<i32>>, Bound<'py, PyArray1<i64>>);

/// The same, and whether each response is finished.
type PackedResponses<'py> = (
    Bound<'py, PyArray1<i32>>,
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray1<bool>>,
);

/// A tokenizer read from a Hugging Face `tokenizer.json`.
#[pyclass(module = "gad_fast._core", frozen)]
pub(crate) struct Tokenizer {
    pub(crate) codec: TextCodec,
}

#[pymethods]
impl Tokenizer {
    #[staticmethod]
    fn from_file(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let codec = py
            .detach(|| TextCodec::from_file(path))
            .map_err(to_python)?;
        Ok(Self { codec })
    }

    #[staticmethod]
    fn from_json(py: Python<'_>, text: &str) -> PyResult<Self> {
        let codec = py
            .detach(|| TextCodec::from_json(text.as_bytes()))
            .map_err(to_python)?;
        Ok(Self { codec })
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.codec.vocab_size()
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.codec.token_to_id(token)
    }

    fn encode_batch<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<Bound<'py, PyString>>,
    ) -> PyResult<PackedIds<'py>> {
        let texts = borrow_all(&texts)?;
        let TokenBatch { ids, offsets } = self.encode(py, || Ok(texts))?;
        Ok((ids.into_pyarray(py), offsets.into_pyarray(py)))
    }

    #[pyo3(signature = (texts, *, end_id, max_tokens))]
    fn encode_responses<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<Bound<'py, PyString>>,
        end_id: i32,
        max_tokens: usize,
    ) -> PyResult<PackedResponses<'py>> {
        let texts = borrow_all(&texts)?;
        let batch = self.encode(py, || Ok(texts))?;
        let (batch, is_finished) = py.detach(|| batch.into_responses(end_id, max_tokens));
        Ok((
            batch.ids.into_pyarray(py),
            batch.offsets.into_pyarray(py),
            is_finished.into_pyarray(py),
        ))
    }

    fn encode_utf8<'py>(
        &self,
        py: Python<'py>,
        data: PyReadonlyArray1<'_, u8>,
        offsets: PyReadonlyArray1<'_, i64>,
    ) -> PyResult<PackedIds<'py>> {
        let data = copied("data", &data)?;
        let offsets = copied("offsets", &offsets)?;
        let TokenBatch { ids, offsets } = self.encode(py, || split_texts(&data, &offsets))?;
        Ok((ids.into_pyarray(py), offsets.into_pyarray(py)))
    }

    #[pyo3(signature = (ids, offsets, *, skip_special_tokens))]
    fn decode_batch(
        &self,
        py: Python<'_>,
        ids: PyReadonlyArray1<'_, i32>,
        offsets: PyReadonlyArray1<'_, i64>,
        skip_special_tokens: bool,
    ) -> PyResult<Vec<String>> {
        let ids = copied("ids", &ids)?;
        let offsets = copied("offsets", &offsets)?;
        py.detach(|| self.codec.decode_batch(&ids, &offsets, skip_special_tokens))
            .map_err(to_python)
    }

    #[pyo3(
        signature = (stop = Vec::new(), *, skip_special_tokens),
        text_signature = "($self, stop=(), *, skip_special_tokens)"
    )]
    fn decode_stream(
        &self,
        stop: Vec<String>,
        skip_special_tokens: bool,
    ) -> PyResult<DecodeStream> {
        let stream = self.codec.decode_stream(stop, skip_special_tokens);
        Ok(DecodeStream::new(stream.map_err(to_python)?))
    }
}

impl Tokenizer {
    /// Encodes texts with the interpreter released, except to see to signals.
    fn encode<'a>(
        &self,
        py: Python<'_>,
        texts: impl FnOnce() -> Result<Vec<&'a str>> + Send,
    ) -> PyResult<TokenBatch> {
        let mut signal = None;
        let batch = py.detach(|| {
            self.codec.encode_batch_while(&texts()?, || {
                signal = Python::attach(|py| py.check_signals().err());
                signal.is_none()
            })
        });
        if let Some(error) = signal {
            return Err(error);
        }
        batch.map_err(to_python)
    }
}

/// The UTF-8 of every text, which Python keeps beside the str: no text is copied here.
pub(crate) fn borrow_all<'a>(texts: &'a [Bound<'_, PyString>]) -> PyResult<Vec<&'a str>> {
    texts
        .iter()
        .enumerate()
        .map(|(index, text)| {
            text.to_str().map_err(|cause| {
                let error = TokenizerError::new_err(format!(
                    "text {index} holds a lone surrogate, which no UTF-8 text can \
                     (repair it with text.encode(\"utf-16\", \"surrogatepass\").decode(\"utf-16\", \"replace\"))"
                ));
                error.set_cause(text.py(), Some(cause));
                error
            })
        })
        .collect()
}
