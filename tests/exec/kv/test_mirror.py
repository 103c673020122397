"""A mirror shared by real processes: one creates it, all see each other's bytes, and it is gone
when its creator is.
"""

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the mirror is a torch tensor")

from fmsim.errors import FmsimError
from fmsim.exec.kv import mirror as module
from fmsim.exec.kv.mirror import HostMirror

SHAPE = (2, 5, 3000)
shared = pytest.mark.skipif(not module.SHARED_ROOT.is_dir(), reason="no /dev/shm here")

# A process that opens the mirror, says whether it created it, and does what it is told, line by
# line.
OTHER = """
import sys, torch
from fmsim.exec.kv.mirror import HostMirror
print("up", flush=True)
sys.stdin.readline()
mirror = HostMirror(*map(int, sys.argv[3:]), device=sys.argv[2], shared_name=sys.argv[1])
print(mirror.created, flush=True)
for line in sys.stdin:
    print(eval(line), flush=True)
"""


class Other:
    """Another process; ``told`` says one line to it and returns its answer."""

    def __init__(self, name: str, device: str = "cpu"):
        arguments = [sys.executable, "-c", OTHER, name, device, *map(str, SHAPE)]
        self.process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def told(self, line: str) -> str:
        self.say(line)
        return self.answer()

    def say(self, line: str) -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        return self.process.stdout.readline().strip()

    def end(self) -> tuple[int, str]:
        """-> exit status and stderr."""
        errors = self.process.communicate()[1]
        return self.process.returncode, errors


@pytest.fixture
def name():
    name = f"test-{uuid.uuid4().hex}"
    yield name
    path_of(name).unlink(missing_ok=True)


def path_of(name: str) -> Path:
    return module.SHARED_ROOT / f"fmsim-{name}"


def test_a_processs_own_mirror_is_zero_and_writable():
    with HostMirror(*SHAPE) as mirror:
        assert (
            mirror.created
            and mirror.pages.shape == SHAPE
            and mirror[1].shape == SHAPE[1:]
            and not mirror.pages.any()
        )
        mirror[1][4] = 7
        assert mirror.pages[1, 4].unique().tolist() == [7] and mirror.n_bytes == mirror.pages.nbytes
    assert HostMirror(2, 0, 64).pages.shape == (2, 0, 64)


@shared
def test_processes_that_start_together_share_one_mirror_whose_end_is_its_creators(name):
    others = [Other(name) for _ in range(2)]
    for other in others:
        assert other.answer() == "up"
    for other in others:
        other.say("go")
    created = [other.answer() for other in others]
    assert sorted(created) == ["False", "True"]
    for number, other in enumerate(others):
        other.told(f"mirror[1][{number}].fill_({number + 1}).sum().item()")
    for other in others:
        assert other.told("mirror.pages[1, :, -1].tolist()") == "[1, 2, 0, 0, 0]"
    assert path_of(name).stat().st_size == 2 * 5 * 3000

    # a creator that fails leaves nothing
    attached, failing = (others[created.index(kind)] for kind in ("False", "True"))
    with HostMirror(*SHAPE, shared_name=name) as own:
        assert not own.created
        failing.told("mirror[0].fill_(9).sum().item()")
        failing.say("1 / 0")
        status, errors = failing.end()
        assert status == 1 and "ZeroDivisionError" in errors and not path_of(name).exists()
        assert (own[0] == 9).all()  # whoever has attached keeps it
    assert attached.told("mirror[0].eq(9).all().item()") == "True"

    # one that ends well leaves nothing either, and one that is killed is told of
    made = "mirror.close(), HostMirror(*mirror.pages.shape, shared_name=sys.argv[1])"
    assert attached.told(f"globals().update(mirror=({made})[1]) or mirror.created") == "True"
    assert path_of(name).exists()
    attached.process.kill()
    attached.end()
    with pytest.raises(FmsimError, match=f"fmsim-{name}: left over .* delete the file"):
        HostMirror(*SHAPE, shared_name=name)


@shared
def test_what_cannot_be_shared_is_one_clear_error(name):
    with HostMirror(*SHAPE, shared_name=name) as mirror:
        assert mirror.created
        with pytest.raises(
            FmsimError, match="30,000 bytes were created by another process, 36,000 are needed"
        ):
            HostMirror(2, 6, 3000, shared_name=name)
    free_gib = (
        os.statvfs(module.SHARED_ROOT).f_bavail * os.statvfs(module.SHARED_ROOT).f_frsize / 2**30
    )
    with pytest.raises(FmsimError, match=r"GiB more than the .* that are free in /dev/shm"):
        HostMirror(1, int(free_gib) + 100, 2**30, shared_name=name)
    assert not path_of(name).exists()
    with pytest.raises(FmsimError, match="letters, digits"):
        HostMirror(*SHAPE, shared_name="../elsewhere")
    with pytest.raises(FmsimError, match="nothing to hold"):
        HostMirror(2, 0, 64, shared_name=name)


@shared
def test_a_forked_child_does_not_take_the_name_away(name):
    mirror = HostMirror(*SHAPE, shared_name=name)
    child = os.fork()
    if child == 0:
        mirror.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0 and path_of(name).exists()
    mirror.close()
    assert not path_of(name).exists()


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: nothing can be pinned for one"
)
def test_two_processes_pin_one_mirror_and_read_it_from_their_gpus(name):
    mirror = HostMirror(*SHAPE, device="cuda", shared_name=name)
    assert mirror.pages.is_pinned()
    mirror[1][2].copy_(torch.arange(3000) % 251)
    other = Other(name, "cuda")
    assert other.told("go") == "up" and other.answer() == "False"
    assert other.told(
        "mirror.pages.is_pinned(), mirror[1][2].cuda(non_blocking=True).sum().item()"
    ) == str((True, int((torch.arange(3000) % 251).sum())))
    other.told("mirror[0][0].copy_(torch.full((3000,), 5, device='cuda')).sum().item()")
    assert mirror[0][0].cuda().unique().tolist() == [5]
    assert other.end()[0] == 0
    mirror.close()
    assert not mirror.pages.is_pinned() and not path_of(name).exists()
