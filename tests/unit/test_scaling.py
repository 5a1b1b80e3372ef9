"""The cost model of docs/SCALING.md: what was put in comes out, and what it says of clusters makes sense."""

import pytest

from benchmarks.scaling import BATCHES, GPUS, WORLD_SIZES, Fit, efficiency, fit_all, on_gpus, predict

TRUE = Fit({"mlp": 1.2e-3, "cnn": 0.8e-3}, {"mlp": 9e-6, "cnn": 3e-4}, alpha_s=2e-4, beta_s=1e-9)


@pytest.mark.parametrize("cores", [2, 8])
def test_the_fit_finds_the_constants_of_times_that_follow_the_model(cores: int) -> None:
    cases = [(model, batch, size) for model, batches in BATCHES.items() for batch in batches for size in WORLD_SIZES]
    measured = {case: predict(TRUE, *case, cores) for case in cases}
    fit = fit_all(measured, cores)
    assert fit.fixed_s == pytest.approx(TRUE.fixed_s)
    assert fit.image_s == pytest.approx(TRUE.image_s)
    assert (fit.alpha_s, fit.beta_s) == (pytest.approx(TRUE.alpha_s), pytest.approx(TRUE.beta_s))


def test_no_cost_is_below_zero_and_the_others_are_fitted_without_it() -> None:
    cases = [(model, batch, size) for model, batches in BATCHES.items() for batch in batches for size in WORLD_SIZES]
    measured = {case: predict(TRUE._replace(fixed_s={"mlp": -1e-5, "cnn": 0.0}), *case, cores=8) for case in cases}
    fit = fit_all(measured, cores=8)
    assert fit.fixed_s["mlp"] == 0
    assert 0 < fit.image_s["mlp"] < TRUE.image_s["mlp"]


def test_one_gpu_exchanges_nothing_and_more_are_less_efficient() -> None:
    assert efficiency("mlp", 512, 1) == 1
    shares = [efficiency("cnn", 32768, gpus) for gpus in (1, 2, 4, *GPUS)]
    assert shares == sorted(shares, reverse=True)
    assert on_gpus("cnn", 32768, 8) < on_gpus("cnn", 32768, 1)
    assert efficiency("cnn", 32768, 64) > efficiency("cnn", 512, 64)  # more work to a step
