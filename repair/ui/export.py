"""Tab 6: what was written, and what it may be taken for."""

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from repair.jobs import store
from repair.ui import text
from repair.ui.forecast import find_description
from repair.ui.push import build_push
from repair.ui.session import Selection, Settings, View
from repair.ui.shell import Shell, Updates

FIGURES = (
    ("patching.png", "Heat map of patching effects, one cell per layer and module"),
    ("fisher.png", "Heat map of Fisher curvature, one cell per layer and module"),
    ("effect_curve.png", "Joint effect against the number of modules patched together"),
    ("attack_success.png", "Attack success before and after, with intervals, beside the controls"),
    ("benign_kl.png", "Harm to clean answers, prompt by prompt"),
    ("training.png", "How the repair went, on held-out prompts"),
)
SHOWN_FOLDERS = ("merged", "adapter", "")
MAX_FIGURE_BYTES = 8 * 2**20
DEFAULT_RANK = 4  # of a module that was not suggested
MAX_DOWNLOAD_BYTES = 256 * 2**20


def find_hash(manifest: Any, name: str) -> str:
    """Return the SHA-256 that the manifest gives for a file, or a dash."""
    files = manifest.get("files") if isinstance(manifest, dict) else None
    entry = files.get(name) if isinstance(files, dict) else None
    if isinstance(entry, dict):
        entry = entry.get("sha256")
    return entry if isinstance(entry, str) else "-"


def list_files(folder: Path) -> list[list[str]]:
    """Return the files of the export: name, size, hash."""
    manifest = store.read_object(folder / "manifest.json")
    rows = []
    for part in SHOWN_FOLDERS:
        place = folder / part
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            is_inner = part == "" and path.suffix not in (".md", ".png") and path.name not in (
                "report.json", "manifest.json", "samples.json",
            )  # fmt: skip
            if not path.is_file() or path.is_symlink() or is_inner:
                continue
            name = f"{part}/{path.name}".lstrip("/")
            size = text.describe_size(path.stat().st_size)
            rows.append([name, size, find_hash(manifest, name)])
    return rows


def open_figure(path: Path) -> Image.Image | None:
    """Return a small PNG of ours, decoded; None where there is none."""
    try:
        if path.is_symlink() or path.stat().st_size > MAX_FIGURE_BYTES:
            return None
        with Image.open(path, formats=("PNG",)) as image:
            if image.width * image.height > 40_000_000:
                return None
            return image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


def pack_adapter(settings: Settings, folder: Path) -> str | None:
    """Return a zip of the adapter in the app's cache; None when there is none or it is large."""
    place = folder / "adapter"
    paths = sorted(place.iterdir()) if place.is_dir() else []
    paths = [path for path in paths if path.is_file() and not path.is_symlink()]
    total = sum(path.stat().st_size for path in paths)
    if not paths or total > MAX_DOWNLOAD_BYTES:
        return None
    # Whoever has the address can fetch it: the job's random id is in it, hashed.
    stamp = "".join(f"{path.name}{path.stat().st_mtime_ns}" for path in paths)
    name = hashlib.sha256(f"{folder.name}{stamp}".encode()).hexdigest()
    target = settings.cache / name / "adapter.zip"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".part")
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as file:
            for path in paths:
                file.write(path, f"adapter/{path.name}")
        partial.replace(target)
    return str(target)


def describe_plan(view: View, selection: Selection, models_root: Path | None) -> str:
    """Return what a repair of the chosen modules would write, in our own words and numbers."""
    words = "Nothing was exported yet. "
    chosen = [score.module for score in view.scores if score.module.path in selection.paths]
    if chosen:
        ranks = view.located.get("suggested_ranks")
        ranks = ranks if isinstance(ranks, dict) else {}
        sizes = [
            rank * (ref.d_in + ref.d_out)
            for ref in chosen
            if isinstance(rank := ranks.get(ref.path, DEFAULT_RANK), int)
        ]
        _, num_bytes = find_description(view.request, models_root)
        whole = f", about {text.describe_size(num_bytes)}" if num_bytes else ""
        words += (
            f"A repair of the {len(chosen)} chosen modules writes a PEFT adapter, about "
            f"{text.describe_size(4 * sum(sizes))}, and the merged model{whole}, with the report, "
            "figures and the hash of every file; Repair, More says which of the two. "
        )
    return words + (
        "If it is to go to the Hub, the name and your rights can be checked below already now."
    )


