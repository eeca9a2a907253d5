"""``grit embed`` keeps what a killed run has embedded, and says which texts it cuts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from python_model import GritLM
from python_model.commands import embed


def test_options_that_a_cluster_would_ignore_are_refused(tmp_path: Path) -> None:
    base = ["--ray", "--input", str(tmp_path), "--output", str(tmp_path / "out")]
    for option in (["--truncate-dim", "8"], ["--device", "cpu"]):
        with pytest.raises(SystemExit, match=f"--ray: expected no {option[0]}, got it"):
            embed.COMMAND([*base, *option])


def test_a_killed_run_goes_on_where_it_stopped(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(f'{{"text": "river number {n}"}}\n' for n in range(10)))
    base = ["--model", str(checkpoint), "--device", "cpu", "--input", str(texts)]
    embed.COMMAND([*base, "--output", str(tmp_path / "whole.npy")])
    monkeypatch.setattr(embed, "BLOCK", 3)
    embedded: list[int] = []
    encode = GritLM.encode

    def killed(self: GritLM, part: list[str], **options: Any) -> Any:
        if sum(embedded) >= 6:
            raise KeyboardInterrupt
        embedded.append(len(part))
        return encode(self, part, **options)

    arguments = [*base, "--output", str(tmp_path / "v.npy")]
    with monkeypatch.context() as stopping:
        stopping.setattr(GritLM, "encode", killed)
        with pytest.raises(SystemExit, match="130"):
            embed.COMMAND(arguments)
    assert not (tmp_path / "v.npy").exists()
    with pytest.raises(SystemExit, match="interrupted run with other texts or settings"):
        embed.COMMAND([*arguments, "--instruction", "other"])
    capsys.readouterr()
    embed.COMMAND(arguments)
    printed = capsys.readouterr()
    assert "resuming after 6 of 10 texts" in printed.err and "10 vectors of size" in printed.out
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), np.load(tmp_path / "whole.npy"), atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.jsonl", "v.npy", "whole.npy"]


def test_texts_that_are_cut_are_counted(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--model", str(checkpoint), "--device", "cpu", "--output", str(tmp_path / "v.npy"), "--max-length", "16"]
    embed.COMMAND([*base, "--text", "river " * 40, "--text", "a", "--text", "code " * 30])
    assert "2 of 3 texts are longer than --max-length 16 tokens" in capsys.readouterr().err
    embed.COMMAND([*base, "--text", "a"])
    assert capsys.readouterr().err.count("longer") == 0
