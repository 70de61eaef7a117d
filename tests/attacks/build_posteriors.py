"""Hostile Bayesian adapters, added to `ATTACKS`.

Each is the sound sample of its method (`tests/adapters/layouts`) with something changed, or an ensemble of two LoRAs.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..adapters.checkpoints import make_tensors, write_adapter
from ..adapters.layouts import abmll, blob, ivon, mcdropout, monteclora, scalabl, swag
from .build import CONFIG, PREFIX, WEIGHTS, Builder, attack
from .build_native import Q, changed

SOUND_POSTERIORS: Mapping[str, ModuleType] = {
    "abmll": abmll,
    "blob": blob,
    "ivon": ivon,
    "mcdropout": mcdropout,
    "monteclora": monteclora,
    "scalabl": scalabl,
    "swag": swag,
}


def write_posterior(
    folder: Path,
    method: str,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor | None] | None = None,
) -> Path:
    """The method's sound adapter with fields changed and tensors replaced, added or, where None, removed."""
    layout = SOUND_POSTERIORS[method]
    content = layout.make_tensors() | dict(tensors or {})
    fields = layout.make_config(**(config or {}))
    return write_adapter(folder, fields, {name: tensor for name, tensor in content.items() if tensor is not None})


def write_ensemble(folder: Path, names: Any = ("first", "second"), members: int = 2, **fields: Any) -> Path:
    for seed, name in enumerate(("first", "second")[:members]):
        write_adapter(folder / name, tensors=make_tensors(seed=seed))
    config = {"peft_type": "ENSEMBLE", "adapters": list(names), **fields}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def _changed(method: str, *, tensors: Mapping[str, torch.Tensor | None] | None = None, **config: Any) -> Builder:
    return lambda folder: write_posterior(folder, method, config, tensors)


NAN = float("nan")
INVALID, SHAPE, UNSUPPORTED = "adapter_config_invalid", "adapter_shape_mismatch", "adapter_unsupported_feature"
MISSING, UNKNOWN, NOT_FINITE = "adapter_missing_tensor", "adapter_unknown_tensor", "adapter_not_finite"

# BLoB

RHO = f"{PREFIX}.lora_A_rho"
attack(UNSUPPORTED, "blob: nothing says how σ is made")(_changed("blob", bayes_eps=None))
attack(INVALID, "blob: answer of 10 000 digits")(_changed("blob", bayes_eps=10**4000))
attack(INVALID, "blob: answer in words")(_changed("blob", bayes_eps="squared"))
attack(NOT_FINITE, "blob: NaN in ρ")(_changed("blob", tensors={RHO: torch.full((4, 24), NAN)}))
attack(NOT_FINITE, "blob: σ beyond float32")(_changed("blob", tensors={RHO: torch.full((4, 24), 1e20)}))
attack(SHAPE, "blob: one ρ for all")(_changed("blob", tensors={RHO: torch.ones(1)}))
attack(UNKNOWN, "blob: ρ for B")(_changed("blob", tensors={f"{PREFIX}.lora_B_rho": torch.ones(24, 4)}))
attack(UNKNOWN, "blob: ρ twice")(_changed("blob", tensors={f"{PREFIX}.lora_A.default.lora_A_rho": torch.ones(4, 24)}))

# IVON

HESS = f"{PREFIX}.lora_A.hess"
attack(INVALID, "ivon: negative variance")(_changed("ivon", tensors={HESS: torch.full((4, 24), -1.0)}))
attack(INVALID, "ivon: infinite variance")(_changed("ivon", weight_decay=0, tensors={HESS: torch.zeros(4, 24)}))
attack(NOT_FINITE, "ivon: NaN for a Hessian")(_changed("ivon", tensors={HESS: torch.full((4, 24), NAN)}))
attack(INVALID, "ivon: sample size of 0")(_changed("ivon", ess=0))
attack(INVALID, "ivon: sample size of 100 000 bits")(_changed("ivon", ess=1 << 10_000))
attack(MISSING, "ivon: means alone")(_changed("ivon", tensors={HESS: None}))

# ScalaBL

SCALES = f"{PREFIX}.lora_A.default"
attack(NOT_FINITE, "scalabl: deviation beyond float32")(
    _changed("scalabl", tensors={f"{SCALES}.log_s_sigma": torch.full((4,), 1e6)})
)
attack(NOT_FINITE, "scalabl: NaN for a scale")(_changed("scalabl", tensors={f"{SCALES}.log_s": torch.full((4,), NAN)}))
attack(SHAPE, "scalabl: matrix of scales")(_changed("scalabl", tensors={f"{SCALES}.log_s": torch.ones(4, 4)}))

# SWAG

MOMENT = f"base.{PREFIX}.lora_A.default.weight"
attack(INVALID, "swag: deviations divided by zero")(_changed("swag", swag_max_num_models=1))
attack(SHAPE, "swag: models without end")(_changed("swag", n_models=1 << 60, swag_max_num_models=1 << 60))
attack(NOT_FINITE, "swag: NaN in a moment")(_changed("swag", tensors={f"{MOMENT}_sq_mean": torch.full((4, 24), NAN)}))
attack(INVALID, "swag: negative scale")(_changed("swag", swag_sample_scale=-1))
attack(UNKNOWN, "swag: the last weights beside")(_changed("swag", tensors={MOMENT: torch.ones(4, 24)}))

