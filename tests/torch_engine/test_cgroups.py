"""A container's limits are the machine: threads beyond them are throttled, memory beyond them is killed."""

from pathlib import Path

import pytest

from gpu_worker.torch_engine.cgroups import allowed_cores, free_bytes, parse_memberships, parse_mounts

MIB = 1 << 20
V2_MOUNT = "31 23 0:28 {root} {at} rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "35 31 0:32 {root} {at} rw,relatime master:9 - cgroup cgroup rw,{controllers}\n"
OTHER_MOUNTS = (
    "23 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n32 31 0:29 / /sys/fs/cgroup ro,relatime - tmpfs tmpfs ro,mode=755\n"
)


def write(group: Path, **files: str) -> None:
    """Files of a group; `_` stands for the dot."""
    group.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (group / name.replace("_", ".", 1)).write_text(text + "\n")


def process(directory: Path, cgroup: str, *mounts: str) -> Path:
    made = directory / "proc"
    made.mkdir(exist_ok=True)
    (made / "cgroup").write_text(cgroup)
    (made / "mountinfo").write_text(OTHER_MOUNTS + "".join(mounts))
    return made


def v2(tmp_path: Path, path: str, *, root: str = "/") -> Path:
    return process(tmp_path, f"0::{path}\n", V2_MOUNT.format(root=root, at=tmp_path / "v2"))


def v1(tmp_path: Path, path: str, *, root: str = "/") -> Path:
    """cpu and cpuacct are mounted together, as they often are."""
    cgroup = f"9:name=systemd:/\n4:memory:{path}\n2:cpu,cpuacct:{path}\n0::/\n"
    return process(
        tmp_path,
        cgroup,
        V1_MOUNT.format(root=root, at=tmp_path / "cpu,cpuacct", controllers="cpu,cpuacct"),
        V1_MOUNT.format(root=root, at=tmp_path / "memory", controllers="memory"),
        V2_MOUNT.format(root="/", at=tmp_path / "unified"),
    )


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("max 100000", None),
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("5000 100000", 1),
        ("50000 20000", 3),
        ("", None),
    ],
)
def test_a_quota_is_so_many_cores_rounded_up(tmp_path: Path, text: str, cores: int | None) -> None:
    write(tmp_path / "v2" / "work", cpu_max=text)

    assert allowed_cores(v2(tmp_path, "/work")) == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", None), ("150000", 2), ("400000", 4)])
def test_version_1_says_quota_and_period_in_two_files(tmp_path: Path, quota: str, cores: int | None) -> None:
    write(tmp_path / "cpu,cpuacct" / "work", cpu_cfs_quota_us=quota, cpu_cfs_period_us="100000")

    assert allowed_cores(v1(tmp_path, "/work")) == cores


def test_every_group_on_the_way_up_bounds_too(tmp_path: Path) -> None:
    """A pod bounds its containers, a slice its services."""
    write(tmp_path / "v2", cpu_max="100000 100000")  # read also at the top: in a container that is a group like others
    write(tmp_path / "v2/pod", cpu_max="300000 100000", memory_max=str(900 * MIB), memory_current=str(800 * MIB))
    write(tmp_path / "v2/pod/one", cpu_max="max 100000", memory_max=str(500 * MIB), memory_current=str(100 * MIB))
    write(tmp_path / "v2/other", memory_max="1")

    found = v2(tmp_path, "/pod/one")

    assert allowed_cores(found) == 1
    assert free_bytes(found) == 100 * MIB


@pytest.mark.parametrize("version", [v1, v2])
@pytest.mark.parametrize(
    ("path", "root"),
    [
        ("/", "/"),  # a container with a namespace of its own
        ("/docker/1a2b", "/docker/1a2b"),  # one without: the host's path, and its own group mounted
        ("/docker/1a2b", "/"),  # ... and of a path that it does not see
        ("/../../slice", "/"),  # outside of the namespace
        ("/elsewhere", "/docker/1a2b"),
    ],
)
def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path, version, path: str, root: str) -> None:
    write(tmp_path / "v2", cpu_max="200000 100000", memory_max=str(64 * MIB))
    write(tmp_path / "cpu,cpuacct", cpu_cfs_quota_us="200000", cpu_cfs_period_us="100000")
    write(tmp_path / "memory", memory_limit_in_bytes=str(64 * MIB))

    found = version(tmp_path, path, root=root)

    assert allowed_cores(found) == 2
    assert free_bytes(found) == 64 * MIB


def test_a_group_below_what_is_mounted_is_found(tmp_path: Path) -> None:
    write(tmp_path / "v2" / "inner", cpu_max="200000 100000")
    write(tmp_path / "v2", cpu_max="400000 100000")

    assert allowed_cores(v2(tmp_path, "/docker/1a2b/inner", root="/docker/1a2b")) == 2


def test_pages_of_idle_files_count_as_free(tmp_path: Path) -> None:
    """The weights were just read: the whole file may lie in the cache of the container."""
    stat = f"anon 1\ninactive_file {60 * MIB}\nactive_file {30 * MIB}"
    write(tmp_path / "v2/a", memory_max=str(100 * MIB), memory_current=str(95 * MIB), memory_stat=stat)
    old = f"inactive_file 7\ntotal_inactive_file {60 * MIB}"
    one = {"memory_limit_in_bytes": str(100 * MIB), "memory_usage_in_bytes": str(95 * MIB), "memory_stat": old}
    write(tmp_path / "memory/a", **one)

    assert free_bytes(v2(tmp_path, "/a")) == 65 * MIB
    assert free_bytes(v1(tmp_path, "/a")) == 65 * MIB


def test_a_full_group_has_nothing_left(tmp_path: Path) -> None:
    write(tmp_path / "v2/a", memory_max="1000", memory_current="2000", memory_stat="")

    assert free_bytes(v2(tmp_path, "/a")) == 0


def test_no_limit_is_none(tmp_path: Path) -> None:
    write(tmp_path / "v2/a", memory_max="max", memory_current="5", cpu_max="max 100000")

    assert free_bytes(v2(tmp_path, "/a")) is None
    assert allowed_cores(v2(tmp_path, "/a")) is None
    assert free_bytes(v2(tmp_path, "/gone")) is None


@pytest.mark.parametrize(
    ("cgroup", "mounts"),
    [("", ""), ("nonsense\n", ""), ("0::/\n", "1 2 3\n"), ("0::/a\n", " - \n"), ("0::/a\n", "1 - cgroup2\n")],
)
def test_what_cannot_be_read_bounds_nothing(tmp_path: Path, cgroup: str, mounts: str) -> None:
    assert free_bytes(process(tmp_path, cgroup, mounts)) is None
    assert allowed_cores(process(tmp_path, cgroup, mounts)) is None
    assert allowed_cores(tmp_path / "no such process") is None


def test_names_with_blanks_and_colons_are_read() -> None:
    mounts = parse_mounts(V2_MOUNT.format(root=r"/a\040b", at=r"/sys/fs/c\134group"))

    assert [(mount.root, str(mount.at)) for mount in mounts] == [("/a b", r"/sys/fs/c\group")]
    assert parse_memberships("0::/a:b\n4:cpu,cpuacct:/c\n") == {"": "/a:b", "cpu": "/c", "cpuacct": "/c"}
