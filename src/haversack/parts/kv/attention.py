"""Softmax attention over blocks of keys and values, in bounded workspace; and what compiled kernels attend to instead.

One query per sequence over a form that `decode_form` knows goes to `haversack.kernels.attention`. Of longer inputs, the new tokens
attend to each other through torch's own flash attention where it can say what they see (`sees_causally`); everything else is
attended to here, block by block, and the two are put together by their log-sum-exps.

Streaming softmax (Milakov and Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135): a running maximum,
a running sum and a running output, rescaled when the maximum grows. Everything is computed in float32. Grouped heads
share their keys through a reshape of the queries, never by repeating keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeAlias

from haversack.describe.site import AttentionSite
from haversack.ledger import DTYPE_BYTES
from haversack.parts.kv.base import FEW_QUERIES, KEY_BLOCK_TOKENS, KEY_BLOCK_TOKENS_PREFILL, QUERY_BLOCK_TOKENS

if TYPE_CHECKING:
    import torch

    from haversack.kernels.attention import CacheForm
    from haversack.parts.kv.base import Attending

    Block: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
    """Keys `(batch, kv_heads, tokens, head_dim)`, values, and which are hidden `(batch|1, kv_heads|1, queries, tokens)`."""

    Blocks: TypeAlias = Callable[[int, int], Iterator[Block]]
    """Yields the blocks that the queries `[start, stop)` may attend to, each in float32."""


CAUSAL_QUERY_TOKENS = 128
"""Queries that go to torch's flash attention at once where nothing came before: it would compute what a mask then hides. 512 tokens, 32
heads of 64 channels, bfloat16, one thread's processor time: 29 ms at once, 22 so, 63 by blocks in float32."""

BLOCKWISE = "blockwise"
"""Name of the attention in this file, beside `haversack.kernels.attention.NAME`."""


def decode_form(
    site: AttentionSite,
    dtype: torch.dtype,
    key_bits: int = 0,
    value_bits: int = 0,
    group_size: int = 64,
    device_type: str = "cpu",
) -> CacheForm | None:
    """What compiled attention of one query per sequence is made for; None where there is no kernel for it here."""
    from haversack.kernels.attention import CacheForm

    heads = (site.num_heads, site.num_kv_heads, site.key_head_dim, site.value_head_dim)
    form = CacheForm(*heads, dtype, key_bits, value_bits, group_size)
    return form if form.is_supported(device_type) else None


def decode_kernel_name(form: CacheForm | None) -> str:
    from haversack.kernels.attention import NAME

    return BLOCKWISE if form is None else NAME


def key_block_tokens(num_queries: int) -> int:
    """Stored tokens per block for this many queries."""
    return KEY_BLOCK_TOKENS if num_queries <= FEW_QUERIES else KEY_BLOCK_TOKENS_PREFILL


def as_block(part: torch.Tensor) -> torch.Tensor:
    """A slice of keys or values in float32 and contiguous: products then round alike wherever the numbers came from."""
    import torch

    return part.to(torch.float32, memory_format=torch.contiguous_format).contiguous()


def sees_causally(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, how: Attending, window_tokens: int | None
) -> bool:
    """Whether torch's flash attention can say what new tokens see of each other: all that came before, nothing capped, no padding.

    `window_tokens` are the last tokens that a query sees, itself included (None: all). Its backward pass has no bound here, and on
    CPUs with tiles of their own it packs its input into memory that was never measured.
    """
    import torch

    from haversack.kernels.llvm import host_target

    return (
        query.shape[2] > 1
        and (query.device.type, keys.dtype, values.dtype) == ("cpu", query.dtype, query.dtype)
        and query.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and query.shape[3] == keys.shape[3] == values.shape[3]
        and how.softcap is None
        and how.real is None
        and (window_tokens is None or query.shape[2] <= window_tokens)
        and not (torch.is_grad_enabled() and (query.requires_grad or keys.requires_grad or values.requires_grad))
        and not host_target().has("amx-bf16")
    )


