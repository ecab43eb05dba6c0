"""How much host memory there is, by Linux's files; the files of other machines are written out here."""

import psutil
import pytest

from ds_minis.memory.host_memory import available_host_bytes

GIB = 2**30
MEMINFO = (
    "MemTotal:       67108864 kB\nMemFree:         1048576 kB\nMemAvailable:   33554432 kB\nHugePages_Total:       0\n"
)
UNLIMITED = "9223372036854771712"


def group(limit, usage, cache=0, *, version=2):
    if version == 1:
        stat = f"cache 1\ninactive_file 7\ntotal_inactive_file {cache}\n"
        return {"memory.limit_in_bytes": f"{limit}\n", "memory.usage_in_bytes": f"{usage}\n", "memory.stat": stat}
    return {
        "memory.max": f"{limit}\n",
        "memory.current": f"{usage}\n",
        "memory.stat": f"anon 1\ninactive_file {cache}\n",
    }


def available(root, cgroup="", groups=None):
    files = {"proc/meminfo": MEMINFO, "proc/self/cgroup": cgroup}
    for folder, contents in (groups or {}).items():
        files |= {f"sys/fs/cgroup/{folder}/{name}": text for name, text in contents.items()}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return available_host_bytes(root)


V2 = "0::/slice/job\n"
V1 = "9:name=systemd:/\n4:cpu,memory:/docker/abc\n3:cpuset:/\n0::/\n"


@pytest.mark.parametrize(
    ("cgroup", "groups", "gib"),
    [
        ("", {}, 32),
        (V2, {}, 32),
        (V2, {"slice/job": group("max", 5 * GIB)}, 32),
        (V2, {"slice/job": group(100 * GIB, 5 * GIB)}, 32),
        (V2, {"slice/job": group(20 * GIB, 5 * GIB, 2 * GIB)}, 17),
        (V2, {"slice/job": group("max", GIB), "slice": group(20 * GIB, 8 * GIB)}, 12),
        (V2, {"slice/job": group(9 * GIB, GIB), "slice": group(20 * GIB, 8 * GIB)}, 8),
        (V2, {"slice/job": group(9 * GIB, 10 * GIB)}, 0),
        ("0::/\n", {"": group(20 * GIB, 5 * GIB)}, 15),  # a container that sees its own root only
        (V2, {"": group(20 * GIB, 5 * GIB)}, 15),
        (V1, {"memory/docker/abc": group(UNLIMITED, GIB, version=1)}, 32),
        (V1, {"memory/docker/abc": group(20 * GIB, 5 * GIB, 3 * GIB, version=1)}, 18),
        (V1, {"memory": group(20 * GIB, 5 * GIB, version=1)}, 15),
        ("3:cpuset:/a\n", {"memory/a": group(GIB, 0, version=1), "a": group(GIB, 0)}, 32),
    ],
)
def test_the_least_of_the_machine_and_its_cgroups(tmp_path, cgroup, groups, gib):
    assert available(tmp_path, cgroup, groups) == gib * GIB


def test_unknown_where_linux_files_are_not(tmp_path):
    assert available_host_bytes(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1 kB\n")
    assert available_host_bytes(tmp_path) is None


@pytest.mark.skipif(not psutil.LINUX, reason="reads Linux's files")
def test_this_machine():
    assert 0 < available_host_bytes() <= 1.1 * psutil.virtual_memory().available
