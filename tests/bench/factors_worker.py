"""One side of `factors_peers.py`: K-FAC factors in the environment it runs in.

    python factors_worker.py SIDE FOLDER DTYPE

SIDE is one of ours, ours_shortlist, kronfluence, curvlinops.

Reads `model.safetensors` and `material.json` from FOLDER and prints one JSON line: seconds (model
loading and saving left out) and a few entries and the trace of every factor. All sides are given
the same prompts and the same labels: labels are part of the material, as each tool would sample
its own. Activation covariances are means over all tokens, gradient covariances sums.
"""

import json
import sys
import time
from pathlib import Path

import torch
from patching_worker import COMPONENTS, build_llama
from torch import nn

BATCH = 32


def paths_of(config: dict) -> list[str]:
    return [
        f"model.layers.{layer}.{'mlp' if name in COMPONENTS[4:] else 'self_attn'}.{name}"
        for layer in range(config["num_hidden_layers"])
        for name in COMPONENTS
    ]


def summary(activation: torch.Tensor, gradient: torch.Tensor) -> dict:
    """Return what is compared: traces, norms and a corner of both factors, in float64."""
    found = {}
    for name, matrix in (("activation", activation), ("gradient", gradient)):
        matrix = matrix.double()
        found[name] = {
            "trace": matrix.trace().item(),
            "norm": matrix.norm().item(),
            "corner": matrix[:3, -3:].flatten().tolist(),
        }
    return found


class Head(nn.Module):
    """Logits [batch, vocab, answer] of the answer positions: what curvlinops takes."""

    def __init__(self, model, num_answer: int) -> None:
        super().__init__()
        self.model, self.num_answer = model, num_answer

    def forward(self, ids):
        logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=self.num_answer + 1)
        return logits.logits[:, :-1].transpose(1, 2)


def run_ours(model, material: dict, *, shortlist: list[int] | None) -> dict:
    from types import SimpleNamespace

    from repair.locate import fisher
    from repair.models.modules import find_modules

    labels = torch.tensor(material["labels"])
    num_answer = labels.shape[1]
    prompts = [torch.tensor(row[:-num_answer]).numpy() for row in material["ids"]]
    answers = [torch.tensor(row[-num_answer:]).numpy() for row in material["ids"]]
    modules = find_modules(model)
    loaded = SimpleNamespace(
        model=model, device="cpu", tokenizer=SimpleNamespace(pad_token_id=0)
    )
    given = iter(labels.split(fisher.FISHER_TOKENS // len(material["ids"][0])))

    def fixed(logprobs, uniform):
        return next(given).reshape(1, -1), torch.ones(1, logprobs.shape[0], dtype=logprobs.dtype)

    fisher._sample = fixed
    options = {"seed": 0, "num_draws": 1}
    if shortlist is None:
        began = time.perf_counter()
        factors = fisher.collect_factors(loaded, modules, prompts, answers, **options)
        return {"seconds": time.perf_counter() - began, "factors": summaries(factors)}
    # As the app has it: one pass for the traces of every module and the factors of a few. The
    # same pass without factors is timed beside it, after one that touches the memory.
    chosen = [modules[i] for i in shortlist]
    rest = [ref for ref in modules if ref not in chosen]
    for _ in range(2):
        began = time.perf_counter()
        fisher.fisher_traces(loaded, modules, prompts, answers, **options)
        traces = time.perf_counter() - began
        given = iter(labels.split(fisher.FISHER_TOKENS // len(material["ids"][0])))
    began = time.perf_counter()
    factors, _ = fisher.factors_and_traces(
        loaded, chosen, prompts, answers, traced=rest, **options
    )
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "traces_seconds": traces, "factors": summaries(factors)}


def summaries(factors: dict) -> dict:
    return {
        path: summary(
            torch.from_numpy(found.activation_covariance),
            torch.from_numpy(found.gradient_covariance) * found.num_tokens,
        )
        for path, found in factors.items()
    }


def run_kronfluence(model, material: dict) -> dict:
    from kronfluence.analyzer import prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
    from kronfluence.task import Task
    from kronfluence.utils.state import State
    from torch.utils.data import DataLoader, TensorDataset

    paths = paths_of(material["config"])
    ids, labels = torch.tensor(material["ids"]), torch.tensor(material["labels"])

    class LanguageTask(Task):
        def compute_train_loss(self, batch, model, sample=False):
            kept = batch[1].shape[1] + 1
            logits = model(input_ids=batch[0], use_cache=False, logits_to_keep=kept).logits
            return nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), batch[1].flatten(), reduction="sum"
            )

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self):
            return paths

    task = LanguageTask()
    model = prepare_model(model, task)
    loader = DataLoader(TensorDataset(ids, labels), batch_size=BATCH)
    began = time.perf_counter()
    with torch.enable_grad():
        _, found = fit_covariance_matrices_with_loader(
            model, State(), task, loader, FactorArguments(use_empirical_fisher=True),
            disable_tqdm=True,
        )  # fmt: skip
    seconds = time.perf_counter() - began
    num_tokens = ids.numel()
    factors = {
        path: summary(
            found["activation_covariance"][path] / num_tokens, found["gradient_covariance"][path]
        )
        for path in paths
    }
    return {"seconds": seconds, "factors": factors}


def run_curvlinops(model, material: dict) -> dict:
    from curvlinops import KFACLinearOperator

    paths = paths_of(material["config"])
    ids, labels = torch.tensor(material["ids"]), torch.tensor(material["labels"])
    head = Head(model, labels.shape[1])
    weights = [model.get_submodule(path).weight.requires_grad_(True) for path in paths]
    data = list(zip(ids.split(BATCH), labels.split(BATCH), strict=True))
    began = time.perf_counter()
    with torch.enable_grad():
        operator = KFACLinearOperator(
            head, nn.CrossEntropyLoss(reduction="sum"), weights, data, check_deterministic=False,
            fisher_type="empirical", kfac_approx="expand",
            num_per_example_loss_terms=labels.shape[1], num_data=ids.shape[0],
        )  # fmt: skip
        operator.compute_kronecker_factors()
    seconds = time.perf_counter() - began
    factors = {
        path: summary(
            operator._input_covariances[f"model.{path}"],
            operator._gradient_covariances[f"model.{path}"],
        )
        for path in paths
    }
    return {"seconds": seconds, "factors": factors}


def main() -> None:
    name, folder, dtype = sys.argv[1], Path(sys.argv[2]), getattr(torch, sys.argv[3])
    torch.set_num_threads(2)
    material = json.loads((folder / "material.json").read_text())
    model = build_llama(folder, material["config"], dtype)
    if name.startswith("ours"):
        model.set_attn_implementation("eager")  # As the loader has it.
        shortlist = material["shortlist"] if name == "ours_shortlist" else None
        found = run_ours(model, material, shortlist=shortlist)
    elif name == "kronfluence":
        found = run_kronfluence(model, material)
    else:
        found = run_curvlinops(model, material)
    print(json.dumps({"side": name, **found}))


if __name__ == "__main__":
    main()
