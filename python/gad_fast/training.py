"""A whole run: recipe to data, models, game, validation and the files that stay."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import datasets
import torch
from transformers import PreTrainedConfig
from transformers.utils import logging as transformers_logging

from gad_fast.config import Recipe
from gad_fast.data.just_in_time import ask_while_training
from gad_fast.data.prompt_set import BatchStream, PromptSet, load_prompt_set
from gad_fast.evaluation.validation import Validation, validate
from gad_fast.game.loop import Game, Opponent, play, sampling_of
from gad_fast.game.optim import PlayerOptimizer
from gad_fast.game.plan import Plan, make_plan
from gad_fast.game.symmetry import check_symmetry
from gad_fast.game.warmup import imitate_only, warm_up
from gad_fast.models.discriminator import Discriminator, load_discriminator
from gad_fast.models.loading import Precision, load_config, require_context
from gad_fast.models.student import Student, load_student
from gad_fast.records import EncodedExample
from gad_fast.rollout.engine import RolloutEngine
from gad_fast.rollout.groups import sample_groups
from gad_fast.rollout.reference import ReferenceEngine
from gad_fast.run.checkpoint import Writers, export
from gad_fast.run.display import Display
from gad_fast.run.folder import RunFolder
from gad_fast.run.recorder import Recorder
from gad_fast.text import TextCodec

NUM_SYMMETRY_GROUPS = 4


@dataclass(frozen=True, slots=True)
class Summary:
    """What came of a run."""

    output: Path
    steps: int
    validations: dict[str, Validation]
    """By moment: `start`, `warm-up` and, after a game, `game`."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run reads: all of it checked before anything is written."""

    codec: TextCodec
    config: PreTrainedConfig
    prompts: PromptSet
    batches: Iterable[list[EncodedExample]]
    precision: Precision
    plan: Plan


def train(recipe: Recipe, *, display: Display | None = None) -> Summary:
    """Distils a student as the recipe says.

    Args:
        recipe: what to do.
        display: the screen; by default the terminal.

    Returns:
        Validation figures before, between and after the stages; the models are in
        `recipe.output`, as `student/` and `discriminator/`.

    Raises:
        GadFastError: the recipe does not fit its data or models, or a loss stopped being finite.
        Interrupted: Ctrl-C; a checkpoint was written.
    """
    display = display or Display()
    RunFolder.require_free(recipe.output)
    torch.manual_seed(recipe.seed)
    inputs = load_inputs(recipe)
    show_plan(recipe, inputs, display)
    with _with_responses(recipe, inputs) as inputs:
        game = set_up(recipe, inputs, display)
        with game.recorder:
            return _run(game, inputs)


def dry_run(recipe: Recipe, *, display: Display | None = None) -> Plan:
    """Prints the resolved recipe and the sizes that follow from it; writes nothing."""
    display = display or Display()
    inputs = load_inputs(recipe)
    display.say(recipe.model_dump_json(indent=2))
    show_plan(recipe, inputs, display)
    return inputs.plan


