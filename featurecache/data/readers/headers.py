"""What an image file is, how large, and whether it is whole: read from its structure, before any pixel is decoded.

What is refused must not depend on which decoder is installed, so the rules are ours:

- the format is told from the first bytes, never from a suffix;
- JPEG: baseline, extended sequential or progressive, 8 bit, 1, 3 or 4 components; an EOI marker follows the first scan
  (bytes after EOI are allowed). Without one the file counts as truncated;
- PNG: all chunks are whole, their CRCs are right, the last one is IEND;
- GIF: all blocks up to the trailer are there;
- WebP: the payload is at least as long as its RIFF header says;
- TIFF (checked once its directory has been read): all strips or tiles lie within the file.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from featurecache.errors import ReadError

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT")
_SOF_NAMES = {
    0xC3: "lossless",
    0xC5: "hierarchical",
    0xC6: "hierarchical",
    0xC7: "hierarchical",
    0xC9: "arithmetic-coded",
    0xCA: "arithmetic-coded",
    0xCB: "arithmetic-coded lossless",
    0xCD: "hierarchical",
    0xCE: "hierarchical",
    0xCF: "hierarchical",
}
_OTHER = (  # offset, bytes, what it is
    (128, b"DICM", "a DICOM file"),
    (4, b"ftypavif", "an AVIF image"),
    (4, b"ftyphei", "an HEIC image"),
    (4, b"ftypmif1", "an HEIC image"),
    (0, b"\x00\x00\x00\x0cjP  ", "a JPEG 2000 image"),
    (0, b"\xff\x0a", "a JPEG XL image"),
    (0, b"\x93NUMPY", "a NumPy array (use --reader array)"),
    (0, b"%PDF", "a PDF"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
)


@dataclass(frozen=True)
class Header:
    """What is known of an image before it is decoded.

    Attributes:
        format: JPEG, PNG, GIF, BMP or WEBP (TIFF is inspected by its own reader).
        width, height: in pixels, as stored (before EXIF orientation).
        frames: images in the file.
        exif: the EXIF block (a TIFF structure), empty where there is none.
        depth: bits per channel of a PNG, else 8.
        transparent: the tRNS chunk of a PNG; at 16 bit it is left out of `pixels`.
        pixels: the payload, of a PNG without the chunks that say nothing about pixels.
    """

    format: str
    width: int
    height: int
    frames: int
    exif: bytes
    depth: int
    transparent: bytes
    pixels: bytes


def sniff(payload: bytes) -> str:
    """The format, told from the first bytes.

    Raises:
        ReadError: empty, or no image format that is read here; says what was found.
    """
    if not payload:
        raise ReadError("0 bytes: the file is empty")
    if payload.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if payload.startswith(_PNG):
        return "PNG"
    if payload.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if payload.startswith(b"RIFF") and payload[8:12] == b"WEBP":
        return "WEBP"
    if payload.startswith((b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")):
        return "TIFF"
    if payload.startswith(b"BM") and len(payload) >= 26 and payload[6:10] == b"\x00\x00\x00\x00":
        return "BMP"
    raise ReadError(f"not an image that can be read: found {_describe(payload)}")


def inspect(payload: bytes, kind: str) -> Header:
    """Size, frames and wholeness of a JPEG, PNG, GIF, WebP or BMP.

    Raises:
        ReadError: truncated, damaged, or of a variety that is not read.
    """
    walk: dict[str, Callable[[bytes], Header]] = {
        "JPEG": _jpeg,
        "PNG": _png,
        "GIF": _gif,
        "WEBP": _webp,
        "BMP": _bmp,
    }
    try:
        return walk[kind](payload)
    except (struct.error, IndexError):
        raise ReadError(f"truncated {kind}: it ends after {len(payload):,} bytes, within its header") from None


def _describe(payload: bytes) -> str:
    for offset, magic, name in _OTHER:
        if payload[offset : offset + len(magic)] == magic:
            return name
    head = payload[:64]
    if not any(head):
        return f"{len(payload):,} bytes that begin with zeros"
    try:
        text = head.decode("utf-8", errors="strict" if len(payload) <= 64 else "ignore")
    except UnicodeDecodeError:
        text = ""
    if text and all(character.isprintable() or character.isspace() for character in text):
        return f"text that begins with {text.strip()[:24]!r}"
    return f"bytes that begin with {head[:8].hex(' ')}"


def _header(
    kind: str,
    width: int,
    height: int,
    pixels: bytes,
    *,
    frames: int = 1,
    exif: bytes = b"",
    depth: int = 8,
    transparent: bytes = b"",
) -> Header:
    if width < 1 or height < 1:
        raise ReadError(f"{kind} of {width} x {height} pixels")
    return Header(kind, width, height, frames, exif, depth, transparent, pixels)


def _jpeg(payload: bytes) -> Header:
    position, exif, size = 2, b"", (0, 0)
    while True:
        position = payload.find(b"\xff", position)
        if position < 0:
            raise ReadError(f"truncated JPEG: it ends after {len(payload):,} bytes, before any image data")
        while payload[position] == 0xFF:
            position += 1
        marker = payload[position]
        position += 1
        if marker in (0x00, 0x01, 0xD8) or 0xD0 <= marker <= 0xD7:
            continue
        if marker == 0xD9:
            raise ReadError("JPEG without image data")
        (length,) = struct.unpack_from(">H", payload, position)
        body = position + 2
        if marker in _SOF_NAMES:
            raise ReadError(f"{_SOF_NAMES[marker]} JPEG: only baseline, extended and progressive ones are read")
        if marker in (0xC0, 0xC1, 0xC2):
            precision, height, width, components = struct.unpack_from(">BHHB", payload, body)
            if precision != 8:
                raise ReadError(f"JPEG of {precision} bits per channel: only 8 are read")
            if components not in (1, 3, 4):
                raise ReadError(f"JPEG of {components} components: only 1, 3 and 4 are read")
            size = (width, height)
        elif marker == 0xE1 and not exif and payload[body : body + 6] == b"Exif\x00\x00":
            exif = payload[body + 6 : position + length]
        position += length
        if marker == 0xDA:
            break
    if size == (0, 0):
        raise ReadError("JPEG without a frame header")
    # Within a scan FF is always followed by 00 or a restart marker, so FF D9 behind the first scan's header is the EOI.
    if payload.rfind(b"\xff\xd9", position) < 0:
        raise ReadError(f"truncated JPEG: no end-of-image marker in its {len(payload):,} bytes")
    return _header("JPEG", *size, payload, exif=exif)


def _png_chunks(payload: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    position = len(_PNG)
    while position < len(payload):
        (length,) = struct.unpack_from(">I", payload, position)
        end = position + 12 + length
        name = payload[position + 4 : position + 8]
        if end > len(payload):
            raise ReadError(
                f"truncated PNG: it ends after {len(payload):,} bytes, within a {name.decode('latin1')} chunk"
            )
        body = payload[position + 8 : end - 4]
        if zlib.crc32(body, zlib.crc32(name)) != int.from_bytes(payload[end - 4 : end], "big"):
            raise ReadError(f"damaged PNG: wrong checksum of its {name.decode('latin1')} chunk")
        yield name, body, payload[position:end]
        if name == b"IEND":
            return
        position = end
    raise ReadError(f"truncated PNG: no IEND chunk in its {len(payload):,} bytes")


def _png(payload: bytes) -> Header:
    kept, exif, transparent, frames, header = [_PNG], b"", b"", 1, b""
    for name, body, whole in _png_chunks(payload):
        if name == b"IHDR":
            header = body
        elif name == b"acTL":
            frames = max(1, int.from_bytes(body[:4], "big"))
        elif name == b"eXIf":
            exif = body
        elif name == b"tRNS":
            transparent = body
        # Colour profiles, texts and the like are left out: they don't change pixels, and decoders differ over them.
        # The colour key of 16 bit images is applied by the reader.
        if name in _PNG_PIXELS or (name == b"tRNS" and header[8] < 16):
            kept.append(whole)
    width, height, depth = struct.unpack_from(">IIB", header)
    return _header(
        "PNG",
        width,
        height,
        b"".join(kept),
        frames=frames,
        exif=exif,
        depth=depth,
        transparent=transparent,
    )


def _gif(payload: bytes) -> Header:
    width, height, flags = struct.unpack_from("<HHB", payload, 6)
    position = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    frames = 0

    def skip_blocks(start: int) -> int:
        while payload[start]:
            start += payload[start] + 1
        return start + 1

    try:
        while payload[position] != 0x3B:
            kind = payload[position]
            if kind == 0x21:
                position = skip_blocks(position + 2)
            elif kind == 0x2C:
                local = payload[position + 9]
                position += 10 + (3 << ((local & 7) + 1) if local & 0x80 else 0)
                position = skip_blocks(position + 1)
                frames += 1
            else:
                raise ReadError(f"damaged GIF: unknown block {kind:#04x} at byte {position:,}")
    except IndexError:
        raise ReadError(f"truncated GIF: no trailer in its {len(payload):,} bytes") from None
    if not frames:
        raise ReadError("GIF without an image")
    return _header("GIF", width, height, payload, frames=frames)


def _webp(payload: bytes) -> Header:
    promised = int.from_bytes(payload[4:8], "little") + 8
    if len(payload) < promised:
        raise ReadError(f"truncated WEBP: {len(payload):,} bytes where its header promises {promised:,}")
    position, size, frames, exif = 12, (0, 0), 0, b""
    while position + 8 <= promised:
        name, length = struct.unpack_from("<4sI", payload, position)
        body = position + 8
        if body + length > promised:
            raise ReadError(f"truncated WEBP: it ends within a {name.decode('latin1').strip()} chunk")
        if name == b"VP8X":
            word = payload[body + 4 : body + 10]
            size = (int.from_bytes(word[:3], "little") + 1, int.from_bytes(word[3:], "little") + 1)
        elif name == b"VP8 " and size == (0, 0):
            width, height = struct.unpack_from("<HH", payload, body + 6)
            size = (width & 0x3FFF, height & 0x3FFF)
        elif name == b"VP8L" and size == (0, 0):
            (word32,) = struct.unpack_from("<I", payload, body + 1)
            size = ((word32 & 0x3FFF) + 1, (word32 >> 14 & 0x3FFF) + 1)
        elif name == b"ANMF":
            frames += 1
        elif name == b"EXIF":
            exif = payload[body : body + length].removeprefix(b"Exif\x00\x00")
        position = body + length + (length & 1)
    return _header("WEBP", *size, payload, frames=max(1, frames), exif=exif)


def _bmp(payload: bytes) -> Header:
    (size,) = struct.unpack_from("<I", payload, 14)
    width, height = struct.unpack_from("<HH" if size == 12 else "<ii", payload, 18)
    return _header("BMP", width, abs(height), payload)
