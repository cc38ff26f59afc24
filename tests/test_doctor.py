"""What `doctor` and `measure_rates` find out about a machine, and how they say it."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hookoffload import doctor, host_memory, machine, measure_rates
from hookoffload.cli import main
from hookoffload.doctor import Findings, format_findings
from hookoffload.machine import DiskSpeed, LinkSpeed, Lockable
from hookoffload.measured_rates import kept_rates
from tests.test_cli import error_of

MIB = 2**20
GIB = 2**30
LINK = LinkSpeed(
    device="cuda:0",
    locked_bytes_per_second=50.0 * GIB,
    plain_bytes_per_second=10.0 * GIB,
)
DISK = DiskSpeed(
    folder="/data",
    bytes_per_second=2.0 * GIB,
    cached_bytes_per_second=8.0 * GIB,
    cold=True,
    read_bytes=GIB,
)
LOCKABLE = Lockable(nbytes=90 * GIB, why="nine tenths", ulimit_bytes=8 * MIB)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file: what is measured is not what these tests are about."""
    monkeypatch.setattr(machine, "_DISK_BYTES", 32 * MIB)
    monkeypatch.setattr(machine, "_PIECE_BYTES", 4 * MIB)
    monkeypatch.setattr(machine, "_DISK_SECONDS", 1.0)


def findings(**fields: Any) -> Findings:
    link, disk = fields.get("link", LINK), fields.get("disk", DISK)
    locked = fields.get("lockable", LOCKABLE)
    known: dict[str, Any] = {
        "versions": {"torch": "2.9", "cuda": None},
        "devices": [
            {
                "device": "cuda:0",
                "name": "A GPU",
                "memory_bytes": 80 * GIB,
                "free_bytes": 79 * GIB,
            }
        ],
        "cpu_cores": 16,
        "ram_bytes": 128 * GIB,
        "available_bytes": 100 * GIB,
        "link": link,
        "disk": disk,
        "lockable": locked,
        "advice": doctor._advice(link, disk, locked),
    }
    return Findings(**{**known, **fields})


def text_of(found: Findings, width: int = 80) -> str:
    return " ".join(format_findings(found, width).split())


# -- measuring ----------------------------------------------------------------------


def test_disk_is_measured_with_a_file_that_is_removed(tmp_path: Path) -> None:
    speed = machine.measure_disk(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert speed.read_bytes == 32 * MIB
    assert min(speed.bytes_per_second, speed.cached_bytes_per_second) > 0
    assert speed.folder == str(tmp_path)


def test_disk_that_is_slow_is_measured_with_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_DISK_SECONDS", 0.2)
    monkeypatch.setattr(os, "fsync", lambda _fd: time.sleep(0.09))
    # Three pieces of the eight; fewer where the machine itself is slow.
    assert machine.measure_disk(tmp_path).read_bytes in (4 * MIB, 8 * MIB, 12 * MIB)


def test_page_cache_that_keeps_the_file_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if machine.measure_disk(tmp_path).cold is None:
        pytest.skip("this file system does not tell what is in the page cache")
    monkeypatch.setattr(os, "posix_fadvise", lambda *_args: None)
    assert machine.measure_disk(tmp_path).cold is False


def test_system_that_does_not_tell_what_is_cached_is_not_guessed_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)
    assert machine.measure_disk(tmp_path).cold is None
    monkeypatch.delattr(os, "posix_fadvise")
    assert machine.measure_disk(tmp_path).cold is None


def test_disk_without_room_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(tmp_path)
    full = os.statvfs_result((*real[:4], 8, *real[5:]))
    monkeypatch.setattr(os, "statvfs", lambda _path: full)
    with pytest.raises(OSError, match="are free there") as refused:
        machine.measure_disk(tmp_path)
    assert refused.value.errno == errno.ENOSPC


def test_file_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(10 * MIB + 5))
    assert machine.measure_file(path) > 0


def test_cpu_has_no_link_and_a_disk_only_where_a_folder_is_named(
    tmp_path: Path,
) -> None:
    assert machine.measure_link(torch.device("cpu")) is None
    rates = measure_rates("cpu")
    assert rates.link_bytes_per_second is rates.disk_bytes_per_second is None
    rates = measure_rates("cpu", tmp_path)
    assert rates.disk_bytes_per_second is not None
    assert rates.compute_seconds is None


@pytest.mark.gpu
def test_link_is_measured_with_memory_that_is_given_back() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    before = torch.cuda.memory_allocated()
    speed = machine.measure_link(device)
    assert speed is not None
    assert speed.device == str(device)
    assert speed.locked_bytes_per_second is not None
    assert speed.locked_bytes_per_second > GIB
    assert torch.cuda.memory_allocated() == before
    assert machine.devices()[0]["device"] == "cuda:0"
    assert machine.lockable(device).nbytes > 0


def test_weights_come_from_plain_memory_where_none_can_be_locked() -> None:
    assert LINK.bytes_per_second == 50 * GIB
    refused = dataclasses.replace(LINK, locked_bytes_per_second=None)
    assert refused.bytes_per_second == 10 * GIB


def test_memory_to_lock_is_the_librarys_own_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert machine.lockable(torch.device("cpu")).nbytes == 0
    cuda = torch.device("cuda")
    monkeypatch.setattr(machine, "cgroup_limit", lambda: None)
    free = machine.lockable(cuda)
    assert free.nbytes == pytest.approx(host_memory.default_cap(), rel=0.2)
    assert "available" in free.why


