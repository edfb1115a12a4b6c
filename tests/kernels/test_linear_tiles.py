"""The tile kernels by themselves, and how work is cut into parts."""

import pytest
import torch

from gad_fast.kernels.chunked_linear import even_slices, torch_linear_stats
from gad_fast.kernels.linear_head import LinearHead
from gad_fast.kernels.linear_tiles import TILES, exp_to_grad, linear_grad_slice, linear_stats
from kernel_cases import DEVICE, each_backend, needs_triton, peaked_head, relative_error
from linear_cases import D, T, V, normal, shrink_tiles


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_tiles(monkeypatch)


@pytest.mark.parametrize("label", [-1, V, V + 3, 2**33 + 5])
@each_backend
def test_label_outside_the_vocabulary_gives_nan(backend, label):
    hidden, weight, labels = peaked_head(3, D, V, torch.bfloat16)
    labels[1] = label
    args = (hidden, LinearHead(weight, None, 1.0, None), labels, torch.ones(3, device=DEVICE))
    if backend == "triton":
        stats = linear_stats(*args)[0]
    else:
        stats = torch_linear_stats(*args, logits_dtype="float32", has_entropy=True)
    assert stats.logp.isnan().tolist() == [False, True, False]
    assert stats.entropy.isfinite().all()


@needs_triton
@pytest.mark.parametrize("has_entropy", [False, True])
@pytest.mark.parametrize("stride", [V, V + 4])
def test_stored_exponentials_become_the_gradient(stride, has_entropy):
    hidden, weight, labels = peaked_head(T, D, V, torch.bfloat16)
    head = LinearHead(weight, normal(V).bfloat16(), 0.9, None)
    inverse = 1 / (0.5 + normal(T).abs()).float()
    buffer = torch.full((T, stride), 7.0, dtype=torch.bfloat16, device=DEVICE)
    stats, tile_maximum = linear_stats(hidden, head, labels, inverse, exponentials=buffer[:, :V])
    # The same numbers as without storing.
    assert all(map(torch.equal, stats, linear_stats(hidden, head, labels, inverse)[0]))
    grad_logp = normal(T, seed=1).float()
    grad_entropy = normal(T, seed=2).float() if has_entropy else None
    args = (head, labels, inverse, stats)
    made_again = linear_grad_slice(hidden, *args, grad_logp, grad_entropy, slice(0, V))
    actual = exp_to_grad(buffer[:, :V], *args, tile_maximum, grad_logp, grad_entropy)

    z = (hidden.double() @ weight.double().t() + head.bias.double()).requires_grad_()  # pyright: ignore[reportOptionalMemberAccess]
    log_p = torch.log_softmax(0.9 * z * inverse.double()[:, None], -1)
    loss = (grad_logp * log_p.gather(-1, labels[:, None]).squeeze(-1)).sum()
    if grad_entropy is not None:
        loss = loss - (grad_entropy[:, None] * log_p.exp() * log_p).sum()
    (expected,) = torch.autograd.grad(loss, z)
    assert relative_error(actual, expected) < 4e-3
    assert relative_error(made_again, expected) < 4e-3
    # The label's own entry as well, where p - 1 is small.
    label_grads = [x.double().gather(-1, labels[:, None]) for x in (actual, expected)]
    assert relative_error(*label_grads) < 4e-3
    assert (buffer[:, V:] == 7).all()


@needs_triton
def test_exponentials_refuse_a_softcap():
    hidden, weight, labels = peaked_head(3, D, V, torch.bfloat16)
    head = LinearHead(weight, None, 1.0, 30.0)
    buffer = torch.empty(3, V, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(ValueError, match="exponentials cannot be stored with a softcap, got 30"):
        linear_stats(hidden, head, labels, torch.ones(3, device=DEVICE), exponentials=buffer)


@pytest.mark.parametrize("size", [0, 1, 7, 64, 65, 300])
@pytest.mark.parametrize("limit", [0, 1, 63, 64, 200, 1000])
@pytest.mark.parametrize("multiple", [1, 64])
def test_even_slices_cover_everything_within_the_limit(size, limit, multiple):
    slices = even_slices(size, limit, multiple)
    assert [i for s in slices for i in range(s.start, s.stop)] == list(range(size))
    assert all(s.start % multiple == 0 for s in slices)
    assert max(s.stop - s.start for s in slices) <= max(limit, multiple)
    assert len(slices) == max(1, -(-size // (max(1, limit // multiple) * multiple)))


def test_every_kernel_has_a_tile_for_every_architecture():
    names = {name for _, name in TILES}
    assert TILES.keys() == {(arch, name) for arch in (80, 90) for name in names}
