"""The import table of ARCHITECTURE.md, enforced on every module: imports point down and never sideways between wings.

Imports inside functions count like those at the top; imports under `if TYPE_CHECKING` do not. A rule names rooms; a room may always
import itself, and every room may import `core`. Third-party packages have rules of their own below.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"
PACKAGE = SOURCE / "penstock"

ANYTHING = "*"
KERNEL_ROOMS = ("execution.kernels", "execution.parallel")
BELOW_LAYERS = (*KERNEL_ROOMS, "execution.attention", "execution.quantization")
ENGINE_BOUNDARY = ("engine.step", "engine.executor")

# room → rooms and modules that it may import besides core and itself. The longest matching room decides.
RULES: dict[str, tuple[str, ...]] = {
    "core": (),
    "telemetry": (),
    "engine": ("telemetry",),
    "execution": (),
    "execution.kernels": (),
    "execution.parallel": ("execution.kernels",),
    "execution.attention": ("execution.kernels",),
    "execution.quantization": KERNEL_ROOMS,
    "execution.layers": BELOW_LAYERS,
    "execution.models": ("execution.layers", "execution.parallel", "execution.quantization", "execution.kernels"),
    # The registry is where a model meets its attention backend: it picks the backend that the layers are built with.
    "execution.models.registry": (*BELOW_LAYERS, "execution.layers", "execution.models"),
    # It hands the caches of the attention backend to C++.
    "execution.models.native_decoder": (*BELOW_LAYERS, "execution.layers", "execution.models"),
    "execution.sampling": ("execution.kernels",),
    "execution.speculative": ("execution.models", "execution.attention", "execution.sampling", "execution.kernels"),
    "execution.runner": ("execution", *ENGINE_BOUNDARY),
    "serving": (),
    "serving.frontend": ("telemetry",),
    "serving.gateway": ("telemetry", "serving.frontend.client"),
    "serving.cluster": ("telemetry", "serving.frontend.client"),
    "serving.webui": (),
    "workbench": ("llm",),
    "workbench.planner": ("llm", "engine"),
    # What the fakes and builders stand in for.
    "testing": ("telemetry", "engine", "execution", "serving"),
    "hub": (),
    "launch": (ANYTHING,),
    "launch_gateway": (ANYTHING,),
    "launch_worker": (ANYTHING,),
    "llm": (ANYTHING,),
    "cli": (ANYTHING,),
    # `from penstock import LLM, SamplingParams`, resolved when asked for.
    "": ("llm",),
}

# Nothing in these rooms may import torch or transformers, not even inside a function.
TORCH_FREE = ("core", "telemetry", "engine", "serving", "hub")
# Packages that only these rooms may import, even inside a function.
RESTRICTED = {
    "transformers": ("cli", "workbench", "testing"),
    "fastapi": ("serving.gateway", "launch", "testing"),
    "starlette": ("serving.gateway", "launch", "testing"),
    "uvicorn": ("serving.gateway", "launch", "testing"),
    "prometheus_client": ("telemetry", "serving.gateway", "launch"),
    "zmq": ("core.transport",),
    "click": ("cli", "workbench"),
}
# Packages that are not installed with the engine: outside these rooms they are imported only inside functions.
LAZY = {
    "zmq": (),
    "fastapi": ("serving.gateway", "testing"),
    "starlette": ("serving.gateway", "testing"),
    "uvicorn": ("serving.gateway", "testing"),
    "prometheus_client": ("serving.gateway",),
    "httpx": ("workbench", "serving.cluster", "testing"),
    "transformers": (),
}


@dataclass(frozen=True)
class Import:
    """`name` is the full dotted name of what is imported; `lazy` when it is inside a function."""

    module: str
    name: str
    line: int
    lazy: bool

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.name}"


def module_name(path: Path) -> str:
    """Dotted name below penstock: "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node: ast.If) -> bool:
    test = node.test
    return getattr(test, "id", getattr(test, "attr", "")) == "TYPE_CHECKING"