def load_inputs(recipe: Recipe) -> Inputs:
    """Tokenizer, configuration and data of a run.

    Raises:
        GadFastError: something is missing, or does not fit.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    precision = Precision(recipe.hardware)
    config = load_config(recipe.student.model)
    require_context(config, recipe.data, recipe.student.model)
    codec = TextCodec.from_pretrained(recipe.student.model)
    prompts = load_prompt_set(recipe.data, codec)
    batches = BatchStream(prompts.train, batch_size=recipe.batch.prompts_per_step, seed=recipe.seed)
    plan = make_plan(recipe, prompts, config, precision)
    return Inputs(codec, config, prompts, batches, precision, plan)


@contextlib.contextmanager
def _with_responses(recipe: Recipe, inputs: Inputs) -> Generator[Inputs]:
    """Inputs with all responses, or with a teacher that is asked for them while training."""
    if inputs.prompts.is_answered:
        yield inputs
        return
    assert isinstance(inputs.batches, BatchStream), inputs.batches
    with ask_while_training(recipe.data, inputs.prompts, inputs.batches, inputs.codec) as live:
        yield replace(inputs, prompts=live.prompts, batches=live.batches)


def set_up(recipe: Recipe, inputs: Inputs, display: Display) -> Game:
    """Models, optimizers and engine, with the symmetry check; makes the run folder at the end."""
    precision, codec = inputs.precision, inputs.codec
    student = load_student(recipe, precision)
    _say_layout(display, "student", student)
    engine = ReferenceEngine(
        student.model, precision, end_id=codec.end_id, max_sequences=recipe.rollout.max_sequences
    )
    engine.start()
    opponent = None
    writers: Writers = {"student": lambda folder: student.save(folder, codec)}
    if recipe.method == "gad":
        opponent = _opponent(recipe, inputs, engine)
        _say_layout(display, "discriminator", opponent.discriminator)
        writers["discriminator"] = opponent.discriminator.save
    return Game(
        recipe=recipe,
        codec=codec,
        student=student,
        student_optimizer=PlayerOptimizer("student", student.parameters(), recipe.optimizer),
        opponent=opponent,
        engine=engine,
        batches=iter(inputs.batches),
        recorder=Recorder(RunFolder.create(recipe), display, recipe.run, writers),
    )


def _say_layout(display: Display, name: str, player: Student | Discriminator) -> None:
    if not player.shares_prompts:
        display.say(
            f"{name}: a row for each response, since its layers give other numbers when the "
            f"responses of a prompt share it (a state, or a sliding window below data's limits)"
        )


def show_plan(recipe: Recipe, inputs: Inputs, display: Display) -> None:
    """Prints the sizes of a run."""
    plan = inputs.plan
    memory = " + ".join(f"{name} {size:.2f}" for name, size in plan.memory_gib.items())
    rows = [
        ["student", f"{recipe.student.model}, {plan.num_parameters / 1e6:.1f} M parameters"],
        ["runs on", str(inputs.precision)],
        ["prompts", f"{plan.num_train} to train on, {plan.num_validation} to validate on"],
        ["left out", inputs.prompts.describe_left_out()],
        ["steps", f"{plan.warmup_steps} of warm-up, {plan.game_steps} of the game"],
        ["a step", f"{plan.responses_per_step} responses, <= {plan.max_tokens_per_step} tokens"],
        ["memory", f"about {sum(plan.memory_gib.values()):.1f} GiB ({memory})"],
        ["run folder", str(recipe.output)],
    ]
    display.table(recipe.name, ["what", "size"], rows)


def _run(game: Game, inputs: Inputs) -> Summary:
    plan, validations = inputs.plan, {"start": _validate(game, inputs)}
    if game.opponent is None:
        imitate_only(game, plan.warmup_steps)
    else:
        warm_up(game, plan.warmup_steps)
    validations["warm-up"] = _validate(game, inputs)
    if plan.game_steps:
        play(game, plan.game_steps)
        validations["game"] = _validate(game, inputs)
    export(game.recipe.output, game.recorder.writers)
    game.engine.close()
    _show_validations(validations, game)
    return Summary(game.recipe.output, game.steps_done, validations)


def _validate(game: Game, inputs: Inputs) -> Validation:
    """Figures of both players on the held-out prompts, always with the same random numbers."""
    discriminator = game.opponent.discriminator if game.opponent else None
    groups = sample_groups(
        game.engine,
        inputs.prompts.validation,
        group_size=1,
        sampling=game.sampling,
        seed=game.recipe.seed,
        weight_version=game.weight_version,
    )
    result = validate(game.student, discriminator, game.codec, groups, game.recipe)
    line = {"step": game.steps_done, "stage": "validation", **asdict(result)}
    game.recorder.folder.write_metrics(line)
    game.recorder.stop_if_asked(game.steps_done)
    return result


def _show_validations(validations: dict[str, Validation], game: Game) -> None:
    rows = [
        [
            moment,
            f"{v.teacher_nll:.3f}",
            f"{v.rouge_l:.3f}",
            f"{v.length_ratio:.2f}",
            f"{v.truncation:.2f}",
            "-" if v.d_acc is None else f"{v.d_acc:.2f}",
        ]
        for moment, v in validations.items()
    ]
    header = ["after", "teacher NLL", "ROUGE-L", "length ratio", "truncated", "d_acc"]
    game.recorder.display.table("validation", header, rows)
    game.recorder.display.say(f"models, metrics and samples are in {game.recipe.output}")


def _opponent(recipe: Recipe, inputs: Inputs, engine: RolloutEngine) -> Opponent:
    """The discriminator, once it is shown to see nothing but content."""
    discriminator = load_discriminator(recipe, inputs.codec, inputs.precision)
    _check_symmetry(recipe, inputs, engine, discriminator)
    optimizer = PlayerOptimizer("discriminator", discriminator.parameters(), recipe.optimizer)
    return Opponent(discriminator, optimizer)


def _check_symmetry(
    recipe: Recipe, inputs: Inputs, engine: RolloutEngine, discriminator: Discriminator
) -> None:
    # The longest teacher response is among the prompts: cut ones must be alike as well.
    by_length = sorted(inputs.prompts.answered, key=lambda prompt: len(prompt.teacher))
    prompts = [*by_length[: NUM_SYMMETRY_GROUPS - 1], by_length[-1]]
    sampling = sampling_of(recipe)
    groups = sample_groups(
        engine, prompts, group_size=1, sampling=sampling, seed=recipe.seed, weight_version=0
    )
    check_symmetry(discriminator, inputs.codec, groups, sampling)
