"""Which part of the library imports which: `python tests/import_graph.py [FOLDER ...] --output imports.png`.

Every import counts, also those inside functions. A part is a file or a package directly below the folder.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

LIBRARY = Path(__file__).parents[1] / "mmdit_lib"

Graph = dict[str, set[str]]


def files_of(root: Path) -> dict[str, Path]:
    """Module name below `root` -> file; a package's name is its `__init__.py`."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(module: str, path: Path, package: str) -> Iterator[str]:
    """Names below the package that a file imports, as far as `from x import y` tells modules from names."""
    here = module.split(".") if module else []
    if path.name != "__init__.py":
        here = here[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = here[: len(here) - node.level + 1] if node.level else []
            base = [*([package, *up] if node.level else []), *(node.module.split(".") if node.module else [])]
            names = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith(f"{package}."):
                yield name.removeprefix(f"{package}.")


def file_graph(root: Path = LIBRARY) -> Graph:
    """Imports between files."""
    files = files_of(root)
    graph: Graph = {module: set() for module in files if module}
    for module, path in files.items():
        for name in imports_of(module, path, root.name):
            target = next((m for m in (name, name.rpartition(".")[0]) if m in graph), None)
            if module and target and target != module:
                graph[module].add(target)
    return graph


def part_graph(root: Path = LIBRARY) -> Graph:
    """Imports between the files and packages directly below `root`."""
    graph: Graph = {}
    for module, targets in file_graph(root).items():
        part = module.split(".")[0]
        graph.setdefault(part, set()).update(t.split(".")[0] for t in targets)
        graph[part].discard(part)
    return graph


def cycles(graph: Graph) -> list[list[str]]:
    """Groups of nodes that import each other, directly or indirectly."""

    def reached(start: str) -> set[str]:
        seen, ahead = set(), list(graph[start])
        while ahead:
            node = ahead.pop()
            if node not in seen:
                seen.add(node)
                ahead += graph[node]
        return seen

    reach = {node: reached(node) for node in graph}
    groups = {tuple(sorted(n for n in reach[node] if node in reach[n])) for node in graph if node in reach[node]}
    return sorted(map(list, groups))


def levels(graph: Graph) -> dict[str, int]:
    """0 for what imports nothing; else one more than the highest import. Members of a cycle share a level."""
    group = {node: tuple(members) for members in cycles(graph) for node in members}
    found: dict[str, int] = {}

    def level(node: str) -> int:
        if node not in found:
            members = group.get(node, (node,))
            below = {t for member in members for t in graph[member]} - set(members)
            height = 1 + max(map(level, below), default=-1)
            found.update(dict.fromkeys(members, height))
        return found[node]

    for node in graph:
        level(node)
    return found


def draw(roots: list[Path], output: Path) -> None:
    """Parts by level, with an arrow to each import; imports within a cycle are red."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5 * len(roots), 8), layout="constrained")
    for axes, root in zip(figure.subplots(1, len(roots), squeeze=False)[0], roots, strict=True):
        graph = part_graph(root)
        height, rings = levels(graph), cycles(graph)
        rows = {y: sorted(node for node in graph if height[node] == y) for y in set(height.values())}
        place = {node: ((i + 0.5) / len(row), y) for y, row in rows.items() for i, node in enumerate(row)}
        for node, targets in graph.items():
            for target in targets:
                ring = any(node in ring and target in ring for ring in rings)
                arrow = dict(arrowstyle="-|>", color="#cc3333" if ring else "#9aa7b5", linewidth=1.6 if ring else 0.8)
                axes.annotate("", place[target], place[node], arrowprops=arrow | dict(shrinkA=9, shrinkB=11))
        for node, (x, y) in place.items():
            box = dict(boxstyle="round,pad=0.35", facecolor="#eaf1fa", edgecolor="#3366aa")
            axes.text(x, y, node, ha="center", va="center", fontsize=10, bbox=box)
        arrows = sum(map(len, graph.values()))
        axes.set_title(f"{root.parent.name}/{root.name}: {len(graph)} parts, {arrows} imports, {len(rings)} cycles")
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.5, max(height.values()) + 0.5)
        axes.set_axis_off()
    figure.savefig(output, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="*", default=[LIBRARY])
    parser.add_argument("--output", type=Path, default=Path("imports.png"))
    options = parser.parse_args()
    for root in options.folders:
        graph = part_graph(root)
        print(f"{root}: {len(graph)} parts, cycles between parts {cycles(graph)}, files {cycles(file_graph(root))}")
    draw([root.resolve() for root in options.folders], options.output)


if __name__ == "__main__":
    main()
