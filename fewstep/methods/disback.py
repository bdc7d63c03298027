"""DisBack: distribution backtracking (Zhang et al., 2024, arXiv 2408.15991).

Early on a teacher knows little about what the student makes. DisBack first records how the teacher degrades into the
student: a copy of it is trained on the samples of the initial, frozen student and put down N times on the way. Then
the student follows these nodes backwards, each the teacher of a while, up to the original teacher. Everything else is
distribution matching as in DMD2.

This is the paper's algorithm. The authors' published code never loads its nodes, so it does something else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..bounds import Count, Least0
from ..diffusion.cond import Cond
from ..diffusion.denoiser import Denoiser, Guidance, NetDenoiser
from ..errors import RecipeError
from .base import Batch, Method, Phase, Progress, register
from .dmd2 import DMD2
from .terms import regression

if TYPE_CHECKING:
    from typing_extensions import Self


class Target:
    """The real score of the moment: a denoiser that is one of several.

    Args:
        path: denoisers in the order the student meets them; the last is the original teacher.
        guide_nodes: guidance asked of an earlier one is given; otherwise it is left out.
    """

    def __init__(self, path: Sequence[Denoiser], guide_nodes: bool):
        self.path, self.guide_nodes, self.index = path, guide_nodes, 0
        self.schedule = path[-1].schedule

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond, *, guidance: Guidance = 1.0) -> Tensor:
        last = self.index == len(self.path) - 1
        return self.path[self.index].x0(x_t, t, cond, guidance=guidance if last or self.guide_nodes else 1.0)


@register("disback")
class DisBack(Method):
    """Degradation recording, then distribution matching along the reversed path.

    Which node learns, which is the target and when weights are handed on are functions of the iteration; nodes are
    roles, so a checkpoint holds them.
    """

    summary = "records how the teacher degrades into the student, then distills along that path backwards"
    papers = ("2408.15991",)
    critic: NetDenoiser

    @dataclass
    class Config(DMD2.Config):
        """DMD2's options and those of the path.

        Published for one-step SDXL: 10 nodes of 100 iterations, 1000 iterations per target, guidance 8, start 399.

        Attributes:
            nodes: N. Each is a role "node_k" of the size of the critic: cheap as LoRA.
            record_steps: iterations of training per node; the first ``nodes * record_steps`` train nodes only.
            backtrack_steps: iterations per target, of N - 1 nodes; the rest of the run has the original teacher.
            guide_nodes: guidance for nodes too. They learned what the student makes of a condition, so extrapolating
                away from the null condition means little there.
            critic_steps: critic updates per student update while backtracking; 1 in the paper.
            gan_weight: of an optional GAN as in DMD2; the paper's algorithm has none.
        """

        nodes: Count = 10
        record_steps: Count = 100
        backtrack_steps: Count = 1000
        guide_nodes: bool = False
        num_steps: Count = 1
        critic_steps: Count = 1
        gan_weight: Least0 = 0.0

        def smoke(self) -> Self:
            return replace(super().smoke(), nodes=2, record_steps=1, backtrack_steps=1)

        @classmethod
        def toy(cls) -> Self:
            return cls(nodes=2, record_steps=2, backtrack_steps=2)

    config: Config

    def build(self, student: Denoiser, critic: NetDenoiser, **nodes: NetDenoiser) -> None:
        config, self.critic = self.config, critic
        self.nodes = [nodes[f"node_{k}"] for k in range(1, config.nodes + 1)]
        _check_equal({**nodes, "critic": critic})
        # The last node is where the critic starts, so the student's first target is the one before it.
        self.target = Target([*self.nodes[-2::-1], self.teacher], config.guide_nodes)
        self.host = DMD2(config, self.target, self.latent_shape, student=student, critic=critic)
        self.student = self.host.student

    @classmethod
    def networks_for(cls, config: DisBack.Config) -> tuple[str, ...]:
        return ("student", "critic", *(f"node_{k}" for k in range(1, config.nodes + 1)))

    @classmethod
    def needs(cls, config: DisBack.Config) -> tuple[str, ...]:
        return DMD2.needs(config)

    def heads(self) -> dict[str, nn.Module]:
        return self.host.heads()

    # ------------------------------------------------------------------------------------------------- phases
    @property
    def recorded(self) -> int:
        """Iterations of the recording stage."""
        return self.config.nodes * self.config.record_steps

    def target_index(self, progress: Progress) -> int:
        """0-based place of the target on the path, from the iteration alone."""
        done = progress.iteration - self.recorded
        return min(done // self.config.backtrack_steps, len(self.target.path) - 1)

    def phases(self) -> list[Phase]:
        generator, critic = self.host.phases()
        phases: list[Phase] = []
        for k in range(self.config.nodes):
            phases += self._recording(k)
        return [
            *phases,
            _handed(f"node_{self.config.nodes}", "critic", lambda p: p.iteration >= self.recorded),
            self._backtracking(generator, self.generator_loss),
            self._backtracking(critic, critic.loss),
        ]

    def _recording(self, k: int) -> list[Phase]:
        """Of node k, 0-based: from where the node before stopped, the first one from the teacher."""
        steps, loss, name = self.config.record_steps, functools.partial(self.record_loss, k), f"node_{k + 1}"

        def when(progress: Progress) -> bool:
            return progress.iteration // steps == k

        record = Phase(f"record_{k + 1}", (name,), loss, when=when)
        return [_handed(f"node_{k}", name, when), record] if k else [record]

    def _backtracking(self, phase: Phase, loss) -> Phase:
        """A phase of the host whose iterations count from the end of the recording."""

        def when(progress: Progress) -> bool:
            return phase.when(replace(progress, iteration=progress.iteration - self.recorded))

        return replace(phase, loss=loss, after=lambda _progress: self.recorded, when=when)

    # ------------------------------------------------------------------------------------------------- losses
    def record_loss(self, k: int, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Node k learns to denoise what the untrained student makes."""
        node, host = self.nodes[k], self.host
        with torch.no_grad():
            x0, cond = host.generate(batch)
        x_t, t = host.noised(x0, batch)
        return {"denoising": regression(node, self.config.critic_loss, x0, x_t, t, cond)}

    def generator_loss(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        self.target.index = self.target_index(progress)
        return self.host.generator_loss(batch, progress)


def _handed(source: str, target: str, when: Callable[[Progress], bool]) -> Phase:
    """The weights of one role become those of another, once, as ``when`` begins to hold."""
    return Phase(f"{target}_start", (target,), None, once=True, when=when, follows=(source, 0.0))


def _check_equal(denoisers: dict[str, NetDenoiser]) -> None:
    """Weights travel between these roles, so they must be trained in the same way.

    Raises:
        RecipeError: two roles differ in their trained weights, or in the strength of an adapter.
    """

    def trained(net: nn.Module) -> dict[str, object]:
        weights = {name: p.shape for name, p in net.named_parameters() if p.requires_grad}
        return weights | {name: m.scaling for name, m in net.named_modules() if hasattr(m, "scaling")}

    expected = trained(denoisers["node_1"].net)
    for name, denoiser in denoisers.items():
        if trained(denoiser.net) != expected:
            raise RecipeError(
                f"roles.{name}: trains other weights than roles.node_1; disback hands weights on from node to node "
                "and to the critic: give all of them the same kind, rank, alpha and targets"
            )
