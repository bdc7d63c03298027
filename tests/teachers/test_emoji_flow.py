"""The recipe that trains ``builtin:emoji-flow``: what it trains on is what the stock pipeline computes."""

import numpy as np
import pytest
import torch

from fewstep import load_teacher
from fewstep.teachers.generate import generate
from fewstep.teachers.load import BUILTIN
from fewstep.teachers.pipelines import size_options


@pytest.fixture(scope="module")
def recipe(training_recipe):
    return training_recipe("train_emoji_flow")


def test_the_network_in_training_is_the_stock_pipelines(recipe, tmp_path):
    tokenizer = recipe.GemmaTokenizer.from_pretrained(BUILTIN["builtin:emoji-flow"] / "tokenizer")
    torch.manual_seed(0)
    model, vae = recipe.Denoiser(tokenizer).eval(), recipe.make_vae()
    torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.1)
    for part in (model.transformer, vae):  # saved as fp16
        part.half().float()
    torch.save({"ema": model.state_dict()}, tmp_path / "transformer.pt")
    torch.save({"ema": vae.state_dict()}, tmp_path / "vae.pt")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    recipe.save_pipeline(tmp_path, tmp_path / "pipeline")
    teacher = load_teacher(str(tmp_path / "pipeline"))

    ids, seen = recipe.token_ids(tokenizer)
    names = recipe.captions()
    rows = [0, 700, 1500]
    x, t = torch.randn(4, 16, 8, 8), torch.tensor([0.9, 0.5, 0.3, 0.7])
    cond = teacher.encode([names[i] for i in rows])
    null = teacher.denoiser.null
    with torch.no_grad():
        given = torch.tensor([*rows, 3])
        own = model(x, t, ids[0, given], seen[0, given], torch.tensor([False] * 3 + [True]))
        stock = torch.cat(
            [
                teacher.denoiser.predict(x[:3], t[:3], cond),
                teacher.denoiser.predict(x[3:], t[3:], null),
            ]
        )
    assert own[:3].std() > 0.01 and (own[0] - own[1]).abs().max() > 1e-3
    assert torch.allclose(own, stock, atol=1e-3)


def test_padding_of_texts_that_the_stock_pipeline_would_mask_is_left_out():
    """Images are the same, at a quarter of the time."""
    teacher = load_teacher("builtin:emoji-flow")
    prompts = ["dog face", "woman and man holding hands with medium light skin tone and dark skin tone"]
    call = {"num_inference_steps": 2, "guidance_scale": 2.0, **size_options(teacher.pipe)}
    short, _ = generate(teacher.pipe, prompts, call, quiet=True)
    full, _ = generate(teacher.pipe, prompts, {**call, "max_sequence_length": 300}, quiet=True)
    assert np.abs(short.astype(int) - full).max() <= 1 and short.std() > 10
