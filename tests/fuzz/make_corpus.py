"""Write the first corpus: a small whole thing of each kind for each target. Kept beside what a fuzzer found since."""

from __future__ import annotations

import io
import json
import struct
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "faults")]

import fuzz_seeds  # noqa: E402

from pictures import colour, exif, jpeg, tiff_ifd  # noqa: E402


def main() -> None:
    """Run the command."""
    for target, cases in corpus().items():
        folder = HERE / "corpus" / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in cases.items():
            (folder / name).write_bytes(content)


def corpus() -> dict[str, dict[str, bytes]]:
    """Return the cases of each target by name."""
    about = {0x010F: "Canon", 0x0110: "Canon EOS 6D"}
    block = exif({0x829A: 0.25, 0x8827: 400, 0xA431: "A77", 0x9003: "2026:01:01 00:00:00", 0x9011: "+02:00"}, about)
    small = colour(16, 16)
    note = tiff_ifd([(0x000C, 4, 1, struct.pack("<I", 1234)), (4, 3, 14, bytes(24) + b"\x90\0\0\0")], 200)
    maker = b"II*\0" + struct.pack("<I", 8)
    maker += tiff_ifd([(0x010F, 2, 6, b"Canon\0"), (0x8769, 4, 1, struct.pack("<I", 100))], 8)
    maker = maker.ljust(100, b"\0")
    maker = (maker + tiff_ifd([(0x927C, 7, len(note), note)], 100)).ljust(200, b"\0") + note
    box = struct.pack(">I4s", 24, b"ftyp") + b"crx " + bytes(12) + struct.pack(">I4s", 40, b"moov")
    box += struct.pack(">I4s", 32, b"uuid") + bytes.fromhex("85c0b687820f11e08111f4ce462b6a48") + bytes(8)
    pictures = {
        "jpeg": jpeg(small, exif=block),
        "grey-jpeg": jpeg(small[:, :, 0], progressive=True),
        "png": fuzz_seeds._saved(small, "PNG"),
        "grey-png": fuzz_seeds._saved(small[:, :, 0].astype(np.uint16) * 9, "PNG"),
    }
    headers = {
        "tiff": fuzz_seeds.seeds("TIFF")[0].content[:700],
        "dng": fuzz_seeds.seeds("DNG")[-1].content[:1500],
        "fits": fuzz_seeds.seeds("FITS")[0].content[:3500],
        "rice": fuzz_seeds.seeds("FITS")[-2].content[:6500],
    }
    return {
        "metadata": {**pictures, **headers, "maker-note": maker, "cr3": box, "exif": b"II*\0" + block[10:]},
        "decode": {**pictures, **headers, "small-tiff": _small_tiff(), "small-dng": _small_dng()},
        "config": {
            "all": (HERE.parents[1] / "config.example.yaml").read_bytes()[:6000],
            "some": b"detection: {alpha: 0.05}\nsources:\n  - directory: /media/card\nalerts:\n  notify: [ntfy://x]\n",
            "wrong": b"detektion: 3\nalerts:\n  quiet_hours: 22:00-07:00\ncameras:\n  - port: usb:001,002\n",
        },
        "server": {
            "watch": b'{"ask":"watch"}\n{"ask":"status","id":1}\n',
            "refuse": b'{"ask":"refuse","id":[1,{"a":null}],"x":2}\n',
            "none": b"GET / HTTP/1.1\r\n\r\n",
        },
        "client": {
            "snapshot": b'{"type":"snapshot","n":1,"set":{"a":1}}\n{"type":"change","n":2,"set":{},"gone":["a"]}\n',
            "answer": b'{"type":"answer","id":1,"answer":{"a":[1]}}\n{"type":"error","id":1,"error":"no"}\n',
            "bye": b'{"type":"bye"}\n',
            "other": b"\0HTTP/1.1 200 OK\r\n",
        },
        "ledger": {"none": b"", "one": struct.pack("<HBBB", 16, 0, 1, 0), "text": struct.pack("<HBBB", 40, 3, 65, 1)},
        "generation": {
            "none": b"\1",
            "header": b"\1" + struct.pack("<HBBB", 0, 30, 49, 0),
            "raw": b"\0HPXGEN01" + struct.pack("<I", 2) + b"{}" + bytes(32),
        },
        "link": {
            "beat": b'{"event":"beat","patience_s":3.5}\n{"event":"gone"}\n',
            "answer": b'{"id":1,"ok":{"a":1}}\n{"id":2,"error":{"code":-1,"text":"no"}}\n',
            "failed": b'{"failed":{"code":-7,"text":"I/O","doing":"listing"}}\n',
        },
        "journal": {"whole": _journal()},
    }


def _small_tiff() -> bytes:
    import tifffile

    out = io.BytesIO()
    tifffile.imwrite(out, np.arange(256, dtype=np.uint16).reshape(16, 16) + 1, rowsperstrip=5, metadata=None)
    return out.getvalue()


def _small_dng() -> bytes:
    return fuzz_seeds._written(
        "dng", lambda path: fuzz_seeds.write_camera_dng(path, np.arange(576, dtype=np.uint16).reshape(24, 24))
    ).content


def _journal() -> bytes:
    from dataclasses import asdict

    from hotpixd.intake.darks import Journal, SeriesOrder

    journal = Journal(SeriesOrder(30, exposure_s=1.0, iso=800), "Acme One", 4, {"iso": "100"}, at=1.7e9)
    return json.dumps(asdict(journal)).encode()


if __name__ == "__main__":
    main()
