"""GPT and VAR as teachers: masks, caches, published layouts, pipelines, pairs, exports, and what is refused."""

import json
import os
import random
import signal
import time

import pytest
import torch
from processes import Fork
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from fewstep.data import pairs as pairs_module
from fewstep.data.pairs import check_pairs, load_pairs, make_pairs
from fewstep.data.prompts import load_prompts
from fewstep.diffusion.cond import Cond
from fewstep.diffusion.rng import Rng
from fewstep.errors import FewstepError, RecipeError
from fewstep.teachers.ar import Autoregressive
from fewstep.teachers.tiny.texts import tiny_t5
from fewstep.tokens.codes import CodebookDenoiser, Law
from fewstep.tokens.convert import llamagen, load_weights, read_weights, var
from fewstep.tokens.llamagen import GPT, LlamaGenVQ, rotate
from fewstep.tokens.pipeline import LlamaGenPipeline, VARPipeline, codes_of, decode_codes
from fewstep.tokens.students import CausalStudent, ParallelStudent
from fewstep.tokens.var import PATCHES, VAR, MultiScaleVQ, phi_of

SMALL = {"ch": 32, "ch_mult": (1, 1), "blocks": 1}
SIDES = (1, 2, 3)
LABELS = Cond({"label": torch.tensor([0, 2, 1])})


def randomise(net):
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return net.eval().requires_grad_(False)


def small_gpt(**options):
    torch.manual_seed(0)
    return randomise(GPT(16, 64, 2, 1, 9, **{"num_classes": 3, "multiple_of": 16, **options}))


def small_var():
    torch.manual_seed(0)
    net = randomise(VAR(16, 8, 2, 32, 2, num_classes=3, patch_nums=SIDES, num_codes=16))
    vq = MultiScaleVQ(16, 8, patch_nums=SIDES, **SMALL).eval()
    net.pyramid.take(vq.quantize)
    return net, vq


def gpt_pipeline():
    torch.manual_seed(1)
    return LlamaGenPipeline(small_gpt(), LlamaGenVQ(16, 8, z_channels=32, **SMALL).eval(), top_k=12)


def var_pipeline():
    return VARPipeline(*small_var(), top_k=12, top_p=0.95)


PIPES = {"gpt": gpt_pipeline, "var": var_pipeline}


@pytest.fixture(params=PIPES)
def pipe(request):
    return PIPES[request.param]()


# ------------------------------------------------------------------------------------------------- networks
def seen_by(function, x, move):
    """For each group of tokens: which outputs change when it does."""
    before = function(x)
    return [((function(move(x, i)) - before).abs().amax((0, 2)) > 1e-6).tolist() for i in range(x.shape[1])]


def test_a_teachers_logits_depend_on_earlier_groups_only(pipe):
    net, n = pipe.transformer, pipe.num_tokens
    group = [g for g, size in enumerate(net.groups) for _ in range(size)]

    def move(tokens, i):
        moved = tokens.clone()
        moved[:, i] = (moved[:, i] + 5) % 16
        return moved

    tokens = torch.randint(16, (3, n), generator=torch.Generator().manual_seed(0))
    for i, changed in enumerate(seen_by(lambda x: net(x, LABELS), tokens, move)):
        assert not any(c for j, c in enumerate(changed) if group[j] <= group[i])
        assert all(c for j, c in enumerate(changed) if group[j] > group[i])


def test_pitfall_6_students_have_no_crosstalk_within_a_group(pipe):
    net, codes, n = pipe.transformer, pipe.codes, pipe.num_tokens
    group = [g for g, size in enumerate(net.groups) for _ in range(size)]
    x = Rng("x").normal(3, n, 8)

    def move(x, i):
        moved = x.clone()
        moved[:, i] += 1
        return moved

    parallel = ParallelStudent.of(net, codes, split=n)
    with torch.no_grad():
        for p in parallel.trunk.parameters():  # fresh injections are zero
            p.add_(0.05 * torch.randn_like(p))
    causal = CausalStudent.of(net, codes, head_width=16, head_depth=1)
    time = torch.ones(3, n, 1)
    with torch.no_grad():
        for i, changed in enumerate(seen_by(lambda x: parallel(x, time, LABELS)[0], x, move)):
            assert changed == [j == i or group[j] > group[i] for j in range(n)]
        features = seen_by(lambda x: causal.context(x, LABELS)["features"], x, move)
    for i, changed in enumerate(features):
        assert changed == [group[j] > group[i] for j in range(n)]


def test_the_cache_gives_the_logits_of_the_full_forward(pipe):
    net, n = pipe.transformer, pipe.num_tokens
    tokens = torch.randint(16, (3, n), generator=torch.Generator().manual_seed(0))
    full, begin = net(tokens, LABELS), 0
    logits, cache = net.start(LABELS)
    for group, size in enumerate(net.groups):
        assert torch.allclose(logits, full[:, begin : begin + size], atol=1e-4)
        if group + 1 < len(net.groups):
            logits = net.step(tokens[:, begin : begin + size], group, LABELS, cache)
        begin += size
    known = sum(net.groups[:2])
    after, _ = net.start(LABELS, tokens[:, :known])
    assert torch.allclose(after, full[:, known : known + net.groups[2]], atol=1e-4)


def test_students_start_from_the_teacher(pipe):
    net, codes, n = pipe.transformer, pipe.codes, pipe.num_tokens
    tokens = torch.randint(16, (3, n), generator=torch.Generator().manual_seed(0))
    causal = CausalStudent.of(net, codes)
    assert causal.x0(codes[tokens], torch.ones(3), causal.context(codes[tokens], LABELS)).equal(codes[tokens])
    if isinstance(net, VAR):  # reads embeddings as it is, so its features are the teacher's
        assert torch.allclose(
            causal.trunk.features(codes[tokens], LABELS), net.features(tokens, LABELS), atol=1e-5
        )
        parallel = ParallelStudent.of(net, codes, split=n).trunk
        assert parallel.class_emb.weight.equal(net.class_emb.weight)
    else:
        fitted = causal.trunk.tok_embeddings(codes)
        spread = (net.tok_embeddings.weight - net.tok_embeddings.weight.mean(0)).square().mean()
        assert (fitted - net.tok_embeddings.weight).square().mean() < spread
        assert causal.trunk.layers[0].attention.wqkv.weight.equal(net.layers[0].attention.wqkv.weight)
    assert not any(name.startswith(("output", "head.", "head_nm")) for name in causal.trunk.state_dict())


