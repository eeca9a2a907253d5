"""Measures whether cached states answer as well as reading the documents, for one checkpoint, and keeps the result with it.

``rag_calibration.json`` holds F1 per mode. It is valid only for the weights it was measured with (by fingerprint), for states
made in the same way, and for at most as many documents per question, since joined texts have not seen each other. A mode is
trusted if its F1 is at least :data:`KEEPS` of that of reading the documents, and if reading them helps at all: if a checkpoint
answers no better with documents than without, nothing follows about its cached states.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from python_model.evaluation.answers import Question, score
from python_model.model.identity import fingerprint
from python_model.rag.fingerprint import made_by
from python_model.settings import GritSettings
from python_model.support.files import write_json

if TYPE_CHECKING:
    from python_model.rag.answer import RAG

FILE = "rag_calibration.json"
KEEPS = 0.98
HELPS = 1.5
"""The F1 of reading documents must be at least this multiple of the F1 without documents."""
LEAST_QUESTIONS = 50
FULL, WITHOUT, CACHED = "document_first", "none", ("document_cache", "query_cache")


def calibrate(rag: RAG, questions: Sequence[Question], *, k: int = 1, max_new_tokens: int = 16) -> dict[str, Any]:
    """Answer ``questions`` without documents, reading them, and from cached states; keep the scores next to the checkpoint.

    Raises:
        ValueError: fewer than :data:`LEAST_QUESTIONS` questions, or a model that was not loaded from a folder.
    """
    if len(questions) < LEAST_QUESTIONS:
        raise ValueError(f"questions: expected at least {LEAST_QUESTIONS} to calibrate with, got {len(questions)}")
    _needed_file(rag)  # before the questions are asked
    scores = {}
    for mode in (WITHOUT, FULL, *CACHED):
        replies = [rag.answer(q.question, mode=mode, k=k, max_new_tokens=max_new_tokens).text for q in questions]
        scores[mode] = score(replies, questions).f1
    return keep(rag, scores, questions=len(questions), k=k)


def keep(rag: RAG, scores: Mapping[str, float], *, questions: int, k: int) -> dict[str, Any]:
    """Keep measured scores next to the checkpoint: F1 by mode, over ``questions`` questions with ``k`` documents each.

    Raises:
        ValueError: fewer than :data:`LEAST_QUESTIONS` questions, no score of :data:`WITHOUT` or :data:`FULL`, or a model that
            was not loaded from a folder.
    """
    if questions < LEAST_QUESTIONS:
        raise ValueError(f"questions: expected at least {LEAST_QUESTIONS} to calibrate with, got {questions}")
    if missing := [mode for mode in (WITHOUT, FULL) if mode not in scores]:
        raise ValueError(f"scores: expected one of {WITHOUT!r} and {FULL!r} to compare with, got none of {missing}")
    file = _needed_file(rag)
    entry = {"f1": dict(scores), "questions": questions, "k": k}
    known = _read(file)
    kept = known["measured"] if made_by(known.get("fingerprint"), rag.model) else {}
    content = {
        "version": 1,
        "fingerprint": fingerprint(rag.model),
        "measured": {**kept, f"{_states(rag)}, k {k}": entry},
    }
    write_json(file, content)
    return {**entry, "trusted": sorted(trusted_modes(rag))}


def trusted_modes(rag: RAG) -> Mapping[str, int]:
    """The modes with cached states that were measured for this checkpoint and found good enough; with how many documents per
    question at most."""
    file = _file(rag)
    content = {} if file is None else _read(file)
    if content.get("version") != 1 or not made_by(content.get("fingerprint"), rag.model):
        return {}
    found: dict[str, int] = {}
    for name, entry in content["measured"].items():
        scores, k = entry["f1"], int(entry["k"])
        full = scores.get(FULL, 0)
        if name != f"{_states(rag)}, k {k}" or full <= 0 or full < HELPS * scores.get(WITHOUT, full):
            continue
        found |= {m: max(k, found.get(m, 0)) for m in CACHED if scores.get(m, 0) >= KEEPS * full}
    return found


def _states(rag: RAG) -> str:
    """What the quality of cached states depends on, besides the model."""
    stored = rag.store.format if rag.store is not None else "as read"
    usual, settings = GritSettings(), rag.model.settings
    names = ("format", "special_tokens", *(() if rag.causal else ("bidirectional_window",)))
    others = [f"{n} {getattr(settings, n)}" for n in names if getattr(settings, n) != getattr(usual, n)]
    parts = ["causal" if rag.causal else "bidirectional", stored, f"recompute {rag.recompute_share or rag.recompute}"]
    return ", ".join([*parts, *others, *(() if rag.marked else ("unmarked",))])


def _needed_file(rag: RAG) -> Path:
    file = _file(rag)
    if file is None:
        raise ValueError("model: expected a checkpoint in a folder, to keep the scores in")
    return file


def _file(rag: RAG) -> Path | None:
    folder = Path(str(getattr(rag.model.model.config, "_name_or_path", "") or ""))
    return folder / FILE if folder.name and folder.is_dir() else None


def _read(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not a JSON file ({error}); remove it and calibrate again") from None
    if not isinstance(content, dict) or not isinstance(content.get("measured"), dict):
        raise ValueError(f"{file}: not a calibration; remove it and calibrate again")
    return content
