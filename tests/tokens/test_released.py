"""VAR-DD and LlamaGen-DD, the released students of Distilled Decoding, against forwards written down here.

The forwards below are a second implementation, of the order of operations in the released inference code
(microsoft/distilled_decoding, commit 3b95d33f), by plain functions on tensors under their published names.
"""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from fewstep.cli import main
from fewstep.diffusion.cond import Cond
from fewstep.diffusion.rng import Rng
from fewstep.errors import FewstepError
from fewstep.export import load_exported
from fewstep.runs.starts import find
from fewstep.tokens.convert import llamagen, var
from fewstep.tokens.llamagen import LlamaGenVQ
from fewstep.tokens.pipeline import LlamaGenPipeline, codes_of
from fewstep.tokens.state import read_weights
from fewstep.tokens.students import ParallelStudent
from fewstep.tokens.var import VAR, MultiScaleVQ

WIDTH, DEPTH, HEADS, CODES, DIM, CLASSES = 32, 2, 2, 16, 8, 3
SIDES, TOKENS = (1, 2, 3), {"var": 14, "llamagen": 16}
SPLIT, ENTRIES = {"var": 5, "llamagen": 6}, {"var": [0, 5], "llamagen": [0, 6]}
SMALL = {"ch": 32, "ch_mult": (1, 1), "blocks": 1}