def walk_imports(node: ast.AST, lazy: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, lazy
        elif isinstance(child, ast.If) and is_type_checking(child):
            yield from walk_imports(ast.Module(child.orelse, []), lazy)
        else:
            yield from walk_imports(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def imports_of(module: str, source: str) -> list[Import]:
    """Every import of a module; `from penstock.a import b` is penstock.a.b when that is a module, else penstock.a."""
    found = []
    for node, lazy in walk_imports(ast.parse(source), lazy=False):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
            base = node.module or ""
            names = [f"{base}.{alias.name}" if is_module(f"{base}.{alias.name}") else base for alias in node.names]
        found += [Import(module, name, node.lineno, lazy) for name in dict.fromkeys(names)]
    return found


def is_module(name: str) -> bool:
    path = SOURCE / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or path.is_dir()


def inside(name: str, rooms: tuple[str, ...]) -> bool:
    return any(room in (ANYTHING, name) or name.startswith(f"{room}.") for room in rooms)


def rule_of(module: str) -> tuple[str, tuple[str, ...]]:
    """The longest room of RULES that holds the module, and what it may import."""
    room = module
    while room not in RULES:
        assert "." in room, f"{module} is in no room of the import table"
        room = room.rpartition(".")[0]
    return room, RULES[room]


ALL_IMPORTS = [
    entry for path in sorted(PACKAGE.rglob("*.py")) for entry in imports_of(module_name(path), path.read_text())
]


def test_every_form_of_import_is_seen() -> None:
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import torch
else:
    import numpy
try:
    import zmq
except ImportError:
    pass
class A:
    def f(self):
        from penstock.engine import step
        from penstock.core.types import SamplingParams
"""
    found = [(entry.name, entry.lazy) for entry in imports_of("x", source)]
    assert found == [
        ("typing", False),
        ("numpy", False),
        ("zmq", False),
        ("penstock.engine.step", True),
        ("penstock.core.types", True),
    ]


def test_a_room_decides_by_its_longest_name() -> None:
    assert rule_of("execution.models.llama")[0] == "execution.models"
    assert rule_of("execution.models.registry")[0] == "execution.models.registry"
    assert rule_of("engine.process")[0] == "engine"
    assert inside("engine.step", ENGINE_BOUNDARY)
    assert not inside("engine.steps", ENGINE_BOUNDARY)
    assert not inside("engine.scheduler", rule_of("execution.runner.batch")[1])


def test_the_table_covers_the_rooms_that_exist() -> None:
    modules = {entry.module for entry in ALL_IMPORTS}
    assert {"core", "engine", "execution", "serving", "cli"} <= {module.partition(".")[0] for module in modules}
    for path in PACKAGE.rglob("*.py"):
        rule_of(module_name(path))


def test_imports_between_rooms_follow_the_table() -> None:
    wrong = []
    for entry in ALL_IMPORTS:
        if entry.name != "penstock" and not entry.name.startswith("penstock."):
            continue
        target = entry.name.removeprefix("penstock").removeprefix(".")
        room, allowed = rule_of(entry.module)
        if target and not inside(target, (room, "core", *allowed)) and not (room == "" and target == "core"):
            wrong.append(str(entry))
    assert wrong == []


def test_core_imports_only_core() -> None:
    wrong = [
        str(entry)
        for entry in ALL_IMPORTS
        if inside(entry.module, ("core",)) and entry.name.startswith("penstock") and "penstock.core" not in entry.name
    ]
    assert wrong == []


def test_torch_free_rooms_never_import_torch() -> None:
    wrong = [
        str(entry)
        for entry in ALL_IMPORTS
        if inside(entry.module, TORCH_FREE) and inside(entry.name, ("torch", "transformers", "safetensors.torch"))
    ]
    assert wrong == []


@pytest.mark.parametrize("package", RESTRICTED)
def test_packages_stay_in_their_rooms(package: str) -> None:
    wrong = [
        str(entry)
        for entry in ALL_IMPORTS
        if inside(entry.name, (package,)) and not inside(entry.module, RESTRICTED[package])
    ]
    assert wrong == []


@pytest.mark.parametrize("package", LAZY)
def test_optional_packages_are_imported_inside_functions(package: str) -> None:
    wrong = [
        str(entry)
        for entry in ALL_IMPORTS
        if inside(entry.name, (package,)) and not entry.lazy and not inside(entry.module, LAZY[package])
    ]
    assert wrong == []


def test_composition_root_imports_lazily() -> None:
    """`penstock --help` and `import penstock` load neither torch nor a server."""
    heavy = ("torch", "transformers", "numpy", "penstock.execution", "penstock.engine", "penstock.serving.gateway")
    # The module behind a command is imported when the command runs; what stays light is the way to it.
    light = (
        "cli.main",
        "cli.app",
        "cli.options",
        "cli.serve",
        "cli.chat",
        "cli.generate",
        "cli.pull",
        "cli.doctor",
        "",
    )
    wrong = [
        str(entry)
        for entry in ALL_IMPORTS
        if not entry.lazy
        and inside(entry.name, heavy)
        and (entry.module in light or inside(entry.module, ("launch", "launch_gateway", "launch_worker", "llm")))
    ]
    assert wrong == []


def loaded_after(statement: str, *packages: str) -> list[str]:
    """Those of `packages` that a fresh interpreter has loaded after `statement`."""
    code = f"{statement}\nimport sys\nprint(*[p for p in {packages!r} if p in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return result.stdout.split()


def test_gateway_loads_without_torch() -> None:
    assert loaded_after("import penstock.serving.gateway.app", "torch", "transformers", "numpy") == []


def test_engine_loads_without_torch() -> None:
    assert loaded_after("import penstock.engine.engine", "torch", "transformers", "zmq", "fastapi") == []


def test_execution_loads_without_transformers() -> None:
    statement = "import penstock.execution.models.registry, penstock.execution.sampling.sampler"
    assert loaded_after(statement, "transformers", "fastapi", "zmq") == []


def test_package_and_command_line_load_without_torch() -> None:
    packages = ("torch", "transformers", "numpy", "fastapi", "zmq", "httpx")
    assert loaded_after("import penstock, penstock.cli.app, penstock.cli.serve", *packages) == []
