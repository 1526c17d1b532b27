"""The app's start: Gradio writes no editor stubs, and is the same otherwise."""

import inspect
import subprocess
import sys


def test_no_component_is_parsed_for_a_stub() -> None:
    program = (
        "import ast, inspect\n"
        "parsed, parse = [], ast.parse\n"
        "def count(source, *args, **more):\n"
        "    parsed.append('class ' in str(source)[:100000])\n"
        "    return parse(source, *args, **more)\n"
        "ast.parse = count\n"
        "from repair.ui.quick_import import without_editor_stubs\n"
        "own = inspect.getfile\n"
        "with without_editor_stubs():\n"
        "    import gradio\n"
        "assert inspect.getfile is own\n"
        "print(sum(parsed), len(gradio.Textbox.EVENTS) > 5, gradio.Textbox('x').value)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert int(found[0]) < 5 and found[1:] == ["True", "x"]


def test_files_are_found_again_afterwards() -> None:
    from repair.ui.quick_import import without_editor_stubs

    with without_editor_stubs():
        assert inspect.getfile(inspect.Signature).endswith("inspect.py")
    assert inspect.getfile(inspect.Signature).endswith("inspect.py")
