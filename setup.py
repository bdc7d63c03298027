"""Packages are found; recipes and protocols are plain folders in a checkout and data of the package in a wheel."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["fewstep", "fewstep.*"]), "fewstep.protocols", "fewstep.recipes"])
