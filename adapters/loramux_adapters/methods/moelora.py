"""MOELoRA: experts that a task chooses, not a token (arXiv 2310.18339; the medical one of liuqidong07).

    g = softmax(G · m[task])
    y_t = W0 x_t + (α/r) Σ_e g_e · B_e · A_e · x_t

A_e [r/E, d_in], B_e [d_out, r/E], m [tasks, d_m], G [E, d_m]; r is the rank of all experts together, and so is the r of
the scale. It is lowered with a table G · mᵀ of all tasks' scores, made in float64 and stored in float32. One task of it
is a plain LoRA of rank r with α/r · g_e for the scale of each rank of expert e (`tasks.py`).

A request may choose the task. Which one answers where it does not is for the key `task_id` to say, which is ours and
has to be added to adapter_config.json; without it the adapter can be checked, shown and written, and serving it is
refused with the question. Task ids are those of training, 0 to `task_num`: there is one more of them than `task_num`
says. What its code does for several tasks in one request, the mean of their embeddings, is not offered.

Names and fields are those of the authors' code (liuqidong07/MOELoRA-peft, read at 949c8c5 and ccb426d):
`lora_A.loraA.{e}.mlp.weight`, repeated as `lora_A.loraA.{e}.weight`, the same for B, and `task_num`,
`task_embedding_dim`, `expert_num`. With peft_type MMOELORAS, which is the only one that its last version saves, m and G
are `lora_task_embedding.weight` and `lora_gate.GateL.weight` for the whole model; each site saves others that its
forward pass does not read. With MMOELORA every site has its own. It saves a pickle, which has to be converted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loramux_adapters.abilities import Abilities, Layout
from loramux_adapters.base_model import BaseModel
from loramux_adapters.errors import AdapterConfigInvalid, AdapterTooLarge, shown
from loramux_adapters.files import AdapterFolder
from loramux_adapters.gate import Gate, GateKind, GateSource, Norm
from loramux_adapters.lowered import LoweredAdapter
from loramux_adapters.methods.lora import CONFIG_FILE, peft_config
from loramux_adapters.mixture import token_site
from loramux_adapters.peft import checks, experts
from loramux_adapters.peft.sites import Part, Sites, Tensors, read_sites
from loramux_adapters.peft.tensors import PREFIX
from loramux_adapters.verify import verify

_SHARED = "MMOELORAS"
_GATE_PARTS = {
    "site_embedding": Part(PREFIX + "{module}.lora_task_embedding.weight", "TM"),
    "site_gate": Part(PREFIX + "{module}.lora_gate.GateL.weight", "EM"),
}
_OF_EACH_SITE = {
    "a": Part(PREFIX + "{module}.lora_A.loraA.{index}.mlp.weight", "RI"),
    "b": Part(PREFIX + "{module}.lora_B.loraB.{index}.mlp.weight", "OR"),
    "a again": Part(PREFIX + "{module}.lora_A.loraA.{index}.weight", "RI", copy_of="a"),
    "b again": Part(PREFIX + "{module}.lora_B.loraB.{index}.weight", "OR", copy_of="b"),
} | _GATE_PARTS
_OF_THE_MODEL = _OF_EACH_SITE | {
    "site_embedding": Part(_GATE_PARTS["site_embedding"].template, "TM", optional=True),
    "site_gate": Part(_GATE_PARTS["site_gate"].template, "EM", optional=True),
    "embedding": Part(PREFIX + "lora_task_embedding.weight", "TM"),
    "gate": Part(PREFIX + "lora_gate.GateL.weight", "EM"),
}
_OWN_FIELDS = frozenset({"task_num", "task_embedding_dim", "expert_num", "task_id"})
_HINT = "Give it as it was in training."
_GATE = "task"


@dataclass(frozen=True)
class MoeLoraCheckpoint:
    sites: Sites
    rank: int
    alpha: float
    shared: bool
    task: int | None


class MoeLora:
    """MMOELORAS and MMOELORA."""

    name = "moelora"
    abilities = Abilities(
        (
            Layout(
                "MOELoRA",
                "liuqidong07/MOELoRA-peft",
                (_SHARED, "MMOELORA"),
                when="with `task_id` added",
                keys=r".+\.lora_[AB]\.(default\.)?lora[AB]\..+|(.+\.)?lora_(task_embedding|gate\.(default\.)?GateL)\..+",
            ),
        ),
        serve="with a default task, the `task_id` in its config; a request may choose another",
        router="task",
    )

    def detect(self, folder: AdapterFolder) -> bool:
        return peft_config(folder).get("peft_type") in self.abilities.types

    def read(self, folder: AdapterFolder, base: BaseModel) -> MoeLoraCheckpoint:
        raw = folder.read_json(CONFIG_FILE)
        rank, number = experts.count(raw, "r", _HINT), experts.count(raw, "expert_num", _HINT)
        tasks, width = experts.count(raw, "task_num", _HINT) + 1, experts.count(raw, "task_embedding_dim", _HINT)
        if rank % number:
            raise AdapterConfigInvalid(
                f"adapter_config.json: r is {rank}, which {number} experts cannot share equally.",
                hint="r is the rank of all experts together. Correct it or expert_num.",
                field="r",
            )
        task = _task(raw, tasks)
        config = experts.parse_shared_fields(raw, _OWN_FIELDS, rank)
        shared = raw["peft_type"] == _SHARED
        sizes = {"R": rank // number, "E": number, "T": tasks, "M": width}
        sites = read_sites(folder, base, config, _OF_THE_MODEL if shared else _OF_EACH_SITE, sizes, count=number)
        table = 4 * tasks * number * (1 if shared else len(sites.modules))
        if table > folder.max_bytes:
            raise AdapterTooLarge(
                f"The scores of {tasks} tasks have {table} bytes; the limit is {folder.max_bytes}.",
                hint="Correct task_num, or raise the limit.",
                field="task_num",
            )
        return MoeLoraCheckpoint(sites, rank, config.lora_alpha, shared, task)

    def lower(self, checkpoint: MoeLoraCheckpoint, base: BaseModel) -> LoweredAdapter:
        sites, gates = {}, {}
        of_all = _scores(checkpoint.sites.common, checkpoint) if checkpoint.shared else None
        for module, part in checkpoint.sites.modules.items():
            scale = checks.rank_scale(module, checkpoint.rank, checkpoint.alpha, checkpoint.alpha / checkpoint.rank)
            scores = _scores(part, checkpoint) if of_all is None else of_all
            gate = _GATE if checkpoint.shared else module
            sites[module] = token_site(part["a"], part["b"], scale.chunk(len(part["b"])), gate=gate)
            gates[gate] = Gate(
                scores.float(), kind=GateKind.TASK, source=GateSource.NONE, norm=Norm.SOFTMAX, task=checkpoint.task
            )
        return LoweredAdapter(self.name, sites, _warnings(checkpoint), gates=gates)

    def verify(self, adapter: LoweredAdapter, base: BaseModel) -> None:
        verify(adapter, base)


def _task(raw: Mapping[str, Any], tasks: int) -> int | None:
    task = raw.get("task_id")
    if task is None:
        return None
    if type(task) is int and 0 <= task < tasks:
        return task
    raise AdapterConfigInvalid(
        f"adapter_config.json: task_id is {shown(task)}, not 0 to {tasks - 1}.",
        hint="Give the id that the task had in training (task_num of them and one more).",
        field="task_id",
    )


def _scores(tensors: Tensors, checkpoint: MoeLoraCheckpoint) -> torch.Tensor:
    """What softmax is taken of, [tasks, E] float64."""
    prefix = "" if checkpoint.shared else "site_"
    return tensors[f"{prefix}embedding"][0].double() @ tensors[f"{prefix}gate"][0].double().T


def _warnings(checkpoint: MoeLoraCheckpoint) -> tuple[str, ...]:
    unread = checkpoint.shared and any("site_gate" in part for part in checkpoint.sites.modules.values())
    note = (
        ("The gates of single sites are not used, as in MOELoRA's own code: it reads the model's.",) if unread else ()
    )
    return checkpoint.sites.warnings + note
