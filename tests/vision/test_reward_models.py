"""ImageReward and the aesthetic predictor: published names of weights, the published arithmetic, and a gradient."""

import itertools
import json
import math
import os
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPModel

from fewstep.errors import FewstepError, RecipeError
from fewstep.vision.clip import MEAN, STD, pooled
from fewstep.vision.extractor import file_sha256
from fewstep.vision.reward import load_reward, of_latents
from fewstep.vision.reward_models import ImageReward, Regression, prepared
from fewstep.vision.scores import get_scorer

WIDTH, TEXT, DEPTH, PATCH, GRID, HEADS = 128, 32, 2, 4, 4, 2
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "dog", "on", "mat"]
PROMPTS = ["a red cat", "a dog on a mat"]
MED = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": TEXT,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 40,
    "model_type": "bert",
    "num_attention_heads": HEADS,
    "num_hidden_layers": DEPTH,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": len(WORDS),
    "encoder_width": 768,
    "add_cross_attention": True,
}


def published():
    """A state dict with the names of the published checkpoint: the layout of BLIP's authors."""
    torch.manual_seed(0)
    shapes = {
        "visual_encoder.cls_token": (1, 1, WIDTH),
        "visual_encoder.pos_embed": (1, GRID**2 + 1, WIDTH),
        "visual_encoder.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "visual_encoder.patch_embed.proj.bias": (WIDTH,),
    }

    def linear(name, out, into):
        shapes.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    def norm(name, width):
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    norm("visual_encoder.norm", WIDTH)
    for i in range(DEPTH):
        block = f"visual_encoder.blocks.{i}"
        norm(f"{block}.norm1", WIDTH)
        norm(f"{block}.norm2", WIDTH)
        linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
        linear(f"{block}.attn.proj", WIDTH, WIDTH)
        linear(f"{block}.mlp.fc1", 2 * WIDTH, WIDTH)
        linear(f"{block}.mlp.fc2", WIDTH, 2 * WIDTH)
    shapes["text_encoder.embeddings.word_embeddings.weight"] = (len(WORDS), TEXT)
    shapes["text_encoder.embeddings.position_embeddings.weight"] = (40, TEXT)
    norm("text_encoder.embeddings.LayerNorm", TEXT)
    for i in range(DEPTH):
        layer = f"text_encoder.encoder.layer.{i}"
        for kind, into in (("attention", TEXT), ("crossattention", WIDTH)):
            linear(f"{layer}.{kind}.self.query", TEXT, TEXT)
            linear(f"{layer}.{kind}.self.key", TEXT, into)
            linear(f"{layer}.{kind}.self.value", TEXT, into)
            linear(f"{layer}.{kind}.output.dense", TEXT, TEXT)
            norm(f"{layer}.{kind}.output.LayerNorm", TEXT)
        linear(f"{layer}.intermediate.dense", 48, TEXT)
        linear(f"{layer}.output.dense", TEXT, 48)
        norm(f"{layer}.output.LayerNorm", TEXT)
    linear("vision_proj", 8, WIDTH)
    linear("text_proj", 8, TEXT)
    state = {}
    for name, shape in shapes.items():
        normed = re.search(r"(norm\d?|LayerNorm)\.weight$", name)
        fan_in = math.prod(shape[1:]) if name.endswith("weight") and "embeddings" not in name else 4
        state[f"blip.{name}"] = torch.randn(shape) / math.sqrt(fan_in) + (1.0 if normed else 0.0)
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    widths = [TEXT, 1024, 128, 64, 16, 1]
    for place, (into, out) in zip((0, 2, 4, 6, 7), itertools.pairwise(widths)):
        state[f"mlp.layers.{place}.weight"] = torch.randn(out, into) / math.sqrt(into)
        state[f"mlp.layers.{place}.bias"] = 0.1 * torch.randn(out)
    return state


