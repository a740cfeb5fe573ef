"""The package as a whole: what importing it does, its public names, and who imports whom."""

import ast
import configparser
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cifarflow

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cifarflow"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}

# The floors, bottom up: each with the others it may import.  Whatever is not here is forbidden;
# inside a floor modules may import each other, in no circle.
FLOORS = {
    "errors": set(),
    "lazy": set(),
    "device": {"lazy"},
    "files": {"errors"},
    "untrusted": {"errors"},
    "data": {"errors", "lazy", "device", "files", "untrusted"},
    "models": {"errors", "device"},
    "optimizers": {"errors", "device"},
    "training.step": {"errors", "models", "optimizers"},
    "evaluation": {"errors", "untrusted", "models"},
    "training": {"errors", "device", "files", "untrusted", "data", "training.step"},
    "recipes": {
        "errors",
        "untrusted",
        "device",
        "data",
        "models",
        "optimizers",
        "training.step",
        "evaluation",
        "training",
    },
    "classifier": {"errors", "untrusted", "models", "evaluation", "recipes"},
    "export": {"errors", "untrusted", "data", "evaluation", "recipes", "classifier"},
    "trials": {
        "errors",
        "data",
        "training.step",
        "evaluation",
        "training",
        "recipes",
    },
    "ensemble": {
        "errors",
        "device",
        "files",
        "data",
        "evaluation",
        "training",
        "recipes",
        "trials",
    },
    "replay": {"errors", "device", "training.step", "training", "recipes"},
    "sweeps": {"errors", "files", "untrusted", "data", "evaluation", "training", "recipes"},
    "reporting": {"errors", "files", "untrusted", "data", "evaluation", "training", "recipes"},
    "cli": {"errors", "untrusted", "device", "data", "training", "recipes", "reporting"},
    "doctor": {"errors", "lazy", "device", "data", "models", "optimizers", "recipes", "training"},
    "commands": {
        "errors",
        "untrusted",
        "data",
        "evaluation",
        "training",
        "recipes",
        "replay",
        "reporting",
        "cli",
        "doctor",
    },
    "__main__": {"cli"},
}


def floor_of(module):
    parts = module.split(".")[1:]
    return "training.step" if parts == ["training", "step"] else parts[0]


def imports_of(path):
    """All modules that a file imports anywhere, inside functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & set(MODULES)) or {node.module}
    return found


IMPORTS = {module: imports_of(path) for module, path in MODULES.items()}


def test_importing_is_silent_and_light():
    code = (
        "import sys, cifarflow; "
        "heavy = {'tensorflow', 'keras', 'matplotlib', 'tensorflow_datasets', 'absl', 'rich'}; "
        "sys.exit(' '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_public_names_resolve():
    assert cifarflow.__all__ == sorted(set(cifarflow.__all__))
    for name in cifarflow.__all__:
        value = getattr(cifarflow, name)
        assert value is getattr(importlib.import_module(f"cifarflow.{cifarflow._HOME[name]}"), name)
        assert name in dir(cifarflow)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        cifarflow.nothing  # noqa: B018


def test_type_checkers_see_the_same_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    seen = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for line in node.body:
                module = line.module.removeprefix("cifarflow.")
                seen[module] = tuple(alias.name for alias in line.names)
    assert seen == cifarflow._MODULES


def test_every_module_has_a_floor():
    assert {floor_of(module) for module in MODULES} == set(FLOORS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    floor = floor_of(module)
    ours = {name for name in IMPORTS[module] if name.split(".")[0] == "cifarflow"}
    # The package's own __init__ is for its users: inside it would be a way round.
    assert ours <= set(MODULES), f"{module} imports {sorted(ours - set(MODULES))}"
    wrong = {name for name in ours if floor_of(name) not in FLOORS[floor] | {floor}}
    assert not wrong, f"{module} must not import {sorted(wrong)}"


def test_the_floors_have_an_order():
    below = set()
    for floor, allowed in FLOORS.items():
        assert allowed <= below, f"{floor} may import {allowed - below}, which is not below it"
        below.add(floor)


def test_no_circles():
    done = set()

    def visit(module, path):
        assert module not in path, f"a circle: {' -> '.join([*path, module])}"
        if module not in done:
            for name in sorted(IMPORTS[module] & set(MODULES)):
                visit(name, [*path, module])
            done.add(module)

    for module in MODULES:
        visit(module, [])


def test_nobody_imports_the_runners():
    for module, names in IMPORTS.items():
        tops = {name.split(".")[0] for name in names}
        assert not tops & {"examples", "benchmarks", "tests"}, module


def test_plotting_stays_in_reporting():
    users = {m for m, names in IMPORTS.items() if any(n.startswith("matplotlib") for n in names)}
    assert users
    assert {floor_of(module) for module in users} == {"reporting"}
    assert not any("tensorflow_datasets" in names for names in IMPORTS.values())


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_has_a_docstring(module):
    tree = ast.parse(MODULES[module].read_text())
    assert ast.get_docstring(tree), module
    definitions = [(node, "") for node in tree.body]
    for node, where in definitions:
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        if isinstance(node, kinds) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{module}: {where}{node.name}"
            if isinstance(node, ast.ClassDef):
                definitions += [(inner, f"{node.name}.") for inner in node.body]


def test_nothing_is_said_twice():
    setup, pyproject = configparser.ConfigParser(), (ROOT / "pyproject.toml").read_text()
    setup.read(ROOT / "setup.cfg")
    assert setup["metadata"]["version"] == "attr: cifarflow.__version__"
    assert not re.search(r"^\[project", pyproject, re.MULTILINE)
    # Settings of tools are in pyproject.toml alone, metadata in setup.cfg alone.
    assert {name.split(".")[0] for name in setup.sections()} == {"metadata", "options"}
    for name in ("README.md", "setup.cfg", "pyproject.toml"):
        path = ROOT / name
        if path.exists():
            assert f'"{cifarflow.__version__}"' not in path.read_text(), name
    assert (PACKAGE / "py.typed").exists()
    assert re.fullmatch(r"\d+\.\d+\.\d+", cifarflow.__version__)


def test_the_readme_example_runs(tmp_path, monkeypatch, capsys):
    from cifarflow.data.dataset import load_data

    small = load_data("standin").limit(128)
    monkeypatch.setattr(cifarflow, "load_data", lambda: small, raising=False)
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    exec(compile(code, "README.md", "exec"), {})
    assert "'split': 'validation'" in capsys.readouterr().out
    assert (tmp_path / "some.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["README.md", "benchmarks/README.md"])
def test_links_lead_somewhere(name):
    def anchors(path):
        headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
        plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
        return {heading.replace(" ", "-") for heading in plain}

    page = ROOT / name
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    assert links
