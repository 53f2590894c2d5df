"""What the rewrite of the library must not move: keys and the paired table.

It is retired, on purpose, by the change that brings new runs and new criteria.
"""
from dataclasses import fields
from pathlib import Path

import pandas as pd
import pytest

from wib_nbdev.config import TrainConfig
from wib_nbdev.statistics import paired_differences, select
from wib_nbdev.sweep import load_results

FROZEN = Path(__file__).parent / 'frozen'
MAIN = dict(sample=False, epochs=20, batch_size=256, lr=0.004, optimizer='adam', momentum=0.9, valid='test')


@pytest.fixture(scope='module')
def results(): return load_results(FROZEN.parents[1] / 'results')


def test_keys(results):
    names = [each.name for each in fields(TrainConfig) if each.name in results.runs]
    rows = results.runs[names].astype(object).where(results.runs[names].notna(), None).to_dict('records')
    assert len(rows) == 513 and [TrainConfig(**row).key for row in rows] == list(results.runs['key'])


@pytest.mark.parametrize('at', ['last', 'best'])
def test_paired_table(results, at):
    said = pd.read_csv(FROZEN / f'paired_{at}.csv')
    now = paired_differences(select(results, **MAIN), at=at)
    pd.testing.assert_frame_equal(said, now[said.columns], rtol=1e-9, check_dtype=False)
