"""What the pictures show: read back from the axes, not from pixels."""

import math
from dataclasses import replace
from functools import partial

import pytest
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_ft.document.blocks import Plot
from lightning_ft.document.canvas import DPI, STYLE, render_plot, marks
from lightning_ft.evaluation.bootstrap import Interval
from lightning_ft.evaluation.comparison.plots import (
    Curve,
    draw_learning_curve,
    draw_methods,
    draw_resources,
    draw_training,
)
from lightning_ft.evaluation.retention.sections import Tradeoff, draw_forgetting, forgetting_blocks
from lightning_ft.evaluation.savings.plots import Arm, draw_cost, draw_quality, draw_tokens
from lightning_ft.report.collect import RunReport
from lightning_ft.report.compose import document


def axes_of(draw, **arguments):
    axes = Figure(layout="constrained").subplots()
    draw(axes, **arguments)
    return axes


def labels_of(axes):
    return axes.get_legend_handles_labels()[1]


def test_bars_are_as_high_as_a_request_has_tokens(make):
    result = make.savings()
    axes = axes_of(draw_tokens, result=result)
    heights = dict.fromkeys(("prompted", "untuned", "tuned"), 0.0)
    for container in axes.containers:
        for name, bar in zip(heights, container, strict=True):
            heights[name] += bar.get_height()
    assert heights == pytest.approx({name: result.arms[name].tokens / result.n for name in heights})
    assert labels_of(axes) == ["system prompt", "examples", "chat template", "request", "answer"]


def test_an_arm_without_a_success_is_drawn_and_named():
    never = Interval(math.inf, math.inf, math.inf)
    arms = {
        "prompted": Arm(Interval(0.9, 0.8, 1.0), Interval(500, 480, 520)),
        "tuned": Arm(Interval(0, 0, 0), never),
    }
    axes = axes_of(draw_quality, arms=arms)
    assert labels_of(axes) == ["prompted", "tuned (no success)"]
    assert axes.get_xlim()[1] > 600
    assert axes.get_xscale() == "linear"


def test_far_apart_arms_get_a_log_scale():
    quality = Interval(0.5, 0.4, 0.6)
    arms = {"prompted": Arm(quality, Interval(9000, 8000, math.inf)), "tuned": Arm(quality, Interval(30, 29, 31))}
    axes = axes_of(draw_quality, arms=arms)
    assert axes.get_xscale() == "log"
    assert "log scale" in axes.get_xlabel()


@pytest.mark.parametrize(
    ("break_even", "said", "banded"),
    [
        (Interval(668_528.0, 2e5, 3e6), "earned back after 669,000 requests", True),
        (Interval(668_528.0, 2e5, math.inf), "earned back after 669,000 requests", True),
        (Interval(math.inf, math.inf, math.inf), "never earned back", False),
    ],
)
def test_cost_crosses_where_it_breaks_even(make, break_even, said, banded):
    result = make.savings()
    axes = axes_of(draw_cost, result=result, kind="uncached", break_even=break_even)
    prompted, tuned = axes.get_lines()[:2]
    more = prompted.get_ydata() > tuned.get_ydata()
    crossed = next(x for x, is_more in zip(prompted.get_xdata(), more, strict=True) if is_more)
    assert crossed == pytest.approx(result.costs.break_even_uncached, rel=0.3)  # as fine as the points are
    assert said in axes.get_title()
    assert ("break-even, 95% interval" in labels_of(axes)) is banded
    assert "USD" in axes.get_ylabel()
    if banded:
        band = axes.patches[0].get_extents().transformed(axes.transData.inverted())
        assert band.x0 == pytest.approx(break_even.lo, rel=1e-6)
        assert band.x1 == pytest.approx(min(break_even.hi, axes.get_xlim()[1]), rel=1e-6)


def test_a_dollar_sign_is_a_dollar_sign(make):
    """Two of them would be a formula, and a broken one an error."""
    result = make.savings(prices=replace(make.prices, currency="$ \\frac{ $"))
    break_even = Interval(668_528.0, 2e5, 3e6)
    draw = partial(draw_cost, result=result, kind="uncached", break_even=break_even)
    assert render_plot(Plot("cost", "", "", draw)).png.startswith(b"\x89PNG")


