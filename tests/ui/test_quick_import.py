"""The app's start: Gradio writes no editor stubs, and is the same otherwise."""

import inspect
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_no_component_is_parsed_for_a_stub_when_the_app_starts() -> None:
    program = (
        "import ast, inspect, runpy, sys\n"
        "parsed, parse = [], ast.parse\n"
        "def count(source, *args, **more):\n"
        "    parsed.append('class ' in str(source)[:100000])\n"
        "    return parse(source, *args, **more)\n"
        "ast.parse = count\n"
        "own = inspect.getfile\n"
        "sys.argv = ['app.py', '--help']\n"
        "try:\n"
        "    runpy.run_path('app.py', run_name='__main__')\n"
        "except SystemExit:\n"
        "    pass\n"
        "assert inspect.getfile is own\n"
        "import gradio\n"
        "print()\n"
        "print(sum(parsed), len(gradio.Textbox.EVENTS) > 5, gradio.Textbox('x').value)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    found = ended.stdout.splitlines()[-1].split()
    assert int(found[0]) < 5 and found[1:] == ["True", "x"]


def test_files_are_found_again_afterwards() -> None:
    from repair.ui.quick_import import without_editor_stubs

    with without_editor_stubs():
        assert inspect.getfile(inspect.Signature).endswith("inspect.py")
    assert inspect.getfile(inspect.Signature).endswith("inspect.py")
