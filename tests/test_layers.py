"""Imports point down, primitives do not know each other, files and functions stay short: read from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "peft_kernels"
NAME = "peft_kernels"

LAYERS = (
    ("_core", "formats"),
    ("reference", "configs"),
    ("triton_impl",),
    ("op",),
    ("autograd",),
    ("nn",),
    ("methods",),
    ("interop", "memory"),
    ("__init__", "__main__"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FILE_LINES, FUNCTION_LINES, TRITON_LINES, NATIVE_LINES = 250, 50, 80, 500


def layer(module: str) -> int:
    """Rank of a module given as a dotted name below the package, such as "kernels.lora_linear.op"."""
    parts = module.split(".") if module else ["__init__"]
    if parts[0] != "kernels":
        return RANK[parts[0]]
    if len(parts) < 3:  # a primitive's __init__ holds a docstring; importing it is importing nothing
        return RANK["_core"]
    if parts[1] == "_shared":  # Triton code that primitives share lies below their triton_impl
        return RANK["reference"]
    # Other files of a primitive: triton_* are parts of its Triton layer, all else is what those stand on.
    return RANK.get(parts[2], RANK["triton_impl" if parts[2].startswith("triton") else "configs"])


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(root: Path) -> set[str]:
    return {module_name(path, root) for path in root.rglob("*.py")}


def _targets(node: ast.stmt, module: str, is_package: bool, known: set[str]) -> list[str]:
    """The package's own modules that an import statement names, as dotted names below the package."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = module.split(".") if module else []
            up = node.level - 1 if is_package else node.level
            kept = parts[: len(parts) - up] if up else parts
            base = ".".join([NAME, *kept] + ([base] if base else []))
        names = [f"{base}.{alias.name}" for alias in node.names]
    else:
        return []
    inside = [name.removeprefix(NAME).removeprefix(".") for name in names if f"{name}.".startswith(f"{NAME}.")]
    return [name if name in known else name.rpartition(".")[0] for name in inside]


def _belongs_together(module: str, target: str) -> bool:
    """Files of one layer may use each other only inside one folder: a primitive's Triton files, nn, _core."""
    depth = 2 if module.startswith("kernels.") else 1
    return module.split(".")[:depth] == target.split(".")[:depth]


def _fault(module: str, target: str) -> str | None:
    own, other = module.split("."), target.split(".")
    in_kernels = own[0] == "kernels" and other[0] == "kernels" and len(own) > 2 and len(other) > 1
    if in_kernels and other[1] not in (own[1], "_shared"):
        return "primitives import each other"
    if layer(target) > layer(module):
        return "upward"
    if layer(target) == layer(module) and not _belongs_together(module, target):
        return "sideways"
    return None


def import_faults(root: Path) -> list[str]:
    known, faults = modules(root), []
    for path in sorted(root.rglob("*.py")):
        module, tree = module_name(path, root), ast.parse(path.read_text())
        is_package = path.name == "__init__.py"
        inner = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for node in ast.walk(function)
        }
        for node in ast.walk(tree):
            for target in _targets(node, module, is_package, known):
                fault = "inside a function" if id(node) in inner else _fault(module, target)
                if fault is not None:
                    faults.append(f"{path.relative_to(root)}:{node.lineno} imports {target or NAME}: {fault}")
    return faults


def _is_triton(function: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def size_faults(root: Path) -> list[str]:
    faults = []
    for path in sorted(root.rglob("*.py")):
        text = path.read_text()
        if (lines := len(text.splitlines())) > FILE_LINES:
            faults.append(f"{path.relative_to(root)}: {lines} lines, over {FILE_LINES}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                limit = TRITON_LINES if _is_triton(node) else FUNCTION_LINES
                if (lines := node.end_lineno - node.lineno + 1) > limit:
                    faults.append(f"{path.relative_to(root)}:{node.lineno} {node.name}: {lines} lines, over {limit}")
    return faults


def native_size_faults(root: Path) -> list[str]:
    sources = [path for end in ("cpp", "cu", "h", "cuh") for path in root.rglob(f"*.{end}")]
    counts = {path: len(path.read_text().splitlines()) for path in sorted(sources)}
    return [
        f"{path.relative_to(root)}: {n} lines, over {NATIVE_LINES}" for path, n in counts.items() if n > NATIVE_LINES
    ]


def test_imports_point_down():
    assert import_faults(PACKAGE) == []


@pytest.mark.parametrize("tree", ["peft_kernels", "tests", "benchmarks"])
def test_python_stays_short(tree):
    assert size_faults(ROOT / tree) == []


def test_native_code_stays_short():
    assert native_size_faults(ROOT / "csrc") == []


@pytest.mark.parametrize(
    ("path", "line", "fault"),
    [
        ("_core/registry.py", "from ..kernels.toy import op", "upward"),
        ("kernels/toy/reference.py", "from .op import x", "upward"),
        ("kernels/toy/op.py", "from peft_kernels.nn.layer import Layer", "upward"),
        ("kernels/toy/op.py", "import peft_kernels.kernels.toy.autograd", "upward"),
        ("kernels/toy/op.py", "from peft_kernels import Layer", "upward"),
        ("nn/layer.py", "from ..methods import inject", "upward"),
        ("kernels/toy/op.py", "from ..other import reference", "primitives import each other"),
        ("kernels/toy/op.py", "from ..other.reference import x", "primitives import each other"),
        ("interop/peft.py", "from ..memory import model", "sideways"),
        ("nn/layer.py", "def f():\n    from ..kernels.toy import autograd", "inside a function"),
        ("interop/__init__.py", "from .. import memory", "sideways"),
        ("nn/layer.py", "from ..kernels.toy import autograd", None),
        ("nn/__init__.py", "from .layer import Layer", None),
        ("kernels/toy/op.py", "from ..._core.registry import define\nfrom . import reference, triton_impl", None),
        ("kernels/toy/triton_impl.py", "from .._shared import tiles\nfrom . import configs", None),
        ("__init__.py", "from .nn.layer import Layer\nfrom .interop import peft", None),
    ],
)
def test_planted_imports_are_seen(tmp_path, path, line, fault):
    tree = ["__init__", "_core/__init__", "_core/registry", "nn/__init__", "nn/layer", "methods/__init__"]
    tree += ["methods/inject", "interop/__init__", "interop/peft", "memory/__init__", "memory/model"]
    tree += [f"kernels/{p}/{f}" for p in ("toy", "other") for f in ("__init__", "reference", "op", "autograd")]
    tree += ["kernels/__init__", "kernels/toy/triton_impl", "kernels/toy/configs", "kernels/_shared/tiles"]
    for name in tree:
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    (tmp_path / path).write_text(line + "\n")
    found = import_faults(tmp_path)
    assert [f.rpartition(": ")[2] for f in found] == ([] if fault is None else [fault])


def test_planted_lengths_are_seen(tmp_path):
    body = "\n".join(["    pass"] * FUNCTION_LINES)
    (tmp_path / "long.py").write_text(f"def plain():\n{body}\n\n\n@triton.jit\ndef kernel():\n{body}\n" + "\n" * 200)
    found = size_faults(tmp_path)
    assert len(found) == 2 and "over 250" in found[0] and "plain: 51 lines" in found[1]
