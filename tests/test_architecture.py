"""The dependency rules of docs/architecture.md, read from the source."""

import ast
import functools
import graphlib
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lit_gpt"

# A module imports only from its own layer, without cycles, and from the layers before it.
LAYERS = [
    [
        "errors",
        "compat",
        "device",
        "printable",
        "lines",
        "figures",
        "sharding",
        "files",
        "digests",
        "processes",
        "vocabularies",
        "white_space",
        "tokenizer_base",
        "byte_level",
        "library_tokenizer",
        "tokenizer",
    ],
    ["ops"],
    ["kv_cache", "layers", "sampling", "model", "optim"],
    ["data"],
    ["checkpoint"],
    ["inference"],
    ["convert"],
    ["runs"],
    ["planning"],
    ["training"],
    ["cli"],
    ["benchmark"],
]
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}

# Packages that only some modules may import: they are slow to import, or a rule of docs/architecture.md says so.
ONLY_IN = {
    "lightning": ("compat.py", "data/datamodule.py", "training/", "cli/", "benchmark/"),
    "jsonargparse": ("compat.py", "cli/"),
    "transformers": ("benchmark/", "convert/"),
    "litgpt": ("benchmark/",),
}


def module_paths() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@functools.cache
def imported_modules(path: Path) -> set[str]:
    """Every module a file imports, wherever in it, except for type checking."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if is_type_checking(node):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import lit_gpt.…, not a relative module"
            module = node.module or ""
            for alias in node.names:  # `from lit_gpt import ops` imports lit_gpt.ops
                inner = ROOT / module.replace(".", "/") / alias.name
                is_module = inner.with_suffix(".py").exists() or (inner / "__init__.py").exists()
                found.add(f"{module}.{alias.name}" if module.startswith("lit_gpt") and is_module else module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def test_every_module_has_a_layer() -> None:
    assert {name_of(path).split(".")[1] for path in module_paths()} <= LAYER_OF.keys()


@pytest.mark.parametrize("path", module_paths(), ids=name_of)
def test_module_imports_only_from_its_layer_or_earlier_ones(path: Path) -> None:
    own = LAYER_OF[name_of(path).split(".")[1]]
    for imported in imported_modules(path):
        top, *rest = imported.split(".")
        assert top not in ("scripts", "tests"), imported
        if top == "lit_gpt" and rest:
            assert LAYER_OF[rest[0]] <= own, f"{name_of(path)} imports {imported}"


def test_imports_have_no_cycle() -> None:
    names = {name_of(path): path for path in module_paths()}
    graph = {name: {other for other in imported_modules(path) if other in names} for name, path in names.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("path", module_paths(), ids=name_of)
def test_heavy_packages_are_imported_only_where_allowed(path: Path) -> None:
    place = path.relative_to(PACKAGE).as_posix()
    for imported in imported_modules(path):
        allowed = ONLY_IN.get(imported.split(".")[0])
        assert allowed is None or place.startswith(allowed), f"{place} imports {imported}"


@pytest.mark.parametrize("place", ["model.py", "kv_cache.py", "layers.py", "sampling.py", "ops"])
def test_model_and_ops_import_only_torch(place: str) -> None:
    found = PACKAGE / place
    for path in found.rglob("*.py") if found.is_dir() else [found] if found.exists() else []:
        tops = {module.split(".")[0] for module in imported_modules(path)} - set(sys.stdlib_module_names)
        assert tops <= ({"torch", "triton", "lit_gpt"} if place == "ops" else {"torch", "lit_gpt"}), path
        ours = {module for module in imported_modules(path) if module.startswith("lit_gpt")}
        assert all(module.split(".")[1] in ("ops", "kv_cache", "layers", "sampling", "model") for module in ours), path


def test_longest_function_has_at_most_60_lines() -> None:
    for path in module_paths():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                assert lines <= 60, f"{path.name}: {node.name} has {lines} lines"


# Where the package writes to the terminal; the text is constant or `lit_gpt.printable` has made it printable.
PRINTS = {
    "cli/messages.py: print",  # what all commands call
    "cli/interrupts.py: os.write",  # in a signal handler; the name of a signal
    "cli/main.py: os.write",  # a message that ends the process, in one call
    "training/signals.py: os.write",  # in a signal handler; a constant
    "training/stop.py: os.write",  # likewise; the name of a signal
    "training/forecast.py: tqdm.write",
    "training/progress.py: tqdm.write",
    "training/samples.py: tqdm.write",
}


def prints_of(path: Path) -> set[str]:
    """What a file calls or passes on to write to stdout or stderr, as in PRINTS."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name) and node.id in ("print", "pprint"):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and node.attr in ("write", "writelines", "buffer"):
            owner = ast.unparse(node.value)
            if owner in ("os", "tqdm", "sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__"):
                found.add(f"{owner}.{node.attr}")
        elif isinstance(node, ast.Attribute) and node.attr in ("print_exc", "print_exception", "print_stack"):
            found.add(f"{ast.unparse(node.value)}.{node.attr}")
    return {f"{path.relative_to(PACKAGE).as_posix()}: {name}" for name in found}


