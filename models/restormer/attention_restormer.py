"""Restormer's attention between channels (arXiv 2111.09881, multi-Dconv head transposed attention), frugal in memory.

For each head, with queries, keys and values Q, K, V (c, N) of N pixels,

    Y = W softmax(t * q k^T) V,    q, k: the rows of Q, K divided by their lengths,

where W is the last 1 x 1 convolution. Two identities, ours, spare all copies of the (C, N) matrices:
(q k^T)_ij = (Q K^T)_ij / (|Q_i| |K_j|), so that normalised queries and keys are never made; and W (A V) = (W A) V, so
that W acts on the small matrix of attention A, not on the attended pixels, which are never made either. What is kept
for the backward pass is Q, K, V as the convolution before leaves them, and matrices of C x C.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

EPSILON = 1e-12
"""The least length that queries and keys are divided by."""


class ChannelAttention(nn.Module):
    """Attention of each channel to those of its head: (B, C, H, W) to the same shape."""

    def __init__(self, channels: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Conv2d(channels, 3 * channels, kernel_size=1, bias=bias)
        self.qkv_dwconv = nn.Conv2d(
            3 * channels, 3 * channels, kernel_size=3, padding=1, groups=3 * channels, bias=bias
        )
        self.project_out = nn.Conv2d(channels, channels, kernel_size=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape[1:]
        qkv = self.qkv_dwconv(self.qkv(x)).permute(0, 2, 3, 1).flatten(1, 2)
        # One split of all: its gradient is put together once.
        *parts, values = qkv.split([channels // self.heads] * (2 * self.heads) + [channels], dim=2)
        attention = similarity(parts[: self.heads], parts[self.heads :]) * self.temperature
        attention = attention.softmax(dim=-1).to(values.dtype)
        # The smaller image goes through the convolution. A traced graph must not depend on the size.
        if torch.compiler.is_compiling() or height * width > channels:
            y = self._project_attention(attention, values)
            return y.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        heads = values.unflatten(2, (self.heads, -1)).transpose(1, 2)
        attended = (heads @ attention.transpose(2, 3)).transpose(1, 2).flatten(2)
        return self.project_out(attended.unflatten(1, (height, width)).permute(0, 3, 1, 2))

    def _project_attention(self, attention: Tensor, values: Tensor) -> Tensor:
        """`attention` (B, heads, c, c) and `values` (B, N, C) to W A V (B, N, C), by W on the columns of A.

        `project_out` is called as any module, so adapters and hooks see it. It adds its bias to each column; a column
        of zeros tells which.
        """
        blocks = torch.diag_embed(attention.permute(0, 2, 3, 1))  # (B, c, c, heads, heads)
        matrix = blocks.permute(0, 3, 1, 4, 2).flatten(3, 4).flatten(1, 2)
        image = nn.functional.pad(matrix, (0, 1)).unsqueeze(3)
        projected = self.project_out(image).squeeze(3)
        bias = projected[..., -1:]
        matrix = projected[..., :-1] - bias
        return torch.baddbmm(bias.transpose(1, 2), values.to(matrix.dtype), matrix.transpose(1, 2))


def similarity(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
    """Cosines (B, heads, c, c) between the channels of `queries` and `keys`, a tensor (B, N, c) for each head.

    In float32 at least. Channels without any length have the cosine 0.
    """
    dtype = torch.promote_types(queries[0].dtype, torch.float32)
    if queries[0].dtype == torch.float16:
        # Sums over all pixels may exceed its largest number; the cosine does not depend on the scale.
        queries = [query * query.shape[1] ** -0.5 for query in queries]
    products = torch.stack([torch.bmm(q.transpose(1, 2), k) for q, k in zip(queries, keys, strict=True)], dim=1)
    lengths = [
        torch.stack([torch.linalg.vector_norm(part, dim=1, dtype=dtype) for part in parts], dim=1).clamp_min(EPSILON)
        for parts in (queries, keys)
    ]
    return products.to(dtype) / lengths[0].unsqueeze(3) / lengths[1].unsqueeze(2)
