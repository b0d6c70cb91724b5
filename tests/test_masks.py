import numpy as np
import pytest
from PIL import Image

from featurecache.config import ManifestConfig
from featurecache.data.dense import IGNORE
from featurecache.data.manifest import read_manifest
from featurecache.data.preprocessing import Preprocessing
from featurecache.errors import InputError
from featurecache.features import masks as module
from featurecache.features.masks import MaskFiles, mask_cells, read_masks
from featurecache.rundir.maskfiles import MaskFolder, read_mask

SQUASH = Preprocessing(1, None, 8, "squash", mean=(0,), std=(1,))


def write(folder, arrays, **columns):
    lines = [",".join(["sample_id", "image", "mask", *columns])]
    for number, array in enumerate(arrays):
        if array is not None:
            Image.fromarray(array).save(folder / f"m{number}.png")
        name = "" if array is None else f"m{number}.png"
        lines.append(",".join([f"s{number}", "m0.png", name, *(str(values[number]) for values in columns.values())]))
    (folder / "m.csv").write_text("\n".join(lines))
    return folder / "m.csv"


def files(path, preprocessing=SQUASH, **options):
    given = {name: options.pop(name) for name in ("box", "flip_if") if name in options}
    config = ManifestConfig.create({"manifest": path, "views": {"image": "image"}, **given})
    manifest = read_manifest(config, images=False)
    ids = manifest.table["sample_id"].to_list()
    return MaskFiles("mask", ids, mask_cells(manifest, config, "mask", "image"), preprocessing, **options)


