"""A digest changes with any bit of a tensor and with nothing else; a failed check lets no checkpoint be published."""

import pytest
import torch

from ds_recipes.engine.replicas import CHUNK_ELEMENTS, digests
from ds_recipes.errors import TrainingError
from ds_recipes.training.checksums import Checksums, _differences
from ds_recipes.world.group import solo

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_any_other_bit_is_another_digest(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = (torch.randn(37) * 9).to(dtype)
    (before,) = digests([tensor], CPU)
    raw = tensor.view(torch.uint8)
    for byte in range(len(raw)):
        for bit in range(8) if dtype != torch.bool else (0,):
            raw[byte] ^= 1 << bit
            assert digests([tensor], CPU) != [before], (byte, bit)
            raw[byte] ^= 1 << bit
    assert digests([tensor, tensor.clone()], CPU) == [before, before]
    tensor[:2] = torch.tensor([1, 0]).to(dtype)
    turned = torch.cat([tensor[1:2], tensor[:1], tensor[2:]])
    assert digests([turned], CPU) != digests([tensor], CPU)


def test_shapes_layouts_and_pieces_do_not_matter() -> None:
    torch.manual_seed(0)
    large = torch.randn(CHUNK_ELEMENTS + 5)
    (whole,) = digests([large], CPU)
    large[-1] += 1
    assert digests([large], CPU) != [whole]
    table = torch.randn(6, 5)
    assert digests([table.t()], CPU) == digests([table.t().contiguous()], CPU)
    assert digests([torch.ones(1).expand(7)], CPU) == digests([torch.ones(7)], CPU)
    assert len(digests([torch.tensor(3.0), torch.empty(0)], CPU)) == 2 and digests([], CPU) == []
    assert digests([torch.tensor(0.0)], CPU) != digests([torch.tensor(-0.0)], CPU)


def test_the_one_that_differs_is_named_and_of_two_both() -> None:
    tables = [{"all ranks": {"a": "1", "b": "1"}} for _ in range(3)]
    assert not _differences(tables)
    tables[1]["all ranks"]["b"] = "2"
    (found,) = _differences(tables)
    assert (found.name, found.ranks, found.is_decided) == ("b", (1,), True)
    (found,) = _differences(tables[:2])
    assert found.ranks == (0, 1) and not found.is_decided
    parts = [{"part 0": {"a": "1"}}, {"part 1": {"a": "2"}}, {"part 0": {"a": "1"}}, {"part 1": {"a": "3"}}]
    (found,) = _differences(parts)
    assert found.ranks == (1, 3) and found.holders == "part 1"


def test_after_a_failed_check_no_checkpoint_gets_its_name() -> None:
    checksums = Checksums(None, solo(), 10, lambda step: False, None)  # type: ignore[arg-type]
    checksums.fence()
    checksums._failure = "the checksum of step 10 found a difference"
    with pytest.raises(TrainingError, match="no checkpoint is published any more: the checksum of step 10"):
        checksums.fence()
