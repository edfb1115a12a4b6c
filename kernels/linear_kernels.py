"""Triton kernels over logits that are never whole: each program makes one tile of them.

With hidden states X [T, D] and a head W [V, D], b, the value of one logit is, before temperature,

    v = cap(logit_scale (X W^T + b))        cap(u) = softcap tanh(u / softcap), or u without one

and z = v / t as in token_logprobs.py, whose maths goes on from here. A tile j of the vocabulary
gives each row three numbers,

    m_j = max v      s_j = sum exp((v - m_j) / t)      e_j = sum exp((v - m_j) / t) (v - m_j) / t

which merge into those of the row, with m = max_j m_j and d_j = (m_j - m) / t, as

    s = sum_j s_j exp(d_j)        e = sum_j (e_j + d_j s_j) exp(d_j)        lse = m / t + log s
    logp = (v_y - m) / t - log s          H = log s - e / s

The backward pass makes each tile again, or turns the exponentials that the forward pass stored into
the gradient. Either way, with p = exp((v - m) / t - log s),

    dZ = (g (1[y] - p) - g_H p (log p + H)) logit_scale (1 - (v / softcap)^2) / t

Rows that no loss looks at must not come here. A label outside [0, V) is no column of any tile: its
log-probability is NaN. Operands come through TMA descriptors where the GPU has TMA.

Shapes: T tokens, D width, V vocabulary, J tiles of the vocabulary.
"""

import math

from gad_fast.kernels.optional_triton import tl, triton

_LN_2 = tl.constexpr(math.log(2.0))
_LOG2_E = tl.constexpr(math.log2(math.e))
_MINUS_INFINITY = tl.constexpr(-math.inf)
# As in token_logprobs.py: finite, so that a tile of nothing but -inf does not give NaN.
_LOWEST_MAXIMUM = tl.constexpr(-1e30)
# 2 to the power of anything lower is exactly 0 in float32.
_LOWEST_LOG2_P = tl.constexpr(-1000.0)
# Token tiles that share a panel of the weight while it is in the L2 cache.
_GROUP_T = tl.constexpr(8)


@triton.jit
def _tile_position(i, T, V, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr):
    """Tile of tokens and tile of the vocabulary, in groups that share panels in the L2 cache."""
    num_t = tl.cdiv(T, BLOCK_T)
    num_in_group = _GROUP_T * tl.cdiv(V, BLOCK_V)
    first_t = i // num_in_group * _GROUP_T
    group_t = tl.minimum(num_t - first_t, _GROUP_T)
    return first_t + i % num_in_group % group_t, i % num_in_group // group_t