# ---------------------------------------------------------------------------------------- files as they are published
def random_state(kind):
    """Every tensor of a released student of a small size, random."""
    shapes = {"n_d_embed.weight": (2, WIDTH), "final_layer_conti.linear.weight": (DIM, WIDTH)}
    shapes |= {"final_layer_conti.linear.bias": (DIM,), "final_layer_conti.scale_shift_table": (2, WIDTH)}
    linear = {}
    if kind == "var":
        shapes |= {"pos_start": (1, 1, WIDTH), "pos_1LC": (1, 15, WIDTH), "lvl_embed.weight": (4, WIDTH)}
        shapes |= {"class_emb.weight": (CLASSES + 1, WIDTH)}
        linear |= {
            "word_embed": (WIDTH, DIM),
            "head_nm.ada_lin.1": (2 * WIDTH, WIDTH),
            "head": (CODES, WIDTH),
        }
        linear |= {f"layerwise_n_d_embed.{i}": (WIDTH, WIDTH) for i in range(DEPTH + 1)}
        for i in range(DEPTH):
            shapes |= {f"blocks.{i}.attn.{n}": (WIDTH,) for n in ("q_bias", "v_bias")}
            shapes |= {f"blocks.{i}.attn.scale_mul_1H11": (1, HEADS, 1, 1)}
            shapes |= {f"blocks.{i}.attn.mat_qkv.weight": (3 * WIDTH, WIDTH)}
            linear |= {f"blocks.{i}.attn.proj": (WIDTH, WIDTH), f"blocks.{i}.ada_lin.1": (6 * WIDTH, WIDTH)}
            linear |= {f"blocks.{i}.ffn.fc1": (4 * WIDTH, WIDTH), f"blocks.{i}.ffn.fc2": (WIDTH, 4 * WIDTH)}
    else:
        width = 64  # one head
        shapes = {name: tuple(width if n == WIDTH else n for n in shape) for name, shape in shapes.items()}
        shapes |= {"cls_embedding.embedding_table.weight": (CLASSES + 1, width), "norm.weight": (width,)}
        shapes |= {"output.weight": (CODES, width)}
        linear |= {"tok_embeddings": (width, DIM)}
        for i in range(DEPTH):
            shapes |= {f"layers.{i}.{n}.weight": (width,) for n in ("attention_norm", "ffn_norm")}
            shapes |= {f"layers.{i}.attention.wqkv.weight": (3 * width, width)}
            shapes |= {f"layers.{i}.attention.wo.weight": (width, width)}
            shapes |= {f"layers.{i}.feed_forward.{n}.weight": (192, width) for n in ("w1", "w3")}
            shapes |= {f"layers.{i}.feed_forward.w2.weight": (width, 192)}
    shapes |= {f"{name}.weight": shape for name, shape in linear.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    return {name: 0.3 * Rng("released", name).normal(*shape) for name, shape in shapes.items()}


def files(kind, folder, change=None):
    """(state of the student, its tokenizer), and files of both, nested as they are released."""
    state = random_state(kind)
    torch.manual_seed(0)
    vq = LlamaGenVQ(CODES, DIM, z_channels=32, **SMALL)
    if kind == "var":
        vq = MultiScaleVQ(CODES, DIM, patch_nums=SIDES, **SMALL)
    kept = dict(state)
    if change:
        change(kept)
    other = {name: torch.zeros_like(value) for name, value in kept.items()}
    whole = {"model": other, "ema": kept, "steps": 3}
    if kind == "var":  # averages hold no constants, the weights themselves do
        other["lvl_1L"] = torch.zeros(1, 15, dtype=torch.long)
        other["attn_bias_for_masking"] = torch.zeros(1, 1, 15, 15)
        whole = {"iter": 3, "trainer": {"var_wo_ddp": other, "ema_parameters": kept}}
    torch.save(whole, folder / "student.pt")
    torch.save({"model": vq.state_dict()}, folder / "vq.pt")
    return state, vq.eval(), (folder / "student.pt", folder / "vq.pt")


def converted(kind, folder):
    state, vq, paths = files(kind, folder)
    options = {"split": SPLIT[kind], "entries": ENTRIES[kind]}
    pipe = var(*paths, **options) if kind == "var" else llamagen(*paths, tokens=TOKENS[kind], **options)
    return state, codes_of(vq), pipe


# ------------------------------------------------------------------------------------------- the forwards, written down
def plain_norm(x, eps=1e-6):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()


def lin(s, name, x):
    return x @ s[f"{name}.weight"].T + s.get(f"{name}.bias", torch.zeros(()))


def attend(q, k, v, seen, scale):
    """Heads (B, h, L, d); slot i sees the slots j with seen[i, j]."""
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def continuous(s, h, vector):
    shift, scale = s["final_layer_conti.scale_shift_table"][:, None, None] + vector[None, :, None]
    return lin(s, "final_layer_conti.linear", plain_norm(h) * (1 + scale) + shift)


def marks_of(s, known):
    """Row 1 is for what is known, and the condition is; row 0 for noise."""
    rows = torch.cat([torch.ones(len(known), 1, dtype=torch.bool), known], 1)
    return s["n_d_embed.weight"][rows.long()]


def var_dd(s, x, known, labels):
    vector, marks = s["class_emb.weight"][labels], marks_of(s, known)
    level = torch.tensor([0] + [1] + [2] * 4 + [3] * 9)  # the class is a scale of its own
    seen = (level[:, None] > level) | torch.eye(15, dtype=torch.bool)
    h = torch.cat([vector[:, None] + s["pos_start"], lin(s, "word_embed", x)], 1)
    h = h + s["lvl_embed.weight"][level] + s["pos_1LC"] + marks
    for i in range(DEPTH):
        b = f"blocks.{i}"
        gate1, gate2, scale1, scale2, shift1, shift2 = (
            lin(s, f"{b}.ada_lin.1", F.silu(vector))[:, None].unflatten(-1, (6, WIDTH)).unbind(-2)
        )
        inner = plain_norm(h) * (1 + scale1) + shift1
        bias = torch.cat([s[f"{b}.attn.q_bias"], torch.zeros(WIDTH), s[f"{b}.attn.v_bias"]])
        q, k, v = (inner @ s[f"{b}.attn.mat_qkv.weight"].T + bias).split(WIDTH, -1)
        q, k = (F.normalize(heads(part, HEADS), dim=-1) for part in (q, k))
        q = q * s[f"{b}.attn.scale_mul_1H11"].clamp(max=math.log(100)).exp()
        h = h + gate1 * lin(s, f"{b}.attn.proj", attend(q, k, heads(v, HEADS), seen, 1.0))
        h = h + lin(s, f"layerwise_n_d_embed.{i}", marks)  # between the two
        inner = F.gelu(lin(s, f"{b}.ffn.fc1", plain_norm(h) * (1 + scale2) + shift2), approximate="tanh")
        h = h + gate2 * lin(s, f"{b}.ffn.fc2", inner)
    h = h + lin(s, f"layerwise_n_d_embed.{DEPTH}", marks)
    scale, shift = lin(s, "head_nm.ada_lin.1", F.silu(vector))[:, None].chunk(2, -1)
    logits = lin(s, "head", plain_norm(h) * (1 + scale) + shift)
    return logits[:, 1:], continuous(s, h, vector)[:, 1:]


def rms(s, name, x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * s[f"{name}.weight"]


def turned(x):
    """Pairs of numbers of (B, h, 17, 64): half by the row, half by the column; the condition's vanish."""
    pairs, place = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()), torch.arange(16)
    speed = 10000.0 ** -(torch.arange(0, 32, 2) / 32)
    angle = torch.cat([(place // 4)[:, None] * speed, (place % 4)[:, None] * speed], 1)
    factor = torch.cat([torch.zeros(1, 32, dtype=torch.complex64), torch.polar(torch.ones(16, 32), angle)])
    return torch.view_as_real(pairs * factor).flatten(-2)


def llamagen_dd(s, x, known, labels):
    vector = s["cls_embedding.embedding_table.weight"][labels]
    seen = torch.ones(17, 17, dtype=torch.bool).tril()
    h = torch.cat([vector[:, None], lin(s, "tok_embeddings", x)], 1) + marks_of(s, known)
    for i in range(DEPTH):
        q, k, v = lin(s, f"layers.{i}.attention.wqkv", rms(s, f"layers.{i}.attention_norm", h)).chunk(3, -1)
        q, k = turned(heads(q, 1)), turned(heads(k, 1))
        h = h + lin(s, f"layers.{i}.attention.wo", attend(q, k, heads(v, 1), seen, 64**-0.5))
        inner = rms(s, f"layers.{i}.ffn_norm", h)
        w1, w3 = (lin(s, f"layers.{i}.feed_forward.{n}", inner) for n in ("w1", "w3"))
        h = h + lin(s, f"layers.{i}.feed_forward.w2", F.silu(w1) * w3)
    logits = lin(s, "output", rms(s, "norm", h))
    return logits[:, 1:], continuous(s, h, vector)[:, 1:]  # which reads before the last norm


FORWARD = {"var": var_dd, "llamagen": llamagen_dd}


def sequence(kind, s, codes, noise, labels):
    """The released sampler: codes before the split, embeddings behind it; known tokens stay; the noise is one."""
    place, x = torch.arange(TOKENS[kind]), noise
    for entry in ENTRIES[kind]:
        known = (place < entry).expand(len(noise), -1)
        x = torch.where(known[..., None], x, noise)
        logits, embedded = FORWARD[kind](s, x, known, labels)
        made = torch.where((place < SPLIT[kind])[:, None], codes[logits.argmax(-1)], embedded)
        x = torch.where(known[..., None], x, made)
    return x


# ------------------------------------------------------------------------------------------------------------ the tests
@pytest.mark.parametrize("kind", FORWARD)
def test_a_released_student_answers_as_its_authors_code(kind, tmp_path):
    state, _, pipe = converted(kind, tmp_path)
    labels, noise = torch.tensor([0, 2, 1]), Rng("x").normal(3, TOKENS[kind], DIM)
    known = torch.arange(TOKENS[kind]) < torch.tensor([[0], [1], [5]])
    with torch.no_grad():
        found = pipe.transformer(noise, (~known)[..., None].float(), Cond({"label": labels}))
    for mine, theirs in zip(found, FORWARD[kind](state, noise, known, labels)):
        assert theirs.std() > 0.3
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", FORWARD)
def test_a_released_student_is_an_export_that_samples_as_its_authors_code(kind, tmp_path, capsys):
    state, vq, paths = files(kind, tmp_path)
    words = ["convert", kind, "--transformer", str(paths[0]), "--tokenizer", str(paths[1])]
    words += ["--split", str(SPLIT[kind]), "--entries", ",".join(map(str, ENTRIES[kind]))]
    words += ["--tokens", "16"] if kind == "llamagen" else []
    assert main([*words, "--to", str(tmp_path / "out")]) == 0
    pipe, record = load_exported(tmp_path / "out")
    assert (
        record["num_steps"] == 2
        and list(record["steps"]) == ["1", "2"]
        and record["released"] == "student.pt"
    )
    noise = Rng("z").normal(3, TOKENS[kind], DIM)
    made = pipe([0, 2, 1], latents=noise, output_type="latent").images
    theirs = sequence(kind, state, codes_of(vq), noise, torch.tensor([0, 2, 1]))
    torch.testing.assert_close(made, theirs, rtol=0, atol=1e-4)
    assert main(["sample", str(tmp_path / "out"), "--prompt", "2", "--out", str(tmp_path / "a.png")]) == 0
    found = find("student", tmp_path / "out")  # what a role would start from
    assert found.sizes == {name: value.shape for name, value in pipe.transformer.state_dict().items()}
    assert "released as `student.pt`" in (tmp_path / "out" / "README.md").read_text()
    for option, whose in (("--top-k", "a teacher"), ("--text-encoder", "LlamaGen")):
        capsys.readouterr()
        if option == "--text-encoder" and kind == "llamagen":
            continue
        assert main([*words, option, "5", "--to", str(tmp_path / "no")]) == 2
        assert f"{option} 5: is of {whose}, and" in capsys.readouterr().err


@pytest.mark.parametrize("kind", FORWARD)
def test_what_the_files_do_not_say_is_asked_for(kind, tmp_path):
    read = {"var": var, "llamagen": lambda *p, **o: llamagen(*p, tokens=16, **o)}[kind]
    _, _, paths = files(kind, tmp_path)
    with pytest.raises(FewstepError, match=r"a size that was not released: give --split.* and --entries"):
        read(*paths, split=2)
    with pytest.raises(FewstepError, match=r"--split 99: expected a number of tokens, 0 to"):
        read(*paths, split=99, entries=[0])
    for odd in ([0, 99], [1], [0, 5, 1], [0, 0]):
        with pytest.raises(FewstepError, match=r"--entries .*: expected 0 and then rising"):
            read(*paths, split=2, entries=odd)

    def without(state):
        del state["n_d_embed.weight"]  # which says that it is a student
        state["final_layer_conti.extra"] = torch.zeros(1)

    _, _, paths = files(kind, tmp_path, change=without)
    with pytest.raises(FewstepError):
        read(*paths, split=2, entries=[0])

    def less(state):
        del state["final_layer_conti.linear.bias"]

    _, _, paths = files(kind, tmp_path, change=less)
    with pytest.raises(FewstepError, match=r"1 keys: missing final_layer_conti\.linear\.bias"):
        read(*paths, split=2, entries=[0])


@pytest.mark.parametrize("depth, begin", [(16, 55), (20, 30), (24, 30)])
def test_of_a_released_size_split_and_steps_are_known(depth, begin, tmp_path):
    """VAR's sizes are told apart by the depth alone."""

    def deeper(state):
        for i in range(2, depth):
            state |= {
                n.replace("blocks.1.", f"blocks.{i}."): v
                for n, v in state.items()
                if n.startswith("blocks.1.")
            }
        state["layerwise_n_d_embed.2.weight"] = state["layerwise_n_d_embed.0.weight"]
        for i in range(3, depth + 1):
            for part in ("weight", "bias"):
                state[f"layerwise_n_d_embed.{i}.{part}"] = state[f"layerwise_n_d_embed.0.{part}"]
        state["pos_1LC"], state["lvl_embed.weight"] = torch.zeros(1, 681, WIDTH), torch.zeros(11, WIDTH)

    _, _, paths = files("var", tmp_path, change=deeper)
    pipe = var(*paths)
    assert pipe.transformer.config.split == begin and pipe.config.entries == [0, begin]
    assert sum(pipe.backbone.groups[: {55: 5, 30: 4}[begin]]) == begin


def test_students_have_the_sizes_that_were_released():
    """Millions of parameters, as the model cards have them."""

    def size(base, **config):
        with torch.device("meta"):
            student = ParallelStudent(base, config, 16384 if base == "GPT" else 4096, 8, 0, layout=2)
        return sum(p.numel() for p in student.parameters()) / 1e6

    for depth, millions in ((16, 327), (20, 635), (24, 1090)):
        found = size("VAR", depth=depth, width=64 * depth, heads=depth, aligned=True)
        assert found == pytest.approx(millions, rel=4e-3)
    assert size("GPT", code_dim=8) == pytest.approx(98.3, abs=0.05)
    assert size("GPT", code_dim=8, dim=1024, n_layer=24, n_head=16) == pytest.approx(326, abs=0.5)


def test_teachers_are_read_by_their_own_weights_and_students_by_their_averages(tmp_path):
    mine, average = {"a": torch.zeros(1)}, {"a": torch.ones(1)}
    marks = {"n_d_embed.weight": torch.ones(2, 1)}
    for number, (whole, expected) in enumerate([
        ({"model": mine, "ema": average}, mine),
        ({"ema": average, "steps": 3}, average),
        ({"model": {**mine, **marks}, "ema": {**average, **marks}}, average),
        ({"trainer": {"var_wo_ddp": mine, "var_opt": {"state": {}}}}, mine),
        ({"trainer": {"var_wo_ddp": {**mine, **marks}, "ema_parameters": {**average, **marks}}}, average),
    ]):  # fmt: skip
        torch.save(whole, tmp_path / f"{number}.pt")
        assert read_weights(tmp_path / f"{number}.pt")["a"].equal(expected["a"])


def test_the_class_keeps_the_slot_it_was_read_in_and_the_first_token_gets_a_fresh_one():
    torch.manual_seed(0)
    net = VAR(CODES, DIM, DEPTH, WIDTH, HEADS, num_classes=CLASSES, patch_nums=SIDES, num_codes=CODES)
    trunk = ParallelStudent.of(net, torch.randn(CODES, DIM), split=5).trunk
    for mine, theirs in ((trunk.pos_1LC[0], net.pos_1LC[0]), (trunk.lvl_embed.weight, net.lvl_embed.weight)):
        assert mine[0].equal(theirs[0]) and mine[2:].equal(theirs[1:])
        assert not (mine[1, None] == theirs).all(-1).any() and mine[1].std() > 0
    assert trunk.class_emb.weight.equal(net.class_emb.weight)


def test_a_student_of_an_earlier_layout_is_refused(tmp_path):
    _, _, pipe = converted("llamagen", tmp_path)
    pipe.save_pretrained(tmp_path / "export" / "pipeline")
    record = {
        "kind": "full",
        "num_steps": 2,
        "call": {},
        "pipeline_class": "LlamaGenPipeline",
        "teacher": "x",
    }
    (tmp_path / "export" / "fewstep.json").write_text(json.dumps(record))
    assert load_exported(tmp_path / "export")[0].transformer.config.layout == 2
    path = tmp_path / "export" / "pipeline" / "transformer" / "config.json"
    config = json.loads(path.read_text())
    del config["layout"]  # as it was written then
    path.write_text(json.dumps(config))
    refusal = r"transformer\.layout: 1: expected 2: .*distill it anew"
    with pytest.raises(FewstepError, match=refusal):
        LlamaGenPipeline.from_pretrained(tmp_path / "export" / "pipeline")
    with pytest.raises(FewstepError, match=refusal):
        load_exported(tmp_path / "export")


def test_weights_of_an_earlier_layout_have_no_name_in_common_with_what_has_changed(tmp_path):
    """So that runs, checkpoints and starts of that time are refused by name, not taken for something else."""
    for kind in FORWARD:
        (tmp_path / kind).mkdir()
        _, _, pipe = converted(kind, tmp_path / kind)
        names = set(pipe.transformer.state_dict())
        assert not {"marks.weight", "shift_scale.weight", "embed.weight", "embed.bias"} & names
        assert not any(name.startswith("trunk.inject") for name in names)
