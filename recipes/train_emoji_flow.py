"""Train ``builtin:emoji-flow``, the small SANA pipeline (flow matching, transformer) that ships with fewstep.

    python recipes/train_emoji_flow.py --run runs/emoji-flow      # all stages; Ctrl-C and rerun to continue
    python recipes/train_emoji_flow.py --run runs/more --stage transformer --steps 9000 --init runs/emoji-flow/pipeline

Its latents are those of ``builtin:emoji-xl``, so its parts can be trained one beside the other. Stages: ``transformer``
(rectified flow, with a Gemma text encoder, from scratch), ``vae`` (a deep-compression autoencoder 64x64x3 <-> 8x8x16
onto those latents), ``decoder`` (more steps of its decoder), ``save`` (a stock ``SanaPipeline`` folder, fp16 weights).
Hardware, duration, loss curves and samples of the shipped run: ``eval/results/teacher_emoji_flow.md``.
"""

import argparse
import inspect
import json
from functools import cache
from pathlib import Path

import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from train_emoji_xl import Run, as_this_cpu_likes, latents_of, reconstruction_terms, to_unit
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from fewstep import Cond, load_teacher
from fewstep.data import emoji
from fewstep.diffusion.schedules import Flow, change_schedule

MAX_TOKENS = 24
WIDTH = 128  # hidden size of the text encoder
LAYERS, WINDOW = 3, 8  # of the text encoder; a layer sees a window of tokens
GROUPED = 0.2  # share of samples whose caption is that of their group
INSTRUCTION = "\n".join(
    inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
)


# ------------------------------------------------------------------------------------------------- the networks
def make_vae() -> AutoencoderDC:
    widths, none = (16, 32, 64, 128), ((),) * 4
    return AutoencoderDC(
        latent_channels=16,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        encoder_qkv_multiscales=none,
        decoder_qkv_multiscales=none,
        downsample_block_type="pixel_unshuffle",
        upsample_block_type="pixel_shuffle",
        scaling_factor=1.0,
    )


def make_transformer() -> SanaTransformer2DModel:
    return SanaTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=6,
        num_attention_heads=8,
        attention_head_dim=32,
        num_cross_attention_heads=8,
        cross_attention_head_dim=32,
        cross_attention_dim=256,
        caption_channels=WIDTH,
        mlp_ratio=2.5,
        interpolation_scale=1,
        qk_norm="rms_norm_across_heads",
        timestep_scale=0.001,  # the network sees t in [0, 1]: an embedding that is smooth in t, as sCM needs it
    )


def make_tokenizer(texts: list[str], folder: Path) -> GemmaTokenizer:
    """A BPE with Gemma's marks, trained on the captions and on the instruction that SANA's pipeline prepends."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(
        [*texts, *[INSTRUCTION] * 3],
        trainers.BpeTrainer(vocab_size=2048, special_tokens=special, show_progress=False),
    )
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    tokenizer = GemmaTokenizer(vocab=model["vocab"], merges=merges, model_max_length=MAX_TOKENS)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    return GemmaTokenizer.from_pretrained(folder)


def make_text_encoder(tokenizer: GemmaTokenizer) -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=WIDTH // 4,
            query_pre_attn_scalar=WIDTH // 4,
            max_position_embeddings=1024,
            sliding_window=WINDOW,
            layer_types=["sliding_attention"] * LAYERS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler()


# ----------------------------------------------------------------------------------------------------- training
@cache
def source():
    """The teacher whose latents are used, the images and the unit-scale latents."""
    teacher = load_teacher("builtin:emoji-xl", autocast="auto")
    images = to_unit(emoji.load()[0])
    vae = teacher.pipe.vae
    return teacher, images, latents_of(vae, images) * vae.config.scaling_factor


def captions() -> list[str]:
    """Both captions of every image, as SANA's pipeline sees them."""
    return [text.lower() for text in (*emoji.load()[1], *emoji.groups())]


