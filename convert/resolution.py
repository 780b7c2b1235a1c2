"""Weights for another grid of patches: the paper's exact rule for whole multiples, and an approximate one for any grid.

Both take and give google's names and axes. Only the token-mixing MLPs know the grid, so all other arrays are passed on as
they are; what is changed is read when it is asked for.
"""

from collections.abc import Callable, Mapping

import numpy as np
from einops import einsum, rearrange, repeat

from .arrays import Array, Arrays, LazyArray
from .config import Size, as_size
from .errors import CheckpointError
from .layouts import GOOGLE
from .mapping import Sizes, shapes, sizes_of

Operations = Mapping[str, Callable[[np.ndarray], np.ndarray]]  # by the name that follows the block's


def expanded(canonical: Arrays, *, old_grid: Size, factor: int) -> dict[str, Array]:
    """For images `factor` = K times as high and as wide: K x K copies of each token-mixing MLP (paper, Appendix C).

    S tokens become K² S and D_S becomes K² D_S. The paper's matrices are block-diagonal for the sequences of the K x K
    parts of the image, one after the other; tokens here are in row-major order over the whole image, so the matrices are
    permuted. The logits are the mean of the old model's logits over the K x K crops. `old_grid` is in patches, height first.

    Raises ValueError for a factor below 1, CheckpointError where the grid does not have as many patches as there are tokens.
    """
    if not isinstance(factor, int) or factor < 1:
        raise ValueError(f"factor must be a whole number of at least 1, not {factor!r}")
    (gh, gw), sizes = _grid_and_sizes(canonical, old_grid)
    row, column = np.divmod(np.arange(factor * gh * factor * gw), factor * gw)
    part = row // gh * factor + column // gw
    inner = row % gh * gw + column % gw
    own = part[:, None] == np.arange(factor**2)

    operations: Operations = {
        "token_mixing/Dense_0/kernel": lambda w: rearrange(np.where(own[:, :, None], w[inner, None, :], 0), "n p d -> n (p d)"),
        "token_mixing/Dense_0/bias": lambda b: repeat(b, "d -> (p d)", p=factor**2),
        "token_mixing/Dense_1/kernel": lambda w: rearrange(np.where(own.T[:, None, :], w[:, inner], 0), "p d n -> (p d) n"),
        "token_mixing/Dense_1/bias": lambda b: b[inner],
    }
    new = {"num_tokens": len(inner), "tokens_mlp_dim": factor**2 * sizes["tokens_mlp_dim"]}
    return _changed(canonical, sizes | new, operations)


def resampled(canonical: Arrays, *, old_grid: Size, new_grid: Size) -> dict[str, Array]:
    """For any other grid, approximately: each token-mixing MLP works on the old grid, between two resamplings of the image.

    New MLP(x) = to_new(old MLP(to_old(x))), with the two linear maps multiplied into the kernels; D_S and the hidden
    biases stay. Seen from the weights: the filters of Dense_0 are resampled as images and scaled so that they keep their
    sum, those of Dense_1 and its bias are resampled and not scaled. An image constant over the tokens gives the hidden
    units that it gave before. Sums are in float64, rounded to the arrays' dtype. Grids are in patches, height first; the
    same grid gives the same arrays.

    Not the paper's rule and not exact: `expanded` is, where it applies. Raises ValueError for what is no grid,
    CheckpointError where the old grid does not have as many patches as there are tokens.
    """
    new = as_size(new_grid, "new_grid")
    old, sizes = _grid_and_sizes(canonical, old_grid)
    if new == old:
        return dict(canonical)
    to_new = [interpolation(a, b) for a, b in zip(old, new)]
    from_old = [interpolation(b, a).T for a, b in zip(old, new)]  # the transposed map takes filters from the old grid

    operations: Operations = {
        "token_mixing/Dense_0/kernel": lambda w: rearrange(_over_grid(w.T, *from_old), "d n -> n d"),
        "token_mixing/Dense_1/kernel": lambda w: _over_grid(w, *to_new),
        "token_mixing/Dense_1/bias": lambda b: _over_grid(b, *to_new),
    }
    return _changed(canonical, sizes | {"num_tokens": new[0] * new[1]}, operations)


def interpolation(old: int, new: int) -> np.ndarray:
    """The (new, old) float64 matrix that resamples a line of `old` cells to `new`; its rows sum to one.

    Linear between the centres of the cells, constant beyond the outermost; where cells grow, the triangle is as wide as a
    new cell (antialiasing).
    """
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    triangles = np.maximum(0, 1 - np.abs(np.arange(old) - centres[:, None]) / max(old / new, 1))
    return triangles / triangles.sum(axis=1, keepdims=True)


def _over_grid(values: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The last axis, tokens in row-major order, through one matrix for each axis of the grid; in float64."""
    image = rearrange(values.astype(np.float64), "... (h w) -> ... h w", h=rows.shape[1], w=columns.shape[1])
    image = einsum(rows, image, "y h, ... h w -> ... y w")
    image = einsum(columns, image, "x w, ... y w -> ... y x")
    return rearrange(image, "... y x -> ... (y x)")


def _grid_and_sizes(canonical: Arrays, old_grid: Size) -> tuple[Size, Sizes]:
    grid, sizes = as_size(old_grid, "old_grid"), sizes_of(canonical, GOOGLE)
    if grid[0] * grid[1] != sizes["num_tokens"]:
        raise CheckpointError(
            f"old_grid {grid[0]}x{grid[1]} does not fit: it has {grid[0] * grid[1]} patches, "
            f"and the weights are for {sizes['num_tokens']}"
        )
    return grid, sizes


def _changed(canonical: Arrays, sizes: Sizes, operations: Operations) -> dict[str, Array]:
    """The arrays for the new sizes, those of the operations' names changed when they are read."""
    new_shapes = shapes(GOOGLE, sizes)

    def changed(name: str, array: Array, change: Callable[[np.ndarray], np.ndarray]) -> Array:
        def read(index: int | None) -> np.ndarray:
            values = change(np.asarray(array)).astype(array.dtype, copy=False)
            return values if index is None else values[index]

        return LazyArray(new_shapes[name], array.dtype, read)

    changes = {name: operations.get(name.partition("/")[2]) for name in canonical}
    return {name: changed(name, array, c) if (c := changes[name]) else array for name, array in canonical.items()}
