"""The command as a user types it: exit codes, one clear line, nothing half-written."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

import tiny
from gad_fast.cli.main import main

COMMAND = [sys.executable, "-c", "from gad_fast.cli.main import main; main()"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def toml(values: dict[str, Any], prefix: str = "") -> str:
    """Writes nested dictionaries as TOML; enough for a recipe."""
    plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
    lines = [f"{key} = {_literal(value)}" for key, value in plain.items()]
    for key in values.keys() - plain.keys():
        lines += [f"[{prefix}{key}]", toml(values[key], f"{prefix}{key}.")]
    return "\n".join(lines)


def _literal(value: Any) -> str:
    return repr(value) if isinstance(value, int | float) else f'"{value}"'


def write_recipe(folder: Path, **sections: Any) -> Path:
    path = folder / "recipe.toml"
    path.write_text(toml(tiny.values(folder, **sections)))
    return path


Result = subprocess.CompletedProcess[str]


def run_apart(*words: str | Path) -> Result:
    """In a process of its own, as from a shell."""
    command = [*COMMAND, *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT, timeout=100, check=False
    )


def run(*words: str | Path) -> Result:
    """In this process: a new one imports torch for seconds."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(word) for word in words])
        except SystemExit as stop:
            code = int(stop.code or 0)
            return Result(words, code, out.getvalue(), err.getvalue())
    raise AssertionError("main always exits")


def assert_user_error(result: Result, message: str) -> None:
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("gad-fast: ")
    assert len(result.stderr.splitlines()) == 1, result.stderr


def test_help_is_quick_and_names_the_commands() -> None:
    started = time.perf_counter()
    result = run_apart("--help")
    assert time.perf_counter() - started < 3  # 0.2 s on a quiet machine
    assert result.returncode == 0
    assert "train RECIPE.toml" in result.stdout
    assert "--rollout.group-size" in run("train", "--help").stdout


def test_train_distils_and_says_where_the_result_is(tmp_path: Path) -> None:
    result = run_apart("train", write_recipe(tmp_path), "--game.steps", "2", "--seed", "3")
    assert result.returncode == 0, result.stderr
    assert "game 2/2" in result.stdout
    assert "validation" in result.stdout
    assert (tmp_path / "run/student/model.safetensors").is_file()
    assert '"seed": 3' in (tmp_path / "run/recipe.json").read_text()


def test_a_dry_run_prints_recipe_and_sizes_and_writes_nothing(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    result = run("train", recipe, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert '"group_size": 3' in result.stdout
    assert "3 of warm-up, 3 of the game" in result.stdout
    assert "12 responses, <= 72 tokens" in result.stdout
    assert "GiB" in result.stdout
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rollout": {"group_sise": 2}}, "unknown key 'rollout.group_sise', did you mean"),
        (
            {"rollout": {"temperature": "hot"}},
            "rollout.temperature: input should be a valid number",
        ),
        ({"rollout": {"group_size": 1}}, "rollout.group_size must be at least 2"),
        ({"data": {"train": "nowhere.jsonl"}}, "data file nowhere.jsonl is not there"),
        ({"data": {"max_prompt_tokens": 2}}, "all 22 prompts are over data.max_prompt_tokens"),
        ({"data": {"max_prompt_tokens": 60}}, "is 66, but"),
        ({"batch": {"prompts_per_step": 500}}, "batch.prompts_per_step is 500, but only"),
    ],
)
def test_a_mistake_in_the_recipe_is_one_line_and_exit_2(
    tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    assert_user_error(run("train", write_recipe(tmp_path, **sections)), message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("player", ["student", "discriminator"])
def test_a_model_that_is_nowhere_is_one_line_and_exit_2(tmp_path: Path, player: str) -> None:
    recipe = write_recipe(tmp_path, **{player: {"model": "no/such-model"}})
    assert_user_error(run_apart("train", recipe), "cannot load a model from no/such-model")
    assert not (tmp_path / "run").exists()


def test_a_mistake_in_a_flag_is_exit_2_as_well(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    assert_user_error(run("train", recipe, "--rollout.group-size", "1"), "must be at least 2")
    result = run("train", recipe, "--rollout.temperature=0")
    assert_user_error(result, "rollout.temperature: input should be greater than 0, got 0")
    result = run("train", recipe, "--rollout.group-sise", "4")
    assert_user_error(result, "unknown key 'rollout.group_sise', did you mean 'group_size'?")
    assert_user_error(run("train", recipe, "--seed"), "flags come as --key value or --key=value")
    assert_user_error(run("train", recipe, "seed", "3"), "flags come as --key value")
    assert_user_error(run("train", "--dry-run"), "train needs a recipe")
    assert_user_error(run("trian", recipe), "unknown command 'trian', allowed: train")
    assert_user_error(run("train", tmp_path / "nowhere.toml"), "cannot read recipe")
    assert not (tmp_path / "run").exists()


def test_a_row_without_a_teacher_response_is_named(tmp_path: Path) -> None:
    rows = tiny.rows()
    rows[16]["teacher_response"] = None
    recipe = write_recipe(tmp_path)
    tiny.write_rows(tmp_path / "rows.jsonl", rows)
    assert_user_error(run("train", recipe), "row 17 of")
    assert not (tmp_path / "run").exists()


def test_a_student_without_template_or_eos_is_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    (tmp_path / "student/chat_template.jinja").unlink()
    assert_user_error(run("train", recipe), "has no chat template")
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "student")
    assert isinstance(tokenizer.backend_tokenizer, Tokenizer)
    assert_user_error(run("train", recipe), "has no EOS token")


def test_a_dry_run_refuses_what_a_run_would(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, batch={"prompts_per_step": 500})
    assert_user_error(run("train", recipe, "--dry-run"), "batch.prompts_per_step is 500, but only")


def test_a_used_run_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, method="seqkd")
    assert run("train", recipe).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert_user_error(run("train", recipe), "already holds the finished run 'tiny'")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_a_run_that_was_stopped_is_gone_on_with(tmp_path: Path) -> None:
    stop = {"truncation": {"threshold": 0.0, "window": 2, "action": "stop"}}
    recipe = write_recipe(tmp_path, health=stop)
    assert_user_error(run("train", recipe), "stopped at step 2, truncation is")
    fresh = run("train", recipe, "--fresh")
    assert_user_error(fresh, "already holds the run 'tiny'")
    assert_user_error(run("train", recipe, "--seed", "5"), "seed: 0 -> 5")
    both = run("train", recipe, "--fresh", "--resume")
    assert_user_error(both, "give one of them")
    result = run("train", recipe, "--health.truncation.action", "warn", "--resume")
    assert result.returncode == 0, result.stderr
    assert "going on with the run" in result.stdout
    assert "from step-000002" in result.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_exits_130_with_a_loadable_checkpoint(
    tmp_path: Path, number: signal.Signals
) -> None:
    recipe = write_recipe(tmp_path, warmup={"steps": 100_000, "discriminator_only_steps": 0})
    process = subprocess.Popen(
        [*COMMAND, "train", str(recipe)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("warmup"):
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped at step" in errors
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    assert tiny.LlamaForCausalLM.from_pretrained(checkpoint / "student").num_parameters() > 0
    assert (checkpoint / "COMPLETE").is_file()
