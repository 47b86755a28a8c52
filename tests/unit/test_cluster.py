"""Cluster files: every figure is there, within bounds, and says where it is from."""

from __future__ import annotations

import re

import pytest

from dsmoe_vl.errors import ConfigError
from dsmoe_vl.parallel.device import _PEAK_FLOPS_BF16
from dsmoe_vl.planner.cluster import FIGURES, SHIPPED, cluster_of, load_cluster, sources, write_cluster

NAMES = sorted(path.stem for path in SHIPPED.glob("*.toml"))


@pytest.mark.parametrize("name", NAMES)
def test_shipped_files_are_whole(name):
    cluster, found = cluster_of(name), sources(SHIPPED / f"{name}.toml")
    assert set(found) == set(FIGURES) and all(len(text) > 10 for text in found.values())
    assert cluster.product_rate <= cluster.peak_flops and cluster.network_rate <= cluster.link_rate


def test_five_kinds_of_gpu_are_shipped_and_agree_with_the_trainer():
    assert {"a100", "h100", "h200", "b200", "mi300x"} <= set(NAMES)
    for words, peak in _PEAK_FLOPS_BF16:
        if len(words) == 1 and words[0].lower() in NAMES:
            assert cluster_of(words[0].lower()).peak_flops == pytest.approx(peak, rel=0.001)


def test_a_written_file_reads_back(tmp_path):
    cluster, file = cluster_of("h100"), tmp_path / "own.toml"
    file.write_text(write_cluster(cluster, dict.fromkeys(FIGURES, "measured here")))
    assert load_cluster(file) == cluster


@pytest.mark.parametrize(
    ("pattern", "line", "message"),
    [
        (
            r"^link_bandwidth.*$",
            "",
            r"link_bandwidth in .*own\.toml: missing. Add it as in the files of launch/clusters",
        ),
        (r"^link_bandwidth", "link_bandwith", r"link_bandwith in .* is no figure.*Did you mean \"link_bandwidth\"\?"),
        (r"^link_share.*$", "link_share = 0.8", r"link_share in .* must be \{ value = NUMBER, source"),
        (r"^link_share.*$", 'link_share = { value = 0.8, source = " " }', "link_share in .* must be"),
        (r"^link_share.*$", 'link_share = { value = "x", source = "y" }', "link_share = 'x' in .* must be a number"),
        (r"^link_share.*$", 'link_share = { value = 8, source = "y" }', r"link_share = 8\.0 in .* must be at most 1"),
        (
            r"^memory_bytes.*$",
            'memory_bytes = { value = nan, source = "y" }',
            "memory_bytes = nan in .* must be a number",
        ),
        (
            r"^accelerators.*$",
            'accelerators = { value = 0, source = "y" }',
            "accelerators = 0 in .* must be at least 1",
        ),
        (r"^device.*$", 'device = "tpu"', "device = 'tpu' in .* must be"),
        (r"^device.*$", "[", "is not valid TOML"),
    ],
)
def test_a_wrong_file_is_named_with_the_fix(tmp_path, pattern, line, message):
    file = tmp_path / "own.toml"
    file.write_text(re.sub(pattern, line, (SHIPPED / "h200.toml").read_text(), count=1, flags=re.MULTILINE))
    with pytest.raises(ConfigError, match=message):
        load_cluster(file)


def test_unknown_names():
    with pytest.raises(ConfigError, match=r"--gpu h20: .* Did you mean \"h200\"\?"):
        cluster_of("h20")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_cluster(SHIPPED / "none.toml")
