"""`gad-fast bench` as a user types it, on small sizes."""

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from rich.console import Console
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny
from gad_fast.bench import (
    buffer,
    kernels,
    machine,
    packing,
    report,
    step,
    tokenizer,
    trainer_passes,
)
from gad_fast.bench.report import Comparison, Report
from gad_fast.cli.main import main
from gad_fast.errors import ConfigError


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *map(str, words)])
    return int(stop.value.code or 0)


def byte_tokenizer(folder: Path) -> Path:
    """Has a token for every byte, so for any English."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE({letter: id_ for id_, letter in enumerate(alphabet)}, [])
    core = tokenizers.Tokenizer(model)
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder / "model")
    return folder / "model"


def result(path: Path) -> dict:
    record = json.loads(path.read_text())
    assert record["is_quick"]
    assert record["hardware"]["num_cores"] >= 1
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    for row in record["comparisons"]:
        assert all(ratio > 0 for ratio in row["ratios"])
        assert row["is_met"] is None
    return record


@pytest.mark.parametrize("name", ["packing", "buffer", "cache"])
def test_a_benchmark_shows_its_table_and_writes_every_sample(name, tmp_path, capsys):
    output = tmp_path / "result.json"
    assert run(name, "--quick", "--output", output) == 0
    shown = capsys.readouterr().out
    assert "against" in shown
    assert "a quick run" in shown
    record = result(output)
    assert record["benchmark"] == name
    assert len(record["comparisons"]) >= 2
    assert record["samples"]
    assert list(tmp_path.iterdir()) == [output]


def test_the_tokenizer_is_compared_on_any_model_folder(tmp_path, monkeypatch):
    folder, output = byte_tokenizer(tmp_path), tmp_path / "result.json"
    monkeypatch.delenv("GAD_FAST_NUM_THREADS", raising=False)
    monkeypatch.setenv("RAYON_NUM_THREADS", "7")
    assert run("tokenizer", "--quick", "--model", folder, "--output", output) == 0
    rows = result(output)["comparisons"]
    assert [row["peer"] for row in rows] == ["transformers", "tokenizers"] * 3
    # The threads of the caller are as they were.
    assert "GAD_FAST_NUM_THREADS" not in os.environ
    assert os.environ["RAYON_NUM_THREADS"] == "7"


def test_rollouts_are_compared_on_any_student(tmp_path, capsys):
    output = tmp_path / "result.json"
    folder = tmp_path / "student"
    tiny.save_student(folder, max_position_embeddings=512)
    assert run("rollouts", "--quick", "--model", folder, "--output", output) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "with nothing but the products of its decode steps" in shown
    record = result(output)
    peers = [row["peer"] for row in record["comparisons"]]
    assert peers == ["transformers generate", "continuous batching"] * 2
    for (turn,) in record["samples"].values():
        assert turn.keys() == {"static", "continuous", "reference"}
        assert all(4 <= sample["tokens"] <= 2 * 2 * 6 for sample in turn.values())


class _Completions(BaseHTTPRequestHandler):
    """Serves a model that answers every prompt with its own first tokens, as vLLM would."""

    gives_ids = True

    def do_GET(self) -> None:
        self._say({"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "vllm"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (asked["model"], asked["return_token_ids"]) == ("m", True)
        ids = asked["prompt"][: asked["max_tokens"]]
        choice: dict[str, Any] = {"text": "", "finish_reason": "length", "logprobs": None}
        if self.gives_ids:
            choice["token_ids"] = ids
        choices = [{**choice, "index": index} for index in range(asked["n"])]
        self._say({"id": "1", "object": "text_completion", "created": 1, "choices": choices})

    def log_message(self, *_: Any) -> None:
        pass

    def _say(self, answer: dict[str, Any]) -> None:
        body = json.dumps({"model": "m", **answer}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Completions) as http:
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield f"http://127.0.0.1:{http.server_port}/v1"
        http.shutdown()


def test_a_server_of_the_same_model_is_one_more_peer(tmp_path, server, monkeypatch, capsys):
    output, folder = tmp_path / "result.json", tmp_path / "student"
    tiny.save_student(folder, max_position_embeddings=512)
    words = ("rollouts", "--quick", "--model", folder, "--server", server)
    assert run(*words, "--output", output) == 0
    record = result(output)
    assert [row["peer"] for row in record["comparisons"]][2::3] == ["vllm over HTTP"] * 2
    for (turn,) in record["samples"].values():
        assert (turn["server"]["tokens"], turn["server"]["longest"]) == (2 * 2 * 6, 6)
    monkeypatch.setattr(_Completions, "gives_ids", False)
    capsys.readouterr()
    assert run(*words) == 2
    assert "gives no token ids (vLLM does from 0.10.2 on)" in capsys.readouterr().err
    assert run(*words[:-1], "http://127.0.0.1:1/v1") == 2
    assert "no model is served at http://127.0.0.1:1/v1" in capsys.readouterr().err


def test_kernels_are_measured_in_processes_of_their_own(tmp_path, monkeypatch):
    cases = {name: kernels.CASES[name] for name in ("naive_from_logits", "token_logprobs")}
    monkeypatch.setattr(kernels, "CASES", cases)
    monkeypatch.setattr(kernels, "DTYPES", {"float32": torch.float32})
    output = tmp_path / "result.json"
    assert run("kernels", "--quick", "--output", output) == 0
    record = result(output)
    assert [row["of"] for row in record["comparisons"]] == ["time", "memory"]
    (turn,) = record["samples"]["float32"]
    assert turn["token_logprobs"]["seconds"] > 0


def test_steps_are_measured_in_processes_of_their_own(tmp_path, monkeypatch):
    tiny.save_student(tmp_path / "student")
    variants = {name: trainer_passes.VARIANTS[name] for name in ("here", "official")}
    monkeypatch.setattr(step, "VARIANTS", variants)
    monkeypatch.setattr(step, "GOALS", {"float32": 2.5})
    output = tmp_path / "result.json"
    assert run("step", "--quick", "--model", tmp_path / "student", "--output", output) == 0
    record = result(output)
    assert [(row["peer"], row["of"]) for row in record["comparisons"]] == [
        ("official", "speed"),
        ("official", "memory"),
    ]
    (turn,) = record["samples"]["float32"]
    for sample in turn.values():
        assert sample["discriminator"] + sample["student"] == pytest.approx(sample["step"])
        assert 0.1 < sample["peak_gib"] < 4


def test_a_peer_that_is_not_installed_is_said_and_left_out(monkeypatch, capsys):
    monkeypatch.setattr(packing, "find_spec", lambda _: None)
    assert run("packing", "--quick") == 0
    shown = capsys.readouterr().out
    assert "TRL is not installed, and left out (pip install trl)" in shown
    assert "TRL pack_dataset" not in shown


def test_sides_that_disagree_are_not_timed(monkeypatch):
    monkeypatch.setattr(
        packing, "pack_in_python", lambda sizes, _: [[i] for i in range(len(sizes))]
    )
    with pytest.raises(AssertionError):
        packing.run(quick=True)
    ours = buffer.with_buffer(buffer.samples(2))
    theirs = buffer.with_lists([sample.as_lists() for sample in buffer.samples(2)])
    buffer.check_equal(ours, theirs)
    theirs[0][4].neg_()
    with pytest.raises(AssertionError):
        buffer.check_equal(ours, theirs)


def test_ids_that_disagree_are_not_timed(tmp_path):
    sides = tokenizer.sides(byte_tokenizer(tmp_path))
    assert tokenizer.check_equal(sides, ["one text", "another"]) > 0
    with pytest.raises(AssertionError):
        tokenizer.check_equal(
            {**sides, "transformers": lambda texts: [[0] for _ in texts]}, ["a b"]
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: BENCHMARK"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["packing", "--fast"], "unrecognized arguments: --fast"),
        (["packing", "--output", "result.txt"], "must name a .json file, got result.txt"),
        (["packing", "--output", "nowhere/result.json"], "its folder is not there"),
        (["tokenizer"], "required: --model"),
        (["rollouts"], "required: --model"),
        (["rollouts", "--model", "nowhere"], "nowhere"),
        (["tokenizer", "--model", "nowhere"], "there is no tokenizer.json in nowhere"),
        (["step"], "required: --model"),
        (["step", "--model", "nowhere", "--turns", "0"], "'0' is no number of turns (1 or more)"),
        (["step", "--model", "nowhere"], "there is no config.json in nowhere"),
        (["cache", "--folder", "nowhere"], "there is no folder nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_goals_bound_speed_from_below_and_all_else_from_above():
    ratios = [1.0, 9.0, 3.0]
    assert Comparison("ours", "peer", ratios).is_met is None
    assert Comparison("ours", "peer", ratios, goal=3.0).is_met is True
    assert Comparison("ours", "peer", ratios, goal=3.1).is_met is False
    assert Comparison("ours", "peer", ratios, of="bytes", goal=3.0).is_met is True
    assert Comparison("ours", "peer", ratios, of="bytes", goal=2.9).is_met is False


def test_a_missed_goal_is_in_the_table_and_in_the_file(tmp_path, capsys):
    rows = [Comparison("ours", "peer", [2.0, 4.0], goal=10.0)]
    found = Report("name", "question?", False, {}, rows, samples=[])
    report.show(found, Console())
    assert ">= 10, missed" in capsys.readouterr().out
    report.write(found, tmp_path / "result.json")
    (row,) = json.loads((tmp_path / "result.json").read_text())["comparisons"]
    assert row["median"] == 3.0
    assert row["is_met"] is False


def test_an_output_in_a_folder_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ConfigError, match="must name a"):
        report.check_output(tmp_path / "folder.json")


def test_the_commit_is_that_of_the_package_and_of_no_repository_around_it(tmp_path, monkeypatch):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-C", str(tmp_path)]
    (tmp_path / "machine.py").write_text("")
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    for command in (["init"], ["commit", "--allow-empty", "-m", "a"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    assert machine.commit() == {"commit": None, "is_changed": None}
    for command in (["add", "."], ["commit", "-m", "b"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    found = machine.commit()
    assert len(found["commit"]) == 40
    assert found["is_changed"] is False
    (tmp_path / "machine.py").write_text("changed")
    assert machine.commit() == {**found, "is_changed": True}