def attend_blocks(
    query: torch.Tensor,
    blocks: Blocks | None,
    *,
    num_kv_heads: int,
    value_head_dim: int,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    new: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `(batch, heads, queries, value_head_dim)` in the query's dtype, and log-sum-exp `(batch, heads, queries)`.

    `new` are keys and values of the queries' own tokens, where `sees_causally` holds; `blocks` then has what came before, or is
    None. The output is a transposed view of a contiguous `(batch, queries, heads, value_head_dim)`: the layout that the
    output projection reads.
    """
    import torch

    batch_size, num_heads, num_queries, _ = query.shape
    output = query.new_empty((batch_size, num_queries, num_heads, value_head_dim))
    lse = torch.empty((batch_size, num_heads, num_queries), dtype=torch.float32, device=query.device)
    if new is not None and blocks is None and sinks is None:
        keys, values = (x.contiguous() for x in new)
        for start in range(0, num_queries, CAUSAL_QUERY_TOKENS):
            stop = min(start + CAUSAL_QUERY_TOKENS, num_queries)
            later = query.new_full((stop - start, stop), -torch.inf).triu_(start + 1)
            part, part_lse = _flash(
                query[:, :, start:stop], keys[:, :, :stop], values[:, :, :stop], scaling, mask=later
            )
            output[:, start:stop] = part.transpose(1, 2)
            lse[:, :, start:stop] = part_lse
            del part, part_lse, later
        return output.transpose(1, 2), lse
    for start in range(0, num_queries, QUERY_BLOCK_TOKENS):
        stop = min(start + QUERY_BLOCK_TOKENS, num_queries)
        before = iter(()) if blocks is None else blocks(start, stop)
        own = []
        if new is not None:
            own = [tuple(x[:, :, first:last] for x in new) for first, last in ((0, start), (start, stop))]
        part, part_lse = _attend_query_block(
            query[:, :, start:stop], before, own, num_kv_heads, value_head_dim, scaling, softcap, sinks
        )
        output[:, start:stop] = part.transpose(1, 2)
        lse[:, :, start:stop] = part_lse
    return output.transpose(1, 2), lse


def _attend_query_block(
    query: torch.Tensor,
    blocks: Iterator[Block],
    own: list[tuple[torch.Tensor, ...]],
    num_kv_heads: int,
    value_head_dim: int,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`own` are new keys and values before those of the queries, and theirs; or nothing, and the blocks have them."""
    import torch

    batch_size, num_heads, num_queries, head_dim = query.shape
    num_groups = num_heads // num_kv_heads
    rows = num_groups * num_queries
    q = query.to(torch.float32, copy=True, memory_format=torch.contiguous_format).mul_(scaling)
    q = q.view(batch_size, num_kv_heads, rows, head_dim)
    lowest = torch.finfo(torch.float32).min
    top = q.new_full((batch_size, num_kv_heads, rows, 1), lowest)
    total = torch.zeros_like(top)
    output = q.new_zeros((batch_size, num_kv_heads, rows, value_head_dim))
    for keys, values, hidden in blocks:
        scores = torch.matmul(q, keys.transpose(-1, -2))  # (batch, kv_heads, groups * queries, tokens)
        if softcap is not None:
            if scores.requires_grad:
                scores = torch.tanh(scores / softcap) * softcap
            else:
                scores.div_(softcap).tanh_().mul_(softcap)
        if hidden is not None:
            by_group = (batch_size, num_kv_heads, num_groups, num_queries, -1)
            scores.view(by_group).masked_fill_(hidden.unsqueeze(2), -torch.inf)
        # the shift cancels out of the result, so it needs no gradient; where nothing is visible it stays finite
        new_top = torch.maximum(top, scores.detach().amax(-1, keepdim=True))
        weights = scores.sub_(new_top).exp_()
        shrink = torch.exp(top - new_top)
        total = total * shrink + weights.sum(-1, keepdim=True)
        output = torch.matmul(weights, values).add_(output * shrink)
        top = new_top
        del keys, values, hidden, scores, weights  # or two blocks would be alive while the next one is made
    for keys, values in (piece for piece in own if piece[0].shape[2]):
        part, part_lse = _flash(query, keys.contiguous(), values.contiguous(), scaling, is_causal=keys is own[-1][0])
        part_lse = part_lse.contiguous().view(batch_size, num_kv_heads, rows, 1)
        new_top = torch.maximum(top, part_lse)
        grown, shrink = torch.exp(part_lse - new_top), torch.exp(top - new_top)
        part = part.to(torch.float32).reshape(output.shape)
        output = output.mul_(shrink).add_(part.mul_(grown))
        total, top = total * shrink + grown, new_top
        del part
    lse = (top + total.log()).view(batch_size, num_heads, num_queries)
    if sinks is not None:
        logits = sinks.to(torch.float32).view(1, num_kv_heads, num_groups, 1).expand(-1, -1, -1, num_queries)
        logits = logits.reshape(1, num_kv_heads, rows, 1)
        new_top = torch.maximum(top, logits.detach())
        shrink = torch.exp(top - new_top)
        output = output * shrink
        total = total * shrink + torch.exp(logits - new_top)
    output = output / total.clamp_min(torch.finfo(torch.float32).tiny)
    return output.view(batch_size, num_heads, num_queries, value_head_dim), lse


def _flash(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    *,
    is_causal: bool = False,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp by torch. Keys and values are given contiguous, or cut from what is: products then round alike wherever
    the numbers came from."""
    import torch

    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, keys, values, 0.0, is_causal, attn_mask=mask, scale=scaling)


def _causal_bytes(batch_size: int, num_heads: int, num_kv_heads: int, head_dims: int, num_queries: int) -> int:
    """The most that new tokens' attending to each other allocates beside outputs: copies, a mask, log-sum-exps, and per thread
    torch's scores of a block of queries with up to 512 keys, their statistics, sums, and weights in 16 bits (found in torch 2.13
    for 37 to 1,024 tokens, to the byte)."""
    import torch

    f32 = DTYPE_BYTES["F32"]
    copies = batch_size * num_kv_heads * num_queries * head_dims * f32
    queries = min(num_queries, 256 if num_queries >= 768 else 64 if num_queries >= 192 else 32)
    scores = queries * min(512, num_queries)
    by_thread = f32 * (scores + 2 * queries + queries * head_dims // 2) + 2 * scores
    mask = f32 * min(num_queries, CAUSAL_QUERY_TOKENS) * num_queries
    return copies + mask + 2 * f32 * batch_size * num_heads * num_queries + torch.get_num_threads() * by_thread


def attention_workspace_bytes(
    *,
    batch_size: int,
    num_heads: int,
    num_kv_heads: int,
    key_head_dim: int,
    value_head_dim: int,
    num_queries: int,
    block_tokens: int,
    block_bytes: int,
) -> int:
    """The most bytes `attend_blocks` allocates beyond its output.

    `block_bytes` is what making one block of `block_tokens` takes (keys, values and their temporaries). Always there: scaled
    queries, nine columns of statistics, positions. Beside them, first a block and its mask (three of its planes) are made while
    one output is held; then block and mask live beside the scores and three outputs (old, its rescaling, new). Last, where new tokens
    attend to each other by torch's flash attention, what that takes and its output twice. Which new tokens do is seen when they come.
    """
    f32 = DTYPE_BYTES["F32"]
    queries = min(num_queries, QUERY_BLOCK_TOKENS)
    rows = batch_size * num_heads * queries
    plane = batch_size * queries * block_tokens * DTYPE_BYTES["BOOL"]
    output = rows * value_head_dim * f32
    held_block = batch_size * num_kv_heads * block_tokens * (key_head_dim + value_head_dim) * f32
    making = block_bytes + 3 * plane + output
    scoring = held_block + plane + rows * block_tokens * f32 + 3 * output
    head_dims = key_head_dim + value_head_dim
    causal = _causal_bytes(batch_size, num_heads, num_kv_heads, head_dims, num_queries) + 3 * output
    positions = 4 * DTYPE_BYTES["I32"] * batch_size * (num_queries + block_tokens)
    return (
        rows * key_head_dim * f32
        + 9 * rows * f32
        + batch_size * num_heads * num_queries * f32
        + positions
        + max(making, scoring, causal)
    )
