"""The gate under mutated files: a typed refusal or a model, within time and memory, or a defect.

Run as a process, which a hostile file may end: `python -m tests.hostile.fuzzing FOLDER SEED COUNT
SECONDS` prints one JSON line a case. Inputs that reach a line of `repair/models` that no input
before them reached are kept and mutated further. What was tried last lies in FOLDER/model, and
what was a defect in FOLDER/defects, so that whoever started the process can keep it.
"""

import json
import random
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from repair.models.answers import generate_answers
from repair.models.loading import LoadedModel, check_ids, load_model
from repair.models.tokens import check_length, encode
from repair.records import RepairError
from tests.hostile.mutations import Files, mutate
from tests.hostile.watching import OpenWatch
from tests.tiny import build_tiny, make_tiny_llama, make_tokenizer

MODELS = str(Path(__file__).resolve().parents[2] / "repair" / "models")
TYPES = ("llama", "gpt2", "gemma2", "mixtral", "phi3", "gpt_neox", "opt", "qwen3_moe")
CASE_SECONDS = 5.0  # of CPU time, for one input
EXTRA_BYTES = 512 * 2**20  # beyond what the process holds before the first input


def read_files(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def make_bases(folder: Path) -> list[Files]:
    """Return whole models of several architectures, and one in shards with an index."""
    bases = []
    for name in TYPES:
        build_tiny(name).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
        bases.append(read_files(folder / name))
    bases.append(read_files(make_tiny_llama(folder / "shards", max_shard_size="40KB")))
    return bases


def resident_data() -> int:
    """Return the bytes of private writable memory that the process holds."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmData")


def use(loaded: LoadedModel) -> None:
    """Do with a model that passed the gate what every job does first."""
    for use_template in {False, loaded.has_template}:
        prompt = encode(loaded.tokenizer, "write a list", use_template=use_template)
        check_ids(loaded, prompt)
        limit = loaded.model.config.max_position_embeddings
        check_length([prompt], num_new_tokens=2, limit=limit)
        generate_answers(loaded, [prompt], num_new_tokens=2)


class Fuzzer:
    """One process's run: the kept inputs, the lines seen, and the folder it works in."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.draw = folder, random.Random(seed)
        self.kept = make_bases(folder / "bases")
        self.other = folder / "other"
        self.other.mkdir()
        for name, raw in self.kept[0].items():
            (self.other / name).write_bytes(raw)
        self.watch = OpenWatch(self.other)
        self.lines: set[tuple[str, int]] = set()
        self.number = 0

    def _trace(self, frame: FrameType, event: str, argument: Any):
        if not frame.f_code.co_filename.startswith(MODELS):
            return None
        self.fresh.add((frame.f_code.co_filename, frame.f_lineno))
        return self._trace

    def run_one(self) -> dict[str, Any]:
        """Mutate one input, try it, and say what came of it."""
        files = mutate(self.draw.choice(self.kept), self.draw)
        model, stage = self.folder / "model", self.folder / "stage"
        for path in (model, stage):
            shutil.rmtree(path, ignore_errors=True)
        model.mkdir()
        outside = str(self.other / "model.safetensors").encode()
        for name, raw in files.items():
            (model / name).write_bytes(raw.replace(b"/elsewhere/model.safetensors", outside))
        self.watch.opened()
        self.fresh: set[tuple[str, int]] = set()
        began = time.process_time()
        sys.settrace(self._trace)
        try:
            use(load_model(str(model), stage_folder=stage, device="cpu"))
            kind, words = "model", ""
        except RepairError as error:
            kind, words = "refused", str(error)
        except KeyboardInterrupt:
            raise
        except BaseException:  # Whatever it is: that is the question.
            kind, words = "defect", traceback.format_exc()[-3000:]
        finally:
            sys.settrace(None)
        seconds = time.process_time() - began
        if opened := self.watch.opened():
            kind, words = "defect", f"read outside the folder: {opened}"
        if seconds > CASE_SECONDS:
            kind, words = "defect", f"took {seconds:.1f} s of CPU time; {words}"
        if kind == "refused" and not words.isprintable():
            kind, words = "defect", f"a refusal that is not printable: {ascii(words)}"
        if kind == "defect":
            shutil.copytree(model, self.folder / "defects" / str(self.number))
        self.number += 1
        if self.fresh - self.lines:
            self.lines |= self.fresh
            self.kept.append(files)
        return {"kind": kind, "words": ascii(words), "seconds": round(seconds, 3),
                "lines": len(self.lines), "kept": len(self.kept)}  # fmt: skip


def run(folder: Path, seed: int, count: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield what came of each input until `count` were tried or the time is up."""
    fuzzer = Fuzzer(folder, seed)
    limit = resident_data() + EXTRA_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    end = time.monotonic() + seconds
    for _ in range(count):
        if time.monotonic() > end:
            return
        yield fuzzer.run_one()


if __name__ == "__main__":
    arguments = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    for found in run(*arguments):
        print(json.dumps(found), flush=True)