def halves(side=8, value=255):
    mask = np.zeros((side, side), np.uint8)
    mask[:, side // 2 :] = value
    return mask


def test_classes_are_pixel_values_in_numeric_order(tmp_path):
    mask = np.zeros((8, 8), np.uint8)
    mask[:2], mask[2:4] = 11, 200
    found = read_masks(files(write(tmp_path, [halves(value=11), mask, None, mask]), uncertain={"200": "ignore"}))
    assert found.classes == ("0", "11")
    assert found.task == "dense"
    assert found.known.tolist() == [True, True, False, True]
    assert np.array_equal(found.values[0] == 1, halves() > 0)
    assert (found.values[1, 2:4] == IGNORE).all()
    assert (found.values[2] == IGNORE).all()
    part = found.subset(np.array([3, 2]))
    assert len(part) == 2
    assert part.known.tolist() == [True, False]
    again = read_masks(files(write(tmp_path, [mask, halves(value=11)]), uncertain={"200": "zero"}), classes=["0", "11"])
    assert again.values[0].max() == 1
    assert again.strata().tolist() == [1, 1]


@pytest.mark.parametrize("side", [16, 24, 20])
def test_a_mask_is_brought_to_size_without_shift(tmp_path, side):
    """Nearest neighbours would move the edge by up to half an output pixel."""
    random = np.random.default_rng(0)
    fine = np.kron(random.integers(0, 2, (8, 8)), np.ones((side, side)))[: 8 * side, : 8 * side]
    large = (fine[:: side // 4, :: side // 4] * 255).astype(np.uint8)
    found = read_masks(files(write(tmp_path, [large])))
    assert np.array_equal(found.values[0], fine[side // 2 :: side, side // 2 :: side])


def test_beside_the_image_nothing_is_known(tmp_path):
    tall = np.full((16, 8), 255, np.uint8)
    tall[:8] = 0
    found = read_masks(files(write(tmp_path, [tall]), Preprocessing(1, None, 8, "pad", mean=(0,), std=(1,)))).values[0]
    assert (found[:, [0, 1, 6, 7]] == IGNORE).all()
    assert found[:, 2:6].tolist() == [[0] * 4] * 4 + [[1] * 4] * 4
    centre = read_masks(files(write(tmp_path, [halves(16)]), Preprocessing(1, 16, 8, mean=(0,), std=(1,)))).values[0]
    assert np.array_equal(centre == 1, halves() > 0)


def test_masks_are_cut_and_mirrored_as_the_images_are(tmp_path):
    path = write(tmp_path, [halves(16)] * 2, side=["L", "R"], x0=[4, 4], y0=[4, 4], x1=[12, 12], y1=[12, 12])
    found = read_masks(files(path, box={"image": ("x0", "y0", "x1", "y1")}, flip_if={"image": "side=R"}))
    assert np.array_equal(found.values[0] == 1, halves() > 0)
    assert np.array_equal(found.values[1], found.values[0][:, ::-1])


def test_inside_and_alpha(tmp_path):
    drawing = np.zeros((8, 8, 4), np.uint8)
    drawing[:, 4:] = (200, 10, 10, 255)
    drawing[:, 6:, 3] = 100
    for values, edge in (("inside", 6), ("alpha", 6)):
        found = read_masks(files(write(tmp_path, [drawing]), values=values))
        assert found.classes == ("0", "255")
        assert (found.values[0] == 1).all(axis=0).tolist() == [4 <= x < edge for x in range(8)]
    with pytest.raises(InputError, match=r"sample 's0': m0.png: the mask has colours"):
        read_masks(files(write(tmp_path, [drawing])))


def test_many_masks_lie_in_a_file(tmp_path, monkeypatch):
    path = write(tmp_path, [halves(), halves(value=3), None])
    held = read_masks(files(path)).values
    monkeypatch.setattr(module, "MOST_HELD", 100)
    monkeypatch.setattr(module, "TOGETHER", 2)
    mapped = read_masks(files(path)).values
    assert isinstance(mapped, np.memmap)
    assert np.array_equal(mapped, held)


def test_what_is_wrong_is_said(tmp_path):
    (tmp_path / "m0.png").write_bytes(b"no image")
    path = write(tmp_path, [None, halves()])
    path.write_text(path.read_text().replace("s0,m0.png,", "s0,m0.png,m0.png"))
    with pytest.raises(InputError, match=r"src: column 'mask': 1 masks can't be used\n  - sample 's0': m0.png: "):
        read_masks(files(path), source="src")
    path.write_text(path.read_text().replace("m0.png\n", "gone.png\n"))
    with pytest.raises(InputError, match=r"1 masks can't be had\n  - column 'mask': gone.png: no such file"):
        files(path)
    soft = np.arange(100, dtype=np.uint8).reshape(10, 10)
    with pytest.raises(InputError, match=r"100 different values, which are no classes. For masks with soft edges give"):
        read_masks(files(write(tmp_path, [soft])))
    with pytest.raises(InputError, match=r"all pixels are 255; two classes are needed"):
        read_masks(files(write(tmp_path, [np.full((8, 8), 255, np.uint8)])))
    with pytest.raises(InputError, match=r"no sample has a mask"):
        read_masks(files(write(tmp_path, [None, None])))
    with pytest.raises(InputError, match=r"pixel value 7 is none of 0, 255"):
        read_masks(files(write(tmp_path, [halves(value=7)])), classes=["0", "255"])
    with pytest.raises(InputError, match=r"no column 'masks'.*Did you mean"):
        mask_cells(read_manifest(ManifestConfig(manifest=path)), ManifestConfig(manifest=path), "masks", "image")


def test_masks_are_written_and_read_back(tmp_path):
    folder = MaskFolder(tmp_path / "masks", ("0", "11", "300"))
    mask = np.array([[0, 1], [2, 0]], np.uint8)
    names = [folder.write(name, mask) for name in ("a/b", "a_b", "A_B", "..")]
    assert names == ["masks/a_b.png", "masks/a_b-2.png", "masks/A_B-3.png", "masks/_.png"]
    assert np.asarray(Image.open(tmp_path / names[0])).tolist() == [[0, 11], [300, 0]]
    assert np.array_equal(read_mask(tmp_path / names[0], ("0", "11", "300")), mask)
