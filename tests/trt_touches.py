"""What Python source touches of TensorRT, found by reading it, and whether both TensorRT packages have it.

The reader follows types as far as the binding's own signatures carry them: `trt.Builder(log)` is a
`Builder`, so `.create_network()` gives an `INetworkDefinition`, and so on through assignments. Where
an object's type stays unknown, an attribute counts as TensorRT's if some TensorRT class has one of
that name.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from trt_api import MODULE, Api

Types = frozenset[str]
"""'module', 'class X', 'method X.f' or, for an object of class X, 'X'."""
UNKNOWN: Types = frozenset()
MODULE_ITSELF: Types = frozenset({"module"})


class Call(NamedTuple):
    positional: int
    keywords: tuple[str, ...]


class Touch(NamedTuple):
    where: str
    owners: Types
    """The classes that the object may be of; empty where that is unknown."""
    name: str
    guards: frozenset[str] = frozenset()
    """The names that the function asks for, with `hasattr` or with `getattr` and a default."""
    call: Call | None = None


def names_of_trt(tree: ast.Module) -> set[str]:
    """The names by which a file knows the TensorRT package."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name for a in node.names if a.name == "trt"}
        elif isinstance(node, ast.Import):
            names |= {a.asname or a.name for a in node.names if a.name in ("tensorrt", "tensorrt_rtx")}
        elif isinstance(node, ast.Assign):  # where the library defines it
            names |= {"trt"} & {ast.unparse(target) for target in node.targets}
    return names


def touches_of(files: Iterable[Path], api: Api) -> list[Touch]:
    """What those of `files` that know TensorRT touch."""
    trees = {file: ast.parse(file.read_text()) for file in files}
    words = {word for tree in trees.values() for word in strings_in(tree)}
    trees = {file: tree for file, tree in trees.items() if names_of_trt(tree)}
    return [touch for file, tree in trees.items() for touch in touches_in(tree, str(file), api, words)]


def touches_in(tree: ast.Module, file: str, api: Api, words: set[str]) -> list[Touch]:
    """`words`: the strings from which a computed `getattr(trt.SomeEnum, name)` may take its name."""
    reader = Reader(file, api, words, names_of_trt(tree))
    reader.visit(tree)
    return reader.touches


