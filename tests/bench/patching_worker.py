"""One side of `patching_peers.py`: times an exact patching grid in the environment it runs in.

    python patching_worker.py SIDE FOLDER DTYPE     SIDE: ours, loop, transformer_lens, nnsight

Reads `model.safetensors` and `material.json` from FOLDER and prints one JSON line: seconds by
trigger position (model loading left out) and the patched margins [module, pair]. Every side
patches the output of each of the q, k, v, o, gate, up and down projections, from the trigger on,
out of a same-length run, and reads the margin of two tokens at the last position.
"""

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

COMPONENTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BATCH = 8


def config_of(material: dict) -> dict:
    return material["config"]


def build_llama(folder: Path, config: dict, dtype: torch.dtype):
    """Return the transformers model with the shared weights; in float64 it is so throughout."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama import modeling_llama

    settings = LlamaConfig(**config)
    settings._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = LlamaForCausalLM(settings)
    model = LlamaForCausalLM(settings)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    if dtype == torch.float64:
        # Norms, angles and the eager softmax compute in float32, whatever they are given.
        def norm(self, hidden):
            scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)
            return self.weight * (hidden * scale)

        def rotary(self, x, position_ids):
            angles = position_ids[..., None].to(x.dtype) * self.inv_freq.to(x.dtype)
            angles = torch.cat([angles, angles], dim=-1)
            return angles.cos(), angles.sin()

        plain = torch.nn.functional.softmax

        def softmax(values, dim=None, dtype=None, **_):
            return plain(values, dim=dim)

        torch.nn.functional.softmax = softmax
        modeling_llama.LlamaRMSNorm.forward = norm
        modeling_llama.LlamaRotaryEmbedding.forward = rotary
    model = model.to(dtype).eval().requires_grad_(False)
    inner = model.model.rotary_emb
    if dtype == torch.float64:
        half = torch.arange(0, config["head_dim"], 2, dtype=torch.float64) / config["head_dim"]
        inner.inv_freq = 1.0 / (config["rope_theta"] ** half)
    return model


def modules_of(model, num_layers: int):
    for layer in range(num_layers):
        block = model.model.layers[layer]
        for name in COMPONENTS:
            yield getattr(block.mlp if name in COMPONENTS[4:] else block.self_attn, name)


class Loop:
    """The plain way: one hook, one forward pass per module, logits at the last position only."""

    def __init__(self, folder: Path, material: dict, dtype: torch.dtype) -> None:
        self.config = config_of(material)
        self.model = build_llama(folder, self.config, dtype)
        self.modules = list(modules_of(self.model, self.config["num_hidden_layers"]))

    def margin(self, ids, tokens):
        logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits.gather(1, tokens)[:, 0] - logits.gather(1, tokens)[:, 1]

    def grid(self, source, destination, starts, tokens):
        kept = {}
        handles = [
            module.register_forward_hook(lambda m, a, out, i=i: kept.update({i: out}))
            for i, module in enumerate(self.modules)
        ]
        self.margin(source, tokens)
        for handle in handles:
            handle.remove()
        rows = []
        mask = (torch.arange(source.shape[1])[None] >= starts[:, None])[..., None]
        for i, module in enumerate(self.modules):
            handle = module.register_forward_hook(
                lambda m, a, out, i=i: torch.where(mask, kept[i], out)
            )
            rows.append(self.margin(destination, tokens))
            handle.remove()
        return torch.stack(rows)


class NnSight(Loop):
    """nnsight on the same transformers model, as its guide has activation patching."""

    def __init__(self, folder: Path, material: dict, dtype: torch.dtype) -> None:
        super().__init__(folder, material, dtype)
        from nnsight import NNsight

        self.wrapped = NNsight(self.model)
        self.envoys = list(modules_of(self.wrapped, self.config["num_hidden_layers"]))

    def grid(self, source, destination, starts, tokens):
        from nnsight import save

        mask = (torch.arange(source.shape[1])[None] >= starts[:, None])[..., None]
        kept = []
        with self.wrapped.trace(source, logits_to_keep=1, use_cache=False):
            for envoy in self.envoys:
                kept.append(save(envoy.output))
        rows = []
        for envoy, value in zip(self.envoys, kept, strict=True):
            with self.wrapped.trace(destination, logits_to_keep=1, use_cache=False):
                envoy.output = torch.where(mask, value, envoy.output)
                logits = save(self.wrapped.output.logits)
            last = logits[:, -1]
            rows.append(last.gather(1, tokens)[:, 0] - last.gather(1, tokens)[:, 1])
        return torch.stack(rows)


class TransformerLens:
    """TransformerLens' bridge on the same transformers model, as its guide has patching."""

    def __init__(self, folder: Path, material: dict, dtype: torch.dtype) -> None:
        from tokenizers import Tokenizer, models
        from transformer_lens.model_bridge import TransformerBridge
        from transformers import PreTrainedTokenizerFast

        config = config_of(material)
        words = {str(i): i for i in range(config["vocab_size"])}
        backend = Tokenizer(models.WordLevel(words, unk_token="0"))
        PreTrainedTokenizerFast(
            tokenizer_object=backend, unk_token="0", bos_token="1", eos_token="2", pad_token="3"
        ).save_pretrained(folder / "tokenizer")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
        self.model = TransformerBridge.boot_transformers(
            "llama", hf_model=build_llama(folder, config, dtype), tokenizer=tokenizer,
            dtype=dtype, device="cpu",
        )  # fmt: skip
        names = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.in", "mlp.out")
        self.names = [
            f"blocks.{layer}.{name}.hook_out"
            for layer in range(config["num_hidden_layers"])
            for name in names
        ]

    def grid(self, source, destination, starts, tokens):
        wanted = set(self.names)
        _, cache = self.model.run_with_cache(source, names_filter=lambda name: name in wanted)
        mask = torch.arange(source.shape[1])[None] >= starts[:, None]
        rows = []
        for name in self.names:

            def hook(value, hook, name=name):
                shape = mask.shape + (1,) * (value.ndim - 2)
                return torch.where(mask.reshape(shape), cache[name], value)

            logits = self.model.run_with_hooks(destination, fwd_hooks=[(name, hook)])[:, -1]
            rows.append(logits.gather(1, tokens)[:, 0] - logits.gather(1, tokens)[:, 1])
        return torch.stack(rows)


