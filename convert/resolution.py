"""Weights for another grid of patches: the paper's exact rule for whole multiples, and an approximate one for any grid.

Both take and give google's names and axes. Only the token-mixing MLPs know the grid, so all other arrays are passed on as
they are. Nothing is read before its values are needed. Grids are in patches, height first.
"""

__all__ = ["expanded", "interpolation", "resampled"]

from collections.abc import Callable, Mapping

import numpy as np
from einops import einsum, rearrange, repeat

from .arrays import Array, Arrays, LazyArray
from .config import Size, as_size
from .errors import CheckpointError
from .layouts import BIAS, GOOGLE, WEIGHT
from .mapping import Sizes, shapes, sizes_of, slots

Operations = Mapping[tuple[str, int], Callable[[np.ndarray], np.ndarray]]  # by module and leaf


def expanded(canonical: Arrays, *, old_grid: Size, factor: int) -> dict[str, Array]:
    """For images `factor` = K times as high and as wide: K x K copies of each token-mixing MLP (paper, Appendix C).

    S tokens become K² S and D_S becomes K² D_S. The paper's matrices are block-diagonal for the sequences of the K x K
    parts of the image, one after the other; tokens here are in row-major order over the whole image, so the matrices are
    permuted. The logits are the mean of the old model's logits over the K x K crops.

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
        ("token_mixing/dense_0", WEIGHT): lambda w: rearrange(np.where(own[:, :, None], w[inner, None], 0), "n p d -> n (p d)"),
        ("token_mixing/dense_0", BIAS): lambda b: repeat(b, "d -> (p d)", p=factor**2),
        ("token_mixing/dense_1", WEIGHT): lambda w: rearrange(np.where(own.T[:, None], w[:, inner], 0), "p d n -> (p d) n"),
        ("token_mixing/dense_1", BIAS): lambda b: b[inner],
    }
    new = {"num_tokens": len(inner), "tokens_mlp_dim": factor**2 * sizes["tokens_mlp_dim"]}
    return _changed(canonical, sizes | new, operations)


def resampled(canonical: Arrays, *, old_grid: Size, new_grid: Size) -> dict[str, Array]:
    """For any other grid, approximately: each token-mixing MLP works on the old grid, between two resamplings.

    New MLP(x) = to_new(old MLP(to_old(x))), both linear maps multiplied into the kernels: the filters of dense_0 keep their
    sums, those of dense_1 and its bias their values. D_S stays. Tokens that are all the same give the hidden units that they
    gave before; on a grid no smaller either way, tokens up-scaled by `interpolation` give the old output up-scaled, and
    resampling back gives the weights back. The whole model is approximate, since no other layer commutes with interpolation.

    Sums are in float64, rounded to the arrays' dtype; the same grid gives the same arrays. Raises ValueError for what is no
    grid, CheckpointError where the old one does not fit the number of tokens.
    """
    new = as_size(new_grid, "new_grid")
    old, sizes = _grid_and_sizes(canonical, old_grid)
    if new == old:
        return dict(canonical)
    to_new = [interpolation(a, b) for a, b in zip(old, new)]
    to_old_transposed = [interpolation(b, a).T for a, b in zip(old, new)]

    operations: Operations = {
        ("token_mixing/dense_0", WEIGHT): lambda w: rearrange(_over_grid(w.T, *to_old_transposed), "d n -> n d"),
        ("token_mixing/dense_1", WEIGHT): lambda w: _over_grid(w, *to_new),
        ("token_mixing/dense_1", BIAS): lambda b: _over_grid(b, *to_new),
    }
    return _changed(canonical, sizes | {"num_tokens": new[0] * new[1]}, operations)


def interpolation(old: int, new: int) -> np.ndarray:
    """The (new, old) float64 matrix that resamples a line of `old` cells to `new`; its rows sum to one.

    To more cells: cubic convolution between their centres (Keys 1981, a = -1/2), the weights within the line scaled up at
    its ends. To fewer: the pseudo-inverse of the way back, so the line whose up-scaling is nearest. For dense_0 on a larger
    grid that is how FlexiViT (Beyer et al. 2023) resizes a patch embedding.
    """
    if new < old:
        return np.linalg.pinv(interpolation(new, old))
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    d = np.abs(np.arange(old) - centres[:, None])
    keys = np.where(d < 1, (1.5 * d - 2.5) * d**2 + 1, np.where(d < 2, ((2.5 - 0.5 * d) * d - 4) * d + 2, 0))
    return keys / keys.sum(axis=1, keepdims=True)


def _over_grid(values: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The last axis, tokens in row-major order, through one matrix for each axis of the grid; in float64."""
    image = rearrange(values.astype(np.float64), "... (h w) -> ... h w", h=rows.shape[1], w=columns.shape[1])
    image = einsum(rows, image, "y h, ... h w -> ... y w")
    image = einsum(columns, image, "x w, ... y w -> ... y x")
    return rearrange(image, "... y x -> ... (y x)")


def _grid_and_sizes(canonical: Arrays, old_grid: Size) -> tuple[Size, Sizes]:
    (gh, gw), sizes = as_size(old_grid, "old_grid"), sizes_of(canonical, GOOGLE)
    if gh * gw != sizes["num_tokens"]:
        raise CheckpointError(f"old_grid {gh}x{gw} has {gh * gw} patches, and the weights are for {sizes['num_tokens']}")
    return (gh, gw), sizes


def _changed(canonical: Arrays, sizes: Sizes, operations: Operations) -> dict[str, Array]:
    """The arrays, those with an operation changed when they are read to what a model of these sizes has."""
    new_shapes, places = shapes(GOOGLE, sizes), slots(GOOGLE, sizes)

    def array(name: str, old: Array) -> Array:
        operation = operations.get((places[name].module, places[name].leaf))
        if operation is None:
            return old

        def read(index: int | None) -> np.ndarray:
            values = np.ascontiguousarray(operation(np.asarray(old)), old.dtype)
            return values if index is None else values[index]

        return LazyArray(new_shapes[name], old.dtype, read)

    return {name: array(name, old) for name, old in canonical.items()}
