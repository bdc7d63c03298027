"""Train ``builtin:emoji-xl``, the small SDXL pipeline that ships with fewstep, from nothing.

    python recipes/train_emoji_xl.py --run runs/emoji-xl            # all stages; Ctrl-C and rerun to continue
    python recipes/train_emoji_xl.py --run runs/emoji-xl --stage unet --steps 9000

Stages: ``vae`` (64x64x3 -> 8x8x16), ``unet`` (v-prediction, with both text encoders, from scratch), ``decoder``
(more decoder steps on the frozen latents), ``save`` (a stock ``StableDiffusionXLPipeline`` folder, fp16 weights).
Hardware, duration, loss curves and samples of the shipped run: ``eval/results/teacher_emoji_xl.md``.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from tokenizers import pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fewstep.data import emoji
from fewstep.diffusion import kernels
from fewstep.diffusion.schedules import VP

MAX_TOKENS = 24
WIDTHS = (96, 128)  # hidden sizes of the two text encoders; cross-attention sees their concatenation
POOLED = 128
GROUPED = 0.4  # share of samples whose caption is that of their group
TIME_IDS = torch.tensor([64.0, 64, 0, 0, 64, 64])  # original size, crop, target size


# ------------------------------------------------------------------------------------------------- the networks
def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        latent_channels=16,
        block_out_channels=(16, 32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
    )


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        block_out_channels=(64, 160),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=(2, 5),  # diffusers' name for the number of heads
        cross_attention_dim=sum(WIDTHS),
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=POOLED + 6 * 16,
    )


def make_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """A byte-level BPE with CLIP's end-of-word marks, trained on the captions; loads in any transformers."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [start, end, *alphabet, *(a + "</w>" for a in alphabet)]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    backend = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=MAX_TOKENS)._tokenizer
    backend.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=2048,
            special_tokens=[start, end],
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    model = json.loads(backend.to_str())["model"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_TOKENS,
        "bos_token": start,
        "eos_token": end,
        "pad_token": end,
        "unk_token": end,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    return CLIPTokenizer.from_pretrained(folder)


def make_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    def config(width: int, **extra) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **extra,
        )

    first = CLIPTextModel(config(WIDTHS[0]))
    second = CLIPTextModelWithProjection(config(WIDTHS[1], projection_dim=POOLED, hidden_act="gelu"))
    return first, second


