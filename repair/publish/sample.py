"""A few prompts with the repaired model's logits and answers: what a reopened export must repeat.

`sample.safetensors` holds prompt_I and answer_I (ids [tokens]) and logits [prompt, vocab] at each
prompt's last token, float32; its metadata says how the model was run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedModel

from repair.models.loading import LoadedModel
from repair.models.placement import computes_on, is_on_one_device

SAMPLE = "sample.safetensors"
MOST_PROMPTS = 8
SAME_LOGITS = 1e-4  # float32 throughout
SAME_LOGITS_ROUNDED = 0.05  # of the logits' range, where weights or sums are rounded to 16 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSample:
    """The prompts of a sample and what the repaired model made of them in memory."""

    prompts: list[torch.Tensor]  # ids [tokens] int64
    answers: list[torch.Tensor]  # ids [tokens] int64, end token included
    logits: torch.Tensor  # [prompt, vocab] float32
    dtype: str  # of the computation
    stored_dtype: str  # of the weight files
    device: str
    num_new_tokens: int
    stop_ids: tuple[int, ...]

    @property
    def is_exact(self) -> bool:
        return self.dtype == self.stored_dtype == "float32"

    @property
    def tolerance(self) -> float:
        """Return how far a reopened model's logits may be off."""
        if self.is_exact:
            return SAME_LOGITS
        return SAME_LOGITS_ROUNDED * float(self.logits.max() - self.logits.min())


@torch.no_grad()
def ask(
    model: torch.nn.Module,
    prompts: Sequence[torch.Tensor],
    *,
    num_new_tokens: int,
    stop_ids: Sequence[int],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return (last logits [prompt, vocab], greedy answers' ids), one prompt at a time."""
    config = GenerationConfig(
        max_new_tokens=num_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=stop_ids[0] if stop_ids else 0,
    )
    device = computes_on(model.get_input_embeddings())
    logits, answers = [], []
    for prompt in prompts:
        ids = prompt[None].to(device)
        logits.append(model(input_ids=ids).logits[0, -1].float().cpu())
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
        )
        answers.append(output[0, ids.shape[1] :].cpu())
    return torch.stack(logits), answers


def write_sample(
    loaded: LoadedModel, prompts: Sequence[np.ndarray], path: Path, *, num_new_tokens: int
) -> None:
    """Ask the live model (inside `apply_updates`) the first few `prompts` and write the sample."""
    ids = [torch.from_numpy(prompt) for prompt in prompts[:MOST_PROMPTS]]
    logits, answers = ask(
        loaded.model, ids, num_new_tokens=num_new_tokens, stop_ids=loaded.stop_ids
    )
    tensors = {"logits": logits}
    for i, (prompt, answer) in enumerate(zip(ids, answers, strict=True)):
        tensors[f"prompt_{i}"] = prompt
        tensors[f"answer_{i}"] = answer.contiguous()
    metadata = {
        "dtype": loaded.dtype,
        "stored_dtype": loaded.staged.dtype,
        "device": loaded.device if is_on_one_device(loaded.model) else "cpu",
        "num_new_tokens": str(num_new_tokens),
        "stop_ids": " ".join(map(str, loaded.stop_ids)),
    }
    save_file(tensors, path, metadata=metadata)


def read_sample(path: Path) -> ModelSample:
    """Return the sample in `path`."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        count = sum(name.startswith("prompt_") for name in file.keys())  # noqa: SIM118
        return ModelSample(
            prompts=[file.get_tensor(f"prompt_{i}") for i in range(count)],
            answers=[file.get_tensor(f"answer_{i}") for i in range(count)],
            logits=file.get_tensor("logits"),
            dtype=metadata["dtype"],
            stored_dtype=metadata["stored_dtype"],
            device=metadata["device"],
            num_new_tokens=int(metadata["num_new_tokens"]),
            stop_ids=tuple(int(text) for text in metadata["stop_ids"].split()),
        )


def compare(model: PreTrainedModel, sample: ModelSample) -> dict[str, float | int | bool]:
    """Return how a reopened model's logits and answers differ from the sample's."""
    logits, answers = ask(
        model,
        sample.prompts,
        num_new_tokens=sample.num_new_tokens,
        stop_ids=sample.stop_ids,
    )
    difference = float((logits - sample.logits).abs().max())
    num_equal = sum(
        torch.equal(answer, expected)
        for answer, expected in zip(answers, sample.answers, strict=True)
    )
    is_same = difference <= sample.tolerance
    # A rounded weight may tip the balance between two nearly equal tokens; float32 must not.
    if sample.is_exact:
        is_same = is_same and num_equal == len(answers)
    return {
        "largest_logit_difference": difference,
        "tolerance": sample.tolerance,
        "num_equal_answers": num_equal,
        "num_answers": len(answers),
        "is_same": is_same,
    }