@triton.jit
def _load_block(
    matrix,
    row_stride,
    first_row,
    first_column,
    num_rows,
    num_columns,
    HAS_TMA: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """A block of a matrix, and zeros outside it."""
    if HAS_TMA:
        b_block = matrix.load([first_row, first_column])
    else:
        o_row = first_row + tl.arange(0, BLOCK_ROWS)
        o_column = first_column + tl.arange(0, BLOCK_COLUMNS)
        p_block = matrix + o_row.to(tl.int64)[:, None] * row_stride + o_column[None, :]
        m_block = (o_row < num_rows)[:, None] & (o_column < num_columns)[None, :]
        b_block = tl.load(p_block, mask=m_block, other=0.0)
    return b_block


@triton.jit
def _tile_logits(
    hidden,
    hidden_stride,
    weight,
    weight_stride,
    bias,
    first_t,
    first_v,
    T,
    V,
    D,
    logit_scale,
    softcap,
    IS_ROUNDED: tl.constexpr,
    HAS_TMA: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The values v [BLOCK_T, BLOCK_V], of rows from `first_t` and columns from `first_v`."""
    b_x = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for first_d in range(0, D, BLOCK_D):
        b_hidden = _load_block(
            hidden, hidden_stride, first_t, first_d, T, D, HAS_TMA, BLOCK_T, BLOCK_D
        )
        b_weight = _load_block(
            weight, weight_stride, first_v, first_d, V, D, HAS_TMA, BLOCK_V, BLOCK_D
        )
        b_x = tl.dot(b_hidden, b_weight.T, b_x)
    if bias is not None:
        o_v = first_v + tl.arange(0, BLOCK_V)
        b_x += tl.load(bias + o_v, mask=o_v < V, other=0.0).to(tl.float32)[None, :]
    if IS_ROUNDED:
        b_x = b_x.to(tl.bfloat16).to(tl.float32)
    if softcap is not None:
        # tanh(u) = 1 - 2 / (1 + exp(2 u)), right at both ends too.
        b_v = softcap - 2.0 * softcap / (
            1.0 + tl.exp2(b_x * (2.0 * _LOG2_E * logit_scale / softcap))
        )
    else:
        b_v = b_x * logit_scale
    return b_v


@triton.jit
def _row_labels(labels, o_t, m_t, V):
    """Labels as int32, and -1 for those outside the vocabulary."""
    b_label = tl.load(labels + o_t, mask=m_t, other=-1)
    return tl.where((b_label >= 0) & (b_label < V), b_label, -1).to(tl.int32)


@triton.jit
def linear_stats_kernel(
    hidden,  # [T, D], or a descriptor of it
    hidden_stride,
    weight,  # [V, D], or a descriptor of it
    weight_stride,
    bias,  # [V], or None
    labels,  # [T]
    inverse_temperature,  # [T]
    tile_maximum,  # [J, T]
    tile_total,  # [J, T]
    tile_weighted,  # [J, T]
    label_logits,  # [T], NaN; written by the tile that holds the label
    exponentials,  # [T, V] in bfloat16, rows `exponentials_stride` apart, or None
    exponentials_stride,
    T,
    V,
    D,
    logit_scale,
    softcap,  # a number, or None
    IS_ROUNDED: tl.constexpr,
    HAS_TMA: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a tile: m_j, s_j and e_j of its rows, and where asked exp((v - m_j) / t)."""
    i_t, i_v = _tile_position(tl.program_id(0), T, V, BLOCK_T, BLOCK_V)  # pyright: ignore[reportGeneralTypeIssues]
    b_v = _tile_logits(
        hidden, hidden_stride, weight, weight_stride, bias, i_t * BLOCK_T, i_v * BLOCK_V, T, V, D,
        logit_scale, softcap, IS_ROUNDED, HAS_TMA, BLOCK_T, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_t = o_t < T
    # The tail must be -inf before the maximum: as zeros it would be phantom tokens.
    b_v = tl.where((o_v < V)[None, :], b_v, _MINUS_INFINITY)
    b_label = _row_labels(labels, o_t, m_t, V)
    b_label_logit = tl.sum(tl.where(o_v[None, :] == b_label[:, None], b_v, 0.0), 1)
    is_here = (b_label >= i_v * BLOCK_V) & (b_label < (i_v + 1) * BLOCK_V)
    tl.store(label_logits + o_t, b_label_logit, mask=m_t & is_here)

    b_scale = tl.load(inverse_temperature + o_t, mask=m_t, other=1.0) * _LOG2_E
    b_max = tl.maximum(tl.max(b_v, 1), _LOWEST_MAXIMUM)
    b_log2_e = (b_v - b_max[:, None]) * b_scale[:, None]
    b_e = tl.exp2(b_log2_e)
    p_row = i_v.to(tl.int64) * T + o_t
    tl.store(tile_maximum + p_row, b_max, mask=m_t)
    tl.store(tile_total + p_row, tl.sum(b_e, 1), mask=m_t)
    # The bound makes 0 of the 0 * -inf of the tail.
    b_weighted = b_e * tl.maximum(b_log2_e, _LOWEST_LOG2_P)
    tl.store(tile_weighted + p_row, tl.sum(b_weighted, 1), mask=m_t)
    if exponentials is not None:
        p_e = exponentials + o_t.to(tl.int64)[:, None] * exponentials_stride + o_v[None, :]
        tl.store(p_e, b_e.to(tl.bfloat16), mask=m_t[:, None] & (o_v < V)[None, :])


@triton.jit
def merge_stats_kernel(
    tile_maximum,  # [J, T]
    tile_total,  # [J, T]
    tile_weighted,  # [J, T], in base 2
    label_logits,  # [T]
    inverse_temperature,  # [T]
    logp,  # [T]
    entropy,  # [T]
    maximum,  # [T]
    log_total,  # [T]
    T,
    J,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """One program a block of rows: merges the tiles' numbers into the rows' own."""
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < T
    b_scale = tl.load(inverse_temperature + o_t, mask=m_t, other=1.0) * _LOG2_E
    b_max = tl.full((BLOCK_T,), _LOWEST_MAXIMUM, tl.float32)
    b_total = tl.zeros((BLOCK_T,), tl.float32)
    b_weighted = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(0, J, BLOCK_J):
        o_j = start + tl.arange(0, BLOCK_J)
        o_tile = o_j.to(tl.int64)[:, None] * T + o_t[None, :]
        m_tile = (o_j < J)[:, None] & m_t[None, :]
        b_tile_max = tl.load(tile_maximum + o_tile, mask=m_tile, other=_LOWEST_MAXIMUM)
        b_tile_total = tl.load(tile_total + o_tile, mask=m_tile, other=0.0)
        b_tile_weighted = tl.load(tile_weighted + o_tile, mask=m_tile, other=0.0)

        b_new_max = tl.maximum(b_max, tl.max(b_tile_max, 0))
        b_shift = (b_max - b_new_max) * b_scale
        b_tile_shift = (b_tile_max - b_new_max[None, :]) * b_scale[None, :]
        b_rescale = tl.exp2(b_tile_shift)
        b_moved = (b_tile_weighted + b_tile_shift * b_tile_total) * b_rescale
        b_weighted = (b_weighted + b_shift * b_total) * tl.exp2(b_shift) + tl.sum(b_moved, 0)
        b_total = b_total * tl.exp2(b_shift) + tl.sum(b_tile_total * b_rescale, 0)
        b_max = b_new_max

    b_log2_total = tl.log2(b_total)
    b_label_logit = tl.load(label_logits + o_t, mask=m_t, other=0.0)
    b_logp = ((b_label_logit - b_max) * b_scale - b_log2_total) * _LN_2
    tl.store(logp + o_t, b_logp, mask=m_t)
    tl.store(entropy + o_t, (b_log2_total - b_weighted / b_total) * _LN_2, mask=m_t)
    tl.store(maximum + o_t, b_max, mask=m_t)
    tl.store(log_total + o_t, b_log2_total * _LN_2, mask=m_t)


@triton.jit
def _grad_logits(b_log2_p, is_label, b_grad_logp, b_grad_entropy, b_entropy):
    """Gives g (1[y] - p) - g_H p (log p + H), of which only the whole is ever rounded."""
    b_pull = b_grad_logp
    if b_grad_entropy is not None:
        # The bound makes the 0 * -inf of a logit of -inf 0; any p so small is exactly 0.
        b_log_p = tl.maximum(b_log2_p, _LOWEST_LOG2_P) * _LN_2
        b_pull = b_grad_logp + b_grad_entropy * (b_log_p + b_entropy)
    return tl.where(is_label, b_grad_logp, 0.0) - tl.exp2(b_log2_p) * b_pull


@triton.jit
def linear_grad_kernel(
    hidden,  # [T, D], or a descriptor of it
    hidden_stride,
    weight,  # [W, D], a slice of the vocabulary, or a descriptor of it
    weight_stride,
    bias,  # [W], or None
    labels,  # [T], of the whole vocabulary
    inverse_temperature,  # [T]
    entropy,  # [T]
    maximum,  # [T]
    log_total,  # [T]
    grad_logp,  # [T]
    grad_entropy,  # [T], or None
    grad_logits,  # [T, W], contiguous
    T,
    W,
    D,
    first_v,  # column of the vocabulary at which the slice starts
    logit_scale,
    softcap,  # a number, or None
    IS_ROUNDED: tl.constexpr,
    HAS_TMA: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a tile: makes its logits once more, and stores their gradient."""
    i_t, i_v = _tile_position(tl.program_id(0), T, W, BLOCK_T, BLOCK_V)  # pyright: ignore[reportGeneralTypeIssues]
    b_v = _tile_logits(
        hidden, hidden_stride, weight, weight_stride, bias, i_t * BLOCK_T, i_v * BLOCK_V, T, W, D,
        logit_scale, softcap, IS_ROUNDED, HAS_TMA, BLOCK_T, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_t = o_t < T
    b_inverse = tl.load(inverse_temperature + o_t, mask=m_t, other=1.0)
    b_scale = b_inverse * _LOG2_E
    b_max = tl.load(maximum + o_t, mask=m_t, other=0.0)
    b_log2_total = tl.load(log_total + o_t, mask=m_t, other=0.0) * _LOG2_E
    b_log2_p = (b_v - b_max[:, None]) * b_scale[:, None] - b_log2_total[:, None]

    b_slope = b_inverse * logit_scale
    b_grad_logp = (tl.load(grad_logp + o_t, mask=m_t, other=0.0) * b_slope)[:, None]
    b_grad_entropy = None
    b_entropy = None
    if grad_entropy is not None:
        b_grad_entropy = (tl.load(grad_entropy + o_t, mask=m_t, other=0.0) * b_slope)[:, None]
        b_entropy = tl.load(entropy + o_t, mask=m_t, other=0.0)[:, None]
    # A label below the slice is negative, one above it is no column.
    b_label = (tl.load(labels + o_t, mask=m_t, other=-1) - first_v).to(tl.int32)
    is_label = o_v[None, :] == b_label[:, None]
    b_grad = _grad_logits(b_log2_p, is_label, b_grad_logp, b_grad_entropy, b_entropy)
    if softcap is not None:
        b_tanh = b_v * (1.0 / softcap)
        b_grad *= 1.0 - b_tanh * b_tanh
    p_grad = grad_logits + o_t.to(tl.int64)[:, None] * W + o_v[None, :]
    tl.store(p_grad, b_grad.to(tl.bfloat16), mask=m_t[:, None] & (o_v < W)[None, :])


@triton.jit
def exp_to_grad_kernel(
    exponentials,  # [T, V] in bfloat16, rows `exponentials_stride` apart; becomes the gradient
    exponentials_stride,
    labels,  # [T]
    inverse_temperature,  # [T]
    entropy,  # [T]
    maximum,  # [T]
    log_total,  # [T]
    tile_maximum,  # [J, T]
    grad_logp,  # [T]
    grad_entropy,  # [T], or None
    T,
    V,
    logit_scale,
    TILE_V: tl.constexpr,  # width of the tiles that made the exponentials
    BLOCK_V: tl.constexpr,
):
    """One program a block of a row: p = E exp((m_j - m) / t - log s), then the gradient."""
    num_blocks = tl.cdiv(V, BLOCK_V)
    i_t = (tl.program_id(0) // num_blocks).to(tl.int64)
    i_v = tl.program_id(0) % num_blocks
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < V
    p_e = exponentials + i_t * exponentials_stride + o_v
    b_e = tl.load(p_e, mask=m_v, other=0.0).to(tl.float32)
    inverse = tl.load(inverse_temperature + i_t)
    p_tile = tile_maximum + (o_v // TILE_V).to(tl.int64) * T + i_t
    b_tile_max = tl.load(p_tile, mask=m_v, other=_LOWEST_MAXIMUM)
    b_shift = (b_tile_max - tl.load(maximum + i_t)) * inverse - tl.load(log_total + i_t)
    b_log2_p = tl.log2(b_e) + b_shift * _LOG2_E

    slope = inverse * logit_scale
    grad_h = None
    h = None
    if grad_entropy is not None:
        grad_h = tl.load(grad_entropy + i_t) * slope
        h = tl.load(entropy + i_t)
    is_label = o_v == _row_labels(labels, i_t, True, V)
    # p - 1 of a confident label is as good as the rest, though E is rounded: a label with a p above
    # 1/2 is the largest of its tile, and its E is 1 exactly.
    b_grad = _grad_logits(b_log2_p, is_label, tl.load(grad_logp + i_t) * slope, grad_h, h)
    tl.store(p_e, b_grad.to(tl.bfloat16), mask=m_v)
