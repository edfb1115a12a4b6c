//! The class `Tokenizer`.

use std::path::PathBuf;

use gad_fast_core::tokenize::{TextCodec, TokenBatch};
use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;
use pyo3::types::PyString;

use crate::errors::{TokenizerError, to_python};

/// Packed ids and their offsets, as numpy arrays.
type PackedIds<'py> = (Bound<'py, PyArray1<i32>>, Bound<'py, PyArray1<i64>>);

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
        let TokenBatch { ids, offsets } = py
            .detach(|| self.codec.encode_batch(&texts))
            .map_err(to_python)?;
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
        // Copied, because another thread may write to the arrays once the interpreter is released.
        let ids = ids.as_array().to_vec();
        let offsets = offsets.as_array().to_vec();
        py.detach(|| self.codec.decode_batch(&ids, &offsets, skip_special_tokens))
            .map_err(to_python)
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
