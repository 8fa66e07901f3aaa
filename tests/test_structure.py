"""The shape of the project, read from its source: who imports whom, how long things are."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(ROOT.glob("*.py"))
TREES = {path.stem: ast.parse(path.read_text()) for path in SOURCES}
NAMES = sorted(TREES)

MAX_FILE, MAX_FUNCTION = 600, 70  # lines

# Each part may import from parts further up only.
LAYERS = [
    {"render", "libero_tasks", "camera", "page", "processes", "unpack"},
    {"instructions", "errors"},
    {"view"},
    {"vlm"},
    {"tasks", "doctor"},
    {"libero_expert"},
    {"libero_env"},
    {"vecenv"},
    {"demos"},
    {"resume"},
    {"fit", "hub"},
    {"pretrained", "kinematics", "album", "recordings"},
    {"policy", "formats", "latents"},
    {"export"},
    {"simulator", "reflector"},
    {"worldenv", "ppo", "films"},
    {"dreams", "novelty", "checkpoints"},
    {"gauge"},
    {"evaluate"},
    {"branches", "charts"},
    {"runs"},
    {"order"},
    {"beside", "train"},
    {"pipeline"},
    {"summary", "report", "bench_report"},
    {"screening", "trust", "compare", "overview", "game", "bench", "ship"},
    {"play"},
    {"options", "estimates"},
    {"demos_cli"},
    {"cli"},
]


def imported(name: str) -> set[str]:
    """The project's modules that a module imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found & set(NAMES)


def imported_names(name: str, module: str) -> set[str]:
    """What `name` takes from `module` by `from module import ...`."""
    return {
        alias.name
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.ImportFrom) and node.module == module
        for alias in node.names
    }


def reachable(name: str) -> set[str]:
    """Every module of the project that is loaded, directly or not, when `name` is."""
    seen, queue = set(), [name]
    while queue:
        for other in imported(queue.pop()) - seen:
            seen.add(other)
            queue.append(other)
    return seen


# ------------------------------------------------------------------------------------------ imports


def test_imports_form_no_cycle():
    """No module needs itself, along any path."""
    for name in NAMES:
        assert name not in reachable(name), f"{name} imports itself by way of {imported(name)}"


def test_known_modules_import_downwards_only():
    """A module imports from lower layers, never from its own or a higher one."""
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    for name in NAMES:
        for other in imported(name):
            if name in level and other in level:
                assert level[other] < level[name], f"{name} must not import {other}"


@pytest.mark.parametrize(
    "name, allowed",
    [
        ("render", set()),
        ("tasks", {"render", "instructions", "libero_tasks", "camera"}),
        ("vecenv", {"tasks", "libero_env", "libero_tasks", "render", "camera", "processes"}),
        ("demos", {"tasks", "camera", "processes"}),
        ("recordings", {"demos"}),
        ("formats", {"recordings", "demos", "tasks"}),
        ("export", {"formats", "recordings", "demos", "tasks"}),
        ("page", set()),
        ("resume", {"processes", "demos"}),
        ("fit", {"processes", "resume"}),
        ("hub", set()),
        ("pretrained", {"tasks", "fit", "hub", "vlm"}),
        ("policy", {"processes", "tasks", "fit", "instructions", "view", "vlm", "pretrained"}),
        ("kinematics", {"tasks"}),
        ("album", {"tasks"}),
        ("latents", {"fit", "hub", "pretrained"}),
        (
            "simulator",
            {"processes", "tasks", "fit", "camera", "view", "kinematics", "album", "latents"},
        ),
        (
            "reflector",
            {"processes", "tasks", "fit", "policy", "instructions", "view", "vlm", "pretrained"},
        ),
        ("ppo", {"processes", "tasks", "policy", "fit", "vlm", "resume"}),
        (
            "worldenv",
            {"processes", "tasks", "vlm", "simulator", "reflector", "instructions", "kinematics"},
        ),
    ],
)
def test_parts_know_only_what_they_must(name, allowed):
    """Simulator and reflector do not know each other; PPO does not know if it plays in a dream."""
    assert imported(name) <= allowed


def test_the_world_receives_its_parts():
    """worldenv takes helpers, no class: simulator and reflector are handed in, not built."""
    assert imported_names("worldenv", "policy") <= {"tokenize"}
    assert imported_names("worldenv", "simulator") <= {"memory_indices"}


def test_the_command_line_is_on_top():
    """Nothing imports cli."""
    assert all("cli" not in imported(name) for name in NAMES)


@pytest.mark.parametrize("name", ["render", "tasks", "libero_env", "vecenv", "doctor"])
def test_workers_stay_small(name):
    """What a worker process loads brings in neither torch nor the libraries of the models."""
    heavy = {"torch", "transformers", "diffusers", "tokenizers", "sklearn"}
    for module in {name} | reachable(name):
        for node in TREES[module].body:  # imports inside functions wait until they are needed
            roots = set()
            if isinstance(node, ast.Import):
                roots = {alias.name.split(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                roots = {(node.module or "").split(".")[0]}
            assert not roots & heavy, f"{module} imports {roots & heavy}"


# -------------------------------------------------------------------------------------------- sizes


def functions(name: str) -> list[ast.FunctionDef]:
    """Every function and method of a module, nested ones included."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return [node for node in ast.walk(TREES[name]) if isinstance(node, kinds)]


@pytest.mark.parametrize("name", NAMES)
def test_files_stay_readable(name):
    """No file above 600 lines."""
    length = len((ROOT / f"{name}.py").read_text().splitlines())
    assert length <= MAX_FILE, f"{name}.py has {length} lines"


@pytest.mark.parametrize("name", NAMES)
def test_functions_stay_readable(name):
    """No function above 70 lines."""
    for function in functions(name):
        lines = function.end_lineno - function.lineno + 1
        assert lines <= MAX_FUNCTION, f"{name}.{function.name} has {lines} lines"


@pytest.mark.parametrize("name", NAMES)
def test_public_things_are_explained(name):
    """Every module, and every public function and class in it, has a docstring."""
    tree = TREES[name]
    assert ast.get_docstring(tree), f"{name}.py has no docstring"
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    silent = [
        node.name
        for node in tree.body
        if isinstance(node, kinds) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert not silent, f"{name}.py: no docstring in {', '.join(silent)}"


@pytest.mark.parametrize("name", NAMES)
def test_errors_are_never_swallowed(name):
    """No bare `except:`, and no `except Exception: pass`."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{name}.py:{node.lineno} catches everything"
            broad = isinstance(node.type, ast.Name) and node.type.id in (
                "Exception",
                "BaseException",
            )
            silent = all(isinstance(statement, ast.Pass) for statement in node.body)
            assert not (broad and silent), f"{name}.py:{node.lineno} swallows every error"
