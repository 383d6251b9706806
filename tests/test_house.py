"""The rooms of the repository: which imports which, how long a file may be, and that it installs as a package."""

import ast
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from lines import ONCE

pytestmark = ONCE
ROOT = Path(__file__).parent.parent
HUB = sorted(path.stem for path in ROOT.glob("*_dpvr.py"))
GROUND = ("minibench", "dpvr.record", "dpvr.command_line")
# Every room may import from those before it; rooms of one floor may not import each other.
FLOORS = (
    GROUND,
    ("hub",),
    ("dpvr", "dpvr.data", "dpvr.push"),
    ("dpvr.analysis",),
    ("dpvr.inference",),
    ("dpvr.training",),
    ("app", "train_sft", "dpvr.benchmarks", "dpvr.pretraining", "dpvr.lmms_eval", "dpvr.serving"),
    ("dpvr.reports",),
)
MAX_LINES = 450


def sources() -> dict[str, Path]:
    """{module: file} of everything outside tests."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("dpvr/**/*.py"), *ROOT.glob("minibench/**/*.py")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}
    return dict(sorted(names.items()))


SOURCES = sources()


def imports(module: str) -> set[str]:
    """The project's modules that a module imports, at its top or inside a function."""
    found = set()
    package = module if SOURCES[module].stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(SOURCES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            home = ".".join(part for part in (package if node.level else "", node.module or "") if part)
            found |= {home, *(f"{home}.{alias.name}" for alias in node.names)}
    return (found & SOURCES.keys()) - {module, "dpvr", "minibench"}


def room(module: str) -> str:
    if module in HUB:
        return "hub"
    known = [name for floor in FLOORS for name in floor]
    return max((name for name in known if module == name or module.startswith(f"{name}.")), key=len)


def floor(module: str) -> int:
    return next(index for index, names in enumerate(FLOORS) if room(module) in names)


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_down_to_lower_floors_or_stay_in_the_room(module):
    for other in imports(module):
        assert room(other) == room(module) or floor(other) < floor(module), f"{module} imports {other}"


def test_no_module_imports_itself_through_others():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(imports(module)):
                visit(other, (*path, module))
            done.add(module)

    for module in SOURCES:
        visit(module, ())


def test_a_file_is_short_enough_to_be_read_as_a_story():
    long = {
        module: lines for module, path in SOURCES.items() if (lines := len(path.read_text().split("\n"))) > MAX_LINES
    }
    assert not long


def test_what_the_hub_gets_is_what_the_model_imports_and_lies_at_the_root():
    project = (ROOT / "pyproject.toml").read_text()
    assert all(f'"{name}"' in project for name in HUB)
    model = imports("modeling_dpvr") | {"modeling_dpvr"}
    assert {name for each in model for name in imports(each)} <= model, "the Hub's loader fetches direct imports alone"


def test_installed_from_another_folder_it_is_imported_by_its_name(tmp_path):
    """In an environment of its own, which has the libraries of this one and not the repository."""
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE", "dpvr", "minibench", *HUB):
        source = next(path for path in (ROOT / name, ROOT / f"{name}.py") if path.exists())
        (tmp_path / "copy").mkdir(exist_ok=True)
        subprocess.run(["cp", "-r", str(source), str(tmp_path / "copy")], check=True)
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", str(tmp_path / "copy")]
    subprocess.run(pip, cwd=tmp_path, check=True)
    code = (
        "import dpvr, adapter_dpvr, minibench.export; from dpvr import DpvrConfig; from pathlib import Path; "
        "assert DpvrConfig is adapter_dpvr.DpvrConfig; print(dpvr.__file__); "
        "print(*sorted(p.name for p in (Path(dpvr.__file__).parent / 'lmms_eval/tasks/minibench').iterdir()))"
    )
    result = subprocess.run([str(python), "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    home, tasks = result.stdout.splitlines()
    assert home.startswith(str(site)) and "_every_task" in tasks.split()
