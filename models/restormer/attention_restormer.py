"""Restormer's attention between channels (arXiv 2111.09881, multi-Dconv head transposed attention), frugal in memory.

For each head, with queries, keys and values Q, K, V (c, N) of N pixels,

    Y = W softmax(t * q k^T) V,    q, k: the rows of Q, K divided by their lengths,

where W is the last 1 x 1 convolution. Two identities, ours, spare all copies of the (C, N) matrices:
(q k^T)_ij = (Q K^T)_ij / (|Q_i| |K_j|), so that normalised queries and keys are never made; and W (A V) = (W A) V, so
that W acts on the small matrix of attention A, not on the attended pixels, which are never made either. What is kept
for the backward pass is Q, K, V as the convolution before leaves them, and matrices of C x C.

All that the attention takes from the whole image are means over its pixels, of the products Q_i K_j and of the
squares of Q_i and K_j: `PixelMeans` makes them, so that tiles of an image can be given the means of all
(`colora_peft.inference.global_pooling`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ChannelAttention(nn.Module):
    """Attention of each channel to those of its head: (B, C, H, W) to the same shape."""

    def __init__(self, channels: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.empty(heads, 1, 1))
        self.qkv = nn.Conv2d(channels, 3 * channels, kernel_size=1, bias=bias)
        self.qkv_dwconv = nn.Conv2d(
            3 * channels, 3 * channels, kernel_size=3, padding=1, groups=3 * channels, bias=bias
        )
        self.pixel_means = PixelMeans()
        self.project_out = nn.Conv2d(channels, channels, kernel_size=1, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.temperature)

    def forward(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape[1:]
        qkv = self.qkv_dwconv(self.qkv(x)).permute(0, 2, 3, 1)
        # One split of all: its gradient is put together once, with channels last as the convolution wants it.
        *parts, values = qkv.split([channels // self.heads] * (2 * self.heads) + [channels], dim=3)
        values = values.flatten(1, 2)
        attention = cosines(self.pixel_means(*[part.permute(0, 3, 1, 2) for part in parts])) * self.temperature
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


class PixelMeans(nn.Module):
    """Means over the pixels from which the cosines between channels follow; a module without parameters."""

    averages_over_pixels = True

    def forward(self, *parts: Tensor) -> Tensor:
        """Mean products of queries and then keys, (B, c, H, W) for each head: (B, heads, c, c + 2), at least float32.

        Rows are queries, columns keys. The last two columns are the mean squares of the queries and of the keys.
        """
        parts = tuple(part.permute(0, 2, 3, 1).flatten(1, 2) for part in parts)  # (B, H W, c): views of channels_last
        heads, pixels, dtype = len(parts) // 2, parts[0].shape[1], parts[0].dtype
        wide = torch.promote_types(dtype, torch.float32)
        squares = torch.stack([torch.linalg.vector_norm(part, dim=1, dtype=wide) for part in parts], dim=1).square()
        queries, keys = parts[:heads], parts[heads:]
        if dtype == torch.float16:
            # Sums over all pixels may exceed its largest number.
            queries = [query * pixels**-0.5 for query in queries]
        products = torch.stack([torch.bmm(q.transpose(1, 2), k) for q, k in zip(queries, keys, strict=True)], dim=1)
        products = products.to(wide) * (pixels**-0.5 if dtype == torch.float16 else 1 / pixels)
        of_queries, of_keys = (squares / pixels).unsqueeze(3).split(heads, dim=1)
        return torch.cat([products, of_queries, of_keys], dim=3)


def cosines(means: Tensor) -> Tensor:
    """Cosines (B, heads, c, c) of queries and keys, from `PixelMeans`; 0 for channels that are zero everywhere."""
    products, lengths = means[..., :-2], means[..., -2:].clamp_min(1e-24).sqrt()
    return products / lengths[..., :1] / lengths[..., 1:].transpose(2, 3)
