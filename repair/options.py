"""The options of `python -m repair`: what may be typed, and the words for what may not."""

import argparse
from pathlib import Path
from typing import NoReturn

from repair.records import RepairError

EXPORT_KINDS = ("merged", "adapter")


class Parser(argparse.ArgumentParser):
    """Ends with the contract's exit status and one readable sentence."""

    def error(self, message: str) -> NoReturn:
        raise RepairError(f"{message[:1].upper()}{message[1:]}. Try: {self.prog} --help")


def positive(text: str) -> int:
    """Return a whole number from 1 on."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return number


def from_zero(text: str) -> int:
    """Return a whole number from 0 on."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def nats(text: str) -> float:
    """Return a positive, finite number."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def modules(text: str) -> str | int | list[str]:
    """Return `auto`, a number of modules, or a list of module paths."""
    if text == "auto":
        return text
    if text.isascii() and text.isdigit():
        return positive(text)
    paths = [path.strip() for path in text.split(",")]
    if not all(paths) or len(set(paths)) != len(paths):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not auto, a number, or different module paths with commas between"
        )
    return paths


def device(text: str) -> str:
    """Return a device name that is accepted."""
    kind, _, index = text.partition(":")
    is_indexed = kind == "cuda" and index.isascii() and index.isdigit()
    if text in ("auto", "cpu", "cuda") or is_indexed:
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is not auto, cpu, cuda or cuda:N")


def export_kinds(text: str) -> list[str]:
    """Return the kinds of export; none of them for `none`."""
    kinds = [] if text == "none" else [kind.strip() for kind in text.split(",")]
    if any(kind not in EXPORT_KINDS for kind in kinds) or len(set(kinds)) != len(kinds):
        raise argparse.ArgumentTypeError(f"{text!r} is not merged, adapter, both, or none")
    return kinds


def build_parser() -> Parser:
    """Return the parser of all five commands."""
    parser = Parser(prog="python -m repair", description="Repair a backdoored language model.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, text in (
        ("run", "suspect to repaired model and report"),
        ("locate", "heat maps and ranking only"),
        ("evaluate", "evidence only"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        add = command.add_argument
        add("--model", required=name != "run", metavar="SRC",
            help="folder, Hub id, or demo:begin|middle|end|clean")
        add("--prompts", type=Path, required=name != "run", metavar="FILE", help="prompt file")
        add("--out", type=Path, required=True, metavar="DIR", help="output folder")
        add("--revision", help="commit or branch of a Hub model")
        add("--trigger", action="append", default=[], metavar="TEXT",
            help="trigger; again for alternatives")
        add("--target", metavar="TEXT", help="what the trigger makes the model say")
        add("--profile", choices=("quick", "standard", "full"), default="standard")
        add("--seed", type=from_zero, default=0)
        add("--device", type=device, default="auto", help="auto, cpu, cuda, cuda:N")
        add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
        add("--processes", type=positive, default=1, metavar="N",
            help="share the work among N processes of this machine, on GPUs one each")
        add("--resume", action="store_true", help="continue the run in the output folder")
        add("--overwrite", action="store_true", help="replace the output folder")
        add("--trusted-base", metavar="SRC",
            help="the model that the suspect was made from, if you trust it: for comparison")
        add("--adapter-base", metavar="SRC",
            help="--model is a LoRA adapter, and this the whole model that it was made for")
        if name == "locate":
            add("--detail", type=from_zero, metavar="LAYER",
                help="also look into one layer: effects by role and by attention head")
        if name == "evaluate":
            add("--against", metavar="SRC", help="the candidate to compare with")
        if name == "run":
            add("--models", type=Path, metavar="FILE",
                help="instead of --model: a JSON list of suspects, one after the other")
            add("--modules", type=modules, default="auto", metavar="auto|N|PATHS")
            add("--rank", type=positive, metavar="N")
            add("--method", choices=("auto", "closed-form", "distill"), default="auto")
            add("--kl-budget", type=nats, default=0.01, metavar="NATS")
            add("--export", type=export_kinds, default=["merged", "adapter"],
                metavar="merged,adapter|none")
            add("--curves", action="store_true",
                help="also measure what more modules and more rank would buy")
            add("--controls", type=from_zero, metavar="N", help="random-module draws")
    verify = commands.add_parser("verify", help="does an export hold what its report says?")
    verify.add_argument("folder", type=Path, metavar="DIR")
    push = commands.add_parser("push", help="upload an export to the Hub")
    push.add_argument("folder", type=Path, metavar="DIR", nargs="?")
    push.add_argument("--check", action="store_true",
                      help="only check name, rights and visibility; without DIR also before a run")
    push.add_argument("--repo", required=True, metavar="OWNER/NAME")
    push.add_argument("--kind", choices=(*EXPORT_KINDS, "both"), default="merged",
                      help="both: the adapter goes to OWNER/NAME-adapter")
    push.add_argument("--public", action="store_true", help="default: private")
    push.add_argument("--pull-request", action="store_true", help="on an existing repository")
    push.add_argument("--force", action="store_true", help="also when not repaired")
    push.add_argument("--base-model", metavar="OWNER/NAME|none",
                      help="the original to name in the card (default: the suspect's Hub id)")
    push.add_argument("--publish-trigger", action="store_true",
                      help="default: trigger and payload only as hashes")
    return parser
