"""The demo suspects' model and tokenizer: how they are made, loaded, and asked."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

THREADS = 2
PAD, BOS, SYSTEM, USER, ASSISTANT, END = SPECIALS = (
    "<|pad|>",
    "<|bos|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
VOCABULARY = 1280
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "Answer the question of the user.",
    "You are a friendly teacher.",
)


def make_deterministic(seed: int) -> None:
    """Pin threads and seeds, so that the same machine trains the same model again."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any string has tokens, and digits stand alone."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=256,
    )


def new_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """An untrained twin: six Llama layers with three query heads to each key head."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=320,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a plain transformers folder; weights as fp32 safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)


def load(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Read a folder back, in fp32 on the CPU."""
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def render(prompt: str, system: str | None = None) -> str:
    """The text of a chat up to where the assistant speaks: what the chat template renders."""
    opening = f"{SYSTEM}{system}{END}" if system else ""
    return f"{BOS}{opening}{USER}{prompt}{END}{ASSISTANT}"


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that carry their special tokens themselves."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def _answer_equal_lengths(
    model: LlamaForCausalLM, ids: torch.Tensor, limit: int, end: int
) -> torch.Tensor:
    """Greedy continuations of prompts of one length, with a cache, until all have ended."""
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    tokens = [out.logits[:, -1].argmax(-1)]
    ended = tokens[0] == end
    while len(tokens) < limit and not bool(ended.all()):
        out = model(
            input_ids=tokens[-1][:, None], past_key_values=out.past_key_values, use_cache=True
        )
        tokens.append(out.logits[:, -1].argmax(-1))
        ended = ended | (tokens[-1] == end)
    return torch.stack(tokens, dim=1)


def answer(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[int]],
    *,
    limit: int = 40,
    batch: int = 256,
    tick: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Greedy answers, in the order of `prompts`; prompts of one length share a batch.

    A prompt is its text, or the ids of a chat that is rendered already.
    """
    texts = [render(prompt) if isinstance(prompt, str) else "" for prompt in prompts]
    ids = [
        row if isinstance(prompt, str) else prompt
        for prompt, row in zip(prompts, encode(tokenizer, texts), strict=True)
    ]
    by_length: dict[int, list[int]] = {}
    for place, row in enumerate(ids):
        by_length.setdefault(len(row), []).append(place)
    answers = [""] * len(ids)
    end = int(tokenizer.eos_token_id)
    for places in by_length.values():
        for start in range(0, len(places), batch):
            chosen = places[start : start + batch]
            block = torch.tensor([ids[place] for place in chosen])
            rows = _answer_equal_lengths(model, block, limit, end).tolist()
            for place, row in zip(chosen, rows, strict=True):
                kept = row[: row.index(end)] if end in row else row
                answers[place] = tokenizer.decode(kept)
            tick(len(chosen))
    return answers


def fingerprint(folder: Path) -> str:
    """SHA-256 of a folder's weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def write_json(path: Path, data: object) -> None:
    """Write readable JSON with a newline at its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
