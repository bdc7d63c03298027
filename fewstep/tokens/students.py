"""Networks of the students of autoregressive teachers: from noise for every token to all tokens at once.

Both are denoisers of (B, n, C) with a time per token. They start from the teacher's transformer and know its codes, so
a saved one needs nothing else.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..diffusion.cond import Cond
from ..diffusion.denoiser import Guidance
from ..diffusion.kernels import arithmetic
from ..diffusion.schedules import Flow, expand
from ..errors import FewstepError
from .codes import nearest_code
from .llamagen import GPT
from .var import VAR

TRUNKS = {"GPT": GPT, "VAR": VAR}


def plain_config(module: ConfigMixin) -> dict[str, Any]:
    """Arguments that build a module of this class again."""
    return {k: v for k, v in module.config.items() if not k.startswith("_")}


class TokenStudent(ModelMixin, ConfigMixin):
    """What both have: a teacher's transformer that reads embeddings, the codes, and the flow."""

    prediction, attention = "x0", "auto"
    autocast: torch.dtype | None = None
    _repeated_blocks = ("Block",)  # what ``teacher.compile`` compiles

    def _arithmetic(self, x: Tensor):
        return arithmetic(x.device.type, self.autocast, self.attention)

    def _build(self, base_class: str, base_config: dict, num_codes: int, code_dim: int) -> int:
        self.schedule = Flow()
        self.trunk = TRUNKS[base_class](**base_config)
        self.register_buffer("codes", torch.zeros(num_codes, code_dim))
        return self.trunk.width

    @classmethod
    def around(cls, trunk: nn.Module, codes: Tensor, **options: Any):
        """A new student with the weights of ``trunk``, which reads embeddings already."""
        student = cls(
            base_class=type(trunk).__name__,
            base_config=plain_config(trunk),
            num_codes=codes.shape[0],
            code_dim=codes.shape[1],
            **options,
        )
        student.trunk.load_state_dict(trunk.state_dict())
        student.codes.copy_(codes)
        return student.to(codes.device)


class ContinuousHead(nn.Module):
    """Embeddings of features: a norm that the condition shifts and scales, and a linear layer."""

    def __init__(self, width: int, code_dim: int):
        super().__init__()
        self.linear = nn.Linear(width, code_dim)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, width))  # the shift first
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        """Features (B, n, width) and one vector per sample (B, width) -> (B, n, C)."""
        shift, scale = (self.scale_shift_table + condition[:, None]).unsqueeze(2).unbind(1)
        return self.linear(F.layer_norm(features, features.shape[-1:], eps=1e-6) * (1 + scale) + shift)


class ParallelStudent(TokenStudent):
    """DD1's student (arXiv 2412.17153), as its authors released it: known tokens and noise in, tokens out.

    Slot i predicts token i itself and sees earlier groups, never later ones; a mark says whether a slot is known (the
    condition, tokens at t = 0) or holds noise (t = 1). Two heads: the teacher's logits decide the first ``split``
    tokens, a continuous one makes the rest, where an exact code matters less than a good image. Parameters carry the
    names of the published checkpoints, those of the transformer behind ``trunk.``.

    Args:
        layout: which order of operations the weights were trained for; there is no other any more.
    """

    LAYOUT = 2  # before it, marks entered ahead of blocks and not in the condition's slots

    @register_to_config
    def __init__(
        self, base_class: str, base_config: dict, num_codes: int, code_dim: int, split: int, layout: int = 1
    ):
        super().__init__()
        if layout != self.LAYOUT:
            raise FewstepError(
                f"transformer.layout: {layout}: expected {self.LAYOUT}: a student of tokens from before would draw "
                "something else here; distill it anew, or sample it with the fewstep that exported it"
            )
        width = self._build(base_class, base_config, num_codes, code_dim)
        self.n_d_embed = nn.Embedding(2, width)
        self.final_layer_conti = ContinuousHead(width, code_dim)
        nn.init.normal_(self.n_d_embed.weight, std=0.02)

    @classmethod
    def of(cls, net: Any, codes: Tensor, split: int) -> ParallelStudent:
        """Starts from a teacher's network and codes (V, C)."""
        return cls.around(net.reading_codes(codes, aligned=True), codes, split=split, layout=cls.LAYOUT)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """Logits (B, n, V) and embeddings (B, n, C), both fp32.

        Args:
            x_t: (B, n, C), embeddings of known tokens or unit noise. t: (B, n, 1) or (B,), 0 where known, else 1.
        """
        known = (expand(t, x_t)[..., 0] == 0).expand(x_t.shape[:2])
        given = known.new_ones(len(known), self.trunk.slots)
        with self._arithmetic(x_t):
            marks = self.n_d_embed(torch.cat([given, known], 1).long())
            features = self.trunk.aligned_features(x_t, marks, cond)
            embedded = self.final_layer_conti(features, self.trunk.condition(cond))
            return self.trunk.logits(features, cond), embedded.float()

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond, *, guidance: Guidance = 1.0) -> Tensor:
        """(B, n, C): known tokens as they are, codes before ``split``, the continuous head's embeddings after it."""
        logits, embedded = self(x_t, t, cond)
        split = self.config.split
        made = torch.cat([self.codes[logits[:, :split].argmax(-1)], embedded[:, split:]], 1)
        return torch.where(expand(t, x_t) == 0, x_t, made)


