"""The graph file: a TensorRT network as data, `rank{r}.graph.json`.

Layers are in the order in which they were added, with TensorRT's names for layer types and attributes.
It contains no weights: a constant names a checkpoint tensor. Reading it does not need TensorRT.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Value:
    """A tensor of the network; -1 marks a dynamic size."""

    name: str
    dtype: str
    shape: tuple[int, ...]


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

    name: str
    type: str
    inputs: tuple[str | None, ...]
    output: Value
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """One rank's network.

    Attributes:
        modules: which tensors each module returned, by module path.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[str, ...]
    layers: tuple[Layer, ...]
    modules: dict[str, tuple[str, ...]]

    def save(self, path: Path) -> None:
        # `asdict` copies every value and takes longer than defining the network.
        content = {"format_version": FORMAT_VERSION, **vars(self)}
        # One layer per line: readable, and `diff` shows where two graphs differ.
        layers = ",\n  ".join(json.dumps(layer, default=vars) for layer in content.pop("layers"))
        head = json.dumps(content, default=vars)[:-1]
        path.write_text(f'{head}, "layers": [\n  {layers}\n]}}\n')

    @classmethod
    def load(cls, path: Path) -> Graph:
        """Raises `ValueError` if this is not a graph file of this format version."""
        try:
            content = json.loads(path.read_text())
            version = content["format_version"]
            if version != FORMAT_VERSION:
                raise ValueError(f"{path} has format {version}; this version reads {FORMAT_VERSION}: build again")
            return cls(
                inputs=tuple(_value(v) for v in content["inputs"]),
                outputs=tuple(content["outputs"]),
                layers=tuple(_layer(x) for x in content["layers"]),
                modules={path: tuple(names) for path, names in content["modules"].items()},
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a graph file ({type(error).__name__}: {error}): build again") from None

    def weights(self) -> set[str]:
        """The checkpoint tensors that the graph uses."""
        return {x.attributes["weight"] for x in self.layers if "weight" in x.attributes}


def _value(content: dict) -> Value:
    return Value(content["name"], content["dtype"], tuple(content["shape"]))


def _layer(content: dict) -> Layer:
    return Layer(
        content["name"], content["type"], tuple(content["inputs"]), _value(content["output"]), content["attributes"]
    )
