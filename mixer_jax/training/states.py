"""Training states on disk: written by Orbax in the background, each complete or not at all, and verified when read.

Every process writes the parts that it holds, and reads those that it will hold: on other devices, or under another sharding,
a state is the same bit for bit.
"""

__all__ = ["States"]

import contextlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from convert import CheckpointError
from convert.formats.zarr import reason

from ..sharding.digest import digests
from .step import TrainState

KEPT = 2
ADVICE = ": those before it are still there; with room on the disk, the same command goes on"


class States:
    """The states of a run in a folder, by step; the newest are kept.

    What a killed process left half-written is removed at the start, and never taken for a state.
    """

    def __init__(self, folder: Path):
        import orbax.checkpoint as ocp

        self._ocp, self._folder = ocp, folder.absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, cleanup_tmp_directories=True, create=True)
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_names=("state", "facts"))

    @property
    def newest(self) -> int | None:
        """The step of the newest state, None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Start to write a state, after the state before it has been written."""
        step = int(state.step)
        if step == self.newest:
            return
        arrays = jax.tree.map(jnp.copy, _by_name(state))  # a compiled step takes over the memory of the state it is given
        facts = {"digests": digests(arrays)}
        items = self._ocp.args.Composite(state=self._ocp.args.StandardSave(arrays), facts=self._ocp.args.JsonSave(facts))
        with self._explained(f"the state of step {step} cannot be saved", ADVICE):
            self._manager.save(step, args=items)

    def restore(self, like: TrainState) -> TrainState:
        """The newest state, with the shapes, dtypes and shardings of another.

        Raises CheckpointError if it is not what was written.
        """
        step, arrays = self.newest, _by_name(like)
        shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for name, leaf in arrays.items()}
        items = self._ocp.args.Composite(state=self._ocp.args.StandardRestore(shapes), facts=self._ocp.args.JsonRestore())
        with self._explained(f"the state of step {step} cannot be read"):
            restored = self._manager.restore(step, args=items)
        arrays = {name: restored["state"][name] for name in arrays}
        written = restored["facts"]["digests"]
        if wrong := [name for name, digest in digests(arrays).items() if digest != written.get(name)]:
            fault = f"the state of step {step} is damaged (its digest is another): {wrong[0]}"
            raise CheckpointError(f"{self._folder}: {fault}: remove {self._folder / str(step)} to go on from an older state")
        # Copies: a compiled step may take over their memory, which Orbax may share with others.
        return jax.tree.unflatten(jax.tree.structure(like), [jnp.copy(array) for array in arrays.values()])

    def finish(self) -> None:
        """Wait until all is written. Raises CheckpointError where that failed; older states are still there."""
        with self._explained("a state cannot be saved", ADVICE):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        with contextlib.suppress(Exception):  # what failed has been said by `finish`
            self._manager.close()

    @contextlib.contextmanager
    def _explained(self, what: str, advice: str = "") -> Any:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise whatever was underneath
            raise CheckpointError(f"{self._folder}: {what}: {reason(error)}{advice}") from None


def _by_name(state: TrainState) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path).replace("/", "."): leaf for path, leaf in leaves}
