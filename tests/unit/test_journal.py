"""The journal: what was appended is read, what is torn or of other prompts is not."""

from pathlib import Path

import numpy as np
import pytest

from gad_fast.records import EncodedExample, Example, Group, Response
from gad_fast.run.journal import Journal


def groups(count: int = 3, *, seed: int = 0) -> list[Group]:
    draw = np.random.default_rng(seed)

    def ids(length: int) -> np.ndarray:
        return draw.integers(0, 1000, length).astype(np.int32)

    teacher = Response(ids(3), is_finished=True)
    return [
        Group(
            EncodedExample(Example([], "text"), ids(4 + index), teacher),
            [Response(ids(1 + k), bool(k % 2)) for k in range(3)],
        )
        for index in range(count)
    ]


def same(group: Group, other: Group) -> bool:
    return all(
        np.array_equal(a.ids, b.ids) and a.is_finished == b.is_finished
        for a, b in zip(group.rollouts, other.rollouts, strict=True)
    )


def test_groups_come_back_by_the_place_of_their_prompt(tmp_path: Path) -> None:
    written = groups()
    journal = Journal(tmp_path)
    journal.append(7, {0: written[0]})
    journal.append(7, {2: written[2], 1: written[1]})
    found = Journal(tmp_path).load(7, [group.prompt for group in written])
    assert sorted(found) == [0, 1, 2]
    assert all(same(found[index], group) for index, group in enumerate(written))
    assert found[2].prompt is written[2].prompt
    assert found[1].rollouts[0].ids.dtype == np.int32
    assert journal.load(8, [group.prompt for group in written]) == {}


def test_a_torn_tail_costs_its_own_group_only(tmp_path: Path) -> None:
    written = groups()
    journal = Journal(tmp_path)
    journal.append(1, dict(enumerate(written[:2])))
    whole = (tmp_path / "journal/step-000001.groups").stat().st_size
    journal.append(1, {2: written[2]})
    data = (tmp_path / "journal/step-000001.groups").read_bytes()
    prompts = [group.prompt for group in written]
    for size in range(whole, len(data), 7):
        (tmp_path / "journal/step-000001.groups").write_bytes(data[:size])
        assert sorted(journal.load(1, prompts)) == [0, 1]


@pytest.mark.parametrize("place", [0, 5, 40, -1])
def test_a_flipped_bit_is_no_group(tmp_path: Path, place: int) -> None:
    written = groups(1)
    Journal(tmp_path).append(1, {0: written[0]})
    path = tmp_path / "journal/step-000001.groups"
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
    assert Journal(tmp_path).load(1, [written[0].prompt]) == {}


def test_groups_of_other_prompts_are_not_taken(tmp_path: Path) -> None:
    Journal(tmp_path).append(1, dict(enumerate(groups())))
    others = [group.prompt for group in groups(seed=1)]
    assert Journal(tmp_path).load(1, others) == {}


def test_a_checkpoint_makes_earlier_steps_superfluous(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in (1, 2, 3):
        journal.append(step, dict(enumerate(groups())))
        journal.keep(step, {0: groups()[0]})
    journal.forget(2)
    names = sorted(path.name for path in (tmp_path / "journal").iterdir())
    assert names == ["step-000003.groups", "step-000003.kept"]


def test_what_a_failed_engine_had_finished_is_apart_from_what_was_merely_cut_off(
    tmp_path: Path,
) -> None:
    written = groups()
    prompts = [group.prompt for group in written]
    journal = Journal(tmp_path)
    journal.append(4, {0: written[0]})
    journal.keep(4, {2: written[2]})
    journal.keep(4, {1: written[1]})
    assert sorted(journal.load(4, prompts)) == [0]
    found = journal.load_kept(4, prompts)
    assert sorted(found) == [1, 2]
    assert all(same(found[index], written[index]) for index in found)
    journal.discard(4)
    assert sorted(journal.load_kept(4, prompts)) == [1, 2]
    assert journal.load(4, prompts) == {}
