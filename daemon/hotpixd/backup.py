"""Backups: turns a state that is in use into one file, and such a file into a state again.

A backup is a tar file: `manifest.json` first, with the size and BLAKE3 of every
other member, then a ledger, of each sensor the newest generation, the shots that
it does not cover, the declared defects, and the journal of a series of darks. Files on their way from a
camera (`incoming/`) are not in it: they are not acknowledged yet, and their camera
still has them. Nor is what only tells of this machine: the lock, and evidence of damage.

While a daemon runs, it is the daemon that reads its state, and whoever may connect
to its feed that writes the file, with their own rights, where they like. The daemon's
loop only copies the ledger and makes hard links (`snapshot`); as all other files of a
state never change, those are the state of that moment, and are read on another thread.
The tar file itself is never on the daemon's disk: its parts are made up when asked for.
"""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import re
import secrets
import shutil
import stat
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from blake3 import blake3

from hotpixd import __version__, archive
from hotpixd.store import declared
from hotpixd.store.declared import DeclaredError
from hotpixd.store.durable import (
    StateError,
    StateFull,
    WrongUse,
    fsync_folder,
    full_disk_as_state_full,
    make_folder,
    named_after,
    replace_durably,
    require_place,
    write_all,
)
from hotpixd.store.outbox import Outbox
from hotpixd.store.state import State, StateDamaged, held, swap_in
from hotpixd.views import answers
from hotpixd.views.text import printable
from hotpixd.words import many

FORMAT = 1
"""Version of the manifest and of what is in a backup."""

PART_BYTES = 1 << 20
"""Of the file, in one answer."""

_IDLE_S = 60.0
"""A backup of which no part was asked for so long is given up: whoever wanted it has gone."""

_MANIFEST = "manifest.json"
_MOST_MANIFEST = 64 << 20
_BLOCK = tarfile.BLOCKSIZE

_MEMBER = re.compile(
    r"ledger\.sqlite|series\.json|spool/[0-9a-f]{64}|sensors/[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}/gen-[0-9]{8}\.hpx"
    r"|declared/[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}\.json"
)
"""Every name that a backup may hold; none of them leaves its folder."""

Ask = Callable[..., Mapping[str, Any]]
"""Asks a question, here or over a daemon's socket: see `Backups.answer`."""


class BackupError(StateError):
    """A backup cannot be made or is not whole; a sentence."""


# --- making one


