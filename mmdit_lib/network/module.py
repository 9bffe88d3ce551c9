"""Modules in TensorRT-LLM's manner: a tree that knows its parameters and, called, adds layers.

A module's path in the tree ('transformer_blocks.0.attn.to_q') names its parameters in the
checkpoint and its layers and tensors in the network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator


class Parameter:
    """A checkpoint tensor: its full shape, before tensor parallelism cuts it."""

    def __init__(self, *shape: int):
        self.shape = shape


class Module:
    path: str = ""

    def __call__(self, *inputs, **options):
        """Adds the layers of `forward` under this module's path; the outputs carry its name."""
        network = next(x.network for x in inputs if hasattr(x, "network"))
        with network.scope(self.path):
            outputs = self.forward(network, *inputs, **options)
        network.name_outputs(self.path, outputs)
        return outputs

    def forward(self, network, *inputs):
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def children(self) -> Iterator[tuple[str, Module]]:
        return ((name, value) for name, value in vars(self).items() if isinstance(value, Module))

    def named_modules(self, path: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all below it, with their paths, in the order of definition."""
        yield path, self
        for name, child in self.children():
            yield from child.named_modules(f"{path}.{name}" if path else name)

    def named_parameters(self) -> dict[str, tuple[int, ...]]:
        """The name and full shape of every checkpoint tensor of this tree."""
        return {
            f"{path}.{name}": value.shape
            for path, module in self.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, Parameter)
        }

    def assign_paths(self) -> None:
        for path, module in self.named_modules():
            module.path = path


class ModuleList(Module):
    """Children named 0, 1, 2, ...; None leaves a number out."""

    def __init__(self, modules: Iterable[Module | None]):
        self.modules = list(modules)

    def children(self) -> Iterator[tuple[str, Module]]:
        return ((str(i), module) for i, module in enumerate(self.modules) if module is not None)

    def __iter__(self) -> Iterator[Module]:
        return iter(self.modules)

    def __getitem__(self, index: int) -> Module:
        return self.modules[index]
