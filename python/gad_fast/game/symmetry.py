"""The start-up check that a text gets the same score whoever wrote it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gad_fast.errors import SymmetryError
from gad_fast.models.discriminator import Discriminator
from gad_fast.records import EncodedExample, Group, Response
from gad_fast.rollout.engine import Sampling
from gad_fast.text import TextCodec


def check_symmetry(
    discriminator: Discriminator, codec: TextCodec, groups: Sequence[Group], sampling: Sampling
) -> None:
    """Proves on real rollouts and real teacher texts that only the content can differ.

    A discriminator that reads the last token tells the sides apart at once if one of them ends
    otherwise than the other: it then wins without learning anything.

    Args:
        discriminator: scores both sides.
        codec: the student's.
        groups: a few groups from the engine of the run.
        sampling: how they were drawn.

    Raises:
        SymmetryError: a response of either side ends in a way that the other side's could not, or
            identical texts score differently.
    """
    for group in groups:
        for side, response in [("teacher", group.prompt.teacher), *_rollouts(group)]:
            _check_ending(side, response, codec, sampling.max_tokens)
    mirrored = [_as_if_sampled(group.prompt, codec, sampling) for group in groups]
    for group in mirrored:
        with torch.no_grad():
            student = discriminator.score_groups([group]).student[:, 0]
            teacher = discriminator.score_groups([_swapped(group)]).student[:, 0]
        if not torch.equal(student, teacher):
            raise SymmetryError(
                f"the same text scores {student.item()} as the student's and {teacher.item()} as "
                f"the teacher's: the discriminator would learn the difference in form "
                f"(check eos_token and chat_template of both players' tokenizers)"
            )


def _rollouts(group: Group) -> list[tuple[str, Response]]:
    return [("student", rollout) for rollout in group.rollouts]


def _check_ending(side: str, response: Response, codec: TextCodec, max_tokens: int) -> None:
    ends_with_end = bool(response.ids[-1] == codec.end_id)
    num_ends = int((response.ids == codec.end_id).sum())
    is_cut_at_limit = len(response) == max_tokens and num_ends == 0
    is_lawful = num_ends == 1 and ends_with_end if response.is_finished else is_cut_at_limit
    if not is_lawful:
        raise SymmetryError(
            f"a {side} response of {len(response)} tokens ends with token {response.ids[-1]}; it "
            f"must end with the end token {codec.end_id}, or be cut at {max_tokens} tokens without"
        )


def _as_if_sampled(prompt: EncodedExample, codec: TextCodec, sampling: Sampling) -> Group:
    """The group of a student that wrote the teacher's text, token by token, and went on."""
    text = codec.encode_batch([prompt.example.teacher_response])[0].tolist()
    written = torch.tensor([*text, codec.end_id, *text], dtype=torch.int32).numpy()
    rollout = Response.cut(written, end_id=codec.end_id, max_tokens=sampling.max_tokens)
    return Group(prompt, [rollout])


def _swapped(group: Group) -> Group:
    return Group(group.prompt, [group.prompt.teacher])