class Backups:
    """Answers the questions that make up a backup. One at a time is made.

    `begin` belongs to the thread that has the state; the others to one thread, whichever it is.
    """

    def __init__(self, state: State, *, live: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._state = state
        self._live = live
        self._clock = clock
        self._making: _Tar | None = None
        self._preparing: set[Path] = set()
        """Snapshots that were taken and are not prepared yet."""
        self._asked_at = 0.0
        self._number = 0

    def begin(self, *, anyway: bool = False) -> Path:
        """Take a snapshot; what was folded is best written to generations before.

        Parameters
        ----------
        anyway : whether another backup that is being made is given up for it

        Raises
        ------
        BackupError
            If another backup is being made.
        """
        making = self._making is not None and self._clock() - self._asked_at < _IDLE_S
        if (making or self._preparing) and not anyway:
            raise BackupError("Another backup of this state is being made; try again when it is done.")
        self._asked_at = self._clock()
        taken = snapshot(self._state)
        self._preparing.add(taken)
        return taken

    def prepare(self, taken: Path) -> dict[str, Any]:
        """Decide what of a snapshot is in the backup, and return its number and size."""
        self.end()
        try:
            self._making = _Tar(taken, live=self._live)
            self._asked_at = self._clock()
        finally:
            self._preparing.discard(taken)
        self._number += 1
        return {"backup": self._number, "size": self._making.size, "lacking": self._making.lacking}

    def part(self, number: int, offset: int) -> dict[str, Any]:
        """Return a part of the file, from an offset on."""
        if self._making is None or number != self._number:
            raise BackupError("This backup is not being made any more.")
        self._asked_at = self._clock()
        return {"data": base64.b64encode(self._making.read(offset, PART_BYTES)).decode("ascii")}

    def end(self) -> dict[str, Any]:
        """Give up the snapshot."""
        if self._making is not None:
            self._making.close()
            self._making = None
        return {}

    def end_if_idle(self) -> None:
        """Give up the snapshot if nobody asks for it any more."""
        if self._making is not None and self._clock() - self._asked_at >= _IDLE_S:
            self.end()

    def close(self) -> None:
        """Give up all snapshots, when no other thread has to do with them any more."""
        self.end()
        for taken in self._preparing:
            shutil.rmtree(taken, ignore_errors=True)

    def answer(self, question: str, **arguments: Any) -> dict[str, Any]:
        """Answer a question: `backup`, then `backup-part` until all is there, then `backup-end`."""
        match question:
            case "backup":
                return self.prepare(self.begin())
            case "backup-part":
                return self.part(int(arguments["backup"]), int(arguments["offset"]))
            case "backup-end":
                return self.end()
        raise KeyError(question)


QUESTIONS = frozenset(("backup", "backup-part", "backup-end"))


def snapshot(state: State, *, exact: bool = False) -> Path:
    """Put all that a backup could need into a folder of its own, a state itself. Takes no more room than a ledger.

    Parameters
    ----------
    exact : whether what is in the place of a file or folder, and is none, is there as well; and no file is copied

    Raises
    ------
    OSError
        Also if a file cannot be linked, and must not be copied.
    """
    taken = state.root / f"backup-{secrets.token_hex(8)}.tmp"
    try:
        with full_disk_as_state_full(f"for a backup in {state.root}"):
            taken.mkdir(mode=0o700)
            state.ledger.copy_to(taken / "ledger.sqlite")
            for folder in (state.root / "spool", state.root / "declared", *(state.root / "sensors").iterdir()):
                copy = taken / folder.relative_to(state.root)
                if not folder.is_dir():
                    if exact and os.path.lexists(folder):
                        copy.parent.mkdir(mode=0o700, exist_ok=True)
                        copy.symlink_to(folder.absolute())
                    continue
                copy.mkdir(mode=0o700, parents=True)
                for path in folder.iterdir():
                    if not _MEMBER.fullmatch(str(path.relative_to(state.root))):
                        continue
                    if stat.S_ISREG(path.lstat().st_mode):
                        _link(path, copy / path.name, or_copy=not exact)
                    elif exact:
                        (copy / path.name).symlink_to(path.absolute())
            series = state.root / "series.json"
            if series.is_file():
                shutil.copyfile(series, taken / "series.json")
    except BaseException:
        shutil.rmtree(taken, ignore_errors=True)
        raise
    return taken


def _link(path: Path, copy: Path, *, or_copy: bool) -> None:
    try:
        copy.hardlink_to(path)
    except OSError as error:
        if not or_copy or error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS, errno.EACCES):
            raise
        shutil.copyfile(path, copy)


