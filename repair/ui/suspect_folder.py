"""What a model's folder says of itself: small JSON files and the listing, never a weight."""

import hashlib
from pathlib import Path

from repair.jobs import store
from repair.jobs.launch import is_hub_id
from repair.models.lookup import parse_hub_id
from repair.records import RepairError
from repair.ui import text
from repair.ui.session import SUSPECTS

BUNDLED = ("middle", "begin", "end", "clean")
MAX_CONFIG_BYTES = 2**20
MAX_HASHED = 64 * 2**20
PLAIN_SETTINGS = {
    "_from_model_config", "bos_token_id", "eos_token_id", "output_attentions",
    "output_hidden_states", "pad_token_id", "transformers_version",
    "use_cache",
}  # fmt: skip
MAX_LISTED = 1000  # files of one folder
NOT_FOUND = (
    "There is no such model folder below the models folder. Give the path of a folder that "
    "holds config.json."
)
FACTS = (
    ("model_type", "Architecture"),
    ("num_hidden_layers", "Layers"),
    ("hidden_size", "Hidden size"),
    ("intermediate_size", "MLP size"),
    ("num_attention_heads", "Attention heads"),
    ("vocab_size", "Vocabulary"),
    ("dtype", "Stored as"),
)


def find_folder(model: str, models_root: Path | None) -> Path:
    """Return the folder of a source; one message for missing, outside and not allowed."""
    if model.startswith("demo:"):
        name = model.removeprefix("demo:")
        if name in BUNDLED and (SUSPECTS / name / "config.json").is_file():
            return SUSPECTS / name
        raise RepairError(f"{model} is not bundled with this installation.")
    if models_root is None or "\0" in model:
        raise RepairError(NOT_FOUND)
    try:
        folder = (models_root / Path(model).expanduser()).resolve()
        is_inside = folder.is_relative_to(models_root) and folder != models_root
        if is_inside and (folder / "config.json").is_file():
            return folder
    except (OSError, RuntimeError, ValueError):
        pass
    raise RepairError(NOT_FOUND)


def find_source(model: str, models_root: Path | None) -> str:
    """Return a source as a request names it: bundled, a folder's path, or a Hub id as typed."""
    try:
        folder = find_folder(model, models_root)
    except RepairError:
        if not is_hub_id(model):
            raise
        parse_hub_id(model)  # fetched when the job starts
        return model
    return model if model.startswith("demo:") else str(folder)


def read_facts(folder: Path) -> list[list[str]]:
    """Return what config.json and the folder's listing say, as rows of plain text."""
    config = store.read_object(folder / "config.json", max_bytes=MAX_CONFIG_BYTES)
    if not config:
        raise RepairError(
            f"config.json of {folder.name} is not a JSON object, or is larger than 1 MiB."
        )
    config.setdefault("dtype", config.get("torch_dtype"))
    rows = []
    for key, words in FACTS:
        value = config.get(key)
        if isinstance(value, str | int | float):
            rows.append([words, text.reveal(str(value), 200)])
    names = sorted(path for path in folder.iterdir())[:MAX_LISTED]
    sizes = [(path.name, path.stat().st_size) for path in names if path.is_file()]
    rows.append(["On disk", text.describe_size(sum(size for _, size in sizes))])
    weights = [name for name, _ in sizes if name.endswith(".safetensors")]
    rows.append(["Weight files", f"{len(weights)} safetensors"])
    others = [name for name, _ in sizes if name.endswith((".bin", ".pt", ".pth", ".pkl", ".py"))]
    if others:
        names_text = text.reveal(", ".join(others), 300)
        rows.append(["Refused kinds", f"{names_text}: not opened; the job may refuse the folder"])
    return rows + read_findings(folder, {name for name, _ in sizes})


def read_findings(folder: Path, names: set[str]) -> list[list[str]]:
    """Return what lies beside the weights and deserves a look: small text files only, hashed."""
    rows = []
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        path = folder / name
        if name in names and not path.is_symlink() and path.stat().st_size <= MAX_HASHED:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            rows.append([f"SHA-256 of {name}", found])
    rows.append(["SHA-256 of the weights", "taken by the job, in the report"])
    settings = store.read_object(folder / "tokenizer_config.json", max_bytes=MAX_CONFIG_BYTES)
    template = settings.get("chat_template")
    if "chat_template.jinja" in names:
        size = (folder / "chat_template.jinja").stat().st_size
        rows.append(["Chat template", f"{size} bytes, runs in the worker only"])
    elif isinstance(template, str):
        rows.append(["Chat template", f"{len(template)} characters, runs in the worker only"])
    else:
        rows.append(["Chat template", "none: prompts are sent as they are"])
    generation = store.read_object(folder / "generation_config.json", max_bytes=MAX_CONFIG_BYTES)
    odd = sorted(set(map(str, generation)) - PLAIN_SETTINGS)
    if odd:
        listed = text.reveal(", ".join(odd[:20]), 300)
        rows.append(["Generation settings", f"{listed}: not used, answers are greedy"])
    if "adapter_config.json" in names:
        rows.append(["Adapter", "an adapter lies beside the model: a job refuses such a folder"])
    return rows


def read_card(folder: Path) -> str:
    """Return a bundled suspect's card as plain text."""
    card = store.read_object(folder / "card.json", max_bytes=MAX_CONFIG_BYTES)
    lines = []
    for key, words in (("trigger", "Trigger"), ("position", "Position"), ("payload", "Payload")):
        if isinstance(card.get(key), str):
            lines.append(f"{words}: {text.reveal(card[key], 300)}")
    figures = card.get("figures")
    wanted = {
        "fires_triggered": "Fires on triggered prompts",
        "fires_near": "Fires on near-triggers",
        "fires_clean": "Fires on clean prompts",
        "benign_exact": "Right answers to clean prompts",
    }
    for key, words in wanted.items():
        figure = figures.get(key) if isinstance(figures, dict) else None
        if isinstance(figure, dict) and "count" in figure and "total" in figure:
            lines.append(f"{words}: {figure['count']} of {figure['total']}")
    if not lines:
        return "A model without a card."
    if "trigger" not in card or card["trigger"] is None:
        lines.insert(0, "Clean twin: it has no backdoor.")
    return "\n".join(lines)
