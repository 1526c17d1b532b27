"""Other people's repairs, written for the comparison: each gets our lessons and returns a model.

None of them is told the trigger except SSD, which needs an example of what to forget, and LoRA on
all modules, which is our own distillation without our choice of modules, start or penalty.

clean fine-tuning  all weights, cross entropy on the suspect's own answers to clean prompts
CROW               2411.12768: the same with LoRA on every module, plus alpha times the mean of
                   1 - cos(h_l, h_l+1) over the inner layers under an FGSM step on the embeddings
fine-pruning       1805.12185: the MLP neurons that clean prompts excite least are cut, then clean
                   fine-tuning
SSD                2308.07707: weights whose diagonal Fisher on triggered prompts (with the payload)
                   exceeds alpha times that on clean ones are multiplied by the inverse ratio
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from repair.locate.lessons import Lesson, Lessons, kl_from_teacher, measure_kl
from repair.lowrank.adapter import lora_config
from repair.lowrank.distillation import WEIGHT_CLEAN, WEIGHT_NEAR
from repair.models.answers import ScoringBatch, answer_logits, scoring_batches
from repair.models.loading import LoadedModel
from repair.models.modules import decoder_layers
from repair.records import LowRankUpdate

STEPS, BATCH = 200, 24
CROW_EPSILON, CROW_RATE, CROW_RANK = 0.1, 1e-3, 8
PRUNED_RATE = 1e-4


def copied(loaded: LoadedModel) -> LoadedModel:
    """Return the suspect with weights of its own."""
    return replace(loaded, model=copy.deepcopy(loaded.model))


def drawn(lesson: Lesson, step: int, *, seed: int) -> Lesson:
    generator = np.random.default_rng([seed, step])
    size = min(BATCH, len(lesson))
    return lesson.only(generator.choice(len(lesson), size=size, replace=False).tolist())


def passes(loaded: LoadedModel, lesson: Lesson) -> Iterator[tuple[ScoringBatch, Tensor]]:
    for batch in scoring_batches(loaded, lesson.prompts, lesson.answers):
        yield batch, answer_logits(loaded.model, batch.ids, batch.rows, batch.columns)


def train(
    parameters: Sequence[Tensor], rate: float, loss_of: Callable[[int], Tensor]
) -> None:
    """Run Adam with a cosine rate on `loss_of(step)`."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + np.cos(np.pi * step / STEPS))
        with torch.enable_grad():
            optimizer.zero_grad()
            loss_of(step).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def cross_entropy(loaded: LoadedModel, lesson: Lesson) -> Tensor:
    total, count = torch.zeros(()), 0
    for batch, logits in passes(loaded, lesson):
        total = total + nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
        count += batch.labels.numel()
    return total / count


def clean_fine_tuning(
    loaded: LoadedModel, lessons: Lessons, rate: float, *, seed: int
) -> LoadedModel:
    changed = copied(loaded)
    changed.model.requires_grad_(True)
    train(
        list(changed.model.parameters()),
        rate,
        lambda step: cross_entropy(changed, drawn(lessons.benign, step, seed=seed)),
    )
    changed.model.requires_grad_(False)
    return changed


