"""Small random batches in the shape that the model reads, for tests of everything behind the loader."""

from __future__ import annotations

import torch

from dsmoe_vl.data.segment import IGNORE, Batch, Modality, TaskId


def random_batch(
    segment_lengths: list[int],
    vocab_size: int,
    patch_size: int,
    merge: int,
    grids: list[tuple[int, int]],
    seed: int = 0,
    padding: int = 0,
) -> Batch:
    """Segment i begins with the vision tokens of picture i, where there is one, one token a cell; the rest is text."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(segment_lengths) + padding
    lengths = [*segment_lengths, padding] if padding else segment_lengths
    tokens = torch.randint(5, vocab_size, (total,), generator=generator)
    labels = torch.randint(5, vocab_size, (total,), generator=generator)
    modality = torch.full((total,), int(Modality.TEXT))
    real = torch.ones(total, dtype=torch.bool)
    real[total - padding :] = False
    labels[~real] = IGNORE
    cell_position, positions, start = [], [], 0
    for index, length in enumerate(segment_lengths):
        if index < len(grids):
            rows, columns = grids[index]
            cells = rows * columns // merge**2
            assert cells < length
            modality[start : start + cells] = int(Modality.IMAGE)
            labels[start : start + cells - 1] = IGNORE
            cell_position.append(torch.arange(start, start + cells))
            grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(rows, columns, 2)
            by_cell = grid.view(rows // merge, merge, columns // merge, merge, 2).permute(0, 2, 1, 3, 4)
            positions.append(by_cell.reshape(-1, 2))
        start += length
    picture_lengths = [rows * columns for rows, columns in grids]
    patches = sum(picture_lengths)
    cells = patches // merge**2
    return Batch(
        tokens=tokens,
        labels=labels,
        positions=torch.cat([torch.arange(n) for n in lengths]),
        task_ids=torch.full((total,), int(TaskId.CAPTION)),
        modality_ids=modality,
        real=real,
        cu_segments=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        max_segment=max(lengths),
        patches=torch.randint(0, 256, (patches, 3 * patch_size**2), generator=generator, dtype=torch.uint8),
        patch_positions=torch.cat(positions),
        cu_pictures=torch.tensor([0, *picture_lengths]).cumsum(0).to(torch.int32),
        max_picture=max(picture_lengths),
        cell_position=torch.cat(cell_position),
        cell_weight=torch.ones(cells),
        cell_time=torch.full((cells,), -1.0),
        counts={"tokens": int(real.sum()), "caption": int((labels != IGNORE).sum())},
        keys=[],
    )
