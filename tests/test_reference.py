"""Small runs with a fixed seed give the numbers that they gave when tests/reference was recorded."""

import pytest
import reference_runs

pytestmark = pytest.mark.training

# Another processor's rounding, over 20 steps.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return reference_runs.places(tmp_path_factory.mktemp("places"))


@pytest.mark.training
@pytest.mark.parametrize("name", reference_runs.RUNS)
def test_numbers(name, made, tmp_path):
    reference_runs.carry_out(name, made, tmp_path / "out")
    assert reference_runs.distance(reference_runs.numbers(tmp_path / "out"), reference_runs.read(name)) < TOLERANCE
