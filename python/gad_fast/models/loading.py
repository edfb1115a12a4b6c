"""Models from folders or the Hub onto a device; never with code that comes with a model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from gad_fast.config import DataSettings, HardwareSettings
from gad_fast.errors import ConfigError, ModelError
from gad_fast.models.layers import altered_layers

_SAFE: dict[str, Any] = {"trust_remote_code": False, "use_safetensors": True}
"""Left open, transformers asks on the terminal, and takes pickle where there is nothing else."""


class Precision:
    """The device, and the precision of the matrix products on it."""

    def __init__(self, settings: HardwareSettings) -> None:
        self.device = _device(settings.device)
        self.compute_dtype = _compute_dtype(settings.compute_dtype, self.device)
        self._recomputes = settings.gradient_checkpointing
        self.compiles = settings.compile_layers
        """Whether layers run compiled."""

    @contextlib.contextmanager
    def forward_pass(self, model: nn.Module) -> Generator[None]:
        """Context of a model's forward pass; where gradients are recorded, as the settings ask.

        Raises:
            ConfigError: layers are to be recomputed or compiled, and the model has none to be.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.autocast())
            if (self._recomputes or self.compiles) and torch.is_grad_enabled():
                stack.enter_context(
                    altered_layers(model, is_recomputed=self._recomputes, is_compiled=self.compiles)
                )
            yield

    def for_trial(self) -> Precision:
        """The same precision for a pass without data: on a CPU, and with nothing compiled."""
        other = copy.copy(self)
        other.device, other.compiles = torch.device("cpu"), False
        return other

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Context of a forward pass: matrix products in `compute_dtype`."""
        if self.compute_dtype is not torch.bfloat16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def __str__(self) -> str:
        dtype = "weights' dtype" if self.compute_dtype is None else str(self.compute_dtype)
        return f"{self.device.type}, {dtype.removeprefix('torch.')}"


def load_config(source: str) -> PreTrainedConfig:
    """The configuration of a model folder or Hub id.

    Raises:
        ModelError: it cannot be found or read.
    """
    return _attempt(source, lambda: AutoConfig.from_pretrained(source, trust_remote_code=False))


def load_causal_lm(source: str, *, dtype: str, device: torch.device) -> PreTrainedModel:
    """A language model.

    Raises:
        ModelError: it cannot be found, read, or is no language model.
    """
    model = _attempt(
        source,
        lambda: AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype), **_SAFE),
    )
    return _ready(model, device)


def load_scorer(source: str, *, dtype: str, device: torch.device) -> PreTrainedModel:
    """A model with a head of one label; the head is fresh unless the folder holds one.

    Raises:
        ModelError: it cannot be found, read, or its architecture has no sequence classifier.
    """
    model = _attempt(
        source,
        lambda: AutoModelForSequenceClassification.from_pretrained(
            source, num_labels=1, dtype=getattr(torch, dtype), **_SAFE
        ),
    )
    return _ready(model, device)


def scorer_on(model: PreTrainedModel, source: str) -> PreTrainedModel:
    """A model with a fresh head of one label, float32 at least, on the backbone of another one.

    Args:
        model: whose backbone it shares.
        source: where that model came from.

    Raises:
        ModelError: the architecture has no sequence classifier on the same backbone.
    """
    config = load_config(source)
    config.num_labels = 1
    with torch.device("meta"):
        scorer: Any = _attempt(
            source, lambda: AutoModelForSequenceClassification.from_config(config)
        )
    own = scorer.base_model
    if type(own) is not type(model.base_model) or not isinstance(scorer.score, nn.Linear):
        raise ModelError(
            f"{type(scorer).__name__} cannot share the backbone of {type(model).__name__} (name "
            f"another discriminator.model, or train all weights with lora.rank = 0)"
        )
    setattr(scorer, scorer.base_model_prefix, model.base_model)
    scorer.score = _fresh_head(scorer, model)
    return scorer.eval()


def _fresh_head(scorer: Any, model: Any) -> nn.Linear:
    weight: Tensor = model.get_input_embeddings().weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    has_bias = scorer.score.bias is not None
    head = nn.Linear(scorer.score.in_features, 1, bias=has_bias, device=weight.device, dtype=dtype)
    nn.init.normal_(head.weight, std=scorer.config.get_text_config().initializer_range)
    if has_bias:
        nn.init.zeros_(head.bias)
    return head


def causal_lm_from_config(config: PreTrainedConfig, dtype: str = "float32") -> PreTrainedModel:
    """A language model without weights, to count what it would hold.

    Raises:
        ModelError: the architecture has no language model.
    """
    return _without_weights(AutoModelForCausalLM, config, dtype)


def scorer_from_config(config: PreTrainedConfig, dtype: str = "float32") -> PreTrainedModel:
    """A model with a head of one label without weights.

    Raises:
        ModelError: the architecture has no sequence classifier.
    """
    labelled = copy.deepcopy(config)
    labelled.num_labels = 1
    return _without_weights(AutoModelForSequenceClassification, labelled, dtype)


def _without_weights(kind: Any, config: PreTrainedConfig, dtype: str) -> PreTrainedModel:
    def make() -> Any:
        with torch.device("meta"):
            return kind.from_config(config, dtype=getattr(torch, dtype))

    return _attempt(config.name_or_path or config.model_type, make).eval()


def require_context(config: PreTrainedConfig, data: DataSettings, source: str) -> None:
    """Raises ConfigError when prompt and response together may be longer than a model can read."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    wanted = data.max_tokens
    if limit is not None and wanted > limit:
        raise ConfigError(
            f"data.max_prompt_tokens + data.max_response_tokens is {wanted}, but {source} reads at "
            f"most {limit} tokens (lower one of them)"
        )


def _attempt(source: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"cannot load a model from {source}: {reason}") from error


def _ready(model: Any, device: torch.device) -> PreTrainedModel:
    # Dropout stays off: the discriminator's training pass is also what gives the rewards, and the
    # student's must see the policy that sampled.
    return model.to(device).eval()


def _device(wanted: str) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        raise ConfigError("hardware.device is 'cuda', but no GPU is visible (set 'auto' or 'cpu')")
    return torch.device("cuda" if has_cuda and wanted != "cpu" else "cpu")


def _has_fast_bfloat16_cpu() -> bool:
    # Without instructions for them bfloat16 products are slower than float32's. With AVX512's a
    # step takes .7 of the time (benchmarks/step.py). torch has no public names for the questions.
    cpu: Any = torch.cpu
    return cpu._is_amx_tile_supported() or cpu._is_avx512_bf16_supported()


def _compute_dtype(wanted: str, device: torch.device) -> torch.dtype | None:
    if wanted == "weights":
        return None
    if wanted == "auto":
        is_fast = device.type == "cuda" or _has_fast_bfloat16_cpu()
        return torch.bfloat16 if is_fast else torch.float32
    return getattr(torch, wanted)