class _Tar:
    """A tar file of some members of a snapshot, of which any part can be read, though it is nowhere."""

    def __init__(self, taken: Path, *, live: bool) -> None:
        self._taken = taken
        try:
            names, self.lacking = _members_of(taken)
            described = [(name, *_digest(taken / name)) for name in names]
            manifest = {
                "hotpixd backup": FORMAT,
                "version": __version__,
                "made_at": answers.now(),
                "live": live,
                "members": described,
            }
            self._pieces: list[tuple[int, bytes | Path]] = []
            self.size = 0
            self._add(_MANIFEST, json.dumps(manifest, indent=1).encode())
            for name, size, _ in described:
                self._add(name, taken / name, size)
            self._append(bytes(2 * _BLOCK))
        except BaseException:
            self.close()
            raise

    def read(self, offset: int, length: int) -> bytes:
        """Return so many bytes from an offset on, fewer at the end."""
        found = io.BytesIO()
        for start, piece in self._pieces:
            end = start + (len(piece) if isinstance(piece, bytes) else piece.stat().st_size)
            first, last = max(offset, start), min(offset + length, end)
            if first >= last:
                continue
            if isinstance(piece, bytes):
                found.write(piece[first - start : last - start])
            else:
                with piece.open("rb") as file:
                    file.seek(first - start)
                    found.write(file.read(last - first))
        return found.getvalue()

    def close(self) -> None:
        """Remove the snapshot."""
        shutil.rmtree(self._taken, ignore_errors=True)

    def _add(self, name: str, content: bytes | Path, size: int | None = None) -> None:
        entry = tarfile.TarInfo(name)
        entry.size = len(content) if isinstance(content, bytes) else size or 0
        entry.mode = 0o600
        entry.mtime = int(time.time())
        self._append(entry.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
        if entry.size:
            self._append(content, entry.size)
        self._append(bytes(-entry.size % _BLOCK))

    def _append(self, piece: bytes | Path, size: int | None = None) -> None:
        length = len(piece) if isinstance(piece, bytes) else size or 0
        if length:
            self._pieces.append((self.size, piece))
            self.size += length


def _members_of(taken: Path) -> tuple[list[str], list[str]]:
    """Return what of a snapshot is needed, and what cannot be used: opened as the state that it is, it tells."""
    lacking = []
    with State(taken, create=False) as state:
        names = []
        covers = {}
        for id_ in state.ledger.sensors():
            standing = archive.look(state, id_, 1)
            lacking += [sentence.replace(str(taken), str(taken.parent)) for _, sentence in standing.unusable]
            names += [str(path.relative_to(taken)) for path in standing.usable]
            covers[id_] = standing.reach
        for row in state.ledger.rows_to_replay(covers):
            # What is lost here already is not there either.
            if state.spool.verify(row.key):
                names.append(f"spool/{row.key}")
    # Those of sensors that this ledger does not know, too: a rebuild may still meet them.
    for path in declared.files(taken / "declared"):
        with suppress(DeclaredError):
            declared.read(path, path.stem)
            names.append(str(path.relative_to(taken)))
    if (taken / "series.json").exists():
        names.append("series.json")
    return ["ledger.sqlite", *names], lacking


def save(
    ask: Ask,
    file: Path,
    *,
    force: bool,
    advance: Callable[[int, int], None] = lambda _done, _of: None,
    tell: Callable[[str], object] = lambda _: None,
) -> int:
    """Make a backup by asking for its parts, and write it to a file, durably; return its bytes.

    Parameters
    ----------
    ask : where
    force : whether a file of that name is replaced
    advance : told how many bytes of how many are there
    tell : told in a sentence what of the state is damaged, and so not in it
    """
    require_place(file, force=force)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    begun = ask("backup")
    size = int(begun["size"])
    try:
        with full_disk_as_state_full(f"for the backup {file}"):
            with named_after(file, part):
                fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            try:
                done = 0
                while done < size:
                    data = base64.b64decode(ask("backup-part", backup=begun["backup"], offset=done)["data"])
                    if not data:
                        raise BackupError("The backup ended before all of it was there.")
                    write_all(fd, data)
                    done += len(data)
                    advance(done, size)
                os.fsync(fd)
            finally:
                os.close(fd)
            with part.open("rb") as written:
                _checked(written, file)
            require_place(file, force=force)
            part.rename(file)
            fsync_folder(file.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    finally:
        with suppress(Exception):  # it ends by itself, too
            ask("backup-end")
    for sentence in begun.get("lacking", ()):
        tell(f"{sentence} It is not in the backup.")
    return size


# --- reading one, which may be anything


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    size: int
    digest: str
    at: int
    """Where its content starts."""


@dataclass(frozen=True, slots=True)
class _Checked:
    """A backup that is whole."""

    members: tuple[_Member, ...]
    made_at: str
    live: bool
    """Whether a daemon went on when it was made."""


def _checked(file: BinaryIO, name: Path) -> _Checked:
    """Read all of a backup, believing nothing; return what is in it.

    Only plain files of expected names, as the manifest says, one after the other: there is no way to say links,
    devices, sparse files or other folders. Not by tarfile's own reader, which understands all of these, and takes as
    much memory as a hostile header asks for.

    Raises
    ------
    BackupError
        If anything is wrong.
    """
    first = _entry(file, name)
    if first is None or first.name != _MANIFEST or first.size > _MOST_MANIFEST:
        raise BackupError(f"{name} is no backup of hotpixd.")
    said = _manifest(file.read(first.size), name)
    file.seek(-first.size % _BLOCK, os.SEEK_CUR)
    members = []
    for described in said["members"]:
        entry = _entry(file, name)
        if entry is None:
            raise BackupError(f"{name} is damaged: it ends before {printable(described[0])}.")
        if (entry.name, entry.size) != (described[0], described[1]):
            raise BackupError(f"{name} is damaged: {printable(entry.name)} is not what its manifest says.")
        member = _Member(entry.name, entry.size, described[2], file.tell())
        digest = blake3()
        for block in _blocks(file, member.size, name):
            digest.update(block)
        if digest.hexdigest() != member.digest:
            raise BackupError(f"{name} is damaged: the digest of {member.name} does not match its content.")
        file.seek(-member.size % _BLOCK, os.SEEK_CUR)
        members.append(member)
    if _entry(file, name) is not None:
        raise BackupError(f"{name} is damaged: it holds more than its manifest says.")
    return _Checked(tuple(members), str(said["made_at"]), bool(said["live"]))


def _manifest(content: bytes, name: Path) -> dict[str, Any]:
    try:
        said = json.loads(content)
        version = said["hotpixd backup"]
        if version != FORMAT:
            raise BackupError(
                f"{name} is a backup of format {version!r}, and this hotpixd knows only {FORMAT}. Use the hotpixd"
                f" {printable(str(said.get('version')))} that made it."
            )
        names = [member for member, _, _ in said["members"]]
        for member, size, digest in said["members"]:
            if not isinstance(member, str) or not _MEMBER.fullmatch(member):
                raise BackupError(f"{name} is no backup that may be restored: it names {printable(str(member))!r}.")
            if not isinstance(size, int) or size < 0 or not isinstance(digest, str):
                raise BackupError(f"{name} is damaged: its manifest is not understood.")
        if len(set(names)) != len(names) or names[:1] != ["ledger.sqlite"]:
            raise BackupError(f"{name} is no backup that may be restored: its members are not those of a state.")
        return {"made_at": str(said["made_at"]), "live": said["live"], "members": said["members"]}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BackupError(f"{name} is damaged: its manifest is not understood.") from error


def _entry(file: BinaryIO, name: Path) -> tarfile.TarInfo | None:
    """Read the header of the next member; None at the end."""
    block = file.read(_BLOCK)
    if block == bytes(_BLOCK):
        return None
    try:
        entry = tarfile.TarInfo.frombuf(block, "ascii", "strict")
    except (tarfile.HeaderError, UnicodeError, ValueError) as error:
        raise BackupError(f"{name} is damaged, or no backup of hotpixd: {error}.") from error
    if entry.type != tarfile.REGTYPE or entry.size < 0:
        raise BackupError(f"{name} is no backup that may be restored: {printable(entry.name)!r} is no plain file.")
    return entry


def _blocks(file: BinaryIO, size: int, name: Path) -> Iterator[bytes]:
    left = size
    while left:
        block = file.read(min(left, 1 << 18))
        if not block:
            raise BackupError(f"{name} is damaged: it is cut short.")
        left -= len(block)
        yield block


def _digest(path: Path) -> tuple[int, str]:
    digest = blake3()
    size = 0
    with path.open("rb") as file:
        while block := file.read(1 << 18):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def restore(root: Path, file: Path, *, force: bool) -> list[str]:
    """Make a state of a backup; return in sentences what was done.

    All of the backup is checked before anything is made, and all that is made before it takes the state's place, in one
    step. A state that was there is kept beside it.

    Raises
    ------
    BackupError
        If the backup is not whole, or there are shots in the state and `force` is not given.
    StateLocked
        If a process has the state open.
    WrongUse
        If there is no such file.
    """
    root = root.expanduser().resolve()
    if file.is_dir():
        raise WrongUse(f"{file} is a folder; name a backup's file.")
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise WrongUse(f"There is no file {file}.") from error
    except OSError as error:
        raise BackupError(f"The backup {file} cannot be read: {error.strerror}.") from error
    with open(fd, "rb") as content:  # noqa: PTH123 - of a descriptor
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise BackupError(f"The backup {file} is no file.")
        backup = _checked(content, file)
        with held(root) as there:
            if there and not force and (shots := _shots_in(root)):
                raise BackupError(
                    f"There are {shots} in {root}. With --force that state is moved aside and kept, and the backup"
                    " takes its place."
                )
            made = root.with_name(f"{root.name}.restoring")
            try:
                _unpack(content, backup, made, file)
                said = _proved(made, backup, file)
                _own_like(root, made)
                old = swap_in(made, root)
            except BaseException:
                shutil.rmtree(made, ignore_errors=True)
                raise
    if old is not None:
        said.append(f"The state that was there is kept in {old}.")
        said += _declared_only_in(old, root)
    return [f"Restored {root} from the backup of {backup.made_at}.", *said]


def _shots_in(root: Path) -> str:
    """Say how many shots a state has; "" if none."""
    try:
        with State(root, create=False, locked=True) as state:
            count = sum(t.received + t.folded + t.refused + t.companion for t in state.ledger.tally())
            return many(count, "shot") if count else ""
    except StateDamaged:
        return "shots under a damaged ledger"
    except StateError as error:
        with suppress(OSError):
            # Of a state that was begun and never had a shot; or an empty folder.
            if {path.name for path in root.iterdir()} <= {"lock", "spool", "sensors", "incoming"}:
                return ""
        return f"files that are not understood ({error})"


def _unpack(content: BinaryIO, backup: _Checked, made: Path, file: Path) -> None:
    if os.path.lexists(made):
        shutil.rmtree(made)
    needed = sum(member.size for member in backup.members)
    free = shutil.disk_usage(made.parent).free
    if needed > free:
        raise StateFull(f"No space left for the state: {free / 1e6:.0f} MB are free, {needed / 1e6:.0f} MB are needed.")
    folders = {made, made / "spool", made / "sensors", made / "incoming"}
    with full_disk_as_state_full(f"for the state in {made}"):
        for folder in sorted(folders):
            folder.mkdir(mode=0o700)
        for member in backup.members:
            path = made / member.name
            if path.parent not in folders:
                path.parent.mkdir(mode=0o700)
                folders.add(path.parent)
            content.seek(member.at)
            digest = blake3()
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            try:
                for block in _blocks(content, member.size, file):
                    digest.update(block)
                    write_all(fd, block)
                os.fsync(fd)
            finally:
                os.close(fd)
            if digest.hexdigest() != member.digest:
                raise BackupError(f"{file} changed while it was read.")
        for folder in sorted(folders, reverse=True):
            fsync_folder(folder)


def _proved(made: Path, backup: _Checked, file: Path) -> list[str]:
    """Verify a restored state, and settle in it what must not be done twice."""
    said = []
    with State(made, create=False) as state:
        state.ledger.note_restored()
        state.ledger.commit()
        checked = answers.verify(state)
        wrong = [problem for problem in checked["problems"] if "received but" not in problem]
        if wrong:
            raise BackupError(f"{file} is whole, but what is in it is not: {wrong[0]}")
        said += checked["problems"]
        if backup.live:
            # The daemon went on: it has sent since what was due then.
            count = Outbox(state.ledger).give_up()
            state.ledger.commit()
            if count:
                said.append(
                    f"{count} {'alert was' if count == 1 else 'alerts were'} on the way when the backup was made; the"
                    " daemon went on then and has sent them: they are not sent again. hotpixd status lists them."
                )
    return said


def _own_like(root: Path, made: Path) -> None:
    """Give what was made to whom the state belonged: root may restore the state of a service's user."""
    try:
        before = root.stat()
    except FileNotFoundError:
        return
    if os.geteuid() != 0:
        return
    for path in (made, *made.rglob("*")):
        os.chown(path, before.st_uid, before.st_gid, follow_symlinks=False)
    made.chmod(stat.S_IMODE(before.st_mode))


# --- making a state anew


def rebuild(root: Path, fold: Callable[[State], int | None]) -> int:
    """Make a state anew beside the one that is there, then put it into its place; return the exit code.

    Ended early, what was made stays beside the state, and the next call goes on with it.

    Parameters
    ----------
    fold : folds the pictures into a new state; returns the exit code, None if it was interrupted

    Raises
    ------
    StateLocked
        If a process has the state open.
    """
    root = root.expanduser().resolve()
    made = root.with_name(f"{root.name}.rebuilding")
    with held(root):
        with State(made) as state:
            code = fold(state)
            shots = sum(tally.folded for tally in state.ledger.tally())
            covered = {row for row in _spooled(root) if state.ledger.find(row) is None}
        if code is None:
            print("The state is as it was. The same command goes on with rebuilding it.")
            return 1
        if not shots:
            shutil.rmtree(made)
            print(f"hotpixd: nothing was folded: the state {root} is as it was", file=sys.stderr)
            return code or 1
        _carry_declared(root, made)
        _own_like(root, made)
        old = swap_in(made, root)
    print(f"{root} is made anew of {many(shots, 'shot')}.")
    if old is not None:
        print(f"The old state is kept in {old}.")
        if covered:
            print(
                f"{many(len(covered), 'shot')} in its spool"
                f" {'is' if len(covered) == 1 else 'are'} not among these pictures; to fold them too:"
                f" hotpixd scan {old / 'spool'}/*"
            )
    return code


def _declared_only_in(old: Path, root: Path) -> Iterator[str]:
    """Yield a sentence for each sensor of which more was declared in the state that a backup has replaced."""
    for path in declared.files(old / "declared"):
        known = root / "declared" / path.name
        try:
            before = {(defect.x, defect.y) for defect in declared.read(path)}
            now = {(defect.x, defect.y) for defect in declared.read(known)} if known.exists() else set()
        except DeclaredError as error:
            yield str(error)
            continue
        if more := len(before - now):
            yield f"{more} of its declared defects are not in the backup; to take them over: hotpixd import {path}"


def _carry_declared(root: Path, made: Path) -> None:
    """Take over what was declared, damaged or not, of known sensors or others: no picture can say it again."""
    files = declared.files(root / "declared")
    if not files:
        return
    folder = made / "declared"
    with full_disk_as_state_full(f"for the declared defects in {folder}"):
        make_folder(folder)
        for path in files:
            tmp = folder / f"{path.name}.tmp"
            shutil.copyfile(path, tmp)
            replace_durably(tmp, folder / path.name, step="declared")


def _spooled(root: Path) -> list[str]:
    with suppress(OSError):
        return [path.name for path in (root / "spool").iterdir() if re.fullmatch("[0-9a-f]{64}", path.name)]
    return []
