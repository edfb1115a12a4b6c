"""The recipe: everything that decides a run, as frozen typed records read from TOML.

A recipe is validated once, when it is made; every later stage trusts it. This module imports no
torch, so that `gad-fast --help` is quick and a recipe can be checked on any machine.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gad_fast.errors import ConfigError


class Settings(BaseModel):
    """A frozen section of a recipe; unknown keys are refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )


class StudentSettings(Settings):
    """The model being distilled."""

    model: str
    """Folder or Hub id of a decoder-only model with a chat template."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the stored weights. bfloat16 weights lose small updates: prefer float32."""


class DiscriminatorSettings(Settings):
    """The scorer of (prompt, response), trained alongside the student."""

    model: str = "student"
    """`student` for a copy of the student's backbone, else a folder or Hub id of any other one.
    A backbone with a tokenizer of its own reads the same texts in its own tokens."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the stored backbone weights; the head is float32 at least."""


class DataSettings(Settings):
    """Prompts with the teacher's responses, and which of them are used."""

    train: str
    """JSONL or Parquet file, or Hub id of a dataset, with prompts and teacher responses."""
    validation: str | None = None
    """File or Hub id held out from training; without one, a split of `train` is held out."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of `train` held out when `validation` is not given. The split depends on each
    prompt's own text, so rows that are added later do not move the others."""
    max_validation_prompts: int = Field(default=64, ge=1)
    """At most so many held-out prompts are used in each validation."""
    prompt_column: str | None = None
    """Column with the prompt: a string or a list of chat messages. By default `messages` or
    `prompt`, whichever is there."""
    response_column: str = "teacher_response"
    """Column with the teacher's response."""
    max_prompt_tokens: int = Field(default=2048, ge=1)
    """Longer prompts are left out and counted; a cut prompt would lose the assistant header."""
    max_response_tokens: int = Field(default=1536, ge=2)
    """Rollouts and teacher responses are both cut here, the end token included."""

    @property
    def max_tokens(self) -> int:
        """Most tokens of a prompt with one response."""
        return self.max_prompt_tokens + self.max_response_tokens


class RolloutSettings(Settings):
    """How the student samples."""

    engine: Literal["reference"] = "reference"
    """`reference` is transformers' `generate` on the student's live weights."""
    group_size: int = Field(default=8, ge=1)
    """Rollouts a prompt."""
    temperature: float = Field(default=0.8, gt=0)
    """Sampling temperature; the policy loss sees log-probabilities at this temperature."""
    max_sequences: int = Field(default=256, ge=1)
    """At most so many rollouts are generated at once."""


class OptimizerSettings(Settings):
    """AdamW, the same for both players."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(default=0.2, gt=0)
    """Gradients are scaled down to this norm, each player's on its own."""


class LearningRateSettings(Settings):
    """Learning rate of one player in one stage."""

    peak: float = Field(default=1e-6, ge=0)
    """Highest learning rate; 0 freezes the player."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls from `peak` to `final_fraction * peak` over the stage."""
    final_fraction: float = Field(default=0.05, ge=0, le=1)
    """Floor of a falling schedule, as a share of `peak`."""
    ramp_steps: int = Field(default=0, ge=0)
    """Steps over which the rate first rises linearly to `peak`."""


class BatchSettings(Settings):
    """What one step works on."""

    prompts_per_step: int = Field(default=256, ge=1)
    """Prompts a step; a step samples `prompts_per_step * group_size` rollouts."""
    tokens_per_micro_batch: int = Field(default=12288, ge=1)
    """Upper bound of padded tokens a forward pass sees. It changes memory, never the loss."""


class StageSettings(Settings):
    """Length and learning rates of a stage."""

    steps: int | None = Field(default=None, ge=0)
    """Length of the stage in steps; give this or `epochs`."""
    epochs: float | None = Field(default=None, ge=0)
    """Length of the stage in passes over the training prompts."""
    student: LearningRateSettings = LearningRateSettings()
    """Learning rate of the student."""
    discriminator: LearningRateSettings = LearningRateSettings()
    """Learning rate of the discriminator."""

    @model_validator(mode="after")
    def _has_one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("needs exactly one of steps and epochs")
        return self

    def num_steps(self, num_prompts: int, prompts_per_step: int) -> int:
        """Steps of the stage over `num_prompts` training prompts; a last short batch is dropped."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return round(self.epochs * (num_prompts // prompts_per_step))


class WarmupSettings(StageSettings):
    """Stage 1: the student imitates, the discriminator learns on its live rollouts."""

    discriminator_only_steps: int = Field(default=9, ge=0)
    """The student is not updated in the first steps, while the discriminator finds its feet."""


class GameSettings(StageSettings):
    """Stage 2: the student is rewarded with the discriminator's scores."""

    advantage_scale: Literal["std", "none"] = "std"
    """`std` divides the centred rewards of a group by their standard deviation, `none` does not."""
    std_floor: float = Field(default=0.0, ge=0)
    """Least standard deviation to divide by; keeps noise small once a group is all alike."""
    kl_coef: float = Field(default=0.001, ge=0)
    """Weight of the k3 estimate of KL(student || student after warm-up); 0 keeps no reference."""


