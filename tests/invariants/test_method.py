"""What must hold for the method to be the method: tests (a) to (g) of the specification.

(h), the toy, and (i), the frozen discriminator, are in tests/integration.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import tiny
from gad_fast import TextCodec
from gad_fast.config import HardwareSettings, LearningRateSettings, OptimizerSettings, Recipe
from gad_fast.data import encode_examples
from gad_fast.errors import SymmetryError
from gad_fast.game.optim import PlayerOptimizer
from gad_fast.game.steps import train_discriminator
from gad_fast.game.symmetry import check_symmetry
from gad_fast.models.batch import Item, pad
from gad_fast.models.discriminator import Discriminator, load_discriminator
from gad_fast.models.loading import Precision
from gad_fast.models.student import load_student
from gad_fast.records import EncodedExample, Example, Group, Message, Response
from gad_fast.rollout.engine import Sampling
from gad_fast.rollout.groups import sample_groups
from gad_fast.rollout.reference import ReferenceEngine
from gad_fast.training import train

CPU = Precision(HardwareSettings(device="cpu", compute_dtype="weights"))


class Table:
    """A codec and a double-precision discriminator with some encoded examples."""

    def __init__(self, folder: Path) -> None:
        self.recipe: Recipe = tiny.recipe(folder, discriminator={"dtype": "float64"})
        self.codec = TextCodec.from_pretrained(folder / "student")
        torch.manual_seed(7)
        self.discriminator: Discriminator = load_discriminator(
            self.recipe, load_student(self.recipe, CPU), self.codec, CPU
        )

    def example(self, prompt: str, response: str) -> EncodedExample:
        messages = [Message(role="user", content=prompt)]
        examples = [Example(messages, response)]
        return encode_examples(examples, self.recipe.data, self.codec)[0]

    def group(self, prompt: str, teacher: str, *rollouts: str) -> Group:
        example = self.example(prompt, teacher)
        return Group(example, [self.example(prompt, text).teacher for text in rollouts])

    def teacher_scores(self, groups: list[Group]) -> torch.Tensor:
        with torch.no_grad():
            return self.discriminator.score_groups(groups).teacher


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table(tmp_path)


def test_a_identical_texts_get_identical_scores_in_one_batch(table: Table) -> None:
    group = table.group("red sun", "blue sea sky", "moon", "blue sea sky", "one two three red blue")
    with torch.no_grad():
        scores = table.discriminator.score_groups([group])
    assert scores.student[0, 1] == scores.teacher[0]
    assert scores.student[0, 0] != scores.teacher[0]


def test_a_scores_do_not_depend_on_padding_or_order(table: Table) -> None:
    short = table.group("sun", "moon", "sea")
    long = table.group("red blue green one two", "red blue green one two three", "sky sky")
    alone = torch.stack([table.teacher_scores([g])[0] for g in (short, long)])
    for groups, order in (([short, long], [0, 1]), ([long, short], [1, 0])):
        assert_close(table.teacher_scores(groups), alone[order], atol=1e-12, rtol=1e-12)


def test_e_a_finished_response_is_scored_at_its_end_token(table: Table) -> None:
    """Against transformers' own hidden states of the same sequence, without padding."""
    group = table.group("red sun", "blue sea", "one")
    prompt, teacher = group.prompt.prompt_ids, group.prompt.teacher
    assert teacher.ids[-1] == table.codec.end_id
    assert_close(table.teacher_scores([group])[0], by_hand(table, [*prompt, *teacher.ids]))


def test_e_a_truncated_response_is_scored_at_its_last_token(table: Table) -> None:
    group = table.group("red sun", "one two three red blue green one", "one")
    prompt, teacher = group.prompt.prompt_ids, group.prompt.teacher
    assert (len(teacher), teacher.is_finished) == (6, False)
    assert_close(table.teacher_scores([group])[0], by_hand(table, [*prompt, *teacher.ids]))


def by_hand(table: Table, ids: list[int]) -> torch.Tensor:
    model: Any = table.discriminator.model
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state
        return model.score(hidden[0, -1])[0]


def test_e_both_sides_end_alike_by_construction(table: Table) -> None:
    """Teacher text and a rollout of the same ids are cut by one rule."""
    text = "one two three"
    teacher = table.example("red", text).teacher
    sampled = [*table.codec.encode_batch([text])[0], table.codec.end_id, 3, 3]
    rollout = Response.cut(
        torch.tensor(sampled, dtype=torch.int32).numpy(), end_id=table.codec.end_id, max_tokens=6
    )
    assert teacher.ids.tolist() == rollout.ids.tolist()
    assert teacher.is_finished
    assert rollout.is_finished


