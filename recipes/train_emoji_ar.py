"""Train emoji-ar, a small autoregressive text-to-image pipeline of tokens, on two CPU cores.

    python recipes/train_emoji_ar.py --run runs/emoji-ar                # all stages; Ctrl-C and rerun to continue
    python recipes/train_emoji_ar.py --run runs/emoji-ar --stage gpt --steps 3000

It starts from ``builtin:emoji-xl``: its autoencoder and its second text encoder. Stages: ``codes`` (a codebook by
k-means on the latents, which fixes the 8x8 tokens of every image), ``decoder`` (learns to draw from codes), ``gpt``
(LlamaGen's transformer on the tokens, conditioned on the frozen text features), ``save`` (a pipeline folder, fp16,
which a recipe takes as its teacher).
What came of it, and how long it took: ``eval/results/teacher_emoji_ar.md``.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, VQModel
from train_emoji_xl import GROUPED, Run, as_this_cpu_likes, reconstruction_terms, to_unit
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from fewstep.data import emoji
from fewstep.diffusion.cond import Cond
from fewstep.teachers.load import BUILTIN
from fewstep.tokens.llamagen import GPT
from fewstep.tokens.pipeline import LlamaGenPipeline

CODES, CODE_DIM = 1024, 8
SLOTS = 12  # tokens of a caption, start and end marks included
TOP_P = 0.8  # how the pipeline draws tokens: what is left out is mostly noise between 1,024 codes
WRONG = 0.5  # of an image's tokens at most is wrong where the transformer reads them; a sixth on average
XL = BUILTIN["builtin:emoji-xl"]


# ------------------------------------------------------------------------------------------------- the tokenizer
def make_vqvae() -> VQModel:
    """The autoencoder of emoji-xl with a quantiser between, on the CODE_DIM widest directions of its latents."""
    return VQModel(
        latent_channels=16,
        block_out_channels=(16, 32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
        num_vq_embeddings=CODES,
        vq_embed_dim=CODE_DIM,
    )


def k_means(x: torch.Tensor, count: int, steps: int = 25) -> torch.Tensor:
    """Centres (count, C) of x (N, C); one that nothing is near moves to a random x."""
    centres = x[torch.randperm(len(x))[:count]].clone()
    for _ in range(steps):
        nearest = torch.cat([torch.cdist(part, centres).argmin(1) for part in x.split(16384)])
        sizes = nearest.bincount(minlength=count)
        centres = torch.zeros_like(centres).index_add_(0, nearest, x) / sizes.clamp(min=1)[:, None]
        dead = sizes == 0
        centres[dead] = x[torch.randperm(len(x))[: int(dead.sum())]]
    return centres


@torch.no_grad()
def make_codes(folder: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(XL / "vae").float().eval()
    images = to_unit(emoji.load()[0])
    latents = torch.cat([vae.encode(x).latent_dist.mean for x in images.split(64)])
    flat = latents.permute(0, 2, 3, 1).flatten(0, 2)
    mean = flat.mean(0)
    directions = torch.linalg.svd(flat[::4] - mean, full_matrices=False).Vh[:CODE_DIM]
    scale = ((flat - mean) @ directions.T).std()  # codes of unit spread, as the noise that flows to them has
    projected = (flat - mean) @ directions.T / scale
    vq = make_vqvae()
    state = {k: v for k, v in vae.state_dict().items() if k.startswith(("encoder.", "decoder."))}
    # A variational encoder also outputs log-variances; the mean is the first half, through a 1x1 convolution.
    for name in ("weight", "bias"):
        state[f"encoder.conv_out.{name}"] = torch.einsum(
            "oi,i...->o...", vae.quant_conv.weight[:16, :, 0, 0], vae.encoder.conv_out.state_dict()[name]
        )
    state["encoder.conv_out.bias"] += vae.quant_conv.bias[:16]
    state |= {
        "quant_conv.weight": (directions / scale)[..., None, None],
        "quant_conv.bias": -directions @ mean / scale,
        "quantize.embedding.weight": k_means(projected, CODES),
        "post_quant_conv.weight": (vae.post_quant_conv.weight[..., 0, 0] @ directions.T * scale)[
            ..., None, None
        ],
        "post_quant_conv.bias": vae.post_quant_conv.weight[..., 0, 0] @ mean + vae.post_quant_conv.bias,
    }
    vq.load_state_dict(state)
    vq.eval()
    tokens = torch.cat([vq.quantize(vq.encode(x).latents)[2][2].view(len(x), -1) for x in images.split(64)])
    used = len(tokens.unique())
    torch.save({"vq": vq.state_dict(), "tokens": tokens}, folder / "codes.pt")
    print(f"{used} of {CODES} codes in use", flush=True)


def load_codes(folder: Path) -> tuple[VQModel, torch.Tensor]:
    """The tokenizer, with the newest decoder, and the tokens (1906, 64) of all images."""
    state = torch.load(folder / "codes.pt", weights_only=True)
    vq = make_vqvae().eval()
    vq.load_state_dict(state["vq"])
    if (folder / "decoder.pt").exists():
        vq.load_state_dict(torch.load(folder / "decoder.pt", weights_only=True)["ema"])
    return vq, state["tokens"]


def train_decoder(folder: Path, steps: int, batch: int = 32) -> None:
    """Encoder and codes stay, so the tokens stay; the decoder learns to draw from them, and from codes near them."""
    images, (vq, tokens) = to_unit(emoji.load()[0]), load_codes(folder)
    vq.requires_grad_(False)
    trained = [*vq.decoder.parameters(), *vq.post_quant_conv.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    run = Run(folder, "decoder", vq, trained, lr=1e-3, ema=0.998)

    def loss():
        i = torch.randint(0, len(images), (batch,))
        q = vq.quantize.embedding(tokens[i]).view(batch, 8, 8, CODE_DIM).permute(0, 3, 1, 2)
        with as_this_cpu_likes():
            output = vq.decode(q, force_not_quantize=True).sample.float()
        return reconstruction_terms(output, images[i])

    run.train(steps, cooldown=int(0.9 * steps), loss_of=loss, save_every=100)


# ----------------------------------------------------------------------------------------------- the transformer
def make_gpt() -> GPT:
    """It reads tokens as their codes: what is learned is what a student can start from, which reads noise there."""
    return GPT(
        vocab_size=CODES,
        dim=128,
        n_layer=6,
        n_head=4,
        block_size=64,
        num_classes=None,
        caption_dim=128,
        cls_token_num=SLOTS,
        multiple_of=64,
        rotated_condition=True,
        code_dim=CODE_DIM,
    )


@torch.no_grad()
def text_features(captions: list[str]) -> torch.Tensor:
    """(N, SLOTS, 128): the last hidden layer but one, as SDXL has it."""
    tokenizer = CLIPTokenizer.from_pretrained(XL / "tokenizer_2")
    encoder = CLIPTextModelWithProjection.from_pretrained(XL / "text_encoder_2").eval()
    ids = tokenizer(captions, padding="max_length", truncation=True, max_length=SLOTS, return_tensors="pt")
    parts = [encoder(part, output_hidden_states=True).hidden_states[-2] for part in ids.input_ids.split(256)]
    return torch.cat(parts)


def misread(tokens: torch.Tensor) -> torch.Tensor:
    """Some tokens (B, n) exchanged for random ones, of every image another share.

    One token that does not fit, its own or a student's, would otherwise leave all later ones without a clue.
    """
    share = WRONG * torch.rand(len(tokens), 1).square()
    return torch.where(torch.rand(tokens.shape) < share, torch.randint_like(tokens, CODES), tokens)


def train_gpt(folder: Path, steps: int, cooldown: int, batch: int = 32) -> None:
    captions, (vq, tokens) = emoji.load()[1], load_codes(folder)
    codes = vq.quantize.embedding.weight.detach()
    features = text_features([*captions, *emoji.groups()]).view(2, len(captions), SLOTS, -1)
    torch.manual_seed(0)
    gpt = make_gpt()
    print(f"GPT {sum(p.numel() for p in gpt.parameters()) / 1e6:.2f} M parameters", flush=True)
    run = Run(folder, "gpt", gpt, gpt.parameters(), lr=3e-3, ema=0.998)

    def loss():
        i = torch.randint(0, len(tokens), (batch,))
        kind = (torch.rand(batch) < GROUPED).long()  # its name, or what it shares with its kind
        cond = Cond({"embeds": features[kind, i], "null": torch.rand(batch) < 0.1})
        with as_this_cpu_likes():
            logits = gpt(codes[misread(tokens[i])], cond)
        return {"ce": F.cross_entropy(logits.flatten(0, 1), tokens[i].flatten())}

    run.train(steps, cooldown, loss, save_every=100)


def with_table(gpt: GPT, codes: torch.Tensor) -> GPT:
    """The same network over indices: what the linear layer makes of every code is the table."""
    config = {**gpt.config, "code_dim": None}
    other = GPT(**{k: v for k, v in config.items() if not k.startswith("_")})
    state = {k: v for k, v in gpt.state_dict().items() if not k.startswith("tok_embeddings.")}
    other.load_state_dict(state | {"tok_embeddings.weight": gpt.tok_embeddings(codes).detach()})
    return other


def save_pipeline(folder: Path, target: Path) -> None:
    """Everything as one pipeline folder; transformer and tokenizer in fp16 to stay small, loaded as fp32 by default."""
    gpt, (vq, _) = make_gpt(), load_codes(folder)
    gpt.load_state_dict(torch.load(folder / "gpt.pt", weights_only=True)["ema"])
    pipe = LlamaGenPipeline(
        with_table(gpt, vq.quantize.embedding.weight).half(),
        vq.half(),
        CLIPTextModelWithProjection.from_pretrained(XL / "text_encoder_2"),
        CLIPTokenizer.from_pretrained(XL / "tokenizer_2"),
        top_p=TOP_P,
    )
    pipe.save_pretrained(target)
    size = sum(p.stat().st_size for p in target.rglob("*.safetensors"))
    print(f"{target}: {size / 1e6:.1f} MB of safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoints and logs")
    parser.add_argument("--stage", choices=["all", "codes", "decoder", "gpt", "save"], default="all")
    parser.add_argument("--steps", type=int, help="steps of the chosen stage")
    parser.add_argument("--cooldown", type=int, default=4000, help="steps of falling learning rate (gpt)")
    parser.add_argument("--to", type=Path, help="where `save` writes the pipeline (default RUN/pipeline)")
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    wanted = ["codes", "decoder", "gpt", "save"] if args.stage == "all" else [args.stage]
    if "codes" in wanted and not (args.run / "codes.pt").exists():
        make_codes(args.run)
    if "decoder" in wanted:
        train_decoder(args.run, args.steps or 1500)
    if "gpt" in wanted:
        train_gpt(args.run, args.steps or 9000, args.cooldown)
    if "save" in wanted:
        save_pipeline(args.run, args.to or args.run / "pipeline")


if __name__ == "__main__":
    main()
