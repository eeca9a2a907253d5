"""The compiled libraries: what they may depend on, and what is reported when one of them cannot be used."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grit_kernels import _library
from grit_kernels.backend import interpreting

LIBRARIES = sorted(_library.FOLDER.glob("_C*.so"))


def undefined_symbols(library: Path) -> list[str]:
    """Names of the dynamic symbols that the library expects others to define (ELF64, little endian)."""
    data = library.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01"
    offset, count = int.from_bytes(data[40:48], "little"), int.from_bytes(data[60:62], "little")
    headers = [data[offset + 64 * i : offset + 64 * (i + 1)] for i in range(count)]

    def field(record: bytes, first: int, size: int) -> int:
        return int.from_bytes(record[first : first + size], "little")

    names = []
    for header in headers:
        if field(header, 4, 4) != 11:  # SHT_DYNSYM
            continue
        begin, size = field(header, 24, 8), field(header, 32, 8)
        strings = field(headers[field(header, 40, 4)], 24, 8)
        for at in range(begin, begin + size, 24):
            symbol = data[at : at + 24]
            if field(symbol, 6, 2) == 0 and field(symbol, 0, 4):  # SHN_UNDEF
                start = strings + field(symbol, 0, 4)
                names.append(data[start : data.index(b"\0", start)].decode())
    return names


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_libraries_use_torchs_c_interface_only(library: Path) -> None:
    names = undefined_symbols(library)
    assert any(name.startswith("aoti_torch_") for name in names)
    mangled = [name for name in names if name.startswith("_Z")]
    of_torch = [name for name in mangled if re.search(r"(?<!\d)(2at|3c10|5torch|6caffe2)", name)]
    assert of_torch == [], "C++ symbols of libtorch tie the wheel to one torch"
    plain = [name for name in names if "torch" in name and not name.startswith("_Z")]
    assert all(name.startswith(("aoti_torch_", "torch_")) for name in plain), plain


@pytest.mark.skipif(not (_library.FOLDER / "_C.so").exists(), reason="needs the compiled library")
def test_the_library_asks_for_no_newer_system_than_manylinux_2_28() -> None:
    """csrc/older_systems.cpp has what this compiler's headers would require; CUDA's library is built where it runs."""
    allowed = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11)}
    data = (_library.FOLDER / "_C.so").read_bytes()
    asked = re.findall(rb"(?<=\0)(GLIBC|GLIBCXX|CXXABI)_([\d.]+)(?=\0)", data)
    assert asked
    newer = [f"{n.decode()}_{v.decode()}" for n, v in asked if tuple(map(int, v.split(b"."))) > allowed[n.decode()]]
    assert newer == [], "build the library again, or add what a newer compiler asks for to csrc/older_systems.cpp"


def test_the_status_names_the_library_or_what_to_do() -> None:
    status = _library.status()
    if status.loaded:
        assert status.path is not None and status.path.name.startswith("_C") and status.reason == ""
    else:
        assert ("TRITON_INTERPRET" in status.reason) if interpreting() else ("pip install" in status.reason)


@pytest.mark.skipif(interpreting(), reason="Triton's interpreter replaces the library")
def test_without_a_device_the_cuda_library_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _library.cuda_status() == _library.LibraryStatus(False, "torch sees no CUDA device")


def test_a_missing_or_broken_library_says_what_to_do(tmp_path: Path) -> None:
    assert "pip install . --no-build-isolation" in _library._load(tmp_path / "_C.so", "compiled library").reason
    broken = tmp_path / "_C.so"
    broken.write_bytes(b"not a library")
    status = _library._load(broken, "compiled library")
    assert not status.loaded and "rebuild it here" in status.reason and torch.__version__ in status.reason


@pytest.mark.skipif(not _library.status().loaded, reason="needs the compiled library")
def test_a_library_of_another_schema_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch calls it all the same, with the wrong arguments."""
    schema = "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool transposed) -> (Tensor, Tensor)"
    _library.check_signature(schema)
    for other in (schema.replace("bool", "int"), schema.replace(", Tensor sin", ""), schema.replace("(Tensor, ", "(")):
        with pytest.raises(ImportError, match=r"rotary: expected \(Tensor.*, got \(Tensor, .*bool\) -> 2.*pip install"):
            _library.check_signature(other)
    monkeypatch.setattr(_library, "_signatures", lambda path: {})
    with pytest.raises(ImportError, match="built from other sources.*got an unknown signature"):
        _library.check_signature(schema)


def test_a_torch_that_is_too_old_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_C.so").touch()
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert "needs torch >= 2.11, this is 2.9.1" in _library._load(tmp_path / "_C.so", "compiled library").reason


@pytest.mark.skipif(not _library.status().loaded, reason="needs the compiled library")
def test_an_unknown_instruction_set_is_refused_with_the_usable_ones() -> None:
    with pytest.raises(ValueError, match="portable.*'mmx'"), _library.cpu_isa("mmx"):
        pass
    script = "import torch, grit_kernels as gk; gk.pool(torch.ones(1, 2, 8))"
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={"GRIT_KERNELS_CPU_ISA": "mmx", "PYTHONPATH": str(_library.FOLDER.parent)},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0 and "got 'mmx'" in run.stderr


@pytest.mark.skipif(not _library.status().loaded, reason="needs the compiled library")
def test_every_set_is_usable_and_the_first_one_serves() -> None:
    names = _library.cpu_isas()
    assert "portable" in names and names[0] != "amx_emulated"
    for name in names:
        with _library.cpu_isa(name):
            choice = _library.cpu_choice()
            assert choice.bfloat16_products == name
            # tiles multiply bfloat16 alone; everything else runs on a complete set
            complete = "avx512_bf16" if "avx512_bf16" in names else "avx512"
            assert choice.others == (complete if name.startswith("amx") else name)
    reason = _library.cpu_choice().amx_reason
    assert ("amx" in names) == (not reason)
    if "avx512" in names and "compiler" not in reason:  # the code around the tiles is tested wherever it can be
        assert "amx_emulated" in names


@pytest.mark.skipif(not _library.status().loaded, reason="needs the compiled library")
def test_blocks_of_sets_nest() -> None:
    before, names = _library.cpu_choice(), _library.cpu_isas()
    with _library.cpu_isa(names[-1]):
        outer = _library.cpu_choice()
        with _library.cpu_isa(names[0]):
            assert _library.cpu_choice().bfloat16_products == names[0]
        assert _library.cpu_choice() == outer
    assert _library.cpu_choice() == before


@pytest.mark.skipif(not _library.status().loaded, reason="needs the compiled library")
def test_bfloat16_never_takes_the_set_that_is_slower_than_fp32() -> None:
    names = [name for name in _library.cpu_isas() if name.startswith("avx512")]
    if len(names) < 2:
        pytest.skip("this CPU has at most one of the two sets")
    is_intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    assert names == (["avx512", "avx512_bf16"] if is_intel else ["avx512_bf16", "avx512"])
