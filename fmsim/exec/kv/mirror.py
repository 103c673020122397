"""Host memory for a tiered cache's mirror: one process's own, or one copy that the processes of a
host share.

The released FlashMemory engine (github.com/libertywing/FlashMemory-Deepseek-V4) pins a copy of the
same mirror in each of its ranks; a shared one is held once, whatever their number. It is a file in
memory (/dev/shm), which every process maps, and pins for its own GPU.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import time
import weakref
from pathlib import Path

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows, which has no memory files to share either
    fcntl = None  # type: ignore[assignment]

from fmsim.errors import FmsimError
from fmsim.units import gib

SHARED_ROOT = Path("/dev/shm")
CREATION_LIMIT_S = 600.0  # to wait for another process to allocate what is shared


class HostMirror:
    """`pages`: uint8 [layers, pages, page_bytes], zero at first; ``mirror[layer]`` is a layer's.

    Pinned where ``device`` is a GPU.

    With ``shared_name`` the first process on the host to ask creates the memory, and `created` is
    True there; others attach, and see each other's bytes. Who writes what, and when it can be read,
    is theirs to agree on. `close` (or the end of a `with`, or of the process) gives it back; when
    the creator does so the name is free again, and who has attached keeps the memory until closing
    it. Raises FmsimError where it cannot be had.
    """

    def __init__(
        self,
        layers: int,
        pages: int,
        page_bytes: int,
        device: torch.device | str = "cpu",
        shared_name: str | None = None,
    ):
        self.n_bytes = layers * pages * page_bytes
        shared = SharedFile(shared_name, self.n_bytes) if shared_name is not None else None
        self.created = shared is None or shared.created
        try:
            # Not torch's own pinned memory: its allocator rounds up to a power of two.
            memory = (
                mmap.mmap(-1, max(self.n_bytes, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                if shared is None
                else mmap.mmap(shared.fd, self.n_bytes)
            )
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(
                    mmap.MADV_HUGEPAGE
                )  # rows are read at random, and a GPU knows few translations of 4 KiB pages
            self.pages = torch.frombuffer(memory, dtype=torch.uint8)[: self.n_bytes].view(
                layers, pages, page_bytes
            )
            pinned = self.pages if torch.device(device).type == "cuda" and self.n_bytes else None
            if pinned is not None:
                _pin(pinned)
        except BaseException:
            if shared is not None:
                shared.close()
            raise
        self._release = weakref.finalize(self, _release, pinned, shared)

    def __getitem__(self, layer: int) -> Tensor:
        return self.pages[layer]

    def close(self) -> None:
        """Unpin, and give the name back if it was created here.

        Tensors made of the mirror stay readable, but are pinned no more.
        """
        self._release()

    def __enter__(self) -> HostMirror:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class SharedFile:
    """``n_bytes`` in memory under a name; `fd` is open for mapping.

    Its creator holds an exclusive lock on it as long as it lives.

    So whoever finds a file with a length and no such lock knows that its creator died, and one of
    length 0 is still being made.
    """

    def __init__(self, name: str, n_bytes: int):
        if not re.fullmatch(r"[\w.-]{1,100}", name):
            raise FmsimError(
                f"shared mirror {name!r}: a name is 1 to 100 letters, digits, '.', '_' or '-'"
            )
        if n_bytes == 0:
            raise FmsimError(
                f"shared mirror {name!r}: there is nothing to hold; a policy that recalls nothing"
                " needs no mirror"
            )
        self.path, self.n_bytes, self.pid = SHARED_ROOT / f"fmsim-{name}", n_bytes, os.getpid()
        deadline = time.monotonic() + CREATION_LIMIT_S
        while not self._opened():
            if time.monotonic() > deadline:
                raise FmsimError(
                    f"{self.path}: another process has been creating it for {CREATION_LIMIT_S:.0f}"
                    " s; see whether it hangs"
                )
            time.sleep(0.02)

    def close(self) -> None:
        """Remove the name where it was created; a forked child leaves it to its parent."""
        if self.created and os.getpid() == self.pid and self._current():
            self.path.unlink()
        os.close(self.fd)

    def _opened(self) -> bool:
        """Create or attach; False where it has to be tried again, as it is being made, or was
        removed meanwhile.
        """
        try:
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise FmsimError(
                f"{self.path}: cannot be opened ({error.strerror}); a shared mirror needs"
                f" {SHARED_ROOT}, and each user names of his own"
            ) from None
        try:
            if os.fstat(self.fd).st_size == 0:
                self.created = (
                    self._locked(fcntl.LOCK_EX)
                    and self._current()
                    and os.fstat(self.fd).st_size == 0
                )
                done = self.created
                if self.created:
                    self._allocate()
            else:
                self.created, done = False, self._current() and self._alive()
        except BaseException:
            os.close(self.fd)
            raise
        if not done:
            os.close(self.fd)
        return done

    def _alive(self) -> bool:
        """Check what is to be attached to."""
        found_bytes = os.fstat(self.fd).st_size
        if self._locked(fcntl.LOCK_SH):
            if not self._current():
                return False
            raise FmsimError(
                f"{self.path}: left over ({gib(found_bytes)}) by a process that was"
                " killed; delete the file, or take another name"
            )
        if found_bytes != self.n_bytes:
            raise FmsimError(
                f"{self.path}: {found_bytes:,} bytes were created by another process,"
                f" {self.n_bytes:,} are needed here; all that share a mirror need the same model,"
                " contexts, batch and granularity"
            )
        return True

    def _allocate(self) -> None:
        space = os.statvfs(SHARED_ROOT)
        free_bytes = space.f_bavail * space.f_frsize
        try:
            if self.n_bytes > free_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.posix_fallocate(
                self.fd, 0, self.n_bytes
            )  # a file with holes would kill the process when memory runs out
        except OSError as error:
            self.path.unlink()
            if error.errno != errno.ENOSPC:
                raise FmsimError(f"{self.path}: cannot be allocated ({error.strerror})") from None
            raise FmsimError(
                f"{self.path}: {gib(self.n_bytes)} are needed,"
                f" {gib(self.n_bytes - free_bytes)} more than the {gib(free_bytes)}"
                f" that are free in {SHARED_ROOT}; lower --context or --batch, or mount it"
                " larger"
            ) from None

    def _locked(self, kind: int) -> bool:
        try:
            fcntl.flock(self.fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _current(self) -> bool:
        """The name still stands for what is open."""
        try:
            return os.stat(self.path).st_ino == os.fstat(self.fd).st_ino
        except FileNotFoundError:
            return False


def _pin(memory: Tensor) -> None:
    runtime = torch.cuda.cudart()
    failed = runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if int(failed):
        with contextlib.suppress(RuntimeError):
            torch.zeros(
                1, device="cuda"
            )  # the next launch would be told of this failure: let it be one that nobody needs
        raise FmsimError(
            f"host memory for the cache: {gib(memory.nbytes)} cannot be pinned"
            f" ({runtime.cudaGetErrorString(failed)}); lower --context or --batch, or raise"
            " `ulimit -l`"
        )


def _release(pinned: Tensor | None, shared: SharedFile | None) -> None:
    try:
        if pinned is not None:
            torch.cuda.synchronize()  # a copy may still read it
    finally:
        if (
            pinned is not None
            # whatever failed before: memory that is
            # freed while registered cannot be registered again
        ):
            torch.cuda.cudart().cudaHostUnregister(pinned.data_ptr())
        if shared is not None:
            shared.close()
