"""The DICOM reader: pydicom's own real files, and files made here for what they lack."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pydicom = pytest.importorskip("pydicom")

from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array  # noqa: E402
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian  # noqa: E402

from featurecache.data.readers import ReadFailure, get_reader, read  # noqa: E402
from featurecache.data.readers.dicom import MOST_INFLATED, DicomReader  # noqa: E402
from featurecache.data.readers.windows import windowed  # noqa: E402
from featurecache.errors import InputError, ReadError  # noqa: E402

FILES = Path(pydicom.__file__).parent / "data" / "test_files"
GREY = DicomReader(channels=1)


def shipped(name: str) -> bytes:
    return (FILES / name).read_bytes()


def refusal(payload: bytes, reader: DicomReader = GREY, *, remembered: bool = True, **selector) -> str:
    failure = read(reader, payload, selector)
    assert isinstance(failure, ReadFailure)
    assert (failure.kind, failure.deterministic) == ("ReadError", remembered)
    return failure.message


def made(array: np.ndarray, *, bits: int = 16, syntax=ExplicitVRLittleEndian, **values) -> bytes:
    """A DICOM file of (height, width) or (frames, height, width)."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset.Rows, dataset.Columns = array.shape[-2:]
    if array.ndim == 3:
        dataset.NumberOfFrames = len(array)
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8 * array.dtype.itemsize, bits, bits - 1
    dataset.PixelRepresentation = int(array.dtype.kind == "i")
    dataset.PixelData = array.tobytes()
    for name, value in values.items():
        setattr(dataset, name, value)
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def table(entries: np.ndarray, *, first: int = 0, bits: int = 16) -> Dataset:
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [len(entries), first, bits], entries.astype("<u2").tobytes()
    item["LUTData"].VR = "OW"
    return item


def test_a_real_scan_is_what_pydicom_windows_it_to():
    dataset = pydicom.dcmread(FILES / "MR_small.dcm")
    expected = np.asarray(apply_voi_lut(apply_modality_lut(pixel_array(dataset), dataset), dataset), np.float64)
    low, high = -(2.0**15), 2.0**15 - 1  # what pydicom scales a window to: the range of its signed 16 bits
    decoded = GREY.decode(shipped("MR_small.dcm"), {})
    assert (decoded.array.dtype, decoded.limit, decoded.array.shape) == (np.float32, 1.0, (64, 64, 1))
    assert np.abs(decoded.array[:, :, 0] - (expected - low) / (high - low)).max() < 1e-6
    rgb = DicomReader().decode(shipped("MR_small.dcm"), {}).array
    assert np.array_equal(rgb, np.repeat(decoded.array, 3, axis=2))


@pytest.mark.parametrize(
    "other", ["MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm", "MR_small_jp2klossless.dcm"]
)
def test_the_way_of_storing_changes_no_pixel(other):
    plain, stored = (GREY.decode(shipped(name), {}).array for name in ("MR_small.dcm", other))
    assert np.array_equal(plain, stored)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "limit"),
    [
        ("SC_rgb_rle.dcm", (100, 100, 3), np.uint8, 255.0),
        ("SC_rgb_rle_16bit.dcm", (100, 100, 3), np.uint16, 65535.0),
        ("SC_ybr_full_422_uncompressed.dcm", (100, 100, 3), np.uint8, 255.0),
        ("examples_palette.dcm", (350, 800, 3), np.uint16, 65535.0),
        ("image_dfl.dcm", (512, 512, 3), np.uint8, 255.0),
        ("liver_1frame.dcm", (512, 512, 3), np.uint16, 1.0),
    ],
)
def test_colour_palette_deflated_and_one_bit(name, shape, dtype, limit):
    decoded = DicomReader().decode(shipped(name), {})
    assert (decoded.array.shape, decoded.array.dtype, decoded.limit) == (shape, dtype, limit)
    assert decoded.array.max() <= limit
    assert decoded.array.flags.c_contiguous


def test_twelve_bits_stay_twelve_and_overlays_above_them_do_not_count():
    stored = np.array([[0, 1, 2048], [4094, 4095, 7]], np.uint16)
    decoded = GREY.decode(made(stored | 0x4000, bits=12), {})
    assert (decoded.array.dtype, decoded.limit) == (np.uint16, 4095.0)
    assert np.array_equal(decoded.array[:, :, 0], stored)
    inverted = GREY.decode(made(stored, bits=12, PhotometricInterpretation="MONOCHROME1"), {})
    assert np.array_equal(inverted.array[:, :, 0], 4095 - stored)


