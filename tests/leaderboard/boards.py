"""A board of runs of two iterations on a tiny teacher, and its images: two kinds of four, and four names."""

import json
import os
import subprocess
import sys

import yaml
from PIL import Image

KINDS = ["any a", "any b"]
NAMES = ["red", "green", "blue", "grey"]


def write_images(folder):
    """Each of its own colour; captions of the first eight are kinds."""
    folder.mkdir(parents=True)
    captions = [*KINDS * 4, *NAMES]
    with (folder / "metadata.jsonl").open("w") as table:
        for i, caption in enumerate(captions):
            Image.new("RGB", (40, 40), (20 * i, 255 - 20 * i, 37 * i % 255)).save(folder / f"{i:02d}.png")
            table.write(json.dumps({"file_name": f"{i:02d}.png", "text": caption}) + "\n")
    (folder.parent / "prompts.txt").write_text("\n".join([*KINDS, *NAMES]))
    return folder


def options(folder, teacher, **more):
    """Of a recipe for Stable Diffusion 1.5, on the tiny one."""
    return {
        "teacher.path": str(teacher),
        "teacher.dtype": "float32",
        "teacher.autocast": None,
        "teacher.resolution": None,
        "teacher.gradient_checkpointing": False,
        "data.prompts": str(folder / "prompts.txt"),
        "data.images": str(folder / "images"),
        "train.batch_size": 2,
        "train.accumulate": 1,
        "train.checkpoint_every": 2,
        "train.log_every": 1,
        "roles.student.rank": 4,
        "roles.student.lr": 1e-3,
        "roles.student.warmup": 0,
        "export.dtype": "float32",
        **more,
    }


def board_of(folder, teacher, rows, **more):
    return {
        "title": "Tiny",
        "rows": rows,
        "teachers": [{"path": str(teacher), "steps": 3, "guidance": 2.0, "floor": [1], "solvers": ["ddim"]}],
        "images": str(folder / "images"),
        "seeds": [0, 1],
        "per_kind": 4,
        "named": 4,
        "extractor": "effnet-lite0@32",
        **more,
    }


def write_board(folder, board):
    path = folder / "board.yaml"
    path.write_text(yaml.safe_dump(board))
    return path


def command(folder, *words):
    return [
        sys.executable,
        "-m",
        "fewstep",
        "leaderboard",
        str(folder / "board.yaml"),
        "--to",
        str(folder / "made"),
        *words,
    ]


def run(folder, *words):
    return subprocess.run(command(folder, *words), capture_output=True, text=True, env=dict(os.environ))
