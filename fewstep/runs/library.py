"""Finding recipes: by name, by script, by file."""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path

from ..errors import FewstepError
from ..extensions import read_script

RECIPES = Path(__file__).parents[2] / "recipes"


def recipes_folder() -> Path:
    """``recipes/`` of a checkout, or its copy inside an installed package."""
    installed = importlib.util.find_spec("fewstep.recipes")
    if not RECIPES.is_dir() and installed and installed.submodule_search_locations:
        return Path(next(iter(installed.submodule_search_locations)))
    return RECIPES


def recipe_files() -> dict[str, Path]:
    """Name -> script, of the recipes that come with fewstep."""
    return {
        p.stem: p for p in sorted(recipes_folder().glob("*.py")) if not p.stem.startswith(("_", "train_"))
    }


def load_recipe(source: str):
    """A recipe by name, by script or by ``recipe.yaml``.

    Raises:
        FewstepError: no such recipe, or a script without a ``recipe``.
    """
    from .. import recipe as recipes

    path = recipe_files().get(source, Path(source))
    if not path.is_file():
        near = difflib.get_close_matches(source, recipe_files(), 3)
        meant = f"; did you mean {' or '.join(near)}?" if near else "."
        raise FewstepError(
            f"recipe {source!r} is neither a file nor a recipe{meant} `fewstep recipes` lists them"
        )
    if path.suffix in (".yaml", ".yml"):
        return recipes.load(path)
    if path.suffix != ".py":
        raise FewstepError(f"recipe {path}: expected a .py script or a .yaml file")
    module = read_script(path)
    if not hasattr(module, "recipe"):
        raise FewstepError(f"recipe {path}: defines no variable named recipe")
    return module.recipe
