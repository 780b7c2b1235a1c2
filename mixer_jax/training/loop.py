"""The run of a fine-tuning: steps, evaluations, states, and the same bits whether it was interrupted or not."""

__all__ = ["Interrupted", "Trainer"]

import contextlib
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import logsumexp
from tqdm import tqdm

from convert import CheckpointError

from ..evaluation import Accuracy, Evaluation, best_classes
from ..model import MlpMixer
from ..pretrained import load, save
from ..sharding.processes import all_or_none, exchanged, is_first, of_first
from .batches import EvaluationBatches, TrainingBatches
from .config import FinetuneConfig
from .data import Splits
from .features import FeatureBatches, Features, FeaturesInOrder
from .freezing import named_weights
from .run_folder import FollowedRun, RunFolder
from .states import States
from .step import TrainState, initial_state, make_train_step, with_weights

STATES, BEST, LAST, FEATURES = "states", "best", "last", "features"
ASK_EVERY = 10  # steps after which several processes ask each other whether to save or to stop


class Interrupted(Exception):
    """A signal asked the run to stop; its state has been saved. `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@dataclass(eq=False, kw_only=True)
class Trainer:
    """A run of a config on a model and images, in a folder. `run` returns the accuracy on the test images, None without any.

    At step k: train, evaluate, write the weights, and last of all the state. So a process that is killed anywhere goes on from
    a state whose rows and weights are all there, and does what comes after it again, to the same bits. A state is saved at
    each evaluation, and where these are further apart every `save_seconds`. Where the model is placed on a mesh, so is all
    else; of several processes each runs this, decodes its own images, and writes its own part of the states.
    """

    model: MlpMixer
    splits: Splits
    config: FinetuneConfig
    folder: RunFolder | FollowedRun
    threads: int | None = None
    save_seconds: float = 600

    def __post_init__(self) -> None:
        self._unreadable: dict[str, str] = {}
        self._saved_at = time.monotonic()

    def run(self) -> Accuracy | None:
        """Train to the end, from the newest state in the folder if there is one.

        Raises CheckpointError where the loss or the norm of the gradient is not finite, and where a file cannot be written;
        Interrupted after SIGTERM or Ctrl-C, with the state saved. What was saved before stays.
        """
        states = States(self.folder.path / STATES)
        try:
            with _signals() as stopping:
                state = self._started(states)
                if self._last_row is None:
                    self._train(state, states, stopping)
            return self.test_accuracy
        finally:
            states.close()

    @property
    def best_row(self) -> dict[str, Any]:
        """The row of the evaluation that chose `best`: most images right, then the lowest loss, then the earliest."""
        evaluations = [row for row in self.folder.rows if "validation_correct" in row]
        return min(evaluations, key=lambda row: (-row["validation_correct"], row["validation_loss"], row["step"]))

    @property
    def test_accuracy(self) -> Accuracy | None:
        """That of the best weights; None before the end, and where no images are set apart for the test."""
        row = self._last_row
        return Accuracy.of(row["test_correct"], row["test_images"]) if row and "test_loss" in row else None

    @property
    def _last_row(self) -> dict[str, Any] | None:
        """What is added when all has been done."""
        return next((row for row in self.folder.rows if "best_step" in row), None)

    def _started(self, states: States) -> TrainState:
        """The newest state, with the metrics up to it; or the first one, evaluated."""
        state = initial_state(self.model, self.config.recipe)
        self.folder.keep_until(states.newest)
        self.folder.rows = of_first(self.folder.rows)
        if states.newest is not None:
            return states.restore(state)
        self._evaluate(state, states)
        return state

    def _train(self, state: TrainState, states: States, stopping: "_Stopping") -> None:
        recipe = self.config.recipe
        train_step = make_train_step(self.model, recipe, from_features=self.config.cache_features)
        step = jax.jit(train_step, donate_argnums=0)
        key, first = jax.random.key(self.config.seed), int(state.step)
        total = recipe.total_steps or first
        computing: deque[tuple[int, dict[str, jax.Array]]] = deque()
        with contextlib.ExitStack() as stack:
            batches = stack.enter_context(contextlib.closing(self._batches.starting_at(first)))
            hidden = None if is_first() else True
            bar = stack.enter_context(tqdm(total=total, initial=first, desc="training", unit="step", disable=hidden))
            for k in range(first + 1, total + 1):
                batch = next(batches)
                state, metrics = step(state, self._placed(batch.images), self._placed(batch.labels), key)
                computing.append((k, metrics))
                evaluating = k % self.config.evaluate_every == 0 or k == total
                signal, due = self._asked(k, stopping)
                saving = evaluating or signal or due
                while len(computing) > (0 if saving else 1):
                    self._note(*computing.popleft(), bar)
                if evaluating:
                    self._evaluate(state, states)
                elif saving:
                    self._save(state, states)
                if signal:
                    self.folder.draw()
                    states.finish()
                    raise Interrupted(signal)
        self._end(states)

    def _asked(self, k: int, stopping: "_Stopping") -> tuple[int, bool]:
        """The signal that stops the run, and whether a state is due by time. Of several processes any can say so."""
        due = time.monotonic() - self._saved_at > self.save_seconds
        if jax.process_count() == 1:
            return stopping.signal, due
        answers = exchanged([stopping.signal, due]) if k % ASK_EVERY == 0 else [[0, False]]
        return max(signal for signal, _ in answers), any(due for _, due in answers)

    def _note(self, k: int, metrics: dict[str, jax.Array], bar: Any) -> None:
        """Add a step's metrics, or stop at once where they are not finite."""
        values = {name: float(metrics[name]) for name in ("loss", "gradient_norm", "rate")}
        if wrong := [name for name in ("loss", "gradient_norm") if not math.isfinite(values[name])]:
            self._stop(f"{wrong[0]} is {values[wrong[0]]} in step {k}")
        self.folder.add({"step": k} | values)
        bar.update()
        if not bar.disable:
            speed = (bar.format_dict["rate"] or 0) * self.config.batch_size
            bar.set_postfix_str(f"loss {values['loss']:.3f}, rate {values['rate']:.1e}, {speed:.0f} images/s", refresh=False)

    def _evaluate(self, state: TrainState, states: States) -> None:
        """Score the validation images; keep the weights, and those of the best row; save."""
        evaluation, loss = self.evaluated(state.averaged, "validation")
        k, accuracy = int(state.step), evaluation.top1
        if not math.isfinite(loss):
            self._stop(f"the validation loss is {loss} after step {k}")
        self.folder.add({"step": k} | _row("validation", accuracy, loss))
        if self.best_row["step"] == k:
            self._write(state, BEST)
        self._write(state, LAST)
        tqdm.write(f"step {k:<6} {100 * accuracy.accuracy:6.2f} % of {accuracy.images} validation images, loss {loss:.4f}")
        self._save(state, states)

    def _stop(self, fault: str) -> NoReturn:
        self.folder.draw()
        with all_or_none():
            raise CheckpointError(
                f"{self.folder.path}: {fault}: stopped before anything of it was saved. Try a lower base_rate, or float32, in "
                "a new folder; the weights before it are in last/ and best/"
            )

    def _save(self, state: TrainState, states: States) -> None:
        self.folder.write_table()
        self.folder.flush()
        states.save(state)
        self._saved_at = time.monotonic()

    def _write(self, state: TrainState, name: str) -> None:
        save(with_weights(self.model, state.averaged), self.folder.path / name, force=True)

    def _end(self, states: States) -> None:
        """Score the best weights on the test images, once."""
        states.finish()
        row: dict[str, Any] = {"step": self.config.recipe.total_steps, "best_step": self.best_row["step"]}
        own = {"param_dtype": self.model.stem.kernel.dtype, "sharding": self.model.placement}
        best = named_weights(load(self.folder.path / BEST, **own))
        evaluation, loss = self.evaluated(best, "validation" if self.splits.test is None else "test")
        if self.splits.test is not None:
            row |= _row("test", evaluation.top1, loss)
        self.folder.draw(evaluation)
        self.folder.add(row, last=True)
        unreadable = _merged(exchanged(self._unreadable | self._batches.unreadable))
        for name, error in sorted(unreadable.items()):
            tqdm.write(f"not used: {name}: {error}")
        if unreadable:
            tqdm.write(f"{len(unreadable)} image{'s' * (len(unreadable) > 1)} could not be used")

    def evaluated(self, weights: dict[str, Any], part: str) -> tuple[Evaluation, float]:
        """What weights get right of a part of the images, as `evaluate` sees them; and the mean softmax cross-entropy."""
        labels, logits, batches = [], [], self._in_order(part)
        for batch in batches:
            output, read = self._logits(weights, self._placed(batch.images), self._placed(batch.mask))
            used = np.asarray(read) > 0
            labels.append(batch.labels[used])
            logits.append(np.asarray(output, np.float64)[used])
        unreadable = _merged(exchanged(batches.unreadable))
        self._unreadable |= unreadable
        true, outputs = np.concatenate(labels), np.concatenate(logits)
        if not len(true):
            name, error = next(iter(sorted(unreadable.items())))
            fault = f"none of the {part} images can be used, such as {name}: {error}"
            raise CheckpointError(f"{self.folder.path}: {fault}")
        loss = float((logsumexp(outputs, axis=1) - outputs[np.arange(len(true)), true]).mean())
        names, preprocessing = self.splits.train.classes, str(self.model.preprocessing)
        return Evaluation(names, preprocessing, "label", true, best_classes(outputs), unreadable), loss

    @cached_property
    def _logits(self) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """Logits of a batch, and which of its images were read, in every process."""
        placement = self.model.placement

        def logits(weights: dict[str, Any], images: jax.Array, read: jax.Array) -> tuple[jax.Array, jax.Array]:
            model = with_weights(self.model, weights)
            return model.logits(images) if self.config.cache_features else model(images), read

        return jax.jit(logits, out_shardings=None if placement is None else placement.everywhere)

    def _placed(self, array: np.ndarray) -> jax.Array:
        return jnp.asarray(array) if self.model.placement is None else self.model.placement.put(array)

    @cached_property
    def _batches(self) -> TrainingBatches | FeatureBatches:
        size, seed = self.config.batch_size, self.config.seed
        if self.config.cache_features:
            return FeatureBatches(features=self._features("train"), batch_size=size, seed=seed)
        options = self._images | {"augmentation": self.config.augmentation, "batch_size": size, "seed": seed}
        options["rows"] = self._rows(size)
        return TrainingBatches(dataset=self.splits.train, **options)

    def _in_order(self, part: str) -> EvaluationBatches | FeaturesInOrder:
        if self.config.cache_features:
            return FeaturesInOrder(features=self._features(part), batch_size=self.config.batch_size)
        rows = self._rows(self._images["batch_size"])
        return EvaluationBatches(dataset=getattr(self.splits, part), rows=rows, **self._images)

    def _features(self, part: str) -> Features:
        file = self.folder.path / FEATURES / f"{part}.npy"
        return Features.cached(file, self.model, getattr(self.splits, part), **self._images)

    @property
    def _images(self) -> dict[str, Any]:
        return {
            "batch_size": self.config.batch_size // self.config.recipe.accumulation,
            "image_size": self.model.config.image_size,
            "preprocessing": self.model.preprocessing,
            "threads": self.threads,
        }

    def _rows(self, batch_size: int) -> np.ndarray | None:
        """Those of a batch that this process reads; None for all."""
        return None if self.model.placement is None else self.model.placement.rows(batch_size)


def _merged(dicts: list[dict[str, str]]) -> dict[str, str]:
    return {name: text for each in dicts for name, text in each.items()}


def _row(part: str, accuracy: Accuracy, loss: float) -> dict[str, Any]:
    return {f"{part}_correct": accuracy.correct, f"{part}_images": accuracy.images, f"{part}_loss": loss}


@dataclass
class _Stopping:
    signal: int = 0


@contextlib.contextmanager
def _signals() -> Iterator[_Stopping]:
    """Note SIGTERM and Ctrl-C instead of ending at once; a second one ends at once. Outside the main thread nothing changes."""
    stopping = _Stopping()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, frame: Any) -> None:
        stopping.signal = number
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
