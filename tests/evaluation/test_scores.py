"""CLIP scores against cosines by hand, CLIP and DINOv2 as extractors, Inception score, LPIPS, adapters."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

from fewstep.errors import FewstepError
from fewstep.evaluation import measures, protocols
from fewstep.evaluation.evaluate import evaluate_images
from fewstep.evaluation.metrics import inception_score
from fewstep.vision import clip as clip_module
from fewstep.vision.clip import Clip
from fewstep.vision.extractor import file_sha256, identity
from fewstep.vision.extractors import get_extractor
from fewstep.vision.lpips import BACKBONES, find_lpips, lpips_diversity
from fewstep.vision.preprocess import center_crop, pil_resize
from fewstep.vision.scores import get_scorer

CAPTIONS = ["a red apple", "a cat on a mat", "blue", "crescent moon over the sea"]


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 40, 56, 3)).astype(np.uint8))


def by_hand(folder, images, captions):
    """Cosines one pair at a time, by the model's own forward."""
    from transformers import AutoTokenizer, CLIPModel

    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    cosines = []
    for image, caption in zip(images, captions):
        width = int(32 * image.shape[1] / image.shape[0])
        resized = Image.fromarray(image.numpy()).resize((width, 32), Image.Resampling.BICUBIC)
        left = round((width - 32) / 2)
        x = np.asarray(resized.crop((left, 0, left + 32, 32))).astype(np.float32) / 255
        x = (x - np.array(clip_module.MEAN, np.float32)) / np.array(clip_module.STD, np.float32)
        tokens = tokenizer([caption], return_tensors="pt")
        with torch.no_grad():
            out = model(pixel_values=torch.from_numpy(x).permute(2, 0, 1)[None], **tokens)
        cosines.append(cosine_similarity(out.image_embeds, out.text_embeds).item())
    return cosines


@pytest.mark.parametrize("version", [4, 5])
def test_cosines_by_hand_with_the_outputs_of_both_transformers(clip_folder, images, version, monkeypatch):
    model = Clip(str(clip_folder))
    if version == 4:  # tensors instead of objects
        for name in ("get_image_features", "get_text_features"):
            method = getattr(model.model, name)

            def plain(method=method, **inputs):
                out = method(**inputs)
                return out if isinstance(out, torch.Tensor) else out.pooler_output

            monkeypatch.setattr(model.model, name, plain)
    expected = by_hand(clip_folder, images, CAPTIONS)
    assert model.cosines(model.prepare(images), CAPTIONS).tolist() == pytest.approx(expected, abs=1e-5)
    assert np.std(expected) > 0.01


def test_prefix_scale_and_preparation_come_from_the_protocol(clip_folder, images):
    prefixed = by_hand(clip_folder, images, ["A photo depicts " + c for c in CAPTIONS])
    score = get_scorer(f"clip:{clip_folder}", clip={"prefix": "A photo depicts ", "scale": 100})
    assert score(images, CAPTIONS).tolist() == pytest.approx([100 * c for c in prefixed], abs=1e-3)
    coco = protocols.load("coco2014-30k").clip
    score = get_scorer(f"clip:{clip_folder}", clip=coco)
    chained = pil_resize(center_crop(images), 256, "lanczos")
    expected = by_hand(clip_folder, chained, ["A photo depicts " + c for c in CAPTIONS])
    assert score(images, CAPTIONS).tolist() == pytest.approx(expected, abs=1e-5)


def test_long_captions_are_cut_like_short_ones_are_padded(clip_folder):
    model = Clip(str(clip_folder))
    both = model.texts(["a cat", "x" * 200])
    assert torch.allclose(both[:1], model.texts(["a cat"]), atol=1e-5)
    assert torch.allclose(both[1:], model.texts(["x" * 300]), atol=1e-5)


