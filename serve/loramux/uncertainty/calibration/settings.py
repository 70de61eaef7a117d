"""Under which settings answers were scored: a calibration holds for one, exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loramux.uncertainty.abstain import SURE
from loramux.uncertainty.ask import SCORES, Mode

#: The modes whose answers can be calibrated. (Choices of `sample` are several answers with one score.)
MODES = (Mode.SCORE, Mode.DECIDE, Mode.FAST)
#: Of each mode, the score that tells of being right if none is named.
SCORE = {Mode.SCORE: "nll_ln", Mode.DECIDE: "total", Mode.FAST: "nll_ln"}


@dataclass(frozen=True)
class Settings:
    """The law of the noise, and which draws. `seed` is None where there are none; `labels` are those of `decide`."""

    mode: Mode
    noise: str | None
    samples: int
    seed: int | None
    labels: tuple[str, ...] = ()
    adaptive: bool = False  # it took so many draws to decide on it: not an answer like others with as many

    @classmethod
    def of(cls, told: Mapping[str, Any], labels: Sequence[str]) -> Settings:
        """Of an answer's field `uncertainty`; the order of the labels does not matter."""
        samples = told["samples"]
        seed = told["seed"] if samples else None
        adaptive = bool(told.get("adaptive"))
        return cls(Mode(told["mode"]), told["noise"], samples, seed, tuple(sorted(labels)), adaptive)

    def as_json(self) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "mode": self.mode.value,
            "noise": self.noise,
            "samples": self.samples,
            "seed": self.seed,
        }
        return shown | {"labels": list(self.labels)} if self.labels else shown


def inputs(mode: Mode) -> tuple[str, ...]:
    """The scores that a calibration of this mode may start from: large where an answer is not sure."""
    return tuple(name for name in SCORES[mode] if name not in SURE)
