"""How many bytes stage one will write: chunks are written whole, also the last one, which is only partly filled."""

from __future__ import annotations

from featurecache.config import ExtractConfig
from featurecache.stageone.jobs import Job
from featurecache.store.format import CHECKSUM_BYTES, Layout
from featurecache.store.recipe import Recipe
from featurecache.store.store import RecipeInfo


def bytes_to_write(job: Job, config: ExtractConfig, recipe: Recipe, info: RecipeInfo | None, rows: int) -> int:
    """Bytes of the chunk files for some more rows.

    Rows of the partial chunk that a recipe may have are written anew in front of them. Compression makes it less; a
    commit every 30 s of slow work writes the last chunk more than once, at its full size each time.

    Args:
        job: says which taps there are.
        config: codec and rows per chunk of a new recipe.
        recipe: of the job, or of its replicas.
        info: the recipe as the store has it.
        rows: how many will be added.
    """
    if not rows:
        return 0
    held, asked = (info.rows, info.rows_per_chunk) if info is not None else (0, config.rows_per_chunk)
    taps = {tap.name: (tap.shape, tap.dims) for tap in job.setup.taps}
    layout = Layout.create(recipe, taps, config.codec, asked)
    size = layout.rows_per_chunk
    chunk = sum(size * spec.row_bytes + CHECKSUM_BYTES for spec in layout.arrays().values())
    return -(-(held % size + rows) // size) * chunk
