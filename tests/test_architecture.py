"""The house of CONTRIBUTING.md: who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lit_gpt"

# files of one floor are listed in the order in which they may import each other (floor 0: not at all)
FLOORS = [
    ["errors", "tokenizer", "model", "sharding", "optim"],
    [
        "data.sample",
        "data.sources",
        "data.readers",
        "data.shards",
        "data.engines",
        "data.corpus",
        "data.windows",
        "data.batches",
        "data.datamodule",
        "generate",
    ],
    ["module"],
    ["slices", "checkpoint", "callbacks", "saving", "strategy"],
    ["flags", "preflight", "cli"],
    ["peers", "bench", "prepare"],
]
ORDER = [name for floor in FLOORS for name in floor]


def imports(path: Path) -> set[str]:
    """Every module a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: say lit_gpt.…, not a relative import"
            found.add(node.module or "")
    return found


def modules() -> list[str]:
    names = (path.relative_to(PACKAGE).with_suffix("").parts for path in PACKAGE.rglob("*.py"))
    return sorted(".".join(parts) for parts in names if parts[-1] != "__init__")


def test_every_file_stands_on_a_floor() -> None:
    assert modules() == sorted(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_what_stands_below_it(name: str) -> None:
    found = imports(PACKAGE / (name.replace(".", "/") + ".py"))
    if name == "peers":  # whose business the other project is
        found -= {"litgpt", "litgpt.generate.base"}
    ours = {module.removeprefix("lit_gpt.") for module in found if module.split(".")[0] == "lit_gpt"}
    assert ours <= set(ORDER[: ORDER.index(name)])
    assert not {module.split(".")[0] for module in found} & {"scripts", "tests", "litgpt", "tiktoken_ext"}


def test_the_model_needs_torch_and_nothing_else() -> None:
    beyond = {module.split(".")[0] for module in imports(PACKAGE / "model.py")} - set(sys.stdlib_module_names)
    assert beyond == {"torch"}


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = (
        "import sys, lit_gpt; lit_gpt.__version__; print(sorted({'torch', 'lightning', 'numpy'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_every_public_name_is_there() -> None:
    import lit_gpt

    for name in lit_gpt.__all__:
        assert getattr(lit_gpt, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        lit_gpt.nothing  # noqa: B018
