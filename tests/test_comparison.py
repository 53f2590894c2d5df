"""Figures of the comparison: labels that stand apart, shared scales, and what must be in a picture."""
import numpy as np
import pytest
from test_statistics import noisy, results_of

from wib_nbdev import comparison as c
from wib_nbdev.plan import ARMS, PAPER_ARMS, arm_grid
from wib_nbdev.statistics import run_values, select, speed_differences


@pytest.fixture(scope='module')
def results(): return results_of(arm_grid(seed=range(2), epochs=4), noisy)


@pytest.mark.parametrize('arms', [PAPER_ARMS, tuple(ARMS)[:11]])
def test_no_label_over_another_and_scales_are_shared(results, arms):
    figure = c.figure_12(results, arms)
    figure.canvas.draw()
    for ax in figure.axes:
        for text in ax.texts: text.arrowprops = text.arrow_patch = None  # it may cross others
        boxes = [text.get_window_extent().padded(-0.5) for text in ax.texts]
        assert len(boxes) == len(arms)
        assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    limits = [ax.get_ylim() for ax in figure.axes]
    assert limits[0] == limits[1] and limits[2] == limits[3]


def test_curves_are_means_with_t_intervals(results):
    frame = c.learning_curves(select(results, dataset='cifar10'), ['relu'])
    ax = c.plot_curves(frame, split='train', metric='loss')
    values = frame[frame['split'] == 'train'].groupby('epoch')['loss'].apply(c.t_interval)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [interval.mean for interval in values])
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(min(interval.low for interval in values))


@pytest.mark.parametrize('metric, claim, rope, word', [
    ('valid loss', -20, 2, '← better'), ('valid accuracy', 5, 0.5, 'better →')])
def test_a_forest_shows_claim_rope_and_the_better_side(results, metric, claim, rope, word):
    ax = c.plot_forest(c.paired_differences(results, metrics=[metric]))
    strip = ax.patches[0]
    assert (strip.get_x(), strip.get_width()) == pytest.approx((-rope, 2 * rope))
    dashed, = (line for line in ax.lines if line.get_linestyle() == '--')
    names = [tick.get_text() for tick in ax.get_yticklabels()]
    assert dashed.get_xdata()[0] == pytest.approx(claim)
    assert names[:2] == ['Fashion-MNIST: ReLU', 'Fashion-MNIST: Leaky ReLU']
    side, = ax.texts
    assert side.get_text().strip() == word and side.get_ha() == ('right' if claim < 0 else 'left')


def test_alike_quantities_share_a_scale_in_a_forest(results):
    axes = c.figure_forest(c.paired_differences(results), c.METRICS).axes
    assert axes[0].get_xlim() == axes[1].get_xlim() != axes[2].get_xlim() == axes[3].get_xlim()
    one = c.figure_forest(c.paired_differences(results, metrics=['valid loss']))
    assert [ax.axison for ax in one.axes] == [True, False]


def test_speed(results):
    speeds = speed_differences(results)
    assert len(c.plot_speed(speeds).get_yticklabels()) == len(speeds) == 8
    assert len(c.figure_speed(results).axes) == 3


def test_rates_by_optimizer_and_momentum():
    "A rate at which every run diverged has no point, and plain SGD has a panel of its own."
    sgd = dict(optimizer='sgd', momentum=[0.0, 0.9], lr=[0.1, 0.4], seed=range(2), valid='holdout', epochs=2)
    results = results_of(arm_grid(('relu', 'elu'), **sgd), noisy)
    results.runs.loc[results.runs.eval("activation == 'elu' and lr == 0.4"), 'status'] = 'diverged'
    titles = [ax.get_title() for ax in c.figure_rates(results).axes]
    assert titles == ['Fashion-MNIST: SGD', 'Fashion-MNIST: SGD, momentum 0.9',
                      'CIFAR-10: SGD', 'CIFAR-10: SGD, momentum 0.9']
    part = run_values(select(results, dataset='cifar10', momentum=0.0)).query("metric == 'valid accuracy'")
    drawn = [line for line in c.plot_rates(part).lines if line.get_marker() not in ('', 'None')]
    points = [np.isfinite(line.get_ydata()).sum() for line in drawn]
    assert sorted(points) == [1, 2]


@pytest.mark.parametrize('call, message', [
    (lambda r: c.figure_13(select(r, dataset='fashion_mnist')), 'no finished run'),
    (lambda r: c.plot_forest(c.paired_differences(r)), 'must hold one metric'),
    (lambda r: c.figure_rates(r), "no run with valid='holdout'")])
def test_errors_name_what_is_missing(results, call, message):
    with pytest.raises(ValueError, match=message): call(results)
