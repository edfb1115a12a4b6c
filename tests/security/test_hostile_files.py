"""Models, tokenizers, checkpoints and data from elsewhere: none runs code, none leads elsewhere."""

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import tiny
from gad_fast import train
from gad_fast.data import reading
from gad_fast.errors import CheckpointError, DataError, GadFastError, Interrupted, ModelError
from gad_fast.game.loop import Step
from gad_fast.run.complete import COMPLETE, problem


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


@pytest.fixture
def alarm(tmp_path: Path) -> Path:
    """A path that hostile code would make."""
    return tmp_path / "code-was-run"


def add_code(folder: Path, alarm: Path, config: str, classes: dict[str, Any]) -> None:
    """Gives a model or tokenizer a class of its own, in a file that comes with it."""
    code = f"import os\nos.mkdir({str(alarm)!r})\nclass Own: pass\n"
    (folder / "hostile.py").write_text(code)
    values = json.loads((folder / config).read_text())
    (folder / config).write_text(json.dumps({**values, "auto_map": classes}))


@pytest.mark.parametrize("is_known", [True, False])
def test_code_that_comes_with_a_model_is_not_run(
    tmp_path: Path, alarm: Path, is_known: bool
) -> None:
    """A known architecture loads as transformers' own; an unknown one is refused, unasked."""
    recipe = tiny.recipe(tmp_path)
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    add_code(tmp_path / "student", alarm, "config.json", dict.fromkeys(names, "hostile.Own"))
    if is_known:
        assert train(recipe).steps == 6
    else:
        path = tmp_path / "student/config.json"
        path.write_text(path.read_text().replace('"llama"', '"hostile"'))
        with pytest.raises(ModelError, match="cannot load a model from"):
            train(recipe)
    assert not alarm.exists()


def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path: Path, alarm: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    classes = {"AutoTokenizer": ["hostile.Own", "hostile.Own"]}
    add_code(tmp_path / "student", alarm, "tokenizer_config.json", classes)
    with_code = tmp_path / "student/tokenizer_config.json"
    values = {**json.loads(with_code.read_text()), "tokenizer_class": "Own"}
    with_code.write_text(json.dumps(values))
    try:
        train(recipe)
    except GadFastError as error:
        assert "tokenizer" in str(error)  # noqa: PT017 - refusing is as good as ignoring
    assert not alarm.exists()


def test_a_chat_template_reaches_nothing_outside_of_itself(tmp_path: Path, alarm: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    command = f"mkdir {alarm}"
    escape = "{{ cycler.__init__.__globals__.os.system(" + repr(command) + ") }}"
    (tmp_path / "student/chat_template.jinja").write_text(escape)
    with pytest.raises(GadFastError, match="chat template"):
        train(recipe)
    assert not alarm.exists()


@pytest.mark.parametrize("side", ["student", "discriminator"])
def test_pickled_weights_are_refused(tmp_path: Path, alarm: Path, side: str) -> None:
    folder = tmp_path / "pickled"
    tiny.save_student(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Bomb(alarm)}))
    with pytest.raises(ModelError, match="cannot load a model from"):
        train(tiny.recipe(tmp_path, **{side: {"model": str(folder)}}))
    assert not alarm.exists()


def stopped_run(folder: Path) -> Path:
    """A run that was left after step 1, with its checkpoint."""

    def leave(self: Step) -> Any:
        del self
        raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "imitate", leave)
        with pytest.raises(Interrupted):
            train(tiny.recipe(folder, run={"checkpoint_every_steps": 1}))
    return folder / "run/checkpoints/step-000001"


def test_a_pickle_in_the_place_of_a_checkpoints_tensors_is_passed_over(
    tmp_path: Path, alarm: Path
) -> None:
    checkpoint = stopped_run(tmp_path)
    tensors = checkpoint / "student_optimizer/tensors.safetensors"
    tensors.write_bytes(pickle.dumps(Bomb(alarm)))
    assert train(tiny.recipe(tmp_path, run={"checkpoint_every_steps": 1})).steps == 6
    assert not alarm.exists()


def test_a_pickle_with_the_right_hash_is_refused_all_the_same(tmp_path: Path, alarm: Path) -> None:
    checkpoint = stopped_run(tmp_path)
    name = "student_optimizer/tensors.safetensors"
    (checkpoint / name).write_bytes(pickle.dumps(Bomb(alarm)))
    manifest = json.loads((checkpoint / COMPLETE).read_text())
    content = (checkpoint / name).read_bytes()
    manifest[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / COMPLETE).write_text(json.dumps(manifest))
    assert problem(checkpoint) is None
    with pytest.raises(CheckpointError, match="step-000001 cannot be read"):
        train(tiny.recipe(tmp_path, run={"checkpoint_every_steps": 1}))
    assert not alarm.exists()


@pytest.mark.parametrize("name", ["../../../secret", "/etc/hostname", "student/../../../../secret"])
def test_a_manifest_cannot_name_files_outside_of_its_checkpoint(tmp_path: Path, name: str) -> None:
    checkpoint = stopped_run(tmp_path)
    manifest = json.loads((checkpoint / COMPLETE).read_text())
    (checkpoint / COMPLETE).write_text(json.dumps({**manifest, name: {"size": 1, "sha256": "0"}}))
    assert problem(checkpoint) == f"{COMPLETE} names {name}, which is outside of the folder"


def test_a_link_in_a_checkpoint_cannot_lead_out_of_it(tmp_path: Path) -> None:
    checkpoint = stopped_run(tmp_path)
    outside = tmp_path / "outside"
    (checkpoint / "student/config.json").rename(outside)
    (checkpoint / "student/config.json").symlink_to(outside)
    assert problem(checkpoint) == "student/config.json leads out of the folder"


@pytest.mark.parametrize("name", ["rows.pkl", "rows.pt", "rows.py"])
def test_data_files_that_could_run_code_are_refused(tmp_path: Path, alarm: Path, name: str) -> None:
    recipe = tiny.recipe(tmp_path, data={"train": str(tmp_path / name)})
    torch.save({"rows": Bomb(alarm)}, tmp_path / name)
    with pytest.raises(DataError, match=r"its name must end in .jsonl"):
        train(recipe)
    assert not alarm.exists()


def test_a_line_without_end_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.recipe(tmp_path)
    monkeypatch.setattr(reading, "MAX_ROW_BYTES", 3 << 20)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "' + "a" * (4 << 20))
    with pytest.raises(DataError, match=r"line 25 of .*rows.jsonl is over 3 MiB"):
        train(recipe)


@pytest.mark.parametrize("column", ["prompt", "teacher_response"])
def test_a_row_of_parquet_is_limited_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str
) -> None:
    """Compressed, such a row is a few hundred bytes on the disk."""
    monkeypatch.setattr(reading, "MAX_ROW_BYTES", 3 << 20)
    rows = tiny.rows()
    rows[4][column] = "a " * (2 << 20)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", compression="zstd")
    with pytest.raises(DataError, match=r"row 5 of .*rows.parquet is over 3 MiB"):
        train(tiny.recipe(tmp_path, data={"train": str(tmp_path / "rows.parquet")}))
