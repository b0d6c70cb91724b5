"""Where the files that travel with the package are: inside an installed wheel, or in `data/` of a checkout."""

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