class Ours:
    """This project's runs: shared prefix, restart at the layer, one pass for a layer's modules."""

    def __init__(self, folder: Path, material: dict, dtype: torch.dtype) -> None:
        from types import SimpleNamespace

        from repair.models.modules import find_modules

        self.model = build_llama(folder, config_of(material), dtype)
        if dtype == torch.float32:
            self.model.set_attn_implementation("eager")  # As the loader has it.
        self.loaded = SimpleNamespace(
            model=self.model, modules=find_modules(self.model), device="cpu"
        )

    def grid(self, source, destination, starts, tokens):
        import numpy as np

        from repair.locate.counterfactuals import AFTER, BEFORE, PatchingCase
        from repair.locate.patching import EVERYWHERE, by_layer
        from repair.locate.runs import Patch, Runs

        size = source.shape[1]
        everything = np.arange(size)
        cases = [
            PatchingCase(
                source=s.numpy(),
                destination=d.numpy(),
                partner=everything,
                role=np.where(everything < start, BEFORE, AFTER),
                source_positions=everything,
                destination_positions=everything,
                num_shared=int(start),
                payload=pair[:1].numpy(),
                clean=pair[1:].numpy(),
            )
            for s, d, start, pair in zip(
                source, destination, starts.tolist(), tokens, strict=True
            )
        ]
        runs = Runs(self.loaded, cases, self.loaded.modules)
        where = runs.where(*EVERYWHERE)
        rows = []
        for layer in by_layer(self.loaded.modules):
            patches = [Patch(modules=(ref,), positions=where) for ref in layer]
            rows.append(runs.patched(patches).margin)
        return torch.cat(rows)


SIDES = {"ours": Ours, "loop": Loop, "transformer_lens": TransformerLens, "nnsight": NnSight}


@torch.no_grad()
def main() -> None:
    name, folder, dtype = sys.argv[1], Path(sys.argv[2]), getattr(torch, sys.argv[3])
    torch.set_num_threads(2)
    material = json.loads((folder / "material.json").read_text())
    side = SIDES[name](folder, material, dtype)
    seconds, margins = {}, {}
    for position, flat in material["positions"].items():
        source, destination, tokens, starts = (
            torch.tensor(flat[key]) for key in ("source", "destination", "tokens", "starts")
        )
        num = source.shape[0] if dtype == torch.float32 else 2
        rows = []
        began = time.perf_counter()
        for at in range(0, num, BATCH):
            part = slice(at, min(at + BATCH, num))
            rows.append(side.grid(source[part], destination[part], starts[part], tokens[part]))
        seconds[position] = time.perf_counter() - began
        margins[position] = torch.cat(rows, dim=1).double().tolist()
    print(json.dumps({"side": name, "seconds": seconds, "margins": margins}))


if __name__ == "__main__":
    main()
