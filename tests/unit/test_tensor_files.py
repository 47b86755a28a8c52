"""Our writer of safetensors files against the library's reader, and reading by ranges."""

from __future__ import annotations

import os
import weakref

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file

from dsmoe_vl.checkpoint import tensor_files
from dsmoe_vl.checkpoint.optimizer_files import OptimizerFiles, Piece, write_index
from dsmoe_vl.checkpoint.optimizer_state import Range
from dsmoe_vl.checkpoint.tensor_files import Share, TensorFiles, file_entry, write_tensors
from dsmoe_vl.checkpoint.weights_file import INDEX_NAME, WeightsFile
from dsmoe_vl.errors import CheckpointError


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(7, 5, 3, generator=generator),
        "half": torch.randn(11, 2, generator=generator).bfloat16(),
        "transposed": torch.randn(4, 6, generator=generator).t(),
        "nothing": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "counts": torch.arange(9),
        "bytes": torch.randint(0, 256, (33,), dtype=torch.uint8, generator=generator),
        "flags": torch.tensor([True, False]),
    }


def test_the_library_reads_what_was_written(tmp_path):
    file = tmp_path / "a.safetensors"
    written = write_tensors(file, Share.of(tensors()))
    read = load_file(file)
    assert read.keys() == tensors().keys()
    assert all(read[name].equal(value) and read[name].dtype == value.dtype for name, value in tensors().items())
    content = file.read_bytes()
    assert written.entry == (len(content), blake3(content).hexdigest()) == file_entry(file)
    assert written.broken is None


def test_values_that_are_not_finite_are_named(tmp_path):
    broken = {"good": torch.ones(3), "bad": torch.tensor([1.0, float("inf")]), "worse": torch.tensor([float("nan")])}
    assert write_tensors(tmp_path / "a.safetensors", Share.of(broken)).broken == "bad"


def test_values_whose_sum_overflows_are_finite(tmp_path):
    largest = torch.finfo(torch.float32).max
    large = {"large": torch.full((8,), largest), "half": torch.full((8,), 3e38).bfloat16(), "empty": torch.empty(0)}
    assert write_tensors(tmp_path / "a.safetensors", Share.of(large)).broken is None


def test_copies_are_freed_one_by_one():
    share = Share.of({"a": torch.ones(3), "b": torch.ones(3)}).kept()
    taken = [weakref.ref(value) for value in share.tensors]
    assert len(taken) == 2 and all(of() is None for of in taken)


def test_all_tensors_are_made_when_the_disk_refuses(tmp_path):
    made = []

    def make():
        for number in range(3):
            made.append(number)
            yield torch.ones(2)

    share = Share.of({str(number): torch.ones(2) for number in range(3)})
    with pytest.raises(OSError, match="missing"):
        write_tensors(tmp_path / "missing" / "a.safetensors", share._replace(parts=make()))
    assert made == [0, 1, 2]


@pytest.mark.parametrize("name", ["a", "half", "scalar", "counts", "bytes"])
def test_ranges(tmp_path, name):
    write_tensors(tmp_path / "a.safetensors", Share.of(tensors()))
    files, whole = TensorFiles(tmp_path), tensors()[name].reshape(-1)
    for start in range(len(whole)):
        for stop in range(start, len(whole) + 1):
            assert files.flat("a.safetensors", name, start, stop).equal(whole[start:stop])


def test_fill_another_type(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "_CHUNK", 8)  # several chunks, the last one shorter
    write_tensors(tmp_path / "a.safetensors", Share.of(tensors()))
    files, whole = TensorFiles(tmp_path), tensors()["half"].reshape(-1)
    into = torch.zeros(20)
    files.fill("a.safetensors", "half", 1, into)
    assert into.equal(whole[1:21].float())


@pytest.mark.parametrize(("start", "count"), [(-1, 3), (100, 6), (105, 1)])
def test_elements_that_are_not_there(tmp_path, start, count):
    write_tensors(tmp_path / "a.safetensors", Share.of(tensors()))
    with pytest.raises(ValueError, match="a has 105 elements"):
        TensorFiles(tmp_path).fill("a.safetensors", "a", start, torch.zeros(count))


def test_a_file_that_is_cut_short_while_it_is_open(tmp_path):
    file = tmp_path / "a.safetensors"
    write_tensors(file, Share.of({"a": torch.ones(1000)}))
    files = TensorFiles(tmp_path)
    files.keys(file.name)
    os.truncate(file, 2000)
    with pytest.raises(EOFError, match="ends too early"):
        files.fill(file.name, "a", 0, torch.zeros(1000))


def test_ranges_of_experts_that_are_stored_one_by_one(tmp_path):
    stacked = torch.arange(4 * 2 * 3).float().view(4, 2, 3)
    weights = WeightsFile(tmp_path)
    weights.save({"layers.1.feed_forward.experts.w1": stacked, "norm.weight": torch.ones(3)})
    assert sorted(weights.places) == [*(f"layers.1.feed_forward.experts.{n}.w1" for n in range(4)), "norm.weight"]
    assert weights.shapes() == {"layers.1.feed_forward.experts.w1": [4, 2, 3], "norm.weight": [3]}
    assert weights.load()["layers.1.feed_forward.experts.w1"].equal(stacked)
    for start in range(24):
        for stop in range(start + 1, 25):
            found = weights.flat("layers.1.feed_forward.experts.w1", start, stop)
            assert found.equal(stacked.view(-1)[start:stop])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {"a": "../a.b"}}', '{"weight_map": {"a": 1}}'])
def test_an_index_of_weights_that_is_none(tmp_path, text):
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(CheckpointError, match="is not an index of weights"):
        WeightsFile(tmp_path).load()


def test_pieces_of_any_cut(tmp_path):
    """Two ranks that cut a tensor at 10; a reader wants any range of it. In fp32 the weights are the masters."""
    moment, weight = torch.randn(6, 4), torch.randn(6, 4)
    cuts = {"one": (0, 10), "two": (10, 24)}
    for file, (start, stop) in cuts.items():
        write_tensors(tmp_path / file, Share.of({f"exp_avg/layer.weight/{start}": moment.view(-1)[start:stop]}))
    write_index(tmp_path, {file: [Piece("layer.weight", *cut, 7)] for file, cut in cuts.items()})
    WeightsFile(tmp_path).save({"layer.weight": weight})
    files = OptimizerFiles(tmp_path)
    assert files.updates == {"layer.weight": 7}
    for start, stop in [(0, 24), (3, 7), (8, 12), (10, 24), (23, 24)]:
        views = {"master": torch.zeros(stop - start), "exp_avg": torch.zeros(stop - start)}
        files.fill(Range("layer.weight", start, stop, views, None))
        assert views["master"].equal(weight.view(-1)[start:stop])
        assert views["exp_avg"].equal(moment.view(-1)[start:stop])
    with pytest.raises(CheckpointError, match=r"lacks elements 24 to 30 of layer\.weight"):
        files.fill(Range("layer.weight", 20, 30, {"exp_avg": torch.zeros(10)}, None))
