"""Few-shot instructions: an example pair after the instruction of a text to embed.

Wordings are those of the paper's few-shot embedding experiment (GRIT, arXiv 2402.09906); the paper found that examples rarely
help.
"""

from __future__ import annotations

from typing import Literal, get_args

from python_model.support.arguments import check_choice

Style = Literal["retrieval", "match", "medi2"]
STYLES: tuple[str, ...] = get_args(Style)
_WORDING = {
    "retrieval": '\n\nFor example given "{query}", you should retrieve "{positive}"',
    "match": '\n\nFor example given "{query}", it would match with "{positive}"',
    "medi2": '\n\nThe provided query could be "{query}" and the positive "{positive}"',
}


def few_shot_instruction(instruction: str, query: str, positive: str, style: Style = "retrieval") -> str:
    """``instruction`` with one example; an empty instruction stays empty, as in the paper.

    ``style``: ``"retrieval"``, ``"match"`` (symmetric and classification tasks) or ``"medi2"``. Pass the result to
    :func:`python_model.model.prompts.embed_instruction`.
    """
    check_choice("style", style, STYLES)
    if not instruction.strip("\t\n :"):
        return ""
    return instruction + _WORDING[style].format(query=query, positive=positive)