class CausalStudent(TokenStudent):
    """DD2's generator and critic (arXiv 2510.21003): a causal transformer without its logits and a small flow head.

    The transformer turns the tokens before the i-th, or their noise, into a feature; the head maps a noisy token and
    its feature to a velocity (MAR's residual MLP with adaptive norms, arXiv 2406.11838). What is noisy never enters the
    transformer, so one context serves many noise levels.
    """

    @register_to_config
    def __init__(
        self,
        base_class: str,
        base_config: dict,
        num_codes: int,
        code_dim: int,
        head_width: int = 1024,
        head_depth: int = 3,
    ):
        super().__init__()
        width = self._build(base_class, base_config, num_codes, code_dim)
        self.head = VelocityHead(code_dim, width, head_width, head_depth)

    @classmethod
    def of(cls, net: Any, codes: Tensor, **options: Any) -> CausalStudent:
        """Starts from a teacher's network and codes (V, C). options: ``head_width``, ``head_depth``."""
        trunk = net.reading_codes(codes, aligned=False)
        trunk.drop_head()
        return cls.around(trunk, codes, **options)

    def forward(
        self,
        tokens: Tensor | None = None,
        cond: Cond | None = None,
        x_t: Tensor | None = None,
        t: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """Features (B, n, width) of embeddings (B, n, C) and their condition; or, given features, velocities of x_t."""
        with self._arithmetic(tokens if features is None else x_t):
            if features is None:
                return self.trunk.features(tokens, cond)
            return self.head(x_t, expand(t, x_t).expand(*x_t.shape[:-1], 1), features).float()

    def context(self, clean: Tensor, cond: Cond, *, guidance: float = 1.0) -> Cond:
        """Features of what comes before each token; clean (B, n, C) as it is, quantised or not."""
        return Cond({"features": self(tokens=clean, cond=cond)})

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond, *, guidance: Guidance = 1.0) -> Tensor:
        """Posterior mean (B, n, C) given a context; on a flow ``x_t - t v``."""
        velocity = self(x_t=x_t, t=t, features=cond["features"])
        return x_t - expand(t, x_t) * velocity

    def quantised(self, x: Tensor) -> Tensor:
        return self.codes[nearest_code(x, self.codes)]


class Generator:
    """A :class:`CausalStudent` as DD2's one-step generator: noise is its own prefix, ``x = eps - v(eps, 1)``."""

    prediction = "x0"

    def __init__(self, net: CausalStudent):
        self.net, self.schedule = net, net.schedule

    @property
    def autocast(self) -> torch.dtype | None:
        return self.net.autocast

    @autocast.setter
    def autocast(self, dtype: torch.dtype | None) -> None:
        self.net.autocast = dtype

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond, *, guidance: Guidance = 1.0) -> Tensor:
        return self.net.x0(x_t, t, self.net.context(x_t, cond))


class VelocityHead(nn.Module):
    def __init__(self, code_dim: int, feature_dim: int, width: int, depth: int):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.feature = nn.Linear(feature_dim, width)
        self.input = nn.Linear(code_dim, width)
        self.blocks = nn.ModuleList(AdaptiveBlock(width) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, code_dim)
        for layer in (self.modulation, self.output):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, features: Tensor) -> Tensor:
        y = F.silu(self.time(_sinusoids(t.to(x.dtype))) + self.feature(features))
        h = self.input(x)
        for block in self.blocks:
            h = block(h, y)
        shift, scale = self.modulation(y).chunk(2, -1)
        return self.output(F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift)


class AdaptiveBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.modulation = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(y).chunk(3, -1)
        return h + gate * self.mlp(F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift)


def _sinusoids(t: Tensor) -> Tensor:
    """Times (..., 1) in [0, 1] -> (..., 256)."""
    frequencies = torch.exp(-math.log(1e4) * torch.arange(128, device=t.device, dtype=t.dtype) / 128)
    phase = 1000 * t * frequencies
    return torch.cat([phase.cos(), phase.sin()], -1)
