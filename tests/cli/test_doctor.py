"""What the doctor finds wrong with an installation."""

import subprocess
from importlib import metadata

import pytest

from fewstep.cli import doctor

VERSION, REQUIRES = metadata.version, metadata.requires


@pytest.fixture
def installed(monkeypatch):
    """Other versions than there are; None is not installed."""

    def pretend(**versions):
        def version(package):
            if versions.get(package, "") is None:
                raise metadata.PackageNotFoundError(package)
            return versions.get(package) or VERSION(package)

        monkeypatch.setattr(doctor, "version", version)

    return pretend


def test_this_installation_is_healthy_and_everything_is_named():
    text, healthy = doctor.report()
    assert healthy, text
    for name in ("torch", "diffusers", "transformers", "peft", "torchvision", "threads"):
        assert name in text


def test_what_auto_becomes_here_is_said_with_its_reason(monkeypatch):
    from fewstep.diffusion import kernels

    for units, autocast, attention in (
        (True, "bfloat16: it has", "math: "),
        (False, "null, so float32: it has no", "sdpa"),
    ):
        monkeypatch.setattr(kernels, "bf16_units", lambda device, units=units: units)
        text = doctor.report()[0]
        assert any(
            line.split("cpu", 1)[-1].strip().startswith(autocast)
            for line in text.splitlines()
            if "autocast" in line
        )
        assert any(
            line.split("cpu", 1)[-1].strip().startswith(attention)
            for line in text.splitlines()
            if "attention: auto" in line
        )


@pytest.mark.parametrize("package", ["torch", "peft", "pyyaml"])
def test_missing_and_old_packages_are_problems_with_their_remedy(installed, package):
    installed(**{package: None})
    assert any(
        line.startswith("fewstep ") and f"needs {package}>=" in line and "is missing" in line
        for line in doctor.problems()
    )
    installed(**{package: "0.1"})
    text, healthy = doctor.report()
    assert not healthy and f"PROBLEM: fewstep {VERSION('fewstep')} needs {package}>=" in text
    assert "which is 0.1: pip install" in text


def test_what_the_libraries_need_of_each_other_is_looked_at(installed):
    # diffusers 0.42 beside an older hub client was seen to fail at import.
    installed(**{"huggingface-hub": "0.10.0", "huggingface_hub": "0.10.0"})
    assert any("needs huggingface" in line and "is 0.10.0" in line for line in doctor.problems())


def test_a_torchvision_of_another_build_is_a_bad_pair(installed, monkeypatch):
    installed(torchvision="0.1", xformers=None)
    error = "Traceback\nRuntimeError: operator torchvision::nms does not exist"
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, "", error))
    (line,) = doctor.bad_pairs()
    assert "torchvision 0.1 does not load beside torch" in line and "nms does not exist" in line
    assert "uninstall it" in line
