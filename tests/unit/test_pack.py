import numpy as np
import pytest
import torch

from dsmoe_vl.config.task_table import task_number
from dsmoe_vl.data.decode import to_patches
from dsmoe_vl.data.pack import Encoded, Packer, PackShape, assemble, collate, encoded, grid_positions
from dsmoe_vl.data.segment import COUNTS, IGNORE, Modality, Picture, Segment
from dsmoe_vl.data.stream import SampleRef
from dsmoe_vl.errors import DataError
from tests.support.tars import picture

SHAPE = PackShape(length=32, patches=48, patch_size=4, merge=2)
WIDE = PackShape(length=40, patches=96, patch_size=4, merge=2)


def segment(length: int, first_token: int = 10, task: int = task_number("caption"), pictures: int = 0) -> Segment:
    """Tokens count up; each picture has 2 x 3 cells, of which the last two share a token; half of it is labelled."""
    tokens = np.arange(first_token, first_token + length, dtype=np.int32)
    labels = np.where(np.arange(length) < length // 2, IGNORE, tokens + 1).astype(np.int32)
    cells = np.array([0, 1, 2, 3, 4, 4], np.int32)
    return Segment(
        task,
        tokens,
        labels,
        np.full(length, Modality.IMAGE, np.int32),
        [
            Picture(to_patches(np.asarray(picture(24, 16, i)), (4, 6), 4, 2), (4, 6), float(i), cells)
            for i in range(pictures)
        ],
    )  # fmt: skip


def pair(identity: int, media_length: int, text_length: int) -> list[Segment]:
    """Both sides of a retrieval pair, the picture as in `segment`."""
    sides = [
        segment(media_length, task=task_number("retrieval"), pictures=1),
        segment(text_length, task=task_number("retrieval")),
    ]
    for side in sides:
        side.labels[:] = IGNORE
        side.pair = identity
    return sides


def summary(importance: list[float], ranked: list[list[int]]) -> Segment:
    """Every frame has 3 cells on 2 tokens, the first two cells on one; then the frame tokens, and two words."""
    frames = len(importance)
    made = segment(3 * frames + 2, task=task_number("summary"))
    made.pictures = [
        Picture(np.zeros((12, 48), np.uint8), (2, 6), 0.5 * i, np.array([0, 0, 1], np.int32) + 2 * i, 2 * frames + i)
        for i in range(frames)
    ]
    made.importance = np.array(importance, np.float32)
    made.ranked = np.array(ranked, np.int32).reshape(-1, 2)
    return made


def counted(**numbers: int) -> dict[str, int]:
    """All counts; those that are not given are 0."""
    return dict.fromkeys(COUNTS, 0) | numbers


def sample(number: int, length: int, patches: int = 0) -> Encoded:
    return Encoded(SampleRef(0, 0, 0, number), str(number), [], length, patches)


def test_assemble_lays_segments_one_after_another() -> None:
    pack = assemble([segment(7, 10, pictures=1), segment(9, 100, task_number("summary"))], SHAPE, ["a", "b"])
    assert pack.tokens.tolist() == [*range(10, 17), *range(100, 109), *[0] * 16]
    assert pack.positions.tolist() == [*range(7), *range(9), *[0] * 16]
    assert pack.real.tolist() == [True] * 16 + [False] * 16
    assert pack.labels.tolist() == [*[IGNORE] * 3, *range(14, 18), *[IGNORE] * 4, *range(105, 110), *[IGNORE] * 16]
    assert pack.task_ids[:16].tolist() == [0] * 7 + [2] * 9
    assert pack.modality_ids.tolist() == [Modality.IMAGE] * 16 + [Modality.TEXT] * 16
    assert (pack.segment_lengths, pack.picture_lengths, pack.keys) == ([7, 9], [24], ["a", "b"])
    assert pack.counts == counted(tokens=16, tokens_image=16, labels=9, caption=4, summary=5)


def test_assemble_places_cells() -> None:
    pack = assemble([segment(6), segment(5, pictures=1), segment(5, pictures=1)], SHAPE)
    assert pack.cell_position.tolist() == [6, 7, 8, 9, 10, 10, 11, 12, 13, 14, 15, 15]
    assert pack.cell_weight.tolist() == [1, 1, 1, 1, 0.5, 0.5] * 2
    assert pack.cell_time.tolist() == [0.0] * 12
    single = assemble([segment(5, pictures=1)], SHAPE)
    assert single.cell_position[6:].tolist() == [SHAPE.length] * 6
    assert single.cell_weight[6:].tolist() == [0] * 6
    assert single.cell_time[6:].tolist() == [-1] * 6
    with_times = segment(5, pictures=2)
    with_times.pictures[1].cell_token = with_times.pictures[1].cell_token * 0
    assert assemble([with_times], SHAPE).cell_time.tolist() == [0.0] * 6 + [1.0] * 6


def test_patch_positions_point_at_the_pixels() -> None:
    image = picture(24, 16)
    pixels = np.asarray(image)
    patches = to_patches(np.asarray(image), (4, 6), 4, 2)
    positions = grid_positions((4, 6), 2)
    assert sorted(map(tuple, positions.tolist())) == [(row, column) for row in range(4) for column in range(6)]
    for patch, (row, column) in zip(patches, positions, strict=True):
        square = pixels[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        np.testing.assert_array_equal(patch.reshape(3, 4, 4).transpose(1, 2, 0), square)


def test_empty_pack_has_no_labels() -> None:
    pack = assemble([], SHAPE)
    assert not pack.real.any()
    assert (pack.labels == IGNORE).all()
    assert set(pack.counts.values()) == {0}
    batch = collate([pack])
    assert batch.cu_segments.tolist() == [0, 32]
    assert batch.cu_pictures.tolist() == [0, 4]
    assert batch.cell_position.tolist() == [32] and batch.cell_weight.tolist() == [0]


def test_collate_offsets_every_index() -> None:
    full = assemble([segment(16, pictures=1), segment(16, 50, pictures=1)], SHAPE, ["a", "b"])
    half = assemble([segment(10, 90, pictures=1)], SHAPE, ["c"])
    batch = collate([full, half])
    assert batch.cu_segments.tolist() == [0, 16, 32, 42, 64]
    assert (batch.cu_segments.dtype, batch.max_segment) == (torch.int32, 22)
    assert batch.cu_pictures.tolist() == [0, 24, 48, 72]
    assert batch.max_picture == 24
    assert batch.tokens.tolist() == [*full.tokens, *half.tokens]
    assert batch.patches.shape == (72, 48)
    assert batch.patch_positions.shape == (72, 2)
    assert batch.cell_position.tolist() == [0, 1, 2, 3, 4, 4, 16, 17, 18, 19, 20, 20, 32, 33, 34, 35, 36, 36]
    assert batch.keys == ["a", "b", "c"]
    assert batch.counts == counted(tokens=42, tokens_image=42, labels=21, caption=21)
    assert batch.real.sum() == 42


def test_collate_without_pictures() -> None:
    batch = collate([assemble([segment(8)], PackShape(8, 16, 4, 2))] * 2)
    assert (batch.cu_pictures.tolist(), batch.max_picture) == ([0, 4], 4)  # one cell, which goes nowhere
    assert (batch.cell_position.tolist(), batch.cell_weight.tolist()) == ([16], [0])
    assert batch.cu_segments.tolist() == [0, 8, 16]


def test_assemble_counts_tokens_by_modality() -> None:
    mixed = segment(6)
    mixed.modality = np.array([1, 1, 2, 2, 2, 0], np.int32)
    counts = assemble([mixed, segment(3)], SHAPE).counts  # padding, which is marked as text, is in none
    assert counts == counted(tokens=9, tokens_text=1, tokens_image=5, tokens_video=3, labels=5, caption=5)


def test_assemble_points_at_the_last_tokens_of_pairs() -> None:
    pack = assemble([segment(6), *pair(77, 5, 4), *pair(2**62, 6, 3)], SHAPE)
    assert pack.media_embedding.tolist() == [10, 20]
    assert pack.text_embedding.tolist() == [14, 23]
    assert pack.pair_ids.tolist() == [77, 2**62]
    assert pack.counts == counted(tokens=24, tokens_image=24, labels=3, caption=3, retrieval=2)
    with pytest.raises(AssertionError, match="lost one side"):
        assemble(pair(1, 5, 4)[:1], SHAPE)


def test_assemble_places_frames() -> None:
    films = [summary([0.9, 0.1], [[0, 1]]), summary([0.2, 0.4, 0.8], [[1, 0], [2, 0], [2, 1]])]
    pack = assemble([segment(4), films[0], segment(3), films[1]], WIDE)
    assert pack.cell_position.tolist() == [4, 4, 5, 6, 6, 7, 15, 15, 16, 17, 17, 18, 19, 19, 20, *[40] * 9]
    assert pack.cell_weight.tolist() == [0.5, 0.5, 1] * 5 + [0] * 9
    assert pack.frame_tokens.tolist() == [8, 9, 21, 22, 23]
    assert pack.cell_frame.tolist() == [8] * 3 + [9] * 3 + [21] * 3 + [22] * 3 + [23] * 3 + [40] * 9
    np.testing.assert_allclose(pack.cell_frame_weight, [1 / 3] * 15 + [0] * 9, rtol=1e-6)
    np.testing.assert_array_equal(pack.importance, np.array([0.9, 0.1, 0.2, 0.4, 0.8], np.float32))
    assert pack.ranked.tolist() == [[0, 1], [3, 2], [4, 2], [4, 3]]
    assert pack.counts == counted(tokens=26, tokens_image=26, labels=14, caption=4, summary=10, importance=5, ranking=4)


def test_pictures_without_frame_tokens_go_to_none() -> None:
    pack = assemble([segment(6, pictures=1), summary([0.5], [])], WIDE)
    assert pack.cell_frame.tolist() == [40] * 6 + [8] * 3 + [40] * 15
    assert pack.frame_tokens.tolist() == [8]
    assert pack.ranked.shape == (0, 2)


def test_collate_offsets_pairs_and_frames() -> None:
    """Three packs of 40 tokens; the second one holds no picture, pair or frame."""
    packs = [
        assemble([*pair(5, 7, 3), summary([0.9, 0.1], [[0, 1]])], WIDE),
        assemble([segment(9)], WIDE),
        assemble([summary([0.3], []), summary([0.2, 0.7], [[1, 0]]), *pair(6, 5, 2), *pair(5, 8, 4)], WIDE),
    ]
    batch = collate(packs)
    assert batch.media_embedding.tolist() == [6, 80 + 17, 80 + 27]
    assert batch.text_embedding.tolist() == [9, 80 + 19, 80 + 31]
    assert batch.pair_ids.tolist() == [5, 6, 5]
    assert batch.pairs_of_ranks == (3,)
    assert batch.frame_tokens.tolist() == [14, 15, 80 + 2, 80 + 9, 80 + 10]
    torch.testing.assert_close(batch.importance, torch.tensor([0.9, 0.1, 0.3, 0.2, 0.7]))
    assert batch.ranked.tolist() == [[0, 1], [4, 3]]
    frames = [120] * 6 + [14] * 3 + [15] * 3 + [82] * 3 + [89] * 3 + [90] * 3 + [120] * 12
    assert batch.cell_frame.tolist() == frames
    torch.testing.assert_close(batch.cell_frame_weight, torch.tensor([1 / 3 if at < 120 else 0.0 for at in frames]))
    assert batch.counts == counted(
        tokens=18 + 9 + 32,
        tokens_image=59,
        labels=5 + 11,
        caption=5,
        summary=4 + 3 + 4,
        retrieval=3,
        importance=5,
        ranking=2,
    )
    indices = (batch.media_embedding, batch.text_embedding, batch.pair_ids, batch.frame_tokens, batch.ranked)
    assert {value.dtype for value in (*indices, batch.cell_frame)} == {torch.int64}
    assert batch.importance.dtype == batch.cell_frame_weight.dtype == torch.float32


@pytest.mark.parametrize("packs", [1, 2])
def test_collate_without_pairs_and_frames(packs: int) -> None:
    batch = collate([assemble([segment(8)], SHAPE)] * packs)
    for name in ("media_embedding", "text_embedding", "pair_ids", "frame_tokens", "importance"):
        assert getattr(batch, name).shape == (0,)
    assert (batch.ranked.shape, batch.pairs_of_ranks) == ((0, 2), (0,))
    assert (batch.cell_frame.tolist(), batch.cell_frame_weight.tolist()) == ([32 * packs], [0])


@pytest.mark.parametrize(
    ("length", "lengths"), [(512, (20, 100)), (1024, (20, 100)), (4096, (20, 100)), (4096, (40, 1200))]
)
def test_packs_are_full(length: int, lengths: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    packer = Packer(PackShape(length, 8192, 16, 2), lookahead=32)
    used = [
        sum(item.length for item in packer.fill(lambda: sample(0, int(rng.integers(*lengths))))) for _ in range(100)
    ]
    assert max(used) <= length
    assert np.mean(used) / length >= 0.97


def test_packs_have_much_the_same_patches() -> None:
    """Of images and videos, four to one: ranks wait for the pack with the most patches."""
    rng = np.random.default_rng(0)

    def draw() -> Encoded:
        text = int(rng.lognormal(np.log(30), 0.6)) + 2
        if rng.random() < 0.2:
            patches = int(rng.integers(4, 9)) * int(144 * rng.uniform(0.5, 1)) * 4
            return sample(0, patches // 16 + text, patches)
        patches = int(256 * rng.uniform(0.5, 1)) * 4
        return sample(0, patches // 4 + text, patches)

    shape = PackShape(4096, 32768, 14, 2)
    packer = Packer(shape, lookahead=64)
    packs = [packer.fill(draw) for _ in range(200)]
    patches = np.array([sum(item.patches for item in pack) for pack in packs])
    assert np.mean([sum(item.length for item in pack) for pack in packs]) > 0.985 * shape.length
    assert patches.std() < 0.18 * patches.mean()


def test_every_sample_is_packed_once_and_soon() -> None:
    rng = np.random.default_rng(0)
    samples = [sample(i, int(rng.integers(1, 33)), int(rng.integers(0, 49))) for i in range(500)]
    source = iter(samples)
    packer = Packer(SHAPE, lookahead=8)
    packs: list[list[Encoded]] = []
    while chosen := packer.fill(lambda: next(source, None)):
        packs.append(chosen)
        assert sum(item.length for item in chosen) <= SHAPE.length
        assert sum(item.patches for item in chosen) <= SHAPE.patches
        assert len(packer.pending) <= 8
    assert sorted(int(item.key) for chosen in packs for item in chosen) == list(range(500))
    # The first sample of a pack is the oldest that waits, so a sample waits for at most `lookahead` packs.
    firsts = [int(chosen[0].key) for chosen in packs]
    assert firsts == sorted(firsts)


def test_packing_depends_on_the_waiting_samples_alone() -> None:
    samples = [sample(i, 5 + i * 7 % 19) for i in range(60)]
    whole, resumed = Packer(SHAPE, 8), Packer(SHAPE, 8)
    source = iter(samples)
    for _ in range(6):
        whole.fill(lambda: next(source))
    rest = list(source)
    resumed.pending = list(whole.pending)
    first, second = iter(rest), iter(rest)
    for _ in range(6):
        expected = [item.key for item in whole.fill(lambda: next(first, None))]
        assert [item.key for item in resumed.fill(lambda: next(second, None))] == expected


def test_what_can_never_fit_is_refused() -> None:
    ref = SampleRef(0, 0, 0, 0)
    with pytest.raises(DataError, match=r"longer than pack: k has 33 tokens and 0 patches, data\.pack_length is 32"):
        encoded(ref, "k", [segment(16), segment(17)], SHAPE)
    with pytest.raises(DataError, match="longer than pack: k has 5 tokens and 72 patches"):
        encoded(ref, "k", [segment(5, pictures=3)], SHAPE)
    with pytest.raises(DataError, match="empty sample: k"):
        encoded(ref, "k", [], SHAPE)
    assert encoded(ref, "k", [segment(32, pictures=2)], SHAPE).patches == 48


def test_places_of_pictures_are_their_rows_and_columns():
    """Of Qwen2-VL's figure 3: text goes on after the longer side of a picture. Frames of pooled tokens alike."""
    wide = Picture(np.zeros((32, 48), np.uint8), (4, 8), -1.0, np.arange(1, 9, dtype=np.int32))
    tall = Picture(np.zeros((24, 48), np.uint8), (6, 4), -1.0, np.arange(9, 15, dtype=np.int32))
    one = segment(17)
    one.pictures = [wide, tall]
    rows = [[0, 0, 0], *[[1, 1 + row, 1 + column] for row in range(2) for column in range(4)]]
    rows += [[5, 5 + row, 5 + column] for row in range(3) for column in range(2)]
    assert one.places(2).tolist() == [*rows, [8, 8, 8], [9, 9, 9]]

    pooled = np.array([0, 0, 1, 0, 0, 1, 2, 2, 3], np.int32) + 1  # 3 x 3 cells, two by two
    one.pictures = [Picture(np.zeros((36, 48), np.uint8), (6, 6), 0.5 * i, pooled + 4 * i) for i in range(2)]
    square = [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
    found = one.places(2)
    assert (found[1:5] - 1).tolist() == (found[5:9] - 3).tolist() == square
    assert found[9:].tolist() == [[n] * 3 for n in range(5, 13)]

    batch = collate([assemble([one, segment(3)], WIDE), assemble([segment(4)], WIDE)])
    assert batch.places[:17].equal(torch.from_numpy(found))  # of a segment, not of the pack
    assert batch.places[17:20].tolist() == batch.places[40:43].tolist() == [[0] * 3, [1] * 3, [2] * 3]