def test_control_group_that_sets_the_figure_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(
        host_memory, "_CGROUP_LIMITS", (str(limit), str(tmp_path / "no"))
    )
    monkeypatch.setattr(host_memory, "_meminfo", lambda _field: 64 * GIB)
    limit.write_text("max\n")
    assert host_memory.cgroup_limit() is None
    limit.write_text(f"{10 * GIB}\n")
    locked = machine.lockable(torch.device("cuda"))
    assert locked.nbytes == 9 * GIB == host_memory.default_cap()
    assert "control group's limit, 10.0 GiB" in locked.why


@pytest.mark.parametrize(
    ("groups", "limits", "least"),
    [
        ("0::/", {"v2/memory.max": 7}, 7),
        ("0::/jobs/7/step", {"v2/jobs/memory.max": 9, "v2/jobs/7/memory.max": 5}, 5),
        ("0::/jobs/7", {"v2/jobs/memory.max": 3, "v2/jobs/7/memory.max": "max"}, 3),
        ("0::/jobs/7", {"v2/jobs/8/memory.max": 1}, None),
        ("4:cpu,memory:/a:b\n0::/", {"v1/a:b/memory.limit_in_bytes": 2}, 2),
        ("3:cpu:/a\n0::/", {"v1/a/memory.limit_in_bytes": 2}, None),
    ],
)
def test_control_groups_below_the_outermost_are_looked_at(
    groups: str,
    limits: dict[str, object],
    least: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As those of a batch system's job, or of a systemd unit."""
    files = ("v2/memory.max", "v1/memory.limit_in_bytes")
    monkeypatch.setattr(
        host_memory, "_CGROUP_LIMITS", tuple(str(tmp_path / file) for file in files)
    )
    monkeypatch.setattr(host_memory, "_CGROUPS", str(tmp_path / "cgroup"))
    (tmp_path / "cgroup").write_text(f"{groups}\n")
    for name, limit in limits.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{limit}\n")
    assert host_memory.cgroup_limit() == least


# -- saying it ----------------------------------------------------------------------


def test_findings_say_every_figure() -> None:
    text = text_of(findings())
    for said in (
        "torch 2.9, cuda none",
        "16 threads, 128.0 GiB RAM, 100.0 GiB available",
        "cuda:0 A GPU, 80.0 GiB, 79.0 GiB free",
        "50.00 GiB/s from page-locked RAM to cuda:0, 10.00 GiB/s from other memory",
        "2.00 GiB/s in /data; 8.00 GiB/s once the page cache has it",
        "up to 90.0 GiB: nine tenths; ulimit -l is 8 MiB",
    ):
        assert said in text


def test_advice_says_what_a_gib_over_the_limit_costs() -> None:
    text = text_of(findings())
    assert "costs 20 ms a pass from RAM, 500 ms from disk" in text
    assert "Models up to 90.0 GiB" in text
    slow = dataclasses.replace(DISK, bytes_per_second=GIB / 4)
    assert "only for what RAM cannot hold" in text_of(findings(disk=slow))


def test_device_without_page_locked_memory_is_told() -> None:
    refused = dataclasses.replace(LINK, locked_bytes_per_second=None)
    text = text_of(findings(link=refused))
    assert "10.00 GiB/s from other memory; page-locked memory is refused" in text
    assert "refuses page-locked memory" in text


def test_machine_without_a_gpu_gets_advice_of_its_own() -> None:
    none = Lockable(nbytes=0, why="there is none", ulimit_bytes=None)
    text = text_of(findings(link=None, devices=[], lockable=none))
    assert "gpu none" in text
    assert "No GPU: models compute on the CPU" in text
    assert "ulimit -l is unlimited" in text


def test_file_that_stayed_in_the_cache_measures_no_disk() -> None:
    text = text_of(findings(disk=dataclasses.replace(DISK, cold=False)))
    assert "not measured: the page cache would not let go" in text
    assert "from disk" not in text
    unknown = text_of(findings(disk=dataclasses.replace(DISK, cold=None)))
    assert "perhaps from the page cache" in unknown


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_findings_fit_any_terminal(width: int) -> None:
    lines = format_findings(findings(), width).splitlines()
    assert max(map(len, lines)) <= width
    assert text_of(findings(), width) == text_of(findings(), 200)


# -- the command --------------------------------------------------------------------


def test_command_tells_a_person(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    labels = [line.split()[0] for line in out.splitlines() if line[0] != " "]
    for label in ("versions", "cpu", "link", "disk", "page-locking", "advice"):
        assert label in labels
    assert torch.__version__ in out


def test_command_tells_a_program(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--json", f"--disk-dir={tmp_path}"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["disk"]["folder"] == str(tmp_path)
    assert record["disk"]["read_bytes"] == 32 * MIB
    assert record["versions"]["torch"] == torch.__version__
    assert record["available_bytes"] <= record["ram_bytes"]
    assert record["advice"]


def test_rates_are_kept_for_the_next_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "measure_link", lambda _device: LINK)
    assert main(["doctor", f"--disk-dir={tmp_path}"]) == 0
    assert "hookoffload plan predicts seconds" in capsys.readouterr().out
    kept = kept_rates("cuda:1", [tmp_path])
    assert kept is not None
    assert kept.rates.link_bytes_per_second == LINK.locked_bytes_per_second


def test_memory_that_was_measured_for_a_disk_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cached = dataclasses.replace(DISK, folder=str(tmp_path), cold=False)
    assert doctor.keep_findings(findings(disk=cached, link=None))
    assert kept_rates("cpu", [tmp_path]) is None


def test_cache_folder_that_cannot_be_written_does_not_fail_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["doctor", f"--disk-dir={tmp_path}"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "hookoffload plan" not in captured.out


def test_folder_that_is_not_there_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    assert "gone" in error_of(capsys, "doctor", f"--disk-dir={gone}")
    (tmp_path / "file").touch()
    assert "file" in error_of(capsys, "doctor", f"--disk-dir={tmp_path / 'file'}")
