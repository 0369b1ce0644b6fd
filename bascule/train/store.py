"""A second home for snapshots: any fsspec URL (`s3://`, `gs://`, `file://`, ...), kept equal to the run's folder. No torch.

The folder stays the place of work: snapshots are written, hashed and renamed there (train/checkpoint), and trust is decided there.
The store is for the day when that disk is gone with its machine: a run folder without snapshots takes up from the store.

Object stores know no rename; what they promise is that one object is put whole or not at all. So a snapshot is committed by one
object, its manifest, put last, after every file that it names has been read back with the right hash. A folder without a manifest
is unfinished; it is never fetched, and cleared away by the next writer. A snapshot whose bits changed loses its manifest first.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import fsspec

from bascule.errors import SnapshotError, UsageError
from bascule.folder import sha256_of

MANIFEST = "manifest.json"
BLOCK_BYTES = 1 << 20


class SnapshotStore:
    """`URL/NAME/step-00000120/...`, as the run's folder has it. What fails on the way is an OSError; what is torn, a SnapshotError.

    `recipe_sha256`: a store that holds another recipe's snapshots under this name is refused before anything in it is touched.
    """

    def __init__(self, url: str, name: str, recipe_sha256: str) -> None:
        self.files, root = _open(url)
        self.root = f"{root.rstrip('/')}/{name}"
        self.recipe_sha256 = recipe_sha256
        self._sent: dict[str, tuple[int, int]] = {}
        self._refuse_anothers()

    def catch_up(self, snapshots: Path) -> None:
        """Make the store hold what the folder holds: new snapshots, changed trust; drop what is older than the folder's oldest."""
        here = {path.name: path for path in snapshots.glob("step-*")}
        for name, path in sorted(here.items()):
            self._put_snapshot(name, path)
        oldest = min(here, default="")
        for name in self._names():
            if name < oldest or (name not in here and not self._committed(name)):
                self._drop(name)

    def fetch(self, snapshots: Path) -> list[str]:
        """Bring every committed snapshot that the folder lacks; returns their names. One that does not match its manifest stays out,
        with a SnapshotError where nothing else came."""
        damaged, brought = [], []
        for name in self._names():
            if (snapshots / name).exists() or not self._committed(name):
                continue
            temporary = snapshots / f".{name}.fetched"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            for file in self._files(name):
                self.files.get_file(f"{self.root}/{name}/{file}", str(temporary / file))
            if torn := _torn(temporary):
                damaged.append(f"{name}: {torn}")
                shutil.rmtree(temporary)
                continue
            temporary.rename(snapshots / name)
            brought.append(name)
        if damaged and not brought:
            raise SnapshotError(f"The store {self.root} holds damaged snapshots only: {'; '.join(damaged)}. Name another store, or start afresh with another --name.")  # fmt: skip
        return brought

    # ---- one snapshot

    def _put_snapshot(self, name: str, path: Path) -> None:
        manifest = (path / MANIFEST).read_bytes()
        listed = json.loads(manifest)
        if self._manifest(name) != manifest:
            self._drop(name)
            for file, entry in listed.items():
                self._put(name, path / file, entry["sha256"])
        # Trust is a claim about files; it goes after them.
        for file in sorted(path.iterdir(), key=lambda file: (file.name == "trust.json", file.name)):
            if file.name not in listed and file.name != MANIFEST and not file.name.startswith("."):
                self._put_if_changed(name, file)
        if self._manifest(name) != manifest:
            self._put(name, path / MANIFEST, hashlib.sha256(manifest).hexdigest())

    def _put_if_changed(self, name: str, file: Path) -> None:
        stamp = (file.stat().st_mtime_ns, file.stat().st_size)
        if self._sent.get(f"{name}/{file.name}") != stamp:
            self._put(name, file, sha256_of(file))
            self._sent[f"{name}/{file.name}"] = stamp

    def _put(self, name: str, file: Path, sha256: str) -> None:
        """Upload and read back."""
        there = f"{self.root}/{name}/{file.name}"
        self.files.makedirs(f"{self.root}/{name}", exist_ok=True)
        self.files.put_file(str(file), there)
        if (found := self._sha256(there)) != sha256:
            raise OSError(f"{there} reads back with hash {found[:12]}, written was {sha256[:12]}")

    def _drop(self, name: str) -> None:
        """The manifest first: a writer that is killed here leaves an unfinished snapshot, not a torn one."""
        self._sent = {key: value for key, value in self._sent.items() if not key.startswith(name)}
        for file in sorted(self._files(name), key=lambda file: file != MANIFEST):
            self.files.rm_file(f"{self.root}/{name}/{file}")
        if self.files.exists(f"{self.root}/{name}"):  # an emptied folder, where there are folders
            self.files.rmdir(f"{self.root}/{name}")

    # ---- looking

    def _names(self) -> list[str]:
        return sorted(name for name in self._list(self.root) if name.startswith("step-"))

    def _files(self, name: str) -> list[str]:
        return self._list(f"{self.root}/{name}")

    def _list(self, path: str) -> list[str]:
        self.files.invalidate_cache()
        if not self.files.exists(path):
            return []
        found = self.files.ls(path, detail=False)
        return [str(one).rstrip("/").rpartition("/")[2] for one in found]

    def _committed(self, name: str) -> bool:
        return MANIFEST in self._files(name)

    def _manifest(self, name: str) -> bytes | None:
        if not self._committed(name):
            return None
        return bytes(self.files.cat_file(f"{self.root}/{name}/{MANIFEST}"))

    def _sha256(self, path: str) -> str:
        digest = hashlib.sha256()
        with self.files.open(path, "rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def _owner(self, name: str) -> str:
        try:
            state = json.loads(self.files.cat_file(f"{self.root}/{name}/state.json"))
            return str(state["extra"].get("recipe_sha256", ""))
        except (ValueError, KeyError, TypeError, AttributeError):
            return "damaged"

    def _refuse_anothers(self) -> None:
        """Raises SnapshotError. Without this a second run of the same name would drop the first one's snapshots."""
        for name in reversed(self._names()):
            if self._committed(name):
                owner = self._owner(name)
                if owner != self.recipe_sha256:
                    raise SnapshotError(
                        f"The store {self.root} holds snapshots of recipe {owner[:12]}, this run's is {self.recipe_sha256[:12]}. "
                        "Give this run another --name, or name another train.snapshots."
                    )
                return


def check_url(url: str) -> None:
    """Raises UsageError where `url` cannot be opened here, before hours have gone into the run."""
    _open(url)


def _open(url: str) -> tuple[Any, str]:
    """Raises UsageError where fsspec knows no such protocol, or its driver is not installed."""
    try:
        files, root = fsspec.core.url_to_fs(url)
    except ValueError as error:
        raise UsageError(f"train.snapshots = '{url}' is no URL that fsspec knows ({error}). Allowed: s3://, gs://, abfs://, sftp://, file:// and others, or a path.") from None  # fmt: skip
    except ImportError as error:
        raise UsageError(f"train.snapshots = '{url}' needs a driver that is not installed: {error}. Install it beside bascule, for instance: pip install 'bascule[s3]'.") from None  # fmt: skip
    return files, str(root)


def _torn(snapshot: Path) -> str:
    """What does not match in a fetched snapshot, or an empty text. Its witness is held against its hash when it is used."""
    try:
        listed = json.loads((snapshot / MANIFEST).read_text(encoding="utf-8"))
        wrong = [
            name for name, one in listed.items() if sha256_of(snapshot / name) != one["sha256"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its manifest does not hold ({error})"
    return f"{', '.join(wrong)} differ from the manifest" if wrong else ""
