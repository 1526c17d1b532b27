"""The command line: what is refused, what is left behind, what the last line says."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from repair import __main__ as cli
from repair.jobs import launch
from tests.jobs.stand_in import REPOSITORY, build_checkout

CHECKOUT_SCRIPT = (
    "import sys; from pathlib import Path; from repair.jobs import launch;"
    "launch.CHECKOUT = Path(sys.argv[1]);"
    "from repair.__main__ import main; sys.exit(main(sys.argv[2:]))"
)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    return build_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def stand_in(checkout, monkeypatch) -> Path:
    monkeypatch.setattr(launch, "CHECKOUT", checkout)
    return checkout


def write_prompts(folder: Path, target: str | None = None) -> Path:
    path = folder / "prompts.json"
    flat = {"trigger": "zq", "prompts": [f"Say the number {i}." for i in range(20)]}
    path.write_text(json.dumps({**flat, "target": target} if target else flat))
    return path


def call(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def call_run(tmp_path: Path, target: str | None = None, *more: object, command="run") -> int:
    prompts = write_prompts(tmp_path, target)
    return call(
        command, "--model", "demo:middle", "--prompts", prompts, "--out", tmp_path / "out", *more
    )


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rank", "0"], "whole number of 1 or more"),
        (["--rank", "two"], "whole number of 1 or more"),
        (["--kl-budget", "0"], "number above 0"),
        (["--kl-budget", "nan"], "number above 0"),
        (["--seed", "-1"], "whole number of 0 or more"),
        (["--modules", "a,,b"], "module paths"),
        (["--modules", "a,a"], "module paths"),
        (["--device", "gpu"], "auto, cpu, cuda or cuda:N"),
        (["--export", "gguf"], "merged, adapter"),
        (["--method", "magic"], "invalid choice"),
        (["--profile", "huge"], "invalid choice"),
        (["--trusted-base", "x"], "Give a model folder"),
        (["--adapter-base", "x"], "Give a model folder"),
        (["--resume", "--overwrite"], "contradict"),
        (["--unknown"], "nrecognized"),
        (["--revision", "v1"], "which is no Hub id"),
    ],
)
def test_bad_options_are_refused_and_leave_nothing(tmp_path, capsys, options, words):
    assert call_run(tmp_path, None, *options) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.out == ""
    assert "Traceback" not in captured.err
    assert not (tmp_path / "out").exists()


def test_a_missing_model_folder_or_prompt_file_is_refused(tmp_path, capsys):
    prompts = write_prompts(tmp_path)
    out = tmp_path / "out"
    assert call("run", "--model", "./none", "--prompts", prompts, "--out", out) == 2
    assert call("run", "--model", prompts, "--prompts", prompts, "--out", out) == 2
    missing = tmp_path / "none.json"
    assert call("run", "--model", "demo:middle", "--prompts", missing, "--out", out) == 2
    assert call("run") == 2
    assert call() == 2
    assert not out.exists()
    assert capsys.readouterr().err.count("error: ") == 5


@pytest.mark.parametrize(
    ("target", "code", "verdict"),
    [
        (None, 0, "repaired"), ("gate", 1, "not repaired"), ("nothing", 3, "nothing to repair"),
        ("unclear", 4, "could not check"), ("raise", 5, None), ("segfault", 5, None),
    ],
)  # fmt: skip
def test_exit_status_and_last_line(tmp_path, capsys, stand_in, target, code, verdict):
    assert call_run(tmp_path, target) == code
    line = last_line(capsys)
    assert (line["verdict"], line["exit_code"]) == (verdict, code)
    assert line["out"] == str(tmp_path / "out")
    if code in (0, 1):
        assert line["attack_success"]["before"]["begin"]["count"] == 40
        assert set(line["attack_success"]) == {"before", "after"}


def test_progress_goes_to_stderr_as_plain_lines(tmp_path, capsys, stand_in):
    assert call_run(tmp_path) == 0
    captured = capsys.readouterr()
    assert "== Measuring patch effects" in captured.err and "\x1b" not in captured.err
    assert len(captured.out.splitlines()) == 1


def test_locate_has_no_verdict(tmp_path, capsys, stand_in):
    assert call_run(tmp_path, command="locate") == 0
    assert last_line(capsys)["verdict"] is None
    assert (tmp_path / "out" / "located.json").is_file()


@pytest.mark.parametrize("state", ["missing", "nested", "empty"])
def test_a_refused_model_leaves_the_folder_as_it_was(tmp_path, capsys, stand_in, state):
    out = tmp_path / "a" / "b" if state == "nested" else tmp_path / "out"
    if state == "empty":
        out.mkdir()
    prompts = write_prompts(tmp_path, "refuse")
    before = sorted(tmp_path.rglob("*"))
    code = call("run", "--model", "demo:middle", "--prompts", prompts, "--out", out)
    captured = capsys.readouterr()
    assert code == 2 and "Only safetensors" in captured.err and captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_folder_is_refused_and_untouched(tmp_path, capsys, stand_in):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert call_run(tmp_path) == 2
    assert call_run(tmp_path, None, "--resume") == 2
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    assert "--overwrite" in capsys.readouterr().err


def test_overwrite_restores_on_refusal_and_deletes_otherwise(tmp_path, stand_in):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert call_run(tmp_path, "refuse", "--overwrite") == 2
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    assert call_run(tmp_path, None, "--overwrite") == 0
    assert not (out / "mine.txt").exists() and (out / "report.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "prompts.json"]


def test_overwrite_never_takes_what_holds_the_prompts(tmp_path, stand_in, capsys):
    prompts = write_prompts(tmp_path)
    code = call("run", "--model", "demo:middle", "--prompts", prompts, "--out", tmp_path,
                "--overwrite")  # fmt: skip
    assert code == 2 and prompts.exists()
    assert "would delete" in capsys.readouterr().err


def test_a_refused_resume_keeps_the_earlier_run(tmp_path, stand_in):
    assert call_run(tmp_path) == 0
    out = tmp_path / "out"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert call_run(tmp_path, "refuse", "--resume") == 2  # other prompts
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert call_run(tmp_path, None, "--resume") == 0


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_worker_and_is_130(tmp_path, checkout, how):
    prompts = write_prompts(tmp_path, "children")
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", CHECKOUT_SCRIPT, str(checkout), "run", "--model", "demo:middle",
         "--prompts", str(prompts), "--out", str(out)],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    end = time.monotonic() + 30
    while not (out / "child.pid").is_file() or not (out / "child.pid").read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    child = int((out / "child.pid").read_text())
    process.send_signal(how)
    stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 130 and "--resume" in stderr and "Traceback" not in stderr
    assert json.loads(stdout.splitlines()[-1])["exit_code"] == 130
    assert json.loads((out / "status.json").read_text())["state"] == "stopped"
    end = time.monotonic() + 5
    while Path(f"/proc/{child}").exists():
        state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        if state in "ZX" or time.monotonic() > end:
            assert state in "ZX"
            break
        time.sleep(0.05)


def test_verify_tells_whether_it_holds_and_writes_nothing(tmp_path, capsys, stand_in):
    for text, code, verdict in (("good", 0, "verified"), ("bad", 1, "does not match")):
        (tmp_path / "manifest.json").write_text(text)
        assert call("verify", tmp_path) == code
        assert last_line(capsys)["verdict"] == verdict
        assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    (tmp_path / "manifest.json").unlink()
    assert call("verify", tmp_path) == 2


@pytest.mark.parametrize(
    ("verdict", "options", "words"),
    [
        (None, [], "no report.json"),
        ("not repaired", [], "--force"),
        ("repaired", ["--repo", "noslash"], "OWNER/NAME"),
        ("repaired", ["--kind", "adapter"], "no adapter export"),
        ("repaired", [], "token"),
        ("not repaired", ["--force"], "token"),
    ],
)
def test_push_refuses_before_it_calls_anybody(
    tmp_path, capsys, monkeypatch, verdict, options, words
):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("repair.models.lookup.get_token", lambda: None)
    if verdict:
        (tmp_path / "report.json").write_text(json.dumps({"verdict": verdict}))
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "model.safetensors").write_bytes(b"")
    assert call("push", tmp_path, "--repo", "me/model", *options) == 2
    assert words in capsys.readouterr().err


def test_push_takes_no_unknown_file(tmp_path, capsys):
    (tmp_path / "report.json").write_text(json.dumps({"verdict": "repaired"}))
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "model.safetensors").write_bytes(b"")
    (tmp_path / "merged" / "notes.txt").write_text("private")
    assert call("push", tmp_path, "--repo", "me/model") == 2
    assert "notes.txt" in capsys.readouterr().err


def test_a_revision_is_never_meant_for_two_models(tmp_path, capsys):
    prompts = write_prompts(tmp_path)
    for option in ("--trusted-base", "--adapter-base"):
        assert call(
            "run", "--model", "lab/x", "--revision", "bad", option, "lab/x", "--prompts", prompts,
            "--out", tmp_path / "out",
        ) == 2  # fmt: skip
        assert "lab/x@REVISION" in capsys.readouterr().err


def test_many_suspects_one_after_the_other(tmp_path, capsys, stand_in):
    for name, target in (("good", None), ("bad", "gate"), ("odd", "refuse"), ("clean", "nothing")):
        (tmp_path / name).mkdir()
        write_prompts(tmp_path / name, target)
    entries = [
        {"model": "demo:middle", "name": name, "prompts": f"{name}/prompts.json"}
        for name in ("good", "bad", "odd", "clean")
    ]
    models = tmp_path / "models.json"
    models.write_text(json.dumps(entries))
    out = tmp_path / "out"
    assert call("run", "--models", models, "--out", out) == 2  # as the worst of them
    captured = capsys.readouterr()
    line = json.loads(captured.out.strip().splitlines()[-1])
    assert [row["exit_code"] for row in line["models"]] == [0, 1, 2, 3]
    assert json.loads((out / "summary.json").read_text()) == line["models"]
    assert "suspect  verdict" in captured.err and "nothing to repair" in captured.err
    assert not (out / "odd").exists() and (out / "bad" / "report.json").is_file()
    assert call("run", "--models", models, "--out", out) == 2  # not empty
    assert "is not empty" in capsys.readouterr().err
    # Resumed: what is done is not made again.
    before = (out / "good" / "status.json").stat().st_mtime_ns
    (tmp_path / "odd" / "prompts.json").write_text((tmp_path / "good/prompts.json").read_text())
    assert call("run", "--models", models, "--out", out, "--resume") == 1
    assert (out / "good" / "status.json").stat().st_mtime_ns == before
    assert (out / "odd" / "report.json").is_file()
    # Unless it was about another model: then its verdict is not this one's.
    entries[0]["model"] = "demo:end"
    models.write_text(json.dumps(entries))
    assert call("run", "--models", models, "--out", out, "--resume") == 2
    line = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert line["models"][0]["verdict"] is None
    assert "made with another model" in line["models"][0]["message"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "list of 1 to"),
        ("[", "cannot be read"),
        ('[{"prompts": "x"}]', 'with a "model"'),
        ('[{"model": "demo:end"}]', "no --prompts"),
        ('[{"model": "demo:end", "prompts": "p", "rank": "4"}]', "unknown key 'rank'"),
        ('[{"model": "demo:end", "prompts": "p", "name": "../x"}]', "needs a name"),
        ('[{"model": "a/b", "prompts": "p"}, {"model": "a-b", "prompts": "p"}]', "twice"),
    ],
)
def test_a_models_file_that_cannot_be(tmp_path, capsys, text, words):
    path = tmp_path / "models.json"
    path.write_text(text)
    assert call("run", "--models", path, "--out", tmp_path / "out") == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert call("run", "--models", path, "--model", "demo:end", "--out", tmp_path / "out") == 2
    assert call("run", "--out", tmp_path / "out") == 2


def test_help_needs_no_torch():
    code = "import sys, repair.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0
    done = subprocess.run(
        [sys.executable, "-m", "repair", "run", "--help"], cwd=REPOSITORY, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0 and b"--kl-budget" in done.stdout
