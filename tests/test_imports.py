"""The corridor of rooms is one-way, the web process is free of torch, and some calls are banned.

Everything is read from the syntax tree, so that a word in a comment is no offence.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FILES = sorted([*REPOSITORY.glob("repair/**/*.py"), REPOSITORY / "app.py"])
EVERYTHING = sorted([*FILES, *REPOSITORY.glob("assets/**/*.py"), *REPOSITORY.glob("tests/**/*.py")])
# From right to left: a room may import itself and what stands before it.
ROOMS = (
    "records", "prompts", "models", "locate", "lowrank", "evidence", "publish", "pipeline", "jobs",
    "ui",
)  # fmt: skip
# Files at the top level that belong to a room.
ROOM_OF_FILE = {
    "prompt_formats": "prompts", "prompt_checks": "prompts", "__main__": "ui", "batch": "ui",
    "options": "ui", "machine": "records", "limits": "records", "json_size": "records",
    "case": "pipeline",
    "profiles": "records", "needs": "records", "needs_step": "pipeline",
    "locate_file": "pipeline", "locate_step": "pipeline", "outcome": "pipeline", "plan": "pipeline",
    "repair_step": "pipeline", "evidence_step": "pipeline", "ask_step": "pipeline",
}  # fmt: skip
HOMES = {
    "gradio": ("repair/ui/",),
    "matplotlib": ("repair/evidence/plots.py",),
    "peft": ("repair/lowrank/adapter.py", "repair/models/loading.py", "repair/publish/export.py",
             "repair/publish/reopen.py"),
    "huggingface_hub": ("repair/models/download.py", "repair/models/lookup.py",
                        "repair/publish/hub.py"),
}  # fmt: skip
BANNED_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "tarfile"}
SPIES = ("tests/models/test_staging.py",)  # names a banned module, to see that it is never called
BANNED_CALLS = {
    "torch.load", "eval", "exec", "os.system", "os.popen", "gradio.load", "gradio.FileExplorer",
    "gradio.Chatbot", "gradio.DeepLinkButton", "shutil.unpack_archive", "csv.writer",
    "csv.DictWriter", "subprocess.getoutput", "numpy.load", "tempfile.mktemp", "__import__",
}  # fmt: skip


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def read_imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} uses a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(dotted: str) -> str | None:
    """Return the room of `repair.ROOM...`; None for the package itself and foreign code."""
    parts = dotted.split(".")
    if parts[0] != "repair" or len(parts) < 2:
        return None
    return ROOM_OF_FILE.get(parts[1], parts[1])


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_imports_only_from_its_own_room_and_those_to_the_right(path):
    own = room_of(name_of(path).removesuffix(".py").replace("/", "."))
    if own is None or own == "__init__":
        own = "ui"
    assert own in ROOMS, f"{name_of(path)} is in no room: add it to ROOM_OF_FILE"
    for dotted in read_imports(path):
        room = room_of(dotted)
        if room is not None:
            assert room in ROOMS, f"{name_of(path)} imports {dotted}"
            assert ROOMS.index(room) <= ROOMS.index(own), f"{name_of(path)} imports {dotted}"
            is_worker = name_of(path) == "repair/jobs/worker.py"
            assert room != "pipeline" or own == "pipeline" or is_worker


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_big_libraries_live_where_they_belong(path):
    for dotted in read_imports(path):
        homes = HOMES.get(dotted.split(".")[0])
        if homes is not None:
            assert name_of(path).startswith(homes), f"{name_of(path)} imports {dotted}"


def dotted_name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def read_origins(tree: ast.AST) -> dict[str, str]:
    """Return local name -> what it was imported as: `t` of `import torch as t` is `torch`."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                found[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}"
                      for alias in node.names}  # fmt: skip
    return found


def offences(source: str, name: str) -> list[int]:
    """Return the lines of a file that use what is banned, whatever it is called there."""
    tree = ast.parse(source)
    origins = read_origins(tree)

    def named(node: ast.AST) -> str:
        head, dot, rest = dotted_name(node).partition(".")
        return f"{origins.get(head, head)}{dot}{rest}"

    found = []
    for node in ast.walk(tree):
        is_bad = False
        if isinstance(node, ast.Name | ast.Attribute):  # also uncalled: f = torch.load
            what = named(node)
            is_bad = what in BANNED_CALLS or what.endswith(".to_csv")
        if isinstance(node, ast.Import | ast.ImportFrom):
            is_bad = bool(BANNED_CALLS & {
                f"{getattr(node, 'module', '')}.{alias.name}" for alias in node.names
            })  # fmt: skip
        if isinstance(node, ast.Call):
            called = named(node.func)
            # Outside a Space this button would let every visitor in as the machine's owner.
            is_bad |= called == "gradio.LoginButton" and name != "repair/ui/app.py"
            is_bad |= called == "gradio.HTML" and name != "repair/ui/grid.py"
            words = {ast.unparse(word).strip("'") for word in node.args}
            is_bad |= (
                called.endswith(("import_module", "__import__")) and name not in SPIES
                and bool(words & BANNED_MODULES)
            )  # fmt: skip
            if called == "zipfile.ZipFile":
                is_bad |= not (isinstance(node.args[1], ast.Constant) and node.args[1].value == "w")
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                banned = ("share", "shell", "mcp_server", "use_auth_token")
                is_bad |= keyword.arg in banned and bool(value)
                is_bad |= keyword.arg == "trust_remote_code" and value is not False
                is_bad |= keyword.arg == "datatype" and value not in ("str", None)
        if is_bad:
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", EVERYTHING, ids=name_of)
def test_forbidden_calls(path):
    """The whole tree: no pickle, no code of a model, no shell, no archive opened, no CSV written.

    GHSA-j36p-7w88-g82j (FileExplorer), CVE-2026-28416 (gr.load), CVE-2026-27167 (LoginButton),
    CVE-2025-4330, CVE-2025-4138, CVE-2025-4517, CVE-2026-11940 (tarfile).
    """
    if name_of(path) not in SPIES:
        assert not {name.split(".")[0] for name in read_imports(path)} & BANNED_MODULES
    assert offences(path.read_text(encoding="utf-8"), name_of(path)) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch as t\nt.load(x)", "import torch\nf = torch.load", "from torch import load",
        "from gradio import HTML\nHTML('x')", "import gradio as g\ng.LoginButton()",
        "eval(x)", "from os import system as s", "import numpy as np\nnp.load(x)",
        "f(trust_remote_code=True)", "f(trust_remote_code=given)", "run(x, shell=True)",
        "import zipfile as z\nz.ZipFile(x, 'r')",
        "from importlib import import_module as i\ni('pickle')",
    ],
)  # fmt: skip
def test_a_forbidden_call_is_found_by_any_name(source):
    assert offences(source, "repair/other.py")
    assert not offences("import torch\nmodel.eval()\nmodel.load(x)", "repair/other.py")


def test_the_list_of_forbidden_calls_covers_every_file():
    """A new folder of code must be looked at too."""
    folders = {path.parent.name for path in REPOSITORY.glob("[!.]*/*.py")}
    assert folders == {"repair", "assets", "tests"}
    assert {path.name for path in REPOSITORY.glob("*.py")} == {"app.py"}


@pytest.mark.parametrize("module", ["repair.ui.app", "repair.__main__", "app", "repair.prompts"])
def test_the_web_process_and_the_command_line_load_no_torch(module):
    code = (
        f"import sys, {module};"
        "found = {'torch', 'transformers', 'peft', 'matplotlib'} & set(sys.modules);"
        "sys.exit(','.join(found) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
