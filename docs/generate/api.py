"""Pages of the API, one per module, and what of it has no docstring. Read from the sources; nothing is imported."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import griffe
from roles import ROLE

PACKAGES = {
    "agents": "order policies, the algorithms that train them, evaluation, the command line",
    "unmask_env": "the decision process and its interfaces",
    "pretrain": "noise processes, objectives, samplers, the training loop of denoisers",
    "tasks": "data and truth: symbols, instances, rewards",
}


@cache
def _packages(root: Path) -> dict[str, griffe.Module]:
    loader = griffe.GriffeLoader(search_paths=[root])
    loaded = {name: loader.load(name, try_relative_path=False) for name in PACKAGES}
    loader.resolve_aliases(external=False)
    return loaded


def _modules(module: griffe.Module) -> Iterator[griffe.Module]:
    """``module`` and those below it, without scripts."""
    yield module
    for name, below in sorted(module.modules.items()):
        if not below.is_alias and not name.startswith(("_", "generate_")):
            yield from _modules(below)


PLAIN = ("ABC", "NamedTuple")  # bases without methods to document


def pages(root: Path) -> dict[str, str]:
    """Text by path: ``api/index.md``, an index per package with its public names, and a page per module."""
    made = {}
    overview = ["# API", "", "Four packages; each imports only from those below it in this list.", ""]
    for name, package in _packages(root).items():
        overview.append(f"- [`{name}`]({name}/index.md): {PACKAGES[name]}")
        inside = [module for module in _modules(package) if module is not package]
        made[f"api/{name}/index.md"] = _index(package, inside)
        for module in inside:
            path = module.path.partition(".")[2]
            made[f"api/{name}/{path}.md"] = f"# {module.path}\n\n::: {module.path}\n"
    return {"api/index.md": "\n".join(overview) + "\n", **made}


def _index(package: griffe.Module, inside: list[griffe.Module]) -> str:
    lines = [f"# {package.path}", "", _text(package), ""]
    public = [name for name in package.exports or [] if isinstance(name, str) and not name.startswith("_")]
    if public:
        lines += [f"What `{package.path}` itself offers:", "", "| name | |", "|---|---|"]
        lines += [f"| {_link(package, name)} | {_first(_found(package, name))} |" for name in public] + [""]
    lines += ["| module | |", "|---|---|"]
    for module in inside:
        lines.append(f"| [`{module.path}`]({module.path.partition('.')[2]}.md) | {_first(module)} |")
    return "\n".join(lines) + "\n"


def _found(package: griffe.Module, name: str) -> griffe.Object | None:
    """What ``name`` of a package's ``__all__`` is; also where it is imported only when it is asked for."""
    member = package.members.get(name)
    if member is not None and member.is_module:  # which has what it is named after
        member = member.members.get(name, member)
    if member is not None:
        return member.final_target if member.is_alias else member
    places = [module.members[name] for module in _modules(package) if name in module.classes]
    return next((place for place in places if not place.is_alias), None)


def _link(package: griffe.Module, name: str) -> str:
    found = _found(package, name)
    return f"`{name}`" if found is None else f"[`{name}`][{found.path}]"


def _text(module: griffe.Object) -> str:
    return module.docstring.value if module.docstring else ""


def _first(module: griffe.Object | None) -> str:
    """The first sentence, for a table."""
    paragraph = "" if module is None else " ".join(_text(module).partition("\n\n")[0].split())
    return ROLE.sub(r"`\1`", paragraph).replace("|", r"\|")


def undocumented(root: Path) -> list[str]:
    """Public modules, classes, functions, methods and properties without a docstring of their own or of a base."""
    missing = []
    for package in _packages(root).values():
        for module in _modules(package):
            missing += [] if module.docstring else [module.path]
            for each in module.members.values():
                if each.name.startswith("_") or each.is_alias or not (each.is_function or each.is_class):
                    continue
                missing += [] if each.docstring else [each.path]
                missing += _methods(each) if each.is_class else []
    return missing


def _methods(kind: griffe.Class) -> list[str]:
    missing = []
    for method in kind.members.values():
        public = not method.name.startswith("_") and not method.is_alias
        if public and (method.is_function or "property" in method.labels) and not method.docstring:
            missing += [] if _inherits(kind, method.name) else [method.path]
    return missing


def _inherits(kind: griffe.Class, name: str) -> bool:
    """Whether a base documents ``name``, or may: bases of other libraries are not read."""
    bases = kind.resolved_bases
    documented = any(name in base.members and base.members[name].docstring for base in bases)
    external = [base for base in kind.bases if str(base) not in PLAIN]
    return len(bases) < len(external) or documented or any(_inherits(base, name) for base in bases)