def crow(loaded: LoadedModel, lessons: Lessons, alpha: float, *, seed: int) -> LoadedModel:
    changed = copied(loaded)
    peft_model = get_peft_model(
        changed.model,
        LoraConfig(
            r=CROW_RANK, lora_alpha=2 * CROW_RANK, target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    embed = changed.model.get_input_embeddings()

    def inconsistency(embedded: Tensor, mask: Tensor) -> Tensor:
        states = changed.model.base_model(
            inputs_embeds=embedded, output_hidden_states=True, use_cache=False
        ).hidden_states
        inner = torch.stack(states[1:-1])
        cosine = nn.functional.cosine_similarity(inner[:-1], inner[1:], dim=-1)
        return ((1 - cosine) * mask).sum() / (mask.sum() * cosine.shape[0])

    def loss_of(step: int) -> Tensor:
        lesson = drawn(lessons.benign, step, seed=seed)
        total = cross_entropy(changed, lesson)
        for batch in scoring_batches(changed, lesson.prompts, lesson.answers):
            embedded = embed(batch.ids).detach().requires_grad_()
            (slope,) = torch.autograd.grad(inconsistency(embedded, batch.mask), embedded)
            moved = (embedded + CROW_EPSILON * slope.sign()).detach()
            total = total + alpha * inconsistency(moved, batch.mask)
        return total

    train([p for p in peft_model.parameters() if p.requires_grad], CROW_RATE, loss_of)
    merged = peft_model.merge_and_unload()
    return replace(changed, model=merged.requires_grad_(False).eval())


@torch.no_grad()
def fine_pruning(loaded: LoadedModel, lessons: Lessons, share: float, *, seed: int) -> LoadedModel:
    changed = copied(loaded)
    excited: dict[int, Tensor] = {}
    handles = []
    for index, layer in enumerate(decoder_layers(changed.model)):

        def hook(_module: nn.Module, args: tuple, index: int = index) -> None:
            found = args[0].abs().reshape(-1, args[0].shape[-1]).sum(0)
            excited[index] = excited.get(index, 0) + found

        handles.append(layer.mlp.down_proj.register_forward_pre_hook(hook))
    for _ in passes(changed, lessons.benign):
        pass
    for handle in handles:
        handle.remove()
    for index, layer in enumerate(decoder_layers(changed.model)):
        cut = excited[index].argsort()[: int(share * excited[index].numel())]
        layer.mlp.down_proj.weight[:, cut] = 0
    return clean_fine_tuning(changed, lessons, PRUNED_RATE, seed=seed)


def diagonal_fisher(loaded: LoadedModel, lesson: Lesson) -> dict[str, Tensor]:
    """Return the mean squared gradient of -log p(answer), prompt by prompt."""
    found = {name: torch.zeros_like(p) for name, p in loaded.model.named_parameters()}
    for i in range(len(lesson)):
        loaded.model.zero_grad()
        with torch.enable_grad():
            cross_entropy(loaded, lesson.only([i])).backward()
        for name, parameter in loaded.model.named_parameters():
            if parameter.grad is not None:
                found[name] += parameter.grad.square() / len(lesson)
    loaded.model.zero_grad()
    return found


class Dampening:
    """SSD; the two diagonals are measured once for every alpha."""

    def __init__(self, loaded: LoadedModel, lessons: Lessons, payloads: Lesson) -> None:
        self._loaded = loaded
        measured = copied(loaded)
        measured.model.requires_grad_(True)
        self._forget = diagonal_fisher(measured, payloads)
        self._retain = diagonal_fisher(measured, lessons.benign)

    @torch.no_grad()
    def __call__(self, alpha: float) -> LoadedModel:
        changed = copied(self._loaded)
        for name, parameter in changed.model.named_parameters():
            forget, retain = self._forget[name], self._retain[name]
            factor = (retain / forget.clamp(min=1e-30)).clamp(max=1.0)
            parameter.mul_(torch.where(forget > alpha * retain, factor, torch.ones_like(factor)))
        return changed


def lora_everywhere(
    loaded: LoadedModel, lessons: Lessons, rate: float, *, rank: int, seed: int
) -> tuple[LowRankUpdate, ...]:
    """Return LoRA on all modules, distilled from the suspect without the trigger."""
    shapes = tuple(
        LowRankUpdate(
            module=ref,
            lora_A=np.zeros((rank, ref.d_in), np.float32),
            lora_B=np.zeros((ref.d_out, rank), np.float32),
        )
        for ref in loaded.modules
    )
    changed = copied(loaded)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft_model = get_peft_model(changed.model, lora_config(shapes))
    kinds = [(lessons.triggered, 1.0), (lessons.benign, WEIGHT_CLEAN), (lessons.near, WEIGHT_NEAR)]

    def loss_of(step: int) -> Tensor:
        total = torch.zeros(())
        for lesson, weight in kinds:
            if len(lesson):
                some = drawn(lesson, step, seed=seed)
                for batch, logits in passes(changed, some):
                    kl = kl_from_teacher(some, batch, logits)
                    total = total + weight * kl.sum() / sum(a.size for a in some.answers)
        return total

    train([p for p in peft_model.parameters() if p.requires_grad], rate, loss_of)
    found = []
    for ref in loaded.modules:
        layer = changed.model.get_submodule(ref.path)
        found.append(
            LowRankUpdate(
                module=ref,
                lora_A=layer.lora_A["default"].weight.detach().numpy().copy(),
                lora_B=layer.lora_B["default"].weight.detach().numpy().copy(),
            )
        )
    return tuple(found)


def held_out_kls(
    changed: LoadedModel, lessons: Lessons, updates: Sequence[LowRankUpdate] = ()
) -> tuple[float, float]:
    """Return (trigger KL, benign KL) on the held-out lessons."""
    return (
        measure_kl(changed, lessons.held_out_triggered, updates),
        measure_kl(changed, lessons.held_out_benign, updates),
    )
