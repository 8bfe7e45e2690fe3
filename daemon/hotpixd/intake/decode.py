"""Turn a picture file into a `Frame`: samples as stored, their place on the sensor, how the shot was taken.

The content decides what a file is, never its name: cards hold JPEGs called
.nef, and a spool names files by their hash. Pictures that are no straight
camera output (edited, cropped, half written, without sensor samples) are
refused with a `DecodeError`, since one such frame among the others would be
evidence about nothing. A disk that cannot be read is an `OSError` as ever.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import logging
import platform
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from hotpixd.core.darkness import looks_dark, looks_lit
from hotpixd.core.frame import Frame, SampleKind, Samples, SensorIdentity, SensorLayout, ShotInfo, ShotKind
from hotpixd.intake import dng, extent, metadata
from hotpixd.intake.dng import Reading
from hotpixd.intake.metadata import Metadata

MAX_PIXELS = 400_000_000
"""Twice the largest sensor on sale with pixel shift; more is a broken header or a decompression bomb."""

MIN_SIDE = 16
"""Pixels. Smaller is a thumbnail."""

MIN_PLANE_SIDE = 7
"""Samples. The detection window must fit into each plane."""

MIN_EMPTY_ROWS = 8
"""Rows of zeros, one after the other, that may mean a half-written file."""

_ENOUGH_OF_A_ROW = 64
"""Samples, of which one that is not zero is to be expected in every row that is not all zeros."""

MIN_BLACK_ADU = 64.0
"""Black level above which samples must be near it or above. Below, noise and clipping are as large."""

EDITORS = (
    "acdsee", "adobe", "affinity", "camera raw", "capture nx", "capture one", "corel", "darktable",
    "deepskystacker", "digikam", "digital photo professional", "dxo", "faststone", "gimp", "graphicsmagick",
    "helicon", "hugin", "imagemagick", "instagram", "iphoto", "irfanview", "krita", "lightroom", "luminar",
    "neat image", "nikon transfer", "noise ninja", "nx studio", "ofotonow", "paint shop", "paint.net",
    "paintshop", "photolab", "photos ", "photoscape", "photoshop", "picasa", "pixelmator", "pixinsight",
    "polarr", "ptgui", "rawstudio", "rawtherapee", "shotwell", "showfoto", "silkypix", "siril", "snapseed",
    "topaz", "ufraw", "viewnx", "vsco", "windows photo", "xnview", "zerene",
)  # fmt: skip
"""What the names of programs that change pictures contain, in lower case. Firmware names itself otherwise."""

_FOREIGN = (
    (0, b"GIF8", "a GIF"),
    (0, b"BM", "a BMP"),
    (0, b"8BPS", "a Photoshop document"),
    (0, b"%PDF", "a PDF"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"\x00\x00\x00\x0cJXL ", "a JPEG XL picture"),
    (0, b"\xff\x0a", "a JPEG XL picture"),
    (0, b"\x00\x00\x00\x0cjP  ", "a JPEG 2000 picture"),
    (8, b"WEBP", "a WebP picture"),
    (8, b"AVI ", "a video"),
    (8, b"WAVE", "a sound recording"),
    (4, b"ftyphe", "a HEIF picture"),
    (4, b"ftypmi", "a HEIF picture"),
    (4, b"ftypms", "a HEIF picture"),
    (4, b"ftypav", "an AVIF picture"),
    (4, b"ftyp", "a video"),
)

_RAW_STARTS = (
    (0, b"FUJIFILM"),  # RAF
    (4, b"ftypcrx "),  # CR3
    (6, b"HEAPCCDR"),  # CRW
    (0, b"\0MRM"),
    (0, b"FOVb"),  # X3F
    (0, b"IIRO"), (0, b"IIRS"), (0, b"MMOR"),  # ORF
    (0, b"IIU\0"),  # RW2
    (0, b"ARRI"),
    (0, b"RAWC"),
    (0, b"NOKIARAW"),
    (0, b"DSC-Image"),
    (0, b"PWAD"),
    (0, b"BOTC"),
)  # fmt: skip

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_PERTURB, _M_ARENA_MAX = -1, -4, -6, -8  # malloc.h
_CFA, _LINEAR_RAW = 32803, 34892
_RAW_COMPRESSIONS = {262, 32767, 32769, 32770, 34713, 65000, 65535}


Place = Callable[[tuple[int, int], np.dtype[Any]], NDArray[Any]]
"""Gives memory for samples, by shape (rows, columns * channels) and type; C-contiguous."""

_Loaded = TypeVar("_Loaded")
_warnings_lock = threading.Lock()


class DecodeError(Exception):
    """A picture cannot be used. The message is a sentence for its photographer, without the file's name."""