def test_rotations_turn_rows_and_columns_and_leave_conditions_dark():
    net = small_gpt(cls_token_num=1)
    assert net.rotation.shape == (2, 10, 32) and net.rotation[:, 0].abs().sum() == 0
    q = torch.randn(1, 1, 9, 64)
    turned = rotate(q, net.rotation[:, 1:])
    assert torch.allclose(turned.norm(dim=-1), q.norm(dim=-1), atol=1e-5)
    same = rotate(torch.ones(1, 1, 9, 64), net.rotation[:, 1:])[0, 0]
    products = same @ same.T  # depends on the offset alone
    assert products[0, 1] == pytest.approx(products[3, 4].item(), rel=1e-4)
    assert products[0, 3] == pytest.approx(products[5, 8].item(), rel=1e-4)
    assert small_gpt(rotated_condition=True).rotation[0, 0].eq(1).all()


def test_a_text_condition_may_be_null():
    net = small_gpt(num_classes=None, caption_dim=5, cls_token_num=2, rotated_condition=True)
    tokens = torch.zeros(2, 9, dtype=torch.long)
    text = Cond({"embeds": torch.randn(2, 2, 5), "null": torch.tensor([0, 1])})
    logits = net(tokens, text)
    moved = net(tokens, Cond({"embeds": text["embeds"] + 1, "null": text["null"]}))
    assert not torch.allclose(logits[0], moved[0]) and logits[1].equal(moved[1])


def test_pitfall_11_one_pyramid_in_training_generation_and_decoding():
    net, vq = small_var()
    q = torch.randn(2, 14, 8)
    seen, total = net.pyramid.inputs(q)
    assert [part.shape[1] for part in seen] == [4, 9]
    by_hand = sum(net.pyramid.up(part, k) for k, part in enumerate(q.split([1, 4, 9], 1)))
    assert torch.allclose(total, by_hand, atol=1e-5)
    assert torch.allclose(vq.decode_tokens(q), vq.decoder(vq.post_quant_conv(total)), atol=1e-4)
    assert [phi_of(k, 10) for k in range(10)] == [
        0,
        0,
        1,
        1,
        1,
        2,
        2,
        3,
        3,
        3,
    ]  # numpy's rounding where two are equally near
    conv = vq.quantize.quant_resi.qresi_ls[phi_of(2, 3)]
    last = q[:, 5:].transpose(1, 2).unflatten(-1, (3, 3))  # the last scale is not resized
    assert torch.allclose(net.pyramid.up(q[:, 5:], 2), 0.5 * last + 0.5 * conv(last), atol=1e-5)


def test_residual_tokens_code_what_is_left_over():
    _, vq = small_var()
    tokens = vq.encode_tokens(torch.rand(2, 3, 6, 6) * 2 - 1)
    assert tokens.shape == (2, 14) and tokens.max() < 16


def test_llamagens_codes_have_unit_length_for_its_decoder_and_vars_have_not():
    vq, (_, multi) = LlamaGenVQ(16, 8, z_channels=32, **SMALL).eval(), small_var()
    assert torch.allclose(codes_of(vq).norm(dim=-1), torch.ones(16))
    assert codes_of(multi).equal(multi.quantize.embedding.weight)
    images = decode_codes(vq, codes_of(vq)[torch.zeros(2, 9, dtype=torch.long)])
    assert images.shape == (2, 3, 6, 6)


# ------------------------------------------------------------------------------------------------- generation
def test_a_call_samples_the_same_images_whatever_the_batch(pipe):
    def draw(labels, seeds):
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        return pipe(labels, guidance_scale=2.0, generator=generators, output_type="np").images

    both, one = draw([0, 2], [5, 6]), draw([2], [6])
    assert both.shape == (2, 6, 6, 3) and abs(both[1] - one[0]).max() < 1e-4
    assert abs(draw([0, 2], [7, 8]) - both).max() > 0


def test_guided_generation_is_that_of_the_full_forward(pipe):
    """Token by token without a cache, both branches apart."""
    teacher, noise = pipe.teacher(), Rng("z").normal(3, pipe.num_tokens, 8)
    fast = teacher.flow(noise, LABELS, guidance=2.5)
    slow, begin = torch.zeros_like(fast), 0
    null = Cond({"label": torch.full((3,), 3)})
    for g, size in enumerate(pipe.transformer.groups):
        where = slice(begin, begin + size)
        scale = 1 + 1.5 * teacher.ramp[g]
        u, c = (pipe.transformer(slow, cond)[:, where] for cond in (null, LABELS))
        log_prob = Law(top_k=pipe.config.top_k, top_p=pipe.config.top_p).log_prob(u + scale * (c - u))
        context = Cond({"log_prob": log_prob})
        from fewstep.diffusion.solvers import ode

        x = ode(teacher, noise[:, where], context, 10, end=0.02)
        slow[:, where] = teacher.tokens(x, torch.full((3,), 0.02, dtype=torch.float64), context)
        begin = where.stop
    assert (fast == slow).float().mean() > 0.95  # ties aside
    whole = teacher.context(fast, LABELS, guidance=2.5)["log_prob"]
    assert whole.shape == (3, pipe.num_tokens, 16) and (whole.gather(-1, fast[..., None]) > -torch.inf).all()


