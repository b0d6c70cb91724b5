"""Where the files that travel with the package are: inside an installed wheel, or in a checkout."""

from __future__ import annotations

from pathlib import Path

from featurecache.errors import MissingFileError

PACKAGE = Path(__file__).resolve().parent.parent


def shipped_path(relative: str) -> Path:
    """The path of a shipped file or directory, such as `weights/squeezenet1_1.safetensors` or `emoji/manifest.csv`.

    Raises:
        MissingFileError: neither the installed package nor a checkout around it holds it.
    """
    places = (PACKAGE / "_shipped", PACKAGE.parent / "data")
    for place in places:
        path = place / relative
        if path.exists():
            return path
    raise MissingFileError(
        f"{relative}: this file should travel with featurecache, but is in neither {places[0]} nor {places[1]}. "
        "Reinstall the package, or in a checkout run the scripts of data/."
    )


def shipped_recipes() -> dict[str, Path]:
    """The pipelines that travel with the package, by name."""
    for folder in (PACKAGE / "_shipped" / "pipelines", PACKAGE.parent / "pipelines"):
        if (folder / "joint.toml").is_file():  # so that it is not a folder of another package beside an installed one
            return {path.stem: path for path in sorted(folder.glob("*.toml"))}
    return {}
