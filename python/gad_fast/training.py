"""A whole run: recipe to data, models, game, validation and the files that stay."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import datasets
from transformers import PreTrainedConfig, set_seed
from transformers.utils import logging as transformers_logging

from gad_fast.config import Recipe
from gad_fast.data.just_in_time import ask_while_training
from gad_fast.data.prompt_set import BatchStream, PromptSet, load_prompt_set
from gad_fast.errors import CheckpointError
from gad_fast.evaluation.validation import Validation, validate
from gad_fast.game.gates import pass_gates
from gad_fast.game.loop import Figures, Game, Opponent, plan_of, play
from gad_fast.game.optim import PlayerOptimizer, require_optimizer
from gad_fast.game.plan import Plan, make_plan
from gad_fast.game.state import checkpoint_bytes, restore
from gad_fast.game.symmetry import check_symmetry
from gad_fast.game.warmup import imitate_only, warm_up
from gad_fast.models.discriminator import Discriminator, load_discriminator
from gad_fast.models.layers import require_compiler
from gad_fast.models.loading import Precision, load_config, require_context
from gad_fast.models.micro_batches import require_budget
from gad_fast.models.student import Student, load_student
from gad_fast.records import EncodedExample
from gad_fast.rollout.endings import Endings
from gad_fast.rollout.engine import Capacity, RolloutEngine
from gad_fast.rollout.groups import sample_groups
from gad_fast.rollout.making import start_engine
from gad_fast.run.checkpoint import read_state, require_space, set_aside_after
from gad_fast.run.complete import Writers, export
from gad_fast.run.display import Display
from gad_fast.run.folder import RunFolder
from gad_fast.run.health import Health
from gad_fast.run.recorder import Recorder
from gad_fast.run.resume import Start, data_digest, find_start
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
    data_digest: str


def train(recipe: Recipe, *, display: Display | None = None, resume: bool | None = None) -> Summary:
    """Distils a student as the recipe says.

    Args:
        recipe: what to do.
        display: the screen; by default the terminal.
        resume: True goes on with the run in `recipe.output`, False starts anew in an empty folder,
            None does what the folder is fit for.

    Returns:
        Validation figures before, between and after the stages; the models are in
        `recipe.output`, as `student/` and `discriminator/`.

    Raises:
        GadFastError: the recipe does not fit its data, its models or the run in its folder, a loss
            stopped being finite, a checkpoint could not be written, or an alarm stopped the run.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
    """
    display = display or Display()
    start = find_start(recipe, resume=resume, say=display.say)
    set_seed(recipe.seed % 2**32)
    inputs = load_inputs(recipe)
    _require_same_data(inputs, start)
    show_plan(recipe, inputs, display)
    with _with_responses(recipe, inputs) as inputs:
        game = set_up(recipe, inputs, display, start)
        with game.recorder:
            _go_on(game, start)
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
    require_optimizer(recipe.optimizer, precision.device)
    require_compiler(recipe.hardware, precision.device)
    config = load_config(recipe.student.model)
    require_context(config, recipe.data, recipe.student.model)
    codec = TextCodec.from_pretrained(recipe.student.model)
    prompts = load_prompt_set(recipe.data, codec)
    _require_budget(recipe, prompts, shares_prompts=True)  # what it takes at least
    batches = BatchStream(prompts.train, batch_size=recipe.batch.prompts_per_step, seed=recipe.seed)
    plan = make_plan(recipe, prompts, config, precision)
    data = data_digest((*prompts.train, *prompts.validation))
    return Inputs(codec, config, prompts, batches, precision, plan, data)


@contextlib.contextmanager
def _with_responses(recipe: Recipe, inputs: Inputs) -> Generator[Inputs]:
    """Inputs with all responses, or with a teacher that is asked for them while training."""
    if inputs.prompts.is_answered:
        yield inputs
        return
    assert isinstance(inputs.batches, BatchStream), inputs.batches
    with ask_while_training(recipe.data, inputs.prompts, inputs.batches, inputs.codec) as live:
        yield replace(inputs, prompts=live.prompts, batches=live.batches)


def set_up(recipe: Recipe, inputs: Inputs, display: Display, start: Start) -> Game:
    """Models, optimizers and engine, with the symmetry check; opens the run folder at the end."""
    precision, codec = inputs.precision, inputs.codec
    student = load_student(recipe, precision)
    _say_layout(display, "student", student)
    engine = _engine(recipe, student, codec, display)
    opponent = None
    if recipe.method == "gad":
        opponent = _opponent(recipe, inputs, student, engine)
        _say_layout(display, "discriminator", opponent.discriminator)
        shares_prompts = opponent.discriminator.shares_prompts
        _require_budget(recipe, inputs.prompts, shares_prompts=shares_prompts)
    logs = {} if start.checkpoint is None else read_state(start.checkpoint)["logs"]
    return Game(
        recipe=recipe,
        codec=codec,
        student=student,
        student_optimizer=PlayerOptimizer(
            "student", student.trainable_parameters(), recipe.optimizer
        ),
        opponent=opponent,
        engine=engine,
        batches=iter(inputs.batches),
        recorder=Recorder(RunFolder(recipe, logs), display, recipe.run),
        health=Health(recipe.health),
        data_digest=inputs.data_digest,
        validate=lambda game: measure(game, inputs),
    )


def _require_budget(recipe: Recipe, prompts: PromptSet, *, shares_prompts: bool) -> None:
    """Raises ConfigError when a group of these prompts could grow over a micro-batch.

    The discriminator's groups are the largest: they hold the teacher's response as well.
    """
    if recipe.method != "gad":
        return
    limit = recipe.data.max_response_tokens
    num_rollouts = recipe.rollout.group_size
    longest = max(len(prompt.prompt_ids) for prompt in (*prompts.train, *prompts.validation))
    num_tokens = longest + (num_rollouts + 1) * limit
    if not shares_prompts:
        num_tokens = (num_rollouts + 1) * (longest + limit)
    require_budget(num_tokens, recipe.batch.tokens_per_micro_batch)


def _require_same_data(inputs: Inputs, start: Start) -> None:
    if start.checkpoint is not None and read_state(start.checkpoint)["data"] != inputs.data_digest:
        raise CheckpointError(
            f"the data is not what {start.checkpoint.name} was trained on (put the rows and the "
            f"tokenizer back, or start anew with another --output)"
        )


def _go_on(game: Game, start: Start) -> None:
    """Takes the game to where its run has got to, or checks that its checkpoints will fit."""
    require_space(game.recipe.output, checkpoint_bytes(game))
    if not start.keeps_rollouts:
        game.recorder.journal.clear()
    if start.checkpoint is not None:
        restore(game, start.checkpoint)
    set_aside_after(game.recipe.output, game.steps_done)


def _engine(recipe: Recipe, student: Student, codec: TextCodec, display: Display) -> RolloutEngine:
    settings = recipe.rollout
    return start_engine(
        settings.engine,
        student.model,
        student.precision,
        endings=Endings(codec.end_id),
        capacity=Capacity(
            settings.max_sequences, settings.max_cached_tokens, recipe.data.max_tokens
        ),
        say=display.say,
    )


def _say_layout(display: Display, name: str, player: Student | Discriminator) -> None:
    if not player.shares_prompts:
        display.say(
            f"{name}: a row for each response, since its layers give other numbers when the "
            f"responses of a prompt share it (they keep a state, or attend in a way of their own)"
        )


def show_plan(recipe: Recipe, inputs: Inputs, display: Display) -> None:
    """Prints the sizes of a run."""
    plan = inputs.plan
    known = {name: size for name, size in plan.memory_gib.items() if not math.isnan(size)}
    unknown = "".join(f" + {name} unknown" for name in plan.memory_gib.keys() - known.keys())
    memory = " + ".join(f"{name} {size:.2f}" for name, size in known.items()) + unknown
    rows = [
        ["student", f"{recipe.student.model}, {plan.num_parameters / 1e6:.1f} M parameters"],
        ["runs on", str(inputs.precision)],
        ["prompts", f"{plan.num_train} to train on, {plan.num_validation} to validate on"],
        ["left out", inputs.prompts.describe_left_out()],
        ["steps", f"{plan.warmup_steps} of warm-up, {plan.game_steps} of the game"],
        ["a step", f"{plan.responses_per_step} responses, <= {plan.max_tokens_per_step} tokens"],
        [
            "memory",
            f"about {sum(known.values()):.1f} GiB at the peak ({memory}), beside "
            f"Python, its libraries and a checkpoint while it is written",
        ],
        ["run folder", str(recipe.output)],
    ]
    display.table(recipe.name, ["what", "size"], rows)


def _run(game: Game, inputs: Inputs) -> Summary:
    plan = inputs.plan
    _validate(game, inputs, "start")
    if game.stage in ("", "warmup"):
        (imitate_only if game.opponent is None else warm_up)(game, plan.warmup_steps)
    _validate(game, inputs, "warm-up")
    if plan.game_steps:
        if game.stage != "game":
            pass_gates(game, lambda: measure(game, inputs))
        play(game, plan.game_steps)
        _validate(game, inputs, "game")
    return _finish(game)


def _finish(game: Game) -> Summary:
    """Writes the models, and marks the run as finished."""
    output, opponent = game.recipe.output, game.opponent
    writers: Writers = {"student": lambda folder: game.student.save(folder, game.codec)}
    if opponent is not None:
        writers["discriminator"] = opponent.discriminator.save
    game.recorder.wait()
    export(output, writers)
    game.engine.close()
    game.recorder.folder.finish({"steps": game.steps_done, "validations": game.validations})
    game.recorder.journal.clear()
    validations = {moment: Validation(**v) for moment, v in game.validations.items()}
    _show_validations(validations, game)
    return Summary(output, game.steps_done, validations)


def _validate(game: Game, inputs: Inputs, moment: str) -> None:
    """Figures at a moment between stages, unless the run has them from before it was cut off."""
    if moment not in game.validations:
        game.validations[moment] = measure(game, inputs)
        game.recorder.stop_if_asked(game.steps_done, game.snapshot)


def measure(game: Game, inputs: Inputs) -> Figures:
    """Figures of both players on the held-out prompts, always with the same random numbers."""
    known = game.validation_now()
    if known is not None:
        return known
    discriminator = game.opponent.discriminator if game.opponent else None
    game.student.activate()
    groups = sample_groups(
        game.engine,
        inputs.prompts.validation,
        plan_of(game.recipe, group_size=1, seed=game.recipe.seed, version=game.weight_version),
    )
    figures = asdict(validate(game.student, discriminator, game.codec, groups, game.recipe))
    line = {"step": game.steps_done, "stage": "validation", **figures}
    game.recorder.folder.write_metrics(line)
    game.note_validation(figures)
    return figures


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


def _opponent(recipe: Recipe, inputs: Inputs, student: Student, engine: RolloutEngine) -> Opponent:
    """The discriminator, once it is shown to see nothing but content."""
    discriminator = load_discriminator(recipe, student, inputs.codec, inputs.precision)
    _check_symmetry(recipe, inputs, student, engine, discriminator)
    optimizer = PlayerOptimizer(
        "discriminator", discriminator.trainable_parameters(), recipe.optimizer
    )
    return Opponent(discriminator, optimizer)


def _check_symmetry(
    recipe: Recipe,
    inputs: Inputs,
    student: Student,
    engine: RolloutEngine,
    discriminator: Discriminator,
) -> None:
    # The longest teacher response is among the prompts: cut ones must be alike as well.
    by_length = sorted(inputs.prompts.answered, key=lambda prompt: len(prompt.teacher))
    prompts = [*by_length[: NUM_SYMMETRY_GROUPS - 1], by_length[-1]]
    plan = plan_of(recipe, group_size=1, seed=recipe.seed, version=0)
    student.activate()
    groups = sample_groups(engine, prompts, plan)
    check_symmetry(discriminator, inputs.codec, groups, plan.sampling)
