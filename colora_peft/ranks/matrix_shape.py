"""The shape of a layer's weight as a matrix, and what an adapter of a given rank takes there."""

from typing import NamedTuple


class MatrixShape(NamedTuple):
    """Shape (d, k) of a layer's weight as a matrix; as a tuple of two it can be written plainly.

    A delta of rank r has two factors, (d, r) and (r, k). Where these hold as many numbers as the weight itself, the
    delta is kept dense, as one (d, k) matrix. Configurations write the rank of a dense delta as min(d, k).
    """

    d: int
    k: int

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.d * self.k

    @property
    def dense_rank(self) -> int:
        """The rank that stands for a dense delta in configurations."""
        return min(self)

    @property
    def lowest_dense_rank(self) -> int:
        """The rank from which on factors hold at least as many numbers as the weight."""
        return -(-self.size // (self.d + self.k))

    @property
    def levels(self) -> list[int]:
        """The ranks above 0 that a layer can have, as configurations write them; the last of them is dense."""
        return [*range(1, self.lowest_dense_rank), self.dense_rank]

    def is_dense(self, rank: int) -> bool:
        """Whether the delta of this rank is kept dense."""
        return rank >= self.lowest_dense_rank

    def stored_rank(self, rank: int) -> int:
        """The rank as configurations write it: min(d, k) where the delta is dense, else `rank` itself."""
        return self.dense_rank if self.is_dense(rank) else rank

    def parameters(self, rank: int) -> int:
        """Number of trained parameters at this rank."""
        return min(rank * (self.d + self.k), self.size)

    def trained_share(self, rank: int) -> float:
        """Trained parameters over weights, delta = r (d + k) / (d k), in [0, 1]."""
        return self.parameters(rank) / self.size
