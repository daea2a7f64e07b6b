"""Content of the plots, read from the matplotlib axes."""

import math
from dataclasses import replace
from functools import partial

import pytest
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_ft.document.blocks import Plot
from lightning_ft.document.numbers import format_si
from lightning_ft.document.plotting import DPI, STYLE, marker_styles, render_plot, set_log_scale
from lightning_ft.evaluation.bootstrap import Interval
from lightning_ft.evaluation.comparison.plots import (
    TrainingCurve,
    draw_learning_curve,
    draw_methods,
    draw_resources,
    draw_training,
)
from lightning_ft.evaluation.retention.sections import Tradeoff, draw_forgetting, forgetting_blocks
from lightning_ft.evaluation.savings.plots import Arm, draw_cost, draw_quality, draw_tokens
from lightning_ft.report.collect import RunReport
from lightning_ft.report.compose import compose_document


def axes_of(draw, **arguments):
    axes = Figure(layout="constrained").subplots()
    draw(axes, **arguments)
    return axes


def labels_of(axes):
    return axes.get_legend_handles_labels()[1]


def test_draw_tokens_bar_heights_are_tokens_per_request(make):
    result = make.savings()
    axes = axes_of(draw_tokens, result=result)
    heights = dict.fromkeys(("prompted", "untuned", "tuned"), 0.0)
    for container in axes.containers:
        for name, bar in zip(heights, container, strict=True):
            heights[name] += bar.get_height()
    assert heights == pytest.approx({name: result.arms[name].tokens / result.n for name in heights})
    assert labels_of(axes) == ["system prompt", "examples", "chat template", "request", "answer"]


def test_draw_forgetting_of_equal_qualities_has_an_axis_without_exponent():
    rounding = Interval(0.0, -1e-17, 1e-17)
    axes = axes_of(draw_forgetting, runs=[Tradeoff("tuned", Interval(0.4, 0.3, 0.5), rounding)])
    low, high = axes.get_ylim()
    assert high - low == pytest.approx(0.2)
    assert low < 0 < high
    FigureCanvasAgg(axes.figure).draw()
    assert axes.yaxis.get_offset_text().get_text() == ""


def test_draw_quality_shows_an_arm_without_success():
    never = Interval(math.inf, math.inf, math.inf)
    arms = {
        "prompted": Arm(Interval(0.9, 0.8, 1.0), Interval(500, 480, 520)),
        "tuned": Arm(Interval(0, 0, 0), never),
    }
    axes = axes_of(draw_quality, arms=arms)
    assert labels_of(axes) == ["prompted", "tuned (no success)"]
    assert axes.get_xlim()[1] > 600
    assert axes.get_xscale() == "linear"


def test_draw_quality_shows_arms_of_which_none_has_a_success():
    never = Arm(Interval(0, 0, 0), Interval(math.inf, math.inf, math.inf))
    axes = axes_of(draw_quality, arms={"prompted": never, "tuned": never})
    assert labels_of(axes) == ["prompted (no success)", "tuned (no success)"]
    assert list(axes.get_xticks()) == []


def test_draw_quality_uses_a_log_scale_for_distant_arms():
    quality = Interval(0.5, 0.4, 0.6)
    arms = {"prompted": Arm(quality, Interval(9000, 8000, math.inf)), "tuned": Arm(quality, Interval(30, 29, 31))}
    axes = axes_of(draw_quality, arms=arms)
    assert axes.get_xscale() == "log"
    assert "log scale" in axes.get_xlabel()


@pytest.mark.parametrize(
    ("break_even", "verdict", "has_band"),
    [
        (Interval(668_528.0, 2e5, 3e6), "break-even after 669,000 requests", True),
        (Interval(668_528.0, 2e5, math.inf), "break-even after 669,000 requests", True),
        (Interval(math.inf, math.inf, math.inf), "no break-even", False),
    ],
)
def test_draw_cost_lines_cross_at_break_even(make, break_even, verdict, has_band):
    result = make.savings()
    axes = axes_of(draw_cost, result=result, caching="uncached", break_even=break_even)
    prompted, tuned = axes.get_lines()[:2]
    more = prompted.get_ydata() > tuned.get_ydata()
    crossed = next(x for x, is_more in zip(prompted.get_xdata(), more, strict=True) if is_more)
    assert crossed == pytest.approx(result.costs.break_even_uncached, rel=0.3)  # resolution of the points
    assert verdict in axes.get_title()
    assert ("break-even, 95% interval" in labels_of(axes)) is has_band
    assert "USD" in axes.get_ylabel()
    if has_band:
        band = axes.patches[0].get_extents().transformed(axes.transData.inverted())
        assert band.x0 == pytest.approx(break_even.lo, rel=1e-6)
        assert band.x1 == pytest.approx(min(break_even.hi, axes.get_xlim()[1]), rel=1e-6)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ((1.1e14, 1.9e14), ["120 T", "140 T", "160 T", "180 T"]),  # no power of ten
        ((3e13, 1.2e14), ["50 T", "75 T", "100 T"]),
        ((5e9, 2e13), ["10 G", "100 G", "1 T", "10 T"]),
    ],
)
def test_log_scale_has_labels_in_any_range(values, labels):
    figure = Figure()
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(values, (0, 1))
    set_log_scale(axes.xaxis, format_si)
    axes.set_xlim(*values)
    figure.canvas.draw()
    low, high = values
    ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
    assert [label.get_text() for x, label in ticks if low <= x <= high] == labels


