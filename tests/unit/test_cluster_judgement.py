"""The judgement of made-up clusters: facts of all hosts to findings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dsmoe_vl.config.deepspeed_json import load_deepspeed
from dsmoe_vl.config.load import load_recipe
from dsmoe_vl.data.copies import Copy
from dsmoe_vl.doctor.cluster.between_hosts import judge, judge_plan
from dsmoe_vl.doctor.cluster.findings import Finding, as_list, status
from dsmoe_vl.doctor.cluster.host_facts import Accelerator, HostFacts, Interface, SourceRate, Space
from dsmoe_vl.planner.resolve import resolve

ROOT = Path(__file__).parents[2]
GIB = 2**30
HEALTHY = HostFacts(
    "node-1",
    versions={"python": "3.12.1", "torch": "2.13.0", "deepspeed": "0.19.8", "dsmoe_vl": "abc", "compiler": "g++ 13"},
    repository="/srv/dsmoe_vl",
    python="/srv/dsmoe_vl/.venv/bin/python",
    accelerators=(),
    cores=8,
    memory=(60 * GIB, 64 * GIB),
    shm=Space("/dev/shm", "/dev/shm", 30 * GIB, 32 * GIB),
    run_folder=Space("runs/x", "/srv", 500 * GIB, 1000 * GIB),
    run_folder_id="/srv 2 7",
    open_files=(1048576, -1),
    interfaces=(Interface("lo", True, ("127.0.0.1",), 0), Interface("eth0", True, ("10.0.0.1",), 25000)),
    own_address="10.0.0.1",
    clock=1000.0,
    heard=1000.0,
    copy_rate=8e9,
    matrix_rate=1e12,
    sources=(SourceRate("images", 2.0, 1e9, 5e4, 100.0), SourceRate("videos", 1.0, 1e9, 1e6, 400.0)),
    copy=Copy("node-1", {"tokenizer t": "11", "data.sources, images: a": "22"}, ()),
)


@pytest.fixture(scope="module")
def plan():
    recipe = load_recipe(ROOT / "launch/recipes/quickstart.toml")
    json = load_deepspeed(ROOT / "ds_configs/moe.json")
    return resolve(recipe, json, 4, device="cpu", bf16_unit=True)


def cluster(count=2, **first):
    """Hosts alike, of which the first has other facts."""
    hosts = [
        replace(HEALTHY, host=f"node-{number}", copy=replace(HEALTHY.copy, who=f"node-{number}"))
        for number in range(1, count + 1)
    ]
    return [replace(hosts[0], **first), *hosts[1:]]


def findings(facts, plan, ranks=2):
    return list(judge(facts, {one.host: ranks for one in facts}, plan))


def bad(facts, plan, ranks=2):
    return [one for one in findings(facts, plan, ranks) if one.level != "ok"]


def only(facts, plan, level, check, *words, host="node-1", ranks=2):
    """There is one finding that is not ok, and it is this one."""
    [finding] = bad(facts, plan, ranks)
    assert (finding.level, finding.check, finding.host) == (level, check, host), finding
    for word in words:
        assert word in finding.text + " " + finding.fix, finding
    assert finding.fix, finding


def test_a_healthy_cluster(plan):
    assert bad(cluster(3), plan) == []
    checks = {finding.check for finding in findings(cluster(3), plan)}
    assert {"versions", "clock", "data", "memory", "/dev/shm", "run folder", "open files", "storage"} <= checks


@pytest.mark.parametrize("name", ["python", "torch", "deepspeed", "dsmoe_vl"])
def test_a_version_that_differs_on_one_host(plan, name):
    facts = cluster(3, versions={**HEALTHY.versions, name: "other"})
    only(facts, plan, "problem", "versions", "other", HEALTHY.versions[name], "on node-2")


def test_a_compiler_that_differs_is_a_warning(plan):
    only(cluster(3, versions={**HEALTHY.versions, "compiler": "g++ 9"}), plan, "warning", "versions", "g++ 9", "g++ 13")


def test_a_package_that_one_host_lacks(plan):
    versions = {name: version for name, version in HEALTHY.versions.items() if name != "deepspeed"}
    only(cluster(3, versions=versions), plan, "problem", "versions", "deepspeed is none", "0.19.8")


def test_no_compiler_anywhere(plan):
    versions = {name: version for name, version in HEALTHY.versions.items() if name != "compiler"}
    facts = [replace(one, versions=versions) for one in cluster()]
    only(facts, plan, "problem", "versions", "no C++ compiler", "install g++")


def test_another_place_of_the_repository(plan):
    only(cluster(3, repository="/home/dsmoe_vl"), plan, "problem", "paths", "/home/dsmoe_vl", "/srv/dsmoe_vl")


@pytest.mark.parametrize(("seconds", "level"), [(10.0, "problem"), (-10.0, "problem"), (2.0, "warning")])
def test_a_clock_that_is_wrong(plan, seconds, level):
    word = "ahead of" if seconds > 0 else "behind"
    only(cluster(3, clock=1000.0 + seconds), plan, level, "clock", f"{abs(seconds):.1f} s {word}")


def test_clocks_that_all_differ_from_the_judge_s_alike(plan):
    assert bad([replace(one, clock=one.clock - 60) for one in cluster(3)], plan) == []


def test_another_tokenizer(plan):
    copy = Copy("node-1", {**HEALTHY.copy.hashes, "tokenizer t": "99"}, ())
    [finding] = bad(cluster(3, copy=copy), plan)
    assert (finding.level, finding.host, finding.check) == ("problem", "node-1", "data")
    assert "tokenizer t is another on node-1" in finding.text and "copy it" in finding.text


def test_data_that_cannot_be_read(plan):
    copy = Copy("node-1", {"tokenizer t": "11"}, ("data.sources, images: a: no such folder; check it",))
    [finding] = bad(cluster(copy=copy), plan)
    assert finding.level == "problem" and "data.sources, images: a: no such folder" in finding.text


def test_a_small_dev_shm(plan):
    small = Space("/dev/shm", "/dev/shm", 64 * 2**20, 64 * 2**20)
    only(cluster(shm=small), plan, "problem", "/dev/shm", "0.06 GiB", "132 MiB", "--shm-size")
    tight = replace(small, free=200 * 2**20)
    only(cluster(shm=tight), plan, "warning", "/dev/shm", "--shm-size")


def test_too_little_memory(plan):
    only(cluster(memory=(GIB // 100, 64 * GIB)), plan, "problem", "memory", "0.01 GiB free")


def test_a_full_disk(plan):
    only(cluster(run_folder=replace(HEALTHY.run_folder, free=1000)), plan, "problem", "run folder", "run.directory")


def test_a_run_folder_that_cannot_be_written(plan):
    folder = replace(HEALTHY.run_folder, writable=False)
    only(cluster(run_folder=folder), plan, "problem", "run folder", "/srv cannot be written")


def test_a_run_folder_of_its_own(plan):
    only(cluster(3, run_folder_id="/srv 2 9"), plan, "warning", "run folder", "another one than on node-2")


def test_few_open_files(plan):
    only(cluster(open_files=(256, 4096)), plan, "problem", "open files", "limit 256", "ulimit -n")
    only(cluster(open_files=(256, 300)), plan, "problem", "open files", "limits.conf")


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("GLOO_SOCKET_IFNAME", "eth1", ("eth1 does not exist", "lo, eth0")),
        ("GLOO_SOCKET_IFNAME", "eth", ("eth does not exist",)),
        ("NCCL_SOCKET_IFNAME", "ib", ("ib does not exist",)),
        ("NCCL_SOCKET_IFNAME", "=eth", ("=eth does not exist",)),
    ],
)
def test_a_missing_interface(plan, variable, value, words):
    only(cluster(environment={variable: value}), plan, "problem", "interfaces", f"{variable}={value}", *words)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("GLOO_SOCKET_IFNAME", "eth0"), ("NCCL_SOCKET_IFNAME", "eth"), ("NCCL_SOCKET_IFNAME", "^docker,veth")],
)
def test_an_interface_that_is_there(plan, variable, value):
    assert bad(cluster(environment={variable: value}), plan) == []


def test_an_interface_that_is_down(plan):
    interfaces = (HEALTHY.interfaces[0], replace(HEALTHY.interfaces[1], up=False))
    facts = cluster(interfaces=interfaces, environment={"GLOO_SOCKET_IFNAME": "eth0"})
    only(facts, plan, "problem", "interfaces", "is down or has no address")


def test_a_name_that_means_loopback(plan):
    only(cluster(own_address="127.0.1.1"), plan, "problem", "own address", "GLOO_SOCKET_IFNAME=eth0")
    assert bad(cluster(1, own_address="127.0.1.1"), plan) == []


def test_a_port_in_use(plan):
    facts = cluster(port_in_use=True, environment={"MASTER_PORT": "29511"})
    only(facts, plan, "problem", "port", "29511 is in use", "--master_port")
    assert bad(facts[::-1], plan) == []  # it is in use on another host than the first


def test_ranks_without_gpus(plan):
    gpu = Accelerator("H100", 80 * GIB, 79 * GIB)
    facts = [replace(one, device="cuda", accelerators=(gpu,)) for one in cluster()]
    found = bad(facts, plan)
    assert [one.check for one in found] == ["accelerators"] * 2 and "2 ranks, but 1 GPUs: H100" in found[0].text


def test_a_gpu_that_something_else_uses(plan):
    gpu = Accelerator("H100", 80 * GIB, 79 * GIB)
    facts = [replace(one, device="cuda", accelerators=(gpu, gpu)) for one in cluster()]
    facts[0] = replace(facts[0], accelerators=(gpu, replace(gpu, free=40 * GIB)))
    only(facts, plan, "warning", "accelerators", "GPU 1 has 40.00 GiB free")
    facts[0] = replace(facts[0], accelerators=(gpu, replace(gpu, free=1000)))
    only(facts, plan, "problem", "accelerators", "GPU 1 has 0.00 GiB free")


def test_a_host_with_other_gpus(plan):
    h100, a100 = Accelerator("H100", GIB, GIB), Accelerator("A100", GIB, GIB)
    facts = [replace(one, device="cuda", accelerators=(h100, h100)) for one in cluster(3)]
    facts[0] = replace(facts[0], accelerators=(a100, a100))
    only(facts, plan, "warning", "accelerators", "cuda A100", "cuda H100 on node-2")


def test_slow_storage(plan):
    slow = tuple(replace(one, bytes_per_second=1e3) for one in HEALTHY.sources)
    only(cluster(sources=slow), plan, "problem", "storage", "reads 1.0 kB/s", "copy the shards")
    unknown = tuple(replace(one, sample_tokens=0.0) for one in HEALTHY.sources)
    [finding] = bad(cluster(sources=unknown), plan)
    assert (finding.level, finding.check) == ("warning", "storage") and "not checked" in finding.text


@pytest.mark.parametrize(
    "part", ["versions", "accelerators", "memory", "shm", "run_folder", "interfaces", "copy", "sources"]
)
def test_what_could_not_be_gathered_is_said(plan, part):
    facts = cluster(**{part: None}, unknown={part: "no answer within 10 s"})
    [finding] = bad(facts, plan)
    assert (finding.level, finding.host) == ("warning", "node-1")
    assert finding.text == "not checked: no answer within 10 s"


def test_without_a_plan_hosts_are_judged_all_the_same():
    found = bad(cluster(open_files=(10, 20)), None)
    assert [(one.level, one.check) for one in found if one.check != "storage"] == [("problem", "open files")]
    assert "there is no plan" in next(one.text for one in found if one.check == "storage")


def test_a_recipe_that_does_not_fit_the_world_size():
    recipe = load_recipe(ROOT / "launch/recipes/quickstart.toml")
    json = load_deepspeed(ROOT / "ds_configs/moe.json")

    def make():
        return resolve(recipe, {**json, "train_batch_size": 7}, 4, device="cpu", bf16_unit=True)

    plan, found = judge_plan(make, 4)
    assert plan is None and [one.level for one in found] == ["problem"] and "train_batch_size = 7" in found[0].text


def test_facts_survive_their_journey():
    facts = replace(HEALTHY, accelerators=(Accelerator("H100", 2, 1),), infiniband=(200.0,), unknown={"x": "y"})
    assert HostFacts.from_json(facts.to_json()) == facts
    bare = HostFacts("a")
    assert HostFacts.from_json(bare.to_json()) == bare


def test_the_list():
    found = [
        Finding("ok", "node-2", "memory", "enough"),
        Finding("problem", "", "recipe", "is \x1b[2Jwrong"),
        Finding("problem", "node-2", "ssh", "no", "do this"),
        Finding("warning", "node-10", "clock", "late"),
    ]
    plain = as_list(found, colours=False)
    assert plain.splitlines() == [
        "all hosts",
        "  problem  recipe  is \\x1b[2Jwrong",
        "node-2",
        "  ok       memory  enough",
        "  problem  ssh     no",
        "                   fix: do this",
        "node-10",
        "  warning  clock   late",
        "1 ok, 1 warning, 2 problems",
    ]
    assert "\x1b[31mproblem\x1b[0m" in as_list(found, colours=True)
    assert status(found) == 1 and status(found[:1]) == 0 and status(found[3:]) == 0
