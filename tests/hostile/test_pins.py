"""The pinned packages are no older than the advisories that `repair` rests on ask for.

This is no audit: it knows the advisories below and no others. `python -m tests.bench.audit` asks
the package index, which the suite does not do.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.bench.audit import main, read_pins

REPOSITORY = Path(__file__).resolve().parents[2]
PINNED = dict(read_pins((REPOSITORY / "requirements.txt").read_text()))
AT_LEAST = {
    "torch": ("2.11", "CVE-2025-32434, CVE-2026-24747, CVE-2026-4538"),
    "transformers": ("5.5.0", "CVE-2026-4372, CVE-2026-5241, CVE-2026-1839"),
    "Jinja2": ("3.1.6", "CVE-2024-56326, CVE-2024-56201, CVE-2025-27516"),
    "safetensors": ("0.8.0", "atomic writes"),
    "peft": ("0.21.2", "peft#3085: lists of what may be imported"),
    "huggingface-hub": ("2.4.0", "names that lead out of the folder"),
    "gradio": ("6.22.0", "CVE-2026-27167, CVE-2026-28415, CVE-2026-59806, gradio#13687"),
    "starlette": ("1.0.1", "CVE-2025-62727, CVE-2025-54121, CVE-2024-47874"),
}


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


@pytest.mark.parametrize("name", AT_LEAST)
def test_a_package_has_the_fixes_that_are_relied_on(name: str) -> None:
    least, why = AT_LEAST[name]
    assert numbers(PINNED[name]) >= numbers(least), why


def test_no_package_that_fetches_or_runs_code_of_a_model_is_there() -> None:
    """Case 8: without `kernels` no configuration can have one fetched; CVE-2026-68770 is of
    sentence-transformers."""
    assert not {"kernels", "sentence-transformers", "gguf"} & {name.lower() for name in PINNED}


INDEX = {
    "/good/1.0/json": [],
    "/good/json": ["X-1"],  # of 2.0, which is not what is pinned
    "/bad/1.0/json": ["X-2"],
    "/old/json": [],
    "/new/json": [],
}


@pytest.fixture
def index():
    """A package index: `good` and `bad` have pages for a release, `old` and `new` do not."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            ids = INDEX.get(self.path)
            self.send_response(404 if ids is None else 200)
            self.end_headers()
            newest = "1.0" if self.path == "/new/json" else "2.0"
            flat = {"info": {"version": newest}, "vulnerabilities": [{"id": i} for i in ids or ()]}
            self.wfile.write(b"" if ids is None else json.dumps(flat).encode())

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("names", "status", "words"),
    [
        (["good", "new"], 0, "2 without a known vulnerability, 0 with, 0 unchecked"),
        (["good", "bad", "old"], 1, "bad 1.0: X-2"),
        (["good", "old"], 3, "old 1.0: could not be checked (newest: 2.0)"),
        (["gone"], 3, "0 without a known vulnerability, 0 with, 1 unchecked"),
    ],
)
def test_an_audit_tells_clean_from_not_checked(
    index: str, tmp_path: Path, capsys, names: list[str], status: int, words: str
) -> None:
    file = tmp_path / "pins.txt"
    file.write_text("# pins\n" + "".join(f"{name}==1.0\n" for name in names))
    assert main([str(file), "--index", index]) == status
    assert words in capsys.readouterr().out


def test_an_index_out_of_reach_leaves_everything_unchecked(tmp_path: Path, capsys) -> None:
    file = tmp_path / "pins.txt"
    file.write_text("good==1.0\n")
    assert main([str(file), "--index", "http://127.0.0.1:9"]) == 3
    assert "0 without a known vulnerability, 0 with, 1 unchecked" in capsys.readouterr().out


def test_every_package_is_pinned() -> None:
    for name in ("requirements.txt", "tests/requirements.txt"):
        assert read_pins((REPOSITORY / name).read_text())
    with pytest.raises(ValueError, match="not pinned"):
        read_pins("torch>=2\n")


def test_a_space_installs_the_gradio_that_is_pinned() -> None:
    front = (REPOSITORY / "README.md").read_text(encoding="utf-8").split("---")[1]
    assert f"sdk_version: {PINNED['gradio']}\n" in front
