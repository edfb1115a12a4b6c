"""`gad-fast generate` as a user types it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from gad_fast.cli.main import main
from gad_fast.rollout import room
from gad_fast.text import TextCodec

PROMPTS = [{"prompt": "red sun"}, {"prompt": "one two three"}, {"prompt": "sea"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generate")
    tiny.save_student(path / "student")
    tiny.write_rows(path / "prompts.jsonl", PROMPTS)
    return path


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["generate", *map(str, words)])
    return int(stop.value.code or 0)


def generate(folder: Path, name: str, *flags: object) -> list[dict[str, Any]]:
    output = folder / name
    files = ("--prompts", folder / "prompts.jsonl", "--output", output)
    assert run(folder / "student", *files, "--max-tokens", 6, *flags) == 0
    assert not output.with_name(name + ".part").exists()
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    return sorted(lines, key=lambda line: line["index"])


def test_engines_give_the_same_greedy_answers_with_the_models_own_logprobs(folder: Path) -> None:
    by_engine = [
        generate(folder, f"{engine}.jsonl", "--temperature", "0", "--engine", engine)
        for engine in ("static", "continuous", "reference")
    ]
    codec = TextCodec.from_pretrained(folder / "student")
    model = AutoModelForCausalLM.from_pretrained(folder / "student").eval()
    chats = [[{"role": "user", "content": row["prompt"]}] for row in PROMPTS]
    prompts = codec.encode_chats(chats, add_generation_prompt=True)  # pyright: ignore[reportArgumentType]
    for index, prompt in enumerate(prompts):
        ids, total = prompt.tolist(), 0.0
        for _ in range(6):
            with torch.no_grad():
                logprobs = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids.append(int(logprobs.argmax()))
            total += float(logprobs.max())
            if ids[-1] == codec.end_id:
                break
        new = ids[len(prompt) :]
        for lines in by_engine:
            (answer,) = lines[index]["answers"]
            assert answer["text"] == codec.decode_batch([np.array(new, dtype=np.int32)])[0]
            assert answer["num_tokens"] == len(new)
            assert answer["finish_reason"] == ("end" if new[-1] == codec.end_id else "length")
            assert answer["logprob"] is None or abs(answer["logprob"] - total) < 1e-4
        assert by_engine[0][index]["messages"] == chats[index]


def test_answers_repeat_with_the_seed_in_any_number_of_rows(folder: Path) -> None:
    first = generate(folder, "first.jsonl", "--n", "4", "--seed", "3")
    again = generate(folder, "again.jsonl", "--n", "4", "--seed", "3", "--max-sequences", "2")
    texts = [[[answer["text"] for answer in line["answers"]] for line in lines]
             for lines in (first, again)]  # fmt: skip
    assert texts[0] == texts[1]
    assert [len(answers) for answers in texts[0]] == [4, 4, 4]
    assert len({text for answers in texts[0] for text in answers}) > 6


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it(folder: Path) -> None:
    free = generate(folder, "free.jsonl", "--temperature", "0")
    words = free[0]["answers"][0]["text"].split()
    stopped = generate(folder, "stopped.jsonl", "--temperature", "0", "--stop", words[1])
    answer = stopped[0]["answers"][0]
    assert answer["text"].split() == words[: words.index(words[1])]
    assert answer["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--max-tokens", "0", "max_tokens: input should be greater than or equal to 1, got 0"),
        ("--temperature", "-1", "temperature: input should be greater than or equal to 0"),
        ("--engine", "vllm", "engine: input should be 'static', 'continuous' or 'reference'"),
        ("--max-tokens", "62", "the model reads at most 64 together"),
        ("--prompts", "none.jsonl", "none.jsonl is not there"),
        ("--prompt-column", "text", "has no column 'text'"),
        ("--output", "answers.csv", "output must end in .jsonl, got answers.csv"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_file(
    folder: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str, message: str
) -> None:
    output = folder / "never.jsonl"
    right = {"--prompts": folder / "prompts.jsonl", "--output": output, "--max-tokens": 6}
    flags = [word for pair in (right | {flag: value}).items() for word in pair]
    assert run(folder / "student", *flags) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.startswith("gad-fast: ")
    assert len(told.splitlines()) == 1
    assert not list(folder.glob("never*"))


def test_a_failure_before_the_first_answer_leaves_no_file(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--prompts", folder / "prompts.jsonl", "--output", folder / "new.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(room, "_free_bytes", lambda _device: 10_000)
        assert run(folder / "student", *flags, "--max-tokens", 6, "--n", 40) == 2
    assert "rollouts fit (set max_sequences = " in capsys.readouterr().err
    assert not list(folder.glob("new*"))
    assert run(folder / "student", *flags, "--max-tokens", 6) == 0


def test_an_output_that_is_there_is_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder / "kept.jsonl"
    output.write_text("mine")
    assert run(folder / "student", "--prompts", folder / "prompts.jsonl", "--output", output) == 2
    assert "kept.jsonl is there already" in capsys.readouterr().err
    assert output.read_text() == "mine"