def test_render_plot_keeps_dollar_signs(make):
    """Matplotlib would parse text between two dollar signs as a formula, and fail if it is malformed."""
    result = make.savings(prices=replace(make.prices, currency="$ \\frac{ $"))
    break_even = Interval(668_528.0, 2e5, 3e6)
    draw = partial(draw_cost, result=result, caching="uncached", break_even=break_even)
    assert render_plot(Plot("cost", "", "", draw)).png.startswith(b"\x89PNG")


def test_forgetting_blocks_name_runs_with_infinite_kl():
    point, infinite = Interval(0.03, 0.02, 0.04), Interval(math.inf, 1.0, math.inf)
    blocks = forgetting_blocks([Tradeoff("lora", point, point), Tradeoff("full", infinite, point)])
    assert isinstance(blocks[0], Plot)
    assert "full" not in blocks[0].alt
    assert blocks[1] == "Not drawn, since its KL is infinite: full."
    assert forgetting_blocks([Tradeoff("full", infinite, point)]) == (blocks[1],)
    assert forgetting_blocks([]) == ()


def test_draw_forgetting_labels_lower_bounds():
    point = Interval(0.03, 0.02, 0.04)
    runs = [Tradeoff("lora", point, point), Tradeoff("lora", point, point), Tradeoff("full", point, point, True)]
    assert labels_of(axes_of(draw_forgetting, runs=runs)) == ["lora", "full (KL: lower bound)"]


def test_draw_methods_shows_each_seed():
    quality = {"untuned": Interval(0.2, 0.1, 0.3), "lora": Interval(0.9, 0.8, 0.95)}
    axes = axes_of(draw_methods, quality=quality, seeds={"lora": (0.88, 0.92)})
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["untuned", "lora"]
    assert any(list(line.get_xdata()) == [0.88, 0.92] for line in axes.get_lines())


def test_draw_resources_labels_infinite_ratios():
    ratios = {
        "lora": {"flops": Interval(0.7, 0.69, 0.71), "flops_to_95": Interval(math.inf, 0.8, math.inf)},
        "frozen": {"flops": Interval(1.3, 1.2, 1.4)},
    }
    axes = axes_of(draw_resources, ratios=ratios)
    assert [text.get_text() for text in axes.texts] == ["0.7x", "never", "1.3x"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["training FLOPs", "FLOPs to 95%\nof full's quality"]
    assert labels_of(axes)[0] == "full fine-tuning"


def test_draw_resources_legend_has_methods_without_the_first_ratio():
    ratios = {"a": {"flops": Interval(0.7, 0.7, 0.7)}, "b": {"seconds": Interval(0.5, 0.5, 0.5)}}
    assert set(labels_of(axes_of(draw_resources, ratios=ratios))) == {"full fine-tuning", "a", "b"}


def test_draw_learning_curve_and_draw_training_show_the_curves():
    curve = {100: Interval(0.4, 0.3, 0.5), 1000: Interval(0.8, 0.7, 0.9)}
    axes = axes_of(draw_learning_curve, curves={"lora": curve}, baselines={"prompted": Interval(0.85, 0.8, 0.9)})
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["100", "1,000"]
    assert set(labels_of(axes)) == {"lora", "prompted"}
    axes = axes_of(draw_training, curves=[TrainingCurve("lora", (0.0, 1e12, 2e12), (0.2, 0.7, 0.8))])
    assert list(axes.get_lines()[0].get_xdata()) == [1e12, 2e12]  # a log scale has no point for 0 operations


def test_marker_styles_are_stable_and_distinct():
    assert marker_styles(["full", "new", "lora"])["lora"] == marker_styles(["lora"])["lora"]
    assert len(set(marker_styles(["full", "lora", "prompted", "untuned", *"abcdef"]).values())) == 10


def test_render_plot_is_deterministic(make):
    plot = Plot("tokens", "", "", partial(draw_tokens, result=make.savings()))
    one, other = render_plot(plot), render_plot(plot)
    assert one == other
    assert b"<dc:date>" not in one.svg
    assert b"<text" not in one.svg  # text is drawn as paths, so that no font is needed


def test_plots_stay_within_the_figure(comparison):
    """Titles, labels and legends of the plots with the most content fit into the figure."""
    for plot in compose_document(RunReport(comparison=comparison)).plots:
        with rc_context(STYLE):
            figure = Figure(figsize=plot.size, dpi=DPI, layout="constrained")
            FigureCanvasAgg(figure)
            axes = figure.subplots()
            plot.draw(axes)
            figure.canvas.draw()
            box = figure.get_tightbbox()
        width, height = plot.size
        labels = (*axes.get_xticklabels(which="both"), *axes.get_yticklabels(which="both"))
        ticks = [label.get_text() for label in labels]
        assert not any("$" in tick for tick in ticks), plot.name  # an unparsed formula
        assert box.x0 >= -0.01, plot.name
        assert box.y0 >= -0.01, plot.name
        assert box.x1 <= width + 0.01, plot.name
        assert box.y1 <= height + 0.01, plot.name
