//! Rows of the cache, as Python has them.

use gad_fast_core::cache::{Request, Response, StoredEntry};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;

use crate::errors::to_python;
use crate::json::to_json;

/// Teacher, messages, sampling, sample index.
pub(crate) type RequestFields<'py> = (PyBackedStr, Bound<'py, PyAny>, Bound<'py, PyAny>, u32);

/// Teacher, messages and sampling as JSON, sample index.
pub(crate) type RequestParts = (String, String, String, u32);

/// Text, finish reason, prompt tokens, response tokens, cost, created, flags.
pub(crate) type ResponseParts = (
    String,
    Option<String>,
    Option<i64>,
    Option<i64>,
    Option<f64>,
    f64,
    Vec<String>,
);

pub(crate) fn to_request(fields: &RequestFields<'_>) -> PyResult<Request> {
    let (teacher, messages, sampling, sample_index) = fields;
    let messages = to_json("messages", messages)?;
    let sampling = to_json("sampling", sampling)?;
    Request::from_values(teacher, &messages, &sampling, *sample_index).map_err(to_python)
}

pub(crate) fn to_response(parts: ResponseParts) -> Response {
    let (text, finish_reason, num_prompt_tokens, num_response_tokens, cost, created, flags) = parts;
    Response {
        text,
        finish_reason,
        num_prompt_tokens,
        num_response_tokens,
        cost,
        created,
        flags,
    }
}

pub(crate) fn from_response(response: Response) -> ResponseParts {
    (
        response.text,
        response.finish_reason,
        response.num_prompt_tokens,
        response.num_response_tokens,
        response.cost,
        response.created,
        response.flags,
    )
}

pub(crate) fn from_entry(entry: StoredEntry) -> (i64, RequestParts, ResponseParts) {
    let request = &entry.request;
    let request = (
        request.teacher().to_owned(),
        request.messages().to_owned(),
        request.sampling().to_owned(),
        request.sample_index(),
    );
    (entry.id, request, from_response(entry.response))
}
