"""Converted checkpoints against the authors' own modules: logits, tokens, laws and images, see tests/golden."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.diffusion.cond import Cond
from fewstep.teachers.tiny.texts import tiny_t5
from fewstep.tokens.codes import CodebookDenoiser, Law
from fewstep.tokens.convert import llamagen, var
from fewstep.tokens.pipeline import decode_codes

GOLDEN = Path(__file__).parents[1] / "golden"


def arrays(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file}


def about(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def checkpoint(name, folder):
    torch.save(arrays(f"{name}.weights"), folder / f"{name}.pth")
    return folder / f"{name}.pth"


def pipeline(name, folder):
    """As `fewstep convert` makes it of the published files."""
    if name.startswith("var"):
        return var(checkpoint(name, folder), checkpoint("var_vqvae", folder))
    config = about(name)["config"]
    return llamagen(
        checkpoint(name, folder),
        checkpoint("llamagen_vq", folder),
        tokens=config["block_size"],
        text_encoder=encoder_of(config["caption_dim"], folder) if "caption_dim" in config else None,
    )


def encoder_of(width, folder):
    for part in tiny_t5(width):
        part.save_pretrained(folder / "t5")
    return folder / "t5"


def conditions(name, io, labels="labels"):
    if "embeddings" not in io:
        return Cond({"label": io[labels].long()})
    null = torch.zeros(len(io["embeddings"]))
    return Cond({"embeds": io["embeddings"], "mask": io["text_mask"].long(), "null": null})


MODELS = ("var_l2", "var_nol2", "llamagen_c2i", "llamagen_t2i")


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_authors(name, tmp_path):
    io, pipe = arrays(f"{name}.io"), pipeline(name, tmp_path)
    with torch.no_grad():
        logits = pipe.transformer(io["tokens"].long(), conditions(name, io))
    assert io["logits"].std() > 1
    assert "labels" not in io or (io["labels"] == 5).any()  # the null class among them
    torch.testing.assert_close(logits, io["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_drawn_from_the_authors_law(name, tmp_path):
    """With the same uniform numbers: guidance, its ramp, temperature, top-k, top-p and the cache, token by token."""
    io, pipe = arrays(f"{name}.io"), pipeline(name, tmp_path)
    cond = conditions(name, io, "gen_labels")
    tried = 0
    for i, how in enumerate(about(name)["generations"]):
        if "cfg_interval" in how:  # guidance in the first steps only, which no caller here asks for
            continue
        law = Law(how.get("temperature", 1.0), how["top_k"], how["top_p"] or 1.0)
        guidance = how.get("cfg_scale", 1 + how.get("cfg", 0.0))
        teacher = CodebookDenoiser(pipe.transformer, pipe.codes, law, pipe.null())
        tokens = teacher.sample(io[f"gen{i}_uniforms_f64"], cond, guidance=guidance)
        assert tokens.equal(io[f"gen{i}_tokens"].long())
        found = teacher.context(tokens, cond, guidance=guidance)["log_prob"].exp()
        torch.testing.assert_close(found, io[f"gen{i}_probs"], rtol=0, atol=1e-4)
        tried += 1
    assert tried >= (2 if name == "llamagen_t2i" else 3)


def test_padding_of_a_text_is_seen_by_no_token_guided_or_not(tmp_path):
    io, pipe = arrays("llamagen_t2i.io"), pipeline("llamagen_t2i", tmp_path)
    net, tokens, cond = pipe.transformer, io["tokens"].long(), conditions("llamagen_t2i", io)
    assert (io["logits"] - io["logits_without_mask"]).abs().max() > 1  # the file can tell
    with torch.no_grad():
        everywhere = Cond({**cond.tensors, "mask": torch.ones_like(cond["mask"])})
        torch.testing.assert_close(net(tokens, everywhere), io["logits_without_mask"], rtol=0, atol=1e-4)
        # the null embedding stands in every slot, and is seen in those of the text
        without = pipe.teacher()._with_null(cond, len(tokens)).rows(slice(len(tokens)))
        torch.testing.assert_close(net(tokens, without), io["logits_uncond"], rtol=0, atol=1e-4)
        assert net._mask(cond, 0, 130).diagonal(dim1=2, dim2=3).all()  # seeing nothing is NaN in some kernels
        noise = torch.where(cond["mask"][..., None] == 0, 9.0, cond["embeds"])
        assert net(tokens, Cond({**cond.tensors, "embeds": noise})).equal(net(tokens, cond))


@pytest.mark.parametrize("name", ["var_l2", "var_nol2"])
def test_a_call_of_the_pipeline_ends_in_the_authors_images(name, tmp_path):
    io, pipe = arrays(f"{name}.io"), pipeline(name, tmp_path)
    images = (decode_codes(pipe.vqvae, pipe.codes[io["gen0_tokens"].long()]) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, io["gen0_images"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name, model", [("var_vqvae", "var_l2"), ("llamagen_vq", "llamagen_c2i")])
def test_tokenizers_code_and_decode_as_the_authors(name, model, tmp_path):
    io, pipe = arrays(f"{name}.io"), pipeline(model, tmp_path)
    assert pipe.tokenize(io["images"].float()).equal(io["tokens"].long())
    with torch.no_grad():
        decoded = decode_codes(pipe.vqvae, pipe.codes[io["decode_tokens"].long()])
    torch.testing.assert_close(decoded, io["decoded"], rtol=0, atol=1e-4)


def test_the_pyramid_of_var_is_the_authors(tmp_path):
    io, pipe = arrays("var_vqvae.io"), pipeline("var_l2", tmp_path)
    given, total = pipe.vqvae.pyramid().inputs(pipe.codes[io["decode_tokens"].long()])
    torch.testing.assert_close(total, io["f_hat"], rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat(given, 1), io["var_input"], rtol=0, atol=1e-5)