def token_ids(tokenizer: GemmaTokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (2, N, L) of both captions and which of them the transformer sees (0 or 1).

    In front stands as much of the instruction as the layers' windows reach; the rest changes nothing.
    """
    reach, prefix = LAYERS * WINDOW, len(tokenizer.encode(INSTRUCTION)) - 1
    texts = tokenizer([INSTRUCTION + text for text in captions()]).input_ids
    rows = [tokens[prefix - reach :][: reach + MAX_TOKENS - 1] for tokens in texts]
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    seen = torch.zeros(ids.shape)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        seen[row, reach : len(tokens)] = 1
    return ids.view(2, -1, ids.shape[1]), seen.view(2, -1, ids.shape[1])


class Denoiser(torch.nn.Module):
    """Transformer and text encoder, trained together; encodes what the stock SANA pipeline encodes."""

    def __init__(self, tokenizer: GemmaTokenizer):
        super().__init__()
        self.transformer, self.text_encoder = make_transformer(), make_text_encoder(tokenizer)
        torch.nn.init.zeros_(self.transformer.proj_out.weight)

    def forward(self, x_t, t, ids, seen, drop):
        """The null condition, an empty prompt, is the first token alone; it also stands before every caption."""
        reach = LAYERS * WINDOW
        first = self.text_encoder(ids.new_full((1, 1), self.text_encoder.config.bos_token_id))[0]
        tokens = self.text_encoder(ids, attention_mask=torch.ones_like(ids))[0][:, reach:]
        mask = seen[:, reach:] * (~drop).float()[:, None]
        return self.transformer(
            x_t,
            encoder_hidden_states=torch.cat([first.expand(len(ids), -1, -1), tokens], 1),
            encoder_attention_mask=torch.nn.functional.pad(mask, (1, 0), value=1.0),
            timestep=t,
            return_dict=False,
        )[0]


def unpack(init: Path, folder: Path) -> SanaPipeline:
    """A pipeline to go on from; its tokenizer comes along."""
    pipe = SanaPipeline.from_pretrained(init, use_safetensors=True)
    pipe.tokenizer.save_pretrained(folder / "tokenizer")
    return pipe


def train_transformer(folder: Path, steps: int, cooldown: int, init: Path | None, batch: int = 32) -> None:
    """Flow matching; where a caption leaves much open, the target is the expectation that emoji-xl has learned.

    For names the target is the image itself. For kinds and for the null condition it is the posterior mean of
    ``builtin:emoji-xl`` at the same noise level, which has the same expectation and much less variance.
    """
    pipe = unpack(init, folder) if init else None
    if not (folder / "tokenizer").exists():
        make_tokenizer(captions(), folder / "tokenizer")
    tokenizer = GemmaTokenizer.from_pretrained(folder / "tokenizer")
    ids, seen = token_ids(tokenizer)
    torch.manual_seed(0)
    model = Denoiser(tokenizer)
    if pipe:
        for name in ("transformer", "text_encoder"):
            getattr(model, name).load_state_dict(getattr(pipe, name).float().state_dict())
    teacher, _, latents = source()
    names, groups = emoji.load()[1], emoji.groups()
    old = [
        Cond.cat(*(teacher.encode(texts[i : i + 64]) for i in range(0, len(texts), 64)))
        for texts in (names, groups)
    ]
    old_null = teacher.denoiser.null
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    schedule, count = Flow(), len(latents)
    run = Run(folder, "transformer", model, model.parameters(), lr=1e-3, ema=0.999)

    def loss():
        i = torch.randint(0, count, (batch,))
        t = torch.sigmoid(
            0.6 + 1.2 * torch.randn(batch)
        ).double()  # names are learned where noise hides the image
        x0, eps = latents[i], torch.randn_like(latents[i])
        x_t = schedule.add_noise(x0, eps, t)
        share = torch.rand(batch)
        name, null = share < 0.9 * (1 - GROUPED), share >= 0.9
        kind = (~name).long()
        target = x0.clone()
        with torch.no_grad():
            group = ~name & ~null
            cond = Cond.cat(old[1].rows(i[group]), old_null.expand(int(null.sum())))
            open_ = torch.cat([group.nonzero()[:, 0], null.nonzero()[:, 0]])
            view, time = change_schedule(x_t[open_], t[open_], schedule, teacher.denoiser.schedule)
            target[open_] = teacher.denoiser.x0(view, time, cond)
        velocity = schedule.convert(target, x_t, t.clamp(min=0.02), "x0", "flow")
        with as_this_cpu_likes():
            output = model(x_t, t.float(), ids[kind, i], seen[kind, i], null).float()
        error = (output - velocity).pow(2).mean((1, 2, 3))
        return {"flow": error.mean()}

    run.train(steps, cooldown, loss)


def train_vae(folder: Path, steps: int, cooldown: int, init: Path | None, batch: int = 16) -> None:
    """The encoder learns the latents of emoji-xl, the decoder to draw from them; one does not wait for the other."""
    _, images, latents = source()
    vae = make_vae()
    if init:
        vae.load_state_dict(unpack(init, folder).vae.float().state_dict())
    run = Run(folder, "vae", vae, vae.parameters(), lr=2e-3, ema=0.998)

    def loss():
        i = torch.randint(0, len(images), (batch,))
        with as_this_cpu_likes():
            encoded = vae.encode(images[i]).latent.float()
        away = 0.1 * (encoded - latents[i]).pow(2).mean()
        return {**drawing_terms(vae, latents[i], images[i]), "latents": away}

    run.train(steps, cooldown, loss)


def train_decoder(folder: Path, steps: int, cooldown: int, init: Path | None, batch: int = 16) -> None:
    """More steps of the decoder alone, at half the price; the latents stay as they are."""
    _, images, latents = source()
    vae = make_vae()
    if init:
        vae.load_state_dict(unpack(init, folder).vae.float().state_dict())
    else:
        vae.load_state_dict(torch.load(folder / "vae.pt", weights_only=True)["ema"])
    run = Run(folder, "decoder", vae, vae.decoder.parameters(), lr=2e-3, ema=0.998)

    def loss():
        i = torch.randint(0, len(images), (batch,))
        return drawing_terms(vae, latents[i], images[i])

    run.train(steps, cooldown, loss)


def drawing_terms(vae: AutoencoderDC, latents: torch.Tensor, images: torch.Tensor) -> dict[str, torch.Tensor]:
    z = latents + 0.05 * torch.randn_like(latents)  # what a student makes is never exact
    with as_this_cpu_likes():
        output = vae.decode(z).sample.float()
    return reconstruction_terms(output, images)


# --------------------------------------------------------------------------------------------------------- saving
def save_pipeline(folder: Path, target: Path) -> None:
    """Everything as one stock pipeline folder; transformer and VAE in fp16 to stay small, loaded as fp32 by default."""
    tokenizer = GemmaTokenizer.from_pretrained(folder / "tokenizer")
    model, vae = Denoiser(tokenizer), make_vae()
    model.load_state_dict(torch.load(folder / "transformer.pt", weights_only=True)["ema"])
    drawn = "decoder" if (folder / "decoder.pt").exists() else "vae"
    vae.load_state_dict(torch.load(folder / f"{drawn}.pt", weights_only=True)["ema"])
    pipe = SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=model.text_encoder.eval(),
        vae=vae.eval().half(),
        transformer=model.transformer.eval().half(),
        scheduler=scheduler(),
    )
    # The name that transformers 4 reads from tokenizer.json; version 5 has one class under both.
    pipe.register_to_config(tokenizer=("transformers", "GemmaTokenizerFast"))
    pipe.save_pretrained(target)
    size = sum(p.stat().st_size for p in target.rglob("*.safetensors"))
    print(f"{target}: {size / 1e6:.1f} MB of safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoints and logs")
    parser.add_argument("--stage", choices=["all", "transformer", "vae", "decoder", "save"], default="all")
    parser.add_argument("--steps", type=int, help="steps of the chosen stage")
    parser.add_argument("--cooldown", type=int, default=4000, help="steps of falling learning rate")
    parser.add_argument("--init", type=Path, help="pipeline to go on from (transformer, vae, decoder)")
    parser.add_argument("--to", type=Path, help="where `save` writes the pipeline (default RUN/pipeline)")
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    wanted = ["transformer", "vae", "decoder", "save"] if args.stage == "all" else [args.stage]
    if "transformer" in wanted:
        train_transformer(args.run, args.steps or 9000, args.cooldown, args.init)
    if "vae" in wanted:
        train_vae(args.run, args.steps or 4000, args.cooldown, args.init)
    if "decoder" in wanted:
        train_decoder(args.run, args.steps or 6000, args.cooldown, args.init)
    if "save" in wanted:
        save_pipeline(args.run, args.to or args.run / "pipeline")


if __name__ == "__main__":
    main()
