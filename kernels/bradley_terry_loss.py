"""The discriminator's loss: a teacher response should score above the rollouts of its prompt.

For a pair of scores t of the teacher and s of the student, a margin and a centring coefficient c,

    x = t - s - margin
    loss = softplus(-x) + c (t + s)^2              softplus(-x) = log(1 + exp(-x)) = -log sigmoid(x)

summed over all pairs and divided by their number P. With q = sigmoid(-x), the derivatives are

    P d loss / d t = -q + 2 c (t + s), summed over the rollouts of the prompt
    P d loss / d s =  q + 2 c (t + s)

They are known in the forward pass: one kernel reads the scores once and writes the loss and both
derivatives, and the backward pass is a product with the upstream gradient. Neither log nor sigmoid
is taken of anything that can overflow, vanish or cancel: e = exp(-|x|) is in (0, 1], and

    softplus(-x) = max(-x, 0) + log(1 + e)         q = 1 / (1 + e) if x < 0, else e / (1 + e)

Shapes: B prompts, each with one score of the teacher and G of the student.

Sources: paper Eq. 3 and appendix A.1 (a pair for each rollout); the centring term, which keeps the
scores around 0, is that of arXiv 2312.09244.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from gad_fast.kernels.arguments import (
    check_device,
    check_float,
    check_range,
    check_shape,
    compute_dtype,
)
from gad_fast.kernels.backend import Backend, resolve_backend
from gad_fast.kernels.optional_triton import tl, triton

NUM_TOTALS = 5
"""Numbers summed over the prompts: loss, pairs in the right order, gaps, scores of either side."""


def bradley_terry_reference(
    d_teacher: Tensor, d_student: Tensor, margin: Tensor | float, center_coef: float
) -> Tensor:
    """Sum of the losses of all pairs, differentiated by autograd: the truth in tests.

    Args:
        d_teacher: `[B]`.
        d_student: `[B, G]`.
        margin: a number, or `[B, G]`.
        center_coef: c.
    """
    x = d_teacher[:, None] - d_student - margin
    return (-logsigmoid(x) + center_coef * (d_teacher[:, None] + d_student).square()).sum()


@triton.jit
def _log1p(e):
    """log(1 + e), for e in [0, 1]: the factor makes up for the rounding of 1 + e.

    Source: Goldberg, What every computer scientist should know about floating-point, theorem 4.
    """
    u = 1.0 + e
    return tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0)))


@triton.jit
def bradley_terry_kernel(
    d_teacher,  # [B]
    d_student,  # [B, G]
    margin,  # [B, G], or None
    totals,  # [NUM_TOTALS, B]
    grad_teacher,  # [B]
    grad_student,  # [B, G]
    B,
    G,
    center_coef,
    BLOCK_G: tl.constexpr,
):
    """One program a prompt: its scores are read once, and all that is known of them written."""
    i_b = tl.program_id(0).to(tl.int64)
    o_g = tl.arange(0, BLOCK_G)
    m_g = o_g < G
    teacher = tl.load(d_teacher + i_b)
    b_student = tl.load(d_student + i_b * G + o_g, mask=m_g, other=0.0)
    b_gap = teacher - b_student
    b_x = b_gap
    if margin is not None:
        b_x = b_gap - tl.load(margin + i_b * G + o_g, mask=m_g, other=0.0)
    b_e = tl.exp(-tl.abs(b_x))
    b_q = tl.where(b_x < 0, 1.0, b_e) / (1.0 + b_e)
    b_level = teacher + b_student
    b_loss = tl.maximum(-b_x, 0.0) + _log1p(b_e) + center_coef * b_level * b_level
    b_pull = 2.0 * center_coef * b_level
    tl.store(grad_student + i_b * G + o_g, b_q + b_pull, mask=m_g)
    tl.store(grad_teacher + i_b, tl.sum(tl.where(m_g, b_pull - b_q, 0.0), 0))
    p_totals = totals + i_b
    tl.store(p_totals, tl.sum(tl.where(m_g, b_loss, 0.0), 0))
    tl.store(p_totals + B, tl.sum(tl.where(m_g & (b_gap > 0), 1.0, 0.0), 0))
    tl.store(p_totals + 2 * B, tl.sum(tl.where(m_g, b_gap, 0.0), 0))
    tl.store(p_totals + 3 * B, teacher * G)
    tl.store(p_totals + 4 * B, tl.sum(b_student, 0))


# Above it a group no longer fits the registers of a program, and torch computes.
MAX_BLOCK_G = 4096


def launch_config(G: int) -> dict[str, Any]:
    """Block and warps for a group: a plain function, so that no launch needs an autotuner."""
    block = triton.next_power_of_2(G)
    return {"BLOCK_G": block, "num_warps": min(8, max(1, block // 256))}


# Opaque to torch.compile, which so sees one node, and cannot turn the floats of a launch into fp64.
@torch.library.custom_op("gad_fast::bradley_terry_loss", mutates_args=())
def _bradley_terry_op(
    d_teacher: Tensor, d_student: Tensor, margin: Tensor | None, center_coef: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of the losses [], totals [NUM_TOTALS], derivatives of the sum `[B]` and `[B, G]`."""
    run = _launch if backend == "triton" else _torch_bradley_terry
    totals, grad_teacher, grad_student = run(d_teacher, d_student, margin, center_coef)
    # A sum over prompts in a fixed order: no atomics, so the same in every run.
    totals = totals.sum(1)
    return totals[0].clone(), totals, grad_teacher, grad_student


