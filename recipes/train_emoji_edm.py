"""Train ``builtin:emoji-edm``, the small EDM in pixels that ships with fewstep: emoji at 32 px, by their 98 kinds.

    python recipes/train_emoji_edm.py --run runs/emoji-edm      # both stages; Ctrl-C and rerun to continue
    python recipes/train_emoji_edm.py --run runs/emoji-edm --stage save

Stages: ``net`` (DDPM++ with EDM's preconditioning and loss, arXiv 2206.00364, table 1, and more noise than photographs
want; one label in ten is dropped, so that guidance has its branch), ``save`` (an ``EDMPipeline`` folder, fp16 weights).
"""

import argparse
from pathlib import Path

import torch
from train_emoji_xl import Run, to_unit

from fewstep.data import emoji
from fewstep.diffusion.schedules import EDM
from fewstep.teachers.edm.networks import EDMPrecond

SIZE = 32
DROPPED = 0.1  # share of labels


def make_net() -> EDMPrecond:
    return EDMPrecond(
        sample_size=SIZE,
        num_class_embeds=len(emoji.kinds()),
        model_channels=16,
        channel_mult=(1, 2, 4, 8),
        num_blocks=1,
        attn_resolutions=(8,),
        null_label=True,
    )


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, 32, 32) in [-1, 1] and their classes (N,)."""
    number = {kind: i for i, kind in enumerate(emoji.kinds())}
    images = torch.nn.functional.avg_pool2d(to_unit(emoji.load()[0]), 2)
    return images, torch.tensor([number[kind] for kind in emoji.groups()])


def posterior_mean(
    x_t: torch.Tensor, sigma: torch.Tensor, images: torch.Tensor, likely: torch.Tensor
) -> torch.Tensor:
    """What is behind x_t (B, C, H, W) on average, among those of all N images that are ``likely`` (B, N).

    The gradient is that of the image itself on average, with less variance where there is much noise (stable target
    fields, arXiv 2302.00670, over the whole training set).
    """
    flat = images.flatten(1)
    logits = (x_t.flatten(1) @ flat.T - flat.square().sum(1) / 2) / sigma[:, None].square()
    weights = logits.masked_fill(~likely, -torch.inf).softmax(1)
    return (weights @ flat).view_as(x_t)


def told_of(
    labels: torch.Tensor, i: torch.Tensor, dropped: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the network is told of images i (B,), (B,), and which of all N they may be by that, (B, N)."""
    none = len(emoji.kinds())
    told = torch.where(dropped, none, labels[i])
    return told, (told[:, None] == labels) | (told == none)[:, None]


def edm_loss(
    net: EDMPrecond, x_t: torch.Tensor, sigma: torch.Tensor, told: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """Squared error by EDM's weight, which makes it that of what the network puts out before preconditioning."""
    std = net.config.sigma_data
    error = (net(x_t.contiguous(memory_format=torch.channels_last), sigma, told)[0] - target).square()
    weight = (sigma**2 + std**2) / (sigma * std) ** 2
    return (weight[:, None, None, None] * error).mean()


def train_net(folder: Path, steps: int, cooldown: int, batch: int = 64) -> None:
    images, labels = data()
    torch.manual_seed(0)
    net = make_net().to(memory_format=torch.channels_last)
    print(f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters", flush=True)
    schedule = EDM()
    run = Run(folder, "net", net, net.parameters(), lr=1.5e-3, ema=0.999)

    def loss():
        i = torch.randint(0, len(images), (batch,))
        # Which drawing it is is decided at more noise than in photographs (-1.2, 1.2): there the network errs most.
        sigma = torch.exp(0.6 + 1.4 * torch.randn(batch))
        x0 = images[i]
        x_t = schedule.add_noise(x0, torch.randn_like(x0), sigma)
        told, likely = told_of(labels, i, torch.rand(batch) < DROPPED)
        return {"edm": edm_loss(net, x_t, sigma, told, posterior_mean(x_t, sigma, images, likely))}

    run.train(steps, cooldown, loss)


def save_pipeline(folder: Path, target: Path) -> None:
    """The averaged weights in fp16 as one pipeline folder."""
    from fewstep.teachers.edm.pipeline import EDMPipeline, EDMScheduler

    net = make_net().eval()
    net.load_state_dict(torch.load(folder / "net.pt", weights_only=True)["ema"])
    EDMPipeline(net.half(), EDMScheduler(), id2label=dict(enumerate(emoji.kinds()))).save_pretrained(target)
    size = sum(p.stat().st_size for p in target.rglob("*.safetensors"))
    print(f"{target}: {size / 1e6:.1f} MB of safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoints and logs")
    parser.add_argument("--stage", choices=["all", "net", "save"], default="all")
    parser.add_argument("--steps", type=int, default=16000)
    parser.add_argument("--cooldown", type=int, default=3000, help="steps of falling learning rate")
    parser.add_argument("--to", type=Path, help="where `save` writes the pipeline (default RUN/pipeline)")
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    if args.stage in ("all", "net"):
        train_net(args.run, args.steps, args.cooldown)
    if args.stage in ("all", "save"):
        save_pipeline(args.run, args.to or args.run / "pipeline")


if __name__ == "__main__":
    main()
