"""C++ of ours: compiled once for this CPU, kept, and done without where it cannot be had."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bascule import native

SOURCE = '#include "size.h"\nextern "C" long size(void) { return SIZE; }\n'

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler"
)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    native.build.cache_clear()
    (tmp_path / "size.h").write_text("#define SIZE 7\n")
    path = tmp_path / "size.cpp"
    path.write_text(SOURCE)
    return path


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "home").rglob("*.so"))


def test_without_a_compiler_the_reason_is_told(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert native.build(source) == native.Built(None, "neither g++ nor clang++ was found")


@needs_compiler
def test_the_next_process_takes_what_was_compiled(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = native.build(source)
    assert built.library is not None and built.library.size() == 7
    assert len(kept(tmp_path)) == 1
    native.build.cache_clear()
    monkeypatch.setattr(native, "_compile", lambda *arguments: pytest.fail("compiled again"))
    assert native.build(source).library is not None


@needs_compiler
def test_a_changed_header_is_another_library(source: Path, tmp_path: Path) -> None:
    native.build(source)
    native.build.cache_clear()
    (tmp_path / "size.h").write_text("#define SIZE 8\n")
    library = native.build(source).library
    assert library is not None and library.size() == 8
    assert len(kept(tmp_path)) == 2


@needs_compiler
def test_a_source_that_is_refused_is_named_with_the_reason(source: Path) -> None:
    source.write_text("nonsense")
    built = native.build(source)
    assert built.library is None and "refused size.cpp" in built.why and "nonsense" in built.why


@needs_compiler
def test_a_cache_that_cannot_be_written_costs_a_compilation_and_nothing_else(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert native.build(source).library is not None


@needs_compiler
def test_a_torn_file_in_the_cache_is_passed_over(source: Path, tmp_path: Path) -> None:
    native.build(source)
    native.build.cache_clear()
    (only,) = kept(tmp_path)
    only.unlink()  # not written over: this process still holds the old one
    only.write_bytes(b"torn")
    assert native.build(source).library is not None


@needs_compiler
def test_a_cache_that_others_may_write_to_is_not_used(source: Path, tmp_path: Path) -> None:
    (tmp_path / "home" / ".cache" / "bascule").mkdir(parents=True)
    (tmp_path / "home" / ".cache" / "bascule").chmod(0o777)
    assert native.build(source).library is not None
    assert not kept(tmp_path)