def test_f_rewards_come_from_the_discriminator_before_its_update(table: Table) -> None:
    groups = [table.group("red", "one", "two", "sea"), table.group("sun", "sky", "red", "moon one")]
    with torch.no_grad():
        before = table.discriminator.score_groups(groups).student
    optimizer = PlayerOptimizer(
        "discriminator", table.discriminator.parameters(), OptimizerSettings(max_grad_norm=1.0)
    )
    optimizer.begin_stage(LearningRateSettings(peak=0.1), 1)
    verdict = train_discriminator(table.discriminator, optimizer, groups, token_budget=1000)
    with torch.no_grad():
        after = table.discriminator.score_groups(groups).student
    assert_close(verdict.scores.double(), before, atol=1e-6, rtol=1e-6)
    assert (after - before).abs().min() > 1e-3


def test_g_discriminator_only_steps_leave_the_student_untouched(tmp_path: Path) -> None:
    """critic_warmup = 10 of the official code is nine steps without the student."""
    warmup = {"steps": 9, "discriminator_only_steps": 9}
    train(tiny.recipe(tmp_path, warmup=warmup, game={"steps": 0}))
    before, after = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("student", "run/student")
    )
    assert all(torch.equal(before[key], after[key]) for key in before)
    fresh = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student", num_labels=1)
    trained = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/discriminator")
    key = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(fresh.state_dict()[key], trained.state_dict()[key])


def test_g_the_step_after_them_trains_the_student(tmp_path: Path) -> None:
    warmup = {"steps": 10, "discriminator_only_steps": 9}
    train(tiny.recipe(tmp_path, warmup=warmup, game={"steps": 0}))
    before, after = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).lm_head.weight
        for name in ("student", "run/student")
    )
    assert not torch.equal(before, after)


def engine_groups(table: Table, end_id: int) -> list[Group]:
    model = AutoModelForCausalLM.from_pretrained(table.recipe.student.model).eval()
    engine = ReferenceEngine(lambda: model, CPU, end_id=end_id, max_sequences=8)
    prompts = [table.example("red sun", "one"), table.example("sea", "one two three red blue sky")]
    sampling = Sampling(temperature=1.0, max_tokens=6)
    return sample_groups(engine, prompts, group_size=8, sampling=sampling, seed=0, weight_version=0)


def test_the_start_up_check_passes_on_real_rollouts(table: Table) -> None:
    groups = engine_groups(table, table.codec.end_id)
    assert {rollout.is_finished for group in groups for rollout in group.rollouts} == {True, False}
    check_symmetry(table.discriminator, table.codec, groups, Sampling(1.0, 6))


def test_the_start_up_check_stops_a_student_that_ends_with_another_token(table: Table) -> None:
    groups = engine_groups(table, end_id=tiny.SPECIALS.index("<unk>"))
    with pytest.raises(SymmetryError, match=r"student response of \d+ tokens ends with token 5"):
        check_symmetry(table.discriminator, table.codec, groups, Sampling(1.0, 6))


def test_the_start_up_check_stops_teacher_text_without_an_end(table: Table) -> None:
    group = table.group("red", "one two", "sea")
    open_ended = Response(group.prompt.teacher.ids[:-1], is_finished=False)
    teacher = EncodedExample(group.prompt.example, group.prompt.prompt_ids, open_ended)
    with pytest.raises(SymmetryError, match="teacher response of 2 tokens ends with"):
        check_symmetry(
            table.discriminator, table.codec, [Group(teacher, group.rollouts)], Sampling(1.0, 6)
        )


def test_the_start_up_check_stops_unlike_scores_of_one_text(table: Table) -> None:
    group = table.group("red", "one two", "sea")
    other = table.example("red", "two two").teacher
    teacher = EncodedExample(group.prompt.example, group.prompt.prompt_ids, other)
    with pytest.raises(SymmetryError, match=r"the same text scores .* as the student's"):
        check_symmetry(
            table.discriminator, table.codec, [Group(teacher, group.rollouts)], Sampling(1.0, 6)
        )


def test_the_saved_discriminator_scores_alike_in_plain_transformers(tmp_path: Path) -> None:
    """Also padded: its config must not call the end token padding."""
    train(tiny.recipe(tmp_path))
    folder = tmp_path / "run/discriminator"
    codec = TextCodec.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    texts = ["one two", "red blue green one", "sky sky sky sky sky sky"]
    prompts = list(
        codec.encode_chats([[Message(role="user", content="sun")]] * 3, add_generation_prompt=True)
    )
    responses = codec.encode_responses(texts, max_tokens=6)
    items = [Item(*row) for row in zip(prompts, [[r] for r in responses], strict=True)]
    batch = pad(items, pad_id=model.config.pad_token_id, device=CPU.device)
    recipe = tiny.recipe(tmp_path, discriminator={"model": str(folder)}, output=tmp_path / "x")
    ours = load_discriminator(recipe, load_student(recipe, CPU), codec, CPU)
    with torch.no_grad():
        expected = ours.score(batch)
        for row, response in enumerate(responses):
            ids = torch.tensor([[*prompts[row], *response.ids]])
            assert_close(model(input_ids=ids).logits[0, 0], expected[row], atol=1e-5, rtol=1e-5)
        theirs = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
        ).logits[:, 0]
    assert_close(theirs, expected, atol=1e-5, rtol=1e-5)
