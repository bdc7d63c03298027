"""HPSv2.1 from a file laid out as its authors', against the network of open_clip written out."""

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize, pad
from transformers import AutoTokenizer

from fewstep.errors import FewstepError
from fewstep.vision import hps
from fewstep.vision.clip import MEAN, STD
from fewstep.vision.extractor import file_sha256
from fewstep.vision.scores import get_scorer

CAPTIONS = ["a red apple", "a cat on a mat", "blue"]
VISION, TEXT, SHARED, PATCH, SIDE, LENGTH = 160, 128, 24, 8, 32, 77


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 96), "c_proj": nn.Linear(96, width)})

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Tower(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(2))


class Visual(nn.Module):
    def __init__(self):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(VISION))
        self.positional_embedding = nn.Parameter(torch.randn((SIDE // PATCH) ** 2 + 1, VISION))
        self.proj = nn.Parameter(torch.randn(VISION, SHARED))
        self.conv1 = nn.Conv2d(3, VISION, PATCH, PATCH, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(VISION), nn.LayerNorm(VISION)
        self.transformer = Tower(VISION, 2)

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj


class Published(nn.Module):
    """What the file holds, by its names."""

    def __init__(self, words):
        super().__init__()
        self.visual = Visual()
        self.transformer = Tower(TEXT, 2)
        self.token_embedding = nn.Embedding(words, TEXT)
        self.positional_embedding = nn.Parameter(torch.randn(LENGTH, TEXT))
        self.ln_final = nn.LayerNorm(TEXT)
        self.text_projection = nn.Parameter(torch.randn(TEXT, SHARED))
        self.logit_scale = nn.Parameter(torch.tensor(3.0))

    def read(self, tokens, end):
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        mask = torch.full((tokens.shape[1],) * 2, -torch.inf).triu(1)
        for block in self.transformer.resblocks:
            x = block(x, mask)
        first = (tokens == end).int().argmax(1)
        return self.ln_final(x)[torch.arange(len(x)), first] @ self.text_projection


@pytest.fixture
def published(clip_folder, tmp_path):
    """The network, its tokenizer, and a file of it in half precision beside that tokenizer, as published."""
    tokenizer = AutoTokenizer.from_pretrained(clip_folder)
    torch.manual_seed(0)
    network = Published(len(tokenizer)).eval()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    network.half().float()  # so that the file loses nothing
    folder = tmp_path / "hps"
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    state = {name: tensor.half() for name, tensor in network.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state}, folder / hps.FILE)
    return network, tokenizer, folder


def seen(image):
    """The longer side fitted, black beside it, normalised."""
    x = torch.tensor(image, dtype=torch.float32).permute(2, 0, 1)[None] / 255
    height, width = x.shape[2:]
    target = round(height * SIDE / max(height, width)), round(width * SIDE / max(height, width))
    x = nn.functional.interpolate(x, target, mode="bicubic", antialias=True)
    high, wide = SIDE - target[0], SIDE - target[1]
    x = pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@pytest.mark.parametrize("which", ["file", "folder"])
@pytest.mark.parametrize("shape", [(40, 56), (32, 32), (70, 33)])
def test_the_published_file_scores_as_the_published_network(published, which, shape):
    network, tokenizer, folder = published
    scorer = get_scorer(f"hpsv2.1:{folder / hps.FILE if which == 'file' else folder}")
    images = torch.randint(0, 256, (3, *shape, 3), dtype=torch.uint8, generator=torch.manual_seed(1))
    with torch.no_grad():
        pictures = network.visual(torch.cat([seen(image.tolist()) for image in images]))
        texts = []
        for caption in CAPTIONS:
            tokens = tokenizer(caption, return_tensors="pt").input_ids
            texts.append(network.read(tokens, tokenizer.eos_token_id))
        cosines = (normalize(pictures) * normalize(torch.cat(texts))).sum(1)
        expected = network.logit_scale.exp() * cosines
    assert expected.std() > 0.1
    torch.testing.assert_close(scorer(images, CAPTIONS), expected, rtol=1e-4, atol=1e-4)
    assert scorer.label == "HPSv2.1" and scorer.name == hps.FILE
    assert scorer.weights_sha256 == file_sha256(folder / hps.FILE)


def test_nothing_else_is_read(published, tmp_path, monkeypatch):
    _, _, folder = published
    state = torch.load(folder / hps.FILE, weights_only=True)["state_dict"]

    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    cases = {
        "code": ({"state_dict": state, "extra": Code()}, "Weights only|weights_only"),
        "bare": (state, "state_dict"),
        "other": ({"state_dict": {"a": torch.zeros(1)}}, "names are not those of open_clip"),
        "part": (
            {"state_dict": {k: v for k, v in state.items() if "ln_final" not in k}},
            "does not fit CLIP",
        ),
    }
    for name, (content, message) in cases.items():
        torch.save(content, folder / f"{name}.pt")
        with pytest.raises(FewstepError, match=message):
            get_scorer(f"hpsv2.1:{folder / name}.pt")
    assert not (tmp_path / "ran").exists()
    alone = tmp_path / hps.FILE
    torch.save({"state_dict": state}, alone)
    monkeypatch.setattr(hps, "BASE", "no/such")
    with pytest.raises(FewstepError, match=r"hf download no/such tokenizer.json .*--local-dir"):
        get_scorer(f"hpsv2.1:{alone}")


def test_a_picture_is_fitted_and_not_cropped():
    """A mark at the border of a wide image is seen; the crop of CLIP would leave it out."""
    wide = torch.zeros(1, 32, 64, 3, dtype=torch.uint8)
    wide[:, :, :4] = 255
    x = hps.hps_preparation(32)(wide)
    assert x.shape == (1, 3, 32, 32)
    black = -torch.tensor(MEAN) / torch.tensor(STD)
    for corner in (x[0, :, 0, 0], x[0, :, 31, 31]):
        torch.testing.assert_close(corner, black)
    assert (x[0, :, 9:23, 0] > 1).all()
