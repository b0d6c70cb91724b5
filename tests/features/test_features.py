import numpy as np

from featurecache.features.features import ArrayFeatures, Block, feature_names, present, views_of

BLOCKS = (
    Block("front", "deep@none", 0, 2, (2,)),
    Block("front", "map@rows", 2, 8, (3, 2)),
    Block("side", "deep@none", 8, 10, (2,)),
)


def test_blocks_survive_json():
    assert tuple(Block.from_json(block.to_json()) for block in BLOCKS) == BLOCKS


def test_names_and_views_of_columns():
    names = feature_names(BLOCKS)
    assert len(names) == 10
    assert names[0] == "front.deep@none.0"
    assert names[7] == "front.map@rows.5"
    assert views_of(BLOCKS) == ("front", "side")


def test_rows_are_float32_whatever_they_are_stored_as():
    features = ArrayFeatures(np.arange(20, dtype=np.float16).reshape(2, 10), BLOCKS)
    assert features.shape == (2, 10)
    rows = features[np.array([1, 1])]
    assert rows.dtype == np.float32
    assert rows[0].tolist() == list(range(10, 20))


def test_a_view_is_missing_where_its_block_is_nan():
    x = np.zeros((3, 10), np.float32)
    x[1, :8] = np.nan
    x[2, 8:] = np.nan
    assert present(x, BLOCKS).tolist() == [[True, True], [False, True], [True, False]]
