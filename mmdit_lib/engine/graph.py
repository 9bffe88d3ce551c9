"""The graph file: a TensorRT network as data, `rank{r}.graph.json`.

Layers are in the order in which they were added, with TensorRT's names for layer types and attributes.
It contains no weights: a constant names a checkpoint tensor. Reading it does not need TensorRT.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from ..config import TORCH_DTYPES, Text, one_line, shown
from ..files import read_json, write_synced

FORMAT_VERSION = 1
# Names of inputs and attributes go into the Python code that torch.fx generates: allow only identifiers.
Identifier = Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_]*$", max_length=64)]


@dataclass(frozen=True)
class Value:
    """A tensor of the network; -1 marks a dynamic size."""

    name: Text
    dtype: Literal[tuple(TORCH_DTYPES)]
    shape: Annotated[tuple[Annotated[int, Field(ge=-1, strict=True)], ...], Field(max_length=8)]

    def __str__(self) -> str:
        return f"{shown(self.name)} {self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Layer:
    """One TensorRT layer.

    Attributes:
        type: TensorRT's `LayerType`, for instance 'MATRIX_MULTIPLY'; an `IAttention`'s two boundary
            layers appear as one 'ATTENTION'.
        inputs: tensor names; None for an optional input that is not used.
        attributes: under TensorRT's names; what cannot be read back (a constant's source, a collective's
            group) is what the network wrote into the layer's metadata.
    """

    name: Text
    type: Text
    inputs: tuple[Text | None, ...]
    output: Value
    attributes: dict[Identifier, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """One rank's network.

    Attributes:
        modules: which tensors each module returned, by module path.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Text, ...]
    layers: tuple[Layer, ...]
    modules: dict[Text, tuple[Text, ...]]

    def save(self, path: Path) -> None:
        # `asdict` copies every value and takes longer than defining the network.
        content = {"format_version": FORMAT_VERSION, **vars(self)}
        # One layer per line: readable, and `diff` shows where two graphs differ.
        layers = ",\n  ".join(json.dumps(layer, default=vars) for layer in content.pop("layers"))
        head = json.dumps(content, default=vars)[:-1]
        write_synced(path, f'{head}, "layers": [\n  {layers}\n]}}\n')

    @classmethod
    def load(cls, path: Path) -> Graph:
        """Raises `ValueError` if this is not a graph file of this format version, or its tensors do not connect."""
        content = read_json(path)
        version = content.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ValueError(f"{path} has format {shown(version)}; this version reads {FORMAT_VERSION}: build again")
        with one_line(f"{path} is not a graph file"):
            graph = FILE.validate_python(content)
        graph._check_names(path)
        return graph

    def _check_names(self, path: Path) -> None:
        """Every tensor is produced once, before it is used."""
        made: set[str | None] = {None}
        for value, layer in [*((v, None) for v in self.inputs), *((x.output, x) for x in self.layers)]:
            for name in layer.inputs if layer else ():
                if name not in made:
                    raise ValueError(
                        f"{path}: layer {shown(layer.name)} reads {shown(name)}, which no earlier layer produces"
                    )
            if value.name in made:
                raise ValueError(f"{path}: tensor {shown(value.name)} is produced twice")
            made.add(value.name)
        for name in [*self.outputs, *(name for names in self.modules.values() for name in names)]:
            if name not in made:
                raise ValueError(f"{path}: no layer produces {shown(name)}, an output of the network or of a module")

    def weights(self) -> set[str]:
        """The checkpoint tensors that the graph uses."""
        return {x.attributes["weight"] for x in self.layers if "weight" in x.attributes}


FILE = TypeAdapter(Graph)
"""Validates the content of a graph file; what a layer's attributes mean is checked by `rehearsal.py`."""
