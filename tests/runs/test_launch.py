"""The launch files are valid, and start what they say: with stand-ins for the cluster's commands."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "recipes" / "launch"


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Commands of a cluster of two machines that print what they are given; ``fails`` has exit codes of python."""
    stubs = {
        "torchrun": 'echo torchrun "$@"',
        "python": 'echo "$RANK/$WORLD_SIZE:$LOCAL_RANK $MASTER_ADDR" python "$@"; exit ${PYTHON_CODE:-0}',
        "scontrol": 'if [[ $1 == show ]]; then printf "node1\\nnode2\\n"; else echo scontrol "$@"; fi',
        "srun": "shift; code=0; for i in 0 1; do "
        'SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 "$@" || code=$?; done; exit $code',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    def run(file, *words, **environment):
        return subprocess.run(
            ["bash", str(LAUNCH / file), *words],
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
        )

    return run


@pytest.mark.parametrize("name", ["slurm.sbatch", "torchrun.sh"])
def test_scripts_are_bash(name):
    assert subprocess.run(["bash", "-n", str(LAUNCH / name)]).returncode == 0


def test_torchrun_is_given_the_meeting_place(cluster):
    done = cluster("torchrun.sh", "node1", "2", "recipe.py", "--train.shard", "8")
    assert done.stdout.split() == [
        *("torchrun", "--nnodes", "2", "--nproc_per_node", "8", "--rdzv_backend", "c10d"),
        *("--rdzv_endpoint", "node1:29500", "--rdzv_id", "fewstep", "recipe.py", "--train.shard", "8"),
    ]


def test_slurm_starts_every_rank_and_resumes_what_is_there(cluster, tmp_path):
    run = tmp_path / "run"
    done = cluster("slurm.sbatch", "recipe.py", "--output", str(run))
    assert done.returncode == 0 and done.stdout.splitlines() == [
        f"{rank}/2:{rank} node1 python recipe.py --output {run}" for rank in (0, 1)
    ]
    run.mkdir()
    (run / "recipe.yaml").touch()
    done = cluster("slurm.sbatch", "recipe.py", "--output", str(run), PYTHON_CODE="138")
    assert done.returncode == 138 and done.stdout.splitlines() == [
        *(f"{rank}/2:{rank} node1 python -m fewstep resume {run}" for rank in (0, 1)),
        "scontrol requeue 7",
    ]
    assert "requeue" not in cluster("slurm.sbatch", "r.py", "--output", str(run), PYTHON_CODE="2").stdout
    assert "needs --output RUN" in cluster("slurm.sbatch", "recipe.py").stderr


def test_accelerates_file_is_what_accelerate_reads():
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    path = LAUNCH / "accelerate_2x8.yaml"
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig) and not config.fsdp_config and not config.deepspeed_config
    assert (config.num_machines, config.num_processes, config.mixed_precision) == (2, 16, "no")
    assert set(yaml.safe_load(path.read_text())) <= set(ClusterConfig.__dataclass_fields__)