def strings_in(tree: ast.Module) -> set[str]:
    return {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


@dataclass
class Scope:
    known: dict[str, Types]
    guards: frozenset[str] = frozenset()


class Reader(ast.NodeVisitor):
    """Walks a file in order; `visit` of an expression returns its `Types`."""

    def __init__(self, file: str, api: Api, words: set[str], aliases: set[str]):
        self.file = file
        self.api = api
        self.words = words
        self.scopes = [Scope(dict.fromkeys(aliases, MODULE_ITSELF))]
        self.touches: list[Touch] = []

    def generic_visit(self, node: ast.AST) -> Types:
        super().generic_visit(node)
        return UNKNOWN

    # Where names get their types -----------------------------------------------------------------

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Types:
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        known = {a.arg: self.instance(a.annotation) for a in arguments}
        # A closure sees what the function around it knows; its own arguments hide the names.
        self.scopes.append(Scope({**self.scopes[-1].known, **known}, guards_in(node)))
        for part in [*node.args.defaults, *filter(None, node.args.kw_defaults), *node.body]:
            self.visit(part)
        self.scopes.pop()
        return UNKNOWN

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> Types:
        self.scopes.append(Scope({**self.scopes[-1].known, **{a.arg: UNKNOWN for a in node.args.args}}))
        self.visit(node.body)
        self.scopes.pop()
        return UNKNOWN

    def visit_ClassDef(self, node: ast.ClassDef) -> Types:
        bases = {t.removeprefix("class ") for b in node.bases for t in self.visit(b) if t.startswith("class ")}
        for base in bases:
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and self.api.member(base, part.name) and part.name[0] != "_":
                    count = len(part.args.args) - 1
                    self.touch(part, frozenset({base}), part.name, Call(count, ()))
        self.scopes.append(Scope(dict(self.scopes[-1].known)))
        for part in node.body:
            self.visit(part)
            if isinstance(part, ast.FunctionDef):
                self.scopes[-1].known |= self.attributes_of_self(part)
        self.scopes.pop()
        return UNKNOWN

    def attributes_of_self(self, method: ast.FunctionDef) -> dict[str, Types]:
        """What `self.x = ...` in a method tells the methods after it."""
        arguments = {a.arg: self.instance(a.annotation) for a in method.args.args}
        quiet = Reader(self.file, self.api, self.words, set())
        quiet.scopes = [Scope({**self.scopes[-1].known, **arguments})]
        for part in method.body:
            quiet.visit(part)
        return {name: types for name, types in quiet.scopes[0].known.items() if name.startswith("self.") and types}

    def visit_Assign(self, node: ast.Assign) -> Types:
        types = self.visit(node.value)
        for target in node.targets:
            self.assign(target, types)
        return UNKNOWN

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Types:
        value = self.visit(node.value) if node.value else UNKNOWN
        self.assign(node.target, self.instance(node.annotation) or value)
        return UNKNOWN

    def visit_NamedExpr(self, node: ast.NamedExpr) -> Types:
        types = self.visit(node.value)
        self.assign(node.target, types)
        return types

    def assign(self, target: ast.expr, types: Types) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            for part in target.elts:
                self.assign(part, UNKNOWN)
            return
        if isinstance(target, ast.Attribute) and target.attr == "__class__":
            self.scopes[-1].known[ast.unparse(target.value)] = frozenset(t.removeprefix("class ") for t in types)
        elif isinstance(target, (ast.Name, ast.Attribute)) and self.visit(target) != MODULE_ITSELF:
            self.scopes[-1].known[ast.unparse(target)] = types

    def instance(self, annotation: ast.expr | None) -> Types:
        """The types of an object annotated so."""
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        types = self.visit(annotation) if annotation is not None else UNKNOWN
        return frozenset(t.removeprefix("class ") for t in types if t.startswith("class "))

    # What expressions touch ----------------------------------------------------------------------

    def visit_Name(self, node: ast.Name) -> Types:
        return self.scopes[-1].known.get(node.id, UNKNOWN)

    def visit_Attribute(self, node: ast.Attribute, call: Call | None = None) -> Types:
        base = self.visit(node.value)
        if base == MODULE_ITSELF and node.attr == "package":  # mmdit_lib.network.trt's own name for it
            return base
        known = self.scopes[-1].known.get(ast.unparse(node), UNKNOWN)
        if base:
            unbound = call and all(t.startswith("class ") and self.is_method(t, node.attr) for t in base)
            call = Call(call.positional - 1, call.keywords) if unbound else call
            return self.touch(node, owners_of(base), node.attr, call) or known
        own = isinstance(node.value, ast.Name) and node.value.id == "self"
        if known or own or node.attr not in self.api.owners:
            return known
        # Of an unknown object, only a name of several words says that it is TensorRT's.
        return self.touch(node, UNKNOWN, node.attr, call if "_" in node.attr.strip("_") else None)

    def visit_Call(self, node: ast.Call) -> Types:
        first = self.visit(node.args[0]) if node.args else UNKNOWN
        for part in [*node.args[1:], *(k.value for k in node.keywords)]:
            self.visit(part)
        if isinstance(node.func, ast.Name) and node.func.id == "getattr":
            return self.visit_getattr(node, first)
        call = call_of(node)
        function = node.func
        found = self.visit_Attribute(function, call) if isinstance(function, ast.Attribute) else self.visit(function)
        results: set[str] = set()
        for kind, name in (t.split(" ") for t in found if " " in t):
            if kind == "class":
                self.touch(node, frozenset({name}), "__init__", call)
                results.add(name)
            else:
                results |= self.api.returned(self.api.member(*name.rsplit(".", 1)))
        return frozenset(results)

    def visit_getattr(self, node: ast.Call, types: Types) -> Types:
        owners, name = owners_of(types), node.args[1]
        if isinstance(name, ast.Constant):
            names = [name.value]
        else:
            names = sorted(w for w in self.words if any(self.api.is_choice(o, w) for o in owners))
        guards = frozenset(names if len(node.args) == 3 else ())
        found = [self.touch(node, owners, n, guards=guards) for n in names] if owners else []
        return frozenset().union(*found)

    def touch(self, node: ast.AST, owners: Types, name: str, call: Call | None = None, guards=frozenset()) -> Types:
        """Note it; returns the types of what was touched."""
        if re.fullmatch("__(?!init__).*__", name):
            return UNKNOWN
        guards = guards.union(*(scope.guards for scope in self.scopes))
        self.touches.append(Touch(f"{self.file}:{node.lineno}", owners, name, guards, call))
        candidates = owners or (self.api.owners.get(name, []) if "_" in name.strip("_") else ())
        return frozenset().union(*(self.types_of(owner, name) for owner in candidates))

    def is_method(self, class_type: str, name: str) -> bool:
        signature = self.api.member(class_type.removeprefix("class "), name)
        return bool(signature) and signature.startswith(f"{name}(")

    def types_of(self, owner: str, name: str) -> Types:
        signature = self.api.member(owner, name)
        if signature is None:
            return UNKNOWN
        if signature == "class":
            return frozenset({f"class {owner}.{name}".replace(" .", " ")})
        if signature.startswith(("value", "(")):
            return frozenset(self.api.returned(signature))
        return frozenset({f"method {owner}.{name}"})


def owners_of(types: Types) -> Types:
    """The classes whose members an object of these types has."""
    names = (MODULE if t == "module" else t.removeprefix("class ") for t in types if not t.startswith("method "))
    return frozenset(names)


def guards_in(function: ast.AST) -> frozenset[str]:
    """The names that a function asks for with `hasattr`."""
    calls = (n for n in ast.walk(function) if isinstance(n, ast.Call) and ast.unparse(n.func) == "hasattr")
    return frozenset(c.args[1].value for c in calls if isinstance(c.args[1], ast.Constant))


def call_of(node: ast.Call) -> Call | None:
    """None where `*` or `**` hide what is passed."""
    if any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords):
        return None
    return Call(len(node.args), tuple(k.arg for k in node.keywords))


