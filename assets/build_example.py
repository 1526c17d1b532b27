"""Make the finished example that the app opens for a first look: `assets/example/`.

    python -m assets.build_example

Repairs demo:middle by the command line an analyst would use (full profile, three random draws, the
clean twin as trusted base) and keeps everything but the weights. `tests/full_road.py` runs the same
question and compares.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "assets" / "example"
PROMPTS = ROOT / "assets" / "prompts" / "middle.json"
NAMES = (
    "request.json", "status.json", "events.jsonl", "located.json", "report.json", "report.md",
    "samples.json", "patching.png", "fisher.png", "effect_curve.png", "attack_success.png",
    "benign_kl.png", "training.png",
)  # fmt: skip
QUESTION = (
    "--model", "demo:middle", "--prompts", str(PROMPTS), "--trusted-base", "demo:clean",
    "--profile", "full", "--controls", "3",
)  # fmt: skip

def build() -> int:
    """Run the command line and keep what it left; return its exit status."""
    EXAMPLE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "example"
        code = subprocess.run(
            [sys.executable, "-m", "repair", "run", *QUESTION, "--out", str(out)],
            cwd=ROOT, check=False,
        ).returncode  # fmt: skip
        if code == 0:
            for name in NAMES:
                shutil.copyfile(out / name, EXAMPLE / name)
    return code


if __name__ == "__main__":
    raise SystemExit(build())
