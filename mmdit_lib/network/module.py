"""Modules in the style of TensorRT-LLM: a tree that declares parameters and, when called, adds layers.

A module's path in the tree ('transformer_blocks.0.attn.to_q') names its parameters in the
checkpoint and its layers and tensors in the network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .network import Parameter, Tensor


class Module:
    path: str = ""

    def __call__(self, *inputs, **options):
        """Add the layers of `forward` under this module's path; the outputs carry its name."""
        network = next(x.network for x in (*inputs, *options.values()) if isinstance(x, Tensor))
        with network.scope(self.path):
            outputs = self.forward(*inputs, **options)
        network.name_outputs(self.path, outputs)
        return outputs

    def forward(self, *inputs, **options):
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def children(self) -> Iterator[tuple[str, Module]]:
        return ((name, value) for name, value in vars(self).items() if isinstance(value, Module))

    def named_modules(self, path: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all below it, with their paths, in definition order."""
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

    def assign_paths(self, path: str = "") -> Module:
        """Set the path of this module to `path`, and name every module and parameter below it. Returns the module."""
        for place, module in self.named_modules(path):
            module.path = place
            for name, value in vars(module).items():
                if isinstance(value, Parameter):
                    value.name = f"{place}.{name}"
        return self


class ModuleList(Module):
    """Children named 0, 1, 2, ..."""

    def __init__(self, modules: Iterable[Module]):
        self.modules = list(modules)

    def children(self) -> Iterator[tuple[str, Module]]:
        return ((str(i), module) for i, module in enumerate(self.modules))

    def __iter__(self) -> Iterator[Module]:
        return iter(self.modules)

    def __getitem__(self, index: int) -> Module:
        return self.modules[index]


class Sequential(Module):
    """Named children that are called in order, each with the output of the one before."""

    def __init__(self, **modules: Module):
        vars(self).update(modules)

    def forward(self, x):
        for _, module in self.children():
            x = module(x)
        return x