def test_preference_models_use_their_own_scale(clip_folder, images):
    cosines = by_hand(clip_folder, images, CAPTIONS)
    square = images[
        :, 4:36, 12:44
    ].contiguous()  # of the network's size: HPSv2's own resize has nothing to do
    for kind, label in (("pickscore", "PickScore"), ("hpsv2.1", "HPSv2.1")):
        if kind == "hpsv2.1":
            images, cosines = square, by_hand(clip_folder, square, CAPTIONS)
        scorer = get_scorer(f"{kind}:{clip_folder}")
        assert scorer.label == label and scorer.name == "tiny-clip"
        expected = [np.exp(2.0) * c for c in cosines]
        assert scorer(images, CAPTIONS).tolist() == pytest.approx(expected, abs=1e-4)


def test_every_batch_has_captions_of_its_own(clip_folder, images, pool, monkeypatch):
    asked = {
        "extractor": pool,
        "metrics": ("vendi",),
        "captions": CAPTIONS,
        "scorers": [f"clip:{clip_folder}"],
    }
    monkeypatch.setattr(measures, "BATCH", 3)
    entry = evaluate_images(images, images, **asked)["metrics"]["CLIP score(tiny-clip)"]
    assert entry["value"] == pytest.approx(np.mean(by_hand(clip_folder, images, CAPTIONS)), abs=1e-5)


def test_scores_have_errors_labels_and_hashes(clip_folder, images, pool):
    options = {"extractor": pool, "metrics": ("vendi",), "captions": CAPTIONS}
    result = evaluate_images(
        images, images, scorers=[f"clip:{clip_folder}", f"pickscore:{clip_folder}"], **options
    )
    entry = result["metrics"]["CLIP score(tiny-clip)"]
    cosines = by_hand(clip_folder, images, CAPTIONS)
    assert entry["value"] == pytest.approx(np.mean(cosines), abs=1e-5)
    assert entry["error"] == pytest.approx(np.std(cosines, ddof=1) / 2, abs=1e-5)
    assert entry["weights_sha256"] == file_sha256(clip_folder / "model.safetensors")
    assert "PickScore(tiny-clip)" in result["metrics"]
    label = protocols.load("coco2014-30k").label("CLIP score", "tiny-clip", 5000, whole=True)
    assert label == "CLIP score-5k(tiny-clip, coco2014-30k, which wants 30k)"
    for captions in (None, CAPTIONS[:3]):
        with pytest.raises(FewstepError, match="captions for 4 images"):
            evaluate_images(
                images, images, scorers=[f"clip:{clip_folder}"], **{**options, "captions": captions}
            )


