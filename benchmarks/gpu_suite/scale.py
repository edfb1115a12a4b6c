"""How large everything is: real shapes on a GPU, and shapes for a smoke run on a CPU.

Shapes: T tokens, V vocabulary, D width of the hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

Dtype = Literal["bfloat16", "float32"]

QWEN_05B = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
QWEN_15B = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


QWEN_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}


class Shape(NamedTuple):
    """Of logits, or with a width of hidden states and the head on them."""

    T: int
    V: int
    D: int | None = None

    def __str__(self) -> str:
        width = "" if self.D is None else f" D{self.D}"
        return f"T{self.T} V{self.V}{width}"


class StepSize(NamedTuple):
    """One step of the game on a model of random weights."""

    name: str
    model: dict[str, Any]
    prompts: int
    group_size: int
    prompt_tokens: int
    response_tokens: int
    tokens_per_micro_batch: int
    padded_rows: int
    """Sequences at once in the paper's passes, which make whole logits."""
    lora_rank: int = 0
    """With adapters the weights are bfloat16, and layers are recomputed."""

    @property
    def max_tokens(self) -> int:
        """Of a prompt and a response."""
        return self.prompt_tokens + self.response_tokens


class RolloutSize(NamedTuple):
    """Rollouts of a model of random weights."""

    name: str
    model: dict[str, Any]
    prompts: int
    group_size: int
    prompt_tokens: int
    response_tokens: int

    @property
    def rows(self) -> int:
        """Rollouts at once."""
        return self.prompts * self.group_size


@dataclass(frozen=True, slots=True)
class Scale:
    """All sizes of a run."""

    device: Literal["cuda", "cpu"]
    dtype: Dtype
    num_tokens: tuple[int, ...]
    """What correctness is checked at, first things first: what no time is left for is skipped."""
    vocabularies: tuple[int, ...]
    widths: tuple[int, ...]
    float32_shape: Shape
    """At which operations on logits are checked in float32 too."""
    timed_logits: tuple[Shape, ...]
    timed_heads: tuple[Shape, ...]
    peer_logits: Shape
    peer_head: Shape
    groups: tuple[int, int]
    """B groups and G rollouts of the small operations."""
    copy_mib: tuple[int, ...]
    square: int
    """Edge of the square matrices whose product is the ceiling of arithmetic."""
    truth_bytes: int
    """What a chunk of the float64 reference's logits may take."""
    seconds_per_timing: float
    flush_mib: int
    """More than the last-level cache, written between repeats."""
    has_compiled_peers: bool
    steps: tuple[StepSize, ...]
    rollouts: tuple[RolloutSize, ...]

    def on(self, device: Literal["cuda", "cpu"], dtype: Dtype) -> Scale:
        """The same sizes elsewhere."""
        return replace(self, device=device, dtype=dtype)


FULL = Scale(
    device="cuda",
    dtype="bfloat16",
    num_tokens=(4096, 1, 8192, 32768),
    vocabularies=(151936, 128256),
    widths=(896, 2048, 3584),
    float32_shape=Shape(4096, 151936),
    timed_logits=(Shape(8192, 151936), Shape(8192, 128256), Shape(32768, 151936)),
    timed_heads=(
        Shape(8192, 151936, 3584),
        Shape(8192, 151936, 2048),
        Shape(8192, 151936, 896),
        Shape(8192, 128256, 2048),
        Shape(32768, 151936, 3584),
    ),
    peer_logits=Shape(8192, 151936),
    peer_head=Shape(8192, 151936, 3584),
    groups=(256, 8),
    copy_mib=(64, 512, 4096),
    square=8192,
    truth_bytes=8 << 30,
    seconds_per_timing=0.6,
    flush_mib=256,
    has_compiled_peers=True,
    steps=(
        StepSize("Qwen2.5-0.5B", QWEN_05B, 8, 8, 256, 192, 8192, padded_rows=16),
        StepSize("Qwen2.5-1.5B", QWEN_15B, 8, 8, 256, 192, 4096, padded_rows=4),
        StepSize("Qwen2.5-7B, LoRA", QWEN_7B, 4, 8, 256, 192, 8192, padded_rows=8, lora_rank=16),
    ),
    rollouts=(
        RolloutSize("Qwen2.5-0.5B", QWEN_05B, 32, 8, 256, 512),
        RolloutSize("Qwen2.5-1.5B", QWEN_15B, 32, 8, 256, 512),
    ),
)

_TINY_MODEL = {
    **QWEN_05B,
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}

SMOKE = Scale(
    device="cpu",
    dtype="float32",
    num_tokens=(7, 1),
    vocabularies=(300, 257),
    widths=(32,),
    float32_shape=Shape(5, 300),
    timed_logits=(Shape(8, 300),),
    timed_heads=(Shape(8, 300, 32),),
    peer_logits=Shape(8, 300),
    peer_head=Shape(8, 300, 32),
    groups=(3, 4),
    copy_mib=(1,),
    square=64,
    truth_bytes=1 << 14,
    seconds_per_timing=0.005,
    flush_mib=1,
    has_compiled_peers=False,
    steps=(
        StepSize("tiny", _TINY_MODEL, 2, 2, 6, 4, 64, padded_rows=3),
        StepSize("tiny, LoRA", _TINY_MODEL, 2, 2, 6, 4, 64, padded_rows=3, lora_rank=2),
    ),
    rollouts=(RolloutSize("tiny", _TINY_MODEL, 2, 2, 6, 8),),
)

SCALES = {"full": FULL, "smoke": SMOKE}


def logit_shapes(scale: Scale) -> list[Shape]:
    """Of the logits that correctness is checked on."""
    return [Shape(T, V) for T in scale.num_tokens for V in scale.vocabularies]


def head_shapes(scale: Scale) -> list[Shape]:
    """Of the heads that correctness is checked on."""
    return [
        Shape(T, V, D) for T in scale.num_tokens for V in scale.vocabularies for D in scale.widths
    ]