@_bradley_terry_op.register_fake
def _(d_teacher: Tensor, d_student: Tensor, *_rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    totals = d_teacher.new_empty(NUM_TOTALS)
    return d_teacher.new_empty(()), totals, torch.empty_like(d_teacher), torch.empty_like(d_student)


def _launch(
    d_teacher: Tensor, d_student: Tensor, margin: Tensor | None, center_coef: float
) -> tuple[Tensor, Tensor, Tensor]:
    B, G = d_student.shape
    totals = d_teacher.new_empty(NUM_TOTALS, B)
    grad_teacher, grad_student = torch.empty_like(d_teacher), torch.empty_like(d_student)
    if B > 0:
        with torch.cuda.device_of(d_teacher):
            bradley_terry_kernel[(B,)](
                d_teacher, d_student, margin, totals, grad_teacher, grad_student,
                B, G, center_coef, **launch_config(G),
            )  # fmt: skip
    return totals, grad_teacher, grad_student


def _torch_bradley_terry(
    d_teacher: Tensor, d_student: Tensor, margin: Tensor | None, center_coef: float
) -> tuple[Tensor, Tensor, Tensor]:
    teacher = d_teacher[:, None]
    gap, level = teacher - d_student, teacher + d_student
    x = gap if margin is None else gap - margin
    q, pull = torch.sigmoid(-x), 2 * center_coef * level
    losses = -logsigmoid(x) + center_coef * level.square()
    is_right = (gap > 0).to(gap.dtype)
    terms = (losses, is_right, gap, teacher.expand_as(gap), d_student)
    totals = torch.stack([term.sum(1) for term in terms])
    return totals, (pull - q).sum(1), q + pull


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    del inputs
    _, totals, grad_teacher, grad_student = output
    ctx.mark_non_differentiable(totals, grad_teacher, grad_student)
    ctx.save_for_backward(grad_teacher, grad_student)


def _backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
    grad_teacher, grad_student = ctx.saved_tensors
    return grad_outputs[0] * grad_teacher, grad_outputs[0] * grad_student, None, None, None


_bradley_terry_op.register_autograd(_backward, setup_context=_setup_context)


def bradley_terry_loss(
    d_teacher: Tensor,
    d_student: Tensor,
    *,
    margin: float | Tensor | None = None,
    center_coef: float = 0.0,
    group_size: int | None = None,
    num_pairs: float | Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss of every pair of a rollout with the teacher's response to its prompt.

    Differentiable once with respect to the scores; everything else is a constant.

    Args:
        d_teacher: `[B]`, scores of the teacher's responses.
        d_student: `[B, G]`, scores of the rollouts; or flat, `[B * G]` with `group_size`, and
            without it one for each score of the teacher.
        margin: by how much the teacher should be ahead: a number, or one in the shape of
            `d_student`. None is 0.
        center_coef: at least 0; weight of the pull of a pair's scores towards a sum of 0.
        group_size: G of flat scores.
        num_pairs: what to divide by, that of the whole step where this call is a part of it; a
            number, or a 0-dim tensor on the device. None counts the pairs of the call.
        backend: "auto" is "triton" for float32 on CUDA where Triton is installed, else "torch".

    Returns:
        The loss, 0-dim, float32, or float64 for float64 scores, and metrics, 0-dim tensors on the
        device, means over the pairs of the call: `accuracy` (teacher above student, without the
        margin), `score_gap`, `teacher_score`, `student_score`; and `num_pairs`, their number.

    Raises:
        ValueError: what came does not fit; the line names the argument.
    """
    check_range("center_coef", center_coef, 0.0)
    dtype = _checked_dtype(d_teacher, d_student)
    students = _grouped(d_teacher, d_student, group_size).to(dtype).contiguous()
    teachers = d_teacher.to(dtype).contiguous()
    margins = _margins(margin, d_student, students)
    path = resolve_backend(students, backend, dtypes=(torch.float32,))
    if not 0 < students.shape[1] <= MAX_BLOCK_G:
        path = "torch"
    total, totals, _, _ = _bradley_terry_op(teachers, students, margins, center_coef, path)
    count = max(students.numel(), 1)
    return total / (count if num_pairs is None else num_pairs), _metrics(totals, students.numel())


def _checked_dtype(d_teacher: Tensor, d_student: Tensor) -> torch.dtype:
    check_float("d_teacher", d_teacher)
    check_float("d_student", d_student)
    check_device("d_student", d_student, d_teacher.device)
    return compute_dtype(torch.promote_types(d_teacher.dtype, d_student.dtype))


def _grouped(d_teacher: Tensor, d_student: Tensor, group_size: int | None) -> Tensor:
    """The student's scores as [B, G]; raises ValueError where they are not G for each prompt."""
    is_flat = d_student.dim() == 1
    B = d_teacher.numel()
    G = 1 if group_size is None else group_size
    has_fitting_shape = (
        d_student.numel() == B * G and G > 0
        if is_flat
        else d_student.shape[:-1] == (B,) and group_size is None
    )
    if d_teacher.dim() != 1 or not has_fitting_shape:
        msg = (
            "d_student must be [B, G], or [B * G] with group_size G, for d_teacher [B], got "
            f"{tuple(d_student.shape)} for {tuple(d_teacher.shape)} with group_size={group_size}"
        )
        raise ValueError(msg)
    return d_student.reshape(B, G) if is_flat else d_student


def _margins(margin: float | Tensor | None, d_student: Tensor, students: Tensor) -> Tensor | None:
    """The margin as a contiguous constant [B, G] in the dtype of the loss; None for none."""
    if not isinstance(margin, Tensor):
        return torch.full_like(students, margin, requires_grad=False) if margin else None
    check_device("margin", margin, d_student.device)
    check_shape("margin", margin, d_student.shape, of="d_student")
    return margin.detach().to(students.dtype).reshape(students.shape).contiguous()


def _metrics(totals: Tensor, num_pairs: int) -> dict[str, Tensor]:
    names = ("accuracy", "score_gap", "teacher_score", "student_score")
    means = dict(zip(names, (totals[1:] / max(num_pairs, 1)).unbind(), strict=True))
    return {**means, "num_pairs": totals.new_full((), num_pairs)}
