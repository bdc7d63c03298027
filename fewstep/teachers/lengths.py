"""Prompts longer than a text encoder reads: said once, in one line, in place of the libraries' line for each."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .pipelines import PROCESSED, class_of, hushed

PIECE = 1024  # prompts that are split into tokens at a time
THINKING = {"ZImagePipeline": True, "Flux2KleinPipeline": False}  # what their templates of a chat are told
SAID = (
    "Kwargs passed to `processor.__call__`",  # as FLUX.2's stock call does
    *("part of your input was truncated", "Token indices sequence length is longer"),
    "does not support `output_attentions=True`",  # for which HiDream's call asks, and which it does not read
)


def limits(pipe: Any) -> dict[str, int]:
    """Name of each tokenizer of a stock pipeline -> tokens that are read of a text, special ones included."""
    found: dict[str, int] = {}
    if class_of(pipe) in PROCESSED:  # which read all of a text
        return found
    parameter = inspect.signature(type(pipe).__call__).parameters.get("max_sequence_length")
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4"):
        tokenizer = _tokenizer(pipe, name)
        if tokenizer is not None:
            clip = "CLIP" in type(tokenizer).__name__  # whose length is its model's, whatever the call says
            asked = parameter.default if parameter is not None and not clip else None
            if hasattr(pipe, "backbone"):  # of tokens
                asked = pipe.backbone.config.cls_token_num
            found[name] = min(tokenizer.model_max_length, asked or tokenizer.model_max_length)
            if clip and class_of(pipe) == "HiDreamImagePipeline" and parameter is not None:
                found[name] = parameter.default  # of CLIPs with places for more
            found[name] -= _around(pipe, tokenizer)
    return found


def _around(pipe: Any, tokenizer: Any) -> int:
    """Tokens that a stock pipeline puts around each text, of those that it reads in all."""
    kind = class_of(pipe)
    if kind in THINKING:
        messages: list[Any] = [{"role": "user", "content": ""}]
        options = {"add_generation_prompt": True, "enable_thinking": THINKING[kind]}
        empty = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    elif kind == "Flux2Pipeline":
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        messages = format_input([""], pipe.system_message)[0]
        empty = pipe.tokenizer.apply_chat_template(messages, tokenize=False)
    elif kind == "Lumina2Pipeline":
        whole = tokenizer(f"{pipe.system_prompt} <Prompt Start> ")["input_ids"]
        return len(whole) - len(tokenizer("")["input_ids"])
    elif kind == "QwenImagePipeline":
        empty = pipe.prompt_template_encode.format("")
    elif kind == "Krea2Pipeline":
        empty = pipe.prompt_template_encode_prefix + pipe.prompt_template_encode_suffix
    else:
        return 0
    # Some leave out what stands before the text.
    return len(tokenizer(empty)["input_ids"]) - getattr(pipe, "prompt_template_encode_start_idx", 0)


def _tokenizer(pipe: Any, name: str) -> Any:
    """Itself, or that of the processor that a pipeline has in its place (FLUX.2) or beside it (Qwen-Image-2.1)."""
    part = getattr(pipe, name, None)
    if part is None and name == "tokenizer":
        part = getattr(pipe, "processor", None)
    return getattr(part, "tokenizer", part)


def too_long(pipe: Any, prompts: Sequence[str]) -> str | None:
    """How many prompts lose their end, the longest and where it is; None where all are read whole."""
    alike: dict[tuple[int, str], list[str]] = {}  # tokenizers of one class count alike
    for name, limit in limits(pipe).items():
        alike.setdefault((limit, type(_tokenizer(pipe, name)).__name__), []).append(name)
    parts = []
    for (limit, _), names in alike.items():
        lengths = _lengths(_tokenizer(pipe, names[0]), prompts)
        if count := sum(length > limit for length in lengths):
            longest = max(range(len(lengths)), key=lengths.__getitem__)
            text = prompts[longest] if len(prompts[longest]) <= 60 else prompts[longest][:57] + "..."
            parts.append(
                f"{count} of {len(prompts)} prompts are longer than the {limit} tokens that {' and '.join(names)} "
                f"take{'s' if len(names) == 1 else ''}, and lose their end there; the longest, number {longest + 1}, "
                f"has {lengths[longest]}: {text!r}"
            )
    return "; ".join(parts) or None


def token_counts(pipe: Any, prompts: Sequence[str]) -> list[int] | None:
    """Tokens of each prompt alone by a pipeline's first tokenizer, if it has one."""
    tokenizer = _tokenizer(pipe, "tokenizer")
    return None if tokenizer is None else _lengths(tokenizer, prompts)


def _lengths(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    lengths: list[int] = []
    with hushed(), unsaid():
        for start in range(0, len(prompts), PIECE):
            pieces = tokenizer(list(prompts[start : start + PIECE]), truncation=False)["input_ids"]
            lengths += map(len, pieces)
    return lengths


@contextmanager
def unsaid() -> Iterator[None]:
    """Without the libraries' lines of what was cut from a prompt, each of which prints all of it, and of what is no
    fault of anyone's."""
    handlers = [h for name in ("diffusers", "transformers") for h in logging.getLogger(name).handlers]

    def keep(record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in SAID)

    for handler in handlers:
        handler.addFilter(keep)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(keep)