def test_signed_values_are_shifted():
    stored = np.array([[-2048, 0], [2047, -1]], np.int16)
    decoded = GREY.decode(made(stored, bits=12), {})
    assert (decoded.limit, decoded.array[:, :, 0].tolist()) == (4095.0, [[0, 2048], [4095, 2047]])


def test_window_of_the_file_of_the_user_and_none():
    stored = np.array([[0, 1000], [1040, 3000]], np.uint16)
    payload = made(stored, bits=12, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=[40, 50], WindowWidth=[400, 5])
    expected = windowed(stored.astype(float) - 1024, 40, 400, "LINEAR")
    assert np.array_equal(GREY.decode(payload, {}).array[:, :, 0], expected)
    assert expected[0, 0] == 0
    assert expected[1, 1] == 1
    own = DicomReader(channels=1, window=(0, 2000))
    assert np.array_equal(own.decode(payload, {}).array[:, :, 0], windowed(stored - 1024.0, 0, 2000, "LINEAR"))
    full = DicomReader(channels=1, contrast="full").decode(payload, {}).array[:, :, 0]
    assert np.allclose(full, stored / 4095)
    inverted = made(stored, bits=12, WindowCenter=500, WindowWidth=100, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(GREY.decode(inverted, {}).array[:, :, 0], 1 - windowed(stored, 500, 100, "LINEAR"))


def test_window_functions_of_the_standard():
    values = np.array([[-100.0, 0, 49.5], [50, 50.5, 200]])
    linear = windowed(values, 50, 100, "LINEAR")  # C.11.2.1.2.1: 0 at c - 0.5 - (w - 1) / 2
    assert np.allclose(linear, [[0, 0, 0.5], [0.5 + 0.5 / 99, 0.5 + 1 / 99, 1]])
    assert np.allclose(windowed(values, 50, 100, "LINEAR_EXACT")[0], [0, 0, 0.495])
    sigmoid = windowed(values, 50, 100, "SIGMOID")
    assert sigmoid[1, 0] == 0.5
    assert 0 < sigmoid[0, 0] < sigmoid[0, 1] < 0.5 < sigmoid[1, 2] < 1
    assert windowed(values, 50, 1, "LINEAR").tolist() == [[0, 0, 0], [1, 1, 1]]
    with pytest.raises(ReadError, match="window centre 50, width 0"):
        windowed(values, 50, 0, "LINEAR")
    with pytest.raises(ReadError, match="VOI LUT function 'GAMMA'"):
        windowed(values, 50, 10, "GAMMA")


def test_luts_come_before_windows():
    stored = np.array([[0, 5], [6, 200]], np.uint8)
    voi = table(np.array([10, 20, 4095]), first=5, bits=12)
    payload = made(stored, bits=8, VOILUTSequence=[voi], WindowCenter=1, WindowWidth=1)
    assert np.allclose(GREY.decode(payload, {}).array[:, :, 0] * 4095, [[10, 10], [20, 4095]])
    modality = made(stored, bits=8, ModalityLUTSequence=[table(np.array([0, 300, 255]), first=5, bits=8)])
    assert np.allclose(GREY.decode(modality, {}).array[:, :, 0] * 255, [[0, 0], [255, 255]])
    short = table(np.array([1, 2]), bits=8)
    short.LUTDescriptor = [9, 0, 8]
    broken = made(stored, bits=8, VOILUTSequence=[short])
    assert refusal(broken) == "damaged DICOM: a LUT of 9 entries of 8 bits holds 4"


def test_frames_boxes_and_flips():
    frames = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    payload = made(frames, bits=8)
    assert np.array_equal(GREY.decode(payload, {"frame": 1}).array[:, :, 0], frames[1])
    part = GREY.decode(payload, {"frame": 0, "box": [1, 0, 4, 2], "flip": True}).array[:, :, 0]
    assert np.array_equal(part, frames[0, :2, 1:][:, ::-1])
    assert refusal(payload) == "DICOM with 2 frames: choose one with --frame VIEW=COLUMN, or split the file"
    assert refusal(payload, frame=2) == "DICOM has no frame 2: it holds 2, counted from 0"


def test_each_frame_may_have_its_own_window():
    frames = np.full((2, 1, 1), 10, np.uint8)
    groups = []
    for centre in (10, 30):
        group, window, value = Dataset(), Dataset(), Dataset()
        window.WindowCenter, window.WindowWidth = centre, 101
        value.RescaleSlope, value.RescaleIntercept = 2, 0
        group.FrameVOILUTSequence, group.PixelValueTransformationSequence = [window], [value]
        groups.append(group)
    payload = made(frames, bits=8, PerFrameFunctionalGroupsSequence=groups)
    first, second = (GREY.decode(payload, {"frame": k}).array.item() for k in (0, 1))
    assert (round(first, 3), round(second, 3)) == (0.605, 0.405)


def test_what_nothing_here_decodes_is_named_and_tried_again():
    names = {
        "MR_small_jpeg_ls_lossless.dcm": "JPEG-LS Lossless",
        "SC_rgb_jpeg_gdcm.dcm": "JPEG Lossless, Non-Hierarchical",
        "JPGExtended.dcm": "JPEG Extended",
    }
    for name, syntax in names.items():
        decoded = read(GREY, shipped(name), {})
        if isinstance(decoded, ReadFailure):  # on a machine without the plug-ins of pydicom
            assert decoded.message.startswith(f"DICOM compressed as {syntax}")
            assert "pylibjpeg" in decoded.message
            assert not decoded.deterministic


def test_what_is_refused():
    small = made(np.zeros((4, 5), np.uint8), bits=8)
    assert refusal(b"") == "0 bytes: the file is empty"
    assert refusal(b"abc") == "not a DICOM file: it has no 'DICM' at byte 128"
    assert refusal(small[:134]) == "truncated DICOM: 134 bytes"
    assert refusal(small[:-3]).startswith("DICOM can't be decoded: The number of bytes of pixel data is less")
    assert refusal(shipped("rtplan.dcm")) == "DICOM without an image: RT Plan Storage"
    assert refusal(small, DicomReader(max_pixels=19)) == "DICOM of 5 x 4 pixels: 20 exceed the limit of 19"
    huge = made(np.zeros((4, 5), np.uint8), bits=8, Rows=65535, Columns=65535)
    assert refusal(huge) == "DICOM of 65535 x 65535 pixels: 4,294,836,225 exceed the limit of 100,000,000"
    assert refusal(small, box=[0, 0, 6, 4]) == "box 0,0,6,4 is not inside the image of 5 x 4 pixels"
    with pytest.warns(UserWarning, match="Invalid value"):  # told by pydicom; it goes on
        assert refusal(shipped("badVR.dcm")) == "damaged DICOM: NumberOfFrames is '1A'"
    nothing = made(np.zeros((4, 5), np.uint8), bits=8, RescaleSlope=0, RescaleIntercept=1)
    assert refusal(nothing) == "damaged DICOM: rescale slope 0.0, intercept 1.0"


def test_a_deflated_bomb_is_refused(monkeypatch):
    monkeypatch.setattr("featurecache.data.readers.dicom.MOST_INFLATED", 1000)
    good = made(np.zeros((4, 5), np.uint8), bits=8, syntax=DeflatedExplicitVRLittleEndian)
    assert GREY.decode(good, {}).array.shape == (4, 5, 1)
    bomb = made(np.zeros((40, 50), np.uint8), bits=8, syntax=DeflatedExplicitVRLittleEndian)
    assert refusal(bomb) == "DICOM that inflates to more than 1,000 bytes"
    assert len(zlib.compress(bytes(10**6))) < 2000 < MOST_INFLATED


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
@pytest.mark.filterwarnings("ignore")  # pydicom tells of what it finds odd
def test_damaged_files_are_values(data):
    """Whatever bytes change, the reader gives pixels within their limit or says why not in words."""
    payload = bytearray(shipped("MR_small.dcm")[:2000] if data.draw(st.booleans()) else shipped("SC_rgb_rle.dcm"))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(132, min(len(payload), 1900) - 1))] = data.draw(st.integers(0, 255))
    found = read(GREY, bytes(payload), {})
    if isinstance(found, ReadFailure):
        assert found.kind == "ReadError", found
        assert "\n" not in found.message
    else:
        assert 0 <= found.array.min() <= found.array.max() <= found.limit


def test_parameters():
    reader = get_reader("dicom", channels=1, window=[40, 400])
    assert reader.parameters() == {"channels": 1, "window": [40.0, 400.0]}
    assert get_reader("dicom", **reader.parameters()) == reader
    assert GREY.parameters() == {"channels": 1, "contrast": "auto"}
    assert GREY.identity() == "dicom/1 max_pixels=100000000"
    for wrong, message in [
        ({"channels": 4}, "channels=4, but images have 1"),
        ({"contrast": "best"}, "contrast='best', but one of auto, full"),
        ({"window": [1]}, "centre and width are needed"),
        ({"window": [1, 0.5]}, "its width must be at least 1"),
        ({"max_pixels": 0}, "max_pixels=0, but at least 1"),
    ]:
        with pytest.raises(InputError, match=message):
            get_reader("dicom", **wrong)
