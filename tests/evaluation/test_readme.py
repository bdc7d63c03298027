"""Every command of eval/README.md is one that exists, and its spec is one that loads."""

import re
import shlex
from pathlib import Path

from fewstep.cli.main import parser
from fewstep.evaluation import protocols
from fewstep.evaluation.spec import load_spec

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "eval" / "README.md").read_text()


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    texts = [line.strip() for line in lines if " eval " in line] + re.findall(
        r"`(fewstep eval run --.*?)`", README, re.S
    )
    return [shlex.split(re.sub(r".*?fewstep eval", "eval", text, count=1)) for text in texts]


def test_every_command_parses_and_names_what_exists():
    found = [parser().parse_args(words) for words in commands()]
    assert {args.eval_command for args in found} == {"stats", "generate", "fid", "scores", "run"}
    for args in found:
        if getattr(args, "protocol", None):
            assert protocols.load(args.protocol)
    table = set(re.findall(r"^\| `fewstep eval (\w+)`", README, re.M))
    assert {"generate", "fid", "scores", "diversity", "run", "compare", "stats"} == table


def test_the_spec_loads(tmp_path):
    (tmp_path / "spec.yaml").write_text(re.search(r"```yaml\n(.*?)```", README, re.S)[1])
    spec = load_spec(tmp_path / "spec.yaml")
    assert (ROOT / spec.prompts).is_file() and [entry.name for entry in spec.models] == ["teacher", "student"]