class RunSettings(Settings):
    """What is written, and how often."""

    checkpoint_every: int = Field(default=50, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """So many of the newest checkpoints are kept."""
    samples_per_step: int = Field(default=1, ge=0)
    """Groups a step written to samples.jsonl as text."""
    log_every: int = Field(default=1, ge=1)
    """Steps between lines on the screen; metrics.jsonl has every step."""


class HardwareSettings(Settings):
    """Where and in which precision the models run."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU when there is one."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "weights"] = "auto"
    """Precision of the matrix products; `auto` is bfloat16 where the device has fast bfloat16,
    `weights` that of the stored weights. Heads and losses are always float32 at least."""


class Recipe(Settings):
    """A complete, validated description of one run."""

    name: str = Field(min_length=1)
    """Shown on the screen and in the reports."""
    output: Path
    """The run folder; it must not hold another run."""
    seed: int = Field(default=0, ge=0)
    """Decides order of data, rollouts and the discriminator's fresh head."""
    method: Literal["gad", "seqkd"] = "gad"
    """`seqkd` is the baseline: warm-up of the student alone, no rollouts, no discriminator."""
    student: StudentSettings
    data: DataSettings
    warmup: WarmupSettings
    game: GameSettings
    discriminator: DiscriminatorSettings = DiscriminatorSettings()
    rollout: RolloutSettings = RolloutSettings()
    batch: BatchSettings = BatchSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    run: RunSettings = RunSettings()
    hardware: HardwareSettings = HardwareSettings()

    @model_validator(mode="after")
    def _can_centre_rewards(self) -> Self:
        if self.method == "gad" and self.game.steps != 0 and self.rollout.group_size < 2:
            raise ValueError(
                f"rollout.group_size must be at least 2 to centre the rewards of a group, "
                f"got {self.rollout.group_size} (set rollout.group_size = 4, say)"
            )
        return self

    @classmethod
    def from_toml(cls, path: str | Path, *, overrides: dict[str, Any] | None = None) -> Recipe:
        """Reads a recipe file; paths in it are relative to the working directory.

        Args:
            path: the file.
            overrides: nested values that replace the file's.

        Raises:
            ConfigError: the file is missing, is not TOML, or does not describe a valid recipe.
        """
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read recipe {path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from error
        return cls.from_values(_merged(values, overrides or {}), source=str(path))

    @classmethod
    def from_values(cls, values: dict[str, Any], *, source: str = "recipe") -> Recipe:
        """Builds a recipe from nested dictionaries, with all problems told in one line.

        Raises:
            ConfigError: an unknown key (with the nearest right one), a wrong type or range.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(f"{source}: {_describe(error, cls)}") from error


def _merged(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Values with overrides laid over them, section by section."""
    result = dict(values)
    for key, value in overrides.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = _merged(result[key], cast("dict[str, Any]", value))
        else:
            result[key] = value
    return result


def _describe(error: ValidationError, root: type[BaseModel]) -> str:
    """One line for all that a validation found: key, what came, what is allowed."""
    return "; ".join(_describe_one(dict(problem), root) for problem in error.errors())


def _describe_one(problem: dict[str, Any], root: type[BaseModel]) -> str:
    path = [str(part) for part in problem["loc"]]
    key, message, came = ".".join(path), str(problem["msg"]), problem.get("input")
    match problem["type"]:
        case "extra_forbidden":
            allowed = _section(root, path[:-1]).model_fields
            near = difflib.get_close_matches(path[-1], allowed, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(allowed)}"
            return f"unknown key {key!r}, {hint}"
        case "missing":
            return f"{key} is missing"
        case "value_error":
            message = message.removeprefix("Value error, ")
            return f"{key}: {message}" if key else message
        case _:
            return f"{key}: {message[:1].lower()}{message[1:]}, got {came!r}"


def _section(root: type[BaseModel], path: list[str]) -> type[BaseModel]:
    """The settings class that stands at a path of keys."""
    for key in path:
        annotation = root.model_fields[key].annotation
        assert isinstance(annotation, type), annotation
        assert issubclass(annotation, BaseModel), annotation
        root = annotation
    return root
