"""Students that the authors of Distilled Decoding released (arXiv 2412.17153): VAR-DD and LlamaGen-DD."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..errors import FewstepError
from .llamagen import GPT
from .state import MARKS, PYRAMID, load_weights
from .students import ParallelStudent
from .var import VAR

# Of VAR by its depth, of LlamaGen by its width: the first token of the continuous head, and of the second step.
KNOWN = {VAR: {16: (55, 55), 20: (30, 30), 24: (30, 30)}, GPT: {768: (80, 80), 1024: (130, 80)}}


def is_student(state: Mapping[str, Tensor]) -> bool:
    """Whether published weights are a student's."""
    return MARKS in state


def student(
    net: GPT | VAR,
    codes: Tensor,
    state: Mapping[str, Tensor],
    source: str,
    size: int,
    split: int | None = None,
    entries: Sequence[int] | None = None,
) -> tuple[ParallelStudent, list[int]]:
    """A released student, and where its steps begin.

    Args:
        net: its transformer, whose weights do not matter. codes: (V, C). state: as published. source: for messages.
        size: depth or width, by which the released ones are known. split, entries: see
            :class:`~fewstep.tokens.students.ParallelStudent` and :class:`~fewstep.tokens.entries.EntryStudent`; the
            files do not say, so they are needed of any other size.

    Raises:
        FewstepError: keys that do not fit; a split or entries that are missing or no tokens of this model.
    """
    known = KNOWN[type(net)].get(size)
    if known is None and (split is None or entries is None):
        raise FewstepError(
            f"{source}: a student of a size that was not released: give --split, the tokens its logits decide, and "
            "--entries, where its steps begin, e.g. 0,80"
        )
    first, second = known or (0, 0)
    split, steps = first if split is None else split, [0, second] if entries is None else list(entries)
    _check(net, split, steps)
    made = ParallelStudent.around(net, codes, split=split, layout=ParallelStudent.LAYOUT)
    # Averages hold parameters only; what a network has beside them is constant.
    own, trained = made.state_dict(), dict(made.named_parameters())
    constants = {
        name: value for name, value in own.items() if name not in trained and not PYRAMID.search(name)
    }
    names = {name.removeprefix("trunk."): name for name in own}
    load_weights(made, {**constants, **{names.get(k, k): value for k, value in state.items()}}, source)
    return made.eval(), steps


def _check(net: GPT | VAR, split: int, entries: Sequence[int]) -> None:
    starts, tokens = [sum(net.groups[:g]) for g in range(len(net.groups))], sum(net.groups)
    if not 0 <= split <= tokens:
        raise FewstepError(f"--split {split}: expected a number of tokens, 0 to {tokens}")
    odd = [entry for entry in entries if entry not in starts]
    if odd or list(entries) != sorted({0, *entries}):
        raise FewstepError(
            f"--entries {','.join(map(str, entries))}: expected 0 and then rising, each the first token of a group of "
            f"this model: {starts if len(starts) < 20 else f'0 to {starts[-1]}'}"
        )