def build_export(shell: Shell) -> None:
    """Build and wire the tab."""
    gr.Markdown("## What do you take away?", elem_classes="lead")
    empty = gr.Markdown(
        "Nothing was exported yet.", elem_classes="empty", elem_id="export-empty"
    )
    with gr.Column(visible=False) as body:
        warning = gr.Textbox(
            label="Before you use it", interactive=False, elem_classes="problem",
            visible=False, elem_id="export-warning",
        )  # fmt: skip
        with gr.Row(elem_classes="bar"):
            place = gr.Textbox(
                label="Output folder", interactive=False, buttons=["copy"], scale=3,
                min_width=260, elem_id="out-folder",
            )  # fmt: skip
            merged = gr.Textbox(
                label="Repaired model, merged", interactive=False, buttons=["copy"], scale=3,
                min_width=260, elem_id="merged-folder",
            )  # fmt: skip
            download = gr.DownloadButton(
                "Download the adapter", min_width=180, elem_id="download-adapter"
            )
        files = gr.Dataframe(
            headers=["File", "Size", "SHA-256"], datatype="str", interactive=False, buttons=[],
            label="What was written", wrap=True, elem_id="files",
            column_widths=["38%", "14%", "48%"], max_height=720,
        )  # fmt: skip
        report = gr.Textbox(
            label="report.md", interactive=False, lines=14, max_lines=24, buttons=["copy"],
            elem_id="report",
        )  # fmt: skip
        figures = []
        for start in range(0, len(FIGURES), 2):
            with gr.Row():
                figures += [
                    gr.Image(
                        label=name, show_label=False, alt_text=words, interactive=False,
                        type="pil", format="png", buttons=["download", "fullscreen"],
                        min_width=260, visible=False,
                    )
                    for name, words in FIGURES[start : start + 2]
                ]  # fmt: skip
    with gr.Accordion("Upload to the Hugging Face Hub", open=False, elem_id="to-hub"):
        build_push(shell)
    limits = gr.Markdown(text.LIMITS, elem_id="limits", visible=False)

    def draw(view: View, selection: Selection, is_fresh: bool) -> Updates:
        folder = view.folder
        if folder is None or not view.report:
            updates = {
                empty: gr.Markdown(
                    describe_plan(view, selection, shell.settings.models_root), visible=True
                ),
                body: gr.Column(visible=False),
                limits: gr.Markdown(visible=False),
            }  # fmt: skip
            return updates | {figure: gr.Image(value=None, visible=False) for figure in figures}
        has_merged = (folder / "merged").is_dir()
        is_far = shell.settings.space is not None
        packed = pack_adapter(shell.settings, folder)
        verdict = str(view.report.get("verdict"))
        words = {
            "repaired": "",
            "not repaired": "At least one gate failed. The files are marked not repaired; Compare "
            "says which gate.",
            "nothing to repair": "Nothing was changed, so no model was written.",
            "could not check": "The evidence supports no verdict, so no model was written.",
        }.get(verdict, "")
        if verdict == "repaired" and not has_merged and packed is None:
            words = "No weights are here: they were not asked for, or this is the example."
        updates = {
            empty: gr.Markdown(visible=False),
            body: gr.Column(visible=True),
            limits: gr.Markdown(visible=True),
            warning: gr.Textbox(value=words, visible=bool(words)),
            # On a Space the visitor cannot reach a folder: the Hub is the way out.
            place: gr.Textbox(value="" if is_far else str(folder), visible=not is_far),
            merged: gr.Textbox(
                value=str(folder / "merged") if has_merged and not is_far else "",
                visible=has_merged and not is_far,
            ),
            download: gr.DownloadButton(value=packed, visible=packed is not None),
            files: list_files(folder),
            report: text.reveal(store.read_text(folder / "report.md"), 200_000),
        }
        for figure, (name, _) in zip(figures, FIGURES, strict=True):
            image = open_figure(folder / name)
            updates[figure] = gr.Image(value=image, visible=image is not None)
        return updates

    shell.add(
        draw,
        [empty, body, limits, warning, place, merged, download, files, report, *figures],
    )  # fmt: skip
