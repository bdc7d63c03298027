"""One logged number of several runs side by side, as a picture: the charts of their reports.

python eval/curves.py health/critic_lag "a critic that follows=runs/a" "one that does not=runs/b" --out lag.svg
"""

import argparse
import re
import sys
from html import escape
from pathlib import Path

from fewstep.errors import FewstepError, RecipeError, tell
from fewstep.files import check_place, write
from fewstep.report.chart import chart_of
from fewstep.report.log import read_metrics

WIDTH, HEIGHT, TITLE, GAP = 360, 160, 24, 16
STYLE = """
text { font: 10.5px system-ui, sans-serif; fill: #666 } .title { font-size: 13px; font-weight: 600; fill: #222 }
.rule { stroke: #ddd; fill: none } .healthy { fill: #2e8b571f } .dots, .bars { stroke: #4051b555; fill: none }
.dots { stroke-width: 2; stroke-linecap: round } polyline { stroke: #4051b5; stroke-width: 1.6; fill: none }
.bad { stroke: #c33; fill: none } .guide, circle { display: none } .paper { fill: #fff }
"""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("metric", help="as in metrics.jsonl")
    parser.add_argument("runs", nargs="+", metavar="TITLE=RUN")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        check_place(options.out, folder=False, option="--out")
        write(options.out, picture(options.metric, [tuple(run.rsplit("=", 1)) for run in options.runs]))
    except FewstepError as error:
        return tell(error)
    print(options.out)
    return 0


def picture(metric: str, runs: list[tuple[str, ...]]) -> str:
    """SVG of a row of charts.

    Raises:
        RecipeError: a run without this number, or a title without a run.
    """
    parts = []
    for i, run in enumerate(runs):
        if len(run) != 2:
            raise RecipeError(f"{run[0]}: expected TITLE=RUN, e.g. 'a critic that follows=runs/a'")
        title, folder = run
        records = read_metrics(Path(folder) / "metrics.jsonl")
        if not any(metric in record for record in records):
            known = sorted({name for record in records for name in record} - {"step", "seconds"})
            raise RecipeError(
                f"{folder}: {metric} was not logged; there are {', '.join(known) or 'no numbers'}"
            )
        drawn = re.search(r"<svg.*?>(.*)</svg>", chart_of(metric, records), re.DOTALL)[1]
        heading = f'<text class="title" x="8" y="18">{escape(title)}</text>'
        place, below = GAP + i * (WIDTH + GAP), f'<g transform="translate(0 {TITLE})">{drawn}</g>'
        parts.append(f'<g transform="translate({place} 0)">{heading}{below}</g>')
    size = f"{GAP + len(runs) * (WIDTH + GAP)} {TITLE + HEIGHT + GAP}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img" aria-label="{escape(metric)}">'
        f'<style>{STYLE}</style><rect class="paper" width="100%" height="100%"/>{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
