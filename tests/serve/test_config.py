"""The command line, the file, and which of them wins."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from shlex import split
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from loramux.bases import DEFAULT_BASE
from loramux.config import ADAPTER_NAME, ServeConfig, parse
from loramux.errors import ConfigError
from loramux.plan import MemoryPlan, rank_limit
from loramux.units import format_bytes, parse_bytes


def test_nothing_said_means_the_defaults() -> None:
    assert parse([]) == ServeConfig(base=DEFAULT_BASE)


def test_every_option_of_ours() -> None:
    config = parse(
        split(
            "some/base --adapter a=x/a --adapter b=x=y --adapters d1 --adapters d2 --adapter-root r "
            "--adapter-memory 2GiB --score-memory 64MiB --max-lora-rank 512 --state s.sqlite --load-patience 2.5 "
            "--dry-run"
        )
    )
    assert config == ServeConfig(
        base="some/base",
        adapters={"a": Path("x/a"), "b": Path("x=y")},
        adapter_dirs=(Path("d1"), Path("d2")),
        adapter_roots=(Path("r"),),
        adapter_memory=2 * 2**30,
        score_memory=64 * 2**20,
        max_rank=512,
        state=Path("s.sqlite"),
        load_patience_s=2.5,
        dry_run=True,
    )


def test_vllms_spellings_mean_the_same() -> None:
    theirs = [
        *split("--model some/base --enable-lora --max-loras 4 --max-cpu-loras 8 --max-lora-rank 512"),
        *["--lora-modules", "a=x/a", '{"name": "b", "path": "x/b", "base_model_name": "some/base"}'],
        *["--lora-modules", "c=x/c"],
    ]
    ours = split("some/base --max-lora-rank 512 --adapter a=x/a --adapter b=x/b --adapter c=x/c")
    assert parse(theirs) == parse(ours)


@pytest.mark.parametrize(
    "rest",
    [
        "--max-model-len 4096 --enforce-eager --port 80",
        "--middleware a.b c.d --seed -1",
        "-O3 -tp 1 -cc.mode=3",
        "--max-lora 4",  # not an abbreviation of ours
    ],
)
def test_what_is_not_ours_goes_on_in_order(rest: str) -> None:
    assert parse(["base", *rest.split()]).engine_args == tuple(rest.split())
    mixed = parse(["base", "--dry-run", *rest.split(), "--adapter", "a=p"])
    assert (mixed.engine_args, mixed.dry_run, set(mixed.adapters)) == (tuple(rest.split()), True, {"a"})


@pytest.mark.parametrize("name", ["a", "A.b_c-d", "team/a:v1", "0", "x" * 128])
def test_good_names(name: str) -> None:
    assert parse(["--adapter", f"{name}=p"]).adapters == {name: Path("p")}


@pytest.mark.parametrize("name", ["", "-a", ".a", "/a", "a b", "a\n", "a@1", "ä", "x" * 129])
def test_bad_names(name: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"adapter": {name: "p"}}))
    for argv in (
        [f"--adapter={name}=p"],
        [f"--lora-modules={json.dumps({'name': name, 'path': 'p'})}"],
        ["--config", str(file)],
    ):
        with pytest.raises(ConfigError) as caught:
            parse(argv)
        assert caught.value.hint


@pytest.mark.parametrize(
    "argv",
    [
        ["--adapter", "a"],
        ["--adapter", "a="],
        ["--lora-modules", '{"name": "a"'],
        ["--lora-modules", '{"name": "a"}'],
        ["--lora-modules", '{"name": "a", "path": 7}'],
        ["--lora-modules", '{"name": 7, "path": "p"}'],
        ["--adapter-memory", "much"],
        ["--score-memory", "0"],
        ["--score-memory", "1MiB"],
        ["--adapter-memory", "2 GX"],
        ["--adapter-memory", "0"],
        ["--adapter-memory", "1e3"],
        ["--max-body", "much"],
        ["--max-body", "0"],
        ["--max-lora-rank", "0"],
        ["--max-lora-rank", "-16"],
        ["--load-patience", "0"],
        ["--load-patience", "nan"],
        ["--load-patience", "1e9"],
        ["--config", "/nowhere/at-all.yaml"],
        ["--config", "/"],
    ],
    ids=" ".join,
)
def test_a_bad_value_stops_the_start_with_a_hint(argv: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    assert caught.value.hint
    assert caught.value.message


@pytest.mark.parametrize(
    "text",
    [b"a: [", b"- a\n- b", b"", b"just words", b"\xff\xfe\x00", b"adapter: [a]", b"adapter: {a: null}",
     b"adapter: {a: 7}", b"adapter: {7: p}", b"adapter-memory: lots", b"max-lora-rank: 0"],
)  # fmt: skip
def test_a_bad_file_stops_the_start_with_a_hint(text: bytes, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        parse(["--config", str(file)])
    assert caught.value.hint


@pytest.mark.parametrize("argv", [["--max-lora-rank", "many"], ["--adapter"]])
def test_malformed_options_exit_like_any_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(argv)
    assert caught.value.code == 2
    assert "usage: loramux serve" in capsys.readouterr().err


class TestKeys:
    def test_every_option(self) -> None:
        options = (
            "--api-key a b --api-key=-c --admin-key d --keys k.yaml --protect-metrics --max-body 2MiB --no-access-log"
        )
        assert parse(["base", *split(options)], {}) == ServeConfig(
            base="base",
            api_keys=("a", "b", "-c"),
            admin_key="d",
            keys_file=Path("k.yaml"),
            protect_metrics=True,
            max_body=2 * 2**20,
            access_log=False,
        )

    def test_the_environment_adds_keys(self) -> None:
        environ = {"LORAMUX_API_KEY": "e1", "VLLM_API_KEY": "e2", "LORAMUX_ADMIN_KEY": "e3"}
        assert parse(["--api-key", "a"], environ).api_keys == ("a", "e1", "e2")
        assert parse([], environ).admin_key == "e3"
        assert parse(["--admin-key", "b"], environ).admin_key == "b"
        assert parse([], dict.fromkeys(environ, "")) == ServeConfig()

    def test_the_file_has_them_too(self, tmp_path: Path) -> None:
        file = tmp_path / "c.yaml"
        options = {"api-key": ["-a", "b"], "admin-key": "-c", "keys": "k.yaml", "protect-metrics": False}
        file.write_text(yaml.safe_dump({**options, "max-body": "1GB", "access-log": False}))
        parsed = parse(["--config", str(file), "--api-key", "d"], {})
        assert (parsed.api_keys, parsed.admin_key, parsed.keys_file) == (("-a", "b", "d"), "-c", Path("k.yaml"))
        assert (parsed.protect_metrics, parsed.max_body, parsed.access_log) == (False, 10**9, False)
        assert parsed.engine_args == (), "vLLM sees no key"

    def test_no_key_is_shown(self, tmp_path: Path) -> None:
        assert "hidden" not in repr(parse(["--api-key", "hidden-1", "--admin-key", "hidden-2"], {}))
        file = tmp_path / "c.yaml"
        file.write_text("api-key: hidden\n x: [")
        with pytest.raises(ConfigError) as caught:
            parse(["--config", str(file)])
        assert "hidden" not in str(caught.value)


class TestFile:
    @pytest.fixture
    def config(self, tmp_path: Path) -> Any:
        def parse_with(options: dict[str, Any], *argv: str) -> ServeConfig:
            file = tmp_path / "c.yaml"
            file.write_text(yaml.safe_dump(options))
            return parse([*argv, "--config", str(file)])

        return parse_with

    def test_every_option_of_ours(self, config: Any) -> None:
        assert config(
            {
                "base": "some/base",
                "adapter": {"a": "x/a"},
                "lora-modules": ["b=x/b", {"name": "c", "path": "x/c"}],
                "adapters": ["d1", "d2"],
                "adapter-root": "r",
                "adapter_memory": "2GiB",  # underscores will do
                "max-lora-rank": 512,
                "enable-lora": True,
                "max-loras": 4,
                "dry-run": True,
            }
        ) == ServeConfig(
            base="some/base",
            adapters={"a": Path("x/a"), "b": Path("x/b"), "c": Path("x/c")},
            adapter_dirs=(Path("d1"), Path("d2")),
            adapter_roots=(Path("r"),),
            adapter_memory=2 * 2**30,
            max_rank=512,
            dry_run=True,
        )

    def test_the_command_line_wins(self, config: Any) -> None:
        options = {
            "base": "file",
            "adapter": {"a": "file", "b": "file"},
            "adapter-memory": 1,
            "max-lora-rank": 8,
            "port": 1,
        }
        parsed = config(options, "line", *split("--adapter a=line --adapter-memory 2 --max-lora-rank 16 --port 2"))
        assert parsed.base == "line"
        assert parsed.adapters == {"a": Path("line"), "b": Path("file")}
        assert (parsed.adapter_memory, parsed.max_rank) == (2, 16)
        assert parsed.engine_args == ("--port", "1", "--port", "2")  # argparse takes the last

    def test_lists_add_up(self, config: Any) -> None:
        parsed = config({"adapters": "d1", "adapter-root": ["r1"]}, "--adapters", "d2", "--adapter-root", "r2")
        assert parsed.adapter_dirs == (Path("d1"), Path("d2"))
        assert parsed.adapter_roots == (Path("r1"), Path("r2"))

    @pytest.mark.parametrize(
        ("value", "args"),
        [
            (True, ("--opt",)),
            (False, ("--no-opt",)),
            (4096, ("--opt", "4096")),
            (0.5, ("--opt", "0.5")),
            ("text with spaces", ("--opt", "text with spaces")),
            (["a", 2], ("--opt", "a", "2")),
            ({"k": [1, None]}, ("--opt", '{"k": [1, null]}')),
            (None, ()),
        ],
    )
    def test_what_is_not_ours_goes_on(self, config: Any, value: Any, args: tuple[str, ...]) -> None:
        assert config({"opt": value}).engine_args == args

    def test_our_switches_may_be_off(self, config: Any) -> None:
        assert config({"dry-run": False, "enable-lora": False}) == ServeConfig()


@given(st.integers(0, 2**80), st.sampled_from(["", "B", "kB", "MB", "GB", "TB", "KiB", "MiB", "GiB", "TiB"]))
def test_sizes_mean_their_units_exactly(count: int, unit: str) -> None:
    power = "kmgt".find(unit[:1].lower() or "-") + 1
    expected = count * (1024 if "i" in unit else 1000) ** power
    assert parse_bytes(f"{count}{unit}") == parse_bytes(f" {count} {unit.lower()} ") == expected


@given(st.decimals(0, 10**6, places=3), st.sampled_from([("MB", 10**6), ("GiB", 2**30)]))
def test_fractions_round_down_to_a_byte(count: Decimal, unit: tuple[str, int]) -> None:
    assert parse_bytes(f"{count}{unit[0]}") == int(count * unit[1])


@given(st.integers(0, 2**50))
def test_a_size_that_is_shown_reads_back_to_half_a_percent(count: int) -> None:
    assert abs(parse_bytes(format_bytes(count)) - count) <= 0.005 * count + 0.5


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1..5", "1,5GB", "1e3", "0x10", "1 G B", "nan", "1Gi B"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_bytes(text)


@given(st.from_regex(ADAPTER_NAME, fullmatch=True))
def test_a_name_never_holds_what_separates_it_from_its_version_or_path(name: str) -> None:
    assert not set(name) & set("@=\n \"'")


@given(st.none() | st.integers(1, 600), st.lists(st.integers(1, 600)))
def test_the_scratch_has_room_for_every_rank(asked: int | None, ranks: list[int]) -> None:
    limit = rank_limit(asked, ranks)
    wanted = max([asked or 256, *ranks])
    assert limit % 16 == 0
    assert wanted <= limit < wanted + 16


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=5), st.integers(0, 10**5))
def test_the_plan_never_promises_room_that_is_not_there(sizes: list[int], memory: int) -> None:
    plan = MemoryPlan("CPU", "float32", memory, {str(i): size for i, size in enumerate(sizes)}, 64, "rest")
    mean = sum(sizes) / len(sizes)
    assert plan.more_fit is not None
    assert plan.more_fit == 0 or sum(sizes) + plan.more_fit * mean <= memory + 1e-6
    assert sum(sizes) + (plan.more_fit + 1) * mean > memory
    assert sum(name in "\n".join(plan.lines()) for name in plan.adapters) == len(sizes)


def test_the_plan_tells_what_a_draw_takes() -> None:
    lines = MemoryPlan("CPU", "float32", 10**6, {"a": 2048, "b": 4096}, 64, "rest", draws={"a": 1024}).lines()
    (a,), (b,) = ([line.split() for line in lines if line.split()[0] == name] for name in "ab")
    assert a == ["a", "2.00", "KiB,", "a", "draw", "1.00", "KiB", "more"] and b == ["b", "4.00", "KiB"]


def test_the_plan_of_very_many_adapters_stays_short_and_tells_how_many_fit() -> None:
    plan = MemoryPlan("CPU", "float32", 10**6, {f"a{i:04}": 10**4 for i in range(1000)}, 64, "rest", unread=7)
    text = "\n".join(plan.lines())
    assert len(plan.lines()) < 50
    assert "968 more" in text and "about 100 fit at once" in text and "7 more will be read" in text