# MC-dropout

attack(INVALID, "mcdropout: everything dropped")(_changed("mcdropout", lora_dropout=1.0))
attack(INVALID, "mcdropout: nothing dropped")(_changed("mcdropout", lora_dropout=0.0))

# ABMLL

attack(SHAPE, "abmll: giant rank of σ")(_changed("abmll", sigma_rank=1 << 60))
attack(INVALID, "abmll: no constant")(_changed("abmll", sigma_offset=None))
attack(INVALID, "abmll: form that nobody knows")(_changed("abmll", sigma_form="relu"))
attack(NOT_FINITE, "abmll: NaN in σ")(
    _changed("abmll", tensors={f"{PREFIX}.lora_A_sigma.weight": torch.full((3, 24), NAN)})
)

# MonteCLoRA

attack(INVALID, "monteclora: list for a config")(_changed("monteclora", monteclora_config=[1]))
attack(SHAPE, "monteclora: samples without end")(_changed("monteclora", monteclora_config={"num_samples": 1 << 60}))

# Ensembles

attack("adapter_unsafe_file", "ensemble: path for a member")(lambda f: write_ensemble(f, ["first", "../../etc"]))
attack("adapter_not_found", "ensemble: member that is not there")(lambda f: write_ensemble(f, members=1))
attack(INVALID, "ensemble: a hundred thousand members")(lambda f: write_ensemble(f, map(str, range(100_000))))
attack(INVALID, "ensemble: one member twice")(lambda f: write_ensemble(f, ["first", "first"]))
attack(UNSUPPORTED, "ensemble: weights")(lambda f: write_ensemble(f, weights=[1, 2]))


@attack("adapter_unsafe_file", "ensemble: link out of the folder")
def linked_member(folder: Path) -> None:
    outside = write_adapter(folder.parent / "outside")
    write_ensemble(folder, members=1)
    (folder / "second").symlink_to(outside)


@attack("adapter_unsafe_file", "ensemble: a member is a pickle")
def pickled_member(folder: Path) -> None:
    write_ensemble(folder)
    (folder / "second" / WEIGHTS).write_bytes(b"\x80\x04")


@attack("adapter_too_large", "ensemble: members that fill up to 9 GiB")
def filled_up(folder: Path) -> None:
    """One member of rank 2¹⁷ in zeros, as a hole in its file, and 499 of rank 1."""
    module, rank = PREFIX.removeprefix("base_model.model."), 1 << 17
    names = [str(i) for i in range(500)]
    for i, name in enumerate(names):
        config = {"peft_type": "LORA", "r": rank if i == 0 else 1, "lora_alpha": 8, "target_modules": [module]}
        factors = {f"{PREFIX}.lora_A.weight": torch.ones(1, 24), f"{PREFIX}.lora_B.weight": torch.ones(24, 1)}
        write_adapter(folder / name, config, factors)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "ENSEMBLE", "adapters": names}))
    header, end = {}, 0
    for factor, shape in (("A", [rank, 24]), ("B", [24, rank])):
        entry = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 48 * rank]}
        header[f"{PREFIX}.lora_{factor}.weight"], end = entry, end + 48 * rank
    text = json.dumps(header).encode()
    path = folder / names[0] / WEIGHTS
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with path.open("r+b") as file:
        file.seek(8 + len(text))
        file.write(b"\x80\x3f")  # 1.0, or it would have no effect
        file.seek(8 + len(text) + 48 * rank)
        file.write(b"\x80\x3f")
    os.truncate(path, 8 + len(text) + end)


# The native format


def _posterior(kind: str, tensors: Mapping[str, torch.Tensor], **fields: Any) -> Builder:
    named = {f"{Q}.variance.{name}": tensor for name, tensor in tensors.items()}
    return changed(lambda d, t: (d["sites"][Q].update(variance={"kind": kind, **fields}), t.update(named)))


attack(INVALID, "native: negative deviation")(_posterior("diagonal_a", {"sigma_a": -torch.ones(4, 24)}))
attack(NOT_FINITE, "native: NaN deviation")(_posterior("rank_diagonal", {"sigma_scale": torch.full((4,), NAN)}))
attack(SHAPE, "native: ensemble without members")(
    _posterior(
        "ensemble",
        {"member_a": torch.ones(0, 4, 24), "member_b": torch.ones(0, 4, 24), "member_scale": torch.ones(0, 4)},
    )
)
attack(INVALID, "native: dropout of everything")(_posterior("dropout", {}, rate=1))
attack(INVALID, "native: posterior of no kind")(_posterior("cauchy", {}))
attack(UNKNOWN, "native: deviations beside")(
    changed(lambda d, t: t.update({f"{Q}.variance.sigma_a": torch.ones(4, 24)}))
)
attack(INVALID, "native: dense deviations of a mixture")(
    _posterior("hierarchical", {"std_a": torch.ones(1, 24), "std_b": torch.ones(1, 24), "offset": torch.ones(1)})
)
