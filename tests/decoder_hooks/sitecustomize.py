"""Found by the interpreter of a decoder when a test puts this folder on its path: files make it misbehave on command.

A file that begins with "HOSTILE " names in its first line what it does to whoever reads it.
"""

import ctypes
import importlib
import json
import os
import socket
import sys
import time
from pathlib import Path


def _refused(do) -> str:
    """Return what the jail says to an attempt."""
    try:
        do()
    except (OSError, MemoryError, ImportError) as error:
        return type(error).__name__
    return "done"


def _attempts(path: str) -> dict[str, str]:
    libc = ctypes.CDLL(None, use_errno=True)

    def clone() -> None:
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)

    def spawned() -> None:
        if os.posix_spawn("/bin/true", ["true"], {}) <= 0:
            raise OSError

    def ptraced() -> None:
        if libc.ptrace(0, 0, 0, 0) < 0:
            raise OSError

    return {
        "read": _refused(lambda: Path(path).read_bytes()),
        "list": _refused(lambda: next(Path("/").iterdir())),
        "write": _refused(lambda: Path(path).with_suffix(".new").write_bytes(b"x")),
        "delete": _refused(lambda: Path(path).unlink()),
        "passwd": _refused(lambda: Path("/etc/passwd").read_text()),
        "tmp": _refused(lambda: os.open("/tmp", os.O_TMPFILE | os.O_WRONLY)),
        "tcp": _refused(lambda: socket.create_connection(("127.0.0.1", 9), 1)),
        "unix": _refused(lambda: socket.socket(socket.AF_UNIX)),
        "netlink": _refused(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)),
        "fork": _refused(clone),
        "spawn": _refused(spawned),
        "kill": _refused(lambda: os.kill(os.getppid(), 0)),
        "ptrace": _refused(ptraced),
        "memory": _refused(lambda: bytearray(1 << 40)),
        "import": _refused(lambda: importlib.import_module("xml.dom.minidom")),
    }


def _misbehave(order: str, decode) -> None:
    name, _, rest = order.partition(" ")
    if name == "hang":
        while True:
            pass
    elif name == "sleep":
        time.sleep(3600)
    elif name == "crash":
        ctypes.string_at(0)
    elif name == "exit":
        os._exit(0)
    elif name == "fill":
        hoard = []
        while True:
            hoard.append(bytearray(64 << 20))
    elif name == "fault":
        raise KeyError("a slip of the pen")
    elif name == "lock":
        # In C, without ever giving the interpreter's lock up.
        ctypes.PyDLL(None).sleep(3600)
    elif name == "attempt":
        raise decode.DecodeError(json.dumps(_attempts(rest)))
    elif name == "once":
        # In a file that the daemon's owner keeps, which the jail cannot: the number of processes tells.
        if os.getpid() % 2 == int(rest):
            os._exit(3)
        raise decode.DecodeError("the second time it only refuses")
    elif name == "say":
        with socket.socket(fileno=os.dup(int(sys.orig_argv[-4]))) as talk:
            talk.send(rest.encode())
        time.sleep(3600)


def _install() -> None:
    from hotpixd.intake import decode

    real = decode._read

    def read(file, place, **how):
        start = file.read(4096)
        file.seek(0)
        if start.startswith(b"HOSTILE "):
            _misbehave(start.partition(b"\n")[0].decode()[8:], decode)
        return real(file, place, **how)

    decode._read = read


if "hotpixd.intake.decode_worker" in sys.orig_argv:
    _install()

if "DECODER_TEST_PATIENCE_S" in os.environ:
    # In the daemon, which is not to wait as long for the tests.
    from hotpixd.intake import decoders

    decoders.Decoders.__init__.__kwdefaults__["patience_s"] = float(os.environ["DECODER_TEST_PATIENCE_S"])