def test_clip_and_dinov2_are_extractors(clip_folder, images, tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "tiny-dino")
    clip, dino = get_extractor(f"clip:{clip_folder}"), get_extractor(f"dinov2:{tmp_path}/tiny-dino")
    assert clip(images).shape == (4, 12) and dino(images).shape == (4, 16)
    assert identity(clip)["extractor"] == "clip:tiny-clip" and identity(dino)["resize"] == "pil-bicubic-224"
    assert identity(dino)["weights_sha256"] == file_sha256(tmp_path / "tiny-dino" / "model.safetensors")
    resized = np.stack(
        [Image.fromarray(x.numpy()).resize((224, 224), Image.Resampling.BICUBIC) for x in images]
    )
    x = (resized / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        expected = model(torch.from_numpy(x).float().permute(0, 3, 1, 2)).pooler_output
    torch.testing.assert_close(dino(images), expected, rtol=1e-4, atol=1e-5)
    result = evaluate_images(images, images, extractor=f"clip:{clip_folder}", metrics=("fd",))
    assert "FD(clip:tiny-clip)" in result["metrics"]


def test_models_that_are_not_there_or_another_kind(clip_folder, tmp_path):
    for spec, message in [
        ("clip:no/such-model", "neither a folder nor in the cache"),
        (f"clip:{tmp_path}", "cannot be loaded as CLIPModel"),
        ("open_clip:ViT-g-14:nowhere.bin", "weights on disk"),
        ("magic:x", "unknown scorer 'magic:x'"),
        ("clip:", "unknown scorer"),
    ]:
        with pytest.raises(FewstepError, match=message):
            get_scorer(spec)
    with pytest.raises(FewstepError, match=r"cannot be loaded as Dinov2Model|lacks"):
        get_extractor(f"dinov2:{clip_folder}")
    shutil.copytree(clip_folder, tmp_path / "pickled")
    state = tmp_path / "pickled" / "model.safetensors"
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    state.unlink()
    with pytest.raises(FewstepError, match="safetensors"):
        get_scorer(f"clip:{tmp_path}/pickled")


def test_inception_score_closed_forms():
    sure = 50 * torch.eye(5)[torch.arange(100) % 5]
    assert inception_score(sure)[0] == pytest.approx(5)  # sure and evenly varied: the number of classes
    assert inception_score(torch.zeros(100, 5)) == (pytest.approx(1), pytest.approx(0))  # unsure
    assert inception_score(50 * torch.eye(5)[torch.zeros(100, dtype=int)])[0] == pytest.approx(1)  # collapsed
    logits = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double()
    p = logits.softmax(1)
    kl = (p * (p.log() - p.mean(0).log())).sum(1).mean()
    assert inception_score(logits, splits=1)[0] == pytest.approx(kl.exp().item())
    with pytest.raises(ValueError, match="at least 20"):
        inception_score(logits[:10])


def test_inception_score_needs_a_classifier(pictures, pool):
    with pytest.raises(FewstepError, match="is: it needs a classifier, which pool has not"):
        evaluate_images(pictures, pictures, extractor=pool, metrics=("is",))
    pool.classify = lambda features: features[:, :10]
    entry = evaluate_images(pictures, pictures, extractor=pool, metrics=("is",))["metrics"]["IS(pool)"]
    assert 1 < entry["value"] < 10 and entry["error"] > 0
    effnet = get_extractor("effnet-lite0@64")
    features = effnet(torch.from_numpy(pictures[:2]))
    assert effnet.classify(features).shape == (2, 1000)


def test_lpips_diversity_is_over_pairs_of_a_prompt(monkeypatch, tmp_path, pool):
    images = torch.tensor([0, 0, 0, 0, 255, 255]).to(torch.uint8)[:, None, None, None].expand(6, 4, 4, 3)
    groups = torch.tensor([0, 0, 0, 1, 1, 1])

    def distance(a, b):
        assert a.min() >= -1 and a.max() <= 1
        return (a - b).abs().mean((1, 2, 3), keepdim=True)

    value, error = lpips_diversity(images, groups, distance)
    assert value == pytest.approx((0 + 2 * 2 / 3) / 2) and error == pytest.approx(2 / 3)
    with monkeypatch.context() as patch:  # images of unlike sizes have features, and no distance between them
        patch.setattr(measures, "find_lpips", lambda: distance)
        for name, sizes in (("one", [8] * 6), ("two", [8] * 5 + [9])):
            (tmp_path / name).mkdir()
            for i, size in enumerate(sizes):
                Image.new("RGB", (size, size), (40 * i, 0, 0)).save(tmp_path / name / f"{i}.png")
            asked = {"extractor": pool, "metrics": ("diversity",), "groups": groups}
            found = evaluate_images(tmp_path / name, tmp_path / name, **asked)["metrics"]
            assert list(found) == ["diversity(pool)", "LPIPS diversity(alex)"][: 2 if name == "one" else 1]
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert find_lpips() is None  # no backbone here, and none is downloaded
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / BACKBONES["alex"]).write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", None)
    assert find_lpips() is None


@pytest.mark.weights
@pytest.mark.parametrize(
    "spec, low, high",
    [
        ("clip:openai/clip-vit-large-patch14", 0.0, 0.5),
        ("pickscore:yuvalkirstain/PickScore_v1", 5, 30),
        (f"hpsv2.1:{os.environ.get('FEWSTEP_HPSV21', 'path/of/HPSv2.1')}", 0, 50),
        (f"imagereward:{os.environ.get('FEWSTEP_IMAGEREWARD', 'path/of/ImageReward')}", -5, 5),
    ],
)
def test_published_models_prefer_the_caption_that_is_true(spec, low, high):
    """On plain colours, with weights that were downloaded before."""
    images = torch.zeros(2, 224, 224, 3, dtype=torch.uint8)
    images[0, ..., 0], images[1, ..., 2] = 255, 255
    scorer = get_scorer(spec)
    true = scorer(images, ["a plain red background", "a plain blue background"])
    false = scorer(images, ["a plain blue background", "a plain red background"])
    assert (true > false).all() and low < true.mean() < high


