"""A progress bar on a terminal for what takes longer than PATIENCE."""

import contextlib
from collections.abc import Callable, Iterator

Progress = Callable[[int, int | None], object]  # called with the bytes done and their total, None if it is unknown

PATIENCE = 2.0  # seconds


@contextlib.contextmanager
def progress_bar(name: str | None = None) -> Iterator[Progress]:
    from tqdm import tqdm

    with tqdm(desc=name, unit="B", unit_scale=True, delay=PATIENCE, disable=None, leave=False) as bar:

        def progress(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