def test_pipelines_and_students_survive_saving(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "teacher")
    again = type(pipe).from_pretrained(tmp_path / "teacher")
    call = {"generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    once = pipe([1], **call).images
    call["generator"].manual_seed(0)
    assert again([1], **call).images.equal(once) and again.config.top_k == 12
    student = ParallelStudent.of(pipe.transformer, pipe.codes, split=5)
    second = type(pipe)(student, pipe.vqvae, entries=[0, sum(pipe.transformer.groups[:2])])
    second.save_pretrained(tmp_path / "student")
    loaded = type(pipe).from_pretrained(tmp_path / "student")
    noise = Rng("z").normal(2, pipe.num_tokens, 8)
    made = second([0, 1], latents=noise, output_type="latent").images
    assert loaded([0, 1], latents=noise, output_type="latent").images.equal(made)
    assert not loaded([0, 1], latents=noise, num_inference_steps=1, output_type="latent").images.equal(made)


def test_steps_of_the_teacher_are_guided_as_the_call_says(pipe, monkeypatch):
    n = pipe.num_tokens
    student = type(pipe)(ParallelStudent.of(pipe.transformer, pipe.codes, split=n), pipe.vqvae)
    told, sample = [], CodebookDenoiser.sample

    def spy(self, *given, guidance, **more):
        told.append(guidance)
        return sample(self, *given, guidance=guidance, **more)

    monkeypatch.setattr(CodebookDenoiser, "sample", spy)
    call = {"latents": Rng("z").normal(2, n, 8), "output_type": "latent", "guidance_scale": 3.0}
    student([0, 1], teacher=pipe, resample=(0, n), generator=torch.Generator().manual_seed(3), **call)
    assert told == [3.0]


def test_a_student_may_spend_steps_of_the_teacher(pipe):
    n, begin = pipe.num_tokens, sum(pipe.transformer.groups[:2])
    student = type(pipe)(ParallelStudent.of(pipe.transformer, pipe.codes, split=n), pipe.vqvae)
    call = {"latents": Rng("z").normal(2, n, 8), "output_type": "latent"}
    plain = student([0, 1], **call).images
    generator = torch.Generator().manual_seed(3)
    spliced = student([0, 1], teacher=pipe, resample=(begin, n), generator=generator, **call).images
    assert spliced[:, :begin].equal(plain[:, :begin]) and not spliced[:, begin:].equal(plain[:, begin:])
    one = student.transformer.config
    assert one.split == n
    middle = sum(pipe.transformer.groups[:1])
    head = student([0, 1], teacher=pipe, resample=(0, middle), generator=generator, **call).images
    codes = pipe.codes
    assert (torch.cdist(head[:, :middle], codes).amin(-1) < 1e-5).all()
    for options in ({"teacher": None}, {"resample": (3, 2)}, {"resample": (0, n + 1)}):
        with pytest.raises(FewstepError, match="resample"):
            student([0], **{"teacher": pipe, "resample": (0, n), "latents": call["latents"][:1], **options})


# ------------------------------------------------------------------------------------------------- published files
def published(tmp_path, kind, wrap=None, suffix=".pt", change=None):
    """Files with the layout of the published checkpoints, from small random models."""
    if kind == "llamagen":
        net, vq = small_gpt(), LlamaGenVQ(16, 8, z_channels=32, **SMALL)
    else:
        net, vq = small_var()
    states = []
    for module in (net, vq):
        state = {k: v for k, v in module.state_dict().items() if not k.startswith("pyramid.")}
        states.append({k: v.clone().contiguous() for k, v in state.items()})
    if kind == "var":
        states[0]["lvl_1L"] = torch.zeros(1, 14, dtype=torch.long)
        states[0]["attn_bias_for_masking"] = torch.zeros(1, 1, 14, 14)
    if change:
        change(*states)
    paths = []
    for name, state in zip(("transformer", "tokenizer"), states):
        path = tmp_path / f"{name}{suffix}"
        save_file(state, path) if suffix == ".safetensors" else torch.save(
            {wrap: state} if wrap else state, path
        )
        paths.append(path)
    return (net, vq), paths


LOAD = {"llamagen": lambda *p: llamagen(*p, tokens=9), "var": var}


@pytest.mark.parametrize("kind", LOAD)
@pytest.mark.parametrize("wrap, suffix", [(None, ".safetensors"), ("model", ".pt"), (None, ".pth")])
def test_published_layouts_load_and_mean_the_same(tmp_path, kind, wrap, suffix):
    (net, vq), paths = published(tmp_path, kind, wrap, suffix)
    pipe = LOAD[kind](*paths)
    tokens = torch.randint(16, (3, pipe.num_tokens), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(pipe.transformer(tokens, LABELS), net(tokens, LABELS), atol=1e-5)
    q = codes_of(vq)[tokens]
    assert torch.allclose(decode_codes(pipe.vqvae, q), decode_codes(vq.eval(), q), atol=1e-5)


# A few names of each published file, as the released code registers them.
NAMES = {
    "GPT": (
        lambda: small_gpt(),
        "cls_embedding.embedding_table.weight tok_embeddings.weight layers.1.attention.wqkv.weight norm.weight "
        "layers.0.attention.wo.weight layers.0.feed_forward.w1.weight layers.0.feed_forward.w2.weight output.weight "
        "layers.0.feed_forward.w3.weight layers.0.attention_norm.weight layers.1.ffn_norm.weight",
    ),
    "text": (
        lambda: small_gpt(num_classes=None, cls_token_num=4),
        "cls_embedding.cap_proj.fc1.weight cls_embedding.cap_proj.fc2.weight cls_embedding.uncond_embedding",
    ),
    "LlamaGenVQ": (
        lambda: LlamaGenVQ(16, 8, z_channels=32, **SMALL),
        "encoder.conv_in.weight encoder.conv_blocks.0.res.0.norm1.weight encoder.conv_blocks.1.attn.0.q.weight "
        "encoder.conv_blocks.0.downsample.conv.weight encoder.mid.1.proj_out.bias decoder.mid.2.conv2.weight "
        "decoder.conv_blocks.0.attn.1.k.bias decoder.conv_blocks.0.upsample.conv.weight decoder.norm_out.weight "
        "decoder.conv_blocks.1.res.1.conv1.weight decoder.conv_out.bias quantize.embedding.weight quant_conv.weight "
        "quantize.codebook_used post_quant_conv.bias",
    ),
    "VAR": (
        lambda: small_var()[0],
        "word_embed.bias class_emb.weight pos_start pos_1LC lvl_embed.weight blocks.0.attn.scale_mul_1H11 head.bias "
        "blocks.1.attn.mat_qkv.weight blocks.0.attn.q_bias blocks.0.attn.v_bias blocks.0.attn.zero_k_bias "
        "blocks.0.attn.proj.bias blocks.0.ffn.fc1.weight blocks.0.ffn.fc2.bias blocks.0.ada_lin.1.weight "
        "head_nm.ada_lin.1.weight head.weight",
    ),
    "MultiScaleVQ": (
        lambda: small_var()[1],
        "encoder.down.0.block.0.norm1.weight encoder.down.1.attn.0.qkv.weight encoder.down.0.downsample.conv.bias "
        "encoder.mid.block_1.conv1.weight encoder.mid.attn_1.qkv.bias decoder.up.1.attn.1.proj_out.weight "
        "decoder.up.1.upsample.conv.weight decoder.up.0.block.1.conv2.bias decoder.mid.block_2.norm2.bias "
        "quantize.quant_resi.qresi_ls.3.weight quantize.ema_vocab_hit_SV quantize.embedding.weight "
        "quant_conv.weight post_quant_conv.weight decoder.conv_in.weight decoder.norm_out.bias",
    ),
}


@pytest.mark.parametrize("which", NAMES)
def test_parameters_have_the_published_names(which):
    build, names = NAMES[which]
    missing = set(names.split()) - set(build().state_dict())
    assert not missing


def test_the_published_sizes():
    with torch.device("meta"):
        b = GPT()  # LlamaGen-B
        vq = LlamaGenVQ()
        d16 = VAR()
        multi = MultiScaleVQ()
    count = lambda module: sum(p.numel() for p in module.parameters()) / 1e6  # noqa: E731
    assert count(b) == pytest.approx(111, abs=1) and count(d16) == pytest.approx(310, abs=1)
    assert count(vq) == pytest.approx(72, abs=1) and count(multi) == pytest.approx(109, abs=1)
    assert sum(side * side for side in PATCHES) == 680 == sum(d16.groups)


@pytest.mark.parametrize("kind", LOAD)
def test_keys_that_do_not_fit_are_listed(tmp_path, kind):
    first = {"llamagen": "norm.weight", "var": "pos_start"}[kind]

    def change(net, vq):
        del net[first]
        net["extra.weight"] = torch.zeros(2)

    _, paths = published(tmp_path, kind, change=change)
    with pytest.raises(
        FewstepError, match=rf"transformer\.pt: does not fit .* 2 keys: missing {first}; left over extra"
    ):
        LOAD[kind](*paths)


@pytest.mark.parametrize("kind", LOAD)
def test_another_codebook_is_refused(tmp_path, kind):
    def change(net, vq):
        vq["quantize.embedding.weight"] = torch.zeros(24, 8)

    _, paths = published(tmp_path, kind, change=change)
    with pytest.raises(FewstepError, match=r"codebook of 24, but .* predicts 16 codes"):
        LOAD[kind](*paths)


def test_other_files_are_refused_by_name(tmp_path):
    _, (gpt, vq) = published(tmp_path, "llamagen")
    with pytest.raises(FewstepError, match=r"nowhere\.pt does not exist"):
        read_weights(tmp_path / "nowhere.pt")
    with pytest.raises(
        FewstepError, match=r"missing word_embed\.weight; these are the weights of another model"
    ):
        var(gpt, vq)
    with pytest.raises(FewstepError, match=r"missing output\.weight"):
        llamagen(vq, vq)
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    with pytest.raises(FewstepError, match="cannot be read"):
        read_weights(tmp_path / "bad.pt")
    torch.save({"a": 1}, tmp_path / "odd.pt")
    with pytest.raises(FewstepError, match="expected tensors by name"):
        read_weights(tmp_path / "odd.pt")
    with pytest.raises(FewstepError, match=r"norm\.weight is \(3,\), not \(64,\)"):
        load_weights(small_gpt(), {**small_gpt().state_dict(), "norm.weight": torch.zeros(3)}, "file")


def test_sequences_of_another_length_and_unknown_labels_are_refused(pipe):
    n = pipe.num_tokens
    for label in ("cat", "3", "-1", 7):
        with pytest.raises(FewstepError, match=rf"class label {label!r}: expected a number from 0 to 2"):
            pipe([label])
    with pytest.raises(FewstepError, match=rf"latents: shape \(1, {n + 1}, 8\): expected \(1, {n}, 8\)"):
        pipe([0], latents=torch.zeros(1, n + 1, 8))
    with pytest.raises(FewstepError, match=r"decodes .* groups of tokens"):
        pipe([0], num_inference_steps=2)
    with pytest.raises(ValueError, match="no beginning of a group"):
        pipe.teacher().sample(
            torch.zeros(1, n), LABELS.rows(slice(1)), prefix=torch.zeros(1, n + 3, dtype=torch.long)
        )


def test_contexts_and_students_run_as_the_recipe_says(pipe):
    plain = Autoregressive(pipe, "x")
    cast = Autoregressive(pipe, "x", autocast=torch.bfloat16, attention="math")
    tokens, seen = Rng("tokens").permutation(16)[: pipe.num_tokens].expand(3, -1), []
    if tokens.shape[1] < pipe.num_tokens:
        tokens = torch.arange(pipe.num_tokens).expand(3, -1)

    def look(*_):
        seen.append((torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None,
                     SDPBackend.FLASH_ATTENTION in _cur_sdpa_kernel_backends()))  # fmt: skip

    def attended(net, teacher, call):
        hooks = [
            m.register_forward_hook(look) for m in net.modules() if type(m).__name__.endswith("Attention")
        ]
        seen.clear()
        out = call(teacher)
        for hook in hooks:
            hook.remove()
        return out, set(seen)

    fast, how = attended(pipe.transformer, cast, lambda t: t.denoiser.context(tokens, LABELS)["log_prob"])
    slow, plainly = attended(
        pipe.transformer, plain, lambda t: t.denoiser.context(tokens, LABELS)["log_prob"]
    )
    assert how == {(torch.bfloat16, False)} and plainly == {(None, True)}
    finite = slow.isfinite() & fast.isfinite()
    assert fast.dtype == torch.float32 and 0 < (fast - slow)[finite].abs().max() < 0.5
    x, ones = Rng("x").normal(3, *plain.latent_shape), torch.ones(3, pipe.num_tokens, 1)
    parallel = ParallelStudent.of(pipe.transformer, pipe.codes, 4)
    causal = CausalStudent.of(pipe.transformer, pipe.codes, head_width=16)
    for teacher, expected in ((cast, {(torch.bfloat16, False)}), (plain, {(None, True)})):
        _, how = attended(parallel, teacher, lambda t: t.denoiser.with_net(parallel).x0(x, ones, LABELS))
        context, then = attended(causal, teacher, lambda t: t.denoiser.with_net(causal).context(x, LABELS))
        assert how == then == expected and causal.x0(x, ones, context).dtype == torch.float32


# ------------------------------------------------------------------------------------------------- pairs and runs
@pytest.fixture
def teacher(pipe, tmp_path):
    folder = tmp_path / "teacher"
    pipe.save_pretrained(folder)
    from fewstep.teachers import load_teacher

    return load_teacher(str(folder))


def test_token_pairs_are_the_same_whatever_interrupts_their_making(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(pairs_module, "SHARD", 4)
    options = {"num": 10, "guidance": 2.0, "seed": 3}
    whole = make_pairs(tmp_path / "a", teacher, ["0", "1", "2"], **options)
    torn = make_pairs(tmp_path / "b", teacher, ["0", "1", "2"], batch_size=3, **options)
    sorted(torn.glob("*.safetensors"))[1].unlink()
    with pytest.raises(RecipeError, match="unfinished"):
        load_pairs(str(torn))
    make_pairs(torn, teacher, ["0", "1", "2"], batch_size=2, **options)
    files = [sorted(p.name for p in folder.glob("*.safetensors")) for folder in (whole, torn)]
    assert files[0] == files[1] and len(files[0]) == 3
    for name in files[0]:  # not merely alike: byte for byte
        assert (whole / name).read_bytes() == (torn / name).read_bytes()
    loaded = load_pairs(str(torn))
    rows = loaded.rows(torch.tensor([7, 2]))
    assert rows["tokens"].dtype == torch.long and rows["noise"].shape == (2, *teacher.latent_shape)
    assert not rows["noise"][0].equal(rows["noise"][1])  # each pair has its own
    cond = teacher.encode([loaded.prompts[7], loaded.prompts[2]])
    assert teacher.denoiser.flow(rows["noise"], cond, guidance=2.0).equal(rows["tokens"])
    assert json.loads((torn / "pairs.json").read_text())["solver"] == "midpoint"
    with pytest.raises(RecipeError, match=r"made with guidance_scale 2\.0"):
        check_pairs(loaded, teacher, 1.0)
    with pytest.raises(FewstepError, match="midpoint, heun, euler"):
        make_pairs(tmp_path / "c", teacher, ["0"], num=1, solver="unipc")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a fork")
def test_killed_at_any_moment_the_making_of_token_pairs_gives_identical_files(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(pairs_module, "SHARD", 4)
    options = {"num": 240, "guidance": 2.0, "seed": 3}
    whole = make_pairs(tmp_path / "a", teacher, ["0", "1", "2"], **options)
    torn, chance = tmp_path / "b", random.Random(0)

    def made():
        return {p.name: p.stat().st_mtime_ns for p in torn.glob("[0-9]*.safetensors")}

    for _ in range(4):
        before = made()
        child = Fork(lambda: make_pairs(torn, teacher, ["0", "1", "2"], **options))
        goal = len(before) + chance.randint(1, 4)
        while len(made()) < goal:
            assert child.poll() is None, "it was done before it was killed"
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.03))
        child.kill()
        assert child.wait() == -signal.SIGKILL
        assert before.items() <= made().items()  # what is there is not made again
    make_pairs(torn, teacher, ["0", "1", "2"], **options)
    files = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in (whole, torn)]
    assert files[0] == files[1] and len(files[0]) == 62


def test_pairs_of_another_teacher_are_refused(teacher, tmp_path):
    folder = make_pairs(tmp_path / "a", teacher, ["0"], num=2)
    teacher.pipe.save_pretrained(tmp_path / "other")
    other = Autoregressive(teacher.pipe, str(tmp_path / "other"))
    with pytest.raises(
        RecipeError, match=r"data\.pairs: made with teacher .*teacher'.* but this run has .*other"
    ):
        check_pairs(load_pairs(str(folder)), other, 1.0)
    with pytest.raises(FewstepError, match="holds pairs of another kind: teacher is"):
        make_pairs(folder, other, ["0"], num=2)


@pytest.mark.parametrize("field, other", [("top_k", 3), ("top_p", 0.5), ("temperature", 2.0)])
def test_pairs_of_another_law_are_refused(field, other, teacher, tmp_path):
    folder = make_pairs(tmp_path / "a", teacher, ["0"], num=2)
    check_pairs(load_pairs(str(folder)), teacher, 1.0)
    own = teacher.pipe.config[field]
    teacher.pipe.register_to_config(**{field: other})  # as a folder's model_index.json would say
    changed = Autoregressive(teacher.pipe, teacher.source)
    with pytest.raises(
        RecipeError, match=rf"data\.pairs: made with {field} {own}, but this run has {other}; make them"
    ):
        check_pairs(load_pairs(str(folder)), changed, 1.0)
    with pytest.raises(
        FewstepError, match=rf"another kind: {field} is {own}, not {other}; give another --out"
    ):
        make_pairs(folder, changed, ["0"], num=2)


def test_pairs_of_other_weights_codes_or_growth_of_guidance_are_refused(teacher, tmp_path):
    folder = make_pairs(tmp_path / "a", teacher, ["0"], num=2)
    grows = isinstance(teacher.net, VAR)

    def refused(what):
        with pytest.raises(RecipeError, match=rf"data\.pairs: made with {what}"):
            check_pairs(load_pairs(str(folder)), teacher, 1.0)

    ramp, count = teacher.denoiser.ramp, len(teacher.net.groups)
    assert ("guidance_ramp" in json.loads((folder / "pairs.json").read_text())) == grows
    if grows:
        teacher.denoiser.ramp = (1.0,) * count
        refused(r"guidance_ramp \[0\.0, 0\.5, 1\.0\], and this run's teacher has none")
        teacher.denoiser.ramp = ramp
    with torch.no_grad():
        teacher.pipe.vqvae.quantize.embedding.weight.mul_(-1)
    refused("codes")
    with torch.no_grad():
        teacher.pipe.vqvae.quantize.embedding.weight.mul_(-1)
        next(teacher.net.parameters()).mul_(1.5)
    refused("network")


def test_labels_of_imagenet_are_prompts():
    labels = load_prompts("builtin:imagenet-classes")
    assert len(labels) == 1000 and labels[207] == "207"


def test_a_teacher_has_one_resolution_and_decodes_its_own_tokens(teacher):
    assert teacher.resolution == 6
    with pytest.raises(FewstepError, match=r"teacher\.resolution: 64"):
        Autoregressive(teacher.pipe, "x", resolution=64)
    images = torch.randint(0, 255, (2, 6, 6, 3), dtype=torch.uint8)
    q = teacher.latents(images)
    assert q.shape == (2, *teacher.latent_shape) and teacher.decode(q).shape == (2, 6, 6, 3)


RUN = {
    "dd1": {"entries": [0, 1], "split": 5, "guidance_scale": 2.0},
    "dd2": {"guidance_scale": 2.0, "critic_steps": 2, "initial_share": 0.5, "head_width": 16},
}


def recipe_of(name, teacher, tmp_path, **role):
    from fewstep.methods import METHODS
    from fewstep.recipe import DataConfig, Recipe, RoleConfig, SampleConfig, TeacherConfig, TrainConfig

    (tmp_path / "prompts.txt").write_text("0\n1\n2\n")
    make_pairs(tmp_path / "pairs", teacher, ["0", "1", "2"], num=6, guidance=2.0)
    roles = {n: RoleConfig(**{"kind": "full", "lr": 1e-3, **role}) for n in ("student", "critic")}
    return Recipe(
        output=str(tmp_path / "run"),
        teacher=TeacherConfig(path=teacher.source, autocast="bfloat16", attention="math"),
        method=METHODS[name].Config(**RUN[name]),
        data=DataConfig(prompts=str(tmp_path / "prompts.txt"), pairs=str(tmp_path / "pairs")),
        train=TrainConfig(
            steps=4, batch_size=2, log_every=1, sample_every=4, checkpoint_every=4, device="cpu"
        ),
        roles={n: r for n, r in roles.items() if n == "student" or name == "dd2"},
        samples=SampleConfig(count=2, columns=2),
    )


@pytest.mark.parametrize("name", RUN)
def test_what_is_new_in_a_network_follows_from_the_seed(name, teacher, tmp_path):
    from fewstep.process import Process
    from fewstep.runs.build import build

    built = []
    for seed in (1, 2):  # two processes, whatever either has drawn before
        torch.manual_seed(seed)
        roles, _ = build(recipe_of(name, teacher, tmp_path), teacher, Process())
        built.append({f"{r}/{n}": w.clone() for r, role in roles.items() for n, w in role.weights.items()})
    assert built[0].keys() == built[1].keys()
    assert all(built[1][name].equal(weight) for name, weight in built[0].items())


@pytest.mark.parametrize("name", RUN)
def test_a_run_ends_with_a_verified_export_that_samples(name, teacher, tmp_path):
    from dataclasses import replace

    from fewstep.cli import main
    from fewstep.recipe import EvalConfig
    from fewstep.runs.session import execute

    steps = len(teacher.net.groups)
    measured = EvalConfig(num=4, teacher_steps=steps, teacher_guidance=2.0, batch_size=2)
    folder = execute(replace(recipe_of(name, teacher, tmp_path), evaluation=measured))
    taught, *_, made = json.loads((folder / "eval" / "table.json").read_text())["rows"]
    assert taught["kind"] == "teacher" and taught["speed"]["nfe"] == 2 * steps
    assert taught["metrics"]["token TV"]["value"] == 0 and "speed-up" not in taught
    assert made["speed-up"] == pytest.approx(taught["speed"]["seconds"] / made["speed"]["seconds"], rel=0.01)
    assert made["speed"]["nfe"] == made["steps"]
    found = {name: made["metrics"][name]["value"] for name in ("token perplexity", "token TV")}
    assert 1 <= found["token perplexity"] <= 16 and 0 <= found["token TV"] <= 1
    record = json.loads((folder / "export" / "fewstep.json").read_text())
    assert record["num_steps"] == (2 if name == "dd1" else 1) and record["kind"] == "full"
    assert list(record.get("steps", {})) == (["1", "2"] if name == "dd1" else [])
    assert (folder / "samples" / "step_000004.png").is_file()
    out = tmp_path / "out.png"
    assert (
        main(["sample", str(folder), "--prompt", "2", "--num", "2", "--out", str(out)]) == 0 and out.is_file()
    )
    scope = {}
    card = (folder / "export" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "export")
        exec(card, scope)
    assert scope["image"].size == (6, 6)


def test_dd2_may_start_from_the_student_of_dd1(teacher, tmp_path):
    from dataclasses import replace

    from fewstep.export import load_exported
    from fewstep.methods.dd2 import DD2
    from fewstep.process import Process
    from fewstep.runs.build import build
    from fewstep.runs.session import execute

    def second(place, name="two", generator="codes"):
        made = recipe_of("dd2", teacher, tmp_path)
        roles = {**made.roles, "student": replace(made.roles["student"], start_from=str(place))}
        method = DD2.Config(**RUN["dd2"], generator=generator)
        return replace(made, method=method, roles=roles, output=str(tmp_path / name))

    def refused(recipe, problem):
        with pytest.raises(RecipeError, match=rf"roles\.student\.start_from: .*{problem}"):
            build(recipe, teacher, Process())

    first = execute(recipe_of("dd1", teacher, tmp_path))
    student = load_exported(first / "export")[0].transformer
    for place in (first, first / "export"):
        _, method = build(second(place), teacher, Process())
        assert method.net.config.split == sum(teacher.net.groups)  # the logits make every token
        assert all(
            a.equal(b) for a, b in zip(method.net.state_dict().values(), student.state_dict().values())
        )
        refused(
            second(place, generator="embeddings"),
            "other weights than this role trains, e.g. final_layer_conti",
        )
    folder = execute(second(first / "export"))
    assert json.loads((folder / "export" / "fewstep.json").read_text())["student"] == "ParallelStudent"
    latents = load_exported(folder / "export")[0](["0", "1"], output_type="latent").images
    assert (torch.cdist(latents, teacher.denoiser.codes).amin(-1) < 1e-5).all()
    third = execute(replace(recipe_of("dd2", teacher, tmp_path), output=str(tmp_path / "three")))
    refused(second(third / "export"), "other weights than this role trains, e.g. final_layer_conti")
    teacher.denoiser.codes = teacher.denoiser.codes + 1
    refused(second(first / "export"), "was trained with other codes than this teacher's")
    weights = next((first / "export").glob("pipeline/transformer/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(second(first / "export"), "cannot be read")


def test_methods_and_teachers_must_be_of_one_kind(teacher, tmp_path, tiny_sd15):
    from dataclasses import replace

    from fewstep.methods.dmd import DMD
    from fewstep.runs.session import execute

    recipe = recipe_of("dd1", teacher, tmp_path)
    with pytest.raises(
        RecipeError, match=r"method\.name: dmd distills diffusion teachers, and .* is autoregressive"
    ):
        execute(replace(recipe, method=DMD.Config(guidance_scale=2.0)))
    with pytest.raises(
        RecipeError, match=r"method\.name: dd1 distills autoregressive teachers, and .* is diffusion"
    ):
        execute(replace(recipe, teacher=replace(recipe.teacher, path=str(tiny_sd15))))
    with pytest.raises(RecipeError, match=r"roles\.student\.kind: lora"):
        execute(recipe_of("dd1", teacher, tmp_path, kind="lora", rank=2, targets=["word_embed", "wo"]))


def test_converting_from_the_command_line(tmp_path):
    from fewstep.cli import main
    from fewstep.teachers import load_teacher

    _, (transformer, tokenizer) = published(tmp_path, "var")
    words = ["convert", "var", "--transformer", str(transformer), "--tokenizer", str(tokenizer)]
    assert main([*words, "--to", str(tmp_path / "out"), "--top-k", "5"]) == 0
    teacher = load_teacher(str(tmp_path / "out"))
    assert teacher.denoiser.law == Law(top_k=5, top_p=0.95) and isinstance(teacher.denoiser, CodebookDenoiser)
    assert main(["convert", "llamagen", "--transformer", "x.pt", "--tokenizer", "y.pt", "--to", "z"]) == 2


def test_statistics_of_tokens():
    from fewstep.evaluation.images import open_images
    from fewstep.evaluation.tokens import token_statistics, tokens_of

    a, b = torch.tensor([[0, 0], [1, 1]]), torch.tensor([[2, 2], [1, 1]])
    assert token_statistics(a, a, 8) == pytest.approx({"token perplexity": 2.0, "token TV": 0.0})
    assert token_statistics(a, b, 8)["token TV"] == pytest.approx(0.5)
    assert token_statistics(torch.arange(8)[None], b, 8)["token perplexity"] == pytest.approx(8)
    teacher = Autoregressive(gpt_pipeline(), "x")
    images = torch.randint(0, 255, (3, 6, 6, 3), dtype=torch.uint8)
    tokens = tokens_of(teacher.pipe, open_images(images))
    assert teacher.pipe.codes[tokens.reference].equal(teacher.latents(images))
    assert tokens.statistics(open_images(images))["token TV"] == 0
    assert tokens_of(object(), open_images(images)) is None


# ------------------------------------------------------------------------------------------------- text
def test_a_text_pipeline_reads_prompts_and_tokenizers_of_diffusers_fit(tmp_path):
    """The parts of the small emoji model: diffusers' VQModel, CLIP, and a GPT on 64 tokens."""
    from diffusers import VQModel
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    from fewstep.teachers.load import BUILTIN

    xl = BUILTIN["builtin:emoji-xl"]
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    widths = {"block_out_channels": (8,) * 4, "norm_num_groups": 4, "latent_channels": 8}
    vq = VQModel(num_vq_embeddings=16, vq_embed_dim=8, sample_size=64, **blocks, **widths).eval()
    torch.manual_seed(0)
    sizes = {"num_classes": None, "caption_dim": 128, "cls_token_num": 12, "multiple_of": 16}
    gpt = randomise(GPT(16, 32, 1, 2, 64, rotated_condition=True, **sizes))
    encoder = CLIPTextModelWithProjection.from_pretrained(xl / "text_encoder_2")
    pipe = LlamaGenPipeline(gpt, vq, encoder, CLIPTokenizer.from_pretrained(xl / "tokenizer_2"))
    cond = pipe.encode_prompt(["red apple", "any food fruit"])
    assert cond["embeds"].shape == (2, 12, 128) and not cond["embeds"][0].equal(cond["embeds"][1])
    call = {"guidance_scale": 2.0, "output_type": "latent"}
    once = pipe("red apple", generator=torch.Generator().manual_seed(0), **call).images
    assert once.shape == (1, 64, 8) and pipe.resolution == 64
    pipe.save_pretrained(tmp_path)
    again = LlamaGenPipeline.from_pretrained(tmp_path)
    assert again("red apple", generator=torch.Generator().manual_seed(0), **call).images.equal(once)
    own = vq.quantize(vq.encode(torch.zeros(1, 3, 64, 64)).latents)[2][2].view(1, -1)
    assert pipe.tokenize(torch.zeros(1, 3, 64, 64)).equal(own)
    images = decode_codes(vq, pipe.codes[own])
    assert torch.allclose(images, vq.decode(vq.encode(torch.zeros(1, 3, 64, 64)).latents).sample, atol=1e-4)


def text_pipeline(folder, width=16):
    """A LlamaGen of texts as `fewstep convert` makes it: T5 before it, padding first and masked."""
    net = small_gpt(num_classes=None, caption_dim=width, cls_token_num=12)
    for name, part in (("transformer", net), ("tokenizer", LlamaGenVQ(16, 8, z_channels=32, **SMALL))):
        torch.save({"model": part.state_dict()}, folder / f"{name}.pt")
    for part in tiny_t5():
        part.save_pretrained(folder / "t5")
    return [folder / "transformer.pt", folder / "tokenizer.pt"], folder / "t5"


def test_a_converted_text_model_reads_prompts_padding_first(tmp_path):
    files, encoder = text_pipeline(tmp_path)
    pipe = llamagen(*files, tokens=9, text_encoder=encoder)
    assert pipe.config.top_k == 1000 and pipe.transformer.config.masked
    cond = pipe.encode_prompt(["Cat ", "a red dog"])
    length = [5, 11]  # a mark for the first word, the characters and the end
    for row, count in enumerate(length):
        assert cond["mask"][row].tolist() == [0] * (12 - count) + [1] * count
        assert cond["embeds"][row, : 12 - count].eq(0).all()
    ids = pipe.tokenizer("cat", return_tensors="pt").input_ids
    alone = pipe.text_encoder(ids).last_hidden_state[0]
    assert torch.allclose(cond["embeds"][0, 7:], alone, atol=1e-5)
    pipe.save_pretrained(tmp_path / "saved")
    again = LlamaGenPipeline.from_pretrained(tmp_path / "saved")
    call = {"guidance_scale": 7.5, "output_type": "latent"}
    made = [p("cat", generator=torch.Generator().manual_seed(0), **call).images for p in (pipe, again)]
    assert made[0].equal(made[1])


def test_students_of_a_text_model_see_no_padding_either(tmp_path):
    files, encoder = text_pipeline(tmp_path)
    pipe = llamagen(*files, tokens=9, text_encoder=encoder)
    cond = pipe.encode_prompt(["cat", "a red dog"])
    noise = torch.where(cond["mask"][..., None] == 0, 9.0, cond["embeds"])
    other = Cond({**cond.tensors, "embeds": noise})
    parallel = ParallelStudent.of(pipe.transformer, pipe.codes, split=4)
    causal = CausalStudent.of(pipe.transformer, pipe.codes, head_width=16, head_depth=1)
    x, ones = Rng("x").normal(2, 9, 8), torch.ones(2, 9, 1)
    for made in (lambda c: torch.cat(parallel(x, ones, c), -1), lambda c: causal.context(x, c)["features"]):
        assert made(cond).equal(made(other))
        moved = Cond({**cond.tensors, "embeds": cond["embeds"] + cond["mask"][..., None]})
        assert not torch.allclose(made(cond), made(moved))
    # Its slots are averaged where they hold a text.
    slots = pipe.transformer.cls_embedding(cond)
    assert torch.allclose(pipe.transformer.condition(cond)[0], slots[0, 7:].mean(0), atol=1e-5)


def test_a_text_model_is_distilled_from_prompts(tmp_path):
    from fewstep.runs.session import execute
    from fewstep.teachers import load_teacher

    files, encoder = text_pipeline(tmp_path)
    llamagen(*files, tokens=9, text_encoder=encoder).save_pretrained(tmp_path / "teacher")
    teacher = load_teacher(str(tmp_path / "teacher"))
    folder = execute(recipe_of("dd1", teacher, tmp_path))
    assert json.loads((folder / "export" / "fewstep.json").read_text())["student"] == "ParallelStudent"


@pytest.mark.slow
def test_a_recipe_of_texts_is_smoked_on_a_model_of_texts(tmp_path):
    from dataclasses import replace

    from fewstep.export import load_exported
    from fewstep.runs.library import load_recipe
    from fewstep.runs.session import execute
    from fewstep.runs.smoke import smoke

    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    recipe = load_recipe("llamagen_l_dd2_1step")
    recipe = replace(recipe, data=replace(recipe.data, prompts=str(tmp_path / "prompts.txt")))
    pipe, _ = load_exported(
        execute(smoke(replace(recipe, output=str(tmp_path / "run")), given={"output"})) / "export"
    )
    assert pipe.backbone.config.masked and pipe("a cat", output_type="latent").images.shape == (1, 256, 8)


def test_text_encoders_must_be_those_of_the_model(tmp_path):
    files, encoder = text_pipeline(tmp_path)
    with pytest.raises(FewstepError, match=r"transformer\.pt: is conditioned on text: give --text-encoder"):
        llamagen(*files, tokens=9)
    with pytest.raises(FewstepError, match=r"--text-encoder .*nowhere: holds no T5 encoder"):
        llamagen(*files, tokens=9, text_encoder=tmp_path / "nowhere")
    (tmp_path / "wide").mkdir()
    (tmp_path / "classes").mkdir()
    wide, _ = text_pipeline(tmp_path / "wide", width=20)
    with pytest.raises(FewstepError, match=r"its features have 16 numbers, and .* reads 20"):
        llamagen(*wide, tokens=9, text_encoder=encoder)
    _, classes = published(tmp_path / "classes", "llamagen")
    with pytest.raises(FewstepError, match=r"--text-encoder .*conditioned on class labels"):
        llamagen(*classes, tokens=9, text_encoder=encoder)
