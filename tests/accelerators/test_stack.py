"""What `bascule doctor` says of drivers, toolkits and versions that do or do not match: read from made-up file systems."""

from __future__ import annotations

from pathlib import Path

from bascule.accelerators.stack import ascend, lines, nvidia


def ascend_machine(root: Path, *, cann: str = "8.2.RC1") -> Path:
    (root / "dev").mkdir()
    for chip in range(2):
        (root / f"dev/davinci{chip}").touch()
    driver = root / "usr/local/Ascend/driver"
    driver.mkdir(parents=True)
    (driver / "version.info").write_text("Version=24.1.0\nascendhal_version=7.35\n")
    home = root / "usr/local/Ascend/ascend-toolkit/latest"
    (home / "aarch64-linux").mkdir(parents=True)
    (home / "aarch64-linux/ascend_toolkit_install.info").write_text(
        f"package_name=Ascend-cann-toolkit\nversion={cann}\n"
    )
    return home


def nvidia_machine(root: Path, version: str) -> None:
    (root / "proc/driver/nvidia").mkdir(parents=True)
    (root / "proc/driver/nvidia/version").write_text(
        f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {version}  Release Build\nGCC version: 12.3.0\n"
    )


def test_an_ascend_machine_whose_layers_match_has_no_trouble(tmp_path: Path) -> None:
    home = ascend_machine(tmp_path)
    found = ascend("2.7.1+cpu", "2.7.1.post2", str(home), tmp_path)
    assert [layer.found for layer in found] == ["2", "24.1.0", "8.2.RC1", "2.7.1.post2"]
    assert not any(layer.trouble for layer in found)


def test_a_torch_npu_of_another_version_is_named_with_its_cure(tmp_path: Path) -> None:
    home = ascend_machine(tmp_path)
    trouble = ascend("2.13.0+cpu", "2.7.1", str(home), tmp_path)[-1].trouble
    assert "does not match torch 2.13.0" in trouble and "torch==2.7.1" in trouble
    assert "pip install torch-npu==2.13.0" in ascend("2.13.0", None, str(home), tmp_path)[-1].trouble  # fmt: skip


def test_a_toolkit_that_is_installed_but_not_loaded_is_told_from_none(tmp_path: Path) -> None:
    ascend_machine(tmp_path)
    assert "set_env.sh" in ascend("2.7.1", "2.7.1", None, tmp_path)[2].trouble
    (layer,) = ascend("2.7.1", None, None, tmp_path / "elsewhere")
    assert layer.found is None and "CANN toolkit" in layer.trouble


def test_a_driver_too_old_for_torchs_cuda_and_a_torch_without_cuda_are_named(
    tmp_path: Path,
) -> None:
    nvidia_machine(tmp_path, "470.82.01")
    assert "needs 525.60" in nvidia("2.13.0", "12.8", tmp_path)[0].trouble
    assert "built without CUDA" in nvidia("2.13.0+cpu", None, tmp_path)[1].trouble
    assert "missing: no NVIDIA driver" in " ".join(lines(nvidia("2.13.0", "12.8", tmp_path / "x")))


def test_a_chip_that_answers_has_a_driver_even_where_its_version_is_hidden(tmp_path: Path) -> None:
    assert not any(layer.trouble for layer in nvidia("2.13.0", "13.0", tmp_path, works=True))


def test_a_driver_new_enough_has_no_trouble(tmp_path: Path) -> None:
    nvidia_machine(tmp_path, "580.65.06")
    assert not any(layer.trouble for layer in nvidia("2.13.0", "13.0", tmp_path))