@pytest.mark.weights
def test_the_published_inception_tells_a_photograph_from_noise():
    """The file is that of the hash, its classifier is sure of structure only, and a set has no distance to itself."""
    extractor = get_extractor("inception-2015")
    y, x = np.mgrid[:299, :299]
    rings = np.stack([((np.hypot(y - 150, x - 150) / (5 + i)).astype(int) % 2 * 255) for i in range(4)])
    noise = np.random.default_rng(0).integers(0, 256, (4, 299, 299, 3)).astype(np.uint8)
    images = torch.from_numpy(np.concatenate([rings[..., None].repeat(3, 3).astype(np.uint8), noise]))
    features = extractor(images)
    assert features.shape == (8, 2048) and (features >= 0).all() and 0.2 < features.mean() < 0.8
    same = evaluate_images(images.numpy(), images.numpy(), protocol="folder-clean", metrics=["fd"])["metrics"]
    assert same["FID(folder-clean)"]["value"] == pytest.approx(0, abs=1e-6)


@pytest.mark.weights
def test_published_dinov2_and_lpips_see_likeness():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (2, 7, 7, 3)).repeat(32, 1).repeat(32, 2).astype(np.uint8)
    near = (base.astype(int) + rng.integers(-8, 9, base.shape)).clip(0, 255).astype(np.uint8)
    dino = get_extractor("dinov2:facebook/dinov2-large")
    a, b = dino(torch.from_numpy(base)), dino(torch.from_numpy(near))
    assert dino.dim == 1024 and (cosine_similarity(a, b) > cosine_similarity(a, b.flip(0))).all()
    distance = find_lpips()
    assert distance is not None, (
        f"{BACKBONES['alex']} is not in torch.hub's cache, or fewstep[fid] not installed"
    )
    x, y = (torch.from_numpy(z).permute(0, 3, 1, 2) / 127.5 - 1 for z in (base, near))
    assert (distance(x, y).flatten() < distance(x, y.flip(0)).flatten()).all()


def test_open_clip_from_a_file(images, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-test.json")
    model = open_clip.create_model("tiny-test").eval()
    torch.save(model.state_dict(), tmp_path / "w.bin")
    scorer = get_scorer(f"open_clip:tiny-test:{tmp_path}/w.bin")
    x = model.encode_text(open_clip.get_tokenizer("tiny-test")(CAPTIONS))
    torch.testing.assert_close(scorer.clip.texts(CAPTIONS), x.detach())
    assert scorer(images, CAPTIONS).shape == (4,)


def test_cli_scores(clip_folder, images, tmp_path, capsys):
    from fewstep.cli import main

    np.savez(tmp_path / "fake.npz", images=images.numpy())
    (tmp_path / "p.txt").write_text("\n".join(CAPTIONS[:2]))
    words = ["eval", "scores", str(tmp_path / "fake.npz"), "--prompts", str(tmp_path / "p.txt")]
    words += ["--scorer", f"clip:{clip_folder}", "--out", str(tmp_path / "r.json")]
    assert main([*words, "--per-prompt", "2"]) == 0
    metrics = json.loads((tmp_path / "r.json").read_text())["metrics"]
    doubled = [c for c in CAPTIONS[:2] for _ in range(2)]
    assert metrics["CLIP score(tiny-clip)"]["value"] == pytest.approx(
        np.mean(by_hand(clip_folder, images, doubled)), abs=1e-5
    )
    assert main([*words, "--num", "2", "--protocol", "coco2014-30k"]) == 0
    assert "CLIP score-2(tiny-clip, coco2014-30k, which wants 30k)" in capsys.readouterr().out
    assert main(words) == 2
    assert "4 images for 2 prompts, expected 2" in (error := capsys.readouterr().err) and "--num 2" in error
