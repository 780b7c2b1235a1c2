"""The run of a fine-tuning: steps, evaluations, states, and the same bits whether it was interrupted or not."""

__all__ = ["Interrupted", "Scores", "Trainer"]

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import logsumexp
from tqdm import tqdm

from convert import CheckpointError

from ..model import MlpMixer
from ..pretrained import load, save
from .config import FinetuneConfig
from .data import Dataset, EvaluationBatches, Splits, TrainingBatches
from .freezing import named_weights
from .run_folder import RunFolder
from .states import States
from .step import TrainState, initial_state, make_train_step, with_weights

STATES, BEST, LAST = "states", "best", "last"


class Interrupted(Exception):
    """A signal asked the run to stop; its state has been saved. `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@dataclass(frozen=True)
class Scores:
    """How many of the images that could be read are right, and the mean of their loss (softmax cross-entropy)."""

    correct: int
    images: int
    loss: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.images


@dataclass(eq=False, kw_only=True)
class Trainer:
    """A run of a config on a model and images, in a folder. `run` returns the scores on the test images, None without any.

    At step k: train, evaluate, write the weights, and last of all the state. So a process that is killed anywhere goes on from
    a state whose rows and weights are all there, and does what comes after it again, to the same bits.
    """

    model: MlpMixer
    splits: Splits
    config: FinetuneConfig
    folder: RunFolder
    threads: int | None = None

    def run(self) -> Scores | None:
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
            return self.test_scores
        finally:
            states.close()

    @property
    def best_row(self) -> dict[str, Any]:
        """The row of the evaluation that chose `best`: most images right, then the lowest loss, then the earliest."""
        evaluations = [row for row in self.folder.rows if "validation_correct" in row]
        return min(evaluations, key=lambda row: (-row["validation_correct"], row["validation_loss"], row["step"]))

    @property
    def test_scores(self) -> Scores | None:
        """Those of the best weights; None before the end, and where no images are set apart for the test."""
        row = self._last_row
        return Scores(row["test_correct"], row["test_images"], row["test_loss"]) if row and "test_loss" in row else None

    @property
    def _last_row(self) -> dict[str, Any] | None:
        """What is added when all has been done."""
        return next((row for row in self.folder.rows if "best_step" in row), None)

    def _started(self, states: States) -> TrainState:
        """The newest state, with the metrics up to it; or the first one, evaluated."""
        state = initial_state(self.model, self.config.recipe)
        self.folder.keep_until(states.newest)
        if states.newest is not None:
            return states.restore(state)
        self._evaluate(state, states)
        return state

    def _train(self, state: TrainState, states: States, stopping: "_Stopping") -> None:
        recipe = self.config.recipe
        step = jax.jit(make_train_step(self.model, recipe), donate_argnums=0)
        key, first = jax.random.key(self.config.seed), int(state.step)
        total = recipe.total_steps or first
        before: tuple[int, dict[str, jax.Array]] | None = None
        with contextlib.ExitStack() as stack:
            batches = stack.enter_context(contextlib.closing(self._batches.starting_at(first)))
            bar = stack.enter_context(tqdm(total=total, initial=first, desc="training", unit="step", disable=None))
            for k in range(first + 1, total + 1):
                batch = next(batches)
                state, metrics = step(state, batch.images, batch.labels, key)
                if before is not None:
                    self._note(before, bar)
                before = k, metrics
                due = k % self.config.evaluate_every == 0 or k == total
                if due or stopping.signal:
                    self._note(before, bar)
                    before = None
                if due:
                    self._evaluate(state, states)
                if stopping.signal:
                    self._save(state, states)
                    states.finish()
                    raise Interrupted(stopping.signal)
        for name, error in sorted(self._batches.unreadable.items()):
            tqdm.write(f"not used: {name}: {error}")
        self._end(states)

    @cached_property
    def _batches(self) -> TrainingBatches:
        return TrainingBatches(
            dataset=self.splits.train,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            augmentation=self.config.augmentation,
            threads=self.threads,
            **self._images,
        )

    @cached_property
    def _logits(self) -> Callable[[dict[str, Any], jax.Array], jax.Array]:
        return jax.jit(lambda weights, images: with_weights(self.model, weights)(images))

    @property
    def _images(self) -> dict[str, Any]:
        return {"image_size": self.model.config.image_size, "preprocessing": self.model.preprocessing}

    def _note(self, before: tuple[int, dict[str, jax.Array]], bar: Any) -> None:
        """Add a step's metrics, or stop at once where they are not finite."""
        k, metrics = before
        values = {name: float(metrics[name]) for name in ("loss", "gradient_norm", "rate")}
        if wrong := [name for name in ("loss", "gradient_norm") if not math.isfinite(values[name])]:
            raise CheckpointError(
                f"{self.folder.path}: {wrong[0]} is {values[wrong[0]]} in step {k}: stopped before anything of it was saved. "
                "Try a lower base_rate, or float32, in a new folder; the weights before it are in last/ and best/"
            )
        self.folder.add({"step": k} | values)
        bar.update()
        if not bar.disable:
            speed = (bar.format_dict["rate"] or 0) * self.config.batch_size
            bar.set_postfix_str(f"loss {values['loss']:.3f}, rate {values['rate']:.1e}, {speed:.0f} images/s", refresh=False)

    def _evaluate(self, state: TrainState, states: States) -> None:
        """Score the validation images; keep the weights if they are the best, and save."""
        scores, k = self.scores(state.averaged, self.splits.validation), int(state.step)
        row = {"step": k} | {f"validation_{name}": value for name, value in vars(scores).items()}
        self.folder.add(row)
        if self.best_row["step"] == k:
            self._write(state, BEST)
        tqdm.write(f"step {k:<6} {100 * scores.accuracy:6.2f} % of {scores.images} validation images, loss {scores.loss:.4f}")
        self._save(state, states)

    def _save(self, state: TrainState, states: States) -> None:
        self._write(state, LAST)
        self.folder.write_table()
        states.save(state)

    def _write(self, state: TrainState, name: str) -> None:
        save(with_weights(self.model, state.averaged), self.folder.path / name, force=True)

    def _end(self, states: States) -> None:
        """Score the best weights on the test images, once."""
        states.finish()
        row: dict[str, Any] = {"step": self.config.recipe.total_steps, "best_step": self.best_row["step"]}
        if self.splits.test is not None:
            best = named_weights(load(self.folder.path / BEST))
            row |= {f"test_{name}": value for name, value in vars(self.scores(best, self.splits.test)).items()}
        self.folder.add(row)
        self.folder.write_table()

    def scores(self, weights: dict[str, Any], dataset: Dataset) -> Scores:
        """The scores of weights on a dataset, by the prepared images that `evaluate` sees."""
        size = self.config.batch_size // self.config.recipe.accumulation
        batches = EvaluationBatches(dataset=dataset, batch_size=size, threads=self.threads, **self._images)
        correct = images = 0
        loss = 0.0
        for batch in batches:
            logits = np.asarray(self._logits(weights, jnp.asarray(batch.images)), np.float64)
            used = batch.weights > 0
            logits, labels = logits[used], batch.labels[used]
            loss += float((logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels]).sum())
            correct, images = correct + int((logits.argmax(axis=1) == labels).sum()), images + len(labels)
        if not images:
            name, error = next(iter(sorted(batches.unreadable.items())), ("no image", "the part is empty"))
            raise CheckpointError(f"none of the images to evaluate can be used, such as {name}: {error}")
        return Scores(correct, images, loss / images)


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