def attend(q, k, v, heads, mask=None):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def by_hand(state, pixels, ids, mask):
    """The published model, written out: ViT, BERT with cross-attention, regression on the first token."""

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    see, read = "blip.visual_encoder.", "blip.text_encoder."
    weight, bias = (state[f"{see}patch_embed.proj.{n}"] for n in ("weight", "bias"))
    x = F.conv2d(pixels, weight, bias, PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([state[f"{see}cls_token"].expand(len(x), -1, -1), x], 1) + state[f"{see}pos_embed"]
    for i in range(DEPTH):
        block = f"{see}blocks.{i}"
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}.attn.proj", attend(*qkv, WIDTH // 64))
        x = x + linear(
            f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6)))
        )
    seen = norm(f"{see}norm", x, 1e-6)
    h = state[f"{read}embeddings.word_embeddings.weight"][ids]
    h = h + state[f"{read}embeddings.position_embeddings.weight"][: ids.shape[1]]
    h = norm(f"{read}embeddings.LayerNorm", h, 1e-12)
    for i in range(DEPTH):
        layer = f"{read}encoder.layer.{i}"
        for kind, source, visible in (("attention", None, mask), ("crossattention", seen, None)):
            own, part = f"{layer}.{kind}.self", h if source is None else source
            out = attend(
                linear(f"{own}.query", h),
                linear(f"{own}.key", part),
                linear(f"{own}.value", part),
                HEADS,
                visible,
            )
            h = norm(
                f"{layer}.{kind}.output.LayerNorm", h + linear(f"{layer}.{kind}.output.dense", out), 1e-12
            )
        out = linear(f"{layer}.output.dense", F.gelu(linear(f"{layer}.intermediate.dense", h)))
        h = norm(f"{layer}.output.LayerNorm", h + out, 1e-12)
    y = h[:, 0]
    for place in (0, 2, 4, 6, 7):
        y = linear(f"mlp.layers.{place}", y)
    return (y[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("imagereward")
    torch.save(published(), place / "ImageReward.pt")
    (place / "med_config.json").write_text(json.dumps(MED))
    (place / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return place


def images(rows=2):
    return torch.rand(rows, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def test_image_reward_is_the_published_arithmetic_on_the_published_names(folder):
    score = load_reward(f"imagereward:{folder}")
    ids = torch.zeros(2, 35, dtype=torch.long)
    for row, prompt in enumerate(PROMPTS):
        tokens = [2, *(WORDS.index(w) for w in prompt.split()), 3]
        ids[row, : len(tokens)] = torch.tensor(tokens)
    expected = by_hand(published(), prepared(images(), GRID * PATCH), ids, ids > 0)
    torch.testing.assert_close(score(images(), PROMPTS), expected, rtol=1e-4, atol=1e-5)
    assert (score(images(), PROMPTS) - score(images(), PROMPTS[::-1])).abs().min() > 1e-2  # the prompt counts
    assert (score(images(), PROMPTS) - score(images().flip(0), PROMPTS)).abs().min() > 1e-2  # and the image


def test_evaluation_scores_with_the_same_model_behind_its_authors_resize(folder):
    seen = (images() * 255).to(torch.uint8)
    scorer = get_scorer(f"imagereward:{folder}")
    made = scorer(seen.permute(0, 2, 3, 1), PROMPTS)
    resized = [
        Image.fromarray(x.permute(1, 2, 0).numpy()).resize((GRID * PATCH,) * 2, Image.BICUBIC) for x in seen
    ]
    pixels = torch.from_numpy(np.stack([np.asarray(x) for x in resized])).permute(0, 3, 1, 2) / 255
    shift, scale = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    expected = ImageReward(str(folder)).score((pixels - shift) / scale, PROMPTS)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    assert scorer.weights_sha256 == file_sha256(folder / "ImageReward.pt") and not made.requires_grad
    with pytest.raises(FewstepError, match="imagereward:FOLDER"):
        get_scorer("imagereward")


def test_safetensors_are_the_same_weights(folder, tmp_path):
    for name in ("med_config.json", "vocab.txt"):
        (tmp_path / name).write_text((folder / name).read_text())
    save_file(published(), tmp_path / "ImageReward.safetensors")
    score, other = load_reward(f"imagereward:{folder}"), load_reward(f"imagereward:{tmp_path}")
    assert score(images(), PROMPTS).equal(other(images(), PROMPTS))


@pytest.fixture(scope="module")
def aesthetic(clip_folder, tmp_path_factory):
    """A spec of the aesthetic predictor on a tiny CLIP, that CLIP, and the head's weights by the published names."""
    file = tmp_path_factory.mktemp("aesthetic") / "head.pth"
    clip = CLIPModel.from_pretrained(clip_folder).eval()
    torch.manual_seed(1)
    state = Regression(clip.config.projection_dim).state_dict()
    torch.save(state, file)
    return f"aesthetic:{clip_folder}:{file}", clip, state


def test_the_aesthetic_score_is_a_regression_on_clips_direction_whatever_the_prompt(aesthetic):
    spec, clip, state = aesthetic
    assert set(state) == {f"layers.{i}.{n}" for i in (0, 2, 4, 6, 7) for n in ("weight", "bias")}
    assert [len(state[f"layers.{i}.bias"]) for i in (0, 2, 4, 6, 7)] == [1024, 128, 64, 16, 1]
    score = load_reward(spec)
    size = clip.config.vision_config.image_size
    with torch.no_grad():
        y = F.normalize(pooled(clip.get_image_features(pixel_values=prepared(images(), size))), dim=1)
        for i in (0, 2, 4, 6, 7):
            y = F.linear(y, state[f"layers.{i}.weight"], state[f"layers.{i}.bias"])
    torch.testing.assert_close(score(images(), PROMPTS), y[:, 0])
    assert score(images(), PROMPTS).equal(score(images(), PROMPTS[::-1]))


def test_both_have_a_gradient_in_the_image_and_none_in_their_weights(folder, aesthetic, sdxl):
    for spec in (f"imagereward:{folder}", aesthetic[0]):
        score = load_reward(spec)
        x = images().double().float().requires_grad_()
        (gradient,) = torch.autograd.grad(score(x, PROMPTS).sum(), x)
        step = 1e-2 * F.normalize(gradient.flatten(1), dim=1).view_as(x)
        with torch.no_grad():
            change = (score(x + step, PROMPTS) - score(x - step, PROMPTS)).sum()
        assert change.item() == pytest.approx(2 * (gradient * step).sum().item(), rel=0.05) and change > 0
        latents = torch.randn(2, *sdxl.latent_shape).requires_grad_()
        value = of_latents(score, sdxl, PROMPTS)(latents, torch.tensor([0, 1]))
        assert torch.autograd.grad(value.sum(), latents)[0].abs().sum() > 0
        parts = [part for part in vars(score).values() if isinstance(part, torch.nn.Module)]
        assert parts and not any(p.requires_grad for part in parts for p in part.parameters())


def test_what_is_no_such_model_is_refused(folder, aesthetic, tmp_path):
    spec = aesthetic[0]
    state = published()
    for name in ("med_config.json", "vocab.txt"):
        (tmp_path / name).write_text((folder / name).read_text())

    def refused(spec, message):
        with pytest.raises(RecipeError, match=message) as refusal:
            load_reward(spec)
        assert str(refusal.value).startswith("method.reward")

    refused(f"imagereward:{tmp_path}", r"ImageReward\.pt cannot be loaded")
    lacking = {k: v for k, v in state.items() if "norm2" not in k}
    torch.save(lacking, tmp_path / "ImageReward.pt")
    refused(f"imagereward:{tmp_path}", r"does not fit BlipVisionModel: .*layer_norm2")
    torch.save({k: v for k, v in state.items() if "visual" not in k}, tmp_path / "ImageReward.pt")
    refused(f"imagereward:{tmp_path}", "no weights of ImageReward")
    torch.save({k: v for k, v in state.items() if not k.startswith("mlp")}, tmp_path / "ImageReward.pt")
    refused(f"imagereward:{tmp_path}", "does not fit Regression")
    (tmp_path / "vocab.txt").unlink()
    refused(f"imagereward:{tmp_path}", r"vocab\.txt does not exist")
    (tmp_path / "code.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    clip = spec.split(":")[1]
    refused(f"aesthetic:{clip}:{tmp_path / 'code.pth'}", r"code\.pth cannot be loaded")
    refused(f"aesthetic:{clip}:{folder / 'ImageReward.pt'}", "does not fit Regression")
    refused(f"aesthetic:/nowhere:{tmp_path / 'code.pth'}", "does not exist")
    refused(f"aesthetic:{clip}", "neither a folder|cannot be loaded")


@pytest.mark.weights
@pytest.mark.parametrize(
    "spec, low, high",
    [
        (f"imagereward:{os.environ.get('FEWSTEP_IMAGEREWARD', 'path/of/ImageReward')}", -5, 5),
        (f"aesthetic:openai/clip-vit-large-patch14:{os.environ.get('FEWSTEP_AESTHETIC', 'predictor.pth')}", 1, 10),
    ],
)  # fmt: skip
def test_published_rewards_are_within_their_range_and_prefer_a_true_prompt(spec, low, high):
    score = load_reward(spec)
    red = torch.zeros(2, 3, 224, 224)
    red[:, 0] = 1.0
    true, false = score(red, ["a plain red background", "a plain blue background"]).tolist()
    assert low < true < high
    assert true > false if spec.startswith("imagereward") else true == false
