"""An adapter in training: sites by their modules' names, attached to a model by hooks."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors.torch import save_file

from loramux_adapters.base_model import BaseModel
from loramux_adapters.errors import AdapterUnsupportedFeature
from loramux_adapters.lowered import LoweredAdapter
from loramux_adapters.peft.tensors import PREFIX, WEIGHTS_FILE
from loramux_adapters.train.site import Shape, Site

SiteT = TypeVar("SiteT", bound=Site)


class TrainableAdapter(torch.nn.Module, Generic[SiteT]):
    """Sites of one kind. `sites` maps a module's name to its site."""

    def __init__(self, sites: Mapping[str, SiteT]) -> None:
        super().__init__()
        self._names = tuple(sites)
        # Names have dots, which the keys of a ModuleDict may not.
        self._sites = torch.nn.ModuleList(sites.values())

    @classmethod
    def create(
        cls,
        base: BaseModel,
        modules: list[str],
        make: Callable[[int, int, Shape, torch.Generator], SiteT],
        shape: Shape,
        seed: int,
    ) -> "TrainableAdapter[SiteT]":
        """Sites at these linear layers of the base. `make` is a kind of site, or makes one with options filled in.

        Raises AdapterUnsupportedFeature for a layer that the base does not have.
        """
        generator = torch.Generator().manual_seed(seed)
        for module in modules:
            if module not in base.linears:
                raise AdapterUnsupportedFeature(
                    f"{base.name} has no linear layer {module}.", hint="Name one that it has.", field="modules"
                )
        return cls({module: make(*base.linears[module], shape, generator) for module in modules})

    @property
    def sites(self) -> dict[str, SiteT]:
        return dict(zip(self._names, self._sites, strict=True))  # type: ignore[arg-type]

    def redraw(self, groups: int, generator: torch.Generator) -> None:
        """Draw every site's weights anew: `groups` draws for the equal parts of the batches that follow."""
        for site in self.sites.values():
            site.redraw(groups, generator)

    def settle(self) -> None:
        """Use the mean in what follows."""
        for site in self.sites.values():
            site.settle()

    @contextmanager
    def attached(self, model: Any) -> Iterator[None]:
        """Within, the model computes with the adapter; sites add in their own dtype and round to the layer's."""
        handles = [model.get_submodule(name).register_forward_hook(_hook(site)) for name, site in self.sites.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def lowered(self) -> LoweredAdapter:
        """What is served: a copy of the weights as they are now."""
        sites, gates = {}, {}
        for module, site in self.sites.items():
            sites[module], gate = site.lowered(module)
            if gate is not None:
                gates[module] = gate
        return LoweredAdapter(next(iter(self.sites.values())).method, sites, gates=gates)

    def save_peft(self, folder: Path, base_name: str, dtype: torch.dtype = torch.float32) -> None:
        """Write the layout of the method's own code (`loramux_adapters.methods`) into the folder, made if absent.

        Raises AdapterUnsupportedFeature for a mixture, whose file is a native one (`write_native` of `lowered()`).
        """
        first = next(iter(self.sites.values()))
        if first.router is not None:
            raise AdapterUnsupportedFeature(
                "A mixture is no PEFT adapter.", hint="Write a native file: write_native.", field="experts"
            )
        tensors = {
            f"{PREFIX}{module}.{name}": tensor.to(dtype).contiguous().clone()
            for module, site in self.sites.items()
            for name, tensor in site.layout().items()
        }
        config = {
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_name,
            "inference_mode": True,
            "r": first.shape.rank,
            "lora_alpha": first.shape.alpha,
            "target_modules": list(self._names),
            "lora_dropout": 0.0,
            "bias": "none",
        } | first.config()
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / WEIGHTS_FILE).chmod(0o644)  # safetensors' 0600 would keep a server of another user out
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _hook(site: Site) -> Callable[..., Any]:
    def add(module: Any, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
        return y + site.delta(args[0].to(site.a.dtype)).to(y.dtype)

    return add
