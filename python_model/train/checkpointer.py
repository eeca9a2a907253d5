"""Saved states of a run: what resuming needs, written atomically, with the oldest removed.

A state is a folder ``states/step-00000040`` of torch.distributed.checkpoint files (weights that are trained, optimiser,
temperature; every rank writes its shards) with ``state.json`` (format version, step, settings). Data order, sampling and dropout
are functions of seed and step, so nothing else has to be kept. DCP's index is a pickle: resume only from folders you wrote.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, cast

import torch.distributed as dist

from python_model.settings import GritSettings
from python_model.support.files import sync, write_json
from python_model.train.config import MOVED, REMOVED, TYPES, TrainConfig, dotted
from python_model.train.distributed import Ranks

VERSION = 2
"""Version of state.json. 1 (no version in the file): settings were flat."""

# may differ between the saving and the resuming run: affects speed, memory or output, not the result
FREE_SETTINGS = frozenset(
    (
        "output_dir",
        "dry_run",
        "push_to_hub",
        "model.architecture",
        "model.gradient_checkpointing",
        "model.compile",
        "data.data_workers",
        "data.token_cache",
        "batch.chunk_tokens",
        "batch.chunking",
        "parallel.strategy",
        "parallel.shard_size",
        "parallel.reduce_each_chunk",
        "parallel.cpu_offload",
        "parallel.device_memory",
        "evaluation.data",
        "evaluation.every",
        "evaluation.patience",
        "logging.save_steps",
        "logging.save_total",
        "logging.async_save",
        "logging.resume",
        "logging.trackers",
        "logging.exploding_loss",
        "logging.peak_tflops",
        "logging.profile_steps",
    )
)
# what evaluations measure: their scores decide which state is kept, so they must be comparable where both runs evaluate
_MEASURED = frozenset(("evaluation.metric", "evaluation.max_length"))
# paths: their contents are compared instead (``identity``)
_PATHS = frozenset(("data.train_data", "model.name"))


class Stateful(Protocol):
    """Holds the tensors of a state."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, as nested dicts of tensors."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore everything that changes."""
        ...


class Checkpointer:
    """The states of one run in ``folder``.

    Args:
        settings: of the run, nested; a state with other settings (except FREE_SETTINGS) is refused.
        identity: what a state must have been written with, or it is refused: digests of what the run reads, its data and the
            model it starts from, by names that begin with the setting's, and other values by name.
        save_total: number of states kept.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        ranks: Ranks,
        *,
        identity: Mapping[str, str] | None = None,
        save_total: int = 2,
    ) -> None:
        self.folder, self.settings, self.ranks = folder, settings, ranks
        self.identity, self.save_total = dict(identity or {}), save_total
        self._pending: tuple[int, Future[Any]] | None = None
        self._group: Any = None

    def latest(self) -> Path | None:
        """The newest complete state."""
        found = sorted(path.parent for path in self.folder.glob("step-*/state.json"))
        return found[-1] if found else None

    def shared_latest(self) -> Path | None:
        """:meth:`latest` as the first rank sees it, on every rank, which all must call this: on a network file system, some
        may see a state that was just renamed, and some not yet.
        """
        found = self.latest() if self.ranks.first else None
        step = int(self.ranks.all_values([-1 if found is None else self.step(found)])[0, 0])
        return None if step < 0 else self._path(step)

    @staticmethod
    def step(state: Path) -> int:
        """The number of steps after which ``state`` was written."""
        return int(state.name.removeprefix("step-"))

    def save(self, step: int, trained: Stateful, *, wait: bool = True) -> Path:
        """Write the state after ``step`` steps, then remove the oldest beyond ``save_total``, and those of later steps, which an
        earlier run left in the folder.

        Without ``wait`` it is written while the caller goes on, and counts once :meth:`finish` has been called, or the next save.

        Raises:
            OSError: it cannot be written (without ``wait``, :meth:`finish` says so); earlier states are left as they are.
        """
        import torch.distributed.checkpoint as dcp

        self.finish()
        temporary = self._temporary(step)
        if self.ranks.first:
            shutil.rmtree(temporary, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
        self.ranks.barrier()
        alone = self.ranks.group is None
        if wait:
            with self._writing(step):
                dcp.save(trained.state_dict(), checkpoint_id=temporary, no_dist=alone)
            self._complete(step)
        else:
            if not alone and self._group is None:
                # the writing thread's own: collectives of training on the same group would mix with its
                self._group = dist.new_group(backend="gloo")
            future = dcp.async_save(
                trained.state_dict(), checkpoint_id=temporary, process_group=self._group, no_dist=alone
            )
            self._pending = step, cast("Future[Any]", future)
        return self._path(step)

    def written(self) -> bool:
        """Whether this rank's part of a state is on disk that :meth:`finish` would complete without a wait."""
        return self._pending is not None and self._pending[1].done()

    def finish(self) -> None:
        """Wait until a state being written is complete; every rank must call this."""
        if self._pending is not None:
            step, future = self._pending
            self._pending = None
            with self._writing(step):
                future.result()
            self._complete(step)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _temporary(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}"

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        """Of a state that could not be written, nothing remains to fill the disk; torch names a full one in no words."""
        try:
            with _told(self._path(step), "written", lambda: f"; {_free(self.folder)} are free there"):
                yield
        except OSError:
            if self.ranks.first:
                shutil.rmtree(self._temporary(step), ignore_errors=True)
            raise

    def _complete(self, step: int) -> None:
        """Finish the state after all ranks have written their parts."""
        self.ranks.barrier()
        target, temporary = self._path(step), self._temporary(step)
        if self.ranks.first:
            state = {"version": VERSION, "step": step, "config": self.settings, "identity": self.identity}
            write_json(temporary / "state.json", state)
            for path in [
                *temporary.rglob("*"),
                temporary,
            ]:  # on disk before the name says so, and before older states go
                sync(path)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
            sync(self.folder)
            states = sorted(self.folder.glob("step-*"))
            count = states.index(target) + 1  # those after it are of an earlier run, which this one does not continue
            for old in [*states[:count][: -self.save_total], *states[count:]]:
                shutil.rmtree(old)
            for broken in self.folder.glob(".step-*"):
                shutil.rmtree(broken)
        self.ranks.barrier()

    def load(self, path: Path, trained: Stateful) -> int:
        """Restore everything from ``path``; returns the number of steps done.

        Raises:
            ValueError: the state was written with settings, data or a model of a different run, or by a newer version; names
                the first difference.
            OSError: it cannot be read.
        """
        import torch.distributed.checkpoint as dcp

        saved = upgrade(json.loads((path / "state.json").read_text(encoding="utf-8")), path)
        way_out = "use the same, logging.resume=false, or another output_dir"
        # a setting that did not exist when the state was written had the effect of its default
        defaults = {**TrainConfig(dry_run=True).to_dict(), "grit": asdict(GritSettings())}
        current, before = dotted(self.settings), {**dotted(defaults), **dotted(saved["config"])}
        evaluate = current.get("evaluation.data") and before.get("evaluation.data")
        free = FREE_SETTINGS | _PATHS | (frozenset() if evaluate else _MEASURED)
        for name, value in before.items():
            known = name in current and name not in free
            if known and value != current[name]:
                raise ValueError(
                    f"{name}: expected {value!r}, with which {path} was written, got {current[name]!r}; {way_out}"
                )
        for name, value in saved["identity"].items():
            mine = self.identity.get(name, value)
            if mine != value and name.partition(" ")[0] in TYPES:
                raise ValueError(f"{name}: expected the content with which {path} was written, got another; {way_out}")
            if mine != value:
                raise ValueError(f"{name}: expected {value}, with which {path} was written, got {mine}; {way_out}")
        tensors = trained.state_dict()
        with _told(path, "read", lambda: "; remove it to resume from the one before it, if there is one"):
            dcp.load(tensors, checkpoint_id=path, no_dist=self.ranks.group is None)
        trained.load_state_dict(tensors)
        return int(saved["step"])


@contextlib.contextmanager
def _told(path: Path, done: str, more: Callable[[], str]) -> Iterator[None]:
    """Turn torch's report of what failed on which rank, which no handler of errors expects, into an OSError that says it."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except CheckpointException as report:
        causes = dict.fromkeys(f"{type(error).__name__}: {error}" for error, _ in report.failures.values())
        raise OSError(f"{path}: the state cannot be {done} ({'; '.join(causes)}){more()}") from report


def _free(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 2**30:.2f} GiB"


def upgrade(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """The content of a ``state.json`` of any version, as this version writes it.

    Raises:
        ValueError: it has a newer version, or its run used a setting that no longer exists.
    """
    version = state.get("version", 1)
    if version > VERSION:
        raise ValueError(
            f"{path}: expected a state of at most version {VERSION}, got {version}; it was written by a newer grit_kernels"
        )
    if version == VERSION:
        return state
    flat = dict(state["config"])
    for name, accepted in zip(REMOVED, (False, False, "exact"), strict=True):
        if flat.pop(name, accepted) != accepted:
            raise ValueError(
                f"{path}: it was trained with {name}, which version 0.2 removed; start over "
                "(logging.resume=false or another output_dir), or finish the run with version 0.1"
            )
    config: dict[str, Any] = {}
    for name, value in flat.items():
        group, _, field = str(MOVED.get(name, name)).rpartition(".")
        (config.setdefault(group, {}) if group else config)[field] = value
    config.setdefault("grit", {})["special_tokens"] = "bos"  # every text began with BOS, whatever the tokenizer said
    # data and model were not recorded
    return {"version": VERSION, "step": state["step"], "config": config, "identity": {}}