class Denoiser(torch.nn.Module):
    """UNet and both text encoders, trained together; encodes exactly as the stock SDXL pipeline does."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.unet = make_unet()
        self.text_encoder, self.text_encoder_2 = make_text_encoders(tokenizer)

    def forward(self, x_t, t, ids, drop):
        hidden = self.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
        second = self.text_encoder_2(ids, output_hidden_states=True)
        keep = (~drop).float()
        embeds = torch.cat([hidden, second.hidden_states[-2]], -1) * keep[:, None, None]
        added = {
            "text_embeds": second.text_embeds * keep[:, None],
            "time_ids": TIME_IDS.expand(len(ids), -1),
        }
        return self.unet(x_t, t, embeds, added_cond_kwargs=added, return_dict=False)[0]


def scheduler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


# ----------------------------------------------------------------------------------------------------- training
class Run:
    """Checkpoint, log, EMA and learning rate of one stage; resumes where it stopped."""

    def __init__(self, folder: Path, stage: str, model: torch.nn.Module, parameters, lr: float, ema: float):
        self.folder, self.stage, self.model, self.lr, self.decay = folder, stage, model, lr, ema
        self.parameters = list(parameters)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
        )
        self.ema = {k: v.clone() for k, v in model.state_dict().items()}
        self.step, self.seconds = 0, 0.0
        self.path = folder / f"{stage}.pt"
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema, self.step, self.seconds = state["ema"], state["step"], state["seconds"]

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "ema": self.ema}
        part = self.path.with_suffix(".part")
        torch.save({**state, "step": self.step, "seconds": self.seconds}, part)
        os.replace(part, self.path)

    def train(self, steps: int, cooldown: int, loss_of, save_every: int = 250) -> None:
        """Warm-up, constant rate, then a linear cool-down over ``cooldown`` steps, which may be decided late."""
        log = (self.folder / f"{self.stage}.jsonl").open("a")
        start, average = time.time() - self.seconds, None
        while self.step < steps:
            remaining = (steps - self.step) / max(1, cooldown)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * min(1.0, (self.step + 1) / 200, remaining)
            torch.manual_seed(self.step)  # stateless noise: a resumed run draws what an undisturbed one would
            terms = loss_of()
            self.optimizer.zero_grad(set_to_none=True)
            sum(terms.values()).backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.step += 1
            decay = min(self.decay, (1 + self.step) / (10 + self.step))
            state = self.model.state_dict()
            with torch.no_grad():
                torch._foreach_lerp_([self.ema[k] for k in state], list(state.values()), 1 - decay)
            values = {k: v.item() for k, v in terms.items()}
            average = {k: 0.98 * average[k] + 0.02 * v for k, v in values.items()} if average else values
            if self.step % 50 == 0:
                self.seconds = time.time() - start
                record = {"step": self.step, "seconds": round(self.seconds, 1), **average}
                log.write(json.dumps(record) + "\n")
                log.flush()
                print(record, flush=True)
            if self.step % save_every == 0 or self.step == steps:
                self.seconds = time.time() - start
                self.save()


def to_unit(images) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def reconstruction_terms(output: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """L1 + MSE + L1 of image gradients, which is what makes 64 px drawings crisp."""
    edges = sum((output.diff(dim=d) - target.diff(dim=d)).abs().mean() for d in (-1, -2))
    return {
        "l1": (output - target).abs().mean(),
        "mse": (output - target).pow(2).mean(),
        "edges": 0.5 * edges,
    }


def as_this_cpu_likes():
    """Around a call of a network on maps of 64 places: autocast and attention as ``auto`` in a recipe has them."""
    autocast = kernels.autocast_for("auto", "cpu")
    attention = kernels.attention_for("auto", "cpu", autocast, 64)
    return kernels.arithmetic("cpu", getattr(torch, autocast) if autocast else None, attention)


def train_vae(folder: Path, steps: int, batch: int = 32) -> None:
    vae, images = make_vae(), to_unit(emoji.load()[0])
    run = Run(folder, "vae", vae, vae.parameters(), lr=2e-3, ema=0.998)

    def loss():
        x = images[torch.randint(0, len(images), (batch,))]
        x = x.flip(-1) if run.step % 2 else x  # mirrored half of the time: free variety
        with as_this_cpu_likes():
            posterior = vae.encode(x).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        with as_this_cpu_likes():
            output = vae.decode(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)).sample.float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean() / x[0].numel()
        return {**reconstruction_terms(output, x), "kl": 1e-3 * kl}

    run.train(steps, cooldown=int(0.9 * steps), loss_of=loss)


@torch.no_grad()
def latents_of(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([vae.encode(x).latent_dist.mean for x in images.split(64)])


def load_vae(folder: Path) -> AutoencoderKL:
    """The EMA weights of the newest autoencoder stage, with its latent scale."""
    vae = make_vae().eval()
    name = "decoder.pt" if (folder / "decoder.pt").exists() else "vae.pt"
    vae.load_state_dict(torch.load(folder / name, weights_only=True)["ema"])
    return vae


def train_decoder(folder: Path, steps: int, batch: int = 32) -> None:
    """The latents stay as they are, so the UNet stays valid; only the drawing gets better."""
    images, vae = to_unit(emoji.load()[0]), load_vae(folder)
    latents = latents_of(vae, images)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    trained = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    run = Run(folder, "decoder", vae, trained, lr=1e-3, ema=0.998)
    scale = latents.std()

    def loss():
        i = torch.randint(0, len(images), (batch,))
        z = latents[i] + 0.05 * scale * torch.randn_like(latents[i])  # what a student makes is never exact
        with as_this_cpu_likes():
            output = vae.decode(z).sample.float()
        return reconstruction_terms(output, images[i])

    run.train(steps, cooldown=int(0.9 * steps), loss_of=loss)


def train_unet(folder: Path, steps: int, cooldown: int, init: Path | None, batch: int = 32) -> None:
    images, captions = emoji.load()
    if init:
        shutil.copytree(init / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    else:
        tokenizer = make_tokenizer([*captions, *emoji.groups()], folder / "tokenizer")
    both = tokenizer(
        [*captions, *emoji.groups()],
        padding="max_length",
        truncation=True,
        max_length=MAX_TOKENS,
        return_tensors="pt",
    )
    ids = both.input_ids.view(2, len(captions), -1)
    latents = latents_of(load_vae(folder), to_unit(images))
    latents = latents / latents.std()
    torch.manual_seed(0)
    model = Denoiser(tokenizer)
    if init:
        pipe = StableDiffusionXLPipeline.from_pretrained(init, add_watermarker=False, use_safetensors=True)
        for name in ("unet", "text_encoder", "text_encoder_2"):
            getattr(model, name).load_state_dict(getattr(pipe, name).float().state_dict())
    print(f"UNet {sum(p.numel() for p in model.unet.parameters()) / 1e6:.2f} M parameters", flush=True)
    schedule = VP.from_scheduler(scheduler())
    run = Run(folder, "unet", model, model.parameters(), lr=1e-3, ema=0.9995)

    def loss():
        i = torch.randint(0, len(latents), (batch,))
        t = torch.randint(0, 1000, (batch,))
        x0, eps = latents[i], torch.randn_like(latents[i])
        x_t = schedule.add_noise(x0, eps, t)
        drop = torch.rand(batch) < 0.1
        kind = (torch.rand(batch) < GROUPED).long()  # its name, or what it shares with its kind
        with as_this_cpu_likes():
            v = model(x_t, t, ids[kind, i], drop).float()
        target = schedule.convert(eps, x_t, t, "eps", "v")
        return {"v": (v - target).pow(2).mean()}

    run.train(steps, cooldown, loss)


def save_pipeline(folder: Path, target: Path) -> None:
    """Everything as one stock pipeline folder; UNet and VAE in fp16 to stay small, loaded as fp32 by default."""
    images, captions = emoji.load()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    model = Denoiser(tokenizer).eval()
    model.load_state_dict(torch.load(folder / "unet.pt", weights_only=True)["ema"])
    first = make_vae().eval()
    first.load_state_dict(torch.load(folder / "vae.pt", weights_only=True)["ema"])
    vae = load_vae(folder)
    std = latents_of(first, to_unit(images)).std().item()
    vae.register_to_config(scaling_factor=1 / std, force_upcast=False)
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        text_encoder_2=model.text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=model.unet,
        scheduler=scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipe.to(dtype=torch.float16)
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        encoder.float()  # transformers loads the stored dtype, diffusers fp32: a plain from_pretrained must agree
    pipe.save_pretrained(target)
    for name in ("tokenizer", "tokenizer_2"):  # the three plain files, which every transformers reads
        for path in (target / name).iterdir():
            path.unlink()
        for path in (folder / "tokenizer").iterdir():
            (target / name / path.name).write_bytes(path.read_bytes())
    size = sum(p.stat().st_size for p in target.rglob("*.safetensors"))
    print(f"{target}: {size / 1e6:.1f} MB of safetensors, latent std {std:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoints and logs")
    parser.add_argument("--stage", choices=["all", "vae", "unet", "decoder", "save"], default="all")
    parser.add_argument("--steps", type=int, help="steps of the chosen stage")
    parser.add_argument("--cooldown", type=int, default=2500, help="steps of falling learning rate (unet)")
    parser.add_argument("--init", type=Path, help="pipeline to start the UNet and encoders from (unet)")
    parser.add_argument("--to", type=Path, help="where `save` writes the pipeline (default RUN/pipeline)")
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    wanted = ["vae", "unet", "decoder", "save"] if args.stage == "all" else [args.stage]
    if "vae" in wanted:
        train_vae(args.run, args.steps or 1500)
    if "unet" in wanted:
        train_unet(args.run, args.steps or 12000, args.cooldown, args.init)
    if "decoder" in wanted:
        train_decoder(args.run, args.steps or 1200)
    if "save" in wanted:
        save_pipeline(args.run, args.to or args.run / "pipeline")


if __name__ == "__main__":
    main()
