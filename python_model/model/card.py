"""The model card (README.md) of a checkpoint: its origin, settings and results, and how to load it.

It names data sets but no paths or URLs, which may contain machine names or credentials.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from python_model.model.hub import HUB_NAME
from python_model.settings import GritSettings

CARD_FILE = "README.md"
TAG = "grit-kernels"
_CARRIED = ("Training", "Results")
_USE = {
    "grit": """```python
from python_model import GritLM  # pip install grit-kernels

model = GritLM("{name}")
vectors = model.encode(["a text"], instruction=model.formatter.embed_instruction("what the embedding is for"))
```

`grit generate --model {name}` asks it a question, `grit serve --model {name}` serves it. The weights are a plain transformers
checkpoint: `AutoModelForCausalLM.from_pretrained("{name}")` generates without this package.""",
    "embedding": """```python
from python_model import GritLM  # pip install grit-kernels

model = GritLM("{name}", mode="embedding")
vectors = model.encode(["a text"], instruction=model.formatter.embed_instruction("what the embedding is for"))
```""",
    "sentence-transformers": """```python
from sentence_transformers import SentenceTransformer  # 6.2 or newer

model = SentenceTransformer("{name}"{remote})
vectors = model.encode(["a text"])
```

Prompts by name: {prompts}.""",
}
Kind = Literal["grit", "embedding", "sentence-transformers"]


def model_card(
    settings: GritSettings,
    *,
    kind: Kind = "grit",
    name: str = "FOLDER",
    base: str = "",
    training: Mapping[str, Any] | None = None,
    datasets: Mapping[str, int] | None = None,
    results: Mapping[str, Any] | None = None,
    sections: Mapping[str, str] | None = None,
    prompts: Sequence[str] = (),
    remote_code: bool = False,
) -> str:
    """The text of ``README.md``, beginning with the metadata for the Hugging Face hub.

    Args:
        settings: of the model.
        kind: content of the folder: a model that embeds and generates, one that embeds, or an export to sentence-transformers.
        name: the name under which readers load it.
        base: name of the model it was trained from; only a hub name (``owner/name``) becomes metadata; of a path only
            the last part is shown.
        training: settings of the run by dotted name.
        datasets: number of rows by data set.
        results: scores on held-out rows.
        sections: sections from the card of the checkpoint it was made from, see :func:`carried_sections`.
        prompts: names of the export's prompts; ``remote_code``: whether it needs this package's code.
    """
    from huggingface_hub import ModelCardData

    on_hub = base if HUB_NAME.fullmatch(base) and not Path(base).exists() else None
    embeds_only = kind != "grit"
    data = ModelCardData(
        base_model=on_hub,
        library_name="sentence-transformers" if kind == "sentence-transformers" else "transformers",
        pipeline_tag="feature-extraction" if embeds_only else "text-generation",
        tags=[TAG, "grit", *([] if embeds_only else ["feature-extraction"])],
    )
    what = "texts to embed" if embeds_only else "texts to embed and for replies"
    use = _USE[kind].format(
        name=name,
        remote=", trust_remote_code=True" if remote_code else "",
        prompts=", ".join(f"`{prompt}`" for prompt in prompts) or "none",
    )
    origin = f" It was trained from `{on_hub or Path(base).name}`." if base else ""
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {Path(name).name}",
        f"One model for {what} ([GRIT](https://arxiv.org/abs/2402.09906)), made with grit-kernels.{origin} Its licence follows "
        "from those of the base model and of the data.",
        f"## Use\n\n{use}",
    ]
    if training or datasets:
        text = []
        if datasets:
            text.append(_table(("data set", "rows"), [(key, f"{rows:,}") for key, rows in datasets.items()]))
        if training:
            text.append(_table(("setting", "value"), [(key, f"`{value}`") for key, value in training.items()]))
        parts.append("## Training\n\n" + "\n\n".join(text))
    if results:
        measured = {key: value for key, value in results.items() if value is not None}
        rows = [(key, f"{value:.4f}" if isinstance(value, float) else str(value)) for key, value in measured.items()]
        parts.append("## Results\n\nOn held-out rows:\n\n" + _table(("measure", "value"), rows))
    parts += [f"## {title}\n\n{text}" for title, text in (sections or {}).items()]
    chosen = {key: value for key, value in asdict(settings).items() if value not in (None, "", {})}
    parts.append(
        "## Settings\n\n" + _table(("setting", "value"), [(key, f"`{value}`") for key, value in chosen.items()])
    )
    return "\n\n".join(parts) + "\n"


def carried_sections(folder: Path) -> dict[str, str]:
    """The sections on training and results in a checkpoint's card; empty if it has none, or a card of other origin."""
    file = folder / CARD_FILE
    if not file.is_file():
        return {}
    text = file.read_text(encoding="utf-8")
    head, *sections = text.split("\n## ")
    if f"- {TAG}\n" not in head:
        return {}
    titled = (section.partition("\n") for section in sections)
    return {title: body.strip() for title, _, body in titled if title in _CARRIED}


def _table(header: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    lines = [header, ("---", "---"), *((key, value.replace("|", "\\|").replace("\n", " ")) for key, value in rows)]
    return "\n".join(f"| {key} | {value} |" for key, value in lines)