def test_only_the_listed_functions_print() -> None:
    """Whoever adds a line here makes sure that no value in the text can control the terminal."""
    assert set().union(*map(prints_of, module_paths())) == PRINTS


# ------------------------------------------------------------------------- private attributes of other libraries


DOCUMENTED = ("_exit",)  # os._exit is public


@functools.cache
def own_private_names() -> set[str]:
    """The names with one leading underscore that this package defines or assigns, anywhere."""
    names: set[str] = set()
    for path in module_paths():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                owner = node.value
                names |= {node.attr} if isinstance(owner, ast.Name) and owner.id == "self" else set()
    return names


def foreign_private_names(path: Path) -> Iterator[str]:
    """Private attributes and imports in a file that this package does not define itself."""
    own = own_private_names()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # getattr(trainer, "_name")
            names = [node.value] if node.value.isidentifier() else []
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lit_gpt"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        for name in names:
            if name.startswith("_") and not name.startswith("__") and name not in {"_", *DOCUMENTED, *own}:
                yield f"line {node.lineno}: {name}"


def overridden_private_names(path: Path) -> Iterator[str]:
    """Private attributes of other libraries' classes that a class of ours replaces."""
    module, source = importlib.import_module(name_of(path)), path.read_text(encoding="utf-8")
    for _, cls in inspect.getmembers(module, inspect.isclass):
        if cls.__module__ != module.__name__:
            continue
        for name in vars(cls):
            if name.startswith("_") and not name.startswith("__") and name in source:
                for base in cls.__mro__[1:]:
                    if not base.__module__.startswith("lit_gpt") and name in vars(base):
                        yield f"{cls.__name__}.{name} overrides {base.__module__}.{base.__name__}"


@pytest.mark.parametrize("path", module_paths(), ids=name_of)
def test_private_attributes_of_other_libraries_stay_in_compat(path: Path) -> None:
    if path == PACKAGE / "ops" / "softmax_kernel.py":
        pytest.importorskip("triton", reason="Triton comes with PyTorch for GPUs")
    if path != PACKAGE / "compat.py":
        assert [*foreign_private_names(path), *overridden_private_names(path)] == []


# --------------------------------------------------------------------------------------------- the package itself


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = (
        "import sys, lit_gpt; lit_gpt.__version__; print(sorted({'torch', 'lightning', 'numpy'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


DYNAMO = {"torch._dynamo", "lightning"}
SLOW = {"torch.distributed.checkpoint", "pyarrow", "ray", "transformers", "chardet"}


# Lightning itself imports torch._dynamo; a worker that prepares batches and generate.py do without both. One process
# imports all three one after another: what a later one may not import, no earlier one may.
NOT_IMPORTED = {
    "cli.generate": {*SLOW, *DYNAMO},
    "data.batches": {*SLOW, "torch._dynamo"},
    "cli.main": SLOW - {"transformers"},  # where it is installed, torchmetrics imports it
}


def test_modules_do_not_import_what_few_runs_need() -> None:
    program = "import importlib, sys\n" + "\n".join(
        f"importlib.import_module('lit_gpt.{module}'); print('{module}', sorted({slow} & set(sys.modules)))"
        for module, slow in NOT_IMPORTED.items()
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == [f"{module} []" for module in NOT_IMPORTED]


def test_every_public_name_can_be_imported() -> None:
    import lit_gpt

    for name in lit_gpt.__all__:
        assert getattr(lit_gpt, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        lit_gpt.nothing  # noqa: B018