def test_an_infinite_divergence_is_told_where_it_cannot_be_drawn():
    point, endless = Interval(0.03, 0.02, 0.04), Interval(math.inf, 1.0, math.inf)
    blocks = forgetting_blocks([Tradeoff("lora", point, point), Tradeoff("full", endless, point)])
    assert isinstance(blocks[0], Plot)
    assert "full" not in blocks[0].alt
    assert blocks[1] == "Not drawn, since its KL is infinite: full."
    assert forgetting_blocks([Tradeoff("full", endless, point)]) == (blocks[1],)
    assert forgetting_blocks([]) == ()


def test_forgetting_says_where_it_is_a_lower_bound():
    point = Interval(0.03, 0.02, 0.04)
    runs = [Tradeoff("lora", point, point), Tradeoff("lora", point, point), Tradeoff("full", point, point, True)]
    assert labels_of(axes_of(draw_forgetting, runs=runs)) == ["lora", "full (KL: lower bound)"]


def test_methods_show_each_seed():
    quality = {"untuned": Interval(0.2, 0.1, 0.3), "lora": Interval(0.9, 0.8, 0.95)}
    axes = axes_of(draw_methods, quality=quality, seeds={"lora": (0.88, 0.92)})
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["untuned", "lora"]
    assert any(list(line.get_xdata()) == [0.88, 0.92] for line in axes.get_lines())


def test_what_was_never_reached_is_called_so():
    ratios = {
        "lora": {"flops": Interval(0.7, 0.69, 0.71), "flops_to_95": Interval(math.inf, 0.8, math.inf)},
        "frozen": {"flops": Interval(1.3, 1.2, 1.4)},
    }
    axes = axes_of(draw_resources, ratios=ratios)
    assert [text.get_text() for text in axes.texts] == ["0.7x", "never", "1.3x"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["training FLOPs", "FLOPs to 95%\nof full's quality"]
    assert labels_of(axes)[0] == "full fine-tuning"


def test_a_method_without_the_first_figure_is_in_the_legend():
    ratios = {"a": {"flops": Interval(0.7, 0.7, 0.7)}, "b": {"seconds": Interval(0.5, 0.5, 0.5)}}
    assert set(labels_of(axes_of(draw_resources, ratios=ratios))) == {"full fine-tuning", "a", "b"}


def test_learning_and_training_curves():
    curve = {100: Interval(0.4, 0.3, 0.5), 1000: Interval(0.8, 0.7, 0.9)}
    axes = axes_of(draw_learning_curve, curves={"lora": curve}, lines={"prompted": Interval(0.85, 0.8, 0.9)})
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["100", "1,000"]
    assert set(labels_of(axes)) == {"lora", "prompted"}
    axes = axes_of(draw_training, curves=[Curve("lora", (0.0, 1e12, 2e12), (0.2, 0.7, 0.8))])
    assert list(axes.get_lines()[0].get_xdata()) == [1e12, 2e12]  # before training there were no operations


def test_names_keep_their_looks():
    assert marks(["full", "new", "lora"])["lora"] == marks(["lora"])["lora"]
    assert len(set(marks(["full", "lora", "prompted", "untuned", *"abcdef"]).values())) == 10


def test_a_picture_is_the_same_twice_and_holds_no_date(make):
    picture = Plot("tokens", "", "", partial(draw_tokens, result=make.savings()))
    one, other = render_plot(picture), render_plot(picture)
    assert one == other
    assert b"<dc:date>" not in one.svg
    assert b"<text" not in one.svg  # letters are shapes, whatever fonts the reader has


def test_nothing_is_drawn_outside_a_picture(comparison):
    """Titles, labels and legends of the widest pictures lie within the figure."""
    for picture in document(RunReport(comparison=comparison)).pictures:
        with rc_context(STYLE):
            figure = Figure(figsize=picture.size, dpi=DPI, layout="constrained")
            FigureCanvasAgg(figure)
            axes = figure.subplots()
            picture.draw(axes)
            figure.canvas.draw()
            box = figure.get_tightbbox()
        width, height = picture.size
        labels = (*axes.get_xticklabels(which="both"), *axes.get_yticklabels(which="both"))
        ticks = [label.get_text() for label in labels]
        assert not any("$" in tick for tick in ticks), picture.name  # a formula, which isn't read as one
        assert box.x0 >= -0.01, picture.name
        assert box.y0 >= -0.01, picture.name
        assert box.x1 <= width + 0.01, picture.name
        assert box.y1 <= height + 0.01, picture.name