class _Memory:
    """Where the samples of one picture are wanted, or end up."""

    def __init__(self, place: Place | None) -> None:
        self._place = place
        self._given: NDArray[Any] | None = None

    def give(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return memory for samples; those who ask for it cannot return any others."""
        self._given = (self._place or np.empty)(shape, dtype)
        return self._given

    def with_samples(self, samples: Samples) -> Samples:
        """Return the same samples, C-contiguous and where they are wanted."""
        if self._given is not None or (self._place is None and samples.flags.c_contiguous):
            return samples
        wanted = self.give(samples.shape, samples.dtype)
        wanted[...] = samples
        return wanted


@dataclass(frozen=True, slots=True)
class _Picture:
    """What a format's reader found."""

    samples: NDArray[np.generic]
    """(height, width) or (height, width * channels)."""

    colours: str
    channels: int
    sample_kind: SampleKind
    about: Metadata
    kind: ShotKind | None = None
    black_level_adu: float | None = None
    white_level_adu: float | None = None


def decode(path: Path, kind: ShotKind | None = None, *, luma: bool = False) -> Frame:
    """Read one shot in this process: for files of our own making. `decoders` does it for others'.

    Raises and returns what `decode_file` does; the file's name does not matter.
    """
    # Unbuffered: a buffer would copy the whole content once more, 6 ms for a 6 MB JPEG.
    with path.open("rb", buffering=0) as file:
        return decode_file(file, kind, luma=luma)


def decode_file(
    file: BinaryIO, kind: ShotKind | None = None, place: Place | None = None, *, luma: bool = False
) -> Frame:
    """Read one shot.

    Parameters
    ----------
    file
        Unbuffered, at its start.
    kind
        Light or dark, if the caller knows. Else the header says, or the samples do.
    place
        Gives the memory in which the samples are wanted, once. Without, they are where their reader has put them.
    luma
        Read of a colour JPEG its luma alone, as of a grey one.

    Raises
    ------
    DecodeError
        If the content is no picture to learn about a sensor from.
    MemoryError
        If there is not enough for it.
    OSError
        If the disk cannot be read.
    """
    memory = _Memory(place)
    picture = _read(file, memory.give, luma=luma)
    samples = memory.with_samples(_checked(picture))
    height, width = samples.shape[0], samples.shape[1] // picture.channels
    layout = SensorLayout(width, height, picture.colours, picture.channels)
    require_sides(layout)
    if picture.sample_kind is SampleKind.RAW:
        _refuse_half_written(samples)
        _refuse_levels(samples, picture.black_level_adu, picture.white_level_adu)
    else:
        _refuse_edited(picture.about, width, height)
    about, levels = picture.about, (picture.black_level_adu, picture.white_level_adu)
    decided = kind or picture.kind
    if decided is None:
        dark = looks_dark(samples, layout, *levels)
        decided = ShotKind.DARK if dark else ShotKind.LIGHT
    return Frame(
        sensor=SensorIdentity(
            make=about.make,
            model=about.model,
            serial=about.serial,
            samples=picture.sample_kind,
            layout=layout,
            dtype=samples.dtype.name,
        ),
        samples=samples,
        kind=decided,
        info=ShotInfo(about.exposure_s, about.iso, about.sensor_temp_c, about.taken_at),
        black_level_adu=picture.black_level_adu,
        white_level_adu=picture.white_level_adu,
        lit=kind is ShotKind.DARK and looks_lit(samples, layout, *levels),
    )


def _read(file: BinaryIO, place: Place, *, luma: bool) -> _Picture:
    head = file.read(64)
    file.seek(0)
    if not head:
        raise DecodeError("the file is empty; copy it from the camera again")
    if head[:3] == b"\xff\xd8\xff":
        return _read_jpeg(file.read(), place, luma=luma)
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return _read_png(file.read())
    if head[:9] == b"SIMPLE  =":
        return _read_fits(file)
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _read_tiff_or_raw(file, place)
    if any(head[offset:].startswith(start) for offset, start in _RAW_STARTS):
        return _read_raw(file)
    for offset, start, name in _FOREIGN:
        if head[offset:].startswith(start):
            raise DecodeError(f"this is {name}, which cannot be used; set the camera to RAW or JPEG")
    if not any(head):
        raise DecodeError("the file begins with zeros, so it is only half written; copy it from the camera again")
    raise DecodeError("this is no picture of a known kind; hotpixd reads camera raw, DNG, JPEG, TIFF, PNG and FITS")


# JPEG


def _read_jpeg(data: bytes, place: Place, *, luma: bool) -> _Picture:
    import simplejpeg

    try:
        height, width, colourspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise DecodeError(_broken("JPEG", error)) from error
    _require_size(width, height)
    if colourspace in ("CMYK", "YCCK"):
        raise DecodeError("this JPEG is in CMYK colours, which no camera writes; use the original from the camera")
    grey = luma or colourspace == "Gray"
    about = metadata.from_bytes(data)
    _refuse_edited(about, width, height)  # before the expensive part
    channels = 1 if grey else 3
    samples = place((height, width * channels), np.dtype(np.uint8))
    try:
        # The same library and settings as Pillow's: its samples are equal, without its copies.
        simplejpeg.decode_jpeg(data, colorspace="GRAY" if grey else "RGB", buffer=samples)
    except ValueError as error:
        raise DecodeError(_broken("JPEG", error)) from error
    return _Picture(samples, "L" if grey else "RGB", channels, SampleKind.RENDERED, about)


# PNG


def _read_png(data: bytes) -> _Picture:
    from PIL import PngImagePlugin

    if len(data) < 33 or data[12:16] != b"IHDR":
        raise DecodeError(_broken("PNG"))
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    depth, colour_type = data[24], data[25]
    _require_size(width, height)
    if colour_type == 3:
        raise DecodeError("this PNG has a palette instead of samples; save it in grey or RGB")
    if depth not in (8, 16):
        raise DecodeError(f"this PNG has {depth} bit per sample; hotpixd reads 8 and 16")
    if depth == 16 and colour_type != 0:
        # Pillow would silently drop the low bytes.
        raise DecodeError("this PNG has 16 bit per sample in colour or with alpha; save it as TIFF")
    _refuse_if(extent.png_fault(data))

    def load() -> NDArray[np.generic]:
        # Not Image.open, whose guard against decompression bombs bites below the largest cameras.
        with PngImagePlugin.PngImageFile(io.BytesIO(data)) as image:
            image.load()
            samples = np.asarray(image)
        return samples.astype(np.uint16) if depth == 16 else samples

    return _from_pixels(_guarded("PNG", load), metadata.from_bytes(data))


# TIFF


def _read_tiff_or_raw(file: BinaryIO, place: Place) -> _Picture:
    def read(offset: int, size: int) -> bytes:
        file.seek(offset)
        return file.read(size)

    first = metadata.first_directory(read)
    if first is None:
        if b"+" in read(0, 4):  # BigTIFF
            return _read_tiff(file, place)
        raise DecodeError(_broken("TIFF or raw"))
    directories = [first, *first.children(0x014A)]
    photometrics = {directory.number(0x0106) for directory in directories}
    compressions = {directory.number(0x0103) for directory in directories}
    camera_raw = (
        read(8, 2) == b"CR"
        or bool(photometrics & {_CFA, _LINEAR_RAW})
        or bool(compressions & _RAW_COMPRESSIONS)
        or bool({0xC612, 0x9216} & first.entries.keys())  # DNGVersion, TIFF/EPStandardID
        or first.number(0x00FE) == 1  # a thumbnail first, as raw files have it
    )
    if not camera_raw:
        return _read_tiff(file, place)
    try:
        return _read_dng(file, place)
    except DecodeError:
        # A plain mosaic that LibRaw does not take for a camera's. A damaged raw begins with a preview.
        dng = {0xC612, 0xC614, 0xC68D} & first.entries.keys()  # its version, its camera, its visible area
        if first.number(0x0106) != _CFA or first.number(0x00FE) or dng:
            raise
        with contextlib.suppress(DecodeError):
            return _read_tiff(file, None)
        raise


def _read_tiff(file: BinaryIO, place: Place | None) -> _Picture:
    import tifffile

    tifffile.logger().setLevel(logging.CRITICAL)  # what matters becomes a DecodeError
    about = metadata.from_file(file)
    file.seek(0)

    def load() -> tuple[NDArray[np.generic], int, str]:
        # With a name, which it would else ask a file for that may have none.
        with tifffile.TiffFile(file, name="shot") as tiff:
            page = tiff.pages.first
            _require_tiff_size(page)
            if len(tiff.pages) > 1 and tiff.pages[1].shape == page.shape:
                raise DecodeError("this TIFF holds several pictures; save each in a file of its own")
            _refuse_if(extent.page_fault(page, file))
            photometric = int(page.photometric)
            colours = _tiff_pattern(page) if photometric == _CFA else ""
            # Read straight to where they are wanted, if nothing has to be made of them.
            out = None
            if place is not None and page.dtype is not None and _is_plain(page):
                rows = page.shape[0]
                out = place((rows, page.size // rows), page.dtype)
            try:
                samples = page.asarray(out=out)
            except ValueError as error:
                if "imagecodecs" not in str(error):
                    raise
                samples = _tiff_by_pillow(file, page)
            if page.samplesperpixel > 1 and int(page.planarconfig) == 2:
                samples = np.moveaxis(samples, 0, -1)
            return samples, photometric, colours

    samples, photometric, colours = _guarded("TIFF", load)
    if photometric not in (1, 2, _CFA):
        raise DecodeError(
            f"this TIFF stores colours in a way (photometric {photometric}) that hotpixd does not read;"
            " save it in grey or RGB"
        )
    return _from_pixels(samples, about, colours)


def _is_plain(page: Any) -> bool:
    """Whether the samples of a TIFF of the right depth are all there is in it, in their order."""
    one_by_one = page.samplesperpixel == 1 or (page.samplesperpixel == 3 and int(page.planarconfig) == 1)
    return bool(one_by_one and page.is_contiguous and page.predictor == 1 and page.fillorder == 1)


def _require_tiff_size(page: Any) -> None:
    _require_size(page.imagewidth, page.imagelength)
    if page.bitspersample not in (8, 16) or int(page.sampleformat) != 1:
        raise DecodeError(
            f"this TIFF has samples of {page.bitspersample} bit that are not whole numbers of 8 or 16 bit;"
            " save it with 8 or 16 bit"
        )


def _tiff_pattern(page: Any) -> str:
    """Return the colours of a TIFF/EP mosaic, which are known to be there."""
    values, sides = page.tags.valueof(33422), tuple(page.tags.valueof(33421))
    if sides not in ((2, 2), (6, 6)):
        raise DecodeError(
            f"the colours of this mosaic repeat after {sides[0]} x {sides[1]}; hotpixd handles 2 x 2 and 6 x 6"
        )
    return "".join("RGBCMYW"[value] for value in values)


def _tiff_by_pillow(file: BinaryIO, page: Any) -> NDArray[np.generic]:
    from PIL import TiffImagePlugin

    if page.bitspersample == 16 and page.samplesperpixel > 1:
        raise DecodeError(
            "this TIFF is compressed in a way that needs the package imagecodecs; save it without compression"
        )
    file.seek(0)
    with _warnings_lock, warnings.catch_warnings():
        # What it warns of either raises as well or does not matter.
        warnings.simplefilter("ignore")
        with TiffImagePlugin.TiffImageFile(io.BytesIO(file.read())) as image:
            image.load()
            return np.asarray(image)


def _from_pixels(samples: NDArray[np.generic], about: Metadata, colours: str = "") -> _Picture:
    """Return a lossless picture: grey is raw of a pattern yet unknown, colour is rendered."""
    if samples.ndim == 3 and samples.shape[2] in (1, 2):
        samples = samples[:, :, 0]
    if samples.ndim == 2:
        _refuse_if(extent.filter_fault(colours or "LLLL"))
        return _Picture(samples, colours or "LLLL", 1, SampleKind.RAW, about)
    if samples.ndim != 3 or samples.shape[2] not in (3, 4):
        raise DecodeError(f"this picture has the shape {samples.shape}; hotpixd reads grey and RGB")
    rgb = np.ascontiguousarray(samples[:, :, :3])
    return _Picture(rgb.reshape(rgb.shape[0], -1), "RGB", 3, SampleKind.RENDERED, about)


# Camera raw


def _read_dng(file: BinaryIO, place: Place) -> _Picture:
    """Read a raw file that is a TIFF: without LibRaw where that would only copy."""
    mosaic = dng.find(file)
    reading = None if mosaic is None else dng.known(mosaic)
    file.seek(0)
    about = metadata.from_file(file)
    # What is missing LibRaw may know.
    if mosaic is not None and reading is not None and None not in (about.exposure_s, about.iso, about.taken_at):
        placed = _placed(file, place, mosaic, reading)
        if placed is not None:
            return _raw_picture(placed, about, reading)
    samples, about, reading = _by_libraw(file, about, coded=mosaic is not None and mosaic.coded)
    if mosaic is not None and dng.is_new(mosaic):
        # Without enough memory for both ways nothing is learned; the shot is decoded.
        with contextlib.suppress(MemoryError):
            dng.learn(mosaic, reading, samples, file)
    return _raw_picture(samples, about, reading)


def _placed(file: BinaryIO, place: Place, mosaic: dng.Mosaic, reading: Reading) -> NDArray[np.uint16] | None:
    """Return the samples of a DNG; None if anything is wrong with it.

    What that is LibRaw has to say: the reason must not depend on which shots came before.
    """
    if extent.raw_fault(file, mosaic.width, mosaic.height, reading.colours) is not None or _ends_empty(file):
        return None
    if file.seek(0, io.SEEK_END) < mosaic.end:
        return None
    # Memory is given once: what LibRaw makes of a file that is not whole has to go there, too.
    samples = place((reading.height, reading.width), np.dtype(np.uint16))
    whole = False
    with contextlib.suppress(MemoryError):
        whole = dng.read_into(samples, mosaic, reading, file)
    if not whole:
        theirs, _, _ = _by_libraw(file, Metadata(), coded=mosaic.coded)
        if theirs.shape != samples.shape:
            raise DecodeError(_broken("raw"))
        samples[...] = theirs
    return samples


def _read_raw(file: BinaryIO) -> _Picture:
    file.seek(0)
    return _raw_picture(*_by_libraw(file, metadata.from_file(file)))


def _raw_picture(samples: NDArray[Any], about: Metadata, reading: Reading) -> _Picture:
    return _Picture(
        samples,
        reading.colours,
        1,
        SampleKind.RAW,
        about,
        black_level_adu=reading.black_level_adu,
        white_level_adu=reading.white_level_adu,
    )


def _by_libraw(file: BinaryIO, about: Metadata, *, coded: bool = False) -> tuple[NDArray[Any], Metadata, Reading]:
    """Return the visible samples, `about` with what LibRaw knows besides, and what it has made of the file.

    Parameters
    ----------
    coded : whether the samples are lossless JPEGs, of which LibRaw complains only if they are damaged. Of other formats
        it does so of whole files, too; whether a frame is good is not to be told by that.
    """
    file.seek(0)
    with _around_libraw.prepared() as complaints:
        unpacked = _unpacked(file, about)
        if coded and complaints():
            raise DecodeError(_broken("raw"))
        return unpacked


def _unpacked(file: BinaryIO, about: Metadata) -> tuple[NDArray[Any], Metadata, Reading]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # about fork, for the developer and not the photographer
        import rawpy

    raw = rawpy.RawPy()
    try:
        # From memory: LibRaw takes names besides, but a decoder in its jail has none to give. Both take as long.
        raw.open_buffer(file)
        with _around_libraw.blank_memory() if _can_hold(file, raw.sizes) else contextlib.nullcontext():
            raw.unpack()
        if raw.raw_type is not rawpy.RawType.Flat:
            raise DecodeError(
                "this raw file holds computed colours (linear DNG, sRAW or Foveon), not the sensor's samples;"
                " set the camera to full-size RAW, or use the original instead of a converted DNG"
            )
        sizes = raw.sizes
        _require_size(sizes.width, sizes.height)
        colours = _raw_colours(raw)
        _refuse_if(extent.raw_fault(file, sizes.raw_width, sizes.raw_height, colours))
        _refuse_if(extent.filter_fault(colours))
        # The array keeps `raw` alive, which must not be closed then.
        samples = raw.raw_image_visible
        black = [float(level) for level in raw.black_level_per_channel]
        white = float(raw.white_level)
        about = about.filled_from(_other(raw))
        if samples[-1].any():
            _refuse_empty_end(file)
    except rawpy.LibRawIOError as error:
        raise DecodeError("the raw file is cut off before its end; copy it from the camera again") from error
    except rawpy.LibRawFileUnsupportedError as error:
        raise DecodeError(
            "LibRaw does not know this raw file: it is damaged, or its camera is newer than this rawpy"
        ) from error
    except rawpy.LibRawError as error:
        raise DecodeError(_broken("raw")) from error
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise DecodeError(_broken("raw")) from error
    visible = sizes.top_margin, sizes.left_margin, samples.shape[1], samples.shape[0]
    return samples, about, Reading(*visible, colours, sum(black) / len(black), white or None)


def _can_hold(file: BinaryIO, sizes: Any) -> bool:
    """Whether a raw file may hold as many samples as it says: a quarter of a byte each is less than any format takes.

    LibRaw reserves memory for them in any case. To fill it takes that memory, gigabytes with a damaged header.
    """
    return bool(sizes.raw_width * sizes.raw_height <= 4 * file.seek(0, io.SEEK_END))


def _refuse_empty_end(file: BinaryIO) -> None:
    """Refuse a compressed raw file whose last eighth was never written: its zeros decode to something."""
    if _ends_empty(file):
        raise DecodeError("the last part of the file is all zero, so it is only half written; copy it again")


def _ends_empty(file: BinaryIO) -> bool:
    size = file.seek(0, io.SEEK_END)
    for tail in (4096, size // 8):
        file.seek(-min(tail, size), io.SEEK_END)
        if any(file.read(tail)):
            return False
    return True


def _raw_colours(raw: Any) -> str:
    """Return the letters of one period from the visible area's origin, which may lie inside the pattern."""
    names = raw.color_desc.decode("ascii", "replace")
    period = raw.raw_pattern.shape[0]
    top, left = raw.sizes.top_margin, raw.sizes.left_margin
    if period == 1:
        return "L"
    if period not in (2, 6):
        raise DecodeError(f"this sensor's colours repeat after {period} rows, which hotpixd does not handle yet")
    return "".join(names[raw.raw_color(top + y, left + x)] for y in range(period) for x in range(period))


def _other(raw: Any) -> Metadata:
    """Return what LibRaw knows about the shot, zeros meaning unknown."""
    other = raw.other
    taken_at: datetime | None = other.timestamp
    if taken_at is not None and taken_at.year < 1990:  # the epoch stands for no time
        taken_at = None
    return Metadata(
        exposure_s=round(float(other.shutter_speed), 7) or None,
        iso=float(other.iso_speed) or None,
        taken_at=taken_at,
    )


# FITS


def _read_fits(file: BinaryIO) -> _Picture:
    try:
        from astropy.io import fits
    except ImportError as error:
        raise DecodeError('reading FITS needs astropy: pip install "hotpixd[fits]"') from error

    def load() -> tuple[NDArray[np.generic], dict[str, object], float]:
        # Warning filters are one for all threads: two that save and restore them would mix them up.
        with _warnings_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _refuse_if(extent.fits_fault(file))
            with fits.open(file, memmap=False, lazy_load_hdus=True) as units:
                for unit in units:
                    shape: tuple[int, ...] = getattr(unit, "shape", ())
                    if unit.is_image and (len(shape) == 2 or (len(shape) == 3 and shape[0] == 3)):
                        _require_size(shape[-1], shape[-2])
                        # Reading the samples takes it from the header.
                        zero = unit.header.get("BZERO", 0)
                        return np.asarray(unit.data), dict(unit.header), zero
        raise DecodeError("this FITS file holds no picture of two axes")

    data, header, zero = _guarded("FITS", load)
    samples = _whole_numbers(data)
    if samples.ndim == 2 and (samples[-1] == zero).all():
        # What was never written is zero in the file, and stands at its end whichever way the rows go.
        _refuse_half_written(samples != zero, 1 if zero else MIN_EMPTY_ROWS)
    # The standard counts rows from the bottom; programs that store the top row first say so.
    bottom_up = str(header.get("ROWORDER", "")).strip().upper() != "TOP-DOWN"
    if bottom_up:
        samples = samples[..., ::-1, :]
    if samples.ndim == 3:
        samples = np.moveaxis(samples, 0, -1)
    colours = _fits_pattern(header, data.shape[-2], bottom_up)
    return replace(_from_pixels(samples, metadata.from_fits_header(header), colours), kind=_fits_kind(header))


def _whole_numbers(data: NDArray[np.generic]) -> NDArray[np.generic]:
    """Return FITS samples as unsigned integers; programs store 16-bit counts as 32-bit or float too."""
    if data.dtype.kind == "u" and data.dtype.itemsize <= 2:
        return data
    values = np.asarray(data, dtype=np.float64 if data.dtype.itemsize > 2 else np.int32)
    if not np.isfinite(values).all() or (values != np.rint(values)).any():
        raise DecodeError(
            "the samples of this FITS file are fractions: it was calibrated or stacked; use single raw frames"
        )
    if values.min() < 0 or values.max() > 65535:
        raise DecodeError(
            f"the samples of this FITS file go from {values.min():.0f} to {values.max():.0f},"
            " not within 0 to 65535; use frames as the camera stored them"
        )
    return values.astype(np.uint16)


def _fits_pattern(header: Mapping[str, object], height: int, bottom_up: bool) -> str:
    """Return the colours at the top left; BAYERPAT names those of the rows in the order of the file.

    So reads Siril, which turns the pattern with the picture.
    """
    pattern = str(header.get("BAYERPAT", "")).strip().upper()
    if len(pattern) != 4 or not set(pattern) <= set("RGBCMYW"):  # "NONE", "TRUE", or a grey camera
        return ""
    right, down = (_offset(header.get(keyword)) for keyword in ("XBAYROFF", "YBAYROFF"))
    rows = [(height - 1 - y if bottom_up else y) + down for y in (0, 1)]
    return "".join(pattern[row % 2 * 2 + (x + right) % 2] for row in rows for x in (0, 1))


def _offset(value: object) -> int:
    return int(value) if isinstance(value, (int, float)) and abs(value) < 1e6 else 0


def _fits_kind(header: Mapping[str, object]) -> ShotKind | None:
    stated = str(header.get("IMAGETYP") or header.get("FRAME") or "").lower()
    if "dark" in stated or "bias" in stated or "zero" in stated:
        return ShotKind.DARK
    if any(word in stated for word in ("light", "object", "flat", "science")):
        return ShotKind.LIGHT
    return None


# Common


def _guarded(format_name: str, load: Callable[[], _Loaded]) -> _Loaded:
    """Return what `load` reads from memory; whatever it raises, the content is to blame.

    Readers in Python meet broken files with anything from struct.error to RecursionError.
    """
    try:
        return load()
    except (DecodeError, MemoryError):
        raise
    except Exception as error:
        # The disk: readers give theirs no number, and EINVAL answers offsets that no file has.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise DecodeError(_broken(format_name)) from error


def _checked(picture: _Picture) -> Samples:
    """Return the samples as uint8 or uint16 in native byte order."""
    samples = picture.samples
    if samples.dtype.kind == "u" and samples.dtype.itemsize == 1:
        return samples.astype(np.uint8, copy=False)
    if samples.dtype.kind == "u" and samples.dtype.itemsize == 2:
        return samples.astype(np.uint16, copy=False)
    raise DecodeError(f"the samples are {samples.dtype.name}; hotpixd reads whole numbers of 8 or 16 bit")


def _require_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise DecodeError("the picture has no pixels; copy it from the camera again")
    if width * height > MAX_PIXELS:
        raise DecodeError(f"the header says {width} x {height} pixels, more than any camera has; the file is damaged")


def require_sides(layout: SensorLayout) -> None:
    """Raise `DecodeError` for a picture too small for the statistics."""
    if min(layout.width, layout.height) < MIN_SIDE or (
        min(layout.width, layout.height) // layout.period < MIN_PLANE_SIDE
    ):
        raise DecodeError(
            f"the picture is only {layout.width} x {layout.height} pixels; this is no camera's full frame"
        )


def _refuse_half_written(samples: Samples | NDArray[np.bool_], least: int = MIN_EMPTY_ROWS) -> None:
    """Refuse raw samples with so many rows of zeros, one after the other, as chance does not put there."""
    # Most rows show at once that they are not: to look at all samples takes a third of the time of decoding.
    empty = np.array(~samples[:, :_ENOUGH_OF_A_ROW].any(axis=1))
    empty[empty] = ~samples[empty].any(axis=1)
    if not empty.any():
        return
    if empty.all():
        raise DecodeError("every sample is zero; the file is only half written, copy it from the camera again")
    # Where runs of empty rows begin and end.
    edges = np.flatnonzero(np.diff(empty, prepend=False, append=False))
    lengths = edges[1::2] - edges[::2]
    longest = int(lengths.max())
    # In an 8-bit dark two of five rows are all zero too, but then they are everywhere, not one after the other.
    elsewhere = (np.count_nonzero(empty) - longest) / (empty.size - longest)
    if longest >= least and empty.size * elsewhere**longest < 1e-9:
        at = int(edges[2 * int(lengths.argmax())])
        where = f"the last {longest}" if at + longest == empty.size else f"{longest} (from row {at} on)"
        raise DecodeError(
            f"{where} of {empty.size} rows are all zero, so the file is only half written;"
            " copy it from the camera again"
        )


def _refuse_levels(samples: Samples, black_adu: float | None, white_adu: float | None) -> None:
    """Refuse raw samples that are not where the header says: it is damaged, or that of another picture."""
    if black_adu is not None and white_adu is not None and black_adu >= white_adu:
        raise DecodeError(
            f"its header says that black is {black_adu:.0f} and white {white_adu:.0f}; copy it from the camera again"
        )
    # An odd step meets all colours of a mosaic.
    some = samples[::17, ::17]
    middle, high = (float(level) for level in np.percentile(some, (50, 99)))
    if black_adu is not None and black_adu > MIN_BLACK_ADU and middle < black_adu / 2:
        raise DecodeError(
            f"its header says that black is {black_adu:.0f}, but half of the samples are below {middle:.0f}:"
            " the header is damaged, or not of this picture"
        )
    if white_adu is not None and high > 2 * white_adu:
        raise DecodeError(
            f"its header says that no sample is above {white_adu:.0f}, but they reach {high:.0f}:"
            " the header is damaged, or not of this picture"
        )


def _refuse_edited(about: Metadata, width: int, height: int) -> None:
    for program in (about.software, about.creator):
        if program and any(name in program.lower() for name in EDITORS):
            raise DecodeError(
                f"the picture was written by {program}, so its pixels are not the camera's; use the original"
            )
    if about.width and about.height and {about.width, about.height} != {width, height}:
        raise DecodeError(
            f"the camera wrote {about.width} x {about.height} pixels, the file has {width} x {height}:"
            " it was cropped or resized; use the original"
        )


def _broken(format_name: str, error: BaseException | None = None) -> str:
    reason = f" ({' '.join(str(error).split())})" if error is not None and str(error) else ""
    return f"the {format_name} file is damaged or cut off{reason}; copy it from the camera again"


def _refuse_if(fault: str | None) -> None:
    """Refuse a file that contradicts itself."""
    if fault is not None:
        raise DecodeError(f"{fault}; the file is damaged, copy it from the camera again")


def keep_large_buffers() -> bool:
    """Make the C allocator keep freed frames for the next one; return whether it could.

    By default glibc returns buffers above 32 MB to the kernel and gets them back page by page. Threads then have
    no memory of their own, as theirs ends at 64 MB and cannot keep a frame. Meant for a process that decodes one
    frame after another; call it before it starts threads. A scan of 24-megapixel shots took 21 to 35 ms of
    processor time less per uncompressed DNG (of 205 to 215) and 10 to 23 less per JPEG (of 315), on a 2.3 GHz
    server core. The price: the memory of the largest frames stays with the process, and zeroed arrays take theirs
    at once, not when they are used.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1))
    return all(bool(mallopt(name, value)) for name, value in settings)


class _AroundLibRaw:
    """What LibRaw finds around it while it runs: a stderr that is kept, and memory that is blank.

    On stderr it complains of damaged files. Python writes to file descriptor 2 itself, so logs and tracebacks of other
    threads still arrive. Of two threads that decode, both get the complaints of either.

    Samples that it cannot decode it leaves as they were before. A damaged file would come out differently each time it
    is read (12 of 2,500 damaged DNGs did), and a replay must not. So the C allocator fills what it gives.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = self._blank = 0
        self._variable: ctypes.c_void_p | None = None
        self._real: int | None = None
        # Elsewhere (musl) the variable is constant and writing it would crash.
        if platform.libc_ver()[0] == "glibc":
            self._library = ctypes.CDLL(None)
            self._variable = ctypes.c_void_p.in_dll(self._library, "stderr")
            self._text, self._length = ctypes.c_void_p(), ctypes.c_size_t()
            self._library.open_memstream.restype = ctypes.c_void_p
            self._kept = self._library.open_memstream(ctypes.byref(self._text), ctypes.byref(self._length))

    @contextlib.contextmanager
    def prepared(self) -> Iterator[Callable[[], bool]]:
        """Give what tells whether anything was written to stderr since."""
        if self._variable is None or self._kept is None:
            yield lambda: False
            return
        with self._lock:
            if self._users == 0:
                self._library.rewind(ctypes.c_void_p(self._kept))
                self._real = self._variable.value
                self._variable.value = self._kept
            self._users += 1
        try:
            yield lambda: self._library.ftell(ctypes.c_void_p(self._kept)) > 0
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._variable.value = self._real

    @contextlib.contextmanager
    def blank_memory(self) -> Iterator[None]:
        """Have the C allocator fill what it gives."""
        self._fill(1)
        try:
            yield
        finally:
            self._fill(-1)

    def _fill(self, users: int) -> None:
        if self._variable is not None:
            with self._lock:
                self._blank += users
                # Memory is filled with the complement.
                self._library.mallopt(_M_PERTURB, 0xFF if self._blank else 0)


_around_libraw = _AroundLibRaw()
