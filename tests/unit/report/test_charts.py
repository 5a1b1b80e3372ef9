"""Charts: what is drawn, in the page's own colours, and in words for those who do not see it."""

import math
import re
from itertools import pairwise

import pytest

from mnist_dist.report.charts import MAX_POINTS, Mark, Series, draw

STEPS = list(range(0, 1000, 50))
FALLING = [2.3 / (1 + step / 20) for step in STEPS]


def labels(svg: str) -> list[str]:
    """The texts in a chart."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def places(svg: str, *texts: str, axis: str = "x") -> list[float]:
    """Where texts begin, in the SVG's own units."""
    return [float(re.findall(rf'<text[^>]* {axis}="([^"]*)"[^>]*>{re.escape(text)}</text>', svg)[0]) for text in texts]


def drawn(*arguments: object, **options: bool) -> str:
    svg = draw(*arguments, **options)  # type: ignore[arg-type]
    assert svg
    return svg


def test_colours_are_the_pages_own() -> None:
    """A colour of the chart's own could not be read in one of the two themes."""
    series = [Series(STEPS, [value + number for value in FALLING], number, is_marked=True) for number in range(9)]
    svg = drawn("Loss", series, [Mark(0, "1 rank"), Mark(500, "2 ranks")])
    assert re.findall(r"#[0-9a-fA-F]{3,8}\b(?!\")", svg.replace("url(#", "").replace('href="#', "")) == []
    assert set(re.findall(r"var\((--[a-z0-9-]+)\)", svg)) == {
        "--text", "--muted", "--grid", *(f"--series-{number}" for number in range(1, 9)),
    }  # fmt: skip
    assert "stroke-dasharray" in svg  # the ninth has the first one's colour


def test_nothing_to_draw_is_no_chart() -> None:
    assert draw("Loss", []) is None
    assert draw("Loss", [Series([], [], 0)], [Mark(3, "1 rank")]) is None
    assert draw("Loss", [Series([1, 2, 3], [math.nan, math.inf, -1e300], 0)]) is None


def test_what_is_not_finite_is_left_out() -> None:
    svg = drawn("Loss", [Series([0, 1, 2, 3], [math.nan, 2.0, 1.5, math.inf], 0)])
    assert 'aria-label="Loss. from 2 at step 1 to 1.5 at step 2"' in svg


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-300, 3.4e38, -3.4e38, 5e-324])
def test_any_number_can_be_drawn(value: float) -> None:
    for values in ([value], [value, value], [value, 1.0], [-value, value]):
        for is_loss in (True, False):
            svg = drawn("Loss", [Series([0, 2**53 - 1][: len(values)], values, 0)], is_loss=is_loss)
            assert "<text" in svg


def test_a_long_curve_is_drawn_with_the_means_of_neighbours() -> None:
    count = 10 * MAX_POINTS
    svg = drawn("Loss", [Series(range(count), [float(step % 10) for step in range(count)], 0)])
    assert "from 4.5 at step 4 to 4.5 at step 9,994" in svg
    assert len(svg) < 100_000


def test_a_loss_that_spans_a_factor_of_ten_is_drawn_on_a_logarithmic_axis() -> None:
    tenth, fifth, one, two = places(
        drawn("Loss", [Series(STEPS, FALLING, 0)], is_loss=True), "0.1", "0.2", "1", "2", axis="y"
    )
    assert tenth - one == pytest.approx(fifth - two)
    assert "0.1" not in labels(drawn("Loss", [Series(STEPS, FALLING, 0)]))
    assert "0.1" not in labels(drawn("Loss", [Series(STEPS, [*FALLING[:-1], 0.0], 0)], is_loss=True))  # it has no log


def test_restarts_are_marked_and_their_texts_stand_apart() -> None:
    marks = [Mark(0, "1 rank"), Mark(500, "16 ranks"), Mark(510, "8 ranks"), Mark(950, "1,024 ranks")]
    svg = drawn("Loss", [Series(STEPS, FALLING, 0)], marks)
    assert svg.count("stroke-dasharray") == len(marks)
    shown = [mark.text for mark in marks if mark.text in labels(svg)]
    assert shown == ["1 rank", "16 ranks", "1,024 ranks"]  # there is no room for the third
    for (left, text), (right, _) in pairwise(zip(places(svg, *shown), shown, strict=True)):
        assert left + 5 * len(text) < right
    assert places(svg, "1,024 ranks")[0] + 5 * len("1,024 ranks") < 360  # within the picture


def test_two_charts_of_a_page_share_no_id() -> None:
    ids = [re.findall(r' id="([^"]*)"', drawn(title, [Series(STEPS, FALLING, 0)])) for title in ("Loss", "Accuracy")]
    assert ids[0]
    assert not set(ids[0]) & set(ids[1])
    for chart in ids:
        assert len(set(chart)) == len(chart)


def test_a_chart_is_the_same_each_time() -> None:
    assert drawn("Loss", [Series(STEPS, FALLING, 0)]) == drawn("Loss", [Series(STEPS, FALLING, 0)])