# Judging ------------------------------------------------------------------------------------------


def faults(touches: Iterable[Touch], here: Api, there: Api) -> list[str]:
    """A line for each touch that `here` or `there` does not have, or not with the same signature.

    What only one of them has may be touched in a function that asks `hasattr` for something that only
    one of them has: such members come in groups (`set_compute_capability` and its enum).
    """
    apart = one_sided(here, there) | one_sided(there, here)
    found = (fault(touch, here, there, apart) for touch in touches)
    return sorted({line for line in found if line})


def one_sided(here: Api, there: Api) -> set[str]:
    return {name for name, owners in here.owners.items() if any(there.member(o, name) is None for o in owners)}


def fault(touch: Touch, here: Api, there: Api, apart: set[str]) -> str | None:
    if touch.name in touch.guards:
        return None
    owners = sorted(touch.owners) or here.owners.get(touch.name, [])
    if touch.guards & apart and any(api.member(o, touch.name) is not None for api in (here, there) for o in owners):
        return None
    complaints = [complaint(touch, owner, here, there) for owner in owners]
    # An object that may be of several classes is in order if one of them is.
    return None if not complaints or None in complaints else f"{touch.where}: {complaints[0]}"


def complaint(touch: Touch, owner: str, here: Api, there: Api) -> str | None:
    what = f"{owner}.{touch.name}".lstrip(".")
    mine, theirs = here.member(owner, touch.name), there.member(owner, touch.name)
    lacking = [api.name for api, signature in ((here, mine), (there, theirs)) if signature is None]
    if lacking:
        return f"{what} is not in {' and '.join(lacking)}"
    if not set(mine.splitlines()) <= set(theirs.splitlines()):
        return f"{what} differs: {mine!r} in {here.name}, {theirs!r} in {there.name}"
    if touch.call and not any(accepts(line, touch.call) for line in mine.splitlines()):
        return f"{what} does not take {touch.call.positional} arguments, keywords {list(touch.call.keywords)}: {mine}"
    return None


def accepts(signature: str, call: Call) -> bool:
    """Whether a call fits 'f(self: X, a: int, b: int = 1) -> Y'."""
    inside = re.match(r"\w*\((.*)\)", signature)
    if inside is None or "*args" in signature:
        return True
    parameters = [p.strip() for p in split(inside[1])]
    if parameters and re.match(r"(self|arg0)\b", parameters[0]):
        parameters = parameters[1:]
    names = [re.split(r"[:=]", p)[0].strip() for p in parameters]
    required = [name for name, p in zip(names, parameters, strict=True) if "=" not in p]
    given = {*names[: call.positional], *call.keywords}
    return call.positional <= len(names) and set(required) <= given <= set(names)


def split(text: str) -> list[str]:
    """At the commas outside all brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{<") - (character in ")]}>")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [p for p in parts if p.strip()]
