"""FLOP and bytes counted from a network equal those from formulas."""

import pytest

from mmdit_lib.config import Resolution
from mmdit_lib.reports.work import Work, count_work
from mmdit_lib.sd3 import KNOWN_MODELS

MEDIUM = KNOWN_MODELS["stable-diffusion-3.5-medium"]
BATCH, IMAGE, TEXT, DIM, BLOCKS, DUAL = 2, 4096, 333, 1536, 24, 13


@pytest.mark.slow
def test_sd35_medium_at_1024():
    found = count_work(MEDIUM, resolution=Resolution.read(1024), text_tokens=TEXT, batch=BATCH)
    tokens = IMAGE + TEXT
    attention = 4 * BATCH * DIM * (BLOCKS * tokens**2 + DUAL * IMAGE**2)
    assert found["attention"].flop == pytest.approx(attention)
    # The queries, keys and values that it reads, and the result.
    assert found["attention"].nbytes == pytest.approx(4 * BATCH * 2 * DIM * (BLOCKS * tokens + DUAL * IMAGE))
    # Q, K, V, output and the MLP of each block; a second attention in some; the last layer.
    image = 2 * BATCH * IMAGE * DIM**2 * (12 * BLOCKS + 4 * DUAL) + 2 * BATCH * IMAGE * DIM * 64
    assert found["GEMM, image"].flop == pytest.approx(image)
    # The last block has only Q, K, V of the text; the first layer reads 4096 features.
    text = 2 * BATCH * TEXT * (DIM**2 * (12 * (BLOCKS - 1) + 3) + DIM * 4096)
    assert found["GEMM, text"].flop == pytest.approx(text)


def test_least_time():
    assert Work(10, 2).intensity == 5
    assert Work(10, 2).least_ms(1000, 1000) == 10 and Work(10, 20).least_ms(1000, 1000) == 20
    assert Work(1, 2) + Work(3, 4) == Work(4, 6)
