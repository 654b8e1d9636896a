"""Work spread over processes."""

import os

import pytest

from benchmarks.quality.workers import spread


@pytest.mark.parametrize("processes", [1, 2])
def test_every_part_is_done_once(processes):
    done = dict(spread(len, ["", "a", "bb", "ccc"], processes=processes, gpus=1))
    assert done == {0: 0, 1: 1, 2: 2, 3: 3}


def test_each_process_has_one_gpu():
    seen = dict(spread(os.getenv, ["CUDA_VISIBLE_DEVICES"] * 4, processes=2, gpus=2))
    assert len(seen) == 4 and set(seen.values()) <= {"0", "1"}


def test_an_error_of_a_part_is_raised():
    with pytest.raises(TypeError, match="NoneType"):
        list(spread(len, [None], processes=2, gpus=1))
