"""Synchronises an index with files: what has changed is read again, what has not is left alone, interrupted work is finished.

A file counts as unchanged if its digest and the way it was chunked are those recorded in the index. Documents are embedded in
batches, and each batch is one transaction of the index: it removes the files' previous documents, inserts the new ones, and
records the digests of files that are now complete. However the process ends, the next run continues after the last batch.
States in key-value stores are removed before the transaction and added after it: none outlives its text.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from filelock import FileLock, Timeout
from torch import Tensor

from python_model.generate.states import TextStates
from python_model.model.limits import max_positions
from python_model.model.modeling import GritLM
from python_model.rag.answer import RAG
from python_model.rag.documents import chunk, files_below, splitter_name
from python_model.rag.formats import FAULTS, UnreadableFileError, check_file, read_file
from python_model.rag.index import Index, embed, too_long
from python_model.rag.modes import Document
from python_model.rag.store.documents import Source
from python_model.rag.store.kvstore import KVStore
from python_model.support.arguments import check_path
from python_model.support.files import reason_of

BATCH = 32
"""Number of documents embedded and written in one transaction."""


@dataclass
class Report:
    """What has been done; ``skipped`` are (file, reason)."""

    files: int = 0
    unchanged: int = 0
    added: int = 0
    changed: int = 0
    removed: int = 0
    documents: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.added} files added, {self.changed} changed, {self.unchanged} unchanged, {self.removed} removed, "
            f"{len(self.skipped)} skipped; {self.documents} documents embedded"
        )


@contextlib.contextmanager
def only_writer(index: Index, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Other processes that add to the index wait here until this one is done or dead; ``waiting`` is called before waiting."""
    lock = FileLock(str(index.path / "writer.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if waiting is not None:
            waiting()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def drop_states(index: Index, keys: Sequence[str]) -> int:
    """Remove the states of documents from every store that keeps some for this index; returns how many were removed."""
    return sum(store.discard(keys) for store in _stores(index)) if keys else 0


def delete(index: Index, names: Sequence[str]) -> int:
    """Remove documents by key, file or pattern (see :meth:`Index.matching`), and their states; returns how many.

    Raises:
        KeyError: one of ``names`` matches nothing; then nothing is removed.
    """
    keys = list(dict.fromkeys(key for name in names for key in index.matching(name)))
    drop_states(index, keys)
    index.delete(keys)
    return len(keys)


def compact(index: Index) -> None:
    """Give back what removed documents took, in the index and in the stores that keep states for it."""
    index.compact()
    for store in _stores(index):
        store.compact()


def _stores(index: Index) -> Iterator[KVStore]:
    """The stores that keep states for the index, without those that were deleted."""
    for path in index.stores:
        if (Path(path) / "index.sqlite").exists():
            yield KVStore(path, create=False)


def add_files(
    index: Index,
    model: GritLM,
    paths: Sequence[str | Path],
    *,
    rag: RAG | None = None,
    max_tokens: int = 256,
    overlap: int = 32,
    sync: bool = False,
    report: Report | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Bring ``index`` in line with files and folders.

    Args:
        rag: if it has a store, the documents' states are kept there as well.
        max_tokens: maximum tokens per chunk; 0 leaves documents whole.
        overlap: tokens shared by neighbouring chunks.
        sync: remove the documents of files that are no longer below the given folders, or cannot be read any more.
        report: counts what is done, so that it can be reported after an interruption.
        progress: called with the number of files done and of all files.

    Raises:
        FileNotFoundError: there is nothing at a path. ValueError: two files would have the same name.
    """
    report = report if report is not None else Report()
    work = _Work(index, model, rag, _recipe(max_tokens, overlap), report)
    found = _find(index, paths)
    report.files = len(found)
    seen = set()
    for number, (name, file) in enumerate(found.items()):
        if progress is not None:
            progress(number, len(found))
        try:
            source, documents = work.read(name, file, max_tokens, overlap)
        except FAULTS as error:
            report.skipped.append((str(file), reason_of(error)))
            continue
        work.add(source, documents)  # what fails here is no fault of the file
        seen.add(name)
    work.flush()
    if sync:
        folders = [Path(path).resolve() for path in paths]
        for source in index.sources().values():
            if source.name not in seen and any(Path(source.path).is_relative_to(folder) for folder in folders):
                delete(index, list(index.documents_of(source.name)))
                report.removed += 1
    if progress is not None:
        progress(len(found), len(found))
    return report


def bytes_to_read(
    index: Index, paths: Sequence[str | Path], max_tokens: int, overlap: int, store: KVStore | None = None
) -> int:
    """Bytes of the files that :func:`add_files` would read: new, changed, or without states in ``store``; without those it would
    skip since they are too large, of an unknown kind, or cannot be opened."""
    known, recipe = index.sources(), _recipe(max_tokens, overlap)

    def is_done(name: str, file: Path) -> bool:
        source = known.get(name)
        if source is None or source.recipe != recipe or source.digest != _digest(file):
            return False
        return store is None or all(key in store for key in index.documents_of(name))

    size = 0
    for name, file in _find(index, paths).items():
        with contextlib.suppress(UnreadableFileError, OSError):
            check_file(file)
            size += 0 if is_done(name, file) else file.stat().st_size
    return size


def _recipe(max_tokens: int, overlap: int) -> str:
    return f"{max_tokens} {overlap} {splitter_name()}" if max_tokens else "whole"


def _find(index: Index, paths: Sequence[str | Path]) -> dict[str, Path]:
    """All files by their names in the index: those they have, else the path below the given folder."""
    known = index.sources()
    names = {source.path: source.name for source in known.values()}
    found: dict[str, Path] = {}
    for given in paths:
        check_path("paths", given)
        path = Path(given)
        if not path.exists():
            raise FileNotFoundError(f"documents: there is no file or folder {path}")
        root = path.resolve() if path.is_dir() else path.resolve().parent
        for file in files_below(root) if path.is_dir() else [path.resolve()]:
            name = names.get(str(file), file.relative_to(root).as_posix())
            others = [found.get(name), Path(known[name].path) if name in known else None]
            other = next((o for o in others if o not in (None, file) and o.exists()), None)
            if other is not None:
                raise ValueError(
                    f"documents: {file} and {other} would both be {name!r} in the index; "
                    "add the folder that holds both, or use an index for each"
                )
            found[name] = file
    return found


class _Work:
    """The batch being filled."""

    def __init__(self, index: Index, model: GritLM, rag: RAG | None, recipe: str, report: Report) -> None:
        self.index, self.model, self.recipe, self.report = index, model, recipe, report
        self.rag = rag if rag is not None and rag.store is not None else None
        self.limit = max_positions(model.model.config)
        self.known = index.sources()
        self.owners: dict[str, str] = {}  # of keys that are not in the index yet
        self.stale: list[str] = []
        self.documents: list[Document] = []
        self.sources: list[Source] = []
        self.counts: list[str] = []

    def read(self, name: str, file: Path, max_tokens: int, overlap: int) -> tuple[Source, list[Document] | None]:
        """A file and its documents, None if they are in the index. What it raises is a fault of the file."""
        check_file(file)
        source = Source(name, str(file), _digest(file), self.recipe)
        before = self.known.get(name)
        if before is not None and (before.digest, before.recipe) == (source.digest, source.recipe):
            return source, None
        documents = read_file(file, name)
        if max_tokens:
            documents = [part for d in documents for part in chunk(d, self.model.tokenizer, max_tokens, overlap)]
        self._check(name, documents)
        return source, documents

    def add(self, source: Source, documents: list[Document] | None) -> None:
        """What :meth:`read` returned; written now or with later ones."""
        name, before = source.name, self.known.get(source.name)
        if documents is None:
            if before is not None and before.path != source.path:
                self.sources.append(source)
            self._complete_states(name)
            self.report.unchanged += 1
            return
        old = self.index.documents_of(name)
        new = {document.key: document for document in documents}
        self.stale += [key for key in old if key not in new]
        self.owners.update(dict.fromkeys(new, name))
        self.known[name] = source
        # unchanged chunks keep their vectors
        fresh = [d for key, d in new.items() if key not in old or asdict(old[key]) != asdict(d)]
        for start in range(0, len(fresh), BATCH):
            self.documents += fresh[start : start + BATCH]
            if start + BATCH < len(fresh):
                self.sources.append(replace(source, digest=""))  # not complete yet
                self.flush()
        self.sources.append(source)
        self.counts.append("changed" if before is not None or old else "added")
        if len(self.documents) >= BATCH or len(self.stale) >= 10 * BATCH:
            self.flush()

    def flush(self) -> None:
        """One transaction of the index."""
        if not (self.stale or self.documents or self.sources):
            return
        vectors, states = self._embed()
        drop_states(self.index, [*self.stale, *(document.key for document in self.documents)])
        self.index.replace(self.stale, self.documents, vectors, self.sources)
        if self.rag is not None and self.documents:
            self.rag.add_to_store(self.documents, overwrite=True, states=states)
        self.report.documents += len(self.documents)
        self.report.added += self.counts.count("added")
        self.report.changed += self.counts.count("changed")
        self.stale, self.documents, self.sources, self.counts = [], [], [], []

    def _embed(self) -> tuple[Tensor | None, list[TextStates] | None]:
        """The batch's vectors and, if one pass gives both, its states."""
        if not self.documents:
            return None, None
        if self.rag is not None:
            both = self.rag.embed_and_read(self.documents, self.index.recorded["settings"]["prefix"])
            if both is not None:
                return both
        return embed(self.index, self.model, self.documents, self.limit), None

    def _complete_states(self, name: str) -> None:
        if self.rag is not None and self.rag.store is not None:
            store = self.rag.store
            self.rag.add_to_store([d for key, d in self.index.documents_of(name).items() if key not in store])

    def _check(self, name: str, documents: Sequence[Document]) -> None:
        """Check that keys belong to this file, and that texts are no longer than the model can read."""
        seen = set()
        for document in documents:
            owner = self.owners.get(document.key) or self.index.owner(document.key)
            if document.key in seen or (owner not in (None, name) and owner in self.known):
                raise UnreadableFileError(f"has the key {document.key!r} that {owner} has, too")
            seen.add(document.key)
        if (long := too_long(self.index, self.model, documents, self.limit)) is not None:
            raise UnreadableFileError(f"{long.key!r} has more than {self.limit} tokens; divide it with --chunk-tokens")


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while part := content.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
